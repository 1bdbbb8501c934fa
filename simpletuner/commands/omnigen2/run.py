"""From an options file of OmniGen2 to the two JSON files of a run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.commands.omnigen2.keys import Translation, accumulation, translate
from simpletuner.commands.run_files import CONFIG, DATA, write_run_files
from simpletuner.config.json_writer import json_text
from simpletuner.config.paths import Folders
from simpletuner.config.yaml_reader import read_yaml
from simpletuner.data.mixes import read_sources
from simpletuner.errors import ConfigError

# An instruction of a text-to-image row that has one of these is trained without it half of the time.
# Source: VectorSpaceLab/OmniGen2 (Apache-2.0), `omnigen2/dataset/omnigen2_train_dataset.py`.
OPENERS = (
    "The image portrays ",
    "The image depicts ",
    "The image captures ",
    "The image highlights ",
    "The image shows ",
    "这张图片展示了",
)


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
            where they are written again and the options file is copied to.

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
    read_sources(found, working_dir)  # a mix that cannot be used is refused here; its rows are read with the data
    notes = [*translation.notes, *([line] if line else [])]

    place = working_dir / "experiments" / name if folder is None else folder
    entries = [dataset_of(translation, found, working_dir, overrides.skips_bad_rows)]
    config = {**translation.config, "gradient_accumulation_steps": count, "data_backend_config": DATA}
    texts = {CONFIG: json_text(config) + "\n", DATA: json_text(entries) + "\n"}
    if folder is None:
        texts[f"{name}.yml"] = options_file.read_text(encoding="utf-8")
    write_run_files(place, texts, replaces=folder is None)
    for note in notes:
        say(f"{options_file}: {note}")
    return place / CONFIG


def dataset_of(translation: Translation, mix: Path, working_dir: Path, skips_bad_rows: bool) -> dict[str, Any]:
    """The entry of `multidatabackend.json` that is a mix and its limits."""
    limits = translation.max_input_pixels
    return {
        "id": mix.stem,
        "type": "records",
        "records_file": str(mix.relative_to(working_dir) if mix.is_relative_to(working_dir) else mix),
        "skip_bad_rows": skips_bad_rows,
        "max_output_pixels": translation.max_output_pixels,
        "max_side_length": translation.max_side,
        "max_input_pixels": list(limits) if len(limits) > 1 else limits[0],
        "caption_openers": list(OPENERS),
    }
