"""Speed and memory of 04_train_stepdpo.py compared with TRL's DPOTrainer on the same pairs, model
and arithmetic.

    pip install trl
    python benchmarks/train_speed.py --pairs-file runs/pairs.jsonl
    python benchmarks/train_speed.py --pairs-file runs/pairs.jsonl --model FOLDER --sides full \\
        --pairs 64 --trl-pairs 8

Without weights in FOLDER they are random: speed and memory are those of the shape. fp32 weights,
AdamW, bf16 autocast where 04 would take it; on the CPU all keep freed memory, as 04 does. Each
trainer runs in a process of its own:
    ours           this trainer
    ours-separate  this trainer with a row for each suffix, as others have it
    trl            DPOTrainer with its defaults (reference model in memory, gradient checkpointing)
    trl-best       DPOTrainer with reference log-probabilities computed before, without gradient
                   checkpointing

Output: a table (seconds a step: median and range over steps; pairs/s; tokens/s of the distinct
tokens; peak memory of the process, or of the GPU; share of the bound; ratios to trl-best), and OUT
with the raw figures. The bound: 3 forward passes over the distinct tokens, in FLOPs, at the rate
that large products reach on this machine. The first step of each is left out: it holds one-time
costs. The reference pass is not part of a step in any of them but trl."""

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
Trainer = Literal["ours", "ours-separate", "trl", "trl-best"]


