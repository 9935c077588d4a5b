"""Who comes in: every request is met here before anything of it is read but its head."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve.keys import ANYBODY, Caller, KeyRing, KeyStore
from insightedit.serve.meters import Meters
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import ServeSettings

# The page has to load before a key can be typed into it, and whoever probes a pod has none.
_OPEN_PATHS = frozenset({"/", "/livez", "/readyz", "/healthz", "/openapi.json"})
_OPEN_FOLDER = "/page/"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def needs_keys(settings: ServeSettings) -> bool:
    """Whether callers must show an API key: unless the settings say so, wherever others reach the server."""
    return not is_loopback(settings.host) if settings.require_keys is None else settings.require_keys


def check_access(workdir: Workdir, settings: ServeSettings) -> None:
    """Look whether a server may be opened as the settings say.

    Raises:
        UsageError: anybody could use it, or nobody.
    """
    check_keys_are_asked_for(settings)
    if needs_keys(settings) and not KeyStore(workdir).all():
        raise UsageError(
            "The server would ask for API keys and there is none; make one with `insightedit serve keys create NAME`, "
            "or listen on 127.0.0.1."
        )


def check_keys_are_asked_for(settings: ServeSettings) -> None:
    """Look whether a server that others reach asks for keys.

    Raises:
        UsageError: anybody could use it.
    """
    if not is_loopback(settings.host) and not needs_keys(settings):
        raise UsageError(
            f"Others would reach the server at {settings.host} and require_keys is false; leave that out, or listen on "
            "127.0.0.1."
        )


@dataclass(frozen=True, slots=True)
class Access:
    """Who may come in."""

    ring: KeyRing | None
    """The keys; None where none is needed."""
    hosts: tuple[str, ...] = ()
    """Names beside loopback's that a server without keys may be asked for by."""

    @classmethod
    def of(cls, settings: ServeSettings) -> Access:
        """What the settings say, with the keys of the process' work folder."""
        return cls(KeyRing(KeyStore(Workdir.open())) if needs_keys(settings) else None, settings.hosts)

    def caller(self, name: str) -> Caller | None:
        """Who has come in under a name before, if they may still.

        Raises:
            InsightEditError: the keys cannot be read.
        """
        if self.ring is None:
            return ANYBODY
        found = self.ring.named(name)
        return None if found is None else Caller(found.name, found.allowance)


def caller_of(request: Request) -> Caller:
    """Who sends a request that has passed the door."""
    return getattr(request.state, "caller", ANYBODY)


class Door:
    """Asks for an API key; where none is needed, for an address that only programs of this machine use."""

    def __init__(self, app: ASGIApp, access: Access, meters: Meters) -> None:
        """Stand before an app."""
        self._app = app
        self._meters = meters
        self._ring = access.ring
        self._hosts = frozenset(host.lower() for host in access.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection.

        Raises:
            ApiError: 401 without a key that counts, 403 for what a browser was made to send, 503 if keys are not to be
                had.
        """
        if scope["type"] == "http":
            try:
                caller = self._let_in(scope["path"], Headers(scope=scope))
            except ApiError as error:
                self._meters.rejected.labels(error.code).inc()
                raise
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)

    def _let_in(self, path: str, headers: Mapping[str, str]) -> Caller:
        if self._ring is None:
            self._check_origin(headers)
            return ANYBODY
        if path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER):
            return ANYBODY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "missing_api_key", "This server needs an API key, as in `Authorization: Bearer KEY`.")
        try:
            found = self._ring.find(key.strip())
        except InsightEditError:
            message = "API keys cannot be looked up at present; send the request again."
            raise ApiError(503, "unavailable", message) from None
        if found is None:
            raise ApiError(401, "invalid_api_key", "The API key is not one of this server's, was revoked, or is over.")
        return Caller(found.name, found.allowance)

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Keep out what a web page of somebody else makes a browser on this machine send.

        A page can send forms to any address, and by DNS give its own name a loopback address so as to read answers.
        """
        name = _host_name(headers.get("host", ""))
        if not (is_loopback(name) or name in self._hosts):
            message = (
                f"This server has no API keys and is asked for as {name[:80]!r}; ask for it as 127.0.0.1, or allow the "
                "name in `hosts`."
            )
            raise ApiError(403, "host_not_allowed", message)
        if headers.get("sec-fetch-site") == "cross-site":
            message = "A page of another host cannot use this server, as it has no API keys."
            raise ApiError(403, "origin_not_allowed", message)


def _host_name(host: str) -> str:
    """The name in a `Host` header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0].lstrip("[").lower()
    return host.partition(":")[0].lower()
