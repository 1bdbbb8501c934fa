"""Models in one file give the very weights of the folders that they were written from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simpletuner.adapters.build import attach_adapter
from simpletuner.cache.fingerprints import prompt_fingerprint, vae_fingerprint
from simpletuner.data.digests import DigestMemo
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models import components
from simpletuner.models.build import model_source
from simpletuner.models.components import ModelSource, check_denoiser_file, save_model_folder
from simpletuner.models.family import ModelFamily
from simpletuner.models.local_check import check_local_model
from simpletuner.models.single_file import is_in_file
from simpletuner.models.weight_files import weight_files
from tests.configs import config_of
from tests.runs import dataset, load_here, metrics, train_here, write_images, write_run
from tests.single_files import original_denoiser, original_vae, write_sd3_file, write_sdxl_file
from tests.tiny_flux import tiny_flux_folder
from tests.tiny_folders import TINY_FOLDERS
from tests.tiny_krea2 import tiny_krea2_transformer
from tests.tiny_qwen_image_21 import tiny_qwen_image_21_transformer
from tests.tiny_sd3 import tiny_sd3_folder
from tests.tiny_sdxl import tiny_sdxl_folder
from tests.witnesses import original_weights

CPU = torch.device("cpu")


def family_of(name: str, source: ModelSource) -> ModelFamily:
    spec = get_spec(name)
    return get_family_class(spec)(spec, source, CPU, torch.float32)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def bare(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder without weights: what a single file does not hold."""
    weights = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(sdxl, tmp_path_factory.mktemp("bare") / "model", ignore=weights)


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_whole_sdxl_in_one_file_is_the_folder_that_it_was_written_from(sdxl: Path, bare: Path, tmp_path: Path):
    file = write_sdxl_file(sdxl, get_spec("sdxl").keys, tmp_path / "sdxl.safetensors")
    whole, single = (family_of("sdxl", s) for s in (ModelSource(str(sdxl)), ModelSource(str(bare), file=str(file))))
    assert_same(single.load_denoiser(), whole.load_denoiser())
    assert_same(single.load_vae(), whole.load_vae())
    for name in ("text_encoder", "text_encoder_2"):
        assert_same(single.encoders.encoder(name), whole.encoders.encoder(name))
    prompts = [each.encode_prompts(["a cat"])[0].tensors for each in (single, whole)]
    torch.testing.assert_close(*({name: each[name] for name in prompts[1]} for each in prompts))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_a_file_of_flux_s_transformer_alone_takes_the_rest_from_the_folder(tmp_path: Path, name: str, prefix: str):
    folder = TINY_FOLDERS[name](tmp_path / name)
    original = original_denoiser(folder / "transformer", get_spec(name).keys, norm_name="scale")
    assert "double_blocks.0.img_attn.norm.query_norm.scale" in original
    file = tmp_path / "flux.safetensors"
    save_file({prefix + name: tensor for name, tensor in original.items()}, file)
    whole, single = (family_of(name, ModelSource(str(folder), file=each)) for each in (None, str(file)))
    assert_same(single.load_denoiser(), whole.load_denoiser())
    assert_same(single.load_vae(), whole.load_vae())


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first encoder has the projection that released files leave out: the identity."""
    folder = tiny_sd3_folder(tmp_path_factory.mktemp("sd3"))
    file = folder / "text_encoder/model.safetensors"
    save_file(load_file(file) | {"text_projection.weight": torch.eye(8)}, file, {"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_whole_sd3_in_one_file_is_the_folder_that_it_was_written_from(sd3: Path, tmp_path: Path):
    """The denoiser also as diffusers reads it out of the same file."""
    import diffusers

    bare = shutil.copytree(sd3, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    file = write_sd3_file(sd3, get_spec("sd3").keys, tmp_path / "sd3.safetensors")
    whole, single = (family_of("sd3", s) for s in (ModelSource(str(sd3)), ModelSource(str(bare), file=str(file))))
    denoiser = single.load_denoiser()
    assert_same(denoiser, whole.load_denoiser())
    assert_same(
        denoiser, diffusers.SD3Transformer2DModel.from_single_file(file, config=str(bare), subfolder="transformer")
    )
    assert_same(single.load_vae(), whole.load_vae())
    prompts = [each.encode_prompts(["a cat"])[0].tensors for each in (single, whole)]
    torch.testing.assert_close(*({name: each[name] for name in prompts[1]} for each in prompts))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert_same(*(each.encoders.encoder(name) for each in (single, whole)))

    smaller = write_sd3_file(sd3, get_spec("sd3").keys, tmp_path / "clips.safetensors", with_t5=False)
    encoder = get_spec("sd3").components[4]
    assert encoder.name == "text_encoder_3"
    assert not is_in_file(str(smaller), encoder)
    source = ModelSource(str(bare), file=str(smaller), encoders={"text_encoder_3": "none"})
    without = family_of("sd3", source)
    save_model_folder(source, without.spec, without.load_denoiser(), without.scheduler_config, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert_same(pipeline.text_encoder_2, whole.encoders.encoder("text_encoder_2"))


def test_a_saved_model_names_no_part_that_it_does_not_hold(sdxl: Path, tmp_path: Path) -> None:
    """As Stable Diffusion names its safety checker, which is no part of a family: loaders would look for the folder."""
    folder = shutil.copytree(sdxl, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    own = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "force_zeros_for_empty_prompt": True}
    (folder / "model_index.json").write_text(json.dumps(index | own))
    family = family_of("sdxl", ModelSource(str(folder)))
    save_model_folder(family.source, family.spec, family.load_denoiser(), family.scheduler_config, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert "safety_checker" not in saved
    assert saved["force_zeros_for_empty_prompt"] is True
    parts = {name for name, value in saved.items() if isinstance(value, list) and value[0] is not None}
    assert {name for name in parts if not (tmp_path / "saved" / name).is_dir()} == set()


def test_a_saved_model_keeps_its_own_decoder_of_previews(sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sdxl, tmp_path / "model")
    (folder / "preview_decoder").mkdir(exist_ok=True)
    (folder / "preview_decoder/own.txt").write_text("mine")
    family = family_of("sdxl", ModelSource(str(folder)))
    save_model_folder(family.source, family.spec, family.load_denoiser(), family.scheduler_config, tmp_path / "saved")
    assert (tmp_path / "saved/preview_decoder/own.txt").read_text() == "mine"


def test_each_part_may_have_a_file_of_its_own(tmp_path: Path):
    """FLUX.1 as its release has it: CLIP, T5, transformer and VAE in four places, with names of any kind."""
    folder = tiny_flux_folder(tmp_path / "flux")
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    clip = shutil.copyfile(folder / "text_encoder/model.safetensors", tmp_path / "clip_l.safetensors")
    save_file(original_vae(folder / "vae", prefix=""), tmp_path / "ae.safetensors")
    save_file(original_denoiser(folder / "transformer", get_spec("flux").keys), tmp_path / "flux1-dev.safetensors")
    source = ModelSource(
        str(bare),
        vae=str(tmp_path / "ae.safetensors"),
        file=str(tmp_path / "flux1-dev.safetensors"),
        encoders={"text_encoder": str(clip), "text_encoder_2": str(folder / "text_encoder_2")},
    )
    assert check_local_model(source, get_spec("flux")) == []
    whole, parts = family_of("flux", ModelSource(str(folder))), family_of("flux", source)
    assert_same(parts.load_denoiser(), whole.load_denoiser())
    assert_same(parts.load_vae(), whole.load_vae())
    prompts = [each.encode_prompts(["a cat"])[0].tensors for each in (parts, whole)]
    torch.testing.assert_close(*({name: each[name] for name in prompts[1]} for each in prompts))
    with DigestMemo(tmp_path / "digests.sqlite") as memo:
        before = [vae_fingerprint(source, parts.spec, memo, CPU, torch.float32), prompt_fingerprint(parts, memo)]
        for file in (clip, tmp_path / "ae.safetensors"):
            save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
        after = [vae_fingerprint(source, parts.spec, memo, CPU, torch.float32), prompt_fingerprint(parts, memo)]
    assert not set(before) & set(after)  # cached latents and captions are those of these files
    written = tmp_path / "written"
    save_model_folder(source, parts.spec, parts.load_denoiser(), parts.scheduler_config, written)
    assert load_file(written / "text_encoder_2/model.safetensors").keys()


@pytest.mark.parametrize(
    ("place", "message"),
    [("t5.bin", "is a pickle"), ("t5.safetensors", "there is no file"), ("none", "without")],
)
def test_a_text_encoder_s_path_is_checked_before_anything_is_loaded(tmp_path: Path, sdxl: Path, place: str, message):
    path = place if place == "none" else str(tmp_path / place)
    [problem] = check_local_model(ModelSource(str(sdxl), encoders={"text_encoder": path}), get_spec("sdxl"))
    assert message in problem.message
    assert problem.key == "text_encoder_paths"


def test_a_vae_may_lie_in_the_folder_of_a_whole_model(sdxl: Path) -> None:
    source = ModelSource(str(sdxl), vae=str(sdxl))
    assert check_local_model(source, get_spec("sdxl")) == []
    assert_same(family_of("sdxl", source).load_vae(), family_of("sdxl", ModelSource(str(sdxl))).load_vae())


def test_a_text_encoder_s_folder_has_a_configuration_and_a_hub_id_is_not_looked_at(tmp_path: Path, sdxl: Path):
    (tmp_path / "t5").mkdir()
    for place in (str(tmp_path / "t5"), "./t5"):
        [problem] = check_local_model(ModelSource(str(sdxl), encoders={"text_encoder": place}), get_spec("sdxl"))
        assert "has no config.json" in problem.message
    assert check_local_model(ModelSource(str(sdxl), encoders={"text_encoder": "owner/name"}), get_spec("sdxl")) == []


def test_a_text_encoder_of_another_repository_is_fetched_in_its_parts(
    tmp_path: Path, sdxl: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights in shards, as language models are published: the index says which."""
    source = ModelSource(str(sdxl), encoders={"text_encoder": "owner/name"})
    [component] = [part for part in get_spec("sdxl").components if part.name == "text_encoder"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    asked = []

    def fetch(repository: str, name: str, revision: str | None, key: str) -> Path:
        asked.append((repository, name, key))
        if name == "model.safetensors":
            raise DataError(Problem("the model is there and has no such file"))
        return tmp_path / name

    monkeypatch.setattr(components, "fetch", fetch)
    assert [path.name for path in weight_files(source, component)] == shards
    assert {repository for repository, _, _ in asked} == {"owner/name"}
    assert {key for _, _, key in asked} == {"text_encoder_paths"}


def test_lengths_of_captions_and_text_encoders_are_the_family_s(tmp_path: Path, sdxl: Path):
    write_images(tmp_path / "images", 1, seed=1)
    run = write_run(tmp_path, sdxl, [dataset("images")], model_family="sdxl", text_encoder_paths=["", "", "none"])
    with pytest.raises(ConfigError) as caught:
        load_here(run, "--tokenizer_max_length=150")
    text = caught.value.render()
    assert "names 3 text encoders, and Stable Diffusion XL has 2" in text
    assert "77, 152, 227, 302" in text
    with pytest.raises(ConfigError, match="reads captions of the length that it was trained with"):
        load_here(run, "--model_family=kolors", "--tokenizer_max_length=77")
    with pytest.raises(ConfigError, match="600 tokens are no length"):
        load_here(run, "--model_family=flux", "--tokenizer_max_length=600")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_krea_2_has_its_modulation_flat_and_its_norms_as_scales(tmp_path: Path, prefix: str):
    folder = TINY_FOLDERS["krea2"](tmp_path / "krea2")
    original = original_weights(tiny_krea2_transformer(), get_spec("krea2").keys)
    assert original["blocks.0.mod.lin"].dim() == original["last.norm.scale"].dim() == 1
    file = tmp_path / "krea2.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in original.items()}, file)
    whole, single = (family_of("krea2", ModelSource(str(folder), file=each)) for each in (None, str(file)))
    assert_same(single.load_denoiser(), whole.load_denoiser())


@pytest.mark.parametrize("joins", [True, False])
def test_a_file_of_qwen_image_21_is_read_with_gate_and_projection_joined_or_apart(tmp_path: Path, joins: bool):
    folder = TINY_FOLDERS["qwen_image_21"](tmp_path / "model")
    tensors = tiny_qwen_image_21_transformer().state_dict()
    if joins:  # as ComfyUI has them, the gate's rows first
        for block in range(2):
            name = f"transformer_blocks.{block}.img_mlp"
            gate, up = tensors.pop(f"{name}.gate_layer.weight"), tensors.pop(f"{name}.proj.weight")
            tensors[f"{name}.gate_up.weight"] = torch.cat([gate, up])
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    whole, single = (family_of("qwen_image_21", ModelSource(str(folder), file=each)) for each in (None, str(file)))
    assert_same(single.load_denoiser(), whole.load_denoiser())


def test_an_sdxl_file_says_itself_that_its_weights_predict_v(tmp_path: Path, sdxl: Path):
    """Trained as if they predicted the noise, such weights would be destroyed without a word."""
    file = write_sdxl_file(sdxl, get_spec("sdxl").keys, tmp_path / "v.safetensors")
    save_file(load_file(file) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, file)
    folder, single = (family_of("sdxl", ModelSource(str(sdxl), file=each)) for each in (None, str(file)))
    assert (folder.prediction_type, single.prediction_type) == ("epsilon", "v_prediction")
    latents, noise, last = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([1.0])
    assert torch.equal(single.make_noisy(latents, noise, last), noise)  # nothing of the data is left
    assert torch.equal(single.make_target(latents, noise, last), -latents)
    denoiser = single.load_denoiser()
    assert single.pipeline(denoiser).scheduler.config.prediction_type == "v_prediction"
    write_images(tmp_path / "run" / "images", 1, seed=1)
    loaded = load_here(write_run(tmp_path / "run", sdxl, [dataset("images")], model_family="sdxl"))
    attach_adapter(loaded, single, denoiser).save(tmp_path / "adapter.safetensors", {})
    with safe_open(tmp_path / "adapter.safetensors", framework="pt") as adapter:
        assert adapter.metadata()["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize("mark", ["edm_vpred.sigma_max", "edm_mean"])
def test_a_file_with_noise_levels_of_edm_is_refused(mark: str, tmp_path: Path, sdxl: Path):
    """CosXL and Playground 2.5 have the same tensors as SDXL, and would be trained to pieces."""
    file = tmp_path / "edm.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(1), mark: torch.tensor([80.0])}, file)
    [problem] = check_local_model(ModelSource(str(sdxl), file=str(file)), get_spec("sdxl"))
    assert mark in problem.message
    [problem] = check_local_model(ModelSource("stabilityai/cosxl"), get_spec("sdxl"))
    assert "noise levels are those of EDM" in problem.message


@pytest.mark.slow
def test_a_model_folder_can_be_written_from_a_single_file(sdxl: Path, bare: Path, tmp_path: Path):
    """As full training and `export --merge` do at their end; diffusers loads it."""
    import diffusers

    file = write_sdxl_file(sdxl, get_spec("sdxl").keys, tmp_path / "sdxl.safetensors")
    save_file(load_file(file) | {"v_pred": torch.tensor([])}, file)
    single = family_of("sdxl", ModelSource(str(bare), file=str(file)))
    (tmp_path / "out").mkdir()
    save_model_folder(single.source, single.spec, single.load_denoiser(), single.scheduler_config, tmp_path / "out")
    whole, written = (diffusers.StableDiffusionXLPipeline.from_pretrained(path) for path in (sdxl, tmp_path / "out"))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert_same(getattr(written, name), getattr(whole, name))
    assert written.tokenizer("a cat").input_ids == whole.tokenizer("a cat").input_ids
    assert written.scheduler.config.prediction_type == "v_prediction"


def test_a_file_in_diffusers_own_names_is_read_too(tmp_path: Path, sdxl: Path):
    [file] = (sdxl / "unet").glob("*.safetensors")
    single = family_of("sdxl", ModelSource(str(sdxl), file=str(file)))
    assert_same(single.load_denoiser(), family_of("sdxl", ModelSource(str(sdxl))).load_denoiser())


@pytest.mark.parametrize("fault", ["a tensor less", "a tensor more", "another shape", "no safetensors", "not there"])
def test_a_file_that_does_not_serve_is_reported(tmp_path: Path, sdxl: Path, fault: str):
    file = write_sdxl_file(sdxl, get_spec("sdxl").keys, tmp_path / "sdxl.safetensors")
    tensors = load_file(file)
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    if fault == "a tensor less":
        del tensors[name]
    if fault == "a tensor more":
        tensors["model.diffusion_model.input_blocks.4.1.proj_in.scale_weight"] = torch.ones(1)
    if fault == "another shape":
        tensors[name] = torch.ones(3, 3)
    save_file(tensors, file)
    if fault == "no safetensors":
        file.write_bytes(b"a pickle, perhaps")
    source = ModelSource(str(sdxl), file=str(file))
    if fault == "not there":
        file.unlink()
        [problem] = check_local_model(source, get_spec("sdxl"))
        assert "there is no file" in problem.message
        return
    key = "pretrained_transformer_model_name_or_path"
    for read in (family_of("sdxl", source).load_denoiser, lambda: check_denoiser_file(source, get_spec("sdxl"))):
        with pytest.raises(DataError, match=r"sdxl\.safetensors") as caught:
            read()
        assert [problem.key for problem in caught.value.problems] == [key]


def test_a_run_on_the_wrong_file_ends_before_anything_is_encoded(tmp_path: Path, sdxl: Path):
    """The key is the one that names the file."""
    flux = tiny_flux_folder(tmp_path / "flux")
    save_file(original_denoiser(flux / "transformer", get_spec("flux").keys), tmp_path / "flux.safetensors")
    write_images(tmp_path / "images", 1, seed=1)
    run = write_run(tmp_path, sdxl, [dataset("images")], model_family="sdxl")
    with pytest.raises(DataError, match=r"it has no input_blocks\.0\.0\.weight") as caught:
        train_here(run, f"--pretrained_transformer_model_name_or_path={tmp_path / 'flux.safetensors'}")
    assert [problem.key for problem in caught.value.problems] == ["pretrained_transformer_model_name_or_path"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    source = model_source(
        load_here(run, f"--pretrained_model_name_or_path={tmp_path / 'flux.safetensors'}").config.model
    )
    assert source.file_key == "pretrained_model_name_or_path"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["l.safetensors", "g.safetensors"], {"text_encoder": "l.safetensors", "text_encoder_2": "g.safetensors"}),
        (["", "g.safetensors"], {"text_encoder_2": "g.safetensors"}),
        ([], {}),
    ],
)
def test_paths_of_text_encoders_are_in_their_order(paths: list[str], expected: dict[str, str]) -> None:
    options = config_of(model_family="sdxl", text_encoder_paths=paths or None, variant="fp16", revision="main").model
    source = model_source(options)
    assert dict(source.encoders) == expected
    assert (source.variant, source.revision, source.vae) == ("fp16", "main", None)


