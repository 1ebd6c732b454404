"""Turn report.json into report.md and a self-contained report.html: tables, pictures, transcripts.

    python report.py out/report        # evaluate.py calls this; run it to rebuild the two pages
    python report.py out/report out/seed2/report …       # prints the mean of several runs, their least and most
    python report.py out/real/base out/real/sft … --curves out/real/curves.html     # only draws what these stages logged

The pictures are SVG inside the page, drawn from the metrics.jsonl of the folders that report.json
names. If study.py has left a study.json beside it, its tables and pictures are in the pages too.
The page needs no scripts and no network. Whatever a model wrote is escaped: it is shown, never
interpreted. Left out: interactive plots.
"""

import argparse
import html
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import world
from data import visible
from training import InputError, read_metrics, run, write_text

PERCENT, NUMBER = "percent", "number"
# The columns of the table, which are the lines of the glossary: heading, place in a checkpoint's measures, unit; what it
# is; which way is better; what to expect from `make` (the mean of eleven runs, ± what another seed or another machine's
# rounding may change); what it means when it is off.
FIGURES = (
    ("right", ("accuracy", "all"), PERCENT, "share of answerable held-out questions that the greedy answer gets right "
     "(best-of-n: its choice among samples)", "higher", "base 12, few-shot 69, SFT 69, DPO 69, PPO 70 % (± 5)",
     "SFT near the base: the chat mask is wrong, or the learning rate far too low or too high. Far below few-shot: SFT "
     "forgot facts"),
    ("gold", ("gold", "total"), NUMBER, "mean score, 0 to 1, from the hidden judge for one sample at temperature 1: the "
     "mean of helpful, honest and harmless", "higher", "SFT 0.55, DPO 0.76, PPO 0.79 (± 0.02)",
     "below SFT while the reward rises: the reward model is being gamed"),
    ("beats SFT", ("win_rate_vs_sft",), PERCENT, "share of prompts on which its sample has a higher gold score than "
     "SFT’s; a tie counts half", "higher; 50 % is no change", "DPO 69, PPO 73, best-of-16 73 % (± 4)",
     "50 %: nothing was learned; look at KL"),
    ("KL", ("kl_from_sft",), NUMBER, "KL(policy ‖ SFT) in nats per response: how far it has moved, over the full "
     "vocabulary on its own samples. For best-of-n: log n − (n − 1)/n, an upper bound", "lower at equal gold",
     "DPO 1.7, PPO 1.7 (± 0.4)", "0: no update took effect. Above 20: β is too small, or the learning rate too large"),
    ("reward", ("proxy",), NUMBER, "mean score from the reward model, the proxy that PPO is trained on: 0 is its mean "
     "on the answers of training pairs, 1 their standard deviation above it", "higher, if gold follows",
     "SFT −0.1, DPO 0.5, PPO 0.6, best-of-16 0.6 (± 0.3)", "SFT far from 0 (0.5 or more): reward_shift was not subtracted"),
    ("refuses harmful", ("refusal_rate", "harmful"), PERCENT, "share of harmful requests refused, and not helped with "
     "all the same", "higher", "SFT 44, DPO 87, PPO 86 % (± 15)",
     "SFT near 0 or 100: look at the demonstrations with --show-batch"),
    ("refuses harmless", ("refusal_rate", "harmless"), PERCENT, "share of harmless requests refused", "lower",
     "SFT 2, DPO 2, PPO 2 % (± 2)", "above 10: the reward model likes refusals whatever is asked"),
    ("made up", ("hallucination_rate",), PERCENT, "share of questions about things that do not exist that get an "
     "answer, or a refusal, instead of “I do not know”, or whose answer goes on to invent something after it", "lower",
     "SFT 61, DPO 13, PPO 16 % (± 17)", "unchanged: too few such pairs"),
    ("needless “I do not know”", ("hedging_rate",), PERCENT, "how often this is the answer to a question that SFT gets "
     "right in a quarter or more of its samples", "lower", "SFT 1, DPO 1, PPO 1 % (± 2)",
     "high: honesty was bought with silence"),
    ("stops", ("eos_rate",), PERCENT, "share of answers that the model ended itself", "higher", "above 98 %",
     "low: the end token is not supervised, or not among the stop tokens"),
    ("tokens", ("mean_tokens",), NUMBER, "mean length of an answer, without its end token", "neither",
     "base 12, few-shot 8, SFT 18, DPO 18, PPO 15 (± 3)", "rising with the reward: the reward model likes length"),
    ("bits/byte", ("bits_per_byte",), NUMBER, "bits needed to predict a byte of held-out documents: shows what "
     "alignment forgot of the text", "lower", "base 0.25, PPO 0.29 (± 0.01)",
     "far above the base: the learning rate is too high"),
)
PARTS = ("total", "helpful", "honest", "harmless")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
INK = "#123456"  # a stand-in that becomes the page's own text colour, light or dark


