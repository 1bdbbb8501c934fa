"""The whole command of the original's page: what stands before `sft` belongs to `accelerate launch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner.commands.flags import FlagParser
from simpletuner.errors import ConfigError, Problem

_VALUES = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "mixed_precision")
# `--fsdp_NAME` -> the variable that accelerate sets for it.
_FSDP = {
    "transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "sharding_strategy": "FSDP_SHARDING_STRATEGY",
    "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
    "offload_params": "FSDP_OFFLOAD_PARAMS",
    "version": "FSDP_VERSION",
    "activation_checkpointing": "FSDP_ACTIVATION_CHECKPOINTING",
    "ignored_modules": "FSDP_IGNORED_MODULES",
    "state_dict_type": "FSDP_STATE_DICT_TYPE",
    "auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
    "backward_prefetch": "FSDP_BACKWARD_PREFETCH",
    "forward_prefetch": "FSDP_FORWARD_PREFETCH",
    "use_orig_params": "FSDP_USE_ORIG_PARAMS",
    "cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "sync_module_states": "FSDP_SYNC_MODULE_STATES",
    "min_num_params": "FSDP_MIN_NUM_PARAMS",
}


@dataclass(frozen=True)
class Command:
    """A command, taken apart.

    Args:
        variables: that accelerate would set.
        num_processes: on each machine; None where nothing says it.
        num_machines: all with as many processes.
        flags: of `sft`.
    """

    variables: dict[str, str]
    num_processes: int | None
    num_machines: int
    flags: tuple[str, ...]

    @property
    def options(self) -> dict[str, int]:
        """What `config.json` says of the processes."""
        if self.num_processes is None:
            return {}
        machines = {"num_machines": self.num_machines} if self.num_machines > 1 else {}
        return {"num_processes": self.num_processes, **machines}


def command_of(words: Sequence[str]) -> Command:
    """Take apart `sft FLAGS`, or `accelerate launch FLAGS -m src.sft FLAGS`.

    Raises:
        ConfigError: it is neither, or a flag of the launcher cannot be read.
    """
    place = next((i for i, word in enumerate(words) if word in ("sft", "src.sft") or word.endswith("/sft.py")), None)
    if place is None:
        allowed = "sft FLAGS, or accelerate launch FLAGS -m src.sft FLAGS"
        raise ConfigError(Problem("there is no sft in the command", allowed=allowed))
    before = [word for word in words[:place] if word not in ("-m", "simpletuner")]
    if not before:
        return Command({}, None, 1, tuple(words[place + 1 :]))
    if before[:2] != ["accelerate", "launch"]:
        raise ConfigError(Problem(f'"{before[0]}" is not a supported launcher', allowed="accelerate launch"))
    found = vars(_launcher().parse_args(before[2:]))
    variables = {name: found[f"fsdp_{key}"] for key, name in _FSDP.items() if found[f"fsdp_{key}"] is not None}
    if found["use_fsdp"]:
        variables["ACCELERATE_USE_FSDP"] = "true"
    if found["mixed_precision"]:
        variables["ACCELERATE_MIXED_PRECISION"] = found["mixed_precision"]
    machines, total = (_number(found[name], name) for name in ("num_machines", "num_processes"))
    if total and total % (machines or 1):
        message = f"{total} is not a multiple of the {machines} machines"
        raise ConfigError(Problem(message, "--num_processes", allowed="the processes of all machines together"))
    return Command(variables, total // (machines or 1) if total else None, machines or 1, tuple(words[place + 1 :]))


def _launcher() -> FlagParser:
    parser = FlagParser("import firered", "Flags of accelerate launch.")
    for name in _VALUES:
        parser.flag(name, str, None, "See accelerate.")
    for name in _FSDP:
        parser.flag(f"fsdp_{name}", str, None, "See accelerate.")
    parser.flag("use_fsdp", bool, False, "See accelerate.")
    return parser


def _number(text: str | None, name: str) -> int | None:
    if text is not None and not (text.isdecimal() and int(text)):
        raise ConfigError(Problem(f'"{text}" is not a number above 0', f"--{name}"))
    return int(text) if text else None
