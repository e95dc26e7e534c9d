"""What recipes/small_model.sh needs beside the stages: its problems, the choice of the learning
rate, tables and curves.

    python experiments/small_model.py problems runs/small_model                          # data/*.jsonl -> problems/*.jsonl
    python experiments/small_model.py choose runs/small_model --method dpo --rates 1e-6 3e-6    # -> dpo.rate
    python experiments/small_model.py table runs/small_model --model Qwen/Qwen2.5-0.5B-Instruct # -> table.md, curves.png

Problems stand in the order of a hash of their ids: first those of validation, behind them those to
sample from. The table says what is there: with a part of the methods trained it has these alone.
"""

import hashlib
import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from ablation_table import NAMES, holm
from same_size import rows_of

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
EVAL = importlib.import_module("05_eval")
PLOT = importlib.import_module("plot_training")
NAMES = NAMES | {"sft": "SFT on right samples"}
CONTINUATIONS = (
    "wrong",
    "blank step",
    "restates the rejected step",
    "repeats a chosen step",
    "over --max-pairs-per-error",
    "pairs",
)
SHOWN = ("step-dpo", "dpo", "scdpo")  # a pair of each to read
STAGES = {
    "01, samples": "samples",
    "02, rollouts": "located",
    "03, Step-DPO": "all-step-dpo.tries",
    "03, DPO": "all-dpo.tries",
    "03, SCDPO": "all-scdpo.tries",
}
USES = {
    "step-dpo": ("01, samples", "02, rollouts", "03, Step-DPO"),
    "dpo": ("01, samples", "03, DPO"),
    "sft": ("01, samples",),
    "scdpo": ("01, samples", "03, DPO", "03, SCDPO"),
}


@dataclass
class Problems:
    """Write OUT/problems/: gsm8k_train, validation, gsm8k_test, math_test."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    data: Path = Path("data")
    """folder with gsm8k_train.jsonl, gsm8k_test.jsonl and math_test.jsonl; data/download.py makes
    them"""
    validation: int = 500
    """problems of the training part to choose the rates by"""
    gsm8k: int = 1319
    """test problems of GSM8K at most"""
    math: int = 500
    """test problems of MATH at most"""


@dataclass
class Choose:
    """Write a method's best learning rate by OUT/validation to OUT/METHOD.rate."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    method: str
    """which method's"""
    rates: tuple[str, ...]
    """as they were given to 04"""
    seed: int = 0
    """of the models that were validated"""


@dataclass
class Table:
    """Write OUT/table.md and OUT/curves.png."""

    out: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    model: str
    """the base, whose tokens are counted"""
    methods: tuple[str, ...] = ("step-dpo", "dpo", "sft", "scdpo")
    """in the order of the table"""


def by_hash(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: hashlib.sha256(str(row["id"]).encode()).digest())


def problems(args: Problems):
    train, gsm8k, math = (
        by_hash(EVAL.load_problems(args.data / f"{name}.jsonl"))
        for name in ("gsm8k_train", "gsm8k_test", "math_test")
    )
    if len(train) <= args.validation:
        EVAL.stop(
            f"--validation {args.validation}: the training part has {len(train)} problems; leave some to sample from"
        )
    parts = {
        "validation": train[: args.validation],
        "gsm8k_train": train[args.validation :],
        "gsm8k_test": gsm8k[: args.gsm8k],
        "math_test": math[: args.math],
    }
    for name, rows in parts.items():
        (args.out / "problems").mkdir(parents=True, exist_ok=True)
        text = "".join(
            json.dumps(row | {"dataset": name}, ensure_ascii=False) + "\n" for row in rows
        )
        EVAL.save(args.out / "problems" / f"{name}.jsonl", text)
    print(", ".join(f"{name} {len(rows)}" for name, rows in parts.items()))


