"""What every test shares: no network, no telemetry, one thread a process, and never the real work folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from insightedit.cli import QUIET

# Set before torch, ray or mlflow are imported; Ray's workers inherit them.
os.environ.update(
    {
        **QUIET,
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

# Trainings and jobs of minutes each. They come first, so that two processes, each with a file at a time, end together;
# servers, of which an answer in time is expected, then run beside short tests.
LONG = {
    "test_training.py",
    "test_elastic.py",
    "test_bad_steps.py",
    "test_faults.py",
    "test_efficiency.py",
    "test_sharding.py",
    "test_chaos.py",
    "test_batch.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first; all else stays in its order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def own_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A work folder for this test alone, found by everything that names none."""
    folder = tmp_path / "work"
    monkeypatch.setenv("INSIGHTEDIT_WORKDIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone. DeepSpeed remembers the first one, so there is one for all tests."""
    import torch.distributed as dist

    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(process_group: None) -> Iterator[None]:
    """What DeepSpeed wants to run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield
