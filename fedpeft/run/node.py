"""The client's half of an experiment, built from its settings: what a node runs."""

from collections.abc import Mapping
from pathlib import Path

from fedpeft.config import Experiment
from fedpeft.errors import ConfigError
from fedpeft.flower import ClientStore, Participant
from fedpeft.rounds import Tuning
from fedpeft.run.footing import Footing
from fedpeft.run.members import member
from fedpeft.run.own import Own
from fedpeft.run.plan import keep_within
from fedpeft.run.ranks import said_by_node
from fedpeft.run.runtimes import Lent
from fedpeft.run.shipped import mend
from fedpeft.run.workshop import Workshop, workshop
from fedpeft.secagg import Protocol
from fedpeft.training.environment import cache_folder, sparing

Scalar = bool | int | float | str


def participant(settings_json: str, node_config: Mapping[str, Scalar]) -> Participant:
    """What serves the coordinator's messages on this node.

    node_config: "partition-id", the client's number; "data", a data set of its own; "rank", how many directions it
    trains, or "memory", bytes or such as "512MB" that training may take, where the experiment's ranks are for clients
    to say; "runtime", "torch" or "onnx", with the folder of its "kit" or of "kits" that it is sent, and "quantise",
    what it holds the base in; "state", a folder for what the client keeps between messages (in the cache folder, by
    run, if not given); "trust", the file with its key, roster and policy for secure aggregation.
    """
    if "memory" in node_config:
        sparing()
    data = node_config.get("data")
    number = int(node_config.get("partition-id", 0))
    mine = Own.said(node_config, settings_json)
    here = workshop(settings_json, None if data is None else str(data), 0 if data is None else number, mine)
    found, state = here.found, _state(here.found, node_config)
    secure = member(here, node_config, state)  # first: what it refuses need not load a model
    keep_within(found, here.federation.table, node_config, mine.engine, _texts(here, node_config))
    return Participant(
        trainer=_fleet(here, node_config),
        rule=found.rule,
        channel=found.plain,
        weighting=found.weighting,
        seed=found.seed,
        store=ClientStore(state),
        examples=here.counts,
        rank=lambda client: said_by_node(here, node_config, client),
        holds_central=found.evaluation.central and len(here.federation.central) > 0,
        exactness=found.evaluation.exactness,
        tuning=Tuning(found.personal.dual, found.personal.mix) if found.personal.finetune else None,
        tuner=lambda: here.tuner,
        secure=secure,
        up=found.compression.codec_up,
        down=found.compression.codec_down,
        footprint=Footing(here, node_config),
    )


def _texts(here: Workshop, node_config: Mapping[str, Scalar]) -> int | None:
    """The texts that a client here trains and is evaluated on, at most, which a refusal may tell of; None where it
    makes no difference, and under secure aggregation, where their number is for nobody to know."""
    found = here.found
    if "memory" not in node_config or not found.training.bytes_lower or isinstance(found.secagg, Protocol):
        return None
    return max(sum(x) for x in here.federation.sizes())  # which client is here, other messages may say otherwise


def _fleet(here: Workshop, node_config: Mapping[str, Scalar]) -> Lent:
    """What trains a node's clients. KitMissingError for a kit that was sent, and that has been damaged since."""
    try:
        return here.fleet
    except ConfigError:
        if here.own is not None and here.own.kit is not None:
            mend(node_config, here.own.kit)
        raise


def _state(found: Experiment, node_config: Mapping[str, Scalar]) -> Path | None:
    if "state" in node_config:
        return Path(str(node_config["state"]))
    return cache_folder() / "state" / found.run if found.run else None
