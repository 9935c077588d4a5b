"""How the gateway reaches replicas, over handles that stand in for Serve's: waking both halves of a version at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from insightedit.serve import routing
from insightedit.serve.applications import single_version_table
from insightedit.serve.backend import Conditions, Edited, EditJob, EditOutcome, Refusal
from insightedit.serve.meters import Meters
from insightedit.serve.routing import CONDITIONER, EDITOR, ReplicaBackend
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import Limits

PIXELS = np.full((8, 8, 3), 7, np.uint8)
JOB = EditJob(prompt="remove it", pixels=PIXELS, seed=1, num_inference_steps=2)
ANSWERS: dict[str, object] = {
    "condition": Conditions(arrays={}, seconds=0.0, text_tokens=1, image_tokens=1),
    "edit": Edited(pixels=PIXELS, seconds=0.0, steps=2, output_tokens=1),
    "ready": True,
}


class Call:
    """A call to replicas, as Serve's response: it can be awaited, and cancelled."""

    def __init__(self, name: str, half: Half) -> None:
        self.name = name
        self.half = half
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> object:
        await self.half.awake.wait()
        answer = self.half.answers[self.name]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Half:
    """A deployment and its handle: asleep until `wake`, and with the private parts of a handle that `routing` reads."""

    def __init__(self, *, awake: bool) -> None:
        self.awake = asyncio.Event()
        self.calls: list[Call] = []
        self.answers = dict(ANSWERS)
        self.replicas: dict[str, object] = {}
        router = SimpleNamespace(_request_router=SimpleNamespace(curr_replicas=self.replicas))
        self._router: SimpleNamespace | None = SimpleNamespace(_asyncio_router=router)
        if awake:
            self.wake()

    def forget(self) -> None:
        """Be as before the first call."""
        self._router = None

    def wake(self) -> None:
        self.replicas["a replica"] = None
        self.awake.set()

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: self._call(name))

    def _call(self, name: str) -> Call:
        self.calls.append(Call(name, self))
        return self.calls[-1]

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]


class Version:
    """Both halves, and the backend over them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, conditioner: bool, editor: bool) -> None:
        self.conditioner, self.editor = Half(awake=conditioner), Half(awake=editor)
        halves = {CONDITIONER: self.conditioner, EDITOR: self.editor}
        monkeypatch.setattr(routing.serve, "get_deployment_handle", lambda name, _application: halves[name])
        self.backend = ReplicaBackend(single_version_table("1", (), sleeps=True), Limits(attempts=1), Meters())

    def edit(self) -> asyncio.Task[EditOutcome]:
        return asyncio.create_task(self.backend.edit("1", JOB))


Story = Callable[[Callable[..., Version]], Coroutine[Any, Any, None]]


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Callable[[Story], None]:
    """Runs a test's story in an event loop of its own."""

    def run(story: Story) -> None:
        async def within_time() -> None:
            async with asyncio.timeout(60):
                await story(lambda **awake: Version(monkeypatch, **awake))

        asyncio.run(within_time())

    return run


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_both_halves_of_a_version_that_sleeps_are_called_at_once(tell: Callable[[Story], None]) -> None:
    async def story(version: Callable[..., Version]) -> None:
        it = version(conditioner=False, editor=False)
        edit = it.edit()
        await until(lambda: bool(it.conditioner.calls and it.editor.calls))
        assert (it.conditioner.names, it.editor.names) == (["condition"], ["ready"])
        it.editor.wake()
        it.conditioner.wake()
        assert np.array_equal((await edit).pixels, PIXELS)
        await it.edit()
        assert it.editor.names == ["ready", "edit", "edit"]
        assert it.conditioner.names == ["condition", "condition"]

    tell(story)


def test_an_editor_that_runs_gets_the_edit_and_no_other_call(tell: Callable[[Story], None]) -> None:
    async def story(version: Callable[..., Version]) -> None:
        it = version(conditioner=False, editor=True)
        edit = it.edit()
        await until(lambda: bool(it.conditioner.calls))
        it.conditioner.wake()
        await edit
        assert it.editor.names == ["edit"]

    tell(story)


def test_one_call_wakes_the_editor_for_many_edits_and_ends_with_the_first_conditions(
    tell: Callable[[Story], None],
) -> None:
    async def story(version: Callable[..., Version]) -> None:
        it = version(conditioner=False, editor=False)
        edits = [it.edit() for _ in range(4)]
        await until(lambda: len(it.conditioner.calls) == 4)
        assert it.editor.names == ["ready"]
        it.conditioner.wake()
        # Serve would otherwise see two calls for one edit, and start two editors.
        await until(lambda: it.editor.names == ["ready", *["edit"] * 4])
        assert it.editor.calls[0].cancelled
        it.editor.wake()
        await asyncio.gather(*edits)

    tell(story)


def test_an_edit_that_is_cancelled_takes_the_waking_call_along_and_the_next_one_wakes_anew(
    tell: Callable[[Story], None],
) -> None:
    async def story(version: Callable[..., Version]) -> None:
        it = version(conditioner=False, editor=False)
        edit = it.edit()
        await until(lambda: bool(it.conditioner.calls and it.editor.calls))
        edit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await edit
        assert it.conditioner.calls[0].cancelled
        assert it.editor.calls[0].cancelled
        again = it.edit()
        await until(lambda: it.editor.names == ["ready", "ready"])
        it.conditioner.wake()
        it.editor.wake()
        await again

    tell(story)


@pytest.mark.parametrize("failure", [RuntimeError("it does not start"), routing.RayServeException("it is gone")])
def test_a_waking_call_that_fails_is_the_edits_matter_and_no_answer_of_its_own(
    tell: Callable[[Story], None], failure: Exception
) -> None:
    async def story(version: Callable[..., Version]) -> None:
        it = version(conditioner=False, editor=False)
        it.editor.answers["ready"] = failure
        edit = it.edit()
        await until(lambda: bool(it.editor.calls))
        it.editor.wake()
        await asyncio.sleep(0.01)
        it.conditioner.wake()
        assert (await edit).steps == 2

    tell(story)


def test_a_refused_edit_leaves_nothing_behind(tell: Callable[[Story], None]) -> None:
    async def story(version: Callable[..., Version]) -> None:
        it = version(conditioner=True, editor=False)
        it.conditioner.answers["condition"] = Refusal("too long", "prompt")
        with pytest.raises(ApiError, match="too long"):
            await it.edit()
        assert all(call.cancelled for call in it.editor.calls)
        assert "edit" not in it.editor.names
        assert asyncio.all_tasks() == {asyncio.current_task()}

    tell(story)


def test_a_handle_that_was_never_called_knows_of_no_replica(tell: Callable[[Story], None]) -> None:
    async def story(version: Callable[..., Version]) -> None:
        it = version(conditioner=False, editor=True)
        it.editor.forget()
        edit = it.edit()
        await until(lambda: it.editor.names == ["ready"])
        it.conditioner.wake()
        await edit

    tell(story)
