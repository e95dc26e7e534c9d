"""Stages 01, 02, 03 and 05 against a real vLLM server with the bundled model: resume, kills,
reproducibility."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TINY, keyed, read, run, run_killed, stage

pytestmark = pytest.mark.slow
SHARED = ROOT.parent / "shared" / "data"
SHORT = ["--max-tokens", "300"]
FOUR = ["--rollouts", "4", "--alpha", "0"]  # what 02 finds of one prefix hangs on no other then
SOLVED = {
    "id": "s",
    "problem": "Ava has 3 apples. Then she buys 4 more. How many apples does Ava have now?",
    "answer": "7",
    "sample": 0,
    "finish_reason": "stop",
    "error_step": 1,
    "response": "Let's think step by step.\nStep 1: 8.",
    "steps": ["Let's think step by step.\nStep 1: 8."],
}


@pytest.fixture(scope="module")
def files(bundled, tmp_path_factory):
    """An uninterrupted run of 01, 02 and 03 over 40 problems: the rows that every other run must
    give."""
    folder = tmp_path_factory.mktemp("whole")
    steps = stage_arguments(bundled, folder, folder)
    for number in (1, 2, 3):
        run(number, *steps[number])
    return folder


def stage_arguments(model: list, source: Path, out: Path) -> dict[int, list]:
    """Arguments of 01 to 03 that read what `source` holds and write to `out`."""
    return {
        1: [
            "--data",
            TINY / "train.jsonl",
            "--limit",
            40,
            "--out",
            out / "samples.jsonl",
            *SHORT,
            *model,
        ],
        2: [
            "--samples",
            source / "samples.jsonl",
            "--out",
            out / "located.jsonl",
            *FOUR,
            *SHORT,
            *model,
        ],
        3: [
            "--located",
            source / "located.jsonl",
            "--n",
            4,
            "--out",
            out / "pairs.jsonl",
            *SHORT,
            *model,
        ],
    }


def test_rows_follow_the_contracts(files):
    samples = keyed(files / "samples.jsonl", "id", "sample")
    assert len(samples) == 80
    for row in samples.values():
        assert "".join(row["steps"]) == row["response"]
        assert row["response"].startswith("Let's think step by step.\nStep 1:")
        assert row["correct"] == (row["prediction"] == row["answer"])
        assert row["level"], "fields are carried through"
    located = keyed(files / "located.jsonl", "id", "sample")
    assert set(located) == {key for key, row in samples.items() if not row["correct"]}
    for row in located.values():
        assert (row["error_step"] is None) == bool(row["reason"])
        assert row["error_step"] is None or 1 <= row["error_step"] <= len(row["steps"])
    pairs = read(files / "pairs.jsonl")
    assert pairs
    # the published schema, and what 03 adds
    schema = {"dataset", "prompt", "initial_reason_steps", "chosen", "rejected", "full_chosen"}
    schema |= {"full_rejected", "answer", "id", "sample", "level", "method", "error_step"}
    schema |= {"rejected_finished", "values"}
    for pair in pairs:
        assert set(pair) == schema and pair["method"] == "step-dpo"
        row = located[pair["id"], pair["sample"]]
        assert pair["full_rejected"] == row["response"]
        assert pair["initial_reason_steps"].endswith(f"Step {row['error_step']}:")
        assert pair["full_chosen"].startswith(pair["initial_reason_steps"] + pair["chosen"])
        assert pair["chosen"].split() != pair["rejected"].split()
        assert pair["full_chosen"].endswith(f"{{{pair['answer']}}}.")
    meta = json.loads((files / "samples.jsonl.meta.json").read_text())
    assert meta["finished"] and meta["summary"]["samples"] == 80 and meta["versions"]["torch"]
    assert "git" in meta and meta["seconds"] > 0 and meta["inputs"] and meta["arguments"]


def test_located_step_is_mostly_the_true_one(files):
    """The first step whose result differs from the reference's; 40 problems give a coarse figure,
    the README the fine one."""
    from locator_accuracy import true_error

    rows = [row for row in read(files / "located.jsonl") if row["error_step"] and true_error(row)]
    assert len(rows) >= 8
    assert sum(row["error_step"] == true_error(row) for row in rows) / len(rows) > 0.6


@pytest.mark.parametrize("number", [1, 2, 3])
def test_kill_and_restart(files, server, tmp_path, number):
    """kill -9 at a random moment; then the rows are those of the uninterrupted run,
    each once."""
    arguments = stage_arguments(server, files, tmp_path)[number]
    name = {1: "samples.jsonl", 2: "located.jsonl", 3: "pairs.jsonl"}[number]
    journal = tmp_path / ("pairs.tries.jsonl" if number == 3 else name)
    run_killed(
        number,
        *arguments,
        "--concurrency",
        4,
        journal=journal,
        kills=1,
        seed=number,
        torn=b'{"id": "torn", "sam',
    )
    run(number, *arguments)
    key = ("id", "sample", "chosen") if number == 3 else ("id", "sample")
    assert keyed(tmp_path / name, *key) == keyed(files / name, *key)


def test_other_settings_are_refused(files, bundled):
    before = (files / "samples.jsonl").read_bytes()
    arguments = stage_arguments(bundled, files, files)[1]
    for option, value, said in (
        ("--temperature", 0.7, "temperature = 0.8, now it is 0.7"),
        ("--seed", 1, "seed = 0, now it is 1"),
    ):
        done = run(1, *arguments, option, value, check=False)
        assert done.returncode == 2 and said in done.stderr
    assert (files / "samples.jsonl").read_bytes() == before
    again = run(1, *arguments)  # the same settings: nothing is sampled again
    assert "80 rows are there already" in again.stderr and "tokens 0" in again.stdout
    assert (files / "samples.jsonl").read_bytes() == before


def test_until_both_goes_on_as_long_as_needed(bundled, tmp_path):
    arguments = ["--data", TINY / "train.jsonl", "--limit", 25, "--until-both", 7, *SHORT, *bundled]
    run(1, *arguments, "--out", tmp_path / "a.jsonl")
    by_problem = {}
    for row in read(tmp_path / "a.jsonl"):
        by_problem.setdefault(row["id"], {})[row["sample"]] = row["correct"]
    assert len(by_problem) == 25
    for verdicts in by_problem.values():
        count = len(verdicts)
        assert sorted(verdicts) == list(range(count)) and (count in (2, 4, 6, 7))
        both = len(set(verdicts.values())) == 2
        assert both or count == 7
        before_last_wave = range(count - (2 if count < 7 else 1))
        assert count == 2 or len({verdicts[i] for i in before_last_wave}) == 1, "a wave too many"


def test_unfinished_samples_are_not_the_wrong_one(bundled, tmp_path):
    """--until-both goes on until an answer is right and another, finished and parsed, is wrong:
    then 03 finds a pair."""
    arguments = ["--data", TINY / "train.jsonl", "--limit", 40, "--until-both", 6]
    arguments += ["--max-tokens", 70, *bundled]
    run(1, *arguments, "--out", tmp_path / "a.jsonl")
    by_problem = {}
    for row in read(tmp_path / "a.jsonl"):
        by_problem.setdefault(row["id"], []).append(row)
    stopped = [rows for rows in by_problem.values() if len(rows) < 6]
    assert stopped
    assert any(row["finish_reason"] == "length" for rows in by_problem.values() for row in rows)
    for rows in stopped:
        assert {row["correct"] for row in rows if row["prediction"] is not None} == {True, False}
    both = sum(
        {True, False} <= {row["correct"] for row in rows if row["prediction"]}
        for rows in by_problem.values()
    )
    run(3, "--method", "dpo", "--samples", tmp_path / "a.jsonl", "--out", tmp_path / "p.jsonl")
    assert len({row["id"] for row in read(tmp_path / "p.jsonl")}) == both


def test_the_models_generation_config_does_not_sample(bundled, penalized, server, tmp_path):
    """Qwen2-Instruct's penalizes repetition, in greedy text too. With the file and without it 05
    gives the same text, by its own engine and by a server."""
    arguments = ["--data", TINY / "validation.jsonl", "--limit", 24, "--max-tokens", 200]
    run(5, *arguments, "--models", bundled[1], "--out", tmp_path / "plain")  # has no such file
    run(5, *arguments, "--models", penalized, "--out", tmp_path / "own")
    run(5, *arguments, *server[:2], "--models", server[3], "--out", tmp_path / "running")
    texts = {}
    for path in tmp_path.glob("*/validation/*.jsonl"):
        texts[path.parent.parent.name] = {row["id"]: row["response"] for row in read(path)}
        settings = json.loads(path.with_name(path.name + ".meta.json").read_text())["settings"]
        assert (settings["top_k"], settings["min_p"], settings["repetition_penalty"]) == (
            -1,
            0.0,
            1.0,
        )
    assert len(texts) == 3 and len(texts["own"]) == 24
    assert texts["own"] == texts["running"] == texts["plain"]


def test_every_stage_renders_the_same_prefix(server):
    """Qwen3's template with a prefilled turn and a switch: token ids of the prompts of 01, 02, 03
    and 05 are those that 04 trains behind and that credit.py reads; with the model's own template
    they are those of vLLM's chat endpoint."""
    import credit
    import httpx
    import trl
    from transformers import AutoTokenizer

    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    switches = json.dumps({"enable_thinking": False})
    qwen3 = stage(1).load_tokenizer(str(TINY / "model"), template, switches)
    own = AutoTokenizer.from_pretrained(TINY / "model")
    ours = stage(1).load_tokenizer(str(TINY / "model"), None, "{}")
    for prefix in (
        stage(1).OPENING,
        stage(1).OPENING + " 3 + 4 = 7.\nStep 2: So it is 7.\nStep 3:",
    ):
        row = {
            "prompt": SOLVED["problem"],
            "initial_reason_steps": prefix,
            "chosen": " 7.\n",
            "rejected": " 8.\n",
            "full_chosen": "",
            "full_rejected": "",
        }
        for tokenizer in (qwen3, own):
            trained, _ = stage(4).encode(row, tokenizer, "step")
            asked = [
                stage(number).prompt_ids(tokenizer, SOLVED["problem"], prefix)
                for number in (1, 2, 3, 5)
            ]
            assert asked == [trained] * 4
            assert (
                tokenizer is qwen3
                or stage(1).prompt_ids(ours, SOLVED["problem"], prefix) == trained
            )
            thought = "<think>\n\n</think>\n\n" if tokenizer is qwen3 else ""
            assert tokenizer.decode(trained).endswith(f"<|im_start|>assistant\n{thought}{prefix}")
            solution = {
                "problem": SOLVED["problem"],
                "steps": [prefix + " 7."],
                "opening": prefix,
                "error_step": None,
            }
            ids, places, _ = credit.encode_solution(solution, tokenizer)
            assert ids[: places.count(0)] == trained
        turns = [
            {"role": "user", "content": stage(1).USER_TURN.replace("{problem}", SOLVED["problem"])},
            {"role": "assistant", "content": prefix},
        ]
        body = {
            "model": server[3],
            "messages": turns,
            "continue_final_message": True,
            "add_generation_prompt": False,
        }
        headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
        reply = httpx.post(f"{server[1].removesuffix('/v1')}/tokenize", json=body, headers=headers)
        assert reply.raise_for_status().json()["tokens"] == trained
    thinking = stage(1).load_tokenizer(
        str(TINY / "model"), template, json.dumps({"enable_thinking": True})
    )
    # SFT trains where 01 puts an opening; a solution that has its thought brings it along
    for tokenizer in (qwen3, thinking):
        for solution, before in (
            ("s", "<think>\n\n</think>\n\n"),
            ("<think>\nw\n</think>\n\ns", ""),
        ):
            row = {"problem": "p", "solution": solution}
            prefix, [suffix] = stage(4).encode(row, tokenizer)
            asked = stage(1).prompt_ids(tokenizer, "p", solution)
            assert qwen3.decode(prefix + suffix).startswith(qwen3.decode(asked))
            if tokenizer is thinking or before:
                assert qwen3.decode(prefix).endswith("<|im_start|>assistant\n" + before)


