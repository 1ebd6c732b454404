"""rlhf.py: each loss against its equation written out, masks, the rollout's checks, and learning."""
import copy
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import rlhf
from lora import add_lora, merged
from model import GPT, GPTConfig, ScalarModel, generate, surprisals
from reward import score
from sft import load_replay, replay_loss
from tokenizer import render_chat, train_bpe
from training import InputError, load_policy, load_reward, save_checkpoint


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat and the dog sat on the log\n"] * 3, 300)


def tiny(tokenizer, seed=0):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(tokenizer.vocab_size, context_length=64, layers=2, heads=2, kv_heads=2,
                        width=32, ffn_width=64))
    for parameter in gpt.parameters():  # a fresh block is the identity: give attention some work
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return gpt


def ragged(seed, *lengths):
    """(B, T) mask with rows of these lengths, and three random tables that are not 0 outside it."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return mask.float(), *torch.randn(3, *mask.shape, generator=generator)


# ---- DPO -----------------------------------------------------------------------------------------

def test_dpo_loss_is_eq_7():
    chosen, rejected = torch.tensor([-12.0, -30.0]), torch.tensor([-14.0, -21.0])
    ref_chosen, ref_rejected = torch.tensor([-13.0, -28.0]), torch.tensor([-13.5, -25.0])
    beta = 0.1
    z = [beta * ((-12 + 13) - (-14 + 13.5)), beta * ((-30 + 28) - (-21 + 25))]
    by_hand = sum(-math.log(1 / (1 + math.exp(-x))) for x in z) / 2
    loss, stats = rlhf.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert stats["reward_chosen"].item() == pytest.approx(beta * (1 - 2) / 2)
    assert stats["reward_rejected"].item() == pytest.approx(beta * (-0.5 + 4) / 2)
    assert stats["margin"].item() == pytest.approx(sum(z) / 2)
    assert stats["accuracy"].item() == 0.5
    smooth, _ = rlhf.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, 0.2)
    other = sum(-math.log(1 / (1 + math.exp(x))) for x in z) / 2
    assert smooth.item() == pytest.approx(0.8 * by_hand + 0.2 * other, rel=1e-6)


def test_pair_logprobs_sum_over_the_response_alone(tokenizer):
    """Against one row at a time, no padding, every token's log-prob read off a full softmax."""
    model = tiny(tokenizer)
    pairs = [rlhf.data.EncodedPair([5, 6, 7], [20, 21, 22, 23], [24]),
             rlhf.data.EncodedPair([8], [9, 10], [11, 12, 13, 14, 15, 16])]
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    expected = []
    for prompt, response in rows:
        logprobs = model(torch.tensor([prompt + response]))[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        expected.append(sum(logprobs[t, y] for t, y in zip(places, response)))
    found = rlhf.pair_logprobs(model, pairs, tokenizer.pad_id, "cpu")
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)


# ---- GAE and whitening ---------------------------------------------------------------------------

@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_double_sum(gamma, lam, measured):
    mask, rewards, values, _ = ragged(1, 5, 1, 3)
    expected = torch.zeros_like(mask)
    for b, length in enumerate(mask.sum(1).int().tolist()):
        for t in range(length):
            for l in range(length - t):
                after = values[b, t + l + 1] if t + l + 1 < length else 0.0
                delta = rewards[b, t + l] + gamma * after - values[b, t + l]
                expected[b, t] += (gamma * lam) ** l * delta
    advantages, returns = rlhf.gae(rewards, values, mask, gamma, lam)
    measured("gae, advantages", "the definition, a double sum", (advantages - expected).abs().max(), 1e-5)
    measured("gae, returns", "advantages + values", (returns - (expected + values) * mask).abs().max(), 1e-5)
    boolean, _ = rlhf.gae(rewards, values, mask.bool(), gamma, lam)
    assert torch.equal(boolean, advantages)


def test_gae_ignores_what_is_before_the_response():
    mask, rewards, values, noise = ragged(2, 4, 2)
    wide = [torch.cat([noise[:, :2], table], 1) for table in (rewards, values)]
    wide_mask = torch.cat([torch.zeros(2, 2), mask], 1)
    for plain, shifted in zip(rlhf.gae(rewards, values, mask, 1.0, 0.95),
                              rlhf.gae(*wide, wide_mask, 1.0, 0.95)):
        assert torch.equal(shifted[:, 2:], plain) and not shifted[:, :2].any()


def test_whiten_sees_no_padding():
    mask, x, noise, _ = ragged(3, 6, 2, 4)
    white = rlhf.whiten(x, mask)
    kept = white[mask.bool()]
    assert abs(kept.mean()) < 1e-6 and abs(kept.std(correction=0) - 1) < 1e-5
    assert not white[~mask.bool()].any()
    assert torch.allclose(rlhf.whiten(torch.where(mask.bool(), x, 100 * noise), mask), white)


# ---- the PPO loss --------------------------------------------------------------------------------

@pytest.mark.parametrize("advantage, log_ratio, has_gradient", [
    (1.0, 0.5, False), (1.0, -0.5, True), (-1.0, 0.5, True), (-1.0, -0.5, False),
    (1.0, 0.1, True), (-1.0, -0.1, True)])
def test_ppo_clips_only_steps_with_the_advantage(advantage, log_ratio, has_gradient):
    old, one = torch.tensor([[-2.0]]), torch.ones(1, 1)
    logp = (old + log_ratio).requires_grad_()
    loss, stats = rlhf.ppo_loss(logp, old, advantage * one, one, one, one, one)
    ratio = math.exp(log_ratio)
    by_hand = -min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
    assert loss.item() == pytest.approx(by_hand)
    loss.backward()
    # d loss / d logp = −ratio · advantage, or 0 once clipped
    assert logp.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0)
    assert stats["clip_fraction"].item() == (abs(ratio - 1) > 0.2)
    assert stats["ratio"].item() == pytest.approx(ratio)
    assert stats["approx_kl"].item() == pytest.approx(ratio - 1 - log_ratio, rel=1e-4)


@pytest.mark.parametrize("value, old, target, by_hand, has_gradient", [
    (1.0, 0.0, 3.0, (0.2 - 3) ** 2, False),  # moved far towards the target: held at 0.2
    (-1.0, 0.0, 3.0, (-1.0 - 3) ** 2, True),  # moved away from it: the larger loss counts
    (0.1, 0.0, 3.0, (0.1 - 3) ** 2, True)])
