"""What the screens ask, page by page: data, without a word of how it is drawn.

Most questions are options of config.json or keys of a dataset; their help, choices and limits are the declaration's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from simpletuner.config.checking import check_settings
from simpletuner.config.datasets import ImageDataset, dataset_options
from simpletuner.config.json_writer import json_text
from simpletuner.config.layers import Origin, Setting
from simpletuner.config.options import OptionInfo, all_options
from simpletuner.config.reference import shown_default
from simpletuner.models.registry import family_names, get_spec
from simpletuner.wizard.answers import GOALS, NO_EDIT, Answers
from simpletuner.wizard.plan import Plan
from simpletuner.wizard.project import typed_options
from simpletuner.wizard.proposals import proposed_prompts

# Choices that need further keys, which are written by hand.
_NEED_MORE = ("csv", "parquet", "huggingface", "webshart")

Kind = Literal["list", "choice", "yes_no", "text", "lines", "folder"]
Choices = Sequence[tuple[str, str]]


class Refused(ValueError):
    """A text that is no answer; the message says why."""


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Args:
        key: unique; of options and dataset keys their name.
        label: in front of the field.
        help: one or two sentences.
        kind: `list` shows all choices with a sentence each, `choice` opens them; `folder` is a text that names one.
        read: the answer that counts now, given or proposed.
        write: the answers with a new one, typed; raises `Refused`.
        choices: (value, words), of `list` and `choice`.
        facts: allowed values, unit, default: one line.
    """

    key: str
    label: str
    help: str
    kind: Kind
    read: Callable[[Answers, Plan], Any]
    write: Callable[[Answers, Any], Answers]
    choices: Callable[[Answers], Choices] = lambda answers: ()
    facts: str = ""


@dataclass(frozen=True)
class Page:
    """Questions that are asked together. `intro` may need what is known so far."""

    title: str
    intro: Callable[[Answers], str]
    questions: tuple[Question, ...]


def shown(value: Any) -> str:
    """A value as text in a field."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "\n".join(str(item) for item in value)
    return value if isinstance(value, str) else json_text(value)


# ---- options and dataset keys --------------------------------------------------------------------------------------


def option_question(name: str, label: str) -> Question:
    """Ask for an option of config.json."""
    info = all_options()[name]

    def write(answers: Answers, text: Any) -> Answers:
        if text == "" and info.default is None:
            return replace(answers, options={**answers.options, name: None})
        values, problems = typed_options({name: Setting(name, text, Origin("default"))})
        if problems:
            raise Refused(f"{problems[0].message}; allowed: {problems[0].allowed}")
        return replace(answers, options={**answers.options, name: values[name]})

    def read(answers: Answers, plan: Plan) -> Any:
        default = ",".join(info.default) if isinstance(info.default, tuple) else info.default
        return plan.config.get(name, default)

    return _declared(info, name, label, read, write)


def _options(labels: Mapping[str, str]) -> tuple[Question, ...]:
    return tuple(option_question(name, label) for name, label in labels.items())


def dataset_question(name: str, label: str) -> Question:
    """Ask for a key of the pictures' entry in the data file."""
    info = dataset_options("image")[name]

    def write(answers: Answers, text: Any) -> Answers:
        if text == "":
            return replace(answers, dataset={key: value for key, value in answers.dataset.items() if key != name})
        settings = {
            "id": Setting("id", "pictures", Origin("default")),
            "instance_data_dir": Setting("instance_data_dir", ".", Origin("default")),
            name: Setting(name, text, Origin("default")),
        }
        entry, problems = check_settings(ImageDataset, dataset_options("image"), settings, Origin("default"))
        if problems or entry is None:
            raise Refused(f"{problems[0].message}; allowed: {problems[0].allowed}")
        value = entry.model_dump(mode="json")[name]
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        return replace(answers, dataset={**answers.dataset, name: value})

    def read(answers: Answers, plan: Plan) -> Any:
        return plan.entries["pictures"].get(name, info.default)

    return _declared(info, name, label, read, write)


def _declared(
    info: OptionInfo,
    name: str,
    label: str,
    read: Callable[[Answers, Plan], Any],
    write: Callable[[Answers, Any], Answers],
) -> Question:
    kind: Kind = "choice" if info.choices else "yes_no" if info.type_name == "true or false" else "text"
    facts = [f"allowed: {info.allowed}"] if kind == "text" and info.type_name not in ("list", "text") else []
    facts += [f"in {info.unit}"] if info.unit else []
    facts += [f"default: {shown_default(info)}"] if info.default not in (None, ..., "") else []
    choices = tuple((value, value) for value in info.choices if value not in _NEED_MORE)
    return Question(name, label, info.help, kind, read, write, lambda answers: choices, "; ".join(facts))


# ---- what no option says -------------------------------------------------------------------------------------------


def _field_question(key: str, label: str, help: str, kind: Kind = "text", empty: Any = "") -> Question:
    """A question whose answer is a field of `Answers`."""

    def write(answers: Answers, value: Any) -> Answers:
        return replace(answers, **{key: value.strip() or empty})

    return Question(key, label, help, kind, lambda answers, plan: getattr(answers, key), write)


