"""LLM.int8 bases: their codes are bitsandbytes' own, their arithmetic is float64's within reason.

On a CPU bitsandbytes 0.50 multiplies dequantised weights while training, and rounds activations to
8 bits a row, but for outliers, in evaluation (Dettmers et al. 2022, arXiv:2208.07339, section 3).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import Killed
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear8bitLt
from families import BY_NAME
from plain_peft import reload_with_plain_peft
from safetensors.torch import load_file
from small_runs import fit, logits, make_row, one_thread  # noqa: F401
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig, bits_per_weight, packed_bytes
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.loading.base_loading import LoadedBase, load_base, prepare_for_training
from qlora_pl.modeling.parameters import count_parameters, trainable_tensors
from qlora_pl.modeling.steps.loss import causal_lm_loss

CPU = torch.device("cpu")
LORA = LoRAConfig(r=4, bias="all")
FAMILIES = ["LLaMA", "Qwen2", "GPT-2", "Falcon RW"]  # plain, biased, transposed, of a subclass

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family's tiny model, made when it is first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = BY_NAME[name].save(tmp_path_factory.mktemp("family") / "base")
        return made[name]

    return get


def load(folder: Path, **settings: Any) -> LoadedBase:
    defaults = {"quant_type": "int8", "cache": False, "compute_dtype": "float32"}
    config = QuantizationConfig(**defaults | settings)
    plan = plan_quantization(build_skeleton(folder), config)
    return load_base(identify_base(str(folder), None, None), config, plan, device=CPU)


def codes_and_scales(loaded: LoadedBase) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name in loaded.plan.quantized:
        layer: Any = loaded.model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, Linear8bitLt)
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        found[name] = (layer.weight.data, scales)
    return found


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.double() * scales.double()[:, None] / 127


def stored_tensors(folder: Path, transposed: bool) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.t() if transposed else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_codes_and_scales_are_bitsandbytes_own_of_the_files_tensors(
    family: str, compute: str, saved: Any
) -> None:
    """Source: bitsandbytes.functional.int8_vectorwise_quant; and rows scaled to 127 by hand."""
    loaded = load(saved(family), compute_dtype=compute)
    stored = stored_tensors(saved(family), transposed=family == "GPT-2")
    found = codes_and_scales(loaded)
    assert len(found) == BY_NAME[family].num_linears
    for name, (codes, scales) in found.items():
        weight = next(t for n, t in stored.items() if name.endswith(n)).contiguous()
        expected, expected_scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        assert codes.dtype == torch.int8
        assert torch.equal(codes, expected)
        assert torch.equal(scales, expected_scales)
        assert torch.equal(scales, weight.abs().amax(dim=1).float())
        by_hand = (weight.double() / scales.double()[:, None] * 127).round()
        assert (codes.double() - by_hand).abs().max() <= 1  # its factor 127 / scale is rounded


def exact_and_rounded(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, and LLM.int8's: inputs rounded, but for columns with outliers."""
    half = x.half().double()  # what codes are made of
    outliers = (half.abs() >= 6).any(dim=0)
    # A row's largest value is taken without outliers, but with what else is in their columns.
    scale = half.masked_fill(half.abs() >= 6, 0).abs().amax(dim=1, keepdim=True)
    codes = (half / scale * 127).round()
    rounded = torch.where(outliers, x.double(), codes * scale / 127)
    return x.double() @ weight.t(), rounded @ weight.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_outliers", [False, True])
def test_forward_and_input_gradient_are_those_of_float64(
    dtype: torch.dtype, with_outliers: bool, saved: Any
) -> None:
    """In training the very product; in evaluation that of activations rounded to 8 bits.

    Tolerances, of the largest output: a few ulps of the type (products are summed in float32 and
    rounded once); in evaluation 1e-4 besides, as bitsandbytes writes 1 / 127**2 with 7 digits, and
    one code, since an input halfway between two may fall to either side.
    """
    loaded = load(saved("LLaMA"))
    name = "model.layers.0.mlp.down_proj.weight"
    layer = loaded.model.get_submodule(name.removesuffix(".weight"))
    weight = dequantized(*codes_and_scales(loaded)[name])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 128, generator=generator).to(dtype)
    if with_outliers:
        x[0, 3, 5], x[1, 2, 77] = 20.0, -8.0
    exact, rounded = (
        part.reshape(2, 24, 64) for part in exact_and_rounded(x.flatten(0, 1), weight)
    )
    largest, ulps = exact.abs().max().item(), 4 * torch.finfo(dtype).eps
    x.requires_grad_()
    trained = layer.train()(x)
    assert trained.dtype == dtype
    assert (trained.double() - exact).abs().max() <= ulps * largest
    outer = torch.randn(2, 24, 64, generator=generator).to(dtype)
    (gradient,) = torch.autograd.grad(trained, x, outer)
    expected = outer.double() @ weight
    assert (gradient.double() - expected).abs().max() <= ulps * expected.abs().max()
    with torch.no_grad():
        evaluated = layer.eval()(x.detach().clone())
    one_code = x.detach().double().abs().clamp(max=6).amax() / 127 * weight.abs().max()
    assert (evaluated.double() - rounded).abs().max() <= (ulps + 1e-4) * largest + one_code
    # and what LLM.int8 costs: half a code for each input, at worst all in one direction
    half_code = x.detach().double().abs().clamp(max=6).amax() / 254
    bound = half_code * weight.abs().sum(dim=1) + (ulps + 1e-4) * largest
    assert ((evaluated.double() - exact).abs() <= bound).all()
    assert (evaluated.double() - exact).abs().max() > 1e-3 * largest  # it is really rounded


