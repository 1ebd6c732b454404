"""What every training loop needs exactly once: flags, devices, optimiser, schedule, checkpoints, logs.

There is no trainer class. Each stage writes out its own loop; this file holds the parts where two
diverging copies would be a silent bug. By theme:

    flag, parse_args, check_range, check_of_world, run   command line from a dataclass, errors as one clear line
    keep_freed_memory              saves a tenth of the time on a CPU
    pick_device, autocast, compiled, seed_everything; for torchrun: join_processes, first_alone, agree, part_processes
    adamw, Muon, muon_and_adam     optimisers; learning_rate: warm-up, flat, linear decay
    micro_batches                  a batch in parts that fit into memory
    save_checkpoint, load_checkpoint, load_policy, load_reward   a Hugging Face folder (weights never unpickled)
    saved_state, start_run, save_state, restore   one file with everything a stopped run needs to continue
    StopRequest, leave             what Ctrl-C does; check_finite: what a loss that is no number does
    log, finish                    metrics.jsonl, and the `done` stamp with the final numbers
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model import GPT, ScalarModel, config_from_hf, from_hf, hf_config, to_hf
from tokenizer import ENDOFTEXT, IM_END, IM_START, Tokenizer

OUT_OF_MEMORY = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: where, what was found, what to do."""


def run(main):
    """Call `main()`; bad input becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    keep_freed_memory()
    # A character that the terminal cannot show, or a byte that is not UTF-8, is no reason to stop.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()  # here, where a reader that has gone is no error
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:  # PyTorch has a class of its own for some devices only
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        print("error: out of memory; try --micro-batch, --recompute, or a smaller --batch-size, --context-length, "
              "--replay, --episodes, --eval-prompts, --max-new-tokens or --best-of, whichever the script has "
              f"({' '.join(str(error).split())[:150]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:  # `python chat.py … > file`; EPIPE, of `| head`, is no error: the reader has gone
            print("error: " + ": ".join(str(part) for part in (error.filename, error.strerror) if part), file=sys.stderr)
            sys.exit(2)


def keep_freed_memory():
    """Ask malloc to keep freed memory. The logits of a step take megabytes; if they were returned to the
    system and allocated again at every step, the kernel would clear their pages each time, a tenth of the
    time of pre-training on a CPU. Only Linux's glibc can be asked; elsewhere nothing happens."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks up to 32 MB, its maximum, come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which never shrinks
        mallopt(-2, 2**28)  # M_TOP_PAD: and grows by 256 MB at a time (unused pages cost nothing)


# ---- command line: every field of a stage's Config dataclass is a flag ---------------------------

