"""Which device and number formats a run uses."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options import TrainConfig
from simpletuner.config.options.model import ModelOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.hardware import VISIBLE, hidden_gpus, least_driver, nvidia_driver
from simpletuner.precision.mixed import DTYPES
from simpletuner.precision.quantize import NumberFormats


def pick_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        require_kernels(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
        return device
    if torch.backends.mps.is_available():
        return torch.device("mps")
    require_no_hidden_gpu(os.environ)
    return torch.device("cpu")


def require_no_hidden_gpu(environment: Mapping[str, str]) -> None:
    """Raise where a driver reports GPUs that torch cannot use: the CPU would train, unnoticed, for weeks.

    Raises:
        ConfigError: says what the driver reports and what this torch needs.
    """
    found = hidden_gpus(environment)
    if not found:
        return
    device, name, _ = found[0]
    count = f"{len(found)} x " if len(found) > 1 else ""
    if device == "cuda":
        driver = nvidia_driver() or "unknown"
        needs = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            + (f", which needs driver {least} or newer" if (least := least_driver(torch.version.cuda)) else "")
            if torch.version.cuda
            else f"torch {torch.__version__} is built without CUDA"
        )
        fix = "update the driver, or install the torch of its CUDA version (INSTALL.md, torch for your hardware)"
        message = f"nvidia-smi reports {count}{name} with driver {driver}, and torch sees no GPU: {needs}"
    else:
        message = f"the kernel reports {count}{name}, and torch {torch.__version__} sees no GPU"
        fix = "install torch for ROCm (INSTALL.md, torch for your hardware)"
    variable = VISIBLE[device]
    fix += f"; to train on the CPU anyway, set {variable}= (empty)"
    raise ConfigError(Problem(message, key=variable, fix=fix))


def require_kernels(name: str, capability: tuple[int, int]) -> None:
    """Raise where this torch has no kernels for a GPU that it sees: it would fail at the first product.

    Raises:
        ConfigError: names the GPU and what torch was built for.
    """
    built = [arch.partition("_")[2] for arch in torch.cuda.get_arch_list() if arch.startswith(("sm_", "compute_"))]
    versions = [int(digits.rstrip("af")) for digits in built if digits.rstrip("af").isdigit()]
    if not versions or 10 * capability[0] + capability[1] >= min(versions):
        return
    oldest = f"{min(versions) // 10}.{min(versions) % 10}"
    message = (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} is built for"
    )
    fix = "install a torch of an older CUDA version (INSTALL.md, torch for your hardware)"
    raise ConfigError(Problem(f"{message} {oldest} and newer", key="CUDA_VISIBLE_DEVICES", fix=fix))


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """Dtype of the denoiser's weights.

    Full training with an optimizer that neither rounds stochastically nor keeps what is lost keeps float32 weights and
    computes in `mixed_precision`: in bfloat16 its updates would vanish. float16 never holds weights that train.
    """
    if config.precision.mixed_precision == "no" or config.precision.base_model_default_dtype == "fp32":
        return torch.float32
    if config.model.model_type == "full" and (
        config.precision.mixed_precision == "fp16" or not OPTIMIZERS[config.optimizer.optimizer].bf16_weights
    ):
        return torch.float32
    return DTYPES[config.precision.mixed_precision]


def swaps_blocks(options: ModelOptions) -> bool:
    """Whether frozen weights of some blocks wait in main memory."""
    return bool(options.enable_group_offload or options.musubi_blocks_to_swap)


def number_formats(config: TrainConfig) -> NumberFormats:
    """How the frozen weights of denoiser and text encoders are stored."""
    return NumberFormats(
        base=config.precision.base_model_precision,
        quantizes_activations=config.precision.quantize_activations,
        # What is swapped out lies in main memory from the start, so the device never holds the whole model.
        packs_on_device=config.precision.quantize_via != "cpu" and not swaps_blocks(config.model),
        encoders=(
            config.precision.text_encoder_1_precision,
            config.precision.text_encoder_2_precision,
            config.precision.text_encoder_3_precision,
            config.precision.text_encoder_4_precision,
        ),
        offloads_encoders=config.precision.text_encoder_offload,
    )


def adapter_dtype(config: TrainConfig) -> torch.dtype:
    """Dtype of an adapter's weights: bfloat16 only with `adamw_bf16`, else float32, for an adapter is small."""
    if config.precision.mixed_precision == "bf16" and config.optimizer.optimizer == "adamw_bf16":
        return torch.bfloat16
    return torch.float32
