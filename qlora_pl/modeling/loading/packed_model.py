"""A loaded base as named tensors, and back: into a model without weights, whole or part by part.

The names are those of the model in memory, so that nothing has to be renamed, and no layer needs
another to be there: a strategy that shards the base fills one decoder layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.encoder_decoder import auto_class
from qlora_pl.modeling.parameters import int8_scales

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a base's names; an adapted layer's own become ``NAME.base_layer``."""
SCALES = "SCB"
"""What bitsandbytes calls the scales of an int8 matrix."""


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, and what a packed matrix is decoded with.

    Buffers that transformers would compute anew are among them; a tied parameter has one name.
    """
    for name, parameter in model.named_parameters():
        yield from packed_tensors(name, parameter, model.get_submodule(_owner(name)))
    yield from model.named_buffers()


def packed_tensors(
    name: str, weight: nn.Parameter, layer: nn.Module | None = None
) -> Iterator[tuple[str, Tensor]]:
    """A parameter by its name, and what it is decoded with; int8's scales are its layer's."""
    yield name, weight.data
    for key, tensor in decoding_tensors(layer, weight):
        yield f"{name}.{key}", tensor


def without_bytes(weight: Any) -> nn.Parameter:
    """A 4-bit matrix that says all of itself but its codes and scales, which are let go."""
    state = weight.quant_state
    for part in (state, state.state2):
        if part is not None:
            part.absmax = part.absmax.to("meta")
    codes = torch.empty_like(weight.data, device="meta")
    empty: nn.Parameter = type(weight)(codes, **(vars(weight) | {"requires_grad": False}))
    return empty


def decoding_tensors(layer: nn.Module | None, weight: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """What a layer's packed weight is decoded with, under the last part of its name."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        yield from state.as_dict(packed=True).items()
    elif (
        layer is not None
        and weight.dtype == torch.int8
        and (scales := int8_scales(layer)) is not None
    ):
        yield SCALES, scales


def name_in_base(name: str) -> str:
    """The name of an adapted model's tensor or module in its base."""
    return f"{name}.".removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").removesuffix(".")


class NamedTensors:
    """The tensors of safetensors files by name, read when they are asked for.

    Args:
        files: Names of tensors -> the files that hold them.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, device: torch.device) -> Tensor:
        """One tensor on a device; on a CPU it stays in the file's pages, which processes share."""
        from safetensors import safe_open

        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor.to(device)

    def belonging_to(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """What a packed matrix is decoded with, by the last part of its name."""
        prefix = f"{name}."
        return {
            key.removeprefix(prefix): self.read(key, device)
            for key in self._files
            if key.startswith(prefix)
        }


def empty_model(
    folder: Path,
    quantizer_config: Any,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> nn.Module:
    """What ``from_pretrained`` returns, without its weights; for ``fill``.

    Within ``planned_replacement`` where the base is quantised.

    Args:
        folder: Of the base.
        quantizer_config: A ``BitsAndBytesConfig``; None: unquantised.
        dtype: Of weights that are not quantised.
        attn_implementation: In transformers' words.
        trust_remote_code: Whether Python code in the folder may run.
    """
    from transformers import AutoConfig, GenerationConfig  # slow to import
    from transformers.quantizers.auto import AutoHfQuantizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config.name_or_path = str(folder)
    model: Any
    with torch.device("meta"):
        model = auto_class(config).from_config(
            config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        if quantizer_config is not None:
            quantizer = AutoHfQuantizer.from_config(quantizer_config, pre_quantized=True)
            quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"})
    if quantizer_config is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    empty: nn.Module = model
    return empty


def fill(
    model: nn.Module,
    tensors: NamedTensors,
    device: torch.device,
    name_in_files: Callable[[str], str] = str,
    within: str = "",
) -> None:
    """Give an empty model, or a module of it, its weights and buffers on a device.

    What is filled already is left alone, and so is what the files do not hold (adapters).

    Args:
        model: The whole model; tied parameters are tied again wherever they are.
        tensors: Its tensors.
        device: Where to.
        name_in_files: What a tensor of ``model`` is called there; the same.
        within: The module to fill, by its name in ``model``; all of it.

    Raises:
        ConfigurationError: if a tensor has another shape than its place.
    """
    places = _places(model)
    for parameter in list(model.get_submodule(within).parameters()):
        if parameter.device.type == "meta":
            _fill_places(places[id(parameter)], parameter, tensors, device, name_in_files)
    for name, _ in list(model.get_submodule(within).named_buffers(within)):
        key = name_in_files(name)
        if key in tensors:
            owner = model.get_submodule(_owner(name))
            owner._buffers[name.rpartition(".")[2]] = tensors.read(key, device)


def refuse_empty(model: nn.Module) -> None:
    """Every parameter and buffer must have been filled.

    Raises:
        ConfigurationError: naming one that was not.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    if left := [name for name, tensor in named if tensor.device.type == "meta"]:
        raise ConfigurationError(
            f"model.model_name_or_path: the kept 4-bit copy lacks {len(left)} tensors "
            f"('{left[0]}' is one); delete it from the cache's folder 'packed'."
        )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _places(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The name and the module of every place where a parameter stands; a tied one has several."""
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append((name, model.get_submodule(_owner(name))))
    return places


def _fill_places(
    places: list[tuple[str, nn.Module]],
    parameter: nn.Parameter,
    tensors: NamedTensors,
    device: torch.device,
    name_in_files: Callable[[str], str],
) -> None:
    """Every place has the tensor of its own name, or is tied to one that has.

    A checkpoint may bring a head of its own for a model that ties it (T5 v1.1).
    """
    own = {
        name: _parameter(name_in_files(name), parameter, owner, tensors, device)
        for name, owner in places
        if name_in_files(name) in tensors
    }
    if own:
        first = next(iter(own.values()))
        for name, owner in places:
            owner._parameters[name.rpartition(".")[2]] = own.get(name, first)


def _parameter(
    key: str, place: nn.Parameter, owner: Any, tensors: NamedTensors, device: torch.device
) -> nn.Parameter:
    import bitsandbytes as bnb  # slow to import

    data = tensors.read(key, device)
    if isinstance(place, bnb.nn.Params4bit):
        packed: nn.Parameter = bnb.nn.Params4bit.from_prequantized(
            data, tensors.belonging_to(key, device), device=device, module=owner
        )
        return packed
    if data.shape != place.shape:
        raise ConfigurationError(
            f"model.model_name_or_path: the kept copy of '{key}' has the shape "
            f"{tuple(data.shape)}, and the model asks for {tuple(place.shape)}; delete the copy."
        )
    if isinstance(place, bnb.nn.Int8Params):
        scales = tensors.read(f"{key}.{SCALES}", device)
        int8: nn.Parameter = bnb.nn.Int8Params(
            data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales
        )
        return int8
    return nn.Parameter(data, requires_grad=False)
