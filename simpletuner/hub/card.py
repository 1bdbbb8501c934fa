"""The model card: what was trained, on what, how it looks, and code that generates with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner import __version__

# Names of licences as families carry them -> identifiers that the Hub knows; others are "other" with their name.
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
        licence: of the base, as the family names it.
        kind: what was trained: `full`, or the adapter's kind (`lokr`, `lora`, `dora`, ...).
        usage: Python that generates with it.
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
    sections = (
        _introduction(facts),
        _gallery(facts),
        f"## Use it\n\n```python\n{facts.usage.strip()}\n```",
        _other_programs(facts),
        _training(facts),
        _datasets(facts),
        f"Trained with simpletuner {__version__}.",
    )
    return f"---\n{front_matter(facts)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


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


def _introduction(facts: CardFacts) -> str:
    what = "A fine-tuned version" if facts.kind == "full" else f"An adapter ({facts.kind})"
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else facts.model
    lines = [f"# {inline(facts.title)}", f"{what} of {base}, after {facts.step:,} of {facts.total_steps:,} steps."]
    if facts.instance_prompts:
        words = ", ".join(f"`{inline(prompt)}`" for prompt in facts.instance_prompts)
        lines.append(f"It was trained with the words {words}.")
    if facts.note:
        lines.append(facts.note.strip())
    return "\n\n".join(lines)


def _gallery(facts: CardFacts) -> str:
    return "## Images\n\n<Gallery />" if facts.images else ""


def _other_programs(facts: CardFacts) -> str:
    """Who reads the file, and how to make forms of it for others."""
    if facts.kind == "full":
        return ""
    command = f"simpletuner export pytorch_lora_weights.safetensors --model {facts.base_model or 'PATH'}"
    lines = f"The file is {facts.readers}. Files for other programs are made of it, as far as they can hold it, with:"
    return f"{lines}\n\n```console\n{command}\n```"


def _training(facts: CardFacts) -> str:
    rows = [("steps", facts.step)] + [
        (name, facts.options[name]) for name in HYPERPARAMETERS if facts.options.get(name) not in (None, "")
    ]
    if facts.eval_loss is not None:
        rows.append(("eval loss", f"{facts.eval_loss:.4f}"))
    body = "\n".join(f"| {name} | {cell(value)} |" for name, value in rows)
    return f"## Training\n\n| | |\n|---|---|\n{body}"


def _datasets(facts: CardFacts) -> str:
    if not facts.datasets:
        return ""
    rows = []
    for each in facts.datasets:
        sizes = each.get("sizes") or {}
        shown = ", ".join(list(sizes)[:6]) + (", ..." if len(sizes) > 6 else "")
        rows.append(f"| {cell(each.get('id'))} | {cell(each.get('bucketed'))} | {cell(shown)} |")
    return "## Data\n\n| dataset | images | sizes |\n|---|---|---|\n" + "\n".join(rows)


def inline(text: str) -> str:
    """A text of the user's that must stay within its line and is no markup."""
    return " ".join(text.replace("<", "&lt;").replace("`", "'").split())


def cell(value: Any) -> str:
    """A value as it can stand in a cell of a table."""
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, float):
        value = f"{value:g}"
    return inline(str(value)).replace("|", "\\|")
