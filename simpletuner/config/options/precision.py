"""Number formats: what the denoiser computes in, and how its frozen weights are stored."""

from __future__ import annotations

from typing import Any, Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool

NO_4_BIT_PRODUCTS = "weights in 4 bits are unpacked for their products; use int4-torchao, or int8dq-torchao"
NOT_IN_ENCODERS = "encoders run once for a caption, and their error would stay in the cache; use int8-torchao"
PIPELINE = "layers are packed one at a time, on cpu or accelerator; use accelerator"
FLOAT8_PRODUCTS = "use base_model_precision fp8-torchao with quantize_activations"

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
    "int8dq-int4-torchao",
    "fp8-int4-torchao",
    "fp8-native",
    "fp8-transformerengine",
    "int8-sdnq",
    "uint8-sdnq",
    "int16-sdnq",
    "uint16-sdnq",
    "fp16-sdnq",
    "fp8-sdnq",
    "int6-sdnq",
    "int5-sdnq",
    "uint5-sdnq",
    "uint4-sdnq",
    "uint3-sdnq",
    "uint2-sdnq",
]
# Formats that other trainers know, and why they are refused.
REFUSED = {
    **dict.fromkeys(("int8dq-int4-torchao", "fp8-int4-torchao"), NO_4_BIT_PRODUCTS),
    **dict.fromkeys(
        ("fp8-native", "fp8-transformerengine"),
        "its layers are not built; use fp8-torchao, with quantize_activations for products in float8",
    ),
    **dict.fromkeys(
        ("int8-sdnq", "uint8-sdnq", "int16-sdnq", "uint16-sdnq", "fp16-sdnq", "int6-sdnq", "int5-sdnq", "uint5-sdnq"),
        "it needs another quantization library; use int8-quanto",
    ),
    "fp8-sdnq": "it needs another quantization library; use fp8-quanto",
    **dict.fromkeys(
        ("uint4-sdnq", "uint3-sdnq", "uint2-sdnq"), "it needs another quantization library; use int4-quanto"
    ),
}


def _encoder_precision(number: int) -> Any:
    return option(
        "no_change",
        help=f"Number format of the linear layers of the family's text encoder {number}.",
        planned_values={**REFUSED, "int8dq-torchao": NOT_IN_ENCODERS},
    )


class PrecisionOptions(OptionGroup):
    """Precision"""

    mixed_precision: Literal["bf16", "no", "fp16", "fp8"] = option(
        "bf16",
        help="Number format of products and frozen weights: `bf16`; `fp16` for cards without bf16, with a scaled loss; "
        "`no` is float32 (slower, twice the memory). `adamw_bf16` rounds stochastically in bf16.",
        level="basic",
        planned_values={"fp8": f"weights that train stay in 16 bits; for the frozen ones {FLOAT8_PRODUCTS}"},
    )
    base_model_precision: Precision = option(
        "no_change",
        help="Number format of the frozen base model: the linear layers of its blocks are packed, an adapter trains "
        "beside them. `int8-quanto` halves the memory of bf16 and changes little; 4 bits take a quarter.",
        level="basic",
        planned_values=REFUSED,
    )
    quantize_via: Literal["cpu", "accelerator", "pipeline"] | None = option(
        None,
        help="Where layers are packed, one at a time: on the `accelerator` (faster, and the default), or on the `cpu`.",
        planned_values={"pipeline": PIPELINE},
    )
    quantize_activations: Bool = option(
        False,
        help="Quantize the inputs of the packed layers too, with one scale per token, and multiply in 8 bits: on a GPU "
        "where a trial at the start finds it faster, on a CPU always. The error is larger. Goes with "
        "`base_model_precision` in int8 or fp8; `int8dq-torchao` means `int8-torchao` with it.",
    )
    base_model_default_dtype: Literal["bf16", "fp32"] | None = option(
        None,
        help="Number format of frozen weights that are not packed, and from which packing starts. Unset: that of "
        "`mixed_precision`.",
    )
    text_encoder_1_precision: Precision = _encoder_precision(1)
    text_encoder_2_precision: Precision = _encoder_precision(2)
    text_encoder_3_precision: Precision = _encoder_precision(3)
    text_encoder_4_precision: Precision = _encoder_precision(4)
    text_encoder_offload: Bool = option(
        False,
        help="Keep the layers of text encoders in main memory; each is on the device only while it computes. Encoding "
        "then takes the memory of one layer, and the time of moving all of them for each caption.",
    )
    vae_dtype: Literal["fp32", "bf16", "fp16"] = option(
        "fp32",
        help="Number format of the VAE.",
        planned="the VAE always works in float32: half precision adds noise to the latents",
    )
    disable_tf32: Bool = option(
        False,
        help="Compute float32 products of the model exactly on NVIDIA GPUs. Otherwise their inputs are rounded to TF32 "
        "(10 bits), several times faster. Cached latents and the check of saved adapters are exact either way.",
    )
    deterministic: Bool = option(
        False,
        help="Use only kernels that give the same bits each time: on a GPU two runs, and a run that was resumed, are "
        "then equal bit for bit. Costs speed; on a CPU runs are equal without it.",
    )
    dynamo_backend: Literal["no", "inductor", "eager", "aot_eager", "cudagraphs"] = option(
        "no",
        help="Compile the repeated blocks with torch.compile; `inductor` makes kernels and needs triton (GPU) or a C++ "
        "compiler. The first step of each kind of batch takes longer.",
        planned_values={
            "cudagraphs": "checkpointing and changing image sizes do not fit recorded graphs; use inductor"
        },
    )
