"""Between the command line and the library: which configuration or model a verb works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.config.discovery import find_config, named_configurations
from simpletuner.config.paths import looks_like_path
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.examples import DEFAULT_EXAMPLE, example_dir
from simpletuner.families.registry import all_specs, get_spec
from simpletuner.importing import collector_off

if TYPE_CHECKING:
    from simpletuner.config.loading import LoadedRun
    from simpletuner.config.options.validation import ValidationOptions
    from simpletuner.families.spec import FamilySpec
    from simpletuner.models.components import ModelSource
    from simpletuner.models.family import ModelFamily

# What chooses a configuration file; one given on the command line replaces all of them.
_CHOICES = ("CONFIG_PATH", "ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT")
_BACKENDS = ("SIMPLETUNER_CONFIG_BACKEND", "CONFIG_BACKEND", "CONFIG_TYPE")


def load_arguments(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    working_dir: Path,
    say: Callable[[str], None],
    config_file: Path | None = None,
    check_files: bool = True,
) -> LoadedRun:
    """The run that the command line means; without any configuration, the shipped example.

    Args:
        arguments: `example=NAME`, `env=NAME`, `--key=value`.
        say: called with the configuration that is used where nobody chose one.
        config_file: chosen by an option of the verb.
        check_files: whether images and output folder must be there; only training needs them.

    Raises:
        ConfigError: anything that cannot be used, all of it at once.
    """
    from simpletuner.config.loading import load_run

    chosen, options = split_arguments(arguments)
    if config_file is not None:
        chosen["config"] = str(config_file)
    environment = chosen_environment(chosen, environment)
    if find_config(environment, working_dir) is None:
        _refuse_to_guess(named_configurations(working_dir))
        say(f"no configuration in {working_dir}: using the shipped example {DEFAULT_EXAMPLE}")
        environment = chosen_environment({"example": DEFAULT_EXAMPLE}, environment)
    return load_run(options, environment, working_dir, check_files)


def _refuse_to_guess(names: Sequence[str]) -> None:
    """Who has configurations of his own and chose none has forgotten to, and does not want the shipped example.

    Raises:
        ConfigError: there are some.
    """
    if names:
        allowed = ", ".join([*(f"env={name}" for name in names), f"example={DEFAULT_EXAMPLE}"])
        message = "no configuration was chosen, and there is no config/config.json"
        raise ConfigError(Problem(message, allowed=allowed, fix=f"add one of them, for example env={names[0]}"))


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`example=` and `env=` apart from the options of the run.

    Raises:
        ConfigError: a word that is neither; an option without its dashes is the usual reason.
    """
    chosen: dict[str, str] = {}
    options: list[str] = []
    may_be_value = False  # of an option before it: --validation_prompt "1 + 1 = 2"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in ("example", "env"):
            chosen[name] = value
        elif equals and not argument.startswith("-") and not may_be_value:
            raise ConfigError(
                Problem(
                    f'"{argument}" is not understood',
                    allowed="example=NAME, env=NAME, --key=value",
                    fix=f"to set an option, write --{argument}",
                )
            )
        else:
            options.append(argument)
        may_be_value = argument.startswith("--") and not equals
    if len(chosen) > 1:
        raise ConfigError(Problem("example= and env= both choose a configuration", fix="give one of them"))
    return chosen, options


