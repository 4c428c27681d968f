"""Memory and disk: how much there is, and which bases fit into it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from qlora_pl.doctor.finding import Finding, Status
from qlora_pl.files import cache_root

GB = 10**9
BASES = {
    "LLaMA 7B": (6_738_415_616, 3.87 * GB),
    "LLaMA 13B": (13_015_864_320, 7.20 * GB),
    "LLaMA 33B": (32_528_943_616, 17.41 * GB),
    "LLaMA 65B": (65_285_660_672, 34.46 * GB),
}
"""Weights, and bytes in NF4 with the rest in bfloat16: docs/models.md."""
RUN_BYTES = 4 * 159_907_840 * (4 + 8 + 4)
"""Of a run of LLaMA 7B at r 64: four saves (two newest, the best, the one being written), each with
weights and AdamW's two states in float32 and the adapter folder's copy of the weights."""
LEAST_BYTES = GB
"""With less no save is sure to end."""
LITTLE_MEMORY = 4 * GB


def memory() -> Iterator[Finding]:
    """Host memory that is free, by the machine and by the container's limit."""
    free, total, said_by = host_memory()
    fitting = [name for name, (_, packed) in BASES.items() if packed + 2 * GB <= free]
    is_little = free < LITTLE_MEMORY
    meaning = (
        f"on the CPU a {fitting[-1]} fits, packed in {BASES[fitting[-1]][1] / GB:.1f} GB, before "
        "anything is trained"
        if fitting
        else "a LLaMA 7B takes 3.9 GB packed and the libraries 1 GB: smaller bases only, on the CPU"
    )
    yield Finding(
        title="memory",
        status=Status.WARNING if is_little else Status.OK,
        found=f"{free / GB:.1f} of {total / GB:.1f} GB free ({said_by})",
        meaning=meaning,
        fix="ps aux --sort=-rss | head" if is_little else "",
    )


def host_memory() -> tuple[int, int, str]:
    """Bytes free and in all, and whose limit that is."""
    known = dict[str, int]()
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.strip().endswith("kB"):
            known[name] = int(value.split()[0]) * 1024
    free, total, said_by = known["MemAvailable"], known["MemTotal"], "the machine"
    for folder, limit_name, used_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = int(Path(folder, limit_name).read_text())  # "max" is none
            used = int(Path(folder, used_name).read_text())
        except (OSError, ValueError):
            continue
        if limit < total:
            free, total, said_by = min(free, limit - used), limit, "this container's limit"
    return free, total, said_by


def disk() -> Iterator[Finding | str]:
    """The folders that a run writes to: whether it may, and what has room there."""
    for title, folder, variable, what in (
        ("packed weights", cache_root(None), "QLORA_PL_CACHE", "packed"),
        ("downloads", hub_cache(), "HF_HOME", "download"),
        ("runs", Path("runs"), "--run.root", "run"),
    ):
        yield str(folder)
        yield look_at(title, folder, variable, what)


def look_at(title: str, folder: Path, variable: str, what: str) -> Finding:
    """Write to a folder, or to where it would be made, and count what is free.

    Args:
        title: In the report.
        folder: Need not exist.
        variable: What moves it.
        what: ``packed``, ``download`` or ``run``.
    """
    remedy = (
        f"qlora-pl fit {variable} /path/with/room ..."
        if variable.startswith("-")
        else f"export {variable}=/path/with/room"
    )
    place = folder.expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        _write_to(place)
    except OSError as error:
        return Finding(
            title=title,
            status=Status.BROKEN,
            found=f"{folder}: cannot be written to ({error.strerror})",
            meaning=_UNWRITABLE[what],
            fix=remedy,
        )
    free = shutil.disk_usage(place).free
    status = Status.OK
    if free < LEAST_BYTES:
        status = Status.BROKEN
    elif free < _needed(what):
        status = Status.WARNING
    return Finding(
        title=title,
        status=status,
        found=f"{folder}: writable, {free / GB:,.1f} GB free",
        meaning=_room(what, free),
        fix="" if status is Status.OK else remedy,
    )


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it has downloaded, by its own rules."""
    if chosen := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface") / "hub"


def _write_to(folder: Path) -> None:
    """What every run does in its folder: write, flush, rename, remove.

    Raises:
        OSError: if one of it fails.
    """
    if not folder.is_dir():
        raise NotADirectoryError(20, "a file stands in its way")
    first = folder / f".qlora-pl-doctor-{secrets.token_hex(6)}"
    second = first.with_suffix(".renamed")
    try:
        with first.open("wb") as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
        first.replace(second)
        if second.read_bytes() != b"doctor":
            raise OSError(5, "other bytes came back")
    finally:
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)


def _needed(what: str) -> float:
    """Bytes for a LLaMA 7B."""
    weights, packed = BASES["LLaMA 7B"]
    return {"packed": packed, "download": 2 * weights, "run": RUN_BYTES}[what]


def _room(what: str, free: int) -> str:
    if what == "run":
        runs = int(free / RUN_BYTES)
        return (
            f"a run of LLaMA 7B at r 64 keeps {RUN_BYTES / GB:.0f} GB of checkpoints: "
            f"room for {runs}"
        )
    sizes = {
        name: packed if what == "packed" else 2.0 * weights
        for name, (weights, packed) in BASES.items()
    }
    verb = "kept packed" if what == "packed" else "fetched in 16 bits"
    fitting = [name for name, size in sizes.items() if size <= free]
    larger = [name for name in sizes if name not in fitting]
    parts = []
    if fitting:
        parts.append(f"a {fitting[-1]} ({sizes[fitting[-1]] / GB:.1f} GB) can be {verb}")
    if larger:
        no = f"a {larger[0]} ({sizes[larger[0]] / GB:.1f} GB) cannot"
        parts.append(no if fitting else f"{no} be {verb}")
    return ", ".join(parts)


_UNWRITABLE = {
    "packed": "the base is quantised, and the rows encoded, anew at every start",
    "download": "no base can be fetched from the Hub",
    "run": "no run starts from this working directory",
}
