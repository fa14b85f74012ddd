"""Wires: the only importer of flwr. Rounds are driven and clients served over any Flower grid."""

from flwr.serverapp import Grid

from fedpeft.flower.answers import Capabilities, Counts
from fedpeft.flower.apps import answer, client_app, in_process, server_app
from fedpeft.flower.drive import Evaluation, OnReply, drive, evaluate
from fedpeft.flower.fleet import Fleet
from fedpeft.flower.flow import Flow
from fedpeft.flower.inprocess import InProcessGrid
from fedpeft.flower.kept import its_own, under, with_own
from fedpeft.flower.muster import muster
from fedpeft.flower.post import Traffic
from fedpeft.flower.registry import Ledger, Registry
from fedpeft.flower.requests import Part
from fedpeft.flower.serve import Participant, serve
from fedpeft.flower.store import ClientStore
from fedpeft.flower.virtual import VirtualGrid, virtual

__all__ = [
    "Capabilities",
    "ClientStore",
    "Counts",
    "Evaluation",
    "Fleet",
    "Flow",
    "Grid",
    "InProcessGrid",
    "Ledger",
    "OnReply",
    "Part",
    "Participant",
    "Registry",
    "Traffic",
    "VirtualGrid",
    "answer",
    "client_app",
    "drive",
    "evaluate",
    "in_process",
    "its_own",
    "muster",
    "serve",
    "server_app",
    "under",
    "virtual",
    "with_own",
]
