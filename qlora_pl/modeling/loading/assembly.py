"""From a run's settings to its model: base and adapters, whole on every device or cut over them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from qlora_pl.modeling.adapters.lora import attach_adapters
from qlora_pl.modeling.base.verification import refuse_broken_forward
from qlora_pl.modeling.base.vocabulary import grow_vocabulary, rows_of
from qlora_pl.modeling.full_training import train_all_weights
from qlora_pl.modeling.loading.base_loading import LoadedBase, load_base
from qlora_pl.modeling.loading.sharded_loading import Sharing, load_sharded


def shards_parameters(trainer: Any) -> bool:
    """Whether a run's strategy cuts the model over devices."""
    return bool(getattr(trainer.strategy, "shards_parameters", False))


def load_adapted(module: Any) -> tuple[LoadedBase, nn.Module, int | None]:
    """Load the base of a ``QLoRAModule``, attach what is trained, and watch the rest.

    Returns:
        The base, the model around it, and the number of its embedding rows where it was given more.

    Raises:
        ConfigurationError: if the base cannot be loaded as planned.
    """
    if shards_parameters(module.trainer):
        base, model = _load_sharded(module)
        return base, model, None
    tokenizer = module.tokenizer
    base = _load_in_turn(module)
    grows = module.grow_vocabulary and tokenizer is not None
    new_rows = grow_vocabulary(base.model, len(tokenizer)) if grows else {}
    vocabulary_size = len(tokenizer) if new_rows else None
    if module.lora.trainable_tokens:
        chosen = rows_of(base.model, tokenizer, module.lora.trainable_tokens)
        new_rows = {name: [*chosen[name], *new_rows.get(name, [])] for name in chosen}
    if module.lora.has_adapters:
        model = attach_adapters(base.model, module.lora, _seed(), new_rows)
    else:
        model = train_all_weights(base.model, base.compute_dtype)
    module.base_watch.remember(model, module.trainer.strategy.root_device)
    return base, model, vocabulary_size


def _load_in_turn(module: Any) -> LoadedBase:
    """The first process of a machine quantises and keeps the packed copy that the others read."""
    strategy = module.trainer.strategy
    is_first = getattr(strategy, "local_rank", 0) == 0
    if not is_first:
        strategy.barrier()
    make_base = getattr(module, "make_base", load_base)  # a base that is drawn, not read
    base: LoadedBase = make_base(
        module.identity,
        module.quantization,
        module.plan,
        device=strategy.root_device,
        cache_dir=module.cache_dir,
        attn_implementation=module.attn_implementation,
        trust_remote_code=module.trust_remote_code,
        is_first_rank=is_first,
        rest_dtype=None if module.lora.has_adapters else getattr(torch, module.lora.dtype),
    )
    if is_first:
        strategy.barrier()
    return base


def _load_sharded(module: Any) -> tuple[LoadedBase, nn.Module]:
    strategy = module.trainer.strategy
    base, model = load_sharded(
        module.identity,
        module.quantization,
        module.plan,
        module.lora,
        sharing=Sharing(
            mesh=strategy.mesh,
            device=strategy.root_device,
            offload=strategy.cpu_offload,
            makes_copy=strategy.local_rank == 0,
            barrier=strategy.barrier,
        ),
        watch=module.base_watch,
        seed=_seed(),
        cache_dir=module.cache_dir,
        attn_implementation=module.attn_implementation,
        trust_remote_code=module.trust_remote_code,
    )
    refuse_broken_forward(base.model, base.compute_dtype, module.plan, strategy.root_device)
    return base, model


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
