"""`user_prompt_library.json`: nickname -> prompt, or prompt and how it is generated. Nicknames become file names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.config.checking import show_value
from simpletuner.config.json_reader import Document
from simpletuner.config.values import read_float, read_int, read_sizes, read_text, read_text_or_list
from simpletuner.errors import Problem
from simpletuner.spelling import did_you_mean
from simpletuner.text import has_control

MAX_NICKNAME = 100
# What no common file system takes in a name. `<` and `>` are allowed here: the quickstart's placeholders have them,
# and the folder of a run lies on a file system that takes them.
_UNUSABLE = re.compile(r'[/\\:*?"|\x00-\x1f]')
RESERVED = ("validation", "unconditional")
SHAPE = '{"nickname": "the prompt"} or {"nickname": {"prompt": "the prompt", "seed": 7}}'


@dataclass(frozen=True)
class LibraryPrompt:
    """One prompt of a library. What is None is as `config.json` says.

    Args:
        negative_prompt: what guidance leads away from; may be empty.
        resolution: one size or several, as in `validation_resolution`.
        num_inference_steps: sampling steps.
        guidance: classifier-free guidance scale.
        guidance_rescale: where the family's pipeline has it.
        seed: of the first image; further ones count up.
        num_images: images for each size.
        adapter_strength: multiplies what the adapter adds; 1 is as trained.
        references: files of the images that are edited; empty for none.
    """

    prompt: str
    negative_prompt: str | None = None
    resolution: str | None = None
    num_inference_steps: int | None = None
    guidance: float | None = None
    guidance_rescale: float | None = None
    seed: int | None = None
    num_images: int | None = None
    adapter_strength: float | None = None
    references: tuple[str, ...] | None = None


def read_prompt_library(document: Document) -> tuple[Mapping[str, LibraryPrompt], list[Problem]]:
    """The prompts of a library, and what is wrong with it."""
    if not isinstance(document.value, dict):
        return {}, [Problem("is not a JSON object", file=document.file, line=1, allowed=SHAPE)]
    prompts: dict[str, LibraryPrompt] = {}
    problems: list[Problem] = []
    folded: dict[str, str] = {}
    for nickname, value in document.value.items():
        message = _nickname_fault(nickname, folded)
        if message is None:
            prompt, faults = _read_prompt(nickname, value, document)
            problems += faults
            if prompt is not None:
                prompts[nickname] = prompt
        else:
            line = document.line(nickname)
            problems.append(Problem(message, key=nickname or '""', file=document.file, line=line, allowed="a text"))
        folded.setdefault(nickname.casefold(), nickname)
    if not document.value:
        problems.append(Problem("holds no prompts", file=document.file, line=1, allowed=SHAPE))
    return (prompts if not problems else {}), problems


def prompt_texts(library: Any) -> dict[str, str]:
    """Nickname -> prompt of a library as it stands in its file, sound or not: what an editor shows."""
    if not isinstance(library, dict):
        return {}
    return {
        nickname: str(value.get("prompt", "") if isinstance(value, dict) else value)
        for nickname, value in library.items()
    }


def _read_prompt(nickname: str, value: Any, document: Document) -> tuple[LibraryPrompt | None, list[Problem]]:
    """A text, or an object with a prompt and how to generate it."""
    if not isinstance(value, dict):
        if isinstance(value, str) and value.strip():
            return LibraryPrompt(value), []
        message = f"{show_value(value)} is not a prompt"
        line = document.line(nickname)
        return None, [Problem(message, key=nickname, file=document.file, line=line, allowed="a text, or an object")]
    fields: dict[str, Any] = {}
    problems = []
    for key, given in value.items():
        line = document.line(nickname, key)
        place = f"{nickname}.{key}"
        if key not in _FIELDS:
            fix = did_you_mean(key, _FIELDS)
            message, allowed = "is not known", ", ".join(_FIELDS)
            problems.append(Problem(message, key=place, file=document.file, line=line, allowed=allowed, fix=fix))
            continue
        if given is None:
            continue
        read, allowed, is_allowed = _FIELDS[key]
        try:
            fields[key] = read(given)
            fault = None if is_allowed(fields[key]) else f"{show_value(given)} is outside of what is allowed"
        except ValueError as error:
            fault = f"{show_value(given)}: {error}"
        if fault:
            problems.append(Problem(fault, key=place, file=document.file, line=line, allowed=allowed))
    if "prompt" not in fields and not problems:
        line = document.line(nickname)
        problems.append(Problem("has no prompt", key=nickname, file=document.file, line=line, allowed=SHAPE))
    return (LibraryPrompt(**fields) if not problems else None), problems


def _anything(value: Any) -> bool:
    return True


_Field = tuple[Callable[[Any], Any], str, Callable[[Any], bool]]
# Key -> reader, what is allowed in words, and as a test.
_FIELDS: Mapping[str, _Field] = {
    "prompt": (read_text, "a text", lambda text: bool(text.strip())),
    "negative_prompt": (read_text, "a text", _anything),
    "resolution": (read_sizes, "1024, or 1280x768 (width x height), or several with commas", _anything),
    "num_inference_steps": (read_int, "1 to 1000", lambda number: 1 <= number <= 1000),
    "guidance": (read_float, "0 to 100", lambda number: 0 <= number <= 100),
    "guidance_rescale": (read_float, "0 to 1", lambda number: 0 <= number <= 1),
    "seed": (read_int, "a whole number >= 0", lambda number: number >= 0),
    "num_images": (read_int, "a whole number >= 1", lambda number: number >= 1),
    "references": (read_text_or_list, "the path of an image, or a list of paths", _anything),
    "adapter_strength": (read_float, "a number from -10 to 10", lambda number: abs(number) <= 10),
}


def _nickname_fault(nickname: str, folded: Mapping[str, str]) -> str | None:
    """Why a nickname cannot be a file name, or None."""
    if not nickname.strip() or nickname.strip() != nickname or nickname.startswith("."):
        return "the nickname is empty, or begins with a dot, or has spaces around it, and cannot name a file"
    if len(nickname) > MAX_NICKNAME:
        return f"the nickname has {len(nickname)} letters and cannot name a file; at most {MAX_NICKNAME}"
    if _UNUSABLE.search(nickname) or has_control(nickname):
        return 'the nickname holds one of / \\ : * ? " | or a control character, and cannot name a file'
    if nickname.casefold() in RESERVED:
        owner = "validation_prompt" if nickname.casefold() == RESERVED[0] else "validation_disable_unconditional"
        return f'the nickname "{nickname}" is that of {owner}'
    if nickname.casefold() in folded:
        return f'the nickname differs from "{folded[nickname.casefold()]}" in capitals only; both would name one file'
    return None
