"""What families state of their layers, against the real classes: presets and targets find layers by it."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping

import pytest
from torch import nn

from simpletuner.families.registry import family_names, get_spec
from tests.tiny import tiny_omnigen_transformer
from tests.tiny_auraflow import tiny_auraflow_transformer
from tests.tiny_chroma import tiny_chroma_transformer
from tests.tiny_flux import tiny_flux_transformer
from tests.tiny_flux2 import tiny_flux2_transformer
from tests.tiny_hunyuan_dit import tiny_hunyuan_dit_transformer
from tests.tiny_kolors import tiny_kolors_unet
from tests.tiny_krea2 import tiny_krea2_transformer
from tests.tiny_lumina2 import tiny_lumina2_transformer
from tests.tiny_omnigen2 import tiny_omnigen2_transformer
from tests.tiny_pixart_sigma import tiny_pixart_transformer
from tests.tiny_qwen_image import tiny_qwen_image_transformer
from tests.tiny_qwen_image_21 import tiny_qwen_image_21_transformer
from tests.tiny_sana import tiny_sana_transformer
from tests.tiny_sd3 import tiny_sd3_transformer
from tests.tiny_sd15 import tiny_sd15_unet
from tests.tiny_sdxl import tiny_unet
from tests.tiny_z_image import tiny_z_image_transformer

DENOISERS: Mapping[str, Callable[[], nn.Module]] = {
    "auraflow": tiny_auraflow_transformer,
    "chroma": tiny_chroma_transformer,
    "flux": tiny_flux_transformer,
    "flux2": tiny_flux2_transformer,
    "hunyuan_dit": tiny_hunyuan_dit_transformer,
    "kolors": tiny_kolors_unet,
    "krea2": tiny_krea2_transformer,
    "lumina2": tiny_lumina2_transformer,
    "omnigen": tiny_omnigen_transformer,
    "omnigen2": tiny_omnigen2_transformer,
    "pixart_sigma": tiny_pixart_transformer,
    "qwen_image": tiny_qwen_image_transformer,
    "qwen_image_21": tiny_qwen_image_21_transformer,
    "qwen_image_edit": tiny_qwen_image_transformer,
    "sana": tiny_sana_transformer,
    "sd15": tiny_sd15_unet,
    "sd3": tiny_sd3_transformer,
    "sdxl": tiny_unet,
    "z_image": tiny_z_image_transformer,
}


@pytest.mark.parametrize("family", family_names())
def test_every_adaptable_class_is_found_under_its_stated_names(family: str) -> None:
    """All layers of a class, but for those on which no adapter may sit."""
    spec = get_spec(family)
    modules = dict(DENOISERS[family]().named_modules())
    patterns: dict[str, list[str]] = defaultdict(list)
    for adaptable in spec.adaptable:
        patterns[adaptable.class_name] += adaptable.names
    for class_name, names in patterns.items():
        of_class = {path for path, module in modules.items() if type(module).__name__ == class_name}
        assert of_class, class_name
        barred = {path for pattern in spec.unadaptable for path in fnmatch.filter(of_class, pattern)}
        stated = {path for pattern in names for path in fnmatch.filter(of_class, pattern)}
        assert stated - barred == of_class - barred, class_name
