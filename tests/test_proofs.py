"""Every formula against an independent one, and the theorem that the method stands on.

Here an oracle is a formula written out in plain numpy, a finite difference in float64, a closed form,
or somebody else's code. `measured` notes each error; tests/README.md lists them.
"""

import json
import math
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import rlhf
import training
from model import GPT, GPTConfig, MLP, Attention, RMSNorm, rope_tables, rotate, token_logprobs
from reward import preference_loss
from sft import answer_loss
from test_rlhf import ragged
from tokenizer import train_bpe
from training import load_policy, save_checkpoint


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the parts of the network, from their formulas -----------------------------------------------

def largest(found, expected):
    """The largest difference, relative to the largest value."""
    expected = np.asarray(expected)
    return np.abs(found.detach().numpy() - expected).max() / np.abs(expected).max()


def test_rms_norm(measured):
    norm, x = RMSNorm(6, eps=0.1), random(2, 3, 6).float()
    norm.weight.data = random(6, seed=1).float()
    rows = x.double().numpy()
    expected = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 0.1) * norm.weight.detach().numpy()
    measured("RMSNorm", "numpy: x / √(mean x² + ε) · g", largest(norm(x), expected), 1e-6)


def test_rope_turns_pairs_by_their_angle(measured):
    config = GPTConfig(vocab_size=9, context_length=7, width=12, heads=2, kv_heads=2, head_dim=6, rope_theta=50)
    x = random(1, 7, 2, 6)
    cos, sin = rope_tables(config)
    expected = np.empty(x.shape)
    for t in range(7):
        for i in range(3):  # a complex number per pair, times e^(i angle)
            pair = x[0, t, :, i].numpy() + 1j * x[0, t, :, i + 3].numpy()
            turned = pair * np.exp(1j * t * 50 ** (-2 * i / 6))
            expected[0, t, :, i], expected[0, t, :, i + 3] = turned.real, turned.imag
    found = rotate(x.float(), cos.unsqueeze(-2), sin.unsqueeze(-2))
    measured("RoPE", "numpy: (x₁ + i x₂) · exp(i t θ^(−2j/D))", largest(found, expected), 1e-6)


def test_swiglu(measured):
    config = GPTConfig(vocab_size=9, width=8, ffn_width=12)
    mlp, x = MLP(config), random(5, 8).float()
    gate, up = (x @ part.T for part in mlp.gate_up.weight.chunk(2))
    gate, up, down = (tensor.detach().double().numpy() for tensor in (gate, up, mlp.down.weight))
    expected = (gate / (1 + np.exp(-gate)) * up) @ down.T
    measured("SwiGLU", "numpy: down(gate · σ(gate) · up)", largest(mlp(x), expected), 1e-6)


