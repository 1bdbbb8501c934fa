"""What the wizard proposes where nobody says anything, from the goal, the model, the pictures and the machine.

Everything here is a starting point that the screens show and anybody may change.
"""

from __future__ import annotations

import re
from typing import Any

from simpletuner.config.options import all_options
from simpletuner.config.values import parse_sizes
from simpletuner.hardware import GIB, Hardware
from simpletuner.wizard.answers import Answers, Goal

# Sides that training is proposed at, never above what the family draws by default.
_SIDES = (1024, 768, 512, 256, 128, 64)


def memory_options(hardware: Hardware, goal: Goal) -> dict[str, Any]:
    """Number formats and batch that a machine takes, from experience with models of a few billion weights."""
    gib = hardware.device_bytes / GIB
    if hardware.device == "cpu":
        return {
            "mixed_precision": "no",
            "gradient_checkpointing": True,
            "optimizer": "adamw",
            "train_batch_size": 1,
        }
    options: dict[str, Any] = {
        "mixed_precision": "bf16",
        "gradient_checkpointing": gib < 120,
        "optimizer": "adamw_bf16",
        "train_batch_size": 1 if gib < 32 or (goal == "full" and gib < 64) else 2 if gib < 64 else 4,
    }
    if goal != "full" and gib < 15 and "int8-quanto" in all_options()["base_model_precision"].choices:
        options["base_model_precision"] = "int8-quanto"
    return options


def proposed_learning_rate(optimizer: str, goal: Goal) -> float:
    """By the kind of optimizer: those that find the scale themselves take 1, Lion a fifth of AdamW's."""
    if "prodigy" in optimizer or "dadaptation" in optimizer:
        return 1.0
    adam = 1e-5 if goal == "full" else 1e-4
    return adam / 5 if "lion" in optimizer else adam


def proposed_steps(answers: Answers, batch: int) -> int:
    """So many passes over the pictures, within limits that hold for few and for many."""
    passes, least, most = {"subject": (100, 500, 3000), "style": (60, 1500, 6000), "full": (20, 2000, 20000)}[
        answers.goal
    ]
    facts = answers.seen.get(answers.pictures)
    pictures = facts.usable if facts else least * batch // passes
    return min(max(round(pictures * passes / batch / 100) * 100, least), most)


def proposed_resolution(answers: Answers) -> int:
    """The largest usual side that half of the pictures reach and the family draws by default."""
    spec = answers.spec
    native = parse_sizes(str(spec.defaults.get("validation_resolution", "1024")))[0]
    limit = max(native)
    facts = answers.seen.get(answers.pictures)
    if facts and facts.usable:
        limit = min(limit, facts.side)
    return next((side for side in _SIDES if side <= limit), max(_SIDES[-1], spec.size_multiple))


def proposed_captions(answers: Answers) -> str:
    """Captions beside the pictures where all have one; else one prompt for all where that was given."""
    facts = answers.seen.get(answers.pictures)
    if facts and facts.captions == "textfile":
        return "textfile"
    return "instanceprompt" if answers.goal == "subject" or answers.dataset.get("instance_prompt") else "filename"


def proposed_prompts(answers: Answers) -> tuple[str, ...]:
    """The subject in some surroundings, and one prompt without it, which shows what else has changed."""
    prompt = answers.dataset.get("instance_prompt") or ""
    name = prompt if isinstance(prompt, str) else prompt[0]
    if answers.goal == "subject" and name:
        return (name, f"{name} on a beach at sunset", f"a pencil drawing of {name}", "a mountain lake in the morning")
    ending = f", {name}" if name else ""
    return tuple(
        f"{scene}{ending}" for scene in ("a portrait of a woman", "a cat on a windowsill", "a street at night")
    )


def folder_name(folder: str) -> str:
    """The name of a folder, as far as it can name a dataset."""
    name = re.split(r"[/\\]", folder.rstrip("/\\"))[-1]
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60]
