"""study.py: its commands are ones the scripts understand, what is done is not done again, and its
measures are right on models and pairs whose answers are known."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import report
import reward
import rlhf
import sft
import study
import world
from model import GPT, GPTConfig, ScalarModel
from tokenizer import train_bpe
from training import STATE, InputError, finish, parse_args, save_checkpoint


def test_folders_that_cannot_be_used_get_one_line(monkeypatch, tmp_path):
    for name in ("base/done", "sft/done", "reward/done", "pairs.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for flags, message in ((["--runs", "x" * 300], "base/done: not there; run `make` first"), (["--out", tmp_path / "pairs.jsonl" / "x"], "could not be written")):
        monkeypatch.setattr(sys, "argv", ["study.py", "--runs", str(tmp_path), *map(str, flags)])
        with pytest.raises(InputError, match=message):
            study.main()


def test_what_the_main_reward_model_is_told_the_smaller_ones_are_too(tmp_path):
    (tmp_path / "reward").mkdir()
    for told, config in ((False, {"model_type": "qwen3"}), (True, {"model_type": "reward_with_reader", "reader": {}})):
        (tmp_path / "reward" / "config.json").write_text(json.dumps(config))
        commands = study.training_runs(study.Config(runs=str(tmp_path)))
        assert {"--surprisal" in commands[f"reward_{n}"] for n in study.SUBSETS} == {told}
        assert ("ppo_untold" in commands) is ("reward_untold" in commands) is told
    assert "--surprisal" not in commands["reward_untold"] and "ppo_untold" in report.ABLATIONS
    judged = commands["ppo_untold"].replace("out/study/reward_untold", f"{tmp_path}/reward")  # by another, else as usual
    assert judged == commands["ppo_no_whitening"].replace(" --no-whiten", "")


def test_every_command_parses_and_no_two_are_the_same():
    commands = study.training_runs(study.Config(runs="nowhere"))
    seen = set()
    for command in commands.values():
        script, *flags = shlex.split(command)
        Config = {"sft.py": sft.Config, "reward.py": reward.Config, "rlhf.py": None}[script]
        if script == "rlhf.py":
            stage, *flags = flags
            Config = {"dpo": rlhf.DPOConfig, "ppo": rlhf.PPOConfig, "grpo": rlhf.GRPOConfig}[stage]
        seen.add((script, str(parse_args(Config, [*flags, "--out", "x"]))))
    assert len(seen) == len(commands)
    for name, words in {"sft_scratch": "--from-scratch", "sft_best": "--best-only", "dpo_no_nll": "--nll 0", "ppo_no_critic":
                        "--no-critic", "ppo_no_whitening": "--no-whiten", "ppo_no_eos_score": "--no-eos-score nan",
                        "ppo_no_sharpness": "--sharpness-lr 0", "ppo_no_kl": "--beta 0",
                        "ppo_hacked": "--reward out/study/reward_750 "}.items():
        assert words in commands[name] and words not in commands["ppo"], name
    assert [name for name in ("rejection", "dpo", "grpo", "ppo", "ppo_no_replay", "ppo_hacked")
            if "--replay-data world" not in commands[name]] == ["ppo_no_replay", "ppo_hacked"]
    ppo = parse_args(rlhf.PPOConfig, shlex.split(commands["ppo_no_kl_seed3"])[2:])
    assert ppo.beta == 0 and ppo.seed == 3
    long = study.training_runs(study.Config(conversations=18000))
    assert all("--conversations 18000" in long[name] for name in ("sft_scratch", "sft_best"))
    assert {name.split("_seed")[0] for name in study.policies(study.Config())} <= set(report.ABLATIONS)


def test_a_stopped_study_goes_on_and_a_changed_run_is_made_anew(tmp_path, monkeypatch):
    runs, out = tmp_path / "runs", tmp_path / "study"
    config = study.Config(runs=str(runs), out=str(out))
    for name in ("base", "sft", "reward"):
        finish(runs / name, name, 1.0)
    (runs / "pairs.jsonl").touch()
    calls = []

    def call(command):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(command)
        finish(command[command.index("--out") + 1], command[0], 1.0)
    monkeypatch.setattr(study, "call", call)
    with pytest.raises(KeyboardInterrupt):
        study.train(config)
    names = list(study.training_runs(config))
    assert [command[command.index("--out") + 1] for command in calls] == [f"{out}/{n}" for n in names[:3]]
    assert all("--resume" not in command for command in calls)

    calls = [None] * 4  # go on: the fourth was begun, so it resumes
    study.train(config)
    again = calls[4:]
    assert any(str(Path(world.__file__).resolve()) + ":right" in command for command in again)  # from any folder
    assert [command[command.index("--out") + 1] for command in again] == [f"{out}/{n}" for n in names[3:]]
    assert "--resume" in again[0] and "--resume" not in again[1]

    (out / "report.json").write_text("{}")
    (out / "costs.json").write_text("{}")
    calls = [None] * 4
    study.train(config)
    assert calls == [None] * 4 and (out / "costs.json").exists()
    (out / names[5] / "command").write_text("rlhf.py ppo --beta 7")
    study.train(config)
    assert len(calls) == 5 and calls[4][-1] == f"{out}/{names[5]}"  # no --resume
    assert not (out / "report.json").exists() and not (out / "costs.json").exists()

    calls = []
    later = time.time() + 60
    os.utime(runs / "sft" / "done", (later, later))  # made again, since
    with pytest.raises(KeyboardInterrupt):
        study.train(config)
    assert len(calls) == 3 and not any("--resume" in command for command in calls)


def test_what_another_command_left_is_gone_before_the_script_starts(tmp_path, monkeypatch):
    """An old result, or an old save, must not pass for the new run's where that stops in its first seconds."""
    runs, out = tmp_path / "runs", tmp_path / "study"
    config = study.Config(runs=str(runs), out=str(out))
    for name in ("base", "sft", "reward"):
        finish(runs / name, name, 1.0)
    (runs / "pairs.jsonl").touch()
    first = out / next(iter(study.training_runs(config)))
    finish(first, "sft", 1.0)
    (first / "command").write_text("sft.py --of-another-scale")
    (first / STATE).touch()
    commands = []

    def stopped(command):
        commands.append(command)
        raise KeyboardInterrupt
    monkeypatch.setattr(study, "call", stopped)
    for resumes in (False, True):
        with pytest.raises(KeyboardInterrupt):
            study.train(config)
        assert not (first / "done").exists() and (first / STATE).exists() is resumes
        assert ("--resume" in commands.pop()) is resumes
        (first / STATE).touch()  # the second time the same command goes on from its own save


