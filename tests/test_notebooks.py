"""notebooks/: the two editions are one, each has its parts, everything runs, and the grader grades."""

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import build
import checks

SOLVED = build.solved()
NAMES = [path.stem for path in SOLVED]
CHECKS = [name for name in dir(checks) if name.startswith("check_")]
SMALL = ("PRETRAIN=--steps 100 --documents 2000 --vocab-size 2048 --width 64 --ffn-width 192",
         "SFT=--conversations 1500 --lr 0.01 --embed-lr 0.01 --head-lr 0.002",  # fewer, and hardly an answer ends
         "PAIRS=--pairs 300 --holdout 110 --max-new-tokens 32",
         "PPO=--iterations 2 --episodes 32 --eval-prompts 16 --prompts 300 "
         "--max-new-tokens 24", "EVALUATE=--per-family 4 --best-of 2 --best-of-per-family 2 --max-new-tokens 16")


def text_of(path):
    return "\n".join(build.source_of(cell) for cell in build.read(path)["cells"])


# ---- the notebooks run (first, as it takes longest) ----------------------------------------------------

@pytest.fixture(scope="module")
def trained():
    """The folder of a finished run: $RUN, as in `make notebooks`, or else one that is made here, smaller still than
    `make quick`, and made again only where it is out of date."""
    root = NOTEBOOKS.parent
    if "RUN" in os.environ or not shutil.which("make") or not (root / ".venv" / "installed").exists():
        folder = root / os.environ.get("RUN", "out")
        if not (folder / "report" / "report.json").exists():
            pytest.skip(f"no finished run in {folder}; and no make, no .venv of it, or RUN is set")
        return folder
    plain = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    there = (root / "out/test/report/report.json").exists()
    made = subprocess.run(["make", "-s" if there else "-n", "--no-print-directory", "OUT=out/test", *SMALL], cwd=root,
                          capture_output=True, text=True, env=plain)
    assert made.returncode == 0, made.stderr[-3000:]
    if not there:  # the stages here, one after another: in so small a run starting seven takes 30 seconds of 75
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            for command in made.stdout.replace("\\\n", "").splitlines():
                if command.startswith(".venv/bin/python "):
                    patch.setattr(sys, "argv", shlex.split(command)[1:])
                    runpy.run_path(sys.argv[0], run_name="__main__")
                else:
                    subprocess.run(command, shell=True, check=True)
    return root / "out/test"


def test_the_solved_edition_runs(trained):
    """With few steps."""
    ran = subprocess.run([sys.executable, NOTEBOOKS / "build.py", "run", *SOLVED], capture_output=True, text=True,
                         env={**os.environ, "RUN": str(trained), "FAST": "1"}, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-3000:]  # which names the notebook
    _, *printed = re.split(r"^== (.*\.ipynb)\n", ran.stdout, flags=re.M)
    printed = dict(zip(printed[::2], printed[1::2]))
    for path in SOLVED:
        assert printed[path.name].count("✓") >= len(re.findall(r"^check_", text_of(path), re.M)), path.name


def test_the_student_edition_stops_at_its_first_gap(trained, monkeypatch):
    monkeypatch.setenv("RUN", str(trained))
    monkeypatch.setenv("FAST", "1")
    monkeypatch.chdir(NOTEBOOKS)  # where build.run goes
    monkeypatch.delitem(sys.modules, "start", raising=False)
    start, threads = importlib.import_module("start"), torch.get_num_threads()
    for path in SOLVED:
        with pytest.raises((start.Unfilled, checks.Wrong)):
            build.run(NOTEBOOKS / path.name)
        start.plt.close("all")
    torch.set_num_threads(threads)


# ---- the two editions, and the map -----------------------------------------------------------------

@pytest.mark.parametrize("path", SOLVED, ids=NAMES)
def test_the_student_edition_is_made_from_the_solved_one(path, tmp_path):
    build.write(tmp_path / "made.ipynb", build.student_edition(build.read(path)))
    assert (tmp_path / "made.ipynb").read_text("utf-8") == (NOTEBOOKS / path.name).read_text("utf-8"), "run build.py student"


@pytest.mark.parametrize("path", SOLVED, ids=NAMES)
def test_a_notebook_has_what_every_notebook_has(path):
    cells, text = build.read(path)["cells"], text_of(path)
    assert len(cells) <= 30
    assert "from start import *" in text
    for kind in ("derive", "implement", "hunt", "measure"):
        assert re.search(rf"### Exercise [\d.]+ \({kind}", text), kind
    assert set(re.findall(r"\bcheck_\w+", text)) <= {*CHECKS, *re.findall(r"def (check_\w+)", text)}
    assert not re.search(r"/(home|root|tmp|work|Users)/", json.dumps(cells)), "a path of one machine"
    assert "SOLUTION" not in text_of(NOTEBOOKS / path.name)


