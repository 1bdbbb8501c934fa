"""Families by name: our own, and those that other packages bring by entry points."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner.errors import ConfigError
from simpletuner.families import registry
from simpletuner.families.registry import all_specs, family_names, get_family_class, get_spec
from simpletuner.models.auraflow.family import AuraFlow

ROOT = Path(__file__).parents[3]


MODULE = """
from dataclasses import replace

from simpletuner.models.auraflow.spec import AURAFLOW, JOINT

ELSEWHERE = replace(AURAFLOW, name="elsewhere", title="Elsewhere", family_class="newfamilies:Elsewhere")
NO_CLASS = replace(ELSEWHERE, name="broken", family_class="no_such_package:Family")


def __getattr__(name):
    if name == "Elsewhere":
        from simpletuner.models.auraflow.family import AuraFlow

        return type("Elsewhere", (AuraFlow,), {})
    raise AttributeError(name)
"""


def package(folder: Path, **families: str) -> Path:
    """An installed package as Python finds it: a module, and a folder with metadata that names entry points."""
    info = folder / "newfamilies-1.2.dist-info"
    info.mkdir(parents=True)
    (folder / "newfamilies.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: newfamilies\nVersion: 1.2\n")
    lines = [f"{name} = {value}" for name, value in families.items()]
    (info / "entry_points.txt").write_text("\n".join(["[simpletuner.families]", *lines]))
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def install(**families: str) -> None:
        monkeypatch.syspath_prepend(str(package(tmp_path / "site", **families)))
        registry.plugins.cache_clear()

    yield install
    monkeypatch.undo()
    registry.plugins.cache_clear()
    sys.modules.pop("newfamilies", None)


def test_a_family_of_another_package_is_found_by_its_entry_point(install):
    install(elsewhere="newfamilies:ELSEWHERE")
    assert family_names()[-1] == "elsewhere"
    spec = get_spec("elsewhere")
    assert spec.title == "Elsewhere"
    assert issubclass(get_family_class(spec), AuraFlow)
    specs, failures = all_specs()
    assert spec in specs
    assert failures == []


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("no_such_package.spec:SPEC", "ModuleNotFoundError"),
        ("newfamilies:NOTHING", "AttributeError"),
        ("newfamilies:JOINT", "is not a FamilySpec"),
        ("newfamilies:ELSEWHERE", 'calls itself "elsewhere"'),
    ],
)
def test_a_broken_package_stops_only_who_asks_for_its_family(install, value: str, what: str):
    install(broken=value)
    assert get_spec("sdxl").name == "sdxl"
    with pytest.raises(ConfigError, match="omnigem") as unknown:
        get_spec("omnigem")
    assert "omnigen" in unknown.value.render()
    with pytest.raises(ConfigError) as error:
        get_spec("broken")
    assert "newfamilies 1.2" in error.value.render()
    assert what in error.value.render()
    specs, [failure] = all_specs()
    assert [spec.name for spec in specs] == list(registry.FAMILIES)
    assert "newfamilies 1.2" in failure


def test_our_own_family_wins_over_another_package_s_and_that_is_reported(install):
    install(omnigen="newfamilies:ELSEWHERE")
    assert get_spec("omnigen").title == "OmniGen"
    assert family_names().count("omnigen") == 1
    _, [line] = all_specs()
    assert "newfamilies 1.2 brings a family omnigen too" in line


def test_a_class_that_cannot_be_imported_names_its_package(install):
    install(broken="newfamilies:NO_CLASS")
    with pytest.raises(ConfigError, match="newfamilies"):
        get_family_class(get_spec("broken"))


def run_models(*arguments: str, site: Path | None = None) -> subprocess.CompletedProcess:
    paths = [str(ROOT), *([str(site)] if site else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "simpletuner", "models", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_verb_lists_what_there_is_and_names_what_is_broken(tmp_path: Path):
    site = package(tmp_path, elsewhere="newfamilies:ELSEWHERE", broken="no_such_package:SPEC")
    shown = run_models(site=site)
    assert shown.returncode == 0
    for name in ("omnigen", "sdxl", "flux", "auraflow", "elsewhere"):
        assert f"\n{name}: " in f"\n{shown.stdout}"
    assert "stabilityai/stable-diffusion-xl-base-1.0" in shown.stdout
    assert "newfamilies 1.2" in shown.stderr
    assert "broken" in shown.stderr


def test_one_family_is_reported_in_full_and_an_unknown_one_is_answered():
    shown = run_models("flux").stdout
    for words in ("FLUX.1-schnell", "Apache-2.0", "true_cfg_scale", "up to 1 input images", "weights 22.2 GiB"):
        assert words in shown, words
    unknown = run_models("fluxx")
    assert unknown.returncode == 2
    assert 'did you mean "flux"' in unknown.stderr


# OmniGen, OmniGen2, Qwen-Image 2.1 and Hunyuan-DiT bring networks or blocks of their own.
@pytest.mark.parametrize(
    "name", sorted(registry.FAMILIES.keys() - {"omnigen", "omnigen2", "qwen_image_21", "hunyuan_dit"})
)
def test_the_folder_of_a_family_has_under_310_lines(name):
    """What many families need belongs into the shared code."""
    folder = Path(registry.__file__).parents[1] / "models" / name
    assert 50 < sum(len(file.read_text().splitlines()) for file in folder.glob("*.py")) < 310


def test_a_flavour_has_the_name_that_it_is_listed_by():
    """The wizard writes one, the configuration is checked against the other."""
    spec = get_spec("sd3")
    assert "3-medium" in spec.flavours
    with pytest.raises(ValueError, match="listed as"):
        dataclasses.replace(spec, flavours={"3": spec.flavours["3-medium"]}, default_flavour="3")


def test_of_two_packages_with_one_family_the_first_by_name_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(package: str) -> Any:
        return SimpleNamespace(name="elsewhere", value=package, dist=SimpleNamespace(name=package, version="1"))

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry("b"), entry("a"), entry("c")])
    registry.plugins.cache_clear()
    try:
        assert {name: each.value for name, each in registry.plugins().items()} == {"elsewhere": "a"}
    finally:
        registry.plugins.cache_clear()
