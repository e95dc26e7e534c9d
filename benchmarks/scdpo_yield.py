"""Share of SCDPO's attempts that end wrong and parsable, and of garbled ones, by temperature schedule.

    python benchmarks/scdpo_yield.py --samples runs/ablation/samples.jsonl --limit 800      # 5 minutes on two cores

Runs 03_rectify.py --method scdpo once for each schedule, beside one server, on the same right solutions and steps.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
HEATS = {"paper: 1.1, +0.05 a step, to 1.4": "1.1 0.05 1.4", "its code: 1.0, +0.05, to 1.3": "1.0 0.05 1.3",
         "its code: 1.1, +0.1, to 1.4": "1.1 0.1 1.4", "1.4 from the start": "1.4 0 1.4", "2 from the start": "2 0 2",
         "0.8 throughout": "0.8 0 0.8"}  # fmt: skip


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
    server = SimpleNamespace(base_url=None, chat_template=None, server_timeout=600.0,
                             server_args="--max-num-seqs 512 --max-model-len 1024")  # fmt: skip
    lines = ["| temperature | attempts | wrong and parsable | still right | garbled | steps with a pair | tokens a pair |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    with import_module("03_rectify").served(server, args.model, args.out / "server.log") as (url, key, _):
        for name, heat in HEATS.items():
            out = args.out / f"{heat.replace(' ', '-')}.jsonl"
            command = [sys.executable, "03_rectify.py", "--method", "scdpo", "--samples", str(args.samples.resolve())]
            command += ["--model", args.model, "--base-url", url, "--heat", *heat.split(), "--tries", str(args.tries)]
            command += ["--max-tokens", "400", "--out", str(out.resolve())]
            command += ["--limit", str(args.limit)] if args.limit else []
            subprocess.run(command, cwd=ROOT, env=os.environ | {"OPENAI_API_KEY": key}, check=True, stdout=subprocess.DEVNULL)
            found = json.loads(Path(f"{out}.meta.json").read_text())["summary"]
            share = lambda count, found=found: f"{count / found['attempts']:.1%}"
            garbled = sum(value for kind, value in found.items() if kind.startswith("garbled: "))
            pairs = found.get("pairs", 0)
            lines.append(f"| {name} | {found['attempts']} | {share(pairs)} | {share(found.get('still right', 0))} "
                         f"| {share(garbled)} | {pairs / found['steps tried']:.1%} "
                         f"| {found['tokens'] / max(1, pairs):.0f} |")  # fmt: skip
            print(lines[-1], file=sys.stderr)
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
