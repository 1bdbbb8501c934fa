"""`memory` at the start of a run: the settings are chosen, logged, and kept within."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from simpletuner.config.loading import LoadedRun
from simpletuner.data.dataset import Dataset
from simpletuner.errors import ConfigError, Problem
from simpletuner.models.family import ModelFamily
from simpletuner.training.memory import keep_within
from simpletuner.training.planning.settings import Choice, Room, choose_settings, with_activation_memory, with_settings
from simpletuner.training.process import Process


def fit_into_memory(
    loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset], process: Process
) -> tuple[LoadedRun, int | None]:
    """The run with the settings that its device and `memory` chose, and the bytes that it is kept within.

    The main process chooses.

    Raises:
        ConfigError: it does not fit.
    """
    loaded = with_activation_memory(loaded, family.device)
    if loaded.config.model.memory is None:
        return loaded, None
    room = Room.of(loaded.config.model.memory, family.device)
    choice = Choice()
    if process.process_group.is_main:
        with process.phase("planning memory"):
            choice = choose_settings(loaded, family, datasets, room)
        for line in choice.lines:
            process.inform(f"memory: {line}")
    chosen = process.process_group.from_main(
        {"settings": dict(choice.settings), "lacking": [asdict(problem) for problem in choice.lacking]}
    )
    if chosen["lacking"]:
        raise ConfigError([Problem(**problem) for problem in chosen["lacking"]])
    keep_within(room.limit, family.device)
    return with_settings(loaded, chosen["settings"]), room.limit
