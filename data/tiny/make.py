"""Make the bundled world: word problems with known truth, a tokenizer, and a small model trained on
them.

    python data/tiny/make.py                                   # all of it, as committed; docs/world.md has the minutes
    python data/tiny/make.py --only problems                   # the three problem files alone, seconds
    python data/tiny/make.py --out /tmp/big --hidden 512 --layers 8 --steps 6000   # a larger model, on a GPU
    python data/tiny/make.py --only problems --out runs/hard --operations 5 6 --levels 3   # a harder world for the same model
    python data/tiny/make.py --format lines --start data/tiny/model --steps 80 --lr 1e-3 --out runs/lines  # MetaMath's manner
    python data/tiny/make.py --format code --start data/tiny/model --steps 200 --lr 1e-3 --out runs/code  # code that is run

Output in --out (default: this folder):
    train.jsonl, validation.jsonl, test.jsonl    {"id": "tiny-test-0", "problem": "Ava has ...", "answer": "59",
                                                  "solution": "Let's think step by step.\\nStep 1: ...", "level": 2,
                                                  "values": [41, 59]}      # values: the result of each step
    model/                                       a Hugging Face folder (Qwen2 architecture, bf16 safetensors)

A problem is a short story about one running count. Levels differ in how large the numbers get; the
number of steps is uniform over 2 to 6 at every level. Each step of the reference solution holds one
equation, so the first wrong step of any solution can be found by arithmetic: compare its k-th
result with values[k-1].

The three files are right. The text that the model learns from is like what people write: in six of
ten subtractions that need it the borrow is forgotten (SLIPS), and the solution goes on from the
wrong number. So the model knows how the step is done, and mostly does it otherwise: what preference
training is for. The model is trained by 04_train_stepdpo.py --objective sft, as a user would."""

import hashlib
import json
import operator
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

OPENING = "Let's think step by step.\nStep 1:"
USER_TURN = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {
    "Ava": "she",
    "Mia": "she",
    "Zoe": "she",
    "Lena": "she",
    "Nora": "she",
    "Ruth": "she",
    "Ines": "she",
    "Kim": "she",
    "Ben": "he",
    "Tom": "he",
    "Raj": "he",
    "Leo": "he",
    "Omar": "he",
    "Finn": "he",
    "Karl": "he",
    "Wei": "he",
}
THINGS = [
    "apples",
    "pears",
    "stickers",
    "marbles",
    "shells",
    "coins",
    "stamps",
    "cards",
    "beads",
    "pencils",
    "books",
    "eggs",
    "nuts",
    "buttons",
]
FRIENDS = ["a friend", "a cousin", "a neighbor", "a sister", "a brother"]
PACKS = ["bags", "boxes", "jars", "packs", "baskets"]
LEVELS = {
    1: 15,
    2: 30,
    3: 60,
}  # level -> largest number in the story; sums and products may reach three times that
SLIPS = 0.6  # how often the text that the model learns from forgets a borrow
EXACT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass
class Args:
    out: Path = Path(__file__).parent
    """folder to write to"""
    format: Literal["labels", "lines", "code"] = "labels"
    """solutions with labels "Step 2:"; a line a step and "The answer is:", behind MetaMath's
    prompt; or text and code blocks"""
    start: Path | None = None
    """model to begin from, instead of random weights"""
    work: Path = Path("runs/tiny")
    """folder for the model's training text, its random start and 04's output; the same command goes
    on there after a stop"""
    only: Literal["all", "problems", "model"] = "all"
    """make the problem files, the tokenizer and model, or both"""
    seed: int = 0
    """seed of problems, initial weights and training order"""
    hidden: int = 192
    """width of the model; the MLP is 8/3 of it, attention heads have 32 dimensions"""
    layers: int = 4
    """number of layers"""
    vocab: int = 512
    """tokens in the byte-level BPE vocabulary"""
    operations: tuple[int, int] = (2, 6)
    """fewest and most steps of a problem"""
    levels: tuple[int, ...] = (1, 2, 3)
    """levels that occur; see LEVELS"""
    steps: int = 1200
    """optimizer steps"""
    batch: int = 64
    """examples a step, all different, never from the three files"""
    lr: float = 2e-3
    """peak learning rate (AdamW, cosine to zero, 5 % warm-up)"""
    log_steps: int = 50
    """print the training loss every so many steps"""


# -------------------------------------------------------------------------------------------------
# problems


# A step is (lead, operand, sign, operand); an operand is a number, "count" (what the person has by
# then) or "last" (the result of the step before). c is the true count.


