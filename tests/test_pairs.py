"""03_rectify.py: pairs of SCDPO and DPO, what is garbled, another rectifier, the judge's filter,
training on a mix."""

import asyncio
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, TINY, read, run, run_killed, stage
from test_locate import judge, verdicts  # noqa: F401  the scripted judge

OPENING = "Let's think step by step.\nStep 1:"
SHORT = ["--max-tokens", "300"]


def solution(
    identity: str, sample: int, text: str, correct: bool, finish_reason: str = "stop"
) -> dict:
    response = OPENING + text
    return {
        "id": identity,
        "sample": sample,
        "problem": f"problem {identity}",
        "answer": "7",
        "response": response,
        "steps": stage(1).split_steps(response),
        "correct": correct,
        "finish_reason": finish_reason,
        "prediction": stage(1).extract_answer(response),
        "dataset": "d",
    }


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


RIGHT = [
    " 3 + 4 = 7.\nThe answer is \\boxed{7}.",
    " We add three and four, which makes seven.\nThe answer is \\boxed{7}.",
    " 3 + 4 = 7.\nThe answer is  \\boxed{7}.",
    " 3 + 4 = 8, an error, so 7.\nThe answer is \\boxed{7}.",
]
WRONG = [" 3 + 4 = 8.\nThe answer is \\boxed{8}.", " 3 * 4 = 12.\nThe answer is \\boxed{12}."]


def test_dpo_pairs_use_every_solution_once_before_any_twice(tmp_path):
    rows = [solution("a", i, text, True) for i, text in enumerate(RIGHT)]
    rows += [solution("a", 4 + i, text, False) for i, text in enumerate(WRONG)]
    no_answer = solution("a", 6, " and so on", False)
    unfinished = solution("a", 7, " 3 + 4 =", False, "length")
    free = solution("a", 8, "", True) | {"prediction": "7", "response": "So \\boxed{7}."}
    rows += [no_answer, unfinished, free | {"steps": [free["response"]]}]
    rows += [solution("b", 0, RIGHT[0], True), solution("c", 0, WRONG[0], False)]
    write(tmp_path / "s.jsonl", rows)
    for most, expected in ((1, 1), (2, 2), (0, 4)):
        out = tmp_path / f"{most}.jsonl"
        options = ["--method", "dpo", "--samples", tmp_path / "s.jsonl"]
        options += ["--pairs-per-problem", most, "--out", out]
        done = run(3, *options)
        pairs = read(out)
        assert len(pairs) == expected
        assert (
            "right solutions like another 1, right solutions with second thoughts 1" in done.stdout
        )
        for pair in pairs:
            assert pair["initial_reason_steps"] == OPENING and pair["method"] == "dpo"
            assert OPENING + pair["chosen"] == pair["full_chosen"]
            assert OPENING + pair["rejected"] == pair["full_rejected"]
            assert pair["chosen"] in RIGHT[:2] and pair["rejected"] in WRONG
    assert (
        len({pair["chosen"] for pair in read(tmp_path / "2.jsonl")})
        == 2
        == len({p["rejected"] for p in read(tmp_path / "2.jsonl")})
    )
    before = (tmp_path / "0.jsonl").read_bytes()
    options = ["--method", "dpo", "--samples", tmp_path / "s.jsonl", "--pairs-per-problem", 0]
    options += ["--out", tmp_path / "0.jsonl"]
    run(3, *options)
    assert (tmp_path / "0.jsonl").read_bytes() == before