def chosen_environment(chosen: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with the command line's choice of a configuration in place of its own."""
    if not chosen:
        return dict(environment)
    kept = {name: value for name, value in environment.items() if name not in (*_CHOICES, *_BACKENDS)}
    if "example" in chosen:
        return kept | {"CONFIG_PATH": str(example_dir(chosen["example"]) / "config.json")}
    if "config" in chosen:
        return kept | {"CONFIG_PATH": chosen["config"]}
    return kept | {"ENV": chosen["env"]}


def family_of_run(loaded: LoadedRun, precision: str | None = None) -> ModelFamily:
    """The model of a configuration, on this machine's device.

    Args:
        precision: number format of its weights in place of the configuration's.

    Raises:
        ConfigError: its folder is incomplete.
    """
    with collector_off():
        from simpletuner.models.build import build_family
        from simpletuner.training.preflight import check_model_folder

    check_model_folder(loaded)
    replaced = {} if precision is None else {"base_model_precision": precision}
    return build_family(loaded.config.with_values(replaced))


def family_of_model(model: str, family_name: str | None, precision: str | None = None, **options: Any) -> ModelFamily:
    """A model folder or hub id, on this machine's device; bfloat16 where there is an accelerator.

    Args:
        precision: number format of its weights.
        options: further options of the model, such as its VAE.

    Raises:
        ConfigError: the folder is incomplete, or its family is not known.
    """
    from simpletuner.config.options import TrainConfig
    from simpletuner.models.components import ModelSource
    from simpletuner.models.local_check import check_local_model

    source = ModelSource(model)
    if not source.is_local and looks_like_path(model):
        raise ConfigError(
            Problem(f"there is no model folder at {model}", key="--model", allowed="a folder, or a hub id")
        )
    spec = get_spec(family_name) if family_name else spec_of_model(source)
    from simpletuner.models.build import build_family, model_source
    from simpletuner.models.devices import pick_device

    config = TrainConfig.from_values(
        {
            "model_family": spec.name,
            "pretrained_model_name_or_path": model,
            "mixed_precision": "no" if pick_device().type == "cpu" else "bf16",
            "base_model_precision": precision or "no_change",
            **options,
        }
    )
    if problems := check_local_model(model_source(config.model), spec):
        raise ConfigError(problems)
    return build_family(config)


def family_of_export(source: Path, model: str | None, family_name: str | None) -> ModelFamily:
    """The model of an adapter: that of the run that lies around the adapter, unless another one is named.

    Args:
        model: where the run's model lies now, or another model; its revision and variant are not the run's.

    Raises:
        ConfigError: nobody says which model it is, or it is not where it was.
    """
    from simpletuner import storage
    from simpletuner.config.options.model import PROMPT_OPTIONS

    places = [source, *source.absolute().parents[:3]]
    lock = next((place / "run.lock.json" for place in places if (place / "run.lock.json").is_file()), None)
    facts = storage.read_json(lock, dict) if lock else {}
    base, config = (facts.get(part, {}) for part in ("base", "config"))
    if not isinstance(base, dict) or not isinstance(config, dict):
        raise DataError(Problem("is damaged: its parts are no JSON objects", file=str(lock), fix="add --model"))
    kept = ("pretrained_vae_model_name_or_path", "text_encoder_paths", "tokenizer_max_length", *PROMPT_OPTIONS)
    taken = {key: config[key] for key in kept if key in config}
    if model is None:
        taken |= {key: config.get(key) for key in ("revision", "variant")}
        model = base.get("model")
    if model is None:
        raise ConfigError(
            Problem(f"no run.lock.json near {source} says which model it belongs to", key="--model", fix="add --model")
        )
    taken["pretrained_transformer_model_name_or_path"] = base.get("file")
    return family_of_model(model, family_name or config.get("model_family"), **taken)


def require_number_format(precision: str) -> None:
    """Raise where `--base-precision` names no number format.

    Raises:
        ConfigError: lists all.
    """
    from simpletuner.config.options import all_options

    choices = all_options()["base_model_precision"].choices
    if precision not in choices:
        message = f'"{precision}" is not a number format'
        raise ConfigError(Problem(message, key="--base-precision", allowed=", ".join(choices)))


def spec_of_name(model: str) -> FamilySpec:
    """The family of a model folder or hub id.

    Raises:
        ConfigError: it is not known.
    """
    from simpletuner.models.components import ModelSource

    return spec_of_model(ModelSource(model))


def spec_of_model(source: ModelSource) -> FamilySpec:
    """The family whose pipeline `model_index.json` names, or that publishes this checkpoint.

    Raises:
        ConfigError: not a local folder, or no family of ours has that pipeline.
    """
    from simpletuner.models.safe_loading import read_object

    index = Path(source.model) / "model_index.json"
    pipeline = read_object(index).get("_class_name") if index.is_file() else None
    specs, _ = all_specs()
    for spec in specs:
        published = {flavour.hub_id for flavour in spec.flavours.values()}
        if spec.has_pipeline(pipeline) or source.model in published:
            return spec
    raise ConfigError(
        Problem(
            f"cannot tell the family of {source.model} from its model_index.json",
            key="--model-family",
            allowed=", ".join(spec.name for spec in specs),
            fix="add --model-family",
        )
    )


def generation_options(spec: FamilySpec) -> ValidationOptions:
    """How images are generated where there is no configuration: the family's and the declared defaults."""
    from simpletuner.config.options.validation import ValidationOptions

    defaults = spec.defaults_for(None)
    return ValidationOptions(**{name: defaults[name] for name in ValidationOptions.model_fields.keys() & defaults})
