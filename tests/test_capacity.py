"""What a run asks for beside what a cluster has: only what can never fit is refused."""

from __future__ import annotations

import pytest

from insightedit.platform.capacity import Nodes, NoRoomError, check_room, is_fixed, needs_of
from insightedit.platform.config import load_preset

DATA, TRAIN = Nodes(resources={"CPU": 3}, labels={"group": "data"}), Nodes(resources={"CPU": 5}, labels={"group": "t"})
GPUS = Nodes(resources={"CPU": 8, "GPU": 4}, labels={}, count=2)
PLACED = ("workers.place.group=t", "data.place.group=data")


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        ((), [DATA]),
        (PLACED, [DATA, TRAIN]),
        (("workers.place.group=in(t, u)", "data.place.group='!t'"), [DATA, TRAIN]),
        (("workers.count=8", "workers.gpus=1", "stages.1.global_batch=16"), [GPUS]),
        # What is there in the end decides, not what an elastic run would like.
        (("workers.count=[1, 2]", "workers.cpus=2"), [DATA]),
        (("data.encode=while_training", "workers.data_cpus=0.25"), [DATA]),
    ],
)
def test_what_fits_is_let_through(settings: tuple[str, ...], nodes: list[Nodes]) -> None:
    check_room(needs_of(load_preset("nano", settings)), nodes)


@pytest.mark.parametrize(
    ("settings", "nodes", "said"),
    [
        ((), [Nodes(resources={"CPU": 2}, labels={})], "together 2.5 CPUs, and the nodes have 2"),
        ((), [], r"data.read_tasks asks for 1 x 0.5 CPUs, and 0 fit"),
        (PLACED, [DATA, DATA], "workers.count asks for 2 x 1 CPUs on nodes with group=t, and 0 fit"),
        (("workers.count=16", "workers.gpus=1"), [GPUS], "16 x 1 CPUs and 1 GPUs, and 8 fit"),
        # Each node has two thirds of a worker's CPUs.
        (("workers.cpus=3",), [Nodes(resources={"CPU": 2}, labels={}, count=10)], "2 x 3 CPUs, and 0 fit"),
        (("data.encoder_gpus=0.5",), [DATA, TRAIN], r"data.encoder_workers asks for 2 x 0.5 CPUs and 0.5 GPUs, and 0"),
        (("data.encode=while_training",), [DATA], "data.encoder_workers asks for 2 x 0.5 CPUs; together 3.5 CPUs"),
        (("workers.count=[1, 2]", "workers.cpus=4"), [DATA], "1 x 4 CPUs, and 0 fit"),
    ],
)
def test_what_never_fits_is_refused(settings: tuple[str, ...], nodes: list[Nodes], said: str) -> None:
    with pytest.raises(NoRoomError, match=said):
        check_room(needs_of(load_preset("nano", settings)), nodes)


@pytest.mark.parametrize(
    ("types", "fixed"),
    [
        (None, False),
        ({}, False),
        ({"ab12": "node_ab12", "cd34": "node_cd34"}, True),
        ({"ab12": "head", "cd34": "train-gpu"}, False),
    ],
)
def test_only_a_cluster_without_an_autoscaler_is_what_it_is(types: dict[str, str] | None, fixed: bool) -> None:
    assert is_fixed(types) is fixed
