"""Processes of a benchmark: started as torchrun would start them, and watched from outside."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
LAUNCHER_VARIABLES = re.compile("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC|SLURM_|QLORA_PL_RUN|NODE_")
SAMPLE_SECONDS = 0.1


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(**variables: object) -> dict[str, str]:
    """This process's variables, without those of a launcher, and one thread a process."""
    kept = {n: v for n, v in os.environ.items() if not LAUNCHER_VARIABLES.search(n)}
    kept |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    kept["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])
    return kept | {name: str(value) for name, value in variables.items()}


def start_ranks(
    program: Path, arguments: Sequence[str], number: int, **variables: object
) -> list[subprocess.Popen[str]]:
    """One process of a Python program a rank, all on this machine, with pipes to each of them."""
    shared = {
        "WORLD_SIZE": number,
        "LOCAL_WORLD_SIZE": number,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(program), *arguments],
            env=environment(**shared, **variables, RANK=rank, LOCAL_RANK=rank),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(number)
    ]


def say(processes: Sequence[subprocess.Popen[str]], word: str = "") -> None:
    """One line to each."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{word}\n")
        process.stdin.flush()


def hear(processes: Sequence[subprocess.Popen[str]], word: str) -> list[str]:
    """What each of them says after ``word``, waiting for all of them.

    Raises:
        RuntimeError: with how they ended and what they said, if one ends first.
    """
    said: list[list[str]] = [[] for _ in processes]

    def answer(rank: int) -> str | None:
        output = processes[rank].stdout
        assert output is not None
        for line in output:
            said[rank].append(line)
            if line.startswith(word):
                return line.removeprefix(word).strip()
        for other in processes:  # they would wait for the one that has ended
            other.kill()
        return None

    with ThreadPoolExecutor(len(processes)) as pool:
        answers = list(pool.map(answer, range(len(processes))))
    if None in answers:
        raise RuntimeError(
            "\n".join(
                f"rank {rank} ended with {process.wait()}:\n{''.join(said[rank])[-3000:]}"
                for rank, process in enumerate(processes)
                if answers[rank] is None
            )
        )
    return [found for found in answers if found is not None]


def anonymous_bytes(pid: int) -> int:
    """A process's share of anonymous memory (PSS); what several map counts once in all."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"Pss_Anon:\s+(\d+) kB", text)
    return 1024 * int(found.group(1)) if found else 0


class PeakMemory:
    """Anonymous memory of several processes together, sampled ten times a second."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids
        self.before = self._now()
        self.peak = 0
        self.over_time: list[tuple[float, int]] = []
        """Seconds and bytes above the start."""

    def _now(self) -> int:
        return sum(anonymous_bytes(pid) for pid in self.pids)

    @property
    def held(self) -> int:
        """Bytes above the start, now."""
        return self._now() - self.before

    @contextmanager
    def watch(self) -> Iterator[PeakMemory]:
        """Keep the peak of what happens in the block."""
        is_done, started = threading.Event(), time.perf_counter()

        def sample() -> None:
            while not is_done.wait(SAMPLE_SECONDS):
                held = self.held
                self.over_time.append((time.perf_counter() - started, held))
                self.peak = max(self.peak, held)

        watcher = threading.Thread(target=sample)
        watcher.start()
        try:
            yield self
        finally:
            is_done.set()
            watcher.join()
