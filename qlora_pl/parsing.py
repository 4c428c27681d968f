"""From a mistake in a file or flag to one sentence with the nearest right spelling.

jsonargparse stops at the first unknown key and words its errors for programmers; this looks at all
keys first, of files, of parts and of flags, and rewords the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from qlora_pl.errors import ConfigurationError, did_you_mean

MOST_NAMES = 16
"""Keys that a sentence can name and still be read."""


def unknown_keys(parser: Any, words: list[str]) -> list[str]:
    """One sentence for each key, of files, parts and flags, that the parser does not have as given.

    Besides misspelt ones these are groups that were given a single value, and keys that were given
    null where none is meant: jsonargparse takes null for every key, and says nothing.

    Args:
        parser: The parser of one command.
        words: What follows the command.

    Raises:
        ConfigurationError: if a file is missing, is not YAML, or names a key twice.
    """
    actions = {a.dest: a for a in parser._actions if not a.dest.endswith(".help")}
    problems: list[str] = []
    for place, word in enumerate(words):
        if not word.startswith("-") or re.fullmatch(r"-\d.*", word):
            continue
        flag, equals, value = word.partition("=")
        if not equals:
            following = words[place + 1 : place + 2]
            value = "" if not following or following[0].startswith("--") else following[0]
        problems += _mistakes_of_flag(flag, value, actions)
    return problems


def _mistakes_of_flag(flag: str, value: str, actions: dict[str, Any]) -> list[str]:
    key = flag.lstrip("-").removesuffix("+")
    if flag in ("-c", "--config"):
        return _mistakes_of_file(Path(value), "--config", "", actions)
    if flag in ("-h", "--help") or key.startswith("print_config"):
        return []
    if key not in _groups(actions):
        content: Any = {key: None} if value in ("null", "Null", "NULL", "~") else {key: value}
        return [*_unknown(iter([key]), set(actions)), *_nulls(content, actions)]
    if value[:1] != "{":
        return _mistakes_of_file(Path(value), flag, f"{key}.", actions)
    try:
        content = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{flag}: '{value}' is not YAML; write {{KEY: VALUE}}.") from error
    return [f"{flag}: {sentence}" for sentence in _mistakes_of(content, actions, f"{key}.")]


def _mistakes_of_file(file: Path, flag: str, prefix: str, actions: dict[str, Any]) -> list[str]:
    content = _load(file, flag)
    problems = [f"{file}: {sentence}" for sentence in _mistakes_of(content, actions, prefix)]
    for key, part in _parts(content, _groups(actions), prefix):
        # a group may be the path of a part, seen from the file that names it
        problems += _mistakes_of_file(file.parent / part, f"{file}: {key}", f"{key}.", actions)
    return problems


def _mistakes_of(content: dict[Any, Any], actions: dict[str, Any], prefix: str) -> Iterator[str]:
    yield from _unknown(_keys(content, prefix), set(actions))
    yield from _not_groups(content, set(actions), prefix)
    yield from _nulls(content, actions, prefix)


def _load(file: Path, flag: str) -> dict[Any, Any]:
    if not file.is_file():
        names = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        if file.name == "":
            raise ConfigurationError(f"{flag}: name a file after it.")
        if file.is_dir():
            raise ConfigurationError(f"{flag}: '{file}' is a folder; name a file in it.")
        raise ConfigurationError(f"{flag}: no file '{file}'{did_you_mean(file.name, names)}")
    try:
        node = yaml.compose(file.read_text(), Loader=yaml.SafeLoader)
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "not text"
        raise ConfigurationError(f"{file}{where}: not YAML ({problem}).") from error
    if content is None:
        raise ConfigurationError(f"{file}: it holds no keys; write some, or leave {flag} out.")
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file}: expected keys and values, got {type(content).__name__}.")
    if twice := list(_duplicates(node)):
        raise ConfigurationError(
            f"{file}, line {line}: the key '{key}' stands here for the second time (first in line "
            f"{first}), and only one of them could count; remove one."
            for key, line, first in twice
        )
    return content


def _duplicates(node: Any) -> Iterator[tuple[str, int, int]]:
    """Keys that stand twice in a mapping, with both lines; YAML forbids it, PyYAML does not say."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in lines and name != "<<":
                yield name, line, lines[name]
            lines.setdefault(name, line)
            yield from _duplicates(value)


