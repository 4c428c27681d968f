"""The same steps on one process and on 2 or 4 that share every tensor; checkpoints between them.

Reference throughout: one process that was never interrupted, in equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_processes
from optimizer_steps import (
    CONFIGS,
    IN_8_BITS,
    SHAPES,
    STEPS,
    Adapters,
    build,
    fit,
    resume,
    snapshot,
    take_steps,
    train,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qlora_pl.modeling.optimization.gradients import total_norm
from qlora_pl.modeling.optimization.optimizers import optimizer_state_bytes
from qlora_pl.modeling.optimization.sharded_optimizer import ShardedOptimizer

PROGRAM = Path(__file__).parent / "optimizer_steps.py"
every_optimizer = pytest.mark.parametrize("name", CONFIGS)
number_of_devices = pytest.mark.parametrize(
    "devices", [2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"], indirect=True
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process saved, before the move and at the end."""
    folder = tmp_path_factory.mktemp("alone")
    for name in CONFIGS:
        train(name, folder)
    return folder


@pytest.fixture(scope="module")
def devices(request: Any, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 2 or 4 processes saved: of whole runs, and of runs that ``alone`` had begun."""
    folder = tmp_path_factory.mktemp(f"devices{request.param}")
    run_processes(PROGRAM, request.param, {"folder": str(folder), "moved_from": str(alone)})
    return folder


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal structure, types, shapes and bytes."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    else:
        assert found == expected, where


def load(file: Path) -> Any:
    return torch.load(file, weights_only=True)


@every_optimizer
@number_of_devices
def test_shards_take_the_steps_of_one_process_and_are_saved_as_its_tensors(
    devices: Path, alone: Path, name: str
) -> None:
    for moment in (".pt", ".end.pt"):
        found, expected = (load(f / (name + moment)) for f in (devices / "train", alone))
        assert_same(found, expected)
        if "8bit" in name:
            held = {n: s["state1"].dtype for n, s in found["optimizer"]["state"].items()}
            assert {n for n, dtype in held.items() if dtype == torch.uint8} == IN_8_BITS


@every_optimizer
@number_of_devices
def test_a_checkpoint_of_one_process_goes_on_in_shards(
    devices: Path, alone: Path, name: str
) -> None:
    assert_same(load(devices / "resume" / f"{name}.pt"), load(alone / f"{name}.pt"))
    assert_same(load(devices / "resume" / f"{name}.end.pt"), load(alone / f"{name}.end.pt"))


@every_optimizer
@number_of_devices
def test_a_checkpoint_of_shards_goes_on_in_one_process(
    devices: Path, alone: Path, name: str, tmp_path: Path
) -> None:
    resume(name, devices / "train", tmp_path)
    assert_same(load(tmp_path / f"{name}.end.pt"), load(alone / f"{name}.end.pt"))


@every_optimizer
@number_of_devices
def test_each_device_holds_its_share_of_the_state_and_no_more(devices: Path, name: str) -> None:
    """After a resume too: a view would keep the whole tensor that it was cut from."""
    everyones = torch.load(devices / "facts.pt", weights_only=False)
    config, number = CONFIGS[name], len(everyones)
    first = optimizer_state_bytes(config, SHAPES.values(), num_shards=number)
    for what in ("train", "resume"):
        held = [facts[f"{what} {name}"]["bytes"] for facts in everyones]
        assert held[0] == max(held) == first
        if first:
            assert held[-1] < first  # fewer rows of some, none of others
    if "8bit" in name:
        assert all(facts[f"resume {name}"]["in 8 bits"] == IN_8_BITS for facts in everyones)


@number_of_devices
def test_what_is_stepped_is_the_parameters_own_memory(devices: Path) -> None:
    for facts in torch.load(devices / "facts.pt", weights_only=False):
        for key, found in facts.items():
            for name, is_same in found.get("aliases", {}).items():
                assert is_same, (key, name)


@number_of_devices
def test_a_device_without_a_row_of_a_tensor_counts_its_steps_too(devices: Path) -> None:
    for facts in torch.load(devices / "facts.pt", weights_only=False):
        counted = [found["steps"] for found in facts.values() if "steps" in found]
        assert counted
        assert all(steps == {STEPS} for steps in counted)


@pytest.mark.parametrize("offloaded", ["", "offloaded "])
@pytest.mark.parametrize("name", ["paged_adamw_32bit", "adamw_torch"])
@number_of_devices
def test_real_gradients_clipped_beside_a_whole_parameter_train_the_same_weights(
    devices: Path, name: str, offloaded: str
) -> None:
    """1e-6: a norm over shards adds its squares in another order (measured: 8e-8 of it)."""
    expected = fit(name)
    for facts in torch.load(devices / "facts.pt", weights_only=False):
        for key, value in facts[f"fit {offloaded}{name}"].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


@pytest.fixture
def one_device() -> Iterator[None]:
    """A process group of this process alone: DTensors without other processes."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def sharded(one_device: None) -> tuple[Adapters, ShardedOptimizer]:
    module, optimizer = build("adamw_8bit", lambda module: fully_shard(module) and None)
    assert isinstance(optimizer, ShardedOptimizer)
    return module, optimizer


def test_the_optimizer_follows_when_the_parameters_memory_is_replaced(
    sharded: tuple[Adapters, ShardedOptimizer],
) -> None:
    module, optimizer = sharded
    take_steps(optimizer, module, range(1))
    before = {n: p.to_local().data_ptr() for n, p in module.named().items()}
    module.double().float()
    assert all(p.to_local().data_ptr() != before[n] for n, p in module.named().items())
    take_steps(optimizer, module, range(1, 5))
    expected, reference = build("adamw_8bit", None)
    take_steps(reference, expected, range(5))
    for name, parameter in module.named().items():
        assert torch.equal(parameter.full_tensor(), expected.named()[name]), name


def test_a_parameter_without_a_gradient_is_left_alone(
    sharded: tuple[Adapters, ShardedOptimizer],
) -> None:
    module, optimizer = sharded
    (skipped, parameter), *others = module.named().items()
    before = parameter.full_tensor().clone()
    for name, other in others:
        other.grad = torch.ones_like(other)
        assert isinstance(other.grad, DTensor), name
    optimizer.step()
    assert torch.equal(parameter.full_tensor(), before)
    assert snapshot(optimizer, module)["optimizer"]["state"].keys() == SHAPES.keys() - {skipped}


def test_the_state_of_a_devices_own_shards_goes_through_state_dict(
    sharded: tuple[Adapters, ShardedOptimizer],
) -> None:
    module, optimizer = sharded
    take_steps(optimizer, module, range(2))
    before = snapshot(optimizer, module)["optimizer"]
    saved = deepcopy(optimizer.state_dict())
    take_steps(optimizer, module, range(2, 3))
    optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer, module)["optimizer"], before)


def test_a_gradient_that_is_no_number_is_seen_in_the_norm_of_shards(
    sharded: tuple[Adapters, ShardedOptimizer],
) -> None:
    module, _ = sharded
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [parameter.grad for parameter in module.parameters()]
    assert total_norm(gradients) == pytest.approx(sum(g.numel() for g in gradients) ** 0.5)
    gradients[2].to_local()[0, 0] = torch.nan
    assert total_norm(gradients) != total_norm(gradients)
    gradients[2].to_local()[0, 0] = torch.inf
    assert total_norm(gradients) == torch.inf
