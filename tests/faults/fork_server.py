"""Runs ``qlora-pl`` in forks of a process that has imported everything, a second instead of ten.

As a program it is that process: it reads one request a line, forks, lets the child be
``qlora-pl ...``, and answers with how the child ended. It starts no threads, because a fork takes
none of them along.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from faults.fault import Fault, Injector, read_log


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    codes: list[int]
    """Exit code of each process; a signal's number with a minus."""
    said: str
    """What it wrote to both of its outputs."""
    events: list[dict[str, Any]]
    """Its log, see ``Injector``."""
    is_timeout: bool
    """Whether it had to be killed because it did not end."""

    @property
    def code(self) -> int:
        """The first process's exit code."""
        return self.codes[0]

    @property
    def is_reached(self) -> bool:
        """Whether the fault happened."""
        return any("reached" in event for event in self.events)

    @property
    def begins_at(self) -> int | None:
        """The step that training began at; None if it did not come to that."""
        return next((e["begins_at"] for e in self.events if "begins_at" in e), None)

    @property
    def steps(self) -> int:
        """Steps done when it ended."""
        done = [event["step"] for event in self.events if "step" in event]
        return max([*done, self.begins_at or 0])


class ForkServer:
    """A process to fork from; used as a context.

    Args:
        folder: For logs and outputs, outside of everything that is watched.
        prefix: Words before the server's command, such as strace's.
    """

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self._number = 0
        folder.mkdir(parents=True, exist_ok=True)
        tests = Path(__file__).resolve().parents[1]
        paths = [os.environ.get("PYTHONPATH", ""), str(tests), str(tests.parent)]
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "faults.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONWARNINGS": "ignore",
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "passive",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def run(
        self,
        words: list[str],
        workplace: Path,
        fault: Fault | None = None,
        environments: list[dict[str, str]] | None = None,
        timeout_seconds: float = 240,
        sabotage: str | None = None,
    ) -> Ended:
        """Run ``qlora-pl WORDS`` in a workplace, once for each environment, all at a time.

        Args:
            words: Of the command line.
            workplace: Its directory.
            fault: What is to break.
            environments: Variables of each process; None: one process.
            timeout_seconds: After which it is killed.
            sabotage: A function of ``sabotage`` that breaks the code itself beforehand.
        """
        self._number += 1
        name = str(self.folder / str(self._number))
        request = {
            "words": words,
            "workplace": str(workplace),
            "fault": None if fault is None else asdict(fault),
            "environments": environments or [{}],
            "name": name,
            "timeout_seconds": timeout_seconds,
            "sabotage": sabotage,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("The fork server died.")
        outputs = sorted(self.folder.glob(f"{self._number}.out*"))
        said = "\n".join(path.read_text(errors="replace") for path in outputs)
        return Ended(said=said, events=read_log(Path(name + ".log")), **json.loads(answer))


# -- the other side --------------------------------------------------------------------------------


def import_everything() -> None:
    """What a run imports sooner or later, and no thread."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import tqdm
    import transformers.models.llama.modeling_llama  # noqa: F401

    import qlora_pl.__main__
    import qlora_pl.cli  # noqa: F401

    tqdm.tqdm.monitor_interval = 0  # its bars would start a thread
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in a fork need not look through all of it


def become(request: dict[str, Any], rank: int) -> None:
    """In a fork: be the command, and end as its process would."""
    os.environ.update(request["environments"][rank])
    workplace = Path(request["workplace"])
    os.chdir(workplace)
    out = os.open(f"{request['name']}.out{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ |= {"QLORA_PL_CACHE": str(workplace / "cache"), "TMPDIR": str(workplace / "tmp")}
    tempfile.tempdir = None  # what the parent has found holds no longer
    sys.argv = ["qlora-pl", *request["words"]]
    fault = Fault(**request["fault"]) if request["fault"] else None
    if fault is not None and fault.rank != rank:
        fault = None
    code: Any = 1
    try:
        from faults import moments, sabotage
        from faults.operations import OperationWatcher

        injector = Injector(workplace, Path(request["name"] + ".log"), fault)
        moments.install(injector)
        OperationWatcher(injector).install()
        if request["sabotage"]:
            getattr(sabotage, request["sabotage"])()
        from qlora_pl.__main__ import main

        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does when it ends
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def run_forked(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and say how it ended."""
    children = []
    for rank in range(len(request["environments"])):
        if (child := os.fork()) == 0:
            os.setsid()
            become(request, rank)
        children.append(child)
    deadline = time.monotonic() + request["timeout_seconds"]
    codes: dict[int, int] = {}
    is_timeout = False
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        fault = request["fault"]
        if fault and fault["action"] == "stall" and len(codes) == len(children) - 1:
            _kill(children)  # a stalled one ends only so, once all others have
        if time.monotonic() > deadline:
            is_timeout = True
            _kill(children)
        time.sleep(0.005)
    _kill(children)
    return {"codes": [codes[child] for child in children], "is_timeout": is_timeout}


def _kill(children: list[int]) -> None:
    """With what they have started."""
    for child in children:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def serve() -> None:
    """Answer requests until there are none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    import_everything()
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("A library starts threads when it is imported; a fork would lack them.")
    for line in sys.stdin:
        answers.write(json.dumps(run_forked(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
