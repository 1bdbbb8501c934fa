"""What is known of each optimizer without importing it: where it lives, what it takes, what it asks of a run.

One row each. The checks, the command line's list, the page OPTIMIZERS.md and `optim/optimizers.py` follow from it; a
test compares every row with the class that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Number formats of an optimizer's state, for people who choose by memory.
FP32, BF16, EIGHT_BIT, FOUR_BIT = "float32", "as the weights", "8 bit", "4 bit"


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer.

    Args:
        target: `package.module:Class`.
        notes: what a user should know, one line.
        arguments: what `optimizer_config` may set -> the class's own default.
        defaults: arguments that differ from the class's own defaults here; the configuration wins over them.
        state: how many numbers it keeps for each weight, and how.
        bf16_weights: its updates do not vanish in bfloat16 weights, so full training needs no float32 copy.
        has_seed: takes `seed`, for rounding of its own.
        averages: keeps training weights and averaged ones apart (schedule-free); the averaged ones are the result.
        tunes_lr: finds the learning rate itself; `learning_rate` multiplies it.
        matrix_only: updates matrices only; the rest goes to an AdamW inside it.
        elementwise: moves each number of a weight by itself, so that processes can each move a part of the weight.
        compiles: compiles its step with torch.compile, which needs a C++ compiler or triton.
    """

    target: str
    notes: str
    arguments: Mapping[str, Any]
    state: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    bf16_weights: bool = False
    has_seed: bool = False
    averages: bool = False
    tunes_lr: bool = False
    matrix_only: bool = False
    elementwise: bool = True
    compiles: bool = False

    @property
    def betas(self) -> tuple[float | None, ...]:
        """Decays where no option says otherwise; empty where it has none."""
        return tuple(self.defaults.get("betas", self.arguments.get("betas", ())))

    @property
    def has_epsilon(self) -> bool:
        """Whether `adam_epsilon` is a term of it; torch's Adafactor has a pair of its own meaning."""
        return isinstance(self.arguments.get("eps"), float)

    @property
    def has_weight_decay(self) -> bool:
        return "weight_decay" in self.arguments


def _adam(decay: float = 0.0, eps: float = 1e-8, betas: tuple[float, ...] = (0.9, 0.999)) -> dict[str, Any]:
    return {"betas": betas, "eps": eps, "weight_decay": decay}


_FOREACH = {"foreach": None}
_FUSED = {**_FOREACH, "fused": None}

_TORCH: dict[str, OptimizerRow] = {
    "torch-adamw": OptimizerRow(
        "torch.optim:AdamW",
        "torch's AdamW, in one kernel for all weights; `adamw` is the same",
        {**_adam(0.01), "amsgrad": False, **_FUSED},
        f"2, {FP32}",
        {"fused": True},
    ),
    "torch-adam": OptimizerRow(
        "torch.optim:Adam",
        "Adam; its weight decay is added to the gradient",
        {**_adam(), "amsgrad": False, "decoupled_weight_decay": False, **_FUSED},
        f"2, {FP32}",
        {"fused": True},
    ),
    "torch-sgd": OptimizerRow(
        "torch.optim:SGD",
        "plain gradient descent; needs a much higher learning rate",
        {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, **_FUSED},
        "0, or 1 with momentum",
    ),
    "torch-radam": OptimizerRow(
        "torch.optim:RAdam",
        "Adam with built-in warm-up",
        {**_adam(), "decoupled_weight_decay": False, **_FOREACH},
        f"2, {FP32}",
    ),
    "torch-nadam": OptimizerRow(
        "torch.optim:NAdam",
        "Adam with Nesterov's momentum",
        {**_adam(), "momentum_decay": 0.004, "decoupled_weight_decay": False, **_FOREACH},
        f"2, {FP32}",
    ),
    "torch-rmsprop": OptimizerRow(
        "torch.optim:RMSprop",
        "root of the second moment, no first one",
        {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False, **_FOREACH},
        f"1, {FP32}",
    ),
    "torch-adagrad": OptimizerRow(
        "torch.optim:Adagrad",
        "sums all squares, so that its steps shrink",
        {"lr_decay": 0, "weight_decay": 0, "initial_accumulator_value": 0, "eps": 1e-10, **_FUSED},
        f"1, {FP32}",
    ),
    "torch-adadelta": OptimizerRow(
        "torch.optim:Adadelta",
        "scales by the size of earlier steps; a learning rate near 1",
        {"rho": 0.9, "eps": 1e-6, "weight_decay": 0, **_FOREACH},
        f"2, {FP32}",
    ),
    "torch-adafactor": OptimizerRow(
        "torch.optim:Adafactor",
        "steps in proportion to each weight's size: for full training rather than for adapters, which start at 0",
        {"beta2_decay": -0.8, "eps": (None, 0.001), "d": 1.0, "weight_decay": 0.0, **_FOREACH},
        "rows and columns only",
        elementwise=False,
    ),
    "torch-adamax": OptimizerRow(
        "torch.optim:Adamax",
        "Adam with the largest gradient in place of the root",
        {**_adam(), **_FOREACH},
        f"2, {FP32}",
    ),
    "torch-asgd": OptimizerRow(
        "torch.optim:ASGD",
        "descent with a falling rate of its own; the average that it keeps is not used",
        {"lambd": 1e-4, "alpha": 0.75, "t0": 1e6, "weight_decay": 0, **_FOREACH},
        f"1, {FP32}",
    ),
}

