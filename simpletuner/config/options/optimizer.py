"""Optimizer, learning rate and gradient clipping."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Arguments, Bool, Float, Int, read_words

# Known from elsewhere, and why they are refused: each with the nearest that acts.
REFUSED_OPTIMIZERS = {
    "adamw_schedulefree+aggressive": "schedulefree has no such mode; use adamw_schedulefree",
    "adamw_schedulefree+no_kahan": "schedulefree keeps no Kahan sum; use adamw_schedulefree",
    "torch-sparseadam": "it takes sparse gradients, which no layer here makes; use torch-adam",
    "dadaptation": "its package is no longer maintained; use prodigy, which follows from it",
    "deepspeed-adamw": "it is DeepSpeed's own; use adamw_bf16",
    "sdnq-adamw": "it needs another quantization library; use ao-adamw8bit",
    "sdnq-adafactor": "it needs another quantization library; use adafactor",
    "sdnq-came": "it needs another quantization library; use came",
    "sdnq-lion": "it needs another quantization library; use bnb-lion8bit",
    "sdnq-muon": "it needs another quantization library; use muon",
}

OptimizerName = Literal[
    "adamw_bf16",
    "adamw",
    "torch-adamw",
    "torch-adam",
    "torch-sgd",
    "torch-radam",
    "torch-nadam",
    "torch-rmsprop",
    "torch-adagrad",
    "torch-adadelta",
    "torch-adafactor",
    "torch-adamax",
    "torch-asgd",
    "ao-adamw8bit",
    "ao-adamw4bit",
    "ao-adamwfp8",
    "ao-adamfp8",
    "optimi-stableadamw",
    "optimi-adamw",
    "optimi-adam",
    "optimi-lion",
    "optimi-radam",
    "optimi-ranger",
    "optimi-adan",
    "optimi-sgd",
    "bnb-adagrad",
    "bnb-adagrad8bit",
    "bnb-adam",
    "bnb-adam-paged",
    "bnb-adam8bit",
    "bnb-adam8bit-paged",
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
    "adamw_schedulefree",
    "prodigy",
    "soap",
    "muon",
    "came",
    "adafactor",
]
RefusedOptimizer = Literal[
    "adamw_schedulefree+aggressive",
    "adamw_schedulefree+no_kahan",
    "torch-sparseadam",
    "dadaptation",
    "deepspeed-adamw",
    "sdnq-adamw",
    "sdnq-adafactor",
    "sdnq-came",
    "sdnq-lion",
    "sdnq-muon",
]


class OptimizerOptions(OptionGroup):
    """Optimizer and schedule"""

    optimizer: OptimizerName | RefusedOptimizer = option(
        "adamw_bf16",
        help="`adamw_bf16` is AdamW that rounds bf16 weights stochastically; `bnb-lion8bit-paged` takes the least "
        "memory. OPTIMIZERS.md says what each is and needs.",
        level="basic",
        planned_values=REFUSED_OPTIMIZERS,
    )
    optimizer_config: Arguments | None = option(
        None,
        takes="object, or text such as weight_decay=0.1,eps=1e-8",
        help='Further arguments of the optimizer: "name=value,name=value", or an object.',
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
    lr_end: Float = option(
        4e-7, help="Learning rate at the end of `polynomial` and other falling schedules.", ge=0, le=10
    )
    lr_power: Float = option(0.8, help="Exponent of `polynomial`.", gt=0, le=100)
    lr_num_cycles: Int = option(1, help="Number of waves of `cosine_with_restarts` and `sine`.", ge=1)
    lr_scale: Bool = option(
        False,
        help="Multiply the learning rate by the number of images of an optimizer step: `train_batch_size` times "
        "`gradient_accumulation_steps` times the number of processes.",
    )
    lr_scale_sqrt: Bool = option(False, help="With `lr_scale`: multiply by the square root of that number instead.")
    trainable_modules: Annotated[tuple[str, ...], BeforeValidator(read_words)] = option(
        (),
        takes="list of texts, or text with commas",
        help="With `model_type` full: only weights train whose names hold one of these texts, such as `attn.to_q`; "
        "`.` is in the names of all. Unset: all weights.",
    )
    trainable_modules_low_learning_rate: Annotated[tuple[str, ...], BeforeValidator(read_words)] = option(
        (),
        takes="list of texts, or text with commas",
        help="With `model_type` full: weights with these texts in their names train too, at half of `learning_rate`; "
        "`trainable_modules` wins.",
    )
    text_encoder_lr: Float | None = option(
        None, help="Learning rate of the text encoder.", planned="text encoders are not trained"
    )
    adam_beta1: Float | None = option(
        None, help="Decay of the first moment. Unset: the optimizer's own, 0.9 for AdamW.", ge=0, lt=1
    )
    adam_beta2: Float | None = option(
        None, help="Decay of the second moment. Unset: the optimizer's own, 0.999 for AdamW.", ge=0, lt=1
    )
    adam_weight_decay: Float | None = option(
        None, help="Weight decay. Unset: the optimizer's own, 0.01 for AdamW.", ge=0, le=1000
    )
    adam_epsilon: Float | None = option(
        None,
        help="Term that keeps the denominator above zero. Unset: the optimizer's own, 1e-8 for AdamW.",
        gt=0,
        le=1,
    )
    max_grad_norm: Float = option(
        2.0,
        help="Limit of `grad_clip_method`; 0 turns clipping off.",
        ge=0,
    )
    grad_clip_method: Literal["value", "norm"] = option(
        "value", help="`value` clamps each gradient element to `max_grad_norm`, `norm` scales the gradient as a whole."
    )