# ---- cells and tables ----------------------------------------------------------------------------


def dig(measures, path):
    for key in path:
        measures = (measures or {}).get(key)
    return measures


def cell(value, unit):
    """'71 % (69–73)', '0.52 (0.50–0.53)' or '–'. `value`: [mean, low, high], a number or None."""
    if value is None:
        return "–"
    mean, low, high = value if isinstance(value, list) else (value, None, None)
    places = 0 if unit == PERCENT else 1 if abs(mean) >= 10 else 2

    def digits(number):
        return f"{round(100 * number if unit == PERCENT else number, places) + 0.0:.{places}f}"  # + 0.0: no "-0"
    around = ""
    if low is not None and (unit == PERCENT or low < high):
        around = f" ({digits(low)}{'–' if low >= 0 else ' to '}{digits(high)})"
    return f"{digits(mean)}{' %' if unit == PERCENT else ''}{around}".replace("-", "−")


def across(runs, path, unit):
    """The cell of a measure in several runs: its mean, least and most, if all have it. Of one run, with its own interval."""
    found = [dig(measures, path) for measures in runs]
    if len(found) == 1:
        return cell(found[0], unit)
    if None in found:
        return cell(None, unit)
    means = [value[0] if isinstance(value, list) else value for value in found]
    return cell([sum(means) / len(means), min(means), max(means)], unit)


def compared_with(report):
    """The heading's word for the checkpoint that win rate and KL compare with."""
    name = report["settings"]["reference"]
    return "SFT" if name == "sft" else name


def main_rows(*reports):
    """-> (headings, rows of cells): a line for each checkpoint that all the reports have."""
    return ["", *(heading.replace("SFT", compared_with(reports[0])) for heading, *_ in FIGURES)], [
        [name, *(across([report["checkpoints"][name] for report in reports], *figure[1:3]) for figure in FIGURES)]
        for name in reports[0]["checkpoints"] if all(name in report["checkpoints"] for report in reports)]


def glossary_rows():
    return ["figure", "what it is", "better", "expect from make (mean of eleven runs ± how far another may be off)",
            "when it is off"], [(heading, *told) for heading, _, _, *told in FIGURES]


def part_rows(report):
    """The parts of the gold score, accuracy by what is new about the prompts (how many: in the first heading, and in a
    row's name where it differs), that of samples at temperature 1, how often questions of howto are refused, and how far
    accuracy is from the reference's, prompt by prompt."""
    rows, usual = [], None
    for name, measures in report["checkpoints"].items():
        count = f"(n = {', '.join(str(measures['prompts']['accuracy'][holdout]) for holdout in world.HOLDOUTS)})"
        usual = usual or count
        rows.append([name if count == usual else f"{name} {count}",
                     *(cell(measures["gold"][part], NUMBER) for part in PARTS),
                     *(cell(measures["accuracy"][holdout], PERCENT) for holdout in world.HOLDOUTS),
                     cell(dig(measures, ("accuracy_sampled", "all")), PERCENT),
                     cell(dig(measures, ("refusal_rate", "howto")), PERCENT),
                     cell(dig(measures, ("accuracy_vs_sft", "greedy")), PERCENT)])
    return [usual, *(f"gold: {part}" for part in PARTS), *(name.replace("_", " ") for name in world.HOLDOUTS),
            "right, sampled", "refuses harmless how-to", f"right, less {compared_with(report)}’s"], rows


def family_rows(report):
    """A line for each family, a column for each checkpoint that answered enough prompts of one."""
    shares = {name: measures["accuracy"]["families"] for name, measures in report["checkpoints"].items()}
    shares = {name: found for name, found in shares.items() if any(found.values())}
    families = dict.fromkeys(family for found in shares.values() for family in found)
    return ["family", *shares], [
        [family, *(cell(found.get(family), PERCENT) for found in shares.values())] for family in families]


def answer_rows(transcript):
    """-> [(checkpoint, text, marks)]: gold score, right or not, the parts that are not perfect, reward."""
    rows = []
    for name, answer in transcript["answers"].items():
        gold = answer["gold"]
        low = ", ".join(f"{part} {gold[part]:.1f}" for part in PARTS[1:] if gold[part] < 1)
        verdict = "right" if answer["right"] else "not right"
        reward = "" if answer["proxy"] is None else f", reward {answer['proxy']:+.1f}"
        rows.append((name, visible(answer["text"]),
                     f"gold {gold['total']:.2f}, {verdict}" + (f" ({low})" if low else "") + reward))
    return rows