_AO = {"amsgrad": False, "block_size": 256, "bf16_stochastic_round": False}
_AO_DEFAULTS = {"bf16_stochastic_round": True}
_TORCHAO: dict[str, OptimizerRow] = {
    "ao-adamw8bit": OptimizerRow(
        "torchao.optim:AdamW8bit",
        "compiles its step once; bf16 weights are rounded stochastically",
        {**_adam(0.01), **_AO},
        f"2, {EIGHT_BIT}",
        _AO_DEFAULTS,
        bf16_weights=True,
        elementwise=False,
        compiles=True,
    ),
    "ao-adamw4bit": OptimizerRow(
        "torchao.optim:AdamW4bit",
        "as ao-adamw8bit, coarser",
        {**_adam(0.01), **_AO, "block_size": 128},
        f"2, {FOUR_BIT}",
        _AO_DEFAULTS,
        bf16_weights=True,
        elementwise=False,
        compiles=True,
    ),
    "ao-adamwfp8": OptimizerRow(
        "torchao.optim:AdamWFp8",
        "as ao-adamw8bit, in float8",
        {**_adam(0.01), **_AO},
        f"2, {EIGHT_BIT}",
        _AO_DEFAULTS,
        bf16_weights=True,
        elementwise=False,
        compiles=True,
    ),
    "ao-adamfp8": OptimizerRow(
        "torchao.optim:AdamFp8",
        "as ao-adamwfp8, with the decay of Adam",
        {**_adam(), **_AO},
        f"2, {EIGHT_BIT}",
        _AO_DEFAULTS,
        bf16_weights=True,
        elementwise=False,
        compiles=True,
    ),
}

_KAHAN = {"decouple_lr": False, "max_lr": None, "kahan_sum": None, "foreach": None, "triton": None}
_PAIR = (0.9, 0.99)


def _optimi(name: str, notes: str, arguments: dict[str, Any], numbers: int) -> OptimizerRow:
    """torch-optimi adds what bfloat16 weights lose to a compensation of their own (Kahan's sum)."""
    state = f"{numbers}, {BF16}; 1 more for bf16 weights"
    # It would find out by itself at its first step, and not know it any more when it is resumed.
    defaults = {"kahan_sum": True}
    takes = {**_KAHAN, **arguments}
    elementwise = name != "StableAdamW"  # which scales by the root mean square of the whole update
    return OptimizerRow(f"optimi:{name}", notes, takes, state, defaults, bf16_weights=True, elementwise=elementwise)


