"""How long, how much at a time, and on which loss."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, Float, Fraction, Int, Text

FLOW_SCHEDULE = "no family that is built takes it"
ROLLOUT = "scheduled sampling (rollout) is not built"


class TrainingOptions(OptionGroup):
    """Training"""

    max_train_steps: Int = option(
        0,
        help="Length of the run in optimizer steps. Exactly one of this and `num_train_epochs` is above 0.",
        unit="optimizer steps",
        ge=0,
        level="basic",
    )
    num_train_epochs: Float = option(
        0.0,
        help="Length of the run in passes over the data, repeats included; fractions are allowed.",
        unit="epochs",
        ge=0,
        level="basic",
    )
    train_batch_size: Int = option(
        4, help="Pictures in one forward pass of one process.", unit="pictures", ge=1, le=4096, level="basic"
    )
    gradient_accumulation_steps: Int = option(
        1,
        help="Forward passes summed into one optimizer step; the loss is averaged over all of their pictures.",
        unit="micro-batches",
        ge=1,
        le=65536,
        level="basic",
    )
    seed: Int = option(
        42,
        help="Decides adapter initialisation, order, crops, noise, timesteps and caption dropout. The same seed and "
        "data give the same run.",
        ge=0,
    )
    caption_dropout_probability: Fraction = option(
        0.0,
        help="Share of captions that are replaced by the family's empty caption, which guidance needs.",
        unit="probability",
        level="basic",
    )
    use_ema: Bool = option(
        False,
        help="Keep a running average of the trained weights (float32); it is saved beside them.",
        level="basic",
    )
    ema_decay: Float = option(
        0.995, help="Highest decay of the average; early steps use (1 + step) / (10 + step).", ge=0, le=1
    )
    ema_update_interval: Int = option(1, help="Update the average every n steps.", unit="optimizer steps", ge=1)
    ema_warmup_steps: Int = option(
        0, help="Steps before the average starts.", planned="the decay ramps up by itself", ge=0
    )
    loss_type: Literal["l2", "huber", "smooth_l1"] = option(
        "l2",
        help="Loss between prediction and target; `l2` is the mean squared error.",
        planned_values={"huber": "only l2 is built", "smooth_l1": "only l2 is built"},
    )
    snr_gamma: Float | None = option(
        None,
        help="Min-SNR weighting of the loss.",
        planned="it serves epsilon-prediction families, none is built",
        ge=0,
    )
    masked_loss_probability: Fraction = option(
        1.0, help="How often the mask of a picture counts; otherwise all of the picture does.", unit="probability"
    )
    flow_schedule_shift: Float | None = option(
        None, help="Shift of the training timesteps towards noise.", planned=FLOW_SCHEDULE
    )
    flow_schedule_auto_shift: Bool = option(False, help="Choose the shift by picture size.", planned=FLOW_SCHEDULE)
    flow_sigmoid_scale: Float = option(1.0, help="Spread of the logit-normal timesteps.", planned=FLOW_SCHEDULE)
    flow_use_uniform_schedule: Bool = option(False, help="Draw timesteps uniformly.", planned=FLOW_SCHEDULE)
    flow_use_beta_schedule: Bool = option(False, help="Draw timesteps from a beta distribution.", planned=FLOW_SCHEDULE)
    flow_custom_timesteps: Text | None = option(None, help="Train on these timesteps only.", planned=FLOW_SCHEDULE)
    scheduled_sampling_max_step_offset: Int = option(
        0, help="Longest rollout; 0 is off.", unit="sampling steps", planned=ROLLOUT, ge=0
    )
    scheduled_sampling_probability: Fraction = option(
        0.0, help="Share of batches that are rolled out.", planned=ROLLOUT
    )
    scheduled_sampling_ramp_steps: Int = option(0, help="Steps over which rollout grows.", planned=ROLLOUT, ge=0)
    scheduled_sampling_start_step: Int = option(0, help="First step with rollout.", planned=ROLLOUT, ge=0)
    scheduled_sampling_prob_start: Fraction = option(0.0, help="Share at the start of the ramp.", planned=ROLLOUT)
    scheduled_sampling_prob_end: Fraction = option(0.5, help="Share at the end of the ramp.", planned=ROLLOUT)
    scheduled_sampling_ramp_shape: Text = option("linear", help="Shape of the ramp.", planned=ROLLOUT)
    scheduled_sampling_strategy: Text = option("uniform", help="Which offsets are drawn.", planned=ROLLOUT)
    scheduled_sampling_sampler: Text = option("unipc", help="Solver of the rollout.", planned=ROLLOUT)
    scheduled_sampling_order: Int = option(2, help="Order of the solver.", planned=ROLLOUT)
    scheduled_sampling_reflexflow: Bool | None = option(None, help="ReflexFlow loss weighting.", planned=ROLLOUT)
    scheduled_sampling_reflexflow_alpha: Float = option(1.0, help="ReflexFlow alpha.", planned=ROLLOUT)
    scheduled_sampling_reflexflow_beta1: Float = option(10.0, help="ReflexFlow beta 1.", planned=ROLLOUT)
    scheduled_sampling_reflexflow_beta2: Float = option(1.0, help="ReflexFlow beta 2.", planned=ROLLOUT)
