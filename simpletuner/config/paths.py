"""Where relative paths lead: the working folder first, then the configuration file's folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.layers import Origin
from simpletuner.errors import Problem


@dataclass(frozen=True)
class Folders:
    """The two folders that relative paths are looked up in, as absolute paths."""

    working_dir: Path
    config_dir: Path | None

    def places(self, path: Path) -> list[Path]:
        """Where `path` may lead, in order."""
        roots = [self.working_dir, self.config_dir] if self.config_dir else [self.working_dir]
        return list(dict.fromkeys(Path(os.path.normpath(root / path)) for root in roots))

    def find(self, path: Path) -> Path | None:
        """The first place that exists."""
        return next((place for place in self.places(path) if place.exists()), None)

    def output(self, path: Path) -> Path:
        """A path that is made on demand: always in the working folder."""
        return self.places(path)[0]

    def shown(self, path: Path) -> str:
        """A file's name in messages: short inside the working folder, else absolute."""
        return str(path.relative_to(self.working_dir)) if path.is_relative_to(self.working_dir) else str(path)

    def missing(self, path: Path, key: str, origin: Origin, what: str) -> Problem:
        """The problem of a path that leads nowhere; lists every place."""
        places = " or ".join(str(place) for place in self.places(path))
        return origin.problem(f'"{path}": there is no {what} of this name', key=key, allowed=f"{what} at {places}")


def looks_like_path(text: str) -> bool:
    """Whether a model's name is a path and not a hub id: those have exactly one slash and no leading dot."""
    return text.startswith((".", "/", "~")) or text.count("/") != 1
