"""Encoder-decoder models: the loss against transformers' own, what is kept, counted and refused.

That T5, Flan-T5 and mT5 are quantised, trained, resumed and reloaded is held by test_families.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_runs import copy_trained, fill, load, plain_peft, twin_of
from conftest import save_t5_tokenizer
from families import BY_NAME, T5, Saver
from small_runs import fit, make_data, make_trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from qlora_pl.batch import IGNORE_INDEX
from qlora_pl.data.batches.pair_batches import collate_pairs
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.eva import start_at_activations
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import generate_answers
from qlora_pl.modeling.base.encoder_decoder import (
    auto_class_name,
    decoder_inputs,
    is_encoder_decoder,
    language_model_loss,
    seq2seq_loss,
    whole_inputs,
)
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.base.vocabulary import grow_vocabulary
from qlora_pl.modeling.compute import compute_cost
from qlora_pl.modeling.loading.base_loading import load_base, prepare_for_training
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.parameters import count_parameters, trainable_tensors
from qlora_pl.modeling.steps.step import MicroBatch
from qlora_pl.modeling.summary import summarize

CPU = torch.device("cpu")
KINDS = ["T5", "T5 v1.1, Flan-T5"]
PAIRS = [(9, 5), (4, 7), (13, 1)]
"""Tokens of each pair's source and target."""

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, saved: Saver) -> nn.Module:
    """NF4 in float32 products, with adapters whose B matrices are not zero."""
    adapted = attach_adapters(load(saved(request.param)).model, LoRAConfig(r=4), seed=0)
    fill(adapted)
    prepare_for_training(adapted, gradient_checkpointing=False)
    return adapted


def make_batch(pairs: list[tuple[int, int]] = PAIRS, more: int = 0) -> dict[str, Tensor]:
    """Pairs of these lengths; ``more`` places of padding on either side beyond the longest."""
    width, target_width = (max(sizes) + more for sizes in zip(*pairs, strict=True))
    batch = {
        "input_ids": torch.zeros(len(pairs), width, dtype=torch.int64),
        "attention_mask": torch.zeros(len(pairs), width, dtype=torch.int64),
        "labels": torch.full((len(pairs), target_width), IGNORE_INDEX),
        "decoder_attention_mask": torch.zeros(len(pairs), target_width, dtype=torch.int64),
        "row_ids": torch.arange(len(pairs)),
    }
    for place, (source, target) in enumerate(pairs):
        draw = torch.Generator().manual_seed(100 * source + target)
        batch["input_ids"][place, :source] = torch.randint(3, 512, (source,), generator=draw)
        batch["labels"][place, :target] = torch.randint(3, 512, (target,), generator=draw)
        batch["attention_mask"][place, :source] = 1
        batch["decoder_attention_mask"][place, :target] = 1
    return batch


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trainable_tensors(model).items() if p.grad is not None}


