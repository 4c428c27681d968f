"""What reading, encoding, keeping and packing rows costs, as ratios within one run.

    python benchmarks/data.py --tokenizer FOLDER [--rows 52000] [--most 1000000]

Rows are synthetic, of Alpaca's lengths. Encoding is held against the tokenizer alone over the same
texts, two processes against one, and memory and seconds against the number of rows.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "model",
    "adapter",
    "quantised",
    "weights",
    "training",
    "a",
    "small",
    "number",
    "every",
    "layer",
    "because",
    "gradient",
    "rank",
    "question",
    "answer",
    "example",
    "language",
    "town",
    "river",
    "seven",
    "describe",
    "explain",
    "why",
    "how",
    "many",
    "result",
]


def rows(number: int) -> Iterator[dict[str, str]]:
    """Instructions and answers, log-normal in length as Alpaca's (median of about 60 words)."""
    chosen = np.random.default_rng(0)
    for place in range(number):
        asked, answered = chosen.lognormal((2.6, 3.9), (0.5, 0.8)).astype(int) + 1
        words = chosen.choice(WORDS, min(asked + answered, 2000))
        yield {
            "instruction": f"{place}: {' '.join(words[:asked])}?",
            "output": " ".join(words[asked:]) + ".",
        }


def write_rows(path: Path, number: int) -> None:
    """A JSONL file of so many rows."""
    with path.open("w") as file:
        for row in rows(number):
            file.write(json.dumps(row) + "\n")


def make_encoder(tokenizer: str, template: str) -> Any:
    """The encoder of a tokenizer and a template."""
    from qlora_pl.data.encoding.encoder import Encoder
    from qlora_pl.data.encoding.tokenizer import load_tokenizer
    from qlora_pl.data.templates.loading import load_template

    loaded = load_tokenizer(tokenizer)
    return Encoder(load_template(template, loaded), loaded)


def seconds(run: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def encoding(tokenizer: str, template: str, number: int, repeats: int) -> dict[str, float]:
    """Encoding against the tokenizer alone; medians of interleaved repeats."""
    from qlora_pl.data.conversation import Conversation, Message

    encoder = make_encoder(tokenizer, template)
    conversations = [
        Conversation((Message("user", row["instruction"]), Message("assistant", row["output"])))
        for row in rows(number)
    ]
    texts = [rendered[0].text for _, rendered in encoder.render(conversations)]
    chunks = [slice(start, start + 512) for start in range(0, number, 512)]

    def tokenize() -> None:
        for chunk in chunks:
            encoder.tokenizer(texts[chunk], add_special_tokens=False)

    def render() -> None:
        for chunk in chunks:
            encoder.render(conversations[chunk])

    def encode() -> None:
        for chunk in chunks:
            encoder.encode(conversations[chunk])

    encode()
    found = [(seconds(tokenize), seconds(render), seconds(encode)) for _ in range(repeats)]
    alone, rendering, whole = (statistics.median(times) for times in zip(*found, strict=True))
    speeds = [alone / (whole - rendering) for alone, rendering, whole in found]
    return {
        "microseconds_per_row_tokenizer": 1e6 * alone / number,
        "microseconds_per_row_rendering": 1e6 * rendering / number,
        "microseconds_per_row_whole": 1e6 * whole / number,
        "speed_against_tokenizer": statistics.median(speeds),
        "rendering_share_of_tokenizer": statistics.median(r / a for a, r, _ in found),
    }


def processes(tokenizer: str, number: int, repeats: int) -> dict[str, float]:
    """Two processes against one, from rows in a file to rows on disk."""
    from qlora_pl.data.encoding.lengths import Limits
    from qlora_pl.data.reading.sources import RowSources
    from qlora_pl.data.rows.preparation import prepare_split

    encoder = make_encoder(tokenizer, "auto")
    limits = Limits(max_length=2048, max_lost_ratio=1.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, number)
        sources = RowSources.parse(str(path))

        def prepare(number_of_processes: int, cache: Path | None = None) -> None:
            prepare_split(sources, encoder, limits, "data.x", cache, number_of_processes)

        one = [seconds(lambda: prepare(1)) for _ in range(repeats)]
        two = [seconds(lambda: prepare(2)) for _ in range(repeats)]
        kept = Path(folder) / "cache"
        first = seconds(lambda: prepare(1, kept))
        again = [seconds(lambda: prepare(1, kept)) for _ in range(repeats)]
        texts = [rendered.text for rendered in _rendered(encoder, path)]
        alone = [
            seconds(lambda: encoder.tokenizer(texts, add_special_tokens=False))
            for _ in range(repeats)
        ]
    return {
        "rows": number,
        "seconds_one_process": statistics.median(one),
        "seconds_two_processes": statistics.median(two),
        "speed_of_two_processes": statistics.median(one) / statistics.median(two),
        "seconds_tokenizer_alone": statistics.median(alone),
        "seconds_beyond_tokenizer": statistics.median(one) - statistics.median(alone),
        "seconds_first_with_cache": first,
        "seconds_from_cache": statistics.median(again),
    }


def _rendered(encoder: Any, path: Path) -> list[Any]:
    from qlora_pl.data.reading.normalizing import read_conversations
    from qlora_pl.data.reading.sources import RowSources

    conversations = [c for _, c in read_conversations(RowSources.parse(str(path)))]
    return [rendered[0] for _, rendered in encoder.render(conversations)]


def scaling(tokenizer: str, most: int) -> list[dict[str, float]]:
    """Seconds and memory against the number of rows, each in a process of its own."""
    table = []
    number = 1000
    while number <= most:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "rows.jsonl", number)
            command = [sys.executable, __file__, "--child", folder, "--tokenizer", tokenizer]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
        table.append({"rows": number, **json.loads(answer.stdout.splitlines()[-1])})
        print(json.dumps(table[-1]), flush=True)
        number *= 10
    return table


