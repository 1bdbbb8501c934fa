"""Images that are not in a folder train like those that are: buckets, Parquet files, tables of paths."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simpletuner.data.backends.csv_table import CsvBackend
from simpletuner.data.backends.parquet import ParquetBackend
from simpletuner.errors import DataError
from tests.hub import fake_hub
from tests.runs import dataset, load_here, metrics, run_cli, train_here, write_images, write_run
from tests.s3 import LOGIN, S3, s3_server

STEPS = 4


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server("images") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "drawn", 5, seed=1)


def run(tmp_path: Path, model: Path, name: str, **keys: Any) -> Path:
    entry = {"id": "things", "resolution": 64, "cache_dir_vae": f"latents-{name}"} | keys
    return write_run(tmp_path / name, model, [entry], max_train_steps=STEPS, checkpoint_step_interval=STEPS)


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in metrics(output, "step_done")]


def filter_report(output: Path) -> dict[str, Any]:
    (entry,) = json.loads((output / "dataset_report.json").read_text())
    return entry


def again(folder: Path) -> Path:
    """Start the run once more for further steps; the datasets are looked at again."""
    return train_here(folder, f"--max_train_steps={2 * STEPS}")


def bucket(server: S3, prefix: str) -> dict[str, Any]:
    place = {"aws_bucket_name": "images", "aws_data_prefix": prefix, "aws_endpoint_url": server.url}
    return {"type": "aws", "caption_strategy": "textfile", "aws_region_name": "us-east-1", **place, **LOGIN}


def write_parquet(path: Path, folder: Path) -> Path:
    """The images of `folder` as the hub lays a dataset out: two shards of the split, and another split."""
    images = sorted(folder.glob("*.png"))
    rows = [({"bytes": p.read_bytes(), "path": p.name}, p.with_suffix(".txt").read_text().strip()) for p in images]
    parts = {"train-00000-of-00002": rows[:3], "train-00001-of-00002": rows[3:], "test-00000-of-00001": rows[:1]}
    (path / "data").mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        table = pa.table({"image": [image for image, _ in part], "text": [text for _, text in part]})
        pq.write_table(table, path / "data" / f"{name}.parquet", row_group_size=2)
    return path


def write_table(path: Path, folder: Path) -> Path:
    lines = [f'{p.name},"{p.with_suffix(".txt").read_text().strip()}"' for p in sorted(folder.glob("*.png"))]
    path.write_text("\n".join(["file_name,caption", *lines]) + "\n")
    return path


@pytest.mark.slow
def test_a_bucket_trains_with_the_losses_of_the_folder_that_was_put_there(
    tmp_path: Path, omnigen_folder: Path, server: S3, folder: Path
) -> None:
    server.upload(folder, "images", "same/")
    keys = {"type": "local", "instance_data_dir": str(folder), "caption_strategy": "textfile"}
    expected = losses(train_here(run(tmp_path, omnigen_folder, "folder", **keys)))
    output = train_here(run(tmp_path, omnigen_folder, "bucket", **bucket(server, "same")))
    assert losses(output) == expected
    assert len(expected) == STEPS


@pytest.mark.slow
def test_a_second_start_reads_no_object_of_a_bucket_and_a_changed_one_is_noticed(
    tmp_path: Path, omnigen_folder: Path, server: S3, folder: Path
) -> None:
    server.upload(folder, "images", "seen/")
    place = run(tmp_path, omnigen_folder, "bucket", **bucket(server, "seen"))
    server.requests.clear()
    output = train_here(place)
    # Once for the scan, and each image once more for the VAE, and once for the report.
    assert Counter(server.fetched()) == {
        f"/images/seen/{path.name}": 3 if path.suffix == ".png" else 1 for path in folder.iterdir()
    }
    again(place)
    assert server.fetched() == []
    other = write_images(tmp_path / "other", 1, seed=9)
    server.client.put_object(Bucket="images", Key="seen/001.png", Body=(other / "000.png").read_bytes())
    server.requests.clear()
    train_here(place, f"--max_train_steps={3 * STEPS}")
    images = [f"/images/seen/{path.name}" for path in folder.glob("*.png")]
    assert Counter(server.fetched()) == {**dict.fromkeys(images, 1), "/images/seen/001.png": 3}
    assert len(losses(output)) == 3 * STEPS


@pytest.mark.slow
def test_no_file_of_a_run_holds_the_login(
    tmp_path: Path, omnigen_folder: Path, server: S3, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.upload(folder, "images", "login/")
    place = run(tmp_path, omnigen_folder, "bucket", **bucket(server, "login"))
    train_here(place)
    shown = capsys.readouterr()
    secret = LOGIN["aws_secret_access_key"]
    assert secret not in shown.out + shown.err
    written = [path for path in place.rglob("*") if path.is_file() and path.name != "multidatabackend.json"]
    assert len(written) > 10
    assert not [path for path in written if secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_an_object_that_goes_away_while_training_is_named(
    tmp_path: Path, omnigen_folder: Path, server: S3, folder: Path
) -> None:
    server.upload(folder, "images", "gone/")
    place = run(tmp_path, omnigen_folder, "bucket", **bucket(server, "gone"))
    train_here(place)
    from simpletuner.data.datasets import build_datasets
    from simpletuner.families.registry import get_spec

    loaded = load_here(place)
    (things,) = build_datasets(loaded.datasets, loaded.config, get_spec("omnigen"), Path(loaded.config.data.cache_dir))
    server.client.delete_object(Bucket="images", Key="gone/002.png")
    with pytest.raises(DataError, match=r"s3://images/gone/002\.png") as caught:
        things.read_pixels(things.samples[2])
    assert "things.aws_bucket_name" in str(caught.value)


@pytest.mark.slow
def test_parquet_files_train_with_the_same_images_and_captions(
    tmp_path: Path, omnigen_folder: Path, folder: Path
) -> None:
    tables = write_parquet(tmp_path / "tables", folder)
    place = run(tmp_path, omnigen_folder, "rows", type="huggingface", dataset_name=str(tables))
    output = train_here(place)
    keys = {"type": "local", "instance_data_dir": str(folder), "caption_strategy": "textfile"}
    assert losses(output) == losses(train_here(run(tmp_path, omnigen_folder, "folder", **keys)))
    assert filter_report(output)["found"] == 5  # of the split; the other split has one of them too


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["huggingface", "csv"])
def test_a_second_start_reads_no_row_and_a_changed_one_is_noticed(
    tmp_path: Path, omnigen_folder: Path, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = write_parquet if kind == "huggingface" else write_table
    table = write(tmp_path / "table.csv", folder)
    keys = {"dataset_name": str(table)} if kind == "huggingface" else {"csv_file": str(table)}
    keys |= {} if kind == "huggingface" else {"instance_data_dir": str(folder)}
    place = run(tmp_path, omnigen_folder, kind, type=kind, **keys)
    opened: list[bytes] = []
    cls = ParquetBackend if kind == "huggingface" else CsvBackend
    read = cls.read
    monkeypatch.setattr(cls, "read", lambda self, path: (opened.append(path), read(self, path))[1])
    output = train_here(place)
    assert len(opened) == 20  # 5 images and captions in the scan, 5 images for the VAE, 5 for the report
    opened.clear()
    again(place)
    assert opened == []
    (folder / "001.txt").write_text("quite another caption\n")
    other = write_images(tmp_path / "other", 1, seed=9)
    (folder / "004.png").write_bytes((other / "000.png").read_bytes())
    write(tmp_path / "table.csv", folder)
    train_here(place, f"--max_train_steps={3 * STEPS}")
    images = [path for path in opened if not path.endswith(b".txt")]
    assert len(set(opened) - set(images)) == 1
    # The rows of changed shards are looked at again; only one is encoded again; the report shows all five.
    assert len(images) <= 6 + 1 + 5
    assert len(losses(output)) == 3 * STEPS


def test_a_table_trains_with_the_losses_of_its_folder(tmp_path: Path, omnigen_folder: Path, folder: Path) -> None:
    table = write_table(folder / "pictures.csv", folder)
    output = train_here(run(tmp_path, omnigen_folder, "table", type="csv", csv_file=str(table)))
    keys = {"type": "local", "instance_data_dir": str(folder), "caption_strategy": "textfile"}
    assert losses(output) == losses(train_here(run(tmp_path, omnigen_folder, "folder", **keys)))


@pytest.mark.slow
def test_a_dataset_on_the_hub_is_fetched_once_and_trains(tmp_path: Path, omnigen_folder: Path, folder: Path) -> None:
    tables = write_parquet(tmp_path / "tables", folder)
    place = run(tmp_path, omnigen_folder, "hub", type="huggingface", dataset_name="me/things")
    with fake_hub() as hub:
        files = [path for path in tables.rglob("*") if path.is_file()]
        hub.repos["me/things", "main"] = {str(path.relative_to(tables)): path.read_bytes() for path in files}
        result = run_cli(place, "train", environment=hub.environment(tmp_path / "home"))
        assert result.returncode == 0, result.stderr
        assert sorted(hub.fetched) == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
        hub.fetched.clear()
        again = run_cli(place, "train", "--max_train_steps=8", environment=hub.environment(tmp_path / "home"))
        assert again.returncode == 0, again.stderr
        assert hub.fetched == []
    assert len(losses(place / "output")) == 2 * STEPS


@pytest.mark.slow
def test_types_of_places_mix_in_one_run(tmp_path: Path, omnigen_folder: Path, server: S3, folder: Path) -> None:
    server.upload(folder, "images", "mix/")
    write_images(tmp_path / "mixed" / "images", 2, seed=3)
    tables = write_parquet(tmp_path / "tables", folder)
    data = [
        dataset("images"),
        {"id": "bucket", "resolution": 64, **bucket(server, "mix")},
        {"id": "rows", "type": "huggingface", "dataset_name": str(tables), "resolution": 64},
        {"id": "held", "type": "huggingface", "dataset_name": str(tables), "split": "test", "dataset_type": "eval"},
    ]
    data[3]["resolution"] = 64
    place = write_run(tmp_path / "mixed", omnigen_folder, data, max_train_steps=6, eval_steps_interval=3)
    output = train_here(place)
    report = json.loads((output / "dataset_report.json").read_text())
    assert [(entry["id"], entry["bucketed"]) for entry in report] == [
        ("images", 2),
        ("bucket", 5),
        ("rows", 5),
        ("held", 1),
    ]
    assert metrics(output, "eval_done")
