"""The pages of both reports, and their pictures, as a browser reads them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from peft_folders import Type, save_adapter
from test_page import Reader
from trained import adapter, run, type_in

from qlora_pl.inspection.pictures import bars, columns, heat_map

__all__ = ["adapter", "run", "type_in"]
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def words(x: float) -> str:
    return f"{x:.2f}"


def opacities(svg: str) -> dict[str, float]:
    """Of the cells of a map, by what stands under the pointer."""
    found = re.findall(r'class="heat"[^>]*fill-opacity="([\d.]+)"><title>([^<]*)</title>', svg)
    return {title: float(opacity) for opacity, title in found}


def test_a_map_is_darker_where_its_numbers_are_larger() -> None:
    values = {("q", "0"): 1.0, ("q", "1"): 3.0, ("k", "0"): 2.0, ("k", "1"): math.nan}
    svg = heat_map(["q", "k"], ["0", "1"], values, words, "x")
    found = opacities(svg)
    assert list(found) == ["q, layer 0: 1.00", "q, layer 1: 3.00", "k, layer 0: 2.00"]
    pale, dark, middle = found.values()
    assert pale < middle < dark == 1
    assert middle == pytest.approx((pale + dark) / 2, abs=1e-3)
    assert "k, layer 1: no number" in svg


def test_a_map_of_one_number_alone_is_drawn() -> None:
    assert opacities(heat_map(["q"], ["0"], {("q", "0"): 2.0}, words, "x"))


def test_a_bar_is_as_long_as_its_number() -> None:
    svg = bars({"a": 1.0, "b": 4.0}, words, "x", {"a": 2.0})
    lengths = [float(w) for w in re.findall(r'class="count main"[^>]*?width="([\d.]+)"', svg)]
    assert lengths[1] == pytest.approx(4 * lengths[0], rel=1e-2)
    assert svg.count("<line") == 1


def test_a_column_is_as_high_as_its_number() -> None:
    svg = columns({"0": 1.0, "1": 4.0}, words, "x")
    heights = [float(h) for h in re.findall(r'class="count main"[^>]*?height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(4 * heights[0], rel=1e-2)


def test_cosines_of_modules_that_one_adapter_lacks_stay_blank(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "one", tiny_base)
    save_adapter(tmp_path / "two", tiny_base, target_modules=["q_proj", "v_proj"])
    words = ("--adapter", tmp_path / "one", "--against", tmp_path / "two")
    assert type_in("inspect", "adapter", *words)[0] == 0
    html = Path("inspect-adapter/report.html").read_text("utf-8")
    picture = html.split("<h3>Cosine</h3>")[1].split("</svg>")[0]
    assert "no number" not in picture
    assert set(re.findall(r"<title>([a-z]+_proj), layer", picture)) == {"q_proj", "v_proj"}


def test_the_report_of_a_base_is_a_page_that_needs_nothing(type_in: Type, adapter: Path) -> None:
    code, _, said = type_in("inspect", "model", "--adapter", adapter, "--keep", "1")
    assert code == 0, said
    html = Path("inspect-model/report.html").read_text("utf-8")
    tags = Reader(html).tags
    assert not [tag for tag, _ in tags if tag in ("script", "img", "iframe", "link")]
    assert not [values for _, values in tags if any(k.startswith("on") for k in values)]
    for heading in ("Ways to keep the matrices", "What each part costs", "How normal"):
        assert heading in html
    # Each kind of module in each format, as the numbers beside the page have it.
    numbers = json.loads(Path("inspect-model/report.json").read_text("utf-8"))
    every = html.split("Error of weights in every format")[1].split("</table>")[0]
    assert list(numbers["formats"]) == re.findall(r"<th class=\"number\">([^<]*)</th>", every)
    last = every.split("<td>down_proj</td>")[1]
    told = re.findall(r"<td class=\"number\">([^<]*)</td>", last)
    downs = [m for m in numbers["matrices"] if m["place"]["kind"] == "down_proj"]
    for place, name in enumerate(numbers["formats"]):
        error = sum(m["errors"][name]["squared_error"] for m in downs)
        share = math.sqrt(error / sum(m["squared_sum"] for m in downs))
        assert told[place] == f"{100 * share:.2f} %"
    # A cell for each of the 14 matrices in five maps, each with its number.
    assert len(re.findall(r"<title>[a-z]+_proj, layer \d: ", html)) == 5 * 14


def test_the_report_of_an_adapter_is_such_a_page_and_names_are_no_markup(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "<b>x"
    save_adapter(folder, tiny_base)
    code, _, said = type_in("inspect", "adapter", "--adapter", folder, "--against", folder)
    assert code == 0, said
    html = Path("inspect-adapter/report.html").read_text("utf-8")
    reader = Reader(html)
    assert "<b>x" not in html
    assert "&lt;b&gt;x" in html
    assert not [tag for tag, _ in reader.tags if tag in ("script", "img", "iframe", "link")]
    assert len(re.findall(r"<title>[a-z]+_proj, layer \d: ", html)) == 4 * 14
