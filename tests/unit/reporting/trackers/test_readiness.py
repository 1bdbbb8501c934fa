"""Trackers that cannot work are refused before a run, with the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.config.options.reporting import ReportingOptions
from simpletuner.errors import ConfigError
from simpletuner.reporting.trackers.readiness import check_trackers, trackers_of

MODULE = """
from simpletuner.reporting.trackers.base import Tracker

class Mine(Tracker):
    pass

class Other:
    pass
"""


def config(*report_to: str, custom_tracker: str | None = None) -> ReportingOptions:
    return ReportingOptions(report_to=report_to, custom_tracker=custom_tracker)


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_means_every_tracker_that_is_built():
    assert trackers_of(config("all")) == {"tensorboard", "wandb"}
    assert trackers_of(config("all", custom_tracker="a:B")) == {"tensorboard", "wandb", "custom-tracker"}
    assert trackers_of(config("none")) == trackers_of(config("simpletuner")) == set()


def test_wandb_without_a_login_is_refused_with_the_remedy(home: Path):
    with pytest.raises(ConfigError, match="wandb login") as caught:
        check_trackers(config("wandb"), {}, home)
    assert "WANDB_MODE=offline" in caught.value.render()


@pytest.mark.parametrize(
    "environment", [{"WANDB_MODE": "offline"}, {"WANDB_MODE": "disabled"}, {"WANDB_API_KEY": "x"}, {"NETRC": "keys"}]
)
def test_wandb_is_ready_with_a_key_or_offline(home: Path, environment: dict[str, str]):
    (home / "keys").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    check_trackers(config("wandb"), environment, home)


def test_a_login_elsewhere_is_no_login_here(home: Path):
    (home / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    check_trackers(config("wandb"), {}, home)
    with pytest.raises(ConfigError, match=r"wandb\.example"):
        check_trackers(config("wandb"), {"WANDB_BASE_URL": "https://wandb.example"}, home)
    with pytest.raises(ConfigError, match=r"at wandb\.example:8080\n"):
        check_trackers(config("wandb"), {"WANDB_BASE_URL": "https://me:pw@wandb.example:8080"}, home)


def test_what_wandb_offline_has_written_counts(home: Path):
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    check_trackers(config("wandb"), {}, home)


def test_a_custom_tracker_is_found_in_the_working_folder(home: Path):
    (home / "house_tracker_a.py").write_text(MODULE)
    check_trackers(config("custom-tracker", custom_tracker="house_tracker_a:Mine"), {}, home)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("house_tracker_b:Missing", "no class Missing"),
        ("house_tracker_b:Other", "is a Tracker"),
        ("nowhere_at_all:Mine", "cannot be imported"),
    ],
)
def test_a_custom_tracker_that_cannot_be_used_is_refused(home: Path, name: str, message: str):
    (home / "house_tracker_b.py").write_text(MODULE)
    with pytest.raises(ConfigError, match=message):
        check_trackers(config("custom-tracker", custom_tracker=name), {}, home)


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
@pytest.mark.parametrize(
    "line", ["base_url = https://elsewhere.example", "x_extra_http_headers = {}", "http_proxy = h:1"]
)
def test_settings_in_a_folder_that_move_the_key_are_refused_by_name(home: Path, folder: str, line: str):
    (home / folder).mkdir()
    (home / folder / "settings").write_text(f"[default]\nmode = offline\nentity = me\nproject = mine\n{line}\n")
    with pytest.raises(ConfigError, match=rf"{folder}/settings: {line.split()[0]}: could send") as caught:
        check_trackers(config("wandb"), {"WANDB_API_KEY": "x"}, home)
    assert "export WANDB_" in caught.value.render()
    check_trackers(config("wandb"), {"WANDB_MODE": "offline"}, home)


@pytest.mark.parametrize(
    ("base_url", "environment"),
    [
        ("https://api.wandb.ai", {}),
        ("https://own.example", {"WANDB_BASE_URL": "https://own.example"}),
        ("https://users.example", {}),
    ],
)
def test_settings_in_a_folder_as_wandb_init_writes_them_are_taken(home: Path, base_url: str, environment: dict):
    (home / ".config" / "wandb").mkdir(parents=True)
    (home / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = https://users.example\n")
    (home / "wandb").mkdir()
    (home / "wandb" / "settings").write_text(f"[default]\nentity = me\nbase_url = {base_url}\n")
    check_trackers(config("wandb"), {"WANDB_API_KEY": "x", **environment}, home)
