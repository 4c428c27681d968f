"""A folder for the Hugging Face Hub: staged, shown file by file, and pushed when a person says so.

What may be pushed is a list of names. Optimizer state, logs, caches and rows of the data set are
not on it, so that nothing leaves the machine because it happened to lie in the folder.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_pl.data.encoding.served_template import served_tokenizer
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.exporting.merging import merge_into
from qlora_pl.exporting.options import ExportOptions
from qlora_pl.exporting.parity import check_parity, served_encoder, tokenizer_folder_ids
from qlora_pl.files import atomic_folder, sha256_file, write_atomic, write_json
from qlora_pl.inference.source import ModelChoice, ModelSource
from qlora_pl.modeling.folders.adapter_folder import HELD_OUT
from qlora_pl.redaction import redact

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
MODEL_FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "merge.json",
)
CARD = "README.md"
RECORDS = (CARD, "manifest.json", "run.yaml")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
ALLOWED = (*ADAPTER_FILES, *MODEL_FILES, *RECORDS, *TOKENIZER_FILES)
TEXT = (".json", ".md", ".yaml", ".jinja", ".txt")
"""Endings of files that are read for secrets; a tokenizer's vocabulary is none of a person's."""
REPO = re.compile(r"[\w.-]+/[\w.-]+")


def export_hub(source: ModelSource, choice: ModelChoice, options: ExportOptions) -> str:
    """Stage a folder, show it, ask, and push it.

    Raises:
        QLoRAError: for a mistake in flags, prompts that differ, or a Hub that refuses.
    """
    if options.repo is None or not REPO.fullmatch(options.repo):
        raise ConfigurationError("--repo: name the repository on the Hub, as OWNER/NAME.")
    api = _api()
    encoder = served_encoder(source, choice)
    output = Path(str(options.output)).expanduser()
    folder = next(iter(source.adapters.values()), None)
    with atomic_folder(output) as place:
        stage(source, choice, options, place)
        tokenizer = place / ".tokenizer"
        served_tokenizer(encoder).save_pretrained(tokenizer)
        ways = {"the chat template": tokenizer_folder_ids(tokenizer)}
        parity = check_parity(encoder, ways, folder)
        for path in sorted(tokenizer.rglob("*")):
            if path.is_file() and _matches(str(path.relative_to(tokenizer)), ALLOWED):
                target = place / path.relative_to(tokenizer)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
        shutil.rmtree(tokenizer)
        _seal(place, options)
    names = staged_files(output)
    refuse_others(names, options)
    print(listing(output, names, options), file=sys.stderr)
    if not (options.yes or _agrees(options.repo)):
        return f"Nothing was pushed. What would be is there.\n\nexport: {output}"
    address = push(api, output, names, options)
    return f"{parity.in_words()}\n\nPushed {len(names)} files to {address}\n\nexport: {output}"


# -- staging ---------------------------------------------------------------------------------------


def stage(source: ModelSource, choice: ModelChoice, options: ExportOptions, place: Path) -> None:
    """Put copies of what is allowed into a folder.

    Raises:
        ConfigurationError: if there is no such folder on this machine.
    """
    if source.adapters and options.form == "merged":
        merged = place / ".merged"
        merge_into(merged, choice, options)
        for path in merged.iterdir():
            path.rename(place / path.name)
        merged.rmdir()
        return
    folder = next(iter(source.adapters.values()), Path(source.base).expanduser())
    if not folder.is_dir():
        raise ConfigurationError(
            f"--model: '{source.base}' is no folder of this machine; there is nothing to push."
        )
    kept = [*ALLOWED, *([HELD_OUT] if options.held_out else [])]
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file() or not _matches(name, kept):
            continue
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _seal(place: Path, options: ExportOptions) -> None:
    """Secrets and places of this machine go; the manifest's digests are made anew."""
    _name_the_base(place, options)
    for path in sorted(place.rglob("*")):
        if path.is_file() and path.suffix in TEXT and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8")
            if redact(text) != text:
                path.write_text(redact(text), encoding="utf-8")
    manifest = place / "manifest.json"
    if manifest.is_file():
        said = json.loads(manifest.read_text(encoding="utf-8"))
        names = [name for name in staged_files(place) if name != manifest.name]
        write_json(manifest, said | {"files": {n: sha256_file(place / n) for n in names}})


