"""A roster: who is believed, and every roster that is not."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import ProtocolError
from fedpeft.secagg.encoding import V, canonical
from fedpeft.secagg.identity import Identity, verify
from fedpeft.secagg.roster import FORMAT, Member, Roster

ADMIN, OTHER, STRANGER = (Identity.of(bytes([7 + i]) * 32) for i in range(3))
PEOPLE = [Identity.of(bytes([40 + i]) * 32) for i in range(5)]
NOW = 1_790_000_000.0
HELPER = bytes(range(32))


def listed(**changes):
    members = (Member(PEOPLE[0].id, "kim", 8), Member(PEOPLE[1].id, "lee"), *(Member(x.id) for x in PEOPLE[2:]))
    return replace(Roster(members, HELPER, NOW + 3600, 3), **changes)


def altered(roster, change):
    """The roster after somebody edited the file."""
    value = json.loads(roster.to_json())
    change(value)
    return Roster.from_json(json.dumps(value))


def test_members_are_in_order_of_their_ids_whatever_order_they_come_in():
    ids = [x.id for x in listed().members]
    assert ids == sorted(x.id for x in PEOPLE)
    assert Roster(tuple(reversed(listed().members))).members == listed().members
    assert listed().ids == {x.id for x in PEOPLE}
    assert listed().by_id[PEOPLE[0].id] == Member(PEOPLE[0].id, "kim", 8)


def test_a_roster_that_a_pinned_admin_signed_is_believed():
    listed().signed(ADMIN).check([ADMIN.id], NOW)
    listed().signed(ADMIN).check([OTHER.id, ADMIN.id], NOW + 3599.9, least_version=3)
    replace(listed(), expires=None).signed(ADMIN).check([ADMIN.id], NOW + 1e9)


def test_several_admins_can_sign_and_a_strangers_signature_does_no_harm():
    both = listed().signed(ADMIN).signed(OTHER).signed(STRANGER)
    both.check([ADMIN.id, OTHER.id], NOW, least_admins=2)
    both.check([OTHER.id], NOW)
    assert set(both.signatures) == {ADMIN.id, OTHER.id, STRANGER.id}


def test_what_is_signed_is_the_canonical_json_of_all_but_the_signatures():
    value = json.loads(listed().to_json())
    del value["signatures"]
    assert value["format"] == FORMAT == "fedpeft-sa/1/roster"
    signature = listed().signed(ADMIN).signatures[ADMIN.id]
    assert verify(ADMIN.id, signature, V + b"roster" + canonical(value))
    assert listed().signed(OTHER).signed(ADMIN).signatures[ADMIN.id] == signature


def test_the_file_reads_back_as_it_was():
    roster = listed().signed(ADMIN).signed(OTHER)
    assert Roster.from_json(roster.to_json()) == roster
    assert Roster.from_json(roster.to_json().encode()).to_json() == roster.to_json()
    bare = Roster((Member(PEOPLE[0].id),))
    assert Roster.from_json(bare.to_json()) == bare
    assert sum(PEOPLE[i].id.hex() in line for line in roster.to_json().splitlines() for i in range(5)) == 5


def test_a_part_of_a_second_is_not_kept_so_that_it_is_not_lost():
    roster = listed(expires=NOW + 0.7).signed(ADMIN)
    assert roster.expires == NOW
    Roster.from_json(roster.to_json()).check([ADMIN.id], NOW - 1)


@pytest.mark.parametrize(
    ("roster", "pinned", "want", "message"),
    [
        (listed(), [ADMIN.id], {}, "nobody has signed it; want an admin's signature: `fedpeft keys sign`"),
        (listed(expires=NOW).signed(ADMIN), [ADMIN.id], {}, "version 3 has expired, 0.0 hours ago; want one in force"),
        (listed(expires=NOW - 9000).signed(ADMIN), [ADMIN.id], {}, "has expired, 2.5 hours ago"),
        (listed().signed(ADMIN), [ADMIN.id], {"least_version": 4}, "got version 3; want 4 or later"),
        (listed().signed(STRANGER), [ADMIN.id], {}, f"signed by {STRANGER.id.hex()}; want a pinned admin's, of "),
        (listed().signed(ADMIN), [], {}, "want a pinned admin's, of nobody"),
        (listed().signed(ADMIN).signed(STRANGER), [ADMIN.id], {"least_admins": 2}, "signed by 1 pinned admins"),
    ],
)
def test_a_roster_that_is_not_believed_says_why(roster, pinned, want, message):
    with pytest.raises(ProtocolError, match=r"^roster: ") as error:
        roster.check(pinned, NOW, **want)
    assert message in str(error.value)


def shift(value):
    value["expires"] += 1


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["members"].pop(),
        lambda v: v["members"].append({"id": STRANGER.id.hex(), "name": "", "rank_cap": None}),
        lambda v: v["members"][0].update(rank_cap=64),
        lambda v: v["members"][0].update(name="someone"),
        lambda v: v.update(version=4),
        lambda v: v.update(expires=None),
        lambda v: v.update(helper=STRANGER.id.hex()),
        shift,
    ],
)
def test_a_roster_that_was_changed_after_it_was_signed_is_refused(change):
    with pytest.raises(ProtocolError, match=f"was altered since admin {ADMIN.id.hex()} signed it; want it as signed"):
        altered(listed().signed(ADMIN), change).check([ADMIN.id], NOW)


def test_one_bad_signature_of_a_pinned_admin_is_enough_to_refuse():
    roster = listed().signed(ADMIN)
    mixed = replace(roster, signatures={**roster.signatures, OTHER.id: bytes(64)})
    with pytest.raises(ProtocolError, match=f"altered since admin {OTHER.id.hex()}"):
        mixed.check([ADMIN.id, OTHER.id], NOW)


def test_an_admins_signature_does_not_pass_for_anothers():
    roster = listed().signed(STRANGER)
    stolen = replace(roster, signatures={ADMIN.id: roster.signatures[STRANGER.id]})
    with pytest.raises(ProtocolError, match="was altered"):
        stolen.check([ADMIN.id], NOW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": ()}, "members: got 0; want 1 to 100,000"),
        ({"members": (Member(ADMIN.id), Member(ADMIN.id, "twice"))}, f"members: {ADMIN.id.hex()} is listed twice"),
        ({"members": (Member(ADMIN.id, "kim"), Member(OTHER.id, "kim"))}, "members: two are named 'kim'"),
        ({"helper": bytes(31)}, "helper: got 00"),
        ({"helper": bytes(32)}, "helper: got 00"),
        ({"expires": -1}, "expires: got -1; want unix seconds"),
        ({"expires": float("nan")}, "expires: got nan"),
        ({"version": 0}, "version: got 0; want 1 or more"),
    ],
)
def test_a_roster_that_makes_no_sense_is_not_made(change, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        listed(**change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((bytes(31),), "is no Ed25519 public key; want what `fedpeft keys init` printed"),
        ((bytes(32),), "is no Ed25519 public key"),
        ((ADMIN.id, "two\nlines"), "name: got 'two\\nlines'; want printable text"),
        ((ADMIN.id, "x" * 201), "want printable text of at most 200 characters"),
        ((ADMIN.id, "", 0), "rank_cap: got 0; want 1 or more, or none"),
    ],
)
def test_a_member_that_makes_no_sense_is_not_made(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Member(*arguments)


def good():
    return json.loads(listed().signed(ADMIN).to_json())


def put(*path, to):
    def change(value):
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("format", to="fedpeft-sa/2/roster"),
            "roster.format: got 'fedpeft-sa/2/roster'; want 'fedpeft-sa/1/roster'",
        ),
        (put("extra", to=1), "roster.'extra': no such key"),
        (lambda v: v.pop("helper"), "roster.helper: is missing"),
        (put("version", to=True), "roster.version: got True; want a whole number"),
        (put("version", to=0), "roster.version: got 0; want a whole number from 1"),
        (put("expires", to="soon"), "roster.expires: got 'soon'"),
        (put("helper", to="00"), "roster.helper: got '00'; want 64 characters of lowercase hex"),
        (put("helper", to="00" * 32), "roster.helper: got 0000"),
        (put("members", to={}), "roster.members: got an object of 0; want a list"),
        (put("members", to=[]), "roster.members: got 0; want 1 to"),
        (put("members", to=[{}] * 100_001), "roster.members: got 100,001 entries; want at most 100,000"),
        (put("members", 1, to=5), "roster.members[1]: got 5; want an object"),
        (put("members", 1, "id", to="zz"), "roster.members[1].id: got 'zz'"),
        (put("members", 1, "id", to="00" * 32), "roster.members[1].id: 0000"),
        (put("members", 1, "id", to=ADMIN.id.hex().upper()), "roster.members[1].id: got"),
        (put("members", 1, "name", to=None), "roster.members[1].name: got None"),
        (put("members", 1, "name", to="\x1b[2J"), "roster.members[1].name: got '\\x1b[2J'; want printable text"),
        (put("members", 1, "rank_cap", to=0), "roster.members[1].rank_cap: got 0"),
        (lambda v: v["members"].append(v["members"][0]), "is listed twice; want each once"),
        (put("signatures", to=[]), "roster.signatures: got a list of 0; want an object"),
        (put("signatures", ADMIN.id.hex(), to="00"), "want 128 characters of lowercase hex"),
        (put("signatures", "admin", to="00" * 64), "the admin: got 'admin'; want 64 characters"),
        (put("signatures", to={f"{i:064x}": "00" * 64 for i in range(101)}), "got 101 entries; want at most 100"),
    ],
)
def test_a_file_that_is_no_roster_is_refused_with_the_key(change, message):
    value = good()
    change(value)
    with pytest.raises(ProtocolError, match=r"^roster") as error:
        Roster.from_json(json.dumps(value))
    assert message in str(error.value)


@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60)))
@settings(max_examples=100, deadline=None)
def test_no_bytes_make_anything_but_a_roster_or_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        Roster.from_json(data)


@given(at=st.integers(0, 10**6), byte=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_roster_with_any_byte_changed_is_refused_or_says_the_same(at, byte):
    text = bytearray(listed().signed(ADMIN).to_json().encode())
    text[at % len(text)] = byte
    try:
        roster = Roster.from_json(bytes(text))
        roster.check([ADMIN.id], NOW)
    except ProtocolError:
        return
    assert roster == listed().signed(ADMIN)
