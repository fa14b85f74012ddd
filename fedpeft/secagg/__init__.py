"""Sums that nobody learns the terms of: the protocols as frozen states and messages, no I/O."""

from fedpeft.secagg.encoding import canonical, digest
from fedpeft.secagg.full import Full, KRegular
from fedpeft.secagg.identity import Identity, verify
from fedpeft.secagg.masks import CIPHERS, Mask, add_masks
from fedpeft.secagg.mock import Mock
from fedpeft.secagg.params import Params, decimal, hash_models
from fedpeft.secagg.policy import Expected, History, Policy, check, slice_is_safe
from fedpeft.secagg.protocol import ClientSide, Phase, Protocol, Refused, SecurityLabel, ServerSide, Step, Vectors
from fedpeft.secagg.roster import Member, Roster
from fedpeft.secagg.twoserver import TwoServer

__all__ = [
    "CIPHERS",
    "ClientSide",
    "Expected",
    "Full",
    "History",
    "Identity",
    "KRegular",
    "Mask",
    "Member",
    "Mock",
    "Params",
    "Phase",
    "Policy",
    "Protocol",
    "Refused",
    "Roster",
    "SecurityLabel",
    "ServerSide",
    "Step",
    "TwoServer",
    "Vectors",
    "add_masks",
    "canonical",
    "check",
    "decimal",
    "digest",
    "hash_models",
    "slice_is_safe",
    "verify",
]
