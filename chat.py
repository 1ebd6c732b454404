"""Talk to any checkpoint: one prompt or a conversation, several models side by side, best-of-n.

    python chat.py out/ppo                                    # a conversation; Ctrl-D ends it
    python chat.py out/base out/sft out/ppo --prompt "What is the capital of France?"
    python chat.py out/sft --prompt "…" --best-of 16 --reward out/reward
    python chat.py out/sft --label mine.jsonl                      # collect your own preferences
    python chat.py out/base --complete "Once upon a time"         # go on with a text, as a base model was trained to

Prompting is alignment without training: `--system` puts an instruction before the conversation, `--few-shot` solved
examples from the embedded world. A base model has never seen the tokens of the chat format; it is given plain text
(`plain_prompt`), and what it writes up to the next line break is its answer.

Best-of-n (Foundations of LLMs, section 4.4.5; Stiennon et al. 2020) is alignment at inference time:
draw n answers, show one. The one with the highest reward need not be good: among many answers, some fool
the reward model. So, as in PPO, an unlikely answer pays a price (regularised best-of-n in its KL form, Jinnai et al.,
arXiv 2404.01054, version 1). With π the model that answers, at the temperature it is sampled at: of the answers that
came to an end, we show the one with the highest

    r(x, y) + β log π(y|x)

Of those, it is the likeliest under the policy that maximises PPO's objective with π as the reference,
π(y|x) exp(r(x, y) / β) / Z(x). `--best-of-beta 0` is plain best-of-n.

Left out: tools, and templates other than ChatML.
"""

import codecs
import contextlib
import json
import math
import os
import random
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import world
from data import visible
from model import GPT, generate, stream
from reward import score
from tokenizer import ENDOFTEXT, IM_END, IM_START, Tokenizer, render_chat, same_tokens
from training import (InputError, check_jsonl, check_range, flag, load_checkpoint, load_reward, parse_args,
                      pick_device, run, writing)

HELP = """/compare [QUESTION]  put this question (or the last one) to all models, without the conversation
/best N [QUESTION]   draw N answers to it, without the conversation; the best first: reward, log-prob, answer
/reset               forget the conversation
/seed N              restart the sampling from seed N
/help                this page
Anything else is said to the model. Ctrl-D or Ctrl-C ends."""
BEST_OF_BETA = 0.3  # 0.1 to 1 does nearly as well in the embedded world


@dataclass
class Config:
    checkpoints: list[str] = field(metadata={
        "positional": True, "help": "folders of models; several answer one after the other"})
    prompt: str | None = flag(None, "answer this one prompt and exit (default: a conversation)")
    complete: str | None = flag(None, "go on with this text, without a template and across line breaks, and exit")
    system: str | None = flag(None, "instruction put before everything else (default: the folder's, if any)")
    few_shot: int = flag(0, "solved examples to put before the question (in a conversation, the first), from the family of the "
                        "world nearest to it")
    raw: bool = flag(False, "treat the models as base models: plain text, no chat template (implied for `make`'s base)")
    best_of: int = flag(1, "answers to draw, of which one is chosen by reward and log-prob; 1: no choice")
    best_of_beta: float = flag(BEST_OF_BETA, "weight of the answer's log-prob (nats) in that choice; 0: reward alone")
    reward: str | None = flag(None, "the reward model of --best-of and /best (default: for /best, `reward` beside the "
                              "model)")
    label: str | None = flag(None, "ask whose answer is better, the first or the last model's (of one: two of its own); append "
                             "the pair to this .jsonl file")
    temperature: float = flag(0.7, "1 samples from the model itself, lower is less random, 0 is greedy")
    top_k: int | None = flag(None, "sample from the k likeliest tokens only (default: all)")
    top_p: float | None = flag(None, "sample from the likeliest tokens that together have this share (default: all)")
    max_new_tokens: int = flag(200, "longest answer, in tokens")
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = flag(1, "random seed of the sampling")


# ---- prompts -------------------------------------------------------------------------------------


def plain_prompt(question, shots=()):
    """Text for a base model: the question as it stands, or after solved `shots` in the layout of a quiz page."""
    if not shots:
        return f"{question}\n"
    return "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in shots) + f"Question: {question}\nAnswer:"


