"""Answers as models write them: read right, or invalid, but never read wrong."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest

from insightedit.platform.judges import Score
from insightedit.platform.judges.answers import AnswerError, read_answer
from insightedit.platform.judges.prompts import QUALITY

GOOD = (
    '{"naturalness": {"explanation": "Light fits.", "score": 4}, '
    '"no_artifacts": {"explanation": "A seam.", "score": 2}}'
)
WITH_NEWLINES = GOOD.replace("{", "{\n  ").replace(", ", ",\n  ")
ASPECTS = tuple(QUALITY.aspects)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(GOOD, id="as asked"),
        pytest.param(WITH_NEWLINES, id="over several lines"),
        pytest.param(f"```json\n{GOOD}\n```", id="fence"),
        pytest.param(f"```\n{WITH_NEWLINES}\n```", id="fence without a language"),
        pytest.param(f"```JSON\n{GOOD}", id="fence left open"),
        pytest.param(f"Sure! Here is my assessment:\n\n{GOOD}\n\nLet me know if you need more.", id="prose around"),
        pytest.param(f"Grades are in {{braces}}:\n{GOOD}", id="braces in prose"),
        pytest.param(f"  \ufeff\n{GOOD}\n", id="byte order mark"),
        pytest.param(f"<think>Maybe {GOOD.replace('4', '1')}? No.</think>\n{GOOD}", id="thought aloud"),
        pytest.param(f"{GOOD.replace('4', '0')}\nOn reflection:\n{GOOD}", id="a draft before"),
        pytest.param(GOOD.replace("}}", "},}"), id="trailing comma"),
        pytest.param(GOOD.replace("4}", "4,}"), id="trailing comma inside"),
        pytest.param(GOOD.replace('"', "'"), id="single quotes"),
        pytest.param(re.sub('"(.*?)"', "\u201c\\1\u201d", GOOD), id="typographic quotes"),
        pytest.param(GOOD.replace('"naturalness"', "naturalness").replace('"score"', "score"), id="no quotes on names"),
        pytest.param(GOOD[:-1], id="last brace missing"),
        pytest.param(GOOD[:-2] + "\n```", id="last braces missing in a fence"),
        pytest.param(GOOD.replace("4}", '"4"}'), id="score as a string"),
        pytest.param(GOOD.replace("4}", '"4/5"}').replace("2}", '"2 / 5"}'), id="x/5"),
        pytest.param(GOOD.replace("4}", "4/5}"), id="x/5 without quotes"),
        pytest.param(GOOD.replace("4}", "4 / 5}"), id="x / 5 without quotes"),
        pytest.param(GOOD.replace("4}", '"4 out of 5"}'), id="x out of 5"),
        pytest.param(GOOD.replace("4}", '"4 points"}'), id="x points"),
        pytest.param(GOOD.replace("4}", "4.0}").replace("2}", '"2.0"}'), id="floats that are integers"),
        pytest.param(GOOD.replace("naturalness", "Naturalness").replace("no_artifacts", "No-Artifacts"), id="names"),
        pytest.param(GOOD.replace("score", "Score").replace("explanation", "reasoning"), id="names inside"),
        pytest.param(f'{{"scores": {GOOD}}}', id="wrapped"),
        pytest.param(f"[{GOOD}]", id="in a list"),
        pytest.param(GOOD.replace("}, ", "}}\n{"), id="an object each"),
        pytest.param(f"[{GOOD.replace('}, ', '}}, {')}]", id="a list of an object each"),
        pytest.param(GOOD.replace("}, ", "}\n"), id="comma missing"),
        pytest.param(GOOD.replace("4}", "4 }").replace("}, ", "}, // the second\n"), id="a comment"),
        pytest.param(
            '{"naturalness": 4, "naturalness_explanation": "Light fits.",'
            ' "no_artifacts": 2, "no_artifacts_reason": "A seam."}',
            id="flat",
        ),
        pytest.param(
            '{"naturalness_score": 4, "naturalness_reasoning": "Light fits.",'
            ' "no_artifacts_score": "2/5", "no_artifacts_reasoning": ["A", "seam."]}',
            id="flat with names of scores",
        ),
        pytest.param(
            '{"explanations": {"naturalness": "Light fits.", "no_artifacts": "A seam."},'
            ' "scores": {"naturalness": 4, "no_artifacts": 2}}',
            id="scores and explanations apart",
        ),
        pytest.param(
            '{"scores": {"naturalness": 4, "no_artifacts": 2},'
            ' "reasoning": {"naturalness": "Light fits.", "no_artifacts": "A seam."}}',
            id="reasoning after scores",
        ),
    ],
)
def test_scores_are_found(text: str) -> None:
    scores = read_answer(text, ASPECTS)
    assert scores == {"naturalness": Score(4, "Light fits."), "no_artifacts": Score(2, "A seam.")}


@pytest.mark.parametrize(
    ("text", "naturalness"),
    [
        ('{"naturalness": {"score": 0}, "no_artifacts": {"score": 2}}', Score(0, "")),
        ('{"naturalness": 5, "no_artifacts": 2}', Score(5, "")),
        (GOOD.replace("Light fits.", r"A \"soft\" light: 3/10 of it"), Score(4, 'A "soft" light: 3/10 of it')),
        (GOOD.replace("Light fits.", 'The "soft" light fits.'), Score(4, 'The "soft" light fits.')),
        (GOOD.replace("Light fits.", "It's \u5149, {score: 1}."), Score(4, "It's \u5149, {score: 1}.")),
        (GOOD.replace("Light fits.", "Line one.\nLine two."), Score(4, "Line one.\nLine two.")),
        ("{'naturalness': {'explanation': 'It's fine', 'score': 3}, 'no_artifacts': 2}", Score(3, "It's fine")),
    ],
)
def test_explanations_are_kept_as_they_were_written(text: str, naturalness: Score) -> None:
    assert read_answer(text, ASPECTS)["naturalness"] == naturalness


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no JSON object"),
        ("I'm sorry, but I can't help with that.", "no JSON object"),
        ("Naturalness: 4\nNo artifacts: 2", "no JSON object"),
        ("{}", "no JSON object"),
        ("{" * 400, "no JSON object"),
        ("[4, 2]", "no JSON object"),
        (GOOD.replace("4}", "7}"), "naturalness is 7"),
        (GOOD.replace("2}", "-1}"), "no_artifacts is -1"),
        (GOOD.replace("4}", "10}"), "naturalness is 10"),
        (GOOD.replace("4}", "80}"), "naturalness is 80"),
        (GOOD.replace("4}", "3.5}"), "naturalness is 3.5"),
        (GOOD.replace("4}", '"4.5/5"}'), "naturalness is '4.5/5'"),
        (GOOD.replace("4}", '"8/10"}'), "naturalness is '8/10'"),
        (GOOD.replace("4}", "4/10}"), "naturalness is '4/10'"),
        (GOOD.replace("4}", "4 / 10}"), "naturalness is '4 / 10"),
        (GOOD.replace("4}", "3 or 4}"), "naturalness is '3 or 4"),
        (GOOD.replace("4}", "3-4}"), "naturalness is '3-4"),
        (GOOD.replace("4}", "4 /* of 10 */}"), "naturalness is '4 "),
        (GOOD.replace("4}", '"high"}'), "naturalness is 'high'"),
        (GOOD.replace("4}", "true}"), "naturalness is True"),
        (GOOD.replace("4}", "NaN}"), "naturalness is nan"),
        (GOOD.replace("4}", "1e999}"), "naturalness is inf"),
        (GOOD.replace("4}", "[4]}"), r"naturalness is \[4\]"),
        (GOOD.replace("4}", "null}"), "naturalness is missing"),
        (GOOD.replace("4}", '""}'), "naturalness is missing"),
        (GOOD.replace("4}", "...}"), "naturalness is"),
        (GOOD.replace("no_artifacts", "sharpness"), "no_artifacts is missing"),
        (GOOD[: GOOD.index('"A seam')], "no_artifacts is missing"),
        (GOOD[: GOOD.index("4}")], "naturalness is missing"),
        (GOOD[:-2], "no_artifacts is missing"),  # the 2 may have become 2.5
        (GOOD[:-2] + ".", "no_artifacts is missing"),
        (f"<think>{GOOD}", "no JSON object"),
        ('{"score": [4, 2], "reasoning": "fine"}', "naturalness is missing"),
        ('{"instruction_adherence": 4, "non_overediting": 2}', "naturalness is missing"),
    ],
)
def test_what_holds_no_valid_scores_is_complained_about(text: str, complaint: str) -> None:
    with pytest.raises(AnswerError, match=complaint) as caught:
        read_answer(text, ASPECTS)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_half_an_answer_is_never_read_as_another(length: int) -> None:
    """Cut off anywhere, an answer gives the scores of the whole one or none."""
    long = GOOD.replace("4}", "4.5}")
    with pytest.raises(AnswerError):
        read_answer(long[:length], ASPECTS)
    with suppress(AnswerError):
        assert [score.value for score in read_answer(GOOD[:length], ASPECTS).values()] == [4, 2]
