"""Imports of large libraries without Python's search for garbage.

Importing torch, diffusers and PEFT makes half a million objects that stay. The collector looked at them again and
again, for a fifth of the CPU time before a first step.
"""

from __future__ import annotations

import gc
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def collector_off() -> Iterator[None]:
    """Inside, the cyclic collector is off. For imports only: elsewhere it may be what frees a tensor."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_class(dotted_name: str) -> Any:
    """The class of `package.module.Class` or `package.module:Class`, its module imported where it is not."""
    # With a colon the error of a module that cannot be imported is raised; without one Python looks for an attribute.
    name = dotted_name if ":" in dotted_name else ":".join(dotted_name.rsplit(".", 1))
    with collector_off():
        return pkgutil.resolve_name(name)
