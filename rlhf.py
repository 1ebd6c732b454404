"""Stage 4: alignment. The fine-tuned model learns to give the answers that people prefer.

    python rlhf.py dpo --init out/sft --data out/pairs.jsonl --replay-data world --out out/dpo
    python rlhf.py ppo --init out/sft --reward out/reward --data world --replay-data world --out out/ppo
    python rlhf.py grpo --init out/sft --reward out/reward --data world --replay-data world --out out/grpo
    python rlhf.py grpo --reward world.py:right --families arithmetic rewriting --out out/grpo_right
    python rlhf.py ppo --init out/sft --reward my_score.py:polite --data chats.jsonl --out out/ppo_polite
    python rlhf.py dpo --help                                   # the flags of each

DPO and PPO look for the policy π that maximises E[r(x, y)] − β KL(π ‖ π_ref) (Foundations of LLMs, eq. 4.73): a high reward
while staying close to the reference π_ref, the model they start from. (GRPO's objective is much the same, with another KL
penalty: `grpo_loss`.) A reward model knows only answers like those it was trained on; β keeps the policy from wandering off
to where it is wrong.

dpo     Direct preference optimisation (arXiv 2305.18290). The best policy of that problem satisfies
        r(x, y) = β log π(y|x)/π_ref(y|x) + const(x). The reward model's loss has r only in differences, so const(x) falls
        out: put this in place of r there, and train the policy on the pairs. No sampling and no reward model.
        log π(chosen) may fall: the loss asks only that its *difference* from log π(rejected) grow. The two answers
        share words and weights, so pushing one down drags the other along, more slowly, and the probability goes to
        answers that are neither: asked for harm, a model of `make long` said "I will not know what you want to lift a
        cow". So the chosen answers' own loss (nats per token) is added, with weight --nll: 1 in iterative RPO (arXiv
        2404.19733), 0.2 in Llama 3 (arXiv 2407.21783), 0.1 here; 0 is DPO as published.
ppo     Proximal policy optimisation (arXiv 1707.06347, for language arXiv 1909.08593, 2203.02155): sample answers,
        score them, make those likelier that score better than a second network, the critic, expected, and repeat.
        Watch the KL and the answers, not the score alone: a score that rises without end is being gamed. (A reward can
        be a function of yours.)
grpo    Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300): PPO without a critic. Every prompt is
        answered several times, and an answer's advantage is how far it beats the mean of its group. It suits rewards
        that can be verified, such as whether a sum is right (--reward world.py:right). A group that is all right or
        all wrong teaches nothing. Papers differ on two choices: --standardise divides by the group's standard
        deviation (DeepSeekMath; Dr. GRPO, arXiv 2503.20783, does not: dividing raises the weight of prompts that are
        nearly always or nearly never solved), and --aggregation takes the mean over tokens within each response first
        (`sequence`, DeepSeekMath: a token of a long answer counts less), or over all tokens of a minibatch alike
        (`token`; in DAPO, arXiv 2503.14476, of the group).

While learning what people like, a model forgets some of what it knew, the *alignment tax*: one SFT model was right on
67 % of held-out sums, on 54 % after PPO, and on 69 to 74 % with InstructGPT's remedy (eq. 2, PPO-ptx), some
pre-training text in every update (--replay-data). All three methods also learn one number that their papers do not
have, how confident the policy is: see `Sharpness`; --sharpness-lr 0 turns it off.

Every per-token table is (B, T), padded on the right: entry t belongs to token ids[:, t], as predicted from the state
before it, and is 0 outside the response. Log-probs are in nats; their softmax is always in float32. Left out: an
entropy bonus, an adaptive β, whitening of rewards, a critic that shares the policy's network, DAPO's clip-higher and
dynamic sampling, and Dr. GRPO's division by a constant length.
"""

import copy
import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import world
from lora import add_lora, merged
from model import ScalarModel, generate, surprisals, token_logprobs
from reward import load_pairs, score, wilson
from sft import load_replay, replay_loss
from tokenizer import render_chat, same_tokens
from training import (LOGITS, InputError, StopRequest, adamw, autocast, check_finite, check_of_world, check_range,
                      finish, flag, has_save, learning_rate, leave, load_policy, load_reward, log, micro_batches,
                      parse_args, pick_device, progress, restore, rows_to_read, run, save_checkpoint, save_state,
                      saved_state, seed_everything, set_share, start_run)

# ---- the losses: tensors in, (loss, statistics) out ----------------------------------------------

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """DPO, eq. 7 of arXiv 2305.18290, from the *summed* log-probs (B,) of whole responses.

    With label smoothing ε, each label is taken to be wrong with probability ε (conservative DPO).
    The loss is ln 2 while the policy is still the reference. Statistics: mean implicit rewards
    β log π/π_ref of both sides, their mean difference, and the share of pairs ordered rightly.
    """
    chosen = beta * (policy_chosen - ref_chosen)  # (B,)
    rejected = beta * (policy_rejected - ref_rejected)  # (B,)
    margin = chosen - rejected
    loss = -((1 - label_smoothing) * F.logsigmoid(margin)
             + label_smoothing * F.logsigmoid(-margin)).mean()
    stats = {"reward_chosen": chosen, "reward_rejected": rejected, "margin": margin,
             "accuracy": (margin > 0).float()}
    return loss, {name: value.detach().mean() for name, value in stats.items()}


def masked_mean(x, mask):
    """Mean of x (B, T) over the places where mask (B, T) is 1."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Shift and scale x (B, T) to mean 0 and variance 1 over the mask; 0 outside it."""
    centred = x - masked_mean(x, mask)
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8) * mask


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation, eqs. 11-16 of arXiv 1506.02438. All tables (B, T).

        δ_t = r_t + γ V_{t+1} − V_t          A_t = Σ_l (γλ)^l δ_{t+l}

    The value V_t is the critic's forecast, made before token t, of the reward still to come; the advantage A_t says by
    how much token t and what followed were better than that.

    -> advantages, not whitened, and returns = advantages + values, what the critic should learn;
    both 0 outside the mask. The value after a row's last token is 0: the answer is over.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def clipped_surrogate(log_ratio, advantages, clip):
    """min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) at every token, eq. 7 of arXiv 1707.06347: (B, T), to be
    maximised. ρ = π/π_old, where π_old is the policy that sampled (not π_ref); `log_ratio` is log ρ, `clip` ε.

    The minimum makes the clip one-sided: where ρ has moved too far in the direction of the advantage,
    the gradient is 0; where it has moved against the advantage, the gradient is kept.
    """
    ratio = log_ratio.exp()
    return torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def step_statistics(log_ratio, mask, clip):
    """How far the policy is from the one that sampled: means over the tokens where mask is 1.
    `approx_kl` estimates KL(old ‖ new) per token, in nats (k3 of joschu.net/blog/kl-approx.html)."""
    ratio = log_ratio.exp()
    return {"ratio": masked_mean(ratio, mask),
            "clip_fraction": masked_mean(((ratio - 1).abs() > clip).float(), mask),
            "approx_kl": masked_mean(ratio - 1 - log_ratio, mask)}


