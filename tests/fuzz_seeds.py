"""Sound files of every kind that is read, to be mutated."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

Seed = tuple[str, bytes]


@functools.cache
def image_seeds() -> list[Seed]:
    """(extension, content): each format, and the modes and attachments whose readers are their own."""
    values = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    rgb = Image.fromarray(values)
    rgba = rgb.convert("RGBA")
    rgba.putalpha(Image.fromarray(values[:, :, 0]))
    palette = rgb.quantize(16)
    deep = Image.fromarray((values[:, :, 0].astype(np.uint16) * 257).astype(np.uint16))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    extras = {"exif": exif.tobytes(), "icc_profile": profile}
    many = {"save_all": True, "append_images": [rgb.rotate(90, expand=False)]}
    wanted: list[tuple[str, Image.Image, str, dict]] = [
        (".png", rgb, "PNG", extras),
        (".png", rgba, "PNG", {}),
        (".png", palette, "PNG", {"transparency": 3}),
        (".png", deep, "PNG", {}),
        (".png", rgb, "PNG", many),
        (".jpg", rgb, "JPEG", extras),
        (".jpg", rgb.convert("CMYK"), "JPEG", {}),
        (".jpg", rgb, "JPEG", {"progressive": True}),
        (".webp", rgb, "WEBP", extras),
        (".webp", rgba, "WEBP", {"lossless": True}),
        (".webp", rgb, "WEBP", many),
        (".gif", palette, "GIF", {}),
        (".gif", palette, "GIF", {"save_all": True, "append_images": [palette.rotate(180)]}),
        (".tif", rgb, "TIFF", {}),
        (".tif", rgb, "TIFF", {"compression": "tiff_lzw"}),
        (".tif", rgb, "TIFF", {"compression": "tiff_adobe_deflate", "icc_profile": profile}),
        (".tif", rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (".tif", deep, "TIFF", {}),
        (".bmp", rgb, "BMP", {}),
        (".bmp", palette, "BMP", {}),
        (".ppm", rgb, "PPM", {}),
        (".avif", rgb, "AVIF", {"quality": 50}),
    ]
    seeds = []
    for suffix, image, name, options in wanted:
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        seeds.append((suffix, buffer.getvalue()))
    return seeds


@functools.cache
def caption_seeds() -> list[bytes]:
    text = "a dog on the grass, Häuser am See\na second caption \N{GRINNING FACE}\r\n\r\nthird"
    western = "a dog\u2019s nose\nHäuser am See"
    return [
        *(text.encode(encoding) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32")),
        *(western.encode(encoding) for encoding in ("cp1252",)),
        "一只猫在草地上\n犬".encode("gbk"),
        "собака на траве".encode("koi8-r"),
    ]


@functools.cache
def table_seeds() -> list[Seed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [("a.png", "a dog, on grass"), ("b", 'the "second"\ncaption'), ("a.png", "Häuser")]
    quoted = "".join('{},"{}"\n'.format(name, text.replace('"', '""')) for name, text in rows)
    jsonl = "\n".join(json.dumps({"file_name": name, "text": [text, "x"]}) for name, text in rows)
    image = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(image, "PNG")
    columns = {"file_name": [name for name, _ in rows], "text": [text for _, text in rows]}
    images = {"image": [{"bytes": image.getvalue(), "path": None}] * 3}
    seeds = [(".csv", f"file_name,text\n{quoted}".encode()), (".jsonl", jsonl.encode())]
    seeds += [(".csv", f"file_name,text\n{quoted}".encode("utf-16")), (".tsv", b"file_name\ttext\na.png\tone\n")]
    for compression in ("snappy", "none", "zstd"):
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns | images), buffer, compression=compression)
        seeds.append((".parquet", buffer.getvalue()))
    return seeds


def json_seeds(run: Path, model: Path) -> dict[str, bytes]:
    """Path from the folder above -> content of the JSON files of a run and of its model."""
    library = {"one": "a prompt", "two": {"prompt": "x", "seed": 7, "resolution": "64x64"}}
    (run / "library.json").write_text(json.dumps(library))
    files = [*run.glob("*.json")]
    files += [model / part / "config.json" for part in ("vae", "unet", "text_encoder", "text_encoder_2")]
    files += [*(model / "tokenizer").glob("*.json")]
    return {str(path.relative_to(run.parent)): path.read_bytes() for path in files}
