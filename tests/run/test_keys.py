"""Key and roster files: what is written, who can read it, and what is refused."""

import json
import os
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedpeft.errors import DataError
from fedpeft.run.keys import (
    collect,
    described,
    helper_key,
    make_identity,
    read_identity,
    read_roster,
    sign_roster,
    write_roster,
)
from fedpeft.secagg.helper import HelperKey
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.roster import Member

NOW = 1_790_000_000.0
KIM, LEE, SAM = (Identity.of(bytes([30 + i]) * 32).id for i in range(3))


def pem(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def secret_file(path, data):
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_a_key_file_is_its_owners_alone_and_reads_back(tmp_path):
    made = make_identity(tmp_path / "new" / "client.key", lambda size: bytes(range(size)))
    path = tmp_path / "new" / "client.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert made.to_bytes() == bytes(range(32))
    assert read_identity(path).to_bytes() == made.to_bytes()
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert path.read_bytes() == pem(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


def test_a_key_file_is_its_owners_alone_whatever_the_umask_says(tmp_path):
    before = os.umask(0)
    try:
        make_identity(tmp_path / "client.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "client.key").stat().st_mode) == 0o600


def test_two_identities_differ(tmp_path):
    assert make_identity(tmp_path / "a").id != make_identity(tmp_path / "b").id


def test_a_key_is_never_overwritten(tmp_path):
    first = make_identity(tmp_path / "client.key")
    with pytest.raises(DataError, match=r"client\.key: is there already, and is not overwritten; name another file"):
        make_identity(tmp_path / "client.key")
    assert read_identity(tmp_path / "client.key").id == first.id
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(DataError, match="is there already"):
        make_identity(tmp_path / "link")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o777])
def test_a_key_that_others_can_reach_is_refused(tmp_path, mode):
    path = tmp_path / "client.key"
    make_identity(path)
    path.chmod(mode)
    with pytest.raises(DataError, match=f"client.key: got permissions {mode:04o}.*want 0600: `chmod 600 .*client.key`"):
        read_identity(path)


def test_a_key_that_only_its_owner_reads_is_taken(tmp_path):
    made = make_identity(tmp_path / "client.key")
    (tmp_path / "client.key").chmod(0o400)
    assert read_identity(tmp_path / "client.key").id == made.id


SECRET = bytes(range(100, 132))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no key that can be read; want the file that `fedpeft keys init` wrote"),
        (SECRET, "no key that can be read"),
        (SECRET.hex().encode(), "no key that can be read"),
        (pem(Ed25519PrivateKey.from_private_bytes(SECRET))[:60], "no key that can be read"),
        (pem(Ed25519PrivateKey.from_private_bytes(SECRET), BestAvailableEncryption(b"x")), "no key that can be read"),
        (pem(X25519PrivateKey.from_private_bytes(SECRET)), "got a key of another kind; want Ed25519"),
    ],
)
def test_what_is_no_key_is_refused_and_nothing_of_it_is_said(tmp_path, data, message):
    path = secret_file(tmp_path / "client.key", data)
    with pytest.raises(DataError, match=r"client\.key: ") as error:
        read_identity(path)
    said = str(error.value)
    assert message in said
    assert error.value.__cause__ is None
    assert SECRET.hex() not in said
    assert len(said) < 120 + len(str(path))


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.key: no such file"):
        read_identity(tmp_path / "none.key")
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        read_roster(tmp_path)
    with pytest.raises(DataError, match="can't be written: "):
        make_identity(secret_file(tmp_path / "file", b"") / "client.key")


def test_a_helper_is_named_by_the_key_that_seeds_are_sealed_to():
    me = Identity.of(bytes([9]) * 32)
    assert helper_key(me) == HelperKey.of(bytes([9]) * 32).public.hex()


