"""`simpletuner monitor` in a real browser, while a tiny run trains: the curve and the images appear by themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpletuner.commands.monitor import make_server
from tests.runs import cli

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (scripts/install_system_packages.sh)"),
]


@pytest.fixture
def page() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    with playwright.sync_playwright() as driver:
        # Without a sandbox: tests run as root in containers, and the page is our own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 1000})
        opened.set_default_timeout(300_000)
        opened.faults = []
        opened.on("pageerror", lambda error: opened.faults.append(str(error)))
        opened.on("console", lambda line: opened.faults.append(line.text) if line.type == "error" else None)
        yield opened
        browser.close()


def test_the_curve_and_the_images_appear_while_a_run_trains(page: Any, tmp_path: Path) -> None:
    server = make_server(None, "127.0.0.1", 0, "t0ken", lambda line: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    webhook = json.dumps({"webhook_type": "raw", "callback_url": url, "auth_token": "t0ken"})
    options = {
        **{"tracker_run_name": "stars <b>", "output_dir": "output", "cache_dir": "cache", "webhook_config": webhook},
        **{"max_train_steps": 4, "train_batch_size": 2, "eval_steps_interval": 2, "num_eval_images": 2},
        **{"validation_step_interval": 2, "validation_num_inference_steps": 8, "report_to": "none"},
        **{"validation_resolution": "64x64", "vae_cache_ondemand": True},
        **{"validation_preview": True, "validation_preview_steps": 2},
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    page.goto(f"{url}?token=t0ken")
    assert page.url == url, "the token does not stay in the address"
    assert page.locator("#welcome").is_visible()

    trained = subprocess.Popen(cli("train", "example=omnigen-tiny", *arguments), cwd=tmp_path)
    page.wait_for_selector("#loss[aria-label*=points]:not([aria-label*='no points'])")
    page.wait_for_selector("#gallery img")
    page.wait_for_selector("#state[data-state=completed]")
    assert trained.wait(300) == 0

    assert page.locator("#run").text_content() == "stars <b>", "what a run says is text, never HTML"
    assert page.locator("#step").text_content() == "4"
    assert "4 points" in page.locator("#loss").get_attribute("aria-label")
    captions = page.locator("#gallery .row").first.locator("figcaption span:first-child").all_text_contents()
    assert captions == ["base model", "step 2", "step 4"]
    require_loaded_images(page, 64)
    points = points_of(page)
    assert points["training loss, smoothed"] + points["distance from the base model"] == 4
    assert points["eval loss"] == 3, "at steps 0, 2 and 4"
    assert page.locator("#log li").count() > 3

    page.locator("#gallery .row").first.locator("img").last.click()
    assert page.locator("#viewer-strip img").count() == 4, "how it was generated: 2/8, 4/8, 6/8, 8/8"
    page.keyboard.press("ArrowLeft")
    assert "step 2" in page.locator("#viewer-title").text_content()
    page.keyboard.press("Escape")

    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out on a phone"

    page.reload()
    page.wait_for_selector("#gallery img >> nth=2")
    assert "4 points" in page.locator("#loss").get_attribute("aria-label"), "a page opened later sees everything"
    assert page.faults == []
    server.is_over.set()
    server.shutdown()
    server.server_close()


def require_loaded_images(page: Any, width: int) -> None:
    """Wait until every image of the gallery is there.

    Asked from here again and again: a condition that the page itself repeats is a text that it evaluates, which its
    Content-Security-Policy forbids.
    """
    for _ in range(600):
        widths = page.evaluate("[...document.querySelectorAll('#gallery img')].map((each) => each.naturalWidth)")
        if set(widths) == {width}:
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"the images have widths of {widths}, not {width}")


def points_of(page: Any) -> Counter[str]:
    """How many points each curve of the chart has; their titles are `training loss, smoothed at 2: 0.5`."""
    page.wait_for_selector("#loss svg circle.dot >> nth=2")
    titles = page.locator("#loss svg circle title").all_text_contents()
    return Counter(title.rpartition(" at ")[0] for title in titles)
