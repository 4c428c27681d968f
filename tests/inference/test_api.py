"""``load_adapter`` and ``generate`` for Python: the commands' engine, with their messages."""

from __future__ import annotations

from pathlib import Path

import pytest

import qlora_pl
from qlora_pl.errors import ConfigurationError, DatasetFormatError

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # a run happens in this process


def test_questions_are_answered_as_by_the_command(adapter: Path) -> None:
    model = qlora_pl.load_adapter(adapter)
    first, second = qlora_pl.generate(
        model, ["How many legs?", {"instruction": "Add.", "input": "1, 2"}], max_new_tokens=5
    )
    assert first.prompt == "### Human: How many legs?### Assistant:"
    assert "1, 2" in second.prompt
    (alone,) = qlora_pl.generate(model, "How many legs?", max_new_tokens=5, batch_size=1)
    assert alone.answer == first.answer
    (base,) = qlora_pl.generate(model, "How many legs?", max_new_tokens=5, adapter="base")
    assert base.answer != first.answer


def test_a_model_alone_and_several_adapters(adapter: Path, tiny_base: Path) -> None:
    alone = qlora_pl.load_adapter(model=str(tiny_base), template="guanaco")
    (answer,) = qlora_pl.generate(alone, "Why?", max_new_tokens=3)
    assert answer.adapter == "base"
    both = qlora_pl.load_adapter({"one": adapter, "two": adapter})
    assert [qlora_pl.generate(both, "Why?", adapter=n)[0].adapter for n in both.adapters] == [
        "one",
        "two",
    ]


def test_mistakes_are_this_project_s_errors(adapter: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no folder '\./nowhere'"):
        qlora_pl.load_adapter("./nowhere")
    model = qlora_pl.load_adapter(adapter)
    with pytest.raises(ConfigurationError, match="have no effect with do_sample: false"):
        qlora_pl.generate(model, "Why?", temperature=0.5)
    with pytest.raises(DatasetFormatError, match="prompt 1: its prompt is no text"):
        qlora_pl.generate(model, ["Why?", {"prompt": 5}])
    with pytest.raises(DatasetFormatError, match="prompt 0: the prompt has "):
        qlora_pl.generate(model, "long " * 300)
