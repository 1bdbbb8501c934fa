"""What the screens ask and no option says: data, without a word of how it is laid out.

The other questions are made of declarations (`question.py`); `pages.py` puts all of them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from simpletuner.families.readers import Kind, reading_text
from simpletuner.families.registry import all_specs
from simpletuner.families.spec import FamilySpec, Flavour
from simpletuner.hardware import GIB, USUAL_GPUS
from simpletuner.text import lines_of
from simpletuner.wizard.answers import ADAPTERS, GOALS, Answers, adapter_after
from simpletuner.wizard.lycoris import ALGORITHMS, LAYERS, PROPOSED_FACTOR, has_both_kinds_of_layers
from simpletuner.wizard.plan import Plan
from simpletuner.wizard.proposals import proposed_fallback, proposed_prompts
from simpletuner.wizard.question import (
    Choices,
    Question,
    Refused,
    dataset_question,
    option_question,
    shown,
)


def _set_family(answers: Answers, name: str) -> Answers:
    if name == answers.family:
        return answers
    changed = _set_adapter(answers, adapter_after(answers, name))
    return replace(changed, family=name, flavour=None, model=None)


def _family_choices(answers: Answers) -> Choices:
    specs, _ = all_specs()  # of a broken package `simpletuner models` tells
    return [(spec.name, _family_words(spec)) for spec in specs]


def _family_words(spec: FamilySpec) -> str:
    """What a family is and takes, short enough for 80 columns."""
    flavour = spec.flavours[spec.default_flavour]
    size = f"{flavour.parameters / 1e9:.1f} billion parameters, {flavour.weight_bytes() / GIB:.0f} GiB"
    facts = [size] if flavour.parameters else []
    facts += ["edits too"] if spec.max_references else []
    return f"{spec.title:<20} {', '.join(facts)}".rstrip()


def _flavour_choices(answers: Answers) -> Choices:
    flavours = answers.spec.flavours.values()
    return [(flavour.name, f"{flavour.name} ({flavour.hub_id}, {_facts_of(flavour)})") for flavour in flavours]


def _facts_of(flavour: Flavour) -> str:
    """Licence, and the memory that an adapter needs at least: of the weights alone."""
    weights = flavour.weight_bytes() / GIB
    return f"{flavour.licence}; {weights:.0f} GiB in bf16, {weights / 2:.0f} in int8" if weights else flavour.licence


def _set_flavour(answers: Answers, name: str) -> Answers:
    is_default = answers.flavour is None and name == answers.flavour_name
    return answers if is_default else replace(answers, flavour=name)


def _set_number(key: str, most: int) -> Callable[[Answers, str], Answers]:
    """Writes a whole number from 1 to `most` into a field of `Answers`."""

    def write(answers: Answers, text: str) -> Answers:
        if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= most:
            raise Refused(f'"{text}" is not a whole number; allowed: 1 to {most}')
        number: Any = int(text)
        return replace(answers, **{key: number})

    return write


def _set_adapter(answers: Answers, name: str) -> Answers:
    """Another algorithm has another usual rank."""
    return answers if name == answers.adapter else replace(answers, adapter=name, rank=None)


_KINDS: Mapping[str, Kind] = {"lora": "lora", "locon": "lora", "dora": "dora", "lokr": "lokr", "loha": "loha"}


def adapter_readers(answers: Answers) -> str:
    """Which other programs read the file of the chosen adapter."""
    kind = _KINDS.get(answers.adapter, "other")
    form = answers.options.get("lora_format") or answers.spec.default_form(kind)
    return reading_text(answers.spec.readers, "lycoris" if answers.lycoris else form, kind)


def _layer_choices(answers: Answers) -> Choices:
    return list(LAYERS.items())


def is_edit(answers: Answers) -> bool:
    return answers.goal == "edit" or bool(answers.reference_images)


def is_adapter(answers: Answers) -> bool:
    return answers.goal != "full"


def _read_webhook(answers: Answers, plan: Plan) -> str:
    """The address, where it is one service; else what `config.json` says."""
    written = answers.options.get("webhook_config")
    if isinstance(written, Mapping):
        return str(written.get("webhook_url") or written.get("callback_url") or "")
    return shown(written)


def _set_webhook(answers: Answers, text: str) -> Answers:
    """An address by itself says what kind of service it is; anything else is taken as it stands."""
    text, written = text.strip(), answers.options.get("webhook_config")
    is_discord = "discord" in text.lower()
    key, kind = ("webhook_url", "discord") if is_discord else ("callback_url", "raw")
    value: Any = text or None
    if text.startswith(("http://", "https://", "${")):
        named = {"webhook_url", "callback_url", "webhook_type"}
        others = written.items() if isinstance(written, Mapping) else ()
        value = {"webhook_type": kind, key: text, **{name: item for name, item in others if name not in named}}
    return replace(answers, options={**answers.options, "webhook_config": value})


def _set_prompts(answers: Answers, text: str) -> Answers:
    return replace(answers, prompts=tuple(dict.fromkeys(line.strip() for line in lines_of(text) if line.strip())))


GOAL = Question(
    "goal",
    "",
    "The next pages propose settings for it. Arrow keys choose, Enter continues.",
    "list",
    lambda answers, plan: answers.goal,
    lambda answers, value: replace(answers, goal=value),
    lambda answers: [(name, f"{name:<8} {words}") for name, words in GOALS.items()],
)
FAMILY = Question(
    "family",
    "",
    "The model family; sizes are those of its default checkpoint in bf16.",
    "list",
    lambda answers, plan: answers.family,
    _set_family,
    _family_choices,
)
FLAVOUR = Question(
    "flavour",
    "Flavour",
    "The published checkpoint of the family.",
    "choice",
    lambda answers, plan: answers.flavour_name,
    _set_flavour,
    _flavour_choices,
)
TRAINS_ON = Question(
    "trains_on",
    "Trains on",
    "The machine that trains: precision, optimizer and batch are proposed for it. Choose the GPU that you will rent or "
    "use, where it is not in this machine.",
    "choice",
    lambda answers, plan: str(answers.trains_on or ""),
    lambda answers, value: replace(answers, trains_on=int(value) if value else None),
    lambda answers: [
        ("", f"this machine: {answers.hardware.trainer}"),
        *((str(size), f"a GPU with {size} GB") for size in USUAL_GPUS),
    ],
)
ADAPTER = Question(
    "adapter",
    "Adapter",
    "The adapter type. The weights of the model stay frozen.",
    "choice",
    lambda answers, plan: answers.adapter,
    _set_adapter,
    lambda answers: list(ADAPTERS.items()),
    applies=is_adapter,
    facts=lambda answers: f"its file: {adapter_readers(answers)}; ADAPTERS.md compares them",
)
FACTOR = Question(
    "factor",
    "LoKr factor",
    "Size of the adapter: a small factor makes a large adapter that learns more; 16 suits most subjects and styles.",
    "text",
    lambda answers, plan: answers.factor or PROPOSED_FACTOR,
    _set_number("factor", 64),
    facts="allowed: whole number from 1 to 64",
    applies=lambda answers: is_adapter(answers) and answers.adapter == "lokr",
)
LYCORIS_RANK = Question(
    "rank",
    "Rank",
    "Size of the adapter: a large rank learns more. Of rotations (diag-oft, boft) it is that of their blocks.",
    "text",
    lambda answers, plan: answers.rank or ALGORITHMS.get(answers.adapter),
    _set_number("rank", 4096),
    facts="allowed: whole number from 1 to 4096",
    applies=lambda answers: is_adapter(answers) and ALGORITHMS.get(answers.adapter) is not None,
)
LAYERS_QUESTION = Question(
    "layers",
    "Layers",
    "Which layers the adapter changes.",
    "choice",
    lambda answers, plan: answers.layers or "all",
    lambda answers, value: replace(answers, layers=value),
    _layer_choices,
    applies=lambda answers: answers.lycoris is not None and has_both_kinds_of_layers(answers.spec),
)
RANK = replace(
    option_question("lora_rank", "LoRA rank"),
    applies=lambda answers: is_adapter(answers) and answers.lycoris is None,
)
FALLBACK = replace(
    dataset_question("caption_fallback", "Without a text"),
    applies=lambda answers: (
        answers.dataset.get("caption_strategy") in (None, "textfile")
        and bool(answers.dataset.get("caption_fallback") or proposed_fallback(answers))
    ),
)
WEBHOOK = Question(
    "webhook_config",
    "Webhook",
    "Gets progress, checkpoints, images and failures: the URL of a Discord webhook or of a service of your own. "
    "Optional.",
    "text",
    _read_webhook,
    _set_webhook,
    facts="${NAME} takes the URL from an environment variable, so that no file contains it",
)
PROMPTS = Question(
    "prompts",
    "Prompts",
    "One prompt a line, used at every validation. A prompt without your subject shows what else has changed.",
    "lines",
    lambda answers, plan: answers.prompts if answers.prompts is not None else proposed_prompts(answers),
    _set_prompts,
)
