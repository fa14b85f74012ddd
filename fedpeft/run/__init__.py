"""How the rooms make one run: the coordinator's loop, a node's half, baselines, forecast, export."""

from fedpeft.run.deployed import serve_run
from fedpeft.run.forecast import Forecast, forecast
from fedpeft.run.node import participant
from fedpeft.run.shipped import shelf
from fedpeft.run.simulate import export_run, simulate, stored
from fedpeft.run.view import Lines, View

__all__ = [
    "Forecast",
    "Lines",
    "View",
    "export_run",
    "forecast",
    "participant",
    "serve_run",
    "shelf",
    "simulate",
    "stored",
]