def assert_close_gradients(ours: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        assert expected[name].any(), name
        error = (ours[name] - expected[name]).norm() / expected[name].norm()
        assert error < rtol, name


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_training", [True, False])
def test_the_loss_is_transformers_own(model, is_training):
    """Source: the ``loss`` that transformers computes of labels, and its shift of them.

    1e-6: float32 means of 13 numbers, summed in another order.
    """
    model.train(is_training)
    batch = make_batch()
    ours = seq2seq_loss(model, batch)
    theirs = model(
        **{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}, use_cache=False
    ).loss
    torch.testing.assert_close(ours.total / ours.weight, theirs, rtol=1e-6, atol=0)
    assert int(ours.num_tokens) == 13
    model.train()


def test_gradients_equal_those_of_all_logits(model):
    """Source: torch's cross-entropy over the whole logits; 1e-5: float32 in another order."""
    batch = make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = model(**inputs, labels=batch["labels"], use_cache=False).logits
    loss = functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    expected = gradients(model, loss)
    ours = gradients(model, language_model_loss(model, batch).total)
    assert_close_gradients(ours, expected, rtol=1e-5)


def test_each_normalisation_is_what_its_name_says(model):
    """Token losses of each pair alone, put together by hand; 1e-5: other matrix shapes."""
    alone = [seq2seq_loss(model, make_batch([pair])).total.detach() for pair in PAIRS]
    expected = {
        "tokens": (sum(alone), 13),
        "rows": (alone[0] / 5 + alone[1] / 7 + alone[2], 3),
        "micro_batches": (sum(alone) / 13, 1),
    }
    for kind, (total, weight) in expected.items():
        loss = seq2seq_loss(model, make_batch(), kind)
        torch.testing.assert_close(loss.total.detach(), total, rtol=1e-5, atol=0)
        assert loss.weight == weight


def test_a_token_counts_as_often_as_its_weight_says(model):
    """The first pair's tokens by a half and the second's not at all, by hand; 1e-5 as above."""
    batch = make_batch()
    batch["loss_weights"] = torch.tensor([0.5, 0.0, 1.0])[:, None].expand_as(batch["labels"])
    alone = [seq2seq_loss(model, make_batch([pair])).total.detach() for pair in PAIRS]
    loss = seq2seq_loss(model, batch)
    torch.testing.assert_close(loss.total.detach(), alone[0] / 2 + alone[2], rtol=1e-5, atol=0)
    assert (float(loss.weight), int(loss.num_tokens)) == (5 / 2 + 1, 5 + 1)
    by_rows = seq2seq_loss(model, batch, "rows")
    torch.testing.assert_close(by_rows.total.detach(), alone[0] / 5 + alone[2], rtol=1e-5, atol=0)
    assert by_rows.weight == 2


def test_padding_and_what_lies_under_it_change_nothing(model):
    """1e-5: float32 products of other matrix shapes; other ids under the padding change no bit."""
    expected = gradients(model, seq2seq_loss(model, make_batch()).total)
    batch = make_batch(more=5)
    loss = seq2seq_loss(model, batch).total
    assert_close_gradients(gradients(model, loss), expected, rtol=1e-5)
    batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"] == 1, 500)
    assert torch.equal(seq2seq_loss(model, batch).total, loss)


def test_a_device_without_rows_adds_nothing(model):
    loss = seq2seq_loss(model, collate_pairs([], np.array([], dtype=int), 0))  # type: ignore
    assert (float(loss.total), int(loss.num_tokens), float(loss.weight)) == (0, 0, 0)
    assert not any(g.any() for g in gradients(model, loss.total).values())


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_wo_stays_as_it_was_and_is_said_and_counted(kind: str, saved: Saver) -> None:
    """Source: the checkpoint's tensors, and four matrices of 64 x 128."""
    from safetensors.torch import load_file

    loaded = load(saved(kind), compute="bfloat16")
    stored = load_file(saved(kind) / "model.safetensors")
    names = [name for name in stored if name.endswith("wo.weight")]
    assert sorted(loaded.plan.fragile) == sorted(names)
    for name in names:
        kept = loaded.model.get_parameter(name)
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept, stored[name])
    packed = sum(stored[name].numel() for name in loaded.plan.quantized)
    counts = count_parameters(loaded.model)
    assert counts.by_dtype == {
        "nf4": packed,
        "bfloat16": sum(tensor.numel() for tensor in stored.values()) - packed,
    }
    adapted = attach_adapters(loaded.model, LoRAConfig(r=4), seed=0)
    assert sum(".wo.lora_B" in name for name in trainable_tensors(adapted)) == 4
    text = summarize("t5", adapted, loaded, QuantizationConfig())
    assert "kept in bfloat16: wo (4 matrices, 32,768 weights" in text
    assert "encoder.block" not in text  # nothing else is said to be unquantised


def test_int8_leaves_wo_alone_too(saved: Saver) -> None:
    loaded = load(saved("T5"), quant_type="int8")
    assert len(loaded.plan.quantized) == 28
    assert {loaded.model.get_parameter(name).dtype for name in loaded.plan.fragile} == {
        torch.float32
    }


def test_wo_multiplies_in_float32_where_other_products_are_in_float16(saved: Saver) -> None:
    """Its products leave float16's range, 65,504, for which it is kept apart at all."""
    loaded = load(saved("T5"), compute="float16")
    for name in loaded.plan.fragile:
        layer = loaded.model.get_submodule(name.rpartition(".")[0])
        x = torch.full((1, 2, 128), 1e4)
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            assert functional.linear(x, layer.weight.abs()).isinf().any()  # what autocast does
            layer.weight.abs_()
            product = layer(x)
        assert product.isfinite().all()
        torch.testing.assert_close(product, x @ layer.weight.T)


def test_packed_weights_of_a_head_of_its_own_are_read_back_to_the_same_logits(
    tmp_path: Path,
) -> None:
    """Transformers writes that the head is tied into every T5's config.json."""
    folder = BY_NAME["T5 v1.1, Flan-T5"].save(tmp_path / "base")
    config = QuantizationConfig(compute_dtype="float32")
    plan = plan_quantization(build_skeleton(folder), config)
    identity = identify_base(str(folder), None, None)
    cache = str(tmp_path / "cache")
    made, read = (load_base(identity, config, plan, device=CPU, cache_dir=cache) for _ in range(2))
    assert (made.is_from_cache, read.is_from_cache) == (False, True)
    ids = torch.arange(5, 21).unsqueeze(0)
    with torch.no_grad():
        first, second = (b.model(**whole_inputs(b.model, ids)).logits for b in (made, read))
    assert torch.equal(first, second)
    assert read.model.lm_head.weight is not read.model.shared.weight  # type: ignore[union-attr]


