"""A base of a known shape whose weights are drawn, packed at once and let go, matrix by matrix.

What comes of it is the model that training uses, put together by the same code as one that is read
from a packed copy: only the tensors come from a generator instead of a file. So a 70B needs no
download, no disk, and no more of the host than its largest matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.modeling.base.encoder_decoder import auto_class, keep_float32_products
from qlora_pl.modeling.base.identity import BaseIdentity
from qlora_pl.modeling.base.quantization import QuantizationConfig, resolve_compute_dtype
from qlora_pl.modeling.base.quantization_plan import AttentionKernel, QuantizationPlan, kernel_name
from qlora_pl.modeling.base.verification import account_for, refuse_broken_forward
from qlora_pl.modeling.loading.base_loading import (
    LoadedBase,
    bitsandbytes_config,
    keep_gradients_on_cpu,
    unquantized_dtype,
)
from qlora_pl.modeling.loading.host_memory import large_blocks_apart
from qlora_pl.modeling.loading.packed_model import (
    SCALES,
    empty_model,
    fill,
    refuse_empty,
)
from qlora_pl.modeling.loading.replacement import planned_replacement
from qlora_pl.modeling.module import QLoRAModule

STANDARD_DEVIATION = 0.02
"""Of every matrix: what LLaMA and most others are initialised with."""
LOGIT_DEVIATION = 0.64
"""Of the logits at most: with a width of 4096 a head of 0.02 would give 1.28, and a loss 0.82 nats
above that of guessing (half of the variance), which could not be told from a mistake."""
PROBE_WEIGHTS = 2**22
"""Weights that are drawn and packed to find out how long all will take."""


class SyntheticModule(QLoRAModule):
    """A ``QLoRAModule`` whose base is drawn.

    Args:
        folder: Holds the shape's config.json, and nothing else.
        name: What the shape is called.
        seed: Of the weights.
        settings: Of a ``QLoRAModule``.
    """

    def __init__(self, folder: Path, name: str, seed: int = 0, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.folder, self.seed = folder, seed

    def identify(self) -> BaseIdentity:
        """The shape and the seed, which are all there is to know of these weights."""
        config = hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()
        drawn = hashlib.sha256(f"drawn with seed {self.seed}".encode()).hexdigest()
        return BaseIdentity(self.model_name_or_path, self.folder, drawn, config)

    def make_base(
        self,
        identity: BaseIdentity,
        config: QuantizationConfig,
        plan: QuantizationPlan,
        **where: Any,
    ) -> LoadedBase:
        """Draw what ``load_base`` would read; takes its arguments."""
        return draw_base(
            identity.folder,
            config,
            plan,
            device=where["device"],
            seed=self.seed,
            attn_implementation=where["attn_implementation"],
            rest_dtype=where["rest_dtype"],
        )


def write_config(folder: Path, shape: Mapping[str, Any]) -> Path:
    """A folder with the config.json of a shape, in the form of ``AutoConfig.for_model``."""
    from transformers import AutoConfig  # slow to import

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**shape)
    fields = json.loads(config.to_json_string(use_diff=False))
    # The classes are not told from the type alone where several read it.
    if not fields.get("architectures"):
        fields["architectures"] = [type(_on_meta(config)).__name__]
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return folder


def _on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config)
    return model


@large_blocks_apart()
def draw_base(
    folder: Path,
    config: QuantizationConfig,
    plan: QuantizationPlan,
    *,
    device: torch.device,
    seed: int = 0,
    attn_implementation: AttentionKernel = "auto",
    rest_dtype: torch.dtype | None = None,
) -> LoadedBase:
    """A random base on a device, quantised as planned; what ``load_base`` returns, drawn.

    Args:
        folder: Holds config.json.
        config: How to quantise.
        plan: From ``plan_quantization``.
        device: Where to.
        seed: Every tensor is a function of it and of the tensor's name.
        attn_implementation: See ``QLoRAModule``.
        rest_dtype: Of what is not quantised; None: see ``unquantized_dtype``.
    """
    compute_dtype = resolve_compute_dtype(config.compute_dtype, device)
    rest_dtype = rest_dtype or unquantized_dtype(config, compute_dtype)
    quantizer = bitsandbytes_config(config, compute_dtype, plan) if config.is_quantized else None
    with planned_replacement(plan, config, compute_dtype):
        kernel = kernel_name(attn_implementation)
        model: Any = empty_model(folder, quantizer, rest_dtype, kernel, False)
    with _bar(sum(p.numel() for p in model.parameters()), f"Weights of {folder.name}") as bar:
        tensors: Any = DrawnTensors(model, config, plan, rest_dtype, seed, bar.update)
        fill(model, tensors, device)
    refuse_empty(model)
    account_for(model, plan, config)
    keep_gradients_on_cpu(model)
    if compute_dtype == torch.float16:
        keep_float32_products(model, plan.fragile)
    model.requires_grad_(False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    refuse_broken_forward(model, compute_dtype, plan)
    return LoadedBase(model, plan, compute_dtype, rest_dtype, "drawn")


def _bar(num_weights: int, title: str) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=num_weights, desc=title, unit=" weights", unit_scale=True, delay=2.0)


class DrawnTensors:
    """Stands where ``NamedTensors`` does: tensors by name, each drawn when it is asked for.

    Args:
        model: The empty model that is to be filled.
        config: How matrices are quantised.
        plan: Which of them.
        dtype: Of what is not quantised.
        seed: See ``draw_base``.
        tell: Called with the number of weights of each tensor that was drawn.
    """

    def __init__(
        self,
        model: Any,
        config: QuantizationConfig,
        plan: QuantizationPlan,
        dtype: torch.dtype,
        seed: int,
        tell: Callable[[int], Any] = lambda number: None,
    ) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._real = _vectors_and_buffers(model.config, dtype)
        self._config, self._plan, self._dtype, self._seed = config, plan, dtype, seed
        self._tell = tell
        head = model.get_output_embeddings()
        self._head = {n for n, p in model.named_parameters() if head and p is head.weight}
        self._decoding: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes or name in self._real

    def read(self, name: str, device: torch.device) -> Tensor:
        """A tensor on its device: codes of what the plan quantises."""
        if name in self._decoding:  # the scales of an int8 matrix
            return self._decoding.pop(name)
        if name in self._real:
            return self._real.pop(name).to(device)
        shape = self._shapes[name]
        self._tell(math.prod(shape))
        weight = draw(shape, name, self._seed, device, self._deviation(name))
        if name not in self._plan.quantized:
            return weight.to(self._dtype)
        return self._packed(name, weight)

    def belonging_to(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """What the codes that were read last are decoded with."""
        found, self._decoding = self._decoding, {}
        return found

    def _deviation(self, name: str) -> float:
        if name not in self._head:
            return STANDARD_DEVIATION
        return min(STANDARD_DEVIATION, LOGIT_DEVIATION / math.sqrt(self._shapes[name][-1]))

    def _packed(self, name: str, weight: Tensor) -> Tensor:
        import bitsandbytes as bnb  # slow to import

        config = self._config
        if not config.is_four_bits:
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
            self._decoding = {f"{name}.{SCALES}": scales}
            return codes
        codes, state = pack(weight, config)
        self._decoding = state.as_dict(packed=True)
        return codes


def draw(
    shape: tuple[int, ...], name: str, seed: int, device: torch.device, deviation: float
) -> Tensor:
    """A normal matrix in bfloat16, which depends on its name and the seed alone."""
    number = zlib.crc32(f"{seed}/{name}".encode())
    generator = torch.Generator(device).manual_seed(number)
    empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return empty.normal_(0.0, deviation, generator=generator)


def pack(weight: Tensor, config: QuantizationConfig) -> tuple[Tensor, Any]:
    """A matrix in 4 bits, as bitsandbytes packs it: codes, and the state that decodes them."""
    from bitsandbytes import functional  # slow to import

    codes, state = functional.quantize_4bit(
        weight,
        blocksize=config.block_size,
        compress_statistics=config.uses_double_quant,
        quant_type=config.quant_type,
        quant_storage=getattr(torch, config.storage_dtype),
    )
    return codes, state


def _vectors_and_buffers(config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Norms, biases and buffers of a new model, in the family's own initialisation."""
    with _without_matrices():
        model = auto_class(config).from_config(config, dtype=dtype)
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named if tensor.device.type != "meta"}


@contextmanager
def _without_matrices() -> Iterator[None]:
    """Within the block, parameters of two or more dimensions lose their bytes when they are made.

    A family's initialisation then costs nothing but for the rest, of which it knows best: Gemma's
    norms start at zero, rotary frequencies are computed.
    """
    register = nn.Module.register_parameter

    def without_bytes(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and parameter.ndim >= 2:
            self._parameters[name] = nn.Parameter(parameter.detach().to("meta"))

    nn.Module.register_parameter = without_bytes  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def drawing_seconds(num_weights: int, config: QuantizationConfig, device: torch.device) -> float:
    """About how long so many weights take to be drawn and packed here, from a small piece."""
    width = math.isqrt(PROBE_WEIGHTS)
    seconds = 0.0
    for attempt in ("warm up", "measure"):
        started = time.perf_counter()
        weight = draw((width, width), attempt, 0, device, STANDARD_DEVIATION)
        if config.is_four_bits:
            pack(weight, config)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    return seconds * num_weights / width**2
