"""What tests of promotions under load share: versions, some of them broken, and edits that are watched."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file

from insightedit.platform.registry import ModelVersion, Registry
from insightedit.platform.workdir import Workdir
from insightedit.serve.backend import RolloutStatus

Change = Callable[[Path], None]
"""Makes another version of a pipeline folder."""


def of_index(**values: Any) -> Change:
    """With other values in its config."""

    def change(folder: Path) -> None:
        index = folder / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), **values}))

    return change


def of_weights(part: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Change:
    """With other weights in one of its parts."""

    def rewrite(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    return rewrite


BAD_WEIGHTS = of_weights("unet", lambda _, tensor: torch.full_like(tensor, float("nan")))
# A tiny model's edits are grey mush, and these are black and white.
NOISE = of_weights("vae", lambda name, tensor: 1000 * tensor if name == "decoder.conv_out.weight" else tensor)


def wrong_file(folder: Path) -> None:
    """The UNet's weights are those of its VAE."""
    (unet,), (vae,) = ((folder / part).glob("*.safetensors") for part in ("unet", "vae"))
    shutil.copy(vae, unet)


def no_start(folder: Path) -> None:
    """Its config cannot be read."""
    (folder / "unet" / "config.json").write_text("{")


def register(workdir: Workdir, original: Path, folder: Path, change: Change | None = None) -> ModelVersion:
    """Another version of the run that made the first one, from a changed copy of a pipeline folder."""
    target = folder / f"pipeline-{time.time_ns()}"
    shutil.copytree(original, target, ignore=shutil.ignore_patterns("MANIFEST.json"))
    if change is not None:
        change(target)
    registry = Registry(workdir)
    run = registry.resolve("1").run_id
    assert run is not None
    return registry.register(target, run)


def rollout(url: str) -> RolloutStatus | None:
    """How far the server's last rollout is."""
    status = httpx.get(f"{url}/v1/status", timeout=60).raise_for_status().json()["rollout"]
    return None if status is None else RolloutStatus.model_validate(status)


def ended(url: str, version: str, seconds: float = 400.0) -> RolloutStatus:
    """The rollout of a version, once it is over."""
    deadline = time.monotonic() + seconds
    while True:
        found = rollout(url)
        if found is not None and found.version == version and found.state in ("full", "rolled_back"):
            return found
        assert time.monotonic() < deadline, f"version {version} comes to no end: {found}"
        time.sleep(0.2)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got, and when."""

    sent: float
    seconds: float
    status: int
    version: str
    seed: int
    image: bytes
    """A digest."""


@dataclass
class Load:
    """Edits at a rate, whatever becomes of those before; none is tried again."""

    url: str
    image: bytes
    fields: dict[str, str]
    rate: float
    """Edits a second."""
    seeds: int = 4
    answers: list[Answer] = field(default_factory=list[Answer])
    stop: threading.Event = field(default_factory=threading.Event)

    def edit(self, client: httpx.Client, number: int) -> Answer:
        """One edit."""
        seed, begun = number % self.seeds, time.monotonic()
        response = client.post(
            f"{self.url}/v1/images/edits",
            data={**self.fields, "seed": str(seed)},
            files={"image": ("a.png", self.image)},
        )
        body = response.json()
        version, image = (
            ("", b"") if response.is_error else (body["model_version"], body["data"][0]["b64_json"].encode())
        )
        digest = hashlib.sha256(image).digest()
        return Answer(begun, time.monotonic() - begun, response.status_code, version, seed, digest)

    def client(self) -> httpx.Client:
        """A client for many edits at a time."""
        return httpx.Client(timeout=120, limits=httpx.Limits(max_connections=64))

    @contextmanager
    def running(self) -> Generator[None]:
        """Send them while the block runs, and have them all answered at its end."""
        with self.client() as client, ThreadPoolExecutor(32) as clients:
            thread = threading.Thread(target=self._send, args=(client, clients))
            thread.start()
            try:
                yield
            finally:
                self.stop.set()
                thread.join()

    def _send(self, client: httpx.Client, clients: ThreadPoolExecutor) -> None:
        for number in itertools.count():
            if self.stop.wait(1 / self.rate):
                return
            clients.submit(lambda number: self.answers.append(self.edit(client, number)), number)

    @property
    def failed(self) -> int:
        """Answers that are not 2xx."""
        return sum(not 200 <= answer.status < 300 for answer in self.answers)

    def by(self, version: str, since: float = 0.0) -> list[Answer]:
        """A version's answers."""
        return [answer for answer in self.answers if answer.version == version and answer.sent >= since]

    def mixed(self) -> int:
        """Images beyond the one that a version makes of a seed in exact mode."""
        images: dict[tuple[str, int], set[bytes]] = {}
        for answer in self.answers:
            images.setdefault((answer.version, answer.seed), set()).add(answer.image)
        return sum(len(found) - 1 for found in images.values())
