"""The loss against transformers' own, float64, and hand arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qlora_pl.modeling.steps.loss as loss_module
from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.batches.collation import collate
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.loading.base_loading import load_base, prepare_for_training
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.modeling.steps.loss import causal_lm_loss, token_losses, trained_logits

# Tokens of each row, and from which on they are trained.
ROWS = [(12, 5), (7, 3), (16, 15), (9, 9)]
NUM_TRAINED = 7 + 4 + 1 + 0


def make_model(folder: Path, compute: str) -> nn.Module:
    config = QuantizationConfig(compute_dtype=compute)
    plan = plan_quantization(build_skeleton(folder), config)
    identity = identify_base(str(folder), None, None)
    base = load_base(identity, config, plan, device=torch.device("cpu")).model
    model = attach_adapters(base, LoRAConfig(r=4), seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_tensors(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    prepare_for_training(model, gradient_checkpointing=False)
    return model


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> nn.Module:
    """Float32, with adapters whose B matrices are not zero."""
    return make_model(tiny_base, "float32")


def make_batch(rows: Sequence[tuple[int, int]] = ROWS, width: int | None = None) -> dict[str, Any]:
    """Rows of the given lengths, padded on the right to the longest, or to ``width``."""
    width = width or max(length for length, _ in rows)
    ids = torch.full((len(rows), width), 7)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for place, (length, first) in enumerate(rows):
        draw = torch.Generator().manual_seed(100 * length + first)
        ids[place, :length] = torch.randint(5, 512, (length,), generator=draw)
        mask[place, :length] = 1
        labels[place, first:length] = ids[place, first:length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def full_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in trainable_tensors(model).items()}


def assert_close_gradients(ours: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        assert expected[name].any(), name
        error = (ours[name] - expected[name]).norm() / expected[name].norm()
        assert error < rtol, name


# --- against other implementations ----------------------------------------------------------------


@pytest.mark.parametrize("is_training", [True, False])
def test_the_loss_equals_transformers_own(model, is_training):
    """Source: the ``loss`` of ``LlamaForCausalLM`` with labels, a mean over trained tokens.

    1e-6: float32 means of 12 numbers, summed in another order.
    """
    model.train(is_training)
    batch = make_batch()
    ours, theirs = causal_lm_loss(model, batch), model(**batch).loss
    torch.testing.assert_close(ours.total / ours.weight, theirs, rtol=1e-6, atol=0)
    model.train()


def test_token_losses_equal_float64(model):
    """Source: log-sum-exp in float64. 1e-6: a few float32 ulps (1.2e-7) at losses of 5 to 20."""
    draw = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(50, 512, generator=draw)
    labels = torch.randint(0, 512, (50,), generator=draw)
    exact = logits.double()
    expected = exact.logsumexp(1) - exact[torch.arange(50), labels]
    losses = token_losses(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)


def test_bf16_logits_are_summed_in_float32():
    """Source: float64 over the same bf16 logits; 1e-6 as above, where bf16 would err by 1e-2."""
    logits = (5 * torch.randn(50, 32_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    labels = torch.arange(50)
    exact = logits.double()
    expected = exact.logsumexp(1) - exact[torch.arange(50), labels]
    torch.testing.assert_close(
        token_losses(logits, labels).double(), expected, rtol=1e-6, atol=1e-6
    )
    in_bf16 = functional.cross_entropy(logits, labels, reduction="none").double()
    assert (in_bf16 - expected).abs().max() > 1e-2


def test_logits_of_picked_positions_are_those_of_the_whole(model):
    """1e-5: float32 products of other matrix shapes, at logits of about 5."""
    batch = make_batch()
    row, position = torch.tensor([2, 0, 0]), torch.tensor([15, 3, 4])
    picked = trained_logits(
        model, batch["input_ids"], row, position, attention_mask=batch["attention_mask"]
    )
    expected = full_logits(model, batch)[row, position]
    torch.testing.assert_close(picked, expected, rtol=0, atol=1e-5)


def test_gradients_equal_those_of_all_logits(model):
    """Source: torch's cross-entropy, summed, over the whole logits.

    1e-5: float32 sums in another order (measured: 4e-7).
    """
    batch = make_batch()
    logits = full_logits(model, batch)[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    expected = gradients(model, functional.cross_entropy(logits, labels, reduction="sum"))
    ours = gradients(model, causal_lm_loss(model, batch).total)
    assert_close_gradients(ours, expected, rtol=1e-5)


def test_what_a_family_does_to_its_logits_is_kept():
    """Gemma 2 bounds its logits after the head; source: transformers' own loss, 1e-6 as above."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        initializer_range=1.0,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    model, batch = Gemma2ForCausalLM(config), make_batch()
    ours, theirs = causal_lm_loss(model, batch), model(**batch).loss
    assert full_logits(model, batch).abs().max() <= 2
    torch.testing.assert_close(ours.total / ours.weight, theirs, rtol=1e-6, atol=0)


def test_the_head_is_as_before_afterwards_even_after_an_error(model):
    batch = make_batch()
    before = full_logits(model, batch)
    causal_lm_loss(model, batch)
    beyond = torch.tensor([99])
    with pytest.raises(IndexError):
        trained_logits(
            model, batch["input_ids"], beyond, beyond, attention_mask=batch["attention_mask"]
        )
    assert torch.equal(full_logits(model, batch), before)
    assert not model.get_output_embeddings()._forward_pre_hooks


# --- what does not matter -------------------------------------------------------------------------


