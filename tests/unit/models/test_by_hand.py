"""What families share, on numbers that are worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BatchEncoding

from simpletuner.batch import PromptEmbeds
from simpletuner.config.paths import WITHOUT
from simpletuner.errors import ConfigError, DataError
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.families.spec import Component, Flavour
from simpletuner.models import guided_pipeline as guided
from simpletuner.models import safe_loading
from simpletuner.models.components import ModelSource
from simpletuner.models.discrete import DiscreteFamily
from simpletuner.models.family import LatentMoments, ModelFamily, have_one_shape
from simpletuner.models.flow_pipeline import FlowPipeline
from simpletuner.models.flux import family as flux
from simpletuner.models.flux2 import family as flux2
from simpletuner.models.guided_pipeline import GuidedFlowPipeline
from simpletuner.models.hunyuan_dit import family as hunyuan_dit
from simpletuner.models.krea2 import family as krea2
from simpletuner.models.live_pipeline import LivePipeline, MaskedLivePipeline, fit_image
from simpletuner.models.omnigen import pipeline as omnigen
from simpletuner.models.omnigen import tokens
from simpletuner.models.omnigen.tokens import image_placeholders
from simpletuner.models.omnigen2 import pipeline as omnigen2
from simpletuner.models.omnigen2 import transformer as omnigen2_network
from simpletuner.models.patches import flatten, pack, position_ids, unpack
from simpletuner.models.qwen_image import family as qwen_image
from simpletuner.models.qwen_image_21.family import QwenImage21
from simpletuner.models.qwen_image_edit import family as qwen_image_edit
from simpletuner.models.qwen_image_edit import preparation
from simpletuner.models.sd3 import family as sd3
from simpletuner.models.single_file import objective_marks, refused_marks
from simpletuner.precision.quantize import NumberFormats


def family_of(name: str = "sd3", model: str = "unused", **config: Any) -> ModelFamily:
    spec = get_spec(name)
    made = get_family_class(spec)(spec, ModelSource(model), torch.device("cpu"), torch.float32)
    vars(made).update(config)  # in place of cached files
    return made


def row(*values: float) -> Tensor:
    return torch.tensor([values])


# ---- patches ---------------------------------------------------------------------------------------------------------


def test_a_patch_holds_its_channels_one_after_the_other_and_its_rows_within_them() -> None:
    latents = torch.arange(16.0).reshape(1, 2, 2, 4)  # two patches side by side, of two channels
    packed = pack(latents)
    assert packed.tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]
    assert torch.equal(unpack(packed, 2, 4), latents)
    tall = torch.arange(8.0).reshape(1, 1, 4, 2)
    assert pack(tall).tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    assert torch.equal(unpack(pack(tall), 4, 2), tall)
    assert flatten(tall).tolist() == [[[0], [1], [2], [3], [4], [5], [6], [7]]]
    assert flatten(latents)[0, :2].tolist() == [[0, 8], [1, 9]]


def test_places_of_patches_are_index_row_and_column() -> None:
    latents = torch.zeros(1, 1, 4, 6, dtype=torch.bfloat16)
    ids = position_ids(latents, index=1)
    assert ids.tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]]
    assert ids.dtype == torch.bfloat16
    assert position_ids(latents)[:, 0].tolist() == [0] * 6


# ---- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "max_area", "fitted"),
    [
        ((100, 60), 10_000, (96, 48)),  # fits: cut to multiples of 16
        ((200, 100), 5_000, (96, 48)),  # halved to 100 x 50
        ((8, 40), 10_000, (16, 80)),  # doubled, so that the shorter side has one multiple
        ((400, 8), 100, (800, 16)),
    ],
)
def test_a_reference_is_reduced_to_an_area_and_cut_to_multiples(
    size: tuple[int, int], max_area: int, fitted: tuple[int, int]
) -> None:
    assert fit_image(Image.new("RGB", size), max_area, 16).size == fitted


def test_a_reference_is_cut_from_its_middle_and_has_three_channels() -> None:
    image = Image.new("L", (20, 22), 10)
    image.putpixel((2, 3), 200)  # the corner of the 16 x 16 in the middle
    found = fit_image(image, 10_000, 16)
    assert (found.size, found.mode) == ((16, 16), "RGB")
    assert found.getpixel((0, 0)) == (200, 200, 200)
    assert found.getpixel((1, 1)) == (10, 10, 10)


@pytest.mark.parametrize(
    ("size", "fitted"), [((100, 60), (96, 48)), ((2048, 1024), (1024, 512)), ((8, 40), (16, 80)), ((20, 22), (16, 16))]
)
def test_an_input_of_omnigen_has_at_most_1024_pixels_a_side(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert omnigen._fitted(Image.new("RGB", size)).size == fitted


def test_references_of_one_shape_fit_one_batch() -> None:
    one, other = torch.zeros(2, 4, 4), torch.zeros(2, 4, 6)
    assert have_one_shape([[one, other], [one, other]])
    assert not have_one_shape([[one, other], [other, one]])
    assert not have_one_shape([[one], [one, one]])
    assert have_one_shape([[], []])
    assert have_one_shape([])


# ---- guidance --------------------------------------------------------------------------------------------------------


def guided_pipeline() -> GuidedFlowPipeline:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    return GuidedFlowPipeline(family_of("qwen_image", scheduler_config=config), nn.Identity(), None)


def test_guidance_leads_away_from_the_negative_prediction() -> None:
    pipeline = guided_pipeline()
    assert pipeline.guided(row(3.0), row(1.0), 4.0).tolist() == [[9.0]]
    assert [pipeline.is_guided(scale) for scale in (0.0, 1.0, 1.5, 4.0)] == [False, False, True, True]
    krea: Any = family_of("krea2", scheduler_config=pipeline.family.scheduler_config).pipeline(nn.Identity())
    assert krea.guided(row(3.0), row(1.0), 4.0).tolist() == [[11.0]]


def test_noise_levels_before_each_step_end_one_step_above_zero_and_are_shifted() -> None:
    pipeline = guided_pipeline()
    assert pipeline.first_sigmas(4) == [1.0, 0.75, 0.5, 0.25]
    assert pipeline.sampling_mu(100, 4) == pytest.approx(math.log(3))
    # Shifted by 3: 3 s / (1 + 2 s).
    found = pipeline.set_sigmas(4, torch.zeros(1, 16, 8, 8))
    assert found == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert len(pipeline.scheduler.timesteps) == 4


def test_omnigen_compares_with_the_negative_prompt_and_with_the_images_alone() -> None:
    assert omnigen._guided(row(5.0), 1, 3.0, 2.0).tolist() == [[5.0]]
    assert omnigen._guided(torch.tensor([[5.0], [1.0]]), 2, 3.0, 2.0).tolist() == [[13.0]]
    # 1 + 2 * (2 - 1) + 3 * (5 - 2)
    assert omnigen._guided(torch.tensor([[5.0], [1.0], [2.0]]), 3, 3.0, 2.0).tolist() == [[12.0]]
    image = Image.new("RGB", (16, 16))
    rows = [("a", [image]), ("b", [])]
    assert omnigen._guidance_rows(rows, ["no", "not"], 1) == rows
    assert omnigen._guidance_rows([("b", [])], ["no"], 1.5) == [("b", []), ("no", [])]
    assert omnigen._guidance_rows(rows, ["no", "not"], 2) == [
        *rows, ("no", []), ("not", []), (image_placeholders(1), [image]), ("not", [])
    ]  # fmt: skip


def test_negative_prompts_of_omnigen_are_one_for_all_or_one_each() -> None:
    assert omnigen._negative_prompts("no", 2) == ["no", "no"]
    assert omnigen._negative_prompts(["no", "not"], 2) == ["no", "not"]
    assert omnigen._negative_prompts(None, 1) == [omnigen.DEFAULT_NEGATIVE_PROMPT]
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        omnigen._negative_prompts(["no"], 2)


@pytest.mark.parametrize(
    ("given", "size"), [((None, None), (1024, 1024)), ((512, None), (512, 1024)), ((64, 96), (64, 96))]
)
def test_images_of_omnigen_have_the_size_of_its_samples_and_whole_tokens(given: Any, size: tuple[int, int]) -> None:
    pipeline: Any = SimpleNamespace(default_sample_size=128, vae_scale_factor=8)
    assert omnigen.OmniGenPipeline._check_size(pipeline, *given) == size
    with pytest.raises(ValueError, match="must be multiples of 16, not 64 and 40"):
        omnigen.OmniGenPipeline._check_size(pipeline, 64, 40)


@pytest.mark.parametrize("change", [{"invert_sigmas": False}, {"num_train_timesteps": 1000}, {}])
def test_a_scheduler_that_counts_from_data_is_refused_for_omnigen(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"invert_sigmas": True, "num_train_timesteps": 1, **change} if change else {}))
    with pytest.raises(DataError, match="pretrained_model_name_or_path: the model's scheduler does not count time as"):
        omnigen.build_pipeline(family_of("omnigen", str(tmp_path)), nn.Identity(), None)


# ---- pipelines -------------------------------------------------------------------------------------------------------


def test_noise_has_the_size_of_the_image_in_latents_and_other_sizes_are_refused() -> None:
    pipeline = FlowPipeline(family_of("sd3"), nn.Identity(), None)  # 16 channels, 8 pixels, patches of 2
    assert pipeline.first_latents(2, 64, 32, torch.Generator().manual_seed(0), None).shape == (2, 16, 8, 4)
    given = pipeline.first_latents(1, 64, 32, None, torch.ones(1, 16, 8, 4, dtype=torch.float64))
    assert given.dtype == torch.float32
    for height, width in ((64, 40), (72, 64)):
        with pytest.raises(ValueError, match=f"must be multiples of 16, not {height} and {width}"):
            pipeline.first_latents(1, height, width, None, None)


def test_a_pipeline_without_a_vae_gives_latents_alone_and_takes_no_references() -> None:
    pipeline = FlowPipeline(family_of("sd3"), nn.Identity(), None)
    pipeline.require_vae("latent", [[]])
    pipeline.require_vae("latent", None)
    with pytest.raises(ValueError, match="it can take no references"):
        pipeline.require_vae("latent", [[Image.new("RGB", (16, 16))]])
    with pytest.raises(ValueError, match='it can not give "pil", only "latent"'):
        pipeline.require_vae("pil", None)
    FlowPipeline(family_of("sd3"), nn.Identity(), nn.Identity()).require_vae("pil", None)
    scheduler = SimpleNamespace()
    live = LivePipeline(family_of("sd3"), SimpleNamespace(set_progress_bar_config=lambda disable: None), None)
    live.scheduler = scheduler
    assert live.scheduler is live.pipeline.scheduler is scheduler
    with pytest.raises(ValueError, match='output_type must be "latent", not "pil"'):
        live("a", height=64, width=64)
    with pytest.raises(ValueError, match="it can take no references"):
        live.encode_reference(Image.new("RGB", (64, 64)), 4096)


def test_steps_follow_the_scheduler_and_what_a_callback_answers_goes_on() -> None:
    pipeline = FlowPipeline(family_of("sd3"), nn.Identity(), None)
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.5])
    asked: list[tuple[list[float], int]] = []

    def predict(latents: Tensor, sigmas: Tensor, step: int) -> Tensor:
        asked.append((sigmas.tolist(), step))
        return torch.full_like(latents, 2.0)

    def callback(_: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": given["latents"] + 10} if step == 0 else {}

    found = pipeline.denoise(torch.zeros(2, 1), [1.0, 0.5], predict, callback)
    # Each step goes half of the way against the prediction: 0 - 1 + 10 - 1.
    assert found.tolist() == [[8.0], [8.0]]
    assert asked == [([1.0, 1.0], 0), ([0.5, 0.5], 1)]


def test_embeddings_of_prompts_of_other_lengths_are_padded_together_with_masks() -> None:
    lengths = {"a": 1, "b": 3, "": 2}
    family: Any = family_of("auraflow")
    family.condition_on = lambda *given: ModelFamily.condition_on(family, *given)
    family.prompts = SimpleNamespace(
        embeds=lambda texts: [PromptEmbeds({"prompt_embeds": torch.full((lengths[text], 2), 1.0)}) for text in texts]
    )
    pipeline = SimpleNamespace(set_progress_bar_config=lambda disable: None)
    found = MaskedLivePipeline(family, pipeline, None).prompt_arguments(["a", "b"], None, 3.5)
    assert (found["guidance_scale"], found["negative_prompt"]) == (3.5, None)
    assert found["prompt_attention_mask"].tolist() == [[True, False, False], [True, True, True]]
    assert found["negative_prompt_attention_mask"].tolist() == [[True, True, False]] * 2
    assert found["prompt_embeds"][0, :, 0].tolist() == [1.0, 0.0, 0.0]
    assert found["negative_prompt_embeds"][1, :, 0].tolist() == [1.0, 1.0, 0.0]


# ---- families --------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_in_the_dtype_of_the_model_and_masked_where_they_differ() -> None:
    family = family_of()
    family.dtype = torch.bfloat16
    rows = [
        PromptEmbeds({"prompt_embeds": torch.ones(length, 2), "ids": torch.full((length,), length)})
        for length in (1, 3)
    ]
    reference = torch.ones(2, 4, 4)
    found = family.condition_on(rows, [[reference], []])
    assert found["prompt_embeds"].dtype == found.references[0][0].dtype == torch.bfloat16
    assert found["ids"].tolist() == [[1, 0, 0], [3, 3, 3]]
    assert found["ids"].dtype == torch.int64
    assert found["prompt_mask"].tolist() == [[True, False, False], [True, True, True]]
    assert found.num_tokens == [1, 3]
    assert [len(each) for each in found.references] == [1, 0]
    assert family.condition_on([PromptEmbeds({"ids": torch.ones(2)})] * 2, ()).num_tokens == []  # a family of one's own
    alike = family.condition_on(rows[1:] * 2, ())
    assert "prompt_mask" not in alike.tensors
    assert [len(each) for each in alike.references] == [0, 0]


def test_latents_are_drawn_shifted_and_scaled_once() -> None:
    moments = LatentMoments(torch.tensor([[[3.0]]]), torch.tensor([[[2.0]]]))
    draw = torch.randn((1, 1, 1), generator=torch.Generator().manual_seed(5)).item()
    config = {"shift_factor": 1.0, "scaling_factor": 0.5}
    found = family_of().latents_from_moments(moments, torch.Generator().manual_seed(5), config)
    assert found.item() == pytest.approx((3 + 2 * draw - 1) * 0.5)
    vae: Any = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float64)
    vae.decode = lambda raw, return_dict: (raw,)
    decoded = family_of().decode_latents(vae, found.reshape(1, 1, 1, 1))
    assert decoded.item() == pytest.approx(3 + 2 * draw)
    assert decoded.dtype == torch.float64


def test_prompts_longer_than_the_limit_are_counted_and_encoders_know_their_place() -> None:
    def tokenizer(prompts: list[str], **options: Any) -> Any:
        length = options.get("max_length")
        rows = [[ord(letter) for letter in prompt][:length] for prompt in prompts]
        if options.get("return_tensors"):
            rows = [nn.functional.pad(torch.tensor(each), (0, length - len(each))) for each in rows]
            ids = torch.stack(rows)
            return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})
        return SimpleNamespace(input_ids=rows)

    family: Any = family_of("sdxl")
    family.number_formats = NumberFormats(encoders=("int8-quanto", "nf4-bnb"))
    encoders = family.encoders
    encoders._tokenizers["tokenizer"], encoders._encoders["text_encoder"] = tokenizer, nn.Identity()
    assert encoders.count("tokenizer", ["abc", ""]) == [3, 0]
    encoders.note_cut_prompts("tokenizer", ["abc", "abcd", "abcde", "abcdef"], 4)
    assert family.num_cut_prompts == 2
    ids, mask = encoders.tokenize("tokenizer", ["abc", "b"], 2)
    assert (ids.tolist(), mask.tolist()) == ([[97, 98], [98, 0]], [[1, 1], [1, 0]])
    assert [encoders.precision(name) for name in ("text_encoder", "text_encoder_2")] == ["int8-quanto", "nf4-bnb"]
    assert encoders.encoder() is encoders._encoders["text_encoder"]
    family.free_prompt_encoders()
    assert (encoders._encoders, list(encoders._tokenizers)) == ({}, ["tokenizer"])


def test_the_way_of_a_vae_to_take_less_memory_is_switched_on_or_refused() -> None:
    family = family_of()
    family.vae_modes = ("slicing", "tiling")
    switched: list[str] = []
    vae = nn.Module()
    vae.enable_slicing = lambda: switched.append("slicing")
    vae.enable_tiling = lambda: switched.append("tiling")
    assert family._with_modes(vae) is vae
    assert switched == ["slicing", "tiling"]
    with pytest.raises(ConfigError, match="vae_enable_slicing: Identity, the VAE of this model, has no slicing"):
        family._with_modes(nn.Identity())


def test_settings_of_prompts_are_those_that_are_not_the_default() -> None:
    family = family_of()
    assert family.prompt_settings == {}
    assert family.max_prompt_tokens == 256
    family.prompt_length, family.clip_skip, family.force_zeros_for_empty_prompt = 77, 2, False
    assert family.prompt_settings == {"prompt_length": 77, "clip_skip": 2, "force_zeros_for_empty_prompt": False}
    assert family.max_prompt_tokens == 77


def test_flow_families_mix_and_predict_what_lies_between_data_and_noise() -> None:
    family, data, noise, sigmas = family_of(), row(2.0), row(6.0), torch.tensor([0.25])
    assert family.make_noisy(data, noise, sigmas).tolist() == [[3.0]]
    assert family.make_target(data, noise, sigmas).tolist() == [[4.0]]
    assert family.estimate_data(row(3.0), row(4.0), sigmas).tolist() == [[2.0]]
    assert [part.tolist() for part in family.signal_and_noise(sigmas)] == [[0.75], [0.25]]


@pytest.mark.parametrize(("prediction", "target"), [("epsilon", 6.0), ("v_prediction", 0.8 * 6 - 0.6 * 2)])
def test_discrete_families_predict_noise_or_v_as_their_scheduler_says(prediction: str, target: float) -> None:
    """One noise level with a cumulative product of 0.64: a signal of 0.8 and a noise of 0.6."""
    config = {"num_train_timesteps": 1, "trained_betas": [0.36], "prediction_type": prediction}
    family = family_of("sdxl", scheduler_config={"_class_name": "DDPMScheduler", "beta_start": 0.36, "beta_end": 0.36,
                                                 "beta_schedule": "linear", **config})  # fmt: skip
    assert isinstance(family, DiscreteFamily)
    sigmas = torch.tensor([1.0])
    noisy = family.make_noisy(row(2.0), row(6.0), sigmas)
    assert noisy.item() == pytest.approx(0.8 * 2 + 0.6 * 6)
    assert family.make_target(row(2.0), row(6.0), sigmas).item() == pytest.approx(target)
    assert family.estimate_data(noisy, row(target), sigmas).item() == pytest.approx(2.0, rel=1e-5)


def test_noise_levels_of_edm_are_refused_by_the_name_of_their_scheduler() -> None:
    family: Any = family_of("sdxl", "some/model", scheduler_config={"_class_name": "EDMEulerScheduler"})
    message = "pretrained_model_name_or_path: some/model has a EDMEulerScheduler: noise levels of EDM are not built"
    with pytest.raises(ConfigError, match=message):
        _ = family.schedule


def test_empty_tensors_of_a_file_say_what_its_weights_predict(tmp_path: Any) -> None:
    for names, expected in (
        ((), {}),
        (("v_pred",), {"prediction_type": "v_prediction"}),
        (("ztsnr",), {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    ):
        file = str(tmp_path / f"{len(names)}{''.join(names)}.safetensors")
        save_file({name: torch.zeros(0) for name in (*names, "weight")}, file)
        assert objective_marks(file) == expected
        assert refused_marks(file) == []
    save_file({name: torch.zeros(0) for name in ("edm_std", "edm_vpred.sigma_max", "edm_mean")}, file)
    assert refused_marks(file) == ["edm_vpred.sigma_max", "edm_mean", "edm_std"]


def test_numbers_of_the_releases_are_theirs() -> None:
    """Of the published code and configurations that each module names."""
    assert (flux.TRAINING_GUIDANCE, flux.CLIP_TOKENS, flux.TOKENS_WITHOUT_GUIDANCE) == (1.0, 77, 256)
    assert (flux2.TRAINING_GUIDANCE, flux2.REFERENCE_INDEX) == (1.0, 10)
    assert flux2.STATES == {"qwen3": (9, 18, 27), "mistral3": (10, 20, 30)}
    assert (hunyuan_dit.BERT_TOKENS, hunyuan_dit.BASE_SIZE, sd3.CLIP_TOKENS) == (77, 512, 77)
    assert (krea2.PREFIX_TOKENS, krea2.SUFFIX_TOKENS, krea2.DISTILLED_MU) == (34, 5, 1.15)
    assert (omnigen.MAX_REFERENCE_SIDE, tokens.PIXELS_PER_TOKEN, tokens.PAD_ID) == (1024, 16, 2)
    assert (omnigen2.MAX_REFERENCE_PIXELS, omnigen2.MAX_REFERENCE_SIDE, omnigen2.IMAGE_GUIDANCE) == (2**20, 1024, 2.0)
    assert (omnigen2.PIXELS_PER_TOKEN, omnigen2_network.MAX_REFERENCES, omnigen2_network.THETA) == (16, 5, 10000.0)
    assert (qwen_image.TEMPLATE_TOKENS, preparation.TEMPLATE_TOKENS, preparation.SIDE_MULTIPLE) == (34, 64, 32)
    assert (qwen_image_edit.AREA_OF_ONE, qwen_image_edit.AREA_OF_SEVERAL) == (2**20, 147456)
    assert (guided.MAX_REFERENCE_PIXELS, QwenImage21.reference_area) == (2**20, 2**20)
    assert safe_loading.MAX_JSON_BYTES == 200_000_000
    assert tokens._quoted("x" * 120) == f'"{"x" * 100}"'


@pytest.mark.parametrize(
    ("name", "denoiser", "scheduler", "architecture", "version"),
    [
        ("sd15", {}, {}, "stable-diffusion-v1", "sd_v1"),
        ("sd15", {}, {"prediction_type": "v_prediction"}, "stable-diffusion-v1", "sd_v1_v"),
        ("sd15", {"use_linear_projection": True}, {}, "stable-diffusion-v2-512", "sd_v2"),
        (
            *("sd15", {"use_linear_projection": True}, {"prediction_type": "v_prediction"}),
            *("stable-diffusion-v2-768-v", "sd_v2_v"),
        ),
        ("sd3", {"dual_attention_layers": [0], "qk_norm": "rms_norm"}, {}, "stable-diffusion-3.5-medium", "sd3"),
        ("sd3", {"qk_norm": "rms_norm"}, {}, "stable-diffusion-3.5-large", "sd3"),
        ("sd3", {}, {}, "stable-diffusion-3-medium", "sd3"),
        ("flux", {"guidance_embeds": True}, {}, "flux-1-dev", "flux1"),
        ("flux", {}, {}, "flux-1-schnell", "flux1"),
        ("flux2", {"guidance_embeds": True}, {}, "flux-2-dev", "flux2"),
        ("flux2", {}, {}, "flux-2-klein", "flux2"),
        ("hunyuan_dit", {"use_style_cond_and_image_meta_size": False}, {}, "hunyuan-dit-v1.2", "hunyuan-dit"),
        ("hunyuan_dit", {}, {}, "hunyuan-dit-v1.1", "hunyuan-dit"),
    ],
)
def test_a_configuration_says_which_weights_of_a_family_they_are(
    name: str, denoiser: Any, scheduler: Any, architecture: str, version: str
) -> None:
    family = family_of(name, denoiser_config=denoiser, scheduler_config=scheduler)
    spec = family.spec_of_weights
    assert family.architecture == spec.keys.architecture == architecture
    assert (spec.keys.base_model_version, spec.prediction_type) == (version, family.prediction_type)
    if name == "flux":
        assert family.max_prompt_tokens == (512 if denoiser else 256)
        family.prompt_length = 99
        assert family.max_prompt_tokens == 99
    if name == "flux2":
        assert spec.pipeline_class == ("Flux2Pipeline" if denoiser else "Flux2KleinPipeline")


# ---- facts as data ---------------------------------------------------------------------------------------------------


def test_an_empty_negative_prompt_and_none_may_be_other_texts() -> None:
    texts = {name: [get_spec(name).negative_text(text) for text in (None, "", "x")] for name in ("sdxl", "lumina2")}
    assert texts == {"sdxl": ["", " ", "x"], "lumina2": ["", "", "<Negative> x"]}
    assert get_spec("sana").negative_text("x") == "<plain>x"
    assert get_spec("qwen_image").negative_text(None) == " "


def test_bytes_sizes_and_forms_follow_from_the_facts() -> None:
    assert Flavour("a", "b/c", parameters=1000).weight_bytes() == 2000
    assert Flavour("a", "b/c", parameters=1000).weight_bytes(4) == 500
    assert [get_spec(name).size_multiple for name in ("sd3", "sdxl", "flux2", "sana")] == [16, 8, 16, 32]
    forms = [get_spec(name).default_form(kind) for name in ("sdxl", "flux") for kind in ("lora", "dora")]
    assert forms == ["kohya", "diffusers", "diffusers", "diffusers"]
    assert Component("a", "transformers.CLIPTextModel", "text_encoder").index_entry == ["transformers", "CLIPTextModel"]
    assert Component("a", "x.y.Z", "vae", library="kolors").index_entry == ["kolors", "Z"]
    with pytest.raises(KeyError, match="sdxl has 2 components of role text_encoder"):
        get_spec("sdxl").component("text_encoder")
    assert get_spec("sd15").defaults_for("2.1")["validation_resolution"] == "768x768"
    assert get_spec("sd15").defaults_for(None)["validation_resolution"] == "512x512"
    assert get_spec("sd15").defaults_for("unknown") == dict(get_spec("sd15").defaults)


def test_parts_come_from_the_model_or_from_a_place_of_their_own() -> None:
    spec = get_spec("sd3")
    parts = {part.name: part for part in spec.components}
    encoders = {"text_encoder_2": "clip.safetensors", "text_encoder_3": WITHOUT}
    source = ModelSource("m/m", vae="vae/folder", denoiser="denoiser/folder", encoders=encoders)
    assert [name for name in parts if parts[name] not in source.parts(spec)] == ["text_encoder_3", "tokenizer_3"]
    assert [source.lacks(name) for name in ("text_encoder_2", "text_encoder_3")] == [False, True]
    assert {name: source.own_place(part) for name, part in parts.items() if source.own_place(part)} == {
        "transformer": "denoiser/folder",
        "vae": "vae/folder",
        **encoders,
    }
    assert [source.file_of(parts[name]) for name in ("vae", "text_encoder", "text_encoder_2")] == [
        None, None, "clip.safetensors"
    ]  # fmt: skip
    lacking: Any = family_of("sd3")
    lacking.source = source
    assert (lacking.max_prompt_tokens, lacking._longest_tokenizer) == (77, "tokenizer")
    assert lacking.prompt_facts()["rows_of_zeros"] == 256
    assert family_of("sd3")._longest_tokenizer == "tokenizer_3"
