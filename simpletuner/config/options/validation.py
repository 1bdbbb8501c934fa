"""Images that are generated while training."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import (
    Bool,
    FilePath,
    Float,
    Fraction,
    Int,
    Layers,
    Size,
    Sizes,
    Text,
    TextOrList,
    parse_sizes,
)


class ValidationOptions(OptionGroup):
    """Validation images"""

    validation_prompt: Text | None = option(
        None,
        help="Prompt that is generated at each validation; further ones come from `user_prompt_library`. Without any "
        "prompt no images are made.",
        level="basic",
    )
    validation_negative_prompt: Text | None = option(
        None,
        help="Negative prompt. Unset: the family's own; an empty text is a negative prompt too.",
        empty_is_value=True,
    )
    user_prompt_library: FilePath | None = option(
        None,
        help="JSON file of further prompts: nickname -> prompt, or nickname -> object with `prompt` and how it is "
        "generated (`negative_prompt`, `resolution`, `num_inference_steps`, `guidance`, `guidance_rescale`, `seed`, "
        "`num_images`, `adapter_strength`, `references`). Nicknames become file names.",
        level="basic",
        path="input",
    )
    validation_references: TextOrList | None = option(
        None,
        takes="path, or list of paths",
        help="Images that the prompts of validation edit, for families that take references: a path, or a list. "
        "Unset, and training has reference images: those of its first held-out image, else of its first one.",
    )
    validation_prompt_library: Bool = option(
        False,
        help="Use a built-in list of thirty prompts too: people, hands, animals, places, styles, text. It shows what "
        "training does to what it is not about.",
    )
    validation_disable_unconditional: Bool = option(
        True, help="Generate no image of the empty caption (`unconditional`). `false` generates one."
    )
    validation_step_interval: Int | None = option(
        100, help="Generate every n steps; 0 never.", unit="optimizer steps", ge=0, level="basic"
    )
    validation_epoch_interval: Int | None = option(None, help="Generate every n epochs.", unit="epochs", ge=1)
    validate_after_step: Int = option(
        0,
        help="No images before this step, but those of the untrained model; the end of a run always generates.",
        unit="optimizer steps",
        ge=0,
    )
    validate_after_epoch: Int = option(0, help="No images before so many epochs are done.", unit="epochs", ge=0)
    validation_on_startup: Bool = option(
        False, help="Generate at the first step of a run too, before anything is trained."
    )
    validation_disable: Bool = option(False, help="Generate no images at all.")
    disable_benchmark: Bool = option(
        False, help="Leave out the images of the untrained model, which later grids show for comparison."
    )
    validation_resolution: Sizes = option(
        "256",
        takes="a side such as 1024, a size such as 1280x768, or several with commas",
        help="Image sizes, with commas between them: 1024 or 1280x768 (width x height). Each prompt is generated at "
        "each size.",
        unit="pixels",
        level="basic",
    )
    validation_seed: Int | None = option(None, help="Seed of the images' noise. Unset: `seed`.", ge=0)
    validation_seed_source: Literal["cpu", "gpu"] = option(
        "cpu",
        help="Device that samples the noise. `cpu` gives the same noise on every machine, `gpu` that of tools that "
        "sample it on the accelerator; without an accelerator they are the same.",
    )
    validation_randomize: Bool = option(
        False, help="Another seed at each validation, derived from `validation_seed` and the step."
    )
    num_validation_images: Int = option(1, help="Images for each prompt and size; their seeds count up.", ge=1)
    validation_num_inference_steps: Int = option(
        30, help="Sampling steps of an image.", unit="sampling steps", ge=1, le=1000, level="basic"
    )
    validation_guidance: Float = option(
        7.5, help="Classifier-free guidance scale; 1 is none.", ge=0, le=100, level="basic"
    )
    validation_guidance_rescale: Float = option(
        0.0, help="Rescaling of guidance against over-exposure, for families whose pipeline has it.", ge=0, le=1
    )
    validation_guidance_real: Float = option(
        1.0,
        help="Real guidance of models whose `validation_guidance` is distilled into them (FLUX), where the pipeline "
        "has it; 1 is none.",
        ge=0,
        le=100,
    )
    validation_guidance_image: Float | None = option(
        None,
        help="How far guidance leads toward the reference images, for families whose pipeline has it (OmniGen, "
        "OmniGen2). Unset: 1.6 and 2.",
        ge=0,
        le=100,
    )
    validation_no_cfg_until_timestep: Int = option(
        2, help="Steps without real guidance.", planned="the pipelines of diffusers guide at every step"
    )
    validation_guidance_skip_layers: Layers | None = option(
        None,
        help="Skip-layer guidance, for families whose pipeline has it (Stable Diffusion 3.5 medium: 7,8,9): numbers of "
        "blocks, counted from 0. Images are led away from what the model generates without them.",
    )
    validation_guidance_skip_scale: Float = option(2.8, help="Strength of skip-layer guidance.", ge=0, le=100)
    validation_guidance_skip_layers_start: Fraction = option(
        0.01, help="Skip-layer guidance begins after this share of the sampling steps."
    )
    validation_guidance_skip_layers_stop: Fraction = option(
        0.2, help="Skip-layer guidance ends before this share of the sampling steps."
    )
    validation_noise_scheduler: Literal["ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++"] | None = option(
        None,
        help="Another sampler than the model's own, for families that predict noise (epsilon, v-prediction). Flow "
        "families keep their own; OmniGen2 also takes `dpm++`.",
    )
    validation_lycoris_strength: Float = option(
        1.0, help="Multiplies what the adapter adds to validation images; 1 is as trained.", ge=-10, le=10
    )
    validation_preview: Bool = option(
        False,
        help="Decode images while they are generated, by the family's tiny autoencoder: files in "
        "`validation_images/previews`, and events for webhooks.",
    )
    validation_preview_steps: Int = option(1, help="Preview every n-th sampling step.", unit="sampling steps", ge=1)
    validation_method: Literal["simpletuner-local", "external-script"] = option(
        "simpletuner-local",
        help="Who generates: the trainer, or the program of `validation_external_script`.",
    )
    validation_external_script: Text | None = option(
        None,
        help="Command to start at each validation, beside training and without a shell. `{local_checkpoint_path}`, "
        "`{global_step}`, `{output_dir}`, `{model_family}`, `{tracker_run_name}` and `{validation_prompt}` are "
        "filled in; it writes to `validation_external.log`.",
    )
    validation_external_background: Bool = option(
        True,
        help="The script runs beside training.",
        planned="a script that hangs would stop training, so it always runs beside it",
    )
    ema_validation: Literal["none", "ema_only", "comparison"] = option(
        "comparison",
        help="With `use_ema`: generate with the averaged weights too (`comparison`), only with them, or not.",
    )

    @property
    def validation_sizes(self) -> list[Size]:
        """`validation_resolution` as sizes, height first."""
        return parse_sizes(self.validation_resolution)
