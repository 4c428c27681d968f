"""``qlora-pl inspect adapter`` beside dense products in float64, and beside PEFT's own merging."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import fit
from conftest import save_base
from peft_folders import EVERYWHERE, WEIGHTS, Type, change, numbers_of, save_adapter
from safetensors.torch import load_file
from torch import Tensor
from trained import adapter, other_base, run, type_in
from transformers import AutoModelForCausalLM

from qlora_pl.inspection.adapters.matrices import Pair, read_adapter
from qlora_pl.inspection.adapters.spectra import inner_product, singular_values, spectrum
from qlora_pl.inspection.places import ModulePlace

__all__ = ["adapter", "other_base", "run", "type_in"]
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def draw_pair(out: int, inputs: int, rank: int, scale: float = 1.5, seed: int = 0) -> Pair:
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inputs, generator=draw)
    b = torch.randn(out, rank, generator=draw)
    return Pair("m", ModulePlace("0", "m"), a, b, scale)


def dense(pair: Pair) -> Tensor:
    return pair.scale * pair.b.double() @ pair.a.double()


# -- the arithmetic --------------------------------------------------------------------------------

SHAPES = [(64, 64, 4), (96, 40, 16), (40, 96, 16), (64, 32, 48), (7, 64, 8), (64, 7, 8), (5, 6, 9)]
"""The last ones have more rank than inputs or outputs."""


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_and_ranks_are_those_of_the_whole_product(shape: tuple[int, int, int]) -> None:
    """Source: singular values of the dense product in float64, where a QR is exact to 1e-13."""
    pair = draw_pair(*shape)
    values = torch.linalg.svdvals(dense(pair))
    found = spectrum(pair)
    number = min(len(values), len(singular_values(pair)))
    assert torch.allclose(singular_values(pair)[:number], values[:number], rtol=1e-10, atol=1e-10)
    assert found.norm == pytest.approx(float(dense(pair).norm()), rel=1e-12)
    assert found.largest == pytest.approx(float(values[0]), rel=1e-12)
    assert found.stable_rank == pytest.approx(
        float(dense(pair).square().sum() / values[0] ** 2), rel=1e-10
    )
    p = values / values.sum()
    p = p[p > 1e-14]
    assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_inner_products_are_those_of_the_whole_products(shape: tuple[int, int, int]) -> None:
    out, inputs, rank = shape
    one, other = draw_pair(*shape), draw_pair(out, inputs, rank + 3, scale=0.7, seed=1)
    expected = float((dense(one) * dense(other)).sum())
    assert inner_product(one, other) == pytest.approx(expected, rel=1e-10)


def test_equal_singular_values_make_the_whole_rank_effective() -> None:
    eye = torch.eye(8)
    pair = Pair("m", ModulePlace("0", "m"), eye, eye, 2.0)
    found = spectrum(pair)
    assert found.effective_rank == pytest.approx(8)
    assert found.stable_rank == pytest.approx(8)
    assert found.used_rank == 8
    one = torch.zeros(8, 8)
    one[0, 0] = 3.0
    found = spectrum(Pair("m", ModulePlace("0", "m"), eye, one, 2.0))
    assert (found.effective_rank, found.used_rank, found.norm) == (pytest.approx(1), 1, 6.0)


# -- folders ---------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}},
    "rank-stabilised patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_those_that_peft_computes_with(
    kind: str, type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    """Source: PEFT's own ``get_delta_weight``; shares beside the base's own matrices."""
    model = save_adapter(tmp_path / "adapter", tiny_base, **KINDS[kind])
    found = numbers_of(type_in, "--adapter", tmp_path / "adapter", "--base", tiny_base)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert {p["module"] for p in found["pairs"]} == set(layers)
    for p in found["pairs"]:
        layer = layers[p["module"]]
        delta = layer.get_delta_weight("default").detach().double()
        assert p["spectrum"]["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert p["share"] == pytest.approx(
            float(delta.norm() / layer.weight.detach().double().norm()), rel=1e-5
        )
        assert p["rank"] == layer.r["default"]


def test_with_dora_the_share_is_of_the_whole_change(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    """Source: PEFT's merged weights less the base's, over the base in 16 bits."""
    model = save_adapter(tmp_path / "adapter", tiny_base, use_dora=True)
    found = numbers_of(type_in, "--adapter", tmp_path / "adapter", "--base", tiny_base)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    merged = model.merge_and_unload()
    for p in found["pairs"]:
        name = f"{p['module']}.weight"
        before, after = (m.get_parameter(name).detach().double() for m in (base, merged))
        expected = float((after - before).norm() / before.norm())
        assert p["share"] == pytest.approx(expected, rel=1e-4)
        assert abs(p["spectrum"]["norm"] / float(before.norm()) - expected) > 1e-3  # not BA alone
    assert any("DoRA" in note for note in found["notes"])


def test_a_dora_that_hardly_trained_changes_hardly_anything(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Its lengths are of the quantised matrix: beside the original they would seem trained."""
    fit(tmp_path / "run", tiny_base, rows_file, r=4, method="dora", lr=1e-12)
    found = numbers_of(type_in, "--adapter", tmp_path / "run/adapter")
    for p in found["pairs"]:
        assert p["share"] < 1e-5, p["module"]  # float32 lengths


