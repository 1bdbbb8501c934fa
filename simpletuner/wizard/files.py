"""From answers to the texts of the files: new ones are written with headings, existing ones only where answers changed.

What a file says and no question asks for stays as it is, comments included.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.config.datasets import dataset_options
from simpletuner.config.discovery import ConfigSource
from simpletuner.config.json_reader import read_text_file
from simpletuner.config.json_writer import INDENT, json_text, remove_value, set_value
from simpletuner.config.loading import LoadedRun, load_source
from simpletuner.config.options.reporting import ReportingOptions
from simpletuner.config.prompt_library import prompt_texts
from simpletuner.config.webhooks import webhook_options
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.reporting.trackers.readiness import check_trackers
from simpletuner.storage import write_bytes
from simpletuner.text import lines_of
from simpletuner.wizard.answers import Answers
from simpletuner.wizard.lycoris import edited_lycoris, lycoris_settings
from simpletuner.wizard.plan import Plan, make_plan, nicknames
from simpletuner.wizard.project import ANSWERED, Project, open_project

_HEAD = "`simpletuner options KEY` explains a key, `simpletuner configure` asks again."
_HEADINGS: Mapping[str, tuple[str, ...]] = {
    "What is trained.": (
        *("model_family", "model_flavour", "pretrained_model_name_or_path", "model_type", "lora_type"),
        *("lycoris_config", "lora_rank", "use_dora"),
    ),
    "The images, and where the results go.": (*("data_backend_config", "output_dir", "resolution", "resolution_type"),),
    "How long, and how fast it learns. Exactly one of the two lengths is above 0.": (
        *("max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps", "optimizer"),
        *("learning_rate", "lr_scheduler", "lr_warmup_steps", "grad_clip_method", "max_grad_norm"),
        *("caption_dropout_probability", "use_ema", "seed"),
    ),
    "Memory.": (
        *("mixed_precision", "base_model_precision", "quantize_via", "gradient_checkpointing"),
        *("gradient_checkpointing_interval", "gradient_checkpointing_backend", "musubi_blocks_to_swap"),
        *(f"text_encoder_{number}_precision" for number in (1, 2, 3, 4)),
    ),
    "Images that are generated while training.": (
        *("validation_prompt", "user_prompt_library", "validation_step_interval", "validation_resolution"),
        *("validation_num_inference_steps", "validation_guidance", "validation_seed", "validation_preview"),
    ),
    "The loss on held-out images.": ("eval_holdout", "eval_steps_interval"),
    "Checkpoints and logs.": (
        *("checkpoint_step_interval", "checkpoints_total_limit", "checkpoint_keep_best", "resume_from_checkpoint"),
        *("report_to", "tracker_run_name"),
    ),
    "Where the result is uploaded, and which services are notified.": (
        *("webhook_config", "push_to_hub", "hub_model_id", "model_card_private"),
    ),
}
_SCHEMA = "schemas/config.schema.json"
_MISSING = object()
_SECRET_KEYS = "|".join(
    name for keys in (webhook_options(), dataset_options("image")) for name, info in keys.items() if info.is_secret
)
# The value of a key that is a secret, but for the name of a variable that holds it; and webhooks in one text.
_SECRET = re.compile(
    rf'("(?:{_SECRET_KEYS}|-*webhook_config(?="\s*:\s*"\s*[\[{{]))"\s*:\s*")(?!\$\{{)(?:[^"\\]|\\.)*(")'
)


@dataclass(frozen=True)
class Verdict:
    """What the checks of a start say of texts: `run` is None where there are problems."""

    run: LoadedRun | None
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]


def texts_for(project: Project, answers: Answers) -> dict[Path, str]:
    """The text of every file that is new or different.

    Raises:
        ConfigError: the family is unknown.
    """
    plan, places = make_plan(answers), project.places
    if project.is_new:
        texts = {places.data: json_text(list(plan.entries.values())) + "\n"}
        if plan.lycoris is not None:
            texts[places.lycoris] = json_text(plan.lycoris) + "\n"
        if plan.prompts:
            texts[places.prompts] = json_text(plan.prompts) + "\n"
        texts[places.config] = _new_config(_with_places(plan, project), places.config.parent)
    else:
        before = make_plan(project.answers)
        texts = {
            places.lycoris: _edited_lycoris(project, answers),
            places.prompts: _edited_prompts(project, before, plan),
            places.data: _edited_data(project, before, plan),
            places.config: _edited_config(project, answers, before, plan),
        }
    return {path: text for path, text in texts.items() if text and text != project.texts.get(path)}


def diff_lines(project: Project, texts: Mapping[Path, str]) -> Iterator[str]:
    """What saving would change, as a unified diff; config.json first."""
    for path, text in sorted(texts.items(), key=lambda item: item[0] != project.places.config):
        before, name = project.texts.get(path), project.places.shown(path)
        lines = difflib.unified_diff(
            lines_of(before) if before is not None else [],
            lines_of(text),
            name if before is not None else "(new file)",
            name,
            lineterm="",
        )
        yield from map(without_secrets, lines)


def without_secrets(line: str) -> str:
    """A line of a file as it is shown: without logins, and without addresses of webhooks, which anybody can post to."""
    return _SECRET.sub(r"\1(not shown)\2", line)


def judge(project: Project, texts: Mapping[Path, str], answers: Answers) -> Verdict:
    """The checks that `simpletuner train` makes before it loads anything, on texts that need not be saved."""
    from simpletuner.training.preflight import check_model_folder

    places = project.places
    try:
        source, unsaved = ConfigSource(places.config, "json"), {**project.texts, **texts}
        run = load_source(source, (), {}, places.working_dir, unsaved=unsaved, variables=os.environ)
        check_model_folder(run)
    except ConfigError as error:
        return Verdict(None, tuple(error.problems), ())
    missing = tuple(_missing_captions(project, answers))
    notes = (*run.warnings, *_tracker_notes(run.config.reporting, places.working_dir), *_caption_notes(answers))
    return Verdict(None if missing else run, missing, notes)


def _caption_notes(answers: Answers) -> Iterator[str]:
    """Captions that are there and say nothing."""
    for entry in make_plan(answers).entries.values():
        facts = answers.seen.get(str(entry["instance_data_dir"]))
        if facts and facts.are_numbered and entry.get("caption_strategy") == "filename":
            why = "the file names were given by a camera and are useless as captions"
            yield f"{entry['id']}: {why}; put text files beside the images, or use instanceprompt"


def _tracker_notes(options: ReportingOptions, working_dir: Path) -> list[str]:
    """What a start would refuse now and somebody can still fix: a login that is missing."""
    try:
        check_trackers(options, os.environ, working_dir)
    except ConfigError as error:
        return [problem.render() for problem in error.problems]
    return []


def save(project: Project, texts: Mapping[Path, str], answers: Answers) -> Project:
    """Write the files, config.json last; the project as it is then, from which further answers are compared.

    Raises:
        ConfigError: a file is not what it was when it was opened.
        DataError: the disk refuses.
    """
    for path in texts:
        on_disk = read_text_file(path, project.places.shown(path)) if path.exists() else None
        if on_disk != project.texts.get(path):
            message, fix = "was changed by another program in the meantime; nothing was saved", "open it again"
            raise ConfigError(Problem(message, file=project.places.shown(path), fix=fix))
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(Problem(f"cannot be made: {error.strerror}", file=str(path.parent))) from error
        write_bytes(path, text.encode())
    saved = open_project(project.places.config, project.places.working_dir, answers.hardware)
    return replace(saved, answers=answers)


def start_command(project: Project) -> str:
    """What starts the run from its working folder."""
    shown, name = project.places.shown(project.places.config), project.answers.name
    if name:
        return f"simpletuner train env={name}"
    usual = (os.path.join("config", "config.json"), "config.json")  # noqa: PTH118 - compared with text
    return "simpletuner train" if shown in usual else f"CONFIG_PATH={shown} simpletuner train"


# ---- new files -----------------------------------------------------------------------------------------------------


def _with_places(plan: Plan, project: Project) -> dict[str, Any]:
    """The options, the names of the other files among them."""
    places = project.places
    named = {"data_backend_config": places.shown(places.data)}
    if plan.lycoris is not None:
        named["lycoris_config"] = places.shown(places.lycoris)
    if plan.prompts:
        named["user_prompt_library"] = places.shown(places.prompts)
    return {**plan.config, **named}


def _new_config(options: Mapping[str, Any], folder: Path) -> str:
    # In a clone the schema lies beside it: editors then complete and check what is changed by hand.
    schema = f"{INDENT}{json_text('$schema')}: {json_text(_SCHEMA)},\n" if (folder / _SCHEMA).is_file() else ""
    rest = [key for key in options if not any(key in keys for keys in _HEADINGS.values())]
    groups = [*_HEADINGS.items(), ("Further options.", rest)]
    parts = []
    for heading, keys in groups:
        members = [f"{INDENT}{json_text(key)}: {json_text(options[key], 1)}" for key in keys if key in options]
        if members:
            parts.append(f"{INDENT}// {heading}\n" + ",\n".join(members))
    return f"{{\n{schema}{INDENT}// {_HEAD}\n\n" + ",\n\n".join(parts) + "\n}\n"


# ---- existing files ------------------------------------------------------------------------------------------------


def _edited_config(project: Project, answers: Answers, before: Plan, plan: Plan) -> str:
    text = project.texts[project.places.config]
    old, new = _with_places(before, project), _with_places(plan, project)
    # What no key of the file says and nobody chose is not written just because a proposal moved.
    unwritten = {key for key in old if key not in project.keys and key not in answers.options} - set(ANSWERED)
    is_missing = {"lycoris_config"} & set(new) - set(project.keys)
    for key, value in new.items():
        if key in is_missing or (key not in unwritten and old.get(key, _MISSING) != value):
            text = set_value(text, (project.keys.get(key, key),), value)
    for key in old:
        if key not in new and key in project.keys:
            text = remove_value(text, (project.keys[key],))
    return text


def _edited_data(project: Project, before: Plan, plan: Plan) -> str:
    path = project.places.data
    text = project.texts.get(path, "[\n]\n")
    document = project.document(path)
    entries = document.value if document else []
    position = len(entries)
    for role, entry in plan.entries.items():
        if role not in project.roles:
            if role not in before.entries or path not in project.texts:
                text = set_value(text, (position,), entry)
                position += 1
            continue
        place = project.roles[role]
        for key, value in entry.items():
            old = before.entries[role].get(key, _MISSING)
            is_own = role == "images" or key == "instance_data_dir" or entries[place].get(key, _MISSING) == old
            if old != value and is_own:
                text = set_value(text, (place, key), value)
        for key in before.entries[role]:
            if key not in entry and key in entries[place]:
                text = remove_value(text, (place, key))
    gone = [place for role, place in project.roles.items() if role not in plan.entries]
    for place in sorted(gone, reverse=True):
        text = remove_value(text, (place,))
    return text


def _edited_lycoris(project: Project, answers: Answers) -> str:
    text = project.texts.get(project.places.lycoris, "")
    chosen = answers.lycoris
    if chosen is None:
        return text
    if text:
        return edited_lycoris(text, answers.spec, chosen)
    return json_text(lycoris_settings(answers.spec, chosen)) + "\n"


def _edited_prompts(project: Project, before: Plan, plan: Plan) -> str:
    path = project.places.prompts
    document = project.document(path)
    known = prompt_texts(document.value) if document else {}
    old, new = (nicknames(tuple(each.prompts.values()), known) for each in (before, plan))
    if not new:
        return project.texts.get(path, "")
    text = project.texts.get(path, "{\n}\n")
    for nickname, prompt in new.items():
        if nickname not in old and nickname not in known:
            text = set_value(text, (nickname,), prompt)
    for nickname in old:
        if nickname not in new and nickname in known:
            text = remove_value(text, (nickname,))
    return text


def _missing_captions(project: Project, answers: Answers) -> Iterator[Problem]:
    """What the scan knows and the configuration alone does not: images without captions."""
    from simpletuner.wizard.images import missing_captions

    for entry in make_plan(answers).entries.values():
        facts = answers.seen.get(str(entry["instance_data_dir"]))
        if facts is None or entry.get("only_instance_prompt"):
            continue
        strategy = str(entry.get("caption_strategy"))
        fallback, has_prompt = entry.get("caption_fallback"), bool(entry.get("instance_prompt"))
        missing = missing_captions(facts, strategy, str(fallback) if fallback else None, has_prompt)
        if not facts.usable:
            message = f"there are no usable images in {entry['instance_data_dir']}"
            yield Problem(message, key=f"{entry['id']}.instance_data_dir", fix="choose another folder")
        elif missing:
            message = f"{missing} of {facts.usable} images have no caption by caption_strategy {strategy}"
            fix = "add the captions, or choose another source of captions"
            yield Problem(message, key=f"{entry['id']}.caption_strategy", fix=fix)
