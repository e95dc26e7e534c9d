"""A page that shows base and tuned model side by side on a problem that you type.

    python analysis/demo.py --models Qwen/Qwen2-7B-Instruct runs/stepdpo
    python analysis/demo.py --models data/tiny/model runs/quickstart/model-0 \\
        --examples data/tiny/test.jsonl                                        # needs no GPU

Steps appear as they are generated. The final answer is highlighted, and marked right or wrong if
you give the true one. "Token rewards" colours each token of both answers by
beta (log pi - log pi_ref), as credit.py does. Both models are in this process, by transformers; the
page is for this machine's user alone, and solves one problem at a time."""

import asyncio
import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

import credit
import tyro
from transformers import TextIteratorStreamer

LOCATE = credit.LOCATE
SHOWN = """
.step { border-left: 3px solid #88a; padding: .1em .7em; margin: .4em 0; white-space: pre-wrap; }
.answer { font-weight: bold; padding: .3em .7em; background: #8882; border-radius: 4px;
  display: inline-block; }
.answer.right { background: #2a72; } .answer.wrong { background: #c332; }
.two { display: flex; gap: 1em; } .two > div { white-space: pre-wrap; font-family: monospace; }"""


@dataclass
class Args:
    models: tuple[str, str]
    """folders or hub ids: base and tuned"""
    examples: Path | None = None
    """file of problems; the first five are offered"""
    temperature: float = 0.0
    """0 is greedy"""
    max_tokens: int = 1024
    """longest answer, in tokens"""
    beta: float = 0.4
    """of the token rewards"""
    opening: str = LOCATE.OPENING
    """how every response begins"""
    split: Literal["labels", "lines", "blank-lines"] = "labels"
    """where a step ends"""
    chat_template: Path | None = None
    """Jinja file to use instead of the model's own chat template"""
    chat_template_kwargs: str = "{}"
    """switches of the chat template, as JSON"""
    host: str = "127.0.0.1"
    """address of the page; others than this machine's let everyone in"""
    port: int = 7861
    """port of the page"""


class Answer:
    """A model's answer, which grows in a thread of its own. `verdict`: "right", "wrong", or empty
    if there is no true answer or none was found; None before it is graded."""

    def __init__(self, lm, tokenizer, problem: str, args: Args):
        self.text, self.done, self.error, self.args = "", False, "", args
        self.verdict = None
        ids = LOCATE.prompt_ids(tokenizer, problem, args.opening)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = credit.torch.tensor([ids], device=lm.device)
        options = {
            "inputs": inputs,
            "attention_mask": inputs.new_ones(inputs.shape),
            "max_new_tokens": args.max_tokens,
            "streamer": streamer,
            "top_k": None,
            "top_p": None,
            "repetition_penalty": 1.0,
            "do_sample": bool(args.temperature),
        }
        if args.temperature:
            options["temperature"] = args.temperature
        threading.Thread(target=self.read, args=(streamer,), daemon=True).start()
        threading.Thread(target=self.write, args=(lm, options), daemon=True).start()

    def write(self, lm, options: dict):
        try:
            lm.generate(**options)
        except Exception as error:  # no memory, too long a problem ...
            self.error = f"{error.__class__.__name__}: {error}"
        finally:  # else the reader would wait for good
            options["streamer"].end()

    def read(self, streamer):
        for piece in streamer:
            self.text += piece
        self.done = True

    @property
    def steps(self) -> list[str]:
        return LOCATE.split_steps(self.args.opening + self.text, self.args.split, self.args.opening)

    @property
    def prediction(self) -> str | None:
        return LOCATE.answer_of(self.args.opening + self.text, self.args.split)

    def html(self) -> str:
        """Its steps, and its answer once it is graded."""
        parts = [f'<div class="step">{escape(step.strip())}</div>' for step in self.steps]
        if self.error:
            parts.append(f'<span class="answer wrong">{escape(self.error)}</span>')
        elif self.verdict is not None:
            shown = escape(self.prediction or "no answer found")
            parts.append(f'<span class="answer {self.verdict}">{shown} {self.verdict}</span>')
        return "".join(parts)


