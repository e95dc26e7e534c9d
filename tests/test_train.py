"""04: log-probabilities, gradients, EOS, schedule, packing, resume. Real models, no server."""

import contextlib
import fcntl
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import estimate
import numpy as np
import psutil
import pytest
import safetensors
import torch
from conftest import ROOT, TINY, read, run, run_edited, stage
from transformers import AutoModelForCausalLM, AutoTokenizer

OPENING = "Let's think step by step.\nStep 1:"


def pair(number: int, last: bool = False) -> dict:
    """A pair on step 2 of a made-up solution; `last`: the step is the end of the solution."""
    prefix = f"{OPENING} Ava has {number} + 4 = {number + 4} apples.\nStep 2:"
    chosen = f" Ava now has {number + 4} * 2 = {2 * number + 8} apples."
    rejected = f" Ava has {number + 4} / 2 = 3 apples now."
    end = "\nThe answer is \\boxed{5}."
    if last:
        chosen, rejected, rest = chosen + end, rejected + end, ""
    else:
        chosen, rejected, rest = chosen + "\n", rejected + "\n", "Step 3: So." + end
    return {
        "prompt": f"Ava has {number} apples and gets 4. She doubles them. How many?",
        "initial_reason_steps": prefix,
        "chosen": chosen,
        "rejected": rejected,
        "full_chosen": prefix + chosen + rest,
        "full_rejected": prefix + rejected + rest,
    }


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


def plain_logps(lm, prefix: list, suffixes: list) -> torch.Tensor:
    """The separate computation: one full forward pass for each suffix, log_softmax over all of
    it."""
    sums = []
    for suffix in suffixes:
        row = torch.tensor([[*prefix, *suffix]])
        logps = lm(row).logits[0, :-1].float().log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        sums.append(logps[len(prefix) - 1 :].sum())
    return torch.stack(sums)


def pairs_of(train, rows: list, tokenizer):
    pairs = train.Pairs()
    for row in rows:
        pairs.add(*train.encode(row, tokenizer), problem=row["prompt"])
    return pairs


def shaped(kind: str):
    """A random fp32 model of this kind with weights large enough that outputs differ, windows
    shorter than the rows."""
    import transformers

    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    config = {
        "qwen2": lambda: transformers.Qwen2Config(**sizes),
        "qwen2-152k": lambda: transformers.Qwen2Config(
            **sizes | {"vocab_size": 152_000, "hidden_size": 16}
        ),
        "qwen2-window": lambda: transformers.Qwen2Config(
            **sizes, use_sliding_window=True, sliding_window=40, max_window_layers=2
        ),
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "mistral": lambda: transformers.MistralConfig(**sizes, sliding_window=None),
        "mistral-window": lambda: transformers.MistralConfig(**sizes, sliding_window=40),
        "granite": lambda: transformers.GraniteConfig(**sizes, logits_scaling=4.0),
        "cohere": lambda: transformers.CohereConfig(**sizes, logit_scale=0.3),
        "gemma2": lambda: transformers.Gemma2Config(
            **sizes, head_dim=16, sliding_window=40, final_logit_softcapping=2.0
        ),
    }[kind]()
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return lm


KINDS = ["qwen2", "qwen2-window", "llama", "mistral", "mistral-window"]
KINDS += ["granite", "cohere", "gemma2"]  # these change their logits


