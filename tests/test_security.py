"""What a file that somebody sent may do: nothing but be read.

Every attempt is a real one: a file that would make a folder if what is hidden in it were run. The
first of each kind shows that it would.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base

from qlora_pl.__main__ import main
from qlora_pl.errors import AdapterFolderError, CheckpointError, ConfigurationError
from qlora_pl.files import atomic_folder, sha256_file, temporary_folder
from qlora_pl.modeling.adapter_folder import AdapterManifest, read_adapter_folder
from qlora_pl.modeling.adapter_start import locate_adapter, start_at_adapter
from qlora_pl.modeling.identity import refuse_code_from_elsewhere, weight_files
from qlora_pl.modeling.own_files import is_plain_name
from qlora_pl.training.checkpoint_files import VerifiedCheckpointIO

PACKAGE = Path(__file__).parent.parent / "qlora_pl"
FILES = sorted(PACKAGE.rglob("*.py"))
NODES = {file: list(ast.walk(ast.parse(file.read_text()))) for file in FILES}

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

Type = Callable[..., tuple[int, str]]


class Makes:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.folder),)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The folder that hidden code would make."""
    return tmp_path / "the-code-was-run"


@pytest.fixture
def type_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Type:
    """Types a command in an empty folder, with a cache of its own and a yes for every question."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-pl", *map(str, words)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        printed = capsys.readouterr()
        return code, printed.err

    return run


def fit(base: Path, rows: Path, *more: object) -> list[object]:
    words = ["fit", "--model.model_name_or_path", base, "--data.sources", rows, "--model.lora.r", 4]
    short = ["--data.template", "guanaco", "--data.max_length", 64, "--trainer.accelerator", "cpu"]
    return [*words, *short, "--trainer.max_steps", 1, "--samples.num_prompts", 0, *more]


# -- what the code says ----------------------------------------------------------------------------


def calls(name: str) -> list[tuple[str, ast.Call]]:
    """Every call of a function or method of this name in the package."""
    found = []
    for file in FILES:
        for node in NODES[file]:
            if isinstance(node, ast.Call):
                called = node.func
                own = called.attr if isinstance(called, ast.Attribute) else None
                own = called.id if isinstance(called, ast.Name) else own
                if own == name:
                    found.append((f"{file.name}:{node.lineno}", node))
    return found


def owner(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[0]


def test_every_load_of_torch_s_takes_weights_only() -> None:
    loads = [(place, call) for place, call in calls("load") if owner(call) == "torch"]
    assert len(loads) >= 2
    for place, call in loads:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("weights_only") == "True", place


def test_nothing_that_unpickles_or_evaluates_is_imported_or_called() -> None:
    forbidden = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve"}
    forbidden |= {"marshal", "imp", "runpy", "code", "pty"}
    for file in FILES:
        for node in NODES[file]:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), file
            if isinstance(node, ast.keyword):
                assert node.arg not in ("allow_pickle", "shell"), file


def test_weights_only_is_never_off_where_something_is_read() -> None:
    """Lightning's ``dump_checkpoint`` has a parameter of that name too, and reads nothing."""
    for file in FILES:
        for node in NODES[file]:
            if isinstance(node, ast.Call) and "dump_checkpoint" not in ast.unparse(node.func):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert said.get("weights_only") in (None, "True"), f"{file}:{node.lineno}"


def test_numpy_and_yaml_read_only_what_cannot_run() -> None:
    assert not [place for place, call in calls("load") if owner(call) in ("np", "numpy")]
    unsafe = {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}
    for name in unsafe:
        assert not [place for place, call in calls(name) if owner(call) == "yaml"]
    for place, call in calls("compose"):
        assert "SafeLoader" in ast.unparse(call), place