def messages(question, system=None, history=()):
    """The chat that ends with the question; `history` holds earlier (question, answer) turns."""
    turns = [("system", system)] if system else []
    for asked, answered in history:
        turns += [("user", asked), ("assistant", answered)]
    return [{"role": role, "content": content} for role, content in (*turns, ("user", question))]


def chat_prompt(tokenizer, question, system=None, history=()):
    """Ids of the chat, up to where the assistant's answer begins."""
    return render_chat(tokenizer, messages(question, system, history), generation_prompt=True)[0]


def newline_ids(tokenizer):
    """Ids of all tokens that contain a line break: an answer in the raw format ends there."""
    encoding = tokenizer.encoding
    return [encoding.encode_single_token(token) for token in encoding.token_byte_values() if b"\n" in token]


# ---- a model that can be talked to ---------------------------------------------------------------


@dataclass
class Speaker:
    name: str
    model: GPT
    tokenizer: Tokenizer
    raw: bool  # a base model: plain text instead of the chat template
    system: str | None  # the default system prompt of the folder's template
    end_ids: set

    def prompt(self, question, history=(), system=None):
        """-> ids. Raw text begins like a pre-training document, with <|endoftext|>."""
        if not self.raw:
            return chat_prompt(self.tokenizer, question, self.system if system is None else system, history)
        text = (f"{system}\n\n" if system else "") + plain_prompt(question, history)
        return [*special(self.tokenizer, ENDOFTEXT), *self.tokenizer.encode(text)]

    def fit(self, question, history, config):
        """-> (ids, history): the oldest turns are dropped until an answer has room in the context."""
        context = self.model.config.context_length
        room = min(config.max_new_tokens, context // 2)
        ids = self.prompt(question, history, config.system)
        while history and len(ids) + room > context:
            history = history[1:]
            ids = self.prompt(question, history, config.system)
        if len(ids) >= context:
            raise InputError(f"{self.name}: found a prompt of {len(ids)} tokens; "
                             f"expected fewer than the {context} of its context")
        return ids, history

    def text(self, ids):
        """The answer in `ids`, without its end token."""
        text = self.tokenizer.decode(ids[:-1] if self.is_end(ids[-1]) else ids)
        return text.split("\n")[0].strip() if self.raw else text

    def is_end(self, token):
        """An end token, not text; a raw model's last token may hold both the full stop and the line break."""
        return token in self.end_ids and (not self.raw or token in self.tokenizer.specials.values())


def open_speaker(folder, device="cpu", raw=False):
    """Load the folder of a language model. It is raw if asked for, if config.json says that it has
    only been pre-trained, or if there is no chat template. InputError for a template that is not
    ChatML, and for a reward model."""
    model, tokenizer, info = load_checkpoint(folder, device)
    name, folder = Path(os.path.abspath(folder)).name, Path(folder)
    if not isinstance(model, GPT):
        raise InputError(f"{folder}: a reward model does not talk; give it with --reward")
    template, ends = read_beside(folder)
    ends |= {*special(tokenizer, ENDOFTEXT)}
    # transformers, when it tunes a base model and saves it, keeps the stage that we wrote.
    base = info.get("stage") == "pretrain" and "transformers_version" not in info
    if raw or base or not template:
        return Speaker(name, model, tokenizer, True, None, {*newline_ids(tokenizer), *ends})
    if IM_START not in template:
        raise InputError(f"{folder}: only ChatML templates are implemented, and this one is "
                         f"{' '.join(template.split())[:60]!r}; --raw does without")
    missing = [token for token in (IM_START, IM_END) if token not in tokenizer.specials]
    if missing:
        raise InputError(f"{folder}: its template is ChatML, but its tokenizer has no {', '.join(missing)}; --raw does "
                         "without")
    # Only literal text, not what the template puts together: '…system\n' + messages[0].content + '…'
    system = re.search(r"<\|im_start\|>system(?:\\n|\n)((?:(?!['\"]\s*[+~])[^{}])+?)<\|im_end\|>", template)
    return Speaker(name, model, tokenizer, False, system and system[1].replace("\\n", "\n"),
                   ends | {*special(tokenizer, IM_END)})


def read_beside(folder):
    """(chat template or None, ids of the end tokens), as the files beside the weights have them."""
    template = ends = None
    try:
        path = folder / "tokenizer_config.json"
        if path.exists():
            template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        path = folder / "chat_template.jinja"
        if path.exists():
            template = path.read_text(encoding="utf-8")
        path = folder / "generation_config.json"
        if path.exists():
            ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")  # it may be 0
        return template and str(template), {*ends} if isinstance(ends, list) else {ends} - {None}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as JSON of the usual form ({error})") from error


def special(tokenizer, name):
    """[its id], or [] where the vocabulary has no such token."""
    return [tokenizer.specials[name]] if name in tokenizer.specials else []


def can_judge(reward, tokenizer, speaker):
    """Whether a reward model can read whatever a speaker may write."""
    return (same_tokens(speaker.tokenizer, tokenizer)
            and reward.config.context_length >= speaker.model.config.context_length)


def load_judge(folder, speakers, device):
    """(reward model, its shift), or InputError if it cannot read the chats of one of the speakers."""
    model, tokenizer, shift, _ = load_reward(folder, device)
    for speaker in speakers:
        if speaker.raw or not can_judge(model, tokenizer, speaker):
            raise InputError(f"--reward {folder}: reads chats in its own vocabulary, of up to "
                             f"{model.config.context_length} tokens; {speaker.name} does not write them: "
                             "it is a base model, has another tokenizer or a longer context")
    return model, shift


def examples_like(question, config):
    """--few-shot solved (question, answer) pairs of the embedded world, from the family of the question or, if it is none of
    the world's, of the training prompt whose words overlap most with it."""
    if not config.few_shot:
        return []
    words = set(question.lower().split())

    def overlap(task):
        theirs = set(task.prompt.lower().split())
        return len(words & theirs) / len(words | theirs)
    known = (task for task in world.every_task("", *world.HOLDOUTS) if task.prompt == question)
    task = next(known, None) or max(world.training_prompts(1000, config.seed), key=overlap)
    return world.few_shot_examples(task, config.few_shot, config.seed)  # which do not give its answer away


# ---- answers -------------------------------------------------------------------------------------


def generate_all(model, prompts, max_new_tokens, chunk=512, **sampling):
    """`generate` for any number of prompts, in chunks -> (id lists, their log-probs). Put prompts with
    answers of similar length side by side: a chunk takes as long as its longest answer."""
    answers, logprobs = [], []
    for start in range(0, len(prompts), chunk):
        ids, of_ids = generate(model, prompts[start:start + chunk], max_new_tokens, **sampling)
        answers += ids
        logprobs += of_ids
    return answers, logprobs


def best_of_n(policy, tokenizer, reward, prompts, n, max_new_tokens, beta=0.0, **sampling):
    """Draw n answers to every prompt (ids) and choose by r + `beta` log π, with `reward` = (model, shift), or None for
    r = 0, and log π of the whole answer, in nats, under the distribution it was sampled from.

    -> (best answers, all samples as a list of n for each prompt, rewards (P, n), log-probs (P, n)).
    `sampling` goes to `generate`: temperature, top_k, top_p, eos_ids (which is needed here), generator.
    """
    rows = [prompt for prompt in prompts for _ in range(n)]
    answers, logprobs = generate_all(policy, rows, max_new_tokens, **sampling)
    scores = torch.zeros(len(rows))
    if reward:
        model, shift = reward
        scores = score(model, rows, answers, tokenizer.pad_id) - shift
    scores = scores.reshape(len(prompts), n)
    logprobs = torch.tensor([sum(row) for row in logprobs]).reshape(len(prompts), n)
    samples = [answers[i:i + n] for i in range(0, len(answers), n)]
    ends = {tokenizer.im_end_id} if reward else sampling["eos_ids"]  # <|endoftext|> ends an answer wrongly, as in PPO
    choices = values(answers, scores, logprobs, beta, ends).argmax(1).tolist()
    return [drawn[choice] for drawn, choice in zip(samples, choices)], samples, scores, logprobs


def values(answers, scores, logprobs, beta, ends):
    """r + β log π of n answers to each of P prompts, (P, n); −∞ for an answer that does not end with one of `ends`, unless
    none of the n does: the reward model has read no such answers."""
    ended = torch.tensor([row[-1] in ends for row in answers]).reshape(scores.shape)
    return (scores + beta * logprobs).masked_fill(~ended & ended.any(1, keepdim=True), -math.inf)


def speak(speaker, ids, max_new_tokens, sampling):
    """Print the answer as it is sampled -> its text. A character that spans several tokens is printed
    when all of its bytes are there."""
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for token in stream(speaker.model, ids, max_new_tokens, eos_ids=speaker.end_ids, **sampling):
        if token not in speaker.tokenizer.known or speaker.is_end(token):
            continue
        piece = decoder.decode(speaker.tokenizer.encoding.decode_single_token_bytes(token))
        if speaker.raw:
            piece = piece.split("\n")[0]
        print(visible(piece), end="", flush=True)
        text += piece
    rest = decoder.decode(b"", final=True)
    print(visible(rest))
    return text + rest


def answer(speaker, ids, config, sampling, reward, ended=False):
    """One whole answer, as text: the best of --best-of. With `ended`, "" in place of one that the limit cut off."""
    (best,), *_ = best_of_n(speaker.model, speaker.tokenizer, reward, [ids], config.best_of, config.max_new_tokens,
                            config.best_of_beta, eos_ids=speaker.end_ids, **sampling)
    return "" if ended and best[-1] not in speaker.end_ids else speaker.text(best)


def questions(prompt):
    """Lines from the keyboard or a pipe, until its end or Ctrl-C."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  input() can then edit a line and call back earlier ones
    while True:
        try:
            line = input(prompt if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            if sys.stdin.isatty():
                print()
            return
        if line:
            yield line


def compare(question, config, sampling, device):
    """Put the question to the first model and all in folders beside its own, in the order in which they were made,
    each with the conversation's seed."""
    seed, shots = sampling["generator"].initial_seed(), examples_like(question, config)
    beside = Path(os.path.abspath(config.checkpoints[0])).parent.glob("*/config.json")
    for path in sorted(beside, key=lambda path: path.stat().st_mtime):
        try:
            speaker = open_speaker(path.parent, device, config.raw)
        except InputError:  # a reward model, or no model at all
            continue
        try:
            ids, _ = speaker.fit(question, shots, config)
        except InputError as error:
            print(f"({error})")
            continue
        alike = torch.Generator(device).manual_seed(seed)  # the conversation's own generator stays where it is
        print(f"{speaker.name}> ", end="", flush=True)
        speak(speaker, ids, config.max_new_tokens, sampling | {"generator": alike})


def candidates(question, n, speaker, config, sampling, device):
    """Print n answers to the question, the best first, with reward and log-prob; equal ones once."""
    folder = config.reward or Path(os.path.abspath(config.checkpoints[0])).parent / "reward"
    judge = load_judge(folder, [speaker], device)
    ids, _ = speaker.fit(question, examples_like(question, config), config)
    _, (drawn,), (scores,), (logprobs,) = best_of_n(speaker.model, speaker.tokenizer, judge, [ids], n,
                                                    config.max_new_tokens, eos_ids=speaker.end_ids, **sampling)
    texts = [visible(speaker.text(answer)) for answer in drawn]
    (value,) = values(drawn, scores[None], logprobs[None], config.best_of_beta, {speaker.tokenizer.im_end_id}).tolist()
    shown = {}  # text -> place of its best sample: the same text can come from different tokens
    for place in sorted(range(n), key=value.__getitem__, reverse=True):  # those cut off come last
        shown.setdefault(texts[place], place)
    for text, place in shown.items():
        times = texts.count(text)
        print(f"{scores[place]:+.2f} {logprobs[place]:6.1f}  {text}" + (f"  ({times} times)" if times > 1 else ""))


def converse(speakers, config, sampling, reward, device):
    """Read, answer, remember, until the input ends."""
    histories = [[] for _ in speakers]
    asked = ""
    for line in questions("you> "):
        command, _, value = line.partition(" ")
        number, _, question = value.strip().partition(" ")
        try:
            if command == "/help":
                print(HELP)
            elif command == "/compare" and (value.strip() or asked):
                asked = value.strip() or asked
                compare(asked, config, sampling, device)
            elif command == "/best" and re.fullmatch("[1-9][0-9]{0,3}", number) and (question or asked):
                asked = question.strip() or asked
                candidates(asked, int(number), speakers[0], config, sampling, device)
            elif command in ("/compare", "/best"):
                print("(ask something first, or write it after the command; /best needs a number up to 9999, "
                      "as in /best 16)")
            elif command == "/reset":
                histories = [[] for _ in speakers]
                print("(forgotten)")
            elif command == "/seed" and re.fullmatch("[0-9]{1,18}", value.strip()):
                sampling["generator"].manual_seed(int(value))
                print(f"(seed {value.strip()})")
            elif command.startswith("/"):
                print("(no such command; /help shows them, and /seed needs a number)")
            else:
                asked = line
                reply(line, speakers, histories, config, sampling, reward)
        except InputError as error:
            print(f"({error})")


def reply(line, speakers, histories, config, sampling, reward):
    """Print every speaker's answer and add it to that speaker's history."""
    for i, speaker in enumerate(speakers):
        before = histories[i] or examples_like(line, config)
        try:
            ids, history = speaker.fit(line, before, config)
        except InputError as error:
            print(f"({error})")
            continue
        if len(history) < len(before):
            print(f"({speaker.name}: the context is full, the oldest "
                  f"{len(before) - len(history)} of {len(before)} turns are forgotten)")
        if len(speakers) > 1 or sys.stdin.isatty():
            print(f"{speaker.name}> ", end="", flush=True)
        if reward:
            text = answer(speaker, ids, config, sampling, reward)
            print(visible(text))
        else:
            text = speak(speaker, ids, config.max_new_tokens, sampling)
        # Models that think aloud are not shown their earlier thoughts.
        text = text.strip() if speaker.raw else re.sub("^.*</think>\n*|<think>.*", "", text, flags=re.S)
        histories[i] = [*history, (line, text)]


def label(speakers, config, sampling, reward):
    """Show two answers to each question, from the first and the last model; which is better becomes one line of a
    preference file."""
    check_jsonl("label", config.label)
    with writing(config.label):  # now, not after the first judgement
        Path(config.label).parent.mkdir(parents=True, exist_ok=True)
        open(config.label, "ab").close()
    two = speakers[0], speakers[-1]
    # Both are asked what will be written down: the system prompt of the first folder, examples that fit both contexts.
    system = two[0].system if config.system is None else config.system
    asked = replace(config, system=system or "")
    for question in [config.prompt] if config.prompt is not None else questions("prompt> "):
        shots = examples_like(question, config)
        try:
            shots = min((speaker.fit(question, shots, asked)[1] for speaker in two), key=len)
            prompts = [speaker.fit(question, shots, asked)[0] for speaker in two]
        except InputError as error:
            print(f"({error})")
            continue
        pair = two_answers(two, prompts, config, sampling, reward)
        if not pair:
            print("(no two different, finished answers in 8 tries; try a higher --temperature or --max-new-tokens)")
            continue
        # Another order each time, even with one question in every run, or the same one again and again.
        random.Random(f"{config.seed} {question} {os.path.getsize(config.label)}").shuffle(pair)
        print(f"A: {visible(pair[0])}\nB: {visible(pair[1])}", flush=True)
        replies = (line.lower() for line in questions("better, a or b (s skips)? "))
        choice = next((line for line in replies if line in ("a", "b", "s")), None)
        if choice is None:  # no more input, or Ctrl-C
            return
        if choice != "s":
            chosen, rejected = pair if choice == "a" else pair[::-1]
            prompt = messages(question, system, shots) if system or shots else question
            append_row(config.label, {"prompt": prompt, "chosen": chosen, "rejected": rejected})


def two_answers(two, prompts, config, sampling, reward):
    """[an answer of each], different, not empty and finished; None if eight tries give no such two. (The stage that learns
    from them puts the end token behind both.)"""
    for _ in range(8):
        pair = [answer(speaker, ids, config, sampling, reward, True) for speaker, ids in zip(two, prompts)]
        if pair[0].strip() != pair[1].strip() and all(text.strip() for text in pair):
            return pair


def append_row(path, row):
    """Add a line to a .jsonl file, also where an editor left no line break at its end."""
    with writing(path), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))


