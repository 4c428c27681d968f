"""What ``plan_memory`` predicts, held against what exists: bytes counted in real training steps.

    python benchmarks/memory_plan.py [--out FILE.json] [--only llama]

Tiny models of several families, quantised and adapted by the project's own code, take one step on a
CPU. Weights, constants, adapters, gradients and optimizer state are counted tensor by tensor; what
is kept between forward and backward, and the most that exists at a time, storage by storage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
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
from qlora_pl.planning.memory.memory_plan import MemoryPlan, TrainingSetting, plan_memory
from qlora_pl.planning.shapes.model_shape import ModelShape, shape_from_config

LLAMA_LIKE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
SIZES = {name: LLAMA_LIKE[name] for name in ("vocab_size", "hidden_size")}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE | {"model_type": "llama"},
    "mistral": LLAMA_LIKE | {"model_type": "mistral", "num_key_value_heads": 2},
    "qwen2": LLAMA_LIKE | {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": LLAMA_LIKE | {"model_type": "qwen3", "num_key_value_heads": 4},
    "gemma": LLAMA_LIKE | {"model_type": "gemma", "num_key_value_heads": 1},
    "gemma2": LLAMA_LIKE
    | {"model_type": "gemma2", "num_key_value_heads": 4, "query_pre_attn_scalar": 32},
    "phi3": {key: value for key, value in LLAMA_LIKE.items() if key != "head_dim"}
    | {"model_type": "phi3", "pad_token_id": 0},
    "gpt_neox": SIZES
    | {
        "model_type": "gpt_neox",
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "rotary_pct": 0.25,
    },
    "bloom": SIZES | {"model_type": "bloom", "n_layer": 4, "n_head": 8},
    "falcon": SIZES | {"model_type": "falcon", "num_hidden_layers": 4, "num_attention_heads": 8},
    "falcon-rw": SIZES
    | {
        "model_type": "falcon",
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "opt": SIZES
    | {
        "model_type": "opt",
        "word_embed_proj_dim": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "ffn_dim": 1024,
        "max_position_embeddings": 1024,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 8,
        "n_positions": 1024,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": 512,
        "d_model": 256,
        "d_kv": 32,
        "d_ff": 704,
        "num_layers": 3,
        "num_heads": 8,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "dropout_rate": 0.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and one setting."""

    model: str
    setting: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the model's fields."""

    @property
    def name(self) -> str:
        """In words."""
        own = [f"{key} {value}" for key, value in (self.changes | self.setting).items()]
        return ", ".join([self.model, *own])

    @property
    def fields(self) -> dict[str, Any]:
        """The config.json."""
        return MODELS[self.model] | self.changes

    @property
    def training(self) -> TrainingSetting:
        """The setting, of a run on a CPU."""
        return TrainingSetting(**DEFAULTS | self.setting)


