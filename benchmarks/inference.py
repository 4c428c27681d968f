"""What answers cost, against transformers and PEFT, in one command on CPU or GPU.

    python benchmarks/inference.py --adapter DIR [--base DIR] [--rows FILE] [--out FILE]
    python benchmarks/inference.py --quick

Without --adapter a random one is made over a synthetic base. Contenders take turns within one run;
quote ratios of medians, with the spread of repeats beside them. --quick tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import REPOSITORY
from quickstart import environment
from synthetic import save_adapter, save_base

sys.path.insert(0, str(REPOSITORY))

PARTS = ("speed", "kinds", "start")


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapter", type=Path, help="folder of a trained adapter")
    parser.add_argument("--base", help="where its base lies, if not where its manifest says")
    parser.add_argument("--rows", type=Path, help="questions and answers, as JSON lines")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for synthetic bases; default: a temporary one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny, to try this script")
    given = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given.quick:
        given.prompts, given.tokens, given.repeats = min(given.prompts, 8), 4, 1
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        os.environ.setdefault("QLORA_PL_CACHE", str(Path(temporary) / "cache"))
        report = measure(given, Path(temporary))
    print(tables(report))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every part that is asked for, in the order of ``PARTS``."""
    import torch
    from inference_speed import Task, kinds, speed
    from transformers.utils import logging

    logging.disable_progress_bar()
    adapter, base = adapter_and_base(given, folder)
    task = Task(
        adapter=adapter,
        base=base,
        num_prompts=given.prompts,
        num_tokens=given.tokens,
        repeats=given.repeats,
    )
    has_cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "environment": environment()
        | {
            "gpu": torch.cuda.get_device_name() if has_cuda else None,
            "load_average": os.getloadavg(),
            "threads": torch.get_num_threads(),
        },
        "adapter": "synthetic" if given.adapter is None else adapter.parent.parent.name,
        "prompts": given.prompts,
        "tokens": given.tokens,
        "repeats": given.repeats,
    }
    if "speed" in given.parts:
        report["speed"] = speed(task, given.rows)
    if "kinds" in given.parts:
        report["kinds"] = kinds(task, given.rows)
    if "start" in given.parts:
        report["start"] = starts(adapter, base, given.repeats)
    return report


def adapter_and_base(given: argparse.Namespace, folder: Path) -> tuple[Path, str]:
    """What is asked; a random adapter over a random base where none is named."""
    if given.adapter is None:
        size = {"num_weights": 5.0e5, "width": 128, "inner": 256} if given.quick else {}
        save_base(folder / "base", **size)
        return save_adapter(folder / "adapter", folder / "base"), str(folder / "base")
    manifest = given.adapter / "manifest.json"
    named = json.loads(manifest.read_text())["base"]["name"] if manifest.is_file() else None
    return given.adapter, given.base or named


def starts(adapter: Path, base: str, repeats: int) -> dict[str, Any]:
    """Seconds to the first token; a first, uncounted run of each fills caches."""
    from inference_start import BACKENDS, measure

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in BACKENDS}
    for repeat in range(repeats + 1):
        for name in BACKENDS:
            found = measure(name, adapter, base)
            if repeat:
                runs[name].append(found)
    return {
        name: {
            part: {
                "median": statistics.median(run[part] for run in found),
                "all": [run[part] for run in found],
            }
            for part in found[0]
        }
        for name, found in runs.items()
    }


def tables(report: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    lines = []
    for size in report.get("speed", {}).get("batch_sizes", []):
        rates = {n: f"{rate['median']:.1f}" for n, rate in size["tokens_per_second"].items()}
        ratios = {
            n: f"{ratio['median']:.2f} ({', '.join(f'{p:.2f}' for p in ratio['pairs'])})"
            for n, ratio in size["ours_over"].items()
        }
        alone = {n: f"{one['differ']}/{one['of']}" for n, one in size["against_alone"].items()}
        lines.append(
            f"batch {size['batch_size']}: tokens/s {rates}; ours over theirs {ratios}; "
            f"answers other than alone {alone}"
        )
    for size in report.get("kinds", {}).get("batch_sizes", []):
        rates = {n: f"{rate['median']:.1f}" for n, rate in size["tokens_per_second"].items()}
        lines.append(
            f"batch {size['batch_size']}: tokens/s {rates}; answers that differ "
            f"{size['answers']['differ']}/{size['answers']['of']}"
        )
    for name, parts in report.get("start", {}).items():
        shown = {part: f"{value['median']:.2f}" for part, value in parts.items()}
        lines.append(f"start of {name}: seconds {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
