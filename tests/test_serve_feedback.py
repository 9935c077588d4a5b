"""What users say of their edits: kept with consent alone, seen in the live signal, and exported for training."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from test_serve_gateway import encoded, picture, post
from test_serve_trials import NEW, OLD, Gateway, TwoVersions

from insightedit import cli
from insightedit.platform.config import load_preset
from insightedit.platform.datasets.pairs import PairsReader
from insightedit.platform.records import Record, decode_image
from insightedit.platform.workdir import Workdir
from insightedit.serve.feedback import FOLDER, Feedback, kept_feedback
from insightedit.serve.settings import FeedbackSettings


class Site:
    """A gateway whose users are asked."""

    def __init__(self, folder: Path, share: float = 0.0, **settings: Any) -> None:
        self.workdir = Workdir.open(folder / "work")
        self.gateway = Gateway(folder, TwoVersions(share=share), shadow_share=0)
        feedback = FeedbackSettings(**{"consent": True, **settings})
        self.gateway.feedback = Feedback(feedback, self.gateway.store, self.workdir.root / FOLDER)

    def rows(self) -> list[Any]:
        return [row for _, row in kept_feedback(self.workdir.root / FOLDER)]


def say(client: TestClient, answer: Any, verdict: str = "accept", index: int = 0) -> Any:
    said = {"request_id": answer.json()["request_id"], "image_index": index, "verdict": verdict}
    deadline = time.monotonic() + 5
    while (response := client.post("/v1/feedback", json=said)).status_code == 404 and time.monotonic() < deadline:
        time.sleep(0.05)  # The edit waits for its verdict a moment after it is answered.
    return response


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    with site.gateway.client() as client:
        yield client


def test_a_verdict_is_kept_with_what_made_the_edit(site: Site, client: TestClient) -> None:
    assert client.get("/v1/feedback").json() == {"consent": True}
    response = say(client, post(client, seed="5", n="2", prompt="make it dark"), "reject", index=1)
    assert (response.status_code, response.json()) == (200, {"kept": True})
    ((path, row),) = kept_feedback(site.workdir.root / FOLDER)
    assert (row.verdict, row.instruction, row.version, row.seed) == ("reject", "make it dark", OLD, 6)
    source, edit = (path.with_suffix(f".{name}.png").read_bytes() for name in ("source", "edit"))
    assert np.array_equal(decode_image(source), picture())
    assert set(np.unique(decode_image(edit))) == {10}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert 'insightedit_edit_feedback_total{model_version="1",verdict="reject"} 1.0' in client.get("/metrics").text


def test_without_consent_nothing_is_kept(tmp_path: Path) -> None:
    site = Site(tmp_path, consent=False)
    with site.gateway.client() as client:
        answer = post(client)
        assert client.get("/v1/feedback").json() == {"consent": False}
        said = {"request_id": answer.json()["request_id"], "verdict": "accept"}
        response = client.post("/v1/feedback", json=said)
    assert response.status_code == 403
    assert "feedback.consent" in response.json()["error"]["message"]
    assert not (site.workdir.root / FOLDER).exists()


def test_an_edit_has_one_verdict_and_not_for_ever(tmp_path: Path) -> None:
    site = Site(tmp_path, wait_seconds=1.5)
    with site.gateway.client() as client:
        first, second = post(client), post(client)
        assert say(client, first).status_code == 200
        time.sleep(1.6)
        for answer in (first, second):
            said = {"request_id": answer.json()["request_id"], "verdict": "accept"}
            assert client.post("/v1/feedback", json=said).status_code == 404
    assert len(site.rows()) == 1


@pytest.mark.parametrize(
    "said", [{}, {"request_id": "x"}, {"request_id": "x", "verdict": "perhaps"}, {"request_id": 1, "verdict": "accept"}]
)
def test_what_is_no_verdict_is_refused(client: TestClient, said: dict[str, object]) -> None:
    response = client.post("/v1/feedback", json=said)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_verdicts_are_part_of_a_rollouts_evidence(tmp_path: Path) -> None:
    site = Site(tmp_path, share=0.5)
    with site.gateway.client() as client:
        answers = [post(client) for _ in range(12)]
        for answer in answers:
            assert say(client, answer, "reject" if answer.json()["model_version"] == NEW else "accept").is_success
        seen = site.gateway.evidence()
    count = sum(answer.json()["model_version"] == NEW for answer in answers)
    assert (seen.new.accepted, seen.new.rejected, seen.old.accepted) == (0, count, 12 - count)


def test_a_mask_is_part_of_what_is_learnt(site: Site, client: TestClient) -> None:
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[8:16, 8:16] = 0
    mask = np.dstack([np.zeros((32, 32, 3), np.uint8), alpha])
    files = {"image": ("a.png", encoded(picture())), "mask": ("m.png", encoded(mask))}
    answer = client.post("/v1/images/edits", data={"prompt": "x", "size": "64x64"}, files=files)
    assert say(client, answer).status_code == 200
    ((path, _),) = kept_feedback(site.workdir.root / FOLDER)
    edit = decode_image(path.with_suffix(".edit.png").read_bytes())
    assert np.array_equal(edit[:8], picture()[:8])
    assert set(np.unique(edit[8:16, 8:16])) == {10}


def test_accepted_edits_come_out_as_pairs(
    site: Site, client: TestClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for verdict, prompt in (("accept", "make it dark"), ("reject", "no"), ("accept", 'say "\u00e9"')):
        assert say(client, post(client, prompt=prompt, seed="4"), verdict).status_code == 200
    out = tmp_path / "pairs"
    arguments = ["data", "feedback", "--out", str(out), "--workdir", str(site.workdir.root)]
    assert cli.run([*arguments, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"folder": str(out), "pairs": 2, "rejected": 1}
    reader, options = PairsReader(), {"root": str(out)}
    records = [record for entry in reader.entries(options) for record in reader.read(options, entry)]
    assert all(isinstance(record, Record) for record in records), records
    assert [record.instruction for record in records if isinstance(record, Record)] == ["make it dark", 'say "\u00e9"']
    first = records[0]
    assert isinstance(first, Record)
    assert first.target is not None
    assert set(np.unique(decode_image(first.target))) == {10}
    assert json.loads(first.meta)["seed"] == 4
    # The next run's config takes them as they are.
    data = ["data.datasets.users.reader=pairs", f"data.datasets.users.options={{root: {out}}}"]
    config = load_preset("nano", [*data, "stages.2.datasets.users=1"])
    assert config.data.datasets["users"].options["root"] == str(out)
    assert cli.run(arguments) == 2  # It is there.


def test_nothing_accepted_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workdir = Workdir.open(tmp_path / "work")
    assert cli.run(["data", "feedback", "--out", str(tmp_path / "out"), "--workdir", str(workdir.root)]) == 4
    assert "has been accepted" in capfd.readouterr().err
    (workdir.root / FOLDER).mkdir()
    (workdir.root / FOLDER / "a.json").write_text("{")
    assert list(kept_feedback(workdir.root / FOLDER)) == []
