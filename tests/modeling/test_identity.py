"""A base is its tensors and its computation, whatever its files are called."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.files import cache_root
from qlora_pl.modeling.base.identity import (
    BaseIdentity,
    file_digest,
    identify_base,
    is_hub_name,
    locate_base,
    safetensors_header,
    weight_files,
)
from qlora_pl.modeling.base.prequantized import make_plan
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.loading.base_loading import load_base


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def identify(folder: Path) -> BaseIdentity:
    return identify_base(str(folder), None, None)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save_shards(folder: Path, num_shards: int) -> None:
    """Cut model.safetensors into shards by hand, with the index that names them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- same and different bases ---------------------------------------------------------------------


def test_another_folder_name_is_the_same_base(tiny_base, base):
    assert identify(base).fingerprint == identify(tiny_base).fingerprint


@pytest.mark.parametrize("num_shards", [2, 3])
def test_another_sharding_is_the_same_base(tiny_base, base, num_shards):
    save_shards(base, num_shards)
    assert len(weight_files(base)) == num_shards
    assert identify(base).fingerprint == identify(tiny_base).fingerprint


def test_one_changed_bit_of_one_weight_is_another_base(tiny_base, base):
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert identify(base).weights != identify(tiny_base).weights
    assert identify(base).config == identify(tiny_base).config


def test_a_weight_under_another_name_is_another_base(tiny_base, base):
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm2.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    assert identify(base).weights != identify(tiny_base).weights


def test_the_same_bytes_in_another_shape_are_another_base(tiny_base, base):
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].reshape(32, 128)
    save_file(tensors, path, metadata={"format": "pt"})
    assert identify(base).weights != identify(tiny_base).weights


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {"rope_theta": 500000.0},  # where it stood before transformers 5
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_computation_is_another_base(tiny_base, base, changes):
    change_config(base, **changes)
    assert identify(base).config != identify(tiny_base).config
    assert identify(base).weights == identify(tiny_base).weights
    assert identify(base).fingerprint != identify(tiny_base).fingerprint


@pytest.mark.parametrize(
    "key", ["_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"]
)
def test_who_wrote_the_configuration_and_when_is_ignored(tiny_base, base, key):
    change_config(base, **{key: "something else"})
    assert identify(base).fingerprint == identify(tiny_base).fingerprint


