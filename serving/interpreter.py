"""Run the code blocks of code-integrated solutions: a kernel of its own for each solution, in a
sandbox (bubblewrap).

    # code_server.py starts it; by hand:
    echo '{"id": "q1", "code": "a = 3 + 4\\na"}' | python serving/interpreter.py

Input, a line a block; names are kept from block to block of one id, until a line with "code": null
ends its kernel (send a block of an id after the answer to its last one):
    {"id": "q1", "code": "a = 3 + 4\\na"}

Output: the line {"ready": true}, then a line for each block, in the order in which they end; what a
notebook would show:
    {"id": "q1", "output": "7", "failed": false, "seconds": 0.03}

The code sees no network, no files but Python's own, an empty /tmp of 64 MiB, and no process but its
own. A block may take 6 seconds, as in the SCDPO authors' code; one that takes longer, prints
without end or ends the process loses its kernel, with all that it started, and the next block finds
a new one. interpreter.py ends, with all kernels, when its input does."""

import asyncio
import contextlib
import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tyro

SECONDS = 6  # for one block
LONGEST = 10_000  # characters of its output
# bytes, bytes, processes, seconds, bytes
LIMITS = {"AS": 2 << 30, "FSIZE": 32 << 20, "NPROC": 32, "CPU": 240, "CORE": 0}
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", ""),
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
}

# What runs in the sandbox: a line with code and a mark in, the output and the mark out. It imports
# little, since ast, json and traceback would double the 15 ms of its start; so the lines come as
# Python.
KERNEL = """
import _ast, os, resource, sys
if os.getuid() == 0 and eval(sys.argv[2]):  # the limit on processes does not hold for root
    uid = 1 << 20 | int.from_bytes(os.urandom(2), "big")
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
for name, most in eval(sys.argv[1]).items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
orders = os.fdopen(os.dup(0))
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # input() finds nothing
names = {"__name__": "__main__"}
for line in orders:
    (code, mark), failed = eval(line), False
    try:
        tree = compile(code, "<block>", "exec", 1024)  # ast.PyCF_ONLY_AST
        last = None
        if tree.body and isinstance(tree.body[-1], _ast.Expr):
            last = _ast.Expression(tree.body.pop().value)
        exec(compile(tree, "<block>", "exec"), names)
        if last and (value := eval(compile(last, "<block>", "eval"), names)) is not None:
            print(repr(value))
    except BaseException as error:
        failed, frames = True, error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename != "<block>":
            frames = frames.tb_next
        import traceback
        traceback.print_exception(type(error), error, frames, file=sys.stdout)
    sys.stdout.flush()
    os.write(1, f"{mark}{'!' if failed else '.'}".encode())
"""


@dataclass
class Args:
    unsafe_no_sandbox: bool = False
    """run the code with your files and your network, where bubblewrap is missing"""


def sandbox() -> list[str]:
    """bubblewrap's command line, before that of the program."""
    inside = []
    given = {sys.prefix, sys.base_prefix}
    for path in sorted(given | {str(Path(path).resolve()) for path in given}):  # uv's are links
        if not path.startswith("/usr"):
            for folder in reversed(Path(path).parents):
                inside += ["--perms", "755", "--dir", str(folder)]
            inside += ["--ro-bind", path, path]
    for path in ("/lib", "/lib64", "/bin"):
        if os.path.islink(path):
            inside += ["--symlink", os.readlink(path), path]
        else:
            inside += ["--ro-bind-try", path, path]
    apart = "--unshare-all --cap-drop ALL"
    if os.getuid() == 0:
        # without user ids of its own, so that KERNEL can take one to which the limits apply
        apart = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts"
        apart += " --cap-add CAP_SETUID --cap-add CAP_SETGID"
    system = "--ro-bind /usr /usr --proc /proc --dev /dev --remount-ro /dev"
    own = f"--perms 1777 --size {64 << 20} --tmpfs /tmp"
    command = f"bwrap {apart} --die-with-parent --new-session {system} {own}".split()
    return [*command, *inside, "--remount-ro", "/", "--chdir", "/tmp"]


