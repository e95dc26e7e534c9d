"""ProcessBench (arXiv 2412.06559): the table of its paper, with intervals and cost, for a critic, a
process reward model, or any locator of 02_locate_step.py.

    python analysis/processbench.py --out runs/pb-critic --model gpt-4o \\
        --base-url https://host/v1 --price 2.5 10
    python analysis/processbench.py --out runs/pb-prm --prm Qwen/Qwen2.5-Math-PRM-7B
    python analysis/processbench.py --out runs/pb-judge -- --locator judge --judge-model gpt-4o \\
        --judge-base-url https://host/v1
    python analysis/processbench.py --data-dir data --files located.ann --out runs/mine \\
        -- --locator judge ...

Input: gsm8k, math, olympiadbench and omnimath, as .json or .jsonl in --data-dir, or from
Qwen/ProcessBench on the hub, a line a solution. Or files of your own, with `label` as here, or with
the `error_step` that annotate.py or true_errors.py gave them:
    {"id": "gsm8k-0", "problem": "...", "steps": ["...", "..."], "final_answer_correct": false,
     "label": 1}

--model is asked as in the paper: a critic reads problem and paragraphs and gives the index of the
first wrong one, or -1, in a box; greedily, or with --votes k at temperature 1 and top-p 0.9, where
the most frequent index counts, of several the first given. No solution is left out, and none is
asked about again: an answer without an index is wrong. A vLLM server for it is started with
--generation-config vllm, else the model's own top-k and repetition penalty are used. After -- come
options of 02, whose judge has another prompt (Step-DPO's: a verdict a step, by the reference): its
figures are not the paper's.

Prints, for each file and in the mean, the accuracy on wrong solutions (the first wrong step is
named), on right ones (no error is found), their harmonic mean F1 with a 95 % interval, tokens,
money and seconds a solution; OUT/table.md holds it, OUT/NAME.samples.jsonl the rows that 02 was
given, and OUT/NAME.located.jsonl its own, for locator_scores.py. For a process reward model the
threshold is chosen on gsm8k, as in the paper, too. The same command run again resumes."""

import asyncio
import contextlib
import hashlib
import importlib
import json
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from consensus import verdict

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LOCATE = importlib.import_module("02_locate_step")
FILES = ("gsm8k", "math", "olympiadbench", "omnimath")
CRITIC_PROMPT = """Below are a math problem and a solution that somebody wrote. The solution is \
cut into paragraphs; each stands between tags with its index, and the first index is 0.

## Problem
{problem}

## Solution
{paragraphs}

## Your task
Review the solution paragraph by paragraph, and say of each one whether it is right, and why. When \
you find a mistake, stop: the index of that paragraph is the answer. If no paragraph has a \
mistake, the answer is -1.

End your review with the final answer (the index) in \\boxed{{}}."""
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
    """its server (key: JUDGE_API_KEY), or one that pools --prm (key: PRM_API_KEY)"""
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
    """The solutions of one file, or --limit of them."""
    if args.data_dir:
        lines, whole = (args.data_dir / f"{name}.{ending}" for ending in ("jsonl", "json"))
        if lines.exists():
            rows = LOCATE.read_rows(lines, ("problem", "steps"))
        elif whole.exists():  # the hub's files are one list each
            try:
                rows = json.loads(whole.read_text(encoding="utf-8"))
            except ValueError as error:
                LOCATE.stop(f"{whole}: not JSON ({error}); fetch it again")
        else:
            LOCATE.stop(
                f"{args.data_dir} has no {name}.json and no {name}.jsonl; "
                "see Qwen/ProcessBench on the hub"
            )
    else:
        import datasets

        try:
            rows = list(datasets.load_dataset("Qwen/ProcessBench", split=name))
        except Exception as error:  # no network, no such split ...
            why = str(error).splitlines()[0]
            LOCATE.stop(
                f"Qwen/ProcessBench, {name}: the hub does not give it ({why}); give --data-dir"
            )
    if args.limit and args.limit < len(rows):
        rows = random.Random(0).sample(rows, args.limit)
    return rows


