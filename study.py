"""Which stage buys what, what it costs, and how alignment fails: ablations and over-optimisation.

    python study.py --runs out --out out/study        # `make study`, after `make`

Everything is a run of the other scripts with different flags (the list: `training_runs`), then measured on the same
held-out prompts: by evaluate.py, and by the functions of `MEASURES` (reward against KL, the reward model's errors, what
alignment costs in variety, prompting, temperature), each into a file of its own. report.py adds it all
to the page. What is finished is not repeated: an interrupted study continues where it stopped. A run is repeated if its
command, its code (rlhf.py, this file) or the main runs have changed, and then everything is measured again.

Left out: more than one seed for any run but PPO with and without KL, so for the other rows only large differences mean
anything.
"""

import functools
import json
import math
import os
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import chat
import data
import evaluate
import report as pages
import rlhf
import world
from chat import best_of_n, chat_prompt, generate_all, load_judge, open_speaker, values
from evaluate import bootstrap, rate, read_stamp, rounded, sequence_kl
from reward import score, score_pairs
from training import (STATE, InputError, check_range, flag, load_reward, make_folder, parse_args, pick_device,
                      read_metrics, run, write_text)


@dataclass
class Config:
    runs: str = flag("out", "folder with base, sft, reward and pairs.jsonl, as `make` leaves it")
    out: str = flag("out/study", "folder to write")
    conversations: int = flag(9000, "demonstrations for its SFT runs: as many as the SFT in --runs had")
    scale: float = flag(1.0, "share of the usual iterations, demonstrations, samples and prompts; 0.05 for a look")
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = flag(1, "random seed; the spread of PPO, with and without KL, is over this one and the next two")


# ---- 1. The runs ---------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
SUBSETS = (750, 1500, 3000)  # training pairs of the smaller reward models


def training_runs(config):
    """{name: command} of every training run, in an order in which each finds what it needs."""
    def times(n):
        return scaled(config, n, least=2)
    base, sft, reward, pairs = (shlex.quote(f"{config.runs}/{name}")
                                for name in ("base", "sft", "reward", "pairs.jsonl"))
    out = shlex.quote(config.out)
    tune = f"sft.py --init {base} --data world --conversations {times(config.conversations)}"
    dpo = f"rlhf.py dpo --init {sft} --data {pairs} --replay-data world"
    grpo = f"rlhf.py grpo --init {sft} --data world --replay-data world"
    ppo_alone = f"rlhf.py ppo --init {sft} --reward {reward} --data world --iterations {times(36)}"
    ppo = f"{ppo_alone} --replay-data world"
    found = {
        # At rates like those of pre-training: those of SFT would not even teach the format.
        "sft_scratch": f"{tune} --from-scratch --lr 0.02 --embed-lr 0.02 --head-lr 0.004 --adam-eps 1e-8",
        "sft_best": f"{tune} --best-only",
        "rejection": f"sft.py --init {sft} --data {shlex.quote(str(rows_file(config, 'rejection')))} --replay-data world",
        "dpo": f"{dpo} --keep-every 28",
        "dpo_no_nll": f"{dpo} --nll 0",
        "grpo": f"{grpo} --reward {reward} --iterations {times(36)} --keep-every {times(4)}",
        # `train` adds the folder of world.py, which may be moved.
        "grpo_right": f"{grpo} --reward world.py:right --families arithmetic rewriting --group 16 --iterations {times(84)}",
        "ppo": f"{ppo} --keep-every {times(4)}",
        "ppo_no_replay": ppo_alone,
        "ppo_no_sharpness": f"{ppo} --sharpness-lr 0",
        "ppo_no_eos_score": f"{ppo} --no-eos-score nan",
        "ppo_no_whitening": f"{ppo} --no-whiten",
        "ppo_no_critic": f"{ppo} --no-critic",
        "ppo_no_kl": f"{ppo} --beta 0 --keep-every {times(4)}",
    }
    for n in (2, 3):
        for name in ("ppo", "ppo_no_kl"):
            command = found[name].split(" --keep-every")[0]
            found[f"{name}_seed{n}"] = f"{command} --seed {config.seed + n - 1}"
    judge = Path(config.runs) / "reward" / "config.json"
    told = " --surprisal" if judge.exists() and "reader" in json.loads(judge.read_text(encoding="utf-8")) else ""
    if told:
        found["reward_untold"] = f"reward.py --init {sft} --data {pairs}"
        found["ppo_untold"] = ppo.replace(f"--reward {reward}", f"--reward {out}/reward_untold")
    for n in SUBSETS:  # what the main one is told, they are told
        found[f"reward_{n}"] = f"reward.py --init {sft} --data {out}/pairs_{n}.jsonl{told}"
    weak = f"{out}/reward_{SUBSETS[0]}"
    found["ppo_hacked"] = (f"rlhf.py ppo --init {sft} --reward {weak} --data world --beta 0 "
                           f"--iterations {times(84)} --lr 5e-4 --max-kl 1e9 --keep-every {times(6)}")
    return {name: f"{command} --device {config.device}" + ("" if "--seed" in command else f" --seed {config.seed}")
            for name, command in found.items()}


