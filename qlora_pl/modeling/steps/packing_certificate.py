"""Whether a loaded model keeps packed rows apart, asked of the model itself before training.

Rows of a pack must neither see each other nor count their positions on from each other. Whether
they do depends on the family, on its attention kernel and on transformers' version, and where they
do not there is no error: so rows of the run are put through the model packed and one by one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_pl.batch import Batch, PackingProbe
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.evaluation_mode import evaluation_mode
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.modeling.steps.loss import causal_lm_loss

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
"""What two ways of computing the same may be apart, as a share of the logits' spread (or of the
gradient's norm), by the type of the products. Families that keep rows apart: 1e-6 at most in
float32, through thirty layers 3e-5; those that do not: 0.19 at least."""
HALF_TOLERANCE = 0.1
"""The same in 16 bits, where rounding alone is up to 0.02 (thirty layers of SmolLM2)."""


class PackingLeak(NamedTuple):
    """How far packed rows are from rows on their own, each as a share of what it is part of."""

    seen: float
    """What other rows' tokens change in a row's logits, at the worst token; 0 if it does not see
    them."""
    logits: float
    """What packing changes in a row's logits, beyond twice what padding does by rounding."""
    gradient: float
    """What packing changes in the gradient of all trained tensors."""


def settle_packing(module: Any, trainer: Any) -> None:
    """Tell the data module whether to pack, where it has been asked to.

    Args:
        module: A ``QLoRAModule`` whose model is loaded.
        trainer: Its trainer; only a fit packs rows.

    Raises:
        ConfigurationError: if ``data.packing`` is on and the model mixes rows.
    """
    data = getattr(trainer, "datamodule", None)
    asked = getattr(data, "packing", False)
    if data is None or asked is False or trainer.state.fn != "fit":
        return
    with trainer.precision_plugin.forward_context():
        problem = packing_problem(module.model, data.packing_probe(), module.base.compute_dtype)
    is_packed = trainer.strategy.reduce_boolean_decision(problem is None, all=True)
    problem = problem or "the model mixes packed rows on another device"
    if asked is True and not is_packed:
        raise ConfigurationError(f"data.packing: {problem}; set it to false, or to auto.")
    if not is_packed:
        logger.warning("data.packing: rows are padded, since %s.", problem)
    data.decide_packing(is_packed)


def packing_problem(model: nn.Module, probe: PackingProbe, dtype: torch.dtype) -> str | None:
    """One clause on why this model's rows cannot be packed, or None.

    Leaves the model as it was: modes, gradients and random states.

    Args:
        model: A causal LM with tensors that are trained.
        probe: From the data module.
        dtype: Of the model's products, which sets the tolerance.
    """
    adapted: Any = model
    base = adapted.get_base_model() if hasattr(model, "get_base_model") else adapted
    family = type(base).__name__
    if base.config.is_encoder_decoder:
        return f"{family} reads prompts in an encoder of its own, where rows cannot be packed"
    tolerance = TOLERANCES.get(dtype, HALF_TOLERANCE)
    try:
        leak = measure_leak(model, probe, tolerance)
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{family} cannot be run on packed rows ({reason})"
    if not all(map(math.isfinite, leak)):
        return f"{family} gives logits or gradients of packed rows that are not numbers"
    if leak.seen > tolerance:
        return (
            f"{family} lets a packed row see the others (they move its logits by {leak.seen:.2g} "
            "of their spread)"
        )
    if leak.logits > tolerance:
        return (
            f"{family} computes something else for a packed row (its logits are {leak.logits:.2g} "
            "of their spread from those of the row alone)"
        )
    if leak.gradient > tolerance:
        return (
            f"{family}'s gradients of packed rows are {leak.gradient:.2g} of their norm from those "
            "of the rows alone"
        )
    return None


