"""The chat notebook is kept without outputs, and runs over a tiny adapter: answers, and a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from notebook_cells import assert_clean, code_cells, printed

pytest.importorskip("gradio", reason="the notebook shows the page: pip install 'qlora-pl[web]'")

NOTEBOOK = Path(__file__).parent.parent.parent / "notebooks/chat_demo.ipynb"
PAGE_IS_SERVED = """
import httpx
print(httpx.get(website.address + "config").status_code)
"""
SHARING_IS_REFUSED = """
os.environ.pop("QLORA_PL_WEB_PASSWORD", None)
try:
    open_website(model, PageOptions(web=True, port=0, share=True))
except Exception as error:
    print(type(error).__name__, error)
"""

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # Jupyter's own, on its way to other loops


@pytest.fixture
def notebook() -> Any:
    """The notebook as it lies in the repository."""
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_chat_notebook_is_kept_clean(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert_clean(notebook)
    for cell in code_cells(notebook).values():
        assert not re.search(r"^\s*(def|class) |lambda|share=True", cell.source, re.MULTILINE)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (NOTEBOOK.parent / target).exists(), target


@pytest.mark.slow
def test_the_chat_notebook_answers_and_serves_the_page(
    notebook: Any, adapter: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cells = code_cells(notebook)
    cells["parameters"].source = f"""from pathlib import Path
ADAPTER = Path({str(adapter)!r})
BASE = None
QUESTIONS = ["How many legs has a spider?"]
SHARE = False
PORT = 0"""
    place = notebook.cells.index(cells["close"])
    for name, source in (("served", PAGE_IS_SERVED), ("refused", SHARING_IS_REFUSED)):
        check = nbformat.v4.new_code_cell(source)
        check["id"] = name
        notebook.cells.insert(place, check)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=120, resources=resources).execute()
    cells = code_cells(notebook)
    own, base = printed(cells["generate"]).splitlines()
    assert own.startswith("adapter: ")
    assert base.startswith("base: ")
    assert own.removeprefix("adapter") != base.removeprefix("base")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", printed(cells["page"]))
    assert any("iframe" in str(output.get("data", "")) for output in cells["page"].outputs)
    assert printed(cells["served"]) == "200\n"
    assert printed(cells["refused"]).startswith("ConfigurationError --share: everybody on the")
