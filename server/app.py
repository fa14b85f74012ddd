"""The ServerApp: the coordinator of an experiment.

Its run config (``flwr run . --run-config``) names the experiment:

    experiment="simulations/tiny.toml"   the experiment file; a relative path begins at this app
    changes="rounds=3; seed=2"           settings that differ from the file's
    folder="runs/tiny"                   where the run is kept; a run that is there goes on
    roster="/etc/fedpeft/roster.json"    with secure aggregation: who may take part, signed
    helper="helper.example:9095"         with secagg.name = "twoserver": where the second server is,
    helper-certificate="helper.crt"      and the certificate of its authority, or its own if self-signed
    kit="/opt/kit"                       with fleet.kit: what devices without torch are sent, if it is not made here
"""

from functools import partial
from pathlib import Path

from fedpeft.flower import server_app
from fedpeft.run import serve_run
from fedpeft.training.environment import prepare

prepare()
app = server_app(partial(serve_run, root=Path(__file__).parents[1]))
