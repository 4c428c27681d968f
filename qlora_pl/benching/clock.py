"""The clock of optimizer steps, and the peak of memory between two of its points.

Both programs of a comparison use it. On a GPU a step's end is an event in its stream, and nothing
waits for it until all are through, so that the clock does not change what it measures.
"""

from __future__ import annotations

import resource
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora_pl.benching.settings import Timing

RESET_PEAK = "5"
"""What resets a process's peak resident set when it is written to clear_refs (proc(5))."""


class StepClock:
    """Notes the ends of steps, and the peaks of memory in the first step and while it is timed.

    Args:
        timing: Which steps are timed.
        device: Where they run.
    """

    def __init__(self, timing: Timing, device: torch.device) -> None:
        self.timing = timing
        self.memory = PeakMemory(device)
        self.own_seconds = 0.0
        """What the clock itself has taken during the timed steps."""
        self.peak_of_first: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        """Of the timed steps."""
        self._device = device
        self._marks: list[Any] = []
        self._num_steps = 0

    def begin(self) -> None:
        """Training begins."""
        self.memory.reset()

    def end_step(self) -> int:
        """An optimizer step has been handed to the device; its number, from 1."""
        began = time.perf_counter()
        self._num_steps += 1
        past = self._num_steps - self.timing.warmup
        if self._num_steps == 1:
            self._wait()
            self.peak_of_first = self.memory.peak()
        if past == 0:
            self._wait()
            self.memory.reset()
        if 0 <= past <= self.timing.num_timed:
            self._marks.append(self._mark())
        if past == self.timing.num_timed:
            self._wait()
            self.peak = self.memory.peak()
        elif past > 0:
            self.own_seconds += time.perf_counter() - began
        return self._num_steps

    @property
    def is_done(self) -> bool:
        """Whether every step that was to be timed has been."""
        return self._num_steps >= self.timing.warmup + self.timing.num_timed

    @property
    def is_timing(self) -> bool:
        """Whether the step that goes on is one of the timed."""
        return self.timing.warmup <= self._num_steps and not self.is_done

    def seconds(self) -> list[float]:
        """Of each timed step; loading its rows is part of it."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [first.elapsed_time(second) / 1e3 for first, second in pairs]
        return [second - first for first, second in pairs]

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class PeakMemory:
    """The most memory between a reset and now: a GPU's as torch has it, or what is resident.

    Args:
        device: Whose.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Begin anew; without effect on a host whose system cannot do it."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text(RESET_PEAK)

    def peak(self) -> dict[str, int]:
        """Bytes by name.

        On a GPU ``allocated`` and ``reserved``, and what the ``card`` has in use and in all; else
        ``resident``, and the part of it that is no file's page now.
        """
        if self._device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(self._device)
            return {
                "allocated": torch.cuda.max_memory_allocated(self._device),
                "reserved": torch.cuda.max_memory_reserved(self._device),
                "used_on_card": whole - free,
                "card": whole,
            }
        status = _status()
        resident = status.get("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return {"resident": resident, "anonymous_now": status.get("RssAnon", resident)}


def resident_bytes() -> int:
    """What this process has in memory now; 0 where the system does not say."""
    return _status().get("VmRSS", 0)


def anonymous_bytes() -> int:
    """What this process has now that is no file's page; 0 where the system does not say."""
    return _status().get("RssAnon", 0)


def _status() -> dict[str, int]:
    """Sizes of this process in bytes, as Linux has them."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def summary(values: list[float]) -> dict[str, float]:
    """Median, 90th percentile, least and most of some seconds."""
    ordered = sorted(values)
    rank = max(0, -(-9 * len(ordered) // 10) - 1)  # nearest rank: a step that was taken
    return {
        "median": statistics.median(ordered),
        "p90": ordered[rank],
        "least": ordered[0],
        "most": ordered[-1],
    }
