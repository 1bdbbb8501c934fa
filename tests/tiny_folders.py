"""Which tiny model stands for which family. One entry per registered family: the contract tests draw from here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.tiny import tiny_omnigen_folder
from tests.tiny_auraflow import tiny_auraflow_folder
from tests.tiny_chroma import tiny_chroma_folder
from tests.tiny_flux import tiny_flux_folder
from tests.tiny_flux2 import tiny_flux2_folder
from tests.tiny_hunyuan_dit import tiny_hunyuan_dit_folder
from tests.tiny_kolors import tiny_kolors_folder
from tests.tiny_krea2 import tiny_krea2_folder
from tests.tiny_lumina2 import tiny_lumina2_folder
from tests.tiny_omnigen2 import tiny_omnigen2_folder
from tests.tiny_pixart_sigma import tiny_pixart_sigma_folder
from tests.tiny_qwen_image import tiny_qwen_image_edit_folder, tiny_qwen_image_folder
from tests.tiny_qwen_image_21 import tiny_qwen_image_21_folder
from tests.tiny_sana import tiny_sana_folder
from tests.tiny_sd3 import tiny_sd3_folder
from tests.tiny_sd15 import tiny_sd15_folder
from tests.tiny_sdxl import tiny_sdxl_folder
from tests.tiny_z_image import tiny_z_image_folder

TINY_FOLDERS: Mapping[str, Callable[[Path], Path]] = {
    "auraflow": tiny_auraflow_folder,
    "chroma": tiny_chroma_folder,
    "flux": tiny_flux_folder,
    "hunyuan_dit": tiny_hunyuan_dit_folder,
    "kolors": tiny_kolors_folder,
    "flux2": tiny_flux2_folder,
    "krea2": tiny_krea2_folder,
    "lumina2": tiny_lumina2_folder,
    "qwen_image_21": tiny_qwen_image_21_folder,
    "omnigen": tiny_omnigen_folder,
    "omnigen2": tiny_omnigen2_folder,
    "pixart_sigma": tiny_pixart_sigma_folder,
    "sana": tiny_sana_folder,
    "qwen_image": tiny_qwen_image_folder,
    "sd15": tiny_sd15_folder,
    "qwen_image_edit": tiny_qwen_image_edit_folder,
    "sd3": tiny_sd3_folder,
    "sdxl": tiny_sdxl_folder,
    "z_image": tiny_z_image_folder,
}
