"""The model card: what was trained, on what, example images, and code that uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from simpletuner import __version__
from simpletuner.templating import render

# Names of licenses as families carry them -> identifiers that the Hub knows; others are "other" with their name.
LICENCES: Mapping[str, str] = {
    "mit": "mit",
    "apache 2.0": "apache-2.0",
    "apache-2.0": "apache-2.0",
    "creativeml open rail++-m": "openrail++",
    "creativeml open rail-m": "creativeml-openrail-m",
}
NOT_SAFE = "not-for-all-audiences"
HYPERPARAMETERS = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer", "train_batch_size"),
    *("gradient_accumulation_steps", "mixed_precision", "base_model_precision", "resolution", "resolution_type"),
    *("caption_dropout_probability", "max_grad_norm", "use_ema", "seed"),
)


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says.

    Args:
        repo_id: with its owner.
        title: of the run.
        model: how people call the family.
        base_model: hub id of the base; None where it was a folder of the user's.
        license: of the base, as the family names it.
        kind: what was trained: `full`, or the adapter's kind (`lokr`, `lora`, `dora`, ...).
        usage: Python that generates images with it.
        step: optimizer steps done.
        total_steps: optimizer steps at which the run ends.
        options: the resolved configuration.
        datasets: entries of `dataset_report.json`.
        images: (prompt, path in the repository).
        eval_loss: newest, None where none was computed.
        instance_prompts: words that call the subject.
        is_safe: `model_card_safe_for_work`.
        note: `model_card_note`.
        readers: which programs read the adapter's file; empty for a whole model.
    """

    repo_id: str
    title: str
    model: str
    base_model: str | None
    licence: str
    kind: str
    usage: str
    step: int
    total_steps: int
    options: Mapping[str, Any]
    datasets: Sequence[Mapping[str, Any]] = ()
    images: Sequence[tuple[str, str]] = ()
    eval_loss: float | None = None
    instance_prompts: Sequence[str] = ()
    is_safe: bool = False
    note: str | None = None
    readers: str = ""


def card_text(facts: CardFacts) -> str:
    """The whole README.md."""
    options = ((name, facts.options.get(name)) for name in HYPERPARAMETERS)
    return render(
        "model_card.md",
        **{each.name: getattr(facts, each.name) for each in fields(facts)},
        version=__version__,
        front_matter=front_matter(facts),
        hyperparameters=[(name, value) for name, value in options if value not in (None, "")],
    )


def front_matter(facts: CardFacts) -> str:
    """The YAML block that the Hub reads."""
    from huggingface_hub import ModelCardData

    is_full = facts.kind == "full"
    tags = ["text-to-image", "image-generation", "simpletuner", *([] if is_full else ["lora", "template:sd-lora"])]
    if facts.kind not in ("full", "lora", "dora"):
        tags += ["lycoris", facts.kind]
    if not facts.is_safe:
        tags.append(NOT_SAFE)
    extra: dict[str, Any] = {}
    if facts.base_model:
        extra["base_model_relation"] = "finetune" if is_full else "adapter"
    if facts.instance_prompts:
        extra["instance_prompt"] = facts.instance_prompts[0]
    if facts.images:
        extra["widget"] = [{"text": prompt or "-", "output": {"url": path}} for prompt, path in facts.images]
    licence = LICENCES.get(facts.licence.lower())
    data = ModelCardData(
        license=licence or "other",
        license_name=None if licence or not facts.licence else facts.licence.lower().replace(" ", "-"),
        base_model=facts.base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        **extra,
    )
    return str(data.to_yaml()).strip()
