"""Runs code in children of one process that has imported torch and the package: what takes seconds, once a session.

    with start("print(sum(map(int, sys.argv[1:])))", 1, 2) as child:      # `import sys` is done
        assert child.stdout.read() == "3\n"
    assert child.status == 0

A child is as a new `python -c` in the folder of the tests but for its imports and its end. TRITON_INTERPRET is set: it
uses no GPU.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
_CODE, _PIPES = "import sys\n", 3


class Child:
    """A process that runs some code. Leaving the context waits for it, and kills it if an exception passes by."""

    def __init__(self, code: str, arguments: list[str], options: dict[str, Any]) -> None:
        pipes = [os.pipe() for _ in range(_PIPES)]
        request = {"code": code, "arguments": arguments, **options}
        socket.send_fds(_parent()[0], [json.dumps(request).encode()], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.stdout, self.stderr, self._told = (os.fdopen(read) for read, _ in pipes)
        self.pid = int(self._told.readline())
        self.status: int | None = None
        """As subprocess's `returncode`; None until `ended` has seen the end."""

    def ended(self, seconds: float = 0.0) -> bool:
        if self.status is None and select.select([self._told], [], [], seconds)[0]:
            self.status = int(self._told.readline())
        return self.status is not None

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is not None and not self.ended():
                self.kill()
            assert self.ended(300), "it does not end"
        finally:
            for file in (self.stdout, self.stderr, self._told):
                file.close()


def start(code: str, *arguments: object, session: bool = False, modules: tuple[str, ...] = ()) -> Child:
    """Runs `code` with `arguments` as its sys.argv[1:].

    `session`: as the leader of a session of its own. `modules` are imported beforehand, and stay for later children.
    """
    return Child(_CODE + code, [*map(str, arguments)], {"session": session, "modules": modules})


@cache
def _parent() -> tuple[socket.socket, subprocess.Popen]:
    """A wire to the process whose children they are, which ends with the wire; and that process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(theirs.fileno())]
    options = {"pass_fds": [theirs.fileno()], "cwd": TESTS, "env": environment, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(command, **options)
    theirs.close()
    return ours, process


def close() -> None:
    """Ends that process, if there is one, and waits for it, so that its CPU time is counted with ours."""
    if _parent.cache_info().currsize:
        wire, process = _parent()
        _parent.cache_clear()
        wire.close()
        process.wait(60)


def _serve(wire: socket.socket) -> dict[str, Any]:
    """Returns in the child, with its request. Between the two stands a process that waits and tells how it ended."""
    waiting: set[int] = set()
    while True:
        message, pipes, *_ = socket.recv_fds(wire, 1 << 20, _PIPES)
        waiting = {each for each in waiting if os.waitpid(each, os.WNOHANG if message else 0)[0] == 0}
        if not message:
            sys.exit()
        request = json.loads(message)
        for module in request["modules"]:
            importlib.import_module(module)
        if between := os.fork():
            waiting.add(between)
        else:
            wire.close()
            told = pipes[-1]
            if (child := os.fork()) == 0:
                for place, pipe in enumerate(pipes[:2], start=1):
                    os.dup2(pipe, place)
                for pipe in pipes:
                    os.close(pipe)
                if request["session"]:
                    os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell's background ignores it
                return request
            for pipe in pipes[:2]:
                os.close(pipe)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # those to the group are not for this one
            os.write(told, f"{child}\n".encode())
            os.write(told, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
            os._exit(0)
        for pipe in pipes:
            os.close(pipe)


def _leave(code: object) -> None:
    """As an interpreter that ends, but for taking apart all that was imported: a second of CPU for each child."""
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code if isinstance(code, int) else 1)


if __name__ == "__main__":
    import loading  # noqa: F401 (torch and most of the package)
    import open_clip  # noqa: F401

    from clipscale.data.tokenize import build_tokenizer

    build_tokenizer(None, 8)
    gc.freeze()  # a child's collections leave alone, and shared, what was there before
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = ["-c", *request["arguments"]]
    try:
        exec(compile(request["code"], "<forked>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        _leave(end.code)
    _leave(None)
