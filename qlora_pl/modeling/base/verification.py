"""What was loaded is what was planned, matrix by matrix, and gives logits that are numbers.

transformers leaves matrices unquantised, and families read or rewrite their own weights, without a
word; either is found here, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.encoder_decoder import whole_inputs
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import QuantizationPlan
from qlora_pl.modeling.evaluation_mode import evaluation_mode
from qlora_pl.modeling.parameters import int8_scales

PROBE_TOKENS = 8
"""Length of the row that a loaded base is asked for."""


def account_for(
    model: nn.Module, plan: QuantizationPlan, config: QuantizationConfig, within: str = ""
) -> None:
    """Hold what was loaded against the plan, matrix by matrix.

    Args:
        model: The base.
        plan: From ``make_plan``.
        config: What was asked for.
        within: The module that was loaded, by name; all of them.

    Raises:
        ConfigurationError: naming the matrices that are not what was asked for.
    """
    wrong = []
    for name, shape in plan.quantized.items():
        if within and not name.startswith(f"{within}."):
            continue
        weight: Any = model.get_parameter(name)
        found, found_shape = _kind_of(weight)
        if found is None:
            wrong.append(f"{name} ({str(weight.dtype).split('.')[-1]})")
        elif sorted(found_shape) != sorted(shape):  # sorted: GPT-2's are packed transposed
            raise ConfigurationError(
                f"model.model_name_or_path: '{name}' has the shape {tuple(found_shape)} on disk, "
                f"and config.json asks for {shape}; they are not of the same model."
            )
        elif found != wanted_kind(config):
            wrong.append(f"{name} ({', '.join(str(part) for part in found)})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigurationError(
            f"model.quantization: {len(wrong)} of {len(plan.quantized)} weight matrices are not "
            f"{config.quant_type} after loading: {', '.join(wrong[:3])}{more}; list them in "
            "model.quantization.skip_modules to keep them as they are."
        )


def wanted_kind(config: QuantizationConfig) -> tuple[str, ...]:
    """What ``account_for`` expects to find of a matrix: its code, block size and scales."""
    if not config.is_four_bits:
        return (config.quant_type,)
    scales = "double_quant" if config.uses_double_quant else "plain scales"
    return (config.quant_type, f"blocks of {config.block_size}", scales)


def _kind_of(weight: Any) -> tuple[tuple[str, ...] | None, torch.Size]:
    state = getattr(weight, "quant_state", None)
    if state is not None:
        scales = "double_quant" if state.nested else "plain scales"
        return (state.quant_type, f"blocks of {state.blocksize}", scales), state.shape
    is_int8 = weight.dtype == torch.int8 and getattr(weight, "SCB", None) is not None
    return (("int8",) if is_int8 else None), weight.shape


def refuse_broken_forward(
    model: nn.Module,
    compute_dtype: torch.dtype,
    plan: QuantizationPlan,
    device: torch.device | None = None,
) -> None:
    """One row through the loaded model: its logits are there and are numbers.

    A family that reads a weight itself instead of calling its layer fails on packed bytes, and one
    that rescales weights between training and evaluation (RWKV) multiplies codes; a base whose
    activations leave float16's range gives infinities.

    Args:
        model: The base; of one that is cut over devices all processes ask together.
        compute_dtype: Of the matrix products.
        plan: From ``make_plan``.
        device: Where it computes; None: where its weights are.

    Raises:
        ConfigurationError: with what to do.
    """
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    device = embedding.device if device is None else device
    row = torch.arange(PROBE_TOKENS, device=device).remainder(embedding.shape[0])
    autocast = torch.autocast(device.type, compute_dtype, enabled=compute_dtype == torch.float16)
    before = _versions(model, plan)
    complaints: list[str] = []
    try:
        with (
            evaluation_mode(model),
            torch.no_grad(),
            autocast,
            _watched(model, plan, complaints),
        ):
            logits = model(**whole_inputs(model, row.unsqueeze(0)), use_cache=False).logits
    except Exception as error:
        raise ConfigurationError(
            f"model.model_name_or_path: the loaded {type(model).__name__} cannot be run "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}); if it uses a weight "
            "outside its layer, list that layer in model.quantization.skip_modules."
        ) from error
    if complaints:
        raise ConfigurationError(complaints[0])
    after = _versions(model, plan)
    if changed := [name for name in before if before[name] != after[name]]:
        raise ConfigurationError(
            f"model.model_name_or_path: '{changed[0]}' is changed by a forward pass of the loaded "
            f"{type(model).__name__}, which would spoil its packed bytes; list "
            f"'{changed[0].split('.')[-2]}' in model.quantization.skip_modules."
        )
    if not logits.isfinite().all():
        name = str(compute_dtype).split(".")[-1]
        raise ConfigurationError(
            f"model.quantization.compute_dtype: in {name} the base's logits are not numbers; "
            "take float32, or bfloat16 where the device has it."
        )


@contextmanager
def _watched(model: Any, plan: QuantizationPlan, complaints: list[str]) -> Iterator[None]:
    """Note what a forward pass gives to packed layers and to the head that they cannot have.

    LongT5 casts activations to the type of its ``wo``, which once packed is the type of codes.
    """

    def look_at_packed(name: str) -> Any:
        def look(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if arguments and not arguments[0].is_floating_point():
                complaints.append(
                    f"model.quantization.skip_modules: a {type(model).__name__} casts what it "
                    f"gives to '{name}' to the type of its packed codes; list "
                    f"'{name.rpartition('.')[2]}' there to keep it unquantised."
                )

        return look

    def look_at_head(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments[0].shape[:-1] != (1, PROBE_TOKENS):
            complaints.append(
                f"model.model_name_or_path: a {type(model).__name__} does not make its logits of "
                "one vector a token, so its loss cannot be computed here; take another model."
            )

    handles = [
        model.get_submodule(owner).register_forward_pre_hook(look_at_packed(owner))
        for owner in (name.rpartition(".")[0] for name in plan.quantized)
    ]
    if (head := model.get_output_embeddings()) is not None:
        handles.append(head.register_forward_pre_hook(look_at_head))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _versions(model: nn.Module, plan: QuantizationPlan) -> dict[str, tuple[int, ...]]:
    """Numbers that change when a packed weight, or its int8 scales, are replaced or written to."""
    versions: dict[str, tuple[int, ...]] = {}
    for name in plan.quantized:
        weight = model.get_parameter(name)
        scales = int8_scales(model.get_submodule(name.rpartition(".")[0]))
        versions[name] = (id(weight), weight._version, 0 if scales is None else scales._version)
    return versions
