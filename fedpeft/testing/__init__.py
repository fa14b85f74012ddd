"""Laws that every aggregation rule must keep, for rules of this project and of others, and cohorts to try them on."""

from fedpeft.testing.cohorts import cohort, computed, play, start
from fedpeft.testing.laws import Law, rule_laws

__all__ = ["Law", "cohort", "computed", "play", "rule_laws", "start"]
