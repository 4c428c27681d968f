"""A pickle that somebody sent runs nothing, wherever it lies; the first test shows it would."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from qlora_pl.errors import CheckpointError, ConfigurationError
from qlora_pl.files import sha256_file
from qlora_pl.modeling.adapters.adapter_start import start_at_adapter
from qlora_pl.modeling.folders.peft_folder import locate_adapter
from qlora_pl.training.checkpoints.checkpoint_files import VerifiedCheckpointIO
from security.attempts import Makes, Type, fit

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def test_the_trap_works(trap: Path) -> None:
    pickle.loads(pickle.dumps(Makes(trap)))
    assert trap.exists()
    trap.rmdir()
    buffer = trap.with_suffix(".pt")
    torch.save({"x": Makes(trap)}, buffer)
    torch.load(buffer, weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_a_checkpoint_runs_nothing_even_with_a_digest_that_fits(
    tmp_path: Path, trap: Path, by: str
) -> None:
    path = poisoned_checkpoint(tmp_path, trap, by)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        VerifiedCheckpointIO().load_checkpoint(path)
    assert not trap.exists()


def poisoned_checkpoint(folder: Path, trap: Path, by: str) -> Path:
    path = folder / "step-00000001.ckpt"
    content = {"state_dict": {}, "boundary": {"step": 1}, "x": Makes(trap)}
    if by == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256_file(path)}  {path.name}\n")
    return path


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_that_somebody_sent_is_refused_by_each_command(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path, trap: Path, command: str
) -> None:
    path = poisoned_checkpoint(tmp_path, trap, "torch")
    words = fit(tiny_base, rows_file, "--ckpt_path", path)
    code, said = type_in(command, *words[1:])
    assert code == 2, said
    assert "holds more than tensors and plain values" in said
    assert "Traceback" not in said
    assert not trap.exists()


def test_pickled_weights_of_a_base_run_nothing(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path, trap: Path
) -> None:
    base = tmp_path / "sent"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model.embed_tokens.weight": Makes(trap)}, base / "pytorch_model.bin")
    code, said = type_in(*fit(base, rows_file))
    assert code == 2, said
    assert "hold more than tensors, which is not run here" in said
    assert not trap.exists()


def test_pickled_weights_of_an_adapter_run_nothing(tmp_path: Path, trap: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"x": Makes(trap)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        start_at_adapter(torch.nn.Module(), locate_adapter(str(tmp_path)))
    assert not trap.exists()


@pytest.mark.slow
def test_caches_full_of_pickles_run_nothing(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path, trap: Path
) -> None:
    """Every file of every cache is replaced, and some are put beside; then the run starts again."""
    code, said = type_in(*fit(tiny_base, rows_file))
    assert code == 0, said
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    kinds = {path.relative_to(tmp_path / "cache").parts[0] for path in files}
    assert len(kinds) >= 3, kinds  # fingerprints, encoded rows, packed weights
    for path in files:
        torch.save({"x": Makes(trap)}, path)
        for name in ("adapter_model.bin", "pytorch_model.bin", "rows.npy", "input_ids.pt", "x.pkl"):
            (path.parent / name).write_bytes(pickle.dumps(Makes(trap)))
    code, said = type_in(*fit(tiny_base, rows_file))
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert not trap.exists()