def test_attention(measured):
    """Grouped queries, no positions: softmax(q kᵀ / √D) v over the past, head by head."""
    config = GPTConfig(vocab_size=9, context_length=5, width=8, heads=4, kv_heads=2, head_dim=6, qk_norm=False)
    attention, x = Attention(config), random(1, 5, 8).float()
    still = torch.ones(5, 1, 6), torch.zeros(5, 1, 6)  # angles of 0
    qkv = (x[0] @ attention.qkv.weight.T).detach().double().numpy().reshape(5, 8, 6)
    mixed = np.zeros((5, 4, 6))
    for h in range(4):
        q, k, v = qkv[:, h], qkv[:, 4 + h // 2], qkv[:, 6 + h // 2]
        for t in range(5):
            weights = np.exp(q[t] @ k[:t + 1].T / math.sqrt(6))
            mixed[t, h] = weights / weights.sum() @ v[:t + 1]
    expected = mixed.reshape(5, 24) @ attention.out.weight.detach().double().numpy().T
    found = attention(x, *still, None, None, 0)[0]
    measured("attention", "numpy: softmax(q kᵀ / √D) v, head by head", largest(found, expected), 1e-5)


# ---- gradients against finite differences in float64 ---------------------------------------------

def gradient_error(loss, *tensors, h=1e-6):
    """Largest difference of autograd's gradient from (f(x + h) − f(x − h)) / 2h, relative to the
    largest entry."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(loss(*tensors), tensors)
    worst, size = 0.0, max(gradient.abs().max().item() for gradient in gradients)
    with torch.no_grad():
        for tensor, gradient in zip(tensors, gradients):
            flat, found = tensor.view(-1), gradient.flatten()
            for i in range(len(flat)):
                kept = flat[i].item()
                ends = []
                for x in (kept + h, kept - h):
                    flat[i] = x
                    ends.append(loss(*tensors).item())
                flat[i] = kept
                worst = max(worst, abs((ends[0] - ends[1]) / (2 * h) - found[i].item()))
    return worst / size


def table(seed, *lengths):
    mask, *tables = ragged(seed, *lengths)
    return mask, *(table.double() for table in tables)


def test_gradient_of_cross_entropy(measured):
    targets = torch.tensor([[3, -100, 0, 4], [-100, -100, 2, -100]])

    def loss(states, head):  # answer_loss, of a model whose states we hold
        return answer_loss(SimpleNamespace(hidden=lambda ids: states, head=lambda h: h @ head.T), None, targets)
    measured("gradient of answer_loss", "finite differences, float64",
             gradient_error(loss, random(2, 4, 3), random(5, 3, seed=1)), 1e-7)


def test_gradient_of_preference_loss(measured):
    measured("gradient of preference_loss", "finite differences, float64",
             gradient_error(preference_loss, 3 * random(6), 3 * random(6, seed=1)), 1e-7)


def test_gradient_of_dpo_loss(measured):
    reference = 9 * random(2, 6, seed=2)

    def loss(chosen, rejected):
        return rlhf.dpo_loss(chosen, rejected, *reference, 0.3, 0.1)[0]
    measured("gradient of dpo_loss", "finite differences, float64",
             gradient_error(loss, 9 * random(6), 9 * random(6, seed=1)), 1e-7)


def test_gradient_of_ppo_loss(measured):
    mask, logp, old, advantages = table(1, 5, 1, 3)
    _, values, old_values, returns = table(2, 5, 1, 3)

    def loss(logp, values):
        return rlhf.ppo_loss(logp, old, advantages, values, old_values, returns, mask)[0]
    measured("gradient of ppo_loss", "finite differences, float64",
             gradient_error(loss, old + 0.3 * logp, values), 1e-7)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_gradient_of_grpo_loss(aggregation, measured):
    mask, logp, old, ref = table(3, 5, 1, 3)

    def loss(logp):
        return rlhf.grpo_loss(logp, old, ref, random(3, seed=4), mask, beta=0.7, aggregation=aggregation)[0]
    measured(f"gradient of grpo_loss, {aggregation}", "finite differences, float64",
             gradient_error(loss, old + 0.3 * logp), 1e-7)


# ---- optimisers -----------------------------------------------------------------------------------

def quadratic_steps(make, shape, steps=5):
    """A matrix after some steps down a fixed, uneven quadratic."""
    p = torch.nn.Parameter(random(*shape).float())
    target, weight = random(*shape, seed=1).float(), random(*shape, seed=2).float().exp()
    optimiser = make(p)
    for _ in range(steps):
        optimiser.zero_grad()
        (weight * (p - target)**2).sum().backward()
        optimiser.step()
    return p.detach()


def test_adamw_step(measured):
    """Against the algorithm of arXiv 1711.05101, written out; decay on the matrix."""
    lr, decay, b1, b2, eps = 0.1, 0.3, 0.9, 0.95, 1e-8

    class Model(torch.nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p = p
    found = quadratic_steps(lambda p: training.adamw(Model(p), lr, decay, (b1, b2), eps), (4, 3))
    p, target, weight = (random(4, 3).float().double().numpy(), random(4, 3, seed=1).float().double().numpy(),
                         random(4, 3, seed=2).float().exp().double().numpy())
    m = v = np.zeros((4, 3))
    for t in range(1, 6):
        gradient = 2 * weight * (p - target)
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        p = p * (1 - lr * decay) - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    gain = torch.nn.Parameter(torch.ones(3))
    gain.grad = torch.zeros(3)
    training.adamw(Model(gain), lr, decay).step()
    assert torch.equal(gain, torch.ones(3))  # decay is for matrices
    measured("AdamW, five steps", "numpy: algorithm 2 of arXiv 1711.05101", largest(found, p), 1e-5)


def test_muon_step(measured):
    """Against torch's own, which iterates in bfloat16: hence the tolerance, in units of one step."""
    lr = 0.1
    ours = quadratic_steps(lambda p: training.Muon([p], lr, momentum=0.9, weight_decay=0.1), (16, 16))
    theirs = quadratic_steps(lambda p: torch.optim.Muon([p], lr, momentum=0.9, weight_decay=0.1, ns_steps=3),
                             (16, 16))
    measured("Muon, five steps of a square matrix", "torch.optim.Muon (in bfloat16)",
             ((ours - theirs).norm() / (5 * lr * 4)).item(), 0.02)  # a step of orthogonal ones has norm √16


# ---- other people's losses ------------------------------------------------------------------------

def trainer(**settings):
    """A stand-in for a trainer of TRL that has these attributes and is alone on its machine."""
    alone = SimpleNamespace(device="cpu", num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x)
    return mock.MagicMock(accelerator=alone, current_gradient_accumulation_steps=1, **settings)


def test_dpo_loss_agrees_with_trl(measured):
    """From logits to loss, prompts and padding included, our own functions against TRL's."""
    trl = pytest.importorskip("trl")
    logits, reference = 3 * random(2, 4, 6, 11).float()  # (4, 6, 11) each: two chosen, two rejected rows
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    real = torch.arange(6) < torch.tensor([6, 4, 5, 6])[:, None]
    answer = real & (torch.arange(6) >= torch.tensor([2, 3, 2, 3])[:, None])

    def summed(logits):
        model = SimpleNamespace(hidden=lambda ids: logits, head=lambda h: h)
        return rlhf.response_logprobs(model, ids, answer.long()).sum(1).chunk(2)
    chosen, rejected = summed(reference)
    himself = trainer(ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=0.3,
                      loss_types=["sigmoid"], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False,
                      aux_loss_enabled=False, _truncate_inputs=lambda *tables: tables)
    theirs = trl.DPOTrainer._compute_loss(
        himself, lambda **kwargs: SimpleNamespace(logits=logits), {
            "input_ids": ids, "attention_mask": real.long(), "completion_mask": answer.long(),
            "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, False)
    ours, _ = rlhf.dpo_loss(*summed(logits), chosen, rejected, 0.3)
    measured("response_logprobs and dpo_loss", f"TRL {trl.__version__}", abs(theirs - ours).item(), 1e-5, peer=True)


@pytest.mark.parametrize("aggregation, their_name", [("sequence", "grpo"), ("token", "bnpo")])
def test_grpo_loss_agrees_with_trl(aggregation, their_name, measured):
    trl = pytest.importorskip("trl")
    mask, logp, old, ref = table(5, 5, 1, 3)
    logp, advantages = old + 0.3 * logp, random(3, seed=6)
    himself = trainer(top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.7, epsilon_low=0.2,
                      importance_sampling_level="token", epsilon_high=0.2, loss_type=their_name, use_vllm=False,
                      args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
                      _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, logp))
    blank = torch.zeros(3, 1)
    theirs = trl.GRPOTrainer._compute_loss(himself, None, {
        "prompt_ids": blank, "prompt_mask": blank, "completion_ids": mask, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref})
    ours, _ = rlhf.grpo_loss(logp, old, ref, advantages, mask, 0.2, 0.7, aggregation)
    measured(f"grpo_loss, {aggregation}", f"TRL {trl.__version__}, “{their_name}”", abs(theirs - ours).item(), 1e-6, peer=True)


def test_preference_loss_agrees_with_trl(measured):
    trl = pytest.importorskip("trl")
    rewards = 3 * random(8, 1)
    himself = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = trl.RewardTrainer.compute_loss(himself, lambda **kwargs: SimpleNamespace(logits=rewards),
                                            {"attention_mask": torch.ones(8, 1)})
    measured("preference_loss", f"TRL {trl.__version__}",
             abs(theirs - preference_loss(*rewards.flatten().chunk(2))).item(), 1e-12, peer=True)


# ---- the theorem ----------------------------------------------------------------------------------
# max E[r] − β KL(π ‖ π_ref) has the solution π*(y) ∝ π_ref(y) exp(r(y)/β). A table of all answers of
# two tokens is a policy of which everything is known.

K, BETA = 3, 0.5


class Tree(torch.nn.Module):
    """A policy, or a critic, over answers of two of K tokens: a logit for each token in each state."""

    def __init__(self, seed, scale=1.0):
        super().__init__()
        self.first = torch.nn.Parameter(scale * random(K, seed=seed))
        self.second = torch.nn.Parameter(scale * random(K, K, seed=seed + 1))

    def logprobs(self, y):
        """(N, 2) answers -> (N, 2)."""
        return torch.stack([self.first.log_softmax(-1)[y[:, 0]],
                            self.second.log_softmax(-1)[y[:, 0], y[:, 1]]], 1)


EVERY = torch.cartesian_prod(torch.arange(K), torch.arange(K))  # (K², 2)
REWARD = random(K * K, seed=5)


def optimum(reference):
    return (reference.logprobs(EVERY).sum(1) + REWARD / BETA).softmax(0).detach()


def total_variation(p, q):
    """The largest difference of probability that p and q give to any set of answers."""
    return 0.5 * (p - q).abs().sum().item()


def test_the_optimum_is_the_optimum():
    """Of the objective itself: no other distribution has a higher value."""
    reference = Tree(1)
    ref, best = reference.logprobs(EVERY).sum(1).exp(), optimum(reference)

    def value(p):
        return (p * (REWARD - BETA * (p.log() - ref.log()))).sum()
    for seed in range(50):
        other = (best.log() + 0.1 * random(K * K, seed=seed)).softmax(0)
        assert value(other) < value(best)
    assert total_variation(best, ref) > 0.3  # there is a way to go


def test_ppo_reaches_the_optimum(measured):
    """The steps of rlhf.ppo on the table: no whitening, decaying rates."""
    torch.manual_seed(0)
    reference, policy, critic = Tree(1), Tree(1), Tree(3, scale=0.0)
    best = optimum(reference)
    optimiser = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=0.03)
    mask, steps = torch.ones(2048, 2), 250
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = training.learning_rate(step, steps, 0.03)
        with torch.no_grad():
            drawn = torch.multinomial(policy.logprobs(EVERY).sum(1).exp(), 2048, replacement=True)
            y = EVERY[drawn]
            old, ref = policy.logprobs(y), reference.logprobs(y)

        def values():  # of the state before each token
            return torch.stack([critic.first[0].expand(len(y)), critic.second[0][y[:, 0]]], 1)
        old_values = values().detach()
        rollout = SimpleNamespace(logp=old, ref_logp=ref, mask=mask, score=REWARD[drawn])
        advantages, returns = rlhf.gae(rlhf.token_rewards(rollout, BETA), old_values, mask, 1.0, 0.95)
        for _ in range(2):
            loss, _ = rlhf.ppo_loss(policy.logprobs(y), old, advantages, values(), old_values, returns, mask,
                                    value_coef=1.0)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    measured("PPO on a table of answers", "π_ref exp(r/β) / Z, total variation",
             total_variation(policy.logprobs(EVERY).sum(1).exp(), best), 0.02)


def test_dpo_reaches_the_optimum(measured):
    """From exact Bradley-Terry labels of every pair; a smoothing of 1 − p makes the label soft."""
    reference, policy = Tree(1), Tree(1)
    i, j = torch.cartesian_prod(torch.arange(K * K), torch.arange(K * K)).T
    p = torch.sigmoid(REWARD[i] - REWARD[j])
    ref = reference.logprobs(EVERY).sum(1).detach()
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.1)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = training.learning_rate(step, 400, 0.1)
        logp = policy.logprobs(EVERY).sum(1)
        loss, _ = rlhf.dpo_loss(logp[i], logp[j], ref[i], ref[j], BETA, label_smoothing=1 - p)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    measured("DPO on a table of answers", "π_ref exp(r/β) / Z, total variation",
             total_variation(policy.logprobs(EVERY).sum(1).exp(), optimum(reference)), 1e-3)


