"""What two processes take of the host's memory while they load a base that they share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "sharded_loading.py"
MOST = 1.3
"""Times the packed size, over both processes: parts (1.0), constants that stay whole on each
(0.03), adapters (0.06), and what is worked with."""
WEIGHTS = 0.29e9
"""bitsandbytes takes 14 bytes a weight to quantise a matrix on a CPU: 0.16 GB for a LLaMA's of this
width. Beside fewer layers (0.20 GB packed here) this alone would be above the limit."""


@pytest.mark.slow
def test_two_processes_together_hold_hardly_more_than_the_packed_base() -> None:
    """Peak of anonymous memory (PSS) above the imports', with the copy made now and read."""
    said = subprocess.run(
        [sys.executable, str(BENCHMARK), "--weights", str(WEIGHTS)],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(said.stdout)
    for start in ("made", "read"):
        assert result[start]["peak_over_packed"] <= MOST, (start, result[start]["over_time"])
        assert result[start]["held_bytes"] >= 0.9 * result[start]["packed_bytes"]  # it was measured
