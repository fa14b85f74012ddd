"""A client's own file: who it is, whom it believes, what it agrees to; each mistake by its key."""

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from fedpeft.errors import ConfigError, DataError, ProtocolError
from fedpeft.run.keys import collect, make_identity, sign_roster, write_roster
from fedpeft.run.policies import Trust, policy_of, read_credentials
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.terms import Policy

NOW = 1_790_000_000.0


@pytest.fixture
def place(tmp_path):
    """A client's folder: its key, a signed roster, and its file; with what the file says."""
    admin = make_identity(tmp_path / "admin.key")
    client = make_identity(tmp_path / "client.key")
    others = [Identity.of(bytes([50 + i]) * 32).id.hex() for i in range(4)]
    write_roster(collect([client.id.hex(), *others], expires=NOW + 100, version=3), tmp_path / "roster.json")
    sign_roster(tmp_path / "roster.json", tmp_path / "admin.key", NOW)

    def write(**changes):
        said = {"identity": '"client.key"', "roster": '"roster.json"', "admins": f'["{admin.id.hex()}"]'} | changes
        lines = [f"{key} = {value}" for key, value in said.items() if value and key != "policy"]
        text = "[trust]\n" + "\n".join(lines) + "\n[policy]\n" + changes.get("policy", "")
        (tmp_path / "client.toml").write_text(text, encoding="utf8")
        return tmp_path / "client.toml"

    return write, client, admin


def test_a_clients_file_says_who_it_is_whom_it_believes_and_what_it_agrees_to(place):
    write, client, admin = place
    found = read_credentials(write(policy='min_cohort = 10\nsuites = ["full"]\nmin_noise = "0.5"\nmax_rounds = 7'), NOW)
    assert found.identity.id == client.id
    assert found.roster.version == 3
    assert found.admins == {admin.id}
    assert found.policy == Policy(min_cohort=10, suites=("full",), min_noise="0.5", max_rounds=7)
    assert (found.least_admins, found.least_version) == (1, 1)
    assert client.to_bytes().hex() not in repr(found)


def test_what_is_not_said_is_as_strict_as_usual(place):
    assert read_credentials(place[0](), NOW).policy == Policy()


def test_another_key_file_can_take_the_place_of_the_one_that_is_named(place, tmp_path):
    write, client, _ = place
    (tmp_path / "client.key").rename(tmp_path / "moved.key")
    assert read_credentials(write(), NOW, tmp_path / "moved.key").identity.id == client.id


def test_a_roster_that_has_expired_since_is_refused_by_its_client(place):
    found = read_credentials(place[0](), NOW)
    found.check(NOW + 99)
    with pytest.raises(ProtocolError, match="version 3 has expired"):
        found.check(NOW + 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": ""}, "trust.identity: is missing; want text"),
        ({"roster": "5"}, "trust.roster: got 5; want text"),
        ({"admins": ""}, "trust.admins: is missing; want a list of text"),
        ({"admins": "[]"}, "trust.admins: got none; want the id of at least one admin"),
        ({"admins": '["ab"]'}, "trust.admins[0]: got 'ab'; want 64 characters of hex"),
        ({"admins": f'["{"0" * 64}"]'}, f"trust.admins[0]: {'0' * 64} is no Ed25519 public key"),
        ({"admins": '["a", "a"]'}, "trust.admins: one is listed twice; want each once"),
        ({"least_admins": "2"}, "trust.least_admins: got 2; want 1 to 1, as many as are named"),
        ({"least_admins": "0"}, "trust.least_admins: got 0; want 1 to 1"),
        ({"least_version": "0"}, "trust.least_version: got 0; want 1 or more"),
        ({"admin": '"x"'}, "trust.admin: no such key; did you mean admins?"),
        ({"policy": "min_cohort = 2"}, "policy.min_cohort: got 2; want 3 or more"),
        ({"policy": "min_cohorts = 5"}, "policy.min_cohorts: no such key; did you mean min_cohort?"),
        ({"policy": "min_cohort = '5'"}, "policy.min_cohort: got '5'; want a whole number"),
        ({"policy": "min_noise = 0.5"}, "policy.min_noise: got 0.5; want text"),
        ({"policy": "min_noise = '-1'"}, "policy.min_noise: got '-1'; want a decimal string"),
        ({"policy": "consistency = 'no'"}, "policy.consistency: got 'no'; want true or false"),
        ({"policy": "suites = ['full', 'mock']"}, "policy.suites: got 'mock', which hides nothing and is for tests"),
        ({"policy": "[other]"}, "other: no such section; want [trust] and [policy]"),
    ],
)
def test_a_mistake_in_a_clients_file_is_named_by_its_key(place, changes, message):
    with pytest.raises(ConfigError, match=r"client\.toml: ") as error:
        read_credentials(place[0](**changes), NOW)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "now", "message"),
    [
        ({}, NOW + 100, "roster.json: roster: version 3 has expired"),
        ({"least_version": "4"}, NOW, "roster.json: roster: got version 3; want 4 or later"),
        ({"admins": f'["{Identity.of(bytes(32)).id.hex()}"]'}, NOW, "want a pinned admin's, of 3b6a27bc"),
        ({"roster": '"none.json"'}, NOW, "none.json: no such file"),
        ({"identity": '"none.key"'}, NOW, "none.key: no such file"),
        ({"identity": '"admin.key"'}, NOW, "roster.json: roster: version 3 has no member"),
    ],
)
def test_what_the_file_names_must_be_in_order(place, changes, now, message):
    with pytest.raises(DataError) as error:
        read_credentials(place[0](**changes), now)
    assert message in str(error.value)


def test_a_file_that_is_not_there_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: no such file; want a client's \[trust\] and \[policy\]"):
        read_credentials(tmp_path / "none.toml", NOW)
    (tmp_path / "bad.toml").write_text("[trust", encoding="utf8")
    with pytest.raises(ConfigError, match=r"bad\.toml: can't be read as TOML"):
        read_credentials(tmp_path / "bad.toml", NOW)


def test_the_policy_alone_can_be_read_from_plain_values():
    assert policy_of({}) == Policy()
    assert policy_of({"bases": ["a", "b"], "largest_range": 4}) == Policy(bases=("a", "b"), largest_range=4.0)


def test_the_documentation_has_every_key_with_its_default():
    text = (Path(__file__).parents[2] / "docs" / "secure-aggregation.md").read_text(encoding="utf8")
    rows = [
        [x.strip().strip("`") for x in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    said = {name.strip("` "): row[1] for row in rows for name in row[0].split(",")}
    assert set(said) == {x.name for x in fields(Policy)}
    for name, default in said.items():
        value = getattr(Policy(), name)
        if value in (None, ()):
            assert default == ("none" if value is None else "any")
        elif name == "min_threshold":
            assert default == "2/3"
            assert value == 2 / 3
        else:
            given = tomllib.loads(f"x = {default}")["x"]
            assert (tuple(given) if isinstance(given, list) else given) == value
    lines = [x.strip() for x in text.splitlines()]
    start = lines.index("[trust]")
    example = tomllib.loads("\n".join(lines[start : lines.index("", start)]))
    assert set(example["trust"]) == {x.name for x in fields(Trust)}
