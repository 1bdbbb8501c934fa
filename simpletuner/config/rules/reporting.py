"""Trackers, uploads and webhooks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from simpletuner.config.draft import Draft
from simpletuner.errors import Problem
from simpletuner.text import has_control, printable

_REPOSITORY = re.compile(r"(?:\w[\w.-]*/)?\w(?:[\w.-]*\w)?", re.ASCII)


def uploads_have_their_place(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.reporting.push_checkpoints_to_hub and not config.reporting.push_to_hub:
        message = "has no effect without push_to_hub"
        yield draft.problem(message, "push_checkpoints_to_hub", fix="set push_to_hub too, or remove the key")
    name = config.reporting.hub_model_id
    if name is not None and (not _REPOSITORY.fullmatch(name) or "--" in name or ".." in name or len(name) > 96):
        message = f'"{name}" cannot name a repository on the Hub'
        yield draft.problem(message, "hub_model_id", "name or owner/name, of letters, digits, - _ and .")


def trackers_are_not_contradictory(draft: Draft) -> Iterator[Problem]:
    trackers = draft.config.reporting.report_to
    if "none" in trackers and len(trackers) > 1:
        yield draft.problem(f"{', '.join(trackers)}: none and another one", "report_to", "none, or the others")


def a_custom_tracker_has_its_class(draft: Draft) -> Iterator[Problem]:
    name, trackers = draft.config.reporting.custom_tracker, draft.config.reporting.report_to
    form = "package.module:Class"
    if "custom-tracker" in trackers and name is None:
        yield draft.problem("is missing: report_to names custom-tracker", "custom_tracker", form, fix="set it")
    if name is not None and not {"custom-tracker", "all"} & set(trackers):
        message = f'"{name}" has no use: report_to does not name custom-tracker'
        yield draft.problem(message, "custom_tracker", fix='add custom-tracker to "report_to", or remove the key')
    if name is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        yield draft.problem(f'"{name}" does not name a class', "custom_tracker", form)


def names_stand_on_one_line(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    for key in ("tracker_run_name", "tracker_project_name", "output_dir"):
        if (name := config.value(key)) is not None and has_control(str(name)):
            yield draft.problem(f'"{printable(str(name))}" holds a control character', key, "text on one line")


def webhook_intervals_have_a_webhook(draft: Draft) -> Iterator[str]:
    if draft.config.reporting.webhook_reporting_interval and draft.config.reporting.webhook_config is None:
        key = "webhook_reporting_interval"
        yield f"{draft.origin(key)}: {key}: there is no webhook_config, so nothing is reported"


REPORTING_RULES = (
    uploads_have_their_place,
    trackers_are_not_contradictory,
    a_custom_tracker_has_its_class,
    names_stand_on_one_line,
)
REPORTING_NOTICES = (webhook_intervals_have_a_webhook,)
