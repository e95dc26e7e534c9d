"""How much of an evaluation's time is the client's: 05_eval.py beside a client that sends the same requests and reads nothing.

    python benchmarks/eval_overhead.py --data ../shared/data/gsm8k_test.jsonl      # about 6 minutes on two cores

One vLLM server with the bundled model; in turns the bare client, 05 (requests, answers, two graders, file), the bare client.
Prints the seconds of each and 05's share above the mean of the other two.
"""

import asyncio
import importlib
import json
import os
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
        first = asyncio.run(bare(args, problems, url, key))
        command = [sys.executable, "05_eval.py", "--data", str(args.data.resolve()), "--models", args.model, "--base-url", url]
        command += ["--max-tokens", str(args.max_tokens), "--out", folder + "/out", "--limit", str(len(problems))]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OPENAI_API_KEY": key}, check=True, stdout=subprocess.DEVNULL)
        [run] = json.loads(Path(folder, "out", "summary.json").read_text())["runs"].values()
        last = asyncio.run(bare(args, problems, url, key))
    print(f"{len(problems)} problems, {run['tokens']} tokens: bare client {first:.1f} and {last:.1f} s, 05 {run['seconds']} s "
          f"({run['tokens/s']} tokens/s): {run['seconds'] / ((first + last) / 2) - 1:+.1%}")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
