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
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.answers.generation import answer_batch, generate_answers
from qlora_pl.modeling.answers.row_logits import RowLogits
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.evaluation_mode import evaluation_mode
from qlora_pl.modeling.loading.base_loading import load_base, prepare_for_training
from qlora_pl.modeling.parameters import trainable_tensors

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
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 0.8},
        {"min_new_tokens": 9},
        {"num_beams": 3},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0, "repetition_penalty": 1.3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_settings_do_to_a_row_in_a_batch_what_transformers_does_to_it_alone(
    model, prompts, settings
):
    """Source: ``generate`` with a row alone, so that nothing is padded; greedy, float32."""
    stop = int(answer(model, prompts, stop_ids=())[0].split()[4])
    asked = answer(model, prompts, stop_ids=(EOS, stop), **settings)
    for ids, text in zip(prompts, asked, strict=True):
        with evaluation_mode(model), torch.no_grad():
            alone = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=[EOS, stop],
                pad_token_id=EOS,
                **settings,
            )[0, len(ids) :].tolist()
        end = next((place for place, token in enumerate(alone) if token in (EOS, stop)), None)
        assert text == Ids.decode(alone[:end])


def test_padding_is_no_text_that_could_be_repeated(model, prompts):
    """Transformers alone takes it for some: the end of text, with which it pads, is penalised."""
    shortest = min(prompts, key=len)
    first = int(answer(model, [shortest], stop_ids=())[0].split()[0])
    asked = {"max_new_tokens": 1, "no_repeat_ngram_size": 1}
    batch = [[*prompts[0], 7], [token for token in shortest if token != first]]
    config = DecodingConfig(**asked)
    inputs = collate_prompts([("", ids) for ids in batch], ["", ""], np.arange(2), first)
    tokens = (inputs["input_ids"], inputs["attention_mask"])
    assert first in tokens[0][1]
    together = generate_answers(model, Ids, *tokens, (), config)
    assert together[1] == answer(model, batch[1:], stop_ids=(), **asked)[0]


# --- drawing --------------------------------------------------------------------------------------


def test_a_sampled_answer_depends_on_its_seed_and_row_and_on_nothing_beside_it(model, prompts):
    settings = {"do_sample": True, "temperature": 2.0, "stop_ids": ()}
    batch = answer(model, prompts, **settings)
    assert batch == answer(model, prompts, **settings)
    assert batch != answer(model, prompts, seed=1, **settings)
    for row, ids in enumerate(prompts):
        inputs = (torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        config = DecodingConfig(do_sample=True, temperature=2.0, max_new_tokens=12)
        (alone,) = answer_batch(model, Ids, *inputs, (), config, row_ids=[row])
        assert alone.text == batch[row]
    same = answer(model, [prompts[0]] * 4, **settings)
    assert len(set(same)) == 4


def test_what_is_drawn_has_the_probabilities_of_the_logits():
    """Source: the softmax in float64; 4 standard errors of 40,000 draws."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    config = DecodingConfig(do_sample=True, temperature=0.7)
    draw = RowLogits(config, [0], [5], torch.device("cpu"))
    ids = torch.zeros(1, 3, dtype=torch.long)
    number = 40_000
    drawn = torch.tensor([int(draw(ids, logits).argmax()) for _ in range(number)])
    shares = torch.bincount(drawn, minlength=5).double() / number
    expected = (logits[0].double() / 0.7).softmax(0)
    error = (expected * (1 - expected) / number).sqrt()
    assert ((shares - expected).abs() < 4 * error).all()


@pytest.mark.parametrize(
    "settings", [{"top_k": 3}, {"top_p": 0.6}, {"typical_p": 0.5}, {"top_k": 4, "top_p": 0.9}]
)
def test_only_tokens_that_the_settings_leave_are_drawn(settings):
    """Source: transformers' own warpers, one after the other in its order."""
    from transformers.generation import logits_process as library

    draws = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 40, generator=draws)
    kept = logits / 1.5
    for key, name in (("top_k", "TopK"), ("top_p", "TopP"), ("typical_p", "Typical")):
        if key in settings:
            kept = getattr(library, f"{name}LogitsWarper")(settings[key])(None, kept)
    config = DecodingConfig(do_sample=True, temperature=1.5, **settings)
    draw = RowLogits(config, [0], [0], torch.device("cpu"))
    drawn = {int(draw(torch.zeros(1, 1), logits.clone()).argmax()) for _ in range(3000)}
    allowed = set(kept.isfinite().nonzero()[:, 1].tolist())
    assert drawn <= allowed
    assert len(drawn) > len(allowed) / 2
    assert len(allowed) < 30