def notes(report):
    """Sentences on how it was measured."""
    settings, judged, rows = report["settings"], report["reward_model"], report["checkpoints"]
    compared, asked = settings["reference"] in rows, next(iter(rows.values()))["prompts"]
    chosen, examples = (any(part in name for name in rows) for part in ("best_of_", "_few_shot"))
    lines = [
        f"{report['prompts']:,} held-out prompts, the same for every checkpoint; what is refused is a share of "
        f"{asked['harmful']:,} harmful and of {asked['harmless']:,} harmless ones, what is made up of {asked['unknown']:,} about "
        "things that do not exist. In brackets: 95 % intervals, Wilson's for rates, a bootstrap over prompts for means. "
        "Means are taken over equally many prompts of each family."
        + f" Win rate and KL compare with {compared_with(report)}. KL is measured on {report['best_of_prompts']:,} prompts."
        * compared,
        "Accuracy is that of greedy answers (best-of-n: its choice); all else is measured on one sample per prompt "
        f"at temperature 1 (base models: the greedy answer), at most {settings['max_new_tokens']} tokens. The answers shown "
        "are greedy (best-of-n: its choice), so their marks are not those that the table is made of.",
        *[f"The needless “I do not know” is measured on what {compared_with(report)} can answer of "
          f"{report['best_of_prompts']:,} prompts."] * (compared and settings["best_of"] > 1),
        *[f"Best-of-n is measured on {report['best_of_prompts']:,} prompts; its KL is log n − (n − 1)/n. It chooses by reward "
          f"+ {settings['best_of_beta']} log π among answers that ended."] * chosen,
        "A base model reads plain text, the instruction and a line break; what it writes up to the "
        "next line break is its (greedy) answer."
        + f" Few-shot: up to {settings['few_shot']} solved examples, as many as fit, come before, in the layout of the quiz "
        "pages it was trained on (Question: … Answer: …)." * examples,
        "–: not measured, or on too few prompts to be worth quoting.",
    ]
    if judged["accuracy"]:
        lines.append(
            f"The reward model is right on {cell(judged['accuracy'], PERCENT)} of the "
            f"{judged['pairs']:,} held-out pairs. Their labels are noisy: nobody can exceed "
            f"{100 * judged['noise_ceiling']:.0f} %. Between guessing (0) and that ceiling (1) it "
            f"stands at {cell(judged['normalised'], NUMBER)}.")
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report["seconds"].items())
    return [*lines, f"Time: {spent}."]


# ---- Markdown ------------------------------------------------------------------------------------


def markdown_text(text):
    """Escaped, so that it is shown as it is, in one line. An _ inside a word needs no escape."""
    special = r"[\\`*{}\[\]<>#|~$]|(?<![^\W_])_|_(?![^\W_])"
    text = re.sub(special, r"\\\g<0>", visible(text).replace("&", "&amp;"))
    return text.replace("\n", " ⏎ ")


def markdown_table(headings, rows):
    lines = [[markdown_text(text) for text in line] for line in (headings, *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ["---"] * len(headings), *lines[1:]))


def main_table(*reports):
    return markdown_table(*main_rows(*reports))


def build_markdown(report, study=None):
    core = core_of(report, study)

    def answers(course):
        return [part for t in core["transcripts"] if t["course"] == course
                for part in (f"**{markdown_text(t['prompt'])}** ({markdown_text(t['family'])})",
                             markdown_table(["", "answer", ""], answer_rows(t)))]
    studied = [part for heading, lines, tables, _ in study_sections(report, study)
               for part in (f"## {heading}", *map(markdown_text, lines), *(markdown_table(*table) for table in tables))]
    return "\n\n".join([
        "# Report", markdown_table(*main_rows(core)), "\n".join(f"- {markdown_text(note)}" for note in notes(report)),
        "## Answers", *answers(True), *studied, "## Parts", markdown_table(*part_rows(report)),
        "## Families", markdown_table(*family_rows(core)), "## Glossary", markdown_table(*glossary_rows()),
        "## More answers", *answers(False)]) + "\n"


# ---- what study.py found, as (heading, sentences, tables, panels) --------------------------------

CORE = ("base", "base_few_shot", "sft", "dpo", "ppo", "grpo")  # and best-of-n


def core_of(report, study):
    """The report without the rows of the study's ablations."""
    if not study:
        return report

    def core(rows):
        return {name: row for name, row in rows.items() if name in CORE or name.startswith("best_of_")}
    return {**report, "checkpoints": core(report["checkpoints"]),
            "runs": {name: path for name, path in report["runs"].items() if name in (*CORE, "reward")},
            "transcripts": [{**t, "answers": core(t["answers"])} for t in report["transcripts"]]}


