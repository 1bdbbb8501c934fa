"""Where a configuration becomes a model: family, weights, device and number formats, for training and every command.

Whoever needs a model builds it here, so that no command forgets an option of it.
"""

from __future__ import annotations

from simpletuner.config.options import TrainConfig
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.paths import SINGLE_FILE
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import FILE_KEY, MODEL_KEY, ModelSource
from simpletuner.models.devices import number_formats, pick_device, weight_dtype
from simpletuner.models.family import ModelFamily
from simpletuner.precision.mixed import use_tf32


def build_family(config: TrainConfig) -> ModelFamily:
    """The family of a configuration, bound to its weights on this machine's device; nothing is loaded yet.

    Raises:
        ConfigError: the family is unknown, or this torch cannot use the GPU that is there.
    """
    spec = get_spec(config.model.model_family)
    use_tf32(not config.precision.disable_tf32)
    family: ModelFamily = get_family_class(spec)(spec, model_source(config.model), pick_device(), weight_dtype(config))
    family.number_formats = number_formats(config)
    family.prompt_length = config.model.tokenizer_max_length
    family.clip_skip = config.model.clip_skip
    family.force_zeros_for_empty_prompt = config.model.force_zeros_for_empty_prompt
    modes = {"slicing": config.model.vae_enable_slicing, "tiling": config.model.vae_enable_tiling}
    family.vae_modes = tuple(mode for mode, is_on in modes.items() if is_on)
    return family


def model_source(options: ModelOptions) -> ModelSource:
    """Where the weights are: the configured folder or hub id, else the hub id of the flavor."""
    spec = get_spec(options.model_family)
    flavour = spec.flavours[options.model_flavour or spec.default_flavour]
    model, file = options.pretrained_model_name_or_path, options.pretrained_transformer_model_name_or_path
    file_key = FILE_KEY
    if model and model.endswith(SINGLE_FILE):
        model, file, file_key = None, model, MODEL_KEY
    encoders = [component.name for component in spec.components if component.role == "text_encoder"]
    return ModelSource(
        model=model or flavour.hub_id,
        vae=options.pretrained_vae_model_name_or_path,
        revision=options.revision,
        variant=options.variant,
        file=file,
        file_key=file_key,
        encoders={
            name: place for name, place in zip(encoders, options.text_encoder_paths or (), strict=False) if place
        },
    )
