"""Presets: every choice of a model and its training, as one validated, frozen object.

A preset is a YAML file. It may extend another one and gives only what differs (null takes a value away); `--set
section.key=value` changes single values. Unknown fields are refused, so that a misspelt one is never silently without
effect.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from insightedit.model.configuration import ModelConfig, SourcesConfig
from insightedit.model.stages import STAGES, Part, parts_trained
from insightedit.platform.chat.config import JudgeConfig
from insightedit.platform.construction.config import ConstructionConfig
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.settings import SETTINGS, Count, Share

PRESETS = Path(__file__).parent / "presets"
_PACKAGE = "package:"


def _check_sizes(value: object) -> object:
    """Refuse what is neither a number nor a range, in one sentence for both."""
    ends = cast(Sequence[object], value) if isinstance(value, list | tuple) else [value]
    numbers = [end for end in ends if type(end) is int and end >= 1]
    if len(numbers) != len(ends) or (ends is value and (len(numbers) != 2 or numbers[0] > numbers[1])):
        raise ValueError("it must be a number from 1 on, or a range [least, most] of them")
    return value


Sizes = Annotated[Count | tuple[Count, Count], BeforeValidator(_check_sizes)]
StageNumber = Annotated[int, Field(ge=1, le=len(STAGES))]
Place = dict[str, str]


class _Settings(BaseModel):
    model_config = SETTINGS


class DatasetConfig(_Settings):
    """One dataset: which reader, with which options."""

    reader: str
    """Name of a reader; `insightedit data list` shows them."""
    options: dict[str, Any] = {}
    """What the reader is told: split, count, seed, folder."""


class PictureConfig(_Settings):
    """How pictures are kept in shards."""

    shorter_side: Count | None = None
    """Pixels to which the shorter side of larger pictures is reduced; smaller ones stay as they are."""
    format: Literal["keep", "png", "jpeg", "webp"] = "keep"
    """`keep` leaves the file as it is, or makes a PNG of what is resized."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of JPEG and WebP."""


class DataConfig(_Settings):
    """What is prepared before training."""

    datasets: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], DatasetConfig]
    """By name: letters, digits, `_`, `-` and `.`, as it is the name of a folder and of tracked parameters."""
    validation: DatasetConfig | None = None
    """Edits whose pictures are tracked while training."""
    store: str | None = None
    """Where the shards lie: a folder, or a URI such as `s3://bucket/folder`; without it in the work folder."""
    pictures: PictureConfig = PictureConfig()
    encode: Literal["ahead", "while_training"] = "ahead"
    """Whether latents and embeddings are kept in the shards, or computed by a pool of encoders while training."""
    rows_per_shard: Count = 512
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of the order of rows in the shards; the config's own if None. With one, trainings of all seeds share shards."""
    read_tasks: Count = 2
    """Tasks at a time that read, check and write a dataset."""
    quarantine_limit: Share = 0.01
    """Share of bad rows above which preparing a dataset stops."""
    encoder_workers: Count = 2
    """Processes that run the frozen encoders, each on one thread."""
    encoder_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each such process."""
    shuffle_shards: Count = 8
    """Shards of a dataset whose rows are shuffled together."""
    cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """GiB of shards that each data task keeps in memory; best the shards of a window of every dataset in a stage."""
    place: Place = {}
    """Labels of the nodes that prepare and stream data, as in Ray's label selectors: `{group: data}`."""