def test_nothing_is_uploaded() -> None:
    """Sending something somewhere must ask first; today nothing does."""
    sends = ("push_to_hub", "upload_file", "upload_folder", "upload_large_folder", "create_repo")
    sends += (
        "create_commit",
        "create_branch",
        "HfApi",
        "CommitScheduler",
        "urlopen",
        "urlretrieve",
    )
    for name in sends:
        assert not calls(name), name
    for file in FILES:
        for node in NODES[file]:
            if isinstance(node, ast.keyword) and node.arg == "push_to_hub":
                raise AssertionError(file)
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node)
                assert not any(client in text for client in ("requests", "httpx", "urllib.request"))


def test_code_of_a_model_may_run_only_where_its_key_says_so() -> None:
    """A call that says nothing asks on the terminal, and takes a "y" for a yes."""
    asking = {"AutoConfig", "AutoTokenizer", "kind", "auto_class(config)"}
    found = [(place, call) for place, call in calls("from_pretrained") if owner(call) in asking]
    found = [(place, call) for place, call in found if not place.startswith("quickstart.py")]
    assert len(found) >= 4
    for place, call in found:
        said = {k.arg: ast.unparse(k.value) for k in call.keywords}
        is_handed_on = said.get(None) == "arguments"  # type: ignore[call-overload]
        assert is_handed_on or "trust_remote_code" in said, place
        assert said.get("trust_remote_code") != "True", place


# -- pickles ---------------------------------------------------------------------------------------


def test_the_trap_works(trap: Path) -> None:
    pickle.loads(pickle.dumps(Makes(trap)))
    assert trap.exists()
    trap.rmdir()
    buffer = trap.with_suffix(".pt")
    torch.save({"x": Makes(trap)}, buffer)
    torch.load(buffer, weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_a_checkpoint_runs_nothing_even_with_a_digest_that_fits(
    tmp_path: Path, trap: Path, by: str
) -> None:
    path = poisoned_checkpoint(tmp_path, trap, by)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        VerifiedCheckpointIO().load_checkpoint(path)
    assert not trap.exists()


def poisoned_checkpoint(folder: Path, trap: Path, by: str) -> Path:
    path = folder / "step-00000001.ckpt"
    content = {"state_dict": {}, "boundary": {"step": 1}, "x": Makes(trap)}
    if by == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256_file(path)}  {path.name}\n")
    return path


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_that_somebody_sent_is_refused_by_each_command(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path, trap: Path, command: str
) -> None:
    path = poisoned_checkpoint(tmp_path, trap, "torch")
    words = fit(tiny_base, rows_file, "--ckpt_path", path)
    code, said = type_in(command, *words[1:])
    assert code == 2, said
    assert "holds more than tensors and plain values" in said
    assert "Traceback" not in said
    assert not trap.exists()


def test_pickled_weights_of_a_base_run_nothing(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path, trap: Path
) -> None:
    base = tmp_path / "sent"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model.embed_tokens.weight": Makes(trap)}, base / "pytorch_model.bin")
    code, said = type_in(*fit(base, rows_file))
    assert code == 2, said
    assert "hold more than tensors, which is not run here" in said
    assert not trap.exists()


