"""From the flags of `sft` to a run here: two JSON files, in memory to train at once, or written by `import firered`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.commands.firered.flags import SftFlags, parse_sft
from simpletuner.commands.firered.keys import notes_of, translate
from simpletuner.commands.firered.shares import read_count_weights, read_task_weights, shares
from simpletuner.commands.run_files import CONFIG, DATA, options_of, write_run_files
from simpletuner.commands.text import Say
from simpletuner.config.discovery import ConfigSource
from simpletuner.config.json_writer import json_text
from simpletuner.config.loading import LoadedRun, load_source
from simpletuner.config.paths import Folders
from simpletuner.data.records import RecordRules, read_records
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.models.components import ModelSource, component_config

META = "train_data_meta_dir"
# How the columns of embeddings begin, and that of the dropped caption.
EMBEDS = "embeddings_tensor"
DROPPED = f"{EMBEDS}_droptext"


@dataclass(frozen=True)
class Translation:
    """A command line as the two JSON files.

    Args:
        notes: lines for the user.
        rest: words that are options of this program.
    """

    config: dict[str, Any]
    datasets: list[dict[str, Any]]
    notes: list[str]
    rest: tuple[str, ...]

    def texts(self, data_file: str) -> tuple[str, str]:
        """The content of `config.json`, which names `data_file`, and of that."""
        config = {**self.config, "data_backend_config": data_file}
        return json_text(config) + "\n", json_text(self.datasets) + "\n"


def translate_command(
    words: Sequence[str],
    environment: Mapping[str, str],
    working_dir: Path,
    spec_of: Callable[[str], FamilySpec],
    num_processes: Callable[[Sequence[str]], int],
) -> Translation:
    """Everything in a command line of `sft`.

    Args:
        environment: variables of `accelerate launch` count.
        spec_of: the family of a model folder or hub id.
        num_processes: of a run with these further words.

    Raises:
        ConfigError: what cannot be used or is refused.
        DataError: rows that cannot be used.
    """
    flags = parse_sft(words)
    spec = spec_of(flags["pretrained_model_name_or_path"])
    size = num_processes(flags.rest)
    config = translate(flags, spec, environment, size)
    scheduler = component_config(ModelSource(flags["pretrained_model_name_or_path"]), spec.component("scheduler"))
    if scheduler.get("shift_terminal"):
        config["flow_schedule_terminal"] = scheduler["shift_terminal"]
    notes = notes_of(flags, environment, config)
    datasets, num_rows = _datasets(flags, working_dir, notes)
    config |= _length(flags, num_rows, size)
    return Translation(config, datasets, notes, flags.rest)


def load_sft(
    words: Sequence[str],
    environment: Mapping[str, str],
    working_dir: Path,
    say: Say,
    spec_of: Callable[[str], FamilySpec],
    num_processes: Callable[[Sequence[str]], int],
) -> LoadedRun:
    """The run of a command line of `sft`; no file is written for it.

    Raises:
        SimpleTunerError: as `translate_command`, or as for any configuration.
    """
    translation = translate_command(words, environment, working_dir, spec_of, num_processes)
    for note in translation.notes:
        say(note)
    # Where the files would be; messages name them so.
    folder = Path(os.path.normpath(working_dir.absolute() / translation.config["output_dir"] / "sft"))
    config, data = translation.texts(str(folder / DATA))
    source = ConfigSource(folder / CONFIG, "json")
    unsaved = {folder / CONFIG: config, folder / DATA: data}
    return load_source(source, translation.rest, environment, working_dir, unsaved=unsaved)


def write_configuration(
    translation: Translation, processes: Mapping[str, int], folder: Path, say: Callable[[str], None]
) -> Path:
    """Write the two files into a folder that has none of them; returns its `config.json`.

    Args:
        processes: what the launcher says of them.

    Raises:
        ConfigError: one already exists.
    """
    given, secrets = options_of(translation.rest)
    if secrets:
        say(f"{secrets[0].partition('=')[0]} is a secret and not written: give it when you train")
    whole = replace(translation, config={**translation.config, **processes, **given})
    write_run_files(folder, dict(zip((CONFIG, DATA), whole.texts(DATA), strict=True)), replaces=False)
    return folder / CONFIG


def _datasets(flags: SftFlags, working_dir: Path, notes: list[str]) -> tuple[list[dict[str, Any]], int]:
    """(the entries of the data file, rows that are trained)."""
    meta = _meta_folder(flags[META], working_dir)
    tasks = sorted(path.name for path in meta.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not tasks:
        message = f"{meta} has no folder in it"
        raise ConfigError(Problem(message, f"--{META}", allowed="one folder for each task, with its .jsonl files"))
    weights = read_task_weights(flags["train_data_weights"], tasks)
    counts = read_count_weights(flags["train_src_img_num_weights"])
    entries = {task: _entry(flags, meta / task, working_dir) for task in weights}
    rows = {task: _rows_by_count(entries[task], working_dir) for task in weights}
    found = shares(counts, weights, rows, notes)
    datasets = []
    for task, entry in entries.items():
        own = {n: share for (name, n), share in found.items() if name == task}
        if own:
            share = round(sum(own.values()), 9)
            datasets.append(entry | {"probability": share, "reference_weights": {str(n): own[n] for n in sorted(own)}})
    return datasets, sum(rows[task][n] for task, n in found)


def _meta_folder(text: str, working_dir: Path) -> Path:
    path = Path(os.path.normpath(working_dir / Path(text).expanduser()))
    if not path.is_dir():
        near = Folders(working_dir, None).nearest(Path(text), is_folder=True)
        fix = f'did you mean "{near}"?' if near else "correct the path"
        raise ConfigError(Problem(f"there is no folder {text}", f"--{META}", fix=fix))
    return path


def _entry(flags: SftFlags, folder: Path, working_dir: Path) -> dict[str, Any]:
    """The dataset of a task, but for its shares."""
    entry: dict[str, Any] = {
        "id": folder.name,
        "type": "records",
        "records_file": str(folder.relative_to(working_dir) if folder.is_relative_to(working_dir) else folder),
        "resolution": flags["image_sample_size"],
        "resolution_type": "pixel_area",
        "enlarge": True,
        "inverse_instructions": flags["enable_inverse"],
        "skip_bad_rows": flags["skip_bad_rows"],
    }
    if flags["condition_encoder_mode"] == "offline":
        entry |= {"prompt_embeds_column": EMBEDS, "dropped_prompt_embeds_column": DROPPED}
    return entry


def _rows_by_count(entry: Mapping[str, Any], working_dir: Path) -> dict[int, int]:
    """Number of source images -> rows that have so many."""
    rules = RecordRules(
        working_dir,
        takes_inverse=entry["inverse_instructions"],
        skips_bad_rows=entry["skip_bad_rows"],
        prompt_column=entry.get("prompt_embeds_column"),
        dropped_column=entry.get("dropped_prompt_embeds_column"),
    )
    found: dict[int, int] = {}
    for record in read_records(working_dir / entry["records_file"], rules, f"{entry['id']}.records_file", []):
        found[len(record.references)] = found.get(len(record.references), 0) + 1
    return found


def _length(flags: SftFlags, num_rows: int, num_processes: int) -> dict[str, int]:
    """The original's epoch has as many batches as its rows fill."""
    steps = flags["max_train_steps"]
    if steps is None:
        per_step = flags["train_batch_size"] * num_processes * flags["gradient_accumulation_steps"]
        steps = flags["num_train_epochs"] * max(num_rows // per_step, 1)
    return {"max_train_steps": steps, "num_train_epochs": 0}
