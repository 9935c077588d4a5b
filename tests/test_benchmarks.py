"""Benchmarks on disk: their cases, with masks and captions, and an evaluation on one that has no targets."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dataset_folders import write
from empty_registry import make_workdir
from numpy.typing import NDArray
from PIL import Image
from stand_in_endpoint import Say, StandIn

from insightedit.jobs.evaluate import Progress, evaluate
from insightedit.platform.benchmarks import benchmark_cases
from insightedit.platform.cases import EditCase
from insightedit.platform.chat.config import EndpointConfig
from insightedit.platform.config import DatasetConfig, EvaluationConfig, MetricsConfig, load_preset
from insightedit.platform.datasets.advancededit import AdvancedEditReader
from insightedit.platform.datasets.masks import mask_of, mask_rle, read_mask
from insightedit.platform.datasets.pairs import PairsReader
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.evaluation import Pixels, evaluation_cases
from insightedit.platform.records import BadRowError, encode_png
from insightedit.platform.registry import Registry
from insightedit.platform.results import RESULTS_FILE, read_results

SAMPLES = Path(__file__).resolve().parents[1].parent / "shared/samples/advancededit"
SIZE = (40, 48)


def _picture(seed: int) -> NDArray[np.uint8]:
    """Soft, so that JPEG leaves it nearly as it is, and never close to black or white."""
    pixels = np.random.default_rng(seed).integers(60, 190, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC))


def _region() -> NDArray[np.bool_]:
    region = np.zeros(SIZE, bool)
    region[8:24, 16:40] = True
    return region


def _encoded(pixels: NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _cases(reader: str, root: Path, **settings: Any) -> list[EditCase]:
    options = {"root": str(root), **settings.pop("options", {})}
    return evaluation_cases(EvaluationConfig(benchmark=DatasetConfig(reader=reader, options=options), **settings))


# -- masks ------------------------------------------------------------------------------------------------------------


def test_masks_are_read_in_every_form_that_datasets_have() -> None:
    source, region = _picture(1), _region()
    transparent = np.dstack([source, np.where(region, 0, 255)]).astype(np.uint8)
    white = np.where(region, 255, 0).astype(np.uint8)
    forms = {
        "transparent": _encoded(transparent, "PNG"),
        "white": _encoded(white, "PNG"),
        "opaque": _encoded(np.dstack([white, white, white, np.full(SIZE, 255)]).astype(np.uint8), "PNG"),
        "hole": _encoded(np.where(region[..., None], np.uint8(255), source), "PNG"),
        "jpeg": _encoded(white, "JPEG"),
    }
    for name, data in forms.items():
        assert np.array_equal(read_mask(data, encode_png(source)), region), name
    with pytest.raises(BadRowError, match="Source and mask differ in size: 48x40 and 48x20"):
        read_mask(_encoded(white[:20], "PNG"), encode_png(source))
    with pytest.raises(BadRowError, match="cannot be read"):
        read_mask(b"no picture", encode_png(source))


def test_run_lengths_come_back_and_fit_smaller_pictures() -> None:
    region = _region()
    rle = json.loads(json.dumps(mask_rle(region)))
    assert np.array_equal(mask_of(rle, SIZE), region)
    assert np.array_equal(mask_of(rle, (20, 24)), region[::2, ::2])
    for wrong in (None, {"counts": "x"}, {"size": [4], "counts": "x"}):
        with pytest.raises(BadRowError, match="lack their size"):
            mask_of(wrong, SIZE)


# -- the benchmarks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def reason_edit(tmp_path: Path) -> Path:
    """Two of its folders, as the authors' archive has them."""
    root = tmp_path / "reason-edit"
    mask = _encoded(np.where(_region(), 255, 0).astype(np.uint8), "JPEG")
    for folder, text, count in (("1-Left-Right", "Left_Right.txt", 2), ("6-Reasoning", "Reason_test.txt", 3)):
        for number in range(count):
            write(root / folder / f"{number:03d}.png", encode_png(_picture(10 * count + number)))
            write(root / folder / f"{number:03d}_mask.jpg", mask)
        lines = "".join(f"change thing {number} of {folder} CLIP: a thing {number}\n" for number in range(count))
        write(root / folder / text, lines.encode())
    return root


def test_reason_edit(reason_edit: Path) -> None:
    cases = _cases("reason-edit", reason_edit)
    assert [case.key for case in cases] == [
        *(f"1-Left-Right/{number:03d}" for number in range(2)),
        *(f"6-Reasoning/{number:03d}" for number in range(3)),
    ]
    first = cases[0]
    assert (first.instruction, first.caption) == ("change thing 0 of 1-Left-Right", "a thing 0")
    assert (first.task, first.wording, first.target) == ("left-right", "", None)
    assert np.array_equal(first.source, _picture(20))
    assert first.region is not None
    assert np.array_equal(first.region, _region())
    assert [case.seed for case in cases] == [0, 1, 2, 3, 4]
    assert [case.key for case in _cases("reason-edit", reason_edit, scenes=2)] == [case.key for case in cases[:2]]
    other = _cases("reason-edit", reason_edit, seed=1)
    first = [torch.randn(3, generator=torch.Generator().manual_seed(case.seed)).tolist() for case in (*cases, *other)]
    assert len(set(map(tuple, first))) == len(first), "another seed is other noise"
    (reason_edit / "6-Reasoning/001.png").unlink()
    with pytest.raises(UsageError, match=r"Reason_test\.txt has 3 lines and there are 2 photos beside it"):
        _cases("reason-edit", reason_edit)
    with pytest.raises(NotFoundError, match="holds a text file"):
        _cases("reason-edit", reason_edit / "1-Left-Right")


def test_magicbrush_test(tmp_path: Path) -> None:
    hole = _encoded(np.dstack([_picture(0), np.where(_region(), 0, 255)]).astype(np.uint8), "PNG")
    turns: list[dict[str, str]] = []
    for turn in (1, 2):
        source = "7-input.png" if turn == 1 else "7-output1.png"
        turns.append(
            {"input": source, "mask": f"7-mask{turn}.png", "output": f"7-output{turn}.png", "instruction": f"do {turn}"}
        )
        write(tmp_path / f"test/images/7/7-mask{turn}.png", hole)
        write(tmp_path / f"test/images/7/7-output{turn}.png", encode_png(_picture(turn)))
    write(tmp_path / "test/images/7/7-input.png", encode_png(_picture(0)))
    write(tmp_path / "test/edit_turns.json", turns)
    write(tmp_path / "test/local_descriptions.json", {"7": {"7-output2.png": "a dog"}})
    first, second = _cases("magicbrush-test", tmp_path)
    assert (first.key, first.instruction, first.caption) == ("7-output1", "do 1", "")
    assert (second.key, second.caption) == ("7-output2", "a dog")
    assert first.target is not None
    assert np.array_equal(first.target, second.source), "a later turn edits what the turn before made"
    assert second.region is not None
    assert np.array_equal(second.region, _region())


