"""The ClientApp of a node: what a SuperNode and Flower's simulation runtime run.

A node's config (``flower-supernode --node-config``) says which client it is and, if it has one, its data:

    partition-id=3              the client's number, from 0
    data="/data/mine.jsonl"     a data set of its own, in place of a part of the experiment's
    runtime="onnx"              train on onnxruntime, as nodes without torch do in any case (kit, kits: onnx_app.py)
    quantise="nf4"              hold the base in this format, one of the run's model.formats
    state="/var/lib/fedpeft"    where it keeps what belongs to the client between messages
    trust="client.toml"         its key, roster and policy: it takes part in secure aggregation, and in nothing else

Torch is loaded once a message has come, and not before.
"""

from fedpeft.flower import client_app
from fedpeft.run import participant, shelf
from fedpeft.training.environment import prepare

prepare()
app = client_app(participant, shelf)
