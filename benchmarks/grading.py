"""The grader compared with plain math-verify, on labelled finals and on the gold answers of
real benchmarks.

    # minutes on two cores
    python benchmarks/grading.py data/math_test.jsonl data/gsm8k_test.jsonl data/odyssey_math.jsonl

A file with `steps` and `final_answer_correct` (ProcessBench, with the gold as `answer`): the label
is the right verdict. Any other file of problems: the gold in a box and after "The answer is" is
right, and wrong with another first digit, another option letter, or one more. Plain math-verify
gets the same answers: verify(parse("\\boxed{gold}"), parse("\\boxed{answer}"))."""

import asyncio
import importlib
import logging
import re
import sys
import time
from collections import Counter
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def changed(answer: str) -> str:
    """Another answer: the first digit one more, the next option letter, or a word put before."""
    if re.fullmatch("[A-Z]", answer):
        return chr(ord(answer) + 1)
    digits = list(re.finditer(r"\d", answer))
    if digits:
        at = digits[0].start()
        return answer[:at] + str((int(answer[at]) + 1) % 10) + answer[at + 1 :]
    return f"not {answer}" if answer.replace(" ", "").isalpha() else answer + "+1"


def plain(gold: str, answer: str) -> bool:
    import math_verify

    # else it says at every call that its time limit is off
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [
        math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)
    ]
    return math_verify.verify(*parsed, timeout_seconds=None)


RULES = {"ours": None, "math-verify": (lambda *_: None, plain)}


def answers_of(rows: list[dict], stage) -> list[tuple[str, str, str | None, bool]]:
    """id, gold, answer and right verdict of each answer to a file's problems."""
    extract = stage.extract_answer
    answers = []
    for row in rows:
        key, gold = row["id"], str(row["answer"])
        if "final_answer_correct" in row:
            answer = extract("\n\n".join(row["steps"]))
            answers.append((key, gold, answer, row["final_answer_correct"]))
            continue
        boxed, sentence = f"So \\boxed{{{gold}}}.", f"So it is. The answer is {gold}."
        answers.append((f"{key} boxed", gold, extract(boxed), True))
        answers.append((f"{key} sentence", gold, extract(sentence), True))
        answers.append((f"{key} changed", gold, changed(gold), False))
    return answers


async def verdicts(answers: list[tuple], grader, rules) -> list[bool]:
    options = {"rules": rules} if rules else {}
    gradings = [grader(gold, answer, **options) for _, gold, answer, _ in answers]
    return await asyncio.gather(*gradings)


def main(files: tyro.conf.Positional[tuple[Path, ...]]):
    stage = importlib.import_module("05_eval")
    print("right / false credit / refused though right\n")
    rate_columns = " | ".join(f"{name}, answers/s" for name in RULES)
    print(f"| file | answers | ours | math-verify | {rate_columns} | exceptions of ours |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for path in files:
        answers = answers_of(stage.read_rows(path, ("id", "answer")), stage)
        labels = [label for *_, label in answers]
        cells, rates, wrong = [], [], []
        for name, rules in RULES.items():
            grader, began = stage.Grader(), time.time()
            is_correct = asyncio.run(verdicts(answers, grader, rules))
            rates.append(f"{len(answers) / (time.time() - began):,.0f}")
            grader.close()
            table = Counter(zip(is_correct, labels, strict=True))
            right = table[True, True] + table[False, False]
            cells.append(f"{right} / {table[True, False]} / {table[False, True]}")
            if name == "ours":
                wrong = [
                    key
                    for (key, _, answer, label), verdict in zip(answers, is_correct, strict=True)
                    if verdict != label and answer is not None
                ]
        columns = [path.stem, str(len(answers)), *cells, *rates, ", ".join(wrong)]
        print(f"| {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
