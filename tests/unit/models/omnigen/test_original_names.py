"""OmniGen's names in other programs, against transformers' Phi-3, which the original release is built around.

The release has its layers as `llm.layers.N`, computed by Phi-3's own classes, and what is around them by names that
diffusers' `scripts/convert_omnigen_to_diffusers.py` and OmniGen's `model.py` give.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP

from simpletuner.adapters.formats import encode
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import perturb
from tests.witnesses import original_weights, patched

SIZE = 32
# Of the release: everything outside of the language model.
AROUND_THE_LAYERS = {
    "x_embedder.proj": "patch_embedding.output_image_proj",
    "input_x_embedder.proj": "patch_embedding.input_image_proj",
    "time_token.mlp.0": "time_token.linear_1",
    "time_token.mlp.2": "time_token.linear_2",
    "t_embedder.mlp.0": "t_embedder.linear_1",
    "t_embedder.mlp.2": "t_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}


def phi3_layer(weights: dict[str, Tensor], number: int) -> tuple[nn.Module, nn.Module]:
    """transformers' attention and MLP with the weights of one layer of the release."""
    heads = tiny_omnigen_transformer().config.num_attention_heads
    sizes = {"hidden_size": SIZE, "intermediate_size": 2 * SIZE, "pad_token_id": 0, "attn_implementation": "eager"}
    config = Phi3Config(num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=2, **sizes)
    attention, mlp = Phi3Attention(config, 0).eval(), Phi3MLP(config).eval()
    for module, name in ((attention, "self_attn"), (mlp, "mlp")):
        prefix = f"llm.layers.{number}.{name}."
        module.load_state_dict({k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)})
    return attention, mlp


def require_same_layers(weights: dict[str, Tensor], denoiser: nn.Module) -> None:
    """Every layer of the release answers as the denoiser's, and so does what is around them."""
    hidden = torch.randn(1, 5, SIZE, generator=torch.Generator().manual_seed(1))
    size = SIZE // denoiser.config.num_attention_heads
    still = (torch.ones(1, 5, size), torch.zeros(1, 5, size))  # positions that turn nothing
    with torch.no_grad():
        for number, block in enumerate(denoiser.layers):
            attention, mlp = phi3_layer(weights, number)
            theirs, _ = attention(hidden, position_embeddings=still, attention_mask=None)
            ours = block.self_attn(hidden, hidden, image_rotary_emb=tuple(each[0] for each in still))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            torch.testing.assert_close(block.mlp(hidden), mlp(hidden), rtol=0, atol=1e-5)
        for name, path in AROUND_THE_LAYERS.items():
            layer, weight = denoiser.get_submodule(path), weights[f"{name}.weight"]
            entries = torch.randn(1, *weight.shape[1:], generator=torch.Generator().manual_seed(2))
            expected = (weight * entries).flatten(1).sum(1)
            bias = 0 if layer.bias is None else layer.bias
            torch.testing.assert_close(layer(entries).flatten() - bias, expected, rtol=0, atol=1e-5)


def test_the_release_computes_with_the_weights_under_these_names() -> None:
    denoiser = tiny_omnigen_transformer()
    require_same_layers(original_weights(denoiser, OMNIGEN.keys), denoiser)


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_a_file_changes_the_release_as_it_changes_the_denoiser(form: str, tmp_path: Path) -> None:
    denoiser = tiny_omnigen_transformer()
    original = original_weights(denoiser, OMNIGEN.keys)
    settings = LoraSettings(rank=2, alpha=3, targets=("all-linear",))
    adapter = attach_lora(denoiser, settings, OMNIGEN, torch.float32, seed=0)
    perturb(adapter.trainable_parameters())
    save_file(encode(adapter.weights(), OMNIGEN, form, denoiser), tmp_path / "a.safetensors")
    changed = patched(original, load_file(tmp_path / "a.safetensors"))
    assert sum(not torch.equal(changed[name], tensor) for name, tensor in original.items()) >= 2 * 4 + 6
    require_same_layers(changed, denoiser.eval())