class StageConfig(_Settings):
    """How one stage is trained. What it trains and its losses' names are the seed's (`insightedit.model.stages`)."""

    datasets: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Weight of each dataset in the mixture."""
    losses: dict[str, Annotated[float, Field(ge=0)]]
    """Weight of each loss of the stage's equation."""
    steps: Count
    global_batch: Count
    """Samples of one optimiser step, over all workers and accumulation."""
    micro_batch: Count
    """Samples a worker takes at once, at most. Accumulation makes up the rest."""
    learning_rate: Annotated[float, Field(gt=0)]
    learning_rates: dict[Part, Annotated[float, Field(gt=0)]] = {}
    """Of parts that learn at another rate than `learning_rate`, with the same schedule."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    warmups: dict[Part, Share] = {}
    """Of parts that rise longer than `warmup`, as what an earlier stage trained may wait for what begins to learn."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_learning_rate: Share = 0.0
    """Where the schedule ends, as a share of `learning_rate`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradients."""
    bad_steps: Literal["stop", "skip"] = "stop"
    """What happens where loss or gradients are not finite or leap: training stops, or goes on without that batch."""
    spike: Annotated[float, Field(gt=1)] | None = None
    """A loss or a norm of the gradients that is so many times the median of the last good steps is a leap; without it
    none is."""
    max_bad_steps: Count = 10
    """Bad steps one after the other after which training stops in any case."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16 runs the modules under autocast; weights and optimiser stay in float32. auto is bf16 where every worker's
    device has instructions for it, else fp32."""
    zero: Literal[2, 3] = 2
    """ZeRO stage of DeepSpeed."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the CPUs' memory: nothing, the optimiser with its step, or the parameters too."""
    gradient_checkpointing: bool = False
    """Whether the backward pass computes the blocks' activations again instead of keeping them."""
    frozen: Literal["fp32", "bf16"] = "fp32"
    """What the frozen matrices and convolutions are kept in; frozen vectors, such as norms and biases, are float32."""
    compile: bool = False
    """Whether torch.compile makes the blocks faster; needs a C++ compiler on every worker."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """What an exponential moving average of the weights keeps of itself in a step; with it the averages are what the
    stage leaves."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between pictures of validation edits; 0 makes them at the stage's end only."""
    log_every: Count = 10
    """Steps whose figures are averaged into one point of a curve."""

    def settled(self, *, bf16: bool) -> StageConfig:
        """The stage with `precision: auto` decided.

        Args:
            bf16: whether every worker's device has instructions for bfloat16.
        """
        if self.precision != "auto":
            return self
        return self.model_copy(update={"precision": "bf16" if bf16 else "fp32"})


class WorkersConfig(_Settings):
    """The processes that train."""

    count: Sizes = 2
    """How many, or a range `[least, most]`: as many as there is room for, fewer and more as nodes go and come."""
    resize_seconds: Annotated[float, Field(gt=0)] = 60.0
    """With a range: how often it is looked whether there is room for more workers."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray sets aside for each worker."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Count = 1
    """Threads of torch in each worker."""
    data_tasks: Count = 1
    """Tasks at a time that read and collate batches, for all workers together."""
    data_cpus: Annotated[float, Field(gt=0)] = 0.5
    steps_per_block: Count = 8
    """Optimiser steps whose samples one data task collates for one worker."""
    place: Place = {}
    """Labels of the nodes that train, as in Ray's label selectors: `{group: train}`."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """GiB that training may fill on each worker: of its GPU, or of the machine where it has none. What needs more is
    refused by a dry run. Not checked if None."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """What a worker's device can do at best, in 10^12 floating point operations a second at the stages' precision; with
    it the model FLOPs utilisation is reported."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts after a worker died; -1 is without limit. Those after a node was taken away with notice do not count."""
    hang_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds without a step or another sign of progress after which a worker ends itself, to be started again."""

    @property
    def sizes(self) -> range:
        """The numbers of workers that may train."""
        least, most = (self.count, self.count) if isinstance(self.count, int) else self.count
        return range(least, most + 1)

    @property
    def shown(self) -> str:
        """The number or the range, as it is written."""
        return str(self.count) if isinstance(self.count, int) else str(list(self.count))


class CheckpointsConfig(_Settings):
    """What is kept of a running stage."""

    keep: Count = 2
    """The newest ones."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Those with the lowest `best_by`, besides the newest."""
    best_by: str | None = None
    """A loss, by its name in the seed, as the last point of its curve was."""
    store: str | None = None
    """A folder or a URI such as `s3://bucket/folder`; each stage's own folder in the run's if None."""
    upload: Literal["background", "wait"] = "background"
    """Whether training goes on while a checkpoint is written."""
    retry_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long a storage may fail before training does."""
    scratch: str | None = None
    """A folder on each worker's own disk for what comes from or goes to an object store; the system's if None."""

    @model_validator(mode="after")
    def _best_is_known(self) -> CheckpointsConfig:
        losses = sorted({name for stage in STAGES.values() for name in stage.losses})
        if self.best_by is not None and self.best_by not in losses:
            raise ValueError(f"best_by names {self.best_by!r}; the losses are {', '.join(losses)}")
        if self.keep_best and self.best_by is None:
            raise ValueError("keep_best needs best_by, the name of a loss")
        return self


def _named_dataset(value: object) -> object:
    """A dataset that is given by its name alone."""
    return {"reader": value} if isinstance(value, str) else value


class MetricsConfig(_Settings):
    """Metrics beside the judge's scores. Those whose weights are not named here are reported as missing."""

    lpips: str | None = None
    """Folder with LPIPS's weights: torchvision's of the network, and the authors' of the linear layers."""
    network: Literal["vgg", "alex", "squeeze"] = "alex"
    """LPIPS's network; SmartEdit's tables are by `squeeze`."""
    clip: str | None = None
    """Folder of a `CLIPModel`, for the CLIP score of the edited region and for CLIP-I."""
    dino: str | None = None
    """Folder of a DINO model, such as dino-vits16."""
    side: Count | None = None
    """Side of the square that pictures are brought to before they are compared; their own size if None."""
    outside: Literal["alone", "blackened"] = "alone"
    """What PSNR, SSIM, MSE and LPIPS are means over: the pixels outside the edit region, or the whole picture with the
    region black in both, as in the published tables of SmartEdit and InsightEdit."""


