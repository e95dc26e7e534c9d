"""The grader beside plain math-verify, on labelled finals and on the gold answers of real
benchmarks.

    python benchmarks/grading.py ../shared/data/processbench/*.jsonl ../shared/data/*.jsonl     # minutes on two cores

A file with `steps` and `final_answer_correct` (ProcessBench, with the gold as `answer`): the label
is the right verdict. Any other file of problems: the gold in a box and behind "The answer is" is
right, and wrong with another first digit, another option letter, or one more. Plain math-verify
gets the same answers: verify(parse("\\boxed{gold}"), parse("\\boxed{answer}"))."""

import asyncio
import importlib
import logging
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))


def plain(gold: str, answer: str) -> bool:
    import math_verify

    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # else it says at every call that its time limit is off
    parsed = [
        math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)
    ]
    return math_verify.verify(*parsed, timeout_seconds=None)


RULES = {"ours": None, "math-verify": (lambda *_: None, plain)}


def answers_of(rows: list[dict], stage) -> list[tuple[str, str, str | None, bool]]:
    """id, gold, answer and right verdict of each answer to a file's problems."""
    from test_answers import changed

    found = []
    for row in rows:
        gold, extract = str(row["answer"]), stage.extract_answer
        if "final_answer_correct" in row:
            found.append(
                (row["id"], gold, extract("\n\n".join(row["steps"])), row["final_answer_correct"])
            )
            continue
        found.append((f"{row['id']} boxed", gold, extract(f"So \\boxed{{{gold}}}."), True))
        found.append(
            (f"{row['id']} sentence", gold, extract(f"So it is. The answer is {gold}."), True)
        )
        found.append((f"{row['id']} changed", gold, changed(gold), False))
    return found


async def verdicts(answers: list[tuple], grader, rules) -> list[bool]:
    more = {"rules": rules} if rules else {}
    return await asyncio.gather(*(grader(gold, answer, **more) for _, gold, answer, _ in answers))


def main(paths: list[Path]):
    stage = importlib.import_module("05_eval")
    print("right / false credit / refused though right\n")
    print(
        "| file | answers | ours | math-verify | ours, answers/s | math-verify, answers/s | exceptions of ours |"
    )
    print("|---|---:|---:|---:|---:|---:|---|")
    for path in paths:
        answers, cells, rates, wrong = (
            answers_of(stage.read_rows(path, ("id", "answer")), stage),
            [],
            [],
            [],
        )
        for name, rules in RULES.items():
            grader, began = stage.Grader(), time.time()
            found = asyncio.run(verdicts(answers, grader, rules))
            rates.append(f"{len(answers) / (time.time() - began):,.0f}")
            grader.close()
            count = Counter(
                (verdict, right) for verdict, (*_, right) in zip(found, answers, strict=True)
            )
            cells.append(
                f"{count[True, True] + count[False, False]} / {count[True, False]} / {count[False, True]}"
            )
            if name == "ours":
                graded = zip(answers, found, strict=True)
                wrong = [
                    identity
                    for (identity, _, answer, right), said in graded
                    if said != right and answer is not None
                ]
        print(
            f"| {path.stem} | {len(answers)} | {' | '.join(cells + rates)} | {', '.join(wrong)} |",
            flush=True,
        )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sys.exit(__doc__))
