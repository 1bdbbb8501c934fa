"""Number formats: what the denoiser computes in, and how its frozen weights are stored."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, Text

QUANTISATION = "quantised base models are not built yet; use no_change"
QUANTISED_PRECISIONS = (
    *("int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "fp8uz-quanto", "nf4-bnb"),
    *("int8-torchao", "int4-torchao", "fp8-torchao", "fp8wo-torchao", "int8dq-torchao"),
)

Precision = Literal[
    "no_change",
    "int8-quanto",
    "int4-quanto",
    "int2-quanto",
    "fp8-quanto",
    "fp8uz-quanto",
    "nf4-bnb",
    "int8-torchao",
    "int4-torchao",
    "fp8-torchao",
    "fp8wo-torchao",
    "int8dq-torchao",
]


class PrecisionOptions(OptionGroup):
    """Precision"""

    mixed_precision: Literal["bf16", "no", "fp16", "fp8"] = option(
        "bf16",
        help="Number format of the denoiser's weights and activations: `bf16`, or `no` for float32 (slower, twice the "
        "memory). `adamw_bf16` rounds stochastically in bf16.",
        level="basic",
        planned_values={"fp16": "float16 needs loss scaling, which is not built", "fp8": "fp8 training is not built"},
    )
    base_model_precision: Precision = option(
        "no_change",
        help="Store the frozen base model quantised, to save memory.",
        planned_values=dict.fromkeys(QUANTISED_PRECISIONS, QUANTISATION),
    )
    quantize_via: Literal["cpu", "accelerator", "pipeline"] | None = option(
        None, help="Where the base model is quantised.", planned=QUANTISATION
    )
    quantize_activations: Bool = option(False, help="Quantise activations too.", planned=QUANTISATION)
    base_model_default_dtype: Text | None = option(
        None, help="Number format of what is not quantised.", planned=QUANTISATION
    )
    text_encoder_1_precision: Text = option(
        "no_change",
        help="Quantise the first text encoder.",
        planned="text encoders are freed before training",
        neutral=("no_change",),
    )
    vae_dtype: Literal["fp32", "bf16", "fp16"] = option(
        "fp32",
        help="Number format of the VAE.",
        planned="the VAE always works in float32: half precision adds noise to the latents",
    )
    dynamo_backend: Text = option(
        "no", help="Compile the denoiser with torch.compile.", planned="torch.compile is not built", neutral=("no",)
    )
