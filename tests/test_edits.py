"""A researcher edits a stage: rows made before the edit are not mixed with new ones in silence, and
grown input is welcome."""

import importlib
import json
import shutil

import pytest
import torch
from conftest import ROOT, TINY, edited, read, run, run_edited, stage
from test_train import weights, write_pairs

EDITS = {  # of 01: what is edited, and what the message names
    "the prompt": ("Please reason", "Reason", "USER_TURN"),
    "the step format": ("Step {number}:", "Part {number}:", "STEP"),
    "the verdict": (
        'if finish_reason == "stop" else None',
        'if finish_reason != "refused" else None',
        "sample_solution",
    ),
}


@pytest.fixture(scope="module")
def samples(bundled, tmp_path_factory):
    """Samples of 12 problems, and the arguments that made them."""
    folder = tmp_path_factory.mktemp("edits")
    problems = folder / "problems.jsonl"
    problems.write_text(
        "".join(line + "\n" for line in (TINY / "train.jsonl").read_text().split("\n")[:12])
    )
    arguments = ["--data", problems, *bundled, "--out", folder / "samples.jsonl"]
    run(1, *arguments)
    return folder / "samples.jsonl", arguments


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_rows_from_before_an_edit(samples, tmp_path, edit):
    """The run stops in one line that names what was edited; with --accept-edit it resumes and notes
    both codes."""
    path, arguments = samples
    old, new, name = EDITS[edit]
    rows = path.read_bytes()
    meta = path.with_name("samples.jsonl.meta.json")
    before = meta.read_text()
    done = run_edited(tmp_path, 1, old, new, *arguments)
    assert done.returncode == 2 and f"was made before an edit of {name}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_bytes() == rows
    assert meta.read_text() == before

    done = run_edited(tmp_path, 1, old, new, *arguments, "--accept-edit")
    assert done.returncode == 0 and path.read_bytes() == rows, done.stderr
    accepted, first = json.loads(meta.read_text()), json.loads(before)["settings"]
    [noted] = accepted["edits"]
    assert noted == {"rows": len(read(path)), "code": first["code"], "prompt": first["prompt"]}
    assert accepted["settings"]["code"][name] != first["code"][name]
    meta.write_text(before)


@pytest.mark.slow
def test_an_edit_that_changes_no_row(samples, tmp_path):
    """Comments, docstrings, layout and what makes no row."""
    path, arguments = samples
    for old, new in (
        ("# no space at the end: it would", "# No space at the end. It would"),
        ('"""Sample a solution of a problem and grade it.', '"""Draw a solution of a problem.'),
        ('"gradings killed": grader.kills', '"killed": grader.kills'),
    ):
        done = run_edited(tmp_path, 1, old, new, *arguments)
        assert done.returncode == 0 and "rows are there already" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_stage_with_another_prompt_than_its_input(samples, bundled, tmp_path):
    """02 and 03 compare prompt, opening and steps with what made their input, 04 the prompt."""
    path, _ = samples
    located, pairs = tmp_path / "located.jsonl", tmp_path / "pairs.jsonl"
    arguments = {
        2: ["--samples", path, *bundled, "--out", located],
        3: ["--located", located, *bundled, "--out", pairs],
    }
    edit = ("Please reason", "Reason")
    done = run_edited(tmp_path, 2, *edit, *arguments[2])
    assert (
        done.returncode == 2
        and f"{path} was made with another USER_TURN than 02_locate_step.py" in done.stderr
    ), done.stderr
    # 03 grades nothing for DPO, but takes 01's verdicts
    dpo = ["--method", "dpo", "--samples", path, "--out", tmp_path / "dpo.jsonl"]
    done = run_edited(tmp_path, 3, "100 * a == b", "100 * a == b or a == 7", *dpo)
    assert done.returncode == 2 and "with another quick_verdict than 03_rec" in done.stderr
    run(2, *arguments[2], "--rollouts", 2, "--max-tokens", 400)
    done = run_edited(tmp_path, 3, *edit, *arguments[3])
    assert (
        done.returncode == 2
        and f"{located} was made with another USER_TURN than 03_rectify.py" in done.stderr
    ), done.stderr
    run(3, *arguments[3])
    trained = ["--data", pairs, "--model", TINY / "model", "--out", tmp_path / "tuned"]
    done = run_edited(tmp_path, 4, *edit, *trained)
    assert done.returncode == 2 and f"{pairs} was made with prompt = ..." in done.stderr
    assert "now it is ..." in done.stderr and not (tmp_path / "tuned").exists()
    options = ["--samples", path, *bundled, "--out", tmp_path / "x.jsonl", "--opening", "Step 1:"]
    done = run(2, *options, check=False)
    assert done.returncode == 2 and "opening" in done.stderr and not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    "line",
    [
        'STEP_ENDS["lines"] = "x"',
        'STEP_ENDS |= {"lines": "x"}',
        'STEP_ENDS: dict = {"lines": "x"}',
        'STEP_ENDS = OTHER_NAME = {"lines": "x"}',
    ],
)
def test_every_form_of_an_assignment_is_an_edit(tmp_path, line):
    before = stage(1).source_hashes(("split_steps",))
    place = "def split_steps(response"
    with edited(tmp_path, 1, place, f"{line}\n\n\n{place}") as one:
        after = one.source_hashes(("split_steps",))
    assert {name for name in before if before[name] != after[name]} == {"STEP_ENDS"}


