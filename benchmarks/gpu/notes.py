"""``Notes``: what a run of the command line says of itself, beside the files that it leaves.

Named under ``trainer.callbacks`` of a check's runs. The digest of the packed bytes is a SHA-256 of
whole tensors, which knows nothing of the checksum that the runs themselves keep.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from qlora_pl.modeling.loading.packed_model import decoding_tensors
from qlora_pl.modeling.sharding import is_sharded, whole


class Notes(Callback):
    """Writes ``notes-RANK.json`` after every step: losses, seconds, memory, the base, the state.

    Args:
        folder: Where to.
        digests: Whether all packed bytes are hashed, before the first step and after the last.
    """

    def __init__(self, folder: str, digests: bool = True) -> None:
        self.folder = Path(folder)
        self.digests = digests
        self.noted: dict[str, Any] = {"steps": []}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Start the clock; weights are not loaded yet."""
        self._began = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The model is there."""
        self.noted["loading_seconds"] = time.perf_counter() - self._began
        self.noted["loading_peak_bytes"] = _peak_bytes(pl_module.device)
        self.noted["device"] = str(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the base as it is before the first step."""
        self.noted["base_bytes"] = base_bytes(pl_module.model)
        self.noted["packed_types"] = packed_types(pl_module.model)
        if self.digests:
            self.noted["packed_before"] = packed_digest(pl_module.model)
        self._step = trainer.global_step
        self._last = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """What the step begins with."""
        if pl_module.device.type == "cuda":
            self._held = torch.cuda.memory_allocated(pl_module.device)
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """A step, if this was its last micro-batch."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now, step = time.perf_counter(), pl_module.last_step
        self.noted["steps"].append(
            {
                "step": trainer.global_step,
                "loss": step.loss,
                "norm": step.grad_norm,
                "tokens": step.num_tokens,
                "seconds": now - self._last,
                "held_bytes": getattr(self, "_held", None),
                "peak_bytes": _peak_bytes(pl_module.device),
            }
        )
        self._last = now
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the base and the optimizer's state as they are after the last step."""
        if self.digests:
            self.noted["packed_after"] = packed_digest(pl_module.model)
        self.noted["state"] = describe_state(trainer.optimizers[0])
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"notes-{trainer.global_rank}.json"
        path.write_text(json.dumps(self.noted, indent=1))


class MemoryCap(Callback):
    """From one step on allows less memory than a step takes, so that a real error comes.

    Args:
        step: From 1.
        num_bytes: That torch's allocator may hold.
        rehearsed_rows: On a CPU, the rows of a pass from which on the same error is raised by hand.
    """

    def __init__(self, step: int, num_bytes: int = 0, rehearsed_rows: int = 0) -> None:
        self.step, self.num_bytes, self.rehearsed_rows = step, num_bytes, rehearsed_rows
        self._is_set = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Set it, once."""
        if self._is_set or trainer.global_step + 1 < self.step:
            return
        self._is_set = True
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
            torch.cuda.empty_cache()  # what is held already may be used again
            total = torch.cuda.get_device_properties(pl_module.device).total_memory
            torch.cuda.set_per_process_memory_fraction(self.num_bytes / total, pl_module.device)
        else:
            pl_module.model.register_forward_pre_hook(self._refuse, with_kwargs=True)

    def _refuse(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and len(kwargs["input_ids"]) >= self.rehearsed_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _packed(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights in four bits, in the order of their names."""
    named = sorted(model.named_parameters())
    return {name: p for name, p in named if getattr(p, "quant_state", None) is not None}


def packed_types(model: nn.Module) -> dict[str, int]:
    """How many packed tensors there are of each type."""
    return dict(Counter(str(parameter.dtype) for parameter in _packed(model).values()))


def packed_digest(model: nn.Module) -> str:
    """SHA-256 over all packed bytes; of a base that is cut, all processes call this together."""
    found = hashlib.sha256()
    for parameter in _packed(model).values():
        data = whole(parameter.data).cpu().contiguous().flatten().view(torch.uint8)
        found.update(data.numpy().tobytes())
    return found.hexdigest()


def base_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the whole model on this process by what they are."""
    sizes: Counter[str] = Counter()
    packed = _packed(model)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if is_sharded(parameter) else parameter
        kind = "packed" if name in packed else "adapters" if "lora_" in name else "unquantised"
        sizes[kind] += _size(local)
    for name, parameter in packed.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        sizes["constants"] += sum(_size(held) for _, held in decoding_tensors(owner, parameter))
    sizes["packed_weights"] = sum(p.quant_state.shape.numel() for p in packed.values())
    return dict(sizes)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def describe_state(optimizer: Any) -> dict[str, Any]:
    """Of the optimizer's large state: types, and how much of it is paged."""
    held = getattr(optimizer, "optimizer", optimizer)
    held = getattr(held, "_optimizer", held)
    tensors = [
        (parameter.numel(), state[key])
        for parameter, state in held.state.items()
        for key in ("state1", "state2")
        if isinstance(state.get(key), Tensor)
    ]
    paged = [tensor for _, tensor in tensors if getattr(tensor, "is_paged", False)]
    return {
        "tensors": len(tensors),
        "types": dict(Counter(str(tensor.dtype) for _, tensor in tensors)),
        "large_tensors": sum(size >= 1e5 for size, _ in tensors),
        "paged_tensors": len(paged),
        "paged_bytes": sum(_size(tensor) for tensor in paged),
    }
