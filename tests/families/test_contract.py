"""What every registered family must keep to, on tiny random weights: registering a family is enrolling it here."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Pipeline, SanaPipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor, nn

from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.batch import Batch
from simpletuner.diffusion.loss import sample_means
from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import LatentMoments, ModelFamily
from simpletuner.models.krea2 import family as krea2
from simpletuner.models.local_check import check_local_model
from simpletuner.models.lumina2 import family as lumina2
from simpletuner.models.omnigen2 import family as omnigen2
from simpletuner.models.qwen_image import family as qwen_image
from simpletuner.models.qwen_image_edit import preparation
from simpletuner.reporting.events import PreviewMade
from simpletuner.training.losses.l2 import squared_error
from simpletuner.training.planning.memory import decode_bytes
from simpletuner.validation.files import ImageFiles
from simpletuner.validation.previews import Previews
from simpletuner.validation.prompts import GenerationSettings, ImageRequest
from tests.tiny_folders import TINY_FOLDERS

PROMPTS = ["a cat", "a green star on a white background"]
# Layers whose output nobody reads: the text that leaves the last block of the tiny network.
UNREAD_LAYERS = dict.fromkeys(("qwen_image", "qwen_image_edit"), ("transformer.blocks.1.attn.to.add.out",))


@pytest.fixture(scope="module", params=family_names())
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    assert request.param in TINY_FOLDERS, f"tests/tiny_folders.py has no tiny {request.param}"
    spec = get_spec(request.param)
    folder = TINY_FOLDERS[request.param](tmp_path_factory.mktemp(request.param))
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


def batch_of(family: ModelFamily, latents: Tensor, prompts: list[str]) -> Batch:
    return Batch(
        latents=latents,
        prompt_embeds=family.encode_prompts(prompts),
        slots=list(range(len(prompts))),
        digests=[""] * len(prompts),
        loss_weights=torch.ones(len(prompts)),
        dataset_id="test",
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_shape(family: ModelFamily, count: int) -> tuple[int, int, int, int]:
    return count, family.spec.latent_channels, 8, 12


def test_the_tiny_folder_has_every_component(family: ModelFamily):
    assert check_local_model(family.source, family.spec) == []


# Of the tiny folders: tokens of two prompts and of none, the longest side, what files call the weights, whether prompts
# are read one by one, and the shift of training for an image of 1024 patches.
OF_WEIGHTS = {
    "omnigen": ([20, 26, 16], 256, "omnigen-v1", False, 1.0),
    "sdxl": ([6, 12, 2], None, "stable-diffusion-xl-v1-base", False, 1.0),
    "sd15": ([6, 12, 2], None, "stable-diffusion-v1", False, 1.0),
    "flux": ([7, 16, 1], None, "flux-1-dev", False, 1.8776),
    "sd3": ([7, 16, 1], 256, "stable-diffusion-3.5-medium", False, 3.0),
    "chroma": ([6, 14, 1], None, "chroma", False, 1.8776),
    "omnigen2": ([113, 122, 108], None, "omnigen2", True, 1.0),
    "kolors": ([6, 12, 2], None, "kolors", False, 1.0),
    "hunyuan_dit": ([7, 16, 1], None, "hunyuan-dit-v1.1", False, 1.0),
    "qwen_image": ([133, 142, 128], None, "Qwen-Image", True, 1.7138),
    "qwen_image_edit": ([274, 283, 269], None, "Qwen-Image-Edit", True, 1.7138),
    "z_image": ([24, 33, 19], 8192, "Z-Image", False, 3.0),
    "flux2": ([30, 39, 25], None, "flux-2-klein", False, 1.8776),
    "krea2": ([125, 134, 120], None, "krea-2", True, 1.7883),
    "qwen_image_21": ([24, 33, 20], None, "qwen-image-2.1", True, 2.0008),
    "pixart_sigma": ([7, 16, 1], None, "pixart-sigma", False, 1.0),
    "sana": ([7, 16, 2], None, "sana", True, 3.0),
    "auraflow": ([4, 10, 0], 256, "auraflow", False, 1.73),
    "lumina2": ([170, 179, 1], 8192, "lumina-2", True, 6.0),
}
# What decides the embeddings of a prompt beside family and length: a part of the key of every cached one.
PROMPT_FACTS = {
    "sdxl": {"zeroes_empty_prompts": True},
    "sd15": {"clip_skip": 1},
    "omnigen2": {"template": [omnigen2.TEMPLATE, omnigen2.SYSTEM_PROMPT, omnigen2.DROPPED_SYSTEM_PROMPT]},
    "qwen_image": {"template": [qwen_image.TEMPLATE, 34]},
    "qwen_image_edit": {"template": [preparation.TEMPLATE, 64], "images": [True, 384 * 384]},
    "z_image": {"template": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", "layer": -2},
    "flux2": {"states": (9, 18, 27), "system": SYSTEM_MESSAGE},
    "krea2": {
        "template": [krea2.PREFIX, 34, "<|im_end|>\n<|im_start|>assistant\n", 5],
        "layers": [2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35],
    },
    "qwen_image_21": {
        "template": [
            "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n",
            "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
            "<image{}><|vision_start|><|image_pad|><|vision_end|>",
        ],
        "before the norm": True,
    },
    "pixart_sigma": {"lower_case": True},
    "sana": {
        "instruction": "\n".join(signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
    },
    "lumina2": {"template": lumina2.SYSTEM_PROMPT + "{prompt}", "layer": -2},
}


def test_what_the_weights_and_tokenizers_of_a_family_say(family: ModelFamily):
    name = family.spec.name
    found = (
        family.count_prompt_tokens(["a cat", "a cat on a mat", ""]),
        family.largest_side(),
        family.architecture,
        family.reads_prompts_singly,
        round(family.training_shift(1024), 4),
    )
    assert found == OF_WEIGHTS[name]
    own = {"family": family.spec.family_class, "max_prompt_tokens": family.spec.max_prompt_tokens}
    assert family.prompt_facts() == own | PROMPT_FACTS.get(name, {})


def test_a_batch_of_two_equals_two_batches_of_one(family: ModelFamily):
    denoiser = family.load_denoiser()
    latents, sigmas = randn(*latent_shape(family, 2)), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        together = family.predict(denoiser, latents, sigmas, family.collate(batch_of(family, latents, PROMPTS)))
        for i, prompt in enumerate(PROMPTS):
            one = slice(i, i + 1)
            conditioning = family.collate(batch_of(family, latents[one], [prompt]))
            alone = family.predict(denoiser, latents[one], sigmas[one], conditioning)
            torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


def test_the_prompt_and_sigma_reach_the_denoiser(family: ModelFamily):
    denoiser, latents = family.load_denoiser(), randn(*latent_shape(family, 1))

    def predict(prompt: str, sigma: float) -> Tensor:
        conditioning = family.collate(batch_of(family, latents, [prompt]))
        with torch.no_grad():
            return family.predict(denoiser, latents, torch.tensor([sigma]), conditioning)

    first = predict(PROMPTS[0], 0.3)
    assert first.shape == latents.shape
    assert (first - predict(PROMPTS[1], 0.3)).abs().max() > 1e-4
    assert (first - predict(PROMPTS[0], 0.6)).abs().max() > 1e-4


def test_the_loss_and_its_gradients_are_finite_with_and_without_checkpointing(family: ModelFamily):
    latents, noise = randn(*latent_shape(family, 2)), randn(*latent_shape(family, 2), seed=1)
    sigmas = family.sigmas_at(torch.tensor([0.3, 0.8], dtype=torch.float64), latents)
    gradients, begun_counts = [], []
    for uses_checkpointing in (False, True):
        denoiser = family.load_denoiser().train().requires_grad_(True)
        if uses_checkpointing:
            denoiser.enable_gradient_checkpointing()
        begun: list[nn.Module] = []
        blocks = [each for each in denoiser.modules() if type(each).__name__ in family.spec.block_classes]
        for block in blocks:
            block.register_forward_pre_hook(lambda module, inputs, begun=begun: begun.append(module))
        noisy_latents, target = (make(latents, noise, sigmas) for make in (family.make_noisy, family.make_target))
        conditioning = family.collate(batch_of(family, latents, PROMPTS))
        prediction = family.predict(denoiser, noisy_latents, sigmas, conditioning)
        loss = sample_means(squared_error(prediction, target)).mean()
        loss.backward()
        begun_counts.append(len(begun))
        assert loss.isfinite()
        gradients.append({name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None})
    assert begun_counts[1] >= 1.5 * begun_counts[0]  # again in the backward pass, but for some at an end in diffusers
    plain, checkpointed = gradients
    assert len(plain) > 0.9 * len(list(denoiser.parameters()))
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, checkpointed[name], rtol=0, atol=1e-6)


def test_with_an_adapter_only_the_adapter_gets_gradients(family: ModelFamily):
    denoiser = family.load_denoiser().train()
    target = family.spec.adaptable[0].class_name
    lycoris = {"algo": "lokr", "linear_dim": 10000, "factor": 2, "apply_preset": {"target_module": [target]}}
    adapter = attach_lycoris(denoiser, lycoris, family.spec, torch.float32, seed=0)
    latents = randn(*latent_shape(family, 2))
    conditioning = family.collate(batch_of(family, latents, PROMPTS))
    family.predict(denoiser, latents, torch.tensor([0.2, 0.7]), conditioning).square().mean().backward()
    unread = UNREAD_LAYERS.get(family.spec.name, ())
    own = {
        name: parameter
        for name, parameter in adapter.trainable_parameters().items()
        if not any(layer in name.replace("_", ".") for layer in unread)
    }
    assert own
    ids = {id(parameter) for parameter in own.values()}
    assert {id(parameter) for parameter in denoiser.parameters() if parameter.grad is not None} == ids
    gradients = [parameter.grad for parameter in own.values()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


class ExactAnswer(nn.Module):
    """Wraps a denoiser so that its raw output is the answer that `predict` turns into the target.

    A denoiser of diffusers answers with a tuple, and its pipeline reads its `config`, `device` and `dtype`.

    Args:
        answer: (1, ...) as the denoiser itself has its output, or a function of its first two inputs, the noisy
            latents and the time. What it answers in channels beyond these stays as it is.
    """

    def __init__(self, denoiser: nn.Module, answer: Tensor | Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.denoiser, self.answer_to = denoiser, answer if callable(answer) else lambda *_: answer

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name) if name == "denoiser" else getattr(self.denoiser, name)

    def forward(self, *args: object, **kwargs: object) -> object:
        output = self.denoiser(*args, **kwargs)
        if args and args[0] is None:
            return output
        answer = self.answer_to(*args[:2])
        if isinstance(output, tuple) and isinstance(output[0], list):  # one tensor a row, with an axis for frames
            return ([answer.reshape(row.shape) for row in output[0]],)
        if isinstance(output, tuple):
            return (as_first_channels(answer, output[0]),)
        return as_first_channels(answer, output)


def as_first_channels(answer: Tensor, output: Tensor) -> Tensor:
    if answer.shape[1:] == output.shape[1:]:
        return answer.expand_as(output)
    return torch.cat([answer.expand(len(output), -1, -1, -1), output[:, answer.shape[1] :]], dim=1)


def exact_v(family: ModelFamily, data: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What v is at a level, of what a sampler has there: it changes with the sample, other than velocity and noise.

    From `x = sqrt(abar) data + sqrt(1 - abar) noise` and `v = sqrt(abar) noise - sqrt(1 - abar) data`.
    """
    from diffusers import DDPMScheduler

    levels = DDPMScheduler.from_config(family.scheduler_config).alphas_cumprod.double()

    def answer(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        kept = levels[timesteps.reshape(-1).long()].reshape(-1, 1, 1, 1)
        return ((kept.sqrt() * noisy_latents - data) / (1 - kept).sqrt()).float()

    return answer


def raw_form(family: ModelFamily, latents: Tensor) -> Tensor:
    """(1, C, h, w) as the family's denoiser answers, by diffusers' own code where it packs."""
    pack = getattr(family.pipeline(family.load_denoiser()), "pack", None)
    return latents if pack is None else pack(latents)


def first_latents(family: ModelFamily, data: Tensor, noise: Tensor, num_steps: int) -> Tensor:
    """What a pipeline has to begin with so that exact answers lead to `data`.

    A flow begins with the noise itself, or a little below it. The last level of a discrete schedule still holds some
    data, by the scheduler's own `add_noise`; the pipeline multiplies what it is given by `init_noise_sigma`.
    """
    scheduler = family.pipeline(family.load_denoiser()).scheduler
    if family.spec.prediction_type == "flow" and not scheduler.config.get("use_flow_sigmas"):
        return noise
    scheduler.set_timesteps(num_steps)
    if family.spec.prediction_type == "flow":
        return (1 - scheduler.sigmas[0]) * data + scheduler.sigmas[0] * noise
    return scheduler.add_noise(data, noise, scheduler.timesteps[:1]) / scheduler.init_noise_sigma


def render_exactly(
    family: ModelFamily, watch: Callable[[int, int], Any] | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Draw in 20 steps with a denoiser that answers exactly: what came out, what should have, the data, and how nearly.

    Some discrete samplers end at the level with the least noise, not at the data.

    Args:
        watch: height and width of the image -> `callback_on_step_end`.
    """
    data, noise = randn(*latent_shape(family, 1), seed=5), randn(*latent_shape(family, 1), seed=6)
    sigma = torch.tensor([1.0])
    target = family.make_target(data, noise, sigma)
    denoiser, noisy = family.load_denoiser(), family.make_noisy(data, noise, sigma)
    conditioning = family.collate(batch_of(family, data, PROMPTS[:1]))
    if family.prediction_type == "v_prediction":
        oracle = ExactAnswer(denoiser, exact_v(family, data))
        torch.testing.assert_close(family.predict(oracle, noisy, sigma, conditioning), target, rtol=0, atol=1e-4)
    else:
        raw = raw_form(family, target)
        seen = family.predict(ExactAnswer(denoiser, raw), noisy, sigma, conditioning)
        sign = 1.0 if torch.allclose(seen, target) else -1.0
        assert torch.allclose(sign * seen, target)
        oracle = ExactAnswer(denoiser, sign * raw)
    height, width = (side * family.spec.vae_factor for side in data.shape[-2:])
    latents = first_latents(family, data, noise, num_steps=20)
    options = {"callback_on_step_end": watch(height, width)} if watch else {}
    pipeline = family.pipeline(oracle)
    generated = pipeline(
        PROMPTS[0], height=height, width=width, num_inference_steps=20, latents=latents, output_type="latent", **options
    )
    kept = float(getattr(pipeline.scheduler, "final_alpha_cumprod", 1.0))
    end = kept**0.5 * data + (1 - kept) ** 0.5 * noise
    return generated.images, end, data, 1e-5 if latents is noise else 1e-4


def test_an_exact_denoiser_lands_on_the_data_through_the_familys_own_pipeline(family: ModelFamily):
    """The direction oracle: the sign comes from `predict`, the steps from the family's scheduler; both must agree."""
    generated, end, _, tolerance = render_exactly(family)
    torch.testing.assert_close(generated, end, rtol=0, atol=tolerance)


def test_every_preview_of_an_exact_denoiser_is_the_data(
    family: ModelFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a preview shows is what the model foresees; an exact one foresees the data at every step."""
    shown: list[Tensor] = []

    def decode(decoder: nn.Module, latents: Tensor) -> Tensor:
        shown.append(latents)
        return torch.zeros(1, 3, 8, 8)

    def watch(height: int, width: int) -> Any:
        request = ImageRequest("oracle", PROMPTS[0], height, width, 0, GenerationSettings(20, 1.0))
        return previews.watch(1, "live")([request])

    monkeypatch.setattr(family, "decode_preview", decode)
    events: list[PreviewMade] = []
    previews = Previews(family, nn.Identity(), 5, ImageFiles(tmp_path, [], {}), events.append)
    _, end, data, tolerance = render_exactly(family, watch)
    assert [event.sampling_step for event in events] == [5, 10, 15, 20]
    levels = [event.sigma for event in events]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == pytest.approx(0.0, abs=1e-6 if torch.equal(end, data) else 0.05)
    assert levels[0] < 1.0
    # DDPM adds noise in each step: two latents in a row do not give the image, and are shown as they are.
    is_random = type(family.pipeline(family.load_denoiser()).scheduler).__name__ == "DDPMScheduler"
    for latents in shown[-1:] if is_random else shown:
        # Divided by a step's share of the noise, the last bits of two latents count more than in the latents.
        torch.testing.assert_close(latents, data, rtol=0, atol=30 * tolerance)


def test_latents_are_normalized_as_the_vae_of_the_pipeline_expects(family: ModelFamily):
    """Encode, scale once, decode by diffusers' recipe: the same image.

    The recipe is `latents / scaling_factor + shift_factor`, or `latents * latents_std + latents_mean`.
    """
    vae = family.load_vae()
    pixel_values = randn(2, 3, 64, 96).clamp(-1, 1)
    moments = family.encode_images(vae, pixel_values)
    means = [LatentMoments(each.mean) for each in moments]
    latents = torch.stack([family.latents_from_moments(each, torch.Generator(), family.vae_config) for each in means])
    frames = (slice(None), slice(None), None) if hasattr(vae.config, "temperal_downsample") else ()
    if vae.config.get("in_channels") == 4:  # Qwen-Image 2.1: an opaque alpha
        pixel_values = torch.cat([pixel_values, torch.ones_like(pixel_values[:, :1])], dim=1)
    with torch.no_grad():
        encoded = vae.encode(pixel_values[frames])
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        expected = vae.decode(mean).sample
        scaled = latents[frames]
        if hasattr(vae, "bn"):  # FLUX.2: patches of latents, scaled by statistics that are weights
            variance = vae.bn.running_var + vae.config.batch_norm_eps
            patches = scaled.movedim(1, -1) * variance.sqrt() + vae.bn.running_mean
            raw = Flux2Pipeline._unpatchify_latents(patches.movedim(-1, 1))
        elif getattr(vae.config, "latents_std", None) is not None:
            center, std = (torch.tensor(values) for values in (vae.config.latents_mean, vae.config.latents_std))
            raw = (scaled.movedim(1, -1) * std + center).movedim(-1, 1)
        else:
            raw = scaled / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        theirs = vae.decode(raw).sample
    torch.testing.assert_close(raw, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-4)
    decoded = family.decode_latents(vae, latents)
    torch.testing.assert_close(decoded[frames], expected[:, :3], rtol=0, atol=1e-4)
    assert next(vae.parameters()).dtype == torch.float32


def test_on_the_cpu_the_vae_has_the_layout_of_its_kernels_and_gives_the_same_moments(family: ModelFamily):
    vae, pixel_values = family.load_vae(), randn(1, 3, 64, 64).clamp(-1, 1)
    kernels = [p for p in vae.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    is_video = "temperal_downsample" in vae.config
    assert all(p.is_contiguous(memory_format=torch.channels_last) != is_video for p in kernels)
    [found] = family.encode_images(vae, pixel_values)
    [expected] = family.encode_images(vae.to(memory_format=torch.contiguous_format), pixel_values)
    for tensor, same in ((found.mean, expected.mean), (found.std, expected.std)):
        assert (tensor is None) == (same is None)
        if tensor is not None:
            assert tensor.is_contiguous()  # safetensors writes no other
            torch.testing.assert_close(tensor, same, rtol=1e-4, atol=1e-5)


def test_a_draw_from_the_posterior_has_its_mean_and_deviation(family: ModelFamily):
    mean, std = torch.full((4, 64, 64), 3.0), torch.full((4, 64, 64), 0.5)
    config = {"scaling_factor": 0.5, "shift_factor": 1.0}
    latents = family.latents_from_moments(LatentMoments(mean, std), torch.Generator().manual_seed(0), config)
    assert latents.mean().item() == pytest.approx((3.0 - 1.0) * 0.5, abs=0.01)
    assert latents.std().item() == pytest.approx(0.25, abs=0.01)


def test_the_pipeline_draws_images_of_the_asked_size(family: ModelFamily):
    side = 4 * family.spec.size_multiple
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images = pipeline(
        prompt=PROMPTS,
        negative_prompt=family.spec.dropped_caption,
        height=side,
        width=side,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=generators,
    ).images
    assert [image.size for image in images] == [(side, side)] * 2


def test_the_memory_of_decoding_an_image_is_known_from_shapes(family: ModelFamily):
    small, large = (decode_bytes(family, side, side) for side in (64, 128))
    weights = sum(parameter.numel() for parameter in family.empty_vae().parameters())
    assert 4 * weights < small < large


def test_prompts_survive_a_round_trip_through_a_safetensors_file(family: ModelFamily, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    [embeds] = family.encode_prompts(PROMPTS[:1])
    save_file(dict(embeds.tensors), tmp_path / "prompt.safetensors")
    loaded = load_file(tmp_path / "prompt.safetensors")
    assert loaded.keys() == embeds.tensors.keys()
    assert set(family.spec.prompt_tensors) in (set(), loaded.keys())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in embeds.tensors.items())
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in embeds.tensors.items())
