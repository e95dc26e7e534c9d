"""What experiments/iterate.sh needs beside the stages: equal budgets, the choice of the learning
rate, table and figure.

python experiments/rounds.py cut runs/iterate/dpo/0/1 --method dpo --budget 100000 --trained 20000 # -> train.jsonl, epochs
python experiments/rounds.py choose runs/iterate --method dpo --rates 1e-5 3e-5 1e-4               # -> lr/dpo
python experiments/rounds.py table runs/iterate --methods dpo sft --rounds 3 --seeds 0 1 2         # -> table.md, rounds.png
"""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from ablation_table import holm

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
    """tokens of chosen and rejected, or of solutions, over all passes"""
    epochs: int = 2
    """passes where --trained is not given"""
    seed: int = 0
    """of the order, in which pairs are left out"""


@dataclass
class Choose:
    """Write the best learning rate by the validation results to OUT/lr/METHOD."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    method: Method
    """which method's"""
    rates: tuple[str, ...] = ()
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


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sampled(args: Cut, count) -> Counter:
    """Tokens that were sampled for each problem, by all stages. `count` counts the tokens of
    texts."""
    tokens, by = Counter(), args.folder
    samples = rows_of(by / "samples.jsonl")
    for row, n in zip(samples, count([row["response"] for row in samples]), strict=True):
        tokens[row["id"]] += n
    if (by / "rollouts.jsonl").exists():
        texts = [
            (row["id"], one["text"])
            for row in rows_of(by / "rollouts.jsonl")
            for found in row["rollouts"].values()
            for one in found
        ]
        for (identity, _), n in zip(texts, count([text for _, text in texts]), strict=True):
            tokens[identity] += n
    for path in by.glob("*.tries.jsonl"):
        for row in rows_of(path):
            tokens[row["id"]] += row["count"].get("tokens", 0)
    return tokens


def cut(args: Cut):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def count(texts):
        return (
            [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
            if texts
            else []
        )

    tokens, kept, spent = sampled(args, count), [], 0
    order = list(
        dict.fromkeys(
            row["id"] for row in sorted(rows_of(args.folder / "samples.jsonl"), key=place)
        )
    )
    for identity in order:
        if args.budget and spent + tokens[identity] > args.budget:
            break
        kept.append(identity)
        spent += tokens[identity]
    else:
        if args.budget and spent < 0.95 * args.budget:
            print(
                f"{args.folder}: {spent} tokens are sampled of a budget of {args.budget}; it takes more problems"
            )
            return
    kept, sides = set(kept), ("chosen", "rejected")
    if args.method == "sft":
        ready = sorted(
            rows_of(args.folder / "samples.jsonl"), key=lambda row: (row["id"], row["sample"])
        )
        right = {(row["problem"], row["response"]): row for row in ready if row["correct"]}
        found, sides = [[row for row in right.values() if row["id"] in kept]], ("response",)
    else:
        names = (
            ("scdpo", "dpo") if args.method == "scdpo" else (args.method,)
        )  # SCDPO's mix is half and half
        found = [
            [row for row in rows_of(args.folder / f"{name}.jsonl") if row["id"] in kept]
            for name in names
        ]
    for rows in found:
        random.Random(args.seed).shuffle(rows)
    least = min(map(len, found))
    rows = [
        row for together in zip(*(rows[:least] for rows in found), strict=True) for row in together
    ]
    sizes = [sum(count([row[side] for side in sides])) for row in rows]
    epochs, most = args.epochs, math.inf
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
        "problems": len(kept),
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
        summary = json.loads(
            (args.out / "lr" / f"{args.method}-{rate}" / "summary.json").read_text()
        )
        [benchmark] = summary["benchmarks"].values()
        [model] = benchmark["models"].values()
        accuracy[rate] = model["accuracy"]
    best = max(accuracy, key=accuracy.get, default=args.rates[0])
    (args.out / "lr" / args.method).write_text(best + "\n")
    (args.out / "lr" / f"{args.method}.json").write_text(json.dumps(accuracy) + "\n")
    said = ", ".join(f"{rate} {value:.1%}" for rate, value in accuracy.items())
    print(f"{args.method}: learning rate {best}{f' of {said}' if said else ''}")


def table(args: Table):
    summary, lines, points = json.loads((args.out / "results" / "summary.json").read_text()), [], {}

    def budget(method, seed, turn):
        return json.loads((args.out / method / str(seed) / str(turn) / "budget.json").read_text())

    for name, benchmark in summary["benchmarks"].items():
        base = benchmark["models"]["base"]

        def shown(f):
            return f"{f['accuracy']:.1%} ({f['interval'][0]:.1%} to {f['interval'][1]:.1%})"

        lines += [
            f"{name}, {benchmark['problems']} problems, {len(args.seeds)} seeds; base {shown(base)}",
            "",
            "| method | lr | round | problems | sampled tokens, all rounds | rows | passes | trained tokens | accuracy "
            "(95 % interval) | sd over seeds |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for method in args.methods:
            rate, total = (args.out / "lr" / method).read_text().strip(), 0.0
            points[name, method] = [(0.0, base["accuracy"], base["interval"])]
            for turn in range(1, args.rounds + 1):
                made = [budget(method, seed, turn) for seed in args.seeds]
                mean = {key: sum(one[key] for one in made) / len(made) for key in made[0]}
                found, total = benchmark["models"][f"{method}-{turn}"], total + mean["sampled"]
                points[name, method].append((total, found["accuracy"], found["interval"]))
                spread = f"{100 * found['spread']:.1f}" if len(args.seeds) > 1 else ""
                counts = f"{mean['rows']:.0f} | {mean['epochs']:.0f} | {mean['trained']:,.0f}"
                lines.append(
                    f"| {NAMES[method]} | {rate} | {turn} | {mean['problems']:.0f} | {total:,.0f} | {counts} "
                    f"| {shown(found)} | {spread} |"
                )
        lines += [
            "",
            "| last round, paired by problem | points (95 % interval) | p, Holm |",
            "|---|---:|---:|",
        ]
        last = {
            key: found
            for key, found in benchmark.get("pairwise", {}).items()
            if all(part.endswith(f"-{args.rounds}") for part in key.split("\n"))
        }
        adjusted = holm({key: found["p"] for key, found in last.items()})
        for key, found in last.items():
            low, high = found["difference_interval"]
            names = " − ".join(NAMES[part.rpartition("-")[0]] for part in key.split("\n"))
            lines.append(
                f"| {names} | {100 * found['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) "
                f"| {adjusted[key]:.2g} |"
            )
        lines.append("")
    (args.out / "table.md").write_text("\n".join(lines))
    print("\n".join(lines))
    draw(args, points)


def draw(args: Table, points: dict):
    """Accuracy against the tokens that were sampled, the bars 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    names = list(dict.fromkeys(name for name, _ in points))
    figure, axes = plt.subplots(1, len(names), figsize=(6.4 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for number, method in enumerate(args.methods):
            x, y, intervals = zip(*points[name, method], strict=True)
            shift = (number - (len(args.methods) - 1) / 2) * 0.006 * x[-1]
            errors = [
                [100 * (v - low) for v, (low, _) in zip(y, intervals, strict=True)],
                [100 * (high - v) for v, (_, high) in zip(y, intervals, strict=True)],
            ]
            axis.errorbar(
                [(value + shift) / 1000 for value in x],
                [100 * v for v in y],
                errors,
                marker="o",
                ms=4,
                capsize=2,
                lw=1.4,
                elinewidth=0.8,
                label=NAMES[method],
            )
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
