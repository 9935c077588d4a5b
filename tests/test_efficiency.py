"""What spares memory or smooths weights does that and nothing else: checkpointing, frozen bf16, offload, averages."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import full_size_step
import layouts
import pytest
import tiny_models
import torch
import toy_training as toy
from safetensors.torch import load_file
from test_model import make_batch
from test_training import TOLERANCE, plan, reference
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from insightedit.model.attention import use_plain_attention
from insightedit.model.configuration import ModelConfig
from insightedit.model.insightedit import InsightEditModel, build_pipeline
from insightedit.model.memory import checkpoint_activations, halve_frozen
from insightedit.model.stages import STAGES, part_of
from insightedit.platform import efficiency
from insightedit.platform.averages import Averages, averages_name
from insightedit.platform.cluster import connected
from insightedit.platform.config import load_preset
from insightedit.platform.efficiency import Efficiency, FlopMeter
from insightedit.platform.engine import (
    StageLosses,
    gathered_weights,
    set_learning_rates,
    start_engine,
    trained_parameters,
)
from insightedit.platform.errors import UsageError
from insightedit.platform.journals import read_entries
from insightedit.platform.loop import Layout
from insightedit.platform.trainer import StageResult, TrainingPlan, stage_weights, train_stages

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connected(cpus=8):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return tiny_models.tiny_config(tiny_models.build_sources(tmp_path_factory.mktemp("sources")))


@pytest.fixture(scope="module")
def batch(config: ModelConfig) -> dict[str, Tensor]:
    return make_batch(build_pipeline(config))


def build(config: ModelConfig, stage: int) -> InsightEditModel:
    torch.manual_seed(0)
    model = InsightEditModel(build_pipeline(config), config.lora, config.diffusion)
    model.begin_stage(stage)
    use_plain_attention(model)
    model.train()
    return model


def frozen_bytes(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in model.parameters() if not x.requires_grad)


def steps(model: nn.Module, stage: int, batch: dict[str, Tensor], **settings: Any) -> tuple[list[float], Any]:
    """Losses of four steps of one rank, and the weights after them."""
    config = toy.toy_config({stage: {"steps": 4, "learning_rate": 1e-3, **settings}}).stages[stage]
    names = STAGES[stage].losses
    losses = StageLosses(model, stage, config, names, 1.0)
    engine = start_engine(losses, config, part_of, micro_batch=2, accumulation=1, device=CPU)
    values: list[float] = []
    for step in range(4):
        set_learning_rates(engine, config, step)
        loss, _ = engine(batch, torch.full((len(names),), 2.0))
        engine.backward(loss)
        engine.step()
        values.append(loss.item())
    weights = gathered_weights(model, 0)
    engine.destroy()
    return values, weights


def test_a_language_model_that_is_halved_as_it_is_read_is_the_same(config: ModelConfig, tmp_path: Path) -> None:
    layouts.llava_15(tmp_path / "fp16")
    for file in (tmp_path / "fp16").glob("*.safetensors"):
        layouts.write(file.parent, {name: x.half() for name, x in load_file(file).items()}, file.name)
    config = replace(config, sources=replace(config.sources, mllm=str(tmp_path / "fp16")))
    plain = InsightEditModel(build_pipeline(config), config.lora, config.diffusion)
    plain.begin_stage(2)
    halve_frozen(plain.mllm)
    halved = InsightEditModel(build_pipeline(config, halve_mllm=True), config.lora, config.diffusion)
    halved.begin_stage(2)
    expected = dict(plain.mllm.named_parameters())
    assert {x.dtype for x in expected.values()} == {torch.bfloat16, torch.float32}
    for name, parameter in halved.mllm.named_parameters():
        assert (parameter.dtype, parameter.requires_grad) == (expected[name].dtype, expected[name].requires_grad), name
        assert parameter.requires_grad or torch.equal(parameter, expected[name])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_checkpointed_activations_keep_less_and_give_the_same_gradients(
    config: ModelConfig, batch: dict[str, Tensor], stage: int
) -> None:
    def run(model: InsightEditModel) -> tuple[Tensor, Tensor, int]:
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            values = torch.stack([term.values.mean() for term in model(batch, stage).values()])
        values.sum().backward()
        return values, torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]), kept

    values, gradients, kept = run(build(config, stage))
    model = build(config, stage)
    checkpoint_activations(model)
    again, same_gradients, kept_then = run(model)
    assert torch.equal(values, again)
    assert torch.equal(gradients, same_gradients)
    assert kept_then < 0.75 * kept


@pytest.mark.parametrize("zero", [2, 3])
def test_checkpointed_activations_train_to_the_same_weights(
    config: ModelConfig, batch: dict[str, Tensor], one_rank: None, zero: int
) -> None:
    plain, weights = steps(build(config, 2), 2, batch, zero=zero)
    model = build(config, 2)
    values, same_weights = steps(model, 2, batch, zero=zero, gradient_checkpointing=True)
    assert model.unet.mid_block.gradient_checkpointing
    assert values == plain
    assert all(torch.equal(value, same_weights[name]) for name, value in weights.items())


@pytest.mark.parametrize(("stage", "zero"), [(1, 2), (2, 2), (3, 2), (3, 3)])
def test_frozen_parts_in_half_precision_take_half_and_train(
    config: ModelConfig, batch: dict[str, Tensor], one_rank: None, stage: int, zero: int
) -> None:
    settings: dict[str, Any] = {"zero": zero, "precision": "bf16"}
    whole, _ = steps(build(config, stage), stage, batch, **settings)
    model = build(config, stage)
    before = frozen_bytes(model)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    values, weights = steps(model, stage, batch, frozen="bf16", **settings)
    assert values == pytest.approx(whole, rel=0.02)
    assert values[-1] < values[0]
    # What trains is float32, and all of it has moved; what is frozen has not.
    assert weights.keys() == trained
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert {part_of(name) for name, value in weights.items() if not value.equal(start[name])} == STAGES[stage].trains
    if zero == 2:
        assert frozen_bytes(model) < 0.52 * before
        frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
        assert all(value.equal(start[name].to(value.dtype)) for name, value in frozen.items())


def check_goodput(training: TrainingPlan) -> None:
    """Goodput counts each step once, over all time since the run's first start."""
    useful = 0.0
    began = json.loads(training.beginning.read_text())["at"]
    for number in training.stages:
        points = read_entries(training.stage_folder(number) / "curve.jsonl")
        times: list[float] = []
        for point in points:
            useful += point["seconds"]
            times.append(began + useful / point["figures"]["goodput"])
        # The moments at which the points were made, in their order, none in the future.
        assert times == sorted(times)
        assert times[-1] < time.time()
        result = StageResult.read(training.stage_folder(number))
        assert result is not None
        assert result.figures["seconds"] == pytest.approx(sum(point["seconds"] for point in points))