class EvaluationConfig(_Settings):
    """How a model is judged."""

    judge: JudgeConfig = "shapes"
    """Who gives the scores: `shapes`, which knows the truth of its scenes, or a multimodal language model."""
    benchmark: Annotated[DatasetConfig, BeforeValidator(_named_dataset)] = DatasetConfig(reader="shapes")
    """What is edited: a benchmark's name, or `reader` and `options` as of a dataset, such as its `root`."""
    split: str = "test"
    """Of shapes: which scenes are drawn."""
    scenes: Count | None = None
    """How many source pictures; None takes all that a benchmark has, and of shapes, which has no end, 200."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the edits' noise; of shapes, of the scenes, whose number is the noise's seed."""
    batch: Count = 16
    """Edits at a time, in each process."""
    replicas: Count | None = None
    """Processes that edit, each with the whole model; the least number of `workers.count` if None."""
    metrics: MetricsConfig = MetricsConfig()


class PromotionConfig(_Settings):
    """When a challenger becomes champion: the bounds of the gates."""

    min_viescore: Share = 0.5
    """What a champion's VIEScore must be above. An editor that copies its source scores 0.5."""
    minimum: dict[str, float] = {}
    """What the mean of other scores must be above: `instruction_adherence: 2.5`, or a metric whose higher values are
    better."""
    compare: Literal["better", "not-worse"] = "better"
    """Whether a version must be better than the champion, or not worse by `margin` (non-inferiority)."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """By how much the VIEScore must be above the champion's; with `not-worse`, by how much it may be below."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Of the one-sided paired test: the chance that a version which is no better passes."""
    task_level: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The chance that an equal version is refused because noise makes any of its tasks look fallen."""
    task_margin: Share = 0.0
    """A task's VIEScore may be lower by this; with `not-worse`, by `margin` at least."""
    max_unjudged: Share = 0.02
    """Share of cases that may lack a score for one of the two, or for a first champion."""
    max_latency_ratio: Annotated[float, Field(ge=0)] = 1.5
    """How many times as long as the champion's an edit may take; with 0 it is not measured."""

    @model_validator(mode="after")
    def _margin_makes_sense(self) -> PromotionConfig:
        if self.compare == "not-worse" and not self.margin:
            raise ValueError("margin must be above 0 with compare: not-worse")
        return self

    @property
    def task_fall(self) -> float:
        """By how much a task's VIEScore may be lower."""
        return max(self.task_margin, self.margin if self.compare == "not-worse" else 0.0)

    def minimum_scores(self) -> dict[str, float]:
        """All minimum scores by name."""
        return {"viescore": self.min_viescore, **self.minimum}


