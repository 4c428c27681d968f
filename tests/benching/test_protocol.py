"""Everything that one GPU is measured for, in one command, tried at tiny size."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import bench_runs
import pytest
from bench_runs import Bench

from qlora_pl.benching.protocol import MEASUREMENTS, RECORD, Measurement, measure

bench = bench_runs.bench
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs in this process
CHEAPEST = "7b-512"


@pytest.mark.parametrize(
    "name",
    [
        one.name if one.name == CHEAPEST else pytest.param(one.name, marks=pytest.mark.slow)
        for one in MEASUREMENTS
        if "trl" not in one.name
    ],
)
def test_the_protocol_is_rehearsed(bench: Bench, name: str, tmp_path: Path) -> None:
    """What was measured earlier that day is kept: a GPU may be lent for some minutes at a time."""
    path = tmp_path / f"bench-gpu-rehearsal-{datetime.now(UTC):%Y-%m-%d}.json"
    earlier = {"outcome": "measured", "seconds": 3.0}
    path.write_text(json.dumps({"record": RECORD, "measurements": {"earlier": earlier}}))
    code, out, _ = bench("--protocol", "gpu", "--rehearse", "--out", tmp_path, "--only", name)
    record = json.loads(path.read_text())
    assert record["is_rehearsal"]
    assert set(record["measurements"]) == {"earlier", name}
    assert record["measurements"]["earlier"] == earlier
    found = record["measurements"][name]
    assert found["outcome"] == "measured", found
    assert found["result"]["record"].startswith("qlora-pl bench")
    assert found["result"]["environment"]["versions"]["bitsandbytes"]
    where = record["environment"]
    assert where["date"].startswith(f"{datetime.now(UTC):%Y-%m-}")
    assert where["device"]
    assert {"torch", "transformers", "bitsandbytes"} <= set(where["versions"])
    assert code == 0
    assert str(path) in out


def test_a_measurement_that_fails_or_takes_too_long_is_kept_with_what_it_said(
    tmp_path: Path,
) -> None:
    wrong = measure(Measurement("a", "", "x", 8, 60.0), ["--shape", "lama"], tmp_path)
    assert wrong["outcome"] == "failed with exit code 2"
    assert "no model 'lama' is known" in wrong["said"]
    slow = measure(Measurement("b", "", "x", 8, 0.01), ["--shape", "llama-1b"], tmp_path)
    assert slow["outcome"].startswith("not done in")


def test_processes_of_a_measurement_that_takes_too_long_end_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison's own processes would go on computing beside the next measurement."""
    pid_file = tmp_path / "pid"
    (tmp_path / "qlora_pl").mkdir()
    (tmp_path / "qlora_pl" / "__init__.py").write_text("")
    (tmp_path / "qlora_pl" / "__main__.py").write_text(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "child.wait()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = measure(Measurement("c", "", "x", 8, 5.0), [], tmp_path)
    assert found["outcome"] == "not done in 5 s"
    child = int(pid_file.read_text())
    until = time.monotonic() + 10
    while _is_running(child):
        assert time.monotonic() < until, "the child goes on"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"
