"""`config.env` beside a `config.json`: variables for the run and its libraries, set before anything is read.

Such a file comes with a folder that may be a stranger's, so it sets what this program reads and a list of what its
libraries read, and nothing that would load code or send a token to another place: that is for the shell.

Where there is no other configuration, `config.env` is the configuration itself (`layers.py`), and nothing is done here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.config.discovery import BACKEND_NAMES, ENVIRONMENT_NAMES
from simpletuner.config.layers import (
    ACCELERATE_VARIABLES,
    ENVIRONMENT_PREFIX,
    INTERNAL,
    LAUNCH_VARIABLES,
    Origin,
    read_env_variables,
    referenced_names,
)
from simpletuner.config.names import EXTRA_ARGUMENTS
from simpletuner.errors import ConfigError, Problem

FILE = "config.env"

_OWN = frozenset(
    {*ENVIRONMENT_NAMES, *BACKEND_NAMES, "CONFIG_PATH", EXTRA_ARGUMENTS, *LAUNCH_VARIABLES, *ACCELERATE_VARIABLES}
)
# Of libraries. Whole names: families such as NCCL_* and WANDB_* have members that load plug-ins or name another server.
LISTED = frozenset(
    f"{family}{name}"
    for family, names in {
        "CUDA_": "VISIBLE_DEVICES DEVICE_ORDER LAUNCH_BLOCKING MODULE_LOADING DEVICE_MAX_CONNECTIONS",
        "NCCL_": "DEBUG DEBUG_SUBSYS SOCKET_IFNAME SOCKET_NTHREADS NSOCKS_PERTHREAD IB_DISABLE IB_HCA IB_TIMEOUT "
        "IB_GID_INDEX P2P_DISABLE P2P_LEVEL SHM_DISABLE ALGO PROTO MIN_NCHANNELS MAX_NCHANNELS BUFFSIZE CUMEM_ENABLE "
        "NVLS_ENABLE CROSS_NIC NET_GDR_LEVEL BLOCKING_WAIT ASYNC_ERROR_HANDLING TIMEOUT",
        "TORCH_NCCL_": "ASYNC_ERROR_HANDLING BLOCKING_WAIT ENABLE_MONITORING HEARTBEAT_TIMEOUT_SEC",
        "HF_": "HOME HUB_CACHE ASSETS_CACHE DATASETS_CACHE XET_CACHE TOKEN HUB_OFFLINE DATASETS_OFFLINE "
        "HUB_DISABLE_TELEMETRY HUB_DISABLE_XET HUB_DISABLE_PROGRESS_BARS HUB_DISABLE_SYMLINKS_WARNING "
        "HUB_ENABLE_HF_TRANSFER HUB_DOWNLOAD_TIMEOUT HUB_ETAG_TIMEOUT XET_HIGH_PERFORMANCE",
        "WANDB_": "API_KEY MODE PROJECT ENTITY NAME NOTES TAGS RUN_GROUP JOB_TYPE RUN_ID RESUME DISABLED SILENT QUIET "
        "CONSOLE DIR CACHE_DIR DATA_DIR ARTIFACT_DIR DISABLE_GIT DISABLE_CODE SAVE_CODE WATCH LOG_MODEL INIT_TIMEOUT",
        "": "HUGGINGFACE_HUB_CACHE HUGGING_FACE_HUB_TOKEN TRANSFORMERS_CACHE TRANSFORMERS_OFFLINE DIFFUSERS_OFFLINE "
        "TRANSFORMERS_VERBOSITY DIFFUSERS_VERBOSITY TOKENIZERS_PARALLELISM OMP_NUM_THREADS MKL_NUM_THREADS "
        "PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_HIP_ALLOC_CONF PYTORCH_ENABLE_MPS_FALLBACK "
        "HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HSA_OVERRIDE_GFX_VERSION GLOO_SOCKET_IFNAME TP_SOCKET_IFNAME "
        "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION AWS_DEFAULT_REGION NO_COLOR TZ",
    }.items()
    for name in names.split()
)
# For `${NAME}` in webhook_config, which is where addresses of webhooks belong.
_WEBHOOKS = re.compile(r"(?:\w+_)?WEBHOOK(?:_\w+)?")

_LOADS_CODE = re.compile(
    r"(?:LD|DYLD|PYTHON|BASH|PERL|RUBY|NODE|JAVA|GCONV|TRITON|TORCHINDUCTOR|TORCH_EXTENSIONS|CUDNN|NVCC)_?\w*"
    r"|PATH|ENV_FILE|SHELL|IFS|PS4|PROMPT_COMMAND|EDITOR|PAGER|BROWSER|CC|CXX|CUDA_(?:HOME|PATH|INJECTION\w*)"
    r"|\w*_PLUGIN\w*|\w*_CONF_FILE|\w*PRELOAD\w*|\w*_EXECUTABLE|HF_MODULES_CACHE|\w*TRUST_REMOTE_CODE|GIT_\w+"
    r"|(?:GLIBC|MALLOC|OMP_TOOL|HSA_TOOLS|OCL_ICD|VK_ICD|TORCH_FORCE|LOCAL_KERNELS|KERNELS|_JAVA|NUMBA)_?\w*|AWS_DATA_PATH"
)
_MOVES_TOKENS = re.compile(
    r"\w*_ENDPOINT(?:_URL)?\w*|(?i:\w*_proxy)|\w*BASE_URL|\w*_HOST|WANDB_X_\w+|WANDB__\w+|HF_TOKEN_PATH"
    r"|(?:HF|WANDB|AWS)_\w+_UR[IL]|\w*_STAGING|\w+_(?:TOKENS?|CREDENTIALS)_(?:PATH|FILE)|SSLKEYLOGFILE"
    r"|SSL_\w+|\w*CA_BUNDLE|NETRC|AWS_CONFIG_FILE|AWS_SHARED_CREDENTIALS_FILE|AWS_CA_\w+|OPENSSL_\w+|HOSTALIASES"
)


@dataclass
class FileVariables:
    """What `config.env` files set, and lines about what they do not."""

    variables: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def variables_of_files(environment: Mapping[str, str], working_dir: Path, name: str | None = None) -> FileVariables:
    """What `config/config.env`, then `config/NAME/config.env` set and the environment does not.

    Args:
        name: of the configuration, as the command line chooses it; None: `ENV` and its like say it.

    Raises:
        ConfigError: a file cannot be read, a line is no assignment, or it sets what only a shell may set.
    """
    found = FileVariables()
    seen = _read(working_dir / "config", working_dir, environment, found)
    for key in ENVIRONMENT_NAMES:
        name = name or environment.get(key) or found.variables.get(key)
    if name and name != "default":
        _read(working_dir / "config" / name, working_dir, {**environment, **seen}, found)
    found.variables = {key: value for key, value in found.variables.items() if key not in environment}
    return found


def _read(folder: Path, working_dir: Path, environment: Mapping[str, str], found: FileVariables) -> dict[str, str]:
    """Add what a file sets to `found`; returns all its variables, which later lines may refer to."""
    file = folder / FILE
    others = (folder / "config.json", folder / "config.toml")
    if not file.is_file() or not any(other.is_file() for other in others):
        return {}
    shown = str(file.relative_to(working_dir)) if file.is_relative_to(working_dir) else str(file)
    written = read_env_variables(file, shown, environment)
    problems = [problem for name, (_, origin) in written.items() if (problem := _refusal(name, origin))]
    if problems:
        raise ConfigError(problems)
    helpers = referenced_names(file, shown)
    for name, (value, origin) in written.items():
        is_own = name in _OWN or (name.startswith(ENVIRONMENT_PREFIX) and name not in INTERNAL)
        if is_own or name in LISTED or _WEBHOOKS.fullmatch(name):
            found.variables[name] = value
        elif name not in helpers:
            found.warnings.append(
                f"{origin}: {name} is not set: beside a configuration, {FILE} sets {ENVIRONMENT_PREFIX}<OPTION> and a "
                f"list of variables of libraries; set others in the shell"
            )
    return {name: value for name, (value, _) in written.items()}


def _refusal(name: str, origin: Origin) -> Problem | None:
    if name in LISTED:
        return None
    what = "could load code" if _LOADS_CODE.fullmatch(name) else None
    if what is None and _MOVES_TOKENS.fullmatch(name):
        what = "could send tokens to another place"
    if what is None:
        return None
    return origin.problem(f"{what}, and is not taken from a file", name, fix=f"set it in the shell: export {name}=...")
