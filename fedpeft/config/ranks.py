"""Who has which rank, in an experiment file."""

from collections.abc import Mapping

from fedpeft.config.rules import is_dora
from fedpeft.config.schema import Choice
from fedpeft.errors import ConfigError
from fedpeft.rounds import Column, Levels, Listed, Memory, Ranks, Whole
from fedpeft.rules import Krum, ListRule, MeanRule
from fedpeft.training.methods import Method

RANKS: Mapping[str, Choice] = {
    "column": Choice(Column),
    "levels": Choice(Levels),
    "listed": Choice(Listed),
    "memory": Choice(Memory),
    "whole": Choice(Whole),
}


def largest_rank(method: Method) -> int:
    """The most directions that the server has for a layer."""
    pattern = method.options.get("rank_pattern", {})
    others = [x for x in pattern.values() if isinstance(x, int)] if isinstance(pattern, Mapping) else []
    return max([method.rank, *others])


def check_ranks(ranks: Ranks, name: str, method: Method, rule: MeanRule | ListRule) -> None:
    """Raise ConfigError, naming the key, for ranks of this name that can't go with the rest of the experiment."""
    if ranks.is_whole:
        return
    if rule.pool is not None:
        raise ConfigError(
            f"ranks.name: got {name!r}, and clients that train by forward passes alone move all directions of a layer, "
            f'whatever their memory; want ranks.name = "whole", or rule.name = "fedit"'
        )
    if isinstance(rule, Krum):
        raise ConfigError(
            f"ranks.name: got {name!r}, and krum compares the lengths of whole changes: a client of a low rank has "
            f'moved less, so that it would always be chosen; want ranks.name = "whole", or median'
        )
    if method.name != "lora" or is_dora(method):
        why = "normalises with all directions" if is_dora(method) else "has no low-rank factors to cut"
        raise ConfigError(
            f"ranks.name: got {name!r} with adapter.method {method.method!r}, which {why}; "
            f'want ranks.name = "whole", or adapter.method = "lora"'
        )
    largest = largest_rank(method)
    for key, levels in ranks.named.items():
        for rank in levels:
            if rank > largest:
                raise ConfigError(
                    f"ranks.{key}: got {rank}; the server's rank is {largest}: want at most that, or a larger "
                    f"adapter.rank"
                )
