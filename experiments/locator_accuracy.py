"""How often 02_locate_step.py names the true first wrong step, on the bundled world, where
arithmetic tells it.

    python experiments/locator_accuracy.py runs/quickstart/located.jsonl

The truth: the first step whose result (the number after its last "=") is not the reference's
result of that step, or the first step too many. A solution that stops too early counts as missed:
no step of it is the wrong one. Prints the share of exact hits with its 95 % Wilson
interval, and a table by distance."""

import json
import math
import re
import sys
from collections import Counter


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


def main(path: str):
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    pairs = [(row["error_step"], true_error(row)) for row in rows]
    pairs = [(located, true) for located, true in pairs if located and true]
    distance = Counter(max(-3, min(3, located - true)) for located, true in pairs)
    total, z = len(pairs), 1.96
    if not total:
        sys.exit(f"{path}: no row with an error_step and a known truth")
    share = distance[0] / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low, high = ((middle + sign * half) / (1 + z * z / total) for sign in (-1, 1))
    print(f"{path}: {len(rows)} wrong samples, {total} located and with a known truth")
    print(f"exact {share:.1%} (95 % interval {low:.1%} to {high:.1%})")
    for d in range(-3, 4):
        direction = "early" if d < 0 else "late"
        name = f"{'3 or more' if abs(d) == 3 else abs(d)} {direction}" if d else "exact"
        print(f"  {name:16} {distance[d]:5} {distance[d] / total:6.1%}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
