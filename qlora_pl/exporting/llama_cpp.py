"""llama.cpp's own converters: where they lie, the words that start them, and what they said."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_pl.errors import ConfigurationError, HardwareError

logger = logging.getLogger(__name__)

MODEL_CONVERTER = "convert_hf_to_gguf.py"
ADAPTER_CONVERTER = "convert_lora_to_gguf.py"
VARIABLE = "LLAMA_CPP_DIR"
UNPACKED = Path(".cache/llama.cpp")
"""Where ``make llama-cpp`` puts them."""
SOURCES = "vendor/llama.cpp"
"""Where they lie in the source archive of llama-cpp-python."""
LAST_LINES = 3
"""Of a converter that failed, that are shown."""


def find_converter(name: str, folder: str | None = None) -> Path | None:
    """Where a converter lies: in the folder named, or in one of the usual ones; None: nowhere.

    Args:
        name: Of its file.
        folder: ``--llama-cpp``; None: the environment's ``LLAMA_CPP_DIR``, else the usual ones.

    Raises:
        ConfigurationError: if a folder is named that does not hold it.
    """
    variable = os.environ.get(VARIABLE)
    for key, named in (("--llama-cpp", folder), (VARIABLE, variable)):
        if named:
            place = Path(named).expanduser()
            for found in (place / name, place / SOURCES / name):
                if found.is_file():
                    return found.absolute()
            raise ConfigurationError(
                f"{key}: '{named}' holds no {name}; name a source tree of llama.cpp."
            )
    for place in _usual_places():
        if (place / name).is_file():
            return (place / name).absolute()
    on_path = shutil.which(name)
    return Path(on_path) if on_path else None


def _usual_places() -> Iterator[Path]:
    for place in (UNPACKED, Path("llama.cpp"), Path.home() / "llama.cpp"):
        yield from (place, place / SOURCES)


def need_converter(name: str, folder: str | None = None) -> Path:
    """As ``find_converter``, where there is no going on without it.

    Raises:
        ConfigurationError: if it is nowhere.
    """
    found = find_converter(name, folder)
    if found is None:
        raise ConfigurationError(
            f"--llama-cpp: {name} was not found in '{UNPACKED}', 'llama.cpp' and '~/llama.cpp'; "
            f"name a source tree of llama.cpp, or set {VARIABLE} (make llama-cpp fetches one)."
        )
    return found


def model_words(
    converter: Path | None, model: Path, output: Path, outtype: str = "bf16"
) -> list[str]:
    """The command that makes a model's folder one GGUF file.

    Args:
        converter: From ``find_converter``; None: its bare name stands for it.
        model: A folder of transformers.
        output: The file.
        outtype: In llama.cpp's words.
    """
    script = MODEL_CONVERTER if converter is None else str(converter)
    return [sys.executable, script, str(model), "--outfile", str(output), "--outtype", outtype]


def adapter_words(converter: Path | None, adapter: Path, base: Path, output: Path) -> list[str]:
    """The command that makes a plain adapter one GGUF file, in float32.

    Args:
        converter: From ``find_converter``; None: its bare name stands for it.
        adapter: A PEFT folder.
        base: Its base's folder, of which only the settings are read.
        output: The file.
    """
    script = ADAPTER_CONVERTER if converter is None else str(converter)
    return [
        *(sys.executable, script, str(adapter), "--base", str(base)),
        *("--outfile", str(output), "--outtype", "f32"),
    ]


def command_line(words: Sequence[str]) -> str:
    """Words as they are typed; ``python`` for this process's own."""
    shown = ["python" if word == sys.executable else word for word in words]
    return shlex.join(shown)


def convert(words: Sequence[str], output: Path) -> None:
    """Run a converter.

    Args:
        words: From ``model_words`` or ``adapter_words``.
        output: The file that it is to write.

    Raises:
        ConfigurationError: if it fails, with its last lines.
        HardwareError: if the system ended it.
    """
    logger.info("Running llama.cpp's %s ...", Path(words[1]).name)
    # All that it reads lies on the disk: it is not to look on the Hub for more.
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        list(words),
        env=os.environ | offline,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    name = Path(words[1]).name
    if done.returncode < 0:
        raise HardwareError(
            f"llama.cpp's {name} was ended by signal {-done.returncode}, as the system does when "
            "memory runs out; nothing was written."
        )
    if done.returncode or not output.is_file():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = " | ".join(lines[-LAST_LINES:]) or "it said nothing"
        raise ConfigurationError(f"llama.cpp's {name} failed (exit code {done.returncode}): {said}")
