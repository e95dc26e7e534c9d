"""Estimate memory and time of a training run, without making it.

    # this machine; the options are those of 04_train_stepdpo.py
    python analysis/estimate.py --data xinlai/Math-Step-DPO-10K
    # a launch file, without its GPUs
    python analysis/estimate.py --config_file configs/fsdp2.yaml --num_processes 8 \\
        --data runs/pairs.jsonl --gradient-checkpointing --tokens-per-batch 8192

Reads the data as 04 does and prints lengths, the memory that a device and a machine need,
operations, and hours at the rate of large matrix products on this machine, or for a launch file at
40 % of an H100's."""

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


@dataclass
class Args(TRAIN.Args):
    """Those of 04_train_stepdpo.py, and of accelerate launch."""

    config_file: Path | None = None
    """launch file to estimate for, in bf16; default: this machine"""
    num_processes: int | None = None
    """devices, instead of the launch file's"""


def matrix_rate(device, precision: str) -> float:
    """Measured FLOP/s of large matrix products on this device."""
    size = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        (a @ b).sum().item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def read_launch(path: Path, processes: int | None) -> tuple[str, bool, int, int]:
    """The strategy and whether AdamW's state is in main memory (see TRAIN.memory), devices and
    machines of a launch file."""
    try:
        launch = yaml.safe_load(path.read_text())
        strategy = {"FSDP": "fsdp2", "DEEPSPEED": "zero3"}.get(launch["distributed_type"], "copies")
        deepspeed = launch.get("deepspeed_config") or {}
        offloaded = deepspeed.get("offload_optimizer_device") == "cpu"
        file = deepspeed.get("deepspeed_config_file")
        if file:  # its place is given from the root of the repository
            zero = json.loads((ROOT / file).read_text())["zero_optimization"]
            offloaded = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
        return strategy, offloaded, processes or launch["num_processes"], launch["num_machines"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        reason = f"{error.__class__.__name__}: {error}"
        TRAIN.stop(f"--config_file {path}: no launch file of accelerate ({reason})")


def fullest_pass(pairs: TRAIN.Pairs, args: Args, world: int) -> tuple[int, int]:
    """Tokens of the largest pass in the first epoch, padding included, and the most passes of a
    step, on one device."""
    tokens = passes = 0
    for batch in TRAIN.batches(pairs, args, 0):
        step = TRAIN.plan(pairs, batch, args.tokens_per_batch, 0, world)
        passes = max(passes, len(step))
        for trees, _, _ in step:
            tokens = max(tokens, len(trees) * max(len(tree.ids) for tree in trees))
    return tokens, passes


def print_lengths(pairs: TRAIN.Pairs):
    """Lengths in tokens, and what sharing rows saves."""
    lengths = np.array(
        [
            (len(prefix), *map(len, suffixes))
            for prefix, suffixes in zip(pairs.prefixes, pairs.suffixes, strict=True)
        ]
    )
    TRAIN.print_main("tokens      median    95 %   most")
    for part, column in zip(("prefix", "chosen", "rejected"), lengths.T, strict=False):
        median, most = np.median(column), column.max()
        TRAIN.print_main(f"{part:8} {median:9.0f} {np.percentile(column, 95):7.0f} {most:6d}")
    shared = sum(len(pairs.tree(row).ids) for row in pairs.by_problem(range(len(pairs))))
    separate = (lengths[:, :1] + lengths[:, 1:]).sum()
    saved = 1 - shared / separate
    TRAIN.print_main(f"one row for all pairs of a problem saves {saved:.0%} of {separate} tokens")


def print_memory(parts: dict[str, float]):
    """TRAIN.memory(), of a device and of a machine."""
    needs = {"device": {}, "machine": {}}
    for name, size in parts.items():
        where = "machine" if name.startswith("machine") else "device"
        needs[where][name.removeprefix("machine: ")] = size / 2**30
    for where, sizes in needs.items():
        kind = " of main memory" if where == "machine" else ""
        listed = ", ".join(f"{size:.2f} GiB for {name}" for name, size in sizes.items())
        TRAIN.print_main(f"a {where} needs about {sum(sizes.values()):.2f} GiB{kind}: {listed}")


def main(args: Args):
    """Print memory and time of a run, on this machine or with a launch file."""
    if args.config_file and args.precision == "fp32":
        TRAIN.stop("--config_file: estimates for GPUs in bf16; leave out --precision fp32")
    if args.config_file:
        args.precision = "bf16"
    accelerator, _, pairs, _ = TRAIN.start(args)
    print_lengths(pairs)
    config = AutoConfig.from_pretrained(args.model)
    if args.config_file:
        strategy, offloaded, world, machines = read_launch(args.config_file, args.num_processes)
        on_gpu = True
        tokens, passes = args.tokens_per_batch, 2  # a plan for other devices is of full passes
        rate = TRAIN.PEAK_FLOPS["H100"] * world  # of bf16
        source = f"the data sheet gives {world} H100 (this machine is another)"
    else:
        strategy, offloaded = TRAIN.strategy_of(accelerator)
        world = accelerator.num_processes
        machines = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        on_gpu = accelerator.device.type == "cuda"
        tokens, passes = fullest_pass(pairs, args, world)
        TRAIN.print_main(f"largest pass: {tokens} tokens; most passes of a step: {passes}")
        rate = matrix_rate(accelerator.device, args.precision) * world
        source = f"large matrix products reach on {world} device(s) like this one"
    largest = replace(args, tokens_per_batch=tokens)
    print_memory(
        TRAIN.memory(config, largest, strategy, world, machines, offloaded, on_gpu, passes)
    )
    forward = TRAIN.flops(pairs, range(len(pairs)), config, TRAIN.count_weights(config))
    forwards = 3 + args.gradient_checkpointing  # a backward pass costs two of them
    reference = 1 if args.objective == "dpo" else 0
    hours = forward * (forwards * args.epochs + reference) / rate / 3600
    TRAIN.print_main(
        f"{forward * forwards / len(pairs) / 1e12:.4f} TFLOP a pair; at {rate / 1e12:.2f} TFLOP/s, "
        f"which {source}, {args.epochs} epochs over {len(pairs)} pairs take {hours:.2f} h; at 40 % "
        f"of that rate {hours / 0.4:.2f} h"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