def flag(default, help, **options):
    """A dataclass field that is also a command-line flag. `options` go to argparse as they are."""
    metadata = {"default": default, "help": help, **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_args(Config, argv=None, description=None, prog=None):
    """Build the parser from the fields of `Config`, parse, return a Config.

    `data_file: str` becomes `--data-file`. Bool fields are switches, list[...] fields take several values, `X | None`
    fields an X. A field with `positional=True` has no dashes, and is required if it has no default. InputError if
    --out is a folder that the run reads, which it would replace."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)  # a script that says --temp would break with the next flag of that beginning
    for field in dataclasses.fields(Config):
        options = dict(field.metadata)
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        name = field.name if options.pop("positional", False) else "--" + field.name.replace("_", "-")
        default = options.get("default")
        if "default" in options:
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            if kind == "bool":
                shown = "on" if default else "off" if "action" in options else ""
            elif shown is None:
                shown = "" if "(default" in options["help"] else "none"
            if shown != "":
                options["help"] += f" (default: {shown})"
        options["help"] = options["help"].replace("%", "%%")
        if kind == "bool":
            options.setdefault("action", argparse.BooleanOptionalAction if default else "store_true")
        elif kind.startswith("list"):
            options.setdefault("nargs", "+")
        else:
            base = kind.split("|")[0].strip()
            options["type"] = {"int": int, "float": float}.get(base, str)
        parser.add_argument(name, **options).help = options["help"]  # Python 3.10 appends a default of its own
    config = Config(**vars(parser.parse_args(argv)))
    config.begun = time.time()  # for save_state
    for name in ("init", "reward", "runs"):
        source, out = getattr(config, name, None), getattr(config, "out", None)
        if not source or not out or getattr(config, "show_batch", False):
            continue
        source, replaced = Path(os.path.realpath(source)), Path(os.path.realpath(out))
        if source == replaced or source.parent == replaced and source.name.startswith("step_"):  # of --keep-every
            raise InputError(f"--out {out}: what --{name} reads would be replaced; give another folder")
    return config


# Allowed values of flags, in whichever stage they occur: counts from 1, rates from 0.
RANGES = {
    **dict.fromkeys(("steps", "epochs", "batch_size", "context_length", "documents", "conversations",
                     "prompts", "eval_prompts", "iterations", "episodes", "max_new_tokens", "layers",
                     "save_every", "keep_every", "eval_every", "samples_every", "micro_batch"), (1, 10**9)),
    **dict.fromkeys(("lr", "embed_lr", "head_lr", "critic_lr", "sharpness_lr", "decay", "gamma", "lam"), (0, 1)),
    **dict.fromkeys(("warmup", "replay", "weight_decay", "beta", "ratio_clip", "value_clip",
                     "stop_kl", "max_kl"), (0, 10**9)),
    "lora": (1, 10**4), "holdout": (1e-9, 10**9), "clip": (1e-9, 10**9), "adam_eps": (1e-20, 1),
    "pairs": (2, 10**9), "seed": (0, 2**32 - 1)}


def check_range(config, **bounds):
    """InputError for a flag outside its [low, high]. Checks the flags of RANGES that `config` has, and those in
    `bounds`, such as `beta=(0, 9)`."""
    for name, (low, high) in (RANGES | bounds).items():
        value = getattr(config, name, None)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected a value from {low} to {high}")


def check_of_world(config, *names):
    """InputError for one of these flags of the embedded world where --data is something else."""
    for name in names:
        if config.data != ["world"] and getattr(config, name) != getattr(type(config), name):
            raise InputError(f"--{name.replace('_', '-')}: found --data {' '.join(config.data)}, expected --data world, "
                             "to which alone it applies")


# ---- devices and randomness ----------------------------------------------------------------------

def pick_device(name):
    """'auto' takes CUDA, else the CPU: Apple's MPS, untested, must be asked for. Returns a torch.device."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available.get(name, False):
        raise InputError(f"--device {name}: not available here; "
                         f"use one of {', '.join(d for d in available if available[d])}")
    return torch.device(name)


def processes_asked():
    """How many processes torchrun started: 1 without it. (Some clusters set its variables for a single process.)"""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def join_processes(device):
    """Form one group of the processes that `torchrun --nproc_per_node N` started (gloo on CPUs; nccl on GPUs,
    one GPU each). Returns (rank, number of processes); (0, 1) without torchrun."""
    if processes_asked() == 1:
        return 0, 1
    if device.type == "cuda":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(f"found {torch.cuda.device_count()} GPUs, expected one for each process; start fewer, or "
                             "give --device cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                         timeout=timedelta(days=1))  # `first_alone` may make them wait long
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def part_processes(rank, processes):
    """End all processes of the group but the first."""
    if processes > 1:  # before any of them exits, or its open connections may crash it at exit
        torch.distributed.destroy_process_group()
    if rank > 0:
        os._exit(0)  # at once: a thread of the group that enters a closing interpreter would abort the process


@contextlib.contextmanager
def first_alone(rank, processes):
    """The first process goes through this block before the others do: it writes what they read."""
    if rank > 0:
        torch.distributed.barrier()
    yield
    if rank == 0 and processes > 1:
        torch.distributed.barrier()


def agree(loss, stop, processes):
    """(mean loss of all processes, whether any of them was asked to stop): if only one left the loop,
    the others would wait for it forever."""
    if processes == 1:
        return loss, bool(stop)
    both = torch.stack([loss.float(), torch.tensor(float(bool(stop)), device=loss.device)])
    torch.distributed.all_reduce(both)
    return both[0] / processes, bool(both[1] > 0)


def autocast(device, dtype="auto"):
    """A context for forward passes. 'auto' means bfloat16 where this device multiplies matrices
    at least 1.3 times as fast in it as in float32: true of most GPUs and of CPUs with bf16 units,
    not of others, so it is measured (some milliseconds) rather than guessed."""
    if dtype == "float32" or dtype == "auto" and not bfloat16_is_fast(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def bfloat16_is_fast(device):
    """Times both precisions in turn and compares the best of ten runs each, so that other load on the machine
    does not decide: the same command must choose the same precision each time."""
    side = 1024 if device.type == "cuda" else 384
    matrices = [torch.ones(side, side, device=device, dtype=kind) for kind in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for turn in range(10):
        for i, x in enumerate(matrices):
            start = time.perf_counter()
            (x @ x)[0, 0].item()
            best[i] = min(best[i], time.perf_counter() - start)
        if turn > 0 and best[1] > 10 * best[0]:  # bfloat16 is emulated, and eight more turns would tell nothing new
            break
    fast = torch.tensor(float(best[0] > 1.3 * best[1]), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # all processes do as the first, or their weights would diverge
        torch.distributed.broadcast(fast, 0)
    return bool(fast)


def compiled(function, wanted, device):
    """`torch.compile(function)` if it is wanted and works here (a CPU needs a C++ compiler); else the
    function itself, with a message if it was wanted. Compiling makes the first steps slow: up to a minute."""
    if not wanted:
        return function
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # whatever its backend raises
        print(f"--compile: torch.compile does not work here ({type(error).__name__}); going on without it")
        return function
    return torch.compile(function)


def seed_everything(seed):
    """Seed torch, which draws initial weights, and Python's and numpy's generators for reward functions that users
    write; return a CPU generator for what else the stage draws, such as windows of text."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


# ---- optimiser and schedule ----------------------------------------------------------------------

# torch's optimisers import its compiler at their first use, only to exclude themselves from it: 2 to 7
# seconds of every stage, and nothing here compiles an optimiser. The unwrapped functions do without.
for _name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    setattr(torch.optim.Optimizer, _name, inspect.unwrap(getattr(torch.optim.Optimizer, _name)))
for _optimiser in (torch.optim.Adam, torch.optim.AdamW):
    if "step" in vars(_optimiser):  # AdamW has had Adam's since torch 2.7
        _optimiser.step = torch.no_grad()(inspect.unwrap(_optimiser.step))


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only: decaying a norm's gain towards
    zero would shrink the signal it is there to keep."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "peak": lr, "weight_decay": weight_decay},
              {"params": others, "peak": lr, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


class Muon(torch.optim.Optimizer):
    """SGD with momentum, every update orthogonalised (Jordan et al. 2024, "Muon").

    The momentum of a matrix is dominated by a few directions. Newton-Schulz iterations, which need only
    matrix products, raise all its singular values towards 1, so that rare directions are not left behind. So Muon
    reaches the same loss in five sixths of AdamW's time.

    A matrix is split into square blocks, so that the stacked q, k and v (gate and up) stay separate where their sizes
    are multiples of the side. `with precision: muon.step()` iterates in bfloat16 where that is fast: exact enough for
    values near 1. (torch.optim.Muon always does; CPUs without bf16 units emulate that at a hundredth of the speed.)
    Left out: scaling the step by the matrix's shape, which square blocks do not need.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            updates = []
            for p in params:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov
            for p, update in zip(params, orthogonal_blocks(updates)):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])


def orthogonal_blocks(matrices, iterations=3):
    """[(R, C)] -> [(R, C)] in which the singular values of each square block of side min(R, C) are raised towards
    1, at most 41-fold by three iterations: a fiftieth of the block's (Frobenius) norm becomes 0.75, a five-hundredth 0.08.
    Blocks of the same side are iterated together, which keeps all cores busy even with small matrices. Five iterations
    bring the values closer to 1 but train no better."""
    tall = [m if m.size(0) >= m.size(1) else m.mT for m in matrices]
    found = [None] * len(matrices)
    for side in {m.size(1) for m in tall}:
        alike = [i for i, m in enumerate(tall) if m.size(1) == side]
        filled = [F.pad(tall[i], (0, 0, 0, -len(tall[i]) % side)) for i in alike]  # rows of zeros stay zero
        blocks = [m.reshape(-1, side, side) for m in filled]
        x = torch.cat(blocks)  # (N, side, side)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(iterations):
            a = torch.bmm(x, x.mT)
            b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, b, x, beta=3.4445)  # a value s becomes 3.4445 s − 4.7750 s³ + 2.0315 s⁵
        for i, part in zip(alike, x.float().split([len(b) for b in blocks])):
            made = part.flatten(0, 1)[:len(tall[i])]
            found[i] = made if matrices[i].size(0) >= matrices[i].size(1) else made.mT
    return found


def muon_and_adam(model, lr, embed_lr, head_lr, weight_decay, eps=1e-8):
    """Muon for the matrices in the blocks, AdamW for embeddings, head and gains, each with the peak
    learning rate that suits it: the embedding of a token is rarely used, so it may move fast. Gradients
    well below `eps` hardly move anything.

    β₂ is 0.99, not the usual 0.95, because batches are small. At 0.95 Adam has forgotten after twenty steps how large
    the gradient of a rare word was; then the tiny ones of steps without the word, divided by their own size, push its
    row down, even if its gradients add up to zero. (In runs of 2,400 steps held-out text went from 0.307
    to 0.291 bits per byte.)
    """
    inside = [p for p in model.blocks.parameters() if p.ndim == 2]
    head = [] if model.lm_head is None else [model.lm_head.weight]
    kept = {id(p) for p in inside + head}
    rest = [p for p in model.parameters() if id(p) not in kept]
    muon = Muon([{"params": inside, "peak": lr}], lr, weight_decay=weight_decay)
    adam = torch.optim.AdamW(
        [{"params": ps, "peak": peak} for ps, peak in ((rest, embed_lr), (head, head_lr)) if ps],
        betas=(0.9, 0.99), weight_decay=0.0, eps=eps, fused=True)
    return muon, adam


def set_share(share, *optimisers):
    """Set every parameter group to this share of its own peak learning rate."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = share * group["peak"]


def learning_rate(step, steps, peak, warmup=0, decay=None):
    """Warm-up, flat, linear decay: the rate for `step` (from 0) of `steps`.

    The warm-up takes at most half of the steps: a run on little data has few. The rate falls over the last `decay` steps
    (None: all after the warm-up); the step after the last would have 0."""
    warmup = min(warmup, steps // 2)
    decay = steps - warmup if decay is None else decay
    rising = (step + 1) / warmup if warmup else 1.0
    falling = (steps - step) / decay if decay else 1.0
    return peak * max(0.0, min(1.0, rising, falling))


LOGITS = 2**26  # the most logits that pre-training's held-out loss and a rollout compute at a time: 256 MB in float32


def rows_to_read(config):
    """How many rows (in DPO, pairs) a stage reads at a time where nothing is trained. That takes about as much memory
    as a training step: more rows, but nothing is kept for a backward pass."""
    return config.micro_batch or min(64, 2 * config.batch_size)


def micro_batches(batch, size):
    """[(part, its share of the batch)], `size` rows a part (None: all in one). The gradients of
    share × mean loss add up to that of the whole batch (gradient accumulation)."""
    size = size or len(batch)
    parts = [batch[start:start + size] for start in range(0, len(batch), size)]
    return [(part, len(part) / len(batch)) for part in parts]


# ---- checkpoints: a Hugging Face folder ----------------------------------------------------------

@contextlib.contextmanager
def writing(what):
    """A context in which a failure to write `what`, such as a full disk, becomes one InputError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # the last two: how safetensors and torch.save report it
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise InputError(f"{what}: could not be written ({reason})") from error


def make_folder(path):
    """Make the folder and see that files can be written there: now, not after the work whose result they will hold."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def check_jsonl(name, path):
    """InputError for a file of rows to write (--`name`) that data.py would not read as rows."""
    if not str(path).endswith(".jsonl"):
        raise InputError(f"--{name} {path}: expected a file whose name ends in .jsonl")


def sync(path):
    """Wait until the file is on the disk: otherwise a rename may get there before the contents do."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_atomic(path, write):
    """Call `write(temporary_path)`, then rename that to `path`: a reader sees the old file or the new one,
    never half of one. A failed write (a full disk, say) leaves the old file as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # where not even the folder could be made
            temporary.unlink()


def write_text(path, text):
    """`write_atomic` for a text."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


CODE = Path(__file__).resolve().parent / "tools" / "reward_with_reader.py"  # for transformers, which has no such model


def save_checkpoint(folder, model, tokenizer, **extra):
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files.

    `extra` goes into config.json (the reward model's shift and scale, the stage's name). All files or none: they are
    written to a subfolder and moved when all are complete. A reader needs config.json, which is deleted first and moved
    last, so it never mixes two checkpoints."""
    folder = Path(folder)
    tensors = to_hf(model)
    scalar = {"num_labels": 1} if isinstance(model, ScalarModel) else {}
    told = scalar and model.reader is not None
    if told:
        scalar |= {"model_type": CODE.stem, "reader": hf_config(model.reader.config), "auto_map": {
            "AutoConfig": f"{CODE.stem}.RewardConfig", "AutoModelForSequenceClassification": f"{CODE.stem}.RewardWithReader"}}
    # transformers reads a reward at the last token that is not padding. Where <|im_end|> is also the padding token, that
    # is one token too early: name none, and it refuses batches rather than misread them.
    pad_id = None if scalar and tokenizer.pad_id == tokenizer.im_end_id else tokenizer.pad_id
    config = hf_config(model.config, bos_token_id=None, eos_token_id=tokenizer.im_end_id,
                       pad_token_id=pad_id, **scalar, **extra)
    ends = {"eos_token_id": list(tokenizer.end_ids), "pad_token_id": tokenizer.pad_id}
    part = folder / ".part"
    try:
        with writing(folder):
            shutil.rmtree(part, ignore_errors=True)  # what a kill left there
            part.mkdir(parents=True)
            tokenizer.save(part)
            if told:
                shutil.copyfile(CODE, part / CODE.name)
            save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
            for name, value in (("generation_config.json", ends), ("config.json", config)):
                (part / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            shutil.copymode(part / "config.json", part / "model.safetensors")  # else only its owner could read it
            made = sorted(part.iterdir(), key=lambda path: path.name == "config.json")
            for path in made:
                sync(path)
            # Besides config.json: files of someone else's model, if one was here, that readers prefer to ours.
            for old in ("config.json", "model.safetensors.index.json", "chat_template.jinja", CODE.name):
                (folder / old).unlink(missing_ok=True)
            for path in made:
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_checkpoint(folder, device="cpu"):
    """Read a folder written by `save_checkpoint`, or a Hugging Face folder of a Llama or Qwen3 model with a byte-level
    BPE tokenizer and unscaled RoPE.

    Returns (model, tokenizer, config dict); the model is a GPT, or a ScalarModel where the folder
    holds a reward model. Strict: a missing, surplus or misshapen tensor is an InputError."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        reader = info.get("reader") and config_from_hf(info["reader"])
        config = config_from_hf(info | {"model_type": info["reader"]["model_type"]} if reader else info)
        tokenizer = Tokenizer.load(folder)  # before the weights: if this one cannot be read, why wait for them
        files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
        if index.exists() and not (folder / files[0]).exists():  # in parts
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        tensors = {}
        for name in files:
            tensors |= load_file(folder / Path(name).name)
        scalar = any("SequenceClassification" in name for name in info.get("architectures") or [])
        model = ScalarModel(GPT(config), reader and GPT(reader)) if scalar else GPT(config)
        model.load_state_dict(from_hf(tensors, config, reader))
    except OSError as error:  # safetensors names no file, but says what is missing
        raise InputError(f"{error.filename or error}: missing, or not readable; is {folder} a finished "
                         "checkpoint?") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if re.search(OUT_OF_MEMORY, str(error)):  # for `run`
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: not a checkpoint that can be read here ({reason})") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, "
                         f"its model {config.vocab_size}")
    return model.to(device).eval(), tokenizer, info


def load_policy(folder, device="cpu", chats=True):
    """`load_checkpoint` for a stage that needs a language model, not a reward model; with `chats`, one
    whose tokenizer has the tokens of the chat template."""
    model, tokenizer, _ = load_checkpoint(folder, device)
    if isinstance(model, ScalarModel):
        raise InputError(f"{folder}: a reward model; expected a language model (base, sft, …)")
    missing = {ENDOFTEXT, IM_START, IM_END, tokenizer.pad_token} - set(tokenizer.specials)
    if chats and missing:
        raise InputError(f"{folder}: its tokenizer has no {', '.join(sorted(missing))}; expected the tokens of ChatML")
    return model, tokenizer


def load_reward(folder, device="cpu"):
    """`load_checkpoint` for a reward model: (model, tokenizer, shift, scale). `model(ids) - shift`, read at the last real
    token, is a score in standard deviations; a difference of two scores times `scale` is in log-odds (Bradley-Terry)."""
    model, tokenizer, info = load_checkpoint(folder, device)
    if not isinstance(model, ScalarModel):
        raise InputError(f"{folder}: a language model; expected a reward model (see reward.py)")
    return model, tokenizer, info.get("reward_shift", 0.0), info.get("reward_scale", 1.0)


# ---- stop and resume -----------------------------------------------------------------------------

STATE = "training_state.pt"
INPUTS = ("init", "reward", "data", "replay_data")  # settings that name what a run reads


def settings_of(config):
    """The settings that must be equal for a resumed run to be the same, but for rounding. (--dtype auto is decided anew.)"""
    free = ("out", "resume", "device", "show_batch", "save_every", "keep_every", "eval_every", "micro_batch", "recompute",
            "compile", "samples_every")
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in free}


