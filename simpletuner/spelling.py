"""What a misspelled name most likely means: every "did you mean" asks here."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The question that proposes the nearest known name, for `Problem.fix`; None where none is near."""
    near = nearest(word, known)
    return f'did you mean "{near}"?' if near else None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` most likely means, or None where none is near.

    Ranked by the number of single-letter edits (insertion, deletion, replacement, exchange of neighbors), then by
    difflib's ratio; names that differ in more than a third of their letters are not near.
    """
    folded = word.lower().replace("-", "_")
    matcher, letters = difflib.SequenceMatcher(b=folded), Counter(folded)
    best: tuple[int, float, str] | None = None
    for name in known:
        limit = max(1, min(4, len(name) // 3))
        if abs(len(name) - len(folded)) > limit or _fewest_edits(letters, Counter(name.lower())) > limit:
            continue
        distance = edit_distance(folded, name.lower())
        if distance > limit or (best and distance > best[0]):
            continue
        matcher.set_seq1(name)
        rank = (distance, -matcher.ratio(), name)
        best = rank if best is None or rank < best else best
    if best:
        return best[2]
    close = difflib.get_close_matches(folded, list(known), n=1, cutoff=0.75)
    return close[0] if close else None


def _fewest_edits(a: Counter[str], b: Counter[str]) -> int:
    """No fewer edits make one word of the other: each one adds a letter at most, and removes one at most."""
    return max((a - b).total(), (b - a).total())


def edit_distance(a: str, b: str) -> int:
    """Single-letter edits from `a` to `b`, an exchange of neighbors counting as one (optimal string alignment)."""
    before, previous = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]
