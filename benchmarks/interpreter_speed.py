"""Blocks a second of serving/interpreter.py: many solutions of one block, which each start a
kernel, and one of many.

    # half a minute; add --unsafe-no-sandbox where bubblewrap is missing
    python benchmarks/interpreter_speed.py

The block is one addition, so that what is timed is the interpreter."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

PROGRAM = Path(__file__).parents[1] / "serving" / "interpreter.py"


@dataclass
class Args:
    blocks: int = 300
    """blocks in all, of each kind"""
    unsafe_no_sandbox: bool = False
    """passed on"""


def rate(args: Args, ids: list[str]) -> float:
    """Blocks a second from the first request to the last answer; an id's kernel ends when its last
    answer is there."""
    command = [sys.executable, str(PROGRAM)]
    if args.unsafe_no_sandbox:
        command.append("--unsafe-no-sandbox")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if not process.stdout.readline():  # it has printed the reason
        sys.exit(2)
    one_kernel = len(set(ids)) == 1
    began = time.time()
    for key in ids:
        process.stdin.write(json.dumps({"id": key, "code": "1 + 1"}) + "\n")
        process.stdin.flush()
        if one_kernel:  # as a solution's blocks come: each after the answer to the one before
            process.stdout.readline()
    for _ in [] if one_kernel else ids:
        key = json.loads(process.stdout.readline())["id"]
        process.stdin.write(json.dumps({"id": key, "code": None}) + "\n")
        process.stdin.flush()
    seconds = time.time() - began
    process.stdin.close()
    process.wait()
    return len(ids) / seconds


def main(args: Args):
    many = rate(args, [str(i) for i in range(args.blocks)])
    one = rate(args, ["0"] * args.blocks)
    print(f"{many:.0f} blocks a second with a kernel each, {one:.0f} in one kernel")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
