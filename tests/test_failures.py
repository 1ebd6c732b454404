"""What goes wrong must go wrong cleanly: killed runs go on, bad input gets one line, nothing half-made is read.

    pytest tests/test_failures.py --slow      # with the kills and the scripts as processes, some minutes
"""

import contextlib
import errno
import gzip
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import chat
import data
import evaluate
import model as model_module
import pretrain
import reward
import rlhf
import sft
import training
from model import GPT, GPTConfig, ScalarModel
from tokenizer import Tokenizer, train_bpe
from training import InputError, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "--layers 1 --width 16 --heads 2 --kv-heads 2 --ffn-width 32 --vocab-size 300 --context-length 32".split()


def rows_of(kind, n=60):
    """Rows that a file of this kind may hold."""
    return [{"texts": {"text": f"Line {i} tells of {i * i} birds."},
             "conversations": {"messages": [{"role": "user", "content": f"Say {i}."},
                                            {"role": "assistant", "content": f"It is {i}."}]},
             "alpaca": {"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."},
             "preferences": {"prompt": f"Say {i}.", "chosen": f"Gladly: {i}.", "rejected": f"No. {i}"},
             "hh": {"chosen": f"\n\nHuman: Say {i}.\n\nAssistant: Gladly: {i}.",
                    "rejected": f"\n\nHuman: Say {i}.\n\nAssistant: No."}}[kind] for i in range(n)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def model_of(tokenizer, **changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(tokenizer.vocab_size, **{**dict(context_length=64, layers=1, heads=2, kv_heads=2,
                                                         width=16, ffn_width=32), **changes}))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with checkpoints sft and reward (untrained), and a file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    for kind in ("texts", "conversations", "preferences"):
        (folder / f"{kind}.jsonl").write_text(lines(rows_of(kind)))
    (folder / "text.txt").write_text("<|endoftext|>".join(row["text"] for row in rows_of("texts", 300)))
    (folder / "score.py").write_text("def length(prompt, response):\n    return len(response) / 9\n"
                                     "def fails(prompt, response):\n    return {}[response]\n"
                                     "def nan(prompt, response):\n    return float('nan')\n"
                                     "def says(prompt, response):\n    raise ValueError('two\\nlines')\n"
                                     "def few(prompt, response):\n    return -len(response)\n"
                                     "def quits(prompt, response):\n    raise SystemExit(3)\n")
    (folder / "ends.py").write_text("import sys\n\n\ndef length(prompt, response):\n    return 0\n\n\nsys.exit(0)\n")
    tokenizer = train_bpe([row["text"] for row in rows_of("texts")], 300)
    save_checkpoint(folder / "sft", model_of(tokenizer), tokenizer)
    save_checkpoint(folder / "reward", ScalarModel(model_of(tokenizer)), tokenizer, reward_shift=0.0,
                    reward_scale=1.0)
    save_checkpoint(folder / "reader", ScalarModel(model_of(tokenizer), model_of(tokenizer)), tokenizer, reward_shift=0.0,
                    reward_scale=1.0)
    return folder


def command(files, stage, out, *more):
    """Words of a short run of a stage."""
    said = {"pretrain": ["pretrain.py", "--data", files / "text.txt", *SHAPE, "--steps", 400, "--dtype", "float32"],
            "sft": ["sft.py", "--init", files / "sft", "--data", files / "conversations.jsonl", "--epochs", 50,
                    "--batch-size", 8, "--dtype", "float32"],
            "reward": ["reward.py", "--init", files / "sft", "--data", files / "preferences.jsonl", "--epochs", 50,
                       "--batch-size", 8, "--dtype", "float32"],
            "dpo": ["rlhf.py", "dpo", "--init", files / "sft", "--data", files / "preferences.jsonl", "--epochs",
                    50, "--batch-size", 8],
            "ppo": ["rlhf.py", "ppo", "--init", files / "sft", "--reward", f"{files}/score.py:length", "--data",
                    files / "conversations.jsonl", "--iterations", 40, "--episodes", 16, "--max-new-tokens", 12],
            "grpo": ["rlhf.py", "grpo", "--init", files / "sft", "--reward", f"{files}/score.py:length", "--data",
                     files / "conversations.jsonl", "--iterations", 40, "--episodes", 16, "--max-new-tokens", 12],
            }[stage]
    return [str(word) for word in (*said, "--out", out, "--device", "cpu", "--save-every", 3, *more)]


MAINS = {"pretrain.py": pretrain.main, "sft.py": sft.main, "reward.py": reward.main, "rlhf.py": rlhf.main,
         "chat.py": chat.main, "evaluate.py": evaluate.main}


def call(monkeypatch, words):
    """A script in this process."""
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    MAINS[Path(words[0]).name]()


def process(words, **options):
    return subprocess.run([sys.executable, str(ROOT / words[0]), *map(str, words[1:])], capture_output=True,
                          text=True, cwd=ROOT, **options)


def metrics(out, half=False):
    """Rows of metrics.jsonl; where it may be `half` written, without its last line if that was cut."""
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    return [{"step": 0}] * half + [json.loads(line) for line in lines if not half or line.endswith("\n")]


# ---- interrupt anything, lose nothing ------------------------------------------------------------

def stage_ends(out):
    """What two runs must have in common: all that was logged, and the weights."""
    rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(out)]
    return rows, (out / "model.safetensors").read_bytes()


STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": rlhf, "ppo": rlhf, "grpo": rlhf}


def watch_steps(stage, monkeypatch):
    """A list that will hold every step which the stage asks a learning rate for."""
    steps, rate = [], training.learning_rate
    monkeypatch.setattr(STAGES[stage], "learning_rate", lambda step, *rest: (steps.append(step), rate(step, *rest))[1])
    return steps


@pytest.mark.parametrize("stage, flags", [*((stage, []) for stage in STAGES), ("ppo", ["--no-critic"]),
                                          ("reward", ["--surprisal"]), ("ppo", ["--reward", "READER"]),  # as in make
                                          *((stage, ["--replay-data", "TEXT", "--lora", 2]) for stage in ("sft", "dpo", "ppo", "grpo"))])
def test_a_stopped_run_goes_on_to_the_same_end(stage, flags, files, tmp_path, monkeypatch):
    """Stopped at its second save, in the middle of an epoch: bit for bit what an undisturbed run gives."""
    short = [{"TEXT": files / "text.txt", "READER": files / "reader"}.get(word, word) for word in flags] + {
        "pretrain": ["--steps", 20], "ppo": ["--iterations", 8], "grpo": ["--iterations", 8]}.get(stage, ["--epochs", 3])
    call(monkeypatch, command(files, stage, tmp_path / "whole", *short))
    save, saves = training.save_state, []

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(args)
        if len(saves) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(STAGES[stage], "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, command(files, stage, tmp_path / "cut", *short))
    monkeypatch.setattr(STAGES[stage], "save_state", save)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:  # of steps after the save, and a line cut off
        file.write('{"step": 999, "loss": 1.0}\n{"step": 9')
    steps = watch_steps(stage, monkeypatch)
    call(monkeypatch, command(files, stage, tmp_path / "cut", *short, "--resume"))
    assert steps[0] == saves[1][2] > 0
    assert stage_ends(tmp_path / "cut") == stage_ends(tmp_path / "whole")


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_after_its_last_step_a_run_can_end(stage, files, tmp_path, monkeypatch):
    """Between the last save and the checkpoint, where no step is left to do. Nothing is logged twice."""
    short = [{"pretrain": "--steps", "ppo": "--iterations", "grpo": "--iterations"}.get(stage, "--epochs"), 1,
             "--save-every", 1]
    save = training.save_checkpoint
    monkeypatch.setattr(STAGES[stage], "save_checkpoint", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, command(files, stage, tmp_path / "cut", *short))
    monkeypatch.setattr(STAGES[stage], "save_checkpoint", save)
    steps = watch_steps(stage, monkeypatch)
    assert not (tmp_path / "cut" / "done").exists()
    call(monkeypatch, command(files, stage, tmp_path / "cut", *short, "--resume"))
    ends = [row["step"] for row in metrics(tmp_path / "cut") if any(name.startswith("heldout") for name in row)]
    assert not steps and len(ends) == len(set(ends)) > 0
    call(monkeypatch, command(files, stage, tmp_path / "whole", *short))
    assert stage_ends(tmp_path / "cut")[1] == stage_ends(tmp_path / "whole")[1] and (tmp_path / "cut" / "done").exists()


def test_a_refused_stream_keeps_its_tokens(files, tmp_path, monkeypatch):
    """They may have taken hours."""
    words = command(files, "pretrain", tmp_path, "--stream", "--data", files / "text.txt", "--steps", 4)
    monkeypatch.setattr(pretrain, "save_checkpoint", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, words)
    before = [(tmp_path / name).read_bytes() for name in ("tokens.bin", "tokens.json")]
    with pytest.raises(InputError, match="--holdout 0.05, not 0.3"):
        call(monkeypatch, [*words, "--resume", "--holdout", 0.3])
    assert before == [(tmp_path / name).read_bytes() for name in ("tokens.bin", "tokens.json")]


def test_show_batch_of_a_stream_writes_nothing(files, tmp_path, monkeypatch, capsys):
    call(monkeypatch, command(files, "pretrain", tmp_path / "out", "--stream", "--data", files / "text.txt", "--show-batch"))
    assert "birds" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage, shown", [
    ("pretrain", [r"^\[.*birds.*\]$"]), ("sft", [r"user\nSay \d+.*assistant\n\[It is \d+\.<\|im_end\|>\]$"]),
    *((stage, [r"assistant\n\[Gladly: \d+\.<\|im_end\|>\]", r"assistant\n\[No\. \d+<\|im_end\|>\]"])
      for stage in ("reward", "dpo")), *((stage, [r"assistant\n\[.+\]"]) for stage in ("ppo", "grpo"))])
