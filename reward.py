"""Stage 3: the reward model. It learns from comparisons which of two answers people prefer.

    python reward.py --init out/sft --data out/pairs.jsonl --surprisal --out out/reward    # as in `make`
    python reward.py --init out/sft --data preferences.json --holdout 0.1 --out out/my_reward

It is the fine-tuned model's backbone with a scalar head r(x, y) in place of the vocabulary head, read at the last
real token, <|im_end|> included: only there has it seen the whole answer. A fresh block goes on top (--extra-layers):
only after its last layer does a language model know what it would have said, and comparing that with what was said
takes a layer more (73 % of held-out pairs ordered rightly, without it 71 %, means of five seeds). With --surprisal,
as in `make`, it is also told how likely the fine-tuned model found each token (`surprisals` in model.py). That model
knows more facts than a few thousand comparisons can teach, and where it is wrong it is often unsure (78 % instead of
73 %, on earlier texts).

Bradley and Terry (1952) model the probability that people prefer the chosen answer y_c to the rejected y_r as
σ(r(x, y_c) − r(x, y_r)). We minimise the negative log-likelihood of their choices (Foundations of LLMs, eqs. 4.35–4.37;
InstructGPT, arXiv 2203.02155, eq. 1 with K = 2):

    L(φ) = − mean log σ(r_φ(x, y_c) − r_φ(x, y_r))

That loss depends only on differences, so the zero of r is arbitrary; its unit is log-odds. PPO needs a fixed
zero (an answer without an end gets a fixed −1), and a fixed unit: log-odds are the larger the more the people
who chose agree, so that the same β would be another price each time. So both are set after training, on answers
from the training pairs: the head is divided by the rewards' standard deviation, and the mean, in that new unit,
is kept as `reward_shift` in config.json, to be subtracted by whoever reads the score. `reward_scale`, also
there, turns a difference of scores back into log-odds.

Held-out accuracy cannot reach 1: people contradict each other. If the rows carry p, the probability
that `chosen` is preferred, the mean of max(p, 1 − p) is the best accuracy possible, the noise ceiling.

Left out: several ranked answers per prompt, ties, and an ensemble against over-optimisation.
"""

import argparse
import contextlib
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import world
from model import ScalarModel, deepen
from training import (InputError, StopRequest, adamw, autocast, check_finite, check_of_world, check_range, finish,
                      flag, learning_rate, leave, load_policy, log, micro_batches, parse_args,
                      pick_device, progress, restore, rows_to_read, run, save_checkpoint, save_state,
                      saved_state, seed_everything, set_share, start_run)


@dataclass
class Config:
    init: str = flag("out/sft", "checkpoint to start from")
    data: list[str] = flag(["out/pairs.jsonl"], "preference files (.json .jsonl, also .gz), or 'world': sample pairs")
    out: str = flag("out/reward", "folder for the checkpoint; replaces an earlier run unless --resume continues it")
    holdout: float = flag(0.1, "pairs to hold out, from the end: a fraction, or a count if 1 or more. If rows have "
                         "a p, the known probability that `chosen` is preferred, those are held out instead")
    pairs: int = flag(7500, "pairs to sample from --init, at most (with --data world)")
    extra_layers: int = flag(1, "fresh blocks on top of the backbone, initialised to the identity")
    surprisal: bool = flag(False, "also read how likely --init finds each token (transformers then needs the code in --out)",
                           action=argparse.BooleanOptionalAction)
    epochs: int = flag(2, "passes over the pairs; more tend to memorise them")
    batch_size: int = flag(32, "pairs per step")
    micro_batch: int | None = flag(None, "pairs read at a time: less memory, the same gradient (default: all)")
    recompute: bool = flag(False, "recompute activations in the backward pass: much less memory, a third more time")
    lr: float = flag(1e-3, "peak learning rate")
    warmup: int = flag(20, "steps of linear warm-up, at most half of the run")
    weight_decay: float = flag(0.0, "decay of the weight matrices, per unit of learning rate")
    clip: float = flag(1.0, "largest norm of the gradient; longer ones are scaled down to it")
    eval_every: int = flag(100, "steps between measurements on 200 held-out pairs; at the end all are measured")
    dtype: str = flag("auto", "precision of the backbone; auto takes bfloat16 where it is faster",
                      choices=["auto", "float32", "bfloat16"])
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = flag(1, "random seed of data, head and batches")
    save_every: int = flag(200, "steps between saves of the state that --resume continues from")
    resume: bool = flag(False, "continue from the last save in --out; without one (a finished run has none), start anew")
    show_batch: bool = flag(False, "print one pair, [answer] tokens marked, then exit")


