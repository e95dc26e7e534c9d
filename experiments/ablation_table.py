"""The table and the figure of experiments/ablation_tiny.sh.

First the best setting of each method by validation, then, after the trainings, the table:
    python experiments/ablation_table.py runs/ablation --choose --methods dpo scdpo step-dpo \\
        --grid 1e-5:1 3e-5:1
    python experiments/ablation_table.py runs/ablation --methods dpo scdpo step-dpo \\
        --grid 1e-5:1 3e-5:1

Accuracies: mean over seeds, with 95 % intervals over problems and seeds; differences are paired by
problem (05_eval.py)."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

NAMES = {
    "base": "base",
    "dpo": "DPO",
    "scdpo": "SCDPO",
    "step-dpo": "Step-DPO",
    "step-dpo-ood": "Step-DPO, another model's steps",
    "dpo-tokens": "DPO, equal tokens",
    "scdpo-tokens": "SCDPO, equal tokens",
}


@dataclass
class Args:
    out: Annotated[Path, tyro.conf.Positional]
    """folder of the ablation"""
    methods: tuple[str, ...]
    """in the order of the table"""
    grid: tuple[str, ...]
    """settings as LR:BETA"""
    choose: bool = False
    """write the best setting of each method to OUT/grid/METHOD.chosen, and the grid's table"""


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def choose(args: Args):
    grid = args.out / "grid"
    titles = [f"lr {setting.replace(':', ', β ')}" for setting in args.grid]
    lines = [f"| method | {' | '.join(titles)} |", "|---|" + "---:|" * len(args.grid)]
    for method in args.methods:
        accuracy = {}
        for setting in args.grid:
            name = f"{method}_{setting.replace(':', '_')}"
            path = grid / "results" / name / "summary.json"
            if path.exists():
                benchmarks = json.loads(path.read_text())["benchmarks"]
                [model] = benchmarks["validation"]["models"].values()
                accuracy[setting] = model["accuracy"]
        missing = sorted(set(args.grid) - set(accuracy))
        if len(args.grid) > 1 and missing:
            sys.exit(f"{grid}: no result of {method} with {', '.join(missing)}")
        best = max(accuracy, key=accuracy.get, default=args.grid[0])
        rates = {float(setting.split(":")[0]) for setting in args.grid}
        if len(rates) > 1 and float(best.split(":")[0]) in (min(rates), max(rates)):
            print(
                f"{NAMES[method]} is best at {best}, at the end of the grid: "
                "its optimum may lie beyond",
                file=sys.stderr,
            )
        (grid / f"{method}.chosen").write_text(best.replace(":", " ") + "\n")
        cells = [f"{accuracy[s]:.1%}" if s in accuracy else "" for s in args.grid]
        if best in accuracy:
            cells[args.grid.index(best)] = f"**{accuracy[best]:.1%}**"
        lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    (args.out / "grid.md").write_text(table)
    print(table)


def draw(args: Args, metrics: dict[str, list[list[dict]]], results: dict[str, dict]):
    """Test accuracy with interval; accuracy and margin on held-out pairs over the training, as in
    Fig. 2 of Step-DPO."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    figure, (test, left, right) = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=(1.2, 1, 1))
    names, apart = ["base", *args.methods], len(results) - 1
    for kind, label, marker, shift in (
        ("greedy", "greedy", "o", -0.15),
        ("temperature1", "temperature 1", "s", 0.15),
    ):
        if kind not in results:
            continue
        for y, method in enumerate(names):
            figures = results[kind]["models"][method]
            color = f"C{y - 1}" if y else "black"
            fill = "white" if shift > 0 else color
            at = y + shift * apart
            test.plot([100 * x for x in figures["interval"]], [at] * 2, color=color, lw=2)
            test.plot(100 * figures["accuracy"], at, marker, color=color, mfc=fill, ms=6)
        fill = "white" if shift > 0 else "gray"
        test.plot([], [], marker, color="gray", mfc=fill, label=label, ls="")
    labels = [NAMES[name].replace(", another", ",\nanother") for name in names]
    test.set(yticks=range(len(names)), yticklabels=labels)
    test.set(xlabel="test problems right, %, with 95 % interval")
    test.invert_yaxis()
    test.legend(frameon=False, fontsize=9)
    for i, seeds in enumerate(metrics.values()):
        for axes, key, scale in ((left, "val_accuracy", 100), (right, "val_margin", 1)):
            # an untrained model tells no pair apart
            curves = [
                [row for row in rows if key in row and (row["step"] or key == "val_margin")]
                for rows in seeds
            ]
            values = np.array([[row[key] * scale for row in curve] for curve in curves])
            steps = np.array([row["step"] for row in curves[0]])
            steps = steps / steps.max()
            axes.plot(steps, values.mean(0), "o-", ms=3, color=f"C{i}")
            axes.fill_between(steps, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, lw=0)
    left.set(xlabel="share of the training", ylabel="held-out pairs told apart, %")
    right.set(xlabel="share of the training", ylabel="reward margin of held-out pairs")
    if right.get_ylim()[1] > 2:
        # other models' steps start so unlikely that their margin dwarfs the rest
        right.set_yscale("symlog", linthresh=1)
    right.set_ylim(bottom=min(0, right.get_ylim()[0]))
    for axes in (test, left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out / "ablation.png", dpi=150)


def mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def percent(share: float, interval: list[float]) -> str:
    return f"{share:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def points(test: dict) -> str:
    low, high = (100 * end for end in test["difference_interval"])
    return f"{100 * test['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's adjusted p: below 0.05 is significant with all these comparisons made."""
    adjusted, worst = {}, 0.0
    for i, key in enumerate(sorted(p, key=p.get)):
        worst = max(worst, min(1.0, p[key] * (len(p) - i)))
        adjusted[key] = worst
    return adjusted


