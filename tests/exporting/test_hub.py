"""``qlora-pl export --to hub``: what leaves the machine, and what never does.

The client is huggingface_hub's own; the far side is a server of this process.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporting.hub_server import Hub, serving
from qlora_pl.exporting.hub import ALLOWED, staged_files
from qlora_pl.files import sha256_bytes, sha256_file
from qlora_pl.inference.source import ModelChoice, resolve_source

Type = Callable[..., tuple[int, str, str]]
TOKEN = "hf_" + "a1B2" * 9
REPO = "me/answers"

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, and a token for it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The protocol of git's large files, which a page of a server can speak.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with serving(Hub()) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        yield found


def push(type_in: Type, adapter: Path, *more: object) -> tuple[int, str, str]:
    return type_in(
        *("export", "--adapter", adapter, "--to", "hub", "--repo", REPO, "--output", "pushed"),
        *("--base-repo", "org/tiny", *more),
    )


def test_a_pushed_adapter_is_private_and_whole(type_in: Type, adapter: Path, hub: Hub):
    code, out, said = push(type_in, adapter, "--yes")
    assert code == 0, said
    assert hub.repos == {REPO: True}
    assert hub.tokens == {f"Bearer {TOKEN}", ""} or hub.tokens == {f"Bearer {TOKEN}"}
    assert sorted(hub.files) == staged_files(Path("pushed"))
    weights = "adapter_model.safetensors"
    assert hub.files[weights] == (adapter / weights).read_bytes()
    assert f"to {hub.address}/{REPO}" in out
    assert TOKEN not in out + said


def test_nothing_but_the_list_is_pushed(type_in: Type, adapter: Path, hub: Hub, tmp_path: Path):
    """Optimizer state, rows, logs, a stray key: whatever lies in the folder."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    strays = ("step-4.ckpt", "optimizer.pt", "metrics.csv", ".env", "notes.safetensors", "id_rsa")
    for name in strays:
        (folder / name).write_text("secret")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "adapter_model.safetensors").write_text("older")
    (folder / "merges.txt").symlink_to("/etc/hostname")
    code, _, said = push(type_in, folder, "--yes")
    assert code == 0, said
    assert not set(strays) & set(hub.files)
    assert not [name for name in hub.files if "checkpoints" in name or name == "merges.txt"]
    assert "held_out.safetensors" not in hub.files, "rows of the data set"
    assert set(hub.files) <= set(ALLOWED)


def test_held_out_rows_are_pushed_when_asked_for(type_in: Type, adapter: Path, hub: Hub):
    code, _, said = push(type_in, adapter, "--yes", "--held-out")
    assert code == 0, said
    assert "held_out.safetensors" in hub.files


def test_the_pushed_folder_is_still_one_of_this_project(type_in: Type, adapter: Path, hub: Hub):
    code, _, said = push(type_in, adapter, "--yes")
    assert code == 0, said
    manifest = json.loads(hub.files["manifest.json"])
    assert manifest["base"]["name"] == "org/tiny"
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"
    assert b"base_model: org/tiny\n" in hub.files["README.md"]
    digests = {name: sha256_bytes(data) for name, data in hub.files.items()}
    assert manifest["files"] == {n: d for n, d in digests.items() if n != "manifest.json"}
    source = resolve_source(ModelChoice(adapter=("pushed",)))
    assert source.base == "org/tiny"


def test_everything_is_shown_before_anything_is_pushed(
    type_in: Type, adapter: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    code, out, said = push(type_in, adapter)
    assert code == 0
    assert (hub.repos, hub.files) == ({}, {})
    assert f"To {REPO} (private: seen by you alone), out of pushed:" in said
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} KB" in said
    assert f"{len(staged_files(Path('pushed')))} files" in said
    assert said.rstrip().endswith("[y/N]")
    assert "Nothing was pushed" in out


