"""How an editing dataset is constructed: which pictures, who does each step, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from insightedit.platform.chat.config import JudgeConfig
from insightedit.platform.settings import SETTINGS, Count, Share

StepName = Literal["caption", "objects", "detect", "masks", "propose", "remove", "replace", "instruct", "judge"]
"""The steps in their order, each with processes of its own."""
StepOfWords = Literal["caption", "objects", "propose", "instruct"]
"""Those that a language model does."""
STEPS: Final[tuple[StepName, ...]] = get_args(StepName)
Task = Literal["remove", "add", "replace"]
Aspect = Literal["instruction_adherence", "non_overediting", "naturalness", "no_artifacts"]
"""What a judge scores; the names of `insightedit.platform.judges.Aspect`."""


class _Settings(BaseModel):
    model_config = SETTINGS


class ImagesConfig(_Settings):
    """Where the pictures come from: a place with image files, or a dataset."""

    place: str | None = None
    """A folder, or a URI such as `s3://bucket/photos`; every picture below it is taken."""
    reader: str | None = None
    """Instead of a place: a dataset, whose source pictures are taken."""
    options: dict[str, Any] = {}
    """Of the reader."""
    shorter_side: Count | None = None
    """Pixels to which the shorter side of larger pictures is reduced; smaller ones stay as they are."""

    @model_validator(mode="after")
    def _one_of_two(self) -> ImagesConfig:
        if (self.place is None) == (self.reader is None):
            raise ValueError("it must have one of place (a folder or URI) and reader (a dataset), and not both")
        return self


class CocoMasksConfig(_Settings):
    """Masks of COCO's annotations; pictures are known by the names of their files."""

    coco: Annotated[str, Field(min_length=1)]
    """A file such as `annotations/instances_train2017.json`."""


class GroundedMasksConfig(_Settings):
    """Masks of models that transformers loads: one that finds what is named, and one that outlines what was found."""

    detector: Annotated[str, Field(min_length=1)]
    """Folder or hub id, such as Grounding DINO's."""
    segmenter: Annotated[str, Field(min_length=1)]
    """Folder or hub id, such as SAM 2's."""
    box_threshold: Share = 0.35
    """The least sureness of a box."""
    text_threshold: Share = 0.25
    """The least sureness with which a word belongs to a box."""


class OpenCvConfig(_Settings):
    """Inpainting by OpenCV, on a CPU and without a model: it fills holes from their rims, and draws nothing new."""

    opencv: Literal["telea", "navier_stokes"]
    """By Telea's fast marching, or by fluid dynamics."""
    radius: Annotated[float, Field(gt=0)] = 5.0
    """Pixels around a point that it is filled from."""
    grow: Share = 0.01
    """By how much the mask grows, as a share of the shorter side: outlines seldom hold all of a thing."""


class DiffusionConfig(_Settings):
    """Inpainting by any folder or hub id that diffusers' `AutoPipelineForInpainting` loads."""

    diffusion: Annotated[str, Field(min_length=1)]
    """Folder or hub id."""
    side: Count = 512
    """Pixels of the shorter side at which it paints; what it paints is scaled back to the picture's size."""
    steps: Count = 50
    guidance: Annotated[float, Field(ge=0)] = 7.5
    grow: Share = 0.02
    """By how much the mask grows, as a share of the shorter side."""
    prompt: str = "empty background, nothing there, matching its surroundings"
    """What is asked for where a thing is removed."""
    negative_prompt: str = "text, watermark, blur, deformed"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"


def _kind(value: object, fields: Mapping[str, type[_Settings]]) -> str | None:
    """The tag of a section of several kinds, by the field that only that one has."""
    if value == "shapes":
        return "[shapes]"
    for field, kind in fields.items():
        if isinstance(value, kind) or (isinstance(value, Mapping) and field in value):
            return f"[{field}]"
    return None


def _masks_kind(value: object) -> str | None:
    return _kind(value, {"coco": CocoMasksConfig, "detector": GroundedMasksConfig})


def _painter_kind(value: object) -> str | None:
    return _kind(value, {"opencv": OpenCvConfig, "diffusion": DiffusionConfig})


def _replacement_kind(value: object) -> str | None:
    return "[none]" if value == "none" else _kind(value, {"diffusion": DiffusionConfig})


