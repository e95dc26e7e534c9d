"""A server that misbehaves: 429, 500, garbage, slowness, dropped connections, refusals. Scripted,
for faults only."""

import itertools
import json
import resource
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import TINY, read, run, scripted_server, stage

GOOD = {"index": 0, "text": " 1+1=2.\nThe answer is \\boxed{2}.", "finish_reason": "stop"}
COMPLETION = {
    "id": "x",
    "object": "text_completion",
    "created": 0,
    "model": "m",
    "choices": [GOOD],
    "usage": {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10},
}


class Scripted(BaseHTTPRequestHandler):
    """Answers the n-th completion request by `script(n, body)`: "good", (status, words), "html",
    "json", "torn", "empty", "abort", "length", "half", "slow" or "drop"."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, text: str, kind: str = "application/json"):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("retry-after-ms", "5")
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.reply(200, json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.path.endswith("/v1/completions"):
            return self.reply(404, "{}")
        with self.server.lock:
            self.server.count += 1
            act = self.server.script(self.server.count, body)
        if act == "slow":
            time.sleep(0.5)
        if act == "drop":
            self.connection.close()
            self.close_connection = True
        elif isinstance(act, tuple):
            self.reply(
                act[0], json.dumps({"error": {"message": act[1], "type": "x", "code": act[0]}})
            )
        else:
            half = json.dumps(
                COMPLETION
                | {"choices": [GOOD | {"text": " 1+1=2 \ud83d.\nThe answer is \\boxed{2}."}]}
            )
            aborted = [GOOD | {"text": "", "finish_reason": "abort"}]
            unfinished = [GOOD | {"finish_reason": "length"}]
            texts = {
                "length": json.dumps(COMPLETION | {"choices": unfinished}),
                "abort": json.dumps(COMPLETION | {"choices": aborted}),
                "html": "<html>proxy</html>",
                "json": '{"a": 1}',
                "torn": '{"choices": [',
                "empty": "",
                "half": half,
            }
            kind = "text/html" if act == "html" else "application/json"
            self.reply(200, texts.get(act, json.dumps(COMPLETION)), kind)


@pytest.fixture()
def scripted():
    with scripted_server(Scripted, lock=threading.Lock(), count=0) as server:
        yield server


def decoded(body: dict) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY / "model").decode(body["prompt"])


def sample(server, tmp_path, problems: int = 12, check: bool = True, arguments=(), **more):
    lines = [
        json.dumps({"id": i, "problem": f"{i}: 1 + 1?", "answer": "2"}) for i in range(problems)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return run(
        1,
        "--data",
        tmp_path / "in.jsonl",
        "--base-url",
        url,
        "--model",
        "m",
        "--tokenizer",
        TINY / "model",
        "--out",
        tmp_path / "out.jsonl",
        "--concurrency",
        3,
        *arguments,
        check=check,
        **more,
    )


def test_every_fault_is_survived_and_nothing_comes_twice(scripted, tmp_path):
    faults = [
        (429, "slow down"),
        (500, "oops"),
        "html",
        "json",
        "torn",
        "empty",
        "abort",
        "slow",
        "drop",
        (503, "busy"),
        (408, "late"),
    ]
    scripted.script = lambda n, body: faults[n // 2 % len(faults)] if n % 2 else "good"
    sample(scripted, tmp_path)
    rows = read(tmp_path / "out.jsonl")
    assert sorted((row["id"], row["sample"]) for row in rows) == sorted(
        (str(i), s) for i in range(12) for s in range(2)
    )
    assert all(row["correct"] for row in rows)


def test_an_unfinished_response_has_no_answer(scripted, tmp_path):
    """Though its box is there, and right."""
    scripted.script = lambda n, body: "length"
    sample(scripted, tmp_path, problems=2)
    for row in read(tmp_path / "out.jsonl"):
        assert "\\boxed{2}" in row["response"]
        assert row["prediction"] is None and row["correct"] is False


def test_a_server_that_dies_keeps_what_is_written(scripted, tmp_path):
    scripted.script = lambda n, body: "good" if n <= 9 else (500, "oops")
    done = sample(scripted, tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "run the same command to resume" in done.stderr
    assert sum(": error: " in line for line in done.stderr.splitlines()) == 1
    assert len(read(tmp_path / "out.jsonl")) == 9
    scripted.script = lambda n, body: "good"
    before = scripted.count
    sample(scripted, tmp_path)
    assert len(read(tmp_path / "out.jsonl")) == 24
    assert scripted.count - before == 15, "more than what was missing"


def test_a_server_of_garbage_ends_the_run(scripted, tmp_path):
    scripted.script = lambda n, body: "json"
    done = sample(scripted, tmp_path, check=False)
    assert done.returncode == 2
    assert "answer with completions" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_that_is_too_long_is_a_row_and_a_wrong_key_is_an_end(scripted, tmp_path):
    refusal = (
        400,
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.",
    )
    scripted.script = lambda n, body: refusal if "user\n3: 1 + 1" in decoded(body) else "good"
    done = sample(scripted, tmp_path)
    refused = [row for row in read(tmp_path / "out.jsonl") if row["finish_reason"] == "refused"]
    assert [row["id"] for row in refused] == ["3", "3"]
    assert all(row["steps"] == [] for row in refused)
    assert "refused prompt 8.3%" in done.stdout
    (tmp_path / "out.jsonl").unlink()
    scripted.script = lambda n, body: (401, "wrong key")
    done = sample(scripted, tmp_path, check=False)
    assert done.returncode == 2
    assert "AuthenticationError" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


CONTEXT = "This model's maximum context length is {context} tokens"
REFUSALS = {  # in the words of servers, and how many tokens of its context a server keeps back
    "vllm 0.9": (
        "'max_tokens' or 'max_completion_tokens' is too large: {asked}. "
        + CONTEXT
        + " and your request has {length} "
        "input tokens ({asked} > {context} - {length}).",
        0,
    ),
    "vllm 0.4": (
        CONTEXT
        + ". However, you requested {total} tokens "
        + "({length} in the messages, {asked} in the completion).",
        0,
    ),
    "vllm 0.32": (
        "max_tokens={asked} cannot be greater than max_model_len=max_total_tokens={context}.",
        0,
    ),
    "sglang": (
        "Requested token count exceeds the model's maximum context length of {context} tokens. "
        "You requested a total of {total} tokens: {length} tokens from the input messages and "
        "{asked} tokens for the completion.",
        1,
    ),
}


def small(scripted, words: str, kept: int, context: int = 100):
    """A server that refuses what its context has no room for. Returns (length of the prompt, tokens
    asked for) of what it takes."""
    taken = []

    def script(n, body):
        length, asked = len(body["prompt"]), body["max_tokens"]
        if length + asked > context - kept:
            return 400, words.format(
                context=context, length=length, asked=asked, total=length + asked
            )
        taken.append((length, asked))
        return "good"

    scripted.script = script
    return taken


@pytest.mark.parametrize("words, kept", REFUSALS.values(), ids=REFUSALS)
def test_more_tokens_than_a_server_has_room_for_are_cut_and_the_prompt_is_not_too_long(
    words, kept, scripted, tmp_path
):
    taken = small(scripted, words, kept)
    done = sample(scripted, tmp_path, 4, arguments=("--max-tokens", 4000))
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 8
    assert all(row["correct"] for row in rows)
    assert "refused prompt 0.0%" in done.stdout
    assert taken and all(length + asked == 100 - kept for length, asked in taken), (
        "all the room that is left"
    )


def test_a_prompt_that_is_too_long_by_itself_is_a_row_in_all_words(scripted, tmp_path):
    small(scripted, REFUSALS["sglang"][0], 0, context=20)
    done = sample(scripted, tmp_path, 2, arguments=("--max-tokens", 4000))
    assert "refused prompt 100.0%" in done.stdout
    assert {row["finish_reason"] for row in read(tmp_path / "out.jsonl")} == {"refused"}
    # of vLLM, a prompt of exactly the context
    (tmp_path / "out.jsonl").unlink()
    scripted.script = lambda n, body: (400, "max_tokens must be at least 1, got 0.")
    assert "refused prompt 100.0%" in sample(scripted, tmp_path, 2).stdout
    # of an API, a prompt that its filter does not let through: the run had ended, and every resume
    (tmp_path / "out.jsonl").unlink()
    # asked once: a second answer, to a shorter request, would blame --max-tokens
    scripted.script = lambda n, body: (
        (400, "Error code: content_filter") if body["max_tokens"] > 1 else "good"
    )
    assert "refused prompt 100.0%" in sample(scripted, tmp_path, 2).stdout


def test_a_refusal_that_gives_no_number_names_the_option(scripted, tmp_path):
    scripted.script = lambda n, body: (
        (400, "max_tokens is too large") if body["max_tokens"] > 50 else "good"
    )
    done = sample(scripted, tmp_path, 2, check=False, arguments=("--max-tokens", 4000))
    [said] = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert done.returncode == 2
    assert "--max-tokens" in said
    assert "is too large" in said
    assert not (tmp_path / "out.jsonl").exists()
    scripted.script = lambda n, body: (400, "logit_bias is not supported")
    done = sample(scripted, tmp_path, 2, check=False)
    assert done.returncode == 2
    assert "refuses a request" in done.stderr
    assert "--max-tokens" not in done.stderr


def test_the_room_beside_a_chat_is_read_from_the_refusal():
    chat = [{"role": "user", "content": "q"}]
    numbers = {"context": 4096, "length": 96, "asked": 8192, "total": 8288}

    def fewer(words):
        return stage(1).fewer_tokens(chat, 8192, words.format(**numbers))

    assert [fewer(words) for words, *_ in REFUSALS.values()] == [
        [4000, 3999, 1],
        [4000, 3999, 1],
        [4095, 4094, 1],  # the words do not say how long the chat is
        [4000, 3999, 1],
    ]
    assert stage(1).fewer_tokens(chat, 1, CONTEXT.format(**numbers)) == [], "one token is the least"


def test_half_a_character_of_a_server_does_not_end_the_run(scripted, tmp_path):
    scripted.script = lambda n, body: "half"
    sample(scripted, tmp_path, 2)
    assert {row["response"][-34:] for row in read(tmp_path / "out.jsonl")} == {
        " 1+1=2 ?.\nThe answer is \\boxed{2}."
    }


def test_a_full_disk_leaves_whole_rows_and_the_same_command_resumes(scripted, tmp_path):
    """By a limit on the size of a file, at which a write takes a part, and the next fails as on a
    full disk."""
    scripted.script = lambda n, body: "good"

    def full(size):
        return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}

    done = sample(scripted, tmp_path, check=False, **full(100))  # not even for OUT.meta.json
    [said] = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert done.returncode == 2 and "File too large" in said and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    for size in (3500, 6000):
        done = sample(scripted, tmp_path, check=False, **full(size))
        [said] = [line for line in done.stderr.splitlines() if ": error: " in line]
        assert done.returncode == 2
        assert "out.jsonl: File too large" in said
        assert "Traceback" not in done.stderr
        kept = (tmp_path / "out.jsonl").read_bytes()
        assert size - 500 < len(kept) <= size and kept.endswith(b"\n")
    sample(scripted, tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(kept)
    identities = [(row["id"], row["sample"]) for row in read(tmp_path / "out.jsonl")]
    assert sorted(identities) == sorted(itertools.product(map(str, range(12)), range(2)))


def test_a_full_disk_at_the_pictures_is_one_line(scripted, tmp_path):
    scripted.script = lambda n, body: "good"
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"id": "a", "problem": "1 + 1?", "answer": "2"}) + "\n"
    )
    arguments = ["--data", tmp_path / "in.jsonl", "--models", "m", "--tokenizer", TINY / "model"]
    arguments += ["--out", tmp_path / "results"]
    arguments += ["--base-url", f"http://127.0.0.1:{scripted.server_address[1]}/v1"]
    run(5, *arguments)

    def limit():  # report.md fits, accuracy.png does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = run("report", tmp_path / "results", check=False, timeout=120, preexec_fn=limit)
    [said] = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert done.returncode == 2
    assert "pictures cannot be written" in said
    assert "Traceback" not in done.stderr
    run("report", tmp_path / "results")
    assert "accuracy.png" in (tmp_path / "results" / "report.md").read_text()
    run(5, *arguments)
    assert scripted.count == 1, "the rows are there already"


FREE = {  # options that change no row, or whose effect stands in the settings under another name
    1: "data out tokenizer base_url engine_args chat_template chat_template_kwargs n until_both "
    "limit concurrency accept_edit",
    5: "data models out samples tokenizer base_url engine_args own_process chat_template "
    "chat_template_kwargs limit concurrency accept_edit",
}


def test_stages_run_twice_in_one_process(scripted, tmp_path, capsys):
    """What one run has written, the next resumes, after an error too: nothing stays locked."""
    url = f"http://127.0.0.1:{scripted.server_address[1]}/v1"
    problem = {"id": "a", "problem": "1 + 1?", "answer": "2"}
    steps = ["Let's think step by step.\nStep 1: 1 + 1 = 3.\n", "Step 2: The answer is 3."]
    wrong = problem | {
        "sample": 0,
        "response": "".join(steps),
        "steps": steps,
        "correct": False,
        "finish_reason": "stop",
        "model": "m",
    }
    samples = [
        wrong | {"prediction": "3"},
        wrong | {"sample": 1, "correct": True, "prediction": "2"},
    ]
    (tmp_path / "in.jsonl").write_text(json.dumps(problem) + "\n")
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    data, file = (tmp_path / "in.jsonl",), tmp_path / "samples.jsonl"
    server = {"base_url": url, "tokenizer": str(TINY / "model")}

    def out(number):
        return tmp_path / str(number) / "out.jsonl"

    settings = {
        1: {"data": data, "model": "m", "out": out(1), **server},
        2: {
            "samples": file,
            "model": "m",
            "out": out(2),
            "rollouts": 1,
            "keep_rollouts": tmp_path / "kept.jsonl",
            **server,
        },
        3: {"samples": file, "method": "dpo", "out": out(3)},
        5: {"data": data, "models": ("m",), "out": tmp_path / "5", **server},
    }
    for number, arguments in settings.items():
        source = stage(number)
        scripted.script = lambda n, body: (500, "oops")
        if number != 3:  # which asks for nothing here
            with pytest.raises(SystemExit):
                source.main(source.Args(**arguments))
            assert "does not answer" in capsys.readouterr().err
        scripted.script = lambda n, body: "good"
        for _ in range(2):
            source.main(source.Args(**arguments))
        written = out(number) if number != 5 else tmp_path / "5" / "in" / "m.jsonl"
        assert len(read(written)) == (2 if number == 1 else 1)
        if number in FREE:
            made = json.loads(Path(f"{written}.meta.json").read_text())["settings"]
            assert vars(source.Args()).keys() - made.keys() == set(FREE[number].split())
    (tmp_path / "in.jsonl").write_text(json.dumps(problem | {"answer": "3"}) + "\n")
    for number in (1, 5):
        with pytest.raises(SystemExit):
            stage(number).main(stage(number).Args(**settings[number]))
        assert "another problem with the id 'a'" in capsys.readouterr().err


def test_each_request_has_its_own_stable_seed(scripted, tmp_path):
    seen = {}
    scripted.script = lambda n, body: seen.setdefault(body["seed"], body) and "good"
    sample(scripted, tmp_path)
    assert len(seen) == 24
    (tmp_path / "out.jsonl").unlink()
    first, count = set(seen), len(seen)
    sample(scripted, tmp_path)
    assert set(seen) == first and len(seen) == count
    body = next(iter(seen.values()))
    assert decoded(body).endswith("<|im_start|>assistant\nLet's think step by step.\nStep 1:")
    # whatever the server's defaults are
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)