@pytest.mark.parametrize(("answer", "is_pushed"), [("y\n", True), ("\n", False), ("", False)])
def test_a_push_waits_for_a_yes(
    type_in: Type,
    adapter: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    is_pushed: bool,
):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    code, _, _ = push(type_in, adapter)
    assert code == 0
    assert bool(hub.files) is is_pushed


def test_public_is_asked_for_and_said(type_in: Type, adapter: Path, hub: Hub):
    code, _, said = push(type_in, adapter, "--yes", "--private", "false")
    assert code == 0, said
    assert hub.repos == {REPO: False}
    assert "(PUBLIC: seen by everybody)" in said


def test_a_public_repository_that_exists_is_not_filled_as_if_it_were_private(
    type_in: Type, adapter: Path, hub: Hub
):
    """The client's create_repo(private=True, exist_ok=True) leaves it public without a word."""
    hub.repos[REPO] = False
    code, _, said = push(type_in, adapter, "--yes")
    assert code == 2
    assert "is there already, and public" in said
    assert not hub.files


def test_secrets_in_the_run_file_are_redacted(
    type_in: Type, adapter: Path, hub: Hub, tmp_path: Path
):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    run = folder / "run.yaml"
    run.write_text(run.read_text() + f"# export HF_TOKEN={TOKEN}\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["run.yaml"] = sha256_file(run)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, _, said = push(type_in, folder, "--yes")
    assert code == 0, said
    assert b"# export HF_TOKEN=[redacted]" in hub.files["run.yaml"]
    assert not [name for name, data in hub.files.items() if TOKEN.encode() in data]


def test_a_whole_model_is_pushed_with_its_tokenizer(type_in: Type, tiny_base: Path, hub: Hub):
    code, _, said = type_in(
        *("export", "--model", tiny_base, "--to", "hub", "--repo", REPO, "--output", "pushed"),
        "--yes",
    )
    assert code == 0, said
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(hub.files)
    assert hub.files["model.safetensors"] == (tiny_base / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--repo", "answers"), "--repo: name the repository on the Hub, as OWNER/NAME."),
        (("--repo", "a/b/c"), "--repo: name the repository on the Hub, as OWNER/NAME."),
        ((), "--repo: name the repository on the Hub, as OWNER/NAME."),
        (("--repo", REPO), "--base-repo: the base was read from "),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_left(
    type_in: Type, adapter: Path, hub: Hub, words: tuple[str, ...], sentence: str
):
    code, out, said = type_in(
        "export", "--adapter", adapter, "--to", "hub", "--output", "pushed", "--yes", *words
    )
    assert (code, out) == (2, "")
    assert sentence in said
    assert "Traceback" not in said
    assert not Path("pushed").exists()
    assert not hub.repos


def test_flags_of_the_hub_are_refused_elsewhere(type_in: Type, adapter: Path):
    code, _, said = type_in(
        *("export", "--adapter", adapter, "--to", "vllm", "--output", "o", "--repo", REPO)
    )
    assert code == 2
    assert "--repo: is for --to hub; leave it out." in said


def test_without_a_token_nothing_is_staged(
    type_in: Type, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import huggingface_hub

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, said = push(type_in, adapter, "--yes")
    assert code == 2
    assert "run 'hf auth login', or set HF_TOKEN" in said
    assert not Path("pushed").exists()


def test_a_hub_that_refuses_is_quoted(type_in: Type, adapter: Path, hub: Hub):
    hub.refuses = True
    code, _, said = push(type_in, adapter, "--yes")
    assert code == 2
    assert f"--repo: the Hub refuses '{REPO}'" in said
    assert "You have no write access" in said
    assert TOKEN not in said


def test_a_hub_that_is_not_there_leaves_what_would_be_pushed(
    type_in: Type, adapter: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, said = push(type_in, adapter, "--yes")
    assert code == 2
    assert "--to: the Hub cannot be reached" in said
    assert staged_files(Path("pushed"))
