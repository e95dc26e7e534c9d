"""Train a model on preference pairs: the DPO loss over (prefix, chosen, rejected) (Step-DPO, arXiv
2406.18629, Eq. 2).

    accelerate launch --config_file configs/fsdp2.yaml --num_processes 8 04_train_stepdpo.py --gradient-checkpointing \\
        --tokens-per-batch 8192                              # the paper's 7B run, on 8 GPUs with 80 GB; with more options:
        ... --data xinlai/Math-Step-DPO-10K --sides full     # whole answers of the published pairs: the papers' DPO baseline
        ... --objective sft --data data/samples.jsonl --model Qwen/Qwen2-7B --lr 5e-6 --epochs 3 --batch-size 256 \\
        --schedule linear --warmup 0.03                      # the paper's SFT stage
    python 04_train_stepdpo.py --data runs/pairs.jsonl --model data/tiny/model --lr 1e-5 --epochs 2 --out runs/tuned

Input, a line a pair (the schema of xinlai/Math-Step-DPO-10K; other fields are ignored):
    {"prompt": "Ava has ...", "initial_reason_steps": "Let's think step by step.\\nStep 1: ...\\nStep 2:",
     "chosen": " 3 + 4 = 7.\\n", "rejected": " 3 + 4 = 8.\\n", "full_chosen": "...", "full_rejected": "..."}
or TRL's (whole responses; strings as they stand, or lists of messages; the prompt may stand within
both sides), or for SFT the output of 01_sample_errors.py, of which the right responses are taken,
once each, or solutions:
    {"prompt": "...", "chosen": "...", "rejected": "..."}        {"problem": "Ava has ...", "solution": "Let's think ..."}
    {"problem": "Ava has ...", "response": "Let's think ...", "correct": true}
or code-integrated pairs as in MathGenie/SCDPO-Data-Mistral-Ours, the prompt within both sides, a
turn a list of blocks:
    {"chosen": [{"role": "user", "content": [{"type": "text", "content": "Ava has ..."}]}, ...], "rejected": [...]}

Output: a Hugging Face folder with training.json, the settings and the last figures, and
metrics.jsonl, a line a logged step:
    {"step": 1, "loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "chosen_logp": -1.2, "rejected_logp": -4.1, ...}
analysis/plot_training.py makes the picture and the model card from these two.

What is particular here:
  - all pairs of a problem are one row, a tree in which each token stands once that several of them begin with; a mask shows
    each token its own path alone: the same log-probabilities as separate rows, at a fraction of the tokens;
  - the vocabulary is multiplied out at suffix positions only, once each, in chunks;
  - reference log-probabilities are computed once, from the untouched base weights, and cached in OUT: no second model;
  - master weights and the loss are fp32, also under bf16 autocast: a bf16 weight swallows a step of 5e-7;
  - a single step never ends in EOS; a suffix that ends the solution does;
  - the loss is the mean over the global batch, however it is packed and spread over processes.
The same command run again goes on from the last whole checkpoint, and does nothing where the run is
finished. analysis/estimate.py, with the same options, prints what a run needs of memory and time;
what does not fit by that count is not begun. """

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Literal, NoReturn

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

# Copied from 01_sample_errors.py
# How a step begins. The opening, the splitting and the stop strings follow from it.
STEP = "Step {number}:"
# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
# Copied from 01_sample_errors.py
PROBE = "1 + 1 = ?"  # the problem of the prompt that stands in the settings
# Copied from 01_sample_errors.py
# the assistant's text while a template is rendered: many trim it, some take thoughts out of it
MARK = "@@Steps so far@@"
MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm
LOGITS_BYTES = [
    1 << 28,
    1 << 30,
]  # fp32 logits made at once, on the CPU and on a GPU; more is not faster (docs/trainer.md)
STEP_FIELDS = (
    "prompt",
    "initial_reason_steps",
    "chosen",
    "rejected",
    "full_chosen",
    "full_rejected",
)
CHOSEN_DROP = (
    5.0  # nats: a mean fall of the chosen suffixes' log-probability that is worth a warning
)
MEMORY_WARN, MEMORY_STOP = (
    0.85,
    1.1,
)  # shares of the memory that is there, by count: allocators and kernels need some too
PRINTS = os.environ.get("RANK", "0") == "0"  # false on all processes but the first
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}  # dense bf16, data sheets


@dataclass
class Args:
    """Defaults are the paper's values for 7B, --max-length its code's; docs/departures.md has the
    rest."""

    data: tuple[str, ...] = ("data/pairs.jsonl",)
    """files of pairs, or data sets on the hub"""
    model: str = "Qwen/Qwen2-7B-Instruct"
    """folder or hub id of the model, which is the reference too"""
    out: Path = Path("runs/stepdpo")
    """folder to write"""
    chat_template: Path | None = None
    """Jinja file instead of the model's own chat template; give 01 to 03 the same"""
    chat_template_kwargs: str = "{}"
    """switches of the chat template, as JSON; give what 01 was given"""
    objective: Literal["dpo", "sft"] = "dpo"
    """dpo on pairs, or sft on solutions (mean over the batch's solution tokens)"""
    sides: Literal["step", "full"] = "step"
    """chosen and rejected, or full_chosen and full_rejected (plain DPO)"""
    train_execution: bool = False
    """train on what the code of code-integrated solutions printed, as the SCDPO authors' code
    does"""
    eos: bool = True
    """end a suffix that ends its solution with EOS; Step-DPO's code has none, SCDPO's one
    everywhere"""
    beta: float = 0.4
    """pull to the reference (paper: 0.4, for 72B 0.5; its scripts the other way round)"""
    label_smoothing: float = 0.0
    """assumed share of pairs that are the wrong way round"""
    epochs: int = 8
    """passes over the pairs (paper: 8, above 30B 4)"""
    lr: float = 5e-7
    """peak learning rate"""
    schedule: Literal["cosine", "linear"] = "cosine"
    """from the peak to zero, after a linear warm-up"""
    warmup: float = 0.1
    """share of all steps that warm up"""
    batch_size: int = 128
    """pairs of one optimizer step, over all processes; the gradient is their mean"""
    tokens_per_batch: int = 16384
    """tokens, padding included, of one forward pass on one device"""
    max_length: int = 1024
    """longest prefix + suffix; longer pairs are left out and counted, never cut"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of forward and backward; master weights are fp32. auto: bf16 where possible"""
    gradient_checkpointing: bool = False
    """compute activations twice to save memory"""
    ignore_memory: bool = False
    """train although by count the memory is too small"""
    lora_rank: int = 0
    """train adapters of this rank on all linear layers (needs peft); alpha is twice it"""
    lora_save: Literal["merged", "adapter"] = "merged"
    """save the whole model with the adapters in it, or the adapters alone"""
    validation: Path | None = None
    """file of pairs to watch accuracy and margin on"""
    validation_fraction: float = 0.0
    """share of the problems of --data to validate with instead of training on them"""
    eval_steps: int = 50
    """validate every so many steps, before the first and after the last"""
    save_steps: int = 100
    """checkpoint every so many steps"""
    keep: int = 2
    """checkpoints to keep; 0 removes them all when the model is saved"""
    log_steps: int = 1
    """log every so many steps"""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """where accelerate sends the figures too"""
    seed: int = 0
    """seed of the data order"""
    accept_edit: bool = False
    """resume after an edit of this file's code, or with pairs that another prompt made;
    training.json notes it"""


# What makes a step, with all that it uses: a run does not resume after an edit of it.
STEP_CODE = (
    "train_step",
    "make_optimizer",
    "learning_rate",
    "batches",
    "encode",
    "split_sides",
    "SuffixScorer",
)


def main(args: Args):
    began = time.time()
    accelerator, tokenizer, pairs, val_pairs = start(args)
    keep_memory() if accelerator.device.type == "cpu" else None
    if fault := from_first(accelerator, lambda: lock_out(args.out)):
        stop(fault)
    if from_first(accelerator, lambda: is_finished(args, tokenizer, pairs, val_pairs)):
        print_main(f"{args.out}: finished, nothing to do")
        return accelerator.end_training()
    lm, dtype = load_model(args, accelerator, pairs)
    weights = from_first(accelerator, lambda: weights_hash(args.model))
    settings = settings_of(args, tokenizer, weights, pairs, val_pairs)
    resume, done = checkpoint_to_resume(accelerator, args, settings)

    adapters = add_lora(lm, args) if args.lora_rank else None
    scorer, optimizer = accelerator.prepare(SuffixScorer(lm), make_optimizer(lm, args))
    scorer.train()
    if args.objective == "dpo":
        for some in filter(None, (pairs, val_pairs)):
            some.reference = reference_logps(scorer, some, args, accelerator, weights)
    if resume:
        accelerator.load_state(str(resume))
        print_main(f"resuming from {resume}")

    log = Log(accelerator, args, done)
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    total, sizes = per_epoch * args.epochs, count_weights(lm.config)
    if val_pairs and done == 0:
        log.record({"step": 0} | validate(scorer, val_pairs, args, accelerator))
    for step in tqdm(
        range(done + 1, total + 1), total=total, initial=done, desc="training", disable=not PRINTS
    ):
        epoch, place = divmod(step - 1, per_epoch)
        batch = batches(pairs, args, epoch)[place]
        rate = learning_rate(step - 1, total, args)
        for group in optimizer.param_groups:
            group["lr"] = rate

        found = train_step(scorer, optimizer, pairs, batch, args, accelerator)
        check(step, found, pairs, batch, args)
        found |= {"lr": rate} | device_use(
            pairs, batch, found["pairs_per_s"], lm.config, sizes, accelerator
        )
        if step % args.log_steps == 0 or step == total:
            log.record({"step": step, "epoch": epoch + 1} | found)
        if val_pairs and (step % args.eval_steps == 0 or step == total):
            log.record({"step": step} | validate(scorer, val_pairs, args, accelerator))
        if step % args.save_steps == 0 and step < total:
            save_checkpoint(accelerator, args, step, settings)

    save_model(accelerator, scorer, lm, adapters, tokenizer, args, dtype)
    if accelerator.is_main_process:
        finish(args, settings, pairs, total, log.lines, began)
    # freed before the process group is: with accelerate 1.15 and gloo about one exit in seven hung
    # the other way round
    scorer, optimizer = accelerator.free_memory(scorer, optimizer)
    accelerator.end_training()


