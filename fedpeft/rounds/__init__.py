"""A round as a state machine, with no I/O: who is asked, what is received, what comes out."""

from fedpeft.rounds.availability import Availability, every
from fedpeft.rounds.buffered import Buffer, Buffered, Synchronous
from fedpeft.rounds.devices import FATES, Device, Errand, Population, Visit, populate, trained_rows
from fedpeft.rounds.metrics import Metrics
from fedpeft.rounds.plain import ListRound, Outcome, Round, SumRound, contribute
from fedpeft.rounds.profiles import PACKAGED
from fedpeft.rounds.seeds import derive
from fedpeft.rounds.selection import Selection, draw
from fedpeft.rounds.trainer import Done, Failed, Job, Trainer, Trial

__all__ = [
    "FATES",
    "PACKAGED",
    "Availability",
    "Buffer",
    "Buffered",
    "Device",
    "Done",
    "Errand",
    "Failed",
    "Job",
    "ListRound",
    "Metrics",
    "Outcome",
    "Population",
    "Round",
    "Selection",
    "SumRound",
    "Synchronous",
    "Trainer",
    "Trial",
    "Visit",
    "contribute",
    "derive",
    "draw",
    "every",
    "populate",
    "trained_rows",
]