def test_padding_and_rows_without_labels_change_nothing(model):
    """Each row alone, without padding, against the batch; 1e-5 as above."""
    whole = causal_lm_loss(model, make_batch(width=30))
    alone = [causal_lm_loss(model, make_batch([row])) for row in ROWS[:3]]
    total = torch.stack([loss.total for loss in alone]).sum()
    torch.testing.assert_close(whole.total, total, rtol=1e-5, atol=0)
    assert whole.num_tokens == sum(int(loss.num_tokens) for loss in alone) == NUM_TRAINED
    expected = gradients(model, total)
    ours = gradients(model, causal_lm_loss(model, make_batch(width=30)).total)
    assert_close_gradients(ours, expected, rtol=1e-5)


def test_the_ids_under_padding_change_nothing(model):
    batch = make_batch()
    loss = causal_lm_loss(model, batch).total
    batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"] == 1, 500)
    assert torch.equal(causal_lm_loss(model, batch).total, loss)


def test_a_label_on_the_first_token_is_not_trained_since_nothing_predicts_it(model):
    batch = make_batch([(12, 5)])
    before = causal_lm_loss(model, batch)
    batch["labels"][0, 0] = batch["input_ids"][0, 0]
    after = causal_lm_loss(model, batch)
    assert torch.equal(before.total, after.total)
    assert after.num_tokens == 7


@pytest.mark.parametrize("chunk", [1, 5, 11, 12])
def test_chunking_changes_neither_loss_nor_gradients(model, monkeypatch, chunk):
    """Equal in every bit: each token's loss is computed from its own logits alone."""
    batch = make_batch()
    loss = causal_lm_loss(model, batch)
    expected = gradients(model, loss.total)
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    chunked = causal_lm_loss(model, batch)
    assert torch.equal(chunked.total, loss.total)
    ours = gradients(model, chunked.total)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_float32_logits_exist_for_one_chunk_at_a_time(monkeypatch):
    """Counted: what autograd keeps for the backward pass."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 4)
    logits = torch.randn(16, 512).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_losses(logits, torch.arange(16)).sum()
    assert not any(t.dtype == torch.float32 and t.numel() >= 512 for t in kept)


# --- normalisation --------------------------------------------------------------------------------


def test_tokens_weigh_the_same_or_rows_do(model):
    """By hand: rows of 7, 4, 1 and no trained tokens, from the losses of single tokens."""
    batch = make_batch()
    sums = [causal_lm_loss(model, make_batch([row])).total.item() for row in ROWS[:3]]
    by_token = causal_lm_loss(model, batch, "tokens")
    by_row = causal_lm_loss(model, batch, "rows")
    assert by_token.weight == 12
    assert by_row.weight == 3
    # 1e-5: float32 sums in another order
    assert by_token.total.item() == pytest.approx(sum(sums), rel=1e-5)
    expected = sums[0] / 7 + sums[1] / 4 + sums[2] / 1
    assert by_row.total.item() == pytest.approx(expected, rel=1e-5)
    for loss in (by_token, by_row):
        assert loss.token_sum.item() == pytest.approx(sum(sums), rel=1e-5)
        assert loss.num_tokens == 12
        assert not loss.token_sum.requires_grad
        assert loss.total.dtype == loss.weight.dtype == torch.float32


def test_a_token_counts_as_often_as_its_weight_says(model):
    """By hand, from the losses of single tokens; a token of weight 0 is not trained at all.

    1e-5: float32 sums in another order.
    """
    batch = make_batch(ROWS[:2])
    draw = torch.Generator().manual_seed(1)
    weights = torch.rand(batch["labels"].shape, generator=draw)
    weights[0, 6] = 0
    losses = []
    for row, (length, first) in enumerate(ROWS[:2]):
        logits = full_logits(model, batch)[row, first - 1 : length - 1]
        targets = batch["labels"][row, first:length]
        each = functional.cross_entropy(logits, targets, reduction="none")
        losses.append((each.detach(), weights[row, first:length]))
    sums = [float((each * weight).sum()) for each, weight in losses]
    of_rows = [float(weight.sum()) for _, weight in losses]
    weighted = batch | {"loss_weights": weights}
    expected = {
        "tokens": (sum(sums), sum(of_rows)),
        "rows": (sums[0] / of_rows[0] + sums[1] / of_rows[1], 2),
        "micro_batches": (sum(sums) / sum(of_rows), 1),
    }
    for normalize_by, (total, weight) in expected.items():
        loss = causal_lm_loss(model, weighted, normalize_by)
        assert loss.total.item() == pytest.approx(total, rel=1e-5)
        assert loss.weight.item() == pytest.approx(weight, rel=1e-5)
        assert loss.num_tokens == 7 + 4 - 1
        plain = sum(float(each[weight > 0].sum()) for each, weight in losses)
        assert loss.token_sum.item() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(("given", "computed"), [("bfloat16", "float32"), ("float64", "float64")])
def test_losses_are_in_float32_at_least(given, computed):
    logits = torch.randn(5, 9).to(getattr(torch, given))
    assert token_losses(logits, torch.arange(5)).dtype == getattr(torch, computed)


@pytest.mark.parametrize("normalize_by", ["tokens", "rows"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_batch_without_labels_gives_zero_and_zero_gradients(tiny_base, normalize_by, compute):
    """Such a batch keeps a device in step; DistributedDataParallel waits for every gradient."""
    model = make_model(tiny_base, compute)
    rows = EncodedRows.from_examples([])
    filler = collate(rows, [], pad_id=0)
    loss = causal_lm_loss(model, filler, normalize_by)
    assert (loss.total, loss.weight, loss.num_tokens, loss.token_sum) == (0, 0, 0, 0)
    for name, gradient in gradients(model, loss.total).items():
        assert gradient is not None, name
        assert not gradient.any(), name
