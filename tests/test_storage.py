"""One interface for disks and object stores; the object store is a real S3 server on loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from insightedit.platform.cluster import connected
from insightedit.platform.config import DatasetConfig, PictureConfig
from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.sharding import Sharding, prepared_manifest, write_shards
from insightedit.platform.shards import PreparedData
from insightedit.platform.storage import Store

BUCKET = "insightedit-test"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket's URI; credentials and endpoint are in the environment, as on a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        endpoint = f"http://127.0.0.1:{port}"
        settings = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = tmp_path / "folder" if request.param == "disk" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return Store.at(place)


def test_files_are_read_as_they_were_written(store: Store) -> None:
    assert store.sizes() == {}
    store.write("a.bin", b"one")
    store.write("a.bin", b"three")
    store.child("sub").write("b.bin", memoryview(b"xx"))
    assert store.sizes() == {"a.bin": 5, "sub/b.bin": 2}
    assert store.read("a.bin") == b"three"
    assert store.child("sub").read("b.bin") == b"xx"
    with pytest.raises(NotFoundError, match=r"There is no .*/c\.bin\."):
        store.read("c.bin")
    store.delete()
    assert store.sizes() == {}
    store.delete()


def test_a_failing_storage_is_named(s3: str) -> None:
    del s3
    lost = Store.at("s3://no-such-bucket/x?region=us-east-1")
    assert str(lost) == "s3://no-such-bucket/x"
    with pytest.raises(InsightEditError, match="s3://no-such-bucket/x/file"):
        lost.write("file", b"")
    with pytest.raises(UsageError, match="ftp://somewhere is no storage"):
        Store.at("ftp://somewhere")


def test_credentials_do_not_belong_in_a_uri() -> None:
    with pytest.raises(UsageError, match="holds credentials; give them in the environment") as raised:
        Store.at("s3://key:hid/den@bucket/x")
    assert "hid" not in str(raised.value)


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    store = Store.at(f"file://{tmp_path}/shards")
    assert store.path == tmp_path / "shards"
    store.write("a", b"1")
    store.remove("a", "b")
    assert store.sizes() == {}


def test_shards_in_an_object_store_are_those_on_a_disk(s3: str, tmp_path: Path) -> None:
    options = {"kind": "edit", "split": "train", "count": 60, "seed": 0}
    sharding = Sharding(
        name="edits",
        dataset=DatasetConfig(reader="shapes", options=options),
        seed=0,
        rows_per_shard=50,
        quarantine_limit=0.0,
        pictures=PictureConfig(),
        resolution=32,
        tasks=2,
        encoder=None,
    )
    disk, remote = Store.at(tmp_path / "disk"), Store.at(f"{s3}/shards")
    with connected(cpus=4):
        made = write_shards(sharding, disk)
        assert write_shards(sharding, remote) == made
    assert prepared_manifest(sharding, remote) == made
    assert {name: remote.read(name) for name in remote.sizes()} == {name: disk.read(name) for name in disk.sizes()}
    assert PreparedData.open(remote).read(1).equals(PreparedData.open(disk).read(1))
    # Half an upload: the manifest names a shard that is not there in its size.
    remote.write(made.shards[0].file, b"half")
    with pytest.raises(InsightEditError, match="missing or torn"):
        PreparedData.open(remote)
