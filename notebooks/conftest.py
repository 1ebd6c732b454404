"""Makes `pytest notebooks/grade.py SUBMISSION` work: SUBMISSION is not a test, and a score table ends the run."""

import re
from pathlib import Path

import pytest

GRADE = Path(__file__).resolve().parent / "grade.py"
results = pytest.StashKey()


def pytest_configure(config):
    grading = [arg for arg in config.args if Path(arg.split("::")[0]).resolve() == GRADE]
    others = [arg for arg in config.args if arg not in grading]
    if not grading:
        return
    handed_in = Path(others[0]) if others else Path()
    if len(others) != 1 or not (handed_in.is_file() or list(handed_in.glob("*.ipynb")) or (handed_in / "solutions.py").exists()):
        raise pytest.UsageError("pytest notebooks/grade.py SUBMISSION: expected one folder of notebooks, one notebook or "
                                f"one solutions.py, found {' '.join(others) or 'none'}")
    config.args[:] = grading
    config.submission = handed_in.resolve()
    config.stash[results] = {}
    config.option.tbstyle, config.option.reportchars = "no", "N"  # the table says it all


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and results in item.config.stash:
        task = item.callspec.params["task"]
        said = str(call.excinfo.value) if call.excinfo else ""
        hint = re.sub(r"^✗ \w+: ", "", said.split("likely: ")[-1].split("\n")[0].strip())
        item.config.stash[results][task] = (report.outcome, hint)
    return report


def pytest_terminal_summary(terminalreporter, config):
    if not config.stash.get(results, None):
        return
    by_notebook = {}
    for task, (outcome, said) in config.stash[results].items():
        by_notebook.setdefault(task.notebook, []).append((task, outcome, said))
    write = terminalreporter.write_line
    terminalreporter.section(f"scores of {config.submission.name}")
    signs = {"passed": "✓", "failed": "✗", "skipped": "–"}
    for notebook, rows in by_notebook.items():
        write(f"{notebook:<52}{sum(outcome == 'passed' for _, outcome, _ in rows):>3} of {len(rows)}")
        for task, outcome, said in rows:
            write(f"  {signs[outcome]} {task.exercise:<4} {task.function:<22}{'' if outcome == 'passed' else said}")
    rows = [row for rows in by_notebook.values() for row in rows]
    write(f"{'together':<52}{sum(outcome == 'passed' for _, outcome, _ in rows):>3} of {len(rows)}")
    write("✗ wrong, – not filled in. The exercises `derive` and `measure` are read by a person.")
