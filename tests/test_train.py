"""04: log-probabilities, gradients, EOS, schedule, packing, resume. Real models, no server."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, read, run, stage
from transformers import AutoModelForCausalLM, AutoTokenizer

OPENING = "Let's think step by step.\nStep 1:"


def pair(number: int, last: bool = False) -> dict:
    """A pair on step 2 of a made-up solution; `last`: the step is the end of the solution."""
    prefix = f"{OPENING} Ava has {number} + 4 = {number + 4} apples.\nStep 2:"
    chosen, rejected = f" Ava now has {number + 4} * 2 = {2 * number + 8} apples.", f" Ava has {number + 4} / 2 = 3 apples now."
    end = "\nThe answer is \\boxed{5}."
    if last:
        chosen, rejected, rest = chosen + end, rejected + end, ""
    else:
        chosen, rejected, rest = chosen + "\n", rejected + "\n", "Step 3: So." + end
    return {
        "prompt": f"Ava has {number} apples and gets 4. She doubles them. How many?", "initial_reason_steps": prefix,
        "chosen": chosen, "rejected": rejected,
        "full_chosen": prefix + chosen + rest, "full_rejected": prefix + rejected + rest,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


def plain_logps(lm, ids: dict) -> torch.Tensor:
    """The separate computation: one full forward pass for each side, log_softmax over all of it."""
    sums = []
    for side in ("chosen", "rejected"):
        row = torch.tensor([ids["prefix"] + ids[side]])
        logps = lm(row).logits[0, :-1].float().log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        sums.append(logps[len(ids["prefix"]) - 1 :].sum())
    return torch.stack(sums)


def scorer_and_pairs(small_model, tokenizer):
    train = stage(4)
    lm = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32, attn_implementation="sdpa")
    pairs = [train.encode(pair(number, last=number % 2 == 0), tokenizer) for number in (7, 12, 123, 4)]
    return train, train.SuffixScorer(lm), pairs


@pytest.mark.parametrize("chunk", [2048, 7])
def test_shared_prefix_equals_separate_rows(small_model, tokenizer, monkeypatch, chunk):
    train, scorer, pairs = scorer_and_pairs(small_model, tokenizer)
    monkeypatch.setattr(train, "LOGITS_CHUNK", chunk)
    ours = scorer(**train.collate(pairs, 0, "cpu"))
    plain = torch.stack([plain_logps(scorer.lm, ids) for ids in pairs])
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    reference = plain.detach() + torch.tensor([[0.5, -0.5]])
    train.dpo_loss(ours, reference, 0.4)[0].mean().backward()
    gradients = {name: p.grad.clone() for name, p in scorer.lm.named_parameters()}
    scorer.lm.zero_grad()
    train.dpo_loss(plain, reference, 0.4)[0].mean().backward()
    for name, parameter in scorer.lm.named_parameters():
        difference = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, f"{name}: relative difference {difference:.1e}"


def test_rejected_does_not_see_chosen(small_model, tokenizer):
    train, scorer, pairs = scorer_and_pairs(small_model, tokenizer)
    before = scorer(**train.collate(pairs[:1], 0, "cpu"))
    pairs[0]["chosen"] = pairs[0]["chosen"][::-1] + [5, 6]
    after = scorer(**train.collate(pairs[:1], 0, "cpu"))
    assert before[0, 0] != after[0, 0]
    torch.testing.assert_close(before[0, 1], after[0, 1], rtol=1e-6, atol=0)


def test_collate_matches_its_docstring():
    batch = stage(4).collate([{"prefix": [11, 12], "chosen": [13, 14], "rejected": [15]}], 0, "cpu")
    assert batch["ids"].tolist() == [[11, 12, 13, 14, 15]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 2]]
    assert [batch[k].tolist() for k in ("source", "target", "owner")] == [[1, 2, 1], [13, 14, 15], [0, 0, 1]]


def test_a_step_never_ends_in_eos_and_a_finished_solution_does(tokenizer):
    train, eos = stage(4), tokenizer.eos_token_id
    step, end = train.encode(pair(7), tokenizer), train.encode(pair(7, last=True), tokenizer)
    assert eos not in step["chosen"] + step["rejected"]
    assert end["chosen"][-1] == eos and end["rejected"][-1] == eos
    assert end["chosen"].count(eos) == 1
    published = pair(7, last=True) | {"full_chosen": pair(7, last=True)["chosen"]}  # full text without the prefix
    assert train.encode(published, tokenizer)["chosen"][-1] == eos
    mixed = pair(7) | {"full_chosen": pair(7)["initial_reason_steps"] + pair(7)["chosen"]}  # only chosen ends here
    assert [train.encode(mixed, tokenizer)[side][-1] == eos for side in ("chosen", "rejected")] == [True, False]


def test_boundary_is_where_generation_had_it(tokenizer):
    """Decoded ids give the text back, whether or not the prefix carries the space; a merge over the boundary is not used."""
    train = stage(4)
    row = pair(7)
    ids = train.encode(row, tokenizer)
    assert tokenizer.decode(ids["prefix"]).endswith(row["initial_reason_steps"])
    assert tokenizer.decode(ids["chosen"]) == row["chosen"]
    moved = row | {"initial_reason_steps": row["initial_reason_steps"] + " ", "chosen": row["chosen"][1:], "rejected": "3."}
    assert train.encode(moved, tokenizer)["chosen"] == ids["chosen"]
    assert train.encode(moved, tokenizer)["prefix"] == ids["prefix"]
    # ".\n" is one token: a prefix that ends in "." and a suffix that begins with "\n" were drawn as two
    split = row | {"initial_reason_steps": OPENING + " Ava has 4 apples.", "chosen": "\nStep 2: Yes.", "rejected": "\nNo."}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": train.USER_TURN.format(problem=row["prompt"])},
         {"role": "assistant", "content": split["initial_reason_steps"]}],
        tokenize=False, continue_final_message=True,
    )  # fmt: skip
    ids = train.encode(split, tokenizer)
    assert tokenizer(text + split["chosen"], add_special_tokens=False)["input_ids"] != ids["prefix"] + ids["chosen"]
    assert ids["prefix"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids["chosen"]) == split["chosen"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_plan_covers_each_pair_once_within_the_budget(world):
    train, lengths = stage(4), [5 + (i * 37) % 90 for i in range(41)]
    plans = [train.plan(lengths, list(range(41)), 200, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in plans}) == 1
    real = sorted(i for batches in plans for batch in batches for i in batch if i >= 0)
    assert real == list(range(41))
    for batches in plans:
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 200
    few = [train.plan(lengths, [3], 200, rank, world) for rank in range(world)]
    assert [batch for batches in few for batch in batches].count([3]) == 1 and all(len(batches) == 1 for batches in few)


def test_schedule_warms_up_and_ends_at_zero():
    train, args = stage(4), SimpleNamespace(lr=1.0, warmup=0.1)
    rates = [train.learning_rate(step, 100, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5) and rates[99] < 1e-3
    assert all(a <= b for a, b in zip(rates[:10], rates[1:10], strict=False)) and sorted(rates[10:], reverse=True) == rates[10:]


def write_pairs(path, count: int = 24):
    path.write_text("".join(json.dumps(pair(n + 3, last=n % 3 == 0)) + "\n" for n in range(count)))
    return path


def common(tmp_path, small_model, out: str) -> list:
    return ["--data", tmp_path / "pairs.jsonl", "--model", small_model, "--out", tmp_path / out, "--precision", "fp32",
            "--epochs", 2, "--batch-size", 5, "--tokens-per-batch", 300,
            "--validation-fraction", 0.2, "--eval-steps", 4]  # fmt: skip


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_training_starts_at_ln_2_moves_weights_and_resumes_exactly(tmp_path, small_model):
    write_pairs(tmp_path / "pairs.jsonl")
    run(4, *common(tmp_path, small_model, "whole"), "--lr", 1e-3)
    lines = read(tmp_path / "whole" / "metrics.jsonl")
    first, zero = next(line for line in lines if "loss" in line), lines[0]
    assert zero["step"] == 0 and abs(zero["val_margin"]) < 1e-4 and abs(zero["val_loss"] - math.log(2)) < 1e-5
    assert abs(first["loss"] - math.log(2)) < 1e-5 and abs(first["margin"]) < 1e-4
    assert lines[-1]["step"] == max(line["step"] for line in lines) and lines[-1]["val_accuracy"] == 1.0
    # stop after step 4 (a kill right after its checkpoint), go on: the same numbers and the same weights
    arguments = [*common(tmp_path, small_model, "parts"), "--lr", 1e-3, "--save-steps", 4, "--keep", 9]
    run(4, *arguments)
    out = tmp_path / "parts"
    (out / "model.safetensors").unlink()
    for path in out.glob("checkpoint-*"):
        if path.name != "checkpoint-4":
            path.rename(out / f"writing-{path.name}")  # as if the kill had come while it was written
    assert "going on from" in run(4, *arguments).stderr
    same = [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in read(out / "metrics.jsonl")]
    assert same == [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(out)[name]), name
    changed = run(4, *arguments[:-4], "--beta", 0.1, check=False)
    assert changed.returncode == 2 and "beta = '0.4', now it is '0.1'" in changed.stderr


def test_tiny_steps_move_weights(tmp_path, small_model):
    """At the paper's 5e-7 every weight matrix moves, since masters are fp32; bf16 weights would mostly stay."""
    write_pairs(tmp_path / "pairs.jsonl")
    run(4, *common(tmp_path, small_model, "slow"), "--lr", 5e-7, "--precision", "bf16")
    base, tuned = weights(small_model), weights(tmp_path / "slow")
    moved = sum((base[name] != tuned[name]).sum().item() for name in base) / sum(t.numel() for t in base.values())
    assert moved > 0.9
    rounded = sum((base[n].bfloat16() != tuned[n].bfloat16()).sum().item() for n in base)
    assert rounded / sum(t.numel() for t in base.values()) < 0.1, "the point of fp32 masters: bf16 cannot show these steps"


