"""What recipes/small_model.sh needs in addition to the stages: its problems, the choice of the
learning rate, tables and curves.

It writes OUT/problems/*.jsonl, the best rate in OUT/dpo.rate, OUT/table.md and OUT/curves.png:
    python experiments/small_model.py problems runs/small_model
    python experiments/small_model.py choose runs/small_model --method dpo --rates 1e-6 3e-6
    python experiments/small_model.py table runs/small_model --model Qwen/Qwen2.5-0.5B-Instruct

Problems stand in the order of a hash of their ids: first those of validation, then those to sample
from. The table has the methods that are trained so far.
"""

import hashlib
import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Annotated

import tyro
from ablation_table import NAMES as ABLATION_NAMES
from ablation_table import holm, points, rows_of

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
EVAL = importlib.import_module("05_eval")
PLOT = importlib.import_module("plot_training")
NAMES = {**ABLATION_NAMES, "sft": "SFT on right samples"}
CONTINUATIONS = (
    "wrong",
    "blank step",
    "changes the step before",
    "restates the rejected step",
    "repeats a chosen step",
    "over --max-pairs-per-error",
    "pairs",
)
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
    samples: Path | None = None
    """output of 01 to use; without its rows of validation problems it becomes OUT/samples.jsonl"""
    model: str = ""
    """the samples' model, as 02 will know it"""


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
            f"--validation {args.validation}: the training part has {len(train)} problems; "
            "leave some to sample from"
        )
    parts = {
        "validation": train[: args.validation],
        "gsm8k_train": train[args.validation :],
        "gsm8k_test": gsm8k[: args.gsm8k],
        "math_test": math[: args.math],
    }
    folder = args.out / "problems"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        lines = [json.dumps({**row, "dataset": name}, ensure_ascii=False) + "\n" for row in rows]
        EVAL.save(folder / f"{name}.jsonl", "".join(lines))
    print(", ".join(f"{name} {len(rows)}" for name, rows in parts.items()))
    if args.samples:
        to_sample_from = {row["id"] for row in parts["gsm8k_train"]}
        rows = [row for row in EVAL.read_rows(args.samples, ("id",)) if row["id"] in to_sample_from]
        if not rows:
            EVAL.stop(f"{args.samples}: no sample of a problem in {folder / 'gsm8k_train.jsonl'}")
        lines = [json.dumps({**row, "model": args.model}, ensure_ascii=False) for row in rows]
        EVAL.save(args.out / "samples.jsonl", "\n".join(lines) + "\n")
        meta = Path(f"{args.samples}.meta.json")
        if meta.exists():  # 02 and 03 compare their prompt with it
            EVAL.save(args.out / "samples.jsonl.meta.json", meta.read_text(encoding="utf-8"))


def validated(out: Path, name: str) -> dict | None:
    """Figures of a model on the validation problems, if they are there."""
    path = out / "validation" / name / "summary.json"
    if not path.exists():
        return None
    return json.loads(path.read_text())["benchmarks"]["validation"]["models"][name]


def choose(args: Choose):
    if len(args.rates) == 1:
        EVAL.save(args.out / f"{args.method}.rate", args.rates[0] + "\n")
        print(f"{args.method}: {args.rates[0]}, the only rate")
        return
    accuracy, missing = {}, []
    for rate in args.rates:
        if figures := validated(args.out, f"{args.method}-{rate}-{args.seed}"):
            accuracy[rate] = figures["accuracy"]
        else:
            missing.append(rate)
    if missing:
        print(f"{args.method}: no choice yet, {', '.join(missing)} not validated")
        return
    rates = sorted(accuracy, key=float)
    best = max(rates, key=accuracy.get)  # of equal ones the lowest
    if best in (rates[0], rates[-1]):
        print(
            f"{args.method} is best at {best}, at the end of the grid: its optimum may lie beyond",
            file=sys.stderr,
        )
    EVAL.save(args.out / f"{args.method}.rate", best + "\n")
    accuracies = ", ".join(f"{rate} {value:.1%}" for rate, value in accuracy.items())
    print(f"{args.method}: {best}; {accuracies}")


# -------------------------------------------------------------------------------------------------
# tables


def markdown(head: str, rows: list[list]) -> str:
    """A table; `head` has the titles of its columns, as in "method | rate"."""
    titles = head.split(" | ")
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def name_of(method: str) -> str:
    return NAMES.get(method, method)


