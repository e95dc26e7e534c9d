"""Train a model on preference pairs: the DPO loss over (prefix, chosen, rejected) (Step-DPO, arXiv 2406.18629, Eq. 2).

    accelerate launch 04_train_stepdpo.py                                        # the paper's 7B run, on every GPU there is
    accelerate launch --config_file configs/fsdp2.yaml 04_train_stepdpo.py       # a model that does not fit on one
    python 04_train_stepdpo.py --data runs/pairs.jsonl --model data/tiny/model --lr 1e-5 --epochs 2 --out runs/tuned
    python analysis/estimate.py --data xinlai/Math-Step-DPO-10K                  # memory and time, without training
    python 04_train_stepdpo.py --data xinlai/Math-Step-DPO-10K --sides full      # its whole answers: the papers' DPO baseline
    python 04_train_stepdpo.py --objective sft --data data/samples.jsonl --model Qwen/Qwen2-7B --lr 5e-6 --epochs 3 \\
        --batch-size 256 --schedule linear --warmup 0.03                         # the paper's SFT stage

Input, a line a pair (the schema of xinlai/Math-Step-DPO-10K; other fields are ignored):
    {"prompt": "Ava has ...", "initial_reason_steps": "Let's think step by step.\\nStep 1: ...\\nStep 2:",
     "chosen": " 3 + 4 = 7.\\n", "rejected": " 3 + 4 = 8.\\n", "full_chosen": "...", "full_rejected": "..."}
or TRL's (whole responses; strings as they stand, or lists of messages), or for SFT the output of 01_sample_errors.py, of which
the right responses are taken, once each, or solutions:
    {"prompt": "...", "chosen": "...", "rejected": "..."}        {"problem": "Ava has ...", "solution": "Let's think ..."}
    {"problem": "Ava has ...", "response": "Let's think ...", "correct": true}

Output: a Hugging Face folder with a model card and training.png, beside it metrics.jsonl, a line a logged step:
    {"step": 1, "loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "chosen_logp": -1.2, "rejected_logp": -4.1, ...}

What is particular here:
  - all pairs of one prefix are one row [prefix | suffix | suffix ...]; a mask keeps the suffixes from seeing each other, and
    each counts its positions on from the prefix: the same log-probabilities as separate rows, at a fraction of the tokens;
  - the vocabulary is multiplied out at suffix positions only, in chunks;
  - reference log-probabilities are computed once, from the untouched base weights, and cached in OUT: no second model;
  - master weights and the loss are fp32, also under bf16 autocast: a bf16 weight swallows a step of 5e-7;
  - a single step never ends in EOS; a suffix that ends the solution does;
  - the loss is the mean over the global batch, however it is packed and spread over processes.
The same command run again goes on from the last whole checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LOGITS_CHUNK = 1024  # suffix positions whose logits stand in memory at once
STEP_FIELDS = ("prompt", "initial_reason_steps", "chosen", "rejected", "full_chosen", "full_rejected")
CHOSEN_DROP = 5.0  # nats: a mean fall of the chosen suffixes' log-probability that is worth a warning
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, data sheets


@dataclass
class Args:
    """Defaults are the paper's values for 7B; README, "What differs from the papers", has the rest."""

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
    eos: bool = True
    """end a suffix that ends its solution with EOS; the authors' code has none"""
    beta: float = 0.4
    """pull to the reference (paper: 0.4, for 72B 0.5; its scripts the other way round)"""
    label_smoothing: float = 0.0
    """assumed share of pairs that are the wrong way round"""
    nll_weight: float = 0.0
    """weight of the chosen suffix's mean negative log-likelihood; the papers have none"""
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
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of forward and backward; master weights are fp32. auto: bf16 where possible"""
    gradient_checkpointing: bool = False
    """compute activations twice to save memory"""
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


def main(args: Args):
    began = time.time()
    accelerator, tokenizer, config, pairs, val_pairs = start(args)
    lm, pad = load_model(args, config, accelerator), tokenizer.eos_token_id
    weights = from_first(accelerator, lambda: weights_hash(args.model))
    settings = settings_of(args, weights, pairs, val_pairs)
    resume, step = checkpoint_to_resume(accelerator, args, settings)

    adapters = add_lora(lm, args) if args.lora_rank else None
    scorer = SuffixScorer(lm)
    twice = {name for name, _ in scorer.named_parameters(remove_duplicate=False)} - {n for n, _ in scorer.named_parameters()}
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    fused = accelerator.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=fused)
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    scorer.train()
    references = [reference_logps(scorer, some, args, pad, accelerator, weights) if some and args.objective == "dpo" else None
                  for some in (pairs, val_pairs)]  # fmt: skip
    if resume:
        accelerator.load_state(str(resume))
        print_main(f"going on from {resume}")

    log = Log(accelerator, args, step)
    total = train(scorer, optimizer, pairs, val_pairs, references, args, config, pad, accelerator, log, settings, step)

    stored = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, str(config.dtype or "bfloat16"))
    save_model(accelerator, scorer, lm, adapters, twice, tokenizer, args, stored)
    if accelerator.is_main_process:
        finish(args, settings, pairs, total, log, began)
    # freed before the process group is: with accelerate 1.15 and gloo about one exit in seven hung the other way round
    scorer, optimizer = accelerator.free_memory(scorer, optimizer)
    accelerator.end_training()


def start(args: Args) -> tuple[Accelerator, object, object, Pairs, Pairs | None]:
    """Check the arguments; the accelerator, tokenizer, the model's configuration, pairs to train on and to validate with."""
    least = (args.epochs, args.batch_size, args.tokens_per_batch, args.eval_steps, args.save_steps, args.log_steps)
    if min(least) < 1 or not 0 <= args.label_smoothing < 0.5 or not 0 <= args.warmup <= 1:
        stop("--epochs, --batch-size, --tokens-per-batch and all --...-steps are at least 1, --label-smoothing is below 0.5")
    if args.precision == "auto":
        args.precision = "bf16" if torch.cuda.is_available() or processor_has_bf16() else "fp32"
    rows, validation_rows = [row for name in args.data for row in load_rows(name, args.objective)], []
    if args.validation:
        validation_rows = load_rows(str(args.validation), args.objective)
    if args.validation_fraction:
        text = lambda row: row["problem"] if args.objective == "sft" else row["prompt"]
        aside = lambda row: hashlib.sha256(f"{args.seed} {text(row)}".encode()).digest()[0] / 256 < args.validation_fraction
        validation_rows += [row for row in rows if aside(row)]
        rows = [row for row in rows if not aside(row)]
    accelerator = start_accelerate(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs)
    pairs = prepare(rows, tokenizer, args, " ".join(args.data))
    val_pairs = prepare(validation_rows, tokenizer, args, "validation") if validation_rows else None
    suffixes = " | ".join(repr(tokenizer.decode(ids)) for ids in pairs.suffixes[0])
    print_main(f"first row: {tokenizer.decode(pairs.prefixes[0])!r} | {suffixes}")
    return accelerator, tokenizer, load_config(args.model), pairs, val_pairs


