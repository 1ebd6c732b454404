"""From real files to texts, conversations and preference pairs, and from those to batches.

Files are .txt, .json (a list of objects) or .jsonl (one object a line), each also .gz. Their keys
tell what they hold:

    texts          plain text with <|endoftext|> between documents, or {"text"}
    conversations  {"messages": [{"role", "content"}, ...]}, Alpaca {"instruction", "input"?,
                   "output"}, or Dolly {"instruction", "context"?, "response"}
    preferences    {"prompt", "chosen", "rejected"} (strings or message lists), Anthropic HH
                   {"chosen", "rejected"} dialogues (also with what they share as "prompt"), or Alpaca keys
                   with "chosen" and "rejected"; rows with "p", the probability of that choice, are held out

A "system" key beside these is the system prompt; a filled "history" is refused; keys not named here are ignored.
A malformed row stops the program: a mistake in a file should be fixed, not trained around. A
well-formed row that cannot be learned from is dropped, counted and reported; if over half are dropped,
the file is probably not what its user thinks it is, and that is an error too.

Files are read whole, except plain text with `pretrain.py --stream`. Left out: tool calls, and packing
of conversations.
"""
import contextlib
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tokenizer import ENDOFTEXT as SEPARATOR
from tokenizer import render_chat
from training import InputError, make_folder, write_text, writing

IGNORE = -100  # what torch's cross_entropy skips


@dataclass
class Pair:
    """One comparison; `p` is the probability that the human prefers `chosen`, where it is known."""
    prompt: list[dict]
    chosen: str
    rejected: str
    p: float | None = None


@dataclass
class EncodedPair:
    """Token ids. Both answers end with <|im_end|>; `prompt` ends where an answer begins."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    p: float | None = None


class Unusable(Exception):
    """A well-formed row that teaches nothing; the message is the reason, under which it is counted."""


# ---- reading -------------------------------------------------------------------------------------

def load_texts(paths):
    """The documents of the files, a list of strings. InputError for a file that cannot be used."""
    return [document for row in _load(paths, _documents) for document in row]


def load_conversations(paths):
    """Lists of {"role", "content"} that end with the assistant. InputError as in load_texts."""
    return _load(paths, _conversation)


def load_preferences(paths):
    """A list of Pair. InputError as in load_texts."""
    return _load(paths, _pair)


def load_prompts(paths):
    """[(what comes before the last answer, whether the row has a p, which marks it as held out)], from files of
    conversations or of preferences."""
    def parse(row, where):
        if not _is_preference(row):
            return _conversation(row, where)[:-1], False
        pair = _pair(row, where)
        return pair.prompt, pair.p is not None
    return _load(paths, parse)


def _load(paths, parse):
    if "world" in paths and not os.path.exists("world"):
        raise InputError("'world' can only stand alone, and only where something is trained; expected files")
    loaded = []
    for path in paths:
        loaded += keep_usable(_rows(Path(path)), lambda row: parse(row[1], row[0]), f"rows of {path}")
    return loaded


def keep_usable(rows, parse, what):
    """parse(row) of every usable row; reports on stderr what was dropped. InputError if that is over half."""
    kept, dropped = [], Counter()
    for row in rows:
        try:
            kept.append(parse(row))
        except Unusable as reason:
            dropped[str(reason)] += 1
    if dropped:
        lost = dropped.total()
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        line = f"kept {len(kept)} of {len(kept) + lost} {what}; dropped {lost}: {reasons}"
        if lost > len(kept):
            raise InputError(f"{line}; expected at least half of them to be usable")
        print(f"data: {line}", file=sys.stderr)
    return kept


def _rows(path):
    """[("FILE, line 3", {...}), ...]; a .txt file is one row, {"text": all of it}."""
    name = path.name.lower()
    try:
        data = path.read_bytes()
        if name.endswith(".gz"):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: found a corrupt or truncated gzip file ({error}), expected a whole one")
    except OSError as error:
        raise InputError(f"{path}: found no readable file ({error.strerror}), expected a data file")
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in (".txt", ".json", ".jsonl"):
        raise InputError(f"{path}: found the ending {kind!r}, "
                         "expected .txt, .json or .jsonl, or one of these with .gz")
    text = _decode(data, path)
    if not text.strip():
        raise InputError(f"{path}: found an empty file, expected a {kind} file with text in it")
    if kind == ".txt":
        return [(f"{path}", {"text": text.replace("\r\n", "\n")})]
    if kind == ".json":
        values = _parse(text, path, 1, "a list of objects (one object a line is a .jsonl file)")
        if not isinstance(values, list) or not values:
            raise InputError(f"{path}: found {_show(values)}, expected a list of objects")
        rows = [(f"{path}, row {number}", value) for number, value in enumerate(values, 1)]
    else:  # split at "\n" only: splitlines would also cut at U+2028, which JSON strings may hold
        rows = [(f"{path}, line {number}", _parse(line, path, number, "one JSON object"))
                for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: found {_show(row)}, expected an object")
    return rows


def _decode(data, path, offset=0):
    """The text of bytes that begin at `offset` of the file."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = path if offset else f"{path}, line {line}"
        raise InputError(f"{place}: found byte 0x{data[error.start]:02x} at byte offset {offset + error.start}, "
                         "expected UTF-8 text")
    if "\0" in text:
        raise InputError(f"{path}: found a zero byte at byte offset {offset + data.index(0)}, expected text")
    return text if offset else text.removeprefix("\ufeff")  # "utf-8-sig" would shift error.start


