"""How a micro-batch becomes gradients, in as many pieces as memory asks for.

Losses are sums over tokens, so the gradients of the pieces add up to that of the whole. A try that
fails half-way has left part of its gradients behind: they are made apart from those that the step
has already, and join them when the whole micro-batch is through.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from qlora_pl.batch import FILLER_ROW
from qlora_pl.errors import TrainingStoppedError
from qlora_pl.modeling.base.encoder_decoder import language_model_loss
from qlora_pl.modeling.steps.loss import LossSum, trained_weight
from qlora_pl.modeling.steps.out_of_memory import (
    Split,
    batch_too_large,
    describe_split,
    free_memory,
    is_out_of_memory,
    num_tokens,
    row_too_large,
)
from qlora_pl.modeling.steps.splitting import split_batch

logger = logging.getLogger(__name__)

OnOutOfMemory = Literal["split", "stop"]
Result = TypeVar("Result")


class MicroBatchRunner:
    """Runs a module's micro-batches, and remembers how small their pieces must be.

    Args:
        on_oom: What a micro-batch that does not fit into memory comes to.
    """

    def __init__(self, on_oom: OnOutOfMemory) -> None:
        self.on_oom = on_oom
        self.num_pieces = 1
        """Pieces of a training micro-batch."""
        self.num_evaluation_pieces = 1
        """Pieces of a batch that is scored or answered."""
        self.num_splits = 0
        """Times that a training micro-batch was split anew, on all ranks since the run began."""
        self._new: list[Split] = []

    # -- training --------------------------------------------------------------------------------

    def add_gradients(self, module: Any, batch: Mapping[str, Any], number: int) -> LossSum:
        """Forward and backward; the batch's gradients are added to those of its step.

        Args:
            module: A ``QLoRAModule`` within its training step.
            batch: A micro-batch.
            number: Of the step, from 1.

        Raises:
            TrainingStoppedError: if it does not fit into memory, and cannot or may not be split.
        """
        parameters = _trained(module)
        if number == 1:
            _drop_gradients(parameters)  # of the step before
        if not self._may_split(module):
            return self._or_stop(module, batch, lambda: _run_pieces(module, batch, 1))
        before = self.num_pieces
        kept = [parameter.grad for parameter in parameters]
        state = _random_state(module.device)
        while True:
            _drop_gradients(parameters)
            loss = _unless_too_large(lambda: _run_pieces(module, batch, self.num_pieces))
            if loss is not None:
                break
            _drop_gradients(parameters)
            free_memory()
            self.num_pieces = self._more_pieces(module, batch, self.num_pieces)
            _restore(state, module.device)
        _add(kept, parameters)
        if self.num_pieces != before:
            self._note(module, batch, number, before)
        return loss

    def _note(self, module: Any, batch: Mapping[str, Any], number: int, before: int) -> None:
        self._new.append(
            Split(
                rank=module.global_rank,
                step=module.trainer.global_step + 1,
                micro_batch=number,
                num_rows=int((batch["row_ids"] != FILLER_ROW).sum()),
                num_tokens=num_tokens(batch),
                before=before,
                after=self.num_pieces,
            )
        )

    @property
    def num_new_splits(self) -> int:
        """Splits of this rank that the others do not know of yet."""
        return len(self._new)

    def agree(self, num_new_splits: float, module: Any) -> None:
        """Go on with the smallest pieces of all ranks; at the end of a step.

        Args:
            num_new_splits: Of all ranks in this step, as they have exchanged it.
            module: The ``QLoRAModule``.
        """
        if not num_new_splits:
            return
        splits = _gather(self._new, module.trainer.world_size)
        self._new = []
        self.num_splits += len(splits)
        self.num_pieces = max(self.num_pieces, *(split.after for split in splits))
        if module.trainer.is_global_zero:
            for split in splits:
                logger.warning("%s", describe_split(split, module, self.num_pieces))

    # -- evaluation ------------------------------------------------------------------------------

    def evaluate(
        self, module: Any, batch: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Result]
    ) -> list[Result]:
        """What ``run`` gives for a batch that is scored or answered, piece by piece.

        Args:
            module: A ``QLoRAModule``.
            batch: Any of ``qlora_pl.batch``.
            run: Called with each piece, without gradients; must change nothing.

        Raises:
            TrainingStoppedError: as ``add_gradients`` does.
        """
        if not self._may_split(module):
            return [self._or_stop(module, batch, lambda: run(batch))]
        state = _random_state(module.device)
        while True:
            pieces = split_batch(batch, self.num_evaluation_pieces)
            results = _unless_too_large(lambda: [run(piece) for piece in pieces])  # noqa: B023
            if results is not None:
                return results
            free_memory()
            before = self.num_evaluation_pieces
            self.num_evaluation_pieces = self._more_pieces(module, batch, before)
            _restore(state, module.device)
            logger.warning(
                "A batch of %d tokens did not fit into memory while evaluating; batches go through "
                "the model in %d pieces instead of %d from here on.",
                num_tokens(batch),
                self.num_evaluation_pieces,
                before,
            )

    def agree_on_evaluation(self, trainer: Any) -> None:
        """Go on with the smallest pieces of all ranks; at the end of a split."""
        if trainer.world_size > 1:
            own = torch.tensor(self.num_evaluation_pieces, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX)
            self.num_evaluation_pieces = int(own)

    # -- limits ----------------------------------------------------------------------------------

    def _may_split(self, module: Any) -> bool:
        # Ranks that share a model go through its layers together, however many pieces one needs.
        is_shared = getattr(module.trainer.strategy, "shards_parameters", False)
        return self.on_oom == "split" and not is_shared

    def _or_stop(self, module: Any, batch: Mapping[str, Any], run: Callable[[], Result]) -> Result:
        try:
            return run()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise TrainingStoppedError(batch_too_large(module, batch)) from error
            raise

    @staticmethod
    def _more_pieces(module: Any, batch: Mapping[str, Any], num_pieces: int) -> int:
        """Twice as many.

        Raises:
            TrainingStoppedError: if each piece is a single row already.
        """
        if len(split_batch(batch, 2 * num_pieces)) == len(split_batch(batch, num_pieces)):
            raise TrainingStoppedError(row_too_large(module, batch))
        return 2 * num_pieces

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """What a resumed run goes on with."""
        return {
            "num_pieces": self.num_pieces,
            "num_evaluation_pieces": self.num_evaluation_pieces,
            "num_splits": self.num_splits,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the pieces that a checkpoint's run had come to."""
        for name, value in state.items():
            setattr(self, name, value)


