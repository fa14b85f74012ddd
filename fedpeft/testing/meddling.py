"""What a client may send in place of what it should."""

from collections.abc import Callable, Mapping

import numpy as np

from fedpeft.testing.sessions import Change

Make = Callable[[bytes, bytes], bytes]
"""A message in place of an honest one, which it's given, with what another client has sent."""


def garbage() -> Mapping[str, Make]:
    """Messages that no protocol takes, by what they are."""
    noise = np.random.default_rng(5).bytes(300)
    return {
        "an empty message": lambda message, other: b"",
        "noise": lambda message, other: noise,
        "a message without its end": lambda message, other: message[:-1],
        "a message with more at its end": lambda message, other: message + b"\0",
        "zeros": lambda message, other: bytes(len(message)),
        "another client's message": lambda message, other: other,
        "a megabyte": lambda message, other: message[:1] * 2**20,
    }


def instead(bad: Mapping[bytes, Make]) -> Change:
    """Changes what these clients send. None of them is the first to answer."""
    others: list[bytes] = []

    def change(id_: bytes, message: bytes) -> bytes:
        if id_ in bad:
            return bad[id_](message, others[0])
        others.append(message)
        return message

    return change


def flipped(part: int, message: bytes, other: bytes) -> bytes:
    """The message with one bit changed, in its byte at ``part`` quarters of its length."""
    at = part * (len(message) - 1) // 4
    return message[:at] + bytes([message[at] ^ 16]) + message[at + 1 :]
