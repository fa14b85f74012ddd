"""What a report says of hostile clients, and of clients by rank."""

from pathlib import Path

import pytest

from fedpeft.report import FinalRecord, RunFolder, RunRecord, Score, Scores, history
from fedpeft.report.by_rank import hostile, ranks, runtimes
from fedpeft.report.history import History
from fedpeft.report.people import ClientData

TERMS = {"share": 0.3, "attack": "flip", "strength": 5.0}


def recorded(path: Path, clients: dict[int, ClientData], population: int, terms: dict[str, object] = TERMS) -> History:
    folder = RunFolder.create(path, "")
    folder.append(RunRecord("x", {"simulation": {"hostile": terms}}, clients=clients, population=population))
    honest = {n: Score(0.5, 0.1 * (n + 1)) for n, x in clients.items() if not x.hostile}
    folder.append(FinalRecord(1, Score(0.6, 0.8), Scores(0.6, 0.5, honest), 1.0, "f00d", 1, 1, None))
    return history(path)


def people(count: int, bad: set[int]) -> dict[int, ClientData]:
    return {n: ClientData(4, rank=2 if n < 3 else 4, hostile=n in bad) for n in range(count)}


@pytest.mark.parametrize(
    ("bad", "population", "terms", "said"),
    [
        ({1, 4}, 5, {}, " 2 of 5 clients (1, 4) were hostile and sent their change turned round, times 5."),
        ({1}, 5, {}, " 1 of 5 clients (1) was hostile and sent its change turned round, times 5."),
        ({1}, 900, {}, " 30 % of the clients were hostile and sent their change turned round, times 5."),
        (
            {1, 4},
            5,
            {"attack": "noise", "strength": 0.5},
            " 2 of 5 clients (1, 4) were hostile and sent their noise in place of a change, times 0.5.",
        ),
    ],
)
def test_the_head_says_how_many_attacked_who_and_how(
    tmp_path: Path, bad: set[int], population: int, terms: dict[str, object], said: str
) -> None:
    h = recorded(tmp_path / "a", people(5, bad), population, TERMS | terms)
    assert hostile(h) == f"{said} All scores of clients are of the others."


def test_very_many_hostile_clients_are_not_named(tmp_path: Path) -> None:
    h = recorded(tmp_path / "a", people(60, set(range(21))), 60)
    assert hostile(h).startswith(" 21 of 60 clients were hostile and sent")


def test_clients_by_rank_are_those_that_are_scored(tmp_path: Path) -> None:
    text = ranks(recorded(tmp_path / "a", people(5, {1, 4}), 5))
    assert "Accuracy on the clients’ own rows, of the honest ones.</p>" in text
    assert '2</th><td class="n">2</td><td class="n">20.0 %</td>' in text  # clients 0 and 2
    assert '4</th><td class="n">1</td><td class="n">40.0 %</td>' in text  # client 3
    assert "alone" not in text


def test_without_hostile_clients_all_are_counted(tmp_path: Path) -> None:
    h = recorded(tmp_path / "a", people(5, set()), 5, {})
    assert hostile(h) == ""
    assert "Accuracy on the clients’ own rows.</p>" in ranks(h)
    assert '2</th><td class="n">3</td>' in ranks(h)


def test_clients_by_runtime_have_their_accuracy_and_their_loss(tmp_path: Path) -> None:
    on = ("torch", "onnx int8", "torch", "onnx int8", "onnx int8")
    some = {n: ClientData(4, hostile=n == 3, runtime=x) for n, x in enumerate(on)}
    h = recorded(tmp_path / "a", some, 5)
    assert {n: x.runtime for n, x in h.run.clients.items()} == dict(enumerate(on))
    text = runtimes(h)
    assert "<h2>Clients by runtime</h2><p>Accuracy on the clients’ own rows, of the honest ones.</p>" in text
    cells = '</td><td class="n">'.join(("2", "35.0 %", "20.0 %", "0.500"))  # clients 1 and 4
    assert f'onnx int8</th><td class="n">{cells}</td></tr>' in text
    assert 'torch</th><td class="n">2</td><td class="n">20.0 %</td>' in text  # clients 0 and 2
    assert ranks(h) == ""


def test_clients_that_are_all_on_one_runtime_have_no_table_of_them(tmp_path: Path) -> None:
    assert runtimes(recorded(tmp_path / "a", {n: ClientData(4, runtime="torch") for n in range(3)}, 3)) == ""
    assert runtimes(recorded(tmp_path / "b", people(5, set()), 5)) == ""
