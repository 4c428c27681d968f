"""The run's own tokenizer, or one in its place where it cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.vocabulary import check_vocabulary, rows_of
from qlora_pl.smoke.base_files import BaseFiles
from qlora_pl.smoke.random_base import configs_of
from qlora_pl.smoke.stand_in_tokenizer import save_stand_in

CHAT_WORDS = ("instruct", "chat", "-it")
"""In the names of models that bring a chat template."""


def provide_tokenizer(base: BaseFiles, run: Any, place: Path, is_online: bool) -> tuple[Path, str]:
    """A folder with the run's tokenizer, or one in its place.

    Args:
        base: The files of the base, which may hold it.
        run: The parsed configuration.
        place: The folder to make.
        is_online: Whether the Hub may be asked.

    Returns:
        The folder, and which tokenizer stands in for one that cannot be had, in words; empty: it
        is the real one.

    Raises:
        ConfigurationError: if there is none, or none that can be trained with.
    """
    name = run.data.tokenizer
    is_of_base = name == run.model.model_name_or_path
    if is_of_base and base.has_tokenizer:
        load_tokenizer(str(base.folder))
        return base.folder, ""
    if not is_of_base:
        try:
            tokenizer = load_tokenizer(name, None, run.model.cache_dir)
        except ConfigurationError:
            if Path(name).expanduser().exists() or is_online:
                raise
        else:
            tokenizer.save_pretrained(place)
            return place, ""
    config = _whole_config(base)
    is_chat = _wants_chat(run)
    kind = save_stand_in(config, place, is_chat)
    shutil.copyfile(base.folder / "config.json", place / "config.json")
    return place, f"'{name}': a tokenizer of the same size and kind ({kind}) in its place"


def _wants_chat(run: Any) -> bool:
    if run.data.template != "auto":
        return bool(run.data.template == "chat")
    name = str(run.model.model_name_or_path).lower()
    return any(word in name for word in CHAT_WORDS)


def _whole_config(base: BaseFiles) -> dict[str, Any]:
    from transformers import AutoConfig  # slow to import

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    return {**config.get_text_config().to_dict(), "model_type": base.config.get("model_type")}


def check_tokenizer(tokenizer: Any, skeleton: nn.Module, run: Any) -> None:
    """Every token must have a row, and those that are to be trained must exist.

    Raises:
        ConfigurationError: if not.
    """
    check_vocabulary(tokenizer, skeleton, run.model.grow_vocabulary)
    rows_of(skeleton, tokenizer, configs_of(run)[1].trainable_tokens)
