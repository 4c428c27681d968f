"""A base with random weights of a narrowed architecture, as an ordinary folder.

Everything that can be asked of the real architecture is asked of it first, at its full size and
without weights: what is quantised, what is adapted, whether every token has a row.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_pl.cli import settings
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import (
    LoRAConfig,
    by_module,
    refuse_unfit_ranks,
    resolve_targets,
)
from qlora_pl.modeling.base.encoder_decoder import auto_class
from qlora_pl.modeling.base.names import matches
from qlora_pl.modeling.base.prequantized import make_plan
from qlora_pl.modeling.base.quantization import COMPUTE_DTYPES, QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.full_training import refuse_packed_weights
from qlora_pl.modeling.loading.sharded_loading import refuse_unshardable
from qlora_pl.modeling.sharding import unit_names
from qlora_pl.smoke.base_files import BaseFiles, refuse_missing_head, stored_tensors
from qlora_pl.smoke.narrowing import WIDEST, Narrowed, narrow
from qlora_pl.smoke.stand_in_tokenizer import TURN_ENDS

SEED = 0
WEIGHT_STD = 0.05
"""Of random weights: two layers of 0.02 would hardly react to their input."""
NORM_WORDS = ("norm", "ln_")


def check_whole(base: BaseFiles, run: Any) -> nn.Module:
    """Hold a run's settings against its base at full size, without weights.

    Args:
        base: Its files.
        run: The parsed configuration.

    Returns:
        The skeleton.

    Raises:
        ConfigurationError: what ``fit`` would say.
    """
    model = run.model
    skeleton = build_skeleton(
        base.folder, attention_kernel(model.attn_implementation), model.trust_remote_code
    )
    if base.original is not None and (stored := stored_tensors(base.original)) is not None:
        refuse_missing_head(base.name, skeleton, stored)
    quantization, lora = configs_of(run)
    refuse_packed_weights(quantization, lora)
    if base.original is not None or "quantization_config" not in base.config:
        make_plan(base.original or base.folder, skeleton, quantization)
    if lora.has_adapters:
        targets = resolve_targets(skeleton, lora)
        refuse_unfit_ranks(skeleton, lora, targets)
    if str(run.trainer.strategy).startswith("fsdp2"):
        refuse_unshardable(quantization, lora, model.grow_vocabulary)
        unit_names(skeleton)
    return skeleton


COPIES = 4
"""Of the narrowed weights on disk: the base, its packed copy, the merged model, one in the making.
Nearly all of them are embeddings, which no packing makes smaller."""
BYTES_OF_A_TRAINED_BASE = 60
"""For each weight that is trained: three checkpoints with two moments in 32 bits, two models."""
OTHER_BYTES = 150e6
"""Adapters with their optimizer's state, rows, tokenizers, logs."""


def most_bytes(base: BaseFiles, whole: nn.Module, run: Any) -> float:
    """Bytes that a test of a run writes at most.

    Args:
        base: The files of its base.
        whole: Its skeleton, before it is narrowed.
        run: The parsed configuration.
    """
    rows, width = whole.get_input_embeddings().weight.shape  # type: ignore[operator]
    num_narrowed = 2 * rows * min(width, WIDEST) + 8e6  # with a head of its own, and two layers
    trains_all = run.model.lora.method == "none"
    of_weight = BYTES_OF_A_TRAINED_BASE if trains_all else COPIES * dtype_of(base.config).itemsize
    return float(num_narrowed * of_weight + OTHER_BYTES)


def configs_of(run: Any) -> tuple[QuantizationConfig, LoRAConfig]:
    """How the base is kept, and what is trained."""
    quantization, lora = settings(run.model.quantization), settings(run.model.lora)
    return QuantizationConfig(**quantization), LoRAConfig(**lora)


def attention_kernel(chosen: str) -> Any:
    """The kernel that a CPU has in place of the chosen one."""
    return "auto" if chosen.startswith("flash") else chosen


# -- the shrunken base -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RandomBase:
    """A base that was made."""

    folder: Path
    narrowed: Narrowed
    flags: dict[str, Any]
    """Keys of the run that cannot be the same over it, and their values."""
    notes: list[str]
    """Why, a clause for each."""


def make_base(
    base: BaseFiles, whole: nn.Module, run: Any, place: Path, stand_in: Any = None
) -> RandomBase:
    """Write a narrowed base with random weights.

    Args:
        base: The original's files.
        whole: Its skeleton.
        run: The parsed configuration.
        place: The folder to make.
        stand_in: The tokenizer, if it is one in place of the real one.

    Raises:
        ConfigurationError: if this architecture cannot be narrowed.
    """
    from transformers import AutoConfig  # slow to import

    block = run.model.quantization.block_size
    original = AutoConfig.from_pretrained(
        base.folder, trust_remote_code=run.model.trust_remote_code
    ).to_dict()
    narrowed = narrow(original, block)
    narrowed.config.pop("quantization_config", None)
    shutil.copytree(base.folder, place, ignore=shutil.ignore_patterns("*.index.json"))
    (place / "config.json").write_text(json.dumps(narrowed.config, indent=2, default=str))
    if stand_in is not None:
        _say_how_texts_end(stand_in, place)
    skeleton = _skeleton(place, run)
    _write_weights(place, dtype_of(original), narrowed.config, run)
    flags, notes = adjusted(run, whole, skeleton)
    if "quantization_config" in base.config:
        notes.append("the base's own packed weights: random ones are packed in their place")
    return RandomBase(folder=place, narrowed=narrowed, flags=flags, notes=notes)


