"""The first line of every notebook: `from start import *`.

It gives torch, np, plt, F and Path, the checks of checks.py, and

    RUN        the folder of trained models that `make` left: out/, or the one that the environment variable RUN names,
               relative to the repository
    plain_reward()    the folder of a reward model that is told nothing of what SFT thought; made when first asked for
    few(n)     n; only a few when the tests run the notebooks ($FAST=1), where nothing has to be learned
    todo(...)  stands where you fill something in, and says so
    show_table, show_code    tables, our source

and makes `import model, rlhf, …` find the code of the repository.
"""

import html
import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from checks import *

FAST = os.environ.get("FAST") == "1"
plt.rcParams.update({"figure.figsize": (8, 3.6), "figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.spines.top": False, "axes.spines.right": False, "font.size": 11,
                     "savefig.bbox": "tight"})


class Unfilled(NotImplementedError):
    """An exercise that waits for its answer."""

    def _render_traceback_(self):  # Jupyter shows this in place of a traceback
        return [str(self)]


def todo(exercise, what):
    raise Unfilled(f"Exercise {exercise} waits for you: {what}. "
                   "Replace the line `todo(…)`, and run the cell again. If you skip it, copy its answer from solved/: later "
                   "cells may need it.")


def few(n):
    return max(2, n // 50) if FAST else n


def _run():
    folder = ROOT / os.environ.get("RUN", "out")
    needed = ["base", "sft", "reward", "dpo", "ppo"]
    missing = [name for name in needed if not (folder / name / "model.safetensors").exists()]
    if missing:
        print(f"{folder} has no {', '.join(missing)}. Run `make` in {ROOT} first (6 to 25 minutes); or "
              "`make quick` (half a minute to 1½ minutes), and set the environment variable RUN to out/quick: then every "
              "cell runs, but the models know little.")
    return folder


RUN = _run()


def told_reward():
    """Is RUN/reward a reward model made with --surprisal?"""
    config = RUN / "reward" / "config.json"
    return config.exists() and "reader" in json.loads(config.read_text(encoding="utf-8"))


def plain_reward():
    """The folder of a reward model made like RUN/reward, but without --surprisal: RUN/reward_plain. It is made if it is missing
    or older than the pairs. (RUN/reward itself, if that is plain.)"""
    folder, pairs, settings = RUN / "reward_plain", RUN / "pairs.jsonl", RUN / "reward" / "settings"
    if not told_reward():
        return RUN / "reward"
    done = folder / "done"
    if not done.exists() or pairs.exists() and done.stat().st_mtime < pairs.stat().st_mtime:
        print(f"making {folder.name} with reward.py, which takes half a minute to some minutes …")
        flags = shlex.split(settings.read_text(encoding="utf-8")) if settings.exists() else []
        made = subprocess.run([sys.executable, ROOT / "reward.py", "--init", RUN / "sft", "--data", pairs, "--out", folder,
                               *flags, "--no-surprisal"], capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(made.stderr)
    return folder


class Shown:
    """A piece of HTML for Jupyter that is readable text everywhere else."""

    def __init__(self, page, text):
        self.page, self.text = page, text

    def _repr_html_(self):
        return self.page

    def __repr__(self):
        return self.text


def _cell(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show_table(rows, headings):
    """show_table([("SFT", 0.51), …], ["model", "gold score"]): the last line of a cell."""
    rows = [[_cell(value) for value in row] for row in rows]
    numbers = [all(row[i][:1] in "-−0123456789." for row in rows) for i in range(len(headings))]

    def line(cells, tag):
        return "<tr>" + "".join(
            f'<{tag} style="text-align:{"right" if number else "left"}; vertical-align:top; max-width:34em; '
            f'white-space:pre-wrap">{html.escape(cell)}</{tag}>' for cell, number in zip(cells, numbers)) + "</tr>"

    page = "<table>" + line(headings, "th") + "".join(line(row, "td") for row in rows) + "</table>"
    return Shown(page, "\n".join("  ".join(map(str, row)) for row in [headings, *rows]))


def show_code(function, start=None, lines=None):
    """The source of one of our functions, or `lines` lines of it from the one that holds `start`."""
    source = inspect.getsource(function).rstrip().split("\n")
    first = next((i for i, line in enumerate(source) if start is None or start in line), 0)
    shown = "\n".join(source[first:None if lines is None else first + lines])
    where = f"{Path(inspect.getsourcefile(function)).name}, line {inspect.getsourcelines(function)[1] + first}"
    return Shown(f'<div style="color:#666">{where}</div><pre style="background:#f6f6f6; color:#111; padding:0.6em; '
                 f'line-height:1.35; font-family:monospace">{html.escape(shown)}</pre>', f"{where}\n{shown}")
