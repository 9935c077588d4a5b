"""The HTTP interface, without Ray and without a model: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from insightedit.serve.backend import EditJob, EditOutcome, PartialTaker, VersionEntry, VersionInfo, VersionTable
from insightedit.serve.gateway import EDIT_PATH, build_app
from insightedit.serve.meters import Meters
from insightedit.serve.schema import ApiError, overloaded
from insightedit.serve.settings import Limits

LIMITS = Limits(body_bytes=200_000, pixels=250_000, side=2000, prompt_chars=300, steps=50, in_flight=2, edit_seconds=5)
TABLE = VersionTable(default="3", versions={"3": VersionEntry(application="insightedit-v3", aliases=("champion",))})
INFO = VersionInfo(resolution=32, num_inference_steps=12, guidance_scale=3, image_guidance_scale=1.2)


class InvertingBackend:
    """Turns colours around, at a size of its own, and keeps what it was asked."""

    def __init__(self) -> None:
        self.table = TABLE
        self.jobs: list[EditJob] = []
        self.failure: BaseException | None = None
        self.gate: threading.Event | None = None

    async def edit(self, version: str, job: EditJob, on_partial: PartialTaker | None = None) -> EditOutcome:
        self.jobs.append(job)
        while self.gate is not None and not self.gate.is_set():
            await asyncio.sleep(0.01)
        if self.failure is not None:
            raise self.failure
        for index in range(job.partials if on_partial is not None else 0):
            await cast(PartialTaker, on_partial)(index, job.pixels)
        return EditOutcome(
            pixels=255 - job.pixels,
            steps=job.num_inference_steps or 12,
            queue_seconds=0.01,
            condition_seconds=0.02,
            edit_seconds=0.24,
            text_tokens=7,
            image_tokens=64,
            output_tokens=64,
        )

    async def describe(self, version: str) -> VersionInfo:
        if self.failure is not None:
            raise self.failure
        return INFO


@pytest.fixture
def backend() -> InvertingBackend:
    return InvertingBackend()


@pytest.fixture
def client(backend: InvertingBackend) -> Iterator[TestClient]:
    with TestClient(build_app(backend, LIMITS, Meters()), raise_server_exceptions=False) as client:
        yield client


def picture(width: int = 32, height: int = 32) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, file_format, **options)
    return file.getvalue()


def post(client: TestClient, image: bytes | None = None, name: str = "a.png", **fields: str | None) -> Any:
    values = {"prompt": "make it red", **fields}
    data = {key: value for key, value in values.items() if value is not None}
    return client.post(EDIT_PATH, data=data, files={"image": (name, encoded(picture()) if image is None else image)})


def answered_pixels(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))))


def refused(response: Any, status: int, param: str | None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["code"]
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    return error["message"]


def test_answer_has_openai_shape_and_ours(client: TestClient, backend: InvertingBackend) -> None:
    response = post(client, seed="11", num_inference_steps="6", guidance_scale="2.5", image_guidance_scale="1.4")
    assert np.array_equal(answered_pixels(response), 255 - picture())
    body = response.json()
    assert (body["model_version"], body["seed"], body["size"], body["output_format"]) == ("3", 11, "32x32", "png")
    assert body["usage"] == {
        "input_tokens": 71,
        "input_tokens_details": {"text_tokens": 7, "image_tokens": 64},
        "output_tokens": 64,
        "total_tokens": 135,
    }
    assert set(body["timing"]) == {"queue", "condition", "edit", "total"}
    assert response.headers["x-request-id"]
    assert response.headers["x-content-type-options"] == "nosniff"
    job = backend.jobs[0]
    assert (job.seed, job.num_inference_steps, job.guidance_scale, job.image_guidance_scale) == (11, 6, 2.5, 1.4)


def test_a_missing_seed_is_drawn_and_told(client: TestClient, backend: InvertingBackend) -> None:
    seeds = [post(client).json()["seed"] for _ in range(3)]
    assert seeds == [job.seed for job in backend.jobs]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("model", ["3", "champion", "insightedit", "insightedit@champion", "models:/insightedit/3"])
def test_model_names(client: TestClient, model: str) -> None:
    assert post(client, model=model).json()["model_version"] == "3"


def test_unknown_model_names_what_is_served(client: TestClient) -> None:
    assert "served are 3" in refused(post(client, model="gpt-image-1"), 404, "model")


def test_neutral_openai_fields_are_honoured(client: TestClient) -> None:
    fields = {"n": "1", "size": "auto", "response_format": "b64_json", "stream": "false", "partial_images": "0"}
    assert post(client, None, **fields, background="auto", quality="auto").status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", "11"),
        ("n", "0"),
        ("size", "1024x1024"),
        ("response_format", "url"),
        ("output_format", "gif"),
        ("output_compression", "50"),
        ("stream", "maybe"),
        ("partial_images", "2"),
        ("background", "transparent"),
        ("quality", "high"),
        ("input_fidelity", "high"),
        ("mask", "text"),
        ("promt", "misspelt"),
        ("seed", "-1"),
        ("seed", "4294967296"),
        ("seed", "1.5"),
        ("num_inference_steps", "-3"),
        ("num_inference_steps", "0"),
        ("num_inference_steps", "51"),
        ("num_inference_steps", "9" * 5000),
        ("guidance_scale", "nan"),
        ("guidance_scale", "inf"),
        ("guidance_scale", "-1"),
        ("image_guidance_scale", "lots"),
        ("prompt", ""),
        ("prompt", " \n\t"),
        ("prompt", "x" * 301),
        ("prompt", "x" * 40_000),
        ("negative_prompt", "x" * 301),
        ("timeout", "0"),
        ("timeout", "inf"),
        ("timeout", "soon"),
    ],
)
def test_wrong_fields_are_named(client: TestClient, backend: InvertingBackend, field: str, value: str) -> None:
    assert field in refused(post(client, None, **{field: value}), 400, field)
    assert backend.jobs == []


def test_missing_fields_are_named(client: TestClient) -> None:
    refused(post(client, prompt=None), 400, "prompt")
    refused(client.post(EDIT_PATH, data={"prompt": "x"}, files={"other": ("a", b"b")}), 400, "other")
    # With no file at all the client library does not send multipart; a boundary by hand does.
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--\r\n'
    response = client.post(EDIT_PATH, content=form, headers={"content-type": "multipart/form-data; boundary=b"})
    refused(response, 400, "image")


def test_misspelt_field_gets_a_hint(client: TestClient) -> None:
    assert "did you mean num_inference_steps" in refused(
        post(client, num_inference_step="5"), 400, "num_inference_step"
    )


def test_repeated_parts_and_masks_of_nothing_are_refused(client: TestClient) -> None:
    image = encoded(picture())
    masked = {"image": ("a.png", image), "mask": ("m.png", image)}
    refused(client.post(EDIT_PATH, data={"prompt": "x"}, files=masked), 400, "mask")
    twice = {"prompt": ["x", "y"]}
    refused(client.post(EDIT_PATH, data=twice, files={"image": ("a.png", image)}), 400, "prompt")
    text = client.post(EDIT_PATH, data={"prompt": "x", "image": "data:..."}, files={"other": ("a", b"")})
    refused(text, 400, "image")


def test_image_array_name_is_accepted(client: TestClient) -> None:
    files = {"image[]": ("a.png", encoded(picture()))}
    assert client.post(EDIT_PATH, data={"prompt": "x"}, files=files).status_code == 200


def test_other_bodies_and_paths(client: TestClient) -> None:
    refused(client.post(EDIT_PATH, json={"prompt": "x"}), 400, "images")
    refused(client.post(EDIT_PATH, content=b"x"), 415, None)
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=zz"):
        response = client.post(EDIT_PATH, content=b"--nonsense", headers={"content-type": content_type})
        assert response.status_code == 400
        assert response.json()["error"]["code"]
    refused(client.get(EDIT_PATH), 405, None)
    refused(client.get("/nowhere"), 404, None)
    refused(client.get("/page/..%2f..%2fsettings.py"), 404, None)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = b""
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


HOSTILE: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "text": (b"hello", 400),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", 400),
    "html": (b"<html><script>alert(1)</script></html>", 400),
    "gif": (encoded(Image.new("P", (8, 8)), "GIF"), 400),
    "bmp": (encoded(Image.new("RGB", (8, 8)), "BMP"), 400),
    "tiff": (encoded(Image.new("RGB", (8, 8)), "TIFF"), 400),
    "png signature only": (b"\x89PNG\r\n\x1a\n", 400),
    "truncated png": (encoded(picture(200, 200))[:5000], 400),
    "truncated jpeg": (encoded(picture(200, 200), "JPEG")[:3000], 400),
    "truncated webp": (encoded(picture(200, 200), "WEBP")[:300], 400),
    "bit flips": (encoded(picture(64, 64))[:100] + b"\xff" * 200 + encoded(picture(64, 64))[300:], 400),
    "bomb above Pillow's own limit": (png_header(60_000, 60_000), 413),
    "bomb below Pillow's own limit": (png_header(9_000, 9_000), 413),
    "real bomb": (encoded(Image.new("1", (20_000, 20_000))), 413),
    "long strip": (encoded(Image.new("L", (10_000, 2))), 413),
    "thin strip": (encoded(Image.new("L", (900, 100))), 400),
    "zero width": (png_header(0, 10), 400),
    "claims more than it holds": (png_header(300, 300), 400),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_images(client: TestClient, backend: InvertingBackend, case: str) -> None:
    data, status = HOSTILE[case]
    refused(post(client, data), status, "image")
    assert backend.jobs == []
    assert post(client).status_code == 200


def test_file_names_and_claimed_types_play_no_part(client: TestClient) -> None:
    for name in ("../../etc/passwd", "a\x00.exe", "x" * 400, "C:\\a.png"):
        assert post(client, name=name).status_code == 200
    files = {"image": ("a.png", encoded(picture(), "WEBP", lossless=True), "text/html")}
    response = client.post(EDIT_PATH, data={"prompt": "x"}, files=files)
    assert np.array_equal(answered_pixels(response), 255 - picture())


def test_large_bodies_stop_before_parsing(client: TestClient, backend: InvertingBackend) -> None:
    refused(post(client, b"x" * 300_000), 413, None)

    def chunks() -> Iterator[bytes]:  # No content-length to go by.
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 10_000

    headers = {"content-type": "multipart/form-data; boundary=b"}
    refused(client.post(EDIT_PATH, content=chunks(), headers=headers), 413, None)
    assert backend.jobs == []


def test_many_parts_are_refused(client: TestClient) -> None:
    files = [(f"f{index}", ("a", b"x")) for index in range(30)]
    refused(client.post(EDIT_PATH, data={"prompt": "x"}, files=files), 400, None)
    fields = {f"f{index}": "x" for index in range(100)}
    refused(client.post(EDIT_PATH, data=fields, files={"image": ("a", b"x")}), 400, None)


def test_orientation_transparency_and_depth(client: TestClient, backend: InvertingBackend) -> None:
    tall = Image.new("RGB", (10, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: the image is 20 wide and 10 high.
    turned = post(client, encoded(tall, exif=exif))
    assert turned.json()["size"] == "20x10"
    assert "exif" not in Image.open(io.BytesIO(base64.b64decode(turned.json()["data"][0]["b64_json"]))).info
    post(client, encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))))
    assert backend.jobs[-1].pixels.min() == 255
    post(client, encoded(Image.fromarray(np.full((8, 8), 0x8000, np.uint16))))
    assert np.all(backend.jobs[-1].pixels == 128)
    post(client, encoded(Image.new("CMYK", (8, 8)), "JPEG"))
    assert backend.jobs[-1].pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_output_formats_keep_the_size(client: TestClient, file_format: str) -> None:
    response = post(client, encoded(picture(40, 24)), output_format=file_format)
    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    assert (image.format, image.size) == (file_format.upper(), (40, 24))


def test_errors_of_the_backend(client: TestClient, backend: InvertingBackend) -> None:
    backend.failure = ApiError(503, "unavailable", "No replica answers.")
    refused(post(client), 503, None)
    refused(client.get("/healthz"), 503, None)
    refused(client.get("/readyz"), 503, None)
    assert client.get("/livez").status_code == 200
    backend.failure = overloaded(LIMITS)
    response = post(client)
    refused(response, 429, None)
    assert response.headers["retry-after"] == "2"
    backend.failure = RuntimeError("secret detail")
    response = post(client)
    refused(response, 500, None)
    assert "secret" not in response.text
    backend.failure = None
    assert post(client).status_code == 200
    assert client.get("/readyz").json() == {"status": "ok", "versions": ["3"]}


def test_a_probe_is_kept_for_a_while(client: TestClient, backend: InvertingBackend) -> None:
    for _ in range(3):
        assert client.get("/readyz").status_code == 200
    assert [job.num_inference_steps for job in backend.jobs] == [1]


def test_beyond_its_limit_it_answers_429(client: TestClient, backend: InvertingBackend) -> None:
    backend.gate = threading.Event()
    statuses: list[int] = []
    workers = [threading.Thread(target=lambda: statuses.append(post(client).status_code)) for _ in range(2)]
    for worker in workers:
        worker.start()
    while len(backend.jobs) < 2:
        pass
    response = post(client)
    refused(response, 429, None)
    assert response.headers["retry-after"] == "2"
    backend.gate.set()
    for worker in workers:
        worker.join()
    assert statuses == [200, 200]


def test_an_edit_that_takes_too_long_is_given_up(backend: InvertingBackend) -> None:
    backend.gate = threading.Event()
    limits = LIMITS.model_copy(update={"edit_seconds": 0.1})
    with TestClient(build_app(backend, limits, Meters())) as client:
        refused(post(client), 504, None)


@pytest.mark.parametrize(("header", "field"), [(None, "1"), ("1", None), ("1", "60"), ("60", "1")])
def test_a_request_may_say_how_long_it_waits(
    client: TestClient, backend: InvertingBackend, header: str | None, field: str | None
) -> None:
    backend.gate = threading.Event()
    data = {"prompt": "x", **({"timeout": field} if field else {})}
    headers = {"x-request-timeout": header} if header else {}
    response = client.post(EDIT_PATH, data=data, files={"image": ("a", encoded(picture()))}, headers=headers)
    assert "longer than 1 seconds" in refused(response, 504, None)


@pytest.mark.parametrize("header", ["", "soon", "0", "0.9", "-1", "nan", "inf"])
def test_a_wrong_timeout_is_named(client: TestClient, header: str) -> None:
    files = {"image": ("a", encoded(picture()))}
    response = client.post(EDIT_PATH, data={"prompt": "x"}, files=files, headers={"x-request-timeout": header})
    refused(response, 400, "x-request-timeout")


def test_more_than_the_budget_is_refused_before_it_is_edited(backend: InvertingBackend) -> None:
    limits = LIMITS.model_copy(update={"budget": 32 * 32 * 12})
    with TestClient(build_app(backend, limits, Meters())) as client:
        assert "1024 pixels x 13 steps" in refused(post(client, num_inference_steps="13"), 400, None)
        assert backend.jobs == []
        assert post(client).status_code == 200  # The version's own 12.
        assert "1056 pixels x 12 steps" in refused(post(client, encoded(picture(33, 32))), 400, None)


def test_metrics_count_by_code_and_version(client: TestClient) -> None:
    post(client)
    post(client, n="50")
    text = client.get("/metrics").text
    assert 'insightedit_edit_requests_total{code="200",model_version="3"} 1.0' in text
    assert 'insightedit_edit_rejected_total{reason="invalid_value"} 1.0' in text
    assert "insightedit_edit_duration_seconds_count 1.0" in text
    assert "insightedit_edit_step_seconds_sum 0.02" in text
    assert "insightedit_edit_in_flight 0.0" in text


def test_request_id_is_kept(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_models_are_listed(client: TestClient) -> None:
    (row,) = client.get("/v1/models").json()["data"]
    assert (row["id"], row["default"], row["aliases"], row["num_inference_steps"]) == ("3", True, ["champion"], 12)


def test_page_needs_no_other_host(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for text in (page.text, client.get("/page/app.js").text, client.get("/page/style.css").text):
        assert not re.findall(r"https?:|[\"'(]//", text), "an address of another host"


def test_examples_are_drawn(client: TestClient) -> None:
    example = client.get("/page/example.json?seed=3").json()
    assert Image.open(io.BytesIO(base64.b64decode(example["image"]))).size == (32, 32)
    assert len(example["instructions"]) == 2
    refused(client.get("/page/example.json?seed=-1"), 400, "seed")


def test_openapi_document_names_every_field(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    operation = document["paths"][EDIT_PATH]["post"]
    for kind, image in (("multipart/form-data", "image"), ("application/json", "images")):
        name = operation["requestBody"]["content"][kind]["schema"]["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][name]
        assert {image, "mask", "prompt", "seed", "num_inference_steps"} <= set(schema["properties"])
    assert {"200", "400", "413", "429"} <= set(operation["responses"])
    json.dumps(document)
