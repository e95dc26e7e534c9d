"""Train a model on preference pairs: the DPO loss over (prefix, chosen, rejected) (Step-DPO, arXiv 2406.18629, Eq. 2).

    accelerate launch 04_train_stepdpo.py                                        # the paper's 7B run, on every GPU there is
    python 04_train_stepdpo.py --data runs/pairs.jsonl --model data/tiny/model --lr 3e-6 --epochs 1 --out runs/tuned
    python 04_train_stepdpo.py --data xinlai/Math-Step-DPO-10K                   # the published pairs, from the hub

Input, a line a pair (the schema of xinlai/Math-Step-DPO-10K; other fields are ignored):
    {"prompt": "Ava has ...", "initial_reason_steps": "Let's think step by step.\\nStep 1: ...\\nStep 2:",
     "chosen": " 3 + 4 = 7.\\n", "rejected": " 3 + 4 = 8.\\n", "full_chosen": "...", "full_rejected": "..."}

Output: a Hugging Face folder, beside it metrics.jsonl, a line a logged step, and checkpoint-N/ to go on from:
    {"step": 1, "loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "chosen_logp": -1.2, "rejected_logp": -4.1, ...}

What is particular here:
  - a pair is one row [prefix | chosen | rejected]; a mask keeps rejected from seeing chosen, and both count their positions
    on from the prefix: the same log-probabilities as two separate rows, at little more than half the tokens;
  - the vocabulary is multiplied out at suffix positions only, in chunks;
  - reference log-probabilities are computed once, from the untouched base weights, and cached in OUT: no second model;
  - master weights and the loss are fp32, also under bf16 autocast: a bf16 weight swallows a step of 5e-7;
  - a single step never ends in EOS; a suffix that ends the solution does.
The same command run again goes on from the last whole checkpoint.
"""

import contextlib
import hashlib
import inspect
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

# Copied from 01_sample_errors.py
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LOGITS_CHUNK = 2048  # suffix positions whose logits stand in memory at once