def measure_leak(
    model: nn.Module, probe: PackingProbe, enough: float = float("inf")
) -> PackingLeak:
    """Run rows packed, packed beside other tokens, and one by one.

    Args:
        model: A causal LM with tensors that are trained.
        probe: The rows.
        enough: Logits further apart than this end it; the gradient's share then is 0.
    """
    device = next(model.parameters()).device
    packed, apart = _to(probe.packed, device), [_to(batch, device) for batch in probe.apart]
    with evaluation_mode(model):
        with torch.no_grad():
            whole = _logits(model, packed)
            changed = _logits(model, _change_first_rows(packed, _num_embeddings(model)))
            spans = list(_spans(packed))
            later = [span for span in spans if span.start]
            seen = _largest(_worst(changed[s.line, s.place], whole[s.line, s.place]) for s in later)
            padded = _logits(model, _to(probe.padded, device))
            distances = []
            for row, (span, batch) in enumerate(zip(spans, apart, strict=True)):
                alone = _logits(model, batch)[0, : span.length]
                rounding = _distance(padded[row, : span.length], alone)
                packing = _distance(whole[span.line, span.place], alone)
                distances.append(packing - 2 * rounding)
            logits = _largest(distances)
        if not (seen <= enough and logits <= enough):
            return PackingLeak(seen, logits, 0.0)
        with _recomputing(model):
            gradient = _gradient_distance(model, packed, apart)
    return PackingLeak(seen, logits, gradient)


class _Span(NamedTuple):
    """Where a row of a packed batch is."""

    line: int
    start: int
    length: int

    @property
    def place(self) -> slice:
        """Of its tokens within the line."""
        return slice(self.start, self.start + self.length)


def _spans(packed: Mapping[str, Any]) -> Iterator[_Span]:
    rows_per_line = len(packed["row_ids"]) // len(packed["input_ids"])
    start = 0
    for number, length in enumerate(packed["document_lengths"].tolist()):
        line, place = divmod(number, rows_per_line)
        start = start if place else 0
        yield _Span(line, start, length)
        start += length


def _to(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {name: tensor.to(device) for name, tensor in batch.items()}  # type: ignore[attr-defined]


def _num_embeddings(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _change_first_rows(packed: dict[str, Any], num_embeddings: int) -> dict[str, Any]:
    """The same batch with other tokens in the first row of each line."""
    ids = packed["input_ids"].clone()
    for span in _spans(packed):
        if span.start == 0:
            row = ids[span.line, span.place]
            ids[span.line, span.place] = (row.flip(0) + 1) % num_embeddings
    return packed | {"input_ids": ids}


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    named = ("input_ids", "attention_mask", "position_ids")
    arguments = {name: batch[name] for name in named if name in batch}
    logits: Tensor = model(**arguments, use_cache=False, return_dict=True).logits
    return logits.float()


def _largest(values: Iterable[float]) -> float:
    """The maximum; not a number if one of them is none, which Python's ``max`` may pass over."""
    return float(torch.tensor(list(values)).max())


def _worst(logits: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference at the worst token, as a share of the logits' spread."""
    difference = (logits - expected).square().mean(dim=-1).sqrt()  # (T,)
    return float(difference.max() / expected.std(dim=-1).mean())


def _distance(logits: Tensor, expected: Tensor) -> float:
    """The same over all tokens together, of which rounding moves single ones much further."""
    difference = (logits - expected).square().mean().sqrt()
    return float(difference / expected.std(dim=-1).mean())


def _gradient_distance(
    model: nn.Module, packed: Mapping[str, Any], apart: Sequence[Mapping[str, Any]]
) -> float:
    trained: list[Any] = list(trainable_tensors(model).values())

    def gradients(batch: Mapping[str, Any]) -> list[Tensor]:
        loss: Tensor = causal_lm_loss(model, batch).total
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        pairs = zip(found, trained, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    alone = [torch.stack(parts).sum(0) for parts in zip(*map(gradients, apart), strict=True)]
    pairs = list(zip(gradients(packed), alone, strict=True))
    difference = torch.stack([(ours - other).float().norm() for ours, other in pairs]).norm()
    norm = torch.stack([other.float().norm() for _, other in pairs]).norm()
    return float(difference / norm) if norm else 0.0


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Activations recomputed as in training, where the layers are in evaluation mode otherwise."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True  # of the layer alone: its dropouts stay off
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
