"""On which loss: errors, weights, noise levels, noise, and training on the model's own steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator

from simpletuner.config.losses import LOSSES
from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, Float, Fraction, Int, read_sigmas

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]


class ObjectiveOptions(OptionGroup):
    """Loss and noise"""

    loss_type: LossName = option(
        "l2",
        help="Error between prediction and target. "
        + " ".join(f"`{name}` {row.help}." for name, row in LOSSES.items()),
    )
    huber_schedule: Literal["snr", "exponential", "constant"] = option(
        "snr",
        help="How the turning point of `huber` and `smooth_l1` follows the noise: `constant`, or from 1 on data to "
        "`huber_c` on noise, by the signal-to-noise ratio or exponentially.",
    )
    huber_c: Float = option(0.1, help="Difference at which `huber` and `smooth_l1` turn from square to linear.", gt=0)
    snr_gamma: Float | None = option(
        None,
        help="Min-SNR weights: noise levels with a signal-to-noise ratio above this count less; for families that "
        "predict v or a flow very noisy ones do too. 5 is usual.",
        ge=0,
    )
    offset_noise: Bool = option(
        False, help="Add one number for each channel to the noise, which helps with very dark and very bright images."
    )
    noise_offset: Float = option(0.1, help="Deviation of `offset_noise`.", ge=0, le=10)
    noise_offset_probability: Fraction = option(
        0.25, help="Share of the images that `offset_noise` is used for.", unit="probability"
    )
    input_perturbation: Float = option(
        0.0,
        help="Deviation of further noise in the latents that the target does not know of: the model learns to do with "
        "inputs that are not quite right.",
        ge=0,
        le=10,
    )
    input_perturbation_steps: Int = option(
        0, help="Steps over which `input_perturbation` falls to 0; 0 keeps it.", unit="optimizer steps", ge=0
    )
    loss_balance: Literal["images", "pixels"] = option(
        "images",
        help="What an image counts in the loss of a step: `images` all the same, `pixels` as much as it has pixels, so "
        "that every latent counts the same.",
    )
    timestep_stratified: Bool = option(
        False,
        help="Divide the noise levels into as many equally likely parts as a step has images, in all processes "
        "together, and give each image one of them: the loss and its gradient vary less.",
    )
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = option(
        "none",
        help="Train some noise levels more often: the `earlier` (little noise) or `later` (much noise) "
        "`timestep_bias_portion` of them, or a `range`.",
    )
    timestep_bias_multiplier: Float = option(
        1.0, help="How many times as often, relative to the others.", ge=0, le=1000
    )
    timestep_bias_portion: Fraction = option(0.25, help="Share of the levels that `earlier` and `later` mean.")
    timestep_bias_begin: Float = option(0, help="Least noise of `range`, in thousandths.", ge=0, le=1000)
    timestep_bias_end: Float = option(1000, help="Most noise of `range`, in thousandths.", ge=0, le=1000)
    flow_schedule_shift: Float | None = option(
        None,
        help="For flow families: move the noise levels of training toward noise (above 1) or data (below 1). Unset or "
        "0: as the family has it.",
        ge=0,
        le=100,
    )
    flow_schedule_auto_shift: Bool = option(
        False, help="For flow families: choose the shift by the size of the image, as `flow_schedule_auto_shift_curve`."
    )
    flow_schedule_auto_shift_curve: Literal["exponential", "sqrt"] = option(
        "exponential",
        help="How the shift of `flow_schedule_auto_shift` grows with the tokens of the image: `exponential` is "
        "FLUX.1's, e^0.5 at 256 and e^1.15 at 4096; `sqrt` is the root of their number divided by 20.",
    )
    flow_schedule_terminal: Float = option(
        0.0,
        help="For flow families: the least noise level. The others are spread over the rest, after any shift, as "
        "schedulers with `shift_terminal` do when sampling.",
        ge=0,
        lt=1,
    )
    flow_sigmoid_scale: Float = option(
        1.0,
        help="For flow families: spread of the logit-normal noise levels; larger ones reach further out.",
        gt=0,
        le=100,
    )
    flow_logit_mean: Float = option(
        0.0,
        help="For flow families: mean of the normal whose sigmoid the logit-normal noise levels are; above 0 is more "
        "noise.",
        ge=-10,
        le=10,
    )
    flow_use_uniform_schedule: Bool = option(
        False, help="For flow families: draw all noise levels equally often, in place of logit-normal ones."
    )
    flow_use_beta_schedule: Bool = option(
        False, help="For flow families: draw noise levels from a beta distribution, in place of logit-normal ones."
    )
    flow_beta_schedule_alpha: Float = option(
        2.0, help="Of `flow_use_beta_schedule`: larger means more noise.", ge=0.5, le=100
    )
    flow_beta_schedule_beta: Float = option(
        2.0, help="Of `flow_use_beta_schedule`: larger means less noise.", ge=0.5, le=100
    )
    flow_use_mode_schedule: Bool = option(
        False,
        help="For flow families: draw noise levels by SD3's mode sampling with heavy tails, in place of logit-normal "
        "ones.",
    )
    flow_mode_scale: Float = option(
        1.29,
        help="Of `flow_use_mode_schedule`: above 0 prefers levels in the middle, below 0 those near data and noise.",
        ge=-1,
        le=1.75,
    )
    flow_loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = option(
        "none",
        help="For flow families: weights of noise levels. `sigma_sqrt` is 1 / sigma^2, at most a million; `cosmap` is "
        "2 / (pi (1 - 2 sigma + 2 sigma^2)).",
    )
    flow_custom_timesteps: Annotated[tuple[float, ...], BeforeValidator(read_sigmas)] | None = option(
        None,
        takes="list of numbers, or text with commas",
        help="For flow families: train on these noise levels only, a list or text with commas. 0 is data; 1 is noise, "
        "or 1000, where any is above 1.",
    )
    scheduled_sampling_max_step_offset: Int = option(
        0,
        help="Longest rollout: some batches are trained on latents that the model itself has denoised from a noisier "
        "level. 0 is off. A step is as long as one of `validation_num_inference_steps`.",
        unit="sampling steps",
        ge=0,
        le=100,
    )
    scheduled_sampling_probability: Fraction = option(
        0.0, help="Share of the micro-batches that are rolled out, where there is no ramp.", unit="probability"
    )
    scheduled_sampling_ramp_steps: Int = option(
        0,
        help="Steps over which the share goes from `scheduled_sampling_prob_start` to `scheduled_sampling_prob_end`; 0 "
        "is no ramp.",
        unit="optimizer steps",
        ge=0,
    )
    scheduled_sampling_start_step: Int = option(
        0, help="Steps before the first rollout, and before the ramp.", unit="optimizer steps", ge=0
    )
    scheduled_sampling_prob_start: Fraction = option(0.0, help="Share at the start of the ramp.", unit="probability")
    scheduled_sampling_prob_end: Fraction = option(
        0.5, help="Share at the end of the ramp and after it.", unit="probability"
    )
    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = option("linear", help="Shape of the ramp.")
    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = option(
        "uniform",
        help="How long rollouts are: every length equally often, short ones more often (`biased_early`), or long ones "
        "(`biased_late`).",
    )
    scheduled_sampling_sampler: Literal["unipc", "dpm", "euler"] = option(
        "unipc", help="Solver of the rollout: UniPC, DPM-Solver++, or Euler (DDIM)."
    )
    scheduled_sampling_order: Int = option(2, help="Order of the solver; `euler` is always of the first.", ge=1, le=2)
    scheduled_sampling_reflexflow: Bool | None = option(
        None,
        help="ReflexFlow's loss on rolled-out latents: the direction to the data, and more weight where the low "
        "frequencies have drifted. Unset: for flow families.",
    )
    scheduled_sampling_reflexflow_alpha: Float = option(1.0, help="Weight of the drift within the error.", ge=0, le=100)
    scheduled_sampling_reflexflow_beta1: Float = option(10.0, help="Weight of the direction.", ge=0, le=1000)
    scheduled_sampling_reflexflow_beta2: Float = option(1.0, help="Weight of the error.", ge=0, le=1000)
