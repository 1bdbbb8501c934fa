"""Full fine-tuning behind the adapter's interface: the parameters of the denoiser train, all or chosen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from simpletuner.activation_memory.linears import follow_input_dtype
from simpletuner.adapters.base import Adapter, MatchCount
from simpletuner.adapters.metadata import modelspec_metadata
from simpletuner.config.trained_parts import rates_of, unmatched
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.storage import save_tensors


class FullAdapter(Adapter):
    """The denoiser itself.

    Args:
        denoiser: in the dtype in which it trains.
        spec: for the metadata of the saved file.
        modules: `trainable_modules`; without any, all parameters train.
        low_modules: `trainable_modules_low_learning_rate`.

    Raises:
        ConfigError: a text that is in no parameter's name.
    """

    can_be_disabled = False
    # The name that diffusers' `from_pretrained` looks for beside a config.json.
    file_name = "diffusion_pytorch_model.safetensors"

    def __init__(
        self, denoiser: nn.Module, spec: FamilySpec, modules: Sequence[str] = (), low_modules: Sequence[str] = ()
    ):
        names = [name for name, _ in denoiser.named_parameters()]
        if problems := list(unmatched(names, modules, low_modules)):
            raise ConfigError(problems)
        self.rates = rates_of(names, modules, low_modules)
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(name in self.rates)
        follow_input_dtype(denoiser.modules())
        self.denoiser = denoiser
        self.spec = spec
        self._parts: Mapping[str, nn.Parameter] | None = None
        self._frozen_parts: Mapping[str, Tensor] = {}
        kind = type(denoiser).__name__
        counts = [MatchCount(text, kind, sum(text in name for name in self.rates)) for text in (*modules, *low_modules)]
        super().__init__(counts or [MatchCount("all parameters", kind, len(names))])

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Of the denoiser; where it is spread over processes, the parts that this one holds."""
        if self._parts is not None:
            return dict(self._parts)
        return {name: parameter for name, parameter in self.denoiser.named_parameters() if name in self.rates}

    def use_parts(self, parts: Mapping[str, nn.Parameter], frozen: Mapping[str, Tensor]) -> None:
        """Train `parts`, which share memory with the parameters of a denoiser that was spread over processes.

        Args:
            frozen: what this process holds of the other parameters.
        """
        self._parts, self._frozen_parts = parts, frozen

    def state_to_save(self) -> dict[str, Tensor]:
        return {**self.state_dict(), **self._frozen_parts}

    def disabled(self) -> AbstractContextManager[None]:
        """Always raises: nothing of the base is left to compute with.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            Problem(
                "prior preservation takes its target from the base model, which full fine-tuning overwrites",
                key="is_regularisation_data",
                allowed="regularization datasets with model_type lora",
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
