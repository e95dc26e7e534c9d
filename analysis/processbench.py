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


def locate(args: Args, name: str, options: list[str]) -> tuple[list[dict], float]:
    """02's rows for one file, and its seconds over all runs."""
    labels, out = args.out / f"{name}.jsonl", args.out / f"{name}.located.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in load(args, name))
    if labels.exists() and labels.read_text(encoding="utf-8") != text:
        LOCATE.stop(f"{labels} holds other solutions; give another --out")
    labels.write_text(text, encoding="utf-8")
    given = ["--labels", str(labels), "--out", str(out), *options]
    done = subprocess.run([sys.executable, str(ROOT / "02_locate_step.py"), *given])
    if done.returncode:
        sys.exit(done.returncode)
    if "--estimate" in options:
        return [], 0.0
    return LOCATE.read_rows(out, ("steps",)), json.loads(Path(f"{out}.meta.json").read_text())["seconds"]


def cost_of(rows: list[dict], seconds: float, options: list[str]) -> list[float]:
    """Tokens, money and seconds of all runs that made the rows."""
    judged = [row["judge"]["tokens"] for row in rows if row.get("judge")]
    tokens = sum(map(sum, judged)) + sum(row["prm"]["tokens"] for row in rows if row.get("prm"))
    at = options.index("--price") if "--price" in options else None
    price = list(map(float, options[at + 1 : at + 3])) if at is not None else [0.0, 0.0]
    return [tokens, sum(p * price[0] + c * price[1] for p, c in judged) / 1e6, seconds]


def scores(rows: list[dict], said=LOCATE.verdict, seed: int = 0) -> dict:
    """Accuracy on wrong and on right solutions, F1, and its interval from 10,000 draws of both."""
    truth, found = [row["label"] + 1 for row in rows], [said(row) for row in rows]
    sides = [[t == f for t, f in zip(truth, found, strict=True) if bool(t) == wrong] for wrong in (True, False)]
    shares, rng = [np.mean(side) if side else np.nan for side in sides], np.random.default_rng(seed)
    f1 = lambda a, b: 2 * a * b / np.maximum(a + b, 1e-12)
    draws = [rng.binomial(max(1, len(side)), share, 10_000) / max(1, len(side)) if side else np.full(10_000, np.nan)
             for side, share in zip(sides, shares, strict=True)]  # fmt: skip
    return {"solutions": len(rows), "wrong": shares[0], "right": shares[1], "f1": f1(*shares), "draws": f1(*draws)}


def below(at: float):
    """The verdict of a process reward model with another threshold; None for a row that it has not scored."""
    return lambda row: next((k for k, s in enumerate(row["prm"]["scores"], 1) if s < at), 0) if row.get("prm") else None


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
    rows, cost = {}, {}
    for file in args.files:
        rows[file], seconds = locate(args, file, options)
        cost[file] = cost_of(rows[file], seconds, options)
    if "--estimate" in options:
        return
    name, all_of = rows[args.files[0]][0]["locator"], lambda said: {
        file: scores(part, said, seed) for seed, (file, part) in enumerate(rows.items())
    }
    lines = ["| locator | file | solutions | wrong, step named | right, no error found | F1 (95 % interval) | tokens "
             "| money | seconds |", "|---|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    lines += lines_of(all_of(LOCATE.verdict), cost, name)
    if name == "prm":
        at = max((at / 100 for at in range(1, 100)), key=lambda at: scores(rows[args.files[0]], below(at))["f1"])
        lines += lines_of(all_of(below(at)), cost, f"{name}, threshold {at:g} by {args.files[0]}")
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, description=__doc__, args=sys.argv[1:cut]), sys.argv[cut + 1 :])