def ppo_loss(logp, old_logp, advantages, values, old_values, returns, mask, clip=0.2, value_clip=0.2, value_coef=0.1):
    """PPO's clipped surrogate and the critic's loss (eq. 9 of arXiv 1707.06347, without the entropy
    bonus). Clipping the values too, around the old ones, and the ½ are not in the paper but in its authors' code.
    Tables (B, T), means over the tokens where mask is 1. (`value_coef` hardly matters: the critic has a network
    and an optimiser of its own.)
    """
    log_ratio = (logp - old_logp) * mask
    policy_loss = -masked_mean(clipped_surrogate(log_ratio, advantages, clip), mask)

    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value_loss = 0.5 * masked_mean(torch.max((values - returns)**2, (clipped_values - returns)**2), mask)
    loss = policy_loss + value_coef * value_loss
    with torch.no_grad():
        stats = {"policy_loss": policy_loss.detach(), "value_loss": value_loss.detach(),
                 **step_statistics(log_ratio, mask, clip)}
    return loss, stats


def explained_variance(values, returns, mask):
    """The share of the variance of `returns` over the mask that the critic's `values` predict: 1 is all, 0 none,
    below 0 worse than a constant. Where λ < 1 it flatters: GAE's returns lean on the values themselves."""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask))**2, mask)
    return 1 - variance(returns - values) / (variance(returns) + 1e-8)


def grpo_advantages(rewards, standardise=True):
    """Rewards (prompts, group) -> advantages (prompts, group): less the group's mean and, if
    `standardise`, divided by the group's standard deviation (outcome supervision, section 4.1.2 of
    arXiv 2402.03300). The 1e-4 keeps differences that are mere rounding from being blown up to about 1;
    a group of equal rewards gives exactly 0. ValueError for groups of one."""
    if rewards.ndim != 2 or rewards.size(1) < 2:
        raise ValueError(f"rewards {tuple(rewards.shape)}, expected (prompts, group of 2 or more)")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))  # 0 and 1 may be integers
    rewards = rewards - rewards[:, :1]  # equal rewards become 0, whose mean is exactly 0
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages / (rewards.std(1, keepdim=True) + 1e-4) if standardise else advantages


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, clip=0.2, beta=0.04, aggregation="sequence"):
    """GRPO, eq. 3 of arXiv 2402.03300. Tables (B, T); advantages (B,), one for a whole response. `aggregation` is
    "sequence" (mean over each response's tokens, then over responses) or "token" (mean over all tokens).

    The KL from the reference is part of the loss, not of the reward as in PPO, and is estimated by
    k3 = π_ref/π − log π_ref/π − 1, which is never negative. Its gradient weights ∇ log π by 1 − π_ref/π, that of the
    KL itself by log π/π_ref; in expectation over π the gradient of k3 is that of KL(π_ref ‖ π).
    """
    log_ratio, log_ref = (logp - old_logp) * mask, (ref_logp - logp) * mask
    k3 = log_ref.exp() - log_ref - 1
    objective = clipped_surrogate(log_ratio, advantages[:, None], clip) - beta * k3
    if aggregation == "token":
        loss = -masked_mean(objective, mask)
    elif aggregation == "sequence":
        loss = -((objective * mask).sum(1) / mask.sum(1)).mean()
    else:
        raise ValueError(f"aggregation {aggregation!r}, expected 'sequence' or 'token'")
    with torch.no_grad():
        stats = {"loss": loss.detach(), "k3": masked_mean(k3, mask), **step_statistics(log_ratio, mask, clip)}
    return loss, stats


# ---- reading a policy or a critic at the response ------------------------------------------------

def response_logprobs(model, ids, mask, temperature=1.0):
    """log π(ids[:, t] | ids[:, :t]) where mask is 1, else 0. ids, mask (B, T) -> (B, T).
    `temperature` is a number, or a learnable tensor ().

    This one definition serves all three methods (DPO sums it) and their reference. As in `sft.answer_loss`, the
    vocabulary projection runs on response positions only.
    """
    wanted = mask[:, 1:].bool()  # (B, T-1): the tokens of a response, N in all rows together
    hidden = model.hidden(ids)[:, :-1][wanted]  # (N, C): the state that predicts token t is at t-1
    # The head is linear, so dividing the states divides the logits, which are many more numbers.
    logprobs = token_logprobs(model.head(hidden / temperature), ids[:, 1:][wanted])  # (N,)
    table = torch.zeros(wanted.shape, device=ids.device).masked_scatter(wanted, logprobs)  # (B, T-1): back in place
    return F.pad(table, (1, 0))  # (B, T): nothing predicts the first token


def response_values(critic, ids, mask, shift, told=None):
    """The critic's estimate, before each response token, of the reward still to come: (B, T), 0 outside the response.
    `shift` is subtracted: the zero of the reward model that the critic starts as or, where a function gives the reward and
    the critic starts at 0, minus the mean score. `told` (B, T, 2): what its reader says, if that is at hand."""
    values = critic(ids, told=told)[:, :-1] - shift  # (B, T-1)
    return F.pad(values, (1, 0)) * mask


@torch.no_grad()
def read_all(function, ids, mask, *more, chunk=64, size=()):
    """function(ids, mask, *more) -> (B, T, *size) for many rows, in batches of similar length, surplus padding cut off."""
    lengths = last_token(mask) + 1
    table = torch.zeros(*ids.shape, *size, device=ids.device)
    for rows in data.length_batches(lengths.tolist(), chunk):
        longest = int(lengths[rows].max())
        table[rows, :longest] = function(*(given[rows, :longest] for given in (ids, mask, *more)))
    return table


def parts_by_length(minibatch, lengths, size):
    """[(rows, length of the longest)]: a minibatch in parts of `size` rows of similar length, which need little
    padding. The caller weights each part."""
    ordered = minibatch[lengths[minibatch].argsort()]
    return [(rows, int(lengths[rows].max())) for rows, _ in micro_batches(ordered, size)]


def minibatches(config, generator):
    """Indices of episodes: `epochs` passes over all of them, each shuffled and cut into `minibatches` parts."""
    for _ in range(config.epochs):
        order = torch.randperm(config.episodes, generator=generator, device=generator.device)
        yield from order.tensor_split(config.minibatches)


def replay_generator(config, step, updates):
    """The generator that draws windows of pre-training text: on the CPU, where the text is, not on the device, and made
    anew for every update, so that no state of it has to be saved."""
    return torch.Generator().manual_seed(config.seed * 10**6 + step * 1000 + updates)


