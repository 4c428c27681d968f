"""What is installed, held against what this package's own metadata asks for."""

from __future__ import annotations

import platform as system
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qlora_pl.doctor.finding import Finding, Status

PACKAGE = "qlora-pl"
REPAIR = "pip install --constraint constraints.txt --editable ."
EXTRAS = {
    "quickstart": "make quickstart",
    "web": "qlora-pl chat --web",
    "serve": "qlora-pl serve",
    "export": "qlora-pl export --to gguf",
}
"""Extras that a command asks for; the others are for working on the project."""


def python() -> Iterator[Finding]:
    """Python's version against the metadata's range."""
    wanted = own().metadata["Requires-Python"]
    version = system.python_version()
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    yield Finding(
        title="Python",
        status=Status.OK if fits else Status.BROKEN,
        found=f"{version} ({system.python_implementation()}, {system.machine()})",
        meaning=f"{'within' if fits else 'outside of'} the tested range, {wanted}",
        fix="" if fits else "python3.11 -m venv .venv",
    )


def platform() -> Iterator[Finding]:
    """The operating system: tests run on Linux, on x86-64."""
    kind, release, machine = system.system(), system.release(), system.machine()
    untested = untested_platform(kind, release, machine)
    yield Finding(
        title="platform",
        status=Status.WARNING if untested else Status.OK,
        found=f"{kind} {release}, {machine}",
        meaning=f"{untested}: whatever works is luck" if untested else "what the tests run on",
    )


def untested_platform(kind: str, release: str, machine: str) -> str:
    """What about a system was never tested here; "" if nothing."""
    if kind != "Linux":
        return f"{ {'Darwin': 'macOS'}.get(kind, kind) } was never tested"
    if "microsoft" in release.lower():
        return "Linux under Windows (WSL) was never tested"
    if machine not in ("x86_64", "AMD64"):
        return f"processors of the kind {machine} were never tested"
    return ""


def packages() -> Iterator[Finding]:
    """The packages that every command needs, against the metadata's ranges."""
    present = []
    for requirement in requirements(own()):
        version, is_fit = installed(requirement)
        if is_fit:
            present.append(f"{requirement.name} {version}")
            continue
        yield Finding(
            title=requirement.name,
            status=Status.BROKEN,
            found=version or "not installed",
            meaning=f"the tests passed with {requirement.specifier}; training needs it",
            fix=f'pip install --constraint constraints.txt "{_plain(requirement)}"',
        )
    if present:
        yield Finding(
            title="packages",
            status=Status.OK,
            found=", ".join([f"{PACKAGE} {own().version}", *present]),
            meaning="within the tested ranges",
        )


def conflicts() -> Iterator[Finding]:
    """Whether each package that is needed, however indirectly, has what it asks for itself.

    transformers and datasets refuse at import what does not fit; others fail later, somewhere.
    """
    num_packages = 0
    found = []
    seen: set[str] = {PACKAGE}
    waiting = [r.name for r in requirements(own())]
    while waiting:
        name = waiting.pop()
        if name.lower() in seen:
            continue
        seen.add(name.lower())
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # its own line, or its dependent's, says so
        num_packages += 1
        for requirement in requirements(package):
            version, is_fit = installed(requirement)
            waiting.append(requirement.name)
            if not is_fit:
                found.append((name, requirement, version))
    for name, requirement, version in found:
        yield Finding(
            title=name,
            status=Status.WARNING,
            found=f"asks for {_plain(requirement)}, and there is {version or 'none'}",
            meaning="a run may fail at any point that comes to it",
            fix=f'pip install "{_plain(requirement)}"',
        )
    if not found:
        yield Finding(
            title="conflicts",
            status=Status.OK,
            found=f"none among {num_packages} packages",
            meaning="each has what it asks for",
        )


def extras() -> Iterator[Finding]:
    """Packages that single commands need."""
    for extra, command in EXTRAS.items():
        needed = requirements(own(), extra)
        states = [(requirement, *installed(requirement)) for requirement in needed]
        missing = [r.name if v is None else f"{r.name} {v}" for r, v, fits in states if not fits]
        if missing:
            yield Finding(
                title=extra,
                status=Status.NOTE,
                found=f"missing or outside of its range: {', '.join(missing)}",
                meaning=f"{command} needs it; training does not",
                fix=f'pip install --constraint constraints.txt --editable ".[{extra}]"',
            )
        else:
            yield Finding(
                title=extra,
                status=Status.OK,
                found=", ".join(f"{r.name} {v}" for r, v, _ in states),
                meaning=f"{command} has what it needs",
            )


def own() -> Distribution:
    """This package as it is installed.

    Raises:
        LookupError: if it is not.
    """
    try:
        return distribution(PACKAGE)
    except PackageNotFoundError:
        raise LookupError(
            f"{PACKAGE} is not installed in {sys.prefix}, so nothing says what it was tested with; "
            f"run: {REPAIR}"
        ) from None


def requirements(package: Distribution, extra: str = "") -> list[Requirement]:
    """What a package asks for on this machine, or what one of its extras adds to that."""
    parsed = [Requirement(line) for line in package.requires or []]
    ordinary = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return ordinary
    return [
        r for r in parsed if r.marker and r.marker.evaluate({"extra": extra}) and r not in ordinary
    ]


def installed(requirement: Requirement) -> tuple[str | None, bool]:
    """The version that is installed, and whether it is one of those asked for."""
    try:
        version = distribution(requirement.name).version
    except PackageNotFoundError:
        return None, False
    # A pre-release or a build of one's own (2.9.0+cu130, 5.0.dev0) is judged by its number.
    return version, requirement.specifier.contains(version, prereleases=True)


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"
