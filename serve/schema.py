"""The HTTP interface: OpenAI's images edit with InstructPix2Pix's settings as extra fields.

Every field is either honoured or refused by name. Nothing a caller sends is dropped in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from insightedit.serve.settings import Limits

EDIT_PATH = "/v1/images/edits"
JOBS_PATH = EDIT_PATH + "/jobs"
SEED_LIMIT = 2**32
"""Seeds are below this, so that every JSON reader keeps them whole."""

OutputFormat = Literal["png", "jpeg", "webp"]
SchedulerName = Literal["ddim", "euler", "euler_a", "dpm++"]
"""The ways to denoise that an edit may choose; `model.schedulers` builds them."""
LEAST_TIMEOUT = 1.0
"""Seconds that a request gives its edit at the least."""
SOURCES = 16
"""Images that one request may send, as at OpenAI's."""
FiniteFloat = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class ApiError(Exception):
    """An answer that is not an image: an HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object, with all four keys."""
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def overloaded(limits: Limits) -> ApiError:
    """The answer to a request that finds every place taken."""
    message = "The server is at its limit; send the request again after the time in Retry-After."
    return ApiError(429, "overloaded", message, retry_after=limits.retry_after)


def _width_by_height(value: str) -> str:
    if value != "auto" and not _SIZE.fullmatch(value):
        raise ValueError("Input should be auto, or width and height in pixels, as in 640x480")
    return value


_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
Size = Annotated[
    str, AfterValidator(_width_by_height), Field(json_schema_extra={"pattern": f"^(auto|{_SIZE.pattern})$"})
]
Prompt = Annotated[str, Field(min_length=1, max_length=32000)]


class EditFields(BaseModel):
    """The fields of `POST /v1/images/edits`, beside its images."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, title="EditFields")

    prompt: Prompt
    """The instruction."""
    model: str | None = None
    """A model version or alias: `3`, `champion` or `insightedit@champion`. Without it, the server's own."""
    n: Annotated[int, Field(ge=1, le=10)] = 1
    """Number of edits of each image, with seeds that follow each other."""
    size: Size = "auto"
    """Width and height of the edit, as in `640x480`; `auto` is the source's. What has another shape is cut at its
    longer side, evenly at both ends."""
    response_format: Literal["b64_json"] = "b64_json"
    output_format: OutputFormat = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of `jpeg` and `webp`, 100 unless set."""
    stream: bool = False
    """Whether to answer with server-sent events."""
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    """How many images of the edit in progress a stream has before the finished one."""
    background: Literal["auto", "opaque"] = "auto"
    """Edits are opaque; what is transparent in a source counts as white."""
    quality: Literal["auto"] = "auto"
    """Of OpenAI's values the neutral one. Here `num_inference_steps` settles it."""
    moderation: Literal["auto"] = "auto"
    """Of OpenAI's values the neutral one. This server moderates nothing."""
    user: Annotated[str, Field(max_length=256)] | None = None
    """Who the caller asks for; written into the server's log."""
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] | None = None
    """Fixes the noise. Without it the server draws one and says which."""
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    """Denoising steps; the model's own number without it."""
    guidance_scale: FiniteFloat | None = None
    """Weight of the instruction."""
    image_guidance_scale: FiniteFloat | None = None
    """Weight of the source image."""
    image_branch_scale: FiniteFloat | None = None
    """Weight of the UNet's image branch; 1 without it."""
    negative_prompt: Annotated[str, Field(max_length=32000)] | None = None
    """What to keep away from."""
    scheduler: SchedulerName | None = None
    """The way to denoise; the model's own without it."""
    timeout: Annotated[float, Field(ge=LEAST_TIMEOUT, allow_inf_nan=False)] | None = None
    """Seconds from the request's arrival after which it is given up with 504; the server's own limit holds as well."""

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Width and height of the edit in pixels; None for the source's."""
        found = _SIZE.fullmatch(self.size)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def file_quality(self) -> int:
        """Of a JPEG or WebP file."""
        return 100 if self.output_compression is None else self.output_compression


class JobFields(EditFields):
    """The fields of a job."""

    model_config = ConfigDict(title="JobFields")

    webhook: Annotated[str, Field(min_length=1, max_length=2048, json_schema_extra={"format": "uri"})] | None = None
    """Address that is told how the job ended, as Standard Webhooks are; only where the server's config allows."""
    webhook_images: bool = False
    """Whether it is told the images as well."""


class ImageRef(BaseModel):
    """An image in a JSON body."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    image_url: Annotated[str, Field(json_schema_extra={"format": "uri"})]
    """A `data:` URL in base64, as in `data:image/png;base64,iVBORw0...`, the type in which plays no part; or the
    address of an image, where the server's config allows it."""


