"""Wires: the only importer of flwr. Rounds are driven and clients served over any Flower grid."""

from flwr.serverapp import Grid

from fedpeft.flower.answers import Capabilities, Counts
from fedpeft.flower.apps import answer, client_app, in_process, server_app
from fedpeft.flower.drive import Evaluation, drive, evaluate
from fedpeft.flower.fleet import Fleet, muster
from fedpeft.flower.inprocess import InProcessGrid
from fedpeft.flower.kept import under
from fedpeft.flower.post import Traffic
from fedpeft.flower.requests import Part
from fedpeft.flower.serve import Participant, serve
from fedpeft.flower.store import ClientStore

__all__ = [
    "Capabilities",
    "ClientStore",
    "Counts",
    "Evaluation",
    "Fleet",
    "Grid",
    "InProcessGrid",
    "Part",
    "Participant",
    "Traffic",
    "answer",
    "client_app",
    "drive",
    "evaluate",
    "in_process",
    "muster",
    "serve",
    "server_app",
    "under",
]
