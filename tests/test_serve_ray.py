"""A real server: Ray Serve in a process of its own, a registered version, edits over HTTP, a replica killed."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import openai
import psutil
import pytest
import test_serve_page
import torch
from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Browser, expect
from rollouts import Load, ended, of_index, register
from tiny_models import build_sources, tiny_config

from insightedit import cli
from insightedit.model.insightedit import build_pipeline
from insightedit.model.pipeline import load_pipeline
from insightedit.platform.errors import ClusterError, InsightEditError, NotFoundError, UsageError
from insightedit.platform.registry import Registry
from insightedit.platform.workdir import Workdir
from insightedit.serve.client import Patience, edit_over_http, served_url
from insightedit.serve.deployment import ServeStatus, down, status, up
from insightedit.serve.follower import FROM_TAG, STATE_TAG, UNDER_WAY
from insightedit.serve.job_book import JobBook, JobRecord
from insightedit.serve.job_client import JobClient
from insightedit.serve.settings import ServeSettings, read_settings
from insightedit.serve.state_store import open_store

pytestmark = pytest.mark.timeout(1200)
# Whether a version is slower is for the tests on a quiet machine.
QUICK_ROLLOUT = [
    "rollout.poll_seconds=0.2",
    "rollout.share=0.4",
    "rollout.min_requests=8",
    "rollout.min_seconds=1",
    "rollout.max_slowdown=100",
    "rollout.shadow_share=0.3",
]
PROMPT = "remove the red circle"
browser = test_serve_page.browser


class Served(NamedTuple):
    workdir: Workdir
    status: ServeStatus
    folder: Path


def register_champion(workdir: Workdir, folder: Path) -> Path:
    torch.manual_seed(0)
    pipeline: Any = build_pipeline(tiny_config(build_sources(folder / "sources")))
    pipeline.register_to_config(image_branch=True)
    pipeline.save_pretrained(folder / "pipeline")
    client = MlflowClient(tracking_uri=workdir.tracking_uri)
    experiment = client.create_experiment("serve", artifact_location=workdir.artifacts.as_uri())
    run = client.create_run(experiment).info.run_id
    registry = Registry(workdir)
    version = registry.register(folder / "pipeline", run)
    registry.promote(version.version)
    return version.folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    workdir = Workdir.open(folder / "work")
    version_folder = register_champion(workdir, folder)
    server = up(workdir, port=0, settings=read_settings(None, QUICK_ROLLOUT))
    yield Served(workdir, server, version_folder)
    down(workdir)


def picture(size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def edit(served: Served, image: Image.Image, seed: int = 7, **options: Any) -> bytes:
    return edit_over_http(served_url(served.workdir), png(image), PROMPT, seed=seed, **options).image


@pytest.mark.parametrize("size", [(16, 16), (40, 28)])
def test_served_bits_are_those_of_the_local_pipeline(served: Served, size: tuple[int, int]) -> None:
    answer = edit_over_http(served_url(served.workdir), png(picture(size)), PROMPT, seed=7)
    local = load_pipeline(served.folder)(
        PROMPT, picture(size), generator=torch.Generator().manual_seed(7), exact=True, return_dict=False
    )[0][0]
    assert np.array_equal(pixels(answer.image), np.asarray(local))
    assert (answer.model_version, answer.seed, answer.size) == ("1", 7, f"{size[0]}x{size[1]}")
    assert not np.array_equal(pixels(edit(served, picture(size), seed=8)), np.asarray(local))


def test_openais_client_streams_the_same_bytes(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served_url(served.workdir)}/v1", api_key="any", max_retries=0)
    image = ("a.png", png(picture()), "image/png")
    stream = client.images.edit(
        image=image, prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7, "num_inference_steps": 8}
    )
    *partial, done = list(stream)
    assert [event.type for event in partial] == ["image_edit.partial_image"] * 2
    assert len({event.b64_json for event in (*partial, done)}) == 3
    assert base64.b64decode(done.b64_json) == edit(served, picture(), num_inference_steps=8)


def by_curl(url: str, image: Path, fields: dict[str, str]) -> bytes:
    command = ["curl", "-sS", f"{url}/v1/images/edits", "-F", f"image=@{image}"]
    command += [part for name, value in fields.items() for part in ("-F", f"{name}={value}")]
    answer = subprocess.run(command, capture_output=True, check=True).stdout
    return base64.b64decode(json.loads(answer)["data"][0]["b64_json"])


def by_command(out: Path, image: Path, *arguments: str) -> bytes:
    assert cli.run(["edit", str(image), PROMPT, "--out", str(out), *arguments]) == 0
    return out.read_bytes()


@pytest.mark.parametrize("more", [{}, {"scheduler": "euler_a", "image_branch_scale": "0.5", "size": "24x24"}])
def test_every_way_to_ask_gives_the_same_bytes(served: Served, tmp_path: Path, more: dict[str, str]) -> None:
    url, image = served_url(served.workdir), tmp_path / "photo.png"
    image.write_bytes(png(picture((40, 28))))
    fields = {"prompt": PROMPT, "seed": "7", "num_inference_steps": "4", **more}
    options = {"--seed": "7", "--steps": "4", **{f"--{name.replace('_', '-')}": value for name, value in more.items()}}
    arguments = [part for option in options.items() for part in option]
    remote = by_command(tmp_path / "remote.png", image, "--server", url, *arguments)
    assert by_command(tmp_path / "here.png", image, "--workdir", str(served.workdir.root), *arguments) == remote
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    extra = {name: value for name, value in fields.items() if name != "prompt"}
    (one,) = client.images.edit(image=image, prompt=PROMPT, extra_body=extra).data or []
    assert base64.b64decode(one.b64_json or "") == remote
    assert by_curl(url, image, fields) == remote


def test_masks_several_edits_and_files_of_less_quality_are_made_here_too(served: Served, tmp_path: Path) -> None:
    image, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    image.write_bytes(png(picture((20, 16))))
    alpha = np.full((16, 20), 255, np.uint8)
    alpha[4:9, 3:12] = 0
    Image.fromarray(np.dstack([np.zeros((16, 20, 3), np.uint8), alpha])).save(mask)
    arguments = ["--mask", str(mask), "--n", "2", "--seed", "4294967295", "--steps", "2", "--compression", "60"]
    places = [["--server", served_url(served.workdir)], ["--workdir", str(served.workdir.root)]]
    for name, place in zip(("remote", "here"), places, strict=True):
        arguments_here = ["edit", str(image), PROMPT, "--out", str(tmp_path / name / "e.webp"), *arguments, *place]
        assert cli.run(arguments_here) == 0
    files = {name: sorted((tmp_path / name).iterdir()) for name in ("remote", "here")}
    assert [file.name for file in files["here"]] == ["e-1.webp", "e-2.webp"]
    assert [file.read_bytes() for file in files["here"]] == [file.read_bytes() for file in files["remote"]]


def test_the_page_gives_the_same_bytes(served: Served, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(served_url(served.workdir))
    test_serve_page.choose(page, png(picture((40, 28))))
    page.click("summary")
    page.fill("[name=seed]", "7")
    page.fill("[name=num_inference_steps]", "4")
    page.fill("#prompt", PROMPT)
    page.press("#prompt", "Enter")
    expect(page.locator("#said")).to_have_text("The edit is done.", timeout=60_000)
    assert test_serve_page.shown(page) == edit(served, picture((40, 28)), num_inference_steps=4)
    page.close()


def test_keys_and_jobs_outlive_their_gateway(served: Served, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=f"{served_url(served.workdir)}/v1", api_key="any", max_retries=30)
    image, out = tmp_path / "photo.png", tmp_path / "edited.png"
    image.write_bytes(png(picture()))

    def post(prompt: str = PROMPT) -> Any:
        image = ("a.png", png(picture()), "image/png")
        headers = {"Idempotency-Key": "of-this-test"}
        return client.images.with_raw_response.edit(image=image, prompt=prompt, extra_headers=headers)

    first = post()
    place = ["--workdir", str(served.workdir.root)]
    job = ["edit-job", "submit", str(image), PROMPT, "--id", "of-this-test", "--seed", "7", "--steps", "150", *place]
    assert cli.run(job) == 0
    kill(served, "Gateway")
    again = post()
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    with pytest.raises(openai.UnprocessableEntityError, match="give every request its own"):
        post("another")
    assert cli.run(["edit-job", "fetch", "of-this-test", "--out", str(out), "--wait", "300", *place]) == 0
    assert out.read_bytes() == edit(served, picture(), num_inference_steps=150)


def test_settings_reach_the_model(served: Served) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "image_guidance_scale": 1.1}
    local = load_pipeline(served.folder)(
        PROMPT, picture(), generator=torch.Generator().manual_seed(7), exact=True, return_dict=False, **options
    )[0][0]
    assert np.array_equal(pixels(edit(served, picture(), **options)), np.asarray(local))


def test_an_editor_that_runs_gets_one_call_an_edit(served: Served) -> None:
    def calls() -> int:
        logs = (served.workdir.logs / "serve").glob("*Editor*")
        return sum(log.read_text().count('"CALL /v1/images/edits OK') for log in logs)

    edit(served, picture())
    before = calls()
    for seed in range(3):
        edit(served, picture(), seed, num_inference_steps=1)
    assert calls() == before + 3


def test_it_says_how_it_is(served: Served) -> None:
    now = status(served.workdir)
    assert (now.state, now.ready, now.model_version, now.aliases) == ("up", True, "1", ("champion",))
    url = served_url(served.workdir)
    response = httpx.post(f"{url}/v1/images/edits", data={"prompt": "x"}, files={"image": ("../a", b"nonsense")})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "image"
    assert "," not in response.headers["x-request-id"]
    edit(served, picture())
    text = httpx.get(f"{url}/metrics").text
    assert 'insightedit_edit_requests_total{code="200",model_version="1"}' in text
    assert 'insightedit_edit_rejected_total{reason="invalid_image"} 1.0' in text
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["resolution"] == 16
    assert "<!doctype html>" in httpx.get(url).text.lower()


def test_a_prompt_that_the_model_cannot_read_is_refused(served: Served) -> None:
    with pytest.raises(UsageError, match=r"400: prompt: the instruction has \d+ tokens"):
        edit_over_http(served_url(served.workdir), png(picture()), "zq" * 500)
    with pytest.raises(NotFoundError, match="served are 1"):
        edit_over_http(served_url(served.workdir), png(picture()), PROMPT, model="2")


def test_second_servers_are_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is up at"):
        up(served.workdir)
    other = Workdir.open(tmp_path)
    with pytest.raises(NotFoundError, match="no model is registered"):
        up(other)
    register_champion(other, tmp_path)
    taken = int(served_url(served.workdir).rsplit(":", 1)[1])
    with pytest.raises(UsageError, match=f"Port {taken}"):
        up(other, port=taken)
    assert up(other, port=0, dry_run=True).state == "planned"
    # A version that had only its share when its server went down has no more when the next one starts.
    registry, folder = Registry(other), Registry(other).fetch("1")
    newer = register(other, folder, tmp_path).version
    registry.promote(newer)
    assert up(other, port=0, dry_run=True).model_version == newer
    registry.set_tags(newer, {STATE_TAG: UNDER_WAY, FROM_TAG: "1"})
    assert up(other, port=0, dry_run=True).model_version == "1"
    assert up(other, newer, port=0, dry_run=True).model_version == newer
    assert status(other).state == "down"
    with pytest.raises(ClusterError, match="serve up"):
        served_url(other)


def replicas(served: Served, deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas. Ray shows the name as the process' title."""
    processes = psutil.Process(served.status.pid).children(recursive=True)
    return [process for process in processes if f":{deployment}" in " ".join(process.cmdline())]


