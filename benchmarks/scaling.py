"""A scaling law for the world's documents: loss against compute, and whether it predicts a larger run.

    python benchmarks/scaling.py        # 8 minutes to an hour; finished runs are kept in scaling.jsonl

Every run sees each token once, in documents from a seed of its own, so nothing is repeated. Five sizes share each
budget C = 6 N D (N weights, D tokens; Kaplan et al. 2020, arXiv 2001.08361, and section 3.2 of Hoffmann et al.
2022, arXiv 2203.15556, "approach 2"): at one budget the loss against log N is a parabola, and its lowest point is
the best that budget buys. L(C) = E + A C^-a goes through those points; its interval is a bootstrap over the
parabolas' residuals. The law is written down before the larger run is looked at.
"""

import argparse
import inspect
import json
import math
import sys
import time
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import training
import world
from data import pack_documents
from model import GPT, GPTConfig
from pretrain import heldout_loss, next_token_loss
from tokenizer import train_bpe

SIZES = [(32, 1), (32, 2), (48, 2), (64, 2), (64, 3), (80, 4), (96, 4)]  # width, layers
BUDGETS = [0.5e12, 1.5e12, 4.5e12]  # FLOPs; each with five of SIZES, starting at the first, second and third
LARGER = 13.5e12
CONTEXT, BATCH, VOCABULARY = 192, 8, 1024
MADE_FROM = ("world.py", "world_facts.txt", "data.py", "model.py", "tokenizer.py", "training.py", "pretrain.py")