def test_a_trained_adapter_is_told_with_its_base(type_in: Type, adapter: Path) -> None:
    code, out, said = type_in("inspect", "adapter", "--adapter", adapter)
    assert code == 0, said
    assert sorted(p.name for p in Path("inspect-adapter").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert "| q_proj" in out
    assert "after 3 steps" in out
    assert "share of the weight" in out
    found = json.loads(Path("inspect-adapter/report.json").read_text())
    tensors = load_file(adapter / WEIGHTS)
    for p in found["pairs"]:
        a, b = (tensors[f"base_model.model.{p['module']}.lora_{x}.weight"].double() for x in "AB")
        assert p["spectrum"]["norm"] == pytest.approx(float(8 * (b @ a).norm()), rel=1e-6)


def test_without_its_base_shares_are_left_out_and_that_is_said(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", tiny_base)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/elses"
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    code, out, said = type_in("inspect", "adapter", "--adapter", tmp_path / "adapter")
    assert code == 0, said
    assert "share of the weight" not in out
    assert "its base (somebody/elses) is no folder here; name one with --base." in out


def test_biases_and_whole_layers_are_told(type_in: Type, saved: Any, tmp_path: Path) -> None:
    base = saved("Qwen2")
    model = save_adapter(tmp_path / "adapter", base, bias="lora_only", modules_to_save=["lm_head"])
    found = numbers_of(type_in, "--adapter", tmp_path / "adapter", "--base", base)
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    name = "model.layers.1.self_attn.k_proj.bias"
    trained = model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj").bias
    expected = float((trained - own.get_parameter(name)).norm())
    assert found["biases"][name] == pytest.approx(expected, rel=1e-4)
    assert len(found["biases"]) == 6
    assert list(found["others"]) == ["lm_head.weight"]


def test_layers_stand_in_their_order(type_in: Type, tmp_path: Path) -> None:
    """Twelve of them, which a file of weights sorts as 0, 1, 10, 11, 2."""
    base = save_base(tmp_path / "base", num_hidden_layers=12)
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "up_proj"])
    found = numbers_of(type_in, "--adapter", tmp_path / "adapter")
    layers = list(dict.fromkeys(p["place"]["layer"] for p in found["pairs"]))
    assert layers == [str(layer) for layer in range(12)]


# -- findings --------------------------------------------------------------------------------------