class Demo:
    """Both models, and what they answered last."""

    def __init__(self, args: Args):
        self.args, self.last = args, ("", [])
        self.models = [credit.load_model(name) for name in args.models]
        self.tokenizer = LOCATE.load_tokenizer(
            args.models[0], args.chat_template, args.chat_template_kwargs
        )
        self.busy = threading.Lock()
        self.grader = LOCATE.Grader()  # in processes with a time limit

    def solve(self, problem: str, gold: str):
        """Yields the HTML of both answers, until they are finished."""
        if not problem.strip():
            yield "Type a problem first.", ""
            return
        with self.busy:
            answers = [Answer(lm, self.tokenizer, problem, self.args) for lm in self.models]
            self.last = (problem, answers)
            while any(answer.verdict is None for answer in answers):
                time.sleep(0.1)
                yield tuple(answer.html() for answer in answers)
                if all(answer.done for answer in answers):
                    for answer in answers:
                        answer.verdict = self.grade(problem, gold, answer.prediction)
            yield tuple(answer.html() for answer in answers)

    def grade(self, problem: str, gold: str, prediction: str | None) -> str:
        if not gold or prediction is None:
            return ""
        return "right" if asyncio.run(self.grader(gold, prediction, problem)) else "wrong"

    def rewards(self) -> str:
        """The heat maps of both answers, by the tuned model against the base."""
        problem, answers = self.last
        if not answers or not all(answer.done for answer in answers):
            return "Nothing is solved yet."
        with self.busy:
            rows = [
                {
                    "problem": problem,
                    "steps": answer.steps,
                    "opening": self.args.opening,
                    "answer": answer.prediction,
                    "id": f"By {name}",
                }
                for name, answer in zip(self.args.models, answers, strict=True)
            ]
            encoded = [credit.encode_solution(row, self.tokenizer) for row in rows]
            old, new = (credit.log_probabilities(lm, encoded) for lm in self.models)
        rewards = [self.args.beta * (b - a) for a, b in zip(old, new, strict=True)]
        scale = credit.scale_of(rewards, encoded)
        parts = [f"<p>Full red is −{scale:.3g} or less, full blue +{scale:.3g} or more.</p>"]
        for row, (_, places, texts), values in zip(rows, encoded, rewards, strict=True):
            by_name = {"β(log π − log π_ref)": values}
            parts.append(credit.heat_map(row, texts, places, by_name, scale))
        return "".join(parts)


def make_page(gradio, demo: Demo, examples: list[dict]):
    base, tuned = demo.args.models
    with gradio.Blocks(title="Base and tuned", analytics_enabled=False) as page:
        problem = gradio.Textbox(label="Problem", lines=4, elem_id="problem")
        gold = gradio.Textbox(label="True answer, if you know it", elem_id="gold")
        with gradio.Row():
            go = gradio.Button("Solve", variant="primary", elem_id="solve")
            heat = gradio.Button("Token rewards", elem_id="rewards")
        if examples:
            gradio.Examples(
                [[row["problem"], str(row["answer"])] for row in examples], [problem, gold]
            )
        shown = []
        with gradio.Row():
            for kind, model in (("Base", base), ("Tuned", tuned)):
                with gradio.Column():
                    gradio.Markdown(f"**{kind}** `{model}`")
                    shown.append(gradio.HTML(elem_id=kind.lower()))
        maps = gradio.HTML(elem_id="maps")
        go.click(demo.solve, [problem, gold], shown)
        problem.submit(demo.solve, [problem, gold], shown)
        heat.click(demo.rewards, None, maps)
    return page


def main(args: Args):
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        LOCATE.stop("this page needs gradio: pip install gradio")
    examples = LOCATE.read_rows(args.examples, ("problem", "answer"))[:5] if args.examples else []
    demo = Demo(args)
    page = make_page(gradio, demo, examples)
    # no font from the network
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            quiet=True,
            theme=theme,
            css=SHOWN,
            show_error=True,
            prevent_thread_lock=True,
            footer_links=[],
        )
    except OSError as error:
        LOCATE.stop(f"--port {args.port}: {error}")
    print(f"open http://{args.host}:{args.port}; Ctrl-C ends", file=sys.stderr, flush=True)
    with contextlib.closing(demo.grader), contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
