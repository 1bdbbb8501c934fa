"""What the wizard proposes where nobody says anything, from the goal, the model, the images and the machine.

Everything here is a starting point that the screens show and anybody may change.
"""

from __future__ import annotations

import re
from typing import Any

from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options import all_options
from simpletuner.config.values import parse_sizes
from simpletuner.families.presets import Preset, preset_for
from simpletuner.hardware import GIB
from simpletuner.wizard.answers import Answers, Goal

# Sides that training is proposed at, never above what the family generates by default.
_SIDES = (1024, 768, 512, 256, 128, 64)


# What training an adapter takes beside the frozen weights, with checkpointing: activations, adapter, the driver.
BESIDE_WEIGHTS = 4 * GIB
# GiB of a card from which on batches are larger than those of the presets.
ROOMY = 48
USABLE = 0.9
# Formats of the frozen weights by what they keep of the model, and their bits.
_BASE_FORMATS = (("int8-quanto", 8), ("nf4-bnb", 4), ("int4-quanto", 4))


def memory_options(answers: Answers) -> dict[str, Any]:
    """Number formats and batch that a machine takes, from the weights of the model and what comes beside them."""
    hardware, goal = answers.target, answers.goal
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
    if goal == "full" or answers.adapter == "full":
        return options
    if (preset := card_preset(answers)) is not None:
        return options | {name: value for name, value in preset.options.items() if name != "resolution"}
    options |= base_format(answers)
    if "base_model_precision" in options and hardware.device == "cuda" and gib < 15:
        options |= {"optimizer": _if_built("optimizer", "bnb-lion8bit-paged") or options["optimizer"]}
    return options


def card_preset(answers: Answers) -> Preset | None:
    """What was computed for an adapter of this model on a card of this size; None where there is room to spare, or
    nothing was computed."""
    gib = answers.target.device_bytes / GIB
    if answers.target.device != "cuda" or answers.goal == "full" or gib >= ROOMY:
        return None
    return preset_for(answers.family, answers.flavour_name, round(gib))


def base_format(answers: Answers) -> dict[str, Any]:
    """How the frozen weights are kept where they do not fit as they are; empty where they do, or nothing would help.

    Where the weights do not fit even while they are quantized, the CPU quantizes them.
    """
    flavour = answers.spec.flavours[answers.flavour_name]
    room = USABLE * answers.target.device_bytes - BESIDE_WEIGHTS
    if flavour.weight_bytes() <= room:
        return {}
    built = [(name, bits) for name, bits in _BASE_FORMATS if _if_built("base_model_precision", name)]
    fitting = [name for name, bits in built if flavour.weight_bytes(bits) <= room]
    if not built:
        return {}
    chosen = fitting[0] if fitting else built[-1][0]
    return {"base_model_precision": chosen} | ({"quantize_via": "cpu"} if _is_built("quantize_via") else {})


def _if_built(option: str, value: str) -> str | None:
    return value if value in all_options()[option].choices else None


def _is_built(option: str) -> bool:
    return all_options()[option].planned is None


def proposed_learning_rate(optimizer: str, goal: Goal) -> float:
    """By the kind of optimizer: those that find the scale take 1, Lion a fifth of AdamW's, plain descent more."""
    row = OPTIMIZERS.get(optimizer)
    if (row is not None and row.tunes_lr) or "adadelta" in optimizer:
        return 1.0
    adam = 1e-5 if goal == "full" else 1e-4
    return adam / 5 if "lion" in optimizer else 100 * adam if "sgd" in optimizer else adam


def proposed_steps(answers: Answers, batch: int) -> int:
    """So many passes over the images, within limits that hold for few and for many."""
    passes, least, most = {
        "subject": (100, 500, 3000),
        "style": (60, 1500, 6000),
        "edit": (60, 1500, 6000),
        "full": (20, 2000, 20000),
    }[answers.goal]
    facts = answers.seen.get(answers.images)
    images = facts.usable if facts else least * batch // passes
    return min(max(round(images * passes / batch / 100) * 100, least), most)


def proposed_resolution(answers: Answers) -> int:
    """The largest usual side that half of the images reach and the family generates by default."""
    spec = answers.spec
    native = parse_sizes(str(spec.defaults_for(answers.flavour_name).get("validation_resolution", "1024")))[0]
    limit = max(native)
    if (preset := card_preset(answers)) is not None:
        limit = min(limit, preset.options["resolution"])
    facts = answers.seen.get(answers.images)
    if facts and facts.usable:
        limit = min(limit, facts.side)
    return next((side for side in _SIDES if side <= limit), max(_SIDES[-1], spec.size_multiple))


def proposed_captions(answers: Answers) -> str:
    """Captions beside the images where there are some; else one prompt for all where that was given."""
    facts = answers.seen.get(answers.images)
    if facts and facts.with_text:
        return "textfile"
    says_nothing = facts is not None and facts.are_numbered
    one_for_all = answers.goal == "subject" or answers.dataset.get("instance_prompt") or says_nothing
    return "instanceprompt" if one_for_all else "filename"


def proposed_fallback(answers: Answers) -> str | None:
    """What stands in for the text files that are missing: the prompt where one was given, or where names say nothing;
    else the names. None where none is missing.
    """
    facts = answers.seen.get(answers.images)
    if not facts or not facts.is_partly_captioned:
        return None
    return "instanceprompt" if answers.dataset.get("instance_prompt") or facts.without_words else "filename"


def proposed_reference_type(answers: Answers) -> str:
    """Pairs of the same sizes are cut alike; others keep the shape that each has."""
    after, before = (answers.seen.get(folder) for folder in (answers.images, answers.reference_images))
    return "reference_strict" if after and before and after.shapes == before.shapes else "reference_loose"


def proposed_prompts(answers: Answers) -> tuple[str, ...]:
    """The subject in some surroundings, and one prompt without it, which shows what else has changed; for an edit the
    instruction of a pair.
    """
    prompt = answers.dataset.get("instance_prompt") or ""
    name = prompt if isinstance(prompt, str) else prompt[0]
    if answers.goal == "subject" and name:
        return (name, f"{name} on a beach at sunset", f"a pencil drawing of {name}", "a mountain lake in the morning")
    if answers.goal == "edit":
        facts = answers.seen.get(answers.images)
        instruction = name or (facts.caption if facts else "")
        return (instruction,) if instruction else ()
    ending = f", {name}" if name else ""
    return tuple(
        f"{scene}{ending}" for scene in ("a portrait of a woman", "a cat on a windowsill", "a street at night")
    )


def folder_name(folder: str) -> str:
    """The name of a folder, as far as it can name a dataset."""
    name = re.split(r"[/\\]", folder.rstrip("/\\"))[-1]
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60]
