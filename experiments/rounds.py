"""What experiments/iterate.sh needs in addition to the stages: equal budgets, the choice of the
learning rate, table and figure.

They write train.jsonl and epochs; lr/dpo; table.md and rounds.png:
    python experiments/rounds.py cut runs/iterate/dpo/0/1 --method dpo --budget 100000 \\
        --trained 20000
    python experiments/rounds.py choose runs/iterate --method dpo --rates 1e-5 3e-5 1e-4
    python experiments/rounds.py table runs/iterate --methods dpo sft --rounds 3 --seeds 0 1 2
"""

import importlib
import json
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from ablation_table import holm, mean, percent, points, rows_of

sys.path.insert(0, str(Path(__file__).parents[1]))
OPENING = importlib.import_module("01_sample_errors").OPENING  # given, not sampled

NAMES = {
    "dpo": "DPO, verifier alone",
    "step-dpo": "Step-DPO",
    "scdpo": "SCDPO",
    "sft": "SFT on right samples",
}
Method = Literal["dpo", "step-dpo", "scdpo", "sft"]


@dataclass
class Cut:
    """Cut what a round has made to its budgets, whole problems first, in the order of the problems.
    Without `epochs` where the budget is not reached."""

    folder: Annotated[Path, tyro.conf.Positional]
    """of the round"""
    method: Method
    """whose files lie there"""
    model: str = "data/tiny/model"
    """whose tokens to count"""
    budget: int | None = None
    """sampled tokens"""
    trained: int | None = None
    """tokens of chosen and rejected, or of solutions, over all epochs"""
    epochs: int = 2
    """epochs where --trained is not given"""
    seed: int = 0
    """of the order, in which pairs are left out"""


@dataclass
class Choose:
    """Write the best learning rate by the validation results to OUT/lr/METHOD."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    method: Method
    """which method's"""
    rates: tuple[str, ...]
    """as they were given to 04"""


@dataclass
class Table:
    """Accuracy by round, from OUT/results and the budgets, as table and figure."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    methods: tuple[str, ...] = tuple(NAMES)
    """in the order of the table"""
    rounds: int = 3
    """rounds made"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds made"""


def sampled(args: Cut, count) -> Counter:
    """Tokens that were sampled for each problem, by all stages. `count` counts the tokens of
    texts."""
    rows = rows_of(args.folder / "samples.jsonl")
    texts = [(row["id"], row["response"].removeprefix(OPENING)) for row in rows]
    tokens, located = Counter(), args.folder / "located.jsonl"
    for row in rows_of(located) if located.exists() else []:
        tokens[row["id"]] += row["rollout_tokens"][1]
    for (problem, _), n in zip(texts, count([text for _, text in texts]), strict=True):
        tokens[problem] += n
    for path in args.folder.glob("*.tries.jsonl"):
        for row in rows_of(path):
            tokens[row["id"]] += row["count"].get("tokens", 0)
    return tokens