def last_token(mask):
    """Index (B,) of the last 1 in each row of mask (B, T)."""
    return mask.size(1) - 1 - mask.flip(1).int().argmax(1)


def check_replay(config):
    if config.replay != type(config).replay and not config.replay_data:
        raise InputError(f"--replay {config.replay}: expected --replay-data, the text that it reads")


def text_to_replay(config, tokenizer, context_length):
    """The tokens of --replay-data, or None."""
    return config.replay_data and load_replay(config.replay_data, tokenizer, config.seed, context_length)


# ---- how sure the policy is ----------------------------------------------------------------------

class Sharpness(torch.nn.Module):
    """One number s > 0 that is learned with the policy: π = softmax(s · logits), at a rate of its own, some hundred
    times that of the weights. DPO, PPO and GRPO as published have no such number.

    Much of what alignment can gain is confidence: at temperature 0.5, which is s = 2, SFT's answers win 66 % of the
    comparisons with its answers at temperature 1. The weights learn that too slowly: AdamW moves each by about the
    learning rate per step, back and forth where its gradient is mostly noise, and the gains g of the last norm, which
    scale all logits, only went from 1.733 to 1.735 in a run of PPO. As s scales all logits, as these gains do
    together, ∂L/∂ log s = Σ g ∂L/∂g: one sum over all of them, in which noise averages out. (CLIP learns the scale
    of its logits like this, arXiv 2103.00020; in arXiv 2602.13035 the policy chooses a temperature for every
    token.) --clip leaves this gradient as it is. Replayed text is read without s, so that s learns from answers
    alone; the saved model applies it to everything.
    """

    def __init__(self, optimiser, lr, device):
        super().__init__()
        self.log = torch.nn.Parameter(torch.zeros((), device=device))  # s is 1 at first
        optimiser.add_param_group({"params": self.parameters(), "peak": lr, "weight_decay": 0.0})

    def forward(self):
        return self.log.exp()  # ()

    @torch.no_grad()
    def folded(self, policy):
        """A plain copy of `policy`, on the CPU, whose logits are s times as large: s goes into the last norm's gains."""
        policy = merged(policy)
        policy.norm.weight *= self().item()
        return policy


# ---- DPO -----------------------------------------------------------------------------------------

@dataclass
class DPOConfig:
    init: str = flag("out/sft", "checkpoint to start from; also the reference")
    data: list[str] = flag(["out/pairs.jsonl"], "preference files (.json .jsonl, also .gz), or 'world': sample pairs")
    out: str = flag("out/dpo", "folder for the checkpoint; replaces an earlier run there unless --resume continues it")
    holdout: float = flag(0.1, "pairs to hold out, from the end: a fraction, or a count if 1 or more. If rows have "
                         "a p, the known probability that `chosen` is preferred, those are held out instead")
    pairs: int = flag(7500, "pairs to sample from --init, at most (with --data world)")
    beta: float = flag(0.1, "reward, in log-odds, that one nat of KL from --init costs; with a smaller β the policy "
                       "strays further")
    label_smoothing: float = flag(0.0, "share of the labels assumed to be wrong, at most 0.5")
    nll: float = flag(0.1, "weight of the chosen answers' own loss (nats per token); 0 is DPO as published")
    epochs: int = flag(1, "passes over the pairs")
    batch_size: int = flag(32, "pairs per step")
    replay_data: list[str] | None = flag(None, "pre-training text, against forgetting: 'world', as in `make`, or text files")
    replay: int = flag(1, "windows of --replay-data in every update")
    lora: int | None = flag(None, "rank of LoRA, small corrections of the matrices (lora.py); raise --lr about tenfold")
    micro_batch: int | None = flag(None, "pairs read at a time: less memory, the same gradient (default: all)")
    recompute: bool = flag(False, "recompute activations in the backward pass: much less memory, a third more time")
    dtype: str = flag("float32", "precision of the policy; bfloat16 takes half the time on devices with hardware "
                      "support for it", choices=["float32", "bfloat16"])
    lr: float = flag(1e-4, "peak learning rate")
    sharpness_lr: float = flag(0.02, "peak learning rate of the policy's sharpness, a factor on all logits; 0 keeps it at 1")
    warmup: int = flag(20, "steps of linear warm-up, at most half of the run")
    clip: float = flag(1.0, "largest norm of the gradient; longer ones are scaled down to it")
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = flag(1, "random seed of data and batches")
    keep_every: int | None = flag(None, "steps between checkpoints kept in OUT/step_N")
    save_every: int = flag(100, "steps between saves of the state that --resume continues from")
    resume: bool = flag(False, "continue from the last save in --out; without one (a finished run has none), start anew")
    show_batch: bool = flag(False, "print one pair, [supervised] tokens marked, then exit")


def pair_logprobs(model, pairs, pad_id, device, temperature=1.0):
    """Summed log-probs of both responses, (2B,): the chosen ones first. A sum, not a mean: the
    probability of an answer is the product over its tokens, <|im_end|> included."""
    ids, mask, _ = data.preference_batch(pairs, pad_id)
    return response_logprobs(model, ids.to(device), mask.to(device), temperature).sum(1)


