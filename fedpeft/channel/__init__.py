"""How one client's vector becomes one that may be added to others', and back."""

from fedpeft.channel.blocks import Coded, Coding
from fedpeft.channel.codecs import CODECS, Codec, TopK
from fedpeft.channel.plain import PlainChannel
from fedpeft.channel.ring import Grid, RingChannel
from fedpeft.channel.scales import Scales, Seen
from fedpeft.channel.sparse import Sparse
from fedpeft.channel.sums import Running

__all__ = [
    "CODECS",
    "Codec",
    "Coded",
    "Coding",
    "Grid",
    "PlainChannel",
    "RingChannel",
    "Running",
    "Scales",
    "Seen",
    "Sparse",
    "TopK",
]
