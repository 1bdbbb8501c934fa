"""From the bytes of an image file to pixels, and what makes a file unusable.

Pillow is lenient where a trainer must not be: it opens truncated files, clips 16-bit values, shows the colors hidden
under transparency and ignores the camera's orientation. Each of these is settled here, once, for the scan that checks
a dataset and for the read that feeds the VAE.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from simpletuner.batch import Crop

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image

# Part of every cache key: raise it when the same file and crop would give other pixels.
TRANSFORM_VERSION = 1

# Vector and script formats (SVG, EPS, PDF) are left out: their readers run programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm"),
        *(".heic", ".heif", ".hif"),
    )
)
# Images to a user, but not to the readers here: found and reported, never skipped silently.
_CAMERA = "camera raw images are not read: develop them to PNG, JPEG or TIFF"
UNREAD_SUFFIXES = {
    ".jxl": "JPEG XL images are not read: convert them to PNG, JPEG or WebP",
    ".jp2": "JPEG 2000 images are not read: convert them to PNG, JPEG or WebP",
    ".psd": "Photoshop documents are not read: save them as PNG, JPEG or TIFF",
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"), _CAMERA),
}
# How files begin that phones write, after the size of the first box: ISO 23008-12, 10.2 and annex B.4.
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))

# Pillow's own limit for an error; at three bytes a pixel, half a gigabyte.
MAX_PIXELS = 178_956_970
SEVERAL_FRAMES = "several frames, of which the first is used"
# What shows through transparent parts.
BACKGROUND = (255, 255, 255)

# Orientation tag of EXIF -> how to turn the image upright (names of PIL.Image.Transpose).
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_SWAPS_SIDES = frozenset(("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270"))
_ORIENTATION_TAG = 0x0112
# Set in `info` of what `_load` gives: 16-bit colors that Pillow reads in 8 bits.
_LOW_BYTES_LOST = "simpletuner low bytes lost"

# What Pillow's readers raise on damaged files; there is no common base class, and each of these has been seen.
_DECODE_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, ArithmeticError, RuntimeError),
    *(AttributeError, AssertionError, struct.error, zlib.error),
)


class _Pixels:
    """Lets threads decode while all their images together have at most `limit` pixels.

    A file of a few kilobytes may unpack to half a gigabyte, and a scan has a thread for each core.
    """

    def __init__(self, limit: int):
        self._limit, self._taken = limit, 0
        self._condition = threading.Condition()

    @contextlib.contextmanager
    def of(self, num_pixels: int) -> Iterator[None]:
        """Wait for room, and hold it inside; one image alone always has room."""
        with self._condition:
            self._condition.wait_for(lambda: not self._taken or self._taken + num_pixels <= self._limit)
            self._taken += num_pixels
        try:
            yield
        finally:
            with self._condition:
                self._taken -= num_pixels
                self._condition.notify_all()


_decoding = _Pixels(MAX_PIXELS)


class UnusableImage(Exception):
    """A file that cannot be trained on; `str` of it is the reason, without the file's name."""


def decoder_version() -> str:
    """Changes when files that could not be read before may be readable now."""
    import PIL

    try:
        heif = metadata.version("pi-heif")
    except metadata.PackageNotFoundError:
        heif = "none"
    return f"pillow {PIL.__version__}, heif {heif}, formats {'+'.join(FORMATS)}, transforms {TRANSFORM_VERSION}"


@dataclass(frozen=True)
class ImageFacts:
    """What a scan wants to know of an image.

    Args:
        height: pixels, upright.
        width: pixels, upright.
        note: what its owner may not expect; None where there is nothing to tell.
        is_decoded: whether it was decoded to its last pixel; else its checksums were compared.
    """

    height: int
    width: int
    note: str | None = None
    is_decoded: bool = True


def image_facts(data: bytes, decodes: bool = True) -> ImageFacts:
    """Size and oddities of an image, after looking at all of its first frame.

    Args:
        decodes: decode each image. If false, comparing the checksums of a PNG will do, which takes a thirtieth of the
            time; only a PNG that was already broken when its checksums were computed passes for sound.

    Raises:
        UnusableImage: it cannot be decoded to its last pixel.
    """
    image = _opened(data)
    size = image.height, image.width
    if not decodes and image.format == "PNG" and _is_sound_png(data):
        return ImageFacts(*_upright_size(size, _turn(image)), is_decoded=False)
    with _decoding.of(image.width * image.height):
        # An eighth of a JPEG's sides: all of its data is read and only the sums of its blocks are computed.
        image.draft(None, (1, 1))
        image = _loaded(image)
        # A phone's JPEG has depth or another exposure behind the image: nobody would call that frames.
        moves = image.format != "MPO" and getattr(image, "is_animated", False)
        facts = ImageFacts(*_upright_size(size, _turn(image)), SEVERAL_FRAMES if moves else None)
        image.close()
        del image
    return facts


