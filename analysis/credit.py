"""Which tokens a tuned model rewards: beta (log pi - log pi_ref) over given solutions (SCDPO, arXiv
2407.00782, Eq. 7).

    python analysis/credit.py data/located.jsonl --models Qwen/Qwen2-7B-Instruct runs/stepdpo

Input: solutions with `problem`, `steps` and `error_step` (null where `correct`), as
02_locate_step.py writes them. OUT gets credit.html, each token coloured by its reward, and
credit.json, for each model:
    {"solutions": 90, "lowest_is_error": 41, "share": 0.46, "interval": [...], "chance": 0.31,
     "auc": 0.71, "auc_interval": [...]}

A step's reward is the mean over its tokens; steps after the first wrong one count as neither right
nor wrong."""

import importlib
import json
import sys
import time
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
import tyro
from report import render, to_html
from tqdm import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
LOCATE = importlib.import_module("02_locate_step")
EVAL = importlib.import_module("05_eval")


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
    rows = LOCATE.read_rows(args.file, ("problem", "steps"))
    made = LOCATE.made_with(args.file)
    rows = [{"opening": made["opening"], **row} if "opening" in made else row for row in rows]
    for number, row in enumerate(rows, 1):
        steps, error_step = row["steps"], row.get("error_step")
        if not isinstance(steps, list) or error_step not in (None, *range(1, len(steps) + 1)):
            LOCATE.stop(
                f"{args.file}, line {number}: steps must be a list of texts, error_step the number "
                "of one, or null"
            )
    rows = [row for row in rows if row.get("error_step") or row.get("correct")][: args.limit]
    if not rows:
        LOCATE.stop(
            f"{args.file}: no row has an error_step or is correct; "
            "give the file of 02_locate_step.py"
        )
    return rows


def encode_solution(row: dict, tokenizer) -> tuple[list[int], list[int], list[str]]:
    """Token ids of prompt and solution, for each the number of its step from 1 (0 for the prompt
    and the forced opening), and its text, from where it begins to where the next one does: a token
    may be half a character."""
    response = "".join(row["steps"])
    opening = row.get("opening", LOCATE.OPENING if response.startswith(LOCATE.OPENING) else "")
    text = LOCATE.render_prompt(tokenizer, row["problem"], opening)
    prefix = tokenizer(text, add_special_tokens=False)["input_ids"]
    sampled = response[len(opening) :]
    # together, as 04 does: alone, SentencePiece would put a space before it
    whole = tokenizer(text + sampled, add_special_tokens=False, return_offsets_mapping=True)
    ids, skip, place = whole["input_ids"], len(prefix), len(text)
    if ids[:skip] != prefix:  # a token spans the boundary
        whole = tokenizer(sampled, add_special_tokens=False, return_offsets_mapping=True)
        ids, skip, place = whole["input_ids"], 0, 0
    starts = [start - place for start, _ in whole["offset_mapping"][skip:]]
    texts = [sampled[a:b] for a, b in pairwise([*starts, len(sampled)])]
    ends = list(accumulate(map(len, row["steps"])))
    places = []
    for start in starts:
        before = sum(end <= start + len(opening) for end in ends)
        places.append(min(len(ends), 1 + before))
    return prefix + ids[skip:], [0] * len(prefix) + places, [""] * len(prefix) + texts


def load_model(model: str):
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    except (OSError, ValueError) as error:
        LOCATE.stop(f"--models {model}: cannot be loaded ({str(error).splitlines()[0]})")