def test_grpo_reaches_another_optimum(measured):
    """The estimate k3, differentiated, is KL(π_ref ‖ π) in expectation, so GRPO's fixed point is not
    π_ref exp(r/β) but, with a = 1 − 1/G from the group's mean, π = β π_ref / (β + a (E r − r))."""
    torch.manual_seed(0)
    group, reference = 8, random(4, seed=1)
    logits, reward = torch.nn.Parameter(reference.clone()), random(4, seed=6)
    ref, share = reference.softmax(0), (1 - 1 / group) / BETA
    low, high = reward.max() - 1 / share, reward.max()  # E r lies where every π is positive
    for _ in range(100):
        mean = (low + high) / 2
        total = (ref / (1 + share * (mean - reward))).sum()
        low, high = (mean, high) if total > 1 else (low, mean)
    fixed = ref / (1 + share * (mean - reward))

    optimiser = torch.optim.Adam([logits], lr=0.03)
    mask, steps = torch.ones(2048, 1), 300
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = training.learning_rate(step, steps, 0.03)
        y = torch.multinomial(logits.detach().softmax(0), 2048, replacement=True)
        old = token_logprobs(logits.detach().expand(2048, 1, -1), y[:, None])
        advantages = rlhf.grpo_advantages(reward[y].view(-1, group), standardise=False).flatten()
        logp = logits.log_softmax(0)[y][:, None]
        loss, _ = rlhf.grpo_loss(logp, old.double(), ref.log()[y][:, None], advantages, mask, beta=BETA)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = logits.detach().softmax(0)
    measured("GRPO on a table of answers", "β π_ref / (β + (1 − 1/G)(E r − r)), total variation",
             total_variation(found, fixed), 0.02)
    assert total_variation(found, (ref.log() + reward / BETA).softmax(0)) > 0.05


