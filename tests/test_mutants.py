"""The planted mistakes of mutants.py still fit the code; `make test-all` plants them."""

from pathlib import Path

import pytest

from mutants import HERE, MUTANTS


@pytest.mark.parametrize("what, name, old, new, tests", MUTANTS, ids=[what for what, *_ in MUTANTS])
def test_the_mistake_can_be_planted(what, name, old, new, tests):
    text = (HERE / name).read_text(encoding="utf-8")
    assert text.count(old) == 1 and old != new
    if name.endswith(".py"):
        compile(text.replace(old, new), name, "exec")  # a mistake of meaning, not of spelling
    assert all((Path(__file__).parent / test).is_file() for test in tests.split())
