"""What records, ``privacy.json`` and a report say of secure aggregation."""

import json
from pathlib import Path

import pytest

from fedpeft.errors import DataError
from fedpeft.report import PhaseRecord, RoundRecord, SecureRecord, label_json, write_privacy
from fedpeft.report.fields import Fields
from fedpeft.report.secure import secured
from fedpeft.secagg import Full, KRegular, SecurityLabel, TwoServer

LABEL = SecurityLabel(
    "full", "each client's <vector>", ("the admins & others", "one's own machine"), 0.414, 0.25, ("the <sum>",)
)
PHASES = {
    "keys": PhaseRecord(12, 12, 1_200, 24_000, 0.5),
    "vectors": PhaseRecord(12, 9, 900_000, 1_200, 2.25),
}
RECORD = SecureRecord(2, 9, 3, 60_000, {5: "sent <b>bad</b> shares", 11: "tampered"}, PHASES)


def read(values: object) -> SecureRecord:
    return SecureRecord.read(Fields.of(values, "line 3"))


def test_a_record_is_the_same_after_it_was_json() -> None:
    again = read(json.loads(json.dumps(RECORD.json())))
    assert again == RECORD
    assert list(again.phases) == ["keys", "vectors"]  # in the order in which they were
    assert list(again.culprits) == [5, 11]
    assert RECORD.json() == {
        "attempts": 2,
        "threshold": 9,
        "cut": 3,
        "numbers": 60_000,
        "culprits": {"5": "sent <b>bad</b> shares", "11": "tampered"},
        "phases": {
            "keys": {"asked": 12, "answered": 12, "bytes_up": 1_200, "bytes_down": 24_000, "seconds": 0.5},
            "vectors": {"asked": 12, "answered": 9, "bytes_up": 900_000, "bytes_down": 1_200, "seconds": 2.25},
        },
    }


def test_what_a_record_does_not_have_is_nothing() -> None:
    assert read({}) == SecureRecord(0, 0, 0, 0, {}, {})
    assert read({"phases": {"keys": {}}}).phases == {"keys": PhaseRecord()}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"attempts": "2"}, "line 3, attempts: got '2'; want a number"),
        ({"cut": 0.5}, "line 3, cut: got 0.5; want a whole number"),
        ({"culprits": {"five": "x"}}, "line 3, culprits: got the key 'five'; want a client's number"),
        ({"culprits": {"5": 1}}, "line 3, culprits, 5: got 1; want a text"),
        ({"phases": {"keys": 7}}, "line 3, phases, keys: got 7; want an object"),
        ({"phases": {"keys": {"seconds": "1"}}}, "line 3, phases, keys, seconds: got '1'; want a number"),
    ],
)
def test_what_is_damaged_is_named(values: object, told: str) -> None:
    with pytest.raises(DataError) as caught:
        read(values)
    assert str(caught.value) == told


def test_a_round_has_the_record_in_its_line_and_one_in_the_clear_has_none() -> None:
    secure = RoundRecord(1, secure=RECORD)
    again = RoundRecord.read(Fields.of(json.loads(json.dumps(secure.json())), "line 1"))
    assert again.secure == RECORD
    assert "secure" not in RoundRecord(1).json() or RoundRecord(1).json()["secure"] is None
    assert RoundRecord.read(Fields.of(json.loads(json.dumps(RoundRecord(1).json())), "line 1")).secure is None


@pytest.mark.parametrize("simulated", [True, False])
def test_privacy_is_the_label_as_plain_values(tmp_path: Path, simulated: bool) -> None:
    label = label_json(LABEL, simulated)
    assert label == {
        "protocol": "full",
        "hides": "each client's <vector>",
        "trusts": ["the admins & others", "one's own machine"],
        "corrupt": 0.414,
        "dropouts": 0.25,
        "misses": ["the <sum>"],
        "simulated": simulated,
    }
    write_privacy(tmp_path, label)
    text = (tmp_path / "privacy.json").read_text(encoding="utf8")
    assert json.loads(text) == {"schema": 1, "security": label, "differential_privacy": None}
    assert text.endswith("}\n")


def test_a_run_in_the_clear_has_no_section() -> None:
    assert secured({}, []) == ""
    assert secured({}, [RECORD]) == ""


def test_the_section_says_whom_to_believe_and_what_is_not_covered() -> None:
    said = secured(label_json(LABEL, True), [])
    assert said == (
        "<h2>Secure aggregation: full</h2>"
        "<p><b>Simulated:</b> one process made all identities, so nothing here was hidden from it.</p>"
        "<p>Hides each client&#x27;s &lt;vector&gt;. "
        "Stands against 41 % of a round’s clients corrupt and 25 % lost.</p>"
        "<p><b>Who must be trusted, and for what</b></p>"
        "<ul><li>the admins &amp; others</li><li>one&#x27;s own machine</li></ul>"
        "<p><b>What is not covered</b></p><ul><li>the &lt;sum&gt;</li></ul>"
    )
    assert "Simulated" not in secured(label_json(LABEL, False), [])
    assert "Stands against – of a round’s clients corrupt and – lost." in secured({"protocol": "x"}, [])


def test_the_section_has_each_phase_over_all_rounds_and_who_cheated() -> None:
    later = SecureRecord(1, 8, 0, 40_000, {}, {"vectors": PhaseRecord(10, 10, 100_000, 800, 0.75)})
    said = secured(label_json(LABEL, False), [RECORD, later])
    head = "".join(
        f'<th class="n">{x}</th>'
        for x in ("Asked, a round", "Lost, in all", "Up, a client", "Down, a client", "Seconds, a round")
    )
    assert f"<thead><tr><th>Phase</th>{head}</tr></thead>" in said

    def row(name: str, *cells: str) -> str:
        return f'<tr><th scope="row">{name}</th>' + "".join(f'<td class="n">{x}</td>' for x in cells) + "</tr>"

    assert row("keys", "12.0", "0", "100 bytes", "2 kB", "0.50") in said
    assert row("vectors", "11.0", "3", "52.6 kB", "91 bytes", "1.50") in said
    assert "0.003 % of the numbers that clients sent were cut at the ring’s range; a larger channel.range would" in said
    cheats = "<li>client 5: sent &lt;b&gt;bad&lt;/b&gt; shares</li><li>client 11: tampered</li>"
    assert f"<p><b>Left out after cheating</b></p><ul>{cheats}</ul>" in said
    honest = secured(label_json(LABEL, False), [later])
    assert "No number was cut at the ring’s range.</p>" in honest
    assert "cheating" not in honest


@pytest.mark.parametrize("protocol", [Full(), TwoServer(), KRegular()])
def test_every_protocols_label_fills_its_section(protocol: Full | TwoServer | KRegular) -> None:
    label = protocol.label(60)
    said = secured(label_json(label, False), [])
    assert said.count("<li>") == len(label.trusts) + len(label.misses) > 3
    assert f"<h2>Secure aggregation: {label.name}</h2>" in said
