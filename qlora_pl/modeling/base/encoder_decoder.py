"""What is different where one half of a model reads and the other writes (T5, mT5, Flan-T5).

The question goes into the encoder and the answer alone into the decoder, whose logits at a position
are of the token there and not of the next one: the model itself shifts its labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.steps.loss import (
    LossSum,
    Normalization,
    causal_lm_loss,
    sum_losses,
    token_losses,
    trained_logits,
)

CAUSAL_CLASS = "AutoModelForCausalLM"
SEQ2SEQ_CLASS = "AutoModelForSeq2SeqLM"


def is_encoder_decoder(model_or_config: Any) -> bool:
    """Whether a model, or its transformers configuration, has an encoder and a decoder."""
    config = getattr(model_or_config, "config", model_or_config)
    return bool(getattr(config, "is_encoder_decoder", False))


def auto_class_name(model_or_config: Any) -> str:
    """The transformers class that loads such a model with its output head."""
    return SEQ2SEQ_CLASS if is_encoder_decoder(model_or_config) else CAUSAL_CLASS


def auto_class(config: Any) -> Any:
    """The same, imported."""
    import transformers  # slow to import

    return getattr(transformers, auto_class_name(config))


def refuse_unknown_start(skeleton: Any) -> None:
    """A decoder must know the token that it begins with, and how labels become its inputs.

    Raises:
        ConfigurationError: naming what the model lacks.
    """
    if not is_encoder_decoder(skeleton):
        return
    if not hasattr(skeleton, "prepare_decoder_input_ids_from_labels"):
        raise ConfigurationError(
            f"model.model_name_or_path: a {type(skeleton).__name__} has no rule that makes decoder "
            "inputs of labels, so it cannot be trained here; take a T5, mT5, Flan-T5 or BART."
        )
    for key in ("decoder_start_token_id", "pad_token_id"):
        if getattr(skeleton.config, key, None) is None:
            raise ConfigurationError(
                f"model.model_name_or_path: config.json has no {key}, which this "
                f"{type(skeleton).__name__}'s decoder needs; add it (0 for a T5)."
            )


def refuse_other_rows(skeleton: Any, data: Any) -> None:
    """Rows must have been prepared for this kind of model.

    Args:
        skeleton: The model.
        data: The run's data module, or None; what it knows of the model is a configuration that
            it read by itself, if it could.

    Raises:
        ConfigurationError: if they are of the other kind.
    """
    encoder = getattr(data, "encoder", None)
    if encoder is not None and encoder.is_paired != is_encoder_decoder(skeleton):
        kinds = ("rows of one text", "pairs of a source and a target")
        raise ConfigurationError(
            f"model.model_name_or_path: a {type(skeleton).__name__} needs "
            f"{kinds[not encoder.is_paired]}, and the data module has prepared "
            f"{kinds[encoder.is_paired]}, because it could not read the model's config.json; name "
            "a folder that holds both."
        )


def whole_inputs(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """What a forward over these ids needs; a decoder is given the same ids to write.

    Args:
        model: Any language model, with or without adapters.
        input_ids: ``(B, T)``.
    """
    inputs = {"input_ids": input_ids}
    return inputs | ({"decoder_input_ids": input_ids} if is_encoder_decoder(model) else {})


def decoder_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the decoder of an encoder-decoder model reads: its labels, one place to the right.

    Args:
        model: With or without adapters.
        batch: See ``qlora_pl.batch.Seq2SeqBatch``; a ``Batch`` gives nothing.
    """
    if "decoder_attention_mask" not in batch:
        return {}
    return {
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"]),
        "decoder_attention_mask": batch["decoder_attention_mask"],
    }


def language_model_loss(
    model: nn.Module, batch: Mapping[str, Any], normalize_by: Normalization = "tokens"
) -> LossSum:
    """The loss of either kind of model, chosen by its configuration."""
    chosen = seq2seq_loss if is_encoder_decoder(model) else causal_lm_loss
    return chosen(model, batch, normalize_by)


def seq2seq_loss(
    model: nn.Module, batch: Mapping[str, Any], normalize_by: Normalization = "tokens"
) -> LossSum:
    """Run encoder and decoder and sum the loss of the trained target tokens.

    Args:
        model: A transformers encoder-decoder model, with or without adapters.
        batch: See ``qlora_pl.batch.Seq2SeqBatch``.
        normalize_by: As in ``causal_lm_loss``.
    """
    labels = batch["labels"]  # (B, T)
    is_trained = labels != IGNORE_INDEX
    weights = batch.get("loss_weights")
    if weights is not None:
        is_trained &= weights > 0
    row, position = is_trained.nonzero(as_tuple=True)
    logits = trained_logits(
        model,
        batch["input_ids"],
        row,
        position,
        attention_mask=batch["attention_mask"],
        **decoder_inputs(model, batch),
    )
    losses = token_losses(logits, labels[row, position])
    counted = None if weights is None else weights[row, position]
    return sum_losses(losses, row, counted, len(labels), normalize_by)


def keep_float32_products(model: nn.Module, fragile: tuple[str, ...]) -> None:
    """Multiply by these parameters in their own type, whatever autocast says.

    T5's authors keep ``wo`` in float32 because its products leave float16's range; autocast would
    take them there all the same.

    Args:
        model: A loaded base.
        fragile: Names of parameters, as in ``QuantizationPlan.fragile``.
    """
    for name in fragile:
        module: Any = model.get_submodule(name.rpartition(".")[0])
        module.forward = _without_autocast(module.forward)


def _without_autocast(forward: Any) -> Any:
    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            result: Tensor = forward(x)
        return result

    return run