def _set_family(answers: Answers, name: str) -> Answers:
    if name == answers.family:
        return answers
    return replace(answers, family=name, flavour=None, model=None)


def _family_choices(answers: Answers) -> Choices:
    specs = [get_spec(name) for name in family_names()]
    return [(spec.name, f"{spec.title}: {spec.flavours[spec.default_flavour].description}") for spec in specs]


def _flavour_choices(answers: Answers) -> Choices:
    flavours = answers.spec.flavours.values()
    return [(flavour.name, f"{flavour.name} ({flavour.hub_id}, {flavour.licence})") for flavour in flavours]


def _set_flavour(answers: Answers, name: str) -> Answers:
    is_default = answers.flavour is None and name == answers.spec.default_flavour
    return answers if is_default else replace(answers, flavour=name)


def _set_factor(answers: Answers, text: str) -> Answers:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise Refused(f'"{text}" is not a whole number; allowed: 1 to 64')
    return replace(answers, factor=int(text))


def _set_prompts(answers: Answers, text: str) -> Answers:
    return replace(answers, prompts=tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())))


GOAL = Question(
    "goal",
    "",
    f"What is proposed on the next pages follows from it. For editing: {NO_EDIT}.",
    "list",
    lambda answers, plan: answers.goal,
    lambda answers, value: replace(answers, goal=value),
    lambda answers: [(name, f"{name:<8} {words}") for name, words in GOALS.items()],
)
FAMILY = Question(
    "family",
    "",
    "The model that learns. Space chooses.",
    "list",
    lambda answers, plan: answers.family,
    _set_family,
    _family_choices,
)
FLAVOUR = Question(
    "flavour",
    "Flavour",
    "Which published checkpoint of the family.",
    "choice",
    lambda answers, plan: answers.flavour or answers.spec.default_flavour,
    _set_flavour,
    _flavour_choices,
)
FACTOR = Question(
    "factor",
    "LoKr factor",
    "Size of the adapter: a small factor makes a large adapter that learns more; 16 suits most subjects and styles.",
    "text",
    lambda answers, plan: answers.factor or 16,
    _set_factor,
    facts="allowed: whole number from 1 to 64; full training has no adapter",
)
PROMPTS = Question(
    "prompts",
    "Prompts",
    "One prompt a line; each is drawn at every validation. A prompt without your subject shows what else has changed.",
    "lines",
    lambda answers, plan: answers.prompts if answers.prompts is not None else proposed_prompts(answers),
    _set_prompts,
)


def pages() -> tuple[Page, ...]:
    """Every page but the last one, which shows the files."""
    return (
        Page("Goal", lambda answers: "What do you want to teach?", (GOAL,)),
        Page(
            "Model",
            lambda answers: "Which model is to learn it?",
            (FAMILY, FLAVOUR, _field_question("model", "Model folder", _MODEL_HELP, empty=None)),
        ),
        Page(
            "Pictures",
            lambda answers: "Where are the pictures?",
            (
                _field_question("pictures", "Pictures", _PICTURES_HELP, "folder"),
                dataset_question("instance_prompt", "Name / prompt"),
                dataset_question("caption_strategy", "Captions"),
                option_question("resolution", "Resolution"),
                dataset_question("crop", "Crop"),
                dataset_question("repeats", "Repeats"),
                _field_question("eval_pictures", "Held-out", _EVAL_HELP, "folder"),
                _field_question("regularisation_pictures", "Regularisation", _REGULARISATION_HELP, "folder"),
            ),
        ),
        Page("Training", lambda answers: f"This machine: {answers.hardware}", (*_options(_TRAINING), FACTOR)),
        Page("Validation", lambda answers: "What shall be drawn while it learns?", (PROMPTS, *_options(_VALIDATION))),
        Page("Tracking", lambda answers: "Where does it go?", _options(_TRACKING)),
    )


_MODEL_HELP = (
    "A folder in diffusers layout, or the hub id (owner/name) of another checkpoint. Empty: the flavour, fetched from "
    "the hub at the first start."
)
_PICTURES_HELP = "Folder with the pictures to learn from; its subfolders count too. It is looked at as you type."
_EVAL_HELP = "Folder with a few pictures that are never trained on: the loss on them says when to stop. May be empty."
_REGULARISATION_HELP = (
    "Folder with other pictures of the same kind, on which the model is kept as it is (prior preservation). May be "
    "empty; full training takes none."
)
_TRAINING = {
    "mixed_precision": "Precision",
    "base_model_precision": "Base model",
    "gradient_checkpointing": "Checkpointing",
    "train_batch_size": "Batch size",
    "gradient_accumulation_steps": "Accumulation",
    "optimizer": "Optimizer",
    "learning_rate": "Learning rate",
    "max_train_steps": "Steps",
    "use_ema": "EMA",
}
_VALIDATION = {
    "validation_step_interval": "Draw every",
    "validation_resolution": "Size",
    "validation_num_inference_steps": "Sampling steps",
    "validation_guidance": "Guidance",
}
_TRACKING = {
    "output_dir": "Output folder",
    "checkpoint_step_interval": "Save every",
    "checkpoints_total_limit": "Checkpoints kept",
    "report_to": "Tracker",
    "tracker_run_name": "Name of the run",
}
