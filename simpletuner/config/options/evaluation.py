"""The loss on held-out images with fixed noise and timesteps, what it decides, and scores of validation images."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, Float, Int, Text


class EvaluationOptions(OptionGroup):
    """Evaluation"""

    eval_steps_interval: Int | None = option(
        None,
        help="Compute the eval loss every n steps. Needs a dataset of `dataset_type: eval`, or `eval_holdout`.",
        unit="optimizer steps",
        ge=1,
        level="basic",
    )
    eval_epoch_interval: Float | None = option(
        None, help="Compute the eval loss every n epochs; fractions are allowed.", unit="epochs", gt=0
    )
    num_eval_images: Int = option(
        4,
        help="Upper limit of eval batches (of one image each) per eval dataset.",
        unit="batches",
        ge=1,
        level="basic",
    )
    eval_timesteps: Int = option(
        28, help="Timesteps at which each eval image is judged; fixed, spread over the training distribution.", ge=1
    )
    eval_dataset_pooling: Bool = option(
        False, help="Report only the loss over all eval datasets together, and none for each of them."
    )
    eval_loss_disable: Bool = option(False, help="Compute no eval loss, whatever the intervals say.")
    eval_dataset_id: Text | None = option(None, help="Use only this eval dataset. Unset: all of them.")
    eval_holdout: Float = option(
        0.0,
        help="Share of the training images that is never trained on and gives the eval loss instead, where there is "
        "no eval dataset. Chosen by content, so it stays the same on resume and when images are added. 0 is none.",
        ge=0,
        le=0.5,
        level="basic",
    )
    checkpoint_keep_best: Bool | None = option(
        None,
        help="Keep the state with the lowest eval loss as `checkpoint-best`, besides the checkpoints that are rotated. "
        "Unset: wherever an eval loss is computed.",
        level="basic",
    )
    early_stopping_patience: Int | None = option(
        None,
        help="End the run, as finished, after this many evaluations in a row that brought no lower eval loss.",
        unit="evaluations",
        ge=1,
    )
    evaluation_type: Literal["none", "clip"] = option(
        "none", help="Score of validation images: `clip` says how well each fits its prompt."
    )
    pretrained_evaluation_model_name_or_path: Text | None = option(
        None,
        help="CLIP model that scores images: a folder or hub id with safetensors weights. Unset: "
        "openai/clip-vit-large-patch14.",
    )

    @property
    def has_interval(self) -> bool:
        """Whether an eval loss is asked for, as far as the intervals say."""
        return bool(self.eval_steps_interval or self.eval_epoch_interval) and not self.eval_loss_disable
