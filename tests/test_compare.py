"""Comparisons: the methods' configs, figures whose answer is known, what is kept and gone on with, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from empty_registry import make_workdir
from PIL import Image
from tiny_models import build_sources, tiny_config, write_tiny_preset

from insightedit import cli
from insightedit.jobs import compare as job
from insightedit.jobs.compare import CompareWatchers, compare, plan
from insightedit.jobs.evaluate import Progress
from insightedit.jobs.train import TrainedStage, TrainingResult
from insightedit.model.insightedit import build_pipeline
from insightedit.platform.cases import EditCase
from insightedit.platform.config import EvaluationConfig, RunConfig, load_preset
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.evaluation import Pixels, unit_range
from insightedit.platform.intervals import estimate, estimate_over_seeds
from insightedit.platform.method_comparison import Rows, Trained, answers, difference, method_figures
from insightedit.platform.methods import ComparisonConfig, load_comparison, method_config, samples_of
from insightedit.platform.results import CaseResult
from insightedit.platform.trainer import StageResult
from insightedit.platform.workdir import Workdir

SCENES = 12


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_preset("nano").model_copy(update={"evaluation": EvaluationConfig(scenes=SCENES)})


@pytest.fixture(scope="module")
def methods() -> ComparisonConfig:
    return load_comparison("shapes")


# -- methods ----------------------------------------------------------------------------------------------------------


def test_every_method_is_given_the_same_samples(config: RunConfig, methods: ComparisonConfig) -> None:
    trained = {name: method_config(config, name, one, 1) for name, one in methods.methods.items() if one.is_trained}
    assert {samples_of(one) for one in trained.values()} == {samples_of(config)} == {60800}
    stages = {name: sorted(one.stages) for name, one in trained.items()}
    assert stages == {
        "instructpix2pix": [2],
        "smartedit": [1, 2],
        "no-stage-1": [2, 3],
        "no-bim": [1, 2, 3],
        "simple-only": [1, 2, 3],
        "insightedit": [1, 2, 3],
    }
    assert (trained["instructpix2pix"].model.conditioning, trained["insightedit"].model.conditioning) == (
        "text",
        "mllm",
    )
    assert [name for name, one in trained.items() if not one.model.bim.enabled] == ["no-bim"]
    smartedit = trained["smartedit"].stages
    assert (smartedit[1].losses["L_IB"], smartedit[2].losses["L_IAA"]) == (0, 0)
    # The whole method is the preset, but for the seed.
    whole = trained["insightedit"]
    assert whole.stages == config.stages
    assert whole.model == config.model
    assert {one.seed for one in trained.values()} == {1}
    assert {one.shard_seed for one in trained.values()} == {0}, "every seed has the same shards"


def test_other_data_lie_beside_those_of_the_preset(config: RunConfig, methods: ComparisonConfig) -> None:
    simple = method_config(config, "simple-only", methods.methods["simple-only"], 0)
    assert list(simple.data.datasets) == ["captions", "questions", "edits.simple-only"]
    assert simple.data.datasets["edits.simple-only"].options["wording"] == "simple"
    assert [list(stage.datasets) for stage in simple.stages.values()] == [
        ["captions", "questions", "edits.simple-only"],
        ["edits.simple-only"],
        ["edits.simple-only"],
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methods: {a: {title: A, copies: true, changes: {seed: 1}}}", "give one of copies, folder and changes"),
        ("methods: {a: {title: A, change: {}}}", "methods.a.change"),
        (
            "methods: {a: {title: A}}\nquestions: [{ask: Why, method: a, against: [b], measures: [psnr]}]",
            "names 'b', which is no method",
        ),
        (
            "methods: {a: {title: A}}\nquestions: [{ask: Why, method: a, against: [a], measures: [luck]}]",
            "measures names 'luck'",
        ),
        ("methods: [", "is not YAML"),
    ],
)
def test_a_wrong_comparison_is_told(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_comparison(str(path))


def test_changes_that_do_not_fit_are_told(config: RunConfig, methods: ComparisonConfig, tmp_path: Path) -> None:
    def changed(**changes: Any) -> RunConfig:
        one = methods.methods["no-bim"].model_copy(update={"changes": changes})
        return method_config(config, "mine", one, 0)

    with pytest.raises(UsageError, match=r"methods\.mine\.changes: there is no field model\.bom; did you mean bim"):
        changed(model={"bom": 1})
    with pytest.raises(UsageError, match="takes stage 2 away"):
        changed(stages={2: None})
    with pytest.raises(UsageError, match="leaves stage 2 no samples"):
        changed(stages={1: {"steps": 9000}})
    with pytest.raises(NotFoundError, match="There is no comparison 'none'"):
        load_comparison("none")
    with pytest.raises(UsageError, match="There is no method 'magic'"):
        methods.narrowed(["magic"], {})
    with pytest.raises(NotFoundError, match=r"--add mine=.*model_index\.json"):
        methods.narrowed([], {"mine": tmp_path})


# -- figures ----------------------------------------------------------------------------------------------------------


def rows(gains: Sequence[float], scenes: int = 40, lift: float = 0.0) -> Rows:
    """Results with a noise that all methods share, and a gain for each seed, on advanced instructions `lift` more."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.2, scenes)
    return {
        seed: [
            CaseResult(
                case=f"{scene}-{wording}",
                scene=str(scene),
                seed=scene,
                task="remove",
                wording=wording,
                instruction="",
                viescore=float(noise[scene] + gain + lift * (wording == "advanced")),
                instruction_adherence=3,
                metrics={"psnr": 30 + gain, "lpips": 0.5 - gain},
            )
            for scene in range(scenes)
            for wording in ("simple", "advanced")
        ]
        for seed, gain in enumerate(gains)
    }


