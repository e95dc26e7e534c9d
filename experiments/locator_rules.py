"""When the tries of a prefix may end: fixed numbers of rollouts against 02's --alpha, on the same
continuations.

    python experiments/locator_rules.py --labels processbench/gsm8k.jsonl --model NAME \\
        --base-url http://127.0.0.1:8000/v1
    python experiments/locator_rules.py --samples runs/quickstart/samples.jsonl \\
        --model data/tiny/model --max-tokens 400

02_locate_step.py makes --rollouts continuations of every prefix of --rows solutions, drawn by the
hash of their ids (--linear --all-rollouts; where no continuation of the empty prefix is right, it
makes no others: every rule stops there). Then its own search is run with these instead of a model,
--repeats times with the continuations in another random order, by every rule. The same command run
again makes only what is missing; with more --rows too.

Input: labelled solutions (ProcessBench, with `answer`), or samples of 01 on the bundled world,
whose truth is arithmetic's. Output: for V(0) not known and for V(0) estimated by four samples (the
wrong one itself and three continuations of the empty prefix, for which no tokens count), a table
with a line a rule: the share of wrong solutions for which a step is named, the share of these that
is exact, F1 of ProcessBench, tokens and tries a wrong solution, and how many points more a rule has
than a fixed number of rollouts at equal tokens (between two such numbers by a line): of the located
that are exact, and of all that are located exactly. In brackets 95 % intervals of 2,000 draws of
the solutions."""

import hashlib
import importlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
LOCATE = importlib.import_module("02_locate_step")
LABELLED = importlib.import_module("processbench")
FIXED = (1, 2, 4, 6, 8, 12, 16, 24, 32)


@dataclass
class Args:
    labels: Path | None = None
    """labelled solutions: problem, answer, steps, label, final_answer_correct"""
    samples: Path | None = None
    """or output of 01 on a problem file of data/tiny"""
    rows: int = 100
    """number of solutions; from --labels right and wrong ones, from --samples wrong ones only"""
    rollouts: int = 32
    """continuations of every prefix"""
    model: str = "data/tiny/model"
    """model that continues the prefixes"""
    tokenizer: str = ""
    """folder or hub id of the tokenizer, where only a server knows --model"""
    base_url: str = ""
    """OpenAI-compatible server; else vLLM in this process"""
    engine_args: str = ""
    """vLLM's own options"""
    temperature: float = 0.8
    """sampling temperature"""
    top_p: float = 0.95
    """nucleus sampling"""
    max_tokens: int = 2048
    """longest continuation, in tokens"""
    concurrency: int = 0
    """solutions in flight; few, where a run will be cut off"""
    rules: tuple[tuple[float, int, int], ...] = (
        (0.05, 16, 8),
        (0.05, 16, 12),
        (0.05, 16, 16),
        (0.05, 32, 12),
        (0.05, 32, 24),
        (0.02, 16, 12),
        (0.1, 16, 12),
    )
    """rules to compare: --alpha, --rollouts and --give-up of each"""
    repeats: int = 20
    """random orders of the continuations"""
    out: Path = Path("runs/locator_rules")
    """folder to write"""


def chosen(args: Args) -> list[dict]:
    """--rows solutions with `label`, the 0-based first wrong step, or -1."""
    if args.labels:
        rows = LABELLED.sample_rows(args.labels)
    else:
        from locator_accuracy import true_error

        rows = []
        for row in LOCATE.read_rows(args.samples, ("id", "sample", "answer", "steps")):
            step = None if row["correct"] else true_error(row)
            if step and step <= len(row["steps"]):
                rows.append({**row, "label": step - 1})
    rows.sort(key=lambda row: hashlib.sha256(repr(LOCATE.identity(row)).encode()).hexdigest())
    return rows[: args.rows]


