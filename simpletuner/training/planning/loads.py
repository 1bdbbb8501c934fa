"""What memory is measured on: the largest micro-batch of a run, and its longest prompts."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.batch import PromptEmbeds
from simpletuner.data.dataset import Dataset
from simpletuner.models.family import ModelFamily
from simpletuner.training.planning.encoding import blank_image, choose_texts, encoding_cost, largest_references
from simpletuner.training.planning.shapes import Load


def largest_load(training: Sequence[Dataset], batch_size: int) -> Load:
    """The micro-batch with the most pixels."""
    loads = [
        Load(dataset.batch_size or batch_size, height, width, dataset.is_regularisation, largest_references(training))
        for dataset in training
        for height, width in dataset.buckets
    ]
    return max(loads, key=lambda load: load.num_pixels)


def choose_prompts(family: ModelFamily, training: Sequence[Dataset], load: Load, longest: bool) -> list[PromptEmbeds]:
    """Prompts of one micro-batch: the longest captions, from shapes where that can be, or the middle ones."""
    batch_size = load.batch_size
    if all(dataset.prompt_files for dataset in training):
        return _prompts_of_files(training, batch_size, longest)
    texts = choose_texts(family, training, batch_size, longest)
    images = [[blank_image(*size) for size in load.references]] * batch_size
    if longest and family.spec.caches_prompt_embeds and (cost := encoding_cost(family, texts, images)) is not None:
        return list(cost.embeds)
    embeds = family.encode_prompts(texts, images)
    family.free_prompt_encoders()
    return embeds


def _prompts_of_files(training: Sequence[Dataset], batch_size: int, longest: bool) -> list[PromptEmbeds]:
    """As `choose_prompts`, where the embeddings are in files."""
    found = []
    for dataset in training:
        samples = dataset.samples[:batch_size]
        assert dataset.prompt_files is not None, "choose_prompts asks"
        found += [dataset.prompt_files.read(row.files[0]) for row in dataset.prompt_files.take(samples)]
    found.sort(key=lambda each: -max(len(tensor) for tensor in each.tensors.values()))
    start = 0 if longest else max(0, len(found) // 2 - batch_size // 2)
    return (found[start:] * batch_size)[:batch_size]