def _gather(own: list[Split], world_size: int) -> list[Split]:
    if world_size == 1:
        return own
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, own)
    return [split for splits in gathered for split in splits]


# -- one try ---------------------------------------------------------------------------------------


def _run_pieces(module: Any, batch: Mapping[str, Any], num_pieces: int) -> LossSum:
    """Forward and backward of each piece; the sum of what they add to their step."""
    pieces = split_batch(batch, num_pieces)
    normalize_by = module.normalize_loss_by
    whole = None
    if normalize_by == "micro_batches" and len(pieces) > 1:
        # The mean is the whole micro-batch's: pieces give sums, divided by what all of it counts.
        normalize_by, whole = "tokens", trained_weight(batch)
    losses = []
    for piece in pieces:
        loss = language_model_loss(module.model, piece, normalize_by)
        if whole is not None:
            loss = loss._replace(total=loss.total / (whole + (whole == 0)).to(loss.total.dtype))
        back_propagate(loss.total, module.trainer.precision_plugin)
        losses.append(loss._replace(total=loss.total.detach()))
    if len(losses) == 1:
        return losses[0]
    total = LossSum(*(torch.stack(parts).sum(dim=0) for parts in zip(*losses, strict=True)))
    return total if whole is None else total._replace(weight=(whole > 0).to(total.weight.dtype))


def back_propagate(total: Tensor, precision: Any) -> None:
    """Backward as Lightning would do it: scaled where float16 asks for it, and without autocast."""
    scaler = getattr(precision, "scaler", None)
    scaled: Any = total if scaler is None else scaler.scale(total)
    with torch.autocast(total.device.type, enabled=False):
        scaled.backward()


def _unless_too_large(run: Callable[[], Result]) -> Result | None:
    """What ``run`` gives, or None if memory ran out; nothing of the failed try is held then."""
    try:
        return run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


# -- gradients -------------------------------------------------------------------------------------


def _trained(module: Any) -> list[Tensor]:
    groups = [group for optimizer in module.trainer.optimizers for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"]]


def _drop_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _add(kept: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    """Join what the step had with what is new, in the order in which autograd would have."""
    for before, parameter in zip(kept, parameters, strict=True):
        if before is None:
            continue
        if parameter.grad is not None:
            before.add_(parameter.grad)
        parameter.grad = before


# -- random numbers --------------------------------------------------------------------------------


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), own


def _restore(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Begin as the failed try did: what the masks are then depends on the pieces alone."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
