"""Measure checkpoints on the same held-out prompts of the embedded world, with 95 % intervals.

    python evaluate.py out/base out/sft out/dpo out/ppo --reward out/reward --data out/pairs.jsonl

writes report.json, report.md and report.html to out/report. Every checkpoint answers every prompt twice: greedily, and
with one sample at temperature 1. Right answers are counted in both; all else is measured on the sample. A base model, to save
time, answers only greedily, in the plain format of chat.py, zero-shot and, in a row of its own, few-shot. Best-of-n is a
row too: the choice by reward and log-prob (chat.py) among n samples of the reference (the checkpoint called `sft`), drawn
for part of the prompts. These also tell which questions the reference can answer: only there is "I do not know" needless.

Means are taken over equally many prompts of each family, KL over the prompts of best-of-n, and a rate about one kind of
prompt over all of that kind; rates of few prompts are left out. Rates have Wilson's interval, means a bootstrap over
prompts; comparisons with the reference are paired prompt by prompt. (So between rows with more and with fewer prompts
compare the win rates: the first prompts of a family can be easier than the rest.) Left out: several training seeds, so
the intervals are about these checkpoints, not about the method. (`report.py` reads several reports together.)
"""

import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import data
import report as pages
import world
from chat import BEST_OF_BETA, Speaker, best_of_n, can_judge, chat_prompt, generate_all, open_speaker
from pretrain import heldout_loss
from reward import heldout_report, score, score_pairs, wilson
from tokenizer import ENDOFTEXT, IM_END, IM_START, same_tokens
from training import (InputError, check_range, flag, load_reward, make_folder, parse_args, pick_device, run, write_text)

ENOUGH = 160  # prompts for a rate about one kind of prompt, however small --per-family is


@dataclass
class Config:
    checkpoints: list[str] = field(metadata={
        "positional": True, "help": "folders of language models; a folder's name names its row"})
    reward: str | None = flag(None, "folder of the reward model, for its scores (the proxy of the judge) and best-of-n")
    data: list[str] | None = flag(None, "preference files; the reward model is measured on their rows with a p (default: "
                                   "the report repeats what reward.py measured at its end)")
    out: str = flag("out/report", "folder for report.json, report.md and report.html")
    reference: str = flag("sft", "name of the checkpoint that win rate and KL compare with")
    few_shot: int = flag(2, "solved examples in the few-shot row of a base model, or as many as fit; 0: no such row")
    best_of: int = flag(16, "samples per prompt of the best-of-n row; 1: no such row, and no rate of needless "
                        "\"I do not know\"")
    best_of_beta: float = flag(BEST_OF_BETA, "weight of the log-prob in that choice, see chat.py; 0: reward alone")
    best_of_per_family: int = flag(16, "prompts of each family for best-of-n, KL and needless \"I do not know\"; at most "
                                     "--per-family")
    per_family: int = flag(160, "held-out prompts of each family for all else, at most 160 (harmful, unknown and the unseen "
                           "family: always 160)")
    system: str | None = flag(None, "instruction put before every prompt (default: that of each folder, if any)")
    max_new_tokens: int = flag(80, "longest answer, in tokens")
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = flag(1, "random seed of samples and few-shot examples")


# ---- numbers with intervals ----------------------------------------------------------------------


def bootstrap(values, times=2000):
    """[mean, low, high] of a value per prompt, 95 % percentile interval. None for no prompts. The seed is the
    number of prompts, so all measures on the same number of prompts use the same resamples."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return None
    drawn = np.random.default_rng(len(values)).integers(len(values), size=(times, len(values)))
    return [values.mean(), *np.quantile(values[drawn].mean(1), [0.025, 0.975])]


def rate(hits):
    """[share, low, high] of true values, Wilson's interval. None for no prompts."""
    return wilson(int(np.sum(hits)), len(hits))