@pytest.mark.parametrize(
    "kind, budget",
    [*((kind, 1 << 28) for kind in KINDS), ("qwen2", 1 << 14), ("qwen2-152k", 1 << 24)],
)
def test_shared_prefix_equals_separate_rows(kind, budget, tokenizer, monkeypatch):
    """Log-probabilities and gradients. Three pairs of one problem: two have one prefix, and one
    rejected suffix between them; the prefix of the third goes on behind the chosen step of the
    first, its rejected step begins as its chosen one does."""
    train = stage(4)
    rows = [pair(number, last=number % 2 == 0) for number in (7, 12, 123, 4)]
    rows.append(rows[0] | {"chosen": " Now it is 22.\n"})
    deeper = rows[0]["initial_reason_steps"] + rows[0]["chosen"] + "Step 3:"
    rows.append(
        rows[0]
        | {
            "initial_reason_steps": deeper,
            "chosen": " She is done, with 22.\n",
            "rejected": " She is not.\n",
        }
    )
    pairs, scorer = pairs_of(train, rows, tokenizer), train.SuffixScorer(shaped(kind))
    tree = pairs.tree([0, 4, 5])
    assert tree.picks == [[0, 1], [2, 1], [3, 4]]
    assert len(tree.ids) < sum(
        map(
            len,
            (pairs.prefixes[5], *(s for i in (0, 4, 5) for s in pairs.suffixes[i])),
        )
    )
    assert (
        len(tree.targets)
        < sum(map(len, tree.paths))
        == sum(len(s) for i in (0, 5) for s in pairs.suffixes[i]) + len(pairs.suffixes[4][0])
    )
    [(micro, most, is_counted)] = train.plan(pairs, range(6), 10_000, 0, 1)
    assert is_counted
    assert sorted(len(tree.numbers) for tree in micro) == [1, 1, 1, 3]
    inputs, numbers = train.collate(micro, "cpu"), train.numbers_of(micro)
    assert most == len(inputs["target"])
    monkeypatch.setattr(train, "LOGITS_BYTES", [budget])
    calls, head, position = [], scorer.token_logps, 4 * scorer.lm.config.vocab_size
    monkeypatch.setattr(scorer, "token_logps", lambda *given: calls.append(given) or head(*given))
    ours = scorer(**inputs, most_targets=most)[inputs["picks"]]
    assert len(calls) == math.ceil(most * position / budget)
    assert (len(calls) > 4) == (budget < 1 << 28)
    assert all(position * (len(hidden) - 1) < budget for hidden, _ in calls)
    assert ours.shape == (6, 2)
    plain = torch.stack(
        [plain_logps(scorer.lm, *train.encode(rows[i], tokenizer)) for i in numbers]
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    pairs.reference = torch.zeros(6, 2)
    pairs.reference[numbers] = plain.detach() + torch.tensor([[0.5, -0.5]])
    train.dpo_loss(ours, pairs, numbers, train.Args())["loss"].mean().backward()
    gradients = {name: p.grad.clone() for name, p in scorer.lm.named_parameters()}
    scorer.lm.zero_grad()
    train.dpo_loss(plain, pairs, numbers, train.Args())["loss"].mean().backward()
    for name, parameter in scorer.lm.named_parameters():
        difference = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, f"{name}: relative difference {difference:.1e}"


def test_trees_of_random_sequences():
    """Each suffix's path through the tree spells it, from its prefix on, and each token sees its
    own path alone."""
    draw, pairs = np.random.default_rng(0), stage(4).Pairs()
    for _ in range(300):

        def word(most):  # of two tokens: they share a lot
            return draw.integers(1, 3, draw.integers(1, most)).tolist()

        pairs.add([9, *word(6)], [word(7), word(7)], problem=str(draw.integers(40)))
    saved = 0
    for numbers in pairs.by_problem(range(300)):
        tree = pairs.tree(numbers)
        at, size = np.arange(len(tree.ids)), len(tree.ids)
        sees = (at[:, None] >= at) & (at[:, None] < tree.last[None])
        assert (sees.sum(1) == tree.positions + 1).all()
        spelt = [tuple(tree.ids[at[row]]) for row in sees]
        assert len(set(spelt)) == size, "a sequence stands twice"
        wholes = [
            (tuple(pairs.prefixes[i]), tuple(suffix))
            for i in numbers
            for suffix in pairs.suffixes[i]
        ]
        for (prefix, suffix), pick in zip(wholes, sum(tree.picks, []), strict=True):
            nodes = tree.targets[tree.paths[pick]]
            assert tuple(tree.ids[nodes]) == suffix and spelt[nodes[-1]] == prefix + suffix
            assert spelt[tree.parent[nodes[0]]] == prefix
        beginnings = {
            whole[:k]
            for prefix, suffix in wholes
            for whole in [prefix + suffix]
            for k in range(1, len(whole) + 1)
        }
        assert beginnings == set(spelt)
        saved += sum(len(a) + len(b) for a, b in wholes) - size
    assert saved > 1000


def test_collate_matches_its_docstring():
    pairs = stage(4).Pairs()
    pairs.add([11, 12], [[13, 14], [13, 15]])
    batch = {
        name: tensor.tolist() for name, tensor in stage(4).collate([pairs.tree([0])], "cpu").items()
    }
    assert batch == {
        "ids": [[11, 12, 13, 14, 15]],
        "positions": [[0, 1, 2, 3, 3]],
        "last": [[5, 5, 5, 4, 5]],
        "source": [1, 2, 2],
        "target": [13, 14, 15],
        "take": [0, 1, 0, 2],
        "owner": [0, 0, 1, 1],
        "picks": [[0, 1]],
    }


def test_a_step_never_ends_in_eos_and_a_finished_solution_does(tokenizer):
    train, eos = stage(4), tokenizer.eos_token_id
    step, end = train.encode(pair(7), tokenizer)[1], train.encode(pair(7, last=True), tokenizer)[1]
    assert eos not in step[0] + step[1]
    assert end[0][-1] == eos and end[1][-1] == eos
    assert end[0].count(eos) == 1
    # full text without the prefix
    published = {**pair(7, last=True), "full_chosen": pair(7, last=True)["chosen"]}
    assert train.encode(published, tokenizer)[1][0][-1] == eos
    # only chosen ends here
    full_chosen = pair(7)["initial_reason_steps"] + pair(7)["chosen"]
    mixed = {**pair(7), "full_chosen": full_chosen}
    assert [suffix[-1] == eos for suffix in train.encode(mixed, tokenizer)[1]] == [True, False]


def test_an_answer_ends_as_its_template_closes_a_turn(tmp_path, small_model):
    """Gemma's EOS is <eos>, and its models stop at <end_of_turn>; where generation does not stop at
    the template's mark, EOS it is."""
    train, tokenizer = stage(4), AutoTokenizer.from_pretrained(small_model)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    close, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert train.answer_end(tokenizer, str(tmp_path)) == eos
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "eos_token_id": [close]})
    )
    assert train.answer_end(tokenizer, str(tmp_path)) == close
    for stops, end in ((eos, eos), ([eos, close], close)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        tokenizer.answer_end = train.answer_end(tokenizer, str(tmp_path))
        assert tokenizer.answer_end == end
        for row in (pair(7, last=True), {"problem": "1 + 1?", "solution": "Step 1: 2."}):
            assert {ids[-1] for ids in train.encode(row, tokenizer)[1]} == {end}
        plain = {"prompt": "Two", "chosen": " 2.", "rejected": " 3."}  # no template
        assert {ids[-1] for ids in train.encode(plain, tokenizer)[1]} == {eos}


def test_the_sides_of_a_response_that_begins_with_a_space():
    """As MetaMath's do, whose opening has one: the given steps stand in it once."""
    given = " Let's think step by step.\nStep 1: 1 + 1 = 2.\nStep 2:"
    row = {"initial_reason_steps": given, "chosen": " 2 + 1 = 3.\n", "rejected": " 4.\n"}
    row |= {f"full_{side}": given + row[side] + "So." for side in ("chosen", "rejected")}
    opening, sides, _ = stage(4).split_sides(row, "full")
    assert [opening + side for side in sides] == [row["full_chosen"], row["full_rejected"]]
    _, sides, _ = stage(4).split_sides(row | {"initial_reason_steps": ""}, "full")
    assert sides == [row["full_chosen"], row["full_rejected"]]


def test_whole_responses_in_trl_form_and_sft_rows(tokenizer):
    """Strings stand as they are and end in EOS; messages are rendered, and their turn is closed
    once."""
    train, eos = stage(4), tokenizer.eos_token_id
    prefix, suffixes = train.encode(
        {"prompt": "Two apples", "chosen": " are 2.", "rejected": " are 3."}, tokenizer
    )
    assert tokenizer.decode(prefix) == "Two apples"
    assert [tokenizer.decode(s) for s in suffixes] == [" are 2.<|im_end|>", " are 3.<|im_end|>"]

    def turn(role, text):
        return [{"role": role, "content": text}]

    row = {
        "prompt": turn("user", "How many?"),
        "chosen": turn("assistant", "2"),
        "rejected": turn("assistant", "3"),
    }
    prefix, suffixes = train.encode(row, tokenizer)
    assert (
        tokenizer.decode(prefix) == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(s).strip() for s in suffixes] == ["2<|im_end|>", "3<|im_end|>"]
    assert [s.count(eos) for s in suffixes] == [1, 1]
    prefix, [solution] = train.encode({"problem": "1 + 1?", "solution": "Step 1: 2."}, tokenizer)
    assert tokenizer.decode(prefix).endswith("\\boxed{}.<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(solution) == "Step 1: 2.<|im_end|>"


@pytest.mark.parametrize("published", [False, True])
def test_full_sides_are_whole_answers_behind_the_forced_opening(tokenizer, published):
    """The published set's full texts go on behind initial_reason_steps; 03's are the whole
    response."""
    train, opening = stage(4), "Let's think step by step.\nStep 1:"
    given = opening + " 1 + 1 = 2.\nStep 2:"
    row = {
        "prompt": "1 + 1 + 1?",
        "initial_reason_steps": given,
        "chosen": " 2 + 1 = 3.\n",
        "rejected": " 2 + 1 = 4.\n",
        "full_chosen": " 2 + 1 = 3.\nSo \\boxed{3}.",
        "full_rejected": " 2 + 1 = 4.\nStep 3: \\boxed{4}.",
    }
    wholes = [given + row["full_chosen"], given + row["full_rejected"]]
    if published:
        row["full_chosen"] = row["full_chosen"].strip()  # a label is followed by a space
    else:
        row["full_chosen"], row["full_rejected"] = wholes
    prefix, suffixes = train.encode(row, tokenizer, "full")
    assert tokenizer.decode(prefix).endswith(f"assistant\n{opening}")
    assert [opening + tokenizer.decode(ids) for ids in suffixes] == [
        f"{whole}<|im_end|>" for whole in wholes
    ]
    prefix, suffixes = train.encode(row, tokenizer)
    assert tokenizer.decode(prefix).endswith(given)
    assert tokenizer.decode(suffixes[1]) == row["rejected"]


# forms of the published rows: chosen, rejected, full_chosen, full_rejected; which sides end in EOS,
# as steps and as full texts
PUBLISHED = {
    "line breaks before the text": (
        "\nIt is 3.",
        " \nIt is 4.",
        "\nIt is 3.\nStep 3: So.\nThe answer is: 3",
        " \nIt is 4.\n\nStep 3: So.\nThe answer is: 4",
        [False, False],
        [True, True],
    ),
    "full texts without them": (
        "\nIt is 3.",
        " \nIt is 4.",
        "It is 3.\nStep 3: So.\nThe answer is: 3",
        "It is 4.\n\nStep 3: So.\nThe answer is: 4",
        [False, False],
        [True, True],
    ),
    "blank lines that differ": (
        " It is 3.\nThe answer is: 3",
        "\nIt is 4.\nThe answer is: 4",
        " It is 3.\n\nThe answer is: 3",
        "\nIt is 4.\n\nThe answer is: 4",
        [True, True],
        [True, True],
    ),
    "cut within a formula": (
        " It is\n\\[\\{3\\} \\\\[2pt]\\]",
        " It is\n\\[\\sum_{i} i + \\frac{\\",
        " It is\n\\[\\{3\\} \\\\[2pt]\\]",
        " It is\n\n\\[\\sum_{i} i + \\frac{\\",
        [True, False],
        [True, False],
    ),
    "a space at the end": (
        " It is 3. ",
        " It is 4.",
        " It is 3. \nThe answer is: 3",
        " It is 4.\nThe answer is: 4",
        [False, False],
        [True, True],
    ),
    "no rejected step": (
        " It is 3.",
        "",
        " It is 3.\nThe answer is: 3",
        "It is 4.\nThe answer is: 4",
        None,
        [True, True],
    ),
    "no rejected answer": (
        " It is 3.",
        " It is 4.",
        " It is 3.\nThe answer is: 3",
        None,
        [False, False],
        None,
    ),
}


def placed(rows: list[dict]) -> list[tuple[str, dict]]:
    return [(f"rows, row {number}", row) for number, row in enumerate(rows, 1)]


def published_row(chosen, rejected, full_chosen, full_rejected, prompt: str = "1 + 1 + 1?") -> dict:
    return {
        "prompt": prompt,
        "initial_reason_steps": f"{OPENING} 1 + 1 = 2.\nStep 2:",
        "chosen": chosen,
        "rejected": rejected,
        "full_chosen": full_chosen,
        "full_rejected": full_rejected,
    }


def sides_of(row: dict, tokenizer, sides: str) -> tuple[list[str], list[bool]]:
    """What is trained on, with what of the given steps belongs to it, and which of the sides end in
    EOS."""
    prefix, suffixes = stage(4).encode(row, tokenizer, sides)
    before = row["initial_reason_steps"] if sides == "step" else OPENING
    assert tokenizer.decode(prefix).endswith(f"assistant\n{before}")
    texts = [tokenizer.decode(ids) for ids in suffixes]
    return [text.removesuffix("<|im_end|>") for text in texts], [
        text.endswith("<|im_end|>") for text in texts
    ]


@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("sides", ["step", "full"])
def test_forms_of_published_rows(form, sides, tokenizer, small_model):
    *texts, step_ends, full_ends = PUBLISHED[form]
    row, ends = published_row(*texts), step_ends if sides == "step" else full_ends
    args = stage(4).Args(model=str(small_model), sides=sides)
    if not ends:  # left out, and the row after it stays
        rows = [row, pair(7)]
        assert len(stage(4).prepare(placed(rows), tokenizer, args, "rows")) == 1
        return
    expected = [text.rstrip(" ") for text in texts[:2]]
    if sides == "full":  # as its step begins, else a space
        starts = [step[: len(step) - len(step.lstrip())] or " " for step in texts[:2]]
        expected = [
            " 1 + 1 = 2.\nStep 2:" + start + full.lstrip()
            for start, full in zip(starts, texts[2:], strict=True)
        ]
    assert sides_of(row, tokenizer, sides) == (expected, ends)
    assert len(stage(4).prepare([("rows, row 1", row)], tokenizer, args, "rows")) == 1


def test_an_answer_that_max_tokens_cut_gets_no_eos(tokenizer):
    texts = (" 3.", " 4.", "Step 1: 2.\nStep 2: 3.", "Step 1: 2.\nStep 2: 4.\nStep 3: so")
    for finished in (True, False):
        row = published_row(*texts) | {"rejected_finished": finished}
        assert sides_of(row, tokenizer, "full")[1] == [True, finished]
        assert sides_of(row, tokenizer, "step")[1] == [False, False]


def test_sft_may_teach_another_prompt_than_the_teachers(tmp_path, tokenizer, capsys):
    """With --chat-template; without it the prompts must be the same. A file of data/download.py has
    no prompt."""
    data = tmp_path / "samples.jsonl"
    meta = tmp_path / "samples.jsonl.meta.json"
    train, template = stage(4), ROOT / "data" / "templates" / "alpaca.jinja"
    args = train.Args(data=(str(data),), objective="sft", model=str(TINY / "model"))
    meta.write_text('{"source": "hub"}')
    train.check_prompt(args, tokenizer)
    meta.write_text(json.dumps({"settings": {"prompt": "Q: 1 + 1", "opening": OPENING}}))
    with pytest.raises(SystemExit):
        train.check_prompt(args, tokenizer)
    args.chat_template = template
    train.check_prompt(args, tokenizer)
    assert "was made with prompt = ..." in capsys.readouterr().err


def test_real_published_rows(tokenizer):
    """The file has 9 rows with full texts, without the white space before them, and no given steps:
    these are ours."""
    path = ROOT.parent / "shared" / "data" / "step_dpo_10k_rows.jsonl"
    if not path.exists():
        pytest.skip("no published rows here")
    names, full_names = ("chosen", "rejected"), ("full_chosen_stripped", "full_rejected_stripped")
    rows = [row for row in read(path) if full_names[1] in row]
    found = {"step": [], "full": []}
    for number, row in enumerate(rows):
        made = published_row(*(row[name] for name in (*names, *full_names)), row["prompt"])
        texts, ends = sides_of(made, tokenizer, "step")
        assert texts == [row[name].rstrip(" ") for name in names]
        found["step"] += [(number, name) for name, end in zip(names, ends, strict=True) if end]
        texts, ends = sides_of(made, tokenizer, "full")
        for text, name, full in zip(texts, names, full_names, strict=True):
            assert f"{OPENING}{text}".startswith(made["initial_reason_steps"] + row[name][:2])
            assert text.endswith(row[full])
        found["full"] += [(number, name) for name, end in zip(names, ends, strict=True) if not end]
    assert len(rows) == 9 and found["full"] == [(2, "rejected")]  # stops in \frac{\
    # they have the answer
    assert found["step"] == [(3, "chosen"), (3, "rejected"), (6, "chosen"), (8, "chosen")]


def test_messages_and_blocks_may_be_empty_too():
    train, turn = stage(4), lambda content: [{"role": "assistant", "content": content}]
    asked = {"prompt": [{"role": "user", "content": "1 + 1?"}], "chosen": turn("2")}
    assert not train.has_empty_side(asked | {"rejected": turn("3")}, "step")
    assert train.has_empty_side(asked | {"rejected": turn(" ")}, "step")
    assert train.has_empty_side(asked | {"rejected": turn([])}, "step")
    assert train.has_empty_side(asked | {"rejected": []}, "step")


@pytest.mark.slow
def test_rows_with_an_empty_side_are_left_out_counted_and_named(tmp_path, small_model):
    rows = [pair(n) for n in range(8)]
    rows[2]["rejected"], rows[4]["full_rejected"], rows[6]["chosen"] = None, "", " "
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for sides, count, named in (("step", 6, (3, 7)), ("full", 7, (5,))):
        options = ["--data", tmp_path / "pairs.jsonl", "--model", small_model, "--sides", sides]
        options += ["--epochs", 1, "--batch-size", 4, "--out", tmp_path / sides]
        done = run(4, *options)
        assert f"{count} pairs" in done.stderr and f"{8 - count} with an empty side" in done.stderr
        places = "; ".join(f"{tmp_path / 'pairs.jsonl'}, row {number}" for number in named)
        assert f"an empty side: {places}\n" in done.stderr
        assert read(tmp_path / sides / "metrics.jsonl")[0]["loss"] == pytest.approx(
            math.log(2), abs=1e-3
        )


def test_no_eos_on_request(tmp_path, small_model, tokenizer):
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(pair(n, last=True)) + "\n" for n in range(4))
    )
    train, rows = stage(4), read(tmp_path / "pairs.jsonl")
    for eos in (True, False):
        args = train.Args(model=str(small_model), eos=eos)
        ends = [
            ids[-1]
            for suffixes in train.prepare(placed(rows), tokenizer, args, "rows").suffixes
            for ids in suffixes
        ]
        assert {end == tokenizer.eos_token_id for end in ends} == {eos}