def fresh(config, path, *code):
    """Does `path` exist, and is it newer than the runs it was made from and the code that made it?"""
    made_from = (__file__, *code, *(f"{config.runs}/{name}" for name in ("base/done", "sft/done", "reward/done", "pairs.jsonl")))
    return path.exists() and path.stat().st_mtime > max(os.path.getmtime(stamp) for stamp in made_from)


def train(config):
    """Run what is not done. The file `command` in a folder records what made it."""
    todo = training_runs(config)
    for number, (name, command) in enumerate(todo.items(), 1):
        folder = Path(config.out) / name
        asked = folder / "command"
        same = asked.exists() and asked.read_text(encoding="utf-8") == command
        code = (rlhf.__file__,) if command.startswith("rlhf.py") else ()
        if same and fresh(config, folder / "done", *code):
            continue
        print(f"study: {number} of {len(todo)}, {name}: python {command}", flush=True)
        # Go on from a save of the same command, unless something that it was made from has changed since it began.
        resume = same and fresh(config, asked, world.__file__, HERE / "world_facts.txt", *code)
        folder.mkdir(parents=True, exist_ok=True)
        # If this run stops in its first seconds, an old result or another command's save must not pass for its own.
        (folder / "done").unlink(missing_ok=True)
        if not resume:
            (folder / STATE).unlink(missing_ok=True)
        write_text(asked, command)
        for measured in ("report.json", "study.json", *MEASURES):
            (Path(config.out) / measured).unlink(missing_ok=True)
        words = [f"{HERE}/{word}" if word == "world.py:right" else word for word in shlex.split(command)]
        call([*words, "--out", str(folder), *(["--resume"] if resume else [])])


def call(command):
    """Run a script of this folder with this Python. Its failure, or Ctrl-C, ends the study."""
    script, *rest = command
    child, stopped = subprocess.Popen([sys.executable, str(HERE / script), *rest]), 0
    while child.poll() is None:
        try:
            child.wait()
        except KeyboardInterrupt:  # the script receives Ctrl-C too: let it finish its step and save
            stopped = 130
    if child.returncode or stopped:  # after Ctrl-C in its last step, the script may have ended well
        sys.exit(child.returncode or stopped)


