"""From problems to tables and pictures on the bundled world, at a small size: the recipes, and
solutions with code."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from conftest import ROOT, TINY, read, run, run_killed, serving_code, stage
from test_code import SAFE, killed_with_endless_blocks


def recipe(*arguments, **settings):
    command = ["bash", "experiments/ablation_tiny.sh", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )


@pytest.mark.slow
def test_quickstart_recipe_end_to_end(tmp_path):
    """The five stages as `make quickstart` runs them, on fewer problems."""
    environment = os.environ | {
        "OUT": str(tmp_path),
        "PROBLEMS": "48",
        "TEST_PROBLEMS": "30",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "recipes/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())["benchmarks"]["test"]
    base, tuned = summary["models"].values()
    assert summary["problems"] == 30 and "p" in tuned and 0.3 < base["accuracy"] < 0.95
    text = (tmp_path / "results" / "report.md").read_text()
    assert "| test (30) |" in text
    assert "![accuracy](accuracy.png)" in text
    assert (tmp_path / "results" / "report.html").exists()
    assert "Where the time went" in done.stdout
    last = json.loads((tmp_path / "model-0" / "training.json").read_text())["last"]
    assert last["step"] >= 2 and last["margin"] > 0
    assert (tmp_path / "model-0" / "model.safetensors").exists()


@pytest.mark.slow
def test_code_from_problems_to_report(tmp_path, monkeypatch):
    """The bundled model that writes code, by a real server and interpreter, 01 killed once; SCDPO's
    pairs; an evaluation. Then the server is killed, and nothing of it is left."""
    with serving_code(
        TINY / "code", tmp_path / "log", "--engine-args=--max-model-len 1024", *SAFE
    ) as (url, key, server):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        code_to_report(url, tmp_path)
        killed_with_endless_blocks(server, url, key)


def code_to_report(url: str, tmp_path: Path):
    model = TINY / "code"
    manner = ["--opening=", "--split", "blocks", "--max-tokens", 64, "--base-url", url]
    samples = ["--data", TINY / "train.jsonl", "--limit", 30, "--n", 4, "--model", model, *manner]
    run_killed(
        1,
        *samples,
        "--out",
        tmp_path / "s.jsonl",
        journal=tmp_path / "s.jsonl",
        kills=1,
        seed=1,
        torn=b'{"id": "t',
    )
    run(1, *samples, "--out", tmp_path / "s.jsonl")
    rows = read(tmp_path / "s.jsonl")
    assert len(rows) == len({(row["id"], row["sample"]) for row in rows}) == 120
    ran = 0
    for row in rows:
        assert "".join(row["steps"]) == row["response"] and row["rounds"] <= 64
        for code, output in zip(row["blocks"], row["blocks"][1:], strict=False):
            if code["type"] == "code" and re.fullmatch(
                r"\d+ (?:[-+*]|//) [1-9]\d*", code["content"]
            ):
                a, sign, b = code["content"].split()
                value = {
                    "+": int(a) + int(b),
                    "-": int(a) - int(b),
                    "*": int(a) * int(b),
                    "//": int(a) // int(b),
                }[sign]
                assert output == {"type": "execution", "content": str(value)}
                ran += 1
    assert ran > 100 and sum(row["correct"] for row in rows) > 20
    options = ["--method", "scdpo", "--samples", tmp_path / "s.jsonl", "--model", model]
    options += ["--out", tmp_path / "p.jsonl", *manner]
    run(3, *options)
    pairs = read(tmp_path / "p.jsonl")
    for pair in pairs:
        prefix = pair["initial_reason_steps"]
        assert prefix.endswith("<|endofblock|>")
        assert not re.search(r"<\|code\|>[^|]*<\|endofblock\|>$", prefix)
        assert prefix + pair["chosen"] == pair["full_chosen"]
        assert prefix + pair["rejected"] == pair["full_rejected"]
        assert len(stage(1).blocks_of(pair["chosen"])) >= 2
    assert pairs
    options = ["--data", TINY / "test.jsonl", "--limit", 10, "--models", model]
    options += ["--out", tmp_path / "results", *manner]
    run(5, *options)
    assert "| rounds | executions | failures |" in (tmp_path / "results" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_ablation(server, tmp_path):
    sizes = {
        "WORLD": str(TINY),
        "BASE_URL": server[1],
        "OUT": str(tmp_path),
        "SEEDS": "0",
        "METHODS": "step-dpo",
        "PROBLEMS": "150",
        "TEST": "80",
        "GRID": "1e-4:1",
    }
    done = recipe(**sizes, PAIRS="40")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = ("dpo", "scdpo", "step-dpo", "dpo-tokens", "step-dpo.validation", "dpo.validation")
    rows = {name: read(tmp_path / "pairs" / f"{name}.jsonl") for name in names}
    assert (
        len(rows["dpo"])
        == len(rows["scdpo"])
        == len(rows["step-dpo"])
        > 20
        > len(rows["dpo-tokens"])
        > 0
    )
    assert {row["method"] for row in rows["scdpo"]} == {"dpo", "scdpo"}
    for name in ("step-dpo", "dpo"):
        assert not {row["id"] for row in rows[name]} & {
            row["id"] for row in rows[f"{name}.validation"]
        }

    def length(name):
        return sum(len(row["chosen"]) + len(row["rejected"]) for row in rows[name])

    assert 0.5 < length("dpo-tokens") / length("step-dpo") < 1.3  # characters, for tokens
    table = (tmp_path / "table.md").read_text()
    found = json.loads((tmp_path / "greedy" / "summary.json").read_text())["benchmarks"]["test"][
        "models"
    ]
    assert f"| base | | | | {found['base']['accuracy']:.1%} (" in table
    [line] = [
        line for line in table.split("\n") if line.startswith("| Step-DPO | ") and "1e-4, 1" in line
    ]
    assert f" {found['step-dpo']['accuracy']:.1%} (" in line
    assert f"| {len(rows['step-dpo'])} |" in line
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    made = (tmp_path / "models" / "step-dpo_1e-4_1-0" / "model.safetensors").stat().st_mtime_ns
    again = recipe(**sizes, PAIRS="40")
    assert again.returncode == 0 and (tmp_path / "table.md").read_text() == table, again.stderr[
        -2000:
    ]
    assert (
        tmp_path / "models" / "step-dpo_1e-4_1-0" / "model.safetensors"
    ).stat().st_mtime_ns == made, "not trained again"
    other = recipe(**sizes, PAIRS="30")
    assert other.returncode == 2 and "40 pairs" in other.stderr and "30 pairs" in other.stderr


def test_the_72b_recipe_looks_for_deepspeed_before_sampling(tmp_path):
    """A Python that has no packages: no stage is begun."""
    (tmp_path / "python").write_text(
        f'#!/bin/sh\necho "$@" >>"{tmp_path}/calls"\nexec "{sys.executable}" -S "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(tmp_path),  # its python is taken, and not that of .venv
        "OUT": str(tmp_path / "out"),
    }
    done = subprocess.run(
        ["bash", "recipes/step_dpo_qwen2_72b.sh"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "needs deepspeed: pip install deepspeed" in done.stderr
    assert "01_sample" not in (tmp_path / "calls").read_text()


def test_ablation_wrong_argument():
    done = recipe("--fast")
    assert done.returncode == 2 and "--quick" in done.stderr


FAKE_PYTHON = """
import pathlib, shlex, sys
words = sys.argv[1:]
with open("calls", "a") as file:
    file.write(shlex.join(words) + "\\n")
