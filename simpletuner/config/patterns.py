"""Patterns of module paths that users write, against the names in a family's facts: no model is there yet."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator

# A star at the start of a name stands for any of these places of a UNet.
_PLACES = ("down_blocks.*.", "mid_block.", "up_blocks.*.")


def may_match(pattern: str, names: Iterable[str]) -> bool:
    """Whether an fnmatch pattern fits a path that a module of one of these names may have."""
    pattern = re.sub(r"\[[^]]+\]", "?", pattern)
    return any(_overlap(pattern, place) for name in names for place in _placed(name))


def sample_paths(name: str) -> Iterator[str]:
    """Paths that modules of this name may have, for regular expressions to be tried on.

    Args:
        name: fnmatch pattern of a path. Its stars are numbers: of blocks, or inside them.
    """
    for place in _placed(name):
        parts = place.split("*")
        num_stars = len(parts) - 1
        # One list may be long; where lists are nested, as in a UNet, they are short.
        ranges = [range(128 if num_stars < 3 and star == 0 else 10) for star in range(num_stars)]
        for numbers in itertools.product(*ranges):
            yield "".join(itertools.chain(*zip(parts, map(str, numbers), strict=False))) + parts[-1]


def _placed(name: str) -> Iterator[str]:
    yield from (place + name[1:] for place in _PLACES) if name.startswith("*") else (name,)


@functools.cache
def _overlap(first: str, second: str) -> bool:
    """Whether some text matches both patterns of `*` and `?`."""
    places, seen = [(0, 0)], {(0, 0)}  # how far each pattern is matched; without recursion, for patterns may be long
    while places:
        i, j = places.pop()
        a, b = first[i : i + 1], second[j : j + 1]
        if not a and not b:
            return True
        further = []
        if a == "*":
            further += [(i + 1, j), *([(i, j + 1)] if b else [])]
        if b == "*":
            further += [(i, j + 1), *([(i + 1, j)] if a else [])]
        if a and b and "*" not in (a, b) and (a == b or "?" in (a, b)):
            further.append((i + 1, j + 1))
        places += [place for place in further if place not in seen]
        seen.update(further)
    return False
