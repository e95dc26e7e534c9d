"""What share of located errors, or of pairs, comes from a handful of problems, and what a bound on
each problem leaves.

    python experiments/errors_by_problem.py runs/located.jsonl          # or runs/pairs.jsonl

Prints the share of the problems with the most, the effective number of problems (the square of the
sum of the counts over the sum of their squares: with equal counts it is the number itself), and
both for a bound of 1, 2, 3 ... a problem. For rows of 02's rollouts also how likely their failures
are by chance (the field `chance`)."""

import importlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
LOCATE = importlib.import_module("02_locate_step")


@dataclass
class Args:
    rows: tyro.conf.Positional[Path]
    """output of 02 or 03"""


def effective(counts: list[int]) -> float:
    return sum(counts) ** 2 / sum(count * count for count in counts)


def evidence(row: dict) -> str:
    """How likely by chance the failures are on which a located error rests."""
    if row["error_step"] == len(row["steps"]):
        return "last step"
    for limit in (0.05, 0.1, 0.2, 0.3):
        if row["chance"] < limit:
            return f"below {limit:g}"
    return "0.3 or more"


def main(args: Args):
    rows = LOCATE.read_rows(args.rows, ("id",))
    rows = [row for row in rows if row.get("error_step") or "chosen" in row]
    if not rows:
        LOCATE.stop(f"{args.rows}: no row has an error_step or is a pair")
    counts = sorted(Counter(row["id"] for row in rows).values(), reverse=True)
    print(
        f"{args.rows}: {len(rows)} of {len(counts)} problems, "
        f"effective number of problems {effective(counts):.1f}"
    )
    for first in (1, 3, 5, 10, 20):
        if first < len(counts):
            print(f"  {sum(counts[:first]) / len(rows):6.1%} from the {first} with the most")
    for bound in range(1, min(6, counts[0])):
        bounded = [min(bound, count) for count in counts]
        print(
            f"  at most {bound} a problem: {sum(bounded)}, "
            f"effective number of problems {effective(bounded):.1f}"
        )
    by_rollouts = [row for row in rows if row.get("chance") is not None and "steps" in row]
    if by_rollouts:
        evidence_counts = Counter(map(evidence, by_rollouts))
        listed = ", ".join(f"{name} {evidence_counts[name]}" for name in sorted(evidence_counts))
        print(f"  chance of the failures: {listed}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
