"""From an options file of OmniGen2 to the two JSON files of a run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simpletuner import storage
from simpletuner.commands.omnigen2.data import read_mix, read_source, write_datasets
from simpletuner.commands.omnigen2.keys import accumulation, translate
from simpletuner.config.json_writer import json_text
from simpletuner.config.paths import Folders
from simpletuner.config.yaml_reader import read_yaml
from simpletuner.errors import ConfigError, Problem

CONFIG, DATA = "config.json", "multidatabackend.json"


@dataclass(frozen=True)
class Overrides:
    """What the command line of the original says beside its options file.

    Args:
        global_batch_size: in place of `train.global_batch_size`.
        data_path: in place of `data.data_path`.
        skips_bad_rows: rows that cannot be used are left out.
    """

    global_batch_size: int | None = None
    data_path: str | None = None
    skips_bad_rows: bool = False


def import_run(
    options_file: Path,
    working_dir: Path,
    num_processes: int,
    say: Callable[[str], None],
    overrides: Overrides = Overrides(),
    folder: Path | None = None,
) -> Path:
    """Write a run's configuration; returns its `config.json`.

    Args:
        num_processes: that will train.
        say: called with what a person should know.
        folder: for the two files, which must not be there yet; None is `experiments/<name>`, the folder of the run,
            where they are written anew and the options file is copied to.

    Raises:
        ConfigError: anything in the options, the mix or the rows that cannot be used.
    """
    document = read_yaml(options_file)
    translation = translate(document)
    name = translation.name
    if not name or Path(name).name != name or name.startswith("."):
        raise ConfigError(document.problem("name", f'"{name}" cannot be the name of a folder'))
    document.values["train.global_batch_size"] = overrides.global_batch_size or translation.global_batch_size
    translation.global_batch_size = document.values["train.global_batch_size"]
    count, line = accumulation(translation, document, num_processes)
    mix = overrides.data_path or translation.data_path
    found = Folders(working_dir, options_file.parent).find(Path(mix))
    if found is None:
        raise ConfigError(document.problem("data.data_path", f'"{mix}": there is no file of this name'))
    notes = [*translation.notes, *([line] if line else [])]
    sources = read_mix(found, working_dir)
    rows = [read_source(source, working_dir, overrides.skips_bad_rows, notes) for source in sources]

    experiment = working_dir / "experiments" / name
    place = experiment if folder is None else folder
    entries = write_datasets(translation, sources, rows, experiment / "data")
    config = {**translation.config, "gradient_accumulation_steps": count, "data_backend_config": DATA}
    texts = {CONFIG: json_text(config) + "\n", DATA: json_text(entries) + "\n"}
    if folder is None:
        texts[f"{name}.yml"] = options_file.read_text(encoding="utf-8")
    else:
        _refuse_existing(folder, texts)
    for file, text in texts.items():
        if not (place / file).is_file() or (place / file).read_text(encoding="utf-8") != text:
            place.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(place / file, text.encode())
    for note in notes:
        say(f"{options_file}: {note}")
    return place / CONFIG


def _refuse_existing(folder: Path, names: dict[str, str]) -> None:
    there = [name for name in names if (folder / name).exists()]
    if there:
        message = f"{folder} has {' and '.join(there)} already"
        raise ConfigError(Problem(message, key="--output", fix="name another folder, or move the files away"))
