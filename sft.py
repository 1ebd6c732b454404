"""Stage 2: supervised fine-tuning (instruction tuning). The base model learns to answer.

    python sft.py --init out/base --data world --out out/sft    # the embedded world: 20 to 70 s
    python sft.py --init out/base --data instructions.json --holdout 110 --out out/my_sft

The loss is that of pre-training, next-token prediction, on conversations in the chat template, but over the
assistant's tokens only (minus the log-likelihood that eqs. 4.1–4.2 of Foundations of LLMs maximise, per token):

    loss(θ) = − 1/N Σ_{(x, y)} Σ_t log p_θ(y_t | x, y_<t)

x is the prompt in the template, y the answer *and its end token* <|im_end|> (a model whose end token is never
supervised never stops), N the tokens of all answers of the batch: a long answer weighs more than a short one. A
batch holds conversations of similar length, padded on the right; causal attention keeps the padding from affecting
what comes before it.

In the embedded world, which is full of facts, a few hundred steps on a few thousand answers would overwrite some of
what pre-training taught. Three things prevent that:

- Every step also reads a little raw text (--replay), without the subjects that SFT holds out (its held-out sums may
  occur); its mean next-token loss is added to that of the answers.
- The optimisers are those of pre-training, at a seventh to a fifth of their learning rates: SFT should teach how to
  answer, and at a higher rate the model unlearns what to answer.
- The ε of Adam is large. Adam divides a gradient by its typical size, so a word that occurs in no answer would be
  pushed down, by a tiny gradient of constant sign, as fast as the others are learned: the head would forget every name
  that SFT does not mention. (Of the questions about unseen entities two models both got 61 % right with ε = 1e-8,
  with 1e-3 77 and 81 %.)

Left out: packing several conversations into one row.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import world
from lora import add_lora, merged
from model import GPT
from training import (InputError, StopRequest, adamw, autocast, check_finite, check_of_world, check_range, finish, flag,
                      learning_rate, leave, load_policy, log, micro_batches, muon_and_adam, parse_args, pick_device,
                      progress, restore, rows_to_read, run, save_checkpoint, save_state, saved_state, seed_everything,
                      set_share, start_run)


@dataclass
class Config:
    init: str = flag("out/base", "checkpoint to start from")
    data: list[str] = flag(["world"], "'world', or conversation files (.json .jsonl, also .gz)")
    out: str = flag("out/sft", "folder for the checkpoint; replaces an earlier run there unless --resume continues it")
    holdout: float = flag(0.05, "conversations to hold out, from the end: a fraction, or a count if 1 or more")
    conversations: int = flag(9000, "demonstrations to generate (with --data world); with --replay-data world also the "
                              "documents to draw for it, at least 1,000")
    best_only: bool = flag(False, "only demonstrations of the best quality (with --data world)")
    epochs: int = flag(1, "passes over the conversations")
    batch_size: int = flag(16, "conversations per step")
    micro_batch: int | None = flag(None, "conversations read at a time: less memory, the same gradient (default: all)")
    recompute: bool = flag(False, "recompute activations in the backward pass: much less memory, a third more time")
    lr: float = flag(0.003, "peak learning rate of the matrices in the blocks (Muon)")
    embed_lr: float = flag(0.002, "peak learning rate of the embeddings and of the norms' gains (AdamW)")
    head_lr: float = flag(0.0007, "peak learning rate of the output head, where it is not the embedding (AdamW)")
    warmup: int = flag(20, "steps of linear warm-up, at most half of the run")
    adam_eps: float = flag(1e-3, "ε of AdamW (usual: 1e-8); large, so that words that occur in no answer stay put")
    weight_decay: float = flag(0.0, "decay of the matrices in the blocks, per unit of learning rate")
    clip: float = flag(1.0, "largest norm of the gradient; longer ones are scaled down to it")
    replay_data: list[str] | None = flag(None, "pre-training text, against forgetting: 'world' or text files (default: "
                                         "with --data world, the world's)")
    replay: int = flag(2, "windows of that text, as long as the context but at most 512 tokens, in every step; 0: none")
    lora: int | None = flag(None, "rank of LoRA, small corrections of the matrices (lora.py), trained with AdamW at --lr "
                            "(give about 3e-4); --embed-lr, --head-lr and --adam-eps then do nothing")
    from_scratch: bool = flag(False, "start from random weights; take only shape and tokeniser from --init")
    dtype: str = flag("auto", "precision of the forward pass; auto takes bfloat16 where it is faster",
                      choices=["auto", "float32", "bfloat16"])
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = flag(1, "random seed of data and batches")
    eval_every: int = flag(100, "steps between measurements on 200 held-out conversations; at the end all are measured")
    save_every: int = flag(200, "steps between saves of the state that --resume continues from")
    resume: bool = flag(False, "continue from the last save in --out; without one (a finished run has none), start anew")
    show_batch: bool = flag(False, "print one conversation, [supervised] tokens marked, then exit")


def answer_loss(model, inputs, targets, total=None):
    """Mean −log p, in nats, of the supervised targets. inputs, targets (B, T); a target of −100 is ignored. If these are
    only some rows of a batch, `total` is the number to divide by: the supervised targets of the whole batch.

    The vocabulary projection, the costliest part of a small model, runs at supervised positions only.
    """
    hidden = model.hidden(inputs)  # (B, T, C)
    supervised = targets != data.IGNORE  # (B, T)
    logits = model.head(hidden[supervised])  # (N, V)
    return F.cross_entropy(logits, targets[supervised], reduction="sum") / (total or len(logits))


REPLAYED = 512  # tokens of a replayed window at most: a whole context of a large model would need much memory


def load_replay(source, tokenizer, seed, context_length, documents=3000):
    """Pre-training text to read again, as one long row of tokens: ["world"], or paths of text files.
    InputError if it is shorter than a window."""
    texts = world.replay_documents(documents, seed) if source == ["world"] else data.load_texts(source)
    tokens, _ = data.pack_documents(texts, tokenizer)
    data.check_long_enough(tokens, min(context_length, REPLAYED))
    return tokens


def replay_loss(model, tokens, windows, generator):
    """The pre-training loss on random windows of `tokens`, to be added to a later stage's loss, so that less is
    forgotten (InstructGPT's PPO-ptx, arXiv 2203.02155, eq. 2; its γ is 27.8, ours 1)."""
    text = data.random_windows(tokens, windows, min(model.config.context_length, REPLAYED), generator)
    device = next(model.parameters()).device
    return answer_loss(model, *(part.to(device) for part in text))


@torch.no_grad()
def heldout_loss(model, rows, pad_id, device, size=64):
    """Mean nats per supervised token over all rows of (ids, mask), of which `size` are read at a time."""
    total, count = 0.0, 0
    for batch in data.length_batches([len(ids) for ids, _ in rows], size):
        inputs, targets = data.sft_batch([rows[i] for i in batch], pad_id)
        tokens = (targets != data.IGNORE).sum().item()
        total += answer_loss(model, inputs.to(device), targets.to(device)).item() * tokens
        count += tokens
    return total / count


def opening(messages):
    """The turns before the first answer. Conversations that open alike share a prompt: every answer is trained on and
    measured, and if a later prompt is shared, with all before it, so is the opening."""
    return messages[:[turn["role"] for turn in messages].index("assistant")]


def main():
    config = parse_args(Config, description=__doc__)
    check_range(config)
    to_replay = config.replay_data or (["world"] if config.data == ["world"] else None)
    check_of_world(config, "best_only")
    if to_replay != ["world"]:  # else --conversations also says how much is replayed
        check_of_world(config, "conversations")
    if not to_replay and config.replay not in (0, Config.replay):
        raise InputError(f"--replay {config.replay}: expected --replay-data, the text that it reads")
    if config.lora and config.from_scratch:
        raise InputError("--lora corrects what was learned; expected no --from-scratch")
    device = pick_device(config.device)
    saved_state(config, "sft")  # is there a save that cannot be continued? better now than after some work
    generator = seed_everything(config.seed)
    model, tokenizer = load_policy(config.init, device)

    # 1. Conversations -> (ids, mask): mask 1 on the assistant's tokens and its end token.
    if config.data == ["world"]:
        conversations = world.demonstrations(config.conversations, config.seed, config.best_only)
    else:
        conversations = data.load_conversations(config.data)
    train, heldout = data.split_holdout(conversations, config.holdout)
    heldout = data.drop_seen(heldout, train, key=opening)
    train = data.encode_conversations(train, tokenizer, model.config.context_length)
    heldout = data.encode_conversations(heldout, tokenizer, model.config.context_length, "held-out conversations")
    if config.show_batch:
        print(data.show_conversation(tokenizer, *train[0]))
        return
    if config.from_scratch:
        model = GPT(model.config).to(device)
    model.recompute = config.recompute
    replayed = None
    if config.replay and to_replay:
        # Enough documents that few tokens are drawn twice.
        replayed = load_replay(to_replay, tokenizer, config.seed, model.config.context_length,
                               max(1000, config.conversations))
    if config.lora:
        add_lora(model, config.lora)
        optimisers = {"adam": adamw(model, config.lr, config.weight_decay)}
    else:
        muon, adam = muon_and_adam(model, config.lr, config.embed_lr, config.head_lr,
                                   config.weight_decay, config.adam_eps)
        optimisers = {"muon": muon, "adam": adam}
    precision = autocast(device, config.dtype)

    # 2. The loop.
    batches = data.epoch_batches([len(ids) for ids, _ in train], config.batch_size, config.seed, config.epochs)
    steps = len(batches)
    saved = start_run(config, "sft")
    modules = {"model": model, **optimisers}
    step, seconds = restore(saved, generator, modules) if saved else (0, 0.0)
    stop, started = StopRequest(), time.perf_counter() - seconds
    print(f"sft: {len(train):,} conversations, {steps:,} steps; held out {len(heldout):,}")
    bar = progress(steps, step, "sft")
    for batch in batches[step:]:
        share = learning_rate(step, steps, 1.0, config.warmup)
        set_share(share, *optimisers.values())
        inputs, targets = data.sft_batch([train[i] for i in batch], tokenizer.pad_id)  # (B, T)
        inputs, targets = inputs.to(device), targets.to(device)
        supervised = (targets != data.IGNORE).sum().item()
        model.zero_grad(set_to_none=True)
        loss = 0.0
        for rows, _ in micro_batches(range(len(inputs)), config.micro_batch):
            with precision:
                part = answer_loss(model, inputs[rows], targets[rows], supervised)
            part.backward()
            loss += part.detach()
        if replayed is not None:
            with precision:
                replay_loss(model, replayed, config.replay, generator).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        check_finite(step, config, loss=loss, gradient=norm)
        with precision:  # Muon's products; AdamW has none
            for optimiser in optimisers.values():
                optimiser.step()
        step += 1

        bar.update()
        if step % 10 == 0 or step == steps:
            rate = step * config.batch_size / (time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss.item():.3f}, {rate:,.0f} conversations/s", refresh=False)
            log(config.out, step, loss=loss, lr=share * config.lr, gradient_norm=norm)
        if step % config.eval_every == 0 and step < steps:
            nats = heldout_loss(model, heldout[:200], tokenizer.pad_id, device, rows_to_read(config))
            log(config.out, step, heldout_loss=nats)
        if stop or step % config.save_every == 0 or step == steps:
            save_state(config, "sft", step, time.perf_counter() - started, generator, modules)
        if stop:
            leave(config, bar)
    bar.close()

    # 3. Held-out conversations.
    save_checkpoint(config.out, merged(model) if config.lora else model, tokenizer)
    nats = heldout_loss(model, heldout, tokenizer.pad_id, device, rows_to_read(config))
    seconds = time.perf_counter() - started
    log(config.out, step, heldout_loss=nats)
    finish(config.out, "sft", seconds, heldout_loss=nats)
    print(f"sft: held-out loss {nats:.3f} nats per answer token; {seconds:.0f} s; wrote {config.out}")


if __name__ == "__main__":
    run(main)