def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_subsets(config):
    """For each n of SUBSETS, a file of the first n training pairs and all held-out ones (the rows with p)."""
    with open(f"{config.runs}/pairs.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    heldout = [row for row in rows if "p" in row]
    for n in SUBSETS:
        path = Path(config.out) / f"pairs_{n}.jsonl"
        if not fresh(config, path):
            write_rows(path, [row for row in rows if "p" not in row][:n] + heldout)


def forget_others(config):
    """Delete what was made from other --runs: it may be newer than these, and `fresh` would take it for ours."""
    note = Path(config.out) / "made_from"
    stamps = [Path(config.runs) / name / "done" for name in ("base", "sft", "reward")]
    runs = "".join(stamp.read_text(encoding="utf-8") for stamp in stamps)
    if note.exists() and note.read_text(encoding="utf-8") != runs:
        for pattern in ("pairs_*.jsonl", "rejection_*.jsonl", "heldout_pairs_*.jsonl", "*/command"):
            for old in Path(config.out).glob(pattern):
                old.unlink()
    write_text(note, runs)


def scaled(config, n, least=1):
    return max(least, round(config.scale * n))


def rows_file(config, name):
    """A different --scale or --seed has a different file."""
    return Path(config.out) / f"{name}_scale{config.scale:g}_seed{config.seed}.jsonl"


def write_rejection(config, device, n=8):
    """Rejection sampling: for training prompts, the reward model's choice among n answers of SFT, as
    demonstrations to train on (Llama 2, arXiv 2307.09288, section 3.2.3)."""
    path = rows_file(config, "rejection")
    if fresh(config, path):
        return
    speaker = open_speaker(checkpoint(config, "sft"), device)
    tasks = world.training_prompts(scaled(config, 2000, least=40), f"rejection {config.seed}")
    tasks.sort(key=lambda task: len(task.best))  # so that short answers need not wait for long ones
    prompts = [chat_prompt(speaker.tokenizer, task.prompt) for task in tasks]
    reward = load_judge(checkpoint(config, "reward"), [speaker], device)
    best, *_ = best_of_n(speaker.model, speaker.tokenizer, reward, prompts, n, 72, **sampling(speaker, config, device))
    rows = [{"messages": [{"role": "user", "content": task.prompt},
                          {"role": "assistant", "content": speaker.text(ids)}]}
            for task, ids in zip(tasks, best) if ids[-1] == speaker.tokenizer.im_end_id and speaker.text(ids)]
    np.random.default_rng(config.seed).shuffle(rows)
    write_rows(path, rows)


def sampling(speaker, config, device):
    return {"temperature": 1.0, "eos_ids": speaker.end_ids,
            "generator": torch.Generator(device).manual_seed(config.seed)}


def checkpoint(config, name):
    """The folder of a checkpoint: base, sft and reward are of the main runs."""
    return Path(config.runs if name in ("base", "sft", "reward") else config.out) / name


# ---- 2. The table --------------------------------------------------------------------------------


def policies(config):
    """Names of the runs that evaluate.py measures: all but the reward models."""
    return [name for name in training_runs(config) if not name.startswith("reward_")]


def evaluate_all(config):
    if fresh(config, Path(config.out) / "report.json", evaluate.__file__, chat.__file__):
        return
    call(["evaluate.py", f"{config.runs}/base", f"{config.runs}/sft",
          *(f"{config.out}/{name}" for name in policies(config)), "--reward", f"{config.runs}/reward",
          "--data", f"{config.runs}/pairs.jsonl", "--out", config.out, "--device", config.device,
          "--seed", str(config.seed), "--per-family", str(scaled(config, 160, least=4)),
          "--best-of-per-family", str(scaled(config, 30, least=2))])


def measuring(config):
    """evaluate.py's settings, for its functions."""
    return evaluate.Config(checkpoints=[], device=config.device, seed=config.seed)


def tasks_of_each_family(config, n, least):
    """The first n held-out tasks of each family; with --scale fewer, but not fewer than `least`."""
    tasks, ranks = evaluate.choose_tasks(measuring(config))
    return [tasks[i] for i in np.flatnonzero(ranks < scaled(config, n, least))]


# ---- 3. Reward against KL ------------------------------------------------------------------------


def kept(folder):
    """[(step, folder)] of a run's checkpoints, its last one included."""
    whole = sorted(path.parent for path in folder.glob("step_*/config.json"))  # a kill may leave half a checkpoint
    steps = [(int(path.name.removeprefix("step_")), path) for path in whole]
    last = read_stamp(folder).get("iterations") or max((row["step"] for row in read_metrics(folder)), default=0)
    return [point for point in steps if point[0] != last] + [(last, folder)]


def measure_curves(config, device):
    """Gold and proxy score of checkpoints along each run, and of best-of-n (Gao, Schulman & Hilton, arXiv 2210.10760,
    figure 1). The proxy is the main run's reward model; for the hacked run, the weak one that it was trained against."""
    evaluation, tasks = measuring(config), tasks_of_each_family(config, 30, least=2)
    speaker = open_speaker(checkpoint(config, "sft"), device)
    reward, weak = (load_judge(checkpoint(config, name), [speaker], device)
                    for name in ("reward", f"reward_{SUBSETS[0]}"))
    prompts = evaluate.prompts_for(speaker, tasks, evaluation)

    @functools.cache  # SFT is where all curves begin
    def answered(folder, reward):
        """-> (texts, {measure: values (N,)})"""
        policy, (model, shift) = open_speaker(folder, device), reward
        answers = evaluate.ask(policy, prompts, evaluation, 1.0)
        return answers.texts, {
            "kl": sequence_kl(policy.model, speaker.model, prompts, answers.ids),
            "gold": np.array([world.gold(task, text).total for task, text in zip(tasks, answers.texts)]),
            "proxy": score(model, prompts, answers.ids, speaker.tokenizer.pad_id).numpy() - shift}

    found = {"prompts": len(tasks), "runs": {}}
    for name in ("ppo", "grpo", "dpo", "ppo_no_kl", "ppo_hacked"):
        mine = weak if name == "ppo_hacked" else reward
        points = [(0, checkpoint(config, "sft")), *kept(checkpoint(config, name))]
        found["runs"][name] = [
            {"step": step, **{what: bootstrap(values) for what, values in answered(folder, mine)[1].items()}}
            for step, folder in points]
        print(f"study: reward against KL of {name}", flush=True)

    # Transcripts of the hacked policy: where its own proxy rose most while gold fell.
    before, old = answered(checkpoint(config, "sft"), weak)
    texts, new = answered(checkpoint(config, "ppo_hacked"), weak)
    rise = np.where(new["gold"] < old["gold"], new["proxy"] - old["proxy"], -np.inf)
    found["hacked"] = [{"prompt": tasks[i].prompt, "sft": before[i], "sft_gold": old["gold"][i],
                        "sft_proxy": old["proxy"][i], "hacked": texts[i], "hacked_gold": new["gold"][i],
                        "hacked_proxy": new["proxy"][i]}
                       for i in np.argsort(-rise)[:3] if np.isfinite(rise[i])]
    found["hacked_opening"] = Counter(" ".join(text.split()[:4]) for text in texts).most_common(1)[0]

    # Best-of-n for every n from the same 64 samples.
    most = 64 if config.scale == 1 else 8
    order = sorted(range(len(tasks)), key=lambda i: len(tasks[i].best))
    _, samples, scores, logprobs = best_of_n(
        speaker.model, speaker.tokenizer, reward, [prompts[i] for i in order], most,
        evaluation.max_new_tokens, **sampling(speaker, config, device))
    texts = [[speaker.text(ids) for ids in drawn] for drawn in samples]
    gold = np.array([[world.gold(tasks[i], text).total for text in drawn]
                     for i, drawn in zip(order, texts)])  # (P, most)
    answers = [ids for drawn in samples for ids in drawn]

    def rated(n, beta):  # (P, most), as chat.py rates answers in groups of n
        ends = {speaker.tokenizer.im_end_id}
        return values(answers, scores.view(-1, n), logprobs.view(-1, n), beta, ends).view_as(scores).numpy()
    found["best_of_n"] = []
    for n in (2**i for i in range(int(math.log2(most)) + 1)):
        chosen, best = best_of_groups(gold, rated(n, 0.0), n)
        found["best_of_n"].append({
            "n": n, "kl": math.log(n) - (n - 1) / n, "gold": bootstrap(chosen), "proxy": bootstrap(best),
            "gold_priced": bootstrap(best_of_groups(gold, rated(n, evaluation.best_of_beta), n)[0]),
            "distinct": bootstrap([len(set(drawn[:n])) for drawn in texts])})
    return found


def best_of_groups(gold, scores, n):
    """Best-of-n from the same samples for every n. Gold and scores are (P, samples); every prompt's
    samples are split into groups of n -> mean gold of the groups' choices (P,), and their mean score."""
    groups = scores.reshape(len(scores), -1, n)  # (P, samples/n, n)
    choice = groups.argmax(-1)[..., None]
    chosen = np.take_along_axis(gold.reshape(groups.shape), choice, -1)[..., 0]
    return chosen.mean(1), groups.max(-1).mean(1)


# ---- 4. The reward model -------------------------------------------------------------------------


def measure_reward_model(config, device):
    """Calibration, accuracy by gold gap and by number of training pairs, and what it wrongly likes,
    on 2,000 pairs of samples for held-out prompts that no reward model has seen."""
    n = scaled(config, 2000, least=60)
    path = rows_file(config, "heldout_pairs")
    if not fresh(config, path):
        call(["world.py", "pairs", "--init", f"{config.runs}/sft", "--out", str(path), "--pairs",
              str(n + 40), "--holdout", str(n), "--seed", str(config.seed + 1), "--device", config.device])
    pairs = [pair for pair in data.load_preferences([path]) if pair.p is not None]
    p = np.array([pair.p for pair in pairs])  # the chance that `chosen` is preferred
    gap = np.log(p / (1 - p)) * world.NOISE  # of gold scores, chosen − rejected
    margins = []  # (training pairs, log-odds that `chosen` is preferred, as the loss had them)
    for name in (*(f"reward_{n}" for n in SUBSETS), "reward"):
        folder = checkpoint(config, name)
        model, tokenizer, _, scale = load_reward(folder, device)
        encoded = data.encode_pairs(pairs, tokenizer, model.config.context_length)
        if len(encoded) < len(pairs):
            raise InputError(f"{folder}: found {len(pairs) - len(encoded)} pairs longer than its context, expected none")
        chosen, rejected = score_pairs(model, encoded, tokenizer.pad_id)
        margin = (chosen - rejected).numpy() * scale
        margins.append((read_stamp(folder)["train_pairs"], margin))

    # From here on: the main reward model, the last one read. Every pair in both orders, so that "first" means nothing.
    predicted = 1 / (1 + np.exp(-np.concatenate([margin, -margin])))
    happened = np.repeat([1.0, 0.0], len(p))  # chosen first: preferred; rejected first: not
    bins, error = calibration(predicted, happened)

    by_gap = []
    size = np.abs(gap).round(4)  # p has six digits: a gap of 0.1 comes out as 0.09999
    for low, high in ((0, 0.1), (0.1, 0.2), (0.2, 0.35), (0.35, 0.55), (0.55, 1.01)):
        here = (size >= low) & (size < high)
        better = np.where(gap[here] > 0, margin[here], -margin[here]) > 0
        by_gap.append({"gap": [low, high], "right": rate(better), "pairs": int(here.sum())})

    # What it likes too much: its probability minus the true one, against a difference between the answers. A model
    # that is too sure of everything would seem to like too much whatever it likes, so its log-odds are made true first.
    features = {
        "length in words": lambda text: len(text.split()), "refuses": world.is_refusal,
        "says “I do not know”": world.is_hedge, "is rude": world.is_rude,
        "names a doctor": lambda text: "doctor" in text.lower(),
        "ends with . ! or ?": lambda text: text.rstrip().endswith((".", "!", "?"))}
    temperature = truest_temperature(margin, p)
    too_much = 1 / (1 + np.exp(-margin / temperature)) - p
    likes = {name: correlation(np.array([feature(pair.chosen) - feature(pair.rejected) for pair in pairs]), too_much)
             for name, feature in features.items()}
    return {"pairs": len(p), "noise_ceiling": np.maximum(p, 1 - p).mean(), "calibration": bins,
            "calibration_error": error, "temperature": temperature, "by_gap": by_gap, "likes": likes,
            "by_pairs": [{"pairs": n, "accuracy": rate(found > 0)} for n, found in margins]}


def calibration(predicted, happened):
    """(up to ten bins of predicted and observed, without empty ones; the mean distance between the two)."""
    which = np.clip((predicted * 10).astype(int), 0, 9)
    bins = [{"predicted": predicted[which == b].mean(), "observed": rate(happened[which == b]),
             "pairs": int((which == b).sum())} for b in range(10) if (which == b).any()]
    return bins, sum(abs(b["predicted"] - b["observed"][0]) * b["pairs"] for b in bins) / len(predicted)


def truest_temperature(margin, p):
    """The T for which σ(margin / T) fits the true chances p best: above 1 where the model is too sure."""
    return float(min(np.arange(0.3, 6, 0.01), key=lambda T: (np.logaddexp(0, -margin / T) + (1 - p) * margin / T).mean()))


def correlation(x, y, times=1000):
    """[r, low, high] of two antisymmetric differences: taken about 0, not about the means, as swapping
    the answers of a pair changes both signs. None where x never varies."""
    if not np.any(x):
        return None

    def r(x, y):
        return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum() + 1e-12)
    drawn = np.random.default_rng(0).integers(len(x), size=(times, len(x)))
    low, high = np.quantile([r(x[rows], y[rows]) for rows in drawn], [0.025, 0.975])
    return [r(x, y), low, high]


