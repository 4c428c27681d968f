"""DoRA, scales, ranks and trained biases against plain PEFT, float32 twins and hand arithmetic."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from adapter_runs import (
    Killed,
    copy_trained,
    digest,
    fill,
    fit,
    load,
    logits_of,
    loss_and_gradients,
    one_thread,  # noqa: F401 (a fixture of every test here)
    plain_peft,
    twin_of,
)
from families import BY_NAME
from lightning.pytorch import Callback, Trainer
from plain_peft import reload_with_plain_peft
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters import (
    LoRAConfig,
    attach_adapters,
    refuse_unfit_ranks,
    resolve_targets,
)
from qlora_pl.modeling.compute import compute_cost
from qlora_pl.modeling.loading import prepare_for_training
from qlora_pl.modeling.parameters import adapter_tensors, count_parameters, trainable_tensors
from qlora_pl.modeling.plan import build_skeleton

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DORA = LoRAConfig(r=4, method="dora")
WITH_BIASES = ["GPT-2", "OPT", "BLOOM", "Qwen2", "GPT-NeoX, Pythia", "Falcon RW"]
over_every_base = pytest.mark.parametrize("quant_type", ["nf4", "int8", "none"])


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The adapted layers by their names in the base."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def assert_same_gradients(
    gradients: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Apart by at most this share of the tensor's largest."""
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients.items():
        # A key's bias moves every score of a row alike: its gradient is rounding, and no scale.
        scale = max(expected[name].abs().max(), 1e-4 * largest)
        assert (gradient - expected[name]).abs().max() <= tolerance * scale, name


# --- DoRA -----------------------------------------------------------------------------------------


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


# --- scales, ranks and alphas ---------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_adds_its_product_times_its_scale(tiny_base, use_rslora):
    """By hand: alpha / r B A x, or alpha / sqrt(r) B A x (Kalajdzievski 2023, section 3.1)."""
    config = LoRAConfig(
        r=4,
        alpha=12.0,
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 16},
        alpha_pattern={"up_proj": 3.0},
    )
    model = attach_adapters(load(tiny_base, quant_type="none").model, config, seed=0)
    fill(model)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for part, r, alpha in [("q", 16, 12.0), ("v", 4, 12.0)]:
        layer = layers_of(model)[f"model.layers.0.self_attn.{part}_proj"]
        assert_adds(layer, x, alpha / (math.sqrt(r) if use_rslora else r))
    layer = layers_of(model)["model.layers.1.mlp.up_proj"]
    assert_adds(layer, x, 3.0 / (2 if use_rslora else 4))


def assert_adds(layer: Any, x: Tensor, scale: float) -> None:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        torch.testing.assert_close(layer(x) - layer.base_layer(x), scale * x @ a.t() @ b.t())