def test_pickled_weights_of_an_adapter_run_nothing(tmp_path: Path, trap: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"x": Makes(trap)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        start_at_adapter(torch.nn.Module(), locate_adapter(str(tmp_path)))
    assert not trap.exists()


@pytest.mark.slow
def test_caches_full_of_pickles_run_nothing(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path, trap: Path
) -> None:
    """Every file of every cache is replaced, and some are put beside; then the run starts again."""
    code, said = type_in(*fit(tiny_base, rows_file))
    assert code == 0, said
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    kinds = {path.relative_to(tmp_path / "cache").parts[0] for path in files}
    assert len(kinds) >= 3, kinds  # fingerprints, encoded rows, packed weights
    for path in files:
        torch.save({"x": Makes(trap)}, path)
        for name in ("adapter_model.bin", "pytorch_model.bin", "rows.npy", "input_ids.pt", "x.pkl"):
            (path.parent / name).write_bytes(pickle.dumps(Makes(trap)))
    code, said = type_in(*fit(tiny_base, rows_file))
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert not trap.exists()


# -- YAML and Jinja --------------------------------------------------------------------------------

YAML = (
    "!!python/object/apply:os.makedirs ['TRAP']",
    "!!python/object/new:os.makedirs ['TRAP']",
    "{model: {model_name_or_path: !!python/object/apply:os.makedirs ['TRAP']}}",
    "{trainer: {callbacks: [!!python/object/apply:os.makedirs ['TRAP']]}}",
)


@pytest.mark.parametrize("text", YAML)
def test_a_configuration_makes_no_object_of_python_s(
    type_in: Type, tmp_path: Path, trap: Path, text: str
) -> None:
    path = tmp_path / "sent.yaml"
    path.write_text(text.replace("TRAP", str(trap)) + "\n")
    code, said = type_in("fit", "--config", path)
    assert code == 2, said
    assert "Traceback" not in said
    assert not trap.exists()


@pytest.mark.parametrize("flag", ["--data.sources", "--trainer.callbacks", "--model", "--run.name"])
def test_nor_does_a_flag(
    type_in: Type, tiny_base: Path, rows_file: Path, trap: Path, flag: str
) -> None:
    value = YAML[0].replace("TRAP", str(trap))
    value = f"{{x: {value}}}" if flag == "--model" else value
    code, said = type_in(*fit(tiny_base, rows_file, flag, value))
    assert code == 2, said
    assert "Traceback" not in said
    assert not trap.exists()


JINJA = (
    "{{ cycler.__init__.__globals__.os.makedirs('TRAP') }}",
    "{{ joiner.__init__.__globals__['os'].makedirs('TRAP') }}",
    "{{ lipsum.__globals__['os'].makedirs('TRAP') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').makedirs('TRAP') }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').makedirs('TRAP') }}",
    "{{ ('{0.__class__.__mro__}').format(messages) }}",
    "{{ messages.append(messages[0]) }}",
    "{% for _ in range(10 ** 9) %}x{% endfor %}",
)


LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def render(attempt: str, place: str, tiny_base: Path, folder: Path) -> str:
    """An answered question under a template that begins with this."""
    from qlora_pl.data.conversation import Conversation, Message
    from qlora_pl.data.encoding.tokenizer import load_tokenizer
    from qlora_pl.data.templates.loading import load_template

    source = f"{attempt}{LOOP}{ASKS}"
    base = folder / "base"
    shutil.copytree(tiny_base, base)
    if place == "tokenizer":
        (base / "chat_template.jinja").write_text(source)
    tokenizer = load_tokenizer(str(base))
    definition: Any = {"jinja": source} if place == "data.template" else "chat"
    conversation = Conversation((Message("user", "Hello?"), Message("assistant", "Yes.")))
    [[row]] = load_template(definition, tokenizer).render_rows([conversation])
    return "".join(segment.text for segment in row.segments)


@pytest.mark.parametrize("place", ["data.template", "tokenizer"])
def test_a_template_that_stays_in_its_sandbox_renders(
    tiny_base: Path, tmp_path: Path, place: str
) -> None:
    assert render("Hello! ", place, tiny_base, tmp_path).startswith("Hello! <|im_start|>user")


@pytest.mark.parametrize("attempt", JINJA)
@pytest.mark.parametrize("place", ["data.template", "tokenizer"])
def test_a_template_does_not_leave_its_sandbox(
    tiny_base: Path, tmp_path: Path, trap: Path, attempt: str, place: str
) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.template: "):
        render(attempt.replace("TRAP", str(trap)), place, tiny_base, tmp_path)
    assert not trap.exists()


# -- code that a model brings along ----------------------------------------------------------------

CODE = """import os
os.makedirs({trap!r}, exist_ok=True)
from transformers import LlamaConfig as SentConfig, LlamaForCausalLM as SentModel
from transformers import PreTrainedTokenizerFast as SentTokenizer
"""


@pytest.fixture
def sent_base(tmp_path: Path, trap: Path) -> Path:
    """A base whose model and tokenizer are made by a file in its folder."""
    base = save_base(tmp_path / "sent")
    (base / "sent.py").write_text(CODE.format(trap=str(trap)))
    for name, classes in (
        (
            "config.json",
            {"AutoConfig": "sent.SentConfig", "AutoModelForCausalLM": "sent.SentModel"},
        ),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "sent.SentTokenizer"]}),
    ):
        content = json.loads((base / name).read_text())
        content |= {"auto_map": classes}
        if name == "config.json":
            content |= {"model_type": "sent", "architectures": ["SentModel"]}
        else:
            content |= {"tokenizer_class": "SentTokenizer"}
        (base / name).write_text(json.dumps(content))
    return base