def cut(args: Cut):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    tokens = sampled(args, count)
    samples = rows_of(args.folder / "samples.jsonl")
    problems, spent = set(), 0
    for problem in dict.fromkeys(row["id"] for row in sorted(samples, key=place)):
        if args.budget and spent + tokens[problem] > args.budget:
            break
        problems.add(problem)
        spent += tokens[problem]
    else:
        if args.budget and spent < 0.95 * args.budget:
            print(
                f"{args.folder}: {spent} tokens are sampled of a budget of {args.budget}; "
                "it takes more problems"
            )
            return
    if args.method == "sft":
        samples.sort(key=lambda row: (row["id"], row["sample"]))
        right = {(row["problem"], row["response"]): row for row in samples if row["correct"]}
        sets, sides = [list(right.values())], ("response",)
    else:
        # SCDPO's mix is half and half
        names = ("scdpo", "dpo") if args.method == "scdpo" else (args.method,)
        sets = [rows_of(args.folder / f"{name}.jsonl") for name in names]
        sides = ("chosen", "rejected")
    sets = [[row for row in rows if row["id"] in problems] for rows in sets]
    for rows in sets:
        random.Random(args.seed).shuffle(rows)
    # one of each set in turn, as long as all have some
    rows = [row for of_each in zip(*sets, strict=False) for row in of_each]
    sizes = [sum(count([row[side] for side in sides])) for row in rows]
    epochs, most = args.epochs, math.inf
    if not rows:
        sys.exit(f"{args.folder}: no row of {args.method} to train on")
    if args.trained:
        epochs = math.ceil(args.trained / sum(sizes))
        most = args.trained / epochs
    chosen, total = [], 0
    for row, size in zip(rows, sizes, strict=True):
        if total + size <= most:
            chosen.append(row)
            total += size
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in chosen]
    (args.folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    figures = {
        "problems": len(problems),
        "sampled": spent,
        "rows": len(chosen),
        "epochs": epochs,
        "trained": epochs * total,
    }
    (args.folder / "budget.json").write_text(json.dumps(figures) + "\n")
    temporary = args.folder / "epochs.tmp"
    temporary.write_text(f"{epochs}\n")
    temporary.replace(args.folder / "epochs")  # tells the recipe that all is there
    print(f"{args.folder}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))


def place(row: dict) -> tuple:
    """The order of the problems: by the number at the end of the id, where there is one."""
    tail = str(row["id"]).rpartition("-")[2]
    return (int(tail) if tail.isdigit() else 0, str(row["id"]))


def choose(args: Choose):
    accuracy = {}
    for rate in args.rates if len(args.rates) > 1 else ():
        path = args.out / "lr" / f"{args.method}-{rate}" / "summary.json"
        [benchmark] = json.loads(path.read_text())["benchmarks"].values()
        [model] = benchmark["models"].values()
        accuracy[rate] = model["accuracy"]
    best = max(accuracy, key=accuracy.get, default=args.rates[0])
    (args.out / "lr" / args.method).write_text(best + "\n")
    accuracies = ", ".join(f"{rate} {value:.1%}" for rate, value in accuracy.items())
    print(f"{args.method}: learning rate {best}{f' of {accuracies}' if accuracies else ''}")


def table(args: Table):
    summary = json.loads((args.out / "results" / "summary.json").read_text())
    lines, curves = [], {}
    for name, benchmark in summary["benchmarks"].items():
        base = benchmark["models"]["base"]
        lines += [
            f"{name}, {benchmark['problems']} problems, {len(args.seeds)} seeds; "
            f"base {percent(base['accuracy'], base['interval'])}",
            "",
            "| method | lr | round | problems | sampled tokens, all rounds | rows | epochs "
            "| trained tokens | accuracy (95 % interval) | sd over seeds |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for method in args.methods:
            rate, total = (args.out / "lr" / method).read_text().strip(), 0.0
            curves[name, method] = [(0.0, base["accuracy"], base["interval"])]
            for turn in range(1, args.rounds + 1):
                folders = [args.out / method / str(seed) / str(turn) for seed in args.seeds]
                budgets = [json.loads((path / "budget.json").read_text()) for path in folders]
                total += mean(budgets, "sampled")
                model = benchmark["models"][f"{method}-{turn}"]
                curves[name, method].append((total, model["accuracy"], model["interval"]))
                cells = [NAMES[method], rate, str(turn), f"{mean(budgets, 'problems'):.0f}"]
                cells += [f"{total:,.0f}", f"{mean(budgets, 'rows'):.0f}"]
                cells += [f"{mean(budgets, 'epochs'):.0f}", f"{mean(budgets, 'trained'):,.0f}"]
                cells += [percent(model["accuracy"], model["interval"])]
                cells += [f"{100 * model['spread']:.1f}" if len(args.seeds) > 1 else ""]
                lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            "| last round, paired by problem | points (95 % interval) | p, Holm |",
            "|---|---:|---:|",
        ]
        tests = {
            key: test
            for key, test in benchmark.get("pairwise", {}).items()
            if all(model.endswith(f"-{args.rounds}") for model in key.split("\n"))
        }
        adjusted = holm({key: test["p"] for key, test in tests.items()})
        for key, test in tests.items():
            names = " − ".join(NAMES[model.rpartition("-")[0]] for model in key.split("\n"))
            lines.append(f"| {names} | {points(test)} | {adjusted[key]:.3g} |")
        lines.append("")
    (args.out / "table.md").write_text("\n".join(lines))
    print("\n".join(lines))
    draw(args, curves)


def draw(args: Table, curves: dict):
    """Accuracy against the tokens that were sampled, the bars 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    names = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = plt.subplots(1, len(names), figsize=(6.4 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for number, method in enumerate(args.methods):
            tokens, accuracies, intervals = zip(*curves[name, method], strict=True)
            shift = (number - (len(args.methods) - 1) / 2) * 0.006 * tokens[-1]
            x = [(value + shift) / 1000 for value in tokens]
            y = [100 * value for value in accuracies]
            below = [value - 100 * low for value, (low, _) in zip(y, intervals, strict=True)]
            above = [100 * high - value for value, (_, high) in zip(y, intervals, strict=True)]
            style = {"marker": "o", "ms": 4, "capsize": 2, "lw": 1.4, "elinewidth": 0.8}
            axis.errorbar(x, y, [below, above], **style, label=NAMES[method])
        axis.set(xlabel="sampled tokens, thousands", ylabel=f"{name}: right, %, with 95 % interval")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out / "rounds.png", dpi=150)


if __name__ == "__main__":
    chosen = tyro.extras.subcommand_cli_from_dict(
        {"cut": Cut, "choose": Choose, "table": Table}, description=__doc__
    )
    try:
        {Cut: cut, Choose: choose, Table: table}[type(chosen)](chosen)
    except FileNotFoundError as error:
        print(
            f"rounds.py: error: {error.filename} is missing; experiments/iterate.sh makes it",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
