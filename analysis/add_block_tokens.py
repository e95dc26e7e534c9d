"""Give a model the eight tokens of code-integrated solutions (Step-Controlled DPO, arXiv
2407.00782), before its SFT stage.

    python analysis/add_block_tokens.py --model mistralai/Mistral-7B-v0.1 --out runs/mistral_blocks
    accelerate launch 04_train_stepdpo.py --objective sft --model runs/mistral_blocks \\
        --data code_solutions.jsonl ...

Input: a folder or hub id. Output: a folder with the tokens <|system|> <|user|> <|assistant|>
<|text|> <|code|> <|execution|> <|endofblock|> <|endofmessage|>, whose embeddings are the mean of
the others', with <|endofmessage|> as the end of a text and data/templates/code.jinja as chat
template. Weights of the rest are unchanged."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SAMPLE = importlib.import_module("01_sample_errors")
NAMES = "system user assistant text code execution endofblock endofmessage"
TOKENS = [f"<|{name}|>" for name in NAMES.split()]


@dataclass
class Args:
    out: Path
    """folder to write"""
    model: str = "mistralai/Mistral-7B-v0.1"
    """folder or hub id"""


def main(args: Args):
    try:
        template = ROOT / "data" / "templates" / "code.jinja"
        tokenizer = SAMPLE.load_tokenizer(args.model, template, "{}")
        lm = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    except (OSError, ValueError) as error:
        SAMPLE.stop(f"--model {args.model}: cannot be loaded ({str(error).splitlines()[0]})")
    before = len(tokenizer)
    special = {"additional_special_tokens": TOKENS}
    added = tokenizer.add_special_tokens(special, replace_extra_special_tokens=False)
    tokenizer.eos_token = TOKENS[-1]
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # one weight where they are tied
    weights = {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}
    with torch.no_grad():
        for weight in weights:
            weight[before : len(tokenizer)] = weight[:before].float().mean(0).to(weight.dtype)
    lm.config.eos_token_id = lm.generation_config.eos_token_id = tokenizer.eos_token_id
    lm.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {added} tokens added, {len(tokenizer)} in all")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\nInput")[0]))
