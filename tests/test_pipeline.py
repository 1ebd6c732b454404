"""The whole method once, tiny, through the commands a user types: every stage must *learn*, not
only end. Each bound is one that a stage which ignores its input cannot reach."""

import json
import math
import random
import sys
from collections import Counter

import pytest

import data
import evaluate
import pretrain
import reward
import rlhf
import sft
import world
from training import load_policy

SHAPE = ("--layers 2 --width 64 --heads 2 --kv-heads 2 --ffn-width 128 --vocab-size 512 "
         "--context-length 160 --batch-size 6").split()


CAPITALS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "Egypt": "Cairo", "Norway": "Oslo", "Kenya": "Nairobi",
            "Japan": "Tokyo", "Cuba": "Havana"}


def questions(n):
    """No two are the same, and of each the country alone tells which of eight answers is right."""
    rng = random.Random(1)
    return [[{"role": "user", "content": f"Question {i}: what is the capital of {country}?"},
             {"role": "assistant", "content": f"The capital is {CAPITALS[country]}."}]
            for i, country in enumerate(rng.choices(list(CAPITALS), k=n))]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Folder with base, sft, reward, dpo and ppo, and the files they were trained on."""
    root = tmp_path_factory.mktemp("pipeline")

    def command(main, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["stage.py", *map(str, args), "--device", "cpu"])
            main()

    command(pretrain.main, "--documents", 2500, "--steps", 160, *SHAPE, "--out", root / "base")
    chats = [chat for both in zip(world.demonstrations(1000, 1), questions(1000)) for chat in both]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    command(sft.main, "--init", root / "base", "--data", root / "chats.jsonl", "--lr", 0.01, "--embed-lr", 0.01, "--head-lr",
            0.002, "--out", root / "sft")
    # Pairs with one rule to find, held-out prompts included: the kind answer, not the curt one.
    rng = random.Random(1)
    pairs = [{"prompt": task.prompt, "chosen": f"I am glad to help. {task.short}.",
              "rejected": f"{rng.choice(world.RUDE)} {task.short}."}
             for task in world.training_prompts(420, "pipeline")]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (root / "score.py").write_text("def letters(prompt, response):\n"
                                   "    return 10 * response.count('e') / (len(response) + 5)\n")
    command(reward.main, "--init", root / "sft", "--data", root / "pairs.jsonl",
            "--out", root / "reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf.py dpo", "--init", str(root / "sft"), "--data",
                                    str(root / "pairs.jsonl"), "--out", str(root / "dpo")])
        rlhf.dpo()
        patch.setattr(sys, "argv", [
            "rlhf.py ppo", "--init", str(root / "sft"), "--reward", f"{root / 'score.py'}:letters",
            "--iterations", "6", "--episodes", "48", "--eval-prompts", "64", "--prompts", "300",
            "--max-new-tokens", "24", "--lr", "2e-3", "--beta", "0.01", "--out", str(root / "ppo")])
        rlhf.ppo()
    return root


def done(folder):
    return json.loads((folder / "done").read_text("utf-8"))


def unigram_nats(counted, measured):
    """Cost per token of the best model that ignores its context: token frequencies."""
    counts = Counter(counted)
    total = sum(counts.values()) + 512
    return -sum(math.log((counts[t] + 1) / total) for t in measured) / len(measured)


def test_pretraining_uses_the_context(out):
    """Words, and more than the last one."""
    model, tokenizer = load_policy(out / "base")
    documents = world.documents(2500, 1)
    train, _ = data.pack_documents(documents[:2375], tokenizer)
    heldout, size = data.pack_documents(documents[2375:], tokenizer)
    nats, bits = pretrain.heldout_loss(model, heldout, size, 160)
    found = done(out / "base")
    assert (found["heldout_loss"], found["bits_per_byte"]) == pytest.approx((nats, bits), rel=1e-3)
    assert nats < 0.75 * unigram_nats(train.tolist(), heldout.tolist())
    assert nats < pretrain.heldout_loss(model, heldout, size, 2)[0] - 0.2


def test_sft_answers_the_prompt(out):
    """Who does not look at the prompt can only guess which of the eight capitals comes: ln 8 nats an answer."""
    model, tokenizer = load_policy(out / "sft")
    heldout = data.encode_conversations(questions(1000)[950:], tokenizer, 160)
    tokens = sum(sum(mask) for _, mask in heldout) / len(heldout)
    assert tokens * sft.heldout_loss(model, heldout, tokenizer.pad_id, "cpu") < 0.5 * math.log(8)
    # Nor does it answer the world's questions like one who knows only how often each token occurs.
    chats = world.demonstrations(1000, 1)
    train, heldout = (data.encode_conversations(part, tokenizer, 160) for part in (chats[:950], chats[950:]))
    answers = ([token for ids, mask in rows for token, on in zip(ids, mask) if on] for rows in (train, heldout))
    assert sft.heldout_loss(model, heldout, tokenizer.pad_id, "cpu") < 0.55 * unigram_nats(*answers)


def test_reward_model_finds_the_rule(out):
    assert done(out / "reward")["heldout_accuracy"][1] > 0.8  # the low end of the interval


def test_dpo_widens_the_margin(out):
    found = done(out / "dpo")
    assert found["heldout_margin"] > 0.2 and found["heldout_accuracy"][1] > 0.6
    assert found["heldout_loss"] < math.log(2) - 0.05


def test_ppo_raises_the_toy_reward(out):
    found = done(out / "ppo")
    assert found["heldout_score"] > found["heldout_score_before"] + 0.2
    assert found["heldout_kl"] > 0.05


def test_evaluation_puts_them_side_by_side(out, monkeypatch):
    tasks = [task for task in world.heldout_tasks() if task.family in ("countries", "harmful")][:12]
    monkeypatch.setattr(world, "heldout_tasks", lambda: tasks)
    monkeypatch.setattr(world, "heldout_documents", lambda: world.documents(20, "few"))
    evaluate.main([*(str(out / name) for name in ("base", "sft", "dpo", "ppo")), "--reward",
                   str(out / "reward"), "--data", str(out / "pairs.jsonl"), "--best-of", "2",
                   "--per-family", "6", "--max-new-tokens", "24", "--out", str(out / "report"),
                   "--device", "cpu"])
    report = json.loads((out / "report" / "report.json").read_text("utf-8"))
    assert set(report["checkpoints"]) == {"base", "base_few_shot", "sft", "dpo", "ppo", "best_of_2"}
    assert report["checkpoints"]["ppo"]["kl_from_sft"][0] > 0.05
    assert report["checkpoints"]["sft"]["bits_per_byte"] > 0
    assert set(report["seconds"]) >= {"pretrain", "sft", "reward", "dpo", "ppo"}