def kill(served: Served, deployment: str) -> None:
    (replica,) = replicas(served, deployment)
    os.kill(replica.pid, signal.SIGKILL)


def test_edits_survive_their_replicas(served: Served) -> None:
    undisturbed = edit(served, picture(), num_inference_steps=150)
    answers: list[bytes] = []
    worker = threading.Thread(target=lambda: answers.append(edit(served, picture(), num_inference_steps=150)))
    worker.start()
    time.sleep(0.3)  # By now it is the editor's.
    kill(served, "Editor")
    worker.join()
    kill(served, "Conditioner")
    answers.append(edit(served, picture(), num_inference_steps=150))
    assert answers == [undisturbed, undisturbed]


def test_overload_is_answered_with_429_and_passes(served: Served) -> None:
    url = f"{served_url(served.workdir)}/v1/images/edits"

    def post(_index: int) -> httpx.Response:
        fields = {"prompt": PROMPT, "num_inference_steps": "60"}
        return httpx.post(url, data=fields, files={"image": ("a", png(picture()))}, timeout=120)

    with ThreadPoolExecutor(48) as clients:
        responses = list(clients.map(post, range(48)))
    assert {response.status_code for response in responses} == {200, 429}
    assert all("retry-after" in response.headers for response in responses if response.status_code == 429)
    assert edit(served, picture()) == edit(served, picture())