def dpo(argv=None):
    config = parse_args(DPOConfig, argv, __doc__, prog="rlhf.py dpo")
    check_range(config, beta=(1e-9, 10**9), label_smoothing=(0, 0.5), nll=(0, 1000), replay=(1, 10**6))
    check_replay(config)
    check_of_world(config, "pairs")
    device = pick_device(config.device)
    saved_state(config, "dpo")  # is there a save that cannot be continued? better now than after some work
    generator = seed_everything(config.seed)
    model, tokenizer = load_policy(config.init, device)

    # 1. Pairs of answers to one prompt, both ending with <|im_end|>.
    train, heldout = load_pairs(config, model, tokenizer)
    if config.show_batch:
        print(data.show_pair(tokenizer, train[0]))
        return

    # 2. The reference is the model as it is now and never changes: read all pairs with it once.
    model.recompute = config.recompute
    precision = autocast(device, config.dtype)

    @torch.no_grad()
    def read_pairs(pairs, temperature=1.0):
        table = torch.zeros(2, len(pairs), device=device)  # chosen, rejected
        for batch in data.length_batches(data.pair_lengths(pairs), rows_to_read(config)):
            with precision:
                logprobs = pair_logprobs(model, [pairs[i] for i in batch], tokenizer.pad_id, device, temperature)
            table[:, batch] = logprobs.view(2, -1)
        return table

    reference, heldout_reference = read_pairs(train), read_pairs(heldout)  # (2, N) each
    chosen_lengths = torch.tensor([len(pair.chosen) for pair in train], device=device)  # (N,)
    if config.lora:
        add_lora(model, config.lora)
    optimiser = adamw(model, config.lr)
    sharpness = Sharpness(optimiser, config.sharpness_lr, device)
    replayed = text_to_replay(config, tokenizer, model.config.context_length)

    # 3. The loop.
    batches = data.epoch_batches(data.pair_lengths(train), config.batch_size, config.seed, config.epochs)
    steps = len(batches)
    saved = start_run(config, "dpo")
    modules = {"model": model, "sharpness": sharpness, "optimiser": optimiser}
    step, seconds = restore(saved, generator, modules) if saved else (0, 0.0)
    stop, started = StopRequest(), time.perf_counter() - seconds
    print(f"dpo: {len(train):,} pairs, {steps:,} steps; held out {len(heldout):,}")
    bar = progress(steps, step, "dpo")
    for batch in batches[step:]:
        share = learning_rate(step, steps, 1.0, config.warmup)
        set_share(share, optimiser)
        optimiser.zero_grad(set_to_none=True)
        seen = {}
        for rows, weight in micro_batches(batch, config.micro_batch):
            with precision:
                logprobs = pair_logprobs(model, [train[i] for i in rows], tokenizer.pad_id, device, 1 / sharpness())
            chosen, rejected = logprobs.chunk(2)  # (B,) each
            loss, stats = dpo_loss(chosen, rejected, *reference[:, rows], config.beta, config.label_smoothing)
            nll = -(chosen / chosen_lengths[rows]).mean()
            (weight * (loss + config.nll * nll)).backward()
            stats |= {"loss": loss, "nll": nll, "logp_chosen": chosen.mean(), "logp_rejected": rejected.mean()}
            seen = {name: seen.get(name, 0) + weight * value.item() for name, value in stats.items()}
        if replayed is not None:
            with precision:
                replay_loss(model, replayed, config.replay, generator).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        check_finite(step, config, loss=loss, gradient=norm)
        optimiser.step()
        step += 1

        bar.update()
        if step % 10 == 0 or step == steps:
            bar.set_postfix_str(f"loss {seen['loss']:.3f}, margin {seen['margin']:.2f}", refresh=False)
            log(config.out, step, **seen, sharpness=sharpness(), lr=share * config.lr, gradient_norm=norm)
        if config.keep_every and step % config.keep_every == 0:
            save_checkpoint(Path(config.out) / f"step_{step:04d}", sharpness.folded(model), tokenizer)
        if stop or step % config.save_every == 0 or step == steps:
            save_state(config, "dpo", step, time.perf_counter() - started, generator, modules)
        if stop:
            leave(config, bar)
    bar.close()

    # 4. Held-out pairs: does the policy, read as a reward model, order them rightly?
    save_checkpoint(config.out, sharpness.folded(model), tokenizer)
    loss, stats = dpo_loss(*read_pairs(heldout, 1 / sharpness()), *heldout_reference, config.beta)
    accuracy = wilson(round(stats["accuracy"].item() * len(heldout)), len(heldout))
    seconds = time.perf_counter() - started
    log(config.out, step, **{f"heldout_{name}": v for name, v in {**stats, "loss": loss}.items()})
    finish(config.out, "dpo", seconds, heldout_accuracy=accuracy, heldout_loss=loss.item(),
           heldout_margin=stats["margin"].item(), heldout_pairs=len(heldout))
    print(f"dpo: held-out reward accuracy {accuracy[0]:.3f} [{accuracy[1]:.3f}, {accuracy[2]:.3f}],"
          f" margin {stats['margin'].item():.2f}; {seconds:.0f} s; wrote {config.out}")


# ---- PPO -----------------------------------------------------------------------------------------

ADAM = {"betas": (0.9, 0.999), "eps": 1e-5}  # ε is that of OpenAI's code for PPO, β₂ Adam's usual one


@dataclass
class RolloutConfig:
    """What PPO and GRPO have in common."""
    init: str = flag("out/sft", "checkpoint to start from; also the reference")
    reward: str = flag("out/reward", "reward model, or FILE.py:FUNCTION, called as function(prompt, response) with texts, "
                       "returning a number; the other defaults suit numbers that differ by about 1")
    data: list[str] = flag(["world"], "'world', or conversations or preferences, of which only the prompts are read (.json "
                           ".jsonl, also .gz)")
    families: list[str] | None = flag(None, "only these families of --data world (`python world.py --stats` lists them); "
                                      "`all` is every one, and one named twice gives twice as many prompts (default: "
                                      "all, harmful and howto more often: PRACTISED in world.py)")
    out: str = flag("out/ppo", "folder for the checkpoint; replaces an earlier run there unless --resume continues it")
    holdout: float = flag(0.05, "prompts of files to hold out, from the end: a fraction, or a count if 1 or more. If rows "
                          "have a p, as held-out preferences do, those are held out instead (of the world: --eval-prompts)")
    prompts: int = flag(6000, "prompts to generate (with --data world)")
    eval_prompts: int = flag(200, "held-out prompts answered before and after training, at most; of the world mostly "
                             "other wordings of what is trained on (`evaluate.py` has others)")
    iterations: int = flag(36, "rounds of sampling and updating")
    episodes: int = flag(128, "answers sampled per iteration")
    max_new_tokens: int = flag(72, "longest response, in tokens")
    temperature: float = flag(1.0, "temperature of sampling and of all log-probs; the learned sharpness comes on top")
    no_eos_score: float | None = flag(-1.0, "score of a response without its <|im_end|>; nan: what the reward gives it")
    epochs: int = flag(2, "passes over the episodes per iteration")
    minibatches: int = flag(2, "updates per pass")
    micro_batch: int | None = flag(16, "responses read at a time: less memory and padding, the same gradient")
    replay_data: list[str] | None = flag(None, "pre-training text, against forgetting: 'world', as in `make`, or text files")
    replay: int = flag(1, "windows of --replay-data in every update")
    ratio_clip: float = flag(0.2, "the ε of PPO: a token whose probability ratio is further than this from 1, on the "
                             "side that its advantage points to, gets no gradient")
    stop_kl: float = flag(0.1, "end an iteration's passes when KL(old ‖ new), in nats per token, exceeds this")
    max_kl: float = flag(100.0, "end the run when KL from the reference, in nats per response, exceeds this")
    lora: int | None = flag(None, "rank of LoRA, small corrections of the matrices (lora.py); raise --lr about tenfold")
    dtype: str = flag("float32", "precision of policy, reference and critic in the updates (the sampler stays in "
                      "float32); bfloat16 is faster on hardware that supports it", choices=["float32", "bfloat16"])
    lr: float = flag(3e-4, "learning rate of the policy at the start, falling linearly to 0")
    sharpness_lr: float = flag(0.02, "the same for the policy's sharpness, one factor on all logits; 0 keeps it at 1")
    clip: float = flag(1.0, "largest norm of each gradient; longer ones are scaled down to it (PPO's ε is --ratio-clip)")
    samples_every: int = flag(10, "iterations between prints of three samples")
    keep_every: int | None = flag(None, "iterations between checkpoints kept in OUT/step_N")
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    seed: int = flag(1, "random seed of prompts, samples and minibatches")
    save_every: int = flag(20, "iterations between saves of the state that --resume continues from")
    resume: bool = flag(False, "continue from the last save in --out; without one (a finished run has none), start anew")
    show_batch: bool = flag(False, "print one sampled episode, [response] tokens marked, then exit")


