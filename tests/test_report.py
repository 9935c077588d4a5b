"""`data report`: keywords, kinds and reasoning by rules, exact figures, and figures that show what is there."""

from __future__ import annotations

import base64
import html.parser
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import dataset_folders
import numpy as np
import pytest
from PIL import Image

from insightedit.cli import cli
from insightedit.cli_report import named_datasets
from insightedit.jobs.report import DatasetReport, report
from insightedit.platform.cluster import connected
from insightedit.platform.config import DatasetConfig, load_preset
from insightedit.platform.datasets.shapes import edit_records
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.gallery.sheet import text_width, wrapped
from insightedit.platform.gallery.survey import Facts, Quota, look_at
from insightedit.platform.gallery.tables import figures_of, pairs_of
from insightedit.platform.gallery.wording import Kind, keywords, kind_of, signs_of_reasoning
from insightedit.platform.judges import Costs, Failed, MadeEdit, Progress, Score, Scores, Verdict
from insightedit.platform.records import Record, encode_png

# -- rules over words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "instruction", "things"),
    [
        ("removal", "take the fox away", ["fox"]),
        ("removal", "Get rid of the man's hats, and the old dog on the left.", ["hat", "dog"]),
        ("removal", "remove the person who is sitting", ["person"]),
        ("addition", "at the top left add a small red circle", ["circle"]),
        ("addition", "Add a pair of glasses to the man", ["glasses"]),
        ("addition", "put two cherries on the plate", ["cherry"]),
        ("replacement", "change the red bandana to light scarf", ["bandana", "scarf"]),
        ("replacement", "in place of the bus put a train", ["bus", "train"]),
        ("replacement", "put a cat in place of the dog", ["cat", "dog"]),
        ("replacement", "swap out the sofa for a bench", ["sofa", "bench"]),
        ("other", "make it look like a watercolour", []),
    ],
)
def test_kind_and_keywords_follow_from_the_words(kind: Kind, instruction: str, things: list[str]) -> None:
    assert kind_of("", instruction) == kind
    assert keywords(kind, instruction) == things


def test_a_datasets_own_name_of_the_kind_counts() -> None:
    assert kind_of("remove", "put it into the bin") == "removal"
    assert kind_of("recolour", "change the car to red") == "other"


@pytest.mark.parametrize(
    ("instruction", "signs"),
    [
        ("remove the red circle", ()),
        ("add a purple bag to the right side of the person", ()),
        ("replace the cat with a dog", ()),
        ("Could you identify the animal near the center and remove it?", ("asks", "unnamed")),
        ("remove the object capable of flight", ("use",)),
        ("erase the one that has the most corners", ("clause", "compares")),
        ("delete all animals except the dog", ("excludes",)),
    ],
)
def test_signs_of_reasoning(instruction: str, signs: tuple[str, ...]) -> None:
    assert set(signs_of_reasoning(instruction)) == set(signs)


def test_the_rule_of_reasoning_agrees_with_a_world_that_knows() -> None:
    """Also on scenes and wordings that it was not written for."""
    records = list(edit_records("test", 150, 7))
    right = [
        (json.loads(record.meta)["wording"] == "advanced") == bool(signs_of_reasoning(record.instruction))
        for record in records
    ]
    assert sum(right) / len(right) > 0.9


# -- figures of one dataset -------------------------------------------------------------------------------------------


def _record(key: str, change: int, mask: bool, instruction: str = "remove the fox") -> Record:
    """A grey picture of which a square is white after the edit, and everything else brighter by `change`."""
    source = np.full((40, 60, 3), 100, np.uint8)
    target = source + np.uint8(change)
    target[10:20, 10:20] = 255
    # Down the columns: 10 columns of 40 and 10 pixels are off, then 10 on and 30 off, ten times.
    counts = [410, *([10, 30] * 10)]
    counts[-1] += 40 * 40 - 10
    meta = {"mask": {"size": [40, 60], "counts": counts}} if mask else {}
    return Record(
        key=key,
        dataset="made",
        task="edit",
        source=encode_png(source),
        target=encode_png(target),
        instruction=instruction,
        category="remove",
        meta=json.dumps(meta),
    )