def one_spelling(settings):
    """out/sft/ is out/sft. (Not os.path.normpath: link/../sft may be another folder than sft.)"""
    def spelled(given):
        return list(map(spelled, given)) if isinstance(given, list) else given and str(Path(given))
    return settings | {name: spelled(settings[name]) for name in INPUTS if name in settings}


def read_by(config):
    """The files that a run reads: data, the weights of a checkpoint, the sources of the world, and the Python
    file of `score.py:function`."""
    here = Path(__file__).parent
    for name in INPUTS:
        given = getattr(config, name, None) or []
        for word in (given if isinstance(given, list) else [given]):
            if word == "world":
                yield from (here / "world.py", here / "world_facts.txt")
            path = Path(re.sub(r"\.py:\w+$", ".py", word))
            # os.path's answer False where Path's raise, for a name that is too long, say: whoever reads it says so better.
            yield from filter(os.path.isfile, path.glob("*.safetensors") if os.path.isdir(path) else [path])


def has_save(config):
    """Will this run continue from a save? (Not Path.exists, which would raise where a folder may not be entered.)"""
    return config.resume and os.path.exists(Path(config.out) / STATE)


def saved_state(config, stage):
    """What a run with --resume continues from; None without that, or without a save. InputError if the save is of another
    run; call this first of all, too, so that no work is done in vain. Changes no file, but notes the sizes of those
    that the run reads, for `save_state`. InputError, too, for several processes in any stage but pre-training."""
    if not hasattr(config, "sizes"):
        config.sizes = {str(path): path.stat().st_size for path in read_by(config)}
    if stage != "pretrain" and processes_asked() > 1:
        raise InputError(f"{stage}: found {processes_asked()} processes, expected one; only pretrain.py shares "
                         "its work under torchrun")
    if config.show_batch or not has_save(config):
        return None
    state = Path(config.out) / STATE
    try:
        saved = torch.load(state, weights_only=True, map_location="cpu")  # never runs code
        settings = one_spelling(saved["settings"])
    except Exception as error:  # whatever torch.load raises on a damaged file
        reason = " ".join(str(error).split())[:200].split(". ")[0]  # not the advice to run the code in it
        raise InputError(f"{state}: cannot be read ({reason}); start without --resume") from error
    if saved["stage"] != stage:
        raise InputError(f"{state}: of stage {saved['stage']}, not {stage}; give another --out, or start without --resume")
    mine = one_spelling(settings_of(config))
    for name in sorted(set(mine) | set(settings)):
        old, new = settings.get(name), mine.get(name)
        if old != new:
            raise InputError(f"--resume: {state} was made with --{name.replace('_', '-')} {old},"
                             f" not {new}; give the same settings, or start without --resume")
    for path in read_by(config):  # what was moved here may be older than the state, but hardly of the same size
        now, size = path.stat(), saved.get("sizes", {}).get(str(path))
        if now.st_mtime > state.stat().st_mtime or size not in (None, now.st_size):
            raise InputError(f"--resume: {path} has changed since the run that saved {state} began; start without "
                             "--resume, or delete the state")
    return saved


