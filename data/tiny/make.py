"""Make the bundled world: word problems with known truth, a tokenizer, and a small model trained on
them.

    python data/tiny/make.py                    # all of it, as committed; docs/world.md: minutes
    python data/tiny/make.py --only problems    # only the three problem files, seconds

A larger model, on a GPU; harder problems for the same model; MetaMath's format; code that is run:
    python data/tiny/make.py --out runs/big --hidden 512 --layers 8 --steps 6000
    python data/tiny/make.py --only problems --out runs/hard --operations 5 6 --levels 3
    python data/tiny/make.py --format lines --start data/tiny/model --steps 80 --lr 1e-3 \\
        --out runs/lines --work runs/lines/work
    python data/tiny/make.py --format code --start data/tiny/model --steps 200 --lr 1e-3 \\
        --out runs/code --work runs/code/work

Output in --out (default: this folder): model/, a Hugging Face folder (Qwen2 architecture, bf16
safetensors), and train.jsonl, validation.jsonl, test.jsonl, where `values` has the result of each
step:
    {"id": "tiny-test-0", "problem": "Ava has ...", "answer": "59",
     "solution": "Let's think step by step.\\nStep 1: ...", "level": 2, "values": [41, 59]}

A problem is a short story about one running count. Levels differ in how large the numbers get; the
number of steps is uniform over 2 to 6 at every level. Each step of the reference solution holds one
equation, so the first wrong step of any solution can be found by arithmetic: compare its k-th
result with values[k-1].

The three files are right. The text that the model learns from is like what people write: in six of
ten subtractions that need it the borrow is forgotten (SLIPS), and the solution continues from the
wrong number. So the model knows how the step is done, but usually does it wrong, which is what
preference training can correct. The model is trained by 04_train_stepdpo.py --objective sft, as a
user would do it."""

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
ROOT = Path(__file__).parents[2]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PRONOUNS = {
    **dict.fromkeys(["Ava", "Mia", "Zoe", "Lena", "Nora", "Ruth", "Ines", "Kim"], "she"),
    **dict.fromkeys(["Ben", "Tom", "Raj", "Leo", "Omar", "Finn", "Karl", "Wei"], "he"),
}
THINGS = ["apples", "pears", "stickers", "marbles", "shells", "coins", "stamps"]
THINGS += ["cards", "beads", "pencils", "books", "eggs", "nuts", "buttons"]
FRIENDS = ["a friend", "a cousin", "a neighbor", "a sister", "a brother"]
PACKS = ["bags", "boxes", "jars", "packs", "baskets"]
# level -> largest number in the story; sums and products may reach three times that
LEVELS = {1: 15, 2: 30, 3: 60}
SLIPS = 0.6  # how often the text that the model learns from forgets a borrow
EXACT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass
class Args:
    out: Path = Path(__file__).parent
    """folder to write to"""
    format: Literal["labels", "lines", "code"] = "labels"
    """solutions with labels "Step 2:"; a line a step and "The answer is:", after MetaMath's
    prompt; or text and code blocks"""
    start: Path | None = None
    """model to begin from, instead of random weights"""
    work: Path = Path("runs/tiny")
    """folder for the model's training text, its random start and 04's output; after a stop the
    same command resumes there"""
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
# then) or "last" (the result of the step before). c is the true count, hi the largest number.


def gain(r, c, hi):
    n = r.randint(2, hi)
    texts = ["finds {n} more", "buys {n} more", "picks up {n} more", "gets {n} more from {f}"]
    text = r.choice(texts)
    return text.format(n=n, f=r.choice(FRIENDS)), [("{who} now has", "count", "+", n)]


def lose(r, c, hi):
    if c < 6:
        return None
    n = r.randint(2, min(hi, c - 2))
    texts = [
        "loses {n} of them",
        "gives {n} of them to {f}",
        "sells {n} of them",
        "drops {n} of them",
    ]
    text = r.choice(texts)
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
    steps = [("Each pile has", "count", "/", k)]
    return f"puts them into {k} equal piles and keeps one pile", steps