def test_ppo_clips_the_critic_about_its_old_values(value, old, target, by_hand, has_gradient):
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    values = torch.tensor([[value]], requires_grad=True)
    loss, stats = rlhf.ppo_loss(zero, zero, zero, values, old * one, target * one, one)
    assert stats["value_loss"].item() == pytest.approx(0.5 * by_hand)
    assert loss.item() == pytest.approx(0.1 * 0.5 * by_hand)
    loss.backward()
    assert bool(values.grad.item()) == has_gradient


def test_ppo_loss_is_a_mean_over_tokens_and_sees_no_padding():
    mask, logp, values, advantages = ragged(4, 6, 2, 4)
    _, noise, old_values, returns = ragged(5, 6, 2, 4)
    old_logp = logp + 0.3 * noise
    loss, stats = rlhf.ppo_loss(logp, old_logp, advantages, values, old_values, returns, mask)
    real = mask.bool()
    tokens = [table[real][None] for table in (logp, old_logp, advantages, values, old_values,
                                              returns)]
    flat_loss, flat_stats = rlhf.ppo_loss(*tokens, torch.ones(1, 12))
    assert loss.item() == pytest.approx(flat_loss.item(), rel=1e-5)
    for name, value in stats.items():
        assert value.item() == pytest.approx(flat_stats[name].item(), rel=1e-4), name
    assert rlhf.explained_variance(old_values, returns, mask).item() == pytest.approx(
        (1 - (returns - old_values)[real].var() / returns[real].var()).item(), rel=1e-4)
    logp.requires_grad_(), values.requires_grad_()
    loss, _ = rlhf.ppo_loss(logp, old_logp, advantages, values, old_values, returns, mask)
    loss.backward()
    assert not logp.grad[~real].any() and not values.grad[~real].any()


# ---- GRPO ----------------------------------------------------------------------------------------

def test_grpo_advantages_compare_within_the_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 7.0, 1.0, 1.0]])
    centred = rlhf.grpo_advantages(rewards, standardise=False)
    assert torch.allclose(centred, torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0, 4.0, -2.0, -2.0]]))
    standard = rlhf.grpo_advantages(rewards)
    assert torch.allclose(standard[1], torch.tensor([0.0, 4.0, -2.0, -2.0]) / math.sqrt(24 / 3), rtol=1e-3)
    equal = torch.full((2, 8), 0.1)  # their mean in float32 is not 0.1
    assert not rlhf.grpo_advantages(equal).any() and (equal - equal.mean(1, keepdim=True)).any()
    assert torch.equal(rlhf.grpo_advantages(torch.tensor([[1, 0]])), rlhf.grpo_advantages(torch.tensor([[1.0, 0.0]])))
    for wrong in (rewards.flatten(), rewards[:, :1]):
        with pytest.raises(ValueError, match="group"):
            rlhf.grpo_advantages(wrong)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_grpo_loss_is_eq_3_and_sees_no_padding(aggregation):
    mask, logp, noise, ref_noise = ragged(6, 6, 2, 4)
    old_logp, ref_logp = logp + 0.3 * noise, logp + ref_noise
    advantages, beta, lengths = torch.tensor([1.5, -0.7, 0.2]), 0.3, (6, 2, 4)
    rows = []
    for b, length in enumerate(lengths):
        rows.append([])
        for t in range(length):
            ratio = math.exp(logp[b, t] - old_logp[b, t])
            against = math.exp(ref_logp[b, t] - logp[b, t])
            gain = min(ratio * advantages[b], max(0.8, min(1.2, ratio)) * advantages[b])
            rows[-1].append(float(gain) - beta * (against - math.log(against) - 1))
    by_hand = {"sequence": sum(sum(row) / len(row) for row in rows) / 3,
               "token": sum(map(sum, rows)) / 12}
    assert abs(by_hand["sequence"] - by_hand["token"]) > 0.01
    logp.requires_grad_()
    loss, stats = rlhf.grpo_loss(logp, old_logp, ref_logp, advantages, mask, 0.2, beta, aggregation)
    assert loss.item() == pytest.approx(-by_hand[aggregation], rel=1e-5)
    loss.backward()
    assert not logp.grad[mask == 0].any() and stats["k3"] > 0 and stats["clip_fraction"] > 0
    with pytest.raises(ValueError, match="aggregation"):
        rlhf.grpo_loss(logp, old_logp, ref_logp, advantages, mask, aggregation="mean")


# ---- the rollout ---------------------------------------------------------------------------------

def roll(tokenizer, policy, **settings):
    config = rlhf.PPOConfig(max_new_tokens=9, **settings)
    texts = ["the cat", "a", "the dog sat on the mat", "cat cat cat"] * 4
    prompts = [rlhf.Prompt(render_chat(tokenizer, [{"role": "user", "content": text}],
                                       generation_prompt=True)[0], text) for text in texts]
    generator = torch.Generator().manual_seed(3)
    score_all = lambda prompts, responses: torch.arange(1.0, 1 + len(responses))
    return prompts, rlhf.sample_rollout(policy, tiny(tokenizer, seed=1), score_all, prompts, config,
                                        tokenizer, generator)


def eager_to_stop(tokenizer):
    """A random model that ends many of its answers before the ninth token, not all."""
    policy = tiny(tokenizer)
    with torch.no_grad():
        policy.embed.weight[tokenizer.im_end_id] *= 3
    return policy


