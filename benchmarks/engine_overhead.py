"""What 01 adds to vLLM's own time: 01_sample_errors.py beside LLM.generate on the same requests.

    python benchmarks/engine_overhead.py                 # the bundled model, 1,000 problems, twice each; 4 minutes on two cores

In turns, each a process with the engine in it: LLM.generate on the prompts' token ids, two samples
of each with 01's seeds, nothing done to the answers; and 01, which grades and writes them too.
Prints tokens a second from the first request to the last answer of each turn, and the ratio of the
medians. Start of the engine and of Python is in neither."""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    data: Path = ROOT / "data/tiny/train.jsonl"
    """problems"""
    model: str = str(ROOT / "data/tiny/model")
    """folder or hub id"""
    limit: int = 1000
    """problems"""
    max_tokens: int = 400
    """longest sample"""
    repeats: int = 2
    """turns of each"""
    engine_args: str = "--max-model-len 1024"
    """vLLM's options for both, such as "--max-num-seqs 512 --max-model-len 1024"; without, as many
    as vLLM likes"""
    child: bool = False
    """internal: this process times LLM.generate"""


def alone(args: Args):
    """Time LLM.generate; print a JSON line."""
    import shlex

    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    one = importlib.import_module("01_sample_errors")
    problems = one.load_problems(args.data)[: args.limit]
    tokenizer = one.load_tokenizer(args.model, None, "{}")
    prompts, wanted = [], []
    for problem in problems:
        for sample in range(2):
            prompts.append(
                {"prompt_token_ids": one.prompt_ids(tokenizer, problem["problem"], one.OPENING)}
            )
            seed = one.seed_of(0, "sample", problem["id"], sample)
            sampling = {"temperature": 0.8, "top_p": 0.95, "max_tokens": args.max_tokens}
            wanted.append(SamplingParams(seed=seed, **one.NEUTRAL, **sampling))
    given = ["--model", args.model, "--generation-config", "vllm", *one.cpu_options()]
    given += shlex.split(args.engine_args)
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(given)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    began = time.time()
    found = llm.generate(prompts, wanted, use_tqdm=False)
    seconds, tokens = time.time() - began, sum(len(reply.outputs[0].token_ids) for reply in found)
    print(json.dumps({"tokens": tokens, "rate": tokens / seconds}))


def main(args: Args):
    if args.child:
        return alone(args)
    # as 01 has them; vLLM's own share of a machine may not be free
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    } | os.environ
    rates = {"LLM.generate": [], "01": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            common = [
                "--data",
                args.data,
                "--model",
                args.model,
                "--limit",
                args.limit,
                "--max-tokens",
                args.max_tokens,
            ]
            command = [
                sys.executable,
                __file__,
                "--child",
                *common,
                f"--engine-args={args.engine_args}",
            ]
            done = subprocess.run(
                list(map(str, command)), check=True, capture_output=True, text=True
            )
            [line] = [
                line for line in done.stdout.splitlines() if line.startswith('{"tokens"')
            ]  # vLLM prints there too
            theirs = json.loads(line)
            out = Path(folder, f"{turn}.jsonl")
            command = [
                sys.executable,
                ROOT / "01_sample_errors.py",
                *common,
                f"--engine-args={args.engine_args}",
                "--out",
                out,
            ]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            ours = json.loads(Path(f"{out}.meta.json").read_text())["summary"]
            rates["LLM.generate"].append(theirs["rate"])
            rates["01"].append(ours["tokens/s"])
            print(
                f"turn {turn}: LLM.generate {theirs['rate']:.0f} tokens/s of {theirs['tokens']}, 01 {ours['tokens/s']} of "
                f"{ours['tokens']}",
                file=sys.stderr,
            )
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(
        ", ".join(f"{name} {value:.0f} tokens/s" for name, value in medians.items())
        + f": ratio {medians['01'] / medians['LLM.generate']:.2f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
