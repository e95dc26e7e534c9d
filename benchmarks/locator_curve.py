"""How exact the rollout locator is by number of rollouts and by rule, and what it costs, on the bundled world.

    python -m vllm.entrypoints.openai.api_server --model data/tiny/model --port 8123 --max-num-seqs 512 --max-model-len 1024
    python benchmarks/locator_curve.py --samples runs/quickstart/samples.jsonl --base-url http://127.0.0.1:8123/v1

Runs 02_locate_step.py over the first --limit wrong samples, alone (no right samples beside them, so that V(0) is estimated
too), by bisection and linearly, for each number of rollouts; then once more linearly with all rollouts made, to compare the
rules that read V as a whole. The truth is arithmetic's (locator_accuracy.py). Output: two tables and OUT.png.
Rules on V(0) .. V(n):  hard: the first k with V(k) = 0.  last: the one behind the last k with V(k) > 0.  drop: the largest
fall V(k-1) - V(k).  half: the first k with V(k) < V(k-1) / 2.  change: the likeliest change point, where V is beta(1/2, 1/2)
before the error and 1/100 from it on.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from math import lgamma, log
from pathlib import Path

import tyro
from locator_accuracy import true_error

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    samples: Path = Path("runs/quickstart/samples.jsonl")
    """output of 01 on a problem file of data/tiny"""
    base_url: str = "http://127.0.0.1:8123/v1"
    """a server with the model that made the samples; its key is read from OPENAI_API_KEY"""
    model: str = "data/tiny/model"
    """its name there"""
    limit: int = 400
    """wrong samples"""
    rollouts: tuple[int, ...] = (1, 2, 4, 8, 16)
    """numbers of rollouts"""
    out: Path = Path("runs/locator_curve")
    """folder to write; OUT.png beside it"""


def locate(args: Args, name: str, *more) -> tuple[list[dict], int]:
    """Rows that 02 writes, and the tokens that it spent."""
    path = args.out / f"{name}.jsonl"
    command = [sys.executable, ROOT / "02_locate_step.py", "--samples", args.out / "wrong.jsonl", "--base-url", args.base_url,
               "--model", args.model, "--max-tokens", "400", "--out", path, *more]  # fmt: skip
    if not (Path(f"{path}.meta.json").exists() and json.loads(Path(f"{path}.meta.json").read_text())["finished"]):
        subprocess.run(list(map(str, command)), check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    return rows, json.loads(Path(f"{path}.meta.json").read_text())["summary"]["rollout completion tokens"]


def rate(pairs: list[tuple[int | None, int | None]]) -> tuple[int, int]:
    """(exact, located) of (found, true)."""
    located = [(found, true) for found, true in pairs if found and true]
    return sum(found == true for found, true in located), len(located)


def change_point(right: list[int], n: int) -> int:
    """The e in 1..len(right)-1 with the largest likelihood; right[k] of n continuations behind step k are right."""
    before = [lgamma(r + 0.5) + lgamma(n - r + 0.5) - lgamma(n + 1) - 2 * lgamma(0.5) for r in right]
    after = [r * log(0.01) + (n - r) * log(0.99) for r in right]
    return max(range(1, len(right)), key=lambda e: sum(before[:e]) + sum(after[e:]))


RULES = {
    "hard": lambda v, n: v.index(0),
    "last": lambda v, n: max(k for k in range(len(v)) if v[k]) + 1,
    "drop": lambda v, n: max(range(1, len(v)), key=lambda k: v[k - 1] - v[k]),
    "half": lambda v, n: next(k for k in range(1, len(v)) if v[k] < v[k - 1] / 2),
    "change": change_point,
}


def main(args: Args):
    wilson = __import__("02_locate_step").wilson
    args.out.mkdir(parents=True, exist_ok=True)
    wrong = [row for line in open(args.samples, encoding="utf-8") if not (row := json.loads(line))["correct"]][: args.limit]
    (args.out / "wrong.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wrong), encoding="utf-8")
    show = lambda hits, total: f"{hits / total:6.1%} ({wilson(hits, total)[0]:.1%} to {wilson(hits, total)[1]:.1%})"
    table, kinds = {}, {"bisection": [], "linear": ["--linear"]}
    print("rollouts  search     located  exact of these             tokens  of linear's, 5 steps or more: exact and tokens")
    for n in args.rollouts:
        for kind, more in kinds.items():
            rows, tokens = locate(args, f"{kind}-{n}", "--rollouts", n, "--keep-rollouts", args.out / f"{kind}-{n}.kept", *more)
            table[kind, n] = (*rate([(row["error_step"], true_error(row)) for row in rows]), tokens)
        long = {(row["id"], row["sample"]) for row in rows if len(row["steps"]) >= 5}
        spent, hits = {}, {}
        for kind in kinds:
            kept = [json.loads(line) for line in open(args.out / f"{kind}-{n}.kept", encoding="utf-8")]
            spent[kind] = sum(len(c["text"]) for row in kept if (row["id"], row["sample"]) in long
                              for found in row["rollouts"].values() for c in found)  # fmt: skip
            rows = [json.loads(line) for line in open(args.out / f"{kind}-{n}.jsonl", encoding="utf-8")]
            hits[kind] = rate([(row["error_step"], true_error(row)) for row in rows if (row["id"], row["sample"]) in long])
        for kind in kinds:
            good, located, tokens = table[kind, n]
            print(f"{n:8}  {kind:9} {located:8}  {show(good, located)} {tokens:8}  {tokens / table['linear', n][2]:6.0%} "
                  f"{show(*hits[kind])} {spent[kind] / spent['linear']:6.0%}", flush=True)  # fmt: skip

    most = max(args.rollouts)
    kept = args.out / "whole.kept"
    rows, _ = locate(args, "whole", "--rollouts", most, "--linear", "--no-early-stop", "--keep-rollouts", kept)
    truth = {(row["id"], row["sample"]): (true_error(row), len(row["steps"])) for row in rows}
    curves = {}
    for line in open(kept, encoding="utf-8"):
        row = json.loads(line)
        curves[row["id"], row["sample"]] = {int(k): [c["correct"] for c in found] for k, found in row["rollouts"].items()}
    print("\nrollouts  rule      located  exact of these")
    for n in args.rollouts:
        for name, rule in RULES.items():
            pairs = []
            for key, (true, steps) in truth.items():
                values = [sum(curves[key].get(k, [])[:n]) for k in range(steps)] + [0]
                pairs.append((rule(values, n) if values[0] else None, true))
            good, located = rate(pairs)
            print(f"{n:8}  {name:8} {located:8}  {show(good, located)}", flush=True)
    draw(table, Path(f"{args.out}.png"), wilson)


def draw(table: dict, path: Path, wilson):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    for kind, colour in (("bisection", "tab:blue"), ("linear", "tab:orange")):
        points = [(n, *values) for (k, n), values in table.items() if k == kind]
        shares, tokens = [good / located for _, good, located, _ in points], [spent / 1000 for *_, spent in points]
        ends = [wilson(good, located) for _, good, located, _ in points]
        errors = [[s - low for s, (low, _) in zip(shares, ends, strict=True)],
                  [high - s for s, (_, high) in zip(shares, ends, strict=True)]]  # fmt: skip
        axis.errorbar(tokens, shares, errors, marker="o", capsize=3, color=colour, label=kind)
        for (n, *_), x, y in zip(points, tokens, shares, strict=True):
            axis.annotate(str(n), (x, y), textcoords="offset points", xytext=(5, -12), fontsize=8)
    axis.set(xlabel="thousand tokens (beside the points: rollouts)", xscale="log",
             title="share of located errors that are exact, 95 % intervals")  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
