"""The parameters of a base with an adapter in them, one at a time.

There are two policies, between which peers choose without measuring: ``dequantized`` adds the
adapter to what the 4-bit matrix decodes to, which is what was trained, ``original`` to the matrix
that was packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.loading import add_adapter
from qlora_pl.inference.source import KEY, ModelSource
from qlora_pl.modeling.base.identity import BaseIdentity, stored_dtype
from qlora_pl.modeling.base.prequantized import is_prequantized, make_plan
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import QuantizationPlan, build_skeleton
from qlora_pl.modeling.base.structure import is_conv1d
from qlora_pl.modeling.base.vocabulary import grow_vocabulary
from qlora_pl.modeling.folders.peft_folder import read_tensors
from qlora_pl.modeling.loading.base_loading import from_pretrained
from qlora_pl.modeling.loading.packed_model import name_in_base

Policy = Literal["dequantized", "original"]
POLICIES: tuple[Policy, ...] = ("dequantized", "original")
CPU = torch.device("cpu")


class MergedWeights:
    """A base in its own type, whose pages stay in its files, and an adapter beside it.

    Args:
        source: Of one adapter, or of none.
        identity: Its base.
        trust_remote_code: Whether Python code beside the base may run.

    Raises:
        ConfigurationError: if the base is stored in 4 or 8 bits, or cannot be loaded.
        AdapterFolderError: if the adapter does not fit it.
    """

    def __init__(
        self, source: ModelSource, identity: BaseIdentity, trust_remote_code: bool = False
    ) -> None:
        if is_prequantized(identity.folder):
            raise ConfigurationError(
                f"--adapter: its base '{identity.name}' is stored in 4 or 8 bits, and a merged "
                "model is written in 16; name the base in 16 bits with --base."
            )
        self.skeleton = build_skeleton(identity.folder, "auto", trust_remote_code)
        self.quantization = source.quantization
        self.plan: QuantizationPlan = make_plan(identity.folder, self.skeleton, source.quantization)
        self.base: Any = from_pretrained(
            identity.folder,
            {
                "device_map": {"": "cpu"},
                "dtype": stored_dtype(identity.folder),
                "attn_implementation": "eager",
                "trust_remote_code": trust_remote_code,
            },
        )
        if source.vocabulary_size is not None:
            grow_vocabulary(self.base, source.vocabulary_size)
        self.model: Any = self.base
        self._biases: dict[str, Tensor] = {}
        self.name = next(iter(source.adapters), None)
        if self.name is not None:
            folder = source.adapters[self.name]
            self.model, _ = add_adapter(self.base, folder, self.name, torch.float32)
            tensors = read_tensors(folder, KEY)
            # In the base's own type they would be rounded.
            self._biases = {name_in_base(n): t for n, t in tensors.items() if n.endswith(".bias")}
        manifest = source.manifest
        rest = manifest.quantization["unquantized_dtype"] if manifest else "bfloat16"
        self.rest_dtype = getattr(torch, rest)

    def sizes(self) -> list[tuple[str, int]]:
        """Names in the base, each with its number of elements; a tied parameter once."""
        return [(place.name, place.tensor.numel()) for place in self._places()]

    def tensors(self, policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and lasting buffer, merged, in a type; computed in float32.

        Args:
            policy: What the adapter is added to.
            dtype: Of what is floating point.
        """
        with torch.no_grad():
            for place in self._places():
                merged = self._merged(place, policy)
                yield place.name, merged.to(dtype) if merged.is_floating_point() else merged

    def _places(self) -> Iterator[_Place]:
        seen: set[int] = set()
        for owner, module in self.model.named_modules():
            if any(part in owner for part in ADAPTERS):
                continue
            wrapper = None
            if owner.endswith("base_layer"):
                wrapper = self.model.get_submodule(owner.rpartition(".")[0])
            lasting = {
                key: buffer
                for key, buffer in module._buffers.items()
                if key not in module._non_persistent_buffers_set
            }
            for leaf, tensor in {**module._parameters, **lasting}.items():
                if tensor is None or id(tensor) in seen:  # tied, and tied again by who loads it
                    continue
                seen.add(id(tensor))
                name = name_in_base(f"{owner}.{leaf}".removeprefix(".")).replace(TOKENS, ".")
                yield _Place(name, module, wrapper if leaf == "weight" else None, tensor.detach())

    def _merged(self, place: _Place, policy: Policy) -> Tensor:
        tensor, layer = place.tensor, place.wrapper
        if place.name in self._biases:
            return self._biases[place.name].float()
        if not tensor.is_floating_point():
            return tensor
        if policy == "dequantized":
            tensor = tensor.to(self.rest_dtype)
            if place.name in self.plan.quantized:
                tensor = round_trip(tensor, self.quantization, is_conv1d(place.module))
        weight = tensor.float()
        if layer is None:
            return weight
        if hasattr(layer, "trainable_tokens_delta"):
            changed = weight.clone()
            rows = layer.trainable_tokens_delta[self.name].detach().float()
            changed[list(layer.token_indices[self.name])] = rows
            return changed
        delta: Tensor = layer.get_delta_weight(self.name)
        if self.name not in layer.lora_magnitude_vector:
            return weight + delta
        # DoRA: PEFT's own merging takes the layer's matrix, whichever it is given.
        magnitude = layer.lora_magnitude_vector[self.name]
        length = magnitude.get_weight_norm(weight, magnitude.rows(delta), 1.0)
        scale = (magnitude.weight.float() / length)[:, None]
        return (weight + delta) * (scale.t() if magnitude.fan_in_fan_out else scale)


ADAPTERS = ("lora_A", "lora_B", "lora_embedding", "lora_magnitude", "lora_dropout")
TOKENS = ".token_adapter."
"""What PEFT puts into the name of an embedding some of whose rows are trained."""


class _Place(NamedTuple):
    name: str
    """In the base."""
    module: nn.Module
    """The base's own."""
    wrapper: Any
    """What PEFT put around it, of a weight; None: nothing."""
    tensor: Tensor


def round_trip(weight: Tensor, config: QuantizationConfig, is_transposed: bool) -> Tensor:
    """What a matrix decodes to after it was packed: the one that was trained over.

    Args:
        weight: In the type in which it was packed.
        config: How.
        is_transposed: Whether it lies as GPT-2's do; the loader packs it the other way round.
    """
    import bitsandbytes.functional as bnb  # slow to import

    matrix = weight.t().contiguous() if is_transposed else weight
    if config.is_four_bits:
        packed, state = bnb.quantize_4bit(
            matrix,
            blocksize=config.block_size,
            compress_statistics=config.uses_double_quant,
            quant_type=config.quant_type,
        )
        decoded: Tensor = bnb.dequantize_4bit(packed, state)
    elif config.quant_type == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
        decoded = (codes.float() * scales.float()[:, None] / 127).to(weight.dtype)
    else:
        return weight
    return decoded.t() if is_transposed else decoded
