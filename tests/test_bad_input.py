"""Bad input: one clear line on stderr, exit status 2, no traceback, nothing written, no server
left."""

import asyncio
import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from conftest import TINY, read, run, stage

GOOD = {"id": "a", "problem": "1 + 1?", "answer": "2"}
SAMPLE = GOOD | {
    "sample": 0,
    "response": "Step 1: 3",
    "steps": ["Step 1: 3"],
    "correct": False,
    "finish_reason": "stop",
}
PAIR = {
    "prompt": "1 + 1?",
    "initial_reason_steps": "Step 1:",
    "chosen": " 2",
    "rejected": " 3",
    "full_chosen": " 2 so",
    "full_rejected": " 3 so",
}
INPUT = {
    1: ("--data", GOOD),
    2: ("--samples", SAMPLE),
    3: ("--located", SAMPLE | {"error_step": 1}),
    4: ("--data", PAIR),
    5: ("--data", GOOD),
}
MODEL = {number: "--models" if number == 5 else "--model" for number in INPUT}


def refused(number: int, tmp_path, *arguments) -> str:
    out = tmp_path / "out" / "file.jsonl"
    done = run(number, *arguments, "--out", out, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not [
        path
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.suffix in (".jsonl", ".json")
    ]
    return done.stderr


def message(stderr: str) -> str:
    """The one line that says what is wrong; progress lines may stand before it."""
    lines = [line for line in stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.parametrize("number", INPUT)
def test_missing_file(number, tmp_path):
    said = message(
        refused(
            number,
            tmp_path,
            INPUT[number][0],
            tmp_path / "none.jsonl",
            MODEL[number],
            TINY / "model",
        )
    )
    assert "none.jsonl" in said


@pytest.mark.parametrize("number", INPUT)
def test_broken_lines_name_file_and_line(number, tmp_path):
    option, row = INPUT[number]
    path = tmp_path / "in.jsonl"
    for broken, word in [
        ("{not json", "not JSON"),
        ('"text"', "instead of an object"),
        ("", "empty"),
    ]:
        path.write_text((json.dumps(row) + "\n" + broken + "\n") if broken else "")
        said = message(refused(number, tmp_path, option, path, MODEL[number], TINY / "model"))
        assert word in said and "in.jsonl" in said and (not broken or "line 2" in said)


FIELDS = [
    (1, "problem"),
    (1, "answer"),
    (2, "steps"),
    (3, "error_step"),
    (4, "chosen"),
    (5, "answer"),
]


@pytest.mark.parametrize("number, field", FIELDS)
def test_missing_field(number, field, tmp_path):
    option, row = INPUT[number]
    (tmp_path / "in.jsonl").write_text(
        json.dumps({k: v for k, v in row.items() if k != field}) + "\n"
    )
    said = message(
        refused(number, tmp_path, option, tmp_path / "in.jsonl", MODEL[number], TINY / "model")
    )
    assert repr(field) in said and "in.jsonl" in said


def line(**fields) -> str:
    """GOOD with other values, as JSON; a text that begins with = is written as it is."""
    row = {
        name: f"={name}" if str(value).startswith("=") else value
        for name, value in (GOOD | fields).items()
    }
    text = json.dumps(row)
    for name, value in fields.items():
        text = text.replace(f'"={name}"', str(value)[1:])
    return text


WRONG = [
    ("answer", value)
    for value in ("=NaN", "=Infinity", "=1e999", ["7"], {"a": 7}, False, True, "  ", "\n", [])
]
WRONG += [("problem", value) for value in (["a", "b"], 7, 1.5, True, {"a": 1}, "  \n")]
WRONG += [("id", value) for value in (["a"], False, {"a": 1}, "=NaN", " ")]


@pytest.mark.parametrize("field, value", WRONG)
def test_values_of_the_wrong_kind_name_file_and_line(field, value, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(f"{line(id='b')}\n\n{line(**{field: value})}\n")
    with pytest.raises(SystemExit) as end:
        stage(1).load_problems(tmp_path / "in.jsonl")
    said = message(capsys.readouterr().err)
    assert end.value.code == 2
    assert "in.jsonl, line 3" in said
    assert repr(field) in said
    assert "must be" in said


@pytest.mark.parametrize(
    "number, field, value",
    [
        (1, "answer", "=NaN"),
        (5, "problem", ["a"]),
        (2, "steps", "Step 1: 3"),
        (2, "answer", True),
        (2, "correct", "no"),
        (3, "sample", "0"),
    ],
)
def test_stages_stop_at_values_of_the_wrong_kind(number, field, value, tmp_path):
    option, row = INPUT[number]
    text = line(**(row | {field: value}))
    (tmp_path / "in.jsonl").write_text(text + "\n")
    said = message(
        refused(number, tmp_path, option, tmp_path / "in.jsonl", MODEL[number], TINY / "model")
    )
    assert "in.jsonl, line 1" in said and repr(field) in said


@pytest.mark.parametrize("step", [-1, 0, 2, "1", 1.0, True])
def test_a_step_that_is_not_there_gets_no_pair(step, tmp_path):
    row = SAMPLE | {"error_step": step}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--located", tmp_path / "in.jsonl", "--model", TINY / "model"]
    said = message(refused(3, tmp_path, *arguments))
    assert "in.jsonl, row 1: 'error_step'" in said


@pytest.mark.parametrize(
    "second, words",
    [({"sample": 1, "problem": "Another?"}, "another problem"), ({}, "same id and sample")],
)
def test_two_files_of_samples_put_together_are_not_mixed_up(second, words, tmp_path):
    """Both may number their problems from 0, and one problem's samples say nothing of another."""
    rows = [SAMPLE, SAMPLE | second]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--samples", tmp_path / "in.jsonl", "--model", TINY / "model"]
    for said in (
        refused(2, tmp_path, *arguments),
        refused(3, tmp_path, "--method", "dpo", *arguments[:2]),
    ):
        assert "in.jsonl, row 2" in message(said) and words in message(said)


@pytest.mark.parametrize("lacking", ["prediction", "correct", "response"])
def test_samples_without_their_verdict_make_no_pairs(lacking, tmp_path):
    row = {k: v for k, v in (SAMPLE | {"prediction": "3"}).items() if k != lacking}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    said = message(refused(3, tmp_path, "--method", "dpo", "--samples", tmp_path / "in.jsonl"))
    assert "in.jsonl" in said and repr(lacking) in said


HALVES = [{"id": "a\ud83d"}, {"problem": "3 \ud83d pens"}, {"answer": "\ude00"}, {"note": "\ud83d"}]
HALVES += [{"notes": [{"a": "\udfff"}]}, {"k\ud83d": 1}]


@pytest.mark.parametrize("fields", HALVES, ids=ascii)
def test_half_a_character_names_file_and_line(fields, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(
        f"{json.dumps(GOOD | {'id': 'b', 'note': '😀'})}\n{json.dumps(GOOD | fields)}\n"
    )
    with pytest.raises(SystemExit):
        stage(1).load_problems(tmp_path / "in.jsonl")
    said = message(capsys.readouterr().err)
    assert "in.jsonl, line 2" in said and "half a character" in said


def test_lists_without_end_are_no_rows(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text("[" * 200_000 + "\n")
    with pytest.raises(SystemExit):
        stage(1).read_rows(tmp_path / "in.jsonl", ())
    assert "in.jsonl, line 1: not JSON" in message(capsys.readouterr().err)


def test_numbers_become_text_that_is_graded_as_the_number(tmp_path):
    numbers = {
        "7": "7",
        "0": "0",
        "-2.50": "-2.5",
        "7.0": "7.0",
        "1e-07": "0.0000001",
        "1e22": "1" + "0" * 22,
    }
    (tmp_path / "in.jsonl").write_text(
        "".join(line(id=i, answer=f"={text}") + "\n" for i, text in enumerate(numbers))
    )
    rows = stage(1).load_problems(tmp_path / "in.jsonl")
    assert [row["answer"] for row in rows] == list(numbers.values())
    assert [row["id"] for row in rows] == list("012345")
    grader = stage(1).Grader(60)

    async def grade():
        return await asyncio.gather(
            *(grader(rows[4]["answer"], said) for said in ("10^{-7}", "0.0000001", "10^{-6}", "1"))
        )

    try:
        assert asyncio.run(grade()) == [True, True, False, False]
    finally:
        grader.close()
    (tmp_path / "samples.jsonl").write_text(json.dumps(SAMPLE | {"id": 3, "answer": 1e-07}) + "\n")
    [row] = stage(2).read_samples(
        tmp_path / "samples.jsonl", ("answer",), stage(2).Args(locator="judge")
    )
    assert (row["id"], row["answer"]) == ("3", "0.0000001"), (
        "a file of samples that another program made"
    )


def test_a_prompt_that_is_too_long_is_not_sampled_on():
    """--until-both would ask for it a hundred times."""
    one, problem = stage(1), {"id": "a"}
    args = one.Args(n=2, until_both=100)
    assert one.samples_due(args, problem, {}) == [0, 1]
    refused = {"prediction": None, "correct": False, "finish_reason": "refused"}
    verdicts = {("a", sample): one.verdict_of(refused) for sample in (0, 1)}
    assert one.samples_due(args, problem, verdicts) == []
    verdicts = {("a", 0): True, ("a", 1): None}
    assert one.samples_due(args, problem, verdicts) == [2, 3]


def test_a_right_sample_that_makes_no_pair_does_not_end_the_sampling():
    """03 leaves out solutions with second thoughts; --until-both had stopped at one."""
    one, problem = stage(1), {"id": "a"}
    right = {
        "prediction": "1",
        "correct": True,
        "finish_reason": "stop",
        "response": "NameError: x",
    }
    rows = [{**right, "id": "a", "steps": []}, {**right, "id": "a", "steps": [], "correct": False}]
    verdicts = {("a", sample): one.verdict_of(row) for sample, row in enumerate(rows)}
    assert one.samples_due(one.Args(n=2, until_both=100), problem, verdicts) == [2, 3]
    counts = one.summarize([problem], rows)
    assert counts["pass@n"] == "100.0%" and counts["problems with right and wrong"] == 0


def test_two_files_with_an_id_in_common(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(GOOD) + "\n")
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    done = run(1, "--data", *files, "--model", TINY / "model", "--out", tmp_path / "o", check=False)
    assert done.returncode == 2 and "an id in common" in message(done.stderr)


def test_adapters_without_a_rank(tmp_path):
    done = run(4, "--lora-save", "adapter", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2 and message(done.stderr).endswith("needs --lora-rank")


def test_out_that_is_no_file(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    for out in ("/dev/full", tmp_path):
        done = run(
            1, "--data", tmp_path / "in.jsonl", "--model", TINY / "model", "--out", out, check=False
        )
        assert done.returncode == 2
        assert "not a file" in message(done.stderr)
        assert "Traceback" not in done.stderr


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(stage(1).fcntl, "flock", none)
    for name in ("a", "b"):
        output = stage(1).Output(tmp_path / f"{name}.jsonl", {})
        output.write({"id": name})
        output.close()
    assert capsys.readouterr().err.count("has no locks (No locks available)") == 2
    assert [read(path)[0]["id"] for path in sorted(tmp_path.glob("*.jsonl"))] == ["a", "b"]


@pytest.mark.parametrize("text", ['{"id": "mine"}', "a note", '{"id": 1}\n{"id": 2}'])
def test_a_file_of_another_keeps_its_last_line(text, tmp_path, capsys):
    """Its last line end may be missing, which a torn row's is too."""
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit):
        stage(1).Output(path, {"code": {}})
    assert path.read_text() == text and "give another --out" in capsys.readouterr().err


def test_a_run_that_is_refused_or_killed_leaves_a_true_meta_file(tmp_path):
    """Its input's hash and summary stay those of the rows, and its seconds count those before a
    kill."""
    path = tmp_path / "rows.jsonl"
    output = stage(1).Output(path, {}, inputs={"a": "1"})
    output.write({"id": "q1"})
    output.file.close()  # a kill: no more is written
    made = json.loads(output.meta_path.read_text())
    at = output.meta_path.stat().st_mtime + 60
    os.utime(path, (at, at))  # its last row came a minute later
    refused_output = stage(1).Output(path, {}, inputs={"b": "2"})
    refused_output.write()
    assert json.loads(output.meta_path.read_text()) == made
    refused_output.close()
    os.utime(output.meta_path, (at - 60, at - 60))
    for _ in range(2):  # the second time a day after the first
        last_output = stage(1).Output(path, {})
        last_output.save_meta(finished=True)
        assert 60 <= json.loads(output.meta_path.read_text())["seconds"] < 90
        last_output.close()
        os.utime(path, (at + 86400, at + 86400))


def test_a_first_row_that_is_torn_is_made_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    output = stage(1).Output(path, {"code": {}})
    output.write({"id": "q1"})
    output.close()
    path.write_bytes(path.read_bytes()[:-3])
    output = stage(1).Output(path, {"code": {}})
    assert output.rows == [] and not path.read_bytes()
    output.write({"id": "q1"})
    output.close()
    assert read(path) == [{"id": "q1"}]


def test_an_output_is_locked_until_it_is_closed(tmp_path, capsys):
    def open_file():
        return stage(1).Output(tmp_path / "out.jsonl", {"a": 1})

    output = open_file()
    with pytest.raises(SystemExit):
        open_file()
    assert "another process is writing it" in message(capsys.readouterr().err)
    assert (tmp_path / "out.jsonl").exists(), (
        "who does not get the lock does not remove the other's file"
    )
    output.write({"id": "a"})
    output.close()
    with pytest.raises(SystemExit):  # other settings: it lets the file go
        stage(1).Output(tmp_path / "out.jsonl", {"a": 2})
    output = open_file()
    assert output.rows == [{"id": "a"}]
    output.close()
    output.close()


@pytest.mark.parametrize("number", INPUT)
def test_model_folder_that_does_not_exist(number, tmp_path):
    option, row = INPUT[number]
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    for model in (tmp_path / "no_model", tmp_path):  # no folder; a folder with no model in it
        said = message(
            refused(number, tmp_path, option, tmp_path / "in.jsonl", MODEL[number], model)
        )
        assert str(model) in said and "config.json" in said


def test_all_models_are_looked_at_before_the_first_starts(tmp_path):
    """A folder that is not there, and one whose training has not ended."""
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TINY / "model" / name).exists():
            (unfinished / name).write_bytes((TINY / "model" / name).read_bytes())
    for second in (tmp_path / "none", unfinished):
        stderr = refused(
            5, tmp_path, "--data", tmp_path / "in.jsonl", "--models", TINY / "model", f"b={second}"
        )
        assert str(second) in message(stderr)
        assert "ready" not in stderr
        assert "first prompt" not in stderr


def test_duplicate_ids(tmp_path):
    (tmp_path / "in.jsonl").write_text(2 * (json.dumps(GOOD) + "\n"))
    assert "id 'a'" in message(
        refused(1, tmp_path, "--data", tmp_path / "in.jsonl", "--model", TINY / "model")
    )


def test_nothing_wrong_and_nothing_located(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        json.dumps(SAMPLE | {"correct": True, "error_step": None}) + "\n"
    )
    assert "is wrong" in message(
        refused(2, tmp_path, "--samples", tmp_path / "in.jsonl", "--model", TINY / "model")
    )
    assert "error_step" in message(
        refused(3, tmp_path, "--located", tmp_path / "in.jsonl", "--model", TINY / "model")
    )


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_server_that_is_not_there(number, tmp_path):
    option, row = INPUT[number]
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    arguments = [
        option,
        tmp_path / "in.jsonl",
        MODEL[number],
        TINY / "model",
        "--base-url",
        "http://127.0.0.1:9/v1",
    ]
    assert "is the server up" in message(refused(number, tmp_path, *arguments))


def test_templates_that_are_not_there_or_fail(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "fails.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('no system turn') }}"
    )
    (tmp_path / "other.jinja").write_text(
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    )
    arguments = ["--data", tmp_path / "in.jsonl", "--model", TINY / "model"]
    for name, word in (
        ("none.jinja", "No such file"),
        ("fails.jinja", "no system turn"),
        ("other.jinja", "final message"),
    ):
        assert word in message(refused(1, tmp_path, *arguments, "--chat-template", tmp_path / name))
    for switches in ("{'a': 1}", "[1]"):
        assert "--chat-template-kwargs" in message(
            refused(1, tmp_path, *arguments, "--chat-template-kwargs", switches)
        )


@pytest.mark.slow
def test_engine_that_does_not_start(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    arguments = ["--data", tmp_path / "in.jsonl", "--model", TINY / "model"]
    arguments += ["--engine-args=--no-such-option"]
    assert "no-such-option" in message(refused(1, tmp_path, *arguments))
    arguments[-1] = "--engine-args=--dtype 'float32"
    assert "No closing quotation" in message(refused(1, tmp_path, *arguments))
    with pytest.raises(SystemExit) as ended:
        stage(1).Engine(str(TINY / "model"), "--max-model-len 9000000", 0)
    assert ended.value.code == 2 and "max_model_len" in message(capsys.readouterr().err)


@pytest.mark.slow
def test_weights_larger_than_the_memory_are_not_loaded(tmp_path, monkeypatch):
    """Of 10^15 weights there is the header. On a GPU vLLM says it itself."""
    model = tmp_path / "model"
    shutil.copytree(TINY / "model", model)
    head = {"dtype": "BF16", "shape": [10**9, 10**6], "data_offsets": [0, 2 * 10**15]}
    text = json.dumps({"model.head": head}).encode()
    (model / "model-2.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    arguments = ["--data", tmp_path / "in.jsonl", "--model", model]
    assert "needs more than" in message(refused(1, tmp_path, *arguments))
    monkeypatch.setattr(stage(1), "cpu_options", list)  # a machine with a GPU
    config = SimpleNamespace(model_config=SimpleNamespace(quantization=None))
    assert stage(1).check_size(config) is None


@pytest.mark.parametrize("text", ['{"source": "openai/gsm8k"}', '{"settings": {', "[]"])
def test_a_file_that_no_stage_made_is_not_continued(tmp_path, text):
    """data/download.py writes a meta file too."""
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "gsm8k.jsonl.meta.json").write_text(text)
    done = run(1, "--data", path, "--model", TINY / "model", "--out", path, check=False)
    assert done.returncode == 2 and "holds no settings of a stage" in message(done.stderr)
    assert read(path) == [GOOD]
