"""Steps of every optimizer from given gradients, on whole tensors and on shards of them.

As a program it is one device of several: ``python optimizer_steps.py SETTINGS``, with the rank in
the environment. Settings: ``folder`` to write to, ``moved_from`` with what another layout saved.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qlora_pl.modeling.optimization.gradients import scale_gradients, total_norm
from qlora_pl.modeling.optimization.optimizer_state import (
    named_optimizer_state,
    optimizer_state_from_names,
)
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, build_optimizer
from qlora_pl.modeling.optimization.sharded_optimizer import ShardedOptimizer, local_shard

Shard = Callable[[nn.Module], None]

SHAPES = {
    "layer.lora_A.default.weight": (32, 512),
    # 8-bit, though 639 * 32 is no multiple of 256: every cut is
    "layer.lora_B.default.weight": (639, 32),
    # float32 in every layout: its half of 301 * 32 elements ends within a block
    "other.lora_B.default.weight": (601, 32),
    # 8-bit; the last of four devices has no row
    "other.lora_A.default.weight": (3, 8192),
    # 8-bit, within one row, which only the first device has; its last block is short
    "row.lora_A.default.weight": (1, 5000),
    # float32 as too small; only the first device has a row
    "one.lora_A.default.weight": (1, 64),
    "layer.norm.weight": (512,),
}
IN_8_BITS = {
    "layer.lora_A.default.weight",
    "layer.lora_B.default.weight",
    "other.lora_A.default.weight",
    "row.lora_A.default.weight",
}
CONFIGS = {
    "paged_adamw_32bit": OptimizerConfig(name="paged_adamw_32bit", lr=1e-2, weight_decay=0.1),
    "paged_adamw_8bit": OptimizerConfig(name="paged_adamw_8bit", lr=1e-2, lora_plus_ratio=4),
    "paged_lion_32bit": OptimizerConfig(name="paged_lion_32bit", lr=1e-3, weight_decay=0.1),
    "paged_lion_8bit": OptimizerConfig(name="paged_lion_8bit", lr=1e-3, betas=(0.9, 0.99)),
    "adamw_32bit": OptimizerConfig(name="adamw_32bit", lr=1e-2, lora_plus_ratio=4),
    "adamw_8bit": OptimizerConfig(name="adamw_8bit", lr=1e-2, weight_decay=0.1),
    "lion": OptimizerConfig(name="lion", lr=1e-3),
    "sgd": OptimizerConfig(name="sgd", lr=1e-2),
    "sgd_momentum": OptimizerConfig(name="sgd", lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adamw_torch": OptimizerConfig(name="adamw_torch", lr=1e-2, weight_decay=0.1),
}
MOVED_AFTER, STEPS = 3, 5


class Adapters(nn.Module):
    """The tensors of ``SHAPES``, the same in every process."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.names = list(SHAPES)
        for number, shape in enumerate(SHAPES.values()):
            value = torch.rand(shape, generator=draw) * 2 - 1
            self.register_parameter(f"p{number}", nn.Parameter(value))

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by the names of ``SHAPES``."""
        return dict(zip(self.names, self.parameters(), strict=True))


def gradient(name: str, step: int) -> Tensor:
    """Whole; the same in every process."""
    draw = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=draw)


def take_steps(optimizer: Optimizer, module: Adapters, steps: Iterable[int]) -> None:
    """Train from the given gradients; each rank sees its part of them. The rate falls on the way.

    Gradients are made in a closure, as Lightning makes them.
    """

    def make_gradients(step: int) -> None:
        for name, parameter in module.named().items():
            parameter.grad = like(gradient(name, step), parameter)

    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step(partial(make_gradients, step))


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return whole
    rows = -(-len(whole) // parameter.device_mesh.size())
    start = min(len(whole), rows * parameter.device_mesh.get_local_rank())
    return DTensor.from_local(
        whole[start : start + rows].clone(),
        parameter.device_mesh,
        parameter.placements,
        shape=whole.shape,
        stride=whole.stride(),
    )


def snapshot(optimizer: Optimizer, module: Adapters) -> dict[str, Any]:
    """Weights and optimizer state, whole, on the first rank."""
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named().items()
    }
    state = named_optimizer_state(optimizer, module.named().items())
    return {"weights": weights, "optimizer": state}


def restore(saved: dict[str, Any], optimizer: Optimizer, module: Adapters) -> None:
    """Continue from a snapshot of any layout."""
    with torch.no_grad():
        for name, parameter in module.named().items():
            parameter.copy_(like(saved["weights"][name], parameter))
    named = module.named().items()
    optimizer.load_state_dict(optimizer_state_from_names(saved["optimizer"], optimizer, named))


def train(name: str, folder: Path, shard: Shard | None = None) -> dict[str, Any]:
    """All steps in one layout; what came of it.

    Writes ``NAME.pt``, after the steps that come before a move, and ``NAME.end.pt`` to ``folder``.
    """
    module, optimizer = build(name, shard)
    take_steps(optimizer, module, range(MOVED_AFTER))
    save(snapshot(optimizer, module), folder / f"{name}.pt")
    take_steps(optimizer, module, range(MOVED_AFTER, STEPS))
    save(snapshot(optimizer, module), folder / f"{name}.end.pt")
    return facts(optimizer, module)


def resume(name: str, moved_from: Path, folder: Path, shard: Shard | None = None) -> dict[str, Any]:
    """The last steps, from what another layout saved to ``moved_from``; writes ``NAME.end.pt``."""
    module, optimizer = build(name, shard)
    saved = torch.load(moved_from / f"{name}.pt", weights_only=True)
    restore(saved, optimizer, module)
    save(snapshot(optimizer, module), folder / f"{name}.pt")
    take_steps(optimizer, module, range(MOVED_AFTER, STEPS))
    save(snapshot(optimizer, module), folder / f"{name}.end.pt")
    return facts(optimizer, module)


def build(name: str, shard: Shard | None) -> tuple[Adapters, Optimizer]:
    module = Adapters()
    if shard:
        shard(module)
    return module, build_optimizer(CONFIGS[name], module.named().items())


def save(snapshot: dict[str, Any], file: Path) -> None:
    """On the first rank; the others have nothing to write."""
    if os.environ.get("RANK", "0") == "0":
        file.parent.mkdir(exist_ok=True)
        torch.save(snapshot, file)
    else:
        assert snapshot["optimizer"]["state"] == {}


def facts(optimizer: Optimizer, module: Adapters) -> dict[str, Any]:
    """What this device holds."""
    found: dict[str, Any] = {"bytes": state_storage_bytes(optimizer)}
    if isinstance(optimizer, ShardedOptimizer):
        found["in 8 bits"] = {
            name
            for name, p in module.named().items()
            if optimizer.local_state(p)["state1"].dtype == torch.uint8
        }
        found["steps"] = {optimizer.local_state(p)["step"] for p in module.parameters()}
        found["aliases"] = {
            name: optimizer._shards[p].data_ptr() == local_shard(p).data_ptr()
            for name, p in module.named().items()
        }
    return found


def state_storage_bytes(optimizer: Optimizer) -> int:
    """Bytes of the storages that hold this device's state, each storage counted once."""
    state = getattr(optimizer, "inner", optimizer).state
    values = [value for held in state.values() for value in held.values()]
    storages = [local_shard(v).untyped_storage() for v in values if isinstance(v, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Model(nn.Module):
    """Trained tensors in a layer and in the root, which FSDP2 treats differently."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(64, 96)
        self.head = nn.Linear(96, 3)
        self.replicated = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh()).square().sum()


def fit(name: str, shard: Shard | None = None, num_steps: int = 3) -> dict[str, Any]:
    """Train with real gradients, clipped, beside a parameter that is not sharded.

    All devices see the same rows, so that their mean is the gradient of one device.
    """
    model = Model()
    replicated = model.replicated
    if shard:
        shard(model)
    trained = {n: p for n, p in model.named_parameters() if p is not replicated}
    optimizer = build_optimizer(CONFIGS[name], trained.items())
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    norms = []
    for _ in range(num_steps):
        model(rows).backward()
        replicated.grad = torch.full((3,), 5.0)
        gradients = [p.grad for p in (*trained.values(), replicated)]
        norms.append(total_norm(gradients))
        scale_gradients(gradients, min(1.0, 0.3 / norms[-1]))
        norms.append(total_norm(gradients))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(rows)
        if shard:
            model.reshard()  # type: ignore[operator]  # a forward leaves the root unsharded
    return {"norms": norms} | {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in trained.items()
    }


def main(settings: dict[str, Any]) -> None:
    """One device of several; what the devices found goes to ``facts.pt``."""
    torch.distributed.init_process_group("gloo")
    world_size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    folder = Path(settings["folder"])

    def shard(module: nn.Module, **policy: Any) -> None:
        left_out = {module.replicated} if isinstance(module, Model) else None
        if isinstance(module, Model):
            fully_shard(module.layer, mesh=mesh, **policy)
        fully_shard(module, mesh=mesh, ignored_params=left_out, **policy)

    def offloaded(module: nn.Module) -> None:
        shard(module, offload_policy=CPUOffloadPolicy(pin_memory=False))

    found: dict[str, Any] = {}
    for name in CONFIGS:
        found[f"train {name}"] = train(name, folder / "train", shard)
        moved_from = Path(settings["moved_from"])
        found[f"resume {name}"] = resume(name, moved_from, folder / "resume", shard)
    for name in ("paged_adamw_32bit", "adamw_torch"):
        found[f"fit {name}"] = fit(name, shard)
        found[f"fit offloaded {name}"] = fit(name, offloaded)
    everyones: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyones, found)
    if torch.distributed.get_rank() == 0:
        torch.save(everyones, folder / "facts.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