def _keys(content: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        name = f"{prefix}{str(key).removesuffix('+')}"
        yield name
        if isinstance(value, dict):
            yield from _keys(value, f"{name}.")


def _parts(content: dict[Any, Any], groups: set[str], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in groups and isinstance(value, dict):
            yield from _parts(value, groups, f"{name}.")
        elif name in groups and isinstance(value, str):
            yield name, value


def _not_groups(content: dict[Any, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    """Groups that were given a single value, which jsonargparse would pass over in silence."""
    groups = _groups(known)
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _not_groups(value, known, f"{name}.")
        elif name in groups and not isinstance(value, str):
            keys = ", ".join(sorted(_siblings(f"{name}.", known)))
            if value is None:
                yield f"nothing stands under '{name}'; write one of its keys there, or remove it."
            else:
                yield f"'{name}' has keys of its own ({keys}), got {value!r}."


def _nulls(content: dict[Any, Any], actions: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys that were given null though no default stands behind it."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        action = actions.get(name)
        if isinstance(value, dict) and name in _groups(actions):
            yield from _nulls(value, actions, f"{name}.")
        elif value is None and action is not None and not _takes_null(action):
            default = "must be set" if action.required else f"its default is {action.default!r}"
            yield f"{name}: null is no value for it ({default}); write one, or remove the key."


def _takes_null(action: Any) -> bool:
    hint = getattr(action, "_typehint", None)
    if hint is None or type(None) in get_args(hint):
        return True
    # A class of this project's reads null itself, unless something must be named.
    return isinstance(hint, type) and hint.__module__ != "builtins" and not action.required


def _groups(actions: Iterable[str]) -> set[str]:
    return {parent for name in actions for parent in _prefixes(name)}


def _unknown(keys: Iterator[str], known: set[str]) -> Iterator[str]:
    """A sentence for each key without a home, at the first part of it that is unknown."""
    groups = _groups(known)
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
    siblings = _siblings(prefix, known)
    sentence = f"{repr(group) if group else 'a run'} has no key '{leaf}'"
    end = did_you_mean(leaf, sorted(siblings))
    if end != ".":
        return sentence + end
    last = key.rpartition(".")[2]  # the right word in the wrong group
    if homes := sorted(name for name in known if name.rpartition(".")[2] == last):
        return f"{sentence}; did you mean '{homes[0]}'?"
    told = ", ".join(sorted(siblings)) if len(siblings) <= MOST_NAMES else f"{len(siblings)} others"
    return f"{sentence} (it has {told}); qlora-pl explain{f' {group}' if group else ''} lists them."


def _siblings(prefix: str, known: set[str]) -> set[str]:
    return {name.removeprefix(prefix).split(".")[0] for name in known if name.startswith(prefix)}


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def not_finite(value: Any, key: str = "") -> Iterator[str]:
    """A sentence for each number that is infinite or none at all.

    Args:
        value: A configuration in plain types, or a part of it.
        key: Of that part.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from not_finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from not_finite(inner, key)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key}: must be a finite number, got {value}."


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
    if found := re.match(r"the following arguments are required: (.*)", message):
        missing = [re.sub(r"^(fit|validate|test|predict)\.", "", k) for k in found[1].split(", ")]
        return "\n".join(
            f"{key}: must be set; write --{key} VALUE, or the key in a file." for key in missing
        )
    if found := re.match(r"argument (--\S+): expected (.*)", message):
        return f"{found[1]}: expected {'a value' if 'one' in found[2] else found[2]} after it."
    if found := re.match(r"unrecognized arguments: (.*)", message.lower()):
        return f"'{found[1]}' belongs to no flag; a value follows its --key."
    if found := re.search(r'key "([^"]+)".*?Not of type RowSources: (.*)', message, re.DOTALL):
        # the type's own sentence, which does not know which of three keys it was read for
        return found[2].strip().splitlines()[0].replace("data.sources", found[1], 1)
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
        names = found[1].replace("'", "")
        return f"one of {names}" if "," in names else names
    short = re.sub(r"<class '(.*)'>", r"\1", name).split(".")[-1]
    return TYPES.get(short, short)