def test_pairs_with_masks(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = []
    for number in range(4):
        write(tmp_path / f"{number}.png", encode_png(_picture(number // 2)))
        write(tmp_path / f"{number}-after.png", encode_png(_picture(50 + number)))
        write(tmp_path / f"{number}-mask.png", _encoded(np.where(_region(), 255, 0).astype(np.uint8), "PNG"))
        names = {"source": f"{number}.png", "target": f"{number}-after.png", "mask": f"{number}-mask.png"}
        rows.append(
            {**names, "instruction": f"edit {number}", "category": "add", "wording": ("simple", "advanced")[number % 2]}
        )
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = _cases("pairs", tmp_path)
    assert [(case.task, case.wording) for case in cases] == [("add", "simple"), ("add", "advanced")] * 2
    assert [case.seed for case in cases] == [0, 0, 1, 1], "one picture, one noise"
    assert cases[0].scene == cases[1].scene != cases[2].scene
    assert all(case.region is not None and np.array_equal(case.region, _region()) for case in cases)
    assert [case.key for case in _cases("pairs", tmp_path, scenes=1)] == [case.key for case in cases[:2]]
    plain = {"root": str(tmp_path)}
    fingerprints = {PairsReader().fingerprint(options) for options in (plain, {**plain, "masks": True})}
    assert len(fingerprints) == 1, "what was prepared for training stays valid"
    (tmp_path / "2-mask.png").unlink()
    with pytest.raises(
        InsightEditError, match=r"pairs cannot be evaluated on as a whole: of mine\.jsonl:3, There is no"
    ):
        _cases("pairs", tmp_path)


needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples of the authors' data are not here")


@needs_samples
def test_a_real_pair_of_advancededit(tmp_path: Path) -> None:
    pairs = json.loads((SAMPLES / "3_pairs_remove_add.json").read_text())
    ends = {"origin_img_path": "a/1543.jpg", "target_img_path": "b/1543_3.png"}
    pairs["2"].update(ends, reasoning_instruction1="take away what he plays")
    pairs["3"].update(zip(ends, reversed(ends.values()), strict=True))
    write(tmp_path / "1543.json", {"2": pairs["2"], "3": pairs["3"]})
    write(tmp_path / "a/1543.jpg", (SAMPLES / "1543.jpg").read_bytes())
    write(tmp_path / "b/1543_3.png", (SAMPLES / "1543_3_acoustic_guitar.png").read_bytes())
    simple, advanced, added = _cases("advancededit", tmp_path)
    assert (simple.wording, advanced.wording, added.wording) == ("simple", "advanced", "simple")
    assert (simple.task, added.task) == ("remove", "add")
    assert (simple.caption, added.caption) == ("", "acoustic guitar")
    assert (simple.scene, simple.seed) == (advanced.scene, advanced.seed)
    assert added.scene != simple.scene
    # The mask is of the photo, which is larger than what is edited; inside of it the two pictures differ.
    assert simple.region is not None
    assert simple.target is not None
    assert simple.region.shape == simple.source.shape[:2] == (640, 960)
    changed = np.abs(simple.source.astype(int) - simple.target).mean(axis=-1)
    assert changed[simple.region].mean() > 10 * changed[~simple.region].mean()
    plain = {"root": str(tmp_path)}
    assert AdvancedEditReader().fingerprint(plain) == AdvancedEditReader().fingerprint({**plain, "masks": True})


def test_what_is_no_benchmark_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"evaluation\.benchmark is 'coco'; benchmarks are advancededit, "):
        _cases("coco", tmp_path)
    with pytest.raises(UsageError, match="shapes, which takes no options"):
        _cases("shapes", tmp_path)
    with pytest.raises(NotFoundError, match="There is no folder"):
        benchmark_cases(EvaluationConfig(benchmark=DatasetConfig(reader="pairs", options={"root": "/nowhere"})))
    named = load_preset("nano", ["evaluation.benchmark=reason-edit"]).evaluation.benchmark
    assert named == DatasetConfig(reader="reason-edit")


class Painter:
    """Paints the region of every case grey, and changes nothing else."""

    def edit(self, folder: Path, cases: Sequence[EditCase], progress: Progress | None = None) -> list[Pixels]:
        edits = [case.source.copy() for case in cases]
        for edit in edits:
            edit[_region()] = 128
        return list(edits)


def test_an_evaluation_on_photos_without_targets(reason_edit: Path, tmp_path: Path) -> None:
    scores = {name: {"score": 4, "explanation": "So."} for name in ("instruction_adherence", "non_overediting")}
    scores |= {name: {"score": 5, "explanation": "Fine."} for name in ("naturalness", "no_artifacts")}
    workdir = make_workdir(tmp_path / "work")
    with StandIn(lambda asked: Say(json.dumps(scores))) as endpoint:
        evaluation = EvaluationConfig(
            benchmark=DatasetConfig(reader="reason-edit", options={"root": str(reason_edit)}),
            judge=EndpointConfig(endpoint=endpoint.url, model="eyes"),
            metrics=MetricsConfig(outside="blackened"),
        )
        config = load_preset("nano").model_copy(update={"evaluation": evaluation})
        result = evaluate(tmp_path / "pipeline", config, workdir, editor=Painter())
    content = result.evaluation.to_json()
    assert (content["scenes"], content["viescore"]) == (5, 0.8)
    assert (content["simple"], content["advanced"], content["by_form"], content["held_out"]) == (None, None, {}, {})
    assert {name: one["edits"] for name, one in content["by_task"].items()} == {"left-right": 2, "reasoning": 3}
    assert content["measured"]["psnr"] == {"mean": 100.0, "edits": 5}
    assert content["unmeasured"]["l1"] == "No edit has a target picture."
    client = Registry(workdir).client
    rows = read_results(Path(client.download_artifacts(result.run_id, RESULTS_FILE)))
    assert [(row.task, row.wording, row.viescore) for row in rows][:1] == [("left-right", "", 0.8)]
    table = pq.read_table(client.download_artifacts(result.run_id, "cases.parquet")).to_pylist()
    assert {row["target"] for row in table} == {None}
    page = result.report.read_text(encoding="utf-8")
    assert "change thing 0 of 1-Left-Right" in page
    assert "by wording" not in page
    assert ">target<" not in page