def label_of(row: dict) -> int | None:
    """The 0-based first wrong step, -1 for none; None where the row does not say it."""
    if "label" in row:
        label = row["label"]
    elif "error_step" in row:
        step = row["error_step"] or 0
        label = step - 1 if type(step) is int else None
    else:
        return None
    return label if type(label) is int and -1 <= label < len(row["steps"]) else None


def is_unsure(row: dict) -> bool:
    """Whether an annotator gave no step, and not because there is no error."""
    reason = str(row.get("reason", LOCATE.NO_ERROR))
    return "label" not in row and not row["error_step"] and not reason.startswith(LOCATE.NO_ERROR)


def sample_rows(path: Path) -> list[dict]:
    """Labelled solutions as the samples that 02 reads, with `label`: the 0-based first wrong step,
    -1 for none."""
    samples, seen = [], Counter()
    for number, row in enumerate(LOCATE.read_rows(path, ("problem", "steps")), 1):
        label, steps = label_of(row), row["steps"]
        if label is None:
            LOCATE.stop(
                f"{path}, row {number}: no 'label' from -1 to {len(steps) - 1} "
                "and no 'error_step'; see --help"
            )
        if is_unsure(row):
            continue
        if "".join(steps) != row.get("response"):
            # paragraphs, as in ProcessBench: written as --split blank-lines cuts them
            steps = [re.sub(r"\n\s*\n", "\n", step.strip() or "(blank)") + "\n\n" for step in steps]
        name = row.get("id", row["problem"])
        seen[name] += 1
        sample = {
            "id": name,
            "sample": seen[name] - 1,  # a file may have several solutions of a problem
            "finish_reason": "stop",
            "correct": row.get("final_answer_correct", label < 0),
            **row,
            "label": label,
            "steps": steps,
            "response": "".join(steps),
        }
        if "answer" in row:
            sample["answer"] = LOCATE.text_of(row["answer"])
        samples.append(sample)
    return samples or LOCATE.stop(f"{path}: no row has a label")


def split_of(rows: list[dict]) -> str:
    """02's --split for these rows."""
    for split in ("labels", "lines", "blocks"):
        if all(LOCATE.split_steps("".join(row["steps"]), split) == row["steps"] for row in rows):
            return split
    return "blank-lines"


def index_of(text: str) -> int | None:
    """The paragraph that an answer names in its last box, -1 for none; None where no number stands
    there."""
    boxes = BOX.findall(text)
    return int(boxes[-1]) if boxes and re.fullmatch(r"\s*-?\d{1,9}\s*", boxes[-1]) else None


def count_votes(texts: list[str], n_steps: int) -> dict:
    """What the answers say of so many paragraphs, as a locator's word."""
    indices = [index_of(text) for text in texts]
    votes = Counter(index for index in indices if index is not None)
    step, reason = None, None
    if not votes:
        reason = "no answer has an index"
    else:
        [(index, _)] = votes.most_common(1)  # of several the first given
        if index == -1:
            reason = f"{LOCATE.NO_ERROR} by the critic"
        elif 0 <= index < n_steps:
            step = index + 1
        else:
            reason = f"index {index} of {n_steps} paragraphs"
    return {"error_step": step, "locator": "critic", "reason": reason}


def critic_prompt(row: dict) -> str:
    paragraphs = "\n\n".join(
        f"<paragraph_{k}>\n{step}\n</paragraph_{k}>" for k, step in enumerate(row["steps"])
    )
    return CRITIC_PROMPT.format(problem=row["problem"], paragraphs=paragraphs)


def critic_key(row: dict) -> tuple:
    return row["id"], row.get("sample"), *row["steps"]


