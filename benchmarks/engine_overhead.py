"""What 01 adds to vLLM's own time: 01_sample_errors.py compared with LLM.generate on the
same requests.

    # the bundled model, 1,000 problems, twice each; 4 minutes on two cores
    python benchmarks/engine_overhead.py

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
    top_p: float = 0.95
    """nucleus sampling"""
    max_tokens: int = 400
    """longest sample"""
    repeats: int = 2
    """turns of each"""
    engine_args: str = "--max-model-len 1024"
    """vLLM's options for both, such as "--max-num-seqs 512 --max-model-len 1024"; default of
    --max-num-seqs: vLLM's own limit"""
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
    prompts, sampling_params = [], []
    sampling = {**one.NEUTRAL, "temperature": 0.8, "top_p": args.top_p}
    sampling["max_tokens"] = args.max_tokens
    for problem in problems:
        prompt_ids = one.prompt_ids(tokenizer, problem["problem"], one.OPENING)
        for sample in range(2):
            seed = one.seed_of(0, "sample", problem["id"], sample)
            prompts.append({"prompt_token_ids": prompt_ids})
            # as 01 asks: on a GPU a seed would keep vLLM from its fast samplers
            own_seed = seed if one.seeds_requests(args.top_p) else None
            sampling_params.append(SamplingParams(seed=own_seed, **sampling))
    given = ["--model", args.model, "--generation-config", "vllm", *one.cpu_options()]
    given += shlex.split(args.engine_args)
    if one.cpu_options():  # as in 01
        one.keep_memory()
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(given)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    began = time.time()
    completions = llm.generate(prompts, sampling_params, use_tqdm=False)
    seconds = time.time() - began
    tokens = sum(len(completion.outputs[0].token_ids) for completion in completions)
    print(json.dumps({"tokens": tokens, "rate": tokens / seconds}))


def main(args: Args):
    if args.child:
        return alone(args)
    # as 01 has them; vLLM's own share of a machine may not be free
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    common = [f"--data={args.data}", f"--model={args.model}", f"--limit={args.limit}"]
    common += [f"--top-p={args.top_p}", f"--max-tokens={args.max_tokens}"]
    common += [f"--engine-args={args.engine_args}"]
    rates = {"LLM.generate": [], "01": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.repeats):
            command = [sys.executable, __file__, "--child", *common]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(2)
            # vLLM prints there too
            [line] = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
            theirs = json.loads(line)
            out = Path(folder, f"{turn}.jsonl")
            command = [sys.executable, str(ROOT / "01_sample_errors.py"), *common, f"--out={out}"]
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                sys.exit(2)
            ours = json.loads(Path(f"{out}.meta.json").read_text())["summary"]
            rates["LLM.generate"].append(theirs["rate"])
            rates["01"].append(ours["tokens/s"])
            print(
                f"turn {turn}: LLM.generate {theirs['rate']:.0f} tokens/s of {theirs['tokens']}, "
                f"01 {ours['tokens/s']} of {ours['tokens']}",
                file=sys.stderr,
            )
    theirs, ours = statistics.median(rates["LLM.generate"]), statistics.median(rates["01"])
    print(f"LLM.generate {theirs:.0f} tokens/s, 01 {ours:.0f} tokens/s: ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
