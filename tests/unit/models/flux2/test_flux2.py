"""FLUX.2 against what diffusers' pipelines and training scripts gave, and against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.batch import Batch, Conditioning, PromptEmbeds
from simpletuner.cache.fingerprints import prompt_fingerprint
from simpletuner.data.digests import DigestMemo
from simpletuner.families.registry import get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.models.flux2.family import STATES
from simpletuner.models.local_check import check_local_model
from tests.golden_cases import GivenPrompts, assert_near, assert_trains_as, family_of
from tests.tiny_flux2 import GOLDEN, tiny_flux2_folder

PROMPTS = ["a red fox in the snow, at dusk", "two blue cups", ""]
CASES = {case["file"].removesuffix(".safetensors"): case for case in json.loads((GOLDEN / "cases.json").read_text())}


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    return family_of("flux2", tiny_flux2_folder(tmp_path_factory.mktemp("klein")))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    return family_of("flux2", tiny_flux2_folder(tmp_path_factory.mktemp("dev"), "dev"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    folder = tiny_flux2_folder(tmp_path_factory.mktemp("distilled"))
    index = json.loads((folder / "model_index.json").read_text()) | {"is_distilled": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    return family_of("flux2", folder)


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def references_of(tensors: dict[str, Tensor], kind: str) -> list[Tensor]:
    return [tensors[f"reference_{k}{kind}"] for k in range(9) if f"reference_{k}{kind}" in tensors]


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2])
def test_klein_reads_three_layers_of_qwen3_padding_included(klein: ModelFamily, number: int):
    expected = golden(f"klein_prompt_{number}")
    [found] = klein.encode_prompts([PROMPTS[number]])
    assert_near(found.tensors["prompt_embeds"], expected["prompt_embeds"])
    assert klein.count_prompt_tokens([PROMPTS[number]]) == [int(expected["attention_mask"].sum())]


def test_dev_reads_three_layers_of_mistral_behind_its_padding(dev: ModelFamily):
    expected = golden("dev_prompt_0")
    [found] = dev.encode_prompts(PROMPTS[:1])
    is_prompt = expected["attention_mask"].bool()
    assert not is_prompt[0]  # the padding is on the left
    assert is_prompt[-1]
    rows = found.tensors["prompt_embeds"]
    assert_near(rows[is_prompt], expected["prompt_embeds"][is_prompt])
    assert_near(rows, expected["prompt_embeds"])  # also the padding, which only sdpa gives
    assert dev.encoders.encoder().config._attn_implementation == "sdpa"


def test_marks_of_images_in_a_prompt_are_no_marks_for_dev(dev: ModelFamily):
    plain, marked = dev.encode_prompts(["a cat", "a [IMG]cat"])
    assert torch.equal(plain.tensors["prompt_embeds"], marked.tensors["prompt_embeds"])


def test_a_long_prompt_is_cut_and_counted(klein: ModelFamily):
    before = klein.num_cut_prompts
    [rows] = klein.encode_prompts(["word " * 300])
    assert rows.tensors["prompt_embeds"].shape == (512, 48)
    assert klein.num_cut_prompts == before + 1


def test_how_text_is_read_is_part_of_the_cache_key(klein: ModelFamily, tmp_path: Path, monkeypatch):
    before = prompt_fingerprint(klein, DigestMemo(tmp_path / "memo"))
    monkeypatch.setitem(STATES, "qwen3", (8, 18, 27))
    assert prompt_fingerprint(klein, DigestMemo(tmp_path / "memo")) != before


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_latents_are_patches_scaled_by_the_statistics_among_the_weights_of_the_vae(klein: ModelFamily):
    case, vae = golden("vae_case"), klein.load_vae()
    moments = klein.encode_images(vae, case["pixels"])
    assert all(each.std is None for each in moments)  # FLUX.2 is trained on the mode
    assert_near(torch.stack([each.mean for each in moments]), case["patchified"])
    latents = torch.stack([klein.latents_from_moments(e, torch.Generator(), klein.vae_config) for e in moments])
    assert_near(latents, case["latents"])
    assert_near(klein.decode_latents(vae, case["latents"]), case["decoded"])


# ---- prediction and sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["klein_t2i", "klein_distilled", "klein_references", "dev_t2i", "dev_references"])
def test_the_pipeline_makes_the_calls_and_the_latents_of_diffusers(
    klein: ModelFamily, dev: ModelFamily, distilled: ModelFamily, name: str, monkeypatch
):
    case, tensors = CASES[name], golden(name)
    family = dev if case["folder"] == "dev" else distilled if case["is_distilled"] else klein
    texts = [*case["prompts"], *([""] if case["calls_per_step"] == 2 else [])]
    states = [tensors[f"call_{call}.encoder_hidden_states"][0] for call in range(case["calls_per_step"])]
    given = {text: {"prompt_embeds": rows} for text, rows in zip(texts, states, strict=True)}
    monkeypatch.setattr(family, "prompts", GivenPrompts(given))
    images = [Image.fromarray(each.numpy()) for each in references_of(tensors, ".picture")]
    denoiser = family.load_denoiser()
    pipeline = family.pipeline(denoiser, family.load_vae())
    for image, expected in zip(images, references_of(tensors, ".latents"), strict=True):
        assert_near(pipeline.encode_fitted(pipeline.fit_reference(image))[None], expected)
    calls: list[dict[str, Tensor]] = []

    def record(_module, _args, kwargs, output):
        calls.append({**kwargs, "output": output[0]})

    denoiser.register_forward_hook(record, with_kwargs=True)
    final = pipeline(
        case["prompts"],
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance_scale"],
        latents=tensors["latents"],
        references=[images],
        output_type="latent",
    ).images
    assert_near(pipeline.scheduler.sigmas, tensors["scheduler_sigmas"])
    assert len(calls) == case["steps"] * case["calls_per_step"]
    for call in range(case["calls_recorded"]):
        for part in ("hidden_states", "timestep", "output"):
            assert_near(calls[call][part], tensors[f"call_{call}.{part}"])
        if f"call_{call}.img_ids" in tensors:
            assert torch.equal(calls[call]["img_ids"], tensors[f"call_{call}.img_ids"][0])
            assert torch.equal(calls[call]["txt_ids"], tensors[f"call_{call}.txt_ids"][0])
        if "call_0.guidance" in tensors:
            assert_near(calls[call]["guidance"], tensors["call_0.guidance"])
        else:
            assert calls[call]["guidance"] is None
    assert_near(final, tensors["final_latents"])


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_a_step_of_training_has_the_loss_and_the_gradients_of_the_public_script(kind: str, request):
    family, tensors = request.getfixturevalue(kind), golden(f"{kind}_training")

    def conditioning() -> Conditioning:
        rows = [PromptEmbeds({"prompt_embeds": tensors["prompt_embeds"][0]})]
        return family.condition_on(rows, [[each[0] for each in references_of(tensors, "")]])

    assert_trains_as(family, tensors, conditioning)


def test_rows_whose_references_have_other_shapes_are_as_each_alone(klein: ModelFamily):
    """Also where they have as many tokens: positions of one row for all would be wrong without an error."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[(4, 6)], [(6, 4)], [(2, 12)], []]
    references = [[torch.randn(128, *size, generator=generator) for size in row] for row in shapes]
    latents = torch.randn(4, 128, 4, 4, generator=generator)
    embeds = klein.encode_prompts([*PROMPTS, "a cat"])
    batch = Batch(latents, embeds, [0, 1, 2, 3], [""] * 4, torch.ones(4), "", references=references)
    sigmas = torch.tensor([0.2, 0.5, 0.7, 0.9])
    denoiser = klein.load_denoiser()
    with torch.no_grad():
        together = klein.predict(denoiser, latents, sigmas, klein.collate(batch))
        for i in range(4):
            one = slice(i, i + 1)
            alone = klein.predict(denoiser, latents[one], sigmas[one], klein.condition_on(embeds[one], references[one]))
            torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "training", "four_steps", "fifty_steps"),
    [
        (512, 0.6300, 2.0307, 1.7020),
        (768, 0.8467, 2.1392, 1.8359),
        (1024, 1.1500, 2.2912, 2.0234),
        (1280, 1.54, 1.54, 1.54),
    ],
)
def test_training_is_shifted_as_flux_1_and_sampling_by_size_and_steps(
    klein: ModelFamily, side: int, training: float, four_steps: float, fifty_steps: float
):
    """mu worked out by hand; a token is a patch of 16 x 16 pixels, counted once."""
    latents = torch.zeros(1, 128, side // 16, side // 16)
    [sigma] = klein.sigmas_at(torch.tensor([0.5]), latents).tolist()
    assert math.log(sigma / (1 - sigma)) == pytest.approx(training, abs=1e-4)
    pipeline = klein.pipeline(klein.load_denoiser())
    num_tokens = (side // 16) ** 2
    assert pipeline.sampling_mu(num_tokens, 4) == pytest.approx(four_steps, abs=1e-4)
    assert pipeline.sampling_mu(num_tokens, 50) == pytest.approx(fifty_steps, abs=1e-4)


def test_a_large_reference_is_reduced_to_a_megapixel_and_cut_to_whole_tokens(klein: ModelFamily):
    pipeline = klein.pipeline(klein.load_denoiser())
    assert pipeline.fit_reference(Image.new("RGB", (2048, 1024))).size == (1440, 720)  # 1448 x 724, cut
    assert pipeline.fit_reference(Image.new("RGB", (100, 90))).size == (96, 80)  # never enlarged


# ---- which weights they are ------------------------------------------------------------------------------------------


def test_files_name_the_pipeline_and_the_architecture_of_their_weights(klein: ModelFamily, dev: ModelFamily):
    named = [(f.spec_of_weights.pipeline_class, f.spec_of_weights.keys.architecture) for f in (klein, dev)]
    assert named == [("Flux2KleinPipeline", "flux-2-klein"), ("Flux2Pipeline", "flux-2-dev")]


def test_the_model_with_cached_references_is_refused_by_name(tmp_path: Path):
    folder = tiny_flux2_folder(tmp_path / "kv")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "Flux2KleinKVPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    for model in (str(folder), "black-forest-labs/FLUX.2-klein-9B-kv"):
        [problem] = check_local_model(ModelSource(model), get_spec("flux2"))
        assert "another network" in problem.render()
    assert check_local_model(ModelSource("black-forest-labs/FLUX.2-klein-9B"), get_spec("flux2")) == []


def test_the_last_norm_is_no_default_target():
    """No file of it is right in diffusers and ComfyUI both: its halves are exchanged in the original."""
    assert not any("norm_out" in pattern for pattern in get_spec("flux2").default_lora_targets)