_OPTIMI: dict[str, OptimizerRow] = {
    "optimi-stableadamw": _optimi(
        "StableAdamW", "AdamW that clips each weight's update by itself", _adam(0.01, 1e-6, _PAIR), 2
    ),
    "optimi-adamw": _optimi("AdamW", "AdamW with Kahan's sum for bf16 weights", _adam(0.01, 1e-6, _PAIR), 2),
    "optimi-adam": _optimi(
        "Adam", "Adam with Kahan's sum", {**_adam(0, 1e-6, _PAIR), "decouple_wd": False}, 2
    ),
    "optimi-lion": _optimi(
        "Lion", "only the sign of the momentum; a fifth to a tenth of AdamW's learning rate",
        {"betas": _PAIR, "weight_decay": 0}, 1,
    ),
    "optimi-radam": _optimi(
        "RAdam", "Adam with built-in warm-up", {**_adam(0, 1e-6, _PAIR), "decouple_wd": False}, 2
    ),
    "optimi-ranger": _optimi(
        "Ranger",
        "RAdam with Lookahead every k steps",
        {**_adam(0, 1e-6, _PAIR), "k": 6, "alpha": 0.5, "decouple_wd": True},
        3,
    ),
    "optimi-adan": _optimi(
        "Adan",
        "Nesterov's momentum from the difference of gradients",
        {**_adam(0.02, 1e-6, (0.98, 0.92, 0.99)), "kahan_sum": False},
        4,
    ),
    "optimi-sgd": _optimi(
        "SGD",
        "plain gradient descent; needs a much higher learning rate",
        {"momentum": 0, "weight_decay": 0, "dampening": False, "decouple_wd": False, "torch_init": False},
        1,
    ),
}  # fmt: skip


def _bnb(name: str, notes: str, arguments: dict[str, Any], numbers: int) -> OptimizerRow:
    is_8bit = name.endswith("8bit")
    state = f"{numbers}, {EIGHT_BIT if is_8bit else FP32}{'; moves to main memory' * name.startswith('Paged')}"
    arguments = arguments | {"min_8bit_size": 4096} if is_8bit else arguments
    elementwise = not is_8bit and "AdEMAMix" not in name  # blocks of numbers share a scale; two momenta share a tensor
    return OptimizerRow(f"bitsandbytes.optim:{name}", notes, arguments, state, elementwise=elementwise)


_ADEMAMIX = {**_adam(0.01, 1e-8, (0.9, 0.999, 0.9999)), "alpha": 5.0, "t_alpha": None, "t_beta3": None}
_LION = {"betas": _PAIR, "weight_decay": 0}
_ADAGRAD = {"weight_decay": 0, "eps": 1e-10}
_PAGED = "; its state moves to main memory where the card is full"
_BNB: dict[str, OptimizerRow] = {
    "bnb-adagrad": _bnb("Adagrad", "bitsandbytes' Adagrad", _ADAGRAD, 1),
    "bnb-adagrad8bit": _bnb("Adagrad8bit", "Adagrad with 8-bit state", _ADAGRAD, 1),
    "bnb-adam": _bnb("Adam", "bitsandbytes' Adam", _adam(), 2),
    "bnb-adam-paged": _bnb("PagedAdam", f"Adam{_PAGED}", _adam(), 2),
    "bnb-adam8bit": _bnb("Adam8bit", "Adam with 8-bit state", _adam(), 2),
    "bnb-adam8bit-paged": _bnb("PagedAdam8bit", f"Adam with 8-bit state{_PAGED}", _adam(), 2),
    "bnb-adamw": _bnb("AdamW", "bitsandbytes' AdamW", _adam(0.01), 2),
    "bnb-adamw-paged": _bnb("PagedAdamW", f"AdamW{_PAGED}", _adam(0.01), 2),
    "bnb-adamw8bit": _bnb("AdamW8bit", "AdamW with 8-bit state", _adam(0.01), 2),
    "bnb-adamw8bit-paged": _bnb("PagedAdamW8bit", f"AdamW with 8-bit state{_PAGED}", _adam(0.01), 2),
    "bnb-lion": _bnb("Lion", "only the sign of the momentum; a fifth of AdamW's learning rate", _LION, 1),
    "bnb-lion-paged": _bnb("PagedLion", f"Lion{_PAGED}", _LION, 1),
    "bnb-lion8bit": _bnb("Lion8bit", "Lion with 8-bit state: the least state of all", _LION, 1),
    "bnb-lion8bit-paged": _bnb("PagedLion8bit", f"Lion with 8-bit state{_PAGED}", _LION, 1),
    "bnb-ademamix": _bnb("AdEMAMix", "AdamW with a second, slower momentum", _ADEMAMIX, 3),
    "bnb-ademamix-paged": _bnb("PagedAdEMAMix", f"AdEMAMix{_PAGED}", _ADEMAMIX, 3),
    "bnb-ademamix8bit": _bnb("AdEMAMix8bit", "AdEMAMix with 8-bit state", _ADEMAMIX, 3),
    "bnb-ademamix8bit-paged": _bnb("PagedAdEMAMix8bit", f"AdEMAMix with 8-bit state{_PAGED}", _ADEMAMIX, 3),
}

