"""The frozen base's checksum: every byte counts, and parts of a tensor add up to the whole's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import CPU, load
from torch import Tensor

from qlora_pl.errors import CheckpointError, TrainingStoppedError
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.base_checksum import (
    CHUNK_FACTOR,
    TABLE_WORDS,
    BaseWatch,
    _table,
    _words,
    _words_checksum,
    checksum,
    combined,
    frozen_checksums,
)


def by_hand(data: bytes) -> int:
    """The same sum in Python's own integers."""
    words = [
        int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little") for i in range(0, len(data), 8)
    ]
    table = _table(CPU).tolist()
    return (
        sum(
            word * table[place % TABLE_WORDS] * pow(CHUNK_FACTOR, place // TABLE_WORDS + 1, 2**64)
            for place, word in enumerate(words)
        )
        % 2**64
    )


def number(tensor: Tensor) -> int:
    return int(checksum(tensor)) % 2**64


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_it_is_a_sum_over_words_times_their_places(size: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert number(data) == by_hand(data.numpy().tobytes())


@pytest.mark.parametrize("num_parts", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [5, 8_192, 8 * TABLE_WORDS + 12_345])
def test_parts_add_up_to_the_whole_wherever_it_is_cut(num_parts: int, size: int) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    total, offset = torch.tensor(0), 0
    for part in data.chunk(num_parts):
        total += _words_checksum(*_words(part.clone(), offset))
        offset += len(part)
    assert total == checksum(data)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_any_bit_that_flips_changes_it(dtype: torch.dtype) -> None:
    data = torch.arange(100).to(dtype)
    before, raw = number(data), data.view(torch.uint8)
    for place in range(0, raw.numel(), 7):
        for bit in (1, 16, 128):
            raw[place] ^= bit
            assert number(data) != before
            raw[place] ^= bit
    assert number(data) == before
    assert number(data.flip(0)) != before


def test_names_are_the_bases_with_and_without_adapters_and_constants_are_among_them(
    tiny_base: Path,
) -> None:
    base = load(tiny_base).model
    bare = frozen_checksums(base, CPU)
    adapted = attach_adapters(base, LoRAConfig(r=4), seed=0)
    assert frozen_checksums(adapted, CPU) == bare
    name = "model.layers.0.self_attn.q_proj.weight"
    assert {name, f"{name}.absmax", f"{name}.nested_absmax", "model.norm.weight"} <= bare.keys()


def test_the_order_in_which_a_base_was_filled_does_not_matter(tiny_base: Path) -> None:
    checksums = frozen_checksums(load(tiny_base).model, CPU)
    assert combined(checksums) == combined(dict(reversed(checksums.items())))
    names = list(checksums)
    swapped = checksums | {names[0]: checksums[names[1]], names[1]: checksums[names[0]]}
    assert combined(checksums) != combined(swapped)


def change_byte(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3] ^= 4


def change_constant(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.quant_state.absmax[0] += 1


def change_norm(model: Any) -> None:
    model.model.norm.weight.data[0] += 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_byte, "model.layers.1.mlp.up_proj.weight"),
        (change_constant, "model.layers.1.mlp.up_proj.weight.absmax"),
        (change_norm, "model.norm.weight"),
    ],
)
def test_a_changed_base_stops_the_run_by_name(change: Any, named: str, tiny_base: Path) -> None:
    model = load(tiny_base).model
    watch = BaseWatch()
    watch.remember(model, CPU)
    watch.check(model, CPU, "after nothing")
    change(model)
    with pytest.raises(TrainingStoppedError, match=f"has changed in step 1: '{named}' is not"):
        watch.check(model, CPU, "in step 1")


def test_a_checkpoint_is_not_continued_around_other_bytes_of_the_same_kind_of_device(
    tiny_base: Path,
) -> None:
    model = load(tiny_base).model
    ours, other = BaseWatch(), BaseWatch()
    ours.remember(model, CPU)
    change_byte(model)
    other.remember(model, CPU)
    saved = ours.state_dict(CPU)
    ours.compare(saved, CPU)
    other.compare(saved, torch.device("cuda"))  # whose constants are rounded otherwise
    with pytest.raises(CheckpointError, match="not, byte for byte, the one that the checkpoint"):
        other.compare(saved, CPU)


def test_what_is_remembered_of_a_part_stays_when_the_rest_is_remembered(tiny_base: Path) -> None:
    """A layer that changes between the two must be found, and both together are the whole base."""
    model = load(tiny_base).model
    whole, watch = BaseWatch(), BaseWatch()
    whole.remember(model, CPU)
    watch.remember(model.get_submodule("model.layers.0"), CPU, within="model.layers.0")
    first, last = (model.get_submodule(f"model.layers.{n}.mlp.up_proj") for n in (0, 1))
    first.weight.data[0] ^= 1  # type: ignore[operator, index]
    watch.remember_rest(model, CPU)
    with pytest.raises(TrainingStoppedError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight'"):
        watch.check(model, CPU, "in between")
    first.weight.data[0] ^= 1  # type: ignore[operator, index]
    watch.check(model, CPU, "in between")
    assert combined(watch.checksums) == combined(whole.checksums)
    last.weight.data[0] ^= 1  # type: ignore[operator, index]
    with pytest.raises(TrainingStoppedError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'"):
        watch.check(model, CPU, "afterwards")
