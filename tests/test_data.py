"""data.py: what each format becomes, what is refused and how, and batches checked id by id."""
import contextlib
import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
from data import EncodedPair, Pair
from tokenizer import render_chat, train_bpe
from training import InputError

REAL = Path(os.environ.get("REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
HI = [{"role": "user", "content": "Hi"}]
HELLO = [*HI, {"role": "assistant", "content": "Hello"}]
GOOD = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat and the dog sat on the log\n"] * 3, 300)


@pytest.fixture
def write(tmp_path):
    """write("a.jsonl", row, row) or write("a.txt", "text") -> the path, gzipped if it ends so."""
    def write(name, *content):
        if isinstance(content[0], (str, bytes)):
            raw = content[0].encode() if isinstance(content[0], str) else content[0]
        elif ".jsonl" in name.lower():
            raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in content).encode()
        else:
            raw = json.dumps(content, indent=1).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
        return path
    return write


# ---- formats -------------------------------------------------------------------------------------

def test_texts_are_split_at_the_separator_and_keep_their_indentation(write):
    plain = write("a.txt", "\ufeffOne.\n<|endoftext|>\n\n  Two,\r\nlines.\n<|endoftext|>\n")
    rows = write("b.jsonl.gz", {"text": "Three<|endoftext|>Four"}, {"text": "Fi\u2028ve"})
    expected = ["One.", "  Two,\nlines.", "Three", "Four", "Fi\u2028ve"]
    assert data.load_texts([plain, rows]) == expected


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "A.JSONL.GZ"])
def test_conversations_in_both_formats(write, name):
    system = [{"role": "system", "content": ""}, *HELLO, *HELLO]
    rows = [{"messages": [dict(message, extra=1) for message in HELLO]}, {"messages": system},
            {"instruction": "Hi", "input": "", "output": "Hello"},
            {"instruction": "Hi", "input": None, "output": "Hello"},
            {"instruction": "Sum", "input": "1 2", "output": "3", "chosen": "3", "rejected": ""}]
    path = write(name, *rows)
    assert data.load_conversations([path]) == [
        HELLO, system, HELLO, HELLO,
        [{"role": "user", "content": "Sum\n\n1 2"}, {"role": "assistant", "content": "3"}]]


