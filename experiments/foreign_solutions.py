"""The bundled world's own solutions in other words, for a rectifier that is not the policy.

    python experiments/foreign_solutions.py data/tiny/train.jsonl runs/foreign.jsonl

"Step 2: Lena now has 13 - 6 = 7 shells." becomes "Step 2: Since 13 - 6 is 7, that makes 7 shells."
The steps before a random one keep their words (seed 0), so that a model taught with these continues
from the policy's own steps."""

import importlib
import json
import random
import re
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
SAMPLE = importlib.import_module("01_sample_errors")


def main(path: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]):
    rows = SAMPLE.read_rows(path, ("id", "solution"))
    r = random.Random(0)
    for row in rows:
        steps = re.split(r"(?=Step \d+:)", row["solution"])  # the opening, then the steps
        for k in range(r.randrange(1, len(steps)), len(steps)):
            steps[k], changed = re.subn(
                r"(Step \d+:) .*?(\d+ [-+*/] \d+) = (\d+) (\w+)\.",
                r"\1 Since \2 is \3, that makes \3 \4.",
                steps[k],
            )
            if not changed:
                SAMPLE.stop(f"{path}: {row['id']} has a step that is not the bundled world's")
        row["solution"] = "".join(steps)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} solutions in other words, such as {rows[0]['solution']!r}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