class Kernel:
    """A Python process for the blocks of one solution."""

    def __init__(self, wrapper: list[str]):
        self.wrapper, self.process = wrapper, None

    async def run(self, code: str) -> tuple[str, bool]:
        """(what the block prints, whether it failed)"""
        if not self.process:
            # without a sandbox Python or its packages may lie in a folder such as /root, which
            # another user cannot read
            folders = {*Path(os.__file__).parents, *Path(tyro.__file__).parents}
            apart = bool(self.wrapper) or all(folder.stat().st_mode & 1 for folder in folders)
            command = [*self.wrapper, sys.executable, "-I", "-c", KERNEL, ascii(LIMITS), str(apart)]
            try:
                self.process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=ENVIRONMENT,
                    start_new_session=True,
                )
            except OSError as error:  # no more files or processes: not what the code has done
                print(f"interpreter.py: error: no process: {error.strerror}", file=sys.stderr)
                os._exit(2)  # the thread that reads the input would not let it end
        mark, output, failure = secrets.token_hex(16), b"", ""
        try:
            self.process.stdin.write(f"{(code, mark)!a}\n".encode())
            async with asyncio.timeout(SECONDS):
                while not re.search(mark.encode() + b"[!.]", output):
                    data = await self.process.stdout.read(1 << 16)
                    output += data
                    if not data or len(output) > 100 * LONGEST:
                        failure = "the process has ended" if not data else "too much output"
                        break
        except TimeoutError:
            failure = f"no end after {SECONDS} seconds"
        except OSError:
            failure = "the process has ended"
        text, _, verdict = output.decode(errors="replace").partition(mark)
        text = text[:LONGEST].replace("<|", "< |").strip()  # it forges no block
        if failure:
            await self.close()
            text = f"{text}\nKernelError: {failure}".strip()
        return text or "<empty_execution>", bool(failure) or verdict.startswith("!")

    async def close(self):
        if process := self.process:
            self.process = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A child that got away without a sandbox keeps the output open; wait() alone would wait
            # for ever for output that nobody reads.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.communicate(), 2)


def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2."""
    print(f"interpreter.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


async def serve(wrapper: list[str]):
    """Answer the lines of the standard input until it ends."""
    kernels, tasks = {}, set()
    # a block's seconds must not go by in a queue; of a job's processors, not the machine's
    processors = asyncio.Semaphore(len(os.sched_getaffinity(0)))

    async def answer(key: str, code: str):
        async with processors:
            began = time.time()
            output, failed = await kernels.setdefault(key, Kernel(wrapper)).run(code)
        seconds = time.time() - began
        row = {"id": key, "output": output, "failed": failed, "seconds": seconds}
        try:
            print(json.dumps(row), flush=True)
        except BrokenPipeError:  # who asked is gone, and so is the use of what waits
            for task in tasks:
                task.cancel()

    print(json.dumps({"ready": True}), flush=True)
    number = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        number += 1
        try:
            row = json.loads(line)
            row["id"], row["code"]
        except (ValueError, TypeError, KeyError) as error:
            stop(f"standard input, line {number}: {error!r}; a line is an object with id and code")
        if row["code"] is not None:
            work = answer(row["id"], row["code"])
        elif row["id"] in kernels:
            work = kernels.pop(row["id"]).close()
        else:
            continue
        tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks, return_exceptions=True)
    for kernel in kernels.values():
        await kernel.close()


def main(args: Args):
    wrapper = [] if args.unsafe_no_sandbox else sandbox()
    try:
        command = [*wrapper, sys.executable, "-c", ""]
        subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        todo = "install it (apt install bubblewrap), or give --unsafe-no-sandbox"
        stop(f"bubblewrap, which keeps the model's code in, does not start ({reason}); {todo}")
    # two files for each solution in flight
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    asyncio.run(serve(wrapper))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n\nInput")[0]))