def test_what_asks_no_policy_passes_its_prompt_on(judge, tmp_path):  # noqa: F811
    """A judge, scores, pairs of whole solutions, consensus.py and check_chosen.py keep what 01's
    meta file says, so that 03 and 04 can compare it; 03 carries fields that it does not know."""
    rows = [
        solution("a", i, text, i == 0) | {"level": 3} for i, text in enumerate(RIGHT[:1] + WRONG)
    ]
    for row in rows:
        row["step_scores"] = [1.0 - row["sample"]] * len(row["steps"])
    samples, located, judged, agreed, dpo, checked = (
        tmp_path / f"{name}.jsonl"
        for name in ("samples", "located", "judged", "agreed", "dpo", "checked")
    )
    judge.script = lambda n, body: verdicts(1)
    url = f"http://127.0.0.1:{judge.server_port}/v1"
    asked = ["--judge-model", "judge", "--judge-base-url", url]
    write(samples, rows)
    made = {"prompt": "### Instruction", "opening": OPENING, "split": "labels"}
    Path(f"{samples}.meta.json").write_text(json.dumps({"settings": made}))
    run(2, "--samples", samples, "--locator", "scores", "--out", located)
    run(2, "--samples", samples, "--locator", "judge", *asked, "--out", judged)
    run("consensus", located, judged, "--out", agreed)
    run(3, "--method", "dpo", "--samples", samples, "--pairs-per-problem", 0, "--out", dpo)
    judge.script = lambda n, body: "Step 1: correct"
    run("check_chosen", dpo, *asked, "--out", checked)
    metas = {
        path: json.loads(Path(f"{path}.meta.json").read_text()) for path in (located, judged, dpo)
    }
    assert all(meta["passed_on"] == made for meta in metas.values())
    digest = hashlib.sha256(samples.read_bytes()).hexdigest()[:16]
    assert all(meta["inputs"] == {str(samples): digest} for meta in metas.values())
    assert [pair["level"] for pair in read(dpo)] == [3, 3]
    model = ["--model", TINY / "model", "--out", tmp_path / "x.jsonl"]
    for number, option, path in (
        (3, "--located", located),
        (3, "--located", agreed),
        (4, "--data", dpo),
        (4, "--data", checked),
    ):
        done = run(number, option, path, *model, check=False)
        assert done.returncode == 2 and f"{path} was made with prompt = ..." in done.stderr
    # a prompt that was edited does not keep the judge from more rows
    made["prompt"] = "### Question"
    Path(f"{samples}.meta.json").write_text(json.dumps({"settings": made}))
    before = judge.count
    run(2, "--samples", samples, "--locator", "judge", *asked, "--out", judged)
    assert (
        judge.count == before
        and json.loads(Path(f"{judged}.meta.json").read_text())["passed_on"] == made
    )


GARBLED = [
    ("Step 2: 3 + 4 = 8.\nThe answer is \\boxed{8}.", "stop", ""),
    ("3 + 4", "length", "not finished"),
    ("we add one and two and three and four. " * 3, "stop", "repeats itself"),
    ("x" * 30 + "ґ" * 2, "stop", "odd characters"),
    ("x" * 30 + "é" * 2, "stop", ""),
    ("x" * 30 + "算" * 2, "stop", "odd characters"),
]


@pytest.mark.parametrize("text, finish_reason, why", GARBLED)
def test_garbled(text, finish_reason, why):
    assert stage(3).garbled(text, finish_reason, "café") == why
    assert stage(3).garbled("x" * 30 + "算", "stop", "三加四") == ""
    assert stage(3).garbled("三加四等于八所以答案是八不对再算一次。" * 3, "stop", "三加四") == (
        "repeats itself"
    ), "Chinese has no spaces"


