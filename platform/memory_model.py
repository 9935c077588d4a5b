"""What a worker's memory holds when it holds most, by DeepSpeed's engine as `insightedit.platform.engine` sets it up.

A step has three moments that can be the fullest: while the backward pass makes gradients out of activations, when the
gradients are reduced over the workers, and when they become the optimiser's step. Weights are float32, as the stages'
are, but for frozen ones that the config keeps in bfloat16; sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from insightedit.platform.tracing import StepTrace

FLOAT = 4
"""Bytes of a float32."""
MOMENTS = 2
"""Adam's, of each trained weight."""
BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once (`reduce_bucket_size`, its default)."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered (`stage3_max_live_parameters`, its default)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What a stage's model consists of."""

    groups: tuple[int, ...]
    """Elements that train, of each of the optimiser's groups."""
    largest: int
    """Elements of the largest parameter that trains."""
    frozen: int
    """Bytes of the frozen parameters and buffers that training runs."""
    frozen_elements: int
    encoders: int
    """Bytes of the frozen encoders, which wait in the host's memory for pictures of validation."""

    @property
    def trained(self) -> int:
        """Elements that train."""
        return sum(self.groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How a stage is spread and kept."""

    world: int
    accumulation: int
    """Micro-batches of an optimiser step."""
    zero: Literal[2, 3]
    offload: Literal["none", "optimizer", "all"]
    on_gpu: bool
    averages: bool = False
    """Whether an average of the weights is kept, each worker its share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes at the fullest moment of a step, on the device that trains."""

    weights: int
    gradients: int
    optimizer: int
    """Master weights, moments and averages."""
    activations: int
    """And what else the forward and backward pass hold, such as weights cast for autocast."""
    batch: int
    """Inputs of all micro-batches of a step."""
    buffers: int
    """What DeepSpeed copies through: buckets, flattened gradients, gathered parameters."""
    host: int
    """Besides, in the machine's memory: what is offloaded, encoders, and the copy that a checkpoint is written from. On
    a worker without a GPU it is the same memory as the rest."""

    @property
    def device(self) -> int:
        """Bytes on the device that trains."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.batch + self.buffers


def plan_memory(weights: Weights, trace: StepTrace, setup: Setup, *, checkpoints: bool) -> Memory:
    """The fullest moment of a stage's steps.

    Args:
        weights: of the model.
        trace: of one micro-batch.
        setup: of the engine.
        checkpoints: whether one is written on the way, from a copy of what trains.
    """
    plan = _plan_zero2 if setup.zero == 2 else _plan_zero3
    fullest = max(plan(weights, trace, setup), key=lambda memory: memory.device)
    share = _share(weights, setup)
    averages = FLOAT * share if setup.averages else 0
    copied = FLOAT * ((1 + MOMENTS) * share + (weights.trained if setup.zero == 2 else share)) + averages
    return replace(
        fullest,
        optimizer=fullest.optimizer + averages,
        host=fullest.host + weights.encoders + (copied if checkpoints else 0),
    )


def _share(weights: Weights, setup: Setup) -> int:
    """Elements that one worker's optimiser steps."""
    return -(-weights.trained // setup.world)


def _plan_zero2(weights: Weights, trace: StepTrace, setup: Setup) -> Iterator[Memory]:
    """ZeRO-2: every worker has all weights; optimiser and reduced gradients are spread."""
    share = _share(weights, setup)
    optimizer = FLOAT * (1 + MOMENTS) * share
    steady = Memory(
        weights=weights.frozen + FLOAT * weights.trained,
        gradients=0,
        optimizer=optimizer,
        activations=0,
        batch=setup.accumulation * trace.batch,
        buffers=0,
        host=0,
    )
    if setup.offload != "none":
        yield from _offloaded_zero2(weights, trace, setup, steady)
        return
    gradients = _bucketed if setup.on_gpu else _whole_gradients
    yield from gradients(weights, trace, setup, steady)
    # Each group's partition is flattened beside what it is made of.
    largest = FLOAT * max(weights.groups) // setup.world
    yield replace(steady, gradients=FLOAT * share, buffers=largest)


def _whole_gradients(weights: Weights, trace: StepTrace, setup: Setup, steady: Memory) -> Iterator[Memory]:
    """Without contiguous gradients, as on CPUs: each stays as autograd made it until its bucket is reduced."""
    share = _share(weights, setup)
    kept = share if setup.accumulation > 1 else 0
    own, bucket = share / weights.trained, 0
    for arrival in trace.arrivals:
        yield replace(steady, activations=arrival.before, gradients=FLOAT * (kept + bucket))
        if bucket + arrival.elements > BUCKET:
            yield replace(steady, activations=arrival.before, gradients=FLOAT * (kept + bucket), buffers=FLOAT * bucket)
            kept, bucket = kept + int(own * bucket), 0
        bucket += arrival.elements
    yield replace(steady, gradients=FLOAT * (kept + bucket), buffers=FLOAT * bucket)


def _bucketed(weights: Weights, trace: StepTrace, setup: Setup, steady: Memory) -> Iterator[Memory]:
    """With contiguous gradients: each is copied into one of two buckets, and this worker's share out of them."""
    shares = 2 if setup.accumulation > 1 else 1
    yield replace(
        steady,
        activations=trace.activations,
        gradients=FLOAT * shares * _share(weights, setup),
        buffers=2 * FLOAT * BUCKET,
    )


def _offloaded_zero2(weights: Weights, trace: StepTrace, setup: Setup, steady: Memory) -> Iterator[Memory]:
    """The optimiser in the host's memory: master weights, moments, gradients, and a copy on the way back."""
    share = _share(weights, setup)
    summed = weights.trained if setup.accumulation > 1 else 0
    host = FLOAT * ((1 + MOMENTS + 2) * share + summed + weights.largest)
    buckets = 2 * BUCKET if setup.on_gpu else min(BUCKET, weights.trained)
    yield replace(
        steady,
        optimizer=0,
        activations=trace.activations,
        buffers=FLOAT * (buckets + weights.largest),
        host=host,
    )


def _plan_zero3(weights: Weights, trace: StepTrace, setup: Setup) -> Iterator[Memory]:
    """ZeRO-3: the weights are spread too, and gathered where they are used."""
    share = _share(weights, setup)
    frozen = -(-weights.frozen // setup.world)
    everything = weights.trained + weights.frozen_elements
    # One worker alone gathers nothing: its share is the whole.
    gathered = 0 if setup.world == 1 else min(everything, LIVE)
    width = (FLOAT * weights.trained + weights.frozen) / everything
    bucket = BUCKET if setup.on_gpu else min(BUCKET, weights.trained)
    parameters, moments = FLOAT * share + frozen, FLOAT * MOMENTS * share
    # Where nothing is offloaded the weights' shares are the optimiser's master weights.
    on_host = {"none": 0, "optimizer": FLOAT * 2 * share + moments, "all": FLOAT * 2 * share + moments + parameters}
    yield Memory(
        weights=0 if setup.offload == "all" else parameters,
        gradients=FLOAT * share if setup.offload == "none" else 0,
        optimizer=moments if setup.offload == "none" else 0,
        activations=trace.activations,
        batch=setup.accumulation * trace.batch,
        buffers=FLOAT * bucket + int(width * gathered),
        host=on_host[setup.offload],
    )
