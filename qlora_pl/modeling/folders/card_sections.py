"""The sections of a model card: its opening for hubs, licences, settings, curves, a question.

Each is made of plain values, and left out where nobody knows them; a licence that nobody knows is
said to be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_pl.modeling.folders.licences import UNKNOWN, in_words

QUESTION = "What is the capital of France?"
"""What the examples of a card ask."""
MOST_ROWS = 12
"""Of a table of losses."""


def front_matter(
    *,
    base_model: str | None,
    library_name: str,
    tags: Sequence[str],
    card: Mapping[str, Any],
    is_pair: bool = False,
) -> str:
    """What a hub reads: YAML between two lines of dashes.

    Args:
        base_model: A name on the Hub; None: the base is a folder, of which a hub knows nothing.
        library_name: That loads it.
        tags: Of the page.
        card: What a manifest knows besides: the base's licence, datasets on the Hub.
        is_pair: Whether an encoder-decoder model.
    """
    from huggingface_hub import ModelCardData  # slow to import

    data = ModelCardData(
        base_model=base_model,
        library_name=library_name,
        tags=list(tags),
        pipeline_tag=None if is_pair else "text-generation",
        datasets=card.get("datasets") or None,
        **card.get("base_licence", {}),
    )
    return f"---\n{data.to_yaml()}\n---"


def licence_section(base: str, card: Mapping[str, Any]) -> list[str]:
    """What it is made of, and under which licences; nothing where nobody noted it."""
    if "sources" not in card:
        return []
    rows = [("base", f"`{base}`", in_words(card.get("base_licence", {})))]
    rows += [
        (source["role"], f"`{source['name']}`", source["licence"] or UNKNOWN)
        for source in card["sources"]
    ]
    said = ""
    if any(row[2] == UNKNOWN for row in rows):
        said = (
            "What is unknown was not said by any file of this run; find out before passing it on."
        )
    return ["## Made of", table(("", "what", "licence"), rows), *([said] if said else [])]


def settings_section(settings: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    """Hyper-parameters as a table, and what it ran with."""
    if not settings:
        return []
    rows = [(f"`{key}`", f"`{_plain(value)}`") for key, value in settings.items()]
    ran = ", ".join(f"{name} {number}" for name, number in versions.items())
    return ["## Training", table(("key", "value"), rows), f"With {ran}."]


def history_section(history: Sequence[Mapping[str, float]]) -> list[str]:
    """Losses by step, a dozen of them at most."""
    shown = chosen(history)
    if not shown:
        return []
    columns = ("step", "train/loss", "val/loss", "optim/lr")
    rows = [
        (f"{row['step']:,.0f}", *(_number(row.get(column)) for column in columns[1:]))
        for row in shown
    ]
    titles = ("step", "training loss", "validation loss", "learning rate")
    said = "Losses are means over trained tokens, in nats; a training loss is one step's."
    return ["## Curves", table(titles, rows), said]


def chosen(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The validated steps, or if they are many, as many evenly, and the first and the last."""
    with_loss = [row for row in history if "train/loss" in row or "val/loss" in row]
    validated = [row for row in with_loss if "val/loss" in row]
    rows = validated if len(validated) >= MOST_ROWS // 2 else with_loss
    if len(rows) <= MOST_ROWS:
        return list(rows)
    places = {round(n * (len(rows) - 1) / (MOST_ROWS - 1)) for n in range(MOST_ROWS)}
    return [rows[place] for place in sorted(places)]


def asking_plainly(
    prompt: Mapping[str, Any] | None, auto_class: str, stop_token_ids: Sequence[int]
) -> list[str]:
    """Lines that ask a plain transformers model in the words of the training template.

    Args:
        prompt: The text of a prompt, and whether the tokenizer adds its special tokens; None:
            nobody knows, or a plain tokenizer gives other tokens.
        auto_class: That loaded it.
        stop_token_ids: Where an answer ends.
    """
    if prompt is None:
        return []
    answer = "answer" if "Seq2Seq" in auto_class else 'answer[inputs["input_ids"].shape[1] :]'
    special = "" if prompt["add_special_tokens"] else ", add_special_tokens=False"
    lines = [
        f"prompt = {prompt['text']!r}",
        f'inputs = tokenizer(prompt, return_tensors="pt"{special}).to(model.device)',
        "(answer,) = model.generate(",
        f"    **inputs, max_new_tokens=64, do_sample=False, eos_token_id={list(stop_token_ids)},",
        "    pad_token_id=tokenizer.pad_token_id,",
        ")",
        f"print(tokenizer.decode({answer}, skip_special_tokens=True))",
    ]
    return ["It is asked in the words of its template:", fenced("python", lines)]


def fenced(language: str, lines: Sequence[str]) -> str:
    """A block of code."""
    return "\n".join([f"```{language}", *lines, "```"])


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("`", "'")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
