"""How one client's vector becomes one that may be added to others', and back."""

from fedpeft.channel.plain import PlainChannel
from fedpeft.channel.sparse import Sparse
from fedpeft.channel.sums import Running

__all__ = ["PlainChannel", "Running", "Sparse"]
