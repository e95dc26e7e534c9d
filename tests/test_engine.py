"""vLLM in the stage's process: prompts too long, errors, cancellations, seeds, and what is left
after kill -9."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
from conftest import ROOT, STAGES, TINY, keyed, read, run, stage
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow
SHORT = ["--max-tokens", 200]
# eight sequences; the rest of the cache would be zeroed at each start
SMALL = "--engine-args=--max-num-seqs 8 --max-model-len 1024 --num-gpu-blocks-override 80"
STORY = "Ava has {} apples. Then she buys {} more. How many apples does Ava have now?"
SUMS = [
    {"id": f"q{i}", "problem": STORY.format(i, i + 1), "answer": str(2 * i + 1)}
    for i in range(1, 9)
]


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompt(problem: str = SUMS[0]["problem"]) -> list[int]:
    one = stage(1)
    return one.prompt_ids(one.load_tokenizer(str(TINY / "model"), None, "{}"), problem, one.OPENING)


def test_n_continuations_come_in_order_and_repeat(vllm):
    async def both():
        return await asyncio.gather(
            *(vllm(prompt(), 7, n=4, temperature=2.0, max_tokens=60) for _ in range(2))
        )

    first, second = asyncio.run(both())
    assert first == second and len({answer["text"] for answer in first}) > 1
    assert first[0]["tokens"] > 4 and [answer["tokens"] for answer in first[1:]] == [0, 0, 0]
    assert first[0]["prompt_tokens"] == len(prompt())
    assert {answer["finish_reason"] for answer in first} <= {"stop", "length"}


def test_a_prompt_too_long_is_refused_and_the_others_go_through(vllm):
    async def both():
        return await asyncio.gather(
            vllm(prompt() * 100, 1, n=2, temperature=1.0, max_tokens=9),
            vllm(prompt(), 1, temperature=1.0, max_tokens=9),
        )

    long, short = asyncio.run(both())
    assert long == [stage(1).REFUSED] * 2 and short[0]["tokens"] == 9


def test_an_error_in_a_step_ends_the_run_in_one_line(vllm, tmp_path, monkeypatch):
    """Without a word to all that wait the run would hang. The rows so far stay, and the same
    command resumes."""
    step, steps = vllm.vllm.step, iter(range(10**6))

    def failing():
        if next(steps) == 60:
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(vllm.vllm, "step", failing)
    data, out = write(tmp_path / "in.jsonl", SUMS), tmp_path / "out.jsonl"
    arguments = ["--data", data, "--model", TINY / "model", *SHORT, "--n", 4, "--concurrency", 2]
    arguments += ["--out", out]
    done = run(1, *arguments, check=False)
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2
    assert len(lines) == 1
    assert "vLLM has failed (out of memory)" in lines[0]
    assert 0 < len(read(out)) < 32 and not vllm.vllm.has_unfinished_requests()
    run(1, *arguments)
    assert len(keyed(out, "id", "sample")) == 32


def test_a_cancelled_request_leaves_the_engine(vllm):
    """What one event loop left behind does not disturb the next."""

    async def cancelled():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                vllm(prompt(), 1, temperature=1.0, max_tokens=3000, ignore_eos=True), 0.5
            )

    asyncio.run(cancelled())
    assert not vllm.vllm.has_unfinished_requests() and not vllm.waiting

    async def left_behind():
        left = asyncio.ensure_future(
            vllm(prompt(), 1, temperature=1.0, max_tokens=3000, ignore_eos=True)
        )
        await asyncio.sleep(0.2)
        return left.done()

    assert asyncio.run(left_behind()) is False
    assert not vllm.vllm.has_unfinished_requests() and not vllm.waiting
    [answer] = asyncio.run(vllm(prompt(), 1, temperature=1.0, max_tokens=5))
    assert answer["tokens"] == 5


def test_concurrency_keeps_the_seats_full(vllm):
    args = stage(1).Args()
    assert vllm.seats == 256
    assert [stage(1).in_flight(args, vllm, n) for n in (1, 2, 20)] == [384, 384, 39]
    assert stage(1).in_flight(args, partial(stage(1).complete, None), 2) == 256, (
        "a server's seats are not known"
    )
    args.concurrency = 7
    assert stage(1).in_flight(args, vllm, 20) == 7
    # SCDPO: a request at a time from each of some starting points of a problem
    rows = [[{"correct": True, "steps": ["a", "b", "c"]}] * 4 + [{"correct": False, "steps": []}]]
    three = stage(3)
    for given, problems in (
        ({}, 96),
        ({"every_step": True}, 48),
        ({"solutions_per_problem": 1}, 384),
    ):
        scdpo = three.Args(method="scdpo", **given)
        assert three.concurrency_of(scdpo, vllm, rows * 10) == problems
    running = most = 0

    async def work(_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    asyncio.run(stage(1).run_all(list(range(9)), work, 4, ""))
    assert most == 4


def test_where_the_engine_alone_is_seeded(monkeypatch):
    """With top-p on CUDA; then its seed depends on the rows that are there."""
    one, seeds = stage(1), []
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    for options, expected in ((["on the CPU"], (True, True)), ([], (False, True))):
        monkeypatch.setattr(one, "cpu_options", lambda options=options: options)
        assert (one.seeds_requests(0.95), one.seeds_requests(1)) == expected
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert one.seeds_requests(0.95)

    def start(model, options, seed):
        seeds.append(seed)
        return SimpleNamespace(close=list)

    async def engine(rows):
        async with one.engine(one.Args(), "m", rows):
            pass

    monkeypatch.setattr(one, "Engine", start)
    for rows in (0, 1, 0):
        asyncio.run(engine(rows))
    assert seeds[0] == seeds[2] != seeds[1]


@pytest.mark.long
def test_samples_of_an_engine_that_alone_is_seeded_do_not_repeat_after_kills(tmp_path):
    """As on CUDA with top-p. A run of --until-both that is killed after each sample would, with the
    same seed of the engine, draw the same one for ever."""
    data = write(tmp_path / "in.jsonl", SUMS[:1])
    code = "import importlib, tyro; one = importlib.import_module('01_sample_errors'); "
    code += "one.seeds_requests = lambda _: False; one.main(tyro.cli(one.Args))"
    command = [sys.executable, "-c", code, "--data", data, "--model", TINY / "model"]
    command += ["--out", tmp_path / "out.jsonl", "--n", 1, "--temperature", 2.0]
    command += [SMALL, *SHORT]
    texts = []
    for most in (1, 2):  # --until-both is no setting: the next run continues, as after a kill
        subprocess.run(
            [*map(str, command), "--until-both", str(most)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        texts = [row["response"] for row in read(tmp_path / "out.jsonl")]
    assert len(texts) == len(set(texts)) > 1, texts
    assert json.loads((tmp_path / "out.jsonl.meta.json").read_text())["seeded_requests"] is False


def test_two_models_in_one_process_and_in_two(tmp_path):
    """05 on the CPU has both models in its process, on a GPU each has its own: the same rows, of
    each model its own."""
    shutil.copytree(TINY / "model", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 0.5
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(f"Solve this.\n{template.read_text()}")
    common = ["--data", TINY / "validation.jsonl", "--limit", 8, *SHORT]
    common += ["--models", TINY / "model", f"tuned={tmp_path}/other", SMALL]
    done = run(5, *common, "--out", tmp_path / "one")
    assert "the models have different prompts" in done.stderr
    apart = stage(5).in_own_process
    with mock.patch.object(stage(5), "in_own_process", wraps=apart) as started:
        done = run(5, *common, "--out", tmp_path / "two", "--own-process")
    assert started.call_count == 2 and "| tuned |" in done.stdout
    texts = [
        {row["id"]: row["response"] for row in read(path)}
        for path in (tmp_path / "one" / "validation").glob("*.jsonl")
    ]
    assert len(texts) == 2 and texts[0].keys() == texts[1].keys() and texts[0] != texts[1]
    for path in (tmp_path / "one" / "validation").glob("*.jsonl"):
        assert keyed(path, "id", "sample") == keyed(
            tmp_path / "two" / "validation" / path.name, "id", "sample"
        )
    again = run(5, *common, "--out", tmp_path / "two")
    assert "starting vLLM" not in again.stderr


# -------------------------------------------------------------------------------------------------
# processes

# answers that start the grading workers
ALGEBRA = [
    {"id": f"a{i}", "problem": SUMS[0]["problem"], "answer": "\\frac{x}{y}"} for i in range(400)
]
STEP = "Let's think step by step.\nStep 1: 8."
WRONG = {
    "sample": 0,
    "finish_reason": "stop",
    "correct": False,
    "prediction": "8",
    "response": STEP,
    "steps": [STEP],
}
# a background job's children ignore Ctrl-C
HEED = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
MANY = ["--temperature", 1.0, SMALL, *SHORT]
COMMANDS = {
    1: ["--n", 4, "--model", TINY / "model"],
    2: ["--model", TINY / "model"],
    3: ["--model", TINY / "model"],
    5: ["--samples", 4, "--models", TINY / "model"],
}


def start(number: int, tmp_path, *options) -> subprocess.Popen:
    """A generating stage with an hour of work."""
    rows = ALGEBRA if number in (1, 5) else [row | WRONG | {"error_step": 1} for row in ALGEBRA]
    source = "--data" if number in (1, 5) else "--samples" if number == 2 else "--located"
    command = [
        sys.executable,
        f"{STAGES[number]}.py",
        source,
        write(tmp_path / "in.jsonl", rows),
        *COMMANDS[number],
        "--out",
        tmp_path / ("out" if number == 5 else "out.jsonl"),
        *MANY,
        *options,
    ]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=HEED,
    )


def wait_for(process: subprocess.Popen, words: str):
    assert any(words in line for line in process.stderr), words


def wait_until(process: subprocess.Popen, what):
    deadline = time.time() + 90
    while not what():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)


def killed(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that a stage had, of which none may live on after its end."""
    family = psutil.Process(process.pid).children(recursive=True)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    deadline, alive = time.time() + 30, family  # one second where the machine is idle
    while alive and time.time() < deadline:
        time.sleep(0.05)
        alive = [
            each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE
        ]
    assert not alive, alive
    return family


