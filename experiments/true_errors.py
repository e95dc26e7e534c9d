"""Label an evaluation's responses on the bundled world with their first wrong step, which
arithmetic tells.

    python experiments/true_errors.py results/test/data-tiny-model.jsonl runs/labelled.jsonl

Output: the rows with `steps` and `error_step` (null for a right response), as credit.py and
processbench.py read them."""

import importlib
import json
import sys
from pathlib import Path

import tyro
from locator_accuracy import true_error

sys.path.insert(0, str(Path(__file__).parents[1]))
SAMPLE = importlib.import_module("01_sample_errors")


def main(path: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]):
    rows = SAMPLE.read_rows(path, ("id", "correct", "values"))
    labelled = []
    for row in rows:
        row["steps"] = SAMPLE.split_steps(row.get("response", ""))
        row["error_step"] = step = true_error(row)
        # else an odd response without a clear label
        if row["correct"] == (step is None) and (step or 0) <= len(row["steps"]):
            labelled.append(row)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled)
    out.write_text(text, encoding="utf-8")
    wrong = sum(row["error_step"] is not None for row in labelled)
    right, left_out = len(labelled) - wrong, len(rows) - len(labelled)
    print(f"{out}: {wrong} wrong and {right} right responses labelled, {left_out} left out")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
