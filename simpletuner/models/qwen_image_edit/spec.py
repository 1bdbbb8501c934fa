"""What is known of Qwen-Image-Edit without loading it: Qwen-Image's network, which sees reference images too.

Sources: the released Qwen-Image-Edit, -2509 and -2511; FireRedTeam/FireRed-Image-Edit; diffusers'
`pipeline_qwenimage_edit.py` and `pipeline_qwenimage_edit_plus.py`.
"""

from __future__ import annotations

from dataclasses import replace

from simpletuner.families.spec import Component, Flavour
from simpletuner.models.qwen_image.spec import PARAMETERS, QWEN_IMAGE


def _flavour(name: str, hub_id: str, words: str) -> Flavour:
    return Flavour(name, hub_id, words, "Apache-2.0", PARAMETERS, edits=True)


QWEN_IMAGE_EDIT = replace(
    QWEN_IMAGE,
    name="qwen_image_edit",
    title="Qwen-Image-Edit",
    family_class="simpletuner.models.qwen_image_edit.family:QwenImageEdit",
    flavours={
        flavour.name: flavour
        for flavour in (
            _flavour("2511", "Qwen/Qwen-Image-Edit-2511", "several reference images, modulated as clean ones"),
            _flavour("2509", "Qwen/Qwen-Image-Edit-2509", "several reference images"),
            _flavour("edit", "Qwen/Qwen-Image-Edit", "one reference image, August 2025"),
            _flavour("firered-1.1", "FireRedTeam/FireRed-Image-Edit-1.1", "trained further by FireRed"),
            _flavour("firered-1.0", "FireRedTeam/FireRed-Image-Edit-1.0", "trained further by FireRed"),
        )
    },
    default_flavour="2511",
    components=(
        *QWEN_IMAGE.components,
        Component("processor", "transformers.Qwen2VLImageProcessorPil", "processor", "preprocessor_config.json"),
    ),
    # Of the instruction; images come on top.
    max_prompt_tokens=1024,
    max_references=3,
    prompts_see_references=True,
    # Guidance leads away from the instruction alone: the negative prompt is read with the same images.
    drops_references=False,
    pipeline_class="QwenImageEditPlusPipeline",
    pipeline_aliases=("QwenImageEditPipeline",),
    keys=replace(QWEN_IMAGE.keys, architecture="Qwen-Image-Edit", base_model_version="qwen_image_edit"),
    defaults={**QWEN_IMAGE.defaults, "validation_num_inference_steps": 40},
)
