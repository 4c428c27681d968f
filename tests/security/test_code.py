"""What the code of the package says: nothing unpickles, evaluates or uploads."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "qlora_pl"
FILES = sorted(PACKAGE.rglob("*.py"))
NODES = {file: list(ast.walk(ast.parse(file.read_text()))) for file in FILES}


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
            # smoke follows the README that it has just written, as a reader of it would
            is_own_readme = file.name == "plain_reload.py"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not is_own_readme:
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
    """Only an export to the Hub sends anything anywhere, and asks first."""
    sends = ("push_to_hub", "upload_file", "upload_folder", "upload_large_folder", "create_repo")
    sends += (
        "create_commit",
        "create_branch",
        "HfApi",
        "CommitScheduler",
        "urlopen",
        "urlretrieve",
    )
    asks = ("hub.py:", "surroundings.py:")  # the latter whether anybody answers, by a HEAD
    for name in sends:
        assert not [place for place, _ in calls(name) if not place.startswith(asks)], name
    for file in FILES:
        for node in NODES[file]:
            if isinstance(node, ast.keyword) and node.arg == "push_to_hub":
                raise AssertionError(file)
            if isinstance(node, ast.Import | ast.ImportFrom):
                text = ast.unparse(node).replace("starlette.requests", "")  # what comes in
                clients = ("requests", "httpx", "urllib.request")
                assert file.name == "surroundings.py" or not any(c in text for c in clients)


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