def test_paired_differences_find_what_single_intervals_cannot() -> None:
    """Scenes differ far more than the methods do; on the same scenes the difference is plain."""
    found = {"a": rows([0.05, 0.06, 0.055]), "b": rows([0.0, 0.0, 0.0]), "c": rows([0.0])}
    better = difference(found, "a", "b", "viescore", "all")
    assert better is not None
    assert better.verdict == "better"
    assert better.estimate.mean == pytest.approx(0.055)
    assert better.estimate.seeds == 3
    low, high = better.estimate.interval or (0, 0)
    assert 0.0499 < low < 0.055 < high < 0.0601
    worse = difference(found, "b", "a", "viescore", "advanced")
    assert worse is not None
    assert worse.verdict == "worse"
    # Less of LPIPS is better.
    assert [difference(found, "a", "b", name, "all").verdict for name in ("psnr", "lpips")] == ["better", "better"]  # pyright: ignore[reportOptionalMemberAccess]
    # A method that is not trained is paired with every seed.
    assert difference(found, "a", "c", "viescore", "all").estimate.cases == 240  # pyright: ignore[reportOptionalMemberAccess]
    same = difference(found, "a", "b", "instruction_adherence", "all")
    assert same is not None
    assert same.verdict == "not shown"
    assert difference(found, "a", "b", "ssim", "all") is None
    with pytest.raises(InsightEditError, match="judged on other cases"):
        difference({"a": found["a"], "b": rows([0.0], scenes=3)}, "a", "b", "viescore", "all")


def test_edits_that_were_not_made_count_as_0() -> None:
    """A method that makes none of the hard edits is not the better one for that."""
    whole = rows([0.0])
    hard = {row.case for row in whole[0] if (row.viescore or 0) < 0}
    gives_up = [
        replace(row, viescore=None, instruction_adherence=None, metrics={}, failure="edit failed: too long")
        if row.case in hard
        else replace(row, viescore=(row.viescore or 0) + 0.01)
        for row in rows([1.0])[0]
    ]
    found = {"a": {0: gives_up}, "b": rows([1.0])}
    told = difference(found, "a", "b", "viescore", "all")
    assert told is not None
    assert (told.verdict, told.estimate.cases) == ("worse", 80)
    figures = method_figures(Trained(title="a", seeds=(0,)), found["a"])
    assert figures.figures["instruction_adherence"]["all"].mean == pytest.approx(3 * (1 - len(hard) / 80))
    assert figures.figures["psnr"]["all"].cases == 80 - len(hard)
    assert "naturalness" not in figures.figures
    assert figures.failed == len(hard)