def shape(width, layers):
    return GPTConfig(vocab_size=VOCABULARY, context_length=CONTEXT, layers=layers, width=width, heads=width // 16,
                     kv_heads=width // 16, ffn_width=3 * width, qk_norm=True)


def weights(width, layers):
    return sum(p.numel() for p in GPT(shape(width, layers)).parameters())


def fresh_tokens(tokenizer, wanted, seed):
    """`wanted` tokens or a few more, from documents that no other seed has."""
    parts, count, chunk = [], 0, 0
    while count < wanted:
        part, _ = pack_documents(world.documents(10_000, f"scaling {seed} {chunk}"), tokenizer)
        parts, count, chunk = [*parts, part], count + len(part), chunk + 1
    return torch.cat(parts)


def train(width, layers, budget, tokenizer, heldout, seed):
    """One pass over budget / 6N fresh tokens -> held-out loss, nats per token."""
    torch.manual_seed(seed)
    model = GPT(shape(width, layers))
    steps = round(budget / (6 * weights(width, layers)) / (BATCH * CONTEXT))
    tokens = fresh_tokens(tokenizer, steps * BATCH * CONTEXT + 1, seed)
    muon, adam = training.muon_and_adam(model, 0.02, 0.02, 0.004, 0.1)
    precision = training.autocast(torch.device("cpu"))
    for step in tqdm(range(steps), f"{weights(width, layers):,} weights, {budget:.1e} FLOPs", leave=False):
        training.set_share(training.learning_rate(step, steps, 1.0, min(40, steps // 10), round(0.6 * steps)), muon, adam)
        start = step * BATCH * CONTEXT
        inputs, targets = (tokens[start + shift:start + shift + BATCH * CONTEXT].view(BATCH, CONTEXT).long()
                           for shift in (0, 1))
        with precision:
            loss = next_token_loss(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with precision:
            muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
    model.eval()
    return heldout_loss(model, *heldout)[0]


def valley(sizes, losses):
    """(log N, loss) at the lowest point of a parabola through loss against log N; its residuals."""
    x = np.log(sizes)
    a, b, c = np.polyfit(x, losses, 2)
    lowest = np.clip(-b / (2 * a), x.min(), x.max()) if a > 0 else x[np.argmin(losses)]
    return lowest, np.polyval((a, b, c), lowest), losses - np.polyval((a, b, c), x)


def law(budgets, losses):
    """E, A, a of L = E + A C^-a, least squares over a grid of E (C in units of 1e12 FLOPs)."""
    best = None
    for e in np.linspace(0, 0.999 * min(losses), 400):
        slope, start = np.polyfit(np.log(np.array(budgets) / 1e12), np.log(np.array(losses) - e), 1)
        error = ((e + np.exp(start + slope * np.log(np.array(budgets) / 1e12)) - losses) ** 2).sum()
        if best is None or error < best[0]:
            best = error, e, math.exp(start), -slope
    return best[1:]


def foretell(found, rng=None):
    """-> (law, best log N at each budget, loss at LARGER, weights at LARGER). With rng: for resampled residuals."""
    lows = []
    for budget in BUDGETS:
        sizes, losses = (np.array(column) for column in zip(*found[budget]))
        place, lowest, residuals = valley(sizes, losses)
        if rng is not None:  # 5 points, 3 of them spent on the parabola: the residuals are too small by √(2/5)
            place, lowest, _ = valley(sizes, losses + rng.choice(residuals, len(residuals)) * math.sqrt(5 / 2))
        lows.append((place, lowest))
    places, losses = zip(*lows)
    e, a, exponent = law(BUDGETS, losses)
    line = np.polyfit(np.log(BUDGETS), places, 1)
    return (e, a, exponent), lows, e + a * (LARGER / 1e12) ** -exponent, math.exp(np.polyval(line, math.log(LARGER)))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    training.keep_freed_memory()
    path = HERE / "scaling.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    code = b"".join((HERE.parent / name).read_bytes() for name in MADE_FROM)
    code += repr([CONTEXT, BATCH, VOCABULARY, *map(inspect.getsource, (shape, fresh_tokens, train))]).encode()
    made_from = f"{zlib.crc32(code):08x}"  # runs of other code or texts are not to be compared with
    rows = list(map(json.loads, lines))  # those of other code too: it may come back
    done = {tuple(row["run"]): row for row in rows if row.get("made_from") == made_from}
    print(f"kept: {len(done)} finished runs")
    tokenizer = train_bpe(world.documents(5000, "scaling tokenizer"), VOCABULARY)
    heldout = pack_documents(world.documents(400, "scaling heldout"), tokenizer)

    def loss_of(width, layers, budget, seed):
        key = (width, layers, budget)
        if key not in done:
            start = time.perf_counter()
            loss = train(width, layers, budget, tokenizer, heldout, seed)
            done[key] = {"run": key, "loss": loss, "seconds": round(time.perf_counter() - start), "made_from": made_from}
            rows.append(done[key])
            training.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return done[key]["loss"]

    found, seed = {}, 0
    for first, budget in enumerate(BUDGETS):
        found[budget] = []
        for width, layers in SIZES[first:first + 5]:
            seed += 1
            found[budget].append((weights(width, layers), loss_of(width, layers, budget, seed)))
        print(f"{budget:.1e} FLOPs: " + ", ".join(f"{n:,} weights {loss:.3f}" for n, loss in found[budget]), flush=True)

    (e, a, exponent), lows, foretold, size = foretell(found)
    rng = np.random.default_rng(0)
    drawn = [foretell(found, rng) for _ in range(1000)]
    interval = np.percentile([loss for _, _, loss, _ in drawn], [2.5, 97.5])
    exponents = np.percentile([law_[2] for law_, *_ in drawn], [2.5, 97.5])
    print(f"L = {e:.3f} + {a:.3f} (C / 1e12)^-{exponent:.3f} ({exponents[0]:.3f} to {exponents[1]:.3f}); best sizes "
          + ", ".join(f"{math.exp(place):,.0f}" for place, _ in lows))
    print(f"foretold at {LARGER:.1e} FLOPs: {foretold:.3f} ({interval[0]:.3f} to {interval[1]:.3f}) with {size:,.0f} weights")
    larger = min(((96, 4), (96, 5), (112, 5), (128, 5), (128, 6), (160, 6), (192, 6)),
                 key=lambda s: abs(math.log(weights(*s) / size)))
    measured = loss_of(*larger, LARGER, 99)
    print(f"measured with {weights(*larger):,}: {measured:.3f}; {sum(row['seconds'] for row in done.values()) / 60:.0f} minutes in all")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for budget, (place, lowest) in zip(BUDGETS, lows):
        sizes, losses = zip(*found[budget])
        line, = left.semilogx(sizes, losses, "o", label=f"{budget:.1e} FLOPs")
        x = np.linspace(np.log(sizes[0]), np.log(sizes[-1]), 50)
        left.plot(np.exp(x), np.polyval(np.polyfit(np.log(sizes), losses, 2), x), color=line.get_color(), lw=1)
        left.plot(math.exp(place), lowest, "*", ms=11, color=line.get_color())
    x = np.geomspace(BUDGETS[0], LARGER, 50)
    right.loglog(x, e + a * (x / 1e12) ** -exponent, label=f"{e:.2f} + {a:.2f} (C/1e12)$^{{-{exponent:.2f}}}$")
    right.loglog(BUDGETS, [lowest for _, lowest in lows], "*", ms=11, color="C0")
    right.errorbar([LARGER], [foretold], [[foretold - interval[0]], [interval[1] - foretold]], fmt="s", color="C0",
                   capsize=4, label="foretold")
    right.loglog([LARGER], [measured], "X", ms=9, color="C3", label="measured")
    left.set(xlabel="weights", ylabel="held-out loss, nats per token")
    left.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    left.set_xticks([5e4, 1e5, 2e5, 4e5], ["50 k", "100 k", "200 k", "400 k"])
    right.set(xlabel="compute, FLOPs", ylabel="held-out loss, nats per token")
    for panel in (left, right):
        panel.legend(fontsize=8, frameon=False)
        panel.grid(alpha=0.3)
    figure.savefig(HERE / "scaling.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
