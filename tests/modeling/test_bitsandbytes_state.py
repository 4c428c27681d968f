"""Loaded state lies where made state would; on CPUs, where the library pages nothing.

What only a GPU shows is in tests/test_gpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch import Tensor, nn

from qlora_pl.modeling.optimization.bitsandbytes_state import SettledState, settled
from qlora_pl.modeling.optimization.optimizer_state import (
    named_optimizer_state,
    optimizer_state_from_names,
)

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

SHAPE = (64, 256)


class Marked:
    """Has the library make its buffers, and notes them as its own, as paged ones are."""

    def __init__(self, optimizer: Any) -> None:
        self.make = optimizer.get_state_buffer
        optimizer.get_state_buffer = self

    def __call__(self, parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        buffer: Tensor = self.make(parameter, dtype=dtype)
        buffer.is_paged_here = True  # type: ignore[attr-defined]
        return buffer


def build(library_name: str) -> tuple[SettledState, dict[str, nn.Parameter]]:
    import bitsandbytes

    named = {"weight": nn.Parameter(torch.linspace(-1, 1, 64 * 256).reshape(SHAPE))}
    library_class = getattr(bitsandbytes.optim, library_name)
    groups = [{"params": list(named.values()), "kind": library_name.removeprefix("Paged")}]
    return settled(library_class, groups, lr=1e-2), named


def train(optimizer: SettledState, named: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        named["weight"].grad = torch.randn(SHAPE, generator=draw)
        optimizer.step()


def resumed(library_name: str) -> tuple[SettledState, dict[str, nn.Parameter], dict[str, Any]]:
    """An optimizer that has loaded the state of another after three steps."""
    first, trained = build(library_name)
    train(first, trained, range(3))
    saved = named_optimizer_state(first, trained.items())
    optimizer, named = build(library_name)
    Marked(optimizer)
    with torch.no_grad():
        named["weight"].copy_(trained["weight"])
    optimizer.load_state_dict(optimizer_state_from_names(saved, optimizer, named.items()))
    return optimizer, named, saved["state"]["weight"]


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedLion32bit"])
def test_paged_state_is_loaded_into_the_librarys_own_buffers(name: str) -> None:
    """Lightning moves the state to the device between the load and the first step."""
    optimizer, named, saved = resumed(name)
    _optimizer_to_device(optimizer, torch.device("meta"))  # would lose whatever it finds
    optimizer.place_loaded_state()
    held = optimizer.state[named["weight"]]
    buffers = [value for key, value in held.items() if key.startswith("state")]
    assert len(buffers) == (2 if "Adam" in name else 1)
    assert all(hasattr(buffer, "is_paged_here") for buffer in buffers)
    assert held.keys() == saved.keys()
    assert torch.equal(held["state1"], saved["state1"])
    assert held["step"] == saved["step"] == 3


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedLion8bit", "AdamW8bit", "Lion32bit"])
def test_a_resumed_optimizer_goes_on_in_equal_bytes(name: str) -> None:
    uninterrupted, expected = build(name)
    train(uninterrupted, expected, range(5))
    optimizer, named, _ = resumed(name)
    train(optimizer, named, range(3, 5))
    assert torch.equal(named["weight"], expected["weight"])
    states = [
        named_optimizer_state(which, parameters.items())["state"]["weight"]
        for which, parameters in ((optimizer, named), (uninterrupted, expected))
    ]
    for key, value in states[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][key])), key


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "AdamW8bit"])
def test_state_that_was_loaded_and_never_stepped_can_be_saved(name: str) -> None:
    optimizer, named, saved = resumed(name)
    again = named_optimizer_state(optimizer, named.items())["state"]["weight"]
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in ("state1", "state2", "absmax1"))


def test_saved_state_does_not_change_when_training_goes_on() -> None:
    optimizer, named = build("PagedAdamW32bit")
    train(optimizer, named, range(1))
    saved = named_optimizer_state(optimizer, named.items())["state"]["weight"]
    before = saved["state1"].clone()
    train(optimizer, named, range(1, 3))
    assert torch.equal(saved["state1"], before)