def start_run(config, stage, first=True):
    """Prepare the output folder. Returns the saved state to continue from, or None for a fresh start.
    Of several processes only the `first` changes files.

    Without --resume, or with no state to resume from, old results are deleted, so that two runs are not
    mixed; an old checkpoint stays until the new one is complete."""
    saved, folder = saved_state(config, stage), Path(config.out)
    if not first:
        return saved
    if saved:
        cut_metrics(folder, saved["position"])
        return saved
    make_folder(folder)
    with writing(folder):
        for name in ("done", "metrics.jsonl", STATE):
            (folder / name).unlink(missing_ok=True)
        for kept in folder.glob("step_*/config.json"):
            shutil.rmtree(kept.parent)
    return None


def save_state(config, stage, position, seconds, generator, modules, **extra):
    """Save everything a stopped run needs, in one file. `position` is the number of finished steps;
    `modules` maps names to objects with a state_dict (models and optimisers)."""
    state = {"stage": stage, "settings": settings_of(config), "position": position,
             "seconds": seconds, "generator": generator.get_state(),
             "sizes": getattr(config, "sizes", {}),
             "torch_rng": torch.get_rng_state(), "python_rng": random.getstate(),
             "numpy_rng": [x.tolist() if hasattr(x, "tolist") else x for x in np.random.get_state()],
             "modules": {name: module.state_dict() for name, module in modules.items()}, **extra}
    begun = getattr(config, "begun", time.time())

    def write(path):  # as old as the run: of a file that was changed since that began, nobody knows what was read
        torch.save(state, path)
        os.utime(path, (begun, begun))
    write_atomic(Path(config.out) / STATE, write)