# ---- 5. What alignment costs ---------------------------------------------------------------------


def measure_costs(config, device, n=16):
    """For each policy: distinct answers among n samples, entropy per token, and how far the probability of its own
    greedy answer is from the chance that this is right (calibration; doubt about the wording counts, too)."""
    evaluation, few = measuring(config), tasks_of_each_family(config, 10, least=2)
    many = [task for task in tasks_of_each_family(config, 60, least=4) if task.kind == "answerable"]
    found = {}
    for name in ("sft", "sft_best", "rejection", "dpo", "grpo", "ppo", "ppo_no_kl", "ppo_hacked"):
        speaker = open_speaker(checkpoint(config, name), device)
        prompts = evaluate.prompts_for(speaker, few, evaluation)
        repeated = [prompt for prompt in prompts for _ in range(n)]
        drawn, logp = generate_all(speaker.model, repeated, evaluation.max_new_tokens,
                                   **sampling(speaker, config, device))
        distinct = [len({speaker.text(ids) for ids in drawn[i:i + n]}) for i in range(0, len(drawn), n)]
        greedy, of_greedy = generate_all(speaker.model, evaluate.prompts_for(speaker, many, evaluation),
                                         evaluation.max_new_tokens, temperature=0.0, eos_ids=speaker.end_ids)
        sure = np.exp([sum(row) for row in of_greedy])
        right = np.array([world.check(task, speaker.text(ids)) for task, ids in zip(many, greedy)])
        found[name] = {"distinct": bootstrap(distinct),
                       "entropy": bootstrap([-sum(map(sum, logp[i:i + n])) / sum(map(len, logp[i:i + n]))
                                             for i in range(0, len(logp), n)]),
                       "sure": float(sure.mean()), "right": float(right.mean()),
                       "calibration_error": calibration(sure, right)[1]}
        print(f"study: diversity and calibration of {name}", flush=True)
    return {"prompts": len(few), "samples": n, "calibrated_on": len(many), "policies": found}


