"""Pictures and one page of a folder of 05_eval.py's results; the page has problems won and lost
side by side with responses.

    python analysis/report.py results/tiny        # -> accuracy.png ..., which report.md shows then, and report.html

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
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% if loop.first %}{% for name, data in pictures %}
<img alt="{{ name }}" src="data:image/png;base64,{{ data }}">{% endfor %}{% endif %}
{% endfor %}
{% for title, problems in sides %}<h3>{{ title }}</h3>
{% for id, problem, answer, columns in problems %}
<details><summary>{{ id }}: {{ problem[:200] | formulas }}</summary><p>{{ problem | formulas }}</p><p>Answer: {{ answer }}</p>
<div class="two">{% for label, kind, prediction, response in columns %}
<div class="{{ kind }}"><b>{{ label }}</b>: {{ prediction }}
{{ response | formulas }}</div>{% endfor %}</div></details>
{% endfor %}{% endfor %}
{{ more | safe }}"""


@dataclass
class Args:
    results: tyro.conf.Positional[Path]
    """the --out of 05_eval.py"""
    seed: int = 0
    """draws the problems"""


def bars(axes, figures: dict[str, dict[str, dict]]):
    """A group of bars for each key of `figures`, in it a bar for each model, with its 95 %
    interval."""
    models = list(next(iter(figures.values())))
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        shares = 100 * np.array([found[model]["accuracy"] for found in figures.values()])
        ends = 100 * np.array([found[model]["interval"] for found in figures.values()]).T
        x = np.arange(len(figures)) + (i - (len(models) - 1) / 2) * width
        axes.bar(
            x,
            shares,
            width,
            yerr=abs(ends - shares),
            capsize=3,
            label=model[-40:],
            error_kw={"lw": 1},
        )
        if len(figures) * len(models) <= 12:
            for place, share, top in zip(x, shares, ends[1], strict=True):
                axes.text(place, top + 1, f"{share:.1f}", ha="center", fontsize=9)
    axes.set(ylabel="accuracy, %", xlim=(-0.75, len(figures) - 0.25), ylim=(0, 108))
    axes.set_xticks(range(len(figures)), figures)


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
    }
    plt.rcParams |= {
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.alpha": 0.3,
        "figure.constrained_layout.use": True,
    }
    files, models = (
        [],
        {
            name: {label: found["models"][label] for label in summary["groups"]}
            for name, found in summary["benchmarks"].items()
        },
    )

    def save(figure, name: str):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncol=min(3, len(labels)),
            frameon=False,
            fontsize=9,
        )
        figure.savefig(out / name, dpi=150)
        plt.close(figure)
        files.append(out / name)

    figure, axes = plt.subplots(figsize=(8, 4))
    bars(axes, models)
    save(figure, "accuracy.png")
    leveled = {
        name: {
            level: {label: f["by"]["level"][level] for label, f in found.items()}
            for level in first["by"]["level"]
        }
        for name, found in models.items()
        if "level" in (first := next(iter(found.values())))["by"]
    }
    if leveled:
        figure, grid = plt.subplots(len(leveled), 1, figsize=(8, 3.4 * len(leveled)), squeeze=False)
        for name, axes in zip(leveled, grid[:, 0], strict=True):
            bars(axes, leveled[name])
            axes.set_title(f"{name} by level", fontsize=11, loc="left")
        save(figure, "levels.png")
    several = [name for name, found in summary["benchmarks"].items() if found["samples"] > 1]
    if several:
        figure, grid = plt.subplots(
            1, len(several), figsize=(max(6, 4 * len(several)), 4), squeeze=False
        )
        for name, axes in zip(several, grid[0], strict=True):
            for i, (model, f) in enumerate(models[name].items()):
                for kind, style in (("pass", "-"), ("maj", "--")):
                    values, label = 100 * np.array(f["curves"][kind]), f"{model[-30:]}, {kind}@k"
                    axes.plot(
                        f["curves"]["k"], values, f"o{style}", color=f"C{i}", ms=4, label=label
                    )
            axes.set(
                xscale="log", xlabel="k, responses a problem", title=name, ylabel="problems, %"
            )
            axes.set_xticks(f["curves"]["k"], f["curves"]["k"])
            axes.minorticks_off()
        save(figure, "curves.png")
    return files