# the engine and the grader of the others are copies
@pytest.mark.parametrize(
    "number", [1, *(pytest.param(number, marks=pytest.mark.long) for number in (2, 5))]
)
def test_kill_leaves_nothing(started, number, tmp_path):
    """kill -9 when the grading workers have begun: vLLM is in the stage's own process."""
    started.append(process := start(number, tmp_path))
    wait_for(process, "vLLM is ready")
    wait_until(
        process,
        lambda: any(path.stat().st_size for path in tmp_path.rglob("*.jsonl") if path.stem != "in"),
    )
    assert killed(process), "it had no processes of its own"


@pytest.mark.long
@pytest.mark.parametrize("options", ["--data-parallel-size 2", "--tensor-parallel-size 2"])
def test_kill_of_several_workers_leaves_nothing(started, options, tmp_path, monkeypatch):
    """Replicas and the parts of a model have processes of their own, which the watcher ends, also
    while they start."""
    if "tensor" in options:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    for words in ("starting vLLM", "vLLM is ready"):
        started.append(process := start(1, tmp_path, f"{SMALL} {options}"))
        wait_for(process, words)
        wait_until(
            process, lambda pid=process.pid: len(psutil.Process(pid).children(recursive=True)) > 2
        )
        assert len(killed(process)) >= 3


