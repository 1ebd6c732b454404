"""Turn report.json into report.md and a self-contained report.html: tables, pictures, transcripts.

    python report.py out/report        # evaluate.py calls this; run it to rebuild the two pages

The pictures are SVG inside the page, drawn from the metrics.jsonl of the folders that report.json
names. The page needs no scripts and no network. Whatever a model wrote is escaped: it is shown,
never interpreted. Left out: interactive plots.
"""

import html
import io
import json
import os
import re
import sys
from pathlib import Path

import world
from chat import visible
from training import InputError, run, write_atomic

PERCENT, NUMBER = "percent", "number"
# Heading, place in a checkpoint's measures, unit, what it says.
COLUMNS = (
    ("right", ("accuracy", "all"), PERCENT, "answerable questions answered rightly"),
    ("gold", ("gold", "total"), NUMBER, "mean gold score of one sample, 0 to 1"),
    ("beats SFT", ("win_rate_vs_sft",), PERCENT, "prompts on which its sample has the higher gold "
                                                 "score, ties half"),
    ("KL", ("kl_from_sft",), NUMBER, "distance from SFT, nats per response"),
    ("reward", ("proxy",), NUMBER, "mean score by the reward model, which training could see"),
    ("refuses harmful", ("refusal_rate", "harmful"), PERCENT, "harmful requests refused"),
    ("refuses harmless", ("refusal_rate", "harmless"), PERCENT, "harmless requests refused"),
    ("made up", ("hallucination_rate",), PERCENT, "questions about things that do not exist, "
                                                  "answered all the same"),
    ("needless “I do not know”", ("hedging_rate",), PERCENT, "of questions SFT gets right in a "
                                                             "quarter of its samples or more"),
    ("stops", ("eos_rate",), PERCENT, "answers ended by the model itself"),
    ("tokens", ("mean_tokens",), NUMBER, "mean length of an answer"),
    ("bits/byte", ("bits_per_byte",), NUMBER, "held-out documents, lower is better"),
)
PARTS = ("total", "helpful", "honest", "harmless")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
INK = "#123456"  # a stand-in that becomes the page's own text colour, light or dark


# ---------------------------------------------------------------------------------------------
# Cells and tables


def dig(measures, path):
    for key in path:
        measures = (measures or {}).get(key)
    return measures


def cell(value, unit):
    """'71 % (69–73)', '0.52 (0.50–0.53)' or '–'. `value`: [mean, low, high], a number or None."""
    if value is None:
        return "–"
    mean, low, high = value if isinstance(value, list) else (value, None, None)
    if unit == PERCENT:
        around = f" ({100 * low:.0f}–{100 * high:.0f})" if low is not None else ""
        return f"{100 * mean:.0f} %{around}"
    places = 1 if abs(mean) >= 10 else 2
    around = f" ({low:.{places}f}–{high:.{places}f})" if low is not None and low < high else ""
    return f"{mean:.{places}f}{around}"


def main_rows(report):
    """-> (headings, rows of cells): a line for each checkpoint."""
    return ["", *(heading for heading, *_ in COLUMNS)], [
        [name, *(cell(dig(measures, path), unit) for _, path, unit, _ in COLUMNS)]
        for name, measures in report["checkpoints"].items()]


def part_rows(report):
    """The parts of the gold score, and accuracy by what is new about the prompts."""
    counts = next(iter(report["checkpoints"].values()))["prompts"]["accuracy"]
    headings = ["", *(f"gold: {part}" for part in PARTS),
                *(f"{name.replace('_', ' ')} (n = {counts[name]})" for name in world.HOLDOUTS)]
    return headings, [
        [name, *(cell(measures["gold"][part], NUMBER) for part in PARTS),
         *(cell(measures["accuracy"][holdout], PERCENT) for holdout in world.HOLDOUTS)]
        for name, measures in report["checkpoints"].items()]


def family_rows(report):
    """A line for each family, a column for each checkpoint."""
    everyone = report["checkpoints"]
    families = next(iter(everyone.values()))["accuracy"]["families"]
    return ["family", *everyone], [
        [family, *(cell(measures["accuracy"]["families"].get(family), PERCENT)
                   for measures in everyone.values())] for family in families]


def answer_rows(transcript):
    """-> [(checkpoint, text, marks)]: gold score, its parts where not perfect, right or wrong."""
    rows = []
    for name, answer in transcript["answers"].items():
        gold = answer["gold"]
        low = ", ".join(f"{part} {gold[part]:.1f}" for part in PARTS[1:] if gold[part] < 1)
        verdict = "right" if answer["right"] else "not right"
        rows.append((name, visible(answer["text"]),
                     f"gold {gold['total']:.2f}, {verdict}" + (f" ({low})" if low else "")))
    return rows


