"""05_eval.py: statistics against enumeration and formulas, both equalities, data/download.py,
regrading, report, credit."""

import asyncio
import fcntl
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import credit
import download
import httpx
import numpy as np
import pytest
import regrade
import report
from conftest import ROOT, TINY, read, run, run_killed, stage
from tokenizers.normalizers import Prepend

SHARED = ROOT.parent / "shared" / "data"


# -------------------------------------------------------------------------------------------------
# statistics


def test_permutation_against_all_signs():
    differences = np.array([0.5, -0.25, 1.0, 0.75, -0.5, 0.25, 0.0, 0.5])
    moving = differences[differences != 0]
    sums = [abs(np.dot(signs, moving)) for signs in itertools.product((-1, 1), repeat=len(moving))]
    exact = np.mean([total >= abs(moving.sum()) - 1e-9 for total in sums])
    assert stage(5).permutation(differences, 0) == pytest.approx(exact, abs=0.015)


def test_bootstrap_of_several_seeds_is_wider_where_seeds_differ():
    rng = np.random.default_rng(0)
    base = (rng.random((1, 400)) < 0.5).astype(float)
    alike, apart = (
        np.stack([rng.random(400) < share for share in shares]).astype(float)
        for shares in ((0.6, 0.6, 0.6), (0.4, 0.6, 0.8))
    )
    widths = [
        np.diff(stage(5).paired(rates, base, 0)["difference_interval"])[0]
        for rates in (alike, apart)
    ]
    assert widths[1] > 1.4 * widths[0]
    low, high = stage(5).paired(alike, base, 0)["difference_interval"]
    assert low < alike.mean() - base.mean() < high


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_luck_of_seeds_is_no_gain(seeds):
    """Two equal methods whose seeds differ by 5 points (sd): p below 0.05 is rare, by a permutation
    of problems it is not."""
    rng, found = np.random.default_rng(0), []
    for _ in range(40):
        ease, luck = rng.random(400), rng.normal(0, 0.05, (2, seeds, 1))
        a, b = (rng.random((2, seeds, 400)) < ease + luck).astype(float)
        found.append(
            (stage(5).paired(a, b, 0)["p"], stage(5).permutation(a.mean(0) - b.mean(0), 0))
        )
    share = (np.array(found) < 0.05).mean(0)
    assert share[0] <= 0.1 and share[1] >= 0.25, share


def test_the_luck_of_the_seeds_is_students():
    """Seeds without luck of problems: the quantiles of t with 1 and 3 degrees of freedom."""

    def flat(*shares: float) -> np.ndarray:
        return np.array([[share] * 100 for share in shares])

    spread = 0.1 / math.sqrt(2)  # sd of 0.5 and 0.6
    for rates, base, sign in (
        (flat(0.5, 0.6), flat(0.5), 1),
        (flat(0.5), flat(0.5, 0.6), -1),
    ):
        found = stage(5).paired(rates, base, 0)
        low, high = sorted(sign * bound for bound in found["difference_interval"])
        assert found["difference"] == pytest.approx(sign * 0.05)
        assert high - 0.05 == pytest.approx(12.706 * spread / math.sqrt(2), rel=0.2)
        assert 0.05 - low == pytest.approx(12.706 * spread / math.sqrt(2), rel=0.2)
    rates = flat(0.50, 0.51, 0.52, 0.53)
    low, high = stage(5).interval(rates, 1, 0)
    half = 3.182 * np.std([0.50, 0.51, 0.52, 0.53], ddof=1) / 2
    assert (low, high) == pytest.approx((0.515 - half, 0.515 + half), abs=0.004)


def test_names_of_models_are_of_one_each(tmp_path, capsys):
    """A folder may have a comma; a name must not be another's model too."""
    comma = tmp_path / "b=1,l=2"
    comma.mkdir()
    wanted = {"base": ["base"], str(comma): [str(comma)], "t": ["m/a", "m/b"]}
    assert stage(5).model_groups(("base", str(comma), "t=m/a,m/b")) == wanted
    for names in (
        ("x", "x"),
        ("x", "t=x"),
        ("x", "t=a", "t=b"),
        ("x", "t=a,b", "a=c"),
        ("x", "t="),
        ("m/a", "m-a"),
    ):
        with pytest.raises(SystemExit) as ended:
            stage(5).model_groups(names)
        assert ended.value.code == 2 and "comes twice, or is empty" in capsys.readouterr().err


def test_models_against_each_other_have_their_sign():
    def table(share: int) -> list:
        rows = [{"id": f"q{i}", "answer": "7", "correct": i % 10 < share} for i in range(60)]
        row = {"prediction": "7", "finish_reason": "stop", "tokens": 1, "sample": 0}
        return [[row | one] for one in rows]

    by_model = {"base": table(3), "a": table(4), "b": table(7)}
    found = stage(5).compare({name: [name] for name in by_model}, by_model, 0)
    assert list(found["pairwise"]) == ["b\na"]
    assert found["pairwise"]["b\na"]["difference"] == pytest.approx(0.3)
    assert found["models"]["b"]["difference"] == pytest.approx(0.4)


def test_an_interval_of_problems_that_all_fail_has_a_width():
    for seeds, k in ((1, 8), (3, 1), (1, 1)):
        low, high = stage(5).interval(np.zeros((seeds, 30)), k, 0)
        assert low == 0 and high == pytest.approx(0.1135, abs=1e-4)
        low, high = stage(5).interval(np.ones((seeds, 30)), k, 0)
        assert high == 1 and low == pytest.approx(0.8865, abs=1e-4)


