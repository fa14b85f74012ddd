"""A helper of ``twoserver`` from its operator's files."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedpeft.errors import ConfigError, DataError, ProtocolError
from fedpeft.flower.helper import AnsweredFile, Service, helper_service
from fedpeft.run.keys import pinned, read_identity, read_roster
from fedpeft.secagg.helper import Helper, HelperKey
from fedpeft.secagg.sealing import NAME
from fedpeft.secagg.terms import Policy


@contextmanager
def serve_helper(
    key: Path,
    roster: Path,
    admins: Sequence[str],
    state: Path,
    certificate: Path,
    private_key: Path,
    address: str,
    policy: Policy,
    on_reply: Callable[[str], None],
) -> Iterator[tuple[Service, Helper]]:
    """A helper that answers for as long as the block lasts.

    key: what ``fedpeft keys init`` wrote; admins: ids in hex of who may sign the roster; state: the file of what was
    answered, made where there is none. Raises DataError for a file, and ConfigError for a setting, with which nothing
    could be answered.
    """
    if not admins:
        raise ConfigError("admin: got none; want the ids of those whose signature makes a roster valid")
    made = HelperKey.of(read_identity(key).to_bytes())
    people, trusted = read_roster(roster), frozenset(pinned(x, "admin") for x in admins)
    try:
        people.check(trusted, time.time())
    except ProtocolError as error:
        raise DataError(f"{roster}: {error}") from None
    if people.helper != made.public:
        names = people.helper.hex() if people.helper else "no helper"
        raise DataError(
            f"{roster}: names {names}; this key is {made.public.hex()}: have the admins make a roster with "
            f"`fedpeft keys roster --helper {made.public.hex()}`"
        )
    answered = AnsweredFile(state)
    answered.count()
    helper = Helper(made, people, trusted, policy, answered)
    with helper_service(helper, address, _read(certificate), _read(private_key), time.time, on_reply) as service:
        yield service, helper


def floors(min_cohort: int, max_dropout: float, min_slice: int) -> Policy:
    """The helper's own policy. Raises ConfigError, naming the option."""
    try:
        return Policy(min_cohort=min_cohort, max_dropout=max_dropout, min_slice=min_slice, suites=(NAME,))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}; want a PEM file") from None
