"""LoRA (arXiv 2106.09685): train a small correction to each matrix instead of the matrix itself.

    python sft.py --lora 8 --lr 3e-4 …
    python rlhf.py dpo --lora 8 …        # also ppo (whose critic is trained whole all the same), grpo

W x becomes W x + (α/r) B A x, with α = 16. W is frozen; A (r, in) starts random and B (out, r) at 0, so training
starts from the unchanged model. This saves memory: a trained weight needs 16 bytes in float32 (itself,
its gradient and AdamW's two moments), a frozen one 4. The correction is added to W before the model is
saved, so that programs which read the checkpoint need not know of it.

q, k and v are one matrix here, and so share one A; so do gate and up. Left out: dropout on x, corrections of
embeddings and head, choosing which matrices to correct.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class LoRA(nn.Module):
    """W x + (α/r) B A x in place of the matrix `linear`: x (..., in) -> (..., out)."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        weight = linear.weight
        self.linear, self.scale = linear, alpha / rank
        self.a = nn.Parameter(torch.randn(rank, weight.size(1), device=weight.device) / weight.size(1)**0.5)
        self.b = nn.Parameter(torch.zeros(weight.size(0), rank, device=weight.device))

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


def matrices(model, kind):
    """[(owner, attribute name, module)] for every matrix of type `kind` inside the blocks."""
    return [(part, name, child) for block in model.blocks for part in (block.attention, block.mlp)
            for name, child in part.named_children() if isinstance(child, kind)]


def add_lora(model, rank, alpha=16.0):
    """Freeze `model` (a GPT) and give every matrix inside its blocks a correction of this rank. As α is divided by the
    rank, the correction is about as large for any rank, and --lr suits them all."""
    model.requires_grad_(False)
    for owner, name, linear in matrices(model, nn.Linear):
        setattr(owner, name, LoRA(linear, rank, alpha))


@torch.no_grad()
def merged(model):
    """A plain model that computes the same as `model`: a copy with the corrections, if any, added to their matrices.
    On the CPU, so that saving needs no memory of a GPU."""
    copies = {id(p): nn.Parameter(p.to("cpu", copy=True), p.requires_grad) for p in model.parameters()}
    copies |= {id(b): b.to("cpu", copy=True) for b in model.buffers()}
    model = copy.deepcopy(model, copies)  # takes what it finds there for copied
    for owner, name, lora in matrices(model, LoRA):
        lora.linear.weight += lora.scale * lora.b @ lora.a
        setattr(owner, name, lora.linear)
    return model