def test_plain_peft_over_a_twin_gives_the_same_logits(saved: Saver) -> None:
    """1e-5: float32 logits, all-linear by hand."""
    loaded = load(saved("T5 v1.1, Flan-T5"))
    adapted = attach_adapters(loaded.model, LoRAConfig(r=4), seed=0)
    targets = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    twin = plain_peft(twin_of(loaded, saved("T5 v1.1, Flan-T5")), targets, task_type="SEQ_2_SEQ_LM")
    fill(adapted)
    copy_trained(adapted, twin)
    batch = make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        ours = adapted.eval()(**inputs).logits
        theirs = twin.eval()(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


# --- asking ---------------------------------------------------------------------------------------


def test_answers_are_those_of_transformers_own_greedy_decoding(saved: Saver) -> None:
    """One prompt at a time and unpadded there, both at once and padded on the left here."""
    from transformers import AutoTokenizer

    loaded = load(saved("T5 v1.1, Flan-T5"))
    twin: Any = twin_of(loaded, saved("T5 v1.1, Flan-T5"))
    tokenizer = AutoTokenizer.from_pretrained(saved("T5 v1.1, Flan-T5"))
    prompts = [[5, 6, 7, 8, 9, 1], [20, 21, 22, 1]]
    ids = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    answers = generate_answers(
        loaded.model, tokenizer, ids, (ids != 0).long(), {1}, DecodingConfig(max_new_tokens=6)
    )
    expected = []
    for prompt in prompts:
        output = twin.eval().generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False
        )
        written = output[0, 1:].tolist()
        end = written.index(1) if 1 in written else None
        expected.append(tokenizer.decode(written[:end]).strip())
    assert answers == expected
    assert all(answers)


# --- counting -------------------------------------------------------------------------------------


def test_a_step_counts_both_sides(model) -> None:
    batch = make_batch(more=2)
    sums = MicroBatch.of(seq2seq_loss(model, batch), batch).sums().tolist()
    assert sums[2:5] == [13, 26 + 13, 3 * (15 + 9)]  # trained, tokens, with padding
    pairs = sum((s + t) ** 2 + s**2 for s, t in PAIRS)  # an encoder looks at all, not at half
    assert sums[5:] == [pairs, 3]


def test_operations_are_those_that_torch_counts(saved: Saver) -> None:
    """Source: torch's FlopCounterMode over a forward of plain transformers, without adapters.

    Exactly, but for attention, of which torch counts the causal half too: 2 x 2 x width x 2 layers.
    """
    from transformers import AutoModelForSeq2SeqLM

    plain = AutoModelForSeq2SeqLM.from_pretrained(
        saved("T5 v1.1, Flan-T5"), attn_implementation="eager"
    ).requires_grad_(False)
    source, target = 7, 3
    cost = compute_cost(plain)
    with FlopCounterMode(display=False) as counter:
        plain(
            input_ids=torch.ones(1, source, dtype=torch.int64),
            decoder_input_ids=torch.ones(1, target, dtype=torch.int64),
            use_cache=False,
        )
    attention = 4 * 64 * 2 * (source**2 + target**2 + source * target)
    products = 2 * (source * cost.matrices + target * (cost.target_matrices + cost.head))
    assert counter.get_total_flops() == products + attention
    pairs = (source + target) ** 2 + source**2
    ours = 2 * products + 3 * 2 * 64 * 2 * pairs  # the backward once more, and attention's twice
    assert cost.of_step(source + target, target, pairs) == ours


# --- EVA ------------------------------------------------------------------------------------------


