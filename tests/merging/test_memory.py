"""What merging and scoring take of a host's memory: what is worked with, and not the models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_runs import fit
from torch import Tensor

from qlora_pl.inference.source import ModelChoice, resolve_source
from qlora_pl.merging.asking import load_merged, load_trained
from qlora_pl.merging.candidates import Form, write_candidate
from qlora_pl.merging.weights import MergedWeights
from qlora_pl.merging.writing import SHARD_BYTES
from qlora_pl.modeling.base.identity import identify_base

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a whole run happens in this process

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "merging.py"
MAPS = Path("/proc/self/maps")


def file_of(tensor: Tensor) -> str:
    """The file whose pages a tensor lies in; empty for anonymous memory."""
    place = tensor.data_ptr()
    for line in MAPS.read_text().splitlines():
        addresses, _, _, _, _, *name = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if begin <= place < end:
            return name[0] if name else ""
    raise AssertionError("an address outside of every mapping")


@pytest.mark.skipif(not MAPS.exists(), reason="asks Linux which pages are a file's")
def test_the_models_that_are_merged_and_scored_lie_in_the_pages_of_their_files(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    fit(tmp_path, tiny_base, rows_file, r=4, compute="bfloat16")
    choice = ModelChoice(adapter=(str(tmp_path / "adapter"),), cache_dir=str(tmp_path / "cache"))
    source = resolve_source(choice)
    identity = identify_base(source.base, None, choice.cache_dir)
    weights = MergedWeights(source, identity)
    for name, parameter in weights.base.named_parameters():
        if "lora_" not in name:
            assert file_of(parameter) == str(tiny_base / "model.safetensors"), name
    trained = load_trained(source, identity, weights.plan, choice)
    for name, parameter in trained.model.named_parameters():
        if "lora_" not in name:
            assert str(tmp_path / "cache/packed") in file_of(parameter), name
    form = Form(dtype=torch.bfloat16)
    write_candidate(tmp_path / "merged", weights, source, "dequantized", form)
    merged = load_merged(tmp_path / "merged", torch.bfloat16, torch.device("cpu"))
    for name, parameter in merged.named_parameters():
        assert file_of(parameter) == str(tmp_path / "merged/model.safetensors"), name


@pytest.mark.slow
def test_0_6_billion_weights_are_merged_and_scored_in_less_memory_than_they_take(
    tmp_path: Path,
) -> None:
    """Bounds: the imports', one file that waits, the adapter, 16 bytes a weight of the largest.

    bitsandbytes takes 14 bytes a weight to pack a matrix on a CPU, and an embedding of float32 in
    two copies and one of bfloat16 takes 10. Scoring keeps no file waiting.
    """
    said = subprocess.run(
        [sys.executable, str(BENCHMARK), "memory", "--weights", "0.6e9", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    adapter = (tmp_path / "adapter-lora/adapter_model.safetensors").stat().st_size
    largest = 2048 * 8192
    worked_with = found["imports_bytes"] + 1.2 * adapter + 16 * largest
    assert found["written_bytes"] > 1.05 * SHARD_BYTES  # so that more than one file is written
    assert found["largest_file_bytes"] <= SHARD_BYTES + 100_000  # and its header
    assert found["merge_peak_bytes"] < worked_with + SHARD_BYTES
    for part in ("pack_and_load", "ask_trained", "ask_merged"):
        assert found[f"{part}_peak_bytes"] < worked_with, part