def _parse(text, path, line, expected):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {line + error.lineno - 1}, column {error.colno}: "
                         f"found bad JSON ({error.msg}), expected {expected}")
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise InputError(f"{path}, line {line}: found unreadable JSON ({error}), expected {expected}")


def _show(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _string(row, key, where):
    value = row.get(key)
    if not isinstance(value, str):
        found = _show(value) if key in row else "no such key"
        raise InputError(f"{where}: found {found} for {key!r}, expected a string")
    if re.search("[\ud800-\udfff]", value):  # legal in JSON, but it has no UTF-8 bytes to encode
        raise InputError(f"{where}: found half a surrogate pair in {key!r}, expected Unicode text")
    return value


def _no_format(row, where, expected):
    return InputError(f"{where}: found the keys {_show(list(row))}, expected {expected}")


def _is_preference(row):
    return {"chosen", "rejected"} <= row.keys()


# ---- formats -------------------------------------------------------------------------------------

def _pieces_of_text(text):
    """The documents, split before encoding, so the separator never reaches the tokenizer as text. The line
    breaks around it are layout, not part of a document."""
    pieces = (piece.strip("\r\n") for piece in text.split(SEPARATOR))
    return [piece for piece in pieces if piece.strip()]


def _documents(row, where):
    if "text" not in row:
        raise _no_format(row, where, 'plain text or {"text"}')
    pieces = _pieces_of_text(_string(row, "text", where))
    if not pieces:
        raise Unusable("empty text")
    return pieces


def _conversation(row, where):
    if "messages" in row:
        return _with_system(row, _usable(_messages(row, "messages", where)), where)
    for answer in ("output", "response"):
        if "instruction" in row and answer in row:
            answered = _usable([*_alpaca(row, where), _turn("assistant", _string(row, answer, where))])
            return _with_system(row, answered, where)
    hint = "; this is a row of preferences" if _is_preference(row) else ""
    raise _no_format(row, where, '{"messages"}, {"instruction", "output"} or {"instruction", "response"}' + hint)


def _pair(row, where):
    if not _is_preference(row):
        raise _no_format(row, where, '"chosen" and "rejected", with a "prompt" or "instruction" or as whole dialogues')
    p = row.get("p")
    if p is not None and (type(p) not in (int, float) or not 0 <= p <= 1):
        raise InputError(f"{where}: found {_show(p)} for 'p', expected a probability")
    if isinstance(row.get("prompt"), str) and re.match(r"\n\nHuman:|Human:.*\n\nAssistant:", row["prompt"], re.S):
        row = _whole_dialogues(row, where)
    if "prompt" in row:
        prompt = _messages(row, "prompt", where, role="user")
    else:
        prompt = _alpaca(row, where) if "instruction" in row else None
    chosen, rejected = (_answered(prompt, row, key, where) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("chosen and rejected answer different prompts")
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        raise Unusable("chosen equals rejected")
    return Pair(_with_system(row, chosen[:-1], where), chosen[-1]["content"], rejected[-1]["content"], p)


def _whole_dialogues(row, where):
    """Anthropic HH in three columns -> in two, without "prompt". `chosen` and `rejected` may be the whole dialogue, the
    answer after "Assistant:", or the answer alone."""
    prompt = start = row["prompt"].lstrip("\n")  # some versions lack the first line breaks
    if f"\n\n{prompt}".rfind("\n\nHuman:") > f"\n\n{prompt}".rfind("\n\nAssistant:"):  # it ends with the question
        start += "\n\nAssistant:"
    answers = {}
    for key in ("chosen", "rejected"):
        answer = _string(row, key, where).lstrip("\n").removeprefix(prompt)
        answers[key] = start + re.sub(r"^\s*Assistant:", "", answer)
    return {key: value for key, value in row.items() if key != "prompt"} | answers


def _with_system(row, messages, where):
    """The messages, after the row's "system" prompt if it has one and they have none of their own."""
    if row.get("history"):  # LLaMA-Factory's; without them the question may mean nothing
        raise InputError(f"{where}: found earlier turns in 'history', expected them in {{\"messages\"}}")
    if not row.get("system") or messages[0]["role"] == "system":
        return messages
    return [_turn("system", _string(row, "system", where)), *messages]


def _answered(prompt, row, key, where):
    """The whole dialogue, ending with the answer under `key`; if prompt is None, `key` holds all of it. A list that
    contains the prompt's last turn repeats the conversation; then of the prompt only a system turn counts."""
    if prompt is None:
        read = _dialogue if isinstance(row[key], str) else _messages
        return _usable(read(row, key, where))
    answer = _messages(row, key, where, role="assistant")
    if prompt and prompt[-1] in answer:
        prompt = prompt[:1] if prompt[0]["role"] == "system" and answer[0]["role"] != "system" else []
    return _usable(prompt + answer)


def _dialogue(row, key, where):
    """'\\n\\nHuman: Hi\\n\\nAssistant: Hello' -> messages, the spaces around each turn removed."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", _string(row, key, where))
    if before.strip() or not parts:
        raise InputError(f"{where}: found {_show(row[key])} for {key!r} and no prompt, "
                         "expected a dialogue that begins with '\\n\\nHuman:'")
    names = {"Human": "user", "Assistant": "assistant"}
    return [_turn(names[name], text.strip()) for name, text in zip(parts[::2], parts[1::2])]


def _alpaca(row, where):
    key = "input" if "input" in row else "context"  # Dolly's name for the same
    extra = "" if row.get(key) is None else _string(row, key, where)
    question = _string(row, "instruction", where)
    return [_turn("user", f"{question}\n\n{extra}" if extra.strip() else question)]


def _messages(row, key, where, role=None):
    """A list of messages; with a role, a plain string is one message of that role."""
    value = row[key]
    if role and isinstance(value, str):
        return [_turn(role, _string(row, key, where))]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        expected = "a string or a list of messages" if role else "a list of messages"
        raise InputError(f"{where}: found {_show(value)} for {key!r}, expected {expected}")
    if any(message.get("tool_calls") for message in value):
        raise Unusable("tool calls")
    return [_turn(_string(message, "role", where), _string(message, "content", where)) for message in value]


def _turn(role, content):
    return {"role": role, "content": content}


def _usable(messages):
    """The messages, unchanged: an optional system turn, then user and assistant in turn; else raises Unusable."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if "assistant" not in roles:
        raise Unusable("no assistant turn")
    if roles[-1] == "user":
        raise Unusable("ends with the user")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unusable("roles do not alternate")
    for message in turns:
        if not message["content"].strip():
            raise Unusable("empty answer" if message["role"] == "assistant" else "empty question")
    return messages


# ---- held-out rows -------------------------------------------------------------------------------

def split_holdout(rows, holdout):
    """(train, heldout): heldout is the last rows, a fraction if `holdout` is below 1 (at least one row), else a count.
    With one document, or where the fraction is at most half a document, as with a few books, the end of the last one is
    held out: that fraction of all characters. InputError if nothing is left to train on."""
    if rows and isinstance(rows[-1], str) and holdout < 1 and (len(rows) == 1 or round(len(rows) * holdout) == 0):
        *before, book = rows
        end = max(1, round(holdout * sum(map(len, rows))))  # characters to hold out
        if end < len(book):
            return [*before, book[:-end]], [book[-end:]]
    count = max(1, round(len(rows) * holdout)) if holdout < 1 else int(holdout)
    if count >= len(rows):
        raise InputError(f"found {len(rows)} rows and a hold-out of {count}, expected some rows left to train on; "
                         "give more rows or a smaller --holdout")
    return rows[:-count], rows[-count:]


def split_marked(rows, marked, holdout, paths):
    """(train, heldout): held out are the rows whose entry in `marked` is true, as those of a preference file
    that have a p are; if there are none, the last ones, as in `split_holdout`. InputError if all rows are marked."""
    train, heldout = ([row for row, mark in zip(rows, marked, strict=True) if mark == wanted] for wanted in (False, True))
    if not heldout:
        return split_holdout(rows, holdout)
    if not train:
        raise InputError(f"{' '.join(paths)}: every row has a 'p', which marks it as held out; "
                         "expected some rows without one to train on")
    return train, heldout


def drop_seen(heldout, train, key):
    """The held-out rows whose key(row), e.g. their prompt, is new; if none is, all of them, with a warning."""
    def mark(row):  # a number, which takes less memory than a long prompt
        return hash(json.dumps(key(row), sort_keys=True))
    seen = set(map(mark, train))
    fresh = [row for row in heldout if mark(row) not in seen]
    if not fresh:
        print(f"data: the prompts of all {len(heldout)} held-out rows are also in training, so what is measured on these "
              "says nothing about new prompts", file=sys.stderr)
        return heldout
    if len(fresh) < len(heldout):
        print(f"data: kept {len(fresh)} of {len(heldout)} held-out rows; dropped "
              f"{len(heldout) - len(fresh)}: prompt is also in training", file=sys.stderr)
    return fresh


# ---- encoding ------------------------------------------------------------------------------------

def pack_documents(documents, tokenizer):
    """(tokens (N,) int32, number of UTF-8 bytes in the documents); <|endoftext|> begins each document."""
    tokens = [np.array([tokenizer.endoftext_id, *tokenizer.encode(document)], dtype=np.int32) for document in documents]
    return torch.from_numpy(np.concatenate(tokens)), sum(len(document.encode("utf-8")) for document in documents)


def encode_conversations(conversations, tokenizer, context_length, what="conversations"):
    """[(ids, mask), ...], mask 1 on supervised ids; those longer than the context are dropped, and reported as `what`."""
    def encode(messages):
        ids, mask = render_chat(tokenizer, messages)
        if len(ids) > context_length:
            raise Unusable(f"longer than {context_length} tokens")
        return ids, mask
    return keep_usable(conversations, encode, what)


def encode_pairs(pairs, tokenizer, context_length, what="pairs"):
    """A list of EncodedPair; a pair with one side longer than the context is dropped whole, and reported as `what`."""
    def encode(pair):
        prompt, _ = render_chat(tokenizer, pair.prompt, generation_prompt=True)
        answers = []
        for text in (pair.chosen, pair.rejected):
            ids, mask = render_chat(tokenizer, [*pair.prompt, _turn("assistant", text)])
            answer = zip(ids[len(prompt):], mask[len(prompt):])
            answers.append([token for token, on in answer if on])
        if len(prompt) + max(map(len, answers)) > context_length:
            raise Unusable(f"longer than {context_length} tokens")
        return EncodedPair(prompt, *answers, pair.p)
    return keep_usable(pairs, encode, what)


# ---- texts larger than memory --------------------------------------------------------------------

def _cut(piece):
    """Where `piece` (bytes) can be cut: before its last separator, else after its last line; 0: nowhere."""
    before = piece[:max(0, piece.rfind(SEPARATOR.encode()))].rstrip(b"\r\n")
    return len(before) or piece.rfind(b"\n") + 1


def read_pieces(paths, start=0, stop=None, size=2**22):
    """Yield (end, text) for pieces of .txt files, read one after the other, from byte `start` to `stop`, counted
    over all of them; `end` is the offset of the byte after the piece. Every document begins with the separator; the
    first of a file is always given one (a second makes an empty document, which is dropped). A piece has up to `size`
    bytes and ends where a document does or, in a longer one, after a line. `start` and `stop` must lie between
    characters."""
    before = 0
    for path in map(Path, paths):
        length = path.stat().st_size
        position, last = max(0, start - before), length if stop is None else min(length, stop - before)
        with open(path, "rb") as file:
            while position < last:
                file.seek(position)
                piece = file.read(min(size, last - position))
                if position + len(piece) < last:
                    piece = piece[:_cut(piece)]
                    if not piece:
                        raise InputError(f"{path}: found no line break and no {SEPARATOR} in {size:,} bytes "
                                         f"from offset {position:,}, expected text in lines")
                text = _decode(piece, path, position).replace("\r\n", "\n")
                if position == 0:
                    text = SEPARATOR + text
                position += len(piece)
                yield before + position, text.rstrip("\r\n") if position == length else text
        before += length


def open_large(paths, holdout, most=2**24, head=2**25, window=2**22):
    """(documents from the beginning, to learn a vocabulary from; held-out documents; the byte where these
    begin). About the last `holdout` of the bytes is held out, at most `most` of them."""
    for path in map(Path, paths):
        if path.suffix.lower() != ".txt" or not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise InputError(f"{path}: found no .txt file that can be read, which --stream needs")
    sizes = [Path(path).stat().st_size for path in paths]
    total = sum(sizes)
    if not 0 < holdout < 1 or total < 2:
        raise InputError(f"found --holdout {holdout:g} and {total} bytes, expected a fraction and some text")
    cut = total - min(most, max(1, round(holdout * total)))
    # The hold-out begins where the last document, or line, before the cut ends: look for it in the cut's own file.
    before = 0
    for path, size in zip(paths, sizes):
        if cut < before + size:
            break
        before += size
    with open(path, "rb") as file:  # bytes: the window may begin inside a character
        begin = max(0, cut - before - window)
        file.seek(begin)
        at = _cut(file.read(cut - before - begin))
    if begin and not at:
        raise InputError(f"{path}: found no line break and no {SEPARATOR} in {window:,} bytes from offset "
                         f"{begin:,}, expected text in lines")
    found = before + begin + at
    heldout = [document for _, text in read_pieces(paths, found) for document in _pieces_of_text(text)]
    first = []
    for end, text in read_pieces(paths, 0, found):
        first += _pieces_of_text(text)
        if end >= head:
            break
    if not heldout or not first:
        raise InputError(f"{paths[0]}: found nothing to train on or to hold out, expected some documents")
    return first, heldout, found


def stream_tokens(paths, stop, tokenizer, folder):
    """The tokens of the bytes before `stop`, in FOLDER/tokens.bin: (N,) int32, memory-mapped, so that only what is accessed
    is read. If interrupted, a later call continues there. They are those of `pack_documents`, but for line breaks at the
    end of a document longer than a piece and, with another's tokenizer, at the cuts inside it."""
    make_folder(folder)
    mark, binary = Path(folder) / "tokens.json", Path(folder) / "tokens.bin"
    seen = [(str(path), Path(path).stat()) for path in paths]
    vocabulary = repr([tokenizer.pattern, tokenizer.nfc, sorted(tokenizer.plain),
                       *(sorted(ids.items()) for ids in (tokenizer.ranks, tokenizer.specials))])
    made_from = {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in seen], "stop": stop,
                 "vocabulary": f"{zlib.crc32(vocabulary.encode()):08x}"}
    done = {"position": 0, "tokens": 0}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # there is none yet, or a damaged one
        found = json.loads(mark.read_text(encoding="utf-8"))
        whole = binary.stat().st_size >= 4 * found["tokens"]  # the file may be an incomplete copy
        if whole and found == made_from | {name: found[name] for name in done}:
            done = {name: found[name] for name in done}
    # `writing` comes first: closing the file after a failed write tries to write again.
    with writing(binary), open(binary, "r+b" if done["tokens"] else "wb") as file, tqdm(
            total=stop, initial=done["position"], unit="B", unit_scale=True, desc="tokens") as bar:
        file.truncate(4 * done["tokens"])
        file.seek(0, 2)
        for end, text in read_pieces(paths, done["position"], stop):
            # What comes before the first separator belongs to a document that began in an earlier piece.
            rest, *documents = re.split(rf"[\r\n]*{re.escape(SEPARATOR)}[\r\n]*", text)
            ids = tokenizer.encode(rest)
            for document in documents:
                if document.strip():
                    ids += [tokenizer.endoftext_id, *tokenizer.encode(document)]
            file.write(np.asarray(ids, dtype=np.int32).tobytes())
            file.flush()
            os.fsync(file.fileno())  # before tokens.json, which relies on it
            bar.update(end - done["position"])
            done = {"position": end, "tokens": done["tokens"] + len(ids)}
            write_text(mark, json.dumps(made_from | done))
    if not done["tokens"]:
        raise InputError(f"{paths[0]}: found no text, expected some documents")
    return torch.from_numpy(np.memmap(binary, dtype=np.int32, mode="c"))  # "c": never written back


# ---- batches -------------------------------------------------------------------------------------

def check_long_enough(tokens, length):
    """InputError unless a window of `length` tokens and the target after it fit."""
    if len(tokens) <= length:
        raise InputError(f"found {len(tokens)} tokens of text, expected more than a window of {length}; give more text")


def random_windows(tokens, batch, length, generator):
    """inputs (B, T), targets (B, T), int64: windows at random places, targets one token later."""
    check_long_enough(tokens, length)
    starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
    windows = tokens[starts + torch.arange(length + 1)].long()  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


def length_batches(lengths, batch_size, generator=None):
    """Lists of indices, every index once; a batch holds similar lengths, so padding is small. With a generator the
    order is random, and a new one at each call; without, it is sorted by length."""
    count = len(lengths)
    if generator is None:
        order = sorted(range(count), key=lengths.__getitem__)
    else:  # sorting all would make the same batches in every epoch; sorted chunks keep some randomness
        order, chunk = torch.randperm(count, generator=generator).tolist(), 50 * batch_size
        order = [index for start in range(0, count, chunk)
                 for index in sorted(order[start:start + chunk], key=lengths.__getitem__)]
    batches = [order[start:start + batch_size] for start in range(0, count, batch_size)]
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def epoch_batches(lengths, batch_size, seed, epochs):
    """The `length_batches` of all epochs, one after the other, each in an order of its own. They depend only on the
    seed, so that a resumed run gets them again and can skip those that it has done."""
    return [batch for epoch in range(epochs)
            for batch in length_batches(lengths, batch_size, torch.Generator().manual_seed(seed * 1_000_003 + epoch))]


def pad_right(rows, pad_id):
    """(B, T) int64, T the longest row. Masks are padded the same way, with 0."""
    longest = max(map(len, rows))
    padded = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64)