def test_show_batch_marks_what_is_trained_on_and_writes_nothing(stage, shown, files, tmp_path, monkeypatch, capsys):
    call(monkeypatch, command(files, stage, tmp_path / "out", "--show-batch"))
    printed = capsys.readouterr().out
    assert all(re.search(pattern, printed.strip(), re.S) for pattern in shown), printed
    assert not (tmp_path / "out").exists()


def test_a_run_knows_what_it_reads(files, tmp_path):
    parts = {tmp_path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    for part in parts:
        part.touch()
    assert set(training.read_by(sft.Config(init=str(tmp_path)))) == parts | {ROOT / "world.py", ROOT / "world_facts.txt"}
    config = rlhf.PPOConfig(init=str(files / "sft"), reward=f"{files}/score.py:fails", data=["world"],
                            replay_data=[str(files / "conversations.jsonl")])
    assert set(training.read_by(config)) == {
        ROOT / "world.py", ROOT / "world_facts.txt", files / "sft" / "model.safetensors", files / "score.py",
        files / "conversations.jsonl"}


@pytest.mark.parametrize("changed", ["sft/model.safetensors", "conversations.jsonl"])
def test_a_run_does_not_go_on_from_other_inputs(changed, files, tmp_path, monkeypatch):
    words = command(files, "sft", tmp_path, "--epochs", 1, "--save-every", 1)
    monkeypatch.setattr(sft, "save_checkpoint", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, words)
    with monkeypatch.context() as unread, pytest.raises(InputError, match="--lr 0.003, not 0.1"):
        unread.setattr(sft, "load_policy", None)  # it is refused before any work
        call(monkeypatch, [*words, "--lr", 0.1, "--resume"])
    other = tmp_path / "newer.jsonl"  # newer than the save, but it is another one, not one that has changed
    other.write_text(lines(rows_of("conversations")))
    os.utime(other, (time.time() + 60,) * 2)
    with pytest.raises(InputError, match="was made with --data .*conversations.jsonl"):
        call(monkeypatch, [*words, "--data", other, "--resume"])
    with pytest.raises(ZeroDivisionError):  # the same folder, as a shell may complete it
        call(monkeypatch, [*words, "--init", f"{files}/./sft/", "--micro-batch", 2, "--recompute", "--save-every", 7, "--eval-every",
                           9, "--resume"])
    with pytest.raises(InputError, match="of stage sft, not dpo"):
        training.start_run(rlhf.DPOConfig(out=str(tmp_path), resume=True), "dpo")
    now, rate = time.time(), training.learning_rate
    later, before = now + 60, now - 3600
    for name in ("sft/model.safetensors", "conversations.jsonl"):
        os.utime(files / name, (before, before))
    try:  # edited a quarter of an hour ago, while a run trained that has begun half an hour ago; saved after that
        with monkeypatch.context() as edited:
            edited.setattr(training.time, "time", lambda: now - 1800)
            edited.setattr(sft, "learning_rate", lambda *args: os.utime(files / changed, (now - 900, now - 900)) or rate(*args))
            with pytest.raises(ZeroDivisionError):
                call(monkeypatch, words)
        with pytest.raises(InputError, match=f"{Path(changed).name} has changed since"):
            call(monkeypatch, [*words, "--resume"])
    finally:
        os.utime(files / changed, (before, before))
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, words)
    os.utime(files / changed, (later, later))
    try:
        with pytest.raises(InputError, match=f"{Path(changed).name} has changed since"):
            call(monkeypatch, [*words, "--resume"])
    finally:
        os.utime(files / changed, (before, before))
    if changed == "sft/model.safetensors":  # of another size it would not be read at all
        return
    whole, save = (files / changed).read_bytes(), training.save_state
    try:
        def saving(*args):  # what was read is another file now, older than the run; a later save must not take it for that
            (files / changed).write_bytes(whole + b"\n\n")
            os.utime(files / changed, (before, before))
            save(*args)
        with monkeypatch.context() as moved, pytest.raises(ZeroDivisionError):
            moved.setattr(sft, "save_state", saving)
            call(monkeypatch, words)
        with pytest.raises(InputError, match=f"{Path(changed).name} has changed since"):
            call(monkeypatch, [*words, "--resume"])
        (files / changed).write_bytes(whole + b"\n")  # as `mv` or `cp -p` would leave it: older, but another
        os.utime(files / changed, (before, before))
        with pytest.raises(InputError, match=f"{Path(changed).name} has changed since"):
            call(monkeypatch, [*words, "--resume"])
    finally:
        (files / changed).write_bytes(whole)
        os.utime(files / changed, (before, before))


def test_metrics_that_cannot_be_read_are_dropped(tmp_path):
    good = ['{"step": 1, "loss": 2.0}\n', '{"step": 2, "loss": 1.0}\n']
    (tmp_path / "metrics.jsonl").write_bytes(good[0].encode() + b'\0\0\0\n\n{"step": 2\n\xff\n5\n{}\n{"step": "2"}\n' + good[1].encode() + b'{"step": 3}\n{"step": 2')
    training.cut_metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text("utf-8") == "".join(good)


@pytest.mark.slow
@pytest.mark.parametrize("stage, kills", [("sft", 10), ("ppo", 10), ("pretrain", 2), ("reward", 2), ("dpo", 2),
                                          ("grpo", 2)])
def test_killed_at_any_moment_it_goes_on_to_the_same_end(stage, kills, files, tmp_path, noted):
    rng, in_a_save, redone = random.Random(stage), 0, 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    long = ["--save-every", 1, *{"ppo": ["--iterations", 150], "sft": ["--epochs", 100]}.get(stage, [])]
    assert process(command(files, stage, whole, *long)).returncode == 0
    seconds = json.loads((whole / "done").read_text("utf-8"))["seconds"]
    words = [sys.executable, "-u", *command(files, stage, cut, *long, "--resume")]
    for _ in range(kills):
        child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while not (line := child.stdout.readline()).startswith(f"{stage}:"):
            assert line, "it ended before its loop began"
        time.sleep(rng.uniform(0, 0.9 * seconds / kills))
        child.kill()
        killed = 1 if os.name == "nt" else -signal.SIGKILL
        assert child.wait() == killed, "it ended before it could be killed often enough"
        assert not (cut / "done").exists() and not (cut / "config.json").exists()
        in_a_save += any(cut.glob(".*"))
        if (cut / training.STATE).exists():  # whole, whenever it was
            position = torch.load(cut / training.STATE, weights_only=True)["position"]
            redone = max(redone, metrics(cut, half=True)[-1]["step"] - position)
    assert process(words[2:]).returncode == 0
    assert redone <= 1
    assert stage_ends(cut) == stage_ends(whole)
    assert not any(cut.glob(".*"))  # nothing half-made is left
    noted("kills", stage, kills, in_a_save, redone, "weights and metrics, bit for bit")


