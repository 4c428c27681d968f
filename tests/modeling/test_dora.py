"""DoRA against plain PEFT, float32 twins and the lengths of rows."""

from __future__ import annotations

import pytest
import torch
from adapter_runs import (
    PARTS,
    assert_same_gradients,
    copy_trained,
    fill,
    layers_of,
    load,
    logits_of,
    loss_and_gradients,
    one_thread,  # noqa: F401 (a fixture of every test here)
    plain_peft,
    twin_of,
)

from qlora_pl.modeling.adapters.lora import (
    LoRAConfig,
    attach_adapters,
)
from qlora_pl.modeling.loading.base_loading import prepare_for_training

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

DORA = LoRAConfig(r=4, method="dora")
over_every_base = pytest.mark.parametrize("quant_type", ["nf4", "int8", "none"])


@over_every_base
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_dora_starts_at_the_base(tiny_base, quant_type, compute):
    base = load(tiny_base, compute, quant_type).model
    expected = logits_of(base)
    assert torch.equal(logits_of(attach_adapters(base, DORA, seed=0)), expected)


@over_every_base
@pytest.mark.parametrize(
    ("compute", "kept_in"),
    [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")],
)
def test_a_magnitude_is_the_length_of_its_row_in_the_adapters_type(
    tiny_base, quant_type, compute, kept_in
):
    """Source: float64 lengths of the weights that the base decodes to (Liu et al. 2024, eq. 5).

    A rounding to float32 is 2**-24, and sums of 64 squares are as good; to bfloat16 it is 2**-8.
    """
    loaded = load(tiny_base, compute, quant_type)
    twin = twin_of(loaded, tiny_base)
    model = attach_adapters(loaded.model, LoRAConfig(r=4, method="dora", dtype=kept_in), seed=0)
    for name, layer in layers_of(model).items():
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert magnitude.dtype == getattr(torch, kept_in)
        expected = twin.get_submodule(name).weight.double().norm(dim=1)
        bound = 2**-20 if kept_in == "float32" else 2**-8
        assert ((magnitude - expected).abs() <= bound * expected).all(), name


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_in_float32_dora_is_plain_pefts_on_a_float32_twin(tiny_base, quant_type):
    """1e-4 of a tensor's largest gradient: float32 sums of up to 512 products in another order."""
    loaded = load(tiny_base, quant_type=quant_type)
    twin = plain_peft(twin_of(loaded, tiny_base), PARTS, use_dora=True)
    ours = attach_adapters(loaded.model, DORA, seed=0)
    prepare_for_training(ours, gradient_checkpointing=True)
    for moved in (False, True):
        if moved:
            fill(ours)
        copy_trained(ours, twin)
        expected_loss, expected = loss_and_gradients(twin)
        logits_of(ours)  # a validation, after which bitsandbytes alone would lose gradients
        loss, gradients = loss_and_gradients(ours.train())
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert_same_gradients(gradients, expected, tolerance=1e-4)
        silent = [name for name, gradient in gradients.items() if not gradient.any()]
        assert all("lora_A" in name for name in silent) is True
        assert bool(silent) is not moved


@over_every_base
@pytest.mark.parametrize(
    ("compute", "dropout"), [("float32", 0.0), ("bfloat16", 0.0), ("bfloat16", 0.1)]
)
def test_over_every_base_dora_trains_like_its_float32_twin(tiny_base, quant_type, compute, dropout):
    """Over int8 activations are rounded too, to 127 steps of their largest; bfloat16 has 256.

    Through two layers that moves gradients by a few percent of their norm (measured: up to 6).
    With dropout another mask is drawn, so only that everything trains can be said.
    """
    loaded = load(tiny_base, compute, quant_type)
    twin = plain_peft(twin_of(loaded, tiny_base), PARTS, use_dora=True)
    config = LoRAConfig(r=4, method="dora", dropout=dropout)
    ours = attach_adapters(loaded.model, config, seed=0)
    prepare_for_training(ours, gradient_checkpointing=True)
    fill(ours)
    copy_trained(ours, twin)
    _, expected = loss_and_gradients(twin)
    for _ in range(2):
        _, gradients = loss_and_gradients(ours)
        assert len(gradients) == 3 * len(layers_of(ours))
        assert all(gradient.any() for gradient in gradients.values())
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        if not dropout:
            for name, gradient in gradients.items():
                error = (gradient - expected[name]).norm() / expected[name].norm()
                assert error < 0.1, (name, error)


@over_every_base
def test_in_bfloat16_dora_gives_rows_the_length_that_their_magnitude_says(tiny_base, quant_type):
    """Source: float64, y = m / |W + s B A| (W + s B A) x for each row (Liu et al. 2024, eq. 5).

    Roundings of single numbers are even: over 4,096 inputs they leave 2**-8 / 64 of a row. A length
    rounded to bfloat16 would be off by up to 2**-8, one way, for the whole row. Over int8 inputs
    are rounded more coarsely (1/254 of the largest), evenly too.
    """
    loaded = load(tiny_base, "bfloat16", quant_type)
    weight = twin_of(loaded, tiny_base).get_submodule("model.layers.0.mlp.up_proj").weight.double()
    model = attach_adapters(loaded.model, DORA, seed=0)
    fill(model)
    layer = layers_of(model)["model.layers.0.mlp.up_proj"]
    for factors in (layer.lora_A, layer.lora_B):  # they multiply as bfloat16 numbers
        factors["default"].weight.data = factors["default"].weight.data.bfloat16().float()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=draw).bfloat16()
    a, b = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    merged = weight + 16 / 4 * b @ a
    magnitude = layer.lora_magnitude_vector["default"].weight.double()
    expected = x.double() @ (merged * (magnitude / merged.norm(dim=1))[:, None]).t()
    with torch.no_grad():
        got = layer(x)
    assert got.dtype == torch.bfloat16
    ratio = (got.double() * expected).sum(0) / expected.square().sum(0)
    assert (ratio - 1).abs().max() < 5e-4


def test_dora_and_dropout_leave_evaluation_as_it_is(tiny_base):
    models = []
    for dropout in (0.0, 0.5):
        config = LoRAConfig(r=4, method="dora", dropout=dropout)
        models.append(attach_adapters(load(tiny_base).model, config, seed=0))
        fill(models[-1])
    assert torch.equal(logits_of(models[0]), logits_of(models[1]))


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_dora_over_gpt2s_transposed_matrices_is_plain_pefts(saved, quant_type):
    """Source: plain PEFT over plain transformers, whose Conv1D keeps matrices (inputs, outputs)."""
    folder = saved("GPT-2")
    loaded = load(folder, quant_type=quant_type)
    twin = plain_peft(twin_of(loaded, folder), ["c_attn", "c_proj", "c_fc"], use_dora=True)
    ours = attach_adapters(loaded.model, DORA, seed=0)
    fill(ours)
    copy_trained(ours, twin)
    _, expected = loss_and_gradients(twin)
    _, gradients = loss_and_gradients(ours)
    assert_same_gradients(gradients, expected, tolerance=1e-4)
