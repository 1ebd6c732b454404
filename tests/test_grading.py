"""notebooks/grade.py: every function handed in gets a verdict of its own. (The rest of notebooks/: test_notebooks.py.)"""

import re
import signal
import subprocess
import sys

import pytest

from test_notebooks import CHECKS, NOTEBOOKS, SOLVED, build, text_of


def grade(*submission):
    """-> (the finished process, {exercise and function: "✓", "✗" or "–"})."""
    ran = subprocess.run([sys.executable, "-m", "pytest", NOTEBOOKS / "grade.py", *submission], capture_output=True,
                         text=True, cwd=NOTEBOOKS)
    return ran, {f"{number} {name}": sign for sign, number, name in
                 re.findall(r"^  ([✓✗–]) ([\d.]+) +(\w+)", ran.stdout, re.M)}


def test_grading_passes_the_solved_edition_and_nothing_of_the_students():
    ran, solved = grade(NOTEBOOKS / "solved")
    assert ran.returncode == 0 and set(solved.values()) == {"✓"}, ran.stdout
    assert re.search(rf"^together +{len(solved)} of {len(solved)}$", ran.stdout, re.M), ran.stdout
    ran, unsolved = grade(NOTEBOOKS)
    assert ran.returncode == 1 and set(unsolved.values()) == {"✗", "–"}, ran.stdout
    assert re.search(rf"^together +0 of {len(solved)}$", ran.stdout, re.M), ran.stdout
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
    ran, found = grade(file)
    assert {name: sign for name, sign in found.items() if sign != "–"} == {
        "3.8 training_flops": "✓", "6.4 noise_ceiling": "✗", "0.3 win_rate": "✗", "9.3 best_of_n_kl": "✗",
        **({"1.5 bits_per_byte": "✗"} if endless else {})}, ran.stdout
    assert ("a loop that never ends?" in ran.stdout) is endless
    assert "which logarithm" in ran.stdout and "NameError" in ran.stdout and "its definition fails" in ran.stdout
    two = build.read(NOTEBOOKS / "solved" / "00_the_method.ipynb")
    two["cells"].insert(0, build.tidy("code", "def win_rate(a, b):\n    return (a\n", 99))  # the later cell is right
    build.write(tmp_path / "00_the_method (1).ipynb", two)
    found = grade(tmp_path / "00_the_method (1).ipynb")[1]
    assert found["0.3 win_rate"] == "✓" and found["9.3 best_of_n_kl"] == "–"
    (tmp_path / "01_tokens_and_next_token_loss.ipynb").write_text("<html>")
    ran, found = grade(tmp_path)
    assert found["0.3 win_rate"] == "✓" and found["9.3 best_of_n_kl"] == "✗"  # the one in solutions.py
    assert "01_tokens_and_next_token_loss.ipynb is not a notebook" in ran.stdout
    assert "expected one folder of notebooks" in grade(NOTEBOOKS, tmp_path)[0].stderr