@dataclass
class PPOConfig(RolloutConfig):
    beta: float = flag(0.1, "reward, in standard deviations of the reward model's scores (or as a function gives it), that "
                       "one nat of KL from --init costs; 0 invites reward hacking")
    gamma: float = flag(1.0, "discount per token")
    lam: float = flag(0.95, "GAE's λ: 0 trusts the critic, 1 the sampled score")
    value_clip: float = flag(0.2, "a value that moved further than this since the rollout, towards its target, gets no "
                             "gradient")
    critic_lr: float = flag(1e-3, "learning rate of the critic at the start, falling linearly to 0")
    critic: bool = flag(True, "use a value function; --no-critic: every state has the value 0, and λ is 1")
    whiten: bool = flag(True, "shift and scale advantages to mean 0 and variance 1; --no-whiten: leave them as they are")


def check_rollout_flags(config):
    if math.isnan(config.no_eos_score):
        config.no_eos_score = None  # nan is not equal to itself, and --resume compares settings
    check_range(config, minibatches=(1, config.episodes), temperature=(0.01, 100), replay=(1, 10**6),
                no_eos_score=(-10**6, 10**6))
    check_replay(config)
    check_of_world(config, "families", "prompts")


@dataclass
class Prompt:
    ids: list[int]
    text: str  # what a reward function sees


def load_prompts(config, tokenizer, context_length):
    """(train, heldout) lists of Prompt; those without room for a response are dropped."""
    if config.data == ["world"]:
        named = config.families or world.PRACTISED
        unknown = set(named) - {"all", *world.DEMONSTRATED}
        if unknown:
            raise InputError(f"--families {' '.join(sorted(unknown))}: "
                             f"expected some of all, {', '.join(world.DEMONSTRATED)}")
        families = [family for name in named for family in (world.DEMONSTRATED if name == "all" else [name])]

        def ask(n, seed):
            return [[{"role": "user", "content": task.prompt}] for task in world.training_prompts(n, seed, families)]
        train = ask(config.prompts, config.seed)
        heldout = ask(2 * config.eval_prompts, f"{config.seed} heldout")
    else:
        prompts, marked = zip(*data.load_prompts(config.data))
        train, heldout = data.split_marked(list(prompts), marked, config.holdout, config.data)
    heldout = data.drop_seen(heldout, train, key=lambda prompt: prompt)[:config.eval_prompts]
    room = context_length - config.max_new_tokens
    if room < 1:
        raise InputError(f"--max-new-tokens {config.max_new_tokens}: expected fewer than the {context_length} tokens of "
                         "the context")

    def encode(turns):
        ids, _ = render_chat(tokenizer, turns, generation_prompt=True)
        if len(ids) > room:
            raise data.Unusable(f"longer than {room} tokens, the context of {context_length} less --max-new-tokens")
        return Prompt(ids, "\n\n".join(turn["content"] for turn in turns))
    return [data.keep_usable(part, encode, f"{what} of {' '.join(config.data)}")
            for part, what in ((train, "prompts"), (heldout, "held-out prompts"))]


def load_reward_source(spec, policy, tokenizer, device):
    """--reward as (score(prompts, responses as id lists) -> (B,), the reward model, its shift): for a function, the last
    two are None."""
    path, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        raise InputError(f"--reward {spec}: expected the name of a function, too, as in {spec}:FUNCTION")
    if not path.endswith(".py"):
        model, theirs, shift, _ = load_reward(spec, device)
        if not same_tokens(theirs, tokenizer):
            raise InputError(f"--reward {spec}: reads other tokens than --init; "
                             "expected a reward model trained from the same tokenizer")
        if model.config.context_length < policy.config.context_length:
            raise InputError(f"--reward {spec}: reads {model.config.context_length} tokens, --init "
                             f"{policy.config.context_length}; expected no fewer")

        def model_score(prompts, responses):
            return score(model, [p.ids for p in prompts], responses, tokenizer.pad_id) - shift
        return model_score, model, shift

    function = load_function(path, name)

    def function_score(prompts, responses):
        with torch.no_grad():
            return torch.tensor([call(function, spec, prompt.text, answer_text(tokenizer, response))
                                 for prompt, response in zip(prompts, responses)])
    return function_score, None, None


def first_critic(reward_model, policy, device):
    """The critic before training. It starts as the reward model (as in InstructGPT): inside an answer that overshoots,
    but tells good beginnings from bad ones. A copy, because the critic learns on and the reward must stay as it is;
    both share the reader, which is frozen. (Without one the critic explained 6 to 64 % of the returns' variance in five
    runs, with one 67 to 82.) Where a function gives the reward, it starts as the policy with a head of zeros, which knows
    nothing of that reward."""
    if reward_model is not None:
        return copy.deepcopy(reward_model, {id(reward_model.reader): reward_model.reader})
    critic = ScalarModel(copy.deepcopy(policy)).to(device)
    torch.nn.init.zeros_(critic.score.weight)
    return critic


def load_function(path, name):
    """The function `name` of the Python file `path`, which is run: it is the user's own code."""
    try:
        module_spec = importlib.util.spec_from_file_location("__reward_function__", path)
        module = sys.modules["__reward_function__"] = importlib.util.module_from_spec(module_spec)
        sys.path.append(str(Path(path).resolve().parent))  # so that the file can import its neighbours
        with torch.enable_grad():  # a file that switches gradients off does so for itself
            module_spec.loader.exec_module(module)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:  # whatever the file does wrong; a script may end with sys.exit(main())
        raise InputError(f"--reward {path}:{name}: could not be loaded ({in_words(error)})") from error
    if not callable(function):
        raise InputError(f"--reward {path}:{name}: expected a function, found {function!r:.60}")
    return function


