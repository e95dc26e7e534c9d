"""How often a locator names the true first wrong step, with ProcessBench's measures (arXiv
2412.06559).

    python analysis/locator_scores.py runs/pb-judge/gsm8k.located.jsonl           # of processbench.py: against its labels
    python analysis/locator_scores.py located.jsonl --truth located.ann.jsonl     # against another file, such as a person's

Input, rows of 02_locate_step.py or annotate.py; without --truth they have a `label`, the 0-based
first wrong step, -1 for none:
    {"id": "q1", "sample": 0, "steps": ["...", "..."], "error_step": 2, "reason": null, "label": 1}

Prints accuracy on wrong and on right solutions with 95 % Wilson intervals, their harmonic mean F1,
the distances, and with
--truth agreement and Cohen's kappa.
"""

import importlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
LOCATE, EVAL = importlib.import_module("02_locate_step"), importlib.import_module("05_eval")


@dataclass
class Args:
    located: tyro.conf.Positional[Path]
    """output of 02_locate_step.py"""
    truth: Path | None = None
    """located file that counts as the truth, instead of the labels in the first"""


def print_scores(truths: list[int], found: list[int | None], name: str) -> dict:
    """Print ProcessBench's measures (accuracy on wrong and on right solutions, and their harmonic
    mean F1) with 95 % Wilson intervals, and how far the located steps are from the true ones. 0
    stands for no error, None for a row left open."""
    wrong = [(t, f) for t, f in zip(truths, found, strict=True) if t]
    right = [f for t, f in zip(truths, found, strict=True) if not t]
    lines, result = [f"{name}: {len(truths)} solutions, {len(wrong)} wrong, {len(right)} right"], {}
    exact = sum(t == f for t, f in wrong)
    of = [("wrong", exact, len(wrong)), ("right", right.count(0), len(right))]
    of += [("located", exact, sum(bool(f) for _, f in wrong))]
    for label, hits, total in of:
        if total:
            low, high = EVAL.wilson(hits, total)
            result[label] = hits / total
            lines.append(
                f"  exact on {label:10} {hits / total:6.1%} of {total:5}   (95 % interval {low:.1%} to {high:.1%})"
            )
    if "wrong" in result and "right" in result:
        both = result["wrong"] + result["right"]
        result["F1"] = 2 * result["wrong"] * result["right"] / both if both else 0.0
        lines.append(f"  F1 {result['F1']:.1%}")
    names = [
        "2 or more early",
        "1 early",
        "exact",
        "1 late",
        "2 or more late",
        "said to have no error",
        "left open",
    ]
    places = [
        names[max(-2, min(2, f - t)) + 2] if f else names[6 if f is None else 5] for t, f in wrong
    ]
    lines += [
        f"  {label:22} {places.count(label):5} {places.count(label) / len(wrong):6.1%}"
        for label in names
        if wrong
    ]
    print("\n".join(lines))
    return result


def kappa(a: list[int], b: list[int]) -> float:
    """Cohen's kappa of two lists of labels: agreement beyond what their shares of each label give
    by chance."""
    agree, shares = (
        sum(x == y for x, y in zip(a, b, strict=True)) / len(a),
        (Counter(a), Counter(b)),
    )
    chance = sum(shares[0][label] * shares[1][label] for label in shares[0]) / len(a) ** 2
    return 1.0 if chance == 1 else (agree - chance) / (1 - chance)


def compare(first: Path, second: Path):
    """Print how far two located files agree on the rows that both have."""
    files = [
        {LOCATE.identity(row): row for row in LOCATE.read_rows(path, ("id", "steps"))}
        for path in (first, second)
    ]
    common = [
        key
        for key in files[0]
        if key in files[1] and files[0][key]["steps"] == files[1][key]["steps"]
    ]
    sides = [[LOCATE.verdict(file[key]) for key in common] for file in files]
    both = [(a, b) for a, b in zip(*sides, strict=True) if None not in (a, b)]
    if not both:
        LOCATE.stop(f"{first} and {second} have no solution in common on which both say something")
    a, b = (list(side) for side in zip(*both, strict=True))
    agree = sum(x == y for x, y in both) / len(both)
    print(
        f"in common: {len(common)} solutions, on {len(both)} both say something; agreement {agree:.1%}, "
        f"Cohen's kappa {kappa(a, b):.3f}"
    )
    known = [(a, b) for a, b in zip(*sides, strict=True) if a is not None]
    print_scores(*map(list, zip(*known, strict=True)), f"{second} with {first} as the truth")


def main(args: Args):
    if args.truth:
        return compare(args.truth, args.located)
    rows = LOCATE.read_rows(args.located, ("id", "steps"))
    if "label" not in rows[0]:
        LOCATE.stop(
            f"{args.located}: no 'label'; give OUT/NAME.located.jsonl of processbench.py, or --truth"
        )
    print_scores(
        [row["label"] + 1 for row in rows], [LOCATE.verdict(row) for row in rows], str(args.located)
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