async def criticize(args: Args, rows: list[dict], output) -> None:
    """Ask the critic about the rows that are not there yet."""
    client = LOCATE.Chat(LOCATE.connect(args.base_url, args.model, "JUDGE_API_KEY"))
    sampling = {"temperature": 0.0} if args.votes == 1 else {"temperature": 1.0, "top_p": 0.9}
    sampling["max_tokens"] = args.max_tokens

    async def ask(row: dict, number: int) -> dict:
        messages = [{"role": "user", "content": critic_prompt(row)}]
        seed = LOCATE.seed_of(0, "critic", row["id"], number)
        [answer] = await LOCATE.complete(client, args.model, messages, seed, **sampling)
        return answer

    async def work(row: dict):
        answers = await asyncio.gather(*(ask(row, number) for number in range(args.votes)))
        texts = [answer["text"] for answer in answers]
        tokens = [sum(answer[kind] for answer in answers) for kind in ("prompt_tokens", "tokens")]
        critic = {"texts": texts, "tokens": tokens}
        output.write({**row, **count_votes(texts, len(row["steps"])), "critic": critic})

    done, todo = Counter(map(critic_key, output.rows)), []
    for row in rows:  # two may be equal
        done[critic_key(row)] -= 1
        if done[critic_key(row)] < 0:
            todo.append(row)
    await LOCATE.run_all(todo, work, args.concurrency, "by the critic")


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
    rows = LOCATE.read_rows(labels, ("id", "problem", "steps"))
    rows = [row | {"label": label_of(row)} for row in rows if not is_unsure(row)]
    with contextlib.closing(LOCATE.Output(out, settings)) as output:
        asyncio.run(criticize(args, rows, output))
        output.save_meta(finished=True)


def run_script(name: str, *options):
    """Run it; subprocess ends it when this script is."""
    try:
        done = subprocess.run([sys.executable, str(ROOT / name), *map(str, options)])
    except KeyboardInterrupt:
        sys.exit(130)
    if done.returncode:
        sys.exit(done.returncode)


def as_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def locate(args: Args, name: str, options: list[str]) -> tuple[list[dict], float]:
    """The rows of one file with a locator's word, and its seconds over all runs."""
    labels, located = args.out / f"{name}.jsonl", args.out / f"{name}.located.jsonl"
    made = [located]
    args.out.mkdir(parents=True, exist_ok=True)
    text = as_lines(load(args, name))
    old = labels.read_text(encoding="utf-8") if labels.exists() else None
    if located.exists() and old != text:
        LOCATE.stop(
            f"{located} exists, but {labels} is missing or holds other rows; give another --out"
        )
    labels.write_text(text, encoding="utf-8")
    if args.model:
        by_critic(args, labels, located)
    else:
        samples, rows = args.out / f"{name}.samples.jsonl", sample_rows(labels)
        LOCATE.save(samples, as_lines(rows))
        if args.prm:
            scored = samples.with_suffix(".scored.jsonl")
            prm = ["--prm", args.prm, "--form", args.form, "--out", scored]
            server = ["--base-url", args.base_url] if args.base_url else []
            run_script("analysis/score_steps.py", samples, *prm, *server)
            made.append(scored)
            samples, options = scored, ["--locator", "scores"]
        files = ["--samples", samples, "--out", located]
        form = ["--include-correct", "--split", split_of(rows)]
        run_script("02_locate_step.py", *files, *form, *options)
    seconds = sum(json.loads(Path(f"{path}.meta.json").read_text())["seconds"] for path in made)
    return LOCATE.read_rows(located, ("steps",)), seconds


def cost_of(args: Args, rows: list[dict], seconds: float) -> list[float]:
    """Tokens, money and seconds of all runs that made the rows; not of those that made the labelled
    file, whose fields 02 carries along."""
    locators = {row["locator"] for row in rows}
    names = locators & {"judge", "critic"}
    asked = [row[name]["tokens"] for row in rows for name in names if row.get(name)]
    prompt, completion = sum(tokens[0] for tokens in asked), sum(tokens[1] for tokens in asked)
    money = (prompt * args.price[0] + completion * args.price[1]) / 1e6
    others = 0
    if "scores" in locators:
        others = sum(row.get("prm_tokens", 0) for row in rows)
    elif "rollout" in locators:
        others = sum(sum(row["rollout_tokens"]) for row in rows)
    return [prompt + completion + others, money, seconds]