def test_bad_combinations_are_refused(tmp_path):
    write(tmp_path / "s.jsonl", [solution("a", 0, RIGHT[0], True)])
    more = ["--method", "dpo", "--rectifier", "x/y"]
    done = run(
        3, "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl", *more, check=False
    )
    assert done.returncode == 2 and "--rectifier" in done.stderr and "Traceback" not in done.stderr
    write(tmp_path / "s.jsonl", [solution("a", 0, WRONG[0], False)])
    scdpo = ["--method", "scdpo", "--samples", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl"]
    done = run(3, *scdpo, check=False)
    assert done.returncode == 2 and "none of its 1 solutions is right" in done.stderr
    done = run(3, *scdpo, "--first-k", -1, check=False)
    assert done.returncode == 2 and "--first-k" in done.stderr and "at least 0" in done.stderr
    done = run(3, "--pairs-per-problem", 1, check=False)
    assert done.returncode == 2
    assert "--pairs-per-problem has no effect with --method step-dpo" in done.stderr


# -------------------------------------------------------------------------------------------------
# with the real server


@pytest.fixture(scope="module")
def samples(bundled, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    run(1, "--data", TINY / "train.jsonl", "--limit", 40, "--n", 4, "--out", out, *SHORT, *bundled)
    return out


@pytest.mark.slow
def test_scdpo_pairs_survive_kills_and_follow_their_form(samples, server, tmp_path):
    """kill -9: the pairs of an uninterrupted run. Each goes wrong behind k right
    steps, and ends parsable."""
    arguments = ["--method", "scdpo", "--samples", samples, *SHORT, *server]
    done = run(3, *arguments, "--out", tmp_path / "whole.jsonl")
    cut = [*arguments, "--out", tmp_path / "cut.jsonl"]
    run_killed(3, *cut, "--concurrency", 4, journal=tmp_path / "cut.tries.jsonl", kills=1, seed=3)
    run(3, *arguments, "--out", tmp_path / "cut.jsonl")
    pairs = read(tmp_path / "whole.jsonl")
    assert read(tmp_path / "cut.jsonl") == pairs and len(pairs) > 5 and "yield" in done.stdout
    solutions = {(row["id"], row["sample"]): row for row in read(samples)}
    grader = stage(1).Grader()
    for pair in pairs:
        row, k = solutions[pair["id"], pair["sample"]], pair["error_step"] - 1
        assert row["correct"]
        assert 1 <= k < len(row["steps"])
        assert pair["full_chosen"] == row["response"]
        assert pair["initial_reason_steps"] == "".join(row["steps"][:k]) + f"Step {k + 1}:"
        assert pair["initial_reason_steps"] + pair["chosen"] == pair["full_chosen"]
        assert pair["initial_reason_steps"] + pair["rejected"] == pair["full_rejected"]
        answer = stage(1).extract_answer(pair["full_rejected"])
        assert answer is not None and not asyncio.run(grader(pair["answer"], answer))
    grader.close()
    assert len({pair["error_step"] for pair in pairs}) > 1, "k is drawn"
    theirs = ["--every-step", "--first-k", 0, "--tries", 1, "--solutions-per-problem", 1]
    theirs += ["--pairs-per-problem", 2]
    run(3, *arguments, *theirs, "--out", tmp_path / "every.jsonl")
    first = {}
    for row in sorted(read(samples), key=lambda row: row["sample"]):
        first.setdefault(row["id"], row) if row["correct"] and row[
            "finish_reason"
        ] == "stop" else None
    summary = json.loads((tmp_path / "every.jsonl.meta.json").read_text())["summary"]
    steps = sum(len(row["steps"]) for row in first.values())  # from the opening on
    assert summary["steps tried"] == summary["attempts"] == steps > len(first)
    kept = Counter(pair["id"] for pair in read(tmp_path / "every.jsonl"))
    assert sum(kept.values()) == summary["pairs"] > 5
    assert max(kept.values()) == 2
    assert summary["over --pairs-per-problem"] > 0


@pytest.mark.slow
def test_heat_rises_step_by_step(samples, server, tmp_path, monkeypatch):
    """The requests that go to the real server, as they are sent: 1.1, 1.15 ... from the drawn step
    on, each behind the last."""
    from transformers import AutoTokenizer

    three, seen, tokenizer = stage(3), [], AutoTokenizer.from_pretrained(TINY / "model")
    real = three.complete

    async def recorded(client, model, ids, seed, n=1, **more):
        found = await real(client, model, ids, seed, n, **more)
        content = tokenizer.decode(ids).split("<|im_start|>assistant\n")[1]
        seen.append((content, more["temperature"], more["stop"][0], found[0]["text"]))
        return found

    monkeypatch.setattr(three, "complete", recorded)
    rows = [row for row in read(samples) if row["correct"] and len(row["steps"]) > 4][:3]
    write(tmp_path / "s.jsonl", rows)
    three.main(
        three.Args(
            method="scdpo",
            samples=tmp_path / "s.jsonl",
            out=tmp_path / "p.jsonl",
            base_url=server[1],
            model=server[3],
            max_tokens=300,
            tries=2,
            heat=(1.1, 0.2, 1.4),
        )
    )
    heats = Counter(round(temperature, 3) for _, temperature, _, _ in seen)
    assert set(heats) <= {1.1, 1.3, 1.4} and heats[1.1] >= heats[1.3] >= 1
    for content, temperature, label, text in seen:
        if text.endswith(label):  # the next request goes on behind it, hotter
            hotter = min(1.4, round(temperature + 0.2, 3))
            assert (content + text, hotter) in [(c, round(t, 3)) for c, t, _, _ in seen]


@pytest.mark.slow
def test_rectifier_and_judge(samples, bundled, judge, tmp_path):  # noqa: F811
    """Chosen steps by another model under its name; then the judge drops every pair whose problem
    it finds wrong."""
    options = ["--samples", samples, "--rollouts", 4, "--limit", 30, "--out", tmp_path / "l.jsonl"]
    options += [*SHORT, *bundled]
    run(2, *options)
    arguments = ["--located", tmp_path / "l.jsonl", "--n", 4, *SHORT]
    # another model has another template
    template = (TINY / "model" / "chat_template.jinja").read_text()
    (tmp_path / "other.jinja").write_text("{{ 'Reason.\n' }}" + template)
    other = ["--rectifier", bundled[1], "--chat-template", tmp_path / "other.jinja"]
    run(3, *arguments, *other, "--out", tmp_path / "p.jsonl")
    pairs = read(tmp_path / "p.jsonl")
    assert pairs and all(pair["rectifier"] == bundled[1] for pair in pairs)
    dropped = {pair["id"] for pair in pairs[: len(pairs) // 2]}
    texts = {row["problem"]: row["id"] for row in read(tmp_path / "l.jsonl")}

    def answer(body: dict) -> str:
        said = body["messages"][0]["content"]
        identity = next(identity for problem, identity in texts.items() if problem in said)
        steps = said.split("## Solution to check")[1].split("## Your task")[0]
        last = max(k for k in range(1, 20) if f"\nStep {k}:" in steps)
        lines = [f"Step {k}: correct" for k in range(1, last)] + [
            f"Step {last}: {'in' if identity in dropped else ''}correct"
        ]
        return "Verdicts:\n" + "\n".join(lines)

    judge.script = lambda number, body: answer(body)
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    command = [tmp_path / "p.jsonl", "--out", tmp_path / "kept.jsonl", "--judge-model", "judge"]
    command += ["--judge-base-url", url]
    done = run("check_chosen", *command)
    kept = read(tmp_path / "kept.jsonl")
    assert kept == [pair for pair in pairs if pair["id"] not in dropped]
    assert f"judged wrong {len(pairs) - len(kept)}" in done.stdout
    asked = judge.count
    run("check_chosen", *command)
    assert judge.count == asked and read(tmp_path / "kept.jsonl") == kept, "verdicts are kept"
    assert "--judge-model" in run("check_chosen", tmp_path / "p.jsonl", check=False).stderr


def astray(
    split: str, response: str, said: list[str], **more
) -> tuple[list[dict], list[tuple[str, float]]]:
    """SCDPO's pairs of one right response, where the model says these texts; and what it was asked,
    with the temperature."""
    three, asked, seeds, texts = stage(3), [], set(), iter(said)
    args = three.Args(
        method="scdpo", split=split, opening="", heat=(1.0, 0.1, 1.2), **{"tries": 1} | more
    )

    async def go_on(row, prefix, seed, n=1, temperature=None, **sampling):
        assert seed not in seeds, "a request that was made before"
        seeds.add(seed)
        asked.append((prefix, temperature))
        return [{"text": next(texts), "finish_reason": "stop", "tokens": 3}]

    async def wrong(*_):
        return False

    row = {
        "id": "a",
        "sample": 0,
        "problem": "?",
        "answer": "9",
        "response": response,
        "correct": True,
    }
    row |= {"finish_reason": "stop", "steps": three.split_steps(response, split, "")}
    pairs, counts = asyncio.run(three.lead_astray(args, go_on, wrong, [row]))
    assert counts["pairs"] == len(pairs) <= counts["attempts"]
    return pairs, asked


def test_heat_follows_the_split():
    """It rises after a line, not after a blank one."""
    [pair], asked = astray(
        "lines", "a = 1\nThe answer is: 9", ["b = 3\n", "\n", "c = 4\n", "The answer is: 7"]
    )
    assert [heat for _, heat in asked] == [1.0, 1.1, 1.1, 1.2]
    assert asked[2][0] == "a = 1\nb = 3\n\n"
    assert pair["rejected"] == "b = 3\n\nc = 4\nThe answer is: 7"
    assert pair["initial_reason_steps"] == "a = 1\n"
    assert pair["chosen"] == "The answer is: 9"
    assert pair["error_step"] == 2


def test_an_answer_of_the_right_steps_is_not_the_continuations():
    right = "1 + 2 = \\boxed{3}\nThe answer is: 9"
    pairs, _ = astray("lines", right, ["3 + 4 = 7. The answer is 7."])
    assert not pairs
    assert not astray("lines", right, ["ґґґ \\boxed{7}"])[0], "odd characters"
    [pair], _ = astray("lines", right, ["3 + 4 = \\boxed{7}"])
    assert pair["rejected"] == "3 + 4 = \\boxed{7}"


THREE = "a = 1\nb = 2\nThe answer is: 9"


@pytest.mark.parametrize(
    "more, asked", [({}, [1, 2]), ({"first_k": 0}, [0, 1, 2]), ({"first_k": 3}, [])]
)
def test_every_step_is_entered_from_first_k_on(more, asked):
    """From the first right step on, as the authors' mixers take them; their set for Mistral-7B-Ours
    from the opening on."""
    pairs, found = astray("lines", THREE, ["The answer is: 7"] * 3, every_step=True, **more)
    assert [prefix for prefix, _ in found] == ["".join(THREE.splitlines(True)[:k]) for k in asked]
    assert [pair["error_step"] for pair in pairs] == [k + 1 for k in asked]


def test_drawn_step_is_first_k_or_later():
    for first_k in (0, 1, 2):
        drawn = {
            astray("lines", THREE, ["The answer is: 7"], first_k=first_k, seed=seed)[1][0][0]
            for seed in range(20)
        }
        assert drawn == {"".join(THREE.splitlines(True)[:k]) for k in range(first_k, 3)}


def test_pairs_per_problem_keeps_what_went_wrong_first():
    """As in the authors' limited set, which lists pairs by the round in which they went wrong, then
    by k."""
    said = ["no answer", "The answer is: 6", "The answer is: 7", "The answer is: 8"]
    for most, kept in ((None, [7, 8, 6]), (0, [7, 8, 6]), (2, [7, 8]), (1, [7])):
        pairs, _ = astray(
            "lines", THREE, said, every_step=True, first_k=0, tries=2, pairs_per_problem=most
        )
        assert [pair["rejected"] for pair in pairs] == [
            f"The answer is: {answer}" for answer in kept
        ]


def test_a_code_integrated_solution_has_22_blocks_at_most():
    """The authors count 24 with the turns of system and user."""
    blocks = [{"type": "text", "content": "x" * 3000}] * 22
    assert not stage(3).too_long(blocks)
    assert stage(3).too_long([*blocks, {"type": "text", "content": ""}])
    assert stage(3).too_long([{"type": "text", "content": "x" * 3001}])


@pytest.mark.slow
def test_training_on_a_mix(samples, bundled, tmp_path):
    """04 on naive and step-controlled pairs together: both suffixes end their solution, so both end
    in EOS."""
    options = ["--method", "dpo", "--samples", samples, "--pairs-per-problem", 2]
    options += ["--out", tmp_path / "naive.jsonl"]
    run(3, *options)
    options = ["--method", "scdpo", "--samples", samples, "--out", tmp_path / "sc.jsonl", *SHORT]
    options += [*bundled]
    run(3, *options)
    controlled = read(tmp_path / "sc.jsonl")
    both = read(tmp_path / "naive.jsonl") + controlled
    assert any(f"Step {pair['error_step'] + 1}:" in pair["rejected"] for pair in controlled)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    for pair in both:
        _, suffixes = stage(4).encode(pair, tokenizer)
        assert all(
            ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
            for ids in suffixes
        )
    options = ["--data", tmp_path / "naive.jsonl", tmp_path / "sc.jsonl", "--model", TINY / "model"]
    options += ["--out", tmp_path / "tuned", "--epochs", 1, "--batch-size", 8, "--lr", 1e-5]
    done = run(4, *options)
    assert f"{len(both)} pairs" in done.stdout + done.stderr


def test_alpaca_template_is_the_authors_prompt():
    """data/templates/alpaca.jinja with the forced opening: what the authors sampled their SFT
    models with and train on."""
    tokenizer = stage(1).load_tokenizer(
        str(TINY / "model"), ROOT / "data/templates/alpaca.jinja", "{}"
    )
    text = stage(1).render_prompt(tokenizer, "1 + 1?", OPENING)
    tokenizer = stage(1).load_tokenizer(
        str(TINY / "model"), ROOT / "data/templates/metamath.jinja", "{}"
    )
    evaluation = stage(5).render_prompt(tokenizer, "1 + 1?", " Let's think step by step.")
    assert text == evaluation.removesuffix(" Let's think step by step.") + "\n" + OPENING


def test_recipes_name_options_that_exist():
    """Every --option in a recipe or a document is one of the script that its line calls; a recipe
    for eight GPUs is not run here."""
    import importlib
    import re

    known = {}
    folders = "recipes/*.sh experiments/*.sh *.md docs/*.md */README.md"
    for path in sorted(path for pattern in folders.split() for path in ROOT.glob(pattern)):
        text = re.sub(r"\\\n", " ", path.read_text())
        folder = "analysis|benchmarks|data|experiments|serving"
        call = rf"(0[1-5]_\w+|(?:{folder})/\w+)\.py((?: +(?:\"[^\"]*\"|[^\s\"`|;&]+))*)"
        for name, rest in re.findall(call, text):
            if name not in known:
                assert (ROOT / f"{name}.py").is_file(), f"{path.name}: no {name}.py"
                args = getattr(importlib.import_module(name.split("/")[-1]), "Args", None)
                known[name] = (
                    {field.replace("_", "-") for field in args.__dataclass_fields__}
                    if args
                    else None
                )
            rest = re.sub(r'"[^"]*"', "", rest.split(" -- ")[0])  # those after it are 02's
            for option in re.findall(r"(?<= )--([a-z][a-z-]+)", rest):
                option = option.removeprefix("no-")
                assert known[name] is None or option in known[name], (
                    f"{path.name}: {name}.py has no --{option}"
                )
    assert len(known) > 8