def in_words(error):
    """The error's name and text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def call(function, spec, prompt, response):
    try:
        value = float(function(prompt, response))
    except (Exception, SystemExit) as error:
        raise InputError(f"--reward {spec}: {in_words(error)}; on the prompt "
                         f"{prompt!r} and the response {response!r}") from error
    if not abs(value) < 1e6:  # its square must be a number, too
        raise InputError(f"--reward {spec}: returned {value}, expected a number between −10⁶ and 10⁶; on the "
                         f"prompt {prompt!r} and the response {response!r}")
    return value


def answer_text(tokenizer, response):
    return tokenizer.decode([token for token in response if token not in tokenizer.end_ids])


@dataclass
class Rollout:
    responses: list[list[int]]
    ids: torch.Tensor  # (B, T) prompt, response, padding
    mask: torch.Tensor  # (B, T) float, 1 on the response
    logp: torch.Tensor  # (B, T) of the policy that sampled
    ref_logp: torch.Tensor  # (B, T)
    score: torch.Tensor  # (B,)
    ended: torch.Tensor  # (B,) bool: <|im_end|> came (<|endoftext|> ends a response, too, but wrongly)


def sample_rollout(policy, reference, score_responses, prompts, config, tokenizer, generator, sharpness=1.0):
    """Steps 1 to 4 of PPO: answers to `prompts`, with log-probs and scores. `sharpness` is the policy's, a float."""
    temperature = config.temperature / sharpness  # the policy's; the reference keeps config.temperature
    device = next(policy.parameters()).device
    # 1. Sample at the training temperature from the whole vocabulary. With top-k or top-p we would
    #    sample from a different distribution than the one whose log-probs we differentiate.
    # 2. The sampler cuts each response after its end token, which is part of the response.
    responses, recorded = generate(
        policy, [p.ids for p in prompts], config.max_new_tokens, temperature=temperature,
        eos_ids=tokenizer.end_ids, generator=generator)
    rows = [p.ids + response for p, response in zip(prompts, responses)]
    ids = data.pad_right(rows, tokenizer.pad_id).to(device)  # (B, T)
    mask = data.pad_right([[0] * len(p.ids) + [1] * len(response)
                           for p, response in zip(prompts, responses)], 0).to(device)
    few = max(1, min(64, LOGITS // (ids.size(1) * policy.config.vocab_size)))  # rows at a time
    with autocast(device, config.dtype):  # as in the updates, or the first ratio there would not be 1
        logp = read_all(lambda i, m: response_logprobs(policy, i, m, temperature), ids, mask, chunk=few)
        ref_logp = read_all(lambda i, m: response_logprobs(reference, i, m, config.temperature), ids, mask, chunk=few)
    # The sampler runs in float32; bfloat16, with 8 bits of precision, was seen to be 0.1 off at single tokens.
    tolerance = 1e-4 if config.dtype == "float32" else 0.5
    check_recorded(recorded, logp, mask, tolerance / min(1, temperature))  # dividing logits multiplies their error

    # 3. Score the whole response, as the reward model saw it in training: at the last real token.
    scores = score_responses(prompts, responses)  # (B,)
    # 4. A response without its <|im_end|> (most were cut off by --max-new-tokens) gets a fixed bad score, or
    #    rambling would pay.
    ended = torch.tensor([response[-1] == tokenizer.im_end_id for response in responses])
    if config.no_eos_score is not None:
        scores = torch.where(ended, scores, config.no_eos_score)
    return Rollout(responses, ids, mask.float(), logp, ref_logp, scores.to(device), ended)


def check_recorded(recorded, logp, mask, tolerance=1e-4):
    """RuntimeError unless the log-probs that training computes, (B, T), match those that the sampler
    recorded, lists of floats. If they do not, the ratio is silently wrong from the first update on; causes
    are a different temperature, truncated sampling, dropout, padding, or precision."""
    recorded = torch.tensor([x for row in recorded for x in row], device=logp.device)
    gap = (logp[mask.bool()] - recorded).abs().max().item()
    if not gap <= tolerance:
        raise RuntimeError(f"log-probs of the rollout differ by {gap:.2g} nats from those of "
                           f"training (at most {tolerance:g}): they are of two distributions "
                           "(likely causes: README, Troubleshooting)")


def check_that_ending_pays(rollout, config):
    """InputError if answers that end score less than those that do not: soon all would be endless."""
    ended = rollout.score[rollout.ended]
    if config.no_eos_score is not None and len(ended) and ended.mean() < config.no_eos_score:
        raise InputError(f"found a mean score of {ended.mean():.3g} for answers that end, {config.no_eos_score:g} for those "
                         "that do not; expected a --no-eos-score well below the usual scores (or nan)")


def first_measurement(config, heldout_rollout):
    """`summarise` of held-out prompts before training; None where a save, which has that, will be continued. Call it before
    `start_run`, which removes an earlier run in --out: a reward function that fails should fail before that."""
    if has_save(config):
        return None
    rollout = heldout_rollout()
    gap = (rollout.logp - rollout.ref_logp).abs().max().item()
    if not gap <= 1e-3:
        raise RuntimeError(f"policy and reference differ by {gap:.2g} nats at a token before any update")
    check_that_ending_pays(rollout, config)
    return summarise(rollout)


def token_rewards(rollout, beta):
    """Step 5: −β (log π − log π_ref) on every token, and the score on the last one. (B, T)"""
    rewards = -beta * (rollout.logp - rollout.ref_logp)
    rows = torch.arange(len(rewards), device=rewards.device)
    rewards[rows, last_token(rollout.mask)] += rollout.score
    return rewards


def summarise(rollout):
    """Means over episodes. `kl` is the sampled Σ_t log π/π_ref, in nats per response; `entropy`, in
    nats per token, is estimated as the mean of −log π over the sampled tokens."""
    kl = (rollout.logp - rollout.ref_logp).sum(1).mean().item()
    return {"score": rollout.score.mean().item(), "kl": kl,
            "entropy": -masked_mean(rollout.logp, rollout.mask).item(),
            "eos_rate": rollout.ended.float().mean().item(),
            "tokens": rollout.mask.sum(1).mean().item()}


def show_samples(rollout, prompts, drawn, tokenizer, config, step, bar):
    """Log and print the first three episodes: only reading them shows what a score means."""
    samples = [{"prompt": prompts[i].text, "score": rollout.score[n].item(),
                "response": answer_text(tokenizer, rollout.responses[n])}
               for n, i in enumerate(drawn[:3])]
    log(config.out, step, samples=samples)
    for sample in samples:  # repr: a response may hold anything
        bar.write(f"{sample['score']:+.2f}  {sample['prompt']!r} -> {sample['response']!r}", file=sys.stderr)


def ppo(argv=None):
    config = parse_args(PPOConfig, argv, __doc__, prog="rlhf.py ppo")
    check_rollout_flags(config)
    device = pick_device(config.device)
    saved_state(config, "ppo")  # is there a save that cannot be continued? better now than after some work
    seed_everything(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)  # the sampler draws on the device

    # Four models: the policy, the frozen reference, the reward and the critic (and what --surprisal reads).
    policy, tokenizer = load_policy(config.init, device)
    prompts, heldout = load_prompts(config, tokenizer, policy.config.context_length)
    reference = copy.deepcopy(policy).requires_grad_(False)
    score_responses, reward_model, shift = load_reward_source(config.reward, policy, tokenizer, device)
    critic = first_critic(reward_model, policy, device)
    lam = config.lam if config.critic else 1.0  # without: every token is credited with all the reward that follows it
    if config.lora:
        add_lora(policy, config.lora)
    precision = autocast(device, config.dtype)
    policy_optimiser = adamw(policy, config.lr, **ADAM)
    sharpness = Sharpness(policy_optimiser, config.sharpness_lr, device)
    critic_optimiser = adamw(critic, config.critic_lr, **ADAM)
    replayed = text_to_replay(config, tokenizer, policy.config.context_length)

    def roll(prompts, generator):
        return sample_rollout(policy, reference, score_responses, prompts, config, tokenizer,
                              generator, sharpness().item())

    def heldout_rollout():  # its own seed, so that measuring uses up none of training's random numbers
        return roll(heldout, torch.Generator(device).manual_seed(0))

    if config.show_batch:
        rollout = roll(prompts[:1], generator)
        print(data.show_conversation(tokenizer, rollout.ids[0].tolist(), rollout.mask[0].tolist()))
        return

    before = first_measurement(config, heldout_rollout)
    saved = start_run(config, "ppo")
    modules = {"policy": policy, "sharpness": sharpness, "critic": critic,
               "policy_optimiser": policy_optimiser, "critic_optimiser": critic_optimiser}
    before = before or saved["before"]
    if shift is None:  # a function's rewards may lie around any number: at first the critic guesses their mean
        shift = -before["score"]
    step, seconds = restore(saved, generator, modules) if saved else (0, 0.0)
    stop, started = StopRequest(), time.perf_counter() - seconds
    print(f"ppo: {len(prompts):,} prompts, {config.iterations:,} iterations of {config.episodes} "
          f"episodes; held-out score {before['score']:.3f}")
    bar = progress(config.iterations, step, "ppo")
    while step < config.iterations:
        share = learning_rate(step, config.iterations, 1.0)
        set_share(share, policy_optimiser, critic_optimiser)
        drawn = torch.randint(len(prompts), (config.episodes,), generator=generator, device=device).tolist()

        # 1-4. Sample, cut after the end token, score, punish a missing end; and check what was recorded.
        rollout = roll([prompts[i] for i in drawn], generator)
        ids, mask, old_logp = rollout.ids, rollout.mask, rollout.logp
        summary = summarise(rollout)
        summary["rlhf_reward"] = summary["score"] - config.beta * summary["kl"]
        if summary["kl"] > config.max_kl:
            bar.write(f"ppo: KL from the reference {summary['kl']:.1f} > --max-kl; stopped", file=sys.stderr)
            break
        # 5. Rewards per token: the price of leaving the reference, and the score at the end.
        rewards = token_rewards(rollout, config.beta)  # (B, T)
        # 6. Values, from a separate network, of the state *before* each token.
        told, old_values = torch.zeros(*ids.shape, 1, device=device), torch.zeros_like(mask)  # (B, T, 1), (B, T)
        if config.critic:
            with precision:
                if critic.reader is not None:  # what that says is the same in every pass: ask it once
                    told = read_all(lambda i, m: surprisals(critic.reader, i), ids, mask,
                                    size=(critic.surprisal.in_features,))  # (B, T, 2)
                old_values = read_all(lambda i, m, t: response_values(critic, i, m, shift, t), ids, mask, told)
        # 7. Advantages. The critic learns returns in the unit of the score, so these are computed from the
        #    raw advantages; the policy gets whitened ones, so that the learning rate always meets the same scale.
        advantages, returns = gae(rewards, old_values, mask, config.gamma, lam)
        summary["explained_variance"] = explained_variance(old_values, returns, mask).item()
        if config.whiten:
            advantages = whiten(advantages, mask)

        # 8. A few passes of shuffled minibatches, until the policy has moved far enough.
        lengths = last_token(mask) + 1
        sums, updates = {}, 0
        for minibatch in minibatches(config, generator):
            policy_optimiser.zero_grad(set_to_none=True)
            critic_optimiser.zero_grad(set_to_none=True)
            means = {}
            for rows, longest in parts_by_length(minibatch, lengths, config.micro_batch):
                weight = (mask[rows].sum() / mask[minibatch].sum()).item()  # every mean is over tokens
                at = rows, slice(longest)  # table[at]: these rows, without the padding that none of them needs
                with precision:
                    logp = response_logprobs(policy, ids[at], mask[at], config.temperature / sharpness())
                    values = response_values(critic, ids[at], mask[at], shift, told[at]) if config.critic else old_values[at]
                loss, stats = ppo_loss(logp, old_logp[at], advantages[at], values, old_values[at], returns[at], mask[at],
                                       config.ratio_clip, config.value_clip)
                check_finite(step, config, loss=loss)
                (weight * loss).backward()
                for name, value in stats.items():
                    means[name] = means.get(name, 0) + weight * value.item()
            if means["approx_kl"] > config.stop_kl:
                break
            if replayed is not None:
                with precision:
                    replay_loss(policy, replayed, config.replay, replay_generator(config, step, updates)).backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip)
            critic_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), config.clip)
            check_finite(step, config, gradient=norm, critic_gradient=critic_norm)
            policy_optimiser.step()
            critic_optimiser.step()
            updates += 1
            sums = {name: sums.get(name, 0) + value for name, value in means.items()}
        step += 1

        # 9. Log statistics of the episodes as they were sampled, and averages over the updates.
        bar.update()
        bar.set_postfix_str(f"score {summary['score']:.2f}, KL {summary['kl']:.1f}", refresh=False)
        log(config.out, step, **summary, **{name: v / updates for name, v in sums.items()},
            updates=updates, sharpness=sharpness(), lr=share * config.lr)
        if step % config.samples_every == 0:
            show_samples(rollout, prompts, drawn, tokenizer, config, step, bar)
        if config.keep_every and step % config.keep_every == 0:
            save_checkpoint(Path(config.out) / f"step_{step:04d}", sharpness.folded(policy), tokenizer)
        if stop or step % config.save_every == 0 or step == config.iterations:
            save_state(config, "ppo", step, time.perf_counter() - started, generator, modules, before=before)
        if stop:
            leave(config, bar)
    bar.close()

    # 10. Held-out prompts again.
    save_checkpoint(config.out, sharpness.folded(policy), tokenizer)
    close(config, "ppo", step, before, summarise(heldout_rollout()), time.perf_counter() - started)


