"""Score the steps of solutions by a process reward model; 02_locate_step.py --locator scores takes
the first low one for wrong.

    python analysis/score_steps.py data/samples.jsonl --prm Qwen/Qwen2.5-Math-PRM-7B --wrong-only
    python analysis/score_steps.py data/samples.jsonl --prm peiyi9979/math-shepherd-mistral-7b-prm
    python analysis/score_steps.py data/samples.jsonl --prm RLHFlow/Llama3.1-8B-PRM-Mistral-Data \\
        --form rlhflow
    python 02_locate_step.py --samples data/samples.scored.jsonl --locator scores --threshold 0.5

Input: rows with `problem` and `steps`, as 01 and ProcessBench have them. Output: the same rows, in
their order, and
    {"step_scores": [0.98, 0.03], "prm": "...", "prm_tokens": 186}

A score is the chance, by the model, that the step is right. step_scores is null, with prm_reason,
where a row is not scored.

Three forms are read, all in this process by transformers, without code from the hub:
    qwen           Qwen2ForProcessRewardModel (arXiv 2501.07301): a chat with <extra_0> after each
                   step, two classes read there
    math-shepherd  a causal model (arXiv 2312.08935): plain text with " ки" after each step, "+"
                   against "-" read there
    rlhflow        a causal model (RLHFlow's two): a turn a step, "+" against "-" as its answer

Qwen's form is also read by a server, for models that do not fit one device:
    vllm serve MODEL --pooler-config '{"tok_pooling_type": "STEP", "step_tag_id": 151651}'

Which public models work: docs/locators.md. The same command run again resumes.
"""

import asyncio
import contextlib
import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import openai
import torch
import transformers
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
LOCATE = importlib.import_module("02_locate_step")
stop = LOCATE.stop
MARKS = {"qwen": "<extra_0>", "math-shepherd": "ки", "rlhflow": "+"}  # one a step
HERE = "\ue000"  # stands for the mark until the text is rendered; in Unicode it means nothing
# of the model card of Qwen's
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PROBE = {"problem": "What is 1 + 1?", "steps": ["Step 1: 1 + 1 = 2.\n", "Step 2: The answer is 2."]}
WINDOW = 128  # rows that are scored and written together
BATCH_TOKENS = 16384  # padding included


@dataclass
class Args:
    samples: tyro.conf.Positional[Path]
    """rows with problem and steps"""
    prm: str
    """folder or hub id of the process reward model"""
    out: Path | None = None
    """file to write; without it SAMPLES with .scored before its ending"""
    form: Literal["math-shepherd", "rlhflow"] = "math-shepherd"
    """how a causal model reads the steps"""
    base_url: str = ""
    """vLLM server that pools --prm, Qwen's form; its key is PRM_API_KEY"""
    wrong_only: bool = False
    """leave out rows that are `correct`; 02 does not look at them"""


def process_reward_class():
    """Qwen2.5-Math-PRM's class, with the names of its weights, so that no code from the hub is
    run."""

    class Qwen2ForProcessRewardModel(transformers.Qwen2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = transformers.Qwen2Model(config)
            width = config.hidden_size
            self.score = torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
            )
            self.post_init()

    return Qwen2ForProcessRewardModel