def validated(out: Path, name: str) -> dict | None:
    """Figures of a model on the validation problems, if they are there."""
    path = out / "validation" / name / "summary.json"
    return (
        json.loads(path.read_text())["benchmarks"]["validation"]["models"][name]
        if path.exists()
        else None
    )


def choose(args: Choose):
    found = {rate: validated(args.out, f"{args.method}-{rate}-{args.seed}") for rate in args.rates}
    if missing := [rate for rate, figures in found.items() if not figures]:
        print(f"{args.method}: no choice yet, {', '.join(missing)} not validated")
        return
    best = max(
        sorted(found, key=float), key=lambda rate: found[rate]["accuracy"]
    )  # of equal ones the lowest
    if len(found) > 1 and float(best) in (min(map(float, found)), max(map(float, found))):
        print(
            f"{args.method} is best at {best}, at the end of the grid: its optimum may lie beyond",
            file=sys.stderr,
        )
    EVAL.save(args.out / f"{args.method}.rate", best + "\n")
    print(
        f"{args.method}: {best}; "
        + ", ".join(f"{rate} {figures['accuracy']:.1%}" for rate, figures in found.items())
    )


# -------------------------------------------------------------------------------------------------
# tables


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def name_of(method: str) -> str:
    return NAMES.get(method, method)


def share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def points(found: dict) -> str:
    low, high = (100 * end for end in found["difference_interval"])
    return f"{100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def accuracies(args: Table) -> list[str]:
    """Of base and methods on each benchmark; the differences from the base and between methods,
    each family by Holm."""
    path = args.out / "test" / "summary.json"
    if not path.exists():
        return []
    summary, rows, between = json.loads(path.read_text()), [], []
    labels = [label for label in summary["groups"] if label != "base"]
    benchmarks = summary["benchmarks"]
    against = holm(
        {
            (name, label): found["models"][label]["p"]
            for name, found in benchmarks.items()
            for label in labels
        }
    )
    pairwise = holm(
        {
            (name, key): f["p"]
            for name, found in benchmarks.items()
            for key, f in found["pairwise"].items()
        }
    )
    for name, found in benchmarks.items():
        for label in ("base", *labels):
            f = found["models"][label]
            rate = (args.out / f"{label}.rate").read_text().strip() if label != "base" else ""
            cells = [
                f"{name} ({found['problems']})",
                name_of(label),
                rate,
                f["seeds"] if rate else "",
            ]
            cells += [
                EVAL.percent(f["accuracy"], f["interval"]),
                f"{100 * f['spread']:.1f}" if f["seeds"] > 1 else "",
            ]
            versus = ["", "", "", ""]
            if label != "base":
                versus = [
                    points(f),
                    f"{f['p']:.2g}",
                    f"{against[name, label]:.2g}",
                    f"{len(f['won'])} / {len(f['lost'])}",
                ]
            shares = [
                f"{f[what] / found['problems'] / f['seeds']:.1%}"
                for what in ("unfinished", "unparsable")
            ]
            rows.append([*cells, *versus, *shares, f"{f['mean_tokens']:.0f}"])
        for key, f in found["pairwise"].items():
            methods = " − ".join(map(name_of, key.split("\n")))
            between.append(
                [name, methods, points(f), f"{f['p']:.2g}", f"{pairwise[name, key]:.2g}"]
            )
    head = [
        "benchmark",
        "model",
        "rate",
        "seeds",
        "accuracy (95 % interval)",
        "sd of seeds",
        "against the base, points",
        "p",
        f"p, Holm of {len(against)}",
        "won / lost",
        "unfinished",
        "no answer",
        "tokens an answer",
    ]
    parts = [
        "## Accuracy",
        f"{summary['decoding']}. Differences are paired by problem (05_eval.py).",
        markdown(head, rows),
    ]
    if between:
        parts.append(
            markdown(
                [
                    "benchmark",
                    "methods",
                    "points (95 % interval)",
                    "p",
                    f"p, Holm of {len(pairwise)}",
                ],
                between,
            )
        )
    return parts