def close(config, stage, step, before, after, seconds):
    """Report the results on the held-out prompts. The score is only the proxy: whether people would agree with it is
    what evaluate.py measures."""
    log(config.out, step, **{f"heldout_{name}": value for name, value in after.items()})
    finish(config.out, stage, seconds, iterations=step, heldout_score_before=before["score"],
           **{f"heldout_{name}": after[name] for name in ("score", "kl", "eos_rate", "tokens")})
    print(f"{stage}: held-out score {before['score']:.3f} -> {after['score']:.3f}, KL from the "
          f"reference {after['kl']:.1f} nats per response; {seconds:.0f} s; wrote {config.out}")


# ---- GRPO ----------------------------------------------------------------------------------------

@dataclass
class GRPOConfig(RolloutConfig):
    out: str = flag("out/grpo", "folder for the checkpoint; replaces an earlier run there unless --resume continues it")
    group: int = flag(8, "answers to each prompt; they are compared with one another")
    beta: float = flag(0.04, "weight of the KL from the reference in the loss, per token (k3, see `grpo_loss`)")
    standardise: bool = flag(True, "divide by the group's standard deviation (DeepSeekMath); "
                             "--no-standardise: do not (Dr. GRPO)")
    aggregation: str = flag("sequence", "mean within each response first (DeepSeekMath), or over "
                            "all tokens (DAPO)", choices=["sequence", "token"])


