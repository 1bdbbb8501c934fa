"""The flags of `extract-vlm-embeds`: those of FireRed-Image-Edit's program, and what its page promises beside them.

Source: FireRedTeam/FireRed-Image-Edit (Apache-2.0), `train/src/extract_vlm_embeds.py` and `train/README_zh.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.commands.flags import FlagParser
from simpletuner.errors import ConfigError, Problem

FORMATS = ("safetensors", "pt")
MODEL = "/dev/shm/Qwen-Image"


@dataclass(frozen=True)
class Fields:
    """Names of the columns of a row."""

    source: str
    target: str
    instruction: str
    instruction_cn: str
    inverse_instruction: str
    inverse_instruction_cn: str

    @property
    def instructions(self) -> tuple[str, str]:
        return self.instruction, self.instruction_cn

    @property
    def inverse_instructions(self) -> tuple[str, str]:
        return self.inverse_instruction, self.inverse_instruction_cn


# Of the target: what the page of the original says, and what its program reads.
TARGETS = ("target_image", "edit_image")


@dataclass(frozen=True)
class ExtractFlags:
    """A command line of `extract-vlm-embeds`; see `extract_parser` for each."""

    jsonl_path: Path
    output_jsonl_dir: Path
    embeddings_save_dir: Path
    model_path: str
    batch_size: int
    image_sample_size: int
    num_workers: int
    disable_inverse: bool
    t2i_mode: bool
    file_format: str
    allow_urls: bool
    skip_bad_rows: bool
    fields: Fields


def extract_parser() -> FlagParser:
    """Every flag with its help."""
    about = (
        "Encode the instructions of a .jsonl file, with the images that they mention, by the vision-language model of "
        "a Qwen-Image model: one file for each, and the rows with the names of these files. Files that are there "
        "already are not made again."
    )
    parser = FlagParser("extract-vlm-embeds", about)
    parser.add_argument("jsonl_path", type=Path, help="The rows, one JSON object per line.")
    flag = parser.flag
    flag(
        "output_jsonl_dir",
        Path,
        None,
        "Folder of the rows with their files, one table for each process.",
        required=True,
    )
    flag("embeddings_save_dir", Path, None, "Folder of the embeddings.", required=True)
    flag("model_path", str, MODEL, "Model folder or hub id: its text_encoder, processor and tokenizer are read.")
    flag("batch_size", int, 4, "Rows whose images are in memory at once.")
    flag("image_sample_size", int, 512, "Images are reduced to the area of a square of this side, as in training.")
    flag("num_workers", int, 16, "Threads that read images.")
    flag("disable_inverse", bool, False, "Only the instructions themselves: three files for each row.")
    flag("t2i_mode", bool, False, "Text to image: the prompt alone, without any image; as with --disable_inverse.")
    flag("source_field", str, "source_image", "Column of the source images: a path, a list of paths, or null.")
    flag("target_field", str, None, f"Column of the target image. Default: {' or '.join(TARGETS)}.")
    flag("instruction_field", str, "instruction", "Column of the English instruction.")
    flag("instruction_cn_field", str, "instruction_cn", "Column of the Chinese instruction.")
    flag("inverse_instruction_field", str, "inverse_instruction", "Column of the English inverse instruction.")
    flag("inverse_instruction_cn_field", str, "inverse_instruction_cn", "Column of the Chinese inverse instruction.")
    flag("format", str, "safetensors", "File format: safetensors, or pt as in the original.", choices=FORMATS)
    flag("allow_urls", bool, False, "Fetch images that rows name by URL (http, https; public ones only).")
    flag("skip_bad_rows", bool, False, "Leave out rows that cannot be used. Otherwise they are an error.")
    return parser


def parse_extract(words: Sequence[str]) -> ExtractFlags:
    """Read a command line.

    Raises:
        ConfigError: a flag that is missing, unknown or cannot have its value.
    """
    found = vars(extract_parser().parse_args(list(words)))
    for name, least in (("batch_size", 1), ("image_sample_size", 64), ("num_workers", 1)):
        if found[name] < least:
            raise ConfigError(Problem(f"{found[name]} cannot be used", f"--{name}", allowed=f"{least} or more"))
    names = {name: found.pop(f"{name}_field") for name in Fields.__dataclass_fields__}
    fields = Fields(**{**names, "target": names["target"] or ""})
    # The page says that text to image forces it.
    found["disable_inverse"] = found["disable_inverse"] or found["t2i_mode"]
    return ExtractFlags(file_format=found.pop("format"), fields=fields, **found)