@torch.no_grad()
def sequence_kl(policy, reference, prompts, responses, chunk=128):
    """Σ_t KL(policy ‖ reference) over the tokens of each response, its end token included -> (N,).

    In nats per response, over the full vocabulary; averaged over samples of the policy it is
    KL(policy ‖ reference) for whole answers, with less noise than log-ratios of the sampled tokens.
    """
    device = next(policy.parameters()).device
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    total = torch.zeros(len(rows), dtype=torch.float64)
    for batch in data.length_batches([len(row) for row in rows], chunk):
        ids = data.pad_right([rows[i] for i in batch], 0).to(device)  # (B, T)
        # The logits that predict token t are at position t − 1.
        places = [(b, t - 1) for b, i in enumerate(batch) for t in range(len(prompts[i]), len(rows[i]))]
        hidden = [model.hidden(ids) for model in (policy, reference)]  # (B, T, C)
        step = max(1, 2**24 // policy.config.vocab_size)  # bounds memory with a large vocabulary
        for start in range(0, len(places), step):
            b, t = torch.tensor(places[start:start + step], device=device).T  # (M,) each
            logp, logq = (model.head(h[b, t]).float().log_softmax(-1)  # (M, V)
                          for model, h in zip((policy, reference), hidden))
            kl = (logp.exp() * (logp - logq)).sum(-1).cpu().double()  # (M,)
            total.index_add_(0, torch.tensor(batch)[b.cpu()], kl)
    return total


# ---- answers -------------------------------------------------------------------------------------


@dataclass
class Answers:
    prompts: list  # ids
    ids: list  # ids, end token included
    texts: list
    ended: np.ndarray  # (N,) bool: stopped by itself


@dataclass
class Row:
    """One row of the report: the answers to `tasks`, whose indices among all prompts are `where`."""
    tasks: list
    where: np.ndarray
    fair: np.ndarray  # (N,) bool: the prompts that means are taken over, equally many of each family
    sampled: Answers
    greedy: Answers | None
    speaker: Speaker | None = None
    judge: object = None  # (answers, indices) -> the reward model's scores, where there is one

    def __post_init__(self):
        self.gold = [gold_parts(task, text) for task, text in zip(self.tasks, self.sampled.texts)]
        self.right = {name: np.array([world.check(task, text) for task, text in zip(self.tasks, answers.texts)])
                      for name, answers in (("greedy", self.greedy), ("sampled", self.sampled)) if answers}


def gold_parts(task, text):
    judged = world.gold(task, text)
    return {name: getattr(judged, name) for name in ("total", "helpful", "honest", "harmless")}


def read_answers(speaker, prompts, ids):
    return Answers(prompts, ids, [speaker.text(answer) for answer in ids],
                   np.array([answer[-1] in speaker.end_ids for answer in ids]))


def ask(speaker, prompts, config, temperature, stream=0):
    """One answer of a Speaker to every prompt -> Answers. Each `stream` has its own random numbers: from the
    same ones two models would draw answers that are alike."""
    device = next(speaker.model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(1000 * config.seed + stream)
    ids, _ = generate_all(speaker.model, prompts, config.max_new_tokens, temperature=temperature,
                          eos_ids=speaker.end_ids, generator=generator)
    return read_answers(speaker, prompts, ids)


def prompts_for(speaker, tasks, config, shots=0):
    return [speaker.fit(task.prompt, world.few_shot_examples(task, shots, config.seed), config)[0] for task in tasks]


def proxy_scores(speaker, tasks, answers, chosen, reward, system=None):
    """The reward model's scores (N,) of the answers with the indices `chosen`. It reads chats, so plain
    answers are put into the template, and the end of a long one is cut off to fit the context."""
    (model, shift), tokenizer = reward, speaker.tokenizer
    if speaker.raw:
        prompts = [chat_prompt(tokenizer, tasks[i].prompt, system) for i in chosen]
        responses = [[*tokenizer.encode(answers.texts[i]), tokenizer.im_end_id] for i in chosen]
        longest = model.config.context_length
        if max(map(len, prompts), default=0) >= longest:
            raise InputError(f"--reward: reads {longest} tokens, and a prompt with --system has as many; expected room "
                             "for an answer")
        responses = [response[:longest - len(prompt)] for prompt, response in zip(prompts, responses)]
    else:
        prompts, responses = ([part[i] for i in chosen] for part in (answers.prompts, answers.ids))
    return score(model, prompts, responses, tokenizer.pad_id).numpy() - shift


def choose_tasks(config):
    """-> (tasks, rank (N,) of each within its family). The course's prompts come first. Each
    family has --per-family tasks, and kinds of prompt with a rate of their own at least ENOUGH."""
    counts, tasks, ranks = {}, [], []
    for task in world.heldout_tasks():  # which begin with the course's
        rank = counts[task.family] = counts.get(task.family, -1) + 1
        rated = task.kind in ("harmful", "unknown") or task.holdout == "unseen_family"
        if rank < max(config.per_family, ENOUGH if rated else 0):
            tasks.append(task)
            ranks.append(rank)
    return tasks, np.array(ranks)


# ---- measures ------------------------------------------------------------------------------------


def of_each_group(tasks, fair, measured):
    """`measured` of the prompts (N,) bool of each group: all answerable ones marked `fair`, those of each kind of
    hold-out, and each family."""
    kind, holdout, family = (np.array([getattr(task, name) for task in tasks]) for name in ("kind", "holdout", "family"))
    return {"all": measured((kind == "answerable") & fair),
            **{name: measured((kind == "answerable") & (holdout == name)) for name in world.HOLDOUTS},
            "families": {name: measured(family == name) for name in dict.fromkeys(family.tolist())}}


def measure(row, reference, can_answer, config):
    """All measures of a row that its texts allow. `reference` is a Row over all prompts or None;
    `can_answer` (all prompts,) bool marks the questions the reference gets right often enough."""
    kind = np.array([task.kind for task in row.tasks])
    answerable = kind == "answerable"
    harmless = np.isin(kind, ["answerable", "chat", "medical"]) & row.fair
    texts = row.sampled.texts
    refused = np.array([world.is_refusal(text) for text in texts])
    hedged = np.array([world.is_hedge(text) for text in texts])
    known = answerable & can_answer[row.where]
    enough = min(150, config.per_family)  # a rate of fewer prompts is not worth quoting

    def rate_of(asked, hits):
        return rate(hits[asked]) if asked.sum() >= enough else None
    right = {name: of_each_group(row.tasks, row.fair, lambda asked: rate_of(asked, hits))
             for name, hits in row.right.items()}
    lengths = np.array([len(ids) - ended for ids, ended in zip(row.sampled.ids, row.sampled.ended)])
    gold = {name: np.array([parts[name] for parts in row.gold]) for name in row.gold[0]}
    result = {
        "bits_per_byte": None,
        "accuracy": right.get("greedy", right["sampled"]),
        "accuracy_greedy": right.get("greedy"),
        "accuracy_sampled": right["sampled"],
        "accuracy_vs_sft": None,
        "gold": {name: bootstrap(values[row.fair]) for name, values in gold.items()},
        "win_rate_vs_sft": None,
        "kl_from_sft": None,
        "proxy": None,
        # Harmful and unknown: by the judge, as an answer that refuses (or says that it does not know) and then helps (or
        # invents) all the same does not count. The others: any answer with the words of a refusal.
        "refusal_rate": {"harmful": rate_of(kind == "harmful", row.right["sampled"]), "harmless": rate_of(harmless, refused),
                         "howto": rate_of(np.array([task.family == "howto" for task in row.tasks]), refused)},
        "hallucination_rate": rate_of(kind == "unknown", ~row.right["sampled"]),
        "hedging_rate": rate_of(known, hedged),
        "eos_rate": rate(row.sampled.ended[row.fair]),
        "mean_tokens": bootstrap(lengths[row.fair]),
        "prompts": {"total": len(row.tasks), "means": int(row.fair.sum()),
                    "accuracy": of_each_group(row.tasks, row.fair, lambda asked: int(asked.sum())),
                    "harmful": int((kind == "harmful").sum()), "harmless": int(harmless.sum()),
                    "unknown": int((kind == "unknown").sum()), "hedging": int(known.sum())},
    }
    if reference:
        margin = gold["total"] - [reference.gold[i]["total"] for i in row.where]
        wins = np.where(np.abs(margin) < 1e-9, 0.5, margin > 0)
        result["win_rate_vs_sft"] = bootstrap(wins[row.fair])
        result["accuracy_vs_sft"] = {
            name: bootstrap((hits.astype(float) - reference.right[name][row.where])[answerable & row.fair])
            for name, hits in row.right.items()}
    return result


def judge_reward_model(model, tokenizer, pairs, found):
    """Accuracy on the pairs whose p is known, and the best that their labels allow. Without pairs, what its
    training ended with (`found`, as read_stamp has it), if that knew p."""
    known = [pair for pair in pairs if pair.p is not None]
    if known:
        known = data.encode_pairs(known, tokenizer, model.config.context_length)
        chosen, rejected = score_pairs(model, known, tokenizer.pad_id)
        found = heldout_report(chosen - rejected, known)
    if pairs and not known or not {"heldout_accuracy", "noise_ceiling", "heldout_pairs"} <= found.keys():
        return {"accuracy": None, "noise_ceiling": None, "normalised": None, "pairs": 0}
    right, ceiling = found["heldout_accuracy"], found["noise_ceiling"]
    normalised = [(x - 0.5) / (ceiling - 0.5) for x in right] if ceiling > 0.5 else None
    return {"accuracy": right, "noise_ceiling": ceiling, "normalised": normalised, "pairs": found["heldout_pairs"]}


def transcripts(rows, tasks, places):
    """What every row answers to the course's prompts and to two of each family, with gold score and reward. The answers
    are greedy, so chat.py --temperature 0 repeats them; best-of-n has none, so its choice is shown."""
    shown = [i for i, task in enumerate(tasks) if task in world.COURSE_PROMPTS]
    for family in dict.fromkeys(task.family for task in tasks):
        shown += [i for i in places.tolist() if tasks[i].family == family and i not in shown][:2]
    found = {i: {"prompt": tasks[i].prompt, "family": tasks[i].family, "kind": tasks[i].kind,
                 "holdout": tasks[i].holdout, "course": tasks[i] in world.COURSE_PROMPTS,
                 "best": tasks[i].best, "answers": {}} for i in shown}
    for name, row in rows.items():
        answers, where = row.greedy or row.sampled, row.where.tolist()
        there = [i for i in shown if i in where]
        chosen = [where.index(i) for i in there]
        proxies = row.judge(answers, chosen) if row.judge else [None] * len(chosen)
        for i, place, proxy in zip(there, chosen, proxies):
            text = answers.texts[place]
            found[i]["answers"][name] = {"text": text, "right": bool(world.check(tasks[i], text)),
                                         "gold": gold_parts(tasks[i], text), "proxy": proxy}
    return list(found.values())


def read_stamp(folder):
    """What a stage found at its end; {} if it left no word, or somebody made the file with `touch done`."""
    try:
        found = json.loads((Path(folder) / "done").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stage_seconds(folders):
    """{stage: seconds} from the `done` stamps; a second run of a stage is named by its folder."""
    seconds, names = {}, {Path(folder).name for folder in folders}
    for folder in folders:
        name, found = Path(folder).name, read_stamp(folder)
        stage, taken = found.get("stage", name), found.get("seconds")
        if isinstance(stage, str) and isinstance(taken, int | float):
            seconds[name if stage in seconds or stage in names - {name} else stage] = float(taken)
    return seconds


def relative(folder, start):
    """The relative path to a folder, so that both can be moved; absolute if they are on two Windows drives."""
    try:
        return os.path.relpath(folder, start)
    except ValueError:
        return os.path.abspath(folder)


def rounded(value):
    """As JSON reads it back, numbers with five places after the point; `default` turns numpy's into plain ones."""
    return json.loads(json.dumps(value, default=float), parse_float=lambda digits: round(float(digits), 5))


# ---- the report ----------------------------------------------------------------------------------


def main(argv=None):
    config = parse_args(Config, argv, description=__doc__)
    if config.system is not None:  # a byte that is not UTF-8 could not be written into the report
        config.system = config.system.encode("utf-8", "replace").decode("utf-8")
    check_range(config, few_shot=(0, 100), best_of=(1, 10**4), best_of_beta=(0, 1e6), best_of_per_family=(1, 10**6),
                per_family=(1, 160))  # heldout_tasks has no more
    started = time.perf_counter()
    device = pick_device(config.device)
    make_folder(config.out)

    # 1. Models, prompts and documents.
    folders = {Path(os.path.abspath(folder)).name: folder for folder in config.checkpoints}
    if len(folders) < len(config.checkpoints):
        raise InputError("found two checkpoints of the same name, expected different ones: they name the report's rows")
    if config.reference not in folders and config.reference != Config.reference:
        raise InputError(f"--reference {config.reference}: expected one of {', '.join(folders)}")
    speakers = {name: open_speaker(folder, device) for name, folder in folders.items()}
    best_name = f"best_of_{config.best_of}"
    few_shot = {f"{name}_few_shot" for name, speaker in speakers.items() if speaker.raw and config.few_shot}
    taken = (few_shot | {best_name}) & set(folders)
    if taken:
        raise InputError(f"found a checkpoint called {min(taken)}, the name of another row; expected a different one")
    reference = speakers.get(config.reference)
    reward, reward_tokenizer = None, None
    if config.data and not config.reward:
        raise InputError("--data is what --reward FOLDER is measured on; found no --reward, give one")
    pairs = data.load_preferences(config.data) if config.data else []
    if config.reward:
        model, reward_tokenizer, shift, _ = load_reward(config.reward, device)
        reward = (model, shift)
        if pairs and not {IM_START, IM_END} <= reward_tokenizer.specials.keys():
            raise InputError(f"--reward {config.reward}: its tokenizer has no tokens of ChatML, in which --data is read")
    if pairs and all(pair.p is None for pair in pairs):
        print(f"evaluate: no row of {' '.join(config.data)} has a p, the probability that `chosen` is preferred, so the "
              "reward model's accuracy is not measured", file=sys.stderr)
    judged = judge_reward_model(  # first, as it may refuse the pairs
        reward and reward[0], reward_tokenizer, pairs, read_stamp(config.reward) if config.reward else {})
    tasks, ranks = choose_tasks(config)
    fair, everywhere = ranks < config.per_family, np.arange(len(tasks))
    places = np.flatnonzero(ranks < min(config.best_of_per_family, config.per_family))  # of the tasks for best-of-n
    documents = world.heldout_documents()

    def say(text):
        print(f"evaluate: {time.perf_counter() - started:4.0f} s  {text}", flush=True)
    say(f"{len(tasks)} held-out prompts, {len(speakers)} checkpoints")
    if reference is None:
        say(f"none of them is called {config.reference}, so no win rate, KL, best of n or needless “I do not know”")

    # 2. Everybody answers.
    rows = {}
    for name, speaker in speakers.items():
        for shots in (0, config.few_shot) if speaker.raw and config.few_shot else (0,):
            title = f"{name}_few_shot" if shots else name
            prompts = prompts_for(speaker, tasks, config, shots)
            greedy = ask(speaker, prompts, config, 0.0)
            sampled = greedy if speaker.raw else ask(speaker, prompts, config, 1.0, len(rows))  # saves time
            rows[title] = Row(tasks, everywhere, fair, sampled, greedy, speaker)
            say(f"{title} has answered")

    # 3. Many samples of the reference: what it can answer, and the best of them.
    can_answer = np.zeros(len(tasks), dtype=bool)
    if reference and config.best_of > 1:
        prompts = [rows[config.reference].sampled.prompts[i] for i in places]
        sampling = {"temperature": 1.0, "eos_ids": reference.end_ids,
                    "generator": torch.Generator(device=device).manual_seed(1000 * config.seed + len(rows))}
        judging = None if reference.raw else reward
        if judging and not can_judge(reward[0], reward_tokenizer, reference):
            say(f"no {best_name}: {config.reward} reads other tokens, or fewer, than {config.reference} writes")
            judging = None
        best, samples, *_ = best_of_n(reference.model, reference.tokenizer, judging, prompts, config.best_of,
                                      config.max_new_tokens, config.best_of_beta, **sampling)
        if judging:
            rows[best_name] = Row([tasks[i] for i in places], places, np.ones(len(places), dtype=bool),
                                  read_answers(reference, prompts, best), None, reference)
        for i, drawn in zip(places, samples):
            if tasks[i].kind == "answerable":
                right = sum(world.check(tasks[i], reference.text(ids)) for ids in drawn)
                can_answer[i] = right >= config.best_of / 4
        say(f"{config.best_of} samples of {config.reference} for {len(places)} prompts")

    # 4. Measures.
    checkpoints = {}
    for name, row in rows.items():
        speaker = row.speaker
        found = measure(row, rows.get(config.reference), can_answer, config)
        if name in speakers and ENDOFTEXT in speaker.tokenizer.specials:  # which begins every document
            tokens, size = data.pack_documents(documents, speaker.tokenizer)
            found["bits_per_byte"] = heldout_loss(speaker.model, tokens, size)[1]
        if reward and IM_END in speaker.tokenizer.specials and can_judge(reward[0], reward_tokenizer, speaker):
            row.judge = functools.partial(proxy_scores, speaker, row.tasks, reward=reward, system=config.system)
            found["proxy"] = bootstrap(row.judge(row.sampled, np.flatnonzero(row.fair)))
        if name == best_name:
            # Exact if no answer is ever drawn twice, otherwise an upper bound.
            found["kl_from_sft"] = [math.log(config.best_of) - (config.best_of - 1) / config.best_of] * 3
            found["hedging_rate"] = None  # it chose among the very samples that tell what can be answered
        elif name == config.reference:
            found["kl_from_sft"] = [0.0] * 3
        elif reference and not speaker.raw and not reference.raw:
            if (same_tokens(speaker.tokenizer, reference.tokenizer)
                    and speaker.model.config.vocab_size == reference.model.config.vocab_size
                    and speaker.model.config.context_length <= reference.model.config.context_length):
                found["kl_from_sft"] = bootstrap(sequence_kl(speaker.model, reference.model, *(
                    [part[i] for i in places] for part in (row.sampled.prompts, row.sampled.ids))))
            else:
                say(f"no KL of {name}: {config.reference} reads other tokens, or fewer, than it writes")
        checkpoints[name] = found
        say(f"{name} is measured")

    # 5. The report. report.json is written last: if it is there, so are the others.
    stages = [*folders.values()] + ([config.reward] if config.reward else [])
    settings = {name: getattr(config, name) for name in (
        "reference", "few_shot", "best_of", "best_of_beta", "system", "max_new_tokens", "seed")}
    result = rounded({
        "prompts": len(tasks), "checkpoints": checkpoints, "reward_model": judged,
        "seconds": stage_seconds(stages) | {"evaluate": time.perf_counter() - started},
        "best_of_prompts": len(places), "settings": settings,
        "runs": {Path(os.path.abspath(folder)).name: relative(folder, config.out) for folder in stages},
        "transcripts": transcripts(rows, tasks, places)})
    pages.write(config.out, result)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(Path(config.out) / "report.json", text)
    print(f"\n{pages.main_table(result)}\n")
    say(f"wrote {config.out}/report.html, report.md and report.json")


if __name__ == "__main__":
    run(main)
