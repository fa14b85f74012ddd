"""What every secure aggregation protocol must do, to put any protocol to."""

import tracemalloc
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ProtocolError
from fedpeft.secagg.protocol import Phase, Protocol, Step
from fedpeft.testing import meddling
from fedpeft.testing.laws import Law
from fedpeft.testing.sessions import Person, Second, Session, Setting, told

DIMS = (29, 13)
_LONG = 1 << 14  # numbers: enough bytes that their frequencies tell
_CHI_SQUARE = 255 + 12 * 22.6  # 255 degrees of freedom: deviation √510; what is around a vector adds a little
_MOST_KEPT = 512  # bytes of a state that is over
_SECRET = 16  # bytes that are drawn at once for a secret
_STRANGER = b"\x13" * 32
UNIFORM = "a masked vector looks like random bytes"


def secagg_conformance(
    protocol: Protocol,
    size: int = 7,
    second: Second | None = None,
    consistency: bool = True,
    skip: Collection[str] = (),
) -> tuple[Law, ...]:
    """Every check that a protocol must pass, to call one by one::

        @pytest.mark.parametrize("law", secagg_conformance(MyProtocol()))
        def test_my_protocol(law):
            law()

    size: clients of a session, of which the protocol must be able to lose one; second: its second server, if it has
    one; consistency: what sessions' parameters say of that; skip: names of checks that it fails on purpose. The suite
    of its sessions is the name in its label. One whose label says that it hides "nothing" is not asked to hide.
    Raises ValueError for a check to skip that there isn't, and a size of which none may be lost.

    They show that a protocol works and keeps to the interface. Whether it hides what it says is shown by no test.
    """
    unknown = sorted(set(skip) - set(CHECKS))
    if unknown:
        raise ValueError(f"skip: no such checks: {unknown}; there are {list(CHECKS)}")
    setting = Setting(protocol, size, second, consistency)
    if setting.may_lose < 1:
        raise ValueError(f"size: of {size} clients none may be lost, by the protocol's label; want a larger size")
    left_out = set(skip) if setting.hides else {UNIFORM, *skip}
    return tuple(Law(name, partial(check, setting)) for name, check in CHECKS.items() if name not in left_out)


def _need(is_so: bool, what: str) -> None:
    if not is_so:
        raise AssertionError(what)


def _exact(session: Session, passes: int, stayed: Collection[bytes]) -> None:
    """All passes are summed, and each sum is that of its survivors, among whom are all who stayed."""
    _need(len(session.sums) == passes, f"{len(session.sums)} sums of {passes} passes")
    for pass_, one in enumerate(session.sums):
        _need(one.survivors == tuple(sorted(set(one.survivors))), f"pass {pass_}: survivors not ascending, or twice")
        missing = set(stayed) - set(one.survivors)
        _need(not missing, f"pass {pass_}: {len(missing)} clients answered everything, and are not among the survivors")
        silent = [x for x in one.survivors if pass_ not in session.people[x].around.asked]
        _need(not silent, f"pass {pass_}: {len(silent)} survivors never gave a vector")
        want = session.plain(one.survivors, pass_)
        _need(one.total.dtype == np.uint32, f"pass {pass_}: a sum of {one.total.dtype}; want uint32")
        _need(one.total.shape == want.shape, f"pass {pass_}: a sum of shape {one.total.shape}; want {want.shape}")
        wrong = int((one.total != want).sum())
        _need(wrong == 0, f"pass {pass_}: {wrong} of {want.size} numbers are not the survivors' sum")


def labels(setting: Setting) -> None:
    """A label that says something, and numbers that a cohort of this size can have."""
    protocol, n = setting.protocol, setting.size
    label = protocol.label(n)
    _need(bool(label.name and label.hides and label.trusts), "a label without a name, what it hides, or who is trusted")
    _need(0 <= label.corrupt < 1 and 0 <= label.dropouts < 1, f"corrupt {label.corrupt}, dropouts {label.dropouts}")
    _need(1 <= protocol.threshold(n) <= n, f"a threshold of {protocol.threshold(n)} of {n}")
    _need(0 <= protocol.degree(n) < n, f"a degree of {protocol.degree(n)} of {n}")


def sums(setting: Setting) -> None:
    """Exact sums without losses, for each ring and one or two passes."""
    for m, dims in ((32, DIMS), (24, DIMS[:1]), (16, DIMS)):
        session = setting.begin(dims, m)
        _need(session.server.waiting == set(session.people), "the first phase does not ask everyone")
        _need(session.server.total is None, "there is a sum before anybody has answered")
        session.run()
        _exact(session, len(dims), session.people)
        _need(not session.refused and not session.server.culprits, "somebody honest was refused or blamed")
        _need(all(x.steps[-1].is_over for x in session.people.values()), "a client thinks that it isn't over")


