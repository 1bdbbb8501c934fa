"""The files of a run as they are on the disk, and the answers that they amount to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.config.checking import check_options
from simpletuner.config.datasets import KEY_ALIASES, VALUE_ALIASES
from simpletuner.config.discovery import ConfigSource
from simpletuner.config.foreign_keys import RENAMED
from simpletuner.config.json_reader import Document, parse_json, read_text_file
from simpletuner.config.layers import Layer, Origin, Setting, clean_key, read_file_layer
from simpletuner.config.loading import DEFAULT_DATA_FILE
from simpletuner.config.merging import merge_layers, option_names
from simpletuner.config.nearby import exists
from simpletuner.config.options import all_options
from simpletuner.config.paths import Folders
from simpletuner.config.prompt_library import prompt_texts
from simpletuner.config.values import read_bool, read_path
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.registry import family_names, get_spec
from simpletuner.hardware import Hardware
from simpletuner.text import read_json_text
from simpletuner.wizard.answers import Answers, Goal
from simpletuner.wizard.lycoris import Lycoris, read_lycoris

# Options of config.json that the screens ask for; everything else keeps what the file says.
ASKED = (
    *("mixed_precision", "base_model_precision", "gradient_checkpointing", "train_batch_size"),
    *("gradient_accumulation_steps", "optimizer", "learning_rate", "max_train_steps", "num_train_epochs", "use_ema"),
    *("resolution", "resolution_type", "validation_step_interval", "validation_resolution"),
    *("validation_num_inference_steps", "validation_guidance", "output_dir", "report_to", "tracker_run_name"),
    *("checkpoint_step_interval", "checkpoints_total_limit", "eval_steps_interval", "eval_holdout"),
    *("checkpoint_keep_best", "validation_preview", "webhook_config", "push_to_hub", "hub_model_id"),
    "model_card_private",
)
# Options that follow from other answers.
ANSWERED = (
    *(
        "model_family",
        "model_flavour",
        "model_type",
        "lora_type",
        "use_dora",
        "pretrained_model_name_or_path",
        "validation_prompt",
    ),
    *("data_backend_config", "lycoris_config", "user_prompt_library"),
)


@dataclass(frozen=True)
class Places:
    """Where the files of a run are, or will be; absolute."""

    working_dir: Path
    config: Path
    data: Path
    lycoris: Path
    prompts: Path

    def shown(self, path: Path) -> str:
        """As it is written into config.json, and shown: short inside the working folder."""
        return Folders(self.working_dir, None).shown(path)

    def cache_dir(self, answers: Answers) -> Path:
        """Where the run keeps its index."""
        return self.working_dir / Path(str(answers.options.get("cache_dir", "cache"))).expanduser()


@dataclass(frozen=True)
class Project:
    """What is on the disk.

    Args:
        texts: content of each file that exists.
        keys: option -> its key as the file writes it (`--learning_rate`).
        roles: role of an entry of the data file -> its position.
        answers: what the files say; for a new run, that nothing is said.
        is_new: there is no config.json yet.
    """

    places: Places
    answers: Answers
    texts: Mapping[Path, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, int] = field(default_factory=dict)
    is_new: bool = True

    def document(self, path: Path) -> Document | None:
        """A file's content; None where it does not exist."""
        text = self.texts.get(path)
        return None if text is None else parse_json(text, self.places.shown(path))


def open_project(config: Path, working_dir: Path, hardware: Hardware) -> Project:
    """The run of a configuration file, which need not exist.

    Raises:
        ConfigError: a file cannot be read, is not JSON, or has another form than it must have.
    """
    working_dir = working_dir.absolute()
    config = working_dir / config
    if config.suffix != ".json":
        message, fix = "is not JSON, the only format that is edited here", "edit it by hand, or move it away"
        raise ConfigError(Problem(message, file=str(config), allowed="config.json", fix=fix))
    if not config.exists():
        return _new_project(config, working_dir, hardware)
    layer = read_file_layer(ConfigSource(config, "json"), _shown(config, working_dir), option_names(), {})
    settings = merge_layers([layer]).settings
    places = _places(config, working_dir, settings)
    texts = {
        path: read_text_file(path, places.shown(path))
        for path in (config, places.data, places.lycoris, places.prompts)
        if exists(path)
    }
    project = Project(places, Answers(hardware), texts, _written_keys(layer, parse_json(texts[config], "")))
    entries = _list(project.document(places.data))
    roles = _roles(entries)
    answers = _answers(settings, [entries[position] for position in roles.values()], list(roles), project)
    return Project(places, answers, texts, project.keys, roles, is_new=False)


