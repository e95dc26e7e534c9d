"""Fixtures: the stages as modules, a small random model, and one vLLM server for the whole
session."""

import ast
import contextlib
import ctypes
import functools
import importlib.util
import io
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import httpx
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny"
folders = (".", "analysis", "experiments", "benchmarks", "data", "serving")
sys.path[:0] = [str(ROOT / folder) for folder in folders]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
# GiB, zeroed at each start: 4 take 12 s where pages are slow to come
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
STAGES = {
    1: "01_sample_errors",
    2: "02_locate_step",
    3: "03_rectify",
    4: "04_train_stepdpo",
    5: "05_eval",
}


def stage(number: int):
    return importlib.import_module(STAGES[number])


def run(
    script: int | str, *arguments, check: bool = True, **options
) -> subprocess.CompletedProcess:
    """Run a stage, or a script of analysis/ or experiments/, as a user does; on an unexpected exit
    status show what it said. What is given `options` of subprocess.run() has a process; all else
    runs here, ten times faster."""
    command = list(map(str, arguments))
    if not options:
        done = run_here(module_of(script), command)
    else:
        done = subprocess.run(
            [sys.executable, module_of(script).__file__, *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            **{"timeout": 900, **options},
        )
    assert not check or done.returncode == 0, (
        f"{script} {command} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    )
    return done


def module_of(script: int | str):
    return importlib.import_module(STAGES.get(script, script))


@functools.cache
def main_block(path: str):
    return compile(ast.Module(ast.parse(Path(path).read_text()).body[-1].body, []), path, "exec")


def accelerate_ends():
    """What the end of a process gives back: another training may start otherwise."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


@functools.cache
def code_versions() -> dict:
    """Of 01, once: git and the packages are asked in each run otherwise."""
    return stage(1).code_versions()


def run_here(module, command: list[str]) -> subprocess.CompletedProcess:
    """A script in this process: what stands under its `if __name__ == "__main__"`. One that would
    start an engine gets that of the session for this folder."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    accelerate_ends()
    for value in list(vars(module).values()):
        if value.__class__.__name__ == "_lru_cache_wrapper":  # what it warned of once
            value.cache_clear()
    engine, versions = partial(shared_engine, getattr(module, "Engine", None)), code_versions()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(ROOT),
        mock.patch.object(sys, "argv", [module.__file__, *command]),
        mock.patch.object(module, "Engine", engine, create=True),
        mock.patch.object(module, "code_versions", lambda: versions, create=True),
        mock.patch.object(module, "run_script", run_script, create=True),
        # 04 would end the one of vLLM
        mock.patch.object(PartialState, "destroy_process_group", lambda *_: None),
    ):
        try:
            exec(main_block(module.__file__), vars(module))
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                err.write(status)
                status = 1
        finally:
            accelerate_ends()
            if lock := getattr(getattr(module, "lock_out", None), "file", None):
                lock.close()
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def edited(folder, number: int, old: str, new: str):
    """A copy of a stage in which `old` became `new`."""
    source = (ROOT / f"{STAGES[number]}.py").read_text()
    assert source.count(old) == 1
    script = folder / f"{STAGES[number]}.py"
    script.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    loaded = mock.patch.dict(sys.modules, {script.stem: module})
    with loaded, mock.patch.object(sys, "dont_write_bytecode", True):
        spec.loader.exec_module(module)
        yield module


def run_edited(folder, number: int, old: str, new: str, *arguments):
    with edited(folder, number, old, new) as module:
        return run_here(module, list(map(str, arguments)))


def run_script(path: str, *arguments):
    """What processbench.py starts, here."""
    name = Path(path).stem
    numbers = {script: number for number, script in STAGES.items()}
    done = run_here(module_of(numbers.get(name, name)), list(map(str, arguments)))
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    if done.returncode:
        sys.exit(done.returncode)


def shared_engine(start, model: str, options: str = "", seed: int = 0):
    """The session's engine of this model, which the first that asks for it starts. close() leaves
    it as it is, since the end of one takes the others of the process along."""
    options = options or "--max-num-seqs 256 --max-model-len 4096"
    if (model, options) not in ENGINES:
        ENGINES[model, options] = start(model, options, seed=0)
        ENGINES[model, options].close = lambda: None
        for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD"):  # vLLM sets them; 04 reads the first
            os.environ.pop(name, None)
    return ENGINES[model, options]


ENGINES = {}


def run_killed(number: int, *arguments, journal: Path, kills: int, seed: int, torn: bytes = b""):
    """Start a stage and kill -9 it soon after its journal has grown, `kills` times; `torn` ends the
    journal then, as a kill within a write would, which a real one only rarely does."""
    moments = random.Random(seed)

    def size():
        return journal.stat().st_size if journal.exists() else 0

    for _ in range(kills):
        before = size()
        process = subprocess.Popen(
            [sys.executable, f"{STAGES[number]}.py", *map(str, arguments)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and size() <= before:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it had ended by itself"
        if torn:
            with open(journal, "ab") as file:
                file.write(torn)


@pytest.fixture(scope="session")
def vllm():
    """One engine with the bundled model for all tests of this process."""
    return shared_engine(stage(1).Engine, str(TINY / "model"))


@pytest.fixture(scope="session")
def bundled():
    """Arguments that give stages 01 to 03 the bundled model, by the session's engine."""
    return ["--model", str(TINY / "model")]


@pytest.fixture()
def started():
    """A list for the test's processes, which are ended with all that they have started, also where
    the test fails."""
    processes = []
    yield processes
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
        process.wait(30)


SHARED = {"files", "samples", "world"}  # fixtures that are costly to make
LONGEST = ("quickstart_recipe", "two_models", "kill_at_any_moment", "many_pairs", "training_a_prm")


def pytest_itemcollected(item):
    """Tests that share something costly, or look at all processes, go to one worker (--dist
    loadgroup)."""
    fixtures = set(getattr(item, "fixturenames", ()))
    if "server" in fixtures or "test_server" in item.nodeid or "test_pairs" in item.nodeid:
        item.add_marker(pytest.mark.xdist_group("server"))
    elif SHARED & fixtures or "test_code" in item.nodeid:
        item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The groups first, then what takes longest alone; at the end, where a worker may have nothing
    left to do, what takes no time."""

    def rank(item):
        if any(item.iter_markers("xdist_group")):
            return 0
        if any(name in item.name for name in LONGEST):
            return 1
        return 2 if any(item.iter_markers("slow")) else 3

    items.sort(key=rank)


def read(path) -> list[dict]:
    """Rows of a JSON Lines file; splitlines() would part them at U+2028 too."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def keyed(path, *fields) -> dict:
    """Rows by key; a key that comes twice, or a torn line, fails."""
    rows = read(path)
    found = {tuple(row[field] for field in fields): row for row in rows}
    assert len(found) == len(rows)
    return found


def end_with_the_tests():
    """Linux sends the server SIGTERM when pytest is gone, also by kill -9."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def scripted_server(handler, **state):
    """An HTTP server in this process, with `state` as its attributes.

    A client that ends resets its connections; http.server would print a traceback for each, into
    the stderr that the tests look at.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None
    vars(server).update(state)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serving(model, log: Path, *options: str):
    """A vLLM server of its own, as a user starts one: yields its address and its key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1"]
    command += [
        "--port",
        str(port),
        "--disable-uvicorn-access-log",
        *stage(1).cpu_options(),
        *options,
    ]
    key, url = secrets.token_hex(16), f"http://127.0.0.1:{port}/v1"
    # the engine in the server's process: one import of vLLM fewer
    environment = os.environ | {"VLLM_API_KEY": key, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=environment,
            preexec_fn=end_with_the_tests,
        )
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(
                    f"{url}/models", headers={"Authorization": f"Bearer {key}"}, timeout=5
                ).is_success:
                    break
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url, key
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@contextlib.contextmanager
def serving_code(model, log: Path, *options: str):
    """serving/code_server.py as a user starts it: yields its address, its key and its process."""
    command = [sys.executable, str(ROOT / "serving" / "code_server.py"), "--model", str(model)]
    command += ["--port", "0", *options]
    environment = os.environ | {"OPENAI_API_KEY": (key := secrets.token_hex(16))}
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
            preexec_fn=end_with_the_tests,
        )
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: --base-url "), log.read_text()[-3000:]
        yield line.split()[-1], key, process
    finally:
        process.terminate()
        process.wait()


PENALTIES = {
    "repetition_penalty": 1.05,
    "top_k": 20,
    "top_p": 0.8,
    "temperature": 0.7,
    "do_sample": True,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def penalized(tmp_path_factory):
    """The bundled model with a generation_config.json that no stage may sample by."""
    folder = tmp_path_factory.mktemp("penalized") / "model"
    shutil.copytree(TINY / "model", folder)
    (folder / "generation_config.json").write_text(json.dumps(PENALTIES))
    return folder


@pytest.fixture(scope="session")
def server(penalized, tmp_path_factory):
    """Arguments that point stages 01 to 03 at one real vLLM server with the bundled model; what
    this would sample by itself is not what a stage asks for."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    options = ["--generation-config", "auto", "--served-model-name", str(TINY / "model")]
    with serving(penalized, log, "--max-num-seqs", "256", *options) as (url, key):
        os.environ["OPENAI_API_KEY"] = key
        yield ["--base-url", url, "--model", str(TINY / "model")]


@pytest.fixture()
def small_model(tmp_path):
    """A folder with the bundled tokenizer and a random model, larger weights than usual so that
    outputs differ."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(TINY / "model")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 2
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    config.layer_types = ["full_attention"] * 2
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(tmp_path / "model")
    return tmp_path / "model"
