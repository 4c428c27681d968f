"""The settings of one source of rows, checked without being read; ``readers`` reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from qlora_pl.data.reading.data_files import PathError, find_files, is_saved_dataset, looks_local
from qlora_pl.data.reading.formats import FORMATS
from qlora_pl.data.reading.named_datasets import DATASETS, TREES
from qlora_pl.data.reading.oasst_trees import TreeRules
from qlora_pl.errors import ConfigurationError, did_you_mean

Documents = Literal["file", "paragraph", "line"]
Replies = Literal["best", "all"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where rows come from, which of them are read, and what they mean."""

    path: str = ""
    """A file (.json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt, all but Parquet and Arrow also
    compressed: .gz, .bz2, .xz, .zst, .zip), a folder of files, a pattern such as data/*.jsonl, a
    folder that `datasets` saved, or the name of a dataset on the Hub."""
    dataset: str | None = None
    """A dataset that is known by name, for example alpaca, oasst1 or dolly (docs/datasets.md has
    them all); with a path, that file is read as this dataset; None: none."""
    split: str = "train"
    """The split to read of a Hub dataset or of saved splits; files have none."""
    subset: str | None = None
    """The configuration of a Hub dataset; None: its only or default one."""
    revision: str | None = None
    """The commit or tag of a Hub dataset; None: the newest."""
    file: str | None = None
    """The files to read of a Hub dataset, a name or a pattern, for example unified_chip2.jsonl;
    None: all of them."""
    format: str | None = None
    """What the columns mean: messages, sharegpt, oasst, unnatural-instructions,
    unnatural-instructions-full, alpaca, dolly, natural-instructions, prompt-response,
    prompt-completion, question-answer, input-output, inputs-targets, source-target, hh-rlhf, text,
    guanaco, chip2 or vicuna; None: the named dataset's, else guessed from their names and
    reported."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames before reading, NEW: OLD, for example {output: response}."""
    limit: int | None = None
    """Read only the first so many rows; None: all."""
    sample: int | None = None
    """Read so many rows drawn at random, in their order in the source; None: all."""
    sample_seed: int = 0
    """Seed of that draw alone; the same rows on every machine, and those of a smaller `sample` are
    among those of a larger one."""
    weight: float = 1.0
    """How often each row of this source is used in an epoch: 2 is twice, 0.5 is another half of
    them in each epoch."""
    languages: tuple[str, ...] = ()
    """Of message trees (format oasst) only messages in these languages, for example [en]; empty:
    all of them."""
    streaming: bool = False
    """Read a Hub dataset row by row over the network instead of downloading it; needs
    `data.window`."""
    replies: Replies = "best"
    """Of message trees (format oasst) the path of the `best` reply at each level, or `all` paths,
    each of them a row."""
    documents: Documents = "file"
    """What a row of a .txt file is: the whole `file`, a `paragraph` between empty lines, or a
    `line`."""

    def __post_init__(self) -> None:
        if self.languages is None or isinstance(self.languages, list):  # as YAML and flags say it
            object.__setattr__(self, "languages", tuple(self.languages or ()))
        if problems := list(self._wrong_values()):
            raise ConfigurationError(f"data.sources ({self.name}): {text}" for text in problems)

    def _wrong_values(self) -> Iterator[str]:
        for name in ("path", "dataset", "split", "subset", "revision", "file", "format"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name in ("path", "split") or value is not None):
                yield f"{name} must be text, got {value!r}."
        if isinstance(self.dataset, str) and self.dataset not in DATASETS:
            known = ", ".join(DATASETS)
            hint = did_you_mean(self.dataset, DATASETS)
            yield f"no dataset is called '{self.dataset}' (known: {known}){hint}"
        if isinstance(self.format, str) and self.format not in FORMATS:
            yield f"no format is called '{self.format}'{did_you_mean(self.format, FORMATS)}"
        if not isinstance(self.streaming, bool):
            yield f"streaming must be true or false, got {self.streaming!r}."
        elif self.streaming and self.sample is not None:
            yield "sample has to read every row before it draws; with streaming set limit."
        for name in ("limit", "sample", "sample_seed"):
            yield from self._wrong_count(name)
        if self.limit is not None and self.sample is not None:
            yield "limit takes the first rows and sample draws rows; remove one of the two."
        is_number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not is_number or not math.isfinite(self.weight) or self.weight <= 0:
            yield f"weight must be a number above 0, got {self.weight!r}."
        if not isinstance(self.columns, dict) or not all(
            isinstance(name, str) for name in (*self.columns, *self.columns.values())
        ):
            yield f"columns must be {{NEW: OLD}}, got {self.columns!r}."
        if not isinstance(self.languages, tuple) or not all(
            isinstance(code, str) for code in self.languages
        ):
            yield f"languages must be a list of codes such as [en], got {self.languages!r}."
        for name, choices in (("replies", Replies), ("documents", Documents)):
            if (value := getattr(self, name)) not in get_args(choices):
                yield f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}."

    def _wrong_count(self, name: str) -> Iterator[str]:
        value, least = getattr(self, name), 0 if name == "sample_seed" else 1
        if value is None and least == 1:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            yield f"{name} must be a whole number, got {value!r}."
        elif value < least:
            yield f"{name} must be at least {least}, got {value}."

    @property
    def name(self) -> str:
        """What a report calls this source."""
        return self.path or self.dataset or ""

    @property
    def tree_rules(self) -> TreeRules:
        """What is kept of message trees."""
        return TreeRules(languages=self.languages, replies=self.replies)

    @property
    def is_local(self) -> bool:
        """Whether this names files rather than a dataset of the Hub."""
        return bool(self.path) and looks_local(self.path)

    @property
    def is_saved(self) -> bool:
        """Whether this is a folder that ``datasets`` saved."""
        return bool(self.path) and is_saved_dataset(Path(self.path).expanduser())

    def resolved(self) -> SourceConfig:
        """The same source with what its ``dataset`` stands for filled in; what is set stays set."""
        if self.dataset is None:
            return self
        known = DATASETS[self.dataset]
        names = ["format", "columns"]
        if not self.path:
            names += ["path", "subset", "revision", "file"]
        filled = {name: getattr(self, name) or getattr(known, name) for name in names}
        if self.format is not None:
            filled["columns"] = self.columns  # the known ones are for the known format
        return replace(self, dataset=None, **filled | {"path": filled.get("path", self.path) or ""})

    def of_split(self, split: str) -> SourceConfig:
        """The whole of another split of the same dataset."""
        return replace(self, split=split, limit=None, sample=None, weight=1.0)

    # -- what can be said without reading --------------------------------------------------------

    def problem(self, key: str = "data.sources") -> str | None:
        """One sentence on why this cannot be read, found without reading it; or None."""
        if self.dataset is not None and (reason := self._dataset_problem(self.dataset)):
            return f"{key}: {reason}"
        source = self.resolved()
        if reason := source._path_problem() or source._idle_setting():
            return f"{key}: {reason}"
        return None

    def _dataset_problem(self, name: str) -> str | None:
        known = DATASETS[name]
        if not self.path and known.path is None:
            return f"'{name}' lies nowhere to be fetched from; add path: FILE."
        if not self.path and known.is_huge and self.limit is None and self.sample is None:
            rows = "millions of" if known.num_rows is None else f"{known.num_rows:,}"
            return f"'{name}' has {rows} rows; say how many, for example sample: 100000."
        return None

    def _path_problem(self) -> str | None:
        if not self.path.strip():
            return "the path is empty; name a file."
        if self.is_saved:
            return None
        if self.is_local:
            try:
                find_files(self.path)
            except PathError as error:
                return str(error)
            except OSError as error:
                return f"'{self.path}' cannot be read ({error.strerror}); check its permissions."
            return None
        if self.path in DATASETS:
            return f"a dataset that is known by name is written {{dataset: {self.path}}}."
        if self.path.count("/") > 1 or self.path.startswith((".", "/", "~")):
            return f"no file '{self.path}'."
        return None

    def _idle_setting(self) -> str | None:
        """A setting that would be taken in silence."""
        is_tree = self.format is None or self.format in TREES
        if not is_tree and (self.languages or self.replies != "best"):
            return f"languages and replies are for message trees, not for format {self.format}."
        if not self.is_local:
            return None
        for name, default in (
            ("split", "train"),
            ("subset", None),
            ("revision", None),
            ("file", None),
            ("streaming", False),
        ):
            if (value := getattr(self, name)) != default and not (
                name == "split" and self.is_saved
            ):
                return (
                    f"{name} '{value}' is for datasets of the Hub, '{self.path}' is a file "
                    "and has none; remove it, or name the file that holds those rows."
                )
        return None
