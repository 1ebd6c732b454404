"""How cost grows: seconds and memory per token against parameters, context and batch, training and decoding.

    python benchmarks/growth.py            # up to 3 minutes, nothing else running; prints tables, draws growth.png

Expected is the slope, on the same points, of the work that has to be done. Training: 6 N + 6 L T C floating-point
operations a token (N weights, L layers of width C; a token attends to T/2 others on average), at the rate of a
large matrix product. Decoding: the weights read once a step for the whole batch, and each row's cache. A fitted
slope below the expected one means that something other than this work takes the time at the small end.
"""

import argparse
import math
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import matplotlib
import numpy as np
import torch

import training
from model import GPT, GPTConfig, KVCache
from pretrain import next_token_loss

SIZES = {"0.3 M": (64, 3), "1 M": (128, 4), "3 M": (192, 6), "11 M": (320, 8), "30 M": (512, 9)}  # width, layers
BASE = "3 M"
REPEATS = 3


def build(size, context):
    width, layers = SIZES[size]
    torch.manual_seed(1)
    return GPT(GPTConfig(vocab_size=2048, context_length=context, layers=layers, width=width, heads=width // 32,
                         kv_heads=width // 32, ffn_width=width * 8 // 3 // 32 * 32))


def best(run):
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def train(size=BASE, context=256, batch=8):
    """-> (microseconds per token, operations per token, bytes of activations kept per token)."""
    model, precision = build(size, context), training.autocast(torch.device("cpu"))
    optimiser = training.adamw(model, 1e-3)
    ids = torch.randint(2048, (batch + 1, context + 1))

    def kept(batch):
        """Bytes that the forward pass keeps for the backward pass, each piece of memory once."""
        pieces = {}

        def keep(tensor):
            pieces[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        with precision, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            next_token_loss(model, ids[:batch, :-1], ids[:batch, 1:])
        return sum(pieces.values())
    memory = kept(batch + 1) - kept(batch)  # of one more window: weights and their copies in bfloat16 cancel
    ids = ids[:batch]

    def step():
        with precision:
            loss = next_token_loss(model, ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    tokens = batch * context
    width, layers = SIZES[size]
    work = 6 * sum(p.numel() for p in model.parameters()) + 6 * layers * context * width
    return best(step) / tokens * 1e6, work, memory / context


@torch.inference_mode()
def decode(size=BASE, context=256, batch=1):
    """-> (microseconds per token after `context` others, bytes to be read per token, bytes of cache per token)."""
    model = build(size, context + 16)
    cache = KVCache(model.config, batch, context + 16, "cpu", torch.float32)
    for buffer in (cache.keys, cache.values):
        buffer.normal_()  # memory that was never written is not read either
    ids = torch.randint(2048, (batch, 1))

    def steps():
        cache.length = context - 8
        for _ in range(16):
            model.head(model.hidden(ids, cache=cache)[:, -1]).argmax(-1)
    width, layers = SIZES[size]
    a_token = 2 * 4 * layers * width
    weights = 4 * sum(p.numel() for p in model.parameters())
    return best(steps) / 16 / batch * 1e6, weights / batch + a_token * context, a_token


def slope(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)[0]


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    training.keep_freed_memory()
    parameters = {size: sum(p.numel() for p in build(size, 64).parameters()) for size in SIZES}
    axes = {"parameters": ("size", list(SIZES), [parameters[size] for size in SIZES]),
            "context": ("context", (values := [64, 128, 256, 512, 1024, 2048]), values),
            "batch": ("batch", (values := [1, 2, 4, 8, 16, 32, 64]), values)}
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    print("| | against | slope of time | expected | " + "time per token, µs | memory per token, kB |\n" + "|---" * 6 + "|")
    for panel, (name, (keyword, values, x)) in zip(panels, axes.items()):
        for what, run in (("training", train), ("decoding", decode)):
            rows = []
            for value in values:
                more = {"batch": max(1, 4096 // value)} if (name, what) == ("context", "training") else {}
                rows.append(run(**{keyword: value}, **more))
            micros, work, memory = zip(*rows)
            shown = " ".join(f"{m:,.0f}" for m in micros)
            kept = f"{memory[0] / 1e3:,.1f} … {memory[-1] / 1e3:,.1f}"
            print(f"| {what} | {name}, {values[0]} to {values[-1]} | {slope(x, micros):.2f} | {slope(x, work):.2f} | "
                  f"{shown} | {kept} |", flush=True)
            line, = panel.loglog(x, micros, "o-", label=f"{what}: slope {slope(x, micros):.2f}")
            middle = math.exp(np.mean(np.log(micros)) - np.mean(np.log(work)))
            panel.loglog(x, [middle * w for w in work], ":", color=line.get_color(),
                         label=f"work alone: {slope(x, work):.2f}")
        panel.set_xlabel({"parameters": "parameters", "context": "context, tokens", "batch": "batch, rows"}[name])
        panel.legend(fontsize=8, frameon=False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time per token, µs")
    figure.savefig(HERE / "growth.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
