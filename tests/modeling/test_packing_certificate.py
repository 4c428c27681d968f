"""Every family is asked whether it keeps packed rows apart; the answer is what is known of it.

Known from transformers' sources: ``create_causal_mask`` keeps rows of a pack apart by their
positions, where a family hands these on. OPT counts its positions from the mask, BLOOM and Falcon
make ALiBi or causal masks of their own.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapter_runs import fill, load
from families import CAUSAL_FAMILIES, Family, Saver
from torch import nn

import qlora_pl.modeling.steps.packing_certificate as certificate
from qlora_pl.batch import IGNORE_INDEX, PackingProbe
from qlora_pl.data.batches.collation import make_packing_probe
from qlora_pl.data.encoding.example import EncodedExample
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.loading.base_loading import prepare_for_training
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.modeling.steps.packing_certificate import (
    HALF_TOLERANCE,
    measure_leak,
    packing_problem,
    settle_packing,
)

LEAKS = {"BLOOM", "Falcon (rotary)", "Falcon RW", "OPT"}


def make_rows() -> EncodedRows:
    draw = np.random.default_rng(0)
    examples = []
    for length in (30, 17, 41, 25):
        ids = draw.integers(5, 400, length).astype(np.int32)
        is_trained = np.arange(length) >= length // 2
        examples.append(EncodedExample(ids, is_trained, is_trained))
    return EncodedRows.from_examples(examples)


def make_probe(num_lines: int = 2) -> PackingProbe:
    return make_packing_probe(make_rows(), 0, num_lines)


def make_model(folder: Path, compute: str = "float32", dropout: float = 0.1) -> nn.Module:
    base = load(folder, compute).model
    model = attach_adapters(base, LoRAConfig(r=4, dropout=dropout), seed=0)
    fill(model)
    prepare_for_training(model, gradient_checkpointing=True)
    return model


# -- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", CAUSAL_FAMILIES, ids=lambda family: family.name)
def test_exactly_the_families_that_mix_rows_are_refused(
    family: Family, compute: str, saved: Saver
) -> None:
    """Far from the tolerance on both sides, so that no rounding turns a verdict.

    Float32: a thousandth of it (measured: 6e-7 and 4e-7), and a hundred times (0.19 at least).
    Bfloat16: a fifth of it, and its double.
    """
    model = make_model(saved(family.name), compute)
    dtype = getattr(torch, compute)
    problem = packing_problem(model, make_probe(), dtype)
    leak = measure_leak(model, make_probe())
    if family.name in LEAKS:
        assert problem is not None
        assert family.model_type in problem.lower()
        assert "lets a packed row see the others" in problem
        assert f"{leak.seen:.2g}" in problem
        assert min(leak) > (0.1 if compute == "float32" else 2 * HALF_TOLERANCE * 0.9)
    else:
        assert problem is None
        assert leak.seen == 0
        assert max(leak) < (1e-5 if compute == "float32" else HALF_TOLERANCE / 5)


def test_an_encoder_decoder_is_refused_by_name(saved: Saver) -> None:
    model = make_model(saved("T5"))
    problem = packing_problem(model, make_probe(), torch.float32)
    assert problem is not None
    assert problem.startswith("T5ForConditionalGeneration reads prompts in an encoder of its own")


# -- what it would find --------------------------------------------------------------------------


def test_a_mask_or_a_cache_switches_isolation_off_and_is_found(saved: Saver) -> None:
    """The two ways in which transformers no longer looks at positions, without an error."""
    model = make_model(saved("LLaMA"))
    probe = make_probe()
    masked = probe.packed | {"attention_mask": torch.ones_like(probe.packed["input_ids"])}
    leak = measure_leak(model, probe._replace(packed=masked))  # type: ignore[arg-type]
    assert leak.seen > 0.1
    assert leak.gradient > 0.1


def test_positions_that_go_on_from_row_to_row_are_found(saved: Saver) -> None:
    """GPT-2 learns its positions, so that a row further on is another input."""
    probe = make_probe()
    positions = torch.arange(probe.packed["input_ids"].shape[1]).expand(2, -1)
    probe = probe._replace(packed=probe.packed | {"position_ids": positions})  # type: ignore
    model = make_model(saved("GPT-2"))
    assert measure_leak(model, probe).logits > 0.1
    assert packing_problem(model, probe, torch.float32) is not None


def test_a_wrong_gradient_behind_right_logits_is_found(saved: Saver) -> None:
    """One token more is trained in the pack than in the rows alone."""
    probe = make_probe()
    labels = probe.packed["labels"].clone()
    place = (labels[0] != IGNORE_INDEX).nonzero()[0, 0]
    labels[0, place] = IGNORE_INDEX
    probe = probe._replace(packed=probe.packed | {"labels": labels})  # type: ignore[arg-type]
    problem = packing_problem(make_model(saved("LLaMA")), probe, torch.float32)
    assert problem is not None
    assert "LlamaForCausalLM's gradients of packed rows" in problem


def test_logits_that_are_no_numbers_are_refused(saved: Saver) -> None:
    model = make_model(saved("LLaMA"))
    model.get_base_model().lm_head.weight.data.fill_(float("nan"))  # type: ignore
    problem = packing_problem(model, make_probe(), torch.float32)
    assert (
        problem == "LlamaForCausalLM gives logits or gradients of packed rows that are not numbers"
    )


def test_a_model_that_takes_no_positions_is_refused(saved: Saver, monkeypatch: Any) -> None:
    model = make_model(saved("LLaMA"))
    base: Any = model.get_base_model()  # type: ignore[operator]
    forward = base.forward

    def without_positions(input_ids: Any, attention_mask: Any = None, **named: Any) -> Any:
        if "position_ids" in named:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
        return forward(input_ids=input_ids, attention_mask=attention_mask, **named)

    monkeypatch.setattr(base, "forward", without_positions)
    problem = packing_problem(model, make_probe(), torch.float32)
    assert problem is not None
    assert "cannot be run on packed rows (forward() got an unexpected" in problem


# -- what it leaves ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LLaMA", "OPT"])
def test_the_model_is_as_before(name: str, saved: Saver) -> None:
    """Weights, gradients, modes (also one that somebody set apart), generators, packed bytes."""
    model = make_model(saved(name))
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    dropout.training = False
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    packing_problem(model, make_probe(), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert len(trainable_tensors(model)) > 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear))


def test_activations_are_recomputed_as_in_training_and_dropout_stays_off(saved: Saver) -> None:
    """A layer runs once forward and once more in the backward pass, for each of five batches."""
    model = make_model(saved("LLaMA"), dropout=0.5)
    calls = []
    layer = model.get_base_model().model.layers[0]  # type: ignore
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    leak = measure_leak(model, make_probe())
    assert max(leak) < 1e-5  # dropout of one half would move everything
    assert calls.count(True) == 2 * 5


# -- what comes of it ----------------------------------------------------------------------------


def make_run(model: nn.Module, packing: Any, fn: str = "fit") -> tuple[Any, Any]:
    data = SimpleNamespace(packing=packing, packing_probe=make_probe, decided=[])
    data.decide_packing = data.decided.append
    module = SimpleNamespace(model=model, base=SimpleNamespace(compute_dtype=torch.float32))
    from lightning.pytorch import Trainer

    trainer: Any = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.datamodule = data
    trainer.state.fn = fn
    return module, trainer


@pytest.mark.parametrize(("name", "packs"), [("LLaMA", True), ("OPT", False)])
def test_auto_packs_where_it_can_and_says_where_it_cannot(
    name: str, packs: bool, saved: Saver, caplog: pytest.LogCaptureFixture
) -> None:
    module, trainer = make_run(make_model(saved(name)), "auto")
    with caplog.at_level(logging.WARNING, certificate.__name__):
        settle_packing(module, trainer)
    assert trainer.datamodule.decided == [packs]
    said = [
        m for m in caplog.messages if m.startswith("data.packing: rows are padded, since OPTFor")
    ]
    assert len(said) == (0 if packs else 1)


def test_on_stops_the_run_where_rows_would_be_mixed(saved: Saver) -> None:
    module, trainer = make_run(make_model(saved("BLOOM")), True)
    with pytest.raises(ConfigurationError, match=r"data\.packing: BloomForCausalLM lets .* 0\.\d"):
        settle_packing(module, trainer)
    assert trainer.datamodule.decided == []


@pytest.mark.parametrize(("packing", "fn"), [(False, "fit"), (True, "validate"), ("auto", "test")])
def test_nothing_is_asked_where_nothing_is_packed(
    packing: Any, fn: str, saved: Saver, monkeypatch: Any
) -> None:
    asked: Callable[..., Any] = lambda *_: pytest.fail("asked")  # noqa: E731
    monkeypatch.setattr(certificate, "packing_problem", asked)
    settle_packing(*make_run(nn.Linear(1, 1), packing, fn))