def make_optimizer(lm, args: Args) -> torch.optim.Optimizer:
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)


def train_step(
    scorer, optimizer, pairs: Pairs, batch: list[int], args: Args, accelerator: Accelerator
) -> dict:
    """One optimizer step over the pairs `batch`. Returns the means over these pairs, the same on
    every process."""
    began, device, world = time.time(), accelerator.device, accelerator.num_processes
    deepspeed = accelerator.distributed_type == "DEEPSPEED"
    micro = plan(pairs, batch, args.tokens_per_batch, accelerator.process_index, world)
    weight = 1 / (len(batch) if args.objective == "dpo" else pairs.lengths[batch, 0].sum().item())
    sums = Counter()
    for number, (rows, most, counts) in enumerate(micro):
        numbers, inputs = sum(rows, []), collate(pairs, rows, device)
        last = number == len(micro) - 1
        if deepspeed:  # its engine steps within the backward pass that is said to be last
            accelerator.gradient_state._set_sync_gradients(last)
        # FSDP2 would keep whole gradients until they are synchronized: a model that needs shards
        # has no room for them
        at_once = last or deepspeed or accelerator.is_fsdp2
        with contextlib.nullcontext() if at_once else accelerator.no_sync(scorer):
            logps = scorer(**inputs, most=most)[inputs["picks"]]  # (pairs, sides)
            found = (
                dpo_loss(logps, pairs, numbers, args)
                if args.objective == "dpo"
                else {"loss": -logps[:, 0]}
            )
            # data-parallel gradients are averaged over processes, while the mean over the global
            # batch is meant
            accelerator.backward(counts * found["loss"].sum() * world * weight)
        found["tokens"] = torch.tensor([pairs.length(row) for row in rows], device=device)
        for name, values in found.items():
            sums[name] += counts * values.detach().double().sum()
        sums["places"] += torch.tensor(inputs["ids"].numel(), device=device)
    norm = accelerator.clip_grad_norm_(scorer.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    sums = {name: value.item() for name, value in accelerator.reduce(dict(sums), "sum").items()}
    tokens, places = sums.pop("tokens"), sums.pop("places")
    norm = (
        norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    )  # of all shards, not of the local part
    seconds = time.time() - began
    return {name: value * weight for name, value in sums.items()} | {
        "grad_norm": float(norm or 0.0),
        "padding": 1 - tokens / places,
        "pairs_per_s": len(batch) / seconds,
        "tokens_per_s": tokens / seconds,
    }


def dpo_loss(
    logps: torch.Tensor, pairs: Pairs, numbers: list[int], args: Args
) -> dict[str, torch.Tensor]:
    """The loss of the pairs `numbers` (Step-DPO, arXiv 2406.18629, Eq. 2) and what is logged: by
    name, (pairs,) each.

    Edit it here for another loss; docs/trainer.md has examples. It can use, chosen first: logps:
    (pairs, 2), log pi(suffix | prefix), summed over the trained tokens of the suffix, in nats;
    pairs.reference[numbers]: (pairs, 2), the same of the base model; pairs.lengths[numbers]:
    (pairs, 2), the number of these tokens; pairs.fields[i]: the numbers in the row of pair i, by
    name."""
    rewards = args.beta * (
        logps - pairs.reference[numbers].to(logps.device)
    )  # implicit rewards, (pairs, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    flipped = (
        args.label_smoothing
    )  # conservative DPO: the pair is the wrong way round with this probability
    loss = -(1 - flipped) * F.logsigmoid(margin) - flipped * F.logsigmoid(-margin)
    return {
        "loss": loss,
        "accuracy": (margin > 0).float(),
        "margin": margin,
        "chosen_reward": rewards[:, 0],
        "rejected_reward": rewards[:, 1],
        "chosen_logp": logps[:, 0],
        "rejected_logp": logps[:, 1],
    }


def validate(scorer, pairs: Pairs, args: Args, accelerator: Accelerator) -> dict[str, float]:
    """The figures of dpo_loss() over all pairs; an SFT loss is a mean over tokens."""
    logps = score_all(scorer, pairs, args, accelerator, "validation")
    if args.objective == "sft":
        return {"val_loss": -logps.sum().item() / pairs.lengths.sum().item()}
    found = dpo_loss(logps, pairs, list(range(len(pairs))), args)
    row = {
        f"val_{name}": values.mean().item()
        for name, values in found.items()
        if not name.endswith("_reward")
    }
    if row["val_accuracy"] == 1.0 and len(pairs) >= 20:
        warn(
            "validation accuracy 1.0: the pairs are too easy, or validation pairs stand in the training data"
        )
    return row


def learning_rate(step: int, total: int, args: Args) -> float:
    """Rate of step 0, 1, ...: a line up to the peak, then half a cosine, or a line, down to
    zero."""
    warm = math.ceil(args.warmup * total)
    if step < warm:
        return args.lr * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return args.lr * (
        0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else 1 - done
    )


def batches(pairs: Pairs, args: Args, epoch: int) -> list[list[int]]:
    """The pairs of each step of an epoch; those of one problem stay together, so that they share a
    row."""
    groups = np.random.default_rng([args.seed, epoch]).permutation(len(pairs.problems))
    order = np.argsort(groups[np.array(pairs.group)], kind="stable").tolist()
    return [
        order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)
    ]


def check(step: int, found: dict, pairs: Pairs, batch: list[int], args: Args):
    """Stop or warn where a step's figures say that something is wrong."""
    if not math.isfinite(found["loss"] + found["grad_norm"]):
        stop(
            f"step {step}: loss {found['loss']}, gradient norm {found['grad_norm']}; last good checkpoint: "
            f"{last_checkpoint(args.out) or 'none'}"
        )
    if step == 1:
        check_threads()
    if args.objective == "sft":
        return
    if step == 1:
        equal = (
            dpo_loss(pairs.reference[batch], pairs, batch, args)["loss"].mean().item()
        )  # what equal models have
        if abs(found["loss"] - equal) > 0.02 * max(1, equal):
            warn(
                f"first loss: {found['loss']:.4f} and not {equal:.4f}: policy and reference differ"
            )
        elif abs(equal - math.log(2)) > 1e-3:
            warn(f"first loss: {equal:.4f} and not ln 2 = 0.6931: dpo_loss() was edited")
    if found["chosen_reward"] < -CHOSEN_DROP * args.beta:
        warn(
            f"chosen suffixes: by more than {CHOSEN_DROP} nats less likely than under the reference; lower --lr"
        )


