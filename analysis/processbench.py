"""ProcessBench (arXiv 2412.06559): the table of its paper, with intervals and cost, for a critic, a
process reward model, or any locator of 02_locate_step.py.

    python analysis/processbench.py --out runs/pb-critic --model gpt-4o --base-url https://host/v1 --price 2.5 10
    python analysis/processbench.py --out runs/pb-prm --prm Qwen/Qwen2.5-Math-PRM-7B
    python analysis/processbench.py --out runs/pb-judge -- --locator judge --judge-model gpt-4o --judge-base-url https://host/v1
    python analysis/processbench.py --data-dir data --files located.ann --out runs/mine -- --locator judge ...

Input: gsm8k, math, olympiadbench and omnimath, as .json or .jsonl in --data-dir, or from
Qwen/ProcessBench on the hub, a line a solution. Or files of your own, with `label` as here, or with
the `error_step` that annotate.py or true_errors.py gave them:
    {"id": "gsm8k-0", "problem": "...", "steps": ["...", "..."], "final_answer_correct": false, "label": 1}

--model is asked as in the paper: a critic reads problem and paragraphs and gives the index of the first wrong one, or -1, in a
box; greedily, or with --votes k at temperature 1 and top-p 0.9, where the commonest index counts,
of several the first given. No solution is left out, and none is asked about again: an answer
without an index is wrong. A vLLM server for it is started with --generation-config vllm, else the
model's own top-k and repetition penalty come in. Behind -- stand options of 02, whose judge has
another prompt (Step-DPO's: a verdict a step, by the reference): its figures are not the paper's.

Prints, for each file and in the mean, the accuracy on wrong solutions (the first wrong step is
named), on right ones (no error is found), their harmonic mean F1 with a 95 % interval, tokens,
money and seconds a solution; OUT/table.md holds it, OUT/NAME.samples.jsonl the rows that 02 was
given, and OUT/NAME.located.jsonl its own, for locator_scores.py. For a process reward model the
threshold is chosen on gsm8k, as in the paper, too. The same command run again resumes."""

import asyncio
import hashlib
import importlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LOCATE = importlib.import_module("02_locate_step")
FILES = ("gsm8k", "math", "olympiadbench", "omnimath")
CRITIC_PROMPT = """Below are a math problem and a solution that somebody wrote. The solution is cut into paragraphs; each \
stands between tags with its index, and the first index is 0.

## Problem
{problem}

## Solution
{paragraphs}

## Your task
Examine the paragraphs in their order and write what you think of each. If you find a mistake, stop there: your answer is the \
index of the first paragraph that has one. If no paragraph has a mistake, your answer is -1.

Write your answer, the index alone, in \\boxed{{}} at the end."""
BOX = re.compile(r"\\boxed\{([^}]*)\}")


@dataclass
class Args:
    out: Path = Path("runs/processbench")
    """folder to write"""
    data_dir: Path | None = None
    """folder with the files; else they come from the hub"""
    files: tuple[str, ...] = FILES
    """which of them"""
    limit: int | None = None
    """so many solutions of each file, drawn at random with seed 0"""
    model: str = ""
    """the critic's name on its server"""
    base_url: str = ""
    """its OpenAI-compatible server (key: JUDGE_API_KEY), or one that pools --prm (key:
    PRM_API_KEY)"""
    votes: int = 1
    """answers of the critic for each solution; 1 is greedy, the paper's other number is 8"""
    max_tokens: int = 8192
    """longest answer of the critic; the paper gives reasoning models 32768"""
    concurrency: int = 32
    """solutions that the critic reads at a time"""
    price: tuple[float, float] = (0.0, 0.0)
    """money for a million prompt and completion tokens of the critic, or of 02's judge"""
    prm: str = ""
    """instead of a critic a process reward model, by score_steps.py"""
    form: Literal["math-shepherd", "rlhflow"] = "math-shepherd"
    """of --prm, see score_steps.py"""


