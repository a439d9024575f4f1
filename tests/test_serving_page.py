"""The page in a real browser, with real pictures; and that axe finds nothing wrong with it.

Needs `pip install -e '.[dev]'` and a Chromium (Debian: `apt-get install chromium`); skipped where either is missing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glmimg.serving.settings import ServerSettings

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine: apt-get install chromium", allow_module_level=True)

WAIT = 120_000  # milliseconds
# The driver does not see forms with files: the page notes the names of their fields.
FORMS = """() => {
    window.forms = [];
    const send = window.fetch;
    window.fetch = (path, how) => {
        if (how?.body instanceof FormData) forms.push([...how.body.keys()]);
        return send(path, how);
    };
}"""


@pytest.fixture(scope="module")
def url(
    tiny_checkpoint: Path, serve: Any, tmp_path_factory: pytest.TempPathFactory, write_adapter: Any
) -> Iterator[str]:
    adapters = tmp_path_factory.mktemp("adapters")
    write_adapter(adapters / "ink", tiny_checkpoint, 1)
    server = serve(
        ServerSettings(
            model=str(tiny_checkpoint), model_name="tiny", backend="cpu", dtype="fp32", adapters=str(adapters)
        )
    )
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

    page.evaluate(FORMS)
    with page.expect_request("**/v1/images/edits"):  # what it was made after goes along
        page.click("#other-seed")
    assert {"tokens", "image[]"} <= set(page.evaluate("forms[0]"))
    assert done(page).startswith("Done")

    page.reload()
    page.wait_for_function("document.querySelectorAll('#history img').length === 7")
    page.locator("#history button").last.click()
    page.wait_for_function("document.getElementById('status').textContent.startsWith('Seed')")
    assert shown(page) == first


def test_examples_adapters_files_and_the_copied_call(page: Any, tmp_path: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    theme = page.get_attribute("html", "data-theme")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") != theme
    page.locator("#examples button").nth(1).click()
    assert page.input_value("#prompt") == "a strawberry on a white background"
    page.select_option("#adapter", "ink")
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => seen.push(document.getElementById("status").textContent))
                .observe(document.getElementById("status"), { childList: true });
        }"""
    )
    with page.expect_request("**/v1/images/generations") as sent:
        page.click("#make")
    assert sent.value.post_data_json["adapters"] == [{"name": "ink"}]
    assert done(page).startswith("Done")
    seen = page.evaluate("seen")
    assert any(text.startswith("Layout: token") for text in seen), seen
    assert any(text.startswith("Picture: step") for text in seen), seen
    page.click("#copy")
    page.wait_for_function("document.getElementById('status').textContent === 'Copied.'")
    copied = page.evaluate("navigator.clipboard.readText()")
    (body,) = re.findall(r"-d '(.*)'", copied.replace("\\\n", ""))
    assert copied.startswith("curl http://127.0.0.1:") and json.loads(body)["adapters"] == [{"name": "ink"}]

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    page.set_input_files("#files", tmp_path / "red.png")
    dropped = """() => {
        const data = new DataTransfer();
        data.items.add(new File([new Blob(["x"])], "blue.png", { type: "image/png" }));
        data.items.add(new File(["x"], "notes.txt", { type: "text/plain" }));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data }));
    }"""
    page.evaluate(dropped)
    names = page.eval_on_selector_all("#references img", "images => images.map((image) => image.alt)")
    assert names == ["red.png", "blue.png"]
    page.get_by_role("button", name="Remove blue.png").click()
    page.evaluate(FORMS)
    with page.expect_request("**/v1/images/edits"):
        page.press("#prompt", "Control+Enter")
    assert "image[]" in page.evaluate("forms[0]")
    assert done(page).startswith("Done")


def test_a_finger_selects_sideways_and_scrolls_the_page(url: str) -> None:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(bypass_csp=True, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
        page.set_default_timeout(WAIT)
        page.goto(url)
        page.wait_for_function("document.getElementById('sampler').options.length > 0")
        make(page)
        page.locator("#picture").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('picture').scrollIntoView({ block: 'center' })")
        touch = page.context.new_cdp_session(page)

        def drag(x: float, y: float) -> None:
            box = page.locator("#picture").bounding_box()
            at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
            touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [at]})
            for k in range(1, 9):
                moved = {"x": at["x"] + x * k / 8, "y": at["y"] + y * k / 8}
                touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [moved]})
            touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

        before = page.evaluate("scrollY")
        drag(0, -120)
        page.wait_for_function(f"scrollY !== {before}")
        assert page.input_value("#right") == ""
        drag(60, 30)
        page.wait_for_function("document.getElementById('right').value !== ''")
        browser.close()


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
