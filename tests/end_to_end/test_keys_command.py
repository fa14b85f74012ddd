"""`fedpeft keys` as a user types it: from fresh keys to a signed roster."""

import json
import time

import pytest
from typer.testing import CliRunner

from fedpeft.cli import app, main
from fedpeft.errors import DataError
from fedpeft.run.keys import helper_key, read_identity, read_roster


def keys(*arguments):
    result = CliRunner().invoke(app, ["keys", *(str(x) for x in arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_clients_and_admins_make_a_roster_that_clients_believe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("kim", "lee", "sam"):
        made = keys("init", f"{name}.key")
        (tmp_path / f"{name}.id").write_text(made.stdout, encoding="utf8")
    admins = [keys("init", f"{name}.key").stdout.strip() for name in ("one", "two")]
    helper = keys("init", "helper.key", "--helper").stdout.strip()
    made = keys("roster", "kim.id", "lee.id", "sam.id", "--helper", helper, "--version", 2, "--days", 30)
    assert "members      3\n" in made.output
    assert "signed by    nobody\n" in made.output
    assert "it counts for nothing until `fedpeft keys sign roster.json --key ADMIN_KEY`" in made.output
    for name in ("one", "two"):
        assert "signed: roster.json" in keys("sign", "roster.json", "--key", f"{name}.key").output
    roster = read_roster(tmp_path / "roster.json")
    now = time.time()
    roster.check([bytes.fromhex(x) for x in admins], now, least_version=2, least_admins=2)
    assert {x.name: x.id for x in roster.members} == {
        name: read_identity(tmp_path / f"{name}.key").id for name in ("kim", "lee", "sam")
    }
    assert roster.helper.hex() == helper == helper_key(read_identity(tmp_path / "helper.key"))
    assert 29.9 < (roster.expires - now) / 86400 <= 30
    shown = keys("show", "roster.json").output
    assert all(f"{x}\n" in shown for x in (*admins, helper, roster.fingerprint))
    kim = read_identity(tmp_path / "kim.key")
    assert keys("show", "kim.key").output == f"id           {kim.id.hex()}\nas a helper  {helper_key(kim)}\n"


def test_init_prints_the_id_alone_and_never_the_key(tmp_path):
    result = keys("init", tmp_path / "client.key")
    found = read_identity(tmp_path / "client.key")
    assert result.stdout == found.id.hex() + "\n"
    assert "keep it; whoever has it is you" in result.stderr
    assert found.to_bytes().hex() not in result.output + result.stderr


def test_a_roster_can_be_in_force_for_ever(tmp_path):
    id_ = keys("init", tmp_path / "client.key").stdout.strip()
    result = keys("roster", f"kim={id_}", "--days", 0, "--out", tmp_path / "r.json")
    assert "expires      never\n" in result.output
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf8"))["expires"] is None


def test_a_year_is_what_a_roster_is_in_force_for_if_nothing_is_said(tmp_path):
    id_ = keys("init", tmp_path / "client.key").stdout.strip()
    keys("roster", id_, "--out", tmp_path / "r.json")
    assert 364.9 < (read_roster(tmp_path / "r.json").expires - time.time()) / 86400 <= 365


def test_a_second_key_in_the_same_place_is_one_line_on_stderr_and_exit_code_2(tmp_path, monkeypatch, capsys):
    path = tmp_path / "client.key"
    before = keys("init", path) and path.read_bytes()
    monkeypatch.setattr("sys.argv", ["fedpeft", "keys", "init", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "client.key: is there already, and is not overwritten" in said
    assert "Traceback" not in said
    assert path.read_bytes() == before


def test_a_roster_that_was_signed_is_not_lost_by_making_another(tmp_path):
    id_ = keys("init", tmp_path / "client.key").stdout.strip()
    keys("roster", id_, "--out", tmp_path / "r.json")
    with pytest.raises(DataError, match=r"r\.json: is there already"):
        keys("roster", id_, "--out", tmp_path / "r.json")


@pytest.mark.parametrize(
    ("command", "teaches"),
    [
        ((), ("init", "roster", "sign", "show", "fedpeft keys init client.key > kim.id")),
        (("init",), ("PATH", "--helper", "The key never leaves it")),
        (("roster",), ("MEMBERS", "--out", "--helper", "--days", "--version", "counts as one")),
        (("sign",), ("ROSTER", "--key", "trust.admins")),
        (("show",), ("PATH", "fingerprint")),
    ],
)
def test_every_command_teaches_what_it_is_for(command, teaches):
    said = " ".join(keys(*command, "--help").output.split())
    for words in teaches:
        assert words in said