def test_consistency_is_measured_outside_the_mask() -> None:
    quota = Quota(rows=9, compared=9, shown=0)
    (facts,) = look_at([_record("a", 10, mask=True)], quota)
    outside = 20 * np.log10(255 / 10)
    assert facts.outside["psnr"] == pytest.approx(outside)
    changed = 100 / (40 * 60)
    assert facts.whole["psnr"] == pytest.approx(-10 * np.log10(((1 - changed) * 10**2 + changed * 155**2) / 255**2))
    (nowhere,) = look_at([_record("b", 10, mask=False)], quota)
    assert not nowhere.outside
    assert nowhere.whole == facts.whole


def test_figures_are_exact() -> None:
    facts = [
        Facts(key="a", task="edit", kind="removal", wording="simple", instruction="remove the dog", size=(40, 30)),
        Facts(
            key="a", task="edit", kind="removal", wording="advanced", instruction="Remove what barks!", size=(40, 30)
        ),
        Facts(key="b", task="edit", kind="addition", wording="advanced", instruction="add a cat", size=(80, 60)),
    ]
    found = figures_of("made", "pairs", facts, bad=2, about=5, seed=0)
    assert (found.records, found.bad, found.kinds) == (3, 2, {"removal": 1, "addition": 1})
    assert (found.resolution, found.smallest, found.largest) == ((40, 30), (40, 30), (80, 60))
    assert found.instruction_words == 3
    assert (found.vocabulary, found.vocabulary_of) == (8, 3)
    assert found.reasoning == pytest.approx(1 / 3)
    assert (found.labelled, found.agreement) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert not found.outside
    unlabelled = figures_of("made", "pairs", [replace(one, wording="") for one in facts], bad=0, about=3, seed=0)
    assert (unlabelled.labelled, unlabelled.agreement) == (None, None)


def test_wordings_of_one_edit_are_one_pair() -> None:
    facts = look_at(list(edit_records("train", 20, 0)), Quota(rows=99, compared=5, shown=2))
    pairs = pairs_of(facts)
    assert all(pair.simple and pair.advanced for pair in pairs)
    assert max(sum(pair.kind == kind for pair in pairs) for kind in ("removal", "addition", "replacement")) == 2
    assert sum(bool(one.whole) for one in facts) == 10, "both records of five pairs"


def test_lines_are_broken_where_they_are_full() -> None:
    text = "replace the shape left of the purple square with a white ring"
    lines = wrapped(text, 1.2, 8)
    assert " ".join(lines) == text
    assert len(lines) > 2
    assert all(text_width(line, 8) <= 1.2 for line in lines)
    assert wrapped(text, 1.2, 8, 2)[1].endswith(" ...")


# -- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with connected(cpus=4):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DatasetConfig]:
    root = tmp_path_factory.mktemp("folders")
    made = {name: make(root / name) for name, make in dataset_folders.FOLDERS.items()}
    return {
        name: DatasetConfig(reader=name, options=one.options) if name == "shapes" else one.config(name, root / name)
        for name, one in made.items()
    }


@pytest.fixture(scope="module")
def made(folders: dict[str, DatasetConfig], tmp_path_factory: pytest.TempPathFactory) -> DatasetReport:
    shapes = DatasetConfig(reader="shapes", options={"kind": "edit", "split": "train", "count": 40, "seed": 0})
    return report({**folders, "shapes": shapes}, tmp_path_factory.mktemp("report"))


def test_every_dataset_is_in_the_report(made: DatasetReport, folders: dict[str, DatasetConfig]) -> None:
    rows = {one.name: one for one in made.datasets}
    assert set(rows) == set(folders)
    assert (rows["magicbrush"].records, rows["magicbrush"].bad) == (4, 1)
    assert rows["coco"].tasks == {"caption": 5, "segment": 3, "chat": 2}
    assert rows["shapes"].outside["psnr"].mean == 100
    assert rows["shapes"].agreement == 1
    assert made.keywords["Removal and addition"]["fox"] == 2
    assert json.loads(Path(made.page).with_name("report.json").read_text())["figures"] == dict(made.figures)


def test_figures_are_drawn(made: DatasetReport) -> None:
    assert list(made.figures) == ["S1", "S2", "S3", "S4"]
    for file in made.figures.values():
        with Image.open(file) as picture:
            assert picture.width > 900
            assert len(picture.convert("RGB").resize((60, 60)).getcolors() or [0] * 99) > 20, "something is on it"


