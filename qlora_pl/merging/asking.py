"""The trained model and merged ones, loaded so that their weights stay in the pages of files.

A host reads such pages again when it needs the room, so that scoring asks for the memory of what is
worked with, and not of three models.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from qlora_pl.errors import QLoRAError
from qlora_pl.inference.loading import Model, load
from qlora_pl.inference.machine import place_of
from qlora_pl.inference.source import ModelChoice, ModelSource
from qlora_pl.modeling.base.encoder_decoder import auto_class
from qlora_pl.modeling.base.identity import BaseIdentity
from qlora_pl.modeling.base.prequantized import is_prequantized
from qlora_pl.modeling.base.quantization_plan import QuantizationPlan
from qlora_pl.modeling.loading.base_loading import keep_gradients_on_cpu
from qlora_pl.modeling.loading.copy_making import packed_copy
from qlora_pl.modeling.loading.host_memory import large_blocks_apart, release_freed_memory

logger = logging.getLogger(__name__)


@large_blocks_apart()
def load_trained(
    source: ModelSource, identity: BaseIdentity, plan: QuantizationPlan, choice: ModelChoice
) -> Model:
    """What was trained, computing as in training.

    Args:
        source: Of the adapter.
        identity: Its base.
        plan: What is packed of it.
        choice: Names the cache, and whether code may run.
    """
    device = place_of(choice).device
    if device.type == "cpu":
        _make_packed_copy(source, identity, plan, choice, device)
        release_freed_memory(of_cycles=True)
    trained = load(source, device, choice.cache_dir, choice.trust_remote_code, is_exact=True)
    release_freed_memory(of_cycles=True)
    return trained


def _make_packed_copy(
    source: ModelSource,
    identity: BaseIdentity,
    plan: QuantizationPlan,
    choice: ModelChoice,
    device: torch.device,
) -> None:
    """Pack the base matrix by matrix, if it is not kept yet; the copy's pages are then read."""
    config = source.quantization
    if not (config.is_quantized and config.cache) or is_prequantized(identity.folder):
        return
    try:
        packed_copy(
            identity,
            config,
            plan,
            device,
            choice.cache_dir,
            trust_remote_code=choice.trust_remote_code,
        )
    except QLoRAError as error:  # no room for a copy: it is packed in memory
        logger.warning("%s", error)


def load_merged(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A merged folder as plain transformers loads it, computing as in training."""
    from transformers import AutoConfig  # slow to import

    kind = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    model: Any = kind.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": str(device)},
        trust_remote_code=False,
    )
    keep_gradients_on_cpu(model)  # whose other kernel rounds scales
    return model.eval()