PATTERNS = [
    {"q_proj": 2},  # a last part
    {"model.layers.1.mlp.up_proj": 2},  # a whole name
    {"layers.0.mlp.up_proj": 2},  # an end of a name
    {r"layers\.1\..*": 2},  # regular expressions
    {"q_proj|v_proj": 2, "o_proj": 8},
    {r".*\.mlp\..*": 8, "up_proj": 2},  # several that fit: the first counts
    {"up_proj": 2, r".*\.mlp\..*": 8},
    {r".*": 2, "down_proj": 8},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_mean_what_they_mean_in_peft(tiny_base, pattern):
    """Source: ranks and scales of the layers that plain PEFT makes of the same patterns."""
    alphas = {name: 3.0 * value for name, value in pattern.items()}
    config = LoRAConfig(r=4, rank_pattern=pattern, alpha_pattern=alphas)
    skeleton = build_skeleton(tiny_base)
    refuse_unfit_ranks(skeleton, config, resolve_targets(skeleton, config))
    ours = layers_of(attach_adapters(load(tiny_base).model, config, seed=0))
    patterns = {"rank_pattern": dict(pattern), "alpha_pattern": dict(alphas)}
    theirs = layers_of(plain_peft(load(tiny_base).model, PARTS, **patterns))
    assert ours.keys() == theirs.keys()
    for name, layer in theirs.items():
        assert ours[name].r == layer.r, name
        assert ours[name].scaling == layer.scaling, name


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_survive_in_the_folder_that_plain_peft_loads(tiny_base, tmp_path, pattern):
    """PEFT sorts what it writes, and of several patterns that fit it takes the first."""
    alphas = {name: 3.0 * value for name, value in pattern.items()}
    config = LoRAConfig(r=4, rank_pattern=pattern, alpha_pattern=alphas)
    model = attach_adapters(load(tiny_base).model, config, seed=0)
    fill(model)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = peft.PeftModel.from_pretrained(load(tiny_base).model, tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"rank_pattern": {"q_porj": 2}},
            r"model\.lora\.rank_pattern: .* matches 'q_porj'; did you mean 'q_proj'\?",
        ),
        ({"alpha_pattern": {"up_prj": 2.0}}, r"alpha_pattern: .*; did you mean 'up_proj'\?"),
        ({"rank_pattern": {"lm_head": 2}}, r"rank_pattern: no adapted module matches 'lm_head'"),
        ({"rank_pattern": {"layers.0": 2}}, r"no adapted module matches 'layers\.0'"),
        (
            {"rank_pattern": {"v_proj": 2}, "target_modules": ["q_proj"]},
            r"no adapted module matches 'v_proj'; did you mean 'q_proj'\?",
        ),
        ({"r": 65}, r"model\.lora\.r: 65 is above 64, the most that 'model\.layers\.0\.self_attn"),
        ({"r": 33}, r"33 is above 32, the most that '.*k_proj' can have"),
        (
            {"rank_pattern": {"v_proj": 33}},
            r"model\.lora\.rank_pattern: 33 is above 32, the most that '.*v_proj' can have",
        ),
    ],
)
def test_patterns_and_ranks_that_fit_no_layer_are_refused(tiny_base, settings, words):
    skeleton = build_skeleton(tiny_base)
    config = LoRAConfig(**{"r": 4} | settings)
    with pytest.raises(ConfigurationError, match=words) as caught:
        refuse_unfit_ranks(skeleton, config, resolve_targets(skeleton, config))
    assert len(str(caught.value).splitlines()) == 1


def test_a_rank_as_high_as_a_layer_is_small_is_allowed(tiny_base):
    skeleton = build_skeleton(tiny_base)
    config = LoRAConfig(r=64, rank_pattern={"k_proj|v_proj": 32})
    targets = resolve_targets(skeleton, config)
    refuse_unfit_ranks(skeleton, config, targets)
    model = attach_adapters(load(tiny_base).model, config, seed=0)
    ranks = {name: layer.r["default"] for name, layer in layers_of(model).items()}
    assert len(ranks) == len(targets)
    assert set(ranks.values()) == {32, 64}


@pytest.mark.parametrize("pattern", ["(", "a)(b", "(?i)Q_PROJ"])
def test_a_pattern_that_peft_could_not_compile_is_one_sentence(pattern):
    """PEFT puts it into a group of its own, where flags for the whole are not allowed."""
    with pytest.raises(ConfigurationError) as caught:
        LoRAConfig(rank_pattern={pattern: 2})
    (problem,) = caught.value.problems
    assert problem.startswith(f"model.lora.rank_pattern: '{pattern}' is not a regular expression (")


# --- biases ---------------------------------------------------------------------------------------


def bias_names(model: nn.Module) -> list[str]:
    return [name for name in trainable_tensors(model) if name.endswith(".bias")]


@pytest.mark.parametrize("name", WITH_BIASES)
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_get_the_float32_twins_gradients(saved, name, bias):
    """1e-4 of the largest: float32 sums of up to 512 products in another order."""
    folder = saved(name)
    loaded = load(folder)
    parts = sorted(set(BY_NAME[name].linears))
    twin = plain_peft(twin_of(loaded, folder), parts, bias=bias)
    ours = attach_adapters(loaded.model, LoRAConfig(r=4, bias=bias), seed=0)
    prepare_for_training(ours, gradient_checkpointing=True)
    fill(ours)
    copy_trained(ours, twin)
    expected_loss, expected = loss_and_gradients(twin)
    logits_of(ours)
    loss, gradients = loss_and_gradients(ours.train())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, expected, tolerance=1e-4)