def test_a_base_s_code_is_not_run_whatever_is_answered(
    type_in: Type, sent_base: Path, rows_file: Path, trap: Path
) -> None:
    code, said = type_in(*fit(sent_base, rows_file))
    assert code == 2, said
    assert not trap.exists()


def test_a_tokenizer_s_code_is_not_run_whatever_is_answered(
    type_in: Type, sent_base: Path, tiny_base: Path, rows_file: Path, trap: Path
) -> None:
    code, said = type_in(*fit(tiny_base, rows_file, "--data.tokenizer", sent_base))
    assert code in (0, 2), said
    assert not trap.exists()


@pytest.mark.parametrize("key", ["model.trust_remote_code"])
def test_code_of_a_hub_model_needs_a_revision(
    type_in: Type, rows_file: Path, tiny_base: Path, key: str
) -> None:
    code, said = type_in(
        *fit(Path("owner/model"), rows_file, f"--{key}", "true", "--data.tokenizer", tiny_base)
    )
    assert code == 2
    assert "model.revision: 'owner/model' may run code of its own" in said


@pytest.mark.parametrize("place", ["other/repo--sent.SentModel", [None, "other/repo--sent.X"]])
def test_code_is_not_taken_from_a_repository_that_was_not_named(tmp_path: Path, place: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": place}}))
    with pytest.raises(ConfigurationError, match="takes its code from another repository"):
        refuse_code_from_elsewhere(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "sent.X"}}))
    refuse_code_from_elsewhere(tmp_path)


