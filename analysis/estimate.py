"""Memory and time of a training run, by count, without making it.

    python analysis/estimate.py --data xinlai/Math-Step-DPO-10K                  # the options are those of 04_train_stepdpo.py
    accelerate launch --config_file configs/fsdp2.yaml analysis/estimate.py --data runs/pairs.jsonl

Reads the data as 04 does and prints lengths, what a device and a machine need of memory, operations, and hours at the rate
that large matrix products reach here.
"""

import importlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
TRAIN = importlib.import_module("04_train_stepdpo")


def matrix_rate(device, precision: str) -> float:
    """Measured FLOP/s of large matrix products on this device."""
    size, dtype = (8192 if device.type == "cuda" else 1536), torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, best = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype), 0.0
    for _ in range(6):
        began = time.perf_counter()
        (a @ b).sum().item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def memory(config, args: TRAIN.Args, strategy: str, world: int, machines: int = 1, offloaded: float = 0.0) -> dict[str, float]:
    """Bytes by count. strategy: "copies" (one process, or the whole model on each), "fsdp2" or "zero3"; offloaded: the share of
    AdamW's state that ZeRO-3 keeps in main memory. Keys that begin with "machine" are of main memory on one machine."""
    body, head = TRAIN.count_weights(config)
    parameters, low = body + head * (1 if config.tie_word_embeddings else 2), 2 if args.precision == "bf16" else 4
    layer, copies = body / config.num_hidden_layers, 0 if low == 4 else 2  # of weights, by autocast
    trained = 0 if args.lora_rank else parameters
    frozen = low * (parameters - trained)
    if strategy == "copies":  # fp32 weights, gradients, two moments; DDP sends gradients from buckets of their own
        found = {"weights, gradients, AdamW": (16 + copies + (4 if world > 1 else 0)) * trained + frozen}
        found["machine: model read by every process"] = world / machines * (4 * trained + frozen)
    elif strategy == "fsdp2":  # gathered: embedding and head throughout, two layers; a layer's gradients in fp32
        found = {"weights, gradients, AdamW": (16 * trained + frozen) / world}
        found["gathered"] = low * (2 * head + 2 * layer) + 4 * layer
        found["machine: model read by one process"] = 4 * trained + frozen
    else:  # weights and gradients in 16 bits, fp32 masters and moments; by default 1e9 weights are gathered at most
        on_device = 12 * (1 - offloaded) * trained + low * (2 - (offloaded > 0)) * trained + frozen
        found = {"weights, gradients, AdamW": on_device / world}
        found["gathered"] = low * min(1e9, parameters)
        found["machine: AdamW and gradients"] = (12 * offloaded + low * (offloaded > 0)) * trained / machines
        found["machine: files of the model, shared"] = 2 * parameters
    # 34 bytes a token, layer and unit of width in 16 bits (Korthikanti et al., arXiv 2205.05198), without attention scores;
    # checkpointing keeps 2 of them, and one layer's all
    token, layers = 34 * low / 2 * config.hidden_size, config.num_hidden_layers
    found["activations"] = args.tokens_per_batch * token * ((layers / 17 + 1) if args.gradient_checkpointing else layers)
    found["logits"] = 3 * 4 * TRAIN.LOGITS_CHUNK * config.vocab_size
    return found


def strategy_of(accelerator: Accelerator) -> tuple[str, float]:
    """The name that memory() knows, and the share of AdamW's state in main memory."""
    if accelerator.distributed_type == "DEEPSPEED":
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        offload = zero.get("offload_optimizer") or {}
        return "zero3", offload.get("ratio", 1.0) if offload.get("device") == "cpu" else 0.0
    return ("fsdp2" if accelerator.distributed_type == "FSDP" else "copies"), 0.0


def print_lengths(pairs: TRAIN.Pairs):
    """Lengths in tokens, and what sharing rows saves."""
    lengths = np.array([(len(pairs.prefixes[p]), *map(len, s)) for p, s in zip(pairs.prefix, pairs.suffixes, strict=True)])
    TRAIN.print_main("tokens      median    95 %   most")
    for part, column in zip(("prefix", "chosen", "rejected"), lengths.T, strict=False):
        TRAIN.print_main(f"{part:8} {np.median(column):9.0f} {np.percentile(column, 95):7.0f} {column.max():6d}")
    shared = sum(map(pairs.length, pairs.by_problem(range(len(pairs)))))
    separate = (lengths[:, :1] + lengths[:, 1:]).sum()
    TRAIN.print_main(f"one row for all pairs of a problem saves {1 - shared / separate:.0%} of {separate} tokens")


def main(args: TRAIN.Args):
    """Print memory and time of a run on this machine."""
    accelerator, _, pairs, _ = TRAIN.start(args)
    print_lengths(pairs)
    config, world = AutoConfig.from_pretrained(args.model), accelerator.num_processes
    strategy, offloaded = strategy_of(accelerator)
    machines = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    found = memory(config, args, strategy, world, machines, offloaded)
    for where in ("device", "machine"):
        some = [name for name in found if name.startswith("machine") == (where == "machine")]
        parts = {name.removeprefix("machine: "): found[name] / 2**30 for name in some}
        listed = ", ".join(f"{size:.2f} GiB for {name}" for name, size in parts.items())
        kind = " of main memory" if where == "machine" else ""
        TRAIN.print_main(f"a {where} needs about {sum(parts.values()):.2f} GiB{kind}: {listed}")
    forward = TRAIN.flops(pairs, range(len(pairs)), config, TRAIN.count_weights(config))
    passes = 3 + args.gradient_checkpointing
    rate = matrix_rate(accelerator.device, args.precision) * world
    seconds = forward * (passes * args.epochs + (args.objective == "dpo")) / rate
    TRAIN.print_main(f"{forward * passes / len(pairs) / 1e12:.4f} TFLOP a pair; at {rate / 1e12:.2f} TFLOP/s, which large "
                     f"matrix products reach on {world} device(s) like this one, {args.epochs} epochs over {len(pairs)} pairs "
                     f"take {seconds / 3600:.2f} h; at 40 % of that rate {seconds / 1440:.2f} h")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(TRAIN.Args, description=__doc__))
