"""02 --locator prm and consensus, what a judge may cost, ProcessBench as a command; the bundled process reward model."""

import json
import re
import sys

import pytest
import torch
from conftest import TINY, read, run, serving, stage
from test_locate import judge, judged, true_step, verdicts, wrong_samples  # noqa: F401  the scripted judge
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(TINY))
import make  # noqa: E402

PRM = TINY / "prm"


def labelled(path, count: int = 120) -> list[dict]:
    """Solutions of test problems; every other one that has to borrow forgets it once, as the bundled model does, and goes on
    with what it got."""
    rows, slips = [], 0
    for row in read(TINY / "test.jsonl"):
        steps, label = stage(1).split_steps(row["solution"]), -1
        borrows = [(k, int(m[1]), int(m[2])) for k, step in enumerate(steps) if (m := re.search(r"(\d+) - (\d+) = ", step))]
        borrows = [(k, a, b) for k, a, b in borrows if make.buggy(a, b) != a - b]
        if borrows and (slips := slips + 1) % 2:
            label, a, b = borrows[0]
            steps[label] = steps[label].replace(f"= {a - b} ", f"= {make.buggy(a, b)} ")
            steps[label + 1 :] = [step.replace(f" {a - b} ", f" {make.buggy(a, b)} ") for step in steps[label + 1 :]]
        if sum((old["label"] < 0) == (label < 0) for old in rows) < count / 2:
            rows.append({"id": row["id"], "problem": row["problem"], "steps": steps, "label": label, "answer": row["answer"],
                         "response": "".join(steps), "final_answer_correct": label < 0})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def shepherd(folder, small_model):
    """A causal model that knows the mark of Math-Shepherd's form, with random weights."""
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.add_tokens([stage(2).SHEPHERD_END])
    lm = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    lm.resize_token_embeddings(len(tokenizer))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["Qwen", "Math-Shepherd"])
def test_scores_are_those_of_a_pass_of_its_own(form, tmp_path, small_model, monkeypatch):
    """A batch with padding against one row at a time and all logits, by hand."""
    two = stage(2)
    name = PRM if form == "Qwen" else shepherd(tmp_path / "shepherd", small_model)
    args = two.Args(prm=str(name))
    encode, qwen, _ = two.prm_encoder(args)
    assert qwen == (form == "Qwen")
    monkeypatch.setattr(two, "processor_has_bf16", lambda: False)
    monkeypatch.setattr(two, "PRM_TOKENS", 700)  # a few rows a batch
    rows = labelled(tmp_path / "rows.jsonl", 9)
    parts = [encode(row) for row in rows]
    found = two.prm_scorer(args, qwen)(parts)
    tokenizer = AutoTokenizer.from_pretrained(name)
    lm = (two.prm_class() if qwen else AutoModelForCausalLM).from_pretrained(name, dtype=torch.float32)
    for row, (ids, places), scores in zip(rows, parts, found, strict=True):
        text = tokenizer.decode(ids)
        assert len(scores) == len(row["steps"]) == text.count(two.STEP_END if qwen else " ки")
        assert row["problem"] in text and (text.startswith("<|im_start|>system\n") if qwen else "\nStep 2: " in text)
        with torch.no_grad():
            if qwen:
                logits = lm.score(lm.model(torch.tensor([ids])).last_hidden_state)[0]
                good = logits.softmax(-1)[:, 1]
            else:
                logits = lm(torch.tensor([ids])).logits[0]
                plus, minus = (tokenizer.encode(sign)[-1] for sign in "+-")
                good = logits[:, plus].exp() / (logits[:, plus].exp() + logits[:, minus].exp())
        torch.testing.assert_close(torch.tensor(scores), good[places], rtol=1e-4, atol=1e-5)
    if qwen:
        assert text.endswith(two.STEP_END + "<|im_end|>\n")


