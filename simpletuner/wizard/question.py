"""A question of the wizard, and how one is made of an option of config.json or a key of a dataset.

Help, choices and limits are the declaration's, so that nothing has to be said twice.
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
from simpletuner.wizard.answers import Answers
from simpletuner.wizard.plan import Plan
from simpletuner.wizard.project import typed_options

# Choices that need further keys, which are written by hand.
_NEED_MORE = ("csv", "parquet", "huggingface", "webshart", "custom-tracker")

Kind = Literal["list", "choice", "yes_no", "text", "lines", "folder"]
Choices = Sequence[tuple[str, str]]


class Refused(ValueError):
    """A text that is not an answer; the message says why."""


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
        facts: allowed values, unit, default, or what follows from the answer: one line.
        applies: whether it is asked, given the other answers.
    """

    key: str
    label: str
    help: str
    kind: Kind
    read: Callable[[Answers, Plan], Any]
    write: Callable[[Answers, Any], Answers]
    choices: Callable[[Answers], Choices] = lambda answers: ()
    facts: str | Callable[[Answers], str] = ""
    applies: Callable[[Answers], bool] = lambda answers: True


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
        if text in ("", None) and info.default is None:
            return replace(answers, options={**answers.options, name: None})
        values, problems = typed_options({name: Setting(name, text, Origin("default"))})
        if problems:
            raise Refused(f"{problems[0].message}; allowed: {problems[0].allowed}")
        return replace(answers, options={**answers.options, name: values[name]})

    def read(answers: Answers, plan: Plan) -> Any:
        default = ",".join(info.default) if isinstance(info.default, tuple) else info.default
        return plan.config.get(name, default)

    return _declared(info, name, label, read, write)


def option_questions(labels: Mapping[str, str]) -> tuple[Question, ...]:
    """Those of the options that act."""
    known = all_options()
    built = [name for name in labels if name in known and known[name].planned is None]
    return tuple(option_question(name, labels[name]) for name in built)


def dataset_question(name: str, label: str) -> Question:
    """Ask for a key of the images' entry in the data file."""
    info = dataset_options("image")[name]

    def write(answers: Answers, text: Any) -> Answers:
        if text in ("", None):
            return replace(answers, dataset={key: value for key, value in answers.dataset.items() if key != name})
        settings = {
            "id": Setting("id", "images", Origin("default")),
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
        return plan.entries["images"].get(name, info.default)

    return _declared(info, name, label, read, write)


def _declared(
    info: OptionInfo,
    name: str,
    label: str,
    read: Callable[[Answers, Plan], Any],
    write: Callable[[Answers, Any], Answers],
) -> Question:
    kind: Kind = "choice" if info.choices else "yes_no" if info.type_name == "true or false" else "text"
    facts = [f"allowed: {info.allowed}"] if kind == "text" and info.allowed != "text" else []
    facts += [f"in {info.unit}"] if info.unit else []
    facts += [f"default: {shown_default(info)}"] if info.default not in (None, ..., "") else []
    choices = tuple((value, value) for value in info.choices if value not in _NEED_MORE)
    return Question(name, label, info.help, kind, read, write, lambda answers: choices, "; ".join(facts))