@dataclass
class Args:
    """Every default is the paper's value for 7B."""

    data: tuple[str, ...] = ("data/pairs.jsonl",)
    """files of pairs, or a data set on the hub"""
    model: str = "Qwen/Qwen2-7B-Instruct"
    """folder or hub id of the model to train, which is the reference too"""
    out: Path = Path("runs/stepdpo")
    """folder to write"""
    chat_template: Path | None = None
    """Jinja file to use instead of the model's own chat template; give 01 to 03 the same"""
    beta: float = 0.4
    """strength of the pull to the reference (paper: 0.4, for 72B 0.5; its released scripts have them the other way round)"""
    nll_weight: float = 0.0
    """weight of the chosen suffix's mean negative log-likelihood per token, added to the loss; the papers have none"""
    epochs: int = 8
    """passes over the pairs (paper: 8, above 30B 4)"""
    lr: float = 5e-7
    """peak learning rate: linear warm-up, then cosine to zero"""
    warmup: float = 0.1
    """share of all steps that warm up"""
    batch_size: int = 128
    """pairs of one optimizer step, over all processes; the gradient is their mean, however they are packed"""
    tokens_per_batch: int = 16384
    """tokens, padding included, of one forward pass on one device"""
    max_length: int = 1024
    """longest prefix + suffix in tokens; longer pairs are left out and counted, never cut"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """arithmetic of forward and backward; master weights are fp32 in both"""
    gradient_checkpointing: bool = False
    """compute activations twice to save memory"""
    validation: Path | None = None
    """file of pairs to watch accuracy and margin on"""
    validation_fraction: float = 0.0
    """take this share of the problems of --data for validation instead; they are not trained on"""
    eval_steps: int = 50
    """validate every so many steps, before the first and after the last"""
    save_steps: int = 100
    """checkpoint every so many steps"""
    keep: int = 2
    """checkpoints to keep; 0 removes them all when the model is saved"""
    log_steps: int = 1
    """log every so many steps"""
    seed: int = 0
    """seed of the data order"""


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


# ---------------------------------------------------------------------------------------------------------------------
# data


def load_pairs(name: str) -> list[dict]:
    """Rows of a file, or of a data set on the hub (its train split)."""
    fields = ("prompt", "initial_reason_steps", "chosen", "rejected", "full_chosen", "full_rejected")
    if name.endswith(".jsonl") or Path(name).exists():
        return read_rows(Path(name), fields)
    import datasets

    try:
        rows = list(datasets.load_dataset(name, split="train"))
    except Exception as error:  # the library raises many kinds: no network, no such set, gated ...
        stop(f"--data {name}: no such file, and the hub does not give it ({str(error).splitlines()[0]})")
    if missing := [field for field in fields if field not in rows[0]]:
        stop(f"--data {name}: no {missing[0]!r}; pairs need {', '.join(fields)}")
    return rows


def ends_solution(prefix: str, suffix: str, full: str) -> bool:
    """Whether nothing follows `suffix` in the full text, which may or may not repeat the prefix (the published set
    has both texts as the model's whole answer)."""
    return full.strip() in ((prefix + suffix).strip(), suffix.strip())


def encode(row: dict, tokenizer) -> dict:
    """Token ids {"prefix", "chosen", "rejected"} of a pair, parted where generation had parted them.

    Joint ids are used where they begin with the prefix's. Where a token would span the boundary they are not what was
    sampled (the prefix was given, the suffix drawn), and the suffix is encoded on its own."""
    opening = row["initial_reason_steps"].rstrip(" ")
    moved = row["initial_reason_steps"][len(opening) :]  # a space before the suffix belongs to the suffix's first token
    messages = [{"role": "user", "content": USER_TURN.format(problem=row["prompt"])},
                {"role": "assistant", "content": opening}]  # fmt: skip
    text = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    if not text.endswith(opening):
        raise ValueError(f"the chat template does not end the prompt with the given steps but with {text[-60:]!r}")
    ids = {"prefix": tokenizer(text, add_special_tokens=False)["input_ids"]}
    for side in ("chosen", "rejected"):
        suffix = moved + row[side]
        joint = tokenizer(text + suffix, add_special_tokens=False)["input_ids"]
        fits = joint[: len(ids["prefix"])] == ids["prefix"]
        ids[side] = joint[len(ids["prefix"]) :] if fits else tokenizer(suffix, add_special_tokens=False)["input_ids"]
        if ends_solution(opening, suffix, row[f"full_{side}"]):
            ids[side] = [*ids[side], tokenizer.eos_token_id]  # a single step gets none: EOS would teach to stop half-way
    return ids


def prepare_pairs(rows: list[dict], tokenizer, args: Args, name: str) -> list[dict]:
    """Encoded pairs; says how many were left out, and why."""
    pairs, too_long, equal = [], 0, 0
    for row in rows:
        try:
            ids = encode(row, tokenizer)
        except (ValueError, transformers.utils.chat_template_utils.jinja2.TemplateError) as error:
            stop(f"--model {args.model}: its chat template fails ({error}); give another by --chat-template")
        if len(ids["prefix"]) + max(len(ids["chosen"]), len(ids["rejected"])) > args.max_length:
            too_long += 1
        elif ids["chosen"] == ids["rejected"] or not ids["chosen"] or not ids["rejected"]:
            equal += 1
        else:
            pairs.append(ids)
    if not pairs:
        stop(f"{name}: no pair is left of {len(rows)}: {too_long} above --max-length, {equal} without contrast")
    prefix, both = (sum(map(f, pairs)) for f in (lambda p: len(p["prefix"]), lambda p: len(p["chosen"]) + len(p["rejected"])))
    print_main(f"{name}: {len(pairs)} pairs; left out: {too_long} above --max-length, {equal} without contrast; tokens a pair: "
               f"prefix {prefix / len(pairs):.0f}, suffixes {both / len(pairs):.0f}; a shared prefix saves "
               f"{prefix / (2 * prefix + both):.0%} of the tokens")  # fmt: skip
    return pairs


def collate(pairs: list[dict], pad: int, device) -> dict:
    """One row [prefix | chosen | rejected] a pair, padded on the right.

    For prefix [a b], chosen [c d], rejected [e]:  ids [a b c d e], positions [0 1 2 3 2], segments [0 0 1 1 2] (3: padding);
    c and e are predicted at b, d at c, so source is [1 2 1], target [c d e], owner [0 0 1] (2 * pair + side)."""
    width = max(len(p["prefix"]) + len(p["chosen"]) + len(p["rejected"]) for p in pairs)
    ids, positions = torch.full((len(pairs), width), pad), torch.zeros(len(pairs), width, dtype=torch.long)
    segments, source, target, owner = torch.full((len(pairs), width), 3), [], [], []
    for b, pair in enumerate(pairs):
        at, start = 0, len(pair["prefix"])
        for segment, part in enumerate(("prefix", "chosen", "rejected")):
            here, first = pair[part], 0 if part == "prefix" else start
            ids[b, at : at + len(here)] = torch.tensor(here)
            positions[b, at : at + len(here)] = torch.arange(first, first + len(here))
            segments[b, at : at + len(here)] = segment
            if segment:
                source += [b * width + start - 1, *range(b * width + at, b * width + at + len(here) - 1)]
                target += here
                owner += [2 * b + segment - 1] * len(here)
            at += len(here)
    batch = {"ids": ids, "positions": positions, "segments": segments}
    batch |= {"source": torch.tensor(source), "target": torch.tensor(target), "owner": torch.tensor(owner)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def plan(lengths: list[int], chosen: list[int], tokens: int, rank: int, world: int) -> list[list[int]]:
    """Micro-batches (lists of pair numbers) of this process for the pairs `chosen`, at most `tokens` a batch.

    Every process gets the same number of batches, since sharded strategies wait for each other in every pass: where pairs
    run out, a batch repeats one pair as [-1 - number], to be computed and not counted."""
    order, batches = sorted(chosen, key=lambda i: (lengths[i], i)), []
    for process in range(world):
        batches.append([])
        for i in order[process::world]:
            if not batches[-1] or (len(batches[-1][-1]) + 1) * lengths[i] > tokens:  # sorted: the last is the longest
                batches[-1].append([])
            batches[-1][-1].append(i)
    most = max(map(len, batches))
    return batches[rank] + [[-1 - order[0]]] * (most - len(batches[rank]))


# ---------------------------------------------------------------------------------------------------------------------
# model and loss


class SuffixScorer(torch.nn.Module):
    """Summed log-probability of each suffix given its prefix: (pairs, 2), chosen first, fp32, in nats."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, positions, segments, source, target, owner):
        width = ids.shape[1]  # ids, positions, segments: (pairs, width); source, target, owner: (suffix tokens,)
        before = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        sees = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # the prefix and one's own kind
        hidden = self.lm.base_model(
            input_ids=ids, position_ids=positions, attention_mask=(before & sees)[:, None], use_cache=False
        ).last_hidden_state.flatten(0, 1)[source]  # (suffix tokens, hidden size)
        parts = []
        for hidden_part, target_part in zip(hidden.split(LOGITS_CHUNK), target.split(LOGITS_CHUNK), strict=True):
            many = torch.is_grad_enabled() and len(target) > LOGITS_CHUNK  # then logits are made again in the backward pass
            parts.append(
                checkpoint(self.token_logps, hidden_part, target_part, use_reentrant=False)
                if many else self.token_logps(hidden_part, target_part)
            )  # fmt: skip
        sums = torch.zeros(2 * len(ids), dtype=torch.float32, device=ids.device)
        return sums.index_add(0, owner, torch.cat(parts)).view(-1, 2)

    def token_logps(self, hidden, target):
        logits = self.lm.get_output_embeddings()(hidden).float()  # (tokens, vocabulary)
        if cap := getattr(self.lm.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return -F.cross_entropy(logits, target, reduction="none")


def dpo_loss(logps: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (pairs,) of Eq. 2 and the implicit rewards beta * (log pi - log pi_ref), (pairs, 2), chosen first."""
    rewards = beta * (logps - reference)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]), rewards


def learning_rate(step: int, total: int, args: Args) -> float:
    """Rate of step 0, 1, ...: a line up to the peak, then half a cosine down to zero."""
    warm = math.ceil(args.warmup * total)
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


# ---------------------------------------------------------------------------------------------------------------------
# the stage


def print_main(text: str):
    tqdm.write(text, file=sys.stderr) if PRINTS else None


PRINTS = True  # false on all processes but the first


def load_model(args: Args, accelerator: Accelerator):
    """The model with fp32 weights and no dropout, its tokenizer, and the dtype that its weights are stored in."""
    if not (Path(args.model) / "config.json").is_file() and (Path(args.model).exists() or args.model.count("/") != 1):
        stop(f"--model {args.model}: neither a folder with a config.json nor a hub id of the form owner/name")
    if args.chat_template and not args.chat_template.is_file():
        stop(f"--chat-template {args.chat_template}: no such file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        dtype = transformers.AutoConfig.from_pretrained(args.model).dtype or torch.bfloat16
        lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        stop(f"--model {args.model}: cannot be loaded ({str(error).splitlines()[0]})")
    if args.chat_template:
        tokenizer.chat_template = args.chat_template.read_text()
    if not tokenizer.chat_template:
        stop(f"--model {args.model} has no chat template; give one by --chat-template, the same as in 01 to 03")
    window = getattr(lm.config, "sliding_window", None) if getattr(lm.config, "use_sliding_window", True) else None
    if window and window < args.max_length:
        stop(f"--max-length {args.max_length} is more than the model's attention window of {window}")
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the reference has none either: with it, step 0 would not be ln 2
    if getattr(lm.config, "attention_dropout", 0.0):
        lm.config.attention_dropout = 0.0
        for module in lm.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm, tokenizer, dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def weights_hash(lm) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def score_all(scorer, pairs: list[dict], args: Args, pad: int, accelerator: Accelerator, label: str) -> torch.Tensor:
    """Log-probabilities of all pairs, (pairs, 2) on the CPU, the same on every process."""
    lengths, found = [pair_length(pair) for pair in pairs], torch.zeros(len(pairs), 2, device=accelerator.device)
    everything, tokens = list(range(len(pairs))), 4 * args.tokens_per_batch  # no gradients: room for more
    batches = plan(lengths, everything, tokens, accelerator.process_index, accelerator.num_processes)
    for batch in tqdm(batches, desc=label, disable=not PRINTS, leave=False):
        logps = scorer(**collate([pairs[i if i >= 0 else -1 - i] for i in batch], pad, accelerator.device))
        if batch[0] >= 0:
            found[batch] = logps
    return accelerator.reduce(found, "sum").cpu()


def pair_length(pair: dict) -> int:
    return len(pair["prefix"]) + len(pair["chosen"]) + len(pair["rejected"])


def reference_logps(scorer, pairs, args, pad, accelerator, weights: str) -> torch.Tensor:
    """Log-probabilities under the base weights, from OUT/reference-*.npy where weights, token ids (so data and template),
    precision and the code that computes them are the same."""
    code = inspect.getsource(SuffixScorer) + inspect.getsource(collate) + torch.__version__ + args.precision
    key = hashlib.sha256((weights + code + json.dumps(pairs)).encode()).hexdigest()[:16]
    path = args.out / f"reference-{key}.npy"
    if path.exists():
        print_main(f"reference log-probabilities: {path}")
        return torch.from_numpy(np.load(path))
    found = score_all(scorer, pairs, args, pad, accelerator, "reference")
    if accelerator.is_main_process:
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, found.numpy())
        temporary.replace(path)
    return found


