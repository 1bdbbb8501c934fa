"""The end of a run for people: images of its data and `report.html`. Neither can cost a finished run anything."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from simpletuner import storage
from simpletuner.data.dataset import Dataset
from simpletuner.data.tiles import Tile, choose_images
from simpletuner.errors import SimpleTunerError
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.reporting.report import REPORT_FILE, write_report
from simpletuner.reporting.report.record import CONTACT_DIR

IMAGES_EACH = 12
LARGEST_SIDE = 320


def report_run(output_dir: Path, datasets: Sequence[Dataset], bus: EventBus) -> None:
    """Write the report; what keeps it from being written is reported, and is no failure of the run."""
    try:
        write_contact_images(output_dir / CONTACT_DIR, datasets)
        write_report(output_dir)
    except (SimpleTunerError, OSError) as error:
        text = f"no {REPORT_FILE}: {error}; to try again: simpletuner report {shlex.quote(str(output_dir))}"
        bus.emit(Notice("warning", text))


def write_contact_images(folder: Path, datasets: Sequence[Dataset]) -> None:
    """Keep some images of each dataset as they were trained on, with their captions, as the report shows them.

    Those that are there stay where no dataset has changed: images in a bucket are not fetched at each start.
    """
    fingerprints = {dataset.id: dataset.fingerprint for dataset in datasets}
    is_whole = folder.is_dir() and not storage.verify_dir(folder, full=False)
    if is_whole and storage.read_manifest(folder).metadata.get("datasets") == fingerprints:
        return
    with storage.commit_dir(folder, metadata={"datasets": fingerprints}) as temporary:
        listed = []
        for index, dataset in enumerate(datasets):
            for number, tile in enumerate(choose_images(dataset, IMAGES_EACH)):
                name = f"{index}_{number:02d}.webp"
                _save(tile, temporary / name)
                listed.append({"dataset": dataset.id, "file": name, "caption": tile.caption, "note": tile.note})
        storage.write_json(temporary / "pictures.json", listed)


def _save(tile: Tile, path: Path) -> None:
    """The references, the crop and its mask, side by side."""
    from PIL import Image

    images = tile.images
    image = Image.new("RGB", (sum(each.width for each in images), max(each.height for each in images)))
    left = 0
    for each in images:
        image.paste(each, (left, 0))
        left += each.width
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    image.save(path, format="WEBP", lossless=max(image.size) <= 128, quality=85)
