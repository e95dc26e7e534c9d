"""Share of SCDPO's attempts that end wrong and parsable, and of garbled ones, by temperature
schedule.

    python experiments/scdpo_yield.py --samples runs/ablation/samples.jsonl --limit 800      # 5 minutes on two cores

Runs 03_rectify.py --method scdpo once for each schedule on the same right solutions and steps.
"""

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
    """use the first so many samples"""
    tries: int = 6
    """attempts from one step"""
    out: Path = Path("runs/scdpo_yield")
    """folder for the pairs"""


def main(args: Args):
    lines = [
        "| temperature | attempts | wrong and parsable | still right | garbled | steps with a pair | tokens a pair |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, heat in HEATS.items():
        out = args.out / f"{heat.replace(' ', '-')}.jsonl"
        command = [
            sys.executable,
            "03_rectify.py",
            "--method",
            "scdpo",
            "--samples",
            str(args.samples.resolve()),
        ]
        command += [
            "--model",
            args.model,
            "--heat",
            *heat.split(),
            "--tries",
            str(args.tries),
            "--max-tokens",
            "400",
        ]
        command += [
            "--engine-args=--max-num-seqs 512 --max-model-len 1024",
            "--out",
            str(out.resolve()),
        ]
        command += ["--limit", str(args.limit)] if args.limit else []
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(Path(f"{out}.meta.json").read_text())["summary"]

        def share(count, found=found):
            return f"{count / found['attempts']:.1%}"

        garbled = sum(value for kind, value in found.items() if kind.startswith("garbled: "))
        pairs = found.get("pairs", 0)
        lines.append(
            f"| {name} | {found['attempts']} | {share(pairs)} | {share(found.get('still right', 0))} "
            f"| {share(garbled)} | {pairs / found['steps tried']:.1%} "
            f"| {found['tokens'] / max(1, pairs):.0f} |"
        )
        print(lines[-1], file=sys.stderr)
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
