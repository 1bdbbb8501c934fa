"""OmniGen2's denoiser against the original implementation's outputs, and its gradients against finite differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.models.omnigen2.transformer import MAX_REFERENCES, OmniGen2Transformer2DModel

GOLDEN = Path(__file__).parents[3] / "golden" / "omnigen2"
CASES = json.loads((GOLDEN / "cases.json").read_text())
References = list[list[Tensor] | None] | None


class Case(NamedTuple):
    latents: list[Tensor]
    timestep: Tensor
    text: Tensor
    mask: Tensor
    references: References
    outputs: list[Tensor]


def read_case(facts: dict[str, Any], dtype: torch.dtype = torch.float32) -> Case:
    tensors, count = load_file(GOLDEN / facts["file"]), len(facts["sizes"])
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    references: References = None
    if "refs" in facts:
        references = [
            None if sizes is None else [tensors[f"ref.{row}.{number}"] for number in range(len(sizes))]
            for row, sizes in enumerate(facts["refs"])
        ]
    latents, outputs = ([tensors[f"{name}.{row}"] for row in range(count)] for name in ("latents", "output"))
    text = (tensors["text_hidden_states"], tensors["text_attention_mask"])
    return Case(latents, tensors["timestep"], *text, references, outputs)


def read_model() -> OmniGen2Transformer2DModel:
    model = OmniGen2Transformer2DModel(**json.loads((GOLDEN / "config.json").read_text())).eval()
    model.load_state_dict(load_file(GOLDEN / "weights.safetensors"), strict=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> OmniGen2Transformer2DModel:
    return read_model()


@pytest.mark.parametrize("facts", CASES, ids=[facts["name"] for facts in CASES])
def test_the_answers_are_those_of_the_original(model: OmniGen2Transformer2DModel, facts: dict[str, Any]) -> None:
    case = read_case(facts)
    is_one_shape = len({each.shape for each in case.latents}) == 1
    latents = torch.stack(case.latents) if is_one_shape else case.latents
    outputs = model(latents, case.timestep, case.text, case.mask, case.references)
    assert isinstance(outputs, Tensor) == is_one_shape
    for output, expected in zip(outputs, case.outputs, strict=True):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("facts", CASES, ids=[facts["name"] for facts in CASES])
def test_a_batch_equals_its_rows_run_singly(model: OmniGen2Transformer2DModel, facts: dict[str, Any]) -> None:
    """Alone a row has no padding, and needs no mask."""
    case = read_case(facts)
    for row, (latents, expected) in enumerate(zip(case.latents, case.outputs, strict=True)):
        text = case.text[row : row + 1, : int(case.mask[row].sum())]
        references = case.references and case.references[row : row + 1]
        [output] = model(latents[None], case.timestep[row : row + 1], text, None, references)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_rows_of_different_sizes_with_different_references_are_what_they_are_alone(
    model: OmniGen2Transformer2DModel,
) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = [randn(4, 6, 8), randn(4, 10, 4), randn(4, 6, 8)]
    references = [[randn(4, 4, 4)], [], [randn(4, 8, 6), randn(4, 2, 10), randn(4, 6, 6)]]
    text, mask = randn(3, 5, 24), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    times = torch.tensor([0.1, 0.5, 0.9])
    together = model(latents, times, text, mask, references)
    for row in range(3):
        one = slice(row, row + 1)
        alone = model(latents[row][None], times[one], text[one, : int(mask[row].sum())], None, references[one])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)


def test_the_order_of_the_references_counts(model: OmniGen2Transformer2DModel) -> None:
    case = read_case(CASES[3])
    assert case.references is not None
    turned = [row and row[::-1] for row in case.references]
    latents = torch.stack(case.latents)
    first, second = (
        model(latents, case.timestep, case.text, case.mask, references) for references in (case.references, turned)
    )
    assert (first[0] - second[0]).abs().max() > 1e-3
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=1e-6)  # it has none


def test_without_references_their_weights_do_not_matter_and_have_gradients_of_zero() -> None:
    model = OmniGen2Transformer2DModel(**json.loads((GOLDEN / "config.json").read_text()))
    model.load_state_dict(load_file(GOLDEN / "weights.safetensors"))
    case = read_case(CASES[0])
    latents = torch.stack(case.latents)
    before = model(latents, case.timestep, case.text, case.mask)
    before.square().sum().backward()
    own = [(n, p) for n, p in model.named_parameters() if n.startswith(("ref_image", "image_index"))]
    assert len(own) == 18
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != any(name == other for other, _ in own), name
    with torch.no_grad():
        for _, parameter in own:
            parameter.mul_(3)
        assert torch.equal(model(latents, case.timestep, case.text, case.mask), before)


PARAMETERS = (
    "x_embedder.weight",
    "ref_image_patch_embedder.weight",
    "image_index_embedding",
    "time_caption_embed.timestep_embedder.linear_1.weight",
    "noise_refiner.0.norm1.linear.weight",
    "ref_image_refiner.0.attn.to_k.weight",
    "context_refiner.0.feed_forward.linear_3.weight",
    "layers.1.attn.norm_q.weight",
    "layers.0.feed_forward.linear_1.weight",
    "norm_out.linear_1.weight",
)


@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """Along the gradient itself, where the loss changes most; in float64, since differences in float32 are mostly
    rounding where the gradient is small."""
    case = read_case(CASES[3], torch.float64)
    model = read_model().double()
    latents, weights = torch.stack(case.latents), torch.linspace(-1, 1, 256, dtype=torch.float64).view(4, 8, 8)

    def loss() -> Tensor:
        output = model(latents, case.timestep, case.text, case.mask, case.references)
        return (output * weights).sum()

    parameter = model.get_parameter(name)
    parameter.requires_grad_(True)
    [gradient] = torch.autograd.grad(loss(), parameter)
    parameter.requires_grad_(False)
    norm = gradient.norm()
    assert norm > 1e-3
    step, kept = 1e-2 * gradient / norm, parameter.clone()
    higher, lower = (_at(parameter, kept + sign * step, loss) for sign in (1, -1))
    parameter.copy_(kept)
    assert (higher - lower) / 2e-2 == pytest.approx(float(norm), rel=1e-3)


def _at(parameter: Tensor, value: Tensor, loss: Any) -> float:
    parameter.copy_(value)
    return float(loss())


def test_checkpointed_blocks_give_the_same_gradients(model: OmniGen2Transformer2DModel) -> None:
    case = read_case(CASES[3])
    parameter, gradients = model.get_parameter("ref_image_refiner.0.attn.to_q.weight"), []
    for is_checkpointed in (False, True):
        model.gradient_checkpointing = False
        if is_checkpointed:
            model.enable_gradient_checkpointing()
        parameter.requires_grad_(True)
        output = model(torch.stack(case.latents), case.timestep, case.text, case.mask, case.references)
        gradients += torch.autograd.grad(output.square().sum(), parameter)
        parameter.requires_grad_(False)
    model.gradient_checkpointing = False
    assert gradients[0].any()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


def test_more_references_than_there_are_embeddings_are_refused(model: OmniGen2Transformer2DModel) -> None:
    case = read_case(CASES[2])
    references = [[torch.zeros(4, 2, 2)] * (MAX_REFERENCES + 1)]
    with pytest.raises(ValueError, match="at most 5 reference images"):
        model(torch.stack(case.latents), case.timestep, case.text, case.mask, references)


def test_a_saved_model_is_read_again(model: OmniGen2Transformer2DModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = OmniGen2Transformer2DModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == load_file(GOLDEN / "weights.safetensors").keys()
    case = read_case(CASES[2])
    inputs = (torch.stack(case.latents), case.timestep, case.text, case.mask, case.references)
    with torch.no_grad():
        assert torch.equal(again(*inputs), model(*inputs))