def test_the_order_of_keys_and_the_layout_of_config_json_are_ignored(tiny_base, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert identify(base).fingerprint == identify(tiny_base).fingerprint


def test_a_file_that_transformers_does_not_read_is_no_part_of_the_base(tiny_base, base):
    """Mistral's folders hold every weight a second time in consolidated.safetensors."""
    other = save_base(base.parent / "other", seed=1)
    shutil.copy(other / "model.safetensors", base / "consolidated.safetensors")
    assert identify(base).fingerprint == identify(tiny_base).fingerprint


def test_the_whole_file_is_read_where_an_index_lies_beside_it(base):
    """As transformers chooses (modeling_utils._get_resolved_checkpoint_files)."""
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert weight_files(base) == [base / "model.safetensors"]


# --- pickled weights ------------------------------------------------------------------------------


@pytest.fixture
def pickled(base: Path) -> Path:
    """The tiny base as older models lie on the Hub: tensors in a pickle."""
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    return base


def save_pickled_shards(folder: Path) -> list[Path]:
    """Cut pytorch_model.bin into two, with the index that names them."""
    whole = folder / "pytorch_model.bin"
    tensors = list(torch.load(whole, weights_only=True).items())
    whole.unlink()
    names = [f"pytorch_model-{number:05}-of-00002.bin" for number in (1, 2)]
    parts = [dict(tensors[::2]), dict(tensors[1::2])]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return [folder / name for name in names]


def load(folder: Path) -> nn.Module:
    config = QuantizationConfig(cache=False, compute_dtype="float32")
    plan = make_plan(folder, build_skeleton(folder), config)
    return load_base(identify(folder), config, plan, device=torch.device("cpu")).model


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.parametrize("is_sharded", [False, True])
def test_pickled_weights_load_to_the_same_packed_bytes(tiny_base, pickled, is_sharded):
    """Source: the same tensors from a safetensors file."""
    files = save_pickled_shards(pickled) if is_sharded else [pickled / "pytorch_model.bin"]
    assert weight_files(pickled) == files
    assert_same_weights(load(pickled), load(tiny_base))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_one_changed_byte_of_a_pickle_is_another_base(pickled, is_sharded):
    if is_sharded:
        save_pickled_shards(pickled)
    before = identify(pickled)
    assert identify(pickled) == before
    path = weight_files(pickled)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert identify(pickled).weights != before.weights
    assert identify(pickled).config == before.config


def test_safetensors_are_taken_where_pickles_lie_beside_them(tiny_base, base):
    """As transformers chooses (modeling_utils._get_resolved_checkpoint_files)."""
    (base / "pytorch_model.bin").write_bytes(b"whatever")
    assert weight_files(base) == [base / "model.safetensors"]
    save_shards(base, 2)
    assert len(weight_files(base)) == 2
    assert identify(base).fingerprint == identify(tiny_base).fingerprint


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("protocol", ["zip", "old"])
def test_a_pickle_that_runs_code_does_not_run_it_and_is_one_sentence(pickled, tmp_path, protocol):
    target = tmp_path / "ran"
    tensors = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.bias"] = Malicious(target)
    torch.save(
        tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=protocol == "zip"
    )
    with pytest.raises(ConfigurationError) as caught:
        load(pickled)
    assert_one_sentence(caught.value, str(pickled), "hold more than tensors, which is not run")
    assert not target.exists()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)  # it would have
    assert target.exists()


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_half_downloaded_pickle_is_one_sentence(pickled, is_sharded, share):
    if is_sharded:
        save_pickled_shards(pickled)
    path = weight_files(pickled)[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigurationError) as caught:
        load(pickled)
    assert_one_sentence(caught.value, str(pickled))


def test_a_missing_pickled_shard_is_named(pickled):
    _, second = save_pickled_shards(pickled)
    second.unlink()
    with pytest.raises(ConfigurationError) as caught:
        load(pickled)
    assert_one_sentence(caught.value, f"lacks {second.name}, which its index names")


def test_a_pickle_of_something_else_is_one_sentence(pickled):
    for content in ([1, 2], {"a": 1}, {"model.norm.weight": torch.ones(64)}):
        torch.save(content, pickled / "pytorch_model.bin")
        with pytest.raises(ConfigurationError) as caught:
            load(pickled)
        assert_one_sentence(caught.value, str(pickled))


# --- memory ---------------------------------------------------------------------------------------


def test_fingerprints_are_remembered_until_the_file_is_written_to(base, tmp_path, monkeypatch):
    read: list[Path] = []

    def count(path: Path) -> tuple[dict[str, Any], int]:
        read.append(path)
        return safetensors_header(path)

    monkeypatch.setattr("qlora_pl.modeling.base.identity.safetensors_header", count)
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "memory"))
    first, second = identify(base), identify(base)
    assert first == second
    assert len(read) == 1
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert identify(base) == first
    assert len(read) == 2


def test_a_damaged_memory_is_computed_again(base, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "memory"))
    first = identify(base)
    for memory in (tmp_path / "memory" / "fingerprints").iterdir():
        memory.write_text("")
    assert identify(base) == first


def test_a_memory_with_a_flipped_bit_is_computed_again(base: Path, tmp_path: Path) -> None:
    """Else a resumed run is refused, because its base would be another one."""
    before = identify_base(str(base), None, str(tmp_path / "memory")).fingerprint
    (memory,) = (tmp_path / "memory" / "fingerprints").iterdir()
    remembered = memory.read_text()
    for name in ("model.norm.weight", "0", "a"):
        place = remembered.index(name)
        flipped = chr(ord(remembered[place]) ^ 1)
        memory.write_text(remembered[:place] + flipped + remembered[place + 1 :])
        assert identify_base(str(base), None, str(tmp_path / "memory")).fingerprint == before


