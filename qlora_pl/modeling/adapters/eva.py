"""EVA: the directions in which each adapted layer's inputs vary most, as the start of its A.

Paischer et al. 2024 (arXiv:2410.07170), with the ranks that were asked for, so that a checkpoint's
shapes are known before. B stays zero, so training starts at the base's own outputs. Each batch is
looked at once: PEFT's own loop goes round until the directions settle, which those that vary alike
need not do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_pl.batch import IGNORE_INDEX, Batch
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.encoder_decoder import decoder_inputs
from qlora_pl.modeling.evaluation_mode import evaluation_mode
from qlora_pl.modeling.steps.loss import trained_logits


def start_at_activations(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Set every A to the main directions of its layer's inputs, the largest first.

    Args:
        model: A PEFT model with a B of zero.
        batches: Rows to run; those with fewer tokens than a layer's rank are left out.

    Raises:
        ConfigurationError: if no batch has as many tokens as a layer's rank.
    """
    import peft  # slow to import

    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    seen = _Inputs({name: layer.r["default"] for name, layer in layers.items()})
    handles = [
        layer.register_forward_pre_hook(seen.hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    device = next(model.parameters()).device
    nothing = torch.zeros(1, dtype=torch.int64, device=device)  # no logits but of one token
    try:
        with evaluation_mode(model), torch.no_grad():
            torch.manual_seed(0)  # of the sketches; the run's random states are put back
            for batch in batches:
                inputs = {key: value.to(device) for key, value in _told_apart(batch).items()}
                decoder = decoder_inputs(model, inputs)
                masks = [value for key, value in inputs.items() if key.endswith("_mask")]
                seen.masks = {mask.numel(): mask.flatten().bool() for mask in masks}
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                trained_logits(model, ids, nothing, nothing, attention_mask=mask, **decoder)
    finally:
        for handle in handles:
            handle.remove()
    seen.refuse_too_few()
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(seen.directions(name))


def _told_apart(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A target as wide as its source is padded further: a width then tells whose mask counts."""
    if "decoder_attention_mask" not in batch or batch["labels"].shape != batch["input_ids"].shape:
        return batch
    return {
        **batch,
        "labels": functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX),
        "decoder_attention_mask": functional.pad(batch["decoder_attention_mask"], (0, 1)),
    }


class _Inputs:
    """The main directions of what each layer is given, carried on from batch to batch."""

    def __init__(self, ranks: dict[str, int]) -> None:
        self.ranks = ranks
        self.masks: dict[int, Tensor] = {}
        """``(B x T,)`` bool of each width at hand, by its length."""
        self.most_tokens = 0
        self._analyses: dict[str, Any] = {}
        self._last: tuple[Tensor | None, str] = (None, "")

    def hook(self, name: str) -> Any:
        def look(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._look(name, arguments[0] if arguments else named["x"])

        return look

    def _look(self, name: str, x: Tensor) -> None:
        last, its_name = self._last
        if x is last and self.ranks[name] == self.ranks[its_name]:  # as k and v after q
            if its_name in self._analyses:
                self._analyses[name] = self._analyses[its_name]
            return
        self._last = (x, name)
        tokens = x.flatten(0, -2)  # some families have flattened them already
        if len(tokens) in self.masks:
            tokens = tokens[self.masks[len(tokens)]]
        self.most_tokens = max(self.most_tokens, len(tokens))
        if len(tokens) >= self.ranks[name]:
            self._analysis(name, tokens.shape[1]).partial_fit(tokens.float())

    def _analysis(self, name: str, width: int) -> Any:
        from peft.utils.incremental_pca import IncrementalPCA  # slow to import

        if name not in self._analyses:
            rank = self.ranks[name]
            self._analyses[name] = IncrementalPCA(
                rank, lowrank=True, lowrank_q=min(2 * rank, width)
            )
        return self._analyses[name]

    def refuse_too_few(self) -> None:
        """Every layer must have been given as many tokens at a time as it has directions."""
        missing = {name: rank for name, rank in self.ranks.items() if name not in self._analyses}
        if missing:
            name = max(missing, key=missing.__getitem__)
            raise ConfigurationError(
                f"model.lora.init: eva needs a batch of at least {missing[name]} tokens (the rank "
                f"of '{name}'), and the first ones have up to {self.most_tokens}; raise "
                "data.batch_size or lower model.lora.r."
            )

    def directions(self, name: str) -> Tensor:
        """``(rank, in_features)``, rows of length one at right angles."""
        found: Tensor = self._analyses[name].components_
        return found
