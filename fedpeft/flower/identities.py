"""Whose identity is which: clients are asked where it is not known yet."""

from collections.abc import Sequence

from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import unpack_capabilities
from fedpeft.flower.arrivals import NO_IDENTITY, content_of
from fedpeft.flower.fleet import Fleet
from fedpeft.flower.post import Letter, Post
from fedpeft.flower.requests import Query, pack_query


def identities(fleet: Fleet, clients: Sequence[int], patience: float) -> tuple[dict[int, bytes], dict[int, str]]:
    """The ids of these clients, and why others have none that counts; each is asked once in a run.

    patience: seconds to wait for answers. Of two clients with one identity, the one that was met first has it.
    """
    found = {client: fleet.registry.identity(client) for client in clients}
    known = {client: id_ for client, id_ in found.items() if id_ is not None}
    why = {client: "has no node" for client in clients if client not in known and client not in fleet.nodes}
    content = pack_query(Query(fleet.settings, None))
    post = Post(fleet.grid, "query", "query", fleet.clock, fleet.sleep)
    asked = [client for client in clients if client not in known and client not in why]
    letters = [Letter(client, fleet.nodes[client], content) for client in asked]
    why |= dict.fromkeys(post.push(letters, patience), "the message could not be sent")
    for reply in post.replies(patience, lambda: False):
        client = reply.letter.client
        try:
            said = unpack_capabilities(content_of(reply.content))
            if said.client != client:
                raise ProtocolError(f"says that it is client {said.client}")
            if not said.identity:
                raise ProtocolError(NO_IDENTITY)
            fleet.registry.identify(client, bytes.fromhex(said.identity))
            known[client] = bytes.fromhex(said.identity)
        except ProtocolError as error:
            why[client] = str(error)
    silent = {client: "no answer to a query before the deadline" for client in asked if client not in known}
    return {client: known[client] for client in clients if client in known}, silent | why
