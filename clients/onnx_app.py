"""The ClientApp of a node without torch: onnxruntime trains, on a kit that the coordinator sends or that is there.

A fleet of such devices alone names it in pyproject.toml, clientapp = "clients.onnx_app:app"; in a mixed fleet all nodes
run ``clients.app``, which does the same where torch is not installed, or where runtime="onnx". A node's config:

    partition-id=3              the client's number, from 0
    data="/data/mine.jsonl"     a data set of its own, in place of a part of the experiment's
    kit="/opt/kit"              the kit to train from, or its digest if no other may be sent; else the run's is sent
    kits="/var/cache/kits"      where kits are kept that were sent
    state="/var/lib/fedpeft"    where it keeps what belongs to the client between messages
    trust="client.toml"         its key, roster and policy: it takes part in secure aggregation, and in nothing else

Neither torch nor transformers is loaded, even if they are installed.
"""

from collections.abc import Mapping

from fedpeft.flower import Participant, client_app
from fedpeft.run import participant, shelf
from fedpeft.training.environment import prepare

prepare()


def build(settings: str, config: Mapping[str, bool | int | float | str]) -> Participant:
    """What serves the coordinator's messages on a node of this config, on onnxruntime."""
    return participant(settings, {**config, "runtime": "onnx"})


app = client_app(build, shelf)