# ---- whole runs with a known optimum ---------------------------------------------------------------

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A policy that begins its answers with anything, and a reward of 1 for beginning with "a"."""
    folder = tmp_path_factory.mktemp("known")
    tokenizer = train_bpe(["a b c d e f g h\n"] * 3, 290)
    torch.manual_seed(0)
    policy = GPT(GPTConfig(tokenizer.vocab_size, context_length=48, layers=1, heads=2, kv_heads=2, width=32,
                           ffn_width=64))
    save_checkpoint(folder / "sft", policy, tokenizer)
    (folder / "score.py").write_text("def a(prompt, response):\n    return float(response.startswith('a'))\n")
    prompts = [{"instruction": f"b c {n}", "output": "d"} for n in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    pairs = [{"prompt": f"b c {n}", "chosen": "a", "rejected": "bcdefgh"[n % 7]} for n in range(400)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def run_rlhf(monkeypatch, folder, stage, *args):
    monkeypatch.setattr(sys, "argv", ["rlhf.py", stage, "--init", str(folder / "sft"), "--out",
                                      str(folder / stage), "--device", "cpu", *map(str, args)])
    rlhf.main()
    return json.loads((folder / stage / "done").read_text("utf-8"))


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_rollout_stages_reach_a_known_optimum(stage, start, monkeypatch, noted):
    found = run_rlhf(monkeypatch, start, stage, "--reward", f"{start / 'score.py'}:a", "--data",
                     start / "prompts.jsonl", "--holdout", 10, "--iterations", 25, "--episodes", 128,
                     "--max-new-tokens", 1, "--no-eos-score", "nan", "--beta", 0, "--lr", "1e-2",
                     "--stop-kl", 9)
    noted("learning", f"{stage.upper()} paid for answers that begin with “a”",
          f"{found['heldout_score_before']:.2f} → {found['heldout_score']:.2f}", "1")
    assert found["heldout_score_before"] < 0.1 and found["heldout_score"] >= 0.99


def test_dpo_reaches_a_known_optimum(start, monkeypatch, noted):
    """Of "a" and seven other letters, "a" is always chosen: all their probability should be its own."""
    run_rlhf(monkeypatch, start, "dpo", "--data", start / "pairs.jsonl", "--holdout", 40, "--lr", "1e-2",
             "--beta", 0.1, "--epochs", 3)
    shares = []
    for folder in ("sft", "dpo"):
        model, tokenizer = load_policy(start / folder)
        prompt, _ = rlhf.render_chat(tokenizer, [{"role": "user", "content": "b c 999"}], generation_prompt=True)
        letters = [tokenizer.encode(letter)[0] for letter in "abcdefgh"]
        with torch.no_grad():
            shares.append(model(torch.tensor([prompt]))[0, -1, letters].softmax(0)[0].item())
    noted("learning", "DPO, “a” chosen over seven other letters", f"{shares[0]:.2f} → {shares[1]:.2f}", "1")
    assert shares[0] < 0.3 and shares[1] > 0.99
