"""How often 02_locate_step.py names the true first wrong step, on the bundled world, where
arithmetic tells it.

    python experiments/locator_accuracy.py runs/quickstart/located.jsonl

The truth: the first step whose result (the number after its last "=") is not the reference's
result of that step, or the first step too many. A solution that stops too early counts as missed:
no step of it is the wrong one. Prints the share of exact hits with its 95 % Wilson interval, and a
table by distance, over the solutions with a located step."""

import importlib
import re
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
LOCATE = importlib.import_module("02_locate_step")
print_scores = importlib.import_module("locator_scores").print_scores


def true_error(row: dict) -> int | None:
    """1-based number of the first wrong step; None where every result is right (then the error is
    in the last line)."""
    for number, step in enumerate(row["steps"], 1):
        results = re.findall(r"=\s*(-?\d+)", step)
        if number > len(row["values"]) or not results:
            return number
        if int(results[-1]) != row["values"][number - 1]:
            return number
    return len(row["steps"]) + 1 if len(row["steps"]) < len(row["values"]) else None


def main(path: tyro.conf.Positional[Path]):
    rows = LOCATE.read_rows(path, ("id", "steps", "values"))
    steps = [(true_error(row), row.get("error_step")) for row in rows]
    known = [(true, step) for true, step in steps if true and step]
    if not known:
        LOCATE.stop(f"{path}: no row with an error_step and a known truth; give 02's output")
    truths, located = zip(*known, strict=True)
    print_scores(truths, located, f"{path}: {len(rows)} wrong samples; of the located ones")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
