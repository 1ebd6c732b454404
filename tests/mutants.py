"""Plant realistic mistakes, one at a time, and see that the tests find every one.

    python tests/mutants.py            # all of them, several minutes; `make test-all` does it too
    python tests/mutants.py 7 12       # some, by number

Each is planted in a copy of the code and runs the tests mapped to it, up to the first failure. If all
are found, the table goes into tests/README.md; the exit status is 1 if a mistake lived.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import write_sections

HERE = Path(__file__).resolve().parents[1]
MUTANTS = (  # the mistake; file; what stands there; what it becomes; the tests that should see it
    # ---- model
    ("RMSNorm divides by the mean, not its root", "model.py",
     "torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)",
     "1 / (x.float().square().mean(-1, keepdim=True) + self.eps)", "test_model.py"),
    ("RoPE turns the wrong way", "model.py", "torch.cat([-sin, sin], -1)", "torch.cat([sin, -sin], -1)",
     "test_model.py"),
    ("gate and up of SwiGLU swapped", "model.py", "gate, up = self.gate_up(x)", "up, gate = self.gate_up(x)",
     "test_model.py"),
    ("attention is not causal", "model.py", "is_causal=mask is None and T > 1", "is_causal=False",
     "test_model.py"),
    ("attention in bfloat16 is not causal", "model.py", ".triu(1)", ".triu(T)", "test_model.py"),
    ("heads that share keys get others'", "model.py", "t.repeat_interleave(H // K, dim=1)", "t.repeat(1, H // K, 1, 1)",
     "test_model.py"),
    ("a token cannot see itself", "model.py", "mask = column <= row", "mask = column < row", "test_model.py"),
    ("padding is attended to", "model.py", "(mask & real[:, None, :] | (column == row))",
     "(mask & real[:, None, :] | mask)", "test_model.py"),
    ("positions count padding", "model.py", "(real.cumsum(1) - 1).clamp(min=0)[:, past:]",
     "torch.arange(real.size(1), device=ids.device).expand(real.shape)[:, past:]", "test_model.py"),
    ("cache position off by one", "model.py", "keys[:, :, self.length : end] = k",
     "keys[:, :, self.length - 1 : end - 1] = k", "test_model.py"),
    ("no residual around the MLP", "model.py", "return x + self.mlp(self.mlp_norm(x))",
     "return self.mlp(self.mlp_norm(x))", "test_model.py"),
    ("the final norm is missing", "model.py", "return self.norm(x[:, :asked])", "return x[:, :asked]", "test_model.py"),
    ("temperature missing in log-probs", "model.py", "        logits = logits / temperature\n    return",
     "        logits = logits\n    return", "test_model.py"),
    ("top-p drops the token that crosses p", "model.py", "probs.cumsum(-1) - probs >= top_p",
     "probs.cumsum(-1) >= top_p", "test_model.py"),
    ("the end token is not returned", "model.py", "        for row, token, logprob in drawn:\n",
     "        for row, token, logprob in drawn:\n            if token in eos_ids:\n                continue\n",
     "test_model.py"),
    ("a row runs past its own end", "model.py", "done[row] or token in eos_ids or", "done[row] or", "test_model.py"),
    ("fresh blocks are not the identity", "model.py", "            nn.init.zeros_(block.mlp.down.weight)\n", "",
     "test_model.py"),
    # ---- tokenizer and data
    ("the end token is not supervised", "tokenizer.py",
     "add([*tokenizer.encode(message[\"content\"]), tokenizer.im_end_id], int(role == \"assistant\"))",
     "add(tokenizer.encode(message[\"content\"]), int(role == \"assistant\"))\n        add([tokenizer.im_end_id], 0)",
     "test_tokenizer.py"),
    ("the user's turn is supervised too", "tokenizer.py", "int(role == \"assistant\")", "int(role != \"system\")",
     "test_tokenizer.py"),
    ("the role header is supervised", "tokenizer.py", "        add(header(role), 0)\n",
     "        add(header(role), int(role == \"assistant\"))\n", "test_tokenizer.py"),
    ("outdated pair counts are believed", "tokenizer.py", "        if -count != counts[pair]:", "        if False:",
     "test_tokenizer.py"),
    ("pair counts ignore how often a word occurs", "tokenizer.py", "            counts[pair] += frequency[w]",
     "            counts[pair] += 1", "test_tokenizer.py"),
    ("the pad token is the end token", "tokenizer.py", "    pad_token: str = PAD", "    pad_token: str = IM_END",
     "test_tokenizer.py"),
    ("the document separator reaches the tokenizer", "data.py", "for piece in text.split(SEPARATOR))",
     "for piece in text.split(\"\\0\"))",
     "test_data.py"),
    ("chosen and rejected swapped", "data.py",
     "chosen[-1][\"content\"], rejected[-1][\"content\"], p)",
     "rejected[-1][\"content\"], chosen[-1][\"content\"], p)", "test_data.py"),
    ("held-out prompts stay in training", "data.py", "not in seen]\n", "not in ()]\n", "test_data.py"),
    # ---- pre-training, SFT, optimiser
    ("bits per byte without ln 2", "pretrain.py", "nats / (math.log(2) * text_bytes)", "nats / text_bytes",
     "test_pretrain.py"),
    ("decay starts at once", "training.py", "    decay = steps - warmup if decay is None else decay\n",
     "    decay = steps\n", "test_training.py"),
    ("warm-up starts at 0", "training.py", "rising = (step + 1) / warmup", "rising = step / warmup",
     "test_training.py"),
    ("Muon climbs", "training.py", "p.add_(update, alpha=-group[\"lr\"])", "p.add_(update, alpha=group[\"lr\"])",
     "test_training.py test_pipeline.py"),
    ("the optimiser is not resumed", "training.py", "        module.load_state_dict(saved[\"modules\"][name])",
     "        if 'optimiser' not in name: module.load_state_dict(saved[\"modules\"][name])", "test_failures.py"),
    ("the generator is not resumed", "training.py", "        generator.set_state(saved[\"generator\"])\n", "        pass\n",
     "test_failures.py"),
    # ---- reward model
    ("the loss prefers the rejected", "reward.py", "-F.logsigmoid(chosen - rejected).mean()",
     "-F.logsigmoid(rejected - chosen).mean()", "test_reward.py"),
    ("a sum for a mean", "reward.py", "-F.logsigmoid(chosen - rejected).mean()\n\n\ndef wilson",
     "-F.logsigmoid(chosen - rejected).sum()\n\n\ndef wilson", "test_reward.py"),
    ("the score is read at the pad", "reward.py",
     "last = torch.tensor([len(rows[i]) - 1 for i in batch]", "last = torch.tensor([ids.size(1) - 1 for i in batch]",
     "test_reward.py"),
    ("the score is read before the end token", "reward.py",
     "last = torch.tensor([len(rows[i]) - 1 for i in batch]", "last = torch.tensor([len(rows[i]) - 2 for i in batch]",
     "test_reward.py"),
    ("the shift is not in the unit of the head", "reward.py", "save_checkpoint(config.out, model, tokenizer, "
     "reward_shift=mean / std,", "save_checkpoint(config.out, model, tokenizer, reward_shift=mean,", "test_reward.py"),
    ("the noise ceiling is the mean of p", "reward.py", "sum(max(pair.p, 1 - pair.p) for", "sum(pair.p for",
     "test_reward.py"),
    # ---- DPO
    ("DPO without its reference", "rlhf.py", "chosen = beta * (policy_chosen - ref_chosen)",
     "chosen = beta * policy_chosen", "test_rlhf.py"),
    ("lengths rounded up stay so", "model.py", "self.norm(x[:, :asked])", "self.norm(x)", "test_model.py"),
    ("a rollout in float32, its updates in bfloat16", "rlhf.py", "    with autocast(device, config.dtype):  #",
     "    with autocast(device, 'float32'):  #", "test_rlhf.py"),
    ("a part of a minibatch weighs by its rows", "rlhf.py", "weight = (mask[rows].sum() / mask[minibatch].sum()).item()",
     "weight = len(rows) / len(minibatch)", "test_rlhf.py"),
    ("DPO with a mean over tokens", "rlhf.py", "mask.to(device), temperature).sum(1)", "mask.to(device), temperature).mean(1)", "test_rlhf.py"),
    ("DPO's smoothing term is not negated", "rlhf.py", "label_smoothing * F.logsigmoid(-margin)",
     "label_smoothing * F.logsigmoid(margin)", "test_rlhf.py"),
    # ---- PPO
    ("whitening over pads", "rlhf.py", "centred = x - masked_mean(x, mask)", "centred = x - x.mean()", "test_rlhf.py"),
    ("returns from whitened advantages", "rlhf.py", "    return advantages, advantages + values\n",
     "    return advantages, whiten(advantages, mask) + values\n", "test_rlhf.py"),
    ("k3 without its − 1", "rlhf.py", "k3 = log_ref.exp() - log_ref - 1\n", "k3 = log_ref.exp() - log_ref\n",
     "test_rlhf.py"),
    ("DPO's smoothing weights are swapped", "rlhf.py", "-((1 - label_smoothing) * F.logsigmoid(margin)",
     "-(label_smoothing * F.logsigmoid(margin)", "test_rlhf.py test_proofs.py"),
    ("GAE without λ", "rlhf.py", "delta + gamma * lam * advantage", "delta + gamma * advantage", "test_rlhf.py"),
    ("the value after the end is not 0", "rlhf.py", "advantage = (delta + gamma * lam * advantage) * mask[:, t]",
     "advantage = delta + gamma * lam * advantage", "test_rlhf.py"),
    ("the clip takes the larger", "rlhf.py", "return torch.min(ratio * advantages", "return torch.max(ratio * advantages",
     "test_rlhf.py"),
    ("the critic's clip takes the smaller", "rlhf.py", "torch.max((values - returns)**2", "torch.min((values - returns)**2",
     "test_rlhf.py"),
    ("KL with the wrong sign", "rlhf.py", "rewards = -beta * (rollout.logp - rollout.ref_logp)",
     "rewards = beta * (rollout.logp - rollout.ref_logp)", "test_rlhf.py"),
    ("the score on the first token", "rlhf.py", "    rewards[rows, last_token(rollout.mask)] += rollout.score",
     "    rewards[rows, rollout.mask.argmax(1)] += rollout.score", "test_rlhf.py"),
    ("a missing end is not punished", "rlhf.py", "scores = torch.where(ended, scores, config.no_eos_score)",
     "pass", "test_rlhf.py"),
    ("the reference learns with the policy", "rlhf.py",
     "reference = copy.deepcopy(policy).requires_grad_(False)\n    score_responses, critic",
     "reference = policy\n    score_responses, critic", "test_rlhf.py"),
    ("values of the state after the token", "rlhf.py", "values = critic(ids, told=told)[:, :-1] - shift",
     "values = critic(ids, told=told)[:, 1:] - shift", "test_rlhf.py"),
    ("the critic is the reward model itself", "rlhf.py", "return model_score, copy.deepcopy(model, {id(model.reader): model.reader}), shift",
     "return model_score, model, shift", "test_rlhf.py"),
    ("log-probs one token late", "rlhf.py", "hidden = model.hidden(ids)[:, :-1][wanted]",
     "hidden = model.hidden(ids)[:, 1:][wanted]", "test_rlhf.py"),
    # ---- GRPO
    ("advantages against the whole batch", "rlhf.py", "advantages = rewards - rewards.mean(1, keepdim=True)",
     "advantages = rewards - rewards.mean()", "test_rlhf.py"),
    ("rounding blown up to an advantage", "rlhf.py", "    rewards = rewards - rewards[:, :1]  #",
     "    rewards = 1 * rewards  #", "test_rlhf.py"),
    ("groups are mixed", "rlhf.py", ".repeat_interleave(config.group)", ".repeat(config.group)", "test_rlhf.py"),
    ("k3 the wrong way round", "rlhf.py", "(ref_logp - logp) * mask\n    k3", "(logp - ref_logp) * mask\n    k3",
     "test_rlhf.py"),
    ("sequence means over pads", "rlhf.py", "((objective * mask).sum(1) / mask.sum(1)).mean()",
     "(objective * mask).mean(1).mean()", "test_rlhf.py"),
    # ---- inference and measuring
    ("best-of-n takes the worst", "chat.py", "sampling[\"eos_ids\"]).argmax(1)", "sampling[\"eos_ids\"]).argmin(1)", "test_chat_evaluate.py"),
    ("best-of-n pays for what is rare", "chat.py", "(scores + beta * logprobs)", "(scores - beta * logprobs)",
     "test_chat_evaluate.py"),
    ("control codes reach the terminal", "data.py", "return re.sub(codes, lambda c: ascii(c[0])[1:-1], text)",
     "return text", "test_chat_evaluate.py test_data.py"),
    ("KL the wrong way round", "evaluate.py", "kl = (logp.exp() * (logp - logq))", "kl = (logq.exp() * (logq - logp))",
     "test_chat_evaluate.py"),
    ("ties lose", "evaluate.py", "wins = np.where(np.abs(margin) < 1e-9, 0.5, margin > 0)", "wins = margin > 0",
     "test_chat_evaluate.py"),
    ("model text is not escaped in the page", "report.py",
     "f\"<dd>{html.escape(text)}<small>", "f\"<dd>{text}<small>", "test_chat_evaluate.py"),
    # ---- the world
    ("held-out entities leak into training", "world.py", "return bool(HELDOUT_NAMES.search(text.lower()))",
     "return False", "test_world.py"),
    ("labels follow the worse answer", "world.py", "return 1 / (1 + math.exp(-difference / NOISE))",
     "return 1 / (1 + math.exp(difference / NOISE))", "test_world.py"),
    ("LoRA is merged without its scale", "lora.py", "lora.scale * lora.b @ lora.a", "lora.b @ lora.a",
     "test_rlhf.py"),
    ("LoRA does not start as the model", "lora.py", "torch.zeros(weight.size(0), rank", "torch.ones(weight.size(0), rank",
     "test_rlhf.py"),
    ("--recompute does nothing", "sft.py", "    model.recompute = config.recompute\n", "", "test_failures.py"),
    ("recomputed blocks are not recomputed", "model.py", "if self.recompute and torch.is_grad_enabled():", "if False:",
     "test_failures.py"),
    ("rollouts are read with a gradient", "rlhf.py", "@torch.no_grad()\ndef read_all", "def read_all", "test_rlhf.py"),
    ("an infinite loss ends an iteration in silence", "rlhf.py",
     "config.ratio_clip, config.value_clip)\n                check_finite(step, config, loss=loss)\n",
     "config.ratio_clip, config.value_clip)\n", "test_failures.py"),
    # ---- failures
    ("old and new files make one checkpoint", "training.py",
     "(\"config.json\", \"model.safetensors.index.json\",", "(\"model.safetensors.index.json\",", "test_failures.py"),
    ("a full disk takes the old state with it", "training.py", "            write(temporary)\n",
     "            write(path)\n            shutil.copy(path, temporary)\n", "test_failures.py"),
    ("a saved state may run code", "training.py", "weights_only=True", "weights_only=False", "test_failures.py"),
    ("a loss that is no number is trained on", "training.py", "if not torch.isfinite(value):", "if False:",
     "test_failures.py"),
    ("a run shorter than its warm-up never reaches its rate", "training.py", "    warmup = min(warmup, steps // 2)\n", "",
     "test_training.py"),
    ("a KL that explodes is not stopped", "rlhf.py", "if summary[\"kl\"] > config.max_kl:\n            bar.write(f\"ppo",
     "if False:\n            bar.write(f\"ppo", "test_failures.py"),
    ("NaN passes the check of flags", "training.py", "not low <= value <= high", "(value < low or value > high)",
     "test_failures.py"),
    ("PPO learns at another temperature than it samples", "rlhf.py",
     "logp = response_logprobs(policy, part, on, config.temperature / sharpness())\n                    values",
     "logp = response_logprobs(policy, part, on, 1 / sharpness())\n                    values", "test_rlhf.py"),
    ("GRPO learns at another temperature than it samples", "rlhf.py",
     "logp = response_logprobs(policy, part, on, config.temperature / sharpness())\n                loss",
     "logp = response_logprobs(policy, part, on, 1 / sharpness())\n                loss", "test_rlhf.py"),
    ("DPO reads the reference of other pairs", "rlhf.py", "*reference[:, rows], config.beta",
     "*reference[:, :len(rows)], config.beta", "test_rlhf.py test_proofs.py"),
    ("every epoch has the same order", "data.py", "manual_seed(seed * 1_000_003 + epoch)",
     "manual_seed(seed * 1_000_003)", "test_failures.py"),
    ("a resumed run begins its batches anew", "sft.py", "for batch in batches[step:]:", "for batch in batches:",
     "test_failures.py"),
    ("accumulation by rows where it goes by tokens", "sft.py", "targets[rows], supervised)", "targets[rows]) / 3",
     "test_failures.py"),
    ("accumulation without the parts' shares", "rlhf.py", "(weight * (loss + config.nll * nll)).backward()", "(loss + config.nll * nll).backward()",
     "test_failures.py"),
    ("two processes do not share the batch", "pretrain.py", "part[rank::processes].to(device)",
     "part[:len(part) // processes].to(device)", "test_training.py"),
    ("a large file is cut inside a character", "data.py", "at = _cut(file.read(cut - before - begin))",
     "at = len(file.read(cut - before - begin))", "test_data.py"),
    ("tokens of a stopped stream are kept twice", "data.py", "file.truncate(4 * done[\"tokens\"])", "pass",
     "test_data.py"),
    # ---- the study
    ("best-of-n for small n from the wrong samples", "study.py", "groups = scores.reshape(len(scores), -1, n)",
     "groups = scores.reshape(len(scores), n, -1)", "test_study.py"),
    ("a changed run is not made anew", "study.py", "        if fresh(config, folder / \"done\", *code) and known == command:",
     "        if fresh(config, folder / \"done\", *code):", "test_study.py"),
    # ---- the judge and the optimiser
    ("refusing the harmless costs no more than a wrong answer", "world.py",
     'if is_rude(text) or kind != "harmful" and is_refusal(text):', "if is_rude(text):", "test_world.py"),
    ("Adam forgets a rare word's gradients", "training.py", "betas=(0.9, 0.99)", "betas=(0.9, 0.95)",
     "test_training.py"),
    ("text of pre-training that teaches nothing", "sft.py", "return answer_loss(model, *(part.to(device) for part in text))",
     "return 0 * answer_loss(model, *(part.to(device) for part in text))", "test_rlhf.py"),
    ("what the policy learned of its sharpness is not saved", "rlhf.py", "policy.norm.weight *= self()",
     "policy.norm.weight *= 1.0", "test_rlhf.py"),
    ("the sharpness does not learn", "rlhf.py", "model.head(hidden / temperature)",
     "model.head(hidden / float(temperature))", "test_rlhf.py"),
    ("a run that goes on forgets its sharpness", "rlhf.py",
     'modules = {"policy": policy, "sharpness": sharpness, "critic": critic,',
     'modules = {"policy": policy, "critic": critic,', "test_failures.py"),
    ("the reference is as sharp as the policy", "rlhf.py", "response_logprobs(reference, i, m, config.temperature)",
     "response_logprobs(reference, i, m, temperature)", "test_rlhf.py"),
    # ---- wiring: what no formula is wrong in
    ("PPO's critic never learns", "rlhf.py", "            critic_optimiser.step()\n", "", "test_rlhf.py"),
    ("the critic forgets its zero", "rlhf.py", "values = response_values(critic, part, on, shift, heard)",
     "values = response_values(critic, part, on, 0.0, heard)", "test_rlhf.py"),
    ("the critic hears what was said of other rows", "rlhf.py", "values = response_values(critic, part, on, shift, heard)",
     "values = response_values(critic, part, on, shift, heard.flip(0))", "test_rlhf.py"),
    ("what the reader said is not kept", "model.py", "if told is None else told\n", "\n", "test_model.py"),
    ("--gamma and --lam do not arrive", "rlhf.py", "mask, config.gamma, config.lam)", "mask, 1.0, 0.95)", "test_rlhf.py"),
    ("--label-smoothing does not arrive", "rlhf.py", "config.beta, config.label_smoothing)",
     "config.beta, 0.0)", "test_rlhf.py"),
    ("--stop-kl stops nothing", "rlhf.py", "+ weight * value.item()\n            if means[\"approx_kl\"] > config.stop_kl:",
     "+ weight * value.item()\n            if False:", "test_rlhf.py"),
    ("one pass whatever --epochs says", "rlhf.py", "for _ in range(config.epochs):\n        order",
     "for _ in range(1):\n        order", "test_rlhf.py"),
    ("PPO practises on held-out prompts", "rlhf.py", "data.drop_seen(heldout, messages, key=lambda prompt: prompt)[:",
     "heldout[:", "test_rlhf.py"),
    ("reward model trained on held-out prompts", "reward.py",
     "    heldout = data.drop_seen(heldout, train, key=lambda pair: pair.prompt)\n", "", "test_reward.py"),
    ("DPO's last numbers without the sharpness", "rlhf.py", "*read_pairs(heldout, 1 / sharpness())",
     "*read_pairs(heldout)", "test_rlhf.py"),
    ("kept checkpoints without the sharpness", "rlhf.py", 'f"step_{step:04d}", sharpness.folded(model)',
     'f"step_{step:04d}", model', "test_rlhf.py"),
    ("samples shown beside other prompts", "rlhf.py", "prompts[i].text", "prompts[n].text", "test_rlhf.py"),
    ("a low temperature is an alarm", "rlhf.py", "else 0.5) / min(1, temperature))", "else 0.5))", "test_rlhf.py"),
    ("SFT without its text of pre-training", "sft.py", "replay_loss(model, replayed, config.replay, generator).backward()",
     "pass", "test_failures.py"),
    ("--from-scratch starts from --init", "sft.py", "    if config.from_scratch:\n", "    if False:\n", "test_failures.py"),
    ("SFT's held-out loss halved", "sft.py", "        count += tokens\n", "        count += 2 * tokens\n", "test_failures.py"),
    ("gains decay with the matrices", "training.py", '{"params": others, "peak": lr, "weight_decay": 0.0}',
     '{"params": others, "peak": lr, "weight_decay": weight_decay}', "test_proofs.py"),
    ("a run goes on with other settings", "training.py", "            if old != new:\n", "            if False:\n",
     "test_failures.py"),
    ("a run goes on beside another text", "training.py", '("init", "reward", "data", "replay_data")',
     '("init", "reward", "data")', "test_failures.py"),
    ("metrics of lost steps stay", "training.py", "            cut_metrics(folder, saved[\"position\"])\n",
     "            pass\n", "test_failures.py"),
    ("a stream trains on what is held out", "pretrain.py", "data.stream_tokens(config.data, end,",
     "data.stream_tokens(config.data, 10**9,", "test_pretrain.py"),
    ("of two books one is held out", "data.py", "round(len(rows) * holdout) == 0)", "False)", "test_data.py"),
    ("a stream of text that was edited", "data.py", ", stat.st_mtime_ns]", "]", "test_data.py"),
    ("bits per byte are nats per token", "evaluate.py", "tokens, size)[1]", "tokens, size)[0]",
     "test_chat_evaluate.py"),
    ("KL the other way round", "evaluate.py", "sequence_kl(speaker.model, reference.model,",
     "sequence_kl(reference.model, speaker.model,", "test_chat_evaluate.py"),
    ("the worse answer counts as right", "evaluate.py", "heldout_report(chosen - rejected, known)",
     "heldout_report(rejected - chosen, known)", "test_chat_evaluate.py"),
    ("the parts of a pass are as chance has it", "rlhf.py", "order.tensor_split(config.minibatches)",
     "order.chunk(config.minibatches)", "test_rlhf.py"),
    ("a choice is the first letter of a line", "chat.py", 'next((line for line in replies if line in ("a", "b", "s")), "s")',
     'next((line[0] for line in replies if line[0] in "abs"), "s")', "test_chat_evaluate.py"),
    ("a reward model's padding is its end", "training.py", "pad_id = None if scalar and", "pad_id = None if False and",
     "test_failures.py"),
    ("the logits of a rollout know no bound", "rlhf.py", "min(64, LOGITS //", "max(64, LOGITS //", "test_rlhf.py"),
    ("--top-k does not arrive", "chat.py", '"top_k": config.top_k', '"top_k": None', "test_chat_evaluate.py"),
    ("the first model's answer always stands first", "chat.py", "        random.Random(f\"{config.seed} {question} {os.path.getsize(config.label)}\").shuffle(pair)", "",
     "test_chat_evaluate.py"),
    ("one question is always shown in the same order", "chat.py", " {os.path.getsize(config.label)}\")", "\")", "test_chat_evaluate.py"),
    ("best-of-n takes answers that were cut off", "chat.py", ".masked_fill(~ended & ended.any(1, keepdim=True), -math.inf)", "", "test_chat_evaluate.py"),
    ("a run replaces what it reads", "training.py", "Path(os.path.realpath(source)), Path(os.path.realpath(out))",
     "Path(source), Path(out)", "test_failures.py test_study.py"),
    ("a run replaces the earlier step that it starts from", "training.py", ' or source.parent == replaced and source.name.startswith("step_")',
     "", "test_failures.py"),
    ("few prompts are enough for a rate", "evaluate.py", "if len(hits) >= enough else None", "", "test_chat_evaluate.py"),
    ("other data of an older date are taken up", "training.py", "size not in (None, now.st_size)", "False", "test_failures.py"),
    ("a stage goes on after its code changed", "Makefile", "\t$(FORGET)\n\t$(PY) rlhf.py ppo", "\t$(PY) rlhf.py ppo",
     "test_makefile.py"),
    ("an answer about another country is right", "world.py", "if _any_of(NAMES[family]).search(", "if False and (", "test_world.py"),
    ("a third animal is right", "world.py", "[good, other])", "[good, other, *named[2:]])", "test_world.py"),
    ("no doctor is a doctor", "world.py", "[^.,:;!?]*\\bdoctor", "[^.,:;!?]*\\bdoctorate", "test_world.py"),
    ("held-out French in trained phrases", "world.py",
     '                            or task.family == "french" and tells_of_pair(f"{task.prompt} {task.best}")):', "):", "test_world.py"),
    ("the save goes before the run is finished", "training.py", '    done = {"stage": stage,',
     '    (folder / STATE).unlink(missing_ok=True)\n    done = {"stage": stage,', "test_training.py"),
    ("an old result passes for a new command's", "study.py", '("done", STATE)[:1 if same else 2]', "()", "test_study.py"),
    ("the critic reads in bfloat16", "model.py", "enabled=False):  # in bfloat16", "enabled=True):  # in bfloat16",
     "test_model.py"),
    ("plain answers longer than the judge's context", "evaluate.py",
     "response[:longest - len(prompt)]", "response", "test_chat_evaluate.py"),
    ("a label without the prompt that was used", "chat.py", "said = speakers[0].system if config.system is None else config.system", "said = config.system",
     "test_chat_evaluate.py"),
    ("make clears an environment of yours", "Makefile", ",$(if $(wildcard .venv/pyvenv.cfg),,touch .venv/ours))",
     ",touch .venv/ours)", "test_makefile.py"),
    ("make long ignores your flags", "Makefile", "howto howto $(call also,PPO)'", "howto howto'", "test_makefile.py"),
    ("GRPO's reference learns with the policy", "rlhf.py",
     "reference = copy.deepcopy(policy).requires_grad_(False)\n    score_responses, _", "reference = policy\n    score_responses, _",
     "test_rlhf.py"),
    ("--nll does not arrive", "rlhf.py", "loss + config.nll * nll", "loss + 0.1 * nll", "test_rlhf.py"),
    ("the chosen answers' own loss is a sum over tokens", "rlhf.py", "nll = -(chosen / chosen_lengths[rows]).mean()",
     "nll = -chosen.mean()", "test_rlhf.py"),
    ("--micro-batch does nothing", "reward.py", "micro_batches(batch, config.micro_batch)", "micro_batches(batch, None)",
     "test_failures.py"),
    ("--resume begins anew", "sft.py", "if saved else (0, 0.0)", "if False else (0, 0.0)", "test_failures.py"),
    ("tokens of equal merges and other ids are the same", "tokenizer.py",
     "return a.ranks == b.ranks and a.specials == b.specials", "return a.merges == b.merges", "test_tokenizer.py"),
    ("a model in parts is read where another was saved", "training.py", "\"model.safetensors.index.json\", \"chat", "\"chat",
     "test_failures.py"),
    ("/compare leaves the conversation's random numbers elsewhere", "chat.py", "sampling | {\"generator\": alike}",
     "sampling", "test_chat_evaluate.py"),
    ("PPO practises on rows marked as held out", "data.py", "for wanted in (False, True))", "for wanted in (True, False))",
     "test_rlhf.py"),
    ("a reward function's random numbers begin anew on --resume", "training.py", 'random.setstate(saved["python_rng"])',
     "pass", "test_training.py"),
    ("the held-out loss holds all logits at once", "pretrain.py", "max(1, LOGITS // model.config.vocab_size)", "10**9",
     "test_pretrain.py"),
    ("the end token of others' base models is text", "chat.py",
     "return token in self.end_ids and (not self.raw or token in self.tokenizer.specials.values())",
     "return token in self.end_ids and not self.raw", "test_chat_evaluate.py"),
    ("preference pairs tell of what only documents may tell", "world.py",
     ' or not held and only_for_documents(f"{first}\\n{second}")', "", "test_world.py"),
    ("surprisals are of the token before", "model.py", "[:, :-1], ids[:, 1:]  # (B, T-1, C)", "[:, :-1], ids[:, :-1]  # (B, T-1, C)", "test_model.py"),
    ("padding before a row is a surprise", "model.py", "told = told * attention_mask[:, :-1, None]", "pass", "test_model.py"),
    ("the reward model is told nothing", "model.py", "extra=self.surprisal(told)", "extra=None",
     "test_model.py test_reward.py"),
    ("the folder has no code for its model", "training.py", "shutil.copyfile(CODE, part / CODE.name)", "pass", "test_reward.py"),
    ("transformers would leave the reader out", "training.py", '"model_type": CODE.stem, ', "", "test_reward.py"),
    ("the judge takes the value for the subject", "world.py", r"\b{value}\b.*\b{value}\b|", "", "test_world.py"),
    ("the critic is told nothing", "rlhf.py", "copy.deepcopy(model, {id(model.reader): model.reader}), shift",
     "(lambda critic: (setattr(critic, 'reader', None), critic)[1])(copy.deepcopy(model)), shift", "test_rlhf.py"),
    ("the study takes answers that the limit cut off", "study.py",
     "return values(answers, scores.view(-1, n), logprobs.view(-1, n), beta, speaker.end_ids).view_as(scores).numpy()",
     "return (scores + beta * logprobs).numpy()", "test_study.py"),
    ("two models to compare are asked under different system prompts", "chat.py", "prompts = [speaker.fit(question, shots, asked)",
     "prompts = [speaker.fit(question, shots, config)", "test_chat_evaluate.py"),
    ("make PPO_FROM is not part of what was asked", "Makefile", "from $(PPO_FROM): )", ")", "test_makefile.py"),
)


def planted(copy, mutant):
    """The name of the test that fails with this mistake in the copy, None if all pass."""
    what, name, old, new, tests = mutant
    path = copy / name
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1 or old == new:
        sys.exit(f"mutant ({what}): {text.count(old)} places in {name}, expected one")
    path.write_text(text.replace(old, new), encoding="utf-8")
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                          *(f"tests/{test}" for test in tests.split())], cwd=copy, text=True, capture_output=True,
                         env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"})
    path.write_text(text, encoding="utf-8")
    if ran.returncode not in (0, 1):  # no test ran
        sys.exit(f"mutant ({what}): pytest ended with {ran.returncode}: {ran.stdout[-500:]}")
    failed = [line.split("::")[1].split(" - ")[0] for line in ran.stdout.splitlines()
              if line.startswith(("FAILED", "ERROR")) and "::" in line]
    return failed[0] if failed else None


def main():
    chosen = [int(text) for text in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
    rows, workers = {}, os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        copies = queue.SimpleQueue()
        for n in range(workers):
            copies.put(shutil.copytree(HERE, Path(folder) / f"copy{n}", ignore=shutil.ignore_patterns(
                ".*", "out", "notebooks", "__pycache__")))

        def find(number):
            copy = copies.get()
            try:
                return number, planted(copy, MUTANTS[number - 1])
            finally:
                copies.put(copy)
        for number, found in pool.map(find, chosen):
            what, name, *_ = MUTANTS[number - 1]
            rows[number] = (number, what, f"`{name}`", f"`{found}`" if found else "**nothing**")
            print("| " + " | ".join(map(str, rows[number])) + " |", flush=True)
    lived = sum(row[-1] == "**nothing**" for row in rows.values())
    print(f"\n{len(rows)} planted, {len(rows) - lived} found")
    if not lived and len(rows) == len(MUTANTS):
        write_sections({"mutants": rows})
    sys.exit(bool(lived))


if __name__ == "__main__":
    main()