@pytest.mark.parametrize("name", [*WITH_BIASES, "Phi-1, Phi-2"])
@over_every_base
def test_over_bfloat16_every_bias_is_float32_and_stays_so(saved, name, quant_type):
    """Source: what bitsandbytes does: it casts biases in place, in training and in evaluation."""
    base = load(saved(name), "bfloat16", quant_type).model
    biases = {n for n, _ in base.named_parameters() if n.endswith(".bias")}
    expected = logits_of(base)
    ours = attach_adapters(base, LoRAConfig(r=4, bias="all"), seed=0)
    assert {n.replace(".base_layer", "")[len("base_model.model.") :] for n in bias_names(ours)} == (
        biases
    )
    assert torch.equal(logits_of(ours), expected)  # training starts at the base
    prepare_for_training(ours, gradient_checkpointing=True)
    fill(ours)
    for _ in range(2):
        loss_and_gradients(ours.train())
        logits_of(ours)
    kept = {n: p.dtype for n, p in trainable_tensors(ours).items()}
    assert set(kept.values()) == {torch.float32}, kept
    assert {p.grad.dtype for p in trainable_tensors(ours).values()} == {torch.float32}


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_under_float16s_autocast_every_bias_stays_float32_too(saved, quant_type):
    """The loss scaler cannot unscale gradients in float16; activations are of both types."""
    base = load(saved("GPT-2"), "float16", quant_type).model
    ours = attach_adapters(base, LoRAConfig(r=4, bias="all", method="dora"), seed=0)
    prepare_for_training(ours, gradient_checkpointing=True)
    fill(ours)
    with torch.autocast("cpu", torch.float16):
        loss_and_gradients(ours)
        logits_of(ours)
    trained = trainable_tensors(ours).values()
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "Qwen2"])
@over_every_base
def test_over_bfloat16_trained_biases_get_nearly_the_twins_gradients(saved, name, quant_type):
    """Source: the float32 twin; bfloat16 and int8 round activations by some 2**-8.

    Measured: 4 to 12 %. A bias that is lost, or added twice, is off by more than its size.
    """
    folder = saved(name)
    loaded = load(folder, "bfloat16", quant_type)
    twin = plain_peft(twin_of(loaded, folder), sorted(set(BY_NAME[name].linears)), bias="all")
    ours = attach_adapters(loaded.model, LoRAConfig(r=4, bias="all"), seed=0)
    prepare_for_training(ours, gradient_checkpointing=True)
    fill(ours)
    copy_trained(ours, twin)
    expected_loss, expected = loss_and_gradients(twin)
    loss, gradients = loss_and_gradients(ours)
    torch.testing.assert_close(loss, expected_loss, rtol=0.02, atol=0)
    both = [torch.cat([g.flatten() for g in some.values()]) for some in (gradients, expected)]
    assert (both[0] - both[1]).norm() < 0.2 * both[1].norm()


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_only_the_biases_that_were_asked_for_are_trained(saved, bias):
    """By hand: GPT-2 has 4 biases of linears and 2 of norms a layer, and one norm at the end."""
    config = LoRAConfig(r=4, bias=bias, target_modules=["c_attn", "c_fc"])
    names = bias_names(attach_adapters(load(saved("GPT-2")).model, config, seed=0))
    assert len(names) == {"lora_only": 2 * 2, "all": 2 * 6 + 1}[bias]
    assert any("ln_" in name for name in names) is (bias == "all")


