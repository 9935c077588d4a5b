"""The connections that the server opens because a caller named an address: to allowed places alone, and in bounds.

What keeps a caller from reaching what only the server can reach: one parser reads the address, and what it read is what
is checked and used; the name is resolved once, and the connection goes to the address that was checked; redirects are
not followed; no proxy of the environment is asked; time and size have ends.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus

import httpx

from insightedit.platform.errors import InsightEditError
from insightedit.serve.settings import ORIGIN, Destinations

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MOST_CHARACTERS = 2048
_LOOKUPS = ThreadPoolExecutor(8, "lookup")
"""Threads of their own: names whose servers never answer must not take those that all other work needs."""
_PORTS = {"http": 80, "https": 443}
# Addresses of IPv4 inside those of IPv6: a translator on the way would take them out again.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL = ipaddress.IPv6Network("2000::/3")
"""All of IPv6 that the public internet has. The rest is for networks of one's own, with their translators to IPv4, or
for nobody yet."""


class RefusedAddressError(InsightEditError):
    """An address that the server opens no connection to."""


class FailedConnectionError(InsightEditError):
    """An allowed address that does not answer as it should. Another time it may."""


def check_address(address: str, allowed: Destinations) -> httpx.URL:
    """Read an address and look whether its origin is allowed. What its name leads to is looked at when it is used.

    Raises:
        RefusedAddressError: it is not.
    """
    if len(address) > MOST_CHARACTERS:
        raise RefusedAddressError(f"The address is longer than {MOST_CHARACTERS} characters.")
    try:
        url = httpx.URL(address)
    except (httpx.InvalidURL, ValueError):
        raise RefusedAddressError("The address cannot be read as a URL.") from None
    if url.scheme not in _PORTS or not url.host:
        raise RefusedAddressError("The address must begin with https:// or http:// and name a host.")
    if url.userinfo:
        raise RefusedAddressError("The address must not hold a user or a password.")
    if not any(_matches(url, origin) for origin in allowed.origins):
        raise RefusedAddressError(f"This server opens no connections to {_origin(url)[:200]}.")
    return url


async def fetch(address: str, allowed: Destinations, most_bytes: int) -> bytes:
    """What is at an address.

    Args:
        address: `https://` or `http://`.
        allowed: where it may be.
        most_bytes: how much it may be.

    Raises:
        RefusedAddressError: it is not allowed, or is more.
        FailedConnectionError: it cannot be had at present.
    """
    body = bytearray()
    # Compressed, few bytes become many.
    async with _answer("GET", address, allowed, {"accept-encoding": "identity"}, b"") as response:
        if response.status_code != HTTPStatus.OK:
            raise FailedConnectionError(f"{response.request.headers['host'][:200]} answers {response.status_code}.")
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > most_bytes:
                raise RefusedAddressError(f"What is at the address is more than the {most_bytes} bytes allowed.")
    return bytes(body)


async def deliver(address: str, allowed: Destinations, headers: Mapping[str, str], content: bytes) -> int:
    """Send something to an address, and hear with which status it was taken. Nothing else of the answer is read.

    Raises:
        RefusedAddressError: it is not allowed.
        FailedConnectionError: nobody answers in time.
    """
    async with _answer("POST", address, allowed, headers, content) as response:
        return response.status_code


@asynccontextmanager
async def _answer(
    method: str, address: str, allowed: Destinations, headers: Mapping[str, str], content: bytes
) -> AsyncGenerator[httpx.Response]:
    """An answer whose body has not been read, for as long as the block takes."""
    url = check_address(address, allowed)
    try:
        async with asyncio.timeout(allowed.seconds), _client(allowed) as client:
            response = await _sent(client, method, url, await _resolved(url, allowed), headers, content)
            try:
                yield response
            finally:
                await response.aclose()
    except (httpx.HTTPError, TimeoutError) as error:
        message = f"{_origin(url)[:200]} does not answer as it should: {type(error).__name__}."
        raise FailedConnectionError(message) from None


def _client(allowed: Destinations) -> httpx.AsyncClient:
    return httpx.AsyncClient(verify=_tls(), trust_env=False, follow_redirects=False, timeout=allowed.seconds)


async def _sent(
    client: httpx.AsyncClient,
    method: str,
    url: httpx.URL,
    found: list[Address],
    headers: Mapping[str, str],
    content: bytes,
) -> httpx.Response:
    """The answer of the first of some addresses that lets itself be connected to."""
    *others, last = found
    for one in (*others, last):
        # To the address; but the certificate is checked against the name, and the host is told the name.
        request = client.build_request(
            method,
            url.copy_with(host=str(one), fragment=None),
            headers={**headers, "host": url.netloc.decode("ascii")},
            content=content or None,
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        try:
            return await client.send(request, stream=True)
        except httpx.ConnectError:
            if one is last:
                raise
    raise AssertionError("unreachable: the last address answers or raises")


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once, as it reads some hundred certificates."""
    return httpx.create_ssl_context()


# -- what is allowed -------------------------------------------------------------------------------------------------


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _matches(url: httpx.URL, origin: str) -> bool:
    parts = re.fullmatch(ORIGIN, origin)
    if parts is None:
        return False
    scheme, host, port = parts["scheme"], parts["host"].lower(), parts["port"]
    if (url.scheme, url.port or _PORTS[url.scheme]) != (scheme, int(port or _PORTS[scheme])):
        return False
    name = url.raw_host.decode("ascii").lower()
    if host.startswith("*"):
        return name.endswith(host[1:])
    return name == host.strip("[]")


async def _resolved(url: httpx.URL, allowed: Destinations) -> list[Address]:
    """The addresses of a URL's host, if every one of them may be reached.

    Whether there is no such name or a forbidden one is not told: that would let callers look around in the network.
    """
    refused = RefusedAddressError(f"{_origin(url)[:200]} has no address that this server may reach.")
    lookup = functools.partial(socket.getaddrinfo, url.raw_host.decode("ascii"), url.port, type=socket.SOCK_STREAM)
    try:
        rows = await asyncio.get_running_loop().run_in_executor(_LOOKUPS, lookup)
    except (OSError, UnicodeError):
        raise refused from None
    found = [ipaddress.ip_address(row[4][0]) for row in rows]
    if not found or not all(_may_be_reached(one, allowed) for one in found):
        raise refused
    return found


def _may_be_reached(address: Address, allowed: Destinations) -> bool:
    if any(address in network for network in allowed.networks):
        return True
    inner = _inner(address)
    if inner is not None:
        return _may_be_reached(inner, allowed)
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL:
        return False
    return address.is_global and not address.is_multicast


def _inner(address: Address) -> ipaddress.IPv4Address | None:
    """The address of IPv4 that one of IPv6 stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
