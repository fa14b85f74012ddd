"""A round as a state machine, with no I/O: who is asked, what is received, what comes out."""

from fedpeft.rounds.metrics import Metrics
from fedpeft.rounds.plain import ListRound, Outcome, Round, SumRound, contribute
from fedpeft.rounds.seeds import derive
from fedpeft.rounds.selection import Selection
from fedpeft.rounds.trainer import Done, Failed, Job, Trainer, Trial

__all__ = [
    "Done",
    "Failed",
    "Job",
    "ListRound",
    "Metrics",
    "Outcome",
    "Round",
    "Selection",
    "SumRound",
    "Trainer",
    "Trial",
    "contribute",
    "derive",
]
