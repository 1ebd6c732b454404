"""reward.py: the loss, where the score is read, its zero and unit, and that it learns."""
import gc
import json
import math
import sys
import weakref

import pytest
import torch

import data
import reward
from model import GPT, GPTConfig, ScalarModel
from tokenizer import train_bpe
from training import load_reward, save_checkpoint

PAD = 0


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat and the dog sat on the log\n"] * 3, 300)


def tiny(vocab_size=300, seed=0):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size, context_length=64, layers=2, heads=2, kv_heads=2, width=32,
                        ffn_width=64))
    for parameter in gpt.parameters():  # a fresh block is the identity: give attention some work
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return gpt


def test_preference_loss_is_the_mean_log_odds():
    chosen, rejected = torch.tensor([1.0, -0.5]), torch.tensor([0.0, 1.5])
    by_hand = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(2.0))) / 2
    assert reward.preference_loss(chosen, rejected).item() == pytest.approx(by_hand, rel=1e-6)
    assert reward.preference_loss(chosen, chosen).item() == pytest.approx(math.log(2))
    far = reward.preference_loss(torch.tensor([-200.0]), torch.tensor([0.0]))
    assert far.item() == pytest.approx(200)  # log(sigmoid(-200)) written out would be -inf


def test_preference_loss_refuses_to_broadcast():
    with pytest.raises(ValueError, match="rejected"):
        reward.preference_loss(torch.zeros(4), torch.zeros(4, 1))


def test_pairs_of_the_world_keep_their_order_and_their_p(tokenizer, monkeypatch):
    rows = [{"prompt": f"the cat {n}", "chosen": "sat", "rejected": "log"} | ({"p": 0.9} if n > 7 else {}) for n in range(10)]
    asked = []
    monkeypatch.setattr(reward.world, "sample_pairs", lambda *args: asked.append(args[2:]) or rows)
    train, heldout = reward.load_pairs(reward.Config(data=["world"], pairs=10, holdout=0.2, seed=3), tiny(), tokenizer)
    assert asked == [(10, 2, 3)] and [pair.p for pair in train + heldout] == [None] * 8 + [0.9] * 2
    assert {(tokenizer.decode(pair.chosen[:-1]), tokenizer.decode(pair.rejected[:-1])) for pair in train + heldout} == {("sat", "log")}


def test_pairs_with_heldout_prompts_are_never_trained_on(tokenizer, tmp_path):
    """The embedded world marks them with "p", and then --holdout takes no others."""
    rows = [{"prompt": f"the cat {n}", "chosen": "sat", "rejected": "log"} for n in range(40)]
    for row in rows[10:30]:
        row["p"] = 0.9
    rows.append(rows[5] | {"p": 0.9})  # held out, but its prompt is trained on
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for holdout in (0.1, 0.75):
        config = reward.Config(data=[str(file)], holdout=holdout)
        train, heldout = reward.load_pairs(config, tiny(), tokenizer)
        assert [pair.p for pair in heldout] == [0.9] * 20 and [pair.p for pair in train] == [None] * 20


@pytest.mark.parametrize("reader", [False, True])
def test_score_is_read_at_the_last_token_whatever_the_padding(reader):
    model = ScalarModel(tiny(), tiny(seed=3) if reader else None)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    responses = [[20, 21, 22, 23, 24, 25, 26], [30, 31], [40]]
    with torch.no_grad():
        alone = torch.stack([model(torch.tensor([p + r]))[0, -1]
                             for p, r in zip(prompts, responses)])
    assert alone.std() > 0.1  # the rows do differ
    for batch_size in (1, 2, 3):
        found = reward.score(model, prompts, responses, PAD, batch_size)
        assert torch.allclose(found, alone, atol=1e-5)
    ids, last = torch.full((3, 16), 44), torch.tensor([len(p + r) - 1 for p, r in zip(prompts, responses)])
    for i, (p, r) in enumerate(zip(prompts, responses)):
        ids[i, :len(p + r)] = torch.tensor(p + r)
    for after in (ids, torch.where(ids == 44, 17, ids)):  # whatever follows the end
        with torch.no_grad():
            assert torch.allclose(reward.read_last(model, after, last), alone, atol=1e-5)
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    assert reward.read_last(model, ids, last, half).dtype == torch.float32  # the head is read exactly
    longer = reward.score(model, prompts, [r + [50] for r in responses], PAD)
    assert (longer - alone).abs().min() > 1e-3  # the last token itself, the end token, is read