def log_probabilities(lm, encoded: list[tuple]) -> list[np.ndarray]:
    """For each solution the log-probability of each token given those before, (tokens,); 0 for the
    first."""
    lengths = [len(ids) for ids, _, _ in encoded]
    order = sorted(range(len(encoded)), key=lambda i: -lengths[i])
    logps = [None] * len(encoded)
    most_tokens = min(2**28 // lm.config.vocab_size, 2**14)  # at most 1 GiB of fp32 logits
    bar = tqdm(total=len(encoded), desc=lm.name_or_path[-30:], mininterval=1)
    with bar, torch.inference_mode():
        while order:
            longest = lengths[order[0]]
            size = max(1, most_tokens // longest)
            batch, order = order[:size], order[size:]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for line, i in enumerate(batch):
                ids[line, : lengths[i]] = torch.tensor(encoded[i][0])
                mask[line, : lengths[i]] = 1
            ids, mask = ids.to(lm.device), mask.to(lm.device)
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
            logits = logits[:, :-1].float().log_softmax(-1)
            of_tokens = logits.gather(2, ids[:, 1:, None])[..., 0].cpu().numpy()
            for line, i in enumerate(batch):
                logps[i] = np.concatenate([[0.0], of_tokens[line, : lengths[i] - 1]])
            bar.update(len(batch))
    return logps


def auc(wrong: np.ndarray, right: np.ndarray) -> float:
    """Chance that a wrong step has a lower reward than a right one; ties count half (Mann and
    Whitney)."""
    right = np.sort(right)
    below = np.searchsorted(right, wrong, "left")
    below_or_equal = np.searchsorted(right, wrong, "right")
    above = len(right) - (below + below_or_equal) / 2
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
    labelled, sides = [], []
    for row, values in zip(rows, steps, strict=True):
        k = row.get("error_step")
        if k and len(values) > 1:
            labelled.append((k, values))
        wrong, right = (values[k - 1 : k], values[: k - 1]) if k else (values[:0], values)
        sides.append((wrong[np.isfinite(wrong)], right[np.isfinite(right)]))
    hits = sum(int(np.argmin(values)) == k - 1 for k, values in labelled)
    summary = {
        "solutions": len(labelled),
        "lowest_is_error": hits,
        "share": hits / max(1, len(labelled)),
        "interval": EVAL.wilson(hits, max(1, len(labelled))),
        "chance": None,
        "auc": None,
        "auc_interval": None,
    }
    if not labelled or not any(len(right) for _, right in sides):
        return summary

    def pooled(picks) -> float:
        return auc(*(np.concatenate([sides[i][side] for i in picks]) for side in (0, 1)))

    rng = np.random.default_rng(seed)
    draws = [pooled(rng.integers(len(sides), size=len(sides))) for _ in range(1000)]
    summary["chance"] = float(np.mean([1 / len(values) for _, values in labelled]))
    summary["auc"] = pooled(range(len(sides)))
    summary["auc_interval"] = np.nanpercentile(draws, [2.5, 97.5]).tolist()
    return summary


def heat_map(
    row: dict, tokens: list[str], places: list[int], rewards: dict[str, np.ndarray], scale: float
) -> str:
    """One solution as HTML: a column a model, the background of each token its reward, the value on
    hover."""
    columns, error_step = [], row.get("error_step")
    for model, values in rewards.items():
        spans = []
        for token, place, value in zip(tokens, places, values, strict=True):
            if place:
                depth = min(1.0, abs(value) / scale)
                color = f"rgba({'200,40,40' if value < 0 else '40,90,200'},{depth:.2f})"
                kind = "class=error " if place == error_step else ""
                spans.append(
                    f'<span {kind}style="background:{color}" '
                    f'title="{value:+.4f}, step {place}">{escape(token)}</span>'
                )
        columns.append(f"<div><b>{escape(model)}</b>\n{''.join(spans)}</div>")
    label = ""
    if error_step:
        label = f": first wrong step {error_step}"
    elif "error_step" in row:
        label = ": no step labelled wrong"
    name, answer = escape(str(row.get("id", ""))), escape(str(row.get("answer", "")))
    return (
        f"<h3>{name}{label}</h3><p>{to_html(row['problem'])} Answer: {answer}</p>"
        f'<div class="two">{"".join(columns)}</div>'
    )


def scale_of(rewards: list[np.ndarray], encoded: list[tuple]) -> float:
    """The size of a token's reward that gets the full colour; only 2 % are larger."""
    of_solutions = [
        values[np.array(places) > 0]
        for values, (_, places, _) in zip(rewards, encoded, strict=True)
    ]
    return float(np.percentile(abs(np.concatenate(of_solutions)), 98)) or 1.0


def cells_of(figures: dict) -> list[str]:
    if figures["auc"] is None:
        return ["–"] * 3
    low, high = figures["auc_interval"]
    return [
        EVAL.percentage(figures["share"], figures["interval"]),
        EVAL.percentage(figures["chance"]),
        f"{figures['auc']:.3f} ({low:.3f} to {high:.3f})",
    ]


def main(args: Args):
    if len(args.models) < 2:
        LOCATE.stop("--models needs two models or more: --models REFERENCE TUNED [TUNED ...]")
    rows, began = load_solutions(args), time.time()
    tokenizer = LOCATE.load_tokenizer(args.models[0], args.chat_template, args.chat_template_kwargs)
    made = LOCATE.made_with(args.file)
    if "prompt" in made:
        prompt = LOCATE.render_prompt(tokenizer, LOCATE.PROBE, made["opening"])
        if prompt != made["prompt"]:
            changed = LOCATE.difference("prompt", made["prompt"], prompt)
            LOCATE.stop(f"{args.file} was made with {changed}; give its --chat-template")
    encoded = [encode_solution(row, tokenizer) for row in rows]
    reference = log_probabilities(load_model(args.models[0]), encoded)
    rewards, summary, lines = {}, {}, []
    for model in args.models[1:]:
        logps = log_probabilities(load_model(model), encoded)
        rewards[model] = [
            args.beta * (new - old) for new, old in zip(logps, reference, strict=True)
        ]
        steps = [
            step_rewards(row, places, values)
            for row, (_, places, _), values in zip(rows, encoded, rewards[model], strict=True)
        ]
        summary[model] = figures(rows, steps, args.seed)
        lines.append([model, *cells_of(summary[model])])
    head = ["model", "lowest step is the labelled one", "by chance"]
    head.append("AUC, wrong against right steps")
    scale = scale_of(sum(rewards.values(), []), encoded * len(rewards))
    about = (
        f"Token rewards β(log π − log π_ref), β = {args.beta}, reference {args.models[0]}, "
        f"{len(rows)} solutions of {args.file}. Full red is −{scale:.3g} or less, white 0, full "
        f"blue +{scale:.3g} or more; hover shows the value. The labelled first wrong step is "
        "underlined. A step's reward is the mean over its tokens; steps after the first wrong one "
        "count as neither right nor wrong."
    )
    maps = []
    for i, (row, (_, places, texts)) in enumerate(zip(rows[: args.show], encoded, strict=False)):
        by_model = {model: values[i] for model, values in rewards.items()}
        maps.append(heat_map(row, texts, places, by_model, scale))
    args.out.mkdir(parents=True, exist_ok=True)
    tables = [("", head, lines, "")]
    page = render(title="Credit assignment", about=about, tables=tables, more="\n".join(maps))
    (args.out / "credit.html").write_text(page, encoding="utf-8")
    (args.out / "credit.json").write_text(json.dumps(summary, indent=1) + "\n")
    ruler = ["---", "---:", "---:", "---:"]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruler, *lines))
    print(
        f"{about}\n\n{table}\n\n{args.out / 'credit.html'}: {len(maps)} solutions drawn, "
        f"{time.time() - began:.1f} s"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