def test_a_training_is_not_taken_for_several(methods: ComparisonConfig) -> None:
    """While others are pending, those with the same seeds are compared."""
    everything = {"insightedit": rows([0.2, 0.21]), "smartedit": rows([0.0]), "copy": rows([0.0])}
    (first, *_) = answers(methods, everything)
    seeds = {one.against: one.estimate.seeds for one in first.differences}
    assert seeds == {"copy": 2, "smartedit": 1}


def test_seeds_that_disagree_show_nothing() -> None:
    found = {"a": rows([0.2, -0.15, 0.02]), "b": rows([0.0, 0.0, 0.0])}
    mixed = difference(found, "a", "b", "viescore", "all")
    assert mixed is not None
    assert mixed.verdict == "not shown"
    # Of the first seed alone one would have said so.
    alone = difference({name: {0: one[0]} for name, one in found.items()}, "a", "b", "viescore", "all")
    assert alone is not None
    assert alone.verdict == "better"


def test_intervals_over_seeds_hold_the_truth_more_often() -> None:
    """Means of three seeds and many scenes, each with an effect of its own, in 200 worlds."""
    rng = np.random.default_rng(1)
    scenes, seeds = np.tile(np.arange(60), 3).astype(str).tolist(), np.repeat(np.arange(3), 60).tolist()
    held = {"seeds": 0, "scenes": 0}
    for _ in range(200):
        values = rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.3, (1, 60)) + rng.normal(0, 0.1, (3, 60))
        for name, found in (
            ("seeds", estimate_over_seeds(values.ravel().tolist(), scenes, seeds)),
            ("scenes", estimate(values.ravel().tolist(), scenes)),
        ):
            low, high = found.interval or (0, 0)
            held[name] += low <= 0 <= high
    assert held["seeds"] >= 178
    assert held["scenes"] < 160, "an interval over scenes alone takes the seeds that it saw for all that there are"


def test_questions_are_answered_in_words(methods: ComparisonConfig) -> None:
    one, other = rows([0.05, 0.06, 0.055], lift=0.1), rows([0.0, 0.0, 0.0])
    everything = {"insightedit": one, "smartedit": other, "instructpix2pix": other, "copy": {0: other[0]}}
    said = {answer.question.ask: answer for answer in answers(methods, everything)}
    assert len(said) == 2, "what lacks its methods is not asked"
    first, second = said.values()
    assert [(one.against, one.measure, one.verdict) for one in first.differences] == [
        (name, measure, verdict)
        for name in ("copy", "instructpix2pix", "smartedit")
        for measure, verdict in (("instruction_adherence", "not shown"), ("viescore", "better"))
    ]
    assert first.said == "Partly: 3 of 6 better, 0 worse, 3 not shown."
    assert second.said == "Yes, by every measure."


# -- the job ----------------------------------------------------------------------------------------------------------


