"""The table and the figure of recipes/ablation_tiny.sh.

    python benchmarks/ablation_table.py runs/ablation --methods dpo scdpo step-dpo step-dpo-ood --grid 1e-5:1 3e-5:1
    python benchmarks/ablation_table.py runs/ablation --choose ...     # before: the best setting of each method by validation

Accuracies: mean over seeds; 95 % intervals draw seeds and problems again; differences are paired by problem (05_eval.py).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

NAMES = {"base": "base", "dpo": "DPO", "scdpo": "SCDPO", "step-dpo": "Step-DPO",
         "step-dpo-ood": "Step-DPO, another model's steps", "dpo-tokens": "DPO, equal tokens",
         "scdpo-tokens": "SCDPO, equal tokens"}  # fmt: skip


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
    lines = ["| method | " + " | ".join(f"lr {s.replace(':', ', β ')}" for s in args.grid) + " |",
             "|---|" + "---:|" * len(args.grid)]  # fmt: skip
    for method in args.methods:
        found = {}
        for setting in args.grid:
            path = args.out / "grid" / "results" / f"{method}_{setting.replace(':', '_')}" / "summary.json"
            if path.exists():
                [model] = json.loads(path.read_text())["benchmarks"]["validation"]["models"].values()
                found[setting] = model["accuracy"]
        best = max(found, key=found.get, default=args.grid[0])
        (args.out / "grid" / f"{method}.chosen").write_text(best.replace(":", " ") + "\n")
        cells = [
            f"{'**' if s == best else ''}{found[s]:.1%}{'**' if s == best else ''}" if s in found else "" for s in args.grid
        ]
        lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    (args.out / "grid.md").write_text("\n".join(lines) + "\n")
    print((args.out / "grid.md").read_text())


def draw(args: Args, metrics: dict[str, list[list[dict]]]):
    """Validation accuracy and margin over the training, as in Fig. 2 of the Step-DPO paper, and both accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    for i, (method, seeds) in enumerate(metrics.items()):
        for axes, key, scale in ((left, "val_accuracy", 100), (right, "val_margin", 1)):
            curves = [[(row["step"], row[key] * scale) for row in rows if key in row and row["step"]] for rows in seeds]
            values = np.array([[value for _, value in curve] for curve in curves])
            steps = np.array([step for step, _ in curves[0]]) / max(step for step, _ in curves[0])
            axes.plot(steps, values.mean(0), "o-", ms=3, color=f"C{i}", label=NAMES[method])
            axes.fill_between(steps, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, lw=0)
    left.set(xlabel="share of the training", ylabel="held-out pairs told apart, %")
    right.set(xlabel="share of the training", ylabel="reward margin of held-out pairs")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="upper center", ncol=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.87))
    figure.savefig(args.out / "ablation.png", dpi=150)


def main(args: Args):
    if args.choose:
        return choose(args)
    results = {kind: json.loads((args.out / kind / "summary.json").read_text())["benchmarks"]["test"]
               for kind in ("greedy", "temperature1")}  # fmt: skip
    credit = json.loads((args.out / "credit" / "credit.json").read_text())
    show = lambda f: f"{f['accuracy']:.1%} ({f['interval'][0]:.1%} to {f['interval'][1]:.1%})"
    points = lambda f: "{:+.1f} ({:+.1f} to {:+.1f}), p {:.2g}".format(
        100 * f["difference"], *(100 * x for x in f["difference_interval"]), f["p"]
    )
    lines = ["| method | pairs | tokens | lr, β | greedy | temperature 1 | sd over seeds | seconds | pairs told apart "
             "| margin | log π chosen, rejected | log π_ref of chosen | lowest step is the error |",
             "|---|" + "---:|" * 12]  # fmt: skip
    metrics = {}
    for method in ("base", *args.methods):
        greedy, warm = (results[kind]["groups"][method] for kind in ("greedy", "temperature1"))
        cells = [NAMES[method], "", "", "", show(greedy), show(warm), "", "", "", "", "", "", ""]
        if method != "base":
            folders = [Path(folder) for folder in greedy["models"]]
            metrics[method] = [rows_of(folder / "metrics.jsonl") for folder in folders]
            last = [next(row for row in reversed(rows) if "val_accuracy" in row) for rows in metrics[method]]
            first = metrics[method][0][0]
            mean = lambda key, last=last: sum(row[key] for row in last) / len(last)
            training = [json.loads((folder / "training.json").read_text()) for folder in folders]
            seconds = sum(run["seconds"] for run in training) / len(training)
            said = (args.out / "logs" / "sizes.log").read_text()
            pairs, tokens = re.search(rf"(?:^|; |\n){re.escape(method)} (\d+) pairs, (\d+) tokens", said).groups()
            lr, beta = (args.out / "grid" / f"{method}.chosen").read_text().split()
            share = next((f["share"] for model, f in credit.items() if Path(model).name == folders[0].name), None)
            cells[1:4], cells[6:8] = [pairs, tokens, f"{lr}, {beta}"], [f"{100 * greedy['spread']:.1f}", f"{seconds:.0f}"]
            cells[8:11] = [f"{mean('val_accuracy'):.1%}", f"{mean('val_margin'):.2f}",
                           f"{mean('val_chosen_logp'):.1f}, {mean('val_rejected_logp'):.1f}"]  # fmt: skip
            cells[11:] = [f"{first['val_chosen_logp']:.1f}", f"{share:.1%}" if share is not None else ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| greedy, paired by problem | points (95 % interval), p | temperature 1 |", "|---|---:|---:|"]
    for key in results["greedy"]["pairwise"]:
        a, b = key.split("\n")
        lines.append(f"| {NAMES[a]} − {NAMES[b]} | {points(results['greedy']['pairwise'][key])} "
                     f"| {points(results['temperature1']['pairwise'][key])} |")  # fmt: skip
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print((args.out / "table.md").read_text())
    draw(args, metrics)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