def test_dead_and_exploding_matrices_are_named(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", num_hidden_layers=4)
    save_adapter(tmp_path / "adapter", base, lora_alpha=1)
    place = "base_model.model.model.layers.{}.{}.lora_B.weight"

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[place.format(0, "self_attn.q_proj")].zero_()
        tensors[place.format(1, "self_attn.k_proj")].mul_(1e-5)
        tensors[place.format(2, "mlp.up_proj")].mul_(1e4)

    change(tmp_path / "adapter", edit)
    found = numbers_of(type_in, "--adapter", tmp_path / "adapter", "--base", base)
    told = "\n".join(found["findings"])
    zero = "B (or A) is exactly zero in 1 of 28 modules, which change nothing: "
    assert f"{zero}model.layers.0.self_attn.q_proj." in told
    assert "'model.layers.1.self_attn.k_proj' is as good as dead" in told
    assert "'model.layers.2.mlp.up_proj' is" in told
    assert "times its kind's median norm" in told
    assert "Changed by more than the weight itself: model.layers.2.mlp.up_proj (" in told
    assert len(found["findings"]) == 4


def test_an_adapter_before_its_first_step_changes_nothing(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", tiny_base)

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    change(tmp_path / "adapter", edit)
    code, out, said = type_in(
        *("inspect", "adapter", "--adapter", tmp_path / "adapter"),
        *("--against", tmp_path / "adapter"),
    )
    assert code == 0, said
    assert "Every B (or A) is exactly zero: this adapter changes nothing, as before" in out
    assert "can be compared" in out


def test_a_dora_whose_b_is_zero_may_have_changed_lengths(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    """Rows made longer by a tenth change each weight by a tenth."""
    save_adapter(tmp_path / "adapter", tiny_base, use_dora=True)
    weights = load_file(tiny_base / "model.safetensors")

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()
            if "magnitude" in name:
                module = name.removeprefix("base_model.model.").partition(".lora_")[0]
                tensor.copy_(1.1 * weights[f"{module}.weight"].float().norm(dim=1))

    change(tmp_path / "adapter", edit)
    found = numbers_of(type_in, "--adapter", tmp_path / "adapter", "--base", tiny_base)
    assert "changes nothing, but for its rows' lengths" in found["findings"][0]
    for p in found["pairs"]:
        assert p["share"] == pytest.approx(0.1, rel=1e-4)


def test_values_that_are_no_numbers_end_with_exit_code_2_after_the_report(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", tiny_base)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, :3] = math.nan

    change(tmp_path / "adapter", edit)
    code, out, said = type_in("inspect", "adapter", "--adapter", tmp_path / "adapter")
    assert code == 2
    assert "'model.layers.0.self_attn.q_proj' holds 3 values that are NaN or infinite" in said
    assert "3 values that are NaN" in out
    found = json.loads(Path("inspect-adapter/report.json").read_text())
    by_name = {p["module"]: p for p in found["pairs"]}
    assert by_name["model.layers.0.self_attn.q_proj"]["spectrum"] is None
    assert by_name["model.layers.1.self_attn.q_proj"]["spectrum"]["norm"] > 0


# -- two adapters ----------------------------------------------------------------------------------


def test_cosines_are_those_of_the_dense_changes(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    """Of other ranks and scales, some modules in one alone."""
    one = save_adapter(tmp_path / "one", tiny_base, seed=0)
    other = save_adapter(
        tmp_path / "other", tiny_base, seed=1, r=8, use_rslora=True, target_modules=EVERYWHERE[:4]
    )
    found = numbers_of(type_in, "--adapter", tmp_path / "one", "--against", tmp_path / "other")[
        "likeness"
    ]
    assert len(found["cosines"]) == 8
    assert sorted(found["only_here"])[0] == "model.layers.0.mlp.down_proj"
    assert found["only_there"] == []
    dot = squares = others = 0.0
    for name, cosine in found["cosines"].items():
        first, second = (
            m.get_submodule(f"base_model.model.{name}").get_delta_weight("default").double()
            for m in (one, other)
        )
        expected = float((first * second).sum() / first.norm() / second.norm())
        assert cosine == pytest.approx(expected, abs=1e-6)
        dot += float((first * second).sum())
        squares += float(first.square().sum())
        others += float(second.square().sum())
    assert found["whole"] == pytest.approx(dot / math.sqrt(squares * others), abs=1e-6)


def test_two_runs_over_the_same_weights_are_comparable_wherever_the_base_lay(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    """Folders of this project say which weights they are of; names of folders are none of it."""
    import shutil

    shutil.copytree(adapter, tmp_path / "moved")
    path = tmp_path / "moved/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["base"]["name"] = "/elsewhere/base"
    path.write_text(json.dumps(manifest))
    words = ("--adapter", adapter, "--against", tmp_path / "moved")
    assert numbers_of(type_in, *words)["notes"] == []
    manifest["base"] |= {"name": "x", "weights": "0" * 64}
    path.write_text(json.dumps(manifest))
    (note,) = numbers_of(type_in, *words)["notes"]
    assert "trained over other weights" in note
    assert "000000000000" in note


def test_modules_of_other_shapes_are_left_out_of_the_cosine(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    wide = save_base(tmp_path / "wide", intermediate_size=192)
    save_adapter(tmp_path / "one", tiny_base)
    save_adapter(tmp_path / "other", wide)
    found = numbers_of(type_in, "--adapter", tmp_path / "one", "--against", tmp_path / "other")
    assert len(found["likeness"]["cosines"]) == 8  # attention alone
    notes = "\n".join(found["notes"])
    assert "'model.layers.0.mlp.up_proj' is (128, 64) in one and (192, 64) in the other" in notes
    assert "bases of other names" in notes


def test_an_adapter_is_like_itself_and_unlike_its_opposite(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    for name in ("one", "opposite"):
        save_adapter(tmp_path / name, tiny_base)

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.neg_()

    change(tmp_path / "opposite", edit)
    for other, expected in (("one", 1.0), ("opposite", -1.0)):
        found = numbers_of(type_in, "--adapter", tmp_path / "one", "--against", tmp_path / other)
        assert found["likeness"]["whole"] == pytest.approx(expected, abs=1e-9)


def test_a_folder_of_this_project_is_read_like_any_other(adapter: Path) -> None:
    found = read_adapter(str(adapter), "--adapter")
    assert found.manifest is not None
    assert len(found.pairs) == 14
    assert {pair.scale for pair in found.pairs.values()} == {8.0}
