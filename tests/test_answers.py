"""Steps, answers and statistics: no server, no model."""

import asyncio
import contextlib
import json
import math
import multiprocessing
import re
import time
from collections import Counter

import pytest
from conftest import ROOT, TINY, read, stage
from grading import changed

SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize(
    "response, count",
    [
        ("Let's think step by step.\nStep 1: a\nStep 2: b\nThe answer is \\boxed{3}.", 2),
        ("Let's think step by step.\nStep 1: a\n\nStep 2: see Step 1: again\nStep 3: c", 3),
        ("Step 1: a\n**Step 2:** b\n## Step 3. c", 3),
        ("Step 1: a\nStep 1: again\nStep 3: skipped", 1),
        ("Step 1: a\r\nStep 2: b\n\n\n", 2),
        ("Step 2: the number of its first step\nStep 3: none", 1),
        ("no label at all", 1),
        ("", 0),
        ("Step 1: a\nStep 2: b\nStep 10: not the third\nStep 3: c", 3),
    ],
)
def test_steps_are_lossless(response, count):
    steps = stage(1).split_steps(response)
    assert "".join(steps) == response and len(steps) == count


@pytest.mark.parametrize("split", ["labels", "lines", "blank-lines"])
def test_every_split_is_lossless(split):
    """On bundled solutions, also with blank lines, and the shared ones, where they are; the opening
    never stands alone."""
    texts = [row["solution"] for row in read(TINY / "validation.jsonl")[:100]]
    texts += [text.replace("\n", "\n\n") for text in texts]
    for path in sorted(SHARED.glob("*.jsonl")):
        texts += [row["solution"] for row in read(path)[:2000] if row.get("solution")]
    parted = 0
    for text in texts:
        steps = stage(1).split_steps("Let's think. " + text, split, "Let's think.")
        assert "".join(steps) == "Let's think. " + text and all(step.strip() for step in steps)
        assert steps[0].strip() != "Let's think."
        assert split != "blank-lines" or "\n\n" not in steps[-1].strip()
        parted += len(steps) > 1
    assert parted > (0.1 if split == "blank-lines" else 0) * len(texts)