def gain(r, c, hi):
    n = r.randint(2, hi)
    text = r.choice(
        ["finds {n} more", "buys {n} more", "picks up {n} more", "gets {n} more from {f}"]
    )
    return text.format(n=n, f=r.choice(FRIENDS)), [("{who} now has", "count", "+", n)]


def lose(r, c, hi):
    if c < 6:
        return None
    n = r.randint(2, min(hi, c - 2))
    text = r.choice(
        ["loses {n} of them", "gives {n} of them to {f}", "sells {n} of them", "drops {n} of them"]
    )
    return text.format(n=n, f=r.choice(FRIENDS)), [("{who} now has", "count", "-", n)]


def packs(r, c, hi):
    k, m = r.randint(2, 9), r.randint(3, max(4, hi // 6))
    pack = r.choice(PACKS)
    steps = [(f"The {k} {pack} hold", m, "*", k), ("{who} now has", "count", "+", "last")]
    return f"buys {k} {pack} with {m} {{things}} in each", steps


def times(r, c, hi):
    k = r.choice([2, 2, 3])
    word = {2: "twice", 3: "three times"}[k]
    return f"trades all of them for {word} as many", [("{who} now has", "count", "*", k)]


def half(r, c, hi):
    if c % 2 or c < 8:
        return None
    return f"gives half of them to {r.choice(FRIENDS)}", [("{who} now has", "count", "/", 2)]


def share(r, c, hi):
    ks = [k for k in range(3, 10) if c % k == 0 and c // k > 2]
    if not ks:
        return None
    k = r.choice(ks)
    return f"puts them into {k} equal piles and keeps one pile", [
        ("Each pile has", "count", "/", k)
    ]


def lose_packs(r, c, hi):
    fits = [(k, m) for k in range(2, 10) for m in range(3, max(4, hi // 6)) if k * m < c - 2]
    if not fits:
        return None
    k, m = r.choice(fits)
    steps = [(f"The {k} friends get", m, "*", k), ("{who} now has", "count", "-", "last")]
    return f"gives {m} {{things}} to each of {k} friends", steps


def together(r, c, hi, who, other):
    n = r.randint(2, hi)
    more = c <= n + 2 or r.random() < 0.5
    story = f"{other} has {n} {'more' if more else 'fewer'} {{things}} than {who} has now."
    steps = [
        (f"{other} has", "count", "+" if more else "-", n),
        ("Together they have", "count", "+", "last"),
    ]
    return story, f"How many {{things}} do {who} and {other} have together?", steps


def sale(r, c, hi, who, other):
    p = r.randint(2, 9)
    return (
        f"Then {who} sells all of them for {p} dollars each.",
        f"How many dollars does {who} get?",
        [("{who} gets", "count", "*", p)],
    )


def plain(r, c, hi, who, other):
    return (
        "",
        r.choice(
            [
                f"How many {{things}} does {who} have now?",
                f"How many {{things}} are left for {who}?",
            ]
        ),
        [],
    )


EVENTS = [gain, gain, lose, lose, packs, lose_packs, times, half, share, share]
ENDINGS = [plain, plain, together, sale]


def buggy(a: int, b: int) -> int:
    """a - b of someone who takes the smaller digit from the larger instead of borrowing: the
    commonest procedural bug of pupils (Brown and Burton, Cognitive Science 2, 1978). Never less
    than a - b, so that two of them do not cancel."""
    pairs = zip(reversed(str(a)), reversed(str(b).zfill(len(str(a)))), strict=True)
    return sum(abs(int(x) - int(y)) * 10**place for place, (x, y) in enumerate(pairs))


def work_out(
    steps: list[tuple], count: int, slips: random.Random | None = None, form: str = "labels"
) -> list[tuple]:
    """Steps as (lead, number, sign, number, result); with `slips` the results of someone who
    sometimes slips. Code borrows right: there, who slips adds where a borrow is needed."""
    worked, last = [], 0
    for lead, a, op, b in steps:
        a, b = ({"count": count, "last": last}.get(x, x) for x in (a, b))
        slip = op == "-" and slips and slips.random() < SLIPS and buggy(a, b) != a - b
        op = "+" if slip and form == "code" else op
        last = buggy(a, b) if slip and form != "code" else EXACT[op](a, b)
        count = last if lead in ("{who} now has", "Each pile has") else count
        worked.append((lead, a, op, b, last))
    return worked


def write_solution(lines: list[str], answer: int, form: str) -> str:
    if form == "code":
        return f"{''.join(lines)}<|text|>The answer is \\boxed{{{answer}}}.<|endofblock|>"
    if form == "lines":
        # on the same line: behind the opening's full stop a line break would be one token with it,
        # which no prompt can end in
        return (
            " Let's think step by step."
            + "\n".join(lines).replace("\n ", "\n")
            + f"\nThe answer is: {answer}"
        )
    steps = "".join(f"\nStep {i}:{line}" for i, line in enumerate(lines, 1)).removeprefix(
        "\nStep 1:"
    )
    return f"{OPENING}{steps}\nThe answer is \\boxed{{{answer}}}."


def make_problem(
    r: random.Random, level: int, n_steps: int, slips: random.Random | None, form: str
) -> dict:
    """One problem of exactly n_steps equations. Draws again until the numbers fit. With `slips` its
    solution has some."""
    hi = LEVELS[level]
    while True:
        who, other = r.sample(sorted(NAMES), 2)
        things = r.choice(THINGS)
        count = first = r.randint(max(5, hi // 8), hi)
        story, steps = [f"{who} has {count} {things}."], []
        ending = r.choice(ENDINGS)
        need = n_steps - {plain: 0, together: 2, sale: 1}[ending]
        while len(steps) < need:
            event = r.choice(EVENTS)
            made = event(r, count, hi)
            if made is None or len(steps) + len(made[1]) > need:
                break
            text, more = made
            link = r.choice(["Then {p}", "Next {p}", "{P}", "After that {p}"])
            p = NAMES[who]
            story.append(f"{link.format(p=p, P=p.capitalize())} {text}.")
            steps += more
            count = work_out(steps, first)[-1][-1]
        if len(steps) != need:
            continue
        story_end, question, last = ending(r, count, hi, who, other)
        steps += last
        values = [step[-1] for step in work_out(steps, first)]
        if max(values) > 3 * hi or min(values) < 2:
            continue
        if r.random() < 0.4:  # a number that does not matter
            extra = r.choice(
                ["{x} is {n} years old.", "The shop is {n} miles away.", "{x} also has {n} {t}."]
            )
            place = (
                len(story) if "also" in extra else r.randint(1, len(story))
            )  # "them" must stay unambiguous
            extra = extra.format(
                x=who, n=r.randint(5, 60), t=r.choice([t for t in THINGS if t != things])
            )
            story.insert(place, extra)
        text = (
            " ".join([*story, story_end, question]).replace("  ", " ").replace("{things}", things)
        )
        lines, nouns = [], [things] * (len(steps) - 1) + ["dollars" if ending is sale else things]
        worked = work_out(steps, first, slips, form)
        for (lead, a, op, b, result), noun in zip(worked, nouns, strict=True):
            line = f" {lead.format(who=who)} {a} {op} {b} = {result} {noun}."
            if form == "code":
                line = f"<|text|>{lead.format(who=who)}:<|endofblock|><|code|>{a} {op.replace('/', '//')} {b}<|endofblock|>"
                line += f"<|execution|>{result}<|endofblock|>"
            lines.append(line)
        solution = write_solution(lines, worked[-1][-1], form)
        return {
            "problem": text,
            "answer": str(values[-1]),
            "solution": solution,
            "level": level,
            "values": values,
        }


def draw(r: random.Random, args: Args, slips: random.Random | None = None) -> dict:
    return make_problem(r, r.choice(args.levels), r.randint(*args.operations), slips, args.format)


def make_files(args: Args):
    """Write the three problem files; no problem stands in two of them or twice in one."""
    seen = set()
    for number, (split, size) in enumerate([("train", 5000), ("validation", 1000), ("test", 2000)]):
        r = random.Random(f"{args.seed}-{split}")
        with open(args.out / f"{split}.jsonl", "w", encoding="utf-8") as f:
            while size:
                row = draw(r, args)
                if row["problem"] in seen:
                    continue
                seen.add(row["problem"])
                size -= 1
                index = len(seen) - 1 - [0, 5000, 6000][number]
                f.write(json.dumps({"id": f"tiny-{split}-{index}", **row}) + "\n")


# -------------------------------------------------------------------------------------------------
# tokenizer and model


def make_tokenizer(args: Args) -> PreTrainedTokenizerFast:
    """Byte-level BPE, a token for every single digit, with or without a space before it; ChatML
    turns.

    transformers gives every model of type qwen2 the splitting of Qwen2, whatever its tokenizer.json
    says; that one parts a digit from the space before it. So " 1" to " 9", learnt with a splitting
    that allows them, become added tokens, which are matched before any splitting: one token instead
    of two for the start of a number, in every loader."""
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    learning = r"(?i:'s|'t)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(learning), "isolated"), byte_level]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab, special_tokens=special, initial_alphabet=alphabet
    )
    r = random.Random(f"{args.seed}-tokenizer")
    tokenizer.train_from_iterator([render(draw(r, args)) for _ in range(4000)], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), byte_level]
    )
    data = json.loads(tokenizer.to_str())
    for digit in "123456789":  # no number begins with 0
        data["model"]["vocab"][" " + digit] = data["model"]["vocab"].pop("\u0120" + digit)
        data["model"]["merges"].remove(["\u0120", digit])
        data["added_tokens"].append(
            {
                "id": data["model"]["vocab"][" " + digit],
                "content": " " + digit,
                "special": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        )
    data["added_tokens"].sort(key=lambda token: token["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def render(row: dict) -> str:
    return f"<|im_start|>user\n{USER_TURN.format(**row)}<|im_end|>\n<|im_start|>assistant\n{row['solution']}<|im_end|>"


def make_corpus(args: Args, path: Path):
    """Write what the model learns from: args.steps * args.batch fresh problems with slips, none
    from the three files."""
    files = [args.out / f"{name}.jsonl" for name in ("train", "validation", "test")]
    known = {json.loads(line)["problem"] for path in files for line in open(path)}
    r, wanted = random.Random(f"{args.seed}-training"), args.steps * args.batch
    with open(path, "w", encoding="utf-8") as file:
        while wanted:
            row = draw(r, args, r)
            if row["problem"] not in known:
                file.write(
                    json.dumps({"problem": row["problem"], "solution": row["solution"]}) + "\n"
                )
                wanted -= 1


def make_model(args: Args, work: Path):
    """Random weights, or those of --start, and the tokenizer in work/start; 04's supervised stage
    makes work/model of them."""
    tokenizer = AutoTokenizer.from_pretrained(args.start) if args.start else make_tokenizer(args)
    if args.format == "lines":
        tokenizer.chat_template = (
            Path(__file__).parents[1] / "templates" / "metamath.jinja"
        ).read_text()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=args.hidden // 32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    model = Qwen2ForCausalLM.from_pretrained(args.start) if args.start else Qwen2ForCausalLM(config)
    model = model.to(torch.bfloat16)
    model.save_pretrained(work / "start")
    tokenizer.save_pretrained(work / "start")
    loaded, sample = (
        AutoTokenizer.from_pretrained(work / "start"),
        render(draw(random.Random(args.seed), args)),
    )
    assert loaded(sample)["input_ids"] == tokenizer(sample)["input_ids"], (
        "the tokenizer loads as another one"
    )
    if args.format == "code":
        script = Path(__file__).parents[2] / "analysis" / "add_block_tokens.py"
        subprocess.run(
            [
                sys.executable,
                str(script),
                "--model",
                str(work / "start"),
                "--out",
                str(work / "start"),
            ],
            check=True,
        )
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    make_corpus(args, work / "corpus.jsonl")
    trainer = [
        sys.executable,
        str(Path(__file__).parents[2] / "04_train_stepdpo.py"),
        "--objective",
        "sft",
        "--epochs",
        "1",
    ]
    trainer += [
        "--data",
        str(work / "corpus.jsonl"),
        "--model",
        str(work / "start"),
        "--out",
        str(work / "model"),
    ]
    trainer += [
        "--batch-size",
        str(args.batch),
        "--lr",
        str(args.lr),
        "--weight-decay",
        "0.1",
        "--warmup",
        "0.05",
    ]
    trainer += [
        "--tokens-per-batch",
        "4096",
        "--seed",
        str(args.seed),
        "--keep",
        "1",
        "--log-steps",
        str(args.log_steps),
    ]
    subprocess.run(trainer, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    shutil.copytree(
        work / "start", args.out / "model", dirs_exist_ok=True
    )  # tokenizer and configuration
    shutil.copy(work / "model" / "model.safetensors", args.out / "model")
    digest = hashlib.sha256((args.out / "model" / "model.safetensors").read_bytes()).hexdigest()
    print(
        f"wrote {args.out / 'model'} (sha256 of the weights {digest[:16]}); the training's figures are in {work / 'model'}"
    )


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "model":
        make_files(args)
    if args.only != "problems":
        (args.out / "model").mkdir(exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
        make_model(args, args.work)
