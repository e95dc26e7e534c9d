"""The grader on every gold answer of real benchmarks: boxed, in a sentence, and changed. Rates, and the exceptions by id.

    python benchmarks/grading.py ../shared/data/*.jsonl          # eleven files; about a minute on two cores

A right verdict: the answer in a box and behind "The answer is" equals itself, and the answer with another first digit, another
option letter, or one more, does not.
"""

import asyncio
import importlib
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))


def main(paths: list[Path]):
    from test_answers import changed

    stage = importlib.import_module("05_eval")
    wrong = []
    print("| file | answers | boxed/s | sentence/s | changed/s | exceptions |\n|---|---:|---:|---:|---:|---|")
    for path in paths:
        rows, rates, found = stage.read_rows(path, ("id", "answer")), [], []
        for kind in ("boxed", "sentence", "changed"):
            grader, began = stage.Grader(), time.time()

            async def one(row: dict, kind=kind, grader=grader) -> bool:
                answer = row["answer"]
                text = {"boxed": f"So \\boxed{{{answer}}}.", "sentence": f"So it is. The answer is {answer}."}.get(kind)
                prediction = changed(answer) if kind == "changed" else stage.extract_answer(text)
                return await grader(answer, prediction)

            async def all_of_them(one=one, rows=rows) -> list[bool]:
                return await asyncio.gather(*map(one, rows))

            verdicts = asyncio.run(all_of_them())
            rates.append(f"{len(rows) / (time.time() - began):,.0f}")
            found += [f"{row['id']} {kind}" for row, good in zip(rows, verdicts, strict=True) if good == (kind == "changed")]
            grader.close()
        wrong += found
        print(f"| {path.stem} | {len(rows)} | {' | '.join(rates)} | {', '.join(found)} |", flush=True)
    print(f"{len(wrong)} exceptions")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or sys.exit(__doc__))