def to_html(text: str) -> str:
    """Text with its formulas as MathML, which browsers show without a script. Everything else is
    escaped: it is a model's."""

    def formula(tex: str) -> str:
        safe = len(tex) < 2000 and not re.search(
            r"\\(?:href|url|class|style|cssId|unicode|html)", tex
        )
        try:
            return (
                latex2mathml.converter.convert(tex.replace("<", "\\lt ").replace(">", "\\gt "))
                if safe
                else 1 / 0
            )
        except Exception:  # half a formula, or a command that it does not know: the source, as code
            return f"<code>{escape(tex)}</code>"

    parts, end = [], 0
    for found in FORMULA.finditer(text[:20_000]):
        parts += [
            escape(text[end : found.start()]),
            formula(next((part for part in found.groups() if part), "")),
        ]
        end = found.end()
    return "".join([*parts, escape(text[end:20_000])])


def render(**parts) -> str:
    """The page; what is no markup of ours is escaped."""
    environment = jinja2.Environment(autoescape=True)
    environment.filters["formulas"] = lambda text: Markup(to_html(text))
    return environment.from_string(PAGE).render(
        **{"tables": [], "pictures": [], "sides": [], "more": ""} | parts
    )


def sides_of(name: str, f: dict, sides: dict[str, dict], field: str, seed: int) -> list[tuple]:
    """(title, problems) of ten problems won and ten lost: a right and a wrong response of the two
    models each. `sides` holds by label, the base first, the rows of each problem, of all seeds."""
    (base, model), found, rng = sides, [], np.random.default_rng(seed)
    for kind, ids in (("won", f["won"]), ("lost", f["lost"])):
        problems = []
        for key in [ids[i] for i in sorted(rng.permutation(len(ids))[:10])]:
            columns = []
            for label, good in ((base, kind == "lost"), (model, kind == "won")):
                # of several responses and seeds one with the majority's verdict
                row = next(row for row in sides[label][key] if row[field] == good)
                columns.append(
                    (label, "right" if good else "wrong", str(row["prediction"]), row["response"])
                )
            problems.append((key, row.get("problem", ""), str(row["answer"]), columns))
        found.append((f"{name}: {len(problems)} of {len(ids)} {kind} by {model}", problems))
    return found


def read_responses(folder: Path, groups: dict[str, list[str]]) -> dict:
    """Rows by label and problem id: of a label's seeds one after the other, of each in the order of
    the samples."""
    found, labels = {}, {model: label for label, models in groups.items() for model in models}
    for path in sorted(folder.glob("*.jsonl")):
        for row in sorted(EVAL.read_rows(path, ("id",)), key=lambda row: row.get("sample", 0)):
            if label := labels.get(
                str(row.get("model", path.stem))
            ):  # a file of another run has none
                found.setdefault(label, {}).setdefault(str(row["id"]), []).append(row)
    return found


def main(args: Args):
    path = args.results / "summary.json"
    if not path.is_file():
        EVAL.stop(f"{path}: no such file; give the --out of 05_eval.py")
    try:
        summary, sides = json.loads(path.read_text()), []
        base, *others = summary["groups"]
        about, tables = EVAL.about(summary), EVAL.tables_of(summary)
    except (ValueError, KeyError) as error:
        again = f"python analysis/regrade.py {args.results}"
        EVAL.stop(
            f"{path}: not as this version of 05_eval.py writes it ({error!r}); make it anew by {again}"
        )
    for name, benchmark in summary["benchmarks"].items():
        responses = read_responses(args.results / name, summary["groups"])
        for label in others[:6]:
            pair = {base: responses[base], label: responses[label]}
            sides += sides_of(
                name, benchmark["models"][label], pair, summary.get("verdict", "correct"), args.seed
            )
    try:
        files = draw_pictures(summary, args.results)
    except OSError as error:
        EVAL.stop(
            f"{args.results}: pictures cannot be written ({error.strerror}); make room and run the same command again"
        )
    EVAL.write_report(summary, args.results, tuple(files))
    pictures = [(file.stem, base64.b64encode(file.read_bytes()).decode()) for file in files]
    out = args.results / "report.html"
    EVAL.save(
        out, render(title="Evaluation", about=about, tables=tables, pictures=pictures, sides=sides)
    )
    count = sum(len(found) for _, found in sides)
    print(f"{out}: {len(tables)} tables, {len(pictures)} pictures, {count} problems side by side")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