@pytest.mark.parametrize("stage", STAGES)
def test_who_is_asked_to_stop_saves_first(stage, files, tmp_path, monkeypatch):
    steps = watch_steps(stage, monkeypatch)
    monkeypatch.setattr(STAGES[stage], "StopRequest", type("Asked", (), {"__bool__": lambda self: len(steps) >= 2}))
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, command(files, stage, tmp_path / "out", "--save-every", 10**6))
    assert ended.value.code == 130
    assert torch.load(tmp_path / "out" / training.STATE, weights_only=True)["position"] == len(steps) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal for one child's Ctrl-C")
def test_ctrl_c_saves_and_tells_how_to_go_on(files, tmp_path, monkeypatch):
    stage = "sft"
    words = [sys.executable, "-u", *command(files, stage, tmp_path / "out", "--epochs", 4000, "--save-every", 10**6)]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (line := child.stdout.readline()).startswith(f"{stage}:"):
        assert line, child.stderr.read()
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in error and "finishing this step, then saving" in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("stopped and saved") and last.endswith("--resume")
    position = torch.load(tmp_path / "out" / training.STATE, weights_only=True)["position"]
    python, *words = shlex.split(last.split("go on with:")[1])
    begun = []
    monkeypatch.setattr(STAGES[stage], "progress", lambda total, start, *rest, **kw: begun.append(start) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the printed command goes on
        call(monkeypatch, words)
    assert python == sys.executable and begun == [position] and position > 0


@pytest.mark.parametrize("what", ["checkpoint", "state"])
def test_a_full_disk_leaves_the_old_save_whole(what, files, tmp_path):
    """The disk is full after 20 kB: a limit on the size of files, which fails in the same call."""
    resource = pytest.importorskip("resource")  # Windows has no such limits
    model, tokenizer, _ = load_checkpoint(files / "sft")
    config = sft.Config(out=str(tmp_path))
    generator = torch.Generator()

    def save(position):
        if what == "checkpoint":
            save_checkpoint(tmp_path, model, tokenizer, position=position)
        else:
            training.save_state(config, "sft", position, 0.0, generator, {"model": model})

    def read():
        if what == "checkpoint":
            return load_checkpoint(tmp_path)[2]["position"]
        return training.start_run(sft.Config(out=str(tmp_path), resume=True), "sft")["position"]
    save(1)
    (tmp_path / "metrics.jsonl").write_text("")
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, kept[1]))
    try:
        with pytest.raises(InputError, match="could not be written"):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert read() == 1
    save(3)
    assert read() == 3 and not list(tmp_path.glob(".*"))


def test_a_full_disk_stops_a_stream_with_one_line(files, tmp_path):
    """Less than a buffer fails when it is flushed, and once more when the file is closed."""
    resource = pytest.importorskip("resource")
    (tmp_path / "big.txt").write_text("The cat sat on the mat. " * 40)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, kept[1]))
    try:
        with pytest.raises(InputError, match="tokens.bin: could not be written"):
            data.stream_tokens([tmp_path / "big.txt"], 900, load_checkpoint(files / "sft")[1], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def test_a_save_that_was_cut_off_is_no_checkpoint(files, tmp_path, monkeypatch):
    """Whatever rename the kill falls on, old and new files are never read as one checkpoint."""
    model, tokenizer, _ = load_checkpoint(files / "sft")
    moves = []
    monkeypatch.setattr(training.os, "replace", lambda *paths: moves.append(paths))
    save_checkpoint(tmp_path / "count", model, tokenizer)
    monkeypatch.undo()
    assert len(moves) == 5
    for cut in range(len(moves)):
        folder, left = tmp_path / f"cut{cut}", cut
        save_checkpoint(folder, model, tokenizer, position=1)
        replace = training.os.replace

        def dying(source, target):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            replace(source, target)
        monkeypatch.setattr(training.os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, model, tokenizer, position=2)
        monkeypatch.undo()
        with pytest.raises(InputError, match="config.json: missing"):
            load_checkpoint(folder)


def test_a_checkpoint_takes_the_place_of_a_model_in_parts(files, tmp_path):
    """An index of parts, or a template in a file of its own, would be read before what is new."""
    model, tokenizer, _ = load_checkpoint(files / "sft")
    save_checkpoint(tmp_path, model, tokenizer)
    parts = "model-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / parts)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": parts}}))
    (tmp_path / "chat_template.jinja").write_text("[INST]")
    (tmp_path / "reward_with_reader.py").touch()  # of a reward model that was here
    assert torch.equal(load_checkpoint(tmp_path)[0].norm.weight, model.norm.weight)
    with torch.no_grad():
        model.norm.weight += 1
    save_checkpoint(tmp_path, model, tokenizer)
    assert torch.equal(load_checkpoint(tmp_path)[0].norm.weight, model.norm.weight)
    assert not (tmp_path / "model.safetensors.index.json").exists()  # some read it first
    assert not (tmp_path / "reward_with_reader.py").exists()
    chat.open_speaker(tmp_path)
    # transformers, too, reads the whole file first: its save_pretrained leaves an index of parts that are gone.
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": parts}}))
    assert torch.equal(load_checkpoint(tmp_path)[0].norm.weight, model.norm.weight)


def test_a_reward_model_that_others_would_misread_names_no_padding(files, tmp_path):
    """transformers reads it at the last token that is no padding; where <|im_end|> pads, that is one too early."""
    for stage in ("sft", "reward"):
        model, tokenizer, _ = load_checkpoint(files / stage)
        for pad in (tokenizer.pad_id, tokenizer.im_end_id):
            tokenizer.specials["<|pad|>"] = pad
            save_checkpoint(tmp_path, model, tokenizer)
            named = json.loads((tmp_path / "config.json").read_text("utf-8"))["pad_token_id"]
            assert named == (None if stage == "reward" and pad == tokenizer.im_end_id else pad)


def test_what_cannot_be_written_is_said_in_one_line(files, tmp_path):
    with pytest.raises(InputError, match="could not be written"):
        training.write_atomic(files / "score.py" / "pairs.jsonl", lambda path: path.write_text("x"))
    (tmp_path / "done").mkdir()  # what no run can remove
    with pytest.raises(InputError, match="could not be written"):
        training.start_run(sft.Config(out=str(tmp_path)), "sft")


@pytest.mark.parametrize("stage", STAGES)
def test_another_seed_gives_other_weights(stage, files, tmp_path, monkeypatch):
    """That the same gives the same is what the stopped runs show."""
    short = {"pretrain": ["--steps", 2], "ppo": ["--iterations", 1], "grpo": ["--iterations", 1]}.get(stage, ["--epochs", 1])
    for seed in (1, 2):
        call(monkeypatch, command(files, stage, tmp_path / str(seed), *short, "--seed", seed))
    assert stage_ends(tmp_path / "1")[1] != stage_ends(tmp_path / "2")[1]


class Reached(Exception):
    """The place in a stage that a test wants to see: it need not go on."""


@pytest.mark.parametrize("stage", STAGES)
def test_settings_reach_the_optimisers(stage, files, tmp_path, monkeypatch):
    name = "muon_and_adam" if stage in ("pretrain", "sft") else "adamw"
    made, clipped, create = [], [], getattr(training, name)
    monkeypatch.setattr(STAGES[stage], name, lambda model, *args, **more: made.append(args) or create(model, *args, **more))

    def clip(parameters, most):
        clipped.append(most)
        if len(clipped) == 1 + (stage == "ppo"):
            raise Reached
        return torch.zeros(())
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    both = ["--lr", 0.011, "--embed-lr", 0.012, "--head-lr", 0.013, "--weight-decay", 0.14]
    rates = {"pretrain": both, "sft": [*both, "--adam-eps", 1e-4], "reward": ["--lr", 0.011, "--weight-decay", 0.14],
             "ppo": ["--lr", 0.011, "--critic-lr", 0.012]}.get(stage, ["--lr", 0.011])
    with pytest.raises(Reached):
        call(monkeypatch, command(files, stage, tmp_path, *rates, "--clip", 0.7))
    assert made == ([(0.011,), (0.012,)] if stage == "ppo" else [tuple(rates[1::2])]) and set(clipped) == {0.7}


