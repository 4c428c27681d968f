"""A base laid over devices answers as one on a single device; caps are kept or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import IDS
from families import FAMILIES, Family

from qlora_pl import generate
from qlora_pl.errors import HardwareError, QLoRAError
from qlora_pl.inference.loading import Model, load
from qlora_pl.inference.machine import Place, parse_memory, place_of
from qlora_pl.inference.source import ModelChoice, resolve_source
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.prequantized import make_plan
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import QuantizationPlan, build_skeleton
from qlora_pl.modeling.loading.base_loading import load_base
from qlora_pl.modeling.loading.spread_loading import lay_out, load_spread, parts, weight_bytes

HOST = torch.device("cpu")
OTHER = torch.device("cpu", 0)  # the same memory by another name, which counts as a second device
MIB = 2**20

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]


def planned(folder: Path, **quantization: Any) -> tuple[Any, QuantizationConfig, Any]:
    identity = identify_base(str(folder), None, None)
    config = QuantizationConfig(**quantization)
    skeleton = build_skeleton(identity.folder)
    return identity, config, make_plan(identity.folder, skeleton, config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_are_those_of_one_device(family: Family, tmp_path: Path) -> None:
    identity, config, plan = planned(family.save(tmp_path / "base"), compute_dtype="float32")
    whole = load_base(identity, config, plan, device=HOST).model
    most = int(weight_bytes(build_skeleton(identity.folder).float(), config, plan) * 0.9)
    base = load_spread(identity, config, plan, memory={OTHER: most, HOST: 2**40})
    model: Any = base.model
    assert base.is_from_cache
    carried = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    assert len(carried) > 1, carried
    batch = {"input_ids": IDS % 64}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = IDS % 64
    with torch.no_grad():
        expected, found = (one(**batch, use_cache=False).logits for one in (whole, model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("quantization", [{}, {"quant_type": "int8"}, {"quant_type": "none"}])
def test_a_base_that_was_never_packed_is_packed_first(
    quantization: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    identity, config, plan = planned(tiny_base, compute_dtype="float32", **quantization)
    memory = {OTHER: MIB // 8, HOST: 2**40}
    where = str(tmp_path / "cache")
    made = load_spread(identity, config, plan, memory=memory, cache_dir=where)
    read = load_spread(identity, config, plan, memory=memory, cache_dir=where)
    assert (made.is_from_cache, read.is_from_cache) == (False, True)
    whole = load_base(identity, config, plan, device=HOST, cache_dir=where)
    with torch.no_grad():
        logits = [one.model(input_ids=IDS).logits for one in (made, read, whole)]
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[2])


def test_layers_stay_whole_and_caps_are_kept(tiny_base: Path) -> None:
    identity, config, plan = planned(tiny_base)
    skeleton: Any = build_skeleton(identity.folder)
    total = weight_bytes(skeleton, config, plan)
    gpus = [torch.device("cuda", index) for index in range(3)]
    cap = int(total * 0.4)
    places = lay_out(skeleton, config, plan, dict.fromkeys(gpus, cap) | {HOST: 2**40})
    assert set(places) == dict(parts(skeleton)).keys()
    assert sorted(places.values(), key=[*gpus, HOST].index) == list(places.values())
    taken = dict.fromkeys([*gpus, HOST], 0.0)
    for name, device in places.items():
        within = QuantizationPlan(
            {n.removeprefix(f"{name}."): shape for n, shape in plan.quantized.items()}, {}, None
        )
        taken[device] += weight_bytes(skeleton.get_submodule(name), config, within)
    assert all(0 < taken[gpu] <= cap for gpu in gpus[:2]), taken
    assert sum(taken.values()) == pytest.approx(total)
    layers = [name for name in places if ".layers." in name]
    assert layers == [f"model.layers.{index}" for index in range(len(layers))]


def test_a_base_that_fits_on_the_first_device_lies_there(tiny_base: Path) -> None:
    identity, config, plan = planned(tiny_base)
    gpus = {torch.device("cuda", index): 2**30 for index in range(2)}
    places = lay_out(build_skeleton(identity.folder), config, plan, gpus)
    assert set(places.values()) == {torch.device("cuda", 0)}


def test_what_no_device_holds_is_told_in_gibibytes(tiny_base: Path) -> None:
    identity, config, plan = planned(tiny_base)
    with pytest.raises(
        HardwareError, match=r"--max-memory: the weights take 0\.000\d+ GiB.* cpu:0 with"
    ):
        lay_out(build_skeleton(identity.folder), config, plan, {OTHER: 1000, HOST: 1000})


def test_an_adapter_answers_from_several_devices_as_from_one(adapter: Path, model: Model) -> None:
    source = resolve_source(ModelChoice(adapter=(str(adapter),)))
    spread = load(source, Place(OTHER, {OTHER: MIB // 8, HOST: 2**40}))
    asked = ["What is the capital of France?", "How many legs has a spider?"]
    for name in (None, "base"):
        answers = [
            [answer.answer for answer in generate(one, asked, adapter=name, max_new_tokens=8)]
            for one in (model, spread)
        ]
        assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("20GiB",), {"every": 20 * 2**30}),
        (("0=1GiB", "cpu=512MiB"), {"0": 2**30, "cpu": 2**29}),
        (("1=1.5GB",), {"1": 1_500_000_000}),
    ],
)
def test_sizes_are_read(words: tuple[str, ...], expected: dict[str, int]) -> None:
    assert parse_memory(words) == expected


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"devices": "auto", "max_memory": ("lots",)}, "'lots' is not understood"),
        ({"devices": "auto", "max_memory": ("gpu=1GiB",)}, "'gpu=1GiB' is not understood"),
        ({"devices": "auto", "max_memory": ("9=1GiB",)}, "has no GPU 9"),
        ({"max_memory": ("1GiB",)}, "is for --devices auto"),
        ({"devices": "two"}, "--devices"),
    ],
)
def test_a_device_that_is_none_is_told(choice: dict[str, Any], sentence: str) -> None:
    with pytest.raises(QLoRAError, match=sentence):
        place_of(ModelChoice(model="any", **choice))
