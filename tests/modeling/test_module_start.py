"""What is found before weights are loaded, and what is said once they are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base
from module_runs import fit, make_module, make_trainer
from safetensors.torch import save_file

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.modeling.summary import summarize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


def set_up(base: Path, **model: Any) -> QLoRAModule:
    module = make_module(base, **model)
    module.trainer = make_trainer()
    module.setup("fit")
    return module


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"lora": LoRAConfig(target_modules=["q_porj"])}, "'q_porj'; did you mean 'q_proj'"),
        ({"quantization": QuantizationConfig(skip_modules=("x",))}, "skip_modules: .* x;"),
    ],
)
def test_a_misspelt_module_is_found_before_weights_are_loaded(tiny_base, model, named):
    module = make_module(tiny_base, **model)
    module.trainer = make_trainer()
    with pytest.raises(ConfigurationError, match=named):
        module.setup("fit")
    assert module.model is None


def test_a_tokenizer_with_more_tokens_than_the_base_has_embeddings_is_refused(
    tmp_path, tiny_base, rows_file
):
    small = save_base(tmp_path / "small", vocab_size=256)
    with pytest.raises(
        ConfigurationError, match=r"has \d+ tokens, the base has 256 embedding rows"
    ):
        fit(small, rows_file, data={"tokenizer": str(tiny_base)})


@pytest.mark.parametrize(
    ("shape", "lr", "warns"),
    [
        pytest.param((6656, 17920, 60, 52), 2e-4, "33B weights", id="33B"),
        pytest.param((6656, 17920, 60, 52), 1e-4, None, id="33B-low"),
        pytest.param((5120, 13824, 40, 40), 2e-4, None, id="13B"),
    ],
)
def test_a_learning_rate_above_the_papers_for_a_large_base_is_warned_about(
    tmp_path, caplog, shape, lr, warns
):
    """Shapes of the public LLaMA configurations; the folder's weights are one number."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads = shape
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
    ).save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        set_up(tmp_path, optimizer=OptimizerConfig(lr=lr))
    warnings = [record.getMessage() for record in caplog.records]
    if warns is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warns in warning
        assert f"model.optimizer.lr: {lr}" in warning
        assert "0.0001" in warning


def test_a_second_start_of_the_same_module_loads_nothing_again(tiny_base):
    module = set_up(tiny_base)
    module.configure_model()
    model = module.model
    module.setup("validate")
    module.configure_model()
    assert module.model is model


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (QuantizationConfig(), ["14 matrices in nf4, blocks of 64, double_quant"]),
        (QuantizationConfig(quant_type="none"), []),
        (
            QuantizationConfig(skip_modules=("0.mlp.up_proj",)),
            [
                "13 matrices in nf4, blocks of 64, double_quant",
                "not quantised: model.layers.0.mlp.up_proj.weight",
            ],
        ),
    ],
    ids=["nf4", "none", "skip"],
)
def test_the_summary_lists_what_was_skipped_and_nothing_else(tiny_base, quantization, expected):
    """By hand: 73,728 weights in linears, 65,856 in the other tensors, 8,192 in adapters."""
    module = set_up(tiny_base, quantization=quantization)
    module.configure_model()
    lines = summarize(str(tiny_base), module.model, module.base, quantization).splitlines()
    assert lines[0].startswith(f"{tiny_base}: 147,776 weights (")
    assert lines[1].startswith("trainable: 8,192 (5.544%)")
    for line, words in zip(lines[2:], expected, strict=True):
        assert line.startswith(words)
