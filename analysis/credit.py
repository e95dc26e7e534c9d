"""Which tokens a tuned model rewards: beta (log pi - log pi_ref) over given solutions (SCDPO, arXiv
2407.00782, Eq. 7).

    python analysis/credit.py data/located.jsonl --models Qwen/Qwen2-7B-Instruct runs/stepdpo --out results/credit

Input: solutions with `problem`, `steps` and `error_step` (null where `correct`), as
02_locate_step.py writes them. OUT gets credit.html, each token coloured by its reward, and
credit.json, for each model:
    {"solutions": 90, "lowest_is_error": 41, "share": 0.46, "interval": [...], "chance": 0.31,
     "auc": 0.71, "auc_interval": [...]}

A step's reward is the mean over its tokens; steps behind the first wrong one count as neither right
nor wrong."""

import importlib
import json
import sys
import time
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import tyro
from report import render, to_html
from tqdm import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
SAMPLE, EVAL = importlib.import_module("01_sample_errors"), importlib.import_module("05_eval")


@dataclass
class Args:
    file: tyro.conf.Positional[Path]
    """solutions with steps and error_step"""
    models: tuple[str, ...]
    """folders or hub ids: the reference, then one or more tuned models"""
    out: Path = Path("results/credit")
    """folder to write"""
    beta: float = 0.4
    """of the rewards"""
    show: int = 20
    """solutions to draw"""
    limit: int | None = None
    """use the first so many solutions"""
    chat_template: Path | None = None
    """Jinja file to use instead of the model's own chat template"""
    chat_template_kwargs: str = "{}"
    """switches of the chat template, as JSON"""
    seed: int = 0
    """of the bootstrap"""


def load_solutions(args: Args) -> list[dict]:
    rows = SAMPLE.read_rows(args.file, ("problem", "steps"))
    for number, row in enumerate(rows, 1):
        if not isinstance(row["steps"], list) or row.get("error_step") not in (
            None,
            *range(1, len(row["steps"]) + 1),
        ):
            SAMPLE.stop(
                f"{args.file}, line {number}: steps must be a list of texts, error_step the number of one, or null"
            )
    rows = [row for row in rows if row.get("error_step") or row.get("correct")][: args.limit]
    return rows or SAMPLE.stop(
        f"{args.file}: no row has an error_step or is correct; give the file of 02_locate_step.py"
    )


def encode_solution(row: dict, tokenizer) -> tuple[list[int], list[int], list[str]]:
    """Token ids of prompt and solution, for each the number of its step from 1 (0 for the prompt
    and the forced opening), and its text, from where it begins to where the next one does: a token
    may be half a character."""
    response = "".join(row["steps"])
    opening = row.get("opening", SAMPLE.OPENING if response.startswith(SAMPLE.OPENING) else "")
    text = SAMPLE.render_prompt(tokenizer, row["problem"], opening)
    prefix = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampled = response[len(opening) :]
    rest = tokenizer(sampled, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in rest["offset_mapping"]]
    texts = [sampled[a:b] for a, b in zip(starts, [*starts[1:], len(sampled)], strict=True)]
    ends = list(accumulate(map(len, row["steps"])))
    places = [
        min(len(ends), 1 + sum(end <= start + len(opening) for end in ends)) for start in starts
    ]
    return prefix + rest["input_ids"], [0] * len(prefix) + places, [""] * len(prefix) + texts


def load_model(model: str):
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        SAMPLE.stop(f"--models {model}: cannot be loaded ({str(error).splitlines()[0]})")