class Halfway:
    """An editor that goes a share of the way to the target, by the folder's name."""

    shares: dict[str, float] = {"simple-only": 0.5, "insightedit": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        self.asked: list[str] = []

    def edit(self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None) -> list[Pixels]:
        self.asked.append(folder.name)
        pairs = [(unit_range(one.source), unit_range(one.target)) for one in cases if one.target is not None]
        return [(source + self.shares[folder.name] * (target - source)).astype(np.float32) for source, target in pairs]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training that takes no time; what it leaves is named after its method. Runs are listed as they are trained."""
    runs: list[str] = []

    def train(config: RunConfig, workdir: Workdir, *, name: str, watchers: Any) -> TrainingResult:
        runs.append(name)
        folder = workdir.runs / name / config.name.removeprefix("nano-")
        result = StageResult(stage=2, steps=1, fingerprint="", weights="", first={}, last={}, figures={"seconds": 60.0})
        stage = TrainedStage(number=2, run_id="", folder=folder, result=result)
        return TrainingResult(name=name, run_id="", stages={2: stage}, datasets={}, folder=folder, seconds={})

    monkeypatch.setattr(job, "train", train)
    monkeypatch.setattr(job, "connected", job.nullcontext)
    return runs


def test_a_comparison_is_kept_and_gone_on_with(
    config: RunConfig, methods: ComparisonConfig, trained: list[str], tmp_path: Path
) -> None:
    workdir, editor = make_workdir(tmp_path / "work"), Halfway()
    some = methods.narrowed(["copy", "simple-only", "insightedit"], {})
    cells: list[tuple[str, int, int]] = []
    watchers = CompareWatchers(cell=lambda *told: cells.append(told))
    result = compare(config, some, workdir, seeds=(0, 1), watchers=watchers, editor=editor)
    order = ["copy", "simple-only, seed 0", "insightedit, seed 0", "simple-only, seed 1", "insightedit, seed 1"]
    assert cells == [(name, number, 5) for number, name in enumerate(order)]
    assert trained == [f"compare-nano-{name}-{seed}" for seed in (0, 1) for name in ("simple-only", "insightedit")]
    assert result.folder == workdir.root / "comparisons" / "nano"
    content = json.loads((result.folder / "comparison.json").read_text())
    figures = {name: one["figures"]["viescore"] for name, one in content["methods"].items()}
    assert figures["copy"]["all"]["mean"] == 0.5
    assert figures["copy"]["all"]["interval"] == [0.5, 0.5]
    assert figures["insightedit"]["advanced"] == {
        "mean": 1.0,
        "interval": [1.0, 1.0],
        "cases": 2 * SCENES,
        "scenes": SCENES,
        "seeds": 2,
    }
    assert 0.5 < figures["simple-only"]["simple"]["mean"] < 1
    assert content["methods"]["insightedit"]["trained"] == {
        "title": "InsightEdit",
        "seeds": [0, 1],
        "samples": 60800,
        "seconds": 60.0,
    }
    assert (content["one_seed"], content["pending"]) == (False, [])
    assert content["methods"]["copy"]["figures"]["psnr"]["all"]["mean"] == 100
    assert "lpips" not in content["methods"]["copy"]["figures"]
    assert content["missing"]["lpips"].startswith("No weights")
    help_ = next(one for one in content["answers"] if "help with advanced" in one["ask"])
    assert help_["said"] == "Yes, by every measure."
    text = (result.folder / "comparison.md").read_text()
    assert "| source unchanged | 1 | 0.500 (0.500 to 0.500) |" in text
    assert "VIEScore on advanced instructions against InsightEdit on simple instructions only: +0" in text
    page = result.report.read_text()
    assert page.count("data:image/png") >= 5 * 5
    assert "There is one seed" not in page
    with Image.open(result.sheet) as sheet:
        assert sheet.width == 5 * 138 + 10
        # The last column is the target, which the whole method reaches in the column before.
        pixels = np.asarray(sheet)
        assert np.array_equal(pixels[84:212, 4 * 138 + 10 : -10], pixels[84:212, 3 * 138 + 10 : 4 * 138])
        assert not np.array_equal(pixels[84:212, 10:138], pixels[84:212, 3 * 138 + 10 : 4 * 138])
    with Image.open(result.folder / "showcase.png") as showcase:
        assert showcase.width % (2 * 128 + 30) == 10

    # Again, with one seed more: only that is trained and edited.
    again = compare(config, some, workdir, seeds=(0, 1, 2), editor=editor)
    assert trained[4:] == ["compare-nano-simple-only-2", "compare-nano-insightedit-2"]
    assert len(editor.asked) == 6
    assert again.comparison.methods["insightedit"].trained.seeds == (0, 1, 2)
    other = config.model_copy(update={"evaluation": EvaluationConfig(scenes=SCENES, seed=5)})
    with pytest.raises(UsageError, match=r"copy was compared with other settings; .* another --name"):
        compare(other, some, workdir, editor=editor)


def test_a_comparison_that_breaks_off_keeps_what_it_has(
    config: RunConfig, methods: ComparisonConfig, trained: list[str], tmp_path: Path
) -> None:
    workdir = make_workdir(tmp_path / "work")
    some = methods.narrowed(["copy", "simple-only", "insightedit"], {})

    class Breaking(Halfway):
        def edit(self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None) -> list[Pixels]:
            if folder.name == "insightedit":
                raise KeyboardInterrupt
            return super().edit(folder, cases, progress)

    with pytest.raises(KeyboardInterrupt):
        compare(config, some, workdir, seeds=(0,), editor=Breaking())
    content = json.loads((workdir.root / "comparisons" / "nano" / "comparison.json").read_text())
    assert list(content["methods"]) == ["copy", "simple-only"]
    assert content["pending"] == ["insightedit, seed 0"]
    done = {one.method: one.done for one in plan(config, some, workdir, seeds=(0,))}
    assert done == {"copy": True, "simple-only": True, "insightedit": False}
    result = compare(config, some, workdir, seeds=(0,), editor=(editor := Halfway()))
    assert editor.asked == ["insightedit"]
    assert result.comparison.one_seed
    assert "There is one seed" in result.report.read_text()


def test_how_long_it_would_take(config: RunConfig, methods: ComparisonConfig, tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path / "work")
    assert {one.seconds for one in plan(config, methods, workdir, seeds=(0,)) if one.samples} == {None}
    stage = {"steps": 1, "fingerprint": "", "weights": "", "first": {}, "last": {}}
    for run, pace in (("earlier-0", 10.0), ("compare-nano-no-bim-0", 20.0)):
        for number in (1, 2, 3):
            folder = workdir.runs / run / f"stage-{number}"
            folder.mkdir(parents=True)
            figures = {"samples_per_second": pace, "seconds": 1.0}
            (folder / "stage.json").write_text(json.dumps({**stage, "stage": number, "figures": figures}))
    planned = {one.method: one for one in plan(config, methods, workdir, seeds=(0,))}
    assert planned["no-bim"].seconds == pytest.approx(60800 / 20)
    assert planned["copy"].seconds == 0
    assert planned["instructpix2pix"].steps == {2: 1900}


def test_other_weights_of_the_same_size_are_another_folder(tmp_path: Path) -> None:
    weights = tmp_path / "unet" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"before")
    before = job._folder_fingerprint(tmp_path)  # pyright: ignore[reportPrivateUsage]
    weights.write_bytes(b"after!")
    assert job._folder_fingerprint(tmp_path) != before  # pyright: ignore[reportPrivateUsage]


def test_a_folder_of_weights_is_one_more_method(config: RunConfig, methods: ComparisonConfig, tmp_path: Path) -> None:
    """A real pipeline in processes of its own, beside the copy, from the command line."""
    folder = tmp_path / "pipeline"
    tiny = replace(tiny_config(build_sources(tmp_path / "sources")), conditioning="text")
    build_pipeline(tiny).save_pretrained(folder)
    arguments = ["compare", "--method", "copy", "--add", f"theirs={folder}", "--set", "evaluation.scenes=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert cli.run([*arguments, "--dry-run"]) == 0
        assert cli.run([*arguments, "--seeds", "1"]) == 0
    content = json.loads((tmp_path / "work" / "comparisons" / "nano" / "comparison.json").read_text())
    theirs = content["methods"]["theirs"]
    assert theirs["trained"] == {"title": "theirs", "seeds": [0], "samples": None, "seconds": None}
    assert theirs["figures"]["viescore"]["all"]["cases"] == 8
    assert theirs["figures"]["viescore"]["all"]["mean"] < 0.6
    assert theirs["figures"]["psnr"]["all"]["mean"] < 60


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_methods_are_trained_from_the_command_line(tmp_path: Path) -> None:
    """Without stage 1, and with a text encoder alone: three steps of each, judged, and gone on with."""
    preset = write_tiny_preset(tmp_path, steps=3)
    arguments = ["compare", "--preset", str(preset), "--seeds", "1", "--set", "stages.2.learning_rates=null"]
    arguments += ["--set", "stages.2.warmups=null"]
    for name in ("copy", "instructpix2pix", "no-stage-1", "simple-only"):
        arguments += ["--method", name]
    assert cli.run(arguments) == 0
    content = json.loads((tmp_path / "work" / "comparisons" / "tiny" / "comparison.json").read_text())
    assert list(content["methods"]) == ["copy", "instructpix2pix", "no-stage-1", "simple-only"]
    assert {one["trained"]["samples"] for one in content["methods"].values()} == {None, 72}
    assert content["pending"] == []
    shards = {path.name for path in (tmp_path / "work" / "data").iterdir()}
    assert shards == {"captions", "questions", "edits", "edits.simple-only"}
    runs = {path.name for path in (tmp_path / "work" / "runs").iterdir()}
    assert cli.run(arguments) == 0
    assert {path.name for path in (tmp_path / "work" / "runs").iterdir()} == runs