def test_an_edit_of_the_grading_is_seen_two_stages_on(tmp_path):
    """02 by scores grades nothing; it passes on what 01 graded with. regrade.py grades anew."""
    samples, located = tmp_path / "samples.jsonl", tmp_path / "located.jsonl"
    steps = [stage(1).OPENING + " 3 + 4 = 8.\n", "Step 2: So \\boxed{8}."]
    row = {"id": "a", "sample": 0, "problem": "3 + 4?", "answer": "7", "steps": steps}
    row |= {"response": "".join(steps), "finish_reason": "stop", "correct": False, "model": "m"}
    samples.write_text(json.dumps(row | {"step_scores": [0.1, 0.1], "prm": "p"}) + "\n")
    code = stage(1).source_hashes(stage(1).ROW_CODE)
    meta = tmp_path / "samples.jsonl.meta.json"
    meta.write_text(json.dumps({"settings": {"code": code}}))
    locate = ["--locator", "scores", "--samples", samples, "--out"]
    run(2, *locate, located)
    rectify = ["--located", located, "--model", TINY / "model", "--out", tmp_path / "pairs.jsonl"]
    done = run_edited(tmp_path, 3, "100 * a == b", "100 * a == b or a == 7", *rectify)
    assert done.returncode == 2 and "with another quick_verdict than 03_rec" in done.stderr

    old = code | {"quick_verdict": "of old"}
    meta.write_text(json.dumps({"settings": {"code": old}}))
    done = run(2, *locate, tmp_path / "x.jsonl", check=False)
    assert done.returncode == 2 and "with another quick_verdict than 02_loc" in done.stderr
    run("regrade", samples)
    run(2, *locate, tmp_path / "x.jsonl")
    # of the grading alone, with what an edit has added to it, and not of what rollouts have located
    before = {name: old[name] for name in old if name != "spelled"}
    for made, noted in (
        ({"code": before}, {"code": code}),
        ({"code": old | {"prompt_ids": "of old"}}, {"code": code | {"prompt_ids": "of old"}}),
        ({"code": old, "locator": "rollout"}, {"code": old, "locator": "rollout"}),
        ({"code": old | {"grade": "of old"}}, {"code": code | stage(5).source_hashes(("grade",))}),
    ):
        meta.write_text(json.dumps({"settings": made}))
        run("regrade", samples)
        assert json.loads(meta.read_text())["settings"] == noted


