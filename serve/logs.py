"""What a server writes down: lines of JSON, each with the id of the request that it is about.

Serve's own logging does it: it hands a request's id on with every call from one deployment to the next, and each
replica writes a line for every call into a file of its own. What is logged here goes the same way. A prompt, an image
or an API key is never handed to it.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.context import _set_request_context  # pyright: ignore[reportPrivateUsage]  (there is no other way)

from insightedit.serve.settings import ServeSettings

LOGGER = "ray.serve.insightedit"
"""What the server's modules log to: below Serve's own, whose handlers write the lines."""
logger = logging.getLogger(LOGGER)


def logging_config(settings: ServeSettings) -> dict[str, Any]:
    """How replicas log, as an option of their deployment."""
    return {"encoding": "JSON", "logs_dir": settings.log_folder, "enable_access_log": True}


def speak_of(request_id: str) -> None:
    """Have what the present task logs, and the calls that it makes, bear the id of a request that came earlier."""
    _set_request_context(request_id=request_id)


def log_edit(
    caller: str,
    version: str,
    status: int,
    seconds: float,
    code: str | None = None,
    user: str | None = None,
    job: str | None = None,
) -> None:
    """Write down how an edit request ended.

    Args:
        caller: the name of its API key; "" where keys are off.
        version: of the model; "" if it was refused before that was known.
        status: of the answer.
        seconds: from the request's arrival to its answer.
        code: of the error, if it was one.
        user: whom the caller asks for, in the caller's words.
        job: its id, if it is one, in the caller's words; its status is 200 or 500, and its time from when it came.
    """
    extra = {"api_key": caller, "model_version": version, "status": status, "seconds": round(seconds, 4), "code": code}
    extra |= {"user": user, "job": job}
    logger.info("edit", extra=extra)
