"""A canary in each place where a secret can stand, and a run that uses all of them: nothing that is made holds one."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from simpletuner.cli import program
from tests.hub_uploads import TOKEN as HUB_TOKEN
from tests.hub_uploads import upload_hub
from tests.receiver import Receiver, receiver
from tests.runs import dataset, write_images, write_run
from tests.s3 import s3_server

# The words of each place differ, so that a leak says where it came from.
CANARIES = {
    place: f"canary-{place}-5d1f93"
    for place in (
        *("url-path", "url-query", "auth-token", "token-file", "discord-url", "wandb", "s3-key", "s3-id", "aws"),
        *("argument", "proxy"),
    )
} | {"hf": HUB_TOKEN}
# Everything that libraries say, but for those that tell their own requests in full when they are debugged.
LOUD = """
import logging, runpy, sys
logging.basicConfig(level=logging.INFO)
for name in ("simpletuner", "httpx", "httpcore", "asyncio", "urllib3"):
    logging.getLogger(name).setLevel(logging.DEBUG)
sys.argv = ["simpletuner", *sys.argv[1:]]
runpy.run_module("simpletuner", run_name="__main__")
"""


def run_loudly(folder: Path, environment: Mapping[str, str], *arguments: str) -> str:
    """What `simpletuner ARGUMENTS` prints, with the logs of the libraries that it uses."""
    command = [sys.executable, "-c", LOUD, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def leaks(folder: Path, texts: Mapping[str, str | bytes], given: set[Path]) -> list[str]:
    """Where a canary is found, as it is or in base64: in texts, and in files that were not given to the run."""
    contents: dict[str, bytes] = {name: t if isinstance(t, bytes) else t.encode() for name, t in texts.items()}
    contents |= {
        str(path.relative_to(folder)): path.read_bytes() + str(path).encode()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in given
    }
    return [
        f"{place} in {name}"
        for name, content in contents.items()
        for place, canary in CANARIES.items()
        if any(form in content for form in forms(canary.encode()))
    ]


def forms(secret: bytes) -> list[bytes]:
    """A text as it is, and as base64 of something that holds it, wherever in it."""
    encoded = [base64.b64encode(b"x" * shift + secret)[4:-4] for shift in range(3)]
    return [secret, *encoded]


def raw(server: Receiver, **keys: str) -> dict[str, str]:
    url = f"{server.url}/{CANARIES['url-path']}?token={CANARIES['url-query']}"
    return {"webhook_type": "raw", "callback_url": url, **keys}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {
        **{
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": CANARIES["hf"],
            "WANDB_API_KEY": CANARIES["wandb"],
            "WANDB_MODE": "offline",
        },
        **{"AWS_SECRET_ACCESS_KEY": CANARIES["aws"], "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "tmp")},
        **{"HTTPS_PROXY": f"http://somebody:{CANARIES['proxy']}@127.0.0.1:9", "NO_PROXY": "127.0.0.1"},
    }


@pytest.mark.slow
def test_no_secret_of_a_run_is_in_what_it_makes(
    tmp_path: Path, omnigen_folder: Path, environment: dict[str, str]
) -> None:
    write_images(tmp_path / "bucket", 4, seed=1)
    write_images(tmp_path / "run" / "held_out", 2, seed=2)
    (tmp_path / "run" / "token").write_text(CANARIES["token-file"])
    with receiver() as server, receiver() as other, s3_server("photos") as store, upload_hub() as hub:
        store.upload(tmp_path / "bucket", "photos")
        keys = {"aws_access_key_id": CANARIES["s3-id"], "aws_secret_access_key": CANARIES["s3-key"]}
        place = {
            "type": "aws",
            "aws_bucket_name": "photos",
            "aws_endpoint_url": store.url,
            "aws_region_name": "us-east-1",
        }
        bucket = {"id": "photos", "caption_strategy": "textfile", "resolution": 64, **place, **keys}
        folder = write_run(
            tmp_path / "run",
            omnigen_folder,
            [bucket, dataset("held_out", dataset_type="eval")],
            max_train_steps=4,
            eval_steps_interval=2,
            report_to="tensorboard,wandb",
            tracker_project_name="canaries",
            push_to_hub=True,
            push_checkpoints_to_hub=True,
            hub_model_id="house/canaries",
            validation_disable=False,
            validation_prompt="a red square",
            validation_resolution="64",
            validation_num_inference_steps=2,
            validation_step_interval=4,
            webhook_config=[
                raw(server, auth_token=CANARIES["auth-token"]),
                raw(server, auth_token_file="token"),
                {"webhook_type": "discord", "webhook_url": "${DISCORD}"},
                {"webhook_type": "raw", "callback_url": f"http://127.0.0.1:9/{CANARIES['url-path']}"},
            ],
        )
        environment["HF_ENDPOINT"] = hub.url
        environment["DISCORD"] = f"{other.url}/{CANARIES['discord-url']}"
        said = run_loudly(folder, environment, "train")
        resolved = run_loudly(folder, environment, "options", "--resolved")
        received = server.accepted_bodies + other.accepted_bodies
        tokens = {headers.get("X-API-Key") for headers, _ in server.requests}
    assert tokens == {CANARIES["auth-token"], CANARIES["token-file"]}, "the secrets were used"
    assert any(b"payload_json" in body for body in received)
    made = {path.name for path in folder.rglob("*")}
    assert {"metrics.jsonl", "run.lock.json", "checkpoint-4", "webhooks", "report.html"} <= made
    assert any(name.endswith(".wandb") for name in made)
    given = {folder / name for name in ("config.json", "multidatabackend.json", "token")}
    published = hub.repos["house/canaries"].files
    assert "README.md" in published
    texts = {"what it printed": said, "options --resolved": resolved, "what was sent": b"".join(received)}
    texts |= {f"{name} on the hub": content for name, content in published.items()}
    assert leaks(tmp_path, texts, given) == []


@pytest.mark.slow
def test_no_secret_of_a_command_line_is_in_what_a_run_makes(
    tmp_path: Path, omnigen_folder: Path, environment: dict[str, str]
) -> None:
    with receiver() as server:
        folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=2, report_to="wandb")
        webhook = json.dumps(raw(server, auth_token=CANARIES["argument"]))
        said = run_loudly(folder, environment, "train", f"--webhook_config={webhook}")
        assert server.accepted
    assert leaks(tmp_path, {"what it printed": said}, set()) == []


def test_a_fault_of_the_program_is_kept_without_the_values_of_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = CANARIES["argument"]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    arguments = ["train", "example=omnigen-tiny", f"--webhook_config={canary}", "--auth", canary, "--flag", "--seed=3"]
    monkeypatch.setattr(sys, "argv", ["simpletuner", *arguments])
    said = program._report_unexpected(ValueError("something"))
    (log,) = tmp_path.glob("simpletuner-error-*.log")
    assert canary not in said + log.read_text()
    assert "train example=omnigen-tiny --webhook_config=... --auth ... --flag --seed=..." in log.read_text()


def test_the_search_finds_a_leak(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(CANARIES["hf"])
    (tmp_path / "given").write_text(CANARIES["hf"])
    hidden = base64.b64encode(b"wxyz" + CANARIES["wandb"].encode()).decode()
    found = leaks(tmp_path, {"log": hidden}, {tmp_path / "given"})
    assert found == ["wandb in log", "hf in a.json"]
