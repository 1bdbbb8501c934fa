"""DeepSpeed's ZeRO: optimizer state (stage 1), gradients (2) and weights (3) spread over the processes.

DeepSpeed's engine takes the optimizer step, sums and clips gradients itself. The denoiser is still called directly:
the engine's hooks sit on its modules. Checkpoints are the trainer's own, with whole tensors: DeepSpeed's are pickles
that only the same number of processes can read.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.config.deepspeed import OUR_KEYS
from simpletuner.distributed.placement import STATE_SEPARATOR, Replicated
from simpletuner.distributed.process_group import ProcessGroup

# The state's name of the copy that the engine moves, where the weights have fewer bits.
FLOAT32 = "float32"


class Zero(Replicated):
    """Trained weights under DeepSpeed.

    Args:
        parameters: trained parameters by name.
        denoiser: on its device, with its adapter.
        settings: the user's DeepSpeed configuration.
        accumulation: micro-batches of a step.
        max_grad_norm: joint norm to clip to; 0 clips nothing.
        is_adapter: what trains is small enough to be whole for a moment.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        process_group: ProcessGroup,
        denoiser: nn.Module,
        settings: Mapping[str, Any],
        accumulation: int,
        max_grad_norm: float,
        is_adapter: bool,
    ):
        super().__init__(parameters, process_group)
        self.denoiser = denoiser
        self.is_adapter = is_adapter
        self.stage = int(settings["zero_optimization"]["stage"])
        self.settings = {
            **{key: value for key, value in settings.items() if key not in OUR_KEYS},
            "train_micro_batch_size_per_gpu": 1,  # only their product with the next one counts, for messages
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": float(max_grad_norm),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self._engine: Any = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._losses: list[Tensor] = []
        self._norm = math.nan

    has_own_state = True

    @property
    def is_spread(self) -> bool:  # type: ignore[override]
        return self.stage == 3

    def take_over(self, optimizer: torch.optim.Optimizer) -> None:
        if self.denoiser_device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Its communication for CPUs is compiled at first use, for minutes, and waits forever for the lock of a
        # compilation that was killed. Gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._optimizer = optimizer
        self._engine, *_ = deepspeed.initialize(
            model=self.denoiser,
            optimizer=optimizer,
            model_parameters=list(self.parameters.values()),
            config=self.settings,
            dist_init_required=False,
        )
        if self.stage == 3:
            _register_foreign_parameters(self.denoiser)

    @property
    def denoiser_device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._losses.append(loss.detach())  # looked at after the window: that waits for the device
        self._engine.set_gradient_accumulation_boundary(is_last)
        # The engine averages over processes; the loss is divided by the weight of the whole window already.
        self._engine.backward(loss * self.process_group.size, scale_wrt_gas=False)

    def collect_gradients(self) -> None:
        """The engine's step sums, clips and updates in one; it is not taken where a loss is not finite."""
        is_finite = bool(torch.stack(self._losses).isfinite().all())
        self._losses.clear()
        if self.process_group.any(not is_finite):
            self._engine.optimizer.zero_grad()
            self._norm = math.nan
            return
        self._engine.step()
        self._norm = float(self._engine.get_global_grad_norm())

    @property
    def norm_before_clipping(self) -> Tensor:
        return torch.tensor(self._norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Taken already."""

    def gathered(self) -> AbstractContextManager[Any]:
        if self.stage < 3 or not self.is_adapter:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.parameters.values()))

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of stage 3: the parameters themselves, whatever `tensors` holds of them."""
        if self.stage < 3:
            return dict(tensors)
        import deepspeed

        gathered = {}
        for name in tensors:
            with deepspeed.zero.GatheredParameters([self.parameters[name]]):
                if self.process_group.is_main:
                    gathered[name] = self.parameters[name].detach().to("cpu", copy=True)
        return gathered

    def shapes(self) -> dict[str, list[int]]:
        return {
            name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in self.parameters.items()
        }

    def check(self, when: str) -> None:
        """Copies are compared; parts are held once."""
        if self.stage < 3:
            super().check(when)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the context all processes may write the same values into the parameters."""
        if self.stage < 3:
            yield
            self._engine.optimizer.refresh_fp32_params()
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.parameters.values()), modifier_rank=0):
            yield
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter in self.parameters.values():
            with deepspeed.zero.GatheredParameters([parameter]):
                value = parameter.detach().float().clone()
            safe_set_full_fp32_param(parameter, value)

    def own_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `optimizer_tensors` would give it in a single process."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        states = self._flat_states()
        tensors = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                # The engine moves a float32 copy, of which the weights are only the rounded image.
                whole = safe_get_full_fp32_param(parameter)
                if self.process_group.is_main:
                    tensors[f"{name}{STATE_SEPARATOR}{FLOAT32}"] = whole.reshape(self.shapes()[name]).cpu()
            for key, value in states.items():
                path = f"{name}{STATE_SEPARATOR}{key}"
                if value.ndim == 0:
                    tensors[path] = value.clone()
                    continue
                whole = safe_get_full_optimizer_state(parameter, key)
                if self.process_group.is_main:
                    tensors[path] = whole.reshape(self.shapes()[name]).cpu()
        groups: list[dict[str, Any]] = [{}]
        return tensors, {"class": type(self._optimizer).__name__, "states": {}, "groups": groups}

    def load_own_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `own_state` gave."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        copies = {key: value for key, value in tensors.items() if key.endswith(f"{STATE_SEPARATOR}{FLOAT32}")}
        tensors = {key: value for key, value in tensors.items() if key not in copies}
        assert self._optimizer is not None
        first = next(iter(self.parameters))
        start = f"{first}{STATE_SEPARATOR}"
        found = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        for flat in self._flat_parameters():
            self._optimizer.state[flat] = {
                key: value.clone() if value.ndim == 0 else torch.zeros_like(flat) for key, value in found.items()
            }
        if self.stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for key, value in tensors.items():
            name, _, state = key.partition(STATE_SEPARATOR)
            if value.ndim:
                parameter = self.parameters[name]
                safe_set_full_optimizer_state(parameter, value.float().to(self._engine.device), state)
        for key, value in copies.items():
            name = key.partition(STATE_SEPARATOR)[0]
            safe_set_full_fp32_param(self.parameters[name], value.to(self._engine.device))

    def _flat_parameters(self) -> list[Tensor]:
        """What the optimizer moves in this process."""
        if self.stage < 3:
            return list(self._engine.optimizer.single_partition_of_fp32_groups)
        return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def _flat_states(self) -> dict[str, Tensor]:
        assert self._optimizer is not None
        for flat in self._flat_parameters():
            if state := self._optimizer.state.get(flat):
                return {key: value for key, value in state.items() if isinstance(value, Tensor)}
        return {}


def _register_foreign_parameters(denoiser: nn.Module) -> None:
    """Tell DeepSpeed which layers use parameters of an adapter's modules, so that it fetches both together."""
    import deepspeed

    for module in denoiser.modules():
        layers = getattr(module, "org_module", None)  # LyCORIS keeps the layer that it adapts in a list of one
        if layers:
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(layers[0], parameter)
