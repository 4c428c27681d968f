"""``qlora-pl explain KEY``: what a key means, its default, where it acts and what it goes with."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.explaining.asking import answer
from qlora_pl.explaining.catalogue import load

FLAGS = ("--json", "--help")
HELP = """usage: qlora-pl explain [KEY | GROUP | [COMMAND] --FLAG] [--json]

  qlora-pl explain                       the groups of keys, and the commands that have flags
  qlora-pl explain model.lora            the keys of a group
  qlora-pl explain model.lora.r          one key; lora.r or r will do where only one ends so
  qlora-pl explain merge                 the flags of another command
  qlora-pl explain merge --threshold     one of them; without the command: of all that have it

Says what it means, its type, default and unit, the class and file where it acts, the pages that
speak of it, and the keys that it goes with: those that its text names, and those whose texts name
it. The texts are those of docs/configuration.md and of --help. The first call reads every key,
which takes some seconds; later ones answer at once. A key that does not exist: the nearest names,
exit code 2.

flags:
  --json        the same as JSON"""


def explain(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``explain``.

    Raises:
        ConfigurationError: if no key is called so, or several are.
    """
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    asked = [word for word in words if word != "--json"]
    for word in asked[1:]:
        if word.startswith("--j") and (end := did_you_mean(word, FLAGS)) != ".":
            raise ConfigurationError(f"explain: no flag is called '{word}'{end}")
    text, plain = answer(asked, load())
    print(json.dumps(plain, indent=2, ensure_ascii=False) if "--json" in words else text)
    return 0
