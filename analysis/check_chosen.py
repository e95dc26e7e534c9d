"""Drop pairs whose chosen steps a judge finds wrong (the Step-DPO paper's filter, which it did not
release).

    python analysis/check_chosen.py data/pairs.jsonl --judge-model Qwen/Qwen2.5-72B-Instruct
    python analysis/check_chosen.py data/pairs.jsonl --judge-model gpt-4o \\
        --judge-base-url https://host/v1 --out data/checked.jsonl

Input and output: pairs of 03_rectify.py. The judge reads the steps before the chosen one and the
chosen one, with 02's prompt. OUT.verdicts.jsonl keeps what it said; the same command run again
resumes where it stopped."""

import asyncio
import contextlib
import hashlib
import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from consensus import pass_on

sys.path.insert(0, str(Path(__file__).parents[1]))
SAMPLE = importlib.import_module("01_sample_errors")
LOCATE = importlib.import_module("02_locate_step")


@dataclass
class Args:
    pairs: tyro.conf.Positional[Path]
    """output of 03_rectify.py"""
    out: Path = Path("data/checked.jsonl")
    """file for the pairs that pass"""
    judge_model: str = ""
    """name of the judge on its server, or folder or hub id for vLLM in this process"""
    judge_base_url: str = ""
    """the judge's OpenAI-compatible server; its key is JUDGE_API_KEY"""
    engine_args: str = ""
    """vLLM's own options, where it runs in this process"""
    opening: str = SAMPLE.OPENING
    """how every response begins; give what 01 was given"""
    split: Literal["labels", "lines", "blank-lines", "blocks"] = "labels"
    """where a step ends; give what 01 was given"""
    base_url: tyro.conf.Suppress[str] = ""
    judge_temperature: float = 0.6
    """sampling temperature of the judge"""
    judge_max_tokens: int = 2048
    """longest judgement in tokens"""
    judge_timeout: float = 600.0
    """seconds of silence after which a judgement is asked for again"""
    neutral: Literal["error", "correct"] = "correct"
    """what a neutral chosen step counts as"""
    retries: int = 3
    """how often a judgement that cannot be read is asked for again"""
    seed: int = 0
    """every request gets its own seed from this and the pair"""
    concurrency: int = 0
    """judgements in flight; 0: 128 of a server, or as many as keep the engine busy"""


def pair_id(pair: dict) -> str:
    text = repr([pair["id"], pair["initial_reason_steps"], pair["chosen"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


async def check_all(
    args: Args, pairs: list[dict], verdicts: dict[str, int], checked, spent: Counter
):
    """Ask for what `verdicts` lacks: by pair_id() the first wrong step, 0 for none, -1 for no
    readable judgement."""
    by_id = {pair_id(pair): pair for pair in pairs}
    todo = [pair for identity, pair in by_id.items() if identity not in verdicts]
    if not todo:
        return

    async def work(pair: dict):
        identity = pair_id(pair)
        solution = pair["full_chosen"]
        if pair["method"] == "step-dpo":
            solution = pair["initial_reason_steps"] + pair["chosen"]
        row = {
            "id": pair["id"],
            "problem": pair["prompt"],
            "answer": pair["answer"],
            "sample": identity,
            "steps": SAMPLE.split_steps(solution, args.split, args.opening),
        }
        step, judgement, why = await LOCATE.judge_once(ask, row, 0, args, spent)
        step = -1 if step is None else step
        verdict = {"pair": identity, "id": pair["id"], "step": step, "text": judgement, "why": why}
        checked.write(verdict)
        verdicts[identity] = step

    async with LOCATE.judge(args) as (ask, places):
        await LOCATE.run_all(todo, work, places, "checking")


def main(args: Args):
    if not args.judge_model:
        LOCATE.stop("give --judge-model and, unless vLLM is to run it here, --judge-base-url")
    if args.out.resolve() == args.pairs.resolve():
        LOCATE.stop(f"{args.out} is --pairs, and would be written over; give another --out")
    fields = ("id", "prompt", "chosen", "full_chosen", "answer", "method")
    pairs = LOCATE.read_rows(args.pairs, fields)
    if not all("initial_reason_steps" in row for row in pairs):
        LOCATE.stop(f"{args.pairs}: a row has no 'initial_reason_steps'; give pairs of 03")
    names = ("judge_model", "judge_temperature", "judge_max_tokens", "neutral", "retries", "seed")
    form = {"split": args.split, "opening": args.opening}
    LOCATE.check_input(args.pairs, form, accept_edit=True)  # grades nothing
    settings = {"stage": "check_chosen", **{name: getattr(args, name) for name in names}, **form}
    settings |= {"prompt": LOCATE.JUDGE_PROMPT, "pair_id": "sha256"}
    settings["judge_model"] = LOCATE.model_id(args.judge_model)
    spent = Counter()
    verdicts_path = args.out.with_suffix(".verdicts.jsonl")
    with contextlib.closing(LOCATE.Output(verdicts_path, settings)) as checked:
        verdicts = {row["pair"]: row["step"] for row in checked.rows}
        asyncio.run(check_all(args, pairs, verdicts, checked, spent))
        write_passed(args, pairs, verdicts, checked, spent)


def write_passed(args: Args, pairs: list[dict], verdicts: dict[str, int], checked, spent: Counter):
    """Write the pairs whose every step is right, and say what became of the others."""
    passed = [pair for pair in pairs if verdicts[pair_id(pair)] == 0]
    LOCATE.save(args.out, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in passed))
    pass_on(args.pairs, args.out, "check_chosen")
    unread = sum(verdicts[pair_id(pair)] == -1 for pair in pairs)
    summary = {
        "pairs": len(passed),
        "judged wrong": len(pairs) - len(passed) - unread,
        "without a readable judgement": unread,
        **spent,
    }
    checked.save_meta(finished=True, summary=summary)
    print(f"{args.out}: " + ", ".join(f"{name} {value}" for name, value in summary.items()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