@dataclass
class Args:
    trainers: tuple[Trainer, ...] = ("ours", "ours-separate", "trl-best", "trl")
    """what to time"""
    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """hub id, or a folder with configuration and tokenizer and perhaps weights"""
    pairs_file: Path = Path("data/pairs.jsonl")
    """what 04 takes for --data; a step takes the next pairs of it, from the beginning again at its
    end"""
    sides: Literal["step", "full"] = "step"
    """as in 04: steps or whole answers"""
    pairs: int = 4
    """pairs of a step"""
    trl_pairs: int = 0
    """pairs of one pass of TRL; 0: all of a step"""
    steps: int = 4
    """timed steps"""
    tokens_per_batch: int = 16384
    """tokens of one pass of this trainer"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """as in 04, for all trainers"""
    out: Path = Path("runs/train_speed.json")
    """file to write"""
    child: str = ""
    """internal: the one trainer that this process times"""


def make_model(args: Args):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if not Path(args.model).exists() or any(Path(args.model).glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(args.model, **options)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), **options)


def time_ours(args: Args, train, pairs, steps: list[list[int]], separate: bool) -> list[float]:
    """Seconds of each step."""
    import torch
    from accelerate import Accelerator

    if separate:
        train.collate = separate_rows(train, pairs)
    accelerator = Accelerator(mixed_precision="bf16" if args.precision == "bf16" else "no")
    settings = train.Args(tokens_per_batch=args.tokens_per_batch)
    scorer = train.SuffixScorer(make_model(args))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    pairs.reference, seconds = torch.zeros(len(pairs), 2), []
    for step in steps:
        began = time.perf_counter()
        train.train_step(scorer, optimizer, pairs, step, settings, accelerator)
        seconds.append(time.perf_counter() - began)
    return seconds


def separate_rows(train, pairs):
    """collate() with a row [prefix | suffix] for each suffix of each pair: what sharing saves is
    computed again."""
    shared = train.collate

    def collate(trees, device):
        import torch

        apart = train.Pairs()
        for i in train.numbers_of(trees):
            prefix = pairs.prefixes[i]
            for suffix in pairs.suffixes[i]:
                apart.add(prefix, [suffix], problem=f"{i} {len(apart)}")
        batch = shared([apart.tree([i]) for i in range(len(apart))], device)
        return batch | {"picks": torch.arange(len(apart), device=device).view(-1, 2)}

    return collate


def time_trl(args: Args, tokenizer, pairs, steps: list[list[int]], best: bool) -> list[float]:
    """Seconds of each step. TRL takes texts, and puts EOS after each."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            self.seconds.append(time.perf_counter() - self.began)

    rows = []
    for i in sum(steps, []):
        sides = [pairs.prefixes[i], *pairs.suffixes[i]]
        texts = [tokenizer.decode(ids).removesuffix(tokenizer.eos_token) for ids in sides]
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    clock, at_once = Clock(), args.trl_pairs or args.pairs
    best_options = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            folder,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=args.pairs // at_once,
            max_steps=len(steps),
            bf16=args.precision == "bf16",
            beta=0.4,
            learning_rate=1e-6,
            report_to="none",
            save_strategy="no",
            max_length=None,
            logging_steps=1,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **(best_options if best else {}),
        )
        trainer = DPOTrainer(
            make_model(args),
            None if best else make_model(args),
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds


def child(args: Args):
    """Time one trainer; print a JSON line."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    train, cuda = importlib.import_module("04_train_stepdpo"), torch.cuda.is_available()
    if not cuda:
        train.keep_memory()
    if args.precision == "auto":
        args.precision = "bf16" if cuda or train.processor_has_bf16() else "fp32"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = train.load_rows(str(args.pairs_file), "dpo")
    pairs = train.prepare(rows, tokenizer, train.Args(sides=args.sides), "pairs")
    if args.pairs > len(pairs):
        train.stop(f"--pairs {args.pairs}: {args.pairs_file} has {len(pairs)}")
    steps = [
        [i % len(pairs) for i in range(k * args.pairs, (k + 1) * args.pairs)]
        for k in range(args.steps + 1)
    ]
    if args.child.startswith("ours"):
        seconds = time_ours(args, train, pairs, steps, args.child == "ours-separate")
    else:
        seconds = time_trl(args, tokenizer, pairs, steps, args.child == "trl-best")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    config = AutoConfig.from_pretrained(args.model)
    device = torch.device("cuda" if cuda else "cpu")
    sizes = train.count_weights(config)
    rate = importlib.import_module("estimate").matrix_rate(device, args.precision)
    timed = steps[1:]
    operations = sum(train.flops(pairs, step, config, sizes) for step in timed) / args.steps
    trees = [pairs.tree(row) for step in timed for row in pairs.by_problem(step)]
    tokens = sum(len(tree.ids) for tree in trees) / args.steps
    figures = {
        "trainer": args.child,
        "seconds": seconds[1:],
        "bound": 3 * operations / rate,
        "peak_gib": peak / 2**30,
        "pairs": args.pairs,
        "tokens": tokens,
        "device": str(device),
        "precision": args.precision,
    }
    print(json.dumps(figures))


def main(args: Args):
    rows, environment = [], os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in asdict(args).items()
        if name not in ("trainers", "child")
    ]
    print("trainer         s/step           range  pairs/s  tokens/s    GiB of bound")
    for trainer in args.trainers:
        command = [sys.executable, __file__, *options, f"--child={trainer}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"{trainer} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        seconds = np.median(row["seconds"])
        spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}"
        print(
            f"{trainer:14} {seconds:7.2f} {spread:>15} {row['pairs'] / seconds:8.2f} "
            f"{row['tokens'] / seconds:9.0f} {row['peak_gib']:6.1f} {row['bound'] / seconds:8.0%}",
            flush=True,
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"arguments": asdict(args), "found": rows}, indent=1, default=str) + "\n"
        )
    for best in (row for row in rows if row["trainer"] == "trl-best"):
        for row in rows:
            speed = np.median(best["seconds"]) / np.median(row["seconds"])
            memory = row["peak_gib"] / best["peak_gib"]
            print(
                f"{row['trainer']}: {speed:.2f} times trl-best's speed, {memory:.2f} of its memory"
            )
    sys.exit(2 * (len(rows) < len(args.trainers)))


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    child(arguments) if arguments.child else main(arguments)
