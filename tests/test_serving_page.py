"""The page in a real browser, with real pictures; and that axe finds nothing wrong with it.

Needs `pip install playwright axe-playwright-python` and a Chromium on the machine; skipped where either is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmimg.serving.settings import ServerSettings

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

WAIT = 120_000  # milliseconds


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path, serve: Any) -> Iterator[str]:
    server = serve(ServerSettings(model=str(tiny_checkpoint), model_name="tiny", backend="cpu", dtype="fp32"))
    yield server.url
    server.stop()


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        # The page forbids eval, by which the driver waits for conditions; a test of the headers pins that policy.
        page = browser.new_page(bypass_csp=True, viewport={"width": 1100, "height": 900})
        page.set_default_timeout(WAIT)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if _is_ours(message) else None)
        page.on("request", lambda request: wrong.append(request.url) if not _own(request.url, url) else None)
        page.goto(url)
        page.wait_for_function("document.getElementById('sampler').options.length > 0")
        yield page
        browser.close()
        assert wrong == []


def _own(address: str, url: str) -> bool:
    return address.startswith((url, "data:", "blob:"))


def _is_ours(message: Any) -> bool:
    return message.type == "error" and not message.text.startswith("Failed to load resource")  # a refusal, told as such


def done(page: Any) -> str:
    page.wait_for_function("/^(Done|Stopped)/.test(document.getElementById('status').textContent)")
    return str(page.text_content("#status"))


def make(page: Any, **fields: str) -> None:
    page.fill("#prompt", "a cat")
    page.click("summary")
    for name, value in {"seed": "5", "steps": "4", **fields}.items():
        page.fill(f"#{name}", value)
    page.press("#prompt", "Control+Enter")
    assert done(page).startswith("Done")


def shown(page: Any) -> str:
    return str(page.evaluate("document.getElementById('picture').toDataURL()"))


def test_a_visit(page: Any, tmp_path: Path) -> None:
    """Makes pictures, looks at the layout, keeps it with another seed, draws a region anew, edits, comes back."""
    make(page, n="2")
    assert page.locator("#variants img").count() == 2 and page.locator("#history img").count() == 2
    page.locator("#variants button").first.click()
    page.wait_for_function("document.getElementById('status').textContent === 'Seed 5.'")
    first = shown(page)

    page.click("#show-layout")
    page.wait_for_function("getComputedStyle(document.getElementById('layout')).opacity > 0")
    page.click("#show-layout")

    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "kept.png")
    from glmimg.pipelines.result import metadata_tokens, read_settings

    assert read_settings(tmp_path / "kept.png")["config"]["seed"] == 5

    with page.expect_request("**/v1/images/decode") as sent:
        page.click("#other-seed")
    assert sent.value.post_data_json["tokens"] == metadata_tokens(tmp_path / "kept.png").to_dict()
    assert done(page).startswith("Done") and shown(page) != first

    page.evaluate("scrollTo(0, 0)")
    box = page.locator("#picture").bounding_box()
    page.mouse.move(box["x"] + 4, box["y"] + 4)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 8, box["y"] + box["height"] / 8, steps=4)
    page.mouse.up()
    assert page.input_value("#left") == "0" and page.input_value("#right") != ""
    with page.expect_request("**/v1/images/regions") as sent:
        page.click("#resample")
    assert sent.value.post_data_json["region"][:2] == [0, 0]
    assert done(page).startswith("Done")

    page.click("#reuse")
    assert page.locator("#references img").count() == 1
    with page.expect_request("**/v1/images/edits"):
        page.press("#prompt", "Control+Enter")
    assert done(page).startswith("Done")

    page.reload()
    page.wait_for_function("document.querySelectorAll('#history img').length === 6")
    page.locator("#history button").last.click()
    page.wait_for_function("document.getElementById('status').textContent.startsWith('Seed')")
    assert shown(page) == first


def test_stopping_errors_and_phones(page: Any) -> None:
    page.fill("#prompt", "a cat")
    page.click("summary")
    page.fill("#steps", "1000")
    page.press("#prompt", "Control+Enter")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('Picture: step')")
    page.keyboard.press("Escape")
    assert done(page) == "Stopped."
    page.fill("#prompt", "a <sop> cat")
    with page.expect_response("**/v1/images/generations") as answer:
        page.press("#prompt", "Control+Enter")
    assert answer.value.status == 400
    page.wait_for_selector("#status.error")
    assert "control token" in page.text_content("#status")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a phone"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, url: str, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.evaluate(f"localStorage.setItem('theme', '{theme}')")
    page.reload()
    make(page, seed="6", steps="1")
    for address in (None, f"{url}/docs"):
        if address:
            page.goto(address)
            page.wait_for_selector("article table")
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()
