"""What a process needs to take part: one participant for all the clients that it serves."""

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

from fedpeft.channel import Codec, PlainChannel
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.flower.answers import Counts, Refusal
from fedpeft.flower.footprints import Footprint, Footprints
from fedpeft.flower.member import Secure
from fedpeft.flower.requests import ConstantsMissing
from fedpeft.flower.store import ClientStore
from fedpeft.flower.versions import VersionMissing
from fedpeft.rounds import Job, Trainer, Tuning
from fedpeft.rules import Rule, Weighting

_LOG = getLogger(__name__)


def _unsaid(client: int) -> None:
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Participant:
    """All that a process needs to take part: one for all the clients that it serves.

    store: in memory only for clients whose every message this very process gets; examples: how many
    a client has; rank: that it can train, where it is for it to say; holds_central: whether ``trainer`` can
    evaluate on the central test set; exactness: whether answers hold sketches of what was trained;
    tuning: what clients train for themselves when the run is over, and tuner: with what; None for nothing;
    secure: what makes its half of secure aggregation: where it is set, no client answers in the clear;
    up, down: the codecs of answers and of the adapter's changes, None for none; footprint: the memory that
    this process has taken, once it has done a job, None where it trains for many devices.
    """

    trainer: Trainer
    rule: Rule
    channel: PlainChannel
    weighting: Weighting
    seed: int
    store: ClientStore
    examples: Callable[[int], Counts]
    holds_central: bool = False
    rank: Callable[[int], int | None] = _unsaid
    exactness: bool = False
    tuning: Tuning | None = None
    tuner: Callable[[], Trainer] | None = None
    secure: Secure | None = None
    up: Codec | None = None
    down: Codec | None = None
    footprint: Callable[[Job], Footprint] | None = None

    def note(self, notes: Footprints | None, job: Job) -> None:
        """Write down the memory that a job has taken. What keeps it from being known does the training no harm."""
        if notes is None or self.footprint is None:
            return
        try:
            notes.note(job.client, self.footprint(job))
        except Exception as error:
            _LOG.warning("client %d: the memory that it took isn't known: %s", job.client, error)


class RefusedError(Exception):
    """A refusal that is to be answered."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


def refusal_of(error: Exception) -> Refusal:
    """What a client says of its own failure."""
    match error:
        case RefusedError():
            return error.refusal
        case ConstantsMissing() | VersionMissing():
            return Refusal("constants", str(error))
        case ProtocolError():
            return Refusal("refused", str(error))
        case ConfigError():
            return Refusal("failed", str(error))
    return Refusal("failed", f"{type(error).__name__}: {error}")
