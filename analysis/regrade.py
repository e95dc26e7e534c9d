"""Grade stored responses again, also by the verdicts of the papers' own code, and write the report
anew. Needs no model.

    python analysis/regrade.py results/tiny           # 05's rows, report.md and summary.json anew
    python analysis/regrade.py results/tiny --verdict paper --base tuned   # figures by this verdict
    python analysis/regrade.py data/samples.jsonl     # any rows with id, answer, response

Each row gets, with `prediction` and `correct` by 01's grader of today:
    {"correct_paper": true, "correct_scdpo": true}

`correct_paper` is the verdict of the Step-DPO authors' code, which grades unfinished text too,
takes the last number where there is no box, and takes a number within 0.001 of the answer, of a
hundredth or of a hundred times it; `correct_scdpo` that of the SCDPO authors' (equal to two
decimals). Both are written from what that code does; simplification is by math-verify's parser and
sympy. The report gets a table with the shares of all three; 05_eval.py on the same folder writes it
without."""

import asyncio
import contextlib
import importlib
import json
import logging
import math
import re
import sys
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
EVAL = importlib.import_module("05_eval")
VERDICTS = {"strict": "correct", "paper": "correct_paper", "scdpo": "correct_scdpo"}
NAMES = {"correct": "strict", "correct_paper": "Step-DPO", "correct_scdpo": "SCDPO"}
PAPER_STRIP = [  # what the Step-DPO authors take off or rewrite in an answer, in their order
    (r"^\s+|\s+$|\n", ""),
    (r"\.+$", ""),
    (r"\\!", ""),
    (r"^\\text\{(.*)\}$", r"\1"),
    (r"\\?[tdc]frac", r"\\frac"),
    (r"\\(?:left|right)", ""),
    (r"(?<=.)\\text\{.*?\}$", ""),
    (r"\^(?:\{\\circ\}|\\circ)", ""),
    (r"^\s+|\s+$", ""),
    (r"\{[cm]?m\}(?:\^[23])?", ""),
    (r"p\.m\.$", ""),
    (r"(\d)\s*t$", r"\1"),
    (r"\\?\$|x\\in", ""),
    (r"\\%", "%"),
    (r" \.", " 0."),
    (r"\{\.", "{0."),
    (r"\\cdot|\\math(?:bf|rm)|\\mbox\{.*?\}", ""),
    (r"(?<!\\)infinity|(?<!\\)inf(?!ty)", r"\\infty"),
    (r"(\d+)\.0+(?=\D|$)", r"\1"),
    (r"^\.", "0."),
    (r"\\(sqrt|tan)(-?[0-9.a-zA-Z]+)", r"\\\1{\2}"),
    (" ", ""),
    (r"\\frac([^{])([^{])", r"\\frac{\1}{\2}"),
    (r"\\frac([^{])\{", r"\\frac{\1}{"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
    (r"[\\,.]+$", ""),
]
SCDPO_STRIP = [  # and those of SCDPO, which look at what follows the last "="
    (r"^.*(?:=|\\approx)", ""),
    (r"\\,|\s|\\text|\\mbox|\\left|\\right|\\!|\^(?:\{\\circ\}|\\circ)|\\?\$|\\%", ""),
    ("∞", r"\\infty"),
    (r"\+\\inf", r"\\inf"),
    (r"\\\\", r"\\"),
    ("bmatrix", "pmatrix"),
    (r"\\?[td]frac", r"\\frac"),
    (r"\{m\}\^3|m\^3|\{units\}|units|\{km\}|km", ""),
    (r"\{\.", "{0."),
    (r"^\.", "0."),
    (r"\\sqrt([^{])", r"\\sqrt{\1}"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
]


@dataclass
class Args:
    results: tyro.conf.Positional[Path]
    """the --out of 05_eval.py, or one file of responses"""
    verdict: Literal["strict", "paper", "scdpo"] = "strict"
    """by which the report's figures are: 01's, the Step-DPO authors', the SCDPO authors'"""
    base: str = ""
    """label to compare the others with; empty: the run's"""


# -------------------------------------------------------------------------------------------------
# the papers' verdicts


def paper_strip(answer: str, table=PAPER_STRIP) -> str:
    for pattern, new in table:
        answer = re.sub(pattern, new, answer)
    return answer.replace("j", "i") if table is PAPER_STRIP and "i" not in answer else answer


def paper_answers(problem: str, completion: str) -> tuple[str, ...]:
    """All closed boxes of a completion, finished or not; without any, what follows the last "he
    answer is"; then the last number. A list in one box is parted where the problem asks for one."""
    if "boxed" in completion:
        answers = []
        for piece in completion.split("boxed{")[1:]:
            depths = accumulate([1] + [(c == "{") - (c == "}") for c in piece])
            end = next((place for place, depth in enumerate(depths) if depth == 0), None)
            if end is not None:
                answers.append(piece[: end - 1])
    elif "he answer is" in completion:
        answers = [completion.rsplit("he answer is", 1)[1]]
    else:
        answers = re.findall(r"-?\d*\.?\d+", completion.replace(",", ""))[-1:]
    parts = []
    for answer in answers:
        answer = paper_strip(answer.strip().lstrip(":").rstrip(".").rstrip("/"))
        is_list = "separated by commas" in problem and not re.search(r"[()\[\]]", answer)
        for part in answer.split(",") if is_list else [answer]:
            parts += re.split(r"\\text\{and\}", part)
    return tuple(parts)


def paper_number(text: str) -> float | None:
    number = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(\\?%)?"
    match = re.fullmatch(number, text.replace(",", ""))
    return float(match[1]) / (100 if match[2] else 1) if match else None


def cells_of(side: str) -> list[list[str]]:
    """Rows of a matrix, or the one of a tuple or interval; of anything else none."""
    matrix = re.fullmatch(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}", side)
    if matrix:
        return [row.split("&") for row in matrix[1].split("\\\\") if row]
    return [side[1:-1].split(",")] if re.fullmatch(r"[(\[].+[)\]]", side) else []


def paper_equal(gold: str, answer: str, symbolic) -> bool | None:
    """The Step-DPO authors' equality: a number within 1e-3 of the answer, of its hundredth or its
    hundredfold; brackets and matrices by part; equations by their sides, x = 5 as 5. symbolic(a, b)
    decides the rest; its None makes None here."""
    if gold == answer:
        return True
    a, b = paper_number(gold), paper_number(answer)
    if a is not None and b is not None:
        return any(math.isclose(target, b, abs_tol=1e-3) for target in (a / 100, a, 100 * a))
    rows, other_rows = cells_of(gold), cells_of(answer)
    if rows and [len(row) for row in rows] == [len(row) for row in other_rows]:
        cells = zip(sum(rows, []), sum(other_rows, []), strict=True)
        verdicts = [paper_equal(a, b, symbolic) for a, b in cells]
        if False not in verdicts:
            return None if None in verdicts else True
    sides = [side.split("=") for side in (gold, answer)]
    if len(sides[0]) == len(sides[1]) == 2:
        a, b = (f"{left}-({right})" for left, right in sides)
        verdicts = [symbolic(a, b), symbolic(f"-({a})", b)]
        if True in verdicts:
            return True
        return None if None in verdicts else False
    for i in (0, 1):
        if len(sides[i]) == 2 and len(sides[i][0]) <= 2 and len(sides[1 - i]) == 1:
            return paper_equal(sides[0][-1], sides[1][-1], symbolic)
    return symbolic(gold, answer)


def match_all(golds: list[str], answers: list[str], symbolic) -> bool | None:
    """Whether each gold answer has an equal among the answers and each answer one among the gold
    ones."""
    table = []
    for gold in golds:
        table.append([])
        for answer in answers:
            unions = gold.split("\\cup"), answer.split("\\cup")
            both = len(unions[0]) > 1 and len(unions[1]) > 1
            table[-1].append(
                match_all(*unions, symbolic) if both else paper_equal(gold, answer, symbolic)
            )
    lines = [*table, *map(list, zip(*table, strict=True))]
    if not answers or any(True not in line and None not in line for line in lines):
        return False
    return True if all(True in line for line in lines) else None


def paper_sides(gold: str, answers: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The gold answers, and those of a response that count: the last, or the last few where the
    gold is a list and they are single things."""
    golds = [paper_strip(gold)]
    if (
        len(answers) > 1
        and "," not in answers[-1]
        and not re.search(r"[()\[\]]|^-?\d{1,3}(?:,\d{3})+$", golds[0])
    ):
        golds = golds[0].split(",")
    return golds, list(dict.fromkeys(answers))[-len(golds) :]


def paper_verdict(gold: str, answers: tuple[str, ...], symbolic) -> bool | None:
    return match_all(*paper_sides(gold, answers), symbolic)


def quick_paper(gold: str, answers: tuple[str, ...]) -> bool | None:
    def symbolic(a: str, b: str) -> bool | None:
        # different words are different, whatever product of letters a parser would read
        words = re.fullmatch(r"[A-Za-z]*", a) and re.fullmatch(r"[A-Za-z]*", b)
        return False if words else None

    return paper_verdict(gold, answers, symbolic)


def values_of(*texts: str) -> list | None:
    """What math-verify's parser makes of LaTeX texts, where all are single expressions; runs in a
    worker process."""
    import math_verify
    import sympy

    # else it says at every call that its time limit is off
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    options = {"fallback_mode": "no_fallback", "parsing_timeout": None}
    parsed = [math_verify.parse(f"\\boxed{{{text}}}", config, **options) for text in texts]
    if all(values and isinstance(values[0], sympy.Expr) for values in parsed):
        return [values[0] for values in parsed]
    return None


def slow_paper(gold: str, answers: tuple[str, ...]) -> bool:
    """The verdict with algebra: equal after simplification, or values within 1e-3."""
    import sympy

    def symbolic(*texts: str) -> bool:
        # 3\frac{1}{2} is 3/2 to theirs
        texts = [re.sub(r"(\d)\\frac", r"\1\\cdot\\frac", text) for text in texts]
        values = values_of(*texts)
        if values is None:
            return False
        # pi and e are letters to theirs
        letters = {sympy.pi: sympy.Symbol("pi"), sympy.E: sympy.Symbol("e")}
        a, b = (value.subs(letters) for value in values)
        close = not (a - b).free_symbols and math.isclose(abs(sympy.N(a - b)), 0, abs_tol=1e-3)
        return close or sympy.simplify(a - b) == 0

    return bool(paper_verdict(gold, answers, symbolic))


def scdpo_verdict(gold: str, answer: str, rounded) -> bool | None:
    """SCDPO's equality: the same text, the same parts between commas, or numbers (in tuples too)
    equal to two decimals."""
    gold, answer = (paper_strip(text.lower(), SCDPO_STRIP) for text in (gold, answer))
    if not gold or not answer:
        return False
    if gold == answer or "," in gold and set(gold.split(",")) == set(answer.split(",")):
        return True
    tuples = [
        text[1:-1].split(",") if re.fullmatch(r"\(.*,.*\)", text) else [text]
        for text in (gold, answer)
    ]
    if len(tuples[0]) != len(tuples[1]):
        return False
    verdicts = [a == b or rounded(a, b) for a, b in zip(*tuples, strict=True)]
    if False in verdicts:
        return False
    return None if None in verdicts else True


def quick_scdpo(gold: str, answer: str) -> bool | None:
    def rounded(a: str, b: str) -> bool | None:
        values = paper_number(a), paper_number(b)
        return None if None in values else round(values[0], 2) == round(values[1], 2)

    return scdpo_verdict(gold, answer, rounded)


def slow_scdpo(gold: str, answer: str) -> bool:
    def rounded(a: str, b: str) -> bool:
        values = values_of(a, b)
        if not values or any(value.free_symbols for value in values):
            return False
        return len({round(float(value), 2) for value in values}) == 1

    return bool(scdpo_verdict(gold, answer, rounded))


PAPER, SCDPO = (quick_paper, slow_paper), (quick_scdpo, slow_scdpo)


# -------------------------------------------------------------------------------------------------
# files


def answer_of(row: dict) -> str | None:
    return EVAL.answer_of(row["response"], "blocks" if "blocks" in row else "labels")


def answers_by_paper(row: dict) -> tuple[str, ...]:
    texts = [block["content"] for block in row.get("blocks", ()) if block["type"] == "text"]
    response = texts[-1] if texts else row["response"]
    opening = row.get("opening", EVAL.OPENING if response.startswith(EVAL.OPENING) else "")
    return paper_answers(row.get("problem", ""), response.removeprefix(opening))


async def grade(row: dict, grader) -> dict:
    """The row with `prediction` and the three verdicts. Only the strict one asks that the response
    be finished."""
    gold, answer = str(row["answer"]), answer_of(row)
    return await EVAL.grade(row, grader) | {
        "correct_paper": await grader(gold, answers_by_paper(row), rules=PAPER),
        "correct_scdpo": await grader(gold, answer, rules=SCDPO),
    }


def judged_by(verdict: str, row: dict) -> dict:
    """The row with `correct` and `prediction` of one verdict: a vote is for what its rule reads."""
    prediction = row["prediction"]
    if verdict == "paper":
        _, answers = paper_sides(str(row["answer"]), answers_by_paper(row))
        prediction = ", ".join(answers) or None
    elif verdict == "scdpo":
        prediction = answer_of(row)
    return {**row, "correct": row[VERDICTS[verdict]], "prediction": prediction}


def read_responses(path: Path, file) -> list[dict]:
    """The rows of a file; an incomplete last line is removed."""
    whole, _, last = file.read().rpartition(b"\n")
    # the meta file of 05: a file of another keeps its last line
    is_of_05 = Path(f"{path}.meta.json").exists()
    try:
        json.loads(last or b"0")
    except ValueError:
        if is_of_05 and whole:
            file.truncate(len(whole) + 1)
    rows = EVAL.read_rows(path, ("id", "answer"))
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("response"), str):
            EVAL.stop(
                f"{path}, line {number}: no text in 'response'; every row needs id, answer, "
                "response"
            )
    return rows


async def regrade(path: Path) -> list[dict]:
    """Grade the rows of one file again, in place, and say what changed."""
    if not path.is_file():
        EVAL.stop(
            f"{path}: no such file or folder; give the --out of 05_eval.py, or a file of responses"
        )
    with open(path, "rb+") as file:
        EVAL.lock(file, path)  # until it is replaced: 05 would append to the old one
        rows, grader, began = read_responses(path, file), EVAL.Grader(), time.time()
        graded = [None] * len(rows)

        async def work(i: int):
            graded[i] = await grade(rows[i], grader)

        try:
            await EVAL.run_all(list(range(len(rows))), work, 64, f"grading {path.name}"[-30:])
        finally:
            grader.close()
        EVAL.save(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in graded))
        note_grading(Path(f"{path}.meta.json"))
    changed = sum(
        row["correct"] != old.get("correct") for row, old in zip(graded, rows, strict=True)
    )
    right = ", ".join(
        f"{name} {sum(row[field] for row in graded) / len(graded):.1%}"
        for field, name in NAMES.items()
    )
    print(
        f"{path}: {len(rows)} responses, {changed} verdicts changed; right: {right}; "
        f"{len(rows) / (time.time() - began):.0f} a second, {grader.kills} gradings killed"
    )
    return graded


def note_grading(path: Path):
    """Let a stage's meta file say that today's code has graded the rows."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        parts = [meta.get("passed_on", {}), meta["settings"]]
    except (OSError, ValueError, TypeError, KeyError):  # no file of a stage
        return
    if meta["settings"].get("locator") == "rollout":  # its steps are of the old grading
        return
    for part in parts:
        code = part.get("code", {})
        if "Grader" in code:  # of 05 also `grade`, which has made the rows anew
            code |= EVAL.source_hashes(("answer_of", "Grader", *({"grade"} & code.keys())))
    EVAL.save(path, json.dumps(meta, indent=1, ensure_ascii=False) + "\n")


def regrade_folder(folder: Path, base: str) -> tuple[dict, dict, dict[str, dict]]:
    """Groups, rows by benchmark and model, and settings by benchmark of a folder of results; the
    label `base` comes first."""
    paths = sorted(folder.glob("*/*.jsonl"))
    if not paths:
        EVAL.stop(f"{folder}: no BENCHMARK/MODEL.jsonl there; give the --out of 05_eval.py")
    benchmarks, places, metas, last = {}, {}, {}, {}
    with contextlib.suppress(OSError, ValueError):  # no summary, or half of one
        last = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for path in paths:
        rows = asyncio.run(regrade(path))
        meta_path = Path(f"{path}.meta.json")
        meta = json.loads(meta_path.read_text()) if meta_path.is_file() else {}
        model = str(rows[0].get("model", path.stem))
        # another run may have had another order
        if model not in places or path.parent.name in last.get("benchmarks", {}):
            places[model] = (meta.get("number", 0), meta.get("label", model))
        metas[path.parent.name, model] = meta
        benchmarks.setdefault(path.parent.name, {})[model] = rows
    groups = groups_of(last, places)
    if base and base not in groups:
        EVAL.stop(f"--base {base}: give a label that is there: {', '.join(sorted(groups))}")

    def place(label: str):
        return label != base, places.get(groups[label][0], (0, ""))

    groups = {label: groups[label] for label in sorted(groups, key=place)}
    models = sum(groups.values(), [])
    for name, by_model in [*benchmarks.items()]:
        missing = set(models) - set(by_model)
        if missing and name not in last.get("benchmarks", benchmarks):
            print(f"left out, not of the run in summary.json: {name}", file=sys.stderr)
            del benchmarks[name]
        elif missing:
            EVAL.stop(
                f"{folder}: {name} lacks responses of {', '.join(sorted(missing))}; "
                "every model needs every benchmark"
            )
        else:
            benchmarks[name] = {model: by_model[model] for model in models}
    for (name, model), meta in metas.items():
        if name in benchmarks and model in models and not meta.get("finished", True):
            EVAL.stop(
                f"{folder}: {model} has not answered all of {name}; run the command of 05 again"
            )
    return (
        groups,
        benchmarks,
        {name: metas[name, models[0]].get("settings", {}) for name in benchmarks},
    )


def groups_of(summary: dict, places: dict[str, tuple[int, str]]) -> dict[str, list[str]]:
    """The models by label: those of 05's last run, since others with the same label may be in the
    folder; where its summary does not say it, all. `places`: number and label of each model."""
    if groups := summary.get("groups", {}):
        if others := sorted(set(places) - set(sum(groups.values(), []))):
            print(f"left out, not of the run in summary.json: {', '.join(others)}", file=sys.stderr)
        return groups
    for model in sorted(places, key=places.get):
        groups.setdefault(places[model][1], []).append(model)
    return groups


def table_of(name: str, by_model: dict[str, list[dict]]) -> dict[str, list[list[dict]]]:
    """By model, for each problem that all have answered its rows in the order of the samples."""
    by_id = {}
    for model, rows in by_model.items():
        by_id[model] = {}
        for row in sorted(rows, key=lambda row: row.get("sample", 0)):
            responses = by_id[model].setdefault(str(row["id"]), [])
            responses.append({"finish_reason": "stop", **row})
    first, *others = by_id.values()
    ids = [identity for identity in first if all(identity in other for other in others)]
    if not ids:
        EVAL.stop(
            f"{name}: no problem is answered by all models; run the evaluation to its end first"
        )
    tables = {model: [problems[identity] for identity in ids] for model, problems in by_id.items()}
    sizes = {len(responses) for table in tables.values() for responses in table}
    if len(sizes) > 1:
        EVAL.stop(
            f"{name}: {min(sizes)} responses to some problems and {max(sizes)} to others; "
            f"run 05 with --samples {max(sizes)} for all models"
        )
    return tables


def verdict_table(
    groups: dict[str, list[str]], tables: dict[str, dict]
) -> tuple[str, list[str], list[list[str]], str]:
    """Title, head, rows and note of the shares that are right by each verdict, of all responses of
    a model's seeds."""
    lines = []
    for name, by_model in tables.items():
        for label, models in groups.items():
            tables_of_seeds = [by_model[model] for model in models]
            rows = [row for table in tables_of_seeds for responses in table for row in responses]
            shares = [sum(row[field] for row in rows) / len(rows) for field in NAMES]
            problems = len(tables_of_seeds[0])
            lines.append([f"{name} ({problems})", label, *map(EVAL.percentage, shares)])
    return "Right by each verdict", ["benchmark", "model", *NAMES.values()], lines, ""


def main(args: Args):
    if not args.results.is_dir():
        asyncio.run(regrade(args.results))
        return
    groups, rows, settings = regrade_folder(args.results, args.base)
    tables = {name: table_of(name, by_model) for name, by_model in rows.items()}
    field = VERDICTS[args.verdict]
    judged = {}
    for name, by_model in tables.items():
        judged[name] = {}
        for model, table in by_model.items():
            judged[name][model] = [
                [judged_by(args.verdict, row) for row in responses] for responses in table
            ]
    decodings = {name: EVAL.decoding_of(of_benchmark) for name, of_benchmark in settings.items()}
    decoding = decodings[next(iter(rows))]
    if len(set(decodings.values())) > 1:
        decoding = "; ".join(f"{name}: {text}" for name, text in decodings.items())
    seed = next(iter(settings.values())).get("seed", 0)
    summary = EVAL.summary_of(groups, judged, decoding, seed)
    summary |= {"rule": f"the {NAMES[field]} verdict", "verdict": field}
    summary["more_tables"] = [verdict_table(groups, tables)]
    print(EVAL.write_report(summary, args.results))
    print(f"{args.results / 'report.md'}: written anew, by the {NAMES[field]} verdict")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
