"""The quickstart from end to end at the smallest size, and what it is made of: display and report."""

from __future__ import annotations

import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny_models import write_tiny_preset

from insightedit.display import Display
from insightedit.platform.config import EvaluationConfig, RunConfig, load_preset
from insightedit.platform.errors import UsageError
from insightedit.platform.evaluation import evaluation_cases, judge, shuffled, summarise, unit_range
from insightedit.platform.registry import Registry
from insightedit.platform.reports import Curve, Report, SheetRow, sheet_rows, write_report, write_sheet
from insightedit.platform.workdir import Workdir
from insightedit.quickstart import quickstart
from insightedit.serve import deployment


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The nano preset with a tiny untrained foundation and a few steps of each stage."""
    path = write_tiny_preset(tmp_path_factory.mktemp("tiny"), steps=4, promotion={"min_viescore": 0.0})
    return load_preset(path)


@pytest.fixture
def workdir(tmp_path: Path) -> Iterator[Workdir]:
    workdir = Workdir.open(tmp_path / "work")
    yield workdir
    deployment.down(workdir)


@pytest.mark.slow
def test_the_whole_path_twice(
    tiny: RunConfig, workdir: Workdir, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What has learnt nothing scores 0 and would not even be served: here every edit is worth a little.
    monkeypatch.setattr("insightedit.platform.judges.shapes.OVEREDIT_LIMIT", 1.0)
    first = quickstart(workdir, tiny, once=True)
    report = json.loads((workdir.root / "report.json").read_text())
    assert report == first.report
    assert set(report) == {"seconds", "stages", "evaluation", "model", "served"}
    assert set(report["seconds"]) == {"data", "train", "evaluate", "serve", "total"}
    assert report["seconds"]["total"] == pytest.approx(
        sum(value for name, value in report["seconds"].items() if name != "total"), abs=0.1
    )
    losses = {number: set(stage) - {"viescore_after"} for number, stage in report["stages"].items()}
    assert losses == {
        "1": {"L_LLM", "L_IB", "L_TB"},
        "2": {"L_MLLM", "L_IAA", "L_diff1"},
        "3": {"L_IAA", "L_diff2"},
    }
    assert all(set(stage["L_IAA"]) == {"first", "last"} for number, stage in report["stages"].items() if number != "1")
    assert report["evaluation"]["scenes"] == 4
    assert report["evaluation"]["before_training"]["edits"] == 8
    assert report["model"] == {"name": "insightedit", "version": "1", "aliases": ["champion"]}
    assert report["served"]["status"] == 200
    assert report["served"]["model_version"] == "1"
    assert report["served"]["identical_to_local"] is True
    assert deployment.status(workdir).state == "down"
    lines = capfd.readouterr().err
    for phase in ("Data", "Workers", "Stage 1", "Stage 2", "Stage 3", "Evaluation", "Promotion", "Server", "Edit"):
        assert f"{phase} done in" in lines

    tags = Registry(workdir).resolve("champion").tags
    for tag in ("run", "stage_run.1", "stage_run.3", "dataset.edits", "config", "evaluation.cases", "viescore"):
        assert tags[tag]

    second = quickstart(workdir, tiny, port=_free_port())
    assert "captions, questions, edits" in capfd.readouterr().err, "prepared data was reused in silence"
    versions = Registry(workdir).versions()
    assert [version.version for version in versions] == ["2", "1"]
    assert versions[0].run_id != versions[1].run_id
    champion = Registry(workdir).resolve("champion")
    assert second.report["model"]["version"] == "2"
    assert second.report["served"]["model_version"] == champion.version
    assert second.report["served"]["identical_to_local"] is True
    assert second.url is not None
    assert httpx.get(f"{second.url}/healthz", timeout=30).status_code == 200
    assert any(second.url in command for command in second.next_commands)


def test_a_taken_port_is_found_before_training(tiny: RunConfig, workdir: Workdir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=f"Port {port} is taken"):
            quickstart(workdir, tiny, port=port)
    assert not workdir.runs.exists()


def test_the_display_writes_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out)) as display:
        display.at("Data", 0, 10)
        display.at("Data", 10, 10, "10 records [all good]")
        display.at("Stage 1", note="L_IB 0.5")
        display.say("By the way.")
    text = re.sub(r"\d+ s", "0 s", out.getvalue())
    assert text.splitlines() == [
        "Data ...",
        "Data done in 0 s: 10 records [all good]",
        "Stage 1 ...",
        "By the way.",
        "Stage 1 done in 0 s: L_IB 0.5",
    ]


def test_the_display_is_live_on_a_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=120)) as display:
        display.at("Stage 1", 5, 10, "L_IB [0.5]")
        display.at("Stage 2")
        display.end("finished")
    assert "L_IB [0.5]" in out.getvalue()
    assert "finished" in out.getvalue()


def test_the_report_is_one_file_that_needs_no_other(tmp_path: Path) -> None:
    cases = evaluation_cases(EvaluationConfig(scenes=15))
    judged = judge(cases, (unit_range(case.source) for case in cases))
    evaluation = summarise(judged, judge(shuffled(cases), (unit_range(case.source) for case in cases)))
    rows = sheet_rows(judged, 10)
    report = Report(
        title="a <run>",
        summary=[("0.500", "VIEScore", "of 15 scenes")],
        curves={"Stage 1": [Curve(name="L_IB", steps=[1, 2, 3], values=[1.0, 0.1, 0.01])], "Stage 2": []},
        evaluation=evaluation,
        sheet=rows,
        facts={"run": "nano-1"},
    )
    path = tmp_path / "report.html"
    write_report(path, report)
    page = path.read_text()
    assert "a &lt;run&gt;" in page
    assert "<run>" not in page
    assert page.count("data:image/png;base64,") == 30
    assert page.count("data:image/svg+xml;base64,") == 1
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page), "the page loads something"
    for row in rows:
        assert row.instruction in page
    for name in ("remove", "move", "combination", "0.500"):
        assert name in page


def test_a_sheet_shows_every_kind_of_edit_first(tmp_path: Path) -> None:
    cases = evaluation_cases(EvaluationConfig(scenes=40))
    judged = judge(cases, (unit_range(case.source) for case in cases))
    instructions = [row.instruction for row in sheet_rows(judged, 10)]
    kinds = {(case.task, case.wording) for case in cases if case.instruction in instructions}
    assert len(kinds) == 10
    assert len(sheet_rows(judged[:3], 10)) == 3


def test_a_sheet_enlarges_small_pictures_without_smoothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source, edit = (rng.integers(0, 256, (32, 32, 3), np.uint8) for _ in range(2))
    large = rng.integers(0, 256, (300, 400, 3), np.uint8)
    row = SheetRow(source=source, instruction="remove the red circle " * 6, edit=edit, target=large, note="S_i 5")
    write_sheet(tmp_path / "sheet.png", [row, row])
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    enlarged = source.repeat(5, axis=0).repeat(5, axis=1)
    assert any(np.array_equal(pixels[top : top + 160, 24:184], enlarged) for top in range(pixels.shape[0] - 160)), (
        "the source is not there pixel by pixel"
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
