"""Laws that every aggregation rule must keep, for rules of this project and of others, and cohorts to try them on."""

from fedpeft.testing.cohorts import cohort, computed, play, start
from fedpeft.testing.laws import Law, rule_laws
from fedpeft.testing.secagg import secagg_conformance
from fedpeft.testing.sessions import Second

__all__ = ["Law", "Second", "cohort", "computed", "play", "rule_laws", "secagg_conformance", "start"]
