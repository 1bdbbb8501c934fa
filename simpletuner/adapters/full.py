"""Full fine-tuning behind the adapter's interface: every parameter of the denoiser trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from simpletuner.activation_memory.linears import use_recomputing_linears
from simpletuner.adapters.base import Adapter, MatchCount
from simpletuner.adapters.metadata import modelspec_metadata
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec
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
        use_recomputing_linears(denoiser.modules())
        self.denoiser = denoiser
        self.spec = spec
        self._parts: Mapping[str, nn.Parameter] | None = None
        count = sum(1 for _ in denoiser.parameters())
        super().__init__([MatchCount("all parameters", type(denoiser).__name__, count)])

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Of the whole denoiser; where it is spread over processes, the parts that this one holds."""
        return dict(self.denoiser.named_parameters() if self._parts is None else self._parts)

    def use_parts(self, parts: Mapping[str, nn.Parameter]) -> None:
        """Train `parts`, which share memory with the parameters of a denoiser that was spread over processes."""
        self._parts = parts

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
        """Write the denoiser's weights to `path`, and its `config.json` beside it, as diffusers loads them.

        Args:
            state: needed where the denoiser is spread over processes: its whole weights.
        """
        metadata = modelspec_metadata(self.spec) | dict(extra_metadata)
        tensors = {
            name: (state or {}).get(name, own).detach().to("cpu", own.dtype).contiguous()
            for name, own in self.denoiser.state_dict().items()
        }
        save_tensors(path, tensors, metadata)
        save_config = getattr(self.denoiser, "save_config", None)
        if save_config is not None:
            save_config(path.parent)
