"""Where the images of a dataset are: the keys of each `type`, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from simpletuner.config.dataset_values import CountWeights, PixelCounts
from simpletuner.config.options.declare import option
from simpletuner.config.values import Bool, FilePath, Int, Secret, Text, TextOrList

BackendType = Literal["local", "aws", "csv", "huggingface", "records", "webshart", "memory"]
NO_URLS = "images are not downloaded from URLs: fetch them yourself, csv_file then names local files"


class ImageSource(BaseModel):
    """The keys that say where images are; each belongs to one `type`, but for those that several share."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    type: BackendType = option(
        "local",
        help="Where the images are: `local` is a folder, `aws` a bucket of S3 or a store that speaks its protocol, "
        "`huggingface` a dataset of Parquet files, on disk or on the hub, `csv` a table that names images on disk, "
        "`records` rows of edits, each with a target, references and an instruction.",
        planned_values={
            "webshart": "tar files are not read; unpack them and use local",
            "memory": "use local on a tmpfs",
        },
        level="basic",
    )
    instance_data_dir: FilePath | None = option(
        None,
        help="Of `local`: folder with the images; its subfolders are read too. Of `csv`: folder that the paths in "
        "the table start from and may not leave; unset, that of the table. Of `records`: folder that paths start from; "
        "unset, the working folder. What is not there is looked for beside the table.",
        level="basic",
        path="input",
    )
    follow_outside_links: Bool = option(
        False,
        help="Of `local` and `csv`: follow links that lead out of the folder, as in a folder of links to images that "
        "lie elsewhere. Off, they are counted as not used. Links within the folder are always followed.",
    )
    aws_bucket_name: Text | None = option(None, help="Of `aws`: the bucket.")
    aws_data_prefix: Text = option("", help="Of `aws`: use only keys below this one; unset, the whole bucket.")
    aws_endpoint_url: Text | None = option(
        None, help="Of `aws`: address of the store. Unset: AWS_ENDPOINT_URL, else that of Amazon."
    )
    aws_region_name: Text | None = option(None, help="Of `aws`: the region. Unset: AWS_DEFAULT_REGION.")
    aws_access_key_id: Secret | None = option(
        None,
        help="Of `aws`: login. Unset, with the next one: what the AWS tools use (AWS_ACCESS_KEY_ID, ~/.aws, the role "
        "of the machine).",
    )
    aws_secret_access_key: Secret | None = option(
        None, help="Of `aws`: login. Better left out of the file: AWS_SECRET_ACCESS_KEY in the environment."
    )
    dataset_name: Text | None = option(
        None, help="Of `huggingface`: a Parquet file, a folder of them, or the id of a dataset on the hub."
    )
    dataset_config: Text | None = option(
        None, help="Of `huggingface`: the configuration (subset), where a dataset has several."
    )
    split: Text = option("train", help="Of `huggingface`: the split.")
    revision: Text | None = option(None, help="Of `huggingface`: branch, tag or commit on the hub. Unset: main.")
    image_column: Text = option("image", help="Of `huggingface`: the column that holds the images.")
    huggingface: Any = option(None, help="Filters of rows.", planned="all rows of the split are used")
    csv_file: FilePath | None = option(
        None, help="Of `csv`: the table, with a header. Rows of one image give it caption variants.", path="input"
    )
    csv_caption_column: Text = option("caption", help="Of `csv`: the column of the captions.")
    records_file: FilePath | None = option(
        None,
        help="Of `records`: a table (.jsonl, .json, .csv, .tsv, .parquet), a folder with some, a `.yml` mix of them as "
        "OmniGen2 has it, or a plain folder with `target`, `reference_1` and so on.",
        path="input",
    )
    skip_bad_rows: Bool = option(
        False, help="Of `records`: leave out rows that cannot be used, and say how many. Otherwise they are an error."
    )
    languages: TextOrList | None = option(
        None,
        takes="text, or list of texts",
        help="Of `records`: languages of the instructions (`instruction_zh`; the column without one is `en`). Unset: "
        "all, as variants of one caption.",
    )
    inverse_instructions: Bool = option(
        False,
        help="Of `records`: train rows with one reference and an `inverse_instruction` in the inverse direction too.",
    )
    tasks: TextOrList | None = option(
        None, takes="text, or list of texts", help="Of `records`: take the rows of these tasks only. Unset: of all."
    )
    reference_weights: CountWeights | None = option(
        None,
        takes="object, or text such as 0=1,1=2",
        help="Of `records`: weights of the rows by their number of references; those of numbers that are not named are "
        "not trained. Unset: every row counts the same.",
    )
    max_output_pixels: Int | None = option(
        None,
        help="Of `records`: larger targets are reduced to this. Unset: to `resolution`. None is enlarged unless "
        "`enlarge` is written.",
        unit="pixels in all",
        ge=4096,
    )
    max_side_length: Int | None = option(
        None, help="Of `records`: targets and references with a longer side are reduced to this.", unit="pixels", ge=64
    )
    max_input_pixels: PixelCounts | None = option(
        None,
        takes="whole number, or list of whole numbers",
        help="Of `records`: larger references are reduced to this; of a list the first one counts for rows with one "
        "reference, the second for rows with two, the last for all with more. Unset: to `resolution`.",
        unit="pixels in all",
    )
    csv_url_column: Text | None = option(None, help="Of `csv`: the column of URLs.", planned=NO_URLS)
    csv_cache_dir: FilePath | None = option(None, help="Of `csv`: folder of downloads.", planned=NO_URLS)