def _name_the_base(place: Path, options: ExportOptions) -> None:
    """A base that training read from a folder needs the name under which others find it.

    Raises:
        ConfigurationError: if it has none.
    """
    said = _base_named(place)
    if said is None or not (os.path.isabs(said) or Path(said).is_dir()):
        return
    if options.base_repo is None:
        raise ConfigurationError(
            f"--base-repo: the base was read from '{said}', where nobody else finds it; say what "
            "it is called on the Hub."
        )
    for name in (*RECORDS, "adapter_config.json", "merge.json", "config.json"):
        path = place / name
        if path.is_file():
            text = path.read_text(encoding="utf-8").replace(json.dumps(said)[1:-1], said)
            write_atomic(path, text.replace(said, options.base_repo))
    if (place / CARD).is_file():
        from huggingface_hub import ModelCard  # slow to import

        card = ModelCard.load(place / CARD)
        card.data.base_model = options.base_repo
        card.save(place / CARD)


def _base_named(place: Path) -> str | None:
    """What a folder calls its base, whatever kind of folder it is."""
    named = _json(place / "adapter_config.json").get("base_model_name_or_path")
    for record in ("manifest.json", "merge.json"):
        named = named or (_json(place / record).get("base") or {}).get("name")
    return None if named is None else str(named)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def staged_files(folder: Path) -> list[str]:
    """Names of the files of a folder, at any depth."""
    return [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]


def refuse_others(names: Iterable[str], options: ExportOptions) -> None:
    """Nothing but what is on the list, whatever staging did.

    Raises:
        ConfigurationError: naming the file.
    """
    kept = [*ALLOWED, *([HELD_OUT] if options.held_out else [])]
    for name in names:
        if not _matches(name, kept):
            raise ConfigurationError(f"--to: '{name}' is not among the files that are pushed.")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    # fnmatch's star goes over slashes, so depth is compared first.
    return any(
        name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


# -- asking and pushing ----------------------------------------------------------------------------


def listing(folder: Path, names: Iterable[str], options: ExportOptions) -> str:
    """What will be pushed, a file a line with its size, and who will see it."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    width = max(map(len, sizes), default=0)
    lines = [f"  {name:{width}}  {_size(size):>10}" for name, size in sizes.items()]
    seen = "private: seen by you alone" if options.private else "PUBLIC: seen by everybody"
    return "\n".join(
        [
            f"To {options.repo} ({seen}), out of {folder}:",
            *lines,
            f"  {len(sizes)} files, {_size(sum(sizes.values()))}",
        ]
    )


def _size(size: int) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size = size / 1000  # type: ignore[assignment]
    return f"{size:.2f} GB"


def _agrees(repo: str) -> bool:
    print(f"Push them to {repo}? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        print("", file=sys.stderr)
        return False


def _api() -> Any:
    """The client, with the token of the environment or of ``hf auth login``.

    Raises:
        ConfigurationError: if there is none.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ConfigurationError(
            "--to: there is no token for the Hub; run 'hf auth login', or set HF_TOKEN."
        )
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def push(api: Any, folder: Path, names: list[str], options: ExportOptions) -> str:
    """Make the repository if there is none, and push; its address.

    Raises:
        ConfigurationError: if the repository is public and should not be, or the Hub refuses.
        HardwareError: if the Hub cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    repo = str(options.repo)
    try:
        api.create_repo(repo, private=options.private, exist_ok=True)
        if options.private and not api.repo_info(repo).private:
            # The client leaves one that exists as it is.
            raise ConfigurationError(
                f"--repo: '{repo}' is there already, and public; choose another, or say "
                "--private false."
            )
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message="Upload with qlora-pl",
        )
    except (HfHubHTTPError, HFValidationError) as error:
        reason = redact(" ".join(str(error).split())).rstrip(".")
        raise ConfigurationError(f"--repo: the Hub refuses '{repo}' ({reason}).") from error
    except (HTTPError, OSError, RuntimeError) as error:  # the last: a file's upload
        raise HardwareError(
            f"--to: the Hub cannot be reached ({redact(str(error))}); what would be pushed lies in "
            f"'{folder}'."
        ) from error
    return str(getattr(done, "repo_url", "") or f"{api.endpoint}/{repo}")