@pytest.mark.parametrize("stage, reader, n", [("pretrain", "random_windows", 300), ("sft", "sft_batch", 60)])
def test_what_is_held_out_is_not_trained_on(stage, reader, n, files, tmp_path, monkeypatch):
    read = []

    def first(rows, *rest):
        read.append(rows)
        raise Reached
    monkeypatch.setattr(data, reader, first)
    with pytest.raises(Reached):
        call(monkeypatch, command(files, stage, tmp_path, "--holdout", 20, "--batch-size", 60))
    if stage == "pretrain":
        text = train_bpe([row["text"] for row in rows_of("texts", 280)], 300).decode(read[0].tolist())
    else:
        text = "".join(Tokenizer.load(files / "sft").decode(ids) for ids, _ in read[0])
    assert {int(i) for i in re.findall(r"(?:Line|Say) (\d+)", text)} == set(range(n - 20))


def test_a_new_run_forgets_the_old_ones_checkpoints_and_nothing_else(tmp_path):
    for name in ("step_0010/config.json", "step_mine/notes.txt", "done", "metrics.jsonl", "model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    training.start_run(sft.Config(out=str(tmp_path)), "sft")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"notes.txt", "model.safetensors"}


@pytest.mark.parametrize("error, status, told", [(InputError("x: no such file"), 2, "error: x: no such file\n"),
                                                 (KeyboardInterrupt(), 130, "error: interrupted\n")])
def test_a_script_ends_with_a_status_and_one_line(error, status, told, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        training.run(main)
    assert caught.value.code == status and capsys.readouterr().err == told


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has such a file")
def test_a_full_disk_gets_one_line_when_a_script_prints():
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-c", "import training; training.run(lambda: print('hello'))"], cwd=ROOT,
                             stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 2 and ran.stderr.endswith("error: No space left on device\n")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_every_epoch_has_an_order_of_its_own(stage, files, tmp_path, monkeypatch):
    orders, batches = [], data.length_batches

    def watch(lengths, size, generator=None):
        found = batches(lengths, size, generator)
        if generator is not None:
            orders.append([i for batch in found for i in batch])
        return found
    monkeypatch.setattr(data, "length_batches", watch)
    call(monkeypatch, command(files, stage, tmp_path / "out", "--epochs", 2))
    first, second = orders
    assert first != second and sorted(first) == sorted(second) == list(range(len(first)))


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_less_memory_is_the_same_training(stage, files, tmp_path, monkeypatch):
    """Gradient accumulation and recomputed activations: the same losses from step to step, but for rounding."""
    rows, again, kept = rows_of("conversations", 40), [], model_module.checkpoint
    sizes, parts = set(), training.micro_batches
    monkeypatch.setattr(STAGES[stage], "micro_batches", lambda batch, size: (sizes.add(size), parts(batch, size))[1])
    for i, row in enumerate(rows):  # of several lengths: shares must go by supervised tokens
        row["messages"][1]["content"] *= 1 + i % 4
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    monkeypatch.setattr(model_module, "checkpoint", lambda *args, **kw: (again.append(1), kept(*args, **kw))[1])
    short = {"pretrain": ["--steps", 12, "--batch-size", 8], "sft": ["--data", tmp_path / "rows.jsonl"],
             "reward": ["--lr", 3e-4]}.get(stage, [])  # at a higher rate rounding grows from step to step
    for size, more in ((None, []), (3, ["--micro-batch", 3]), (None, ["--recompute"]), (1, ["--micro-batch", 1, "--recompute"])):
        again.clear()
        sizes.clear()
        out = tmp_path / " ".join(map(str, more))
        call(monkeypatch, command(files, stage, out, "--epochs" if stage != "pretrain" else "--seed", 1, *short, *more))
        assert bool(again) == ("--recompute" in more) and sizes == {size}
        for before, after in zip(metrics(tmp_path), metrics(out), strict=True):  # the first run is in tmp_path itself
            for name in before:
                assert name == "tokens_per_second" or after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-4), name


# ---- no code from data ---------------------------------------------------------------------------

class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [training.STATE, "model.safetensors", "pytorch_model.bin", "config.json",
                                  "tokenizer.json"])
def test_a_pickle_in_a_checkpoint_is_not_run(name, files, tmp_path, monkeypatch):
    folder, fired = tmp_path / "out", tmp_path / "fired"
    model, tokenizer, _ = load_checkpoint(files / "sft")
    save_checkpoint(folder, model, tokenizer)
    (folder / name).write_bytes(pickle.dumps({"stage": "sft", "bomb": Bomb(fired)}))
    pickle.loads((folder / name).read_bytes())  # it is armed
    assert fired.exists()
    fired.unlink()
    with contextlib.suppress(InputError):
        load_checkpoint(folder)
    with contextlib.suppress(InputError):
        call(monkeypatch, command(files, "sft", folder, "--resume", "--epochs", 1))
    torch.save({"bomb": Bomb(fired)}, folder / name)
    with contextlib.suppress(InputError):
        load_checkpoint(folder)
    told = ""
    try:
        training.start_run(sft.Config(out=str(folder), resume=True), "sft")
    except InputError as error:
        told = str(error)
    assert not fired.exists() and bool(told) is (name == training.STATE)
    assert "weights_only" not in told  # torch says how to run it all the same


def test_what_a_kill_left_of_a_save_is_not_taken_over(files, tmp_path):
    model, tokenizer, _ = training.load_checkpoint(files / "sft")
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "reward_with_reader.py").touch()
    save_checkpoint(tmp_path, model, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (files / "sft").iterdir()}


# ---- numbers gone wrong --------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_no_number_stops_before_the_update(stage, files, tmp_path, monkeypatch):
    """From the third step on; what was saved before is whole, and no checkpoint is written."""
    module, calls = STAGES[stage], []
    rate = module.learning_rate

    def poisoned(*args):
        calls.append(args)
        return rate(*args) if len(calls) < 3 else float("nan")
    monkeypatch.setattr(module, "learning_rate", poisoned)  # the third update makes every weight a NaN
    monkeypatch.setattr(rlhf, "check_recorded", lambda *args: None)  # which would see it first
    flags, warmups = {"pretrain": (["--warmup", 7, "--decay", 0.5], (7, 200)), "ppo": ([], ()), "grpo": ([], ())}.get(
        stage, (["--warmup", 7], (7,)))
    with pytest.raises(InputError, match=r"after [23] steps: the loss is nan; stopped before the update.* Last save: "):
        call(monkeypatch, command(files, stage, tmp_path / "out", "--save-every", 1, *flags))
    assert not (tmp_path / "out" / "done").exists() and not (tmp_path / "out" / "config.json").exists()
    assert calls[0][3:] == warmups


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_an_infinite_loss_is_no_reason_to_end_the_iteration(stage, files, tmp_path, monkeypatch):
    """Its KL is infinite too, more than --stop-kl, which must not hide it."""
    loss = getattr(rlhf, f"{stage}_loss")

    def exploded(*args):
        value, stats = loss(*args)
        return value * float("inf"), stats | {"approx_kl": torch.tensor(float("inf"))}
    monkeypatch.setattr(rlhf, f"{stage}_loss", exploded)
    with pytest.raises(InputError, match="after 0 steps: the loss is (-?inf|nan)"):
        call(monkeypatch, command(files, stage, tmp_path / "out"))


def test_a_gradient_that_is_no_number_stops_too():
    config = sft.Config(out="x")
    training.check_finite(1, config, loss=torch.tensor(1.0), gradient=torch.tensor(2.0))
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(InputError, match=f"after 7 steps: the gradient is {value}.*Nothing was saved yet"):
            training.check_finite(7, config, loss=torch.tensor(1.0), gradient=torch.tensor(float(value)))


def test_sft_reads_text_of_pretraining_beside(files, tmp_path, monkeypatch):
    """In the world, by default. And --from-scratch begins with other weights than --init."""
    asked = [([{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}])
             for n in range(60)]
    text = ["Line 7 tells of 49 birds and more birds."] * 400
    monkeypatch.setattr(sft.world, "demonstrations", lambda *args, **kwargs: asked)
    monkeypatch.setattr(sft.world, "replay_documents", lambda *args: text)
    tokenizer = Tokenizer.load(files / "sft")
    tokens, nats = data.pack_documents(text, tokenizer)[0], {}
    for replay in (0, 2):
        call(monkeypatch, command(files, "sft", tmp_path / "out", "--data", "world", "--epochs", 8, "--replay", replay))
        model = load_checkpoint(tmp_path / "out")[0]
        with torch.no_grad():
            nats[replay] = sft.replay_loss(model, tokens, 8, torch.Generator().manual_seed(1)).item()
    assert nats[2] < nats[0] - 0.5
    still = ["--epochs", 1, "--lr", 0, "--embed-lr", 0, "--head-lr", 0]
    start = load_checkpoint(files / "sft")[0].embed.weight
    for flags, same in (([], True), (["--from-scratch"], False)):
        call(monkeypatch, command(files, "sft", tmp_path / "out", *still, *flags))
        assert torch.equal(load_checkpoint(tmp_path / "out")[0].embed.weight, start) is same


