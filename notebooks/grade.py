"""Grade a student's notebooks: every check of the course, and a table of scores.

    pytest notebooks/grade.py SUBMISSION        SUBMISSION: a folder of notebooks, one notebook, or a solutions.py
    pytest notebooks/grade.py SUBMISSION -k 07  only one notebook's exercises

No notebook is run. Only imports, definitions of functions and classes, and constants (what is assigned without calling
anything) are taken from its cells, in order, so grading takes a minute, needs no trained models, and does not stop at the first gap. It is still the
student's code: grade strangers' work where it can do no harm. A function that needs a variable of another
cell fails here; in the course none does. In a solutions.py the functions have the notebooks' names.
"""

import ast
import os
import re
import signal
import sys
from typing import NamedTuple

os.environ.setdefault("MPLBACKEND", "Agg")
import pytest

import build
import checks
from start import Unfilled


SECONDS = int(os.environ.get("GRADE_SECONDS", 120))  # for one exercise; the right answers take a few


class Task(NamedTuple):
    notebook: str
    exercise: str
    check: str
    function: str


def cells(path):
    """[(number of the cell's exercise or None, its code)] of a notebook, or of a Python file as one cell."""
    if path.suffix == ".py":
        return [(None, path.read_text(encoding="utf-8-sig"))]  # Windows' editors may begin with a BOM
    codes = [build.source_of(cell) for cell in build.read(path)["cells"] if cell["cell_type"] == "code"]
    return [(number[1] if (number := re.search(r"# EXERCISE ([\d.]+)", code)) else None, code) for code in codes]


def tasks():
    """Every check of checks.py that the solved notebooks call, in their order."""
    return [Task(path.stem, exercise, *call) for path in build.solved() for exercise, code in cells(path)
            for call in re.findall(r"^(check_\w+)\((\w+)\)", code, re.M) if hasattr(checks, call[0])]


DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def definitions(path):
    """What a submission's cells define, functions and constants: {name: what}, and {name: why its cell could not be
    read}. Everything else in them is not run."""
    space, broken = {"__name__": "submission"}, {}
    exec("from start import *", space)
    for _, code in cells(path):
        code = re.sub(r"^[%!].*$", "", code, flags=re.M)  # Jupyter's own commands
        try:
            statements = ast.parse(code).body
        except SyntaxError as error:
            for name in re.findall(r"^def (\w+)", code, re.M):
                space.pop(name, None)
                broken[name] = f"the cell is not Python: {error.msg}, line {error.lineno} of the cell"
            continue
        for statement in statements:
            constant = isinstance(statement, (ast.Assign, ast.AnnAssign)) and (isinstance(
                statement.value, ast.Lambda) or not any(isinstance(node, ast.Call) for node in ast.walk(statement)))
            if constant or isinstance(statement, DEFINITIONS):
                try:
                    exec(compile(ast.Module([statement], []), str(path), "exec"), space)
                except (Exception, SystemExit) as error:
                    space.pop(getattr(statement, "name", ""), None)
                    broken[getattr(statement, "name", "")] = f"its definition fails: {type(error).__name__}: {error}"
    return space, {name: why for name, why in broken.items() if name not in space}  # the last attempt counts


@pytest.fixture(scope="session")
def submitted(pytestconfig):
    """find(task) -> (the namespace of the file it should be in, that file's broken definitions)."""
    root, kept = pytestconfig.submission, {}

    def find(task):
        path = root / f"{task.notebook}.ipynb" if root.is_dir() else root
        if root.is_dir() and not path.exists():
            path = next(iter(sorted(root.glob(f"{task.notebook}*.ipynb"))), root / "solutions.py")
        if not path.exists() or (path.suffix == ".ipynb" and not path.stem.startswith(task.notebook) and not root.is_dir()):
            pytest.skip("not handed in")
        if path not in kept:
            kept[path] = None  # if it cannot be read to its end, it is not read again
            try:
                kept[path] = definitions(path)
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # cut off, saved as a web page, …
                pytest.fail(f"{path.name} is not a notebook that can be read ({type(error).__name__}: {error})")
        if kept[path] is None:
            pytest.fail(f"{path.name} could not be read, see above")
        return kept[path]
    return find


@pytest.fixture(autouse=True)
def limit():
    """An endless loop fails its own exercise, not everybody's grading. (Not stopped: one that catches everything with
    a bare `except:`, one long call into C; and Windows has no alarm.)"""
    if not hasattr(signal, "alarm"):
        yield
        return

    def stop(*_):
        pytest.fail(f"not done after {SECONDS} seconds: a loop that never ends?")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("task", tasks(), ids=lambda task: f"{task.notebook[:2]}-{task.exercise}-{task.function}")
def test_exercise(task, submitted):
    space, broken = submitted(task)
    if task.function in broken:
        pytest.fail(broken[task.function])
    if task.function not in space:
        pytest.skip("not handed in")
    try:
        getattr(checks, task.check)(space[task.function])
    except Unfilled:
        pytest.skip("not filled in")
    except checks.Wrong as wrong:
        pytest.fail(str(wrong))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