def typed_options(settings: Mapping[str, Setting]) -> tuple[dict[str, Any], list[Problem]]:
    """Every option with its value as it stands in JSON, and what is wrong with what was written."""
    origin = Origin("file")
    required = {"model_family": Setting("model_family", family_names()[0], origin)}
    config, problems = check_options(required | dict(settings), origin)
    if config is None:
        raise ConfigError(problems)
    values = config.as_json()
    # What is secret would come out as stars.
    as_written = {name: _plain(setting.value) for name, setting in settings.items() if all_options()[name].is_secret}
    return values | {"report_to": ",".join(values["report_to"])} | as_written, problems


def _plain(value: Any) -> Any:
    """JSON that a command line gives as text, as JSON; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return read_json_text(value)
    except ValueError:
        return value  # the checks of a start will name what is wrong


def _new_project(config: Path, working_dir: Path, hardware: Hardware) -> Project:
    # Beside a config.json, the files of another configuration must not be taken for those of this one.
    before = "" if config.stem == "config" else f"{config.stem}."
    names = (DEFAULT_DATA_FILE, "lycoris_config.json", "user_prompt_library.json")
    places = Places(working_dir, config, *(config.parent / f"{before}{name}" for name in names))
    others = (places.data, places.lycoris, places.prompts)
    texts = {path: read_text_file(path, places.shown(path)) for path in others if path.exists()}
    return Project(places, Answers(hardware, family=family_names()[0], name=_name(places)), texts)


def _name(places: Places) -> str:
    """What `env=` calls a configuration: its folder in `config/`, as far as one word says it."""
    folder = places.config.parent
    is_named = places.config.name == "config.json" and folder.parent == places.working_dir / "config"
    return folder.name if is_named and not set(folder.name) & set(" \\\"'$") else ""


def _shown(path: Path, working_dir: Path) -> str:
    return Folders(working_dir, None).shown(path)


def _places(config: Path, working_dir: Path, settings: Mapping[str, Setting]) -> Places:
    """The files that a configuration names, found as a start finds them."""
    folders = Folders(working_dir, config.parent)

    def place(key: str, default: str) -> Path:
        try:
            path = read_path(settings[key].value)
        except (KeyError, ValueError):  # not written, or something else than a path, which the checks of a start tell
            return config.parent / default
        return folders.find(path) or folders.output(path)

    return Places(
        working_dir,
        config,
        place("data_backend_config", DEFAULT_DATA_FILE),
        place("lycoris_config", "lycoris_config.json"),
        place("user_prompt_library", "user_prompt_library.json"),
    )


def _written_keys(layer: Layer, document: Document) -> dict[str, str]:
    cleaned = {clean_key(key): key for key in document.value}
    names = {setting.key for setting in layer.settings if setting.key in cleaned}
    return {RENAMED.get(name, name): cleaned[name] for name in names}


def _list(document: Document | None) -> list[Any]:
    if document is None:
        return []
    if not isinstance(document.value, list) or not all(isinstance(entry, dict) for entry in document.value):
        raise ConfigError(Problem("is not a list of datasets", file=document.file, line=1, allowed='[{"id": ...}]'))
    return document.value


def _roles(entries: list[dict[str, Any]]) -> dict[str, int]:
    """The first entry of each role; further ones are left alone."""
    roles: dict[str, int] = {}
    for position, raw in enumerate(entries):
        entry = _present(raw)
        kind = entry.get("dataset_type", "image")
        if kind not in ("image", "eval") or _is_true(entry.get("disabled")):
            continue
        is_regularisation = _is_true(entry.get("is_regularisation_data"))
        role = "eval" if kind == "eval" else "regularisation" if is_regularisation else "images"
        if role == "images" or entry.get("instance_data_dir"):
            roles.setdefault(role, position)
    if "images" in roles:
        main = _present(entries[roles["images"]])
        for position, raw in enumerate(entries):
            if _is_reference(_present(raw), main):
                roles.setdefault("references", position)
    return roles


def _is_reference(entry: Mapping[str, Any], main: Mapping[str, Any]) -> bool:
    """Whether an entry holds what the images of `main` are made from."""
    if not str(entry.get("conditioning_type", "")).startswith("reference_") or _is_true(entry.get("disabled")):
        return False
    return entry.get("id") in _names(main.get("conditioning_data")) or entry.get("source_dataset_id") == main.get("id")


def _names(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _without_reference(main: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the images' entry, without the name of the entry that `reference_images` stands for."""
    kept = {key: value for key, value in main.items() if key not in ("instance_data_dir", "conditioning_data")}
    others = [name for name in _names(main.get("conditioning_data")) if name != reference.get("id")]
    return kept | ({"conditioning_data": others[0] if len(others) == 1 else others} if others else {})


