"""Mutated files through everything that reads files of a user or a stranger, by seed and number.

    python -m tests.fuzz --count 10000                       what `.ci/run` does, as one process
    python -m tests.fuzz --count 1000000 --state fuzz.json   goes on where it was stopped
    python -m tests.fuzz --only images/1234                  one case again

A case may be taken or refused with an error for the user; anything else (another exception, a crash, a hang, a file
that changed) ends the run with the name of the case.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from tests.fuzz_seeds import caption_seeds, image_seeds, json_seeds, table_seeds
from tests.unit.data.images import tree_digest, write_image

SEED = 14
CASE_SECONDS = 60.0  # a hundred times what the slowest takes, for machines with other work
IMAGES_PER_FOLDER = 50
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
WORDS = [
    *(b"\0", b"\n", b"\r", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud83d", b"NaN", b"null", b"true"),
    *(b"-1", b"1e999", b"../../", b"/etc/passwd", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[31m", b"\xe2\x80\xa8"),
]


class Failed(Exception):
    """A case that did neither what it should nor what it may."""


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few changes of bits, bytes, numbers and pieces; sometimes only the beginning."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 5, 8, 20))):
        place = rng.randrange(len(changed) + 1) if rng.random() < 0.6 else rng.randrange(min(len(changed), 64) + 1)
        kind = rng.randrange(8)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(changed):
            changed[place] = rng.randrange(256)
        elif kind == 2:
            number = struct.pack(rng.choice("<>") + rng.choice("HIQ"), rng.choice(INTERESTING) & 0xFFFF)
            changed[place : place + len(number)] = number
        elif kind == 3:
            number = struct.pack(rng.choice("<>") + "I", rng.choice(INTERESTING))
            changed[place : place + 4] = number
        elif kind == 4:
            changed[place:place] = rng.choice(WORDS)
        elif kind == 5:
            del changed[place : place + rng.choice((1, 2, 4, 16, 200))]
        elif kind == 6:
            start = rng.randrange(len(changed) + 1)
            changed[place:place] = changed[start : start + rng.choice((1, 8, 64))]
        elif rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def rng_of(kind: str, number: int) -> random.Random:
    return random.Random(f"{SEED}/{kind}/{number}")


# ---- what reads them: each takes a folder and some numbers ---------------------------------------------------------


def images(folder: Path, numbers: range) -> None:
    """Images and caption files of one folder: scanned, then read as training does."""
    import os

    from simpletuner.data.backends.local import LocalBackend
    from simpletuner.data.buckets import BucketRules, plan_crop
    from simpletuner.data.captions import CaptionRules, captions_of
    from simpletuner.data.index import Index
    from simpletuner.data.transforms import load_image, to_pixels

    seeds, captions = image_seeds(), caption_seeds()
    for number in numbers:
        rng = rng_of("images", number)
        suffix, data = rng.choice(seeds)
        (folder / f"{number}{suffix}").write_bytes(mutate(data, rng))
        (folder / f"{number}.txt").write_bytes(mutate(rng.choice(captions), rng))
    backend = LocalBackend(folder)
    index = Index(folder.parent / "index.sqlite", backend)
    catalog = index.scan()
    rules = BucketRules(64, "pixel", crop=True, alignment=8)
    texts = index.texts(catalog.texts.tolist())
    for row, text in zip(index.images(catalog.ids.tolist()), texts, strict=True):
        image = load_image(backend.read(os.fsencode(row.path)))
        assert image.mode == "RGB"
        if image.width * image.height < 4_000_000:
            to_pixels(image, plan_crop(row.height, row.width, rules, 0))
        for strategy in ("textfile", "filename"):
            for caption in captions_of(row.path, text, CaptionRules(strategy)):
                caption.encode("utf-8")  # what every tokenizer does
                assert "\0" not in caption
                assert "\n" not in caption
    index.close()


def tables(folder: Path, numbers: range) -> None:
    """Tables: as captions beside images, as lists of images, as images themselves."""
    from simpletuner.data.backends.csv_table import CsvBackend
    from simpletuner.data.backends.parquet import ParquetBackend, ParquetTable
    from simpletuner.data.caption_table import CaptionTable
    from simpletuner.data.index import Index
    from simpletuner.errors import SimpleTunerError

    write_image(folder / "a.png", 16, 16)
    for number in numbers:
        rng = rng_of("tables", number)
        suffix, data = rng.choice(table_seeds())
        path = folder / f"{number}{suffix}"
        path.write_bytes(mutate(data, rng))
        kept = folder.parent / "kept"
        with case("tables", number), contextlib.suppress(SimpleTunerError):
            for caption in CaptionTable(path, kept, "file_name", None, "t").take(["a.png", "b"]):
                (caption or "").encode("utf-8")
        with case("tables", number), contextlib.suppress(SimpleTunerError):
            if suffix == ".parquet":
                table = ParquetTable({"t": path}, "image", None, "t", "t")
                index = Index(kept / f"{number}.sqlite", ParquetBackend(table, "t"))
            else:
                index = Index(kept / f"{number}.sqlite", CsvBackend(path, folder, "file_name", "text", "t"))
            index.scan()
            index.close()
        shutil.rmtree(kept, ignore_errors=True)


def jsons(folder: Path, numbers: range) -> None:
    """JSON files of a run and of a model."""
    from simpletuner.config.loading import load_run
    from simpletuner.errors import SimpleTunerError
    from simpletuner.families.registry import get_spec
    from simpletuner.models.components import ModelSource, load_component
    from simpletuner.models.text_encoders import _load_tokenizer
    from tests.runs import write_run

    model = model_folder(folder)
    write_run(folder / "run", model, user_prompt_library="library.json", max_train_steps=1)
    spec = get_spec("sdxl")
    parts = {part.name: part for part in spec.components}
    sound = json_seeds(folder / "run", model)
    source = ModelSource(str(model))
    for number in numbers:
        rng = rng_of("jsons", number)
        name = rng.choice(sorted(sound))
        path, before = folder / name, sound[name]
        path.write_bytes(mutate(before, rng))
        with case("jsons", number), contextlib.suppress(SimpleTunerError), quiet():
            if name.startswith("run/"):
                load_run((), {}, folder / "run")
            elif "tokenizer" in name:
                _load_tokenizer(source, parts["tokenizer"])
            else:
                load_part(model, parts[Path(name).parent.name], load_component)
        path.write_bytes(before)


def headers(folder: Path, numbers: range) -> None:
    """Headers of safetensors files: of a model, of an adapter, of one file that is a whole model."""
    from simpletuner.adapters.reading import read_adapter_file
    from simpletuner.errors import SimpleTunerError
    from simpletuner.families.registry import get_spec
    from simpletuner.models.components import load_component
    from simpletuner.models.single_file import names_in_file

    model = model_folder(folder)
    parts = {part.name: part for part in get_spec("sdxl").components}
    files = ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    sound = {name: (model / name).read_bytes() for name in files}
    for number in numbers:
        rng = rng_of("headers", number)
        name = rng.choice(files)
        data = sound[name]
        (length,) = struct.unpack("<Q", data[:8])
        header = mutate(data[8 : 8 + length], rng)
        length = len(header) if rng.random() < 0.8 else rng.choice([*INTERESTING, 2**63, 2**64 - 1, length])
        path = model / name
        path.write_bytes(struct.pack("<Q", length) + header + data[8 + struct.unpack("<Q", data[:8])[0] :])
        for read in (
            lambda path=path: read_adapter_file(path),
            lambda path=path: names_in_file(str(path)),
            lambda name=name: load_part(model, parts[name.partition("/")[0]], load_component),
        ):
            with case("headers", number), contextlib.suppress(SimpleTunerError), quiet():
                read()
        path.write_bytes(data)


KINDS: dict[str, Callable[[Path, range], None]] = {
    "images": images,
    "tables": tables,
    "jsons": jsons,
    "headers": headers,
}
# Of 100 cases.
SHARES = {"images": 40, "tables": 25, "jsons": 20, "headers": 15}


def model_folder(folder: Path) -> Path:
    from tests.tiny_sdxl import tiny_sdxl_folder

    path = folder / "model"
    return path if path.exists() else tiny_sdxl_folder(path)


def load_part(model: Path, component: object, load: Callable) -> None:
    import torch

    from simpletuner.models.components import ModelSource

    load(ModelSource(str(model)), component, torch.float32)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries tell what they think of a file; nobody wants to read it ten thousand times."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def case(kind: str, number: int) -> Iterator[None]:
    """Whatever is no error for the user, named by its case; ended where it does not end by itself.

    An error for the user passes through.
    """
    from simpletuner.errors import SimpleTunerError

    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        yield
    except (SimpleTunerError, Failed, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Failed(f"{kind}/{number}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"not done after {CASE_SECONDS:g} s")


def run_part(kind: str, numbers: range) -> None:
    """Some cases of a kind in a folder of their own; what they are made of may not change.

    Raises:
        Failed: with the case, or the range where one folder holds many.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place) / "user"
        folder.mkdir()
        if kind != "images":
            KINDS[kind](folder, numbers)
            return
        # Written first, then only looked at: the scan of a whole folder is one case.
        with case(kind, numbers.start):
            images(folder, numbers)
        before = tree_digest(folder)
        with case(kind, numbers.start):
            images_again(folder)
        if tree_digest(folder) != before:
            raise Failed(f"{kind}/{numbers.start}: a file of the user was changed")