class SourceRule(NamedTuple):
    """The keys of one `type`: the one that says where, those that may go with it, where captions may come from."""

    place: str
    others: tuple[str, ...]
    captions: tuple[str, ...]


SOURCE_RULES: Mapping[str, SourceRule] = {
    "local": SourceRule(
        "instance_data_dir", ("follow_outside_links",), ("filename", "textfile", "csv", "parquet", "instanceprompt")
    ),
    "aws": SourceRule(
        "aws_bucket_name",
        (
            *("aws_data_prefix", "aws_endpoint_url", "aws_region_name"),
            *("aws_access_key_id", "aws_secret_access_key"),
        ),
        ("filename", "textfile", "instanceprompt"),
    ),
    "huggingface": SourceRule(
        "dataset_name",
        ("dataset_config", "split", "revision", "image_column"),
        ("huggingface", "instanceprompt"),
    ),
    "records": SourceRule(
        "records_file",
        (
            *("instance_data_dir", "skip_bad_rows", "languages", "inverse_instructions", "tasks"),
            *("reference_weights", "max_output_pixels", "max_side_length", "max_input_pixels"),
        ),
        ("records", "instanceprompt"),
    ),
    "csv": SourceRule(
        "csv_file",
        ("instance_data_dir", "csv_caption_column", "follow_outside_links"),
        ("csv", "filename", "instanceprompt"),
    ),
}
# Types whose tables hold captions: the strategy of the same name is their default.
TABLE_TYPES = ("huggingface", "csv", "records")


class SourceFault(NamedTuple):
    """One thing that is wrong with the keys of a source."""

    key: str
    message: str
    allowed: str | None = None
    fix: str | None = None


def source_faults(entry: ImageSource) -> Iterator[SourceFault]:
    """What is missing for the entry's `type`, and what belongs to another one."""
    rule = SOURCE_RULES.get(entry.type)
    if rule is None:  # refused by name already
        return
    if getattr(entry, rule.place) is None:
        yield SourceFault(rule.place, f"is missing: type {entry.type} needs it", fix="set it")
    for name, field in ImageSource.model_fields.items():
        is_ours = name in ("type", "huggingface", "csv_url_column", "csv_cache_dir", rule.place, *rule.others)
        if not is_ours and getattr(entry, name) != field.default:
            owners = " or ".join(kind for kind, other in SOURCE_RULES.items() if name in (other.place, *other.others))
            yield SourceFault(name, f"has no use with type {entry.type}", f"with type {owners}", "remove the key")
    has_login = [entry.aws_access_key_id is not None, entry.aws_secret_access_key is not None]
    if entry.type == "aws" and any(has_login) and not all(has_login):
        missing = "aws_secret_access_key" if has_login[0] else "aws_access_key_id"
        yield SourceFault(missing, "is missing: the other half of the login is set", fix="set both, or none")


def caption_fault(entry: ImageSource, strategy: str | None) -> SourceFault | None:
    """Where a caption strategy cannot work with the entry's `type`."""
    rule = SOURCE_RULES.get(entry.type)
    if rule is None or strategy is None or strategy in rule.captions:
        return None
    message = f'"{strategy}" has no source in a dataset of type {entry.type}'
    return SourceFault("caption_strategy", message, ", ".join(rule.captions))
