"""EVA: A starts along the main directions of each layer's inputs, and B at zero."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import (
    Killed,
    a_of,
    digest,
    fit,
    layers_of,
    load,
    logits_of,
    make_data,
    make_module,
    make_trainer,
    one_thread,  # noqa: F401 (a fixture of every test here)
)
from families import BY_NAME
from lightning.pytorch import Callback, Trainer
from plain_peft import reload_with_plain_peft
from torch import Tensor, nn

import qlora_pl.modeling.adapters.adapter_start as adapter_start
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.eva import start_at_activations
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.loading.base_loading import prepare_for_training

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

EVA = LoRAConfig(r=4, init="eva")


def batches(*shapes: tuple[int, int], seed: int = 0, num_words: int = 400) -> list[Any]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for rows, width in shapes:
        ids = torch.randint(5, 5 + num_words, (rows, width), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, width * 3 // 4 :] = 0  # padding on the right
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def inputs_of(model: nn.Module, some: list[Any]) -> dict[str, Tensor]:
    """What each adapted layer is given at the tokens of the batches, one row each, in float64."""
    given: dict[str, list[Tensor]] = {name: [] for name in layers_of(model)}
    handles = [
        layer.base_layer.register_forward_hook(
            lambda _, arguments, __, name=name: given[name].append(arguments[0].detach())
        )
        for name, layer in layers_of(model).items()
    ]
    with torch.no_grad():
        for batch in some:
            model.eval()(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool().flatten() for batch in some]
    return {
        name: torch.cat([x.flatten(0, -2)[m] for x, m in zip(xs, masks, strict=True)]).double()
        for name, xs in given.items()
    }


def explained(inputs: Tensor, a: Tensor) -> float:
    """Share of the variance that the best directions hold which these directions hold (by SVD)."""
    centred = inputs - inputs.mean(dim=0)
    best = torch.linalg.svdvals(centred)[: len(a)].square().sum()
    basis = torch.linalg.qr(a.double().t()).Q
    return float((centred @ basis).square().sum() / best)


def start(base: Path, some: list[Any], config: LoRAConfig = EVA, **loading: Any) -> nn.Module:
    model = attach_adapters(load(base, **loading).model, config, seed=0)
    prepare_for_training(model, gradient_checkpointing=True)
    start_at_activations(model, some)
    return model


@pytest.mark.parametrize(
    ("loading", "lora"),
    [
        ({}, {}),
        ({"compute": "bfloat16"}, {}),
        ({"quant_type": "int8"}, {}),
        ({"quant_type": "none", "compute": "bfloat16"}, {"dtype": "bfloat16"}),
        ({}, {"method": "dora", "use_rslora": True}),
        ({}, {"rank_pattern": {"q_proj": 8, "down_proj": 2}}),
        ({}, {"r": 32}),
    ],
    ids=str,
)
def test_eva_starts_at_the_base_along_the_main_directions_of_the_inputs(tiny_base, loading, lora):
    """Source: an SVD of the inputs, centred, in float64 (Paischer et al. 2024, section 3).

    Random inputs vary nearly alike in all of 64 directions, where PEFT's sketch of the SVD and the
    cut after each batch lose up to 5 %; random directions would hold about a quarter.
    """
    config = LoRAConfig(**{"r": 4, "init": "eva"} | lora)
    some = batches((4, 32), (4, 24))
    model = start(tiny_base, some, config, **loading)
    base = load(tiny_base, **loading).model
    assert torch.equal(logits_of(model), logits_of(base))
    chance = attach_adapters(base, LoRAConfig(r=config.r), seed=0)
    inputs = inputs_of(model, some)
    for name, a in a_of(model).items():
        assert a.dtype == getattr(torch, config.dtype)
        assert len(a) == layers_of(model)[name].r["default"]
        # rows of length one, at right angles, up to the type that they are kept in
        off = (a.double() @ a.double().t() - torch.eye(len(a))).abs().max()
        assert off < (1e-5 if a.dtype == torch.float32 else 2**-7)
        assert explained(inputs[name], a) > 0.94, name
        if config.r == 4 and len(a) == 4:
            assert explained(inputs[name], a_of(chance)[name]) < 0.7


def test_from_one_batch_of_few_words_eva_finds_the_very_directions(tiny_base):
    """Six words: at the first layer inputs lie in five directions, which no sketch can miss."""
    some = batches((4, 32), num_words=6)
    model = start(tiny_base, some, LoRAConfig(r=5, init="eva"))
    inputs = inputs_of(model, some)
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{name}"
        assert explained(inputs[name], a_of(model)[name]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", ["GPT-2", "OPT", "BLOOM"])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_eva_works_in_families_of_other_shapes(tmp_path, family, quant_type):
    base = BY_NAME[family].save(tmp_path / "base")
    some = batches((4, 32))
    config = LoRAConfig(r=4, init="eva", bias="all")
    model = start(base, some, config, quant_type=quant_type)
    inputs = inputs_of(model, some)
    assert all(explained(inputs[name], a) > 0.94 for name, a in a_of(model).items())
    expected = load(base, quant_type=quant_type).model
    assert torch.equal(logits_of(model), logits_of(expected))


def test_padding_does_not_count_among_the_inputs(tiny_base):
    some = batches((4, 32), (2, 24))
    other = copy.deepcopy(some)
    for batch in other:
        batch["input_ids"][batch["attention_mask"] == 0] = 7
    first, second = a_of(start(tiny_base, some)), a_of(start(tiny_base, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_eva_gives_the_same_bytes_and_leaves_random_states_and_modes_alone(tiny_base):
    some = batches((4, 32), (2, 24))
    found = []
    for seed in (1, 2):
        model = attach_adapters(load(tiny_base).model, EVA, seed=seed)
        prepare_for_training(model, gradient_checkpointing=True)
        silenced: Any = next(iter(layers_of(model).values())).base_layer
        silenced.training = False
        modes = [module.training for module in model.modules()]
        hooks = [len(module._forward_hooks) for module in model.modules()]
        before = [len(module._forward_pre_hooks) for module in model.modules()]
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        start_at_activations(model, some)
        assert torch.equal(torch.rand(3), expected)
        assert [module.training for module in model.modules()] == modes
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
        assert [len(module._forward_pre_hooks) for module in model.modules()] == before
        assert all(p.grad is None for p in model.parameters())
        found.append(a_of(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("some", "r"),
    [
        pytest.param(batches(*[(2, 17)] * 16, seed=1), 24, id="flat"),
        pytest.param(batches((4, 24), (4, 24), num_words=1), 24, id="one-word"),
        pytest.param(batches((4, 24), (4, 24), seed=1, num_words=5), 24, id="few-words"),
    ],
)
def test_eva_looks_at_every_batch_once_whatever_is_in_it(tiny_base, some, r):
    """PEFT's own loop goes round until directions settle, which in these they need not do."""
    config = LoRAConfig(r=r, init="eva")
    model = attach_adapters(load(tiny_base).model, config, seed=0)
    num_passes = 0

    def count(*_: Any) -> None:
        nonlocal num_passes
        num_passes += 1
        assert num_passes <= len(some)

    model.register_forward_hook(count)
    start_at_activations(model, some)
    for a in a_of(model).values():
        assert a.isfinite().all()
        assert (a @ a.t() - torch.eye(r)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("sizes", "lora", "num_tokens"),
    [
        ([(1, 20)], {"r": 16}, 16),
        ([(1, 20), (2, 10)], {"r": 32}, 32),
        ([(1, 20)], {"r": 4, "rank_pattern": {"up_proj": 16}}, 16),
    ],
)
def test_batches_with_fewer_tokens_than_the_rank_are_refused(tiny_base, sizes, lora, num_tokens):
    config = LoRAConfig(init="eva", **lora)
    model = attach_adapters(load(tiny_base).model, config, seed=0)
    with pytest.raises(ConfigurationError) as caught:
        start_at_activations(model, batches(*sizes))
    (problem,) = caught.value.problems
    assert f"eva needs a batch of at least {num_tokens} tokens" in problem
    assert "data.batch_size" in problem


