"""The packed copy of a base that is never whole in memory is the copy of one that is.

The base that ``load_base`` quantises whole, held against bitsandbytes elsewhere, is the source of
the expected bytes.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base
from families import Saver
from test_loading import files_no_larger_than
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.files import TEMPORARY_PREFIX
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.prequantized import make_plan
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.loading import packed_cache
from qlora_pl.modeling.loading.base_loading import load_base
from qlora_pl.modeling.loading.copy_making import make_copy
from qlora_pl.modeling.loading.packed_cache import PackedWriter, read_packed, verify_packed
from qlora_pl.modeling.loading.packed_model import named_tensors

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent


def arguments(folder: Path, **settings: Any) -> tuple[Any, ...]:
    """What a base is loaded or copied with: its identity, the quantisation and the plan."""
    config = QuantizationConfig(**{"cache": False} | settings)
    plan = make_plan(folder, build_skeleton(folder), config)
    return identify_base(str(folder), None, None), config, plan


def read_all(copy: Path) -> dict[str, Tensor]:
    tensors = read_packed(copy)
    return {name: tensors.read(name, CPU) for name in tensors._files}


def assert_same_bytes(copy: Path, folder: Path, **settings: Any) -> None:
    expected = dict(named_tensors(load_base(*arguments(folder, **settings), device=CPU).model))
    found = read_all(copy)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quant_type": "fp4", "double_quant": False},
        {"skip_modules": ["o_proj"], "compute_dtype": "bfloat16"},
        {"quant_type": "none"},
    ],
    ids=["nf4", "fp4", "skipped", "unquantised"],
)
def test_the_copy_holds_what_a_base_quantised_whole_does(
    tiny_base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    make_copy(*arguments(tiny_base, **settings), tmp_path / "copies" / "copy", CPU)
    assert verify_packed(tmp_path / "copies" / "copy")
    assert_same_bytes(tmp_path / "copies" / "copy", tiny_base, **settings)
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["copy"]


@pytest.mark.parametrize("family", ["GPT-2", "T5 v1.1, Flan-T5", "Falcon RW"])
def test_other_families_matrices_are_put_away_too(
    family: str, saved: Saver, tmp_path: Path
) -> None:
    make_copy(*arguments(saved(family)), tmp_path / "copy", CPU)
    assert_same_bytes(tmp_path / "copy", saved(family))


def test_no_more_than_a_files_worth_waits_in_memory(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at each matrix; what the model still holds of it then has no bytes."""
    monkeypatch.setattr(packed_cache, "FILE_BYTES", 10_000)
    waiting: list[int] = []
    put_away = PackedWriter.put_away

    def put_away_and_count(writer: PackedWriter, name: str, weight: nn.Parameter) -> nn.Parameter:
        assert weight.device == CPU
        largest.append(weight.numel() * 2)  # of its codes; its scales are less
        left: Any = put_away(writer, name, weight)
        assert left.device.type == left.quant_state.absmax.device.type == "meta"
        waiting.append(sum(t.numel() * t.element_size() for t in writer._waiting.values()))
        return left

    largest: list[int] = []
    monkeypatch.setattr(PackedWriter, "put_away", put_away_and_count)
    make_copy(*arguments(tiny_base), tmp_path / "copy", CPU)
    assert len(waiting) == 14
    assert max(waiting) < 10_000
    sizes = [path.stat().st_size for path in (tmp_path / "copy").glob("*.safetensors")]
    assert len(sizes) >= 3
    assert_same_bytes(tmp_path / "copy", tiny_base)


def test_a_full_disk_ends_at_once_with_one_sentence_and_leaves_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own EFBIG at the first file; transformers goes on after an ordinary error."""
    monkeypatch.setattr(packed_cache, "FILE_BYTES", 10_000)
    tried: list[str] = []
    put_away = PackedWriter.put_away

    def put_away_and_note(writer: PackedWriter, name: str, weight: nn.Parameter) -> nn.Parameter:
        tried.append(name)
        return put_away(writer, name, weight)

    monkeypatch.setattr(PackedWriter, "put_away", put_away_and_note)
    prepared = arguments(tiny_base)
    with (
        files_no_larger_than(4_096),
        pytest.raises(HardwareError, match=r"could not be kept in .* make room there"),
    ):
        make_copy(*prepared, tmp_path / "copies" / "copy", CPU)
    assert len(tried) < 14
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_disk_without_room_is_found_before_anything_is_quantised(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = packed_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    monkeypatch.setattr(PackedWriter, "put_away", None)
    with pytest.raises(HardwareError, match=r"GB are to be written, and 0.0 are free"):
        make_copy(*arguments(tiny_base), tmp_path / "copies" / "copy", CPU)
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_base_that_lacks_a_weight_leaves_no_copy(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_base(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.up_proj"):
        make_copy(*arguments(folder), tmp_path / "copies" / "copy", CPU)
    assert list((tmp_path / "copies").iterdir()) == []


KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from qlora_pl.modeling.loading import packed_cache
sys.path.insert(0, sys.argv[3])
from test_copy_making import arguments, make_copy

packed_cache.FILE_BYTES = 10_000
write = packed_cache.PackedWriter._write_waiting

def write_and_die(writer):
    write(writer)
    if len(writer._digests) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

packed_cache.PackedWriter._write_waiting = write_and_die
make_copy(*arguments(Path(sys.argv[1])), Path(sys.argv[2]), torch.device("cpu"))
"""


@pytest.mark.slow
def test_a_copy_that_was_killed_half_way_is_not_used(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copies" / "copy"
    here = Path(__file__).parent
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_base), str(copy), str(here)],
        env={"PYTHONPATH": f"{ROOT}:{here.parent}:{here}", "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = copy.parent.iterdir()
    assert left.name.startswith(TEMPORARY_PREFIX)
    assert not verify_packed(copy)
    make_copy(*arguments(tiny_base), copy, CPU)
    assert_same_bytes(copy, tiny_base)