def load(args: Args, name: str) -> list[dict]:
    if args.data_dir:
        found = [
            path
            for path in (args.data_dir / f"{name}.jsonl", args.data_dir / f"{name}.json")
            if path.exists()
        ]
        if not found:
            LOCATE.stop(
                f"{args.data_dir} has no {name}.json and no {name}.jsonl; see Qwen/ProcessBench on the hub"
            )
        if found[0].suffix == ".jsonl":
            rows = LOCATE.read_rows(found[0], ("problem", "steps"))
        else:
            rows = json.loads(
                found[0].read_text(encoding="utf-8")
            )  # the hub's files are one list each
    else:
        import datasets

        try:
            rows = list(datasets.load_dataset("Qwen/ProcessBench", split=name))
        except Exception as error:  # no network, no such split ...
            LOCATE.stop(
                f"Qwen/ProcessBench, {name}: the hub does not give it ({str(error).splitlines()[0]}); give --data-dir"
            )
    return (
        random.Random(0).sample(rows, args.limit) if args.limit and args.limit < len(rows) else rows
    )


def sample_rows(path: Path) -> list[dict]:
    """Labelled solutions as the samples that 02 reads, with `label`: the 0-based first wrong step,
    -1 for none."""
    found = []
    for number, row in enumerate(LOCATE.read_rows(path, ("problem", "steps")), 1):
        label = row.get("label", (row.get("error_step") or 0) - 1)
        if (
            not {"label", "error_step"} & set(row)
            or type(label) is not int
            or not -1 <= label < len(row["steps"])
        ):
            LOCATE.stop(
                f"{path}, row {number}: no 'label' from -1 to {len(row['steps']) - 1} and no 'error_step'; see --help"
            )
        if (
            "label" not in row
            and label < 0
            and not str(row.get("reason", LOCATE.NO_ERROR)).startswith(LOCATE.NO_ERROR)
        ):
            continue  # the annotator was not sure
        steps = row["steps"]
        if "".join(steps) != row.get(
            "response"
        ):  # paragraphs, as in ProcessBench: written as --split blank-lines cuts them
            steps = [re.sub(r"\n\s*\n", "\n", step.strip()) + "\n\n" for step in steps]
        sample = {"id": row["problem"], "sample": 0, "finish_reason": "stop"}
        sample["correct"] = row.get("final_answer_correct", label < 0)
        sample |= row | {"label": label, "steps": steps, "response": "".join(steps)}
        if "answer" in row:
            sample["answer"] = LOCATE.text_of(row["answer"])
        found.append(sample)
    return found or LOCATE.stop(f"{path}: no row has a label")


def split_of(rows: list[dict]) -> str:
    """02's --split for these rows."""
    labels = all(LOCATE.split_steps("".join(row["steps"])) == row["steps"] for row in rows)
    return "labels" if labels else "blank-lines"


def index_of(text: str) -> int | None:
    """The paragraph that an answer names in its last box, -1 for none; None where no number stands
    there."""
    boxes = BOX.findall(text)
    return int(boxes[-1]) if boxes and re.fullmatch(r"\s*-?\d{1,9}\s*", boxes[-1]) else None


def count_votes(texts: list[str], count: int) -> dict:
    """What the answers say of `count` paragraphs, as a locator's word."""
    votes = [vote for text in texts if (vote := index_of(text)) is not None]
    found = {"error_step": None, "locator": "critic", "reason": "no answer has an index"}
    if votes:
        [(index, _)] = Counter(votes).most_common(1)  # of several the first given
        found["reason"] = (
            f"{LOCATE.NO_ERROR} by the critic"
            if index == -1
            else f"index {index} of {count} paragraphs"
        )
        if 0 <= index < count:
            found |= {"error_step": index + 1, "reason": None}
    return found