def test_rollout_scores_and_rewards(tokenizer):
    policy = eager_to_stop(tokenizer)
    prompts, rollout = roll(tokenizer, policy)
    ended = [response[-1] == tokenizer.im_end_id for response in rollout.responses]
    assert any(ended) and not all(ended)
    assert rollout.score.tolist() == [n + 1.0 if end else -1.0 for n, end in enumerate(ended)]
    assert roll(tokenizer, policy, no_eos_score=None)[1].score.tolist() == [*range(1, 17)]

    rewards = rlhf.token_rewards(rollout, beta=0.3)
    for b, (prompt, response) in enumerate(zip(prompts, rollout.responses)):
        first, last = len(prompt.ids), len(prompt.ids) + len(response) - 1
        assert rollout.ids[b, first:last + 1].tolist() == response
        assert rollout.mask[b].nonzero().flatten().tolist() == [*range(first, last + 1)]
        expected = -0.3 * (rollout.logp[b] - rollout.ref_logp[b])
        expected[last] += rollout.score[b]
        assert torch.allclose(rewards[b], expected)
        assert not rewards[b, :first].any() and not rewards[b, last + 1:].any()

    summary = rlhf.summarise(rollout)
    kl = (rollout.logp - rollout.ref_logp).sum() / 16
    assert kl.abs() > 0.5  # two different models: the statistic has something to show
    assert summary["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert summary["score"] == rollout.score.mean().item()
    assert summary["tokens"] == sum(map(len, rollout.responses)) / 16
    assert summary["eos_rate"] == sum(ended) / 16
    assert summary["entropy"] == pytest.approx(
        -(rollout.logp.sum() / sum(map(len, rollout.responses))).item(), rel=1e-5)


def test_recorded_logprobs_must_be_those_of_training(tokenizer, monkeypatch):
    policy = eager_to_stop(tokenizer)
    roll(tokenizer, policy, temperature=0.7)  # the same temperature on both sides: fine

    def truncated(*args, **options):
        return generate(*args, **{**options, "top_k": 20})

    def hotter(*args, **options):
        return generate(*args, **{**options, "temperature": 1.01})

    for wrong in (truncated, hotter):
        monkeypatch.setattr(rlhf, "generate", wrong)
        with pytest.raises(RuntimeError, match="two distributions"):
            roll(tokenizer, policy)
    with pytest.raises(RuntimeError):
        rlhf.check_recorded([[float("nan")]], torch.zeros(1, 2), torch.tensor([[0, 1]]))


def test_a_low_temperature_multiplies_rounding(tokenizer, monkeypatch):
    allowed = []
    monkeypatch.setattr(rlhf, "check_recorded", lambda recorded, logp, mask, tolerance: allowed.append(tolerance))
    for temperature in (1.0, 2.0, 0.01):
        roll(tokenizer, tiny(tokenizer), temperature=temperature)
    assert allowed == pytest.approx([1e-4, 1e-4, 1e-2])


def test_values_are_of_the_state_before_each_token(tokenizer):
    critic = ScalarModel(tiny(tokenizer))
    ids = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
    mask = torch.tensor([[0.0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    values = rlhf.response_values(critic, ids, mask, shift=0.5)
    assert not values[mask == 0].any()
    alone = critic(torch.tensor([[4, 5, 6]]))[0, -1] - 0.5  # has not seen token 3 = id 7
    assert values[0, 3].item() == pytest.approx(alone.item(), abs=1e-5)


def test_what_was_sampled_is_read_without_a_gradient(tokenizer):
    """Old values and log-probs are numbers, whoever computes them: advantages must not pull at the critic."""
    critic, ids = ScalarModel(tiny(tokenizer)), torch.randint(5, 99, (3, 9))
    values = rlhf.read_all(lambda i, m: rlhf.response_values(critic, i, m, 0.0), ids, torch.ones_like(ids))
    assert values.any() and not values.requires_grad


@pytest.mark.parametrize("reader", [False, True])
def test_reward_model_becomes_score_and_critic(reader, tokenizer, tmp_path):
    model = ScalarModel(tiny(tokenizer, seed=5), tiny(tokenizer, seed=6) if reader else None)
    save_checkpoint(tmp_path / "reward", model, tokenizer, reward_shift=0.7, reward_scale=2.0)
    scores, loaded, shift = rlhf.load_reward_source(str(tmp_path / "reward"), tiny(tokenizer), tokenizer, "cpu")
    critic = rlhf.first_critic(loaded, None, "cpu")
    prompts, responses = [rlhf.Prompt([5, 6], "")] * 2, [[7], [8, 9, 10]]
    expected = score(model, [[5, 6]] * 2, responses, 0) - 0.7
    assert torch.allclose(scores(prompts, responses), expected, atol=1e-6)
    assert shift == 0.7
    ids = torch.tensor([[5, 6, 8, 9, 10]])
    with torch.no_grad():
        assert torch.allclose(critic(ids), model(ids), atol=1e-6)  # told what the reward model is told
        for parameter in critic.parameters():  # the critic learns; the reward must not change with it
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.allclose(scores(prompts, responses), expected, atol=1e-6)


def test_a_reward_function_sees_no_end_token(tokenizer):
    ids = tokenizer.encode("the cat sat")
    for end in ([], [tokenizer.im_end_id], [tokenizer.endoftext_id]):
        assert rlhf.answer_text(tokenizer, ids + end) == "the cat sat"


def test_reward_function_errors_name_the_prompt(tokenizer, tmp_path):
    (tmp_path / "f.py").write_text("def good(p, r): return len(p) + len(r)\n"
                                   "def bad(p, r): return 1 / (len(p) - 7)\n"
                                   "def nan(p, r): return float('nan')\n"
                                   "text = 'no function'\n")
    prompts, responses = [rlhf.Prompt([1], "the cat")], [tokenizer.encode("ab")
                                                         + [tokenizer.im_end_id]]

    def load(name, file="f.py"):
        return rlhf.load_reward_source(f"{tmp_path}/{file}:{name}", tiny(tokenizer), tokenizer,
                                       "cpu")

    scores, model, shift = load("good")
    assert scores(prompts, responses).tolist() == [9.0] and model is shift is None
    assert not rlhf.first_critic(None, tiny(tokenizer), "cpu")(torch.tensor([[1, 2]])).any()
    (tmp_path / "data.py").write_text(  # a name of ours; annotations that a dataclass looks up; a file beside it
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom words_beside import WORTH\n\n"
        "@dataclass\nclass Rule:\n    worth: float\n\ndef rule(p, r): return Rule(WORTH).worth\n")
    (tmp_path / "words_beside.py").write_text("WORTH = 3.5\n")
    assert load("rule", "data.py")[0](prompts, responses).tolist() == [3.5] and sys.modules["data"] is data
    for name in ("bad", "nan"):
        with pytest.raises(InputError, match="the cat"):
            load(name)[0](prompts, responses)
    for name, file in (("missing", "f.py"), ("text", "f.py"), ("good", "none.py")):
        with pytest.raises(InputError, match="--reward"):
            load(name, file)


# ---- whole runs ----------------------------------------------------------------------------------

def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["rlhf.py", *map(str, args)])
    rlhf.main()


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_unknown_subcommand(monkeypatch, capsys):
    for args in ([], ["pop"]):
        with pytest.raises(InputError, match="dpo, ppo, grpo"):
            run(monkeypatch, *args)
    run(monkeypatch, "--help")
    assert "rlhf.py dpo" in capsys.readouterr().out


def toy_dpo(monkeypatch, tmp_path, tokenizer, *args):
    """Cats are preferred to dogs."""
    save_checkpoint(tmp_path / "sft", tiny(tokenizer), tokenizer)
    rows = [{"prompt": f"the mat {n}", "chosen": f"cat {n}", "rejected": f"dog {n}"} for n in range(120)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "dpo"
    run(monkeypatch, "dpo", "--init", tmp_path / "sft", "--data", tmp_path / "pairs.jsonl", "--out", out,
        "--holdout", 20, "--epochs", 2, "--batch-size", 10, "--lr", "1e-3", "--beta", 0.25, "--warmup", 0, "--device", "cpu",
        *args)
    return json.loads((out / "done").read_text("utf-8")), metrics(out)


def test_dpo_learns_the_preference(monkeypatch, tmp_path, tokenizer):
    done, rows = toy_dpo(monkeypatch, tmp_path, tokenizer)
    assert done["heldout_margin"] > 0.5 and done["heldout_accuracy"][1] > 0.7
    assert rows[0]["step"] == 10 and rows[1]["margin"] > rows[0]["margin"] > 0
    assert {"reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected"} <= set(rows[0])
    # The last numbers are those of the folder that was saved.
    pairs = data.encode_pairs(data.load_preferences([tmp_path / "pairs.jsonl"]), tokenizer, 64)[100:]
    with torch.no_grad():
        policy, reference = (rlhf.pair_logprobs(load_policy(tmp_path / name)[0], pairs, tokenizer.pad_id, "cpu").chunk(2)
                             for name in ("dpo", "sft"))
    loss, stats = rlhf.dpo_loss(*policy, *reference, 0.25)
    assert done["heldout_loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert done["heldout_margin"] == pytest.approx(stats["margin"].item(), rel=1e-3)


def test_the_chosen_answers_own_loss_is_per_token_and_holds_them_up(monkeypatch, tmp_path, tokenizer):
    save_checkpoint(tmp_path / "sft", tiny(tokenizer), tokenizer)
    rows = [{"prompt": f"the mat {n}", "chosen": "cat " * (1 + n % 5), "rejected": f"dog {n}"} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    last = {}
    for nll, lr in ((0, 0), (0, 3e-3), (5, 3e-3)):
        run(monkeypatch, "dpo", "--init", tmp_path / "sft", "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "dpo",
            "--holdout", 20, "--batch-size", 40, "--epochs", 20, "--warmup", 0, "--lr", lr, "--sharpness-lr", 0,
            "--nll", nll, "--device", "cpu")
        last[nll, lr] = metrics(tmp_path / "dpo")[-2]
    model = load_policy(tmp_path / "sft")[0]
    pairs = data.encode_pairs(data.load_preferences([tmp_path / "pairs.jsonl"]), tokenizer, 64)[:40]
    with torch.no_grad():
        each = [rlhf.pair_logprobs(model, [pair], tokenizer.pad_id, "cpu")[0].item() / len(pair.chosen) for pair in pairs]
    assert last[0, 0]["nll"] == pytest.approx(-sum(each) / 40, rel=1e-4)
    assert last[5, 3e-3]["logp_chosen"] > last[0, 3e-3]["logp_chosen"] + 1
    assert last[5, 3e-3]["margin"] > 0.1 and last[5, 3e-3]["loss"] < math.log(2)  # DPO's own loss, without the other


def test_dpo_reads_each_pair_against_its_own_reference(monkeypatch, tmp_path, tokenizer):
    """At a rate of 0 the policy stays the reference: margin 0 on every batch, whatever its rows."""
    save_checkpoint(tmp_path / "sft", tiny(tokenizer), tokenizer)
    rows = [{"prompt": f"the mat {n}", "chosen": "cat " * (1 + n % 5), "rejected": f"dog {n}"} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(monkeypatch, "dpo", "--init", tmp_path / "sft", "--data", tmp_path / "pairs.jsonl", "--out",
        tmp_path / "dpo", "--holdout", 20, "--batch-size", 4, "--epochs", 3, "--lr", 0, "--sharpness-lr", 0, "--device", "cpu")
    rows = metrics(tmp_path / "dpo")[:-1]
    assert len(rows) == 3
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-5) and row["margin"] == pytest.approx(0, abs=1e-5)


def test_dpo_in_bfloat16_reads_policy_and_reference_alike(monkeypatch, tmp_path, tokenizer):
    still = ["--lr", 0, "--sharpness-lr", 0, "--epochs", 1, "--micro-batch", 5]  # so many pairs are read at a time, always
    exact = toy_dpo(monkeypatch, tmp_path, tokenizer, *still)[1][0]
    rough = toy_dpo(monkeypatch, tmp_path, tokenizer, *still, "--dtype", "bfloat16")[1][0]
    assert rough["margin"] == pytest.approx(0, abs=1e-4) and 1e-5 < abs(rough["nll"] - exact["nll"]) < 0.02
    done, _ = toy_dpo(monkeypatch, tmp_path, tokenizer, "--dtype", "bfloat16")
    assert done["heldout_margin"] > 0.5


def toy(stage, monkeypatch, tmp_path, tokenizer, out, *args, logits=0.5):
    """The reward is the share of small letters in the response, as a plain Python function. The policy is random,
    its logits half of what they would be, less sure: there must be something to explore."""
    if not (tmp_path / "sft").exists():
        policy = tiny(tokenizer)
        with torch.no_grad():
            policy.embed.weight *= logits
        save_checkpoint(tmp_path / "sft", policy, tokenizer)
        (tmp_path / "share.py").write_text(
            "def of_small_letters(prompt, response):\n"
            "    return sum('a' <= c <= 'z' for c in response) / max(1, len(response))\n")
        rows = [{"instruction": f"the cat {n}", "output": "x"} for n in range(40)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(monkeypatch, stage, "--init", tmp_path / "sft", "--reward", f"{tmp_path}/share.py:of_small_letters",
        "--data", tmp_path / "prompts.jsonl", "--out", out, "--holdout", 10, "--episodes", 64,
        "--micro-batch", 64, "--max-new-tokens", 8, "--no-eos-score", "nan", "--device", "cpu", "--lr", "3e-3", "--beta",
        "0.01", *args)
    return json.loads((out / "done").read_text("utf-8")), metrics(out)


def test_ppo_learns(monkeypatch, tmp_path, tokenizer):
    out, guesses, loss = tmp_path / "ppo", [], rlhf.ppo_loss
    monkeypatch.setattr(rlhf, "ppo_loss", lambda *args: (
        guesses.append(rlhf.masked_mean(args[3].detach(), args[6]).item()), loss(*args))[1])
    done, rows = toy("ppo", monkeypatch, tmp_path, tokenizer, out, "--iterations", 15, "--keep-every", 10)
    rows = [row for row in rows if "score" in row]
    first, last = rows[0], rows[-1]
    assert first["kl"] == pytest.approx(0, abs=1e-3) and first["rlhf_reward"] == first["score"]
    assert last["rlhf_reward"] == pytest.approx(last["score"] - 0.01 * last["kl"], abs=1e-5)
    assert last["score"] > first["score"] + 0.2
    assert done["heldout_score"] > done["heldout_score_before"] + 0.2
    assert done["heldout_kl"] > 0.1 and last["entropy"] < first["entropy"]
    assert last["lr"] < first["lr"]
    assert guesses[0] == pytest.approx(done["heldout_score_before"])  # what is usual
    assert guesses[-1] == pytest.approx(last["score"], abs=0.3)  # the critic learns too
    ends = [load_policy(folder)[0].embed.weight for folder in (tmp_path / "sft", out / "step_0010", out)]
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_sharpness_is_learned_and_saved_in_the_last_norm(stage, monkeypatch, tmp_path, tokenizer):
    """Alone (--lr 0) it moves, the reward rises (it is for repeated letters, and a sure model repeats itself;
    DPO: the loss falls), and the checkpoint is SFT's but for the gains of its last norm, times s."""
    (tmp_path / "sure.py").write_text(
        "def of_itself(prompt, response): return 1 - len(set(response)) / (len(response) + 1)")
    (tmp_path / "old.txt").write_text("the dog sat on the log and the cat sat on the mat and " * 20)
    s = {}
    for replay in ([], ["--replay-data", tmp_path / "old.txt"]):
        args = "--lr", 0, "--sharpness-lr", 0.1, "--beta", 0.01, "--keep-every", 10, *replay
        done, rows = (toy_dpo(monkeypatch, tmp_path, tokenizer, *args) if stage == "dpo" else
                      toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--iterations", 10, *args,
                          "--reward", f"{tmp_path}/sure.py:of_itself", logits=2.0))
        s[bool(replay)] = [row["sharpness"] for row in rows if "sharpness" in row]
    assert s[True] == s[False]  # text is read without it
    kept = (tmp_path / stage / f"step_{20 if stage == 'dpo' else 10:04d}" / "model.safetensors").read_bytes()
    assert kept == (tmp_path / stage / "model.safetensors").read_bytes()  # after the last step: the same
    before, after = (load_policy(tmp_path / folder)[0].state_dict() for folder in ("sft", stage))
    for name in before:
        torch.testing.assert_close(after[name], before[name] * (s[True][-1] if name == "norm.weight" else 1.0))
    if stage == "dpo":
        assert abs(math.log(s[True][-1])) > 0.1 and rows[-2]["loss"] < rows[0]["loss"] < math.log(2)
    else:
        assert done["heldout_kl"] > 0.5  # nats: the reference is not as sharp
        assert s[True][-1] > 1.5 and done["heldout_score"] > done["heldout_score_before"] + 0.1


@pytest.mark.parametrize("settings", [["--sharpness-lr", 0], ["--no-standardise", "--aggregation", "token"]])
def test_grpo_learns(settings, monkeypatch, tmp_path, tokenizer):
    asked, roll = [], rlhf.sample_rollout
    monkeypatch.setattr(rlhf, "sample_rollout", lambda policy, reference, score_all, prompts, *rest: (
        asked.append([prompt.text for prompt in prompts]), roll(policy, reference, score_all, prompts, *rest))[1])
    done, rows = toy("grpo", monkeypatch, tmp_path, tokenizer, tmp_path / "grpo", "--iterations", 15, *settings)
    (samples,) = (row["samples"] for row in rows if "samples" in row)
    assert [sample["prompt"] for sample in samples] == asked[10][:3]  # of the tenth iteration
    assert len(asked) == 17 and len(set(asked[1])) > 4  # before, 15 iterations, after
    for prompts in asked[1:-1]:  # the members of a group stand side by side
        assert all(len(set(prompts[i:i + 8])) == 1 for i in range(0, 64, 8))
    rows = [row for row in rows if "score" in row]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert rows[-1]["score"] > rows[0]["score"] + 0.2 and rows[-1]["kl"] > 0.1
    assert rows[0]["lr"] == pytest.approx(3e-3) and rows[-1]["lr"] == pytest.approx(3e-3 / 15)
    assert done["heldout_score"] > done["heldout_score_before"] + 0.2
    load_policy(tmp_path / "grpo")


def test_ppo_without_a_critic_learns_too(monkeypatch, tmp_path, tokenizer):
    made, adamw = [], rlhf.adamw
    monkeypatch.setattr(rlhf, "adamw", lambda *args, **more: made.append(adamw(*args, **more)) or made[-1])
    monkeypatch.setattr(rlhf, "response_values", lambda *args: 1 / 0)  # nor does it cost a pass
    done, rows = toy("ppo", monkeypatch, tmp_path, tokenizer, tmp_path / "ppo", "--iterations", 15, "--no-critic",
                     "--sharpness-lr", 0)
    assert done["heldout_score"] > done["heldout_score_before"] + 0.2
    assert done["heldout_kl"] > 0.1  # without the sharpness, which alone would be a distance from what learns too
    # Every state has the value 0, so of what the returns vary by, nothing is explained.
    found = [row["explained_variance"] for row in rows if "explained_variance" in row]
    assert len(found) == 15 and all(abs(share) < 1e-4 for share in found)
    assert len(made) == 2 and made[0].state and not made[1].state  # no moments of a critic that does not learn


def watched(monkeypatch, **places):
    """{name of a function of rlhf.py: what stood at its place among the arguments, call by call}"""
    seen = {name: [] for name in places}

    def watch(name, place, function):
        monkeypatch.setattr(rlhf, name, lambda *args: (seen[name].append(args[place]), function(*args))[1])
    for name, place in places.items():
        watch(name, place, getattr(rlhf, name))
    return seen


def test_flags_of_the_ablations_arrive(monkeypatch, tmp_path, tokenizer):
    """--no-whiten and --no-standardise change what the policy learns from."""
    seen = watched(monkeypatch, ppo_loss=2, grpo_loss=3)
    short = ["--iterations", 1, "--epochs", 1, "--minibatches", 1, "--micro-batch", 64, "--stop-kl", 9]
    for stage, flag in (("ppo", "--no-whiten"), ("grpo", "--no-standardise")):
        for extra in ([], [flag]):
            toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, *short, *extra)
    white, raw = seen["ppo_loss"]
    assert white.std() > 2 * raw.std() > 0  # rewards here differ by less than 1
    standard, centred = seen["grpo_loss"]
    assert standard.std() > 0.8 and 0 < centred.std() < 0.4


def test_settings_reach_what_they_are_of(monkeypatch, tmp_path, tokenizer):
    seen = watched(monkeypatch, gae=slice(3, 5), token_rewards=slice(1, 2), ppo_loss=slice(7, 9),
                   grpo_loss=slice(5, 8), dpo_loss=slice(4, 6), grpo_advantages=0)
    once = ["--iterations", 1, "--epochs", 1, "--minibatches", 1]
    toy("ppo", monkeypatch, tmp_path, tokenizer, tmp_path / "ppo", *once, "--gamma", 0.9, "--lam", 0.5, "--ratio-clip",
        0.3, "--value-clip", 0.4, "--beta", 0.07)
    assert seen["gae"] == [(0.9, 0.5)] and seen["token_rewards"] == [(0.07,)] and set(seen["ppo_loss"]) == {(0.3, 0.4)}
    toy("ppo", monkeypatch, tmp_path, tokenizer, tmp_path / "ppo", *once, "--lam", 0.5, "--no-critic")
    assert seen["gae"][1][1] == 1  # a return is all there is
    toy("grpo", monkeypatch, tmp_path, tokenizer, tmp_path / "grpo", *once, "--ratio-clip", 0.3, "--beta", 0.07,
        "--aggregation", "token", "--group", 4)
    assert set(seen["grpo_loss"]) == {(0.3, 0.07, "token")} and [tuple(r.shape) for r in seen["grpo_advantages"]] == [(16, 4)]
    toy_dpo(monkeypatch, tmp_path, tokenizer, "--beta", 0.4, "--label-smoothing", 0.2)
    assert set(seen["dpo_loss"][:-1]) == {(0.4, 0.2)}


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_an_iteration_has_its_passes_and_ends_at_its_kl(stage, monkeypatch, tmp_path, tokenizer):
    for lr, stop, updates in ((3e-3, 1e-5, 1), (3e-3, 9, 3), (0, 9, 3)):
        _, rows = toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--iterations", 1, "--epochs", 3,
                      "--minibatches", 1, "--stop-kl", stop, "--lr", lr, *([] if lr else ["--sharpness-lr", 0]))
        assert rows[0]["updates"] == updates
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-4)  # a mean over the updates


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_another_reference_than_the_policy_is_noticed(stage, monkeypatch, tmp_path, tokenizer):
    """Even one so near that the mean KL of the episodes, to which the difference contributes by its square, is 0."""
    def copied_badly(model):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.norm.weight *= 1.002
        return model
    monkeypatch.setattr(rlhf, "copy", SimpleNamespace(deepcopy=copied_badly))
    with pytest.raises(RuntimeError, match="before any update"):
        toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--iterations", 1)


def test_groups_that_teach_nothing_are_counted(monkeypatch, tmp_path, tokenizer):
    """A reward for the prompt is equal within every group, not between them."""
    (tmp_path / "prompt.py").write_text("def even(prompt, response): return int(prompt.split()[-1]) % 2\n"
                                        "def nearly(prompt, response): return even(prompt, response) + len(response) * 1e-6\n"
                                        "def either(prompt, response): return len(response) % 2 * even(prompt, response)\n")
    for name, least, most in (("even", 1, 1), ("nearly", 1, 1), ("either", 0.2, 0.9)):
        _, rows = toy("grpo", monkeypatch, tmp_path, tokenizer, tmp_path / "grpo", "--iterations", 1, "--reward",
                      f"{tmp_path}/prompt.py:{name}")
        assert least <= rows[0]["silent_groups"] <= most


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_every_network_is_clipped_and_its_rate_falls(stage, monkeypatch, tmp_path, tokenizer):
    made, clipped, adamw, clip = [], set(), rlhf.adamw, torch.nn.utils.clip_grad_norm_

    def making(*args, **more):
        made.append((adamw(*args, **more), args[1], more))
        return made[-1][0]

    def clipping(parameters, most):
        parameters = list(parameters)
        clipped.update(map(id, parameters))
        return clip(parameters, most)
    monkeypatch.setattr(rlhf, "adamw", making)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    if stage == "dpo":
        toy_dpo(monkeypatch, tmp_path, tokenizer)
        last = 1 / 20  # of the rates, at the last of 20 updates
    else:
        toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--iterations", 4)
        last = 1 / 4
    assert len(made) == (2 if stage == "ppo" else 1)
    for optimiser, lr, more in made:
        *groups, sharpness = optimiser.param_groups if optimiser is made[0][0] else [*optimiser.param_groups, None]
        assert {id(p) for group in groups for p in group["params"] if p.requires_grad} <= clipped
        assert {round(group["lr"] / lr, 6) for group in groups} == {last}
        assert stage == "dpo" or more == {"betas": (0.9, 0.999), "eps": 1e-5}
        if sharpness:
            assert not {id(p) for p in sharpness["params"]} & clipped and sharpness["lr"] == pytest.approx(0.02 * last)


@pytest.mark.parametrize("reader", [False, True])
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_reward_model_scores_with_its_shift(stage, reader, monkeypatch, tmp_path, tokenizer):
    model = ScalarModel(tiny(tokenizer, seed=5), tiny(tokenizer, seed=6) if reader else None)
    save_checkpoint(tmp_path / "reward", model, tokenizer, reward_shift=0.7, reward_scale=1.0)
    shifts, heard, values, rollouts, roll = set(), [], rlhf.response_values, [], rlhf.sample_rollout
    monkeypatch.setattr(rlhf, "response_values", lambda critic, ids, mask, shift, told: (
        shifts.add(shift), heard.append((critic, ids, mask, told)), values(critic, ids, mask, shift, told))[2])
    monkeypatch.setattr(rlhf, "sample_rollout", lambda *args: rollouts.append((args[3], roll(*args))) or rollouts[-1][1])
    toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--reward", tmp_path / "reward", "--iterations", 1)
    assert shifts == ({0.7} if stage == "ppo" else set())
    for critic, ids, mask, told in heard if reader else []:  # what was kept is what the reader says of these rows
        real = mask.flip(1).cumsum(1).flip(1).bool()  # up to the last token
        assert torch.allclose(told[real], surprisals(critic.reader, ids)[real], atol=1e-5)
    prompts, rollout = rollouts[0]
    raw = score(load_reward(tmp_path / "reward")[0], [p.ids for p in prompts], rollout.responses, tokenizer.pad_id)
    assert torch.allclose(rollout.score, raw - 0.7, atol=1e-5)


def test_the_critic_takes_as_many_numbers_as_its_reader_tells(monkeypatch, tmp_path, tokenizer):
    save_checkpoint(tmp_path / "reward", ScalarModel(tiny(tokenizer, seed=5), tiny(tokenizer, seed=6)), tokenizer,
                    reward_shift=0.7, reward_scale=1.0)
    first, tell = rlhf.first_critic, rlhf.surprisals

    def told_more(*args):
        critic = first(*args)
        critic.surprisal = torch.nn.Linear(3, critic.config.width, bias=False)
        return critic
    monkeypatch.setattr(rlhf, "first_critic", told_more)
    monkeypatch.setattr(rlhf, "surprisals", lambda *args: torch.nn.functional.pad(tell(*args), (0, 1), value=0.5))
    done, _ = toy("ppo", monkeypatch, tmp_path, tokenizer, tmp_path / "ppo", "--reward", tmp_path / "reward", "--iterations", 1)
    assert done["heldout_kl"] >= 0


def test_no_heldout_prompt_is_practised(tokenizer, tmp_path):
    rows = [{"instruction": f"the cat {n % 30}", "output": "x"} for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = rlhf.PPOConfig(data=[str(tmp_path / "prompts.jsonl")], holdout=15, max_new_tokens=9)
    prompts, heldout = rlhf.load_prompts(config, tokenizer, 10**6)
    assert len(prompts) == 25 and [p.text for p in heldout] == [f"the cat {n}" for n in range(25, 30)]
    rows = [{"prompt": f"the cat {n}", "chosen": "x", "rejected": "y"} | ({"p": 0.9} if n < 10 else {}) for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts, heldout = rlhf.load_prompts(config, tokenizer, 10**6)  # marked rows, not the last ones
    assert len(prompts) == 30 and [p.text for p in heldout] == [f"the cat {n}" for n in range(10)]


@pytest.mark.parametrize("stage, settings", [("ppo", []), ("grpo", []), ("grpo", ["--aggregation", "token"])])
def test_parts_of_a_minibatch_give_its_gradient_and_statistics(stage, settings, monkeypatch, tmp_path, tokenizer):
    """Of unlike length, so that a part's share of the rows is not its share of the tokens."""
    found, seen = {}, watched(monkeypatch, parts_by_length=2)
    for size in (64, 5):
        out = tmp_path / f"{stage}{size}"
        _, rows = toy(stage, monkeypatch, tmp_path, tokenizer, out, *settings, "--iterations", 2, "--epochs", 1,
                      "--minibatches", 2, "--stop-kl", 9, "--micro-batch", size)
        found[size] = load_policy(out)[0].state_dict(), rows[0]
        assert set(seen["parts_by_length"][-4:]) == {size}
    start = load_policy(tmp_path / "sft")[0].state_dict()
    for name, whole in found[64][0].items():
        moved = (whole - start[name]).abs().max()
        assert (found[5][0][name] - whole).abs().max() < 0.05 * moved, name
    for name in {"policy_loss", "approx_kl", "clip_fraction", "value_loss", "k3"} & set(found[64][1]):
        assert found[5][1][name] == pytest.approx(found[64][1][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_bfloat16_learns_and_its_first_ratio_is_1(stage, monkeypatch, tmp_path, tokenizer):
    """Exactly: rollout and update round alike. Were one of them in float32, approx_kl would be 3e-5."""
    out, half = tmp_path / stage, ["--dtype", "bfloat16"]
    once = ["--iterations", 1, "--epochs", 1, "--minibatches", 1]
    _, exact = toy(stage, monkeypatch, tmp_path, tokenizer, out, *once)
    _, rows = toy(stage, monkeypatch, tmp_path, tokenizer, out, *once, *half)
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-6) and rows[0]["approx_kl"] < 1e-6
    assert 0 < abs(rows[0]["entropy"] - exact[0]["entropy"]) < 0.02  # the same samples, read in bfloat16
    done, _ = toy(stage, monkeypatch, tmp_path, tokenizer, out, *half, "--iterations", 8, "--lr", 2e-2)
    assert done["heldout_score"] > done["heldout_score_before"] + 0.2


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_before_the_first_update_the_ratio_is_1_and_the_kl_0(stage, monkeypatch, tmp_path, tokenizer):
    """At a temperature other than 1, which every log-prob must know."""
    _, rows = toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--temperature", 0.7,
                  "--iterations", 1, "--epochs", 1, "--minibatches", 1)
    first = rows[0]
    assert first["ratio"] == pytest.approx(1, abs=1e-4) and first["clip_fraction"] == 0
    assert first["approx_kl"] == pytest.approx(0, abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-4)


def test_lora_starts_as_the_model_and_is_merged_into_a_plain_one(tokenizer):
    plain = tiny(tokenizer)
    ids = torch.randint(tokenizer.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    before = plain(ids).detach()
    model = copy.deepcopy(plain)
    add_lora(model, 3)
    copied = merged(plain)
    assert torch.equal(model(ids), before) and torch.equal(copied(ids), before)
    where = [{t.data_ptr() for t in (*each.parameters(), *each.buffers())} for each in (plain, copied)]
    assert len(where[0]) == len(where[1]) and not where[0] & where[1]
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 4 * 2 and all(name.endswith((".a", ".b")) for name in learning)
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(p, std=0.1)
    after, whole = model(ids).detach(), merged(model)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(whole(ids), after, atol=1e-5)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(ids), after)  # the model that learns on is as it was
    by_hand = plain.blocks[0].mlp.down.weight + 16 / 3 * model.blocks[0].mlp.down.b @ model.blocks[0].mlp.down.a  # α/r B A
    assert torch.allclose(whole.blocks[0].mlp.down.weight, by_hand, atol=1e-5)


def test_grpo_has_no_critic(monkeypatch, tmp_path, tokenizer):
    """It would be a whole model more in memory, if only for a moment."""
    made = []
    monkeypatch.setattr(rlhf, "ScalarModel", lambda *args: made.append(args) or ScalarModel(*args))
    monkeypatch.setattr(rlhf, "first_critic", lambda *args: made.append(args))
    toy("grpo", monkeypatch, tmp_path, tokenizer, tmp_path / "grpo", "--iterations", 1)
    assert not made


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_lora_learns_and_leaves_a_plain_checkpoint(stage, monkeypatch, tmp_path, tokenizer):
    if stage == "dpo":
        done, _ = toy_dpo(monkeypatch, tmp_path, tokenizer, "--lr", "1e-2", "--lora", 4, "--sharpness-lr", 0)
        assert done["heldout_margin"] > 0.5
    else:
        done, _ = toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--iterations", 25, "--lora", 4,
                      "--lr", "1e-2", "--sharpness-lr", 0)  # which would learn without it
        assert done["heldout_score"] > done["heldout_score_before"] + 0.05
    start, end = (load_policy(tmp_path / name)[0].state_dict() for name in ("sft", stage))
    assert torch.equal(start["embed.weight"], end["embed.weight"])  # frozen
    assert not torch.equal(start["blocks.0.mlp.down.weight"], end["blocks.0.mlp.down.weight"])


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_text_of_pretraining_is_read_again_on_the_side(stage, monkeypatch, tmp_path, tokenizer):
    """With --replay-data a text is known better than before, and the stage still learns."""
    text = tmp_path / "old.txt"
    text.write_text("the dog sat on the log and the cat sat on the mat and " * 20)
    tokens = load_replay([text], tokenizer, 1, 24)
    with pytest.raises(InputError, match="expected more than a window of 512"):  # not first in an update
        load_replay([text], tokenizer, 1, 9999)
    replay = ["--replay-data", text, "--replay", 2]
    if stage == "dpo":
        done, _ = toy_dpo(monkeypatch, tmp_path, tokenizer, *replay)
        assert done["heldout_margin"] > 0.5
    else:
        done, _ = toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--iterations", 15, *replay)
        assert done["heldout_score"] > done["heldout_score_before"] + 0.1
    with torch.no_grad():
        before, after = (replay_loss(load_policy(tmp_path / name)[0], tokens, 8, torch.Generator().manual_seed(1)).item()
                         for name in ("sft", stage))
    assert after < before - 1


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_every_update_reads_another_text(stage, monkeypatch, tmp_path, tokenizer):
    (tmp_path / "old.txt").write_text("the dog sat on the log and the cat sat on the mat and " * 20)
    states, windows, loss = [], [], rlhf.replay_loss
    monkeypatch.setattr(rlhf, "replay_loss", lambda *args: (
        states.append(args[3].get_state().numpy().tobytes()), windows.append(args[2]), loss(*args))[2])
    args = ["--lr", 0, "--sharpness-lr", 0, "--replay-data", tmp_path / "old.txt", "--replay", 3]
    if stage == "dpo":
        toy_dpo(monkeypatch, tmp_path, tokenizer, *args, "--epochs", 1)
    else:
        toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--iterations", 2, *args)
    assert len(set(states)) == len(states) >= 8 and set(windows) == {3}


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_held_out_prompts_are_answered_alike_before_and_after(stage, monkeypatch, tmp_path, tokenizer):
    asked, roll = [], rlhf.sample_rollout
    monkeypatch.setattr(rlhf, "sample_rollout", lambda *args: (asked.append([p.text for p in args[3]]), roll(*args))[1])
    done, _ = toy(stage, monkeypatch, tmp_path, tokenizer, tmp_path / stage, "--iterations", 1, "--lr", 0, "--sharpness-lr", 0)
    before, practised, after = asked
    assert before == after == [f"the cat {n}" for n in range(30, 40)] and not set(practised) & set(before)
    assert done["heldout_score"] == done["heldout_score_before"]


def test_a_long_context_is_not_filled_with_text_of_pretraining(tokenizer):
    """One window of 40,000 tokens would take more memory than all else."""
    model, read = tiny(tokenizer), []
    model.config.context_length = 9999
    tokens = torch.arange(700) % tokenizer.vocab_size
    model.hidden = lambda ids: read.append(ids.shape) or torch.zeros(*ids.shape, model.config.width, requires_grad=True)
    replay_loss(model, tokens, 3, torch.Generator().manual_seed(1))
    assert read == [(3, 512)]


def test_families_choose_the_prompts(tokenizer):
    config = rlhf.PPOConfig(families=["harmful"], prompts=40, eval_prompts=5, max_new_tokens=9)
    prompts, heldout = rlhf.load_prompts(config, tokenizer, 10**6)
    assert len(prompts) == 40 and 0 < len(heldout) <= 5
    harmful = {task.prompt for task in rlhf.world.all_tasks()["harmful"]}
    assert all(harmful.intersection(rlhf.world.unspoken(prompt.text)) for prompt in prompts + heldout)


def test_all_families_and_some_of_them_more(tokenizer):
    def seen(families):
        config = rlhf.PPOConfig(families=families, prompts=220, eval_prompts=5, max_new_tokens=9)
        return [prompt.text for prompt in rlhf.load_prompts(config, tokenizer, 10**6)[0]]
    everything = list(rlhf.world.DEMONSTRATED)
    assert seen(["all", "howto", "harmful", "howto"]) == seen(everything + ["howto", "harmful", "howto"]) != seen(everything)


@pytest.mark.parametrize("episodes, parts, sizes", [(10, 4, [3, 3, 2, 2]), (128, 48, [3] * 32 + [2] * 16), (8, 2, [4, 4])])
def test_a_pass_has_as_many_updates_as_asked_for(episodes, parts, sizes):
    config = rlhf.PPOConfig(episodes=episodes, minibatches=parts, epochs=2)
    found = list(rlhf.minibatches(config, torch.Generator().manual_seed(0)))
    assert [len(rows) for rows in found] == 2 * sizes
    assert sorted(torch.cat(found[:parts]).tolist()) == [*range(episodes)] != torch.cat(found[:parts]).tolist()


def test_the_logits_that_a_rollout_is_read_with_are_bounded(tokenizer, monkeypatch):
    seen, read_all = [], rlhf.read_all
    monkeypatch.setattr(rlhf, "read_all", lambda f, ids, mask, chunk: seen.append((chunk, ids.size(1))) or read_all(
        f, ids, mask, chunk=chunk))
    _, rollout = roll(tokenizer, eager_to_stop(tokenizer))
    monkeypatch.setattr(rlhf, "LOGITS", 7 * seen[0][1] * tokenizer.vocab_size // 2)
    _, again = roll(tokenizer, eager_to_stop(tokenizer))
    assert [chunk for chunk, _ in seen] == [64, 64, 3, 3]
    assert torch.allclose(again.logp, rollout.logp, atol=1e-5)


def test_grpo_refuses_groups_that_do_not_fit(monkeypatch, tmp_path, tokenizer):
    for args, message in ((["--group", 1], "--group 1"), (["--episodes", 60], "multiple of --group 8"),
                          (["--families", "poems", "--data", "world"], "--families poems")):
        with pytest.raises(InputError, match=message):
            toy("grpo", monkeypatch, tmp_path, tokenizer, tmp_path / "grpo", *args)