def validations(args: Table) -> list[str]:
    rows = []
    for folder in sorted(
        (args.out / "validation").glob("*"), key=lambda path: (path.name != "base", path.name)
    ):
        if f := validated(args.out, folder.name):
            method, rate, seed = (
                ("base", "", "") if folder.name == "base" else split_name(folder.name)
            )
            chosen = args.out / f"{method}.rate"
            mark = "chosen" if chosen.exists() and chosen.read_text().strip() == rate else ""
            rows.append(
                [
                    name_of(method),
                    rate,
                    seed,
                    EVAL.percent(f["accuracy"], f["interval"]),
                    f["unfinished"],
                    f"{f['mean_tokens']:.0f}",
                    mark,
                ]
            )
    head = [
        "method",
        "rate",
        "seed",
        "accuracy (95 % interval)",
        "unfinished",
        "tokens an answer",
        "",
    ]
    return ["## Choice of the learning rate", markdown(head, rows)] if rows else []


def split_name(name: str) -> tuple[str, str, str]:
    """step-dpo-1e-6-0 -> step-dpo, 1e-6, 0."""
    rest, seed = name.rsplit("-", 1)
    method = max(
        (known for known in (*NAMES, "dpo-tokens") if rest.startswith(f"{known}-")), key=len
    )
    return method, rest[len(method) + 1 :], seed


def stages(args: Table) -> list[str]:
    """What became of the samples."""
    samples, located = rows_of(args.out / "samples.jsonl"), rows_of(args.out / "located.jsonl")
    finished = [row for row in samples if row["finish_reason"] == "stop"]
    parsed = [row for row in finished if row["prediction"] is not None]
    right, verdicts = [row for row in samples if row["correct"]], {}
    for row in samples:
        verdicts.setdefault(row["id"], set()).add(row["correct"])
    found = [row for row in located if row["error_step"]]
    total = len(samples)
    rows = [
        ["problems", f"{len(verdicts):,}"],
        ["samples", f"{total:,}"],
        ["finished", share(len(finished), total)],
        ["finished with an answer", share(len(parsed), total)],
        ["right", share(len(right), total)],
        [
            "problems solved at least once",
            share(sum(True in v for v in verdicts.values()), len(verdicts)),
        ],
        [
            "problems with right and wrong samples",
            share(sum(len(v) > 1 for v in verdicts.values()), len(verdicts)),
        ],
        ["wrong samples given to 02", f"{len(located):,}"],
        ["error located", share(len(found), len(located))],
    ]
    reasons = Counter(row["reason"] for row in located if not row["error_step"])
    rows += [
        [f"not located: {reason}", share(number, len(located))]
        for reason, number in reasons.most_common()
    ]
    made = Counter()
    for row in rows_of(args.out / "all-step-dpo.tries.jsonl"):
        made.update(row["count"])
    tried, continuations = made["errors tried"], sum(made[name] for name in CONTINUATIONS)
    rows += [
        ["errors cut short by the limit on tokens", f"{made['errors cut short by max_tokens']:,}"],
        ["errors gone on from", f"{tried:,}"],
        ["errors with a pair", share(made["errors with a pair"], tried)],
        ["continuations of these", f"{continuations:,}"],
        *([f"continuations: {name}", share(made[name], continuations)] for name in CONTINUATIONS),
    ]
    return [
        "## What became of the samples",
        markdown(["stage", "number"], rows),
        steps(args, samples, found),
        sets(args),
    ]