def test_the_model_is_saved_before_it_is_measured(files, tmp_path, monkeypatch):
    """A long measurement that is stopped loses nothing: weights and state are there. (reward.py needs what it measures
    for the zero it saves.)"""
    reads = {"pretrain": "heldout_loss", "sft": "heldout_loss", "dpo": "pair_logprobs", "ppo": "generate", "grpo": "generate"}
    for stage, name in reads.items():
        short = [{"pretrain": "--steps", "ppo": "--iterations", "grpo": "--iterations"}.get(stage, "--epochs"), 1]
        events = []
        with monkeypatch.context() as watched:
            for what in (name, "save_checkpoint", "save_state"):
                watched.setattr(STAGES[stage], what, lambda *args, what=what, real=getattr(STAGES[stage], what), **more: (
                    events.append(what), real(*args, **more))[1])
            call(monkeypatch, command(files, stage, tmp_path / stage, *short, "--save-every", 10**6))
        assert events[-1] == name and events.count("save_checkpoint") == events.count("save_state") == 1, stage


def test_settings_of_sft_reach_what_they_are_of(files, tmp_path, monkeypatch):
    """--best-only the demonstrations, --replay the windows of every update."""
    asked, demonstrations, replay = [], sft.world.demonstrations, sft.replay_loss
    monkeypatch.setattr(sft.world, "demonstrations", lambda *args: asked.append(args) or demonstrations(*args))
    monkeypatch.setattr(sft, "replay_loss", lambda *args: asked.append(args[2]) or replay(*args))
    monkeypatch.setattr(sft.world, "replay_documents", lambda *args: ["Line 7 tells of 49 birds."] * 400)
    tokenizer = Tokenizer.load(files / "sft")
    save_checkpoint(tmp_path / "init", model_of(tokenizer, context_length=512), tokenizer)
    call(monkeypatch, command(files, "sft", tmp_path / "out", "--init", tmp_path / "init", "--data", "world", "--conversations",
                              40, "--seed", 3, "--best-only", "--replay", 5, "--epochs", 1))
    assert asked[0] == (40, 3, True) and set(asked[1:]) == {5}


def test_an_answer_in_the_middle_of_a_conversation_is_trained_on(files, tmp_path, monkeypatch, capsys):
    """A file may have a row for each turn: a short one, held out, begins a long one, all of whose answers are supervised;
    or a short one begins a long one that is held out, all of whose answers count."""
    def turns(n, asked):
        return {"messages": [{"role": role, "content": f"{n}{word}"} for word in asked
                             for role, word in (("user", word), ("assistant", word))]}
    rows = [turns(n, "ab") for n in range(20)] + [turns(50, "a")] + [turns(7, "a"), turns(50, "ab"), turns(99, "a")]
    (tmp_path / "turns.jsonl").write_text(lines(rows))
    call(monkeypatch, command(files, "sft", tmp_path / "out", "--epochs", 1, "--data", tmp_path / "turns.jsonl", "--holdout", 3))
    assert "kept 1 of 3 held-out rows" in capsys.readouterr().err


def test_heldout_loss_of_sft_is_a_mean_over_tokens(files, tmp_path, monkeypatch):
    model, tokenizer, _ = load_checkpoint(files / "sft")
    rows = [([5] * (3 + n % 7), [0, 0] + [1] * (1 + n % 7)) for n in range(70)]  # more than one batch
    whole = sft.answer_loss(model, *data.sft_batch(rows, tokenizer.pad_id)).item()
    assert sft.heldout_loss(model, rows, tokenizer.pad_id, "cpu") == pytest.approx(whole, rel=1e-4)
    largest, loss = [], sft.answer_loss
    monkeypatch.setattr(sft, "answer_loss", lambda model, inputs, *rest: (
        largest.append(len(inputs)), loss(model, inputs, *rest))[1])
    call(monkeypatch, command(files, "sft", tmp_path, "--epochs", 1, "--micro-batch", 2))
    assert max(largest) == 2  # the held-out rows too, or a run that fitted would end in want of memory


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_what_is_not_trained_on_is_read_in_as_little_memory(stage, files, tmp_path, monkeypatch):
    """Or a run that fitted would end in want of memory."""
    sizes, length_batches = set(), data.length_batches
    monkeypatch.setattr(data, "length_batches", lambda lengths, size, *order: (
        order or sizes.add(size), length_batches(lengths, size, *order))[1])
    more = ["--eval-every", 1] if stage != "dpo" else []
    for flags, size in ((["--batch-size", 2], 4), (["--micro-batch", 1], 1), (["--batch-size", 40], 64)):
        sizes.clear()
        call(monkeypatch, command(files, stage, tmp_path, "--epochs", 1, "--holdout", 20, *flags, *more))
        assert sizes == {size}, flags


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_held_out_data_are_measured_on_the_way_and_change_nothing(stage, files, tmp_path, monkeypatch):
    ends = []
    for every in (3, 10**6):
        count = ["--steps", 7] if stage == "pretrain" else ["--epochs", 1]  # 57 conversations, 8 a step: 8 steps
        call(monkeypatch, command(files, stage, tmp_path / str(every), *count, "--eval-every", every))
        ends.append(stage_ends(tmp_path / str(every)))
    (rows, weights), (plain, same) = ends
    found = [row for row in rows if "heldout_loss" in row]
    assert [row["step"] for row in found[:-1]] == [3, 6] and weights == same
    assert [row for row in rows if row not in found[:-1]] == plain
    for row in found:
        assert row["heldout_loss"] == pytest.approx(found[-1]["heldout_loss"], abs=0.5)  # also a mean over tokens


def test_pretraining_goes_on_from_a_checkpoint(files, tmp_path, monkeypatch):
    """In its shape and with its tokeniser, at rates of 0 its weights."""
    (tmp_path / "more.txt").write_text("<|endoftext|>".join(f"Hens lay {i} eggs near ponds." for i in range(300)))  # other pairs
    asked = ["pretrain.py", "--data", tmp_path / "more.txt", "--init", files / "sft", "--context-length", 32, "--steps", 2,
             "--device", "cpu", "--dtype", "float32", "--out", tmp_path / "out"]
    still = [word for rate in ("--lr", "--embed-lr", "--head-lr") for word in (rate, 0)]
    call(monkeypatch, [*asked, *still])
    before, after = (load_checkpoint(folder) for folder in (files / "sft", tmp_path / "out"))
    assert all(torch.equal(value, after[0].state_dict()[name]) for name, value in before[0].state_dict().items())
    assert before[0].config == after[0].config and before[1].ranks == after[1].ranks
    assert after[2]["stage"] == "pretrain"
    call(monkeypatch, asked)
    assert not torch.equal(load_checkpoint(tmp_path / "out")[0].embed.weight, before[0].embed.weight)


def test_lora_in_sft_learns_and_leaves_a_plain_checkpoint(files, tmp_path, monkeypatch):
    call(monkeypatch, command(files, "sft", tmp_path, "--epochs", 20, "--lora", 4, "--lr", 0.02, "--eval-every", 10))
    start, end = (load_checkpoint(folder)[0].state_dict() for folder in (files / "sft", tmp_path))
    assert torch.equal(start["embed.weight"], end["embed.weight"])  # frozen
    assert not torch.equal(start["blocks.0.mlp.down.weight"], end["blocks.0.mlp.down.weight"])
    found = [row["heldout_loss"] for row in metrics(tmp_path) if "heldout_loss" in row]
    model, tokenizer, _ = load_checkpoint(tmp_path)
    held = data.encode_conversations(data.load_conversations([files / "conversations.jsonl"])[-3:], tokenizer, 64)
    assert found[-1] < found[0] - 0.1 and found[-1] == pytest.approx(sft.heldout_loss(model, held, tokenizer.pad_id, "cpu"), rel=1e-4)


