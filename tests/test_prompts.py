"""Prompts: BOS, templates that trim turns or take thoughts out, the bare problem, and the prompt as
a setting."""

import json

import pytest
from conftest import ROOT, STAGES, TINY, read, run, stage
from test_faults import scripted  # noqa: F401  a server that answers every completion alike
from tokenizers import normalizers

TEMPLATES = sorted((ROOT / "data" / "templates").glob("*.jinja"))
CHATML = (TINY / "model" / "chat_template.jinja").read_text()
# the shapes of Llama 3.1's, Gemma's and Mistral's own templates, which trim what a turn says, and
# of Qwen3's and R1's thoughts
LLAMA = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
    {{- m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
GEMMA = """{{- bos_token -}}
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' -}}
{{- m['content'] | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"""
MISTRAL = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- '[INST] ' + m['content'] | trim + ' [/INST]' -}}
{%- else -%}{{- ' ' + m['content'] | trim + eos_token -}}{%- endif -%}
{%- endfor -%}"""
QWEN3 = """{%- for m in messages -%}
{%- set said = m['content'].split('</think>')[-1].lstrip('\n') -%}
{{- '<|im_start|>' + m['role'] + '\n' -}}
{{- '<think>\n\n</think>\n\n' * (m['role'] == 'assistant') + said + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
R1 = """{{- bos_token -}}
{%- for m in messages -%}
{{- '<' + m['role'] + '>' + m['content'].split('</think>')[-1] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant><think>\n' -}}{%- endif -%}"""
ENDS = {
    LLAMA: "<|start_header_id|>assistant<|end_header_id|>\n\n",
    GEMMA: "<start_of_turn>model\n",
    MISTRAL: "[/INST] ",
    CHATML: "<|im_start|>assistant\n",
}
DATED = (
    "{{- '<|im_start|>system\nToday Date: ' + (date_string or '25 Nov 2025') + '<|im_end|>\n' -}}"
)
DATED += CHATML.replace("message['content']", "message['content'] | trim")


def model(folder, template: str = CHATML, bos: bool = True, eos: bool = False) -> str:
    """A folder with a config and the bundled tokenizer, which then has <s> and </s>, and puts them
    around plain text or not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "model", bos_token="<s>", eos_token="</s>")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    around = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=around, special_tokens=ids
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((TINY / "model" / "config.json").read_text())
    return str(folder)


def asked_and_trained(tokenizer, prefix: str) -> dict[str, list[int]]:
    """Token ids of the prompt of each stage; of 04, of what it trains behind."""
    pair = {
        "prompt": "1 + 1?",
        "initial_reason_steps": prefix,
        "chosen": " 2",
        "rejected": " 3",
        "full_chosen": "",
        "full_rejected": "",
    }
    ids = {
        name: stage(number).prompt_ids(tokenizer, "1 + 1?", prefix)
        for number, name in STAGES.items()
        if number != 4
    }
    solution = {"problem": "1 + 1?", "solution": " 2"}
    return ids | {
        "pair": stage(4).encode(pair, tokenizer)[0],
        "solution": stage(4).encode(solution, tokenizer)[0],
    }


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_one_bos_stands_first_in_every_stage_and_no_eos_within(template, eos, tmp_path):
    tokenizer = stage(1).load_tokenizer(model(tmp_path / "m", eos=eos), template, "{}")
    ids = asked_and_trained(tokenizer, "Step 1:")
    for name, found in ids.items():
        assert found[0] == tokenizer.bos_token_id and found.count(tokenizer.bos_token_id) == 1, name
        assert tokenizer.eos_token_id not in found, name
    qwen = stage(1).load_tokenizer(str(TINY / "model"), template, "{}")  # has no BOS
    assert qwen.bos_token is None
    assert qwen.decode(stage(1).prompt_ids(qwen, "1 + 1?", "")) in tokenizer.decode(ids[STAGES[1]])


ASK = "1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}."
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n1 + 1?\n\n### Response: Let's think step by step."
)
# template and opening of docs/evaluation.md, and the raw prompt of the authors' evaluation
AUTHORS = {
    "step_dpo_qwen": (
        "",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + ASK
        + "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "step_dpo_deepseek": ("", "User: " + ASK + "\n\nAssistant:"),
    "metamath": (" Let's think step by step.", ALPACA),
}


@pytest.mark.parametrize(
    "around", ["nothing", "bos", "bos and eos", "bos, and a space before words"]
)
@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_prompts(name, around, tmp_path):
    """The same token ids as LLM.generate makes of the raw prompt: with the BOS that the tokenizer
    puts before a text."""
    opening, raw = AUTHORS[name]
    folder = (
        str(TINY / "model") if around == "nothing" else model(tmp_path / "m", eos="eos" in around)
    )
    tokenizer = stage(1).load_tokenizer(folder, ROOT / "data" / "templates" / f"{name}.jinja", "{}")
    if "space" in around:  # as in Mistral's tokenizer
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("\u0120")
    ids = tokenizer(raw)["input_ids"]
    ids = ids[:-1] if "eos" in around else ids
    assert stage(5).prompt_ids(tokenizer, "1 + 1?", opening) == ids
    assert (
        stage(5).render_prompt(tokenizer, "1 + 1?", opening) == "<s>" * (around != "nothing") + raw
    )
    assert ids[0] == tokenizer.bos_token_id or around == "nothing"


@pytest.mark.parametrize("eos", [False, True])
def test_bos_stands_before_rows_that_no_template_renders(eos, tmp_path):
    """The SCDPO authors' turns of blocks, and TRL's text prompts."""
    tokenizer = stage(4).load_tokenizer(model(tmp_path / "model", eos=eos), None, "{}")
    turns = [{"role": "user", "content": [{"type": "text", "content": "1 + 2?"}]}]
    answers = [
        [*turns, {"role": "assistant", "content": [{"type": "text", "content": text}]}]
        for text in ("3", "4")
    ]
    for row in (
        {"chosen": answers[0], "rejected": answers[1]},
        {"prompt": "1 + 2?", "chosen": " 3", "rejected": " 4"},
    ):
        prefix, suffixes = stage(4).encode(row, tokenizer)
        assert prefix[0] == tokenizer.bos_token_id and prefix.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in prefix
        assert all(ids[-1] == tokenizer.eos_token_id for ids in suffixes)


def test_a_template_without_bos_gets_one_line(tmp_path, capfd):
    one = stage(1)
    for template, bos, warned in [(CHATML, True, 1), (CHATML, False, 0), (LLAMA, True, 0)]:
        one.load_tokenizer(model(tmp_path / f"{warned}{bos}", template, bos), None, "{}")
        lines = capfd.readouterr().err.splitlines()
        assert sum("renders no <s>" in line for line in lines) == warned and len(lines) == warned


@pytest.mark.parametrize("template", ENDS, ids=["llama", "gemma", "mistral", "chatml"])
def test_steps_stand_as_they_are_behind_templates_that_trim(template, tmp_path):
    tokenizer = stage(1).load_tokenizer(model(tmp_path, template), None, "{}")
    for prefix in (
        "First 3 + 4 = 7.\n",
        "\nFirst,  ",
        "Let's think step by step.\nStep 1:",
        "\t1.\n\n",
    ):
        text = stage(1).render_prompt(tokenizer, "1 + 1?", prefix)
        assert text.endswith(ENDS[template] + prefix)
        ids = asked_and_trained(tokenizer, prefix)
        assert ids[STAGES[1]] == tokenizer(text, add_special_tokens=False)["input_ids"]
        solution = {"problem": "1 + 1?", "solution": prefix + "2"}
        turn = text.removesuffix(prefix)  # SFT trains where 01 puts the opening
        trained = stage(4).encode(solution, tokenizer)
        spaces = turn[len(turn.rstrip(" ")) :]  # they belong to the next token
        bare = tokenizer(turn.rstrip(" "), add_special_tokens=False)["input_ids"]
        assert trained[0] == bare
        assert tokenizer.decode(trained[1][0]).startswith(spaces + prefix + "2")
        if not prefix.endswith(" "):  # 04 leaves a space at the end to the suffix
            assert all(found == ids[STAGES[1]] for name, found in ids.items() if name != "solution")


def test_what_the_model_wrote_itself_stands_behind_the_prompt_that_it_saw(tmp_path):
    """The space that Mistral's template puts before a turn is not doubled; a thought is neither
    doubled nor taken out, also not one that the template opens, as R1's does."""
    for number, (template, written, forced) in enumerate(
        [
            (MISTRAL, " First 3 + 4 = 7.\n", " Step 1:"),
            (QWEN3, "<think>\nWell.\n</think>\n\n7\n", "<think>\n\n</think>\n\nStep 1:"),
            (R1, "Well.\n</think>\n\n7\n", "<think>\nStep 1:"),
            (R1, "Well.\n\n", "<think>\nStep 1:"),
        ]
    ):
        tokenizer = stage(1).load_tokenizer(model(tmp_path / str(number), template), None, "{}")
        seen = stage(1).render_prompt(tokenizer, "1 + 1?", "")
        assert stage(1).render_prompt(tokenizer, "1 + 1?", written) == seen + written
        turn = seen.removesuffix("<think>\n") + forced  # as the template has a turn
        assert stage(1).render_prompt(tokenizer, "1 + 1?", "Step 1:") == turn


def test_templates_take_the_bare_problem_also_where_the_sentence_was_edited(monkeypatch):
    for number in STAGES:
        monkeypatch.setattr(
            stage(number), "USER_TURN", "{problem}\nThink hard, and box your answer."
        )
        for template in TEMPLATES:
            tokenizer = stage(number).load_tokenizer(str(TINY / "model"), template, "{}")
            text = stage(number).render_prompt(tokenizer, "1 + 1?", "")
            bare = "problem'" in template.read_text()  # message['problem']
            assert "1 + 1?" in text
            assert ("hard" in text) != bare
    own = stage(1).load_tokenizer(str(TINY / "model"), None, "{}")
    assert "1 + 1?\nThink hard" in stage(1).render_prompt(own, "1 + 1?", "")


def test_scdpos_evaluation_of_code_has_its_own_prompt(tmp_path):
    one = stage(1)
    system = '{"system": "Below is a math problem. Please solve it step by step."}'
    tokenizer = one.load_tokenizer(model(tmp_path), ROOT / "data/templates/code.jinja", system)
    assert one.render_prompt(tokenizer, "1 + 1?", "") == (
        "<s><|system|><|text|>Below is a math problem. Please solve it step by step."
        "<|endofblock|><|endofmessage|>"
        "<|user|><|text|>1 + 1?<|endofblock|><|endofmessage|><|assistant|>"
    )


def refused(number: int, *arguments):
    """Another prompt: one line, which shows the place and says how to set a date."""
    done = run(number, *arguments, check=False)
    [line] = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "25 Nov 2025" in line
    assert "26 Nov 2025" in line
    assert '--chat-template-kwargs \'{"date_string":' in line


def test_rows_of_another_prompt_are_not_mixed(scripted, tmp_path):  # noqa: F811
    """A template is edited between two runs, as a date would: 01, 02, 03 and 05 refuse; with the
    date of then 01 resumes. It trims turns, and 02 asks for rollouts behind a line."""
    asked = []
    scripted.script = lambda n, body: asked.append(body) or "good"
    template, problem = tmp_path / "dated.jinja", {"id": "a", "problem": "1 + 1?", "answer": "2"}
    sampled = problem | {
        "sample": 0,
        "response": "It is 3.\nSo \\boxed{3}.",
        "steps": ["It is 3.\n", "So \\boxed{3}."],
        "correct": False,
        "finish_reason": "stop",
        "model": "m",
        "error_step": 1,
    }
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    (tmp_path / "samples.jsonl").write_text(json.dumps(sampled) + "\n")
    url = f"http://127.0.0.1:{scripted.server_address[1]}/v1"
    common = ["--base-url", url, "--tokenizer", TINY / "model", "--chat-template", template]
    common += ["--temperature", 0.7, "--top-p", 0.9, "--max-tokens", 99]
    steps = ["--opening", "", "--split", "lines", "--model", "m"]
    for number, out, arguments in [
        (1, "s.jsonl", ["--data", tmp_path / "problems.jsonl", "--model", "m", "--n", 1]),
        (
            2,
            "l.jsonl",
            ["--samples", tmp_path / "samples.jsonl", "--rollouts", 1, "--give-up", 2, *steps],
        ),
        (3, "p.jsonl", ["--located", tmp_path / "samples.jsonl", "--n", 1, *steps]),
        (5, "r", ["--data", tmp_path / "problems.jsonl", "--models", "m"]),
    ]:
        arguments = [*arguments, *common, "--out", tmp_path / out]
        template.write_text(DATED)
        before = len(asked)
        run(number, *arguments)
        sent = {(b["temperature"], b["top_p"], b["max_tokens"]) for b in asked[before:]}
        assert sent == {(0.7, 0.9, 99)}, number
        template.write_text(DATED.replace("25 Nov", "26 Nov"))
        before = scripted.count
        refused(number, *arguments)
        if number == 1:
            run(
                number,
                *arguments,
                "--chat-template-kwargs",
                json.dumps({"date_string": "25 Nov 2025"}),
            )
        assert scripted.count == before
    tokenizer = stage(2).load_tokenizer(str(TINY / "model"), template, "{}")
    prompts = [tokenizer.decode(body["prompt"]) for body in asked]
    assert any(prompt.endswith("assistant\nIt is 3.\n") for prompt in prompts)


@pytest.mark.slow
def test_training_goes_on_by_the_prompt(small_model, tmp_path):
    rows = [
        {
            "prompt": f"{i} + 1?",
            "initial_reason_steps": "Step 1:",
            "chosen": f" {i + 1}",
            "rejected": f" {i}",
            "full_chosen": "",
            "full_rejected": "",
        }
        for i in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dated.jinja").write_text(DATED)
    arguments = ["--data", tmp_path / "pairs.jsonl", "--model", small_model]
    arguments += ["--out", tmp_path / "out", "--batch-size", 2, "--epochs", 2, "--save-steps", 2]
    arguments += ["--chat-template", tmp_path / "dated.jinja"]
    run(4, *arguments)
    for name in ("model.safetensors", "training.json"):
        (tmp_path / "out" / name).unlink()  # as after a kill in the last step
    (tmp_path / "dated.jinja").write_text(DATED.replace("25 Nov", "26 Nov"))
    refused(4, *arguments)
    date = json.dumps({"date_string": "25 Nov 2025"})
    assert "resuming from" in run(4, *arguments, "--chat-template-kwargs", date).stderr
    assert [line["step"] for line in read(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]
