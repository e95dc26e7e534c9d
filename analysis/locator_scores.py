"""How often a locator names the true first wrong step, with ProcessBench's measures (arXiv
2412.06559).

    python analysis/locator_scores.py runs/pb-judge/gsm8k.located.jsonl     # of processbench.py
    python analysis/locator_scores.py located.jsonl --truth located.ann.jsonl

Input, rows of 02_locate_step.py or annotate.py. The truth is another such file (--truth), or the
rows have a `label`, the 0-based first wrong step, -1 for none:
    {"id": "q1", "sample": 0, "steps": ["...", "..."], "error_step": 2, "reason": null, "label": 1}

Prints accuracy on wrong and on right solutions with 95 % Wilson intervals, their harmonic mean F1,
the distances, and with --truth agreement and Cohen's kappa.
"""

import importlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from consensus import read_located, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
LOCATE, EVAL = importlib.import_module("02_locate_step"), importlib.import_module("05_eval")
PLACES = ("2 or more early", "1 early", "exact", "1 late", "2 or more late")
PLACES += ("said to have no error", "left open")


@dataclass
class Args:
    located: tyro.conf.Positional[Path]
    """output of 02_locate_step.py"""
    truth: Path | None = None
    """located file that counts as the truth, instead of the labels in the first"""


def place_of(true: int, step: int | None) -> str:
    """Where a verdict on a wrong solution lies compared with the true first wrong step."""
    if not step:
        return "left open" if step is None else "said to have no error"
    distance = step - true
    if distance == 0:
        return "exact"
    direction = "early" if distance < 0 else "late"
    return f"1 {direction}" if abs(distance) == 1 else f"2 or more {direction}"


def print_scores(truths: list[int], steps: list[int | None], name: str) -> dict:
    """Print ProcessBench's measures (accuracy on wrong and on right solutions, and their harmonic
    mean F1) with 95 % Wilson intervals, and how far the located steps are from the true ones. 0
    stands for no error, None for a row left open."""
    pairs = list(zip(truths, steps, strict=True))
    wrong = [(true, step) for true, step in pairs if true]
    right = [step for true, step in pairs if not true]
    print(f"{name}: {len(truths)} solutions, {len(wrong)} wrong, {len(right)} right")
    exact = sum(true == step for true, step in wrong)
    located = sum(bool(step) for _, step in wrong)
    counts = {
        "wrong": (exact, len(wrong)),
        "right": (right.count(0), len(right)),
        "located": (exact, located),
    }
    result = {}
    for label, (hits, total) in counts.items():
        if total:
            result[label] = hits / total
            low, high = EVAL.wilson(hits, total)
            print(
                f"  exact on {label:10} {hits / total:6.1%} of {total:5}   "
                f"(95 % interval {low:.1%} to {high:.1%})"
            )
    if "wrong" in result and "right" in result:
        both = result["wrong"] + result["right"]
        result["F1"] = 2 * result["wrong"] * result["right"] / both if both else 0.0
        print(f"  F1 {result['F1']:.1%}")
    if wrong:
        places = Counter(place_of(true, step) for true, step in wrong)
        for place in PLACES:
            print(f"  {place:22} {places[place]:5} {places[place] / len(wrong):6.1%}")
    return result


def kappa(a: list[int], b: list[int]) -> float:
    """Cohen's kappa of two lists of labels: agreement beyond what their shares of each label give
    by chance."""
    agreement = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    counts_a, counts_b = Counter(a), Counter(b)
    chance = sum(counts_a[label] * counts_b[label] for label in counts_a) / len(a) ** 2
    return 1.0 if chance == 1 else (agreement - chance) / (1 - chance)


def compare(truth: Path, located: Path):
    """Print how far two located files agree on the rows that both have."""
    truth_rows, located_rows = map(read_located, (truth, located))
    verdicts = [
        (verdict(row), verdict(located_rows[key]))
        for key, row in truth_rows.items()
        if key in located_rows and located_rows[key]["steps"] == row["steps"]
    ]
    both = [pair for pair in verdicts if None not in pair]
    if not both:
        LOCATE.stop(f"{truth} and {located} have no solution in common on which both say something")
    agreement = sum(a == b for a, b in both) / len(both)
    beyond_chance = kappa([a for a, _ in both], [b for _, b in both])
    print(
        f"in common: {len(verdicts)} solutions, on {len(both)} both say something; "
        f"agreement {agreement:.1%}, Cohen's kappa {beyond_chance:.3f}"
    )
    known = [pair for pair in verdicts if pair[0] is not None]
    truths, steps = (list(side) for side in zip(*known, strict=True))
    print_scores(truths, steps, f"{located} with {truth} as the truth")


def main(args: Args):
    if args.truth:
        return compare(args.truth, args.located)
    rows = LOCATE.read_rows(args.located, ("id", "steps"))
    if not all("label" in row and "error_step" in row for row in rows):
        LOCATE.stop(
            f"{args.located}: no 'label'; give OUT/NAME.located.jsonl of processbench.py, "
            "or --truth"
        )
    truths = [row["label"] + 1 for row in rows]
    print_scores(truths, [verdict(row) for row in rows], str(args.located))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
