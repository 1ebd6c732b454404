"""Byte-level BPE: train it, encode and decode with it, and render chats.

Training is our own code, in plain Python. Encoding is done by `tiktoken`, built from our merges, so
it downloads nothing. Files are in Hugging Face's `tokenizer.json` format; byte-level ones of other
models (Llama 3, Qwen, SmolLM) open too.

    python -c "import tokenizer; tokenizer.train_bpe([open('book.txt', encoding='utf-8').read()], 4096).save('mine')"

Left out: SentencePiece and WordPiece, offsets into the text, and the `<s>`-like tokens that some
files want before every text. Control tokens written in a text are never parsed: they are spelled out in
ordinary tokens, so that no user can forge the end of a turn. (Added tokens that are text, such as Qwen's
<think>, are.)
"""

import heapq
import json
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import regex
import tiktoken

ENDOFTEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIALS = (ENDOFTEXT, IM_START, IM_END, PAD)
ROLES = ("system", "user", "assistant")

# No merge crosses the border of a chunk. A word includes the space before it, so that "cat" is
# nearly always the same token. Each digit is a chunk: 1234 is always the same four tokens, whatever
# is frequent. So is a newline: a chat's header ends with one, and the header's ids must not depend
# on what comes next. Runs of spaces are bounded because tiktoken fails on a megabyte of them.
PATTERN = (
    r"['’](?:s|t|re|ve|m|ll|d)(?!\p{L})"  # it's, they've, but not 'tis
    r"| ?\p{L}+|\p{N}|\n"
    r"| ?[^\s\p{L}\p{N}]+"  # punctuation and symbols
    r"|[^\S\n]{1,32}(?!\S)|[^\S\n]"  # spaces; the last one is left for the word after them
)
# For files that name a built-in rule instead of giving a pattern.
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_SINGLE_DIGITS_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# JSON cannot hold arbitrary bytes, so GPT-2 has a printable stand-in for each. Bytes that are printable in Latin-1
# stand for themselves, the other 68 become the characters from U+0100 on: the space is `Ġ`, the newline `Ċ`. The ids of
# the bytes follow this order.
_printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_others = [byte for byte in range(256) if byte not in _printable]
BYTE_TO_CHAR = {b: chr(b) for b in _printable} | {b: chr(0x100 + i) for i, b in enumerate(_others)}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def _to_chars(token):
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def _to_bytes(chars):
    return bytes(CHAR_TO_BYTE[char] for char in chars)


