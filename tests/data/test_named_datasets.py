"""Datasets by name: rows in the schema that each is published in become conversations."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.reading.formats import FORMATS
from qlora_pl.data.reading.named_datasets import DATASETS
from qlora_pl.data.reading.normalizing import ReadingReport, read_conversations
from qlora_pl.data.reading.readers import hub_splits, load_hub_dataset
from qlora_pl.data.reading.sources import RowSources, SourceConfig
from qlora_pl.errors import ConfigurationError

FIXTURES = Path(__file__).parent / "fixtures"
PAGE = (Path(__file__).parents[2] / "docs/datasets.md").read_text()


def asked(question: str, answer: str, *more: str, context: str = "") -> Conversation:
    turns = [Message("user", question, context=context), Message("assistant", answer)]
    turns += [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(more)]
    return Conversation(tuple(turns))


def learnt(text: str) -> Conversation:
    return Conversation.from_text(text)


EXPECTED: dict[str, list[Conversation]] = {
    "alpaca": [
        asked("Name a metal that floats on water.", "Lithium does, while it reacts."),
        asked("Turn the sentence into a question.", "Does it rain?", context="It rains."),
        asked("Count the vowels.", "Three.", context="banana"),
    ],
    "alpaca-cleaned": [
        asked("Say which part of speech the word is.", "A noun.", context="river"),
        asked("Write forty-two kilograms in short.", "42 kg"),
        asked("Sort the colours.", "blue, green, red", context="red, blue, green"),
    ],
    "chip2": [
        asked("How long is a fortnight?", "Two weeks."),
        asked("Which is heavier?", "Of what?", "Lead and cork.", "Lead, for the same volume."),
        asked("Give me two names for a boat.", "Curlew.\nSandpiper."),
    ],
    "self-instruct": [
        asked("Task: Make it plural.\n\nInput: goose\n\nOutput:", " geese"),
        asked("Task: Say which day follows Monday.\n\nOutput:", " Tuesday"),
        asked("Task: Add the numbers.\n\nInput: 2, 5\n\nOutput:", " 7"),
    ],
    "hh-rlhf": [
        asked("Can I freeze bread?", "Yes, sliced and wrapped."),
        asked(
            "What is a lathe?",
            "A machine that turns the work.",
            "And a mill?",
            "There the tool turns.\n\nTwo ways of cutting.",
        ),
        asked("Are you there?\n\nHello?", "I am."),
    ],
    "longform": [
        asked("Write how a kettle descales.", "Vinegar dissolves the lime; rinse it twice."),
        asked("What happened to the mill?", "It burned down, and was built anew of stone."),
        asked("Mend the grammar: she go.", "She goes."),
    ],
    "guanaco": [
        asked("What does a sluice do?", "It lets water through, or holds it back."),
        asked("Wie heißt das auf Deutsch?", "Schleuse.", "Danke.", "Gern."),
        asked("Write one line of verse.", "The gate, the gate, and then the sea."),
    ],
    "oasst1": [
        asked(
            "Why is the sky red at dusk?", "The light comes a longer way, and blue is lost on it."
        ),
    ],
    "unnatural-instructions": [
        asked("Say how the person feels. Input: She slammed the door.", "Angry."),
        asked("Translate 'Haus'.", "House."),
        asked("Translate 'Baum'.", "Tree."),
        asked("Is 14 even?", "Yes."),
    ],
    "unnatural-instructions-full": [
        asked("Say how the person feels. Input: She slammed the door.", "Angry."),
        asked("Which feeling is it? She slammed the door.", "Angry."),
        asked("Translate 'Haus'.", "House."),
        asked("Is 14 even?", "Yes."),
    ],
    "flan-v2": [
        asked("Is this review kind or harsh?\nThe soup was cold.", "harsh"),
        asked("Q: 3 + 4?\nA: 7\n\nQ: 5 + 1?\nA:", "6"),
        asked("Say the opposite: wet", "dry"),
    ],
    "super-natural-instructions": [
        asked("Find a word that rhymes with the input.", "bone", context="stone"),
        asked("Find a word that rhymes with the input.", "kite", context="light"),
        asked("Name the month after this one.", "July", context="June"),
    ],
    "vicuna": [
        asked("What is a quine?", "A program that prints itself."),
        asked("Go on.", "It reads no input."),
        asked("Thank you.", "You are welcome."),
    ],
    "dolly": [
        asked(
            "Where does the ferry land?",
            "In Aldery.",
            context="The ferry crosses at noon and lands in Aldery.",
        ),
        asked("Name three tools.", "Saw, plane, chisel."),
        asked("Is a whale a fish?", "No, a mammal."),
    ],
    "prompts": [
        learnt("I want you to act as a gardener and tell me what to sow in March."),
        learnt("Answer as an old map would."),
        learnt("Criticise my kitchen."),
    ],
    "text": [
        learnt(
            "A harbour is a promise.\nShips believe it.\n\nA second paragraph stands here.\n",
        )
    ],
}


def read(source: dict[str, Any], report: ReadingReport | None = None) -> list[Conversation]:
    return [row for _, row in read_conversations(RowSources.parse(source), report=report)]


def fixture(name: str) -> str:
    return str(FIXTURES / (f"{name}.txt" if name == "text" else f"{name}.jsonl"))


@pytest.mark.parametrize("name", DATASETS)
def test_a_local_copy_of_each_dataset_becomes_its_conversations(name: str):
    report = ReadingReport()
    assert read({"dataset": name, "path": fixture(name)}, report) == EXPECTED[name]
    assert report.formats == {fixture(name): DATASETS[name].format}
    assert report.num_rows == {fixture(name): len(EXPECTED[name])}


def test_a_dataset_out_of_its_trees_is_the_one_out_of_its_messages():
    """The same messages in both layouts; a question at the end is cut back to the last answer."""
    report = ReadingReport()
    path = fixture("oasst1-trees")
    rows = read({"dataset": "oasst1", "path": path}, report)
    assert rows == [*EXPECTED["oasst1"], asked("Nenne ein Gewürz.", "Kümmel.")]
    assert report.left_out[path] == {
        "another reply was preferred": 1,
        "a question without an answer": 1,
        "the tree is not ready_for_export": 1,
    }
    english = read({"dataset": "oasst1", "path": path, "languages": ["en"]})
    assert english == EXPECTED["oasst1"]


def test_raw_text_is_cut_into_documents_as_it_is_asked_to_be():
    source = {"dataset": "text", "path": fixture("text")}
    first, second = "A harbour is a promise.\nShips believe it.", "A second paragraph stands here."
    assert read(source | {"documents": "paragraph"}) == [learnt(first), learnt(second)]
    assert read(source | {"documents": "line"}) == [
        *map(learnt, first.split("\n")),
        learnt(second),
    ]
    places = [
        place.row
        for place, _ in read_conversations(RowSources.parse(source | {"documents": "paragraph"}))
    ]
    assert places == [1, 4]  # the lines where the paragraphs begin


def test_what_is_set_beside_a_name_wins():
    path = fixture("guanaco")
    (first, *_) = read({"dataset": "guanaco", "path": path, "format": "text"})
    assert first.is_plain_text
    renamed = {"dataset": "alpaca", "path": fixture("alpaca"), "columns": {"output": "text"}}
    assert [row.reference for row in read(renamed)] == ["the whole prompt, unused", *["unused"] * 2]
    resolved = SourceConfig(dataset="alpaca", revision="abc").resolved()
    assert (resolved.path, resolved.revision) == ("tatsu-lab/alpaca", "abc")


# -- on the Hub ----------------------------------------------------------------------------------


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for the network: the fixture of a dataset, and what was asked of the Hub."""
    asked: list[Any] = []

    def load(path: str, subset: Any, split: str, revision: Any, data_files: Any = None) -> Any:
        asked.append((path, subset, split, revision, data_files))
        (name,) = [n for n, known in DATASETS.items() if known.path == path]
        lines = Path(fixture(name)).read_text().splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("name", [name for name, known in DATASETS.items() if known.path])
