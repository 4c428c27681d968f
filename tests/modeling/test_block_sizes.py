"""Other block sizes than the paper's 64, and packed bytes that are declared as another type.

bitsandbytes' own quantiser is the source of codes, scales and bytes; float32 products with what
they decode to are the source of outputs and gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import bitsandbytes.nn
import pytest
import torch
from conftest import save_base
from families import BY_NAME
from safetensors.torch import load_file
from small_runs import one_thread  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig, bits_per_weight, packed_bytes
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.loading.base_loading import LoadedBase, load_base
from qlora_pl.modeling.loading.packed_cache import packed_folder
from qlora_pl.modeling.parameters import count_parameters

CPU = torch.device("cpu")
KINDS = [
    {"block_size": 128},
    {"block_size": 256, "quant_type": "fp4"},
    {"block_size": 256, "double_quant": False},
    {"storage_dtype": "bfloat16"},
    {"storage_dtype": "float16", "quant_type": "fp4", "double_quant": False},
    {"storage_dtype": "float32", "block_size": 128},
]
every_kind = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values()))
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose widths are multiples of 256."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    return save_base(folder, hidden_size=256, intermediate_size=512, num_hidden_layers=1)


def load(folder: Path, **settings: Any) -> LoadedBase:
    config = QuantizationConfig(**{"compute_dtype": "float32", "cache": False} | settings)
    plan = plan_quantization(build_skeleton(folder), config)
    return load_base(identify_base(str(folder), None, None), config, plan, device=CPU)


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8).flatten()


def statistics(state: Any) -> list[Tensor]:
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


def quantise(tensor: Tensor, kind: dict[str, Any]) -> tuple[Tensor, Any]:
    packed, state = bnb.quantize_4bit(
        tensor,
        blocksize=kind.get("block_size", 64),
        compress_statistics=kind.get("double_quant", True),
        quant_type=kind.get("quant_type", "nf4"),
    )
    return packed, state


@every_kind
def test_codes_and_scales_are_bitsandbytes_own(kind: dict[str, Any], wide: Path) -> None:
    loaded = load(wide, **kind)
    stored = load_file(wide / "model.safetensors")
    for name in loaded.plan.quantized:
        weight: Any = loaded.model.get_parameter(name)
        packed, state = quantise(stored[name], kind)
        assert weight.dtype == getattr(torch, kind.get("storage_dtype", "uint8"))
        assert weight.quant_state.blocksize == kind.get("block_size", 64)
        assert torch.equal(bytes_of(weight), bytes_of(packed))
        for ours, theirs in zip(statistics(weight.quant_state), statistics(state), strict=True):
            assert torch.equal(ours, theirs)


@every_kind
def test_outputs_and_input_gradients_are_those_of_what_the_codes_decode_to(
    kind: dict[str, Any], wide: Path
) -> None:
    """In training and in evaluation. 1e-5 of the largest: float32 sums of 512 products.

    A block that takes its neighbour's scale moves outputs by 20 to 40 %.
    """
    loaded = load(wide, **kind)
    name = "model.layers.0.mlp.down_proj.weight"
    layer = loaded.model.get_submodule(name.removesuffix(".weight"))
    stored = load_file(wide / "model.safetensors")[name]
    weight = bnb.dequantize_4bit(*quantise(stored.float(), kind)).float()
    x = torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = functional.linear(x, weight)
    outer = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (reference,) = torch.autograd.grad(expected, x, outer)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    trained = layer.train()(x)
    (gradient,) = torch.autograd.grad(trained, x, outer)
    for ours, theirs in ((evaluated, expected), (trained, expected), (gradient, reference)):
        largest = theirs.detach().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * largest)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(3, 35).reshape(2, 16)).logits
    return found


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_type_that_bytes_are_declared_as_changes_nothing(
    storage: str, compute: str, tiny_base: Path
) -> None:
    expected = load(tiny_base, compute_dtype=compute)
    found = load(tiny_base, compute_dtype=compute, storage_dtype=storage)
    assert torch.equal(logits(found.model), logits(expected.model))
    counts = [count_parameters(loaded.model) for loaded in (found, expected)]
    assert counts[0] == counts[1]


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Takes a note of every weight that bitsandbytes quantises."""
    calls: list[Any] = []
    quantise = bnb.quantize_4bit

    def count(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        calls.append(tensor.shape)
        return quantise(tensor, *arguments, **settings)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", count)
    return calls


@every_kind
def test_the_packed_copy_reloads_bit_for_bit_and_quantises_nothing(
    kind: dict[str, Any],
    wide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantised: list[Any],
) -> None:
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    made = load(wide, cache=True, **kind)
    assert len(quantised) == len(made.plan.quantized) == 7
    quantised.clear()
    read = load(wide, cache=True, **kind)
    assert (made.is_from_cache, read.is_from_cache) == (False, True)
    assert quantised == []
    for name in made.plan.quantized:
        a, b = (loaded.model.get_parameter(name) for loaded in (made, read))
        assert a.dtype == b.dtype
        assert torch.equal(bytes_of(a), bytes_of(b))
        for x, y in zip(statistics(a.quant_state), statistics(b.quant_state), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
    assert torch.equal(logits(made.model), logits(read.model))


def test_a_copy_of_one_kind_is_never_taken_for_another(tiny_base: Path) -> None:
    identity = identify_base(str(tiny_base), None, None)
    kinds = [{}, {"quant_type": "int8"}, {"double_quant": False}, {"block_size": 256}, *KINDS]
    folders = {
        packed_folder(identity, QuantizationConfig(**kind), torch.bfloat16, CPU, None)  # type: ignore[arg-type]
        for kind in kinds
    }
    assert len(folders) == len(kinds)


@pytest.mark.parametrize("damage", ["torn", "flipped", "emptied", "without its list"])
def test_a_damaged_copy_is_noticed_and_made_anew(
    damage: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: list[Any]
) -> None:
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    expected = logits(load(wide, cache=True, block_size=128).model)
    (packed,) = (tmp_path / "cache" / "packed").iterdir()
    path = packed / "tensors-00001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "without its list":
        (packed / "packed.json").unlink()
    elif damage == "flipped":
        data[len(data) // 3] ^= 16
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2 if damage == "torn" else 0])
    quantised.clear()
    again = load(wide, cache=True, block_size=128)
    assert not again.is_from_cache
    assert len(quantised) == 7
    assert torch.equal(logits(again.model), expected)
    assert load(wide, cache=True, block_size=128).is_from_cache


@pytest.mark.parametrize(
    ("block_size", "double_quant", "bits"),
    [(128, True, 4.06348), (128, False, 4.25), (256, True, 4.03174), (256, False, 4.125)],
)
def test_bits_and_bytes_are_those_of_bitsandbytes_tensors(
    block_size: int, double_quant: bool, bits: float
) -> None:
    """Source: 8 / b + 32 / (256 b) bits by hand, and the tensors that bitsandbytes returns."""
    config = QuantizationConfig(block_size=block_size, double_quant=double_quant)  # type: ignore[arg-type]
    assert bits_per_weight(config) == pytest.approx(bits, abs=1e-5)
    kind = {"block_size": block_size, "double_quant": double_quant}
    packed, state = quantise(torch.randn(512, 256), kind)
    tensors = [packed, state.absmax, *([state.state2.absmax] if double_quant else [])]
    expected = sum(tensor.nbytes for tensor in tensors)
    assert packed_bytes(512 * 256, config) == expected


def test_widths_that_blocks_do_not_divide_are_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hidden_size=128, intermediate_size=192)
    with pytest.raises(ConfigurationError) as caught:
        load(base, block_size=128)
    (sentence,) = caught.value.problems
    assert "'model.layers.0.mlp.down_proj.weight' has 192 inputs, no multiple of 128" in sentence
    assert "list 'down_proj' in model.quantization.skip_modules, or choose a smaller" in sentence
    assert len(load(base, block_size=128, skip_modules=("down_proj",)).plan.quantized) == 12
    assert len(load(base).plan.quantized) == 14


def test_of_transposed_matrices_the_inputs_count(tmp_path: Path) -> None:
    """GPT-2's first matrix is (inputs, outputs) = (64, 192) in its file."""
    base = BY_NAME["GPT-2"].save(tmp_path / "base", n_embd=128)
    loaded = load(base, block_size=128)
    name = "transformer.h.0.attn.c_attn.weight"
    weight: Any = loaded.model.get_parameter(name)
    stored = load_file(base / "model.safetensors")[name].t().contiguous()
    packed, state = quantise(stored, {"block_size": 128})
    assert torch.equal(bytes_of(weight), bytes_of(packed))
    assert torch.equal(weight.quant_state.absmax, state.absmax)
    with pytest.raises(ConfigurationError, match=r"c_attn.weight' has 128 inputs, no multiple of"):
        load(base, block_size=256)