def restore(saved, generator, modules):
    """Restore a state from `start_run`; returns (position, seconds spent so far)."""
    for name, module in modules.items():
        module.load_state_dict(saved["modules"].pop(name))  # nothing else needs it, so it is not kept in memory
    try:
        generator.set_state(saved["generator"])
    except RuntimeError as error:  # PPO and GRPO draw on the device
        raise InputError("--resume: the save is of another kind of --device, whose random numbers differ; give "
                         "that device, or start without --resume") from error
    torch.set_rng_state(saved["torch_rng"])
    random.setstate(saved["python_rng"])  # what a reward function of one's own may draw from
    np.random.set_state(saved["numpy_rng"])
    return saved["position"], saved["seconds"]


class StopRequest:
    """True after Ctrl-C (or SIGTERM), so that a loop can finish its step, save and say how to continue. A
    second one stops at once, but within a second it is ignored: whoever signals all processes of a machine
    signals torchrun too, and that passes it on."""

    def __init__(self):
        self.asked = None  # when
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.asked and time.monotonic() > self.asked + 1:
            raise KeyboardInterrupt
        if not self.asked and os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b"\nfinishing this step, then saving (after the last step: finishing the measurement); Ctrl-C "
                         b"again stops at once, without saving\n")
        self.asked = self.asked or time.monotonic()

    def __bool__(self):
        return self.asked is not None