def test_wilson():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                    (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        rate, found_low, found_high = reward.wilson(successes, n)
        assert rate == successes / n
        assert (found_low, found_high) == pytest.approx((low, high), abs=6e-5)
    assert reward.wilson(0, 0) is None


def test_report_knows_the_noise_ceiling():
    pairs = [data.EncodedPair([1], [2], [3], p) for p in (0.9, 0.2, 0.6)]
    report = reward.heldout_report(torch.tensor([1.0, 2.0, -1.0]), pairs)
    assert report["heldout_accuracy"] == reward.wilson(2, 3)
    ceiling = (0.9 + 0.8 + 0.6) / 3
    assert report["noise_ceiling"] == pytest.approx(ceiling)
    assert report["normalised_accuracy"] == pytest.approx((2 / 3 - 0.5) / (ceiling - 0.5))


def test_it_learns_and_is_normalised(tmp_path, tokenizer, monkeypatch):
    """The longer list of cats wins: held-out pairs come out right, and the scale is in the head."""
    save_checkpoint(tmp_path / "sft", tiny(tokenizer.vocab_size), tokenizer)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for n in range(260):
        few, many = torch.randint(1, 9, (2,), generator=generator).sort().values.tolist()
        rows.append({"prompt": f"the mat {n}", "chosen": "cat " * (many + 1) + "dog",
                     "rejected": "cat " * few + "dog"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, policies, left, load, batches = tmp_path / "reward", [], [], reward.load_policy, data.epoch_batches

    def loading(*args):
        policy, *more = load(*args)
        policies.append(weakref.ref(policy))
        return policy, *more
    monkeypatch.setattr(reward, "load_policy", loading)
    monkeypatch.setattr(data, "epoch_batches", lambda *args: (gc.collect(), left.append(policies[0]()), batches(*args))[-1])
    monkeypatch.setattr(sys, "argv", [
        "reward.py", "--init", f"{tmp_path}/sft", "--data", f"{tmp_path}/pairs.jsonl", "--out",
        str(out), "--holdout", "60", "--epochs", "3", "--batch-size", "20", "--lr", "3e-3", "--extra-layers", "2",
        "--dtype", "float32", "--device", "cpu", "--eval-every", "10"])
    rate = reward.learning_rate  # 0 from step 20 on, so that what is measured then is what is left at the end
    monkeypatch.setattr(reward, "learning_rate", lambda step, *rest: rate(step, *rest) * (step < 20))
    reward.main()
    assert left == [None]  # the policy, of which the model holds a copy, is not kept in memory

    done = json.loads((out / "done").read_text("utf-8"))
    assert done["stage"] == "reward" and done["heldout_pairs"] == 60
    assert done["heldout_accuracy"][1] > 0.7  # the lower end of the interval; chance is 0.5
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert any("heldout_accuracy" in row and row["step"] == 10 for row in metrics)
    measured = {row["step"]: row["heldout_loss"] for row in metrics if "heldout_loss" in row}
    assert [row["step"] for row in metrics if "heldout_loss" in row] == [10, 20, 30]  # the last once, of all
    assert measured[20] == pytest.approx(measured[30], rel=1e-4) != measured[10]

    model, _, shift, scale = load_reward(out)
    assert model.config.layers == tiny().config.layers + 2  # --extra-layers
    pairs = data.encode_pairs(data.load_preferences([tmp_path / "pairs.jsonl"]), tokenizer, 64)
    chosen, rejected = reward.score_pairs(model, pairs[:200], PAD)
    scores = torch.cat([chosen, rejected]) - shift
    assert abs(scores.mean().item()) < 0.15 and abs(scores.std().item() - 1) < 0.15
    chosen, rejected = reward.score_pairs(model, pairs[200:], PAD)
    unscaled = reward.preference_loss(scale * chosen, scale * rejected)
    assert unscaled.item() == pytest.approx(done["heldout_loss"], rel=1e-4)


def test_with_surprisals_it_knows_what_the_policy_would_say(tmp_path, tokenizer, monkeypatch):
    """Chosen is what the policy would say, an arbitrary function of the prompt, which no pair tells of the next one."""
    policy, generator, pairs = tiny(tokenizer.vocab_size), torch.Generator().manual_seed(1), []
    save_checkpoint(tmp_path / "sft", policy, tokenizer)
    for _ in range(240):
        prompt = torch.randint(5, 250, (6,), generator=generator).tolist()
        likeliest = policy(torch.tensor([prompt]))[0, -1].argmax().item()
        other = (likeliest + 1 + torch.randint(200, (), generator=generator).item()) % 250
        pairs.append(data.EncodedPair(prompt, [likeliest, tokenizer.im_end_id], [other, tokenizer.im_end_id], None))
    monkeypatch.setattr(reward, "load_pairs", lambda *args: (pairs[:120], pairs[120:]))
    right = {}
    for flags in ([], ["--surprisal"]):
        out = tmp_path / "reward" / "".join(flags)
        monkeypatch.setattr(sys, "argv", ["reward.py", "--init", f"{tmp_path}/sft", "--out", str(out), "--epochs", "8",
                                          "--batch-size", "20", "--lr", "1e-2", "--warmup", "2", "--dtype", "float32",
                                          "--device", "cpu", *flags])
        reward.main()
        right[bool(flags)] = json.loads((out / "done").read_text("utf-8"))["heldout_accuracy"][0]
    assert right[True] > 0.9 > 0.8 > right[False]
    model = load_reward(out)[0]  # the folder holds the reader, as it was
    assert all(torch.equal(tensor, policy.state_dict()[name]) for name, tensor in model.reader.state_dict().items())
    info = json.loads((out / "config.json").read_text())
    assert info["model_type"] == "reward_with_reader"  # which transformers refuses, unless it may run the code that is there
    for module, name in (place.split(".") for place in info["auto_map"].values()):
        assert f"class {name}(" in (out / f"{module}.py").read_text("utf-8")