def validate(scorer, pairs, reference, args, pad, accelerator) -> dict:
    logps = score_all(scorer, pairs, args, pad, accelerator, "validation")
    loss, rewards = dpo_loss(logps, reference, args.beta)
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "val_loss": loss.mean().item(), "val_accuracy": (margin > 0).float().mean().item(), "val_margin": margin.mean().item(),
        "val_chosen_logp": logps[:, 0].mean().item(), "val_rejected_logp": logps[:, 1].mean().item(),
    }  # fmt: skip


def train_step(scorer, optimizer, pairs, reference, batch, lengths, args, pad, accelerator) -> dict:
    """One optimizer step over the pairs `batch`. Returns the means over these pairs, the same on every process."""
    device, world = accelerator.device, accelerator.num_processes
    micro = plan(lengths, batch, args.tokens_per_batch, accelerator.process_index, world)
    sums = torch.zeros(8, dtype=torch.float64, device=device)
    for number, numbers in enumerate(micro):
        real = [i if i >= 0 else -1 - i for i in numbers]
        inputs = collate([pairs[i] for i in real], pad, device)
        sync = contextlib.nullcontext() if number == len(micro) - 1 else accelerator.no_sync(scorer)
        with sync:
            logps = scorer(**inputs)
            loss, rewards = dpo_loss(logps, reference[real].to(device), args.beta)
            if args.nll_weight:
                tokens = torch.tensor([len(pairs[i]["chosen"]) for i in real], device=device)
                loss = loss - args.nll_weight * logps[:, 0] / tokens
            counts = float(numbers[0] >= 0)  # 0: a stand-in, there only to keep the processes together
            # data-parallel gradients are averaged over processes; the mean over the global batch is meant
            accelerator.backward(counts * loss.sum() * world / len(batch))
        margin = (rewards[:, 0] - rewards[:, 1]).detach()
        parts = [loss.detach(), (margin > 0).float(), margin, *rewards.detach().unbind(1), *logps.detach().unbind(1)]
        sums[:7] += counts * torch.stack([part.sum() for part in parts]).double()
        sums[7] += inputs["ids"].numel()
    norm = accelerator.clip_grad_norm_(scorer.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sums = accelerator.reduce(sums, "sum").tolist()
    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp")
    result = {name: value / len(batch) for name, value in zip(names, sums, strict=False)} | {"grad_norm": float(norm)}
    used = sum(lengths[i] for i in batch)
    return result | {"tokens": used, "padding": 1 - used / sums[7]}


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint that was written whole: a half-written one still has its temporary name."""
    found = [path for path in out.glob("checkpoint-*") if path.name.split("-")[1].isdigit() and (path / "state.json").exists()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def save_checkpoint(accelerator: Accelerator, args: Args, step: int, settings: dict):
    path = args.out / f"checkpoint-{step}"
    temporary = args.out / f"writing-checkpoint-{step}"
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        (temporary / "state.json").write_text(json.dumps({"step": step, "settings": settings}, indent=1))
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        older = sorted(args.out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        for old in older[: -args.keep or None]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def save_model(accelerator: Accelerator, scorer, tokenizer, out: Path, dtype: torch.dtype):
    """A Hugging Face folder in the dtype of the base model, from every strategy."""
    state = accelerator.get_state_dict(scorer)
    if accelerator.is_main_process:
        lm = accelerator.unwrap_model(scorer).lm
        lm.save_pretrained(out, state_dict={name.removeprefix("lm."): tensor.to(dtype) for name, tensor in state.items()})
        config = json.loads((out / "config.json").read_text())  # it names the fp32 of the master weights
        config["dtype"] = str(dtype).removeprefix("torch.")
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(out)
    accelerator.wait_for_everyone()


def main(args: Args):
    global PRINTS
    if min(args.epochs, args.batch_size, args.tokens_per_batch, args.eval_steps, args.save_steps, args.log_steps) < 1:
        stop("--epochs, --batch-size, --tokens-per-batch and all --...-steps are at least 1")
    began, rows = time.time(), [row for name in args.data for row in load_pairs(name)]
    validation_rows = load_pairs(str(args.validation)) if args.validation else []
    if args.validation_fraction:
        part = lambda row: hashlib.sha256(f"{args.seed} {row['prompt']}".encode()).digest()[0] / 256 < args.validation_fraction
        validation_rows += [row for row in rows if part(row)]
        rows = [row for row in rows if not part(row)]
    accelerator = Accelerator(mixed_precision="bf16" if args.precision == "bf16" else "no")
    PRINTS = accelerator.is_main_process
    torch.manual_seed(args.seed)
    lm, tokenizer, dtype = load_model(args, accelerator)
    pairs = prepare_pairs(rows, tokenizer, args, " ".join(args.data))
    val_pairs = prepare_pairs(validation_rows, tokenizer, args, "validation") if validation_rows else []
    print_main(f"first row: {tokenizer.decode(pairs[0]['prefix'])!r} | chosen {tokenizer.decode(pairs[0]['chosen'])!r} | "
               f"rejected {tokenizer.decode(pairs[0]['rejected'])!r}")  # fmt: skip

    lengths, pad = [pair_length(pair) for pair in pairs], tokenizer.eos_token_id
    per_epoch = math.ceil(len(pairs) / args.batch_size)
    total = per_epoch * args.epochs
    ignored = {"out", "save_steps", "eval_steps", "log_steps", "keep", "data", "validation", "tokens_per_batch"}
    settings = {name: str(value) for name, value in asdict(args).items() if name not in ignored}
    weights = weights_hash(lm)
    settings |= {"weights": weights[:16], "pairs": hashlib.sha256(json.dumps([pairs, val_pairs]).encode()).hexdigest()[:16]}
    args.out.mkdir(parents=True, exist_ok=True)
    resume = last_checkpoint(args.out)
    if resume:
        old = json.loads((resume / "state.json").read_text())
        for name, value in settings.items():
            if old["settings"].get(name) != value:
                stop(f"{resume} was made with {name} = {old['settings'].get(name)!r}, now it is {value!r}; "
                     "take the old setting or give another --out")  # fmt: skip

    scorer = SuffixScorer(lm)
    optimizer = torch.optim.AdamW(
        scorer.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=accelerator.device.type == "cuda"
    )
    scorer, optimizer = accelerator.prepare(scorer, optimizer)
    scorer.train()
    reference = reference_logps(scorer, pairs, args, pad, accelerator, weights)
    val_reference = reference_logps(scorer, val_pairs, args, pad, accelerator, weights) if val_pairs else None
    start = 0
    if resume:
        accelerator.load_state(str(resume))
        start = old["step"]
        print_main(f"going on from {resume}")
    metrics_path = args.out / "metrics.jsonl"
    kept = [line for line in metrics_path.read_text().splitlines() if json.loads(line)["step"] <= start] if resume else []
    if accelerator.is_main_process:
        metrics_path.write_text("".join(line + "\n" for line in kept))
    log = {}

    def record(row: dict):
        if accelerator.is_main_process:
            with open(metrics_path, "a") as file:
                file.write(json.dumps(row) + "\n")
        print_main(" ".join(f"{name} {value:.4g}" for name, value in row.items()))

    if val_pairs and start == 0:
        record({"step": 0} | validate(scorer, val_pairs, val_reference, args, pad, accelerator))
    bar = tqdm(total=total, initial=start, desc="training", disable=not PRINTS)
    for step in range(start + 1, total + 1):
        epoch, place = divmod(step - 1, per_epoch)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(pairs)).tolist()
        batch = order[place * args.batch_size :][: args.batch_size]
        tick, rate = time.time(), learning_rate(step - 1, total, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        log = train_step(scorer, optimizer, pairs, reference, batch, lengths, args, pad, accelerator)
        seconds = time.time() - tick
        bar.update()
        if not math.isfinite(log["loss"] + log["grad_norm"]):
            stop(f"step {step}: loss {log['loss']}, gradient norm {log['grad_norm']}; last good checkpoint: "
                 f"{last_checkpoint(args.out) or 'none'}")  # fmt: skip
        if step == 1 and not args.nll_weight and abs(log["loss"] - math.log(2)) > 0.02:
            print_main(f"warning: the first loss is {log['loss']:.4f} and not ln 2 = 0.6931: policy and reference differ")
        log |= {"lr": rate, "pairs_per_s": len(batch) / seconds, "tokens_per_s": log.pop("tokens") / seconds}
        if accelerator.device.type == "cuda":
            log["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if step % args.log_steps == 0 or step == total:
            record({"step": step, "epoch": epoch + 1} | log)
        if val_pairs and (step % args.eval_steps == 0 or step == total):
            record({"step": step} | validate(scorer, val_pairs, val_reference, args, pad, accelerator))
        if step % args.save_steps == 0 and step < total:
            save_checkpoint(accelerator, args, step, settings)
    bar.close()
    save_model(accelerator, scorer, tokenizer, args.out, dtype)
    if accelerator.is_main_process:
        summary = {"arguments": {name: str(value) for name, value in asdict(args).items()}, "settings": settings,
                   "pairs": len(pairs), "steps": total, "seconds": round(time.time() - began, 1), "last": log}  # fmt: skip
        (args.out / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
        for path in args.out.glob("checkpoint-*") if args.keep == 0 else ():
            shutil.rmtree(path)
        print(f"{args.out}: {total} steps over {len(pairs)} pairs, {time.time() - began:.1f} s; last step: "
              + ", ".join(f"{name} {log[name]:.4g}" for name in ("loss", "accuracy", "margin") if log))  # fmt: skip
    # freed before the process group is: with accelerate 1.15 and gloo about one exit in seven hung the other way round
    scorer, optimizer = accelerator.free_memory(scorer, optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