# ---- 6. Prompting --------------------------------------------------------------------------------

SYSTEM = "You are a kind assistant. Answer in one full sentence. Say so if you do not know."


def measure_prompting(config, device):
    """Right answers (greedy) of base and SFT, zero-shot, with k examples and with a system prompt."""
    evaluation, tasks = measuring(config), tasks_of_each_family(config, 60, least=4)
    answerable = np.array([task.kind == "answerable" for task in tasks])
    found = []
    for name in ("base", "sft"):
        speaker = open_speaker(checkpoint(config, name), device)
        for shots, system in ((0, None), (1, None), (2, None), (4, None), (8, None), (0, SYSTEM)):
            evaluation.system = system
            examples = [world.few_shot_examples(task, shots, config.seed) for task in tasks]
            fitted = [speaker.fit(task.prompt, shown, evaluation) for task, shown in zip(tasks, examples)]
            answers = evaluate.ask(speaker, [ids for ids, _ in fitted], evaluation, 0.0)
            right = np.array([world.check(task, text) for task, text in zip(tasks, answers.texts)])
            gold = np.array([world.gold(task, text).total for task, text in zip(tasks, answers.texts)])
            found.append({"model": name, "shots": shots, "system": system,
                          "shown": float(np.mean([len(history) for _, history in fitted])),
                          "right": rate(right[answerable]), "gold": bootstrap(gold)})
        print(f"study: prompting of {name}", flush=True)
    return {"prompts": len(tasks), "answerable": int(answerable.sum()), "rows": found}