def leave(config, bar):
    """After a requested stop: close the progress bar, say what was saved and how to go on, exit status 130."""
    bar.close()
    shared = "LOCAL_WORLD_SIZE" in os.environ and "RANK" in os.environ
    start = ["torchrun", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]] if shared else [sys.executable]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join  # cmd.exe knows no single quotes
    command = join([*start, *sys.argv] + ([] if "--resume" in sys.argv else ["--resume"]))
    if not shared or os.environ["RANK"] == "0":  # once, not by every process
        print(f"\nstopped and saved in {config.out}; go on with:  {command}", file=sys.stderr)
    sys.exit(130)


# ---- what a run reports --------------------------------------------------------------------------

def progress(total, start, what, hidden=False):
    """The one progress bar: loss and rate go in with `set_postfix_str`."""
    return tqdm(total=total, initial=start, desc=what, unit="step", dynamic_ncols=True,
                mininterval=0.5, disable=hidden,
                file=sys.stderr, miniters=1 if sys.stderr.isatty() else max(1, total // 20))


def log(folder, step, **metrics):
    """Append one JSON line to metrics.jsonl. Tensors become numbers."""
    row = {"step": step}
    for name, value in metrics.items():
        value = value.item() if hasattr(value, "item") else value
        row[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    path = Path(folder) / "metrics.jsonl"
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(folder):
    """Rows of metrics.jsonl, [] where there is none; without lines that a kill cut off, or a power failure left
    as zeros."""
    path, rows = Path(folder) / "metrics.jsonl", []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                if row["step"] >= 0:
                    rows.append(row)
    return rows


def cut_metrics(folder, position):
    """On resume, drop the metrics of steps after the last save: those steps are run again."""
    kept = [row for row in read_metrics(folder) if row["step"] <= position]
    write_text(Path(folder) / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def finish(folder, stage, seconds, **summary):
    """Last act of a stage, after its model is saved: write the `done` stamp (make's target, and the stage's
    final numbers as JSON), remove the resume state."""
    folder = Path(folder)
    done = {"stage": stage, "seconds": round(seconds, 1), **summary}
    write_text(folder / "done", json.dumps(done) + "\n")
    (folder / STATE).unlink(missing_ok=True)  # last: if killed before this, the run still counts as finished


def check_finite(step, config, **numbers):
    """A loss or gradient that is not finite would ruin every weight: stop before the update."""
    for name, value in numbers.items():
        if not torch.isfinite(value):
            state = Path(config.out) / STATE
            raise InputError(f"after {step} steps: the {name.replace('_', ' ')} is {value.item()}; stopped before the "
                             "update. Try a lower learning rate, from the start. "
                             + (f"Last save: {state}" if state.exists() else "Nothing was saved yet"))