def preference_loss(chosen, rejected):
    """Mean −log σ(chosen − rejected) of rewards (B,) each, in nats: InstructGPT, eq. 1.

    ln 2 when the model cannot tell them apart. ValueError where the shapes differ: broadcasting
    (B,) against (B, 1) would compare every answer with every other.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}, expected the same shape")
    return -F.logsigmoid(chosen - rejected).mean()


def wilson(successes, n, z=1.96):
    """[rate, low, high] of `successes` out of n: Wilson's 95 % interval, which stays inside [0, 1]
    and is accurate for rates near 0 and 1 too. None for n = 0."""
    if n == 0:
        return None
    rate = successes / n
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [rate, max(0.0, middle - half), min(1.0, middle + half)]


def read_last(model, ids, last, precision=contextlib.nullcontext()):
    """Rewards (B,) of rows ids (B, T), padded on the right, read at `last` (B,), the places of their last real tokens.

    The head is not autocast: in bfloat16, rewards of 4.00 and 4.01 are the same number.
    """
    with precision:
        hidden = model.hidden(ids)  # (B, T, C)
    rows = torch.arange(len(ids), device=ids.device)
    return model.score(hidden[rows, last].to(model.score.weight.dtype)).squeeze(-1)


@torch.no_grad()
def score(reward_model, prompts, responses, pad_id, batch_size=64):
    """Raw rewards (N,), on the CPU, of responses to prompts, both lists of id lists.

    A response is scored with its <|im_end|>, if it has one. Subtract `reward_shift` for a mean of
    about 0.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    device = reward_model.score.weight.device
    rewards = torch.zeros(len(rows))
    for batch in data.length_batches([len(row) for row in rows], batch_size):
        ids = data.pad_right([rows[i] for i in batch], pad_id).to(device)
        last = torch.tensor([len(rows[i]) - 1 for i in batch], device=device)
        rewards[batch] = read_last(reward_model, ids, last).cpu()
    return rewards


def score_pairs(model, pairs, pad_id, batch_size=64):
    """Raw rewards of the chosen and of the rejected answers of EncodedPairs, (N,) each."""
    prompts = [pair.prompt for pair in pairs]
    return (score(model, prompts, [pair.chosen for pair in pairs], pad_id, batch_size),
            score(model, prompts, [pair.rejected for pair in pairs], pad_id, batch_size))


def load_pairs(config, policy, tokenizer):
    """(train, heldout) lists of data.EncodedPair: from files, or sampled from `policy` and labelled
    by the embedded world. Rows that have a `p`, as the world's held-out ones do, are held out; if none
    has one, the last rows are. Held-out prompts that training has are dropped, unless it has all of them."""
    if config.data == ["world"]:
        count = config.holdout * config.pairs if config.holdout < 1 else config.holdout
        if count >= config.pairs:
            raise InputError(f"--holdout {config.holdout:g}: expected fewer than --pairs {config.pairs}")
        rows = world.sample_pairs(policy, tokenizer, config.pairs, round(count), config.seed)
        pairs = [data.Pair([{"role": "user", "content": row["prompt"]}], row["chosen"],
                           row["rejected"], row.get("p")) for row in rows]
    else:
        pairs = data.load_preferences(config.data)
    train, heldout = data.split_marked(pairs, [pair.p is not None for pair in pairs], config.holdout, config.data)
    heldout = data.drop_seen(heldout, train, key=lambda pair: pair.prompt)
    return [data.encode_pairs(part, tokenizer, policy.config.context_length, what)
            for part, what in ((train, "pairs"), (heldout, "held-out pairs"))]


def heldout_report(margins, pairs):
    """The final numbers for `done`, from rewards(chosen) − rewards(rejected), (N,), on held-out pairs."""
    right = margins > 0
    report = {"heldout_accuracy": wilson(right.sum().item(), len(pairs)),
              "heldout_loss": -F.logsigmoid(margins).mean().item(), "heldout_pairs": len(pairs)}
    if pairs[0].p is not None:
        ceiling = report["noise_ceiling"] = sum(max(pair.p, 1 - pair.p) for pair in pairs) / len(pairs)
        if ceiling > 0.5:  # 0 = guessing, 1 = as good as the labels allow
            report["normalised_accuracy"] = (right.float().mean().item() - 0.5) / (ceiling - 0.5)
    return report


