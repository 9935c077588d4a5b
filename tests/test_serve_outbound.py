"""Connections for callers: where they may go, where they go, and where they end."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from insightedit.serve import outbound
from insightedit.serve.outbound import FailedConnectionError, RefusedAddressError, check_address, deliver, fetch
from insightedit.serve.settings import Destinations

LOOPBACK = ipaddress.ip_network("127.0.0.0/8")


class Server(ThreadingHTTPServer):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.ended = threading.Event()


class Handler(BaseHTTPRequestHandler):
    """Answers by path."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, headers, body))
        status = {"/redirect": 302, "/missing": 404}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("location", "/file")
        self.end_headers()
        if self.path == "/slow":
            self.server.ended.wait(5)
        elif self.path == "/endless":
            while not self.server.ended.is_set():
                try:
                    self.wfile.write(b"x" * 1000)
                except OSError:
                    break
        else:
            self.wfile.write(b"a picture")

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def at(server: Server, path: str, host: str = "127.0.0.1", scheme: str = "http") -> str:
    return f"{scheme}://{host}:{server.server_port}{path}"


def allowing(server: Server, host: str = "127.0.0.1", **more: Any) -> Destinations:
    return Destinations(origins=(at(server, "", host),), networks=(LOOPBACK,), **more)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """What names lead to, one list of addresses after the other."""
    known: dict[str, list[list[str]]] = {}

    def lookup(host: str, port: int, **_: Any) -> list[Any]:
        if not known.get(host):
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in known[host].pop(0)]

    real: Callable[..., Any] = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        # A host that is an address by itself needs no name service.
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return lookup(host, port)
        return real(host, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


def test_it_fetches_and_delivers_where_it_may(server: Server) -> None:
    assert asyncio.run(fetch(at(server, "/file?a=1#b"), allowing(server), 100)) == b"a picture"
    status = asyncio.run(deliver(at(server, "/missing"), allowing(server), {"webhook-id": "1"}, b"content"))
    assert status == 404
    (got, sent) = server.asked
    assert got[:2] == ("GET", "/file?a=1")
    assert got[2]["host"] == f"127.0.0.1:{server.server_port}"
    assert (sent[0], sent[2]["webhook-id"], sent[3]) == ("POST", "1", b"content")


def test_names_that_are_not_answered_hold_nothing_else_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def silent(*_: Any, **__: Any) -> Any:
        answered.wait(20)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", silent)

    async def story() -> None:
        allowed = Destinations(origins=("https://*",))
        asked = [asyncio.ensure_future(fetch(f"https://{number}.example.com/a", allowed, 100)) for number in range(64)]
        await asyncio.sleep(0.1)
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "work"), 5) == "work"
        finally:
            answered.set()
            found = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(one) for one in found} == {RefusedAddressError}

    asyncio.run(story())


@pytest.mark.parametrize(
    ("origins", "good", "bad"),
    [
        ((), (), ("https://example.com/", "https://1.1.1.1/")),
        (
            ("https://a.example",),
            ("https://a.example/x", "https://A.example:443/"),
            ("http://a.example/", "https://a.example:444/", "https://b.a.example/", "https://a.example.evil/"),
        ),
        (
            ("https://*.a.example", "http://[::1]:8080"),
            ("https://b.a.example/", "https://c.b.a.example/", "http://[::1]:8080/x"),
            ("https://a.example/", "https://xa.example/", "http://[::1]/"),
        ),
        (
            ("https://*",),
            ("https://any.example/",),
            (
                "http://any.example/",
                "https://user@any.example/",
                "https://user:secret@any.example/",
                "ftp://any.example/",
                "file:///etc/passwd",
                "//any.example/",
                "https:///x",
                "https://any.example:99999/",
                "https://[::1/",
                "https://" + "x" * 3000,
                "",
            ),
        ),
    ],
)
def test_only_allowed_origins_are_accepted(origins: tuple[str, ...], good: tuple[str], bad: tuple[str]) -> None:
    allowed = Destinations(origins=origins)
    for address in good:
        check_address(address, allowed)
    for address in bad:
        with pytest.raises(RefusedAddressError):
            check_address(address, allowed)


