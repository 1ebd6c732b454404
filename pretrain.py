"""Stage 1: pre-training. A GPT learns to predict the next token of raw text.

    python pretrain.py --data world --out out/base
    python pretrain.py --data stories.txt --holdout 0.05 --out out/stories
    python pretrain.py --init out/base --data more.txt --lr 0.002 --embed-lr 0.001 --head-lr 0.0004 --out out/more

The loss is the mean negative log-likelihood, in nats, of each token given those before it in its window,

    loss(θ) = − 1/N Σ_i log p_θ(x_i | x_s … x_{i−1}),   N predicted tokens, x_s the first of x_i's window

(Foundations of LLMs, eqs. 2.13–2.14, which maximise the log-likelihood: this is minus that, per token),
over documents packed end to end, each preceded by <|endoftext|>. A window may start in the middle of
a document and cross into the next one: that is simpler than padding, wastes no token, and the model
learns that nothing before <|endoftext|> matters after it. Attention is not masked at those borders.

The loss on held-out text is given in nats per token and in bits per byte. The first depends on how long
the tokens are; the second is what a compressor would need, and can be compared across tokenisers.

On several GPUs (on a CPU one process uses all cores): `torchrun --nproc_per_node N pretrain.py …`. Each process takes
its share of every batch and the gradients are averaged; the number of processes changes only the rounding.

Left out: data mixing and filtering, models too large for one GPU.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import world
from model import GPT, GPTConfig
from tokenizer import train_bpe
from training import (LOGITS, InputError, StopRequest, agree, autocast, check_finite, check_of_world, check_range,
                      compiled, finish, first_alone, flag, join_processes, learning_rate, leave, load_policy, log,
                      micro_batches, muon_and_adam, parse_args, part_processes, pick_device, progress, restore, run,
                      save_checkpoint, save_state, saved_state, seed_everything, set_share, start_run)


@dataclass
class Config:
    data: list[str] = flag(["world"], "'world', or text files (.txt .json .jsonl, also .gz)")
    out: str = flag("out/base", "folder for the checkpoint; replaces an earlier run there unless --resume continues it")
    holdout: float = flag(0.05, "documents to hold out, from the end: a fraction (of the characters, if there are only "
                           "a few long ones), or a count if 1 or more")
    stream: bool = flag(False, "for text larger than memory (.txt): its tokens are written to OUT/tokens.bin and "
                        "read from there as needed; if interrupted, the next run continues writing them. --holdout is then "
                        "a fraction of the bytes, and at most 16 MB are held out")
    documents: int = flag(80000, "documents to generate (with --data world)")
    init: str | None = flag(None, "checkpoint to go on from; it brings shape and tokeniser. Give a --context-length up to its "
                            "own, and a tenth of the default rates or less (default: random weights)")
    # the model
    vocab_size: int = flag(4096, "size of the vocabulary, 256 bytes and 4 special tokens included; learned from the first "
                          "8,000 documents (with --stream, those in the first 32 MB)")
    context_length: int = flag(192, "tokens the model sees at once")
    layers: int = flag(2, "transformer blocks")
    width: int = flag(128, "numbers per token between the blocks")
    heads: int = flag(4, "attention heads; a divisor of --width, with an even quotient")
    kv_heads: int | None = flag(None, "key/value heads, a divisor of --heads; fewer is grouped-query attention "
                                "(default: as many as --heads)")
    ffn_width: int = flag(384, "hidden width of the feed-forward blocks")
    qk_norm: bool = flag(True, "normalise queries and keys (saved as Qwen3); --no-qk-norm: do not (saved as Llama)")
    tied: bool = flag(False, "use the embedding matrix as the output head, too: fewer parameters")
    # the run
    steps: int = flag(3200, "optimiser steps")
    batch_size: int = flag(8, "windows per step, over all processes together")
    micro_batch: int | None = flag(None, "windows read at a time: less memory, the same gradient (default: all)")
    recompute: bool = flag(False, "recompute activations in the backward pass: much less memory, a third more time")
    compile: bool = flag(False, "torch.compile forward and loss: a minute first, then faster steps, above all on a GPU")
    lr: float = flag(0.02, "peak learning rate of the matrices in the blocks (Muon)")
    embed_lr: float = flag(0.01, "peak learning rate of the embeddings and of the norms' gains (AdamW)")
    head_lr: float = flag(0.004, "peak learning rate of the output head, where it is not the embedding (AdamW)")
    warmup: int = flag(40, "steps of linear warm-up, at most half of the run")
    decay: float = flag(0.6, "share of the steps, at the end, over which the learning rate falls to 0")
    weight_decay: float = flag(0.1, "decay of the matrices in the blocks, per unit of learning rate")
    clip: float = flag(1.0, "largest norm of the gradient; longer ones are scaled down to it")
    dtype: str = flag("auto", "precision of the forward pass; auto takes bfloat16 where it is faster",
                      choices=["auto", "float32", "bfloat16"])
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = flag(1, "random seed of data, weights and batches")
    eval_every: int = flag(400, "steps between measurements on 32 held-out windows; at the end all are measured")
    save_every: int = flag(200, "steps between saves of the state that --resume continues from")
    resume: bool = flag(False, "continue from the last save in --out; without one (a finished run has none), start anew")
    show_batch: bool = flag(False, "print one decoded training window, then exit")


def shape_of(config, vocab_size):
    """The GPTConfig that the flags ask for. InputError if its numbers do not fit together."""
    try:
        return GPTConfig(
            vocab_size=vocab_size, context_length=config.context_length, layers=config.layers, width=config.width,
            heads=config.heads, kv_heads=config.kv_heads, ffn_width=config.ffn_width, qk_norm=config.qk_norm,
            tied=config.tied)
    except ValueError as error:  # it says which numbers
        raise InputError(error) from error


def check_fits(config, found):
    """InputError if a flag of the shape was changed beside --init, which has its own, or for windows too long."""
    for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "ffn_width", "qk_norm", "tied"):
        if getattr(config, name) != getattr(Config, name):
            raise InputError(f"--{name.replace('_', '-')}: found with --init, which brings its own shape and tokeniser; "
                             "leave it out")
    if config.context_length > found.context_length:
        raise InputError(f"--context-length {config.context_length}: expected at most the {found.context_length} of "
                         f"{config.init}")


def next_token_loss(network, inputs, targets):
    """Mean negative log-likelihood, in nats, of targets (B, T) after inputs (B, T): the loss above."""
    logits = network(inputs)  # (B, T, V)
    # Autocast would first copy the bf16 logits, which take most of a small model's memory, to float32. Without
    # that the log-probs are as exact as the logits are, and a tenth of a step's time is saved.
    with torch.autocast(logits.device.type, enabled=False):
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.float().mean()


@torch.no_grad()
def heldout_loss(model, tokens, text_bytes, length=None):
    """(nats per token, bits per byte) of a packed 1-D token tensor whose text has `text_bytes` bytes.

    Windows of `length` tokens (None: the model's context) follow one another without overlap, and none sees the
    text before it; every token after the first is predicted once. Bits per byte = summed nats / (ln 2 · bytes):
    <|endoftext|> adds nats to the sum, but no bytes.
    """
    length = length or model.config.context_length
    most = max(1, LOGITS // model.config.vocab_size)  # positions whose logits are held at a time
    batch_size = max(1, min(32, most // length))
    device = next(model.parameters()).device
    nats = 0.0
    starts = range(0, len(tokens) - 1, length)
    for first in range(0, len(starts), batch_size):
        windows = [tokens[s:s + length + 1] for s in starts[first:first + batch_size]]
        for size in {len(w) for w in windows}:  # the last window may be shorter
            batch = torch.stack([w for w in windows if len(w) == size]).to(device).long()  # (B, T+1)
            hidden = model.hidden(batch[:, :-1]).flatten(0, 1)  # (B * T, C)
            for h, targets in zip(hidden.split(most), batch[:, 1:].flatten().split(most)):
                nats += F.cross_entropy(model.head(h).float(), targets, reduction="sum").item()
    return nats / max(1, len(tokens) - 1), nats / (math.log(2) * text_bytes)


def main():
    config = parse_args(Config, description=__doc__)
    check_range(config, vocab_size=(260, 10**7), context_length=(2, 10**6))
    check_of_world(config, "documents")
    shape_of(config, config.vocab_size)  # refuse now, not after tokenising everything
    device = pick_device(config.device)
    model, tokenizer = load_policy(config.init) if config.init else (None, None)  # the GPU comes later
    if model:
        check_fits(config, model.config)
    rank, processes = join_processes(device)
    if config.batch_size % processes:
        raise InputError(f"--batch-size {config.batch_size}: expected a multiple of the {processes} processes")
    saved_state(config, "pretrain")  # is there a save that cannot be continued? better now than after some work
    generator = seed_everything(config.seed)  # the same in every process

    # 1. Data: documents, tokeniser, one long row of tokens.
    if config.stream:
        train_documents, heldout_documents, end = data.open_large(config.data, config.holdout)  # (train: only the first)
    else:
        if config.data == ["world"]:
            documents = world.documents(config.documents, seed=config.seed)
        else:
            documents = data.load_texts(config.data)
        train_documents, heldout_documents = data.split_holdout(documents, config.holdout)
    tokenizer = tokenizer or train_bpe(train_documents[:8000], config.vocab_size)
    if config.stream and not config.show_batch:  # (--show-batch writes nothing)
        with first_alone(rank, processes):
            train_tokens = data.stream_tokens(config.data, end, tokenizer, config.out)
    else:
        train_tokens, _ = data.pack_documents(train_documents, tokenizer)
    heldout_tokens, heldout_bytes = data.pack_documents(heldout_documents, tokenizer)
    data.check_long_enough(train_tokens, config.context_length)
    if config.show_batch:
        inputs, targets = data.random_windows(train_tokens, 1, config.context_length, generator)
        print(data.show_conversation(tokenizer, inputs[0].tolist(), [1] * inputs.shape[1]))
        return

    # 2. Model and optimiser.
    model = (model or GPT(shape_of(config, tokenizer.vocab_size))).to(device)
    model.recompute = config.recompute
    network = DistributedDataParallel(model) if processes > 1 else model  # it averages the gradients
    muon, adam = muon_and_adam(model, config.lr, config.embed_lr, config.head_lr,
                               config.weight_decay)
    precision = autocast(device, config.dtype)
    loss_of = compiled(next_token_loss, config.compile, device)
    if rank == 0:
        print(f"pretrain: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{len(train_tokens):,} tokens "
              f"({config.steps * config.batch_size * config.context_length / len(train_tokens):.2f} "
              f"passes), held out {len(heldout_documents):,} documents")

    # 3. The loop.
    with first_alone(rank, processes):
        saved = start_run(config, "pretrain", first=rank == 0)
    modules = {"model": model, "muon": muon, "adam": adam}
    step, seconds = restore(saved, generator, modules) if saved else (0, 0.0)
    stop, started = StopRequest(), time.perf_counter() - seconds
    decay_steps = round(config.decay * config.steps)
    bar = progress(config.steps, step, "pretrain", hidden=rank > 0)
    while step < config.steps:
        share = learning_rate(step, config.steps, 1.0, config.warmup, decay_steps)
        set_share(share, muon, adam)
        inputs, targets = data.random_windows(train_tokens, config.batch_size,
                                              config.context_length, generator)  # (B, T) each
        inputs, targets = (part[rank::processes].to(device) for part in (inputs, targets))  # our share
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for rows, weight in micro_batches(range(len(inputs)), config.micro_batch):
            with precision:
                part = weight * loss_of(network, inputs[rows], targets[rows])
            part.backward()
            loss += part.detach()
        loss, stopping = agree(loss, stop, processes)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        check_finite(step, config, loss=loss, gradient=norm)
        with precision:
            muon.step()
        adam.step()
        step += 1

        bar.update()
        if rank == 0 and (step % 10 == 0 or step == config.steps):
            elapsed = time.perf_counter() - started
            rate = step * config.batch_size * config.context_length / elapsed
            bar.set_postfix_str(f"loss {loss.item():.3f}, {rate:,.0f} tokens/s", refresh=False)
            log(config.out, step, loss=loss, lr=share * config.lr, gradient_norm=norm, tokens_per_second=rate)
        if rank == 0 and step % config.eval_every == 0 and step < config.steps:
            some = heldout_tokens[:32 * config.context_length + 1]
            nats, _ = heldout_loss(model, some, heldout_bytes, config.context_length)  # the bytes are of all windows
            log(config.out, step, heldout_loss=nats)
        if rank == 0 and (stopping or step % config.save_every == 0 or step == config.steps):
            save_state(config, "pretrain", step, time.perf_counter() - started, generator, modules)
        if stopping:
            if processes > 1:  # torchrun kills the others when one leaves: wait until the state is saved
                torch.distributed.barrier()
            leave(config, bar)
    bar.close()
    part_processes(rank, processes)  # from here on there is only one

    # 4. What it has learned, on text that was held out (pages that are also in training are not removed).
    save_checkpoint(config.out, model, tokenizer, stage="pretrain")
    nats, bits = heldout_loss(model, heldout_tokens, heldout_bytes, config.context_length)
    seconds = time.perf_counter() - started
    log(config.out, step, heldout_loss=nats, bits_per_byte=bits)
    finish(config.out, "pretrain", seconds, heldout_loss=nats, bits_per_byte=bits)
    print(f"pretrain: held-out loss {nats:.3f} nats per token, {bits:.3f} bits per byte; "
          f"{seconds:.0f} s; wrote {config.out}")


if __name__ == "__main__":
    run(main)