def losses(setting: Setting) -> None:
    """Exact sums whoever is lost: as many as may be, from each phase on."""
    for at in range(len(setting.begin(DIMS).run())):
        session = setting.begin(DIMS, 24, seed=at)
        ids = sorted(session.people)
        lost = (ids[at % setting.size :] + ids)[: setting.may_lose]
        session.run({at: lost})
        _exact(session, len(DIMS), set(ids) - set(lost))


def drops(setting: Setting) -> None:
    """Going on without a client that the server was told to drop, before it answers."""
    for at in range(len(setting.begin(DIMS[:1]).run())):
        session = setting.begin(DIMS[:1], seed=at)
        for _ in range(at):
            session.phase()
        one = max(session.server.waiting)
        session.server.drop(one)
        _need(one not in session.server.waiting, "who was dropped is still waited for")
        _need(one not in session.server.outbox(), "who was dropped is still asked")
        session.run()
        _exact(session, 1, session.people.keys() - {one})


def garbage(setting: Setting) -> None:
    """One client that sends anything at all, in any phase, is refused; the others' sum is exact."""
    kinds = list(meddling.garbage().items())
    for at in range(len(setting.begin(DIMS[:1]).run())):
        for seed in range(0, len(kinds), setting.may_lose):
            session = setting.begin(DIMS[:1], seed=seed)
            for _ in range(at):
                session.phase()
            bad = dict(zip(sorted(session.server.waiting)[1:], kinds[seed : seed + setting.may_lose], strict=False))
            name = session.phase(meddling.instead({x: make for x, (_, make) in bad.items()})).name
            taken = [what for x, (what, _) in bad.items() if x not in session.refused]
            _need(not taken, f"{name}: took {' and '.join(taken)}")
            session.run()
            _exact(session, 1, session.people.keys() - bad.keys())


def changed(setting: Setting) -> None:
    """A message with a changed byte is refused by the server, or by the one client that it's for, and does no harm."""
    for at in range(len(setting.begin(DIMS[:1]).run())):
        for part in range(5):
            session = setting.begin(DIMS[:1], seed=part)
            for _ in range(at):
                session.phase()
            bad = max(session.server.waiting)
            session.may_refuse = True  # what is sealed for another client, that client alone can check
            session.phase(meddling.instead({bad: partial(meddling.flipped, part)}))
            session.run()
            if bad in session.refused or setting.hides:
                _need(len(session.gone) <= 1, f"one client's message made {len(session.gone)} others refuse")
                _exact(session, 1, session.people.keys() - {bad} - session.gone)


def strangers(setting: Setting) -> None:
    """Strangers, repeats and late answers are refused in each phase, and change nothing."""
    session = setting.begin(DIMS)
    while not session.server.is_over:
        phase, asked = session.server.phase, session.server.outbox()
        answers = {i: session.people[i].hear(phase, asked[i]).answer for i in sorted(asked)}
        first = next(iter(answers))
        _refused(session, _STRANGER, answers[first], "a stranger")
        for id_, message in answers.items():
            session.server.receive(id_, message)
            _refused(session, id_, message, "a repeat")
            _need(id_ not in session.server.waiting, "who has answered is still waited for")
        session.close(phase)
    _exact(session, len(DIMS), session.people)
    _refused(session, first, answers[first], "an answer after the end")


def too_few(setting: Setting) -> None:
    """With fewer than the threshold there is no sum."""
    session = setting.begin(DIMS[:1])
    stay = sorted(session.people)[: setting.protocol.threshold(setting.size) - 1]
    session.gone = session.people.keys() - set(stay)
    try:
        session.run()
    except ProtocolError:
        _need(session.server.is_over, "too few are left, and the session goes on")
        _need(session.server.total is None, "too few are left, and there is a sum")
        _need(not session.server.waiting, "the session is over, and somebody is waited for")
        return
    raise AssertionError(f"{len(stay)} of {setting.size} clients made a sum; the threshold is one more")


def refusals(setting: Setting) -> None:
    """A client refuses what is not next, without an exception; so no vector of a pass is given twice."""
    session = setting.begin(DIMS)
    session.run()
    for one in list(session.people.values())[:2]:
        for at, state in enumerate([b"", *(x.state for x in one.steps)]):
            others = [(*x, f"{x[0].name} of pass {x[0].pass_}") for i, x in enumerate(one.heard) if i != at]
            phase = one.heard[0][0]
            garbage = [(phase, x, "garbage") for x in (b"", b"\0", bytes(range(256)), one.heard[0][1][:-1])]
            for phase, message, what in (*others, *garbage):
                step = _after(one, state, message, phase)
                _need(step.was_refused, f"after {at} steps, {what} is answered")