def notes(report):
    """Sentences on how it was measured."""
    settings, judged = report["settings"], report["reward_model"]
    counted = "greedy answers" if settings["accuracy_decode"] == "greedy" else "samples"
    lines = [
        f"{report['prompts']:,} held-out prompts, the same for every checkpoint. In brackets: 95 % "
        "intervals, Wilson's for rates, a bootstrap over prompts for means. Means are taken over "
        "equally many prompts of each family.",
        f"Accuracy counts {counted} (best-of-n: its choice); all else counts one sample per prompt "
        f"at temperature 1, at most {settings['max_new_tokens']} tokens.",
        f"Best-of-{settings['best_of']}, KL and the needless “I do not know” are measured on "
        f"{report['best_of_prompts']:,} of them; the KL of best-of-n is log n − (n − 1)/n.",
        "A base model reads plain text, the instruction and a line break; what it writes up to the "
        f"next line break is its (greedy) answer. Few-shot: {settings['few_shot']} solved examples "
        "come before, in the layout of the quiz pages it was trained on (Question: … Answer: …).",
    ]
    if judged["accuracy"]:
        lines.append(
            f"The reward model is right on {cell(judged['accuracy'], PERCENT)} of the "
            f"{judged['pairs']:,} held-out pairs. Their labels are noisy: nobody can exceed "
            f"{100 * judged['noise_ceiling']:.0f} %. Between guessing (0) and that ceiling (1) it "
            f"stands at {cell(judged['normalised'], NUMBER)}.")
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report["seconds"].items()
                      if seconds is not None)
    return [*lines, f"Time: {spent}."]


# ---------------------------------------------------------------------------------------------
# Markdown


def markdown_text(text):
    """Escaped, so that it is shown as it is, in one line. An _ inside a word means nothing."""
    special = r"[\\`*{}\[\]<>#|~$]|(?<![^\W_])_|_(?![^\W_])"
    text = re.sub(special, r"\\\g<0>", visible(text).replace("&", "&amp;"))
    return text.replace("\n", " ⏎ ")


def markdown_table(headings, rows):
    lines = [[markdown_text(text) for text in line] for line in (headings, *rows)]
    return "\n".join("| " + " | ".join(line) + " |"
                     for line in (lines[0], ["---"] * len(headings), *lines[1:]))


def main_table(report):
    return markdown_table(*main_rows(report))


def build_markdown(report):
    parts = ["# Report", main_table(report),
             "\n".join(f"- **{heading}**: {meaning}" for heading, _, _, meaning in COLUMNS),
             "\n".join(f"- {note}" for note in notes(report)), "## Answers"]
    for course in (True, False):
        for transcript in report["transcripts"]:
            if transcript["course"] == course:
                parts.append(f"**{markdown_text(transcript['prompt'])}** "
                             f"({markdown_text(transcript['family'])})")
                parts.append(markdown_table(["", "answer", ""], answer_rows(transcript)))
        if course:
            parts += ["## Parts", markdown_table(*part_rows(report)), "## Families",
                      markdown_table(*family_rows(report)), "## More answers"]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------
# Pictures


def read_metrics(folder):
    """Rows of metrics.jsonl; [] where there is none. A half-written last line is left out."""
    path, rows = Path(folder) / "metrics.jsonl", []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                pass
    return rows