def test_versions_come_and_go_under_load_and_nobody_notices(served: Served, tmp_path: Path) -> None:
    url, registry = served_url(served.workdir), Registry(served.workdir)
    load = Load(url, png(picture()), {"prompt": PROMPT + " and make it blue", "num_inference_steps": "2"}, rate=1)
    # It reads the first edits' short instructions, and not those of these users.
    broken = register(served.workdir, served.folder, tmp_path, of_index(prompt_length=45)).version
    good = register(served.workdir, served.folder, tmp_path, of_index(guidance_scale=3.0)).version
    with load.running():
        registry.promote(broken)
        out = ended(url, broken)
        begun = time.monotonic()
        registry.promote(good)
        full = ended(url, good)
        time.sleep(3)  # Gateways look for another table four times a second.
        settled = time.monotonic()
        time.sleep(6)
        assert status(served.workdir).model_version == good
        asked = time.monotonic()
        registry.rollback(reason="a test")
        last = ended(url, "1")
        time.sleep(3)
        back = time.monotonic()
        time.sleep(6)
    assert (out.state, full.state) == ("rolled_back", "full"), (out, full)
    assert "edits failed by it and not by the old version" in out.reason
    assert [(entry.action, entry.to_version) for entry in registry.audit.entries()][1:] == [
        ("promote", broken), ("rollback", "1"), ("promote", good), ("rollback", "1"),
    ]  # fmt: skip
    assert {answer.status for answer in load.answers} == {200}
    assert load.mixed() == 0
    assert not load.by(broken)
    assert {answer.version for answer in load.answers if settled < answer.sent < asked - answer.seconds} == {good}
    assert {answer.version for answer in load.answers if answer.sent > back} == {"1"}
    assert load.by(good, begun)
    assert status(served.workdir).model_version == "1"
    assert (last.version, last.state) == ("1", "full")