def test_sft_reads_text_of_your_own_again(files, tmp_path, monkeypatch):
    (tmp_path / "old.txt").write_text("A hen lays an egg. " * 60)
    read, pack = [], data.pack_documents
    monkeypatch.setattr(data, "pack_documents", lambda texts, *rest: read.append(texts) or pack(texts, *rest))
    losses, replay = [], sft.replay_loss
    monkeypatch.setattr(sft, "replay_loss", lambda *args: losses.append((args[2], args[3].get_state().numpy().tobytes())) or replay(*args))
    call(monkeypatch, command(files, "sft", tmp_path / "out", "--epochs", 1, "--replay-data", tmp_path / "old.txt", "--replay", 3))
    assert read == [data.load_texts([tmp_path / "old.txt"])] and {windows for windows, _ in losses} == {3}
    assert len({state for _, state in losses}) == len(losses) == 8  # another text in each step
    losses.clear()
    call(monkeypatch, command(files, "sft", tmp_path / "out", "--epochs", 1))  # your conversations alone
    assert not losses


def test_small_numbers_are_logged_with_their_digits(tmp_path):
    training.log(tmp_path, 1, lr=4.321e-7, loss=torch.tensor(123456.789))
    assert json.loads((tmp_path / "metrics.jsonl").read_text("utf-8")) == {"step": 1, "lr": 4.321e-7, "loss": 123457.0}


def test_equal_rewards_teach_nothing_and_break_nothing(files, tmp_path, monkeypatch):
    """Zero variance: GRPO's advantages are 0, and so are PPO's if its critic begins at the mean of the rewards."""
    (tmp_path / "flat.py").write_text("def flat(prompt, response):\n    return 0.1\n")
    for stage in ("grpo", "ppo"):
        call(monkeypatch, command(files, stage, tmp_path / stage, "--reward", f"{tmp_path}/flat.py:flat",
                                  "--iterations", 2, "--no-eos-score", "nan"))
        rows = [row for row in metrics(tmp_path / stage) if "kl" in row]
        assert len(rows) == 2 and all(abs(row["kl"]) < 1e-5 for row in rows)
        assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
        assert stage == "ppo" or all(row["silent_groups"] == 1 and row["kl"] == 0 for row in rows)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_reward_that_fails_leaves_the_earlier_run(stage, files, tmp_path, monkeypatch):
    call(monkeypatch, command(files, stage, tmp_path, "--iterations", 1))
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("fails", "few"):
        with pytest.raises(InputError):
            call(monkeypatch, command(files, stage, tmp_path, "--reward", f"{files}/score.py:{name}", "--holdout", 50))
    assert there == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_reward_function_may_switch_gradients_off(files, tmp_path, monkeypatch):
    off = "torch.set_grad_enabled(False)\n"
    (tmp_path / "off.py").write_text(f"import torch\n{off}\n\ndef one(prompt, response):\n    {off}    return 1.0\n")
    call(monkeypatch, command(files, "ppo", tmp_path / "out", "--reward", f"{tmp_path}/off.py:one", "--iterations", 1))
    assert torch.is_grad_enabled() and (tmp_path / "out" / "done").exists()


def test_kl_that_explodes_stops_the_run(files, tmp_path, monkeypatch, capsys):
    for stage in ("ppo", "grpo"):
        call(monkeypatch, command(files, stage, tmp_path / stage, "--lr", 0.05, "--beta", 0, "--max-kl", 0.5,
                                  "--stop-kl", 99))
        done = json.loads((tmp_path / stage / "done").read_text("utf-8"))
        assert done["iterations"] < 40 and "> --max-kl; stopped" in capsys.readouterr().err


# ---- bad input -----------------------------------------------------------------------------------