def log_probabilities(lm, encoded: list[tuple]) -> list[np.ndarray]:
    """For each solution the log-probability of each token given those before, (tokens,); 0 for the
    first."""
    device = lm.device
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    found, bar = (
        [None] * len(encoded),
        tqdm(total=len(encoded), desc=lm.name_or_path[-30:], mininterval=1),
    )
    with bar, torch.inference_mode():
        while order:
            longest = len(encoded[order[0]][0])
            batch = order[
                : max(1, min(2**28 // lm.config.vocab_size, 2**14) // longest)
            ]  # at most 1 GiB of fp32 logits
            order = order[len(batch) :]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, i in enumerate(batch):
                ids[place, : len(encoded[i][0])], mask[place, : len(encoded[i][0])] = (
                    torch.tensor(encoded[i][0]),
                    1,
                )
            logits = (
                lm(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
                .logits[:, :-1]
                .float()
            )
            logps = (
                logits.log_softmax(-1).gather(2, ids[:, 1:, None].to(device))[..., 0].cpu().numpy()
            )
            for place, i in enumerate(batch):
                found[i] = np.concatenate([[0.0], logps[place, : len(encoded[i][0]) - 1]])
            bar.update(len(batch))
    return found


def auc(wrong: np.ndarray, right: np.ndarray) -> float:
    """Chance that a wrong step has a lower reward than a right one; ties count half (Mann and
    Whitney)."""
    right = np.sort(right)
    above = (
        len(right)
        - (np.searchsorted(right, wrong, "left") + np.searchsorted(right, wrong, "right")) / 2
    )
    return float(above.mean() / len(right))


def step_rewards(row: dict, places: list[int], values: np.ndarray) -> np.ndarray:
    """Mean reward of each step, (steps,); infinite for a step without a token, which is not the
    lowest then."""
    sums = np.bincount(places, weights=values, minlength=len(row["steps"]) + 1)[1:]
    counts = np.bincount(places, minlength=len(row["steps"]) + 1)[1:]
    return sums / np.maximum(1, counts) + np.where(counts, 0, np.inf)


def figures(rows: list[dict], steps: list[np.ndarray], seed: int) -> dict:
    """How often the lowest step is the labelled one, and the AUC of wrong against right steps;
    intervals over solutions."""
    errors = [row.get("error_step") for row in rows]
    labelled = [
        (k, values) for k, values in zip(errors, steps, strict=True) if k and len(values) > 1
    ]
    sides = [
        (values[k - 1 : k] if k else values[:0], values[: k - 1] if k else values)
        for k, values in zip(errors, steps, strict=True)
    ]
    sides = [(wrong[np.isfinite(wrong)], right[np.isfinite(right)]) for wrong, right in sides]
    hits = sum(int(np.argmin(values)) == k - 1 for k, values in labelled)
    found = {
        "solutions": len(labelled),
        "lowest_is_error": hits,
        "share": hits / max(1, len(labelled)),
        "interval": EVAL.wilson(hits, max(1, len(labelled))),
        "chance": None,
        "auc": None,
        "auc_interval": None,
    }
    if not labelled or not any(len(right) for _, right in sides):
        return found

    def pooled(picks) -> float:
        return auc(*(np.concatenate([sides[i][side] for i in picks]) for side in (0, 1)))

    rng = np.random.default_rng(seed)
    draws = [pooled(rng.integers(len(sides), size=len(sides))) for _ in range(1000)]
    return found | {
        "chance": float(np.mean([1 / len(values) for _, values in labelled])),
        "auc": pooled(range(len(sides))),
        "auc_interval": np.nanpercentile(draws, [2.5, 97.5]).tolist(),
    }


def heat_map(
    row: dict, tokens: list[str], places: list[int], rewards: dict[str, np.ndarray], scale: float
) -> str:
    """One solution as HTML: a column a model, the background of each token its reward, the value on
    hover."""
    columns, wrong = [], row.get("error_step")
    for model, values in rewards.items():
        spans = []
        for token, place, value in zip(tokens, places, values, strict=True):
            if place:
                red, depth = value < 0, min(1.0, abs(value) / scale)
                color = f"rgba({'200,40,40' if red else '40,90,200'},{depth:.2f})"
                spans.append(
                    f'<span {"class=error " if place == wrong else ""}style="background:{color}" '
                    f'title="{value:+.4f}, step {place}">{escape(token)}</span>'
                )
        columns.append(f"<div><b>{escape(model)}</b>\n{''.join(spans)}</div>")
    label = (
        f": first wrong step {wrong}"
        if wrong
        else ": no step labelled wrong" * ("error_step" in row)
    )
    return (
        f"<h3>{escape(str(row.get('id', '')))}{label}</h3><p>{to_html(row['problem'])} Answer: "
        f'{escape(str(row.get("answer", "")))}</p><div class="two">{"".join(columns)}</div>'
    )


def main(args: Args):
    if len(args.models) < 2:
        SAMPLE.stop("--models needs two models or more: --models REFERENCE TUNED [TUNED ...]")
    rows, began = load_solutions(args), time.time()
    tokenizer = SAMPLE.load_tokenizer(args.models[0], args.chat_template, args.chat_template_kwargs)
    encoded = [encode_solution(row, tokenizer) for row in rows]
    reference, rewards, found, lines = (
        log_probabilities(load_model(args.models[0]), encoded),
        {},
        {},
        [],
    )
    for model in args.models[1:]:
        logps = log_probabilities(load_model(model), encoded)
        rewards[model] = [
            args.beta * (new - old) for new, old in zip(logps, reference, strict=True)
        ]
        steps = [
            step_rewards(row, places, values)
            for row, (_, places, _), values in zip(rows, encoded, rewards[model], strict=True)
        ]
        f = found[model] = figures(rows, steps, args.seed)
        cells = ["–"] * 3
        if f["auc"] is not None:
            cells = [EVAL.percent(f["share"], f["interval"]), EVAL.percent(f["chance"])]
            cells.append("{:.3f} ({:.3f} to {:.3f})".format(f["auc"], *f["auc_interval"]))
        lines.append([model, *cells])
    head = [
        "model",
        "lowest step is the labelled one",
        "by chance",
        "AUC, wrong against right steps",
    ]
    every = np.concatenate(
        [
            values[np.array(places) > 0]
            for model in rewards
            for values, (_, places, _) in zip(rewards[model], encoded, strict=True)
        ]
    )
    scale = float(np.percentile(abs(every), 98)) or 1.0
    about = (
        f"Token rewards β(log π − log π_ref), β = {args.beta}, reference {args.models[0]}, {len(rows)} solutions of "
        f"{args.file}. Full red is −{scale:.3g} or less, white 0, full blue +{scale:.3g} or more; hover shows the "
        "value. The labelled first wrong step is underlined. A step's reward is the mean over its tokens; steps behind "
        "the first wrong one count as neither right nor wrong."
    )
    maps = [
        heat_map(row, words, places, {model: values[i] for model, values in rewards.items()}, scale)
        for i, (row, (_, places, words)) in enumerate(zip(rows[: args.show], encoded, strict=False))
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    page = render(
        title="Credit assignment", about=about, tables=[("", head, lines, "")], more="\n".join(maps)
    )
    (args.out / "credit.html").write_text(page, encoding="utf-8")
    (args.out / "credit.json").write_text(json.dumps(found, indent=1) + "\n")
    table = "\n".join(
        f"| {' | '.join(cells)} |" for cells in [head, ["---", "---:", "---:", "---:"], *lines]
    )
    print(
        f"{about}\n\n{table}\n\n{args.out / 'credit.html'}: {len(maps)} solutions drawn, {time.time() - began:.1f} s"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
