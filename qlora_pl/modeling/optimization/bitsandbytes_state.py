"""bitsandbytes' optimizers with two things settled: which state has 8 bits, and what is paged.

Which has 8 bits is ``state_precision``'s rule on whole tensors. What is paged the library decides
when it makes state, and forgets when it loads some (bitsandbytes #782, #1381: all of it becomes
ordinary GPU memory); here loaded state is copied into buffers that the library makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from qlora_pl.modeling.optimization.state_precision import keeps_8bit_state

MAY_BE_PAGED = ("state1", "state2")
"""Keys of state with one value for each weight: what is paged, if anything is."""


class SettledState(Optimizer):
    """Goes before one of bitsandbytes' optimizer classes; see ``settled``."""

    is_paged: bool
    """The library's: large state lies in memory that the GPU's driver moves to the host and back.
    torch takes such a tensor for one on the CPU."""
    full_shapes: Mapping[Tensor, tuple[int, ...]]
    """Shapes of the whole tensors whose shards are stepped; empty where they are whole."""
    _loaded: dict[Tensor, dict[str, Any]]
    """State from a checkpoint, on the host, that has no place yet."""

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The library's settings for one parameter, with the bits of its state."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        parameter = self.param_groups[gindex]["params"][pindex]
        if config["optim_bits"] == 8:
            shape = self.full_shapes.get(parameter, parameter.shape)
            config["optim_bits"] = 8 if keeps_8bit_state(shape) else 32
        config["min_8bit_size"] = 0  # the library would judge the shard
        return config

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state; a paged optimizer keeps it on the host until its first step.

        Lightning moves everything in ``state`` to the GPU right after loading, paged or not.
        """
        load: Any = super().load_state_dict
        load(state_dict, move_to_device=False)
        self._loaded = dict(self.state)
        self.state.clear()
        if not self.is_paged:
            self.place_loaded_state()

    def place_loaded_state(self) -> None:
        """Put loaded state where state that was made here would be: paged, or on the device."""
        shared: dict[int, Tensor] = {}  # the maps from bytes to values are those of all parameters
        for parameter, held in self._loaded.items():
            placed = self.state[parameter]
            for key, value in held.items():
                if key in MAY_BE_PAGED:
                    make: Any = self.get_state_buffer  # type: ignore[attr-defined]
                    placed[key] = make(parameter, dtype=value.dtype).copy_(value)
                elif isinstance(value, Tensor):
                    placed[key] = shared.setdefault(id(value), value.to(parameter.device))
                else:
                    placed[key] = value
        self._loaded = {}

    def step(self, closure: Any = None) -> Any:
        """Take a step, with loaded state in its place."""
        self.place_loaded_state()
        return super().step(closure)


def settled(
    library_class: Any,
    groups: list[dict[str, Any]],
    full_shapes: Mapping[Tensor, tuple[int, ...]] | None = None,
    **settings: Any,
) -> SettledState:
    """Build one of bitsandbytes' optimizers as a ``SettledState``.

    Args:
        library_class: From ``bitsandbytes.optim``; its name stays.
        groups: Parameter groups.
        full_shapes: Shapes of the whole tensors, by the shards in ``groups``; None: they are whole.
        settings: What the class is called with besides.
    """
    made = type(library_class.__name__, (SettledState, library_class), {})
    optimizer: SettledState = made(groups, **settings)
    optimizer.full_shapes = full_shapes or {}
    optimizer._loaded = {}
    return optimizer
