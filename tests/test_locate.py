"""02: the rule of the rollouts, the judge's parser, votes and faults, scores, kept
rollouts, and the page in a real browser."""

import asyncio
import contextlib
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from unittest import mock

import processbench
import pytest
import torch
from conftest import ROOT, STAGES, TINY, read, run, scripted_server, stage
from transformers import AutoModelForCausalLM

KEY = "not-to-be-written"  # of the judge's server


def test_few_failures_show_a_lost_prefix_where_the_model_is_strong():
    lost_after, by_chance = stage(2).lost_after, stage(2).by_chance
    assert [lost_after(right, 8 - right, 0.05, 100) for right in (8, 6, 4, 2, 1)] == [
        2,
        3,
        6,
        17,
        50,
    ]
    assert lost_after(4, 4, 0.01, 100) > lost_after(4, 4, 0.05, 100) > lost_after(4, 4, 0.2, 100)
    assert lost_after(1, 7, 0.05, 16) == lost_after(8, 0, 0.0, 16) == 16, "the most is kept"
    # the mean of (1 - rate) ** tries over the beta distribution
    for right, wrong in ((3, 1), (1, 3), (0, 5)):

        def log_beta(a, b):
            return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

        mean = math.exp(log_beta(right + 0.5, wrong + 7.5) - log_beta(right + 0.5, wrong + 0.5))
        assert by_chance(7, right, wrong) == pytest.approx(mean) and by_chance(0, right, wrong) == 1


def searched(successes: dict[int, list[int]], n_steps: int, seen: list[int], **options) -> dict:
    """What 02 says where the continuations of k steps with these numbers are right."""

    async def draw(k: int, tried: int, size: int) -> list[bool]:
        return [number in successes.get(k, []) for number in range(tried, tried + size)]

    return asyncio.run(stage(2).search(stage(2).Args(**options), n_steps, draw, seen))


def test_tries_follow_the_rate_of_the_prefix_before():
    every = list(range(100))
    strong = searched({1: every, 2: every}, 4, [8, 9])
    assert strong == {
        "error_step": 3,
        "reason": None,
        "chance": pytest.approx(0.024, abs=0.001),
        "rollout_values": {"2": [2, 2], "3": [0, 2]},
    }
    weak = searched({1: [3], 2: [5]}, 4, [3, 8])  # one success ends the tries of its wave
    assert weak["error_step"] == 3
    assert weak["rollout_values"] == {"2": [1, 8], "3": [0, 14]}
    assert weak["chance"] < 0.05
    # here the most is no evidence, and the row says so
    weaker = searched({1: [3], 2: [15]}, 4, [1, 8])
    assert weaker["error_step"] == 3
    assert weaker["rollout_values"] == {"2": [1, 16], "3": [0, 16]}
    assert weaker["chance"] > 0.2
    assert searched({2: [0], 3: [15]}, 4, [1, 8])["chance"] == 0.0, (
        "that the whole solution is wrong is known"
    )


def test_a_problem_is_given_up():
    found = searched({}, 4, [0, 4])
    assert found["error_step"] is found["chance"] is None
    assert "none of 12 samples and continuations" in found["reason"]
    assert found["rollout_values"] == {"0": [0, 8]}
    assert searched({}, 4, [0, 20])["rollout_values"] == {"0": [0, 0]}
    assert searched({0: [4], 1: range(9)}, 3, [0, 0])["rollout_values"] == {
        "0": [1, 8],
        "1": [2, 2],
        "2": [0, 12],
    }


def test_the_threshold_of_v_is_one_function():
    """An edit of it changes the step that is named, where all continuations are made; V(0) has a
    test of its own."""
    of = {0: [1], 1: range(8), 2: range(3), 3: range(1)}
    with mock.patch.object(stage(2), "is_alive", lambda right, tried: right > 0.3 * tried):
        found = [
            searched(of, 4, [0, 1], rollouts=8, all_rollouts=True, linear=linear)
            for linear in (False, True)
        ]
    assert [one["error_step"] for one in found] == [3, 3]
    assert found[0]["rollout_values"]["0"] == [1, 8]
    assert searched(of, 4, [0, 1], rollouts=8, all_rollouts=True)["error_step"] == 4
    # without all of them the first right one is not the end where the rule asks for two
    with mock.patch.object(stage(2), "is_alive", lambda right, tried: right > 1):
        assert searched({1: range(8), 2: [0, 2], 3: [0]}, 4, [1, 1])["error_step"] == 3


def test_a_fixed_number_of_rollouts():
    found = searched({1: [3], 2: [5]}, 4, [1, 8], alpha=0.0, rollouts=8)
    assert found["error_step"] == 3 and found["rollout_values"] == {"2": [1, 8], "3": [0, 8]}
    whole = searched(
        {0: [2], 1: [3], 2: [5]}, 4, [1, 8], rollouts=8, linear=True, all_rollouts=True
    )
    assert whole["rollout_values"] == {"1": [1, 8], "2": [1, 8], "3": [0, 8]}


def test_an_interrupted_search_ends_with_the_same_rows(tmp_path):
    """The rows of a run that is ended twice are those of a whole one, and those of another --alpha
    are not mixed in."""
    two, rows = stage(2), wrong_samples(tmp_path / "in.jsonl", 24)
    (tmp_path / "in.jsonl").write_text(
        "".join(
            json.dumps(row | {"sample": s, "correct": s == 1 and i % 2 == 0}) + "\n"
            for i, row in enumerate(rows)
            for s in (0, 1)
        )
    )

    def locate(out: str, calls: float = math.inf, **options):
        seeds = set()

        @contextlib.asynccontextmanager
        async def engine(*_):
            async def generate(ids, seed, n=1, **_):
                nonlocal calls
                calls -= 1
                if calls < 0:
                    two.stop("enough")
                assert seed not in seeds, "a wave has the continuations of another"
                seeds.add(seed)
                await asyncio.sleep(0)
                said = [
                    " so \\boxed{0}." if random.Random(f"{seed} {i}").random() < 0.1 else " no."
                    for i in range(n)
                ]
                return [
                    {"text": text, "finish_reason": "stop", "tokens": n, "prompt_tokens": 1}
                    for text in said
                ]

            yield generate

        with mock.patch.object(two, "engine", engine):
            where = {"samples": tmp_path / "in.jsonl", "out": tmp_path / out}
            two.main(two.Args(**where, model=str(TINY / "model"), concurrency=2, **options))

    locate("whole.jsonl")
    for calls in (20, 30):
        with pytest.raises(SystemExit):
            locate("parts.jsonl", calls)
        # ended tasks print a traceback when they are collected, which Python 3.11 must not do while
        # the next run parses its own source: SystemError
        gc.collect()
    with pytest.raises(SystemExit):
        locate("parts.jsonl", alpha=0.2)
    locate("parts.jsonl")

    def keyed(name):
        return {(row["id"], row["sample"]): row for row in read(tmp_path / name)}

    assert keyed("parts.jsonl") == keyed("whole.jsonl")
    assert len(read(tmp_path / "parts.jsonl")) == 36
    assert {bool(row["error_step"]) for row in keyed("whole.jsonl").values()} == {True, False}
    locate("all.jsonl", include_correct=True)
    right = [row for row in read(tmp_path / "all.jsonl") if row["correct"]]
    assert len(right) == 12 and all("the answer is right" in row["reason"] for row in right)


