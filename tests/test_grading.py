"""notebooks/grade.py: every function handed in gets a verdict of its own. (The rest of notebooks/: test_notebooks.py.)"""

import io
import re
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from test_notebooks import CHECKS, NOTEBOOKS, SOLVED, build, text_of


def grade(*submission):
    """-> (exit status, what is printed, {exercise and function: "✓", "✗" or "–"}). Not in a process of its own, which
    would first have to import torch."""
    sys.modules.pop("grade", None)  # which has read GRADE_SECONDS
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
        status = pytest.main([str(NOTEBOOKS / "grade.py"), *map(str, submission)])
    return status, printed.getvalue(), {f"{number} {name}": sign for sign, number, name in re.findall(
        r"^  ([✓✗–]) ([\d.]+) +(\w+)", printed.getvalue(), re.M)}


def test_grading_passes_the_solved_edition_and_nothing_of_the_students():
    status, printed, solved = grade(NOTEBOOKS / "solved")
    assert status == 0 and set(solved.values()) == {"✓"}, printed
    assert re.search(rf"^together +{len(solved)} of {len(solved)}$", printed, re.M), printed
    status, printed, unsolved = grade(NOTEBOOKS)
    assert status == 1 and set(unsolved.values()) == {"✗", "–"}, printed
    assert re.search(rf"^together +0 of {len(solved)}$", printed, re.M), printed
    assert list(unsolved) == list(solved)
    assert len({name for path in SOLVED for name in re.findall(r"^(check_\w+)", text_of(path), re.M)
                if name in CHECKS}) == len(CHECKS), "a check that no notebook uses"


def test_grading_a_file_gives_each_function_its_own_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADE_SECONDS", "2")
    file, endless = tmp_path / "solutions.py", hasattr(signal, "alarm")  # which Windows has not
    file.write_text("import math\nraise SystemExit('not run')\n"
                    "def noise_ceiling(labels):\n    return undefined\n"
                    "@undefined\ndef win_rate(a, b):\n    return 0.5\n"
                    "def best_of_n_kl(n):\n    return math.log2(n) - (n - 1) / n\n"
                    "def training_flops(parameters, tokens):\n    return 6 * parameters * tokens\n"
                    + "def bits_per_byte(nats, tokens, text):\n    while True:\n        try:\n            1 / 0\n"
                      "        except Exception:\n            pass\n" * endless)
    _, printed, found = grade(file)
    assert {name: sign for name, sign in found.items() if sign != "–"} == {
        "3.8 training_flops": "✓", "6.4 noise_ceiling": "✗", "0.3 win_rate": "✗", "9.3 best_of_n_kl": "✗",
        **({"1.5 bits_per_byte": "✗"} if endless else {})}, printed
    assert ("a loop that never ends?" in printed) is endless
    assert "which logarithm" in printed and "NameError" in printed and "its definition fails" in printed
    two = build.read(NOTEBOOKS / "solved" / "00_the_method.ipynb")
    two["cells"].insert(0, build.tidy("code", "def win_rate(a, b):\n    return (a\n", 99))  # the later cell is right
    build.write(tmp_path / "00_the_method (1).ipynb", two)
    found = grade(tmp_path / "00_the_method (1).ipynb")[-1]
    assert found["0.3 win_rate"] == "✓" and found["9.3 best_of_n_kl"] == "–"
    (tmp_path / "01_tokens_and_next_token_loss.ipynb").write_text("<html>")
    _, printed, found = grade(tmp_path)
    assert found["0.3 win_rate"] == "✓" and found["9.3 best_of_n_kl"] == "✗"  # the one in solutions.py
    assert "01_tokens_and_next_token_loss.ipynb is not a notebook" in printed
    assert "expected one folder of notebooks" in grade(NOTEBOOKS, tmp_path)[1]
