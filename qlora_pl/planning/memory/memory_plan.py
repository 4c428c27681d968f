"""``plan_memory``: what a run takes of each device's memory, component by component.

Everything that can be counted is counted; what is kept for the backward pass follows from the
operations of the model's family. A step has several moments at which memory can be fullest, and the
plan is of the fullest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qlora_pl.planning.memory.activations import Activations, activations
from qlora_pl.planning.memory.storage import StoredBytes, stored_bytes
from qlora_pl.planning.memory.trained import TrainedBytes, trained_bytes
from qlora_pl.planning.memory.training_setting import TrainingSetting
from qlora_pl.planning.shapes.model_shape import ModelShape

__all__ = ["COMPONENTS", "MemoryPlan", "TrainingSetting", "plan_memory"]

CONTEXT_BYTES = 600_000_000
"""Assumed for the CUDA context and the libraries' workspaces, outside of torch's allocator (0.5 to
0.8 GB on cards of the last years)."""
FRAGMENTATION = 0.05
"""Assumed share that the allocator holds and cannot use (with expandable segments; without them up
to twice as much)."""

COMPONENTS = {
    "packed_weights": "packed weights",
    "constants": "constants of the quantisation",
    "embeddings_and_head": "embeddings and head",
    "norms_and_other": "norms, biases and unquantised matrices",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "paged_optimizer_state": "optimizer state that can be paged",
    "activations": "activations",
    "logits_and_loss": "logits and loss",
    "dequantization": "dequantised matrix",
    "communication": "gathered layers and sums",
    "overhead": "CUDA context and fragmentation",
}
"""The components in their order, in words."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on the device that needs the most."""

    components: dict[str, int]
    """By the names of ``COMPONENTS``, at the fullest moment; they add up to ``total``."""
    moment: str
    """Which moment of a step that is."""
    moments: dict[str, dict[str, int]]
    """The same of every moment, without overhead."""
    activations: Activations
    """What a micro-batch keeps, with and without checkpointing."""
    num_trained: int
    """Trained weights."""
    host: dict[str, int] = field(default_factory=dict)
    """Bytes of host memory for each device, where the run keeps something there."""

    @property
    def total(self) -> int:
        """All components."""
        return sum(self.components.values())

    @property
    def before_overhead(self) -> int:
        """What the program itself asks for."""
        return self.total - self.components["overhead"]

    @property
    def pageable(self) -> int:
        """What the driver can move to the host when the device is full."""
        return self.components["paged_optimizer_state"]

    @property
    def allocated(self) -> int:
        """What torch's allocator counts (``max_memory_allocated``): paged state is not in it."""
        return self.before_overhead - self.pageable


def plan_memory(shape: ModelShape, setting: TrainingSetting) -> MemoryPlan:
    """Add up what one device needs.

    Args:
        shape: The model.
        setting: The run.

    Raises:
        ConfigurationError: if the adapters' modules are not the model's.
    """
    stored = stored_bytes(shape.parameters, setting, setting.num_shards)
    trained = trained_bytes(shape, setting)
    acts = activations(shape, setting)
    resident, host = _resident(stored, trained, acts, shape, setting)
    moments = _moments(resident, acts, setting)
    sums = {moment: sum(parts.values()) for moment, parts in moments.items()}
    fullest = max(sums, key=lambda moment: sums[moment])
    on_cuda = setting.device == "cuda"
    inside = sums[fullest] - moments[fullest]["paged_optimizer_state"]
    overhead = CONTEXT_BYTES + round(FRAGMENTATION * inside) if on_cuda else 0
    return MemoryPlan(
        components={**moments[fullest], "overhead": overhead},
        moment=fullest,
        moments=moments,
        activations=acts,
        num_trained=trained.num_parameters,
        host=host,
    )


def _resident(
    stored: StoredBytes,
    trained: TrainedBytes,
    acts: Activations,
    shape: ModelShape,
    setting: TrainingSetting,
) -> tuple[dict[str, int], dict[str, int]]:
    """What is there throughout a run, on the device and on the host."""
    is_whole = not setting.has_adapters  # the base is what is trained
    parts = {
        "packed_weights": stored.packed,
        "constants": stored.constants,
        "embeddings_and_head": stored.ends,
        "norms_and_other": stored.other,
        "adapters": 0 if is_whole else trained.weights,
        "gradients": trained.weights,
        "optimizer_state": trained.state,
        "paged_optimizer_state": trained.paged_state,
        "activations": 0,
        "logits_and_loss": 0,
        "dequantization": acts.dequantized,
        "communication": _gathered(shape, setting),
    }
    host: dict[str, int] = {}
    if setting.strategy == "fsdp2_offload":
        for name in (
            "packed_weights",
            "embeddings_and_head",
            "norms_and_other",
            "adapters",
            "gradients",
            "optimizer_state",
            "paged_optimizer_state",
        ):
            host[name], parts[name] = parts[name], 0
    return parts, host


def _gathered(shape: ModelShape, setting: TrainingSetting) -> int:
    """What devices hold beside their own parts while they exchange some.

    A layer and the next one, what lies outside of them, and the larger of embedding and head.
    """
    if not setting.is_shared or setting.num_devices == 1:
        return 0
    layers: dict[tuple[str, int], int] = {}
    outside, ends = 0, []
    for parameter in shape.parameters:
        one = stored_bytes((replace(parameter, layers=parameter.layers[:1]),), setting)
        size = one.total - one.constants
        if parameter.layers:
            for layer in parameter.layers:
                key = (parameter.name.partition("*")[0], layer)
                layers[key] = layers.get(key, 0) + size
        elif parameter.role in ("embedding", "head") and not shape.ties_head:
            ends.append(size)
        else:
            outside += size
    widest = max(layers.values())
    adapters = trained_bytes(shape, setting).weights * setting.num_devices // max(1, len(layers))
    # a layer's adapters are gathered with it, and its gradients are whole before they are summed
    return 2 * (widest + 2 * adapters) + max(ends, default=0) + outside


def _moments(
    resident: dict[str, int], acts: Activations, setting: TrainingSetting
) -> dict[str, dict[str, int]]:
    """The moments at which memory can be fullest, of a step's last micro-batch."""
    again = setting.gradient_checkpointing
    of_layers = acts.inputs if again else acts.layers
    beside = acts.shared + (acts.held_masks if again else 0)
    kept = sum(of_layers) + beside + acts.ends
    peak = acts.layer_peak - acts.dequantized
    last, first = of_layers[-1], of_layers[0]
    # a layer whose activations are computed again has its input besides
    of_last, of_first = (peak + last, peak + first) if again else (peak, peak)
    whole = resident["gradients"]
    before = whole if setting.num_micro_batches > 1 else 0
    # gradients of a micro-batch are made beside those that its step has already
    is_apart = setting.splits_on_oom and not setting.is_shared
    new = whole if is_apart or not before else 0
    until_first = new - new // len(of_layers)
    return {
        "the loss": resident
        | {
            "gradients": before,
            "activations": kept,
            "logits_and_loss": acts.logits_peak,
            "dequantization": 0,
        },
        "the last layer's backward": resident
        | {"gradients": before, "activations": sum(of_layers[:-1]) + beside + of_last},
        "the first layer's backward": resident
        | {"gradients": before + until_first, "activations": beside + of_first},
        "the end of the backward": resident | {"gradients": before + new, "dequantization": 0},
        "the optimizer's step": resident
        | {
            "gradients": whole,
            "dequantization": 0,
            # in ddp all gradients are copied into a few tensors that are summed at once
            "communication": whole if setting.strategy == "ddp" else resident["communication"],
        },
    }
