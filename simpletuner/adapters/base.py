"""The interface of everything that can be trained, so that the training loop treats adapters and full tuning alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.adapters.weights import AdapterWeights
from simpletuner.errors import ConfigError, DataError, Problem, shape_text
from simpletuner.precision.mixed import forget_casts

# The adapter is a registered child of the denoiser under this name: outside of it, DDP raises and the gradients of
# FSDP differ by rank.
ADAPTER_CHILD = "adapter"


@dataclass(frozen=True)
class MatchCount:
    """How many layers one entry of an adapter's configuration adapts.

    Args:
        entry: as the user wrote it (`FeedForward`).
        class_name: the class or classes it means in this denoiser (`OmniGenFeedForward`).
        modules: adapted layers.
    """

    entry: str
    class_name: str
    modules: int


class Adapter(ABC):
    """What is trained on top of, or instead of, a frozen denoiser.

    Args:
        report: how many layers each entry of the configuration adapts.
    """

    file_name: str  # of the weights inside a checkpoint or an output folder
    can_be_disabled: bool = True  # whether the base is still there to compute with
    # Whether `save` writes every trained parameter under its own name, bit for bit: a resume then reads it from there.
    file_is_exact: bool = True

    def __init__(self, report: list[MatchCount]):
        self.report = report
        self.kernel_choice: dict[str, bool] = {}  # by shape, whether kernels of a library compute in place of ours
        self.notices: list[str] = []  # what a person should know of how it was attached

    @abstractmethod
    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; names and order are the same in every run with the same configuration."""

    def all_parameters(self) -> list[nn.Parameter]:
        """Every parameter that the adapter added to the denoiser, trained or not."""
        return list(self.trainable_parameters().values())

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """Inside the context the denoiser computes exactly what the base computes."""

    def scaled(self, strength: float) -> AbstractContextManager[None]:
        """Inside the context the adapter adds `strength` times what it was trained to add.

        Raises:
            ConfigError: this kind of adapter cannot be scaled.
        """
        message = "this kind of adapter cannot be scaled"
        raise ConfigError(Problem(message, key="validation_lycoris_strength", allowed="only 1", fix="remove the key"))

    @abstractmethod
    def save(self, path: Path, extra_metadata: Mapping[str, str], state: Mapping[str, Tensor] | None = None) -> None:
        """Write the weights as safetensors to `path`; committing the file is the caller's task.

        Args:
            extra_metadata: added to the file's own metadata; its values win.
            state: values to write in place of the live parameters, by their names: the EMA. The live parameters are
                the same before and after.
        """

    def read_by(self) -> str | None:
        """Which other programs read the file that `save` writes, in one line; None where that is a whole model."""
        return None

    def choose_kernels(self, device: torch.device, dtype: torch.dtype, known: Mapping[str, bool]) -> list[str]:
        """Try what computes this adapter fastest on a device; returns lines that say what was chosen.

        Args:
            dtype: of the activations.
            known: what an earlier start chose, as `kernel_choice`; only what it does not name is tried.
        """
        return []

    def start_from(self, weights: AdapterWeights, file: str) -> list[str]:
        """Begin with the weights of an adapter file, whatever its format was.

        Args:
            file: its path, for messages.

        Returns:
            paths of adapted layers that the file does not contain.

        Raises:
            DataError: the file is of another algorithm or size, or adapts layers that are not trained here.
        """
        raise DataError(Problem("there is no adapter to start from a file", key="init_lora", file=file))

    def state_dict(self) -> dict[str, Tensor]:
        """The trained parameters, detached, sharing memory with the live ones."""
        return {name: parameter.detach() for name, parameter in self.trainable_parameters().items()}

    def state_to_save(self) -> dict[str, Tensor]:
        """`state_dict`, and what else this process holds a part of: all that `save` needs of a spread denoiser."""
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the live parameters, bit for bit where the dtype is the same.

        Raises:
            DataError: names or shapes are not those of this adapter.
        """
        copy_into(self.trainable_parameters(), state)


def copy_into(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters of the same names and shapes; DataError otherwise, before anything is changed."""
    problems = [Problem(f"there is no weight for {name}") for name in parameters if name not in state]
    problems += [Problem(f"the weight {name} belongs to no trained parameter") for name in state.keys() - parameters]
    problems += [
        Problem(
            f"the weight {name} has shape {shape_text(state[name].shape)}; the parameter {shape_text(parameter.shape)}"
        )
        for name, parameter in parameters.items()
        if name in state and state[name].shape != parameter.shape
    ]
    if problems:
        raise DataError(problems)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    forget_casts()


@contextmanager
def values_replaced(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside the context the parameters hold `state`; afterwards they hold their own values again, bit for bit."""
    if state is None:
        yield
        return
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        copy_into(parameters, state)
        yield
    finally:
        copy_into(parameters, kept)
