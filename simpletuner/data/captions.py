"""What a dataset says about each image: the caption strategies.

A strategy gives every variant that it found; one of them is generated when the image is used (`Dataset.caption_for`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from simpletuner.text import NotText, decode_lenient, lines_of, without_separators

CaptionFallback = Literal["filename", "instanceprompt"]
CaptionSource = Literal["filename", "textfile", "table", "instanceprompt"]

# Files beside an image that hold its caption; the second is what kohya's scripts write. Of both the first counts.
CAPTION_SUFFIXES = (".txt", ".caption")
# A longer text file is not a caption: no text encoder reads more than a few thousand tokens.
MAX_CAPTION_BYTES = 1_000_000
# Raise it when the same bytes of a caption file would give another text.
TEXT_VERSION = "2"
# Between the variants that a row of a table gives: the control character made for this, since captions hold newlines.
VARIANT_SEPARATOR = "\x1e"


_CAMERA_WORDS = {
    *("img", "image", "dsc", "dscn", "dscf", "cimg", "imgp", "pxl", "mvi", "mvimg", "gopr", "dji", "whatsapp", "pano"),
    *("photo", "picture", "pict", "screenshot", "scan", "untitled", "unnamed", "copy", "edited"),
}


@dataclass(frozen=True)
class CaptionRules:
    """How one dataset gets its captions.

    Args:
        strategy: `filename`, `textfile` (a file of `CAPTION_SUFFIXES` beside the image), `table` (the row that the
            image comes from, which the backend shows as such a file) or `instanceprompt`.
        instance_prompts: one prompt or several to sample from.
        only_instance_prompt: the instance prompts replace what the strategy finds.
        prepend_instance_prompt: an instance prompt and a space stand before what the strategy finds.
        splits_lines: each line of a text file is a variant; otherwise the whole file is one caption.
        fallback: where the caption comes from of an image that the strategy finds none for. With one, the number that
            a camera gave a file is no caption.
    """

    strategy: CaptionSource
    instance_prompts: tuple[str, ...] = ()
    only_instance_prompt: bool = False
    prepend_instance_prompt: bool = False
    splits_lines: bool = True
    fallback: CaptionFallback | None = None

    @property
    def reads_text_files(self) -> bool:
        return self.strategy in ("textfile", "table") and not self.only_instance_prompt

    @property
    def reads_file_names(self) -> bool:
        return self.strategy == "filename" and not self.only_instance_prompt


def captions_of(path: str, text: str | None, rules: CaptionRules) -> tuple[str, ...]:
    """Every caption variant of an image; empty where the strategy finds none.

    Args:
        path: of the image, `/`-separated.
        text: content of its caption file, None where there is none.
    """
    if rules.strategy == "instanceprompt" or rules.only_instance_prompt:
        return rules.instance_prompts
    found = _found(path, text, rules.strategy, rules)
    if not found and rules.fallback == "filename":
        found = _found(path, None, "filename", rules)
    if not found and rules.fallback:
        return rules.instance_prompts
    if rules.prepend_instance_prompt:
        return tuple(f"{prompt} {caption}" for prompt in rules.instance_prompts for caption in found)
    return tuple(found)


def _found(path: str, text: str | None, strategy: CaptionSource, rules: CaptionRules) -> Sequence[str]:
    if strategy == "filename":
        name = "" if rules.fallback and is_camera_name(path) else caption_from_name(path)
        return [name] if name else []
    if not text:
        return []
    return text.split(VARIANT_SEPARATOR) if strategy == "table" else caption_variants(text, rules.splits_lines)


def is_camera_name(path: str) -> bool:
    """Whether a file's name is the number that a camera or a program gave it: IMG_2031, DSC-0007, 00012."""
    stem = _stem(path).lower()
    words = re.findall(r"[^\W\d_]{3,}|[^\W\d_a-zA-Z]+", stem)
    return set(words) <= _CAMERA_WORDS if words else bool(re.search(r"\d", stem))


def caption_from_name(path: str) -> str:
    """The file's name without folder and extension, underscores as spaces (as SimpleTuner does).

    Bytes that are no UTF-8 are read as `decode_caption` does; a name that cannot be read is no caption.
    """
    try:
        name, _ = decode_lenient(os.fsencode(_stem(path)))
    except NotText:
        return ""
    return " ".join(without_separators(name).replace("_", " ").split())


def _stem(path: str) -> str:
    """As of a `PurePosixPath`, in a tenth of the time: it is asked for each image, at each step."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[:dot] if 0 < dot < len(name) - 1 else name


def name_note(path: bytes) -> str | None:
    """What a user should know of the letters of a file's name, None where they are plain."""
    try:
        _, encoding = decode_lenient(path.rpartition(b"/")[2])
    except NotText:
        return "a name that is not UTF-8"
    return f"a name that is not UTF-8, read as {encoding}" if encoding else None


def caption_variants(text: str, splits_lines: bool) -> list[str]:
    """The captions in the text of a caption file; blank lines are no captions."""
    parts = lines_of(text) if splits_lines else [text]
    return [caption for part in parts if (caption := without_separators(part).strip())]


def decode_caption(data: bytes) -> tuple[str, str | None]:
    """(text, note) of a caption file: UTF-8, UTF-16 or UTF-32 by their marks, else Windows-1252, which the note says.

    Raises:
        NotText: none of these.
    """
    text, encoding = decode_lenient(data)
    if encoding:
        return text, f"a caption file that is not UTF-8, read as {encoding}"
    return text, "a caption file that holds U+FFFD, where letters were lost before" if "\ufffd" in text else None