def bad_commands(files):
    """(words, what the one line must say) of mistakes with flags, checkpoints and files."""
    out = files / "never"
    other = files / "other"
    if not other.exists():
        save_checkpoint(other, ScalarModel(model_of(train_bpe(["zz yy xx"], 262))), train_bpe(["zz yy xx"], 262))
        tokenizer = train_bpe([row["text"] for row in rows_of("texts")], 300)
        save_checkpoint(files / "short", ScalarModel(model_of(tokenizer, context_length=32)), tokenizer)
        save_checkpoint(files / "plain", model_of(tokenizer), tokenizer)
        save_checkpoint(files / "plain_reward", ScalarModel(model_of(tokenizer)), tokenizer)
        for part in files.glob("plain*/*.json*"):
            part.write_text(part.read_text("utf-8").replace("<|im_start|>", "<|begin|>"), "utf-8")
        (files / "no_config").mkdir()
        plain = train_bpe(["a"], 260)
        save_checkpoint(files / "no_endoftext", model_of(plain), plain)
        path = files / "no_endoftext" / "tokenizer.json"
        path.write_text(path.read_text("utf-8").replace("<|endoftext|>", "<|eot|>"))
        save_checkpoint(files / "no_weights", model_of(tokenizer), tokenizer)
        (files / "no_weights" / "model.safetensors").unlink()
        save_checkpoint(files / "no_ends", model_of(tokenizer), tokenizer)
        (files / "no_ends" / "generation_config.json").write_text("")
        for name, part in (("half", "model.safetensors"), ("no_tokens", "tokenizer.json")):
            save_checkpoint(files / name, model_of(train_bpe(["a"], 260)), train_bpe(["a"], 260))
            path = files / name / part
            path.write_bytes(path.read_bytes()[:99])
        save_checkpoint(files / "wide", model_of(train_bpe(["a"], 260), width=32), train_bpe(["a"], 260))
        (files / "wide" / "config.json").write_text((files / "sft" / "config.json").read_text("utf-8"))
        for name, content in {
                "empty.jsonl": b"", "binary.jsonl": bytes(range(256)) * 9, "latin.txt": "gar\xe7on".encode("latin-1"),
                "cut.json": b'[{"messages": [', "list.jsonl": b"[1, 2]\n", "bare.jsonl": b'{"question": "?"}\n',
                "types.jsonl": b'{"messages": 5}\n', "torn.jsonl.gz": gzip.compress(b"{}" * 999)[:30],
                "false.jsonl.gz": b"not gzip", "nothing.jsonl": lines(
                    [{"messages": [{"role": "user", "content": "hi"}]}] * 9).encode(), "x.csv": b"a,b\n",
                "all_p.jsonl": lines([row | {"p": 0.9} for row in rows_of("preferences")]).encode(),
                "p.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c", "p": 2}\n'}.items():
            (files / name).write_bytes(content)
    say = lambda *words: command(files, *words)  # noqa: E731
    yield say("sft", out, "--data", files / "none.jsonl"), "none.jsonl: found no readable file"
    yield say("sft", out, "--data", files), "expected a data file"
    for stage, flag in (("sft", "--data"), ("pretrain", "--data"), ("dpo", "--data"), ("ppo", "--replay-data")):
        yield say(stage, out, flag, "world", files / "text.txt"), "'world' can only stand alone"
    yield say("sft", out, "--data", files / "empty.jsonl"), "found an empty file"
    yield say("sft", out, "--data", files / "binary.jsonl"), "expected UTF-8 text"
    yield say("pretrain", out, "--data", files / "latin.txt"), "line 1: found byte 0xe7"
    yield say("sft", out, "--data", files / "cut.json"), "line 1, column 16: found bad JSON"
    yield say("sft", out, "--data", files / "list.jsonl"), "expected an object"
    yield say("sft", out, "--data", files / "bare.jsonl"), 'found the keys ["question"]'
    yield say("sft", out, "--data", files / "types.jsonl"), "expected a list of messages"
    yield say("sft", out, "--data", files / "torn.jsonl.gz"), "corrupt or truncated gzip"
    yield say("sft", out, "--data", files / "false.jsonl.gz"), "corrupt or truncated gzip"
    yield say("sft", out, "--data", files / "nothing.jsonl"), "expected at least half of them to be usable"
    yield say("sft", out, "--data", files / "x.csv"), "found the ending '.csv'"
    yield say("sft", out, "--data", files / "preferences.jsonl"), "this is a row of preferences"
    yield say("reward", out, "--data", files / "conversations.jsonl"), "expected \"chosen\" and \"rejected\""
    yield say("dpo", out, "--data", files / "p.jsonl"), "expected a probability"
    for stage in ("reward", "ppo"):
        yield say(stage, out, "--data", files / "all_p.jsonl"), "every row has a 'p'"
    yield say("sft", out, "--holdout", 60), "a hold-out of 60, expected some rows left"
    for stage, *flags in (("sft", "--conversations", 9), ("sft", "--best-only"), ("reward", "--pairs", 9), ("dpo", "--pairs", 9),
                          ("ppo", "--prompts", 9), ("grpo", "--families", "lists"), ("pretrain", "--documents", 9)):
        yield say(stage, out, *flags), f"{flags[0]}: found --data {files}/"
    yield say("sft", out, "--holdout", 0), "--holdout 0.0: expected"
    yield say("sft", out, "--holdout", -1), "--holdout -1.0: expected"
    yield say("reward", out, "--data", "world", "--holdout", "nan"), "--holdout nan: expected"
    yield say("reward", out, "--data", "world", "--pairs", 60, "--holdout", 60), "--holdout 60: expected fewer than"
    yield say("sft", out, "--adam-eps", 0), "--adam-eps 0.0: expected"
    yield say("sft", out, "--init", files / "nowhere"), "nowhere/config.json: missing"
    long = files / ("x" * 300)  # one of several reasons why the system may not even look for a path
    yield say("sft", out, "--init", long), "x/config.json: missing"
    yield ["chat.py", long], "x/config.json: missing"
    for stage in ("sft", "ppo", "grpo"):
        yield say(stage, long, "--resume"), "x: could not be written"
    yield say("pretrain", out, "--stream", "--data", f"{long}.txt"), "found no .txt file"
    yield say("sft", out, "--init", files / "no_config"), "config.json: missing"
    yield say("sft", out, "--init", files / "no_weights"), f"{files}/no_weights/model.safetensors"
    yield ["evaluate.py", files / "sft", "--out", out, "--reward", files / "plain_reward", "--data",
           files / "preferences.jsonl"], "plain_reward: its tokenizer has no tokens of ChatML"
    yield ["chat.py", files / "no_ends", "--prompt", "hi"], "generation_config.json: cannot be read as JSON"
    yield say("sft", out, "--init", files / "half"), "half: not a checkpoint that can be read"
    yield say("sft", out, "--init", files / "no_tokens"), "no_tokens: not a checkpoint that can be read"
    yield say("sft", out, "--init", files / "plain"), "its tokenizer has no <|im_start|>"
    yield say("ppo", out, "--reward", files / "short"), "reads 32 tokens, --init 64"
    yield say("sft", files / "sft", "--init", files / "sft" / ".." / "sft"), "what --init reads would be replaced"
    yield say("ppo", files / "sft", "--init", files / "sft" / "step_0020"), "what --init reads would be replaced"
    yield say("ppo", files / "reward", "--reward", f"{files}/reward/"), "what --reward reads would be replaced"
    yield say("ppo", out, "--no-eos-score", "inf"), "--no-eos-score inf: expected"
    yield say("sft", out, "--init", files / "wide"), "wide: not a checkpoint that can be read"
    yield say("sft", out, "--init", files / "reward"), "reward: a reward model; expected a language model"
    yield say("reward", out, "--init", files / "reward"), "expected a language model"
    yield say("ppo", out, "--reward", files / "sft"), "sft: a language model; expected a reward model"
    yield say("ppo", out, "--reward", files / "other"), "reads other tokens than --init"
    yield say("ppo", out, "--reward", f"{files}/score.py:fails"), "KeyError"
    yield say("ppo", out, "--reward", f"{files}/score.py:nan"), "returned nan, expected a number between"
    yield say("ppo", out, "--reward", f"{files}/score.py:none"), "could not be loaded (AttributeError"
    yield say("ppo", out, "--reward", f"{files}/score.py"), "score.py:FUNCTION"
    yield say("ppo", out, "--reward", f"{files}/score.py:says"), "ValueError: two lines; on the prompt"
    for stage in ("ppo", "grpo"):  # if the least that an answer can get is -1, and it need only not end for that
        yield say(stage, out, "--reward", f"{files}/score.py:few", "--holdout", 50), "expected a --no-eos-score well below the usual"
    yield say("ppo", out, "--reward", files / "reward", "--no-eos-score", 50, "--holdout", 50), "--no-eos-score well below the usual"
    for stage in ("dpo", "ppo", "grpo"):
        yield say(stage, out, "--replay", 2), "--replay 2: expected --replay-data"
    yield say("ppo", out, "--reward", f"{files}/score.py:quits"), "SystemExit: 3; on the prompt"
    yield say("ppo", out, "--reward", f"{files}/ends.py:length"), "could not be loaded (SystemExit: 0)"
    yield say("ppo", out, "--max-new-tokens", 60), "longer than 4 tokens, the context of 64 less --max-new-tokens"
    yield say("ppo", out, "--max-new-tokens", 72), "--max-new-tokens 72: expected fewer than the 64 tokens of the context"
    yield say("ppo", out, "--temperature", 0), "--temperature 0.0: expected"
    yield say("ppo", out, "--minibatches", 17), "--minibatches 17: expected"
    yield say("ppo", out, "--lam", 2), "--lam 2.0: expected"
    yield say("grpo", out, "--group", 1), "--group 1: expected"
    for stage, windows in (("sft", -1), ("dpo", 0), ("ppo", 0), ("grpo", 0)):
        yield say(stage, out, "--replay", windows), f"--replay {windows}: expected"
    yield say("dpo", out, "--label-smoothing", 0.7), "--label-smoothing 0.7: expected"
    yield say("dpo", out, "--beta", "nan"), "--beta nan: expected"
    yield say("dpo", out, "--beta", 0), "--beta 0.0: expected"
    more = ["pretrain.py", "--data", files / "text.txt", "--out", out, "--init"]
    yield [*more, files / "sft"], "--context-length 192: expected at most the 64 of"
    yield [*more, files / "sft", "--layers", 3], "--layers: found with --init"
    yield [*more, files / "no_endoftext"], "its tokenizer has no <|endoftext|>"
    yield say("sft", out, "--lora", 0), "--lora 0: expected"
    yield say("sft", out, "--lora", 2, "--from-scratch"), "expected no --from-scratch"
    yield say("sft", out, "--replay", 5), "--replay 5: expected --replay-data"
    yield say("sft", out, "--lr", -1), "--lr -1.0: expected"
    yield say("sft", out, "--lr", "nan"), "--lr nan: expected"
    yield say("sft", out, "--epochs", 0), "--epochs 0: expected"
    yield say("sft", out, "--batch-size", 0), "--batch-size 0: expected"
    yield say("pretrain", out, "--steps", 0), "--steps 0: expected"
    yield say("pretrain", out, "--vocab-size", 5), "--vocab-size 5: expected"
    yield say("pretrain", out, "--heads", 3), "heads"
    yield say("pretrain", out, "--context-length", 10**5), "expected more than a window"
    yield say("pretrain", out, "--save-every", 0), "--save-every 0: expected"
    yield say("sft", out, "--save-every", 0), "--save-every 0: expected"
    yield say("ppo", out, "--save-every", 0), "--save-every 0: expected"
    yield say("sft", out, "--clip", 0), "--clip 0.0: expected"
    yield say("sft", out, "--seed", -1), "--seed -1: expected"
    if not torch.cuda.is_available():
        yield say("sft", out, "--device", "cuda"), "--device cuda: not available here"
    yield say("sft", files / "score.py" / "out"), "could not be written"
    yield ["rlhf.py", "pop"], "expected one of dpo, ppo, grpo"
    yield ["chat.py", files / "sft", "--prompt", "word " * 99], "found a prompt of"
    yield ["chat.py", files / "reward", "--prompt", "hi"], "a reward model does not talk"
    yield ["chat.py", files / "sft", "--prompt", "hi", "--temperature", -1], "--temperature -1.0: expected"
    yield ["chat.py", files / "sft", "--prompt", "hi", "--best-of", 4], "--reward"
    yield ["chat.py", files / "sft", "--complete", "word " * 99], "found a text of"
    yield ["chat.py", files / "sft", "--complete", "hi", "--prompt", "hi"], "expected no --prompt"
    yield ["chat.py", files / "sft", "--complete", "hi", "--few-shot", 1], "expected no --prompt"