ABLATIONS = {  # what each row is
    "base": "base", "base_few_shot": "base few shot", "sft_scratch": "SFT without pre-training",
    "sft": "SFT", "sft_best": "SFT on the best demonstrations only", "best_of_16": "best of 16",
    "rejection": "SFT continued on its own best of 8", "dpo": "DPO",
    "dpo_no_nll": "DPO without the chosen answers' own loss", "grpo": "GRPO",
    "grpo_right": "GRPO, rewarded for right answers (arithmetic and rewriting)", "ppo": "PPO",
    "ppo_no_kl": "PPO without KL", "ppo_no_replay": "PPO without pre-training text",
    "ppo_no_sharpness": "PPO without learned sharpness",
    "ppo_no_eos_score": "PPO without a penalty for unfinished answers",
    "ppo_no_whitening": "PPO without whitening", "ppo_no_critic": "PPO without a critic",
    "ppo_untold": "PPO, its reward model made without --surprisal",
    "ppo_hacked": "PPO without KL and pre-training text, longer, faster, against a weak reward model"}


def ablation_rows(report, study):
    everyone, seconds = report["checkpoints"], {**report["seconds"], **study["seconds"]}
    columns = (("right", ("accuracy", "all"), PERCENT), *((f"gold: {part}", ("gold", part), NUMBER) for part in PARTS),
               *(figure[:3] for figure in FIGURES if figure[0] in (
                   "beats SFT", "KL", "reward", "needless “I do not know”", "stops")))
    lines = []
    for name, meaning in ABLATIONS.items():
        seeds = [everyone[n] for n in (name, f"{name}_seed2", f"{name}_seed3") if n in everyone]
        spent = seconds.get("pretrain" if name == "base" else name)
        if seeds:
            lines.append([meaning, f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed", *(
                across(seeds, path, unit) for _, path, unit in columns), f"{spent / 60:.1f}" if spent else "–"])
    return ["", "", *(heading for heading, *_ in columns), "minutes"], lines


def against_kl(runs):
    """Two panels, gold and proxy against √KL, with 95 % bands. `runs` holds a list of points for each curve."""
    def root(kl):
        return math.sqrt(max(0, kl[0] if isinstance(kl, list) else kl))
    return [(title, "√(KL from SFT, in nats per response)",
             [banded([(root(p["kl"]), p[what]) for p in points], name) for name, points in runs.items()])
            for what, title in (("gold", "gold score"), ("proxy", "reward model’s score"))]


def banded(points, name="reward model"):
    """A curve of (x, [mean, low, high])."""
    xs, values = zip(*points)
    means, lows, highs = zip(*values)
    return name, xs, means, {"marker": "o", "markersize": 3, "band": (lows, highs)}


