"""Write data sets as JSON Lines files that the stages read, from the hub or from a folder.

    python data/download.py gsm8k math            # data/gsm8k_train.jsonl, gsm8k_test.jsonl ...
    python data/download.py aime24 odyssey-math   # data/aime24.jsonl, data/odyssey_math.jsonl
    python data/download.py gsm8k --from FOLDER   # the same file names from a folder

Output, a line a problem; `solution`, `level` and `subject` where SOURCES maps them:
    {"id": "gsm8k-test-main-0", "dataset": "gsm8k", "problem": "Ava has 3 apples ...",
     "answer": "7", "solution": "..."}

A set for tests alone has one file. FOLDER holds files in these fields. FILE.meta.json holds source,
licence, number of problems and content hash. A file that is there is not made again.
HF_HUB_OFFLINE=1 takes the sets from the local cache of the hub."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
SAMPLE = importlib.import_module("01_sample_errors")


@dataclass
class Source:
    """Where a set comes from."""

    hub: str
    """hub id, or the address of a file"""
    test: str
    """split to test on"""
    train: str = ""
    """split to train on; "": none, the set is for tests"""
    licence: str = "see its card"
    fields: str = "problem=problem answer=answer"
    """our fields and theirs"""
    parts: str = ""
    """configurations on the hub; "": it has one"""


SOURCES = {
    "gsm8k": Source(
        "openai/gsm8k",
        test="test",
        train="train",
        licence="MIT",
        fields="problem=question answer=answer solution=answer",
        parts="main",
    ),
    "gsm-plus": Source(
        "qintongli/GSM-Plus",
        test="test",
        fields="problem=question answer=answer subject=perturbation_type",
    ),
    "math": Source(
        "EleutherAI/hendrycks_math",
        test="test",
        train="train",
        licence="MIT",
        fields="problem=problem answer=solution solution=solution level=level subject=type",
        parts="algebra counting_and_probability geometry intermediate_algebra number_theory "
        "prealgebra precalculus",
    ),
    "math500": Source(
        "HuggingFaceH4/MATH-500",
        test="test",
        licence="MIT",
        fields="problem=problem answer=answer solution=solution level=level subject=subject",
    ),
    "aqua": Source(
        "deepmind/aqua_rat",
        test="test",
        train="train",
        licence="Apache-2.0",
        fields="problem=question answer=correct solution=rationale",
        parts="raw",
    ),
    "amc23": Source(
        "math-ai/amc23",
        test="test",
        licence="problems (c) MAA",
        fields="problem=question answer=answer",
    ),
    "aime24": Source(
        "HuggingFaceH4/aime_2024",
        test="train",
        licence="problems (c) MAA",
        fields="problem=problem answer=answer solution=solution",
    ),
    "aime25": Source("MathArena/aime_2025", test="train", licence="problems (c) MAA"),
    "aime26": Source("MathArena/aime_2026", test="train", licence="problems (c) MAA"),
    "hmmt-feb-2026": Source("MathArena/hmmt_feb_2026", test="train", licence="problems (c) HMMT"),
    "odyssey-math": Source(
        "https://raw.githubusercontent.com/protagolabs/odyssey-math/main/"
        "final-odyssey-math-with-levels.jsonl",
        test="test",
        licence="CC BY-SA 4.0, for tests only",
        fields="problem=question answer=answer level=level subject=label",
    ),
    "olympiadbench": Source(
        "Hothan/OlympiadBench",
        test="train",
        fields="problem=question answer=final_answer",
        parts="OE_TO_maths_en_COMP",
    ),
    "minerva": Source("math-ai/minervamath", test="test", fields="problem=question answer=answer"),
    "cmath": Source(
        "weitianwen/cmath",
        test="test",
        licence="CC BY 4.0",
        fields="problem=question answer=golden level=grade",
    ),
    # the authors' own file: on the hub a script makes it
    "mgsm-zh": Source(
        "https://raw.githubusercontent.com/google-research/url-nlp/main/mgsm/mgsm_zh.tsv",
        test="test",
        licence="CC BY 4.0",
        fields="problem=question answer=answer_number",
    ),
    "ape210k": Source(
        "MU-NLPC/Calc-ape210k",
        test="test",
        train="train",
        licence="not stated",
        fields="problem=question_chinese answer=result",
        parts="original-splits",
    ),
}
OTHER_NAMES = {"aqua": "aqua_dev", "ape210k": "ape500_test"}  # of test files in a folder
LATEX_DEBRIS = (
    r"(?:\s|\\\\|\\noindent|\\newpage|\\end\{problem\}|\\vspace\*?\{[^}]*\}"
    r"|\\section\*?(?:\{[^}]*\})?)+$"
)
# By the beginning of the problem: what its solution boxes last is not the answer, is it twice, or
# is empty.
MATH_ANSWERS = {
    r"Let $\boxed{N}$ mean the number of whole number divisors": "6",
    "The time right now is exactly midnight. What time will it be in": r"8\!:\!34 \text{ p.m.}",
    "For any integer $n>1$, the number of prime numbers greater than": "0",
    "You are given a sequence of $58$ terms; each term has the form": "0",
}
ASKS_FOR_ALL = re.compile(
    r"separated by (?:comma|semicolon)|[Ff]ind all|angles of"
    r"|all (?:possible|real|the) (?:values|solutions)"
)


@dataclass
class Args:
    names: tyro.conf.Positional[tuple[str, ...]]
    """gsm8k, gsm-plus, math, math500, aqua, amc23, aime24, aime25, aime26, hmmt-feb-2026,
    odyssey-math, olympiadbench, minerva, cmath, mgsm-zh, ape210k"""
    folder: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """folder with these sets as files, instead of the hub"""
    out: Path = Path("data")
    """folder to write"""


def main(args: Args):
    names = [name.replace("_", "-") for name in args.names]
    if unknown := [name for name in names if name not in SOURCES]:
        SAMPLE.stop(f"{unknown[0]}: no such set; give one or more of {', '.join(SOURCES)}")
    if not names:
        SAMPLE.stop(f"no set is named; give one or more of {', '.join(SOURCES)}")
    for name in names:
        download(name, args.folder, args.out)


def download(name: str, folder: Path | None, out: Path):
    """Write a set's files: a training part and a test part, or the one file of a set that is for
    tests."""
    source, stem = SOURCES[name], name.replace("-", "_")
    train, test = f"{stem}_train", f"{stem}_test" if source.train else stem
    splits = {train: source.train, test: source.test} if source.train else {test: source.test}
    names_in_folder = {train: [train], test: [f"{stem}_test", OTHER_NAMES.get(name, stem), stem]}
    nothing = True
    for file, split in splits.items():
        path = out / f"{file}.jsonl"
        if path.is_file():
            print(f"{path}: there already")
        elif not folder:
            write(path, name, load_hub(name, split), source.hub)
        else:
            originals = [folder / f"{other}.jsonl" for other in names_in_folder[file]]
            original = next(filter(Path.is_file, originals), None)
            if not original:
                print(f"{folder}: no {file}.jsonl there")
                continue
            rows = SAMPLE.read_rows(original, ("id", "problem", "answer"))
            write(path, name, [{"dataset": name} | row for row in rows], str(original))
        nothing = False
    if nothing:
        files = " or ".join(f"{file}.jsonl" for file in splits)
        SAMPLE.stop(f"--from {folder}: no file of {name}; give a folder with {files}")


def write(path: Path, name: str, rows: list[dict], source: str):
    """Write a file with its meta file, and say what it holds.

    Where a problem of MATH asks for all values and its solution boxes them one by one, all of them
    are the answer. A set of several parts is written by a hash of the ids: the first problems, as
    --limit takes them, are then of all subjects."""
    for row in rows:
        if name == "math" and ASKS_FOR_ALL.search(row["problem"]):
            row["answer"] = ", ".join(all_boxes(row.get("solution") or "")) or row["answer"]
    if " " in SOURCES[name].parts:
        rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    licence, content = SOURCES[name].licence, SAMPLE.content_hash(rows)
    about = {"source": source, "licence": licence, "problems": len(rows), "hash": content}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        SAMPLE.stop(f"--out {path.parent}: {error.strerror}; give a folder that can be written")
    SAMPLE.save(Path(f"{path}.meta.json"), json.dumps(about, indent=1) + "\n")
    SAMPLE.save(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} problems from {source}, licence: {licence}, content hash {content}")


def load_hub(name: str, split: str) -> list[dict]:
    """A set from the hub, or from its address, in our fields, without the rows that have no
    answer."""
    import datasets

    source, rows = SOURCES[name], []
    try:
        if source.hub.startswith("https://"):
            data = {"": load_file(source.hub)}
        else:
            parts = source.parts.split() or [""]
            data = {
                part: datasets.load_dataset(source.hub, part or None, split=split) for part in parts
            }
        for part, its_rows in data.items():
            for number, row in enumerate(its_rows):
                identity = "-".join(filter(None, (name, split, part, str(number))))
                rows.append({"id": identity, "dataset": name} | our_fields(name, row))
    except Exception as error:  # the library raises many kinds: no network, no such set, gated ...
        reason, todo = (str(error) or repr(error)).splitlines()[0], "check the network, or"
        if "scripts are no longer supported" in reason:
            todo = "a script makes this set, and datasets 4 and later run none:"
        message = f"{name}: {source.hub} cannot be loaded ({reason})"
        SAMPLE.stop(f"{message}; {todo} give files by --from")
    return [row for row in rows if row["answer"]]


def load_file(address: str) -> list[dict]:
    """Rows of a set that is a file: tab-separated, or lines such as {"Problem_7": {...}}."""
    text = httpx.get(address, follow_redirects=True, timeout=60).raise_for_status().text
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if address.endswith(".tsv"):
        names = ("question", "answer_number")
        return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    return [next(iter(json.loads(line).values())) for line in lines]


def our_fields(name: str, row: dict) -> dict:
    """A row of a hub's set in our fields; an empty answer where there is none to give."""
    pairs = [pair.split("=") for pair in SOURCES[name].fields.split()]
    ours = {field: row[theirs] for field, theirs in pairs}
    answer = ours["answer"]
    if name == "gsm8k":
        answer = answer.split("####")[-1].replace(",", "").strip()
    elif name == "math":
        last_box = max(answer.rfind("\\boxed"), answer.rfind("\\fbox"))
        answer = SAMPLE.extract_answer(answer[last_box:]) or ""  # two boxes are empty
        for beginning, corrected in MATH_ANSWERS.items():
            if ours["problem"].startswith(beginning):
                answer = corrected
    elif name == "gsm-plus" and row["perturbation_type"] == "critical thinking":
        answer = ""
    elif name == "aqua":
        ours["problem"] += "\nOptions:\n" + "\n".join(row["options"])
    elif name == "aime24":
        answer = int(answer)  # "025"
    elif name == "amc23":
        answer = str(answer).removesuffix(".0")
    elif name == "olympiadbench":
        answer = answer[0].replace("$", "")
    elif name == "odyssey-math":
        ours["problem"] = re.sub(LATEX_DEBRIS, "", ours["problem"])
        answer = re.sub(r"^\$([^$]*)\$$", r"\1", re.sub(LATEX_DEBRIS, "", answer).rstrip(". "))
    elif name == "math500":
        ours["level"] = f"Level {ours['level']}"
    elif name == "cmath":
        ours["level"] = f"grade {ours['level']}"
    elif name == "mgsm-zh":
        answer = answer.replace(",", "")
    return ours | {"answer": str(answer)}


def all_boxes(solution: str) -> list[str]:
    r"""What stands in the \boxed{} of a solution, each different answer once, in their order."""
    answers = []
    while (start := solution.rfind("\\boxed")) >= 0:
        answer, solution = SAMPLE.extract_answer(solution[start:]), solution[:start]
        if answer and not any(SAMPLE.quick_verdict(answer, other) for other in answers):
            answers.insert(0, answer)
    return answers


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\nOutput")[0]))
