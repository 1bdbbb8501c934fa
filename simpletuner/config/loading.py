"""From files, environment and command line to one checked run: the only way in which a configuration is made.

Everything that can be wrong is looked at before anything is raised, so that one start shows all faults. No torch is
imported, so that they show within a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simpletuner.config.caption_filters import read_filter_file
from simpletuner.config.checking import check_options, refuse_planned
from simpletuner.config.dataset_loading import LoadedDatasets, read_datasets
from simpletuner.config.datasets import Dataset, TextEmbedsDataset
from simpletuner.config.discovery import ConfigSource, find_config, no_config_error
from simpletuner.config.draft import Draft
from simpletuner.config.json_reader import Document, parse_json, read_json_file
from simpletuner.config.layers import (
    Layer,
    Origin,
    Setting,
    environment_layer,
    json_layer,
    parse_arguments,
    read_file_layer,
)
from simpletuner.config.lycoris import check_lycoris
from simpletuner.config.merging import Merged, merge_layers, option_names
from simpletuner.config.options import TrainConfig, all_options
from simpletuner.config.options.reporting import ReportingOptions
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.paths import SINGLE_FILE, WITHOUT, Folders, looks_like_path
from simpletuner.config.prompt_library import LibraryPrompt, read_prompt_library
from simpletuner.config.rules import broken_rules, notices
from simpletuner.config.rules.objective import meaningless_options
from simpletuner.config.sources import ImageSource
from simpletuner.config.values import read_bool
from simpletuner.config.webhook_reading import read_webhooks
from simpletuner.config.webhooks import Webhooks
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.registry import get_spec
from simpletuner.families.spec import FamilySpec

DEFAULT_DATA_FILE = "multidatabackend.json"
# Options that name a model: a folder, or a hub id.
MODEL_KEYS = (
    "pretrained_model_name_or_path",
    "pretrained_transformer_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_evaluation_model_name_or_path",
)


@dataclass(frozen=True)
class LoadedRun:
    """A run that can be started.

    Args:
        config: every option; paths are absolute.
        datasets: the enabled entries, with defaults from `config` and absolute paths.
        lycoris: the parsed `lycoris_config.json`, None for a run without.
        prompt_library: nickname -> prompt, None where there is none.
        origins: where each value that is not a default comes from.
        warnings: what is allowed but perhaps not meant, one line each.
        config_file: None where everything came from the command line.
        webhooks: the services that get events, with the secrets that `config` does not show.
    """

    config: TrainConfig
    datasets: tuple[Dataset, ...]
    lycoris: Mapping[str, Any] | None
    prompt_library: Mapping[str, LibraryPrompt] | None
    origins: Mapping[str, Origin]
    warnings: tuple[str, ...] = ()
    config_file: Path | None = None
    data_file: Path | None = None
    lycoris_file: Path | None = None
    webhooks: Webhooks = field(default_factory=Webhooks)

    def origin(self, key: str) -> Origin:
        """Where the value of an option comes from."""
        return self.origins.get(key, Origin("default"))

    def resolved(self) -> dict[str, Any]:
        """Every option with its value, as JSON holds it; secrets are stars, everything else can be read back."""
        return self.config.as_json()


def load_run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    working_dir: Path,
    check_files: bool = True,
) -> LoadedRun:
    """Read and check a whole configuration.

    Args:
        arguments: options of the command line, `--key=value` and similar ones.
        environment: `SIMPLETUNER_<OPTION>` variables count, and those that choose the file.
        working_dir: where relative paths are looked up first.
        check_files: whether images, model and output folder must be there; `options --resolved` needs none of them.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    source = find_config(environment, working_dir.absolute())
    if source is None:
        raise no_config_error(working_dir.absolute())
    return load_source(source, arguments, environment, working_dir, check_files)


