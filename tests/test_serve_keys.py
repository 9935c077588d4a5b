"""API keys: made, shown once, refused when wrong, revoked or over, and noticed by a gateway that runs."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from test_cli import insightedit  # noqa: F401  # pyright: ignore[reportUnusedImport]  (a fixture)

from insightedit.platform.errors import InsightEditError, NotFoundError, UsageError
from insightedit.platform.workdir import Workdir
from insightedit.serve import keys
from insightedit.serve.door import Access, Door, caller_of, check_access, is_loopback, needs_keys
from insightedit.serve.keys import Allowance, KeyRing, KeyStore
from insightedit.serve.meters import Meters
from insightedit.serve.schema import ApiError
from insightedit.serve.settings import ServeSettings

EVERYWHERE = "0.0.0.0"  # noqa: S104


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(Workdir.open(tmp_path))


@pytest.fixture
def ring(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> KeyRing:
    monkeypatch.setattr(keys, "LOOK_SECONDS", 0.0)
    return KeyRing(store)


def test_only_a_hash_is_kept_and_only_for_its_owner(store: KeyStore) -> None:
    key, kept = store.create("anna", Allowance(requests_per_minute=5, priority=2))
    text = store.path.read_text()
    assert key not in text
    assert kept.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert kept.sha256 in text
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert len(key) > 40
    store.create("ben", Allowance())
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert [(one.name, one.allowance.priority) for one in store.all()] == [("anna", 2), ("ben", 0)]


def test_names_are_taken_once_and_plain(store: KeyStore) -> None:
    store.create("anna", Allowance())
    for name in ("anna", "", "a b", "../x", "x" * 65, "-a", "a\n", "\u00e4"):
        with pytest.raises(UsageError, match="key"):
            store.create(name, Allowance())
    with pytest.raises(NotFoundError, match="no key named ben"):
        store.revoke("ben")
    assert len(store.all()) == 1


def test_two_commands_at_once_lose_no_key(store: KeyStore) -> None:
    code = (
        "import sys; from insightedit.serve.keys import *; store = KeyStore(Workdir.open(sys.argv[1]))\n"
        "for index in range(10): store.create(sys.argv[2] + str(index), Allowance())"
    )
    command = [sys.executable, "-c", code, str(store.path.parent)]
    runs = [subprocess.Popen([*command, name]) for name in ("a", "b")]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(store.all()) == 20


def test_a_ring_sees_new_expired_and_revoked_keys(store: KeyStore, ring: KeyRing) -> None:
    assert ring.find("ie-nothing") is None
    key, _ = store.create("anna", Allowance(at_once=3))
    other, _ = store.create("ben", Allowance(), timedelta(seconds=-1))
    found = ring.find(key)
    assert found is not None
    assert (found.name, found.allowance.at_once) == ("anna", 3)
    assert ring.find(other) is None
    assert ring.find(key + "x") is None
    assert ring.find(found.sha256) is None
    store.revoke("anna")
    assert ring.find(key) is None


def test_a_key_ends_on_time(store: KeyStore) -> None:
    _, kept = store.create("anna", Allowance(), timedelta(days=2))
    now = datetime.now(UTC)
    assert not kept.is_expired(now + timedelta(days=1.99))
    assert kept.is_expired(now + timedelta(days=2.01))


def test_a_broken_file_lets_nobody_in(store: KeyStore, ring: KeyRing) -> None:
    key, _ = store.create("anna", Allowance())
    assert ring.find(key)
    store.path.write_text(store.path.read_text()[:-20])
    for _ in range(2):
        with pytest.raises(InsightEditError, match=r"keys\.json cannot be read"):
            ring.find(key)
    with pytest.raises(InsightEditError, match=r"keys\.json cannot be read"):
        store.create("ben", Allowance())


# -- the door ---------------------------------------------------------------------------------------------------------


def client(ring: KeyRing | None, hosts: tuple[str, ...] = (), base_url: str = "http://127.0.0.1") -> TestClient:
    app = FastAPI(openapi_url=None)

    @app.get("/{path:path}")
    async def who(request: Request) -> dict[str, object]:
        caller = caller_of(request)
        return {"name": caller.name, "priority": caller.allowance.priority}

    return TestClient(Door(app, Access(ring, hosts), Meters()), base_url=base_url)


def refusal(client: TestClient, path: str, headers: dict[str, str]) -> tuple[int, str]:
    with pytest.raises(ApiError) as refused:
        client.get(path, headers=headers)
    return refused.value.status, refused.value.code


def test_the_door_knows_its_callers(store: KeyStore, ring: KeyRing) -> None:
    key, _ = store.create("anna", Allowance(priority=7))
    visitor = client(ring)
    for scheme in ("Bearer", "bearer"):
        answer = visitor.get("/v1/models", headers={"authorization": f"{scheme} {key}"})
        assert answer.json() == {"name": "anna", "priority": 7}
    for path in ("/livez", "/readyz", "/healthz", "/", "/page/app.js", "/openapi.json"):
        assert visitor.get(path).json()["name"] == ""
    wrong = ["", "Bearer", "Bearer ", f"Basic {key}", key, f"Bearer {key}x", "Bearer \u00ff", f"Bearer {key[:-1]}"]
    for value in wrong:
        encoded = {"authorization": value.encode("latin-1")}
        assert refusal(visitor, "/v1/images/edits", encoded)[0] == 401  # pyright: ignore[reportArgumentType]
    for path in ("/v1/models", "/metrics", "/nowhere", "/livez/x", "/page"):
        assert refusal(visitor, path, {}) == (401, "missing_api_key")
    store.revoke("anna")
    assert refusal(visitor, "/v1/models", {"authorization": f"Bearer {key}"}) == (401, "invalid_api_key")
    store.path.write_text("{")
    assert refusal(visitor, "/v1/models", {"authorization": f"Bearer {key}"}) == (503, "unavailable")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST", "[::1]"])
def test_without_keys_this_machine_is_welcome(host: str) -> None:
    assert client(None).get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]"]
)
def test_without_keys_other_names_are_not(host: str) -> None:
    """A page whose name was given a loopback address would read the answers."""
    assert refusal(client(None), "/v1/models", {"host": host}) == (403, "host_not_allowed")


def test_without_keys_a_page_of_another_host_gets_nothing() -> None:
    visitor = client(None, hosts=("Edit.example",))
    assert refusal(visitor, "/", {"sec-fetch-site": "cross-site"}) == (403, "origin_not_allowed")
    for site in ("same-origin", "none", "same-site"):
        assert visitor.get("/", headers={"sec-fetch-site": site, "host": "edit.example"}).status_code == 200


# -- when keys are needed ---------------------------------------------------------------------------------------------


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1")))
    assert not any(map(is_loopback, (EVERYWHERE, "::", "10.0.0.1", "example.org", "", "127.0.0.1.example")))


def test_a_server_for_others_needs_a_key(store: KeyStore, tmp_path: Path) -> None:
    workdir = Workdir.open(tmp_path)
    check_access(workdir, ServeSettings())
    open_server = ServeSettings(host=EVERYWHERE)
    assert needs_keys(open_server)
    for settings in (open_server, ServeSettings(require_keys=True)):
        with pytest.raises(UsageError, match="serve keys create NAME"):
            check_access(workdir, settings)
    with pytest.raises(UsageError, match="require_keys"):
        check_access(workdir, ServeSettings(host=EVERYWHERE, require_keys=False))
    store.create("anna", Allowance())
    check_access(workdir, open_server)


# -- the commands -----------------------------------------------------------------------------------------------------


def test_keys_on_the_command_line(insightedit: Any, own_work_folder: Path) -> None:  # noqa: F811
    assert insightedit("serve", "keys", "list", "--json").json == []
    assert "serve keys create" in insightedit("serve", "keys", "list").err
    insightedit("serve", "keys", "create", "anna", "--dry-run")
    assert not (own_work_folder / "keys.json").exists()
    made = insightedit("serve", "keys", "create", "anna", "--days", "30", "--at-once", "4", "--json").json
    assert (made["name"], made["at_once"], made["priority"]) == ("anna", 4, 0)
    plain = insightedit("serve", "keys", "create", "ben", "--requests-per-minute", "60", "--priority", "-3")
    key = plain.out.strip()
    assert key.startswith("ie-")
    assert "not shown again" in plain.err
    listed = insightedit("serve", "keys", "list")
    assert "anna" in listed.out
    assert not any(secret in listed.out for secret in (key, made["key"]))
    shown = insightedit("serve", "keys", "list", "--json").json
    assert [one["name"] for one in shown] == ["anna", "ben"]
    assert not any({"sha256", "key"} & set(one) for one in shown)
    insightedit("serve", "keys", "create", "anna").assert_one_sentence(2, "anna")
    insightedit("serve", "keys", "revoke", "carl").assert_one_sentence(4, "carl")
    assert insightedit("serve", "keys", "revoke", "ben", "--dry-run").code == 0
    assert insightedit("serve", "keys", "revoke", "ben", "--json").json == {"name": "ben", "revoked": True}
    assert [one["name"] for one in json.loads((own_work_folder / "keys.json").read_text())["keys"]] == ["anna"]


@pytest.fixture(autouse=True)
def no_lock_files_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("*.tmp"))
