"""A round as a state machine, with no I/O: who is asked, what is received, what comes out."""

from fedpeft.rounds.answer import answer_size, contribute
from fedpeft.rounds.availability import Availability, every
from fedpeft.rounds.buffered import Buffer, Buffered, Synchronous
from fedpeft.rounds.coded import compress
from fedpeft.rounds.devices import FATES, Device, Errand, Population, Visit, bytes_in, populate, trained_rows
from fedpeft.rounds.exactness import Exactness
from fedpeft.rounds.metrics import Metrics
from fedpeft.rounds.places import place
from fedpeft.rounds.plain import ListRound, Outcome, Round, SumRound
from fedpeft.rounds.profiles import PACKAGED
from fedpeft.rounds.ranks import WHOLE, Column, Levels, Listed, Memory, Ranks, Whole
from fedpeft.rounds.secure import SecureRound, contribute_ring, grids, shared_digest
from fedpeft.rounds.seeds import derive
from fedpeft.rounds.selection import Selection, draw
from fedpeft.rounds.trainer import Done, Failed, Job, Trainer, Trial
from fedpeft.rounds.tuning import Tuned, Tuning

__all__ = [
    "FATES",
    "PACKAGED",
    "WHOLE",
    "Availability",
    "Buffer",
    "Buffered",
    "Column",
    "Device",
    "Done",
    "Errand",
    "Exactness",
    "Failed",
    "Job",
    "Levels",
    "ListRound",
    "Listed",
    "Memory",
    "Metrics",
    "Outcome",
    "Population",
    "Ranks",
    "Round",
    "SecureRound",
    "Selection",
    "SumRound",
    "Synchronous",
    "Trainer",
    "Trial",
    "Tuned",
    "Tuning",
    "Visit",
    "Whole",
    "answer_size",
    "bytes_in",
    "compress",
    "contribute",
    "contribute_ring",
    "derive",
    "draw",
    "every",
    "grids",
    "place",
    "populate",
    "shared_digest",
    "trained_rows",
]
