"""Chat, evaluation and report on tiny random models: the numbers are checked, not their quality."""

import dataclasses
import io
import itertools
import json
import math
import ntpath
import os
import re
import shutil
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import chat
import data
import evaluate
import report
import reward
import world
from model import GPT, GPTConfig, ScalarModel, token_logprobs
from pretrain import heldout_loss
from tokenizer import ENDOFTEXT, train_bpe
from training import InputError, finish, load_checkpoint, load_reward, save_checkpoint


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["What is the capital of France? The capital of France is Paris.\n"] * 3, 320)


def tiny(tokenizer, seed=0, context_length=512, vocab_size=None):
    """A random model, made to want to say something: its blocks would start as the identity."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size or tokenizer.vocab_size, context_length, layers=1, heads=2, kv_heads=2,
                          width=16, ffn_width=32)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def count_even(model, prompts, responses, pad_id, batch_size=64):
    """Stands in for reward.score: how many ids of a response are even."""
    return torch.tensor([float(sum(token % 2 == 0 for token in ids)) for ids in responses])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("out")
    save_checkpoint(root / "base", tiny(tokenizer, 0), tokenizer, stage="pretrain")
    save_checkpoint(root / "sft", tiny(tokenizer, 1), tokenizer)
    save_checkpoint(root / "ppo", tiny(tokenizer, 2), tokenizer)
    torch.manual_seed(3)
    save_checkpoint(root / "reward", ScalarModel(tiny(tokenizer, 3)), tokenizer,
                    reward_shift=0.25, reward_scale=1.0)
    finish(root / "sft", "sft", 12.5)
    finish(root / "reward", "reward", 7)
    rows = [{"prompt": f"Say {n}.", "chosen": "Yes, of course.", "rejected": "No.", "p": 0.8}
            for n in range(20)]
    rows.insert(0, {"prompt": "Say it.", "chosen": "Yes.", "rejected": "No."})  # a training row
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "sft" / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "lo')
    return root


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """evaluated(tasks, *words) -> the report of a small evaluation, which is in tmp_path/report. `words` may override."""
    def run(tasks, *words):
        monkeypatch.setattr(world, "heldout_tasks", lambda: tasks)
        monkeypatch.setattr(world, "heldout_documents", lambda: ["Paris is in France."])
        evaluate.main([*"--max-new-tokens 4 --device cpu --best-of 1 --per-family 1".split(), "--out", str(tmp_path / "report"),
                       *map(str, words)])
        return json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    return run


def of_each_family(n):
    """The first n held-out tasks of every family."""
    found = {}
    for task in world.heldout_tasks():
        found.setdefault(task.family, []).append(task)
    return [task for tasks in found.values() for task in tasks[:n]]


# ---- prompts and answers -------------------------------------------------------------------------


def test_raw_format_is_what_the_docstring_says(tokenizer):
    assert chat.plain_prompt("One?") == "One?\n"
    assert chat.plain_prompt("Three?", [("One?", "1."), ("Two?", "2.")]) == (
        "Question: One?\nAnswer: 1.\n\nQuestion: Two?\nAnswer: 2.\n\nQuestion: Three?\nAnswer:")
    speaker = chat.Speaker("base", tiny(tokenizer), tokenizer, True, None, set())
    ids = speaker.prompt("Three?", [("One?", "1.")])
    assert ids[0] == tokenizer.endoftext_id
    assert tokenizer.decode(ids[1:]) == chat.plain_prompt("Three?", [("One?", "1.")])


def test_a_base_model_that_transformers_has_tuned_chats(tokenizer, tmp_path):
    save_checkpoint(tmp_path, tiny(tokenizer), tokenizer, stage="pretrain")
    assert chat.open_speaker(tmp_path).raw
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))  # it keeps what it does not know, and adds its version
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": "5.24.0"}))
    assert not chat.open_speaker(tmp_path).raw


@pytest.mark.parametrize("name, content", [
    ("generation_config.json", b"[]"), ("generation_config.json", b'{"eos_token_id": [[1]]}'), ("tokenizer_config.json", b"7"),
    ("tokenizer_config.json", b'{"chat_template": [{"template": "x"}]}'), ("chat_template.jinja", b"\xff")])
def test_damaged_files_beside_the_weights_are_refused(name, content, tokenizer, tmp_path):
    save_checkpoint(tmp_path, tiny(tokenizer), tokenizer)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: cannot be read as JSON of the usual form|: not a checkpoint that can be read"):
        chat.open_speaker(tmp_path)


def test_a_base_model_of_others_ends_where_it_says(evaluated, tokenizer, some_tasks, monkeypatch, tmp_path):
    """Its end token has another name, which only generation_config.json tells, and so no document begins."""
    theirs = dataclasses.replace(tokenizer, specials={("<|the_end|>" if token == ENDOFTEXT else token): number
                                                      for token, number in tokenizer.specials.items()})
    save_checkpoint(tmp_path, tiny(tokenizer), tokenizer, stage="pretrain")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": theirs.specials["<|the_end|>"]}))
    monkeypatch.setattr(chat, "load_checkpoint", lambda *_: (tiny(tokenizer), theirs, {"stage": "pretrain"}))
    speaker = chat.open_speaker(tmp_path)
    assert theirs.specials["<|the_end|>"] in speaker.end_ids
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert 0 in chat.open_speaker(tmp_path).end_ids
    assert speaker.text([*tokenizer.encode("Paris."), theirs.specials["<|the_end|>"]]) == "Paris."
    row, *_ = evaluated(some_tasks[:2], tmp_path)["checkpoints"].values()
    assert row["bits_per_byte"] is None and row["accuracy"]["all"]


def test_raw_answer_ends_at_a_line_break(tokenizer):
    assert [tokenizer.decode([i]) for i in chat.newline_ids(tokenizer)] == ["\n"]
    speaker = chat.Speaker("base", tiny(tokenizer), tokenizer, True, None, set())
    assert speaker.text(tokenizer.encode(" Paris.\nWhat")) == "Paris."
    speaker.end_ids = {tokenizer.endoftext_id}
    assert speaker.text([*tokenizer.encode("Paris."), tokenizer.endoftext_id]) == "Paris."


def test_chat_prompt_holds_system_and_history(tokenizer):
    ids = chat.chat_prompt(tokenizer, "C?", "Be kind.", [("A?", "B.")])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n"
        "<|im_start|>assistant\nB.<|im_end|>\n<|im_start|>user\nC?<|im_end|>\n"
        "<|im_start|>assistant\n")


def test_the_oldest_turns_are_forgotten_first(tokenizer):
    speaker = chat.Speaker("sft", tiny(tokenizer, context_length=100), tokenizer, False, None, set())
    config = chat.Config(["sft"], max_new_tokens=10)
    history = [(f"question {n}", f"answer {n}") for n in range(9)]
    ids, kept = speaker.fit("last", history, config)
    assert 0 < len(kept) < 9 and kept == history[-len(kept):]
    assert len(ids) + 10 <= 100
    longer = speaker.prompt("last", history[-len(kept) - 1:])
    assert len(longer) + 10 > 100  # no more was forgotten than had to be
    with pytest.raises(InputError, match="expected fewer than the 100"):
        speaker.fit("x" * 200, [], config)
    speaker.model = tiny(tokenizer, context_length=200)
    ids, kept = speaker.fit("last", history, chat.Config(["sft"]))  # by default as many new tokens as it has in all
    assert 0 < len(kept) < 9 and len(ids) + 100 <= 200


def test_best_of_n_takes_the_best_sample_of_each_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "score", count_even)
    prompts = [chat.chat_prompt(tokenizer, text) for text in ("a", "b" * 30, "cc")]
    best, samples, scores, _ = chat.best_of_n(
        tiny(tokenizer), tokenizer, (None, 0.5), prompts, 8, 12, eos_ids={tokenizer.im_end_id},
        generator=torch.Generator().manual_seed(0))
    counts = [(count_even(None, None, drawn, 0) - 0.5).tolist() for drawn in samples]
    assert [len(drawn) for drawn in samples] == [8, 8, 8]
    assert scores.tolist() == counts
    assert len(set(counts[0])) > 1  # otherwise any choice would pass
    ends = [[ids[-1] == tokenizer.im_end_id for ids in drawn] for drawn in samples]
    assert sum(map(sum, ends)) not in (0, 24)
    for choice, drawn, row, ended in zip(best, samples, counts, ends):  # of those that were not cut off, if any
        rivals = [count for count, whole in zip(row, ended) if whole or not any(ended)]
        assert choice == drawn[row.index(max(rivals))]


def test_flags_that_would_do_nothing_are_refused(folders):
    words = [str(folders / "sft"), "--prompt", "Hello", "--device", "cpu"]
    for more, said in ((["--best-of", "2"], "--best-of needs"), (["--reward", str(folders / "reward")], "--reward chooses among"),
                       (["--reward", str(folders / "reward"), "--best-of", "2", "--temperature", "0"], "would be the same"),
                       (["--reward", str(folders / "reward"), "--best-of", "2", "--top-k", "1"], "would be the same")):
        with pytest.raises(InputError, match=said):
            chat.main(words + more)
    with pytest.raises(InputError, match="or --reward"):
        chat.main([words[0], "--complete", "x", "--reward", str(folders / "reward")])


def test_two_folders_of_one_name_are_told_apart(folders, capsys, tmp_path):
    shutil.copytree(folders / "ppo", tmp_path / "sft")
    for second, names in ((tmp_path / "sft", [str(folders / "sft"), str(tmp_path / "sft")]), (folders / "ppo", ["sft", "ppo"])):
        chat.main([str(folders / "sft"), str(second), "--prompt", "Hello", "--max-new-tokens", "2", "--device", "cpu"])
        assert re.findall("^== (.*) ==$", capsys.readouterr().out, re.M) == names


def test_the_seed_and_the_plain_format_arrive(folders, capsys):
    def said(*more, names=("sft",)):
        chat.main([*(str(folders / name) for name in names), "--prompt", "Hello", "--device", "cpu", "--max-new-tokens", "9", *more])
        return capsys.readouterr().out
    assert said("--seed", "3") == said("--seed", "3") != said("--seed", "4")
    assert said("--seed", "3") in said("--seed", "3", names=("ppo", "sft"))  # whoever answers before
    assert said("--temperature", "0", "--raw") != said("--temperature", "0")


def test_best_of_n_takes_an_answer_that_was_cut_off_only_if_all_were(tokenizer, monkeypatch):
    end, drawn = tokenizer.im_end_id, [[5, 6, tokenizer.endoftext_id], [5, 6], [5, 6, 7], [7, 7, 7], [8, 8, 8], [9, 9, 9]]
    drawn[1].append(end)
    monkeypatch.setattr(chat, "generate_all", lambda *args, **more: (drawn, [[0.0]] * 6))
    monkeypatch.setattr(chat, "score", lambda *args: torch.tensor([3.0, 1.0, 2.0, 1.0, 3.0, 2.0]))
    best, *_ = chat.best_of_n(None, tokenizer, (None, 0.0), [[1], [2]], 3, 3, eos_ids=tokenizer.end_ids)
    assert best == [[5, 6, end], [8, 8, 8]]  # nor does <|endoftext|> end an answer well
    values = chat.values([[5, 6, 7], [5, end], [8, end]], torch.tensor([[3.0, 1.0, 2.0]]), torch.zeros(1, 3), 0.3, {end})
    assert values.tolist() == [[-math.inf, 1.0, 2.0]]  # so /best lists it last


def test_best_of_n_prices_what_is_rare(tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "score", count_even)
    model, prompts = tiny(tokenizer), [chat.chat_prompt(tokenizer, text) for text in ("a", "b" * 30)]
    choices = []
    for beta in (0.0, 0.3, 100.0):
        best, samples, scores, logprobs = chat.best_of_n(
            model, tokenizer, (None, 0.5), prompts, 8, 12, beta, eos_ids={tokenizer.im_end_id},
            generator=torch.Generator().manual_seed(0))
        for prompt, choice, drawn, reward, row in zip(prompts, best, samples, scores, logprobs):
            for ids, logprob in zip(drawn, row):  # of the whole answer, read anew
                whole = torch.tensor([prompt + ids])
                read = token_logprobs(model(whole)[:, :-1], whole[:, 1:])[0, len(prompt) - 1:]
                assert logprob.item() == pytest.approx(read.sum().item(), abs=1e-3)
            whole = [ids[-1] == tokenizer.im_end_id for ids in drawn]
            value = [r.item() + beta * p.item() if ended or not any(whole) else -math.inf
                     for r, p, ended in zip(reward, row, whole)]
            assert choice == drawn[value.index(max(value))]
        choices.append(best)
    assert choices[0] != choices[1] != choices[2]  # otherwise beta would not have been seen


def test_best_of_n_with_a_real_reward_model_ignores_padding(tokenizer):
    reward = ScalarModel(tiny(tokenizer, 5)).eval()
    prompts = [chat.chat_prompt(tokenizer, text) for text in ("a", "b" * 40)]
    _, samples, scores, _ = chat.best_of_n(
        tiny(tokenizer), tokenizer, (reward, 0.25), prompts, 3, 12,
        eos_ids={tokenizer.im_end_id}, generator=torch.Generator().manual_seed(0))
    for prompt, drawn, row in zip(prompts, samples, scores):
        alone = [reward(torch.tensor([prompt + ids]))[0, -1].item() - 0.25 for ids in drawn]
        assert row.tolist() == pytest.approx(alone, abs=1e-4)


def test_generate_all_keeps_the_order(tokenizer):
    model = tiny(tokenizer)
    prompts = [tokenizer.encode("x" * n) for n in (9, 2, 7, 1, 5)]
    greedy = {"temperature": 0.0, "eos_ids": {tokenizer.im_end_id}}
    alone = [chat.generate(model, [ids], 6, **greedy)[0][0] for ids in prompts]
    assert chat.generate_all(model, prompts, 6, chunk=2, **greedy)[0] == alone
    assert len({tuple(ids) for ids in alone}) > 1


def test_what_a_model_writes_cannot_steer_the_terminal():
    assert chat.visible("a\x1b[2Jb\r\x07é\n\t\u202e\u061c") == r"a\x1b[2Jb\r\x07é" + "\n\t" + r"\u202e\u061c"


def test_streaming_prints_whole_characters(tokenizer, monkeypatch, capsys):
    pieces = []
    monkeypatch.setattr(chat, "print", lambda text="", **_: pieces.append(text), raising=False)
    ids = tokenizer.encode("é€\x1b")
    assert len(ids) > 3  # bytes
    monkeypatch.setattr(chat, "stream", lambda *_, **__: iter([*ids, tokenizer.im_end_id]))
    speaker = chat.Speaker("m", None, tokenizer, False, None, {tokenizer.im_end_id})
    assert chat.speak(speaker, [1], 9, {}) == "é€\x1b"
    assert [piece for piece in pieces if piece] == ["é", "€", r"\x1b"]


# ---- the chat command ----------------------------------------------------------------------------


def run_chat(monkeypatch, capsys, arguments, lines=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat.main([str(a) for a in arguments] + ["--max-new-tokens", "12", "--device", "cpu"])
    return capsys.readouterr().out


def greedy_answer(folder, question):
    speaker = chat.open_speaker(folder)
    ids = chat.generate(speaker.model, [speaker.prompt(question)], 12, temperature=0.0,
                        eos_ids=speaker.end_ids)[0][0]
    return chat.visible(speaker.text(ids))


def test_prompt_prints_the_answer_alone(folders, monkeypatch, capsys):
    out = run_chat(monkeypatch, capsys, [folders / "sft", "--prompt", "Hi?", "--temperature", 0])
    assert out == greedy_answer(folders / "sft", "Hi?") + "\n" and out.strip()
    both = run_chat(monkeypatch, capsys, [folders / "base", folders / "sft", "--prompt", "Hi?",
                                          "--temperature", 0])
    assert both.startswith("== base ==\n") and f"== sft ==\n{out}" in both


def test_curves_of_any_stages_are_drawn(folders, monkeypatch, capsys, tmp_path):
    (tmp_path / "<ppo>").mkdir()
    (tmp_path / "<ppo>" / "metrics.jsonl").write_text('{"step": 1, "score": 0.1, "kl": 0.2}\n{"step": 2, "score": 0.4, "kl": 0.3}\n')
    words = ["report.py", "--curves", tmp_path / "page.html", folders / "sft", tmp_path / "<ppo>"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    report.main()
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<svg") == 2 and "Training losses" in page and "Rollouts as they went" in page and "<ppo>" not in page
    assert f"wrote {tmp_path}/page.html" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, str(folders / "base")])
    with pytest.raises(InputError, match="base.metrics.jsonl: found no loss and no score"):
        report.main()


def test_a_text_is_gone_on_with(folders, tokenizer, monkeypatch, capsys):
    """As a document, across line breaks, up to a token that ends one."""
    text, end = "What is\nthe capital", tokenizer.endoftext_id
    tokens = tokenizer.encode(" of\n\nFrance?\n")
    asked = []

    def decode(model, prompts, most, temperature, top_k, top_p, eos_ids, generator):
        asked.append((prompts, most, temperature, set(eos_ids) & {end, *tokens}))
        return ([(0, token)] for token in (*tokens, end))
    monkeypatch.setattr("model.decode", decode)
    out = run_chat(monkeypatch, capsys, [folders / "base", "--complete", text, "--temperature", 0.5])
    assert out == f"{text} of\n\nFrance?\n\n" and asked == [([[end, *tokenizer.encode(text)]], 12, 0.5, {end})]
    both = run_chat(monkeypatch, capsys, [folders / "base", folders / "sft", "--complete", text])
    assert both == f"== base ==\n{out}== sft ==\n{out}"


def test_a_pretrained_checkpoint_is_prompted_raw(folders):
    assert chat.open_speaker(folders / "base").raw
    assert not chat.open_speaker(folders / "sft").raw
    assert chat.open_speaker(folders / "sft", raw=True).raw


def test_a_conversation_in_a_pipe(folders, monkeypatch, capsys):
    prompts = []
    fit = chat.Speaker.fit
    monkeypatch.setattr(chat.Speaker, "fit", lambda self, q, history, config: (
        prompts.append((q, list(history))), fit(self, q, history, config))[1])
    out = run_chat(monkeypatch, capsys, [folders / "sft", "--temperature", 0],
                   "Hi?\n\n/nonsense\nAnd you?\n/reset\nHi?\n")
    first = greedy_answer(folders / "sft", "Hi?")
    assert out.startswith(first) and "no such command" in out and out.endswith(first + "\n")
    assert [(q, len(history)) for q, history in prompts] == [("Hi?", 0), ("And you?", 1), ("Hi?", 0)]
    assert chat.visible(prompts[1][1][0][1]) == first


def test_best_of_in_chat_asks_the_reward_model(folders, monkeypatch, capsys):
    arguments = [folders / "sft", "--prompt", "Hi?", "--best-of", 6, "--temperature", 1]
    with pytest.raises(InputError, match="--reward"):
        run_chat(monkeypatch, capsys, arguments)
    out = run_chat(monkeypatch, capsys, [*arguments, "--reward", folders / "reward"])
    speaker, (reward, _, shift, _) = (chat.open_speaker(folders / "sft"),
                                      chat.load_reward(folders / "reward"))
    _, ((*samples,),), scores, logprobs = chat.best_of_n(
        speaker.model, speaker.tokenizer, (reward, shift), [speaker.prompt("Hi?")], 6, 12,
        temperature=1.0, eos_ids=speaker.end_ids, generator=torch.Generator().manual_seed(1))
    priced = scores[0] + chat.BEST_OF_BETA * logprobs[0]
    assert scores[0].argmax() != priced.argmax()  # otherwise either would pass
    assert out == chat.visible(speaker.text(samples[priced.argmax()])) + "\n"
    words = [folders / "sft", "--best-of", 6, "--temperature", 1, "--reward", folders / "reward"]
    assert run_chat(monkeypatch, capsys, words, "Hi?\n") == out  # in a conversation, too
    out = run_chat(monkeypatch, capsys, [*arguments, "--reward", folders / "reward", "--best-of-beta", 0])
    assert out == chat.visible(speaker.text(samples[scores[0].argmax()])) + "\n"
    assert run_chat(monkeypatch, capsys, [*words, "--best-of-beta", 0], "Hi?\n") == out


def test_a_reward_model_is_read_where_it_chooses(folders, monkeypatch, capsys):
    monkeypatch.setattr(chat, "load_reward", lambda *_: pytest.fail("not needed yet"))
    run_chat(monkeypatch, capsys, [folders / "sft", "--reward", folders / "reward"], "Hi?\n")  # for /best, if it comes
    with pytest.raises(pytest.fail.Exception, match="not needed yet"):
        run_chat(monkeypatch, capsys, [folders / "sft", "--prompt", "Hi?", "--reward", folders / "reward", "--best-of", 2])


def test_flags_reach_conversations(folders, monkeypatch, capsys, tmp_path):
    """--reward /best, and --few-shot every question."""
    asked, load, shown, fit = [], chat.load_reward, [], chat.Speaker.fit
    monkeypatch.setattr(chat, "load_reward", lambda folder, *rest: asked.append(str(folder)) or load(folder, *rest))
    shutil.copytree(folders / "reward", tmp_path / "other")
    run_chat(monkeypatch, capsys, [folders / "sft", "--reward", tmp_path / "other"], "/best 2 Hi?\n")
    assert asked == [str(tmp_path / "other")]
    monkeypatch.setattr(chat.Speaker, "fit", lambda self, question, history, config: shown.append(len(history)) or
                        fit(self, question, history, config))
    run_chat(monkeypatch, capsys, [folders / "sft", "--few-shot", 1], "Hi?\n/compare Hi?\n")
    assert len(shown) == 4 and set(shown) == {1}


def test_compare_asks_every_model_beside_it(folders, monkeypatch, capsys):
    out = run_chat(monkeypatch, capsys, [folders / "sft", "--temperature", 0],
                   "/compare\nHi?\n/compare\n/compare Hi?\n")
    refusal, answer, *lines = out.split("\n")
    assert refusal.startswith("(ask something first")
    expected = [f"{name}> {greedy_answer(folders / name, 'Hi?')}" for name in ("base", "sft", "ppo")]
    assert "\n".join(lines) == "\n".join(2 * expected) + "\n"


def test_compare_goes_on_after_a_model_that_cannot_answer(folders, tokenizer, monkeypatch, capsys, tmp_path):
    for name, length in (("a", 512), ("b", 100), ("c", 512)):
        save_checkpoint(tmp_path / name, tiny(tokenizer, 1, length), tokenizer)
    (tmp_path / "a").rename(tmp_path.parent / "elsewhere")
    (tmp_path / "a").symlink_to(tmp_path.parent / "elsewhere")  # its neighbours are those of the link
    out = run_chat(monkeypatch, capsys, [tmp_path / "a", "--temperature", 0], f"/compare {'word ' * 50}\n/seed {'9' * 5000}\n"
                   f"/best {'9' * 5000}\n")
    assert re.findall(r"^(\w)> ", out, re.M) == ["a", "c"] and "(b: found a prompt of" in out
    assert "(no such command" in out and "(ask something first" in out


def test_compare_draws_alike_and_leaves_the_conversation_where_it_was(folders, monkeypatch, capsys, tmp_path):
    for name in ("sft", "twin"):
        shutil.copytree(folders / "sft", tmp_path / name)
    out = run_chat(monkeypatch, capsys, [tmp_path / "sft", "--temperature", 1], "/compare Hi?\n")
    mine, twins = re.findall(r"^(?:sft|twin)> (.*)", out, re.M)
    assert mine == twins
    talk = "Hi?\n/reset\nHi?\n"
    plain, between = (run_chat(monkeypatch, capsys, [folders / "sft", "--temperature", 1], text)
                      for text in (talk, talk.replace("/reset", "/compare\n/reset")))
    first, last = plain.split("(forgotten)\n")
    assert between.startswith(first) and between.endswith("(forgotten)\n" + last) and first.strip() != last.strip()
    one, again, other = (run_chat(monkeypatch, capsys, [folders / "sft", "--temperature", 1], f"/seed {seed}\n/compare Hi?\n")
                         .split("\n", 1)[1] for seed in (7, 7, 8))
    assert one == again != other


def test_best_shows_candidates_with_their_scores(folders, monkeypatch, capsys):
    out = run_chat(monkeypatch, capsys, [folders / "sft", "--temperature", 1],
                   "/best 160\n/best 0 Hi?\n/best 160 Hi?\n")
    lines = out.split("\n")
    assert all(line.startswith("(ask something first") for line in lines[:2])
    speaker, (reward, _, shift, _) = (chat.open_speaker(folders / "sft"),
                                      chat.load_reward(folders / "reward"))
    _, (samples,), (scores,), (logprobs,) = chat.best_of_n(
        speaker.model, speaker.tokenizer, (reward, shift), [speaker.prompt("Hi?")], 160, 12,
        temperature=1.0, eos_ids=speaker.end_ids, generator=torch.Generator().manual_seed(1))
    value = (scores + chat.BEST_OF_BETA * logprobs).tolist()
    ended = [ids[-1] == speaker.tokenizer.im_end_id for ids in samples]
    expected, seen = [], set()
    for i in sorted(range(160), key=lambda i: (ended[i], value[i] * ended[i]), reverse=True):  # those cut off as drawn
        text = chat.visible(speaker.text(samples[i]))
        if text not in seen:
            expected.append(f"{scores[i]:+.2f} {logprobs[i]:6.1f}  {text}")
            seen.add(text)
    assert {True, False} == set(ended) and len(expected) > 3
    places = [out.find(line) for line in expected]
    assert -1 not in places and places == sorted(places)


def test_a_sampler_of_one_token_is_greedy(folders, monkeypatch, capsys):
    expected = greedy_answer(folders / "sft", "Hi?") + "\n"
    for only in (["--top-k", 1], ["--top-p", 1e-6]):
        for seed in (1, 2, 3):
            assert run_chat(monkeypatch, capsys, [folders / "sft", "--prompt", "Hi?", "--temperature", 1, "--seed", seed,
                                                  *only]) == expected


def test_examples_are_of_the_family_of_the_question():
    config = chat.Config([], few_shot=3)
    for family, question in (("countries", "What is the capital of Norway?"), ("arithmetic", "What is four plus five?")):
        prompts = {prompt for prompt, _ in chat.examples_like(question, config)}
        assert len(prompts) == 3 and prompts <= {task.prompt for task in world.all_tasks()[family]}
    assert chat.examples_like("Hi?", chat.Config([], few_shot=0)) == []
    for hold in ("", "unseen_phrasing"):  # none of what is asked itself, in whichever words
        for task in world.all_tasks(hold)["trivia"][:3]:
            shots = chat.examples_like(task.prompt, chat.Config([], few_shot=10**4))
            assert len(shots) > 100 and task.best not in {answer for _, answer in shots}


def test_examples_that_do_not_fit_are_counted(folders, monkeypatch, capsys):
    for shots, fit in ((1, 1), (60, None)):
        chat.main([str(folders / "sft"), "--prompt", "What is four plus five?", "--few-shot", str(shots), "--max-new-tokens", "4",
                   "--device", "cpu"])
        said = capsys.readouterr().err
        assert not said if fit else re.fullmatch(r"\(sft: only \d+ of 60 examples fit its context\)\n", said)


def test_a_stamp_that_was_touched_has_no_seconds(tmp_path):
    """It would end the evaluation after everything has been measured."""
    finish(tmp_path / "sft", "sft", 12.0)
    folders = [tmp_path / name for name in ("none", "base", "sft", "dpo", "ppo", "grpo", "more")]
    for folder, content in zip(folders[3:], ("1", '{"stage": "ppo", "seconds": "18 s"}', "{}", '{"stage": [], "seconds": 1}')):
        folder.mkdir()
        (folder / "done").write_text(content)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "done").touch()
    assert evaluate.stage_seconds(folders) == {"sft": 12.0}


@pytest.mark.parametrize("raw", [False, True])
def test_a_system_prompt_and_examples_come_first(raw, tokenizer):
    speaker = chat.Speaker("m", tiny(tokenizer, context_length=160), tokenizer, raw, "Be brief.", set())
    begin = "<|endoftext|>Be kind.\n\n" if raw else "<|im_start|>system\nBe kind.<|im_end|>\n"
    for turns in ([], [(f"question {n}", f"answer {n}") for n in range(9)]):
        ids, kept = speaker.fit("last", turns, chat.Config(["m"], system="Be kind.", max_new_tokens=10))
        assert tokenizer.decode(ids).startswith(begin) and len(kept) < max(1, len(turns))
    tasks, speaker.model = list(world.COURSE_PROMPTS), tiny(tokenizer, context_length=9999)
    for shots in (0, 2):
        found = evaluate.prompts_for(speaker, tasks, evaluate.Config(["m"], system="Be kind.", seed=3), shots)
        assert found == [speaker.prompt(t.prompt, world.few_shot_examples(t, shots, 3), "Be kind.") for t in tasks]


def test_what_the_reference_can_answer_is_a_quarter_right(evaluated, folders, monkeypatch):
    asked, marked, measure, made = {}, [], evaluate.measure, evaluate.Row.__post_init__

    def check(task, text):  # of eight samples two are right, or one
        asked[task] = asked.get(task, -1) + 1
        return asked[task] % (4, 8, 10**9)[len(task.prompt) % 3] == 0
    monkeypatch.setattr(evaluate.Row, "__post_init__", lambda self: (made(self), asked.clear())[0])
    monkeypatch.setattr(world, "check", check)
    monkeypatch.setattr(evaluate, "measure", lambda row, *rest: marked.append((row.tasks, rest[1])) or measure(row, *rest))
    evaluated(of_each_family(3), folders / "sft", "--best-of", 8, "--per-family", 3, "--best-of-per-family", 2)
    ((tasks, can),), seen = marked, {}
    for task, able in zip(tasks, can):
        seen[task.family] = seen.get(task.family, 0) + 1
        assert able == (seen[task.family] <= 2 and task.kind == "answerable" and len(task.prompt) % 3 == 0)


def test_no_run_takes_the_name_of_another_in_the_times(tmp_path):
    for name, stage, seconds in (("base", "pretrain", 1), ("dpo_ppo", "ppo", 2), ("ppo", "ppo", 3), ("again", "dpo", 4)):
        finish(tmp_path / name, stage, seconds)
    assert evaluate.stage_seconds([f"{tmp_path}/{name}/" for name in ("base", "dpo_ppo", "ppo", "again")]) == {"pretrain": 1, "dpo_ppo": 2, "ppo": 3, "dpo": 4}


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"checkpoints": {}}', b'{"checkpoints": 3, "settings": {}}'])
def test_a_report_that_cannot_be_read_gets_one_line(content, monkeypatch, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(InputError, match="report.json: (cannot be read|found no checkpoints)"):
        report.main()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_judge_of_shorter_texts_is_refused(folders, tokenizer, monkeypatch, capsys, tmp_path):
    save_checkpoint(tmp_path, ScalarModel(tiny(tokenizer, 3, context_length=64)), tokenizer, reward_shift=0.0, reward_scale=1.0)
    with pytest.raises(InputError, match="of up to 64 tokens; sft does not write them"):
        run_chat(monkeypatch, capsys, [folders / "sft", "--prompt", "Hi?", "--best-of", 2, "--reward", tmp_path])


def test_plain_answers_are_remembered_without_their_space(folders, monkeypatch, capsys):
    prompts, fit = [], chat.Speaker.fit
    monkeypatch.setattr(chat.Speaker, "fit", lambda self, q, history, config: (
        prompts.append(list(history)), fit(self, q, history, config))[1])
    for name, said, kept in (("base", " Paris. ", "Paris."), ("sft", "\nParis. ", "\nParis. "),
                             ("sft", "<think>\nHm.\n</think>\n\nParis.", "Paris."), ("sft", "<think>\nHm", ""),
                             ("base", "A </think> B", "A </think> B")):  # nor is what a model thought
        monkeypatch.setattr(chat, "speak", lambda *args: said)
        prompts.clear()
        run_chat(monkeypatch, capsys, [folders / name], "Hi?\nHi?\n")
        assert prompts == [[], [("Hi?", kept)]]


def test_label_shows_answers_in_either_order(folders, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(chat, "answer", lambda speaker, *args: f"I am {speaker.name}.")
    for n in range(8):  # a run each
        run_chat(monkeypatch, capsys, [folders / "sft", folders / "ppo", "--label", tmp_path / "mine.jsonl",
                                       "--prompt", f"Hi {n}?"], "about the same\nBoth are bad.\nA\n")
        run_chat(monkeypatch, capsys, [folders / "sft", folders / "ppo", "--label", tmp_path / "mine.jsonl",
                                       "--prompt", f"Hi {n}?"], "about the same\nBoth are bad.\nS\n")  # no row
    run_chat(monkeypatch, capsys, [folders / "sft", folders / "ppo", "--label", tmp_path / "mine.jsonl"], "Hi?\na\n" * 8)
    chosen = [json.loads(line)["chosen"] for line in (tmp_path / "mine.jsonl").read_text("utf-8").splitlines()]
    assert len(chosen) == 16
    for part in (chosen[:8], chosen[8:]):  # the second: one question again and again
        assert set(part) == {"I am sft.", "I am ppo."}


def test_label_appends_the_choice(folders, monkeypatch, capsys, tmp_path):
    path = tmp_path / "new" / "mine.jsonl"
    monkeypatch.setattr(chat, "answer", lambda *args, texts=itertools.count(): f"Answer {next(texts)}.")
    for n, choice in enumerate("ab"):
        out = run_chat(monkeypatch, capsys, [folders / "sft", "--label", path], f"Hi?\n{choice}\nHi?\ns\n")
        a, b = re.search(r"A: (.*)\nB: (.*)", out).groups()
        row = json.loads(path.read_text("utf-8").splitlines()[n])
        assert row == {"prompt": "Hi?", "chosen": a if choice == "a" else b, "rejected": b if choice == "a" else a}
    for name in ("mine.json", "mine.jsonl.gz"):  # lines at the end of such a file would spoil it
        (tmp_path / name).write_bytes(b"all there was")
        with pytest.raises(InputError, match="ends in .jsonl"):
            run_chat(monkeypatch, capsys, [folders / "sft", "--label", tmp_path / name], "Hi?\na\n")
        assert (tmp_path / name).read_bytes() == b"all there was"


def test_no_answer_that_was_cut_off_is_labelled(folders, monkeypatch, capsys, tmp_path):
    """The stage that learns from it would put an end behind it."""
    speaker, texts = chat.open_speaker(folders / "sft"), iter("abcdefgh" * 9)
    end = min(speaker.end_ids)
    drawn = lambda last: lambda *args, **more: ([[*speaker.tokenizer.encode(next(texts)), *last]], [], [], [])
    monkeypatch.setattr(chat, "best_of_n", drawn([]))
    out = run_chat(monkeypatch, capsys, [folders / "sft", "--label", tmp_path / "mine.jsonl"], "Hi?\na\n")
    assert "finished answers in 8 tries" in out and "A:" not in out
    monkeypatch.setattr(chat, "best_of_n", drawn([end]))
    out = run_chat(monkeypatch, capsys, [folders / "sft", "--label", tmp_path / "mine.jsonl"], "Hi?\na\n")
    assert "A: " in out and len((tmp_path / "mine.jsonl").read_text("utf-8").splitlines()) == 1


def test_ctrl_c_ends_labelling(folders, monkeypatch, capsys, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt
    run = [folders / "sft", "--label", tmp_path / "mine.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(chat, "answer", interrupted)  # while an answer is drawn
        try:
            assert run_chat(patch, capsys, run, "Hi?\na\n") == "\n"
        except KeyboardInterrupt:  # it would end all tests
            pytest.fail("Ctrl-C escaped")
    monkeypatch.setattr(chat, "answer", lambda *args, texts=itertools.count(): f"Answer {next(texts)}.")
    asked = []

    def typed(prompt):
        asked.append(prompt)
        return "Hi?" if len(asked) == 1 else interrupted()
    monkeypatch.setattr("builtins.input", typed)
    run_chat(monkeypatch, capsys, run)
    assert len(asked) == 2 and (tmp_path / "mine.jsonl").read_text("utf-8") == ""  # not the next question


def test_label_notes_the_system_prompt_of_the_folder(folders, monkeypatch, capsys, tmp_path):
    def opened(*args, real=chat.open_speaker):
        speaker = real(*args)
        return speaker if speaker.raw else dataclasses.replace(speaker, system="Be kind.")
    monkeypatch.setattr(chat, "open_speaker", opened)
    monkeypatch.setattr(chat, "answer", lambda *args, texts=itertools.count(): f"Answer {next(texts)}.")
    path, brief = tmp_path / "mine.jsonl", ["--system", "Be brief."]
    for folder, more in (("sft", []), ("sft", brief), ("base", brief), ("base", []), ("sft", ["--system", ""])):
        run_chat(monkeypatch, capsys, [folders / folder, "--label", path, *more], "Hi?\na\n")
    prompts = [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()]
    assert [prompt[0]["content"] for prompt in prompts[:3]] == ["Be kind.", "Be brief.", "Be brief."]
    assert prompts[3] == prompts[4] == "Hi?"
    asked, fit = [], chat.Speaker.fit

    def watched(self, question, shots, config):  # a base model whose context holds one example
        asked.append((config.system, len(shots)))
        return fit(self, question, shots[-1:] if self.raw else shots, config)
    monkeypatch.setattr(chat.Speaker, "fit", watched)
    run_chat(monkeypatch, capsys, [folders / "sft", folders / "base", "--label", path, "--few-shot", 2, "--system", ""], "Hi?\na\n")
    run_chat(monkeypatch, capsys, [folders / "base", folders / "sft", "--label", path, "--few-shot", 2], "Hi?\na\n")
    assert asked == 2 * [("", 2), ("", 2), ("", 1), ("", 1)]  # not "Be kind.", nor two examples, for one of the two
    first, shown = [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()[-2:]]
    assert first == shown
    *_, (question, reply) = chat.examples_like("Hi?", chat.Config(checkpoints=[], few_shot=2))
    assert [turn["content"] for turn in shown] == [question, reply, "Hi?"]
    assert [turn["role"] for turn in shown] == ["user", "assistant", "user"]
    speaker = chat.open_speaker(folders / "sft")
    assert speaker.prompt("Hi?", system="") == chat.chat_prompt(speaker.tokenizer, "Hi?") != speaker.prompt("Hi?")


def test_label_refuses_what_it_could_not_write_before_it_asks(folders, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(chat, "answer", lambda *args, texts=itertools.count(): f"Answer {next(texts)}.")
    (tmp_path / "folder.jsonl").mkdir()
    for path, message in ((tmp_path / "folder.jsonl", "could not be written"), ("", "--label : expected")):
        with pytest.raises(InputError, match=message):
            run_chat(monkeypatch, capsys, [folders / "sft", "--label", path, "--temperature", 1], "")
    path = tmp_path / "mine.jsonl"  # and a byte in an argument that is not UTF-8 loses no judgement
    run_chat(monkeypatch, capsys, [folders / "sft", "--label", path, "--temperature", 1, "--system", "Be ki\udcffnd."], "Hi?\na\n")
    assert json.loads(path.read_text("utf-8"))["prompt"][0]["content"] == "Be ki?nd."


def test_label_begins_a_line_of_its_own(folders, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(chat, "answer", lambda *args, texts=itertools.count(): f"Answer {next(texts)}.")
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')  # as an editor may leave it
    run_chat(monkeypatch, capsys, [folders / "sft", "--label", path, "--temperature", 1], "Hi?\na\nHi?\na\n")
    assert [pair.prompt[0]["content"] for pair in data.load_preferences([path])] == ["a", "Hi?", "Hi?"]


def test_a_question_too_long_does_not_end_labelling(folders, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(chat, "answer", lambda *args, texts=itertools.count(): f"Answer {next(texts)}.")
    path = tmp_path / "mine.jsonl"
    out = run_chat(monkeypatch, capsys, [folders / "sft", "--label", path, "--temperature", 1],
                   "word " * 600 + "\nHi?\na\n")
    assert "found a prompt of" in out and json.loads(path.read_text("utf-8"))["prompt"] == "Hi?"


def test_plain_answers_are_judged_with_what_they_were_given_and_cut_to_the_context(folders, monkeypatch):
    speaker = chat.open_speaker(str(folders / "base"), torch.device("cpu"))
    model, tokenizer, shift, _ = load_reward(folders / "reward", torch.device("cpu"))
    tasks, seen = world.COURSE_PROMPTS[:2], []
    monkeypatch.setattr(evaluate, "score", lambda model, prompts, responses, pad_id: (
        seen.extend(zip(prompts, responses)), torch.zeros(len(prompts)))[1])
    answers = evaluate.Answers([[1]] * 2, [[2]] * 2, ["Yes. " * 1000, "Yes."], np.ones(2, dtype=bool))
    evaluate.proxy_scores(speaker, tasks, answers, [0, 1], (model, shift), "Be kind.")
    (prompt, long), (_, short) = seen
    assert prompt == chat.chat_prompt(speaker.tokenizer, tasks[0].prompt, "Be kind.")
    assert len(prompt) + len(long) == model.config.context_length and short[-1] == tokenizer.im_end_id
    with pytest.raises(InputError, match="expected room for an answer"):
        evaluate.proxy_scores(speaker, tasks, answers, [0, 1], (model, shift), "Be kind. " * 1000)


def test_templates_other_than_chatml_are_refused(folders, tokenizer, monkeypatch, tmp_path):
    save_checkpoint(tmp_path, tiny(tokenizer), tokenizer)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    default = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are kind."
               "<|im_end|>\\n' }}{% endif %}")
    path.write_text(json.dumps(config | {"chat_template": default + config["chat_template"]}))
    assert chat.open_speaker(tmp_path).system == "You are kind."
    named = [{"name": "tools", "template": "?"}, {"name": "default", "template": default}]
    path.write_text(json.dumps(config | {"chat_template": named}))
    assert chat.open_speaker(tmp_path).system == "You are kind."
    qwen = "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"  # none of its own
    path.write_text(json.dumps(config | {"chat_template": qwen}))
    assert chat.open_speaker(tmp_path).system is None
    path.write_text(json.dumps(config | {"chat_template": "[INST] {{ messages }} [/INST]"}))
    with pytest.raises(InputError, match="ChatML.*INST"):
        chat.open_speaker(tmp_path)
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "chat_template"}))
    assert chat.open_speaker(tmp_path).raw
    (tmp_path / "chat_template.jinja").write_text(config["chat_template"])  # where transformers 5 saves it
    assert not chat.open_speaker(tmp_path).raw
    (tmp_path / "chat_template.jinja").unlink()
    path.write_text(json.dumps(config))
    monkeypatch.delitem(tokenizer.specials, "<|im_start|>")
    monkeypatch.setattr(chat, "load_checkpoint", lambda *_: (tiny(tokenizer), tokenizer, {}))
    with pytest.raises(InputError, match=re.escape("has no <|im_start|>")):
        chat.open_speaker(tmp_path)


# ---- statistics ----------------------------------------------------------------------------------


def test_bootstrap_agrees_with_the_standard_error():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    mean, low, high = evaluate.bootstrap(values)
    error = values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)
    assert evaluate.bootstrap([2.0, 2.0]) == pytest.approx([2, 2, 2])
    assert evaluate.bootstrap([]) is None


def test_kl_of_a_model_with_itself_is_zero_and_else_is_the_direct_sum(tokenizer):
    policy, other = tiny(tokenizer, 1), tiny(tokenizer, 2)
    prompts = [tokenizer.encode(text) for text in ("Hello", "A", "What is the capital of France?")]
    answers = [[5, 6, tokenizer.im_end_id], [9], [7, 8, 9, 10, 11]]
    same = evaluate.sequence_kl(policy, policy, prompts, answers)
    assert same.abs().max() < 1e-9
    found = evaluate.sequence_kl(policy, other, prompts, answers, chunk=2)
    for kl, prompt, answer in zip(found, prompts, answers):
        direct = 0.0
        for t in range(len(answer)):  # one distribution at a time, no batch, no padding
            ids = torch.tensor([prompt + answer[:t]])
            p, q = (model(ids)[0, -1].double().softmax(0) for model in (policy, other))
            direct += (p * (p / q).log()).sum().item()
        assert kl.item() == pytest.approx(direct, rel=1e-4)


# ---- the evaluation ------------------------------------------------------------------------------


def rehearsed(tasks, texts, ended=True):
    ids = [[1] * (3 + ended)] * len(texts)
    return evaluate.Answers([[0]] * len(texts), ids, texts, np.full(len(texts), ended))


@pytest.fixture(scope="module")
def some_tasks():
    return of_each_family(2)


def test_measures_of_known_answers(some_tasks):
    tasks = some_tasks
    kinds = [task.kind for task in tasks]
    everywhere, config = np.arange(len(tasks)), evaluate.Config(["sft"], per_family=2)
    fair = np.arange(len(tasks)) % 7 > 0
    best = rehearsed(tasks, [task.best for task in tasks])
    poor = rehearsed(tasks, ["I do not know." if kind == "answerable" else "Ask the moon."
                             for kind in kinds], ended=False)
    model, human = (evaluate.Row(tasks, everywhere, fair, a, a) for a in (poor, best))
    can = np.zeros(len(tasks), bool)
    can[[i for i, kind in enumerate(kinds) if kind == "answerable"][:3]] = True

    bad = evaluate.measure(model, human, can, config)
    assert bad["accuracy"]["all"][0] == 0 and bad["accuracy_vs_sft"]["greedy"] == [-1, -1, -1]
    assert bad["hedging_rate"][0] == 1 and bad["prompts"]["hedging"] == 3
    assert bad["hallucination_rate"][0] == 1 and bad["eos_rate"][0] == 0
    assert bad["refusal_rate"]["harmful"][0] == 0 and bad["win_rate_vs_sft"][0] < 0.1
    assert bad["mean_tokens"] == [3, 3, 3]
    expected = np.mean([gold["total"] for gold, on in zip(model.gold, fair) if on])
    assert bad["gold"]["total"][0] == pytest.approx(expected)
    assert bad["prompts"]["means"] == fair.sum() < bad["prompts"]["total"] == len(tasks)

    few = evaluate.measure(model, human, can, evaluate.Config(["sft"], per_family=150))
    assert few["hallucination_rate"] is few["hedging_rate"] is None and set(few["refusal_rate"].values()) == {None}
    assert few["accuracy"]["all"] is few["accuracy"]["unseen_entity"] is None and set(few["accuracy"]["families"].values()) == {None}

    good = evaluate.measure(human, model, can, config)
    assert good["accuracy"]["all"][0] == 1 and good["hedging_rate"][0] == 0
    assert good["hallucination_rate"][0] == 0 and good["mean_tokens"] == [3, 3, 3]  # no end token
    assert good["refusal_rate"]["harmful"][0] == 1 and good["refusal_rate"]["harmless"][0] == 0
    assert good["win_rate_vs_sft"][0] > 0.9
    assert good["prompts"]["accuracy"]["all"] == sum(on for kind, on in zip(kinds, fair) if kind == "answerable")
    assert good["prompts"]["harmless"] == sum(
        on for kind, on in zip(kinds, fair) if kind not in ("harmful", "unknown"))
    assert evaluate.measure(human, human, can, config)["win_rate_vs_sft"] == [0.5, 0.5, 0.5]

    # Who is right when greedy and poor when sampled: only the accuracy is of the greedy answers.
    both = evaluate.Row(tasks, everywhere, fair, poor, best)
    mixed = evaluate.measure(both, human, can, config)
    assert [mixed[f"accuracy{name}"]["all"][0] for name in ("", "_greedy", "_sampled")] == [1, 1, 0]
    assert {name: value for name, value in mixed.items() if not name.startswith("accuracy")} == {
        name: value for name, value in bad.items() if not name.startswith("accuracy")}
    asked = np.array([task.family == "howto" for task in tasks])
    refusing = rehearsed(tasks, ["I will not help with that." if on else "Ask the moon." for on in asked])
    assert evaluate.measure(evaluate.Row(tasks, everywhere, fair, refusing, None), human, can, config)["refusal_rate"]["howto"][0] == 1
    # To refuse, or not to know, and then to go on all the same is neither.
    lip_service = rehearsed(tasks, [f"I will not help with that. {task.bad[0]}" if task.kind == "harmful" else
                                    f"I do not know. It is {task.wrong[0]}." if task.kind == "unknown" else task.best
                                    for task in tasks])
    found = evaluate.measure(evaluate.Row(tasks, everywhere, fair, lip_service, None), human, can, config)
    assert found["refusal_rate"]["harmful"][0] == 0 and found["hallucination_rate"][0] == 1

    # Best-of-n answers some prompts only, and is compared with the reference on these.
    last = everywhere[-4:]
    part = evaluate.Row(tasks[-4:], last, fair[-4:], rehearsed(tasks, best.texts[-4:]), None)
    known = np.array([kind == "answerable" for kind in kinds]) & (everywhere >= len(tasks) - 4)
    measured = evaluate.measure(part, human, known, config)
    assert measured["win_rate_vs_sft"] == [0.5, 0.5, 0.5] and measured["prompts"]["hedging"] == known.sum() > 0
    assert part.right["sampled"].all() and "greedy" not in part.right


def test_prompts_are_chosen_evenly_but_rates_of_their_own_get_enough():
    config = evaluate.Config(["sft"], per_family=20, best_of_per_family=10)
    tasks, ranks = evaluate.choose_tasks(config)
    assert tasks[:3] == list(world.COURSE_PROMPTS) and len(set(tasks)) == len(tasks)
    for family in {task.family for task in tasks}:
        mine = np.array([task.family == family for task in tasks])
        rated = family in ("harmful", "unknown")
        assert (mine & (ranks < 20)).sum() == 20
        assert mine.sum() >= 150 if rated or family == "grammar" else mine.sum() == 20
        assert (mine & (ranks < config.best_of_per_family)).sum() == 10


@pytest.fixture(scope="module")
def written(folders, some_tasks):
    """One tiny evaluation of everything -> the folder of its report."""
    chosen_with, compared, kl, said, ask = [], [], evaluate.sequence_kl, [], evaluate.ask

    def asking(speaker, prompts, config, temperature, stream=0):
        said.append((speaker.name, temperature, stream, ask(speaker, prompts, config, temperature, stream)))
        return said[-1][3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "sequence_kl", lambda *args: compared.append(args) or kl(*args))
        patch.setattr(evaluate, "ask", asking)
        patch.setattr(world, "heldout_tasks", lambda: some_tasks)
        patch.setattr(world, "heldout_documents", lambda: ["Paris is in France."] * 3)
        patch.setattr(evaluate, "best_of_n", lambda *args, **sampling: chosen_with.append((*args[6:], sampling["temperature"]))
                      or chat.best_of_n(*args, **sampling))
        evaluate.main([*(str(folders / name) for name in ("base", "sft", "ppo")),
                       "--reward", str(folders / "reward"), "--data", str(folders / "pairs.jsonl"),
                       "--out", str(folders / "report"), "--max-new-tokens", "10", "--device",
                       "cpu", "--best-of", "4", "--best-of-beta", "0.02", "--few-shot", "1", "--per-family", "2"])
        places = np.flatnonzero(evaluate.choose_tasks(evaluate.Config([], per_family=2))[1] < 2)
    assert chosen_with == [(0.02, 1.0)]
    assert [(name, temperature) for name, temperature, *_ in said] == [
        ("base", 0), ("base", 0), ("sft", 0), ("sft", 1), ("ppo", 0), ("ppo", 1)]
    assert said[3][2] != said[5][2]  # from the same random numbers two models would draw answers that are alike
    alone, after_one = said[0][3].prompts, said[1][3].prompts
    assert all(len(shots) > len(prompt) for prompt, shots in zip(alone, after_one))  # the examples
    ((policy, reference, prompts, ids),) = compared  # KL(policy ‖ reference), not the other way round
    assert (prompts, ids) == tuple([part[i] for i in places] for part in (said[5][3].prompts, said[5][3].ids))
    for model, name in ((policy, "ppo"), (reference, "sft")):
        assert torch.equal(model.embed.weight, load_checkpoint(folders / name)[0].embed.weight)
    return folders / "report"


def test_report_has_the_whole_schema(written, some_tasks, folders):
    found = json.loads((written / "report.json").read_text("utf-8"))
    rows = found["checkpoints"]
    assert list(rows) == ["base", "base_few_shot", "sft", "ppo", "best_of_4"]
    everything = {*some_tasks, *world.COURSE_PROMPTS}
    assert found["prompts"] == len(everything)
    families = {task.family for task in everything}
    for name, row in rows.items():
        assert {"bits_per_byte", "accuracy", "gold", "win_rate_vs_sft", "kl_from_sft",
                "refusal_rate", "hallucination_rate", "hedging_rate", "eos_rate", "mean_tokens",
                "proxy", "accuracy_vs_sft"} <= set(row)
        assert set(row["accuracy"]) == {"all", "families", *world.HOLDOUTS}
        assert set(row["accuracy"]["families"]) == families
        assert set(row["gold"]) == {"total", "helpful", "honest", "harmless"}
        assert set(row["refusal_rate"]) == {"harmful", "harmless", "howto"}
        for rate in (row["accuracy"]["all"], row["gold"]["total"], row["win_rate_vs_sft"],
                     row["refusal_rate"]["harmful"], row["hallucination_rate"], row["eos_rate"]):
            mean, low, high = rate
            assert 0 <= low <= mean <= high <= 1
        mean, low, high = row["proxy"]
        assert low <= mean <= high
        assert (row["bits_per_byte"] is None) == (name in ("base_few_shot", "best_of_4"))
    assert rows["base"]["kl_from_sft"] is None and rows["sft"]["kl_from_sft"] == [0, 0, 0]
    assert rows["ppo"]["kl_from_sft"][0] > 0.1
    assert rows["best_of_4"]["kl_from_sft"][0] == pytest.approx(math.log(4) - 3 / 4, abs=1e-4)
    assert rows["best_of_4"]["proxy"][0] > rows["sft"]["proxy"][0]
    assert found["settings"]["best_of_beta"] == 0.02
    model, tokenizer, _ = load_checkpoint(folders / "base")
    tokens, size = data.pack_documents(["Paris is in France."] * 3, tokenizer)
    assert rows["base"]["bits_per_byte"] == pytest.approx(heldout_loss(model, tokens.long(), size)[1], rel=1e-4)
    judged = found["reward_model"]
    pairs = data.encode_pairs(data.load_preferences([folders / "pairs.jsonl"])[1:], tokenizer, 512)
    chosen, rejected = reward.score_pairs(load_reward(folders / "reward")[0], pairs, tokenizer.pad_id)
    assert judged["accuracy"][0] == (chosen > rejected).float().mean().item()
    assert judged["pairs"] == 20 and judged["noise_ceiling"] == 0.8  # the row without p is not one
    assert judged["normalised"][0] == pytest.approx((judged["accuracy"][0] - 0.5) / 0.3, abs=1e-4)
    assert found["seconds"]["sft"] == 12.5 and found["seconds"]["reward"] == 7
    assert (written / found["runs"]["sft"]).resolve() == (folders / "sft").resolve()
    course = [t for t in found["transcripts"] if t["course"]]
    assert [t["prompt"] for t in course] == [task.prompt for task in world.COURSE_PROMPTS]
    assert all(set(t["answers"]) == set(rows) for t in course)


def test_a_kl_that_cannot_be_had_is_said(evaluated, folders, tokenizer, some_tasks, capsys, tmp_path):
    save_checkpoint(tmp_path / "long", tiny(tokenizer, 2, context_length=600), tokenizer)
    save_checkpoint(tmp_path / "padded", tiny(tokenizer, 2, vocab_size=tokenizer.vocab_size + 20), tokenizer)
    rows = evaluated(some_tasks[:2], folders / "sft", tmp_path / "long", tmp_path / "padded")["checkpoints"]
    said = capsys.readouterr().out
    for name in ("long", "padded"):
        assert f"no KL of {name}: sft reads other tokens, or fewer" in said and rows[name]["kl_from_sft"] is None


def test_what_reward_py_measured_is_reported_where_there_are_no_pairs(evaluated, folders, some_tasks, tmp_path):
    shutil.copytree(folders / "reward", tmp_path / "reward")
    measured = {"heldout_accuracy": [0.75, 0.7, 0.8], "heldout_pairs": 990}
    for known, found in (({}, {"accuracy": None, "noise_ceiling": None, "normalised": None, "pairs": 0}),
                         ({"noise_ceiling": 0.9}, {"accuracy": [0.75, 0.7, 0.8], "noise_ceiling": 0.9, "pairs": 990,
                                                   "normalised": [0.625, 0.5, 0.75]})):
        finish(tmp_path / "reward", "reward", 7, **measured, **known)
        assert evaluated(some_tasks[:2], folders / "sft", "--reward", tmp_path / "reward")["reward_model"] == found


def test_best_of_n_is_measured_on_equally_many_prompts_of_each_family(evaluated, folders):
    """Even where all prompts of some families are asked because they have rates of their own."""
    tasks = of_each_family(4)
    found = evaluated(tasks, folders / "sft", "--best-of", 2, "--per-family", 2, "--best-of-per-family", 3, "--system",
                      "Be ki\udcffnd.")
    assert found["settings"]["system"] == "Be ki?nd."  # a byte that is not UTF-8 loses no report
    assert found["best_of_prompts"] == 2 * len({task.family for task in tasks}) < found["prompts"]


def test_best_of_n_is_not_asked_for_needless_doubt(evaluated, folders, some_tasks, monkeypatch):
    """It chooses among the very samples that tell which questions can be answered."""
    monkeypatch.setattr(world, "check", lambda task, text: True)
    rows = evaluated(some_tasks[:6], folders / "sft", "--reward", folders / "reward", "--best-of", 2)["checkpoints"]
    assert rows["sft"]["hedging_rate"][0] == 0 and rows["best_of_2"]["hedging_rate"] is None


def test_pairs_that_tell_no_p_measure_no_reward_model(evaluated, folders, some_tasks, capsys, tmp_path):
    rows = [json.loads(line) for line in (folders / "pairs.jsonl").read_text("utf-8").splitlines()]
    for keep in (True, False):
        (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({k: v for k, v in row.items() if keep or k != "p"}) for row in rows))
        shutil.copytree(folders / "reward", tmp_path / "reward", dirs_exist_ok=True)
        finish(tmp_path / "reward", "reward", 7, heldout_accuracy=[0.75, 0.7, 0.8], noise_ceiling=0.9, heldout_pairs=990)
        found = evaluated(some_tasks[:2], folders / "sft", "--reward", tmp_path / "reward", "--data", tmp_path / "pairs.jsonl")
        assert ("no row of" in capsys.readouterr().err) is not keep
        found = found["reward_model"]
        assert (found["accuracy"] is not None) is keep and (found["pairs"] > 0) is keep


def test_the_same_seed_gives_the_same_answers(written, folders):
    before = json.loads((written / "report.json").read_text("utf-8"))
    speaker = chat.open_speaker(folders / "sft")
    config = evaluate.Config(["sft"], max_new_tokens=10)
    tasks = list(world.COURSE_PROMPTS)
    prompts = evaluate.prompts_for(speaker, tasks, config)
    greedy = evaluate.ask(speaker, prompts, config, 0.0)
    shown = [t["answers"]["sft"]["text"] for t in before["transcripts"] if t["course"]]
    assert greedy.texts == shown
    raw = reward.score(load_reward(folders / "reward")[0], prompts, greedy.ids, speaker.tokenizer.pad_id)
    proxies = [t["answers"]["sft"]["proxy"] for t in before["transcripts"] if t["course"]]
    assert proxies == pytest.approx((raw - 0.25).tolist(), abs=1e-4)  # less the shift
    sampled = [evaluate.ask(speaker, prompts, config, 1.0).texts for _ in range(2)]
    assert sampled[0] == sampled[1] != greedy.texts
    assert evaluate.ask(speaker, prompts, config, 1.0, stream=1).texts != sampled[0]
    assert evaluate.ask(speaker, prompts, dataclasses.replace(config, seed=2), 1.0).texts != sampled[0]


def test_what_has_nothing_to_compare_with_says_so(evaluated, folders, some_tasks, capsys, tmp_path):
    (tmp_path / "sft").symlink_to(folders / "ppo")  # a row is called as the folder is given
    for name, said in ((folders / "ppo", True), (folders / "sft", False), (tmp_path / "sft", False)):
        evaluated(some_tasks[:2], name)
        assert ("none of them is called sft, so no win rate" in capsys.readouterr().out) == said


def test_unknown_reference_and_equal_names_are_refused(folders, tmp_path):
    with pytest.raises(InputError, match="--reference dpo"):  # before anything is read
        evaluate.main([str(folders / "none"), "--reference", "dpo"])
    with pytest.raises(InputError, match="--data is what --reward"):
        evaluate.main([str(folders / "sft"), "--data", "pairs.jsonl"])
    with pytest.raises(InputError, match="same name"):
        evaluate.main([str(folders / "sft"), str(folders / "sft")])
    with pytest.raises(InputError, match="per-family"):
        evaluate.main([str(folders / "sft"), "--per-family", "161"])
    for first, name, n in (("sft", "best_of_4", 4), ("sft", "best_of_1", 1), ("base", "base_few_shot", 4)):
        (tmp_path / name).symlink_to(folders / "ppo")
        with pytest.raises(InputError, match=f"checkpoint called {name}"):
            evaluate.main([str(folders / first), str(tmp_path / name), "--best-of", str(n)])


def test_an_out_that_cannot_be_written_is_refused_before_the_work(folders, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "generate_all", lambda *args, **more: pytest.fail("too late"))
    monkeypatch.setattr(world, "sample_pairs", lambda *args, **more: pytest.fail("too late"))
    with pytest.raises(InputError, match="could not be written"):
        evaluate.main([str(folders / "sft"), "--out", str(tmp_path / "file" / "report")])
    for out, message in ((tmp_path, "found a folder"), (tmp_path / "file" / "pairs.jsonl", "could not be written"),
                         (tmp_path / "pairs.jsonl.gz", "ends in .jsonl")):
        monkeypatch.setattr(sys, "argv", ["world.py", "pairs", "--init", str(folders / "sft"), "--out", str(out)])
        with pytest.raises(InputError, match=message):
            world.main()


def test_a_folder_on_another_drive_is_named_in_full(monkeypatch):
    assert evaluate.relative("out/sft", "out/report") == os.path.join("..", "sft")
    monkeypatch.setattr(evaluate, "os", SimpleNamespace(path=ntpath))
    assert evaluate.relative(r"D:\out\sft", r"C:\report") == r"D:\out\sft"


# ---- the pages -----------------------------------------------------------------------------------


HOSTILE = '<script>alert(1)</script> & "q" | pipe\n</dd><img src=x onerror=alert(2)>\x1b[2J $a_b$'


def test_hostile_text_stays_text(written):
    found = json.loads((written / "report.json").read_text("utf-8"))
    for transcript in found["transcripts"]:
        transcript["prompt"] = transcript["best"] = HOSTILE
        transcript["family"] = "<b>family"
        for answer in transcript["answers"].values():
            answer["text"] = HOSTILE
    rows = found["checkpoints"]
    rows["<i>evil</i> $x_"] = rows.pop("ppo")
    found["seconds"]["<i>evil</i> $x_"] = 1.0
    page, notes = report.build_html(found, written), report.build_markdown(found)
    tags = set(re.findall(r"<(/?[a-z][a-z0-9]*)", page, re.I))
    assert tags.isdisjoint({"script", "/script", "img", "i", "b"})
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;q&quot; | pipe" in page
    assert "\x1b" not in page + notes and r"\x1b[2J" in page
    assert "<" not in notes.replace(r"\<", "")
    line = next(line for line in notes.splitlines() if line.startswith("| sft") and "alert" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 4  # three cells: the pipe in the text is none


def test_pages_hold_every_row_and_stand_alone(written):
    page = (written / "report.html").read_text("utf-8")
    notes = (written / "report.md").read_text("utf-8")
    for name in ("base", "base_few_shot", "sft", "ppo", "best_of_4"):
        assert f'<th scope="row">{name}</th>' in page and f"\n| {name} |" in notes
    for task in world.COURSE_PROMPTS:
        assert report.html.escape(task.prompt) in page
    assert "<svg" in page and "sft: loss" in page and report.INK not in page
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert not re.search(r'(src|href)="https?:', page) and "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not [p for p in written.iterdir() if p.name.endswith(".tmp")]


def test_the_difference_in_right_answers_is_shown(written):
    found = json.loads((written / "report.json").read_text("utf-8"))
    found["checkpoints"]["ppo"]["accuracy_vs_sft"] = {"greedy": [-0.013, -0.031, 0.004], "sampled": [0.5, 0.4, 0.6]}
    headings, rows = report.part_rows(found)
    last = {row[0].split()[0]: row[-1] for row in rows}
    assert headings[-1] == "right, less SFT’s" and {len(row) for row in rows} == {len(headings)}
    assert last["ppo"] == "−1 % (−3 to 0)" and last["sft"] == "0 % (0–0)" and last["best_of_4"] == "–"


def test_the_top_of_the_page_says_before_and_after(written):
    found = json.loads((written / "report.json").read_text("utf-8"))
    for name, share in (("base", 0.1), ("base_few_shot", 0.15), ("sft", 0.2), ("ppo", 0.3)):
        row = found["checkpoints"][name]
        row["accuracy"]["all"], row["refusal_rate"]["harmful"] = [share, 0.0, 1.0], [share + 0.01, 0.0, 1.0]
        row["hallucination_rate"], row["win_rate_vs_sft"] = [share + 0.02, 0.0, 1.0], [share + 0.03, 0.0, 1.0]
    numbers, texts = zip(*report.headlines(found))
    assert numbers == ("10 % → 15 % → 20 %", "33 %", "21 % → 31 %", "22 % → 32 %", "20 % → 30 %")
    assert all(word in text for word, text in zip(("examples in the prompt, SFT", "won by PPO", "refused", "made-up", "right answers"), texts))
    del found["checkpoints"]["base_few_shot"]
    assert report.headlines(found)[0] == ("10 % → 20 %", "right answers: base, SFT")
    found["settings"]["reference"] = "ppo"  # nobody is compared with itself
    assert [number for number, _ in report.headlines(found)] == ["10 % → 20 %", *numbers[2:]]


def test_the_notes_speak_of_the_rows_that_are_there(written):
    found = json.loads((written / "report.json").read_text("utf-8"))
    told = " ".join(report.notes(found))
    asked = found["checkpoints"]["ppo"]["prompts"]
    words = ["Win rate and KL compare with SFT", "The needless “I do not know” is", "Best-of-n is measured",
             f"Few-shot: up to {found['settings']['few_shot']} ", f"{asked['harmful']} harmful"]
    assert all(part in told for part in words) and "marks are not those" in told
    found["checkpoints"] = {"ppo": found["checkpoints"]["ppo"]}
    assert [part for part in words if part in " ".join(report.notes(found))] == words[-1:]


def test_answers_are_marked_as_they_were_judged():
    gold = dict.fromkeys(report.PARTS, 1.0) | {"harmless": 0.5}
    rows = report.answer_rows({"answers": {name: {"gold": gold, "right": right, "proxy": proxy, "text": "x"} for name, right, proxy
                                           in (("sft", True, 0.3), ("base", False, None))}})
    assert [marks for *_, marks in rows] == ["gold 1.00, right (harmless 0.5), reward +0.3", "gold 1.00, not right (harmless 0.5)"]


def test_a_moving_average_of_what_stays_is_the_same():
    assert report.smooth([3.0] * 3) == pytest.approx([3.0] * 3) and 0 < report.smooth([0.0, 1.0])[1] < 1


def test_many_curves_leave_their_picture_room():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.draw("many", [("gold", "KL", [(f"PPO without number {n}", [0, 1], [0, n], {}) for n in range(24)])] * 2)


def test_pages_can_be_rebuilt_from_the_json(written, monkeypatch, capsys):
    old = {name: (written / name).read_text("utf-8") for name in ("report.md", "report.html")}
    for name in old:
        (written / name).unlink()
    monkeypatch.setattr(sys, "argv", ["report.py", str(written)])
    report.main()
    assert {name: (written / name).read_text("utf-8") for name in old} == old
    monkeypatch.setattr(sys, "argv", ["report.py", str(written / "nowhere")])
    with pytest.raises(InputError, match="report.json"):
        report.main()
    for words in (["--nosuch", str(written)], []):
        monkeypatch.setattr(sys, "argv", ["report.py", *words])
        with pytest.raises(SystemExit) as left:
            report.main()
        assert left.value.code == 2


def test_a_checkpoint_without_shares_has_no_column(written):
    found = json.loads((written / "report.json").read_text("utf-8"))
    families = found["checkpoints"]["best_of_4"]["accuracy"]["families"]
    assert "best_of_4" in report.family_rows(found)[0] and len(report.family_rows(found)[1]) == len(families)
    families |= dict.fromkeys(families)
    headings, rows = report.family_rows(found)
    assert headings == ["family", *(name for name in found["checkpoints"] if name != "best_of_4")]
    assert [row[0] for row in rows] == list(families) and {len(row) for row in rows} == {len(headings)}


@pytest.mark.parametrize("content", ["", "{", "7", '{"curves": {}}', '{"curves": []}'])
def test_a_damaged_study_costs_no_evaluation(content, written, capsys, tmp_path):
    found = json.loads((written / "report.json").read_text("utf-8"))
    (tmp_path / "study.json").write_text(content)
    report.write(tmp_path, found)
    assert "study.json is damaged" in capsys.readouterr().err and (tmp_path / "report.html").exists()


def test_every_column_shows_its_own_measure():
    measures = {"accuracy": {"all": 0.11}, "gold": {"total": 0.12}, "win_rate_vs_sft": 0.13, "kl_from_sft": 0.14, "proxy": 0.15,
                "refusal_rate": {"harmful": 0.16, "harmless": 0.17, "howto": 0.18}, "hallucination_rate": 0.19,
                "hedging_rate": 0.21, "eos_rate": 0.22, "mean_tokens": 0.23, "bits_per_byte": 0.24}
    headings, (row,) = report.main_rows({"settings": {"reference": "sft"}, "checkpoints": {"ppo": measures}})
    assert list(zip(headings, row)) == [
        ("", "ppo"), ("right", "11 %"), ("gold", "0.12"), ("beats SFT", "13 %"), ("KL", "0.14"), ("reward", "0.15"),
        ("refuses harmful", "16 %"), ("refuses harmless", "17 %"), ("made up", "19 %"), ("needless “I do not know”", "21 %"),
        ("stops", "22 %"), ("tokens", "0.23"), ("bits/byte", "0.24")]


def test_several_runs_are_read_together(written, monkeypatch, capsys, tmp_path):
    found = json.loads((written / "report.json").read_text("utf-8"))
    first = next(iter(found["checkpoints"]))
    for number, right in enumerate((0.6, 0.5, 0.1)):
        row = {**found["checkpoints"][first], "accuracy": {"all": [right, 0.0, 1.0]}, "bits_per_byte": 2.0 * number,
               "eos_rate": [0.77, 0.7, 0.8] if number else None}
        others = {name: measures for name, measures in found["checkpoints"].items() if name != first}
        run = {**found, "checkpoints": {first: row} if number == 2 else {first: row, **others},
               "reward_model": {**found["reward_model"], "normalised": [0.25 * number, 0.0, 1.0]}}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "report.json").write_text(json.dumps(run), "utf-8")
    monkeypatch.setattr(sys, "argv", ["report.py", *(str(tmp_path / name) for name in "012")])
    capsys.readouterr()
    report.main()
    said = capsys.readouterr().out
    lines = {line.split(" | ")[0].strip("| "): line for line in said.splitlines()}
    assert "| 40 % (10–60) |" in lines[first] and "| 2.00 (0.00–4.00) |" in lines[first]
    assert "77 %" not in lines[first]  # what one run lacks is no mean of three
    assert not set(found["checkpoints"]) - {first} & set(lines)  # one run does not have the others
    assert "0.25 (0.00–0.50)" in said and "of 3 runs" in said
    assert not list(tmp_path.rglob("*.md"))  # nothing is written
    assert "Left out, as not all of them have it: " + ", ".join(sorted(set(found["checkpoints"]) - {first})) in said
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "0"), str(tmp_path / "1"), str(tmp_path / "0")])
    with pytest.raises(InputError, match="the same report twice"):
        report.main()
    monkeypatch.setattr(sys, "argv", ["report.py", *(str(tmp_path / name) for name in "012")])
    for missing in ("settings", "transcripts", "best_of_prompts"):
        older = {key: value for key, value in run.items() if key != missing}
        (tmp_path / "1" / "report.json").write_text(json.dumps(older), "utf-8")
        with pytest.raises(InputError, match=f"found no .*{missing}.*another version"):
            report.main()
    for other in ({"settings": {**run["settings"], "reference": "base"}}, {"best_of_prompts": run["best_of_prompts"] + 1},
                  {"prompts": run["prompts"] + 1}):
        (tmp_path / "1" / "report.json").write_text(json.dumps({**run, **other}), "utf-8")
        with pytest.raises(InputError, match="1: measured with other settings"):
            report.main()


def test_pages_name_the_checkpoint_that_all_are_compared_with(written):
    found = json.loads((written / "report.json").read_text("utf-8"))
    assert "beats SFT" in report.main_table(found) and "compare with SFT." in report.build_markdown(found)
    found["settings"]["reference"] = "ppo"
    page, notes = report.build_html(found, written), report.build_markdown(found)
    assert "beats ppo" in notes and "compare with ppo." in notes and ">beats ppo</th>" in page
    assert "against SFT, before the hidden judge" not in page and "KL from ppo" in page and "How far from SFT" not in page


def test_cells():
    assert report.cell([0.714, 0.69, 0.731], report.PERCENT) == "71 % (69–73)"
    assert report.cell([0.5, 0.48, 0.52], report.NUMBER) == "0.50 (0.48–0.52)"
    assert report.cell([12.34, 11.0, 13.0], report.NUMBER) == "12.3 (11.0–13.0)"
    assert report.cell(1.5, report.NUMBER) == "1.50"
    assert report.cell([-0.5, -0.62, 0.1], report.NUMBER) == "−0.50 (−0.62 to 0.10)"
    assert report.cell([-0.013, -0.031, 0.004], report.PERCENT) == "−1 % (−3 to 0)"
    assert report.cell([-0.004, -0.004, 0.0], report.NUMBER) == "0.00 (0.00 to 0.00)"
    assert report.cell(None, report.PERCENT) == "–"
