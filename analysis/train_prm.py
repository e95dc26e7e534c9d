"""Train a process reward model in Qwen2.5-Math-PRM's form (arXiv 2501.07301) on solutions whose
first wrong step is known.

    python analysis/train_prm.py --data labelled.jsonl --model data/tiny/model --out runs/prm
    python analysis/score_steps.py data/samples.jsonl --prm runs/prm

Input, as for processbench.py: ProcessBench's rows, what annotate.py, true_errors.py or 02 wrote:
    {"problem": "...", "steps": ["...", "..."], "error_step": 2}

or "label": 1, 0-based, -1 for no error. On the bundled model it takes minutes on two cores.

Steps before the first wrong one count as right, it as wrong, those after it not at all. The model
must be of Qwen2's kind; all of its weights are trained, on one device. Output: a Hugging Face
folder, as score_steps.py and vLLM read the real one."""

import importlib
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import processbench
import score_steps
import torch
import torch.nn.functional as F
import transformers
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
LOCATE = importlib.import_module("02_locate_step")


@dataclass
class Args:
    data: Path = Path("labelled.jsonl")
    """solutions with a known first wrong step"""
    model: str = "data/tiny/model"
    """where the weights come from"""
    out: Path = Path("runs/prm")
    """folder to write"""
    epochs: int = 1
    """passes over the solutions"""
    lr: float = 1e-3
    """peak learning rate; 1e-5 for a model of 7B"""
    batch_size: int = 32
    """solutions of a step"""
    held_out: int = 200
    """problems whose solutions are only scored at the end"""
    seed: int = 0
    """seed of the order and of the new head"""


def start(args: Args):
    """The model with a new head, and the tokenizer with the mark."""
    torch.manual_seed(args.seed)
    LOCATE.load_tokenizer(args.model, None, "{}")  # stops where there is none
    # saved under the class that the model names
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    kind = transformers.AutoConfig.from_pretrained(args.model).model_type
    if kind != "qwen2":
        LOCATE.stop(
            f"--model {args.model}: is {kind}; give a qwen2, the only kind that can be read"
        )
    model_class, mark = score_steps.process_reward_class(), score_steps.MARKS["qwen"]
    lm = model_class.from_pretrained(args.model, dtype=torch.float32)
    if mark not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    first, last = lm.score[0], lm.score[2]
    torch.nn.init.normal_(first.weight, std=1 / math.sqrt(first.in_features))
    # a loss of ln 2 at the start: with random logits it was 1.4 for a real model
    for weight in (first.bias, last.weight, last.bias):
        torch.nn.init.zeros_(weight)
    args.out.mkdir(parents=True, exist_ok=True)
    # Reader reads these from there; weights only when they are trained
    lm.config.architectures = [model_class.__name__]
    lm.config.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return lm.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def loss_of(lm, batch: list[tuple], reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy over the marks of a batch of (ids, places, label), up to the first wrong step:
    their mean, or for each, (marks,)."""
    longest = max(len(ids) for ids, _, _ in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long, device=lm.device)
    rows, marks, targets = [], [], []
    for number, (ids, places, label) in enumerate(batch):
        input_ids[number, : len(ids)] = torch.tensor(ids)
        labelled = places if label < 0 else places[: label + 1]
        rows += [number] * len(labelled)
        marks += labelled
        targets += [int(k != label) for k in range(len(labelled))]
    hidden = lm.model(input_ids=input_ids).last_hidden_state[rows, marks]
    targets = torch.tensor(targets, device=lm.device)
    return F.cross_entropy(lm.score(hidden).float(), targets, reduction=reduction)


def main(args: Args):
    began = time.time()
    if min(args.epochs, args.batch_size) < 1 or args.held_out < 0:
        LOCATE.stop("--epochs and --batch-size are at least 1, --held-out at least 0")
    rows = processbench.sample_rows(args.data)
    # a wrong solution in which a locator found no error is no right one
    labelled = [row for row in rows if row["label"] >= 0 or row["correct"]]
    problems = sorted({row["problem"] for row in labelled})
    if len(problems) <= args.held_out:
        LOCATE.stop(
            f"{args.data}: nothing is left to train on: it has {len(problems)} problems, and "
            f"--held-out {args.held_out}"
        )
    if any(args.out.glob("*.safetensors")):
        LOCATE.stop(f"{args.out} holds a model; give another --out")
    lm, tokenizer = start(args)
    reader = score_steps.Reader(str(args.out))
    random.Random(args.seed).shuffle(problems)
    held_out = set(problems[: args.held_out])
    train, test = [], []
    for row in tqdm(labelled, desc="encoding"):
        ids, places, reason = reader.encode(row)
        if places and not reason:
            part = test if row["problem"] in held_out else train
            part.append((ids, places, row["label"]))
    if not train:
        LOCATE.stop(
            f"{args.data}: nothing is left to train on without "
            f"the {args.held_out} problems of --held-out"
        )
    order = random.Random(args.seed)
    total = args.epochs * math.ceil(len(train) / args.batch_size)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, math.ceil(0.05 * total), total
    )
    bf16 = lm.device.type == "cuda" or LOCATE.processor_has_bf16()
    bar, losses = tqdm(total=total, desc="training"), []
    for _ in range(args.epochs):
        order.shuffle(train)
        for at in range(0, len(train), args.batch_size):
            with torch.autocast(lm.device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(lm, train[at : at + args.batch_size])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
            bar.update()
    bar.close()
    with torch.inference_mode():
        batches = [test[at : at + args.batch_size] for at in range(0, len(test), args.batch_size)]
        test_losses = [loss_of(lm, batch, "none") for batch in batches]
        held_out_loss = torch.cat(test_losses).mean().item() if batches else math.nan
    lm.to(torch.bfloat16).save_pretrained(args.out)
    wrong = sum(label >= 0 for *_, label in train)
    figures = {
        "solutions": len(train),
        "left out": len(labelled) - len(train) - len(test),
        "wrong": wrong,
        "steps": total,
        "first loss": round(losses[0], 4),
        "last loss": round(float(np.mean(losses[-5:])), 4),
        "loss on held-out problems": round(held_out_loss, 4),
        "seconds": round(time.time() - began, 1),
    }
    (args.out / "training.json").write_text(
        json.dumps({**vars(args), **figures}, indent=1, default=str) + "\n"
    )
    print(f"{args.out}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
