"""Find the first wrong step by hand, on a page in the browser.

    python analysis/annotate.py --annotator ann     # data/samples.jsonl -> data/located.ann.jsonl

Input: the output of 01_sample_errors.py. Output: rows as 02_locate_step.py writes them, so that 03
makes pairs of them and locator_scores.py compares them:
    {"id": "q1", "sample": 0, "steps": ["...", "..."], "error_step": 2, "locator": "human",
     "reason": null, "annotator": "ann"}

Click on the step's number, or press it where there are fewer than ten; n: no error found, u:
unsure, s: skip, b: back. Each click is saved at once, and the same command run again resumes."""

import atexit
import contextlib
import importlib
import json
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from consensus import pass_on

sys.path.insert(0, str(Path(__file__).parents[1]))
LOCATE = importlib.import_module("02_locate_step")
KEYS = """<script>
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.matches("input, textarea")) return;
  // "1" would be taken for step 1 before "12" is written
  if ("0" <= event.key && event.key <= "9" && document.getElementById("step-10")) return;
  const name = {n: "none", u: "unsure", s: "skip", b: "back"}[event.key];
  document.getElementById(name || "step-" + event.key)?.click();
});
</script>"""


@dataclass
class Args:
    samples: Path = Path("data/samples.jsonl")
    """output of 01_sample_errors.py"""
    out: Path = Path("data/located.jsonl")
    """file to write, with the annotator's name in it"""
    annotator: str = ""
    """annotator's name; each has a file of their own"""
    max_per_problem: int | None = None
    """use the first so many wrong samples of a problem"""
    limit: int | None = None
    """use the first so many wrong samples, by id"""
    opening: str = LOCATE.OPENING
    """how every response begins; give what 01 was given"""
    split: Literal["labels", "lines", "blank-lines", "blocks"] = "labels"
    """where a step ends; give what 01 was given"""
    host: str = "127.0.0.1"
    """address of the page; others than this machine's let everyone in"""
    port: int = 7860
    """port of the page"""


def math_safe(text: str) -> str:
    """Markdown in which formulas stand between \\( and \\), and dollars that are money between
    nothing.

    Pandoc's rule: no space after the opening dollar nor before the closing one, no digit after
    the closing one."""
    formula = r"(\$\$.+?\$\$|\\\(.+?\\\)|\\\[.+?\\\]|\$(?![\s$])(?:[^$\n]*[^\s$\\])?\$(?!\d))"
    parts = re.split(formula, text, flags=re.S)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"\\boxed\{[^{}]*\}", lambda box: f"\\({box[0]}\\)", part)
            # single stars would be emphasis: 5*3*2
            part = re.sub(r"(?<!\*)\*(?!\*)|[$<]", lambda sign: f"&#{ord(sign[0])};", part)
        parts[i] = f"\\({part[1:-1]}\\)" if re.match(r"\$[^$]", part) else part
    return "".join(parts)


class Verdicts:
    """What was clicked, by row: the number of a step, "none", "unsure" or "skip". OUT.clicks.jsonl
    is the journal from which OUT is written at each click; rows of OUT that are not shown (with a
    smaller --limit) stay."""

    def __init__(self, rows: list[dict], out: Path, annotator: str):
        journal = out.with_suffix(".clicks.jsonl")
        if out.exists() and not journal.exists():
            LOCATE.stop(
                f"{out} is there, but not {journal}, from which the page would resume; "
                "give --annotator or another --out"
            )
        self.rows, self.out, self.annotator = rows, out, annotator
        settings = {"stage": "annotate", "locator": "human", "annotator": annotator}
        self.clicks = LOCATE.Output(journal, settings)
        atexit.register(self.clicks.close)  # without a click there is no file
        steps = {LOCATE.identity(row): row["steps"] for row in rows}
        self.said = {}
        for click in self.clicks.rows:
            key = LOCATE.identity(click)
            if key not in steps:
                continue
            if click.get("steps", steps[key]) != steps[key]:
                LOCATE.stop(
                    f"{journal} has clicks on another sample {key[1]} of {key[0]}; "
                    "give another --out"
                )
            self.said[key] = click["said"]
        old = LOCATE.read_rows(out, ("id", "sample")) if out.exists() and out.stat().st_size else []
        self.hidden = [row for row in old if LOCATE.identity(row) not in steps]
        if self.said:
            self.write()  # a kill may have come between a click and OUT

    def of(self, row: dict):
        return self.said.get(LOCATE.identity(row), "skip")

    def next_open(self, place: int) -> int:
        """The next row without a verdict, from `place` on and around; len(rows) when there is
        none."""
        for i in [*range(place, len(self.rows)), *range(place)]:
            if i != place - 1 and self.of(self.rows[i]) == "skip":
                return i
        return len(self.rows)

    def click(self, what, place: int) -> int:
        """Take a click on the row at `place`; returns which row is shown next."""
        if what == "back":
            return max(0, place - 1)
        row = self.rows[place]
        key = {name: row[name] for name in ("id", "sample", "steps")}
        self.clicks.write({**key, "said": what, "time": round(time.time())})
        self.said[LOCATE.identity(row)] = what
        self.write()
        return self.next_open(place + 1)

    def write(self):
        """OUT: the rows that it had and this run does not show, and those clicked."""
        reasons = {"none": f"{LOCATE.NO_ERROR} by hand", "unsure": "unsure"}
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.hidden]
        for row in self.rows:
            what = self.of(row)
            if what == "skip":
                continue
            located = {
                **row,
                "error_step": None if what in reasons else what,
                "locator": "human",
                "reason": reasons.get(what),
                "annotator": self.annotator,
            }
            lines.append(json.dumps(located, ensure_ascii=False) + "\n")
        LOCATE.save(self.out, "".join(lines))