class TolerationConfig(_Settings):
    """A taint of nodes that a group's pods put up with, such as a cloud's for spot machines."""

    key: str
    value: str | None = None
    """Any value if None."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"


class PlacementConfig(_Settings):
    """Which nodes the pods of a group may run on, and the memory of each."""

    memory_gib: Annotated[float, Field(gt=0)] = 16.0
    node_selector: dict[str, str] = {}
    """Labels that a node must have."""
    tolerations: tuple[TolerationConfig, ...] = ()


class PodsConfig(PlacementConfig):
    """The pods of a group whose number follows from what they have to do."""

    cpus: Count = 4


class TrainPodsConfig(PlacementConfig):
    """The pods of the workers that train."""

    workers: Count = 1
    """Workers in one pod: on a machine of eight GPUs, eight of one GPU each."""
    grace_seconds: Count = 110
    """Time between the notice that a pod will be taken away and its end, for a last checkpoint; below what the cloud
    gives a spot machine."""


class KubeConfig(_Settings):
    """How a run or a server stands on Kubernetes, in a cluster of its own that KubeRay makes."""

    image: str = "insightedit:0.1.0"
    """What `deploy/Dockerfile` builds, as the nodes pull it."""
    image_pull_secrets: tuple[str, ...] = ()
    namespace: str | None = None
    """That of the kubectl context if None."""
    service_account: str | None = None
    """Of every pod; one that may do nothing in Kubernetes is enough, but for the head where Ray scales by itself."""
    queue: str | None = None
    """Kueue's LocalQueue: the run waits, suspended, until the queue has room for all its pods."""
    token_secret: str | None = None
    """A Secret whose `auth_token` is the cluster's token; KubeRay makes one of its own if None."""
    work_claim: str = "insightedit-work"
    """The PersistentVolumeClaim, ReadWriteMany, that is every pod's work folder."""
    scratch_gib: Annotated[float, Field(gt=0)] = 100.0
    """Most that one pod may write to its node's disk: what Ray spills, checkpoints on their way to an object store."""
    environment: dict[str, str] = {}
    """Of every pod, such as `AWS_ENDPOINT_URL`."""
    secrets: tuple[str, ...] = ()
    """Secrets whose keys become environment variables of every pod, such as those of an object store."""
    retries: Annotated[int, Field(ge=0)] = 10
    """Times that a run whose head has died goes on in a new cluster."""
    head: PodsConfig = PodsConfig()
    data: PodsConfig = PodsConfig(cpus=8, memory_gib=32)
    encode: PlacementConfig = PlacementConfig(memory_gib=32)
    """Pods of the frozen encoders, where `data.encoder_gpus` gives them GPUs."""
    train: TrainPodsConfig = TrainPodsConfig(memory_gib=64)
    gateway: PodsConfig = PodsConfig(cpus=2, memory_gib=4)
    serve: PodsConfig = PodsConfig(cpus=4, memory_gib=32)
    """Pods of conditioners and editors."""