def test_an_adapter_s_own_classes_are_not_imported(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path, trap: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """PEFT's ``auto_mapping`` names a library that AutoPeftModel would import."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "sentlibrary.py").write_text(CODE.format(trap=str(trap)))
    monkeypatch.syspath_prepend(str(tmp_path))
    mapping = {"base_model_class": "SentModel", "parent_library": "sentlibrary"}
    config = {"peft_type": "LORA", "auto_mapping": mapping, "r": 4, "lora_alpha": 16}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": Makes(trap)}, adapter / "adapter_model.bin")
    code, said = type_in(*fit(tiny_base, rows_file, "--model.lora.init_from", adapter))
    assert code == 2, said
    assert not trap.exists()


# -- paths -----------------------------------------------------------------------------------------

OUTSIDE = ["../secret.txt", "/etc/hostname", "a/../../secret.txt", "..\\secret.txt", "C:\\x", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_its_folder_is_told(name: str) -> None:
    assert not is_plain_name(name)
    for plain in ("model.safetensors", "templates/rag.jinja", "..x", "a..b"):
        assert is_plain_name(plain)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter folder with a manifest, and a file beside it that is none of its business."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    write_manifest(folder, ["adapter_config.json"])
    return folder


def write_manifest(folder: Path, names: list[str]) -> None:
    files = {}
    for name in names:
        path = folder / name
        files[name] = sha256_file(path) if path.is_file() else hashlib.sha256(b"").hexdigest()
    manifest = AdapterManifest(
        base={"name": "x", "revision": None, "weights": "0", "config": "0"},
        quantization={}, quantization_config=None, lora={}, template="guanaco",
        stop_token_ids=[], max_length=0, step=1, data={}, versions={}, files=files,
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(vars(manifest)))


def test_a_manifest_that_names_its_own_files_is_read(adapter: Path) -> None:
    read_adapter_folder(adapter)


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_a_manifest_may_not_name_files_outside(adapter: Path, name: str) -> None:
    write_manifest(adapter, [name])
    with pytest.raises(AdapterFolderError, match="lies outside of it"):
        read_adapter_folder(adapter)


@pytest.mark.parametrize("linked", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_in_an_adapter_folder_may_not_lead_out(adapter: Path, linked: str) -> None:
    (adapter / linked).unlink()
    (adapter / linked).symlink_to(adapter.parent / "secret.txt")
    write_manifest(adapter, [linked])
    with pytest.raises(AdapterFolderError, match="lies outside of it"):
        read_adapter_folder(adapter)
    with pytest.raises(ConfigurationError, match="is a link that leads out of its folder"):
        locate_adapter(str(adapter))


def test_a_manifest_itself_may_not_be_a_link_that_leads_out(adapter: Path) -> None:
    (adapter / "manifest.json").rename(adapter.parent / "manifest.json")
    (adapter / "manifest.json").symlink_to(adapter.parent / "manifest.json")
    with pytest.raises(AdapterFolderError, match="leads out of the folder"):
        read_adapter_folder(adapter)


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path, adapter: Path) -> None:
    """snapshots/REVISION/FILE -> ../../blobs/DIGEST, as huggingface_hub lays them out."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x/snapshots/0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in adapter.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    read_adapter_folder(snapshot)
    assert locate_adapter(str(snapshot)) == snapshot


@pytest.mark.parametrize(
    "change", [{"files": ["x"]}, {"base": {"weights": 3}}, {"base": []}, {"format": "1"}]
)
def test_a_manifest_of_other_types_is_refused_in_a_sentence(adapter: Path, change: dict) -> None:
    path = adapter / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterFolderError):
        read_adapter_folder(adapter)


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_an_index_of_weights_may_not_name_files_outside(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="lies outside of its folder"):
        weight_files(tmp_path)


# -- rights ----------------------------------------------------------------------------------------


def modes(folder: Path) -> dict[str, int]:
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in paths}


@pytest.mark.parametrize(("mask", "folder_mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_a_folder_is_readable_by_whom_the_umask_says(
    tmp_path: Path, mask: int, folder_mode: int
) -> None:
    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "made") as folder:
            (folder / "x").write_text("x")
        temporary_folder(tmp_path)
    finally:
        os.umask(before)
    found = modes(tmp_path)
    assert found.pop("made/x") == folder_mode & 0o666
    assert set(found.values()) == {folder_mode}


@pytest.mark.slow
def test_a_private_run_stays_private(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Under umask 077 nobody else may read a byte of a run or of its caches."""
    words = fit(tiny_base, rows_file, "--run.root", tmp_path / "runs")
    done = subprocess.run(
        [sys.executable, "-m", "qlora_pl", *map(str, words)],
        env=os.environ | {"QLORA_PL_CACHE": str(tmp_path / "cache")},
        preexec_fn=lambda: os.umask(0o077) and None,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = modes(tmp_path)
    assert len(found) > 40
    assert not {name: oct(mode) for name, mode in found.items() if mode & 0o077}


def test_run_names_stay_in_their_root(type_in: Type, tiny_base: Path, rows_file: Path) -> None:
    for name in ("../x", "/tmp/x", "..", "a/b"):
        code, said = type_in(*fit(tiny_base, rows_file, "--run.name", name))
        assert code == 2, said
        assert "run.name:" in said
