"""``AdapterDDP``: every device holds the whole frozen base, and only adapters' gradients travel.

torch's DistributedDataParallel sends all parameters and buffers of rank 0 to the others when it is
made, packed base included, and all buffers again at forwards. Here the base is the same on every
rank because each has loaded the same files, so nothing is wrapped: gradients are added up once a
step, and what is trained is compared before the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_pl.errors import TrainingStoppedError

BUCKET_BYTES = 25_000_000
"""Gradients that travel together, as in torch's own: large enough for the link, small to copy."""


class AdapterDDP(DDPStrategy):
    """One process a device; gradients of trained tensors are summed over all once a step.

    Args:
        settings: Those of Lightning's ``DDPStrategy`` that do not belong to torch's wrapper:
            ``timeout``, ``process_group_backend``, ``start_method``, ``cluster_environment``.
    """

    sums_gradients = True
    """Gradients of a step are the sum over ranks; other strategies are refused."""

    def setup(self, trainer: Trainer) -> None:
        """Place the model and make its optimizer, without a wrapper and without a broadcast."""
        Strategy.setup(self, trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        return model

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Step with the gradients of all ranks.

        They are added up when the step's last micro-batch is done, before a loss scaler looks for
        overflows in them: else one rank would leave out a step that the others take.
        """

        def with_all_ranks() -> Any:
            result = closure()
            if self.world_size > 1:
                sum_gradients([p for group in optimizer.param_groups for p in group["params"]])
            return result

        return super().optimizer_step(optimizer, with_all_ranks, model, **kwargs)

    def on_train_start(self) -> None:
        """Compare what is about to be trained; a checkpoint has been loaded by now."""
        self._refuse_unequal_ranks()

    def on_validation_start(self) -> None:
        """Compare what is about to be scored, where nothing is trained."""
        module: Any = self.lightning_module
        if module.trainer.state.fn != TrainerFn.FITTING:
            self._refuse_unequal_ranks()

    on_test_start = on_predict_start = on_validation_start

    def _refuse_unequal_ranks(self) -> None:
        module: Any = self.lightning_module
        if self.world_size > 1:
            refuse_unequal_ranks(module.trained_tensors())


def sum_gradients(parameters: Sequence[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """Replace each parameter's gradient by its sum over ranks.

    A parameter that has none here (an expert that no token went to) counts as zero, and keeps none
    if no rank has one: an optimizer leaves such a parameter alone, as in a single process.

    Args:
        parameters: The same on every rank, in the same order.
        bucket_bytes: Of gradients that are copied into one tensor and sent together.
    """
    sent = []
    for bucket in _buckets(parameters, bucket_bytes):
        flat = _flatten(bucket)
        sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in sent:
        work.wait()
        _spread(flat, bucket)


def _buckets(parameters: Iterable[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Parameters of one type and device, in their order, up to so many bytes at a time."""
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for parameter in alike:
            num_bytes = parameter.numel() * parameter.element_size()
            if bucket and size + num_bytes > bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += num_bytes
        yield bucket


def _flatten(bucket: Sequence[Tensor]) -> Tensor:
    """All gradients one after the other, and at the end 1 for each parameter that has one."""
    has_gradient = bucket[0].new_tensor([p.grad is not None for p in bucket])
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    return torch.cat([*(gradient.reshape(-1) for gradient in flat), has_gradient])


def _spread(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    *sums, numbers = flat.split([*(p.numel() for p in bucket), len(bucket)])
    for place, (parameter, total) in enumerate(zip(bucket, sums, strict=True)):
        if parameter.grad is not None:
            parameter.grad.copy_(total.view_as(parameter))
        elif numbers[place] > 0:
            parameter.grad = total.view_as(parameter).clone()


def refuse_unequal_ranks(tensors: Mapping[str, Tensor]) -> None:
    """Every rank must start from the same values, since only gradients are exchanged.

    Args:
        tensors: What is trained, by name.

    Raises:
        TrainingStoppedError: on every rank, naming the first tensor that differs.
    """
    own = {name: _digest(tensor) for name, tensor in tensors.items()}
    whole = hashlib.sha256(repr(own).encode()).hexdigest()
    if len(set(_gather(whole))) == 1:
        return
    first, *others = _gather(own)
    for rank, digests in enumerate(others, start=1):
        names = [name for name in first | digests if first.get(name) != digests.get(name)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise TrainingStoppedError(
                f"trainer.strategy: rank {rank} starts from other values than rank 0 in "
                f"'{names[0]}'{more}, so their gradients could not be added; give every process "
                "the same seed_everything, base, adapter and checkpoint."
            )


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    shape = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(shape + data.numpy().tobytes()).hexdigest()
