"""Cut the pairs of experiments/ablation_tiny.sh and small_model.sh to equal numbers of pairs, and
of trained tokens.

    python experiments/same_size.py runs/ablation --pairs 400
    python experiments/same_size.py runs/small_model --pairs 400 \\
        --model Qwen/Qwen2.5-0.5B-Instruct --sft

Reads OUT/all-METHOD.jsonl, for SFT the right solutions in OUT/samples.jsonl, once each; writes
OUT/pairs/METHOD.jsonl (the same number of pairs each; SCDPO: half naive, half step-controlled),
METHOD-tokens.jsonl (as many tokens in chosen and rejected as Step-DPO has) and
METHOD.validation.jsonl (a tenth as many pairs, at least 20, of other problems). Shuffled with seed
0."""

import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import tyro
from ablation_table import rows_of
from transformers import AutoTokenizer


@dataclass
class Args:
    out: Annotated[Path, tyro.conf.Positional]
    """folder of the ablation"""
    pairs: int = 400
    """pairs of each method at most"""
    model: str = "data/tiny/model"
    """whose tokens to count"""
    sft: bool = False
    """as many right solutions too, as OUT/pairs/sft.jsonl"""


def right_solutions(path: Path) -> list[dict]:
    """Of 01's samples the right ones, a text once, by problem and sample."""
    rows = [row for row in rows_of(path) if row["correct"]]
    rows.sort(key=lambda row: (row["id"], row["sample"]), reverse=True)
    return list({(row["id"], row["response"]): row for row in rows}.values())


def main(args: Args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = {}
    for method in ("dpo", "scdpo", "step-dpo", "step-dpo-ood"):
        path = args.out / f"all-{method}.jsonl"
        if path.exists() or "step" not in method:  # METHODS may be without the step-wise ones
            pairs[method] = rows_of(path)
    if args.sft:
        pairs["sft"] = right_solutions(args.out / "samples.jsonl")
    for rows in pairs.values():
        random.Random(0).shuffle(rows)
    naive = {row["id"] for row in pairs["dpo"]}
    held = set(sorted(naive)[::10])  # problems of the validation pairs
    train, held_out = {}, {}
    for method, rows in pairs.items():
        train[method] = [row for row in rows if row["id"] not in held]
        held_out[method] = [row for row in rows if row["id"] in held]
    # half of SCDPO's pairs are naive ones
    sizes = [len(rows) * (2 if method == "scdpo" else 1) for method, rows in train.items()]
    size = min(args.pairs, *sizes)
    train["scdpo"] = train["scdpo"][: size // 2] + train["dpo"][: size - size // 2]
    held_out["scdpo"] = held_out["scdpo"] + held_out["dpo"]
    for part in (train, held_out):
        random.Random(1).shuffle(part["scdpo"])

    def n_tokens(rows: list[dict]) -> int:
        fields = ("response", "chosen", "rejected")
        texts = [row[field] for row in rows for field in fields if field in row]
        return sum(len(tokenizer(text)["input_ids"]) for text in texts)

    def write(name: str, rows: list[dict]):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / "pairs" / f"{name}.jsonl").write_text(text)

    budget = n_tokens(train["step-dpo"][:size]) if "step-dpo" in train else 0
    summary = []
    for method, rows in train.items():
        sets = {method: rows[:size]}
        if budget and method in ("dpo", "scdpo"):
            totals = accumulate(n_tokens([row]) for row in rows[:size])
            sets[f"{method}-tokens"] = rows[: sum(total <= budget for total in totals)]
        for name, training_rows in sets.items():
            write(name, training_rows)
            write(f"{name}.validation", held_out[method][: max(20, size // 10)])
            summary.append(f"{name} {len(training_rows)} pairs, {n_tokens(training_rows)} tokens")
    print("; ".join(summary))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
