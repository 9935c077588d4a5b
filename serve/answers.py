"""What the gateway answers: OpenAI's body and events, with what made the images: seeds, version, times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from insightedit.serve.backend import EditOutcome
from insightedit.serve.schema import SOURCES, EditBody, EditFields, ErrorObject, JobBody, JobFields, OutputFormat


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), use_attribute_docstrings=True)


class ImageData(_Answer):
    """One edited image."""

    b64_json: str
    seed: int
    """What made it, with the request's other fields."""
    size: str
    """Width and height in pixels, as in `640x480`."""


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

    @classmethod
    def of(cls, outcome: EditOutcome) -> Usage:
        """What an edit took."""
        return cls._sum(outcome.text_tokens, outcome.image_tokens, outcome.output_tokens)

    @classmethod
    def total(cls, parts: Sequence[Usage]) -> Usage:
        """What some edits took together."""
        details = [part.input_tokens_details for part in parts]
        text, image = sum(one.text_tokens for one in details), sum(one.image_tokens for one in details)
        return cls._sum(text, image, sum(part.output_tokens for part in parts))

    @classmethod
    def _sum(cls, text: int, image: int, written: int) -> Usage:
        return cls(
            input_tokens=text + image,
            input_tokens_details=InputTokens(text_tokens=text, image_tokens=image),
            output_tokens=written,
            total_tokens=text + image + written,
        )


class Timing(_Answer):
    """Where the time went, in seconds. Of several images the first three are added up, though they ran side by side."""

    queue: float
    condition: float
    edit: float
    total: float
    """From the request's arrival."""

    @classmethod
    def of(cls, outcome: EditOutcome, total: float) -> Timing:
        """Of an edit."""
        return cls(
            queue=round(outcome.queue_seconds, 4),
            condition=round(outcome.condition_seconds, 4),
            edit=round(outcome.edit_seconds, 4),
            total=round(total, 4),
        )

    @classmethod
    def together(cls, parts: Sequence[Timing]) -> Timing:
        """Of some edits of one request."""
        return cls(
            queue=round(sum(part.queue for part in parts), 4),
            condition=round(sum(part.condition for part in parts), 4),
            edit=round(sum(part.edit for part in parts), 4),
            total=max(part.total for part in parts),
        )

    @property
    def compute(self) -> float:
        """Seconds of the models' work."""
        return round(self.condition + self.edit, 4)


class _Made(_Answer):
    """What OpenAI's answers do not have, and a caller needs to get the same image again."""

    model_version: str
    seed: int
    request_id: str
    timing: Timing


class _Event(_Answer):
    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    image_index: int
    """Which image of the request's; an answer that is no stream has them in this order."""


class PartialImageEvent(_Event):
    """An image of the edit in progress."""

    type: Literal["image_edit.partial_image"] = "image_edit.partial_image"
    partial_image_index: int


class CompletedEvent(_Event, _Made):
    """A finished image."""

    type: Literal["image_edit.completed"] = "image_edit.completed"
    usage: Usage


class ImagesResponse(_Made):
    """OpenAI's answer."""

    created: int
    data: list[ImageData]
    """Image by image, and of each the edits in the order of their seeds."""
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    """Of the first image."""
    usage: Usage

    @classmethod
    def of(cls, images: Sequence[CompletedEvent]) -> ImagesResponse:
        """The answer that has these images, in the order of their indices."""
        first = images[0]
        return cls(
            created=max(image.created_at for image in images),
            data=[ImageData(b64_json=image.b64_json, seed=image.seed, size=image.size) for image in images],
            output_format=first.output_format,
            size=first.size,
            usage=Usage.total([image.usage for image in images]),
            model_version=first.model_version,
            seed=first.seed,
            request_id=first.request_id,
            timing=Timing.together([image.timing for image in images]),
        )


WebhookStatus = Literal["pending", "delivered", "failed"]
JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


