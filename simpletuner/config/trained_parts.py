"""Which weights of a denoiser train, by parts of their names: `trainable_modules` and its sibling at half the rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from simpletuner.errors import Problem
from simpletuner.spelling import did_you_mean

# Of what `trainable_modules_low_learning_rate` names.
LOW_RATE = 0.5
MODULES, LOW_MODULES = "trainable_modules", "trainable_modules_low_learning_rate"
_SHOWN = 12


def rates_of(names: Iterable[str], modules: Sequence[str], low_modules: Sequence[str]) -> dict[str, float]:
    """Name -> what the learning rate of a weight is multiplied by, of those that train.

    Args:
        modules: a weight trains whose name holds one of these texts ("." is in all names); without any, all train.
        low_modules: likewise, at half the rate; `modules` wins.
    """
    if not modules and not low_modules:
        return dict.fromkeys(names, 1.0)
    rates = {}
    for name in names:
        if any(text in name for text in modules):
            rates[name] = 1.0
        elif any(text in name for text in low_modules):
            rates[name] = LOW_RATE
    return rates


def unmatched(names: Sequence[str], modules: Sequence[str], low_modules: Sequence[str]) -> Iterator[Problem]:
    """A problem for each text that trains no weight."""
    for key, texts in ((MODULES, modules), (LOW_MODULES, low_modules)):
        words = list(dict.fromkeys(word for name in names for word in name.split(".") if not word.isdecimal()))
        for text in texts:
            taken_before = key == LOW_MODULES and any(text in name for name in names)
            if taken_before and not any(text in name and not any(other in name for other in modules) for name in names):
                message = f'all weights whose names hold "{text}" are in {MODULES} already'
                yield Problem(message, key=key, fix="remove one of them")
            elif not any(text in name for name in names):
                fix = did_you_mean(text, words)
                yield Problem(f'no weight has "{text}" in its name', key=key, allowed=_shown(words), fix=fix)


def _shown(words: Sequence[str]) -> str:
    more = ", ..." if len(words) > _SHOWN else ""
    return f"parts of names such as {', '.join(words[:_SHOWN])}{more}"