def test_a_server_that_does_not_come_up_shows_its_log(served: Served, tmp_path: Path) -> None:
    other = Workdir.open(tmp_path)
    register_champion(other, tmp_path)
    with pytest.raises(InsightEditError, match=r"did not answer within 0.1 seconds; the end of its log .*\.log"):
        up(other, port=0, settings=ServeSettings(startup_seconds=0.1))
    assert status(other).state == "down"


def kept_job(workdir: Workdir, job_id: str) -> JobRecord:
    """A job as the stopped server left it. The page's browser may have a loop of its own in this thread."""

    async def find() -> JobRecord | None:
        settings = ServeSettings()
        store = open_store(None, workdir.root / "state.db", settings.state.bytes)
        found = await JobBook(store, settings.state, settings.limits).find("", job_id)
        await store.close()
        return found

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(asyncio.run, find()).result()
    assert found is not None
    return found


def told_until_nobody_listens(url: str) -> list[httpx.Response]:
    """What others are told who ask for edits, not waiting for one another, until the server is gone."""
    fields = {"prompt": PROMPT, "num_inference_steps": "1"}

    def ask() -> httpx.Response | None:
        with suppress(httpx.TransportError):
            return httpx.post(f"{url}/v1/images/edits", data=fields, files={"image": png(picture())}, timeout=60)
        return None

    asked: list[Future[httpx.Response | None]] = []
    with ThreadPoolExecutor(32) as pool:
        while not any(one.done() and one.result() is None for one in asked):
            asked.append(pool.submit(ask))
            time.sleep(0.1)
    return [told for one in asked if (told := one.result()) is not None]


def test_down_finishes_what_is_in_hand_and_leaves_nothing(served: Served) -> None:
    processes = psutil.Process(served.status.pid).children(recursive=True)
    undisturbed = edit(served, picture(), num_inference_steps=200)
    answers: list[tuple[bytes, ...]] = []

    def ask() -> None:
        url, once = served_url(served.workdir), Patience(retries=0)
        answers.append(
            edit_over_http(url, png(picture()), PROMPT, patience=once, seed=7, n=8, num_inference_steps=200).images
        )

    worker = threading.Thread(target=ask)
    worker.start()
    while "insightedit_edit_in_flight 1.0" not in httpx.get(f"{served_url(served.workdir)}/metrics").text:
        time.sleep(0.05)
    jobs = JobClient(served_url(served.workdir))
    jobs.submit(png(picture()), PROMPT, job_id="stopped", n=10, num_inference_steps=200)
    while jobs.poll("stopped").status == "queued":
        time.sleep(0.05)
    with ThreadPoolExecutor(1) as pool:
        others_told = pool.submit(told_until_nobody_listens, str(served.status.url))
        assert down(served.workdir).state == "down"
        told = others_told.result()
    worker.join()
    ((first, *others),) = answers
    assert (first, len(others)) == (undisturbed, 7)
    assert {answer.status_code for answer in told} <= {200, 503}
    refused = [answer for answer in told if answer.status_code == 503]
    assert {answer.json()["error"]["code"] for answer in refused} == {"stopping"}
    assert {answer.headers["retry-after"] for answer in refused} == {"2"}
    assert told[-1] in refused
    left = kept_job(served.workdir, "stopped")
    assert left.owner == "", "the next server would wait for this one's lease"
    assert left.status == "queued"
    assert not [process for process in processes if process.is_running()]
    assert status(served.workdir).state == "down"
    with pytest.raises(httpx.ConnectError):
        httpx.get(str(served.status.url))
    assert down(served.workdir).state == "down"
