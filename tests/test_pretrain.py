"""pretrain.py: its measure, counted directly. That it learns is test_pipeline.py's business."""

import math
import sys

import pytest
import torch

import data
import pretrain
import training
from model import GPT, GPTConfig
from pretrain import heldout_loss, next_token_loss
from tokenizer import Tokenizer, train_bpe
from training import InputError

DOCUMENTS = ["The cat sat on the mat.", "Where is Zürich?\nIt is in Switzerland.", "Yes."]


def test_next_token_loss_is_as_exact_as_its_logits():
    torch.manual_seed(0)
    targets = torch.randint(300, (4, 9))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
        logits = (4 * torch.randn(4, 9, 300)).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which must not matter
            loss = next_token_loss(lambda _: logits, None, targets)
        loss.backward()
        exact = logits.detach().double().requires_grad_()
        expected = -exact.log_softmax(-1).gather(-1, targets[..., None]).mean()
        expected.backward()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=tolerance)
        assert (logits.grad - exact.grad).norm() < 2 * tolerance * exact.grad.norm()


@pytest.mark.parametrize("vocab_size", [260, 290])
def test_bits_per_byte_are_nats_over_ln_2_and_bytes(vocab_size, monkeypatch):
    """One token at a time, each with the window before it, under two tokenisers."""
    tokenizer = train_bpe(DOCUMENTS * 4, vocab_size)
    tokens, size = data.pack_documents(DOCUMENTS, tokenizer)
    assert size == sum(len(text.encode("utf-8")) for text in DOCUMENTS) > sum(map(len, DOCUMENTS))
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, context_length=7, layers=1, heads=2, kv_heads=1, width=16, ffn_width=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    total, ids = 0.0, tokens.tolist()
    for t in range(1, len(ids)):
        start = (t - 1) // 7 * 7
        logprobs = model(torch.tensor([ids[start:t]]))[0, -1].double().log_softmax(-1)
        total -= logprobs[ids[t]].item()
    for most in (pretrain.LOGITS, 3 * 7 * tokenizer.vocab_size):  # all windows in one batch, then three in each
        monkeypatch.setattr(pretrain, "LOGITS", most)
        nats, bits = heldout_loss(model, tokens, size)
        assert nats == pytest.approx(total / (len(ids) - 1), rel=1e-5)
        assert bits == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_the_logits_of_the_held_out_loss_are_bounded(monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, context_length=20, layers=1, heads=2, kv_heads=1, width=16, ffn_width=8))
    tokens, rows, head = torch.randint(300, (90,)), [], model.head
    expected = heldout_loss(model, tokens, 100)
    monkeypatch.setattr(model, "head", lambda hidden: rows.append(len(hidden)) or head(hidden))
    monkeypatch.setattr(pretrain, "LOGITS", 7 * 300)
    assert heldout_loss(model, tokens, 100) == pytest.approx(expected, rel=1e-5)
    assert max(rows) == 7 and sum(rows) == 89


def test_held_out_windows_may_be_shorter_than_the_context():
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, context_length=20, layers=1, heads=2, kv_heads=1, width=16, ffn_width=8))
    for parameter in model.parameters():  # a fresh block would be the identity, and look at nothing before
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(300, (91,))
    by_hand = sum(next_token_loss(model, w[None, :-1], w[None, 1:]).item() for w in tokens.unfold(0, 4, 3)) / 30  # each of 3
    assert heldout_loss(model, tokens, 100, 3)[0] == pytest.approx(by_hand, rel=1e-5)
    assert heldout_loss(model, tokens, 100)[0] != pytest.approx(by_hand, rel=1e-2)


def test_without_a_compiler_training_goes_on_uncompiled(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no C++ compiler")
    monkeypatch.setattr(torch, "compile", broken)
    assert training.compiled(len, True, "cpu") is len
    assert "does not work here (RuntimeError)" in capsys.readouterr().out


def test_compiling_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda *arguments: "compiled")
    assert training.compiled(len, False, "cpu") is len
    assert training.compiled(len, True, "cpu")([]) == "compiled"


def test_a_shape_that_does_not_fit_is_refused_before_the_text_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--data", str(tmp_path / "none.txt"), "--heads", "2", "--kv-heads", "4"])
    with pytest.raises(InputError, match="heads 2 is not a multiple of kv_heads 4"):
        pretrain.main()


def test_the_world_is_drawn_with_the_seed(monkeypatch):
    asked = []
    monkeypatch.setattr(pretrain.world, "documents", lambda n, seed: asked.append((n, seed)) or ["The cat sat on the mat."] * 20)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--documents", "9", "--seed", "3", "--show-batch", "--context-length", "4",
                                      "--vocab-size", "270", "--device", "cpu"])
    pretrain.main()
    assert asked == [(9, 3)]


def test_flags_of_the_shape_arrive():
    asked = {"context_length": 33, "layers": 3, "width": 24, "heads": 6, "kv_heads": 2, "ffn_width": 40, "qk_norm": False,
             "tied": True}
    shape = pretrain.shape_of(pretrain.Config(**asked), 300)
    assert {name: getattr(shape, name) for name in (*asked, "vocab_size")} == {**asked, "vocab_size": 300}
    default = pretrain.shape_of(pretrain.Config(), 300)
    assert default.qk_norm and not default.tied and default.kv_heads == default.heads


def test_a_stream_trains_on_what_is_not_held_out(monkeypatch, tmp_path):
    documents = [f"Line {n} tells of {n * n} birds." for n in range(300)]
    (tmp_path / "big.txt").write_text("<|endoftext|>".join(documents))
    monkeypatch.setattr(sys, "argv", [
        "pretrain.py", "--data", str(tmp_path / "big.txt"), "--stream", "--holdout", "0.1", "--steps", "2", "--layers", "1",
        "--width", "16", "--heads", "2", "--kv-heads", "2", "--ffn-width", "32", "--vocab-size", "300",
        "--context-length", "32", "--batch-size", "4", "--device", "cpu", "--compile", "--out", str(tmp_path / "out")])
    asked, used = [], []
    monkeypatch.setattr(pretrain, "compiled", lambda function, wanted, device: asked.append(wanted) or (
        lambda *args: used.append(1) or function(*args)))
    pretrain.main()
    assert asked == [True] and len(used) == 2  # what torch.compile gave is what trains
    first, heldout, _ = data.open_large([tmp_path / "big.txt"], 0.1)
    tokens, _ = data.pack_documents(first, Tokenizer.load(tmp_path / "out"))
    assert first + heldout == documents and (tmp_path / "out" / "tokens.bin").stat().st_size == 4 * len(tokens)