@pytest.mark.parametrize(
    "work, said",
    [
        ("signal.raise_signal, signal.SIGKILL", "the process of a model was killed"),
        ("EVAL.stop, 'no such option'", ": error: no such option"),
    ],
)
def test_a_models_process_that_ends_is_one_line(tmp_path, work, said):
    """Killed as by the system, where memory runs out; or with an error of its own."""
    code = "import functools, importlib, signal\nEVAL = importlib.import_module('05_eval')\n"
    code += f"if __name__ == '__main__':\n    EVAL.in_own_process(functools.partial({work}))\n"
    (tmp_path / "ends.py").write_text(code)
    command = [sys.executable, tmp_path / "ends.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr and said in done.stderr


def test_few_problems_that_differ_leave_a_wide_interval():
    """Newcombe's published examples; and AIME's 30 problems, on which a bootstrap takes models that
    agree for equal, and one of 480 right responses for a share below 1 %."""
    for won, lost, total, low, high in ((9, 3, 10, 0.1705, 0.809), (6, 2, 7, 0.0582, 0.8062)):
        assert stage(5).newcombe(won, lost, total) == pytest.approx((low, high), abs=1e-4)
    base, least = np.zeros((1, 30)), 0.0
    base[0, :4] = 1
    for wins in range(6):
        rates = base.copy()
        rates[0, 10 : 10 + wins] = 1
        found = stage(5).paired(rates, base, 0)
        low, high = found["difference_interval"]
        assert low < wins / 30 < high - 0.11 and found["detectable"] > least
        least = found["detectable"]
    assert least > 0.2, "McNemar's test needs six wins"
    # with seeds that agree p is that of one, and no interval leaves [-1, 1]
    for seeds in (2, 3, 6):
        rates = np.zeros((seeds, 30))
        rates[:, :4] = 1
        assert stage(5).paired(rates, base * 0, 0)["p"] == pytest.approx(0.125, abs=0.02)
    found = stage(5).paired(np.array([[1.0], [0.0]]), np.array([[0.0]]), 0)
    assert found["difference_interval"] == (-1, 1) and found["detectable"] == 1
    # ten samples of three seeds: 0, 1 and 2 right are as many as the base's 1, and no difference
    rates, base = np.zeros((3, 30)), np.zeros((1, 30))
    rates[:, :12], base[:, :12] = np.array([[0.0], [0.1], [0.2]]), 0.1
    rates[:, 12:15] = 1
    found = stage(5).paired(rates, base, 0)
    assert found["p"] > 0.2 and found["difference_interval"][0] < -0.02
    one = np.zeros((1, 30))
    one[0, 3] = 1 / 16
    low, high = stage(5).interval(one, 16, 0)
    assert low < 1 / 480 and high > 0.11
    most = np.ones((1, 30))
    most[0, 3] = 1 / 16
    assert stage(5).interval(most, 16, 0)[0] < 0.85


def test_detectable_difference_is_found_four_times_of_five():
    """Draw experiments whose true difference is the named one: McNemar's test finds about 80 % of
    them."""
    rng, problems = np.random.default_rng(0), 1000
    wins, losses = (rng.multinomial(problems, [0.14, 0.06, 0.8], size=1)[0][:2]).tolist()
    new, old = np.zeros((1, problems)), np.zeros((1, problems))
    new[0, :wins], old[0, wins : wins + losses] = 1, 1
    least = stage(5).paired(new, old, 0)["detectable"]
    share = (wins + losses) / problems
    draws = rng.multinomial(
        problems, [(share + least) / 2, (share - least) / 2, 1 - share], size=2000
    )
    found = np.mean([stage(5).mcnemar(int(a), int(b)) < 0.05 for a, b, _ in draws])
    assert 0.70 < found < 0.88


def answers(*predictions) -> list[dict]:
    return [
        {"prediction": prediction, "correct": prediction in ("7", "7.0")}
        for prediction in predictions
    ]


def test_majority_and_its_ties():
    rows = answers("8", "7", "8.0", None, "7.0", "\\frac{16}{2}")
    assert stage(5).classes(rows) == [0, 1, 0, -1, 1, 0]

    def is_right(*predictions) -> bool:
        [right] = stage(5).curves([answers(*predictions)], 0)["final"]
        return bool(right)

    assert is_right("8", "7", "7.0") and not is_right("8", "7", "8.0")
    assert is_right("7", "8", "8", "7") and not is_right("8", "7", "7", "8"), "a tie: the first"
    assert is_right(None, None, None, "7") and not is_right(None, None), "no answer has no vote"


def test_pass_and_maj_against_enumeration():
    table = [
        answers("7", "8", "7", "9"),
        answers("8", "8", "7", None),
        answers(None, None, None, None),
        answers("7", "7.0", "7", "7"),
    ]
    found = stage(5).curves(table, 0)
    assert found["k"] == [1, 2, 4]
    for j, passed in zip(found["k"], found["pass"], strict=True):
        subsets = list(itertools.combinations(range(4), j))
        exact = np.mean(
            [
                np.mean([any(rows[i]["correct"] for i in subset) for subset in subsets])
                for rows in table
            ]
        )
        assert passed == pytest.approx(exact)
    assert found["final"] == [True, False, False, True] and found["maj"][-1] == 0.5
    # of two votes the first that is an answer decides; the code draws some orders
    voted = [
        next((row["correct"] for row in pair if row["prediction"] is not None), False)
        for rows in table
        for pair in itertools.permutations(rows, 2)
    ]
    assert found["maj"][1] == pytest.approx(np.mean(voted), abs=0.1)


# -------------------------------------------------------------------------------------------------
# the papers' verdicts

CUT = "length"
# gold, response, how it ended, then the strict verdict, the Step-DPO authors', the SCDPO authors'
VERDICTS = [
    ("0.5", "\\boxed{50}", "stop", False, True, False),
    ("0.5", "\\boxed{0.005}", "stop", False, True, False),
    ("7", "\\boxed{7.0005}", "stop", False, True, True),
    ("7", "\\boxed{7.002}", "stop", False, False, True),
    ("7", "\\boxed{7.01}", "stop", False, False, False),
    ("12", "\\boxed{12\\%}", "stop", False, True, True),
    ("\\sqrt{2}", "\\boxed{1.414}", "stop", False, True, True),
    ("\\sqrt{2}", "\\boxed{1.41}", "stop", False, False, True),
    ("3", "\\boxed{\\frac{6}{2}}", "stop", True, True, True),
    ("1000", "\\boxed{10}", "stop", False, True, False),
    ("1000", "\\boxed{100}", "stop", False, False, False),
    ("x+1", "\\boxed{1+x}", "stop", True, True, False),
    ("x+1", "\\boxed{x+2}", "stop", False, False, False),
    ("5", "\\boxed{x=5}", "stop", True, True, True),
    ("y = 2x + 1", "\\boxed{y=1+2x}", "stop", True, True, False),
    ("5", "\\boxed{5}, so", CUT, False, True, True),
    ("5", "It is 5, and then", CUT, False, True, False),
    ("5", "The answer is 5.", "stop", True, True, True),
    ("5", "There are 5 of them.", "stop", False, True, False),
    ("5", "\\boxed{5} or rather \\boxed{6", "stop", False, True, False),
    ("5", "\\boxed{5} or rather \\boxed{6}", "stop", False, False, False),
    ("5", "No idea.", "stop", False, False, False),
    ("\\text{east}", "\\boxed{east}", "stop", True, True, False),
    ("\\text{yes}", "\\boxed{no}", "stop", False, False, False),
    ("(1, 2)", "\\boxed{(1.0001, 2)}", "stop", False, True, True),
    ("(1, 2)", "\\boxed{(1, 2, 3)}", "stop", False, False, False),
    ("(0,1) \\cup (1,2)", "\\boxed{(1,2)\\cup(0,1)}", "stop", True, True, False),
    ("90^\\circ", "\\boxed{90}", "stop", True, True, True),
    ("\\frac{11}{2}", "\\boxed{5\\frac{1}{2}}", "stop", True, False, True),
    ("2, 3", "\\boxed{3, 2}", "stop", True, False, True),
    (
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
        "\\boxed{\\begin{pmatrix}1\\\\2.0001\\end{pmatrix}}",
        "stop",
        False,
        True,
        False,
    ),
]


def graded(rows: list[dict]) -> list[dict]:
    grader = stage(5).Grader()

    async def all_of_them():
        return await asyncio.gather(*(regrade.grade(row, grader) for row in rows))

    try:
        return asyncio.run(all_of_them())
    finally:
        grader.close()


def test_the_three_verdicts():
    rows = graded(
        [
            {"answer": gold, "response": text, "finish_reason": end}
            for gold, text, end, *_ in VERDICTS
        ]
    )
    found = [(row["correct"], row["correct_paper"], row["correct_scdpo"]) for row in rows]
    assert [pair for pair in zip(VERDICTS, found, strict=True) if pair[0][3:] != pair[1]] == []
    assert sum(strict != paper for *_, strict, paper, _ in VERDICTS) >= 10


def test_all_verdicts_of_a_solution_with_code_are_of_its_last_text():
    part = "<|text|>{}<|endofblock|>".format
    ran = "<|code|>print(2)<|endofblock|><|execution|>\\boxed{4}<|endofblock|>"
    rows = []
    for last in ("The answer is 5.", "So \\boxed{5}.", "So it is six."):
        response = part("First \\boxed{5}.") + ran + part(last) + "<|endofmessage|>"
        blocks = stage(1).blocks_of(response)
        assert [block["type"] for block in blocks] == ["text", "code", "execution", "text"]
        rows.append({"answer": "5", "response": response, "blocks": blocks})
    fields = ("correct", "correct_paper", "correct_scdpo")
    verdicts = [[row[field] for field in fields] for row in graded(rows)]
    assert verdicts == [[True] * 3, [True] * 3, [False] * 3]


def test_the_opening_of_a_row_is_no_part_of_its_answer():
    """The last number of a response that says none would else be the 1 of the forced "Step 1:"."""
    opening = stage(1).OPENING
    rows = graded(
        [
            {"answer": "1", "response": opening + " I do not know."},
            {"answer": "1", "response": "In Step 1: I do not know.", "opening": ""},
            {"answer": "2", "response": "Count: 2 and no more", "opening": "Count: 2"},
        ]
    )
    assert [row["correct_paper"] for row in rows] == [False, True, False]


# -------------------------------------------------------------------------------------------------
# benchmarks in our fields

FILES = {
    "gsm8k": {"gsm8k_train": 7473, "gsm8k_test": 1319},
    "math": {"math_train": 7500, "math_test": 5000},
    "aime24": {"aime24": 30},
    "aime25": {"aime25": 30},
    "odyssey-math": {"odyssey_math": 387},
    "cmath": {"cmath": 1098},
    "mgsm-zh": {"mgsm_zh": 250},
    "ape210k": {"ape210k_test": 500},
    "aqua": {"aqua_test": 254},
}


def make(folder, *names, given=None):
    download.main(download.Args(names, given, folder))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark files are not beside this checkout")
def test_files_of_a_folder(tmp_path, capsys):
    make(tmp_path, *FILES, given=SHARED)
    said = capsys.readouterr().out
    counts = {file: count for files in FILES.values() for file, count in files.items()}
    assert {path.stem for path in tmp_path.glob("*.jsonl")} == set(counts)
    for file, count in counts.items():
        about = json.loads((tmp_path / f"{file}.jsonl.meta.json").read_text())
        assert len(stage(5).load_problems(tmp_path / f"{file}.jsonl")) == count == about["problems"]
        assert f"content hash {about['hash']}" in capsys.readouterr().err
        assert about["licence"] in said
    by_id = {
        row["id"]: row["answer"] for row in stage(1).load_problems(tmp_path / "math_test.jsonl")
    }
    assert by_id["test/precalculus/1227.json"] == "-1, 2", (
        "asked for all values, which the solution boxes one by one"
    )
    assert by_id["test/prealgebra/224.json"] == "-34 + 12x"
    assert by_id["test/intermediate_algebra/702.json"].count(",") == 1
    rows = read(tmp_path / "math_test.jsonl")
    assert {row["dataset"] for row in rows} == {"math"}
    assert len({row["id"].split("/")[1] for row in rows[:100]}) == 7, "--limit takes all subjects"


def test_a_file_that_is_there_is_not_made_again(tmp_path, capsys):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "gsm8k.jsonl").write_text(
        json.dumps({"id": 1, "problem": "p", "answer": 2}) + "\n"
    )
    make(tmp_path, "gsm8k", given=tmp_path / "given")
    text = (tmp_path / "gsm8k_test.jsonl").read_text()
    assert json.loads(text) == {"dataset": "gsm8k", "id": "1", "problem": "p", "answer": "2"}
    assert "no gsm8k_train.jsonl there" in capsys.readouterr().out
    assert not (tmp_path / "gsm8k_train.jsonl").exists()
    (tmp_path / "given" / "gsm8k.jsonl").write_text("{")
    make(tmp_path, "gsm8k", given=tmp_path / "given")
    assert "gsm8k_test.jsonl: there already" in capsys.readouterr().out
    assert (tmp_path / "gsm8k_test.jsonl").read_text() == text


