"""benchmarks/gpu_checks.py, tried at tiny size on the CPU before it ever meets a GPU."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_checks.py"
CLAIMS = {
    "nf4": 36,
    "nccl": 9,
    "ranks": 18,
    "moves": 8,
    "paged": 12,
    "shortage": 3,
    "resume": 3,
    "speed": 3,
    "answers": 2,
    "plan": 3,
    "peaks": 10,
}
"""How many a rehearsal comes to; a check that ended early would have fewer."""
UNSEEN = {"paged": 4, "plan": 1, "peaks": 5}
"""Those of them that need CUDA."""


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*words: object) -> tuple[int, str]:
    process = start(*words)
    said, _ = process.communicate(timeout=1200)
    return process.returncode, said


def record_in(folder: Path) -> dict[str, Any]:
    [path] = folder.glob("*.json")
    assert path.name.startswith("gpu-rehearsal-")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs that several checks compare with."""
    return tmp_path_factory.mktemp("checks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    code, said = run("--out", tmp_path)
    assert code == 2
    assert "--rehearse" in said
    assert list(tmp_path.iterdir()) == []


def test_what_the_time_does_not_suffice_for_is_reported_and_fails(tmp_path: Path) -> None:
    code, said = run("--rehearse", "--minutes", 0.05, "--out", tmp_path)
    record = record_in(tmp_path)
    assert code == 1
    assert not record["passed"]
    assert {check["outcome"] for check in record["checks"].values()} == {"not run"}
    assert said.count("the time is up") == len(record["checks"]) == len(CLAIMS) + 1
    assert record["versions"]["bitsandbytes"]


STAND_IN = """
import json, pathlib, subprocess, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name, folder = words["--check"], pathlib.Path(words["--keep"])
claims = [{"claim": "so it is", "passed": name != "wrong"}]
(folder / f"findings-{name}.json").write_text(json.dumps({"claims": claims, "numbers": {}}))
if name == "endless":
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)", str(folder)])
sys.exit(name == "broken")
"""
"""A program that is asked for checks as gpu_checks.py is."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package beside the script, whose folder is on the path while a test needs it."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        source = getattr(sys.modules[name], "__file__", None) or ""
        if source.startswith(str(SCRIPT.parent)):
            del sys.modules[name]


def test_a_check_that_fails_breaks_or_never_ends_leaves_the_others_alone(
    gpu: Any, tmp_path: Path
) -> None:
    """Lanes side by side; the endless one's own process is ended too, and its findings are kept."""
    check, record, running = (gpu(f"gpu.{name}") for name in ("place", "record", "running"))
    lanes = [["right", "wrong", "last"], ["broken"], ["endless", "after"]]
    limits = {"endless": 3.0}
    checks = [
        [check.Check(name, "", "", limits.get(name, 60.0), name) for name in lane] for lane in lanes
    ]
    program = tmp_path / "program.py"
    program.write_text(STAND_IN)
    kept = record.Record(tmp_path / "out", [c for lane in checks for c in lane], False)
    runner = running.Runner(kept, tmp_path, program, 600.0)
    runner.side_by_side(checks)
    [path] = (tmp_path / "out").glob("gpu-2*.json")
    found = json.loads(path.read_text())
    assert {name: c["outcome"] for name, c in found["checks"].items()} == {
        "right": "passed",
        "wrong": "failed",
        "last": "passed",
        "broken": "failed",
        "endless": "timed out",
        "after": "passed",
    }
    assert not found["passed"]
    assert found["checks"]["endless"]["claims"]
    assert processes_that_name(tmp_path) == []


@pytest.mark.parametrize(
    ("exit_code", "passed", "outcome"),
    [
        (0, [True, None], "passed"),
        (0, [True, False], "failed"),
        (1, [True], "failed"),
        (0, [], "failed"),
        (0, [None], "needs CUDA"),
    ],
)
def test_a_check_passes_only_if_it_has_shown_something(
    gpu: Any, exit_code: int, passed: list[bool | None], outcome: str
) -> None:
    claims = [{"claim": "", "passed": value} for value in passed]
    assert gpu("gpu.running").judge(exit_code, claims) == outcome


def test_the_digest_of_packed_bytes_sees_one_bit(gpu: Any, tiny_base: Path) -> None:
    from adapter_runs import load

    notes = gpu("gpu.notes")
    model = load(tiny_base).model
    before = notes.packed_digest(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert notes.packed_digest(model) == before
    weight.data.view(-1)[-1] ^= 1
    assert notes.packed_digest(model) != before
    sizes = notes.base_bytes(model)
    assert 2 * sizes["packed"] == sizes["packed_weights"]
    assert notes.packed_types(model).keys() == {"torch.uint8"}


@pytest.mark.slow
def test_sigterm_ends_the_runs_of_a_check_and_leaves_the_record(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    process = start("--rehearse", "--only", "ranks", "--out", tmp_path / "out", "--keep", keep)
    until = time.monotonic() + 60
    while not list(keep.glob("logs/*/log-0.txt")) and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert record_in(tmp_path / "out")["checks"]["ranks"]["outcome"] == "interrupted"
    assert processes_that_name(keep) == []


def processes_that_name(folder: Path) -> list[str]:
    """Command lines of this machine in which a folder occurs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if str(folder) in words:
            found.append(words)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_a_check_passes_its_rehearsal(name: str, shared: Path, tmp_path: Path) -> None:
    code, said = run(
        "--rehearse", "--only", name, "--minutes", 15, "--out", tmp_path, "--keep", shared
    )
    check = record_in(tmp_path)["checks"][name]
    assert check["outcome"] == "passed", said
    assert code == 0
    assert len(check["claims"]) == CLAIMS[name]
    unseen = [claim for claim in check["claims"] if claim["passed"] is None]
    assert len(unseen) == UNSEEN.get(name, 0)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_tests_that_need_a_gpu_are_counted_and_left_out(tmp_path: Path) -> None:
    code, said = run("--rehearse", "--only", "tests", "--out", tmp_path)
    check = record_in(tmp_path)["checks"]["tests"]
    assert (code, check["outcome"]) == (0, "passed"), said
    assert check["numbers"]["counts"].keys() == {"SKIPPED"}
    assert check["numbers"]["counts"]["SKIPPED"] >= 20