def make_batch() -> dict[str, Tensor]:
    ids = torch.arange(5, 37).reshape(2, 16)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = causal_lm_loss(model, make_batch()).total
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in trainable_tensors(model).items() if p.grad is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_the_float32_twins_before_and_after_an_evaluation(
    family: str, checkpointing: bool, saved: Any
) -> None:
    """Source: plain transformers and PEFT over dequantised weights.

    1e-5 of the largest gradient: float32 sums in another order. Before and after: equal in every
    bit, though bitsandbytes moves scales about in the first forward.
    """
    from transformers import AutoModelForCausalLM

    loaded = load(saved(family))
    twin = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32)
    for name, (codes, scales) in codes_and_scales(loaded).items():
        values = dequantized(codes, scales).float()
        twin.get_parameter(name).data = values.t().contiguous() if family == "GPT-2" else values
    models = [attach_adapters(model, LORA, seed=0) for model in (loaded.model, twin)]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable_tensors(models[0]).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
            models[1].get_parameter(name).data.copy_(parameter)
    assert any("bias" in name for name in trainable_tensors(models[0])) is (family != "LLaMA")
    for model in models:
        prepare_for_training(model, checkpointing)
    loss, gradients = loss_and_gradients(models[0])
    expected, reference = loss_and_gradients(models[1])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == reference.keys() == trainable_tensors(models[0]).keys()
    for name, gradient in gradients.items():
        largest = reference[name].abs().max().item()
        torch.testing.assert_close(gradient, reference[name], rtol=0, atol=1e-5 * largest)
    logits(models[0])
    again, after = loss_and_gradients(models[0].train())
    assert torch.equal(again, loss)
    assert all(torch.equal(after[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("family", ["LLaMA", "GPT-2"])
def test_the_packed_copy_reloads_bit_for_bit_and_quantises_nothing(
    family: str, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    quantize = bnb.int8_vectorwise_quant
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "bitsandbytes.functional.int8_vectorwise_quant",
        lambda *a, **k: calls.append(a[0].shape) or quantize(*a, **k),
    )
    made = load(saved(family), cache=True)
    of_weights = [shape for shape in calls if shape[0] > 8]  # others are of the probe's 8 tokens
    assert len(of_weights) == len(made.plan.quantized)
    calls.clear()
    read = load(saved(family), cache=True)
    assert (made.is_from_cache, read.is_from_cache) == (False, True)
    assert [shape for shape in calls if shape[0] > 8] == []
    for (a, a_scales), (b, b_scales) in zip(
        codes_and_scales(made).values(), codes_and_scales(read).values(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a_scales, b_scales)
        assert (a.dtype, a_scales.dtype) == (b.dtype, b_scales.dtype)
    assert torch.equal(logits(made.model), logits(read.model))
    dtypes = [{n: p.dtype for n, p in m.model.named_parameters()} for m in (made, read)]
    assert dtypes[0] == dtypes[1]
    # copies of other kinds lie beside it
    assert not load(saved(family), cache=True, quant_type="nf4").is_from_cache
    assert not load(saved(family), cache=True, quant_type="nf4", double_quant=False).is_from_cache
    assert load(saved(family), cache=True).is_from_cache
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 3


def test_bytes_are_one_a_weight_and_four_a_row(saved: Any) -> None:
    """Source: LLaMA's shapes by hand; the rest in float32."""
    counts = count_parameters(load(saved("LLaMA")).model)
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    rest = 2 * 512 * 64 + 5 * 64
    assert counts.by_dtype == {"int8": weights, "float32": rest}
    assert counts.stored_bytes == weights + 4 * rows + 4 * rest
    config = QuantizationConfig(quant_type="int8")
    assert bits_per_weight(config) == 8
    assert packed_bytes(weights, config) == weights


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"double_quant": True}, "double_quant: True"),
        ({"block_size": 128}, "block_size: 128"),
        ({"storage_dtype": "float32"}, "storage_dtype: float32"),
    ],
)
def test_settings_of_4_bits_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        QuantizationConfig(quant_type="int8", **settings)
    (sentence,) = caught.value.problems
    assert sentence.startswith(f"model.quantization.{key} has no effect with quant_type: int8")
    assert not QuantizationConfig(quant_type="int8").uses_double_quant
    assert not QuantizationConfig(quant_type="int8", double_quant=False).uses_double_quant


@pytest.mark.parametrize("family", ["LLaMA", "GPT-2"])
def test_a_killed_run_ends_in_the_same_bytes_and_plain_peft_reads_them(
    family: str, saved: Any, tmp_path: Path, rows_file: Path, caplog: Any
) -> None:
    """2e-5 of the largest logit: plain transformers packs the same file again."""
    base = saved(family)
    caplog.set_level(logging.WARNING)
    module = fit(tmp_path / "whole", base, rows_file, quant_type="int8")
    assert "MatMul8bitLt" not in caplog.text  # it would be a line a product
    with pytest.raises(Killed):
        fit(tmp_path / "killed", base, rows_file, kill_at=2, quant_type="int8")
    fit(tmp_path / "killed", base, rows_file, quant_type="int8")
    weights = "adapter/adapter_model.safetensors"
    whole, killed = ((tmp_path / run / weights).read_bytes() for run in ("whole", "killed"))
    assert whole == killed
    assert module.model is not None
    expected = logits(module.model)
    reloaded = reload_with_plain_peft(tmp_path / "whole" / "adapter")
    assert sum(isinstance(m, Linear8bitLt) for m in reloaded.modules()) > 0
    tolerance = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=tolerance)
    answer = reloaded.generate(input_ids=make_row(), max_new_tokens=2, pad_token_id=0)  # type: ignore[operator]
    assert answer.shape[1] > 16
