"""What a deployed node says of the memory that its training took, and of what was foretold."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, Pool
from fedpeft.config import experiment
from fedpeft.data import Table
from fedpeft.data import own as whole
from fedpeft.rounds import Job
from fedpeft.run.footing import Footing
from fedpeft.run.needs import CARRIER
from fedpeft.run.node import participant
from fedpeft.run.own import Own
from fedpeft.run.workshop import Workshop, workshop
from fedpeft.secagg import Full
from fedpeft.training.kit import CONFIG
from fedpeft.training.memory import estimate, parts
from fedpeft.training.peaks import peak
from tests.ondevice import small_kit

SETTINGS = {
    "model": {"name": "tiny-bert"},
    "data": {"name": "wiki11", "examples": 200},
    "partition": {"name": "iid", "clients": 6},
    "adapter": {"rank": 4, "targets": ["query", "value"]},
    "training": {"batch": 64, "length": 16, "threads": 1},
}


@pytest.fixture(scope="module")
def here():
    return workshop(experiment(SETTINGS).settings_json)


def foretold(here, rank, batch, trains="ab", sparing=False):
    base, training = here.trainer.frozen, replace(here.trainer.training, batch=batch)
    spec = here.trainer.start().cut(rank).spec
    return estimate(base.model.config, base.parameters, spec, training, "none", sparing, trains)


def test_a_node_on_torch_tells_its_rank_and_what_was_foretold_for_its_rows(here):
    rows = here.counts(3).train
    assert rows < 64
    start = here.trainer.start()
    before = peak()
    found = Footing(here, {})(Job(3, 0, 1, start.cut(2)))
    assert before <= found.measured <= peak()
    assert (found.rank, found.engine, found.quantise, found.budget, found.gpu) == (2, "torch", "none", None, None)
    assert found.predicted == CARRIER["torch"] + foretold(here, 2, rows)
    some = Footing(here, {"memory": "2GB"})(Job(3, 0, 1, start, trains="b"))
    assert (some.rank, some.budget) == (4, 2_000_000_000)
    assert some.predicted == CARRIER["torch"] + foretold(here, 4, rows, "b", sparing=True)
    assert foretold(here, 4, rows, "b") < foretold(here, 4, rows)


def test_under_secure_aggregation_nothing_of_its_rows_is_in_it(here):
    secret = Workshop(replace(here.found, secagg=Full()), here.federation)
    secret.__dict__["trainer"] = here.trainer
    found = Footing(secret, {})(Job(3, 0, 1, here.trainer.start()))
    assert found.predicted == CARRIER["torch"] + foretold(here, 4, 64)


def test_what_no_formula_is_of_is_not_foretold(here):
    start = here.trainer.start()
    pool = Pool(1, 8, 1e-3)
    assert [Footing(here, {})(Job(0, 0, 1, start, **x)).predicted for x in ({"pool": pool}, {"trains": "core"})] == [
        None,
        None,
    ]


def test_a_node_without_torch_tells_what_was_foretold_for_its_kit(tmp_path):
    kit = small_kit.write(tmp_path)
    found = experiment(SETTINGS | {"model": {"name": "by-hand"}})
    table = Table("classify", ("a b",) * 5, np.arange(5) % 3, small_kit.CLASSES)
    mine = Own.said({"kit": str(kit.folder), "runtime": "onnx"})
    device = Workshop(found, whole(table, found.split, 1), mine)
    job = Job(0, 0, 1, kit.start())
    assert Footing(device, {})(job).predicted is None  # without the model's configuration
    config = {"model_type": "bert", "hidden_size": 7, "num_hidden_layers": 2, "problem_type": "x", "vocab_size": 18}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    said = Footing(device, {"memory": 3e8})(job)
    assert (said.rank, said.engine, said.quantise, said.budget) == (small_kit.RANK, "onnx", "none", 300_000_000)

    class Config:
        def to_dict(self):
            return config

    training = replace(found.training, batch=device.counts(0).train, checkpointing=False)
    numbers = 18 * 7 + 2 * (4 * 7 * 7 + 2 * 4 * 7 * 7)  # an embedding, and layers 4 times as wide within
    want = parts(Config(), numbers, kit.spec, training, "none", "onnx").total
    assert said.predicted == CARRIER["onnx"] + want


def test_a_deployed_node_notes_it_and_an_adapter_without_layers_has_rank_0(here):
    node = participant(experiment(SETTINGS).settings_json, {"partition-id": 1})
    assert isinstance(node.footprint, Footing)
    bare = Job(0, 0, 1, Adapter(dense=here.trainer.start().dense))
    assert node.footprint(bare).rank == 0