def share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def whole(seconds: float) -> str:
    return "not known" if isnan(seconds) else f"{seconds:,.0f}"


def accuracies(args: Table) -> list[str]:
    """Of base and methods on each benchmark; the differences from the base and between methods,
    each family by Holm."""
    path = args.out / "test" / "summary.json"
    if not path.exists():
        return []
    summary = json.loads(path.read_text())
    labels = [label for label in summary["groups"] if label != "base"]
    against, pairwise = {}, {}
    for name, benchmark in summary["benchmarks"].items():
        against |= {(name, label): benchmark["models"][label]["p"] for label in labels}
        pairwise |= {(name, key): test["p"] for key, test in benchmark["pairwise"].items()}
    against, pairwise = holm(against), holm(pairwise)
    rows, between = [], []
    for name, benchmark in summary["benchmarks"].items():
        for label in ("base", *labels):
            figures = benchmark["models"][label]
            seeds = figures["seeds"]
            versus, rate = [""] * 4, ""
            if label != "base":
                rate = (args.out / f"{label}.rate").read_text().strip()
                won, lost = len(figures["won"]), len(figures["lost"])
                adjusted = against[name, label]
                versus = [points(figures), f"{figures['p']:.3g}", f"{adjusted:.3g}"]
                versus.append(f"{won} / {lost}")
            cells = [f"{name} ({benchmark['problems']})", name_of(label), rate]
            cells += [seeds if rate else ""]
            cells += [EVAL.percentage(figures["accuracy"], figures["interval"])]
            cells += [f"{100 * figures['spread']:.1f}" if seeds > 1 else "", *versus]
            no_answer = figures["unparsable"] + figures["refused_prompt"]
            cells += map(EVAL.percentage, (figures["unfinished"], no_answer))
            rows.append([*cells, f"{figures['mean_tokens']:.0f}"])
        for key, test in benchmark["pairwise"].items():
            methods = " − ".join(map(name_of, key.split("\n")))
            adjusted = pairwise[name, key]
            between.append([name, methods, points(test), f"{test['p']:.3g}", f"{adjusted:.3g}"])
    head = (
        "benchmark | model | rate | seeds | accuracy (95 % interval) | sd of seeds "
        f"| against the base, points | p | p, Holm of {len(against)} | won / lost "
        "| unfinished | no answer | tokens an answer"
    )
    decoding = f"{summary['decoding']}. Differences are paired by problem (05_eval.py)."
    parts = ["## Accuracy", decoding, markdown(head, rows)]
    if between:
        head = f"benchmark | methods | points (95 % interval) | p | p, Holm of {len(pairwise)}"
        parts.append(markdown(head, between))
    return parts


def validations(args: Table) -> list[str]:
    names = [path.name for path in (args.out / "validation").glob("*")]
    rows = []
    for name in sorted(names, key=lambda name: (name != "base", name)):
        figures = validated(args.out, name)
        if not figures:
            continue
        method, rate, seed = ("base", "", "") if name == "base" else split_name(name)
        chosen = args.out / f"{method}.rate"
        is_chosen = chosen.exists() and chosen.read_text().strip() == rate
        accuracy = EVAL.percentage(figures["accuracy"], figures["interval"])
        cells = [name_of(method), rate, seed, accuracy, EVAL.percentage(figures["unfinished"])]
        cells += [f"{figures['mean_tokens']:.0f}", "chosen" if is_chosen else ""]
        rows.append(cells)
    head = "method | rate | seed | accuracy (95 % interval) | unfinished | tokens an answer | "
    return ["## Choice of the learning rate", markdown(head, rows)] if rows else []


def split_name(name: str) -> tuple[str, str, str]:
    """step-dpo-1e-6-0 -> step-dpo, 1e-6, 0."""
    rest, seed = name.rsplit("-", 1)
    method = max((name for name in NAMES if rest.startswith(f"{name}-")), key=len)
    return method, rest[len(method) + 1 :], seed