def _is_sound_png(data: bytes) -> bool:
    """Whether a PNG is complete, all of its checksums are right, and nothing behind its pixels says more of them."""
    kinds: list[bytes] = []
    position = 8  # behind the signature
    while not kinds or kinds[-1] != b"IEND":
        end = position + 8 + int.from_bytes(data[position : position + 4])
        kind, checksum = data[position + 4 : position + 8], data[end : end + 4]
        if len(checksum) < 4 or zlib.crc32(memoryview(data)[position + 4 : end]) != int.from_bytes(checksum):
            return False
        kinds.append(kind)
        position = end + 4
    pixels = kinds.count(b"IDAT")
    return pixels > 0 and b"acTL" not in kinds and kinds[-1 - pixels : -1] == [b"IDAT"] * pixels


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an upright image, as `image_facts`."""
    facts = image_facts(data)
    return facts.height, facts.width


def load_image(data: bytes) -> Image.Image:
    """The first frame, upright, 8-bit sRGB, transparency laid on `BACKGROUND`.

    Raises:
        UnusableImage: as `image_facts`.
    """
    return _to_srgb(_decode(data))


def checked_bytes(data: bytes, digest: str) -> bytes:
    """`data`, where it is the content that was indexed: what is made of it is kept under the name of that content.

    Raises:
        UnusableImage: it is another.
    """
    if hashlib.sha256(data).hexdigest() != digest:
        raise UnusableImage("changed since the run began")
    return data


def load_mask(data: bytes, crop: Crop, is_flipped: bool = False, binary: bool = False) -> torch.Tensor:
    """The brightness of an image, cut as `crop` says: (1, H, W) float32 in [0, 1]. What is transparent is 0.

    Values are weights and no colors: no profile is applied, and a smaller or larger mask is averaged or repeated,
    never rung by a sharper filter.

    Args:
        is_flipped: mirror it left to right after the cut.
        binary: 1 wherever any channel is above 0.

    Raises:
        UnusableImage: as `image_facts`.
    """
    import numpy as np
    import torch
    from PIL import Image

    image = _decode(data)
    if binary and image.info.get(_LOW_BYTES_LOST):
        raise UnusableImage(
            "16-bit colors are read with 8 bits, so small labels would be black; save it with 8 bits per channel, or "
            "as 16-bit gray"
        )
    if image.mode.startswith("I"):  # 16-bit gray, as it is: a label of 1 is not black
        stored = np.clip(np.asarray(image).astype(np.float32), 0, 65535)
        values = (stored > 0).astype(np.float32) if binary else stored / 65535
    else:
        values = _mask_values(image, binary)
    gray = Image.fromarray(values.astype(np.float32))
    size = (crop.intermediate_width, crop.intermediate_height)
    if gray.size != size:
        gray = gray.resize(size, Image.Resampling.BOX)  # the mean over an area; repetition where it grows
    gray = gray.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    weights = torch.from_numpy(np.array(gray, dtype=np.float32)[None]).clamp(0, 1)  # (1, H, W)
    return weights.flip(-1) if is_flipped else weights


def _mask_values(image: Image.Image, binary: bool) -> NDArray[np.float32]:
    """(H, W) what each pixel of an 8-bit image counts, in [0, 1]."""
    import numpy as np

    try:
        image = image.convert("RGBA")
    except ValueError as error:
        raise UnusableImage(f"its colors cannot be read: {error}") from None
    covers = np.asarray(image.getchannel("A"), dtype=np.float32) / np.float32(255)
    channels = image.convert("RGB")
    if binary:
        return ((np.asarray(channels).max(axis=2) > 0) & (covers > 0)).astype(np.float32)
    return (np.asarray(channels.convert("L"), dtype=np.float32) / np.float32(255) * covers).astype(np.float32)


def to_pixels(image: Image.Image, crop: Crop, is_flipped: bool = False) -> torch.Tensor:
    """Resize and cut out: (3, H, W) float32 in [-1, 1].

    Lanczos; Pillow widens its window with the reduction, so that nothing aliases.

    Args:
        is_flipped: mirror it left to right after the cut.
    """
    import numpy as np
    import torch
    from PIL import Image

    size = (crop.intermediate_width, crop.intermediate_height)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    if box != (0, 0, *image.size):
        image = image.crop(box)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)
    # torch's kernels leave the interpreter to the thread that encodes; numpy's hold it.
    pixels = values.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
    return pixels.flip(-1) if is_flipped else pixels


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Pillow's names of what can be read here, their readers registered; HEIF where its package is installed."""
    # Importing a reader registers it; Image.init() would import all of Pillow's.
    from PIL import (  # noqa: F401
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        PpmImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    try:
        import pi_heif
    except ImportError:
        return FORMATS
    pi_heif.register_heif_opener(thumbnails=False)
    return (*FORMATS, "HEIF")


def _decode(data: bytes) -> Image.Image:
    return _upright(_load(data))


def _load(data: bytes) -> Image.Image:
    return _loaded(_opened(data))


def _opened(data: bytes) -> Image.Image:
    """The first frame as it is stored, before its pixels are read.

    Raises:
        UnusableImage: as `image_facts`.
    """
    from PIL import Image

    if not data:
        raise UnusableImage("the file is empty")
    formats = _readable_formats()
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError:
        if "HEIF" not in formats and data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            raise UnusableImage("HEIF images need pi-heif: pip install pi-heif") from None
        raise UnusableImage("not an image, or of a format that is not read") from None
    except Image.DecompressionBombError:
        raise UnusableImage(f"more than {MAX_PIXELS} pixels") from None
    except _DECODE_ERRORS as error:
        raise UnusableImage(f"damaged: {_one_line(error)}") from None
    if image.width * image.height > MAX_PIXELS:  # from the header, before memory is taken
        raise UnusableImage(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
    if image.mode == "F":
        raise UnusableImage("floating-point values have no agreed range; save it with 8 or 16 bits")
    return image


def _loaded(image: Image.Image) -> Image.Image:
    """An opened image with its pixels."""
    loses = _loses_low_bytes(image)
    try:
        image.load()
    except _DECODE_ERRORS as error:
        raise UnusableImage(f"damaged: {_one_line(error)}") from None
    image.info[_LOW_BYTES_LOST] = loses
    return image


def _loses_low_bytes(image: Image.Image) -> bool:
    """Whether Pillow will read 16-bit colors in 8 bits: it names the stored form before it decodes."""
    if image.mode.startswith("I"):
        return False
    for tile in getattr(image, "tile", ()):
        stored, *more = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        most = more[0] if image.format == "PPM" and more else 255
        if (isinstance(stored, str) and ";16" in stored) or (isinstance(most, int) and most > 255):
            return True
    return False


def _upright(image: Image.Image) -> Image.Image:
    """Turn as the camera says."""
    from PIL import Image

    name = _turn(image)
    return image if name is None else image.transpose(Image.Transpose[name])


def _turn(image: Image.Image) -> str | None:
    """How to turn the image upright. Malformed EXIF says nothing: the image itself is sound."""
    from PIL import Image

    try:
        # A PNG's own method decodes it, since EXIF may come behind the pixels: both callers have seen to that.
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG)
    except _DECODE_ERRORS:
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _upright_size(size: tuple[int, int], turn: str | None) -> tuple[int, int]:
    """(height, width) after turning."""
    height, width = size
    return (width, height) if turn in _SWAPS_SIDES else (height, width)


def _to_srgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = _scale_to_8_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in ("P", "1"):
        image = image.convert("RGB")
    image = _apply_profile(image, profile)
    if image.mode == "RGBA":
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB by the embedded profile; a damaged profile, or one of another color space, says nothing."""
    from PIL import ImageCms

    if not profile and image.mode != "LAB":
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        # The common case, and the transform would be the identity up to rounding.
        if image.mode == mode and "sRGB" in ImageCms.getProfileDescription(source):
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None  # it is None only for conversions in place
    return converted


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits by scale; Pillow's own conversion clips everything above 255."""
    import numpy as np
    from PIL import Image

    values = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
