"""The judge that asks a local model: a tiny LLaVA in its real layout, through transformers' own generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made_edits import VALUES, made_edits, values_of
from tiny_models import build_sources
from transformers import AutoTokenizer, GenerationConfig

from insightedit.platform.chat import Answer, NoReply, Reply, Turn
from insightedit.platform.chat.config import LocalModelConfig
from insightedit.platform.chat.local import LocalChat
from insightedit.platform.errors import InsightEditError
from insightedit.platform.judges import Failed
from insightedit.platform.judges.choosing import build_judge
from insightedit.platform.workdir import Workdir

ANSWER = json.dumps({aspect: {"explanation": "As seen.", "score": value} for aspect, value in VALUES.items()})


@pytest.fixture(scope="module")
def babbling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing."""
    return Path(build_sources(tmp_path_factory.mktemp("sources")).mllm)


@pytest.fixture(scope="module")
def steered(babbling: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose generation config makes it write `ANSWER`, whatever it is asked."""
    folder = tmp_path_factory.mktemp("steered") / "mllm"
    shutil.copytree(babbling, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = [*tokenizer(ANSWER, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    # After the first n tokens of the answer the next one is all but certain: of several beginnings that fit, the
    # longest has the most weight.
    bias = [[ids[: n + 1], 100.0 * (n + 1)] for n in range(len(ids))]
    GenerationConfig(sequence_bias=bias, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    return folder


def test_what_a_model_that_knows_nothing_says_is_a_failure(babbling: Path, tmp_path: Path) -> None:
    judge = build_judge(LocalModelConfig(local=str(babbling), max_tokens=12, batch=3), Workdir.open(tmp_path))
    verdicts = judge.judge(made_edits(2))
    assert all(isinstance(verdict, Failed) and verdict.reason in ("unparsable", "empty") for verdict in verdicts)
    assert judge.costs.failures.total() == 2
    assert judge.costs.requests == 4 + judge.costs.repairs
    assert judge.costs.prompt_tokens > 1000
    assert 0 < judge.costs.completion_tokens <= 12 * judge.costs.requests


def test_a_model_that_answers_well_gives_scores_that_are_kept(
    steered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = LocalModelConfig(local=str(steered), batch=2), Workdir.open(tmp_path)
    judge = build_judge(config, workdir)
    assert [values_of(verdict) for verdict in judge.judge(made_edits(1))] == [VALUES]
    assert (judge.costs.requests, judge.costs.repairs) == (2, 0)
    # What was answered needs no model any more.
    monkeypatch.setattr("insightedit.platform.chat.local.load_mllm", None)
    again = build_judge(config, workdir)
    assert [values_of(verdict) for verdict in again.judge(made_edits(1))] == [VALUES]
    assert (again.costs.requests, again.costs.cached) == (0, 2)


def test_what_is_asked_together_is_answered_as_if_alone(babbling: Path) -> None:
    """Prompts of different lengths and numbers of pictures in one batch."""
    pictures = [edit.edit for edit in made_edits(3)]
    conversations = [
        (Turn("user", "remove it", (pictures[0],)),),
        (Turn("user", "what is left of the red circle?", (pictures[1], pictures[2])),),
        (Turn("user", "remove", (pictures[2],)), Turn("assistant", "circle"), Turn("user", "the red circle")),
    ]

    def answers(batch: int) -> dict[int, Answer]:
        found: dict[int, Answer] = {}
        chat = LocalChat(LocalModelConfig(local=str(babbling), max_tokens=8, batch=batch))
        chat.ask(conversations, lambda number, answer: found.update({number: answer}))
        return found

    alone = answers(1)
    assert sorted(alone) == [0, 1, 2]
    assert answers(3) == alone
    assert len({answer.text for answer in alone.values() if isinstance(answer, Reply)}) > 1


def test_a_conversation_that_the_model_cannot_take_fails_alone(babbling: Path) -> None:
    """A picture's place in the text of the user's own: more places than pictures."""
    found: list[Answer] = []
    chat = LocalChat(LocalModelConfig(local=str(babbling), max_tokens=4))
    (edit,) = made_edits(1)
    asked = [(Turn("user", text, (edit.edit,)),) for text in ("<image> <image>", "remove it")]
    chat.ask(asked, lambda _, answer: found.append(answer))
    assert isinstance(found[0], NoReply)
    assert found[0].reason == "rejected"
    assert isinstance(found[1], Reply)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("", "there is no such folder; name a folder or a hub id"),
        ("chat_template.jinja", "whose processor has no chat template"),
        ("model.safetensors", "local is .*mllm, and its weights cannot be loaded"),
        ("config.json", "local is"),
    ],
)
def test_a_model_that_cannot_be_asked_is_named(babbling: Path, tmp_path: Path, lost: str, words: str) -> None:
    folder = tmp_path / "mllm"
    if lost:
        shutil.copytree(babbling, folder)
        (folder / lost).unlink()
    with pytest.raises(InsightEditError, match=words) as caught:
        LocalChat(LocalModelConfig(local=str(folder))).ask([(Turn("user", "hello"),)], lambda *_: None)
    assert "\n" not in str(caught.value)