def steps(args: Table, samples: list[dict], located: list[dict]) -> str:
    """By number of the step, and by steps of a solution; 8 stands for 8 and more."""

    def number(count):
        return min(count, 8)

    long, right = (
        Counter(number(len(row["steps"])) for row in samples if row["correct"] >= least)
        for least in (0, 1)
    )
    errors = Counter(number(row["error_step"]) for row in located)
    pairs = Counter(number(row["error_step"]) for row in rows_of(args.out / "all-step-dpo.jsonl"))
    rows = [
        [
            f"{k}{' and more' * (k == 8)}",
            f"{long[k]:,}",
            share(right[k], long[k]),
            f"{errors[k]:,}",
            f"{pairs[k]:,}",
        ]
        for k in range(1, 9)
        if long[k] or errors[k]
    ]
    head = [
        "k",
        "solutions of k steps",
        "right of these",
        "errors located at step k",
        "Step-DPO pairs at step k",
    ]
    return markdown(head, rows)


def sets(args: Table) -> str:
    """The training sets, and how much of each comes from its most frequent problems."""
    rows = []
    for path in sorted((args.out / "pairs").glob("*.jsonl")):
        if "validation" in path.name or not (pairs := rows_of(path)):
            continue
        of = [count for _, count in Counter(row["id"] for row in pairs).most_common()]
        made = args.out / f"all-{path.stem}.jsonl"
        naive = sum(row.get("method") == "dpo" for row in pairs)
        mixed = (
            f" ({naive} naive, {len(pairs) - naive} controlled)"
            if path.stem.startswith("scdpo")
            else ""
        )
        rows.append(
            [
                name_of(path.stem),
                len(rows_of(made)) if made.exists() else "",
                f"{len(pairs)}{mixed}",
                len(of),
                of[0],
                f"{sum(of[:10]) / len(pairs):.1%}",
            ]
        )
    head = [
        "set",
        "made",
        "trained on",
        "problems",
        "most of one problem",
        "share of the 10 most frequent problems",
    ]
    return markdown(head, rows)


def costs(args: Table) -> list[str]:
    """Tokens sampled and seconds of each method's data, tokens and seconds of its training."""
    tokenizer, out, rows = EVAL.load_tokenizer(args.model, None, "{}"), args.out, []

    def count(texts):
        return (
            sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0
        )

    seconds = {
        name: json.loads((out / f"{file}.jsonl.meta.json").read_text())["seconds"]
        for name, file in STAGES.items()
    }
    tokens = {
        name: sum(row["count"].get("tokens", 0) for row in rows_of(out / f"{file}.jsonl"))
        for name, file in STAGES.items()
        if "tries" in file
    }
    kept = [found for row in rows_of(out / "rollouts.jsonl") for found in row["rollouts"].values()]
    tokens["02, rollouts"] = count(
        [continuation["text"] for found in kept for continuation in found]
    )
    tokens["01, samples"] = count(
        [row["response"].removeprefix(EVAL.OPENING) for row in rows_of(out / "samples.jsonl")]
    )
    for method in args.methods:
        pairs = rows_of(out / "pairs" / f"{method}.jsonl")
        uses = USES[method.removesuffix("-tokens")]
        sides = ("response",) if method == "sft" else ("chosen", "rejected")
        runs = [path.parent for path in sorted((out / "models").glob("*/training.json"))]
        spent = [training(folder) for folder in runs if split_name(folder.name)[0] == method]
        mean = sum(found["seconds"] for found in spent)
        peak = max((found["peak"] for found in spent), default=0)
        rows.append(
            [
                name_of(method),
                f"{sum(map(tokens.get, uses)):,}",
                f"{sum(map(seconds.get, uses)):,.0f}",
                len(pairs),
                f"{count([row[side] for row in pairs for side in sides]):,}",
                len(spent),
                f"{mean / len(spent):,.0f}" if spent else "",
                f"{peak:.1f}" if peak else "",
            ]
        )
    head = [
        "method",
        "sampled tokens",
        "s of its data",
        "pairs",
        "tokens of a pass",
        "trainings",
        "s of each",
        "GiB of a GPU",
    ]
    note = (
        "The samples (01) count for every method. Seconds of the data are those of the stages' meta files, of a training "
        "those of its steps, without loading, reference and validation. Tokens of a pass: chosen and rejected, or the "
        "solution."
    )
    parts = [[name, f"{tokens[name]:,}", f"{seconds[name]:,.0f}"] for name in STAGES]
    return [
        "## Cost",
        markdown(head, rows),
        note,
        markdown(["stage", "sampled tokens", "s"], parts),
    ]


