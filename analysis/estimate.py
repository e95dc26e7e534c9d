"""Memory and time of a training run, by count, without making it.

    python analysis/estimate.py --data xinlai/Math-Step-DPO-10K                  # the options are those of 04_train_stepdpo.py
    python analysis/estimate.py --config_file configs/fsdp2.yaml --num_processes 8 --data runs/pairs.jsonl \\
        --gradient-checkpointing --tokens-per-batch 8192                         # of a launch file, without its GPUs

Reads the data as 04 does and prints lengths, what a device and a machine need of memory,
operations, and hours at the rate that large matrix products reach here, or for a launch file at 40
% of an H100's. """

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
import yaml
from transformers import AutoConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
TRAIN = importlib.import_module("04_train_stepdpo")


def matrix_rate(device, precision: str) -> float:
    """Measured FLOP/s of large matrix products on this device."""
    size, dtype = (
        (8192 if device.type == "cuda" else 1536),
        torch.bfloat16 if precision == "bf16" else torch.float32,
    )
    a, b, best = (
        torch.randn(size, size, device=device, dtype=dtype),
        torch.randn(size, size, device=device, dtype=dtype),
        0.0,
    )
    for _ in range(6):
        began = time.perf_counter()
        (a @ b).sum().item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


@dataclass
class Args(TRAIN.Args):
    """Those of 04_train_stepdpo.py, and of accelerate launch."""

    config_file: Path | None = None
    """launch file to count for, in bf16 unless --precision fp32; without it, this machine as it
    is"""
    num_processes: int | None = None
    """devices, instead of the launch file's"""


def read_launch(path: Path, processes: int | None) -> tuple[str, float, int, int]:
    """The strategy and the share of AdamW's state in main memory (see TRAIN.memory), devices and
    machines of a launch file."""
    try:
        launch = yaml.safe_load(path.read_text())
        strategy = {"FSDP": "fsdp2", "DEEPSPEED": "zero3"}.get(launch["distributed_type"], "copies")
        offloaded, deepspeed = 0.0, launch.get("deepspeed_config", {})
        if file := deepspeed.get(
            "deepspeed_config_file"
        ):  # its place is given from the root of the repository
            offload = json.loads((ROOT / file).read_text())["zero_optimization"].get(
                "offload_optimizer", {}
            )
            offloaded = offload.get("ratio", 1.0) if offload.get("device") == "cpu" else 0.0
        elif deepspeed.get("offload_optimizer_device") == "cpu":
            offloaded = 1.0
        return strategy, offloaded, processes or launch["num_processes"], launch["num_machines"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        TRAIN.stop(
            f"--config_file {path}: no launch file of accelerate ({error.__class__.__name__}: {error})"
        )


def fullest_pass(pairs: TRAIN.Pairs, args: Args, world: int) -> tuple[int, int]:
    """Tokens of the largest pass in the first epoch, padding included, and the most passes of a
    step, on one device."""
    steps = [
        TRAIN.plan(pairs, batch, args.tokens_per_batch, 0, world)
        for batch in TRAIN.batches(pairs, args, 0)
    ]
    return max(
        len(rows) * max(map(pairs.length, rows)) for step in steps for rows, _, _ in step
    ), max(map(len, steps))


def print_lengths(pairs: TRAIN.Pairs):
    """Lengths in tokens, and what sharing rows saves."""
    lengths = np.array(
        [
            (len(pairs.prefixes[p]), *map(len, s))
            for p, s in zip(pairs.prefix, pairs.suffixes, strict=True)
        ]
    )
    TRAIN.print_main("tokens      median    95 %   most")
    for part, column in zip(("prefix", "chosen", "rejected"), lengths.T, strict=False):
        TRAIN.print_main(
            f"{part:8} {np.median(column):9.0f} {np.percentile(column, 95):7.0f} {column.max():6d}"
        )
    shared = sum(map(pairs.length, pairs.by_problem(range(len(pairs)))))
    separate = (lengths[:, :1] + lengths[:, 1:]).sum()
    TRAIN.print_main(
        f"one row for all pairs of a problem saves {1 - shared / separate:.0%} of {separate} tokens"
    )


def main(args: Args):
    """Print memory and time of a run, on this machine or with a launch file."""
    if args.config_file and args.precision == "auto":
        args.precision = "bf16"
    accelerator, _, pairs, _ = TRAIN.start(args)
    print_lengths(pairs)
    config, world = AutoConfig.from_pretrained(args.model), accelerator.num_processes
    strategy, offloaded = TRAIN.strategy_of(accelerator)
    machines = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    if args.config_file:
        strategy, offloaded, world, machines = read_launch(args.config_file, args.num_processes)
    on_gpu = bool(args.config_file) or accelerator.device.type == "cuda"
    tokens, passes = args.tokens_per_batch, 2
    if not args.config_file:  # a plan for other devices is of full passes
        tokens, passes = fullest_pass(pairs, args, world)
        TRAIN.print_main(f"largest pass: {tokens} tokens; most passes of a step: {passes}")
    full = replace(args, tokens_per_batch=tokens)
    found = TRAIN.memory(config, full, strategy, world, machines, offloaded, on_gpu, passes)
    for where in ("device", "machine"):
        some = [name for name in found if name.startswith("machine") == (where == "machine")]
        parts = {name.removeprefix("machine: "): found[name] / 2**30 for name in some}
        listed = ", ".join(f"{size:.2f} GiB for {name}" for name, size in parts.items())
        kind = " of main memory" if where == "machine" else ""
        TRAIN.print_main(f"a {where} needs about {sum(parts.values()):.2f} GiB{kind}: {listed}")
    forward = TRAIN.flops(pairs, range(len(pairs)), config, TRAIN.count_weights(config))
    forwards = 3 + args.gradient_checkpointing
    if args.config_file:
        rate, source = (
            TRAIN.PEAK_FLOPS["H100"] * world,
            f"the data sheet gives {world} H100 (this machine is another)",
        )
    else:
        rate = matrix_rate(accelerator.device, args.precision) * world
        source = f"large matrix products reach on {world} device(s) like this one"
    seconds = forward * (forwards * args.epochs + (args.objective == "dpo")) / rate
    TRAIN.print_main(
        f"{forward * forwards / len(pairs) / 1e12:.4f} TFLOP a pair; at {rate / 1e12:.2f} TFLOP/s, which "
        f"{source}, {args.epochs} epochs over {len(pairs)} pairs take {seconds / 3600:.2f} h; at 40 % of "
        f"that rate {seconds / 1440:.2f} h"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
