"""What caches of encoders' results have in common: a store, and keys over everything that made an entry."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

from simpletuner import __version__
from simpletuner.cache.store import TensorStore
from simpletuner.models.family import ModelFamily


class EncodedCache(ABC):
    """The results of one encoder, or of one set of them, in a store.

    Args:
        store: may be shared with other caches: keys tell all.
        family: encodes.
        fingerprint: of the encoder (`fingerprints.py`).
        write_batch_size: entries that are written to the disk at once, at most.
    """

    def __init__(self, store: TensorStore, family: ModelFamily, fingerprint: str, write_batch_size: int = 128):
        self.store = store
        self.family = family
        self.fingerprint = fingerprint
        self.write_batch_size = write_batch_size

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What all keys have in common: the encoder, and the version of how its results are kept."""

    def digest(self, content: dict[str, Any]) -> str:
        """sha256 in hex over the settings and what was encoded."""
        return hashlib.sha256(json.dumps({**self.settings, **content}, sort_keys=True).encode()).hexdigest()

    def set_fingerprint(self, *parts: Any) -> str:
        """Names a set of entries, for `TensorStore.complete`: a start that finds it complete asks for no single key.

        Args:
            parts: whatever decides, beside the settings and this version of the program, which entries there are; JSON.
        """
        return hashlib.sha256(json.dumps([__version__, self.settings, *parts]).encode()).hexdigest()