after = lambda name: pathlib.Path(words[words.index(name) + 1])
if "--keep-rollouts" in words and "judge" not in words:
    after("--keep-rollouts").touch()
if words[0].startswith("04"):
    after("--out").mkdir(parents=True)
    (after("--out") / "training.json").touch()
if words[0].startswith("05"):
    after("--out").mkdir(parents=True, exist_ok=True)
    (after("--out") / "summary.json").touch()
if "choose" in words:
    rates = words[words.index("--rates") + 1 : words.index("--seed")]
    rate = rates[len(rates) // 2]
    (pathlib.Path(words[2]) / f"{after('--method')}.rate").write_text(rate + "\\n")
"""


def small_model(tmp_path, *arguments, **settings):
    """The recipe with a Python that only notes what it is called with: its commands, as lists, and
    how it ended."""
    (tmp_path / "recipes").mkdir(exist_ok=True)
    shutil.copy(ROOT / "recipes" / "small_model.sh", tmp_path / "recipes")
    (tmp_path / "fake.py").write_text(FAKE_PYTHON)
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -S "{tmp_path}/fake.py" "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OUT": "out", **settings}
    command = ["bash", str(tmp_path / "recipes" / "small_model.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    return [shlex.split(line) for line in calls.read_text().splitlines()], done


def test_small_model_commands(tmp_path):
    """Every command has options that the stage takes; the counts; a second call makes nothing
    again."""
    calls, done = small_model(tmp_path, SEEDS="0 1", MODEL="base-model")
    assert done.returncode == 0, done.stderr

    def of(number):
        return [
            tyro.cli(stage(number).Args, args=call[1:])
            for call in calls
            if call[0].startswith(f"0{number}_")
        ]

    [samples], [located], pairs, trained, evaluated = map(of, range(1, 6))
    assert (samples.limit, samples.n, samples.temperature, samples.top_p, samples.max_tokens) == (
        750,
        4,
        0.7,
        1,
        512,
    )
    assert (located.rollouts, located.temperature, located.top_p, located.max_tokens) == (
        16,
        0.7,
        1,
        512,
    )
    assert [args.method for args in pairs] == ["step-dpo", "dpo", "scdpo"] and pairs[0].n == 8
    assert pairs[0].rollouts == located.keep_rollouts
    assert {args.model for args in trained} == {"base-model"}
    methods = ["step-dpo", "dpo", "sft", "scdpo"]
    assert [args.out.name.rsplit("-", 3)[0] for args in trained[::4]] == methods
    assert [(args.lr, args.seed) for args in trained[:4]] == [
        (1e-6, 0),
        (3e-6, 0),
        (1e-5, 0),
        (3e-6, 1),
    ]
    assert [args.objective for args in trained] == ["dpo"] * 8 + ["sft"] * 4 + ["dpo"] * 4
    assert {args.beta for args in trained if args.objective == "dpo"} == {0.4}
    tests = [args for args in evaluated if args.out.name == "test"]
    assert len(trained) == 16 and len(evaluated) - len(tests) == 1 + 12 and len(tests) == 4
    assert [name.split("=")[0] for name in tests[-1].models] == ["base", *methods]
    assert tests[-1].models[2] == "dpo=out/models/dpo-3e-6-0,out/models/dpo-3e-6-1"
    calls, done = small_model(tmp_path, SEEDS="0 1", MODEL="base-model")
    assert done.returncode == 0
    assert {call[0][:2] for call in calls} == {"05", "an", "ex"}
    assert not of(4)
    assert all(args.out.name == "test" for args in of(5))


def test_small_model_single_rate(tmp_path):
    """With one rate a method there is nothing to choose: nothing answers validation problems."""
    calls, done = small_model(tmp_path, RATES="3e-6", SFT_RATES="1e-5", METHODS="dpo sft")
    assert done.returncode == 0, done.stderr
    outs = [call[call.index("--out") + 1] for call in calls if call[0][:2] in ("04", "05")]
    assert outs == ["out/models/dpo-3e-6-0", "out/test", "out/models/sft-1e-5-0", "out/test"]
    [choose] = [call for call in calls if "choose" in call and "dpo" in call]
    assert choose[:2] == ["experiments/small_model.py", "choose"]
    run("small_model", "choose", tmp_path / choose[2], *choose[3:])
    assert (tmp_path / "out" / "dpo.rate").read_text() == "3e-6\n"


def test_the_best_rate_is_chosen_and_p_are_corrected(tmp_path):
    rates = {"1e-6": 0.3, "3e-6": 0.5, "1e-5": 0.4}
    for rate, accuracy in rates.items():
        folder = tmp_path / "validation" / f"dpo-{rate}-0"
        folder.mkdir(parents=True)
        benchmarks = {"validation": {"models": {folder.name: {"accuracy": accuracy}}}}
        (folder / "summary.json").write_text(json.dumps({"benchmarks": benchmarks}))
    run("small_model", "choose", tmp_path, "--method", "dpo", "--rates", *rates)
    assert (tmp_path / "dpo.rate").read_text() == "3e-6\n"
    from ablation_table import holm

    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def test_small_model_parts(tmp_path):
    """Parts one by one; a server; other settings in the same folder."""
    server = {"BASE_URL": "http://host/v1", "CONCURRENCY": "200", "METHODS": "step_dpo"}
    calls, _ = small_model(tmp_path, "data", **server)
    asks = [call for call in calls if call[0][:2] in ("01", "02", "03") and "dpo" not in call]
    assert len(asks) == 4
    assert all(call[call.index("--base-url") + 1] == "http://host/v1" for call in asks)
    assert all(call[call.index("--concurrency") + 1] == "200" for call in asks)
    assert small_model(tmp_path, "data", **server)[0] == []
    [call, picture], _ = small_model(tmp_path, "train", "step_dpo", "1e-6", "2", **server)
    assert picture == ["analysis/plot_training.py", "out/models/step-dpo-1e-6-2"]
    assert call[0].startswith("04")
    assert call[-1] == "out/models/step-dpo-1e-6-2"
    assert "--base-url" not in call
    [call], _ = small_model(tmp_path, "validate", "step_dpo", "1e-6", "2", **server)
    assert "step-dpo-1e-6-2=out/models/step-dpo-1e-6-2" in call and "--base-url" in call
    [call, page], _ = small_model(tmp_path, "test", **server)
    assert page == ["analysis/report.py", "out/test"]
    assert call[call.index("--models") + 1] == "base=Qwen/Qwen2.5-0.5B-Instruct"
    assert call[call.index("--models") + 2].startswith("--"), (
        "no rate is chosen, so there is nothing to compare with"
    )
    _, done = small_model(tmp_path, "data", PAIRS="300", **server)
    assert done.returncode == 2 and "400 pairs" in done.stderr and "300 pairs" in done.stderr
    _, done = small_model(tmp_path, "train", "dpo")
    assert done.returncode == 2 and "METHOD RATE SEED" in done.stderr
    calls, _ = small_model(tmp_path, "data", OUT="with-samples", SAMPLES="mine.jsonl", MODEL="m")
    problems = next(call for call in calls if call[0].startswith("ex"))
    assert problems[problems.index("--samples") + 1] == "mine.jsonl"
    assert not any(call[0].startswith("01") for call in calls)
    calls, _ = small_model(tmp_path, "data", OUT="judged", LOCATE="--locator judge")
    assert not any("--rollouts" in call for call in calls if call[0].startswith("03"))


def test_small_model_takes_samples(tmp_path):
    """Those of validation problems are left out; the others are the model's for 02."""
    for name in ("gsm8k_train", "gsm8k_test", "math_test"):
        lines = (TINY / "train.jsonl").read_text().splitlines(keepends=True)[:20]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    ids = [json.loads(line)["id"] for line in lines]
    given = tmp_path / "samples.jsonl"
    given.write_text("".join(json.dumps({"id": name, "model": "other"}) + "\n" for name in ids))
    command = ["small_model", "problems", tmp_path / "out", "--data", tmp_path]
    command += ["--validation", 5, "--samples", given]
    run(*command, "--model", "mine")
    rows = read(tmp_path / "out" / "samples.jsonl")
    validation = {row["id"] for row in read(tmp_path / "out" / "problems" / "validation.jsonl")}
    assert {row["id"] for row in rows} == set(ids) - validation and len(rows) == 15
    assert {row["model"] for row in rows} == {"mine"}
    given.write_text(json.dumps({"id": "foreign"}) + "\n")
    done = run(*command, check=False)
    assert done.returncode == 2 and "no sample of a problem" in done.stderr
    given.unlink()
    done = run(*command, check=False)
    assert done.returncode == 2 and str(given) in done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_small_model(server, tmp_path):
    """Data from the bundled model, one training of each kind, and the table of what is there."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, file in (
        ("gsm8k_train", "train"),
        ("gsm8k_test", "test"),
        ("math_test", "validation"),
    ):
        (folder / f"{name}.jsonl").write_bytes((TINY / f"{file}.jsonl").read_bytes())
    out = tmp_path / "out"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MODEL": str(TINY / "model"),
        "DATA": str(folder),
        "OUT": str(out),
        "BASE_URL": server[1],
        "PROBLEMS": "80",
        "PAIRS": "24",
        "BATCH": "12",
        "RATES": "3e-5",
        "VALIDATION": "30",
        "GSM8K_TEST": "30",
        "MATH_TEST": "20",
        "TOKENS": "400",
        "TEST_TOKENS": "300",
    }

    def part(*arguments):
        command = ["bash", "recipes/small_model.sh", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    part("data")
    problems = {
        name: {row["id"] for row in read(out / "problems" / f"{name}.jsonl")}
        for name in ("validation", "gsm8k_train")
    }
    sets = {
        name: read(out / "pairs" / f"{name}.jsonl") for name in ("step-dpo", "dpo", "sft", "scdpo")
    }
    assert not problems["validation"] & problems["gsm8k_train"]
    assert len(problems["validation"]) == 30
    assert {len(rows) for rows in sets.values()} == {24}
    assert {row["id"] for rows in sets.values() for row in rows} <= {
        row["id"] for row in read(out / "samples.jsonl")
    }
    assert all(row["correct"] for row in sets["sft"])
    assert {row["method"] for row in sets["scdpo"]} == {"dpo", "scdpo"}
    part("validate", "base")
    for method in ("step_dpo", "sft"):
        part("train", method, "3e-5", "0")
    (out / "samples.jsonl.meta.json").unlink()  # as with SAMPLES
    part("table")
    table = (out / "table.md").read_text()
    samples = read(out / "samples.jsonl")
    right = sum(row["correct"] for row in samples)
    assert f"| samples | {len(samples)} |" in table
    assert f"| right | {right} ({right / len(samples):.1%}) |" in table
    assert "| base |" in table
    assert "## Accuracy" not in table
