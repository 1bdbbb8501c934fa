"""Reading the flags of other programs: Python's own parser, with this program's errors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from simpletuner.errors import ConfigError, Problem


class FlagParser(argparse.ArgumentParser):
    """Raises in place of ending the program; takes no shortened names."""

    def __init__(self, name: str, about: str):
        super().__init__(prog=f"simpletuner {name}", description=about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(Problem(message, fix=f"{self.prog} --help explains every flag"))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """(flags, other words): a flag that is not of this program is another word, with its value.

        Python's own would take `--prompt=a cat` for a value, since it holds a blank.
        """
        own: list[str] = []
        others: list[str] = []
        words = list(args or ())
        while words:
            word = words.pop(0)
            name, equals, _ = word.partition("=")
            if not word.startswith("--") or name in self._option_string_actions:
                own.append(word)
                continue
            others.append(word)
            if not equals and words and not words[0].startswith("-"):
                others.append(words.pop(0))
        found, left = super().parse_known_args(own, namespace)
        return found, [*left, *others]

    def flag(self, name: str, kind: type, default: object, about: str, **options: object) -> None:
        """A flag with a value, or a switch where `kind` is bool."""
        shown = about if default in (None, False, []) else f"{about} Default: {default}."
        if kind is bool:
            self.add_argument(f"--{name}", action="store_true", help=shown)
        else:
            self.add_argument(f"--{name}", type=kind, default=default, help=shown, **options)  # type: ignore[arg-type]


def given_names(words: Sequence[str]) -> set[str]:
    """The names of the flags among the words of a command line."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
