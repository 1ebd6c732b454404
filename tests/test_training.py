"""The optimiser, its schedule, and what a process does once."""

import argparse
import dataclasses
import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pretrain
import sft
import training
from model import GPT, GPTConfig
from tokenizer import train_bpe
from training import (STATE, InputError, autocast, finish, join_processes, learning_rate, micro_batches, muon_and_adam,
                      orthogonal_blocks, parse_args, restore, save_checkpoint, save_state, seed_everything, set_share,
                      start_run)

ROOT = Path(__file__).parent.parent


def test_every_square_block_becomes_nearly_orthogonal():
    torch.manual_seed(0)
    shapes = ((24, 8), (8, 8), (8, 20), (16, 16))  # stacked, square, wide and uneven, another side
    matrices = [torch.randn(shape) for shape in shapes]
    for matrix, result in zip(matrices, orthogonal_blocks(matrices)):
        assert result.shape == matrix.shape
        tall, made = (m if m.size(0) >= m.size(1) else m.mT for m in (matrix, result))
        side = tall.size(1)
        for start in range(0, tall.size(0) - side + 1, side):
            before, after = tall[start:start + side], made[start:start + side]
            values = torch.linalg.svdvals(after)
            assert values.max() < 1.4 and values.median() > 0.5
            u, _, v = torch.linalg.svd(before)  # the nearest orthogonal matrix is u v
            assert (after * (u @ v)).sum() / side > 0.6


def test_matrices_together_are_matrices_alone():
    torch.manual_seed(1)
    matrices = [torch.randn(shape) for shape in ((12, 4), (4, 4), (4, 10), (6, 6))]
    for matrix, together in zip(matrices, orthogonal_blocks(matrices)):
        torch.testing.assert_close(together, orthogonal_blocks([matrix])[0])


def test_muon_and_adam_take_every_parameter_once_and_learn():
    torch.manual_seed(2)
    model = GPT(GPTConfig(vocab_size=16, width=16, ffn_width=32, layers=1, heads=2, kv_heads=2,
                          tied=False))
    muon, adam = muon_and_adam(model, 0.02, 0.02, 0.004, 0.1)
    taken = [id(p) for o in (muon, adam) for group in o.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())
    set_share(1.0, muon, adam)
    ids = torch.randint(16, (4, 12))
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        loss.backward()
        muon.step()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("eps, moves", [(1e-8, True), (1e-3, False)])
def test_a_large_epsilon_spares_words_that_do_not_occur(eps, moves):
    """Such a word's row of the head gets a tiny gradient of constant sign."""
    model = GPT(GPTConfig(vocab_size=16, width=16, ffn_width=32, layers=1, heads=2, kv_heads=2,
                          tied=False))
    _, adam = muon_and_adam(model, 0.02, 0.02, 0.001, 0.0, eps)
    set_share(1.0, adam)
    row = model.lm_head.weight[7].clone()
    for _ in range(10):
        model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 1e-5)
        model.lm_head.weight.grad[3] = 1e-2  # a word that does occur
        adam.step()
    moved = (model.lm_head.weight[7] - row).abs().mean().item() / 0.001  # in steps at the full rate
    assert moved == pytest.approx(10, rel=0.01) if moves else moved < 0.2


def test_a_rare_word_at_its_right_frequency_stays_where_it_is():
    """Its gradients, one large in 200 steps and small ones between, add up to 0."""
    model = GPT(GPTConfig(vocab_size=16, width=16, ffn_width=32, layers=1, heads=2, kv_heads=2, tied=False))
    _, adam = muon_and_adam(model, 0.02, 0.02, 0.001, 0.0)
    set_share(1.0, adam)
    for step in range(1200):
        if step == 400:
            row = model.lm_head.weight[7].clone()
        model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, -1 if step % 200 == 0 else 1 / 199)
        adam.step()
    assert (model.lm_head.weight[7] - row).abs().max().item() / 0.001 / 800 < 0.1  # of the full rate


@pytest.mark.parametrize("step, share", [(0, 0.1), (9, 1.0), (49, 1.0), (60, 0.8), (99, 0.02)])
def test_schedule_rises_stays_and_falls(step, share):
    assert learning_rate(step, 100, 1.0, warmup=10, decay=50) == pytest.approx(share)


