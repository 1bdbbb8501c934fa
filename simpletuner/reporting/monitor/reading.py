"""What is posted to the monitor, checked: it comes from the network."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from simpletuner.reporting.monitor.history import Image
from simpletuner.text import read_json_text

MAX_IMAGES = 32
MAX_DEPTH = 20
# Whole numbers above it are no longer exact in a browser.
MAX_STEP = 2**53
_TEXTS = ("timestamp", "severity", "title", "message")
# What the history keeps of thousands of events.
_LONGEST = {"id": 200, "type": 200, "run_name": 500, "title": 2000, "message": 50_000}
_WITH_STEP = ("training.evaluation", "validation.score")
_DATA_URI = re.compile(r"data:(image/(?:png|jpeg|webp));base64,")


class BadEvent(Exception):
    """What was posted is no event; the text says why."""


def read_event(body: bytes) -> tuple[Mapping[str, Any], list[Image]]:
    """The event in the body of a request, and its images.

    Raises:
        BadEvent: it is none.
    """
    try:
        event = read_json_text(body.decode("utf-8"))
    except ValueError:
        raise BadEvent("not JSON") from None
    if _depth(event) > MAX_DEPTH:
        raise BadEvent(f"nested deeper than {MAX_DEPTH}")
    # A type that this version does not know is kept in the log.
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise BadEvent("not an event of a raw webhook")
    data = event.get("data")
    if not isinstance(event.get("id"), str) or not isinstance(data, dict):
        raise BadEvent("an event has id and data")
    if not all(isinstance(event.get(key, ""), str | None) for key in ("run_name", *_TEXTS)):
        raise BadEvent(f"{', '.join(_TEXTS)} are texts")
    if any(len(event.get(key) or "") > longest for key, longest in _LONGEST.items()):
        raise BadEvent(f"{', '.join(_LONGEST)} have at most {', '.join(map(str, _LONGEST.values()))} characters")
    _check_data(event["type"], data)
    images = event.get("images", [])
    if not isinstance(images, list) or len(images) > MAX_IMAGES:
        raise BadEvent(f"images is a list of at most {MAX_IMAGES}")
    return event, [_image(text) for text in images]


def _depth(value: Any) -> int:
    level, parts = 0, [value]
    while parts and level <= MAX_DEPTH:
        level += 1
        inner = [part.values() if isinstance(part, dict) else part for part in parts if isinstance(part, dict | list)]
        parts = [each for part in inner for each in part]
    return level


def _check_data(kind: str, data: Mapping[str, Any]) -> None:
    """The parts that the history counts on; the page shows everything else as text."""
    curve = data.get("curve", [])
    if not isinstance(curve, list) or not all(isinstance(row, list) and _is_point(row) for row in curve):
        raise BadEvent("curve is a list of [step, loss, learning rate, gradient norm]")
    steps = data.get("regularisation_steps", [])
    if not isinstance(steps, list) or not all(_is_step(step) for step in steps):
        raise BadEvent("regularisation_steps is a list of whole numbers")
    images = data.get("pictures", [])
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise BadEvent("images is a list of objects")
    for key in ("step", "start_step"):
        if key in data and not _is_step(data[key]):
            raise BadEvent(f"{key} is a whole number")
    if kind in _WITH_STEP and "step" not in data:
        raise BadEvent(f"{kind} has a step")
    stage = data.get("stage", {})
    if not isinstance(stage, dict) or not isinstance(stage.get("progress") or {}, dict):
        raise BadEvent("stage is an object, and its progress too")


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_STEP


def _is_point(row: list[Any]) -> bool:
    return len(row) >= 4 and _is_step(row[0])


def _image(text: Any) -> Image:
    match = _DATA_URI.match(text) if isinstance(text, str) else None
    if match is None:
        raise BadEvent("an image is a data URI of a PNG, JPEG or WebP")
    try:
        return Image(match[1], base64.b64decode(text[match.end() :], validate=True))
    except binascii.Error:
        raise BadEvent("an image is not base64") from None
