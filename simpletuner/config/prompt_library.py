"""`user_prompt_library.json`: nickname -> prompt; nicknames become file names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from simpletuner.config.checking import show_value
from simpletuner.config.json_reader import Document
from simpletuner.errors import Problem

MAX_NICKNAME = 100
# What no common file system takes in a name. `<` and `>` are allowed here: the quickstart's placeholders have them,
# and the folder of a run lies on a file system that takes them.
_UNUSABLE = re.compile(r'[/\\:*?"|\x00-\x1f]')
RESERVED = ("validation",)


def read_prompt_library(document: Document) -> tuple[Mapping[str, str], list[Problem]]:
    """The prompts of a library, and what is wrong with it."""
    if not isinstance(document.value, dict):
        shape = '{"nickname": "the prompt"}'
        return {}, [Problem("is not a JSON object", file=document.file, line=1, allowed=shape)]
    problems = []
    folded: dict[str, str] = {}
    for nickname, prompt in document.value.items():
        message = _nickname_fault(nickname, folded)
        if message is None and (not isinstance(prompt, str) or not prompt.strip()):
            message = f"{show_value(prompt)} is not a prompt"
        if message:
            line = document.line(nickname)
            problems.append(Problem(message, key=nickname or '""', file=document.file, line=line, allowed="a text"))
        folded.setdefault(nickname.casefold(), nickname)
    if not document.value:
        problems.append(Problem("holds no prompts", file=document.file, line=1, allowed='{"nickname": "the prompt"}'))
    return (document.value if not problems else {}), problems


def _nickname_fault(nickname: str, folded: Mapping[str, str]) -> str | None:
    """Why a nickname cannot be a file name, or None."""
    if not nickname.strip() or nickname.strip() != nickname or nickname.startswith("."):
        return "the nickname is empty, or begins with a dot, or has blanks around it, and cannot name a file"
    if len(nickname) > MAX_NICKNAME:
        return f"the nickname has {len(nickname)} letters and cannot name a file; at most {MAX_NICKNAME}"
    if _UNUSABLE.search(nickname):
        return 'the nickname holds one of / \\ : * ? " | or a control character, and cannot name a file'
    if nickname.casefold() in RESERVED:
        return f'the nickname "{nickname}" is that of validation_prompt'
    if nickname.casefold() in folded:
        return f'the nickname differs from "{folded[nickname.casefold()]}" in capitals only; both would name one file'
    return None