def grpo(argv=None):
    config = parse_args(GRPOConfig, argv, __doc__, prog="rlhf.py grpo")
    check_rollout_flags(config)
    check_range(config, group=(2, config.episodes))
    if config.episodes % config.group:
        raise InputError(f"--episodes {config.episodes}: expected a multiple of "
                         f"--group {config.group}")
    device = pick_device(config.device)
    saved_state(config, "grpo")  # is there a save that cannot be continued? better now than after some work
    seed_everything(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)

    # Three models: the policy, the frozen reference and the reward. No critic.
    policy, tokenizer = load_policy(config.init, device)
    prompts, heldout = load_prompts(config, tokenizer, policy.config.context_length)
    reference = copy.deepcopy(policy).requires_grad_(False)
    score_responses, *_ = load_reward_source(config.reward, policy, tokenizer, device)
    if config.lora:
        add_lora(policy, config.lora)
    precision = autocast(device, config.dtype)
    optimiser = adamw(policy, config.lr, **ADAM)
    sharpness = Sharpness(optimiser, config.sharpness_lr, device)
    replayed = text_to_replay(config, tokenizer, policy.config.context_length)

    def roll(prompts, generator):
        return sample_rollout(policy, reference, score_responses, prompts, config, tokenizer,
                              generator, sharpness().item())

    def heldout_rollout():
        return roll(heldout, torch.Generator(device).manual_seed(0))

    if config.show_batch:
        rollout = roll(prompts[:1], generator)
        print(data.show_conversation(tokenizer, rollout.ids[0].tolist(), rollout.mask[0].tolist()))
        return

    before = first_measurement(config, heldout_rollout)
    saved = start_run(config, "grpo")
    modules = {"policy": policy, "sharpness": sharpness, "optimiser": optimiser}
    before = before or saved["before"]
    step, seconds = restore(saved, generator, modules) if saved else (0, 0.0)
    stop, started = StopRequest(), time.perf_counter() - seconds
    print(f"grpo: {len(prompts):,} prompts, {config.iterations:,} iterations of "
          f"{config.episodes // config.group} groups of {config.group}; held-out score "
          f"{before['score']:.3f}")
    bar = progress(config.iterations, step, "grpo")
    while step < config.iterations:
        share = learning_rate(step, config.iterations, 1.0)
        set_share(share, optimiser)
        drawn = torch.randint(len(prompts), (config.episodes // config.group,), generator=generator,
                              device=device).repeat_interleave(config.group).tolist()

        # 1. Sample every prompt `group` times; cut after the end, score, punish a missing end, as in PPO.
        rollout = roll([prompts[i] for i in drawn], generator)
        ids, mask, old_logp = rollout.ids, rollout.mask, rollout.logp
        summary = summarise(rollout)
        if summary["kl"] > config.max_kl:
            bar.write(f"grpo: KL from the reference {summary['kl']:.1f} > --max-kl; stopped", file=sys.stderr)
            break
        # 2. Advantages within the group. Every token of a response gets the same one.
        groups = rollout.score.view(-1, config.group)  # (prompts, group)
        advantages = grpo_advantages(groups, config.standardise).flatten()  # (B,)
        summary["silent_groups"] = (groups.amax(1) - groups.amin(1) < 1e-4).float().mean().item()

        # 3. A few passes of shuffled minibatches, until the policy has moved far enough.
        lengths = last_token(mask) + 1
        sums, updates = {}, 0
        for minibatch in minibatches(config, generator):
            optimiser.zero_grad(set_to_none=True)
            means = {}
            for rows, longest in parts_by_length(minibatch, lengths, config.micro_batch):
                # What this part weighs in the minibatch's means: in the statistics its share of the tokens, in the loss
                # that or its share of the responses, as --aggregation says.
                token_share = (mask[rows].sum() / mask[minibatch].sum()).item()
                weight = len(rows) / len(minibatch) if config.aggregation == "sequence" else token_share
                at = rows, slice(longest)
                with precision:
                    logp = response_logprobs(policy, ids[at], mask[at], config.temperature / sharpness())
                loss, stats = grpo_loss(logp, old_logp[at], rollout.ref_logp[at], advantages[rows], mask[at],
                                        config.ratio_clip, config.beta, config.aggregation)
                check_finite(step, config, loss=loss)
                (weight * loss).backward()
                for name, value in stats.items():
                    means[name] = means.get(name, 0) + (weight if name == "loss" else token_share) * value.item()
            if means["approx_kl"] > config.stop_kl:
                break
            if replayed is not None:
                with precision:
                    replay_loss(policy, replayed, config.replay, replay_generator(config, step, updates)).backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip)
            check_finite(step, config, gradient=norm)
            optimiser.step()
            updates += 1
            sums = {name: sums.get(name, 0) + value for name, value in means.items()}
        step += 1

        # 4. What happened.
        bar.update()
        bar.set_postfix_str(f"score {summary['score']:.2f}, KL {summary['kl']:.1f}", refresh=False)
        log(config.out, step, **summary, **{name: v / updates for name, v in sums.items()},
            updates=updates, sharpness=sharpness(), lr=share * config.lr)
        if step % config.samples_every == 0:
            show_samples(rollout, prompts, drawn, tokenizer, config, step, bar)
        if config.keep_every and step % config.keep_every == 0:
            save_checkpoint(Path(config.out) / f"step_{step:04d}", sharpness.folded(policy), tokenizer)
        if stop or step % config.save_every == 0 or step == config.iterations:
            save_state(config, "grpo", step, time.perf_counter() - started, generator, modules, before=before)
        if stop:
            leave(config, bar)
    bar.close()

    # 5. Held-out prompts again.
    save_checkpoint(config.out, sharpness.folded(policy), tokenizer)
    close(config, "grpo", step, before, summarise(heldout_rollout()), time.perf_counter() - started)


def main():
    stages = {"dpo": dpo, "ppo": ppo, "grpo": grpo}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in stages:
        raise InputError(f"found {name!r}, expected one of {', '.join(stages)}; "
                         "`python rlhf.py --help` explains them")
    else:
        stages[name](sys.argv[2:])


if __name__ == "__main__":
    run(main)
