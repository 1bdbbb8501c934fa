"""States of chosen layers, against transformers' own list of all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM, Qwen3Model

from simpletuner.cache.fingerprints import prompt_fingerprint
from simpletuner.data.digests import DigestMemo
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource, load_component
from simpletuner.models.hidden_states import hidden_states
from simpletuner.models.text_encoders import TextEncoders
from tests.tiny_omnigen2 import tiny_omnigen2_folder, write_qwen2_tokenizer
from tests.tiny_text import tiny_qwen3

TEXTS = ["a cat", "<|im_start|>user\na green star on white<|im_end|>\n"]


@pytest.fixture(scope="module", params=[Qwen3Model, Qwen3ForCausalLM], ids=["body", "with a head"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_qwen3(request.param)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))


def theirs(model: nn.Module, ids: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True, **inputs).hidden_states


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("layers", [[-2], [0], [-1], [1, 3, 2], [4, 0, -5, 3], [2, 2]], ids=str)
def test_states_are_those_of_transformers_in_the_order_asked_for(model, ids, layers):
    expected = theirs(model, ids)
    hooks = count_hooks(model)
    found = hidden_states(model, layers, input_ids=ids)
    assert count_hooks(model) == hooks
    assert found.shape == (2, 7, len(layers), 16)
    for i, layer in enumerate(layers):
        assert torch.equal(found[:, :, i], expected[layer])


def test_the_last_state_can_be_taken_before_the_final_norm(model, ids):
    normed = theirs(model, ids)[-1]
    before = hidden_states(model, [-2, -1], final_norm=False, input_ids=ids)
    assert (before[:, :, 1] - normed).abs().max() > 0.1
    assert torch.equal(model.base_model.norm(before[:, :, 1]), normed)
    assert torch.equal(before[:, :, 0], theirs(model, ids)[-2])


def test_a_mask_reaches_the_model(model, ids):
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    found = hidden_states(model, [2], input_ids=ids, attention_mask=mask)
    assert torch.equal(found[mask.bool()][:, 0], theirs(model, ids, attention_mask=mask)[2][mask.bool()])
    assert not torch.allclose(found[0, 3:], hidden_states(model, [2], input_ids=ids)[0, 3:])


def test_layers_behind_the_last_one_wanted_and_the_head_are_not_computed(ids):
    model = tiny_qwen3(Qwen3ForCausalLM)
    called = []
    for name, module in [*enumerate(model.model.layers), ("norm", model.model.norm), ("head", model.lm_head)]:
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    hidden_states(model, [1, 2], input_ids=ids)
    assert called == [0, 1]
    hidden_states(model, [-1], input_ids=ids)
    assert called[2:] == [0, 1, 2, 3, "norm"]


def test_each_text_is_read_alone_and_without_padding(tmp_path: Path):
    """Rows of one call in another order and company are the same bits, and texts are cut where they are too long."""
    vocab_size = write_qwen2_tokenizer(tmp_path / "processor")
    family = get_family_class(get_spec("omnigen2"))(
        get_spec("omnigen2"), ModelSource(str(tmp_path)), torch.device("cpu"), torch.float32
    )
    encoders = TextEncoders(family)
    encoders._encoders["mllm"] = tiny_qwen3(Qwen3ForCausalLM, vocab_size)
    places = {"name": "mllm", "tokenizer": "processor"}
    first, second = encoders.states_of(TEXTS, [1, -2], 12, **places)
    assert (first.shape, second.shape) == ((5, 2, 16), (12, 2, 16))
    assert family.num_cut_prompts == 1
    [alone] = encoders.states_of(TEXTS[:1], [1, -2], 12, **places)
    assert torch.equal(first, alone)
    ids = encoders.tokenizer("processor")(TEXTS[1], return_tensors="pt").input_ids[:, :12]
    assert torch.equal(second[:, 0], theirs(encoders.encoder("mllm"), ids)[1][0])


def test_a_pinned_attention_implementation_loads_the_encoder_and_belongs_to_the_cache_key(tmp_path: Path):
    source = ModelSource(str(tiny_omnigen2_folder(tmp_path / "model")))
    plain = get_spec("omnigen2")
    prints = set()
    for attention in ("", "sdpa", "eager"):
        parts = [replace(part, attention=attention if part.role == "text_encoder" else "") for part in plain.components]
        spec = replace(plain, components=tuple(parts))
        family = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
        prints.add(prompt_fingerprint(family, DigestMemo(tmp_path / "memo")))
        encoder = load_component(source, spec.component("text_encoder"), torch.float32)
        assert encoder.config._attn_implementation == (attention or "sdpa")
    assert len(prints) == 3