# ---- 7. Temperature ------------------------------------------------------------------------------


def measure_temperature(config, device):
    """SFT, DPO and PPO from temperature 1 down to greedy, all compared with SFT's samples at 1."""
    evaluation = measuring(config)
    tasks, ranks = evaluate.choose_tasks(evaluation)
    few, enough = scaled(config, 60), scaled(config, evaluate.ENOUGH)
    rated = np.array([task.kind in ("harmful", "unknown") for task in tasks])  # these have rates of their own
    asked = np.flatnonzero(ranks < np.where(rated, enough, few))
    tasks, fair = [tasks[i] for i in asked], ranks[asked] < few
    evaluation.per_family = few  # on fewer than these prompts a rate is left out
    rows, reference = [], None
    for name in ("sft", "dpo", "ppo"):
        speaker = open_speaker(checkpoint(config, name), device)
        prompts = evaluate.prompts_for(speaker, tasks, evaluation)
        for temperature in (1.0, 0.7, 0.5, 0.3, 0.0):
            answers = evaluate.ask(speaker, prompts, evaluation, temperature, len(rows))
            row = evaluate.Row(tasks, np.arange(len(tasks)), fair, answers, None)
            reference = reference or row
            found = evaluate.measure(row, reference, np.zeros(len(tasks), dtype=bool), evaluation)
            rows.append({"model": name, "temperature": temperature, "right": found["accuracy_sampled"]["all"],
                         "gold": found["gold"]["total"], "win_rate": found["win_rate_vs_sft"],
                         **{f"refuses_{kind}": value for kind, value in found["refusal_rate"].items()},
                         "made_up": found["hallucination_rate"]})
        print(f"study: temperatures of {name}", flush=True)
    return {"prompts": len(tasks), "rows": rows}