def continuations(args: Args) -> list[dict]:
    """The solutions with `rollouts`: by number of steps, (right, tokens) of each continuation."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows, wrong, kept = chosen(args), args.out / "wrong.jsonl", args.out / "kept.jsonl"
    lines = [json.dumps(row) + "\n" for row in rows if not row["correct"]]
    wrong.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, ROOT / "02_locate_step.py", "--samples", wrong]
    command += ["--split", LABELLED.split_of(rows), "--out", args.out / "located.jsonl"]
    command += ["--keep-rollouts", kept, "--linear", "--all-rollouts", "--alpha=0", "--give-up=1"]
    passed_on = "base_url concurrency engine_args max_tokens model rollouts temperature tokenizer"
    for name in [*passed_on.split(), "top_p"]:
        command.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(2)
    tokenizer = LOCATE.load_tokenizer(args.tokenizer or args.model, None, "{}")

    def outcome(completion: dict) -> tuple[bool, int]:
        end = completion["finish_reason"] == "stop"
        return completion["correct"], len(tokenizer(completion["text"])["input_ids"]) + end

    rollouts = {}
    for row in LOCATE.read_rows(kept, ("id", "rollouts")):
        rollouts[LOCATE.identity(row)] = {
            int(k): [outcome(completion) for completion in completions]
            for k, completions in row["rollouts"].items()
        }
    return [{**row, "rollouts": rollouts.get(LOCATE.identity(row), {})} for row in rows]


def shuffled(row: dict, order: random.Random) -> dict:
    return {k: order.sample(outcomes, len(outcomes)) for k, outcomes in row["rollouts"].items()}


def replay(row: dict, rollouts: dict, rule, samples: bool) -> tuple[int | None, int, int]:
    """What 02 finds by one rule, the tokens and the number of the continuations that it asks
    for."""
    if row["correct"]:
        return 0, 0, 0
    seen, n_tokens, n_tries = [0, 0], 0, 0
    if samples:
        used, rest = rollouts[0][:3], rollouts[0][3:]
        rollouts = {**rollouts, 0: rest + used}
        seen = [sum(right for right, _ in used), 4]

    async def draw(k: int, tried: int, size: int) -> list[bool]:
        nonlocal n_tokens, n_tries
        wave = rollouts[k][tried : tried + size]
        n_tokens += sum(tokens for _, tokens in wave)
        n_tries += len(wave)
        return [right for right, _ in wave]

    try:
        LOCATE.search(rule, len(row["steps"]), draw, seen).send(None)  # nothing in it waits
    except StopIteration as done:
        return done.value["error_step"], n_tokens, n_tries
    raise RuntimeError("the search waits for something")


def measure(rows: list[dict], orders: list[list[dict]], rule, samples: bool) -> np.ndarray:
    """(rows, 4): share of the orders in which a step is named, in which it is the true one (of a
    right solution: in which no error is found), tokens, tries."""
    totals = np.zeros((len(rows), 4))
    for order in orders:
        for i, (row, rollouts) in enumerate(zip(rows, order, strict=True)):
            step, *spent = replay(row, rollouts, rule, samples)
            totals[i] += [bool(step), step is not None and step == row["label"] + 1, *spent]
    return totals / len(orders)


def figures(measured: np.ndarray, wrong: np.ndarray) -> tuple[float, ...]:
    """(located, exact of these, exact of all, F1, tokens, tries) of the wrong solutions."""
    located, exact, tokens, tries = measured[wrong].mean(0)
    right = measured[~wrong, 1].mean() if (~wrong).any() else np.nan
    f1 = 2 * exact * right / (exact + right + 1e-9)
    return located, exact / max(located, 1e-9), exact, f1, tokens, tries


def gain(curve: np.ndarray, point: np.ndarray, column: int) -> float:
    """How much more than fixed numbers of rollouts at equal tokens; `curve`: figures() of these."""
    return point[column] - np.interp(point[4], curve[:, 4], curve[:, column])


def table(args: Args, rows: list[dict], samples: bool):
    order, fixed = random.Random(0), [n for n in FIXED if n <= args.rollouts]
    orders = [[shuffled(row, order) for row in rows] for _ in range(args.repeats)]
    rules = {}
    for n in fixed:
        rules[f"{n} rollouts"] = LOCATE.Args(alpha=0.0, rollouts=n, give_up=n + 4 * samples)
    for alpha, n, give_up in args.rules:
        name = f"alpha {alpha:g}, at most {n}, give up {give_up}"
        rules[name] = LOCATE.Args(alpha=alpha, rollouts=n, give_up=give_up)
    wrong = np.array([row["label"] >= 0 for row in rows])
    resamples = np.random.default_rng(0).integers(0, len(rows), (2000, len(rows)))
    resamples = [resample for resample in resamples if wrong[resample].any()]
    points, draws_of = {}, {}
    for name, rule in rules.items():
        measured = measure(rows, orders, rule, samples)
        points[name] = figures(measured, wrong)
        draws_of[name] = np.array([figures(measured[i], wrong[i]) for i in resamples])
    curve = np.array([points[f"{n} rollouts"] for n in fixed])
    curve_draws = np.array([draws_of[f"{n} rollouts"] for n in fixed])
    v0 = "estimated by four samples" if samples else "not known"
    print(f"\n{len(rows)} solutions, {wrong.sum()} wrong; V(0) {v0}")
    print(
        "| rule | located | exact of these | F1 | tokens | tries "
        "| exact of these at equal tokens | exact of all likewise |"
    )
    print("|---|---:|---|---|---:|---:|---|---|")
    for name, point in points.items():
        draws = draws_of[name]
        low, high = np.percentile(draws, [2.5, 97.5], axis=0)
        line = f"| {name} | {point[0]:.1%} | {point[1]:.1%} ({low[1]:.1%} to {high[1]:.1%}) "
        f1 = "" if wrong.all() else f"{point[3]:.1%} ({low[3]:.1%} to {high[3]:.1%})"
        line += f"| {f1} | {point[4]:,.0f} | {point[5]:.1f} |"
        for column in (1, 2):  # exact of these, exact of all
            gains = [gain(curve_draws[:, i], draw, column) for i, draw in enumerate(draws)]
            low, high = 100 * np.percentile(gains, [2.5, 97.5])
            line += f" {100 * gain(curve, point, column):+.1f} ({low:+.1f} to {high:+.1f}) |"
        print(line, flush=True)


def main(args: Args):
    if bool(args.labels) == bool(args.samples):
        LOCATE.stop("give one of --labels and --samples")
    most = max(max(n, give_up) for _, n, give_up in args.rules)
    if most > args.rollouts:
        LOCATE.stop(f"--rollouts {args.rollouts}: a rule of --rules asks for {most}")
    rows = continuations(args)
    for samples in (False, True):
        table(args, rows, samples)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