def main(args: Args):
    if args.choose:
        return choose(args)
    paths = {kind: args.out / kind / "summary.json" for kind in ("greedy", "temperature1")}
    summaries = {
        kind: json.loads(path.read_text()) for kind, path in paths.items() if path.exists()
    }
    results = {kind: summary["benchmarks"]["test"] for kind, summary in summaries.items()}
    path = args.out / "credit" / "credit.json"  # only where steps are labelled
    credit = json.loads(path.read_text()) if path.exists() else {}
    sizes = (args.out / "logs" / "sizes.log").read_text()
    metrics, training = {}, []
    titles = {"greedy": "greedy", "temperature1": "temperature 1"}
    head = " | ".join(f"{titles[kind]} (95 % interval) | sd over seeds" for kind in results)
    lines = [
        f"| method | pairs | tokens | lr, β | {head} | training, s |",
        "|---|" + "---:|" * (4 + 2 * len(results)),
    ]
    for method in ("base", *args.methods):
        cells = []
        for benchmark in results.values():
            figures = benchmark["models"][method]
            cells.append(percent(figures["accuracy"], figures["interval"]))
            cells.append(f"{100 * figures['spread']:.1f}" if figures["seeds"] > 1 else "")
        accuracies = " | ".join(cells)
        if method == "base":
            lines.append(f"| base | | | | {accuracies} | |")
            continue
        folders = [Path(folder) for folder in summaries["greedy"]["groups"][method]]
        about = [json.loads((folder / "training.json").read_text()) for folder in folders]
        size = re.search(rf"(?:^|; |\n){re.escape(method)} (\d+) pairs, (\d+) tokens", sizes)
        lr, beta = (args.out / "grid" / f"{method}.chosen").read_text().split()
        lines.append(
            f"| {NAMES[method]} | {size[1]} | {int(size[2]):,} | {lr}, {beta} | {accuracies} "
            f"| {mean(about, 'seconds'):.0f} |"
        )
        metrics[method] = [rows_of(folder / "metrics.jsonl") for folder in folders]
        validated = [[row for row in rows if "val_accuracy" in row] for rows in metrics[method]]
        first, last = [rows[0] for rows in validated], [rows[-1] for rows in validated]
        cells = [NAMES[method], f"{mean(last, 'val_accuracy'):.1%}"]
        cells.append(f"{mean(last, 'val_margin'):.2f}")
        for key in ("val_chosen_logp", "val_rejected_logp"):
            cells.append(f"{mean(first, key):.1f} to {mean(last, key):.1f}")
        rewards = {Path(model).name: figures for model, figures in credit.items()}
        if figures := rewards.get(folders[0].name):
            lowest = percent(figures["share"], figures["interval"])
            training.append(f"| {' | '.join(cells)} | {lowest} | {figures['auc']:.3f} |")
        else:
            training.append(f"| {' | '.join(cells)} | | |")
    lines += [
        "",
        "| method | held-out pairs told apart | margin | log π of chosen, before to after "
        "| log π of rejected | lowest step is the error, first seed | AUC |",
        "|---|" + "---:|" * 6,
        *training,
    ]
    head = " | ".join(f"{titles[kind]}, points (95 % interval) | p, Holm" for kind in results)
    lines += [
        "",
        f"| test accuracy, paired by problem | {head} |",
        "|---|" + "---:|" * 2 * len(results),
    ]
    adjusted = {
        kind: holm({key: test["p"] for key, test in benchmark["pairwise"].items()})
        for kind, benchmark in results.items()
    }
    for key in results["greedy"]["pairwise"]:
        cells = [" − ".join(NAMES[name] for name in key.split("\n"))]
        for kind, benchmark in results.items():
            test = benchmark["pairwise"][key]
            cells += [points(test), f"{adjusted[kind][key]:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(table)
    print(table)
    draw(args, metrics, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
