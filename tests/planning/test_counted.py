"""What ``plan_memory`` predicts is what exists: bytes of real tiny models that take one step.

The counting is ``benchmarks/memory_plan.py``'s, which knows nothing of the formulas: it looks at
parameters, at optimizer state, and at every storage that an operation of torch makes.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from qlora_pl.planning.memory import activations, attention, layers, tape
from qlora_pl.planning.memory.memory_plan import plan_memory
from qlora_pl.planning.shapes.model_shape import shape_from_config

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
TOLERANCE = 0.02
"""Of what is kept. Every tensor of a layer has its term; what has none is one value a row here and
there (counts, weights of losses), and copies that a kernel makes for some layouts only. Five per
cent are promised; at two, a term that is missing is noticed."""
PEAK_TOLERANCE = 0.08
"""Of the most that exists at a time. In which order gradients within a layer are made and freed is
autograd's affair; small ones (of norms, of a head's part) meet others that have no term."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*"),  # models are loaded in this process
]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("memory_plan")


ORDINARY = {
    "llama",
    "llama, adapter_dtype bfloat16",
    "llama, dropout 0.1",
    "llama, attention eager, has_mask True, dropout 0.05",
    "llama, gradient_checkpointing True",
    "llama, quant_type none",
    "llama, method dora",
    "llama, quant_type none, method none",
    "mistral, has_mask True, adapter_dtype bfloat16",
    "gpt_neox, gradient_checkpointing True",
    "bloom, dropout 0.1, adapter_dtype bfloat16",
    "falcon",
    "gpt2, resid_pdrop 0.0, embd_pdrop 0.0, attn_pdrop 0.0",
    "t5, has_mask True",
}
"""What ``make test`` counts; the other cases take another half minute."""


def _cases() -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        cases = importlib.import_module("memory_plan").CASES
    assert {case.name for case in cases} >= ORDINARY
    return [
        pytest.param(case, id=case.name, marks=[] if case.name in ORDINARY else pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize("case", _cases())
def test_predicted_bytes_are_those_that_are_counted(
    case: Any, benchmark: Any, tmp_path: Path
) -> None:
    found = benchmark.compare(case, tmp_path)
    wrong = {name: pair for name, pair in found.exact.items() if pair[0] != pair[1]}
    assert wrong == {}
    assert abs(found.error) <= TOLERANCE, found.kept
    assert abs(found.peak_error) <= PEAK_TOLERANCE, found.peak


# -- the committed counts of all settings ----------------------------------------------------------

RESULTS = max((BENCHMARKS / "results").glob("memory-plan-cpu-*.json"))
COUNTED = json.loads(RESULTS.read_text())["cases"]


def kept_by_plan(case: Any) -> int:
    plan = plan_memory(shape_from_config(case.fields), case.training)
    return plan.activations.kept(case.training.gradient_checkpointing)


def test_the_committed_counts_are_of_these_settings_and_this_plan(benchmark: Any) -> None:
    """Counting all settings takes a minute; what the plan says of them, no time."""
    assert [case["name"] for case in COUNTED] == [case.name for case in benchmark.CASES]
    assert len(COUNTED) >= 12
    for case, found in zip(benchmark.CASES, COUNTED, strict=True):
        said, counted = found["kept"]
        assert kept_by_plan(case) == said, case.name
        assert abs(said / counted - 1) <= TOLERANCE
        assert all(predicted == exact for predicted, exact in found["exact"].values())


MODULES = (tape, attention, layers, activations)
UNNOTICED = {
    tape.__name__: {
        "self.keep(x)",  # of int8, whose adapters keep it too
        "self.keep(self.new(x.size, x.item))",  # T5's norms where every weight is trained
    }
}
"""Terms that no setting can tell or does."""


NOT_COUNTED = "_generic"
"""What is assumed of a family whose layers are not written down; no setting is of one."""
LEAST = 1e-4
"""Of what is kept, by which a term must bring the plan nearer to the count in some setting."""


def terms(module: ModuleType) -> list[ast.Expr]:
    """The statements that say what is kept, in their order."""
    return [
        node
        for function in ast.walk(ast.parse(Path(module.__file__ or "").read_text()))
        if isinstance(function, ast.FunctionDef) and function.name != NOT_COUNTED
        for node in ast.walk(function)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "keep"
    ]


@contextmanager
def without(module: ModuleType, line: int) -> Iterator[None]:
    """A module without the term that begins on a line."""

    class Without(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST:
            return ast.copy_location(ast.Pass(), node) if node.lineno == line else node

    source = Path(module.__file__ or "").read_text()
    changed: dict[str, Any] = {"__name__": module.__name__}
    tree = ast.fix_missing_locations(Without().visit(ast.parse(source)))
    exec(compile(tree, str(module.__file__), "exec"), changed)
    own = {name: vars(module)[name] for name in changed if name in vars(module)}
    codes: list[tuple[FunctionType, Any]] = []
    for name, old in own.items():
        pairs = [(old, changed[name])]
        if isinstance(old, type):
            pairs = [(vars(old)[key], value) for key, value in vars(changed[name]).items()]
        for before, after in pairs:
            if isinstance(before, FunctionType) and before.__module__ == module.__name__:
                codes.append((before, before.__code__))
                before.__code__ = after.__code__
    try:
        yield
    finally:
        for function, code in codes:
            function.__code__ = code


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_term_that_is_missing_is_noticed_in_some_setting(
    module: ModuleType, benchmark: Any
) -> None:
    def errors() -> list[float]:
        return [
            abs(kept_by_plan(case) / found["kept"][1] - 1)
            for case, found in zip(benchmark.CASES, COUNTED, strict=True)
        ]

    usual = errors()
    assert terms(module)
    unnoticed = []
    for term in terms(module):
        with without(module, term.lineno):
            worse = max(now - before for now, before in zip(errors(), usual, strict=True))
        if worse <= LEAST:
            unnoticed.append(ast.unparse(term))
    assert errors() == usual
    assert set(unnoticed) == UNNOTICED.get(module.__name__, set())