async def criticize(args: Args, rows: list[dict], output) -> None:
    """Ask the critic about the rows that are not there yet."""
    client, done = (
        LOCATE.connect(args.base_url, args.model, "JUDGE_API_KEY"),
        {row["id"] for row in output.rows},
    )
    sampling = {"temperature": 0.0} if args.votes == 1 else {"temperature": 1.0, "top_p": 0.9}

    async def work(row: dict):
        paragraphs = "\n\n".join(
            f"<paragraph_{k}>\n{step}\n</paragraph_{k}>" for k, step in enumerate(row["steps"])
        )
        prompt = [
            {
                "role": "user",
                "content": CRITIC_PROMPT.format(problem=row["problem"], paragraphs=paragraphs),
            }
        ]
        ask = lambda number: LOCATE.complete(
            client,
            args.model,
            prompt,
            LOCATE.seed_of(0, "critic", row["id"], number),
            max_tokens=args.max_tokens,
            **sampling,
        )
        answers = [answer for [answer] in await asyncio.gather(*map(ask, range(args.votes)))]
        texts, tokens = [answer["text"] for answer in answers], ("prompt_tokens", "tokens")
        critic = {
            "texts": texts,
            "tokens": [sum(answer[kind] for answer in answers) for kind in tokens],
        }
        output.write(row | count_votes(texts, len(row["steps"])) | {"critic": critic})

    await LOCATE.run_all(
        [row for row in rows if row["id"] not in done], work, args.concurrency, "by the critic"
    )


def by_critic(args: Args, labels: Path, out: Path):
    """OUT with the critic's word on the labelled solutions."""
    settings = {
        "stage": "analysis/processbench",
        "model": args.model,
        "votes": args.votes,
        "max_tokens": args.max_tokens,
        "prompt": hashlib.sha256(CRITIC_PROMPT.encode()).hexdigest()[:16],
    }
    sample_rows(labels)  # stops at a row without a label; the critic reads the steps as they are
    output = LOCATE.Output(out, settings)
    asyncio.run(
        criticize(args, LOCATE.read_rows(labels, ("id", "problem", "steps", "label")), output)
    )
    output.save_meta(finished=True)


def run_script(name: str, *options):
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, options)])
    if done.returncode:
        sys.exit(done.returncode)