def test_a_sampled_beam_search_is_the_same_alone_and_in_a_batch(model, prompts):
    settings = {"do_sample": True, "temperature": 2.0, "num_beams": 2, "stop_ids": ()}
    batch = answer(model, prompts, **settings)
    assert batch == answer(model, prompts, **settings)
    assert batch[0] == answer(model, prompts[:1], **settings)[0]
    assert batch != answer(model, prompts, seed=3, **settings)


# --- ends -----------------------------------------------------------------------------------------


def ends(model: nn.Module, prompts: list[list[int]], stop_ids: Any = (), **settings: Any) -> Any:
    batch = collate_prompts(
        [("", ids) for ids in prompts], [""] * len(prompts), np.arange(len(prompts)), EOS
    )
    config = DecodingConfig(**{"max_new_tokens": 12} | settings)
    tokens = (batch["input_ids"], batch["attention_mask"])
    return answer_batch(model, Ids, *tokens, stop_ids, config)


def test_a_text_ends_an_answer_and_is_no_part_of_it(model, prompts):
    whole = [found.text for found in ends(model, prompts)]
    stop = " " + " ".join(whole[0].split()[3:5])
    found = ends(model, prompts, stop=(stop,))
    assert found[0].text == " ".join(whole[0].split()[:3])
    assert found[0].stop_reason == "stop_text"
    assert len(found[0].ids) == 5
    for row, text in enumerate(whole):
        if stop not in text:
            assert (found[row].text, found[row].stop_reason) == (text, "length")


def test_a_prompt_and_its_answer_stay_within_a_length_of_both(model, prompts):
    longest = max(len(ids) for ids in prompts)
    found = ends(model, prompts, max_length=longest + 2)
    whole = ends(model, prompts)
    for ids, one, other in zip(prompts, found, whole, strict=True):
        assert len(one.ids) == min(12, longest + 2 - len(ids))
        assert one.ids == other.ids[: len(one.ids)]
        assert one.stop_reason == "length"


def test_every_answer_says_why_it_ended(model, prompts):
    whole = ends(model, prompts)
    token = whole[0].ids[2]
    assert ends(model, prompts[:1], (token,))[0].stop_reason == "stop_token"
    batch = (torch.tensor([prompts[0]]), torch.ones(1, len(prompts[0]), dtype=torch.long))
    config = DecodingConfig(max_new_tokens=12)
    (cut,) = answer_batch(model, Ids, *batch, (), config, should_stop=lambda: True)
    assert cut.stop_reason == "interrupted"


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
        ({"typical_p": 0.5}, "have no effect with do_sample: false; set it to true."),
        ({"do_sample": True, "typical_p": 0.0}, "decoding.typical_p: must lie above 0, up to 1"),
        ({"min_new_tokens": 300}, "min_new_tokens: 300 is above max_new_tokens (256); lower it."),
        ({"num_beams": 0}, "decoding.num_beams: must be at least 1, got 0."),
        ({"length_penalty": 2.0}, "have no effect without num_beams above 1; set it"),
        ({"early_stopping": True}, "have no effect without num_beams above 1; set it"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: must be 0 or more, got -1."),
        ({"max_length": 0}, "decoding.max_length: must be at least 1, got 0."),
        ({"stop": ("",)}, "decoding.stop: an empty text would end every answer; leave it out."),
    ],
)
def test_a_bad_setting_is_one_sentence(settings, sentence):
    with pytest.raises(ConfigurationError) as caught:
        DecodingConfig(**settings)
    (problem,) = caught.value.problems
    assert sentence in problem


# --- what is left as it was -----------------------------------------------------------------------


def test_a_whole_number_is_a_number(model, prompts):
    """Transformers refuses a temperature of 2 and a penalty of 2, where 2.0 is meant."""
    whole = {"do_sample": True, "temperature": 2, "top_p": 1, "repetition_penalty": 2}
    numbers = {name: float(value) if value is not True else value for name, value in whole.items()}
    assert answer(model, prompts, **whole) == answer(model, prompts, **numbers)
    assert answer(model, prompts, **whole, num_beams=2) == answer(
        model, prompts, **numbers, num_beams=2
    )


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
