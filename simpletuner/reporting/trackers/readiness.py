"""Whether the trackers that `report_to` names can work: asked before torch is imported, answered with the remedy.

Nothing is sent. W&B asks for a key in the middle of a run otherwise, or gives up there.
"""

from __future__ import annotations

import configparser
import netrc
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from simpletuner.config.env_files import LISTED
from simpletuner.config.options.reporting import ReportingOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.reporting.trackers.custom import load_custom_tracker

# W&B's own service has had more than one name; a key for one is good for all.
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
USER_SETTINGS = Path("~/.config/wandb/settings")
NO_LOGIN_NEEDED = ("offline", "disabled", "dryrun", "shared")


def trackers_of(options: ReportingOptions) -> frozenset[str]:
    """The trackers that `report_to` means, `all` spelled out."""
    named = {str(name) for name in options.report_to} - {"none", "simpletuner"}
    if "all" in named:
        named = (named - {"all"}) | {"tensorboard", "wandb"} | ({"custom-tracker"} if options.custom_tracker else set())
    return frozenset(named)


def check_trackers(options: ReportingOptions, environment: Mapping[str, str], working_dir: Path) -> None:
    """Raise where a tracker cannot work.

    Raises:
        ConfigError: W&B is not installed or nobody is logged in, or the custom tracker cannot be loaded.
    """
    trackers = trackers_of(options)
    problems = list(wandb_problems(environment, working_dir)) if "wandb" in trackers else []
    if "custom-tracker" in trackers and options.custom_tracker:
        try:
            load_custom_tracker(options.custom_tracker)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def wandb_problems(environment: Mapping[str, str], working_dir: Path) -> Iterator[Problem]:
    """What keeps W&B from starting, without importing it."""
    if find_spec("wandb") is None:
        yield Problem('"wandb" is not installed', key="report_to", fix="pip install wandb")
        return
    is_off = environment.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    if environment.get("WANDB_MODE") in NO_LOGIN_NEEDED or is_off:
        return
    if problems := list(problems_of_folder(environment, working_dir)):
        yield from problems
        return
    settings = wandb_settings(working_dir)
    mode = environment.get("WANDB_MODE") or settings.get("mode") or ("offline" if settings.get("disabled") else "")
    if mode in NO_LOGIN_NEEDED:
        return
    if any(environment.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return
    base_url = environment.get("WANDB_BASE_URL") or settings.get("base_url") or ""
    hosts = [urlsplit(base_url).netloc] if base_url else list(WANDB_HOSTS)
    if not has_netrc_entry(environment, hosts):
        yield Problem(
            f'"wandb": nobody is logged in at {hosts[0].rpartition("@")[2]}',
            key="report_to",
            fix="run: wandb login, or set WANDB_API_KEY; without an account set WANDB_MODE=offline",
        )


def problems_of_folder(environment: Mapping[str, str], working_dir: Path) -> Iterator[Problem]:
    """Settings that W&B would take from the folder, which may be a stranger's, and that `config.env` may not make: they
    would send the user's key to another place."""
    users = _settings_in(USER_SETTINGS.expanduser()).get("base_url")
    folder = Path(environment.get("WANDB_DIR") or working_dir)
    for file in (folder / "wandb" / "settings", folder / ".wandb" / "settings"):
        for key, value in _settings_in(file).items():
            name = f"WANDB_{key.upper()}"
            is_known = value == users or urlsplit(value).netloc in WANDB_HOSTS or environment.get(name)
            if name not in LISTED and not (key == "base_url" and is_known):
                fix = f"remove it, and set it in the shell: export {name}=..."
                message = "could send tokens to another place, and is not taken from a folder"
                yield Problem(message, key=key, file=str(file), fix=fix)


def wandb_settings(working_dir: Path) -> dict[str, str]:
    """What `wandb offline` and the like have written: for the user, and over it for this folder."""
    return _settings_in(USER_SETTINGS.expanduser(), working_dir / "wandb" / "settings")


def _settings_in(*files: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(files, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return {}  # W&B itself will say what is wrong with its file
    return dict(parser["default"]) if parser.has_section("default") else {}


def has_netrc_entry(environment: Mapping[str, str], hosts: list[str]) -> bool:
    """Whether `wandb login` has kept a key for one of the hosts."""
    named = environment.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            entries = netrc.netrc(str(path.expanduser()))
        except (OSError, netrc.NetrcParseError):
            continue
        return any(host in entries.hosts for host in hosts)
    return False
