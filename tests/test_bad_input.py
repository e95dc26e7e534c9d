"""Bad input: one clear line on stderr, exit status 2, no traceback, nothing written, no server left."""

import json

import pytest
from conftest import TINY, engine_processes, run

GOOD = {"id": "a", "problem": "1 + 1?", "answer": "2"}
SAMPLE = GOOD | {"sample": 0, "response": "Step 1: 3", "steps": ["Step 1: 3"], "correct": False, "finish_reason": "stop"}
PAIR = {"prompt": "1 + 1?", "initial_reason_steps": "Step 1:", "chosen": " 2", "rejected": " 3", "full_chosen": " 2 so",
        "full_rejected": " 3 so"}  # fmt: skip
INPUT = {1: ("--data", GOOD), 2: ("--samples", SAMPLE), 3: ("--located", SAMPLE | {"error_step": 1}), 4: ("--data", PAIR),
         5: ("--data", GOOD)}  # fmt: skip
MODEL = {number: "--models" if number == 5 else "--model" for number in INPUT}


def refused(number: int, tmp_path, *arguments) -> str:
    out = tmp_path / "out" / "file.jsonl"
    done = run(number, *arguments, "--out", out, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.suffix in (".jsonl", ".json")]
    return done.stderr


def message(stderr: str) -> str:
    """The one line that says what is wrong; progress lines may stand before it."""
    lines = [line for line in stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.parametrize("number", INPUT)
def test_missing_file(number, tmp_path):
    said = message(refused(number, tmp_path, INPUT[number][0], tmp_path / "none.jsonl", MODEL[number], TINY / "model"))
    assert "none.jsonl" in said


@pytest.mark.parametrize("number", INPUT)
def test_broken_lines_name_file_and_line(number, tmp_path):
    option, row = INPUT[number]
    path = tmp_path / "in.jsonl"
    for broken, word in [("{not json", "not JSON"), ('"text"', "instead of an object"), ("", "empty")]:
        path.write_text((json.dumps(row) + "\n" + broken + "\n") if broken else "")
        said = message(refused(number, tmp_path, option, path, MODEL[number], TINY / "model"))
        assert word in said and "in.jsonl" in said and (not broken or "line 2" in said)


FIELDS = [(1, "problem"), (1, "answer"), (2, "steps"), (3, "error_step"), (4, "chosen"), (5, "answer")]


@pytest.mark.parametrize("number, field", FIELDS)
def test_missing_field(number, field, tmp_path):
    option, row = INPUT[number]
    (tmp_path / "in.jsonl").write_text(json.dumps({k: v for k, v in row.items() if k != field}) + "\n")
    said = message(refused(number, tmp_path, option, tmp_path / "in.jsonl", MODEL[number], TINY / "model"))
    assert repr(field) in said and "in.jsonl" in said


@pytest.mark.parametrize("number", INPUT)
def test_unknown_argument(number, tmp_path):
    assert "--nonsense" in refused(number, tmp_path, "--nonsense", "3")


@pytest.mark.parametrize("number", INPUT)
def test_model_folder_that_does_not_exist(number, tmp_path):
    option, row = INPUT[number]
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    for model in (tmp_path / "no_model", tmp_path):  # no folder; a folder with no model in it
        said = message(refused(number, tmp_path, option, tmp_path / "in.jsonl", MODEL[number], model))
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
        stderr = refused(5, tmp_path, "--data", tmp_path / "in.jsonl", "--models", TINY / "model", f"b={second}")
        assert str(second) in message(stderr) and "ready" not in stderr and "first prompt" not in stderr


def test_duplicate_ids(tmp_path):
    (tmp_path / "in.jsonl").write_text(2 * (json.dumps(GOOD) + "\n"))
    assert "id 'a'" in message(refused(1, tmp_path, "--data", tmp_path / "in.jsonl", "--model", TINY / "model"))


def test_nothing_wrong_and_nothing_located(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(SAMPLE | {"correct": True, "error_step": None}) + "\n")
    assert "is wrong" in message(refused(2, tmp_path, "--samples", tmp_path / "in.jsonl", "--model", TINY / "model"))
    assert "error_step" in message(refused(3, tmp_path, "--located", tmp_path / "in.jsonl", "--model", TINY / "model"))


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_server_that_is_not_there(number, tmp_path):
    option, row = INPUT[number]
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    arguments = [option, tmp_path / "in.jsonl", MODEL[number], TINY / "model", "--base-url", "http://127.0.0.1:9/v1"]
    assert "is the server up" in message(refused(number, tmp_path, *arguments))


def test_templates_that_are_not_there_or_fail(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "fails.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('no system turn') }}"
    )
    (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    arguments = ["--data", tmp_path / "in.jsonl", "--model", TINY / "model"]
    for name, word in (("none.jinja", "No such file"), ("fails.jinja", "no system turn"), ("other.jinja", "final message")):
        assert word in message(refused(1, tmp_path, *arguments, "--chat-template", tmp_path / name))
    for switches in ("{'a': 1}", "[1]"):
        assert "--chat-template-kwargs" in message(refused(1, tmp_path, *arguments, "--chat-template-kwargs", switches))


@pytest.mark.slow
@pytest.mark.parametrize("option, word", [("--no-such-option", "no-such-option"), ("--max-model-len 9000000", "max_model_len")])
def test_engine_that_does_not_start(option, word, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(GOOD) + "\n")
    arguments = ["--data", tmp_path / "in.jsonl", "--model", TINY / "model", f"--engine-args={option}"]
    said = message(refused(1, tmp_path, *arguments))
    assert word in said
    assert not engine_processes()