def test_reference_solutions_split_into_their_steps():
    for row in read(TINY / "validation.jsonl"):
        steps = stage(1).split_steps(row["solution"])
        assert "".join(steps) == row["solution"] and len(steps) == len(row["values"])
        assert stage(1).extract_answer(row["solution"]) == row["answer"]


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"so \boxed{3}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} and then \boxed{4", None),  # the last box is not closed: no answer, not 3
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \mid x > 0 \right\}}", r"\left\{ x \mid x > 0 \right\}"),
        (r"\boxed{}", None),
        ("The answer is: 42.", "42"),
        ("The answer is **5** apples.", "5 apples"),
        ("**Answer:** **5** apples", "5 apples"),
        ("The answer is (x+1)**2 + x**3.", "(x+1)**2 + x**3"),
        ("The answer is 3.\nNo: The answer is: -7.5", "-7.5"),
        (r"The answer is 3. \boxed{4}", "4"),
        (r"our answer is $\boxed 2$.", "2"),
        (r"so $\boxed\frac12$.", r"\frac12"),
        (r"so $\boxed {5}$.", "5"),
        (r"the roots are \boxed{3}, \boxed{5}, and $\boxed{7}$.", "3, 5, 7"),
        (r"\boxed{3} is not it. We get \boxed{5}", "5"),
        (r"$\boxed{\frac{1}{2}}$ and \(\boxed{3}\)", r"\frac{1}{2}, 3"),
        (r"\boxed{\sqrt{2}} \text{ or } \boxed{-\sqrt{2}}", r"\sqrt{2}, -\sqrt{2}"),
        ("The answer is:\n\\[ 42 \\]", "42"),
        ("**Final Answer**\n\n$42$", "42"),
        ("Final Answer: The final answer is $42$. I hope it is correct.", "42"),
        ("The answer is 7.\n\nThe answer is:", "7"),
        ("The answer is:", None),
        ("The answer is 7.\n\n#### Check\nWe verify.", "7"),
        ("The answer is 7.\n\n#### 2. Check\nok", "7"),
        ("#### Step 2: done", None),
        ("#### **18**", "18"),
        ("so #### x = 5", "x = 5"),
        ("#### (x+1)(x-2)\n", "(x+1)(x-2)"),
        ("#### Evelyn", "Evelyn"),
        ("#### −5", "−5"),
        ("so 3 + 4 = 7.\n#### 7", "7"),
        ("#### $\\frac12$", "\\frac12"),
        ("#### B", "B"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_extracted_answer(response, answer):
    assert stage(1).extract_answer(response) == answer


# gold, prediction, kind, reason. "unsupported": equal, but gets no credit; "credited": unequal, but
# gets it
PAIRS = [
    line.split("\t")
    for line in (ROOT / "tests" / "answer_pairs.tsv").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def grades():
    def grade(pairs, seconds=10.0):
        grader = stage(1).Grader(seconds)

        async def all_of_them():
            return await asyncio.gather(*(grader(gold, prediction) for gold, prediction in pairs))

        try:
            return asyncio.run(all_of_them()), grader.kills
        finally:
            grader.close()

    return grade


def test_regression_pairs(grades):
    """Equal and unequal answers, each with its reason; a third or more are unequal."""
    assert len(PAIRS) >= 200 and sum(kind == "unequal" for _, _, kind, _ in PAIRS) >= len(PAIRS) / 3
    verdicts, _ = grades([(gold, prediction) for gold, prediction, *_ in PAIRS])
    wrong = [
        pair
        for pair, verdict in zip(PAIRS, verdicts, strict=True)
        if verdict != (pair[2] in ("equal", "credited"))
    ]
    assert not wrong
    assert grades([("3", None)])[0] == [False]


def test_processes_that_die_at_rest_are_started_again():
    """By the system's killer, say: pebble then takes no job, which must not be a wrong answer."""
    grader = stage(1).Grader()

    async def grade():
        assert await grader("x+1", "1+x")
        for process in multiprocessing.active_children():
            process.kill()
        deadline = time.time() + 60
        while grader.pool.active and time.time() < deadline:
            await asyncio.sleep(0.05)
        # several wait for the new processes, and each has its own verdict
        pairs = [(f"x+{n}", f"{n}+x") for n in range(2, 8)] + [("x+2", "3+x")]
        verdicts = await asyncio.gather(*(grader(*pair) for pair in pairs))
        assert verdicts == [True] * 6 + [False]

    try:
        asyncio.run(grade())
    finally:
        grader.close()
    assert grader.kills == 0


CHOICES = [  # problem, and the options that it lists
    (
        "How fast?\nOptions:\nA)32400\nB)6,000 km\nC)(1,1)",
        {"A": "32400", "B": "6,000 km", "C": "(1,1)"},
    ),
    (
        "What curve?\n\n(A) Line\n(B) Circle\n(C) Parabola\n\nEnter the letter.",
        {"A": "Line", "B": "Circle", "C": "Parabola"},
    ),
    ("\\[z = c.\\](A) Line\n(B) Circle", {"A": "Line", "B": "Circle"}),
    (
        "Find $x$. $\\textbf{(A)}\\ 5 \\qquad \\textbf{(B)}\\ \\frac{1}{2} \\qquad\\text{(C) } 7$",
        {"A": "5", "B": "\\frac{1}{2}", "C": "7"},
    ),
    ("A. 3\nB. 4", {"A": "3", "B": "4"}),
    (  # as Odyssey-MATH has them
        "\\begin{array}{ll}\n\\text{A)}\\ &6  &\n\\text{B)}\\ & 16\\\\\n\\text{C)}\\ &  8 &",
        {"A": "6", "B": "16", "C": "8"},
    ),
    ("With $P(A) = 1$, what is it?", {}),
    ("B) 3\nC) 4", {}),
    ("Ann has 3 apples and Bob 4. A train leaves.", {}),
]


@pytest.mark.parametrize("problem, listed", CHOICES)
def test_options_of_a_problem(problem, listed):
    assert stage(1).options(problem) == listed


def test_a_percentage_that_is_asked_for():
    asked = "Of 50 cars 10 are red. What percentage of the cars is red?"
    given = "A 25% discount on $80, and 20 \\% tax: what is the price?"
    cases = [("20", "20\\%", asked), ("20", "20%.", asked), ("20", "21\\%", asked)]
    cases += [("20", "20\\%", given), ("20\\%", "0.2\\%", asked), ("0.2", "20\\%", asked)]
    cases += [("20", "20\\text{ percent}", asked)]
    grader = stage(1).Grader()

    async def grade():
        return [await grader(*case) for case in cases]

    try:
        assert asyncio.run(grade()) == [True, True, False, False, False, True, True]
    finally:
        grader.close()


def test_the_value_of_the_right_option_counts_and_of_another_never():
    problem = "Which?\nOptions:\nA)12 km\nB)0.5\nC)\\frac{1}{2}\nD)7\nE)none"
    cases = [
        ("A", "12", True),
        ("A", "(A)", True),
        ("A", "12 \\text{ km}", True),
        ("A", "7", False),
        ("D", "7", True),
        ("D", "D) 7", True),
        ("D", "12", False),
        ("D", "A", False),
        ("D", "8", False),
        ("E", "none", True),
        ("D", None, False),
        # B and C are worth the same: the value alone does not tell
        ("B", "0.5", False),
    ]

    async def verdicts():
        grader = stage(1).Grader()
        try:
            return [await grader(gold, said, problem) for gold, said, _ in cases]
        finally:
            grader.close()

    found = asyncio.run(verdicts())
    assert [case for case, verdict in zip(cases, found, strict=True) if case[2] != verdict] == []


HOSTILE = [
    "9^{9^{9^{9}}}",
    "{" * 4000,
    "(1," * 1600,
    "\\{" * 2000,
    "\\int_0^1 " * 400 + "x",
    "\x00",
    "1" * 5000,
    "x" * 1_000_000,
    "\\frac{1}" * 500,
    "1,2," * 1000,
    "\\sqrt{" * 900,
    "10^{99}" * 50,
    "(" * 10 + "1" + ")" * 10,
    "a<" * 2000,
    "\\pm" * 900,
]


@pytest.mark.slow  # it looks at the clock, and quick tests run two at a time
def test_hostile_answers_cost_their_deadline_and_no_more(grades):
    start = time.time()
    verdicts, kills = grades([("7", answer) for answer in HOSTILE], seconds=2)
    assert verdicts == [False] * len(HOSTILE)
    assert time.time() - start < 15 + kills * 5
    assert grades([("x+1", "1+x")], seconds=60)[0] == [True]


@pytest.mark.slow
def test_a_grading_that_hangs_is_killed_and_counted():
    """The next one is given another worker."""
    grader = stage(1).Grader(5.0)

    async def grade():
        # 2^40 ways to part the text, none of which fits
        hangs = await grader("(a+)+$", "a" * 40 + "!", "", (lambda *_: None, re.match))
        grader.seconds = 60  # the first sympy call of a worker on a busy machine
        return hangs, await grader("x+1", "1+x")

    try:
        assert asyncio.run(grade()) == (False, True) and grader.kills == 1
    finally:
        grader.close()


@pytest.mark.slow
def test_hostile_responses_are_read_in_linear_time():
    start = time.time()
    for text in (
        "\\boxed{",
        "The answer is ",
        "{",
        "answer: ",
        "\x00",
        "\n#### ",
        "**Answer:** **",
    ):
        stage(1).extract_answer(text * (1_000_000 // len(text)) + "\\fbox{7}")
    assert time.time() - start < 10


KNOWN = {
    ("test/prealgebra/1879.json", "sentence"),  # a line break within the gold
    ("odyssey-212", "sentence"),  # "a. 3, b. 4": a full stop within
}
FILES = (
    "gsm8k_test",
    "math_test",
    "aime24",
    "aime25",
    "odyssey_math",
    "cmath_test",
    "mgsm_zh_test",
    "ape500_test",
    "aqua_dev",
)


@pytest.mark.slow
def test_gold_answers_equal_themselves_and_nothing_else(grades):
    """All answers of the real test files: boxed, in a sentence, and changed. KNOWN are the
    exceptions."""
    if not SHARED.is_dir():
        pytest.skip("the benchmark files are not beside this checkout")
    extract, pairs, names = stage(1).extract_answer, [], []
    for file in FILES:
        for row in read(SHARED / f"{file}.jsonl"):
            answer = row["answer"]
            for kind, text in (
                ("boxed", f"So \\boxed{{{answer}}}."),
                ("sentence", f"So it is. The answer is {answer}."),
            ):
                pairs.append((answer, extract(text)))
                names.append((row["id"], kind, True))
            pairs.append((answer, changed(answer)))
            names.append((row["id"], "changed", False))
    verdicts, _ = grades(pairs)
    wrong = {
        (identity, kind)
        for (identity, kind, equal), verdict in zip(names, verdicts, strict=True)
        if verdict != equal
    }
    assert wrong == KNOWN


def test_wilson_against_published_values():
    # Newcombe (1998), Table I: 81/263, 15/148, 0/20, 1/29
    published = [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]
    for correct, total, low, high in published:
        assert stage(5).wilson(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_equal_rates_are_not_taken_for_certain():
    """A bootstrap of rates that are all alike has no width."""
    import numpy as np

    five = stage(5)
    assert five.interval(np.full((1, 20), 0.5), 16, 0) == five.wilson(10, 20)
    problems = [{"level": i % 3} for i in range(30)]
    levels = five.breakdown(problems, np.eye(30)[:1], 1, 0)["level"]
    assert {name: level["accuracy"] for name, level in levels.items()} == {"0": 0.1, "1": 0, "2": 0}
    assert [levels[name]["interval"] for name in "012"] == [five.wilson(n, 10) for n in (1, 0, 0)]


def test_mcnemar_against_counting():
    assert stage(5).mcnemar(0, 0) == 1.0 and stage(5).mcnemar(5, 5) == 1.0
    assert stage(5).mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert stage(5).mcnemar(1, 9) == stage(5).mcnemar(9, 1)
    assert stage(5).mcnemar(600, 500) == pytest.approx(
        math.erfc(99 / math.sqrt(2 * 1100)), rel=0.02
    )


def test_bootstrap_covers_the_mean_and_has_the_right_width():
    import numpy as np

    new, old = np.zeros((1, 1000)), np.zeros((1, 1000))
    new[0, :60], old[0, 60:90] = 1, 1
    low, high = stage(5).paired(new, old, 0)["difference_interval"]
    half = 1.96 * (new - old).std() / math.sqrt(1000)
    assert (low, high) == pytest.approx((0.03 - half, 0.03 + half), abs=0.003)
    assert stage(5).paired(new, old, 0)["difference_interval"] == (low, high)


def locate(truth: list[bool], linear: bool) -> tuple[int | None, int]:
    asked = []

    async def estimate(k):
        asked.append(k)
        return (1, 2) if truth[k] else (0, 8)

    step, reason = asyncio.run(stage(2).first_wrong_step(len(truth), estimate, linear))
    assert (step is None) == (
        reason == "none of 8 samples and continuations of the problem is right"
    )
    return step, len(asked)


@pytest.mark.parametrize("linear", [False, True])
def test_every_place_of_the_error_is_found(linear):
    for n in range(1, 9):
        for error in range(1, n + 1):
            assert locate([k < error for k in range(n)], linear)[0] == error
        assert locate([False] * n, linear) == (None, 1)


def test_a_success_behind_a_failure_is_trusted():
    truth = [True, True, False, True, False, False]  # V(2) = 0 by chance: the error is in step 4
    assert locate(truth, False)[0] == locate(truth, True)[0] == 4


def test_bisection_asks_less():
    assert (
        locate([True] * 5 + [False] * 3, False)[1] == 4 < locate([True] * 5 + [False] * 3, True)[1]
    )


def test_a_step_that_joins_the_one_before_makes_no_pair():
    """A line break and "He buys 4." make a paragraph with the one before: the chosen step would be
    the next one."""
    three = stage(3)
    row = {**row_with_an_error(), "steps": ["He has 3 apples.\n\n", "He buys 5.\n\n", "So 8."]}
    row.update(response="".join(row["steps"]), error_step=2)
    row["steps"][0] = row["steps"][0][:-1]  # as the model wrote it
    args = three.Args(split="blank-lines", opening="")
    texts = ["He buys 4.\n\nSo 7.", "\nHe buys 4.\n\nSo 7."]
    counts = Counter()
    found = [{"text": text, "correct": True} for text in texts]
    pairs = three.make_pairs(args, row, found, {}, counts)
    assert [pair["chosen"] for pair in pairs] == ["\nHe buys 4.\n\n"]
    assert counts == {"pairs": 1, "changes the step before": 1}


def test_chinese_solutions_are_compared_by_characters():
    three, counts = stage(3), Counter()
    texts = ["小明有三个苹果又买了四个所以共有七个苹果", "把三个苹果和四个苹果加起来就得到七个"]
    texts += [texts[0]]
    rows = [*three.distinct([{"response": text} for text in texts], counts)]
    assert [row["response"] for row in rows] == texts[:2]
    assert counts == {"right solutions like another": 1}


def test_equal_wrong_solutions_make_one_pair():
    three, rows = stage(3), []
    for sample, text in enumerate((" 7", " 8", " 8", " 9")):
        row = {"id": "q", "problem": "3 + 4?", "answer": "7", "sample": sample, "prediction": text}
        row |= {"response": three.OPENING + text, "finish_reason": "stop", "correct": text == " 7"}
        rows.append(row)
    pairs, counts = three.pair_up(three.Args(method="dpo", pairs_per_problem=0), rows)
    assert sorted(pair["rejected"] for pair in pairs) == [" 8", " 9"] and counts["pairs"] == 2


def test_a_model_that_ends_after_a_stop_string_has_ended():
    """SCDPO asks for one line at a time; an empty answer is the end, not one more line."""
    three, asked = stage(3), []

    async def continue_solution(row, prefix, seed, n=1, **sampling_params):
        asked.append(prefix)
        text = "The answer is 7.\n" if len(asked) == 1 else ""
        return [{"text": text, "finish_reason": "stop", "tokens": 1}]

    args = three.Args(split="lines", opening="")
    row = {"id": "q1", "sample": 0}
    done = three.heated_completion(args, continue_solution, row, "3 + 4 = 7.\n", 1, 0)
    assert asyncio.run(done)["text"] == "The answer is 7.\n" and len(asked) == 2


def test_a_chosen_step_is_all_of_the_text_up_to_the_next():
    """The model begins with an empty line, which --split lines gives to the step before."""
    three = stage(3)
    steps = ["a = 1\n", "b = 3\n", "The answer is: 9"]
    row = row_with_an_error() | {"steps": steps, "response": "".join(steps)}
    args, text = three.Args(split="lines", opening=""), "\nb = 2\nThe answer is: 4"
    [pair] = three.make_pairs(args, row, [{"text": text, "correct": True}], {}, Counter())
    assert pair["initial_reason_steps"] == "a = 1\n" and pair["chosen"] == "\nb = 2\n"
    assert pair["full_chosen"] == "a = 1\n" + text


def test_a_right_solution_makes_no_step_dpo_pair():
    """02 --include-correct may leave an error_step in one."""
    three, row = stage(3), row_with_an_error() | {"correct": True}
    pairs, counts = asyncio.run(three.rectify(three.Args(), None, None, {}, [row]))
    assert pairs == [] and not counts.total()


def row_with_an_error() -> dict:
    steps = [
        "Let's think step by step.\nStep 1: 1 + 1 = 2.\n",
        "Step 2: 2 * 2 = 5.\n",
        "Step 3: so 5.",
    ]
    return {
        "id": "a",
        "sample": 0,
        "problem": "p",
        "answer": "4",
        "steps": steps,
        "response": "".join(steps),
        "finish_reason": "stop",
        "error_step": 2,
    }


def rectified(rows: list[dict], rollouts: dict, completion: dict | None, n: int = 1):
    """03's pairs and counts of these rows, where the model says `completion`."""
    three = stage(3)

    async def continue_solution(*_, **__):
        assert completion, "something is sampled"
        return [completion]

    async def grader(gold, prediction, problem):
        return gold == prediction

    args = three.Args(n=n)
    return asyncio.run(three.rectify(args, continue_solution, grader, rollouts, rows))


def test_kept_continuations_are_those_of_the_steps_before_the_error():
    kept = {
        str(k): [{"text": text, "finish_reason": "stop", "correct": True}]
        for k, text in enumerate((" zero", " 2 * 2 = 4.\nStep 3: \\boxed{4}", " two"))
    }
    pairs, counts = rectified([row_with_an_error()], {("a", 0): kept}, None)
    assert [pair["chosen"] for pair in pairs] == [" 2 * 2 = 4.\n"]
    assert counts["continuations reused"] == 1


def test_kept_continuations_beyond_n_count():
    """02 samples a prefix until a wave has a right one: the right ones are the last."""
    right = {"text": " 2 * 2 = 4.\nStep 3: \\boxed{4}", "finish_reason": "stop", "correct": True}
    wrong = right | {"text": " 5\nStep 3: \\boxed{5}", "correct": False}
    kept = {"1": [wrong] * 8 + [right]}
    pairs, counts = rectified([row_with_an_error()], {("a", 0): kept}, None, n=8)
    assert [pair["chosen"] for pair in pairs] == [" 2 * 2 = 4.\n"]
    assert counts["continuations reused"] == 9 and counts["wrong"] == 8


def test_what_max_tokens_cut_is_neither_rejected_nor_right():
    said = {"text": " 2 * 2 = 4.\nSo \\boxed{4}.", "tokens": 9}
    cut = row_with_an_error() | {"finish_reason": "length"}
    pairs, counts = rectified([cut], {}, said | {"finish_reason": "stop"})
    assert len(pairs) == 1, "its second step is whole"
    assert pairs[0]["rejected_finished"] is False
    last = {**cut, "error_step": 3}
    pairs, counts = rectified([last], {}, None)
    assert pairs == [] and counts["errors cut short by max_tokens"] == 1
    pairs, counts = rectified([row_with_an_error()], {}, said | {"finish_reason": "length"})
    assert pairs == [] and counts["wrong"] == 1


def test_weak_evidence_is_not_continued():
    """--max-chance; None is of a locator that has no such probability."""
    three, continued = stage(3), []

    async def continue_solution(row, prefix, seed, n, **options):
        continued.append(row["chance"])
        return [{"text": " 2 * 2 = 4.\nSo \\boxed{4}.", "finish_reason": "stop", "tokens": 9}] * n

    async def right(*_):
        return True

    rows = [row_with_an_error() | {"chance": chance} for chance in (0.0, 0.05, 0.06, None)]
    rows[1]["steps"] = [f"{step}\n" if k == 1 else step for k, step in enumerate(rows[1]["steps"])]
    args = three.Args(max_chance=0.05, n=1)
    pairs, counts = asyncio.run(
        three.rectify(args, continue_solution, lambda *_: right(), {}, rows)
    )
    assert continued == [0.0, 0.05, None]
    assert counts["errors over --max-chance"] == 1 and counts["errors tried"] == 3
    assert len(pairs) == 1 and counts["repeats a chosen step"] == 2


def test_max_chance_needs_rollouts(tmp_path, capsys):
    """Else every error of a judge would be kept, and nothing said."""
    three = stage(3)
    for chance, ends in ((0.2, False), (None, True)):
        row = row_with_an_error() | {"chance": chance}
        (tmp_path / "located.jsonl").write_text(json.dumps(row) + "\n")
        args = three.Args(located=tmp_path / "located.jsonl", max_chance=0.05)
        with pytest.raises(SystemExit) if ends else contextlib.nullcontext():
            three.load_input(args)
    assert "no row has the `chance`" in capsys.readouterr().err


def test_pairs_of_one_error():
    three, row = stage(3), row_with_an_error()
    prefix = "Let's think step by step.\nStep 1: 1 + 1 = 2.\nStep 2:"
    assert three.prefix_and_step(three.Args(), row, 2) == (prefix, " 2 * 2 = 5.\n")
    texts = [
        " 2 * 2 = 4.\nThe answer is \\boxed{4}.",
        " 2 * 2 = 4.\nThe answer  is \\boxed{4}.",
        " 2 * 2 =  5.\nStep 3: no, \\boxed{4}.",
        " twice 2 is 4.\nStep 3: \\boxed{4}",
        " wrong",
    ]
    found = [{"text": text, "correct": text != " wrong"} for text in texts]
    count = Counter()
    pairs = three.make_pairs(three.Args(), row, found, {}, count)
    assert [pair["chosen"] for pair in pairs] == [texts[0], " twice 2 is 4.\n"]
    assert count == {
        "pairs": 2,
        "repeats a chosen step": 1,
        "restates the rejected step": 1,
        "wrong": 1,
    }
    for pair in pairs:
        assert pair["full_chosen"].startswith(pair["initial_reason_steps"] + pair["chosen"])
        assert pair["full_rejected"].startswith(pair["initial_reason_steps"] + pair["rejected"])
    one = three.make_pairs(three.Args(max_pairs_per_error=1), row, found, {}, Counter())
    assert one == pairs[:1]
