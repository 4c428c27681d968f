"""``pytest -m gpu``, whose counts become part of the record."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter

from processes import REPOSITORY, environment

from gpu.place import Findings, Place

RESERVE_SECONDS = 8.0
"""Before the check's own limit, for reading what was said."""
RESULT = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def gpu_tests(place: Place, findings: Findings) -> None:
    """The tests that are marked so, up to the time that they have."""
    log = place.folder / "logs" / "pytest.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-v", "--tb=short"]
    words += ["-p", "no:cacheprovider", f"--basetemp={place.folder / 'pytest'}"]
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(place.limit_seconds - RESERVE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    said = log.read_text(errors="replace")
    results = dict(RESULT.findall(said))
    counts = Counter(results.values())
    findings.note(counts=dict(counts), seconds=time.perf_counter() - started)
    findings.claim("tests were found", bool(results), tail=said[-500:] if not results else "")
    findings.claim(
        "no test failed",
        not counts["FAILED"] and not counts["ERROR"],
        failed=[name for name, result in results.items() if result in ("FAILED", "ERROR")],
    )
    if place.is_rehearsal:
        findings.needs_cuda("every test ran to its end")
        return
    findings.claim(
        "every test ran to its end",
        process.returncode == 0 and counts["PASSED"] > 0,
        exit_code=process.returncode,
    )
