"""The page in a real browser, over the quickstart's model: what a person does and sees.

Needs Chromium; Debian's is `apt install chromium`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_runs import fit

from qlora_pl.chat.address import PageOptions, free_port
from qlora_pl.quickstart import WHEEL, find_gguf, prepare

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
for module in ("gradio", "playwright.sync_api"):
    pytest.importorskip(module, reason="make test-all installs what drives the browser")

from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
]

LONG = "Tell me a long story about a dog, a cat, a horse and a house in the woods."
EVIL = """<script>window.ran = 1</script><img src=x onerror="window.ran = 2"><b>not bold</b>
![tracked](http://tracker.invalid/t.png) `<i>` and

```mermaid
graph TD; A--><img src='http://tracker.invalid/m.png' onerror='window.ran = 3'>
```
"""
MINUTE = 60_000.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, rows_file: Path) -> Iterator[str]:
    """The command over an adapter of a few steps; the base comes out of its wheel."""
    try:
        find_gguf()
    except Exception as error:
        pytest.skip(f"{WHEEL} is not installed: {error}")
    folder = tmp_path_factory.mktemp("browser")
    prepare(folder / "base")
    fit(folder / "run", folder / "base", rows_file, r=8, alpha=64.0)
    port = free_port(PageOptions(web=True, port=0))
    words = ["--adapter", str(folder / "run/adapter"), "--port", str(port)]
    log = (folder / "log.txt").open("w")
    command = [sys.executable, "-m", "qlora_pl", "chat", "--web", *words]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "200"], stdout=log, stderr=log, env={**os.environ}
    )
    said = ""
    for _ in range(240):
        said = (folder / "log.txt").read_text()
        if "The page is at" in said or process.poll() is not None:
            break
        time.sleep(0.5)
    assert "The page is at" in said, said
    yield f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert "Traceback" not in (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280])
def page(chromium: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A tab, of which every request and every mistake is looked at when it is closed."""
    tab = chromium.new_page(viewport={"width": request.param, "height": 860})
    elsewhere: list[str] = []
    mistakes: list[str] = []
    tab.on(
        "request",
        lambda r: r.url.startswith((address, "data:", "blob:")) or elsewhere.append(r.url),
    )
    tab.on("pageerror", lambda error: mistakes.append(str(error)))
    tab.goto(address)
    tab.wait_for_selector("#question textarea")
    yield tab
    tab.close()
    assert elsewhere == []
    assert mistakes == []


def send(page: Page, text: str) -> None:
    page.fill("#question textarea", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop", state="visible")


def ended(page: Page) -> None:
    page.wait_for_selector("#send", state="visible", timeout=2 * MINUTE)


def answers(page: Page, side: int = 0) -> list[str]:
    return page.locator(f"#side-{side} .bot .md").all_inner_texts()


def growing(page: Page, num_answers: int = 1, side: int = 0) -> str:
    """Wait for the beginning of an answer."""
    page.wait_for_function(
        """([side, n]) => { const all = document.querySelectorAll(`#side-${side} .bot .md`);
        return all.length >= n && all[n - 1].innerText.length > 10 }""",
        arg=[side, num_answers],
        timeout=MINUTE,
    )
    return answers(page, side)[-1]


def choose(page: Page, who: str) -> None:
    page.locator("#who").get_by_role("radio", name=who, exact=True).check()


def choose_length(page: Page, tokens: int) -> None:
    page.get_by_label(re.compile("number input for Answer length", re.I)).fill(str(tokens))
    page.keyboard.press("Tab")


def test_an_answer_grows_is_stopped_kept_and_asked_for_again(page: Page) -> None:
    send(page, LONG)
    expect(page.locator("#question textarea")).to_have_value("")
    first = growing(page)
    page.wait_for_function(
        "(n) => document.querySelector('#side-0 .bot .md').innerText.length > n + 20",
        arg=len(first),
        timeout=MINUTE,
    )
    assert answers(page)[0].startswith(first.rstrip()[:10])
    assert page.locator("#retry").is_disabled()
    page.click("#stop")
    ended(page)
    expect(page.locator("#said")).to_contain_text("Stopped.")
    (kept,) = answers(page)
    assert len(kept) > len(first)
    choose_length(page, 8)
    page.click("#retry")
    expect(page.locator("#said")).to_contain_text("8 tokens in", timeout=MINUTE)
    ended(page)
    (again,) = answers(page)
    assert kept.startswith(again)  # greedy, and shorter
    expect(page.locator("#said")).to_contain_text("Without sampling an answer comes out the same")
    page.click("#clear")
    expect(page.locator("#side-0 .bot")).to_have_count(0)


def test_the_base_answers_when_the_adapter_is_off_and_beside_it(page: Page) -> None:
    choose_length(page, 24)
    choose(page, "side by side")
    expect(page.locator("#side-1")).to_be_visible()
    send(page, "How many legs has a spider?")
    ended(page)
    (with_adapter,), (without,) = answers(page, 0), answers(page, 1)
    assert with_adapter != without
    page.click("#clear")
    choose(page, "off")
    expect(page.locator("#side-1")).not_to_be_visible()
    expect(page.locator("#side-0")).to_contain_text("base, adapter off")
    send(page, "How many legs has a spider?")
    ended(page)
    assert answers(page) == [without]
    choose(page, "on")
    expect(page.locator("#side-0 .bot").first).to_contain_text("base:")  # who has said it


def test_what_is_saved_is_the_line_that_the_terminal_writes(page: Page, tmp_path: Path) -> None:
    choose_length(page, 8)
    page.click("#save")
    expect(page.locator("#said")).to_contain_text("Nothing has been said yet.")
    page.fill("#system textarea", "Be brief.")
    send(page, "How many legs has a spider?")
    ended(page)
    with page.expect_download() as saved:
        page.click("#save")
    assert saved.value.suggested_filename == "conversation.jsonl"
    saved.value.save_as(tmp_path / "talk.jsonl")
    (line,) = (tmp_path / "talk.jsonl").read_text().splitlines()
    messages = json.loads(line)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == "Be brief."
    assert messages[2]["content"].split() == answers(page)[0].split()


def test_what_cannot_be_is_told_and_the_question_is_not_lost(page: Page) -> None:
    page.click("text=Sample")
    page.get_by_label(re.compile("number input for Temperature", re.I)).fill("0")
    page.keyboard.press("Tab")
    page.fill("#question textarea", "How many legs?")
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("decoding.temperature: must be above 0, got 0")
    expect(page.locator("#question textarea")).to_have_value("How many legs?")
    expect(page.locator("#side-0 .bot")).to_have_count(0)


def test_nothing_that_is_written_runs_or_fetches(page: Page) -> None:
    """Questions and answers are shown by one function; a question can say what it likes."""
    choose_length(page, 2)
    send(page, EVIL)
    ended(page)
    page.wait_for_timeout(1500)  # drawings would come late
    asked = page.locator("#side-0 .user .md").first
    for shown in ("<script>window.ran = 1</script>", "onerror=", "<b>not bold</b>", "<i>", "graph"):
        expect(asked).to_contain_text(shown)
    assert asked.locator("script, img, b, svg.flowchart, iframe").count() == 0
    assert page.evaluate("window.ran") is None


@pytest.mark.parametrize("page", [390, 768], indirect=True)
def test_a_narrow_window_needs_no_scrolling_sideways(page: Page) -> None:
    choose_length(page, 24)
    choose(page, "side by side")
    send(page, "Say " + "pneumonoultramicroscopicsilicovolcanoconiosis" * 4)
    ended(page)
    page.wait_for_timeout(300)
    wide, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window
    for name in ("question", "send", "retry", "clear", "save", "side-0", "side-1"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= window


def test_another_tab_has_its_own_conversation_and_waits_for_its_turn(
    page: Page, chromium: Any, address: str
) -> None:
    send(page, LONG)
    growing(page)
    other = chromium.new_page()
    other.goto(address)
    other.wait_for_selector("#question textarea")
    assert answers(other) == []
    choose_length(other, 8)
    send(other, "How many legs has a spider?")
    expect(other.locator("#said")).to_contain_text("Waiting for one other answer.")
    page.click("#stop")
    ended(other)
    assert len(answers(other)) == 1
    assert "spider" not in page.locator("#side-0").inner_text()
    other.close()


def test_a_tab_that_is_closed_lets_the_next_one_be_answered(
    page: Page, chromium: Any, address: str
) -> None:
    leaving = chromium.new_page()
    leaving.goto(address)
    leaving.wait_for_selector("#question textarea")
    choose_length(leaving, 4000)  # minutes
    leaving.click("text=Sample")
    leaving.get_by_label(re.compile("number input for Temperature", re.I)).fill("2")
    leaving.keyboard.press("Tab")  # at this temperature a story does not end by itself
    send(leaving, LONG)
    growing(leaving)
    choose_length(page, 8)
    send(page, "How many legs has a spider?")
    expect(page.locator("#said")).to_contain_text("Waiting for one other answer.")
    leaving.close()
    expect(page.locator("#said")).to_contain_text("8 tokens in", timeout=MINUTE / 2)
