"""Cut the pairs of recipes/ablation_tiny.sh to equal numbers of pairs, and to equal numbers of trained tokens.

    python analysis/same_size.py runs/ablation --pairs 400

Reads OUT/all-METHOD.jsonl; writes OUT/pairs/METHOD.jsonl (the same number of pairs each; SCDPO: half naive, half
step-controlled), METHOD-tokens.jsonl (as many tokens in chosen and rejected as Step-DPO has) and METHOD.validation.jsonl (a
tenth as many pairs, of other problems). Shuffled with seed 0.
"""

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


def main(args: Args):
    tokenizer, found = AutoTokenizer.from_pretrained(args.model), {}
    for method in ("dpo", "scdpo", "step-dpo", "step-dpo-ood"):
        if "step" in method and not (args.out / f"all-{method}.jsonl").exists():
            continue  # METHODS without it
        rows = [json.loads(line) for line in (args.out / f"all-{method}.jsonl").read_text().split("\n") if line]
        random.Random(0).shuffle(rows)
        found[method] = rows
    naive = {row["id"] for row in found["dpo"]}
    held = set(sorted(naive)[::10])  # problems of the validation pairs
    parts = {method: ([row for row in rows if row["id"] not in held], [row for row in rows if row["id"] in held])
             for method, rows in found.items()}  # fmt: skip
    size = min(args.pairs, *(len(train) if method != "scdpo" else 2 * len(train) for method, (train, _) in parts.items()))
    half = [parts["scdpo"][0][: size // 2] + parts["dpo"][0][: size - size // 2], parts["scdpo"][1] + parts["dpo"][1]]
    for part in half:
        random.Random(1).shuffle(part)
    parts["scdpo"] = half
    tokens = lambda rows: sum(len(tokenizer(row[side])["input_ids"]) for row in rows for side in ("chosen", "rejected"))
    write = lambda name, rows: (args.out / "pairs" / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    budget, said = tokens(parts["step-dpo"][0][:size]) if "step-dpo" in parts else 0, []
    for method, (train, held_out) in parts.items():
        sizes = {method: train[:size]}
        if budget and method in ("dpo", "scdpo"):
            count = next((i for i in range(1, size + 1) if tokens(train[:i]) > budget), size + 1) - 1
            sizes[f"{method}-tokens"] = train[:count]
        for name, rows in sizes.items():
            write(name, rows)
            write(f"{name}.validation", held_out[: max(20, size // 10)])
            said.append(f"{name} {len(rows)} pairs, {tokens(rows)} tokens")
    print("; ".join(said))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
