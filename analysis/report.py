"""Pictures and one page of a folder of 05_eval.py's results; the page has problems won and lost
side by side with responses.

    python analysis/report.py results/tiny    # accuracy.png ... for report.md, and report.html

Input: summary.json and BENCHMARK/MODEL.jsonl as 05 writes them. report.html is one file, without a
script. Of each of the first six models it shows ten problems won and ten lost against the base.
Formulas are MathML; what a model wrote is escaped."""

import base64
import importlib
import json
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import jinja2
import latex2mathml.converter
import numpy as np
import tyro
from markupsafe import Markup

sys.path.insert(0, str(Path(__file__).parents[1]))
EVAL = importlib.import_module("05_eval")
FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?![\s$])((?:[^$\n]*[^\s$\\])?)\$(?!\d)"
    r"|(\\boxed\{(?:[^{}]|\{[^{}]*\})*\})",
    re.S,
)
UNSAFE = re.compile(r"\\(?:href|url|class|style|cssId|unicode|html)")  # commands that make links
PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px }
td, th { border: 1px solid #ccc; padding: 3px 8px; text-align: right }
td:first-child, td:nth-child(2), th { text-align: left }
img { max-width: 100% }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1em }
.two > div { white-space: pre-wrap; border: 1px solid #ddd; padding: .6em; overflow-wrap: anywhere }
menclose { border: 1px solid; padding: 1px 3px }
.right { border-left: 5px solid #2a7 !important }
.wrong { border-left: 5px solid #c33 !important }
.error { border-bottom: 2px solid #c33 }
</style>
<h1>{{ title }}</h1><p>{{ about }}</p>
{% for title, head, rows, note in tables %}
{% if title %}<h2>{{ title }}</h2>{% endif %}<p>{{ note }}</p>
<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
{% if loop.first %}{% for name, data in pictures %}
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">{% endfor %}{% endif %}
{% endfor %}
{% for title, problems in sides %}<h3>{{ title }}</h3>
{% for id, problem, answer, columns in problems %}
<details><summary>{{ id }}: {{ problem[:200] | formulas }}</summary>
<p>{{ problem | formulas }}</p><p>Answer: {{ answer }}</p>
<div class="two">{% for label, kind, prediction, response in columns %}
<div class="{{ kind }}"><b>{{ label }}</b>: {{ prediction }}
{{ response | formulas }}</div>{% endfor %}</div></details>
{% endfor %}{% endfor %}
{{ more | safe }}"""


@dataclass
class Args:
    results: tyro.conf.Positional[Path]
    """the --out of 05_eval.py"""


def bars(axes, figures: dict[str, dict[str, dict]]):
    """A group of bars for each key of `figures`, in it a bar for each model, with its 95 %
    interval."""
    models = list(next(iter(figures.values())))
    width = 0.8 / len(models)
    style = {"capsize": 3, "error_kw": {"lw": 1}}
    for i, model in enumerate(models):
        shares = 100 * np.array([by_model[model]["accuracy"] for by_model in figures.values()])
        ends = 100 * np.array([by_model[model]["interval"] for by_model in figures.values()]).T
        x = np.arange(len(figures)) + (i - (len(models) - 1) / 2) * width
        axes.bar(x, shares, width, yerr=abs(ends - shares), label=model[-40:].lstrip("_"), **style)
        if len(figures) * len(models) <= 12:
            for place, share, top in zip(x, shares, ends[1], strict=True):
                axes.text(place, top + 1, f"{share:.1f}", ha="center", fontsize=9)
    axes.set(ylabel="accuracy, %", xlim=(-0.75, len(figures) - 0.25), ylim=(0, 108))
    axes.set_xticks(range(len(figures)), figures)


def draw_curves(axes, curves: dict[str, dict]):
    """pass@k and maj@k of each model over k."""
    for i, (model, curve) in enumerate(curves.items()):
        ks = curve["k"]
        for kind, style in (("pass", "o-"), ("maj", "o--")):
            label = f"{model[-30:].lstrip('_')}, {kind}@k"
            axes.plot(ks, 100 * np.array(curve[kind]), style, color=f"C{i}", ms=4, label=label)
    axes.set(xscale="log", xlabel="k, responses a problem", ylabel="problems, %")
    axes.set_xticks(ks, ks)
    axes.minorticks_off()


def draw_pictures(summary: dict, out: Path) -> list[Path]:
    """accuracy.png, levels.png where there are levels, and curves.png where there are several
    samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.alpha": 0.3,
        "figure.constrained_layout.use": True,
    }
    files = []
    models = {  # by benchmark and label; not those of single seeds
        name: {label: benchmark["models"][label] for label in summary["groups"]}
        for name, benchmark in summary["benchmarks"].items()
    }

    def save(figure, name: str):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        style = {"ncol": min(3, len(labels)), "frameon": False, "fontsize": 9}
        figure.legend(handles, labels, loc="outside upper center", **style)
        figure.savefig(out / name, dpi=150)
        plt.close(figure)
        files.append(out / name)

    figure, axes = plt.subplots(figsize=(8, 4))
    bars(axes, models)
    save(figure, "accuracy.png")
    leveled = {}
    for name, by_label in models.items():
        levels = {label: figures["by"].get("level") for label, figures in by_label.items()}
        first = next(iter(levels.values()))
        if first:
            leveled[name] = {
                level: {label: parts[level] for label, parts in levels.items()} for level in first
            }
    if leveled:
        figure, grid = plt.subplots(len(leveled), 1, figsize=(8, 3.4 * len(leveled)), squeeze=False)
        for name, axes in zip(leveled, grid[:, 0], strict=True):
            bars(axes, leveled[name])
            axes.set(xlabel="level")
            axes.set_title(f"{name} by level", fontsize=11, loc="left")
        save(figure, "levels.png")
    benchmarks = summary["benchmarks"]
    sampled = [name for name in benchmarks if benchmarks[name]["samples"] > 1]
    if sampled:
        size = (max(6, 4 * len(sampled)), 4)
        figure, grid = plt.subplots(1, len(sampled), figsize=size, squeeze=False)
        for name, axes in zip(sampled, grid[0], strict=True):
            curves = {label: figures["curves"] for label, figures in models[name].items()}
            draw_curves(axes, curves)
            axes.set_title(name)
        save(figure, "curves.png")
    return files


def to_html(text: str) -> str:
    """Text with its formulas as MathML, which browsers show without a script. Everything else is
    escaped: it is a model's."""

    def formula(tex: str) -> str:
        source = f"<code>{escape(tex)}</code>"
        if len(tex) >= 2000 or UNSAFE.search(tex):
            return source
        try:
            return latex2mathml.converter.convert(tex.replace("<", "\\lt ").replace(">", "\\gt "))
        except Exception:  # half a formula, or a command that it does not know
            return source

    parts, end = [], 0
    for match in FORMULA.finditer(text[:20_000]):
        tex = next((group for group in match.groups() if group), "")
        parts += [escape(text[end : match.start()]), formula(tex)]
        end = match.end()
    parts.append(escape(text[end:20_000]))
    return "".join(parts)


def render(**parts) -> str:
    """The page; what is no markup of ours is escaped."""
    environment = jinja2.Environment(autoescape=True)
    environment.filters["formulas"] = lambda text: Markup(to_html(text))
    return environment.from_string(PAGE).render(parts)


def sides_of(name: str, figures: dict, responses: dict[str, dict], field: str) -> list[tuple]:
    """(title, problems) of ten problems won and ten lost: a right and a wrong response of the two
    models each. `responses` holds by label, the base first, the rows of each problem, of all
    seeds."""
    base, model = responses
    sides, rng = [], np.random.default_rng(0)
    for kind in ("won", "lost"):
        ids, problems = figures[kind], []
        for i in sorted(rng.permutation(len(ids))[:10]):
            columns = []
            for label, correct in ((base, kind == "lost"), (model, kind == "won")):
                # of several responses and seeds one with the majority's verdict
                row = next(row for row in responses[label][ids[i]] if row[field] == correct)
                style = "right" if correct else "wrong"
                columns.append((label, style, str(row["prediction"]), row["response"]))
            problems.append((ids[i], row.get("problem", ""), str(row["answer"]), columns))
        sides.append((f"{name}: {len(problems)} of {len(ids)} {kind} by {model}", problems))
    return sides


def read_responses(folder: Path, groups: dict[str, list[str]]) -> dict:
    """Rows by label and problem id: of a label's seeds one after the other, of each in the order of
    the samples."""
    responses = {label: {} for label in groups}
    labels = {model: label for label, models in groups.items() for model in models}
    for path in sorted(folder.glob("*.jsonl")):
        for row in sorted(EVAL.read_rows(path, ("id",)), key=lambda row: row.get("sample", 0)):
            label = labels.get(str(row.get("model", path.stem)))
            if label:  # a file of another run has none
                responses[label].setdefault(str(row["id"]), []).append(row)
    return responses


def main(args: Args):
    path = args.results / "summary.json"
    if not path.is_file():
        EVAL.stop(f"{path}: no such file; give the --out of 05_eval.py")
    try:
        summary, sides = json.loads(path.read_text()), []
        base, *others = summary["groups"]
        about, tables = EVAL.about(summary), EVAL.tables_of(summary)
        for name, benchmark in summary["benchmarks"].items():
            responses = read_responses(args.results / name, summary["groups"])
            for label in others[:6]:
                pair = {base: responses[base], label: responses[label]}
                figures, field = benchmark["models"][label], summary.get("verdict", "correct")
                sides += sides_of(name, figures, pair, field)
    except (ValueError, KeyError, StopIteration) as error:
        again = f"python analysis/regrade.py {args.results}"
        EVAL.stop(
            f"{path}: not as this version of 05_eval.py writes it, or of other responses "
            f"({error!r}); make it anew by {again}"
        )
    try:
        files = draw_pictures(summary, args.results)
    except OSError as error:
        EVAL.stop(
            f"{args.results}: pictures cannot be written ({error.strerror}); "
            "make room and run the same command again"
        )
    EVAL.write_report(summary, args.results, tuple(files))
    pictures = [(file.stem, base64.b64encode(file.read_bytes()).decode()) for file in files]
    out = args.results / "report.html"
    parts = {"tables": tables, "pictures": pictures, "sides": sides}
    EVAL.save(out, render(title="Evaluation", about=about, **parts))
    count = sum(len(problems) for _, problems in sides)
    print(f"{out}: {len(tables)} tables, {len(pictures)} pictures, {count} problems side by side")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
