"""What a training will cost, against the real thing and against sums done by hand."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from insightedit.jobs.dry_run import check_fits, dry_run
from insightedit.model.attention import use_plain_attention
from insightedit.model.configuration import DiffusionConfig
from insightedit.model.insightedit import InsightEditModel, build_pipeline
from insightedit.model.losses import LossTerm, squared_error
from insightedit.model.memory import checkpoint_activations, halve_frozen
from insightedit.model.outline import build_outline, outline_batch
from insightedit.model.stages import STAGES
from insightedit.platform.config import PRESETS, StageConfig, load_preset
from insightedit.platform.engine import StageLosses
from insightedit.platform.errors import NotFoundError, UsageError
from insightedit.platform.memory_model import BUCKET, FLOAT, Setup, Weights, plan_memory
from insightedit.platform.tracing import Arrival, StepTrace, trace_step
from insightedit.platform.trainer import loss_names

# -- the trace ------------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """Two products whose activations can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 1000, bias=False)
        self.second = nn.Linear(1000, 10, bias=False)

    def forward(self, batch: Mapping[str, Tensor], stage: int) -> dict[str, LossTerm]:
        rows = int(batch["length"].sum())
        output = self.second(self.first(batch["x"][:rows]).relu())
        every = torch.ones(rows)
        return {name: LossTerm(squared_error(output, output.detach()), every) for name in loss_names(stage)}


def test_a_trace_counts_what_is_alive_and_what_is_computed() -> None:
    stage = load_preset("nano").stages[3].model_copy(update={"precision": "fp32"})
    with torch.device("meta"):
        model = TwoLayers()
        x = torch.empty(100, 10)
    names = loss_names(3)
    # The model looks into the lengths, so they are real: 64 of the 100 rows are used.
    batch = {"x": x, "length": torch.tensor([60, 4])}
    trace = trace_step(StageLosses(model, 3, stage, names, 1.0), batch, len(names))
    product = 2 * 64 * 10 * 1000
    assert trace.flops == product * 2 + product * 3  # both forward; for the first layer no gradient of its input
    assert [(one.parameter, one.elements) for one in trace.arrivals] == [
        ("model.second.weight", 10_000),
        ("model.first.weight", 10_000),
    ]
    wide, narrow = 64 * 1000 * FLOAT, 64 * 10 * FLOAT
    # Backward through relu: its output, the gradient of it and that of its input are alive, and little else.
    assert 3 * wide <= trace.activations <= 3 * wide + 2 * 10_000 * FLOAT + 10 * narrow
    assert trace.batch == x.numel() * FLOAT + 16


