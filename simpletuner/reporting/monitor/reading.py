"""What is posted to the monitor, checked: it comes from the network."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from simpletuner.reporting.monitor.history import Image

MAX_IMAGES = 32
_DATA_URI = re.compile(r"data:(image/(?:png|jpeg|webp));base64,")


class BadEvent(Exception):
    """What was posted is no event; the text says why."""


def read_event(body: bytes) -> tuple[Mapping[str, Any], list[Image]]:
    """The event in the body of a request, and its pictures.

    Raises:
        BadEvent: it is none.
    """
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        raise BadEvent("not JSON") from None
    # A type that this version does not know is kept in the log.
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise BadEvent("no event of a raw webhook")
    data = event.get("data")
    if not isinstance(event.get("id"), str) or not isinstance(data, dict):
        raise BadEvent("an event has id and data")
    _check_data(data)
    images = event.get("images", [])
    if not isinstance(images, list) or len(images) > MAX_IMAGES:
        raise BadEvent(f"images is a list of at most {MAX_IMAGES}")
    return event, [_image(text) for text in images]


def _check_data(data: Mapping[str, Any]) -> None:
    """The parts that the history counts on; the page shows everything else as text."""
    curve = data.get("curve", [])
    if not isinstance(curve, list) or not all(isinstance(row, list) and _is_point(row) for row in curve):
        raise BadEvent("curve is a list of [step, loss, learning rate, gradient norm]")
    steps = data.get("regularisation_steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, int) for step in steps):
        raise BadEvent("regularisation_steps is a list of whole numbers")
    pictures = data.get("pictures", [])
    if not isinstance(pictures, list) or not all(isinstance(picture, dict) for picture in pictures):
        raise BadEvent("pictures is a list of objects")
    for key in ("step", "start_step"):
        if key in data and not isinstance(data[key], int):
            raise BadEvent(f"{key} is a whole number")
    if "stage" in data and not isinstance(data["stage"], dict):
        raise BadEvent("stage is an object")


def _is_point(row: list[Any]) -> bool:
    return len(row) >= 4 and isinstance(row[0], int)


def _image(text: Any) -> Image:
    match = _DATA_URI.match(text) if isinstance(text, str) else None
    if match is None:
        raise BadEvent("an image is a data URI of a PNG, JPEG or WebP")
    try:
        return Image(match[1], base64.b64decode(text[match.end() :], validate=True))
    except binascii.Error:
        raise BadEvent("an image is not base64") from None
