"""One merged model's folder: weights, configuration, tokenizer; and whether there is room."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pl.data.encoding.served_template import served_tokenizer
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.inference.loading import load_encoder
from qlora_pl.inference.source import ModelSource
from qlora_pl.merging.requantizing import Packing
from qlora_pl.merging.scored_rows import ScoredRow
from qlora_pl.merging.weights import MergedWeights, Policy
from qlora_pl.merging.writing import bytes_of, write_shards

HEADERS = 1.02
"""What tokenizer, headers and tables of codes add, at most, as a factor."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """In which form weights are written."""

    dtype: torch.dtype
    packing: Packing | None = None
    """Which of them in 4 bits; None: none."""

    def num_bytes(self, name: str, number: int) -> float:
        """What a tensor of so many elements takes on the disk."""
        if self.packing is None:
            return number * bytes_of(self.dtype)
        return self.packing.num_bytes(name, number, self.dtype)


def refuse_full_disk(
    parent: Path, weights: MergedWeights, form: Form, number: int, rows: list[ScoredRow]
) -> None:
    """There must be room for every candidate, and what the trained model says, before the first.

    Raises:
        HardwareError: naming what is needed.
    """
    needed = number * HEADERS * sum(form.num_bytes(name, n) for name, n in weights.sizes())
    vocabulary = weights.base.get_input_embeddings().weight.shape[0]
    needed += 4 * vocabulary * sum(len(row.places) for row in rows)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise HardwareError(
            f"--output: '{parent}' has {free / 2**30:.1f} GiB free, and {number} merged model"
            f"{'s' * (number > 1)} take {needed / 2**30:.1f}; make room, or choose a --policy."
        )


def refuse_no_parent(parent: Path) -> None:
    """The folder that is to hold the output must exist.

    Raises:
        ConfigurationError: if it does not.
    """
    if not parent.is_dir():
        raise ConfigurationError(f"--output: there is no folder '{parent}'.")


def write_candidate(
    folder: Path,
    weights: MergedWeights,
    source: ModelSource,
    policy: Policy,
    form: Form,
    cache_dir: str | None = None,
) -> None:
    """Write what a policy makes of base and adapter, tensor by tensor.

    Args:
        folder: Is made.
        weights: Base and adapter.
        source: Of the adapter: its tokenizer, and where training ended answers.
        policy: Onto what.
        form: In which type, and whether in 4 bits.
        cache_dir: Where downloads are kept.
    """
    folder.mkdir()
    write_shards(folder, _groups(weights.tensors(policy, form.dtype), form))
    config = weights.base.config
    config.dtype = form.dtype
    if form.packing is not None:
        config.quantization_config = form.packing.settings(form.dtype)
    config.save_pretrained(folder)
    generation: Any = weights.base.generation_config
    if source.manifest is not None and source.manifest.stop_token_ids:
        generation.eos_token_id = source.manifest.stop_token_ids  # where training ended answers
    generation.save_pretrained(folder)
    encoder = load_encoder(source, cache_dir)
    served_tokenizer(encoder).save_pretrained(folder)  # whose chat template is that of training


def _groups(tensors: Iterator[tuple[str, Tensor]], form: Form) -> Iterator[dict[str, Tensor]]:
    if form.packing is not None:
        yield from form.packing.groups(tensors)
        return
    for name, tensor in tensors:
        yield {name: tensor}