_Shapes = Annotated[Literal["shapes"], Tag("[shapes]")]
MasksConfig = Annotated[
    _Shapes | Annotated[CocoMasksConfig, Tag("[coco]")] | Annotated[GroundedMasksConfig, Tag("[detector]")],
    Discriminator(
        _masks_kind,
        custom_error_type="no_masks",
        custom_error_message="it must be shapes, or have the field coco (a file), or detector and segmenter (folders)",
    ),
]
PainterConfig = Annotated[
    _Shapes | Annotated[OpenCvConfig, Tag("[opencv]")] | Annotated[DiffusionConfig, Tag("[diffusion]")],
    Discriminator(
        _painter_kind,
        custom_error_type="no_painter",
        custom_error_message="it must be shapes, or have the field opencv (telea) or diffusion (a folder)",
    ),
]


ReplacementConfig = Annotated[
    _Shapes | Annotated[Literal["none"], Tag("[none]")] | Annotated[DiffusionConfig, Tag("[diffusion]")],
    Discriminator(
        _replacement_kind,
        custom_error_type="no_painter",
        custom_error_message="it must be shapes or none, or have the field diffusion (a folder); OpenCV draws nothing",
    ),
]


class PoolConfig(_Settings):
    """The processes of one step, and what each of them is given."""

    workers: Count = 1
    cpus: Annotated[float, Field(ge=0)] = 0.25
    """CPUs that Ray sets aside for each; less than one for a step that waits for an endpoint."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Count = 1
    """Of torch and OpenCV in each."""


class ConstructionConfig(_Settings):
    """How pictures become pairs of pictures with instructions."""

    images: ImagesConfig = ImagesConfig(
        reader="shapes", options={"kind": "caption", "split": "train", "count": 200, "seed": 0}
    )
    words: JudgeConfig = "shapes"
    """Who captions, lists objects, proposes replacements and writes instructions: a multimodal language model, or the
    shapes world, which knows its truth. Each of these steps may name another."""
    caption: JudgeConfig | None = None
    objects: JudgeConfig | None = None
    propose: JudgeConfig | None = None
    instruct: JudgeConfig | None = None
    caption_prompt: Annotated[str, Field(min_length=1)] | None = None
    """What a captioner is asked instead of our own words: small models know only what they were trained on."""
    masks: MasksConfig = "shapes"
    removal: PainterConfig = "shapes"
    """Who paints pictures without a thing; the other way round they are pairs that add it."""
    replacement: ReplacementConfig = "shapes"
    """Who paints another thing in the place of one; `none` makes no such pairs."""
    judge: JudgeConfig = "shapes"
    min_scores: dict[Aspect, Annotated[int, Field(ge=0, le=5)]] = {
        "instruction_adherence": 4,
        "non_overediting": 4,
        "naturalness": 3,
        "no_artifacts": 3,
    }
    """The least that a pair needs of each score, from 0 to 5."""
    objects_each: Count = 4
    """Things of one picture that are edited, at most."""
    min_area: Share = 0.002
    """The least share of a picture that a thing covers."""
    max_area: Share = 0.5
    """The largest."""
    advanced_each: Annotated[int, Field(ge=1, le=2)] = 2
    """Advanced instructions of a pair."""
    seed: Annotated[int, Field(ge=0)] = 0
    images_per_block: Count = 8
    """Pictures that go through the steps together, and are put down together."""
    read_tasks: Count = 2
    """Tasks at a time that read pictures, and that put down blocks."""
    pools: dict[StepName, PoolConfig] = {}
    sample: Count = 24
    """Pictures whose way through all steps the report shows."""

    @model_validator(mode="after")
    def _truth_is_known(self) -> ConstructionConfig:
        if self.images.reader != "shapes":
            for name, value in self._choices():
                if value == "shapes":
                    raise ValueError(
                        f"{name} is shapes, which knows only the pictures of the reader shapes; name another"
                    )
        return self

    def _choices(self) -> Iterator[tuple[str, object]]:
        """Who does each step, by the name of its field."""
        for name in get_args(StepOfWords):
            own: object = getattr(self, name)
            yield ("words", self.words) if own is None else (name, own)
        for name in ("masks", "removal", "replacement", "judge"):
            yield name, getattr(self, name)

    def words_of(self, step: StepOfWords) -> JudgeConfig:
        """Who does a step of words."""
        own: JudgeConfig | None = getattr(self, step)
        return self.words if own is None else own

    def pool(self, step: StepName) -> PoolConfig:
        """The processes of a step."""
        return self.pools.get(step, PoolConfig())
