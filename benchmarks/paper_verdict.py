"""How often analysis/regrade.py's `correct_paper` agrees with the Step-DPO authors' code, on
responses made from gold answers.

    git clone https://github.com/dvlab-research/Step-DPO; python -m venv theirs
    # another antlr than math-verify's
    theirs/bin/pip install sympy==1.12 antlr4-python3-runtime==4.11.0 regex numpy
    python benchmarks/paper_verdict.py --authors Step-DPO --python theirs/bin/python \\
        --data data/math_test.jsonl data/gsm8k_test.jsonl data/odyssey_math.jsonl

Of each file up to --limit problems, drawn with seed 0, in seven forms by turns: in a box, in a
sentence, another answer in a box, in a sentence, after "x =" without a box, within "x = ..." in a
box of a text that breaks off, after an earlier box and with a unit; then the reference solutions.
Prints the table of verdicts and the responses on which they differ."""

import asyncio
import importlib
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from grading import changed

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
regrade = importlib.import_module("regrade")

THEIRS = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
say, sys.stdout = sys.stdout, open(os.devnull, "w")
from evaluation.data_processing.answer_extraction import extract_math_answer
from evaluation.eval.eval_script import eval_math
def late(*_): raise TimeoutError
signal.signal(signal.SIGALRM, late)
for line in open(sys.argv[2]):
    case = json.loads(line)
    signal.alarm(5)
    try:
        answers = extract_math_answer(case["problem"], case["response"], task="cot")
        boxed = "\\\\boxed{" + case["gold"] + "}"  # as their files have it
        gold = extract_math_answer(case["problem"], boxed, task="cot")
        right = bool(answers) and bool(eval_math({"prediction": answers, "answer": gold}))
    except Exception:
        right = False
    signal.alarm(0)
    print(json.dumps(right), file=say)
"""


@dataclass
class Args:
    authors: Path
    """clone of the authors' repository"""
    data: tuple[Path, ...]
    """problems with solutions"""
    python: str = sys.executable
    """interpreter with what their code imports"""
    limit: int = 700
    """problems of each file"""
    show: int = 30
    """differences to print"""


def cases(args: Args) -> list[dict]:
    made, rng = [], random.Random(0)
    for path in args.data:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for number, row in enumerate(rng.sample(rows, min(len(rows), args.limit))):
            gold, other = str(row["answer"]), changed(str(row["answer"]))
            forms = [
                f"So \\boxed{{{gold}}}.",
                f"The answer is: {gold}.",
                f"\\boxed{{{other}}}",
                f"The answer is {other}",
                f"we get x = {gold}",
                f"Thus $\\boxed{{x={gold}}}$ and now",
                f"\\boxed{{3}}, then \\boxed{{{gold} \\text{{ cm}}}}",
            ]
            texts = [forms[number % 7]]
            if row.get("solution"):
                texts.append(row["solution"])
            made += [{"problem": row["problem"], "response": text, "gold": gold} for text in texts]
    return made


async def ours(rows: list[dict]) -> list[bool]:
    grader = regrade.EVAL.Grader(5.0)
    try:
        gradings = []
        for row in rows:
            answers = regrade.paper_answers(row["problem"], row["response"])
            gradings.append(grader(row["gold"], answers, rules=regrade.PAPER))
        return await asyncio.gather(*gradings)
    finally:
        grader.close()


def main(args: Args):
    rows = cases(args)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        command = [args.python, "-c", THEIRS, str(args.authors), file.name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(2)
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    here = asyncio.run(ours(rows))
    table = Counter(zip(theirs, here, strict=True))
    differ = [case for case in zip(rows, theirs, here, strict=True) if case[1] != case[2]]
    for row, a, b in differ[: args.show]:
        print(f"theirs {a}, here {b}: gold {row['gold']!r}, response {row['response'][-80:]!r}")
    agree = table[True, True] + table[False, False]
    print(
        f"{agree} of {len(rows)} alike ({agree / len(rows):.2%}): right in both "
        f"{table[True, True]}, wrong in both {table[False, False]}, right here only "
        f"{table[False, True]}, right there only {table[True, False]}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
