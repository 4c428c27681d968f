"""An architecture -> the same with two layers, narrowed: what is kept, and what becomes less.

Kept are the family, the size of a head where it fits, the ratio of queries to keys and values,
tying, biases and the vocabulary; hidden size, heads and MLP shrink together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_pl.errors import ConfigurationError

NUM_LAYERS = 2
WIDEST = 512
"""Hidden size at most."""
SMALLEST_HEAD = 16
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
HEAD_SIZES = ("head_dim", "d_kv")
INNER = (
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
"""Under which names families keep these numbers in config.json."""


@dataclass(frozen=True, kw_only=True)
class Narrowed:
    """A smaller architecture."""

    config: dict[str, Any]
    """As in config.json."""
    changes: list[str] = field(default_factory=list)
    """What is less than in the original, one clause each."""


@dataclass(frozen=True)
class _Shape:
    """The widths of attention."""

    hidden: int
    heads: int
    key_value_heads: int
    head_size: int


def narrow(config: Mapping[str, Any], block_size: int = 64) -> Narrowed:
    """Shrink the settings of a model.

    Args:
        config: All settings of a model of the transformers library, as its ``to_dict`` gives them.
        block_size: Rows of every matrix must hold whole blocks of so many weights.

    Raises:
        ConfigurationError: if the settings do not say how wide the model is.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and _first(config, WIDTHS) is None:
        narrowed = narrow(inner, block_size)
        return Narrowed(config={**config, "text_config": narrowed.config}, changes=narrowed.changes)
    small = dict(config)
    _cut_layers(small)
    _narrow_widths(small, min(block_size, WIDEST))
    return Narrowed(config=small, changes=list(_changes(config, small)))


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The number that stands under the first of these names."""
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _cut_layers(small: dict[str, Any]) -> None:
    """Two layers; where there are several kinds, the first of each of the first two kinds."""
    depth = _first(small, LAYERS)
    if depth is None:
        raise ConfigurationError(_unknown(small, "how many layers it has"))
    kinds = small.get("layer_types") or []
    other = next((n for n, kind in enumerate(kinds) if kind != kinds[0]), 1)
    kept = [0, other]
    for name, value in small.items():
        if isinstance(value, list) and len(value) == depth > NUM_LAYERS:
            small[name] = [value[layer] for layer in kept]
    for name in LAYERS:
        if isinstance(small.get(name), int):
            small[name] = min(small[name], NUM_LAYERS)


def _narrow_widths(small: dict[str, Any], block: int) -> None:
    hidden, heads = _first(small, WIDTHS), _first(small, HEADS)
    if hidden is None or heads is None:
        raise ConfigurationError(_unknown(small, "how wide it is and how many heads it has"))
    if hidden <= WIDEST:
        return
    own_size = _first(small, HEAD_SIZES)
    old = _Shape(
        hidden, heads, _first(small, KEY_VALUE_HEADS) or heads, own_size or hidden // heads
    )
    new = _fitting(old, own_size is not None, block)
    ratio = new.hidden / old.hidden
    for name in WIDTHS:
        if isinstance(small.get(name), int):
            small[name] = _multiple(small[name] * ratio, block)
    for name in INNER:
        if isinstance(small.get(name), int):
            small[name] = _multiple(small[name] * ratio, block)
    for name in HEADS:
        if isinstance(small.get(name), int):
            small[name] = new.heads
    for name in KEY_VALUE_HEADS:
        if isinstance(small.get(name), int):
            small[name] = new.key_value_heads
    for name in HEAD_SIZES:
        if isinstance(small.get(name), int):
            small[name] = new.head_size
    if new.head_size != old.head_size:
        _shorten_scaling(small, new.head_size / old.head_size)


def _fitting(old: _Shape, has_own_head_size: bool, block: int) -> _Shape:
    """The widest shape within the limit that keeps as much as possible of the old one."""
    size = old.head_size
    while size >= SMALLEST_HEAD:
        for shape in _candidates(old, size, has_own_head_size):
            if shape.hidden % block == 0 and (shape.heads * shape.head_size) % block == 0:
                return shape
        size //= 2
    raise ConfigurationError(
        f"model.model_name_or_path: {old.heads} heads of {old.head_size} in a hidden size of "
        f"{old.hidden} cannot be narrowed to rows of {block} weights; smoke cannot test this base."
    )


def _candidates(old: _Shape, size: int, has_own_head_size: bool) -> Iterator[_Shape]:
    # Of queries to a key: kept exactly where there is room for one key of so many queries.
    group = max(1, old.heads // old.key_value_heads)
    if old.heads * old.head_size == old.hidden:
        most = WIDEST // size
        steps = [n for n in range(most, 0, -1) if n % group == 0]
        if not steps and old.key_value_heads == 1:  # one key for however many queries
            yield from (_Shape(n * size, n, 1, size) for n in range(most, 1, -1))
        yield from (_Shape(n * size, n, n // group, size) for n in steps)
    if has_own_head_size:
        wanted = WIDEST / old.hidden * old.heads * old.head_size
        most = max(1, int(min(wanted, 2 * WIDEST)) // size)
        near = [n for n in range(most, 0, -1) if n % group == 0]
        if not near and group * size <= 2 * WIDEST:
            near = [group]
        yield from (_Shape(WIDEST, n, n // group, size) for n in near)
    if size // 2 < SMALLEST_HEAD:  # no size of heads keeps the ratio
        most = WIDEST // old.head_size
        yield from (_Shape(n * old.head_size, n, 1, old.head_size) for n in range(most, 0, -1))


def _multiple(value: float, block: int) -> int:
    return max(block, round(value / block) * block)


def _shorten_scaling(small: dict[str, Any], ratio: float) -> None:
    """Rotary scalings that have one number for every pair of a head's places."""
    for name in ("rope_scaling", "rope_parameters"):
        settings = small.get(name)
        if isinstance(settings, Mapping):
            small[name] = {
                key: value[: math.ceil(len(value) * ratio)] if isinstance(value, list) else value
                for key, value in settings.items()
            }


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in (*LAYERS, *WIDTHS, *HEADS, *KEY_VALUE_HEADS, *HEAD_SIZES, *INNER):
        if isinstance(old.get(name), int) and old[name] != new[name]:
            yield f"{name}: {new[name]:,} of {old[name]:,}"


def _unknown(config: Mapping[str, Any], what: str) -> str:
    kind = config.get("model_type", "model without a model_type")
    return (
        f"model.model_name_or_path: the config.json of this {kind} does not say {what} in a word "
        "that is known here, so that smoke cannot shrink it."
    )
