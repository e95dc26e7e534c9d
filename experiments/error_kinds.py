"""What goes wrong first in the rejected side of pairs from the bundled world, by method.

    python experiments/error_kinds.py runs/ablation/all-{dpo,scdpo,step-dpo}.jsonl

The first wrong step is the first whose result is not that of the same step of the right solution;
it is a forgotten borrow (what the bundled model has learned to do wrong), another miscalculation,
or a right calculation of the wrong thing."""

import importlib
import re
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny")]
RECTIFY, make = importlib.import_module("03_rectify"), importlib.import_module("make")
KINDS = (
    "forgotten borrow",
    "other miscalculation",
    "wrong numbers or step",
    "after the last step",
)


def kind(pair: dict) -> str:
    right = [re.findall(r"=\s*(-?\d+)", step) for step in RECTIFY.split_steps(pair["full_chosen"])]
    wrong = RECTIFY.split_steps(pair.get("initial_reason_steps", "") + pair["rejected"])
    for number, step in enumerate(wrong):
        results = re.findall(r"=\s*(-?\d+)", step)
        if number < len(right) and results[-1:] == right[number][-1:]:
            continue
        equation = re.search(r"(\d+) ([-+*/]) (\d+) = (-?\d+)", step)
        if not equation:
            return KINDS[2]
        sign = equation[2]
        a, b, c = (int(equation[group]) for group in (1, 3, 4))
        if sign == "/" and b == 0 or make.EXACT[sign](a, b) == c:
            return KINDS[2]
        return KINDS[0] if sign == "-" and a > b and make.buggy(a, b) == c else KINDS[1]
    return KINDS[3]


def main(pairs: tyro.conf.Positional[tuple[Path, ...]]):
    print("| pairs of | pairs | " + " | ".join(KINDS) + " |\n|---|---:|" + "---:|" * len(KINDS))
    for path in pairs:
        kinds = [kind(row) for row in RECTIFY.read_rows(path, ("rejected", "full_chosen"))]
        shares = [f"{kinds.count(name) / len(kinds):.1%}" for name in KINDS]
        print(f"| {path} | {len(kinds)} | {' | '.join(shares)} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