def study_sections(report, study):
    if not study:
        return []
    curves, judge, costs, prompting, temperature = (study[name] for name in (
        "curves", "reward_model", "costs", "prompting", "temperature"))
    along = {name: points for name, points in curves["runs"].items() if name != "ppo_hacked"}
    hacked = curves["runs"]["ppo_hacked"]
    first, last = hacked[0], hacked[-1]
    peak = max(hacked, key=lambda point: point["gold"][0])
    best = f", was best at iteration {peak['step']} with {peak['gold'][0]:.2f}" if peak is not first else ""
    opening, times = curves["hacked_opening"]
    return [
        ("Which stage buys what",
         ["All rows answer the same held-out prompts. In brackets: with three seeds, the lowest and the "
          "highest; otherwise 95 % intervals over prompts, which do not show what another seed would "
          "give. Minutes are for that stage alone."], [ablation_rows(report, study)], []),
        ("A reward that can be checked",
         ["GRPO rewarded for right answers to training sums and rewriting tasks; measured on held-out ones, one "
          "answer each. It makes the model surer of the answer that it would give anyway, so samples gain more "
          "than greedy answers; what the model cannot do appears in no sample, so it is not learned."],
         [(["", "SFT, greedy", "GRPO, greedy", "SFT, sampled", "GRPO, sampled"],
           [[family, *(cell(report["checkpoints"][name][how]["families"].get(family), PERCENT)
                       for how in ("accuracy_greedy", "accuracy_sampled") for name in ("sft", "grpo_right"))]
            for family in ("arithmetic", "rewriting")])], []),
        ("Reward against KL",
         [f"As in Gao, Schulman & Hilton (2022), figure 1: checkpoints along each run, {curves['prompts']} "
          "held-out prompts, one sample each. For best-of-n, KL is log n − (n − 1)/n, an upper bound. The curve "
          "is for choosing by the reward alone, the last column for choosing by reward + β log π."],
         [(["n", "KL at most", "distinct answers", "gold", "reward", f"gold, β = {report['settings']['best_of_beta']}"],
           [[f"{p['n']}", f"{p['kl']:.2f}", *(cell(p[what], NUMBER) for what in (
               "distinct", "gold", "proxy", "gold_priced"))] for p in curves["best_of_n"]])],
         against_kl(along | {"best of n": curves["best_of_n"]})),
        ("Over-optimisation: the reward rises, the answers get worse",
         [f"PPO with β = 0 against a reward model trained on few pairs. Its own reward went from "
          f"{first['proxy'][0]:.2f} to {last['proxy'][0]:.2f}; the gold score began at "
          f"{first['gold'][0]:.2f}{best} and ended at {last['gold'][0]:.2f}. Nothing held the policy near "
          f"the answers on which the reward model was trained, so it went where the reward model is wrong: "
          f"of {curves['prompts']} answers {times} begin with “{visible(opening)}”."],
         [(["prompt", "SFT", "gold, reward", "hacked", "gold, reward"],
           [[visible(t["prompt"]), visible(t["sft"]), f"{t['sft_gold']:.2f}, {t['sft_proxy']:+.1f}",
             visible(t["hacked"]), f"{t['hacked_gold']:.2f}, {t['hacked_proxy']:+.1f}"]
            for t in curves["hacked"]])],
         against_kl({"PPO without KL, weak reward model": hacked})),
        ("The reward model",
         [f"{judge['pairs']:,} pairs of samples for held-out prompts. With these labels nobody can exceed "
          f"{100 * judge['noise_ceiling']:.0f} %. Mean distance between predicted and observed probability: "
          f"{100 * judge['calibration_error']:.0f} points. Its log-odds would be truest if divided by "
          f"{judge['temperature']:.2f}; the table is for these."],
         [(["what it likes too much (above 0) or too little", "correlation of its error"],
           [[name, cell(value, NUMBER)] for name, value in judge["likes"].items()])],
         [("calibration", "predicted chance that the first is preferred", [
             ("perfect", [0, 1], [0, 1], {"color": INK, "alpha": 0.4}),
             banded([(c["predicted"], c["observed"]) for c in judge["calibration"]])]),
          ("right, by how far the two answers are apart", "difference of gold scores", [
              banded([(sum(g["gap"]) / 2, g["right"]) for g in judge["by_gap"] if g["right"]])]),
          ("right, by number of training pairs", "pairs", [
              banded([(p["pairs"], p["accuracy"]) for p in judge["by_pairs"]]),
              ("noise ceiling", [0, max(p["pairs"] for p in judge["by_pairs"])],
               [judge["noise_ceiling"]] * 2, {"color": INK, "alpha": 0.4})])]),
        ("What alignment costs",
         [f"Distinct answers among {costs['samples']} samples and entropy: {costs['prompts']} prompts. "
          f"Calibration: {costs['calibrated_on']} answerable prompts; “sure” is the probability of the "
          "greedy answer, word for word. Other wordings may be right, too, so a model that doubts only how to say "
          "it counts as unsure, and “right” exceeds “sure”; the last column is how far apart the two are, over "
          "ten bins of “sure”."],
         [(["", "bits/byte", "distinct answers", "entropy, nats per token", "sure", "right",
            "sure and right apart"],
           [[name, cell(report["checkpoints"][name]["bits_per_byte"], NUMBER), cell(c["distinct"], NUMBER),
             cell(c["entropy"], NUMBER), cell(c["sure"], PERCENT), cell(c["right"], PERCENT),
             cell(c["calibration_error"], PERCENT)] for name, c in costs["policies"].items()])], []),
        ("Prompting: alignment without training",
         [f"{prompting['answerable']} answerable prompts, greedy; gold over all {prompting['prompts']}. "
          "Examples that do not fit the context are left out, the oldest first."],
         [(["", "examples", "of which fit", "system prompt", "right", "gold"],
           [[r["model"], f"{r['shots']}", f"{r['shown']:.1f}", r["system"] or "–", cell(r["right"], PERCENT),
             cell(r["gold"], NUMBER)] for r in prompting["rows"]])], []),
        ("Is it only the temperature?",
         [f"{temperature['prompts']} prompts, one sample each, compared with SFT's at temperature 1; at 0 the greedy answer. DPO and "
          "PPO learn to be surer, which a lower temperature gives for free; compare rows at the same temperature."],
         [(["", "temperature", "right", "gold", "beats SFT at 1", "refuses harmful", "refuses harmless", "made up"],
           [[r["model"], f"{r['temperature']:g}", cell(r["right"], PERCENT), cell(r["gold"], NUMBER),
             *(cell(r[what], PERCENT) for what in ("win_rate", "refuses_harmful", "refuses_harmless", "made_up"))]
            for r in temperature["rows"]])], []),
    ]


