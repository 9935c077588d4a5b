"""The methods of a comparison: each is what it changes in one preset, and all are given the same number of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from insightedit.platform.config import PRESETS, RunConfig, changed_config
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.metrics import METRICS
from insightedit.platform.results import SCORES

COMPARISONS: Final = PRESETS / "comparisons"
MEASURES: Final = ("viescore", *SCORES, *METRICS)
"""What a question may ask for."""
_EDITING_STAGE: Final = 2
"""The stage that every method has, which takes the samples that its other stages leave."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,29}$")]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class MethodConfig(_Settings):
    """One method: it copies, it is a folder that edits as it is, or it is trained."""

    title: str
    """As tables and sheets call it."""
    copies: bool = False
    """Hands the source back unchanged."""
    folder: Path | None = None
    """A diffusers folder that edits; nothing is trained."""
    changes: dict[str, Any] = {}
    """Laid over the preset, as by a file that extends it."""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> MethodConfig:
        if self.copies + (self.folder is not None) + bool(self.changes) > 1:
            raise ValueError("give one of copies, folder and changes")
        return self

    @property
    def is_trained(self) -> bool:
        """Whether each seed gives another model."""
        return not self.copies and self.folder is None


class QuestionConfig(_Settings):
    """What differences between a method and others are to answer."""

    ask: str
    method: Name
    against: Annotated[tuple[Name, ...], Field(min_length=1)]
    wording: Literal["all", "simple", "advanced"] = "all"
    """Of the instructions that count."""
    measures: Annotated[tuple[str, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _measures_are_known(self) -> QuestionConfig:
        if unknown := set(self.measures) - set(MEASURES):
            raise ValueError(f"measures names {sorted(unknown)[0]!r}; there are {', '.join(MEASURES)}")
        return self


class ComparisonConfig(_Settings):
    """A comparison: its methods in the order of tables, and what is asked of them."""

    methods: Annotated[dict[Name, MethodConfig], Field(min_length=1)]
    questions: tuple[QuestionConfig, ...] = ()

    @model_validator(mode="after")
    def _questions_fit(self) -> ComparisonConfig:
        for question in self.questions:
            if unknown := {question.method, *question.against} - set(self.methods):
                raise ValueError(f"the question {question.ask!r} names {sorted(unknown)[0]!r}, which is no method")
        return self

    def narrowed(self, methods: Sequence[str], folders: Mapping[str, Path]) -> ComparisonConfig:
        """Some of the methods, and folders that edit as further ones.

        Args:
            methods: names; all if empty.
            folders: by the name that each gets.

        Raises:
            UsageError: a method is unknown, or a folder's name is taken or cannot be one.
            NotFoundError: a folder is not there.
        """
        if unknown := [name for name in methods if name not in self.methods]:
            raise UsageError(f"There is no method {unknown[0]!r}; the methods are {', '.join(self.methods)}.")
        wanted = {name: one for name, one in self.methods.items() if not methods or name in methods}
        for name, folder in folders.items():
            if name in self.methods:
                raise UsageError(f"--add {name}={folder} takes the name of a method; give it another.")
            if not (folder / "model_index.json").is_file():
                raise NotFoundError(f"--add {name}={folder}: there is no {folder / 'model_index.json'}.")
            wanted[name] = MethodConfig(title=name, folder=folder)
        # What cannot be asked without a method that is left out is not asked.
        asked = [
            question.model_copy(update={"against": tuple(name for name in question.against if name in wanted)})
            for question in self.questions
            if question.method in wanted and any(name in wanted for name in question.against)
        ]
        try:
            return ComparisonConfig.model_validate({"methods": wanted, "questions": asked})
        except ValidationError as error:
            raise UsageError(f"The methods do not fit: {_first(error)}.") from None


def load_comparison(source: str) -> ComparisonConfig:
    """Load a comparison by the name of one that comes with the package, or from a YAML file.

    Raises:
        NotFoundError: there is none.
        UsageError: it is no YAML, or a field is wrong.
    """
    packaged = COMPARISONS / f"{source}.yaml"
    path = packaged if packaged.is_file() else Path(source).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in COMPARISONS.glob("*.yaml")))
        raise NotFoundError(f"There is no comparison {source!r}; there is {names}, or name a YAML file.")
    try:
        return ComparisonConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    except ValidationError as error:
        raise UsageError(f"{path.name}: {_first(error)}.") from None


def method_config(base: RunConfig, name: str, method: MethodConfig, seed: int) -> RunConfig:
    """What a method trains with one seed.

    Every seed has the same shards; it decides on the fresh weights, the order of samples and their noise.

    Raises:
        UsageError: the changes do not fit the preset, or leave stage 2 no samples.
    """
    config = changed_config(base, method.changes, f"methods.{name}.changes")
    own = {
        key: f"{key}.{name}"
        for key, dataset in config.data.datasets.items()
        # Shards of the same name made with other settings would be refused.
        if key in base.data.datasets and dataset != base.data.datasets[key]
    }
    datasets = {own.get(key, key): dataset for key, dataset in config.data.datasets.items()}
    stages = {
        number: stage.model_copy(
            update={"datasets": {own.get(key, key): weight for key, weight in stage.datasets.items()}}
        )
        for number, stage in config.stages.items()
    }
    if _EDITING_STAGE not in stages:
        raise UsageError(f"methods.{name}.changes takes stage {_EDITING_STAGE} away, in which every method edits.")
    rest = samples_of(base) - sum(samples_of(config, number) for number in stages if number != _EDITING_STAGE)
    steps = round(rest / stages[_EDITING_STAGE].global_batch)
    if steps < 1:
        raise UsageError(f"methods.{name}.changes leaves stage {_EDITING_STAGE} no samples; give the others fewer.")
    stages[_EDITING_STAGE] = stages[_EDITING_STAGE].model_copy(update={"steps": steps})
    data = config.data.model_copy(update={"datasets": datasets, "seed": base.shard_seed})
    return config.model_copy(update={"name": f"{base.name}-{name}", "seed": seed, "data": data, "stages": stages})


def samples_of(config: RunConfig, stage: int | None = None) -> int:
    """Samples of a stage, or of all."""
    stages = config.stages.values() if stage is None else [config.stages[stage]]
    return sum(one.steps * one.global_batch for one in stages)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{field}: {message}" if field else message