def test_ctrl_c_keeps_the_rows(started, tmp_path):
    started.append(process := start(1, tmp_path))
    wait_for(process, "vLLM is ready")
    wait_until(process, lambda: (tmp_path / "out.jsonl").stat().st_size)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(30) == 130 and "run the same command" in said and "Traceback" not in said, (
        said
    )
    assert read(tmp_path / "out.jsonl")


PROCESSBENCH = [sys.executable, "analysis/processbench.py", "--data-dir", "OUT", "--files", "in"]
PROCESSBENCH += ["--out", "OUT/out", "--", "--locator", "rollout", "--model", str(TINY / "model")]


@pytest.mark.parametrize(
    "command, kind, status",
    [
        (["bash", "experiments/iterate.sh"], signal.SIGTERM, 130),
        (["bash", "recipes/quickstart.sh"], signal.SIGINT, 130),
        (PROCESSBENCH, signal.SIGTERM, 143),
    ],
)
def test_a_stopped_script_takes_its_stage_along(started, command, kind, status, tmp_path):
    """The signal comes to the script alone, as from a job scheduler, while an engine is
    starting."""
    row = {"id": "a", "problem": "1 + 1?", "answer": "2", "steps": ["3", "3"], "label": 0}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    environment = os.environ | {
        "OUT": str(tmp_path),
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    with open(tmp_path / "said.log", "w") as said:
        process = subprocess.Popen(
            [part.replace("OUT", str(tmp_path)) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=HEED,
        )
    started.append(process)
    # iterate.sh has a log for each run
    wait_until(
        process,
        lambda: any("starting vLLM" in path.read_text() for path in tmp_path.rglob("*.log")),
    )
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(kind)
    assert process.wait(30) == status
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
