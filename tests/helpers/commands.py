"""The command in its own process, as a user starts it, but forked: its imports are loaded only once, here."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from types import SimpleNamespace
from typing import Any

from holdfast.cli import app
from warm import warm


def holdfast_command(*arguments: Any, cwd: Any = None, timeout: float = 120, before: Any = None) -> Any:
    """Its `returncode`, `stdout` and `stderr`.

    Args:
        before: called first in the process.
    """
    warm()
    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _run([str(a) for a in arguments], cwd, out.fileno(), err.fileno(), before)
        code = _end(child, timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    if code is None:
        raise subprocess.TimeoutExpired(["holdfast", *arguments], timeout, *texts)
    return SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


def refused(done: Any, *words: Any, code: int = 2) -> str:
    """Assert that the command prints a message of a few lines with these words, and no traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr[max(done.stderr.find("holdfast: "), 0) :]
    assert len(message.strip().splitlines()) <= 8, done.stderr
    for word in words:
        assert str(word) in done.stderr, done.stderr
    return done.stderr


def _end(child: int, timeout: float) -> int | None:
    """The exit code; None after a timeout."""
    last = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > last:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def _run(arguments: list[str], cwd: Any, out: int, err: int, before: Any) -> None:
    code = 1
    try:
        gc.freeze()  # a garbage collection would copy the parent's memory
        devnull = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((devnull, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w"), "utf-8")
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w"), "utf-8", line_buffering=True)
        logging.root.handlers.clear()  # pytest's
        os.chdir(cwd or os.getcwd())
        sys.argv = ["holdfast", *arguments]
        if before:
            before()
        app.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
