"""Proof that a written adapter file is what was trained: read it back onto fresh weights and compare outputs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn

from simpletuner.adapters.assistant import without_assistant
from simpletuner.adapters.files import check_saved_adapter
from simpletuner.batch import Batch
from simpletuner.models.family import ModelFamily
from simpletuner.precision.linear import exact_activations
from simpletuner.precision.mixed import exact_float32
from simpletuner.precision.quantize import copy_unpacked
from simpletuner.randomness import keyed_generator
from simpletuner.training.divergence import require_finite
from simpletuner.training.prompts import PROBE_PROMPT
from simpletuner.training.run import Model, Run, Session

# Largest relative difference by dtype: a layer plus its adapter rounds otherwise than the merged layer.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
PROBE_TOKENS = 4


class LiveOutput(NamedTuple):
    """What live weights make of the probe, on the CPU: (1, C, h, w) with the adapter, and without."""

    adapted: Tensor
    base: Tensor


def live_output(run: Run) -> LiveOutput:
    """The probe through the live weights. All processes take part.

    Raises:
        DivergedError: it is not finite.
    """
    model = run.model
    was_training = model.denoiser.training
    model.denoiser.eval()
    # As in training, for adapters in float32 may sit on a base in half precision; what is float32 throughout is
    # compared in float32, whatever training computes in, and without the TF32 of GPUs.
    products = nullcontext() if probe_dtype(model) == torch.float32 else run.autocast()
    # A file is proved on plain weights, which quantize no activations; and the assistant is in no file.
    comparable = exact_activations(model.denoiser)
    with exact_float32(), products, comparable, without_assistant(model.denoiser):
        adapted = probe_output(model.family, model.denoiser).cpu()
        with model.adapter.disabled():
            base = probe_output(model.family, model.denoiser).cpu()
    model.denoiser.train(was_training)
    require_finite(run, "outputs of the trained model", {"output": adapted})
    return LiveOutput(adapted, base)


def probe_dtype(model: Model) -> torch.dtype:
    """The coarsest number format of base and adapter: how alike two outputs can be."""
    return min((model.family.dtype, *(each.dtype for each in model.trainable)), key=lambda dtype: -TOLERANCE[dtype])


def prove_adapter(model: Model, session: Session, path: Path, reference: LiveOutput) -> None:
    """Reload an adapter file through its public loader onto freshly loaded base weights; outputs must be equal.

    Args:
        reference: `live_output`.

    Where the machine has no memory for a second copy of the model, that is said instead.

    Raises:
        DataError: the file is not what was trained.
    """
    size = sum(each.numel() * each.element_size() for each in model.family.empty_denoiser().parameters())
    if psutil.virtual_memory().available < 1.5 * size:
        session.warn(f"{path.name} was not checked on a fresh model: that takes {size / 2**30:.1f} GiB")
        return
    family = type(model.family)(model.family.spec, model.family.source, torch.device("cpu"), model.family.dtype)
    family.prompts = model.family.prompts
    fresh = family.load_denoiser()
    copy_unpacked(model.denoiser, fresh)  # public loaders know no packed weights; these are what was computed with
    check_saved_adapter(
        path,
        fresh,
        family.spec,
        lambda denoiser: probe_output(family, denoiser),
        reference.adapted,
        TOLERANCE[probe_dtype(model)],
        reference.base,
    )


def probe_output(family: ModelFamily, denoiser: nn.Module) -> Tensor:
    """The denoiser's output on one fixed, small input: (1, C, h, w)."""
    side = PROBE_TOKENS * family.spec.patch_size
    shape = (1, family.spec.latent_channels, side, side)
    latents = torch.randn(shape, generator=keyed_generator("probe"))
    batch = Batch(
        latents=latents,
        prompt_embeds=family.prompts.embeds([PROBE_PROMPT]),
        slots=[0],
        digests=[""],
        loss_weights=torch.ones(1),
        dataset_id="",
    )
    sigmas = torch.full((1,), 0.5, device=family.device)
    with torch.no_grad():
        return family.predict(denoiser, latents.to(family.device), sigmas, family.collate(batch))
