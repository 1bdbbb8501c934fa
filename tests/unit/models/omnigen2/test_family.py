"""OmniGen2 for the shared trainer: the chat that its language model reads, time, sign and noise levels."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from simpletuner.batch import Batch
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.models.local_check import check_local_model
from simpletuner.models.omnigen2.family import chat_text
from tests.tiny_omnigen2 import tiny_omnigen2_folder

PROMPTS = ["add a hat to the person", "a cat", ""]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    spec = get_spec("omnigen2")
    folder = tiny_omnigen2_folder(tmp_path_factory.mktemp("omnigen2"))
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


def test_an_instruction_stands_in_the_chat_that_the_model_was_trained_with() -> None:
    assert chat_text("add a hat") == (
        "<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user instructions."
        "<|im_end|>\n<|im_start|>user\nadd a hat<|im_end|>\n"
    )
    dropped = get_spec("omnigen2").dropped_caption
    assert chat_text(dropped) == (
        "<|im_start|>system\nYou are a helpful assistant that generates images.<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n"
    )


def test_the_states_are_the_last_ones_of_the_whole_language_model_on_a_padded_batch(family: ModelFamily) -> None:
    """As the original pipeline asks for them: all prompts at once, padded on the right, with a mask."""
    tokenizer, model = family.encoders.tokenizer("processor"), family.encoders.encoder("mllm")
    tokens = tokenizer([chat_text(each) for each in PROMPTS], padding="longest", return_tensors="pt")
    assert tokens.attention_mask.sum(1).tolist() == family.count_prompt_tokens(PROMPTS)
    with torch.no_grad():
        states = model(**tokens, output_hidden_states=True).hidden_states[-1]
    for embeds, expected, mask in zip(family.encode_prompts(PROMPTS), states, tokens.attention_mask, strict=True):
        rows = embeds.tensors["prompt_embeds"]
        torch.testing.assert_close(rows, expected[: int(mask.sum())], rtol=0, atol=1e-5)


def test_the_special_tokens_of_the_chat_are_single_tokens(family: ModelFamily) -> None:
    tokenizer = family.encoders.tokenizer("processor")
    ids = tokenizer(chat_text("hi")).input_ids
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (2, 2)


def test_a_long_prompt_loses_its_end_and_is_counted(family: ModelFamily) -> None:
    before = family.num_cut_prompts
    [embeds] = family.encode_prompts(["word " * 300])
    assert len(embeds.tensors["prompt_embeds"]) == family.spec.max_prompt_tokens == 888
    assert family.num_cut_prompts == before + 1


def test_time_runs_from_noise_to_data_and_the_answer_changes_its_sign(family: ModelFamily) -> None:
    denoiser, latents = family.load_denoiser(), torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    references = [[torch.ones(16, 4, 4)], []]
    embeds = family.encode_prompts(PROMPTS[:2])
    batch = Batch(latents, embeds, [0, 1], ["", ""], torch.ones(2), "", references=references)
    sigmas = torch.tensor([0.2, 0.7])
    rows = [each.tensors["prompt_embeds"] for each in embeds]
    with torch.no_grad():
        predicted = family.predict(denoiser, latents, sigmas, family.collate(batch))
        for row in range(2):
            answer = denoiser(latents[row][None], 1 - sigmas[row][None], rows[row][None], None, [references[row]])
            torch.testing.assert_close(predicted[row], -answer[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "shift"), [(256, math.exp(0.5)), (1024, math.exp(1.15))])
def test_noise_levels_are_shifted_as_in_training_of_the_original(family: ModelFamily, side: int, shift: float) -> None:
    """mu is 0.5 at 256 patches and 1.15 at 4096; the median of sigmoid(N(0, 1)) is 1/2."""
    [sigma] = family.sigmas_at(torch.tensor([0.5]), torch.zeros(1, 16, side // 8, side // 8)).tolist()
    assert sigma == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=1e-6)


def test_a_saved_model_names_its_parts_as_the_original_does(family: ModelFamily, tmp_path: Path) -> None:
    import json

    family.pipeline(family.load_denoiser()).save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index == json.loads((Path(family.source.model) / "model_index.json").read_text())
    spec = get_spec("omnigen2")
    again = get_family_class(spec)(spec, ModelSource(str(tmp_path / "saved")), torch.device("cpu"), torch.float32)
    kept, saved = (each.load_denoiser().state_dict() for each in (family, again))
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())
    [before], [after] = (each.encode_prompts(["a cat"]) for each in (family, again))
    assert torch.equal(before.tensors["prompt_embeds"], after.tensors["prompt_embeds"])


def test_language_model_and_vae_may_come_from_folders_of_their_own(family: ModelFamily, tmp_path: Path) -> None:
    """As in OmniGen2's options files: a bare model folder, its parts elsewhere."""
    whole = Path(family.source.model)
    bare = shutil.copytree(whole, tmp_path / "bare", ignore=shutil.ignore_patterns("mllm", "vae"))
    for name in ("mllm", "vae"):
        shutil.copytree(whole / name, tmp_path / name)
    source = ModelSource(str(bare), vae=str(tmp_path / "vae"), encoders={"mllm": str(tmp_path / "mllm")})
    assert check_local_model(source, family.spec) == []
    parts = type(family)(family.spec, source, family.device, family.dtype)
    [ours], [theirs] = (each.encode_prompts(["add a hat"]) for each in (parts, family))
    assert torch.equal(ours.tensors["prompt_embeds"], theirs.tensors["prompt_embeds"])
    assert parts.load_vae().config.latent_channels == 16
