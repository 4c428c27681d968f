"""Versions are held against the package's own metadata, and each can be the wrong one."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest
from broken_world import look, look_at, plant_metadata

from qlora_pl.doctor.finding import Status
from qlora_pl.doctor.installation.packages import untested_platform


def test_what_is_installed_is_within_the_ranges() -> None:
    for name in ("python", "packages", "conflicts"):
        for finding in look(name)[name]:
            assert finding.status is Status.OK, finding
    [packages] = look("packages")["packages"]
    for name in ("torch", "bitsandbytes", "peft"):
        assert f"{name} {distribution(name).version}" in packages.found


def test_a_version_outside_of_its_range_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_metadata(tmp_path, monkeypatch, "peft", "0.1.0")
    wrong, rest = look("packages")["packages"]
    assert (wrong.title, wrong.status, wrong.found) == ("peft", Status.BROKEN, "0.1.0")
    assert wrong.fix == 'pip install --constraint constraints.txt "peft>=0.19"'
    assert "peft" not in rest.found


def test_a_package_that_is_not_there_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["Requires-Python: >=3.11", "Requires-Dist: no-such-package>=1.5"]
    plant_metadata(tmp_path, monkeypatch, "qlora-pl", "0.1.0", *needs)
    missing = look_at("packages")
    assert (missing.status, missing.found) == (Status.BROKEN, "not installed")
    assert '"no-such-package>=1.5"' in missing.fix


def test_another_python_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_metadata(tmp_path, monkeypatch, "qlora-pl", "0.1.0", "Requires-Python: >=3.99")
    finding = look_at("python")
    assert finding.status is Status.BROKEN
    assert ">=3.99" in finding.meaning


def test_packages_that_contradict_each_other_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wants = ["Requires-Dist: torch>=99", 'Requires-Dist: nothing-here; extra == "more"']
    plant_metadata(tmp_path, monkeypatch, "peft", "0.19.0", *wants)
    [finding] = look("conflicts")["conflicts"]
    assert (finding.title, finding.status) == ("peft", Status.WARNING)
    assert finding.found.startswith("asks for torch>=99, and there is ")


def test_a_missing_extra_is_worth_knowing_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ["Provides-Extra: web", 'Requires-Dist: no-such-page>=1; extra == "web"']
    plant_metadata(tmp_path, monkeypatch, "qlora-pl", "0.1.0", "Requires-Dist: torch", *extra)
    found = {finding.title: finding for finding in look("extras")["extras"]}
    assert found["web"].status is Status.NOTE
    assert "no-such-page" in found["web"].found
    assert found["web"].fix.endswith('".[web]"')


def test_a_package_that_is_not_installed_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_pl.doctor.installation.packages.PACKAGE", "qlora-pl-of-nowhere")
    finding = look_at("packages")
    assert finding.status is Status.BROKEN
    assert "pip install" in finding.found


@pytest.mark.parametrize(
    ("system", "release", "machine", "says"),
    [
        ("Linux", "6.1.0", "x86_64", ""),
        ("Linux", "6.1.0", "aarch64", "aarch64"),
        ("Linux", "5.15.90.1-microsoft-standard-WSL2", "x86_64", "WSL"),
        ("Darwin", "24.1.0", "arm64", "macOS"),
        ("Windows", "11", "AMD64", "Windows"),
    ],
)
def test_platforms_that_no_test_has_seen_are_said(
    system: str, release: str, machine: str, says: str
) -> None:
    """Strings as ``platform`` gives them there."""
    said = untested_platform(system, release, machine)
    assert says in said
    assert bool(says) == bool(said)
