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
    "reading.places",
    "reading.cells",
    "reading.turns",
    "reading.oasst_trees",
    "reading.formats",
    "reading.named_datasets",
    "reading.data_files",
    "reading.source_config",
    "reading.sources",
    "reading.compressed",
    "reading.row_files",
    "reading.sampling",
    "reading.readers",
    "reading.source_digest",
    "reading.normalizing",
    "templates.wording",
    "templates.template",
    "templates.chat_template",
    "templates.loading",
    "templates.joints",
    "templates.example_conversations",
    "encoding.special_tokens",
    "encoding.tokenizer",
    "encoding.stop_tokens",
    "encoding.tokenization",
    "encoding.example",
    "encoding.lengths",
    "encoding.encoder",
    "encoding.served_template",
    "encoding.original_encoding",
    "encoding.seq2seq",
    "encoding.encoder_choice",
    "rows.encoded_rows",
    "rows.audit",
    "rows.row_store",
    "rows.chunks",
    "rows.encode_stream",
    "rows.preparation",
    "batches.packing",
    "batches.global_batch",
    "batches.ordering",
    "batches.collation",
    "batches.pair_batches",
    "batches.largest_batch",
    "splits",
    "windows",
    "batches.batching",
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
    "starlette",
    "uvicorn",
    "tqdm",
    "gradio",
    "matplotlib",
}
MAY_USE: dict[str, set[str]] = {
    "__main__": set(),
    "allocator": set(),
    "commands": set(),
    "__init__": set(),
    "errors": set(),
    "files": {"torch"},
    "redaction": set(),
    "batch": {"torch"},
    "parsing": {"yaml"},
    "quickstart": {"torch", "transformers", "tokenizers"},
    "cli": {"lightning", "jsonargparse"},
    "run_checks": {"jsonargparse"},
    "key_reference": {"yaml"},
    "data": {"torch", "numpy", "transformers", "datasets", "pyarrow", "yaml"},
    "data.encoding.tokenization": {"tokenizers"},
    "data.rows.preparation": {"numpy", "tqdm"},
    "data.datamodule": {"torch", "numpy", "lightning"},
    "data.sharing": {"torch", "lightning"},
    "modeling": {"torch", "transformers", "numpy", "tqdm", "huggingface_hub", "safetensors"},
    "modeling.adapters.lora": {"torch", "peft"},
    "modeling.adapters.adapter_start": {"torch", "peft"},
    "modeling.folders.peft_folder": {"torch", "safetensors", "huggingface_hub"},
    "modeling.adapters.dora": {"torch", "peft"},
    "modeling.adapters.eva": {"torch", "peft"},
    "modeling.adapters.late_start": {"torch", "peft"},
    "modeling.adapters.settled": {"torch", "peft"},
    "modeling.parameters": {"torch", "peft"},
    "modeling.loading.replacement": {"torch", "transformers", "bitsandbytes"},
    "modeling.optimization.mixed_precision": {"torch", "lightning"},
    "modeling.loading.packed_cache": {"torch", "safetensors"},
    "modeling.loading.packed_model": {"torch", "transformers", "bitsandbytes", "safetensors"},
    "modeling.loading.spread_loading": {"torch", "accelerate"},
    "modeling.optimization.optimizers": {"torch", "bitsandbytes"},
    "modeling.module": {"torch", "lightning"},
    "modeling.module_checkpoint": {"torch", "lightning"},
    "modeling.steps.split_loss": {"torch", "torchmetrics"},
    "strategies": {"torch", "lightning"},
    "training": {"torch", "numpy", "lightning", "peft", "yaml"},
    "doctor": set(),
    "doctor.devices.torch_devices": {"torch"},
    "doctor.arithmetic.four_bits": {"torch", "bitsandbytes"},
    "doctor.arithmetic.gradients": {"torch", "bitsandbytes"},
    "doctor.contact.hub": {"huggingface_hub"},
    "doctor.arithmetic.openmp": {"torch"},
    "doctor.arithmetic.products": {"torch"},
    "doctor.contact.ranks": {"torch"},
    "doctor.devices.segments": {"torch"},
    "explaining": set(),
    "explaining.collecting": {"lightning"},
    "inference": {"torch", "numpy", "tqdm"},
    "inference.machine": {"torch", "accelerate"},
    "inference.loading": {"torch", "peft", "bitsandbytes"},
    "chat": {"torch"},
    "chat.page": {"gradio"},
    "chat.website": {"gradio", "starlette"},
    "serving": {"numpy", "starlette", "uvicorn"},
    "merging": {"torch", "numpy", "safetensors", "transformers", "tqdm"},
    "merging.requantizing": {"torch", "bitsandbytes"},
    "merging.weights": {"torch", "bitsandbytes"},
    "exporting": {"torch", "numpy", "safetensors"},
    "exporting.answer_settings": {"yaml"},
    "exporting.hub": {"huggingface_hub"},
    "exporting.plain_adapter": {"torch", "peft", "safetensors"},
    "inspection": {"numpy"},
    "inspection.data.duplicates": {"numpy", "tqdm"},
    "inspection.data.policies": {"numpy", "tqdm"},
    "inspection.command": set(),
    "smoke": set(),
    "smoke.contradictions": {"torch"},
    "smoke.random_base": {"torch", "transformers"},
    "smoke.run_tokenizer": {"torch", "transformers"},
    "smoke.stand_in_tokenizer": {"tokenizers", "transformers"},
    "smoke.worker": {"torch"},
    "smoke.plain_reload": {"torch", "transformers", "peft"},
    "planning": set(),
    "benching": {"torch", "numpy", "lightning"},
    "benching.synthetic": {"torch", "transformers", "bitsandbytes", "tqdm"},
    "benching.device_speed": {"torch", "bitsandbytes"},
    "benching.timer": {"torch", "lightning", "bitsandbytes", "peft"},
    "benching.peers": {"torch", "transformers", "peft", "datasets"},
    "benching.worker": {"safetensors", "transformers", "tokenizers"},
    "benching.command": set(),
    "benching.against": set(),
    "benching.settings": set(),
    "benching.shapes": set(),
    "benching.report": set(),
    "planning.shapes.local_files": {"huggingface_hub"},
    "planning.reports.pictures": {"matplotlib"},
    "planning.runs.run_rows": {"numpy"},
    "inspection.weights": {"torch", "tqdm"},
    "inspection.weights.formats": {"torch", "bitsandbytes"},
    "inspection.adapters": {"torch", "tqdm"},
    "ablation": set(),
    "ablation.command": {"torch"},
    "ablation.grid.resolving": {"tqdm"},
    "ablation.grid.strict_yaml": {"yaml"},
    "ablation.statistics": {"numpy", "scipy", "statsmodels"},
    "ablation.running.ray_cluster": {"ray"},
    "ablation.running.slurm_array": {"submitit"},
    "proof": set(),
    "proof.comparison": {"torch", "safetensors"},
    "proof.verdict": {"torch"},
}
LAYERS: dict[str, set[str]] = {
    "__main__": {"allocator", "cli", "commands", "errors", "redaction", "__init__"},
    "allocator": set(),
    "commands": set(),
    "__init__": {"data", "modeling", "training", "inference", "errors", "batch"},
    "errors": set(),
    "files": {"errors"},
    "redaction": set(),
    "batch": set(),
    "parsing": {"errors"},
    "quickstart": {"errors"},
    "cli": {
        "data",
        "modeling",
        "training",
        "strategies",
        "errors",
        "parsing",
        "redaction",
        "run_checks",
    },
    "run_checks": {"data", "modeling", "training", "strategies", "errors", "parsing", "redaction"},
    "key_reference": {"cli", "run_checks", "data"},
    "data": {"data", "errors", "batch", "files"},
    "modeling": {"modeling", "errors", "batch", "files"},
    "strategies": {"strategies", "planning", "modeling", "errors"},
    "training": {
        "training",
        "planning",
        "modeling",
        "data",
        "errors",
        "batch",
        "files",
        "redaction",
    },
    "doctor": {"doctor", "allocator", "modeling", "files", "errors", "redaction", "__init__"},
    "explaining": {
        "explaining",
        "ablation",
        "commands",
        "key_reference",
        "cli",
        "run_checks",
        "data",
        "modeling",
        "training",
        "inference",
        "files",
        "errors",
    },
    "inference": {"inference", "modeling", "data", "errors", "files"},
    "chat": {"chat", "inference", "modeling", "data", "errors", "files"},
    "serving": {"serving", "chat", "inference", "modeling", "data", "errors"},
    "merging": {"merging", "inference", "modeling", "data", "errors", "files"},
    "exporting": {
        "exporting",
        "merging",
        "inference",
        "modeling",
        "data",
        "errors",
        "files",
        "redaction",
    },
    "inspection": {
        "inspection",
        "cli",
        "run_checks",
        "exporting",
        "inference",
        "merging",
        "modeling",
        "data",
        "errors",
        "batch",
        "files",
        "__init__",
    },
    "planning": {"planning", "cli", "run_checks", "data", "inference", "modeling", "errors"},
    "ablation": {
        "ablation",
        "cli",
        "run_checks",
        "planning",
        "strategies",
        "inspection",
        "inference",
        "data",
        "errors",
        "files",
        "__init__",
    },
    "proof": {"proof", "cli", "run_checks", "training", "data", "errors", "files", "redaction"},
    "benching": {
        "benching",
        "cli",
        "run_checks",
        "training",
        "inference",
        "modeling",
        "data",
        "planning",
        "errors",
        "batch",
        "files",
    },
    "smoke": {
        "smoke",
        "cli",
        "run_checks",
        "planning",
        "proof",
        "inspection",
        "merging",
        "inference",
        "training",
        "modeling",
        "data",
        "errors",
        "redaction",
    },
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
    file = PACKAGE / "data" / f"{DATA[place].replace('.', '/')}.py"
    found = {f for f in imports(file) if f.startswith("qlora_pl.data.")}
    assert {f.removeprefix("qlora_pl.data.") for f in found} <= set(DATA[:place])


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