def test_the_edited_name_stands_before_those_that_are_not_used_any_more(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    code = {"AS_NUMBER": "1", "BOX": "1", "quick_verdict": "1"}
    meta = tmp_path / "rows.jsonl.meta.json"
    meta.write_text(json.dumps({"settings": {"code": code}}))
    with pytest.raises(SystemExit):
        stage(1).Output(path, {"code": {"quick_verdict": "2"}})
    assert "before an edit of quick_verdict, AS_NUMBER, BOX;" in capsys.readouterr().err


def test_a_verdict_that_regrade_adds_makes_no_pair_anew():
    row = {"id": "a", "sample": 0, "response": "\\boxed{7}", "correct": True}
    three = stage(3)
    assert three.input_hash([row], {}) == three.input_hash([row | {"correct_paper": False}], {})
    assert three.input_hash([row], {}) != three.input_hash([row | {"correct": False}], {})
    assert {"correct_paper", "correct_scdpo"} <= set(three.STAGE_FIELDS.split())


def test_every_script_can_be_imported():
    """Scripts use functions of stages, which an edit may rename."""
    for folder in ("analysis", "experiments", "benchmarks", "serving", "data"):
        for script in (ROOT / folder).glob("*.py"):
            importlib.import_module(script.stem)


COMPARED = [  # what README says is compared, of each stage's own rows
    (1, None, "sample_solution quick_verdict STEP_ENDS USER_TURN"),
    (2, "rollout", "first_wrong_step is_alive lost_after extract_answer algebra_verdict USER_TURN"),
    (2, "judge", "JUDGE_PROMPT first_error STEP_ENDS"),
    (2, "scores", "by_scores STEP_ENDS"),
    (3, "step-dpo", "make_pairs quick_verdict USER_TURN"),
    (3, "scdpo", "heated_completion STOPS quick_verdict USER_TURN"),
    (3, "dpo", "distinct STEP_ENDS"),
    (5, None, "grade extract_answer quick_verdict USER_TURN"),
]


@pytest.mark.parametrize("number, kind, names", COMPARED)
def test_what_the_readme_edits_is_compared(number, kind, names):
    roots = stage(number).ROW_CODE
    hashes = stage(number).source_hashes(roots[kind] if kind else roots)
    assert set(names.split()) <= hashes.keys()


def test_a_folder_with_other_weights_is_another_model(tmp_path):
    """A training under the same name, as in rounds."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    before = stage(1).model_id(str(tmp_path / "model"))
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert stage(1).model_id(str(tmp_path / "model")) != before
    assert stage(1).model_id("Qwen/Qwen2-7B-Instruct") == "Qwen/Qwen2-7B-Instruct"


def test_each_stage_reads_by_default_what_the_one_before_writes():
    one, two, three, four, five = (stage(number).Args() for number in range(1, 6))
    assert one.out == two.samples == three.samples
    assert two.out == three.located
    assert four.data == (str(three.out),)
    assert five.models == (four.model, str(four.out))
    assert one.model == two.model == three.model == four.model


def test_a_setting_that_is_no_longer_there(tmp_path, capsys):
    """Of NEUTRAL, for one."""
    output = stage(1).Output(tmp_path / "out.jsonl", {"code": {}, "top_k": 0})
    output.write({"id": "a"})
    output.close()
    with pytest.raises(SystemExit):
        stage(1).Output(tmp_path / "out.jsonl", {"code": {}})
    assert "was made with top_k = 0, now it is None" in capsys.readouterr().err


def test_a_split_without_stops_heats_nothing(tmp_path):
    arguments = ["--method", "scdpo", "--split", "blank-lines"]
    arguments += ["--out", tmp_path / "x.jsonl"]
    done = run_edited(tmp_path, 3, '    "blank-lines": ["\\n\\n"],\n', "", *arguments)
    assert done.returncode == 2 and "STOPS does not say" in done.stderr


@pytest.mark.slow
def test_a_training_from_before_an_edit(tmp_path):
    """04 stopped after 2 of 4 steps: with another loss it names the edit and leaves the checkpoint
    as it is; with --accept-edit it resumes there and notes both codes."""
    data = write_pairs(tmp_path / "pairs.jsonl", 20)
    out = tmp_path / "out"
    arguments = ["--data", data, "--model", TINY / "model", "--out", out, "--precision", "fp32"]
    arguments += ["--epochs", 1, "--batch-size", 5, "--save-steps", 2, "--lr", 1e-5]
    run(4, *arguments)
    assert {weight.dtype for weight in weights(out).values()} == {torch.bfloat16}, "the base's"
    for name in ("model.safetensors", "training.json"):
        (out / name).unlink()  # as after a kill in step 3
    state = out / "checkpoint-2" / "state.json"
    first = json.loads(state.read_text())["settings"]
    before = {path: path.read_bytes() for path in state.parent.rglob("*") if path.is_file()}

    edit = ("F.logsigmoid(margin)", "F.logsigmoid(margin - 0.5)")
    done = run_edited(tmp_path, 4, *edit, *arguments)
    said = f"{state.parent} was made before an edit of dpo_loss; undo it, give another --out"
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (out / "model.safetensors").exists()
    assert before == {path: path.read_bytes() for path in before}

    done = run_edited(tmp_path, 4, *edit, *arguments, "--accept-edit")
    assert done.returncode == 0 and f"resuming from {state.parent}" in done.stderr, done.stderr
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert settings["edits"] == [{"steps": 2, "code": first["code"], "prompt": first["prompt"]}]
    changed = {name for name, code in settings["code"].items() if first["code"][name] != code}
    assert changed == {"dpo_loss"}
    assert [line["step"] for line in read(out / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_grown_input(samples, tmp_path):
    """A problem more makes no run start again; another text under the same id stops it."""
    path, arguments = samples
    rows = read(path)
    problems = arguments[1]
    first = problems.read_text()
    problems.write_text(first + (TINY / "train.jsonl").read_text().split("\n")[12] + "\n")
    run(1, *arguments)
    assert read(path)[: len(rows)] == rows and len(read(path)) > len(rows)

    part, pairs = tmp_path / "part.jsonl", tmp_path / "dpo.jsonl"
    rows = sorted(read(path), key=lambda row: row["id"])
    half = rows[:13] if rows[12]["id"] == rows[13]["id"] else rows[:12]
    half = [row for row in rows if row["id"] <= half[-1]["id"]]
    command = (3, "--method", "dpo", "--samples", part, "--out", pairs)
    for some in (half, rows):
        part.write_text("".join(json.dumps(row) + "\n" for row in some))
        run(*command)
    tries = {row["id"]: row for row in read(tmp_path / "dpo.tries.jsonl")}
    assert set(tries) == {row["id"] for row in rows}
    assert len(tries) > len({row["id"] for row in half})

    part.write_text(
        "".join(json.dumps(row | {"response": row["response"] + " "}) + "\n" for row in rows)
    )
    done = run(*command, check=False)
    assert done.returncode == 2 and "were made of other rows" in done.stderr
    problems.write_text(first.replace("?", " now?", 1))
    done = run(1, *arguments, check=False)
    assert done.returncode == 2 and "another problem with the id" in done.stderr