def locate(args: Args, name: str, options: list[str]) -> tuple[list[dict], float]:
    """The rows of one file with a locator's word, and its seconds over all runs."""
    labels, made = args.out / f"{name}.jsonl", [args.out / f"{name}.located.jsonl"]
    args.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in load(args, name))
    if labels.exists() and labels.read_text(encoding="utf-8") != text:
        LOCATE.stop(f"{labels} holds other solutions; give another --out")
    labels.write_text(text, encoding="utf-8")
    if args.model:
        by_critic(args, labels, made[0])
    else:
        samples, rows = args.out / f"{name}.samples.jsonl", sample_rows(labels)
        LOCATE.save(samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        if args.prm:
            made.append(samples.with_suffix(".scored.jsonl"))
            server = ["--base-url", args.base_url] if args.base_url else []
            run_script(
                "analysis/score_steps.py",
                samples,
                "--prm",
                args.prm,
                "--form",
                args.form,
                "--out",
                made[1],
                *server,
            )
            samples, options = made[1], ["--locator", "scores"]
        given = [
            "--samples",
            samples,
            "--include-correct",
            "--split",
            split_of(rows),
            "--out",
            made[0],
        ]
        run_script("02_locate_step.py", *given, *options)
    seconds = sum(json.loads(Path(f"{path}.meta.json").read_text())["seconds"] for path in made)
    return LOCATE.read_rows(made[0], ("steps",)), seconds


def cost_of(args: Args, rows: list[dict], seconds: float) -> list[float]:
    """Tokens, money and seconds of all runs that made the rows."""
    asked = [row[name]["tokens"] for row in rows for name in ("judge", "critic") if row.get(name)]
    tokens = sum(map(sum, asked)) + sum(row.get("prm_tokens", 0) for row in rows)
    return [tokens, sum(p * args.price[0] + c * args.price[1] for p, c in asked) / 1e6, seconds]


def scores(rows: list[dict], said=LOCATE.verdict, seed: int = 0) -> dict:
    """Accuracy on wrong and on right solutions, F1, and its interval from 10,000 draws of both."""
    truth, found = [row["label"] + 1 for row in rows], [said(row) for row in rows]
    sides = [
        [t == f for t, f in zip(truth, found, strict=True) if bool(t) == wrong]
        for wrong in (True, False)
    ]
    shares, rng = [np.mean(side) if side else np.nan for side in sides], np.random.default_rng(seed)
    f1 = lambda a, b: 2 * a * b / np.maximum(a + b, 1e-12)
    draws = [
        rng.binomial(max(1, len(side)), share, 10_000) / max(1, len(side))
        if side
        else np.full(10_000, np.nan)
        for side, share in zip(sides, shares, strict=True)
    ]
    return {
        "solutions": len(rows),
        "wrong": shares[0],
        "right": shares[1],
        "f1": f1(*shares),
        "draws": f1(*draws),
    }


def below(at: float):
    """The verdict of a process reward model with another threshold; None for a row that it has not
    scored."""
    return lambda row: (
        next((k for k, s in enumerate(row["step_scores"], 1) if s < at), 0)
        if row["step_scores"]
        else None
    )


def lines_of(found: dict[str, dict], cost: dict[str, list[float]], name: str) -> list[str]:
    """Rows of the table, the mean of the files last."""
    draws = np.mean([entry["draws"] for entry in found.values()], axis=0)
    mean = {
        key: np.mean([entry[key] for entry in found.values()]) for key in ("wrong", "right", "f1")
    }
    found = found | {
        "mean": mean
        | {"draws": draws, "solutions": sum(entry["solutions"] for entry in found.values())}
    }
    lines = []
    for file, entry in found.items():
        low, high = np.percentile(entry["draws"], [2.5, 97.5])
        f1 = f"{entry['f1']:.1%} ({low:.1%} to {high:.1%})"
        spent = cost.get(file) or [sum(part) for part in zip(*cost.values(), strict=True)]
        tokens, money, seconds = (part / entry["solutions"] for part in spent)
        lines.append(
            f"| {name} | {file} | {entry['solutions']} | {entry['wrong']:.1%} | {entry['right']:.1%} "
            f"| {f1} | {tokens:,.0f} | {money:.5f} | {seconds:.2f} |"
        )
    return lines


def main(args: Args, options: list[str]):
    if bool(args.model) + bool(args.prm) + bool(options) != 1 or args.model and not args.base_url:
        LOCATE.stop(
            "give one of --model with --base-url, --prm, or -- and options of 02; see --help"
        )
    if min(args.votes, args.max_tokens, args.concurrency) < 1:
        LOCATE.stop("--votes, --max-tokens and --concurrency are at least 1")
    rows, cost = {}, {}
    for file in args.files:
        rows[file], seconds = locate(args, file, options)
        cost[file] = cost_of(args, rows[file], seconds)
    name, all_of = (
        rows[args.files[0]][0]["locator"],
        lambda said: {
            file: scores(part, said, seed) for seed, (file, part) in enumerate(rows.items())
        },
    )
    lines = [
        "| locator | file | solutions | wrong, step named | right, no error found | F1 (95 % interval) | tokens "
        "| money | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += lines_of(all_of(LOCATE.verdict), cost, name)
    if name == "scores":
        at = max(
            (at / 100 for at in range(1, 100)),
            key=lambda at: scores(rows[args.files[0]], below(at))["f1"],
        )
        lines += lines_of(all_of(below(at)), cost, f"{name}, threshold {at:g} by {args.files[0]}")
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, description=__doc__, args=sys.argv[1:cut]), sys.argv[cut + 1 :])
