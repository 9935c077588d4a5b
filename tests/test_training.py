"""The training loop with a toy model: exact over workers, accumulation and interruptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny_models
import torch
import toy_training as toy
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from insightedit.jobs.prepare import prepare
from insightedit.jobs.train import train
from insightedit.model.encoders import to_pixels
from insightedit.model.losses import LossTerm
from insightedit.model.pipeline import load_pipeline
from insightedit.model.stages import STAGES
from insightedit.platform import trainer
from insightedit.platform.capacity import NoRoomError
from insightedit.platform.cluster import connected
from insightedit.platform.config import CheckpointsConfig, RunConfig, StageConfig, load_preset
from insightedit.platform.datasets import reader_named, records_of
from insightedit.platform.editing import EditingTask
from insightedit.platform.encoding import RecordEncoder, load_encoders
from insightedit.platform.engine import learning_rate
from insightedit.platform.errors import InsightEditError, UsageError
from insightedit.platform.loop import Layout, StageLoop
from insightedit.platform.records import Record, decode_image, to_table
from insightedit.platform.storage import Store
from insightedit.platform.streams import StageStream
from insightedit.platform.train_metrics import FIGURES
from insightedit.platform.trainer import Progress, TrainingPlan, stage_weights, train_stages
from insightedit.platform.workdir import Workdir

TOLERANCE = 1e-6
"""Largest difference of a weight between two workers with ZeRO and one process: they add in another order."""


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connected(cpus=8):
        yield


def test_a_run_that_would_wait_for_ever_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    config = load_preset("nano", ["workers.cpus=100"])
    with pytest.raises(NoRoomError, match=r"workers\.count asks for 2 x 100 CPUs, and 0 fit"):
        train(config, Workdir.open(tmp_path))


def plan(tmp_path: Path, config: RunConfig, name: str = "run", **settings: Any) -> TrainingPlan:
    workdir = Workdir.open(tmp_path)
    stores: dict[str, Store] = {}
    for dataset in config.data.datasets:
        folder = workdir.data / dataset
        if not folder.exists():
            toy.prepare_toy(folder, weight=0.0 if dataset == "bb" else None)
        stores[dataset] = Store.at(folder)
    stages = tuple(settings.pop("stages", config.stages))
    task = toy.ToyTask(**settings)
    return TrainingPlan(name=name, workdir=workdir, config=config, task=task, stages=stages, datasets=stores)


def reference(training: TrainingPlan, without: tuple[int, ...] = ()) -> dict[int, dict[str, Tensor]]:
    """The weights that each stage leaves, by one process in plain PyTorch with the whole global batch at once.

    Steps `without` are not taken.
    """
    torch.manual_seed(training.config.seed)
    model = toy.ToyModel(0.0)
    after: dict[int, dict[str, Tensor]] = {}
    for number, config in training.config.stages.items():
        model.begin_stage(number)
        stream = training.stream(number)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Only stage 2 trains the head, which is the part with a learning rate and a warm-up of its own.
        head = [parameter for parameter in model.head.parameters() if parameter.requires_grad]
        rest = [parameter for parameter in trained if all(parameter is not other for other in head)]
        optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": head}], lr=1.0, betas=config.betas, weight_decay=config.weight_decay
        )
        head_scale = config.learning_rates.get("bim", config.learning_rate) / config.learning_rate
        warmups = (config.warmup, config.warmups.get("bim", config.warmup))
        averages = [parameter.detach().double() for parameter in trained]
        for updates, step in enumerate((step for step in range(config.steps) if step not in without), start=1):
            batch = whole_batch(stream, step)
            terms = model(batch, number)
            parts = [config.losses[name] * weighted_mean(term) for name, term in terms.items()]
            optimizer.zero_grad()
            torch.stack(parts).sum().backward()
            torch.nn.utils.clip_grad_norm_(trained, config.clip)
            for group, scale, warmup in zip(optimizer.param_groups, (1.0, head_scale), warmups, strict=True):
                group["lr"] = scale * learning_rate(config, step, warmup)
            optimizer.step()
            keep = min(config.ema_decay or 0.0, (1 + updates) / (10 + updates))
            averages = [keep * one + (1 - keep) * own.detach() for one, own in zip(averages, trained, strict=True)]
        with torch.no_grad():
            for parameter, average in zip(trained, averages, strict=True):
                parameter.copy_(average)
        after[number] = {name: value.detach().clone() for name, value in model.named_parameters()}
    return after


def whole_batch(stream: StageStream, step: int) -> dict[str, Tensor]:
    arrays = stream.block(step, 0, 1)
    batch = {name: torch.from_numpy(array[: stream.global_batch].copy()) for name, array in arrays.items()}
    return batch | {"y": batch["y"].float()}


def weighted_mean(term: LossTerm) -> Tensor:
    total = term.weights.sum()
    return (term.values * term.weights).sum() / total if total else term.values.sum() * 0


def test_two_workers_with_zero_reach_the_weights_of_one_process(tmp_path: Path, ray_cluster: None) -> None:
    # Dataset bb has no targets at all, so some micro-batches and some steps have a diffusion loss of weight 0.
    config = toy.toy_config(
        {
            1: {"steps": 12, "losses": {"L_LLM": 1.0, "L_IB": 0.5, "L_TB": 2.0}, "schedule": "linear", "warmup": 0.3},
            2: {
                "steps": 12,
                "micro_batch": 1,
                "weight_decay": 0.0,
                "clip": 0.5,
                "learning_rates": {"bim": 0.004},
                "warmups": {"bim": 0.5},
            },
            3: {"steps": 12, "zero": 3, "micro_batch": 2, "datasets": {"bb": 9.0, "a": 1.0}},
        },
        datasets=("a", "bb"),
        max_failures=0,
    )
    training = plan(tmp_path, config)
    told: list[Progress] = []
    results = train_stages(training, told.append)
    expected = reference(training)
    start = reference(plan(tmp_path, toy.toy_config({1: {"steps": 1, "learning_rate": 1e-30}}, datasets=("a", "bb"))))[
        1
    ]
    for number in (1, 2, 3):
        weights = stage_weights(training, number)
        for name, value in weights.items():
            difference = (value - expected[number][name]).abs().max().item()
            assert difference <= TOLERANCE, (number, name, difference)
            assert not torch.equal(value, start[name])
    # Exactly what the stages train is kept, stage after stage.
    layers = [{f"layers.{index}.{kind}" for kind in ("weight", "bias")} for index in range(3)]
    assert stage_weights(training, 1).keys() == layers[0]
    assert stage_weights(training, 3).keys() == layers[0] | layers[1] | layers[2] | {"head.weight", "head.bias"}
    assert [result.stage for result in results] == [1, 2, 3]
    assert all(
        result.first.keys() == result.last.keys() == config.stages[result.stage].losses.keys() for result in results
    )
    assert results[0].last["L_LLM"] < results[0].first["L_LLM"]
    assert told[-1].stage == 3
    assert told[-1].step == 12


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path: Path, ray_cluster: None) -> None:
    stages = {1: {"steps": 9, "checkpoint_every": 4}, 2: {"steps": 9, "checkpoint_every": 4, "zero": 2}}
    config = toy.toy_config(stages, max_failures=1)
    train_stages(plan(tmp_path, config, "whole", dropout=0.3))
    mark = tmp_path / "killed"
    # In stage 2, two steps behind its checkpoint at step 4: stage 1 is kept, steps 4 and 5 are done again.
    train_stages(plan(tmp_path, config, "killed", dropout=0.3, die_at=(2, 7, str(mark))))
    assert mark.exists()
    for number in (1, 2):
        whole, killed = (
            load_file(tmp_path / "runs" / name / f"stage-{number}" / "weights.safetensors")
            for name in ("whole", "killed")
        )
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[name], killed[name]) for name in whole)
    # A finished run that is started again does nothing; under another config it is refused.
    again = train_stages(plan(tmp_path, config, "whole", dropout=0.3))
    assert [result.steps for result in again] == [9, 9]
    changed = toy.toy_config({**stages, 1: {"steps": 10}}, max_failures=1)
    with pytest.raises(UsageError, match="finished stage 1 with another config"):
        train_stages(plan(tmp_path, changed, "whole"))


def test_the_last_news_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_PROGRESS_SECONDS", 60.0)
    path, told = tmp_path / "progress.json", list[Progress]()
    news = Progress(stage=1, step=12, steps=12, losses={}, samples_per_second=1.0, goodput=1.0)
    with trainer._watched(path, told.append):  # pyright: ignore[reportPrivateUsage]
        trainer.write_json(path, dataclasses.asdict(news))
    assert told == [news]


def test_an_unknown_storage_is_told_before_anything_starts(tmp_path: Path) -> None:
    config = toy.toy_config({1: {"steps": 1}})
    config = config.model_copy(update={"checkpoints": CheckpointsConfig(store="ftp://somewhere/x")})
    with pytest.raises(UsageError, match="ftp://somewhere/x is no storage that is known"):
        train_stages(plan(tmp_path, config))


def test_a_stage_needs_the_one_before(tmp_path: Path) -> None:
    config = toy.toy_config({1: {"steps": 1}, 2: {"steps": 1}})
    with pytest.raises(UsageError, match="Stage 2 starts from stage 1, which run run has not finished"):
        train_stages(plan(tmp_path, config, stages=(2,)))


@pytest.mark.slow
def test_errors_of_workers_are_told_in_one_sentence(tmp_path: Path, ray_cluster: None) -> None:
    stages = {1: {"steps": 1}, 2: {"steps": 4, "learning_rate": 1e30}}
    config = toy.toy_config(stages, max_failures=0)
    with pytest.raises(InsightEditError, match=r"^Training failed: Training diverged at step \d of stage 2, where"):
        train_stages(plan(tmp_path, config))


# -- the parts of the loop, without Ray -----------------------------------------------------------------------------


class Engine:
    """Stands in for DeepSpeed's."""

    def __init__(self, norm: float = 1.0, weight: float = 1.0) -> None:
        parameter = torch.zeros(1, requires_grad=True)
        self.optimizer = torch.optim.SGD([{"params": [parameter], "scale": 1.0, "warmup": 0.0}])
        self.norm = norm
        self.weight = weight
        self.rates: list[float] = []
        self.calls = 0
        cast(Any, self.optimizer).scaled_global_norm = lambda: self.norm

    def __call__(self, batch: Mapping[str, Tensor], totals: Tensor) -> tuple[Tensor, Tensor]:
        count = self.weight * batch["diffusion_weight"].sum()
        return torch.zeros(()), torch.stack([3 * count, count]).reshape(2, 1)

    def backward(self, loss: Tensor) -> None:
        pass

    def step(self) -> None:
        # As DeepSpeed's, it asks for the norm once a whole batch is through: two micro-batches.
        self.calls += 1
        if self.calls % 2 == 0:
            cast(Any, self.optimizer).scaled_global_norm()
        self.rates.append(self.optimizer.param_groups[0]["lr"])