def _present(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values of an entry under their present names."""
    renamed = {KEY_ALIASES.get(key, key): value for key, value in entry.items()}
    return {
        key: VALUE_ALIASES.get((key, value), value) if isinstance(value, str) else value
        for key, value in renamed.items()
    }


def _is_true(value: Any) -> bool:
    try:
        return value is not None and bool(read_bool(value))
    except ValueError:
        return False


def _answers(
    settings: Mapping[str, Setting], entries: list[dict[str, Any]], roles: list[str], project: Project
) -> Answers:
    family = str(settings["model_family"].value) if "model_family" in settings else family_names()[0]
    flavour = settings.get("model_flavour")
    defaults = get_spec(family).defaults_for(str(flavour.value) if flavour and flavour.value else None)
    settings = {key: Setting(key, value, Origin("family")) for key, value in defaults.items()} | dict(settings)
    values, _ = typed_options(settings)
    by_role = {role: _present(entry) for role, entry in zip(roles, entries, strict=True)}
    main, reference = by_role.get("images", {}), by_role.get("references", {})
    strategy = main.get("caption_strategy", values["caption_strategy"])
    lycoris, library = (project.document(path) for path in (project.places.lycoris, project.places.prompts))
    prompts = [values["validation_prompt"]] if values["validation_prompt"] else []
    if "user_prompt_library" in settings and library:
        prompts += prompt_texts(library.value).values()
    written = read_lycoris(lycoris.value) if lycoris else Lycoris()
    return Answers(
        hardware=project.answers.hardware,
        goal=_goal(values["model_type"], "references" in by_role, strategy),
        family=family,
        flavour=values["model_flavour"],
        model=values["pretrained_model_name_or_path"],
        images=str(main.get("instance_data_dir", "")),
        eval_images=str(by_role.get("eval", {}).get("instance_data_dir", "")),
        regularisation_images=str(by_role.get("regularisation", {}).get("instance_data_dir", "")),
        reference_images=str(reference.get("instance_data_dir", "")),
        reference_type=str(reference["conditioning_type"]) if reference else None,
        dataset=_without_reference(main, reference),
        adapter=written.algorithm if values["lora_type"] == "lycoris" else "dora" if values["use_dora"] else "lora",
        factor=written.factor,
        rank=written.rank,
        layers=written.layers,
        prompts=tuple(prompts),
        name=_name(project.places),
        options={name: values[name] for name in all_options() if _is_kept(name, settings) and name not in ANSWERED},
    )


def _goal(model_type: str, has_references: bool, captions: str) -> Goal:
    if model_type == "full":
        return "full"
    return "edit" if has_references else "subject" if captions == "instanceprompt" else "style"


def _is_kept(name: str, settings: Mapping[str, Setting]) -> bool:
    return name in ASKED or name in settings