def test_the_bundled_prm_finds_most_first_errors(tmp_path):
    labelled(tmp_path / "labels.jsonl")
    arguments = ["--labels", tmp_path / "labels.jsonl", "--locator", "prm", "--out", tmp_path / "out.jsonl"]
    done = run(2, *arguments, "--prm", PRM)
    rows = read(tmp_path / "out.jsonl")
    said = [(row["label"], (row["error_step"] or 0) - 1) for row in rows]
    wrong = [label == step for label, step in said if label >= 0]
    right = [step < 0 for label, step in said if label < 0]
    assert len(rows) == 120 and sum(wrong) > 0.8 * len(wrong) and sum(right) > 0.8 * len(right), done.stdout
    assert all(len(row["prm"]["scores"]) == len(row["steps"]) and row["locator"] == "prm" for row in rows)
    assert run(2, *arguments, "--prm", PRM).stderr.count("120 rows are there already") == 1
    done = run(2, *arguments, "--prm", PRM, "--threshold", 0.3, check=False)
    assert done.returncode == 2 and "threshold = 0.5, now it is 0.3" in done.stderr
    done = run(2, *arguments[:-1], tmp_path / "x.jsonl", "--prm", tmp_path, check=False)
    assert done.returncode == 2 and f"--prm {tmp_path}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_vllm_pools_the_same_scores(tmp_path):
    """The bundled model by a real server, which knows Qwen's class."""
    labelled(tmp_path / "labels.jsonl", 20)
    mark = AutoTokenizer.from_pretrained(PRM).convert_tokens_to_ids(stage(2).STEP_END)
    arguments = ["--labels", tmp_path / "labels.jsonl", "--locator", "prm", "--prm", PRM]
    run(2, *arguments, "--out", tmp_path / "here.jsonl")
    pooler = ["--pooler-config", json.dumps({"step_tag_id": mark})]
    with serving(PRM, tmp_path / "server.log", *pooler) as (url, key), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRM_API_KEY", key)
        run(2, *arguments, "--prm-base-url", url, "--out", tmp_path / "there.jsonl")
    here, there = ({row["id"]: row for row in read(tmp_path / f"{name}.jsonl")} for name in ("here", "there"))
    assert len(here) == len(there) == 20
    for identity, row in here.items():
        assert there[identity]["prm"]["scores"] == pytest.approx(row["prm"]["scores"], abs=0.05)
    assert sum(there[i]["error_step"] == row["error_step"] for i, row in here.items()) >= 19


def test_a_step_that_holds_the_mark_leaves_the_row_open(tmp_path):
    rows = labelled(tmp_path / "labels.jsonl", 4)
    rows[1]["steps"][0] = rows[1]["steps"][0].replace(".", f".{stage(2).STEP_END}")
    rows[2]["problem"] += " one two three four" * 1000
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(2, "--labels", tmp_path / "labels.jsonl", "--locator", "prm", "--prm", PRM, "--out", tmp_path / "out.jsonl")
    found = {row["id"]: row for row in read(tmp_path / "out.jsonl")}
    reasons = [str(found[row["id"]]["reason"]) for row in rows]
    assert "ends of" in reasons[1] and "where --prm takes 4096" in reasons[2] and reasons[0].startswith("no error found")


def test_consensus_keeps_what_both_say(judge, tmp_path):  # noqa: F811
    """A judge that is right, one step late, two late, or finds nothing, by turns, beside the bundled model; in two runs."""
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
    command = ["--labels", tmp_path / "labels.jsonl", "--locator", "consensus", "--of", "prm", "judge", "--prm", PRM,
               "--judge-model", "judge", "--judge-base-url", url, "--out", tmp_path / "out.jsonl"]  # fmt: skip
    run(2, *command, "--limit", 10)
    asked = judge.count
    run(2, *command)
    found = {row["problem"]: row for row in read(tmp_path / "out.jsonl")}
    assert len(found) == len(rows) == judge.count and asked == 10
    kept = 0
    for row in rows:
        got = found[row["problem"]]
        first, second = got["said"]["prm"], got["said"]["judge"]
        assert len(got["prm"]["scores"]) == len(row["steps"]) and got["judge"]["votes"] and got["locator"] == "consensus"
        if first == second == 0:
            assert got["error_step"] is None and got["reason"] == "no error found by both"
        elif first and second and abs(first - second) <= 1:
            kept += 1
            assert got["error_step"] == first and got["reason"] is None
        else:
            assert got["error_step"] is None and got["reason"] == "the two disagree"
    assert 10 < kept < 28
    done = run(2, *command[:3], "consensus", "--of", "prm", "prm", "--prm", PRM, "--out", tmp_path / "x.jsonl", check=False)
    assert done.returncode == 2 and "two different locators" in done.stderr


