"""Where the run is reported: progress, trackers, hub, webhooks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, Int, Name, SecretJsonOrPath, Text, read_words

TRACKER = "this tracker is not built in; a custom-tracker of a few lines can serve it, see TRACKERS.md"
PUBLISHING = "only the Hugging Face Hub is built; copy output_dir with the tool of the store, such as aws s3 sync"

Tracker = Literal["tensorboard", "wandb", "custom-tracker", "all", "simpletuner", "none", "swanlab", "comet_ml"]


def read_trackers(value: Any) -> Any:
    """Names of trackers, also `custom_tracker`."""
    return tuple("custom-tracker" if word == "custom_tracker" else word for word in read_words(value))


class ReportingOptions(OptionGroup):
    """Reporting"""

    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(read_trackers)] = option(
        ("none",),
        help="Trackers, with commas between them; `all` is TensorBoard, W&B and a custom one if it is set. "
        "`metrics.jsonl`, `metrics.csv` and `report.html` in `output_dir` are always written (`simpletuner` means "
        "just these).",
        level="basic",
        planned_values=dict.fromkeys(("swanlab", "comet_ml"), TRACKER),
    )
    custom_tracker: Text | None = option(
        None,
        help="Class of the tracker that `custom-tracker` in `report_to` means, as `package.module:Class`; a module in "
        "the working folder will do.",
    )
    tracker_run_name: Name | None = option(None, help="Name of this run in trackers. Unset: the name of `output_dir`.")
    tracker_project_name: Name | None = option(
        None, help="Project of this run in W&B and custom trackers. Unset: `simpletuner`. TensorBoard has no projects."
    )
    push_to_hub: Bool = option(
        False,
        help="Upload the weights to the Hugging Face Hub when the run ends, with a model card. Whether that is allowed "
        "is asked before the run.",
    )
    push_checkpoints_to_hub: Bool = option(
        False, help="Upload the weights of each checkpoint too, each as a commit with the tag `step-<step>`."
    )
    push_to_hub_background: Bool = option(
        True, help="Upload checkpoints while training continues; `false` waits for each upload."
    )
    hub_model_id: Text | None = option(
        None,
        help="Name of the repository on the Hub: `name`, or `owner/name`. Unset: the name of the run.",
    )
    model_card_private: Bool = option(True, help="Make a new repository private.")
    model_card_safe_for_work: Bool = option(
        False,
        help="Leave out the tag `not-for-all-audiences` of the model card: what it generates is fit for everybody.",
    )
    model_card_note: Text | None = option(None, help="A note on the model card, in Markdown.")
    publishing_config: Any = option(None, help="Upload to S3 and other stores.", planned=PUBLISHING)
    webhook_config: SecretJsonOrPath | None = option(
        None,
        help="Where progress is sent: a webhook as an object (documentation/WEBHOOKS.md), a list of them, the same as "
        "JSON text, or a path of such a file.",
    )
    webhook_reporting_interval: Int | None = option(
        None,
        help="Report progress to webhooks every n-th step. Unset: every second or so to raw ones, never to Discord.",
        unit="optimizer steps",
        ge=1,
    )