def keep_memory():
    """Have glibc keep what is freed: it gives every large tensor back to the system, which clears
    its pages anew."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def check_threads():
    """Warn where other work takes the cores that the threads of this process wait for each other
    on."""
    times = Path(
        "/proc/self/schedstat"
    )  # of the main thread: ns at work, ns in which it could have been
    if torch.cuda.is_available() or torch.get_num_threads() == 1 or not times.exists():
        return
    worked, waited, _ = map(int, times.read_text().split())
    if waited > worked / 2:
        warn(
            f"other work has the cores: {waited / (worked + waited):.0%} of the time went by in waiting for one, and each of "
            f"{torch.get_num_threads()} threads waits for the slowest; OMP_NUM_THREADS=1 may be far faster"
        )


# -------------------------------------------------------------------------------------------------
# start


def start(args: Args) -> tuple[Accelerator, object, Pairs, Pairs | None]:
    """Check the arguments; the accelerator, the tokenizer, pairs to train on and to validate
    with."""
    least = (
        args.epochs,
        args.batch_size,
        args.tokens_per_batch,
        args.eval_steps,
        args.save_steps,
        args.log_steps,
    )
    if min(least) < 1 or not 0 <= args.label_smoothing < 0.5 or not 0 <= args.warmup <= 1:
        stop(
            "--epochs, --batch-size, --tokens-per-batch and all --...-steps are at least 1, --label-smoothing is below 0.5"
        )
    if args.precision == "auto":
        args.precision = "bf16" if torch.cuda.is_available() or processor_has_bf16() else "fp32"
    rows = [row for name in args.data for row in load_rows(name, args.objective)]
    val_rows = load_rows(str(args.validation), args.objective) if args.validation else []
    if args.validation_fraction:
        problem = "problem" if args.objective == "sft" else "prompt"
        key = lambda row: f"{args.seed} {row.get(problem) or row['chosen'][:2]}".encode(
            errors="replace"
        )
        byte = lambda row: hashlib.sha256(key(row)).digest()[0]
        val_rows += [row for row in rows if byte(row) / 256 < args.validation_fraction]
        rows = [row for row in rows if byte(row) / 256 >= args.validation_fraction]
    accelerator = start_accelerate(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs)
    check_prompt(args, tokenizer)
    pairs = prepare(rows, tokenizer, args, " ".join(args.data))
    val_pairs = prepare(val_rows, tokenizer, args, "validation") if val_rows else None
    print_main(
        f"first row, what is trained on between | |: {tokenizer.decode(pairs.prefixes[0])!r}"
    )
    for ids in pairs.suffixes[0]:  # parted where training begins or ends
        parts = np.split(ids, np.flatnonzero(np.diff(pairs.trained(ids).astype(int))) + 1)
        print_main(
            "    "
            + "".join(
                f"|{tokenizer.decode(p)!r}|"
                if pairs.trained(ids)[0] ^ i % 2
                else repr(tokenizer.decode(p))
                for i, p in enumerate(parts)
            )
        )
    return accelerator, tokenizer, pairs, val_pairs


def check_prompt(args: Args, tokenizer):
    """Stop where the policy of a file of 03 was given another prompt than the one that is trained
    here."""
    for name in args.data:
        meta = Path(f"{name}.meta.json")
        made = json.loads(meta.read_text(encoding="utf-8"))["settings"] if meta.exists() else {}
        if "prompt" not in made or made.get("rectifier") or args.accept_edit:
            continue  # not a file of 03, made without a model, or by another model
        prompt = render_prompt(tokenizer, PROBE, made["opening"])
        if prompt != made["prompt"]:
            stop(
                f"{name} was made with {difference('prompt', made['prompt'], prompt)}; "
                "make the same edit here, give 03's --chat-template, or add --accept-edit"
            )


def start_accelerate(args: Args) -> Accelerator:
    """The accelerator of the launch configuration, set for batches that are planned here."""
    if args.tracker != "none" and not importlib.util.find_spec(args.tracker):
        stop(f"--tracker {args.tracker} needs its package: pip install {args.tracker}")
    log_with = None if args.tracker == "none" else args.tracker
    precision = "bf16" if args.precision == "bf16" else "no"
    try:
        accelerator = Accelerator(
            mixed_precision=precision, log_with=log_with, project_dir=args.out
        )
    except (
        ImportError,
        ValueError,
    ) as error:  # a package or a device that the launch configuration needs
        stop(f"accelerate cannot start: {error}")

    # without a GPU, accelerate 1.15 drops FSDP and DeepSpeed for plain data parallelism, or one
    # process, and says nothing
    found, world = str(accelerator.distributed_type.value), int(os.environ.get("WORLD_SIZE", 1))
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" and found != name:
            stop(
                f"{name} was asked for, but accelerate runs {found}; it needs GPUs, use configs/ddp.yaml without them"
            )
    if world != accelerator.num_processes:
        stop(
            f"{world} processes were started, but each trains alone; without a GPU set ACCELERATE_USE_CPU=true"
        )

    if found == "DEEPSPEED":  # asked for, though batches are planned here
        more = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": MAX_GRAD_NORM}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(more)
    if (
        accelerator.is_fsdp2 and args.precision == "bf16"
    ):  # accelerate's own would round what comes out, too, to 8 bits
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


# -------------------------------------------------------------------------------------------------
# pairs


def load_rows(name: str, objective: str) -> list[dict]:
    """Rows of a file, or of a data set on the hub (its train split). A row may have an empty side,
    which prepare() counts; stops where a row lacks a field of its format. For SFT, of 01's samples
    the right ones, once each."""
    if name.endswith(".jsonl") or Path(name).exists():
        rows = read_rows(Path(name), ())
    else:
        import datasets

        try:
            rows = list(datasets.load_dataset(name, split="train"))
        except (
            Exception
        ) as error:  # the library raises many kinds: no network, no such set, gated ...
            stop(
                f"--data {name}: no such file, and the hub does not give it ({str(error).splitlines()[0]})"
            )
    if objective == "sft":
        fields = (
            ("problem", "response", "correct") if "response" in rows[0] else ("problem", "solution")
        )
        print_main(f"{name}: training on the field {fields[1]!r}")
    else:
        fields = (
            STEP_FIELDS if "initial_reason_steps" in rows[0] else ("prompt", "chosen", "rejected")
        )
        fields = fields if "prompt" in rows[0] else ("chosen", "rejected")
    for number, row in enumerate(rows, 1):
        if missing := [field for field in fields if field not in row]:
            stop(
                f"--data {name}, row {number}: no {missing[0]!r}; every row needs {', '.join(fields)}"
            )
    if "prompt" not in rows[0] and objective == "dpo":
        return [
            explicit_prompt(row, f"--data {name}, row {number}")
            for number, row in enumerate(rows, 1)
        ]
    if "correct" not in fields:
        return rows

    right = [(row["problem"], row["response"]) for row in rows if row["correct"]]
    found = [
        {"problem": problem, "solution": response} for problem, response in dict.fromkeys(right)
    ]
    print_main(f"{name}: {len(rows)} samples, {len(right)} right, {len(found)} of these distinct")
    return found or stop(f"--data {name}: none of its {len(rows)} samples is right")


def explicit_prompt(row: dict, place: str) -> dict:
    """TRL's implicit prompt, text or messages with which both sides begin, made explicit; turns of
    blocks stay as they are."""
    sides = [row["chosen"] or "", row["rejected"] or ""]
    blocks = lambda turn: isinstance(turn, dict) and isinstance(turn.get("content"), list)
    if not all(isinstance(side, (str, list)) and not any(map(blocks, side)) for side in sides):
        return row
    same = [a == b for a, b in zip(*sides, strict=False)]
    shared = [*same, False].index(False)
    shared -= isinstance(sides[0], str) and sides[0][:shared].endswith(
        " "
    )  # a space belongs to the token behind it
    if all(sides) and not shared:
        stop(
            f"{place}: no 'prompt', and chosen and rejected do not begin alike; every row needs a prompt"
        )
    return row | {
        "prompt": sides[0][:shared],
        "chosen": sides[0][shared:],
        "rejected": sides[1][shared:],
    }


def split_sides(row: dict, sides: str) -> tuple[str, list[str], list[bool]]:
    """The assistant's text that both sides share, the two sides behind it, and whether each ends
    its solution.

    full_chosen and full_rejected are whole responses in 03's file; in the published set they go on
    behind initial_reason_steps, which its own trainer joins to them as they are."""
    names, given = ("chosen", "rejected"), row["initial_reason_steps"] or ""
    opening = given.rstrip(" ")  # a space before the suffix belongs to the suffix's first token
    steps = [
        given[len(opening) :] + (row[name] or "").rstrip(" ") for name in names
    ]  # one after it, to the next step's
    fulls = [row[f"full_{name}"] or "" for name in names]
    if sides == "step":
        same = lambda text, full: (
            full.split() in (text.split(), (opening + text).split())
        )  # blank lines differ in some rows
        return (
            opening,
            steps,
            [same(*texts) and not cut_short(texts[1]) for texts in zip(steps, fulls, strict=True)],
        )
    for i, full in enumerate(fulls):
        if not full.startswith(given.strip()):
            space = re.match(r"\s*", full)[0] or re.match(r"\s*", steps[i])[0] or " "
            fulls[i] = opening + space + full.lstrip()
    forced = re.match(".*?" + re.escape(STEP.format(number=1)), given, re.S)
    opening = forced[0] if forced else opening
    return (
        opening,
        [full[len(opening) :] for full in fulls],
        [not cut_short(full) for full in fulls],
    )


def cut_short(text: str) -> bool:
    """Whether a text stops within a formula, where the limit on tokens cut it: no EOS belongs
    there."""
    opened, closed = (
        len(re.findall(rf"(?<!\\)(?:{marks})", text)) for marks in (r"\\[\[(]|\{", r"\\[\])]|\}")
    )
    return opened > closed


def render_turns(messages: list[dict]) -> str:
    """Turns of blocks as the SCDPO authors render them; "assistant_correct" is the part of an
    answer that both sides share. The assistant's turn is left open: encode() ends it."""
    text = ""
    for turn in messages:
        role = turn["role"].removesuffix("_correct")
        text += f"<|{role}|>" * (role != "assistant" or "<|assistant|>" not in text)
        text += "".join(
            f"<|{block['type']}|>{block['content']}<|endofblock|>" for block in turn["content"]
        )
        text += "<|endofmessage|>" * (role != "assistant")
    return text