_OTHERS: dict[str, OptimizerRow] = {
    "adamw_schedulefree": OptimizerRow(
        "schedulefree:AdamWScheduleFree",
        "needs no falling schedule: it averages its own weights, and those are saved, evaluated and generate images",
        {**_adam(), "warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0, "foreach": True},
        f"2, {FP32}",
        {"weight_decay": 0.01},
        averages=True,
    ),
    "prodigy": OptimizerRow(
        "prodigyopt:Prodigy",
        "finds the learning rate itself: set `learning_rate` to 1",
        {
            **_adam(), "beta3": None, "decouple": True, "use_bias_correction": False, "safeguard_warmup": False,
            "d0": 1e-6, "d_coef": 1.0, "growth_rate": float("inf"), "slice_p": 1,
        },
        f"4, {FP32}",
        # What its authors advise for diffusion models.
        {"weight_decay": 0.01, "use_bias_correction": True, "safeguard_warmup": True},
        tunes_lr=True,
        elementwise=False,
    ),
    "soap": OptimizerRow(
        "pytorch_optimizer:SOAP",
        "AdamW in the eigenbasis of Shampoo's preconditioner; the first step only measures",
        {
            **_adam(0.01, 1e-8, (0.95, 0.95)), "shampoo_beta": None, "precondition_frequency": 10,
            "max_precondition_dim": 10000, "merge_dims": False, "precondition_1d": False, "correct_bias": True,
            "normalize_gradient": False,
        },
        f"2, and 2 square matrices per side, {FP32}",
        elementwise=False,
    ),
    "muon": OptimizerRow(
        "pytorch_optimizer:Muon",
        "orthogonal steps for matrices, AdamW for the rest; scaled so that AdamW's learning rates fit",
        {
            "momentum": 0.95, "weight_decay": 0.0, "weight_decouple": True, "nesterov": True, "ns_steps": 5,
            "use_adjusted_lr": False, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-10, "foreach": None,
        },
        f"1, {FP32}",
        {"use_adjusted_lr": True, "weight_decay": 0.01},
        matrix_only=True,
        elementwise=False,
    ),
    "came": OptimizerRow(
        "pytorch_optimizer:CAME",
        "Adafactor that trusts steady gradients more; momentum, and rows and columns",
        {
            "betas": (0.9, 0.999, 0.9999), "weight_decay": 0.0, "weight_decouple": True, "fixed_decay": False,
            "clip_threshold": 1.0, "ams_bound": False, "eps1": 1e-30, "eps2": 1e-16, "foreach": None,
        },
        f"1, {FP32}, rows and columns",
        elementwise=False,
    ),
    "adafactor": OptimizerRow(
        "pytorch_optimizer:AdaFactor",
        "factored second moment without momentum, steps of `learning_rate` as they are: fits adapters too",
        {
            "betas": (0.9, 0.999), "decay_rate": -0.8, "weight_decay": 0.0, "weight_decouple": True,
            "fixed_decay": False, "clip_threshold": 1.0, "ams_bound": False, "scale_parameter": True,
            "relative_step": True, "warmup_init": False, "eps1": 1e-30, "eps2": 0.001, "foreach": None,
        },
        "rows and columns only",
        {"betas": (None, 0.999), "scale_parameter": False, "relative_step": False},
        elementwise=False,
    ),
}  # fmt: skip

_OWN: dict[str, OptimizerRow] = {
    "adamw_bf16": OptimizerRow(
        "simpletuner.optim.adamw_bf16:AdamWBF16",
        "AdamW whose bf16 weights and states are rounded stochastically; plain AdamW for float32 weights",
        _adam(0.01),
        f"2, {BF16}",
        bf16_weights=True,
        has_seed=True,
    )
}

OPTIMIZERS: Mapping[str, OptimizerRow] = {
    **_OWN,
    "adamw": _TORCH["torch-adamw"],
    **_TORCH,
    **_TORCHAO,
    **_OPTIMI,
    **_BNB,
    **_OTHERS,
}
