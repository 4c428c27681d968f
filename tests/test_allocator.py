"""How torch's CUDA allocator is set before torch is imported, and who has the last word."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from qlora_pl import allocator
from qlora_pl.allocator import ALLOCATOR_VARIABLES, EXPANDABLE, prefer_expandable_segments


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("2.8.0", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.1+cu128", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.11.0", "PYTORCH_ALLOC_CONF"),
        ("3.0.1", "PYTORCH_ALLOC_CONF"),
        ("by hand", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_variable_is_the_one_that_this_release_of_torch_obeys(
    release: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.9.1 ignores the newer name without a word (pytorch #183387); 2.11 does not."""
    monkeypatch.setattr(allocator, "version", lambda package: release)
    variables: dict[str, str] = {}
    prefer_expandable_segments(variables)
    assert variables == {name: EXPANDABLE}


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_what_a_user_has_set_is_kept(name: str) -> None:
    variables = {name: "max_split_size_mb:128"}
    prefer_expandable_segments(variables)
    assert variables == {name: "max_split_size_mb:128"}


def test_it_is_set_before_torch_is_imported() -> None:
    """In a process of its own: here torch has been imported long ago."""
    program = """
import os, sys
for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
    del os.environ[name]
sys.argv = ["qlora-pl", "--help"]
from qlora_pl import __main__
__main__.main()
assert not any(name.endswith("ALLOC_CONF") for name in os.environ)
seen = {}
class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            seen.update(os.environ)
            raise KeyboardInterrupt
sys.meta_path.insert(0, Watch())
sys.argv = ["qlora-pl", "fit", "--print_config"]
__main__.main()
print([value for name, value in seen.items() if name.endswith("ALLOC_CONF")])
"""
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[-1] == f"['{EXPANDABLE}']"
    assert int(version("torch").split(".")[0]) >= 2
