"""ProcessBench (arXiv 2412.06559) with any locator of 02_locate_step.py: the table of its paper, with intervals and cost.

    python analysis/processbench.py --out runs/pb-prm -- --locator prm --prm Qwen/Qwen2.5-Math-PRM-7B
    python analysis/processbench.py --data-dir FOLDER --out runs/pb-judge -- --locator judge --judge-model gpt-4o \\
        --judge-base-url https://host/v1 --price 2.5 10

Behind -- stand the options of 02. Input: gsm8k, math, olympiadbench and omnimath, as .json or .jsonl in --data-dir, or from
Qwen/ProcessBench on the hub, a line a solution:
    {"id": "gsm8k-0", "problem": "...", "steps": ["...", "..."], "final_answer_correct": false, "label": 1}

Prints, for each file and in the mean, the accuracy on wrong solutions (the first wrong step is named), on right ones (no error
is found), their harmonic mean F1 with a 95 % interval, tokens, money and seconds a solution; OUT/table.md holds it. For
a process reward model the threshold is chosen on gsm8k, as in the paper, too. The same command goes on after a stop.
"""

import importlib
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
LOCATE = importlib.import_module("02_locate_step")
FILES = ("gsm8k", "math", "olympiadbench", "omnimath")


@dataclass
class Args:
    out: Path = Path("runs/processbench")
    """folder to write"""
    data_dir: Path | None = None
    """folder with the files; else they come from the hub"""
    files: tuple[str, ...] = FILES
    """which of them"""
    limit: int | None = None
    """so many solutions of each file, drawn at random with seed 0"""


def load(args: Args, name: str) -> list[dict]:
    if args.data_dir:
        found = [path for path in (args.data_dir / f"{name}.jsonl", args.data_dir / f"{name}.json") if path.exists()]
        if not found:
            LOCATE.stop(f"{args.data_dir} has no {name}.json and no {name}.jsonl; see Qwen/ProcessBench on the hub")
        if found[0].suffix == ".jsonl":
            rows = LOCATE.read_rows(found[0], ("problem", "steps"))
        else:
            rows = json.loads(found[0].read_text(encoding="utf-8"))  # the hub's files are one list each
    else:
        import datasets

        try:
            rows = list(datasets.load_dataset("Qwen/ProcessBench", split=name))
        except Exception as error:  # no network, no such split ...
            LOCATE.stop(f"Qwen/ProcessBench, {name}: the hub does not give it ({str(error).splitlines()[0]}); give --data-dir")
    return random.Random(0).sample(rows, args.limit) if args.limit and args.limit < len(rows) else rows


def locate(args: Args, name: str, options: list[str]) -> tuple[list[dict], dict]:
    """02's rows for one file, and its summary. A file that is finished is not located again."""
    labels, out = args.out / f"{name}.jsonl", args.out / f"{name}.located.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in load(args, name))
    if labels.exists() and labels.read_text(encoding="utf-8") != text:
        LOCATE.stop(f"{labels} holds other solutions; give another --out")
    labels.write_text(text, encoding="utf-8")
    meta, given = Path(f"{out}.meta.json"), ["--labels", str(labels), "--out", str(out), *options]
    made = json.loads(meta.read_text()) if meta.exists() else {}
    if not made.get("finished") or made["arguments"] != given:
        done = subprocess.run([sys.executable, str(ROOT / "02_locate_step.py"), *given])
        if done.returncode:
            sys.exit(done.returncode)
        made = json.loads(meta.read_text())
    return LOCATE.read_rows(out, ("steps",)), made["summary"]


def scores(rows: list[dict], said=LOCATE.verdict) -> dict:
    """Accuracy on wrong and on right solutions, F1, and its interval from 10,000 draws of both."""
    truth, found = [row["label"] + 1 for row in rows], [said(row) for row in rows]
    sides = [[t == f for t, f in zip(truth, found, strict=True) if bool(t) == wrong] for wrong in (True, False)]
    shares, rng = [np.mean(side) if side else np.nan for side in sides], np.random.default_rng(0)
    f1 = lambda a, b: 2 * a * b / np.maximum(a + b, 1e-12)
    draws = [rng.binomial(max(1, len(side)), share, 10_000) / max(1, len(side)) if side else np.full(10_000, np.nan)
             for side, share in zip(sides, shares, strict=True)]  # fmt: skip
    return {"solutions": len(rows), "wrong": shares[0], "right": shares[1], "f1": f1(*shares), "draws": f1(*draws)}


def best_threshold(rows: list[dict]) -> float:
    """The threshold with the best F1 on these rows."""
    below = lambda at: lambda row: next((k for k, score in enumerate(row["prm"]["scores"], 1) if score < at), 0)
    return max((at / 100 for at in range(1, 100)), key=lambda at: scores(rows, below(at))["f1"])


def lines_of(found: dict[str, dict], cost: dict[str, list[float]], name: str) -> list[str]:
    """Rows of the table, the mean of the files last."""
    draws = np.mean([entry["draws"] for entry in found.values()], axis=0)
    mean = {key: np.mean([entry[key] for entry in found.values()]) for key in ("wrong", "right", "f1")}
    found = found | {"mean": mean | {"draws": draws, "solutions": sum(entry["solutions"] for entry in found.values())}}
    lines = []
    for file, entry in found.items():
        low, high = np.percentile(entry["draws"], [2.5, 97.5])
        f1 = f"{entry['f1']:.1%} ({low:.1%} to {high:.1%})"
        spent = cost.get(file) or [sum(part) for part in zip(*cost.values(), strict=True)]
        tokens, money, seconds = (part / entry["solutions"] for part in spent)
        lines.append(f"| {name} | {file} | {entry['solutions']} | {entry['wrong']:.1%} | {entry['right']:.1%} "
                     f"| {f1} | {tokens:,.0f} | {money:.5f} | {seconds:.2f} |")  # fmt: skip
    return lines


def main(args: Args, options: list[str]):
    found, cost, rows = {}, {}, {}
    for file in args.files:
        rows[file], summary = locate(args, file, options)
        found[file] = scores(rows[file])
        number = lambda end, summary=summary: sum(n for what, n in summary.items() if what.endswith(end))
        cost[file] = [number(" tokens"), number("judge money"), summary["seconds"]]
    name = rows[args.files[0]][0]["locator"]
    lines = ["| locator | file | solutions | wrong, step named | right, no error found | F1 (95 % interval) | tokens "
             "| money | seconds |", "|---|---|---:|---:|---:|---:|---:|---:|---:|", *lines_of(found, cost, name)]  # fmt: skip
    if all(row.get("prm") for part in rows.values() for row in part):
        at = best_threshold(rows[args.files[0]])
        below = lambda row: next((k for k, score in enumerate(row["prm"]["scores"], 1) if score < at), 0)
        lines += lines_of({file: scores(part, below) for file, part in rows.items()}, cost,
                          f"{name}, threshold {at:g} by {args.files[0]}")  # fmt: skip
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, description=__doc__, args=sys.argv[1:cut]), sys.argv[cut + 1 :])
