"""Every kind of file becomes upright 8-bit sRGB pixels, or says why it cannot."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from simpletuner.batch import Crop
from simpletuner.data import transforms
from simpletuner.data.transforms import (
    FORMATS,
    SEVERAL_FRAMES,
    ImageFacts,
    UnusableImage,
    _Pixels,
    image_facts,
    image_size,
    load_image,
    to_pixels,
)

FIXTURES = Path(__file__).parents[2] / "fixtures"


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def one_color(data: bytes) -> tuple[int, ...]:
    image = load_image(data)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM"])
def test_each_format_is_read(file_format: str) -> None:
    data = encode(Image.new("RGB", (40, 24), (200, 40, 40)), file_format)
    assert image_size(data) == (24, 40)
    assert np.allclose(one_color(data), (200, 40, 40), atol=6)


def test_a_phone_image_with_two_frames_is_read() -> None:
    first, second = Image.new("RGB", (40, 24), (200, 40, 40)), Image.new("RGB", (40, 24), (0, 0, 0))
    assert np.allclose(one_color(encode(first, "MPO", save_all=True, append_images=[second])), (200, 40, 40), atol=6)


def test_the_orientation_of_the_camera_is_applied_before_the_size_is_taken() -> None:
    image = Image.new("RGB", (64, 48), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 64, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the stored image belongs on the right
    data = encode(image, "PNG", exif=exif)
    assert image_size(data) == (64, 48)
    upright = load_image(data)
    assert upright.getpixel((47, 30)) == (255, 0, 0)
    assert upright.getpixel((0, 30)) == (0, 0, 255)


# Corners as EXIF's table of orientations says them: the stored rows are A B / C D.
@pytest.mark.parametrize(
    ("tag", "upright"),
    [(1, "AB CD"), (2, "BA DC"), (3, "DC BA"), (4, "CD AB"), (5, "AC BD"), (6, "CA DB"), (7, "DB CA"), (8, "BD AC")],
)
def test_each_orientation_puts_the_four_corners_where_exif_says(tag: int, upright: str) -> None:
    colors = {"A": (255, 0, 0), "B": (0, 255, 0), "C": (0, 0, 255), "D": (255, 255, 0)}
    image = Image.new("RGB", (4, 2))
    for place, name in zip(((0, 0), (3, 0), (0, 1), (3, 1)), "ABCD", strict=True):
        image.putpixel(place, colors[name])
    exif = Image.Exif()
    exif[0x0112] = tag
    data = encode(image, "PNG", exif=exif)
    turned = load_image(data)
    width, height = turned.size
    assert (width, height) == ((4, 2) if tag < 5 else (2, 4))
    assert image_size(data) == (height, width)
    places = ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1))
    assert [turned.getpixel(place) for place in places] == [colors[name] for name in upright.replace(" ", "")]


def test_a_phone_s_heif_image_stands_upright_and_is_turned_once() -> None:
    """64x48 of green and red over red and blue, orientation 6 in EXIF and as `irot`, as phones write it."""
    pytest.importorskip("pi_heif")
    data = (FIXTURES / "turned.heic").read_bytes()
    assert image_size(data) == (64, 48)
    upright = load_image(data)
    corners = [upright.getpixel(place) for place in ((4, 4), (44, 4), (4, 60), (44, 60))]
    assert np.allclose(corners, [(200, 30, 30), (20, 200, 40), (30, 40, 220), (200, 30, 30)], atol=6)


def test_a_heif_image_without_its_package_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.data.transforms._readable_formats", lambda: FORMATS)
    with pytest.raises(UnusableImage, match="pip install pi-heif"):
        image_size((FIXTURES / "turned.heic").read_bytes())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_malformed_exif_is_ignored() -> None:
    data = encode(Image.new("RGB", (64, 48)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert image_size(data) == (48, 64)


def test_16_bits_are_scaled_not_clipped() -> None:
    gray = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    assert one_color(encode(gray)) == (156, 156, 156)  # 40000 / 65535 * 255 = 155.6


def test_colors_hidden_under_transparency_stay_hidden() -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert one_color(encode(hidden)) == (255, 255, 255)
    assert one_color(encode(half)) == (255, 127, 127)  # 255 * (1 - 128 / 255)


def test_a_transparent_palette_color_shows_the_background() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    assert one_color(encode(image)) == (9, 8, 7)
    assert one_color(encode(image, transparency=1)) == (255, 255, 255)


def test_gray_with_alpha_is_laid_on_the_background() -> None:
    assert one_color(encode(Image.new("LA", (4, 4), (10, 0)))) == (255, 255, 255)
    assert one_color(encode(Image.new("LA", (4, 4), (10, 255)))) == (10, 10, 10)


def test_cmyk_becomes_rgb() -> None:
    assert np.allclose(one_color(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")), (255, 0, 0), atol=3)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for file_format in ("GIF", "PNG", "WEBP"):
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100)
        assert np.allclose(one_color(data), (255, 0, 0), atol=8), file_format


def test_an_embedded_profile_is_applied() -> None:
    """L* = 50 is 18.4 % luminance, which sRGB encodes as 0.4663 * 255 = 118.9."""
    lab = Image.new("LAB", (4, 4), (128, 128, 128))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB", 5000)).tobytes()
    red, green, blue = one_color(encode(lab, "TIFF", icc_profile=profile))
    assert max(abs(red - 119), abs(green - 119), abs(blue - 119)) <= 2


def test_a_damaged_profile_is_ignored() -> None:
    assert one_color(encode(Image.new("RGB", (4, 4), (1, 2, 3)), icc_profile=b"no profile at all")) == (1, 2, 3)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated(file_format: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    return data[: len(data) // 2]


UNUSABLE = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am an image\n", "not an image"),
    "zeros": (bytes(4096), "not an image"),
    "html": (b"<html><body>404</body></html>", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    "pdf": (b"%PDF-1.4\n", "not an image"),
    "png magic only": (b"\x89PNG\r\n\x1a\n", "not an image|damaged"),
    "jpeg magic only": (b"\xff\xd8\xff\xe0", "not an image|damaged"),
    "half a png": (truncated("PNG"), "damaged"),
    "half a jpeg": (truncated("JPEG"), "damaged"),
    "half a webp": (truncated("WEBP"), "not an image|damaged"),
    "half a gif": (truncated("GIF"), "damaged"),
    "half a bmp": (truncated("BMP"), "damaged"),
    "half a tiff": (truncated("TIFF"), "damaged"),
    "half an avif": (truncated("AVIF"), "not an image|damaged"),
    "no image data": (png_header(64, 64), "damaged"),
    "a bomb that Pillow refuses": (png_header(60_000, 60_000), "more than"),
    "a huge image": (png_header(15_000, 12_000), "more than"),
    "floating point": (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_say_why(name: str) -> None:
    data, reason = UNUSABLE[name]
    with pytest.raises(UnusableImage, match=reason) as caught:
        image_size(data)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_scan_refuses_a_damaged_file_exactly_where_decoding_all_of_it_fails() -> None:
    """A thousand random bit flips and cuts: an image or a reason, nothing else, and the same as of the whole decode."""
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 255, (20, 33, 3), np.uint8))
    kinds = [(each, {}) for each in ("PNG", "WEBP", "GIF", "BMP", "TIFF")]
    kinds += [
        ("JPEG", {"progressive": progressive, "subsampling": parts}) for progressive in (0, 1) for parts in (0, 2)
    ]
    outcomes = set()
    for file_format, options in kinds:
        original = encode(noise, file_format, **options)
        for number in range(110):
            data = bytearray(original)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            if number % 3 == 0:
                del data[rng.integers(len(data)) :]
            found = [verdict(bytes(data), look) for look in (image_size, lambda each: load_image(each).size[::-1])]
            assert found[0] == found[1]
            outcomes.add((file_format, isinstance(found[0], str)))
    assert len(outcomes) == 12  # of each format some are sound and some are not


def verdict(data: bytes, look: Callable[[bytes], tuple[int, int]]) -> tuple[int, int] | str:
    try:
        return look(data)
    except UnusableImage as error:
        return str(error)


def test_a_png_is_believed_without_decoding_only_where_all_of_its_checksums_are_right() -> None:
    rng = np.random.default_rng(2)
    whole = encode(Image.fromarray(rng.integers(0, 255, (8, 12, 3), np.uint8)), pnginfo=text_chunk("prompt", "a fox"))
    assert image_facts(whole, decodes=False) == ImageFacts(8, 12, is_decoded=False)
    assert image_facts(whole) == ImageFacts(8, 12)
    for place in range(8, len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        for damaged in (bytes(flipped), whole[:place]):
            with contextlib.suppress(UnusableImage):
                assert image_facts(damaged, decodes=False).is_decoded
    # Checksums are right, pixels are missing: the only damage that they do not show.
    assert not image_facts(png_header(64, 64), decodes=False).is_decoded


def test_a_png_that_says_more_than_pixels_is_decoded_and_a_turned_one_has_its_upright_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(Image.new("RGB", (64, 48)), exif=exif)
    assert image_facts(turned, decodes=False) == ImageFacts(64, 48, is_decoded=False)
    start = turned.index(b"eXIf") - 4
    chunk = turned[start : start + 12 + int.from_bytes(turned[start : start + 4])]
    behind = turned.replace(chunk, b"")[:-12] + chunk + turned[-12:]
    assert image_facts(behind, decodes=False) == ImageFacts(64, 48)
    frames = [Image.new("RGB", (4, 6), (shade, 0, 0)) for shade in (0, 200)]
    moving = encode(frames[0], save_all=True, append_images=frames[1:])
    assert image_facts(moving, decodes=False) == ImageFacts(6, 4, SEVERAL_FRAMES)
    without_second = moving[: moving.rindex(b"fcTL") - 4] + moving[-12:]  # which is promised all the same
    assert image_facts(without_second, decodes=False) == image_facts(without_second) == ImageFacts(6, 4, SEVERAL_FRAMES)


def text_chunk(name: str, text: str) -> PngInfo:
    info = PngInfo()
    info.add_text(name, text)
    return info


def test_pixels_are_resized_cut_and_scaled() -> None:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    image.paste((255, 255, 255), (4, 0, 8, 4))
    pixels = to_pixels(image, Crop(4, 8, 1, 3, 2, 4))
    assert pixels.shape == (3, 2, 4)
    assert pixels.dtype.is_floating_point
    assert pixels[0, 0].tolist() == [-1.0, 1.0, 1.0, 1.0]  # columns 3 to 6


def test_a_gray_value_by_hand() -> None:
    pixels = to_pixels(Image.new("RGB", (4, 4), (51, 102, 204)), Crop(4, 4, 0, 0, 4, 4))
    assert pixels[:, 0, 0].tolist() == pytest.approx([-0.6, -0.2, 0.6], abs=1e-6)


def test_reduction_does_not_alias() -> None:
    """Columns of black and white, reduced four times: their mean, not a moire of either."""
    columns = np.zeros((64, 64, 3), np.uint8)
    columns[:, ::2] = 255
    pixels = to_pixels(Image.fromarray(columns), Crop(16, 16, 0, 0, 16, 16))
    assert pixels[:, 2:-2, 2:-2].abs().max() < 0.05


def test_images_that_are_decoded_at_once_have_a_limit_together() -> None:
    pixels, running, most = _Pixels(100), 0, 0
    lock = threading.Lock()

    def decode(size: int) -> None:
        nonlocal running, most
        with pixels.of(size):
            with lock:
                running += size
                most = max(most, running)
            time.sleep(0.005)
            with lock:
                running -= size

    threads = [threading.Thread(target=decode, args=(size,)) for size in (30, 60, 50, 100, 10, 400, 20, 70) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert running == 0
    assert most == 400  # the one that is too large works, alone
    assert pixels._taken == 0


def test_images_that_fit_together_are_decoded_at_once() -> None:
    pixels, entered = _Pixels(100), threading.Event()

    def decode() -> None:
        with pixels.of(40):
            entered.set()

    with pixels.of(60):
        thread = threading.Thread(target=decode, daemon=True)
        thread.start()
        assert entered.wait(60)
    thread.join()


def test_16_bit_white_is_white_and_each_257_a_level() -> None:
    shades = [Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (65535, 257, 128, 129)]
    assert [one_color(encode(each))[0] for each in shades] == [255, 1, 0, 1]


def test_a_profile_keeps_what_is_transparent() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    data = profile.tobytes().replace(*(name.encode("utf-16-be") for name in ("sRGB", "xRGB")))  # so it is applied
    assert one_color(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), icc_profile=data)) == (255, 255, 255)


def test_the_version_of_the_decoder_knows_its_libraries_and_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {transforms.decoder_version()}
    monkeypatch.setattr(transforms, "TRANSFORM_VERSION", 999)
    seen.add(transforms.decoder_version())
    monkeypatch.setattr(transforms.metadata, "version", lambda name: "999")
    seen.add(transforms.decoder_version())
    monkeypatch.setattr(transforms, "FORMATS", ("PNG",))
    seen.add(transforms.decoder_version())
    assert len(seen) == 4


def test_a_reason_is_one_line_of_bounded_length() -> None:
    assert transforms._one_line(ValueError("a\n  b")) == "a b"
    assert transforms._one_line(ValueError()) == "ValueError"
    assert len(transforms._one_line(ValueError("x" * 1000))) == 200


def test_another_exposure_behind_a_phone_s_image_is_no_frame_and_an_animation_has_some() -> None:
    frames = [Image.new("RGB", (8, 4), color) for color in ("red", "lime")]
    phone = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert transforms.image_facts(phone) == transforms.ImageFacts(4, 8, None)
    moving = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert transforms.image_facts(moving) == transforms.ImageFacts(4, 8, transforms.SEVERAL_FRAMES)


def swapped_profile(name: str) -> bytes:
    """sRGB's profile with the primaries of red and blue exchanged, under a name of four letters."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))
    table = 128 + 4  # after the header and the number of tags: 12 bytes each, their names first
    head, body = data[: table + 12 * 40], data[table + 12 * 40 :]
    return head.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ") + body


def test_a_profile_of_other_primaries_moves_the_colors_and_one_called_srgb_is_taken_as_it_is() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert np.allclose(one_color(encode(red, icc_profile=swapped_profile("xRGB"))), (0, 0, 255), atol=2)
    assert one_color(encode(red, icc_profile=swapped_profile("sRGB"))) == (255, 0, 0)