@pytest.mark.parametrize("refuse", [False, True])
def test_a_problem_is_tried_once_for_all_its_wrong_samples(refuse, tmp_path, capsys):
    """It costs --give-up failures, not so many a sample. A refused continuation is no failure."""
    two, [row] = stage(2), wrong_samples(tmp_path / "in.jsonl", 1)
    row["model"] = str(TINY / "model")
    samples = [row | {"sample": s} for s in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    asked, seeds = [], set()

    @contextlib.asynccontextmanager
    async def engine(*_):
        async def generate(ids, seed, n=1, **_):
            asked.append(n)
            seeds.add(seed)
            await asyncio.sleep(0)
            end = "refused" if refuse else "stop"
            said = {"text": " so.", "finish_reason": end, "tokens": n, "prompt_tokens": 1}
            return [said] * n

        yield generate

    files = {name: tmp_path / f"{name}.jsonl" for name in ("out", "keep_rollouts")}
    args = two.Args(
        samples=tmp_path / "in.jsonl", model=str(TINY / "model") + "/", give_up=11, **files
    )
    with mock.patch.object(two, "engine", engine):
        two.main(args)
    rows = read(files["out"])
    assert asked == [2, 2, 4], "3 samples and 8 continuations have failed"
    assert len(seeds) == 3, "a wave repeats the one before"
    assert [row["rollout_values"] for row in rows] == [{"0": [0, 8]}] * 3
    assert sum(row["rollout_tokens"][1] for row in rows) == 8
    assert all(("refused" in row["reason"]) == refuse for row in rows)
    for kept in read(files["keep_rollouts"]):
        assert len(kept["rollouts"]["0"]) == 8
    # the kept continuations are of these steps alone
    other = row["steps"][:-1] + ["Step 4: another.\n"]
    (tmp_path / "in.jsonl").write_text(json.dumps(samples[0] | {"steps": other}) + "\n")
    files["out"].unlink()
    with mock.patch.object(two, "engine", engine), pytest.raises(SystemExit):
        two.main(args)
    assert "keep_rollouts.jsonl holds another 'steps' of q0, sample 0" in capsys.readouterr().err


READABLE = [
    ("Step 1: correct\nStep 2: incorrect", 2),
    ("Analysis: step 2 adds wrongly.\n\nVerdicts:\nStep 1: correct\nStep 2: incorrect", 2),
    ("Verdicts:\nStep 1: correct\nStep 2: correct\nStep 3: correct", 0),
    ("**Verdicts:**\n- **Step 1:** correct\n- **Step 2:** Incorrect.", 2),
    ("| Step 1 | correct |\n| Step 2 | incorrect |", 2),
    ("### Verdicts\n1. correct\n2. neutral", 2),
    ("分析：第二步算错了。\n判断：\n步骤 1：正确\n步骤 2：错误", 2),
    ("第1步：正确\n第2步：不正确", 2),
    ("Step 1: right\nStep 2: wrong\nStep 3: correct", 2),  # it went on after the first error
    (
        "<think>Step 1: incorrect? no.\nVerdicts:\nStep 1: incorrect</think>"
        "Step 1: correct\nStep 2: incorrect",
        2,
    ),
    # the last list
    (
        "Verdicts:\nStep 1: incorrect\n\nI looked again.\n\n"
        "Verdicts:\nStep 1: correct\nStep 2: incorrect",
        2,
    ),
    ("Step 1: incorrect\n\nThis is because 3 + 4 = 7.", 1),
]
UNREADABLE = [
    ("", "no verdict"),
    ("I'm sorry, I cannot help with that.", "no verdict"),
    ("The error is in step 2.", "no verdict"),
    ("Step 1: not correct", "no verdict"),
    ("Step 1: correct? No, incorrect", "no"),
    ("Step 1: partially correct", "no"),
    ("Step 2: incorrect", "on step 2"),
    ("Step 1: correct\nStep 3: incorrect", "on step 3"),
    ("Step 2: correct\nStep 1: incorrect", "on step 2"),
    ("Step 1: correct\nStep 1: incorrect", "on step 1"),
    ("Step 1: correct\nStep 2: correct", "end with step 2 of 3"),
    ("<think>Step 1: incorrect", "no verdict"),
    # in quadratic time these would take minutes
    pytest.param(" " * 200_000, "no verdict", id="blanks"),
    pytest.param("1" + " " * 200_000, "no verdict", id="a number and blanks"),
    pytest.param("\n" * 200_000, "no verdict", id="blank lines"),
    pytest.param("Step 1: " + "_" * 200_000 + " x y", "no verdict", id="underscores"),
    ("Step 1: correct\nStep 2: correct\nStep 3: correct\nStep 4: incorrect", "past the last"),
    ("Step 1: 正确的吗\nStep 2: 错误", "on step 2"),
]


@pytest.mark.parametrize("text, step", READABLE)
def test_readable_judgements(text, step):
    assert stage(2).first_error(text, 3, "error") == step


@pytest.mark.parametrize("text, why", UNREADABLE)
def test_unreadable_judgements(text, why):
    with pytest.raises(ValueError, match=why):
        stage(2).first_error(text, 3, "error")


def test_neutral_is_an_error_or_not():
    text = "Step 1: neutral\nStep 2: incorrect\nStep 3: correct"
    assert stage(2).first_error(text, 3, "error") == 1
    assert stage(2).first_error(text, 3, "correct") == 2
    # where neutral is right, a list that stops at a neutral step says too little
    with pytest.raises(ValueError, match="end with step 1"):
        stage(2).first_error("Step 1: neutral", 3, "correct")


def test_the_judge_sees_problem_truth_and_numbered_steps():
    row = {
        "problem": "1 + 2 * 3?",
        "answer": "7",
        "steps": ["Let's think step by step.\nStep 1: 2 * 3 = 6.\n", "Step 2: 8."],
    }
    text = stage(2).judge_prompt(row, stage(2).Args())
    assert "## Answer\n7\n" in text
    assert "Step 1: 2 * 3 = 6.\nStep 2: 8.\n" in text
    assert "2 numbered steps" in text
    assert "Let's think" not in text and "first step that is not correct;" in text
    text = stage(2).judge_prompt(row | {"solution": "1 + 6 = 7"}, stage(2).Args(neutral="correct"))
    assert "## Reference solution\n1 + 6 = 7\n" in text and "first step that is incorrect;" in text
    assert "It is not known." in stage(2).judge_prompt(row | {"answer": ""}, stage(2).Args())
    assert "## Answer\n0\n" in stage(2).judge_prompt(row | {"answer": 0}, stage(2).Args())


class Judge(BaseHTTPRequestHandler):
    """A chat server whose words come from `server.script(n, body)`: a text, (status, message), or
    the name of a fault."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, text: str, *headers):
        self.send_response(status)
        for name, value in (
            ("content-type", "application/json"),
            ("content-length", str(len(text.encode()))),
            *headers,
        ):
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that has stopped is no fault of it
            self.wfile.write(text.encode())

    def do_GET(self):
        self.reply(200, json.dumps({"data": [{"id": "judge"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.count += 1
            self.server.seen.append(body | {"key": self.headers["authorization"]})
            said = self.server.script(self.server.count, body)
        if isinstance(said, tuple):
            return self.reply(
                said[0],
                json.dumps({"error": {"message": said[1], "type": "x"}}),
                ("retry-after-ms", "3"),
            )
        if said == "drop":
            self.close_connection = True
            return self.connection.close()
        if said == "silence":
            time.sleep(self.server.silence)
            said = "Step 1: incorrect"
        message = said if isinstance(said, dict) else {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
        if said == "no choice":
            whole["choices"] = []
        self.reply(200, json.dumps(whole)[:40] if said == "half" else json.dumps(whole))


@pytest.fixture()
def judge():
    state = {"lock": threading.Lock(), "count": 0, "seen": [], "silence": 4.0}
    with scripted_server(Judge, **state) as server:
        yield server


def wrong_samples(path, count: int = 6):
    """Solutions of four steps, of which step `i % 4 + 1` is wrong, as the problem's text says."""
    rows = []
    for i in range(count):
        steps = [f"Step {k}: {k} + {i} = {k + i + (k == i % 4 + 1)}.\n" for k in range(1, 5)]
        steps[0] = "Let's think step by step.\n" + steps[0]
        rows.append(
            {
                "id": f"q{i}",
                "sample": 0,
                "problem": f"wrong at {i % 4 + 1}",
                "answer": "0",
                "response": "".join(steps),
                "steps": steps,
                "correct": False,
                "finish_reason": "stop",
                "prediction": "9",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.slow
def test_a_judge_in_this_process(tmp_path):
    """vLLM here, without a server; this model's answers cannot be read."""
    wrong_samples(tmp_path / "in.jsonl", 2)
    arguments = ["--samples", tmp_path / "in.jsonl", "--locator", "judge", "--votes", 2]
    arguments += ["--judge-model", TINY / "model", "--retries", 0, "--judge-max-tokens", 40]
    run(2, *arguments, "--out", tmp_path / "out.jsonl")
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert row["judge"]["tokens"][1] > 1 and len(row["judge"]["other_texts"]) == 1


def true_step(body: dict) -> int:
    return int(re.search(r"wrong at (\d)", body["messages"][0]["content"])[1])


def verdicts(step: int) -> str:
    return (
        "Verdicts:\n"
        + "".join(f"Step {k}: correct\n" for k in range(1, step))
        + f"Step {step}: incorrect"
    )


def judged(judge, tmp_path, *more, check: bool = True):
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    with mock.patch.dict(os.environ, JUDGE_API_KEY=KEY):
        return run(
            2,
            "--samples",
            tmp_path / "in.jsonl",
            "--locator",
            "judge",
            "--judge-base-url",
            url,
            "--judge-model",
            "judge",
            "--out",
            tmp_path / "out.jsonl",
            *more,
            check=check,
        )


def test_a_judge_that_knows_max_tokens_by_another_name(judge, tmp_path):
    """OpenAI's reasoning models refuse it in these words; 02 keeps what every vote said."""
    wrong_samples(tmp_path / "in.jsonl", 1)

    def script(n, body):
        if "max_tokens" in body:
            return 400, "'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        return verdicts(1 if n < 6 else 2)

    judge.script = script
    options = ["--votes", 3, "--judge-max-tokens", 77, "--judge-temperature", 0.3]
    judged(judge, tmp_path, *options)
    [row] = read(tmp_path / "out.jsonl")
    said = [row["judge"]["text"], *row["judge"]["other_texts"]]
    assert row["error_step"] == 1
    assert said[0] == verdicts(1) and said.count(verdicts(1)) == 2 and said.count(verdicts(2)) == 1
    asked = [body["max_completion_tokens"] for body in judge.seen if "max_tokens" not in body]
    assert asked == [77, 77, 77]
    assert {body["temperature"] for body in judge.seen} == {0.3}
    wrong_samples(tmp_path / "in.jsonl", 4)
    judged(judge, tmp_path, *options, "--concurrency", 1)
    refused = [body for body in judge.seen if "max_tokens" in body]
    assert len(refused) <= 6, "after the first row of a run the name is known"


def test_judge_votes_agreement_retries_and_cost(judge, tmp_path):
    rows = wrong_samples(tmp_path / "in.jsonl", 5)

    def script(n, body):
        step = true_step(body)
        with_votes = judge.votes.setdefault(body["messages"][0]["content"], [0])
        with_votes[0] += 1
        turn = with_votes[0]
        if "1 + 1 =" in body["messages"][0]["content"]:  # q1: every vote another step
            return verdicts(turn)
        if "1 + 2 =" in body["messages"][0]["content"]:  # q2: never readable
            return "Who knows?"
        # q4: two against one, the first attempt is not readable
        if "1 + 4 =" in body["messages"][0]["content"]:
            return "hm" if turn == 1 else verdicts(step if turn in (2, 3) else 4)
        # all of it taken for thought
        return {"role": "assistant", "content": None, "reasoning_content": verdicts(step)}

    judge.votes, judge.script = {}, script
    done = judged(judge, tmp_path, "--votes", 3, "--retries", 2, "--concurrency", 1)
    found = {row["id"]: row for row in read(tmp_path / "out.jsonl")}
    assert [found[row["id"]]["error_step"] for row in rows] == [1, None, None, 4, 1]
    assert found["q4"]["judge"]["votes"] == {"1": 2, "4": 1}
    assert found["q4"]["judge"]["agreement"] == 0.667
    assert "disagree" in found["q1"]["reason"]
    assert "cannot be read: no verdict" in found["q2"]["reason"]
    assert found["q0"]["judge"]["text"] == verdicts(1) and found["q0"]["locator"] == "judge"
    calls = 3 + 3 + 9 + 3 + 4
    assert judge.count == calls
    assert f"judge prompt tokens {100 * calls}, judge completion tokens {10 * calls}" in done.stdout
    assert judge.seen[0]["key"] == f"Bearer {KEY}"
    assert KEY not in done.stdout + done.stderr
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())
    assert len({body["seed"] for body in judge.seen}) == calls


def test_a_step_needs_more_than_half_of_the_votes(judge, tmp_path):
    """One of two judgements cannot be read."""
    wrong_samples(tmp_path / "in.jsonl", 1)
    judge.script = lambda n, body: verdicts(2) if judge.count % 2 else "Who knows?"
    judged(judge, tmp_path, "--votes", 2, "--retries", 0, "--concurrency", 1)
    [row] = read(tmp_path / "out.jsonl")
    assert row["error_step"] is None and "disagree: 50% for the first" in row["reason"]


def test_a_judgement_that_was_cut_is_not_read(tmp_path):
    two, [row] = stage(2), wrong_samples(tmp_path / "in.jsonl", 1)

    async def ask(*_, **__):
        reply = {"text": verdicts(2), "finish_reason": "length", "tokens": 1, "prompt_tokens": 1}
        return [reply]

    judgement = two.judge_once(ask, row, 0, two.Args(retries=0), Counter())
    step, _, why = asyncio.run(judgement)
    assert step is None and "--judge-max-tokens" in why


def test_a_chosen_step_without_a_readable_judgement_does_not_pass(judge, tmp_path):
    opening = stage(1).OPENING
    pair = {"id": "a", "prompt": "1 + 1?", "answer": "2", "method": "dpo", "chosen": " 2"}
    pair |= {"initial_reason_steps": opening, "full_chosen": opening + " 2"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    judge.script = lambda n, body: "Who knows?"
    arguments = ["--judge-model", "judge", "--retries", 0, "--out", tmp_path / "out.jsonl"]
    arguments += ["--judge-base-url", f"http://127.0.0.1:{judge.server_port}/v1"]
    done = run("check_chosen", tmp_path / "pairs.jsonl", *arguments)
    assert read(tmp_path / "out.jsonl") == [] and "readable judgement 1" in done.stdout
    arguments[arguments.index("--out") + 1] = tmp_path / "pairs.jsonl"
    done = run("check_chosen", tmp_path / "pairs.jsonl", *arguments, check=False)
    assert done.returncode == 2 and "is --pairs, and would be written over" in done.stderr
    assert read(tmp_path / "pairs.jsonl") == [pair]


def test_the_judge_is_not_asked_about_a_diagram_that_is_not_there(judge, tmp_path):
    """As in the paper's code, unless --missing-diagrams; a diagram in Asymptote code can be
    read."""
    judge.script = lambda n, body: verdicts(true_step(body))
    rows = wrong_samples(tmp_path / "samples.jsonl")
    rows[0]["problem"] += " in the diagram?"
    rows[0]["problem"] += " It is easy."  # no Asymptote code, though "asy" stands in it
    rows[1]["problem"] += " in the diagram? [asy] draw((0,0)--(1,1)); [/asy]"
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--samples", tmp_path / "samples.jsonl", "--locator", "judge"]
    arguments += ["--judge-model", "judge"]
    arguments += ["--judge-base-url", f"http://127.0.0.1:{judge.server_port}/v1"]
    done = run(2, *arguments, "--out", tmp_path / "a.jsonl")
    found = {row["id"]: row for row in read(tmp_path / "a.jsonl")}
    assert found["q0"]["error_step"] is None and "--missing-diagrams" in found["q0"]["reason"]
    assert all(found[f"q{i}"]["error_step"] for i in range(1, 6))
    assert "problems with a diagram skipped 1" in done.stdout
    assert judge.count == 5
    assert not any(set(body) & {"top_k", "min_p", "repetition_penalty"} for body in judge.seen)
    run(2, *arguments, "--missing-diagrams", "--out", tmp_path / "b.jsonl")
    assert all(row["error_step"] for row in read(tmp_path / "b.jsonl"))


def test_low_agreement_and_a_judge_that_finds_nothing_make_no_pair(judge, tmp_path):
    wrong_samples(tmp_path / "in.jsonl", 2)
    for votes, said in ((4, {"1": 2, "2": 2}), (5, {"1": 2, "2": 1, "3": 1, "4": 1})):
        judge.count, steps = 0, [int(k) for k, n in said.items() for _ in range(n)]
        judge.script = lambda n, body, steps=steps: verdicts(steps[n - 1])
        judged(judge, tmp_path, "--votes", votes, "--limit", 1, "--concurrency", 1)
        [row] = read(tmp_path / "out.jsonl")
        assert row["error_step"] is None and "disagree" in row["reason"]
        assert row["judge"]["votes"] == said
        (tmp_path / "out.jsonl").unlink()
    judge.script = lambda n, body: "\n".join(f"Step {k}: correct" for k in range(1, 5))
    judged(judge, tmp_path)
    assert {row["reason"] for row in read(tmp_path / "out.jsonl")} == {
        "no error found by the judge"
    }


@pytest.mark.slow
def test_hundreds_of_rows_with_faults_and_kills(judge, tmp_path):
    """A fifth of the answers are faults of eight kinds; two kill -9; every row is there once,
    with its true step."""
    rows, draw = wrong_samples(tmp_path / "in.jsonl", 400), random.Random(0)
    faults = [
        (429, "slow down"),
        (500, "oops"),
        "drop",
        "silence",
        "half",
        "no choice",
        "I'm sorry, I can't help.",
        "",
    ]
    judge.script = lambda n, body: (
        draw.choice(faults) if draw.random() < 0.2 else verdicts(true_step(body))
    )
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    command = [sys.executable, f"{STAGES[2]}.py", "--samples", str(tmp_path / "in.jsonl")]
    command += ["--out", str(tmp_path / "out.jsonl"), "--locator", "judge"]
    command += ["--judge-model", "judge", "--judge-base-url", url, "--judge-timeout", "2"]
    command += ["--retries", "9"]
    for _ in range(2):
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        before = judge.count
        while judge.count < before + 100 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with open(tmp_path / "out.jsonl", "ab") as file:
            file.write(b'{"id": "q1", "torn')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {row["id"]: row["error_step"] for row in read(tmp_path / "out.jsonl")}
    assert len(read(tmp_path / "out.jsonl")) == 400
    assert found == {row["id"]: i % 4 + 1 for i, row in enumerate(rows)}


def test_the_order_of_the_samples_does_not_count(tmp_path):
    """01 writes rows as they get ready; which ones --limit and --max-per-problem take must not hang
    on that."""
    row = {"problem": "p", "answer": "1", "response": "r", "steps": ["r"], "finish_reason": "stop"}
    row["prediction"] = "1"
    rows = [
        row | {"id": f"q{i}", "sample": j, "correct": (i + j) % 3 == 0}
        for i in range(12)
        for j in range(4)
    ]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        two = stage(2).load_samples(
            stage(2).Args(samples=tmp_path / "in.jsonl", max_per_problem=1, limit=5)
        )[0]
        three = stage(3).load_input(
            stage(3).Args(method="dpo", samples=tmp_path / "in.jsonl", limit=7)
        )
        found.append((two, three, list(three)))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 5
    assert {len(rows) for rows in found[0][1].values()} == {4} and len(found[0][1]) == 7


def test_samples_of_another_model_do_not_estimate_v0(tmp_path):
    """A labelled wrong solution of somebody else is located, but it is no failure of --model."""
    (tmp_path / "labels.jsonl").write_text(
        json.dumps({"id": "a", "generator": "m", "problem": "p", "steps": ["x", "y"], "label": 0})
    )
    own = {"id": "b", "problem": "p", "response": "r", "steps": ["r"], "finish_reason": "stop"}
    own |= {"answer": "1", "model": "m"}
    rows = [row | {"answer": "1"} for row in processbench.sample_rows(tmp_path / "labels.jsonl")]
    rows += [own | {"sample": number, "correct": number == 0} for number in range(3)]
    rows += [own | {"sample": 3, "correct": True, "model": "other"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"samples": tmp_path / "in.jsonl", "split": "blank-lines", "opening": ""}
    load = stage(2).load_samples
    todo, counts, _ = load(stage(2).Args(model="m", max_per_problem=1, **where))
    assert [row["id"] for row in todo] == ["a", "b"] and counts == {"a": [0, 0], "b": [1, 3]}
    todo, counts, _ = load(stage(2).Args(model="other", max_per_problem=1, **where))
    assert len(todo) == 2 and counts == {"a": [0, 0], "b": [1, 1]}


def test_a_row_of_an_older_sample_is_not_kept(tmp_path, capsys):
    """Another gold answer, another grade or other scores than those that made a row. Each is said,
    and nothing is overwritten."""
    two, out = stage(2), tmp_path / "out.jsonl"
    rows = wrong_samples(tmp_path / "in.jsonl", 2)
    rows = [row | {"step_scores": [0.9] * len(row["steps"])} for row in rows]
    changes = {"answer": "8", "correct": True, "step_scores": [0.1] * len(rows[0]["steps"])}

    def locate(first: dict):
        lines = [json.dumps(row) + "\n" for row in (first, rows[1])]
        (tmp_path / "in.jsonl").write_text("".join(lines))
        two.main(two.Args(locator="scores", samples=tmp_path / "in.jsonl", out=out))

    locate(rows[0])
    before = out.read_bytes()
    for name, value in changes.items():
        with pytest.raises(SystemExit):
            locate(rows[0] | {name: value})
        assert f"holds another {name!r} of q0, sample 0, than" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_words_before_step_1_are_not_shared(tmp_path):
    """Two wrong samples of a problem without the forced opening may begin in different ways; V(0)
    of each continues its own."""
    two, asked = stage(2), []
    [row] = wrong_samples(tmp_path / "in.jsonl", 1)
    args = two.Args(give_up=2)

    async def continue_from(row, prefix, seed, n, **sampling_params):
        asked.append(prefix)
        return [{"text": " so.", "finish_reason": "length", "tokens": 1, "prompt_tokens": 1}] * n

    async def locate_two():
        root = two.Root([0, 0])
        for sample, words in enumerate(("Well.\n", "Now.\n")):
            steps = [words + "Step 1: 1 = 1.\n", "Step 2: 2 = 3."]
            one = row | {"sample": sample, "steps": steps, "response": "".join(steps)}
            await two.by_rollouts(args, continue_from, None, root, one, Counter())

    asyncio.run(locate_two())
    assert asked == ["Well.\nStep 1:", "Now.\nStep 1:"]


@pytest.mark.slow
def test_the_tokens_of_the_bare_problem_stand_in_one_row(tmp_path, bundled):
    """The first row of the problem begins with words of its own: the first with the forced opening
    has them."""
    [row] = wrong_samples(tmp_path / "in.jsonl", 1)
    rows = []
    forced = "Let's think step by step.\n"
    for sample, words in enumerate(("Well.\n", forced, forced)):
        steps = [words + "Step 1: 1 = 1.\n", "Step 2: 2 = 3."]
        rows.append(row | {"sample": sample, "steps": steps, "response": "".join(steps)})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--samples", tmp_path / "in.jsonl", *bundled, "--give-up", 2, "--max-tokens", 9]
    run(2, *arguments, "--out", tmp_path / "out.jsonl")
    spent = json.loads((tmp_path / "out.jsonl.meta.json").read_text())["summary"]
    tokens = {row["sample"]: row["rollout_tokens"][1] for row in read(tmp_path / "out.jsonl")}
    assert tokens[0] > 0 and tokens[1] > 0 and tokens[2] == 0
    assert sum(tokens.values()) == spent["rollout completion tokens"]


@pytest.mark.slow
def test_kept_rollouts_are_used_by_03(bundled, tmp_path):
    common = [*bundled, "--max-tokens", 300]
    options = ["--data", TINY / "train.jsonl", "--limit", 40, "--out", tmp_path / "samples.jsonl"]
    options += [*common]
    run(1, *options)
    located = ["--samples", tmp_path / "samples.jsonl", "--out", tmp_path / "located.jsonl"]
    located += ["--rollouts", 4]
    run(2, *located, "--keep-rollouts", tmp_path / "rollouts.jsonl", *common)
    rows = {(row["id"], row["sample"]): row for row in read(tmp_path / "located.jsonl")}
    kept = {
        (row["id"], row["sample"]): row["rollouts"] for row in read(tmp_path / "rollouts.jsonl")
    }
    assert set(rows) == set(kept)
    spent = json.loads((tmp_path / "located.jsonl.meta.json").read_text())["summary"]
    for place, name in enumerate(("prompt", "completion")):
        tokens = sum(row["rollout_tokens"][place] for row in rows.values())
        assert tokens == spent[f"rollout {name} tokens"] > 0
    for key, row in rows.items():
        counts = {
            k: [sum(c["correct"] for c in found), len(found)] for k, found in kept[key].items()
        }
        assert counts == row["rollout_values"]
    arguments = ["--located", tmp_path / "located.jsonl", "--n", 4, *common]
    run(3, *arguments, "--out", tmp_path / "fresh.jsonl")
    done = run(
        3, *arguments, "--out", tmp_path / "pairs.jsonl", "--rollouts", tmp_path / "rollouts.jsonl"
    )
    reused = int(re.search(r"continuations reused (\d+)", done.stdout)[1])
    metas = [
        json.loads((tmp_path / f"{name}.jsonl.meta.json").read_text())
        for name in ("fresh", "pairs")
    ]
    assert reused and metas[1]["summary"]["tokens"] < metas[0]["summary"]["tokens"]
    for pair in read(tmp_path / "pairs.jsonl"):
        assert pair["full_chosen"].startswith(pair["initial_reason_steps"] + pair["chosen"])
        assert pair["full_chosen"].endswith(f"{{{pair['answer']}}}.")
    other = ["--out", tmp_path / "x.jsonl", "--rollouts", tmp_path / "rollouts.jsonl"]
    other += ["--top-p", 0.9]
    done = run(3, *arguments, *other, check=False)
    assert done.returncode == 2 and "was made with top_p = 0.95" in done.stderr


def test_scores_follow_their_formulas(tmp_path, capsys):
    import locator_scores as locate

    result = locate.print_scores([1, 2, 3, 4, 0, 0, 0, 0], [1, 3, 1, None, 0, 0, 2, None], "x")
    out = capsys.readouterr().out
    assert result["wrong"] == 0.25
    assert result["right"] == 0.5
    assert result["F1"] == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert result["located"] == pytest.approx(1 / 3)
    for line in (
        "exact                      1  25.0%",
        "1 late                     1",
        "2 or more early            1",
    ):
        assert line in out
    # Cohen 1960, by hand: agreement 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    a, b = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 2, 1, 1, 2, 2, 2]
    assert locate.kappa(a, b) == pytest.approx((0.7 - 0.5) / 0.5)
    assert locate.kappa([1, 1], [1, 1]) == 1.0


def processbench_rows(path):
    """Rows in ProcessBench's own form: steps without labels, 0-based error, -1 for none."""
    rows = [
        {
            "id": f"gsm8k-{i}",
            "generator": "Qwen2-7B-Instruct",
            "problem": f"wrong at {label + 1}",
            "label": label,
            "steps": ["First, 2 + 2 = 4.", "Then 4 + 1 = 6.", "So \\boxed{6}."],
            "final_answer_correct": label < 0,
        }
        for i, label in enumerate([0, 1, 2, -1, -1])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_processbench_files_and_comparison(judge, tmp_path):
    processbench_rows(tmp_path / "labels.jsonl")
    all_right = "\n".join(f"Step {k}: correct" for k in (1, 2, 3))
    judge.script = lambda n, body: (
        verdicts(min(2, true_step(body))) if true_step(body) else all_right
    )
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    files = ["--data-dir", tmp_path, "--files", "labels", "--out"]
    by_judge = ["--", "--locator", "judge", "--judge-base-url", url, "--judge-model", "judge"]
    done = run("processbench", *files, tmp_path / "a", *by_judge)
    assert "| judge | labels | 5 | 66.7% | 100.0% | 80.0% (" in done.stdout
    a, b = (tmp_path / name / "labels.located.jsonl" for name in "ab")
    done = run("locator_scores", a)
    for text in ("5 solutions, 3 wrong, 2 right", "F1 80.0%", "exact on wrong       66.7%"):
        assert text in done.stdout
    asked = judge.seen[0]["messages"][0]["content"]
    assert "## Answer\nIt is not known.\n" in asked
    assert "Step 1: First, 2 + 2 = 4.\nStep 2: Then 4 + 1 = 6.\nStep 3: So" in asked
    judge.script = lambda n, body: verdicts(true_step(body)) if true_step(body) else all_right
    run("processbench", *files, tmp_path / "b", *by_judge)
    done = run("locator_scores", b, "--truth", a)
    assert "on 5 both say something; agreement 80.0%, Cohen's kappa 0.722" in done.stdout
    done = run("processbench", *files, tmp_path / "c", "--", "--locator", "rollout", check=False)
    assert done.returncode == 2 and "no 'answer'" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "labels.jsonl").write_text('{"problem": "x", "steps": ["a"], "label": 3}\n')
    done = run("processbench", *files, tmp_path / "d", *by_judge, check=False)
    assert done.returncode == 2 and "row 1" in done.stderr and "label" in done.stderr


def test_labels_of_rows_that_say_nothing_else(tmp_path):
    """true_errors.py gives a right solution no reason; a person who was not sure gives one, and no
    label."""
    row = {"problem": "p", "steps": ["a", "b"]}
    rows = [
        {"error_step": 2},
        {"error_step": None},
        {"error_step": None, "reason": "unsure"},
        {"label": -1},
        {"label": 1},
    ]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row | more) + "\n" for more in rows))
    assert [row["label"] for row in processbench.sample_rows(tmp_path / "l.jsonl")] == [
        1,
        -1,
        -1,
        1,
    ]


def test_sample_rows_are_those_that_02_splits(tmp_path):
    """Paragraphs with blank lines, labels or leading space; a click on a row of 01 keeps its
    steps."""
    row = {
        "id": "a",
        "problem": "p",
        "steps": ["Step 1: x\n\n y ", "\n z", "Step 3", " "],
        "label": 1,
        "answer": 0,
    }
    (tmp_path / "l.jsonl").write_text(json.dumps(row) + "\n")
    rows = processbench.sample_rows(tmp_path / "l.jsonl")
    assert rows[0]["steps"] == ["Step 1: x\n y\n\n", "z\n\n", "Step 3\n\n", "(blank)\n\n"]
    assert rows[0]["answer"] == "0"
    assert (
        stage(2).split_steps(rows[0]["response"], processbench.split_of(rows)) == rows[0]["steps"]
    )
    (tmp_path / "l.jsonl").write_text(
        json.dumps(row | {"steps": ["a", "b"], "response": "a\n\nb"}) + "\n"
    )
    [row] = processbench.sample_rows(tmp_path / "l.jsonl")
    assert row["steps"] == ["a\n\n", "b\n\n"] and row["response"] == "a\n\nb\n\n"
    clicked = wrong_samples(tmp_path / "in.jsonl", 2)
    (tmp_path / "l.jsonl").write_text(
        "".join(json.dumps(row | {"error_step": 2, "reason": None}) + "\n" for row in clicked)
    )
    rows = processbench.sample_rows(tmp_path / "l.jsonl")
    assert [row["steps"] for row in rows] == [row["steps"] for row in clicked]
    assert processbench.split_of(rows) == "labels"


def test_a_page_does_not_write_over_a_file_that_is_not_its_own(tmp_path):
    wrong_samples(tmp_path / "in.jsonl", 2)
    (tmp_path / "located.jsonl").write_text("{}\n")
    options = ["--samples", tmp_path / "in.jsonl", "--out", tmp_path / "located.jsonl"]
    done = run("annotate", *options, check=False)
    assert done.returncode == 2
    assert "--annotator" in done.stderr
    assert (tmp_path / "located.jsonl").read_text() == "{}\n"


def test_clicks_of_a_run_with_more_rows_stay(tmp_path):
    """OUT is written at each click, by a run that may show fewer rows."""
    from annotate import Verdicts

    rows, out = wrong_samples(tmp_path / "in.jsonl", 4), tmp_path / "located.jsonl"
    rows[2]["problem"] += "\u2028 and so on"
    for _ in range(2):  # a page that was opened and closed
        Verdicts(rows, out, "ann").clicks.close()
    verdicts = Verdicts(rows, out, "ann")
    for place, what in enumerate([1, "none", 2]):
        verdicts.click(what, place)
    verdicts.clicks.close()
    verdicts = Verdicts(rows[:2], out, "ann")
    verdicts.click(2, 0)
    verdicts.clicks.close()
    said = {row["id"]: row["error_step"] for row in read(out)}
    assert said == {"q0": 2, "q1": None, "q2": 2}
    out.write_text("")  # a kill came between the click and OUT
    Verdicts(rows, out, "ann").clicks.close()
    assert said == {row["id"]: row["error_step"] for row in read(out)}


def test_money_is_not_taken_for_a_formula():
    from annotate import math_safe as safe

    assert safe("He pays $5 - $3 = $2.") == "He pays &#36;5 - &#36;3 = &#36;2."
    assert safe("So $x = 5$, since $2x=10$.") == "So \\(x = 5\\), since \\(2x=10\\)."
    assert safe("The answer is \\boxed{7}.") == "The answer is \\(\\boxed{7}\\)."
    assert safe("$\\boxed{7}$") == "\\(\\boxed{7}\\)"
    assert safe("It costs $3 and $x$ is 4") == "It costs &#36;3 and \\(x\\) is 4"
    assert safe("**So** 5*3*2 < $a*b$") == "**So** 5&#42;3&#42;2 &#60; \\(a*b\\)"


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@contextmanager
def page_of(playwright, command: list, ready: str, kill: bool = False):
    """A script's page in a browser, once the element `ready` is there; nothing may be fetched from
    elsewhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # a background job's children ignore Ctrl-C
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--port", str(port)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    )
    assert any("open http://127.0.0.1" in line for line in process.stderr)
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page, fetched = browser.new_page(), []
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(f"http://127.0.0.1:{port}")
    page.wait_for_selector(ready)
    yield page
    assert all(url.startswith((f"http://127.0.0.1:{port}", "data:", "blob:")) for url in fetched)
    browser.close()
    process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
    assert process.wait(30) == (-9 if kill else 0)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; Debian: apt install chromium")
def test_the_page_in_a_browser(tmp_path):
    """Keys, clicks, back, skip and unsure; a kill in between loses nothing; nothing is fetched from
    elsewhere."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    rows = wrong_samples(tmp_path / "in.jsonl", 5)
    rows[0]["problem"] = "Solve $\\sqrt{2x+1}=5$ for $x$."
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    command = ["analysis/annotate.py", "--samples", tmp_path / "in.jsonl", "--annotator", "ann"]
    command += ["--out", tmp_path / "located.jsonl"]
    with sync_api.sync_playwright() as playwright:

        def shows(page, i):
            return page.wait_for_selector(f"text=Problem q{i}")

        with page_of(playwright, command, "#step-1", kill=True) as page:
            shows(page, 0)
            page.wait_for_selector(".katex")  # LaTeX is rendered
            page.keyboard.press("2")
            shows(page, 1)
            page.click("#step-4")
            shows(page, 2)
            page.keyboard.press("b")
            shows(page, 1)
            page.keyboard.press("3")  # another verdict than before
            shows(page, 2)
            page.keyboard.press("u")
            shows(page, 3)
        with page_of(playwright, command, "#step-1") as page:  # goes on where it stopped
            shows(page, 3)
            assert "3 of 5" in page.inner_text("#progress")
            page.keyboard.press("s")
            shows(page, 4)
            page.click("#none")
            shows(page, 3)  # the skipped one comes again
    found = {
        row["id"]: (row["error_step"], row["reason"], row["annotator"])
        for row in read(tmp_path / "located.ann.jsonl")
    }
    assert found == {
        "q0": (2, None, "ann"),
        "q1": (3, None, "ann"),
        "q2": (None, "unsure", "ann"),
        "q4": (None, "no error found by hand", "ann"),
    }


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; Debian: apt install chromium")
def test_the_demo_in_a_browser(tmp_path):
    """The bundled model beside a disturbed copy: steps, the marked answer, and rewards of the
    tokens."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    tuned = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    for parameter in tuned.parameters():
        parameter.data += 0.002 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    tuned.save_pretrained(tmp_path / "tuned")
    row = read(TINY / "test.jsonl")[0]
    command = ["analysis/demo.py", "--models", TINY / "model", tmp_path / "tuned"]
    command += ["--examples", TINY / "test.jsonl"]
    with (
        sync_api.sync_playwright() as playwright,
        page_of(playwright, command, "#problem textarea") as page,
    ):
        page.click("#rewards")
        page.wait_for_selector("text=Nothing is solved yet.")
        page.fill("#problem textarea", row["problem"])
        page.fill("#gold textarea", row["answer"])
        page.click("#solve")
        page.wait_for_selector("#base .answer")
        page.wait_for_selector("#tuned .answer")
        shown, marked = page.inner_text("#base"), page.inner_text("#base .answer")
        assert "Step 2:" in shown and f"\\boxed{{{marked.split()[0]}}}" in shown
        assert marked.split()[1] == ("right" if marked.split()[0] == row["answer"] else "wrong")
        page.click("#rewards")
        page.wait_for_selector("#maps span")
        titles = page.locator("#maps span").evaluate_all("all => all.map(x => x.title)")
        rewards = [float(title.split(",")[0]) for title in titles]
        assert len(rewards) > 20 and min(rewards) < 0 < max(rewards)
