"""Many edits at once: what is asked for, that each is what `insightedit edit` makes, and what is left after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from empty_registry import make_workdir
from moto.server import ThreadedMotoServer
from PIL import Image
from tiny_models import build_sources, tiny_config

from insightedit import cli
from insightedit.model.insightedit import build_pipeline
from insightedit.platform.cluster import connected
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.registry import Registry
from insightedit.platform.storage import Store
from insightedit.platform.tracking import ensure_experiment
from insightedit.platform.workdir import Workdir
from insightedit.serve.backend import Conditions, Edited, EditJob
from insightedit.serve.batch import BatchResult, BatchWorkers, plan_batch, run_batch
from insightedit.serve.batch_rows import Cell, pictures, read_input
from insightedit.serve.batch_worker import BatchEditor, BatchSettings, row_seed
from insightedit.serve.engine import EditEngine

BUCKET = "insightedit-batch"
PROMPT = "remove the red circle"
SETTINGS = BatchSettings(seed=3, num_inference_steps=2)


class Story(NamedTuple):
    workdir: Workdir
    photos: Path
    bucket: str


def draw(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def register_champion(folder: Path) -> Workdir:
    workdir = make_workdir(folder / "work")
    build_pipeline(tiny_config(build_sources(folder / "sources"))).save_pretrained(folder / "pipeline")
    registry = Registry(workdir)
    run = registry.client.create_run(ensure_experiment(registry.client, workdir)).info.run_id
    version = registry.register(folder / "pipeline", run)
    registry.promote(version.version)
    return workdir


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket's URI; credentials and endpoint are in the environment, as on a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
        }.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    server.stop()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Iterator[Story]:
    """A champion, eleven photos and one Ray for all tests."""
    folder = tmp_path_factory.mktemp("batch")
    workdir = register_champion(folder)
    for number in range(11):
        draw(folder / "photos" / f"{'sub/' if number % 4 == 0 else ''}{number:02d}.png", number)
    with connected():
        yield Story(workdir, folder / "photos", bucket)


def batch(story: Story, place: Path | str, out: Path | str, prompt: str | None = PROMPT, **options: Any) -> BatchResult:
    store = Store.at(out)
    settings = options.pop("settings", SETTINGS)
    plan = plan_batch(story.workdir, read_input(str(place), prompt, store), store, settings=settings)
    return run_batch(plan, BatchWorkers(count=options.pop("workers", 1), cpus=0.5), **options)


def results(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {row["key"]: row for row in rows}


def edits(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


# -- what is asked for ------------------------------------------------------------------------------------------------


def asked(place: Path, prompt: str | None = None, out: str = "/nowhere") -> list[tuple[str, str, Any]]:
    found = read_input(str(place), prompt, Store.at(out))
    return [(row.key, row.instruction, row.image) for row in found.wanted]


def test_a_folder_is_its_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", ".hidden/x.png", "._b.png", "notes.txt", "edited/old.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows = asked(tmp_path, "do it", str(tmp_path / "edited"))
    assert rows == [("a/c.JPG", "do it", "a/c.JPG"), ("b.png", "do it", "b.png")]
    with pytest.raises(NotFoundError, match="give --prompt"):
        asked(tmp_path)
    with pytest.raises(UsageError, match="insightedit edit"):
        asked(tmp_path / "b.png", "do it")
    with pytest.raises(NotFoundError, match="nothing to edit"):
        asked(tmp_path / "none", "do it")


def test_tables_of_every_kind_say_the_same(tmp_path: Path) -> None:
    rows = [{"file_name": "p/a.png", "Edit_Prompt": "one, two"}, {"file_name": "p/b.png", "Edit_Prompt": " three"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (tmp_path / "t.csv").write_text('\ufefffile_name,Edit_Prompt\r\np/a.png,"one, two"\r\n\r\np/b.png, three\r\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    expected = [("000001", "one, two", "p/a.png"), ("000002", " three", "p/b.png")]
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        assert asked(tmp_path / name) == expected, name
        assert [row[1] for row in asked(tmp_path / name, "for all")] == ["for all"] * 2
    (tmp_path / "t.csv").unlink()
    (tmp_path / "t.parquet").rename(tmp_path / "u.parquet")
    assert [row[0] for row in asked(tmp_path)] == ["t/000001", "t/000002", "u/000001", "u/000002"]


def test_a_table_may_hold_the_pictures_and_name_the_rows(tmp_path: Path) -> None:
    draw(tmp_path / "beside.png", 1)
    data = [bytes([number]) * 9 for number in range(40)]
    structs: list[Any] = [{"bytes": one, "path": None} for one in data]
    structs[5] = {"bytes": None, "path": "beside.png"}
    structs[6] = None
    table = pa.table({"id": [f"k{n}" for n in range(40)], "image": structs, "prompt": ["x"] * 40})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=30)
    found = read_input(str(tmp_path / "t.parquet"), None, Store.at("/nowhere"))
    assert [row.image for row in found.wanted] == [Cell("t.parquet", "image", n // 30, n % 30) for n in range(40)]
    read = list(pictures(found.store, found.wanted))
    assert read[:5] + read[7:] == data[:5] + data[7:]
    assert read[5] == (tmp_path / "beside.png").read_bytes()
    assert str(read[6]).startswith("The picture is null")
    some = [found.wanted[number] for number in (20, 21, 35, 3)]
    assert list(pictures(found.store, some)) == [data[20], data[21], data[35], data[3]]


def test_bad_rows_are_told_apart(tmp_path: Path) -> None:
    lines = [
        '{"key": "a.png", "image": "a.png", "instruction": "x"}',
        '{"key": "a.jpg", "image": "a.jpg", "instruction": "x"}',
        '{"key": "../b", "image": "a.png", "instruction": "x"}',
        '{"key": "c", "image": "a.png", "instruction": " "}',
        '{"key": "d", "image": 7, "instruction": "x"}',
        '{"key": "e/.batch", "image": "a.png", "instruction": "x"}',
        '{"key": "' + "f" * 300 + '", "image": "a.png", "instruction": "x"}',
        '{"key": 12, "image": "../../etc/passwd", "instruction": "x"}',
        "{broken",
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    found = read_input(str(tmp_path / "t.jsonl"), None, Store.at("/nowhere"))
    assert [row.key for row in found.wanted] == ["a.png", "12"]
    assert [bad.reason for bad in found.bad] == [
        "duplicate_key", "bad_key", "empty_instruction", "missing_field", "bad_key", "bad_key", "invalid_json",
    ]  # fmt: skip
    missing, outside = pictures(found.store, found.wanted)
    assert (str(missing), str(outside)) == (f"There is no file {tmp_path}/a.png.", str(outside))
    assert "leads out of" in str(outside)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "photo,instruction\na,b\n", "its columns are photo, instruction: call it `image`"),
        ("t.csv", "image,what\na,b\n", "or give --prompt"),
        ("t.csv", 'image,instruction\n"a,b', "cannot be read as CSV"),
        ("t.parquet", "nonsense", "cannot be read as a parquet file"),
        ("t.jsonl", "[]\n", "known as the picture's"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        asked(tmp_path / name)


def test_seeds_follow_from_the_key_alone() -> None:
    seeds = [row_seed(3, f"{number:06d}") for number in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert row_seed(3, "a") != row_seed(4, "a")


# -- editing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All photos edited in one go, by two workers."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = batch(story, story.photos, out, workers=2)
    assert (done.edited, done.kept, done.quarantined, done.model_version) == (11, 0, 0, "1")
    return out


def test_edits_are_those_of_the_edit_command(
    story: Story, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = results(whole)
    assert list(rows) == sorted(str(path.relative_to(story.photos)) for path in story.photos.rglob("*.png"))
    assert {row["file"]: row["sha256"] for row in rows.values()} == {
        name: hashlib.sha256(data).hexdigest() for name, data in edits(whole).items()
    }
    for key in ("sub/04.png", "07.png"):
        row, alone = rows[key], tmp_path / "alone.png"
        assert row["seed"] == row_seed(3, key)
        assert row["instruction_sha256"] == hashlib.sha256(PROMPT.encode()).hexdigest()
        arguments = ["edit", story.photos / key, PROMPT, "--out", alone, "--seed", row["seed"], "--steps", 2]
        assert cli.run([str(x) for x in (*arguments, "--workdir", story.workdir.root)]) == 0, capfd.readouterr().err
        assert alone.read_bytes() == (whole / row["file"]).read_bytes()
    assert not list(whole.rglob(".batch/notes"))


def test_bytes_depend_on_no_order_and_a_bucket_is_as_good(story: Story, whole: Path, tmp_path: Path) -> None:
    there, far = (Store.at(f"{story.bucket}/{tmp_path.name}/{name}") for name in ("in", "out"))
    names = ["07.png", "02.png", "sub/04.png"]
    for name in names:
        there.write(name, (story.photos / name).read_bytes())
    table = [{"key": name, "image": name, "instruction": PROMPT} for name in names]
    there.write("t.jsonl", "".join(json.dumps(row) + "\n" for row in table).encode())
    done = batch(story, f"{there}/t.jsonl", str(far), None)
    assert done.results == f"{far}/results.jsonl"
    assert {name: far.read(name) for name in far.sizes() if name.endswith(".png")} == {
        name: (whole / name).read_bytes() for name in names
    }


def test_a_stopped_job_goes_on_where_it_was(story: Story, tmp_path: Path) -> None:
    # Many steps, so that the stop comes in between.
    settings = replace(SETTINGS, num_inference_steps=100)
    out, whole = tmp_path / "out", tmp_path / "whole"
    batch(story, story.photos, whole, settings=settings)

    def stop(through: int, _rows: int, _rate: float | None) -> None:
        if through >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch(story, story.photos, out, settings=settings, progress=stop)
    first = edits(out)
    assert 2 <= len(first) < 11
    lost = next(iter(first))
    (out / lost).unlink()  # Its note is left.
    times = {name: (out / name).stat().st_mtime_ns for name in first if name != lost}
    (out / ".tmp-torn.png-1234").write_bytes(b"half")
    done = batch(story, story.photos, out, settings=settings)
    assert done.kept == len(times)
    assert done.kept + done.edited == 11
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times, "what is done is not done again"
    assert edits(out) == edits(whole)
    assert {key: row["sha256"] for key, row in results(out).items()} == {
        key: row["sha256"] for key, row in results(whole).items()
    }
    assert not list(out.rglob(".tmp-*"))


def test_a_worker_has_several_edits_in_the_engine_and_each_as_if_alone(
    story: Story, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["07.png", "02.png", "sub/04.png"]
    submit, held = EditEngine.submit, list[tuple[Any, Any, Future[Edited]]]()

    def submit_when_all_are_there(engine: EditEngine, job: EditJob, conditions: Conditions) -> Future[Edited]:
        held.append((job, conditions, Future()))
        if len(held) == len(keys):
            for job_of_one, conditions_of_one, future in held:
                submit(engine, job_of_one, conditions_of_one).add_done_callback(
                    lambda done, future=future: future.set_result(done.result())
                )
        return held[-1][2]

    monkeypatch.setattr(EditEngine, "submit", submit_when_all_are_there)
    rows = [{"key": key, "instruction": PROMPT, "image": key} for key in keys]
    table = pa.table(
        {
            "wanted": [json.dumps(row) for row in rows],
            "picture": pa.array([(story.photos / key).read_bytes() for key in keys], pa.large_binary()),
            "reason": [""] * 3,
            "detail": [""] * 3,
        }
    )
    folder = str(Registry(story.workdir).fetch(Registry(story.workdir).resolve("1")))
    BatchEditor(folder, "1", SETTINGS, Store.at(tmp_path))(table)
    assert edits(tmp_path) == {key: (whole / key).read_bytes() for key in sorted(keys)}


def bad_photos(story: Story, folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((story.photos / name).read_bytes())
    (folder / "cut.png").write_bytes((story.photos / "01.png").read_bytes()[:200])
    draw(folder / "thin.png", 1, (90, 9))
    (folder / "text.jpg").write_text("hello")
    return folder


def test_bad_rows_are_set_aside_and_counted(story: Story, tmp_path: Path) -> None:
    folder = bad_photos(story, tmp_path / "in", ["01.png", "02.png"])
    done = batch(story, folder, tmp_path / "out", quarantine_limit=0.7)
    assert (done.edited, done.quarantined, done.reasons) == (2, 3, {"invalid_image": 3})
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {row["key"]: row["detail"].split()[-2:] for row in listed} == {
        "cut.png": ["cut", "short."], "text.jpg": ["WebP", "file."], "thin.png": ["shorter", "one."],
    }  # fmt: skip
    assert set(results(tmp_path / "out")) == {"01.png", "02.png"}
    (folder / "cut.png").write_bytes((story.photos / "03.png").read_bytes())
    mended = batch(story, folder, tmp_path / "out", quarantine_limit=0.7)
    assert (mended.edited, mended.kept, mended.quarantined) == (1, 2, 2)


def test_too_many_bad_rows_stop_the_job(story: Story, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "instruction": "x"}\n{broken\n')
    with pytest.raises(InsightEditError, match=r"1 of 2 rows are bad, more than --quarantine-limit 0\.01 allows; .*: "):
        batch(story, tmp_path / "t.jsonl", tmp_path / "out", None)
    assert (tmp_path / "out" / "quarantine.jsonl").is_file()
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_what_never_fits_or_would_not_go_together_is_refused(story: Story, tmp_path: Path) -> None:
    asked = read_input(str(story.photos), PROMPT, Store.at(tmp_path / "out"))
    plan = plan_batch(story.workdir, asked, Store.at(tmp_path / "out"))
    with pytest.raises(UsageError, match="--workers asks for 1 x 1 CPUs and 1 GPUs, and 0 fit"):
        run_batch(plan, BatchWorkers(gpus=1))
    other = BatchSettings(seed=9)
    with pytest.raises(UsageError, match=r"edits made with another seed \(0, now 9\)"):
        plan_batch(story.workdir, asked, Store.at(tmp_path / "out"), settings=other)
    with pytest.raises(UsageError, match="holds something else"):
        plan_batch(story.workdir, asked, Store.at(story.photos))


def test_the_command(story: Story, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.run(["batch-edit", *map(str, arguments), "--workdir", str(story.workdir.root)])
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    out = tmp_path / "out"
    common = (story.photos, "--prompt", PROMPT, "--steps", "2", "--seed", "3")
    code, printed, _ = run(*common, "--out", out, "--dry-run")
    assert (code, printed) == (0, f"Would edit 11 of 11 rows by version 1 into {out}.\n")
    assert not out.exists()
    code, printed, _ = run(*common, "--out", whole, "--dry-run", "--json")
    assert (json.loads(printed)["done"], json.loads(printed)["to_edit"]) == (11, 0)
    before = results(whole)
    code, printed, err = run(*common, "--out", whole, "--json")
    assert (code, json.loads(printed)["edited"], json.loads(printed)["kept"]) == (0, 0, 11), err
    assert "edits/s" not in err
    assert results(whole) == before
    for arguments, expected, words in (
        ((story.photos, "--out", out, "--prompt", " "), 2, "--prompt is empty"),
        ((story.photos, "--out", out), 4, "give --prompt"),
        ((*common, "--out", out, "--model", "7"), 4, "7"),
        ((*common, "--out", whole, "--seed", "1"), 2, "another seed"),
    ):
        code, printed, err = run(*arguments)
        assert (code, printed) == (expected, ""), err
        assert words in err


@pytest.mark.slow
def test_killed_jobs_and_workers_leave_what_an_undisturbed_run_makes(story: Story, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    batch(story, story.photos, whole, settings=BatchSettings(num_inference_steps=60))
    command = [sys.executable, "-m", "insightedit", "batch-edit", str(story.photos), "--out", str(out)]
    command += ["--prompt", PROMPT, "--steps", "60", "--workdir", str(story.workdir.root)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def edited(count: int, process: subprocess.Popen[bytes]) -> None:
        while len(edits(out)) < count and process.poll() is None:
            time.sleep(0.05)

    with subprocess.Popen(command, env=environment) as process:
        edited(2, process)
        tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(tree, timeout=30)
    kept = edits(out)
    assert 2 <= len(kept) < 11
    for name, data in kept.items():
        assert data == (whole / name).read_bytes(), name
    with subprocess.Popen(command, env=environment) as process:
        edited(len(kept) + 2, process)
        for worker in psutil.Process(process.pid).children(recursive=True):
            if "BatchEditor" in " ".join(worker.cmdline()):
                worker.kill()
        assert process.wait(120) == 0
    assert edits(out) == edits(whole)
