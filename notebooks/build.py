"""The two editions of the notebooks. solved/ is the source; the student edition is made from it.

    python notebooks/build.py student             write the student edition from the solved one
    python notebooks/build.py execute [NAME …]    run solved notebooks in Jupyter and keep what they print
                                                  (needs `pip install nbclient ipykernel`)
    python notebooks/build.py run FILE …          run notebooks' code without Jupyter, as the tests do

In a code cell of the solved edition, the answer stands between two marks:

    ### BEGIN SOLUTION: walk backwards from the last token
    …
    ### STUDENT
    # what the student finds in its place, as comments: the bug of a hunt, or `guess = None`
    ### END SOLUTION

Without a STUDENT part the student finds `todo("7.2", "walk backwards from the last token")`, where 7.2 is the
number in the cell's line `# EXERCISE 7.2 …`. A markdown cell that begins with `<!-- solution -->` becomes
"Your answer".
"""

import json
import linecache
import os
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ANSWER = re.compile(r"^( *)### BEGIN SOLUTION(?:: *([^\n]*))?\n(.*?)^ *### END SOLUTION\n?", re.M | re.S)


def source_of(cell):
    return "".join(cell["source"])


def student_code(code):
    """A solved cell's code -> the student's."""
    number = re.search(r"# EXERCISE ([\d.]+)", code)

    def replace(found):
        indent, what, body = found[1], found[2] or "write the body of this function", found[3]
        _, mark, theirs = body.partition(f"{indent}### STUDENT\n")
        if mark:
            return re.sub(rf"^{indent}# ?", indent, theirs, flags=re.M)
        if number is None:
            raise ValueError(f"a solution outside an EXERCISE:\n{code}")
        return f'{indent}todo("{number[1]}", "{what}")\n'

    code = ANSWER.sub(replace, code + "\n").rstrip("\n")
    if "### " in code:
        raise ValueError(f"unpaired marks:\n{code}")
    return code


def student_edition(notebook):
    """A solved notebook -> the student's: no answers, no outputs."""
    cells = []
    for i, cell in enumerate(notebook["cells"]):
        text = source_of(cell)
        if cell["cell_type"] == "code":
            text = student_code(text)
        elif text.startswith("<!-- solution -->"):
            text = "*Your answer:*"
        cells.append(tidy(cell["cell_type"], text, i))
    return {**notebook, "cells": cells}


def tidy(kind, text, i, outputs=()):
    """A cell with nothing in it that changes from one run to the next."""
    cell = {"cell_type": kind, "id": f"cell-{i:02}", "metadata": {}, "source": text.splitlines(keepends=True)}
    if kind == "code":
        cell.update(execution_count=None, outputs=list(outputs))
    return cell


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def write(path, notebook):
    notebook = {"cells": notebook["cells"], "metadata": {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    Path(path).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def solved(names=()):
    """Paths of the solved notebooks whose file names begin with one of `names`; all without names."""
    return [path for path in sorted((HERE / "solved").glob("*.ipynb"))
            if not names or path.name.startswith(tuple(names))]


def execute(path):
    """Run a notebook in Jupyter and store its outputs, without the traces of when and where."""
    import nbformat
    from nbclient import NotebookClient

    started = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3",
                   resources={"metadata": {"path": str(HERE)}}).execute()
    cells = []
    for i, cell in enumerate(notebook["cells"]):
        outputs = [{**output, **({"execution_count": None} if "execution_count" in output else {})}
                   for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
        for output in outputs:
            output.get("metadata", {}).clear()
        cells.append(tidy(cell["cell_type"], cell["source"], i, outputs))
    write(path, {"cells": cells})
    print(f"{path.name}: {time.perf_counter() - started:.0f} s")


def run(path):
    """Run a notebook's code cells one after another in this process, pictures drawn but not shown."""
    import matplotlib
    matplotlib.use("Agg")
    os.chdir(HERE)
    sys.path.insert(0, str(HERE))
    space = {"__name__": "__main__", "display": print}
    for i, cell in enumerate(read(path)["cells"]):
        if cell["cell_type"] == "code":
            file = f"{Path(path).name}[{i}]"
            code = source_of(cell)
            # So that inspect.getsource works on the reader's own functions, as it does in Jupyter.
            linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
            exec(compile(code, file, "exec"), space)


def main():
    what, *names = sys.argv[1:] or ["--help"]
    if what == "student":
        for path in solved(names):
            write(HERE / path.name, student_edition(read(path)))
    elif what == "execute":
        for path in solved(names):
            execute(path)
    elif what == "run" and names:
        for path in [Path(name).resolve() for name in names]:  # before the first one changes the folder
            print(f"== {path.name}", flush=True)
            run(path)
    else:
        print(__doc__)


if __name__ == "__main__":
    main()
