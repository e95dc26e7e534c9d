"""score_steps.py, 02 --locator scores, consensus.py, ProcessBench; the
bundled process reward model."""

import asyncio
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, read, run, scripted_server, serving, stage
from safetensors.torch import load_file, save_file
from test_locate import Judge, judge, verdicts, wrong_samples  # noqa: F401  the scripted judge
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(TINY))
import make  # noqa: E402
import processbench  # noqa: E402
import score_steps  # noqa: E402

PRM = TINY / "prm"
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def labelled(path, count: int = 120) -> list[dict]:
    """Solutions of test problems; every other one that has to borrow forgets it once, as the
    bundled model does, and goes on with what it got."""
    rows, slips = [], 0
    for row in read(TINY / "test.jsonl"):
        steps, label = stage(1).split_steps(row["solution"]), -1
        borrows = [
            (k, int(m[1]), int(m[2]))
            for k, step in enumerate(steps)
            if (m := re.search(r"(\d+) - (\d+) = ", step))
        ]
        borrows = [(k, a, b) for k, a, b in borrows if make.buggy(a, b) != a - b]
        if borrows and (slips := slips + 1) % 2:
            label, a, b = borrows[0]
            steps[label] = steps[label].replace(f"= {a - b} ", f"= {make.buggy(a, b)} ")
            steps[label + 1 :] = [
                step.replace(f" {a - b} ", f" {make.buggy(a, b)} ") for step in steps[label + 1 :]
            ]
        if sum((old["label"] < 0) == (label < 0) for old in rows) < count / 2:
            rows.append(
                {
                    "id": row["id"],
                    "problem": row["problem"],
                    "steps": steps,
                    "label": label,
                    "answer": row["answer"],
                    "response": "".join(steps),
                    "sample": 0,
                    "correct": label < 0,
                    "finish_reason": "stop",
                    "final_answer_correct": label < 0,
                }
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def change(folder, model, drop: str = "", add: str = "", **config):
    """A copy of a model's folder with other entries of config.json, without the weights that begin
    with `drop`, and with one named `add`."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(
        json.dumps(json.loads((model / "config.json").read_text()) | config)
    )
    weights = load_file(model / "model.safetensors") | ({add: torch.ones(1)} if add else {})
    kept = {name: value for name, value in weights.items() if not (drop and name.startswith(drop))}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("form", ["qwen", "math-shepherd", "math-shepherd, one token", "rlhflow"])
def test_scores_are_those_of_a_pass_of_its_own(form, tmp_path, small_model, monkeypatch):
    """A batch with padding against a pass for each step, over the text that ends where its score is
    read. The bundled vocabulary parts Math-Shepherd's mark into several tokens, as Qwen's does; its
    own has it as one."""
    name, form, one_token = (
        PRM if form == "qwen" else small_model,
        form.partition(",")[0],
        "one" in form,
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    if one_token:
        tokenizer.add_tokens(["ки"])
        tokenizer.save_pretrained(name)
        lm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        lm.resize_token_embeddings(len(tokenizer))
        lm.save_pretrained(name)
    reader = score_steps.Reader(str(name), form)
    assert reader.form == form
    monkeypatch.setattr(score_steps.LOCATE, "processor_has_bf16", lambda: False)
    monkeypatch.setattr(score_steps, "BATCH_TOKENS", 1500)  # a few rows a batch
    rows = labelled(tmp_path / "rows.jsonl", 9)
    parts = [reader.encode(row)[:2] for row in rows]
    found = asyncio.run(score_steps.local_scorer(SimpleNamespace(prm=str(name)), reader)(parts))
    kind = score_steps.process_reward_class() if form == "qwen" else AutoModelForCausalLM
    lm = kind.from_pretrained(name, dtype=torch.float32)
    plus, minus = (
        tokenizer.encode(sign if form == "rlhflow" else f"a {sign}", add_special_tokens=False)[-1]
        for sign in "+-"
    )

    def chat(turns):
        return tokenizer.apply_chat_template(
            [{"role": r, "content": c} for r, c in turns], tokenize=False
        )

    for row, (ids, places), scores in zip(rows, parts, found, strict=True):
        steps = [step.strip() for step in row["steps"]]
        bare = [
            re.sub(r"^(Let's think step by step.\n)?Step \d+:", "", step).strip() for step in steps
        ]
        assert len(scores) == len(places) == len(steps)
        for k in range(1, len(steps) + 1):
            if form == "qwen":
                marked = "".join(f"{step}<extra_0>" for step in steps[:k])
                text = chat(
                    [("system", SYSTEM), ("user", row["problem"]), ("assistant", marked)]
                ).removesuffix("<|im_end|>\n")
            elif form == "math-shepherd":
                text = f"{row['problem']} " + "\n".join(
                    f"Step {i + 1}: {step} ки" for i, step in enumerate(bare[:k])
                )
            else:
                said = [f"{row['problem']} {steps[0]}", *steps[1:k]]
                turns = [turn for own in said for turn in (("user", own), ("assistant", "+"))]
                text = chat(turns).removesuffix("+<|im_end|>\n")
            prefix = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert prefix == ids[: places[k - 1] + 1]
            with torch.no_grad():
                if form == "qwen":
                    logits = lm.score(lm.model(torch.tensor([prefix])).last_hidden_state)[0, -1]
                else:
                    logits = lm(torch.tensor([prefix])).logits[0, -1, [minus, plus]]
            assert scores[k - 1] == pytest.approx(logits.softmax(-1)[1].item(), rel=1e-4, abs=1e-5)


def test_math_shepherds_tokens(tmp_path):
    """On Mistral's own vocabulary: the mark and the signs that its model card names; a step may
    hold all three."""
    import mistral_common  # vLLM brings it

    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer"} | special)
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["MistralForCausalLM"], "model_type": "mistral"})
    )
    reader = score_steps.Reader(str(tmp_path))
    ids, places, reason = reader.encode(
        {"problem": "p", "steps": ["Step 1: 1 + 1 = 2.\n", "Step 2: ки 2 - 1\n"]}
    )
    assert ids[0] == 1 and [ids[place] for place in places] == [12902, 12902] and not reason
    assert ids.count(12902) == 3 and places[-1] == len(ids) - 1 and reader.signs() == [387, 648]


@pytest.mark.slow
def test_the_bundled_prm_finds_most_first_errors(tmp_path, capsys):
    labelled(tmp_path / "labels.jsonl")
    made = {"prompt": "### Instruction", "opening": "Step 1:", "split": "labels"}
    (tmp_path / "labels.jsonl.meta.json").write_text(json.dumps({"settings": made}))
    score = [tmp_path / "labels.jsonl", "--prm", PRM]
    run("score_steps", *score)
    arguments = ["--samples", tmp_path / "labels.scored.jsonl", "--include-correct"]
    arguments += ["--locator", "scores", "--out", tmp_path / "out.jsonl"]
    done = run(2, *arguments)
    for name in ("labels.scored", "out"):  # for 03, which compares it
        assert json.loads((tmp_path / f"{name}.jsonl.meta.json").read_text())["passed_on"] == made
    rows = read(tmp_path / "out.jsonl")
    said = [(row["label"], (row["error_step"] or 0) - 1) for row in rows]
    wrong = [label == step for label, step in said if label >= 0]
    right = [step < 0 for label, step in said if label < 0]
    assert len(rows) == 120 and sum(wrong) > 0.8 * len(wrong) and sum(right) > 0.8 * len(right), (
        done.stdout
    )
    assert all(
        len(row["step_scores"]) == len(row["steps"]) and row["locator"] == "scores" for row in rows
    )
    assert run(2, *arguments).stderr.count("120 rows are there already") == 1
    done = run(2, *arguments, "--threshold", 0.3, check=False)
    assert done.returncode == 2 and "threshold = 0.5, now it is 0.3" in done.stderr
    # a kill within a write: the same file again, by scoring only what is not there
    scored_meta = tmp_path / "labels.scored.jsonl.meta.json"
    summary = json.loads(scored_meta.read_text())["summary"]
    assert summary["scored"] == 120
    whole = (tmp_path / "labels.scored.jsonl").read_bytes()
    (tmp_path / "labels.scored.jsonl").write_bytes(whole[: len(whole) // 3])
    done = run("score_steps", *score)
    assert (tmp_path / "labels.scored.jsonl").read_bytes() == whole
    assert "rows are there already" in done.stderr
    assert json.loads(scored_meta.read_text())["summary"] == summary, "of all rows"
    args = score_steps.Args(
        write(tmp_path / "labels.jsonl", read(tmp_path / "labels.jsonl")[1:]), str(PRM)
    )
    with pytest.raises(SystemExit):
        score_steps.main(args)
    assert "row 1, is not row 1 of" in capsys.readouterr().err


def test_models_that_cannot_be_read_are_refused_by_name(tmp_path, small_model, capsys):
    """Other architectures, weights that are missing or not known, and tokenizers without the mark:
    status 2 and one line."""

    def refused(prm, form: str = "math-shepherd") -> str:
        with pytest.raises(SystemExit) as ended:
            reader = score_steps.Reader(str(prm), form)
            score_steps.local_scorer(SimpleNamespace(prm=str(prm)), reader)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and str(prm) in said
        return said.strip().split("\n")[-1]

    for kind in (
        "Qwen2ForRewardModel",
        "Qwen2ForTokenClassification",
        "LlamaForSequenceClassification",
    ):
        assert f"architecture is {kind};" in refused(
            change(tmp_path / kind, PRM, architectures=[kind])
        )
    assert "architecture is none;" in refused(change(tmp_path / "none", PRM, architectures=None))
    for weights in ("score.2.", "model.layers.3."):  # the head, or a shard
        assert f"its files lack {weights}" in refused(change(tmp_path / weights, PRM, drop=weights))
    assert "hold v_head.summary.weight" in refused(
        change(tmp_path / "v", small_model, add="v_head.summary.weight")
    )
    assert (
        "lm_head"
        not in score_steps.load_model(
            str(change(tmp_path / "lm", PRM, add="lm_head.weight")),
            score_steps.process_reward_class(),
        ).state_dict()
    )
    small = change(tmp_path / "small", small_model, architectures=["Qwen2ForProcessRewardModel"])
    assert "marks: 0 <extra_0> for 2 steps" in refused(small)
    (small_model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert "marks: 0 + for 2 steps" in refused(small_model, "rlhflow")
    (small_model / "chat_template.jinja").unlink()
    assert "chat_template" in refused(small_model, "rlhflow")
    assert "--prm" in refused(tmp_path)
    score_steps.Reader(str(small_model))  # Math-Shepherd's form needs no template


def test_a_form_that_is_not_the_models_is_seen(tmp_path, small_model):
    """A model of random weights gives + and - no more than other tokens."""
    labelled(tmp_path / "labels.jsonl", 4)
    done = run("score_steps", tmp_path / "labels.jsonl", "--prm", small_model)
    assert "is math-shepherd the model's form?" in done.stderr and "scored 4" in done.stdout


@pytest.fixture()
def pooling():
    """A server whose /pooling replies what `server.script(ids)` gives."""

    class Pooling(Judge):
        def do_GET(self):
            self.reply(200, json.dumps({"data": [{"id": str(PRM)}]}))

        def do_POST(self):
            found = self.server.script(
                json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
            )
            status, body = (
                found
                if isinstance(found, tuple)
                else (200, {"data": [{"index": 0, "data": found}]})
            )
            self.reply(status if self.path == "/pooling" else 404, json.dumps(body))

    with scripted_server(Pooling) as server:
        yield server


def test_a_servers_scores_are_counted(pooling, tmp_path, capsys):
    """One score a step, or the run ends and says how to start the server."""
    rows = labelled(tmp_path / "labels.jsonl", 6)
    mark = AutoTokenizer.from_pretrained(PRM).convert_tokens_to_ids("<extra_0>")
    url = f"http://127.0.0.1:{pooling.server_port}/v1"
    args = score_steps.Args(
        tmp_path / "labels.jsonl", str(PRM), tmp_path / "out.jsonl", base_url=url
    )
    pooling.script = lambda ids: [[0.25, 0.75]] * ids.count(mark)
    score_steps.main(args)
    assert [row["step_scores"] for row in read(tmp_path / "out.jsonl")] == [
        [0.75] * len(row["steps"]) for row in rows
    ]
    replies = {
        "another separator": lambda ids: [],
        "every token": lambda ids: [[0.5, 0.5]] * len(ids),
        "one class": lambda ids: [[0.5]] * ids.count(mark),
        "numbers": lambda ids: [0.5] * ids.count(mark),
        "no activation": lambda ids: [[-3.0, 4.0]] * ids.count(mark),
        "null": lambda ids: None,
        "not a number": lambda ids: [[0.5, None]] * ids.count(mark),
    }
    for name, script in replies.items():
        pooling.script, args.out = script, tmp_path / f"{name}.jsonl"
        with pytest.raises(SystemExit) as ended:
            score_steps.main(args)
        said = capsys.readouterr().err
        assert (
            ended.value.code == 2 and f'"step_tag_id": {mark}' in said and "Traceback" not in said
        ), name
        assert re.search(
            r"\d+ scores for \d steps.*--pooler-config '{.tok_pooling_type.: .STEP., ", said
        ), name
    pooling.script = lambda ids: (400, {"error": {"message": "longer than 4096"}})
    args.out = tmp_path / "refused.jsonl"
    done = run(
        "score_steps", args.samples, "--prm", PRM, "--base-url", url, "--out", args.out, check=False
    )
    assert done.returncode == 2
    assert "longer than 4096" in done.stderr
    assert "Traceback" not in done.stderr
    assert "score_steps.py: error: --base-url" in done.stderr


MARK = AutoTokenizer.from_pretrained(PRM).convert_tokens_to_ids("<extra_0>")
POOLER = {"tok_pooling_type": "STEP", "step_tag_id": MARK}


def pooled(tmp_path, pooler: dict, check: bool):
    """score_steps.py's run, by a real server, which knows Qwen's class."""
    labelled(tmp_path / "labels.jsonl", 20)
    options = ["--pooler-config", json.dumps(pooler)]
    with (
        serving(PRM, tmp_path / "server.log", *options) as (url, key),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PRM_API_KEY", key)
        arguments = [tmp_path / "labels.jsonl", "--prm", PRM, "--base-url", url]
        return run("score_steps", *arguments, "--out", tmp_path / "there.jsonl", check=check)


@pytest.mark.slow
@pytest.mark.long
def test_vllms_default_mark_is_named(tmp_path):
    done = pooled(tmp_path, {"tok_pooling_type": "STEP"}, check=False)
    assert done.returncode == 2
    assert f"--pooler-config '{json.dumps(POOLER)}'" in done.stderr
    assert "0 scores" in done.stderr


@pytest.mark.slow
def test_vllm_pools_the_same_scores(tmp_path):
    """The bundled model by a server that was started as score_steps.py says."""
    pooled(tmp_path, POOLER, check=True)
    arguments = [tmp_path / "labels.jsonl", "--prm", PRM]
    run("score_steps", *arguments, "--out", tmp_path / "here.jsonl")
    here, there = (read(tmp_path / f"{name}.jsonl") for name in ("here", "there"))
    assert len(here) == len(there) == 20
    for ours, theirs in zip(here, there, strict=True):
        assert ours["step_scores"] == pytest.approx(theirs["step_scores"], abs=0.05)


def test_rows_that_cannot_be_scored_stay_open(tmp_path, capsys):
    """A step that holds the mark, a text that is too long, no step, a right solution: each with its
    reason, in 02 too."""
    rows = labelled(tmp_path / "labels.jsonl", 6)
    rows[1]["steps"][0] = rows[1]["steps"][0].replace(".", ".<extra_0>")
    rows[2]["problem"] += " one two three four" * 1000
    rows[3] |= {"steps": [], "response": "", "label": -1}
    rows = [row | {"correct": number == 4} for number, row in enumerate(rows)]
    score_steps.main(
        score_steps.Args(write(tmp_path / "in.jsonl", rows), str(PRM), wrong_only=True)
    )
    scored = read(tmp_path / "in.scored.jsonl")
    assert [row["step_scores"] is None for row in scored] == [False, True, True, True, True, False]
    options = ["--samples", tmp_path / "in.scored.jsonl", "--include-correct"]
    options += ["--locator", "scores", "--out", tmp_path / "out.jsonl"]
    run(2, *options)
    found = {row["id"]: row for row in read(tmp_path / "out.jsonl")}
    reasons = [str(found[row["id"]]["reason"]) for row in rows]
    assert "marks: " in reasons[1]
    assert "where the model takes 4096" in reasons[2]
    assert "a right solution" in reasons[4]
    assert reasons[3] == "no response to look at"
    assert all("not scored" not in reasons[k] for k in (0, 5))
    bad = [
        ({"steps": "abc"}, "bad.jsonl, line 2: "),
        ({"steps": ["a", None]}, "line 2: "),
        ({"problem": ["x"]}, "line 2: "),
    ]
    for number, (change, why) in enumerate(
        [*bad, ({}, "no row has scores; the first says: too long")]
    ):
        path = write(tmp_path / f"{number}bad.jsonl", [rows[2], rows[2] | change])
        with pytest.raises(SystemExit) as ended:
            score_steps.main(score_steps.Args(path, str(PRM)))
        assert ended.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize(
    "scores",
    ["missing", [0.5], *([0.5, x, 0.5, 0.5] for x in ("x", math.nan, True)), {"1": 0.5}, 0.5],
)
def test_02_takes_a_number_for_each_step(scores, tmp_path):
    [row] = wrong_samples(tmp_path / "in.jsonl", 1)
    row |= {"id": "a", "step_scores": [0.9, 0.1, 0.9, 0.9]}
    bad = row | {"id": "b", "step_scores": scores}
    if scores == "missing":
        del bad["step_scores"]
    path = write(tmp_path / "in.jsonl", [row, bad])
    done = run(
        2, "--samples", path, "--locator", "scores", "--out", tmp_path / "out.jsonl", check=False
    )
    assert done.returncode == 2
    assert f"{path}: b, sample 0: no 'step_scores'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_consensus_keeps_what_both_say(judge, tmp_path):  # noqa: F811
    """A judge that is right, one step late, two late, or finds nothing, by turns, beside the
    bundled model; in two runs."""
    rows = [row for row in labelled(tmp_path / "labels.jsonl", 60) if row["label"] >= 0]
    rows += [row for row in read(tmp_path / "labels.jsonl") if row["label"] < 0][:5]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    number = {row["problem"]: i for i, row in enumerate(rows)}

    def script(_, body):
        [row] = [row for row in rows if row["problem"] in body["messages"][0]["content"]]
        late = row["label"] + 1 + number[row["problem"]] % 3
        if row["label"] < 0 or late > len(row["steps"]):
            return "\n".join(f"Step {k}: correct" for k in range(1, len(row["steps"]) + 1))
        return verdicts(late)

    judge.script = script
    url = f"http://127.0.0.1:{judge.server_port}/v1"
    run("score_steps", tmp_path / "labels.jsonl", "--prm", PRM)
    samples = ["--samples", tmp_path / "labels.scored.jsonl", "--include-correct"]
    judged = [*samples, "--locator", "judge", "--judge-model", "judge", "--judge-base-url", url]
    judged += ["--out", tmp_path / "judged.jsonl"]
    run(2, *samples, "--locator", "scores", "--out", tmp_path / "scores.jsonl")
    run(2, *judged, "--limit", 10)
    asked = judge.count
    run(2, *judged)
    assert len(rows) == judge.count and asked == 10
    files, out = [tmp_path / "scores.jsonl", tmp_path / "judged.jsonl"], tmp_path / "out.jsonl"
    done = run("consensus", *files, "--out", out)
    found = {row["problem"]: row for row in read(out)}
    assert len(found) == len(rows)
    kept = 0
    for row in rows:
        got = found[row["problem"]]
        first, second = got["said"]
        assert len(got["step_scores"]) == len(row["steps"])
        assert got["judge"]["votes"]
        assert got["locator"] == "consensus"
        if first == second == 0:
            assert got["error_step"] is None and got["reason"] == "no error found by both"
        elif first and second and abs(first - second) <= 1:
            kept += 1
            assert got["error_step"] == first and got["reason"] is None
        else:
            assert got["error_step"] is None and got["reason"] == "the two disagree"
    assert 10 < kept < 28
    assert done.stdout.startswith(f"{out}: rows {len(rows)}, located {kept}, ")
    assert len(done.stdout.splitlines()) == 1
    run("consensus", *files, "--within", 0, "--out", tmp_path / "exact.jsonl")
    exact = [row["error_step"] for row in read(tmp_path / "exact.jsonl")]
    assert exact == [a if a and a == b else None for a, b in (row["said"] for row in read(out))]


def test_consensus_of_files_that_do_not_fit(tmp_path):
    """A row that the second lacks stays open and says so; other samples, no locations, and an input
    as --out are refused."""
    rows = [
        row | {"error_step": 2, "reason": None, "locator": "x"}
        for row in wrong_samples(tmp_path / "in.jsonl", 3)
    ]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", [rows[0], rows[1] | {"error_step": None, "reason": "unsure"}])
    run("consensus", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "out.jsonl")
    found = [
        (row["error_step"], row["reason"], row["said"]) for row in read(tmp_path / "out.jsonl")
    ]
    assert found == [
        (2, None, [2, 2]),
        (None, "the two disagree", [2, None]),
        (None, "not in the second file", [2, None]),
    ]
    write(tmp_path / "other.jsonl", [rows[0] | {"steps": ["another", "two"]}])
    write(tmp_path / "text.jsonl", [rows[0], rows[1] | {"error_step": "2"}])
    for second, out, why in [
        ("other", "x", "another sample 0 of q0"),
        ("in", "x", "row 1: no 'error_step'"),
        ("text", "x", "row 2: no 'error_step'"),
        ("b", "b", "is one of the two files"),
        ("none", "x", "cannot be read"),
    ]:
        done = run(
            "consensus",
            tmp_path / "a.jsonl",
            tmp_path / f"{second}.jsonl",
            "--out",
            tmp_path / f"{out}.jsonl",
            check=False,
        )
        assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_processbench_as_a_command(tmp_path):
    """Two files of the bundled world, one as a list; the table against the rows, and no file is
    located twice."""
    (tmp_path / "pb").mkdir()
    rows = labelled(tmp_path / "pb" / "gsm8k.jsonl", 60)
    (tmp_path / "pb" / "math.json").write_text(
        json.dumps([row | {"steps": [s.strip() for s in row["steps"]]} for row in rows])
    )
    arguments = ["--data-dir", tmp_path / "pb", "--files", "gsm8k", "math"]
    arguments += ["--out", tmp_path / "out", "--limit", 40]
    done = run("processbench", *arguments, "--prm", PRM)
    table = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in done.stdout.split("\n")
        if line.startswith("| scores")
    ]
    assert [row[1] for row in table] == ["gsm8k", "math", "mean"] * 2
    assert "threshold 0." in table[3][0]
    found = read(tmp_path / "out" / "gsm8k.located.jsonl")

    def share(part):
        return sum(row["label"] == (row["error_step"] or 0) - 1 for row in part) / len(part)

    wrong, right = (
        share([row for row in found if (row["label"] >= 0) == side]) for side in (True, False)
    )
    assert len(found) == 40 and table[0][2:5] == ["40", f"{wrong:.1%}", f"{right:.1%}"]
    assert table[0][5].startswith(f"{2 * wrong * right / (wrong + right):.1%} (")
    assert float(table[0][6]) > 50
    assert (tmp_path / "out" / "table.md").read_text().strip() in done.stdout
    again = run("processbench", *arguments, "--prm", PRM, timeout=900)  # as users start it

    def rows_of(text):  # without the seconds
        return [line.rsplit("|", 2)[0] for line in text.split("\n") if line.startswith("| ")]

    assert rows_of(again.stdout) == rows_of(done.stdout)
    assert again.stderr.count("40 rows are there already") == 4
    done = run(
        "processbench", "--data-dir", tmp_path, "--out", tmp_path / "x", "--prm", PRM, check=False
    )
    assert done.returncode == 2 and "no gsm8k.json" in done.stderr
    done = run("processbench", "--data-dir", tmp_path / "pb", "--out", tmp_path / "x", check=False)
    assert done.returncode == 2
    assert "give one of --model with --base-url, --prm, or --" in done.stderr
    done = run("processbench", "--out", tmp_path / "x", "--prm", PRM, check=False)
    assert done.returncode == 2 and "the hub does not give it" in done.stderr
    assert "Traceback" not in done.stderr


CRITICS = [  # what answers say of three paragraphs, the first wrong step, the reason
    ([r"Paragraph 1 is wrong. \boxed{1}"], 2, None),
    ([r"\boxed{-1}"], None, "no error found by the critic"),
    ([r"\boxed{0}, no: \boxed{ 2 }"], 3, None),
    (["It is 1."], None, "no answer has an index"),
    ([r"\boxed{paragraph 1}"], None, "no answer has an index"),
    ([r"\boxed{1} \boxed{two}"], None, "no answer has an index"),
    ([r"\boxed{3}"], None, "index 3 of 3 paragraphs"),
    ([r"\boxed{-2}"], None, "index -2 of 3 paragraphs"),
    ([r"\boxed{2}", r"\boxed{1}", r"\boxed{1}"], 2, None),
    ([r"\boxed{2}", r"\boxed{1}"], 3, None),  # a tie: the first
    (["", "?", r"\boxed{-1}"], None, "no error found by the critic"),
    ([r"\boxed{x}", r"\boxed{x}", r"\boxed{0}"], 1, None),
    ([r"\boxed{" + "9" * 5000 + "}"], None, "no answer has an index"),
]


@pytest.mark.parametrize("texts, step, reason", CRITICS)
def test_the_critics_votes(texts, step, reason):
    found = processbench.count_votes(texts, 3)
    assert (found["error_step"], found["reason"]) == (step, reason)


@pytest.mark.parametrize("votes", [1, 3])
def test_a_critic_by_the_papers_protocol(votes, judge, tmp_path):  # noqa: F811
    """Nothing is skipped, nothing asked again; greedy, or votes at temperature 1 and top-p 0.9."""
    (tmp_path / "pb").mkdir()
    rows = [
        {
            "id": f"gsm8k-{k}",
            "problem": f"A diagram shows {k} {{x}}.",
            "steps": ["First.", "Then {y}.", "So."],
            "label": k - 1,
            "final_answer_correct": k == 0,
        }
        for k in range(4)
    ]
    write(
        tmp_path / "pb" / "gsm8k.jsonl",
        [*rows, rows[1] | {"id": "gsm8k-4", "problem": "No answer."}],
    )

    def script(n, body):
        [message] = body["messages"]
        assert (
            "<paragraph_0>\nFirst.\n</paragraph_0>\n\n<paragraph_1>\nThen {y}.\n</paragraph_1>"
            in message["content"]
        )
        assert "\\boxed{}" in message["content"]
        assert "the index of that paragraph is the answer" in message["content"]
        known = re.search(r"shows (\d)", message["content"])
        return f"I think \\boxed{{{int(known[1]) - 1}}}" if known else "neutral"

    judge.script = script
    url = f"http://127.0.0.1:{judge.server_port}/v1"
    command = ["--data-dir", tmp_path / "pb", "--files", "gsm8k", "--out", tmp_path / "out"]
    command += ["--votes", votes, "--price", 1e4, 1e4, "--model", "judge", "--base-url", url]
    done = run("processbench", *command)
    assert judge.count == 5 * votes
    sampling = {"temperature": 0.0} if votes == 1 else {"temperature": 1.0, "top_p": 0.9}
    for body in judge.seen:
        assert {name: body[name] for name in sampling} == sampling and body["max_tokens"] == 8192
        assert votes > 1 or "top_p" not in body
    assert len({body["seed"] for body in judge.seen}) == 5 * votes
    [line] = [line for line in done.stdout.split("\n") if line.startswith("| critic | gsm8k")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2:5] == ["5", "75.0%", "100.0%"] and cells[5].startswith("85.7% (")
    assert cells[6:8] == [str(110 * votes), f"{1.1 * votes:.5f}"]
    done = run("processbench", *command)
    assert judge.count == 5 * votes and "5 rows are there already" in done.stderr
    done = run("processbench", *command, "--max-tokens", 100, check=False)
    assert done.returncode == 2 and "max_tokens = 8192, now it is 100" in done.stderr
    # equal solutions are two, also after a stop between them
    write(tmp_path / "pb" / "gsm8k.jsonl", [rows[0], rows[0]])
    command[5] = tmp_path / "twice"
    run("processbench", *command)
    located = tmp_path / "twice" / "gsm8k.located.jsonl"
    located.write_text(located.read_text().split("\n")[0] + "\n")
    run("processbench", *command)
    assert len(read(located)) == 2
    (tmp_path / "twice" / "gsm8k.jsonl").unlink()
    done = run("processbench", *command, check=False)
    assert done.returncode == 2 and f"{located} exists" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_training_a_prm(tmp_path):
    """A short training on 50 solutions: the loss falls."""
    labelled(tmp_path / "labels.jsonl", 60)
    options = ["--data", tmp_path / "labels.jsonl", "--out", tmp_path / "prm", "--held-out", 10]
    for given, said in (
        (["--epochs", 0], "--epochs and --batch-size are at least 1"),
        (["--held-out", -1], "--held-out at least 0"),
        (["--model", tmp_path / "gpt2"], "is gpt2; give a qwen2"),
        (["--model", tmp_path / "no"], "neither a folder with a config.json nor a hub id"),
    ):
        shutil.copytree(TINY / "model", tmp_path / "gpt2", dirs_exist_ok=True)
        (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
        done = run("train_prm", *options, *given, check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    options += ["--epochs", 4, "--batch-size", 16]
    run("train_prm", *options)
    figures = json.loads((tmp_path / "prm" / "training.json").read_text())
    assert figures["solutions"] == 50 and 0 < figures["last loss"] < 0.8 * figures["first loss"]
    run("score_steps", tmp_path / "labels.jsonl", "--prm", tmp_path / "prm")
    right, wrong = [], []
    for row in read(tmp_path / "labels.scored.jsonl"):
        first_wrong = row["label"] if row["label"] >= 0 else len(row["steps"])
        right += row["step_scores"][:first_wrong]
        wrong += row["step_scores"][first_wrong : first_wrong + 1]
    assert sum(right) / len(right) > sum(wrong) / len(wrong)
