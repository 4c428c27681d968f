"""What keeps ``make test`` short: cases that are marked slow by name, and files that begin first.

Of tests with many cases alike a few stand for the others; ``make test-all`` runs every case.
"""

from __future__ import annotations

import re

SLOW_CASES = (
    # each of these tokenizers takes seconds to build; others of their kinds stay
    r"data/test_\w+\.py::.*\[(qwen|llama3|mistral3)",
    r"data/test_preparation\.py::test_rows_are_the_same_from.*\[(?!cut\]|split)",
    r"modeling/test_families\.py::test_a_killed_run.*\[(?!LLaMA|BLOOM|T5\])",
    r"modeling/test_adapter_kinds\.py::test_a_killed_run.*\[(?!dora-int8|opt-all)",
    r"modeling/test_out_of_memory\.py::.*\[(one pack|token budget|micro_batches)\]",
    r"test_experiments\.py::test_a_shrunken_base.*\[(?!guanaco7b|t5_)",
    r"test_experiments\.py::test_an_experiment_trains_as.*\[(?!guanaco7b|guanaco65b|bloom)",
    r"test_packed_runs\.py::test_a_killed_run.*\[(?!1-packs)",
    r"training/test_auto_batch\.py::test_the_plan_takes_the_largest.*\[[41]",
    r"training/test_auto_batch\.py::test_a_real_pass_has_the_last_word\[1",
    r"training/test_signals\.py::test_a_signal_anywhere.*\[(?!in-a-step|in-a-save)",
    r"training/test_signals\.py::test_a_signal_within_a_window.*\[(?!6|2)",
    r"training/test_signals\.py::test_samples_are_cut_short",
    r"training/test_resume\.py::test_a_resumed_run_ends.*\[(?!mid-epoch|three)",
    r"training/test_resume_layouts\.py::test_a_run_goes_on_with_other.*\[(?!padded)",
    r"test_end_to_end\.py::test_a_run_that_is_told_to_stop_says.*\[2-130\]",
    r"test_end_to_end\.py::test_a_run_that_is_told_to_stop_before",
    r"faults/test_some\.py::.*\[(EIO|torn|checkpoint)",
    r"merging/test_merge\.py::.*\[fp4",
    r"serving/test_command\.py::.*\[sigterm\]",
    r"cli/test_commands\.py::test_no_logger.*\[(?!default)",
)
"""Regular expressions, searched in node ids."""

FIRST = (
    "strategies/test_ddp.py",
    "strategies/test_equality.py",
    "test_exact_gradients_in_runs.py",
    "faults/test_some.py",
    "test_notebook.py",
    "test_end_to_end.py",
    "modeling/test_sharded_optimizer.py",
    "training/test_lost_ranks.py",
    "test_gpu_checks.py",
    "data/test_sharing.py",
    "data/test_windows.py",
)
"""Files of few tests that take long: begun last, they would leave the other worker without work."""

_ANY = re.compile("|".join(SLOW_CASES))


def is_slow_case(node_id: str) -> bool:
    """Whether a test is left to ``make test-all``."""
    return _ANY.search(node_id) is not None


def comes_first(node_id: str) -> bool:
    """Whether a test is of one of ``FIRST``."""
    return any(f"{name}::" in node_id for name in FIRST)
