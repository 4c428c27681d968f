"""Programs in processes of their own that need not import everything: forks of one that has.

Importing torch, Lightning and transformers takes some five seconds of a core, more than most of
what the tests let processes do. What a process imports, or does before it has imported anything,
is for ``subprocess`` to show.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess
from threading import Thread
from types import TracebackType
from typing import Any, Self

TESTS = Path(__file__).resolve().parent


class Started:
    """``python PROGRAM WORDS``, with pipes to read; used as a context it does not outlive it.

    Args:
        program: A file, or the name of a module (``python -m``).
        words: Of the command line.
        environment: What to add to this process's.
        folder: To run in; None: this one.
    """

    def __init__(
        self,
        program: Path | str,
        *words: str,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.args = [str(program), *words]
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        ends: list[Any] = [writer for _, writer in pipes]
        given = (self.args, os.environ | dict(environment or {}), str(folder or Path.cwd()), ends)
        self._process = server().Process(target=_become, args=given)
        self._process.start()
        for writer in ends:
            writer.close()
        self.stdout, self.stderr = (
            os.fdopen(os.dup(reader.fileno()), errors="replace") for reader, _ in pipes
        )
        self._said = ["", ""]
        self._readers = [
            Thread(target=self._read, args=(number,), daemon=True) for number in range(2)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._finish_reading()
        self.stdout.close()
        self.stderr.close()

    def _read(self, number: int) -> None:
        self._said[number] = (self.stdout, self.stderr)[number].read()

    def _finish_reading(self) -> None:
        for reader in self._readers:
            if reader.is_alive():
                reader.join(60)  # what it has started may hold the pipe

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it, and wait until it has ended."""
        self._process.kill()
        self._process.join()

    def wait(self, timeout: float = 300) -> int | None:
        """Its exit code, once it has ended; None if it has not."""
        self._process.join(timeout)
        return self._process.exitcode

    def read_all(self) -> None:
        """Begin to read what it says, so that it never waits for a reader."""
        for reader in self._readers:
            reader.start()

    def completed(self, timeout: float = 300) -> CompletedProcess[str]:
        """How it ended and what it said; ``read_all`` has been called.

        Raises:
            TimeoutError: it did not end in time, and was killed.
        """
        code = self.wait(timeout)
        self.kill()
        self._finish_reading()
        if code is None:
            raise TimeoutError(f"{self.args} did not end: {self._said}")
        return CompletedProcess(self.args, code, *self._said)


def run(
    program: Path | str,
    *words: str,
    environments: Sequence[Mapping[str, str]] = ({},),
    folder: Path | None = None,
    timeout: float = 300,
) -> list[CompletedProcess[str]]:
    """Run a program once for each environment, all at a time; how each ended."""
    started = [Started(program, *words, environment=e, folder=folder) for e in environments]
    try:
        for process in started:
            process.read_all()
        return [process.completed(timeout) for process in started]
    finally:
        for process in started:
            process.__exit__(None, None, None)


@cache
def server() -> ForkServerContext:
    """The one of this process, which starts with the first program."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_imports"])
    before = dict(os.environ)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def _become(
    words: list[str], environment: dict[str, str], folder: str, ends: list[Connection]
) -> None:
    """In a fork: be the program, and end as it would."""
    for number, end in enumerate(ends, start=1):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    tempfile.tempdir = None  # what the server has found holds no longer
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if environment.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    sys.argv = words
    program = words[0]
    try:
        if program.endswith(".py"):
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path.insert(0, folder)
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
