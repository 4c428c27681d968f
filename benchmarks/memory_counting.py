"""Bytes of one real training step on a CPU, tensor by tensor and storage by storage.

Nothing here knows of the plan that it is held against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory_cases import Case
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.encoder_decoder import auto_class, language_model_loss
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.full_training import train_all_weights
from qlora_pl.modeling.loading.base_loading import load_base, prepare_for_training
from qlora_pl.modeling.optimization.mixed_precision import precision_plugin
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, build_optimizer
from qlora_pl.modeling.parameters import int8_scales, trainable_tensors
from qlora_pl.modeling.steps.micro_batches import back_propagate


class Storages(TorchDispatchMode):
    """Every storage that an operation makes, for as long as it lives.

    Args:
        known: Tensors that were there before.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {_key(tensor) for tensor in known}
        self._sizes: dict[StorageWeakRef, tuple[int, str]] = {}
        self._by_key: dict[int, StorageWeakRef] = {}
        self.peak = 0
        self.at_peak: list[tuple[int, str]] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note what it made."""
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._note(tensor, str(operation))
        live = self.live
        if live > self.peak:
            self.peak, self.at_peak = live, self.listing()
        return result

    def _note(self, tensor: Tensor, operation: str) -> None:
        key = _key(tensor)
        if key in self._known:
            return
        reference = self._by_key.get(key)
        if reference is None or reference.expired():
            reference = StorageWeakRef(tensor.untyped_storage())
            self._by_key[key] = reference
            label = f"{operation} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            self._sizes[reference] = (tensor.untyped_storage().nbytes(), label)

    @property
    def live(self) -> int:
        """Bytes of the storages that live now."""
        for reference in [ref for ref in self._sizes if ref.expired()]:
            del self._sizes[reference]
        return sum(size for size, _ in self._sizes.values())

    def listing(self) -> list[tuple[int, str]]:
        """Bytes and makers of the storages that live now."""
        return sorted((entry for entry in self._sizes.values()), reverse=True)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[dict[int, tuple[int, str]]]:
    """Bytes of every storage that autograd saves meanwhile, parameters left out."""
    known = {_key(tensor) for tensor in standing_tensors(model)}
    found: dict[int, tuple[int, str]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in known:
            size = tensor.untyped_storage().nbytes()
            found[_key(tensor)] = (size, f"{tuple(tensor.shape)} {tensor.dtype}")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def standing_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and what packed ones are decoded with."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        tensors += constants_of(parameter)
    for module in model.modules():
        if (scales := int8_scales(module)) is not None:
            tensors.append(scales)
    return tensors


def constants_of(parameter: Any) -> list[Tensor]:
    """What a packed matrix is decoded with."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    own = [state.absmax, state.code]
    return own + ([state.state2.absmax, state.state2.code, state.offset] if state.nested else [])


def num_bytes(tensors: Any) -> int:
    """Of these tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes of one step."""

    components: dict[str, int]
    kept: int
    """Storages that live between forward and backward and did not before."""
    saved: int
    """Of those, the ones that autograd saved."""
    peak: int
    """The most that existed at a time in forward and backward, beside what stands, gradients
    included."""
    listing: list[tuple[int, str]]
    at_peak: list[tuple[int, str]]


def build(case: Case, folder: Path) -> tuple[Any, nn.Module]:
    """A random model on disk, loaded and adapted as a run does it."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(**case.fields)
    auto_class(config).from_config(config).to(torch.bfloat16).save_pretrained(folder)
    setting = case.training
    quantization = QuantizationConfig(
        quant_type=setting.quant_type,
        double_quant=setting.double_quant if setting.is_four_bits else None,
        compute_dtype=setting.compute_dtype,
        skip_modules=setting.skip_modules,
        cache=False,
    )
    kernel: Any = setting.attention
    plan = plan_quantization(build_skeleton(folder, kernel), quantization)
    base = load_base(
        identify_base(str(folder), None, None),
        quantization,
        plan,
        device=torch.device("cpu"),
        attn_implementation=kernel,
        rest_dtype=None if setting.has_adapters else getattr(torch, setting.adapter_dtype),
    )
    targets = setting.target_modules
    lora = LoRAConfig(
        method=setting.method,
        r=setting.r,
        dropout=setting.dropout,
        bias=setting.bias,
        dtype=setting.adapter_dtype,  # type: ignore[arg-type]
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    if setting.has_adapters:
        model = attach_adapters(base.model, lora, 0)
    else:
        model = train_all_weights(base.model, base.compute_dtype)
    prepare_for_training(model, setting.gradient_checkpointing)
    return base, model


def make_batch(case: Case) -> dict[str, Tensor]:
    """A micro-batch as the data module makes it."""
    setting = case.training
    ids = torch.randint(5, 500, (setting.batch_size, setting.tokens_per_row))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if setting.is_packed:
        half = setting.tokens_per_row // 2
        batch["position_ids"] = torch.arange(half).repeat(2).expand_as(ids).contiguous()
        return batch
    mask = torch.ones_like(ids)
    if setting.has_mask:
        mask[0, -8:] = 0
        batch["labels"][0, -8:] = -100
    batch["attention_mask"] = mask
    if case.model == "t5":
        batch["decoder_attention_mask"] = mask.clone()
    return batch


def count(case: Case, folder: Path) -> Counted:
    """Take one step and count."""
    base, model = build(case, folder)
    plugin = precision_plugin(base.compute_dtype, model, torch.device("cpu"))
    context = plugin.forward_context if plugin is not None else torch.enable_grad
    batch = make_batch(case)
    known = [*standing_tensors(model), *batch.values()]
    with saved_tensors(model) as saved, context():
        language_model_loss(model, batch).total.detach()
    storages = Storages(known)
    with storages:
        with context():
            loss = language_model_loss(model, batch)
        kept, listing = storages.live, storages.listing()
        back_propagate(loss.total, plugin)
    del loss
    trained = trainable_tensors(model)
    optimizer = build_optimizer(
        OptimizerConfig(name=case.training.optimizer), list(trained.items())
    )
    optimizer.step()
    return Counted(
        components=_components(model, optimizer),
        kept=kept,
        saved=sum(size for size, _ in saved.values()),
        peak=storages.peak,
        listing=listing,
        at_peak=storages.at_peak,
    )


def _components(model: Any, optimizer: Any) -> dict[str, int]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = {id(base.get_input_embeddings().weight), id(base.get_output_embeddings().weight)}
    tables = {id(module.weight) for module in base.modules() if isinstance(module, nn.Embedding)}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    is_whole = not frozen
    base_parameters = list(model.parameters()) if is_whole else frozen
    packed = [p for p in base_parameters if p.dtype in (torch.uint8, torch.int8)]
    outside = [p for p in base_parameters if id(p) in ends | tables]
    counted = {id(p) for p in [*packed, *outside]}
    trained = list(trainable_tensors(model).values())
    scales = [int8_scales(module) for module in model.modules()]
    states = {
        tensor.untyped_storage()._cdata: tensor
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    }
    return {
        "packed_weights": num_bytes(packed),
        "constants": num_bytes(
            [tensor for p in packed for tensor in constants_of(p)]
            + [tensor for tensor in scales if tensor is not None]
        ),
        "embeddings_and_head": num_bytes(outside),
        "norms_and_other": num_bytes(p for p in base_parameters if id(p) not in counted),
        "adapters": 0 if is_whole else num_bytes(trained),
        "gradients": num_bytes(p.grad for p in trained if p.grad is not None),
        "optimizer_state": num_bytes(states.values()),
    }