def load_source(
    source: ConfigSource,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    working_dir: Path,
    check_files: bool = True,
    unsaved: Mapping[Path, str] | None = None,
    variables: Mapping[str, str] | None = None,
) -> LoadedRun:
    """As `load_run`, from a configuration file that is chosen already.

    Args:
        unsaved: absolute path -> text that stands for the JSON file of that name: what an editor holds and the disk
            does not.
        variables: what `${NAME}` in a webhook is looked up in, where it is not `environment`: who judges a file alone
            sets no options from the environment.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    reader = _RunReader(source, working_dir.absolute(), check_files, unsaved or {})
    reader.read_layers(arguments, environment)
    config = reader.make_config()
    datasets = reader.read_datasets(config)
    lycoris = reader.read_lycoris(config)
    prompts = reader.read_prompts(config.validation)
    webhooks = reader.read_webhooks(config.reporting, environment if variables is None else variables)
    draft = Draft(
        config=config,
        spec=reader.spec,
        datasets=datasets,
        origins={key: setting.origin for key, setting in reader.merged.settings.items()},
        folders=reader.folders,
        config_file=reader.shown if source.path else None,
        lycoris=lycoris,
        prompt_library=prompts,
        faulty=frozenset(problem.key for problem in reader.problems if problem.key),
    )
    problems = [*reader.problems, *broken_rules(draft, check_files)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return LoadedRun(
        config=config,
        datasets=tuple(datasets.entries),
        lycoris=lycoris,
        prompt_library=prompts,
        origins=draft.origins,
        warnings=tuple(dict.fromkeys([*reader.merged.warnings, *datasets.warnings, *notices(draft)])),
        config_file=source.path,
        data_file=config.data.data_backend_config,
        lycoris_file=config.adapter.lycoris_config if lycoris is not None else None,
        webhooks=webhooks,
    )


class _RunReader:
    """Reads one source after the other and gathers what is wrong with each."""

    def __init__(self, source: ConfigSource, working_dir: Path, check_files: bool, unsaved: Mapping[Path, str]):
        self.source = source
        self.unsaved = unsaved
        self.check_files = check_files
        path = source.path.absolute() if source.path else None
        self.folders = Folders(working_dir, path.parent if path else None)
        self.shown = self.folders.shown(path) if path else "command line"
        self.problems: list[Problem] = []
        self.merged = Merged()
        self.spec: FamilySpec | None = None

    def read_layers(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Defaults < family < file < environment < command line; defaults are the declarations' own."""
        known = option_names()
        layers = []
        for read in (
            lambda: self.read_file(known, environment),
            lambda: environment_layer(environment, known),
            lambda: parse_arguments(arguments),
        ):
            try:
                layers.append(read())
            except ConfigError as error:
                self.problems += error.problems
        if self.problems:
            raise ConfigError(self.problems)
        self.merged = merge_layers(layers)
        self.spec = self.find_spec()
        if self.spec:
            flavour = self.merged.settings.get("model_flavour")
            values = dict(self.spec.defaults_for(str(flavour.value) if flavour and flavour.value else None))
            if "lora_format" in values and _is_on(self.merged.settings.get("use_dora")):
                values["lora_format"] = self.spec.default_form("dora")
            defaults = Layer([Setting(key, value, Origin("family")) for key, value in values.items()])
            self.merged = merge_layers([defaults, *layers])
        self.problems += self.merged.problems

    def read_file(self, known: Sequence[str], environment: Mapping[str, str]) -> Layer:
        path = self.source.path
        if path is not None and path.absolute() in self.unsaved:
            return json_layer(self.unsaved[path.absolute()], self.shown)
        return read_file_layer(self.source, self.shown, known, environment)

    def find_spec(self) -> FamilySpec | None:
        family = self.merged.settings.get("model_family")
        if family is None:
            return None
        try:
            return get_spec(str(family.value))
        except ConfigError as error:
            first = error.problems[0]
            self.problems.append(family.origin.problem(first.message, "model_family", first.allowed, first.fix))
            return None

    def origin(self, key: str) -> Origin:
        setting = self.merged.settings.get(key)
        return setting.origin if setting else Origin("default")

    def make_config(self) -> TrainConfig:
        """The typed options with absolute paths.

        Raises:
            ConfigError: the family is missing, without which nothing else can be judged.
        """
        infos = all_options()
        place = Origin("file" if self.source.path else "command line", self.shown)
        config, problems = check_options(self.merged.settings, place)
        self.problems += problems
        if config is None:
            raise ConfigError(self.problems)
        answered_for = self.spec.unusable_options if self.spec else ()
        self.problems += refuse_planned(config.values(), infos, self.origin, skip=answered_for)
        updates: dict[str, Any] = {}
        for key, reason in (meaningless_options(self.spec) if self.spec else {}).items():
            if config.value(key) not in (infos[key].default, None, 0, ""):
                self.merged.warnings.append(f"{self.origin(key)}: {key} has no effect: {reason}")
            updates[key] = infos[key].default
        for key, info in infos.items():
            path = config.value(key)
            if info.path and path is not None:
                found = self.folders.find(path) if info.path == "input" else None
                updates[key] = found or self.folders.output(path)
        if config.data.data_backend_config is None:
            folder = self.folders.config_dir or self.folders.working_dir
            updates["data_backend_config"] = folder / DEFAULT_DATA_FILE
        updates["validation_references"] = self.find_references(
            config.validation.validation_references, "validation_references", self.origin("validation_references")
        )
        for key in MODEL_KEYS:
            updates[key] = self.find_model(key, config.value(key))
        if (assistant := config.adapter.assistant_lora_path) is not None:
            updates["assistant_lora_path"] = str(self.folders.find(Path(assistant).expanduser()) or assistant)
        key = "text_encoder_paths"
        updates[key] = config.model.text_encoder_paths and tuple(
            place if place in ("", WITHOUT) else self.find_model(key, place) or ""
            for place in config.model.text_encoder_paths
        )
        return config.with_values(updates)

    def find_references(self, names: tuple[str, ...] | None, key: str, origin: Origin) -> tuple[str, ...] | None:
        """Image files that a key names, as absolute paths."""
        if names is None:
            return None
        paths = [Path(name).expanduser() for name in names]
        found = [self.folders.find(path) for path in paths]
        if self.check_files:
            missing = [path for path, there in zip(paths, found, strict=True) if there is None]
            self.problems += [self.folders.missing(path, key, origin, "image") for path in missing]
        return tuple(str(there or path) for path, there in zip(paths, found, strict=True))

    def find_model(self, key: str, text: str | None) -> str | None:
        """A model's folder as an absolute path; hub ids stay as they are."""
        if text is None:
            return None
        path = Path(text).expanduser()
        found = self.folders.find(path)
        if found is None and self.check_files and looks_like_path(text):
            kind = "file" if text.endswith(SINGLE_FILE) else "model folder"
            self.problems.append(self.folders.missing(path, key, self.origin(key), kind))
        return str(found) if found else text

    def read_named_file(self, key: str, path: Path) -> Document | None:
        """The JSON file that an option names; None, and a problem, where it cannot be read."""
        shown = self.folders.shown(path)
        if path not in self.unsaved and not path.exists():
            written = self.merged.settings.get(key)
            relative = Path(str(written.value)).expanduser() if written else path
            if self.check_files:
                self.problems.append(self.folders.missing(relative, key, self.origin(key), "file"))
            else:
                self.merged.warnings.append(f"{self.origin(key)}: {key}: {relative} is not there")
            return None
        try:
            if path in self.unsaved:
                return parse_json(self.unsaved[path], shown)
            return read_json_file(path, shown, key)
        except ConfigError as error:
            self.problems += error.problems
            return None

    def read_datasets(self, config: TrainConfig) -> LoadedDatasets:
        assert config.data.data_backend_config is not None
        document = self.read_named_file("data_backend_config", config.data.data_backend_config)
        if document is None:
            return LoadedDatasets(is_read=False)
        datasets = read_datasets(document, config)
        self.problems += datasets.problems
        datasets.entries = [self.with_absolute_paths(entry, datasets) for entry in datasets.entries]
        return datasets

    def with_absolute_paths(self, entry: Dataset, datasets: LoadedDatasets) -> Dataset:
        updates: dict[str, Any] = {}
        if isinstance(entry, TextEmbedsDataset):
            updates["caption_filter_list"] = self.read_filters(entry, datasets)
        elif (folder := entry.instance_data_dir) is not None:
            updates["instance_data_dir"] = folder = self.folders.find(folder) or self.folders.output(folder)
            if table := getattr(entry, "metadata_file", None):
                inside = folder / table if (folder / table).is_file() else None
                updates["metadata_file"] = self.folders.find(table) or inside or self.folders.output(table)
        if isinstance(entry, ImageSource):
            if entry.csv_file is not None:
                updates["csv_file"] = self.folders.find(entry.csv_file) or self.folders.output(entry.csv_file)
            if entry.records_file is not None:
                found = self.folders.find(entry.records_file)
                updates["records_file"] = found or self.folders.output(entry.records_file)
            if entry.type == "records" and entry.instance_data_dir is None:
                updates["instance_data_dir"] = self.folders.working_dir
            if entry.dataset_name is not None:  # a path where there is one, else the id of a dataset on the hub
                found = self.folders.find(Path(entry.dataset_name).expanduser())
                updates["dataset_name"] = str(found or entry.dataset_name)
        for key in ("cache_dir_vae", "cache_dir"):
            if getattr(entry, key, None) is not None:
                updates[key] = self.folders.output(getattr(entry, key))
        return entry.model_copy(update=updates)

    def read_filters(self, entry: TextEmbedsDataset, datasets: LoadedDatasets) -> tuple[str, ...] | None:
        """The filters of captions, read from their file where one is named."""
        filters = entry.caption_filter_list
        if filters is None or len(filters) != 1 or not filters[0].lower().endswith((".txt", ".json")):
            return filters
        path = Path(filters[0]).expanduser()
        try:
            return read_filter_file(self.folders.find(path) or self.folders.output(path))
        except ValueError as error:
            origin = datasets.place(entry.id, "caption_filter_list")
            self.problems.append(origin.problem(str(error), key=f"{entry.id}.caption_filter_list"))
            return None

    def read_lycoris(self, config: TrainConfig) -> Mapping[str, Any] | None:
        if (
            config.adapter.lycoris_config is None
            or config.model.model_type != "lora"
            or config.adapter.lora_type != "lycoris"
        ):
            return None
        document = self.read_named_file("lycoris_config", config.adapter.lycoris_config)
        if document is None:
            return None
        if self.spec:
            self.problems += check_lycoris(document, self.spec)
        return document.value

    def read_prompts(self, options: ValidationOptions) -> Mapping[str, LibraryPrompt] | None:
        if options.user_prompt_library is None:
            return None
        document = self.read_named_file("user_prompt_library", options.user_prompt_library)
        if document is None:
            return None
        prompts, problems = read_prompt_library(document)
        self.problems += problems
        found = {}
        for nickname, prompt in prompts.items():
            place = Origin("file", document.file, document.line(nickname))
            references = self.find_references(prompt.references, f"{nickname}.references", place)
            found[nickname] = replace(prompt, references=references)
        return found

    def read_webhooks(self, options: ReportingOptions, environment: Mapping[str, str]) -> Webhooks:
        written, origin = options.webhook_config, self.origin("webhook_config")
        targets, problems, warnings = read_webhooks(written, origin, self.folders, environment, self.check_files)
        self.problems += problems
        self.merged.warnings += warnings
        return Webhooks(targets, environment.get("SIMPLETUNER_JOB_ID") or None, options.webhook_reporting_interval)


def _is_on(setting: Setting | None) -> bool:
    """Whether a switch is set; one at fault is reported elsewhere."""
    try:
        return setting is not None and bool(read_bool(setting.value))
    except ValueError:
        return False
