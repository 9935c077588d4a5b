"""The table of an evaluation: what is written comes back, and what is unknown stays unknown."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from insightedit.platform.errors import InsightEditError
from insightedit.platform.results import CaseResult, read_results, write_results

SCORED = CaseResult(
    case="a-simple",
    scene="a",
    seed=3,
    task="remove",
    wording="simple",
    instruction="remove the cat",
    instruction_adherence=4,
    non_overediting=5,
    viescore=0.9,
    explanations={"instruction_adherence": 'The cat is gone, "almost".'},
    metrics={"psnr": 31.5, "ssim": 0.97},
)
FAILED = CaseResult(
    case="b", scene="b", seed=4, task="add", wording="", instruction="add a dog", failure="edit failed: too long."
)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write_results(tmp_path / "results.parquet", [SCORED, FAILED])
    assert read_results(tmp_path / "results.parquet") == [SCORED, FAILED]
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.column("metric.psnr").to_pylist() == [31.5, None]
    assert table.column("naturalness").null_count == 2, "an unknown score is not 0"
    assert table.column("viescore").to_pylist() == [0.9, None]


def test_a_column_that_is_no_longer_known_is_passed_over(tmp_path: Path) -> None:
    write_results(tmp_path / "results.parquet", [SCORED])
    table = pq.read_table(tmp_path / "results.parquet").append_column("seconds", [[1.5]])
    pq.write_table(table, tmp_path / "results.parquet")
    assert read_results(tmp_path / "results.parquet") == [SCORED]


def test_an_evaluation_without_cases_has_the_same_columns(tmp_path: Path) -> None:
    write_results(tmp_path / "results.parquet", [])
    assert read_results(tmp_path / "results.parquet") == []
    assert "viescore" in pq.read_schema(tmp_path / "results.parquet").names


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing else"])
def test_a_damaged_table_is_told_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.parquet").write_bytes(content)
    with pytest.raises(InsightEditError, match=r"results\.parquet is no table of an evaluation .* again\.$"):
        read_results(tmp_path / "results.parquet")
    with pytest.raises(InsightEditError, match="no table"):
        read_results(tmp_path / "missing.parquet")
