"""Checks for the exercises: is your function right, and if not, what is likely wrong?

    from checks import *        # `from start import *` has done it already

    check_gae(gae)              # ✓ gae: agrees with rlhf.gae on 8 random tables
    check_gae(gae, seed=71)     # the same random numbers again, for debugging

A check calls your function on fresh random inputs and compares with the code of this repository, or with
the formula written out. If they differ it raises `Wrong`, which says what went in, what came out, and what
was expected. It also tries common mistakes on the same inputs: if one of them gives exactly what your function
gives, it tells you which. Plain numbers, lists, NumPy arrays and tensors are all welcome as results, except
where a gradient has to flow (a loss) or ids are looked up (whole numbers). An input must not be changed.

How it is made: each check is `compare(fn, right, inputs, hints)`, where `hints` is a list of
(wrong function, or a tuple of them, what to say if yours does the same). A hint is given only if a function
explains *all* results.
"""

import copy
import inspect
import math
import random
import sys
import traceback
from collections import Counter
from dataclasses import replace
from functools import cache, wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

import data
import reward
import rlhf
import training
from model import GPT, GPTConfig, rope_tables, rotate, token_logprobs, truncate
from rlhf import last_token, masked_mean
from tokenizer import render_chat, train_bpe


class Wrong(AssertionError):
    """A check that failed. Jupyter shows the message alone, without the traceback."""

    def _render_traceback_(self):
        return [str(self)]


# ---- the machinery -------------------------------------------------------------------------------

def check(test):
    """test(fn, g), g a random generator, returns what to say of a right fn -> check(fn, seed=None)."""

    def run(fn, seed=None):
        # Not `random.randrange`: a notebook that sets its seeds would get the same inputs every time.
        seed = random.SystemRandom().randrange(10**6) if seed is None else seed
        name = getattr(fn, "__name__", str(fn))
        try:
            if not callable(fn):
                raise Wrong(f"it is not a function but {show(fn)}. Give the function itself, not its result.")
            with torch.enable_grad():
                said = test(fn, torch.Generator().manual_seed(seed))
        except Wrong as wrong:
            raise Wrong(f"✗ {name}: {wrong}\n"
                        f"  The same numbers again:  {run.__name__}({name}, seed={seed})") from None
        print(f"✓ {name}: {said}")

    run.__name__ = run.__qualname__ = test.__name__
    run.__doc__ = test.__doc__
    return run


def compare(fn, right, inputs, hints=(), also=(), tol=1e-4, grad=0, general=None):
    """Wrong unless fn gives on all `inputs` (tuples of arguments) what `right` gives, or what one function
    of `also` gives. `grad` = n: the gradient of its sum for the first n arguments counts too."""
    names = list(inspect.signature(right).parameters)
    found = [outcome(fn, args, names, grad) for args in inputs]
    expected = [right(*args) for args in inputs]

    def explains(function):
        return all(same(f, attempt(function, args), tol) for f, args in zip(found, inputs))

    if all(same(f, e, tol) for f, e in zip(found, expected)) or any(map(explains, also)):
        for args, f, e in zip(inputs, found, expected):
            whole_numbers(f, e)
            if grad:
                same_gradient(fn, right, args, tol, grad)
        return
    bad = next(i for i, (f, e) in enumerate(zip(found, expected)) if not same(f, e, tol))
    # Where every call fails there is no wrong result to explain: the error itself says most.
    hints, slips = ((), ()) if all(isinstance(f, Exception) for f in found) else (hints, SLIPS)
    hint = next((text for functions, text in hints if any(map(explains, either(functions)))), None)
    hint = hint or next((text for slip, text in slips if all(
        same(f, attempt(slip, [e]), tol) for f, e in zip(found, expected))), None)
    hint = hint or complaint(found[bad], expected[bad]) or general
    hint = hint or "none of the mistakes that we know. Go through the small example by hand, line by line."
    into = "".join(f"\n    {name} = {show(value)}" for name, value in zip(names, inputs[bad]))
    out = "" if isinstance(found[bad], Exception) else f"\n  out:       {show(found[bad])}"
    raise Wrong(f"not right yet.\n  in:{into}{out}\n  expected:  {show(expected[bad])}\n  likely:    {hint}")


def either(functions):
    return functions if isinstance(functions, tuple) else (functions,)


# What can happen to any right result.
SLIPS = [
    (lambda y: -torch.as_tensor(y), "a sign: minus this would be right."),
    (lambda y: y[::-1] if isinstance(y, tuple) else None, "the results are right, but exchanged."),
    (lambda y: torch.as_tensor(y) / math.log(2), "these are bits (log2); nats (natural log) are asked for."),
    (lambda y: torch.as_tensor(y).exp(), "that is exp(…) of what is asked for; stay with the logarithm."),
    (lambda y: torch.as_tensor(y).mean(), "that is the mean of what is asked for: no mean here."),
    (lambda y: torch.as_tensor(y).sum(), "that is one sum over everything; give the numbers one by one "
     "(a sum along one dimension is .sum(1))."),
    (lambda y: tuple(x.sum(1) for x in y), "you sum over dimension 1; return the tables themselves."),
]


def outcome(fn, args, names, grad=0):
    """What fn(*args) returns, or the exception that it raises. Wrong if it changes an argument."""
    given = copied(args)
    for x in given[:grad]:
        x.requires_grad_()
    try:
        result = fn(*given)
    except Exception as error:
        # An exercise that waits for its answer is no mistake (start.py), and Wrong is already a verdict.
        if type(error).__name__ == "Unfilled" or isinstance(error, Wrong):
            raise
        return error
    for name, now, before in zip(names, given, args):
        if isinstance(before, (list, torch.Tensor, np.ndarray)) and not unchanged(now, before):
            raise Wrong(f"it changes its input `{name}` in place. The caller still needs it: work on a copy "
                        "(x.clone(), list(x)), or write x = x * mask and not x *= mask.")
    return result


def attempt(function, args):
    """A wrong variant may fail too: then its exception is its result."""
    try:
        return function(*copied(args))
    except Exception as error:
        return error


def copied(args):
    return [x.detach().clone() if isinstance(x, torch.Tensor)
            else copy.deepcopy(x) if isinstance(x, (list, np.ndarray)) else x for x in args]


def unchanged(now, before):
    if isinstance(before, list):
        return now == before
    return now.shape == before.shape and bool((now == before).all())


def numbers(x):
    """A float64 array from a number, a list of numbers, an array or a tensor; None from anything else."""
    try:
        if isinstance(x, torch.Tensor):
            x = x.detach().cpu().double()
        return None if x is None else np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        return None


def same(a, b, tol):
    if isinstance(a, Exception) or isinstance(b, Exception):
        return type(a) is type(b)
    if isinstance(b, tuple):
        alike = isinstance(a, (tuple, list)) and len(a) == len(b)
        return alike and all(same(x, y, tol) for x, y in zip(a, b))
    a, b = numbers(a), numbers(b)
    if a is None or b is None or a.shape != b.shape:
        return False
    return bool(np.allclose(a, b, rtol=tol, atol=tol, equal_nan=True))


def complaint(found, expected):
    """What is wrong with the kind of a result (its type, its shape, not a number), or None."""
    if isinstance(found, Exception):
        # The last frame outside this file is the line that the student wrote, or called.
        frames = [f for f in traceback.extract_tb(found.__traceback__) if f.filename != __file__]
        where = f", at the line `{frames[0].line}`" if frames and frames[0].line else ""
        first = (str(found).strip() or "no message").splitlines()[0]
        return f"it stops with {type(found).__name__}: {first}{where}."
    if found is None:
        return "it returns None. Is the line with `return` missing?"
    if isinstance(expected, tuple):
        if not isinstance(found, (tuple, list)) or len(found) != len(expected):
            many = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
            return f"expected {len(expected)} results (return a, b); found {type(found).__name__}{many}."
        parts = [complaint(f, e) for f, e in zip(found, expected)]
        return next((f"result {i} of {len(parts)}: {text}" for i, text in enumerate(parts, 1) if text), None)
    f, e = numbers(found), numbers(expected)
    if f is None:
        nested = isinstance(found, list) and any(isinstance(x, list) for x in found)
        return f"expected numbers, found {'lists in a list: use += or extend' if nested else type(found).__name__}."
    if f.shape != e.shape and f.ndim == e.ndim == 1:
        return f"{len(f)} numbers came out, expected {len(e)}."
    if f.shape != e.shape:
        return f"the shape is {f.shape}, expected {e.shape or '() (one number)'}."
    whole = isinstance(expected, torch.Tensor) and not expected.is_floating_point()
    if not whole and e.ndim == 1 and abs(e.sum() - 1) < 1e-5 and (e >= 0).all() and abs(f.sum() - 1) > 1e-3:
        return f"your numbers sum to {f.sum():.3g}; probabilities sum to 1."
    if np.isnan(f).any() and not np.isnan(e).any():
        return "there is NaN in it: from 0/0, from inf − inf, or from a softmax over nothing but −inf."
    if np.isinf(f).any() and not np.isinf(e).any():
        return "there is an infinity in it: from log 0, from a division by 0, or from exp of a large number."
    return None


def whole_numbers(found, expected):
    if isinstance(expected, tuple):
        for f, e in zip(found, expected):
            whole_numbers(f, e)
    elif isinstance(expected, torch.Tensor) and not expected.is_floating_point():
        if isinstance(found, torch.Tensor) and found.dtype != torch.int64:
            raise Wrong(f"the numbers are right but of type {found.dtype}. Ids and places must be int64, or "
                        "nothing can be looked up with them.")


def same_gradient(fn, right, args, tol, n):
    """The result of fn must also have the gradient of that of `right`, for the first n arguments."""
    slopes = []
    for function in (fn, right):
        given = copied(args)
        for x in given[:n]:
            x.requires_grad_()
        try:
            loss = function(*given)
        except RuntimeError:  # .numpy() of what needs a gradient
            loss = None
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise Wrong("the value is right, but no gradient can flow from it. Return a tensor: no .item(), "
                        ".detach(), float(…) or torch.no_grad() on the way.")
        slopes.append(torch.autograd.grad(loss.sum(), given[:n], materialize_grads=True))
    for name, yours, theirs in zip(inspect.signature(right).parameters, *slopes):
        if not same(yours, theirs, tol):
            raise Wrong(f"the value is right, but its gradient for `{name}` is not. Is a part of it detached?")


def parts(result, n):
    """The n results of a function; Wrong if they are not n."""
    if result is None or not isinstance(result, (tuple, list)) or len(result) != n:
        raise Wrong(complaint(result, (0,) * n))
    return result


def show(value):
    """A value on one line; for a large table its shape."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(show, value)) + ")"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
        if array.size > 40:
            return f"a table of shape {array.shape}"
        text = np.array2string(array, precision=4, separator=", ", suppress_small=True, max_line_width=10**4)
        return " ".join(text.split()).replace("[ ", "[").replace(" ,", ",").replace(" ]", "]")
    if isinstance(value, float):
        return f"{value:.6g}"
    text = repr(value) if type(value).__repr__ is not object.__repr__ else f"a {type(value).__name__}"
    return text if len(text) < 300 else f"{text[:300]} …"


def normal(g, *shape):
    return torch.randn(*shape, generator=g)


def whole(g, low, high, *shape):
    """Whole numbers from low to high, both included: one, or a tensor of this shape."""
    drawn = torch.randint(low, high + 1, shape, generator=g)
    return drawn if shape else drawn.item()


def uniform(g, low, high):
    return low + (high - low) * torch.rand((), generator=g).item()


def answers(g, rows, length):
    """Masks (rows, length): 0 on a prompt, 1 on the answer, 0 on the padding; no two of equal length."""
    place = torch.arange(length)
    first = whole(g, 1, 2, rows, 1)
    count = 2 + torch.randperm(length - 4, generator=g)[:rows, None]
    count[count.argmax()] = length  # only the longest reaches the end of its row, as in a real batch
    return ((place >= first) & (place < first + count)).float()


def make_unlikely(logits, ids, mask):
    """Change the logits in place, so that the last token of the first answer has the probability exp(-200): 0 in float32,
    and only a log-softmax finds its logarithm."""
    place = int(last_token(mask)[0])
    logits[0, place - 1, ids[0, place]] -= 200.0


# ---- 00: comparing models ------------------------------------------------------------------------

@check
def check_win_rate(fn, g):
    """fn(a (N,), b (N,)) -> how often a beats b; a tie counts one half."""
    def right(a, b):
        return ((a > b).double() + 0.5 * (a == b)).mean()

    # The first table by design: wins, losses and ties are 3, 2 and 1 or more, so no two rules agree.
    first = (torch.tensor([0.75, 0.5, 1.0, 0.25, 0.0, 0.5]), torch.tensor([0.5, 0.25, 0.75, 1.0, 0.5, 0.5]))
    inputs = [first] + [(whole(g, 0, 4, 20) / 4, whole(g, 0, 4, 20) / 4) for _ in range(7)]
    compare(fn, right, inputs, [
        (lambda a, b: (a > b).double().mean(), "ties count nothing for you; they count one half. As it is, a "
         "model against itself has a win rate of 0 and not of 0.5."),
        (lambda a, b: (a >= b).double().mean(), "ties count as won for you; they count one half."),
        (lambda a, b: right(b, a), "you count how often b beats a."),
        (lambda a, b: (a > b).double().sum() / (a != b).sum(), "you leave the ties out of the number of "
         "prompts; they count one half, and N stays N."),
        (lambda a, b: (a - b).sign().double().mean(), "your number lies between −1 and 1, like a difference; "
         "a win rate lies between 0 and 1. What should a model against itself have?"),
        (lambda a, b: right(a, b) * len(a), "that is the number of prompts won; divide by N."),
        (lambda a, b: (a - b).sign().double().mean() + 0.5, "the difference of wins and losses runs from −1 "
         "to 1: halve it before you add ½."),
        (lambda a, b: (a.mean() > b.mean()).double(), "you compare the two means; compare the two answers to "
         "each prompt."),
        (lambda a, b: (a - b).mean(), "that is the mean difference of the marks. How much better an answer "
         "is does not matter here, only whether it is."),
    ])
    return "ties count half, on 8 random tables"


# ---- 01: tokens and the next-token loss ------------------------------------------------------------

def _best_pair(count):
    """Turns a function that counts pairs into one that takes the commonest, among equals the smallest."""
    def best(words):
        counts = count(words)
        return min(counts, key=lambda pair: (-counts[pair], pair))
    return best


def _pairs(words):
    return Counter(pair for word in words for pair in zip(word, word[1:]))


def _apart(words):
    """Pairs that do not overlap: aaa holds (a, a) once."""
    counts = Counter()
    for word in words:
        end = {}
        for i, pair in enumerate(zip(word, word[1:])):
            if end.get(pair, -1) < i:
                counts[pair] += 1
                end[pair] = i + 1
    return counts


@check
def check_bpe_best_pair(fn, g):
    """fn(words: list of id lists) -> (a, b), the commonest neighbouring pair, of equals the smallest."""
    right = _best_pair(_pairs)
    a, b, c, d, e, f, h = sorted((torch.randperm(300, generator=g)[:7]).tolist())
    inputs = [([[b, c], [a, c]],), ([[a, c], [b, c]],),  # ties, the smaller pair last or first
              ([[a, c], [a, b]],), ([[a, b], [a, c]],),  # ties of pairs with the same first id
              ([[e, d], [a, h], [f, d], [a, c], [f, d], [a, b], [a, b], [f, d]],),  # (d, a) across words
              ([[b, b, b, b], [a, c], [a, c]],), ([[b, c, b, c], [a, d]],)]
    inputs += [([[whole(g, 0, 3) for _ in range(whole(g, 1, 7))] for _ in range(6)] + [[1, 2]],)
               for _ in range(15)]
    compare(fn, right, inputs, [
        (lambda words: _pairs(words).most_common(1)[0][0], "of equally common pairs you take the one met "
         "first; take the smallest pair. Otherwise the vocabulary depends on the order of the texts."),
        (lambda words: max(_pairs(words).items(), key=lambda item: (item[1], item[0]))[0],
         "of equally common pairs you take the largest; take the smallest."),
        (lambda words: min(_pairs(words), key=lambda pair: (-_pairs(words)[pair], pair[0])), "of equally common pairs "
         "with the same first id you take the one met first; compare the second ids too."),
        (_best_pair(lambda words: _pairs([sum(words, [])])), "you count pairs across the border of two "
         "words. No merge crosses it: count inside each word."),
        (_best_pair(lambda words: Counter(p for w in words for p in set(zip(w, w[1:])))),
         "you count a pair once per word; count every place where it stands."),
        (_best_pair(lambda words: Counter(tuple(sorted(p)) for p in _pairs(words).elements())),
         "you count (a, b) and (b, a) together; they are two different pairs."),
        (_best_pair(_apart), "you count only pairs that do not overlap; a a a has two neighbouring pairs (a, "
         "a)."),
        ((lambda words: (right(words), _pairs(words)[right(words)]),
          lambda words: _pairs(words).most_common(1)[0]), "you return the count too; return the pair alone."),
    ], tol=0)
    if not isinstance(fn(*copied(inputs[0])), tuple):
        raise Wrong("the pair is right, but it is no tuple: return (a, b). Merging compares it with ==, and a list never "
                    "equals a tuple.")
    return "right on 22 lists of words, ties among them"


def _merge(ids, pair, new_id, step=2, stop=0):
    out, i = [], 0
    while i < len(ids) - stop:
        hit = tuple(ids[i:i + 2]) == tuple(pair)
        out.append(new_id if hit else ids[i])
        i += step if hit else 1
    return out


@check
def check_bpe_merge(fn, g):
    """fn(ids: list, pair, new_id) -> list, every occurrence of pair from the left replaced by new_id."""
    right = _merge

    def first_only(ids, pair, new_id):
        at = next((i for i in range(len(ids) - 1) if tuple(ids[i:i + 2]) == pair), None)
        return ids if at is None else [*ids[:at], new_id, *ids[at + 2:]]

    a, b, c = (torch.randperm(200, generator=g)[:3]).tolist()
    inputs = [([a, b, c, a, b, a], (a, b), 300), ([a, a, a], (a, a), 300), ([c, b, a, b], (a, b), 300),
              ([a, a, a, a, a], (a, a), 301), ([], (a, b), 300), ([a], (a, b), 300), ([a, c, b], (a, b), 300)]
    inputs += [([[a, b, c][whole(g, 0, 2)] for _ in range(12)], (a, b), 300) for _ in range(13)]
    compare(fn, right, inputs, [
        (lambda ids, pair, new_id: _merge(ids, pair, new_id, stop=1), "the last id is lost when it is not "
         "part of a pair. Your loop ends one id too early."),
        (lambda ids, pair, new_id: _merge(ids, pair, new_id, step=1), "after a merge you go on by one id; "
         "the second half of the pair is used up too, so go on by two."),
        ((lambda ids, *pair: _merge(ids, *pair, stop=1) + [ids[-1]],
          lambda ids, *pair: _merge(ids, *pair, stop=1) + ids[-1:]),
         "wrong where the pair stands at the very end, and for an empty list."),
        (first_only, "you merge the first occurrence only."),
        (lambda ids, pair, new_id: _merge(ids, pair, new_id, stop=1) + ids[-1:] * (tuple(ids[-2:]) != pair),
         "the last two ids are the pair, but the first of them may be used up by a merge before (a a a). Ask "
         "where i stands, not what the last two are."),
        (lambda ids, pair, new_id: list(ids), "nothing is merged. ids[i:i + 2] is a list, and a list never "
         "equals a tuple: compare tuple(ids[i:i + 2]), or the two ids themselves."),
        (lambda ids, pair, new_id: _merge(ids[::-1], pair[::-1], new_id)[::-1], "you merge from the right; "
         "in a a a it is the first two that become one."),
        (lambda ids, pair, new_id: _merge(_merge(ids, pair, new_id), pair[::-1], new_id),
         "you merge (b, a) as well; only (a, b), in this order, is the pair."),
    ], tol=0)
    return "right on 20 lists, with overlaps, at the end, and empty"


@check
def check_next_token_loss(fn, g):
    """fn(logits (B, T, V), ids (B, T)) -> scalar, mean nats of ids[:, 1:], each given what is before it."""
    def right(logits, ids):
        return -token_logprobs(logits[:, :-1], ids[:, 1:]).mean()

    nll = lambda logits, ids: -token_logprobs(logits, ids)
    inputs = [(2 * normal(g, B, T, V), whole(g, 0, V - 1, B, T))
              for B, T, V in ((1, 3, 4), (2, 5, 7), (3, 8, 11))]
    compare(fn, right, inputs, [
        (lambda logits, ids: nll(logits, ids).mean(), "you do not shift: the logits at place t predict the "
         "token at t + 1. Trained so, a model learns to repeat the token that it reads."),
        (lambda logits, ids: nll(logits[:, 1:], ids[:, :-1]).mean(), "you shift the wrong way: your logits "
         "predict the token *before the one just read*. The model has seen that, too, so the loss soon falls to nearly 0."),
        (lambda logits, ids: nll(logits, ids.roll(1, 1)).mean(), "take one row and write down which token "
         "your loss asks for at each place. Has the model read it already?"),
        (lambda logits, ids: nll(logits, ids.roll(-1, 1)).mean(), "the last place of a row asks for the "
         "row's first token: roll goes round. Leave that place out."),
        ((lambda logits, ids: nll(logits[:, :-1], ids[:, :-1]).mean(),
          lambda logits, ids: nll(logits[:, 1:], ids[:, 1:]).mean()), "you cut both at the same end, so "
         "nothing is shifted: the logits at t should meet the token at t + 1."),
        (lambda logits, ids: nll(logits[:-1], ids[1:]).mean(), "you cut the rows of the batch, and not the "
         "places: logits[:, :-1] and ids[:, 1:]."),
        (lambda logits, ids: nll(logits, ids.flatten().roll(-1).view_as(ids)).mean(),
         "you shift after flatten, so the end of a row is asked for the beginning of the next one. Cut "
         "first: logits[:, :-1], ids[:, 1:]."),
        (lambda logits, ids: nll(logits, ids.roll(-1, 0)).mean(), "you shift the rows of the batch; time is "
         "dimension 1."),
        (lambda logits, ids: nll(logits[:, :-1], ids.roll(1, 1)[:, :-1]).mean(),
         "you cut the right place off, but roll(1) still goes the wrong way: which token does your loss ask "
         "for at each place?"),
        (lambda logits, ids: right(logits, ids) * ids[:, 1:].numel(), "that is the sum; take the mean over "
         "tokens."),
        (lambda logits, ids: nll(logits[:, :-1], ids[:, 1:]).sum() / ids.numel(), "you divide by B·T, but "
         "only T − 1 tokens of each row are predicted."),
        (lambda logits, ids: right(logits.softmax(-1), ids), "you take a softmax before cross_entropy, which "
         "takes its own. It wants the raw logits."),
        (lambda logits, ids: -logits[:, :-1].gather(-1, ids[:, 1:, None]).mean(), "these are raw logits; a "
         "log_softmax over the vocabulary makes log-probabilities of them."),
    ], grad=1)
    return "value and gradient are right on 3 random tables"


@check
def check_bits_per_byte(fn, g):
    """fn(nats_per_token, tokens, text_bytes) -> float."""
    def right(nats_per_token, tokens, text_bytes):
        return nats_per_token * tokens / (math.log(2) * text_bytes)

    inputs = []
    for _ in range(10):
        tokens = whole(g, 10, 1000)
        inputs.append((uniform(g, 0.5, 5.0), tokens, int(tokens * uniform(g, 2.0, 5.0))))
    compare(fn, right, inputs, [
        (lambda n, t, b: n * t / b, "these are nats per byte; a bit is ln 2 = 0.693 nats."),
        (lambda n, t, b: n * t / (math.log(2)**2 * b), "you divide by ln 2 twice."),
        (lambda n, t, b: n * t * math.log(2) / b, "you multiply by ln 2; n nats are n / ln 2 bits, a larger "
         "number."),
        (lambda n, t, b: n / math.log(2), "these are bits per *token*. A token has several bytes: divide by "
         "them."),
        (lambda n, t, b: n / (math.log(2) * b), "the mean must become a sum first: times the number of "
         "tokens."),
        (lambda n, t, b: n * b / (math.log(2) * t), "you have bytes over tokens; it is tokens over bytes."),
        (lambda n, t, b: n * t / math.log(2) / (8 * b), "divide by the bytes, not by their bits: we want "
         "bits per byte (raw text has 8)."),
        (lambda n, t, b: math.log2(n) * t / b, "you take the logarithm once more: the nats are a logarithm "
         "already. n nats are n / ln 2 bits."),
        (lambda n, t, b: n * t / math.log(2), "these are the bits of the whole text; divide by its bytes."),
    ])
    return "right on 10 random texts"


# ---- 02: the Transformer -------------------------------------------------------------------------

@check
def check_rms_norm(fn, g):
    """fn(x (..., C), weight (C,), eps) -> (..., C)."""
    def right(x, weight, eps):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def by(divisor):
        return lambda x, weight, eps: x / divisor(x, eps) * weight

    square = lambda x: x.square().mean(-1, keepdim=True)
    # ε is large here, so that its place makes a difference.
    inputs = [(normal(g, *shape) + 0.5, normal(g, shape[-1]), 0.3)
              for shape in ((2, 4), (2, 3, 8), (2, 2, 3, 6))]
    compare(fn, right, inputs, [
        (lambda x, weight, eps: F.layer_norm(x, x.shape[-1:], weight, None, eps), "that is LayerNorm: "
         "RMSNorm does not subtract the mean."),
        (lambda x, weight, eps: (x - x.mean(-1, keepdim=True)) * torch.rsqrt(square(x) + eps) * weight,
         "you subtract the mean; RMSNorm only scales."),
        (by(lambda x, eps: (x.square().mean() + eps).sqrt()), "you take the mean over the whole table. Each "
         "vector has its own: .mean(-1, keepdim=True)."),
        ((by(lambda x, eps: (x.square().sum(-1, keepdim=True) + eps).sqrt()),
          *(by(lambda x, eps, n=n: x.norm(dim=-1, keepdim=True) + n * eps) for n in (0, 1))),
         "you divide by the root of the sum of squares, the length; RMS is the root of their mean."),
        (by(lambda x, eps: square(x).sqrt() + eps), "ε stands outside the root; it belongs under it."),
        (by(lambda x, eps: square(x).sqrt()), "ε is missing: a vector of zeros would become NaN."),
        (tuple(by(divide) for n in (0, 1) for divide in (
            lambda x, eps, n=n: (x.var(-1, keepdim=True, correction=n) + eps).sqrt(),
            lambda x, eps, n=n: x.std(-1, keepdim=True, correction=n) + eps,
            lambda x, eps, n=n: x.std(-1, keepdim=True, correction=n))),
         "you divide by the standard deviation, which measures from the mean; the root mean square measures "
         "from 0: x.square().mean(-1, keepdim=True)."),
        (lambda x, weight, eps: x * (square(x) + eps).sqrt() * weight, "you multiply by the root mean "
         "square; divide by it, or multiply by rsqrt."),
        (by(lambda x, eps: (x.mean(-1, keepdim=True).square() + eps).sqrt()), "you square the mean; it is "
         "the mean of the squares."),
        (by(lambda x, eps: (x.square().mean(0) + eps).sqrt()), "your mean runs over the first dimension; "
         "each vector has its own: .mean(-1, keepdim=True)."),
        (by(lambda x, eps: (x.square().mean(1, keepdim=True) + eps).sqrt()), "right for a table of two dimensions only: your "
         "mean runs over dimension 1; it is the *last* one, -1."),
        (by(lambda x, eps: square(x) + eps), "the root is missing: you divide by the mean square."),
        (lambda x, weight, eps: right(x, 1.0, eps), "the gain, `weight`, is missing."),
        (lambda x, weight, eps: right(x, 1 + weight, eps), "you multiply by 1 + weight (as Gemma does); here "
         "it is weight itself."),
    ])
    return "right on tables of 2, 3 and 4 dimensions"


def _turn(x, angles, sign=1.0):
    """Turn the halves of x (B, T, H, D) by angles that broadcast to (T, H, D/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), sign * angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _angles(x, theta, start=0, power=2.0, dim=1):
    frequencies = theta ** (-power * torch.arange(x.size(-1) // 2) / x.size(-1))
    angles = torch.arange(start, start + x.size(dim))[:, None] * frequencies
    return angles[:, None] if dim == 1 else angles


@check
def check_rope(fn, g):
    """fn(x (B, T, H, D), theta) -> the same shape; half-split layout, positions 0 … T − 1."""
    def right(x, theta):
        config = GPTConfig(vocab_size=1, context_length=x.size(1), head_dim=x.size(-1), rope_theta=theta)
        cos, sin = rope_tables(config)
        return rotate(x, cos[:, None], sin[:, None])

    def interleaved(x, theta):
        order = torch.cat([torch.arange(0, x.size(-1), 2), torch.arange(1, x.size(-1), 2)])
        return _turn(x[..., order], _angles(x, theta))[..., order.argsort()]

    def unjoined(x, theta):
        return torch.cat([_turn(x, _angles(x, theta)).chunk(2, -1)[0], x.chunk(2, -1)[1]], -1)

    def overwritten(x, theta):
        angles, (first, second) = _angles(x, theta), x.chunk(2, dim=-1)
        first = first * angles.cos() - second * angles.sin()
        return torch.cat([first, second * angles.cos() + first * angles.sin()], -1)

    inputs = [(normal(g, B, T, H, D), theta) for B, T, H, D, theta in
              ((1, 3, 1, 4, 100.0), (2, 5, 3, 8, 10000.0), (2, 4, 4, 6, 500.0))]
    compare(fn, right, inputs, [
        (interleaved, "you turn neighbours (x0, x1), (x2, x3), …, the interleaved layout of the RoPE paper. "
         "Ours, as in Hugging Face's files of Llama, pairs x[i] with x[i + D/2]: x.chunk(2, dim=-1)."),
        (lambda x, theta: _turn(x, _angles(x, theta), -1.0), "you turn the other way round: it is x1 cos − "
         "x2 sin and x2 cos + x1 sin."),
        (lambda x, theta: _turn(x, _angles(x, theta, start=1)), "your positions begin at 1; at position 0 "
         "nothing turns."),
        (lambda x, theta: _turn(x, _angles(x, theta, dim=2)), "you number the heads. The position is "
         "dimension 1 of (B, T, H, D)."),
        (lambda x, theta: _turn(x, _angles(x, theta, power=1.0)), "your exponent is −i/D for i = 0 … D/2 − "
         "1; it is −2i/D."),
        (lambda x, theta: _turn(x, _angles(x, theta, power=4.0)), "your exponent is −4i/D: is the 2 in it "
         "twice, in arange(0, D, 2) and as a factor?"),
        (lambda x, theta: _turn(x, _angles(x, theta, power=-2.0)), "your frequencies grow with i; the "
         "exponent is negative, theta^(−2i/D)."),
        (lambda x, theta: _turn(x, _angles(x, theta)[:, 0]), "your angles are (T, D/2), so they meet the "
         "heads and not the positions. Give them a dimension for the heads: (T, 1, D/2), with [:, None]."),
        (lambda x, theta: torch.stack(_turn(x, _angles(x, theta)).chunk(2, -1), -1).flatten(-2),
         "turned rightly, but joined as neighbours: put the halves one behind the other, torch.cat([first, "
         "second], dim=-1)."),
        (lambda x, theta: _turn(torch.cat([x[..., 0::2], x[..., 1::2]], -1), _angles(x, theta)),
         "you split x into every second number, 0::2 and 1::2; the halves are x.chunk(2, dim=-1)."),
        (overwritten, "your second line uses the first half after it was turned: give the result another "
         "name."),
        (lambda x, theta: right(x, 10000.0), "theta is an argument; you have 10000 in its place."),
        (unjoined, "the second half is not turned: x2 cos + x1 sin."),
    ], general="none of the mistakes that we know. Two things to test: position 0 must stay as it is, and no "
               "vector may change its length.")
    return "half-split layout, positions from 0, on 3 random tables"


def _scores(q, k):
    return q @ k.mT / math.sqrt(q.size(-1))


def _future(q):
    return torch.ones(q.size(-2), q.size(-2), dtype=torch.bool).triu(1)


@check
def check_causal_attention(fn, g):
    """fn(q, k, v), each (B, H, T, D) -> (B, H, T, D): a place attends to itself and to those before it."""
    def right(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def masked(scores, q, diagonal=1, fill=-math.inf):
        return scores.masked_fill(torch.ones(q.size(-2), q.size(-2), dtype=torch.bool).triu(diagonal), fill)

    inputs = [tuple(normal(g, 3, *shape))
              for shape in ((1, 1, 3, 2), (2, 3, 6, 4), (2, 2, 1, 4), (1, 2, 5, 8))]
    compare(fn, right, inputs, [
        (lambda q, k, v: _scores(q, k).softmax(-1) @ v, "your values are those of a softmax without the "
         "causal mask."),
        (lambda q, k, v: _scores(q, k).softmax(-1).masked_fill(_future(q), 0) @ v, "the weights of a row do "
         "not sum to 1: the future took its share in the softmax before you removed it. Something must "
         "happen earlier."),
        (lambda q, k, v: masked(_scores(q, k), q, fill=0.0).softmax(-1) @ v, "you set masked scores to 0, but "
         "exp(0) = 1 is not nothing. A score of −inf has weight 0."),
        (lambda q, k, v: masked(_scores(q, k), q, diagonal=0).softmax(-1) @ v, "in your version a place "
         "cannot see itself, so the first one sees nothing at all, and 0/0 is NaN. Mask from the diagonal above "
         "the main one."),
        (lambda q, k, v: masked(_scores(q, k).mT, q).mT.softmax(-1) @ v, "each place sees the future and not "
         "the past: the mask is upside down (rows are queries, columns are keys)."),
        (lambda q, k, v: (_scores(q, k) + _future(q) * -math.inf).softmax(-1) @ v,
         "0 · −inf is NaN, so all places become NaN. Use scores.masked_fill(future, −math.inf)."),
        (lambda q, k, v: _scores(q, k).masked_fill(~_future(q), -math.inf).softmax(-1) @ v,
         "your mask is the wrong way round: you cut off the past and the place itself, and the last place "
         "sees nothing at all (NaN). masked_fill fills where the mask is True."),
        (lambda q, k, v: masked(_scores(q, k), q, diagonal=2).softmax(-1) @ v, "each place still sees the "
         "next one: the mask begins one diagonal too high; triu(1)."),
        (lambda q, k, v: (_scores(q, k) + (~_future(q)).float()).softmax(-1) @ v,
         "you add 1 to the allowed scores and 0 to the others; add 0 and −inf, or use masked_fill."),
        (lambda q, k, v: _scores(q, k).softmax(-1).masked_fill(_future(q), -math.inf) @ v,
         "−inf belongs in the scores, before the softmax."),
        (lambda q, k, v: masked(q @ k.mT, q).softmax(-1) @ v, "the scores are not divided by √D."),
        (lambda q, k, v: masked(q @ k.mT / q.size(-1), q).softmax(-1) @ v, "you divide by D; it is √D."),
        (lambda q, k, v: masked(_scores(q, k), q).softmax(-2) @ v, "your softmax runs over the queries; it "
         "runs over the keys, the last dimension."),
    ], general="none of the mistakes that we know. Look whether a change of the last token changes the first "
               "output, and whether the weights of every row sum to 1.")
    return "as PyTorch's own on 4 random inputs"


@check
def check_grouped_attention(fn, g):
    """fn(q (B, H, T, D), k and v (B, K, T, D)) -> (B, H, T, D): neighbouring query heads share a key head."""
    def with_heads(keys, values=None):
        def attention(q, k, v):
            copies = q.size(1) // k.size(1)
            k, v = keys(k, copies), (values or keys)(v, copies)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attention

    def right(q, k, v):
        return with_heads(neighbours)(q, k, v)

    def neighbours(heads, copies):
        return heads.repeat_interleave(copies, dim=1)

    def rounds(heads, copies):
        return heads.repeat(1, copies, 1, 1)

    def first(heads, copies):
        return heads[:, :1].expand(-1, copies * heads.size(1), -1, -1)

    inputs = [(normal(g, B, H, T, D), normal(g, B, K, T, D), normal(g, B, K, T, D)) for B, H, K, T, D in
              ((1, 4, 2, 2, 2), (2, 6, 3, 6, 4), (2, 4, 1, 5, 4), (1, 2, 2, 4, 8))]
    compare(fn, right, inputs, [
        (with_heads(rounds), "your key heads are read as 0, 1, 0, 1; neighbours share one: 0, 0, 1, 1. Which of "
         "PyTorch's two functions that repeat puts the copies of a head side by side?"),
        (with_heads(neighbours, rounds), "the keys are in order, the values are not: they need the same copies."),
        (with_heads(rounds, neighbours), "the values are in order, the keys are not: they need the same copies."),
        (with_heads(first), "all query heads read key head 0; each group has its own."),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), "the heads are in order, but each "
         "place sees what comes after it: use your causal_attention."),
    ], general="none of the mistakes that we know. With 4 query heads and 2 key heads, which key head does query "
               "head 1 read?")
    return "as PyTorch's own with shared heads, on 4 random inputs"


@check
def check_swiglu(fn, g):
    """fn(x (..., C), gate (F, C), up (F, C), down (C, F)) -> (..., C)."""
    def gated(act):
        return lambda x, gate, up, down: (act(x @ gate.T) * (x @ up.T)) @ down.T

    def right(x, gate, up, down):
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    inputs = [(normal(g, *shape, C), normal(g, W, C), normal(g, W, C), normal(g, C, W))
              for shape, C, W in (((1,), 2, 3), ((2, 3), 4, 6), ((5,), 3, 8))]
    compare(fn, right, inputs, [
        (lambda x, gate, up, down: right(x, up, gate, down), "the two sides play each other's part. A new "
         "model would learn either way, but weights trained elsewhere make no sense that way."),
        (lambda x, gate, up, down: F.silu((x @ gate.T) * (x @ up.T)) @ down.T, "you take the SiLU of the "
         "product; it is of the gate alone."),
        (gated(lambda h: h), "the SiLU is missing."),
        (lambda x, gate, up, down: (F.silu(x @ gate.T) * F.silu(x @ up.T)) @ down.T,
         "the SiLU is of the gate alone, not of `up`."),
        (gated(torch.sigmoid), "that is the GLU with a sigmoid; SiLU is h · sigmoid(h)."),
        ((gated(F.gelu), gated(lambda h: F.gelu(h, approximate="tanh"))), "that is GELU (GEGLU); SwiGLU "
         "takes SiLU."),
        (gated(F.relu), "that is ReLU (ReGLU); SwiGLU takes SiLU."),
        (lambda x, gate, up, down: (F.silu(x @ gate.T) + x @ up.T) @ down.T, "the two sides are multiplied, "
         "not added."),
        (lambda x, gate, up, down: F.silu(x @ gate.T) @ down.T, "the side `up` is missing."),
    ])
    return "right on 3 random inputs"


@check
def check_parameter_count(fn, g):
    """fn(config: GPTConfig) -> int, for tied or untied heads and any kv_heads (qk_norm False)."""
    def right(config):
        with torch.random.fork_rng(devices=[]):  # GPT draws its weights
            return sum(p.numel() for p in GPT(config).parameters())

    def attention(c, kv=None, D=None):
        return (2 * c.heads + 2 * (kv or c.kv_heads)) * (D or c.head_dim) * c.width

    inputs = []
    for tied in (True, False, True, False):
        kv, group = whole(g, 1, 3), 3 if tied else 2
        inputs.append((GPTConfig(whole(g, 20, 90), layers=whole(g, 2, 4), heads=group * kv, kv_heads=kv,
                                 width=24 * kv, head_dim=None if tied else 10, ffn_width=whole(g, 30, 60),
                                 tied=tied),))
    per_layer = lambda change: lambda c: right(c) + c.layers * change(c)
    compare(fn, right, inputs, [
        (lambda c: right(c) + c.tied * c.vocab_size * c.width, "you count the output head of a tied model; "
         "it is the embedding matrix once more, and counted with it."),
        (lambda c: right(c) - (not c.tied) * c.vocab_size * c.width, "an untied model has an output head, "
         "V·C more."),
        (per_layer(lambda c: attention(c, c.heads) - attention(c)), "with grouped queries k and v have only "
         "kv_heads heads each; you count `heads` of them."),
        (per_layer(lambda c: 4 * c.width**2 - attention(c)), "4 C² holds only where kv_heads = heads and "
         "heads · head_dim = C; count q, k, v and the output each by itself."),
        (per_layer(lambda c: attention(c, D=c.width // c.heads) - attention(c)), "head_dim need not be width "
         "/ heads: take config.head_dim."),
        (lambda c: right(c) + (1 if c.tied else -1) * c.vocab_size * c.width, "tied the wrong way round: a "
         "tied head *is* the embedding matrix; only an untied one counts."),
        (per_layer(lambda c: -c.width), "each block has two norms, with a gain of C numbers each; you count "
         "one."),
        (per_layer(lambda c: c.width * (c.width - c.heads * c.head_dim)), "the output of attention is C × "
         "H·D, and H·D need not be C."),
        (per_layer(lambda c: -c.kv_heads * c.head_dim * c.width), "keys *and* values: (H + 2K)·D × C."),
        (lambda c: right(replace(c, layers=1)), "you count one block; there are `layers` of them."),
        (per_layer(lambda c: -2 * c.width), "each block has two norms, with a gain of C numbers each."),
        (lambda c: right(c) - c.width, "the last norm, after all blocks, is missing: C numbers."),
        (lambda c: right(c) - c.width * (2 * c.layers + 1), "the norms are missing, two in each block and "
         "one at the end, with C numbers each."),
        (per_layer(lambda c: -c.width * c.ffn_width), "SwiGLU has three matrices: gate, up and down."),
        (lambda c: right(c) + c.context_length * c.width, "you count position embeddings. RoPE has no "
         "parameters."),
    ], tol=0)
    return "right for 4 shapes: tied and untied, grouped queries, any head width"


# ---- 03: pre-training ----------------------------------------------------------------------------

@check
def check_learning_rate(fn, g):
    """fn(step, steps, peak, warmup, decay) -> float, the rule of training.learning_rate."""
    right = training.learning_rate

    def rule(rising=None, falling=None, join=min):
        """Our rule with a part exchanged. Arguments of the parts: step, steps, warmup, decay."""
        rising = rising or (lambda i, n, w, d: (i + 1) / w)
        falling = falling or (lambda i, n, w, d: (n - i) / d)
        return lambda step, steps, peak, warmup, decay: peak * max(0.0, join(
            min(1.0, rising(step, steps, warmup, decay)), min(1.0, falling(step, steps, warmup, decay))))

    inputs = []
    for steps, warmup, decay in ((12, 4, 5), (whole(g, 30, 40), 6, 10), (20, 10, 16)):  # last: the two meet
        peak = uniform(g, 0.5, 2.0)
        inputs += [(step, steps, peak, warmup, decay) for step in range(steps)]
    cosine = lambda i, n, w, d: 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, 1 - (n - i) / d)))
    compare(fn, right, inputs, [
        (rule(rising=lambda i, n, w, d: i / w), "your first step has rate 0 and teaches nothing: step counts "
         "from 0, so the rise is (step + 1) / warmup."),
        (rule(falling=lambda i, n, w, d: (n - 1 - i) / d), "your last step has rate 0 and teaches nothing: "
         "the step *after* the last has 0, so the fall is (steps − step) / decay."),
        (rule(falling=lambda i, n, w, d: (n - i) / (n - w)), "your fall begins right after the warm-up; it "
         "takes the last `decay` steps, and before it the rate is flat."),
        (rule(falling=lambda i, n, w, d: 1 - (i - w) / d), "your fall begins when the warm-up is over, and "
         "has ended after `decay` steps. What should the rate do between the two?"),
        (rule(falling=lambda i, n, w, d: (n - i) / n), "your fall takes the whole run; it takes the last "
         "`decay` steps, so divide by `decay`."),
        (rule(falling=lambda i, n, w, d: 1 - (n - i) / d), "upside down: your rate rises in the last `decay` "
         "steps. What is left of the run, over `decay`, is the share itself."),
        (rule(falling=lambda i, n, w, d: 1.0), "there is no decay at the end."),
        (rule(rising=lambda i, n, w, d: 1.0), "there is no warm-up at the beginning."),
        (lambda i, n, peak, w, d: peak * ((i + 1) / w if i < w else min(1.0, (n - i) / d)), "where warm-up and decay overlap "
         "(a short run) the smaller of the two counts."),
        (rule(falling=lambda i, n, w, d: (n - i + 1) / d), "your fall comes one step late: (steps − step) / decay."),
        (rule(join=lambda a, b: a * b), "you multiply rise and fall; the smaller of the two counts."),
        (rule(falling=cosine), "your fall is a cosine; here it is a straight line."),
        (lambda step, steps, peak, warmup, decay: right(step, steps, 1.0, warmup, decay),
         "that is the share of the peak; multiply by `peak`."),
        (lambda step, steps, peak, warmup, decay: peak * min((step + 1) / warmup, (steps - step) / decay),
         "the rate may not pass the peak: the smallest of 1, rise and fall."),
    ])
    without = [(step, 12, 1.5, *w_d) for w_d in ((0, 5), (4, 0), (0, 0)) for step in (0, 5, 11)]
    compare(fn, right, without, general="with warmup = 0 there is no warm-up, with decay = 0 no decay: the rate is then "
            "not below the peak for their sake.")
    return f"right at {len(inputs) + len(without)} steps, of schedules without warm-up or decay too"


@check
def check_windows(fn, g):
    """fn(tokens (N,), starts (B,), length) -> inputs (B, T), targets (B, T), T = length."""
    def cut(tokens, starts, length, first=0):
        return tokens[starts[:, None] + torch.arange(first, first + length)].long()

    def right(tokens, starts, length):
        return cut(tokens, starts, length), cut(tokens, starts, length, 1)

    inputs = []
    for B, T in ((2, 3), (3, 5), (4, 2)):
        tokens = torch.randperm(60, generator=g).int()  # all different, so that no two places look alike
        starts = whole(g, 1, 8, B)
        starts[0] = len(tokens) - T - 1 if B > 2 else starts[0]  # the last window that fits
        inputs.append((tokens, starts, T))
    compare(fn, right, inputs, [
        (lambda tokens, starts, length: (cut(tokens, starts, length),) * 2, "the targets are the inputs; "
         "they are one token later. Here the model would only have to copy."),
        (lambda tokens, starts, length: (cut(tokens, starts, length), cut(tokens, starts, length, -1)),
         "the targets are one token *earlier*: the model has read them already."),
        (lambda tokens, starts, length: (cut(tokens, starts, length), cut(tokens, starts, length, 2)),
         "the targets are two tokens later; one is right."),
        ((lambda tokens, starts, length: (cut(tokens, starts, length), cut(tokens, starts, length, length)),
          lambda tokens, starts, length: (cut(tokens, starts, length), torch.stack(
              [tokens[s + length:s + 2 * length] for s in starts]))),
         "the targets are the window after; they should be the same window, one token later."),
        (lambda tokens, starts, length: right(torch.arange(len(tokens)), starts, length),
         "these are places in the text; look up the tokens that stand there, tokens[places]."),
        (lambda tokens, starts, length: right(tokens, starts, length - 1), "the windows are one token too "
         "short: take length + 1 tokens, then inputs are all but the last and targets all but the first."),
        (lambda *args: (cut(*args), cut(*args).roll(-1, 1)),
         "the last target of a row is its first token: roll goes round. It is the token after the window."),
    ], tol=0)
    return "right on 3 random texts, the last window that fits among them"


@check
def check_adamw_step(fn, g):
    """fn(p, g, m, v, step, lr, betas, eps, weight_decay) -> (p, m, v) after the step; step counts from 1."""
    def adamw(corrected=lambda m, v, t, b: (m / (1 - b[0]**t), v / (1 - b[1]**t)), inside=False, l2=False,
              decay=lambda lr, wd: lr * wd, square=True, after=False, sign=1.0):
        def step_(p, g, m, v, step, lr, betas, eps, weight_decay):
            if l2:
                g = g + weight_decay * p
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * (g * g if square else g.abs())
            mh, vh = corrected(m, v, step, betas)
            move = lr * mh / ((vh + eps).sqrt() if inside else vh.sqrt() + eps)
            keep = 1.0 if l2 else 1 - decay(lr, weight_decay)
            return (keep * (p - move) if after else keep * p - sign * move), m, v
        return step_

    right = adamw()

    def divided(p, g, m, v, step, lr, betas, eps, weight_decay):
        new, m, v = right(p, g, m, v, step, lr, betas, eps, 0.0)
        return new - lr * weight_decay * p / ((v / (1 - betas[1]**step)).sqrt() + eps), m, v

    def hatted(p, g, m, v, step, lr, betas, eps, weight_decay):
        new, m, v = right(p, g, m, v, step, lr, betas, eps, weight_decay)
        return new, m / (1 - betas[0]**step), v / (1 - betas[1]**step)

    inputs = []
    for step in (1, 2, 3, 7):  # before step 1 the moments are 0
        m, v = (normal(g, 4), normal(g, 4).square()) if step > 1 else (torch.zeros(4), torch.zeros(4))
        inputs.append((normal(g, 4), normal(g, 4), m, v, step, uniform(g, 0.1, 0.3), (0.8, 0.9), 0.2, 0.4))
    shift = lambda by: lambda m, v, t, b: (m / (1 - b[0]**(t + by)), v / (1 - b[1]**(t + by)))
    compare(fn, right, inputs, [
        (adamw(lambda m, v, t, b: (m, v)), "the bias correction is missing: m and v begin at 0, so divide "
         "them by 1 − β^step before use."),
        (adamw(lambda m, v, t, b: (m / (1 - b[0]**t), v)), "v is not corrected: divide it by 1 − β2^step "
         "before use."),
        (adamw(lambda m, v, t, b: (m, v / (1 - b[1]**t))), "m is not corrected: divide it by 1 − β1^step "
         "before use."),
        (adamw(shift(1)), "you correct with step + 1; here steps count from 1 already."),
        (adamw(l2=True), "the decay passes through m and v, and √v divides it like a gradient: that is Adam "
         "with L2. What does AdamW do with p and weight_decay instead?"),
        (lambda p, g, *rest: right(p, g + rest[-1] * p, *rest), "the decay comes twice: beside the step, and "
         "still through the gradient. One line of the old version is left."),
        (divided, "√v divides your decay too; it should shrink p directly, beside the step of Adam."),
        (lambda *args: right(*args[:-1], -args[-1]), "the sign of the decay: your weights grow. p is "
         "multiplied by 1 − lr · weight_decay."),
        (adamw(decay=lambda lr, wd: wd), "you decay by weight_decay; it is lr · weight_decay."),
        (adamw(decay=lambda lr, wd: 0.0), "the weight decay is missing."),
        (adamw(after=True), "you shrink p after the step, which shrinks the step as well; shrink the old p."),
        (adamw(inside=True), "ε stands under the root; it is added to the root."),
        (lambda p, g, m, v, step, lr, betas, *rest: right(p, g, m, v, step, lr, betas[::-1], *rest),
         "the two betas are exchanged."),
        (hatted, "you return the corrected m and v. Return them raw: the next step corrects them anew."),
    ])
    return "right at steps 1, 2, 3 and 7, as torch.optim.AdamW"


@check
def check_power_law(fn, g):
    """fn(x, y) NumPy arrays -> (a, b) of y ≈ a x^−b, by least squares in the logarithms."""
    def right(x, y):
        slope, height = np.polyfit(np.log(x), np.log(y), 1)
        return math.exp(height), -slope

    def ends(x, y):
        b = -math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])
        return y[0] * x[0]**b, b

    def inverse(x, y):
        slope, height = np.polyfit(np.log(y), np.log(x), 1)
        return math.exp(-height / slope), -1 / slope

    inputs = []
    for _ in range(5):
        x = 2.0 ** np.arange(1, 8)
        noise = 0.2 * normal(g, 7).double().numpy()
        inputs.append((x, uniform(g, 2, 9) * x ** -uniform(g, 0.2, 0.6) * np.exp(noise)))
    compare(fn, right, inputs, [
        (lambda x, y: (right(x, y)[0], -right(x, y)[1]), "the sign of b: in y ≈ a x^−b a falling curve has b "
         "> 0, minus the slope."),
        (lambda x, y: (math.log(right(x, y)[0]), right(x, y)[1]), "your a is still a logarithm: take exp of "
         "the intercept."),
        (lambda x, y: (math.log(right(x, y)[0]), -right(x, y)[1]), "that is the line itself, log y = "
         "intercept + slope · log x; a is exp(intercept), b is −slope."),
        ((lambda x, y: (math.exp(-right(x, y)[1]), -math.log(right(x, y)[0])),
          lambda x, y: (-right(x, y)[1], math.log(right(x, y)[0]))),
         "np.polyfit returns the slope first, then the intercept: a is exp(intercept), b is −slope."),
        (lambda x, y: (10**math.log(right(x, y)[0]), right(x, y)[1]), "you take the natural logarithm but "
         "10**; exp undoes it."),
        (lambda x, y: (math.exp(math.log10(right(x, y)[0])), right(x, y)[1]), "you take log10 but exp; 10** "
         "undoes log10."),
        (lambda x, y: (np.polyfit(x, y, 1)[1], -np.polyfit(x, y, 1)[0]), "you fit a straight line to x and y "
         "themselves; fit it to log x and log y."),
        (lambda x, y: (math.exp(np.polyfit(x, np.log(y), 1)[1]), -np.polyfit(x, np.log(y), 1)[0]),
         "you take no logarithm of x: that is an exponential, not a power law."),
        (ends, "you use the two ends only; all points count, by least squares."),
        (inverse, "you fit log x as a function of log y; the noise is in y."),
    ], tol=1e-3)
    return "right on 5 noisy curves"


@check
def check_training_flops(fn, g):
    """fn(parameters, tokens) -> floating-point operations of a training run, 6 N D."""
    def right(parameters, tokens):
        return 6 * parameters * tokens

    inputs = [(whole(g, 10**3, 10**6), whole(g, 10**4, 10**7)) for _ in range(5)]
    times = lambda k: lambda parameters, tokens: k * parameters * tokens
    compare(fn, right, inputs, [
        (times(2), "that is the forward pass, a multiplication and an addition per parameter and token. The "
         "backward pass costs twice as much again."),
        (times(4), "that is the backward pass alone (or both passes, if they cost the same)."),
        (times(3), "a multiplication and an addition are two operations: 2 · 3 = 6."),
        (times(1), "per parameter and token there are 6 operations: 2 forward, 4 backward."),
        (lambda parameters, tokens: 6 * parameters, "that is for one token; times the tokens."),
    ])
    return "6 N D"


# ---- 04: prompting and inference -----------------------------------------------------------------

def _apart_logits(g, V):
    """Random logits (V,), no two closer than 0.05, in a random order: no ties, no rounding at a border."""
    steps = 0.05 + 0.8 * torch.rand(V, generator=g)
    return steps.cumsum(0)[torch.randperm(V, generator=g)] - 1.0


@check
def check_temperature(fn, g):
    """fn(logits (V,), temperature) -> probabilities (V,); at temperature 0 all is on the largest."""
    def right(logits, temperature):
        if temperature == 0:
            return F.one_hot(logits.argmax(), len(logits)).float()
        return (logits / temperature).softmax(-1)

    inputs = [(_apart_logits(g, 5), t) for t in (2.0, 0.5, 0, 1.0, 3.0)] + [(_apart_logits(g, 9), 0.0)]
    nought = lambda otherwise: lambda x, t: right(x, 0) if t == 0 else otherwise(x, t)
    two = lambda otherwise: (otherwise, nought(otherwise))
    compare(fn, right, inputs, [
        (lambda x, t: (x / t if t else x * math.inf).softmax(-1), "temperature 0 divides by 0. It has its "
         "own answer, 1 on the largest logit and 0 elsewhere: handle it first."),
        (lambda x, t: (x / max(t, 1e-8)).softmax(-1) if t else x.softmax(-1), "at temperature 0 you do the "
         "same as at 1; all probability must be on the largest logit."),
        (two(lambda x, t: (x * t).softmax(-1)), "you multiply the logits by the temperature; divide. A high "
         "temperature makes the distribution flatter."),
        (two(lambda x, t: x.softmax(-1)), "the temperature does nothing."),
        (two(lambda x, t: x.softmax(-1) / t), "you divide probabilities, which then do not sum to 1; divide "
         "the logits."),
        (two(lambda x, t: x.softmax(-1)**(1 / t)), "these do not sum to 1: divide by the sum at the end."),
        (two(lambda x, t: (x / t).log_softmax(-1)), "these are log-probabilities; return probabilities."),
        (two(lambda x, t: x / t), "these are logits; a softmax makes probabilities of them."),
        (lambda x, t: right(x, 0), "you always take the likeliest token; that is temperature 0 only."),
        (lambda x, t: (x / t).softmax(-1) if t else x.argmax(), "at temperature 0 you return the token; "
         "return a distribution (V,), with 1 on that token."),
    ])
    return "right at 5 temperatures, 0 among them"


@check
def check_top_k(fn, g):
    """fn(logits (V,), k) -> probabilities (V,): the k likeliest, scaled up to sum to 1; k may be above V."""
    def right(logits, k):
        return truncate(logits[None], k, None).softmax(-1)[0]

    kept = lambda x, k: torch.isfinite(truncate(x[None], k, None)[0])
    inputs = [(_apart_logits(g, V), k) for V, k in ((5, 2), (7, 3), (6, 1), (6, 6), (4, 9), (9, 4))]
    compare(fn, right, inputs, [
        (lambda x, k: x.softmax(-1) * kept(x, k), "these do not sum to 1: the mass cut off must be shared "
         "out. Set the cut logits to −inf before the softmax, or divide by the sum."),
        (lambda x, k: (x * kept(x, k)).softmax(-1), "you set a cut logit to 0, but exp(0) = 1 is not "
         "nothing; set it to −inf."),
        ((lambda x, k: right(x, k + 1), lambda x, k: right(x, k + 1) if k < len(x) else x[k]),
         "you keep k + 1 tokens: look at < and <=, and remember that the k-th of a sorted list is [k − 1]."),
        (lambda x, k: right(x, min(k, len(x)) - 1), "you keep k − 1 tokens: look at < and <=."),
        (lambda x, k: right(-x, k) * 0 + (x.masked_fill(~kept(-x, k), -math.inf)).softmax(-1),
         "you keep the k smallest; sort(descending=True)."),
        (lambda x, k: right(x, k).sort(descending=True).values, "the result is sorted; give it in the order "
         "of the vocabulary."),
        (lambda x, k: x.topk(min(k, len(x))).values.softmax(-1), "only the kept ones are there, sorted; put "
         "them back in their places, 0 elsewhere."),
        (lambda x, k: right(x, k) if k <= len(x) else x.topk(k), "k may be larger than V: then all are kept, "
         "min(k, V)."),
        (lambda x, k: x.softmax(-1), "nothing is cut off."),
    ])
    return "right on 6 random distributions, k above V among them"


@check
def check_top_p(fn, g):
    """fn(logits (V,), p) -> probabilities (V,); the token that crosses p is kept."""
    def right(logits, p):
        return truncate(logits[None], None, p).softmax(-1)[0]

    def keeping(keep, renormalise=True, descending=True):
        """keep(sorted probabilities, their sums up to and with each, p) -> which stay."""
        def cut(logits, p):
            probs, order = logits.softmax(-1).sort(descending=descending)
            probs = probs * keep(probs, probs.cumsum(-1), p)
            return torch.zeros_like(probs).scatter(0, order, probs / probs.sum() if renormalise else probs)
        return cut

    # Probabilities 0.5, 0.3, 0.15, 0.05 in some order, so that the example can be followed by hand.
    example = torch.tensor([0.5, 0.3, 0.15, 0.05])[torch.randperm(4, generator=g)].log()
    inputs = [(example, 0.6), (example, 0.3)]
    inputs += [(_apart_logits(g, 8) * 0.6, p) for p in (0.9, 0.7, 0.5, 0.2, 0.95)]
    dropped = ("the token that crosses p is cut off with you; it stays, so that those kept hold at least p. "
               "Compare p with the mass *before* each token (the sum less the token itself).")
    first = lambda s: torch.arange(len(s)) == 0
    kept = lambda x, p: right(x, p) > 0
    in_order = lambda x, p: right(x, p).sort(descending=True).values
    compare(fn, right, inputs, [
        (keeping(lambda q, s, p: s <= p), dropped + " As it is, nothing stays if the first token has more than p."),
        (keeping(lambda q, s, p: (s <= p) | first(s)), dropped),
        (keeping(lambda q, s, p: s - q < p, renormalise=False), "these do not sum to 1: divide by their "
         "sum."),
        (keeping(lambda q, s, p: s <= p, renormalise=False), dropped + " And the kept ones must sum to 1."),
        (keeping(lambda q, s, p: (s - q - q.roll(1) * (s > q) < p)), "one token too many stays: keep none "
         "after the one that crosses p."),
        (keeping(lambda q, s, p: q >= p), "p is the mass of all kept tokens together, not the least "
         "probability of one (that is another rule, like min-p)."),
        (keeping(lambda q, s, p: s - q < p, descending=False), "you begin with the unlikeliest tokens; sort "
         "descending."),
        ((lambda x, p: (x * kept(x, p)).softmax(-1), lambda x, p: (x.softmax(-1) * kept(x, p)).softmax(-1)),
         "what you cut off is 0 before the softmax, and exp(0) = 1 is not nothing. Set probabilities to 0 "
         "and divide by their sum, or logits to −inf."),
        (lambda x, p: in_order(x, p)[x.argsort(descending=True)], "sorted_ones[order] mixes them once more; "
         "to undo the sorting, result[order] = sorted_ones."),
        (lambda x, p: x.masked_fill(~(lambda q: q.cumsum(-1) - q < p)(x.softmax(-1).sort(descending=True).values),
                                    -math.inf).softmax(-1), "your mask is in sorted order, and you lay it on logits that are not: "
         "mask[order] = sorted_mask first."),
        (lambda x, p: x.masked_fill(~(lambda q: q.cumsum(-1) - q < p)(x.softmax(-1)), -math.inf).softmax(-1),
         "you add up in the order of the vocabulary: sort first, likeliest first."),
        (in_order, "the result is still sorted; undo the sorting: result[order] = sorted ones."),
        (lambda x, p: x.softmax(-1), "nothing is cut off."),
    ])
    compare(fn, right, [(normal(g, 8), 1.0) for _ in range(20)], general="p = 1 cuts nothing off. (By rounding the sum "
            "of all may stay just below 1.)")
    return "right on 7 distributions, the crossing token kept"


def _unequal_rows(g):
    """[(rows of ids, pad id)]: the pad id also stands in a row, at its beginning, inside and at its end."""
    inputs = [([[5, 6, 7], [8]], 0)]
    for n in (3, 4, 5):
        pad = whole(g, 1, 3)
        lengths = (torch.randperm(7, generator=g)[:n] + 1).tolist()
        rows = [[whole(g, 1, 20) for _ in range(length)] for length in lengths]
        longest = max(rows, key=len)
        longest[0], longest[-1], longest[len(longest) // 2] = pad, pad, pad
        inputs.append((rows, pad))
    return inputs


@check
def check_left_padding(fn, g):
    """fn(prompts: id lists, pad_id) -> ids (B, T), mask (B, T), positions (B, T), any ≥ 0 at padding."""
    def table(prompts, fill, make):
        T = max(map(len, prompts))
        return torch.tensor([[fill] * (T - len(p)) + list(make(p)) for p in prompts])

    def right(prompts, pad_id, start=0):
        mask = table(prompts, 0, lambda p: [1] * len(p))
        positions = table(prompts, 0, lambda p: range(start, start + len(p)))
        return table(prompts, pad_id, lambda p: p), mask.float(), positions

    def with_mask(change):
        def other(prompts, pad_id):
            ids, mask, _ = right(prompts, pad_id)
            mask = change(ids, mask, pad_id)
            return ids, mask, (mask.cumsum(1) - 1).clamp(min=0).long()
        return other

    def everywhere(prompts, pad_id):
        ids, mask, _ = right(prompts, pad_id)
        return ids, mask, torch.arange(ids.size(1)).expand_as(ids)

    def on_the_right(prompts, pad_id):
        mask, positions = [[1] * len(p) for p in prompts], [list(range(len(p))) for p in prompts]
        return data.pad_right(prompts, pad_id), data.pad_right(mask, 0), data.pad_right(positions, 0)

    def judged(found):
        """Positions at padding mean nothing: set them to 0, so that any number from 0 up is accepted there."""
        ids, mask, positions = parts(found, 3)
        where, places = numbers(mask), numbers(positions)
        if places is not None and where is not None and where.shape == places.shape:
            if (places < 0).any():
                raise Wrong("there is a position below 0 at the padding. It means nothing there, but a "
                            "table is read with it, and −1 reads the last row or fails: .clamp(min=0).")
            whole_numbers(positions, torch.tensor(0))
            positions = places * (where != 0)
        return ids, mask, positions

    inputs = _unequal_rows(g)
    view = lambda function: wraps(function)(lambda prompts, pad_id: judged(function(prompts, pad_id)))
    compare(view(fn), right, inputs, [(tuple(map(view, either(wrong))), text) for wrong, text in (
        ((with_mask(lambda ids, mask, pad_id: (ids != pad_id).float()),
          with_mask(lambda ids, mask, pad_id: (ids != pad_id).cumsum(1).clamp(max=1).float())),
         "a real token is taken for padding: in this batch the pad id stands in prompts too, also at the "
         "beginning. What else tells the two apart?"),
        (on_the_right, "you pad on the right. The next token of every row must come in the last column, so "
         "pad on the left."),
        (everywhere, "your positions count the padding. The first real token has position 0."),
        (lambda prompts, pad_id: right(prompts, pad_id, start=1), "your positions begin at 1; the first real "
         "token has 0."),
        (with_mask(lambda ids, mask, pad_id: 1 - mask), "the mask is inverted: 1 is a real token, 0 is "
         "padding."),
        (with_mask(lambda ids, mask, pad_id: torch.ones_like(mask)), "the mask is 1 everywhere; it is 0 at "
         "padding."),
        (tuple(lambda prompts, pad_id, other=other: (right(prompts, other)[0], *right(prompts, pad_id)[1:])
               for other in (0, -1)), "you fill with another id; fill with pad_id."),
    )], tol=0)
    return "right on 4 batches, the pad id inside the prompts"


@check
def check_cached_attention(fn, g):
    """fn(q (B, H, 1, D), k_new, v_new, cache: dict or None) -> (y (B, H, 1, D), cache): one new token."""
    def right(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def in_steps(step):
        """Feed the tokens one by one and put the outputs together."""
        def all_steps(q, k, v):
            cache, found = None, []
            for t in range(q.size(2)):
                y, cache = parts(step(*(x[:, :, t:t + 1].clone() for x in (q, k, v)), cache), 2)
                if numbers(y) is None or numbers(y).shape != tuple(q[:, :, :1].shape):
                    raise Wrong(f"at token {t}, y is {show(y)}; expected the shape of q, "
                                f"{tuple(q[:, :, :1].shape)}, one output for the one new token.")
                found.append(torch.as_tensor(numbers(y)))
            return torch.cat(found, 2)
        return wraps(step)(all_steps)

    def seeing(which):
        """Token t attends to the tokens which(t), an index."""
        return lambda q, k, v: torch.cat([F.scaled_dot_product_attention(
            q[:, :, t:t + 1], k[:, :, which(t)], v[:, :, which(t)]) for t in range(q.size(2))], 2)

    def scaled(by):
        return lambda q, k, v: right(q * by(q) * math.sqrt(q.size(-1)), k, v)

    inputs = [tuple(normal(g, 3, *shape)) for shape in ((1, 1, 3, 2), (2, 2, 6, 4), (1, 3, 5, 6))]
    compare(in_steps(fn), right, inputs, [
        (seeing(lambda t: slice(0, 1)), "every token sees the first token only. Which keys may the newest "
         "one see?"),
        (seeing(lambda t: slice(t, t + 1)), "every token sees itself only: the cache does not enter the "
         "attention, a mask hides it, or it is made anew at each call."),
        (seeing(lambda t: slice(max(0, t - 1), t + 1)), "a token sees itself and the one before it: does the "
         "cache hold all tokens so far, or only the last?"),
        (seeing(lambda t: slice(0, max(1, t))), "a token does not see itself: put the new key and value into "
         "the cache first, then attend."),
        (seeing(lambda t: [0] if t == 0 else [0, t]), "a token sees itself and the first: is the grown cache "
         "returned, or the old one?"),
        (scaled(lambda q: 1.0), "the scores are not divided by √D."),
        (scaled(lambda q: 1 / q.size(-1)), "you divide by D; it is √D."),
    ])
    return "token by token as all at once, on 3 random inputs"


@check
def check_vote(fn, g):
    """fn(facts, None where an answer states nothing) -> the commonest, the first drawn of equals; None without votes."""
    def right(facts):
        counts = Counter(fact for fact in facts if fact is not None)
        return max(counts, key=counts.get, default=None)

    nothing = type("Nothing", (int,), {"__repr__": lambda self: "None"})(-10**6)
    kept = lambda facts: [fact for fact in facts if fact is not None]
    seen = lambda function: wraps(function)(lambda facts: nothing if (found := function(facts)) is None else found)  # None is compared, too
    inputs = [([None, 4, None, None],), ([5, 5, None, 5],), ([7, 2, 7, 2],), ([None, 3, 1, None, 1, None, None],), ([3, 8, 3, 8],), ([0, 0, 5],), ([1, 4, 1, 4],), ([None, None],)]
    inputs += [([None if fact > 6 else fact for fact in whole(g, 1, 9, n).tolist()] + [whole(g, 1, 6)],) for n in (5, 9, 14, 20)]
    compare(seen(fn), seen(right), inputs, [(tuple(map(seen, either(wrong))), text) for wrong, text in (
        (lambda facts: None, "it returns None each time. Is the line with `return` missing?"),
        (lambda facts: max(Counter(facts), key=Counter(facts).get), "None votes with you; an answer that states nothing has no vote."),
        (lambda facts: right(facts[::-1]), "of equally common facts take the one drawn first; you take the last."),
        ((lambda facts: min(kept(facts), key=lambda fact: (-facts.count(fact), fact), default=None),
          lambda facts: max(kept(facts), key=lambda fact: (facts.count(fact), fact), default=None),
          lambda facts: max(set(kept(facts)), key=facts.count, default=None)),
         "of equally common facts take the one drawn first, not the smallest or largest, nor the first of a set, which has no order."),
        (lambda facts: Counter(kept(facts)).most_common(1)[0] if kept(facts) else None, "you return the count too; return the "
         "fact alone."),
        (lambda facts: right([fact for fact in facts if fact]), "a fact that is 0 or \"\" loses its votes: ask `is not None`."),
        (lambda facts: next(iter(kept(facts)), None), "that is the first fact, not the commonest."),
        (lambda facts: facts.count(right(facts)) if kept(facts) else None, "that is the number of its votes; return the fact."),
        ((lambda facts: right(facts) if 2 * facts.count(right(facts)) > len(kept(facts)) else None,
          lambda facts: right(facts) if 2 * facts.count(right(facts)) > len(facts) else None),
         "it need not have more than half of the votes, only as many as any other."),
        (lambda facts: min(kept(facts), key=facts.count, default=None), "that is the rarest fact."),
        (lambda facts: right(facts) if kept(facts) else 0, "if no answer states anything, return None: max(…, default=None)."),
    )], tol=0)
    return "right on 12 lists, ties and silent answers among them"


# ---- 05: supervised fine-tuning ------------------------------------------------------------------

@cache
def _tokenizer():
    return train_bpe(["the cat sat on the mat, and the dog sat on the log.\n"] * 3, 290)


@check
def check_sft_mask(fn, g):
    """fn(tokenizer, messages) -> (ids, mask), as tokenizer.render_chat: 1 on what the assistant says."""
    right = render_chat

    def render(header=0, end=None, newline=0, roles=("assistant",), last_only=False, closing=True, line=True):
        """The template with parts of its mask exchanged; `end` None: as the content."""
        def other(tokenizer, messages):
            ids, mask = [], []
            for n, message in enumerate(messages):
                ours = message["role"] in roles and (not last_only or n == len(messages) - 1)
                head = [tokenizer.im_start_id, *tokenizer.encode(message["role"] + "\n")]
                for tokens, value in ((head, header * ours), (tokenizer.encode(message["content"]), ours),
                                      ([tokenizer.im_end_id] * closing, ours if end is None else end),
                                      (tokenizer.encode("\n") * line, newline * ours)):
                    ids += tokens
                    mask += [int(value)] * len(tokens)
            return ids, mask
        return other

    def shifted(by):
        def other(tokenizer, messages):
            ids, mask = render_chat(tokenizer, messages)
            return ids, (mask[by:] + [0] * by if by > 0 else [0] * -by + mask[:by])
        return other

    def from_the_first(tokenizer, messages):
        ids, _ = render_chat(tokenizer, messages)
        n = [message["role"] for message in messages].index("assistant")
        start = len(render_chat(tokenizer, messages[:n])[0])
        return ids, [0] * start + [1] * (len(ids) - start)

    def partly(but_last):
        """From the first answer's content on: to the end, to the end but for the last line break (True), or that answer alone (None)."""
        def other(tokenizer, messages):
            ids, _ = render_chat(tokenizer, messages)
            n = [message["role"] for message in messages].index("assistant")
            start = len(render_chat(tokenizer, messages[:n], generation_prompt=True)[0])
            end = len(render_chat(tokenizer, messages[:n + 1])[0]) - 1 if but_last is None else len(ids) - bool(but_last)
            return ids, [int(start <= i < end) for i in range(len(ids))]
        return other

    def written_out(tokenizer, messages):
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return tokenizer.encode(text)

    words = "the cat dog mat log sat on and".split()
    say = lambda role: {"role": role, "content": " ".join(words[i] for i in whole(g, 0, 7, 3).tolist())}
    inputs = [(_tokenizer(), [say({"s": "system", "u": "user", "a": "assistant"}[role]) for role in roles])
              for roles in ("ua", "suaua", "uau")]
    everyone = ("system", "user", "assistant")
    ids_alone = wraps(fn)(lambda *args: parts(fn(*args), 2)[0])
    if same(attempt(ids_alone, inputs[0]), written_out(*inputs[0]), 0):
        raise Wrong("<|im_start|> and <|im_end|> are spelt out in many tokens: encode() never makes special "
                    "tokens of a text, so that no user can forge one. Use tokenizer.im_start_id, .im_end_id.")
    compare(fn, right, inputs, [
        (render(end=0), "<|im_end|> after the assistant's words has mask 0. A model whose end token is never "
         "learned never stops."),
        (render(end=1), "<|im_end|> has mask 1 after every message; only the assistant's own is to be "
         "learned."),
        (render(newline=1), "the newline after <|im_end|> has mask 1. It comes after the answer is over."),
        (render(header=1), "the header <|im_start|>assistant⏎ has mask 1. It is given to the model, not "
         "written by it."),
        (render(header=1, newline=1), "the whole turn has mask 1; only the content and its <|im_end|> are to "
         "be learned."),
        (render(roles=everyone), "other roles have mask 1 too. The model would learn to ask the user's "
         "questions."),
        (render(roles=everyone, header=1, newline=1), "the mask is 1 everywhere: only the assistant's "
         "content and its <|im_end|> are to be learned."),
        (render(roles=("system", "assistant")), "the system's words have mask 1 too. They are given to the model, not "
         "written by it."),
        (render(roles=("user",)), "the mask stands on the user's words; it belongs on the assistant's."),
        (render(last_only=True), "only the last turn has mask 1; all answers of the assistant are learned."),
        (shifted(1), "the mask is shifted by one place. Entry i belongs to ids[i]; the loss does the shift."),
        (from_the_first, "from the first answer on everything is learned: headers, line breaks, and what "
         "the user says next. Each message has its own beginning and end."),
        (partly(False), "without the header now; but after the first answer everything is learned: line breaks, and what "
         "the user says next. Each answer has its own beginning and end."),
        (partly(True), "right for one turn; with several, everything between the first answer and the last is learned. Each "
         "answer has its own beginning and end: go through the messages."),
        (partly(None), "only the first answer has mask 1; all answers of the assistant are learned."),
        (shifted(-1), "the mask is shifted by one place. Entry i belongs to ids[i]."),
        (render(closing=False), "<|im_end|> is missing after the content."),
        (render(line=False), "the newline after <|im_end|> is missing."),
        (lambda tokenizer, messages: tuple(x[:-1] for x in render_chat(tokenizer, messages)),
         "the newline after the last <|im_end|> is missing."),
    ], tol=0)
    return "right on 3 conversations"


@check
def check_sft_loss(fn, g):
    """fn(logits (B, T, V), ids (B, T), mask (B, T)) -> scalar, mean over the batch's supervised tokens."""
    def right(logits, ids, mask):
        return -masked_mean(token_logprobs(logits[:, :-1], ids[:, 1:]), mask[:, 1:])

    nll = lambda logits, ids: -token_logprobs(logits[:, :-1], ids[:, 1:])
    inputs = [(2 * normal(g, B, T, V), whole(g, 0, V - 1, B, T), answers(g, B, T).long())
              for B, T, V in ((2, 7, 4), (3, 9, 6), (4, 10, 5))]
    make_unlikely(*inputs[-1])
    compare(fn, right, inputs, [
        (lambda logits, ids, mask: masked_mean(nll(logits, ids), mask[:, :-1]), "the mask is one place off: "
         "entry t belongs to ids[:, t], and you cut the ids to [:, 1:], so cut the mask the same way."),
        (lambda logits, ids, mask: nll(logits, ids).mean(), "the mask does nothing: you average over all "
         "tokens."),
        (lambda logits, ids, mask: ((nll(logits, ids) * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).mean(),
         "you average within each row, then over rows. Take the mean over all supervised tokens: a long "
         "answer weighs more."),
        (lambda logits, ids, mask: (nll(logits, ids) * mask[:, 1:]).mean(), "you divide by all tokens, the "
         "masked ones too; divide by mask.sum()."),
        (lambda logits, ids, mask: (nll(logits, ids) * mask[:, 1:]).sum(), "that is the sum; divide by the "
         "number of supervised tokens."),
        (lambda logits, ids, mask: (nll(logits, ids) * mask[:, 1:]).sum(1).mean(), "you sum over the answer "
         "and average over rows; divide by the number of supervised tokens of the batch."),
        (lambda logits, ids, mask: -masked_mean(token_logprobs(logits, ids), mask), "you do not shift: the "
         "logits at place t predict the token at t + 1."),
        (lambda logits, ids, mask: masked_mean(nll(logits, ids), 1 - mask[:, 1:]), "your loss is on what is "
         "*not* supervised."),
    ], grad=1)
    return "value and gradient are right on 3 random batches"


@check
def check_pad_right(fn, g):
    """fn(rows: id lists, pad_id) -> ids (B, T) int64, mask (B, T), T the longest row."""
    def right(rows, pad_id):
        return data.pad_right(rows, pad_id), data.pad_right([[1] * len(row) for row in rows], 0).float()

    inputs = _unequal_rows(g)
    flip = lambda table: table.flip(1)
    compare(fn, right, inputs, [
        (lambda rows, pad_id: tuple(map(flip, right([row[::-1] for row in rows], pad_id))),
         "you pad on the left; in training we pad on the right, where causal attention hides it."),
        (lambda rows, pad_id: (right(rows, pad_id)[0], (right(rows, pad_id)[0] != pad_id).float()),
         "a real token is taken for padding: in this batch the pad id stands in rows too. What else tells "
          "the two apart?"),
        (lambda rows, pad_id: (right(rows, pad_id)[0], 1 - right(rows, pad_id)[1]), "the mask is inverted: 1 "
         "is real."),
        (lambda rows, pad_id: (right(rows, pad_id)[0], torch.ones_like(right(rows, pad_id)[1])),
         "the mask is 1 everywhere; it is 0 at padding."),
        (lambda rows, pad_id: (right(rows, 0)[0], right(rows, pad_id)[1]), "you fill with 0; fill with "
         "pad_id."),
        (lambda rows, pad_id: tuple(x[:, :min(map(len, rows))] for x in right(rows, pad_id)),
         "you cut to the shortest row; fill up to the longest."),
    ], tol=0)
    return f"right on {len(inputs)} batches, the pad id inside the rows"


@check
def check_lora(fn, g):
    """fn(x (…, in), W (out, in), A (r, in), B (out, r), alpha) -> (…, out), W x + (α/r) B A x."""
    def by(scale=lambda alpha, r: alpha / r, frozen=1.0):
        return lambda x, W, A, B, alpha: frozen * F.linear(x, W) + scale(alpha, len(A)) * F.linear(F.linear(x, A), B)

    def right(x, W, A, B, alpha):
        return by()(x, W, A, B, alpha)

    inputs = [(normal(g, *shape, C), normal(g, V, C), normal(g, r, C), normal(g, V, r), uniform(g, 5, 20))
              for shape, C, V, r in (((3,), 6, 4, 2), ((2, 3), 5, 7, 3), ((2, 2, 2), 4, 4, 4), ((), 3, 8, 1))]
    compare(fn, right, inputs, [
        (by(lambda alpha, r: 1.0), "the factor α/r is missing."),
        (by(lambda alpha, r: alpha), "α is divided by the rank r, the number of rows of A."),
        (by(lambda alpha, r: 1 / r), "you divide by r; multiply by α too."),
        (by(lambda alpha, r: r / alpha), "r/α is upside down: α/r."),
        (by(frozen=0.0), "that is the correction alone; add W x."),
        (by(lambda alpha, r: 0.0), "that is W x alone; add the correction."),
        (lambda x, W, A, B, alpha: right(x, W, A, B, alpha) * alpha / len(A), "α/r multiplies the correction only, not W x."),
        (lambda x, W, A, B, alpha: F.linear(x, W) + alpha / x.size(-1) * F.linear(F.linear(x, A), B),
         "you divide by the columns of A; r is the number of its rows."),
    ], tol=1e-3)
    for x, W, A, B, alpha in inputs:  # A and B are what learns
        same_gradient(*(lambda A, B, f=f: f(x, W, A, B, alpha) for f in (fn, right)), (A, B), 1e-3, 2)
    return "value, and gradient for A and B, are right for 4 shapes of x"


@check
def check_only_rows(fn, g):
    """fn(gradient (V, C), rows: list of ids) -> (V, C): the gradient in these rows, 0 in all others."""
    def right(gradient, rows):
        return gradient * torch.isin(torch.arange(len(gradient)), torch.tensor(rows))[:, None]

    inputs = [(normal(g, V, C), torch.randperm(V, generator=g)[:k].tolist()) for V, C, k in ((5, 3, 1), (6, 6, 2), (9, 4, 3))]
    compare(fn, right, inputs, [
        (lambda x, rows: x, "every row keeps its gradient: all embeddings would be trained."),
        (lambda x, rows: x - right(x, rows), "the other way round: the chosen rows keep theirs, the others get 0."),
        (lambda x, rows: x[rows], "only the chosen rows are there; give the whole table, 0 in the other rows."),
        (lambda x, rows: right(x.abs() * 0 + 1, rows), "that is 1 in the chosen rows; multiply by the gradient."),
        (lambda x, rows: right(x, list(range(len(rows)))), "you keep the first rows; `rows` holds the ids of those to keep."),
    ])
    return "right on 3 tables, with 1, 2 and 3 rows"


# ---- 06: the reward model ------------------------------------------------------------------------

@check
def check_preference_loss(fn, g):
    """fn(chosen, rejected (B,)) -> scalar, mean −log σ(chosen − rejected); ValueError for unequal shapes."""
    right = reward.preference_loss
    inputs = [tuple(normal(g, 2, 3)), tuple(2 * normal(g, 2, 8)), (torch.zeros(4), torch.zeros(4))]
    extreme = (torch.tensor([-200.0, 1.0]), torch.tensor([0.0, 0.0]))
    compare(fn, right, [*inputs, extreme], [
        (lambda c, r: -torch.sigmoid(c - r).log().mean(), "at a margin of −200, sigmoid is 0 in float32 and "
         "its log −inf. F.logsigmoid computes both together, and safely."),
        (lambda c, r: right(r, c), "the sign of the margin: it is chosen − rejected. This model learns to "
         "prefer what people reject."),
        (lambda c, r: right(c, r) * len(c), "that is the sum; take the mean over pairs."),
        (lambda c, r: -torch.sigmoid(c - r).mean(), "the logarithm is missing: −log σ, and not −σ."),
        (lambda c, r: -F.logsigmoid((c - r).mean()), "you average the margins before the logarithm; the loss "
         "comes first, the mean over pairs last."),
        (lambda c, r: -(F.logsigmoid(c) + F.logsigmoid(-r)).mean(), "you judge each answer by itself; only "
         "the *difference* of the two means something (InstructGPT, arXiv 2203.02155, eq. 1)."),
        (lambda c, r: (r - c).mean(), "the log σ is missing."),
    ], grad=2)
    # (B,) minus (B, 1) would silently compare every answer with every other.
    for shape in ((3, 1), (1,), (4,)):
        result = attempt(lambda *args: (fn(*args),), (torch.zeros(3), torch.zeros(shape)))
        if isinstance(result, tuple) and isinstance(result[0], Exception):
            raise Wrong("you return the ValueError; raise it.")
        if isinstance(result, Exception) and not isinstance(result, ValueError):
            kind = type(result).__name__
            raise Wrong(f"the values are right, but chosen (3,) and rejected {shape} end in a {kind}: raise a "
                        f"ValueError, not {kind}.")
        if not isinstance(result, ValueError):
            raise Wrong(f"the values are right, but chosen (3,) and rejected {shape} pass: broadcasting compares "
                        "answers to different prompts, without a warning. Raise a ValueError then.")
    return "value and gradient are right, at a margin of −200 too; unequal shapes are refused"


@check
def check_read_last(fn, g):
    """fn(values (B, T), mask (B, T)) -> (B,), values at the last real tokens; padding on either side or on both."""
    def right(values, mask):
        return values[torch.arange(len(values)), last_token(mask)]

    at = lambda where: lambda values, mask: values.gather(1, where(values, mask)[:, None])[:, 0]
    inputs = []
    for T in (5, 8, 9):
        lengths = 1 + torch.randperm(T - 1, generator=g)[:3, None]  # all different, none of them full
        lengths[0] = max(2, lengths[0].item())
        on_the_right = (torch.arange(T) < lengths).long()
        both = on_the_right.clone()
        both[0, 0] = 0  # a place of padding on the left of the first row too
        inputs += [(normal(g, 3, T), mask) for mask in (on_the_right, on_the_right.flip(1), both)]
    compare(fn, right, inputs, [
        (at(lambda v, m: m.sum(1) - 1), "right with padding on the right, wrong with padding on the left. "
         "There, what does the *number* of real tokens tell of the *place* of the last one?"),
        (lambda values, mask: values[:, -1], "you read the last column. With padding on the right that is "
         "padding."),
        (at(lambda v, m: (last_token(m) - 1).clamp(min=0)), "you read one token too early."),
        (at(lambda v, m: m.argmax(1)), "that is the first real token (argmax finds the first 1); the last "
         "one has seen the whole answer."),
        (at(lambda v, m: m.flip(1).argmax(1)), "after flip the place counts from the right: T − 1 − it."),
        (lambda values, mask: (values * mask).sum(1) / mask.sum(1), "you average over the tokens; only the "
         "last one has seen the whole answer."),
        (lambda values, mask: values[:, last_token(mask)], "you take every column for every row, (B, B): "
         "pair them, values[torch.arange(B), last]."),
    ])
    return "right on 9 tables, padding on the right, on the left, and on both sides"


@check
def check_noise_ceiling(fn, g):
    """fn(p (N,)) -> scalar, the best accuracy that can be expected where p are the chances of `chosen`."""
    def right(p):
        return torch.maximum(p, 1 - p).mean()

    inputs = []
    for n, high in ((4, True), (10, False), (50, True), (200, False)):  # a mean above one half, or below
        p = torch.rand(n, generator=g) * 0.9 + 0.05
        inputs.append((p if (p.mean() > 0.5) == high else 1 - p,))
    compare(fn, right, inputs, [
        (lambda p: p.mean(), "that is how often `chosen` is chosen again. The best model picks the likelier "
         "side, also where p is below one half."),
        (lambda p: torch.maximum(p.mean(), 1 - p.mean()), "you average first; choose the likelier side of "
         "every pair, then average."),
        (lambda p: torch.minimum(p, 1 - p).mean(), "that is the least error; the ceiling of the accuracy is "
         "1 minus it."),
        (lambda p: (p**2 + (1 - p)**2).mean(), "that is how often two people agree. The best model is not a "
         "second person: it always names the likelier side."),
        (lambda p: (p > 0.5).double().mean(), "that is how often the likelier side was chosen: the labels "
         "are not certain, so weight each pair by its chance."),
        (lambda p: torch.maximum(p, 1 - p), "that is one number per pair; take their mean."),
        (lambda p: -(p * p.log() + (1 - p) * (1 - p).log()).mean(), "that is the least *loss* (the "
         "entropy)."),
    ])
    return "right on 4 random samples"


@check
def check_surprisals(fn, g):
    """fn(logits (B, T, V), ids (B, T)) -> (B, T, 2): log-probs of the tokens, and those less the likeliest's: both 0 or less."""
    def both(logits, ids, shift=1, scale=torch.log_softmax):
        scores = scale(logits[:, :logits.size(1) - shift], -1)
        said = scores.gather(-1, ids[:, shift:, None]).squeeze(-1)
        return said, scores.amax(-1)

    def right(logits, ids):
        said, most = both(logits, ids)
        return F.pad(torch.stack([said, said - most], -1), (0, 0, 1, 0))

    def table(first, second, before=1, after=0):
        return F.pad(torch.stack([first, second], -1), (0, 0, before, after))

    def wrong(change, **settings):
        return lambda logits, ids: change(*both(logits, ids, **settings))

    inputs = []
    for shape in ((1, 3, 4), (2, 5, 7), (3, 9, 6)):
        logits = 2 * normal(g, *shape)
        inputs.append((logits, torch.randint(shape[-1], shape[:2], generator=g)))
    compare(fn, right, inputs, [
        ((wrong(lambda said, most: table(said, said - most, before=0), shift=0),
          wrong(lambda said, most: table(said[:, 1:], (said - most)[:, 1:]), shift=0)), "you read at place t what foretells "
         "the token at t + 1: shift, logits[:, :-1] with ids[:, 1:]."),
        (wrong(lambda said, most: torch.stack([said, said - most], -1)), "one place is missing: the first token gets two zeros."),
        (wrong(lambda said, most: table(said, said - most, 0, 1)), "the zeros belong to the first token, not to the last."),
        (wrong(lambda said, most: table(said, most - said)), "below the likeliest means 0 or less: the token's minus the "
         "likeliest's."),
        (wrong(lambda said, most: table(said, most)), "the second number is the likeliest token's own; how far below it does "
         "the token lie?"),
        (wrong(lambda said, most: table(said - most, said)), "the two numbers are exchanged."),
        (wrong(lambda said, most: table(said, said - most), scale=lambda x, _: x), "the second number is right; for the first "
         "you take logits as they are: log_softmax makes log-probs of them."),
        (wrong(lambda said, most: table(said, said - most), scale=torch.softmax), "these are probabilities; take their "
         "logarithm (log_softmax)."),
        (lambda logits, ids: right(logits.transpose(0, 1), ids.t()).transpose(0, 1), "you shift along the batch; the places "
         "are dimension 1."),
    ])
    return "right on 3 batches"


@check
def check_normalise_reward(fn, g):
    """fn(scores (N,)) -> (shift, scale), so that scores / scale − shift has mean 0 and std 1 (reward.py)."""
    def right(scores):
        return scores.mean() / scores.std(), scores.std()

    inputs = [(uniform(g, 1.5, 4) * normal(g, n) + uniform(g, 2, 6),) for n in (5, 40, 200)]
    compare(fn, right, inputs, [
        (lambda s: (s.mean(), s.std()), "the scale is right, the shift is not. Our convention is scores / "
         "scale − shift (reward.py divides the head first): in which unit is what is subtracted?"),
        (lambda s: (s.mean(), 1 / s.std()), "that is (scores − shift) · scale. Our convention is scores / "
         "scale − shift: scale is the std itself, and the shift is in units of it."),
        (lambda s: (s.mean() / s.std(), 1 / s.std()), "scale is the std, which you divide by, and not 1 / "
         "std."),
        (lambda s: (s.mean() / s.var(), s.var()), "you divide by the variance; the unit is the standard "
         "deviation."),
        (lambda s: (-s.mean() / s.std(), s.std()), "the sign of the shift: it is subtracted."),
        (lambda s: (s - s.mean()) / s.std(), "you return the normalised scores; return the two numbers "
         "(shift, scale)."),
    ], also=[lambda s: (s.mean() / s.std(correction=0), s.std(correction=0))])
    return "scores / scale − shift has mean 0 and standard deviation 1, on 3 random samples"


@check
def check_calibration(fn, g):
    """fn(p (N,), outcome (N,), bins) -> the expected calibration error with `bins` equal bins from 0 to 1."""
    def gaps(p, outcome, bins, middle=False, place=None):
        """(shares, mean claim − mean outcome) of the bins that hold something."""
        which = (p * bins).long().clamp(max=bins - 1) if place is None else place(p, bins)
        held = [which == b for b in range(bins) if (which == b).any()]
        claim = [(which[h][0] + 0.5) / bins if middle else p[h].mean() for h in held]
        return (torch.stack([h.double().mean() for h in held]),
                torch.stack([c - outcome[h].mean() for c, h in zip(claim, held)]))

    def ece(weigh=lambda share, gap, bins: (share * gap.abs()).sum(), **options):
        return lambda p, outcome, bins: weigh(*gaps(p, outcome, bins, **options), bins)

    right = ece()

    def folded(p, outcome, bins):
        sure = torch.maximum(p, 1 - p)
        return right(sure, torch.where(p >= 0.5, outcome, 1 - outcome), bins)

    inputs = []
    for n, bins in ((6, 2), (60, 5), (80, 10), (40, 8)):  # claims squeezed together: some bins are empty
        p = 0.02 + 0.75 * torch.rand(n, generator=g) ** 1.5
        outcome = (torch.rand(n, generator=g) < 0.2 + 0.5 * p).float()
        if n > 6:  # the ends of the range belong to the first and the last bin
            p[:3], outcome[:3] = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
            p[3:7], outcome[3:7] = 0.5, 1.0  # a border between two bins belongs to the upper one
        inputs.append((p, outcome, bins))
    inputs.append((torch.tensor([0.5, 0.5, 0.1, 0.9]), torch.tensor([1.0, 1.0, 1.0, 0.0]), 2))  # where the border decides
    def both_sides(p, outcome, bins):
        held = [(p >= b / bins) & (p <= (b + 1) / bins) for b in range(bins)]
        return sum(h.double().mean() * (p[h].mean() - outcome[h].mean()).abs() for h in held if h.any())

    beyond = lambda p, bins: (p * bins).long()
    from_above = lambda p, bins: (p * bins).ceil().long() - 1
    compare(fn, right, inputs, [
        (ece(lambda share, gap, bins: gap.abs().mean()), "you average the bins alike; weigh each by its "
         "share of the claims."),
        (ece(lambda share, gap, bins: gap.abs().sum() / bins), "you average the bins alike, empty ones too; "
         "weigh each by its share of the claims."),
        (ece(lambda share, gap, bins: gap.abs().max()), "that is the largest gap (MCE); take the mean, "
         "weighted by the bins' shares."),
        (ece(lambda share, gap, bins: (share * gap**2).sum()), "you square the gaps; take their absolute "
         "values."),
        ((ece(lambda share, gap, bins: (share * gap).sum()),
          ece(lambda share, gap, bins: (share * gap).sum().abs())), "gaps of opposite sign cancel: take the "
         "absolute value of each bin's gap before you add them."),
        (ece(place=beyond), "a claim of exactly 1 falls out of your bins; it belongs to the last."),
        (ece(place=from_above), "a claim of exactly 0 falls out of your bins; it belongs to the first."),
        (ece(place=lambda p, bins: from_above(p, bins).clamp(min=0)), "a claim on the border of two bins belongs to "
         "the upper one: bin b holds b / bins ≤ p < (b + 1) / bins."),
        (both_sides, "a claim on the border of two bins falls into both: bin b holds b / bins ≤ p < (b + 1) / bins."),
        (ece(middle=True), "you compare with the middle of the bin; compare with the mean claim in it."),
        (folded, "you fold p and 1 − p together (confidence); here p from 0 to 1 is binned as it is."),
        (lambda p, outcome, bins: ((p - outcome)**2).mean(), "that is the Brier score."),
    ], tol=1e-3)
    return "right on 4 random samples, with empty bins and claims of 0 and 1"


# ---- 07: PPO -------------------------------------------------------------------------------------

@check
def check_token_rewards(fn, g):
    """fn(score (B,), logp, ref_logp, mask (B, T), beta) -> (B, T); log-probs are 0 outside the mask."""
    def right(score, logp, ref_logp, mask, beta, last=None):
        table = -beta * (logp - ref_logp)
        table[torch.arange(len(score)), last_token(mask) if last is None else last] += score
        return table

    def instead(score, logp, ref_logp, mask, beta):
        table = -beta * (logp - ref_logp)
        table[torch.arange(len(score)), last_token(mask)] = score
        return table

    def where_it_falls(score, logp, ref_logp, mask, beta):
        return -beta * (logp - ref_logp) + score[:, None] * F.pad(mask[:, :-1] * (1 - mask[:, 1:]), (0, 1))

    def every_row(score, logp, ref_logp, mask, beta):
        table = -beta * (logp - ref_logp)
        table[:, last_token(mask)] += score
        return table

    def one_sum(score, logp, ref_logp, mask, beta):
        table = torch.zeros_like(logp)
        table[torch.arange(len(score)), last_token(mask)] = score - beta * (logp - ref_logp).sum(1)
        return table

    inputs = []
    for B, T in ((2, 7), (3, 9), (4, 12)):
        mask = answers(g, B, T)
        inputs.append((normal(g, B) + 2, -mask * 3 * torch.rand(B, T, generator=g),
                       -mask * 3 * torch.rand(B, T, generator=g), mask, uniform(g, 0.1, 0.5)))
    compare(fn, right, inputs, [
        (lambda s, lp, ref, m, b: right(s, ref, lp, m, b), "the sign of the price: −β (log π − log π_ref). "
         "As it is, you pay the policy for leaving the reference."),
        (lambda s, lp, ref, m, b: -b * (lp - ref) + s[:, None] * m, "the score stands on every token; it "
         "belongs on the last one of the answer only."),
        (lambda s, lp, ref, m, b: right(s, lp, ref, m, b, -1), "the score stands in the last column, which "
         "is padding; it belongs on the last 1 of the mask."),
        (lambda s, lp, ref, m, b: right(s, lp, ref, m, b, m.sum(1).long() - 1), "mask.sum(1) − 1 is not "
         "the last token of the answer: the prompt stands before it, and has mask 0."),
        (lambda s, lp, ref, m, b: right(s, lp, ref, m, b, m.argmax(1)), "the score stands on the first "
         "token of the answer; it is known at the last."),
        (where_it_falls, "an answer that fills its row gets no score: its mask never falls from 1 to 0."),
        (every_row, "table[:, last] adds every score in every row; pair them: table[torch.arange(B), last]."),
        (instead, "add the score to the token's price and do not replace it: the last token has a price too."),
        (one_sum, "the whole price stands on the last token; every token pays its own."),
        (lambda s, lp, ref, m, b: right(s, lp, ref, m, 1.0), "β is missing."),
        (lambda s, lp, ref, m, b: right(s * 0, lp, ref, m, b), "the score is missing."),
        (lambda s, lp, ref, m, b: right(s, lp, lp, m, b), "the price for leaving the reference is missing."),
        (lambda s, lp, ref, m, b: right(s, lp.exp(), ref.exp(), m, b), "the price is a difference of "
         "*log*-probabilities."),
    ])
    return "right on 3 random rollouts"


def _delta(r, v, following, gamma):
    return r + gamma * following - v


def _gae(delta=None, masked=True, stop=True, returns=None, after=None, decay=None):
    """rlhf.gae with one part exchanged: the TD error `delta`(r, v, next v, γ), no mask on `values`, none on
    what is carried over (`stop`), other `returns`, something done `after`, another `decay`(γ, λ)."""
    def other(rewards, values, mask, gamma, lam):
        v = values * mask if masked else values
        out, carry, following = torch.zeros_like(v), torch.zeros(len(v)), torch.zeros(len(v))
        for t in reversed(range(v.size(1))):
            d = (delta or _delta)(rewards[:, t], v[:, t], following, gamma)
            carry = d + (decay(gamma, lam) if decay else gamma * lam) * carry
            carry = carry * mask[:, t] if stop else carry
            following, out[:, t] = v[:, t], carry
        out = out * mask
        out = after(out, mask) if after else out
        return out, (returns(out, v, values, mask) if returns else (out + v) * mask)
    return other


@check
def check_gae(fn, g):
    """fn(rewards, values, mask (B, T), gamma, lam) -> (advantages, returns), both 0 outside the mask."""
    right = rlhf.gae

    def monte_carlo(rewards, values, mask, gamma, lam):
        return right(rewards, values, mask, gamma, lam)[0], right(rewards, values * 0, mask, gamma, 1.0)[0]

    def short_of_the_end(rewards, values, mask, gamma, lam):
        last = torch.zeros_like(mask)
        last[:, -1] = mask[:, -1]  # the value there is still read as V_{t+1}
        paid = rewards + last * (values - rewards)  # δ = 0 in the last column
        advantages = right(paid, values, mask, gamma, lam)[0]
        return advantages, (advantages + values) * mask

    def itself_next(rewards, values, mask, gamma, lam):
        paid = rewards.clone()
        paid[:, -1] += gamma * values[:, -1] * mask[:, -1]
        return right(paid, values, mask, gamma, lam)

    def forwards(rewards, values, mask, gamma, lam):
        flipped = [x.flip(1) for x in (rewards, values, mask)]
        return tuple(x.flip(1) for x in right(*flipped, gamma, lam))

    inputs = []
    for B, T in ((1, 6), (2, 7), (2, 8), (3, 9)) * 2:
        # There are numbers outside the mask too: none of them may leak in.
        inputs.append((normal(g, B, T), normal(g, B, T) + 1, answers(g, B, T), uniform(g, 0.7, 0.95),
                       uniform(g, 0.5, 0.9)))
    leak = "Numbers at padding leak in"
    compare(fn, right, inputs, [
        (_gae(lambda r, v, n, gamma: r + gamma * v - v), "your δ_t has γ V_t − V_t: the first of the two must be "
         "the value of what *follows*, V_{t+1}."),
        (_gae(lambda r, v, n, gamma: r - v), "γ V_{t+1} is missing in δ_t."),
        (_gae(lambda r, v, n, gamma: r + gamma * n), "− V_t is missing in δ_t: an advantage is what is "
         "better than expected."),
        (_gae(lambda r, v, n, gamma: r + n - v), "γ is missing in δ_t = r_t + γ V_{t+1} − V_t."),
        (_gae(decay=lambda gamma, lam: lam), "your sum falls by λ per step; it falls by γλ."),
        (lambda r, v, m, gamma, lam: right(r, v, m, gamma, 0.0), "only δ_t is there, the case λ = 0: add γλ "
         "A_{t+1}."),
        (lambda r, v, m, gamma, lam: right(r, v, m, gamma, 1.0), "λ does nothing: that is the case λ = 1."),
        (lambda r, v, m, gamma, lam: right(r, v, m, 1.0, lam), "γ does nothing: that is the case γ = 1."),
        (_gae(after=lambda a, m: rlhf.whiten(a, m)), "your advantages look whitened. That comes later; "
         "returns need them raw."),
        (lambda r, v, m, *rest: (rlhf.whiten(right(r, v, m, *rest)[0], m), right(r, v, m, *rest)[1]),
         "your advantages look whitened. That comes later, in a step of its own."),
        (_gae(masked=False, returns=lambda a, v, raw, m: (a + raw) * m), f"{leak}: the value of what follows "
         "the last token of the answer is 0, since the answer is over. You take the value at the padding."),
        (_gae(masked=False, returns=lambda a, v, raw, m: a + raw), f"{leak}: the value of what follows the "
         "last token is 0, since the answer is over; and the returns are not 0 outside the mask."),
        (_gae(masked=False, stop=False, returns=lambda a, v, raw, m: a + raw), f"{leak}: their rewards and values; and the "
         "returns are not 0 outside the mask. The mask must be 0 for the values before the loop and for the sum at each step."),
        (_gae(stop=False), f"{leak}: the sum δ + γλ A carries their rewards over. Multiply it by mask[:, t] "
         "at each step."),
        (_gae(masked=False, stop=False), f"{leak}: their rewards and values. The mask must be 0 for the "
         "values before the loop and for the sum at each step, not only at the end."),
        (lambda r, v, m, *rest: right(r, v, torch.ones_like(m), *rest), f"{leak}: the mask does nothing."),
        (_gae(returns=lambda a, v, raw, m: a + raw), "the returns are not 0 outside the mask: a + values · "
         "mask."),
        (monte_carlo, "your returns are the discounted rewards; here they are advantages + values."),
        ((lambda r, v, m, *rest: (right(r, v, m, *rest)[0], right(r, v, m, *rest)[0] + r * m),
          lambda r, v, m, *rest: (right(r, v, m, *rest)[0], right(r, v, m, *rest)[0] + r)),
         "you add the rewards; returns = advantages + values, and 0 outside the mask."),
        (_gae(returns=lambda a, v, raw, m: a), "you return the advantages twice; returns = advantages + "
         "values."),
        (short_of_the_end, "an answer that fills its row gets nothing for its last token: begin at the last column, T − 1, where "
         "the value of what follows is 0."),
        (itself_next, "in the last column you take the value of that column itself for what follows; it is 0, the answer is "
         "over."),
        (forwards, "you walk from the first token to the last; each advantage needs the one after it."),
    ])
    return "agrees with rlhf.gae on 8 random tables"


@check
def check_whiten(fn, g):
    """fn(x (B, T), mask (B, T)) -> (B, T), mean 0 and variance 1 over the mask, 0 outside it."""
    right = rlhf.whiten

    def deviation(x, mask):
        return masked_mean((x - masked_mean(x, mask))**2, mask).sqrt()

    def by(mean=masked_mean, spread=deviation, outside=True):
        return lambda x, mask: (x - mean(x, mask)) / spread(x, mask) * (mask if outside else 1)

    rows = lambda x, mask: (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    all_mean = lambda x, mask: x.mean()
    unbiased = by(spread=lambda x, mask: x[mask > 0].std())
    inputs = [(3 * normal(g, B, T) + 2, answers(g, B, T)) for B, T in ((2, 7), (3, 9), (5, 14))]
    compare(fn, right, inputs, [
        (tuple(by(all_mean, lambda x, mask, n=n: x.std(correction=n)) for n in (0, 1)), "numbers outside the "
         "mask change your result: put different ones there, and see where they enter."),
        (tuple(by(lambda x, mask: (x * mask).mean(), lambda x, mask, n=n: (x * mask).std(correction=n))
               for n in (0, 1)),
         "the zeros of the padding are in your mean and standard deviation: divide by mask.sum(), not B·T."),
        (by(all_mean), "padding is in your mean."),
        (tuple(by(spread=lambda x, mask, n=n: x.std(correction=n)) for n in (0, 1)), "the mean is right; padding is still in "
         "your standard deviation."),
        (by(spread=lambda x, mask: ((x - masked_mean(x, mask)) * mask).square().mean().sqrt()),
         "your variance is divided by B·T; divide by mask.sum()."),
        (by(spread=lambda x, mask: masked_mean((x * mask - masked_mean(x, mask))**2, torch.ones_like(mask)).mul(
            mask.numel() / mask.sum()).sqrt()), "every place outside the mask adds mean² to your variance: subtract "
         "the mean first, then multiply by the mask."),
        (by(outside=False), "the places outside the mask must be 0: multiply by the mask at the end."),
        (by(spread=lambda x, mask: 1.0), "you only shift; divide by the standard deviation too."),
        (by(mean=lambda x, mask: 0.0), "you only scale; subtract the mean too."),
        (by(spread=lambda x, mask: deviation(x, mask)**2), "you divide by the variance; divide by its root."),
        (by(rows, lambda x, mask: rows((x - rows(x, mask))**2, mask).sqrt()), "you whiten each row by "
         "itself. Then a good answer looks no better than a bad one; take mean and variance over the whole "
         "batch."),
    ], also=[unbiased], tol=1e-3)
    return "mean 0 and variance 1 over the mask, on 3 random tables"


@check
def check_ppo_loss(fn, g):
    """fn(logp, old_logp, advantages, mask (B, T), clip) -> scalar, minus the surrogate's masked mean."""
    def surrogate(f, mean=masked_mean, ratio=lambda logp, old: (logp - old).exp()):
        """−mean of f(ratio, clipped ratio, advantages)."""
        def loss(logp, old_logp, advantages, mask, clip):
            r = ratio(logp, old_logp)
            return -mean(f(r, r.clamp(1 - clip, 1 + clip), advantages), mask)
        return loss

    both = lambda r, c, a: torch.min(r * a, c * a)

    def right(logp, old_logp, advantages, mask, clip):
        zero = torch.zeros_like(logp)
        return rlhf.ppo_loss(logp, old_logp, advantages, zero, zero, zero, mask, clip)[0]

    inputs = []
    for B, T, clip in ((2, 7, 0.2), (6, 16, 0.1), (8, 20, 0.3)):
        old = -3 * torch.rand(B, T, generator=g)
        inputs.append((old + 0.5 * normal(g, B, T), old, normal(g, B, T) + 0.2, answers(g, B, T), clip))
    compare(fn, right, inputs, [
        (surrogate(lambda r, c, a: torch.min(r, c) * a), "right where the advantage is positive, wrong at "
         "some tokens where it is negative. Of which two things does eq. 7 of arXiv 1707.06347 take the "
         "minimum, and which is smaller when A < 0?"),
        (surrogate(lambda r, c, a: torch.max(r * a, c * a)), "you take the larger of the two; the "
         "smaller, the pessimistic one, counts. With a minus inside, a minimum becomes a maximum."),
        (surrogate(lambda r, c, a: c * a), "that is the clipped part only: a token that moved the wrong way "
         "loses its gradient. Take the minimum with ρ A."),
        (surrogate(lambda r, c, a: r * a), "nothing is clipped."),
        (surrogate(both, ratio=lambda lp, old: (old - lp).exp()), "your ratio is π_old / π; it is π / "
         "π_old."),
        (surrogate(both, ratio=lambda lp, old: lp - old), "your ratio is still a logarithm: exp(logp − "
         "old_logp)."),
        (surrogate(both, mean=lambda x, m: x.mean()), "padding is in your mean: multiply by the mask and "
         "divide by mask.sum()."),
        (surrogate(both, mean=lambda x, m: (x * m).mean()), "you divide by B·T; divide by mask.sum()."),
        (surrogate(both, mean=lambda x, m: (x * m).sum()), "that is the sum; divide by mask.sum()."),
        (surrogate(both, mean=lambda x, m: ((x * m).sum(1) / m.sum(1)).mean()), "you average within each "
         "row, then over rows; here all tokens count alike."),
        (lambda *args: surrogate(lambda r, c, a: torch.min(r * a, r.clamp(-args[4], args[4]) * a))(*args),
         "you clip to ±ε; the ratio is clipped to 1 ± ε."),
        (lambda *args: surrogate(lambda r, c, a: torch.min(r * a, r.clamp(max=1 + args[4]) * a))(*args),
         "the lower end of the clip, 1 − ε, is missing."),
    ], grad=1, general="none of the mistakes that we know. Take one token with A = 1 and ρ = 1.5, then "
                          "A = −1 and ρ = 1.5: which of the two products counts?")
    return "value and gradient agree with rlhf.ppo_loss on 3 random batches"


@check
def check_kl_estimate(fn, g):
    """fn(logp (B, T), ref_logp (B, T)) -> (k1, k3), estimators of KL(policy || reference)."""
    def right(logp, ref_logp):
        log_ratio = ref_logp - logp
        return -log_ratio, log_ratio.exp() - 1 - log_ratio

    other = lambda logp, ref: right(logp, ref)[1]
    inputs = [tuple(-3 * torch.rand(2, B, T, generator=g)) for B, T in ((1, 3), (2, 5), (3, 7))]
    compare(fn, right, inputs, [
        (lambda lp, ref: right(ref, lp), "both are reversed: they estimate KL(reference || policy). The "
         "tokens come from the policy: k1 = log π − log π_ref."),
        (lambda lp, ref: (ref - lp, other(lp, ref)), "the sign of k1: it is log π − log π_ref. The reference "
         "is what is subtracted."),
        (lambda lp, ref: (lp - ref, other(ref, lp)), "in k3 the ratio is π_ref / π, since the tokens come "
         "from π: ρ − 1 − log ρ with ρ = π_ref / π. Yours is not unbiased."),
        (lambda lp, ref: (lp - ref, 0.5 * (lp - ref)**2), "your second is k2, half the square; k3 is ρ − 1 − "
         "log ρ."),
        (lambda lp, ref: (lp - ref, (ref - lp).exp() - (ref - lp)), "− 1 is missing in k3: it must be 0 "
         "where the two agree."),
        ((lambda lp, ref: (lp - ref, lp - ref), lambda lp, ref: (lp - ref, ref - lp)), "your second is k1 "
         "again, or minus it; k3 is ρ − 1 − log ρ, never below 0."),
        (lambda lp, ref: (lp - ref, (ref - lp).exp() - 1 + (ref - lp)),
         "the sign of log ρ in k3: it is ρ − 1 − log ρ."),
        (lambda lp, ref: (lp - ref, (ref - lp).exp() - 1), "− log ρ is missing in k3."),
        (lambda lp, ref: (lp.exp() * (lp - ref), other(lp, ref)), "you weight k1 by π. The tokens were "
         "*drawn* from π, so each counts once."),
    ])
    return "right on 3 random tables"


# ---- 08: DPO and GRPO ----------------------------------------------------------------------------

@check
def check_sequence_logprob(fn, g):
    """fn(logits (B, T, V), ids (B, T), mask (B, T)) -> (B,), the log-probs of the masked tokens, summed."""
    def right(logits, ids, mask):
        return (token_logprobs(logits[:, :-1], ids[:, 1:]) * mask[:, 1:]).sum(1)

    every = lambda logits, ids: token_logprobs(logits[:, :-1], ids[:, 1:])
    inputs = [(2 * normal(g, B, T, V), whole(g, 0, V - 1, B, T), answers(g, B, T)) for B, T, V in
              ((2, 7, 4), (3, 9, 6), (4, 11, 5))]
    make_unlikely(*inputs[-1])
    compare(fn, right, inputs, [
        ((lambda logits, ids, mask: (every(logits, ids) * mask[:, :-1]).sum(1),
          lambda logits, ids, mask: (token_logprobs(logits, ids.roll(-1, 1)) * mask).sum(1)), "one token of the answer "
         "is missing in your sum, and one is in it that is none. To which token does entry t of the mask "
         "belong, and which one do you meet at t?"),
        (lambda logits, ids, mask: (token_logprobs(logits, ids) * mask).sum(1), "you do not shift: the "
         "logits at place t predict the token at t + 1."),
        (lambda logits, ids, mask: (token_logprobs(logits[:, 1:], ids[:, :-1]) * mask[:, :-1]).sum(1),
         "you shift the wrong way: logits[:, :-1] predict ids[:, 1:]."),
        (lambda logits, ids, mask: right(logits, ids, mask) / mask[:, 1:].sum(1), "you divide by the length. "
         "DPO needs the log-probability of the whole answer, a sum (eq. 7 of arXiv 2305.18290)."),
        (lambda logits, ids, mask: every(logits, ids).sum(1), "the prompt and the padding are in your sum; "
         "multiply by the mask."),
        (lambda logits, ids, mask: (logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1),
         "these are raw logits; a log_softmax over the vocabulary makes log-probabilities of them."),
        (lambda logits, ids, mask: every(logits, ids) * mask[:, 1:], "that is a number per token; sum over "
         "the answer."),
        (lambda logits, ids, mask: (every(logits, ids) * (1 - mask[:, 1:])).sum(1), "the mask is inverted: 1 "
         "is the answer."),
    ], grad=1)
    return "value and gradient are right on 3 random batches"


def _dpo(of_margin, margin=lambda pc, pr, rc, rr, b: b * ((pc - rc) - (pr - rr))):
    return lambda *args: of_margin(margin(*args))


WRONG_MARGINS = [
    (lambda pc, pr, rc, rr, b: b * (pc - pr), "the reference is missing in the margin: each log-probability "
     "is measured from the reference's (eq. 7 of arXiv 2305.18290)."),
    (lambda pc, pr, rc, rr, b: (pc - rc) - (pr - rr), "β is missing in the margin."),
    (lambda pc, pr, rc, rr, b: b * b * ((pc - rc) - (pr - rr)), "β comes twice: the implicit rewards have it already."),
    (lambda pc, pr, rc, rr, b: b * ((pc - pr) + (rc - rr)), "a sign of the reference, or the two references "
     "are crossed: it is (π_c − ref_c) minus (π_r − ref_r)."),
    (lambda pc, pr, rc, rr, b: b * (pc - pr) - (rc - rr), "β multiplies the policy's part only; it "
     "multiplies all."),
    *((lambda pc, pr, rc, rr, b, s=s: s * b * ((pc / rc).log() - (pr / rr).log()),
       "the inputs are logarithms already: log(π/π_ref) is their difference, not the log of their ratio.")
      for s in (1, -1))]


@check
def check_dpo_loss(fn, g):
    """fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected (B,), beta) -> scalar."""
    mean_loss = lambda z: -F.logsigmoid(z).mean()

    def right(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
        return rlhf.dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)[0]

    inputs = [(*(3 * normal(g, 4, B) - 20), uniform(g, 0.1, 0.6)) for B in (2, 5, 8)]
    far = (torch.tensor([-900.0, -20.0]), *[torch.tensor([-30.0, -21.0])] * 3, 0.5)  # a margin of −435
    compare(fn, right, [*inputs, far], [
        *((_dpo(mean_loss, margin), text) for margin, text in WRONG_MARGINS),
        (_dpo(lambda z: mean_loss(-z)), "the sign of the margin: it is chosen minus rejected. Yours pushes "
         "the chosen answers down."),
        (lambda *args: args[4] * right(*args[:4], 1.0), "your β stands outside σ; it multiplies the margin."),
        (_dpo(lambda z: -F.logsigmoid(z).sum()), "that is the sum over pairs; take the mean."),
        (_dpo(lambda z: -torch.sigmoid(z).log().mean()), "at a margin of −435, sigmoid is 0 in float32 and "
         "its log −inf. F.logsigmoid computes both together, and safely."),
        (_dpo(lambda z: -torch.sigmoid(z).mean()), "the logarithm is missing: −log σ."),
        (_dpo(lambda z: -z.mean()), "the log σ is missing: without it, pairs already right pull as hard as "
         "the others."),
        (_dpo(lambda z: -F.logsigmoid(z.mean())), "you average the margins before log σ; the mean over pairs "
         "comes last."),
        (lambda pc, pr, rc, rr, b: (((pc - rc) - (pr - rr) - 1 / (2 * b))**2).mean(),
         "that is IPO; DPO has −log σ."),
    ], grad=2)
    return "value and gradient agree with rlhf.dpo_loss on 4 batches, one with a margin of −435"


@check
def check_implicit_reward(fn, g):
    """fn(policy (B,), ref (B,), beta) -> (B,), β log(π / π_ref) from log-probabilities."""
    def right(policy, ref, beta):
        return beta * (policy - ref)

    inputs = [(*(2 * normal(g, 2, B) - 15), uniform(g, 0.1, 0.6)) for B in (2, 5, 8)]
    inputs += [(torch.tensor([-900.0, -20.0]), torch.tensor([-30.0, -21.0]), 0.5)]  # exp(-900) is 0 in float32
    compare(fn, right, inputs, [
        (lambda p, ref, b: p - ref, "β is missing."),
        (lambda p, ref, b: b * p, "the reference is missing."),
        (lambda p, ref, b: b * p - ref, "β multiplies the difference, not the first part alone."),
        (lambda p, ref, b: b * (p / ref), "a ratio of *log*-probabilities; log(π/π_ref) is their "
         "difference."),
        ((lambda p, ref, b: b * (p / ref).log(), lambda p, ref, b: b * (ref / p).log()), "the inputs are "
         "logarithms already: log(π/π_ref) is their difference, policy − ref, not the log of their ratio."),
        ((lambda p, ref, b: b * (p - ref).exp(), lambda p, ref, b: b * (p.exp() / ref.exp())), "that is the "
         "ratio itself, π/π_ref; the reward is its logarithm."),
    ], tol=1e-6)
    return "right on 4 batches, one of them of a very unlikely answer"


@check
def check_grpo_advantages(fn, g):
    """fn(rewards (prompts, group)) -> the same shape: standardised in each group; 0 where all are equal."""
    right = rlhf.grpo_advantages
    mean = lambda r: r.mean(1, keepdim=True)

    def by(middle=mean, spread=lambda r: r.std(1, keepdim=True) + 1e-4, first=lambda r: r):
        return lambda rewards: (first(rewards) - middle(rewards)) / spread(rewards)

    inputs = []
    for P, G in ((4, 4), (2, 6), (3, 5)):  # as many prompts as answers: a wrong broadcast raises no error
        rewards = 2 * normal(g, P, G) + 3 * normal(g, P, 1)
        rewards[-1] = float(whole(g, 0, 1))  # all right or all wrong
        inputs.append((rewards,))
    inputs.append((torch.full((2, 8), 0.7),))  # whose mean is not 0.7 in float32
    compare(fn, right, inputs, [
        (by(spread=lambda r: r.std(1) + 1e-4), "in a table with as many prompts as answers nothing fails, "
         "but your column j is divided by the std of *prompt* j. Look at the shapes on both sides of the "
         "division."),
        (by(middle=lambda r: r.mean(1)), "mean(1) has the shape (prompts,), and broadcasting lays it along "
         "the *answers*: keepdim=True."),
        (by(middle=lambda r: r.mean(1), spread=lambda r: r.std(1) + 1e-4), "mean(1) and std(1) have the "
         "shape (prompts,), and broadcasting lays them along the *answers*: keepdim=True."),
        (tuple(by(spread=lambda r, n=n: r.std(1, keepdim=True, correction=n)) for n in (0, 1)), "a group of "
         "equal rewards has std 0, and 0/0 is NaN, which spreads to all weights. Add a small number to the "
         "std."),
        (by(spread=lambda r: 1.0), "you only subtract the mean (as Dr. GRPO does); here it is divided by the "
         "group's std too."),
        (by(middle=lambda r: r.mean(), spread=lambda r: r.std() + 1e-4), "you standardise over all prompts: "
         "an answer is to be compared with those to the *same* prompt, since some prompts are harder."),
        (by(middle=lambda r: r.mean(0, keepdim=True), spread=lambda r: r.std(0, keepdim=True) + 1e-4),
         "you standardise over the prompts (dim 0); the group is dim 1."),
        (by(spread=lambda r: r.std() + 1e-4), "you divide by the std of the whole table; each group has its "
         "own."),
        (by(spread=lambda r: r.var(1, keepdim=True) + 1e-4), "you divide by the variance; divide by the "
         "std."),
        (by(middle=lambda r: 0.0), "the group's mean is not subtracted."),
        (by(spread=lambda r: r.std(1, keepdim=True, correction=0) + 1e-4), "you divide by the population's standard "
         "deviation; take torch's default, the sample's."),
        (tuple(by(spread=lambda r, e=e: r.std(1, keepdim=True) + e) for e in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)),
         "what you add to the std is too small: eight rewards of 0.7 differ from their mean by rounding, and that is "
         "blown up. Add 1e-4."),
    ], tol=1e-3)
    return "agrees with rlhf.grpo_advantages on 4 tables; groups of equal rewards give 0"


@check
def check_dpo_gradient_weight(fn, g):
    """fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected (B,), beta) -> (B,), σ(−margin)."""
    weight = lambda z: torch.sigmoid(-z)

    def right(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
        return _dpo(weight)(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)

    inputs = [(*(3 * normal(g, 4, B) - 20), uniform(g, 0.1, 0.6)) for B in (2, 5, 8)]
    compare(fn, right, inputs, [
        (_dpo(torch.sigmoid), "σ(margin) is large for pairs that are right already; those that are wrong "
         "pull most, σ(−margin)."),
        (_dpo(lambda z: torch.sigmoid(z) * torch.sigmoid(-z)), "that is the slope of σ; you need that of "
         "−log σ."),
        (lambda *args: args[4] * right(*args), "the factor β stands before the weight in "
         "the gradient; the weight itself is σ(−margin), between 0 and 1."),
        *((_dpo(weight, margin), text) for margin, text in WRONG_MARGINS),
        (_dpo(lambda z: -F.logsigmoid(z)), "that is the loss of each pair; the weight is how steep it is."),
        (_dpo(lambda z: z), "that is the margin; the weight is σ of minus it."),
    ])
    return "right on 3 random batches"


# ---- 09: choosing, measuring ---------------------------------------------------------------------

@check
def check_best_of_n(fn, g):
    """fn(scores (prompts, n)) -> index (prompts,) of the best answer to each prompt."""
    def right(scores):
        return scores.argmax(1)

    inputs = [(normal(g, *shape),) for shape in ((2, 3), (5, 5), (4, 8), (6, 2))]
    compare(fn, right, inputs, [
        (lambda s: s.max(1).values, "these are the best scores; return their places, argmax."),
        (lambda s: s.argmin(1), "these are the worst answers."),
        (lambda s: s.argmax(1) + 1, "you count the places from 1; they run from 0 to n − 1."),
        (lambda s: s.argmax(0), "you choose along the prompts (dim 0); the answers to one prompt are dim 1."),
        (lambda s: s.argmax(), "that is the one best of all; return one per prompt (dim 1)."),
        (lambda s: s.abs().argmax(1), "you take the largest absolute value; a very low score is not good."),
    ], tol=0)
    return "right on 4 random tables"


@check
def check_best_of_n_kl(fn, g):
    """fn(n) -> log n − (n − 1)/n, the most that best-of-n can leave the policy, in nats."""
    def right(n):
        return math.log(n) - (n - 1) / n

    inputs = [(n,) for n in (1, 2, 4, whole(g, 5, 99), 1000)]
    compare(fn, right, inputs, [
        (lambda n: math.log(n), "(n − 1)/n is missing: the best of n is not *one* given answer, but may be "
         "any of them."),
        (lambda n: math.log(n) + (n - 1) / n, "a sign: (n − 1)/n is subtracted."),
        (lambda n: (math.log2(n) - (n - 1) / n) * math.log(2), "you turn both terms into nats, but (n − 1)/n is in nats "
         "already: its integral is of a natural logarithm (9.2)."),
        (lambda n: math.log2(n) - (n - 1) / n, "the first term is not in nats: which logarithm is it?"),
        (lambda n: math.log(n) - (n - 1), "you subtract n − 1; it is (n − 1)/n."),
        (lambda n: math.log(n) - n - 1 / n, "brackets: (n − 1)/n."),
        (lambda n: math.log(n) - 1 / n, "you subtract 1/n; it is (n − 1)/n = 1 − 1/n. At n = 1 all must be "
         "0."),
        (lambda n: math.log(n) - 1, "you subtract 1, the limit for large n; it is (n − 1)/n. At n = 1 all "
         "must be 0."),
    ])
    return "right for n from 1 to 1000"


@check
def check_expected_best(fn, g):
    """fn(gold (N,), scores (N,), n) -> expected gold of the best-scored of n drawn from N without replacement."""
    def expected(values, order, n):
        """The i-th lowest, i = 1 … N, is the best of n with probability C(i − 1, n − 1) / C(N, n)."""
        chance = torch.tensor([math.comb(i, n - 1) / math.comb(len(values), n) for i in range(len(values))])
        return (values[order] * chance).sum()

    def right(gold, scores, n):
        return expected(gold, scores.argsort(), n)

    def replaced(gold, scores, n):
        below = (torch.arange(len(gold) + 1) / len(gold))**n
        return (gold[scores.argsort()] * below.diff()).sum()

    def off_by(shift, size):
        def other(gold, scores, n):
            chance = [math.comb(i + shift, size(n)) / math.comb(len(gold), n) for i in range(len(gold))]
            return (gold[scores.argsort()] * torch.tensor(chance)).sum()
        return other

    def first_n(gold, scores, n):
        return gold[scores[:n].argmax()]

    inputs = [(normal(g, N), normal(g, N), n) for N, n in ((4, 2), (5, 1), (6, 6), (8, 3), (12, 5), (20, 5))]
    inputs[0][1][-1] += 9.0  # so that the best of all is not among the first n
    compare(fn, right, inputs, [
        (replaced, "you draw with replacement, (i/N)^n; here no answer is drawn twice: "
         "C(i − 1, n − 1) / C(N, n), i = 1 … N."),
        (lambda gold, scores, n: expected(gold, gold.argsort(), n), "you choose by the gold score. The "
         "choice is by `scores`; gold only judges it."),
        (lambda gold, scores, n: expected(scores, scores.argsort(), n), "that is the expected *score*; return "
         "the gold of the answer that the score chooses."),
        (lambda gold, scores, n: expected(gold, scores.argsort(descending=True), n), "you sort in descending "
         "order: that is the worst-scored of n."),
        (lambda gold, scores, n: expected(gold, torch.arange(len(gold)), n), "gold is not put in the order "
         "of the scores: gold[scores.argsort()]."),
        (lambda gold, scores, n: expected(gold, scores.argsort().argsort(), n), "argsort twice gives ranks; "
         "to reorder gold, take it once: gold[scores.argsort()]."),
        (off_by(1, lambda n: n), "C(i, n) / C(N, n) is the chance that the best of n is among the i lowest; "
         "the chance that it *is* the i-th, i = 1 … N, is C(i − 1, n − 1) / C(N, n)."),
        (off_by(0, lambda n: n), "you choose n below; the i-th itself is one of the n, so n − 1 come from "
         "the i − 1 below it: C(i − 1, n − 1) / C(N, n), i = 1 … N."),
        (off_by(1, lambda n: n - 1), "your ranks are one too high. C(i − 1, n − 1) / C(N, n) counts i = 1 … "
         "N; in a loop from 0 the i-th place has C(i, n − 1)."),
        (lambda gold, scores, n: right(gold, scores, n) - gold[scores.argmax()] * n / len(gold), "the best-scored of all is "
         "missing: i runs to N, it too; range(n, N + 1)."),
        (lambda gold, scores, n: sum(math.comb(i - 1, n - 1) / math.comb(len(gold), n) * gold[scores.argsort()[i]]
                                     for i in range(n, len(gold))), "i counts from 1 in the formula and from 0 in your "
         "list: the i-th lowest is order[i − 1], and i runs to N, it too."),
        (first_n, "you use only the first n; average over all ways to choose n of the N."),
        (lambda gold, scores, n: gold.mean(), "that is the case n = 1, any answer."),
        (lambda gold, scores, n: gold[scores.argmax()], "that is the best of all N; you need the best of n, "
         "on average."),
        (lambda gold, scores, n: gold[scores.topk(n).indices].mean(), "that is the mean of the n "
         "best-scored; only the best of a random n counts."),
    ], general="none of the mistakes that we know. If you draw at random, compute it exactly instead: "
               "every choice of n is equally likely.")
    return "exact on 6 random samples, n = 1 and n = N among them"


@check
def check_bootstrap(fn, g):
    """fn(values (N,) NumPy, seed) -> (mean, low, high), 95 %, by resampling; 200 resamples or more."""
    ratios, sides, names = [], [], ["values", "seed"]
    for i in range(16):
        N = whole(g, 60, 140)
        values = uniform(g, 1, 3) * normal(g, N).double().numpy() + uniform(g, -2, 2)
        seed, error = whole(g, 0, 10**6), values.std() / math.sqrt(N)
        result = outcome(fn, (values, seed), names)
        if complaint(result, (0.0, 0.0, 0.0)):
            raise Wrong(f"not right yet.\n  likely:    {complaint(result, (0.0, 0.0, 0.0))}")
        mean, low, high = (float(numbers(part)) for part in result)
        told = (f"not right yet.\n  in:        {N} values of mean {values.mean():.4g}, standard deviation "
                f"{values.std():.4g}; seed {seed}\n  out:       ({mean:.4g}, {low:.4g}, {high:.4g})\n"
                "  likely:    ")
        if not low - 1e-6 * error <= mean <= high + 1e-6 * error:
            why = "Return (mean, low, high), in this order."
            if low <= high and abs(low - values.mean()) > 0.25 * error:
                why = ("Both ends lie on one side of it. In which unit does your function for percentiles "
                 "want them?")
            raise Wrong(f"{told}the mean does not lie between low and high. {why}")
        if abs(mean - values.mean()) > 0.25 * error:
            raise Wrong(f"{told}the mean is not that of the values.")
        if high - low < 0.01 * error:
            raise Wrong(f"{told}the interval has no width. Draw *with* replacement (rng.choice): "
                        "without it, every resample holds the same values.")
        ratios.append((high - low) / (2 * 1.96 * error))
        sides.append(((mean - low) / (1.96 * error), (high - mean) / (1.96 * error)))
    ratio = sum(ratios) / len(ratios)
    between = "95 % lie between the percentiles 2.5 and 97.5."
    known = [(1.64 / 1.96, f"That is a 90 % interval: {between}"),
             (1 / 1.96, f"That is one standard error on each side, 68 %: {between}"),
             # These two cannot be told apart by the width.
             (1.364, f"Your resamples look half as large as the sample (draw N), or it is 99 %: {between}")]
    off = [abs(width - 1) > 0.1 for width in np.mean(sides, 0)]
    if not 0.91 < ratio < 1.09 and all(off):
        usual, hint = min(known, key=lambda item: abs(math.log(item[0] / ratio)))
        if ratio > 5:
            hint = "It covers the *values*, not their mean: average every resample, then take percentiles."
        elif abs(math.log(usual / ratio)) > 0.1:
            hint = ("Draw N values with replacement, average, do this 1000 times, and take the percentiles "
                    "2.5 and 97.5 of the averages. With under 200 resamples the ends are too noisy.")
        raise Wrong(f"{told}the interval is {ratio:.2f} times as wide as it should be. {hint}")
    for side, width in zip(("lower", "upper"), np.mean(sides, 0)):
        if abs(width - 1) > 0.1:
            raise Wrong(f"{told}the {side} end is {width:.2f} times as far from the mean as it should be, the other is right: {between}")
    if not same(tuple(outcome(fn, (values, seed), names)), tuple(result), 0):
        raise Wrong(f"{told}the same seed gives another interval: make the generator from the seed, inside.")
    if same(tuple(outcome(fn, (values, seed + 1), names)), tuple(result), 0):
        raise Wrong(f"{told}another seed gives the same interval. Is the seed used, and is it resampling?")
    return "mean, width, and seed are right on 16 random samples"


__all__ = ["Wrong", *(name for name in dir() if name.startswith("check_"))]