def test_batches_that_are_too_small_are_left_out_while_one_is_large_enough(tiny_base):
    config = LoRAConfig(r=16, init="eva")
    large, small = batches((4, 32)), batches((1, 8), seed=3)
    both = a_of(start(tiny_base, [*small, *large, *small], config))
    alone = a_of(start(tiny_base, large, config))
    assert all(torch.equal(both[name], alone[name]) for name in both)


def test_a_resumed_eva_run_computes_nothing_again_and_plain_peft_reads_it(
    tiny_base, tmp_path, rows_file, monkeypatch
):
    """2e-5: float32 logits of about 1, packed again by plain transformers from the same file."""
    computed = []
    original = adapter_start.start_at_activations

    def counted(*arguments: Any) -> None:
        computed.append(1)
        original(*arguments)

    monkeypatch.setattr(adapter_start, "start_at_activations", counted)
    module = fit(tmp_path / "whole", tiny_base, rows_file, init="eva")
    with pytest.raises(Killed):
        fit(tmp_path / "killed", tiny_base, rows_file, kill_at=2, init="eva")
    assert len(computed) == 2
    fit(tmp_path / "killed", tiny_base, rows_file, init="eva")
    assert len(computed) == 2
    assert digest(tmp_path / "whole") == digest(tmp_path / "killed")
    assert module.model is not None
    reloaded = reload_with_plain_peft(tmp_path / "whole" / "adapter")
    torch.testing.assert_close(logits_of(reloaded), logits_of(module.model), rtol=0, atol=2e-5)
    fresh = make_module(tiny_base, init="eva")
    make_trainer(tmp_path / "other").validate(fresh, make_data(rows_file), verbose=False)
    assert len(computed) == 2


def test_eva_does_not_move_the_dropout_of_the_run(tiny_base, tmp_path, rows_file):
    """The first step's masks are those of the same run from a random start."""
    drawn: list[Tensor] = []

    class Draw(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            drawn.append(torch.get_rng_state())

    for init in ("kaiming", "eva"):
        fit(tmp_path / init, tiny_base, rows_file, Draw(), init=init)
    assert len(drawn) == 6
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], drawn[3:], strict=True))