@pytest.mark.slow
def test_sft_on_samples_takes_right_responses_once(tmp_path, small_model):
    """01's file carries the reference solution along: it is not what the model said."""

    def sample(problem, response, correct):
        return {
            "id": problem,
            "problem": problem,
            "answer": "3",
            "solution": "REFERENCE",
            "response": response,
            "correct": correct,
            "finish_reason": "stop",
        }

    rows = [
        sample("a", "Step 1: 3.", True),
        sample("a", "Step 1: 3.", True),
        sample("a", "Step 1: three.", True),
        sample("b", "Step 1: 3.", True),
        sample("b", "Step 1: 4.", False),
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = tmp_path / "samples.jsonl"
    assert stage(4).load_rows(str(name), "sft") == [
        (f"{name}, row {number}", {"problem": rows[number - 1]["problem"], "solution": text})
        for number, text in ((1, "Step 1: 3."), (3, "Step 1: three."), (4, "Step 1: 3."))
    ]
    options = ["--objective", "sft", "--data", tmp_path / "samples.jsonl", "--model", small_model]
    options += ["--epochs", 1, "--out", tmp_path / "tuned"]
    done = run(4, *options)
    assert "training on the field 'response'" in done.stderr
    assert "5 samples, 3 distinct right ones" in done.stderr
    assert "first row" in done.stderr and "REFERENCE" not in done.stderr


def test_boundary_is_where_generation_had_it(tokenizer):
    """Decoded ids give the text back, whether or not the prefix carries the space; a merge over the
    boundary is not used."""
    train = stage(4)
    row = pair(7)
    prefix, [chosen, _] = train.encode(row, tokenizer)
    assert tokenizer.decode(prefix).endswith(row["initial_reason_steps"])
    assert tokenizer.decode(chosen) == row["chosen"]
    moved = row | {
        "initial_reason_steps": row["initial_reason_steps"] + " ",
        "chosen": row["chosen"][1:],
        "rejected": "3.",
    }
    assert train.encode(moved, tokenizer)[1][0] == chosen
    assert train.encode(moved, tokenizer)[0] == prefix
    # ".\n" is one token: a prefix that ends in "." and a suffix that begins with "\n" were drawn as
    # two
    split = row | {
        "initial_reason_steps": OPENING + " Ava has 4 apples.",
        "chosen": "\nStep 2: Yes.",
        "rejected": "\nNo.",
    }
    text = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": train.USER_TURN.replace("{problem}", row["prompt"])},
            {"role": "assistant", "content": split["initial_reason_steps"]},
        ],
        tokenize=False,
        continue_final_message=True,
    )
    prefix, [chosen, _] = train.encode(split, tokenizer)
    assert (
        tokenizer(text + split["chosen"], add_special_tokens=False)["input_ids"] != prefix + chosen
    )
    assert prefix == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(chosen) == split["chosen"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_plan_covers_each_pair_once_within_the_budget(world):
    """41 pairs with 14 prefixes: pairs of one prefix share rows as far as the budget allows."""
    train = stage(4)
    pairs = train.Pairs()
    for i in range(41):
        pairs.add(list(range(5 + i % 14 * 6)), [[i, 1, 2], [500 + i % 14]])
    plans = [train.plan(pairs, range(41), 200, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in plans}) == 1
    assert len({tuple(most for _, most, _ in batches) for batches in plans}) == 1
    counted = [[trees for trees, _, is_counted in batches if is_counted] for batches in plans]
    loads = [sum(len(tree.ids) for trees in batches for tree in trees) for batches in counted]
    assert max(loads) <= 1.1 * sum(loads) / world
    trees = [tree for batches in counted for trees in batches for tree in trees]
    assert sorted(train.numbers_of(trees)) == list(range(41)) and len(trees) == 14
    assert all(len({i % 14 for i in tree.numbers}) == 1 for tree in trees)
    for trees, _, _ in [batch for batches in plans for batch in batches]:
        assert len(trees) == 1 or len(trees) * max(len(tree.ids) for tree in trees) <= 200
    few = [train.plan(pairs, [3], 200, rank, world) for rank in range(world)]
    few = [[(train.numbers_of(trees), *rest) for trees, *rest in batches] for batches in few]
    assert sorted(few, reverse=True) == [[([3], 4, True)], *[[([3], 4, False)]] * (world - 1)]
    # three pairs of a problem, of 5 + 30 tokens each, do not fit 70
    apart = train.Pairs()
    for i in range(3):
        apart.add([1] * 5, [[100 + i] * 20, [200 + i] * 10])
    parts = train.plan(apart, range(3), 70, 0, 1)
    assert sorted(tree.numbers for trees, _, _ in parts for tree in trees) == [[0, 1], [2]]
    long = train.Pairs()
    # every process makes as many chunks of logits as the one with most suffix positions
    for length in (2500, 5, 5, 5):
        long.add([length], [list(range(length)), [1]])
    targets = [
        [most for _, most, _ in train.plan(long, range(4), 3000, rank, 2)] for rank in range(2)
    ]
    assert targets[0] == targets[1] and max(targets[0]) == 2501


def test_schedule_warms_up_and_ends_at_zero():
    train, args = stage(4), SimpleNamespace(lr=1.0, warmup=0.1, schedule="cosine")
    rates = [train.learning_rate(step, 100, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5) and rates[99] < 1e-3
    assert all(a <= b for a, b in zip(rates[:10], rates[1:10], strict=False))
    assert sorted(rates[10:], reverse=True) == rates[10:]
    args.schedule = "linear"
    assert [train.learning_rate(step, 100, args) for step in (10, 55, 100)] == pytest.approx(
        [1.0, 0.5, 0.0]
    )


def write_pairs(path, count: int = 24):
    path.write_text("".join(json.dumps(pair(n + 3, last=n % 3 == 0)) + "\n" for n in range(count)))
    return path


def common(tmp_path, small_model, out: str) -> list:
    return [
        "--data",
        tmp_path / "pairs.jsonl",
        "--model",
        small_model,
        "--out",
        tmp_path / out,
        "--precision",
        "fp32",
        "--epochs",
        2,
        "--batch-size",
        5,
        "--tokens-per-batch",
        300,
        "--validation-fraction",
        0.2,
        "--eval-steps",
        4,
    ]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_training_starts_at_ln_2_moves_weights_and_resumes_exactly(tmp_path, small_model):
    write_pairs(tmp_path / "pairs.jsonl")
    run(4, *common(tmp_path, small_model, "whole"), "--lr", 1e-3)
    lines = read(tmp_path / "whole" / "metrics.jsonl")
    first, zero = next(line for line in lines if "loss" in line), lines[0]
    assert zero["step"] == 0
    assert abs(zero["val_margin"]) < 1e-4
    assert abs(zero["val_loss"] - math.log(2)) < 1e-5
    assert abs(first["loss"] - math.log(2)) < 1e-5 and abs(first["margin"]) < 1e-4
    assert lines[-1]["step"] == max(line["step"] for line in lines)
    assert lines[-1]["val_accuracy"] == 1.0
    # stop after step 4 (a kill right after its checkpoint), go on: the same numbers and the same
    # weights
    arguments = [*common(tmp_path, small_model, "parts"), "--lr", 1e-3, "--save-steps", 4]
    arguments += ["--keep", 9]
    run(4, *arguments)
    out = tmp_path / "parts"
    (out / "model.safetensors").unlink()
    for path in out.glob("checkpoint-*"):
        if path.name != "checkpoint-4":
            # as if the kill had come while it was written
            path.rename(out / f"writing-{path.name}")
    [path] = (out / "checkpoint-4").glob("optimizer*")
    [group] = torch.load(path, weights_only=False)["param_groups"]
    assert group["weight_decay"] == 0
    [logged] = [line["lr"] for line in lines if line["step"] == 4 and "lr" in line]
    assert 0 < group["lr"] == logged < 1e-3, "the schedule does not reach the optimizer"
    for path in out.glob("reference-*.npy"):
        path.unlink()  # made again of the base, not of the checkpoint
    assert "resuming from" in run(4, *arguments).stderr
    same = [
        {k: v for k, v in line.items() if not k.endswith(("_per_s", "_gib"))}
        for line in read(out / "metrics.jsonl")
    ]
    assert same == [
        {k: v for k, v in line.items() if not k.endswith(("_per_s", "_gib"))} for line in lines
    ]
    assert all(line["peak_gib"] > 0.1 for line in lines if "loss" in line)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(out)[name]), name
    changed = run(4, *arguments[:-4], "--beta", 0.1, check=False)
    assert changed.returncode == 2 and "beta = '0.4', now it is '0.1'" in changed.stderr


@pytest.mark.slow
def test_tiny_steps_move_weights(tmp_path, small_model):
    """At the paper's 5e-7 every weight matrix moves, since masters are fp32; bf16 weights would
    mostly stay."""
    write_pairs(tmp_path / "pairs.jsonl")
    run(4, *common(tmp_path, small_model, "slow"), "--lr", 5e-7, "--precision", "bf16")
    base, tuned = weights(small_model), weights(tmp_path / "slow")
    moved = sum((base[name] != tuned[name]).sum().item() for name in base) / sum(
        t.numel() for t in base.values()
    )
    assert moved > 0.9
    rounded = sum((base[n].bfloat16() != tuned[n].bfloat16()).sum().item() for n in base)
    assert rounded / sum(t.numel() for t in base.values()) < 0.1, (
        "the point of fp32 masters: bf16 cannot show these steps"
    )


def test_a_bf16_model_is_trained_in_fp32_and_saved_in_bf16(tmp_path, small_model):
    """But for a frozen base, and where DeepSpeed has masters of its own."""
    train, half = stage(4), tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16).save_pretrained(half)
    for rank, kind, dtype in (
        (0, "NO", torch.float32),
        (8, "NO", torch.bfloat16),
        (0, "DEEPSPEED", torch.bfloat16),
    ):
        args = train.Args(model=str(half), precision="bf16", lora_rank=rank)
        fake = SimpleNamespace(distributed_type=kind, is_fsdp2=False)
        lm, saved = train.load_model(train.load_config(args), args, fake)
        assert (lm.dtype, saved) == (dtype, torch.bfloat16)


