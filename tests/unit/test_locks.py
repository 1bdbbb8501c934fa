"""What several threads share is only looked at and changed by one of them at a time: each call takes the lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from simpletuner.cache.store import StoreWriter, TensorStore
from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.caption_table import CaptionTable
from simpletuner.data.digests import DigestMemo
from simpletuner.data.index import Index
from simpletuner.data.masks import Masks
from simpletuner.reporting.events import RunFinished, RunStarted
from simpletuner.reporting.webhooks.messages import words_for
from simpletuner.reporting.webhooks.outbox import Outbox
from tests.events import step_done
from tests.unit.data.images import write_image

Calls = tuple[Any, Sequence[Callable[[], Any]]]


class Counted:
    """A lock that counts how often it was taken."""

    def __init__(self, lock: Any) -> None:
        self.lock, self.count = lock, 0

    def __enter__(self) -> None:
        self.count += 1
        self.lock.__enter__()

    def __exit__(self, *error: object) -> None:
        self.lock.__exit__(*error)


def index_calls(folder: Path) -> Calls:
    write_image(folder / "images/a.png")
    index = Index(folder / "index.sqlite", LocalBackend(folder / "images", "things"))
    return index, [
        index.scan,
        lambda: index.images([1]),
        lambda: index.images_beside([b"a.png"]),
        lambda: index.texts([1]),
        lambda: index.sizes([1]),
        lambda: list(index.paths([1])),
        lambda: list(index.image_paths()),
        lambda: list(index.skipped().files()),
        index.notes,
        index.num_images,
    ]


def memo_calls(folder: Path) -> Calls:
    image = write_image(folder / "a.png")
    os.utime(image, (1, 1))
    memo = DigestMemo(folder / "digests.sqlite")
    return memo, [lambda: memo.digest(image), lambda: memo._remember(image.stat(), "0" * 64), memo.close]


def table_calls(folder: Path) -> Calls:
    (folder / "captions.csv").write_text("file_name,caption\na.png,one\n")
    table = CaptionTable(folder / "captions.csv", folder / "kept", "file_name", None, "things")
    catalog: Any = SimpleNamespace(images_digest="1")
    index: Any = SimpleNamespace(num_images=lambda: 0, image_paths=lambda: iter(()))
    skipped: Any = SimpleNamespace(add_many=lambda reason, count, names, listing: list(listing()))
    return table, [lambda: table.take(["a.png"]), lambda: table.report_unused(catalog, index, skipped)]


def outbox_calls(folder: Path) -> Calls:
    outbox = Outbox()
    message, urgent = (words_for(event, "", "")[0] for event in (RunStarted("", folder, 2), RunFinished(2, 1.0)))
    return outbox, [
        lambda: outbox.put(message),
        lambda: outbox.put(urgent),
        outbox.first,
        lambda: outbox.remove(message),
        outbox.take_urgent,
        lambda: outbox.put_progress(step_done(1)),
        outbox.take_progress,
        lambda: outbox.put_back_progress(step_done(1), []),
        outbox.drop_phase_progress,
    ]


def store_calls(folder: Path) -> Calls:
    store = TensorStore(folder)
    return store, [
        lambda: store.put_many({"a": {"mean": torch.ones(1)}}),
        lambda: store.get("a"),
        lambda: "a" in store,
        lambda: store.missing(["a"]),
        lambda: store.note_complete("all", 1),
        lambda: store.complete("all"),
        store.forget_complete,
        store.keys,
        lambda: store.shards_of(["a"]),
        store.stats,
        store.refresh,
        store.verify,
        lambda: store.prune([]),
        store.close,
    ]


def writer_calls(folder: Path) -> Calls:
    writer = StoreWriter(TensorStore(folder))
    return writer, [lambda: writer.put("a", {"mean": torch.ones(1)}), lambda: writer.waiting("a"), writer.flush]


def mask_calls(folder: Path) -> Calls:
    masks = Masks("masks", "mask", SimpleNamespace(), np.arange(1))  # type: ignore[arg-type]
    masks.pixels = lambda position, sample: torch.ones(1, 4, 4)  # type: ignore[method-assign]
    sample: Any = SimpleNamespace(crop=None, is_flipped=False)
    return masks, [lambda: masks.weights(0, sample, (2, 2))] * 2


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (index_calls, None),
        (memo_calls, None),
        (table_calls, [1, 2]),  # once to count, and once for the names where they are asked for
        (outbox_calls, None),
        (store_calls, None),
        (writer_calls, [1, 1, 1]),
        (mask_calls, [2, 1]),  # a mask that is remembered is not remembered again
    ],
)
def test_each_call_takes_the_lock(tmp_path: Path, make: Callable[[Path], Calls], times: list[int] | None) -> None:
    shared, calls = make(tmp_path)
    shared._lock = counted = Counted(shared._lock)
    found = []
    for call in calls:
        counted.count = 0
        call()
        found.append(counted.count)
    assert all(found) if times is None else found == times, found
