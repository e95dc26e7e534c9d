"""Keep the first wrong steps on which two locators agree: two located files -> one.

    python analysis/consensus.py data/by_rollouts.jsonl data/by_scores.jsonl --within 1

Input: two files that 02_locate_step.py or annotate.py wrote of the same samples. A row is
identified by `id` and `sample`:
    {"id": "q1", "sample": 0, "steps": ["...", "..."], "error_step": 2, "locator": "rollout",
     "reason": null, ...}

Output, data/agreed.jsonl: the rows of the first file, with the second one's evidence (`judge`,
`rollout_values` ...) and
    {"error_step": 2, "locator": "consensus", "reason": null, "said": [2, 3]}

A row keeps the first one's step where the second one's is at most --within steps off. Else
error_step is null and the reason says why: both found no error, the two disagree, or the second
file lacks the row. `said`: 0 for no error, null for a row left open. The last line counts the rows.
"""

import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
LOCATE = importlib.import_module("02_locate_step")


@dataclass
class Args:
    first: tyro.conf.Positional[Path]
    """located file whose steps are kept"""
    second: tyro.conf.Positional[Path]
    """located file that must agree"""
    within: int = 1
    """how many steps apart the two may be"""
    out: Path = Path("data/agreed.jsonl")
    """file to write, and to write over; not one of 02"""


def read_located(path: Path) -> dict[tuple, dict]:
    """The rows of a located file by id and sample."""
    rows = LOCATE.read_rows(path, ("id", "sample", "steps"))
    for number, row in enumerate(rows, 1):
        step = row.get("error_step", "")
        if step is not None and not (type(step) is int and 1 <= step <= len(row["steps"])):
            LOCATE.stop(
                f"{path}, row {number}: no 'error_step', the number of a step or null; "
                "give a file of 02 or annotate.py"
            )
    return {LOCATE.identity(row): row for row in rows}


def verdict(row: dict) -> int | None:
    """The first wrong step of a located row, 0 for no error, None for a row left open."""
    says_right = str(row.get("reason")).startswith(LOCATE.NO_ERROR)
    return row["error_step"] or (0 if says_right else None)


def combine(first: dict, second: dict | None, within: int) -> dict:
    """The row of the first file, with what both say."""
    said = [verdict(first), verdict(second) if second else None]
    step, reason = None, "the two disagree" if second else "not in the second file"
    if said == [0, 0]:
        reason = f"{LOCATE.NO_ERROR} by both"
    elif all(said) and abs(said[0] - said[1]) <= within:
        step, reason = said[0], None
    # the evidence is that of the step which is kept, or of the same step in the second file
    evidence = first.get("chance")
    if evidence is None and second and second["error_step"] == step:
        evidence = second.get("chance")
    return {
        **(second or {}),
        **first,
        "chance": evidence,
        "error_step": step,
        "locator": "consensus",
        "reason": reason,
        "said": said,
    }


def pass_on(path: Path, out: Path, stage: str):
    """Write OUT.meta.json with the input's prompt, opening, kind of steps and code: the next stage
    compares them with its own, unless a rectifier made the pairs."""
    made, names = LOCATE.made_with(path), (*LOCATE.FORMAT, "code", "rectifier")
    settings = {"stage": stage} | {name: made[name] for name in names if name in made}
    LOCATE.save(Path(f"{out}.meta.json"), json.dumps({"settings": settings}, indent=1) + "\n")


def main(args: Args):
    if args.within < 0:
        LOCATE.stop("--within is at least 0")
    if args.out.resolve() in (args.first.resolve(), args.second.resolve()):
        LOCATE.stop(f"{args.out} is one of the two files; give another --out")
    has_meta = Path(f"{args.out}.meta.json").exists()
    if has_meta and LOCATE.made_with(args.out).get("stage") != "consensus":
        LOCATE.stop(f"{args.out} is another script's output; give another --out")
    first, second = read_located(args.first), read_located(args.second)
    for key, row in first.items():
        if second.get(key, row)["steps"] != row["steps"]:
            LOCATE.stop(
                f"{args.second} holds another sample {key[1]} of {key[0]} than {args.first}; "
                "locate the same samples"
            )
    rows = [combine(row, second.get(key), args.within) for key, row in first.items()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    LOCATE.save(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pass_on(args.first, args.out, "consensus")
    located = sum(row["error_step"] is not None for row in rows)
    reasons = Counter(row["reason"] for row in rows if row["error_step"] is None)
    summary = {"rows": len(rows), "located": located, **reasons}
    print(f"{args.out}: " + ", ".join(f"{name} {number}" for name, number in summary.items()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