def test_the_key_of_an_error_is_the_one_that_names_the_part(sdxl: Path):
    encoder = next(part for part in get_spec("sdxl").components if part.name == "text_encoder")
    vae = get_spec("sdxl").component("vae")
    source = ModelSource(str(sdxl), vae="vae", encoders={"text_encoder": "clip"})
    assert (source.key_of(encoder), source.key_of(vae)) == ("text_encoder_paths", "pretrained_vae_model_name_or_path")
    assert (
        ModelSource(str(sdxl)).key_of(encoder) == ModelSource(str(sdxl)).key_of(vae) == "pretrained_model_name_or_path"
    )


def test_the_folder_of_another_family_is_refused_with_its_name(sdxl: Path, tmp_path: Path):
    """Families whose networks are the same may share a folder: Qwen-Image trains on an edit model."""
    [problem] = check_local_model(ModelSource(str(sdxl)), get_spec("sd15"))
    assert problem.message.endswith(
        "is a model of Stable Diffusion XL (StableDiffusionXLPipeline), and model_family is sd15"
    )
    assert problem.fix == "set model_family to sdxl, or name a model of Stable Diffusion 1.5 and 2.1"
    edit = TINY_FOLDERS["qwen_image_edit"](tmp_path / "edit")
    assert check_local_model(ModelSource(str(edit)), get_spec("qwen_image")) == []


