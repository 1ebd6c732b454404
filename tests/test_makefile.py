"""Makefile: what is made again, what goes on, and what is forgotten. A stand-in for Python notes what it is asked."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import evaluate
import pretrain
import reward
import rlhf
import sft
from training import check_range, parse_args

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not shutil.which("make") or os.name == "nt", reason="no make")
REAL = ["tinystories-train-2mb.txt", "instructions-1100.json", "preferences-1100.json", "hh-harmless-test.jsonl.gz"]
STAGES = ["pretrain.py", "sft.py", "world.py", "rlhf.py dpo", "reward.py", "rlhf.py ppo", "evaluate.py"]


@pytest.fixture
def make(tmp_path):
    """make(*words) -> the stages that ran, in a folder with the code and a stand-in for Python."""
    (tmp_path / "tools").mkdir()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), ROOT / "Makefile", ROOT / "world_facts.txt",
                 ROOT / "requirements.txt"):
        copied = shutil.copy(path, tmp_path / path.relative_to(ROOT))
        os.utime(copied, (1000, 1000))
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    for name in REAL:  # `make real` looks whether its data are there
        (tmp_path / name).touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> asked\nwhile [ "$1" != --out ]; do shift; done\n'
                      'case "$2" in *.jsonl) touch "$2";; *report|*ablation) mkdir -p "$2"; touch "$2/report.json";; *) mkdir -p "$2"; touch "$2/done";;'
                      ' esac\n')
    python.chmod(0o755)

    names = ("MAKEFLAGS", "MFLAGS", "OUT", "SEED", "PRETRAIN", "SFT", "PAIRS", "REWARD", "DPO", "PPO", "PPO_FROM", "GOAL", "GRPO",
             "EVALUATE", "STUDY", "DATA")
    plain = {name: value for name, value in os.environ.items() if name not in names}

    def run(*words, status=0):
        (tmp_path / "asked").write_text("")
        made = subprocess.run(["make", "PY=./python", *words], cwd=tmp_path, capture_output=True, text=True, env=plain)
        assert made.returncode == status, made.stdout + made.stderr
        asked = (tmp_path / "asked").read_text().splitlines()
        return [next(stage for stage in [*STAGES, "rlhf.py grpo", "study.py"] if line.startswith(stage)) for line in asked]
    return run


def later(path):
    os.utime(path, (2**31, 2**31))


def test_what_is_out_of_date_is_made_again(make, tmp_path):
    assert make() == STAGES and make() == []
    assert make("PPO=--beta 0.2") == ["rlhf.py ppo", "evaluate.py"] and make("PPO=--beta 0.2") == []
    quoted = "EVALUATE=--system 'Be brief; be kind.'"
    assert make("PPO=--beta 0.2", quoted) == ["evaluate.py"] and make("PPO=--beta 0.2", quoted) == []
    later(tmp_path / "reward.py")
    assert make("PPO=--beta 0.2", quoted) == ["rlhf.py dpo", "reward.py", "rlhf.py ppo", "evaluate.py"]
    os.utime(tmp_path / "reward.py", (1000, 1000))
    assert make() == ["rlhf.py ppo", "evaluate.py"]
    for name in ("chat.py", "report.py", "evaluate.py"):
        later(tmp_path / name)
        assert make() == ["evaluate.py"], name
        os.utime(tmp_path / name, (1000, 1000))


def test_a_stage_is_made_with_what_it_needs_and_no_more(make):
    assert make("ppo") == ["pretrain.py", "sft.py", "world.py", "reward.py", "rlhf.py ppo"] and make("sft") == make("pairs") == []
    assert make("grpo") == ["rlhf.py grpo"] and make("grpo") == make("base") == make("reward") == []
    assert make("grpo", "GRPO=--group 4") == ["rlhf.py grpo"] and make("report", "GRPO=--group 4") == ["rlhf.py dpo", "evaluate.py"]
    assert make("dpo") == make() == []


def test_ppo_goes_on_from_where_it_is_told(make, tmp_path):
    assert make("ppo", "PPO_FROM=dpo") == ["pretrain.py", "sft.py", "world.py", "rlhf.py dpo", "reward.py", "rlhf.py ppo"]
    assert "--init out/dpo" in (tmp_path / "asked").read_text().splitlines()[-1] and make("ppo", "PPO_FROM=dpo") == []
    assert make("ppo", "PPO_FROM=dpo", "OUT=./out/") == []  # the same folder
    assert make("ppo", "PPO_FROM=dpo", "DPO=--beta 0.2") == ["rlhf.py dpo", "rlhf.py ppo"]
    assert make("ppo") == ["rlhf.py ppo"] and "--init out/sft" in (tmp_path / "asked").read_text()
    for words, start in ([], "dpo"), (["PPO_FROM=sft"], "sft"):
        make("long", *words)
        assert f"ppo --init out/long/{start} " in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("stage, made_from", [
    ("base", ["pretrain.py", "model.py", "tokenizer.py", "training.py", "data.py", "world.py", "world_facts.txt"]),
    ("sft", ["sft.py", "lora.py", "out/base/done"]),
    ("reward", ["reward.py", "out/pairs.jsonl", "tools/reward_with_reader.py"]), ("dpo", ["rlhf.py", "out/pairs.jsonl"]),
    ("ppo", ["rlhf.py", "out/reward/done"]), ("grpo", ["rlhf.py", "out/reward/done"]), ("sft_scratch", ["sft.py", "out/sft/done"])])
def test_a_stage_goes_on_only_if_nothing_it_is_made_from_changed(stage, made_from, make, tmp_path):
    assert make() == STAGES
    make("out/sft_scratch/done", "grpo")
    state = tmp_path / "out" / stage / "training_state.pt"
    for changed in (None, *made_from):
        for path in (*tmp_path.glob("*.py"), *tmp_path.glob("*.txt"), *(tmp_path / "out").rglob("*")):
            os.utime(path, (2000, 2000))
        (tmp_path / "out" / stage / "done").unlink()
        state.touch()
        os.utime(state, (3000, 3000))
        if changed:
            os.utime(tmp_path / changed, (4000, 4000))
        make(f"out/{stage}/done")
        assert state.exists() is (changed is None), changed


def test_the_ablation_has_rates_of_its_own_and_is_measured_once(make, tmp_path):
    asked = make("quick", "GOAL=ablation", "SFT=--lr 0.5")
    assert asked == ["pretrain.py", "sft.py", "sft.py", "evaluate.py"]
    *_, scratch, _ = (tmp_path / "asked").read_text().splitlines()
    config = parse_args(sft.Config, shlex.split(scratch)[1:])
    assert config.from_scratch and config.conversations == 1000  # as the SFT that it is compared with
    assert (config.lr, config.embed_lr, config.head_lr, config.adam_eps) == (0.02, 0.02, 0.004, 1e-8)
    assert make("quick", "GOAL=ablation", "SFT=--lr 0.5") == []


def test_real_goes_on_where_it_stopped(make, tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "empty").mkdir()
    assert make("real", "DATA=empty", status=2) == []  # before the folder of results remembers it
    for name in REAL:
        (tmp_path / "my data" / name).touch()
    for name in REAL:  # each is missed
        (tmp_path / "my data" / name).unlink()
        assert make("real", "DATA=my data", status=2) == []
        (tmp_path / "my data" / name).touch()
    assert make("real", "DATA=.") == ["pretrain.py", "sft.py", "reward.py", "reward.py", "rlhf.py dpo", "rlhf.py ppo"]
    assert make("real", "DATA=.") == [] and make("real", f"DATA={tmp_path}") == []  # the same folder
    (tmp_path / "out" / "real" / "dpo" / "done").unlink()
    assert make("real", "DATA=.") == ["rlhf.py dpo"] and make("real", "DATA=..", status=2) == []
    assert make("real", "DATA=nowhere", status=2) == make("real", status=2) == []
    shutil.rmtree(tmp_path / "out")
    assert len(make("real", "DATA=my data", "SEED=7", "OUT=mine")) == 6 and (tmp_path / "mine" / "real" / "ppo" / "done").exists()
    assert not (tmp_path / "out" / "real").exists()
    assert (tmp_path / "asked").read_text().count("--seed 7") == 6
    assert len(make("real", "DATA=my data")) == 6 and make("real", f"DATA={tmp_path}/my data") == []


def test_a_goal_has_the_settings_of_the_target(make, tmp_path):
    for target, words in (("quick", "--conversations 1000"), ("long", "--conversations 18000")):
        assert make(target, "GOAL=grpo") == ["pretrain.py", "sft.py", "world.py", "reward.py", "rlhf.py grpo"]
        assert words in (tmp_path / "asked").read_text() and make(target) == ["rlhf.py dpo", "rlhf.py ppo", "evaluate.py"]
        assert make(target, "GOAL=grpo") == []


def test_flags_of_the_command_line_follow_those_of_a_target(make, tmp_path):
    for target in ("quick", "long"):
        make(target, "PPO=--beta 0.7", "SFT=--epochs 9", "EVALUATE=--system 'Be brief; be kind.'")
        asked = (tmp_path / "asked").read_text()
        assert re.search(r"ppo .*--iterations \d+ .*--beta 0.7\n", asked)
        assert re.search(r"sft.py .*--conversations \d+ .*--epochs 9\n", asked) and "--system Be brief; be kind.\n" in asked


def test_the_reward_model_is_told_what_sft_thought_unless_asked_otherwise(make, tmp_path):
    for words, told in ([], True), (["REWARD=--epochs 3"], True), (["REWARD=--no-surprisal"], False):
        assert "reward.py" in make("reward", *words)
        (asked,) = (line for line in (tmp_path / "asked").read_text().splitlines() if line.startswith("reward.py"))
        assert parse_args(reward.Config, shlex.split(asked.removeprefix("reward.py"))).surprisal is told


def test_every_stage_is_made_from_what_it_should_be(make, tmp_path):
    lines = []
    for words in ([], ["grpo"]):
        make(*words, "OUT=m")
        lines += (tmp_path / "asked").read_text().splitlines()
    tail = "--data world --replay-data world --out m"
    for line in ("sft.py --init m/base --data world --out m/sft --resume", "world.py pairs --init m/sft --out m/pairs.jsonl",
                 "reward.py --init m/sft --data m/pairs.jsonl --out m/reward --resume --surprisal",
                 "rlhf.py dpo --init m/sft --data m/pairs.jsonl --replay-data world --out m/dpo --resume",
                 *(f"rlhf.py {s} --init m/sft --reward m/reward {tail}/{s} --resume" for s in ("ppo", "grpo")),
                 "evaluate.py m/base m/sft m/dpo m/ppo --reward m/reward --data m/pairs.jsonl --out m/report"):
        assert line in [found.strip() for found in lines], line


def test_another_seed_reaches_every_stage_that_draws(make, tmp_path):
    def seeds():
        return [re.findall(r"--seed (\d)", line) for line in (tmp_path / "asked").read_text().splitlines()]
    assert make("SEED=2") == STAGES and seeds() == 6 * [["2"]] + [[]]
    assert make("SEED=2") == [] and make("SEED=3", "PPO=--seed 5") == STAGES
    assert seeds() == 5 * [["3"]] + [["3", "5"], []]  # the last one counts
    assert make("grpo", "SEED=3") == ["rlhf.py grpo"] and seeds() == [["3"]]
    for target in ("out/sft_scratch/done", "study"):
        make(target, "SEED=3")
        assert seeds()[-1:] == [["3"]], target
    assert make("quick", "SEED=4") == STAGES and seeds() == 6 * [["4"]] + [[]]


def test_quick_and_long_go_where_they_are_told(make, tmp_path):
    for target in ("quick", "long"):
        assert make(target) == make(target, "OUT=mine") == STAGES
        assert (tmp_path / "out" / target / "base" / "done").exists() and (tmp_path / "mine" / "base" / "done").exists()
        shutil.rmtree(tmp_path / "mine")


@pytest.mark.parametrize("whose", ["yours", "ours"])
def test_an_environment_of_yours_is_never_cleared(whose, make, tmp_path):
    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> asked\n'
                                     'case "$*" in *--clear*) rm -rf .venv;; esac\n'
                                     '[ "$2" != venv ] || { mkdir -p .venv; touch .venv/pyvenv.cfg; }\n')
    if whose == "yours":
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / "pyvenv.cfg").touch()
    for again in (False, True, True):  # there is no pip, so it fails, and is asked again
        made = subprocess.run(["make", "PYTHON=./python", "venv"], cwd=tmp_path, capture_output=True,
                              env={**os.environ, "MAKEFLAGS": ""})
        assert made.returncode == 2
        asked = [line for line in (tmp_path / "asked").read_text().splitlines() if line.startswith("-m venv")]
        assert ("--clear" in asked[-1]) is (again and whose == "ours")


@pytest.mark.parametrize("target", [["quick"], ["long"], ["real", "DATA=."], ["ablation"]])
def test_what_a_target_asks_for_can_be_asked(target, make, tmp_path):
    """Its flags are those of the scripts, and their values are of the right kind."""
    make(*target)
    assert ("--from-scratch" in (tmp_path / "asked").read_text()) is (target == ["ablation"])
    configs = {"pretrain.py": pretrain.Config, "sft.py": sft.Config, "reward.py": reward.Config,
               "evaluate.py": evaluate.Config, "rlhf.py dpo": rlhf.DPOConfig, "rlhf.py ppo": rlhf.PPOConfig}
    asked = (tmp_path / "asked").read_text().splitlines()
    parsed = [parse_args(configs[name], shlex.split(line.removeprefix(name)))
              for line in asked for name in configs if line.startswith(name)]
    assert len(parsed) == sum(not line.startswith("world.py") for line in asked) >= 4
    for config in parsed:
        check_range(config)


def test_clean_forgets_the_folder_it_is_told(make, tmp_path):
    make(), make("OUT=mine")
    make("clean", "OUT=mine")
    assert (tmp_path / "out" / "report" / "report.json").exists() and not (tmp_path / "mine").exists()
    make("clean")
    assert not (tmp_path / "out").exists()
    for folder in ("my", "runs", "my runs"):
        (tmp_path / folder).mkdir()
    for out in ("my runs", "", " ", "my "):
        assert make("clean", f"OUT={out}", status=2) == make(f"OUT={out}", status=2) == []
    assert all((tmp_path / folder).exists() for folder in ("my", "runs", "my runs"))