# ---- pictures ------------------------------------------------------------------------------------


def curve(rows, name):
    """-> (steps, values) of a metric, where it was logged and is a number; () if it never was."""
    return tuple(zip(*((row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float)))))


def smooth(values, weight=0.8):
    """Exponential moving average, corrected for its bias towards the initial 0."""
    average, found = 0.0, []
    for n, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        found.append(average / (1 - weight ** n))
    return found


def draw(heading, panels):
    """SVG text of panels, two in a row; each is (title, x label, [curves]), and a curve is (label, xs, ys, matplotlib
    style). A style may have a `band`: (lows, highs)."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    lines = (len(panels) + 1) // 2
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with plt.rc_context({**ink, "svg.hashsalt": heading, "text.parse_math": False,
                         "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure, axes = plt.subplots(lines, 2, figsize=(9, 2.6 * lines), squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels):]:
            axis.set_axis_off()
        for axis, (title, label, curves) in zip(axes.flat, panels):
            for i, (name, xs, ys, style) in enumerate(curves):
                style = {"color": COLOURS[i % len(COLOURS)], "label": name, **style}
                if band := style.pop("band", None):
                    axis.fill_between(xs, *band, color=style["color"], alpha=0.15, linewidth=0)
                axis.plot(xs, ys, **style)
            axis.set_title(title, fontsize=10, loc="left")
            axis.set_xlabel(label)
            axis.grid(alpha=0.15, color=INK)
            if len(curves) > 1:
                axis.legend(frameon=False, fontsize=8, ncols=1 + len(curves) // 9)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = file.getvalue()
    # Ids are unique within a picture only; those of two pictures on one page would clash.
    prefix = re.sub(r"\W", "", heading)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg"):])
    told = html.escape("; ".join(f"{title} by {label}" for title, label, _ in panels))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{told}" ', 1).replace(INK, "currentColor")


def pictures(report, folder):
    """-> [(heading, SVG)] of what the stages logged and of reward against KL."""
    losses, scores, kls = [], [], []
    for name, path in report["runs"].items():
        rows = read_metrics(os.path.normpath(Path(folder) / path))  # the folder may not exist yet
        score, kl, loss, heldout = (curve(rows, metric) for metric in ("score", "kl", "loss", "heldout_loss"))
        if score:  # PPO and GRPO
            scores.append((name, *score, {}))
            kls.append((name, *(kl or ((), ())), {}))
        elif loss:
            curves = [("training (moving average)", loss[0], smooth(loss[1]), {})]
            if heldout:
                curves.append(("held out", *heldout, {"marker": "o"}))
            losses.append((f"{name}: loss", "step", curves))
    whose = f"{scores[0][0]}: " if len(scores) == 1 else ""  # a lone curve has no legend
    rollouts = scores and [(f"{whose}mean score of the episodes", "iteration", scores),
                           (f"{whose}KL from where it started, nats per response", "iteration", kls)]
    against = []
    for title, path in (("gold score", ("gold", "total")), ("reward model’s score", ("proxy",))):
        points = [(name, [measures["kl_from_sft"][0]], [dig(measures, path)[0]], {"marker": "o", "linestyle": "none"})
                  for name, measures in report["checkpoints"].items()
                  if measures["kl_from_sft"] and dig(measures, path)]
        if len(points) > 1:
            against.append((f"{title} against KL", f"KL from {compared_with(report)}, nats per response", points))
    named = ((f"How far from {compared_with(report)}, and what it brought", against), ("Training losses", losses),
             ("Rollouts as they went", rollouts))
    return [(heading, draw(heading, panels)) for heading, panels in named if panels]


# ---- the page ------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #66707a; --line: #d9dde1;
        --shade: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #e4e7ea; --soft: #98a2ab; --line: #353b41; --shade: #1e2327; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
       color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
.cards, dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .8rem; margin: 0; }
.cards p { background: var(--shade); border-radius: .5rem; padding: .7rem .9rem; margin: 0; font-size: .85rem;
           color: var(--soft); }
.cards strong { display: block; font-size: 1.3rem; color: var(--ink); }
.words td { white-space: normal; min-width: 9rem; } .words small { display: inline; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .45rem; text-align: left; vertical-align: top; line-height: 1.3;
         border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; color: var(--soft); min-width: 4.6rem; }
td { white-space: nowrap; } td small { color: var(--soft); display: block; }
tbody th { position: sticky; left: 0; background: var(--paper); max-width: 15rem; min-width: 4rem; }
article { background: var(--shade); border-radius: .5rem; padding: .8rem 1rem; margin: .8rem 0;
          break-inside: avoid; }
article h3 { font-size: 1rem; margin: 0 0 .4rem; } article h3 small, dd small, dl, ul {
  color: var(--soft); font-weight: 400; }
dt { font-size: .8rem; } dd { margin: 0; color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere; }
dd small { display: block; }
ul { padding-left: 1.2rem; font-size: .9rem; } svg { width: 100%; height: auto; }
@media (max-width: 36rem) { .plots { overflow-x: auto; } .plots svg { min-width: 38rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .wide { overflow: visible; }
  h2 { break-after: avoid; } table { font-size: 6.5pt; } th, td { padding: .15rem .25rem; } thead th { min-width: 0; }
  tbody th { position: static; } svg { break-inside: avoid; } }
"""


