"""AdamW against Muon, both tuned the same way: held-out loss after equally many steps, and what a step costs.

    python benchmarks/optimisers.py      # 4 to 10 minutes on two cores

The model and the schedule of `python pretrain.py --data world`, 600 of its 3,200 steps, 10,000 documents. They differ in
what updates the matrices inside the blocks; embeddings, head and gains have AdamW in both. All learning rates are a
usual value times the same grid of factors; weight decay (of the matrices) 0.1, the same seed and batches.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import data
import training
import world
from model import GPT, GPTConfig
from pretrain import heldout_loss, next_token_loss
from tokenizer import train_bpe

STEPS, BATCH, CONTEXT = 600, 8, 192
FACTORS = (0.25, 0.5, 1, 2, 4)


def optimisers(name, model, factor):
    muon, adam = training.muon_and_adam(model, 0.02 * factor, 0.01 * factor, 0.004 * factor, 0.1)
    if name == "Muon":
        return muon, adam
    inside = [p for group in muon.param_groups for p in group["params"]]
    return torch.optim.AdamW([{"params": inside, "peak": 3e-3 * factor}], betas=(0.9, 0.99), weight_decay=0.1, fused=True), adam


def train(name, factor, steps, tokens, vocabulary):
    """-> (model, median seconds of a step)."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    model = GPT(GPTConfig(vocab_size=vocabulary, context_length=CONTEXT, layers=2, width=128, heads=4, kv_heads=4,
                          ffn_width=384, qk_norm=True, tied=False))
    chosen, precision = optimisers(name, model, factor), training.autocast(torch.device("cpu"))
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        training.set_share(training.learning_rate(step, steps, 1.0, 40, round(0.6 * steps)), *chosen)
        inputs, targets = data.random_windows(tokens, BATCH, CONTEXT, generator)
        with precision:
            loss = next_token_loss(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in chosen:
            with precision:
                optimiser.step()
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return model.eval(), sorted(seconds)[steps // 2]


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    training.keep_freed_memory()
    documents = world.documents(10_000, "optimisers")
    tokenizer = train_bpe(documents, 4096)
    tokens, _ = data.pack_documents(documents, tokenizer)
    heldout = data.pack_documents(world.heldout_documents(), tokenizer)
    cost = {name: train(name, 1, 60, tokens, tokenizer.vocab_size)[1] for name in ("AdamW", "Muon", "AdamW", "Muon")}
    print("| | a step | " + " | ".join(f"rates × {factor}" for factor in FACTORS) + " |\n" + "|---" * (2 + len(FACTORS)) + "|")
    best = {}
    for name in ("AdamW", "Muon"):
        losses = [heldout_loss(train(name, factor, STEPS, tokens, tokenizer.vocab_size)[0], *heldout)[0]
                  for factor in FACTORS]
        best[name] = min(losses), FACTORS[losses.index(min(losses))]
        print(f"| {name} | {1e3 * cost[name]:.0f} ms | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |", flush=True)
    steps = STEPS
    while True:  # more steps of AdamW, until it is as good
        steps = round(steps * 1.25)
        loss = heldout_loss(train("AdamW", best["AdamW"][1], steps, tokens, tokenizer.vocab_size)[0], *heldout)[0]
        print(f"AdamW, {steps} steps, {steps * cost['AdamW']:.0f} s: {loss:.3f}", flush=True)
        if loss <= best["Muon"][0] or steps > 4 * STEPS:
            break
    print(f"Muon, {STEPS} steps, {STEPS * cost['Muon']:.0f} s: {best['Muon'][0]:.3f}")


if __name__ == "__main__":
    main()