class Reader:
    """What a model reads of a solution: its form, its tokenizer, and the longest text that it
    takes."""

    def __init__(self, prm: str, form: str = "math-shepherd"):
        try:
            config = transformers.AutoConfig.from_pretrained(prm)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(prm)
        except (OSError, ValueError) as error:
            stop(f"--prm {prm}: {str(error).splitlines()[0]}")
        kind = (config.architectures or ["none"])[0]
        self.max_length = getattr(config, "max_position_embeddings", sys.maxsize)
        qwen = "ProcessReward" in kind and config.model_type == "qwen2"
        if not qwen and not kind.endswith("ForCausalLM"):
            stop(
                f"--prm {prm}: its architecture is {kind}; read are Qwen2ForProcessRewardModel "
                "and causal models that answer + or -, see docs/locators.md"
            )
        self.form = "qwen" if qwen else form
        self.mark = MARKS[self.form]
        self.tag = self.tokenizer.convert_tokens_to_ids(self.mark) if qwen else None
        try:
            *_, reason = self.encode(PROBE)
        # a template raises what it likes, and so does a tokenizer that has no offsets
        except Exception as error:
            reason = f"{error.__class__.__name__}: {str(error).partition(chr(10))[0]}"
        if reason:
            stop(
                f"--prm {prm}, form {self.form}: {reason}; "
                "has it another form, or another tokenizer?"
            )

    def render(self, row: dict) -> str:
        """The text, with HERE after each step."""
        steps = [step.strip() for step in row["steps"]]
        if self.form == "math-shepherd":
            steps = [LOCATE.cut_label(step, k)[1].strip() for k, step in enumerate(row["steps"], 1)]
            return f"{row['problem']} " + "\n".join(
                f"Step {k}: {step} {HERE}" for k, step in enumerate(steps, 1)
            )
        if self.form == "qwen":
            turns = [
                ("system", SYSTEM),
                ("user", row["problem"]),
                ("assistant", "".join(step + HERE for step in steps)),
            ]
        else:
            steps[0] = f"{row['problem']} {steps[0]}"
            turns = [turn for step in steps for turn in (("user", step), ("assistant", HERE))]
        return self.tokenizer.apply_chat_template(
            [{"role": r, "content": c} for r, c in turns], tokenize=False
        )

    def tokens(self, row: dict, mark: str) -> tuple[list[int], list[int]]:
        """Token ids with `mark` after each step, and the last token of each mark: a vocabulary may
        part it into several."""
        parts = self.render(row).split(HERE)
        ends = list(accumulate(len(part) + len(mark) for part in parts[:-1]))
        coded = self.tokenizer(
            mark.join(parts),
            add_special_tokens=self.form == "math-shepherd",
            return_offsets_mapping=True,
        )
        token_of = {
            at: token
            for token, (start, end) in enumerate(coded["offset_mapping"])
            for at in range(start, end)
        }
        return coded["input_ids"], [token_of[end - 1] for end in ends if end - 1 in token_of]

    def encode(self, row: dict) -> tuple[list[int], list[int], str]:
        """Token ids, the places where the scores are read, and why the row cannot be scored, or
        ""."""
        ids, marks = self.tokens(row, self.mark)
        marked = marks
        if self.form == "qwen":
            marked = [place for place, token in enumerate(ids) if token == self.tag]
        if marked != marks or len(marks) != len(row["steps"]):
            return ids, [], f"marks: {len(marked)} {self.mark} for {len(row['steps'])} steps"
        reason = ""
        if len(ids) > self.max_length:
            reason = f"too long: {len(ids)} tokens, where the model takes {self.max_length}"
        # an answer is predicted at the token before it
        places = [place - 1 for place in marks] if self.form == "rlhflow" else marks
        return ids, places, reason

    def signs(self) -> list[int]:
        """The tokens of - and +, as they stand in the place of the last mark."""
        return [ids[marks[-1]] for ids, marks in (self.tokens(PROBE, sign) for sign in "-+")]


def load_model(prm: str, kind):
    """The model, if its files hold all of its weights, and none that it does not know."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" or LOCATE.processor_has_bf16() else torch.float32
    try:
        lm, report = kind.from_pretrained(prm, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        stop(f"--prm {prm}: cannot be loaded ({' '.join(str(error).split())[:300]})")
    missing = sorted(report["missing_keys"])
    if missing:
        names = ", ".join(missing[:4])
        stop(f"--prm {prm}: its files lack {names}; random weights would stand there")
    unknown = [key for key in sorted(report["unexpected_keys"]) if not key.startswith("lm_head.")]
    if unknown:
        names = ", ".join(unknown[:4])
        stop(f"--prm {prm}: its files hold {names}, so it has another head; see docs/locators.md")
    return lm.to(device).eval()


def local_scorer(args: Args, reader: Reader):
    """score([(ids, places)]) -> for each its scores, by transformers in this process."""
    qwen = reader.form == "qwen"
    lm = load_model(args.prm, process_reward_class() if qwen else transformers.AutoModelForCausalLM)
    classes = [0, 1] if qwen else reader.signs()
    has_warned = False

    def warn(mass: float):
        nonlocal has_warned
        if not has_warned and mass < 0.5:
            has_warned = True
            print(
                f"+ and - have {mass:.1%} of the probability at the marks: "
                f"is {reader.form} the model's form?",
                file=sys.stderr,
            )

    @torch.inference_mode()
    def score_batch(batch: list[tuple]) -> list[list[float]]:
        # padded on the right, which no step sees
        padded = torch.zeros(len(batch), max(len(ids) for ids, _ in batch), dtype=torch.long)
        for line, (ids, _) in zip(padded, batch, strict=True):
            line[: len(ids)] = torch.tensor(ids)
        hidden = lm.base_model(input_ids=padded.to(lm.device)).last_hidden_state
        head = lm.score if qwen else lm.get_output_embeddings()
        scores = []
        for states, (_, places) in zip(hidden, batch, strict=True):
            logits = head(states[places]).float()
            warn(logits.softmax(-1)[:, classes].sum(-1).mean().item())
            scores.append(logits[:, classes].softmax(-1)[:, 1].tolist())
        return scores

    async def score(parts: list[tuple]) -> list[list[float]]:
        scores = [None] * len(parts)
        order = sorted(range(len(parts)), key=lambda i: len(parts[i][0]))
        while order:  # the longest first
            size = max(1, BATCH_TOKENS // len(parts[order[-1]][0]))
            batch, order = order[-size:], order[:-size]
            batch_scores = score_batch([parts[i] for i in batch])
            for i, row_scores in zip(batch, batch_scores, strict=True):
                scores[i] = row_scores
        return scores

    return score


def server_scorer(args: Args, reader: Reader):
    """The same by a vLLM server that pools Qwen's form."""
    if reader.form != "qwen":
        stop(f"--base-url: {args.prm} is not in Qwen's form; leave the option out")
    client = LOCATE.connect(args.base_url, args.prm, "PRM_API_KEY")
    url = args.base_url.removesuffix("/").removesuffix("/v1") + "/pooling"

    async def score_one(ids: list[int]) -> list[float]:
        body = {"model": args.prm, "input": ids, "use_activation": True}
        reply = await client.post(url, body=body, cast_to=object)
        try:
            return [good for _, good in reply["data"][0]["data"]]
        except (TypeError, KeyError, IndexError, ValueError):  # no pair a step
            return []

    async def score(parts: list[tuple]) -> list[list[float]]:
        try:
            return await asyncio.gather(*(score_one(ids) for ids, _ in parts))
        except openai.APIError as error:
            stop(
                f"--base-url {args.base_url}: {url} does not answer ({str(error)[:300]}); "
                "run the same command to resume"
            )

    return score


