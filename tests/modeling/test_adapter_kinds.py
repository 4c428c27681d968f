"""Scales, ranks, counts and whole runs of every kind of adapter, against plain PEFT and by hand."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from adapter_runs import (
    PARTS,
    Killed,
    digest,
    fill,
    fit,
    layers_of,
    load,
    logits_of,
    one_thread,  # noqa: F401 (a fixture of every test here)
    plain_peft,
)
from plain_peft import reload_with_plain_peft
from torch import Tensor

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import (
    LoRAConfig,
    attach_adapters,
    refuse_unfit_ranks,
    resolve_targets,
)
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.compute import compute_cost
from qlora_pl.modeling.parameters import adapter_tensors, count_parameters

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


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
