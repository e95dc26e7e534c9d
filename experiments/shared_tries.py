"""How many tokens 04's trees save compared with rows of one sequence each, and with rows shared by
the pairs of one prefix. The options are those of 04.

    python experiments/shared_tries.py --data runs/quickstart/pairs.jsonl --model data/tiny/model

In a tree each token stands once that several sequences of a problem begin with: prompts, nested
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
    rows = [each for name in args.data for each in TRAIN.load_rows(name, args.objective)]
    tokenizer = TRAIN.load_tokenizer(args.model, args.chat_template, args.chat_template_kwargs)
    pairs = TRAIN.prepare(rows, tokenizer, args, "data")
    separate = shared = trees = 0
    for batch in TRAIN.batches(pairs, args, 0):
        suffixes = {}  # prefix -> its different suffixes
        for i in batch:
            prefix = tuple(pairs.prefixes[i])
            texts = {suffix.tobytes(): len(suffix) for suffix in pairs.suffixes[i]}
            suffixes.setdefault(prefix, {}).update(texts)
            separate += sum(len(prefix) + len(suffix) for suffix in pairs.suffixes[i])
        for prefix, lengths in suffixes.items():
            shared += len(prefix) + sum(lengths.values())
        trees += sum(len(pairs.tree(row).ids) for row in pairs.by_problem(batch))
    print(
        f"{len(pairs)} pairs of {len(pairs.problems)} problems, "
        f"{len(set(map(tuple, pairs.prefixes)))} prefixes; "
        f"a row a sequence: {separate} tokens; a row a prefix: {shared}; "
        f"a tree a problem: {trees}, {1 - trees / shared:.1%} less than a row a prefix, "
        f"{1 - trees / separate:.1%} less than a row a sequence"
    )


if __name__ == "__main__":
    main(tyro.cli(TRAIN.Args, description=__doc__))