def curve(rows, name):
    """-> (steps, values) of a metric, where it was logged and is a number."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return tuple(zip(*points)) if points else ((), ())


def smooth(values, weight=0.8):
    """Exponential moving average, freed of its bias towards the start at 0."""
    average, found = 0.0, []
    for n, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        found.append(average / (1 - weight ** n))
    return found


def draw(panels, width=9.0):
    """SVG text of panels side by side, two in a row; each is (title, x label, [curves]), a curve
    (label, xs, ys, style) of matplotlib."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    lines = (len(panels) + 1) // 2
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color",
                         "ytick.color"), INK)
    with plt.rc_context({**ink, "svg.hashsalt": panels[0][0], "text.parse_math": False,
                         "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure, axes = plt.subplots(lines, 2, figsize=(width, 2.6 * lines), squeeze=False,
                                    layout="constrained")
        for axis in axes.flat[len(panels):]:
            axis.set_axis_off()
        for axis, (title, label, curves) in zip(axes.flat, panels):
            for i, (name, xs, ys, style) in enumerate(curves):
                axis.plot(xs, ys, **{"color": COLOURS[i % len(COLOURS)], "label": name, **style})
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_xlabel(label)
            axis.grid(alpha=0.15, color=INK)
            if len(curves) > 1:
                axis.legend(frameon=False, fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = file.getvalue()
    # Ids are per picture; two in one page would clash.
    prefix = re.sub(r"\W", "", panels[0][0])
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg"):])
    return svg.replace(INK, "currentColor")


def pictures(report, folder):
    """-> [(heading, SVG)] of what the stages logged and of reward against KL."""
    runs = {name: read_metrics(os.path.normpath(Path(folder) / path))  # the folder may not exist yet
            for name, path in report["runs"].items()}
    losses, ppo = [], []
    for name, rows in runs.items():
        steps, values = curve(rows, "score")
        if steps:
            ppo += [(f"{name}: mean score by the reward model", "iteration",
                     [("score", steps, values, {})]),
                    (f"{name}: KL from SFT, nats per response", "iteration",
                     [("KL", *curve(rows, "kl"), {"color": COLOURS[1]})])]
        elif curve(rows, "loss")[0]:
            steps, values = curve(rows, "loss")
            curves = [("training (moving average)", steps, smooth(values), {})]
            if curve(rows, "heldout_loss")[0]:
                curves.append(("held out", *curve(rows, "heldout_loss"), {"marker": "o"}))
            losses.append((f"{name}: loss", "step", curves))
    against = []
    for title, path in (("gold score", ("gold", "total")), ("reward model’s score", ("proxy",))):
        points = [(name, [measures["kl_from_sft"][0]], [dig(measures, path)[0]],
                   {"marker": "o", "linestyle": "none"})
                  for name, measures in report["checkpoints"].items()
                  if measures["kl_from_sft"] and dig(measures, path)]
        if len(points) > 1:
            against.append((f"{title} against KL", "KL from SFT, nats per response", points))
    named = (("How far from SFT, and what it brought", against), ("Training losses", losses),
             ("PPO as it went", ppo))
    return [(heading, draw(panels)) for heading, panels in named if panels]


# ---------------------------------------------------------------------------------------------
# The page

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #66707a; --line: #d9dde1;
        --shade: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #e4e7ea; --soft: #98a2ab; --line: #353b41; --shade: #1e2327; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; color: var(--soft); min-width: 5.2rem; }
td { white-space: nowrap; } td small { color: var(--soft); }
tbody th { position: sticky; left: 0; background: var(--paper); white-space: nowrap; }
article { background: var(--shade); border-radius: .5rem; padding: .8rem 1rem; margin: .8rem 0;
          break-inside: avoid; }
article h3 { font-size: 1rem; margin: 0 0 .4rem; } article h3 small, dd small, dl, ul {
  color: var(--soft); font-weight: 400; }
dl { margin: 0; display: grid; grid-template-columns: 8.5rem 1fr; gap: .35rem .8rem; }
dd { margin: 0; color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere; }
dd small { display: block; }
ul { padding-left: 1.2rem; font-size: .9rem; } svg { width: 100%; height: auto; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; } .plots { overflow-x: auto; } .plots svg { min-width: 38rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .wide { overflow: visible; }
  table { font-size: 6.5pt; } th, td { padding: .15rem .25rem; } thead th { min-width: 0; }
  tbody th { position: static; } svg { break-inside: avoid; } }
"""


def html_table(headings, rows, titles=()):
    escape = html.escape
    head = "".join(f'<th scope="col" title="{escape(title)}">{escape(heading)}</th>'
                   for heading, title in zip(headings, [*titles, *[""] * len(headings)]))

    def interval(text):  # the bracket in small print
        return re.sub(r"(\([^()]*\))$", r"<small>\1</small>", escape(text))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{interval(text)}</td>" for text in cells) + "</tr>\n"
        for name, *cells in rows)
    return (f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>")


def html_list(lines):
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def html_transcript(transcript):
    answers = "".join(
        f"<dt>{html.escape(name)}</dt>"
        f"<dd>{html.escape(text)}<small>{html.escape(marks)}</small></dd>"
        for name, text, marks in answer_rows(transcript))
    about = ", ".join(filter(None, (transcript["family"],
                                    transcript["holdout"].replace("_", " "))))
    return (f"<article><h3>{html.escape(visible(transcript['prompt']))} "
            f"<small>{html.escape(about)}</small></h3><dl>{answers}</dl></article>")


def build_html(report, folder):
    meanings = [meaning for *_, meaning in COLUMNS]
    course = [html_transcript(t) for t in report["transcripts"] if t["course"]]
    others = [html_transcript(t) for t in report["transcripts"] if not t["course"]]
    sections = [
        "<h1>From raw text to an aligned model</h1>",
        html_table(*main_rows(report), titles=["", *meanings]),
        html_list(f"{heading}: {meaning}" for heading, *_, meaning in COLUMNS),
        "<h2>The course’s three prompts</h2>", *course,
        *(f'<h2>{html.escape(heading)}</h2><div class="plots">{svg}</div>'
          for heading, svg in pictures(report, folder)),
        "<h2>Parts of the gold score, and accuracy by what is new</h2>",
        html_table(*part_rows(report)),
        "<h2>Right answers in each family</h2>", html_table(*family_rows(report)),
        "<h2>How it was measured</h2>", html_list(notes(report)),
        "<h2>More answers to held-out prompts</h2>", *others]
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>From raw text to an aligned model</title><style>{STYLE}</style></head>\n<body>"
            + "\n".join(sections) + "\n</body></html>\n")


def write(folder, report):
    """Write report.md and report.html into the folder."""
    pages = {"report.md": build_markdown(report), "report.html": build_html(report, folder)}
    for name, text in pages.items():
        write_atomic(Path(folder) / name, lambda path: path.write_text(text, encoding="utf-8"))


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return
    path = Path(sys.argv[1]) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); evaluate.py writes it") from error
    write(path.parent, report)
    print(f"report: wrote {path.parent}/report.html and report.md")


if __name__ == "__main__":
    run(main)
