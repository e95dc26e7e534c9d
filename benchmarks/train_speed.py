"""Speed and memory of 04_train_stepdpo.py beside TRL's DPOTrainer on the same pairs, model and arithmetic.

    pip install trl matplotlib
    python benchmarks/train_speed.py --ratios 4 --steps 3       # two cores: 14 minutes
    python benchmarks/train_speed.py                            # all ratios
    python benchmarks/train_speed.py --layers 24 --hidden 896 --pairs 32 --steps 20         # on a GPU

A random Qwen2-shaped model, fp32 weights, bf16 autocast, AdamW; pairs of --suffix tokens (uniform in a range) behind a prefix
of ratio times as many. Each trainer runs in a process of its own; they take turns, ratio by ratio. The trainers:
    ours           this trainer
    ours-separate  this trainer with a row for each suffix, as others have it
    trl            DPOTrainer with its defaults (reference model in memory, gradient checkpointing)
    trl-best       DPOTrainer with reference log-probabilities computed before, no gradient checkpointing
Output: a table (seconds a step: median and range over steps; pairs/s; tokens/s of the distinct tokens; peak memory; share of
the bound; ratios to trl-best), OUT.json with the raw figures, and OUT.png.
The bound: 3 forward passes over the distinct tokens, in FLOPs, at the rate that large bf16 products reach on this machine.
The first step of each is left out: it holds one-time costs. The reference pass is not part of a step in any of them but trl.
"""

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
Trainer = Literal["ours", "ours-separate", "trl", "trl-best"]


@dataclass
class Args:
    trainers: tuple[Trainer, ...] = ("ours", "ours-separate", "trl-best", "trl")
    """what to time"""
    ratios: tuple[int, ...] = (1, 2, 4, 8)
    """prefix tokens for each suffix token"""
    suffix: tuple[int, int] = (25, 110)
    """shortest and longest suffix, in tokens"""
    pairs: int = 4
    """pairs of a step"""
    steps: int = 4
    """timed steps"""
    hidden: int = 896
    """width; heads have 64 dimensions"""
    layers: int = 12
    """layers"""
    vocab: int = 151_936
    """rows of the embedding and the head"""
    tokens_per_batch: int = 16384
    """tokens of one pass of this trainer"""
    out: Path = Path("runs/train_speed")
    """OUT.json and OUT.png are written"""
    child: str = ""
    """internal: the one trainer and ratio that this process times"""