def training(folder: Path) -> dict:
    """Seconds of a training's steps, also where it was gone on with, and its peak memory on a
    GPU."""
    size = int(json.loads((folder / "training.json").read_text())["arguments"]["batch_size"])
    pairs = json.loads((folder / "training.json").read_text())["pairs"]
    lines = [line for line in rows_of(folder / "metrics.jsonl") if "pairs_per_s" in line]
    per_epoch = -(-pairs // size)

    def of_step(step):
        return size if step % per_epoch else pairs - size * (per_epoch - 1)

    return {
        "seconds": sum(of_step(line["step"]) / line["pairs_per_s"] for line in lines),
        "peak": max((line.get("peak_gib", 0) for line in lines), default=0),
    }


def examples(args: Table) -> list[str]:
    """A pair of each method: the first by a hash of its problem's id."""
    parts = []
    for method in SHOWN:
        pairs = [
            row
            for row in rows_of(args.out / "pairs" / f"{method}.jsonl")
            if row["method"] == method
        ]
        for row in by_hash(pairs)[:1]:
            texts = {
                "Problem": f"{row['prompt']}\nAnswer: {row['answer']}",
                "Prefix": row["initial_reason_steps"],
                "Chosen": row["chosen"],
                "Rejected": row["rejected"],
            }
            parts.append(
                f"### {name_of(method)}: {row['id']}, sample {row['sample']}, step {row['error_step']}"
            )
            parts += [f"{title}:\n\n````text\n{text}\n````" for title, text in texts.items()]
    return ["## A pair of each kind", *parts] if parts else []


def hashes(args: Table) -> list[str]:
    paths = [args.out / f"{name}.jsonl" for name in ("samples", "located", "rollouts")]
    paths += [
        path
        for kind in ("problems/*", "pairs/*", "test/*/*")
        for path in sorted(args.out.glob(f"{kind}.jsonl"))
    ]
    rows = [
        [
            str(path.relative_to(args.out)),
            path.read_bytes().count(b"\n"),
            hashlib.sha256(path.read_bytes()).hexdigest(),
        ]
        for path in paths
    ]
    meta = json.loads((args.out / "samples.jsonl.meta.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return [
        "## Files",
        f"Samples of {meta['settings']['model']}, commit {meta['git'][:12]}; {versions}.",
        markdown(["file", "rows", "sha256"], rows),
    ]


def draw(args: Table) -> list[str]:
    """OUT/curves.png: the trainings at the chosen rates, first seeds."""
    runs = {}
    for method in args.methods:
        path = args.out / f"{method}.rate"
        rate = path.read_text().strip() if path.exists() else "no rate"
        for found in sorted((args.out / "models").glob(f"{method}-{rate}-*/training.json"))[:1]:
            runs[name_of(method)] = PLOT.read_metrics(found.parent)
    if not runs:
        return []
    PLOT.draw(args.out / "curves.png", runs)
    return [
        "![Loss, accuracy, margin and log-probabilities over the training; dashed: held-out pairs](curves.png)"
    ]


def table(args: Table):
    parts = [
        *accuracies(args),
        *draw(args),
        *validations(args),
        *stages(args),
        *costs(args),
        *examples(args),
        *hashes(args),
    ]
    EVAL.save(args.out / "table.md", "\n\n".join(parts) + "\n")
    print((args.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    commands = {"problems": Problems, "choose": Choose, "table": Table}
    chosen = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    try:
        {Problems: problems, Choose: choose, Table: table}[type(chosen)](chosen)
    except FileNotFoundError as error:
        EVAL.stop(f"{error.filename} is missing; recipes/small_model.sh makes it")
