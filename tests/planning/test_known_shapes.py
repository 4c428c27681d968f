"""planning: the sizes of known models without weights, held against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_pl.errors import ConfigurationError
from qlora_pl.planning.shapes.known_shapes import known_names, known_shape, short_name
from qlora_pl.planning.shapes.model_shape import ModelShape, shape_from_config, shape_of_skeleton

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
ONE_OF_EACH = [
    "smollm2-135m",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "gemma-2b",
    "gemma2-2b",
    "phi-3-mini",
    "pythia-70m",
    "falcon-7b",
    "falcon-40b",
    "falcon-rw-1b",
    "bloom-560m",
    "opt-125m",
    "gpt2",
    "t5-small",
    "t5-v1_1-small",
]


def skeleton_of(fields: dict[str, Any]) -> Any:
    """Transformers' own model of these fields, without weights."""
    import torch
    from transformers import AutoConfig

    from qlora_pl.modeling.base.encoder_decoder import auto_class

    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def assert_equal_to_transformers(name: str) -> None:
    fields = known_shape(name)
    ours = shape_from_config(fields)
    skeleton = skeleton_of(fields)
    theirs = Counter(
        (key, tuple(parameter.shape)) for key, parameter in skeleton.named_parameters()
    )
    if fields.get("tie_word_embeddings") is False and ours.is_t5:
        # transformers ties T5 v1.1's head until a checkpoint brings another one
        theirs[("lm_head.weight", (ours.vocabulary_size, ours.hidden_size))] += 1
    assert Counter(parameter_names(ours)) == theirs
    read = shape_of_skeleton(skeleton)
    assert set(read.parameters) == set(ours.parameters)
    for key in vars(read):
        if key not in ("parameters", "fields"):
            assert getattr(read, key) == getattr(ours, key), key


def parameter_names(shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (f"{module}.{parameter.name.rpartition('.')[2]}", parameter.shape)
        for parameter in shape.parameters
        for module in parameter.module_names()
    ]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_parameter_has_transformers_name_and_size(name: str) -> None:
    assert_equal_to_transformers(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in known_names() if name not in ONE_OF_EACH])
def test_so_has_every_parameter_of_every_other_known_model(name: str) -> None:
    assert_equal_to_transformers(name)


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # as their papers and model cards state them
        ("llama-7b", 6.7),
        ("llama-13b", 13.0),
        ("llama-33b", 32.5),
        ("llama-65b", 65.2),
        ("llama3-8b", 8.03),
        ("qwen2.5-7b", 7.62),
        ("falcon-rw-1b", 1.3),
        ("gpt-neox-20b", 20.6),
    ],
)
def test_sizes_are_those_that_the_authors_state(name: str, billions: float) -> None:
    assert shape_from_config(known_shape(name)).num_weights / 1e9 == pytest.approx(
        billions,
        rel=0.01,  # stated to two or three digits
    )


@pytest.mark.parametrize(
    ("hub_name", "short"),
    [
        ("huggyllama/llama-30b", "llama-33b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2-7b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3-8b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama-1b"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"),
        ("EleutherAI/pythia-12b-deduped", "pythia-12b"),
        ("google/flan-t5-xl", "t5-v1_1-xl"),
    ],
)
def test_a_name_on_the_hub_means_the_same(hub_name: str, short: str) -> None:
    assert short_name(hub_name) == short
    assert known_shape(hub_name) == known_shape(short)


def test_mistral_with_another_vocabulary_is_not_taken_for_the_first() -> None:
    assert short_name("mistralai/Mistral-7B-v0.3") is None  # 32,768 tokens, not 32,000


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_base_of_every_experiment_is_known(path: Path) -> None:
    name = yaml.safe_load(path.read_text())["model"]["model_name_or_path"]
    assert short_name(name) is not None


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"no model 'lama-7b'.*llama-7b"):
        known_shape("lama-7b")


def test_shapes_and_a_plan_need_no_library() -> None:
    """``plan --shape`` has to answer within a second, which importing torch alone exceeds."""
    program = (
        "import sys\n"
        "from qlora_pl.planning.shapes.known_shapes import known_shape\n"
        "from qlora_pl.planning.memory.memory_plan import TrainingSetting, plan_memory\n"
        "from qlora_pl.planning.shapes.model_shape import shape_from_config\n"
        "import qlora_pl.planning.runs.settings\n"
        "plan_memory(shape_from_config(known_shape('llama-65b')), TrainingSetting())\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"vocab_size": None}, "has no 'vocab_size'"),
        ({"intermediate_size": 0}, "'intermediate_size' must be a whole number above 0, got 0"),
        ({"num_hidden_layers": "32"}, "'num_hidden_layers' must be a whole number"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5"),
        ({"model_type": None}, "has no 'model_type'"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not among"),
    ],
    ids=str,
)
def test_a_config_that_lacks_a_field_is_refused_by_its_name(
    change: dict[str, Any], message: str
) -> None:
    changed = known_shape("llama-7b") | change
    fields = {key: value for key, value in changed.items() if value is not None}
    with pytest.raises(ConfigurationError, match=message):
        shape_from_config(fields)


def test_a_family_names_its_own_fields_in_the_refusal() -> None:
    fields = known_shape("gpt2")
    del fields["n_embd"]
    with pytest.raises(ConfigurationError, match="has no 'n_embd'"):
        shape_from_config(fields)


def test_a_config_as_the_hub_has_it_is_read(tmp_path: Path) -> None:
    """bigscience/bloom-7b1's own file says n_embed and num_attention_heads."""
    published = {
        "model_type": "bloom",
        "n_embed": 4096,
        "num_attention_heads": 32,
        "n_layer": 30,
        "vocab_size": 250880,
        "n_inner": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    shape = shape_from_config(json.loads((tmp_path / "config.json").read_text()))
    assert shape.parameters == shape_from_config(known_shape("bloom-7b1")).parameters


def test_a_family_that_is_not_known_is_read_from_its_skeleton() -> None:
    fields = {
        "model_type": "stablelm",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    skeleton = skeleton_of(fields)
    shape = shape_of_skeleton(skeleton)
    assert not shape.is_known
    assert shape.num_weights == sum(p.numel() for p in skeleton.parameters())
    assert (shape.num_layers, shape.num_kv_heads, shape.mlp_size) == (2, 2, 128)