def test_every_mistake_gets_one_line(files, monkeypatch):
    heard = 0
    for words, message in bad_commands(files):
        with pytest.raises((InputError, SystemExit)) as caught:
            call(monkeypatch, words)
        told = str(caught.value)
        assert message in told and "\n" not in told, (words, told)
        heard += 1
        out = files / "never"  # nothing that looks like a result
        assert not (out / "done").exists() and not (out / "config.json").exists()
    assert heard >= 50


def test_a_reader_that_has_gone_is_no_error(monkeypatch, capsys):
    """`python world.py | head`. And a character that the terminal cannot show is no reason to stop."""
    told, turned = [], []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(fileno=lambda: 1, flush=lambda: None, reconfigure=lambda **how: told.append(how)))
    monkeypatch.setattr(training.os, "dup2", lambda *ends: turned.append(ends))

    def main():
        raise BrokenPipeError(errno.EPIPE, "gone")
    training.run(main)
    assert told == [{"errors": "replace"}] and len(turned) == 1 and capsys.readouterr().err == ""


def test_too_little_memory_for_a_checkpoint_is_not_a_bad_checkpoint(files, monkeypatch):
    def model(config):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(training, "GPT", model)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_checkpoint(files / "sft")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_want_of_memory_gets_one_line(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        training.run(main)
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.startswith("error: out of memory; try --micro-batch") and told.count("\n") == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="of two distributions"):
        training.run(lambda: rlhf.check_recorded([[1.0]], torch.zeros(1, 1), torch.ones(1, 1)))


@pytest.mark.slow
def test_every_mistake_as_a_process(files, noted):
    """Status 2, the line on stderr alone, no traceback."""
    count = 0
    for words, message in bad_commands(files):
        ran = process([str(word) for word in words])
        last = ran.stderr.strip().splitlines()[-1]
        assert ran.returncode == 2 and message in last and last.startswith("error: "), (words, ran.stderr)
        assert "Traceback" not in ran.stderr
        count += 1
    noted("fuzz", "scripts as processes", f"{count} mistakes", "status 2 and one line each")


# ---- fuzz ----------------------------------------------------------------------------------------

LOADERS = (data.load_texts, data.load_conversations, data.load_preferences, data.load_prompts)
ODD = (None, True, -1, 1e999, "", " ", "\ud800", "\0", "<|im_end|>", "\u2028", [], {}, [[]], [{}], {"role": 3},
       [{"role": "user", "content": None}], [{"role": "tool", "content": "x"}], "x" * 5000, float("nan"))


def spoil_value(value, rng):
    """A copy with something in it replaced, dropped, doubled or renamed."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place, copy = rng.choice(list(places)), json.loads(json.dumps(value))
        what = rng.random()
        if what < 0.2:
            del copy[place]
        elif what < 0.3 and isinstance(copy, dict):
            copy[rng.choice(["text", "prompt", "chosen", "messages", "input", "p"])] = copy.pop(place)
        elif what < 0.35 and isinstance(copy, list):
            copy.append(copy[place])
        else:
            copy[place] = spoil_value(copy[place], rng)
        return copy
    return rng.choice(ODD)


def spoil_bytes(content, rng):
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, what = rng.randrange(len(content) + 1), rng.random()
        if what < 0.3 and at < len(content):
            content[at] = rng.randrange(256)
        elif what < 0.5:
            content[at:at] = rng.randbytes(rng.randint(1, 9))
        elif what < 0.7:
            del content[at:]
        elif what < 0.85:
            del content[at:at + rng.randint(1, 30)]
        else:
            content[at:at] = rng.choice([b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\r\n", b"\n\n", b'"', b"{", b"]"])
        if not content:
            break
    return bytes(content)


def fuzzed_file(rng):
    """-> (file name, bytes): a file of some kind with something wrong, mostly."""
    rows = rows_of(rng.choice(["texts", "conversations", "alpaca", "preferences", "hh"]), rng.randint(1, 6))
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(rows))
            rows[place] = spoil_value(rows[place], rng)
    as_list = rng.random() < 0.4
    text = json.dumps(rows, indent=rng.choice([None, 1])) if as_list else "".join(json.dumps(r) + "\n" for r in rows)
    name, content = ("f.json" if as_list else "f.jsonl"), text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.5:
        content = spoil_bytes(content, rng)
    if rng.random() < 0.2:
        content = gzip.compress(content)
        name += ".gz"
        if rng.random() < 0.6:
            content = spoil_bytes(content, rng)
    return (rng.choice([name, "f.txt", "f.csv", "f", "f.jsonl.gz"]) if rng.random() < 0.1 else name), content


def test_fuzzed_files_are_read_or_refused(tmp_path, noted):
    """2,500 files, each through every loader: rows, or one line that names the file. Rows that are
    read can be encoded, and no special token comes of a text."""
    rng, refused, read = random.Random(1), 0, 0
    tokenizer = train_bpe(["the cat sat on the mat\n"], 300)
    specials = set(tokenizer.specials.values())
    for _ in range(2500):
        name, content = fuzzed_file(rng)
        path = tmp_path / name
        path.write_bytes(content)
        for load in LOADERS:
            try:
                rows = load([path])
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error), (content, error)
                refused += 1
                continue
            read += 1
            if load is data.load_texts:
                assert not specials & {token for text in rows for token in tokenizer.encode(text)}
            elif load is data.load_preferences and rows:
                with contextlib.suppress(InputError):  # too long, say
                    for pair in data.encode_pairs(rows, tokenizer, 200):
                        assert not specials & set(pair.chosen[:-1])
        path.unlink()
    assert refused > 5000 and read > 500
    noted("fuzz", "data files, each through four loaders", "2,500 files", f"{refused:,} refused, {read:,} read")


@pytest.mark.slow
def test_fuzzed_files_in_processes(files, tmp_path, noted):
    """50 files, each given to a script: it trains, or says why not in one line and leaves no result."""
    rng, ended = random.Random(4), Counter()
    for number in range(50):
        stage = ("sft", "reward", "dpo", "ppo", "pretrain")[number % 5]
        name, content = fuzzed_file(rng)
        (tmp_path / name).write_bytes(content)
        out = tmp_path / f"out{number}"
        few = {"ppo": ["--iterations", 1], "pretrain": ["--steps", 2]}.get(stage, ["--epochs", 1])
        ran = process(command(files, stage, out, "--data", tmp_path / name, "--holdout", 1, *few))
        assert "Traceback" not in ran.stderr and ran.returncode in (0, 2), (content, ran.stderr)
        assert (out / "done").exists() == (ran.returncode == 0) == (out / "config.json").exists()
        assert ran.returncode == 0 or ran.stderr.strip().splitlines()[-1].startswith("error: ")
        ended[ran.returncode] += 1
    noted("fuzz", "data files given to scripts as processes", "50 files", f"{ended[2]} refused, {ended[0]} trained on")


def test_fuzzed_checkpoints_are_read_or_refused(files, tmp_path, noted):
    rng, refused, read = random.Random(2), 0, 0
    whole = {path.name: path.read_bytes() for path in (files / "sft").iterdir()}
    for _ in range(500):
        name = rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
        for other, content in whole.items():
            (tmp_path / other).write_bytes(content)
        if name.endswith(".json") and rng.random() < 0.7:
            content = json.dumps(spoil_value(json.loads(whole[name]), rng)).encode("utf-8", "surrogatepass")
        else:
            content = spoil_bytes(whole[name], rng)
        (tmp_path / name).write_bytes(content)
        try:
            model, tokenizer, _ = load_checkpoint(tmp_path)
            model(torch.tensor([tokenizer.encode("Line 3 tells")]))
            read += 1
        except InputError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), (content[:200], error)
            refused += 1
    assert refused > 200 and read > 20
    noted("fuzz", "checkpoint folders with one spoiled file", "500 folders", f"{refused} refused, {read} read")


def test_fuzzed_states_are_refused(files, tmp_path):
    """A saved state with flipped or missing bytes: one line, or (a flip in a weight) it is read."""
    model, _, _ = load_checkpoint(files / "sft")
    config = sft.Config(out=str(tmp_path), resume=True)
    training.save_state(config, "sft", 3, 0.0, torch.Generator(), {"model": model})
    content, rng, refused = (tmp_path / training.STATE).read_bytes(), random.Random(3), 0
    for _ in range(200):
        (tmp_path / training.STATE).write_bytes(spoil_bytes(content, rng))
        try:
            training.start_run(config, "sft")
        except InputError as error:
            assert training.STATE in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100
