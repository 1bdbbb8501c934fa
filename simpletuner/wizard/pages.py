"""The pages of the screens: which questions are asked together, in which order, with which labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from simpletuner.wizard.answers import Answers
from simpletuner.wizard.question import Kind, Page, Question, dataset_question, option_question, option_questions
from simpletuner.wizard.questions import (
    ADAPTER,
    FACTOR,
    FALLBACK,
    FAMILY,
    FLAVOUR,
    GOAL,
    LAYERS_QUESTION,
    LYCORIS_RANK,
    PROMPTS,
    RANK,
    TRAINS_ON,
    WEBHOOK,
    is_adapter,
    is_edit,
)


def pages() -> tuple[Page, ...]:
    """Every page but the last one, which shows the files."""
    return (
        Page("Goal", lambda answers: "What should the model learn?", (GOAL,)),
        Page(
            "Model",
            lambda answers: "Which model do you want to train?",
            (FAMILY, FLAVOUR, _field_question("model", "Model folder", _MODEL_HELP, "folder", empty=None)),
        ),
        Page(
            "Images",
            lambda answers: "Where are the images?",
            (
                _field_question("images", "Images", _IMAGES_HELP, "folder"),
                _field_question("reference_images", "Before", _REFERENCES_HELP, "folder", applies=is_edit),
                dataset_question("instance_prompt", "Name / prompt"),
                dataset_question("caption_strategy", "Captions"),
                FALLBACK,
                option_question("resolution", "Resolution"),
                dataset_question("crop", "Crop"),
                dataset_question("repeats", "Repeats"),
                _field_question("eval_images", "Held-out folder", _EVAL_HELP, "folder"),
                *option_questions({"eval_holdout": "Held-out share"}),
                _field_question(
                    "regularisation_images", "Regularization", _REGULARISATION_HELP, "folder", applies=is_adapter
                ),
            ),
        ),
        Page(
            "Training",
            lambda answers: "How is it trained, and on which machine?",
            (TRAINS_ON, ADAPTER, FACTOR, LYCORIS_RANK, RANK, LAYERS_QUESTION, *option_questions(_TRAINING)),
        ),
        Page(
            "Validation",
            lambda answers: "Which images should validation generate?",
            (PROMPTS, *option_questions(_VALIDATION)),
        ),
        Page(
            "Tracking",
            lambda answers: "Where does the result go, and who is notified?",
            (
                *option_questions(_TRACKING),
                *((WEBHOOK,) if option_questions({WEBHOOK.key: ""}) else ()),
                *_hub_questions(),
            ),
        ),
    )


def asked_as(key: str) -> str:
    """The question that asks for a key of `config.json` or of a dataset (`subject.crop`)."""
    name = key.rpartition(".")[2]
    return _ASKED_AS.get(name, name)


def page_of(key: str) -> str | None:
    """Number and title of the page that asks for a key of `config.json` or of a dataset (`subject.crop`)."""
    name = asked_as(key)
    found = (
        f"{number}, {page.title}"
        for number, page in enumerate(pages(), 1)
        if name in [question.key for question in page.questions]
    )
    return next(found, None)


def _hub_questions() -> tuple[Question, ...]:
    """Whether to upload; and how, where it is."""
    asked, *others = option_questions(_HUB)
    return (asked, *(replace(each, applies=lambda answers: bool(answers.options.get(asked.key))) for each in others))


def _field_question(
    key: str,
    label: str,
    help: str,
    kind: Kind = "text",
    empty: Any = "",
    applies: Callable[[Answers], bool] = lambda answers: True,
) -> Question:
    """A question whose answer is a field of `Answers`."""

    def write(answers: Answers, value: Any) -> Answers:
        return replace(answers, **{key: value.strip() or empty})

    return Question(key, label, help, kind, lambda answers, plan: getattr(answers, key), write, applies=applies)


_ASKED_AS = {
    "instance_data_dir": "images",
    "model_family": "family",
    "model_flavour": "flavour",
    "pretrained_model_name_or_path": "model",
    "validation_prompt": "prompts",
    "user_prompt_library": "prompts",
}
_MODEL_HELP = (
    "A folder in diffusers layout, or the hub id (owner/name) of another checkpoint. Empty: the flavor, fetched from "
    "the hub at the first start."
)
_IMAGES_HELP = "Folder with the training images, subfolders included. It is scanned as you type."
_EVAL_HELP = "Folder with a few images that are never trained on: the loss on them shows when to stop. Optional."
_REGULARISATION_HELP = (
    "Folder with other images of the same kind, on which the model stays unchanged (prior preservation). Optional."
)
_REFERENCES_HELP = (
    "Folder with the images before the change; each has the name of the image after it in the folder above. The "
    "captions say what is to be changed."
)
_TRAINING = {
    "mixed_precision": "Precision",
    "base_model_precision": "Base model",
    "gradient_checkpointing": "Checkpointing",
    "train_batch_size": "Batch size",
    "gradient_accumulation_steps": "Accumulation",
    "optimizer": "Optimizer",
    "learning_rate": "Learning rate",
    "max_train_steps": "Steps",
    "use_ema": "EMA",
}
_VALIDATION = {
    "validation_step_interval": "Generate every",
    "validation_resolution": "Size",
    "validation_num_inference_steps": "Sampling steps",
    "validation_guidance": "Guidance",
    "validation_preview": "Previews",
}
_TRACKING = {
    "output_dir": "Output folder",
    "checkpoint_step_interval": "Save every",
    "checkpoints_total_limit": "Checkpoints kept",
    "checkpoint_keep_best": "Keep the best",
    "report_to": "Tracker",
    "tracker_run_name": "Name of the run",
}
_HUB = {
    "push_to_hub": "Upload to the hub",
    "hub_model_id": "Name on the hub",
    "model_card_private": "Private",
}