def test_micro_batches_and_processes_do_not_change_the_step(tmp_path, small_model):
    """One optimizer step over 7 pairs: packed as one batch, as many, and over two processes, the weights are the same."""
    write_pairs(tmp_path / "pairs.jsonl", 7)
    base = ["--data", tmp_path / "pairs.jsonl", "--model", small_model, "--precision", "fp32", "--epochs", 1, "--batch-size", 7,
            "--lr", 1e-4]  # fmt: skip
    run(4, *base, "--out", tmp_path / "one")
    run(4, *base, "--out", tmp_path / "many", "--tokens-per-batch", 150)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "04_train_stepdpo.py"]
    command = [*launch, *map(str, [*base, "--out", tmp_path / "two", "--tokens-per-batch", 150])]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [read(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "many", "two")]
    for log in logs[1:]:
        for name in ("loss", "chosen_logp", "rejected_logp", "grad_norm"):
            assert log[name] == pytest.approx(logs[0][name], rel=1e-4), name
    for name, tensor in weights(tmp_path / "one").items():
        for other in ("many", "two"):
            torch.testing.assert_close(weights(tmp_path / other)[name], tensor, rtol=0, atol=2e-5)


def test_model_loads_and_long_pairs_are_left_out(tmp_path, small_model, tokenizer):
    write_pairs(tmp_path / "pairs.jsonl")
    ids = [stage(4).encode(pair(n + 3, last=n % 3 == 0), tokenizer) for n in range(24)]
    longest = sorted(len(i["prefix"]) + max(len(i["chosen"]), len(i["rejected"])) for i in ids)
    common_arguments = common(tmp_path, small_model, "out")[:-4]
    done = run(4, *common_arguments, "--max-length", longest[15])
    left_out = sum(length > longest[15] for length in longest)
    assert left_out and f"{24 - left_out} pairs; left out: {left_out} above --max-length" in done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32 and AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
