"""Files that people have in their folders: damaged, misnamed, hostile or odd, each with what must become of it."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

Content = bytes | Callable[[Path], None]


@dataclass(frozen=True)
class Odd:
    """One file.

    Args:
        name: of the file; bytes where it is not text.
        content: its bytes, or what makes it at a path.
        reason: regular expression of why it is not used; empty for one that is odd but sound.
    """

    name: str | bytes
    content: Content
    reason: str = ""


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def half(file_format: str) -> bytes:
    data = encode(noise(), file_format)
    return data[: len(data) // 2]


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0xFF
    return bytes(changed)


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.txt", "x" * 500)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


class Payload:
    """Unpickling it would make a folder."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("unpickled",)


def bind_socket(path: Path) -> None:
    # The name of a socket must be short, so it is bound from within its folder.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def frames(file_format: str) -> bytes:
    return encode(noise(seed=1), file_format, save_all=True, append_images=[noise(seed=2), noise(seed=3)])


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(64, 48), "JPEG", exif=exif)


# Whether the package that reads them is installed or not.
NO_HEIF = "pip install|not an image|damaged"
NOT_A_IMAGE, DAMAGED, EITHER = "not an image", "damaged", "not an image|damaged"

DAMAGED_FILES = (
    Odd("empty.jpg", b"", "empty"),
    Odd("one byte.png", b"x", NOT_A_IMAGE),
    Odd("newline.png", b"\n", NOT_A_IMAGE),
    Odd("text.jpg", b"hello, I am an image\n", NOT_A_IMAGE),
    Odd("text 16.png", "hello".encode("utf-16"), NOT_A_IMAGE),
    Odd("zeros.png", bytes(4096), NOT_A_IMAGE),
    Odd("random.webp", np.random.default_rng(0).bytes(10_000), NOT_A_IMAGE),
    Odd("404.jpg", b"<!doctype html><html><body>404</body></html>", NOT_A_IMAGE),
    Odd("lfs pointer.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", NOT_A_IMAGE),
    Odd("vector.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', NOT_A_IMAGE),
    Odd("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", NOT_A_IMAGE),
    Odd("document.jpg", b"%PDF-1.4\n%%EOF\n", NOT_A_IMAGE),
    Odd("archive.png", archive("zip"), NOT_A_IMAGE),
    Odd("tar.png", archive("tar"), NOT_A_IMAGE),
    Odd("gzip.bmp", gzip.compress(b"x" * 100), NOT_A_IMAGE),
    Odd("film.jpg", b"\x00\x00\x00\x20ftypisom" + bytes(100), NOT_A_IMAGE),
    Odd("program.gif", b"\x7fELF" + bytes(200), NOT_A_IMAGE),
    Odd("data.png", b'{"a": 1}', NOT_A_IMAGE),
    Odd("tensors.png", struct.pack("<Q", 2) + b"{}", NOT_A_IMAGE),
    Odd("pickle.jpg", pickle.dumps(Payload()), NOT_A_IMAGE),
    Odd("icon.png", encode(noise(), "ICO"), NOT_A_IMAGE),
    Odd("photoshop.png", b"8BPS\x00\x01" + bytes(100), NOT_A_IMAGE),
    Odd("targa.png", encode(noise(), "TGA"), NOT_A_IMAGE),
    Odd("dds.png", b"DDS " + bytes(124), NOT_A_IMAGE),
    Odd("sgi.png", encode(noise(), "SGI"), NOT_A_IMAGE),
    Odd("jpeg 2000.jpg", b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(64), NOT_A_IMAGE),
    Odd("xbm.png", encode(noise().convert("1"), "XBM"), NOT_A_IMAGE),
    Odd("only the mark.png", b"\x89PNG\r\n\x1a\n", EITHER),
    Odd("only the mark.jpg", b"\xff\xd8\xff\xe0", EITHER),
    Odd("only the mark.gif", b"GIF89a", EITHER),
    Odd("only the mark.webp", b"RIFF\x00\x00\x00\x00WEBP", EITHER),
    Odd("only the mark.tif", b"II*\x00\x08\x00\x00\x00", EITHER),
    Odd("only the mark.bmp", b"BM", EITHER),
    Odd("half.png", half("PNG"), DAMAGED),
    Odd("half.jpg", half("JPEG"), DAMAGED),
    Odd("half.webp", half("WEBP"), EITHER),
    Odd("half.gif", half("GIF"), DAMAGED),
    Odd("half.bmp", half("BMP"), DAMAGED),
    Odd("half.tif", half("TIFF"), DAMAGED),
    Odd("half.avif", half("AVIF"), EITHER),
    Odd("half.ppm", half("PPM"), DAMAGED),
    Odd("nearly whole.jpg", encode(noise(), "JPEG")[:-200], DAMAGED),
    Odd("bad sum.png", flipped(encode(noise()), 60), DAMAGED),
    Odd("bad header.png", flipped(encode(noise()), 18), EITHER),
    Odd("no pixels.png", png(64, 64), DAMAGED),
    Odd("too few pixels.png", png(64, 64, bytes(1000)), DAMAGED),
    Odd("no width.png", png(0, 64), EITHER),
    Odd("bad maximum.ppm", b"P6\n4 4\n99999999\n" + bytes(48), EITHER),
    Odd("no number.ppm", b"P6\nfour 4\n255\n" + bytes(48), EITHER),
    Odd("far away.tif", b"II*\x00\xff\xff\xff\x7f", EITHER),
    Odd("bomb.png", png(60_000, 60_000), "more than"),
    Odd("huge.png", png(15_000, 12_000), "more than"),
    Odd("floating.tif", encode(Image.new("F", (64, 64), 0.5), "TIFF"), "floating-point"),
    Odd("phone.heic", b"\x00\x00\x00\x18ftypheic" + bytes(64), NO_HEIF),
    Odd("phone.heif", b"\x00\x00\x00\x18ftypheic" + bytes(64), NO_HEIF),
    Odd("phone.jpg", b"\x00\x00\x00\x18ftypheic" + bytes(64), NO_HEIF),
    Odd("camera.dng", b"II*\x00" + bytes(64), "camera raw"),
    Odd("new.jxl", b"\xff\x0a" + bytes(64), "JPEG XL"),
    Odd("nowhere.png", lambda path: path.symlink_to("/does/not/exist.png"), "link to nothing"),
    Odd("itself.png", lambda path: path.symlink_to(path.name), "link to nothing"),
    Odd("pipe.png", os.mkfifo, "not a regular file"),
    Odd("socket.png", bind_socket, "not a regular file"),
    Odd("device.png", lambda path: path.symlink_to("/dev/zero"), "a link that leads out of the dataset"),
    Odd("tiny.png", encode(noise(1, 1)), "smaller than minimum_image_size"),
    Odd("sliver.png", encode(Image.new("RGB", (60_000, 1))), "its aspect"),
)

MOVING = ("moving.gif", "moving.png", "moving.webp", "pages.tif")
ODD_BUT_SOUND = (
    Odd("print.jpg", encode(noise().convert("CMYK"), "JPEG")),
    Odd("gray.jpg", encode(noise().convert("L"), "JPEG")),
    Odd("progressive.jpg", encode(noise(), "JPEG", progressive=True)),
    Odd("two colors.png", encode(noise().convert("1"))),
    Odd("palette.png", encode(noise().convert("P"), transparency=0)),
    Odd("gray and alpha.png", encode(noise().convert("LA"))),
    Odd("alpha.webp", encode(noise().convert("RGBA"), "WEBP")),
    Odd("16 bits.png", encode(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16))),
    Odd("32 bits.tif", encode(noise().convert("I"), "TIFF")),
    Odd("lab.tif", encode(noise().convert("LAB"), "TIFF")),
    Odd("moving.gif", frames("GIF")),
    Odd("moving.png", frames("PNG")),
    Odd("moving.webp", frames("WEBP")),
    Odd("pages.tif", frames("TIFF")),
    Odd("two eyes.jpg", frames("MPO")),
    Odd("turned.jpg", rotated()),
    Odd("bad exif.jpg", encode(noise(), "JPEG", exif=b"Exif\x00\x00nonsense")),
    Odd("bad profile.png", encode(noise(), icc_profile=b"no profile")),
    Odd("more behind it.png", encode(noise()) + b"trailing bytes" * 100),
    Odd("a jpeg.png", encode(noise(), "JPEG")),
    Odd("SHOUTED.JPG", encode(noise(seed=16), "JPEG")),
    Odd("-rf.png", encode(noise(seed=4))),
    Odd("two\nlines.png", encode(noise(seed=5))),
    Odd("quote'\"`$(x).png", encode(noise(seed=6))),
    Odd("100%s{0}.png", encode(noise(seed=7))),
    Odd("\x1b[31mred.png", encode(noise(seed=8))),
    Odd("🦊 \u202efdp.png", encode(noise(seed=9))),
    Odd(unicodedata.normalize("NFC", "é.png"), encode(noise(seed=10))),
    Odd(unicodedata.normalize("NFD", "é.png"), encode(noise(seed=11))),
    Odd("n" * 251 + ".png", encode(noise(seed=12))),
    Odd(b"not \xff\xfe text.png", encode(noise(seed=13))),
    Odd("twin.png", encode(noise(seed=14))),
    Odd("twin.jpg", encode(noise(seed=15), "JPEG")),
    Odd("same as twin.png", encode(noise(seed=14))),
)


def write_odd_files(folder: Path, files: tuple[Odd, ...]) -> Path:
    """Make all of `files` in a new folder."""
    folder.mkdir(parents=True)
    for odd in files:
        path = Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(odd.name))))  # noqa: PTH118 - bytes
        if isinstance(odd.content, bytes):
            path.write_bytes(odd.content)
        else:
            odd.content(path)
    return folder