def wiped(setting: Setting) -> None:
    """What a client keeps once it is over, or has refused, is short and has no secret in it."""
    session = setting.begin(DIMS)
    session.run()
    for one in session.people.values():
        secrets = [x for x in one.entropy.given if len(x) >= _SECRET]
        _need(bool(secrets) or not setting.hides, "nothing was drawn from the entropy")
        secrets += [x.tobytes() for x in one.around.vectors]
        kept = {"over": one.state}
        for at, step in enumerate(one.steps[:-1]):
            phase, message = one.heard[at + 1]
            kept[f"refused after {at + 1} steps"] = _after(one, step.state, message[:-1], phase).state
        for when, state in kept.items():
            _need(len(state) <= _MOST_KEPT, f"{len(state)} bytes are kept when it is {when}; want {_MOST_KEPT} at most")
            _need(not any(x in state for x in secrets), f"a secret is kept when it is {when}")


def pure(setting: Setting) -> None:
    """The same state, message and entropy give the same step, and the server draws nothing."""
    one, other = (setting.begin(DIMS[:1]) for _ in range(2))
    one.run()
    other.run()
    for id_, person in one.people.items():
        both = zip(person.steps, other.people[id_].steps, strict=True)
        same = all((a.state, a.answer) == (b.state, b.answer) for a, b in both)
        _need(same, "the same entropy gave other messages: randomness comes from somewhere else")


def streams(setting: Setting) -> None:
    """The server's memory does not grow with the cohort: it keeps one sum, and no client's vector."""
    size = 1 << 17
    session = setting.begin((size,))
    grown = 0
    while not session.server.is_over:
        phase, asked = session.server.phase, session.server.outbox()
        answers = {i: session.people[i].hear(phase, asked[i]).answer for i in sorted(asked)}
        tracemalloc.start()
        try:
            for id_ in sorted(asked):
                session.server.receive(id_, bytes(bytearray(answers.pop(id_))))  # a copy that is counted, if it is kept
            grown = max(grown, tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
        session.close(phase)
    _need(grown <= 10 * size, f"{grown / size / 4:.1f} vectors are kept of {setting.size}; want one sum")


def uniform(setting: Setting) -> None:
    """A constant vector, masked: all bytes are as frequent, and no two clients, passes or sessions have them alike."""
    for m, constant in ((32, 0), (16, 2**16 - 1)):
        sent = [x for seed in (1, 2) for x in _masked(setting.begin((_LONG, _LONG), m, seed, constant))]
        for message in sent:
            counts = np.bincount(message, minlength=256)
            chi_square = float(((counts - message.size / 256) ** 2 / (message.size / 256)).sum())
            _need(chi_square < _CHI_SQUARE, f"bytes are not uniform: chi-square {chi_square:.0f}, of about 255")
        for i, one in enumerate(sent):
            for other in sent[:i]:
                _need(one.size == other.size, "how long a message is depends on who sends it")
                alike = float((one == other).mean())
                _need(alike < 0.02, f"{alike:.1%} of two masked vectors are alike; want about 0.4%")


def _refused(session: Session, id_: bytes, message: bytes, who: str) -> None:
    try:
        session.server.receive(id_, message)
    except ProtocolError:
        return
    raise AssertionError(f"{who} was not refused")


def _after(one: Person, state: bytes, message: bytes, phase: Phase) -> Step:
    """The step of a client whose state is this."""
    one.around.told = told(phase)
    return one.side.answer(state, message, one.around, one.entropy)


def _masked(session: Session) -> Iterator[NDArray[np.uint8]]:
    """The longest answer of the first clients in each pass."""
    session.run()
    for one in list(session.people.values())[:3]:
        for pass_ in range(len(session.params.dims)):
            steps = [x.answer for x, (phase, _) in zip(one.steps, one.heard, strict=True) if phase.pass_ == pass_]
            yield np.frombuffer(max(steps, key=len), np.uint8)[-_LONG * session.params.m // 8 :]


CHECKS: Mapping[str, Callable[[Setting], None]] = {
    "its label says whom to believe": labels,
    "sums are exact": sums,
    "sums are exact whoever is lost, from any phase on": losses,
    "a client can be dropped in any phase": drops,
    "one client's garbage stops nobody": garbage,
    "a changed byte does no harm": changed,
    "strangers and repeats are refused": strangers,
    "too few make no sum": too_few,
    "a client refuses what is not next": refusals,
    "what is kept at the end has no secret": wiped,
    "randomness is what it is given": pure,
    "the server keeps one sum": streams,
    UNIFORM: uniform,
}
"""Every check by its name."""