def main():
    config = parse_args(Config, description=__doc__)
    check_range(config, extra_layers=(0, 100))
    check_of_world(config, "pairs")
    device = pick_device(config.device)
    saved_state(config, "reward")  # is there a save that cannot be continued? better now than after some work
    generator = seed_everything(config.seed)
    policy, tokenizer = load_policy(config.init, device)

    # 1. Pairs of answers to one prompt, both ending with <|im_end|>.
    train, heldout = load_pairs(config, policy, tokenizer)
    if config.show_batch:
        print(data.show_pair(tokenizer, train[0]))
        return

    # 2. The policy's backbone, --extra-layers blocks on top, and a scalar head.
    model = ScalarModel(deepen(policy, config.extra_layers), policy if config.surprisal else None).to(device)
    del policy  # without --surprisal a whole model that nothing needs
    model.gpt.recompute = config.recompute
    optimiser = adamw(model, config.lr, config.weight_decay)
    precision = autocast(device, config.dtype)

    # 3. The loop.
    batches = data.epoch_batches(data.pair_lengths(train), config.batch_size, config.seed, config.epochs)
    steps = len(batches)
    saved = start_run(config, "reward")
    modules = {"model": model, "optimiser": optimiser}
    step, seconds = restore(saved, generator, modules) if saved else (0, 0.0)
    stop, started = StopRequest(), time.perf_counter() - seconds
    print(f"reward: {len(train):,} pairs, {steps:,} steps; held out {len(heldout):,}")
    bar = progress(steps, step, "reward")
    for batch in batches[step:]:
        share = learning_rate(step, steps, 1.0, config.warmup)
        set_share(share, optimiser)
        optimiser.zero_grad(set_to_none=True)
        loss, margins = 0.0, []
        for rows, weight in micro_batches(batch, config.micro_batch):
            ids, _, last = data.preference_batch([train[i] for i in rows], tokenizer.pad_id)
            rewards = read_last(model, ids.to(device), last.to(device), precision)  # (2B,)
            chosen, rejected = rewards.chunk(2)
            part = weight * preference_loss(chosen, rejected)
            part.backward()
            loss += part.detach()
            margins.append((chosen - rejected).detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        check_finite(step, config, loss=loss, gradient=norm)
        optimiser.step()
        step += 1

        bar.update()
        if step % 10 == 0 or step == steps:
            margin = torch.cat(margins)  # (B,)
            accuracy = (margin > 0).float().mean()
            bar.set_postfix_str(f"loss {loss.item():.3f}, accuracy {accuracy.item():.2f}", refresh=False)
            log(config.out, step, loss=loss, accuracy=accuracy, lr=share * config.lr, gradient_norm=norm,
                margin=margin.mean())
        if step % config.eval_every == 0 and step < steps:  # this loss rises above that of training when it memorises
            chosen, rejected = score_pairs(model, heldout[:200], tokenizer.pad_id, rows_to_read(config))
            log(config.out, step, heldout_loss=preference_loss(chosen, rejected),
                heldout_accuracy=(chosen > rejected).float().mean())
        if stop or step % config.save_every == 0 or step == steps:
            save_state(config, "reward", step, time.perf_counter() - started, generator, modules)
        if stop:
            leave(config, bar)
    bar.close()

    # 4. Held-out pairs.
    chosen, rejected = score_pairs(model, heldout, tokenizer.pad_id, rows_to_read(config))
    report = heldout_report(chosen - rejected, heldout)

    # 5. Zero and unit: mean 0 and standard deviation 1 over chosen and rejected answers together.
    sample = [train[i] for i in torch.randperm(len(train), generator=generator)[:300].tolist()]
    reference = torch.cat(score_pairs(model, sample, tokenizer.pad_id, rows_to_read(config)))  # (N,)
    mean, std = reference.mean().item(), reference.std().item()
    if not std > 1e-6:
        raise InputError(f"{config.out}: the reward model gives every answer the same reward "
                         f"({mean:.3g}); expected it to tell some apart. Try a higher --lr")
    with torch.no_grad():
        model.score.weight /= std
    seconds = time.perf_counter() - started
    rate, low, high = report["heldout_accuracy"]
    save_checkpoint(config.out, model, tokenizer, reward_shift=mean / std, reward_scale=std)
    log(config.out, step, heldout_loss=report["heldout_loss"], heldout_accuracy=rate)
    finish(config.out, "reward", seconds, reward_shift=mean / std, reward_scale=std,
           train_pairs=len(train), **report)
    ceiling = f", noise ceiling {report['noise_ceiling']:.3f}" if "noise_ceiling" in report else ""
    print(f"reward: held-out accuracy {rate:.3f} [{low:.3f}, {high:.3f}]{ceiling}; "
          f"{seconds:.0f} s; wrote {config.out}")


if __name__ == "__main__":
    run(main)
