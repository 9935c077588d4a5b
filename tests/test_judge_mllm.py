"""The judge that asks a language model, against an endpoint that misbehaves as real ones do."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from made_edits import VALUES, made_edits, values_of
from stand_in_endpoint import Asked, Drop, React, Reaction, Say, Stall, StandIn, Status, in_turn

from insightedit.platform.chat.cache import AnswerCache
from insightedit.platform.chat.config import EndpointConfig
from insightedit.platform.chat.endpoint import LONGEST_PAUSE, Backoff, ChatEndpoint, retry_after
from insightedit.platform.errors import UsageError
from insightedit.platform.judges import ASPECTS, Failed, MadeEdit, Scores
from insightedit.platform.judges.choosing import CACHE, build_judge
from insightedit.platform.judges.mllm import MllmJudge
from insightedit.platform.judges.prompts import CONSISTENCY, QUALITY, QUESTIONS, Question
from insightedit.platform.workdir import Workdir

QUICK = Backoff(first=0.001, longest=0.002)


def question_of(asked: Asked) -> Question:
    return next(
        question for question in QUESTIONS if all(f"{aspect}:" in asked.texts[0] for aspect in question.aspects)
    )


def answer_to(asked: Asked, values: dict[str, int] = VALUES) -> str:
    aspects = question_of(asked).aspects
    return json.dumps({name: {"explanation": f"On {name}.", "score": values[name]} for name in aspects})


def good(asked: Asked) -> Reaction:
    return Say(answer_to(asked))


def after(*reactions: Reaction, then: React = good) -> React:
    """To each conversation these reactions first, and then good ones."""
    first = in_turn(*reactions, Say(None))
    return lambda asked: then(asked) if (one := first(asked)) == Say(None) else one


def open_judge(url: str, folder: Path, **settings: Any) -> MllmJudge:
    config = EndpointConfig.model_validate(
        {"endpoint": url, "model": "eyes", "timeout": 30.0, "retries": 3, **settings}
    )
    return MllmJudge(ChatEndpoint(config, QUICK), AnswerCache(folder))


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_four_scores_with_explanations_come_from_two_questions(tmp_path: Path) -> None:
    (edit,) = made_edits(1)
    told: list[tuple[int, int]] = []
    with StandIn(good) as endpoint:
        judge = open_judge(endpoint.url, tmp_path, options={"seed": 7})
        (verdict,) = judge.judge([edit], lambda done, of: told.append((done, of)))
    assert values_of(verdict) == VALUES
    assert isinstance(verdict, Scores)
    assert verdict.viescore == pytest.approx(0.7)
    assert {aspect: getattr(verdict, aspect).explanation for aspect in ASPECTS} == {a: f"On {a}." for a in ASPECTS}
    assert told == [(0, 1), (1, 1)]
    assert judge.costs.to_json() == {
        "requests": 2, "retries": 0, "repairs": 0, "cached": 0, "prompt_tokens": 200, "completion_tokens": 20,
        "failures": {},
    }  # fmt: skip
    by_question = {question_of(asked).name: asked for asked in endpoint.asked}
    consistency, quality = by_question["consistency"], by_question["quality"]
    assert {(a.body["model"], a.body["temperature"], a.body["seed"]) for a in endpoint.asked} == {("eyes", 0.0, 7)}
    assert r'"remove \"it\" 0"' in consistency.texts[0]
    assert '"it' not in quality.texts[0].replace("\\", "")
    # Tiny pictures are enlarged, their pixels unchanged.
    large = [np.repeat(np.repeat(picture, 28, axis=0), 28, axis=1) for picture in (edit.source, edit.edit)]
    assert np.array_equal(consistency.pictures, large)
    assert np.array_equal(quality.pictures, large[1:])


def test_pictures_are_shown_no_larger_than_set_and_side_by_side_at_one_size(tmp_path: Path) -> None:
    source, edit = np.zeros((300, 600, 3), np.uint8), np.zeros((512, 512, 3), np.uint8)
    with StandIn(good) as endpoint:
        judge = open_judge(endpoint.url, tmp_path, picture_side=400)
        judge.judge([MadeEdit(source=source, edit=edit, instruction="x")])
    sizes = {question_of(asked).name: [picture.shape[:2] for picture in asked.pictures] for asked in endpoint.asked}
    assert sizes == {"consistency": [(200, 400), (200, 400)], "quality": [(400, 400)]}


def test_the_same_question_is_asked_once(tmp_path: Path) -> None:
    """The same picture under another request is another edit of the same quality."""
    first, other = made_edits(2)
    again = MadeEdit(source=first.source, edit=first.edit, instruction="another request")
    with StandIn(good) as endpoint:
        judge = open_judge(endpoint.url, tmp_path)
        verdicts = judge.judge([first, first, again, other])
        assert [values_of(verdict) for verdict in verdicts] == [VALUES] * 4
        asked = Counter(question_of(asked).name for asked in endpoint.asked)
        assert asked == {"consistency": 3, "quality": 2}
        assert judge.judge([]) == []
        assert judge.judge([other, first]) == verdicts[:2]
    assert len(endpoint.asked) == 5
    assert judge.costs.cached == 4


def test_answers_to_other_settings_or_another_model_are_other_answers(tmp_path: Path) -> None:
    edits = made_edits(1)
    with StandIn(good) as endpoint:
        asked = 0
        for settings in ({}, {"temperature": 1.0}, {"options": {"seed": 1}}, {"picture_side": 512}):
            judge = open_judge(endpoint.url, tmp_path, **settings)
            judge.judge(edits)
            asked += 2
            assert len(endpoint.asked) == asked
        identities = {open_judge(endpoint.url, tmp_path, **one).identity for one in ({}, {"temperature": 1.0})}
        assert len(identities) == 2
        # What changes no answer leaves them as they are, the address too.
        moved = endpoint.url.replace("127.0.0.1", "localhost")
        open_judge(moved, tmp_path, parallel=1, timeout=9.0, retries=0).judge(edits)
    assert len(endpoint.asked) == asked


def test_no_more_are_asked_at_a_time_than_set(tmp_path: Path) -> None:
    def slow(asked: Asked) -> Reaction:
        time.sleep(0.02)
        return good(asked)

    with StandIn(slow) as endpoint:
        open_judge(endpoint.url, tmp_path, parallel=3).judge(made_edits(10))
    assert endpoint.at_once == 3
    assert len(endpoint.asked) == 20


# -- an endpoint that misbehaves --------------------------------------------------------------------------------------


def patience(hindrance: Reaction) -> float:
    """A timeout in seconds: as long as a busy machine may need for a good answer, or shorter than a stall."""
    return 1.0 if isinstance(hindrance, Stall) else 30.0


HTML = Status(200, {"content-type": "text/html"}, b"<html>Gateway is restarting</html>")


@pytest.mark.parametrize(
    "hindrance",
    [
        pytest.param(Status(429, {"retry-after": "0"}), id="429"),
        pytest.param(Status(429, {"retry-after-ms": "3"}), id="429 in milliseconds"),
        pytest.param(Status(429, body=b""), id="429 without a word"),
        pytest.param(Status(500, body=b"Internal Server Error"), id="500"),
        pytest.param(Status(503, {"retry-after": formatdate(0)}), id="503 until a date"),
        pytest.param(Status(529), id="529"),
        pytest.param(Drop(), id="dropped"),
        pytest.param(Drop(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"), id="dropped in the middle"),
        pytest.param(Drop(b"garbage\r\n\r\n"), id="no HTTP"),
        pytest.param(Stall(1.5), id="timeout"),
        pytest.param(HTML, id="HTML"),
        pytest.param(Status(200, body=b'{"choices": []}'), id="no choices"),
        pytest.param(Status(200, body=b'{"choices": null, "usage": null}'), id="null for choices"),
        pytest.param(Status(200, body=b'{"error": {"message": "overloaded"}}'), id="an error as 200"),
        pytest.param(Status(200, body=b'{"choices": [{"message": nul'), id="half a completion"),
        pytest.param(Say(""), id="nothing said"),
        pytest.param(Say(" \n"), id="blanks said"),
    ],
)
def test_what_passes_is_tried_again(hindrance: Reaction, tmp_path: Path) -> None:
    with StandIn(after(hindrance, hindrance)) as endpoint:
        judge = open_judge(endpoint.url, tmp_path, timeout=patience(hindrance))
        verdicts = judge.judge(made_edits(2))
    assert [values_of(verdict) for verdict in verdicts] == [VALUES] * 2
    assert (judge.costs.requests, judge.costs.retries, judge.costs.repairs) == (12, 8, 0)
    assert not judge.costs.failures


@pytest.mark.parametrize(
    ("hindrance", "reason", "detail"),
    [
        (Status(429, {"retry-after": "0"}), "overloaded", "HTTP 429: not now"),
        (Status(500, body=b"Internal\nServer Error"), "server_error", "HTTP 500: Internal Server Error"),
        (Drop(), "unreachable", "The connection broke"),
        (Stall(1.5), "timeout", "within 1 seconds"),
        (HTML, "server_error", "no chat completion: <html>Gateway"),
        (Status(200, body=b'{"choices": []}'), "empty", "no choices"),
        (Say("", finish_reason="length"), "empty", "max_tokens"),
    ],
)
def test_what_does_not_pass_is_counted_and_asked_again_by_the_next_run(
    hindrance: Reaction, reason: str, detail: str, tmp_path: Path
) -> None:
    edits = made_edits(2)
    with StandIn(lambda asked: hindrance if question_of(asked) is QUALITY else good(asked)) as endpoint:
        judge = open_judge(endpoint.url, tmp_path, timeout=patience(hindrance), retries=1)
        verdicts = judge.judge(edits)
        assert all(isinstance(one, Failed) and one.reason == reason and detail in one.detail for one in verdicts)
        assert judge.costs.failures == {reason: 2}
        assert judge.costs.requests == 6
        endpoint.react = good
        again = open_judge(endpoint.url, tmp_path)
        assert [values_of(verdict) for verdict in again.judge(edits)] == [VALUES] * 2
    assert (again.costs.requests, again.costs.cached) == (2, 2)


@pytest.mark.parametrize(
    ("hindrance", "reason", "detail"),
    [
        (Status(400, body=b'{"error": "image too large"}'), "rejected", "HTTP 400: image too large"),
        (Status(422, body=b'{"detail": [1]}'), "rejected", 'HTTP 422: {"detail": [1]}'),
        (Status(413, body=b""), "rejected", "HTTP 413: nothing"),
        (Say(None, refusal="I cannot\njudge people."), "refused", "declined: I cannot judge people."),
        (Say(None, finish_reason="content_filter"), "refused", "filter"),
    ],
)
def test_what_asking_again_cannot_change_is_not_asked_again(
    hindrance: Reaction, reason: str, detail: str, tmp_path: Path
) -> None:
    with StandIn(lambda asked: hindrance if 'it\\" 1"' in asked.texts[0] else good(asked)) as endpoint:
        judge = open_judge(endpoint.url, tmp_path)
        first, second = judge.judge(made_edits(2))
    assert values_of(first) == VALUES
    assert isinstance(second, Failed)
    assert (second.reason, judge.costs.failures) == (reason, {reason: 1})
    assert detail in second.detail
    assert judge.costs.requests == 4


def test_where_the_endpoint_says_how_long_everybody_waits(tmp_path: Path) -> None:
    came: list[float] = []

    def react(asked: Asked) -> Reaction:
        came.append(time.monotonic())
        return Status(429, {"retry-after-ms": "200"}) if len(came) == 1 else good(asked)

    with StandIn(react) as endpoint:
        open_judge(endpoint.url, tmp_path, parallel=1).judge(made_edits(1))
    assert came[1] - came[0] >= 0.2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "86400"}, LONGEST_PAUSE),
        ({"retry-after": "inf"}, LONGEST_PAUSE),
        ({"retry-after": "nan"}, LONGEST_PAUSE),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "later"}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(httpx.Headers(headers)) == seconds


def test_retry_after_may_be_a_date() -> None:
    seconds = retry_after(httpx.Headers({"retry-after": formatdate(time.time() + 30, usegmt=True)}))
    assert seconds is not None
    assert 25 < seconds <= 30


# -- answers that must be put right -----------------------------------------------------------------------------------


def test_a_wrong_answer_is_complained_about_once_and_put_right(tmp_path: Path) -> None:
    wrong = dict.fromkeys(VALUES, 9)
    with StandIn(lambda asked: Say(answer_to(asked, VALUES if len(asked.texts) == 3 else wrong))) as endpoint:
        judge = open_judge(endpoint.url, tmp_path)
        (verdict,) = judge.judge(made_edits(1))
    assert values_of(verdict) == VALUES
    assert (judge.costs.requests, judge.costs.retries, judge.costs.repairs) == (4, 0, 2)
    repair = next(one for one in endpoint.asked if len(one.texts) == 3 and question_of(one) is CONSISTENCY)
    assert [message["role"] for message in repair.body["messages"]] == ["user", "assistant", "user"]
    assert repair.texts[1] == json.dumps(
        {name: {"explanation": f"On {name}.", "score": 9} for name in CONSISTENCY.aspects}
    )
    assert "the score of instruction_adherence is 9, and must be a whole number from 0 to 5." in repair.texts[2]
    assert len(repair.pictures) == 2


@pytest.mark.parametrize(
    "text",
    ["I'm sorry, I can't assist with that.", '{"naturalness": {"explanation": "The li', '{"naturalness": 8}' * 5000],
    ids=["refusal in prose", "half a JSON", "endless"],
)
def test_an_answer_that_stays_wrong_is_a_failure(text: str, tmp_path: Path) -> None:
    with StandIn(lambda asked: Say(text) if question_of(asked) is QUALITY else good(asked)) as endpoint:
        judge = open_judge(endpoint.url, tmp_path)
        (verdict,) = judge.judge(made_edits(1))
    assert isinstance(verdict, Failed)
    assert verdict.reason == "unparsable"
    assert verdict.detail.startswith("Asked twice, the model gave no valid scores: ")
    assert (judge.costs.requests, judge.costs.repairs, judge.costs.failures) == (3, 1, {"unparsable": 1})
    assert max(len(text) for asked in endpoint.asked for text in asked.texts) < 6000


def test_content_may_come_in_parts_and_usage_in_none(tmp_path: Path) -> None:
    odd: list[Any] = [None, {}, {"prompt_tokens": None, "completion_tokens": "many"}, "none"]

    def react(asked: Asked) -> Reaction:
        return Say(answer_to(asked), parts=True, usage=odd[len(endpoint.asked) % len(odd)])

    with StandIn(react) as endpoint:
        judge = open_judge(endpoint.url, tmp_path)
        assert [values_of(verdict) for verdict in judge.judge(made_edits(3))] == [VALUES] * 3
    assert (judge.costs.prompt_tokens, judge.costs.completion_tokens) == (0, 0)


def test_a_storm_of_all_of_it_loses_nothing(tmp_path: Path) -> None:
    """Every conversation meets misbehaviours of its own, and every edit has its scores or its reason in the end."""
    edits = made_edits(25)

    def storm(asked: Asked) -> Reaction:
        text = answer_to(asked)
        rng = random.Random(f"{asked.question}{len(endpoint.asked)}")
        return rng.choice(
            [
                Say(text), Say(text, parts=True), Say(f"```json\n{text}\n```"), Say(f"Here you are:\n{text}\nBye."),
                Say(text.replace('"', "'")), Say(text.replace("}}", "},}")), Say(text.replace("score", "rating")),
                Say(text[: len(text) // 2]), Say(answer_to(asked, dict.fromkeys(VALUES, 6))), Say("No."), Say(None),
                Status(429, {"retry-after": "0"}), Status(500), Status(502, body=b""), Drop(), HTML,
            ]
        )  # fmt: skip

    with StandIn(storm) as endpoint:
        judge = open_judge(endpoint.url, tmp_path, retries=4)
        verdicts = judge.judge(edits)
        scored = [verdict for verdict in verdicts if isinstance(verdict, Scores)]
        failed = Counter(verdict.reason for verdict in verdicts if isinstance(verdict, Failed))
        assert all(values_of(verdict) == VALUES for verdict in scored)
        assert judge.costs.failures == failed
        assert len(scored) + failed.total() == 25
        assert len(scored) > 5
        assert judge.costs.requests == len(endpoint.asked)
        endpoint.react = good
        assert [values_of(verdict) for verdict in open_judge(endpoint.url, tmp_path).judge(edits)] == [VALUES] * 25


# -- keys and addresses -----------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("EYES_KEY", "sk-secret\n")
    with StandIn(good) as endpoint:
        judge = open_judge(endpoint.url, tmp_path, api_key_env="EYES_KEY")
        judge.judge(made_edits(1))
    assert {asked.headers["authorization"] for asked in endpoint.asked} == {"Bearer sk-secret"}
    kept = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert "explanation" in kept
    assert "secret" not in kept + caplog.text + judge.identity
    monkeypatch.delenv("EYES_KEY")
    with pytest.raises(UsageError, match="EYES_KEY is not set"):
        open_judge(endpoint.url, tmp_path, api_key_env="EYES_KEY")
    monkeypatch.setenv("EYES_KEY", "two\nlines")
    with pytest.raises(UsageError, match="EYES_KEY holds no API key") as caught:
        open_judge(endpoint.url, tmp_path, api_key_env="EYES_KEY")
    assert "two" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "settings", "words"),
    [
        (401, {}, "wants an API key; name the variable that has it in api_key_env"),
        (401, {"api_key_env": "EYES_KEY"}, "put another one into EYES_KEY"),
        (403, {"api_key_env": "EYES_KEY"}, "put another one into EYES_KEY"),
        (404, {}, "has no model eyes"),
    ],
)
def test_an_endpoint_that_lets_nobody_in_stops_the_run_at_once(
    status: int, settings: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYES_KEY", "k")
    with StandIn(in_turn(Status(status))) as endpoint, pytest.raises(UsageError, match=words):
        open_judge(endpoint.url, tmp_path, parallel=2, **settings).judge(made_edits(30))
    assert len(endpoint.asked) <= 2


def test_a_key_that_ends_in_the_middle_fails_the_rest_and_keeps_what_there_is(tmp_path: Path) -> None:
    with StandIn(lambda asked: good(asked) if len(endpoint.asked) <= 10 else Status(401)) as endpoint:
        judge = open_judge(endpoint.url, tmp_path, parallel=1)
        verdicts = judge.judge(made_edits(10))
    assert [values_of(verdict) for verdict in verdicts[:5]] == [VALUES] * 5
    assert judge.costs.failures == {"rejected": 5}


def test_nobody_listens(tmp_path: Path) -> None:
    with StandIn(good) as endpoint:
        gone = endpoint.url
    judge = open_judge(gone, tmp_path, retries=1)
    (verdict,) = judge.judge(made_edits(1))
    assert isinstance(verdict, Failed)
    assert verdict.reason == "unreachable"
    assert judge.costs.requests == 4


# -- what is kept -----------------------------------------------------------------------------------------------------

JUDGING = """
import sys
from pathlib import Path
import numpy as np
from insightedit.platform.chat.endpoint import ChatEndpoint
from insightedit.platform.chat.config import EndpointConfig
from insightedit.platform.judges import MadeEdit
from insightedit.platform.chat.cache import AnswerCache
from insightedit.platform.judges.mllm import MllmJudge
url, folder, pictures, parallel = sys.argv[1:]
pairs = enumerate(np.load(pictures))
edits = [MadeEdit(source=pair[0], edit=pair[1], instruction=f'remove "it" {number}') for number, pair in pairs]
config = EndpointConfig(endpoint=url, model="eyes", parallel=parallel)
MllmJudge(ChatEndpoint(config), AnswerCache(Path(folder))).judge(edits)
"""


def judging(url: str, folder: Path, edits: list[MadeEdit], parallel: int) -> subprocess.Popen[bytes]:
    """Judging of `made_edits` in a process of its own."""
    pictures = folder.with_suffix(".npy")
    np.save(pictures, np.stack([(edit.source, edit.edit) for edit in edits]))
    return subprocess.Popen([sys.executable, "-c", JUDGING, url, str(folder), str(pictures), str(parallel)])


def test_a_run_killed_in_the_middle_resumes_asking_only_what_is_missing(tmp_path: Path) -> None:
    """The process is killed when it asks for the 13th time: it has had 12 answers by then, and kept them."""
    edits, folder = made_edits(10), tmp_path / "kept"

    def react(asked: Asked) -> Reaction:
        if len(endpoint.asked) > 12:
            process.send_signal(signal.SIGKILL)
            return Drop()
        return good(asked)

    with StandIn(react) as endpoint:
        process = judging(endpoint.url, folder, edits, parallel=1)
        assert process.wait(60) == -signal.SIGKILL
        before = len(endpoint.asked)
        endpoint.react = good
        judge = open_judge(endpoint.url, folder)
        assert [values_of(verdict) for verdict in judge.judge(edits)] == [VALUES] * 10
    assert (len(endpoint.asked) - before, judge.costs.cached) == (8, 12)


def test_processes_share_what_is_kept(tmp_path: Path) -> None:
    edits, folder = made_edits(15), tmp_path / "kept"
    with StandIn(good) as endpoint:
        processes = [judging(endpoint.url, folder, edits, parallel=4) for _ in range(2)]
        assert [process.wait(60) for process in processes] == [0, 0]
        asked = len(endpoint.asked)
        kept = [path for path in folder.rglob("*") if path.is_file()]
        assert (len(kept), {path.suffix for path in kept}) == (30, {".json"})
        judge = open_judge(endpoint.url, folder)
        assert [values_of(verdict) for verdict in judge.judge(edits)] == [VALUES] * 15
    assert len(endpoint.asked) == asked


@pytest.mark.parametrize("damage", [b"", b'{"model": "eyes', b"\xff\xfe", b'{"model": "m", "text": "{}"}'])
def test_a_damaged_answer_is_asked_for_again(damage: bytes, tmp_path: Path) -> None:
    edits = made_edits(1)
    with StandIn(good) as endpoint:
        open_judge(endpoint.url, tmp_path).judge(edits)
        next(tmp_path.rglob("*.json")).write_bytes(damage)
        assert values_of(open_judge(endpoint.url, tmp_path).judge(edits)[0]) == VALUES
    assert len(endpoint.asked) == 3


def test_a_config_names_the_judge(tmp_path: Path) -> None:
    workdir = Workdir.open(tmp_path / "work")
    assert build_judge("shapes", workdir).identity == "shapes"
    with StandIn(good) as endpoint:
        judge = build_judge(EndpointConfig(endpoint=endpoint.url, model="eyes"), workdir)
        assert values_of(judge.judge(made_edits(1))[0]) == VALUES
    assert judge.identity.startswith("eyes ")
    assert len(list((workdir.root / CACHE).rglob("*.json"))) == 2
