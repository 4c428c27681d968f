"""All measurements of one GPU in one command, each in a process of its own with a time limit.

What fails or takes too long does not stop the others; the record is written anew after each.
``--rehearse`` goes the same way at tiny size, on whatever device there is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError, HardwareError, did_you_mean
from qlora_pl.files import write_json

RECORD = "qlora-pl bench protocol"


@dataclass(frozen=True)
class Measurement:
    """One of the protocol's, as flags of ``bench``."""

    name: str
    title: str
    shape: str
    tokens: int
    limit_seconds: float
    flags: dict[str, Any] = field(default_factory=dict)
    is_default: bool = True
    """False: only where it is named."""

    def words(self) -> list[str]:
        """What follows ``qlora-pl bench``."""
        flags = {
            "shape": self.shape,
            "tokens-per-micro": self.tokens,
            "seq": min(self.tokens, 2048),
            "checkpointing": "none",
            **self.flags,
        }
        return _words(flags)

    def rehearsed(self, shape: Path) -> list[str]:
        """The same flags at tiny size; what only a GPU can do is left out."""
        flags = {
            **self.flags,
            "shape": shape,
            "tokens-per-micro": 128 * max(1, self.tokens // 8192),
            "seq": 64,
            "r": 8,
            "warmup": 1,
            "steps": 2,
            "profiled": 1,
        }
        if "against-accumulation" in flags:
            flags["against-accumulation"] = 2
        return _words({name: value for name, value in flags.items() if name != "memory-limit"})


PAPER = {"adapter-dtype": "bfloat16", "checkpointing": "all", "dropout": 0.05}
SHORT = {"warmup": 2, "steps": 3, "profiled": 2}
FIT = PAPER | SHORT | {"lengths": "fixed"}
AGAINST = {"lengths": "alpaca", "seq": 512, "checkpointing": "all", "dropout": 0.1}
MEASUREMENTS = (
    Measurement("7b-512", "7B, 512 tokens: how much waits for Python", "llama2-7b", 512, 60),
    Measurement("7b-2048", "7B, 2,048 tokens", "llama2-7b", 2048, 60),
    Measurement("7b-8192", "7B, 8,192 tokens", "llama2-7b", 8192, 75),
    Measurement("7b-16384", "7B, 16,384 tokens", "llama2-7b", 16384, 90),
    Measurement("8b-8192", "8B with 128,256 words", "llama3-8b", 8192, 80),
    Measurement("70b-2048", "70B, 2,048 tokens", "llama2-70b", 2048, 170),
    Measurement(
        "33b-23gib", "33B within 23 GiB", "llama-33b", 512, 90, FIT | {"memory-limit": 23.0}
    ),
    Measurement(
        "65b-46gib", "65B within 46.5 GiB", "llama-65b", 512, 150, FIT | {"memory-limit": 46.5}
    ),
    Measurement(
        "7b-against-hf",
        "7B against transformers and PEFT, the original's steps",
        "llama2-7b",
        8192,
        600,
        AGAINST | {"against": "hf", "against-accumulation": 16},
        is_default=False,
    ),
    Measurement(
        "7b-against-trl",
        "7B against TRL, the same packs",
        "llama2-7b",
        8192,
        600,
        AGAINST | {"against": "trl"},
        is_default=False,
    ),
)
"""Within 8 minutes on one GPU of 139 GiB, but for the last two."""
TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
"""A shape for rehearsals."""


def run_protocol(name: str, out: Path, only: list[str] | None, is_rehearsal: bool) -> int:
    """Take the measurements that were asked for, and write the record.

    Args:
        name: ``gpu``.
        out: Folder of the record.
        only: Names of measurements; None: all that are due by default.
        is_rehearsal: Whether it is tried at tiny size.

    Returns:
        The exit code: 1 if one of them failed.

    Raises:
        ConfigurationError: for a name that is not known, or a folder that cannot be.
        HardwareError: if there is no GPU, and it is no rehearsal.
    """
    chosen = _chosen(only)
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"--out: '{out}' is a file; name a folder for the records.")
    _refuse_no_gpu(is_rehearsal)
    out.mkdir(parents=True, exist_ok=True)
    kind = f"bench-{name}-rehearsal" if is_rehearsal else f"bench-{name}"
    path = out / f"{kind}-{datetime.now(UTC):%Y-%m-%d}.json"
    results: dict[str, Any] = {
        one.name: {"title": one.title, "outcome": "not run"} for one in chosen
    } | _taken_before(path)
    record = {
        "record": RECORD,
        "is_rehearsal": is_rehearsal,
        "environment": surroundings(),
        "measurements": results,
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qlora-pl-bench-") as temporary:
        folder = Path(temporary)
        write_json(folder / "tiny" / "config.json", TINY)
        for one in chosen:
            words = one.rehearsed(folder / "tiny") if is_rehearsal else one.words()
            results[one.name] = {"title": one.title} | measure(one, words, folder)
            record["seconds"] = round(time.perf_counter() - began, 1)
            write_json(path, record)
            print(_line(one, results[one.name]), flush=True)
    print(f"bench: {path}")
    return 0 if all(results[one.name]["outcome"] == "measured" for one in chosen) else 1


def surroundings() -> dict[str, Any]:
    """Date, device and versions, asked in a process that ends: this one takes nothing of a GPU."""
    words = [sys.executable, "-m", "qlora_pl.benching.surroundings"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _taken_before(path: Path) -> dict[str, Any]:
    """Measurements of the same day: each has its own surroundings, and none is thrown away."""
    try:
        record = json.loads(path.read_text())
        found: dict[str, Any] = record["measurements"] if record["record"] == RECORD else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found


def measure(one: Measurement, words: list[str], folder: Path) -> dict[str, Any]:
    """One of them, in a process of its own: what came of it, and its record."""
    out, log = folder / f"{one.name}.json", folder / f"{one.name}.log"
    began = time.perf_counter()
    command = [sys.executable, "-m", "qlora_pl", "bench", *words, "--out", str(out)]
    with log.open("w") as file:
        # A session of its own: a comparison's own processes end with it, and leave the GPU.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(one.limit_seconds)
            outcome = "measured" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"not done in {one.limit_seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = {
        "outcome": outcome,
        "words": words,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if out.is_file():
        found["result"] = json.loads(out.read_text())
    if outcome != "measured":
        found["said"] = log.read_text(errors="replace")[-2000:]
    return found


def _line(one: Measurement, found: dict[str, Any]) -> str:
    head = f"  {one.name:16}{found['outcome']}, {found['seconds']:.0f} s"
    result = found.get("result", {})
    if "speed" in result:
        peak = result["memory"]["of_timed_steps"]
        size = peak.get("allocated", peak.get("resident", 0)) / 1e9
        return (
            f"{head}: {result['speed']['tokens_per_second']:,.0f} tokens/s, MFU "
            f"{result['compute']['mfu']:.1%}, peak {size:.2f} GB"
        )
    if "against" in result:
        return f"{head}: " + (result["refused"] or f"{result['ratio']:.2f} x {result['against']}")
    last = (found.get("said", "").strip().splitlines() or [""])[-1]
    return f"{head}: {last}"


def _chosen(only: list[str] | None) -> list[Measurement]:
    names = [one.name for one in MEASUREMENTS]
    for name in only or ():
        if name not in names:
            raise ConfigurationError(
                f"--only: no measurement is called '{name}'{did_you_mean(name, names)}"
            )
    return [one for one in MEASUREMENTS if (one.name in only if only else one.is_default)]


def _refuse_no_gpu(is_rehearsal: bool) -> None:
    if is_rehearsal:
        return
    import torch  # slow to import

    if not torch.cuda.is_available():
        raise HardwareError(
            "--protocol: there is no CUDA device here; add --rehearse to try it on the CPU."
        )


def _words(flags: dict[str, Any]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]
