"""What share of located errors, or of pairs, comes from a handful of problems, and what a bound on
each problem leaves.

    python experiments/errors_by_problem.py runs/located.jsonl          # or runs/pairs.jsonl
    python experiments/errors_by_problem.py runs/located.jsonl --samples runs/samples.jsonl

Prints the share of the problems with the most, the effective number of problems (the square of the
sum of the counts over the sum of their squares: with equal counts it is the number itself), and
both for a bound of 1, 2, 3 ... a problem. With the samples of 01: how likely by chance the failures
behind each located error are (02's by_chance())."""

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
    samples: Path | None = None
    """output of 01 that they were made from"""


def effective(counts: list[int]) -> float:
    return sum(counts) ** 2 / sum(count * count for count in counts)


def evidence(row: dict, samples: dict) -> str:
    """How likely by chance the failures behind a located error are."""
    step, values = row["error_step"], {int(k): value for k, value in row["rollout_values"].items()}
    if step == len(row["steps"]):
        return "last step"
    seen = [value for k, value in values.items() if k < step] + [samples[row["id"]]]
    right, tried = map(sum, zip(*seen, strict=True))
    chance = LOCATE.by_chance(values[step][1], right, tried - right)
    return next(
        (f"below {limit:g}" for limit in (0.05, 0.1, 0.2, 0.3) if chance < limit), "above 0.3"
    )


def main(args: Args):
    rows = [
        row
        for row in LOCATE.read_rows(args.rows, ("id",))
        if row.get("error_step") or "chosen" in row
    ]
    counts = sorted(Counter(row["id"] for row in rows).values(), reverse=True)
    print(
        f"{args.rows}: {len(rows)} of {len(counts)} problems, in effect of {effective(counts):.1f}"
    )
    for first in (1, 3, 5, 10, 20):
        if first < len(counts):
            print(f"  {sum(counts[:first]) / len(rows):6.1%} from the {first} with the most")
    for bound in range(1, min(6, counts[0])):
        left = [min(bound, count) for count in counts]
        print(
            f"  at most {bound} a problem: {sum(left)}, in effect of {effective(left):.1f} problems"
        )
    if args.samples:
        samples = LOCATE.load_samples(LOCATE.Args(samples=args.samples))[1]
        found = Counter(evidence(row, samples) for row in rows)
        print(
            "  chance of the failures: "
            + ", ".join(f"{name} {found[name]}" for name in sorted(found))
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