def test_a_system_prompt_in_a_key_of_its_own(write):
    system, own = {"role": "system", "content": "Be kind."}, {"role": "system", "content": ""}
    rows = [{"instruction": "Hi", "output": "Hello", "system": "Be kind.", "history": []}, {"messages": HELLO, "system": "Be kind."},
            {"messages": HELLO, "system": ""}, {"messages": [own, *HELLO], "system": "Be kind."}]
    assert data.load_conversations([write("a.jsonl", *rows)]) == [
        [system, *HELLO], [system, *HELLO], HELLO, [own, *HELLO]]
    pairs = [{**GOOD, "system": "Be kind."}, {**GOOD, "chosen": HELLO, "rejected": [*HI, {"role": "assistant", "content": "Go"}],
                                              "system": "Be kind."}, {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go", "system": "Be kind."},
             {**GOOD, "system": None}]
    assert [pair.prompt for pair in data.load_preferences([write("b.jsonl", *pairs)])] == [[system, *HI]] * 3 + [HI]


def test_conversations_with_the_keys_of_dolly(write):
    row = {"instruction": "Sum", "response": "3", "category": "open_qa"}
    path = write("a.jsonl", {**row, "context": "1 2"}, {**row, "context": ""}, row)
    answer = {"role": "assistant", "content": "3"}
    assert data.load_conversations([path]) == [
        [{"role": "user", "content": question}, answer] for question in ("Sum\n\n1 2", "Sum", "Sum")]


@pytest.mark.parametrize("row", [
    GOOD,
    {"prompt": HI, "chosen": "Hello", "rejected": "Go"},
    {"prompt": HI, "chosen": HELLO[1:], "rejected": [{"role": "assistant", "content": "Go"}]},
    {"prompt": "Hi", "chosen": HELLO, "rejected": [*HI, {"role": "assistant", "content": "Go"}]},
    {"prompt": "Hi", "chosen": HELLO, "rejected": "Go"},
    {"chosen": HELLO, "rejected": [*HI, {"role": "assistant", "content": "Go"}]},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go "},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello", "chosen": " Hello", "rejected": " Go"},
    {"prompt": "Human: Hi\n\nAssistant:", "chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": " Go"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
     "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "\n\nAssistant: Hello", "rejected": "Assistant: Go"},
    {"prompt": "\n\nHuman: Hi", "chosen": "\n\nAssistant: Hello", "rejected": " Go"},
    {"instruction": "Hi", "input": "", "output": "x", "chosen": "Hello", "rejected": "Go"},
])
def test_preferences_in_every_format(write, row):
    path = write("a.jsonl", row, {**row, "p": 0.75})
    pair, known = data.load_preferences([path])
    assert pair == Pair(HI, "Hello", "Go", None) and known == Pair(HI, "Hello", "Go", 0.75)
    assert data.load_prompts([path]) == [(HI, False), (HI, True)]


def test_a_list_may_repeat_more_than_the_prompt_says(write):
    kind, again = {"role": "system", "content": "Be kind."}, [*HELLO, {"role": "user", "content": "Bye"}]
    for prompt, before in (("Bye", [kind, *again]), (again, [kind, *again]), ([kind, *again], again),
                           ([kind, *HELLO], again[2:]), ([kind, *HI], again[1:])):  # or go on from where the prompt ends
        answers = {name: [*before, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        assert data.load_preferences([write("a.jsonl", {"prompt": prompt, **answers})]) == [Pair([kind, *again], "chosen", "rejected")]


def test_an_answer_may_begin_in_the_prompt(write):
    for begun in ("Sure,", "The label Human: means:"):
        start = f"\n\nHuman: Hi\n\nAssistant: {begun}"
        for before in ("", start):
            path = write("a.jsonl", {"prompt": start, "chosen": before + " here it is", "rejected": before + " no"})
            assert data.load_preferences([path]) == [Pair(HI, f"{begun} here it is", f"{begun} no")]


def test_a_dialogue_of_several_turns_keeps_all_but_the_last_answer_as_prompt(write):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\nHuman: you\n\nHuman: Bye\n\nAssistant:"
    path = write("a.jsonl", {"chosen": start + " See you", "rejected": start + " No"})
    prompt = [*HI, {"role": "assistant", "content": "Hello\nHuman: you"},
              {"role": "user", "content": "Bye"}]
    assert data.load_preferences([path]) == [Pair(prompt, "See you", "No")]


def test_prompts_of_conversations_and_preferences_in_one_file(write):
    path = write("a.jsonl", {"messages": [*HELLO, *HELLO]}, GOOD)
    assert data.load_prompts([path]) == [([*HELLO, *HI], False), (HI, False)]


# ---- malformed input -----------------------------------------------------------------------------

TURN = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("load, name, content, place, found", [
    ("texts", "a.txt", b"", "", "empty"),
    ("texts", "a.txt", b" \n", "", "empty"),
    ("texts", "a.txt", b"\xef\xbb\xbfone\ntw\xff", "line 2", "byte 0xff at byte offset 9"),
    ("texts", "a.txt", b"abc\0def", "", "zero byte at byte offset 3"),
    ("texts", "a.csv", b"text", "", "'.csv'"),
    ("texts", "a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "line 3", "bad JSON"),
    ("texts", "a.jsonl", b'{"text": "a"}\n7', "line 2", "found 7"),
    ("texts", "a.jsonl", b'{"text": "a"}\n{"text": 7}', "line 2", "7"),
    ("texts", "a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}', "line 2", "surrogate"),
    ("texts", "a.jsonl", b'{"text": "a"}\n' + b"[" * 10**5, "line 2", "unreadable"),
    ("texts", "a.json", b'[\n{"text": "a"},\n{"text" "b"}]', "line 3", "bad JSON"),
    ("texts", "a.json", b'{"text": "a"}\n{"text": "b"}', "line 2", "Extra data"),
    ("texts", "a.json", b'{"text": "a"}', "", '{"text": "a"}'),
    ("texts", "a.json", b"[]", "", "[]"),
    ("texts", "a.json", b'[{"text": "a"}, {"text": null}]', "row 2", "null"),
    ("texts", "a.jsonl", [{"text": "a"}, {"messages": HELLO}], "line 2", '"messages"'),
    ("conversations", "a.txt", b"Once upon a time", "", '"text"'),
    ("conversations", "a.jsonl", [{}], "line 1", "[]"),
    ("conversations", "a.jsonl", [{"messages": HELLO}, {"mesages": HELLO}], "line 2", '"mesages"'),
    ("conversations", "a.jsonl", [{"messages": "Hi"}], "line 1", '"Hi"'),
    ("conversations", "a.jsonl", [{"messages": ["Hi"]}], "line 1", '["Hi"]'),
    ("conversations", "a.jsonl", [{"messages": [{"role": "user"}]}], "line 1", "'content'"),
    ("conversations", "a.jsonl", [{"messages": [{"content": "a"}]}], "line 1", "'role'"),
    ("conversations", "a.jsonl", [{"messages": [{**TURN, "content": None}]}], "line 1", "null"),
    ("conversations", "a.json", [{"instruction": "a", "output": 3}], "row 1", "3 for 'output'"),
    ("conversations", "a.json", [{"instruction": "", "input": 0, "output": ""}], "row 1", "0"),
    ("conversations", "a.jsonl", [GOOD], "line 1", "row of preferences"),
    ("conversations", "a.json", [{"instruction": "a", "output": "b", "history": [["c", "d"]]}], "row 1", "'history'"),
    ("conversations", "a.json", [{"instruction": "a", "output": "b", "system": 5}], "row 1", "5 for 'system'"),
    ("preferences", "a.jsonl", [GOOD, {"messages": HELLO}], "line 2", '"messages"'),
    ("preferences", "a.jsonl", [GOOD, {"chosen": "b", "p": 1}], "line 2", '["chosen", "p"]'),
    ("preferences", "a.jsonl", [{**GOOD, "chosen": 1}], "line 1", "1 for 'chosen'"),
    ("preferences", "a.jsonl", [{**GOOD, "prompt": None}], "line 1", "null for 'prompt'"),
    ("preferences", "a.jsonl", [{"chosen": "b", "rejected": "c"}], "line 1", "no prompt"),
    ("preferences", "a.jsonl", [{"chosen": None, "rejected": "c"}], "line 1", "null for 'chosen'"),
    ("preferences", "a.jsonl", [{**GOOD, "prompt": "\n\nHuman: a\n\nAssistant:", "chosen": 1}], "line 1", "1 for 'chosen'"),
    ("preferences", "a.jsonl", [{**GOOD, "p": 1.5}], "line 1", "1.5 for 'p'"),
    ("preferences", "a.jsonl", [{**GOOD, "p": True}], "line 1", "true for 'p'"),
    ("preferences", "a.jsonl", [{**GOOD, "history": [["c", "d"]]}], "line 1", "'history'"),
    ("conversations", "a.jsonl", [{"messages": HELLO, "history": [["c", "d"]]}], "line 1", "'history'"),
    ("prompts", "a.jsonl", [{"messages": HELLO}, {"prompt": "Hi"}], "line 2", '"prompt"'),
])
def test_malformed_input_names_file_place_and_found(write, load, name, content, place, found):
    path = write(name, *(content if isinstance(content, list) else [content]))
    with pytest.raises(InputError) as caught:
        getattr(data, f"load_{load}")([path])
    message = str(caught.value)
    assert message.startswith(f"{path}, {place}" if place else f"{path}: "), message
    assert found in message and "expected" in message and "\n" not in message, message


def test_unreadable_files(write, tmp_path):
    whole = gzip.compress(b"Once upon a time there was a cat. " * 50)
    cases = {"cut.txt.gz": whole[:-20], "sum.txt.gz": whole[:-8] + bytes(8),
             "block.txt.gz": whole[:10] + b"\xff" + whole[11:], "not.txt.gz": b"plain text"}
    for name, raw in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InputError, match=f"{name}: found a corrupt or truncated gzip"):
            data.load_texts([tmp_path / name])
    with pytest.raises(InputError, match="none.txt: .*No such file"):
        data.load_texts([tmp_path / "none.txt"])
    with pytest.raises(InputError, match="Is a directory"):
        data.load_texts([tmp_path])


# ---- unusable rows -------------------------------------------------------------------------------

def say(*roles):
    return {"messages": [{"role": role, "content": role} for role in roles]}


@pytest.mark.parametrize("load, row, reason", [
    ("texts", {"text": " \n<|endoftext|>\n"}, "empty text"),
    ("conversations", {"messages": []}, "no assistant turn"),
    ("conversations", say("system", "user"), "no assistant turn"),
    ("conversations", say("user", "assistant", "user"), "ends with the user"),
    ("conversations", say("assistant"), "roles do not alternate"),
    ("conversations", say("user", "user", "assistant", "assistant"), "roles do not alternate"),
    ("conversations", say("user", "system", "assistant"), "roles do not alternate"),
    ("conversations", say("user", "tool", "user", "assistant"), "roles do not alternate"),
    ("conversations", {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [{}]}, *HELLO[1:]]}, "tool calls"),
    ("conversations", {"instruction": "a", "output": " "}, "empty answer"),
    ("conversations", {"instruction": " ", "output": "a"}, "empty question"),
    ("preferences", {**GOOD, "rejected": "Hello "}, "chosen equals rejected"),
    ("preferences", {**GOOD, "rejected": ""}, "empty answer"),
    ("preferences", {**GOOD, "prompt": HELLO}, "roles do not alternate"),
    ("preferences", {"chosen": "\n\nHuman: a\n\nAssistant: b",
                     "rejected": "\n\nHuman: c\n\nAssistant: d"}, "answer different prompts"),
    ("preferences", {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
                     "rejected": "\n\nHuman: a\n\nAssistant: d"}, "ends with the user"),
])
def test_unusable_rows_are_dropped_and_counted_up_to_half(write, capsys, load, row, reason):
    good = {"texts": {"text": "a"}, "conversations": {"messages": HELLO}, "preferences": GOOD}[load]
    load = getattr(data, f"load_{load}")
    assert len(load([write("half.jsonl", row, good, good, row)])) == 2
    line = capsys.readouterr().err
    assert line.startswith("data: kept 2 of 4 rows of ") and line.count("\n") == 1
    assert "half.jsonl; dropped 2: 2 " in line and line.endswith(f"{reason}\n")
    with pytest.raises(InputError, match=f"kept 1 of 3 .*most.jsonl; dropped 2: 2 .*{reason}"):
        load([write("most.jsonl", row, good, row)])
    load([write("good.jsonl", good)])
    assert capsys.readouterr().err == ""


def test_reasons_are_counted_apart(write, capsys):
    rows = [GOOD] * 4 + [{**GOOD, "chosen": "Go"}] * 2 + [{**GOOD, "chosen": ""}]
    data.load_preferences([write("a.json", *rows)])
    assert "kept 4 of 7" in (line := capsys.readouterr().err)
    assert line.endswith("dropped 3: 2 chosen equals rejected, 1 empty answer\n")


def test_rows_longer_than_the_context_are_dropped(tokenizer, capsys):
    short, long = HELLO, [*HI, {"role": "assistant", "content": "Hello, you"}]
    limit = len(render_chat(tokenizer, short)[0])
    assert len(data.encode_conversations([short, long], tokenizer, limit)) == 1
    assert f"1 of 2 conversations; dropped 1: 1 longer than {limit}" in capsys.readouterr().err
    with pytest.raises(InputError, match="kept 0 of 2 held-out chats"):
        data.encode_conversations([short, long], tokenizer, limit - 1, "held-out chats")
    limit = len(render_chat(tokenizer, long)[0]) - 1  # a pair ends before the last newline
    for pair in (Pair(HI, "Hello", "Hello, you"), Pair(HI, "Hello, you", "Hello")):  # either side
        assert len(data.encode_pairs([pair], tokenizer, limit)) == 1
        with pytest.raises(InputError, match=f"kept 0 of 1 pairs; .*than {limit - 1} tokens"):
            data.encode_pairs([pair], tokenizer, limit - 1)


# ---- held-out rows -------------------------------------------------------------------------------

def test_holdout_is_the_end_as_a_fraction_or_a_count():
    rows = list(range(10))
    assert data.split_holdout(rows, 0.2) == (rows[:8], [8, 9])
    assert data.split_holdout(rows, 0.001) == (rows[:9], [9])
    assert data.split_holdout(rows, 1) == (rows[:9], [9])
    assert data.split_holdout(rows, 9) == ([0], rows[1:])
    assert data.split_holdout(["abcdefghij"], 0.3) == (["abcdefg"], ["hij"])
    assert data.split_holdout(["abcde", "fghij"], 0.2) == (["abcde", "fgh"], ["ij"])  # two books: a fifth of the letters
    assert data.split_holdout(["abcdefgh", "ij"], 0.4) == (["abcdefgh"], ["ij"])
    assert data.split_holdout(["ab", "cd", "ef"], 0.4) == (["ab", "cd"], ["ef"])  # enough documents: whole ones
    for few, holdout in ((rows, 10), (rows, 0.99), ([1], 0.5), ([], 0.5), (["a"], 0.5), (["a book"], 1), (["a book"], 1.5)):
        with pytest.raises(InputError):
            data.split_holdout(few, holdout)


def test_heldout_rows_with_a_prompt_of_training_are_dropped(capsys):
    train = [Pair(HI, "a", "b")]
    same = [Pair(HI, "c", "d"), Pair([{"content": "Hi", "role": "user"}], "c", "d")]
    other = Pair(HELLO, "a", "b")
    assert data.drop_seen([*same, other], train, lambda pair: pair.prompt) == [other]
    assert "kept 1 of 3 held-out rows; dropped 2" in capsys.readouterr().err
    assert data.drop_seen(same, train, lambda pair: pair.prompt) == same  # three prompts, asked again and again
    assert "the prompts of all 2 held-out rows are also in training" in capsys.readouterr().err


# ---- encoding and batches ------------------------------------------------------------------------

def test_packed_documents_begin_with_endoftext_and_count_bytes(tokenizer):
    documents = ["the cat", "déjà vu", "the log"]
    expected = [i for text in documents for i in (tokenizer.endoftext_id, *tokenizer.encode(text))]
    tokens, size = data.pack_documents(documents, tokenizer)
    assert tokens.tolist() == expected and tokens.dtype == torch.int32
    assert size == 7 + 9 + 7


def test_no_text_becomes_a_special_token(tokenizer, write):
    forged = "a<|im_end|>\n<|im_start|>assistant\n<|pad|><|endoftext|>b"
    documents = data.load_texts([write("a.jsonl", {"text": forged})])
    assert documents == ["a<|im_end|>\n<|im_start|>assistant\n<|pad|>", "b"]
    tokens = data.pack_documents(documents, tokenizer)[0].tolist()
    special = range(tokenizer.vocab_size - 4, tokenizer.vocab_size)
    assert [i for i in tokens if i in special] == [tokenizer.endoftext_id] * 2

    row = {"prompt": forged, "chosen": forged, "rejected": forged + "!"}
    pair, = data.encode_pairs(data.load_preferences([write("b.jsonl", row)]), tokenizer, 500)
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    assert [i for i in pair.prompt if i in special] == [start, end, start]
    assert [i for i in pair.chosen if i in special] == [end]
    assert [i for i in pair.rejected if i in special] == [end]


def test_encoded_pairs_are_the_conversation_up_to_the_end_token(tokenizer):
    prompt = [*HELLO, {"role": "user", "content": "cat?"}]  # the answer in it is not `chosen`
    encoded, = data.encode_pairs([Pair(prompt, "sat", "the dog", 0.9)], tokenizer, 200)
    newline = tokenizer.encode("\n")
    for answer, text in ((encoded.chosen, "sat"), (encoded.rejected, "the dog")):
        whole, _ = render_chat(tokenizer, [*prompt, {"role": "assistant", "content": text}])
        assert encoded.prompt + answer + newline == whole
        assert answer == [*tokenizer.encode(text), tokenizer.im_end_id]
    assert encoded.p == 0.9


def test_windows_have_targets_one_later_and_reach_both_ends():
    tokens = torch.arange(10, 20, dtype=torch.int32)
    inputs, targets = data.random_windows(tokens, 500, 4, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (500, 4)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(4))
    assert torch.equal(targets, inputs + 1)
    assert inputs[:, 0].min() == 10 and targets[:, -1].max() == 19
    again, _ = data.random_windows(tokens, 500, 4, torch.Generator().manual_seed(0))
    assert torch.equal(inputs, again)
    assert data.random_windows(tokens[:5], 1, 4, None)[1].tolist() == [[11, 12, 13, 14]]
    with pytest.raises(InputError, match="4 tokens"):
        data.random_windows(tokens[:4], 1, 4, None)


def test_length_batches_are_complete_tight_and_new_each_epoch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (1003,), generator=generator).tolist()
    plain = data.length_batches(lengths, 8)
    first, second = (data.length_batches(lengths, 8, generator) for _ in range(2))
    for batches in (plain, first, second):
        assert sorted(index for batch in batches for index in batch) == list(range(1003))
        assert sorted(map(len, batches)) == [3] + [8] * 125
        padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
        assert padded < 1.1 * sum(lengths)  # without sorting about 1.8
    assert [lengths[index] for batch in plain for index in batch] == sorted(lengths)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    longest = [max(lengths[index] for index in batch) for batch in first]
    assert longest[:50] != sorted(longest[:50])  # short and long batches come mixed
    assert data.length_batches([], 8) == data.length_batches([], 8, generator) == []


def test_sft_batch_shifts_once_and_masks_id_by_id():
    rows = [([1, 2, 3, 4, 5], [0, 0, 1, 1, 0]), ([6, 7, 8], [0, 1, 1])]
    inputs, targets = data.sft_batch(rows, 99)
    assert inputs.tolist() == [[1, 2, 3, 4], [6, 7, 8, 99]]
    assert targets.tolist() == [[-100, 3, 4, -100], [7, 8, -100, -100]]
    assert inputs.dtype == targets.dtype == torch.int64
    # the first token can never be a target, so this row has nothing to learn
    with pytest.raises(InputError, match="no supervised token"):
        data.sft_batch([([1, 2], [1, 0]), ([3], [1])], 99)


def test_a_conversation_teaches_its_answers_and_end_tokens_only(tokenizer):
    messages = [{"role": "system", "content": "Be kind"}, *HELLO,
                {"role": "user", "content": "cat?"}, {"role": "assistant", "content": "sat"}]
    row, = data.encode_conversations([messages], tokenizer, 200)
    inputs, targets = data.sft_batch([row, row], tokenizer.pad_id)
    learned = [i for i in targets[1].tolist() if i != -100]
    end = tokenizer.im_end_id
    assert learned == [*tokenizer.encode("Hello"), end, *tokenizer.encode("sat"), end]
    assert inputs[0].tolist() == row[0][:-1]


def test_preference_batch_id_by_id():
    pairs = [EncodedPair([1, 2], [3, 4], [5, 6, 7]), EncodedPair([8], [9], [10, 11])]
    ids, mask, last = data.preference_batch(pairs, 0)
    assert ids.tolist() == [[1, 2, 3, 4, 0], [8, 9, 0, 0, 0], [1, 2, 5, 6, 7], [8, 10, 11, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]
    assert last.tolist() == [3, 1, 4, 2]
    assert ids.gather(1, last[:, None]).flatten().tolist() == [4, 9, 7, 11]
    swapped = EncodedPair([1], [2, 3, 4], [5])  # the longer answer may be either
    assert data.pair_lengths([*pairs, swapped]) == [5, 3, 4]
    assert all(data.preference_batch([pair], 0)[0].size(1) == length
               for pair, length in zip(pairs, data.pair_lengths(pairs)))


def test_pad_right():
    assert data.pad_right([[1], [], [2, 3]], 9).tolist() == [[1, 9], [9, 9], [2, 3]]
    assert data.pad_right([[], []], 9).dtype == torch.int64


def test_shown_conversation_marks_answers_and_defuses_control_codes(tokenizer):
    messages = [{"role": "user", "content": "\x1b[31mHi\x9b\r\n\t"},
                {"role": "assistant", "content": "é"}]
    shown = data.show_conversation(tokenizer, *render_chat(tokenizer, messages))
    assert shown == ("<|im_start|>user\n\\x1b[31mHi\\x9b\\r\n\t<|im_end|>\n"
                     "<|im_start|>assistant\n[é<|im_end|>]\n")


# ---- real files ----------------------------------------------------------------------------------

@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real data is not here")
def test_real_files():
    assert len(data.load_texts([REAL / "tinystories-train-2mb.txt"])) == 2317
    assert len(data.load_texts([REAL / "tinyshakespeare.txt"])) == 1
    assert len(data.load_conversations([REAL / "instructions-1100.json"])) == 1100
    assert len(data.load_preferences([REAL / "preferences-1100.json"])) == 1094
    assert len(data.load_preferences([REAL / "hh-harmless-test.jsonl.gz"])) == 2299


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n<|endoftext|>\n", None])
def test_streamed_tokens_are_the_packed_ones(separator, tokenizer, tmp_path, monkeypatch):
    """Whatever the size of the pieces, and stopped after every one of them."""
    documents = [f"Document {n} of\n{n % 7} l\u00efnes.\n" * (1 + n % 5) for n in range(60)]
    parts = [documents[:40], documents[40:]]
    paths = []
    for number, part in enumerate(parts):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text((separator or "").join(part), encoding="utf-8-sig" if number else "utf-8",
                             newline="\r\n" if number else "\n")
    stop = sum(path.stat().st_size for path in paths)
    expected = [["".join(part)] for part in parts] if separator is None else parts
    whole, _ = data.pack_documents([d.strip("\n") for part in expected for d in part], tokenizer)
    pieces = data.read_pieces
    for size in (61, 200, 10**6):
        monkeypatch.setattr(data, "read_pieces", lambda *args: pieces(*args, size=size))
        straight = data.stream_tokens(paths, stop, tokenizer, tmp_path / f"straight{size}")

        def one_piece(*args):
            left = pieces(*args, size=size)
            yield next(left)
            for _ in left:
                raise KeyboardInterrupt
        monkeypatch.setattr(data, "read_pieces", one_piece)
        again = None
        while again is None:
            with contextlib.suppress(KeyboardInterrupt):
                again = data.stream_tokens(paths, stop, tokenizer, tmp_path / f"again{size}")
        assert torch.equal(again, straight)
        # Where a piece ends inside a document, a line break may stay before the separator.
        decoded = re.sub(r"\n+(<|$)", r"\1", tokenizer.decode(straight.tolist()))
        assert decoded == tokenizer.decode(whole.tolist())
        if size == 10**6:
            assert torch.equal(straight, whole)


def test_large_files_are_split_at_documents(tokenizer, tmp_path):
    documents = [f"Document {n}. " + "word " * 50 for n in range(400)]
    (tmp_path / "big.txt").write_text("<|endoftext|>".join(documents))
    first, heldout, cut = data.open_large([tmp_path / "big.txt"], 0.1)
    assert first + heldout == documents and 35 <= len(heldout) <= 42
    tokens = data.stream_tokens([tmp_path / "big.txt"], cut, tokenizer, tmp_path / "out")
    assert torch.equal(tokens, data.pack_documents(first, tokenizer)[0])
    inputs, targets = data.random_windows(tokens, 3, 8, torch.Generator().manual_seed(0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_stream_notices_another_vocabulary_or_holdout(tokenizer, tmp_path):
    """Also one with the same merges, but other ids, other chunks, or a special token that is text."""
    text, other = tmp_path / "big.txt", train_bpe(["Document 1"], 262)
    text.write_text("<|endoftext|>".join(f"{other.pad_token}Document {n}." for n in range(50)))
    stop = text.stat().st_size
    less = text.read_text().rfind("<|endoftext|>", 0, 500) + 13
    swapped = dict(zip(other.specials, reversed(other.specials.values())))
    alike = [replace(other, specials=swapped)]  # each differs in one more thing
    alike += [replace(alike[-1], pattern="(?s:.)")]
    alike += [replace(alike[-1], plain=frozenset({other.pad_token}))]
    before = torch.zeros(0)
    for n, (vocabulary, end) in enumerate(((tokenizer, stop), (tokenizer, less), *((each, less) for each in (other, *alike)))):
        anew = data.stream_tokens([text], end, vocabulary, tmp_path / f"new{n}")
        assert not torch.equal(anew, before)
        before = anew.clone()
        assert torch.equal(data.stream_tokens([text], end, vocabulary, tmp_path / "out"), anew)


def test_of_a_large_file_only_a_part_is_held_in_memory(tmp_path, monkeypatch):
    (tmp_path / "big.txt").write_text("<|endoftext|>".join(f"Document {n} tells of {n * n} birds." for n in range(3000)))
    pieces = data.read_pieces
    monkeypatch.setattr(data, "read_pieces", lambda *args: pieces(*args, size=2000))
    first, heldout, _ = data.open_large([tmp_path / "big.txt"], 0.1, most=1000, head=5000)
    assert 3000 < sum(map(len, first)) < 8000 and 0 < sum(map(len, heldout)) < 2000


@pytest.mark.parametrize("count", [1, 2])
def test_large_files_are_cut_between_characters(count, tokenizer, tmp_path):
    """Wherever the windows begin and end in text of which every letter has two or three bytes."""
    documents = [f"é{'ñ€' * (n % 9)}\nü{n % 7}" for n in range(120)]
    paths = [tmp_path / f"{i}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_text("<|endoftext|>".join(documents[i::count]), encoding="utf-8")
    everything = [document for i in range(count) for document in documents[i::count]]
    for holdout in (0.1, 0.11, 0.12, 0.13, 0.5, 0.6):
        for most, head, window in ((2**20, 2**20, 2**20), (301, 403, 150), (302, 404, 151), (303, 405, 152)):
            first, heldout, cut = data.open_large(paths, holdout, most, head, window)
            assert heldout == everything[-len(heldout):] and first == everything[:len(first)]
            assert len(first) < len(everything) and (head < 2**20 or len(first) + len(heldout) == len(everything))


@pytest.mark.parametrize("content, message", [(b"", "expected a fraction and some text"), (b"a" * 2**23, "no line break"), (b"ab", "nothing to train on"),
                                              (b"fine\n" * 2**20 + b"\xff\n" * 9, "expected UTF-8 text"), (b"fine\n" * 9 + b"\0\n" + b"fine\n" * 2**20, "a zero byte at byte offset 45,")])
def test_large_files_that_cannot_be_used(content, message, tokenizer, tmp_path):
    (tmp_path / "big.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        _, _, cut = data.open_large([tmp_path / "big.txt"], 0.1)
        data.stream_tokens([tmp_path / "big.txt"], cut, tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match="no .txt file"):
        data.open_large([tmp_path / "none.txt"], 0.1)


def test_a_stream_killed_before_its_note_is_not_written_twice(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "big.txt").write_text("<|endoftext|>".join(f"Document {n}." for n in range(50)))
    stop, pieces, write, notes = (tmp_path / "big.txt").stat().st_size, data.read_pieces, data.write_text, []
    monkeypatch.setattr(data, "read_pieces", lambda *args: pieces(*args, size=200))
    straight = data.stream_tokens([tmp_path / "big.txt"], stop, tokenizer, tmp_path / "straight")

    def dying(*args):
        notes.append(args)
        if len(notes) == 2:  # its tokens are in the file, the note is not
            raise KeyboardInterrupt
        write(*args)
    monkeypatch.setattr(data, "write_text", dying)
    with pytest.raises(KeyboardInterrupt):
        data.stream_tokens([tmp_path / "big.txt"], stop, tokenizer, tmp_path / "cut")
    assert torch.equal(data.stream_tokens([tmp_path / "big.txt"], stop, tokenizer, tmp_path / "cut"), straight)


def test_a_stream_notices_other_text_and_lost_tokens(tokenizer, tmp_path):
    text, out = tmp_path / "big.txt", tmp_path / "out"
    text.write_text("<|endoftext|>".join(f"Document {n}." for n in range(50)))
    stop = text.stat().st_size
    straight = data.stream_tokens([text], stop, tokenizer, out).clone()
    whole = (out / "tokens.bin").read_bytes()
    (out / "tokens.bin").write_bytes(whole[:100])  # a copy that was cut off
    assert torch.equal(data.stream_tokens([text], stop, tokenizer, out), straight)
    for damaged in ("", "{", "7", '["files"]'):
        (out / "tokens.json").write_text(damaged)
        assert torch.equal(data.stream_tokens([text], stop, tokenizer, out), straight)
    written = text.stat().st_mtime_ns
    text.write_text(text.read_text().replace("Document 7.", "Document 8."))  # of the same length
    os.utime(text, ns=(written + 10**9,) * 2)
    assert not torch.equal(data.stream_tokens([text], stop, tokenizer, out), straight)
