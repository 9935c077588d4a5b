"""The HTTP interface: OpenAI's images edit with InstructPix2Pix's settings as extra fields.

Every field is either honoured or refused by name. Nothing a caller sends is dropped in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from insightedit.serve.settings import Limits

SEED_LIMIT = 2**32
"""Seeds are below this, so that every JSON reader keeps them whole."""

OutputFormat = Literal["png", "jpeg", "webp"]
SchedulerName = Literal["ddim", "euler", "euler_a", "dpm++"]
"""The ways to denoise that an edit may choose; `model.schedulers` builds them."""
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


def _only_false(value: bool) -> bool:
    if value:
        raise ValueError("streaming is not supported; leave it out or send false")
    return value


class EditFields(BaseModel):
    """The form fields of `POST /v1/images/edits`, beside the image."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, title="EditFields")

    prompt: Annotated[str, Field(min_length=1, max_length=32000)]
    """The instruction."""
    model: str | None = None
    """A model version or alias: `3`, `champion` or `insightedit@champion`. Without it, the server's own."""
    n: Annotated[int, Field(ge=1, le=1)] = 1
    """Number of images; one for now."""
    size: Literal["auto"] = "auto"
    """The edit has the size of the uploaded image."""
    response_format: Literal["b64_json"] = "b64_json"
    output_format: OutputFormat = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of `jpeg` and `webp`, 100 unless set."""
    stream: Annotated[bool, AfterValidator(_only_false)] = False
    partial_images: Annotated[int, Field(ge=0, le=0)] = 0
    background: Literal["auto", "opaque"] = "auto"
    quality: Literal["auto"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=SEED_LIMIT)] | None = None
    """Fixes the noise. Without it the server draws one and says which."""
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: FiniteFloat | None = None
    """Weight of the instruction."""
    image_guidance_scale: FiniteFloat | None = None
    """Weight of the source image."""
    negative_prompt: Annotated[str, Field(max_length=32000)] | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Seconds from the request's arrival after which it is given up with 504; the server's own limit holds as well."""


# What OpenAI's interface has and this one does not honour, as opposed to a misspelt name.
_OPENAI_ONLY = frozenset({"mask", "input_fidelity", "user", "moderation"})
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def parse_fields(values: Mapping[str, str], limits: Limits) -> EditFields:
    """Check the form's text fields.

    Raises:
        ApiError: 400, naming the first field that is wrong, unknown or not supported.
    """
    try:
        fields = EditFields.model_validate(dict(values))
    except ValidationError as error:
        raise _field_error(error) from None
    for name in ("prompt", "negative_prompt"):
        if _CONTROL.search(getattr(fields, name) or ""):
            raise ApiError(400, "invalid_value", f"{name} has control characters in it; take them out.", name)
    # Joiners and other characters of no width are no instruction either.
    if not any(char.isprintable() and not char.isspace() for char in fields.prompt):
        raise ApiError(400, "invalid_value", "prompt is empty; say what to change in the image.", "prompt")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(fields, name) or "") > limits.prompt_chars:
            message = f"{name} is longer than the {limits.prompt_chars} characters allowed."
            raise ApiError(400, "invalid_value", message, name)
    if (fields.num_inference_steps or 0) > limits.steps:
        message = f"num_inference_steps is {fields.num_inference_steps}; {limits.steps} at most are allowed."
        raise ApiError(400, "invalid_value", message, "num_inference_steps")
    if fields.output_format == "png" and fields.output_compression not in (None, 100):
        message = "output_compression applies to jpeg and webp; leave it out for png."
        raise ApiError(400, "invalid_value", message, "output_compression")
    return fields


def _field_error(error: ValidationError) -> ApiError:
    # Unknown names first: a misspelt field usually makes another one missing.
    first = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    name = str(first["loc"][0])[:80]
    code = _CODES.get(first["type"], "invalid_value")
    if first["type"] == "missing":
        message = f"{name} is missing."
    elif name in _OPENAI_ONLY:
        code, message = "unsupported_parameter", f"{name} is not supported by this server; leave it out."
    elif first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, [*EditFields.model_fields, "image"], n=1)
        message = f"{name} is not a parameter of this request" + (f"; did you mean {near[0]}?" if near else ".")
    else:
        message = f"{name}: {first['msg'].removeprefix('Value error, ')}."
    return ApiError(400, code, message, name)


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), use_attribute_docstrings=True)


class ErrorObject(_Answer):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Answer):
    """Every answer with a status of 400 or more."""

    error: ErrorObject


class ImageData(_Answer):
    """One edited image."""

    b64_json: str


class InputTokens(_Answer):
    """What the input tokens are."""

    text_tokens: int
    image_tokens: int


class Usage(_Answer):
    """What the models read and wrote: positions of the language model, and latent positions denoised."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class Timing(_Answer):
    """Where the time of a request went, in seconds."""

    queue: float
    condition: float
    edit: float
    total: float


class ImagesResponse(_Answer):
    """OpenAI's answer, with the model version and seed that made the image."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    """Width and height in pixels, as in `640x480`."""
    usage: Usage
    model_version: str
    seed: int
    timing: Timing


def request_body_schema() -> dict[str, Any]:
    """The multipart body for the OpenAPI document."""
    schema = EditFields.model_json_schema()
    image = {"type": "string", "format": "binary", "description": "A PNG, JPEG or WebP image."}
    schema["properties"] = {"image": image, **schema["properties"]}
    schema["required"] = ["image", "prompt"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