def test_help_names_every_default_once(capsys):
    @dataclasses.dataclass
    class Config:
        on: bool = training.flag(True, "a switch")
        off: bool = training.flag(False, "another")
        either: bool = training.flag(False, "one that can be said both ways", action=argparse.BooleanOptionalAction)
        rank: int | None = training.flag(None, "of a matrix")
        few: int | None = training.flag(None, "of many (default: all)")
        names: list[str] = training.flag(["a", "b"], "two")
    with pytest.raises(SystemExit):
        training.parse_args(Config, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("a switch (default: on)", "another --", "both ways (default: off)", "of a matrix (default: none)", "of many (default: all) --",
                  "two (default: a b)"):
        assert words in said + " --", words
    with pytest.raises(SystemExit):
        training.parse_args(Config, ["--name", "c"])  # it might mean another flag tomorrow
    assert "unrecognized arguments: --name" in capsys.readouterr().err


@pytest.mark.parametrize("steps, shares", [(1, [1]), (2, [1, 1]), (3, [1, 1, 0.5]), (6, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3])])
def test_a_run_shorter_than_its_warm_up_reaches_its_peak_and_falls(steps, shares):
    assert [learning_rate(step, steps, 1.0, warmup=10) for step in range(steps)] == pytest.approx(shares)


def test_micro_batches_are_all_rows_with_shares_that_add_up():
    parts = micro_batches(list(range(10)), 4)
    assert [part for part, _ in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [share for _, share in parts] == [0.4, 0.4, 0.2]
    assert micro_batches(range(3), None) == [(range(3), 1.0)]


@pytest.mark.parametrize("busy", [range(0), range(10), range(5, 15), range(10, 20)])
@pytest.mark.parametrize("bfloat16, chosen", [(0.5, True), (0.9, False), (100, False)])
def test_precision_is_measured_and_other_work_does_not_decide(busy, bfloat16, chosen, monkeypatch):
    """On a clock of our own: a product in float32 takes 2 ms, one in bfloat16 that many times as long, and
    both five times as long while the machine does other work."""
    clock, products = [0.0], []

    class Matrix:
        def __init__(self, *shape, dtype, device):
            self.seconds = 0.002 * (bfloat16 if dtype == torch.bfloat16 else 1)

        def __matmul__(self, other):
            clock[0] += self.seconds * (5 if len(products) in busy else 1)
            products.append(self)
            return torch.zeros(1, 1)

    monkeypatch.setattr(torch, "ones", Matrix)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert isinstance(autocast(torch.device("cpu")), torch.autocast) == chosen
    assert len(products) <= 4 or bfloat16 < 100  # where it is emulated, two turns are enough


@pytest.mark.parametrize("cuda, taken", [(True, "cuda"), (False, "cpu")])
def test_no_flag_means_a_device_that_was_tried(cuda, taken, monkeypatch):
    """MPS, which nobody has run this code on, is taken only by those who ask for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert training.pick_device("auto").type == taken
    assert training.pick_device("mps").type == "mps"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_is_kept():
    # In a process of its own: what is freed elsewhere counts too. Three tensors of 16 MB at a time: 12,288 pages, which soon need not be fetched again.
    code = """if True:
        import resource, torch, training
        training.keep_freed_memory()
        for count in (20, 10):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(count):
                [torch.ones(2**22) for _ in range(3)]
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                           text=True, check=True)
    assert int(found.stdout) < 4096


@pytest.mark.parametrize("seconds, fast, turns", [
    ([(2, 1)] * 10, True, 10), ([(1.2, 1)] * 10, False, 10),
    ([(2, 50), *[(2, 1)] * 9], True, 10),  # the first turn warms up
    ([*[(9, 9)] * 5, (2, 1), *[(9, 9)] * 4], True, 10),  # other load slows all turns but one
    ([(0.1, 2)] * 10, False, 2),  # emulated
])
def test_bfloat16_is_used_where_it_is_faster(seconds, fast, turns, monkeypatch):
    """`seconds` that float32 and bfloat16 take, turn by turn."""
    now, taken = 0, []
    for pair in seconds:
        for each in pair:
            taken += [now, now := now + each]
    ticks = iter(taken)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert training.bfloat16_is_fast(torch.device("cpu")) is fast
    assert len([*ticks]) == 4 * (10 - turns)


def test_optimisers_step_without_the_compiler_and_as_they_should():
    # In processes of their own: here, some other test may have imported the compiler.
    code = """if True:
        import sys, torch
        {first}
        ends = []
        for fused in (True, False):  # without no_grad, only the second fails
            p = torch.nn.Parameter(torch.ones(3))
            made = torch.optim.AdamW([p], lr=0.1, weight_decay=0.5, fused=fused)
            for _ in range(3):
                made.zero_grad()
                (p * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
                made.step()
            made.load_state_dict(made.state_dict())
            ends.append(p.tolist())
        print("torch._dynamo" in sys.modules, ends)"""
    plain, ours = (subprocess.run([sys.executable, "-c", code.format(first=first)], cwd=ROOT, text=True,
                                  capture_output=True, check=True).stdout.split(maxsplit=1)
                   for first in ("", "import training"))
    assert ours[0] == "False" and ours[1] == plain[1]  # to the last digit
    for end in json.loads(ours[1]):  # a constant gradient moves by the rate, after a decay of 1 − 0.1 · 0.5: three times
        assert end == pytest.approx([0.95**3 - 0.1 * 2.8525] * 2 + [0.95**3 + 0.1 * 2.8525], rel=1e-5)


def pretraining(folder, out, *more):
    """The words of pretrain.py on a small text in `folder`."""
    text = folder / "text.txt"
    if not text.exists():  # a younger file stops --resume
        text.write_text("<|endoftext|>".join(f"Line {n} tells of {n * n} birds." for n in range(300)))
    return [str(ROOT / "pretrain.py"), "--data", str(text), "--layers", "1", "--width", "16", "--heads", "2", "--kv-heads",
            "2", "--ffn-width", "32", "--vocab-size", "300", "--context-length", "32", "--batch-size", "4", "--device",
            "cpu", "--dtype", "float32", "--out", str(folder / out), *more]


def start_pretraining(folder, out, processes, *more):
    """Alone or under torchrun over gloo -> the process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    return subprocess.Popen([sys.executable, *launcher, *pretraining(folder, out, *more)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def logged(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def same_losses(one, two, tolerance):
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for alone, together in zip(one, two):
        for name in {"loss", "gradient_norm", "heldout_loss"} & alone.keys():
            assert together[name] == pytest.approx(alone[name], rel=tolerance), (name, alone["step"])
    assert one[0]["loss"] > one[-2]["loss"] + 0.5  # and there was something to learn


def test_a_second_ctrl_c_stops_at_once_but_not_an_echo_of_the_first(monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    stop = training.StopRequest()
    assert not stop
    stop._ask(2, None)
    assert "Ctrl-C again" in capfd.readouterr().err  # before the step is over, which may take a minute
    now[0] += 0.5
    try:
        stop._ask(2, None)  # torchrun hands it on
    except KeyboardInterrupt:  # would end pytest itself
        pytest.fail("an echo of the first stopped at once")
    assert stop
    now[0] += 1
    with pytest.raises(KeyboardInterrupt):
        stop._ask(2, None)


def test_a_save_of_another_device_is_refused_with_one_line():
    generator = torch.Generator()
    saved = {"modules": {}, "generator": torch.zeros(16, dtype=torch.uint8),  # of the size that CUDA has
             "torch_rng": torch.get_rng_state(), "python_rng": random.getstate(), "numpy_rng": np.random.get_state(),
             "position": 3, "seconds": 1.0}
    with pytest.raises(InputError, match="another kind of --device"):
        restore(saved, generator, {})
    assert restore({**saved, "generator": generator.get_state()}, generator, {}) == (3, 1.0)


def test_a_reward_function_that_draws_goes_on_drawing(tmp_path):
    config = dataclasses.make_dataclass("Config", ["out"])(str(tmp_path))
    draws = [lambda: random.gauss(0, 1), np.random.standard_normal, lambda: torch.rand(()).item()]
    generator = seed_everything(5)
    [draw() for draw in draws]
    save_state(config, "ppo", 1, 0.0, generator, {})
    expected = [draw() for draw in draws]
    seed_everything(5)
    restore(torch.load(tmp_path / STATE, weights_only=True), generator, {})
    assert [draw() for draw in draws] == expected


def test_muon_decays_by_what_it_is_told():
    model = GPT(GPTConfig(50, layers=1, width=16, heads=2, ffn_width=32))
    muon, _ = muon_and_adam(model, 0.1, 0.1, 0.1, 0.3)
    set_share(1.0, muon)
    matrix = model.blocks[0].mlp.down.weight
    torch.nn.init.normal_(matrix)
    before = matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    muon.step()
    torch.testing.assert_close(matrix.detach(), (1 - 0.1 * 0.3) * before)


def test_a_folder_says_where_answers_end(tmp_path):
    """Other programs stop at these, and at nothing else."""
    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 280)
    save_checkpoint(tmp_path, GPT(GPTConfig(tokenizer.vocab_size, layers=1, width=16, heads=2, ffn_width=32)), tokenizer)
    said = [json.loads((tmp_path / name).read_text("utf-8")) for name in ("generation_config.json", "config.json")]
    assert sorted(said[0]["eos_token_id"]) == sorted([tokenizer.endoftext_id, tokenizer.im_end_id])
    assert said[1]["eos_token_id"] == tokenizer.im_end_id and {part["pad_token_id"] for part in said} == {tokenizer.pad_id}


def test_only_pretraining_shares_its_work(tmp_path, monkeypatch):
    config = parse_args(sft.Config, ["--out", str(tmp_path / "sft")])
    start_run(config, "sft")
    monkeypatch.setenv("WORLD_SIZE", "2")
    start_run(config, "sft")  # some clusters set this without torchrun
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="found 2 processes"):
        start_run(config, "sft")
    start_run(parse_args(pretrain.Config, ["--out", str(tmp_path / "base")]), "pretrain")


def test_a_run_that_dies_at_its_end_is_finished_or_can_go_on(tmp_path, monkeypatch):
    (tmp_path / STATE).touch()
    monkeypatch.setattr(training, "write_atomic", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finish(tmp_path, "sft", 1.0)
    assert (tmp_path / STATE).exists()
    monkeypatch.undo()
    finish(tmp_path, "sft", 1.0)
    assert not (tmp_path / STATE).exists() and json.loads((tmp_path / "done").read_text())["stage"] == "sft"


def test_processes_are_counted_by_machine(monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit):
        training.leave(pretrain.Config(), training.progress(1, 0, "pretrain"))
    assert "torchrun --nproc_per_node 8 pretrain.py --resume" in capsys.readouterr().err


def test_what_some_clusters_set_makes_no_group(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
        assert join_processes(torch.device("cpu")) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # or each of the two would train into the same folder
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        join_processes(torch.device("cpu"))


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="found 1 GPUs"):
        join_processes(torch.device("cuda"))


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    together = start_pretraining(tmp_path, "two", 2, "--steps", "30")
    monkeypatch.setattr(sys, "argv", pretraining(tmp_path, "one", "--steps", "30"))
    pretrain.main()
    said = together.communicate()[1]
    assert together.returncode == 0, said[-3000:]
    same_losses(logged(tmp_path / "one"), logged(tmp_path / "two"), 1e-4)


@pytest.mark.slow
def test_a_run_goes_on_with_more_or_fewer_processes(tmp_path):
    """Stopped twice: two processes, then one, then two again, end where one would have."""
    steps = ["--steps", "70", "--resume", "--batch-size", "64", "--width", "64"]  # slow enough to be stopped
    for processes in (2, 1):
        before = len(logged(tmp_path / "changing"))
        run = start_pretraining(tmp_path, "changing", processes, *steps)
        while run.poll() is None and len(logged(tmp_path / "changing")) < before + 2:
            time.sleep(0.02)
        run.terminate()
        said = run.communicate()[1]
        assert run.returncode != 0 and "stopped and saved" in said, said
    assert 30 < logged(tmp_path / "changing")[-1]["step"] < 70
    for out, processes in (("changing", 2), ("one", 1)):
        assert start_pretraining(tmp_path, out, processes, *steps).wait() == 0
    same_losses(logged(tmp_path / "one"), logged(tmp_path / "changing"), 1e-3)
