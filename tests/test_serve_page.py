"""The page in a real browser, over a gateway whose model turns colours around. Skipped where there is no Chromium."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from starlette.requests import Request
from test_serve_gateway import InvertingBackend

from insightedit.serve.feedback import Feedback, kept_feedback
from insightedit.serve.gateway import EDIT_PATH, build_app
from insightedit.serve.meters import Meters
from insightedit.serve.settings import FeedbackSettings, Limits
from insightedit.serve.state_store import SqliteStore

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLEET = {
    "versions": [{"version": "3", "aliases": ["champion"], "default": True, "state": "RUNNING"}],
    "deployments": [
        {"name": "Gateway", "version": None, "running": 1, "starting": 0, "ongoing": 1, "queued": 0},
        {"name": "Editor", "version": "3", "running": 2, "starting": 1, "ongoing": 4, "queued": 7},
    ],
}


class Server:
    """The gateway, with edits that stop halfway until they are let go, and the status of a fleet."""

    def __init__(self, folder: Path) -> None:
        store = SqliteStore(":memory:", 2**24)
        self.feedback = folder
        feedback = Feedback(FeedbackSettings(consent=True), store, folder)
        self.gateway = build_app(InvertingBackend(), Limits(), Meters(), feedback=feedback)
        self.staged = False
        """Whether edits are answered here instead of by the gateway."""
        self.key = ""
        self.release = threading.Event()
        self.forms: list[dict[str, Any]] = []
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer: Any = self.gateway
        if scope["type"] == "http":
            request = Request(scope, receive)
            if self.key and request.headers.get("authorization") != f"Bearer {self.key}" and "/v1/" in scope["path"]:
                answer = JSONResponse({"error": {"message": "A key is needed.", "param": None}}, 401)
            elif scope["path"] == "/v1/status":
                answer = JSONResponse(FLEET)
            elif scope["path"] == EDIT_PATH and self.staged:
                answer = await self.staged_answer(request)
        await answer(scope, receive, send)

    async def staged_answer(self, request: Request) -> StreamingResponse:
        form = await request.form()
        fields = {name: value if isinstance(value, str) else await value.read() for name, value in form.items()}
        self.forms.append(fields)
        return StreamingResponse(self.events(fields), media_type="text/event-stream")

    async def events(self, fields: dict[str, Any]) -> AsyncIterator[str]:
        pixels = np.asarray(Image.open(io.BytesIO(fields["image"])).convert("RGB"))
        said = {"output_format": "png", "size": f"{pixels.shape[1]}x{pixels.shape[0]}"}
        for index in range(2):
            half = {
                **said,
                "type": "image_edit.partial_image",
                "partial_image_index": index,
                "b64_json": b64(pixels // 2),
            }
            yield f"event: {half['type']}\ndata: {json.dumps(half)}\n\n"
        while not self.release.is_set():
            await asyncio.sleep(0.02)
        whole = {
            **said,
            "type": "image_edit.completed",
            "b64_json": b64(255 - pixels),
            "seed": 77,
            "model_version": "3",
        }
        yield f"event: {whole['type']}\ndata: {json.dumps({**whole, 'timing': {'total': 1.25}})}\n\n"


def b64(pixels: np.ndarray) -> str:
    return base64.b64encode(png(pixels)).decode()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(width: int = 300, height: int = 200) -> bytes:
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(60, 200, height))
    return png(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("feedback"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        running = uvicorn.Server(uvicorn.Config(server, log_level="error"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield server
        running.should_exit = True
        server.release.set()
        thread.join()


@pytest.fixture
def server(serving: Server) -> Server:
    serving.staged, serving.key, serving.forms = False, "", []
    serving.release.clear()
    return serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page, on which no script may fail and nothing may offend the content policy."""
    page = browser.new_page()
    page.set_default_timeout(30_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(server.url)
    yield page
    page.close()
    assert wrong == []


def choose(page: Page, data: bytes | None = None) -> None:
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": data or picture()})
    expect(page.locator("#frame")).to_be_visible()


def shown(page: Page) -> bytes:
    """The result's file, as it is downloaded."""
    with page.expect_download() as download:
        page.click("#download")
    return download.value.path().read_bytes()


PIXELS = """e => {
  const sheet = new OffscreenCanvas(e.naturalWidth, e.naturalHeight).getContext('2d');
  sheet.drawImage(e, 0, 0);
  return [e.naturalHeight, e.naturalWidth, ...sheet.getImageData(0, 0, e.naturalWidth, e.naturalHeight).data];
}"""


def painted(page: Page, element: str) -> np.ndarray:
    height, width, *values = page.eval_on_selector(element, PIXELS)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def edit(page: Page, server: Server, prompt: str) -> None:
    server.release.set()
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    expect(page.locator("#said")).to_have_text("The edit is done.")


def test_the_page_gives_the_bytes_of_a_plain_request(page: Page, server: Server) -> None:
    choose(page)
    page.click("summary")
    page.fill("[name=seed]", "11")
    edit(page, server, "turn it around")
    fields = {"prompt": "turn it around", "seed": "11"}
    plain = httpx.post(server.url + EDIT_PATH, data=fields, files={"image": ("a.png", picture())}).json()
    assert shown(page) == base64.b64decode(plain["data"][0]["b64_json"])
    expect(page.locator("#fact-seed")).to_have_text("11")
    expect(page.locator("#fact-version")).to_have_text("3")
    expect(page.locator("#fleet")).to_contain_text("Editor v32 (+1)47")


def test_a_verdict_is_asked_for_and_kept(page: Page, server: Server) -> None:
    choose(page)
    expect(page.locator("#verdict")).to_be_hidden()
    for prompt, button in (("turn it around", "#accept"), ("and back", "#reject")):
        edit(page, server, prompt)
        expect(page.locator("#verdict")).to_contain_text("Is this what you asked for?")
        page.click(button)
        expect(page.locator("#verdict")).to_contain_text("your answer is kept")
        expect(page.locator("#accept")).to_be_disabled()
    rows = [row for _, row in kept_feedback(server.feedback)]
    assert [(row.verdict, row.instruction) for row in rows] == [("accept", "turn it around"), ("reject", "and back")]


def test_an_edit_forms_and_steps_can_be_undone(page: Page, server: Server) -> None:
    server.staged = True
    choose(page)
    page.click("summary")
    page.check("#keep")
    page.fill("#prompt", "brighter")
    page.press("#prompt", "Enter")
    expect(page.locator("#busy")).to_have_class("busy forming")
    expect(page.locator("#after")).to_be_visible()
    assert np.array_equal(painted(page, "#after"), opened(picture()) // 2), "the edit as far as it is"
    server.release.set()
    expect(page.locator("#said")).to_have_text("The edit is done.")
    assert server.forms[0].items() >= {"stream": "true", "partial_images": "2", "prompt": "brighter"}.items()
    assert page.input_value("[name=seed]") == "77"
    page.focus("#slider")
    page.press("#slider", "ArrowRight")
    assert page.eval_on_selector("#frame", "e => e.style.getPropertyValue('--at')") == "50.5%"
    first = shown(page)
    page.press("#slider", "e")
    expect(page.locator("#history li")).to_have_count(3)
    edit(page, server, "back again")
    assert server.forms[1]["image"] == first
    assert np.array_equal(opened(shown(page)), opened(picture()))
    page.focus("#undo")
    for _ in range(3):
        page.keyboard.press("Control+z")
    expect(page.locator("#undo")).to_be_disabled()
    expect(page.locator("#after")).to_be_hidden()
    page.keyboard.press("Control+Shift+z")
    expect(page.locator("#redo")).to_be_enabled()
    expect(page.locator("#history [aria-current]")).to_have_attribute("title", "brighter")
    assert shown(page) == first


def test_cancelling_ends_it(page: Page, server: Server) -> None:
    server.staged = True
    choose(page)
    page.fill("#prompt", "slowly")
    page.press("#prompt", "Enter")
    expect(page.locator("#edit")).to_have_text("Cancel")
    page.keyboard.press("Escape")
    expect(page.locator("#said")).to_have_text("Cancelled.")
    expect(page.locator("#after")).to_be_hidden()
    expect(page.locator("#edit")).to_have_text("Edit")


def test_a_painted_mask_is_sent(page: Page, server: Server) -> None:
    server.staged = True
    choose(page)
    page.focus("#mask")
    page.keyboard.press("m")
    box = page.locator("#paint").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    expect(page.locator("#mask")).to_have_text("Mask painted")
    edit(page, server, "only here")
    mask = Image.open(io.BytesIO(server.forms[0]["mask"]))
    assert (mask.format, mask.mode, mask.size) == ("PNG", "RGBA", (300, 200))
    alpha = np.asarray(mask)[..., 3]
    assert set(np.unique(alpha)) == {0, 255}
    assert alpha[100, 120:180].max() == 0
    assert alpha[:60].min() == alpha[140:].min() == 255


def test_a_key_is_asked_for_and_errors_are_said(page: Page, server: Server) -> None:
    server.key = "secret"
    page.reload()
    expect(page.locator("#error")).to_have_text("A key is needed.")
    page.fill("#key-field", "secret")
    page.press("#key-field", "Tab")
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator("#served")).to_have_text("version 3 (champion)")
    choose(page)
    edit(page, server, "with a key")
    page.click("summary")
    page.fill("[name=negative_prompt]", "x" * 5000)
    page.press("#prompt", "Enter")
    expect(page.locator("#error")).to_contain_text("negative_prompt")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    expect(page.locator("#error")).to_contain_text("not an image")


CONTRAST = """() => {
  const part = (x) => x <= 0.04 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.match(/[0-9.]+/g).map((x) => part(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return colour === 'rgba(0, 0, 0, 0)' ? ground(e.parentElement) : colour;
  };
  const ratio = (e) => {
    const [dark, bright] = [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  return [...document.querySelectorAll('button, label, summary, dt, dd, th, td, span, strong, h1, h2, p')]
    .filter((e) => e.checkVisibility() && e.textContent.trim() && !e.disabled && !e.closest('.frame'))
    .filter((e) => ratio(e) < 4.5).map((e) => `${ratio(e)} ${e.outerHTML.slice(0, 80)}`);
}"""
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, a, canvas')]
  .filter((e) => e.checkVisibility())
  .filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel || e.querySelector('[alt]')))
  .map((e) => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser: Browser, server: Server, scheme: Any) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844},
        has_touch=True,
        is_mobile=True,
        color_scheme=scheme,
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(server.url)
    choose(page)
    edit(page, server, "on a phone")
    page.tap("summary")
    page.tap("#mask")
    assert page.evaluate("document.documentElement.scrollWidth") == 390, "nothing sticks out"
    narrow = "es => es.filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect().height).filter(h => h < 44)"
    assert page.eval_on_selector_all("#tools button, #edit, #help, #brush button", narrow) == []
    box = page.locator("#paint").bounding_box()
    assert box
    page.touchscreen.tap(box["x"] + 50, box["y"] + 50)
    expect(page.locator("#mask")).to_have_text("Mask painted")
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []
    context.close()