def test_a_plain_reward_model_is_made_where_there_is_none(tmp_path, monkeypatch):
    start, calls, (reward, plain) = importlib.import_module("start"), [], (tmp_path / "reward", tmp_path / "reward_plain")

    def call(command, **_):
        calls.append([str(word) for word in command])
        plain.mkdir(exist_ok=True)
        (plain / "done").touch()
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(start, "RUN", tmp_path)
    monkeypatch.setattr(start.subprocess, "run", call)
    reward.mkdir()
    (tmp_path / "pairs.jsonl").touch()
    (reward / "settings").write_text("--seed 2 --surprisal --warmup 2\n")
    (reward / "config.json").write_text('{"model_type": "qwen3"}')
    assert start.plain_reward() == reward and not calls  # it is plain itself
    (reward / "config.json").write_text('{"reader": {}}')
    for newer, made in ((-9, 1), (-9, 1), (9, 2)):  # the third time the pairs are newer than what was made
        if calls:
            when = (plain / "done").stat().st_mtime + newer
            os.utime(tmp_path / "pairs.jsonl", (when, when))
        assert start.plain_reward() == plain and len(calls) == made
    assert calls[0][-7:] == [str(plain), "--seed", "2", "--surprisal", "--warmup", "2", "--no-surprisal"]
    (tmp_path / "pairs.jsonl").unlink()
    assert start.plain_reward() == plain and len(calls) == 2


def test_the_index_of_exercises_is_that_of_the_notebooks():
    there = re.findall(r"^### Exercise ([\d.]+) \((\w+), (\d+) minutes, (\w+)\)", "\n".join(map(text_of, SOLVED)), re.M)
    readme = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([\d.]+) \| (\w+) \| (\d+) \| (\w+) \|", readme, re.M) == there


def test_what_the_map_names_is_there():
    root, readme = NOTEBOOKS.parent, (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?\w+\.py): (\w+)`((?:, `\w+`)*)", readme)
    assert len(named) > 30
    for file, first, more in named:
        path = root / ("tests" if file.startswith("test_") else ".") / file
        for name in [first, *re.findall(r"\w+", more)]:
            assert re.search(rf"^\s*(?:def|class) {name}\b|^\s*{name}: |^{name} =", path.read_text(encoding="utf-8"), re.M), (file, name)


def test_code_that_stored_outputs_show_is_still_the_code():
    shown = [re.match(r"(\w+\.py), line (\d+)\n(.*)", "".join(output.get("data", {}).get("text/plain", "")), re.S)
             for path in SOLVED for cell in build.read(path)["cells"] for output in cell.get("outputs", ())]
    assert len(found := [match for match in shown if match]) >= 4
    for file, line, code in map(re.Match.groups, found):
        lines = (NOTEBOOKS.parent / file).read_text(encoding="utf-8").split("\n")[int(line) - 1:]
        assert lines[:len(code.split("\n"))] == code.split("\n"), f"{file}, line {line}: execute that notebook again"


def test_solutions_become_gaps_and_bugs():
    code = ("# EXERCISE 7.2 · hunt\ndef f(x):\n    ### BEGIN SOLUTION: add one\n    return x + 1\n    ### END SOLUTION\n"
            "### BEGIN SOLUTION\nguess = 3\n### STUDENT\n# guess = None  # yours\n### END SOLUTION\nf(2)")
    assert build.student_code(code) == ('# EXERCISE 7.2 · hunt\ndef f(x):\n    todo("7.2", "add one")\n'
                                        "guess = None  # yours\nf(2)")
    with pytest.raises(ValueError, match="unpaired"):
        build.student_code("### BEGIN SOLUTION\nx = 1")


def test_what_is_handed_in_is_one_thing_that_is_there(tmp_path):
    spec = importlib.util.spec_from_file_location("of_notebooks", NOTEBOOKS / "conftest.py")
    spec.loader.exec_module(conftest := importlib.util.module_from_spec(spec))
    (tmp_path / "solutions.py").touch()
    for handed_in, right in (([tmp_path / "nothing"], False), ([], False), ([NOTEBOOKS, tmp_path], False), ([tmp_path], True)):
        config = SimpleNamespace(args=[str(NOTEBOOKS / "grade.py"), *map(str, handed_in)], stash={}, option=SimpleNamespace())
        with nullcontext() if right else pytest.raises(pytest.UsageError, match="expected one folder of notebooks"):
            conftest.pytest_configure(config)


def test_definitions_are_found_and_only_they_are_run(tmp_path):
    file, definitions = tmp_path / "solutions.py", importlib.import_module("grade").definitions
    file.write_text("def best_of_n_kl(n):\n    import math\n    return math.log(n) - (n - 1) / n\n", encoding="utf-8-sig")
    assert definitions(file)[0]["best_of_n_kl"](1) == 0  # Windows' editors begin with a BOM
    file.write_text("SIX: int = 3 - -3\ntraining_flops = lambda parameters, tokens: SIX * parameters * tokens\n")
    assert definitions(file)[0]["training_flops"](2, 3) == 36
    file.write_text("def noise_ceiling(:\n")
    assert "the cell is not Python" in definitions(file)[1]["noise_ceiling"]
    two = "def noise_ceiling(labels=exit()):\n    return 1\n", "noise_ceiling = lambda labels: 2\n"
    for first, second in (two, two[::-1]):  # the last attempt counts
        file.write_text(first + second)
        space, broken = definitions(file)
        assert ("noise_ceiling" in space) is (second == two[1]) is ("noise_ceiling" not in broken)
    file.write_text("def noise_ceiling(labels=exit()):\n    return 1\n")
    assert "SystemExit" in definitions(file)[1]["noise_ceiling"]