def make_rows(args: Args, ratio: int) -> list[dict]:
    """Pairs as strings whose token counts are known: " 1" to " 9" are one token each in the bundled tokenizer."""
    r, rows = np.random.default_rng(ratio), []
    words = lambda n: "".join(f" {digit}" for digit in r.integers(1, 10, n))
    for _ in range(args.pairs * (args.steps + 1)):
        chosen, rejected = r.integers(args.suffix[0], args.suffix[1] + 1, 2)
        rows.append({"prompt": words(ratio * (chosen + rejected) // 2), "chosen": words(chosen), "rejected": words(rejected)})
    return rows


def make_model(args: Args):
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=int(5.43 * args.hidden) // 64 * 64,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=max(1, args.hidden // 448),
        tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def time_ours(args: Args, rows: list[dict], separate: bool) -> tuple[list[float], float]:
    """Seconds of each step, and those that the distinct tokens' arithmetic needs at the measured rate of large products."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoTokenizer

    sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
    train = importlib.import_module("04_train_stepdpo")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny/model")
    accelerator, pairs = Accelerator(mixed_precision="bf16"), train.Pairs()
    for row in rows:
        pairs.add(*train.encode(row, tokenizer))
    pairs.seal()
    if separate:
        train.collate = separate_rows(train)
    settings = train.Args(tokens_per_batch=args.tokens_per_batch)
    scorer = train.SuffixScorer(make_model(args))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    pairs.reference, seconds = torch.zeros(len(pairs), 2), []
    config = accelerator.unwrap_model(scorer).lm.config
    work = train.flops(pairs, range(args.pairs, len(pairs)), config, train.count_weights(config))
    bound = 3 * work / args.steps / importlib.import_module("estimate").matrix_rate(accelerator.device, "bf16")
    for step in range(args.steps + 1):
        batch, began = list(range(step * args.pairs, (step + 1) * args.pairs)), time.perf_counter()
        train.train_step(scorer, optimizer, pairs, batch, settings, accelerator)
        seconds.append(time.perf_counter() - began)
    return seconds, bound


def separate_rows(train):
    """collate() with a row [prefix | suffix] for each suffix of each pair: what sharing saves is computed again."""
    shared = train.collate

    def collate(pairs, rows, device):
        import torch

        apart = train.Pairs()
        for row in rows:
            for i in row:
                for suffix in pairs.suffixes[i]:
                    apart.add(pairs.prefixes[pairs.prefix[i]], [suffix], problem=f"{i} {len(apart)}")
        batch = shared(apart, [[i] for i in range(len(apart))], device)
        return batch | {"picks": torch.arange(len(apart), device=device).view(-1, 2)}

    return collate


def time_trl(args: Args, rows: list[dict], best: bool) -> tuple[list[float], None]:
    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            self.seconds.append(time.perf_counter() - self.began)

    clock, tokenizer = Clock(), AutoTokenizer.from_pretrained(ROOT / "data/tiny/model")
    with tempfile.TemporaryDirectory() as folder:
        more = {"precompute_ref_log_probs": True, "gradient_checkpointing": False} if best else {}
        config = DPOConfig(folder, per_device_train_batch_size=args.pairs, max_steps=args.steps + 1, bf16=True, beta=0.4,
                           learning_rate=1e-6, report_to="none", save_strategy="no", max_length=None, logging_steps=1,
                           use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, disable_tqdm=True,
                           **more)  # fmt: skip
        trainer = DPOTrainer(
            make_model(args), None if best else make_model(args), args=config, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    return clock.seconds, None


def child(args: Args):
    """Time one trainer at one ratio; print a JSON line."""
    import torch

    trainer, ratio = args.child.split("@")
    rows = make_rows(args, int(ratio))
    timed, bound = time_ours(args, rows, trainer == "ours-separate") if trainer.startswith("ours") else time_trl(
        args, rows, trainer == "trl-best")  # fmt: skip
    count = lambda row: sum(row[side].count(" ") for side in ("prompt", "chosen", "rejected")) + 2
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"trainer": trainer, "ratio": int(ratio), "seconds": timed[1:], "bound": bound, "peak_gib": peak / 2**30,
                      "pairs": args.pairs, "tokens": sum(map(count, rows[args.pairs :])) / args.steps}))  # fmt: skip


def main(args: Args):
    found, environment = [], os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    print("ratio trainer         s/step           range  pairs/s  tokens/s    GiB of bound x trl-best  memory")
    for ratio in args.ratios:
        rows = []
        for trainer in args.trainers:
            options = [f"--{name}={value}" for name, value in asdict(args).items() if isinstance(value, int)]
            options += ["--suffix", *map(str, args.suffix), f"--child={trainer}@{ratio}"]
            done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, env=environment)
            if done.returncode:
                print(f"{trainer} at ratio {ratio} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        bound = next((row["bound"] for row in rows if row["bound"]), float("nan"))
        best = next((row for row in rows if row["trainer"] == "trl-best"), None)
        for row in rows:
            seconds = np.median(row["seconds"])
            faster = f"{np.median(best['seconds']) / seconds:10.2f} {row['peak_gib'] / best['peak_gib']:7.2f}" if best else ""
            spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}"
            print(f"{ratio:5} {row['trainer']:14} {seconds:7.2f} {spread:>15} {row['pairs'] / seconds:8.2f} "
                  f"{row['tokens'] / seconds:9.0f} {row['peak_gib']:6.1f} {bound / seconds:8.0%} {faster}",
                  flush=True)  # fmt: skip
        found += rows
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps({"arguments": asdict(args), "found": found}, indent=1, default=str) + "\n")
    draw(found, Path(f"{args.out}.png"))


def draw(found: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for trainer in dict.fromkeys(row["trainer"] for row in found):
        rows = [row for row in found if row["trainer"] == trainer]
        ratios = [row["ratio"] for row in rows]
        rates = np.array([[row["pairs"] / s for s in (np.median(row["seconds"]), max(row["seconds"]), min(row["seconds"]))]
                          for row in rows]).T  # fmt: skip
        left.errorbar(ratios, rates[0], abs(rates[1:] - rates[0]), marker="o", capsize=3, label=trainer)
        right.plot(ratios, [row["peak_gib"] for row in rows], marker="o", label=trainer)
    for axis, title in ((left, "pairs/s (median, range over steps)"), (right, "peak memory (GiB)")):
        axis.set(xlabel="prefix tokens for each suffix token", title=title, xscale="log", ylim=(0, None))
        axis.set_xticks(sorted({row["ratio"] for row in found}), sorted({row["ratio"] for row in found}))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    child(arguments) if arguments.child else main(arguments)