def f1(a, b):
    return 2 * a * b / np.maximum(a + b, 1e-12)


def scores(rows: list[dict], said=verdict, seed: int = 0) -> dict:
    """Accuracy on wrong and on right solutions, F1, and its interval from 10,000 draws of both
    shares, by Jeffreys' prior: a share of 0 or 1 is not certain."""
    rng, shares, draws = np.random.default_rng(seed), [], []
    for is_wrong in (True, False):
        side = [row for row in rows if (row["label"] >= 0) == is_wrong]
        hits = [said(row) == row["label"] + 1 for row in side]
        share = np.mean(hits) if side else np.nan
        shares.append(share)
        n = sum(hits)
        draws.append(rng.beta(n + 0.5, len(side) - n + 0.5, 10_000) if side else np.nan)
    return {
        "solutions": len(rows),
        "wrong": shares[0],
        "right": shares[1],
        "f1": f1(*shares),
        "draws": f1(*draws) * np.ones(10_000),
    }


def below(threshold: float):
    """The verdict of a process reward model with another threshold; None for a row that it has not
    scored."""

    def said(row: dict) -> int | None:
        if not row["step_scores"]:
            return None
        return LOCATE.by_scores(row, threshold)["error_step"] or 0

    return said


def lines_of(files: dict[str, dict], cost: dict[str, list[float]], name: str) -> list[str]:
    """Rows of the table, the mean of the files last."""
    entries = list(files.values())
    mean = {
        key: np.mean([entry[key] for entry in entries], axis=0)
        for key in ("wrong", "right", "f1", "draws")
    }
    mean["solutions"] = sum(entry["solutions"] for entry in entries)
    total_cost = [sum(part) for part in zip(*cost.values(), strict=True)]
    lines = []
    for file, entry in {**files, "mean": mean}.items():
        low, high = np.percentile(entry["draws"], [2.5, 97.5])
        spent = cost.get(file, total_cost)
        tokens, money, seconds = (part / entry["solutions"] for part in spent)
        lines.append(
            f"| {name} | {file} | {entry['solutions']} | {entry['wrong']:.1%} "
            f"| {entry['right']:.1%} | {entry['f1']:.1%} ({low:.1%} to {high:.1%}) "
            f"| {tokens:,.0f} | {money:.5f} | {seconds:.2f} |"
        )
    return lines


def main(args: Args, options: list[str]):
    if bool(args.model) + bool(args.prm) + bool(options) != 1 or args.model and not args.base_url:
        LOCATE.stop(
            "give one of --model with --base-url, --prm, or -- and options of 02; see --help"
        )
    if min(args.votes, args.max_tokens, args.concurrency) < 1:
        LOCATE.stop("--votes, --max-tokens and --concurrency are at least 1")
    if not args.files or (args.limit is not None and args.limit < 1):
        LOCATE.stop("--files needs a name, and --limit is at least 1")
    if args.data_dir and args.out.resolve() == args.data_dir.resolve():
        LOCATE.stop(f"--out {args.out} is --data-dir: its files would be replaced; give another")
    rows, cost = {}, {}
    for file in args.files:
        rows[file], seconds = locate(args, file, options)
        cost[file] = cost_of(args, rows[file], seconds)
    first = rows[args.files[0]]
    name = first[0]["locator"]

    def scores_by(said) -> dict[str, dict]:
        return {file: scores(part, said, seed) for seed, (file, part) in enumerate(rows.items())}

    lines = [
        "| locator | file | solutions | wrong, step named | right, no error found "
        "| F1 (95 % interval) | tokens | money | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *lines_of(scores_by(verdict), cost, name),
    ]
    if name == "scores" and not np.isnan(scores(first)["f1"]):
        candidates = [percent / 100 for percent in range(1, 100)]
        best = max(candidates, key=lambda threshold: scores(first, below(threshold))["f1"])
        title = f"{name}, threshold {best:g} by {args.files[0]}"
        lines += lines_of(scores_by(below(best)), cost, title)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with what run_script() runs
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, description=__doc__, args=sys.argv[1:cut]), sys.argv[cut + 1 :])
