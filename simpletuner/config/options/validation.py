"""Pictures that are drawn while training."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, FilePath, Float, Int, Sizes, Text

PREVIEWS = "previews are sent through a webhook, which is not built"


class ValidationOptions(OptionGroup):
    """Validation pictures"""

    validation_prompt: Text | None = option(
        None,
        help="Prompt that is drawn at each validation; further ones come from `user_prompt_library`. Without any "
        "prompt no pictures are made.",
        level="basic",
    )
    validation_negative_prompt: Text | None = option(
        None,
        help="What guidance leads away from. Unset: the family's own; an empty text is a negative prompt too.",
        empty_is_value=True,
    )
    user_prompt_library: FilePath | None = option(
        None,
        help="JSON file of further prompts: nickname -> prompt. Nicknames become file names.",
        level="basic",
        path="input",
    )
    validation_prompt_library: Bool = option(
        False, help="Draw a built-in list of prompts.", planned="use user_prompt_library"
    )
    validation_step_interval: Int | None = option(
        100, help="Draw every n steps; 0 never.", unit="optimizer steps", ge=0, level="basic"
    )
    validation_epoch_interval: Int | None = option(None, help="Draw every n epochs.", unit="epochs", ge=1)
    validation_on_startup: Bool = option(False, help="Draw at the first step of a run too, before anything is trained.")
    validation_disable: Bool = option(False, help="Draw no pictures at all.")
    disable_benchmark: Bool = option(
        False, help="Leave out the pictures of the untrained model, which later grids show for comparison."
    )
    validation_resolution: Sizes = option(
        "256",
        help="Picture sizes, with commas between them: 1024 or 1280x768 (width x height). Each prompt is drawn at "
        "each size.",
        unit="pixels",
        level="basic",
    )
    validation_seed: Int | None = option(None, help="Seed of the pictures' noise. Unset: `seed`.", ge=0)
    validation_seed_source: Literal["cpu", "gpu"] = option(
        "cpu",
        help="Device that draws the noise.",
        planned_values={"gpu": "noise is drawn on the CPU, so that it is the same everywhere"},
    )
    validation_randomize: Bool = option(False, help="Another seed each time.", planned="pictures keep their seeds")
    validation_num_inference_steps: Int = option(
        30, help="Sampling steps of a picture.", unit="sampling steps", ge=1, le=1000, level="basic"
    )
    validation_guidance: Float = option(
        7.5, help="Classifier-free guidance scale; 1 is none.", ge=0, le=100, level="basic"
    )
    validation_guidance_rescale: Float = option(
        0.0,
        help="Rescaling of guidance against over-exposure, for pipelines that have it.",
        planned="no family that is built has it",
    )
    validation_guidance_real: Float = option(
        1.0, help="Real guidance of distilled models.", planned="no distilled family is built"
    )
    validation_no_cfg_until_timestep: Int = option(
        2, help="Steps without real guidance.", planned="no distilled family is built"
    )
    validation_guidance_skip_layers: Text | None = option(
        None, help="Skip-layer guidance.", planned="no family that is built has it"
    )
    validation_noise_scheduler: Text | None = option(
        None, help="Another sampler than the model's own.", planned="pictures use the model's own sampler"
    )
    num_validation_images: Int = option(
        1, help="Pictures for each prompt and size.", planned="one picture is drawn; add prompts instead", ge=1
    )
    validation_preview: Bool = option(False, help="Send pictures while they are drawn.", planned=PREVIEWS)
    validation_preview_steps: Int = option(
        1, help="Send every n-th sampling step.", unit="sampling steps", planned=PREVIEWS, ge=1
    )
    validation_external_script: Text | None = option(
        None, help="Script that draws instead.", planned="the trainer draws its own pictures"
    )
    ema_validation: Literal["none", "ema_only", "comparison"] = option(
        "comparison", help="With `use_ema`: draw with the averaged weights too (`comparison`), only with them, or not."
    )
