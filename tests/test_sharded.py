"""04 under FSDP2 and ZeRO-3, two processes on the CPU through the committed configurations
(tests/sharded_cpu.py): weights of one process, files that load, checkpoints that survive kills.
fp32, so that equal means equal."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, TINY, read, run, stage
from safetensors.torch import load_file
from test_train import pair
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
# DeepSpeed compiles its CPU AdamW here. A compilation that is killed leaves a lock, for which
# the next one waits for ever: so they have a folder of their own, and world() removes the lock.
EXTENSIONS = Path(sys.prefix) / "torch_extensions"
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models whose matrices ZeRO-3 really parts (100,000 elements or more), pairs,
    and one process's results.

    One pair has more suffix tokens than tests/sharded_cpu.py allows a chunk: both processes call
    the head twice then."""
    for lock in EXTENSIONS.glob("*/lock"):
        lock.unlink()
    folder = tmp_path_factory.mktemp("sharded")
    for name in ("tied", "untied"):
        config = AutoConfig.from_pretrained(TINY / "model")
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 384, 768, 2
        config.num_attention_heads, config.num_key_value_heads = 6, 2
        config.layer_types, config.tie_word_embeddings = ["full_attention"] * 2, name == "tied"
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else None
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder / name)
    rows = [pair(n, last=n % 3 == 0) for n in range(19)]
    rows.append(pair(99) | {"rejected": " So" + " 3 + 4 = 7," * 190 + " and so on.\n"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done: dict[tuple, Path] = {}

    def one(model: str, *more) -> Path:
        if (model, *more) not in done:
            done[model, *more] = folder / f"one-{len(done)}"
            run(4, *arguments(folder, model, done[model, *more]), *more)
        return done[model, *more]

    return folder, one


def arguments(folder: Path, model: str, out: Path) -> list:
    return [
        "--data",
        folder / "pairs.jsonl",
        "--model",
        folder / model,
        "--out",
        out,
        "--precision",
        "fp32",
        "--epochs",
        2,
        "--batch-size",
        7,
        "--lr",
        1e-4,
        "--max-length",
        4096,
        "--tokens-per-batch",
        2600,
        # with 0.4 the loss falls to 1e-7, where Adam makes steps of rounding errors
        "--beta",
        0.02,
    ]


def launch(config: str, *given, machine: tuple = ()) -> list[str]:
    """`machine`: options of accelerate that tell one of several which it is."""
    accelerate = ["accelerate.commands.launch", "--config_file", f"configs/{config}.yaml"]
    accelerate += ["--num_processes", "2", *(machine or ("--main_process_port", "0"))]
    more = ["--mixed_precision", "no", "tests/sharded_cpu.py", *given]
    return [sys.executable, "-m", *map(str, [*accelerate, *more])]


def start(config: str, *given, stderr: int) -> subprocess.Popen:
    return subprocess.Popen(
        launch(config, *given),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def train(config: str, *given) -> str:
    process = start(config, *given, stderr=subprocess.PIPE)
    try:
        said = process.communicate(timeout=600)[1]
    except subprocess.TimeoutExpired:
        kill_all(given)
        said = process.communicate()[1]
    finally:
        kill_all(given)  # Ctrl-C does not reach another session
    assert process.returncode == 0, said[-4000:]
    return said


def kill_all(given):
    """End the processes of a launch; workers have sessions of their own."""
    out = str(given[list(given).index("--out") + 1])
    for worker in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            worker.kill() if out in worker.cmdline() else None


def weights(folder: Path) -> dict:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def same(ours: Path, theirs: Path, base: Path):
    """The same names and, within 1e-5, the same weights, which training has moved by far more; and
    they load."""
    a, b, start = weights(ours), weights(theirs), weights(base)
    assert set(a) == set(b)
    difference = max((a[name] - b[name]).abs().max() for name in a)
    assert difference < 1e-5, difference
    if not list(ours.glob("adapter_config.json")):
        assert max((a[name] - start[name]).abs().max() for name in a) > 2e-4
        loaded = AutoModelForCausalLM.from_pretrained(ours)
        assert len(a) == len(list(loaded.named_parameters()))
        assert torch.equal(loaded.model.norm.weight, a["model.norm.weight"])


def same_metrics(ours: Path, theirs: Path):
    """The same lines, with the gradient's norm of all shards."""
    lines = (read(folder / "metrics.jsonl") for folder in (ours, theirs))
    for our_line, their_line in zip(*lines, strict=True):
        for name in ("loss", "margin", "chosen_logp", "grad_norm"):
            assert our_line[name] == pytest.approx(their_line[name], rel=1e-3, abs=1e-5), name


@pytest.mark.long  # DeepSpeed compiles its CPU AdamW
def test_offloaded_weights_are_those_of_one_process(world, tmp_path):
    folder, one = world
    said = train("zero3_offload", *arguments(folder, "untied", tmp_path / "out"))
    expected = one("untied")
    same(tmp_path / "out", expected, folder / "untied")
    same_metrics(tmp_path / "out", expected)
    assert "first loss" not in said  # ln 2


@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_bf16_keeps_fp32_log_probabilities(world, tmp_path, config):
    """The configurations' own precision. Sums of log-probabilities that were rounded to 8 bits
    would be off by up to 0.4 % each and all of them multiples of 2^-8 or more; the reference's file
    tells."""
    import numpy as np

    folder, one = world
    # emulated bf16 is slow
    few = "".join(json.dumps(row) + "\n" for row in read(folder / "pairs.jsonl")[:6])
    (folder / "few.jsonl").write_text(few)
    more = ["--precision", "bf16", "--lr", 1e-3, "--data", folder / "few.jsonl"]
    train(config, *arguments(folder, "tied", tmp_path / "out"), *more)
    expected = one("tied", *more)
    ours, theirs = (
        np.load(next(path.glob("reference-*.npy"))) for path in (tmp_path / "out", expected)
    )
    assert ours.dtype == np.float32
    assert not np.array_equal(ours, torch.from_numpy(ours).bfloat16().float().numpy())
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    first, last = (read(tmp_path / "out" / "metrics.jsonl")[place] for place in (0, -1))
    assert first["loss"] == pytest.approx(0.6931, abs=0.02) and last["loss"] < first["loss"]
    start, tuned = weights(folder / "tied"), weights(tmp_path / "out")
    assert max((tuned[name].float() - start[name]).abs().max() for name in tuned) > 5e-4


@pytest.mark.parametrize(
    "config, save",
    [pytest.param("fsdp2", "merged", marks=pytest.mark.long), ("zero3", "adapter")],
)
def test_adapters_are_saved_from_shards(world, tmp_path, config, save):
    folder, one = world
    lora = ["--lora-rank", 4, "--lr", 1e-3, "--lora-save", save]
    train(config, *arguments(folder, "tied", tmp_path / "out"), *lora)
    same(tmp_path / "out", one("tied", *lora), folder / "tied")


def test_a_kill_within_a_sharded_checkpoint_changes_no_weight(world, tmp_path):
    """ZeRO-3; FSDP2's is test_one_of_two_machines_is_killed. Every process is killed while a
    checkpoint is being written; the same command resumes from the one before it. In the end the
    weights are those of one process."""
    folder, one = world
    given = [*arguments(folder, "tied", tmp_path / "out"), "--save-steps", 1]
    process = start("zero3", *given, stderr=subprocess.DEVNULL)
    deadline, out = time.time() + 120, tmp_path / "out"
    while not ((out / "checkpoint-1").exists() and list(out.glob("writing-checkpoint*"))):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kill_all(given)
    kept = sorted(path.name for path in out.glob("checkpoint-*"))
    said = train("zero3", *given)
    assert f"resuming from {out / kept[-1]}" in said
    same(out, one("tied"), folder / "tied")
    same_metrics(out, one("tied"))


def test_one_of_two_machines_is_killed(world, tmp_path, started):
    """multi_node.yaml (FSDP2), a launch for each machine. The first, whose address both are given,
    is killed while a checkpoint is being written; the other ends with an error; the same two
    commands resume from the one before it."""
    folder, one = world
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--main_process_ip", "127.0.0.1", "--main_process_port", free.getsockname()[1]]
    address += ["--rdzv_conf", "timeout=120"]
    logs = [tmp_path / f"machine-{rank}.log" for rank in (0, 1)]

    def start():
        for rank, log in enumerate(logs):
            given = [*arguments(folder, "untied", out), "--save-steps", 1]
            command = launch("multi_node", *given, machine=("--machine_rank", rank, *address))
            with open(log, "w") as file:
                started.append(
                    subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
                )
        return started[-2:]

    def said():
        return "".join(log.read_text()[-3000:] for log in logs)

    (first, second), deadline = start(), time.time() + 120
    while not ((out / "checkpoint-1").exists() and list(out.glob("writing-checkpoint*"))):
        assert time.time() < deadline and first.poll() is None and second.poll() is None, said()
        time.sleep(0.002)
    first_workers, second_workers = (
        psutil.Process(machine.pid).children(recursive=True) for machine in (first, second)
    )
    started += second_workers
    for process in (*first_workers, first):
        process.kill()
    assert second.wait(60) == 1 and "by peer" in logs[1].read_text(), said()  # reset, or closed
    assert not (out / "model.safetensors").exists()
    assert [machine.wait(120) for machine in start()] == [0, 0], said()
    assert f"resuming from {out}/checkpoint-" in logs[0].read_text()
    same(out, one("untied"), folder / "untied")
    same_metrics(out, one("untied"))


def test_other_weights_have_another_hash(world, tmp_path):
    """Under ZeRO-3 the weights in a process are empty: the cache's name comes from the files."""
    folder, _ = world
    shutil.copytree(folder / "tied", tmp_path / "other")
    state = load_file(tmp_path / "other" / "model.safetensors")
    from safetensors.torch import save_file

    state["model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(state, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    hashes = [
        stage(4).weights_hash(str(path))
        for path in (folder / "tied", tmp_path / "other", folder / "tied")
    ]
    assert hashes[0] == hashes[2] != hashes[1]
