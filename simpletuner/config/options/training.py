"""How long, how much at a time, and on which loss."""

from __future__ import annotations

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, Float, Fraction, Int


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
        help="Length of the run in passes over the data, repeats included; fractions are allowed. Where batch size or "
        "data changed at a resume, what remains is counted from there.",
        unit="epochs",
        ge=0,
        le=100_000,
        level="basic",
    )
    train_batch_size: Int = option(
        4, help="Images in one forward pass of one process.", unit="images", ge=1, le=4096, level="basic"
    )
    gradient_accumulation_steps: Int = option(
        1,
        help="Forward passes summed into one optimizer step; the loss is averaged over all of their images.",
        unit="micro-batches",
        ge=1,
        le=65536,
        level="basic",
    )
    seed: Int = option(
        42,
        help="Decides adapter initialization, order, crops, noise, timesteps and caption dropout. The same seed and "
        "data give the same run.",
        ge=0,
    )
    caption_dropout_probability: Fraction = option(
        0.0,
        help="Share of captions that are replaced by the family's empty caption, which guidance needs.",
        unit="probability",
        level="basic",
    )
    reference_dropout_probability: Fraction | None = option(
        None,
        help="Share of the dropped captions whose reference images are dropped too. Unset: all of them.",
        unit="probability",
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
    masked_loss_probability: Fraction = option(
        1.0, help="How often the mask of an image counts; otherwise all of the image does.", unit="probability"
    )