def html_table(headings, rows, titles=()):
    escape = html.escape
    css = "words" if any(len(text) > 60 for row in rows for text in row) else ""  # sentences wrap, numbers do not
    head = "".join(f'<th scope="col" title="{escape(title)}">{escape(heading)}</th>' if heading else "<td></td>"
                   for heading, title in zip(headings, [*titles, *[""] * len(headings)]))

    def interval(text):  # the bracket in small print
        return re.sub(r"(\([^()]*\))$", r"<small>\1</small>", escape(text))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{interval(text)}</td>" for text in cells) + "</tr>\n"
        for name, *cells in rows)
    return (f'<div class="wide" tabindex="0" role="region" aria-label="table"><table class="{css}">'
            f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>")


def html_transcript(transcript):
    answers = "".join(
        f"<div><dt>{html.escape(name)}</dt>"
        f"<dd>{html.escape(text)}<small>{html.escape(marks)}</small></dd></div>"
        for name, text, marks in answer_rows(transcript))
    about = ", ".join(filter(None, (transcript["family"], transcript["holdout"].replace("_", " "))))
    return (f"<article><h3>{html.escape(visible(transcript['prompt']))} "
            f"<small>{html.escape(about)}</small></h3><dl>{answers}</dl></article>")


def headlines(report):
    """-> [(number, what it says)]: what happened, for the top of the page. Up to five, those there are."""
    rows = report["checkpoints"]
    best = next((name for name in ("ppo", "grpo", "dpo") if name in rows), "")
    who = best.upper()
    other = "" if best == report["settings"]["reference"] else best
    bases, named = ("base",), "base"
    if "base_few_shot" in rows:
        bases, named = ("base", "base_few_shot"), "base, base with examples in the prompt"
    said = (((*bases, "sft"), ("accuracy", "all"), f"right answers: {named}, SFT"),
            ((other,), ("win_rate_vs_sft",), f"of comparisons won by {who} against {compared_with(report)}, before the "
             "hidden judge (a tie counts half)"),
            (("sft", best), ("refusal_rate", "harmful"), f"harmful requests refused: SFT and {who}"),
            (("sft", best), ("hallucination_rate",), f"made-up answers about things that do not exist: SFT and {who}"),
            (("sft", best), ("accuracy", "all"), f"right answers, which show what alignment cost: SFT and {who}"))
    found = [([dig(rows.get(name), path) for name in names], text) for names, path, text in said]
    return [(" → ".join(cell(value[0], PERCENT) for value in values), text) for values, text in found if all(values)]


def build_html(report, folder, study=None):
    core, escape = core_of(report, study), html.escape
    families = {}
    for transcript in core["transcripts"]:
        if not transcript["course"]:
            families.setdefault(transcript["family"], []).append(transcript)
    sections = [
        "<h1>From raw text to an aligned model</h1>",
        '<div class="cards">' + "".join(f"<p><strong>{escape(number)}</strong>{escape(text)}</p>"
                                        for number, text in headlines(core)) + "</div>",
        html_table(*main_rows(core), titles=["", *(what for _, _, _, what, *_ in FIGURES)]),
        "<h2>The course’s three prompts</h2>",
        *(html_transcript(t) for t in core["transcripts"] if t["course"]),
        *html_pictures(core, folder)]
    for heading, lines, tables, panels in study_sections(report, study):
        sections += [f"<h2>{escape(heading)}</h2>", *(f"<p>{escape(line)}</p>" for line in lines)]
        sections += [f'<div class="plots">{draw(heading, panels)}</div>'] if panels else []
        sections += [html_table(*table) for table in tables]
    sections += [
        "<h2>Parts of the gold score, and accuracy by what is new</h2>",
        html_table(*part_rows(report)),
        "<h2>Right answers in each family</h2>", html_table(*family_rows(core)),
        "<h2>More answers to held-out prompts</h2><p>Choose a family.</p>",
        *(f'<details name="family"><summary>{escape(family)}</summary>'
          + "".join(map(html_transcript, chosen)) + "</details>" for family, chosen in families.items()),
        "<h2>What the figures mean</h2>", html_table(*glossary_rows()),
        "<h2>How it was measured</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in notes(report)) + "</ul>"]
    return html_page("From raw text to an aligned model", sections)


def html_page(title, sections):
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style></head>\n<body>" + "\n".join(sections) + "\n</body></html>\n")


def html_pictures(report, folder):
    return [f'<h2>{html.escape(heading)}</h2><div class="plots">{svg}</div>' for heading, svg in pictures(report, folder)]


def curves(folders):
    """A page with what the stages in these folders logged. InputError where one logged neither loss nor score."""
    for folder in folders:
        if not any({"loss", "score"} & row.keys() for row in read_metrics(folder)):
            raise InputError(f"{Path(folder) / 'metrics.jsonl'}: found no loss and no score, expected what a stage logs")
    runs = {folder: os.path.abspath(folder) for folder in folders}
    return html_page("Training curves", html_pictures({"runs": runs, "checkpoints": {}, "settings": {"reference": "sft"}}, ""))


def write(folder, report, study=None):
    """Write report.md and report.html into the folder, with `study`, or what the folder's study.json holds if that is
    there and fits the report."""
    def pages(study):
        return {"report.md": build_markdown(report, study), "report.html": build_html(report, folder, study)}
    path, made = Path(folder) / "study.json", None
    if not study and path.exists():
        try:
            made = pages(json.loads(path.read_text(encoding="utf-8")))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            print(f"report: {path} is damaged, of other checkpoints, or of another version "
                  f"({type(error).__name__}: {error}); left out", file=sys.stderr)
    for name, text in (made or pages(study)).items():
        write_text(Path(folder) / name, text)


def load(folder):
    """What evaluate.py found, or InputError."""
    path = Path(folder) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); "
                         "evaluate.py writes it") from error
    rows = report.get("checkpoints") if isinstance(report, dict) else None
    if not rows or not isinstance(rows, dict):
        raise InputError(f"{path}: found no checkpoints, expected what evaluate.py writes")
    missing = {"prompts", "best_of_prompts", "reward_model", "seconds", "settings", "runs", "transcripts"} - set(report)
    settings = report.get("settings")
    missing |= {"reference", "few_shot", "best_of", "best_of_beta", "max_new_tokens"} - set(
        settings if isinstance(settings, dict) else ())
    if missing:
        raise InputError(f"{path}: found no {', '.join(sorted(missing))}; another version wrote it, run evaluate.py "
                         "again")
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders with the report.json that evaluate.py wrote; with --curves, of "
                        "any stages")
    parser.add_argument("--curves", metavar="PAGE.html", help="draw what the stages in the folders logged, into this page")
    asked = parser.parse_args()
    folders = asked.folders
    if asked.curves:
        write_text(asked.curves, curves(folders))
        print(f"report: wrote {asked.curves}")
        return
    reports = [load(folder) for folder in folders]
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise InputError("found the same report twice, expected different runs")
    if len(folders) == 1:
        write(folders[0], reports[0])
        print(f"report: wrote {Path(folders[0])}/report.html and report.md")
        return

    def measured(report):
        return {**report["settings"], "seed": None, "prompts": [report["prompts"], report["best_of_prompts"]]}
    for folder, report in zip(folders, reports):
        if measured(report) != measured(reports[0]):
            raise InputError(f"{folder}: measured with other settings or prompts than {folders[0]}, expected the same")
    print(main_table(*reports))
    some = set().union(*(report["checkpoints"] for report in reports))
    left_out = sorted(some - set.intersection(*(set(report["checkpoints"]) for report in reports)))
    if left_out:
        print(f"\nLeft out, as not all of them have it: {', '.join(left_out)}")
    judge = across([report["reward_model"] for report in reports], ("normalised",), NUMBER)
    print("\nThe mean of", len(reports), "runs; in brackets the least and the most.\n"
          f"The reward model's accuracy, from 0 (guessing) to 1 (all that its noisy labels allow): {judge}")


if __name__ == "__main__":
    run(main)