@pytest.mark.parametrize(
    "names, said",
    [(["gsm9k"], "gsm9k: no such set"), ([], "no set is named"), (["aime24"], "aime24.jsonl")],
)
def test_sets_that_cannot_be_made(names, said, tmp_path):
    done = run("download", *names, "--from", tmp_path, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )


@pytest.mark.parametrize("number, file", [(1, "gsm8k_train"), (5, "aime24")])
def test_a_missing_file_names_the_script_that_makes_known_sets(number, file, tmp_path):
    path = tmp_path / "data" / f"{file}.jsonl"
    done = run(number, "--data", path, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    said = f"{path}: not there; python data/download.py makes those of known sets\n"
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


HUB_ROWS = {  # a row as each source has it, and problem and answer in our fields
    "gsm8k": ({"question": "q", "answer": "r\n#### 1,234"}, "q", "1234"),
    "math": (
        {
            "problem": "Find all x.",
            "solution": "\\boxed{1} or \\boxed{2}",
            "level": "Level 2",
            "type": "Algebra",
        },
        "Find all x.",
        "1, 2",
    ),
    "math500": (
        {"problem": "q", "answer": "5", "level": 3, "subject": "Algebra", "solution": "s"},
        "q",
        "5",
    ),
    "aqua": (
        {"question": "q", "options": ["A)1", "B)2"], "correct": "B", "rationale": "r"},
        "q\nOptions:\nA)1\nB)2",
        "B",
    ),
    "aime24": ({"problem": "q", "answer": "025", "solution": "s"}, "q", "25"),
    "aime25": ({"problem_idx": 1, "problem": "q", "answer": 70}, "q", "70"),
    "odyssey-math": (
        {
            "question": "q $x$.\\\\\n\\end{problem}",
            "answer": "$\\frac{1}{2}$.",
            "label": "Algebra",
            "level": "college",
            "reasoning": "",
        },
        "q $x$.",
        "\\frac{1}{2}",
    ),
    "cmath": ({"question": "q", "golden": "3", "grade": 2}, "q", "3"),
    "mgsm-zh": ("q\t4,000", "q", "4000"),
    "ape210k": ({"question_chinese": "q", "result": "3/4"}, "q", "3/4"),
    "gsm-plus": (
        {"question": "q", "answer": "1.5", "solution": "s", "perturbation_type": "digit expansion"},
        "q",
        "1.5",
    ),
    "amc23": ({"id": 0, "question": "q", "answer": "27", "url": "u"}, "q", "27"),
    "minerva": ({"question": "q", "answer": "1.6e8"}, "q", "1.6e8"),
    "olympiadbench": (
        {
            "id": 1,
            "question": "q",
            "final_answer": ["$69$,$84$"],
            "is_multiple_answer": True,
            "unit": None,
        },
        "q",
        "69,84",
    ),
    "aime26": ({"problem_idx": 1, "problem": "q", "answer": 277}, "q", "277"),
    "hmmt-feb-2026": (
        {"problem_idx": 1, "problem": "q", "answer": "-\\frac{1}{21}", "problem_type": ["Algebra"]},
        "q",
        "-\\frac{1}{21}",
    ),
}


def test_regrading_keeps_its_lock_until_the_file_is_replaced(tmp_path, monkeypatch):
    """05 would append to the old file otherwise."""
    path, saved = tmp_path / "r.jsonl", []
    path.write_text(json.dumps({"id": "q", "answer": "7", "response": "\\boxed{7}"}) + "\n")

    def save(place, text):
        with open(place) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        saved.append(text)

    monkeypatch.setattr(regrade.EVAL, "save", save)
    asyncio.run(regrade.regrade(path))
    assert json.loads(saved[0])["correct"]


def test_golds_of_math_that_the_last_box_does_not_give():
    """test/prealgebra/177 boxes another number last, train/number_theory/837 two forms; of two foci
    the last box is one."""
    foci = "Find the coordinates of one of the foci. (Enter only one of the foci, not both.)"
    divisors = r"Let $\boxed{N}$ mean the number of whole number divisors of $N$. Find \boxed{20}."
    midnight = "The time right now is exactly midnight. What time will it be in 1234 minutes?"
    twice = r"in $1234$ minutes it is $\boxed{20\!:\!34}$ or $\boxed{8\!:\!34 \text{ p.m.}}$."
    for problem, solution, answer in (
        (divisors, r"Finally, $\boxed{12}=6$.", "6"),
        (midnight, twice, r"8\!:\!34 \text{ p.m.}"),
        ("What is 1 + 1?", r"It is $\boxed{2}$.", "2"),
        (foci, r"They are $\boxed{(10,0)}$ and $\boxed{(0,0)}$.", "(0,0)"),
    ):
        row = {"problem": problem, "solution": solution, "level": "Level 1", "type": "Algebra"}
        assert download.our_fields("math", row)["answer"] == answer


@pytest.mark.parametrize("name", HUB_ROWS)
def test_fields_of_the_hub_sets(name, tmp_path, monkeypatch):
    """Through datasets.load_dataset on a local folder; Odyssey-MATH and MGSM, which are files
    elsewhere, through httpx."""
    row, problem, answer = HUB_ROWS[name]
    source = download.SOURCES[name]
    if source.hub.startswith("https://"):
        text = row if isinstance(row, str) else json.dumps({"Problem_1": row})
        reply = httpx.Response(200, text=f"{text}\n", request=httpx.Request("GET", source.hub))
        monkeypatch.setattr(httpx, "get", lambda *_, **__: reply)
    else:
        (tmp_path / "hub").mkdir()
        for split in {source.train, source.test} - {""}:
            (tmp_path / "hub" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        monkeypatch.setitem(
            download.SOURCES, name, replace(source, hub=str(tmp_path / "hub"), parts="")
        )
    make(tmp_path / "out", name)
    paths = sorted((tmp_path / "out").glob("*.jsonl"))
    stem = name.replace("-", "_")
    assert [path.stem for path in paths] == (
        [f"{stem}_test", f"{stem}_train"] if source.train else [stem]
    )
    for path in paths:
        [found] = stage(5).load_problems(path)
        assert (found["problem"], found["answer"], found["dataset"]) == (problem, answer, name)


def test_a_set_that_a_script_makes_is_told_from_a_network_that_is_not_there(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "made.py").write_text("import datasets\n")
    cases = [
        (str(tmp_path / "made"), "a script makes this set", "network"),
        ("nobody/nothing", "network", "script"),
    ]
    for hub, said, other in cases:
        monkeypatch.setitem(download.SOURCES, "cmath", replace(download.SOURCES["cmath"], hub=hub))
        with pytest.raises(SystemExit):
            make(tmp_path / "out", "cmath")
        error = capsys.readouterr().err
        assert said in error and other not in error and "--from" in error


def test_questions_without_an_answer_are_left_out(tmp_path, monkeypatch):
    rows = [
        {"question": "q", "answer": answer, "perturbation_type": kind}
        for answer, kind in (("7", "numerical substitution"), ("None", "critical thinking"))
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(
        download.SOURCES, "gsm-plus", replace(download.SOURCES["gsm-plus"], hub=str(tmp_path))
    )
    make(tmp_path / "out", "gsm-plus")
    [found] = read(tmp_path / "out" / "gsm_plus.jsonl")
    assert found["answer"] == "7" and found["subject"] == "numerical substitution"


def test_odyssey_is_not_for_training(tmp_path):
    (tmp_path / "odyssey_math.jsonl").write_text(
        json.dumps({"id": "a", "problem": "p", "answer": "1"}) + "\n"
    )
    data, out = tmp_path / "odyssey_math.jsonl", tmp_path / "s.jsonl"
    done = run(1, "--data", data, "--model", TINY / "model", "--out", out, check=False)
    assert done.returncode == 2 and "test use only" in done.stderr and not out.exists()


# -------------------------------------------------------------------------------------------------
# regrading and the report


def results(folder, seeds: int = 1, samples: int = 1):
    """A folder of results as 05 leaves it: a base and a better model, of which `seeds`, on 60
    problems of two levels."""
    rng = random.Random(0)
    models = [("base", 0.4)] + [(f"tuned-{i}", 0.7) for i in range(seeds)]
    for number, (model, share) in enumerate(models):
        rows = []
        for i, sample in itertools.product(range(60), range(samples)):
            said = "7" if rng.random() < share else rng.choice(["8", "9", "0.07", "none"])
            text = (
                "I do not know <script>alert(1)</script>"
                if said == "none"
                else f"It is $x < {i}$, so \\boxed{{{said}}}. Costs $5 and $6."
            )
            end = {5: "length", 6: "refused"}.get(i, "stop")
            rows.append(
                {
                    "id": f"q{i}",
                    "problem": f"What is $7^1$ & {i} < 99?",
                    "answer": "7",
                    "level": 1 + i % 2,
                    "sample": sample,
                    "response": text if end != "refused" else "",
                    "finish_reason": end,
                    "tokens": 10 + i,
                    "model": model,
                }
            )
        path = folder / "sums" / f"{model}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        label = "base" if number == 0 else "tuned"
        meta = {
            "number": number,
            "label": label,
            "settings": {"temperature": 0.0, "max_tokens": 99},
        }
        (folder / "sums" / f"{model}.jsonl.meta.json").write_text(json.dumps(meta))


class Tags(HTMLParser):
    """All tags with their attributes, to see that nothing that a model wrote became one."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.mark.slow
def test_regrade_writes_the_whole_report(tmp_path):
    results(tmp_path)
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"prompt": "what is $7^1$ & 17 < 99"})
        + "\n"
        + json.dumps({"prompt": "a b c d e f g h i j k l m n"})
        + "\n"
    )
    done = run("regrade", tmp_path)
    assert len(re.findall(r"60 responses, [1-9]\d* verdicts changed", done.stdout)) == 2
    rows = {model: read(tmp_path / "sums" / f"{model}.jsonl") for model in ("base", "tuned-0")}
    assert all(
        row["correct"] == (row["prediction"] == "7") for found in rows.values() for row in found
    )
    assert all(
        row["prediction"] is None for found in rows.values() for row in found if row["id"] == "q5"
    ), "unfinished"
    summary = json.loads((tmp_path / "summary.json").read_text())
    f = summary["benchmarks"]["sums"]["models"]["tuned"]
    right = {model: {row["id"] for row in found if row["correct"]} for model, found in rows.items()}
    assert f["accuracy"] == len(right["tuned-0"]) / 60
    assert f["interval"] == list(stage(5).wilson(len(right["tuned-0"]), 60))
    assert set(f["won"]) == right["tuned-0"] - right["base"]
    assert set(f["lost"]) == right["base"] - right["tuned-0"]
    assert f["p"] == stage(5).mcnemar(len(f["won"]), len(f["lost"]))
    assert f["unfinished"] == 1 / 60 == f["refused_prompt"]
    shares = [
        sum(row[field] for row in rows["tuned-0"]) / 60
        for field in ("correct", "correct_paper", "correct_scdpo")
    ]
    assert shares[1] > shares[0] == f["accuracy"], "0.07 is a hundredth of 7"
    line = "| sums (60) | tuned | " + " | ".join(f"{share:.1%}" for share in shares) + " |"
    assert line in (tmp_path / "report.md").read_text()
    silent = [row for row in rows["tuned-0"] if row["prediction"] is None]
    assert f["unparsable"] == sum(row["finish_reason"] == "stop" for row in silent) / 60 > 0
    problems = [
        json.dumps({key: row[key] for key in ("id", "problem", "answer")}) for row in rows["base"]
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(problems) + "\n")
    options = [tmp_path / "train.jsonl", "--data", tmp_path / "sums.jsonl"]
    options += ["--out", tmp_path / "found.json"]
    run("contamination", *options)
    overlap = json.loads((tmp_path / "found.json").read_text())
    assert overlap["same"]["sums"] == ["q17"] and len(overlap["found"]["sums"]) == 1
    levels = summary["benchmarks"]["sums"]["models"]["tuned"]["by"]["level"]
    assert sum(level["accuracy"] * level["problems"] for level in levels.values()) == pytest.approx(
        60 * f["accuracy"]
    )
    text = (tmp_path / "report.md").read_text()
    first = next(cells for cells in text.split("\n") if cells.startswith("| sums (60) | tuned | "))
    assert first.split(" | ")[5] == f"{len(f['won'])} / {len(f['lost'])}"
    assert "sums by level" in text
    assert "power 80 %" in text
    assert f"`python analysis/report.py {tmp_path}`" in text
    said = run("report", tmp_path).stdout
    assert (tmp_path / "levels.png").stat().st_size > 5000
    pictures = "![accuracy](accuracy.png)\n\n![levels](levels.png)"
    assert (tmp_path / "report.md").read_text() == re.sub(
        "Pictures, and a page .*", lambda _: pictures, text
    )
    assert "2 pictures" in said
    assert f"{min(10, len(f['won'])) + min(10, len(f['lost']))} problems side by side" in said
    tags = Tags((tmp_path / "report.html").read_text()).found
    kinds = {tag for tag, _ in tags}
    assert "script" not in kinds and {"math", "mn", "table", "img"} <= kinds
    assert all(
        attributes["src"].startswith("data:image/png") for tag, attributes in tags if tag == "img"
    ), "self-contained"
    assert not any(
        name.startswith("on") or name == "href" for _, attributes in tags for name in attributes
    )
    with open(tmp_path / "sums" / "base.jsonl", "a") as file:
        file.write('{"id": "torn')  # by a kill
    again = run("regrade", tmp_path)
    assert again.stdout.count(" 0 verdicts changed") == 2
    done = run("regrade", tmp_path, "--base", "best", check=False)
    assert done.returncode == 2 and "a label that is there: base, tuned" in done.stderr
    for script in ("contamination", "report"):
        done = run(script, tmp_path / "none.jsonl", check=False)
        assert done.returncode == 2
        assert "none.jsonl" in done.stderr
        assert "Traceback" not in done.stderr
    run("regrade", tmp_path, "--base", "tuned")
    models = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["sums"]["models"]
    assert list(models) == ["tuned", "base"] and "p" in models["base"], (
        "the label that is named is the base"
    )
    run("regrade", tmp_path, "--verdict", "paper")
    again = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["sums"]["models"][
        "tuned"
    ]
    assert again["accuracy"] == shares[1] and line in (tmp_path / "report.md").read_text()
    assert "is by the Step-DPO verdict;" in (tmp_path / "report.md").read_text()
    assert "maj@k" not in (tmp_path / "report.md").read_text(), "one response to each problem"


@pytest.mark.slow
def test_seeds_and_samples_in_the_report(tmp_path):
    results(tmp_path, seeds=3, samples=4)
    run("regrade", tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["sums"]
    models = found["models"]
    group = models["tuned"]
    accuracies = [models[f"tuned-{i}"]["accuracy"] for i in range(3)]
    assert group["seeds"] == 3 and group["accuracy"] == pytest.approx(np.mean(accuracies))
    assert group["spread"] == pytest.approx(np.std(accuracies, ddof=1))
    assert group["difference"] == pytest.approx(np.mean(accuracies) - models["base"]["accuracy"])
    curves = models["base"]["curves"]
    assert curves["k"] == [1, 2, 4]
    assert curves["pass"][0] == pytest.approx(models["base"]["accuracy"])
    assert curves["pass"][0] < curves["pass"][1] < curves["pass"][2]
    text = (tmp_path / "report.md").read_text()
    # the order in which the responses came does not matter
    for path in (tmp_path / "sums").glob("*.jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in reversed(read(path))))
    run("regrade", tmp_path)
    assert (tmp_path / "report.md").read_text() == text and "maj@4" in text
    run("report", tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 5000
    # another benchmark with one response a problem, in the same folder
    for path in (tmp_path / "sums").glob("*.jsonl"):
        (tmp_path / "ones").mkdir(exist_ok=True)
        (tmp_path / "ones" / path.name).write_text(
            "".join(json.dumps(row) + "\n" for row in read(path) if row["sample"] == 0)
        )
    run("regrade", tmp_path, "--base", "base")
    text = (tmp_path / "report.md").read_text()
    assert "## Accuracy\n" in text and "## Accuracy of 4 responses to each problem" in text
    assert "maj@k takes" in text
    rows = read(tmp_path / "sums" / "base.jsonl")
    (tmp_path / "sums" / "base.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows[:-1])
    )
    done = run("regrade", tmp_path, check=False)
    assert done.returncode == 2 and "3 responses to some problems and 4 to others" in done.stderr
    # benchmarks that were decoded in different ways; and an evaluation that has not ended
    (tmp_path / "sums" / "base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = {"settings": {"temperature": 0.7, "top_p": 0.9, "max_tokens": 9, "opening": "So"}}
    for path in (tmp_path / "sums").glob("*.jsonl"):
        place = json.loads(Path(f"{path}.meta.json").read_text())
        Path(f"{path}.meta.json").write_text(json.dumps(place | meta))
    run("regrade", tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "sums: temperature 0.7, top-p 0.9, at most 9 tokens, after the opening 'So'" in text
    assert "ones: greedy, at most" in text
    flipped = [row | {"correct": not row["correct"]} for row in rows]  # graded since in another way
    (tmp_path / "sums" / "base.jsonl").write_text("".join(json.dumps(r) + "\n" for r in flipped))
    done = run("report", tmp_path, check=False)
    assert done.returncode == 2 and "or of other responses" in done.stderr
    Path(f"{path}.meta.json").write_text(json.dumps(place | meta | {"finished": False}))
    done = run("regrade", tmp_path, check=False)
    assert done.returncode == 2 and "has not answered all of sums" in done.stderr


@pytest.mark.slow
def test_a_base_of_several_seeds_side_by_side(tmp_path):
    """What the base lost by most of its seeds, its first one may have solved: the page needs the
    rows of all."""
    results(tmp_path, seeds=3)
    for path in (tmp_path / "sums").glob("*.jsonl.meta.json"):
        meta = json.loads(path.read_text())
        path.write_text(json.dumps(meta | {"label": "two" if meta["number"] else "one"}))
    run("regrade", tmp_path, "--base", "two")
    models = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["sums"]["models"]
    assert models["two"]["seeds"] == 3
    first = {row["id"] for row in read(tmp_path / "sums" / "tuned-0.jsonl") if row["correct"]}
    assert first & set(models["one"]["won"])
    shown = int(re.search(r"(\d+) problems side by side", run("report", tmp_path).stdout)[1])
    kinds = [
        attributes.get("class")
        for _, attributes in Tags((tmp_path / "report.html").read_text()).found
    ]
    assert kinds.count("right") == kinds.count("wrong") == shown > 5


def test_seeds_that_tie_win_and_lose_nothing():
    def table(right: set, **fields) -> list:
        said = {True: "7", False: "8"}
        return [
            [
                {"id": i, "problem": "", "answer": "7", "correct": i in right, **fields}
                | {"prediction": said[i in right], "finish_reason": "stop", "tokens": 1}
            ]
            for i in range(20)
        ]

    # the base's rows are older than the problems' levels, or newer
    for ours, base in (({}, {"level": "1"}), ({"level": "1"}, {})):
        tables = {
            "base": table(set(range(10)), **base),
            "even": table(set(range(0, 20, 2)), **ours),
            "odd": table(set(range(1, 20, 2)), **ours),
        }
        groups = {"base": ["base"], "both": ["even", "odd"]}
        summary = stage(5).summary_of(groups, {"sums": tables}, "greedy", 0)
        both = summary["benchmarks"]["sums"]["models"]["both"]
        assert both["won"] == both["lost"] == [] and both["difference"] == 0
        assert stage(5).tables_of(summary)


def test_the_base_is_that_of_the_last_run(tmp_path):
    """Of two runs with their models in another order, of another benchmark each."""
    for name, models in (("a", ["one", "two"]), ("b", ["two", "one"])):
        (tmp_path / name).mkdir()
        for number, model in enumerate(models):
            row = {"id": "q", "problem": "", "answer": "7", "response": "\\boxed{7}"}
            path = tmp_path / name / f"{model}.jsonl"
            path.write_text(json.dumps(row | {"model": model}) + "\n")
            Path(f"{path}.meta.json").write_text(json.dumps({"number": number, "label": model}))
    for last, order in (("a", ["one", "two"]), ("b", ["two", "one"])):
        summary = {"groups": {label: [label] for label in order}, "benchmarks": {last: {}}}
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert list(regrade.regrade_folder(tmp_path, "")[0]) == order


def test_regrade_reports_the_models_of_the_last_run(tmp_path, capsys):
    """Another model with the same label, of an earlier run, is no seed of it."""
    results(tmp_path, seeds=2)
    groups = {"tuned": ["tuned-1"], "base": ["base"]}
    (tmp_path / "summary.json").write_text(json.dumps({"groups": groups}))
    found, benchmarks, _ = regrade.regrade_folder(tmp_path, "")  # the summary of another --base
    assert list(found.items()) == [("base", ["base"]), ("tuned", ["tuned-1"])]
    assert list(benchmarks["sums"]) == ["base", "tuned-1"]
    (tmp_path / "summary.json").write_text(json.dumps({"groups": groups | {"gone": ["gone"]}}))
    with pytest.raises(SystemExit):
        regrade.regrade_folder(tmp_path, "")
    assert "sums lacks responses of gone" in capsys.readouterr().err
    (tmp_path / "older").mkdir()
    shutil.copy(tmp_path / "sums" / "base.jsonl", tmp_path / "older")
    last = {"groups": groups, "benchmarks": {"sums": {}}}
    (tmp_path / "summary.json").write_text(json.dumps(last))
    assert list(regrade.regrade_folder(tmp_path, "")[1]) == ["sums"]
    assert "left out, not of the run in summary.json: older" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "older")
    (tmp_path / "summary.json").write_text('{"groups": ')  # torn
    assert regrade.regrade_folder(tmp_path, "tuned")[0] == {
        "tuned": ["tuned-0", "tuned-1"],
        "base": ["base"],
    }


VOTES = [  # response, why it ended, what the verdicts strict, paper and scdpo read
    ("so we get 6", "stop", (None, "6", None)),
    ("\\boxed{5}, no, it is \\boxed{6}", "length", (None, "6", "6")),
]


@pytest.mark.parametrize("response, finish_reason, reads", VOTES)
def test_a_vote_is_for_what_the_verdict_reads(response, finish_reason, reads):
    """The papers' read unfinished text; the Step-DPO authors' takes the last number where there is
    no box."""
    row = {"problem": "?", "answer": "7", "response": response, "finish_reason": finish_reason}

    async def grade():
        grader = stage(5).Grader()
        try:
            return await regrade.grade(row | {"opening": ""}, grader)
        finally:
            grader.close()

    graded = asyncio.run(grade())
    judged = [regrade.judged_by(verdict, graded) for verdict in regrade.VERDICTS]
    assert tuple(row["prediction"] for row in judged) == reads
    assert not any(row["correct"] for row in judged)


def test_a_problem_with_another_sign_is_not_the_same():
    from contamination import whole_of

    assert whole_of("Solve $z^4 + 1 = 0$.") == whole_of("Solve $z^4+1=0$")
    assert whole_of("Solve $z^4 + 1 = 0$.") != whole_of("Solve $z^4 - 1 = 0$.")


def test_chinese_overlaps_begin_at_any_character():
    from contamination import grams_of

    train = "学校图书馆有300本故事书和科技书供老师们借阅"
    assert grams_of(train) & grams_of("学校图书馆有300本故事书和科技书供同学们借阅")
    assert not grams_of(train) & grams_of("学校图书馆有301本故事书和科技书供同学们借阅")


def test_regrade_of_a_wrong_folder_is_refused(tmp_path):
    done = run("regrade", tmp_path, check=False)
    assert done.returncode == 2
    assert "BENCHMARK/MODEL.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "m.jsonl").write_text(
        '{"id": "a", "answer": "1", "response": "x"}\n{"id": "b", "answer": "1"}\n'
    )
    done = run("regrade", tmp_path, check=False)
    assert done.returncode == 2
    assert "m.jsonl, line 2" in done.stderr
    assert "Traceback" not in done.stderr


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "$\\text{<b onclick=1>x</b>}$",
    "\\href{javascript:alert(1)}{x}",
    "$\\href{javascript:1}{x}$",
    "$x^{$",
    "\\(" * 3000,
    '$\\color{red" onclick="alert(1)}x$',
    "</div></details><script>1</script>",
    "\x00 $a<b>c$",
    "$\\style{x}{y}$ $$\\frac{1}{$$",
]


def test_model_text_becomes_no_markup():
    allowed = {
        "math",
        "mrow",
        "mn",
        "mi",
        "mo",
        "mtext",
        "msup",
        "msub",
        "mfrac",
        "mstyle",
        "code",
        "msubsup",
        "menclose",
        "mpadded",
    }
    for text in HOSTILE:
        start = time.time()
        tags = Tags(report.to_html(text)).found
        assert {tag for tag, _ in tags} <= allowed, text
        assert not any(
            name.startswith("on") or name in ("href", "src", "style")
            for _, found in tags
            for name in found
        ), text
        assert time.time() - start < 5
    assert "<mfrac>" in report.to_html("so $\\frac{1}{2}$")
    assert "$5 and $6" in report.to_html("It costs $5 and $6.")


# -------------------------------------------------------------------------------------------------
# credit assignment


def test_auc_against_counting():
    rng = np.random.default_rng(0)
    wrong, right = rng.integers(0, 6, 40) / 6.0, rng.integers(2, 9, 70) / 6.0
    exact = np.mean([(a < b) + 0.5 * (a == b) for a in wrong for b in right])
    assert credit.auc(wrong, right) == pytest.approx(exact)


STEPS = [
    "Let's think step by step.\nStep 1: The 2 friends get 3 * 2 = 6 shells.\n",
    "Step 2: Lena now has 13 - 6 = 17 shells.\n",
    "Step 3: So 17 are left.\nThe answer is \\boxed{17}.",
]


def test_tokens_fall_into_their_steps(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    # SentencePiece would put a space before a text that stands alone
    marked = AutoTokenizer.from_pretrained(TINY / "model")
    marked.backend_tokenizer.normalizer = Prepend("Ava")
    ids, _, texts = credit.encode_solution({"problem": "p", "steps": STEPS}, marked)
    text = stage(1).render_prompt(marked, "p", "") + "".join(STEPS)
    assert ids == marked(text, add_special_tokens=False)["input_ids"]
    assert "".join(texts) == "".join(STEPS).removeprefix(stage(5).OPENING)
    # the opening of the run is no part of a step
    path = tmp_path / "located.jsonl"
    row = {"problem": "p", "steps": ["So.\nStep 1: a.\n", "Step 2: b."], "error_step": 2}
    path.write_text(json.dumps(row) + "\n")
    meta = {"settings": {"opening": "So.\nStep 1:"}}
    (tmp_path / "located.jsonl.meta.json").write_text(json.dumps(meta))
    [row] = credit.load_solutions(credit.Args(path, models=("a", "b")))
    _, places, texts = credit.encode_solution(row, tokenizer)
    assert "".join(t for t, place in zip(texts, places, strict=True) if place == 1) == " a.\n"
    ids, places, texts = credit.encode_solution({"problem": "p", "steps": STEPS}, tokenizer)
    assert "".join(texts) == "".join(STEPS).removeprefix(stage(5).OPENING)
    chinese = credit.encode_solution({"problem": "p", "steps": ["三加四等于七。"]}, tokenizer)
    assert "".join(chinese[2]) == "三加四等于七。" and "\ufffd" not in "".join(chinese[2])
    texts = {
        k: tokenizer.decode([i for i, place in zip(ids, places, strict=True) if place == k])
        for k in (1, 2, 3)
    }
    assert texts == {1: STEPS[0].removeprefix(stage(5).OPENING), 2: STEPS[1], 3: STEPS[2]}
    assert tokenizer.decode(
        [i for i, place in zip(ids, places, strict=True) if not place]
    ).endswith(stage(5).OPENING)


def test_credit_wants_the_prompt_of_the_samples(tmp_path, capsys):
    path, model = tmp_path / "located.jsonl", str(TINY / "model")
    path.write_text(json.dumps({"problem": "p", "steps": STEPS, "error_step": 2}) + "\n")
    meta = {"settings": {"opening": stage(5).OPENING, "prompt": "### Instruction: p"}}
    (tmp_path / "located.jsonl.meta.json").write_text(json.dumps(meta))
    with pytest.raises(SystemExit):
        credit.main(credit.Args(path, models=(model, model), out=tmp_path / "out"))
    assert "was made with prompt = ...'### Instruction" in capsys.readouterr().err


@pytest.mark.slow
def test_credit_of_a_trained_model(tmp_path, small_model):
    """A random model trained to disprefer one wrong step gives that step the lowest reward; rewards
    equal a direct sum."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    problem = "Lena has 13 shells. Then she gives 3 shells to each of 2 friends. How many are left?"
    prefix, rejected = STEPS[0] + "Step 2:", STEPS[1].removeprefix("Step 2:")
    pair = {
        "prompt": problem,
        "initial_reason_steps": prefix,
        "chosen": " Lena now has 13 - 6 = 7 shells.\n",
        "rejected": rejected,
        "full_chosen": "x",
        "full_rejected": "x",
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    located = {"id": "q", "problem": problem, "answer": "7", "steps": STEPS, "error_step": 2}
    right = {
        "id": "r",
        "problem": problem,
        "answer": "7",
        "steps": [STEPS[0], "Step 2: 7 <b>.\n"],
        "error_step": None,
        "correct": True,
    }
    (tmp_path / "located.jsonl").write_text(json.dumps(located) + "\n" + json.dumps(right) + "\n")
    options = ["--data", tmp_path / "pairs.jsonl", "--model", small_model]
    options += ["--out", tmp_path / "tuned", "--lr", 1e-3, "--epochs", 6, "--batch-size", 1]
    options += ["--precision", "fp32"]
    run(4, *options)
    options = [tmp_path / "located.jsonl", "--models", small_model, tmp_path / "tuned"]
    options += ["--out", tmp_path / "r", "--beta", 0.5]
    done = run("credit", *options)
    assert "lowest step is the labelled one" in done.stdout
    [found] = json.loads((tmp_path / "r" / "credit.json").read_text()).values()
    assert found["lowest_is_error"] == found["solutions"] == 1
    assert found["auc"] == 1.0
    assert found["chance"] == pytest.approx(1 / 3)
    page = (tmp_path / "r" / "credit.html").read_text()
    tags = Tags(page).found
    values = [
        float(a["title"].split(",")[0])
        for tag, a in tags
        if tag == "span" and a["title"].endswith("step 2")
    ]
    assert [tag for tag, _ in tags].count("b") == 2 and "&lt;" in page  # none is the model's
    spans = [a for tag, a in tags if tag == "span" and a["title"].endswith("step 2")]
    assert spans[0]["class"] == "error"
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    ids, places, _ = credit.encode_solution(located, tokenizer)
    logps = []
    for folder in (tmp_path / "tuned", small_model):
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
        logps.append(sum(logits[i - 1, ids[i]].item() for i in range(len(ids)) if places[i] == 2))
    first = sum(values[: places.count(2)])  # the page has both solutions; the first comes first
    assert first == pytest.approx(0.5 * (logps[0] - logps[1]), abs=0.01) and first < 0


@pytest.mark.slow
def test_credit_refuses_bad_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"problem": "p", "steps": ["a"], "error_step": 2}) + "\n"
    )
    done = run(
        "credit", tmp_path / "a.jsonl", "--models", TINY / "model", TINY / "model", check=False
    )
    assert done.returncode == 2
    assert "a.jsonl, line 1" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("credit", tmp_path / "a.jsonl", "--models", TINY / "model", check=False)
    assert done.returncode == 2 and "REFERENCE" in done.stderr


# -------------------------------------------------------------------------------------------------
# with the real server


@pytest.mark.slow
def test_samples_survive_kills_and_give_the_same_rows(server, tmp_path):
    """kill -9, then the rows of an uninterrupted run, each once; k samples differ
    from each other."""
    options = [option.replace("--model", "--models") for option in server]
    arguments = ["--data", TINY / "validation.jsonl", "--limit", 30, "--samples", 4]
    arguments += ["--temperature", 0.8, "--max-tokens", 300]
    arguments += options
    run(5, *arguments, "--out", tmp_path / "whole")
    [whole] = (tmp_path / "whole" / "validation").glob("*.jsonl")
    path = tmp_path / "cut" / "validation" / whole.name
    run_killed(
        5, *arguments, "--out", tmp_path / "cut", "--concurrency", 6, journal=path, kills=1, seed=5
    )
    run(5, *arguments, "--out", tmp_path / "cut")

    def key(row):
        return (row["id"], row["sample"])

    assert sorted(read(path), key=key) == sorted(read(whole), key=key)
    assert len({key(row) for row in read(path)}) == 120
    assert any(
        len({row["response"] for row in read(path) if row["id"] == name}) > 1
        for name in {row["id"] for row in read(path)}
    )
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    [f] = summary["benchmarks"]["validation"]["models"].values()
    assert f["curves"]["k"] == [1, 2, 4] and math.isclose(f["curves"]["pass"][0], f["accuracy"])
    refused = run(5, *arguments, "--opening", "", "--out", tmp_path / "cut", check=False)
    assert refused.returncode == 2 and "opening" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "template, opening, verdict, rule, start, end",
    [
        (
            "step_dpo_qwen",
            "",
            "paper",
            "the Step-DPO verdict",
            "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>",
            "<|im_start|>assistant\\n",
        ),
        (
            "step_dpo_deepseek",
            "",
            "paper",
            "the Step-DPO verdict",
            "User: ",
            "within \\\\boxed{}.\\n\\nAssistant:",
        ),
        (
            "metamath",
            " Let's think step by step.",
            "scdpo",
            "the SCDPO verdict",
            "Below is an instruction that describes a task. Write",
            "\\n\\n### Response: Let's think step by step.",
        ),
    ],
)
def test_the_authors_prompt_reaches_the_model_as_it_is(
    bundled, tmp_path, template, opening, verdict, rule, start, end
):
    """No forced "Step 1:" in the evaluation; what the prompt gave of the response stands in the
    row's opening."""
    options = [option.replace("--model", "--models") for option in bundled]
    arguments = ["--data", TINY / "validation.jsonl", "--limit", 8, "--max-tokens", 200, *options]
    arguments += ["--out", tmp_path]
    arguments += [
        "--chat-template",
        ROOT / "data" / "templates" / f"{template}.jinja",
        "--opening",
        opening,
    ]
    done = run(5, *arguments)
    # the progress bar may stand before it
    [line] = [line for line in done.stderr.splitlines() if "first prompt:" in line]
    prompt = line.split("first prompt: ")[1][1:-1]
    assert prompt.startswith(start) and prompt.endswith(end), prompt
    [path] = (tmp_path / "validation").glob("*.jsonl")
    rows = read(path)
    assert len(rows) == 8
    assert all(row["opening"] == opening and row["response"].startswith(opening) for row in rows)
    text = (tmp_path / "report.md").read_text()
    assert (
        "accuracy is by the strict verdict;" in text and f"after the opening {opening!r}." in text
    )
    run("regrade", tmp_path, "--verdict", verdict)
    added = {"correct_paper", "correct_scdpo"}
    assert all(added < set(row) for row in read(path))
    assert [{name: row[name] for name in row if name not in added} for row in read(path)] == rows
    judged = (tmp_path / "report.md").read_text()
    assert f"accuracy is by {rule};" in judged and "## Right by each verdict" in judged
    run(5, *arguments)  # the strict report again, from the rows
    assert (tmp_path / "report.md").read_text() == text