def start_accelerate(args: Args) -> Accelerator:
    """The accelerator of the launch configuration, set for batches that are planned here."""
    global PRINTS
    if args.tracker != "none" and not transformers.utils.import_utils._is_package_available(args.tracker)[0]:
        stop(f"--tracker {args.tracker} needs its package: pip install {args.tracker}")
    log_with = None if args.tracker == "none" else args.tracker
    precision = "bf16" if args.precision == "bf16" else "no"
    try:
        accelerator = Accelerator(mixed_precision=precision, log_with=log_with, project_dir=args.out)
    except (ImportError, ValueError) as error:  # a package or a device that the launch configuration needs
        stop(f"accelerate cannot start: {error}")
    PRINTS = accelerator.is_main_process
    check_strategy(accelerator)
    if accelerator.distributed_type == "DEEPSPEED":  # asked for, though batches are planned here
        more = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": args.max_grad_norm}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(more)
    if accelerator.is_fsdp2 and args.precision == "bf16":  # accelerate's own would round what comes out, too, to 8 bits
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def settings_of(args: Args, weights: str, pairs: Pairs, val_pairs: Pairs | None) -> dict[str, str]:
    """What a run that is gone on with must have in common with its beginning."""
    free = {"out", "save_steps", "eval_steps", "log_steps", "keep", "data", "validation", "tokens_per_batch", "tracker",
            "lora_save"}  # fmt: skip
    hashes = pairs.digest() + (val_pairs.digest() if val_pairs else "")
    settings = {name: str(value) for name, value in asdict(args).items() if name not in free}
    return settings | {"weights": weights[:16], "pairs": hashlib.sha256(hashes.encode()).hexdigest()[:16]}


def checkpoint_to_resume(accelerator: Accelerator, args: Args, settings: dict) -> tuple[Path | None, int]:
    """The last whole checkpoint in OUT and its step; stops where it was made with other settings."""
    args.out.mkdir(parents=True, exist_ok=True)
    resume = from_first(accelerator, lambda: last_checkpoint(args.out))  # on several machines files come late
    if not resume:
        return None, 0
    if not (resume / "state.json").exists():
        stop(f"{resume}: process {accelerator.process_index} does not see it; --out must be on a file system that all "
             "machines share")  # fmt: skip
    old = json.loads((resume / "state.json").read_text())
    for name, value in settings.items():
        if old["settings"].get(name) != value:
            stop(f"{resume} was made with {name} = {old['settings'].get(name)!r}, now it is {value!r}; "
                 "take the old setting or give another --out")  # fmt: skip
    return resume, old["step"]