class Job(_Answer):
    """An edit that is done while nobody waits for it. Times are in seconds since the epoch."""

    object: Literal["image_edit.job"] = "image_edit.job"
    id: str
    """As its caller chose it."""
    status: JobStatus
    created_at: int
    started_at: int | None
    ended_at: int | None
    expires_at: int
    """When it is forgotten; its images may be before."""
    model_version: str | None
    """Known once it has begun."""
    seed: int
    error: ErrorObject | None
    """Why it failed."""
    result: ImagesResponse | None
    """Its images, once it is completed and as long as they are kept."""
    webhook_status: WebhookStatus | None
    """Whether its end has been told, where that was asked for."""


class JobList(_Answer):
    """Some of a caller's jobs, the newest first, all of them without their images."""

    object: Literal["list"] = "list"
    data: list[Job]
    first_id: str | None
    last_id: str | None
    """What the next ones come `after`."""
    has_more: bool

    @classmethod
    def of(cls, jobs: Sequence[Job], has_more: bool) -> JobList:
        """The list that has these jobs."""
        ends = (jobs[0].id, jobs[-1].id) if jobs else (None, None)
        return cls(data=list(jobs), first_id=ends[0], last_id=ends[1], has_more=has_more)


class WebhookSecret(_Answer):
    """What a caller's webhooks are signed with."""

    key: str
    """`whsec_` and 32 bytes in base64, as libraries of Standard Webhooks take it."""


# -- for the OpenAPI document ----------------------------------------------------------------------------------------

_REFERENCE = "#/components/schemas/{model}"
EVENTS_SCHEMA: dict[str, Any] = {
    "anyOf": [{"$ref": _REFERENCE.format(model=name)} for name in ("PartialImageEvent", "CompletedEvent")],
    "discriminator": {"propertyName": "type"},
}


def component_schemas() -> dict[str, Any]:
    """Of the request's bodies and the stream's events, by name."""
    events = [(PartialImageEvent, "serialization"), (CompletedEvent, "serialization")]
    _, schemas = models_json_schema(events, ref_template=_REFERENCE)  # pyright: ignore[reportArgumentType]
    bodies = {"EditForm": _form_schema(EditFields), "JobForm": _form_schema(JobFields)}
    for name, kind in (("EditBody", EditBody), ("JobBody", JobBody)):
        bodies[name], references = _json_schema(kind)
        bodies |= references
    return {**schemas["$defs"], **bodies}


def _json_schema(kind: type[EditBody]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a JSON body, and of what it refers to by name."""
    json_body = kind.model_json_schema(ref_template=_REFERENCE)
    references = json_body.pop("$defs")
    for name, schema in json_body["properties"].items():
        if name not in json_body["required"] and "anyOf" not in schema:
            described = {key: schema.pop(key) for key in ("default", "description") if key in schema}
            json_body["properties"][name] = {"anyOf": [schema, {"type": "null"}], **described}
    return json_body, references


def _form_schema(kind: type[EditFields]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    # A form has no null; who has nothing to say leaves the field out.
    for name, field in schema["properties"].items():
        if "anyOf" in field:
            (given,) = (choice for choice in field.pop("anyOf") if choice.get("type") != "null")
            schema["properties"][name] = {**given, **field}
            del schema["properties"][name]["default"]
    file = {"type": "string", "format": "binary"}
    several = {"type": "array", "items": file, "minItems": 1, "maxItems": SOURCES}
    text = "PNG, JPEG or WebP; several are sent as `image[]`, and each is edited by itself."
    schema["properties"]["image"] = {"anyOf": [file, several], "description": text}
    text = "A PNG of the first image's size; the image changes where its alpha is 0."
    schema["properties"]["mask"] = {**file, "description": text}
    schema["required"] = ["image", "prompt"]
    return schema


def request_body(what: Literal["Edit", "Job"]) -> dict[str, Any]:
    """The bodies that an edit takes, or a job."""
    kinds = {"multipart/form-data": "Form", "application/json": "Body"}
    content = {kind: {"schema": {"$ref": _REFERENCE.format(model=what + name)}} for kind, name in kinds.items()}
    return {"required": True, "content": content}