def test_a_name_alone_is_fetched_from_its_place_on_the_hub(name: str, asked_for: list[Any]):
    known = DATASETS[name]
    how_many = {"sample": 3} if known.is_huge else {}
    assert read({"dataset": name} | how_many) == EXPECTED[name]
    assert asked_for == [(known.path, known.subset, "train", known.revision, known.file)]


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` converts goes into a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.usefixtures("own_cache")
def test_one_file_of_a_repository_is_loaded_by_datasets_itself(tmp_path: Path):
    """The real loader on a folder, which it reads as it reads a repository."""
    for name in ("chip2", "alpaca"):
        (tmp_path / f"{name}.jsonl").write_text(Path(fixture(name)).read_text())
    source = SourceConfig(path=str(tmp_path), file="chip2.jsonl")
    rows = load_hub_dataset(source)
    assert [row["text"][:8] for row in rows] == ["<human>:"] * 3
    assert hub_splits(SourceConfig(dataset="chip2")) == ["train"]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["self_instruct-train.parquet", "train/0000.parquet"])
def test_self_instruct_is_found_in_both_layouts_of_the_hubs_parquet_copies(
    tmp_path: Path, name: str
):
    rows = [json.loads(line) for line in Path(fixture("self-instruct")).read_text().splitlines()]
    for path, table in ((f"self_instruct/{name}", rows), (f"human_eval/{name}", [{"id": "x"}])):
        (tmp_path / path).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(table), tmp_path / path)
    source = SourceConfig(dataset="self-instruct").resolved()
    found = load_hub_dataset(replace(source, path=str(tmp_path), revision=None))
    assert list(found) == rows


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"dataset": "alpcaa"}, r"data.x \(alpcaa\): no dataset is called 'alpcaa' .*did you mean"),
        ({"dataset": 3}, r"data.x \(3\): dataset must be text, got 3."),
    ],
)
def test_a_name_that_is_none_is_said_at_once(source: Any, sentence: str):
    with pytest.raises(ConfigurationError, match=sentence):
        RowSources.parse(source, "data.x", allow_rows=False)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("alpaca", "data.x: a dataset that is known by name is written {dataset: alpaca}."),
        ({"dataset": "vicuna"}, "data.x: 'vicuna' lies nowhere to be fetched from; add path"),
        ({"dataset": "text"}, "data.x: 'text' lies nowhere to be fetched from; add path: FILE."),
        (
            {"dataset": "flan-v2"},
            "data.x: 'flan-v2' has 23,173,509 rows; say how many, for example sample: 100000.",
        ),
        (
            {"dataset": "super-natural-instructions"},
            "data.x: 'super-natural-instructions' has millions of rows; say how many",
        ),
        (
            {"dataset": "alpaca", "languages": ["en"]},
            "data.x: languages and replies are for message trees, not for format alpaca.",
        ),
        (
            {"dataset": "alpaca", "path": fixture("alpaca"), "revision": "abc"},
            "data.x: revision 'abc' is for datasets of the Hub",
        ),
    ],
)
def test_a_name_that_cannot_be_read_so_is_said_without_reading(source: Any, sentence: str):
    (found,) = RowSources.parse(source).problems("data.x")
    assert found.startswith(sentence)


def test_a_row_in_memory_may_have_a_column_called_dataset():
    rows = [{"dataset": "mine", "prompt": "q", "response": "a"}]
    assert RowSources.parse(rows).rows == rows


def test_a_file_of_that_name_is_never_taken_for_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca/rows.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    assert read("alpaca") == [asked("q", "a")]  # type: ignore[arg-type]
    assert SourceConfig(dataset="alpaca").resolved().path == "tatsu-lab/alpaca"


# -- the table of the page -----------------------------------------------------------------------


def test_every_dataset_has_a_format_and_a_place():
    for name, known in DATASETS.items():
        assert known.format in FORMATS, name
        assert known.path is None or "/" in known.path, name
        assert known.revision is None or re.fullmatch("[0-9a-f]{40}|refs/.*", known.revision), name


def test_the_page_has_each_dataset_with_its_place_count_and_licence():
    rows = re.findall(
        r"^\| `([\w-]+)` \| (.+?) \| (.+?) \| (.+?) \| `(.+?)` \| (.*) \|$", PAGE, re.M
    )
    rows = rows[1:]  # without the head
    assert [name for name, *_ in rows] == list(DATASETS)
    for name, place, count, licence, format, _ in rows:
        known = DATASETS[name]
        assert place.split("`")[1:2] == ([known.path] if known.path else []), name
        assert (known.file or "") in place, name
        assert (known.subset or "") in place, name
        assert (known.num_rows is None) == (not re.search(r"\d,\d{3}$", count)), name
        assert known.num_rows is None or f"{known.num_rows:,}" == count, name
        assert (licence, format) == (known.licence, known.format), name