OTHER = SimpleNamespace(  # of FSDP, a process that is not the first
    distributed_type="FSDP",
    is_fsdp2=True,
    is_main_process=False,
    state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=True)),
)


def test_the_other_processes_of_fsdp_do_not_fill_the_model(tmp_path):
    """8 processes with a model of 7B each would need 244 GB of main memory."""
    train = stage(4)
    from transformers import Qwen2Config

    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 1}
    Qwen2Config(**shape, num_attention_heads=14, tie_word_embeddings=True).save_pretrained(tmp_path)
    args = train.Args(model=str(tmp_path), precision="fp32")
    config = train.load_config(args)
    before = psutil.Process().memory_full_info().uss
    lm, _ = train.load_model(config, args, OTHER)
    size = sum(4 * weight.numel() for weight in lm.parameters())
    assert psutil.Process().memory_full_info().uss - before < size / 10
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert lm.model.rotary_emb.inv_freq[0] == 1


def test_a_model_with_buffers_is_refused_under_fsdp(tmp_path, capsys):
    """accelerate 1.15 fails at them when the model is loaded."""
    from transformers import Glm4MoeConfig

    shape = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "head_dim": 4}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    Glm4MoeConfig(
        **shape, vocab_size=64, n_routed_experts=4, num_experts_per_tok=2
    ).save_pretrained(tmp_path)
    train = stage(4)
    args = train.Args(model=str(tmp_path), precision="fp32")
    with pytest.raises(SystemExit):
        train.load_model(train.load_config(args), args, OTHER)
    assert "has buffers, which FSDP2 cannot send" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_follows_the_clipped_gradient_of_the_mean_loss(tmp_path, small_model, tokenizer):
    """By SGD, which shows the gradient's length; against separate rows and autograd."""
    rows = read(write_pairs(tmp_path / "pairs.jsonl", 7))
    adamw = "torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)"
    given = ["--data", tmp_path / "pairs.jsonl", "--model", small_model, "--precision", "fp32"]
    given += ["--epochs", 1, "--batch-size", 7, "--tokens-per-batch", 150, "--lr", 1e-3]
    given += ["--out", tmp_path / "out"]
    done = run_edited(tmp_path, 4, adamw, "torch.optim.SGD(trained, lr=args.lr)", *given)
    assert done.returncode == 0, done.stderr
    lm = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    logps = torch.stack([plain_logps(lm, *stage(4).encode(row, tokenizer)) for row in rows])
    margin = 0.4 * (logps - logps.detach())
    (-torch.nn.functional.logsigmoid(margin[:, 0] - margin[:, 1])).mean().backward()
    norm = torch.cat([weight.grad.flatten() for weight in lm.parameters()]).norm().item()
    [line] = read(tmp_path / "out" / "metrics.jsonl")
    assert norm > 1 and line["grad_norm"] == pytest.approx(norm, rel=1e-3)
    base, tuned = weights(small_model), weights(tmp_path / "out")
    moved = torch.cat([(tuned[name] - base[name]).flatten() for name in base]).norm().item()
    assert moved == pytest.approx(1e-3, rel=1e-2)  # of the norm 1, by --lr


