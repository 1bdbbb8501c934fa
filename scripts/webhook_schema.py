"""What raw webhooks send, as JSON Schema: for those who write receivers.

`documentation/webhook_events.schema.json` is made from it (`python scripts/fill_pages.py`), and a test holds every
event against it. Fields may be added within a version; receivers ignore what they do not know.
"""

from __future__ import annotations

from typing import Any

from simpletuner.config.webhooks import SEVERITIES
from simpletuner.reporting.webhooks.messages import SCHEMA_VERSION

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {
    "description": "A number; one that is not finite is written as its name, since JSON has no such numbers.",
    "anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}],
}
MAYBE: Schema = {"anyOf": [NUMBER, {"type": "null"}]}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}


def event_schema() -> Schema:
    """The schema of one event: a common envelope, and `data` by type."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Events of raw webhooks, version {SCHEMA_VERSION}",
        "type": "object",
        "properties": {
            "schema_version": {"const": SCHEMA_VERSION},
            "id": _documented(TEXT, "Unique; an event whose answer was lost comes again under the same id."),
            "type": {"enum": list(_DATA)},
            "severity": {"enum": list(SEVERITIES)},
            "title": _documented(TEXT, "One line for people."),
            "message": _documented(TEXT, "More of it; may be empty."),
            "run_name": TEXT,
            "run_id": _documented(TEXT_OR_NULL, "The same at each start of a run; null before the run has begun."),
            "prefix": _documented(TEXT_OR_NULL, "message_prefix of the webhook."),
            "job_id": _documented(TEXT_OR_NULL, "SIMPLETUNER_JOB_ID of the environment."),
            "timestamp": _documented({**TEXT, "format": "date-time"}, "When it happened, which may be long before."),
            "data": {"type": "object"},
            "images": {
                "description": "Images as data URIs; JPEGs where the files were too large for the service.",
                "type": "array",
                "items": {"type": "string", "pattern": "^data:image/(png|jpeg|webp);base64,"},
            },
        },
        "required": [
            *("schema_version", "id", "type", "severity", "title", "message", "run_name", "prefix", "job_id"),
            *("timestamp", "data", "images"),
        ],
        "allOf": [
            {"if": {"properties": {"type": {"const": kind}}}, "then": {"properties": {"data": data}}}
            for kind, data in _DATA.items()
        ],
    }


def _documented(schema: Schema, description: str) -> Schema:
    return {"description": description, **schema}


def _data(description: str, required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    properties = {**required, **(optional or {})}
    return {"description": description, "type": "object", "properties": properties, "required": list(required)}


_PROGRESS = _data("", {}, {"current": COUNT, "total": {"anyOf": [COUNT, {"type": "null"}]}, "seconds": NUMBER})
_STAGE = _data("", {"key": TEXT, "label": TEXT, "status": {"enum": ["running", "completed"]}, "progress": _PROGRESS})
_IMAGE = _data(
    "An image; `image` is its index in `images`, null where it could not be sent.",
    {
        "shortname": TEXT,
        "prompt": TEXT,
        "width": COUNT,
        "height": COUNT,
        "resolution": TEXT,
        "seed": {"type": ["integer", "null"]},
        "kind": {"enum": ["base", "live", "ema", "grid"]},
        "file": TEXT,
        "image": {"type": ["integer", "null"], "minimum": 0},
    },
    {"index": _documented(COUNT, "Counts the images of one prompt and size, from 0.")},
)
_IMAGES: Schema = {"type": "array", "items": _IMAGE}
_NUMBERS: Schema = {"type": "object", "additionalProperties": NUMBER}
_ROWS: Schema = {"type": "array", "items": {"type": "array", "items": NUMBER}}
_QUANTILES = _documented(_ROWS, "[quantile of the distribution of sigmas, mean loss]")
_CURVE: Schema = {
    "description": "[step, loss, learning rate, gradient norm] of the steps since the last report, perhaps thinned.",
    "type": "array",
    "items": {"type": "array", "prefixItems": [COUNT, NUMBER, NUMBER, MAYBE], "minItems": 4, "maxItems": 4},
}

_DATA: dict[str, Schema] = {
    "lifecycle.stage": _data("Work before, between or after the steps.", {"stage": _STAGE}),
    "training.status": _data(
        "The run starts, goes on, ends. With `curve`: progress, of which only the latest is sent.",
        {"status": {"enum": ["running", "completed", "interrupted"]}, "step": COUNT},
        {
            "total_steps": COUNT,
            "start_step": COUNT,
            "output_dir": TEXT,
            "details": {"type": "object", "additionalProperties": TEXT},
            "percent": NUMBER,
            "eta_seconds": NUMBER,
            "loss": NUMBER,
            "learning_rate": NUMBER,
            "grad_norm": MAYBE,
            "seconds": _documented(NUMBER, "Of the step; with status completed, of the run."),
            "samples": COUNT,
            "epoch": COUNT,
            "memory_gb": MAYBE,
            "extra": _NUMBERS,
            "curve": _CURVE,
            "regularisation_steps": _documented(
                {"type": "array", "items": COUNT},
                "Steps of the curve on regularization data alone, whose loss is the distance from the base model.",
            ),
            "outputs": {"type": "object", "additionalProperties": TEXT},
            "commands": {"type": "array", "items": TEXT},
            "exit_code": {"type": "integer"},
        },
    ),
    "training.checkpoint": _data(
        "A checkpoint is complete on the disk. Always arrives.",
        {
            "step": COUNT,
            "checkpoint": _data(
                "",
                {"path": TEXT, "label": TEXT, "step": COUNT},
                {"eval_loss": _documented(NUMBER, "Of the best one so far, which a better one replaces.")},
            ),
        },
    ),
    "training.evaluation": _data(
        "Loss on held-out images.",
        {"step": COUNT, "losses": _NUMBERS, "pooled": NUMBER},
        {
            "per_quantile": _QUANTILES,
            "seconds": NUMBER,
            "reference": _documented(MAYBE, "pooled, of the base model."),
            "reference_per_quantile": _QUANTILES,
        },
    ),
    "training.loss_by_sigma": _data(
        "Training loss of the last steps by noise level.",
        {
            "step": COUNT,
            "first_step": COUNT,
            "bins": _documented(_ROWS, "[lowest sigma, highest sigma, mean loss, samples]"),
        },
    ),
    "validation.image": _data("Validation images. Always arrives.", {"step": COUNT, "pictures": _IMAGES}),
    "validation.preview": _data(
        "A validation image that is still being generated.",
        {
            "step": COUNT,
            "step_label": _documented(TEXT, "5/20: five of twenty denoising steps are taken."),
            "sampling_step": COUNT,
            "num_sampling_steps": COUNT,
            "sigma": _documented(NUMBER, "Share of noise that is left, 1 to 0."),
            "timestep": _documented(NUMBER, "1000 sigma."),
            "prompt": TEXT,
            "resolution": TEXT,
            "pictures": _IMAGES,
        },
    ),
    "validation.score": _data(
        "How well images fit their prompts.", {"step": COUNT, "metric": TEXT, "scores": _NUMBERS, "mean": NUMBER}
    ),
    "notification": _data("A line that did not stop the run.", {"severity": {"enum": list(SEVERITIES)}}),
    "error": _data(
        "The run ended early. Always arrives.",
        {"status": {"const": "failed"}, "step": COUNT, "exit_code": {"type": "integer"}},
    ),
}