@pytest.mark.slow
def test_offload_and_averages_are_exact_and_resume_to_the_bit(tmp_path: Path, ray_cluster: None) -> None:
    stages = {
        1: {"steps": 5, "offload": "optimizer", "ema_decay": 0.4},
        2: {"steps": 7, "zero": 3, "offload": "all", "checkpoint_every": 3, "ema_decay": 0.9},
    }
    training = plan(tmp_path, toy.toy_config(stages, max_failures=0), "whole")
    train_stages(training)
    killed = plan(tmp_path, toy.toy_config(stages, max_failures=1), "killed", die_at=(2, 5, str(tmp_path / "killed")))
    train_stages(killed)
    assert (tmp_path / "killed").exists()
    check_goodput(killed)
    expected = reference(training)
    for number in stages:
        weights = stage_weights(training, number)
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[number][name], rtol=0, atol=TOLERANCE)
        assert all(torch.equal(value, weights[name]) for name, value in stage_weights(killed, number).items())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_to_the_same_weights(
    config: ModelConfig, batch: dict[str, Tensor], one_rank: None, checkpointing: bool
) -> None:
    plain, weights = steps(build(config, 2), 2, batch)
    torch.compiler.reset()
    counters["stats"].clear()
    model = build(config, 2)
    values, same_weights = steps(model, 2, batch, compile=True, gradient_checkpointing=checkpointing)
    assert counters["stats"]["unique_graphs"] > 15
    assert values == pytest.approx(plain, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(same_weights[name], value, rtol=0, atol=2e-3)


def test_a_missing_compiler_is_told(
    config: ModelConfig, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    sentence = (
        r"^stages\.2\.compile needs a C\+\+ compiler on every worker, and there is no no-such-compiler on this one"
    )
    with pytest.raises(UsageError, match=sentence):
        steps(build(config, 2), 2, batch, compile=True)


def test_averages_are_taken_over_by_another_number_of_ranks(tmp_path: Path, one_rank: None) -> None:
    torch.manual_seed(0)
    model = toy.ToyModel(0.0)
    model.begin_stage(2)
    start = {name: value.detach().clone() for name, value in trained_parameters(model).items()}

    def averages(rank: int, world: int) -> Averages:
        return Averages(model, 0.5, Layout(rank=rank, world=world, micro_batch=1, accumulation=1, device=CPU))

    # A bias of eight values is 3 + 3 + 2 on three ranks, and 2 + 2 + 2 + 2 + 0 on five.
    three = [averages(rank, 3) for rank in range(3)]
    with torch.no_grad():
        for value in trained_parameters(model).values():
            value.add_(1.0)
    for rank, one in enumerate(three):
        one.update()
        torch.save(one.state(), tmp_path / averages_name(rank))
    others = [averages(rank, 5) for rank in range(5)]
    for one in others:
        one.load(tmp_path)
        one.update()
    for path in tmp_path.iterdir():
        path.unlink()
    for rank, one in enumerate(others):
        torch.save(one.state(), tmp_path / averages_name(rank))
    whole = averages(0, 1)
    whole.load(tmp_path)
    found = whole.gathered()
    # Of the step of 1, 9/11 at first, then 9/12 of what is left.
    for name, value in start.items():
        torch.testing.assert_close(found[name], value + 1 - (2 / 11) * (3 / 12))
    now = {name: value.detach().clone() for name, value in trained_parameters(model).items()}
    with whole.shown():
        assert all(value.equal(found[name]) for name, value in trained_parameters(model).items())
    assert all(value.equal(now[name]) for name, value in trained_parameters(model).items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"offload": "all"}, r"stages\.2\.offload is all, which needs stages\.2\.zero: 3"),
        ({"compile": True, "zero": 3}, r"stages\.2\.compile needs stages\.2\.zero: 2"),
        ({"frozen": "bf16"}, r"stages\.2\.frozen is bf16, which needs stages\.2\.precision: bf16"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        toy.toy_config({2: {"steps": 1, **settings}})


def test_a_run_goes_on_with_checkpointed_activations_but_not_with_other_weights() -> None:
    def fingerprint(**settings: Any) -> str:
        return toy.toy_config({2: {"steps": 1, "precision": "bf16", **settings}}).fingerprint(2)

    assert fingerprint(gradient_checkpointing=True) == fingerprint()
    assert fingerprint(frozen="bf16") != fingerprint()
    assert fingerprint(offload="optimizer") != fingerprint()
    assert fingerprint(ema_decay=0.9) != fingerprint()
    assert fingerprint(compile=True) != fingerprint()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_flops_are_those_of_forward_and_backward_whatever_is_computed_again(
    config: ModelConfig, batch: dict[str, Tensor], stage: int
) -> None:
    def run(model: InsightEditModel) -> None:
        torch.stack([term.values.mean() for term in model(batch, stage).values()]).sum().backward()

    with FlopCounterMode(display=False) as counter:
        run(build(config, stage))
    model = build(config, stage)
    checkpoint_activations(model)
    with FlopCounterMode(display=False) as twice:
        run(model)
    meter = FlopMeter()
    for samples in (2, 1):
        # The second time nothing is counted.
        with meter.first(samples):
            run(model)
    # Once ZeRO-3 has run in this process, its own linear layer takes half a percent more without checkpointing.
    assert meter.per_sample == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    assert twice.get_total_flops() > 1.2 * counter.get_total_flops()


def test_flops_of_one_matrix_are_known() -> None:
    model, meter = nn.Linear(8, 4, bias=False), FlopMeter()
    with meter.first(3):
        model(torch.randn(3, 8)).sum().backward()
    # 2 * 8 * 4 forward, and as many for the gradient of the matrix; the input has none.
    assert meter.per_sample == 2 * 2 * 8 * 4


def test_figures_of_efficiency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency.time, "time", lambda: 1200.0)
    meter = FlopMeter()
    meter.per_sample = 3e9
    figures = Efficiency(started=1000.0, before=90.0, flops=meter, peak=4e12)
    assert figures.stalled(1.5) == 1.5
    assert figures.stalled(2.0) == 0.5
    assert figures.figures(samples_per_second=200.0, seconds=9.5, stalled=0.5, useful=60.0) == {
        "checkpoint_stall_seconds": 0.5,
        "checkpoint_stall_share": 0.05,
        "goodput": 0.75,
        "model_flops_utilisation": 0.15,
    }


def test_the_full_size_step_is_timed_and_wants_a_gpu(
    tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = load_preset(tiny_models.write_tiny_preset(tmp_path, steps=1))
    rows = {one.name: one for one in full_size_step.stage_rows(small, 2, CPU, steps=2, peak=1e12, bandwidth=1e10)}
    rate, flops = rows["stage_2_samples_per_second"], rows["stage_2_model_flops"].value
    assert rate.n == 2
    assert rows["stage_2_utilisation"].max == pytest.approx(flops * rate.max)
    assert 0 < rows["stage_2_utilisation"].max < rows["stage_2_utilisation_at_the_roofline"].value <= 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="There is no GPU on this machine; run this where there is one"):
        full_size_step.main([])