def make_page(gradio, verdicts: Verdicts, args: Args):
    """The page, which shows one solution at a time."""
    rows = verdicts.rows
    who = f", {verdicts.annotator}" if verdicts.annotator else ""
    latex = [
        {"left": left, "right": right, "display": left != "\\("}
        for left, right in (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"))
    ]

    def show(text: str):
        gradio.Markdown(math_safe(text), latex_delimiters=latex, line_breaks=True)

    def show_row(row: dict, place):
        with gradio.Row():
            with gradio.Column(scale=2):
                show(
                    f"### Problem {row['id']}\n{row['problem']}\n\n"
                    f"**Answer:** {row.get('answer', 'not known')}\n\n"
                    f"**This solution's answer:** {row.get('prediction')}"
                )
                if row.get("solution"):
                    with gradio.Accordion("Reference solution", open=False):
                        show(row["solution"])
            with gradio.Column(scale=3):
                for k, step in enumerate(row["steps"], 1):
                    with gradio.Row(equal_height=True):
                        variant = "primary" if verdicts.of(row) == k else "secondary"
                        button = gradio.Button(
                            str(k), elem_id=f"step-{k}", variant=variant, scale=0, min_width=48
                        )
                        button.click(lambda at, k=k: verdicts.click(k, at), place, place)
                        text = LOCATE.cut_label(step, k, args.split, args.opening)[1]
                        show(text.strip())
        with gradio.Row():
            for text in ("No error found (n)", "Unsure (u)", "Skip (s)", "Back (b)"):
                what = text.split(" ")[0].lower().replace("no", "none")
                gradio.Button(text, elem_id=what).click(
                    lambda at, what=what: verdicts.click(what, at), place, place
                )

    with gradio.Blocks(title="First wrong step", analytics_enabled=False) as page:
        place = gradio.State(lambda: verdicts.next_open(0))  # at each load of the page

        @gradio.render(inputs=place)
        def solution(at: int):
            done = sum(what != "skip" for what in verdicts.said.values())
            gradio.Markdown(
                f"**{done} of {len(rows)}** done{who}. Which step is the first wrong one? "
                "Click its number, or press it where there are fewer than ten.",
                elem_id="progress",
            )
            if at < len(rows):
                return show_row(rows[at], place)
            gradio.Markdown(
                "All solutions were shown. Reload to see skipped ones. "
                f"The verdicts stand in `{verdicts.out}`.",
                elem_id="done",
            )
            gradio.Button("Back (b)", elem_id="back").click(lambda: len(rows) - 1, None, place)

    return page


def main(args: Args):
    where = LOCATE.Args(
        samples=args.samples,
        max_per_problem=args.max_per_problem,
        limit=args.limit,
        opening=args.opening,
        split=args.split,
    )
    rows, *_ = LOCATE.load_samples(where)
    name = f".{args.annotator}" if args.annotator else ""
    out = args.out.with_name(f"{args.out.stem}{name}{args.out.suffix}")
    verdicts = Verdicts(rows, out, args.annotator)
    pass_on(args.samples, out, "annotate")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        LOCATE.stop("this page needs gradio: pip install gradio")
    # no font from the network
    font = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        make_page(gradio, verdicts, args).launch(
            server_name=args.host,
            server_port=args.port,
            quiet=True,
            head=KEYS,
            theme=font,
            show_error=True,
            prevent_thread_lock=True,
            footer_links=[],
        )
    except OSError as error:
        LOCATE.stop(f"--port {args.port}: {error}")
    print(
        f"open http://{args.host}:{args.port}; each click is saved at once, Ctrl-C ends",
        file=sys.stderr,
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
    counts = Counter(
        "located" if isinstance(what, int) else what for what in verdicts.said.values()
    )
    verdicts.clicks.save_meta(finished=len(verdicts.said) == len(rows), summary=counts)
    said = [f"{len(rows)} solutions", *(f"{name} {number}" for name, number in counts.items())]
    print(f"{verdicts.out}: " + ", ".join(said))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