def test_ids_are_collected_from_arguments_and_files(tmp_path):
    (tmp_path / "kim.id").write_text(KIM.hex() + "\n", encoding="utf8")
    (tmp_path / "rest.txt").write_text(
        f"# those who came later\n\n{LEE.hex()} lee 8   # the small phone\n{SAM.hex().upper()} sam\n", encoding="utf8"
    )
    other = Identity.of(bytes(32)).id
    named = Identity.of(bytes([1]) * 32).id
    roster = collect(
        [str(tmp_path / "kim.id"), str(tmp_path / "rest.txt"), other.hex(), f"ada={named.hex()}"], "ab" * 32, NOW, 4
    )
    assert set(roster.members) == {
        Member(KIM, "kim"),
        Member(LEE, "lee", 8),
        Member(SAM, "sam"),
        Member(other),
        Member(named, "ada"),
    }
    assert (roster.helper, roster.expires, roster.version) == (b"\xab" * 32, NOW, 4)
    assert roster.signatures == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no ids; want one member a line: ID NAME RANK_CAP"),
        ("# nothing\n", "has no ids"),
        (f"{KIM.hex()}\n{LEE.hex()} lee 8 x\n", "list.txt, line 2: got 4 words; want ID NAME RANK_CAP"),
        (f"{KIM.hex()} kim many\n", "list.txt, line 1: got a rank_cap of 'many'; want a whole number"),
        (f"{KIM.hex()} kim -1\n", "got a rank_cap of '-1'"),
        (f"{KIM.hex()} kim 0\n", "line 1: rank_cap: got 0; want 1 or more, or none"),
        (f"kim {KIM.hex()}\n", "line 1: got 'kim'; want 64 characters of hex"),
        (KIM.hex()[:-1], "want 64 characters of hex: what `keys init` printed"),
        ("0" * 64, "is no Ed25519 public key"),
        (f"{KIM.hex()}\n{LEE.hex()}\n{KIM.hex()} kim\n", f"roster.members: {KIM.hex()} is listed twice"),
        (f"{KIM.hex()} kim\n{LEE.hex()} kim\n", "roster.members: two are named 'kim'"),
        ("-----BEGIN PRIVATE KEY-----\n", "is a private key, which its owner alone should have"),
    ],
)
def test_a_list_that_can_not_be_a_roster_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text, encoding="utf8")
    with pytest.raises(DataError) as error:
        collect([str(tmp_path / "list.txt")])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nowhere.id", "nowhere.id: no such file, and no id; want a file of ids, an id in hex, or NAME=ID"),
        ("abc", "abc: got 'abc'; want 64 characters of hex"),
        ("kim=nobody", "kim=nobody: got 'nobody'; want 64 characters of hex"),
    ],
)
def test_an_argument_that_is_no_member_is_refused(entry, message):
    with pytest.raises(DataError) as error:
        collect([entry])
    assert str(error.value).startswith(message)


def test_bytes_that_are_no_text_are_no_list(tmp_path):
    (tmp_path / "list").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="list: is no text; want one member a line"):
        collect([str(tmp_path / "list")])


def test_a_helper_that_is_no_key_is_refused():
    with pytest.raises(DataError, match=r"^helper: got 'ab'; want 64 characters of hex"):
        collect([KIM.hex()], helper="ab")
    with pytest.raises(DataError, match=r"^roster\.helper: got 0000"):
        collect([KIM.hex()], helper="00" * 32)


@pytest.fixture
def admins(tmp_path):
    """Two admins' key files."""
    return [(make_identity(tmp_path / name), tmp_path / name) for name in ("one.key", "two.key")]


@pytest.fixture
def path(tmp_path):
    """An unsigned roster."""
    write_roster(collect([KIM.hex(), LEE.hex()], expires=NOW + 60), tmp_path / "roster.json")
    return tmp_path / "roster.json"


def test_several_admins_sign_one_after_another(path, admins):
    for _, key in admins:
        sign_roster(path, key, NOW)
    ids = [x.id for x, _ in admins]
    assert set(read_roster(path).signatures) == set(ids)
    read_roster(path).check(ids, NOW, least_admins=2)
    assert [x.name for x in path.parent.iterdir() if x.name.startswith(".")] == []


def test_a_roster_is_never_overwritten(path):
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"roster\.json: is there already"):
        write_roster(collect([SAM.hex()]), path)
    assert path.read_bytes() == before


def test_an_admin_signs_once(path, admins):
    sign_roster(path, admins[0][1], NOW)
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"roster.json: {admins[0][0].id.hex()} has signed it already"):
        sign_roster(path, admins[0][1], NOW)
    assert path.read_bytes() == before


def test_nobody_signs_what_is_stale_or_was_altered_under_another_signature(path, admins):
    with pytest.raises(DataError, match=r"roster\.json: roster: version 1 has expired"):
        sign_roster(path, admins[0][1], NOW + 60)
    sign_roster(path, admins[0][1], NOW)
    value = json.loads(path.read_text(encoding="utf8"))
    value["version"] = 2
    path.write_text(json.dumps(value), encoding="utf8")
    before = path.read_bytes()
    with pytest.raises(DataError, match=f"was altered since admin {admins[0][0].id.hex()} signed it"):
        sign_roster(path, admins[1][1], NOW)
    assert path.read_bytes() == before


def test_a_file_that_is_no_roster_is_named(tmp_path):
    (tmp_path / "roster.json").write_text("[]", encoding="utf8")
    with pytest.raises(DataError, match=r"roster\.json: roster: got a list of 0; want an object"):
        read_roster(tmp_path / "roster.json")


def test_a_file_is_described_without_its_secret(path, admins):
    made, key = admins[0]
    assert described(key) == [("id", made.id.hex()), ("as a helper", helper_key(made))]
    sign_roster(path, key, NOW)
    said = dict(described(path))
    assert said["members"] == "2"
    assert said["signed by"] == made.id.hex()
    assert said["expires"] == "2026-09-21 14:14 UTC"
    assert said["fingerprint"] == read_roster(path).fingerprint
    assert made.to_bytes().hex() not in str(described(key))
