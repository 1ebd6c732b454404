"""The path to the code, the slow tests' switch, and the table of measured errors in tests/README.md."""

import re
import signal
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
README = HERE / "README.md"
SECTIONS = {}  # of README.md, with what this run found


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take minutes")
    parser.addoption("--write-readme", action="store_true", help="put what was measured into tests/README.md")


# With --dist loadfile a file stays on one core. The longest go first, so that none is left to run alone at the end.
LONGEST = ["test_notebooks.py", "test_rlhf.py", "test_grading.py", "test_failures.py", "test_pipeline.py", "test_training.py",
           "test_world.py", "test_study.py", "test_checks.py", "test_proofs.py"]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: [item.path.name == name for name in LONGEST], reverse=True)
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: --slow runs it")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def own_signals():
    """A stage that runs in the tests' process installs its own handler for Ctrl-C; restore the old one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def measured():
    """measured(what, against, error, tolerance): fails where the error is too large, and notes it.
    `peer` is for other people's code that `make` does not install."""
    def note(what, against, error, tolerance, peer=False):
        rows = SECTIONS.setdefault("peers" if peer else "oracles", {})
        error = max(float(error), float(rows.get(what, [0] * 3)[2]))  # the worst of several cases
        rows[what] = (what, against, f"{error:.1g}", f"{tolerance:g}")
        assert error <= tolerance, f"{what}: {error:.3g} from {against}, at most {tolerance:g} allowed"
    return note


@pytest.fixture
def noted():
    """noted(section, *cells): a row for a table of tests/README.md, identified by its first cell."""
    return lambda section, *cells: SECTIONS.setdefault(section, {}).__setitem__(cells[0], cells)


def write_sections(sections):
    """Put rows {section: {first cell: cells}} into the tables of README.md that bear these names."""
    text = README.read_text(encoding="utf-8")
    for name, rows in sections.items():
        lines = "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows.values())
        text, found = re.subn(rf"(<!-- {name} -->\n(?:\|.*\n){{2}})(?:\|.*\n)*",
                              lambda found: found[1] + lines, text)
        assert found == 1, f"{README} has no table {name}"
    README.write_text(text, encoding="utf-8")


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--write-readme") and exitstatus == 0:
        write_sections(SECTIONS)