def loop(engine: Engine, first_position: int = 0) -> StageLoop:
    config = toy.toy_config({1: {"steps": 4}}).stages[1]
    layout = Layout(rank=0, world=1, micro_batch=4, accumulation=2, device=torch.device("cpu"))
    arrays = (
        {"position": np.arange(start, start + 4), "diffusion_weight": np.ones(4, np.float32)}
        for start in range(first_position, 32, 4)
    )
    return StageLoop(engine, config, ["L_LLM"], layout, arrays, lambda batch: {"L_LLM": batch["diffusion_weight"]})


def test_points_are_means_over_their_steps() -> None:
    engine = Engine(norm=2.0)
    steps = loop(engine)
    for step in range(3):
        steps.step(step)
    point = steps.point(3)
    assert point.losses == {"L_LLM": pytest.approx(3.0)}
    assert point.figures["gradient_norm"] == 2.0
    assert point.figures["samples_per_second"] == pytest.approx(24 / point.seconds)
    assert len(engine.rates) == 6


def test_a_stream_at_another_place_is_refused() -> None:
    with pytest.raises(InsightEditError, match="not where step 0 is"):
        loop(Engine(), first_position=4).step(0)
    steps = loop(Engine())
    for step in range(4):
        steps.step(step)
    with pytest.raises(InsightEditError, match="not where step 4 is"):
        steps.step(4)