def lose_packs(r, c, hi):
    numbers = [(k, m) for k in range(2, 10) for m in range(3, max(4, hi // 6)) if k * m < c - 2]
    if not numbers:
        return None
    k, m = r.choice(numbers)
    steps = [(f"The {k} friends get", m, "*", k), ("{who} now has", "count", "-", "last")]
    return f"gives {m} {{things}} to each of {k} friends", steps


def together(r, c, hi, who, other):
    n = r.randint(2, hi)
    word, sign = ("more", "+") if c <= n + 2 or r.random() < 0.5 else ("fewer", "-")
    story = f"{other} has {n} {word} {{things}} than {who} has now."
    steps = [(f"{other} has", "count", sign, n), ("Together they have", "count", "+", "last")]
    return story, f"How many {{things}} do {who} and {other} have together?", steps


def sale(r, c, hi, who, other):
    p = r.randint(2, 9)
    story = f"Then {who} sells all of them for {p} dollars each."
    return story, f"How many dollars does {who} get?", [("{who} gets", "count", "*", p)]


def plain(r, c, hi, who, other):
    questions = ["does {who} have now?", "are left for {who}?"]
    return "", "How many {things} " + r.choice(questions).format(who=who), []


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
    sometimes slips. Python subtracts correctly, so in code the slip is an addition instead."""
    worked, last = [], 0
    for lead, a, op, b in steps:
        named = {"count": count, "last": last}
        a, b = named.get(a, a), named.get(b, b)
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
        # The first step stands on the opening's line: a line break after its full stop would be one
        # token with it, and no prompt can end within a token.
        steps = "\n".join(lines).replace("\n ", "\n")
        return f" Let's think step by step.{steps}\nThe answer is: {answer}"
    steps = "".join(f"\nStep {number}:{line}" for number, line in enumerate(lines[1:], 2))
    return f"{OPENING}{lines[0]}{steps}\nThe answer is \\boxed{{{answer}}}."


def write_step(step: tuple, who: str, noun: str, form: str) -> str:
    lead, a, op, b, result = step
    lead = lead.format(who=who)
    if form == "code":
        code = f"{a} {op.replace('/', '//')} {b}"
        blocks = (("text", f"{lead}:"), ("code", code), ("execution", result))
        return "".join(f"<|{kind}|>{text}<|endofblock|>" for kind, text in blocks)
    return f" {lead} {a} {op} {b} = {result} {noun}."


def make_problem(
    r: random.Random, level: int, n_steps: int, slips: random.Random | None, form: str
) -> dict:
    """One problem of exactly n_steps equations. Draws again until the numbers fit. With `slips` its
    solution has some."""
    hi = LEVELS[level]
    while True:
        who, other = r.sample(sorted(PRONOUNS), 2)
        things = r.choice(THINGS)
        count = first = r.randint(max(5, hi // 8), hi)
        story, steps = [f"{who} has {count} {things}."], []
        ending = r.choice(ENDINGS)
        need = n_steps - {plain: 0, together: 2, sale: 1}[ending]
        while len(steps) < need:
            event = r.choice(EVENTS)
            text, event_steps = event(r, count, hi) or (None, [])
            if text is None or len(steps) + len(event_steps) > need:
                break
            link = r.choice(["Then {p}", "Next {p}", "{P}", "After that {p}"])
            p = PRONOUNS[who]
            story.append(f"{link.format(p=p, P=p.capitalize())} {text}.")
            steps += event_steps
            count = work_out(steps, first)[-1][-1]
        if len(steps) != need:
            continue
        story_end, question, last_steps = ending(r, count, hi, who, other)
        steps += last_steps
        values = [step[-1] for step in work_out(steps, first)]
        if max(values) > 3 * hi or min(values) < 2:
            continue
        if r.random() < 0.4:
            distract(r, story, who, things)
        text = " ".join([*story, story_end, question]).replace("  ", " ")
        nouns = [things] * (len(steps) - 1) + ["dollars" if ending is sale else things]
        worked = work_out(steps, first, slips, form)
        lines = [
            write_step(step, who, noun, form) for step, noun in zip(worked, nouns, strict=True)
        ]
        return {
            "problem": text.replace("{things}", things),
            "answer": str(values[-1]),
            "solution": write_solution(lines, worked[-1][-1], form),
            "level": level,
            "values": values,
        }


def distract(r: random.Random, story: list[str], who: str, things: str):
    """Put a sentence with a number that does not matter into the story."""
    sentences = ["{x} is {n} years old.", "The shop is {n} miles away.", "{x} also has {n} {t}."]
    sentence = r.choice(sentences)
    # other things come last: "them" must stay unambiguous
    place = len(story) if "also" in sentence else r.randint(1, len(story))
    n = r.randint(5, 60)
    other_things = r.choice([t for t in THINGS if t != things])
    story.insert(place, sentence.format(x=who, n=n, t=other_things))


def draw(r: random.Random, args: Args, slips: random.Random | None = None) -> dict:
    return make_problem(r, r.choice(args.levels), r.randint(*args.operations), slips, args.format)


def make_files(args: Args):
    """Write the three problem files; no problem stands in two of them or twice in one."""
    seen = set()
    for split, size in (("train", 5000), ("validation", 1000), ("test", 2000)):
        r = random.Random(f"{args.seed}-{split}")
        with open(args.out / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for index in range(size):
                while (row := draw(r, args))["problem"] in seen:
                    pass
                seen.add(row["problem"])
                file.write(json.dumps({"id": f"tiny-{split}-{index}", **row}) + "\n")


# -------------------------------------------------------------------------------------------------
# tokenizer and model


def make_tokenizer(args: Args) -> PreTrainedTokenizerFast:
    """Byte-level BPE, a token for every single digit, with or without a space before it; ChatML
    turns.

    transformers gives every model of type qwen2 the splitting of Qwen2, whatever its tokenizer.json
    says; that one parts a digit from the space before it. So " 1" to " 9", learnt with a splitting
    that allows them, become added tokens, which are matched before any splitting: one token instead
    of two for the start of a number, in every loader."""
    other = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    qwen2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{other}"
    learning = rf"(?i:'s|'t)| ?\p{{L}}+| ?\p{{N}}|{other}"

    def splitting(pattern: str):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = splitting(learning)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab, special_tokens=special, initial_alphabet=alphabet
    )
    r = random.Random(f"{args.seed}-tokenizer")
    tokenizer.train_from_iterator([render(draw(r, args)) for _ in range(4000)], trainer)
    tokenizer.pre_tokenizer = splitting(qwen2)
    data = json.loads(tokenizer.to_str())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    flags = ("special", "single_word", "lstrip", "rstrip", "normalized")
    for digit in "123456789":  # no number begins with 0
        token = " " + digit
        vocab[token] = vocab.pop("\u0120" + digit)
        merges.remove(["\u0120", digit])
        added = {"id": vocab[token], "content": token, **dict.fromkeys(flags, False)}
        data["added_tokens"].append(added)
    data["added_tokens"].sort(key=lambda token: token["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def render(row: dict) -> str:
    question = f"<|im_start|>user\n{USER_TURN.format(**row)}<|im_end|>\n"
    return f"{question}<|im_start|>assistant\n{row['solution']}<|im_end|>"


def make_corpus(args: Args, path: Path):
    """Write what the model learns from: args.steps * args.batch fresh problems with slips, none
    from the three files."""
    files = [args.out / f"{name}.jsonl" for name in ("train", "validation", "test")]
    problems = {json.loads(line)["problem"] for name in files for line in open(name)}
    r = random.Random(f"{args.seed}-training")
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(args.steps * args.batch):
            while (row := draw(r, args, r))["problem"] in problems:
                pass
            example = {"problem": row["problem"], "solution": row["solution"]}
            file.write(json.dumps(example) + "\n")


def run(script: str, **options):
    command = [sys.executable, str(ROOT / script)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    if subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode:
        sys.exit(2)


def make_model(args: Args, work: Path):
    """Random weights, or those of --start, and the tokenizer in work/start; 04's supervised stage
    makes work/model of them."""
    tokenizer = AutoTokenizer.from_pretrained(args.start) if args.start else make_tokenizer(args)
    if args.format == "lines":
        template = ROOT / "data" / "templates" / "metamath.jinja"
        tokenizer.chat_template = template.read_text()
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
    start, trained = work / "start", work / "model"
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    loaded = AutoTokenizer.from_pretrained(start)
    sample = render(draw(random.Random(args.seed), args))
    same_ids = loaded(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    assert same_ids, "the saved tokenizer gives other ids when it is loaded"
    if args.format == "code":
        run("analysis/add_block_tokens.py", model=start, out=start)
        tokenizer = AutoTokenizer.from_pretrained(start)
        model = Qwen2ForCausalLM.from_pretrained(start)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    make_corpus(args, work / "corpus.jsonl")
    run(
        "04_train_stepdpo.py",
        objective="sft",
        data=work / "corpus.jsonl",
        model=start,
        out=trained,
        epochs=1,
        batch_size=args.batch,
        lr=args.lr,
        weight_decay=0.1,
        warmup=0.05,
        tokens_per_batch=4096,
        seed=args.seed,
        keep=1,
        log_steps=args.log_steps,
    )
    out = args.out / "model"
    shutil.copytree(start, out, dirs_exist_ok=True)  # tokenizer and configuration
    shutil.copy(trained / "model.safetensors", out)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    print(f"wrote {out} (sha256 of the weights {digest[:16]})")
    print(f"the metrics of the training are in {trained}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only != "model":
        make_files(args)
    if args.only != "problems":
        (args.out / "model").mkdir(exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
        make_model(args, args.work)