def test_the_judge_stops_at_its_cost_and_goes_on(judge, tmp_path):  # noqa: F811
    """100 prompt and 10 completion tokens a judgement: 1.1 each by this price."""
    rows = wrong_samples(tmp_path / "in.jsonl", 12)
    judge.script = lambda n, body: verdicts(true_step(body))
    price = ["--price", 1e4, 1e4, "--concurrency", 2]
    done = judged(judge, tmp_path, *price, "--estimate")
    assert judge.count == 0 and "12 rows to judge, 1 vote(s) each" in done.stdout and not (tmp_path / "out.jsonl").exists()
    done = judged(judge, tmp_path, *price, "--max-cost", 4, check=False)
    assert done.returncode == 2 and "--max-cost 4 is spent" in done.stderr and "Traceback" not in done.stderr
    first = judge.count
    assert first == len(read(tmp_path / "out.jsonl")) in (4, 5)
    done = judged(judge, tmp_path, *price, "--estimate")
    assert f"{12 - first} rows to judge" in done.stdout and f"the mean of {first} rows judged" in done.stdout
    assert f"{10 * (12 - first)} completion tokens" in done.stdout
    done = judged(judge, tmp_path, *price, "--max-cost", 8, check=False)
    assert done.returncode == 2 and judge.count in (8, 9), "what was paid before counts"
    done = judged(judge, tmp_path, *price, "--max-cost", 100)
    assert judge.count == 12 and {row["id"] for row in read(tmp_path / "out.jsonl")} == {row["id"] for row in rows}
    done = judged(judge, tmp_path, "--max-cost", 1, check=False)
    assert done.returncode == 2 and "need --price" in done.stderr


def test_processbench_as_a_command(tmp_path):
    """Two files of the bundled world, one as a list; the table against the rows, and no file is located twice."""
    (tmp_path / "pb").mkdir()
    rows = labelled(tmp_path / "pb" / "gsm8k.jsonl", 60)
    (tmp_path / "pb" / "math.json").write_text(json.dumps([row | {"steps": [s.strip() for s in row["steps"]]} for row in rows]))
    arguments = ["--data-dir", tmp_path / "pb", "--files", "gsm8k", "math", "--out", tmp_path / "out", "--limit", 40]
    done = run("processbench", *arguments, "--", "--locator", "prm", "--prm", PRM)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.split("\n") if line.startswith("| prm")]
    assert [row[1] for row in table] == ["gsm8k", "math", "mean"] * 2 and "threshold 0." in table[3][0]
    found = read(tmp_path / "out" / "gsm8k.located.jsonl")
    share = lambda part: sum(row["label"] == (row["error_step"] or 0) - 1 for row in part) / len(part)
    wrong, right = (share([row for row in found if (row["label"] >= 0) == side]) for side in (True, False))
    assert len(found) == 40 and table[0][2:5] == ["40", f"{wrong:.1%}", f"{right:.1%}"]
    assert table[0][5].startswith(f"{2 * wrong * right / (wrong + right):.1%} (") and float(table[0][6]) > 50
    assert (tmp_path / "out" / "table.md").read_text().strip() in done.stdout
    again = run("processbench", *arguments, "--", "--locator", "prm", "--prm", PRM)
    rows_of = lambda text: [line.rsplit("|", 2)[0] for line in text.split("\n") if line.startswith("| ")]  # without the seconds
    assert rows_of(again.stdout) == rows_of(done.stdout) and again.stderr.count("40 rows are there already") == 2
    done = run("processbench", "--data-dir", tmp_path, "--out", tmp_path / "x", check=False)
    assert done.returncode == 2 and "no gsm8k.json" in done.stderr


@pytest.mark.slow
def test_training_a_prm(tmp_path):
    """A short training on 100 solutions: the loss falls."""
    labelled(tmp_path / "labels.jsonl", 120)
    run("train_prm", "--data", tmp_path / "labels.jsonl", "--out", tmp_path / "prm", "--held-out", 20, "--epochs", 4)
    figures = json.loads((tmp_path / "prm" / "training.json").read_text())
    assert figures["solutions"] == 100 and 0 < figures["last loss"] < 0.8 * figures["first loss"]
    run(2, "--labels", tmp_path / "labels.jsonl", "--limit", 20, "--locator", "prm", "--prm", tmp_path / "prm",
        "--out", tmp_path / "out.jsonl")  # fmt: skip
    assert len(read(tmp_path / "out.jsonl")) == 20