def complete(speakers, config, sampling):
    """Print --complete and how every model goes on with it: a document begins with <|endoftext|>, and ends with it."""
    for speaker in speakers:
        ids = [*special(speaker.tokenizer, ENDOFTEXT), *speaker.tokenizer.encode(config.complete)]
        if not 0 < len(ids) < speaker.model.config.context_length:
            raise InputError(f"{speaker.name}: found a text of {len(ids)} tokens; expected 1 to "
                             f"{speaker.model.config.context_length - 1}")
        ends = speaker.end_ids & {*speaker.tokenizer.specials.values()}  # without line breaks
        sampling["generator"].manual_seed(config.seed)
        print((f"== {speaker.name} ==\n" if len(speakers) > 1 else "") + visible(config.complete), end="")
        speak(replace(speaker, raw=False, end_ids=ends), ids, config.max_new_tokens, sampling)


def main(argv=None):
    config = parse_args(Config, argv, description=__doc__)
    check_range(config, few_shot=(0, 1000), best_of=(1, 10**6), best_of_beta=(0, 1e6), temperature=(0, 100),
                top_k=(1, 10**9), top_p=(1e-9, 1))
    if config.complete is not None and (config.best_of > 1 or config.few_shot or any(
            getattr(config, name) is not None for name in ("prompt", "label", "system", "reward"))):
        raise InputError("--complete goes on with a text; expected no --prompt, --label, --system, --few-shot, "
                         "--best-of or --reward")
    if config.best_of > 1 and not config.reward:
        raise InputError("--best-of needs the model that chooses: --reward out/reward")
    if config.reward and config.best_of == 1 and (config.prompt is not None or config.label is not None):
        raise InputError("--reward chooses among several answers: expected --best-of with 2 or more")
    if config.best_of > 1 and (config.temperature < 1e-6 or config.top_k == 1):
        raise InputError("at --temperature 0, or with --top-k 1, the answers of --best-of would be the same; "
                         "give a higher --temperature and no --top-k 1")
    for name in ("prompt", "complete", "system"):
        if getattr(config, name) is not None:
            setattr(config, name, getattr(config, name).encode("utf-8", "replace").decode("utf-8"))
    device = pick_device(config.device)
    speakers = [open_speaker(folder, device, config.raw) for folder in config.checkpoints]
    if len({speaker.name for speaker in speakers}) < len(speakers):  # out/sft and out/long/sft
        for speaker, folder in zip(speakers, config.checkpoints):
            speaker.name = folder
    sampling = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p,
                "generator": torch.Generator(device=device).manual_seed(config.seed)}
    if config.complete is not None:
        return complete(speakers, config, sampling)
    reward = load_judge(config.reward, speakers, device) if config.best_of > 1 else None
    if config.prompt is not None and config.label is None:
        shots = examples_like(config.prompt, config)
        for speaker in speakers:
            ids, kept = speaker.fit(config.prompt, shots, config)
            if len(kept) < len(shots):
                print(f"({speaker.name}: only {len(kept)} of {len(shots)} examples fit its context)", file=sys.stderr)
            sampling["generator"].manual_seed(config.seed)  # so that the order of models does not matter
            text = visible(answer(speaker, ids, config, sampling, reward))
            print(f"== {speaker.name} ==\n{text}\n" if len(speakers) > 1 else text)
        return
    try:
        if config.label is not None:
            label(speakers, config, sampling, reward)
        else:
            converse(speakers, config, sampling, reward, device)
    except KeyboardInterrupt:  # in the middle of an answer
        print()


if __name__ == "__main__":
    run(main)
