"""Steps sharded parameters with an optimizer that knows plain tensors only.

bitsandbytes' kernels refuse DTensors. Its optimizers work on one weight at a time, or on one block
of 256, so each device steps its own shard: an inner optimizer holds parameters that share the
shards' memory, while schedules, clipping and Lightning see the DTensors of the outer one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qlora_pl.modeling.optimization.bitsandbytes_state import SettledState

Group = dict[str, Any]
MakeInner = Callable[[list[Group], dict[Tensor, tuple[int, ...]]], SettledState]


class ShardedOptimizer(Optimizer):
    """An optimizer over DTensors whose steps another one takes on this device's shards.

    ``param_groups`` are the settings; the inner optimizer follows them at every step. ``state`` is
    empty: what the inner one holds belongs to shards, and ``named_optimizer_state`` makes it whole.
    """

    def __init__(self, groups: list[Group], make_inner: MakeInner) -> None:
        """Take over parameters that are sharded already, all of them or some.

        Args:
            groups: Parameter groups, with all settings.
            make_inner: From the same groups over local shards, and the whole tensors' shapes by
                shard, to the optimizer that steps them.
        """
        # before torch adds its own keys to the groups
        inner_groups = [
            {**group, "params": [nn.Parameter(local_shard(p)) for p in group["params"]]}
            for group in groups
        ]
        super().__init__(groups, defaults={})
        self._shards: dict[Tensor, nn.Parameter] = {
            parameter: shard
            for group, inner in zip(self.param_groups, inner_groups, strict=True)
            for parameter, shard in zip(group["params"], inner["params"], strict=True)
        }
        shapes: dict[Tensor, tuple[int, ...]] = {
            shard: tuple(whole.shape) for whole, shard in self._shards.items()
        }
        self.inner = make_inner(inner_groups, shapes)
        self._share_settings(self.inner.param_groups, self.param_groups)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step every shard that has a gradient, after ``closure`` has made the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share_settings(self.param_groups, self.inner.param_groups)
        self.inner.place_loaded_state()
        for parameter, shard in self._shards.items():
            # FSDP2 replaces a shard's memory when parameters are moved or loaded
            shard.data = local_shard(parameter)
            shard.grad = None if parameter.grad is None else local_shard(parameter.grad)
        self._count_empty_shards()
        self.inner.step()
        for shard in self._shards.values():
            shard.grad = None  # the DTensor's, which zero_grad frees
        return loss

    def _count_empty_shards(self) -> None:
        """A device without a row of a tensor has the same keys of state as the others.

        Kernels are not asked to work on nothing.
        """
        for number, group in enumerate(self.inner.param_groups):
            for index, shard in enumerate(group["params"]):
                if shard.grad is None or shard.numel():
                    continue
                held = self.inner.state[shard]
                if not held:
                    init: Any = self.inner.init_state  # type: ignore[attr-defined]
                    init(group, shard, number, index)
                held["step"] += 1
                shard.grad = None

    def local_state(self, parameter: Tensor) -> dict[str, Any]:
        """What is kept for this device's shard of a parameter; empty before its first step."""
        self.inner.place_loaded_state()
        return self.inner.state.get(self._shards[parameter], {})

    def state_dict(self) -> dict[str, Any]:
        """The state of this device's shards: of use to the same layout only."""
        self.inner.place_loaded_state()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this device's shards, and the groups' settings.

        ``optimizer_state_from_names`` cuts it out of a checkpoint of any layout.
        """
        self.inner.load_state_dict(state_dict)
        self._share_settings(self.inner.param_groups, self.param_groups)

    @staticmethod
    def _share_settings(source: list[Group], target: list[Group]) -> None:
        for theirs, own in zip(source, target, strict=True):
            own.update({key: value for key, value in theirs.items() if key != "params"})


def local_shard(tensor: Tensor) -> Tensor:
    """This device's part of a tensor, in the same memory; all of a plain one."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain
