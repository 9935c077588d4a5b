"""A gateway's last minutes: it takes no more edits, says so in its own words, and finishes those that it has in hand.

While a gateway runs, Serve's proxies hand every request to it. Once it is taken away, they answer by themselves: 404 in
plain text. So it stays until nothing is in hand, and the proxies go first.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from insightedit.serve.meters import Meters
from insightedit.serve.schema import EDIT_PATH, ApiError
from insightedit.serve.settings import Limits

_REFUSED = frozenset({("POST", EDIT_PATH), ("GET", "/readyz")})


class Draining:
    """Whether a gateway is being stopped, and what it has in hand."""

    def __init__(self, limits: Limits, meters: Meters) -> None:
        self._limits = limits
        self._meters = meters
        self._begun = False
        self._in_hand = 0

    def begin(self) -> int:
        """Take no more edits from now on.

        Returns:
            How many requests that change anything have not been answered to their last byte.
        """
        self._begun = True
        return self._in_hand

    async def pass_on(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have an app serve one HTTP request, and count it meanwhile.

        Raises:
            ApiError: 503, it asks for an edit, or whether there may be any, and there will be no more.
        """
        method = scope["method"]
        if self._begun and (method, scope["path"]) in _REFUSED:
            if method == "POST":
                self._meters.rejected.labels("stopping").inc()
            message = "The server is being stopped and takes no more edits; send the request again when it is back."
            raise ApiError(503, "stopping", message, retry_after=self._limits.retry_after)
        counts = method not in {"GET", "HEAD"}
        self._in_hand += counts
        try:
            await app(scope, receive, send)
        finally:
            self._in_hand -= counts


class DrainLayer:
    """Puts a gateway's `Draining` around its routes."""

    def __init__(self, app: ASGIApp, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection.

        Raises:
            ApiError: see `Draining.pass_on`.
        """
        if scope["type"] == "http":
            await self._draining.pass_on(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)
