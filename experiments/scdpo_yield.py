"""Share of SCDPO's attempts that end wrong and parsable, and of garbled ones, by temperature
schedule.

    python experiments/scdpo_yield.py --samples runs/ablation/samples.jsonl --limit 800

Runs 03_rectify.py --method scdpo once for each schedule on the same right solutions and steps; 5
minutes on two cores."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
HEATS = {
    "paper: 1.1, +0.05 a step, to 1.4": "1.1 0.05 1.4",
    "its code: 1.0, +0.05, to 1.3": "1.0 0.05 1.3",
    "its code: 1.1, +0.1, to 1.4": "1.1 0.1 1.4",
    "1.4 from the start": "1.4 0 1.4",
    "2 from the start": "2 0 2",
    "0.8 throughout": "0.8 0 0.8",
}


@dataclass
class Args:
    samples: Path
    """output of 01_sample_errors.py"""
    model: str = "data/tiny/model"
    """folder or hub id"""
    limit: int | None = None
    """use the first so many problems"""
    tries: int = 6
    """attempts from one step"""
    out: Path = Path("runs/scdpo_yield")
    """folder for the pairs"""


def main(args: Args):
    head = "temperature | attempts | wrong and parsable | still right | garbled "
    head += "| steps with a pair | tokens a pair"
    lines = [f"| {head} |", "|---|---:|---:|---:|---:|---:|---:|"]
    for name, heat in HEATS.items():
        out = args.out / f"{heat.replace(' ', '-')}.jsonl"
        command = [sys.executable, "03_rectify.py", "--method", "scdpo", "--model", args.model]
        command += ["--samples", str(args.samples.resolve()), "--out", str(out.resolve())]
        command += ["--heat", *heat.split(), "--tries", str(args.tries), "--max-tokens", "400"]
        command += ["--engine-args=--max-num-seqs 512 --max-model-len 1024"]
        command += ["--limit", str(args.limit)] if args.limit else []
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            sys.exit(2)
        counts = json.loads(Path(f"{out}.meta.json").read_text())["summary"]
        attempts, pairs = counts["attempts"], counts.get("pairs", 0)
        garbled = sum(value for kind, value in counts.items() if kind.startswith("garbled: "))
        kinds = (pairs, counts.get("still right", 0), garbled)
        shares = " | ".join(f"{number / attempts:.1%}" for number in kinds)
        steps, tokens = pairs / counts["steps tried"], counts["tokens"] / max(1, pairs)
        lines.append(f"| {name} | {attempts} | {shares} | {steps:.1%} | {tokens:.0f} |")
        print(lines[-1], file=sys.stderr)
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
