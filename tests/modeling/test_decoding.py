"""Answers: the same alone and in a batch, by the settings that were named and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlora_pl.data.batches.collation import collate_prompts
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters import LoRAConfig, attach_adapters
from qlora_pl.modeling.decoding import DecodingConfig, evaluation_mode, generate_answers
from qlora_pl.modeling.identity import identify_base
from qlora_pl.modeling.loading import load_base, prepare_for_training
from qlora_pl.modeling.parameters import trainable_tensors
from qlora_pl.modeling.plan import build_skeleton, plan_quantization
from qlora_pl.modeling.quantization import QuantizationConfig

PROMPTS = ["How many legs has a spider?", "What?", "The capital of France is", "a"]
EOS = 2


class Ids:
    """A tokenizer that shows its ids, so that answers can be compared token by token.

    It pads with its end-of-text token, as many do: only the mask tells padding from text.
    """

    pad_token_id = EOS

    @staticmethod
    def decode(ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> nn.Module:
    """Float32, with adapters that are not zero and with dropout, ready to train."""
    config = QuantizationConfig(compute_dtype="float32")
    plan = plan_quantization(build_skeleton(tiny_base), config)
    identity = identify_base(str(tiny_base), None, None)
    base = load_base(identity, config, plan, device=torch.device("cpu")).model
    model = attach_adapters(base, LoRAConfig(r=4, dropout=0.3), seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_tensors(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    prepare_for_training(model, gradient_checkpointing=True)
    return model


def answer(
    model: nn.Module, prompts: list[list[int]], stop_ids: Any = (EOS,), **settings: Any
) -> list[str]:
    batch = collate_prompts(
        [("", ids) for ids in prompts], [""] * len(prompts), np.arange(len(prompts)), EOS
    )
    config = DecodingConfig(**{"max_new_tokens": 12} | settings)
    return generate_answers(
        model, Ids, batch["input_ids"], batch["attention_mask"], stop_ids, config
    )


def greedy_by_hand(model: nn.Module, ids: list[int], num_tokens: int) -> list[int]:
    """The likeliest token each time, without a cache, padding or ``generate``."""
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model(input_ids=torch.tensor([[*ids, *answer]])).logits
            answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def test_greedy_answers_are_the_likeliest_tokens_alone_and_in_a_padded_batch(model, prompts):
    """Source: argmax over the logits of the whole row, computed anew for each token."""
    assert len({len(ids) for ids in prompts}) > 2
    with evaluation_mode(model):
        expected = [Ids.decode(greedy_by_hand(model, ids, 12)) for ids in prompts]
    assert len(set(expected)) == len(expected)
    assert not any(str(EOS) in text.split() for text in expected)
    assert answer(model, prompts) == expected
    assert [answer(model, [ids])[0] for ids in prompts] == expected


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(model, prompts):
    whole = answer(model, prompts, stop_ids=())[0].split()
    stop = next(token for token in whole if token != whole[0])
    (stopped,) = answer(model, prompts[:1], stop_ids=(EOS, int(stop)))
    assert stopped.split() == whole[: whole.index(stop)]


def test_a_row_that_stops_early_does_not_change_the_others(model, prompts):
    whole = [text.split() for text in answer(model, prompts, stop_ids=())]
    stop = int(whole[0][0])
    others = [row for row in (1, 2, 3) if str(stop) not in whole[row]]
    assert others
    stopped = answer(model, prompts, stop_ids=(stop,))
    assert stopped[0] == ""
    for row in others:
        assert stopped[row].split() == whole[row]


def test_answers_are_text_without_stop_tokens(model, tokenizer, prompts):
    batch = collate_prompts([("", prompts[0])], [""], np.arange(1), 0)
    config = DecodingConfig(max_new_tokens=5)
    inputs = (batch["input_ids"], batch["attention_mask"])
    (text,) = generate_answers(model, tokenizer, *inputs, (EOS,), config)
    ids = greedy_by_hand(model.eval(), prompts[0], 5)
    assert text == tokenizer.decode(ids).strip()
    model.train()


# --- settings -------------------------------------------------------------------------------------


def test_the_bases_own_generation_settings_do_not_apply(model, prompts, monkeypatch):
    """What a given configuration leaves open transformers fills from generation_config.json."""
    expected = answer(model, prompts, stop_ids=())
    own = model.get_base_model().generation_config
    for key, value in {
        "repetition_penalty": 2.0,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "temperature": 5.0,
        "suppress_tokens": [int(expected[0].split()[0])],
        "num_beams": 3,
        "min_new_tokens": 12,
        "eos_token_id": int(expected[0].split()[1]),
    }.items():
        monkeypatch.setattr(own, key, value)
    assert answer(model, prompts, stop_ids=()) == expected
    assert model.get_base_model().generation_config is own
    assert own.num_beams == 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"top_k": 3}, {"TopKLogitsWarper": ("top_k", 3)}),
        ({"top_p": 0.9}, {"TopPLogitsWarper": ("top_p", 0.9)}),
        ({"temperature": 0.7}, {"TemperatureLogitsWarper": ("temperature", 0.7)}),
        ({"repetition_penalty": 1.2}, {"RepetitionPenaltyLogitsProcessor": ("penalty", 1.2)}),
    ],
    ids=lambda value: ",".join(map(str, value)) or "none",
)
def test_sampling_uses_the_named_settings_and_no_defaults_of_transformers(
    model, prompts, monkeypatch, settings, expected
):
    """The default of transformers is top_k 50; seen from the processors of ``generate``."""
    used: dict[str, Any] = {}
    base = type(model.get_base_model())
    build = base._get_logits_processor

    def see(*arguments: Any, **keywords: Any) -> Any:
        processors = build(*arguments, **keywords)
        used.update({type(processor).__name__: processor for processor in processors})
        return processors

    monkeypatch.setattr(base, "_get_logits_processor", see)
    answer(model, prompts[:1], do_sample=True, **settings)
    assert used.keys() == expected.keys()
    for name, (attribute, value) in expected.items():
        assert getattr(used[name], attribute) == value


def test_sampled_answers_follow_the_seed(model, prompts):
    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return answer(model, prompts, do_sample=True, temperature=2.0)

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_new_tokens": 0}, "decoding.max_new_tokens: must be at least 1, got 0."),
        ({"do_sample": True, "top_p": 0.0}, "decoding.top_p: must lie above 0, up to 1, got 0.0."),
        ({"do_sample": True, "top_k": -1}, "decoding.top_k: must be 0 or more, got -1."),
        ({"repetition_penalty": 0.0}, "decoding.repetition_penalty: must be above 0, got 0.0."),
        ({"do_sample": True, "temperature": 0.0}, "decoding.temperature: must be above 0, got 0.0"),
        ({"temperature": 0.7}, "have no effect with do_sample: false; set it to true."),
        ({"top_p": 0.9}, "have no effect with do_sample: false; set it to true."),
        ({"top_k": 5}, "have no effect with do_sample: false; set it to true."),
    ],
)
def test_a_bad_setting_is_one_sentence(settings, sentence):
    with pytest.raises(ConfigurationError) as caught:
        DecodingConfig(**settings)
    (problem,) = caught.value.problems
    assert sentence in problem


# --- what is left as it was -----------------------------------------------------------------------


def test_modes_and_random_states_are_as_before_afterwards(model, prompts):
    silenced = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    silenced.eval()
    modes = [module.training for module in model.modules()]
    assert True in modes
    assert False in modes
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    answer(model, prompts, do_sample=True)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    silenced.train()


def test_modes_are_as_before_after_an_error(model):
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(IndexError), evaluation_mode(model):
        model(input_ids=torch.tensor([[99_999]]))
    assert all(module.training for module in model.modules())


def test_training_is_not_changed_by_an_answer(model, prompts):
    """Equal in every bit: the same dropout masks over the same packed weights."""

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        ids = torch.tensor([prompts[0]])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in trainable_tensors(model).values()]

    before = gradients()
    answer(model, prompts)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