@pytest.mark.parametrize(
    "origin", ["example.com", "ftp://a.example", "https://a.example/path", "https://a*", "https://"]
)
def test_origins_that_are_none_are_refused(origin: str) -> None:
    with pytest.raises(ValidationError):
        Destinations(origins=(origin,))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "0.0.0.0",  # noqa: S104
        "224.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fd00::1]",
        "[fec0::1]",
        "[::7f00:1]",
        "[64:ff9b:1::7f00:1]",
        "[ff02::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:10.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "2130706433",
        "127.1",
        "0x7f000001",
        "localhost",
    ],
)
def test_addresses_inside_the_network_are_not_reached(server: Server, address: str) -> None:
    allowed = Destinations(origins=(f"http://{address}:{server.server_port}",))
    with pytest.raises(RefusedAddressError, match="no address that this server may reach"):
        asyncio.run(fetch(at(server, "/file", address), allowed, 100))
    assert server.asked == []


def test_a_name_is_looked_up_once_and_must_lead_nowhere_else(server: Server, names: dict[str, list[list[str]]]) -> None:
    allowed = allowing(server, "hooks.example")
    # Looked up again, it would lead to where nobody listens.
    names["hooks.example"] = [["127.0.0.1"], ["127.9.9.9"]]
    assert asyncio.run(fetch(at(server, "/file", "hooks.example"), allowed, 100)) == b"a picture"
    assert server.asked[0][2]["host"] == f"hooks.example:{server.server_port}"
    assert names["hooks.example"] == [["127.9.9.9"]]
    for addresses in (["127.0.0.1", "10.0.0.1"], ["93.184.215.14", "169.254.169.254"], []):
        names["hooks.example"] = [addresses]
        with pytest.raises(RefusedAddressError, match="no address that this server may reach"):
            asyncio.run(fetch(at(server, "/file", "hooks.example"), allowed, 100))
    # One that cannot be connected to is no reason to give up.
    names["hooks.example"] = [["127.9.9.9", "127.0.0.1"]]
    assert asyncio.run(fetch(at(server, "/file", "hooks.example"), allowed, 100)) == b"a picture"


def test_redirects_are_not_followed_and_errors_are_told(server: Server) -> None:
    for path, status in (("/redirect", 302), ("/missing", 404)):
        with pytest.raises(FailedConnectionError, match=f"answers {status}"):
            asyncio.run(fetch(at(server, path), allowing(server), 100))
    assert [path for _, path, _, _ in server.asked] == ["/redirect", "/missing"]


def test_size_and_time_have_ends(server: Server) -> None:
    with pytest.raises(RefusedAddressError, match="more than the 50000 bytes"):
        asyncio.run(fetch(at(server, "/endless"), allowing(server), 50_000))
    for path in ("/slow", "/endless"):
        with pytest.raises(FailedConnectionError, match="does not answer as it should: Timeout"):
            asyncio.run(fetch(at(server, path), allowing(server, seconds=0.2), 10**12))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(FailedConnectionError, match="ConnectError"):
            asyncio.run(fetch(origin, Destinations(origins=(origin,), networks=(LOOPBACK,)), 100))


def test_a_certificate_must_be_of_the_name(
    server: Server, names: dict[str, list[list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = write_certificate("hooks.example", tmp_path / "pair.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    outbound._tls.cache_clear()  # pyright: ignore[reportPrivateUsage]
    try:
        for host, works in (("hooks.example", True), ("other.example", False)):
            names[host] = [["127.0.0.1"]]
            allowed = Destinations(origins=(at(server, "", host, "https"),), networks=(LOOPBACK,))
            address = at(server, "/file", host, "https")
            if works:
                assert asyncio.run(fetch(address, allowed, 100)) == b"a picture"
            else:
                with pytest.raises(FailedConnectionError):
                    asyncio.run(fetch(address, allowed, 100))
    finally:
        outbound._tls.cache_clear()  # pyright: ignore[reportPrivateUsage]


def write_certificate(name: str, file: Path) -> Path:
    """A key and a certificate of a name, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file
