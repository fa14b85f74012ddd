"""An experiment file as the objects that run it, every error named by key."""

from fedpeft.config.experiment import Experiment, experiment, known_rules, load, override_all, put, read
from fedpeft.config.schema import Settings

__all__ = ["Experiment", "Settings", "experiment", "known_rules", "load", "override_all", "put", "read"]
