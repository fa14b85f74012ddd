"""The last question of a run: how much memory each client's training took."""

from fedpeft.errors import ProtocolError
from fedpeft.flower.arrivals import content_of
from fedpeft.flower.fleet import Fleet
from fedpeft.flower.footprints import MEMORY_QUERY, Footprint, pack_memory_query, unpack_footprint
from fedpeft.flower.post import Letter, Post

PATIENCE = 60.0
"""Seconds to wait for answers that a run can do without; a node takes some ten for any message."""

_LONGEST = 200  # characters of why a client gave none


def farewell(fleet: Fleet, seconds: float = PATIENCE) -> tuple[dict[int, Footprint], tuple[tuple[int, str], ...]]:
    """The footprint of each client that was asked to train; and who gave none, and why. Clients ascend in both.

    Nothing that a client answers or leaves out is raised, and nobody waits for those alone that were silent when they
    were last asked to train: a node that was lost is there for a minute yet.
    """
    post = Post(fleet.grid, MEMORY_QUERY, "memory", fleet.clock, fleet.sleep)
    asked, content = fleet.registry.since(0), pack_memory_query()
    nodes = {client: fleet.nodes[client] for client in asked if client in fleet.nodes}
    problems = dict.fromkeys(asked, "its node has gone") | dict.fromkeys(nodes, "no answer")
    letters = [Letter(client, node, content) for client, node in nodes.items()]
    problems |= dict.fromkeys(post.push(letters, seconds), "the question could not be sent")
    found: dict[int, Footprint] = {}
    waited = set(nodes) - fleet.registry.silent()
    for reply in post.replies(seconds, lambda: not waited):
        client = reply.letter.client
        waited.discard(client)
        try:
            answer = unpack_footprint(content_of(reply.content))
        except ProtocolError as error:
            problems[client] = str(error)[:_LONGEST]
            continue
        if answer is None:
            problems[client] = "it has not trained since its node was started, or the run resumed"
        else:
            found[client] = answer
    return dict(sorted(found.items())), tuple((c, why) for c, why in sorted(problems.items()) if c not in found)