def test_a_memory_that_cannot_be_written_stops_nobody(base, tmp_path, monkeypatch, caplog):
    expected = identify(base)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "file"))
    assert identify(base) == expected
    assert "computed again" in caplog.text
    digest = file_digest(base / "config.json", tmp_path / "file" / "fingerprints")
    assert digest == file_digest(base / "config.json", tmp_path / "fingerprints")


def test_the_cache_lies_where_it_is_said_to(monkeypatch):
    monkeypatch.setenv("QLORA_PL_CACHE", "/somewhere")
    assert cache_root("/here") == Path("/here")
    assert cache_root(None) == Path("/somewhere")
    monkeypatch.delenv("QLORA_PL_CACHE")
    assert cache_root(None) == Path.home() / ".cache" / "qlora_pl"


# --- folders that are no base ---------------------------------------------------------------------


def assert_one_sentence(error: ConfigurationError, *words: str) -> None:
    (sentence,) = error.problems
    assert "\n" not in sentence
    assert sentence.startswith("model.model_name_or_path: ")
    for word in words:
        assert word in sentence


def damaged(number: int) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    good = struct.pack("<Q", len(header)) + header + b"\x00" * 4
    listed = struct.pack("<Q", 5) + b"[1,2]"
    empty = struct.pack("<Q", 8) + b'{"a":{}}'
    return [b"", good[:-1], good + b"\x00", good[:20], good[:6], b"\xff" * 40, listed, empty][
        number
    ]


@pytest.mark.parametrize("number", range(8))
def test_a_damaged_safetensors_file_is_named(base, number):
    (base / "model.safetensors").write_bytes(damaged(number))
    with pytest.raises(ConfigurationError) as caught:
        identify(base)
    assert_one_sentence(caught.value, "copy/model.safetensors", "damaged or incomplete")


def test_a_folder_without_config_json_is_one_sentence(base):
    (base / "config.json").unlink()
    with pytest.raises(ConfigurationError) as caught:
        identify(base)
    assert_one_sentence(caught.value, str(base), "no config.json")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_json_without_settings_is_one_sentence(base, text):
    (base / "config.json").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        identify(base)
    assert_one_sentence(caught.value, "copy/config.json")


def test_a_folder_without_weights_is_one_sentence(base):
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError) as caught:
        identify(base)
    assert_one_sentence(caught.value, str(base), "no model.safetensors")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 1}'])
def test_a_damaged_index_is_named(base, text):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        identify(base)
    assert_one_sentence(caught.value, "model.safetensors.index.json")


def test_a_missing_shard_is_named(base):
    save_shards(base, 3)
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigurationError) as caught:
        identify(base)
    assert_one_sentence(caught.value, "lacks model-00002-of-00003.safetensors")


def test_a_name_that_is_nothing_is_one_sentence(tmp_path):
    for name, words in [(tmp_path / "no" / "folder", "no folder"), (Path(__file__), "is a file")]:
        with pytest.raises(ConfigurationError) as caught:
            locate_base(str(name), None, None)
        assert_one_sentence(caught.value, words)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("huggyllama/llama-7b", True),
        ("gpt2", True),
        ("./llama-7b", False),
        ("/models/llama-7b", False),
        ("~/llama-7b", False),
        ("models/llama/7b", False),
    ],
)
def test_paths_are_not_looked_up_on_the_hub(name, expected):
    assert is_hub_name(name) is expected


def test_code_that_comes_with_a_model_is_part_of_what_it_is(
    tiny_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("ANSWER = 42\n")
    before = identify_base(str(folder), None, None)
    (folder / "modeling_own.py").write_text("ANSWER = 43\n")
    assert identify_base(str(folder), None, None).fingerprint != before.fingerprint