def _say_how_texts_end(tokenizer: Any, place: Path) -> None:
    """What an unknown chat model would say in its generation_config.json."""
    ends = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        ends += [tokenizer.convert_tokens_to_ids(token) for token in TURN_ENDS]
    ends = [token for token in ends if token is not None and token >= 0]
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def _skeleton(place: Path, run: Any) -> nn.Module:
    try:
        return build_skeleton(
            place, attention_kernel(run.model.attn_implementation), run.model.trust_remote_code
        )
    except ConfigurationError as error:
        raise ConfigurationError(
            f"smoke could not narrow this architecture, which says nothing about the run: {error}"
        ) from error


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """What the base's weights are stored in, as config.json says; bfloat16 where it does not."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return COMPUTE_DTYPES.get(name.removeprefix("torch."), torch.bfloat16)


def _write_weights(place: Path, dtype: torch.dtype, own: dict[str, Any], run: Any) -> None:
    from transformers import AutoConfig  # slow to import
    from transformers.utils import logging

    trust = run.model.trust_remote_code
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust)
        for name, parameter in model.named_parameters():
            is_norm = any(word in name.lower() for word in NORM_WORDS)
            if name.endswith("bias") or (parameter.ndim > 1 and not is_norm):
                parameter.normal_(std=WEIGHT_STD)
        _untie(model, own)
    logging.disable_progress_bar()
    model.save_pretrained(place)
    # As it was written above: transformers puts its own reading of it there.
    saved = json.loads((place / "config.json").read_text())
    tied = {key: own[key] for key in ("tie_word_embeddings",) if key in own}
    (place / "config.json").write_text(json.dumps(saved | tied, indent=2, default=str))


def _untie(model: Any, own: dict[str, Any]) -> None:
    """Give a T5 that says so a head of its own; transformers ties every T5's it makes."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if own.get("tie_word_embeddings", True) or head is None:
        return
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(torch.empty_like(head.weight).normal_(std=WEIGHT_STD))
        model.all_tied_weights_keys.pop("lm_head.weight", None)


# -- what cannot be the same over it ---------------------------------------------------------------


def adjusted(run: Any, whole: nn.Module, small: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Keys that name layers which are gone, or ask for more than is left, and what they become.

    Args:
        run: The parsed configuration, which fits the whole base.
        whole: The whole base's skeleton.
        small: The narrowed one's.

    Returns:
        Values by key, and a clause on each.
    """
    quantization, lora = configs_of(run)
    flags: dict[str, Any] = {}
    notes: list[str] = []
    names = [name for name, _ in small.named_modules()]
    skipped = [e for e in quantization.skip_modules if any(matches(n, [e]) for n in names)]
    if len(skipped) < len(quantization.skip_modules):
        flags["model.quantization.skip_modules"] = json.dumps(skipped)
        notes.append("model.quantization.skip_modules: entries of layers that are left out")
    if not lora.has_adapters:
        return flags, notes
    try:
        targets = resolve_targets(small, lora)
    except ConfigurationError:
        last = sorted({name.rpartition(".")[2] for name in resolve_targets(whole, lora)})
        targets = resolve_targets(small, LoRAConfig(target_modules=last))
        flags["model.lora.target_modules"] = json.dumps(last)
        notes.append("model.lora.target_modules: by their last parts, as their layers are left out")
    ranks = by_module(lora.rank_pattern, resolve_targets(whole, lora), lora.r)
    most = min(min(small.get_submodule(n).weight.shape) for n in targets)  # type: ignore[arg-type]
    if max(ranks.values()) > most and lora.r > most:
        flags["model.lora.r"] = most
        notes.append(f"model.lora.r: {most}, since narrowed matrices have no higher rank")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(lora, key)
        fitting = {
            name: min(value, most) if key == "rank_pattern" else value
            for name, value in pattern.items()
            if _fits_any(name, targets)
        }
        if fitting != pattern:
            flags[f"model.lora.{key}"] = json.dumps(fitting)
            notes.append(f"model.lora.{key}: only what fits the narrowed layers")
    return flags, notes


def _fits_any(pattern: str, targets: list[str]) -> bool:
    found = by_module({pattern: True}, targets, None)
    return any(value is not None for value in found.values())
