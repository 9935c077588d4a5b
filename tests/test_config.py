"""Presets: what they hold, how they are laid over each other, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from insightedit.model.precision import multiplies_bf16
from insightedit.model.stages import STAGES
from insightedit.platform.chat.config import EndpointConfig, JudgeConfig, LocalModelConfig
from insightedit.platform.config import (
    dump_config,
    flattened,
    load_preset,
    preset_names,
)
from insightedit.platform.datasets import READERS
from insightedit.platform.errors import NotFoundError, UsageError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_whole(name: str) -> None:
    config = load_preset(name)
    assert config.name == name
    assert set(config.stages) == set(STAGES)
    for number, stage in config.stages.items():
        assert tuple(stage.losses) == STAGES[number].losses


def test_a_file_extends_a_preset_and_says_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: nano\nname: mine\nstages:\n  2: {steps: 7}\ndata:\n  datasets:\n    edits: {options: {count: 5}}\n"
    )
    mine, nano = load_preset(path), load_preset("nano")
    assert mine.stages[2].steps == 7
    assert mine.stages[2].model_copy(update={"steps": nano.stages[2].steps}) == nano.stages[2]
    assert mine.data.datasets["edits"].options == nano.data.datasets["edits"].options | {"count": 5}
    assert mine.stages[1] == nano.stages[1]


def test_null_takes_away_what_is_extended(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: nano\nname: mine\nstages: {1: {datasets: {captions: null}}}\n")
    assert load_preset(path).stages[1].datasets == {"questions": 3, "edits": 16}


def test_the_config_of_the_data_page_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    config = load_preset(path)
    assert set(config.stages[1].datasets) == {"cc12m"}
    assert len(config.stages[2].datasets) == 8
    assert config.stages[2].datasets == config.stages[3].datasets
    assert all(dataset.reader in READERS for dataset in config.data.datasets.values())


def test_files_extend_files_beside_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: nano\nname: base\nseed: 4\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nname: top\n")
    assert load_preset(tmp_path / "top.yaml").seed == 4


def test_overrides_change_single_values() -> None:
    config = load_preset("nano", ["stages.2.learning_rate=3e-4", "workers.threads=2", "model.lora.rank=2"])
    assert (config.stages[2].learning_rate, config.workers.threads, config.model.lora.rank) == (3e-4, 2, 2)
    assert config.stages[1] == load_preset("nano").stages[1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.2.learning_rat=1", ("stages.2.learning_rat", "learning_rate")),
        ("model.qformer.num_layer=1", ("model.qformer.num_layer", "num_layers")),
        ("workers.cont=1", ("workers.cont", "count")),
        ("workres.count=1", ("workres", "workers")),
        ("data.datasets.edits.opts=1", ("data.datasets.edits.opts", "options")),
        ("stages.3.learning_rates={lora: 1e-3}", ("stages.3.learning_rates", "'lora'", "image_branch")),
        ("stages.3.warmups={lora: 0.5}", ("stages.3.warmups", "'lora'", "image_branch")),
        ("stages.2.learning_rates={bridge: 1e-3}", ("stages.2.learning_rates", "'bridge'", "'bim'")),
        ("model.diffusion.condition_drop=0.5", ("model.diffusion", "condition_drop", "third")),
        ("stages.4.steps=1", ("stages.4", "less than or equal to 3")),
        ("stages.2.steps=0", ("stages.2.steps", "0", "greater")),
        ("model.resolution=wide", ("model.resolution", "'wide'", "integer")),
        ("stages.1.losses={L_LLM: 1}", ("stages.1.losses", "L_IB")),
        ("stages.1.losses.L_diff1=1", ("stages.1.losses", "L_TB")),
        ("stages.3.datasets={other: 1}", ("stages.3.datasets", "'other'")),
        ("stages.1.global_batch=31", ("stages.1.global_batch", "31", "workers.count 2", "; 1, 31 do.")),
        (
            "workers.count=[2, 5]",
            ("stages.1.global_batch is 16", "[2, 5]", "with 3 or 5 workers", "; 1, 2, 4, 8, 16 do."),
        ),
        ("workers.count=[4, 2]", ("workers.count is [4, 2]", "range [least, most]")),
        ("workers.count=[1, 2, 4]", ("workers.count is [1, 2, 4]", "a number from 1 on")),
        ("workers.count=0", ("workers.count is 0", "a number from 1 on")),
        ("workers.count=true", ("workers.count is True", "a number from 1 on")),
        ("stages.2.zero=1", ("stages.2.zero", "2 or 3")),
        ("stages.2={zero: 3, validate_every: 5}", ("stages.2",)),
        ("checkpoints={keep_best: 1}", ("checkpoints", "keep_best", "best_by")),
        ("checkpoints={keep_best: 1, best_by: L_IA}", ("checkpoints", "'L_IA'", "L_IAA")),
        ("checkpoints.upload=later", ("checkpoints.upload", "'background' or 'wait'")),
        ("evaluation.judge=gpt", ("evaluation.judge is 'gpt'", "shapes", "endpoint", "local")),
        ("evaluation.judge={endpoint: x, model: m}", ("evaluation.judge.endpoint is 'x'", "http://127.0.0.1:8000/v1")),
        ("evaluation.judge={endpoint: 'http://u:p@h/v1', model: m}", ("evaluation.judge.endpoint", "no user")),
        ("evaluation.judge={endpoint: 'http://h/v1'}", ("evaluation.judge.model", "missing")),
        ("evaluation.judge={local: a, batc: 2}", ("no field evaluation.judge.batc", "batch")),
        ("evaluation.judge={local: a, retries: 2}", ("no field evaluation.judge.retries; remove it",)),
        ("name", ("--set name", "section.key=value")),
        ("name=[", ("--set name=[", "YAML")),
    ],
)
def test_wrong_fields_are_named_in_one_sentence(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        load_preset("nano", [override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n- b\n", ("must hold fields",)),
        ("a: [", ("is not YAML",)),
        ("extends: nanoo\n", ("no preset 'nanoo'", "nano")),
        ("extends: wrong.yaml\n", ("extends itself",)),
        ("name: x\n", ("model", "missing")),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises((UsageError, NotFoundError)) as caught:
        load_preset(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("source", ["nothing", "nothing.yaml"])
def test_missing_presets_are_named(source: str) -> None:
    with pytest.raises(NotFoundError, match="nothing"):
        load_preset(source)


def test_sources_are_folders_or_hub_ids(tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    overrides = [
        f"model.sources={{diffusion: {folder}, image_encoder: owner/clip, mllm: {folder}}}",
    ]
    sources = load_preset("nano", overrides).model_sources().sources
    assert (sources.diffusion, sources.image_encoder) == (str(folder), "owner/clip")
    with pytest.raises(NotFoundError, match=r"model\.sources\.mllm is \./gone"):
        load_preset("nano", [*overrides, "model.sources.mllm=./gone"]).model_sources()


def test_the_number_of_workers_may_be_a_range() -> None:
    overrides = [f"stages.{number}.global_batch=24" for number in STAGES]
    assert load_preset("nano", [*overrides, "workers.count=[1, 4]"]).workers.sizes == range(1, 5)
    assert load_preset("nano", [*overrides, "workers.count=3"]).workers.sizes == range(3, 4)


@pytest.mark.parametrize(
    "judge",
    [
        "shapes",
        EndpointConfig(endpoint="http://127.0.0.1:8000/v1/", model="gpt", api_key_env="KEY", options={"seed": 1}),
        LocalModelConfig(local="a/folder", batch=4),
    ],
)
def test_a_judge_is_read_back_as_it_was_written(judge: JudgeConfig, tmp_path: Path) -> None:
    nano = load_preset("nano")
    config = nano.model_copy(update={"evaluation": nano.evaluation.model_copy(update={"judge": judge})})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_preset(tmp_path / "config.yaml").evaluation.judge == judge


def test_a_config_is_frozen() -> None:
    config = load_preset("nano")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_fingerprints_cover_what_weights_depend_on() -> None:
    nano = load_preset("nano")
    same = [
        "stages.2.log_every=3",
        "stages.1.checkpoint_every=7",
        "workers.count=1",
        "stages.2.steps=9",
        "promotion.margin=0.1",
        "data.read_tasks=9",
        "data.store=/elsewhere",
    ]
    assert load_preset("nano", same).fingerprint(1) == nano.fingerprint(1)
    for override in ("stages.1.steps=9", "seed=1", "model.lora.rank=2", "data.shuffle_shards=9"):
        assert load_preset("nano", [override]).fingerprint(1) != nano.fingerprint(1), override
    assert load_preset("nano", ["stages.2.steps=9"]).fingerprint(2) != nano.fingerprint(2)


def test_flattened_names_are_dotted() -> None:
    assert dict(flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": {}})) == {"a.b": 1, "a.c.d": [2], "e": {}}


def test_the_papers_preset_is_the_papers() -> None:
    config = load_preset("sd15-llava7b")
    model, stages = config.model, config.stages
    assert (model.num_mm_tokens, model.resolution) == (32, 256)
    assert (model.lora.rank, model.lora.alpha, model.lora.dropout) == (8, 16, 0.05)
    assert (model.qformer.num_layers, model.qformer.num_heads, model.qformer.intermediate_size) == (6, 12, 3072)
    assert (model.bim.num_layers, model.bim.num_heads, model.bim.mlp_size, model.bim.text_weight) == (2, 8, 2048, 0.5)
    assert (model.diffusion.condition_drop, model.diffusion.high_noise) == (0.05, 1.0)
    sampling = model.sampling
    assert (sampling.num_inference_steps, sampling.guidance_scale, sampling.image_guidance_scale) == (100, 7.5, 1.5)
    rates = {number: (stage.learning_rate, stage.global_batch, stage.steps) for number, stage in stages.items()}
    assert rates == {1: (2e-4, 128, 150_000), 2: (1e-5, 128, 20_000), 3: (1e-4, 64, 20_000)}
    assert set(stages[1].datasets) == {"cc12m"}
    assert stages[2].datasets == stages[3].datasets
    assert {config.data.datasets[name].reader for name in stages[2].datasets} == {
        "instructpix2pix", "magicbrush", "coco", "refcoco", "grefcoco", "cocostuff", "reasonseg", "advancededit",
    }  # fmt: skip


def test_every_preset_names_readers_that_there_are() -> None:
    for name in preset_names():
        datasets = load_preset(name).data.datasets
        assert all(dataset.reader in READERS for dataset in datasets.values()), name


def test_the_config_of_the_weights_page_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert load_preset(path).model.sources.image_encoder == "openai/clip-vit-large-patch14"


def test_auto_precision_follows_the_devices_and_nothing_else_does() -> None:
    nano = load_preset("nano").stages[1]
    assert nano.precision == "auto"
    assert (nano.settled(bf16=True).precision, nano.settled(bf16=False).precision) == ("bf16", "fp32")
    for precision in ("bf16", "fp32"):
        fixed = load_preset("nano", [f"stages.1.precision={precision}"]).stages[1]
        assert fixed.settled(bf16=True) == fixed == fixed.settled(bf16=False)


@pytest.mark.parametrize(
    ("abilities", "fast"),
    [
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_a_cpu_without_bf16_instructions_is_known(
    monkeypatch: pytest.MonkeyPatch, abilities: dict[str, bool], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert multiplies_bf16(torch.device("cpu")) is fast
