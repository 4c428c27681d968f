"""Names and links in a folder that somebody sent do not lead out; rights are the umask's."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_pl.errors import AdapterFolderError, ConfigurationError
from qlora_pl.files import atomic_folder, sha256_file, temporary_folder
from qlora_pl.modeling.base.identity import weight_files
from qlora_pl.modeling.folders.adapter_folder import AdapterManifest, read_adapter_folder
from qlora_pl.modeling.folders.own_files import is_plain_name
from qlora_pl.modeling.folders.peft_folder import locate_adapter
from security.attempts import Type, fit

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


OUTSIDE = ["../secret.txt", "/etc/hostname", "a/../../secret.txt", "..\\secret.txt", "C:\\x", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_its_folder_is_told(name: str) -> None:
    assert not is_plain_name(name)
    for plain in ("model.safetensors", "templates/rag.jinja", "..x", "a..b"):
        assert is_plain_name(plain)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter folder with a manifest, and a file beside it that is none of its business."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    write_manifest(folder, ["adapter_config.json"])
    return folder


def write_manifest(folder: Path, names: list[str]) -> None:
    files = {}
    for name in names:
        path = folder / name
        files[name] = sha256_file(path) if path.is_file() else hashlib.sha256(b"").hexdigest()
    manifest = AdapterManifest(
        base={"name": "x", "revision": None, "weights": "0", "config": "0"},
        quantization={}, quantization_config=None, lora={}, template="guanaco",
        stop_token_ids=[], max_length=0, step=1, data={}, versions={}, files=files,
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(vars(manifest)))


def test_a_manifest_that_names_its_own_files_is_read(adapter: Path) -> None:
    read_adapter_folder(adapter)


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_a_manifest_may_not_name_files_outside(adapter: Path, name: str) -> None:
    write_manifest(adapter, [name])
    with pytest.raises(AdapterFolderError, match="lies outside of it"):
        read_adapter_folder(adapter)


@pytest.mark.parametrize("linked", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_in_an_adapter_folder_may_not_lead_out(adapter: Path, linked: str) -> None:
    (adapter / linked).unlink()
    (adapter / linked).symlink_to(adapter.parent / "secret.txt")
    write_manifest(adapter, [linked])
    with pytest.raises(AdapterFolderError, match="lies outside of it"):
        read_adapter_folder(adapter)
    with pytest.raises(ConfigurationError, match="is a link that leads out of its folder"):
        locate_adapter(str(adapter))


def test_a_manifest_itself_may_not_be_a_link_that_leads_out(adapter: Path) -> None:
    (adapter / "manifest.json").rename(adapter.parent / "manifest.json")
    (adapter / "manifest.json").symlink_to(adapter.parent / "manifest.json")
    with pytest.raises(AdapterFolderError, match="leads out of the folder"):
        read_adapter_folder(adapter)


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path, adapter: Path) -> None:
    """snapshots/REVISION/FILE -> ../../blobs/DIGEST, as huggingface_hub lays them out."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x/snapshots/0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in adapter.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    read_adapter_folder(snapshot)
    assert locate_adapter(str(snapshot)) == snapshot


@pytest.mark.parametrize(
    "change", [{"files": ["x"]}, {"base": {"weights": 3}}, {"base": []}, {"format": "1"}]
)
def test_a_manifest_of_other_types_is_refused_in_a_sentence(adapter: Path, change: dict) -> None:
    path = adapter / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterFolderError):
        read_adapter_folder(adapter)


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_an_index_of_weights_may_not_name_files_outside(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="lies outside of its folder"):
        weight_files(tmp_path)


def modes(folder: Path) -> dict[str, int]:
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in paths}


@pytest.mark.parametrize(("mask", "folder_mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_a_folder_is_readable_by_whom_the_umask_says(
    tmp_path: Path, mask: int, folder_mode: int
) -> None:
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "made") as folder:
            (folder / "x").write_text("x")
        temporary_folder(tmp_path)
    finally:
        os.umask(before)
    found = modes(tmp_path)
    assert found.pop("made/x") == folder_mode & 0o666
    assert set(found.values()) == {folder_mode}


@pytest.mark.slow
def test_a_private_run_stays_private(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Under umask 077 nobody else may read a byte of a run or of its caches."""
    words = fit(tiny_base, rows_file, "--run.root", tmp_path / "runs")
    done = subprocess.run(
        [sys.executable, "-m", "qlora_pl", *map(str, words)],
        env=os.environ | {"QLORA_PL_CACHE": str(tmp_path / "cache")},
        preexec_fn=lambda: os.umask(0o077) and None,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = modes(tmp_path)
    assert len(found) > 40
    assert not {name: oct(mode) for name, mode in found.items() if mode & 0o077}


def test_run_names_stay_in_their_root(type_in: Type, tiny_base: Path, rows_file: Path) -> None:
    for name in ("../x", "/tmp/x", "..", "a/b"):
        code, said = type_in(*fit(tiny_base, rows_file, "--run.name", name))
        assert code == 2, said
        assert "run.name:" in said