@dataclass(eq=False, repr=False)
class Tokenizer:
    """Text to ids and back. Made by `train_bpe` or `Tokenizer.load`."""

    pattern: str  # cuts the text into chunks
    ranks: dict  # token (bytes) -> id; of two possible merges the one with the lower id comes first
    merges: list  # pairs of bytes, in the order learned
    specials: dict  # name -> id
    pad_token: str = PAD
    nfc: bool = False  # compose accents first (Qwen)
    plain: frozenset = frozenset()  # of the specials, those that are text, not control (Qwen's <think>)

    def __post_init__(self):
        self.known = {*self.ranks.values(), *self.specials.values()}  # the ids may have gaps
        self.vocab_size = max(self.known) + 1
        # Some vocabularies (SmolLM's) lack rare bytes. tiktoken needs them all, so they get ids
        # past the end, and `encode` drops those: Hugging Face drops such bytes, too.
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in self.ranks]
        self._lossy = bool(missing)
        self.encoding = tiktoken.Encoding(
            "byte-level-bpe",
            pat_str=self.pattern,
            mergeable_ranks=self.ranks | {b: self.vocab_size + i for i, b in enumerate(missing)},
            special_tokens=self.specials,
        )

    def encode(self, text):
        """-> list of ids. Nothing in `text` becomes a special token, except those that are text themselves (`plain`)."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        ids = (self.encoding.encode(text, allowed_special=self.plain, disallowed_special=()) if self.plain else
               self.encoding.encode_ordinary(text))  # a tenth faster
        return [i for i in ids if i < self.vocab_size] if self._lossy else ids

    def decode(self, ids):
        """Ids -> text. Bytes that are not UTF-8 become U+FFFD. Ids that no token has are skipped: a model may
        have more rows than its tokenizer has tokens, so it may sample an unused one."""
        return self.encoding.decode([i for i in map(int, ids) if i in self.known], errors="replace")

    def special_id(self, name):
        """The id of a special token. ValueError if this vocabulary has none of that name."""
        if name not in self.specials:
            raise ValueError(f"this tokenizer has no {name} token")
        return self.specials[name]

    # A missing one matters only when it is asked for: a Llama base model's tokenizer encodes text, but has no chats.
    endoftext_id = property(lambda self: self.special_id(ENDOFTEXT))
    im_start_id = property(lambda self: self.special_id(IM_START))
    im_end_id = property(lambda self: self.special_id(IM_END))
    pad_id = property(lambda self: self.special_id(self.pad_token))

    @property
    def end_ids(self):
        """The ids that end an answer: that of the template, and that of a document, which a model may still write."""
        return self.im_end_id, self.endoftext_id

    def save(self, folder):
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers` reads too."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": i, "content": name, "special": name not in self.plain, **flags}
                 for name, i in sorted(self.specials.items(), key=lambda item: item[1])]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        # The special tokens must be in the vocabulary too, or Hugging Face would give them new ids.
        vocab = {_to_chars(token): i for token, i in self.ranks.items()} | self.specials
        merges = [[_to_chars(left), _to_chars(right)] for left, right in self.merges]
        spec = {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }
        roles = {"eos_token": IM_END if IM_END in self.specials else ENDOFTEXT, "pad_token": self.pad_token}
        config = {  # Hugging Face would add a role's token that is not in the vocabulary, past the model's last row
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{role: name for role, name in roles.items() if name in self.specials},
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")

    @classmethod
    def load(cls, folder):
        """Read a folder's `tokenizer.json`: ours, or another byte-level BPE. ValueError names what is not implemented."""
        path = Path(folder) / "tokenizer.json"
        spec = json.loads(path.read_text("utf-8"))
        config_path = Path(folder) / "tokenizer_config.json"
        config = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}

        def require(condition, what):
            if not condition:
                raise ValueError(f"{path}: {what} is not implemented, only byte-level BPE is")

        model = spec.get("model") or {}
        require(model.get("type") == "BPE", f"model {model.get('type')}")
        for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            require(not model.get(key), f"model.{key}")
        normalizer = spec.get("normalizer")
        require(normalizer in (None, {"type": "NFC"}), f"normalizer {normalizer}")
        decoder = (spec.get("decoder") or {}).get("type")
        require(decoder == "ByteLevel", f"decoder {decoder}")
        pattern = _pattern(spec.get("pre_tokenizer") or {})
        require(pattern, f"pre_tokenizer {spec.get('pre_tokenizer')}")

        vocab = model["vocab"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        # tiktoken merges in the order of the results' ids, Hugging Face in the order of the list.
        merged = [vocab[left + right] for left, right in merges]
        require(merged == sorted(merged), "a vocabulary in another order than its merges")
        added = spec.get("added_tokens") or []
        specials = {token["content"]: token["id"] for token in added}
        mergeable = {char: vocab[char] for char in BYTE_TO_CHAR.values() if char in vocab}
        mergeable |= {left + right: i for (left, right), i in zip(merges, merged)}
        unreachable = vocab.keys() - mergeable.keys() - specials.keys()
        require(not unreachable, f"a token that no merge makes ({sorted(unreachable)[:1]})")
        alien = set("".join(mergeable)) - CHAR_TO_BYTE.keys()
        require(not alien, f"a vocabulary with the characters {sorted(alien)}")
        pad = config.get("pad_token") or (PAD if PAD in specials else ENDOFTEXT)
        return cls(
            pattern,
            {_to_bytes(chars): i for chars, i in mergeable.items()},
            [(_to_bytes(left), _to_bytes(right)) for left, right in merges],
            specials,
            pad_token=pad["content"] if isinstance(pad, dict) else pad,
            nfc=normalizer is not None,
            plain=frozenset(token["content"] for token in added if not token.get("special", True)) - {*SPECIALS},
        )


def _pattern(pre_tokenizer):
    """The one regular expression that a `pre_tokenizer` of tokenizer.json means, or None."""
    *steps, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        if not steps:
            return GPT2_PATTERN
        digits = {"type": "Digits", "individual_digits": True}
        return GPT2_SINGLE_DIGITS_PATTERN if steps == [digits] else None
    if len(steps) != 1 or steps[0].get("type") != "Split":
        return None
    isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
    return steps[0]["pattern"].get("Regex") if isolated else None


def train_bpe(texts, vocab_size, special_tokens=SPECIALS):
    """Learns byte-pair merges (Sennrich et al. 2016, on bytes as in GPT-2) -> Tokenizer.

    texts: an iterable of str. vocab_size: 256 bytes + merges + special tokens; when every chunk
    has become one token there is nothing left to merge, and the vocabulary stays smaller.
    Ids: the bytes in the order of GPT-2's alphabet, then the merges as learned, then the specials.
    The most frequent pair is merged first; among equals the one with the lowest left id, then
    the lowest right id, as in Hugging Face's trainer."""
    merge_count = vocab_size - 256 - len(special_tokens)
    if merge_count < 0:
        raise ValueError(f"vocab_size {vocab_size} is below 256 bytes + {len(special_tokens)} special tokens")
    vocab = [bytes([byte]) for byte in BYTE_TO_CHAR]  # id -> bytes
    byte_ids = {token[0]: i for i, token in enumerate(vocab)}

    chunks, find_chunks = Counter(), regex.compile(PATTERN).findall
    for text in texts:
        chunks.update(find_chunks(text))
    # "replace": half a surrogate pair, which JSON can hold, has no UTF-8 bytes.
    words = [[byte_ids[b] for b in chunk.encode("utf-8", "replace")] for chunk in chunks]
    frequency = list(chunks.values())

    counts = defaultdict(int)  # pair -> how often it occurs in the text
    holders = defaultdict(set)  # pair -> the words that contain it, or once did
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += frequency[w]
            holders[pair].add(w)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    merges = []
    while heap and len(merges) < merge_count:
        negated, pair = heapq.heappop(heap)
        if -negated != counts[pair]:
            # Entries of the heap are not updated when a count falls. An old pair's count never rises
            # again, so an outdated entry is always too high: it is popped in time to be corrected.
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, (left, right) = len(vocab), pair
        vocab.append(vocab[left] + vocab[right])
        merges.append((vocab[left], vocab[right]))
        born = set()
        for w in holders.pop(pair):
            word, times, i = words[w], frequency[w], 0
            while i < len(word) - 1:
                if word[i] == left and word[i + 1] == right:
                    word[i : i + 2] = [new]
                    if i > 0:
                        before = word[i - 1]
                        counts[before, left] -= times
                        counts[before, new] += times
                        holders[before, new].add(w)
                        born.add((before, new))
                    if i + 1 < len(word):
                        after = word[i + 1]
                        counts[right, after] -= times
                        counts[new, after] += times
                        holders[new, after].add(w)
                        born.add((new, after))
                i += 1
        for pair in born:
            if counts[pair]:  # in aaaa, merging aa once creates (aa, a), merging it again removes it
                heapq.heappush(heap, (-counts[pair], pair))

    ranks = {token: i for i, token in enumerate(vocab)}
    specials = {name: len(vocab) + i for i, name in enumerate(special_tokens)}
    return Tokenizer(PATTERN, ranks, merges, specials)


def same_tokens(a, b):
    """Whether ids of one tokenizer mean the same in the other."""
    return a.ranks == b.ranks and a.specials == b.specials


def render_chat(tokenizer, messages, generation_prompt=False):
    """The chat template (ChatML), the only one in this project -> (ids, mask), of equal length.

    messages: a list of {"role": "system" | "user" | "assistant", "content": str}, rendered as
    `<|im_start|>role⏎content<|im_end|>⏎`. mask[i] is 1 where ids[i] is to be learned: the
    assistant's content and its <|im_end|>, which teaches it to stop. With generation_prompt the
    ids end with `<|im_start|>assistant⏎`, where the model takes over.
    ValueError for an unknown role or anything that is not of these types.
    """
    ids, mask = [], []

    def add(tokens, supervised):
        ids.extend(tokens)
        mask.extend([supervised] * len(tokens))

    # Header and content are encoded separately, so that no merge crosses the border: the ids of a
    # prompt are then exactly the first ids of the whole conversation, which is what training saw.
    def header(role):
        return [tokenizer.im_start_id, *tokenizer.encode(role + "\n")]

    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages must be a list, found {type(messages).__name__}")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {n}: expected a dict with str content, found {message!r}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {n}: unknown role {role!r}, expected one of {ROLES}")
        add(header(role), 0)
        add([*tokenizer.encode(message["content"]), tokenizer.im_end_id], int(role == "assistant"))
        add(tokenizer.encode("\n"), 0)
    if generation_prompt:
        add(header("assistant"), 0)
    return ids, mask
