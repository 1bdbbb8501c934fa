"""Full fine-tuning behind the adapter's interface: every parameter of the denoiser trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from simpletuner.adapters.base import Adapter, MatchCount, values_replaced
from simpletuner.adapters.metadata import modelspec_metadata
from simpletuner.errors import ConfigError, Problem
from simpletuner.models.spec import FamilySpec
from simpletuner.storage import save_tensors


class FullAdapter(Adapter):
    """The denoiser itself.

    Args:
        denoiser: in the dtype in which it trains.
        spec: for the metadata of the saved file.
    """

    can_be_disabled = False
    # The name that diffusers' `from_pretrained` looks for beside a config.json.
    file_name = "diffusion_pytorch_model.safetensors"

    def __init__(self, denoiser: nn.Module, spec: FamilySpec):
        denoiser.requires_grad_(True)
        self.denoiser = denoiser
        self.spec = spec
        count = sum(1 for _ in denoiser.parameters())
        super().__init__([MatchCount("all parameters", type(denoiser).__name__, count)])

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.denoiser.named_parameters())

    def disabled(self) -> AbstractContextManager[None]:
        """Always raises: nothing of the base is left to compute with.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            Problem(
                "prior preservation takes its target from the base model, which full fine-tuning overwrites",
                key="is_regularisation_data",
                allowed="regularisation datasets with model_type lora",
                fix="remove is_regularisation_data from the dataset, or train an adapter",
            )
        )

    def save(self, path: Path, extra_metadata: Mapping[str, str], state: Mapping[str, Tensor] | None = None) -> None:
        """Write the denoiser's weights to `path`, and its `config.json` beside it, as diffusers loads them."""
        metadata = modelspec_metadata(self.spec.name, self.spec.title) | dict(extra_metadata)
        with values_replaced(self.trainable_parameters(), state):
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.denoiser.state_dict().items()}
            save_tensors(path, tensors, metadata)
        save_config = getattr(self.denoiser, "save_config", None)
        if save_config is not None:
            save_config(path.parent)