def stages(args: Table) -> list[str]:
    """What became of the samples."""
    samples, located = rows_of(args.out / "samples.jsonl"), rows_of(args.out / "located.jsonl")
    finished = [row for row in samples if row["finish_reason"] == "stop"]
    parsed = [row for row in finished if row["prediction"] is not None]
    right = [row for row in samples if row["correct"]]
    verdicts = {}
    for row in samples:
        verdicts.setdefault(row["id"], set()).add(row["correct"])
    solved = sum(True in verdicts_of_problem for verdicts_of_problem in verdicts.values())
    mixed = sum(len(verdicts_of_problem) > 1 for verdicts_of_problem in verdicts.values())
    with_error = [row for row in located if row["error_step"]]
    total = len(samples)
    rows = [
        ["problems", f"{len(verdicts):,}"],
        ["samples", f"{total:,}"],
        ["finished", share(len(finished), total)],
        ["finished with an answer", share(len(parsed), total)],
        ["right", share(len(right), total)],
        ["problems solved at least once", share(solved, len(verdicts))],
        ["problems with right and wrong samples", share(mixed, len(verdicts))],
        ["wrong samples given to 02", f"{len(located):,}"],
        ["error located", share(len(with_error), len(located))],
    ]
    reasons = Counter(row["reason"] for row in located if not row["error_step"])
    rows += [
        [f"not located: {reason}", share(number, len(located))]
        for reason, number in reasons.most_common()
    ]
    counts = Counter()
    for row in rows_of(args.out / "all-step-dpo.tries.jsonl"):
        counts.update(row["count"])
    tried, cut_short = counts["errors tried"], counts["errors cut short by max_tokens"]
    continuations = sum(counts[name] for name in CONTINUATIONS)
    rows += [
        ["errors cut short by the limit on tokens", f"{cut_short:,}"],
        ["errors continued from", f"{tried:,}"],
        ["errors with a pair", share(counts["errors with a pair"], tried)],
        ["continuations of these", f"{continuations:,}"],
    ]
    for name in CONTINUATIONS:
        rows.append([f"continuations: {name}", share(counts[name], continuations)])
    title = "## What became of the samples"
    return [title, markdown("stage | number", rows), steps(args, samples, with_error), sets(args)]


def steps(args: Table, samples: list[dict], located: list[dict]) -> str:
    """By number of the step, and by steps of a solution; 8 stands for 8 and more."""

    all_pairs = rows_of(args.out / "all-step-dpo.jsonl")
    solutions = Counter(min(len(row["steps"]), 8) for row in samples)
    right = Counter(min(len(row["steps"]), 8) for row in samples if row["correct"])
    errors = Counter(min(row["error_step"], 8) for row in located)
    pairs = Counter(min(row["error_step"], 8) for row in all_pairs)
    rows = []
    for k in range(1, 9):
        if solutions[k] or errors[k]:
            cells = [f"{k}{' and more' * (k == 8)}", f"{solutions[k]:,}"]
            cells += [share(right[k], solutions[k]), f"{errors[k]:,}", f"{pairs[k]:,}"]
            rows.append(cells)
    head = "k | solutions of k steps | right of these | errors located at step k "
    return markdown(head + "| Step-DPO pairs at step k", rows)


def sets(args: Table) -> str:
    """The training sets, and how much of each comes from its most frequent problems."""
    rows = []
    for path in sorted((args.out / "pairs").glob("*.jsonl")):
        if "validation" in path.name or not (pairs := rows_of(path)):
            continue
        per_problem = [n for _, n in Counter(row["id"] for row in pairs).most_common()]
        all_pairs = args.out / f"all-{path.stem}.jsonl"
        size = f"{len(pairs)}"
        if path.stem.startswith("scdpo"):
            naive = sum(row.get("method") == "dpo" for row in pairs)
            size += f" ({naive} naive, {len(pairs) - naive} controlled)"
        made = len(rows_of(all_pairs)) if all_pairs.exists() else ""
        most_frequent = f"{sum(per_problem[:10]) / len(pairs):.1%}"
        cells = [name_of(path.stem), made, size, len(per_problem), per_problem[0], most_frequent]
        rows.append(cells)
    head = "set | made | trained on | problems | most of one problem "
    return markdown(head + "| share of the 10 most frequent problems", rows)


