"""How exact the rollout locator is by number of rollouts, search and rule, and what it costs, on
the bundled world.

    python experiments/locator_curve.py --samples runs/quickstart/samples.jsonl

02_locate_step.py makes 16 continuations of every prefix of the first --limit wrong samples (without
the right samples, so that V(0) is estimated too; --linear --all-rollouts --keep-rollouts). Then its
search, with a fixed number of rollouts as by --alpha 0, is run with these instead of an engine,
--repeats times with the continuations in another random order. The truth is arithmetic's
(locator_accuracy.py). Output: two tables and OUT.png.

Rules on V(0) .. V(n):
    first   the first k with V(k) = 0
    last    the one after the last k with V(k) > 0
    drop    the largest fall V(k-1) - V(k)
    half    the first k with V(k) < V(k-1) / 2
    change  the likeliest change point, where V is beta(1/2, 1/2) before the error and 1/100 from it
            on"""

import asyncio
import importlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from math import lgamma, log
from pathlib import Path

import tyro
from locator_accuracy import true_error
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LOCATE, EVAL = importlib.import_module("02_locate_step"), importlib.import_module("05_eval")


@dataclass
class Args:
    samples: Path = Path("runs/quickstart/samples.jsonl")
    """output of 01 on a problem file of data/tiny"""
    model: str = "data/tiny/model"
    """the model that made the samples"""
    limit: int = 400
    """wrong samples"""
    repeats: int = 5
    """random orders of the continuations"""
    rollouts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """numbers of rollouts"""
    out: Path = Path("runs/locator_curve")
    """folder to write, and OUT.png"""


def continuations(args: Args) -> list[dict]:
    """Wrong samples with `true`, the first wrong step, and `rollouts`: by k the (right, tokens) of
    each continuation."""
    args.out.mkdir(parents=True, exist_ok=True)
    samples = [json.loads(line) for line in open(args.samples, encoding="utf-8")]
    wrong = [row for row in samples if not row["correct"]][: args.limit]
    lines = "".join(json.dumps(row) + "\n" for row in wrong)
    (args.out / "wrong.jsonl").write_text(lines, encoding="utf-8")
    out, rollouts = args.out / "whole.jsonl", args.out / "whole.kept"
    command = [sys.executable, ROOT / "02_locate_step.py", "--model", args.model]
    command += ["--samples", args.out / "wrong.jsonl", "--out", out, "--keep-rollouts", rollouts]
    command += ["--linear", "--all-rollouts", "--rollouts", max(args.rollouts)]
    command += ["--max-tokens", "400"]
    command += ["--engine-args=--max-num-seqs 512 --max-model-len 1024"]
    if subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL).returncode:
        sys.exit(2)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = {(row["id"], row["sample"]): row for row in wrong}
    for line in open(rollouts, encoding="utf-8"):
        row = json.loads(line)
        rows[row["id"], row["sample"]]["rollouts"] = {
            int(k): [
                (c["correct"], len(tokenizer(c["text"])["input_ids"]) + 1) for c in completions
            ]
            for k, completions in row["rollouts"].items()
        }
    return [{**row, "true": true_error(row)} for row in rows.values() if true_error(row)]


def search(
    row: dict, n: int, linear: bool, solvable: bool, order: random.Random
) -> tuple[int | None, int]:
    """What 02 finds with n rollouts, and the tokens of the continuations that it asks for."""
    spent = 0

    async def estimate(k: int) -> tuple[int, int]:
        nonlocal spent
        if k == 0 and solvable:
            return 1, 1
        rollouts = order.sample(row["rollouts"][k], n)
        right, tried = 0, 0
        while tried < n and not right:  # waves as in 02
            wave = rollouts[tried : tried + max(LOCATE.WAVE, tried)]
            right = sum(is_right for is_right, _ in wave)
            tried += len(wave)
            spent += sum(tokens for _, tokens in wave)
        return right, tried

    step, _ = asyncio.run(LOCATE.first_wrong_step(len(row["steps"]), estimate, linear))
    return step, spent


def change_point(right: list[int], n: int) -> int:
    """The e in 1..len(right)-1 with the largest likelihood; right[k] of n continuations after step
    k are right."""
    before = [
        lgamma(r + 0.5) + lgamma(n - r + 0.5) - lgamma(n + 1) - 2 * lgamma(0.5) for r in right
    ]
    after = [r * log(0.01) + (n - r) * log(0.99) for r in right]
    return max(range(1, len(right)), key=lambda e: sum(before[:e]) + sum(after[e:]))