def images_again(folder: Path) -> None:
    from simpletuner.data.backends.local import LocalBackend
    from simpletuner.data.index import Index

    index = Index(folder.parent / "again.sqlite", LocalBackend(folder))
    index.scan()
    index.close()


def run(count: int, state: Path | None, report: Callable[[str], None]) -> None:
    """Cases of all kinds until `count` are done, going on from `state`."""
    done = json.loads(state.read_text()) if state and state.exists() else dict.fromkeys(KINDS, 0)
    signal.signal(signal.SIGALRM, _too_slow)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    for kind, share in SHARES.items():
        total = count * share // 100
        while done[kind] < total:
            numbers = range(done[kind], min(done[kind] + IMAGES_PER_FOLDER, total))
            faulthandler.dump_traceback_later(5 * CASE_SECONDS, exit=True)
            report(f"{kind}/{numbers.start}")
            run_part(kind, numbers)
            faulthandler.cancel_dump_traceback_later()
            done[kind] = numbers.stop
            if state:
                state.write_text(json.dumps(done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--state", type=Path, help="file that says how far it has come")
    parser.add_argument("--only", help="one case: KIND/NUMBER")
    options = parser.parse_args()
    sys.stderr.flush()
    last = [""]

    def report(place: str) -> None:
        last[0] = place

    try:
        if options.only:
            kind, _, number = options.only.partition("/")
            signal.signal(signal.SIGALRM, _too_slow)
            run_part(kind, range(int(number), int(number) + 1))
        else:
            run(options.count, options.state, report)
    except Failed as error:
        print(f"{error} (in {last[0] or options.only})")
        raise SystemExit(1) from error
    from simpletuner.training.memory import peak_bytes

    print(f"{options.count} cases, {peak_bytes() >> 20} MiB at most")


if __name__ == "__main__":
    main()