def encode(row: dict, tokenizer, sides: str = "step") -> tuple[list[int], list[list[int]]]:
    """Token ids of the prefix and of its suffixes: chosen and rejected, or the solution alone
    (SFT)."""
    eos, special, ends = tokenizer.eos_token_id, False, [True, True]
    if "initial_reason_steps" in row:
        opening, texts, ends = split_sides(row, sides)
        text = render_prompt(tokenizer, row["prompt"], opening)
    elif "solution" in row:
        text, texts = render_prompt(tokenizer, row["problem"], ""), [row["solution"]]
    elif "prompt" not in row:
        text, special = (
            render_turns([*row["chosen"][:-1], {"role": "assistant", "content": []}]),
            True,
        )
        texts = [render_turns(row[side])[len(text) :] for side in ("chosen", "rejected")]
        if not render_turns(row["rejected"]).startswith(text):
            raise TypeError("chosen and rejected differ before their last turn")
    elif len({isinstance(row[field], str) for field in ("prompt", "chosen", "rejected")}) > 1:
        raise TypeError(
            "of prompt, chosen and rejected some are texts and some are messages; give all in one form"
        )
    elif isinstance(row["prompt"], str):
        text, special, texts = row["prompt"], True, [row["chosen"], row["rejected"]]
    else:
        render = functools.partial(
            tokenizer.apply_chat_template, tokenize=False, **getattr(tokenizer, "switches", {})
        )
        text = render(row["prompt"], add_generation_prompt=True)
        wholes = [render(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        if not all(whole.startswith(text) for whole in wholes):
            raise ValueError(
                f"the chat template renders the prompt alone in another way, as {text[-60:]!r}"
            )
        texts = [whole[len(text) :] for whole in wholes]

    ids_of = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    prefix, suffixes = ids_of(text), []
    for suffix, end in zip(texts, ends, strict=False):
        if end and suffix.endswith(
            "<|endofblock|>"
        ):  # as in the SCDPO authors' data; 01 samples up to there
            suffix += "<|endofmessage|>"
        joint = ids_of(text + suffix)
        ids = joint[len(prefix) :]
        if (
            joint[: len(prefix)] != prefix
        ):  # a token would span the boundary: the prefix was given, the suffix drawn
            ids = ids_of(suffix)
        # a single step gets no EOS: it would teach to stop half-way; a template may have closed a
        # whole turn already
        suffixes.append([*ids, eos] if end and eos not in ids[-2:] else ids)
    # what the tokenizer puts before a plain text; not what some put after it, EOS, which would
    # stand in the middle
    if special:
        whole = tokenizer(text)["input_ids"]
        prefix = (
            whole[: next((k for k in range(len(whole)) if whole[k : k + len(prefix)] == prefix), 0)]
            + prefix
        )
    return prefix, suffixes


@dataclass
class Tree:
    """A row of a batch: the sequences of some pairs of one problem, each token once that they begin
    with alike, a branch after the other. (tokens,) each: ids; positions, in their sequences;
    parent, the place of the token before; last, where what grows from a token ends. targets: the
    places of all tokens to predict. paths: for each distinct suffix, where among the targets its
    own are; picks: for each pair, its suffixes among the paths."""

    ids: np.ndarray
    positions: np.ndarray
    parent: np.ndarray
    last: np.ndarray
    targets: np.ndarray
    paths: list[np.ndarray]
    picks: list[list[int]]


class Pairs:
    """Encoded pairs as int32 arrays (100,000 take some 100 MB). Pair i: the ids of its prefix,
    prefixes[prefix[i]], and of its suffixes, suffixes[i]: chosen and rejected, or the solution
    alone; group[i]: the number of its problem. reference: (pairs, 2), see reference_logps();
    lengths: (pairs, sides), trained tokens; fields[i]: the numbers in the pair's row."""

    def __init__(self, execution: tuple[int, int] | None = None):
        """`execution`: the tokens in which a block that is not trained on begins and ends."""
        self.prefixes, self.prefix, self.group, self.suffixes = [], [], [], []
        self.known, self.problems = {}, {}
        self.reference, self.fields, self.lengths, self.execution = None, [], None, execution

    def __len__(self):
        return len(self.group)

    def add(
        self,
        prefix: list[int],
        suffixes: list[list[int]],
        problem: str = "",
        fields: dict | None = None,
    ):
        """`problem`: pairs of the same one are trained on together; without it, those of the same
        prefix are."""
        ids = np.array(prefix, dtype=np.int32)
        self.prefix.append(self.known.setdefault(ids.tobytes(), len(self.prefixes)))
        if self.prefix[-1] == len(self.prefixes):
            self.prefixes.append(ids)
        self.group.append(self.problems.setdefault(problem or ids.tobytes(), len(self.problems)))
        self.suffixes.append([np.array(suffix, dtype=np.int32) for suffix in suffixes])
        self.fields.append(fields or {})

    def trained(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens of a suffix are trained on: all but what an interpreter printed, with its
        marks."""
        if not self.execution:
            return np.ones(len(ids), dtype=bool)
        begin, end = self.execution
        block = np.cumsum(ids == end) - (ids == end)  # its number, for each token
        return ~np.isin(block, block[ids == begin])

    def tree(self, numbers: list[int]) -> Tree:
        """The row of these pairs."""
        keys = {}
        picks = [
            [
                keys.setdefault((self.prefix[i], ids.tobytes()), len(keys))
                for ids in self.suffixes[i]
            ]
            for i in numbers
        ]
        suffixes = [np.frombuffer(raw, dtype=np.int32) for _, raw in keys]
        wholes = [
            np.concatenate([self.prefixes[prefix], ids])
            for (prefix, _), ids in zip(keys, suffixes, strict=True)
        ]
        ids, positions, parent, last = np.zeros((4, sum(map(len, wholes))), dtype=np.int64)
        count, path, before, places = 0, np.zeros(0, dtype=np.int64), wholes[0][:0], {}
        for k in sorted(
            keys.values(), key=lambda k: wholes[k].tolist()
        ):  # sorted, neighbours share the most
            whole, common = wholes[k], min(len(before), len(wholes[k]))
            shared = int(np.argmin(np.r_[before[:common] == whole[:common], False]))
            last[path[shared:]] = count
            path = np.r_[path[:shared], np.arange(count, count + len(whole) - shared)]
            ids[path], positions[path], parent[path[1:]] = whole, np.arange(len(whole)), path[:-1]
            places[k] = path[len(whole) - len(suffixes[k]) :][self.trained(suffixes[k])]
            count, before = count + len(whole) - shared, whole
        last[path] = count
        targets = np.unique(np.concatenate(list(places.values())))
        paths = [np.searchsorted(targets, places[k]) for k in keys.values()]
        return Tree(
            ids[:count], positions[:count], parent[:count], last[:count], targets, paths, picks
        )

    def by_problem(self, numbers) -> list[list[int]]:
        """These pairs, those of one problem together."""
        found = {}
        for i in numbers:
            found.setdefault(self.group[i], []).append(i)
        return list(found.values())

    def length(self, numbers: list[int]) -> int:
        """Tokens of the row that holds these pairs."""
        return len(self.tree(numbers).ids)

    def seal(self):
        """When all pairs are added."""
        self.lengths = torch.tensor(
            [[int(self.trained(ids).sum()) for ids in sides] for sides in self.suffixes]
        )

    def digest(self) -> str:
        found = hashlib.sha256(str(self.execution or "").encode())
        found.update(str(self.group).encode())
        for prefix, suffixes in zip(self.prefix, self.suffixes, strict=True):
            for ids in (self.prefixes[prefix], *suffixes):
                found.update(len(ids).to_bytes(4, "big") + ids.tobytes())
        return found.hexdigest()


def prepare(rows: list[dict], tokenizer, args: Args, name: str) -> Pairs:
    """Encode; print what there is and what was left out, and why."""
    blocks = tokenizer.convert_tokens_to_ids(["<|execution|>", "<|endofblock|>"])
    known = None not in blocks and tokenizer.unk_token_id not in blocks
    pairs = Pairs(tuple(blocks) if known and not args.train_execution else None)
    left_out, seen, blank = Counter(), set(), []
    for number, row in enumerate(
        tqdm(rows, desc="encoding", disable=not PRINTS, leave=False, mininterval=1), 1
    ):
        fields = ("problem", "solution") if "solution" in row else ("prompt", "chosen", "rejected")
        if "initial_reason_steps" in row and args.sides == "full":
            fields = ("prompt", "full_chosen", "full_rejected")
        if not all(
            str(row[field] or "").strip() for field in fields if field != "prompt" or field in row
        ):
            blank.append(str(number))
            left_out["with an empty side"] += 1
            continue
        try:
            prefix, suffixes = encode(row, tokenizer, args.sides)
            if not known and "<|endofblock|>" in str(row):
                stop(
                    f"{name}, row {number}: its blocks are no tokens of {args.model}; see analysis/add_block_tokens.py"
                )
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            stop(
                f"{name}, row {number}: {error.__class__.__name__}: {error}; see the formats in {Path(__file__).name}"
            )
        except (ValueError, jinja2.TemplateError) as error:
            stop(
                f"--model {args.model}: its chat template fails ({error}); give another by --chat-template"
            )
        if not args.eos:
            suffixes = [
                suffix[:-1] if suffix[-1:] == [tokenizer.eos_token_id] else suffix
                for suffix in suffixes
            ]
        if len(prefix) + max(map(len, suffixes)) > args.max_length:
            left_out["above --max-length"] += 1
        elif not all(suffixes) or len(suffixes) == 2 and suffixes[0] == suffixes[1]:
            left_out["without contrast"] += 1
        else:
            problem = str(row.get("prompt") or row.get("problem") or row["chosen"][:2])
            pairs.add(
                prefix,
                suffixes,
                problem,
                {key: value for key, value in row.items() if isinstance(value, (int, float))},
            )
            seen.add(hashlib.sha256(repr((prefix, suffixes)).encode()).digest())
    if blank:
        print_main(
            f"{name}: an empty side in row {', '.join(blank[:20])}{' ...' if len(blank) > 20 else ''}"
        )
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    if not len(pairs):
        stop(f"{name}: no pair is left of {len(rows)}: {why}")
    print_main(
        f"{name}: {len(pairs)} pairs of {len(pairs.problems)} problems; left out: {why}; "
        f"kept though repeated: {len(pairs) - len(seen)}"
    )
    pairs.seal()
    return pairs


def plan(
    pairs: Pairs, numbers, tokens: int, rank: int, world: int
) -> list[tuple[list[list[int]], int, int]]:
    """Micro-batches of this process for the pairs `numbers`: (rows, most, counts), rows at most
    `tokens` with their padding.

    Pairs of one problem come in one row, as far as `tokens` allow. Sharded strategies wait for each
    other in every pass and at every call of the head: so every process gets the same number of
    micro-batches, and the most suffix positions that one has in each. Where rows run out, a batch
    repeats one pair, to be computed and not counted: counts 0."""
    rows = []
    for group in pairs.by_problem(numbers):
        fits, row = (
            pairs.length(group) <= tokens,
            [],
        )  # nearly always, and a tree for each part of it takes time
        for i in group:
            if not row or not fits and pairs.length([*row, i]) > tokens:
                rows.append(row := [])
            row.append(i)
    sized = sorted((pairs.length(row), row) for row in rows)
    dealt, loads = [[] for _ in range(world)], [0] * world
    for length, row in reversed(sized):  # the longest first, each to who has least
        process = loads.index(min(loads))
        loads[process] += length
        dealt[process].insert(0, (length, row))

    passes = [[] for _ in range(world)]
    for own, found in zip(dealt, passes, strict=True):
        for length, row in own:
            if (
                not found or (len(found[-1]) + 1) * length > tokens
            ):  # sorted: this row is the longest
                found.append([])
            found[-1].append(row)
    count, mine = max(map(len, passes)), len(passes[rank])
    passes = [own + [[sized[0][1][:1]]] * (count - len(own)) for own in passes]
    targets = lambda rows: sum(len(pairs.tree(row).targets) for row in rows)
    most = [max(map(targets, side_by_side)) for side_by_side in zip(*passes, strict=True)]
    return [(rows, most[number], int(number < mine)) for number, rows in enumerate(passes[rank])]


def collate(pairs: Pairs, rows: list[list[int]], device) -> dict:
    """Rows, each a list of numbers of pairs of one problem, as trees; padded on the right, by token
    0.

    For prefix [a b], chosen [c d], rejected [c e]:  ids [a b c d e], positions [0 1 2 3 3]; token i
    sees token j if j <= i < last[j], with last [5 5 5 4 5]: what the sequences share is seen by
    both, the rest by its own alone. c is predicted at b, d and e at c: source [1 2 2], target [c d
    e]; take [0 1 0 2] are the targets of the suffixes in turn, owner [0 0 1 1] whose they are.
    picks [[0 1]]: a pair's chosen and rejected among all suffixes."""
    trees = [pairs.tree(numbers) for numbers in rows]
    width = max(len(tree.ids) for tree in trees)
    ids, positions = np.zeros((2, len(rows), width), dtype=np.int64)
    last = np.tile(
        np.arange(1, width + 1), (len(rows), 1)
    )  # padding sees itself: a row of nothing would be NaN
    source, target, take, owner, picks, targets = [], [], [], [], [], 0
    for b, tree in enumerate(trees):
        here, count = slice(len(tree.ids)), len(owner)
        ids[b, here], positions[b, here], last[b, here] = tree.ids, tree.positions, tree.last
        source.append(b * width + tree.parent[tree.targets])
        target.append(tree.ids[tree.targets])
        take += [targets + path for path in tree.paths]
        owner += [np.full(len(path), number) for number, path in enumerate(tree.paths, count)]
        picks += [[count + place for place in places] for places in tree.picks]
        targets += len(tree.targets)
    parts = {"source": source, "target": target, "take": take, "owner": owner}
    batch = {"ids": ids, "positions": positions, "last": last, "picks": np.array(picks)}
    batch |= {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return {
        name: torch.from_numpy(array.astype(np.int64)).to(device) for name, array in batch.items()
    }


# -------------------------------------------------------------------------------------------------
# the model


def load_model(args: Args, accelerator: Accelerator, pairs: Pairs):
    """The model without dropout, and the dtype to save it in. Weights are fp32, but for a frozen
    base and where DeepSpeed keeps fp32 masters of its own.

    Under FSDP, by fsdp_cpu_ram_efficient_loading, the first process of a machine alone reads the
    files; ZeRO-3 builds the model in shards, and what is read of the files is memory that processes
    share."""
    own_masters = args.lora_rank or accelerator.distributed_type == "DEEPSPEED"
    try:
        config = AutoConfig.from_pretrained(args.model)
        check_memory(config, args, accelerator, pairs)
        for name in vars(config):
            if name.endswith(("dropout", "pdrop")) and isinstance(getattr(config, name), float):
                setattr(
                    config, name, 0.0
                )  # the reference has none either: with it, step 0 would not be ln 2
        dtype = config.dtype if own_masters and args.precision == "bf16" else torch.float32
        lm = AutoModelForCausalLM.from_pretrained(
            args.model, config=config, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        stop(f"--model {args.model}: cannot be loaded ({str(error).splitlines()[0]})")
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.enable_input_require_grads() if args.lora_rank else None
    return lm, config.dtype or torch.bfloat16


def add_lora(lm, args: Args):
    """Put adapters into `lm`, in place; the returned peft model is needed to save it."""
    try:
        import peft
    except ImportError:
        stop("--lora-rank needs peft: pip install peft")
    torch.manual_seed(args.seed)  # every process draws the same adapters
    settings = {
        "r": args.lora_rank,
        "lora_alpha": 2 * args.lora_rank,
        "target_modules": "all-linear",
    }
    return peft.get_peft_model(lm, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))


class SuffixScorer(torch.nn.Module):
    """Summed log-probability of each suffix given its prefix: (suffixes,), fp32, in nats."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self._no_split_modules = getattr(lm, "_no_split_modules", None)  # what FSDP wraps

    def tie_weights(
        self,
    ):  # accelerate calls it after it has loaded the shards; else a tied head would be of its own
        self.lm.tie_weights()

    def forward(self, ids, positions, last, source, target, take, owner, picks, most: int = 1):
        """ids, positions, last: (rows, width); source, target: (targets,); take, owner: (suffix
        tokens,); picks: for the caller. The logits of `most` targets, or fewer, are made in chunks;
        with several, again in the backward pass."""
        at = torch.arange(ids.shape[1], device=ids.device)
        sees = (at[:, None] >= at) & (
            at[:, None] < last[:, None, :]
        )  # (rows, width, width); see collate
        masks = {"full_attention": sees[:, None]}
        if window := getattr(self.lm.config, "sliding_window", None):
            masks["sliding_attention"] = (
                sees & (positions[:, :, None] - positions[:, None, :] < window)
            )[:, None]
        kinds = set(
            getattr(self.lm.config, "layer_types", None)
            or ["sliding_attention" if window else "full_attention"]
        )
        mask = masks if len(kinds) > 1 else masks.get(kinds.pop(), masks["full_attention"])
        hidden = self.lm.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state.flatten(0, 1)[source]  # (targets, hidden size)
        head, chunks = (
            self.token_logps,
            math.ceil(most * 4 * self.lm.config.vocab_size / LOGITS_BYTES[ids.is_cuda]),
        )
        if torch.is_grad_enabled() and chunks > 1:
            head = functools.partial(checkpoint, self.token_logps, use_reentrant=False)
        parts = map(head, hidden.tensor_split(chunks), target.tensor_split(chunks))
        sums = torch.zeros(int(picks.max()) + 1, dtype=torch.float32, device=ids.device)
        return sums.index_add(0, owner, torch.cat(list(parts))[take])

    def token_logps(self, hidden, target):
        logits = self.lm.get_output_embeddings()(hidden).float()  # (tokens, vocabulary)
        if cap := getattr(self.lm.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return -F.cross_entropy(logits, target, reduction="none")


@torch.no_grad()
def score_all(
    scorer, pairs: Pairs, args: Args, accelerator: Accelerator, label: str
) -> torch.Tensor:
    """Log-probabilities of all pairs, (pairs, sides) on the CPU, the same on every process; in the
    passes of the first epoch: in others bf16 rounds in another way (docs/trainer.md)."""
    found = torch.zeros(len(pairs), len(pairs.suffixes[0]), device=accelerator.device)
    for batch in tqdm(batches(pairs, args, 0), desc=label, disable=not PRINTS, leave=False):
        micro = plan(
            pairs,
            batch,
            args.tokens_per_batch,
            accelerator.process_index,
            accelerator.num_processes,
        )
        for rows, most, counts in micro:
            inputs = collate(pairs, rows, accelerator.device)
            logps = scorer(**inputs, most=most)[inputs["picks"]]
            if counts:
                found[sum(rows, [])] = logps
    return accelerator.reduce(found, "sum").cpu()


def reference_logps(
    scorer, pairs: Pairs, args: Args, accelerator: Accelerator, weights: str
) -> torch.Tensor:
    """Log-probabilities under the base weights, from OUT/reference-*.npy where weights, token ids
    (so data and template), precision and the code that computes them are the same."""
    code = "".join(map(inspect.getsource, (SuffixScorer, collate, Pairs.tree, Pairs.trained)))
    key = hashlib.sha256(
        (weights + code + torch.__version__ + args.precision + pairs.digest()).encode()
    ).hexdigest()[:16]
    path = args.out / f"reference-{key}.npy"
    kept = from_first(accelerator, lambda: np.load(path) if path.exists() else None)
    if kept is not None:
        print_main(f"reference log-probabilities: {path}")
        return torch.from_numpy(kept)
    found = score_all(scorer, pairs, args, accelerator, "reference")
    if accelerator.is_main_process:
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, found.numpy())
        temporary.replace(path)
    return found


def weights_hash(model: str) -> str:
    """Of the weight files, once they are here: names, sizes and 64 MiB of each, spread over it;
    smaller ones whole."""
    folder, digest, block = (
        Path(cached_file(model, "config.json")).parent,
        hashlib.sha256(),
        1 << 20,
    )
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        file = np.memmap(path, mode="r")
        digest.update(f"{path.name} {len(file)} ".encode())
        for start in np.linspace(
            0, max(0, len(file) - block), min(64, math.ceil(len(file) / block)), dtype=np.int64
        ):
            digest.update(file[start : start + block])
    return digest.hexdigest()


def count_weights(config) -> tuple[int, int]:
    """Weights of the layers and of the head; an embedding that is only looked up does no
    arithmetic."""
    with torch.device(
        "meta"
    ):  # by the class: from_config() would build it in ZeRO-3's shards, which meta has not
        lm = AutoModelForCausalLM._model_mapping[type(config)](config)
    head, embedding = lm.get_output_embeddings().weight, lm.get_input_embeddings().weight
    return sum(p.numel() for p in lm.parameters()) - head.numel() * (
        1 if head is embedding else 2
    ), head.numel()


def memory(
    config, args: Args, strategy: str, world: int, machines=1, offloaded=0.0, on_gpu=True, passes=2
) -> dict[str, float]:
    """Bytes by count. strategy: "copies" (one process, or the whole model on each), "fsdp2" or
    "zero3"; offloaded: the share of AdamW's state that ZeRO-3 keeps in main memory; passes: of a
    step, of --tokens-per-batch tokens each. Keys that begin with "machine" are of main memory on
    one machine."""
    body, head = count_weights(config)
    parameters, low = (
        body + head * (1 if config.tie_word_embeddings else 2),
        2 if args.precision == "bf16" else 4,
    )
    layer, copies = body / config.num_hidden_layers, 0 if low == 4 else 2  # of weights, by autocast
    trained = 0 if args.lora_rank else parameters
    frozen = low * (parameters - trained)
    # of a token and layer, what autograd keeps of a gated MLP and of the rest, by count of its
    # tensors, without attention scores; checkpointing keeps the layer's input, which is fp32 where
    # weights are, and one layer's all
    width, layers = config.hidden_size, config.num_hidden_layers
    token = (
        34 * width + 8 * config.intermediate_size
        if low == 2
        else 40 * width + 16 * config.intermediate_size
    )
    entry = (4 if strategy == "copies" else low) * width
    activations = args.tokens_per_batch * (
        layers * entry + token if args.gradient_checkpointing else layers * token
    )
    if (
        strategy == "copies"
    ):  # fp32 weights and two moments, gradients; DDP sends these from buckets of their own
        gradients = (8 if world > 1 else 4) * trained
        if passes == 1 and world == 1:  # they grow as the activations go, from the head's on
            gradients = min(gradients, max(4 * head, gradients - activations))
        adding = (
            4 * head if trained else 0
        )  # a chunk's gradient of the head, before it is added to the others'
        found = {"weights, gradients, AdamW": (12 + copies) * trained + gradients + adding + frozen}
        found["machine: model read by every process"] = world / machines * (4 * trained + frozen)
    elif (
        strategy == "fsdp2"
    ):  # gathered: embedding and head throughout, two layers; a layer's gradients in fp32
        found = {"weights, gradients, AdamW": (16 * trained + frozen) / world}
        found["gathered"] = low * (2 * head + 2 * layer) + 4 * layer
        found["machine: model read by one process"] = 4 * trained + frozen
    # weights and gradients in 16 bits, fp32 masters and moments; by default 1e9 weights are
    # gathered at most
    else:
        on_device = 12 * (1 - offloaded) * trained + low * (2 - (offloaded > 0)) * trained + frozen
        found = {"weights, gradients, AdamW": on_device / world}
        found["gathered"] = low * min(1e9, parameters)
        found["machine: AdamW and gradients"] = (
            (12 * offloaded + low * (offloaded > 0)) * trained / machines
        )
        found["machine: files of the model, shared"] = 2 * parameters
    found["activations"] = activations
    found["logits"] = 3 * min(LOGITS_BYTES[on_gpu], 4 * args.tokens_per_batch * config.vocab_size)
    if not on_gpu:
        found["Python and its libraries"] = 0.7e9
        # freed memory that does not fit what is asked for next, see keep_memory(); measured,
        # docs/trainer.md
        found["holes in the heap"] = (16 * head if trained else 0) + activations / 4
    return found


def strategy_of(accelerator: Accelerator) -> tuple[str, float]:
    """The name that memory() knows, and the share of AdamW's state in main memory."""
    if accelerator.distributed_type == "DEEPSPEED":
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        offload = zero.get("offload_optimizer") or {}
        return "zero3", offload.get("ratio", 1.0) if offload.get("device") == "cpu" else 0.0
    return ("fsdp2" if accelerator.distributed_type == "FSDP" else "copies"), 0.0


def check_memory(config, args: Args, accelerator: Accelerator, pairs: Pairs):
    """Warn or stop where memory() counts more than there is, and name the launch file and the
    options that fit."""
    device, world = accelerator.device, accelerator.num_processes
    local, on_gpu = int(os.environ.get("LOCAL_WORLD_SIZE", world)), device.type == "cuda"
    main_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = torch.cuda.get_device_properties(device).total_memory if on_gpu else main_memory / local
    longest = max(
        len(pairs.prefixes[p]) + sum(map(len, sides))
        for p, sides in zip(pairs.prefix, pairs.suffixes, strict=True)
    )

    def fullest(args: Args, strategy: str, world: int, offloaded: float) -> tuple[float, str]:
        """The memory of which most is used: the share, and its description."""
        step = args.batch_size * longest  # tokens of a step at most
        passes = 1 if step <= args.tokens_per_batch else 2
        args = replace(args, tokens_per_batch=min(args.tokens_per_batch, step))
        found = memory(
            config, args, strategy, world, max(1, world // local), offloaded, on_gpu, passes
        )
        needs = {
            on_machine: sum(
                size
                for name, size in found.items()
                if name.startswith("machine") == on_machine and not name.endswith("shared")
            )
            for on_machine in (False, True)
        }
        places = [("a device", needs[False], room)] + [
            ("the machine", needs[True], main_memory)
        ] * on_gpu
        share, place, need, size = max(
            (need / size, place, need, size) for place, need, size in places
        )
        return share, f"{place} needs {need / 1e9:.1f} GB of {size / 1e9:.1f}, {share:.0%}"

    launch = (*strategy_of(accelerator)[:1], world, strategy_of(accelerator)[1])
    share, said = fullest(args, *launch)
    if share <= MEMORY_WARN:
        return
    saving = replace(
        args, gradient_checkpointing=True, tokens_per_batch=min(args.tokens_per_batch, 8192)
    )
    flags = f"--gradient-checkpointing --tokens-per-batch {saving.tokens_per_batch}"
    tries = [(flags, saving, *launch)]
    if on_gpu:
        count = world if world > 1 else torch.cuda.device_count()
        fsdp2 = "multi_node.yaml" if world > local else "fsdp2.yaml"
        named = "accelerate launch --config_file configs/{} --num_processes " + str(count)
        tries += [
            (named.format(fsdp2), args, "fsdp2", count, 0.0),
            (f"{named.format(fsdp2)} with {flags}", saving, "fsdp2", count, 0.0),
            (f"{named.format('zero3_offload.yaml')} with {flags}", saving, "zero3", count, 0.75),
        ]
    fits = (
        f"it fits by {name} ({found[1]})"
        for name, *how in tries
        if (found := fullest(*how))[0] <= MEMORY_WARN
    )
    message = f"by count {said}: {next(fits, 'nothing in configs/ fits; take more devices, or --lora-rank 16')}"
    if share > MEMORY_STOP and not args.ignore_memory:
        stop(
            f"{message}. analysis/estimate.py shows the parts; --ignore-memory trains all the same"
        )
    warn(message)


def flops(pairs: Pairs, numbers, config, sizes: tuple[int, int]) -> float:
    """Floating-point operations of one forward pass over the rows of these pairs: 2 a weight of the
    layers and token, 2 a weight of the head and suffix token, 4 * layers * width for each two
    tokens of which one sees the other."""
    (body, head), total = sizes, 0.0
    for tree in map(pairs.tree, pairs.by_problem(numbers)):
        total += 2 * body * len(tree.ids) + 2 * head * len(tree.targets)
        total += (
            4 * config.num_hidden_layers * config.hidden_size * float((tree.positions + 1).sum())
        )
    return total


def device_use(
    pairs: Pairs, batch: list[int], pairs_per_s: float, config, sizes, accelerator: Accelerator
) -> dict[str, float]:
    """Of a GPU: most memory so far, in GiB, and the share of its peak rate (MFU), with 3 forward
    passes' operations a step."""
    if accelerator.device.type != "cuda":
        return {}
    found, name = (
        {"peak_gib": torch.cuda.max_memory_allocated() / 2**30},
        torch.cuda.get_device_name(),
    )
    for peak in [rate for known, rate in PEAK_FLOPS.items() if known in name][:1]:
        rate = 3 * flops(pairs, batch, config, sizes) * pairs_per_s / len(batch)
        found["mfu"] = rate / peak / accelerator.num_processes
    return found


# -------------------------------------------------------------------------------------------------
# what is printed and written


def print_main(text: str):
    tqdm.write(text, file=sys.stderr) if PRINTS else None


@functools.cache
def warn(text: str):
    """Once for each text."""
    print_main(f"warning: {text}")


class Log:
    """OUT/metrics.jsonl, the tracker and the terminal; `lines` are all since the first step."""

    def __init__(self, accelerator: Accelerator, args: Args, done: int):
        self.accelerator, self.path, self.lines = accelerator, args.out / "metrics.jsonl", []
        if accelerator.is_main_process:
            self.lines = (
                [line for line in read_rows(self.path, ("step",)) if line["step"] <= done]
                if done
                else []
            )
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        if args.tracker != "none":
            accelerator.init_trackers(
                "stepdpo", config={name: str(value) for name, value in asdict(args).items()}
            )

    def record(self, row: dict):
        self.lines.append(row)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log(
            {name: value for name, value in row.items() if name != "step"}, step=row["step"]
        )
        print_main(" ".join(f"{name} {value:.4g}" for name, value in row.items()))


def from_first(accelerator: Accelerator, find):
    """What find() gives on the first process, on all of them."""
    found = [find() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def settings_of(args: Args, tokenizer, weights: str, pairs: Pairs, val_pairs: Pairs | None) -> dict:
    """What a run that is gone on with must have in common with its beginning."""
    free = {
        "out",
        "save_steps",
        "eval_steps",
        "log_steps",
        "keep",
        "data",
        "validation",
        "tokens_per_batch",
        "tracker",
        "lora_save",
        "ignore_memory",
        "chat_template",
        "chat_template_kwargs",
        "accept_edit",
    }
    hashes = "".join(some.digest() + str(some.fields) for some in (pairs, val_pairs) if some)
    settings = {name: str(value) for name, value in asdict(args).items() if name not in free}
    # compared in this order: another prompt makes other pairs
    settings |= {"weights": weights[:16], "prompt": render_prompt(tokenizer, PROBE, "Step 1:")}
    settings["pairs"] = hashlib.sha256(hashes.encode()).hexdigest()[:16]
    return settings | {"code": source_hashes(STEP_CODE), "edits": []}


def lock_out(out: Path) -> str:
    """Make OUT and hold it until this process ends. Returns what is wrong, or nothing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock_out.file = open(
            out / "metrics.jsonl", "a"
        )  # kept here: what is collected is closed, and the lock gone
    except OSError as error:
        return f"--out {out}: {error.strerror}; give a folder that can be written"
    try:
        fcntl.flock(lock_out.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"--out {out}: another training is writing it; give another --out"
    except OSError as error:
        warn(
            f"--out {out}: its file system has no locks ({error.strerror}), so nothing keeps a second training out"
        )
    return ""


def is_finished(args: Args, tokenizer, pairs: Pairs, val_pairs: Pairs | None) -> bool:
    """Whether OUT holds what this run would make."""
    path = args.out / "training.json"
    if not path.exists() or not any(args.out.glob("*.safetensors")):
        return False
    old, settings = (
        json.loads(path.read_text()),
        settings_of(args, tokenizer, weights_hash(args.model), pairs, val_pairs),
    )
    free = {"edits", "code", "prompt"} if args.accept_edit else {"edits"}
    same = all(
        old["settings"].get(name) == value for name, value in settings.items() if name not in free
    )
    return same and old["arguments"]["lora_save"] == args.lora_save


def checkpoint_to_resume(
    accelerator: Accelerator, args: Args, settings: dict
) -> tuple[Path | None, int]:
    """The last whole checkpoint in OUT and its step; stops where it, or a finished model, was made
    with other settings."""
    finished = args.out / "training.json"
    resume, ended = from_first(
        accelerator, lambda: (last_checkpoint(args.out), finished.exists())
    )  # files come late elsewhere
    if not resume and not ended:
        return None, 0
    made = resume or args.out
    state = resume / "state.json" if resume else finished
    if not state.exists():
        stop(
            f"{made}: process {accelerator.process_index} does not see it; --out must be on a file system that all "
            "machines share"
        )
    old = json.loads(state.read_text())
    edited = edited_names(old["settings"].get("code", {}), settings["code"])
    free = {"code", "edits", "prompt"} if edited else {"code", "edits"}
    for name, value in settings.items():
        if name not in free and old["settings"].get(name) != value:
            stop(
                f"{made} was made with {difference(name, old['settings'].get(name), value)}; "
                "take the old setting or give another --out"
            )
    if edited and not args.accept_edit:
        stop(
            f"{made} was made before an edit of {', '.join(edited[:6])}; undo it, give another --out, or add --accept-edit"
        )
    step = old["step"] if resume else 0
    settings["edits"] = old["settings"].get("edits", [])
    if edited:
        settings["edits"].append(
            {"steps": step} | {name: old["settings"].get(name) for name in ("code", "prompt")}
        )
    return resume, step


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written whole: a half-written one still has its temporary
    name."""
    found = [
        path
        for path in out.glob("checkpoint-*")
        if path.name.split("-")[1].isdigit() and (path / "state.json").exists()
    ]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def save_checkpoint(accelerator: Accelerator, args: Args, step: int, settings: dict):
    path = args.out / f"checkpoint-{step}"
    temporary = args.out / f"writing-checkpoint-{step}"
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()  # others may be writing still, and the folder is renamed
    if accelerator.is_main_process:
        (temporary / "state.json").write_text(
            json.dumps({"step": step, "settings": settings}, indent=1)
        )
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        older = sorted(args.out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for old in older[
            : -max(1, args.keep)
        ]:  # the newest stays, whatever --keep says: a stop may come
            shutil.rmtree(old)
        for torn in args.out.glob("writing-checkpoint-*"):  # of an earlier run that was killed
            shutil.rmtree(torn)
    accelerator.wait_for_everyone()


def save_model(
    accelerator: Accelerator, scorer, lm, adapters, tokenizer, args: Args, dtype: torch.dtype
):
    """A Hugging Face folder in the dtype of the base model, from every strategy; with LoRA merged,
    or the adapters."""
    state = accelerator.get_state_dict(scorer)
    if accelerator.is_main_process:
        state = {name.removeprefix("lm."): tensor for name, tensor in state.items()}
        if adapters and args.lora_save == "adapter":
            adapters.save_pretrained(
                args.out, state_dict={f"base_model.model.{name}": state[name] for name in state}
            )
        else:
            lm.save_pretrained(
                args.out, state_dict=whole_weights(state, lm.all_tied_weights_keys, dtype)
            )
            config = json.loads(
                (args.out / "config.json").read_text()
            )  # it names the fp32 of the master weights
            config["dtype"] = str(dtype).removeprefix("torch.")
            (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        saved = AutoTokenizer.from_pretrained(args.model)  # under the class that the model names
        saved.chat_template = tokenizer.chat_template
        saved.save_pretrained(args.out)
    accelerator.wait_for_everyone()


def whole_weights(state: dict, tied, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Names and weights of the model from a gathered state, without a tied head; adapters are
    merged, W + (alpha / r) B A."""
    weights = {}
    for name, tensor in state.items():
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            a, b = (
                state[f"{stem}.lora_{side}.default.weight"].float() for side in "AB"
            )  # (rank, in), (out, rank)
            tensor = tensor.float() + 2 * b @ a
        if ".lora_" not in name and name not in tied:
            weights[name.replace(".base_layer.", ".")] = tensor.to(dtype)
    return weights


def finish(args: Args, settings: dict, pairs: Pairs, total: int, lines: list[dict], began: float):
    """Write training.json; say how the training ended."""
    seconds, last = (
        round(time.time() - began, 1),
        next(line for line in reversed(lines) if "loss" in line),
    )
    arguments = {name: str(value) for name, value in asdict(args).items()}
    summary = {
        "arguments": arguments,
        "settings": settings,
        "pairs": len(pairs),
        "steps": total,
        "seconds": seconds,
        "last": last,
    }
    temporary = args.out / "training.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(
        args.out / "training.json"
    )  # the mark of a finished run: nothing but old checkpoints is left to do
    for path in args.out.glob("checkpoint-*") if args.keep == 0 else ():
        shutil.rmtree(path)
    losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) > 1 and max(losses) - min(losses) < 0.01 * abs(losses[0]):
        warn(
            f"the loss did not move ({losses[0]:.4f} at first, {losses[-1]:.4f} at last): too few steps, or --lr is too low"
        )
    short = ", ".join(
        f"{name} {last[name]:.4g}" for name in ("loss", "accuracy", "margin") if name in last
    )
    print(f"{args.out}: {total} steps over {len(pairs)} pairs, {seconds} s; last step: {short}")


# -------------------------------------------------------------------------------------------------
# copies of what another stage owns; read each there once


# Copied from 01_sample_errors.py
def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2. What is written stays."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# Copied from 01_sample_errors.py
def text_of(value) -> str:
    """A text that is not blank, or a finite number, as text; "" for anything else. 1e-07 becomes
    0.0000001, which graders take for a number."""
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f") if math.isfinite(value) else ""
    return str(value) if type(value) in (str, int) and str(value).strip() else ""


# Copied from 01_sample_errors.py
def are_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(step, str) for step in value)


# Copied from 01_sample_errors.py
KINDS = {  # what a field that a stage asks for must be
    "id": ("a text that is not blank, or a finite number", text_of),
    "problem": ("a text that is not blank", lambda value: isinstance(value, str) and value.strip()),
    "answer": ("a text that is not blank, or a finite number", text_of),
    "steps": ("a list of texts", are_texts),
    "sample": ("a whole number", lambda value: type(value) is int),
    "correct": ("true or false", lambda value: type(value) is bool),
}


# Copied from 01_sample_errors.py
def read_rows(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """Rows of a JSON Lines file. Stops, naming file and line, where one is no object, holds half a
    character, or lacks one of `fields`. Of these, `id` and `answer` become text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: cannot be read ({error}); give a JSON Lines file in UTF-8")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would part at U+2028 too
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # a lone surrogate: no tokenizer and no file takes it
            stop(f"{place}: {error.object[error.start]!a} is half a character; write it whole")
        except (ValueError, RecursionError) as error:
            stop(f"{place}: not JSON ({error}); every line must be one object")
        if not isinstance(row, dict):
            stop(f"{place}: {type(row).__name__} instead of an object such as {{...}}")
        for field in fields:
            value = row.get(field)
            if value in (None, ""):
                stop(f"{place}: no {field!r}; every row needs {', '.join(fields)}")
            if field in KINDS and not KINDS[field][1](value):
                kind = KINDS[field][0]
                stop(f"{place}: {field!r} is {json.dumps(value)[:50]}; it must be {kind}")
            if field in ("id", "answer"):
                row[field] = text_of(value)
        rows.append(row)
    return rows or stop(f"{path}: no rows; it is empty")


# Copied from 01_sample_errors.py
def source_hashes(roots: tuple[str, ...]) -> dict[str, str]:
    """A hash of the source of these functions and constants of this file, and of all in it that
    they use. Comments, docstrings and layout do not count."""
    source = Path(__file__).read_text(encoding="utf-8")
    for _ in range(2):  # SystemError: CPython 3.11, now and then, while another thread parses
        with contextlib.suppress(SystemError):
            tree = ast.parse(source)
    nodes, hashes, names = {}, {}, list(roots)
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node
        nodes[getattr(target, "id", getattr(target, "name", ""))] = node
    del nodes["Args"]  # the settings have the options' values
    while names:
        name = names.pop()
        if name in hashes or name not in nodes:
            continue
        for part in ast.walk(nodes[name]):
            if isinstance(part, ast.Name):
                names.append(part.id)
            elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                part.value = ast.Constant(None)  # a docstring
        hashes[name] = hashlib.sha256(ast.unparse(nodes[name]).encode()).hexdigest()[:8]
    return dict(sorted(hashes.items()))


# Copied from 01_sample_errors.py
def edited_names(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The names whose source_hashes() differ."""
    return [name for name in sorted(old | new) if old.get(name) != new.get(name)]


# Copied from 01_sample_errors.py
def difference(name: str, old, new) -> str:
    """What a message says of a setting that has changed; of a prompt, the place where it has."""
    if name != "prompt":
        return f"{name} = {old!r}, now it is {new!r}"
    start = max(0, len(os.path.commonprefix([str(old), new])) - 40)
    old, new = (repr(text[start : start + 80]) for text in (str(old), new))
    hint = 'a date: --chat-template-kwargs \'{"date_string": "26 Jul 2024"}\''
    return f"prompt = ...{old}..., now it is ...{new}... (where the template takes {hint})"


# Copied from 01_sample_errors.py
def load_tokenizer(model: str, template: Path | None, switches: str):
    """A tokenizer with the chat template, and its switches (JSON), that will be used."""
    import transformers

    is_hub_id = re.fullmatch(r"\w[^/]*/[^/]+", model) and not Path(model).exists()
    if not is_hub_id and not (Path(model) / "config.json").is_file():
        stop(f"--model {model}: neither a folder with a config.json nor a hub id, owner/name")
    try:
        # tokenizer.json as it is; AutoTokenizer takes three seconds to import torch, and builds its
        # own for some models
        try:
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
        except Exception:  # no tokenizer.json: it says so in many ways
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        if template:
            tokenizer.chat_template = template.read_text()
        tokenizer.switches = json.loads(switches)
        prompt, bos = render_prompt(tokenizer, PROBE, "Step 1:"), tokenizer.bos_token
    except (OSError, ValueError) as error:
        given = f"--chat-template {template}, --chat-template-kwargs {switches}"
        stop(f"--model {model}, {given}: {str(error).splitlines()[0]}")
    if bos and bos not in prompt and tokenizer(PROBE)["input_ids"][0] == tokenizer.bos_token_id:
        message = f"{model}: its chat template renders no {bos}, which its tokenizer puts first"
        todo = "if it was trained with one, give a --chat-template that begins with {{ bos_token }}"
        print(f"{message}; {todo}", file=sys.stderr)
    return tokenizer


# Copied from 01_sample_errors.py
def render_prompt(tokenizer, problem: str, opening: str) -> str:
    """What the model sees: the problem, and the assistant's `opening` as it is, to be continued. A
    template that wants the problem without USER_TURN's sentence takes it from message['problem'].
    ValueError: the template fails."""
    user = {"role": "user", "content": USER_TURN.format(problem=problem), "problem": problem}
    try:
        render = functools.partial(
            tokenizer.apply_chat_template, tokenize=False, **getattr(tokenizer, "switches", {})
        )
        prompt = render([user], add_generation_prompt=True)
        turn, mark, _ = render([user, {"role": "assistant", "content": MARK}]).rpartition(MARK)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template fails: {error}") from error
    if not mark:
        raise ValueError("the chat template leaves out or changes the assistant's final message")
    # What the model wrote itself after `prompt`: its thoughts, or the space that Mistral's
    # templates put before a turn.
    thought = opening.startswith("<think>") or (
        "</think>" in opening and prompt.endswith("<think>\n")
    )
    spaced = opening.startswith(" ") and turn == prompt + " "
    return (prompt if thought or spaced or not opening else turn) + opening


# Copied from 01_sample_errors.py
def processor_has_bf16() -> bool:
    """Whether bf16 is arithmetic here. On AVX2 and AVX-512 alone it is emulated: fp32 samples 2.3
    times as fast there."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.is_file() else ""
    return bool(re.search(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", flags))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\nInput")[0]))
    except KeyboardInterrupt:
        print(
            "interrupted; run the same command to go on from the last checkpoint", file=sys.stderr
        )
        raise SystemExit(130) from None