class RunConfig(_Settings):
    """A whole preset."""

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig
    data: DataConfig
    stages: dict[StageNumber, StageConfig]
    workers: WorkersConfig = WorkersConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    construction: ConstructionConfig = ConstructionConfig()
    promotion: PromotionConfig = PromotionConfig()
    kube: KubeConfig = KubeConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        for number, stage in self.stages.items():
            where = f"stages.{number}"
            if unknown := stage.datasets.keys() - self.data.datasets.keys():
                raise ValueError(f"{where}.datasets names {sorted(unknown)[0]!r}, which data.datasets does not have")
            trains, expected = parts_trained(number, self.model), STAGES[number].losses
            if not trains:
                raise ValueError(f"{where} trains nothing of this model; take the stage away with {where}=null")
            if set(stage.losses) != set(expected):
                raise ValueError(f"{where}.losses must give a weight to each of {', '.join(expected)} and nothing else")
            for field, parts in (("learning_rates", stage.learning_rates), ("warmups", stage.warmups)):
                if idle := parts.keys() - trains:
                    trained = ", ".join(sorted(trains))
                    raise ValueError(f"{where}.{field} names {sorted(idle)[0]!r}; the stage trains {trained}")
            _check_divides(f"{where}.global_batch", stage.global_batch, self.workers)
            if stage.zero == 3 and stage.validate_every:
                raise ValueError(f"{where}.validate_every must be 0 with zero: 3, where no worker has the whole model")
            if stage.offload == "all" and stage.zero != 3:
                raise ValueError(f"{where}.offload is all, which needs {where}.zero: 3; or set it to optimizer")
            if stage.compile and stage.zero == 3:
                raise ValueError(
                    f"{where}.compile needs {where}.zero: 2; with 3 the weights come and go around every layer"
                )
            if stage.frozen == "bf16" and stage.precision != "bf16":
                raise ValueError(
                    f"{where}.frozen is bf16, which needs {where}.precision: bf16, where autocast joins both types"
                )
        return self

    def model_sources(self) -> ModelConfig:
        """The model's config with every source as a folder or file that exists, or a hub id.

        Raises:
            NotFoundError: a source is a folder or file and is missing.
        """
        sources = dataclasses.asdict(self.model.sources)
        found = {part: source and _resolve_source(f"model.sources.{part}", source) for part, source in sources.items()}
        return dataclasses.replace(self.model, sources=SourcesConfig(**found))

    @property
    def shard_seed(self) -> int:
        """What the order of rows in the shards follows from."""
        return self.seed if self.data.seed is None else self.data.seed

    def stage_before(self, number: int) -> int | None:
        """The stage whose weights a stage starts from; None for the config's first."""
        return max((stage for stage in self.stages if stage < number), default=None)

    def fingerprint(self, stage: int) -> str:
        """A sha256 over all that the weights after a stage depend on, but for the shards, which have their own."""
        text = self.model_dump(mode="json", include={"seed", "model", "stages"})
        # What is done about bad steps may change within a run: one that stopped goes on without the batch. So may what
        # is computed twice to the same bits: one that ran out of memory goes on.
        quiet = {"checkpoint_every", "validate_every", "log_every", "bad_steps", "spike", "max_bad_steps"}
        quiet |= {"gradient_checkpointing"}
        stages = {
            key: {name: value for name, value in fields.items() if name not in quiet}
            for key, fields in text["stages"].items()
            if int(key) <= stage
        }
        order = {"shuffle_shards": self.data.shuffle_shards, "encode": self.data.encode}
        return _sha256({**text, **order, "stages": stages})


