"""How many tokens 04's trees save against rows of one sequence each, and against rows shared by the
pairs of one prefix.

    python experiments/shared_tries.py --data runs/quickstart/pairs.jsonl --model data/tiny/model       # options of 04

A tree holds each token once that several sequences of a problem begin with: prompts, nested
prefixes, the common beginning of chosen and rejected. Counted in the batches that 04 makes, without
padding."""

import importlib
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
TRAIN = importlib.import_module("04_train_stepdpo")


def main(args: TRAIN.Args):
    args.precision = "fp32"
    rows = [row for name in args.data for row in TRAIN.load_rows(name, args.objective)]
    pairs = TRAIN.prepare(
        rows,
        TRAIN.load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs),
        args,
        "data",
    )
    batches = TRAIN.batches(pairs, args, 0)

    def prefix(i):
        return len(pairs.prefixes[pairs.prefix[i]])

    separate = sum(
        prefix(i) + len(suffix) for i in range(len(pairs)) for suffix in pairs.suffixes[i]
    )
    shared = 0
    for batch in batches:
        of = {}
        for i in batch:
            of.setdefault(pairs.prefix[i], {}).update(
                {suffix.tobytes(): len(suffix) for suffix in pairs.suffixes[i]}
            )
        shared += sum(
            len(pairs.prefixes[number]) + sum(found.values()) for number, found in of.items()
        )
    trees = sum(pairs.length(row) for batch in batches for row in pairs.by_problem(batch))
    print(
        f"{len(pairs)} pairs of {len(pairs.problems)} problems, {len(pairs.prefixes)} prefixes; a row a sequence: {separate} "
        f"tokens; a row a prefix: {shared}; a tree a problem: {trees}, {1 - trees / shared:.1%} less than a row a prefix, "
        f"{1 - trees / separate:.1%} less than a row a sequence"
    )


if __name__ == "__main__":
    main(tyro.cli(TRAIN.Args, description=__doc__))