def test_linear_agrees_with_bisection_on_what_both_estimate(files, bundled, tmp_path):
    arguments = stage_arguments(bundled, files, tmp_path)[2]
    run(2, *arguments, "--linear")
    linear = keyed(tmp_path / "located.jsonl", "id", "sample")
    bisected = keyed(files / "located.jsonl", "id", "sample")
    assert set(linear) == set(bisected)
    for key, row in linear.items():
        if row["error_step"]:
            assert set(row["rollout_values"]) | {"0"} == {str(k) for k in range(len(row["steps"]))}
        for k, value in bisected[key]["rollout_values"].items():
            assert row["rollout_values"][k] == value  # the same seeds, the same continuations


def test_a_prompt_too_long_for_the_model_goes_through(bundled, tmp_path):
    """It becomes a wrong sample without text, is not located, and makes no pair; the other problem
    is not touched by it."""
    long = {"id": "long", "problem": "Ava has 3 apples. " * 2000 + "How many?", "answer": "3"}
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [long, read(TINY / "train.jsonl")[0]])
    )
    options = ["--data", tmp_path / "in.jsonl", "--n", 8, "--out", tmp_path / "s.jsonl", *SHORT]
    options += [*bundled]
    run(1, *options)
    ends = {name: [] for name in ("long", read(TINY / "train.jsonl")[0]["id"])}
    for row in read(tmp_path / "s.jsonl"):
        ends[row["id"]].append(row["finish_reason"])
    long_ends, other_ends = ends.values()
    assert long_ends == 8 * ["refused"]
    assert len(other_ends) == 8 and set(other_ends) <= {"stop", "length"}
    options = ["--samples", tmp_path / "s.jsonl", "--rollouts", 2, "--out", tmp_path / "l.jsonl"]
    options += [*SHORT, *bundled]
    run(2, *options)
    reasons = [row["reason"] for row in read(tmp_path / "l.jsonl") if row["id"] == "long"]
    assert reasons == 8 * ["no response to look at"]
    (tmp_path / "l.jsonl").write_text(
        json.dumps(SOLVED) + "\n" + (tmp_path / "l.jsonl").read_text()
    )
    options = ["--located", tmp_path / "l.jsonl", "--n", 2, "--out", tmp_path / "p.jsonl", *SHORT]
    options += [*bundled]
    done = run(3, *options)
    assert "errors not located" in done.stdout
    assert "long" not in {pair["id"] for pair in read(tmp_path / "p.jsonl")}