DEFAULTS: dict[str, Any] = {
    "r": 16,
    "batch_size": 2,
    "tokens_per_row": 128,
    "has_mask": False,
    "gradient_checkpointing": False,
    "device": "cpu",
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CASES = [
    Case(model="llama"),
    Case(model="llama", setting={"adapter_dtype": "bfloat16"}),
    Case(model="llama", setting={"dropout": 0.1}),
    Case(model="llama", setting={"adapter_dtype": "bfloat16", "dropout": 0.1}),
    Case(model="llama", setting={"has_mask": True}),
    Case(model="llama", setting={"attention": "eager"}),
    Case(model="llama", setting={"attention": "eager", "has_mask": True, "dropout": 0.05}),
    Case(model="llama", setting={"gradient_checkpointing": True}),
    Case(model="llama", setting={"gradient_checkpointing": True, "has_mask": True, "dropout": 0.1}),
    Case(model="llama", setting={"quant_type": "none"}),
    Case(model="llama", setting={"quant_type": "int8"}),
    Case(model="llama", setting={"quant_type": "fp4", "double_quant": False}),
    Case(model="llama", setting={"compute_dtype": "float32"}),
    Case(model="llama", setting={"compute_dtype": "float16"}),
    Case(model="llama", setting={"is_packed": True}),
    Case(model="llama", setting={"method": "dora"}),
    Case(
        model="llama", setting={"quant_type": "none", "method": "none", "adapter_dtype": "bfloat16"}
    ),
    Case(model="llama", setting={"quant_type": "none", "method": "none"}),
    Case(model="llama", setting={"target_modules": ("q_proj", "v_proj")}),
    Case(model="llama", setting={"tokens_per_row": 640}),
    Case(model="mistral"),
    Case(model="mistral", setting={"has_mask": True, "adapter_dtype": "bfloat16"}),
    Case(model="mistral", setting={"attention": "eager", "dropout": 0.1}),
    Case(model="qwen2", setting={"has_mask": True}),
    Case(model="qwen3", setting={"dropout": 0.05, "has_mask": True}),
    Case(model="gemma", setting={"has_mask": True}),
    Case(model="gemma2"),
    Case(model="phi3"),
    Case(model="gpt_neox"),
    Case(model="gpt_neox", setting={"dropout": 0.05, "adapter_dtype": "bfloat16"}),
    Case(model="gpt_neox", setting={"attention": "eager", "has_mask": True}),
    Case(model="gpt_neox", setting={"gradient_checkpointing": True}),
    Case(model="bloom"),
    Case(model="bloom", setting={"dropout": 0.1, "adapter_dtype": "bfloat16"}),
    Case(model="bloom", setting={"gradient_checkpointing": True}),
    Case(model="falcon"),
    Case(model="falcon-rw", setting={"has_mask": True}),
    Case(model="opt", changes={"dropout": 0.0}),
    Case(model="opt"),
    Case(model="gpt2", changes=NO_DROPOUT),
    Case(model="gpt2", changes=NO_DROPOUT, setting={"attention": "eager", "dropout": 0.1}),
    Case(model="gemma", setting={"has_mask": True, "attention": "eager"}),
    Case(model="gpt2", changes=NO_DROPOUT, setting={"gradient_checkpointing": True}),
    Case(model="llama", setting={"attention": "eager", "gradient_checkpointing": True}),
    Case(model="llama", setting={"compute_dtype": "float16", "gradient_checkpointing": True}),
    Case(model="t5", setting={"has_mask": True}),
    Case(model="t5", setting={"has_mask": True, "gradient_checkpointing": True}),
    Case(model="t5", setting={"attention": "eager", "has_mask": True, "dropout": 0.05}),
]


# -- counting --------------------------------------------------------------------------------------


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


# -- predicted against counted ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Predicted and counted bytes of one case."""

    name: str
    exact: dict[str, tuple[int, int]]
    """Component: predicted, counted; of what can be counted exactly."""
    kept: tuple[int, int]
    """Between forward and backward."""
    saved: int
    """Of the counted ones, those in autograd's saved tensors."""
    peak: tuple[int, int]
    """The most at a time, beside what stands."""

    @property
    def error(self) -> float:
        """Of what is kept: predicted over counted, less 1."""
        return self.kept[0] / self.kept[1] - 1

    @property
    def peak_error(self) -> float:
        """Likewise of the peak."""
        return self.peak[0] / self.peak[1] - 1


def compare(case: Case, folder: Path, counted: Counted | None = None) -> Comparison:
    """Plan a case and count it."""
    shape: ModelShape = shape_from_config(case.fields)
    setting = case.training
    plan = plan_memory(shape, setting)
    counted = counted or count(case, folder)
    standing = plan.moments["the optimizer's step"]
    return Comparison(
        name=case.name,
        exact={name: (standing[name], size) for name, size in counted.components.items()},
        kept=(plan.activations.kept(setting.gradient_checkpointing), counted.kept),
        saved=counted.saved,
        peak=(_predicted_peak(plan), counted.peak),
    )


def _predicted_peak(plan: MemoryPlan) -> int:
    passing = ("gradients", "activations", "logits_and_loss", "dequantization")
    return max(
        sum(parts[name] for name in passing)
        for moment, parts in plan.moments.items()
        if moment != "the optimizer's step"
    )


def main() -> None:
    """Print a line for each case; write them to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="what is kept, storage by storage")
    arguments = parser.parse_args()
    results = []
    for case in CASES:
        if arguments.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            counted = count(case, Path(folder))
            result = compare(case, Path(folder), counted)
        wrong = [name for name, (said, is_) in result.exact.items() if said != is_]
        print(
            f"{result.name:72} kept {result.kept[1] / 1e6:7.3f} MB {result.error:+7.2%}   "
            f"saved {result.saved / 1e6:7.3f}   peak {result.peak[1] / 1e6:7.3f} MB "
            f"{result.peak_error:+7.2%}   {'exact' if not wrong else f'NOT exact: {wrong}'}",
            flush=True,
        )
        if arguments.list:
            for name in wrong:
                print(name, result.exact[name])
            print(*(f"{size:9} {label}" for size, label in counted.listing), sep="\n")
            print("at the peak:")
            print(*(f"{size:9} {label}" for size, label in counted.at_peak[:40]), sep="\n")
        results.append(asdict(result) | {"error": result.error, "peak_error": result.peak_error})
    if arguments.out:
        report = {"torch": torch.__version__, "cases": results}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
