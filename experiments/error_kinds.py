"""What goes wrong first in the rejected side of pairs from the bundled world, by method.

    python experiments/error_kinds.py runs/ablation/all-dpo.jsonl runs/ablation/all-scdpo.jsonl runs/ablation/all-step-dpo.jsonl

The first wrong step is the first whose result is not that of the same step of the right solution;
it is a forgotten borrow (what the bundled model has learned to do wrong), another miscalculation,
or a right calculation of the wrong thing."""

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "tiny")]
KINDS = (
    "forgotten borrow",
    "other miscalculation",
    "wrong numbers or step",
    "behind the last step",
)


def kind(pair: dict, split_steps, make) -> str:
    right = [re.findall(r"=\s*(-?\d+)", step) for step in split_steps(pair["full_chosen"])]
    wrong = split_steps(pair["initial_reason_steps"] + pair["rejected"])
    for number, step in enumerate(wrong):
        results = re.findall(r"=\s*(-?\d+)", step)
        if number < len(right) and results[-1:] == right[number][-1:]:
            continue
        if not (found := re.search(r"(\d+) ([-+*/]) (\d+) = (-?\d+)", step)):
            return KINDS[2]
        a, b, c = (int(found[i]) for i in (1, 3, 4))
        if found[2] == "/" and not b or make.EXACT[found[2]](a, b) == c:
            return KINDS[2]
        return KINDS[0] if found[2] == "-" and a > b and make.buggy(a, b) == c else KINDS[1]
    return KINDS[3]


def main(paths: list[str]):
    split_steps = importlib.import_module("01_sample_errors").split_steps
    make = importlib.import_module("make")
    print("| pairs of | pairs | " + " | ".join(KINDS) + " |\n|---|---:|" + "---:|" * len(KINDS))
    if missing := [path for path in paths if not Path(path).is_file()]:
        print(f"{missing[0]}: no such file; give pairs of 03_rectify.py", file=sys.stderr)
        raise SystemExit(2)
    for path in paths:
        rows = [
            json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line
        ]
        count = Counter(kind(row, split_steps, make) for row in rows)
        print(
            f"| {path} | {len(rows)} | "
            + " | ".join(f"{count[name] / len(rows):.1%}" for name in KINDS)
            + " |"
        )


if __name__ == "__main__":
    main(sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