def child(folder: Path, tokenizer: str) -> None:
    """Prepare the rows of a folder twice, watching anonymous memory."""
    from qlora_pl.data.encoding.lengths import Limits
    from qlora_pl.data.reading.sources import RowSources
    from qlora_pl.data.rows.preparation import prepare_split

    encoder = make_encoder(tokenizer, "auto")
    encoder.encode([])
    sources = RowSources.parse(str(folder / "rows.jsonl"))
    limits = Limits(max_length=2048, max_lost_ratio=1.0)
    start, peak, stop = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        first = seconds(lambda: prepare_split(sources, encoder, limits, "x", folder / "c", 1))
        again = seconds(lambda: prepare_split(sources, encoder, limits, "x", folder / "c", 1))
    finally:
        stop.set()
        thread.join()
    found = {"seconds": first, "seconds_from_cache": again, "mib_above_start": peak[0] - start}
    print(json.dumps(found))


def _anonymous() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def packing() -> list[dict[str, float]]:
    """Waste of packs on log-normal lengths, and the seconds that a million take."""
    from qlora_pl.data.batches.packing import pack_rows

    table = []
    for median, sigma in ((90, 0.62), (300, 0.75)):
        for capacity in (512, 2048):
            for number in (50_000, 1_000_000):
                drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, number)
                lengths = np.clip(drawn.astype(np.int64), 1, capacity)
                start = time.perf_counter()
                generator = np.random.default_rng(0)
                packs = pack_rows(lengths, np.arange(number), capacity, generator)
                taken = time.perf_counter() - start
                table.append(
                    {
                        "median": median,
                        "capacity": capacity,
                        "rows": number,
                        "packs": len(packs),
                        "waste": 1 - float(lengths.sum()) / (len(packs) * capacity),
                        "least_waste": 1
                        - float(lengths.sum()) / (-(-int(lengths.sum()) // capacity) * capacity),
                        "seconds": taken,
                    }
                )
    return table


def main() -> None:
    """Run everything and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default=".cache/quickstart/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--most", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.tokenizer)
        return
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors",
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "numpy")},
    }
    for template in ("chat", "alpaca"):
        found = encoding(arguments.tokenizer, template, 8192, arguments.repeats)
        result[f"encoding_{template}"] = found
    result["processes"] = processes(arguments.tokenizer, arguments.rows, 3)
    result["packing"] = packing()
    result["scaling"] = scaling(arguments.tokenizer, arguments.most)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
