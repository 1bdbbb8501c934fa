"""What is lost or odd in a dataset, each with the one thing to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simpletuner.commands.captions import CaptionCheck
from simpletuner.config.options import TrainConfig
from simpletuner.data.dataset import Dataset
from simpletuner.text import count_text, printable

MANY_ENLARGED = 0.1
# Reasons of `transforms.py` that end with what to do.
SAY_THEIR_REMEDY = ("HEIF", "JPEG XL", "JPEG 2000", "Photoshop", "camera raw", "floating-point")


def remedies_of(
    dataset: Dataset, config: TrainConfig, captions: CaptionCheck, enlarged: Sequence[float]
) -> Iterator[str]:
    """One line per finding.

    Args:
        config: the options of the run.
        enlarged: factors of the images that are enlarged noticeably.
    """
    yield from _losses(dataset)
    if dataset.kind == "image" and not config.data.allow_dataset_oversubscription:
        yield from _small_buckets(dataset, dataset.batch_size or config.training.train_batch_size)
    if captions.num_empty:
        yield (
            f"{count_text(captions.num_empty, 'caption')} left empty by caption_filter_list, as if dropped: "
            "narrow the filters"
        )
    if captions.num_cut:
        yield (
            f"{count_text(captions.num_cut, 'caption')} longer than {captions.limit} tokens lose their end: "
            f"shorten them; the longest begins: {printable(captions.longest)[:60]}"
        )
    if len(enlarged) > MANY_ENLARGED * len(dataset.samples):
        yield (
            f"{count_text(len(enlarged), 'image')} enlarged, up to {max(enlarged):.1f} times, which trains blur: "
            "lower resolution, or set minimum_image_size"
        )
    if dataset.filter_report.duplicates:
        yield (
            f"{count_text(dataset.filter_report.duplicates, 'image')} with the bytes of another one count twice: "
            "remove them, unless that is intended"
        )


def _losses(dataset: Dataset) -> Iterator[str]:
    """Why files are not used, most frequent first."""
    skipped = dataset.filter_report.skipped
    for reason, count in sorted(skipped.counts.items(), key=lambda item: -item[1]):
        names = ", ".join(printable(path) for path in skipped.examples[reason][:3])
        more = ", ..." if count > 3 else ""
        remedy = _what_to_do(reason)
        yield f"{count:,} not used, {printable(reason)}{': ' * bool(remedy)}{remedy} ({names}{more})"


def _what_to_do(reason: str) -> str:
    if reason.startswith("smaller than"):
        return "lower minimum_image_size, or take larger images"
    if reason.startswith("its width / height"):
        return "crop it, or widen minimum_aspect_ratio and maximum_aspect_ratio"
    if reason.startswith("would grow"):
        return "raise max_upscale_threshold, lower resolution, or take larger images"
    if reason.startswith("its aspect"):
        return "crop it, or set crop with crop_aspect square"
    if reason.startswith("caption file"):
        return "write the caption again as UTF-8 text"
    if reason.startswith("no reference"):
        return "put one there, or move the image away"
    if reason.startswith("its reference"):
        return "make them alike, or set conditioning_type to reference_loose"
    if reason.startswith("folder"):
        return "make it readable"
    if reason.startswith(SAY_THEIR_REMEDY):
        return ""
    return "replace the file, or move it away"


def _small_buckets(dataset: Dataset, batch_size: int) -> Iterator[str]:
    passes = dataset.repeats + 1
    small = {size: count for size, count in dataset.filter_report.buckets.items() if count * passes < batch_size}
    if not small:
        return
    repeats = max(-(-batch_size // count) - 1 for count in small.values())
    sizes = ", ".join(f"{width}x{height}: {count}" for (height, width), count in list(small.items())[:4])
    yield (
        f"{count_text(len(small), 'size')} with fewer images than a batch of {batch_size} ({sizes}): "
        f"repeats {repeats} fills it, or use fewer sizes (crop_aspect square, aspect_bucket_rounding 1)"
    )
