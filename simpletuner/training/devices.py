"""Which device and number formats a run uses."""

from __future__ import annotations

import torch

from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options import TrainConfig
from simpletuner.precision.mixed import DTYPES
from simpletuner.precision.quantise import NumberFormats


def pick_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """Dtype of the denoiser's weights.

    Full training with an optimizer that neither rounds stochastically nor keeps what is lost keeps float32 weights and
    computes in `mixed_precision`: in bfloat16 its updates would vanish. float16 never holds weights that train.
    """
    if config.mixed_precision == "no" or config.base_model_default_dtype == "fp32":
        return torch.float32
    if config.model_type == "full" and (
        config.mixed_precision == "fp16" or not OPTIMIZERS[config.optimizer].bf16_weights
    ):
        return torch.float32
    return DTYPES[config.mixed_precision]


def swaps_blocks(config: TrainConfig) -> bool:
    """Whether frozen weights of some blocks wait in main memory."""
    return bool(config.enable_group_offload or config.musubi_blocks_to_swap)


def number_formats(config: TrainConfig) -> NumberFormats:
    """How the frozen weights of denoiser and text encoders are stored."""
    return NumberFormats(
        base=config.base_model_precision,
        # What is swapped out lies in main memory from the start, so the device never holds the whole model.
        packs_on_device=config.quantize_via != "cpu" and not swaps_blocks(config),
        encoders=(
            config.text_encoder_1_precision,
            config.text_encoder_2_precision,
            config.text_encoder_3_precision,
            config.text_encoder_4_precision,
        ),
    )


def adapter_dtype(config: TrainConfig) -> torch.dtype:
    """Dtype of an adapter's weights: bfloat16 only with `adamw_bf16`, else float32, for an adapter is small."""
    if config.mixed_precision == "bf16" and config.optimizer == "adamw_bf16":
        return torch.bfloat16
    return torch.float32
