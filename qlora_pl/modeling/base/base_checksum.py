"""Whether the frozen base is still, byte for byte, what was loaded: on every device, at every save.

A cast of packed bytes on their way through a strategy, a kernel that repacks weights in place, or
memory that fails would change what is trained around, without a word. The checksum of a tensor is a
sum over its 8-byte words, each times a number of its place, so parts of it add up to the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_pl.errors import CheckpointError, TrainingStoppedError
from qlora_pl.modeling.loading.packed_model import decoding_tensors, name_in_base
from qlora_pl.modeling.optimization.state_precision import shard_rows
from qlora_pl.modeling.sharding import is_sharded

WORD_BYTES = 8
TABLE_WORDS = 2**20
CHUNK_FACTOR = 0x9E3779B97F4A7C15  # odd: no change of a word is lost in a product modulo 2**64

Checksums = dict[str, int]
"""Names of the base's tensors -> checksums, modulo 2**64."""


class BaseWatch:
    """Remembers the checksums of a loaded base, and stops a run whose base has changed."""

    def __init__(self) -> None:
        self.checksums: Checksums = {}

    def remember(self, model: nn.Module, device: torch.device, within: str = "") -> None:
        """Take the base as it is now for what it should be.

        Args:
            model: The base, the adapted model around it, or a part of it.
            device: This process's, for what is exchanged.
            within: The part's name in the base; what is remembered of others stays.

        Raises:
            TrainingStoppedError: if processes hold different bases.
        """
        prefix = f"{within}." if within else ""
        of_part = frozen_checksums(model, device).items()
        self.checksums |= {f"{prefix}{name}": checksum for name, checksum in of_part}

    def remember_rest(self, model: nn.Module, device: torch.device) -> None:
        """Take what is not remembered yet for what it should be; see ``remember``."""
        self.checksums |= frozen_checksums(model, device, known=self.checksums)

    def check(self, model: nn.Module, device: torch.device, when: str) -> None:
        """Hold the base against what is remembered.

        Args:
            model: See ``remember``.
            device: See ``remember``.
            when: For the message, as in "after step 1".

        Raises:
            TrainingStoppedError: naming the first tensor that changed.
        """
        now = frozen_checksums(model, device)
        changed = [name for name, checksum in self.checksums.items() if now.get(name) != checksum]
        if changed:
            raise TrainingStoppedError(
                f"The frozen base has changed {when}: '{changed[0]}' is not what was loaded "
                f"({len(changed)} of {len(self.checksums)} tensors differ); nothing that was "
                "trained from here on belongs to the base, so go back to the last checkpoint."
            )

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """One number of the whole base, for a checkpoint, and the kind of device that made it."""
        return {"device": device.type, "checksum": combined(self.checksums)}

    def compare(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Refuse to continue around another base than a checkpoint's run had.

        Kinds of device round some of the 8-bit constants differently, so only those of one kind
        are compared.

        Raises:
            CheckpointError: if it is another.
        """
        if not self.checksums or saved["device"] != device.type:
            return
        if saved["checksum"] != combined(self.checksums):
            raise CheckpointError(
                "The base in memory is not, byte for byte, the one that the checkpoint was trained "
                "around; delete the cache's folder 'packed', so that it is quantised again."
            )


def combined(checksums: Checksums) -> int:
    """One number of all; strategies fill a base in different orders, which must not matter."""
    total = 0
    for name in sorted(checksums):
        total = (total * CHUNK_FACTOR + checksums[name]) % 2**64
    return total


def frozen_checksums(
    model: nn.Module, device: torch.device, known: Collection[str] = ()
) -> Checksums:
    """The checksum of every frozen tensor of a base, the same for each process and strategy.

    Args:
        model: The base, or the adapted model around it; cut over devices or not.
        device: This process's, for what is exchanged.
        known: Names of tensors to leave out.

    Raises:
        TrainingStoppedError: if processes hold different bases, naming a tensor.
    """
    named = [(name, tensor) for name, tensor in frozen_tensors(model) if name not in known]
    parts = [checksum(tensor) for _, tensor in named]
    if not parts:
        return {}
    values = torch.stack([part.to(device) for part in parts])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        is_cut = torch.tensor([is_sharded(tensor) for _, tensor in named], device=device)
        values = _over_processes(values, is_cut, [name for name, _ in named])
    totals = zip((name for name, _ in named), values.tolist(), strict=True)
    return {name: value % 2**64 for name, value in totals}


def _over_processes(values: Tensor, is_cut: Tensor, names: list[str]) -> Tensor:
    """Sums of what is cut; what every process holds whole must be the same."""
    sums = torch.where(is_cut, values, 0)
    torch.distributed.all_reduce(sums)
    same = torch.where(is_cut, 0, values)
    # Of complements the largest is the complement of the smallest, without an overflow.
    extremes = torch.stack([same, ~same])
    torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
    if unequal := (extremes[0] != ~extremes[1]).nonzero().flatten().tolist():
        raise TrainingStoppedError(
            f"The processes hold different bases: '{names[unequal[0]]}' is not the same in all "
            f"({len(unequal)} such tensors); delete the cache's folder 'packed' on every machine."
        )
    return torch.where(is_cut, sums, same)


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Frozen parameters by their names in the base, and what packed ones are decoded with."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            continue
        own_name = name_in_base(name)
        yield own_name, parameter.data
        owner = model.get_submodule(name.rpartition(".")[0])
        for key, tensor in decoding_tensors(owner, parameter):
            yield f"{own_name}.{key}", tensor


def checksum(tensor: Tensor) -> Tensor:
    """The checksum of a tensor, or what this process's part adds to it; an int64 scalar.

    Args:
        tensor: Of any type and shape.
    """
    offset = 0
    if is_sharded(tensor):
        cut = cast(Any, tensor)
        # torch's own function for it makes a number for each row, which of packed bytes are eight
        # times as many bytes; and a slice of what is cut would fetch all of it.
        mesh, num_rows = cut.device_mesh, cut.shape[0]
        first = min(shard_rows(cut.shape, mesh.size()) * mesh.get_local_rank(), num_rows)
        offset = first * math.prod(cut.shape[1:]) * cut.element_size()
        tensor = cut.to_local()
    return _words_checksum(*_words(tensor, offset))


def _words(tensor: Tensor, offset: int) -> tuple[Tensor, int]:
    """The 8-byte words that a tensor's bytes lie in, zeros around them; the first one's place."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    lead, tail = offset % WORD_BYTES, -(offset + flat.numel()) % WORD_BYTES
    if lead or tail or flat.storage_offset() % WORD_BYTES:
        flat = nn.functional.pad(flat, (lead, tail))
    return flat.view(torch.int64), offset // WORD_BYTES


def _words_checksum(words: Tensor, first: int) -> Tensor:
    table = _table(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    done = 0
    while done < words.numel():
        chunk, place = divmod(first + done, TABLE_WORDS)
        part = words[done : done + TABLE_WORDS - place]
        product = (part * table[place : place + part.numel()]).sum()
        total += product * _signed(pow(CHUNK_FACTOR, chunk + 1, 2**64))
        done += part.numel()
    return total


@lru_cache(maxsize=4)
def _table(device: torch.device) -> Tensor:
    """Odd numbers, the same everywhere."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**62), 2**62, (TABLE_WORDS,), generator=draw) * 2 + 1
    return numbers.to(device)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
