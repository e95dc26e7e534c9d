"""The picture and the model card of a training, from what 04_train_stepdpo.py writes; several
trainings in one picture.

    # runs/tuned/training.png and runs/tuned/README.md
    python analysis/plot_training.py runs/tuned
    # a colour for each run
    python analysis/plot_training.py runs/a runs/b --out ab.png

Input: folders of 04 with metrics.jsonl, and training.json when the training is finished:
    {"step": 1, "loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "chosen_logp": -1.2, ...}

Output: loss, accuracy, margin and log-probabilities by step, as in Fig. 2 of Step-DPO: lines for
training, dashed lines for validation. Of one finished run also README.md, the model card."""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro
from matplotlib.figure import Figure

PANELS = ("loss", "accuracy", "margin", "chosen_logp", "rejected_logp")
GIVE = "give a folder that 04_train_stepdpo.py wrote"


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders that 04 wrote"""
    out: Path | None = None
    """picture; default RUN/training.png, of several runs in the folder above the first"""


def stop(message: str) -> NoReturn:
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_metrics(run: Path) -> list[dict]:
    """The logged steps of a run."""
    path, rows = run / "metrics.jsonl", []
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: cannot be read ({error.__class__.__name__}); {GIVE}")
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()  # torn: the run is writing, or was killed
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0
        except (ValueError, KeyError, TypeError):
            stop(f"{path}, line {number}: no object with a number 'step'; {GIVE}")
    return rows or stop(f"{path}: empty; no step is logged yet")


def draw(path: Path, runs: dict[str, list[dict]]):
    """Draw these runs, each with a name and its logged steps; a panel for each figure that one of
    them has."""
    logged = {name for rows in runs.values() for row in rows for name in row}
    panels = [name for name in PANELS if name in logged or f"val_{name}" in logged]
    columns = min(3, len(panels))  # more would be too small to read on a page
    rows_of_panels = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows_of_panels), layout="constrained")
    places = figure.subplots(rows_of_panels, columns, squeeze=False).flat
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, name in zip(places, panels, strict=False):
        for number, (label, rows) in enumerate(runs.items()):
            draw_curves(axes, name, rows, label, f"C{number}", from_start=len(runs) > 1)
        change = ", change since the start" if name.endswith("_logp") and len(runs) > 1 else ""
        axes.set(xlabel="step", title=name + change)
        axes.grid(alpha=0.3)
    shown = figure.axes[0].get_legend_handles_labels()  # every run has a loss, not all a margin
    figure.legend(*shown, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def draw_curves(axes, name: str, rows: list[dict], label: str, color: str, from_start: bool):
    """One run in one panel: training, and dashed validation. from_start: log-probabilities less
    the first of them, since runs on other pairs start elsewhere."""
    validated = any(f"val_{name}" in row for row in rows)
    trained_style = {"linestyle": "-", "alpha": 0.4 if validated else 1}
    validated_style = {"linestyle": "--", "marker": "o", "markersize": 4}
    for key, shown, style in (
        (name, label, trained_style),
        (f"val_{name}", f"{label}, validation", validated_style),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if key == "val_accuracy":
            # an untrained model is its reference: all margins are 0, none above it
            points = [(step, value) for step, value in points if step]
        if name.endswith("_logp") and from_start and points:
            points = [(step, value - points[0][1]) for step, value in points]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=shown, **style)


def card(run: Path, training: dict, picture: str) -> str:
    """The model card of a finished run; `picture` is a path from its folder."""
    arguments = training["arguments"]
    figures = ", ".join(f"{name} {value:.4g}" for name, value in training["last"].items())
    table = "\n".join(f"| {name} | {value} |" for name, value in arguments.items())
    return f"""---
base_model: {arguments["model"]}
library_name: transformers
---

# {run.resolve().name}

{arguments["model"]}, trained with `04_train_stepdpo.py` ({arguments["objective"]}) on \
{training["pairs"]} rows (hash {training["settings"]["pairs"]}), {training["steps"]} steps, \
{training["seconds"]} s.

Last step: {figures}.

![training]({picture})

| setting | value |
|---|---|
{table}
"""


def main(args: Args):
    if not args.runs:
        stop(f"no run; {GIVE}")
    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]
    runs = {name: read_metrics(run) for name, run in zip(names, args.runs, strict=True)}
    first = args.runs[0]
    is_alone = len(args.runs) == 1
    out = args.out or (first if is_alone else first.resolve().parent) / "training.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(out, runs)
    print(out)
    if not is_alone:
        return
    finished = first / "training.json"
    if not finished.exists():
        said = f"{finished} is not there: the training is not finished, no model card"
        print(said, file=sys.stderr)
        return
    (first / "README.md").write_text(
        card(first, json.loads(finished.read_text()), os.path.relpath(out, first))
    )
    print(first / "README.md")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