def check_scores(args: Args, reader: Reader, scores: list[float], places: list[int]):
    """Stop unless there is one chance for each step."""
    are_chances = all(type(score) in (int, float) and 0 <= score <= 1 for score in scores)
    if are_chances and len(scores) == len(places):
        return
    message = (
        f"--prm {args.prm}: {len(scores)} scores for {len(places)} steps, "
        "where each needs one from 0 to 1"
    )
    if args.base_url:
        pooler = json.dumps({"tok_pooling_type": "STEP", "step_tag_id": reader.tag})
        message += f"; start the server by vllm serve {args.prm} --pooler-config '{pooler}'"
    stop(message)


def bare(row: dict) -> dict:
    """A row without what this script adds."""
    added = ("step_scores", "prm", "prm_tokens", "prm_reason")
    return {name: value for name, value in row.items() if name not in added}


def check_resumed(args: Args, path: Path, old: list[dict], rows: list[dict]):
    """Stop where the rows that are there are not the first of the input."""
    for number, row in enumerate(old):
        if number >= len(rows) or bare(row) != bare(rows[number]):
            stop(
                f"{path}, row {number + 1}, is not row {number + 1} of {args.samples}; "
                "give another --out"
            )


async def score_all(args: Args, reader: Reader, rows: list[dict], output) -> None:
    """Score and write the rows that are not there yet."""
    make_scorer = server_scorer if args.base_url else local_scorer
    score = make_scorer(args, reader)
    old = len(output.rows)
    bar = tqdm(total=len(rows), initial=old, desc="scoring", mininterval=1.0)
    # a window that was torn is made again: the batches are the same
    for at in range(old - old % WINDOW, len(rows), WINDOW):
        parts, scored_rows = [], []
        for row in rows[at : at + WINDOW]:
            ids, places, reason = [], [], ""
            if not row["steps"]:
                reason = "no steps"
            elif args.wrong_only and row.get("correct") is True:
                reason = "a right solution"
            else:
                ids, places, reason = reader.encode(row)
            scored = {
                **bare(row),
                "step_scores": None,
                "prm": output.settings["prm"],
                "prm_tokens": len(ids),
            }
            scored_rows.append(scored)
            if reason:
                scored["prm_reason"] = reason
            else:
                parts.append((scored, ids, places))
        all_scores = await score([(ids, places) for _, ids, places in parts])
        for (row, _, places), scores in zip(parts, all_scores, strict=True):
            check_scores(args, reader, scores, places)
            row["step_scores"] = [round(score, 4) for score in scores]
        output.write(*scored_rows[max(0, old - at) :])
        bar.update(len(output.rows) - bar.n)
    bar.close()


def main(args: Args):
    rows = LOCATE.read_rows(args.samples, ("problem", "steps"))
    path = args.out or args.samples.with_suffix(".scored.jsonl")
    reader = Reader(args.prm, args.form)
    settings = {
        "stage": "analysis/score_steps",
        "prm": LOCATE.model_id(args.prm),
        "form": reader.form,
        "wrong_only": args.wrong_only,
    }
    made = LOCATE.made_with(args.samples)
    names = (*LOCATE.FORMAT, "code")  # 02 compares them
    passed_on = {name: made[name] for name in names if name in made}
    with contextlib.closing(LOCATE.Output(path, settings, passed_on=passed_on)) as output:
        check_resumed(args, path, output.rows, rows)
        if len(output.rows) < len(rows):
            asyncio.run(score_all(args, reader, rows, output))
        count = Counter()
        for row in output.rows:
            if row["step_scores"] is None:
                count[f"not scored ({row['prm_reason'].partition(':')[0]})"] += 1
            else:
                count.update({"scored": 1, "tokens": row["prm_tokens"]})
        output.save_meta(finished=True, summary=count)
    counts = ", ".join(f"{name} {number}" for name, number in count.items())
    print(f"{path}: {len(rows)} rows, {counts}")
    if not any(row["step_scores"] for row in output.rows):
        stop(f"{path}: no row has scores; the first says: {output.rows[0]['prm_reason']}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
