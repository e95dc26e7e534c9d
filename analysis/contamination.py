"""Which test problems share 13 words in a row with a training file.

    python analysis/contamination.py runs/quickstart/pairs.jsonl --data data/tiny/test.jsonl
    python analysis/contamination.py data/pairs.jsonl --data data/gsm8k_test.jsonl --out contamination.json

Input: training rows with `prompt` or `problem`, and test sets as 05_eval.py takes them. Prints
counts and first hits; OUT gets
    {"file": "...", "rows": 369, "same": {"test": ["id", ...]}, "found": {"test": [{"id": "...", "line": 7, "words": "..."}]}}
"""

import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
EVAL = importlib.import_module("05_eval")


@dataclass
class Args:
    file: tyro.conf.Positional[Path]
    """training pairs or problems"""
    data: tuple[Path, ...] = (Path("data/gsm8k_test.jsonl"), Path("data/math_test.jsonl"))
    """test sets: JSON Lines files, as in 05_eval.py"""
    out: Path | None = None
    """file for all hits"""
    show: int = 20
    """hits to print"""


def contamination(path: Path, benchmarks: dict[str, list[dict]]) -> dict:
    """Test problems that share 13 words in a row (Chinese: characters) with a training problem;
    shorter ones if it is all of them. Only the test sets' n-grams are kept in memory, not those of
    the training file."""
    words = lambda text: re.findall(r"[一-鿿]|\w+", text.lower())
    grams = lambda text: {tuple(text[i : i + 13]) for i in range(max(1, len(text) - 12))}
    index, found, whole = {}, {name: {} for name in benchmarks}, set()
    for name, problems in benchmarks.items():
        for problem in problems:
            for gram in grams(words(problem["problem"])):
                index.setdefault(gram, []).append((name, problem["id"]))
    rows = EVAL.read_rows(path, ())
    for line, row in enumerate(rows, 1):
        text = row.get("problem", row.get("prompt"))
        if not isinstance(text, str):
            EVAL.stop(f"{path}, line {line}: no text in 'problem' or 'prompt'; every row needs one")
        whole.add(tuple(words(text)))
        for gram in grams(words(text)):
            for name, key in index.get(gram, ()):
                found[name].setdefault(key, {"id": key, "line": line, "words": " ".join(gram)})
    same = {
        name: [problem["id"] for problem in problems if tuple(words(problem["problem"])) in whole]
        for name, problems in benchmarks.items()
    }
    found = {
        name: sorted(hits.values(), key=lambda hit: hit["id"] not in same[name])
        for name, hits in found.items()
    }
    return {"file": str(path), "rows": len(rows), "same": same, "found": found}


def main(args: Args):
    if not args.file.is_file():
        EVAL.stop(f"{args.file}: no such file; give the training pairs or problems")
    benchmarks = {path.stem: EVAL.load_problems(path) for path in args.data}
    found = contamination(args.file, benchmarks)
    for name, hits in found["found"].items():
        print(
            f"{name}: {len(hits)} of {len(benchmarks[name])} problems share 13 words in a row with one of the "
            f"{found['rows']} rows of {args.file}, {len(found['same'][name])} word for word"
        )
        for hit in hits[: args.show]:
            print(f"  {hit['id']}, line {hit['line']}: {hit['words']}")
    if args.out:
        args.out.write_text(
            json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
