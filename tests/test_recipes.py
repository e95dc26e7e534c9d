"""From problems to tables and pictures on the bundled world, at a small size: the recipes, and solutions with code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, read, run, run_killed, stage
from test_code import SANDBOX


def recipe(*arguments, **settings):
    command = ["bash", "recipes/ablation_tiny.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)


@pytest.mark.slow
def test_quickstart_recipe_end_to_end(tmp_path):
    """The five stages as `make quickstart` runs them, on fewer problems."""
    environment = os.environ | {"OUT": str(tmp_path), "PROBLEMS": "120", "TEST_PROBLEMS": "60",
                                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run(["bash", "recipes/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())["benchmarks"]["test"]
    base, tuned = summary["models"].values()
    assert summary["problems"] == 60 and "p" in tuned and 0.3 < base["accuracy"] < 0.95
    assert "| test (60) |" in (tmp_path / "results" / "report.md").read_text() and "Where the time went" in done.stdout
    assert read(tmp_path / "model-0" / "metrics.jsonl")[-1]["step"] >= 2
    assert (tmp_path / "model-0" / "model.safetensors").exists()


@pytest.mark.slow
def test_code_from_problems_to_report(tmp_path):
    """The bundled model that writes code, by real engines and interpreter, 01 killed once; SCDPO's pairs; an evaluation."""
    model, safe = TINY / "code", [] if SANDBOX else ["--unsafe-no-sandbox"]
    manner = ["--opening=", "--split", "blocks", "--max-tokens", 64, "--engine-args=--max-model-len 1024", *safe]
    samples = ["--data", TINY / "train.jsonl", "--limit", 30, "--n", 4, "--model", model, *manner]
    run_killed(1, *samples, "--out", tmp_path / "s.jsonl", journal=tmp_path / "s.jsonl", kills=1, seed=1, torn=b'{"id": "t')
    run(1, *samples, "--out", tmp_path / "s.jsonl")
    rows = read(tmp_path / "s.jsonl")
    assert len(rows) == len({(row["id"], row["sample"]) for row in rows}) == 120
    ran = 0
    for row in rows:
        assert "".join(row["steps"]) == row["response"] and row["rounds"] <= 64
        for code, output in zip(row["blocks"], row["blocks"][1:], strict=False):
            if code["type"] == "code" and re.fullmatch(r"\d+ (?:[-+*]|//) [1-9]\d*", code["content"]):
                a, sign, b = code["content"].split()
                value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "//": int(a) // int(b)}[sign]
                assert output == {"type": "execution", "content": str(value)}
                ran += 1
    assert ran > 100 and sum(row["correct"] for row in rows) > 20
    run(
        3,
        "--method",
        "scdpo",
        "--samples",
        tmp_path / "s.jsonl",
        "--model",
        model,
        "--out",
        tmp_path / "p.jsonl",
        *manner,
    )
    pairs = read(tmp_path / "p.jsonl")
    for pair in pairs:
        prefix = pair["initial_reason_steps"]
        assert prefix.endswith("<|endofblock|>") and not re.search(r"<\|code\|>[^|]*<\|endofblock\|>$", prefix)
        assert prefix + pair["chosen"] == pair["full_chosen"] and prefix + pair["rejected"] == pair["full_rejected"]
        assert len(stage(1).blocks_of(pair["chosen"])) >= 2
    assert pairs
    run(5, "--data", TINY / "test.jsonl", "--limit", 10, "--models", model, "--out", tmp_path / "results", *manner)
    assert "| rounds | executions | failures |" in (tmp_path / "results" / "report.md").read_text()


@pytest.mark.slow
def test_ablation(server, tmp_path):
    sizes = {"WORLD": str(TINY), "BASE_URL": server[1], "OUT": str(tmp_path), "SEEDS": "0", "METHODS": "step-dpo",
             "PROBLEMS": "150", "TEST": "80", "GRID": "1e-4:1"}  # fmt: skip
    done = recipe(**sizes, PAIRS="40")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = ("dpo", "scdpo", "step-dpo", "dpo-tokens", "step-dpo.validation", "dpo.validation")
    rows = {name: read(tmp_path / "pairs" / f"{name}.jsonl") for name in names}
    assert len(rows["dpo"]) == len(rows["scdpo"]) == len(rows["step-dpo"]) > 20 > len(rows["dpo-tokens"]) > 0
    assert {row["method"] for row in rows["scdpo"]} == {"dpo", "scdpo"}
    for name in ("step-dpo", "dpo"):
        assert not {row["id"] for row in rows[name]} & {row["id"] for row in rows[f"{name}.validation"]}
    length = lambda name: sum(len(row["chosen"]) + len(row["rejected"]) for row in rows[name])
    assert 0.5 < length("dpo-tokens") / length("step-dpo") < 1.3  # characters, for tokens
    table = (tmp_path / "table.md").read_text()
    found = json.loads((tmp_path / "greedy" / "summary.json").read_text())["benchmarks"]["test"]["models"]
    assert f"| base | | | | {found['base']['accuracy']:.1%} (" in table
    [line] = [line for line in table.split("\n") if line.startswith("| Step-DPO | ") and "1e-4, 1" in line]
    assert f" {found['step-dpo']['accuracy']:.1%} (" in line and f"| {len(rows['step-dpo'])} |" in line
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    made = (tmp_path / "models" / "step-dpo_1e-4_1-0" / "model.safetensors").stat().st_mtime_ns
    again = recipe(**sizes, PAIRS="40")
    assert again.returncode == 0 and (tmp_path / "table.md").read_text() == table, again.stderr[-2000:]
    assert (tmp_path / "models" / "step-dpo_1e-4_1-0" / "model.safetensors").stat().st_mtime_ns == made, "not trained again"
    other = recipe(**sizes, PAIRS="30")
    assert other.returncode == 2 and "40 pairs" in other.stderr and "30 pairs" in other.stderr


@pytest.mark.parametrize("name, package", [("step_dpo_qwen2_72b", "deepspeed"), ("step_dpo_qwen2_7b", "accelerate")])
def test_recipes_look_for_packages_before_sampling(tmp_path, name, package):
    """A Python that has no packages: no stage is begun."""
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", f"recipes/{name}.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and f"needs {package}: pip install {package}" in done.stderr
    assert "01_sample" not in (tmp_path / "calls").read_text()


def test_ablation_wrong_argument():
    done = recipe("--fast")
    assert done.returncode == 2 and "--quick" in done.stderr
