"""Who may import whom: the table of docs/architecture.md, held file by file.

The tests read the imports with ``ast``, those inside functions included.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qlora_pl"
FILES = sorted(PACKAGE.rglob("*.py"))
DATA = [
    "conversation",
    "places",
    "cells",
    "turns",
    "oasst_trees",
    "formats",
    "named_datasets",
    "data_files",
    "source_config",
    "sources",
    "compressed",
    "row_files",
    "sampling",
    "readers",
    "source_digest",
    "normalizing",
    "template_texts",
    "templates",
    "chat_template",
    "template_loading",
    "special_tokens",
    "tokenizer",
    "stop_tokens",
    "tokenization",
    "encoded_example",
    "lengths",
    "encoding",
    "original_encoding",
    "seq2seq",
    "encoder_choice",
    "encoded_rows",
    "audit",
    "row_store",
    "chunks",
    "encode_stream",
    "preparation",
    "packing",
    "ordering",
    "collation",
    "pair_batches",
    "splits",
    "batching",
    "continuing",
    "setting_checks",
]
"""The files of the journey; each may import those that stand before it."""

HEAVY = {
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "datasets",
    "torchmetrics",
    "tensorboard",
    "jsonargparse",
    "numpy",
    "yaml",
    "pyarrow",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "tqdm",
}
MAY_USE: dict[str, set[str]] = {
    "__main__": set(),
    "__init__": set(),
    "errors": set(),
    "files": {"torch"},
    "batch": {"torch"},
    "parsing": {"yaml"},
    "quickstart": {"torch", "transformers", "tokenizers"},
    "cli": {"lightning", "jsonargparse"},
    "key_reference": {"yaml"},
    "data": {"torch", "numpy", "transformers", "datasets", "pyarrow", "yaml"},
    "data.tokenization": {"tokenizers"},
    "data.preparation": {"numpy", "tqdm"},
    "data.datamodule": {"torch", "numpy", "lightning"},
    "modeling": {"torch", "transformers", "numpy", "tqdm", "huggingface_hub", "safetensors"},
    "modeling.adapters": {"torch", "peft"},
    "modeling.adapter_start": {"torch", "peft", "safetensors", "huggingface_hub"},
    "modeling.dora": {"torch", "peft"},
    "modeling.eva": {"torch", "peft"},
    "modeling.parameters": {"torch", "peft"},
    "modeling.replacement": {"torch", "transformers", "bitsandbytes"},
    "modeling.mixed_precision": {"torch", "lightning"},
    "modeling.optimizers": {"torch", "bitsandbytes"},
    "modeling.module": {"torch", "lightning", "torchmetrics"},
    "training": {"torch", "numpy", "lightning", "peft", "yaml"},
    "inspection": {"numpy"},
    "inspection.duplicates": {"numpy", "tqdm"},
    "inspection.policies": {"numpy", "tqdm"},
    "inspection.command": set(),
}
LAYERS: dict[str, set[str]] = {
    "__main__": {"cli", "inspection", "errors", "__init__"},
    "__init__": {"data", "modeling", "training", "errors", "batch"},
    "errors": set(),
    "files": {"errors"},
    "batch": set(),
    "parsing": {"errors"},
    "quickstart": {"errors"},
    "cli": {"data", "modeling", "training", "errors", "parsing"},
    "key_reference": {"cli", "data"},
    "data": {"data", "errors", "batch", "files"},
    "modeling": {"modeling", "errors", "batch", "files"},
    "training": {"training", "modeling", "data", "errors", "batch", "files"},
    "inspection": {"inspection", "cli", "data", "errors", "batch", "files", "__init__"},
}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, ``TYPE_CHECKING`` blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where a name comes from"
            found.add(str(node.module))
    return found


def rule(name: str, table: dict[str, set[str]]) -> set[str]:
    """The narrowest rule that applies to a module."""
    for length in range(len(name.split(".")), 0, -1):
        key = ".".join(name.split(".")[:length])
        if key in table:
            return table[key]
    raise AssertionError(f"{name} has no place in the table; give it one, there and in the docs")


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_a_file_imports_only_what_its_layer_allows(file: Path) -> None:
    name = module_name(file)
    own = {
        found.removeprefix("qlora_pl").lstrip(".") for found in imports(file) if "qlora_pl" in found
    }
    rooms = {found.split(".")[0] or "__init__" for found in own}
    allowed = rule(name.split(".")[0], LAYERS)
    assert rooms <= allowed, f"{name} imports {rooms - allowed}"


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_a_file_uses_only_the_libraries_of_its_layer(file: Path) -> None:
    name = module_name(file)
    used = {found.split(".")[0] for found in imports(file)} & HEAVY
    assert used <= rule(name, MAY_USE), f"{name} uses {used - rule(name, MAY_USE)}"


@pytest.mark.parametrize("place", range(len(DATA)), ids=DATA)
def test_the_files_of_the_journey_import_only_earlier_ones(place: int) -> None:
    own = {f.split(".")[-1] for f in imports(PACKAGE / f"data/{DATA[place]}.py") if "data." in f}
    assert own <= set(DATA[:place])


def test_every_file_opens_with_its_sentence_and_stays_readable() -> None:
    for file in FILES:
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), f"{file}: what is it for?"
        assert len(file.read_text().splitlines()) <= 400, f"{file}: is it still one sentence?"


def test_every_public_name_is_documented() -> None:
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file}: {node.name}"
