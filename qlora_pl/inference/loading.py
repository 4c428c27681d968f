"""A ``ModelSource`` -> what answers: a frozen base, its adapters, tokenizer and template."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.encoder_choice import choose_encoder
from qlora_pl.data.encoding.tokenizer import load_model_config, load_tokenizer
from qlora_pl.data.templates.loading import load_template
from qlora_pl.errors import AdapterFolderError
from qlora_pl.inference.machine import Place
from qlora_pl.inference.source import KEY, ModelSource
from qlora_pl.modeling.adapters.lora import keep_adapters_in
from qlora_pl.modeling.adapters.settled import settle_adapters
from qlora_pl.modeling.base.encoder_decoder import is_encoder_decoder
from qlora_pl.modeling.base.identity import BaseIdentity, identify_base, refuse_unpinned_code
from qlora_pl.modeling.base.prequantized import make_plan
from qlora_pl.modeling.base.quantization_plan import QuantizationPlan, build_skeleton
from qlora_pl.modeling.base.vocabulary import grow_vocabulary
from qlora_pl.modeling.folders.peft_folder import other_kind, read_config, read_tensors
from qlora_pl.modeling.loading.base_loading import LoadedBase, load_base
from qlora_pl.modeling.loading.spread_loading import load_spread

logger = logging.getLogger(__name__)


class Model:
    """What answers.

    Attributes:
        model: A transformers model, or a PEFT model around it.
        tokenizer: Its tokenizer.
        encoder: Renders and encodes prompts as in training.
        source: What it was loaded from.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        encoder: Encoder,
        source: ModelSource,
        base_biases: Mapping[str, Tensor],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.source = source
        self._base_biases = dict(base_biases)

    @property
    def device(self) -> torch.device:
        """Where prompts go."""
        return next(self.model.parameters()).device

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters."""
        return list(self.source.adapters)

    @contextmanager
    def answering_as(self, name: str | None) -> Iterator[nn.Module]:
        """The model with one of its adapters, or without (None), within the block."""
        if not self.adapters:
            yield self.model
            return
        model: Any = self.model
        if name is not None:
            if model.active_adapter != name:  # a walk over all layers, for every prompt
                model.set_adapter(name)
            yield model
            return
        with model.disable_adapter(), self._own_biases():
            yield model

    @contextmanager
    def _own_biases(self) -> Iterator[None]:
        """PEFT leaves trained biases in place when it switches an adapter off."""
        trained = {}
        parameters = dict(self.model.named_parameters())
        for name, own in self._base_biases.items():
            trained[name] = parameters[name].data
            parameters[name].data = own
        try:
            yield
        finally:
            for name, data in trained.items():
                parameters[name].data = data


def load(
    source: ModelSource,
    place: Place | torch.device,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    is_exact: bool = False,
) -> Model:
    """Load base, adapters and tokenizer.

    Args:
        source: From ``resolve_source``.
        place: Where the base goes.
        cache_dir: See ``cache_root``.
        trust_remote_code: Whether Python code beside the model may run.
        is_exact: Whether it must compute as in training, without a kernel for inference.

    Raises:
        ConfigurationError: if the base is another than the adapter's, or cannot be loaded.
        AdapterFolderError: if an adapter is damaged, or does not fit the base.
    """
    refuse_unpinned_code(source.base, source.revision, trust_remote_code)
    identity = identify_base(source.base, source.revision, cache_dir)
    refuse_other_base(source, identity)
    tokenizer = load_tokenizer(source.tokenizer, source.revision, cache_dir)
    skeleton = build_skeleton(identity.folder, "auto", trust_remote_code)
    plan = make_plan(identity.folder, skeleton, source.quantization)
    base = _load_base(identity, source, plan, place, cache_dir, trust_remote_code)
    if source.vocabulary_size is not None:
        grow_vocabulary(base.model, source.vocabulary_size)
    model: nn.Module = base.model
    biases: dict[str, Tensor] = {}
    for name, folder in source.adapters.items():
        model, own = add_adapter(model, folder, name, getattr(torch, source.lora_dtype))
        biases |= own
    if source.adapters:
        model.set_adapter(next(iter(source.adapters)))  # type: ignore[operator]
    model.requires_grad_(False)
    model.eval()
    if not is_exact and not reads_base_weights(model):
        settle_adapters(model)
        if base.compute_dtype == torch.bfloat16:
            allow_inference_kernel(model)
    return Model(model, tokenizer, make_encoder(source, tokenizer, base.model), source, biases)


def refuse_other_base(source: ModelSource, identity: BaseIdentity) -> None:
    """An adapter belongs to the weights that it was trained over.

    Raises:
        AdapterFolderError: if these are others.
    """
    if source.weights is not None and identity.weights != source.weights:
        raise AdapterFolderError(
            f"The adapter was trained over other weights than those of '{source.base}' "
            f"(fingerprints {source.weights[:12]} and {identity.weights[:12]}); name its own base "
            "with --base."
        )


def _load_base(
    identity: BaseIdentity,
    source: ModelSource,
    plan: QuantizationPlan,
    place: Place | torch.device,
    cache_dir: str | None,
    trust_remote_code: bool,
) -> LoadedBase:
    if isinstance(place, torch.device) or place.memory is None:
        return load_base(
            identity,
            source.quantization,
            plan,
            device=place if isinstance(place, torch.device) else place.device,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
        )
    return load_spread(
        identity,
        source.quantization,
        plan,
        memory=place.memory,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )


def make_encoder(source: ModelSource, tokenizer: Any, model: Any) -> Encoder:
    """What makes prompts as in training.

    Args:
        source: Says how.
        tokenizer: Its tokenizer.
        model: The model, or its configuration.

    Raises:
        ConfigurationError: if the tokenizer lacks what the template needs.
    """
    is_original = source.encoder == "OriginalEncoder"
    return choose_encoder(
        "original" if is_original else "spans",
        load_template(source.template, tokenizer),
        tokenizer,
        "answers",
        append_eos=True,
        max_target_length=1 if is_original else None,  # of answers, none of which is encoded
        has_encoder=is_encoder_decoder(model),
    )


def load_encoder(source: ModelSource, cache_dir: str | None = None) -> Encoder:
    """The same without the model's weights.

    Raises:
        ConfigurationError: if there is no tokenizer, or it lacks what the template needs.
    """
    tokenizer = load_tokenizer(source.tokenizer, source.revision, cache_dir)
    return make_encoder(
        source, tokenizer, load_model_config(source.base, source.revision, cache_dir)
    )


def add_adapter(
    model: nn.Module, folder: Path, name: str, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Put an adapter's tensors into a model, every one of them in its place.

    PEFT's own loader ignores tensors that fit nowhere, and leaves at random what the file lacks.

    Args:
        model: The base, or a PEFT model that has other adapters.
        folder: Of the adapter.
        name: What to call it.
        dtype: What its matrices are kept in.

    Returns:
        The PEFT model, and the base's own biases by name, where the adapter brings trained ones.

    Raises:
        AdapterFolderError: naming a tensor that is missing, left over or of another shape.
    """
    import peft  # slow to import

    saved = read_config(folder, KEY)
    if problems := other_kind(folder, saved, KEY):
        raise AdapterFolderError(" ".join(problems))
    known = set(peft.LoraConfig.__dataclass_fields__)
    config = peft.LoraConfig(
        **{k: v for k, v in saved.items() if k in known and k not in NOT_READ},
        inference_mode=True,
        init_lora_weights=False,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if hasattr(model, "peft_config"):
                model.add_adapter(name, config)  # type: ignore[operator]
                adapted: Any = model
            else:
                adapted = peft.get_peft_model(
                    model, config, adapter_name=name, autocast_adapter_dtype=False
                )
    except ValueError as error:
        raise AdapterFolderError(
            f"'{folder}' does not fit the base ({str(error).splitlines()[0].rstrip('.')})."
        ) from error
    tensors = read_tensors(folder, KEY)
    own = peft.get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    _refuse_misfits(folder, tensors, own)
    biases = {
        place: parameter.detach().clone()
        for place, parameter in adapted.named_parameters()
        if place.endswith(".bias") and "lora_" not in place and config.bias != "none"
    }
    cast = {key: tensor.to(own[key].dtype) for key, tensor in tensors.items()}
    keep_adapters_in(adapted, dtype)
    peft.set_peft_model_state_dict(
        adapted, {key: tensors[key] if "lora_" in key else cast[key] for key in tensors}, name
    )
    return adapted, biases


NOT_READ = (
    "init_lora_weights",
    "inference_mode",
    "loftq_config",
    "eva_config",
    "corda_config",
    "auto_mapping",
    "peft_type",
    "peft_version",
    "runtime_config",
    "lora_ga_config",
)
"""Settings of PEFT's that say how training began, not what the tensors mean."""


def _refuse_misfits(folder: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    missing, unused = sorted(own.keys() - tensors), sorted(tensors.keys() - own)
    if missing or unused:
        which = f"lacks '{missing[0]}'" if missing else f"has '{unused[0]}', which fits nowhere"
        raise AdapterFolderError(
            f"'{folder}' is no adapter of this base: it {which} "
            f"({len(missing) + len(unused)} such)."
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise AdapterFolderError(
                f"'{folder}' is no adapter of this base: '{name}' has the shape "
                f"{tuple(tensor.shape)}, and the base asks for {tuple(own[name].shape)}."
            )


def reads_base_weights(model: Any) -> bool:
    """Whether an adapter computes with the base's weights themselves, as DoRA does with their norm.

    Of repacked weights bitsandbytes decodes other numbers, without an error.
    """
    configs = getattr(model, "peft_config", {}).values()
    return any(config.use_dora for config in configs)


def allow_inference_kernel(model: nn.Module) -> None:
    """Let bitsandbytes repack weights for its kernel on CPUs with AVX512-BF16, twice as fast.

    A repacked model has no backward pass and rounds the scales to bfloat16 (outputs move by some
    0.3 %), whatever the products' type: so it is never trained, merged or saved, and products in
    float32 are left alone.
    """
    from bitsandbytes.functional import has_avx512bf16  # slow to import

    can_repack = has_avx512bf16()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = can_repack
