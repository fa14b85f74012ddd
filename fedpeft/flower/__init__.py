"""Wires: the only importer of flwr. Rounds are driven and clients served over any Flower grid."""

from flwr.serverapp import Grid

from fedpeft.flower.agreement import Terms
from fedpeft.flower.answers import Capabilities, Counts
from fedpeft.flower.apps import answer, client_app, in_process, server_app
from fedpeft.flower.drive import Evaluation, OnReply, drive, evaluate
from fedpeft.flower.farewell import farewell
from fedpeft.flower.fleet import Fleet
from fedpeft.flower.flow import Flow
from fedpeft.flower.footprints import Footprint, Footprints
from fedpeft.flower.identities import identities
from fedpeft.flower.inprocess import InProcessGrid
from fedpeft.flower.journal import Journal
from fedpeft.flower.kept import its_own, under, with_own
from fedpeft.flower.kits import KitMissingError
from fedpeft.flower.losses import Losses
from fedpeft.flower.member import Secure
from fedpeft.flower.muster import muster
from fedpeft.flower.participant import Participant
from fedpeft.flower.post import Leg, Traffic
from fedpeft.flower.registry import Ledger, Registry
from fedpeft.flower.requests import Part
from fedpeft.flower.secure import drive_secure, retried
from fedpeft.flower.serve import serve
from fedpeft.flower.shelf import Shelf
from fedpeft.flower.shipping import Shipping
from fedpeft.flower.store import ClientStore
from fedpeft.flower.vault import Vault
from fedpeft.flower.versions import Versions
from fedpeft.flower.virtual import VirtualGrid, virtual

__all__ = [
    "Capabilities",
    "ClientStore",
    "Counts",
    "Evaluation",
    "Fleet",
    "Flow",
    "Footprint",
    "Footprints",
    "Grid",
    "InProcessGrid",
    "Journal",
    "KitMissingError",
    "Ledger",
    "Leg",
    "Losses",
    "OnReply",
    "Part",
    "Participant",
    "Registry",
    "Secure",
    "Shelf",
    "Shipping",
    "Terms",
    "Traffic",
    "Vault",
    "Versions",
    "VirtualGrid",
    "answer",
    "client_app",
    "drive",
    "drive_secure",
    "evaluate",
    "farewell",
    "identities",
    "in_process",
    "its_own",
    "muster",
    "retried",
    "serve",
    "server_app",
    "under",
    "virtual",
    "with_own",
]
