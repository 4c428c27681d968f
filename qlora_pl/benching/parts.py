"""Where the time of a step goes: profiled operations -> parts with names that a user can act on.

Each operation's own time (without that of what it calls) goes to the class of its name, or of the
nearest operation around it that has one. On a GPU it is the time of its kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MICRO_BATCH = "qlora_pl::micro_batch"
"""Around forward and backward."""
PARTS = (
    "data",
    "dequantisation",
    "GEMM",
    "attention",
    "element-wise",
    "loss",
    "optimizer",
    "communication",
    "idle",
)
CLASSES: dict[str, tuple[str, ...]] = {
    "communication": ("c10d::", "nccl", "gloo"),
    "loss": ("cross_entropy", "nll_loss", "nllloss", "log_softmax", "logsoftmax"),
    # Products of three dimensions and softmax are attention's where no kernel does it as a whole.
    "attention": (
        "scaled_dot_product",
        "scaleddotproduct",
        "flash_attention",
        "flash_attn",
        "efficient_attention",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
    ),
    "dequantisation": ("bitsandbytes::dequantize", "bitsandbytes::gemm_4bit", "gemv_4bit"),
    "GEMM": (
        "aten::mm",
        "aten::addmm",
        "aten::matmul",
        "aten::linear",
        "aten::mv",
        "aten::_int_mm",
        "mkldnn_linear",
        "bitsandbytes::int8",
    ),
}
"""Parts of an operation's name in lower case, the first class that has one counting."""
DATA_LOADER = "enumerate(dataloader)"
ROWS = "qlora_pl::rows"
"""Around the reading of rows between epochs."""
OPTIMIZER = "optimizer.step"
WAITING = ("autograd::engine", MICRO_BATCH.lower(), OPTIMIZER)
"""Whose own time is Python's and the engine's, between operations."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a profiled step by part, and the operations that took most."""

    seconds: dict[str, float]
    """For each of ``PARTS``; they add up to ``step_seconds``."""
    step_seconds: float
    """Of a step under the profiler, which is longer than without it."""
    largest: list[dict[str, Any]]
    """The operations with most time of their own: name, part, seconds a step, calls a step."""
    operations: float
    """Operations that Python or autograd started in a step."""

    @property
    def shares(self) -> dict[str, float]:
        """Of the step, 0 to 1."""
        return {name: value / self.step_seconds for name, value in self.seconds.items()}

    def to_plain(self) -> dict[str, Any]:
        """For a record."""
        return {
            "seconds": self.seconds,
            "shares": self.shares,
            "step_seconds_under_profiler": self.step_seconds,
            "operations_a_step": self.operations,
            "largest": self.largest,
        }


def time_by_part(events: Iterable[Any], wall_seconds: float, steps: int, is_cuda: bool) -> Parts:
    """Sort the operations of a profile.

    Args:
        events: torch's ``FunctionEvent``s, with their parents.
        wall_seconds: Of the whole profile.
        steps: Optimizer steps in it.
        is_cuda: Whether kernels' time counts, or the processor's.
    """
    spent: Counter[str] = Counter()
    by_name: dict[tuple[str, str], list[float]] = {}
    operations = 0
    for event in events:
        if _is_kernel(event):
            continue
        part = part_of(event)
        microseconds = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if is_cuda and part == "data":  # made by the processor while the device may be busy
            microseconds = 0.0
        spent[part] += microseconds
        operations += event.name.startswith(("aten::", "bitsandbytes::"))
        of_name = by_name.setdefault((event.name, part), [0.0, 0.0])
        of_name[0] += microseconds
        of_name[1] += 1
    step = wall_seconds / steps
    seconds = {name: spent[name] / 1e6 / steps for name in PARTS}
    seconds["idle"] = 0.0
    # Threads may overlap, on a processor with several: then nothing was idle.
    seconds["idle"] = max(0.0, step - sum(seconds.values()))
    excess = sum(seconds.values()) / step
    seconds = {name: value / excess for name, value in seconds.items()}
    ranked = sorted(by_name.items(), key=lambda item: -item[1][0])
    largest = [
        {"name": n, "part": part, "seconds": time / 1e6 / steps, "calls": calls / steps}
        for (n, part), (time, calls) in ranked[:12]
        if part != "idle"
    ]
    return Parts(seconds, step, largest, operations / steps)


def part_of(event: Any) -> str:
    """The part that an operation's own time belongs to."""
    own = event.name.lower()
    if own.startswith(WAITING):
        return "idle"
    inner: str | None = None
    while event is not None:
        name = event.name.lower()
        if name.startswith((DATA_LOADER, ROWS)):
            return "data"
        if name.startswith(OPTIMIZER):
            return inner if inner == "communication" else "optimizer"
        if name.startswith(MICRO_BATCH.lower()):
            break
        inner = inner or class_of(name)
        event = event.cpu_parent
    return inner or "element-wise"


def class_of(name: str) -> str | None:
    """The class of an operation by its name in lower case; None: it says nothing."""
    for part, words in CLASSES.items():
        if any(word in name for word in words):
            return part
    return None


def _is_kernel(event: Any) -> bool:
    """Whether an event is on the device itself; its time is counted at who started it."""
    return "CPU" not in str(event.device_type)