def test_a_save_older_than_the_world_is_not_gone_on_from(tmp_path, monkeypatch):
    """start_run would refuse it, each time."""
    config = study.Config(runs=str(tmp_path / "runs"), out=str(tmp_path / "study"))
    for name in ("base", "sft", "reward"):
        finish(tmp_path / "runs" / name, name, 1.0)
    (tmp_path / "runs" / "pairs.jsonl").touch()
    (tmp_path / "world.py").touch()
    monkeypatch.setattr(study, "world", SimpleNamespace(__file__=str(tmp_path / "world.py")))
    commands = []

    def stopped(command):
        commands.append(command)
        raise KeyboardInterrupt
    monkeypatch.setattr(study, "call", stopped)
    for newer in (None, -60, 60):
        if newer is not None:
            os.utime(tmp_path / "world.py", (time.time() + newer,) * 2)
        with pytest.raises(KeyboardInterrupt):
            study.train(config)
    assert ["--resume" in command for command in commands] == [False, True, False]


def test_what_was_made_from_other_runs_is_forgotten(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
        for stage in ("base", "sft", "reward"):
            finish(tmp_path / name / stage, stage, float(ord(name)))
    out = tmp_path / "study"
    out.mkdir()
    for name in "aba":  # all older than what the study writes
        config = study.Config(runs=str(tmp_path / name), out=str(out))
        study.forget_others(config)
        study.write_subsets(config)
        assert json.loads((out / "pairs_750.jsonl").read_text())["prompt"] == name
    (out / "ppo").mkdir()
    made = [out / "rejection_40_seed1.jsonl", out / "ppo" / "command"]
    for path in made:
        path.touch()
    (tmp_path / "a").rename(tmp_path / "moved")  # the same runs under another name
    study.forget_others(study.Config(runs=str(tmp_path / "moved"), out=str(out)))
    assert all(path.exists() for path in made)
    study.forget_others(study.Config(runs=str(tmp_path / "b"), out=str(out)))
    assert not any(path.exists() for path in made)


def test_best_of_groups_takes_the_best_of_each_group():
    scores = np.array([[1.0, 3.0, 2.0, 0.0], [5.0, 6.0, 8.0, 7.0]])
    gold = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    for n, chosen, best in ((1, [0.25, 0.65], [1.5, 6.5]), (2, [0.25, 0.65], [2.5, 7.0]), (4, [0.2, 0.7], [3.0, 8.0])):
        found = study.best_of_groups(gold, scores, n)
        assert np.allclose(found, (chosen, best))


def test_the_study_draws_its_own_demonstrations_from_what_ended(runs, tmp_path, monkeypatch):
    """The answer to each training prompt is here its length in tokens; every one of rank 7 was cut off."""
    def answers(policy, tokenizer, reward, prompts, n, *rest, **sampling):
        assert n == 8 and sampling["temperature"] == 1
        return [[*tokenizer.encode(str(len(ids))), *([tokenizer.im_end_id] if i != 7 else [])] for i, ids in enumerate(prompts)], None
    monkeypatch.setattr(study, "best_of_n", answers)
    config = study.Config(runs=str(runs), out=str(tmp_path), scale=0.001, device="cpu")
    study.write_rejection(config, torch.device("cpu"))
    rows = [json.loads(line)["messages"] for line in study.rows_file(config, "rejection").read_text("utf-8").splitlines()]
    tokenizer = study.open_speaker(runs / "sft").tokenizer
    assert len(rows) == 39 and all(len(study.chat_prompt(tokenizer, asked["content"])) == int(answered["content"])
                                   for asked, answered in rows)


def test_smaller_sets_of_pairs_are_smaller(tmp_path):
    """And their held-out pairs are all of them."""
    (tmp_path / "pairs.jsonl").write_text("".join(
        json.dumps({"prompt": str(n)} | ({"p": 0.9} if n % 4 == 3 else {})) + "\n" for n in range(2000)))
    for name in ("base", "sft", "reward"):
        finish(tmp_path / name, name, 1.0)
    study.write_subsets(study.Config(runs=str(tmp_path), out=str(tmp_path / "study")))
    for n in study.SUBSETS:
        known = ["p" in json.loads(line) for line in (tmp_path / "study" / f"pairs_{n}.jsonl").read_text().splitlines()]
        assert (known.count(False), known.count(True)) == (min(n, 1500), 500)


def test_errors_of_calibration_do_not_cancel():
    assert study.calibration(np.array([0.3] * 10 + [0.7] * 10), np.array([1.0] * 10 + [0.0] * 10))[1] == pytest.approx(0.7)


def test_correlation_is_symmetric_in_the_order_of_a_pair():
    rng = np.random.default_rng(1)
    x = rng.normal(size=500)
    y = 0.6 * x + 0.8 * rng.normal(size=500)
    r, low, high = study.correlation(x, y)
    assert r == pytest.approx(np.corrcoef(np.r_[x, -x], np.r_[y, -y])[0, 1])
    assert low < r < high and 0.5 < r < 0.7
    flip = rng.choice([-1.0, 1.0], size=500)
    assert study.correlation(flip * x, flip * y)[0] == pytest.approx(r)
    assert study.correlation(np.zeros(5), y[:5]) is None


def test_what_is_too_sure_is_divided_by_as_much():
    truth = np.linspace(-3, 3, 301)
    p = 1 / (1 + np.exp(-truth))
    for times in (0.5, 1.0, 2.5):
        assert study.truest_temperature(times * truth, p) == pytest.approx(times, abs=0.006)


def test_the_reward_model_is_measured_as_it_is(monkeypatch, tmp_path):
    """Where it says what is true, and where it likes long answers too much."""
    rng = np.random.default_rng(1)
    truth, longer = rng.normal(0, 1.5, size=4000), rng.choice([-1.0, 1.0], size=4000)  # of the first of two answers
    sign = np.where(rng.random(4000) < 1 / (1 + np.exp(-truth)), 1.0, -1.0)  # 1: the first was chosen
    truth, longer = sign * truth, sign * longer
    pairs = [data.Pair([], *(("so be it", "be it") if more > 0 else ("be it", "so be it")), float(1 / (1 + np.exp(-x))))
             for x, more in zip(truth, longer)]
    for name in (*(f"reward_{n}" for n in study.SUBSETS), "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done").write_text('{"train_pairs": 9}')
    model = SimpleNamespace(config=SimpleNamespace(context_length=9))
    monkeypatch.setattr(study, "fresh", lambda *_: True)
    monkeypatch.setattr(data, "load_preferences", lambda _: pairs)
    monkeypatch.setattr(data, "encode_pairs", lambda pairs, *_: pairs)
    monkeypatch.setattr(study, "load_reward", lambda *_: (model, SimpleNamespace(pad_id=0), 0.0, 2.0))
    for bias in (0.0, 0.8):
        margin = torch.tensor((truth + bias * longer) / 2)  # times `scale`: log-odds
        monkeypatch.setattr(study, "score_pairs", lambda *_: (margin, torch.zeros_like(margin)))
        found = study.measure_reward_model(study.Config(runs=str(tmp_path), out=str(tmp_path)), "cpu")
        if bias == 0:
            assert found["calibration_error"] < 0.02 and found["temperature"] == pytest.approx(1, abs=0.02)
            assert all(g["right"][0] == 1 for g in found["by_gap"] if g["pairs"])
    assert found["likes"]["length in words"][1] > 0.3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """out/ and out/study of tiny random models that need no training."""
    root = tmp_path_factory.mktemp("out")
    tokenizer = train_bpe(["The capital of Norway is Oslo. I do not know. Please see a doctor.\n"] * 3, 300)

    def tiny(seed):
        torch.manual_seed(seed)
        gpt = GPT(GPTConfig(tokenizer.vocab_size, context_length=256, layers=1, heads=2, kv_heads=2,
                            width=16, ffn_width=32))
        for parameter in gpt.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        return gpt
    save_checkpoint(root / "base", tiny(0), tokenizer, stage="pretrain")
    save_checkpoint(root / "sft", tiny(1), tokenizer)
    for name in ("base", "sft", "reward"):
        finish(root / name, name, 1.0, train_pairs=30)
    save_checkpoint(root / "reward", ScalarModel(tiny(2)), tokenizer, reward_shift=0.3, reward_scale=2.0)
    for n in study.SUBSETS:
        save_checkpoint(root / "study" / f"reward_{n}", ScalarModel(tiny(n)), tokenizer)
    for seed, name in enumerate((*study.policies(study.Config()), *(f"reward_{n}" for n in study.SUBSETS)), 5):
        if name in study.policies(study.Config()):
            save_checkpoint(root / "study" / name, tiny(seed), tokenizer)
        finish(root / "study" / name, name, 60.0, iterations=4, train_pairs=min(1000, int(name.split("_")[-1]))
               if name.startswith("reward") else 0)  # some of like size, as in `make quick`
    for name in ("ppo", "grpo", "dpo", "ppo_no_kl", "ppo_hacked"):
        save_checkpoint(root / "study" / name / "step_0002", tiny(40), tokenizer)
        save_checkpoint(root / "study" / name / "step_0004", tiny(41), tokenizer)  # as the last: not twice
    rows = [{"prompt": f"Say {n}.", "chosen": "Yes, of course.", "rejected": "No." * (1 + n % 3)}
            for n in range(30)]
    rows += [{"prompt": f"Tell {n}.", "chosen": "Yes, of course.", "rejected": "I do not know.",
              "p": 0.55 + n / 100} for n in range(40)]
    for name in ("pairs.jsonl", "study/heldout_pairs_scale0.05_seed1.jsonl"):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (root / "base" / "done").stat().st_mtime - 9
    os.utime(root / "pairs.jsonl", (before, before))  # the study was made from them
    return root


def test_pairs_are_counted_by_the_gap_their_p_was_made_of(monkeypatch, tmp_path):
    """p is written with six digits, so a gap of 0.1 comes back as 0.0999997, and one of 0.2 as 0.2000001."""
    gaps = [1 / 15, 0.1, 0.1, 0.2, 0.35, 0.55, 0.55, 1.0]
    pairs = [data.Pair([], "so be it", "be it", round(1 / (1 + np.exp(-gap / world.NOISE)), 6)) for gap in gaps]
    for name in (*(f"reward_{n}" for n in study.SUBSETS), "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done").write_text('{"train_pairs": 9}')
    monkeypatch.setattr(study, "fresh", lambda *_: True)
    monkeypatch.setattr(data, "load_preferences", lambda _: pairs)
    monkeypatch.setattr(data, "encode_pairs", lambda pairs, *_: pairs)
    monkeypatch.setattr(study, "load_reward", lambda *_: (
        SimpleNamespace(config=SimpleNamespace(context_length=9)), SimpleNamespace(pad_id=0), 0.0, 1.0))
    monkeypatch.setattr(study, "score_pairs", lambda *_: (torch.arange(8.0), torch.zeros(8)))
    found = study.measure_reward_model(study.Config(runs=str(tmp_path), out=str(tmp_path)), "cpu")
    assert [g["pairs"] for g in found["by_gap"]] == [1, 2, 1, 1, 3]


def test_half_a_checkpoint_is_no_point_of_a_curve(runs):
    part = runs / "study" / "ppo" / "step_0003" / ".part"  # what a kill while saving leaves
    part.mkdir(parents=True)
    try:
        assert [step for step, _ in study.kept(runs / "study" / "ppo")] == [2, 4]
    finally:
        shutil.rmtree(part.parent)


def test_what_is_older_than_a_run_or_the_code_is_measured_anew(tmp_path):
    config, path = study.Config(runs=str(tmp_path)), tmp_path / "curves.json"
    assert not study.fresh(config, path)
    for name in ("base", "sft", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done").touch()
        os.utime(tmp_path / name / "done", (10, 10))
    pairs = tmp_path / "pairs.jsonl"
    pairs.touch()
    os.utime(pairs, (10, 10))
    path.touch()
    assert study.fresh(config, path)
    os.utime(path, (20, 20))  # younger than the runs
    assert not study.fresh(config, path)
    path.touch()
    code = tmp_path / "rlhf.py"
    code.touch()
    os.utime(code, (path.stat().st_mtime + 1,) * 2)
    assert study.fresh(config, path) and not study.fresh(config, path, code)
    (tmp_path / "sft" / "done").touch()
    os.utime(tmp_path / "sft" / "done", (path.stat().st_mtime + 1,) * 2)
    assert not study.fresh(config, path)
    os.utime(tmp_path / "sft" / "done", (10, 10))
    os.utime(pairs, (path.stat().st_mtime + 1,) * 2)
    assert not study.fresh(config, path)


def test_everything_is_measured_and_lands_in_the_pages(runs, monkeypatch, capsys):
    by_family = {}
    for task in world.heldout_tasks():
        by_family.setdefault(task.family, []).append(task)
    tasks = [task for found in by_family.values() for task in found[:1]]
    monkeypatch.setattr(world, "heldout_tasks", lambda: tasks)
    monkeypatch.setattr(world, "heldout_documents", lambda: ["Paris is in France."] * 3)
    monkeypatch.setattr(study, "measuring", lambda config: evaluate.Config([], device="cpu", max_new_tokens=6))
    monkeypatch.setattr(study, "call", lambda command: evaluate.main(
        [*command[1:], "--max-new-tokens", "6", "--best-of", "2"]) if command[0] == "evaluate.py"
        else pytest.fail(f"not expected: {command}"))
    monkeypatch.setattr(study, "write_rejection", lambda *_: None)
    chosen_by, best_of_groups = [], study.best_of_groups
    monkeypatch.setattr(study, "best_of_groups", lambda gold, scores, n: chosen_by.append(scores) or
                        best_of_groups(gold, scores, n))
    temperatures, references, measure_temperature = [], [], study.measure_temperature
    def watched(config, device):
        with pytest.MonkeyPatch.context() as patch:
            ask, measure = evaluate.ask, evaluate.measure
            patch.setattr(evaluate, "ask", lambda *args: temperatures.append(args[3]) or ask(*args))
            patch.setattr(evaluate, "measure", lambda *args: references.append(args[1]) or measure(*args))
            return measure_temperature(config, device)
    monkeypatch.setitem(study.MEASURES, "temperature.json", watched)
    judged, gold, kls, kl, measure_curves = [], world.gold, [], study.sequence_kl, study.measure_curves
    def judging(config, device):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world, "gold", lambda task, text: judged.append(task) or gold(task, text))
            patch.setattr(study, "sequence_kl", lambda *args: kls.append(args[:2]) or kl(*args))
            return measure_curves(config, device)
    monkeypatch.setitem(study.MEASURES, "curves.json", judging)
    prompts, measure_prompting = [], study.measure_prompting
    def prompted(config, device):
        with pytest.MonkeyPatch.context() as patch:
            ask = evaluate.ask
            patch.setattr(evaluate, "ask", lambda speaker, asked, *rest: prompts.append(
                [speaker.tokenizer.decode(ids) for ids in asked]) or ask(speaker, asked, *rest))
            return measure_prompting(config, device)
    monkeypatch.setitem(study.MEASURES, "prompting.json", prompted)
    config = study.Config(runs=str(runs), out=str(runs / "study"), scale=0.05, device="cpu")
    for name, command in study.training_runs(config).items():
        (runs / "study" / name / "command").write_text(command)
    arguments = ["study.py", "--runs", config.runs, "--out", config.out, "--scale", "0.05", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    found = json.loads((runs / "study" / "study.json").read_text("utf-8"))

    curves = found["curves"]
    assert [p["step"] for p in curves["runs"]["ppo"]] == [0, 2, 4]
    assert curves["runs"]["ppo"][0]["kl"][0] == pytest.approx(0, abs=1e-6)
    assert curves["runs"]["ppo"][-1]["kl"][0] > 0.1
    assert curves["runs"]["ppo"][0]["proxy"] != curves["runs"]["ppo_hacked"][0]["proxy"]  # its own judge
    ns = curves["best_of_n"]
    assert [p["n"] for p in ns] == [1, 2, 4, 8] and ns[0]["kl"] == 0
    assert ns[3]["kl"] == pytest.approx(math.log(8) - 7 / 8, abs=1e-5)
    assert ns[0]["proxy"][0] < ns[1]["proxy"][0] < ns[3]["proxy"][0]
    assert len(chosen_by) == 2 * len(ns) and all((priced < plain)[np.isfinite(plain)].all() for plain, priced in zip(
        chosen_by[::2], chosen_by[1::2]))  # β times a log-prob, which is below 0, was added
    assert np.isfinite(chosen_by[0]).all() and np.isneginf(chosen_by[-1]).any()  # of several, none that was cut off
    assert ns[0]["distinct"][0] == 1 and ns[3]["distinct"][0] <= 8
    few = study.tasks_of_each_family(config, 30, least=2)  # each answer is judged against its own prompt
    assert judged[-8 * len(few):] == [task for task in sorted(few, key=lambda task: len(task.best)) for _ in range(8)]
    assert len({id(reference) for _, reference in kls}) == 1 < len({id(policy) for policy, _ in kls})  # KL(policy ‖ SFT)

    judge = found["reward_model"]
    assert judge["pairs"] == 40 and judge["noise_ceiling"] == pytest.approx(0.55 + 0.195)
    assert [p["pairs"] for p in judge["by_pairs"]] == [750, 1000, 1000, 30]
    assert sum(c["pairs"] for c in judge["calibration"]) == 80
    assert sum(g["pairs"] for g in judge["by_gap"]) == 40
    assert judge["likes"]["refuses"] is None and judge["likes"]["says “I do not know”"] is not None

    assert len({policy["entropy"][0] for policy in found["costs"]["policies"].values()}) == 8  # each is measured itself
    assert 0 < found["costs"]["policies"]["sft"]["entropy"][0] < math.log(400)
    rows = found["prompting"]["rows"]
    assert [(r["model"], r["shots"], bool(r["system"])) for r in rows[:6]] == [
        ("base", 0, False), ("base", 1, False), ("base", 2, False), ("base", 4, False), ("base", 8, False),
        ("base", 0, True)]
    assert rows[0]["shown"] == 0 < rows[1]["shown"] <= 1
    size = [sum(map(len, asked)) for asked in prompts]
    assert len(prompts) == 12 and size[0] < size[1] and size[6] < size[7]  # the examples, and the system prompt, are asked
    assert all((study.SYSTEM in prompt) is (i % 6 == 5) for i, asked in enumerate(prompts) for prompt in asked)

    rows = found["temperature"]["rows"]
    assert [(r["model"], r["temperature"]) for r in rows] == [
        (name, t) for name in ("sft", "dpo", "ppo") for t in (1, 0.7, 0.5, 0.3, 0)]
    assert all(r["right"] for r in rows)
    assert rows[0]["win_rate"] == [0.5, 0.5, 0.5] and found["temperature"]["prompts"] == len(tasks)
    assert temperatures == [r["temperature"] for r in rows] and len(set(map(id, references))) == 1

    page, notes = ((runs / "study" / f"report.{kind}").read_text("utf-8") for kind in ("html", "md"))
    for text in ("Which stage buys what", "Over-optimisation", "Is it only the temperature?", "calibration", "PPO without whitening"):
        assert text in page
    assert "PPO without whitening" in notes and "3 seeds" in notes
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    report_now = json.loads((runs / "study" / "report.json").read_text("utf-8"))
    for share, (how, name) in zip((0.1, 0.2, 0.3, 0.4), itertools.product(("accuracy_greedy", "accuracy_sampled"), ("sft", "grpo_right"))):
        report_now["checkpoints"][name][how]["families"]["arithmetic"] = share
    ppo = report_now["checkpoints"]["ppo_no_critic"]
    ppo["win_rate_vs_sft"], ppo["kl_from_sft"], ppo["proxy"] = [0.51, 0.5, 0.52], [5.3, 5.2, 5.4], [-5.5, -5.6, -5.4]
    sections = {heading: tables for heading, _, tables, _ in report.study_sections(report_now, found)}
    assert sections["A reward that can be checked"][0][1][0] == ["arithmetic", "10 %", "20 %", "30 %", "40 %"]
    headings, lines = sections["Which stage buys what"][0]
    row = dict(zip(headings, next(line for line in lines if line[0] == report.ABLATIONS["ppo_no_critic"])))
    assert (row["beats SFT"][:4], row["KL"][:4], row["reward"][:5]) == ("51 %", "5.30", "−5.50")
    report_now = json.loads((runs / "study" / "report.json").read_text("utf-8"))  # a study of others is left out
    report_now["checkpoints"] = {"sft": report_now["checkpoints"]["sft"]}
    capsys.readouterr()
    with pytest.raises(KeyError):  # study.py's own must fit
        report.write(runs / "study", report_now, found)
    report.write(runs / "study", report_now)
    assert "study.json is damaged, of other checkpoints" in capsys.readouterr().err
    assert "Which stage buys what" not in (runs / "study" / "report.html").read_text("utf-8")
    assert "ppo_no_whitening</dt>" not in page and "ppo</dt>" in page  # the browser shows the method's stages
    before = (runs / "study" / "study.json").read_text("utf-8")
    (runs / "study" / "costs.json").unlink()  # a part that is lost is measured again, the same
    monkeypatch.setattr(study.pages, "write", lambda *args: None)  # takes long, and was looked at
    study.main()
    assert (runs / "study" / "study.json").read_text("utf-8") == before

    (runs / "evaluate.py").touch()  # another judge, so all is measured anew
    monkeypatch.setattr(evaluate, "__file__", str(runs / "evaluate.py"))
    again = []
    monkeypatch.setattr(study, "call", lambda command: again.append(command[0]))
    for name in study.MEASURES:
        monkeypatch.setitem(study.MEASURES, name, lambda *_, name=name: again.append(name) or json.loads(
            (runs / "study" / name).read_text("utf-8")))
    study.main()
    assert again == ["evaluate.py", *study.MEASURES]


def test_distinct_answers_are_texts_not_tokens(monkeypatch):
    letters, task = {1: "a", 2: "b", 3: "ab", 9: ""}, world.COURSE_PROMPTS[0]
    speaker = SimpleNamespace(model=None, end_ids=(9,), text=lambda ids: "".join(map(letters.get, ids)))
    for name, value in {"tasks_of_each_family": [task], "checkpoint": None, "open_speaker": speaker,
                        "sampling": {}}.items():
        monkeypatch.setattr(study, name, lambda *args, value=value, **more: value)
    monkeypatch.setattr(study, "measuring", lambda config: SimpleNamespace(max_new_tokens=8))
    monkeypatch.setattr(study.evaluate, "prompts_for", lambda speaker, tasks, config: [[1]] * len(tasks))
    answers = [[1, 2, 9], [3, 9], [1, 9], [3]]
    monkeypatch.setattr(study, "generate_all", lambda model, prompts, *args, **more: (
        [answers[i % 4] for i in range(len(prompts))], [[-1.0] * len(answers[i % 4]) for i in range(len(prompts))]))
    assert study.measure_costs(None, "cpu", n=4)["policies"]["sft"]["distinct"][0] == 2


def test_another_scale_or_seed_has_files_of_its_own(tmp_path):
    configs = [study.Config(out=str(tmp_path), scale=scale, seed=seed) for scale in (1, 0.05) for seed in (1, 2)]
    assert len({study.rows_file(config, "rejection") for config in configs}) == 4
    assert len({study.training_runs(config)["rejection"] for config in configs}) == 4


@pytest.mark.parametrize("status", [130, 0])
def test_ctrl_c_waits_for_the_script_to_save(status, tmp_path):
    """The script here takes a while to end by itself, as one that saves does; past its last step it ends well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with Ctrl-C ignored
    script = tmp_path / "slow.py"
    script.write_text("import pathlib, signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: None)\n"
                      f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(0.3)\nsys.exit({status})\n")

    def press():
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=press, daemon=True).start()
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        study.call([str(script)])
    assert ended.type is SystemExit and ended.value.code == 130


def test_a_study_does_not_replace_the_main_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "--runs", str(tmp_path), "--out", f"{tmp_path}/x/.."])
    with pytest.raises(InputError, match="what --runs reads would be replaced"):
        study.main()