def sft_batch(rows, pad_id):
    """inputs (B, T - 1), targets (B, T - 1) of (ids, mask) rows; -100 where nothing is supervised. The shift happens
    here and nowhere else: targets[:, t] is the token after inputs[:, t]."""
    inputs = pad_right([ids for ids, _ in rows], pad_id)[:, :-1]
    supervised = [[token if on else IGNORE for token, on in zip(*row)] for row in rows]
    targets = pad_right(supervised, IGNORE)[:, 1:]
    if (targets == IGNORE).all():
        raise InputError("found a batch with no supervised token, expected an answer in it")
    return inputs, targets


def preference_batch(pairs, pad_id):
    """ids (2B, T), mask (2B, T), last (2B,): the B chosen rows first, then the B rejected ones. mask[i, t] is 1 where
    ids[i, t] is part of the answer; last is the index of the last real token."""
    sides = [(pair.prompt, pair.chosen) for pair in pairs]
    sides += [(pair.prompt, pair.rejected) for pair in pairs]
    ids = pad_right([prompt + answer for prompt, answer in sides], pad_id)
    mask = pad_right([[0] * len(prompt) + [1] * len(answer) for prompt, answer in sides], 0)
    return ids, mask, torch.tensor([len(prompt) + len(answer) - 1 for prompt, answer in sides])


def pair_lengths(pairs):
    """Tokens in the longer row of each pair: both rows are in the same batch, padded to its longest."""
    return [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]


def visible(text):
    """Control codes spelled out: what a file holds or a model writes must not steer the terminal. \\n and \\t stay."""
    codes = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
    return re.sub(codes, lambda c: ascii(c[0])[1:-1], text)


def show_conversation(tokenizer, ids, mask):
    """Text for --show-batch: supervised runs in [brackets]."""
    text = ""
    for on, run in itertools.groupby(zip(ids, mask), key=lambda pair: bool(pair[1])):
        piece = tokenizer.decode([int(token) for token, _ in run])
        text += f"[{piece}]" if on else piece
    return visible(text)


def show_pair(tokenizer, pair):
    """The same for an EncodedPair: the prompt with `chosen`, then with `rejected`."""
    return "\n".join(show_conversation(tokenizer, pair.prompt + answer, [0] * len(pair.prompt) + [1] * len(answer))
                     for answer in (pair.chosen, pair.rejected))