def test_weights_that_disagree_are_told() -> None:
    steps = loop(Engine(weight=0.5))
    steps.step(0)
    with pytest.raises(InsightEditError, match="loss_weights"):
        steps.point(1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12]),
        ("cosine", [0.5, 1.0, 1.0, *(0.5 + 0.25 * (1 + np.cos(np.pi * k / 6)) for k in range(1, 6))]),
    ],
)
def test_learning_rates(schedule: str, expected: list[float]) -> None:
    settings = {"steps": 8, "warmup": 0.25, "learning_rate": 1.0, "schedule": schedule, "final_learning_rate": 0.5}
    config = toy.toy_config({1: settings}).stages[1]
    assert isinstance(config, StageConfig)
    assert [learning_rate(config, step) for step in range(8)] == pytest.approx(expected)
    rising = [learning_rate(config, step, warmup=0.75) for step in range(6)]
    assert rising == pytest.approx([k / 6 for k in range(1, 7)])


# -- the real model, tiny, through the job --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    model = tiny_models.tiny_config(tiny_models.build_sources(tmp_path_factory.mktemp("sources")))
    shapes = {"split": "train", "seed": 0}
    steps = {"steps": 4, "log_every": 2, "global_batch": 8, "micro_batch": 4}
    overrides = [
        f"data.datasets.captions.options={ {**shapes, 'kind': 'caption', 'count': 24} }",
        "data.datasets.questions.options.count=4",
        f"data.datasets.edits.options={ {**shapes, 'kind': 'edit', 'count': 12} }",
        "data.validation.options.count=1",
        "data.rows_per_shard=8",
        *(f"stages.{number}.{key}={value}" for number in (1, 2, 3) for key, value in steps.items()),
        "stages.2.datasets={captions: 1, edits: 1}",
        "stages.2.validate_every=2",
        "stages.2.gradient_checkpointing=true",
        "stages.2.precision=bf16",
        "stages.2.frozen=bf16",
    ]
    config = load_preset("nano", overrides)
    return config.model_copy(update={"model": dataclasses.replace(model, prompt_length=200)})