@pytest.mark.slow
def test_micro_batches_and_processes_do_not_change_the_step(tmp_path, small_model):
    """One optimizer step over 7 pairs: packed as one batch, as many, with activations computed
    again, and over two processes, the weights are the same."""
    write_pairs(tmp_path / "pairs.jsonl", 7)
    base = ["--data", tmp_path / "pairs.jsonl", "--model", small_model, "--precision", "fp32"]
    base += ["--epochs", 1, "--batch-size", 7, "--lr", 1e-4]
    run(4, *base, "--out", tmp_path / "one")
    run(4, *base, "--out", tmp_path / "many", "--tokens-per-batch", 150)
    run(4, *base, "--out", tmp_path / "again", "--gradient-checkpointing")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "04_train_stepdpo.py",
    ]
    command = [*launch, *map(str, [*base, "--out", tmp_path / "two", "--tokens-per-batch", 150])]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [read(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "many", "again", "two")]
    for log in logs[1:]:
        for name in ("loss", "chosen_logp", "rejected_logp", "grad_norm"):
            assert log[name] == pytest.approx(logs[0][name], rel=1e-4), name
    for name, tensor in weights(tmp_path / "one").items():
        for other in ("many", "again", "two"):
            torch.testing.assert_close(weights(tmp_path / other)[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_model_loads_and_long_pairs_are_left_out(tmp_path, small_model, tokenizer):
    write_pairs(tmp_path / "pairs.jsonl")
    ids = [stage(4).encode(pair(n + 3, last=n % 3 == 0), tokenizer) for n in range(24)]
    longest = sorted(len(prefix) + max(map(len, suffixes)) for prefix, suffixes in ids)
    common_arguments = common(tmp_path, small_model, "out")[:-4]
    done = run(4, *common_arguments, "--max-length", longest[15])
    left_out = sum(length > longest[15] for length in longest)
    assert left_out and f"left out: {left_out} above --max-length" in done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    # the tied head is stored once
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


@pytest.mark.slow
def test_trl_computes_the_same_loss(tmp_path, small_model, tokenizer):
    """On whole responses, where TRL's rules and ours agree, and with a reference that is another
    model."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    train = stage(4)
    rows = [
        {
            "prompt": f"Ava has {n} apples.",
            "chosen": f" She has {n}.",
            "rejected": f" She has {n + 1}, I think.",
        }
        for n in range(6)
    ]

    def load():
        return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)

    policy, other = load(), load()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(
                0.02
                * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                )
            )
    settings = {
        "per_device_train_batch_size": 6,
        "beta": 0.4,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "loss_type": "sigmoid",
    }
    config = DPOConfig(str(tmp_path / "trl"), **settings)
    trainer = DPOTrainer(
        policy,
        other,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    theirs = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    pairs = pairs_of(train, rows, tokenizer)
    batch = train.collate([pairs.tree([i]) for i in range(6)], "cpu")
    with torch.no_grad():
        logps = [train.SuffixScorer(lm)(**batch)[batch["picks"]] for lm in (load(), other)]
    pairs.reference = logps[1]
    ours = train.dpo_loss(logps[0], pairs, list(range(6)), train.Args(beta=0.4))["loss"].mean()
    assert abs(ours - math.log(2)) > 0.05, "the models are too much alike to tell anything"
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_sft_loss_is_the_mean_over_the_solution_tokens(tmp_path, small_model, tokenizer):
    """First step against transformers' own loss, on rows of unequal length, in several
    micro-batches."""
    rows = [row for row in read(TINY / "validation.jsonl")[:6]]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--objective", "sft", "--data", tmp_path / "sft.jsonl", "--model", small_model]
    options += ["--out", tmp_path / "out", "--precision", "fp32", "--batch-size", 6]
    options += ["--tokens-per-batch", 300, "--epochs", 30, "--lr", 3e-3]
    run(4, *options, "--validation", tmp_path / "sft.jsonl")
    lm = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    total = 0.0
    count = 0
    for row in rows:
        prefix, [solution] = stage(4).encode(row, tokenizer)
        ids = torch.tensor([prefix + solution])
        labels = torch.tensor([[-100] * len(prefix) + solution])
        total += lm(ids, labels=labels).loss.item() * len(solution)
        count += len(solution)
    lines = read(tmp_path / "out" / "metrics.jsonl")
    assert lines[0]["val_loss"] == pytest.approx(total / count, rel=1e-4)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(total / count, rel=1e-5)
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
def test_the_maker_of_the_bundled_model_trains_by_04(tmp_path):
    """A very small one: the committed problems come out again, and the loss falls."""
    arguments = ["--out", tmp_path / "a", "--work", tmp_path / "work-a", "--steps", 8]
    arguments += ["--batch", 16, "--hidden", 32, "--layers", 1, "--log-steps", 1]
    subprocess.run(
        [sys.executable, TINY / "make.py", *map(str, arguments)],
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert all(
        (tmp_path / "a" / f"{s}.jsonl").read_bytes() == (TINY / f"{s}.jsonl").read_bytes()
        for s in ("train", "test")
    )
    lines = read(tmp_path / "work-a" / "model" / "metrics.jsonl")
    assert len(lines) == 8 and lines[-1]["loss"] < lines[0]["loss"] - 0.05
    learnt, test = (
        {row["problem"] for row in read(path)}
        for path in (tmp_path / "work-a/corpus.jsonl", TINY / "test.jsonl")
    )
    assert 100 < len(learnt) <= 8 * 16 and not learnt & test


LOGPS = torch.tensor([[-1.0, -3.0], [-2.0, -1.0]])
REFERENCE = torch.tensor([[-1.5, -2.0], [-2.0, -2.5]])
RATIO = torch.tensor([1.5, -1.5])  # the log-ratios of chosen less those of rejected


def two_pairs(train, rows):
    """Pairs 1 and 2 of three, with the numbers of these rows."""
    pairs = train.Pairs()
    for fields in ({}, *rows):
        pairs.add([1], [[2], [3]], fields=fields)
    pairs.reference = torch.cat([torch.full((1, 2), 9.0), REFERENCE])
    return pairs


def test_the_loss_follows_its_formula():
    train = stage(4)
    found = train.dpo_loss(LOGPS, two_pairs(train, [{}, {}]), [1, 2], train.Args(beta=0.5))
    torch.testing.assert_close(found["loss"], torch.log1p(torch.exp(-0.5 * RATIO)))
    torch.testing.assert_close(found["margin"], 0.5 * RATIO)
    rewards = torch.stack([found["chosen_reward"], found["rejected_reward"]], 1)
    torch.testing.assert_close(rewards, torch.tensor([[0.25, -0.5], [0.0, 0.75]]))
    assert found["accuracy"].tolist() == [1, 0] and found["chosen_logp"].tolist() == [-1, -2]


@pytest.mark.parametrize(
    "number, expected",
    [
        (0, (RATIO - 1 / (2 * 0.5)) ** 2),  # IPO, arXiv 2310.12036, Eq. 17
        # ODPO, arXiv 2402.10571, Eq. 8
        (1, torch.log1p(torch.exp(torch.tensor([0.2, 0.7]) - 0.5 * RATIO))),
    ],
)
def test_the_losses_of_the_documents(tmp_path, monkeypatch, tokenizer, number, expected):
    """docs/trainer.md's diffs apply, and are what it says they are; a row's number comes from
    prepare()."""
    diff = re.findall(
        r"^```diff\n(.*?)^```", (ROOT / "docs" / "trainer.md").read_text(), re.M | re.S
    )[number]
    shutil.copy(ROOT / "04_train_stepdpo.py", tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    (tmp_path / "04_train_stepdpo.py").rename(tmp_path / f"edited_{number}.py")
    monkeypatch.syspath_prepend(tmp_path)
    train = importlib.import_module(f"edited_{number}")
    rows = [pair(5) | {"margin": margin} for margin in (0.2, 0.7)]
    fields = train.prepare(
        placed(rows), tokenizer, train.Args(model=str(TINY / "model")), "rows"
    ).fields
    assert [found["margin"] for found in fields] == [0.2, 0.7]
    found = train.dpo_loss(LOGPS, two_pairs(train, fields), [1, 2], train.Args(beta=0.5))
    torch.testing.assert_close(found["loss"], expected)


def test_what_enters_the_loss_makes_another_run():
    """What a checkpoint is compared by knows beta, the numbers of the rows and, see
    test_an_edited_loss_is_named, the code."""
    train, tokenizer = stage(4), stage(4).load_tokenizer(str(TINY / "model"), None, "{}")

    def settings(margin: float, **options) -> dict:
        return train.settings_of(
            train.Args(**options), tokenizer, "w", two_pairs(train, [{}, {"margin": margin}]), None
        )

    def differ(a, b):
        return {name for name, value in a.items() if b[name] != value}

    base = settings(0.1)
    assert differ(base, settings(0.1)) == set() and differ(base, settings(0.2)) == {"pairs"}
    assert differ(base, settings(0.1, beta=0.3)) == {"beta"}
    names = "objective sides eos epochs lr schedule warmup batch_size max_length weight_decay"
    names += " precision lora_rank seed train_execution"
    assert set(names.split()) <= base.keys()


@pytest.mark.slow
def test_a_finished_run_is_left_alone(tmp_path, small_model):
    """--keep 0: no checkpoint tells. With another setting its model is not written over."""
    write_pairs(tmp_path / "pairs.jsonl")
    arguments = [*common(tmp_path, small_model, "out"), "--keep", 0, "--lr", 1e-9]
    run(4, *arguments)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "training.json" in before and "model.safetensors" in before
    again = run(4, *arguments)
    assert f"{tmp_path / 'out'}: finished, nothing to do" in again.stderr
    assert "training:" not in again.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    other = run(4, *arguments[:-1], 1e-3, check=False)
    assert other.returncode == 2 and "was made with lr = '1e-09', now it is '0.001'" in other.stderr
    run("plot_training", tmp_path / "out")
    assert (tmp_path / "out" / "training.png").stat().st_size > 20_000
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {small_model}\n" in card
    assert "| lr | 1e-09 |" in card
    assert "![training](training.png)" in card
    assert "Last step: step 8, epoch 2, loss 0.69" in card
    assert "nothing to do" in run(4, *arguments).stderr, (
        "picture and card are none of the training's business"
    )


def test_pictures_of_trainings(tmp_path):
    """Of one that is not finished no card; of several one picture; what is no run is named."""
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        rows = [
            {"step": step, "loss": 0.69 / (step + number), "chosen_logp": -step}
            for step in (1, 2, 3)
        ]
        rows.append({"step": 3, "val_loss": 0.2, "val_accuracy": 1.0})
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    done = run("plot_training", tmp_path / "a")
    assert "the training is not finished, no model card" in done.stderr
    assert not (tmp_path / "a" / "README.md").exists()
    assert (tmp_path / "a" / "training.png").read_bytes()[1:4] == b"PNG"
    run("plot_training", tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "training.png").read_bytes() != (
        tmp_path / "a" / "training.png"
    ).read_bytes()
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": "four"}\n')
    for folder, said in (
        ("b", "metrics.jsonl, line 5: no object"),
        ("c", "metrics.jsonl: cannot be read (FileNotFoundError)"),
    ):
        done = run("plot_training", tmp_path / folder, check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_edited_loss_is_named(tmp_path, small_model):
    """A hinge instead of the logistic loss: its first value is no sign of a policy that differs
    from the reference."""
    write_pairs(tmp_path / "pairs.jsonl", 6)
    arguments = [*common(tmp_path, small_model, "out"), "--lr", 1e-3]
    done = run_edited(tmp_path, 4, "-F.logsigmoid(margin)", "F.relu(1 - margin)", *arguments)
    assert done.returncode == 0, done.stderr
    [said] = [line for line in done.stderr.splitlines() if "first loss" in line]
    assert said == "warning: first loss: 1.0000 and not ln 2 = 0.6931: dpo_loss() was edited"
    plain = run(4, *arguments, check=False)
    assert plain.returncode == 2 and "was made before an edit of dpo_loss;" in plain.stderr


def test_a_policy_that_is_not_its_reference_is_named(capsys):
    train = stage(4)
    pairs, found = train.Pairs(), {"loss": 0.75, "grad_norm": 1.0, "chosen_reward": 0.0}
    pairs.add([1], [[2], [3]])
    pairs.reference = torch.tensor([[-1.0, -2.0]])
    for metrics in (found, {"loss": 0.75, "grad_norm": 0.0}):  # an edited loss has no rewards
        train.check(1, metrics, pairs, [0], train.Args())
    assert (
        "first loss: 0.7500 and not 0.6931: policy and reference differ" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_an_edited_batches_makes_its_own_number_of_steps(tmp_path, small_model):
    """The last batch, which is not full, is dropped: no step asks for it."""
    write_pairs(tmp_path / "pairs.jsonl", 7)
    arguments = ["--data", tmp_path / "pairs.jsonl", "--model", small_model, "--precision", "fp32"]
    arguments += ["--out", tmp_path / "out", "--epochs", 2, "--batch-size", 3]
    edit = ("range(0, len(order), size)]", "range(0, len(order) - size + 1, size)]")
    done = run_edited(tmp_path, 4, *edit, *arguments)
    assert done.returncode == 0, done.stderr
    lines = read(tmp_path / "out" / "metrics.jsonl")
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_one_training_writes_a_folder(tmp_path, small_model, monkeypatch, capsys):
    """The second is told so; where there are no locks, both are warned and run."""
    import errno

    train = stage(4)
    write_pairs(tmp_path / "pairs.jsonl", 6)
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "metrics.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = run(4, *common(tmp_path, small_model, "out"), check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: --out {tmp_path / 'out'}: another training is writing it" in done.stderr

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train.fcntl, "flock", no_locks)
    for _ in range(2):
        assert train.lock_out(tmp_path / "out") == ""
    assert capsys.readouterr().err.count("has no locks (No locks available)") == 1
    train.lock_out.file.close()


def test_freed_memory_is_kept():
    """Page faults of thirty tensors of 64 MB, one after the other: 16,000 each without it."""
    code = """if True:
        import importlib, resource, torch
        train, faults = importlib.import_module("04_train_stepdpo"), []
        train.keep_memory()
        for _ in range(30):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(1 << 24)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(*faults)"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    faults = [int(number) for number in done.stdout.split()]
    assert faults[0] and sum(faults[10:]) < 16_000, faults


def test_a_folder_that_cannot_be_written(tmp_path, small_model):
    write_pairs(tmp_path / "pairs.jsonl", 6)
    (tmp_path / "file").write_text("mine")
    done = run(4, *common(tmp_path, small_model, "file"), check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    assert f"error: --out {tmp_path / 'file'}: File exists; give a folder" in done.stderr
    # also for root
    assert stage(4).lock_out(Path("/proc/stepdpo")).startswith("--out /proc/stepdpo: ")


@pytest.mark.parametrize(
    "given, said",
    [
        (["--beta", "nan"], "--beta nan, --lr"),
        (["--validation-fraction", "5"], "--validation-fraction one from 0 to below 1"),
        (["--seed", "-1"], "--seed and --keep are at least 0"),
        (["--weight-decay", "-1"], "--seed and --keep are at least 0"),
        (["--out", "MODEL"], "is the model's own folder"),
    ],
)
def test_options_that_make_no_run_are_named(tmp_path, small_model, given, said):
    write_pairs(tmp_path / "pairs.jsonl", 6)
    given = [small_model if part == "MODEL" else part for part in given]
    before = sorted(small_model.iterdir())
    done = run(4, *common(tmp_path, small_model, "out"), *given, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert sorted(small_model.iterdir()) == before


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "qwen2 cannot be trained here: layers of linear_attention",
        ),
        (
            {"model_type": "recurrent_gemma", "layer_types": None},
            "recurrent_gemma cannot be trained here: recurrent layers",
        ),
        (
            {"model_type": "gemma2", "layer_types": None},
            "cannot be trained here: sdpa leaves out the cap",
        ),
        ({"model_type": "phimoe", "layer_types": None}, "it draws experts at random"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantized"),
        ({"model_type": "gpt2", "layer_types": None}, "gpt2 has no intermediate_size"),
        ({"model_type": "brandnew"}, "cannot be loaded (The checkpoint"),
    ],
)
def test_models_that_cannot_be_trained_are_named(tmp_path, small_model, changes, said):
    config = json.loads((small_model / "config.json").read_text())
    if changes.get("model_type"):
        config = {}
        (small_model / "generation_config.json").unlink()
    (small_model / "config.json").write_text(json.dumps(config | changes))
    write_pairs(tmp_path / "pairs.jsonl", 6)
    done = run(4, *common(tmp_path, small_model, "out"), check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_torn_weight_file_is_named(tmp_path, small_model):
    path = small_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    write_pairs(tmp_path / "pairs.jsonl", 6)
    done = run(4, *common(tmp_path, small_model, "out"), check=False)
    assert done.returncode == 2 and "cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_deepspeed_files_are_set_or_refused(monkeypatch, capsys):
    """What a ratio leaves on the GPU would follow no schedule; other stages are not ZeRO-3."""
    train, config = stage(4), json.loads((ROOT / "configs" / "zero3_offload.json").read_text())
    config["gradient_accumulation_steps"] = 4
    zero = config["zero_optimization"]
    zero["offload_optimizer"]["ratio"] = 0.75
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    kind = type("Kind", (str,), {"value": "DEEPSPEED"})("DEEPSPEED")
    fake = SimpleNamespace(distributed_type=kind, num_processes=8, state=state, is_fsdp2=False)
    monkeypatch.setattr(train, "Accelerator", lambda **_: fake)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert train.start_accelerate(train.Args()) is fake
    assert config["gradient_accumulation_steps"] == 1 == fake.gradient_accumulation_steps
    assert train.strategy_of(fake) == ("zero3", True)
    assert zero["offload_optimizer"] == {"device": "cpu"}
    zero["stage"] = 2
    with pytest.raises(SystemExit):
        train.start_accelerate(train.Args())
    assert "ZeRO stage is 2; take configs/zero3.yaml" in capsys.readouterr().err
    zero["stage"] = 3
    config["optimizer"] = {"type": "AdamW"}
    fsdp = type("Kind", (str,), {"value": "FSDP"})("FSDP")
    for one, said in ((kind, "has an optimizer or a scheduler"), (fsdp, "set fsdp_version: 2")):
        fake.distributed_type = one
        with pytest.raises(SystemExit):
            train.start_accelerate(train.Args())
        assert said in capsys.readouterr().err


def test_a_row_is_named_by_its_own_file(tmp_path, small_model):
    write_pairs(tmp_path / "pairs.jsonl", 6)
    shared = {"from": "human", "value": "1 + 1?"}
    row = {"prompt": [shared], "chosen": [shared], "rejected": [shared]}
    first = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
    (tmp_path / "more.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n")
    given = common(tmp_path, small_model, "out")
    given[2:2] = [tmp_path / "more.jsonl"]
    done = run(4, *given, "--validation-fraction", 0, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "more.jsonl, row 2: KeyError: 'content'" in done.stderr


def test_samples_say_whether_they_are_right(tmp_path, small_model):
    row = {"problem": "1 + 1?", "response": "It is \\boxed{3}.", "correct": "false"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    done = run(
        4, "--objective", "sft", "--data", tmp_path / "samples.jsonl", "--model", small_model,
        "--out", tmp_path / "out", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "row 1: 'correct' must be true or false" in done.stderr


def test_no_eos_cuts_what_a_template_puts_after_it(tokenizer):
    train, (end,) = stage(4), tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    assert end == tokenizer.eos_token_id
    cases = ([5, 6, end], [5, 6]), ([5, end, 6], [5]), ([end, 5, 6], [end, 5, 6]), ([], [])
    for ids, expected in cases:
        assert train.without_eos(ids, end) == expected
    assert train.without_eos([5, 6], None) == [5, 6]


@pytest.mark.slow
def test_what_a_launch_file_or_a_base_may_bring(tmp_path, small_model, monkeypatch):
    """Its own accumulation does not divide gradients; a temperature without do_sample does not
    stop the saving of the model; a resumed run counts all seconds, and does not resume by another
    launch; --keep 0 leaves other folders alone."""
    path = small_model / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    write_pairs(tmp_path / "pairs.jsonl")
    norms = []
    for out, steps in (("one", "1"), ("four", "4")):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        given = [*common(tmp_path, small_model, out), "--lr", 1e-3, "--save-steps", 4]
        run(4, *given, "--keep", 9)
        lines = read(tmp_path / out / "metrics.jsonl")
        norms.append([line["grad_norm"] for line in lines if "loss" in line])
    assert norms[0] == norms[1] and norms[0][0] > 0
    out = tmp_path / "four"
    saved = json.loads((out / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 2 and "temperature" not in saved

    (out / "model.safetensors").unlink()
    for path in stage(4).checkpoints(out)[1:]:
        path.rename(out / f"writing-{path.name}")
    path = out / "checkpoint-4" / "state.json"
    state = json.loads(path.read_text())
    assert 0 < state["seconds"] < 600 and state["settings"]["launch"] == "copies"
    other = state["settings"] | {"launch": "fsdp2"}
    path.write_text(json.dumps(state | {"settings": other}))
    done = run(4, *given, check=False)
    assert done.returncode == 2 and "launch = 'fsdp2', now it is 'copies'" in done.stderr
    path.write_text(json.dumps(state | {"seconds": 5000}))
    others = {"checkpoint-best", "checkpoint-2000"}  # the second as TRL names it
    for name in others:
        (out / name).mkdir()
    run(4, *given, "--keep", 0)
    assert 5000 < json.loads((out / "training.json").read_text())["seconds"] < 5600
    assert {path.name for path in out.glob("checkpoint-*")} == others


def code_tokenizer(folder, eos: str):
    """That of the bundled model that writes code, with this end of a text."""
    found = AutoTokenizer.from_pretrained(TINY / "code")
    found.add_special_tokens({"eos_token": eos})
    found.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("eos", ["</s>", "<|endofmessage|>"])
def test_a_finished_solution_with_code_closes_its_message(tmp_path, eos):
    """Pairs of the SCDPO authors, of 03, and solutions: a block ends, the message ends, the text
    ends; a step ends nothing."""
    train, tokenizer = stage(4), code_tokenizer(tmp_path, eos)

    def block(kind, text):
        return {"type": kind, "content": text}

    def turn(*blocks):
        return {"role": "assistant", "content": list(blocks)}

    user = {"role": "user", "content": [block("text", "1 + 1?")]}
    authors = {
        "chosen": [user, turn(block("code", "1 + 1"), block("execution", "2"), block("text", "2"))],
        "rejected": [user, turn(block("text", "3"))],
    }
    wholes = ["<|text|>It is 2<|endofblock|>", "<|text|>It is 3<|endofblock|>"]
    ours = {
        "prompt": "1 + 1?",
        "initial_reason_steps": "",
        "chosen": wholes[0],
        "rejected": wholes[1],
        "full_chosen": wholes[0],
        "full_rejected": wholes[1] + wholes[0],
    }
    ends = "<|endofblock|><|endofmessage|>" + eos * (eos != "<|endofmessage|>")
    for row, finished in (
        (authors, (True, True)),
        (ours, (True, False)),
        ({"problem": "1?", "solution": wholes[0]}, (True,)),
    ):
        prefix, suffixes = train.encode(row, tokenizer)
        assert tokenizer.decode(prefix).endswith("<|assistant|>")
        for ids, end in zip(suffixes, finished, strict=True):
            text = tokenizer.decode(ids)
            assert text.endswith(ends if end else "3<|endofblock|>")
            assert text.count("<|endofmessage|>") == end
            assert train.Pairs((0, 1)).trained(np.array(ids[-3:])).all()


MESSAGES = [{"role": "assistant", "content": "7"}], [{"role": "assistant", "content": "8"}]


@pytest.mark.parametrize(
    "row, said",
    [
        (
            {"prompt": "3+4?", "chosen": MESSAGES[0], "rejected": MESSAGES[1]},
            "row 1: TypeError: of prompt, chosen and rejected",
        ),
        # a prompt within the sides: of TRL's forms that with an explicit one is read
        ({"chosen": MESSAGES[0], "rejected": MESSAGES[1]}, "no 'prompt', and chosen"),
        ({"chosen": "It is 7.", "rejected": "It is 8."}, "no 'prompt', and chosen"),
        ({"prompt": "3\ud800?", "chosen": "7", "rejected": "8"}, "line 1: "),
        (
            {
                "prompt": [{"role": "user", "content": "\udcff"}],
                "chosen": MESSAGES[0],
                "rejected": MESSAGES[1],
            },
            "half a character",
        ),
        (pair(3) | {"initial_reason_steps": "Step \ud800 1:"}, "half a character"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, small_model, capsys, row, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    args = stage(4).Args(
        data=(str(tmp_path / "rows.jsonl"),), model=str(small_model), validation_fraction=0.01
    )
    with pytest.raises(SystemExit) as stopped:
        stage(4).start(args)
    found = capsys.readouterr().err
    assert stopped.value.code == 2 and said in found and "rows.jsonl" in found


def test_an_error_that_says_nothing_has_its_name():
    assert stage(4).first_line(TimeoutError()) == "TimeoutError"
    assert stage(4).first_line(OSError("no such set\nsee the hub")) == "no such set"


def test_eos_of_a_tokenizer_does_not_stand_in_the_middle(tmp_path):
    """One that puts marks around plain text, as with add_eos_token: the first stays, once, the last
    would end the prompt."""
    from tokenizers.processors import TemplateProcessing

    marked = AutoTokenizer.from_pretrained(TINY / "model")
    marked.add_special_tokens({"bos_token": "<|im_start|>"})
    begin, eos = marked.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    special = [("<|im_start|>", begin), ("<|im_end|>", eos)]
    marked.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=special
    )
    assert marked("2")["input_ids"][-1] == eos
    for prompt in ("Two apples", "<|im_start|>Two apples"):
        row = {"prompt": prompt, "chosen": " are 2.", "rejected": " are 3."}
        prefix, suffixes = stage(4).encode(row, marked)
        assert marked.decode(prefix) == "<|im_start|>Two apples"
        ends = [marked.decode(ids) for ids in suffixes]
        assert ends == [" are 2.<|im_end|>", " are 3.<|im_end|>"]


@pytest.mark.slow
@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_lora_moves_only_adapters_and_saves_both_ways(save, tmp_path, small_model):
    write_pairs(tmp_path / "pairs.jsonl")
    options = [*common(tmp_path, small_model, "out"), "--lr", 1e-2, "--lora-rank", 4]
    options += ["--lora-save", save]
    run(4, *options)
    lines = read(tmp_path / "out" / "metrics.jsonl")
    assert abs(lines[0]["val_loss"] - math.log(2)) < 1e-5 and lines[-1]["val_margin"] > 0.01
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    ids = torch.arange(5, 60)[None]
    if save == "adapter":
        from peft import PeftModel

        assert not (tmp_path / "out" / "model.safetensors").exists()
        tuned = PeftModel.from_pretrained(base, tmp_path / "out")
    else:
        tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        same = [
            torch.equal(weights(tmp_path / "out")[name], tensor)
            for name, tensor in weights(small_model).items()
            if "embed" in name or "norm" in name
        ]
        assert same and all(same)
    plain = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    assert (tuned(ids).logits - plain(ids).logits).abs().max() > 1e-3
    # saved in the other way into the same folder: the adapters count once
    options[-1] = {"merged": "adapter", "adapter": "merged"}[save]
    run(4, *options)
    is_whole = (tmp_path / "out" / "model.safetensors").exists()
    assert is_whole == (options[-1] == "merged")
    assert is_whole != (tmp_path / "out" / "adapter_config.json").exists()
    if is_whole:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(again(ids).logits, tuned(ids).logits, rtol=1e-3, atol=0.02)


def test_merged_adapters_keep_fused_experts():
    """peft's "all-linear" would wrap the experts, whose weights are no linear layer's."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    train = stage(4)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3MoeConfig(vocab_size=50, num_experts=4, num_experts_per_tok=2, **sizes)
    torch.manual_seed(0)
    lm, plain = Qwen3MoeForCausalLM(config).eval(), Qwen3MoeForCausalLM(config).eval()
    names = set(lm.state_dict())
    train.add_lora(lm, train.Args(lora_rank=2))
    moved = [p for name, p in lm.named_parameters() if ".lora_B." in name]
    for parameter in moved:
        torch.nn.init.normal_(parameter)
    weights = train.whole_weights(lm.state_dict(), {}, torch.float32)
    assert set(weights) == names and len(moved) == 8  # q, k, v, o of two layers
    plain.load_state_dict(weights)
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(plain(ids).logits, lm(ids).logits)


def test_seed_and_epoch_order_the_problems():
    train, pairs = stage(4), stage(4).Pairs()
    for number in range(30):
        pairs.add([1, number % 10], [[2], [3, number]], f"problem {number % 10}")
    orders = []
    for seed, epoch in ((0, 0), (1, 0), (0, 1)):
        batches = train.batches(pairs, train.Args(seed=seed, batch_size=7), epoch)
        assert [len(batch) for batch in batches] == [7, 7, 7, 7, 2]
        order = sum(batches, [])
        assert sorted(order) == list(range(30))
        groups = [pairs.group[i] for i in order]
        assert all(len(set(groups[k : k + 3])) == 1 for k in range(0, 30, 3)), "kept together"
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_every_pair_has_a_reference(monkeypatch):
    """Whatever an edit of batches() draws: else the reference of some would be 0."""
    train, pairs = stage(4), stage(4).Pairs()
    for number in range(30):
        pairs.add([1], [[2], [3, number]], f"problem {number}")
    monkeypatch.setattr(train, "batches", lambda *_: [[1, 2, 3, 4], [4, 5, 6, 1]])

    def score(world: int) -> torch.Tensor:
        """Of `world` processes, one after the other; the last adds up."""
        sums = [0.0, 0.0]
        for rank in range(world):
            order = itertools.count()

            def reduce(tensor, _, order=order):
                place = next(order)
                sums[place] = sums[place] + tensor
                return sums[place]

            one = SimpleNamespace(device="cpu", process_index=rank, num_processes=world)
            one.reduce = reduce
            args = train.Args(batch_size=4)
            logps = train.score_all(scorer, pairs, args, one, "")
        return logps

    scorer = train.SuffixScorer(shaped("qwen2"))
    rows = zip(pairs.prefixes, pairs.suffixes, strict=True)
    separate = [plain_logps(scorer.lm, p.tolist(), [s.tolist() for s in two]) for p, two in rows]
    for world in (1, 2):
        torch.testing.assert_close(score(world), torch.stack(separate).detach())
    assert {"score_all", "load_model"} <= train.source_hashes(train.STEP_CODE).keys()


def test_a_reference_is_used_again_only_for_what_made_it(tmp_path, monkeypatch):
    """Weights, precision, sharding, pairs and code."""
    train, pairs, other, scored = stage(4), stage(4).Pairs(), stage(4).Pairs(), []
    pairs.add([1], [[2], [3]])
    other.add([1], [[2], [4]])

    def score_all(*_):
        scored.append(1)
        return torch.full((1, 2), float(len(scored)))

    monkeypatch.setattr(train, "from_first", lambda accelerator, compute: compute())
    monkeypatch.setattr(train, "score_all", score_all)
    for weights, precision, launch, rank in (
        ("a", "fp32", "NO", 0),
        ("a", "fp32", "MULTI_CPU", 0),
        ("b", "fp32", "NO", 0),
        ("a", "bf16", "NO", 0),
        ("a", "bf16", "FSDP", 0),
        ("a", "bf16", "NO", 8),
    ):
        args = train.Args(out=tmp_path, precision=precision, lora_rank=rank)
        first = SimpleNamespace(is_main_process=True, distributed_type=launch)
        train.reference_logps(None, pairs, args, first, weights)
    assert len(scored) == 5 == len(list(tmp_path.glob("reference-*.npy")))
    args = train.Args(out=tmp_path, precision="fp32")
    first = SimpleNamespace(is_main_process=True, distributed_type="NO")
    assert train.reference_logps(None, pairs, args, first, "a").tolist() == [[1.0, 1.0]]
    train.reference_logps(None, other, args, first, "a")
    monkeypatch.setattr(train, "source_hashes", lambda _: {"SuffixScorer": "edited"})
    train.reference_logps(None, pairs, args, first, "a")
    assert len(scored) == 7


def test_a_step_that_went_wrong_ends_the_run(tmp_path, capsys):
    train, pairs = stage(4), stage(4).Pairs()
    pairs.add([1], [[2], [3]])
    pairs.reference = torch.zeros(1, 2)
    args = train.Args(out=tmp_path)
    for figures in ({"loss": math.nan, "grad_norm": 1.0}, {"loss": 1.0, "grad_norm": math.inf}):
        with pytest.raises(SystemExit):
            train.check(3, figures, pairs, [0], args)
        assert "step 3: loss" in capsys.readouterr().err
    train.warn.cache_clear()
    for logp, said in ((4.9, False), (-4.9, False), (-5.1, True)):  # more than 5 nats
        # whatever an edited loss takes for a reward
        figures = {"loss": 0.6, "grad_norm": 1.0, "chosen_reward": -90.0, "chosen_logp": logp}
        train.check(3, figures, pairs, [0], args)
        assert ("nats less likely" in capsys.readouterr().err) == said


def test_the_model_has_no_dropout_and_no_jitter(tmp_path):
    from transformers import MixtralConfig

    MixtralConfig(attention_dropout=0.1, router_jitter_noise=0.1).save_pretrained(tmp_path)
    config = stage(4).load_config(stage(4).Args(model=str(tmp_path)))
    assert config.attention_dropout == config.router_jitter_noise == 0


def test_pairs_without_contrast_are_left_out(tokenizer, capsys):
    rows = [pair(5), pair(6) | {"chosen": " 2.\n", "rejected": " 2.\n"}]
    args = stage(4).Args(model=str(TINY / "model"))
    assert len(stage(4).prepare(placed(rows), tokenizer, args, "rows")) == 1
    assert "left out: 1 without contrast" in capsys.readouterr().err


DEFAULTS = {  # of the papers; those of SCDPO are its options' alone
    1: {"n": 2, "temperature": 0.8, "top_p": 0.95, "max_tokens": 2048, "seed": 0},
    2: {"temperature": 0.8, "top_p": 0.95, "max_tokens": 2048, "neutral": "error"},
    3: {"n": 20, "temperature": 0.8, "max_tokens": 2048, "heat": (1.1, 0.05, 1.4), "first_k": 1},
    4: {
        "beta": 0.4,
        "lr": 5e-7,
        "epochs": 8,
        "batch_size": 128,
        "warmup": 0.1,
        "schedule": "cosine",
        "max_length": 1024,
        "weight_decay": 0.0,
    },
    5: {"samples": 1, "temperature": 0.0, "top_p": 1.0, "max_tokens": 2048},
}


@pytest.mark.parametrize("number", DEFAULTS)
def test_defaults_are_the_papers(number):
    args = stage(number).Args()
    assert {name: getattr(args, name) for name in DEFAULTS[number]} == DEFAULTS[number]
    assert stage(4).MAX_GRAD_NORM == 1.0
    for method, top_p, most in (("step-dpo", 0.95, 0), ("scdpo", 1.0, 0), ("dpo", 0.95, 1)):
        args = stage(3).Args(method=method)
        stage(3).check_options(args)
        assert (args.top_p, args.pairs_per_problem) == (top_p, most)


def test_the_log_of_a_run_that_was_cut_off_is_no_obstacle(tmp_path):
    """Nothing was logged before the checkpoint, or the last line is torn."""
    train, file = stage(4), tmp_path / "metrics.jsonl"
    for text, kept in (("", []), ('{"step": 1}\n{"step": 3}\n{"ste', [{"step": 1}])):
        file.write_text(text)
        log = train.Log(SimpleNamespace(is_main_process=True), train.Args(out=tmp_path), done=2)
        assert log.lines == kept and read(file) == kept


def test_rows_of_one_problem_are_held_out_together():
    """Also where the question is a turn, and by shares below 1/256."""
    train = stage(4)

    def turns(number: int, answer: str) -> dict:
        said = [("user", f"question {number}"), ("assistant", answer)]
        blocks = [{"role": r, "content": [{"type": "text", "content": t}]} for r, t in said]
        return {"chosen": blocks, "rejected": blocks}

    args = train.Args(validation_fraction=0.002)
    out = [[train.held_out(turns(i, answer), args) for i in range(5000)] for answer in "ab"]
    assert out[0] == out[1] and 3 <= sum(out[0]) <= 20


def test_fields_of_other_formats_do_not_count(tmp_path, tokenizer):
    """A pair with a solution is a pair, and a solution with sides is a solution."""
    row = {"prompt": "1 + 1?", "chosen": " 2", "rejected": " 3", "solution": " 2", "problem": "?"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    train = stage(4)
    for objective, sides in (("dpo", 2), ("sft", 1)):
        [(_, found)] = train.load_rows(str(tmp_path / "rows.jsonl"), objective)
        assert not train.has_empty_side(found, "step")
        assert len(train.encode(found, tokenizer)[1]) == sides


@pytest.mark.slow
def test_kill_at_any_moment_and_go_on_bit_for_bit(tmp_path, small_model):
    """kill -9 while a checkpoint is written; the weights are those of the run that was let be."""
    import time

    write_pairs(tmp_path / "pairs.jsonl", 100)
    arguments = [*common(tmp_path, small_model, "whole"), "--lr", 1e-3, "--save-steps", 1]
    arguments += ["--keep", 2]
    run(4, *arguments, timeout=900)  # a process, as the others: bit for bit
    arguments[arguments.index(tmp_path / "whole")] = out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "04_train_stepdpo.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(out.glob("checkpoint-*")):
        time.sleep(0.005)
    while process.poll() is None and not list(out.glob("writing-checkpoint*")):
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended by itself"
    assert list(out.glob("writing-checkpoint*")), "the kill met no checkpoint that was written"
    assert "resuming from" in run(4, *arguments, timeout=900).stderr
    assert len(stage(4).checkpoints(out)) == 2
    steps = [
        [line["step"] for line in read(tmp_path / n / "metrics.jsonl")] for n in ("whole", "killed")
    ]
    assert steps[0] == steps[1]
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(out)[name]), name


QWEN2 = {"vocab_size": 152064, "num_key_value_heads": 4, "tie_word_embeddings": False}
SIZES = {
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
    },
    "72b": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


SIZES["mistral"] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


def training_command(recipe: str, folder) -> list[str]:
    """What the recipe gives to accelerate: the shell puts it together, and stands in for the
    programs; for the server, which runs until the recipe ends it, too."""
    programs = {
        "python": "[ $1 != serving/code_server.py ] || { echo ready; exec sleep 60; }",
        "accelerate": f'printf "%s\\n" "$@" >{folder}/command',
    }
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(folder / "out")}
    environment["VIRTUAL_ENV"] = str(folder)  # else .venv's programs come first
    subprocess.run(
        ["bash", f"recipes/{recipe}.sh"], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    return (folder / "command").read_text().splitlines()


def counted(command: list[str], size: str) -> tuple[float, float]:
    """Bytes of a device and of main memory that a command of accelerate needs by count."""
    import tyro
    from transformers import Qwen2Config

    place = command.index("04_train_stepdpo.py")
    launch, args = command[1:place], tyro.cli(stage(4).Args, args=command[place + 1 :])
    given = dict(zip(launch[::2], launch[1::2], strict=True))
    processes = int(given["--num_processes"]) if "--num_processes" in given else None
    strategy, offloaded, world, machines = estimate.read_launch(
        ROOT / given["--config_file"], processes
    )
    args.precision = "bf16"
    found = stage(4).memory(
        Qwen2Config(**QWEN2 | SIZES[size]), args, strategy, world, machines, offloaded
    )
    on_machine = sum(size for name, size in found.items() if name.startswith("machine"))
    return sum(found.values()) - on_machine, on_machine


RECIPES = {
    "step_dpo_qwen2_7b": ("7b", 26.4e9, 46e9),
    "step_dpo_qwen2_72b": ("72b", 38.4e9, 1454e9),
    "sft_stage": ("7b", 26.4e9, 46e9),
    "scdpo_mistral_7b": ("mistral", 24.1e9, 43.5e9),
    "scdpo_mistral_7b_code": ("mistral", 24.1e9, 43.5e9),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fit_by_count(tmp_path, recipe):
    """The recipes' own command lines on 8 GPUs with 80 GB and 1 TB of main memory (72B: 2 TB),
    with a fifth to spare."""
    size, device, machine = RECIPES[recipe]
    command = training_command(recipe, tmp_path)
    assert command[0] == "launch"
    found = counted(command, size)
    assert found == (pytest.approx(device, rel=0.03), pytest.approx(machine, rel=0.03))
    assert found[0] < 0.83 * 80e9 and found[1] < 0.83 * (2e12 if size == "72b" else 1e12)


def test_commands_of_readme_and_docstring_fit_by_count():
    import re

    for text in (
        (ROOT / "README.md").read_text(),
        (ROOT / "configs" / "fsdp2.yaml").read_text(),
        stage(4).__doc__,
    ):
        text = re.sub(r"\\\n#? +", "", text)
        command = re.search(
            r"^(?:#? +)?accelerate (launch .*04_train_stepdpo.py[^#\n]*)", text, re.M
        )[1].split()
        assert counted(command, "7b")[0] < 0.82 * 80e9


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_are_what_autograd_keeps(precision):
    """A layer's, from the tensors that a forward pass keeps for two and for four layers."""
    from transformers import Qwen2Config

    train, kept = stage(4), {}
    shape = {
        "hidden_size": 224,
        "intermediate_size": 1184,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    }
    rows = 4
    width = 160
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    for checkpointing in (False, True):
        for layers in (2, 4):
            config = Qwen2Config(**shape, num_hidden_layers=layers, vocab_size=64)
            lm = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            ).train()
            if checkpointing:
                lm.gradient_checkpointing_enable({"use_reentrant": False})
            tensors = []

            def keep(tensor, tensors=tensors):
                return tensors.append(tensor) or tensor

            mask = torch.ones(rows, 1, width, width, dtype=torch.bool).tril()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
                lm.base_model(
                    input_ids=torch.zeros(rows, width, dtype=torch.long),
                    attention_mask=mask,
                    use_cache=False,
                )
            storages = {}
            for tensor in tensors:
                # not weights, nor their copies in bf16
                if rows * width in tensor.shape or rows in tensor.shape[:1]:
                    storages[tensor.untyped_storage().data_ptr()] = tensor
            size = sum(
                tensor.untyped_storage().nbytes()
                for tensor in storages.values()
                if tensor.shape[-2:] != (width, width)
            )
            args = train.Args(
                precision=precision,
                gradient_checkpointing=checkpointing,
                tokens_per_batch=rows * width,
            )
            kept[checkpointing, layers] = (
                size,
                train.memory(config, args, "copies", 1)["activations"],
            )
    for checkpointing in (False, True):
        measured, count = (kept[checkpointing, 4][i] - kept[checkpointing, 2][i] for i in (0, 1))
        assert count == pytest.approx(measured, rel=0.05), checkpointing


@pytest.mark.parametrize(
    "layers, tokens, passes, measured",
    [(4, 2400, 1, 8.23), (4, 600, 4, 7.53), (4, 4800, 1, 10.17), (24, 2400, 1, 17.98)],
)
def test_memory_with_a_real_vocabulary(layers, tokens, passes, measured):
    """Against peaks of whole runs of 04 on the CPU: docs/trainer.md, "A real vocabulary,
    measured"."""
    from transformers import Qwen2Config

    shape = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(
        **shape, num_hidden_layers=layers, vocab_size=151_936, tie_word_embeddings=True
    )
    args = stage(4).Args(precision="fp32", tokens_per_batch=tokens)
    found = stage(4).memory(config, args, "copies", 1, on_gpu=False, passes=passes)
    assert sum(
        size for name, size in found.items() if not name.startswith("machine")
    ) == pytest.approx(measured * 1e9, rel=0.1)


def shaped_folder(folder, size: str):
    """A model's folder with this shape and no weights, and the bundled tokenizer."""
    from transformers import Qwen2Config

    Qwen2Config(**QWEN2 | SIZES[size]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_what_does_not_fit_is_not_loaded(tmp_path, monkeypatch):
    """72B needs 1.3 TB by count. The weights that are missing are not looked for."""
    monkeypatch.setattr(stage(4), "machine_memory", lambda: 24e9)
    model = shaped_folder(tmp_path / "72b", "72b")
    write_pairs(tmp_path / "pairs.jsonl")
    arguments = ["--data", tmp_path / "pairs.jsonl", "--model", model, "--out", tmp_path / "out"]
    done = run(4, *arguments, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: estimated: a device needs" in done.stderr and "--ignore-memory" in done.stderr
    assert "cannot be loaded" not in done.stderr
    done = run(4, *arguments, "--ignore-memory", check=False)
    assert "warning: estimated: a device needs" in done.stderr and "cannot be loaded" in done.stderr


@pytest.mark.parametrize(
    "files, share",
    [
        ({}, 1),
        ({"memory.max": "max\n", "memory/memory.limit_in_bytes": f"{1 << 62}\n"}, 1),
        ({"memory.max": "{}\n"}, 0.5),
        ({"memory/memory.limit_in_bytes": "{}\n"}, 0.5),
    ],
)
def test_a_containers_limit_is_its_memory(monkeypatch, tmp_path, files, share):
    train, whole = stage(4), psutil.virtual_memory().total
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.format(whole // 2))
    monkeypatch.setattr(train, "CGROUP", tmp_path)
    assert train.machine_memory() == pytest.approx(share * whole, rel=0.01)


@pytest.mark.parametrize(
    "device, launch, gigabytes, said",
    [
        ("cuda", "MULTI_GPU", 85, "error: estimated: a device needs"),
        ("cuda", "FSDP", 26, "warning: estimated: a device needs"),
        ("cuda", "FSDP", 85, ""),
        ("cpu", "MULTI_CPU", 85, "error: estimated: a device needs"),
    ],
)
def test_the_memory_of_7b_on_8_devices(monkeypatch, capsys, device, launch, gigabytes, said):
    """Devices that are not here. Without a GPU no launch file helps."""
    from transformers import Qwen2Config

    train, config = stage(4), Qwen2Config(**QWEN2 | SIZES["7b"])
    memory = SimpleNamespace(total_memory=gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.setattr(train, "machine_memory", lambda: 8 * gigabytes * 1e9)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    accelerator = SimpleNamespace(
        device=torch.device(device), num_processes=8, distributed_type=launch
    )
    pairs = train.Pairs()
    for _ in range(128):
        pairs.add([1] * 300, [[2] * 200, [3] * 200])
    args = train.Args(precision="bf16", gradient_checkpointing=True, tokens_per_batch=8192)
    train.warn.cache_clear()
    stops = pytest.raises(SystemExit) if "error" in said else contextlib.nullcontext()
    with stops:
        train.check_memory(config, args, accelerator, pairs)
    found = capsys.readouterr().err
    assert said in found and bool(said) == bool(found)
    assert ("configs/README.md" in found) == (bool(said) and device == "cuda")


@pytest.mark.slow
def test_estimate_counts_a_launch_file_without_its_gpus(tmp_path):
    model = shaped_folder(tmp_path / "7b", "7b")
    write_pairs(tmp_path / "pairs.jsonl")
    given = ["--data", tmp_path / "pairs.jsonl", "--model", model, "--gradient-checkpointing"]
    given += ["--tokens-per-batch", 8192]
    for config, count, device in (
        ("fsdp2", 4, 38.75),
        ("zero3_offload", 8, 10.25),
        ("ddp", 8, 166.22),
    ):
        done = run(
            "estimate", "--config_file", f"configs/{config}.yaml", "--num_processes", count, *given
        )
        assert f"a device needs about {device}" in done.stderr and f"{count} H100" in done.stderr, (
            done.stderr
        )
    options = ["--config_file", "configs/ddp.yaml", "--precision", "fp32"]
    done = run("estimate", *options, *given, check=False)
    assert done.returncode == 2 and "estimates for GPUs in bf16" in done.stderr
    done = run("estimate", "--config_file", tmp_path / "pairs.jsonl", *given, check=False)
    assert done.returncode == 2
    assert "no launch file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_many_pairs_in_little_memory(tmp_path, small_model):
    """Through the estimate; 5,000 pairs may add a twentieth of the 2 GB that are allowed for
    100,000."""
    text = [json.dumps(pair(n)) + "\n" for n in range(5_000)]
    arguments = ["--data", tmp_path / "pairs.jsonl", "--model", small_model]
    arguments += ["--out", tmp_path / "out"]
    watch = "import resource, subprocess, sys; subprocess.run(sys.argv[1:]); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    peaks = []
    for count in (20, 5_000):
        (tmp_path / "pairs.jsonl").write_text("".join(text[:count]))
        command = [
            sys.executable,
            "-c",
            watch,
            sys.executable,
            "analysis/estimate.py",
            *map(str, arguments),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        for text_of_it in (f"{count} pairs", "GiB for weights, gradients, AdamW", " h; at 40 %"):
            assert text_of_it in done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) / 2**20)
    assert not (tmp_path / "out").exists() and peaks[1] - peaks[0] < 0.1, peaks
    (tmp_path / "pairs.jsonl").write_text(
        "".join(text[:7]) + '{"prompt": "torn\n' + "".join(text[7:])
    )
    options = ["--data", tmp_path / "pairs.jsonl", "--model", small_model]
    options += ["--out", tmp_path / "out"]
    done = run(4, *options, check=False)
    assert done.returncode == 2 and "pairs.jsonl, line 8: not JSON" in done.stderr


@pytest.mark.slow
def test_a_strategy_that_is_not_in_force_is_refused(tmp_path, small_model):
    """accelerate drops FSDP and DeepSpeed without a GPU, in silence."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU these strategies are in force")
    write_pairs(tmp_path / "pairs.jsonl")
    for name in ("FSDP", "DEEPSPEED"):
        environment = os.environ | {f"ACCELERATE_USE_{name}": "true", "ACCELERATE_USE_CPU": "true"}
        done = run(4, *common(tmp_path, small_model, "out"), check=False, env=environment)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"{name} needs GPUs" in done.stderr or "DeepSpeed is not installed" in done.stderr
