"""A base's mistakes in the words of `inspect`, whose flags are not the keys of a run's file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_pl.errors import ConfigurationError


@contextmanager
def in_words_of_flags(flag: str) -> Iterator[None]:
    """Within the block, mistakes are told by this command's flags and not by a run's keys.

    Args:
        flag: That says where the base lies.
    """
    words = {
        "model.model_name_or_path:": f"{flag}:",
        "model.quantization.skip_modules": "--skip-modules",
        "model.revision": "--revision",
        "model.quantization:": f"{flag}:",
        "--model:": f"{flag}:",
    }
    try:
        yield
    except ConfigurationError as error:
        told = []
        for problem in error.problems:
            for key, word in words.items():
                problem = problem.replace(key, word)
            told.append(re.sub(r"--skip-modules: \[(\w+)\]", r"--skip-modules \1", problem))
        raise ConfigurationError(told) from error
