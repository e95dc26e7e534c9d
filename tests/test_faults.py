"""A server that misbehaves: 429, 500, garbage, slowness, dropped connections, refusals. Scripted, for faults only."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TINY, read, run

GOOD = {"index": 0, "text": " 1+1=2.\nThe answer is \\boxed{2}.", "finish_reason": "stop"}
COMPLETION = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [GOOD],
              "usage": {"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10}}  # fmt: skip


class Scripted(BaseHTTPRequestHandler):
    """Answers the n-th completion request by `script(n, body)`: "good", a status, "html", "json", "empty", "slow", "drop"."""

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
            self.reply(act[0], json.dumps({"error": {"message": act[1], "type": "x", "code": act[0]}}))
        else:
            texts = {"html": "<html>proxy</html>", "json": '{"a": 1}', "torn": '{"choices": [', "empty": ""}
            kind = "text/html" if act == "html" else "application/json"
            self.reply(200, texts.get(act, json.dumps(COMPLETION)), kind)


@pytest.fixture()
def scripted():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.lock, server.count = threading.Lock(), 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def decoded(body: dict) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY / "model").decode(body["prompt"])


def sample(server, tmp_path, problems: int = 12, check: bool = True):
    lines = [json.dumps({"id": i, "problem": f"{i}: 1 + 1?", "answer": "2"}) for i in range(problems)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return run(1, "--data", tmp_path / "in.jsonl", "--base-url", url, "--model", "m", "--tokenizer", TINY / "model",
               "--out", tmp_path / "out.jsonl", "--concurrency", 3, check=check, timeout=120)  # fmt: skip


def test_every_fault_is_survived_and_nothing_comes_twice(scripted, tmp_path):
    faults = [(429, "slow down"), (500, "oops"), "html", "json", "torn", "empty", "slow", "drop", (503, "busy"), (408, "late")]
    scripted.script = lambda n, body: faults[n // 2 % len(faults)] if n % 2 else "good"
    sample(scripted, tmp_path)
    rows = read(tmp_path / "out.jsonl")
    assert sorted((row["id"], row["sample"]) for row in rows) == sorted((str(i), s) for i in range(12) for s in range(2))
    assert all(row["correct"] for row in rows)


def test_a_server_that_dies_keeps_what_is_written(scripted, tmp_path):
    scripted.script = lambda n, body: "good" if n <= 9 else (500, "oops")
    done = sample(scripted, tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "run the same command to go on" in done.stderr
    assert sum(": error: " in line for line in done.stderr.splitlines()) == 1
    assert len(read(tmp_path / "out.jsonl")) == 9
    scripted.script = lambda n, body: "good"
    before = scripted.count
    sample(scripted, tmp_path)
    assert len(read(tmp_path / "out.jsonl")) == 24 and scripted.count - before == 15  # only what was missing


def test_a_server_of_garbage_ends_the_run(scripted, tmp_path):
    scripted.script = lambda n, body: "json"
    done = sample(scripted, tmp_path, check=False)
    assert done.returncode == 2 and "answer with completions" in done.stderr and "Traceback" not in done.stderr


def test_a_prompt_that_is_too_long_is_a_row_and_a_wrong_key_is_an_end(scripted, tmp_path):
    refusal = (400, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens.")
    scripted.script = lambda n, body: refusal if "user\n3: 1 + 1" in decoded(body) else "good"
    done = sample(scripted, tmp_path)
    refused = [row for row in read(tmp_path / "out.jsonl") if row["finish_reason"] == "refused"]
    assert [row["id"] for row in refused] == ["3", "3"] and all(row["steps"] == [] for row in refused)
    assert "too long a prompt 8.3%" in done.stdout
    (tmp_path / "out.jsonl").unlink()
    scripted.script = lambda n, body: (401, "wrong key")
    done = sample(scripted, tmp_path, check=False)
    assert done.returncode == 2 and "AuthenticationError" in done.stderr and not (tmp_path / "out.jsonl").exists()


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
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)  # whatever the server's defaults are