class EditBody(EditFields):
    """A JSON body."""

    model_config = ConfigDict(title="EditBody")

    images: Annotated[list[ImageRef], Field(min_length=1, max_length=SOURCES)]
    """The images to edit, each by itself."""
    mask: ImageRef | None = None
    """A PNG of the first image's size; the image changes where its alpha is 0."""


class JobBody(JobFields, EditBody):
    """A JSON body of a job."""

    model_config = ConfigDict(title="JobBody")


@dataclass(frozen=True, slots=True)
class Bodies:
    """What a request's body is made of, as a form and as JSON."""

    form: type[EditFields]
    json: type[EditBody]


EDIT_BODIES = Bodies(EditFields, EditBody)
JOB_BODIES = Bodies(JobFields, JobBody)

# What OpenAI's interface has and this one does not honour, and what does something like it here.
_OPENAI_ONLY = {
    "input_fidelity": "image_guidance_scale and image_branch_scale say how near an edit stays to its source",
    "file_id": "send the image itself, as a data: URL in image_url",
}
_ADVICE = {
    "quality": "num_inference_steps settles it here",
    "response_format": "images come in the answer itself",
    "moderation": "this server moderates nothing",
    "background": "edits are opaque",
}
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def parse_form(values: Mapping[str, str], limits: Limits, kind: type[EditFields] = EditFields) -> EditFields:
    """Check the text fields of a form, which is of a kind.

    Raises:
        ApiError: 400, naming the first field that is wrong, unknown or not supported.
    """
    try:
        fields = kind.model_validate(dict(values))
    except ValidationError as error:
        raise _field_error(error, [*kind.model_fields, "image", "mask"]) from None
    _check_fields(fields, limits)
    return fields


def parse_json(values: Mapping[str, object], limits: Limits, kind: type[EditBody] = EditBody) -> EditBody:
    """Check the object of a JSON body, which is of a kind and in which null is as good as nothing.

    Raises:
        ApiError: 400, naming the first field that is wrong, unknown or not supported.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        # JSON has types of its own: a number in quotes is wrong.
        body = kind.model_validate(given, strict=True)
    except ValidationError as error:
        raise _field_error(error, list(kind.model_fields)) from None
    _check_fields(body, limits)
    return body


def _check_fields(fields: EditFields, limits: Limits) -> None:
    for name in ("prompt", "negative_prompt"):
        text = getattr(fields, name) or ""
        if _CONTROL.search(text):
            raise ApiError(400, "invalid_value", f"{name} has control characters in it; take them out.", name)
        if len(text) > limits.prompt_chars:
            message = f"{name} is longer than the {limits.prompt_chars} characters allowed."
            raise ApiError(400, "invalid_value", message, name)
    # Joiners and other characters of no width are no instruction either.
    if not any(char.isprintable() and not char.isspace() for char in fields.prompt):
        raise ApiError(400, "invalid_value", "prompt is empty; say what to change in the image.", "prompt")
    if (fields.num_inference_steps or 0) > limits.steps:
        message = f"num_inference_steps is {fields.num_inference_steps}; {limits.steps} at most are allowed."
        raise ApiError(400, "invalid_value", message, "num_inference_steps")
    if fields.output_format == "png" and fields.output_compression not in (None, 100):
        message = "output_compression applies to jpeg and webp; leave it out for png."
        raise ApiError(400, "invalid_value", message, "output_compression")
    if fields.partial_images and not fields.stream:
        message = "partial_images come in a stream only; send stream as true, or leave it out."
        raise ApiError(400, "invalid_value", message, "partial_images")
    width, height = fields.output_size or (1, 1)
    if width * height > limits.pixels or max(width, height) > limits.side:
        message = f"size is {fields.size}; {limits.pixels} pixels and {limits.side} a side are allowed."
        raise ApiError(400, "invalid_value", message, "size")


def _field_error(error: ValidationError, known: list[str]) -> ApiError:
    # Unknown names first: a misspelt field usually makes another one missing.
    first = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    name = _place(first["loc"])[:80]
    last = str(first["loc"][-1])
    code = _CODES.get(first["type"], "invalid_value")
    if first["type"] == "missing":
        message = f"{name} is missing."
    elif last in _OPENAI_ONLY:
        code, message = "unsupported_parameter", f"{name} is not supported by this server; {_OPENAI_ONLY[last]}."
    elif first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, known, n=1)
        message = f"{name} is not a parameter of this request" + (f"; did you mean {near[0]}?" if near else ".")
    else:
        advice = f"; {_ADVICE[name]}" if name in _ADVICE else ""
        message = f"{name}: {first['msg'].removeprefix('Value error, ')}{advice}."
    return ApiError(400, code, message, name)


def _place(loc: Sequence[str | int]) -> str:
    """Where a value is, as in `images[0].image_url`."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc]
    return "".join(steps).lstrip(".")


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorObject
