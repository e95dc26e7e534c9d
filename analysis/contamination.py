"""Which test problems share 13 words in a row with a training file.

    python analysis/contamination.py runs/quickstart/pairs.jsonl --data data/tiny/test.jsonl
    python analysis/contamination.py data/pairs.jsonl --data data/gsm8k_test.jsonl --out hits.json

Input: training rows with `prompt` or `problem`, and test sets as 05_eval.py takes them. Prints
counts and first hits; OUT gets
    {"file": "...", "rows": 369, "same": {"test": ["id", ...]},
     "found": {"test": [{"id": "...", "line": 7, "words": "..."}]}}
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


def words_of(text: str) -> list[str]:
    return re.findall(r"[一-鿿]|[^\W一-鿿]+", text.lower())


def grams_of(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + 13]) for i in range(max(1, len(words) - 12))}


def whole_of(text: str) -> str:
    """A text without spaces and without the marks at its end: signs and operators count."""
    return re.sub(r"\s", "", text.lower()).rstrip("?.!。？")


def contamination(path: Path, benchmarks: dict[str, list[dict]]) -> dict:
    """Test problems that share 13 words in a row (Chinese: characters) with a training problem;
    shorter ones if it is all of them. Only the test sets' n-grams are kept in memory, not those of
    the training file."""
    index = {}
    for name, problems in benchmarks.items():
        for problem in problems:
            for gram in grams_of(problem["problem"]):
                index.setdefault(gram, []).append((name, problem["id"]))
    rows = EVAL.read_rows(path, ())
    hits, whole_texts = {name: {} for name in benchmarks}, set()
    for line, row in enumerate(rows, 1):
        text = row.get("problem", row.get("prompt"))
        if not isinstance(text, str):
            EVAL.stop(f"{path}, line {line}: no text in 'problem' or 'prompt'; every row needs one")
        whole_texts.add(whole_of(text))
        for gram in grams_of(text):
            for name, identity in index.get(gram, ()):
                hit = {"id": identity, "line": line, "words": " ".join(gram)}
                hits[name].setdefault(identity, hit)
    same, first_same = {}, {}
    for name, problems in benchmarks.items():
        same[name] = [
            problem["id"] for problem in problems if whole_of(problem["problem"]) in whole_texts
        ]
        first_same[name] = sorted(hits[name].values(), key=lambda hit: hit["id"] not in same[name])
    return {"file": str(path), "rows": len(rows), "same": same, "found": first_same}


def main(args: Args):
    if not args.file.is_file():
        EVAL.stop(f"{args.file}: no such file; give the training pairs or problems")
    names = [path.stem for path in args.data]
    if len(set(names)) < len(names):
        names = [str(path) for path in args.data]
    problems = map(EVAL.load_problems, args.data)
    benchmarks = dict(zip(names, problems, strict=True))
    overlap = contamination(args.file, benchmarks)
    for name, hits in overlap["found"].items():
        print(
            f"{name}: {len(hits)} of {len(benchmarks[name])} problems share 13 words in a row with "
            f"one of the {overlap['rows']} rows of {args.file}, "
            f"{len(overlap['same'][name])} word for word"
        )
        for hit in hits[: args.show]:
            print(f"  {hit['id']}, line {hit['line']}: {hit['words']}")
    if args.out:
        text = json.dumps(overlap, indent=1, ensure_ascii=False)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
