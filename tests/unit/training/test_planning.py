"""What a plan measures on, and what it tells of captions; numbers by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpletuner.batch import Crop, PromptEmbeds
from simpletuner.training.planning.encoding import EncodingCost, TextCost, choose_texts, largest_references
from simpletuner.training.planning.loads import _prompts_of_files, largest_load

KIB, MIB = 1 << 10, 1 << 20


def embeds(*num_bytes: int) -> list[PromptEmbeds]:
    return [PromptEmbeds({"a": torch.zeros(count, dtype=torch.uint8)}) for count in num_bytes]


def cost_of(**given: Any) -> TextCost:
    cost = EncodingCost(embeds(KIB, 4 * KIB, 2 * KIB), weight_bytes=3 * MIB, activation_bytes=MIB)
    values = {"num_texts": 1500, "num_missing": 1024, "cost": cost, "stays": False, "is_kept": True}
    return TextCost(**values | given, folder=Path("text/toy"))


def test_the_longest_caption_stands_for_all_that_are_missing() -> None:
    found = cost_of()
    assert found.cost is not None
    assert (found.cost.caption_bytes, found.cost.peak_bytes) == (4 * KIB, 4 * MIB)
    assert found.disk_bytes == 4 * MIB
    assert cost_of(is_kept=False).disk_bytes == cost_of(cost=None).disk_bytes == 0


def test_a_plan_tells_what_captions_take() -> None:
    assert cost_of().lines() == [
        "1,024 of 1,500 texts to encode, up to 4.0 KiB each, up to 4.0 MiB in text/toy; 476 are there",
        "encoding takes 4.0 MiB of memory, 3.0 MiB of it the text encoders; before the denoiser is loaded",
    ]
    first, second = cost_of(num_missing=1500, is_kept=False, stays=True).lines()
    assert first == "1,500 of 1,500 texts to encode, up to 4.0 KiB each, none of it is written"
    assert second.endswith("; they stay in memory")
    [line] = cost_of(num_texts=1, num_missing=1, cost=None).lines()
    assert line == "1 of 1 text to encode; what that takes is not known for this model before it is done"


class Samples(list):
    """As a dataset has them."""


def dataset(*captions: str, sizes: tuple[tuple[int, int], ...] = ((8, 8),), **given: Any) -> Any:
    rows = Samples(SimpleNamespace(captions=[caption], references=(), path=caption) for caption in captions)
    values = {"samples": rows, "references": (), "buckets": dict.fromkeys(sizes), "batch_size": None}
    return SimpleNamespace(**values | {"is_regularisation": False, "prompt_files": None} | given)


def test_captions_are_chosen_by_their_tokens_the_longest_or_the_middle_ones() -> None:
    """Tokens where a family can count them, here one for each "x"; else characters."""
    family: Any = SimpleNamespace(count_prompt_tokens=lambda captions: [caption.count("x") for caption in captions])
    data = [dataset("x", "xxx", "long but of one x"), dataset("xxxx", "xx")]
    assert choose_texts(family, data, 2, longest=True) == ["xxxx", "xxx"]
    assert choose_texts(family, data, 1, longest=False) == ["xx"]
    assert choose_texts(family, data, 2, longest=False) == ["xxx", "xx"]
    assert choose_texts(family, [dataset("x", "xx")], 3, longest=True) == ["xx", "x", "xx"]
    family.count_prompt_tokens = lambda captions: None
    assert choose_texts(family, data, 1, longest=True) == ["long but of one x"]


def test_the_references_of_a_plan_are_those_of_the_image_with_most_pixels() -> None:
    def references(*sizes: tuple[int, int]) -> Any:
        return SimpleNamespace(
            captions=[], references=[SimpleNamespace(crop=Crop(*size, 0, 0, *size)) for size in sizes]
        )

    rows = Samples([references((8, 8), (8, 8)), references((4, 64)), references((16, 8))])
    assert largest_references([dataset(samples=rows, references=("guides",))]) == ((4, 64),)
    assert largest_references([dataset(samples=rows)]) == ()


def test_memory_is_measured_on_the_micro_batch_with_most_pixels() -> None:
    """A wide image of 128 pixels twice is less than one of 320."""
    data = [dataset(sizes=((8, 16),), batch_size=2), dataset(sizes=((16, 20), (8, 8)), is_regularisation=True)]
    load = largest_load(data, 1)
    assert (load.batch_size, load.height, load.width, load.is_regularisation) == (1, 16, 20, True)
    assert largest_load(data, 3).batch_size == 3
    assert largest_load([*data, dataset(sizes=((8, 16),), batch_size=9)], 3).batch_size == 9


@pytest.mark.parametrize(
    ("longest", "count", "expected"), [(True, 2, [5, 4]), (False, 1, [3]), (True, 4, [5, 4, 3, 2])]
)
def test_embeddings_of_files_are_chosen_by_their_length(longest: bool, count: int, expected: list[int]) -> None:
    """Of the first samples of each dataset, as many as a batch has."""

    def files(*lengths: int) -> Any:
        return dataset(
            *map(str, lengths),
            prompt_files=SimpleNamespace(
                take=lambda samples: [SimpleNamespace(files=[int(each.path)]) for each in samples],
                read=lambda length: PromptEmbeds({"a": torch.zeros(length), "b": torch.zeros(1)}),
            ),
        )

    data = [files(2, 5, 1, 1), files(4, 3)] if longest else [files(3), files(9), files(1)]
    found = _prompts_of_files(data, count, longest)
    assert [len(each.tensors["a"]) for each in found] == expected
