"""The table and the figure of experiments/ablation_tiny.sh.

    python experiments/ablation_table.py runs/ablation --methods dpo scdpo step-dpo step-dpo-ood --grid 1e-5:1 3e-5:1
    python experiments/ablation_table.py runs/ablation --choose ...     # before: the best setting of each method by validation

Accuracies: mean over seeds; 95 % intervals draw seeds and problems again; differences are paired by
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


def name_of(method: str) -> str:
    """As the tables have it."""
    return NAMES[method]


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
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def choose(args: Args):
    lines = [
        "| method | " + " | ".join(f"lr {s.replace(':', ', β ')}" for s in args.grid) + " |",
        "|---|" + "---:|" * len(args.grid),
    ]
    for method in args.methods:
        found = {}
        for setting in args.grid:
            path = (
                args.out
                / "grid"
                / "results"
                / f"{method}_{setting.replace(':', '_')}"
                / "summary.json"
            )
            if path.exists():
                [model] = json.loads(path.read_text())["benchmarks"]["validation"][
                    "models"
                ].values()
                found[setting] = model["accuracy"]
        if len(args.grid) > 1 and len(found) < len(args.grid):
            sys.exit(
                f"{args.out / 'grid'}: no result of {method} with {', '.join(sorted(set(args.grid) - set(found)))}"
            )
        best = max(found, key=found.get, default=args.grid[0])
        rates = [float(setting.split(":")[0]) for setting in args.grid]
        if len(rates) > 1 and float(best.split(":")[0]) in (min(rates), max(rates)):
            print(
                f"{name_of(method)} is best at {best}, at the end of the grid: its optimum may lie beyond",
                file=sys.stderr,
            )
        (args.out / "grid" / f"{method}.chosen").write_text(best.replace(":", " ") + "\n")
        cells = [
            f"{'**' if s == best else ''}{found[s]:.1%}{'**' if s == best else ''}"
            if s in found
            else ""
            for s in args.grid
        ]
        lines.append(f"| {name_of(method)} | {' | '.join(cells)} |")
    (args.out / "grid.md").write_text("\n".join(lines) + "\n")
    print((args.out / "grid.md").read_text())


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
            found = results[kind]["models"][method]
            color = f"C{y - 1}" if y else "black"
            at = y + shift * apart
            test.plot([100 * x for x in found["interval"]], [at] * 2, color=color, lw=2)
            test.plot(
                100 * found["accuracy"],
                at,
                marker,
                color=color,
                mfc="white" if shift > 0 else color,
                ms=6,
            )
        test.plot(
            [], [], marker, color="gray", mfc="white" if shift > 0 else "gray", label=label, ls=""
        )
    test.set(
        yticks=range(len(names)),
        yticklabels=[name_of(name).replace(", another", ",\nanother") for name in names],
    )
    test.set(xlabel="test problems right, %, with 95 % interval")
    test.invert_yaxis()
    test.legend(frameon=False, fontsize=9)
    for i, seeds in enumerate(metrics.values()):
        for axes, key, scale in ((left, "val_accuracy", 100), (right, "val_margin", 1)):

            def shown(row, key=key):
                return key in row and (
                    row["step"] or key == "val_margin"
                )  # untrained, no pair is told apart

            curves = [
                [(row["step"], row[key] * scale) for row in rows if shown(row)] for rows in seeds
            ]
            values = np.array([[value for _, value in curve] for curve in curves])
            steps = np.array([step for step, _ in curves[0]]) / max(step for step, _ in curves[0])
            axes.plot(steps, values.mean(0), "o-", ms=3, color=f"C{i}")
            axes.fill_between(steps, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, lw=0)
    left.set(xlabel="share of the training", ylabel="held-out pairs told apart, %")
    right.set(xlabel="share of the training", ylabel="reward margin of held-out pairs")
    if right.get_ylim()[1] > 2:
        right.set_yscale(
            "symlog", linthresh=1
        )  # other models' steps start so unlikely that their margin dwarfs the rest
    right.set_ylim(bottom=min(0, right.get_ylim()[0]))
    for axes in (test, left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out / "ablation.png", dpi=150)


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
    credit = args.out / "credit" / "credit.json"  # only where steps are labelled
    credit = json.loads(credit.read_text()) if credit.exists() else {}
    sizes = (args.out / "logs" / "sizes.log").read_text()

    def percent(f):
        return f"{f['accuracy']:.1%} ({f['interval'][0]:.1%} to {f['interval'][1]:.1%})"

    def spread(f):
        return f"{100 * f['spread']:.1f}" if f["seeds"] > 1 else ""

    metrics, training = {}, []
    titles = {"greedy": "greedy", "temperature1": "temperature 1"}
    head = " | ".join(f"{titles[kind]} (95 % interval) | sd over seeds" for kind in results)
    lines = [
        f"| method | pairs | tokens | lr, β | {head} | training, s |",
        "|---|" + "---:|" * (4 + 2 * len(results)),
    ]
    for method in ("base", *args.methods):
        of_kinds = [found["models"][method] for found in results.values()]
        shown = " | ".join(f"{percent(found)} | {spread(found)}" for found in of_kinds)
        if method == "base":
            lines.append(f"| base | | | | {shown} | |")
            continue
        folders = [Path(folder) for folder in summaries["greedy"]["groups"][method]]
        seconds = [
            json.loads((folder / "training.json").read_text())["seconds"] for folder in folders
        ]
        pairs, tokens = re.search(
            rf"(?:^|; |\n){re.escape(method)} (\d+) pairs, (\d+) tokens", sizes
        ).groups()
        lr, beta = (args.out / "grid" / f"{method}.chosen").read_text().split()
        lines.append(
            f"| {name_of(method)} | {pairs} | {int(tokens):,} | {lr}, {beta} | {shown} "
            f"| {sum(seconds) / len(seconds):.0f} |"
        )
        metrics[method] = [rows_of(folder / "metrics.jsonl") for folder in folders]
        first = [next(row for row in rows if "val_accuracy" in row) for rows in metrics[method]]
        last = [
            next(row for row in reversed(rows) if "val_accuracy" in row) for rows in metrics[method]
        ]

        def mean(rows, key):
            return sum(row[key] for row in rows) / len(rows)

        training.append(
            f"| {name_of(method)} | {mean(last, 'val_accuracy'):.1%} | {mean(last, 'val_margin'):.2f} "
            f"| {mean(first, 'val_chosen_logp'):.1f} to {mean(last, 'val_chosen_logp'):.1f} "
            f"| {mean(first, 'val_rejected_logp'):.1f} to {mean(last, 'val_rejected_logp'):.1f} |"
        )
        found = next(
            (f for model, f in credit.items() if Path(model).name == folders[0].name), None
        )
        training[-1] += (
            f" {percent(found | {'accuracy': found['share']})} | {found['auc']:.3f} |"
            if found
            else " | |"
        )
    lines += [
        "",
        "| method | held-out pairs told apart | margin | log π of chosen, before to after | log π of rejected "
        "| lowest step is the error, first seed | AUC |",
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
        kind: holm({key: f["p"] for key, f in found["pairwise"].items()})
        for kind, found in results.items()
    }
    for key in results["greedy"]["pairwise"]:
        cells = [" − ".join(name_of(name) for name in key.split("\n"))]
        for kind, found in results.items():
            f = found["pairwise"][key]
            low, high = f["difference_interval"]
            cells += [
                f"{100 * f['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
                f"{adjusted[kind][key]:.2g}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print((args.out / "table.md").read_text())
    draw(args, metrics, results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