def test_eva_looks_at_each_sides_own_tokens(saved: Saver) -> None:
    """Source: an SVD of each layer's inputs, of pairs without padding, centred, in float64.

    0.94 as in test_eva.py; directions that padding has a part in hold less. Both sides are padded
    to one width, so that a layer's input does not tell by its shape whose padding it holds.
    """
    loaded = load(saved("T5"))
    model = attach_adapters(loaded.model, LoRAConfig(r=4, init="eva"), seed=0)
    draw = torch.Generator().manual_seed(0)
    pairs = [(int(s), int(t)) for s, t in torch.randint(9, 24, (4, 2), generator=draw)]
    batch = make_batch([*pairs, (24, 24)])
    layers = {
        "encoder.block.1.layer.0.SelfAttention.q": "source",
        "decoder.block.1.layer.0.SelfAttention.q": "target",
        "decoder.block.1.layer.1.EncDecAttention.k": "source",
        "decoder.block.1.layer.2.DenseReluDense.wo": "target",
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        model.base_model.model.get_submodule(name).register_forward_pre_hook(  # type: ignore
            lambda _, arguments, name=name: seen[name].append(arguments[0][0].double())
        )
        for name in layers
    ]
    with torch.no_grad():
        for pair in [*pairs, (24, 24)]:
            one = make_batch([pair])
            model.eval()(input_ids=one["input_ids"], **decoder_inputs(model, one))
    for handle in handles:
        handle.remove()
    start_at_activations(model, [batch])  # type: ignore[list-item]
    for name in layers:
        inputs = torch.cat(seen[name])
        centred = inputs - inputs.mean(0)
        found = model.base_model.model.get_submodule(name).lora_A["default"].weight.double()  # type: ignore
        best = torch.linalg.svdvals(centred)[:4].square().sum()
        assert (centred @ found.T).square().sum() / best > 0.94, name


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_type": "int8"},
        {"compute_dtype": "float16"},
        {"lora": {"method": "dora"}},
        {"lora": {"init": "eva", "dropout": 0.0}},
        {"quant_type": "none", "compute_dtype": "bfloat16"},
        {"quant_type": "none", "lora": {"method": "none", "dropout": 0.0}},
    ],
    ids=["int8", "float16", "dora", "eva", "16 bits", "trained whole"],
)
def test_every_other_kind_of_run_trains_a_t5(
    settings: dict[str, Any], saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    module = fit(tmp_path, saved("T5 v1.1, Flan-T5"), rows_file, **settings)
    assert module.last_step is not None
    product = "model" if "trained whole" in str(tmp_path) else module.product
    manifest = json.loads((tmp_path / product / "manifest.json").read_text())
    assert (manifest["step"], manifest["auto_class"]) == (3, "AutoModelForSeq2SeqLM")


def test_rows_are_padded_where_packing_was_left_to_the_model(
    saved: Saver, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data(rows_file, packing="auto")
    trainer = make_trainer(tmp_path, max_steps=1)
    module = QLoRAModule(str(saved("T5")), lora=LoRAConfig(r=4), gradient_checkpointing=False)
    trainer.fit(module, data)
    assert not data.is_packed
    assert "reads prompts in an encoder of its own" in caplog.text


def test_a_t5_that_was_trained_whole_is_read_by_plain_transformers(
    saved: Saver, rows_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSeq2SeqLM

    lora = {"method": "none", "dropout": 0.0}
    base = saved("T5 v1.1, Flan-T5")
    module = fit(tmp_path, base, rows_file, lora=lora, quant_type="none")
    assert module.model is not None
    read = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", dtype="auto")
    ids = torch.arange(5, 21).unsqueeze(0)
    with torch.no_grad():
        expected = module.model.eval()(**whole_inputs(module.model, ids)).logits
        assert torch.equal(read.eval()(**whole_inputs(read, ids)).logits, expected)


# --- refusals -------------------------------------------------------------------------------------


def save(folder: Path, model_type: str, **settings: Any) -> Path:
    """A random tiny model of another encoder-decoder family."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    AutoModelForSeq2SeqLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    save_t5_tokenizer(folder)
    return folder


BART_LIKE = {
    "vocab_size": 512,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize(
    ("model_type", "settings", "sentence"),
    [
        ("m2m_100", BART_LIKE, "has no rule that makes decoder inputs of labels"),
        ("t5", T5 | {"decoder_start_token_id": None}, "no decoder_start_token_id"),
        ("longt5", T5 | {"num_layers": 1}, "list 'wo' there"),
        (
            "prophetnet",
            {"vocab_size": 512, "hidden_size": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
            | {"num_encoder_layers": 1, "num_decoder_layers": 1, "max_position_embeddings": 128}
            | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
            | {"decoder_start_token_id": 0},
            "does not make its logits of one vector a token",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    model_type: str, settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "base", model_type, **settings)
    with pytest.raises(ConfigurationError, match=sentence) as caught:
        load(folder)
    assert len(caught.value.problems) == 1


def test_a_head_of_its_own_is_not_tied_by_a_new_token(saved: Saver) -> None:
    """Transformers' resize_token_embeddings would, and the base would be another."""
    with pytest.raises(ConfigurationError, match="adding rows would tie"):
        grow_vocabulary(load(saved("T5 v1.1, Flan-T5")).model, 520)
    assert grow_vocabulary(load(saved("T5")).model, 514) == {"shared": [512, 513]}


def test_the_kind_of_a_model_is_told_from_its_configuration_alone(
    saved: Saver, tiny_base: Path
) -> None:
    from transformers import AutoConfig

    t5, llama = (AutoConfig.from_pretrained(path) for path in (saved("T5"), tiny_base))
    assert (is_encoder_decoder(t5), is_encoder_decoder(llama)) == (True, False)
    assert auto_class_name(t5) == "AutoModelForSeq2SeqLM"
    assert auto_class_name(llama) == "AutoModelForCausalLM"