RULES = {
    "first": lambda v, n: v.index(0),
    "last": lambda v, n: max(k for k in range(len(v)) if v[k]) + 1,
    "drop": lambda v, n: max(range(1, len(v)), key=lambda k: v[k - 1] - v[k]),
    "half": lambda v, n: next(k for k in range(1, len(v)) if v[k] < v[k - 1] / 2),
    "change": change_point,
}


def share(hits: list[bool], repeats: int) -> tuple[float, float, float]:
    """Share of hits and its 95 % interval, for the number of solutions and not that of their
    repetitions."""
    total = max(1, round(len(hits) / repeats))
    mean = sum(hits) / max(1, len(hits))
    return mean, *EVAL.wilson(round(total * mean), total)


def compare_searches(args: Args, rows: list[dict], order: random.Random) -> dict:
    """Print the first table; returns (exact, low, high, tokens, located) by number of rollouts,
    search and fewest steps."""
    table = {}
    many_steps = sum(len(row["steps"]) >= 5 for row in rows)
    print(f"{len(rows)} wrong solutions, {many_steps} of them with 5 steps or more")
    print(
        "rollouts  search     located  exact of these            "
        "tokens each, of linear's  5 steps or more: exact, tokens"
    )
    for n in args.rollouts:
        for kind in ("linear", "bisection"):
            results = [
                (row, *search(row, n, kind == "linear", False, order))
                for _ in range(args.repeats)
                for row in rows
            ]
            for min_steps in (0, 5):
                part = [result for result in results if len(result[0]["steps"]) >= min_steps]
                hits = [step == row["true"] for row, step, _ in part if step]
                tokens = sum(tokens for _, _, tokens in part) / len(part)
                located = len(hits) / len(results)
                table[n, kind, min_steps] = (*share(hits, args.repeats), tokens, located)
            exact, low, high, tokens, located = table[n, kind, 0]
            exact5, _, _, tokens5, _ = table[n, kind, 5]
            linear, linear5 = table[n, "linear", 0][3], table[n, "linear", 5][3]
            print(
                f"{n:8}  {kind:9} {located:8.1%}  {exact:.1%} ({low:.1%} to {high:.1%}) "
                f"{tokens:12.0f} {tokens / linear:8.0%} {exact5:18.1%} {tokens5 / linear5:6.0%}",
                flush=True,
            )
    for min_steps in (0, 5):
        solvable = [  # V(0) > 0
            row
            for row in rows
            if len(row["steps"]) >= min_steps and len(row["rollouts"]) == len(row["steps"])
        ]
        bisection, linear = (
            sum(search(row, 8, linear, True, order)[1] for row in solvable)
            for linear in (False, True)
        )
        print(
            f"8 rollouts, V(0) > 0 known, {min_steps} steps or more: "
            f"bisection has {bisection / linear:.0%} of linear's tokens"
        )
    return table


def compare_rules(args: Args, rows: list[dict], order: random.Random):
    print("\nrollouts  rule      exact, all rollouts of all prefixes made")
    for n in args.rollouts:
        for name, rule in RULES.items():
            hits = []
            for _ in range(args.repeats):
                for row in rows:
                    values = []
                    for k in range(len(row["steps"])):
                        drawn = order.sample(row["rollouts"].get(k) or [(0, 0)] * n, n)
                        values.append(sum(is_right for is_right, _ in drawn))
                    if values[0]:
                        hits.append(rule([*values, 0], n) == row["true"])
            exact, low, high = share(hits, args.repeats)
            print(f"{n:8}  {name:8} {exact:7.1%} ({low:.1%} to {high:.1%})", flush=True)


def main(args: Args):
    rows, order = continuations(args), random.Random(0)
    table = compare_searches(args, rows, order)
    compare_rules(args, rows, order)
    draw(table, Path(f"{args.out}.png"))


def draw(table: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    for kind, colour in (("bisection", "tab:blue"), ("linear", "tab:orange")):
        points = [
            (n, *values)
            for (n, search_kind, min_steps), values in table.items()
            if search_kind == kind and min_steps == 0
        ]
        x = [tokens for *_, tokens, _ in points]
        y = [exact for _, exact, *_ in points]
        errors = [
            [exact - low for _, exact, low, *_ in points],
            [high - exact for _, exact, _, high, *_ in points],
        ]
        axis.errorbar(x, y, errors, marker="o", capsize=3, color=colour, label=kind)
        for (n, *_), a, b in zip(points, x, y, strict=True):
            axis.annotate(str(n), (a, b), textcoords="offset points", xytext=(5, -12), fontsize=8)
    axis.set(
        xlabel="tokens of a wrong solution (at the points: rollouts)",
        title="share of located errors that are exact, 95 % intervals",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
