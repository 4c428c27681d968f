"""What a converter left out of a GGUF file, put right in place; and whether an adapter is whole.

llama.cpp's converter has no scores for SentencePiece vocabularies whose folder lacks
``tokenizer.model``, as folders that transformers saves do: every piece gets the same, and texts
come out in other tokens without a word.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError

SCORES = "tokenizer.ggml.scores"
KIND = "tokenizer.ggml.model"
EOS = "tokenizer.ggml.eos_token_id"
SENTENCEPIECE = "llama"
"""What GGUF calls it."""
NEEDED = ("gguf", "sentencepiece")
"""What reading such a file, and llama.cpp's converters, take."""


def need_packages() -> None:
    """What a conversion needs must be there before it begins.

    Raises:
        ConfigurationError: with the command that installs it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"--convert: llama.cpp's converters need {' and '.join(missing)}; run: pip install "
            "'qlora-pl[export]'."
        )


def complete(file: Path, folder: Path, stop_token_ids: list[int]) -> None:
    """Put right a model's file.

    Args:
        file: That a converter wrote.
        folder: It was made of.
        stop_token_ids: From ``stop_ids``.

    Raises:
        ConfigurationError: if the scores of its vocabulary cannot be had.
    """
    import gguf

    fields = gguf.GGUFReader(file, "r+").fields
    if KIND in fields and fields[KIND].contents() == SENTENCEPIECE:
        scores = fields[SCORES]
        if len({float(scores.parts[place][0]) for place in scores.data}) == 1:
            _write_scores(scores, merge_ranks(folder))
    if stop_token_ids and EOS in fields:
        token = fields[EOS].parts[fields[EOS].data[0]]
        if token[0] not in stop_token_ids:
            token[0] = stop_token_ids[0]


def lacks_scores(folder: Path) -> bool:
    """Whether llama.cpp's converter alone would give a folder's vocabulary no scores."""
    path = folder / "tokenizer.json"
    if not path.is_file() or (folder / "tokenizer.model").is_file():
        return False
    model = json.loads(path.read_text()).get("model", {})
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def stop_ids(folder: Path, trained: list[int]) -> list[int]:
    """Tokens that end an answer.

    Args:
        folder: Of a model, whose generation settings are asked where training said nothing.
        trained: Where training ended answers.
    """
    path = folder / "generation_config.json"
    if trained or not path.is_file():
        return trained
    found = json.loads(path.read_text()).get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def _write_scores(scores: Any, ranks: dict[int, int]) -> None:
    for token, rank in ranks.items():
        if token < len(scores.data):
            scores.parts[scores.data[token]][0] = -float(rank)


def merge_ranks(folder: Path) -> dict[int, int]:
    """Tokens that a merge makes -> the rank of the first merge that does, from ``tokenizer.json``.

    SentencePiece joins the two neighbours whose union has the highest score, the leftmost of
    equals, and a list of merges is that order: minus the rank as a score gives the same tokens.

    Raises:
        ConfigurationError: if there are no merges.
    """
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text()).get("model", {}) if path.is_file() else {}
    merges, vocabulary = model.get("merges"), model.get("vocab")
    if not merges or not isinstance(vocabulary, dict):
        raise ConfigurationError(
            f"'{folder}' has neither tokenizer.model nor a tokenizer.json with merges, without "
            "which llama.cpp makes other tokens of a text; copy tokenizer.model out of the base's "
            "own folder."
        )
    ranks: dict[int, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(vocabulary[left + right], rank)
    return ranks


def refuse_incomplete_adapter(file: Path, num_modules: int) -> None:
    """Every adapted matrix must be in an adapter's file.

    Args:
        file: That a converter wrote.
        num_modules: With an A and a B.

    Raises:
        ConfigurationError: if some are not.
    """
    import gguf

    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    matrices = {name.rpartition(".")[0] for name in names if name.endswith((".lora_a", ".lora_b"))}
    if len(matrices) < num_modules:
        raise ConfigurationError(
            f"llama.cpp's converter kept {len(matrices)} of the adapter's {num_modules} matrices; "
            "export it merged (--form merged)."
        )
