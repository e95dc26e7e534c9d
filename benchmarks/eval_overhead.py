"""How much of an evaluation's time is the client's: 05_eval.py beside a client that sends the same requests and reads nothing.

    python benchmarks/eval_overhead.py --data ../shared/data/gsm8k_test.jsonl      # about 5 minutes on two cores

One vLLM server with the bundled model; in turns the bare client and 05 (requests, answers, three verdicts, file), three times.
Prints the seconds of each, the difference of the medians, and the processor time of 05's whole process beside its wall time.
"""

import asyncio
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
stage = importlib.import_module("05_eval")


@dataclass
class Args:
    data: Path
    """problems"""
    model: str = "data/tiny/model"
    """folder or hub id"""
    max_tokens: int = 400
    """longest response"""
    limit: int | None = None
    """use the first so many problems"""
    repeats: int = 3
    """turns of both clients"""


async def bare(args: Args, problems: list[dict], url: str, key: str) -> float:
    """Seconds for the same requests as 05's with nothing done to the answers."""
    bodies = [{"model": args.model, "temperature": 0.0, "top_p": 1.0, "max_tokens": args.max_tokens, "n": 1,
               "seed": stage.seed_of(0, "eval", problem["id"]), "continue_final_message": True, "add_generation_prompt": False,
               "messages": [{"role": "user", "content": stage.USER_TURN.format(problem=problem["problem"])},
                            {"role": "assistant", "content": stage.OPENING}]} for problem in problems]  # fmt: skip
    gate, began = asyncio.Semaphore(256), time.time()
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(timeout=3600, limits=limits, headers={"Authorization": f"Bearer {key}"}) as client:

        async def one(body: dict):
            async with gate:
                (await client.post(f"{url}/chat/completions", json=body)).raise_for_status()

        await asyncio.gather(*map(one, bodies))
    return time.time() - began


def main(args: Args):
    problems = stage.load_problems(str(args.data), False, None)[: args.limit]
    server = SimpleNamespace(base_url=None, chat_template=None, server_timeout=600.0,
                             server_args="--max-num-seqs 512 --max-model-len 2048 --no-enable-prefix-caching")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, stage.served(server, args.model, Path(folder) / "log") as (url, key, _):
        asyncio.run(bare(args, problems[:64], url, key))  # warm-up
        alone, with_05, cpu = [], [], []
        for turn in range(args.repeats):
            alone.append(asyncio.run(bare(args, problems, url, key)))
            out, before = f"{folder}/out-{turn}", resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "05_eval.py", "--data", str(args.data.resolve()), "--models", args.model]
            command += ["--base-url", url, "--max-tokens", str(args.max_tokens), "--out", out, "--limit", str(len(problems))]
            subprocess.run(command, cwd=ROOT, env=os.environ | {"OPENAI_API_KEY": key}, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            [run] = json.loads(Path(out, "summary.json").read_text())["runs"].values()
            with_05.append(run["seconds"])
            cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    more = statistics.median(with_05) / statistics.median(alone) - 1
    show = lambda seconds: ", ".join(f"{value:.1f}" for value in seconds)
    print(f"{len(problems)} problems, {run['tokens']} tokens. Bare client {show(alone)} s, 05 {show(with_05)} s: "
          f"medians {more:+.1%}. Processor seconds of 05's process, start and report included: {show(cpu)}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