@over_every_base
def test_a_bias_keeps_an_update_that_bfloat16_would_lose(saved, tmp_path, rows_file, quant_type):
    """By hand: a step of Adam is lr = 2e-4 long at most, and less than half a gap is rounded away.

    In bfloat16 numbers above 0.0625 are 2**-11 = 4.9e-4 apart.
    """
    start: dict[str, Tensor] = {}

    class Keep(Callback):
        def on_train_start(self, trainer: Trainer, module: Any) -> None:
            start.update({n: p.detach().clone() for n, p in module.trained_tensors().items()})

    for kept_in in ("float32", "bfloat16") if quant_type == "nf4" else ("float32",):
        run = {"quant_type": quant_type, "compute": "bfloat16", "lr": 2e-4}
        module = fit(
            tmp_path / kept_in, saved("GPT-2"), rows_file, Keep(), bias="all", dtype=kept_in, **run
        )
        for name in bias_names(module):
            before, after = start[name].float(), module.trained_tensors()[name].float()
            moved = (before != after)[before.abs() > 0.0625]
            if "c_attn" in name:  # a key's bias gets only rounding errors for a gradient
                moved = moved[:0]
            assert moved.all() if kept_in == "float32" else not moved.any(), name
        assert {p.dtype for p in module.trained_tensors().values()} == {getattr(torch, kept_in)}


class ShiftedNorm(nn.Module):
    """A norm that nobody listed, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def test_a_norm_whose_bias_cannot_be_trained_is_one_sentence(tiny_base):
    base: Any = load(tiny_base, "bfloat16").model
    base.model.norm = ShiftedNorm()
    with pytest.raises(ConfigurationError) as caught:
        attach_adapters(base, LoRAConfig(r=4, bias="all"), seed=0)
    (problem,) = caught.value.problems
    assert problem.startswith("model.lora.bias: 'base_model.model.model.norm' is a ShiftedNorm, ")
    assert problem.endswith("use lora_only or none.")
    base = load(tiny_base, "bfloat16").model
    base.model.norm = ShiftedNorm()
    attach_adapters(base, LoRAConfig(r=4, bias="lora_only"), seed=0)


# --- whole runs -----------------------------------------------------------------------------------

RUNS = [
    pytest.param("LLaMA", {"method": "dora", "quant_type": "int8"}, id="dora-int8"),
    pytest.param(
        "Qwen2", {"method": "dora", "bias": "lora_only", "use_rslora": True}, id="dora-bias"
    ),
    pytest.param("GPT-2", {"bias": "all", "quant_type": "none"}, id="gpt2-all-none"),
    pytest.param("OPT", {"bias": "all"}, id="opt-all-nf4"),
    pytest.param("Falcon RW", {"bias": "lora_only"}, id="falcon-lora_only-nf4"),
    pytest.param("BLOOM", {"bias": "all", "quant_type": "int8"}, id="bloom-all-int8"),
    pytest.param(
        "GPT-NeoX, Pythia",
        {"rank_pattern": {r".*layers\.0.*": 8, "dense": 2}, "alpha_pattern": {".*": 8, "dense": 1}},
        id="patterns",
    ),
]


@pytest.mark.parametrize(("family", "settings"), RUNS)
def test_a_killed_run_ends_in_the_same_bytes_and_plain_peft_reads_them(
    saved, tmp_path, rows_file, family, settings
):
    """2e-5: float32 logits of about 1, packed again by plain transformers from the same file.

    Over int8 a last bit of an activation may fall on another of 127 steps: 2 % of the largest.
    """
    base = saved(family)
    module = fit(tmp_path / "whole", base, rows_file, **settings)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", base, rows_file, kill_at=2, **settings)
    fit(tmp_path / "killed", base, rows_file, **settings)
    assert digest(tmp_path / "whole") == digest(tmp_path / "killed")
    assert module.model is not None
    reloaded = logits_of(reload_with_plain_peft(tmp_path / "whole" / "adapter"))
    expected = logits_of(module.model)
    tolerance = 0.02 if settings.get("quant_type") == "int8" else 2e-5
    bound = tolerance * float(expected.abs().max())
    torch.testing.assert_close(reloaded, expected, rtol=0, atol=bound)
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert ("DoRA adapter" in card) is (settings.get("method") == "dora")
    assert ("rank-stabilised" in card) is ("use_rslora" in settings)
    assert ("others in some modules" in card) is ("rank_pattern" in settings)
    assert ("every bias" in card) is (settings.get("bias") == "all")
    assert ("biases of adapted layers" in card) is (settings.get("bias") == "lora_only")


@pytest.mark.parametrize("settings", [{"method": "dora"}, {"bias": "all"}], ids=str)
def test_plain_peft_reads_a_bfloat16_run_to_nearly_the_same_logits(
    saved, tmp_path, rows_file, settings
):
    """Plain PEFT multiplies float32 adapters in float32 and rounds biases: some 2**-8 apart."""
    module = fit(tmp_path, saved("OPT"), rows_file, compute="bfloat16", **settings)
    assert module.model is not None
    reloaded = logits_of(reload_with_plain_peft(tmp_path / "adapter")).float()
    expected = logits_of(module.model).float()
    assert (reloaded - expected).norm() < 0.02 * expected.norm()


# --- how many, and how much arithmetic ------------------------------------------------------------

INPUTS_AND_OUTPUTS = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2 * 4 * sum(i + o for i, o in INPUTS_AND_OUTPUTS)),
        ({"use_rslora": True, "init": "gaussian"}, 2 * 4 * sum(map(sum, INPUTS_AND_OUTPUTS))),
        # one length a row
        ({"method": "dora"}, 2 * sum(4 * (i + o) + o for i, o in INPUTS_AND_OUTPUTS)),
        # 8 instead of 4 rows and columns, of a 64 x 64 and a 64 x 32 in each of two layers
        (
            {"rank_pattern": {"q_proj|k_proj": 8}},
            2 * 4 * (sum(map(sum, INPUTS_AND_OUTPUTS)) + 128 + 96),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("on_meta", [False, True])
def test_trained_weights_are_those_of_the_shapes(tiny_base, settings, expected, on_meta):
    base = build_skeleton(tiny_base) if on_meta else load(tiny_base, "bfloat16").model
    with torch.device("meta" if on_meta else "cpu"):
        model = attach_adapters(base, LoRAConfig(**{"r": 4} | settings), seed=0)
    counts = count_parameters(model)
    assert counts.trainable == expected
    if not on_meta:
        assert (
            counts.by_dtype["float32"]
            == expected
            == sum(tensor.numel() for tensor in adapter_tensors(model).values())
        )


def test_trained_biases_are_counted_among_the_trained(saved):
    """By hand: 64 + 32 + 32 biases a layer; two layers; they were among the base's before."""
    loaded = load(saved("Qwen2"))
    before = count_parameters(loaded.model)
    without = 2 * 4 * sum(map(sum, INPUTS_AND_OUTPUTS))
    counts = count_parameters(attach_adapters(loaded.model, LoRAConfig(r=4, bias="all"), seed=0))
    assert counts.trainable == without + 2 * (64 + 32 + 32)
    assert counts.total == before.total + without