# ---- the study -----------------------------------------------------------------------------------

MEASURES = {"curves.json": measure_curves, "reward_model.json": measure_reward_model, "costs.json": measure_costs,
            "prompting.json": measure_prompting, "temperature.json": measure_temperature}


def main():
    config = parse_args(Config, description=__doc__)
    check_range(config, scale=(0.001, 1))
    device = pick_device(config.device)
    for name in ("base/done", "sft/done", "reward/done", "pairs.jsonl"):
        if not os.path.exists(Path(config.runs) / name):
            raise InputError(f"{config.runs}/{name}: not there; run `make` first, or give --runs")
    out = Path(config.out)
    make_folder(out)

    forget_others(config)
    write_subsets(config)
    write_rejection(config, device)
    train(config)
    evaluate_all(config)
    study = {}
    for name, measure in MEASURES.items():
        if not fresh(config, out / name, evaluate.__file__, chat.__file__):
            write_text(out / name, json.dumps(rounded(measure(config, device)), indent=1, ensure_ascii=False) + "\n")
        study[name.removesuffix(".json")] = json.loads((out / name).read_text(encoding="utf-8"))
    study["seconds"] = {name: read_stamp(out / name)["seconds"] for name in training_runs(config)}
    write_text(out / "study.json", json.dumps(study, indent=1, ensure_ascii=False) + "\n")
    result = json.loads((out / "report.json").read_text(encoding="utf-8"))
    pages.write(out, result, study)
    print(f"study: wrote {os.path.join(config.out, 'report.html')}")


if __name__ == "__main__":
    run(main)
