"""The assistant LoRA on one layer whose numbers are worked out by hand, and which file is taken for it."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from simpletuner.adapters import assistant
from simpletuner.adapters.assistant import attach_assistant, find_assistant, wants_assistant, without_assistant
from simpletuner.errors import DataError
from simpletuner.families.registry import get_spec
from tests.configs import config_of

SPEC = get_spec("omnigen")
PATH = "layers.0.self_attn.to_q"
KEY = "lora_unet_layers_0_self_attn_to_q"


def denoiser_with(layer: nn.Module) -> nn.Module:
    """A module whose only layer is called as OmniGen's first one."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].self_attn = nn.Module()
    model.layers[0].self_attn.to_q = layer
    return model.requires_grad_(False)


def write(path: Path, down: list[list[float]], up: list[list[float]], alpha: float, **metadata: str) -> Path:
    tensors = {"lora_down.weight": torch.tensor(down), "lora_up.weight": torch.tensor(up), "alpha": torch.tensor(alpha)}
    save_file({f"{KEY}.{name}": tensor for name, tensor in tensors.items()}, path, metadata)
    return path


def test_alpha_over_rank_and_strength_multiply_what_is_added_and_only_while_it_is_on(tmp_path: Path) -> None:
    layer = nn.Linear(2, 3)
    nn.init.zeros_(layer.weight)
    layer.bias.data = torch.tensor([0.0, 10.0, 0.0])
    denoiser = denoiser_with(layer)
    file = write(tmp_path / "a.safetensors", [[1.0, 2.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], 6.0)
    attached = attach_assistant(denoiser, file, 0.5, SPEC)
    # down x = (3, 1), up of it = (3, 1, -3); alpha 6 of rank 2 is 3, with strength 0.5 it is 1.5.
    x = torch.tensor([[1.0, 1.0]])
    assert layer(x).tolist() == [[4.5, 11.5, -4.5]]
    with contextlib.suppress(KeyError), without_assistant(denoiser):
        assert layer(x).tolist() == [[0.0, 10.0, 0.0]]
        raise KeyError
    assert layer(x).tolist() == [[4.5, 11.5, -4.5]]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert attached.identity == {"sha256": digest, "strength": 0.5}
    assert attached.num_layers == 1
    assert str(attached) == (
        "a.safetensors on 1 layers, strength 0.5: on while training and for the eval loss, off in images, and in no "
        "file"
    )
    assert set(denoiser.state_dict()) == {f"{PATH}.weight", f"{PATH}.bias"}


def test_it_is_kept_in_the_dtype_of_the_denoiser_and_computes_in_that_of_its_input(tmp_path: Path) -> None:
    layer = nn.Linear(2, 1).bfloat16()
    attach_assistant(denoiser_with(layer), write(tmp_path / "a.safetensors", [[1.0, 2.0]], [[1.0]], 1.0), 1.0, SPEC)
    child: Any = layer.get_submodule("assistant")
    assert (child.down.dtype, child.up.dtype) == (torch.bfloat16, torch.bfloat16)
    assert child(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Linear(2, 4), f"assistant_lora_path: changes {PATH} from 2 to 3 features, which has 2 and 4"),
        (nn.Linear(5, 3), f"assistant_lora_path: changes {PATH} from 2 to 3 features, which has 5 and 3"),
        (nn.Conv2d(2, 3, 1), f"assistant_lora_path: changes {PATH}, which is not a linear layer"),
    ],
)
def test_a_file_for_other_layers_is_refused(layer: nn.Module, text: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", [[1.0, 2.0]], [[1.0], [0.0], [0.0]], 1.0)
    with pytest.raises(DataError) as caught:
        attach_assistant(denoiser_with(layer), file, 1.0, SPEC)
    assert text in caught.value.render()
    assert str(file) in caught.value.render()


def test_a_weight_decomposed_lora_is_no_assistant(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    names = {"lora_down.weight": (1, 2), "lora_up.weight": (3, 1), "dora_scale": (3, 1)}
    save_file({f"{KEY}.{name}": torch.ones(shape) for name, shape in names.items()}, file)
    with pytest.raises(DataError, match=r"holds lora \(dora\), and an assistant is a plain LoRA"):
        attach_assistant(denoiser_with(nn.Linear(2, 3)), file, 1.0, SPEC)


def test_only_a_lora_run_with_a_path_and_a_strength_wants_one(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", [[1.0]], [[1.0]], 1.0)
    given = {"model_type": "lora", "assistant_lora_path": str(file)}
    assert find_assistant(config_of(**given)) == file
    for others in ({"model_type": "full"}, {"assistant_lora_strength": 0.0}, {"assistant_lora_path": None}):
        assert not wants_assistant(config_of(**{**given, **others}))
        assert find_assistant(config_of(**{**given, **others})) is None


def test_a_hub_id_is_fetched_or_found_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(model_type="lora", assistant_lora_path="someone/adapter/file.safetensors")
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(assistant, "fetch", lambda *given: asked.append(given) or Path("fetched"))
    assert find_assistant(config) == Path("fetched")
    assert asked == [("someone/adapter", "file.safetensors", None, "assistant_lora_path")]
    cached: dict[tuple[str, str], Any] = {("someone/adapter", "file.safetensors"): "/cache/file.safetensors"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: cached.get(given))
    assert find_assistant(config, fetches=False) == Path("/cache/file.safetensors")
    cached.clear()
    assert find_assistant(config, fetches=False) is None
    assert len(asked) == 1
