"""The loss on held-out pictures, with fixed noise and timesteps."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, Float, Int, Text

CLIP_SCORE = "CLIP scores are not built; the eval loss is"


class EvaluationOptions(OptionGroup):
    """Evaluation"""

    eval_steps_interval: Int | None = option(
        None,
        help="Compute the eval loss every n steps. Needs a dataset of `dataset_type: eval`.",
        unit="optimizer steps",
        ge=1,
        level="basic",
    )
    eval_epoch_interval: Float | None = option(
        None, help="Compute the eval loss every n epochs; fractions are allowed.", unit="epochs", gt=0
    )
    num_eval_images: Int = option(
        4,
        help="Upper limit of eval batches (of one picture each) per eval dataset.",
        unit="batches",
        ge=1,
        level="basic",
    )
    eval_timesteps: Int = option(
        28, help="Timesteps at which each eval picture is judged; fixed, spread over the training distribution.", ge=1
    )
    eval_dataset_pooling: Bool = option(
        False, help="Report only the loss over all eval datasets together, and none for each of them."
    )
    eval_loss_disable: Bool = option(False, help="Compute no eval loss, whatever the intervals say.")
    eval_dataset_id: Text | None = option(
        None, help="Use only this eval dataset.", planned="all eval datasets are used; set disabled on the others"
    )
    evaluation_type: Literal["none", "clip"] = option(
        "none", help="Score of validation pictures.", planned_values={"clip": CLIP_SCORE}
    )
    pretrained_evaluation_model_name_or_path: Text | None = option(
        None, help="Model that scores pictures.", planned=CLIP_SCORE
    )