def costs(args: Table) -> list[str]:
    """Tokens sampled and seconds of each method's data, tokens and seconds of its training."""
    tokenizer, out = EVAL.load_tokenizer(args.model, None, "{}"), args.out

    def n_tokens(texts: list[str]) -> int:
        if not texts:
            return 0
        return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    tokens, seconds = {}, {}
    for name, file in STAGES.items():
        meta = out / f"{file}.jsonl.meta.json"  # SAMPLES may come without one
        seconds[name] = json.loads(meta.read_text())["seconds"] if meta.exists() else nan
        if "tries" in file:
            rows = rows_of(out / f"{file}.jsonl")
            tokens[name] = sum(row["count"].get("tokens", 0) for row in rows)
    samples = rows_of(out / "samples.jsonl")
    tokens["01, samples"] = n_tokens(
        [row["response"].removeprefix(EVAL.OPENING) for row in samples]
    )
    located = rows_of(out / "located.jsonl")
    tokens["02, rollouts"] = sum(row.get("rollout_tokens", (0, 0))[1] for row in located)
    rows = []
    for method in args.methods:
        pairs = rows_of(out / "pairs" / f"{method}.jsonl")
        uses = USES[method.removesuffix("-tokens")]
        sides = ("response",) if method == "sft" else ("chosen", "rejected")
        runs = [path.parent for path in sorted((out / "models").glob("*/training.json"))]
        trainings = [training(folder) for folder in runs if split_name(folder.name)[0] == method]
        cells = [name_of(method), f"{sum(map(tokens.get, uses)):,}"]
        cells += [whole(sum(map(seconds.get, uses))), len(pairs)]
        cells += [f"{n_tokens([row[side] for row in pairs for side in sides]):,}", len(trainings)]
        if trainings:
            mean = sum(run["seconds"] for run in trainings) / len(trainings)
            peak = max(run["peak"] for run in trainings)
            cells += [f"{mean:,.0f}", f"{peak:.1f}" if peak else ""]
        else:
            cells += ["", ""]
        rows.append(cells)
    head = (
        "method | sampled tokens | s of its data | pairs | trained tokens of an epoch | trainings "
        "| s of each | peak GiB"
    )
    note = (
        "The samples (01) count for every method. Seconds of the data are those of the stages' "
        "meta files, of a training those of its steps, without loading, reference and validation. "
        "Trained tokens: chosen and rejected, or the solution."
    )
    stage_rows = [[name, f"{tokens[name]:,}", whole(seconds[name])] for name in STAGES]
    stage_table = markdown("stage | sampled tokens | s", stage_rows)
    return ["## Cost", markdown(head, rows), note, stage_table]


def training(folder: Path) -> dict:
    """Seconds of a training's steps, also where it was resumed, and its peak memory."""
    about = json.loads((folder / "training.json").read_text())
    size, pairs = int(about["arguments"]["batch_size"]), about["pairs"]
    steps_per_epoch = -(-pairs // size)
    last_size = pairs - size * (steps_per_epoch - 1)
    seconds = peak = logged = 0
    for line in rows_of(folder / "metrics.jsonl"):
        if "pairs_per_s" in line:
            step_size = size if line["step"] % steps_per_epoch else last_size
            seconds += step_size / line["pairs_per_s"]
            logged += 1
            peak = max(peak, line.get("peak_gib", 0))
    return {"seconds": seconds * about["steps"] / logged, "peak": peak}


def hashes(args: Table) -> list[str]:
    names = ("samples", "located", "rollouts")
    paths = [path for name in names if (path := args.out / f"{name}.jsonl").exists()]
    for pattern in ("problems/*.jsonl", "pairs/*.jsonl", "test/*/*.jsonl"):
        paths += sorted(args.out.glob(pattern))
    rows = []
    for path in paths:
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        rows.append([path.relative_to(args.out), content.count(b"\n"), sha256])
    # not 01's: SAMPLES may come without one
    meta = json.loads((args.out / "located.jsonl.meta.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    settings = meta["settings"]
    locator = settings.get("model") or settings.get("judge_model") or settings.get("prm")
    origin = f"Located with {locator} at commit {meta['git'][:12]}; {versions}."
    return ["## Files", origin, markdown("file | rows | sha256", rows)]


def draw(args: Table) -> list[str]:
    """OUT/curves.png: the trainings at the chosen rates, first seeds."""
    runs = {}
    for method in args.methods:
        path = args.out / f"{method}.rate"
        rate = path.read_text().strip() if path.exists() else "no rate"
        finished = sorted((args.out / "models").glob(f"{method}-{rate}-*/training.json"))
        if finished:
            runs[name_of(method)] = PLOT.read_metrics(finished[0].parent)
    if not runs:
        return []
    PLOT.draw(args.out / "curves.png", runs)
    text = "Loss, accuracy, margin and log-probabilities over the training; dashed: held-out pairs"
    return [f"![{text}](curves.png)"]


def table(args: Table):
    parts = [
        *accuracies(args),
        *draw(args),
        *validations(args),
        *stages(args),
        *costs(args),
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
