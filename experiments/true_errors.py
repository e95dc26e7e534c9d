"""Label an evaluation's responses on the bundled world with their first wrong step, which
arithmetic tells.

    python experiments/true_errors.py results/test/data-tiny-model.jsonl runs/labelled.jsonl

Output: the rows with `steps` and `error_step` (null for a right response), as credit.py and
processbench.py read them."""

import importlib
import json
import sys
from pathlib import Path

from locator_accuracy import true_error

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(path: str, out: str):
    split_steps = importlib.import_module("01_sample_errors").split_steps
    kept = []
    rows = Path(path).read_text().split("\n")
    for row in (json.loads(line) for line in rows if line):
        row["steps"] = split_steps(row["response"])
        step = true_error(row)
        if row["correct"] == (step is None) and (step or 0) <= len(
            row["steps"]
        ):  # else: an odd response, no clear label
            kept.append(row | {"error_step": step})
    Path(out).write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8"
    )
    wrong = sum(row["error_step"] is not None for row in kept)
    print(
        f"{out}: {wrong} wrong and {len(kept) - wrong} right responses labelled, {len(rows) - 1 - len(kept)} left out"
    )


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