def load_preset(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a preset.

    Args:
        source: a preset's name, or a YAML file that may extend one.
        overrides: `section.key=value` each, values as in YAML.

    Raises:
        NotFoundError: there is no such preset or file.
        UsageError: a field is unknown, missing or wrong.
    """
    path = _find(str(source))
    content = _merged(path, ())
    for override in overrides:
        _override(content, override)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(_sentence(error, path)) from None


def changed_config(config: RunConfig, changes: Mapping[str, Any], source: str) -> RunConfig:
    """A config with changes laid over it, as by a file that extends it.

    Args:
        config: what is changed.
        changes: fields; null takes one away.
        source: of the changes, as errors call it.

    Raises:
        UsageError: a field is unknown or wrong.
    """
    try:
        return RunConfig.model_validate(_overlaid(_content(config), dict(changes)))
    except ValidationError as error:
        raise UsageError(_sentence(error, Path(source))) from None


def dump_config(config: RunConfig) -> str:
    """A resolved config as YAML that `load_preset` reads back; it extends nothing."""
    return yaml.safe_dump(_content(config), sort_keys=False)


def _content(config: RunConfig) -> dict[str, Any]:
    content = config.model_dump(mode="json")
    content["stages"] = {int(number): stage for number, stage in content["stages"].items()}
    return content


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings with its dotted name."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_divides(field: str, batch: int, workers: WorkersConfig) -> None:
    """Check that each number of workers takes an equal share of a batch.

    Raises:
        ValueError: one does not; the sentence names those that do.
    """
    if wrong := [size for size in workers.sizes if batch % size]:
        which = "" if isinstance(workers.count, int) else f" with {' or '.join(map(str, wrong))} workers"
        fit = ", ".join(str(size) for size in range(1, batch + 1) if batch % size == 0)
        raise ValueError(f"{field} is {batch}, which workers.count {workers.shown} does not divide{which}; {fit} do")


def _find(source: str) -> Path:
    packaged = PRESETS / f"{source}.yaml"
    if packaged.is_file():
        return packaged
    path = Path(source).expanduser().absolute()
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"}:
        raise NotFoundError(f"There is no config file {source}; name a file that exists or a preset.")
    raise NotFoundError(f"There is no preset {source!r}; presets are {', '.join(preset_names())}, or name a YAML file.")


def _merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file's content laid over what it extends."""
    if path in above:
        raise UsageError(f"{path} extends itself; remove one `extends`.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold fields, such as `extends: nano`.")
    fields = cast(dict[str, Any], content)
    parent = fields.pop("extends", None)
    if parent is None:
        return fields
    beside = path.parent / str(parent)
    base = _merged(beside if beside.is_file() else _find(str(parent)), (*above, path))
    return _overlaid(base, fields)


def _overlaid(base: dict[Any, Any], top: dict[Any, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in top.items():
        if value is None:
            # Takes away what is extended, such as a dataset of it.
            result.pop(key, None)
            continue
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _overlaid(cast(Any, old), cast(Any, value)) if both else value
    return result


def parse_setting(setting: str) -> tuple[str, Any]:
    """Name and value of a `section.key=value`, the value as in YAML.

    Raises:
        UsageError: it is not of that form.
    """
    name, separator, text = setting.partition("=")
    if not separator or not name.strip():
        raise UsageError(f"--set {setting} is not of the form section.key=value.")
    try:
        return name.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {setting}: the value is not YAML.") from None


def _override(content: dict[Any, Any], override: str) -> None:
    """Apply one `section.key=value` in place."""
    name, value = parse_setting(override)
    *sections, last = name.split(".")
    place = content
    for section in sections:
        key = int(section) if section.isdecimal() else section
        inner = place.get(key)
        # A copy: what a file extends may be shared.
        place[key] = dict(cast(dict[Any, Any], inner)) if isinstance(inner, dict) else {}
        place = place[key]
    key = int(last) if last.isdecimal() else last
    if value is None:
        place.pop(key, None)
    else:
        place[key] = value


def _sentence(error: ValidationError, path: Path) -> str:
    """The first thing that is wrong, in one sentence that names the field."""
    first = error.errors()[0]
    # What stands in brackets is pydantic's: a mapping's key instead of its value, one of several kinds of a section.
    location = [str(part) for part in first["loc"] if not str(part).startswith("[")]
    field = ".".join(location) or "the config"
    kind = first["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "unexpected_property"):
        known = [name for name in _known_fields(location[:-1]) if name != location[-1]]
        near = difflib.get_close_matches(location[-1], known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "remove it."
        return f"{path.name}: there is no field {field}; {hint}"
    if kind == "missing":
        return f"{path.name}: the field {field} is missing; give it a value."
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"{path.name}: {message}."
    return f"{path.name}: {field} is {first['input']!r}: {message[:1].lower()}{message[1:]}."


def _known_fields(section: Sequence[str]) -> list[str]:
    """Names of the fields that a section may have."""
    kind: Any = RunConfig
    for part in section:
        # Of a mapping, the type of its values.
        kind = get_type_hints(kind).get(part) if isinstance(kind, type) else (get_args(kind) or (None,))[-1]
    # Of a section of several kinds, the fields of all.
    return [name for one in (get_args(kind) or (kind,)) for name in _fields_of(one)]


def _fields_of(kind: Any) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def _resolve_source(field: str, source: str) -> str:
    if source.startswith(_PACKAGE):
        place = PRESETS / source.removeprefix(_PACKAGE)
    else:
        place = Path(source).expanduser().absolute()
        # "owner/name" is a hub id, unless it is here.
        is_hub_id = not source.startswith((".", "/", "~")) and source.count("/") <= 1
        if is_hub_id and not place.exists():
            return source
    if not place.exists():
        raise NotFoundError(f"{field} is {source}, and there is no {place}; make it or name another source.")
    return str(place)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
