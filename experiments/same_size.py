"""Cut the pairs of experiments/ablation_tiny.sh and small_model.sh to equal numbers of pairs, and
of trained tokens.

    python experiments/same_size.py runs/ablation --pairs 400
    python experiments/same_size.py runs/small_model --pairs 400 --model Qwen/Qwen2.5-0.5B-Instruct --sft

Reads OUT/all-METHOD.jsonl, for SFT the right solutions in OUT/samples.jsonl, once each; writes
OUT/pairs/METHOD.jsonl (the same number of pairs each; SCDPO: half naive, half step-controlled),
METHOD-tokens.jsonl (as many tokens in chosen and rejected as Step-DPO has) and
METHOD.validation.jsonl (a tenth as many pairs, of other problems). Shuffled with seed 0."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
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


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def right_solutions(path: Path) -> list[dict]:
    """Of 01's samples the right ones, a text once, by problem and sample."""
    rows = sorted(
        (row for row in rows_of(path) if row["correct"]), key=lambda row: (row["id"], row["sample"])
    )
    return list({(row["id"], row["response"]): row for row in reversed(rows)}.values())


def main(args: Args):
    tokenizer, found = AutoTokenizer.from_pretrained(args.model), {}
    for method in ("dpo", "scdpo", "step-dpo", "step-dpo-ood", *["sft"] * args.sft):
        if "step" in method and not (args.out / f"all-{method}.jsonl").exists():
            continue  # METHODS without it
        rows = (
            right_solutions(args.out / "samples.jsonl")
            if method == "sft"
            else rows_of(args.out / f"all-{method}.jsonl")
        )
        random.Random(0).shuffle(rows)
        found[method] = rows
    naive = {row["id"] for row in found["dpo"]}
    held = set(sorted(naive)[::10])  # problems of the validation pairs
    parts = {
        method: (
            [row for row in rows if row["id"] not in held],
            [row for row in rows if row["id"] in held],
        )
        for method, rows in found.items()
    }
    size = min(
        args.pairs,
        *(
            len(train) if method != "scdpo" else 2 * len(train)
            for method, (train, _) in parts.items()
        ),
    )
    half = [
        parts["scdpo"][0][: size // 2] + parts["dpo"][0][: size - size // 2],
        parts["scdpo"][1] + parts["dpo"][1],
    ]
    for part in half:
        random.Random(1).shuffle(part)
    parts["scdpo"] = half

    def texts(row):
        return [row["response"]] if "response" in row else [row["chosen"], row["rejected"]]

    def tokens(rows):
        return sum(len(tokenizer(text)["input_ids"]) for row in rows for text in texts(row))

    def write(name, rows):
        return (args.out / "pairs" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )

    budget, said = tokens(parts["step-dpo"][0][:size]) if "step-dpo" in parts else 0, []
    for method, (train, held_out) in parts.items():
        sizes = {method: train[:size]}
        if budget and method in ("dpo", "scdpo"):
            count = (
                next((i for i in range(1, size + 1) if tokens(train[:i]) > budget), size + 1) - 1
            )
            sizes[f"{method}-tokens"] = train[:count]
        for name, rows in sizes.items():
            write(name, rows)
            write(f"{name}.validation", held_out[: max(20, size // 10)])
            said.append(f"{name} {len(rows)} pairs, {tokens(rows)} tokens")
    print("; ".join(said))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