def measured(model: InsightEditModel, stage: StageConfig, number: int, batch: Mapping[str, Tensor]) -> int:
    """Bytes that torch's own allocator had handed out at most in a real step, above where it began."""
    names = loss_names(number)
    losses = StageLosses(model, number, stage, names, 1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        losses(batch, torch.ones(len(names)))[0].backward()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(
    ("number", "settings"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (2, {"gradient_checkpointing": True, "frozen": "bf16"}),
        (3, {"precision": "fp32"}),
    ],
)
def test_nano_takes_what_its_trace_says(number: int, settings: dict[str, Any]) -> None:
    config = load_preset("nano")
    sources = config.model_sources()
    stage = config.stages[number].settled(bf16=True).model_copy(update=settings)
    outline = build_outline(sources)
    model = InsightEditModel(build_pipeline(sources), sources.lora, sources.diffusion)
    for one in (outline, model):
        one.begin_stage(number)
        use_plain_attention(one)
        one.train()
        if stage.gradient_checkpointing:
            checkpoint_activations(one)
        if stage.frozen == "bf16":
            halve_frozen(one)
    batch = outline_batch(outline.own_pipeline, 8)
    real = {name: torch.randn(x.shape) if x.is_meta else x for name, x in batch.items()}
    names = loss_names(number)
    trace = trace_step(StageLosses(outline, number, stage, names, 1.0), batch, len(names))
    trained = {f"model.{name}": one.numel() for name, one in model.named_parameters() if one.requires_grad}
    assert {one.parameter: one.elements for one in trace.arrivals} == trained
    gradients = 0
    predicted = 0
    for arrival in trace.arrivals:
        predicted = max(predicted, arrival.before + FLOAT * gradients)
        gradients += arrival.elements
    assert predicted == pytest.approx(measured(model, stage, number, real), rel=0.1)


# -- the memory model -----------------------------------------------------------------------------------------------

WEIGHTS = Weights(groups=(600, 400), largest=500, frozen=2000, frozen_elements=1000, encoders=64)
TRACE = StepTrace((Arrival("b", 400, 5000), Arrival("a", 600, 4000)), batch=100, flops=1, computed=1)


def plan(world: int = 2, accumulation: int = 1, *, checkpoints: bool = False, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"zero": 2, "offload": "none", "on_gpu": False}
    setup = Setup(world=world, accumulation=accumulation, **{**defaults, **settings})
    return plan_memory(WEIGHTS, TRACE, setup, checkpoints=checkpoints)


def test_zero2_spreads_the_optimiser_over_the_workers() -> None:
    memory = plan()
    assert memory.weights == 2000 + 4 * 1000  # frozen ones in half precision, and trained ones, on each worker
    assert memory.optimizer == 4 * 3 * 500  # master weights and two moments of a half
    assert memory.batch == 100
    # Before the first gradient, with the first beside what makes the second, and when both are flattened.
    assert memory.activations + memory.gradients + memory.buffers == max(5000, 4000 + 1600, 4000 + 4000)
    assert memory.host == 64


def test_accumulated_gradients_stay_while_others_are_made() -> None:
    memory = plan(accumulation=3)
    assert memory.batch == 300
    assert memory.gradients + memory.buffers == 4 * (500 + 1000) + 4 * 1000


def test_averages_of_the_weights_are_spread_and_kept_in_checkpoints() -> None:
    plain, averaged = plan(checkpoints=True), plan(checkpoints=True, averages=True)
    assert (averaged.optimizer - plain.optimizer, averaged.host - plain.host) == (4 * 500, 4 * 500)


def test_one_worker_has_the_whole_optimiser() -> None:
    assert plan(world=1).optimizer == 4 * 3 * 1000


def test_a_checkpoint_is_written_from_a_copy() -> None:
    assert plan(checkpoints=True).host == 64 + 4 * (3 * 500 + 1000)
    assert plan(checkpoints=True, zero=3).host == 64 + 4 * (3 * 500 + 500)


def test_buckets_of_a_gpu_have_their_full_size() -> None:
    memory = plan(on_gpu=True)
    assert memory.buffers == 2 * 4 * BUCKET
    assert memory.gradients == 4 * 500


def test_offload_moves_the_optimiser_to_the_host() -> None:
    near, far = plan(on_gpu=True), plan(on_gpu=True, offload="optimizer")
    assert far.optimizer == 0
    assert far.host - near.host >= near.optimizer
    assert far.device < near.device


def test_zero3_spreads_the_weights_too() -> None:
    memory = plan(zero=3, on_gpu=True)
    assert memory.weights == (2000 + 4 * 1000) // 2
    assert memory.gradients == 4 * 500
    assert memory.optimizer == 4 * 2 * 500  # the weights' own halves are the master weights
    assert memory.buffers == 4 * BUCKET + 2000 + 4 * 1000  # all are gathered, as they are few
    everywhere = plan(zero=3, on_gpu=True, offload="all")
    assert (everywhere.weights, everywhere.optimizer) == (0, 0)
    assert everywhere.host >= memory.weights + memory.optimizer


# -- a whole dry run --------------------------------------------------------------------------------------------


@pytest.fixture
def without_weights(tmp_path: Path) -> Path:
    """A preset whose sources have config files alone."""
    folder = shutil.copytree(
        PRESETS / "nano-foundation", tmp_path / "sources", ignore=shutil.ignore_patterns("*.safetensors")
    )
    parts = "\n".join(f"    {part}: {folder / part}" for part in ("diffusion", "image_encoder", "mllm"))
    file = tmp_path / "bare.yaml"
    file.write_text(f"extends: nano\nmodel:\n  sources:\n{parts}\nworkers: {{peak_tflops: 0.1}}\n")
    return file


def test_a_dry_run_needs_no_weights(without_weights: Path) -> None:
    config = load_preset(without_weights)
    planned = dry_run(config, [1, 3], utilisation=0.5)
    model = InsightEditModel(build_pipeline(load_preset("nano").model_sources()), config.model.lora, DiffusionConfig())
    model.begin_stage(1)
    trained = [one.numel() for one in model.parameters() if one.requires_grad]
    assert planned.stages[1].trained == sum(trained)
    assert {name for name, part in planned.trainable[3].items() if part.trains} == STAGES[3].trains
    assert (planned.memory[1].limit, planned.memory[1].fits) == (None, None)
    flops = planned.flops[1]
    assert flops.samples_per_second == pytest.approx(2 * 0.1e12 * 0.5 / flops.sample)
    assert flops.hours == pytest.approx(32_000 / (flops.samples_per_second or 0) / 3600)
    assert planned.resources["workers"] == {"count": 2, "cpus": 1, "gpus": 0}


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    whole = dry_run(load_preset("nano"), [2]).memory[2].total
    limit = f"workers.memory_gib={whole * 0.8}"
    with pytest.raises(UsageError) as refused:
        check_fits(dry_run(load_preset("nano", [limit]), [2]))
    settings = re.findall(r"stages\.2\.\w+=\w+", str(refused.value))
    assert settings
    check_fits(dry_run(load_preset("nano", [limit, *settings]), [2]))


def test_where_nothing_would_fit_the_least_is_named() -> None:
    tiny = ["workers.memory_gib=0.01", "stages.3.micro_batch=2", "stages.3.zero=3", "stages.3.validate_every=0"]
    with pytest.raises(UsageError, match=r"least .* is 0\.\d+ GiB, so choose larger workers or a smaller model"):
        check_fits(dry_run(load_preset("nano", tiny), [3]))


def test_recomputing_is_no_work_of_the_model() -> None:
    plain = dry_run(load_preset("nano"), [3]).flops[3]
    again = dry_run(load_preset("nano", ["stages.3.gradient_checkpointing=true"]), [3]).flops[3]
    assert plain.sample == plain.computed == again.sample < again.computed


def test_config_files_that_are_missing_are_named(without_weights: Path) -> None:
    (without_weights.parent / "sources" / "mllm" / "config.json").unlink()
    with pytest.raises(NotFoundError, match=r"model\.sources\.mllm .* config files cannot be read"):
        dry_run(load_preset(without_weights), [1])
