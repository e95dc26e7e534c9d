"""Completions of Qwen2 models behind an OpenAI-compatible server, on a machine that has torch but
no vLLM.

    python experiments/torch_server.py --models FOLDER [FOLDER ...] --port 8000 --seats 2048
    python 01_sample_errors.py --base-url http://127.0.0.1:8000/v1 --model FOLDER \\
        --concurrency 2048 ...

A folder is read at its first request; until then it need not exist. Requests of one model are
computed together, each with a slot of the key-value cache; another model's wait until these are
done. One token of all running rows is a step; the ids of BURST steps come back together, while the
next steps run already, so that a row may run for some steps after its end."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import resource
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from aiohttp import web
from safetensors.torch import load_file
from tokenizers import Tokenizer

BURST = 4
STEP_OF_LENGTH = 64  # the cache is read up to a multiple of this
HEAD_ROWS = 512  # rows whose logits are there at a time: 152,000 x 512 x 4 bytes are 0.3 GB
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, *range(512, 8193, 256))  # rows of a CUDA graph


@dataclass
class Request:
    model: str
    prompt: list[int]
    n: int
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: list[str]
    keep_stop: bool
    skip_special: bool
    answer: asyncio.Future
    choices: list[dict] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """One of the n samples of a request. `launched`: tokens that the device was asked for; `ids`:
    those that came back."""

    request: Request
    number: int
    limit: int
    ids: list[int] = field(default_factory=list)
    launched: int = 0
    looked_at: int = 0  # tokens in which no stop string is
    done: bool = False


class Model:
    """Weights of a Qwen2 model, and what its forward pass needs besides."""

    def __init__(self, folder: str, device: str, dtype: torch.dtype, max_len: int):
        config = json.loads((Path(folder) / "config.json").read_text())
        if config["model_type"] != "qwen2":
            raise ValueError(f"{folder} is a {config['model_type']} model, not qwen2")
        weights = {
            name: tensor
            for path in Path(folder).glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }

        def get(name):
            return weights[name].to(device, dtype)

        def join(*names):
            return torch.cat([get(name) for name in names])

        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads
        self.layers, self.epsilon = [], config["rms_norm_eps"]
        for number in range(config["num_hidden_layers"]):
            at = f"model.layers.{number}."
            parts = [f"{at}self_attn.{part}_proj" for part in "qkv"]
            self.layers.append(
                {
                    "norm": get(at + "input_layernorm.weight"),
                    "qkv": join(*(part + ".weight" for part in parts)),
                    "bias": join(*(part + ".bias" for part in parts)),
                    "out": get(at + "self_attn.o_proj.weight"),
                    "mlp_norm": get(at + "post_attention_layernorm.weight"),
                    "up": join(at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight"),
                    "down": get(at + "mlp.down_proj.weight"),
                }
            )
        self.embedding, self.norm = get("model.embed_tokens.weight"), get("model.norm.weight")
        self.head = get("lm_head.weight") if "lm_head.weight" in weights else self.embedding
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        frequencies = theta ** -(torch.arange(0, self.size, 2) / self.size)
        angles = torch.outer(torch.arange(max_len), frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        path = Path(folder) / "generation_config.json"
        ends = (json.loads(path.read_text()) if path.exists() else config).get("eos_token_id")
        self.ends = ends if isinstance(ends, list) else [ends]
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.shape = (len(self.layers), self.groups, self.size)

    def forward(self, ids, places, attend):
        """Last hidden states of ids (..., tokens) at these places. `attend(layer, q, k, v)` with q
        (..., tokens, heads, d)."""
        x = F.embedding(ids, self.embedding)
        # (..., tokens, 1, d)
        cos = self.cos[places].unsqueeze(-2)
        sin = self.sin[places].unsqueeze(-2)

        def rotate(t):
            first, second = t.chunk(2, -1)
            return t * cos + torch.cat((-second, first), -1) * sin

        for number, layer in enumerate(self.layers):
            h = F.rms_norm(x, x.shape[-1:], layer["norm"], self.epsilon)
            h = F.linear(h, layer["qkv"], layer["bias"])
            h = h.unflatten(-1, (-1, self.size))
            v = h[..., self.heads + self.groups :, :]
            qk = rotate(h[..., : self.heads + self.groups, :])
            h = attend(number, qk[..., : self.heads, :], qk[..., self.heads :, :], v)
            x = x + F.linear(h.flatten(-2), layer["out"])
            h = F.linear(F.rms_norm(x, x.shape[-1:], layer["mlp_norm"], self.epsilon), layer["up"])
            gate, up = h.chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.rms_norm(x, x.shape[-1:], self.norm, self.epsilon)

    def next_tokens(self, hidden, heat, top_p, chance, greedy: bool, nucleus: bool):
        """A token for each row. `greedy`: all rows are; `nucleus`: some have top_p below 1."""
        tokens = []
        for start in range(0, len(hidden), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            logits = F.linear(hidden[rows], self.head)
            best = logits.argmax(-1)
            if not greedy:
                p = (logits.float() / heat[rows, None].clamp(min=1e-5)).softmax(-1)
                if nucleus:
                    drawn = draw_nucleus(p, top_p[rows], chance[rows])
                else:
                    drawn = draw(p, chance[rows])
                best = torch.where(heat[rows] < 1e-5, best, drawn)
            tokens.append(best)
        return torch.cat(tokens)


def draw(p, chance):
    """Inverse of the distribution function at `chance`: first the block of 128 tokens, then the
    token in it."""
    missing = -p.shape[1] % 128
    blocks = (F.pad(p, (0, missing)) if missing else p).unflatten(-1, (-1, 128))
    until = blocks.sum(-1).cumsum(-1)
    target = chance[:, None] * until[:, -1:]
    block = torch.searchsorted(until, target, right=True).clamp(max=until.shape[1] - 1)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, 128)).squeeze(1).cumsum(-1)
    rest = target - F.pad(until, (1, 0)).gather(1, block)
    rest = rest.minimum(inside[:, -1:] * (1 - 1e-6))
    token = torch.searchsorted(inside, rest, right=True).clamp(max=127)
    return (block * 128 + token).squeeze(1)


def draw_nucleus(p, top_p, chance):
    p, order = p.sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p > top_p[:, None], 0.0)
    return order.gather(1, draw(p, chance)[:, None]).squeeze(1)


class Engine(threading.Thread):
    """Computes requests; rows 0 to len(self.rows) - 1 of the cache are live. No call waits for the
    device but receive()."""

    def __init__(self, args):
        super().__init__(daemon=True)
        self.args, self.incoming, self.waiting = args, queue.SimpleQueue(), deque()
        self.models, self.model, self.rows, self.in_flight, self.graphs = {}, None, [], deque(), {}
        self.shape, self.device, self.dtype = None, args.device, getattr(torch, args.dtype)

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(args.seats, *shape, dtype=dtype, device=self.device)

        # of each row: its last token, how many tokens it has, temperature, top_p, a random number
        # for each place
        self.state = {
            "last": zeros(dtype=torch.long),
            "length": zeros(dtype=torch.long) + 1,
            "heat": zeros(),
            "top_p": zeros() + 1,
            "chance": zeros(args.max_len),
        }
        self.index = torch.arange(args.seats, device=self.device)
        self.places = torch.arange(args.max_len, device=self.device)
        self.tokens, self.steps, self.decode_attention = 0, 0, None
        if args.triton:
            from decode_attention import decode_attention

            self.decode_attention = decode_attention

    def model_of(self, name: str) -> Model:
        if name not in self.models:
            self.models[name] = Model(name, self.device, self.dtype, self.args.max_len)
        return self.models[name]

    @torch.inference_mode()
    def run(self):
        try:
            while True:
                self.fetch_requests()
                self.seat()
                if self.rows:
                    self.burst()
                while len(self.in_flight) > bool(self.rows):
                    self.receive()
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def fetch_requests(self):
        while not self.incoming.empty() or not (self.rows or self.waiting or self.in_flight):
            request = self.incoming.get()
            try:
                self.model_of(request.model)
                self.waiting.append(request)
            except Exception as error:
                self.reply(request, error)

    def up(self, values, dtype):
        """To the device without waiting for it."""
        tensor = torch.as_tensor(values, dtype=dtype)
        if self.device != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def seat(self):
        """Rows that are done leave, requests that fit are seated, and the rows stay without
        gaps."""
        running = [
            slot for slot, row in enumerate(self.rows) if not row.done and row.launched < row.limit
        ]
        if self.waiting and not running and self.model is not self.models[self.waiting[0].model]:
            self.change_model(self.models[self.waiting[0].model])
        new, live = [], len(running)
        while self.waiting and self.models[self.waiting[0].model] is self.model:
            if live + self.waiting[0].n > self.args.seats:
                break
            new.append(self.waiting.popleft())
            live += new[-1].n
        free = sorted({*range(live)} - {*running})
        late = [slot for slot in running if slot >= live]
        if late:
            self.move(late, free[: len(late)])
        self.rows = self.rows[:live] + [None] * (live - len(self.rows))
        if new:
            self.prefill(new, free[len(late) :])

    def move(self, late: list[int], free: list[int]):
        longest = max(self.length_of(self.rows[slot]) for slot in late)
        source, target = self.up([late, free], torch.long)
        for cache in self.cache:
            cache[target, :, :longest] = cache[source, :, :longest]
        for tensor in self.state.values():
            tensor[target] = tensor[source]
        for slot, other in zip(late, free, strict=True):
            self.rows[other] = self.rows[slot]

    def length_of(self, row: Row) -> int:
        return min(len(row.request.prompt) + row.launched, self.args.max_len)

    def change_model(self, model: Model):
        while self.in_flight:
            self.receive()
        self.model, self.graphs = model, {}
        if self.shape != model.shape:
            self.shape, self.cache = model.shape, []
            layers, groups, size = model.shape
            shape = (self.args.seats, groups, self.args.max_len, size)
            self.cache = [
                torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2 * layers)
            ]

    def prefill(self, new: list[Request], slots: list[int]):
        """Prompts in batches of like lengths; the first token of each of their samples."""
        seats, work = iter(slots), []
        for request in new:
            work.append((request, [next(seats) for _ in range(request.n)]))
        work.sort(key=lambda item: len(item[0].prompt))
        while work:
            longest = -(-len(work[-1][0].prompt) // 16) * 16
            size = max(1, self.args.prefill_tokens // longest)
            self.prefill_batch(work[-size:], min(longest, self.args.max_len))
            del work[-size:]

    def prefill_batch(self, work: list[tuple[Request, list[int]]], longest: int):
        rows, source, target = [], [], []
        chance = np.zeros((sum(len(slots) for _, slots in work), self.args.max_len), np.float32)
        for i, (request, slots) in enumerate(work):
            length = len(request.prompt)
            limit = min(request.max_tokens, self.args.max_len - length)
            for number, slot in enumerate(slots):
                numbers = np.random.default_rng((request.seed, number)).random(limit, np.float32)
                chance[len(rows), length : length + limit] = numbers
                rows.append(Row(request, number, limit, launched=1))
                self.rows[slot] = rows[-1]
                source.append(i)
                target.append(slot)
        ids = np.zeros((len(work), longest), np.int64)
        for i, (request, _) in enumerate(work):
            ids[i, : len(request.prompt)] = request.prompt
        ids, source, target = (self.up(values, torch.long) for values in (ids, source, target))
        length = self.up([len(row.request.prompt) for row in rows], torch.long)
        values = {
            "heat": [row.request.temperature for row in rows],
            "top_p": [row.request.top_p for row in rows],
            "chance": chance,
        }
        values = {name: self.up(numbers, torch.float32) for name, numbers in values.items()}
        for name, numbers in values.items():
            self.state[name][target] = numbers

        def attend(number, q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (prompts, heads, tokens, d)
            for cache, t in ((self.cache[2 * number], k), (self.cache[2 * number + 1], v)):
                cache[target, :, :longest] = t[source]
            k, v = (t.repeat_interleave(self.model.heads // self.model.groups, 1) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        hidden = self.model.forward(ids, self.places[:longest], attend)[source, length - 1]
        chance = values["chance"].gather(1, length[:, None]).squeeze(1)
        heat, top_p = values["heat"], values["top_p"]
        first = self.model.next_tokens(hidden, heat, top_p, chance, *self.kinds(rows))
        self.state["last"][target] = first
        self.state["length"][target] = (length + 1).clamp(max=self.args.max_len - 1)
        self.send(rows, first[None])

    def kinds(self, rows: list[Row]) -> tuple[bool, bool]:
        """Whether all are greedy; whether some have top_p below 1."""
        greedy = all(row.request.temperature < 1e-5 for row in rows)
        return greedy, any(row.request.top_p < 1 for row in rows)

    def burst(self):
        kinds, live, tokens = self.kinds(self.rows), len(self.rows), []
        longest = max(map(self.length_of, self.rows))
        steps = min(BURST, max(row.limit - row.launched for row in self.rows))
        for i in range(steps):
            until = min(-(-(longest + i) // STEP_OF_LENGTH) * STEP_OF_LENGTH, self.args.max_len)
            if self.decode_attention:  # the kernel stops at each row's end
                until = self.args.max_len
            size = next(size for size in (*SIZES, self.args.seats) if size >= live)
            graphs = self.args.graphs and not kinds[1]  # top-p sorts
            key = (min(size, self.args.seats) if graphs else live, until, *kinds)
            tokens.append((self.replay(key) if graphs else self.step(*key))[:live])
        for row in self.rows:
            row.launched += steps
        self.steps += steps
        if tokens:
            self.send(list(self.rows), torch.stack(tokens))

    def replay(self, key: tuple):
        """step() as a CUDA graph, from the second time on; rows after the live ones compute what is
        thrown away."""
        if key not in self.graphs:
            self.graphs[key] = None
            return self.step(*key)
        if not self.graphs[key]:
            graph = torch.cuda.CUDAGraph()
            pool = next((entry[0].pool() for entry in self.graphs.values() if entry), None)
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.graphs[key] = graph, self.step(*key)
        graph, tokens = self.graphs[key]
        graph.replay()
        return tokens.clone()

    def step(self, rows: int, longest: int, greedy: bool, nucleus: bool):
        """One token for each of the first rows, whose state moves on in place."""
        last, length, heat, top_p, chance = (tensor[:rows] for tensor in self.state.values())
        index, place = self.index[:rows], length - 1
        seen = (self.places[:longest] <= place[:, None])[:, None, None, :]  # (rows, 1, 1, places)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~seen, -torch.inf)
        model = self.model

        def attend(number, q, k, v):
            keys, values = self.cache[2 * number], self.cache[2 * number + 1]
            keys[index, :, place] = k
            values[index, :, place] = v
            if self.decode_attention:
                return self.decode_attention(q, keys, values, length)
            q = q.unflatten(1, (model.groups, -1))  # (rows, key heads, query heads of each, d)
            keys, values = keys[:rows, :, :longest], values[:rows, :, :longest]
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1, 2)

        hidden = model.forward(last, place, attend)
        chance = chance.gather(1, length[:, None]).squeeze(1)
        tokens = model.next_tokens(hidden, heat, top_p, chance, greedy, nucleus)
        last.copy_(tokens)
        length.copy_((length + 1).clamp(max=self.args.max_len - 1))
        return tokens

    def send(self, rows: list[Row], ids):
        """Starts the way back of ids (steps, rows)."""
        ids = ids.to("cpu", non_blocking=True)
        event = torch.cuda.Event() if self.device == "cuda" else None
        if event:
            event.record()
        self.in_flight.append((rows, ids, event))

    def receive(self):
        rows, ids, event = self.in_flight.popleft()
        if event:
            event.synchronize()
        ended = torch.isin(ids, torch.tensor(self.model.ends)).any(0).tolist()
        for row, new, end in zip(rows, ids.T.tolist(), ended, strict=True):
            if row.done:
                continue
            row.ids += new
            may_have_stop = row.request.stop and len(row.ids) - row.looked_at >= 8
            if end or len(row.ids) >= row.limit or may_have_stop:
                self.look_at(row, end)

    def look_at(self, row: Row, end: bool):
        """Whether a row is done: by a stop string, the end of the text or its limit, whichever
        comes first."""
        request, ids, ends = row.request, row.ids[: row.limit], self.model.ends
        if end:
            end = next((i for i, token in enumerate(ids) if token in ends), None)
            ids = ids if end is None else ids[: end + 1]
        reason = "stop" if ids[-1] in ends else "length" if len(ids) >= row.limit else None
        shown = len(ids) - (ids[-1] in ends and not request.keep_stop)

        def text(count):
            return self.model.tokenizer.decode(
                ids[:count], skip_special_tokens=request.skip_special
            )

        answer = text(shown) if reason or request.stop else ""
        if any(stop in answer for stop in request.stop):
            count = row.looked_at + 1
            while not any(stop in text(count) for stop in request.stop):
                count += 1
            answer, reason, ids = text(count), "stop", ids[:count]
            stop = next(stop for stop in request.stop if stop in answer)
            answer = answer[: answer.index(stop) + len(stop) * request.keep_stop]
        row.looked_at = len(ids)
        if reason:
            row.done = True
            self.tokens += len(ids)
            choice = {
                "index": row.number,
                "text": answer,
                "finish_reason": reason,
                "logprobs": None,
                "tokens": len(ids),
            }
            request.choices.append(choice)
            if len(request.choices) == request.n:
                self.reply(request, request.choices)

    def reply(self, request: Request, result):
        def tell():
            if not request.answer.done():
                request.answer.set_result(result)

        request.answer.get_loop().call_soon_threadsafe(tell)


def refuse(message: str, status: int = 400):
    error = {"message": message, "type": "BadRequestError", "code": status}
    return web.json_response({"error": error}, status=status)


class Server:
    def __init__(self, args):
        self.args, self.engine, self.encoders = args, Engine(args), {}

    async def start(self, _):
        self.task = asyncio.create_task(self.report())

    async def models(self, _):
        models = [{"id": name, "object": "model"} for name in self.args.models]
        return web.json_response({"object": "list", "data": models})

    async def completions(self, http: web.Request):
        asked = await http.json()
        name, prompt, stop = asked.get("model"), asked["prompt"], asked.get("stop") or []
        if name not in self.args.models:
            return refuse(f"The model `{name}` does not exist.", 404)
        if isinstance(prompt, str):
            if name not in self.encoders:
                self.encoders[name] = Tokenizer.from_file(str(Path(name) / "tokenizer.json"))
            prompt = self.encoders[name].encode(prompt).ids
        if len(prompt) >= self.args.max_len:
            return refuse(
                f"This model's maximum context length is {self.args.max_len} tokens. However, your "
                f"prompt contains {len(prompt)} input tokens. "
                "Please reduce the length of the input prompt."
            )

        def get(key, default):
            return default if asked.get(key) is None else asked[key]

        request = Request(
            name,
            prompt,
            get("n", 1),
            get("seed", int.from_bytes(os.urandom(4))),
            get("temperature", 1.0),
            get("top_p", 1.0),
            get("max_tokens", 16),
            [stop] if isinstance(stop, str) else stop,
            get("include_stop_str_in_output", False),
            get("skip_special_tokens", True),
            asyncio.get_running_loop().create_future(),
        )
        if not prompt or not 1 <= request.n <= self.args.seats or request.max_tokens < 1:
            return refuse("an empty prompt, n or max_tokens that cannot be")
        self.engine.incoming.put(request)
        choices = await request.answer
        if isinstance(choices, Exception):
            return refuse(f"{name} cannot be loaded: {choices}", 404)
        tokens = sum(choice.pop("tokens") for choice in choices)
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": tokens,
            "total_tokens": len(prompt) + tokens,
        }
        completion = {
            "id": f"cmpl-{id(request)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "choices": sorted(choices, key=lambda choice: choice["index"]),
            "usage": usage,
        }
        return web.json_response(completion)

    async def report(self):
        engine = self.engine
        while True:
            tokens, steps = engine.tokens, engine.steps
            await asyncio.sleep(5)
            if engine.steps > steps:
                speed = (engine.tokens - tokens) / 5
                print(
                    f"{len(engine.rows)} rows, {len(engine.waiting)} wait, {speed:.0f} tokens/s of "
                    f"finished rows, {(engine.steps - steps) / 5:.1f} steps/s",
                    file=sys.stderr,
                    flush=True,
                )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seats", type=int, default=2048, help="rows computed at a time")
    parser.add_argument(
        "--max-len", type=int, default=1024, help="tokens of prompt and answer at most"
    )
    parser.add_argument(
        "--prefill-tokens", type=int, default=65536, help="tokens of prompts computed at a time"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--graphs", action="store_true", help="steps as CUDA graphs")
    parser.add_argument(
        "--triton",
        action="store_true",
        help="attention of a step by the kernel of decode_attention.py",
    )
    args = parser.parse_args()
    # each launch of a kernel gives the interpreter lock away, and would wait 5 ms for it
    sys.setswitchinterval(2e-5)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape
    server = Server(args)
    server.engine.start()
    app = web.Application(client_max_size=1 << 26)
    app.add_routes(
        [web.get("/v1/models", server.models), web.post("/v1/completions", server.completions)]
    )

    app.on_startup.append(server.start)
    web.run_app(app, host=args.host, port=args.port, backlog=4096, access_log=None, print=None)


if __name__ == "__main__":
    main()
