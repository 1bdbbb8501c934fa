"""The stated facts of OmniGen against the real classes."""

from __future__ import annotations

import fnmatch
import importlib
import subprocess
import sys

from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_transformer


def test_every_adaptable_class_is_found_under_its_stated_names():
    modules = dict(tiny_omnigen_transformer().named_modules())
    for adaptable in OMNIGEN.adaptable:
        of_class = {name for name, module in modules.items() if type(module).__name__ == adaptable.class_name}
        for pattern in adaptable.names:
            assert fnmatch.filter(of_class, pattern), f"{adaptable.class_name}: {pattern} matches nothing"
        stated = {name for pattern in adaptable.names for name in fnmatch.filter(of_class, pattern)}
        assert stated == of_class


def test_every_layer_with_a_matrix_is_adaptable_except_the_token_table():
    stated = {adaptable.class_name for adaptable in OMNIGEN.adaptable}
    own_weight = [m for m in tiny_omnigen_transformer().modules() if getattr(m, "weight", None) is not None]
    matrices = {type(module).__name__ for module in own_weight if module.weight.ndim > 1}
    assert matrices - stated == {"Embedding"}


def test_aliases_lora_targets_and_blocks_name_real_modules():
    modules = dict(tiny_omnigen_transformer().named_modules())
    classes = {type(module).__name__ for module in modules.values()}
    assert set(OMNIGEN.class_aliases.values()) <= classes
    assert not set(OMNIGEN.class_aliases) & classes
    assert set(OMNIGEN.block_classes) <= classes
    for pattern in OMNIGEN.default_lora_targets:
        found = fnmatch.filter(modules, pattern)
        assert found
        assert {type(modules[name]).__name__ for name in found} == {"Linear"}


def test_component_classes_and_the_pipeline_exist_in_diffusers():
    for component in OMNIGEN.components:
        module, _, name = component.class_name.rpartition(".")
        assert hasattr(importlib.import_module(module), name)
    assert hasattr(importlib.import_module("diffusers"), OMNIGEN.pipeline_class)


def test_options_that_are_refused_are_declared_options():
    from simpletuner.config.options import all_options

    names = set(all_options())
    assert set(OMNIGEN.unusable_options) | set(OMNIGEN.defaults) <= names


def test_reading_the_facts_imports_no_torch():
    code = "import sys, simpletuner.models.omnigen.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