def train(scorer, optimizer, pairs: Pairs, val_pairs, references, args: Args, config, pad: int, accelerator: Accelerator,
          log: Log, settings: dict, start: int) -> int:  # fmt: skip
    """The steps behind `start`. `references`: log-probabilities of all pairs and of the validation pairs. Returns the number
    of steps of a whole run."""
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    total, (body, head) = per_epoch * args.epochs, count_weights(config)
    device_name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else ""
    peak = next((rate for name, rate in PEAK_FLOPS.items() if name in device_name), None)

    def check_validation(step: int):
        row = {"step": step} | validate(scorer, val_pairs, references[1], args, pad, accelerator)
        log.record(row)
        log.warn(row.get("val_accuracy") == 1.0 and len(val_pairs) >= 20,
                 "validation accuracy 1.0: the pairs are too easy, or validation pairs stand in the training data")  # fmt: skip

    if val_pairs and start == 0:
        check_validation(0)
    for step in tqdm(range(start + 1, total + 1), total=total, initial=start, desc="training", disable=not PRINTS):
        epoch, place = divmod(step - 1, per_epoch)
        if place == 0 or step == start + 1:  # pairs of one prefix stay together, so that they share a row
            groups = np.random.default_rng([args.seed, epoch]).permutation(len(pairs.prefixes))
            order = np.argsort(groups[np.array(pairs.group)], kind="stable")
        batch = order[place * args.batch_size :][: args.batch_size].tolist()
        tick, rate = time.time(), learning_rate(step - 1, total, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = train_step(scorer, optimizer, pairs, references[0], batch, args, pad, accelerator)
        seconds = time.time() - tick
        log.check(step, found, args)
        found |= {"lr": rate, "pairs_per_s": len(batch) / seconds, "tokens_per_s": found.pop("tokens") / seconds}
        if accelerator.device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if peak:
            found["mfu"] = 3 * flops(pairs, batch, config, body, head) / seconds / peak / accelerator.num_processes
        log.last = found
        if step % args.log_steps == 0 or step == total:
            log.record({"step": step, "epoch": epoch + 1} | found)
        if val_pairs and (step % args.eval_steps == 0 or step == total):
            check_validation(step)
        if step % args.save_steps == 0 and step < total:
            save_checkpoint(accelerator, args, step, settings)
    return total


def train_step(scorer, optimizer, pairs: Pairs, reference, batch: list[int], args, pad, accelerator) -> dict:
    """One optimizer step over the pairs `batch`. Returns the means over these pairs, the same on every process."""
    device, world = accelerator.device, accelerator.num_processes
    micro = plan(pairs, batch, args.tokens_per_batch, accelerator.process_index, world)
    weight = 1 / (len(batch) if args.objective == "dpo" else sum(len(pairs.suffixes[i][0]) for i in batch))
    sums = torch.zeros(9, dtype=torch.float64, device=device)
    for number, (rows, chunks) in enumerate(micro):
        rows, counts = [[i if i >= 0 else -1 - i for i in row] for row in rows], float(rows[0][0] >= 0)
        numbers, inputs = [i for row in rows for i in row], collate(pairs, rows, pad, device)
        ends = number == len(micro) - 1
        if accelerator.distributed_type == "DEEPSPEED":  # its engine steps within the backward pass that is said to be last
            accelerator.gradient_state._set_sync_gradients(ends)
            ends = True
        # FSDP2 would keep whole gradients until they are synchronized: a model that needs shards has no room for them
        with contextlib.nullcontext() if ends or accelerator.is_fsdp2 else accelerator.no_sync(scorer):
            logps = scorer(**inputs, chunks=chunks)[inputs["picks"]]  # (pairs, sides)
            if args.objective == "dpo":
                loss, rewards = dpo_loss(logps, reference[numbers].to(device), args.beta, args.label_smoothing)
            else:
                loss, rewards = -logps[:, 0], torch.zeros(len(numbers), 2, device=device)
            if args.nll_weight:
                tokens = torch.tensor([len(pairs.suffixes[i][0]) for i in numbers], device=device)
                loss = loss - args.nll_weight * logps[:, 0] / tokens
            # counts is 0 for a stand-in, there only to keep the processes together; data-parallel gradients are averaged
            # over processes, while the mean over the global batch is meant
            accelerator.backward(counts * loss.sum() * world * weight)
        margin = (rewards[:, 0] - rewards[:, 1]).detach()
        parts = [loss.detach(), (margin > 0).float(), margin, *rewards.detach().unbind(1), *logps.detach().unbind(1)]
        sums[: len(parts)] += counts * torch.stack([p.sum() for p in parts]).double()
        sums[7] += inputs["ids"].numel()
        sums[8] += counts * sum(map(pairs.length, rows))
    norm = accelerator.clip_grad_norm_(scorer.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sums = accelerator.reduce(sums, "sum").tolist()
    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
    result = {name: value / len(batch) for name, value in zip(names, sums, strict=False)}
    if args.objective == "sft":
        result = {"loss": sums[0] * weight}
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of all shards, not of the local part
    return result | {"grad_norm": float(norm or 0.0), "tokens": sums[8], "padding": 1 - sums[8] / sums[7]}


def dpo_loss(logps: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float = 0.0):
    """Loss (pairs,) of Eq. 2 and the implicit rewards beta * (log pi - log pi_ref), (pairs, 2), chosen first.

    Label smoothing as in conservative DPO: the pair is the wrong way round with this probability."""
    rewards = beta * (logps - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin), rewards


def learning_rate(step: int, total: int, args: Args) -> float:
    """Rate of step 0, 1, ...: a line up to the peak, then half a cosine, or a line, down to zero."""
    warm = math.ceil(args.warmup * total)
    if step < warm:
        return args.lr * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return args.lr * (0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else 1 - done)


def validate(scorer, pairs, reference, args, pad, accelerator) -> dict:
    logps = score_all(scorer, pairs, args, pad, accelerator, "validation")
    if args.objective == "sft":
        return {"val_loss": -logps.sum().item() / sum(len(s[0]) for s in pairs.suffixes)}
    loss, rewards = dpo_loss(logps, reference, args.beta, args.label_smoothing)
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "val_loss": loss.mean().item(), "val_accuracy": (margin > 0).float().mean().item(), "val_margin": margin.mean().item(),
        "val_chosen_logp": logps[:, 0].mean().item(), "val_rejected_logp": logps[:, 1].mean().item(),
    }  # fmt: skip


class Log:
    """OUT/metrics.jsonl, the tracker and the terminal; `lines` are all since the first step, `last` is the last step's."""

    def __init__(self, accelerator: Accelerator, args: Args, start: int):
        self.accelerator, self.path, self.lines, self.warned, self.last = accelerator, args.out / "metrics.jsonl", [], set(), {}
        if accelerator.is_main_process:
            self.lines = [line for line in read_rows(self.path, ("step",)) if line["step"] <= start] if start else []
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        if args.tracker != "none":
            accelerator.init_trackers("stepdpo", config={name: str(value) for name, value in asdict(args).items()})

    def record(self, row: dict):
        self.lines.append(row)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        print_main(" ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def warn(self, when: bool, text: str):
        """Once for each kind of warning, which is what stands before the colon."""
        if when and text.split(":")[0] not in self.warned:
            self.warned.add(text.split(":")[0])
            print_main(f"warning: {text}")

    def check(self, step: int, found: dict, args: Args):
        """Stop or warn where a step's figures say that something is wrong."""
        if not math.isfinite(found["loss"] + found["grad_norm"]):
            stop(f"step {step}: loss {found['loss']}, gradient norm {found['grad_norm']}; last good checkpoint: "
                 f"{last_checkpoint(args.out) or 'none'}")  # fmt: skip
        if args.objective == "dpo":
            self.warn(step == 1 and not args.nll_weight and abs(found["loss"] - math.log(2)) > 0.02,
                      f"first loss: {found['loss']:.4f} and not ln 2 = 0.6931: policy and reference differ")  # fmt: skip
            self.warn(found["chosen_reward"] < -CHOSEN_DROP * args.beta, f"chosen suffixes: at step {step} they are "
                      f"{-found['chosen_reward'] / args.beta:.1f} nats less likely than under the reference; lower --lr or "
                      "give --nll-weight")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# pairs


def load_rows(name: str, objective: str) -> list[dict]:
    """Rows of a file, or of a data set on the hub (its train split). A row may have an empty side, which prepare() counts;
    stops where the first row lacks a field of its format."""
    if name.endswith(".jsonl") or Path(name).exists():
        rows = read_rows(Path(name), ())
    else:
        import datasets

        try:
            rows = list(datasets.load_dataset(name, split="train"))
        except Exception as error:  # the library raises many kinds: no network, no such set, gated ...
            stop(f"--data {name}: no such file, and the hub does not give it ({str(error).splitlines()[0]})")
    sampled = objective == "sft" and "response" in rows[0]
    fields = ("problem", "response", "correct") if sampled else ("problem", "solution")
    if objective == "dpo":
        fields = STEP_FIELDS if "initial_reason_steps" in rows[0] else ("prompt", "chosen", "rejected")
    for number, row in enumerate(rows, 1):
        if missing := [field for field in fields if field not in row]:
            stop(f"--data {name}, row {number}: no {missing[0]!r}; every row needs {', '.join(fields)}")
    if objective == "sft":
        print_main(f"{name}: training on the field {fields[1]!r}")
    return own_solutions(rows, name) if sampled else rows


def own_solutions(rows: list[dict], name: str) -> list[dict]:
    """01's right responses as solutions, once each: the model's own text, never the reference solution."""
    right = [row for row in rows if row["correct"]]
    found = {(row["problem"], row["response"]): {"problem": row["problem"], "solution": row["response"]} for row in right}
    print_main(f"{name}: {len(rows)} samples, {len(right)} right, {len(found)} of these distinct")
    return list(found.values()) or stop(f"--data {name}: none of its {len(rows)} samples is right")


def split_sides(row: dict, sides: str) -> tuple[str, list[str], list[bool]]:
    """The assistant's text that both sides share, the two sides behind it, and whether each ends its solution.

    full_chosen and full_rejected are whole responses in 03's file; in the published set they go on behind
    initial_reason_steps, which its own trainer joins to them as they are."""
    given = row["initial_reason_steps"]
    opening = given.rstrip(" ")  # a space before the suffix belongs to the suffix's first token
    if sides == "step":
        texts = [given[len(opening) :] + row[side] for side in ("chosen", "rejected")]
        ends = [ends_solution(opening, text, row[full]) for text, full in zip(texts, STEP_FIELDS[4:], strict=True)]
        return opening, texts, ends
    fulls = [row[full] for full in STEP_FIELDS[4:]]
    wholes = [full if full.startswith(given.strip()) else f"{opening} {full.lstrip(' ')}" for full in fulls]
    forced = re.match(r".*?Step 1:", given, re.S)
    opening = forced[0] if forced else opening
    return opening, [whole[len(opening) :] for whole in wholes], [True, True]


def sides_of(row: dict, sides: str) -> tuple[str, ...]:
    """The fields of a row that are trained on."""
    if "initial_reason_steps" in row and sides == "full":
        return "prompt", *STEP_FIELDS[4:]
    return ("problem", "solution") if "solution" in row else ("prompt", "chosen", "rejected")


def ends_solution(prefix: str, suffix: str, full: str) -> bool:
    """Whether nothing follows `suffix` in the full text, which may or may not repeat the prefix (the published set
    has both texts as the model's whole answer)."""
    return full.strip() in ((prefix + suffix).strip(), suffix.strip())


def part(prefix: str, suffix: str, tokenizer, special: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of prefix and suffix, parted where generation had parted them.

    Joint ids are used where they begin with the prefix's. Where a token would span the boundary they are not what was
    sampled (the prefix was given, the suffix drawn), and the suffix is encoded on its own."""
    ids = tokenizer(prefix, add_special_tokens=special)["input_ids"]
    joint = tokenizer(prefix + suffix, add_special_tokens=special)["input_ids"]
    fits = joint[: len(ids)] == ids
    return ids, joint[len(ids) :] if fits else tokenizer(suffix, add_special_tokens=False)["input_ids"]


def encode(row: dict, tokenizer, sides: str = "step") -> tuple[list[int], list[list[int]]]:
    """Token ids of the prefix and of its suffixes: chosen and rejected, or the solution alone (SFT)."""
    eos, special, ends = tokenizer.eos_token_id, False, [True, True]
    if "initial_reason_steps" in row:
        opening, texts, ends = split_sides(row, sides)
        text = render_prompt(tokenizer, row["prompt"], opening)
    elif "solution" in row:
        text, texts, ends = render_prompt(tokenizer, row["problem"], ""), [row["solution"]], [True]
    elif isinstance(row["prompt"], str):
        text, special, texts = row["prompt"], True, [row["chosen"], row["rejected"]]
    else:
        render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **getattr(tokenizer, "switches", {}))
        text = render(row["prompt"], add_generation_prompt=True)
        whole = [render(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        if not all(full.startswith(text) for full in whole):
            raise ValueError(f"the chat template renders the prompt alone in another way, as {text[-60:]!r}")
        texts = [full[len(text) :] for full in whole]
    parts = [part(text, suffix, tokenizer, special) for suffix in texts]
    # a single step gets no EOS: it would teach to stop half-way; a template may have closed a whole turn already
    suffixes = [[*ids, eos] if end and eos not in ids[-2:] else ids for (_, ids), end in zip(parts, ends, strict=True)]
    return parts[0][0], suffixes


class Pairs:
    """Encoded pairs as int32 arrays (100,000 take some 100 MB). Pair i: the ids of its prefix, prefixes[group[i]], and of
    its suffixes, suffixes[i]: chosen and rejected, or the solution alone."""

    def __init__(self):
        self.prefixes, self.group, self.suffixes, self.known = [], [], [], {}

    def __len__(self):
        return len(self.group)

    def add(self, prefix: list[int], suffixes: list[list[int]]):
        ids = np.array(prefix, dtype=np.int32)
        self.group.append(self.known.setdefault(ids.tobytes(), len(self.prefixes)))
        if self.group[-1] == len(self.prefixes):
            self.prefixes.append(ids)
        self.suffixes.append([np.array(suffix, dtype=np.int32) for suffix in suffixes])

    def row(self, numbers: list[int]) -> tuple[list[np.ndarray], list[list[int]]]:
        """The distinct suffixes of pairs with one prefix, and for each pair the places of its own among them."""
        place, picks = {}, []
        for i in numbers:
            picks.append([place.setdefault(suffix.tobytes(), len(place)) for suffix in self.suffixes[i]])
        return [np.frombuffer(ids, dtype=np.int32) for ids in place], picks

    def length(self, numbers: list[int]) -> int:
        """Tokens of the row that holds these pairs."""
        return len(self.prefixes[self.group[numbers[0]]]) + sum(map(len, self.row(numbers)[0]))

    def digest(self) -> str:
        found = hashlib.sha256()
        for group, suffixes in zip(self.group, self.suffixes, strict=True):
            for ids in (self.prefixes[group], *suffixes):
                found.update(len(ids).to_bytes(4, "big") + ids.tobytes())
        return found.hexdigest()


def prepare(rows: list[dict], tokenizer, args: Args, name: str) -> Pairs:
    """Encode; print what there is and what was left out, and why."""
    pairs, left_out, seen, repeated, blank = Pairs(), Counter(), set(), 0, []
    for number, row in enumerate(tqdm(rows, desc="encoding", disable=not PRINTS, leave=False, mininterval=1), 1):
        if not all(row[side] if not isinstance(row[side], str) else row[side].strip() for side in sides_of(row, args.sides)):
            blank.append(str(number))
            left_out["with an empty side"] += 1
            continue
        row = {field: "" if field in STEP_FIELDS and value is None else value for field, value in row.items()}
        try:
            prefix, suffixes = encode(row, tokenizer, args.sides)
        except (TypeError, KeyError, AttributeError) as error:
            stop(f"{name}, row {number}: {error.__class__.__name__}: {error}; see the formats in --help")
        except (ValueError, transformers.utils.chat_template_utils.jinja2.TemplateError) as error:
            stop(f"--model {args.model}: its chat template fails ({error}); give another by --chat-template")
        if not args.eos:
            suffixes = [suffix[:-1] if suffix[-1:] == [tokenizer.eos_token_id] else suffix for suffix in suffixes]
        key = hashlib.sha256(repr((prefix, suffixes)).encode()).digest()
        if len(prefix) + max(map(len, suffixes)) > args.max_length:
            left_out["above --max-length"] += 1
        elif not all(suffixes) or len(suffixes) == 2 and suffixes[0] == suffixes[1]:
            left_out["without contrast"] += 1
        else:
            pairs.add(prefix, suffixes)
            repeated += key in seen
            seen.add(key)
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
    print_main(f"{name}: an empty side in row {', '.join(blank[:20])}{' ...' if len(blank) > 20 else ''}") if blank else None
    if not len(pairs):
        stop(f"{name}: no pair is left of {len(rows)}: {why}")
    lengths = np.array([(len(pairs.prefixes[g]), *map(len, s)) for g, s in zip(pairs.group, pairs.suffixes, strict=True)])
    groups = {}
    for i, group in enumerate(pairs.group):
        groups.setdefault(group, []).append(i)
    separate = (lengths[:, :1] + lengths[:, 1:]).sum()
    print_main(f"{name}: {len(pairs)} pairs with {len(groups)} prefixes; left out: {why}; kept though repeated: {repeated}")
    print_main("tokens      median    95 %   most\n" + "\n".join(
        f"{part:8} {np.median(column):9.0f} {np.percentile(column, 95):7.0f} {column.max():6d}"
        for part, column in zip(("prefix", "chosen", "rejected"), lengths.T, strict=False)))  # fmt: skip
    print_main(f"one row for all suffixes of a prefix saves {1 - sum(map(pairs.length, groups.values())) / separate:.0%} "
               f"of {separate} tokens; within a pair alone {1 - lengths.sum() / separate:.0%}")  # fmt: skip
    return pairs


def plan(pairs: Pairs, numbers: list[int], tokens: int, rank: int, world: int) -> list[tuple[list[list[int]], int]]:
    """Micro-batches of this process for the pairs `numbers`: (rows, chunks), rows at most `tokens` with their padding.

    Pairs of one prefix come in one row, as far as `tokens` allow. Sharded strategies wait for each other in every pass and at
    every call of the head: so every process gets the same number of micro-batches, and in each the same number of chunks of
    logits, whatever it needs itself. Where rows run out, a batch repeats one pair as [[-1 - number]], to be computed and not
    counted."""
    groups = {}
    for i in numbers:
        row = groups.setdefault(pairs.group[i], [[]])
        row.append([]) if row[-1] and pairs.length([*row[-1], i]) > tokens else None
        row[-1].append(i)
    rows = sorted(((pairs.length(row), row) for group in groups.values() for row in group), key=lambda r: (r[0], r[1]))
    dealt, loads = [[] for _ in range(world)], [0] * world
    for length, row in reversed(rows):  # the longest first, each to who has least
        process = loads.index(min(loads))
        loads[process] += length
        dealt[process].insert(0, (length, row))
    batches = []
    for own in dealt:
        batches.append([])
        for length, row in own:
            if not batches[-1] or (len(batches[-1][-1]) + 1) * length > tokens:  # sorted: this row is the longest
                batches[-1].append([])
            batches[-1][-1].append(row)
    most = max(map(len, batches))
    batches = [own + [[[-1 - rows[0][1][0]]]] * (most - len(own)) for own in batches]
    targets = lambda rows: sum(len(suffix) for row in rows for suffix in pairs.row([max(i, -1 - i) for i in row])[0])
    chunks = [math.ceil(max(map(targets, side_by_side)) / LOGITS_CHUNK) for side_by_side in zip(*batches, strict=True)]
    return list(zip(batches[rank], chunks, strict=True))


def collate(pairs: Pairs, rows: list[list[int]], pad: int, device) -> dict:
    """Rows [prefix | suffix | suffix ...], padded on the right; each row is a list of pair numbers with one prefix.

    For prefix [a b], chosen [c d], rejected [e]:  ids [a b c d e], positions [0 1 2 3 2]; token i sees token j if
    j <= i < last[j], with last [5 5 4 4 5]: the prefix is seen to the end, a suffix up to its own end.
    c and e are predicted at b, d at c: source [1 2 1], target [c d e], owner [0 0 1] (the suffix).
    picks [[0 1]]: a pair's chosen and rejected among all suffixes."""
    parts = [(pairs.prefixes[pairs.group[numbers[0]]], *pairs.row(numbers)) for numbers in rows]
    width = max(len(prefix) + sum(map(len, suffixes)) for prefix, suffixes, _ in parts)
    ids, positions = np.full((len(rows), width), pad), np.zeros((len(rows), width), dtype=np.int64)
    last = np.tile(np.arange(1, width + 1), (len(rows), 1))  # padding sees itself: a row of nothing would be NaN
    source, target, owner, picks, count = [], [], [], [], 0
    for b, (prefix, suffixes, own) in enumerate(parts):
        start = at = len(prefix)
        end = start + sum(map(len, suffixes))
        ids[b, :start], positions[b, :start], last[b, :start] = prefix, np.arange(start), end
        for number, suffix in enumerate(suffixes, count):
            here = slice(at, at + len(suffix))
            ids[b, here], positions[b, here], last[b, here] = suffix, np.arange(start, start + len(suffix)), here.stop
            source += [np.array([b * width + start - 1]), np.arange(b * width + at, b * width + here.stop - 1)]
            target.append(suffix)
            owner.append(np.full(len(suffix), number))
            at = here.stop
        picks += [[count + place for place in places] for places in own]
        count += len(suffixes)
    batch = {"ids": ids, "positions": positions, "last": last, "source": np.concatenate(source),
             "target": np.concatenate(target), "owner": np.concatenate(owner), "picks": np.array(picks)}  # fmt: skip
    return {name: torch.from_numpy(array.astype(np.int64)).to(device) for name, array in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# the model


def load_config(model: str):
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        stop(f"--model {model}: cannot be loaded ({str(error).splitlines()[0]})")


def load_model(args: Args, config, accelerator: Accelerator):
    """The model without dropout. Weights are fp32, but for a frozen base and where DeepSpeed keeps fp32 masters of its own.

    Under FSDP, by fsdp_cpu_ram_efficient_loading, the first process of a machine alone reads the files; ZeRO-3 builds the model
    in shards, and what is read of the files is memory that processes share."""
    for name in vars(config):
        if name.endswith(("dropout", "pdrop")) and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)  # the reference has none either: with it, step 0 would not be ln 2
    own_masters = args.lora_rank or accelerator.distributed_type == "DEEPSPEED"
    dtype = config.dtype if own_masters and args.precision == "bf16" else torch.float32
    try:
        lm = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        stop(f"--model {args.model}: cannot be loaded ({str(error).splitlines()[0]})")
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.enable_input_require_grads() if args.lora_rank else None
    return lm


def add_lora(lm, args: Args):
    """Put adapters into `lm`, in place; the returned peft model is needed to save it."""
    try:
        import peft
    except ImportError:
        stop("--lora-rank needs peft: pip install peft")
    torch.manual_seed(args.seed)  # every process draws the same adapters
    settings = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, "target_modules": "all-linear"}
    return peft.get_peft_model(lm, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))


class SuffixScorer(torch.nn.Module):
    """Summed log-probability of each suffix given its prefix: (suffixes,), fp32, in nats."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self._no_split_modules = getattr(lm, "_no_split_modules", None)  # what FSDP wraps

    def tie_weights(self):  # accelerate calls it after it has loaded the shards; else a tied head would be of its own
        self.lm.tie_weights()

    def forward(self, ids, positions, last, source, target, owner, picks, chunks: int = 1):
        """ids, positions, last: (rows, width); source, target, owner: (suffix tokens,); picks: for the caller. The logits are
        made in so many chunks, with several again in the backward pass."""
        at = torch.arange(ids.shape[1], device=ids.device)
        sees = (at[:, None] >= at) & (at[:, None] < last[:, None, :])  # (rows, width, width); see collate
        masks = {"full_attention": sees[:, None]}
        if window := getattr(self.lm.config, "sliding_window", None):
            masks["sliding_attention"] = (sees & (positions[:, :, None] - positions[:, None, :] < window))[:, None]
        kinds = set(getattr(self.lm.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
        mask = masks if len(kinds) > 1 else masks.get(kinds.pop(), masks["full_attention"])
        hidden = self.lm.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state.flatten(0, 1)[source]  # (suffix tokens, hidden size)
        parts = []
        for hidden_part, target_part in zip(hidden.tensor_split(chunks), target.tensor_split(chunks), strict=True):
            parts.append(
                checkpoint(self.token_logps, hidden_part, target_part, use_reentrant=False)
                if torch.is_grad_enabled() and chunks > 1 else self.token_logps(hidden_part, target_part)
            )  # fmt: skip
        sums = torch.zeros(int(picks.max()) + 1, dtype=torch.float32, device=ids.device)
        return sums.index_add(0, owner, torch.cat(parts))

    def token_logps(self, hidden, target):
        logits = self.lm.get_output_embeddings()(hidden).float()  # (tokens, vocabulary)
        if cap := getattr(self.lm.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return -F.cross_entropy(logits, target, reduction="none")


@torch.no_grad()
def score_all(scorer, pairs: Pairs, args: Args, pad: int, accelerator: Accelerator, label: str) -> torch.Tensor:
    """Log-probabilities of all pairs, (pairs, sides) on the CPU, the same on every process."""
    found = torch.zeros(len(pairs), len(pairs.suffixes[0]), device=accelerator.device)
    tokens = 4 * args.tokens_per_batch  # no gradients: room for more
    batches = plan(pairs, range(len(pairs)), tokens, accelerator.process_index, accelerator.num_processes)
    for rows, chunks in tqdm(batches, desc=label, disable=not PRINTS, leave=False):
        numbers = [i if i >= 0 else -1 - i for row in rows for i in row]
        inputs = collate(pairs, [[i if i >= 0 else -1 - i for i in row] for row in rows], pad, accelerator.device)
        logps = scorer(**inputs, chunks=chunks)[inputs["picks"]]
        if rows[0][0] >= 0:
            found[numbers] = logps
    return accelerator.reduce(found, "sum").cpu()


def reference_logps(scorer, pairs, args, pad, accelerator, weights: str) -> torch.Tensor:
    """Log-probabilities under the base weights, from OUT/reference-*.npy where weights, token ids (so data and template),
    precision and the code that computes them are the same."""
    code = inspect.getsource(SuffixScorer) + inspect.getsource(collate) + torch.__version__ + args.precision
    key = hashlib.sha256((weights + code + pairs.digest()).encode()).hexdigest()[:16]
    path = args.out / f"reference-{key}.npy"
    there = torch.tensor(float(path.exists()), device=accelerator.device)
    if accelerator.reduce(there, "sum").item() == accelerator.num_processes:
        print_main(f"reference log-probabilities: {path}")
        return torch.from_numpy(np.load(path))
    found = score_all(scorer, pairs, args, pad, accelerator, "reference")
    if accelerator.is_main_process:
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, found.numpy())
        temporary.replace(path)
    return found


def weights_hash(model: str) -> str:
    """Of the weight files: names, sizes and 64 MiB of each, spread over it; smaller ones whole."""
    folder, digest, block = Path(cached_file(model, "config.json")).parent, hashlib.sha256(), 1 << 20
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for start in np.linspace(0, max(0, size - block), min(64, math.ceil(size / block)), dtype=np.int64).tolist():
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()


def count_weights(config) -> tuple[int, int]:
    """Weights of the layers and of the head; an embedding that is only looked up does no arithmetic."""
    with torch.device("meta"):  # by the class: from_config() would build it in ZeRO-3's shards, which meta has not
        lm = AutoModelForCausalLM._model_mapping[type(config)](config)
    head, embedding = lm.get_output_embeddings().weight, lm.get_input_embeddings().weight
    return sum(p.numel() for p in lm.parameters()) - head.numel() * (1 if head is embedding else 2), head.numel()


def flops(pairs: Pairs, numbers, config, body: int, head: int) -> float:
    """Floating-point operations of one forward pass over the rows of these pairs: 2 a weight of the layers and token, 2 a
    weight of the head and suffix token, 4 * layers * width for each two tokens of which one sees the other."""
    rows, total = {}, 0.0
    for i in numbers:
        rows.setdefault(pairs.group[i], []).append(i)
    for row in rows.values():
        prefix, suffixes = len(pairs.prefixes[pairs.group[row[0]]]), [len(s) for s in pairs.row(row)[0]]
        seen = prefix * (prefix + 1) / 2 + sum(prefix * s + s * (s + 1) / 2 for s in suffixes)
        total += 2 * body * (prefix + sum(suffixes)) + 2 * head * sum(suffixes)
        total += 4 * config.num_hidden_layers * config.hidden_size * seen
    return total


# ---------------------------------------------------------------------------------------------------------------------
# processes


PRINTS = os.environ.get("RANK", "0") == "0"  # false on all processes but the first


def print_main(text: str):
    tqdm.write(text, file=sys.stderr) if PRINTS else None


def from_first(accelerator: Accelerator, find):
    """What find() gives on the first process, on all of them."""
    found = [find() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def check_strategy(accelerator: Accelerator):
    """Stop where accelerate runs another strategy than it was asked for: without a GPU, 1.15 drops FSDP and DeepSpeed
    for plain data parallelism, or a single process, and says nothing."""
    found, world = str(accelerator.distributed_type.value), int(os.environ.get("WORLD_SIZE", 1))
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" and found != name:
            stop(f"{name} was asked for, but accelerate runs {found}; it needs GPUs, use configs/ddp.yaml without them")
    if world != accelerator.num_processes:
        stop(f"{world} processes were started, but each trains alone; without a GPU set ACCELERATE_USE_CPU=true")


# ---------------------------------------------------------------------------------------------------------------------
# what is written


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written whole: a half-written one still has its temporary name."""
    found = [path for path in out.glob("checkpoint-*") if path.name.split("-")[1].isdigit() and (path / "state.json").exists()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def save_checkpoint(accelerator: Accelerator, args: Args, step: int, settings: dict):
    path = args.out / f"checkpoint-{step}"
    temporary = args.out / f"writing-checkpoint-{step}"
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()  # others may be writing still, and the folder is renamed
    if accelerator.is_main_process:
        (temporary / "state.json").write_text(json.dumps({"step": step, "settings": settings}, indent=1))
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        older = sorted(args.out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for old in older[: -max(1, args.keep)]:  # the newest stays, whatever --keep says: a stop may come
            shutil.rmtree(old)
        for torn in args.out.glob("writing-checkpoint-*"):  # of an earlier run that was killed
            shutil.rmtree(torn)
    accelerator.wait_for_everyone()


def whole_weights(state: dict, args: Args, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Names and weights of the model from a gathered state, in `dtype`; adapters are merged, W + (alpha / r) B A."""
    weights = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            a, b = (state[f"{stem}.lora_{side}.default.weight"].float() for side in "AB")  # (rank, in), (out, rank)
            tensor = tensor.float() + 2 * b @ a
        weights[name.removeprefix("lm.").replace(".base_layer.", ".")] = tensor.to(dtype)
    return weights


def save_model(accelerator: Accelerator, scorer, lm, adapters, twice: set, tokenizer, args: Args, dtype: torch.dtype):
    """A Hugging Face folder in the dtype of the base model, from every strategy; with LoRA merged, or the adapters. `twice`:
    names under which a weight of another name is seen again, a tied head."""
    state = accelerator.get_state_dict(scorer)
    if accelerator.is_main_process:
        state = {name: tensor for name, tensor in state.items() if name not in twice}
        if adapters and args.lora_save == "adapter":
            names = {f"base_model.model.{name.removeprefix('lm.')}": tensor for name, tensor in state.items()}
            adapters.save_pretrained(args.out, state_dict=names)
        else:
            lm.save_pretrained(args.out, state_dict=whole_weights(state, args, dtype))
            config = json.loads((args.out / "config.json").read_text())  # it names the fp32 of the master weights
            config["dtype"] = str(dtype).removeprefix("torch.")
            (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(args.out)
    accelerator.wait_for_everyone()


def finish(args: Args, settings: dict, pairs: Pairs, total: int, log: Log, began: float):
    """What stands beside the model: training.json, the picture, the model card."""
    seconds = round(time.time() - began, 1)
    arguments = {name: str(value) for name, value in asdict(args).items()}
    summary = {"arguments": arguments, "settings": settings, "pairs": len(pairs), "steps": total, "seconds": seconds,
               "last": log.last}  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(args.out / "training.png", log.lines)
    (args.out / "README.md").write_text(model_card(args, summary))
    for path in args.out.glob("checkpoint-*") if args.keep == 0 else ():
        shutil.rmtree(path)
    last = ", ".join(f"{name} {log.last[name]:.4g}" for name in ("loss", "accuracy", "margin") if name in log.last)
    print(f"{args.out}: {total} steps over {len(pairs)} pairs, {seconds} s; last step: {last}")


def draw(path: Path, lines: list[dict]):
    """training.png: loss, accuracy, margin and log-probabilities, training and validation (Fig. 2 of the paper)."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print_main("training.png needs matplotlib: pip install matplotlib; the figures are in metrics.jsonl")
        return
    panels = [("loss",), ("accuracy",), ("margin",), ("chosen_logp", "rejected_logp")]
    panels = [panel for panel in panels if any(panel[0] in line for line in lines)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for colour, name in zip(("tab:blue", "tab:red"), panel, strict=False):
            for prefix, style, label in (("", "-", "training"), ("val_", "o--", "validation")):
                points = [(line["step"], line[prefix + name]) for line in lines if prefix + name in line]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour, alpha=0.6 if not prefix else 1, markersize=4,
                              label=f"{name.removesuffix('_logp')}, {label}" if len(panel) > 1 else label)  # fmt: skip
        axis.set(xlabel="step", title={"chosen_logp": "log-probability (nats)"}.get(panel[0], panel[0]))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def model_card(args: Args, summary: dict) -> str:
    last = ", ".join(f"{name} {value:.4g}" for name, value in summary["last"].items())
    given = "\n".join(f"| {name} | {value} |" for name, value in summary["arguments"].items())
    return (
        f"---\nbase_model: {args.model}\nlibrary_name: transformers\n---\n\n# {args.out.name}\n\n"
        f"{args.model}, trained with `04_train_stepdpo.py` ({args.objective}) on {summary['pairs']} rows "
        f"(hash {summary['settings']['pairs']}), {summary['steps']} steps, {summary['seconds']} s.\n\n"
        f"Last step: {last}.\n\n![training](training.png)\n\n| setting | value |\n|---|---|\n{given}\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# copies of what another stage owns; read each there once


# Copied from 01_sample_errors.py
def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2. What is written stays."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# Copied from 01_sample_errors.py
def read_rows(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """Rows of a JSON Lines file. Stops, naming file and line, where one is no object or lacks one of `fields`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would part rows at U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: cannot be read ({error.__class__.__name__}: {error}); give a JSON Lines file in UTF-8")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            stop(f"{path}, line {number}: not JSON ({error}); every line must be one object")
        if not isinstance(row, dict):
            stop(f"{path}, line {number}: {type(row).__name__} instead of an object such as {{...}}")
        if missing := [field for field in fields if row.get(field) in (None, "")]:
            stop(f"{path}, line {number}: no {' and no '.join(map(repr, missing))}; every row needs {', '.join(fields)}")
        rows.append(row)
    return rows or stop(f"{path}: no rows; it is empty")


# Copied from 01_sample_errors.py
def load_tokenizer(model: str, template: Path | None, switches: str, chat: bool = True):
    """The tokenizer of a folder or hub id, with the chat template and the template's switches (JSON) that will be used, unless
    the prompt is to be no `chat`."""
    import transformers

    hub_id = re.fullmatch(r"\w[^/]*/[^/]+", model) and not Path(model).exists()
    if not hub_id and not (Path(model) / "config.json").is_file():
        stop(f"--model {model}: neither a folder with a config.json nor a hub id of the form owner/name")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        if template:
            tokenizer.chat_template = template.read_text()
        tokenizer.switches = json.loads(switches)
        if chat:
            render_prompt(tokenizer, "1 + 1 = ?", "Step 1:")
    except (OSError, ValueError) as error:
        given = f", --chat-template {template}" * bool(template) + f", --chat-template-kwargs {switches}" * (switches != "{}")
        stop(f"--model {model}{given}: {str(error).splitlines()[0]}")
    return tokenizer


# Copied from 01_sample_errors.py
def render_prompt(tokenizer, problem: str, opening: str) -> str:
    """What the model sees: the problem, and the assistant's `opening`, to be gone on with. ValueError: the template fails."""
    turns = [{"role": "user", "content": USER_TURN.format(problem=problem)}]
    turns += [{"role": "assistant", "content": opening}] if opening else []
    how = {"continue_final_message": True} if opening else {"add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **how, **getattr(tokenizer, "switches", {}))
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template fails: {error}") from error
    if not text.endswith(opening):
        raise ValueError(f"the chat template does not end the prompt with the given steps but with {text[-60:]!r}")
    return text


# Copied from 01_sample_errors.py
def processor_has_bf16() -> bool:
    """Whether bf16 is arithmetic here. On AVX2 and AVX-512 alone it is emulated: fp32 samples 2.3 times as fast there."""
    path = Path("/proc/cpuinfo")
    return bool(re.search(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", path.read_text() if path.is_file() else ""))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n\nInput")[0]))
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