def test_the_job_trains_the_real_model(tmp_path: Path, ray_cluster: None, tiny_run: RunConfig) -> None:
    workdir = Workdir.open(tmp_path)
    result = train(tiny_run, workdir, name="tiny")
    assert {name: (data.rows, data.reused) for name, data in result.datasets.items()} == {
        "captions": (24, False),
        "questions": (16, False),
        "edits": (24, False),
    }
    client = MlflowClient(workdir.tracking_uri)
    assert client.get_run(result.run_id).info.status == "FINISHED"
    for number, stage in result.stages.items():
        figures = client.get_run(stage.run_id).data.metrics
        wanted = {"query_variance", *FIGURES} - {"model_flops_utilisation"}
        assert figures.keys() >= wanted | set(STAGES[number].losses)
        assert stage.result.first.keys() == stage.result.last.keys() == set(STAGES[number].losses)
        assert (stage.folder / "model_index.json").is_file()
    pictures = [file.path for file in client.list_artifacts(result.stages[2].run_id, "images")]
    assert any("edits" in path for path in pictures)
    assert load_pipeline(result.folder).config["image_branch"]
    assert not load_pipeline(result.stages[2].folder).config["image_branch"]
    assert result.lineage(tiny_run)["dataset.edits"] == result.datasets["edits"].fingerprint
    # The same name again goes on with the run: all is there already.
    again = train(tiny_run, workdir, name="tiny")
    assert again.run_id == result.run_id
    assert all(data.reused for data in again.datasets.values())
    assert again.stages[3].result == result.stages[3].result
    # Data of other settings is neither used nor overwritten silently.
    other = tiny_run.model_copy(update={"model": dataclasses.replace(tiny_run.model, resolution=32)})
    with pytest.raises(UsageError, match=r"captions was prepared with other settings.*--rebuild"):
        prepare(other, workdir)


def test_unknown_stages_are_named(tmp_path: Path, tiny_run: RunConfig) -> None:
    with pytest.raises(UsageError, match="nano has no stage 4; its stages are 1, 2, 3"):
        train(tiny_run, Workdir.open(tmp_path), stages=[2, 4])


def test_batches_and_weights_are_what_the_model_takes(tiny_run: RunConfig) -> None:
    encoder = RecordEncoder(tiny_run.model.sources, tiny_run.model.resolution)
    options = {"split": "train", "count": 2, "seed": 0}
    kinds = ("edit", "caption", "question")
    rows = [row for kind in kinds for row in records_of(reader_named("shapes"), {**options, "kind": kind})]
    table = encoder(to_table([row for row in rows if isinstance(row, Record)]))
    task = EditingTask(key="", model=tiny_run.model, encoders=encoder.fingerprint, validation=None)
    arrays = task.make_collate()(table)
    batch = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    batch = {name: x.float() if x.dtype == torch.float16 else x for name, x in batch.items()}
    batch["seed"] = torch.arange(len(table))
    assert batch["diffusion_weight"].tolist() == [1] * 4 + [0] * 10
    model = cast(Any, task.build_model())
    for number in STAGES:
        model.begin_stage(number)
        terms, weights = model(batch, number), task.loss_weights(batch, number)
        assert terms.keys() == weights.keys()
        assert all(torch.equal(terms[name].weights, weights[name]) for name in terms)
    assert task.diagnostics(model)["query_variance"] > 0
    # Stage 1 aligns with what an edit comes to and a question is to be answered, or with a caption itself.
    replies, captions = table.column("reply").to_pylist(), table.column("instruction").to_pylist()[4:6]
    assert replies[4:6] == ["", ""]
    spoken = [*replies[:4], *captions, *replies[6:]]
    assert all(spoken)
    states = load_encoders(tiny_run.model.sources).encode_text(spoken)
    assert torch.allclose(batch["text_states"], states, atol=2e-3, rtol=2e-3)
    # The same features as at once, at the precision that they are kept in.
    encoders = load_encoders(tiny_run.model.sources)
    side = max(tiny_run.model.resolution, encoders.image_encoder.config.image_size)
    pictures = [Image.fromarray(decode_image(data)) for data in table.column("source").to_pylist()]
    pixels = to_pixels([picture.resize((side, side), Image.Resampling.BICUBIC) for picture in pictures])
    patches = encoders.encode_images(pixels).patches
    assert torch.allclose(batch["clip_patches"], patches, atol=2e-3, rtol=2e-3)
    stale = dataclasses.replace(task, encoders="others")
    with pytest.raises(InsightEditError, match="other encoders"):
        stale.build_model()