@pytest.mark.slow
def test_a_run_on_a_single_file_trains_what_a_run_on_the_folder_does(tmp_path: Path, sdxl: Path, bare: Path):
    file = write_sdxl_file(sdxl, get_spec("sdxl").keys, tmp_path / "sdxl.safetensors")
    write_images(tmp_path / "run/images", 3, seed=1)
    options = {"model_family": "sdxl", "max_train_steps": 2, "learning_rate": 1e-3}
    run = write_run(tmp_path / "run", sdxl, [dataset("images")], **options)
    whole = train_here(run, "--output_dir=whole")
    single = train_here(
        run,
        "--output_dir=single",
        f"--pretrained_model_name_or_path={bare}",
        f"--pretrained_unet_model_name_or_path={file}",
    )
    [finished] = metrics(single, "run_finished")
    assert f"--config {run / 'config.json'}" in finished["commands"][0]
    weights = [load_file(output / "pytorch_lora_weights.safetensors") for output in (whole, single)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-5)


def test_a_single_file_is_named_once_and_is_one(tmp_path: Path, sdxl: Path):
    write_images(tmp_path / "images", 1, seed=1)
    run = write_run(tmp_path, sdxl, [dataset("images")], model_family="sdxl")
    for name in ("a.safetensors", "b.safetensors", "b.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="names a single file already"):
        load_here(
            run,
            "--pretrained_model_name_or_path=a.safetensors",
            "--pretrained_transformer_model_name_or_path=b.safetensors",
        )
    with pytest.raises(ConfigError, match=r"is not a \.safetensors file"):
        load_here(run, "--pretrained_transformer_model_name_or_path=b.ckpt")


def test_a_file_of_a_deeper_network_is_refused_without_a_prefix_too(tmp_path: Path):
    """Its first blocks fit: Sana 4.8B in the folder of 1.6B would train a network that nobody made."""
    folder = TINY_FOLDERS["sana"](tmp_path / "sana")
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks."))
    file = tmp_path / "deeper.safetensors"
    more = {name.replace(f"s.{last}.", f"s.{last + 1}.", 1): each.clone() for name, each in tensors.items()}
    beside = {"vae.decoder.0.weight": torch.ones(1), "text_encoders.0.bias": torch.ones(1)}
    save_file({**tensors, **beside}, file)
    family_of("sana", ModelSource(str(folder), file=str(file))).load_denoiser()
    save_file({**tensors, **more, **beside}, file)
    added = len({*more} - {*tensors})
    with pytest.raises(DataError) as refusal:
        family_of("sana", ModelSource(str(folder), file=str(file))).load_denoiser()
    assert f"{added} tensors belong nowhere, the first is transformer_blocks.{last + 1}." in str(refusal.value)


def test_a_tensor_that_a_file_lacks_is_named_once(tmp_path: Path):
    folder = TINY_FOLDERS["sana"](tmp_path / "sana")
    file = tmp_path / "less.safetensors"
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({name: each for name, each in tensors.items() if name != "scale_shift_table"}, file)
    with pytest.raises(DataError) as refusal:
        family_of("sana", ModelSource(str(folder), file=str(file))).load_denoiser()
    assert refusal.value.problems[0].message.endswith("it has no scale_shift_table")