@pytest.mark.parametrize("family", ["GPT-2", "OPT"])
def test_learned_positions_are_read_and_not_multiplied(saved, family):
    """By hand: 4 matrices of 64 x 64 for attention, and two of the feed-forward part, a layer."""
    cost = compute_cost(attach_adapters(load(saved(family)).model, LoRAConfig(r=4), seed=0))
    inner = {"GPT-2": 256, "OPT": 128}[family]
    assert cost.matrices == 2 * (4 * 64 * 64 + 2 * 64 * inner)
    assert cost.head == 512 * 64


@pytest.mark.parametrize(
    ("settings", "num_adapter_weights"),
    [
        ({"method": "dora"}, 2 * 4 * sum(map(sum, INPUTS_AND_OUTPUTS))),
        ({"bias": "all"}, 2 * 4 * sum(map(sum, INPUTS_AND_OUTPUTS))),
        (
            {"rank_pattern": {"q_proj|k_proj": 8}},
            2 * 4 * (sum(map(sum, INPUTS_AND_OUTPUTS)) + 128 + 96),
        ),
    ],
    ids=str,
)
def test_the_arithmetic_of_a_step_counts_matrices_alone(saved, settings, num_adapter_weights):
    """A length or a bias is one operation a token beside a matrix's hundreds, frozen or not."""
    model = attach_adapters(load(saved("Qwen2")).model, LoRAConfig(**{"r": 4} | settings), seed=0)
    cost = compute_cost(model)
    assert cost.matrices == 2 * sum(i * o for i, o in INPUTS_AND_OUTPUTS)
    assert cost.head == 512 * 64
    assert cost.adapters == num_adapter_weights
