"""InsightEdit as a training task: the model, its batches, its validation pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from insightedit.model.configuration import ModelConfig
from insightedit.model.encoders import text_ids
from insightedit.model.insightedit import InsightEditModel, build_pipeline
from insightedit.model.prompts import PromptEncoder
from insightedit.model.stages import STAGES, Part, part_of
from insightedit.model.weights import load_diffusion, load_mllm_processor
from insightedit.platform.config import DatasetConfig
from insightedit.platform.datasets import reader_named, records_of
from insightedit.platform.encoding import RecordEncoder
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.pictures import decode_squares, to_tensor
from insightedit.platform.records import Record, decode_image
from insightedit.platform.shards import Table, features_of
from insightedit.platform.streams import Arrays, Collate, Encode

_NEED_TARGET = frozenset({"L_IAA", "L_diff1", "L_diff2"})
_GAP = 2
_PICTURE_SIDE = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class EditingTask:
    """See `insightedit.platform.tasks.TrainingTask`."""

    key: str
    model: ModelConfig
    """With sources resolved."""
    encoders: str
    """Fingerprint of the encoders that the shards' features come from; empty where they are encoded while training."""
    validation: DatasetConfig | None

    def build_model(self, *, halved: bool = False) -> nn.Module:
        """The untrained model; with `halved`, its language model in bfloat16 from the start.

        Raises:
            UsageError: a source of the model cannot be loaded.
            InsightEditError: the shards were encoded by other encoders than the model's.
        """
        try:
            pipeline = build_pipeline(self.model, halve_mllm=halved)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.encoders and pipeline.encoders.fingerprint() != self.encoders:
            raise InsightEditError(
                "The shards come from other encoders than the model's; make them again: `insightedit data prepare`"
                " with --rebuild NAME for each dataset."
            )
        return InsightEditModel(pipeline, self.model.lora, self.model.diffusion)

    def make_collate(self) -> Collate:
        """Rows of prepared shards to a model's inputs."""
        if self.model.conditioning == "text":
            return self._collate_texts()
        processor = load_mllm_processor(self.model.sources)
        prompts = PromptEncoder(processor, self.model.num_mm_tokens, self.model.prompt_length)

        def collate(table: Table) -> Arrays:
            squares = decode_squares(table.column("source").to_pylist(), prompts.image_side)
            images = prompts.encode_images(to_tensor(squares))
            inputs = {**prompts.encode_text(table.column("instruction").to_pylist(), cut=True), **images}
            return {**features_of(table), **{name: tensor.numpy() for name, tensor in inputs.items()}}

        return collate

    def _collate_texts(self) -> Collate:
        """The instructions alone, for the text encoder."""
        tokenizer = load_diffusion(self.model.sources, parts=("tokenizer",))["tokenizer"]

        def collate(table: Table) -> Arrays:
            features = features_of(table)
            length = features["text_states"].shape[1]
            ids = text_ids(tokenizer, length, table.column("instruction").to_pylist())
            return {**features, "text_ids": ids.numpy()}

        return collate

    def make_encoder(self) -> Encode:
        """The model's own frozen encoders."""
        return RecordEncoder(self.model.sources, self.model.resolution)

    def part_of(self, parameter: str) -> Part | None:
        """The design's parts: `lora`, `unet`, `bim` and so on."""
        return part_of(parameter)

    def loss_weights(self, batch: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """Losses that need a target image count only the samples that have one."""
        edits = batch["diffusion_weight"]
        every = torch.ones_like(edits)
        return {name: edits if name in _NEED_TARGET else every for name in STAGES[stage].losses}

    def diagnostics(self, model: nn.Module) -> dict[str, float]:
        """The variance between the Q-Former's queries, which falls to 0 when they collapse."""
        own = cast(InsightEditModel, model)
        return {"query_variance": float(own.query_variance)} if own.mllm is not None else {}

    def pictures(self, model: nn.Module, stage: int) -> dict[str, Image.Image]:
        """One sheet of validation edits: source, edit and target side by side. Stage 1 has trained no edits yet."""
        if self.validation is None or stage == 1:
            return {}
        reader = reader_named(self.validation.reader)
        records = [row for row in records_of(reader, self.validation.options) if isinstance(row, Record)]
        pipeline: Any = cast(InsightEditModel, model).pipeline(image_branch=stage == 3)
        sources = [_picture(record.source) for record in records]
        generators = [torch.Generator().manual_seed(number) for number in range(len(records))]
        instructions = [record.instruction for record in records]
        edits: list[Image.Image] = pipeline(instructions, sources, generator=generators).images
        return {"edits": _sheet(records, sources, edits)}


def _picture(data: bytes | None) -> Image.Image:
    if data is None:
        raise InsightEditError("A validation edit lacks a picture; name a dataset of edits in data.validation.")
    return Image.fromarray(decode_image(data))


def _sheet(records: Sequence[Record], sources: Sequence[Image.Image], edits: Sequence[Image.Image]) -> Image.Image:
    """A row of source, edit and target for each record."""
    side = _PICTURE_SIDE
    sheet = Image.new("RGB", (3 * (side + _GAP) - _GAP, len(records) * (side + _GAP) - _GAP), "white")
    for row, (record, source, edit) in enumerate(zip(records, sources, edits, strict=True)):
        for column, picture in enumerate((source, edit, _picture(record.target))):
            scaled = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(scaled, (column * (side + _GAP), row * (side + _GAP)))
    return sheet
