"""Where a model goes that nobody trains: one device, or a base laid over several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.inference.source import ModelChoice

FOR_WEIGHTS = 0.85
"""Of a GPU's free memory; the rest is for prompts and answers."""


@dataclass(frozen=True)
class Place:
    """Where a model goes."""

    device: torch.device
    """Where its inputs go."""
    memory: Mapping[torch.device, int] | None = None
    """Bytes that its weights may take on each of several devices; None: all lies on one."""


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def place_of(choice: ModelChoice) -> Place:
    """Where the model of a choice goes.

    Raises:
        ConfigurationError: for a size or a device that is none.
        HardwareError: for a device that is not here.
    """
    caps = parse_memory(choice.max_memory)
    if choice.devices == "cpu":
        return Place(torch.device("cpu"))
    if choice.devices == "one":
        return Place(best_device())
    free = {
        index: int(torch.cuda.mem_get_info(index)[0] * FOR_WEIGHTS)
        for index in range(torch.cuda.device_count())
    }
    every = caps.pop("every", None)
    memory = {
        torch.device("cuda", index): caps.pop(str(index), size if every is None else every)
        for index, size in free.items()
    }
    memory[torch.device("cpu")] = caps.pop("cpu", _host_memory())
    if caps:
        raise HardwareError(
            f"--max-memory: this machine has no GPU {', '.join(caps)} (it has {len(free)})."
        )
    return Place(next(iter(memory)), memory)


def parse_memory(words: Sequence[str]) -> dict[str, int]:
    """Bytes by device, out of ``0=20GiB`` or ``cpu=64GiB``; ``20GiB`` is for ``every`` GPU.

    Raises:
        ConfigurationError: for a word that says neither.
    """
    from accelerate.utils import convert_file_size_to_int  # slow to import

    found: dict[str, int] = {}
    for word in words:
        device, separator, size = word.rpartition("=")
        try:
            number = convert_file_size_to_int(size)
        except ValueError:
            number = -1
        if number < 0 or not (device == "cpu" or device.isdigit() or not separator):
            raise ConfigurationError(
                f"--max-memory: '{word}' is not understood; write 20GiB for every GPU, 0=20GiB or "
                "cpu=64GiB for one device."
            )
        found[device or "every"] = number
    return found


def _host_memory() -> int:
    """Bytes of memory that the machine has left."""
    from accelerate.utils import get_max_memory  # slow to import

    return int(get_max_memory()["cpu"] * FOR_WEIGHTS)
