"""Optimizer, learning rate and gradient clipping."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Arguments, Bool, Float, Int

NOT_BUILT = "this optimizer is not built yet; adamw_bf16 and torch-adamw are"

BuiltOptimizer = Literal["adamw_bf16", "adamw", "torch-adamw"]
OtherOptimizer = Literal[
    "adamw_schedulefree",
    "adamw_schedulefree+aggressive",
    "adamw_schedulefree+no_kahan",
    "torch-adam",
    "torch-sgd",
    "torch-radam",
    "torch-nadam",
    "torch-rmsprop",
    "torch-adagrad",
    "torch-adadelta",
    "torch-adafactor",
    "ao-adamw8bit",
    "ao-adamw4bit",
    "ao-adamfp8",
    "ao-adamwfp8",
    "optimi-stableadamw",
    "optimi-adamw",
    "optimi-lion",
    "optimi-radam",
    "optimi-ranger",
    "optimi-adan",
    "optimi-adam",
    "optimi-sgd",
    "soap",
    "muon",
    "prodigy",
    "dadaptation",
    "bnb-adagrad",
    "bnb-adagrad8bit",
    "bnb-adam",
    "bnb-adam8bit",
    "bnb-adamw",
    "bnb-adamw-paged",
    "bnb-adamw8bit",
    "bnb-adamw8bit-paged",
    "bnb-lion",
    "bnb-lion-paged",
    "bnb-lion8bit",
    "bnb-lion8bit-paged",
    "bnb-ademamix",
    "bnb-ademamix-paged",
    "bnb-ademamix8bit",
    "bnb-ademamix8bit-paged",
    "deepspeed-adamw",
]


class OptimizerOptions(OptionGroup):
    """Optimizer and schedule"""

    optimizer: BuiltOptimizer | OtherOptimizer = option(
        "adamw_bf16",
        help="`adamw_bf16` is AdamW that rounds bf16 weights stochastically; `adamw` (also `torch-adamw`) is torch's.",
        level="basic",
        planned_values=dict.fromkeys(OtherOptimizer.__args__, NOT_BUILT),  # type: ignore[attr-defined]
    )
    optimizer_config: Arguments | None = option(
        None, help='Further arguments of the optimizer: "name=value,name=value", or an object.'
    )
    learning_rate: Float = option(
        1e-4, help="Highest learning rate. LoKr with AdamW: 1e-4 or less.", gt=0, le=10, level="basic"
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"
    ] = option(
        "constant",
        help="Course of the learning rate after warm-up. `constant` with `lr_warmup_steps` above 0 warms up too.",
        level="basic",
    )
    lr_warmup_steps: Int = option(
        0, help="Steps over which the learning rate rises from 0.", unit="optimizer steps", ge=0, level="basic"
    )
    lr_end: Float = option(4e-7, help="Learning rate at the end of `polynomial` and other falling schedules.", ge=0)
    lr_power: Float = option(0.8, help="Exponent of `polynomial`.", gt=0)
    lr_num_cycles: Int = option(1, help="Number of waves of `cosine_with_restarts` and `sine`.", ge=1)
    lr_scale: Bool = option(
        False, help="Multiply the learning rate by the effective batch size.", planned="set learning_rate itself"
    )
    lr_scale_sqrt: Bool = option(
        False, help="Multiply by the root of the effective batch size.", planned="set learning_rate itself"
    )
    text_encoder_lr: Float | None = option(
        None, help="Learning rate of the text encoder.", planned="text encoders are not trained"
    )
    adam_beta1: Float = option(0.9, help="Decay of the first moment.", ge=0, lt=1)
    adam_beta2: Float = option(0.999, help="Decay of the second moment.", ge=0, lt=1)
    adam_weight_decay: Float = option(0.01, help="Decoupled weight decay.", ge=0)
    adam_epsilon: Float = option(1e-8, help="Term that keeps the denominator above zero.", gt=0)
    max_grad_norm: Float = option(
        2.0,
        help="Limit of `grad_clip_method`; 0 turns clipping off.",
        ge=0,
    )
    grad_clip_method: Literal["value", "norm"] = option(
        "value", help="`value` clamps each gradient element to `max_grad_norm`, `norm` scales the gradient as a whole."
    )