@pytest.mark.parametrize("name", ["gsm8k_test", "math_test"])
def test_real_benchmarks_run_through(bundled, tmp_path, name):
    if not SHARED.is_dir():
        pytest.skip("the benchmark files are not beside this checkout")
    arguments = ["--data", SHARED / f"{name}.jsonl", "--limit", 12, "--n", 1, "--max-tokens", 200]
    done = run(1, *arguments, "--out", tmp_path / "s.jsonl", *bundled)
    assert "problems 12, samples 12" in done.stdout
    rows = keyed(tmp_path / "s.jsonl", "id", "sample").values()
    assert len(rows) == 12 and all("".join(row["steps"]) == row["response"] for row in rows)
    assert all(row["prediction"] is None for row in rows if row["finish_reason"] == "length")


def llama_of_tiny(folder: Path):
    """The bundled model as a Llama, whose byte-level tokenizer has a SentencePiece's class, as
    DeepSeekMath's has."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig

    shutil.copytree(TINY / "model", folder)
    qwen = json.loads((folder / "config.json").read_text())
    others = {"model_type", "architectures", "attention_bias"}
    fields = {name: value for name, value in qwen.items() if name not in others}
    LlamaConfig(**fields, attention_bias=True, architectures=["LlamaForCausalLM"]).save_pretrained(
        folder
    )
    weights = load_file(folder / "model.safetensors")
    for layer in range(qwen["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.bias"] = torch.zeros(len(weights[f"{name}.weight"]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"})
    )


def test_saved_models_decode_alike_in_vllm_and_transformers(files, tmp_path):
    """What 04 saves with merged adapters, in fp32 arithmetic in both engines; the recipe's test
    serves a plain one. AutoTokenizer would read and write this tokenizer without spaces."""
    import torch
    from transformers import AutoModelForCausalLM

    llama_of_tiny(tmp_path / "llama")
    options = ["--data", files / "pairs.jsonl", "--model", tmp_path / "llama"]
    options += ["--out", tmp_path / "tuned", "--lora-rank", 4, "--lr", 1e-3, "--epochs", 2]
    options += ["--batch-size", 4]
    run(4, *options)
    arguments = ["--data", TINY / "validation.jsonl", "--limit", 16, "--max-tokens", 120]
    arguments += ["--models", tmp_path / "tuned"]
    run(5, *arguments, "--out", tmp_path / "results", "--engine-args=--dtype float32")
    [responses] = (tmp_path / "results" / "validation").glob("*tuned.jsonl")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    from_stage = stage(1)
    tokenizer, base = (
        from_stage.load_tokenizer(str(tmp_path / name), None, "{}") for name in ("tuned", "llama")
    )
    assert tokenizer("Ava has 3 apples.") == base("Ava has 3 apples.")
    saved = json.loads((tmp_path / "tuned" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "LlamaTokenizerFast"
    for row in read(responses):
        messages = [
            {"role": "user", "content": from_stage.USER_TURN.replace("{problem}", row["problem"])},
            {"role": "assistant", "content": from_stage.OPENING},
        ]
        ids = tokenizer.apply_chat_template(
            messages, continue_final_message=True, return_tensors="pt", return_dict=True
        )
        new = lm.generate(**ids, max_new_tokens=120, do_sample=False)[
            0, ids["input_ids"].shape[1] :
        ]
        assert (
            from_stage.OPENING + tokenizer.decode(new, skip_special_tokens=True) == row["response"]
        )
