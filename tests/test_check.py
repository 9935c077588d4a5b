"""`data check`: exact counts of every dataset, and nothing of it changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import dataset_folders
import pytest
from PIL import Image

from insightedit.jobs.check import check
from insightedit.platform.cluster import connected
from insightedit.platform.config import DatasetConfig
from insightedit.platform.datasets import READERS
from insightedit.platform.errors import InsightEditError, NotFoundError


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with connected(cpus=4):
        yield


def test_every_reader_has_a_folder() -> None:
    assert set(dataset_folders.FOLDERS) == set(READERS)


@pytest.mark.parametrize("name", sorted(dataset_folders.FOLDERS))
def test_counts_are_exact(tmp_path: Path, name: str) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    made = dataset_folders.FOLDERS[name](root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    dataset = DatasetConfig(reader=name, options=made.options) if name == "shapes" else made.config(name, root)
    told: list[int] = []
    found = check(dataset, out, progress=lambda rows, total: told.append(rows))
    assert (found.tasks, found.reasons) == (made.tasks, made.reasons)
    assert found.records == sum(made.tasks.values())
    assert found.quarantined == sum(made.reasons.values())
    assert told[-1] == found.records + found.quarantined
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.height > 200
    if found.quarantine is not None:
        listed = [json.loads(line) for line in Path(found.quarantine).read_text(encoding="utf-8").splitlines()]
        assert sorted(row["reason"] for row in listed) == sorted(
            reason for reason, count in made.reasons.items() for _ in range(count)
        )
        assert all(row["detail"].endswith(".") or row["detail"] for row in listed)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="There is no folder"):
        check(DatasetConfig(reader="magicbrush", options={"root": str(tmp_path / "lost")}), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InsightEditError, match=r"train-\*\.parquet"):
        check(DatasetConfig(reader="magicbrush", options={"root": str(tmp_path / "empty")}), tmp_path / "out")