class _Sources(html.parser.HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in {"src", "href"}]


def test_the_page_needs_nothing_beside_it(made: DatasetReport) -> None:
    sources = _Sources(Path(made.page).read_text(encoding="utf-8")).found
    files = [Path(file).read_bytes() for file in made.figures.values()]
    assert [base64.b64decode(one.removeprefix("data:image/png;base64,")) for one in sources] == files


class _Harsh:
    """A judge that says the same of everything."""

    identity = "harsh"
    costs = Costs()

    def judge(self, edits: Sequence[MadeEdit], progress: Progress | None = None) -> list[Verdict]:
        self.asked = [edit.instruction for edit in edits]
        score = Score(1, "Nothing is as it should be.")
        scores = Scores(instruction_adherence=score, non_overediting=score, naturalness=score, no_artifacts=score)
        return [Failed("unparsable", "It said nothing."), *[scores] * (len(edits) - 1)]


def test_a_judge_scores_what_has_no_scores(folders: dict[str, DatasetConfig], tmp_path: Path) -> None:
    pairs, judge = {"pairs": folders["pairs"]}, _Harsh()
    assert "S4" not in report(pairs, tmp_path / "without").figures
    assert "S4" in report(pairs, tmp_path / "with", judge=judge).figures
    assert sorted(judge.asked) == [f"edit {number}" for number in range(4)]


def test_the_command_says_what_it_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures"
    options = ["--out", str(out), "--rows", "30", "--set", "edits.count=20", "--json"]
    cli.main(["--workdir", str(tmp_path / "work"), "data", "report", "edits", *options], standalone_mode=False)
    found = json.loads(capfd.readouterr().out)
    assert (found["datasets"][0]["name"], found["datasets"][0]["records"]) == ("edits", 30)
    assert Path(found["page"]) == out / "report.html"
    assert {path.name for path in out.iterdir()} == {
        *("keywords.png", "examples.png", "datasets.png", "scores.png", "report.html", "report.json")
    }


def test_the_sample_follows_from_the_seed(tmp_path: Path) -> None:
    shapes = DatasetConfig(reader="shapes", options={"kind": "edit", "split": "train", "count": 600, "seed": 0})
    one, again, other = (
        report({"shapes": shapes}, tmp_path / name, rows=60, seed=seed).keywords
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert one == again
    assert one != other


def test_a_dataset_without_a_record_is_said(folders: dict[str, DatasetConfig], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("source,target,instruction\nlost.png,lost.png,remove the fox\n")
    empty = DatasetConfig(reader="pairs", options={"root": str(tmp_path)})
    with pytest.raises(InsightEditError, match="The dataset mine has no record that can be used"):
        report({"mine": empty}, tmp_path / "out")


# -- what the command line names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instructpix2pix", "magicbrush", "pairs", "advancededit"])
def test_the_reader_of_a_folder_is_found(folders: dict[str, DatasetConfig], name: str) -> None:
    root = folders[name].options["root"]
    config = load_preset("nano")
    assert named_datasets([str(root)], config, []) == {name: DatasetConfig(reader=name, options={"root": root})}
    assert named_datasets([f"{name}={root}"], config, []) == named_datasets([str(root)], config, [])


def test_names_and_options(tmp_path: Path) -> None:
    config = load_preset("nano")
    assert named_datasets(["edits"], config, ["edits.count=7"])["edits"].options["count"] == 7
    for name in ("a", "b"):
        (tmp_path / name / "mine").mkdir(parents=True)
        (tmp_path / name / "mine/rows.csv").write_text("source,target,instruction\na,b,c\n")
    both = [str(tmp_path / name / "mine") for name in ("a", "b")]
    assert list(named_datasets(both, config, [])) == [f"mine ({one})" for one in both]
    with pytest.raises(UsageError, match="given twice"):
        named_datasets(["edits", "edits"], config, [])
    with pytest.raises(UsageError, match="there is no dataset 'other'"):
        named_datasets(["edits"], config, ["other.count=7"])
    with pytest.raises(NotFoundError, match="is no folder"):
        named_datasets([str(tmp_path / "lost")], config, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="say which it is"):
        named_datasets([str(tmp_path / "empty")], config, [])
