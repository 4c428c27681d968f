"""From a mistake in a file or flag to one sentence with the nearest right spelling.

jsonargparse stops at the first unknown key and words its errors for programmers; this looks at all
keys first, and rewords the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qlora_pl.errors import ConfigurationError, did_you_mean


def unknown_keys(parser: Any, words: list[str]) -> list[str]:
    """One sentence for each key, of files and flags, that the parser does not have.

    Args:
        parser: The parser of one command.
        words: What follows the command.

    Raises:
        ConfigurationError: if a file is missing or is not YAML.
    """
    known = {action.dest for action in parser._actions if not action.dest.endswith(".help")}
    problems = []
    for place, word in enumerate(words):
        if not word.startswith("-") or re.fullmatch(r"-\d.*", word):
            continue
        flag, _, value = word.partition("=")
        key = flag.lstrip("-").removesuffix("+")
        if flag in ("-c", "--config"):
            path = value or (words[place + 1] if place + 1 < len(words) else "")
            content = _load(path)
            problems += [f"{path}: {sentence}" for sentence in _unknown(_keys(content), known)]
            problems += [f"{path}: {sentence}" for sentence in _not_groups(content, known)]
        elif flag not in ("-h", "--help") and not key.startswith("print_config"):
            problems += [f"{sentence}" for sentence in _unknown(iter([key]), known)]
    return problems


def _load(path: str) -> Any:
    file = Path(path)
    if not path or not file.is_file():
        names = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ConfigurationError(f"--config: no file '{path}'{did_you_mean(file.name, names)}")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not text"
        raise ConfigurationError(f"{path}{where}: not YAML ({problem}).") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigurationError(f"{path}: expected keys and values, got {type(content).__name__}.")
    return content or {}


def _keys(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{str(key).removesuffix('+')}"
        yield name
        if isinstance(value, dict):
            yield from _keys(value, f"{name}.")


def _not_groups(content: dict[Any, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    """Groups that were given a single value, which jsonargparse would pass over in silence."""
    groups = {parent for name in known for parent in _prefixes(name)}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _not_groups(value, known, f"{name}.")
        elif name in groups and value is not None and not isinstance(value, str):
            keys = sorted(
                {
                    k.removeprefix(f"{name}.").split(".")[0]
                    for k in known
                    if k.startswith(f"{name}.")
                }
            )
            yield f"'{name}' has keys of its own ({', '.join(keys)}), got {value!r}."


def _unknown(keys: Iterator[str], known: set[str]) -> Iterator[str]:
    """A sentence for each key without a home, at the first part of it that is unknown."""
    groups = {parent for name in known for parent in _prefixes(name)}
    reported: set[str] = set()
    for key in keys:
        for part in [*_prefixes(key), key]:
            if part in groups:
                continue
            if part not in known and part not in reported:
                reported.add(part)
                yield _no_such_key(part, key, known)
            break


def _no_such_key(part: str, key: str, known: set[str]) -> str:
    group, _, leaf = part.rpartition(".")
    prefix = f"{group}." if group else ""
    siblings = {
        name.removeprefix(prefix).split(".")[0] for name in known if name.startswith(prefix)
    }
    sentence = f"{repr(group) if group else 'a run'} has no key '{leaf}'"
    end = did_you_mean(leaf, sorted(siblings))
    if end != ".":
        return sentence + end
    last = key.rpartition(".")[2]  # the right word in the wrong group
    if homes := sorted(name for name in known if name.rpartition(".")[2] == last):
        return f"{sentence}; did you mean '{homes[0]}'?"
    return f"{sentence} (it has {', '.join(sorted(siblings))})."


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "keys and values",
    "NoneType": "null",
}


# Lines of jsonargparse's that say nothing to somebody who did not write the types.
UNTOLD = re.compile(
    r"(Expected|Does not|Subtypes|Errors|Given|Not a valid|Subclass types|Problem with|"
    r"a (class|dict))"
)


def explain_parser_error(message: str) -> str:
    """Jsonargparse's message as one sentence that names key and value."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if found := re.match(r"the following arguments are required: (?:\w+\.)?(.*)", message):
        return f"{found[1]}: must be set; write --{found[1]} VALUE, or the key in a file."
    if found := re.match(r"argument (--\S+): expected (.*)", message):
        return f"{found[1]}: expected {'a value' if 'one' in found[2] else found[2]} after it."
    if found := re.match(r"unrecognized arguments: (.*)", message.lower()):
        return f"'{found[1]}' belongs to no flag; a value follows its --key."
    if found := re.search(r"Not of type RowSources: (.*)", message):
        return found[1]
    if found := re.match(r'(?:parser key|Parser key) "([^"]+)"', message):
        return f"{found[1]}: {_value_problem(lines)}"
    return " ".join(lines).rstrip(".") + "."


def _value_problem(lines: list[str]) -> str:
    errors = [line.removeprefix("- ") for line in lines[1:]]
    given = next((e.split(":", 1)[1].strip() for e in errors if e.startswith("Given value:")), "")
    for error in errors:
        if found := re.match(r"Expected an? (.*)\. Got value: (.*)", error):
            options = re.findall(r"'([^']+)'", found[1]) if "Literal" in found[1] else []
            end = did_you_mean(found[2], options)
            return f"expected {_type_name(found[1])}, got '{found[2]}'{end}"
        if found := re.match(r"Option '(.*)' is not accepted", error):
            return f"the class has no argument '{found[1]}' (in {given})."
        if error.startswith("Unable to load config"):
            return f"expected keys and values, got {error.removeprefix('Unable to load config ')}."
    told = [error for error in errors if not UNTOLD.match(error)]
    if told:
        return f"{told[0].rstrip('.')} (in {given})."
    wanted = [_type_name(found[1]) for e in errors if (found := re.match(r"Expected an? (.*)", e))]
    return f"expected {' or '.join(dict.fromkeys(wanted)) or 'another value'}, got '{given}'."


def _type_name(name: str) -> str:
    if found := re.match(r"typing\.Literal\[(.*)\]", name):
        return f"one of {found[1].replace(chr(39), '')}"
    short = re.sub(r"<class '(.*)'>", r"\1", name).split(".")[-1]
    return TYPES.get(short, short)
