"""Qwen-Image: what diffusers' own pipeline and network compute, with the trainer's embeddings, packing and sampling."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.batch import Batch, PromptEmbeds
from simpletuner.errors import ConfigError
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.models.local_check import check_local_model
from simpletuner.models.patches import pack, unpack
from simpletuner.models.qwen_image.family import TEMPLATE, TEMPLATE_TOKENS
from tests.golden_qwen_image import FOLDER, assert_near, golden_case, golden_family, golden_folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    return golden_family("qwen_image", tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_denoiser_answers_as_in_the_pipeline_of_diffusers(family: ModelFamily, number: int) -> None:
    case = golden_case(number)
    with torch.no_grad():
        output = family.predict(
            family.load_denoiser(), case.tensors["latents"], case.tensors["sigma"], case.conditioning()
        )
    assert_near(output, case.tensors["output"])


def test_guided_sampling_ends_where_the_pipeline_of_diffusers_ends(family: ModelFamily) -> None:
    """Three steps of guidance 3 whose predictions keep their length, on noise levels stretched to 0.02."""
    case = golden_case(0)
    embeds = {name: case.tensors[f"{name}prompt_embeds"] for name in ("", "negative_")}

    class Known:
        def embeds(self, prompts: list[str], references: object = None) -> list[PromptEmbeds]:
            return [PromptEmbeds({"prompt_embeds": embeds[prompt][0]}) for prompt in prompts]

    family.prompts = Known()
    pipeline = family.pipeline(family.load_denoiser())
    height, width = (8 * side for side in case.tensors["latents"].shape[-2:])
    options = {"height": height, "width": width, "num_inference_steps": 3, "output_type": "latent"}
    final = pipeline("", "negative_", guidance_scale=3.0, latents=case.tensors["latents"], **options).images
    torch.testing.assert_close(pipeline.scheduler.sigmas, case.tensors["scheduler_sigmas"])
    assert pipeline.scheduler.sigmas[-2].item() == pytest.approx(0.02)
    stock = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.QwenImageTransformer2DModel.from_pretrained(Path(family.source.model) / "transformer"),
    )
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt_embeds=embeds[""],
        negative_prompt_embeds=embeds["negative_"],
        prompt_embeds_mask=torch.ones(embeds[""].shape[:2]),
        negative_prompt_embeds_mask=torch.ones(embeds["negative_"].shape[:2]),
        true_cfg_scale=3.0,
        latents=pack(case.tensors["latents"]),
        **options,
    ).images
    assert_near(final, unpack(theirs, height // 8, width // 8), tolerance=1e-6)
    # Both are 1.0e-5 off the recording, and so is double precision: that was made on another CPU.
    assert_near(final, case.tensors["final_latents"], tolerance=2e-5)


def test_one_step_of_sampling_begins_at_noise(family: ModelFamily) -> None:
    """Stretching a single level to the last one would divide by zero."""
    pipeline = family.pipeline(family.load_denoiser())
    assert pipeline.set_sigmas(1, torch.zeros(1, 16, 8, 8)) == [1.0]


def test_an_image_of_one_step_leaves_the_levels_of_later_images_stretched(family: ModelFamily) -> None:
    pipeline, latents = family.pipeline(family.load_denoiser()), torch.zeros(1, 16, 64, 64)
    fresh = pipeline.set_sigmas(4, latents)
    assert pipeline.set_sigmas(1, latents) == [1.0]
    assert pipeline.set_sigmas(4, latents) == fresh
    assert fresh[-1] == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize("number", [0, 1])
def test_the_embeddings_are_the_states_of_the_language_model_behind_the_template(
    family: ModelFamily, number: int
) -> None:
    facts = json.loads((FOLDER / "vlm" / "prompts.json").read_text())[number]
    before, after = TEMPLATE.split("{}")
    assert facts["text"].startswith(before)
    assert facts["text"].endswith(after)
    prompt = facts["text"].removeprefix(before).removesuffix(after)
    [embeds] = family.encode_prompts([prompt])
    golden = load_file(FOLDER / "vlm" / facts["file"])["prompt_embeds"]
    assert len(golden) == facts["tokens"] - facts["drop"]
    assert_near(embeds.tensors["prompt_embeds"], golden)
    assert family.count_prompt_tokens([prompt]) == [len(golden)]


def test_the_template_and_its_tokens_are_those_of_the_released_tokenizer() -> None:
    cases = json.loads((FOLDER / "token_layouts.json").read_text())["cases"]
    [text] = [case for case in cases if case["name"] == "QwenImagePipeline, text only"]
    assert TEMPLATE.format("A cat holding a sign") == text["template_text"]
    [empty] = [case for case in cases if case["name"] == "QwenImagePipeline, empty prompt"]
    shared = [one == other for one, other in zip(text["input_ids"], empty["input_ids"], strict=False)].index(False)
    assert shared == TEMPLATE_TOKENS == text["drop"]


def test_a_long_prompt_keeps_its_first_tokens_and_is_counted(family: ModelFamily) -> None:
    before = family.num_cut_prompts
    [embeds] = family.encode_prompts(["word " * 300])
    [shorter] = family.encode_prompts(["word " * 100])
    assert len(embeds.tensors["prompt_embeds"]) == 512
    assert family.num_cut_prompts == before + 2 - (len(shorter.tensors["prompt_embeds"]) < 512)


def test_rows_of_a_batch_are_what_they_are_alone(family: ModelFamily) -> None:
    denoiser, latents = family.load_denoiser(), torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds = [PromptEmbeds({"prompt_embeds": torch.randn(length, 24)}) for length in (7, 12)]
    sigmas = torch.tensor([0.2, 0.7])
    batch = Batch(latents, embeds, [0, 1], ["", ""], torch.ones(2), "")
    with torch.no_grad():
        together = family.predict(denoiser, latents, sigmas, family.collate(batch))
        for row in range(2):
            one = slice(row, row + 1)
            alone = Batch(latents[one], embeds[one], [0], [""], torch.ones(1), "")
            expected = family.predict(denoiser, latents[one], sigmas[one], family.collate(alone))
            assert_near(together[one], expected)


@pytest.mark.parametrize(("side", "mu"), [(256, 0.5), (1024, 0.5 + 0.4 * 3840 / 7936)])
def test_noise_levels_are_shifted_with_the_size_and_reach_zero(family: ModelFamily, side: int, mu: float) -> None:
    """mu is 0.5 at 256 patches and 0.9 at 8192; the last level of sampling, 0.02, is no bound of training."""
    latents = torch.zeros(1, 16, side // 8, side // 8)
    median, low = family.sigmas_at(torch.tensor([0.5, 1e-6], dtype=torch.float64), latents).tolist()
    assert median == pytest.approx(math.exp(mu) / (1 + math.exp(mu)), abs=1e-6)
    assert low < 0.02


@pytest.mark.parametrize("part", ["guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"])
def test_weights_with_parts_that_are_not_fed_are_refused_by_name(tmp_path: Path, part: str) -> None:
    spec, source = get_spec("qwen_image"), ModelSource(str(golden_folder(tmp_path, **{part: True})))
    family = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
    for load in (family.load_denoiser, family.empty_denoiser):
        with pytest.raises(ConfigError, match=part):
            load()


def test_a_denoiser_in_one_file_is_read_under_comfyuis_names(family: ModelFamily, tmp_path: Path) -> None:
    weights = load_file(FOLDER / "weights.safetensors")
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}, tmp_path / "one.safetensors"
    )
    source = ModelSource(family.source.model, file=str(tmp_path / "one.safetensors"))
    single = get_family_class(family.spec)(family.spec, source, torch.device("cpu"), torch.float32)
    assert check_local_model(source, family.spec) == []
    loaded = single.load_denoiser().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
