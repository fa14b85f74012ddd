"""Results of a trainer, one an item, whatever breaks."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from fedpeft.rounds import Done, Failed, Metrics, Trainer, Tuned

Item = TypeVar("Item")
Result = TypeVar("Result")

TOGETHER = 64
"""Clients that train for themselves before the first of them is evaluated: more would take more memory."""


def one_by_one(
    run: Callable[[Sequence[Item]], Iterator[Result | Failed]], items: Sequence[Item]
) -> Iterator[Result | Failed]:
    """A result for each item, whatever ``run`` raises: it goes on with the items after the one that broke it."""
    done = 0
    while done < len(items):
        try:
            for result in run(items[done:]):
                yield result
                done += 1
                if done == len(items):
                    return
            reason = "the trainer gave no result"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        yield Failed(reason)
        done += 1


def of_tuned(trainer: Trainer, asked: Sequence[Tuned]) -> Iterator[Metrics | Failed]:
    """What each client's own training comes to on its test rows; of what it has trained, nothing is kept."""
    for first in range(0, len(asked), TOGETHER):
        some = asked[first : first + TOGETHER]
        # Lists, since a trainer that has one model in memory can't train and evaluate at once.
        done: list[Done | Failed] = list(one_by_one(trainer.train_many, [x.job for x in some]))
        trials = [x.trial(y.trained) for x, y in zip(some, done, strict=True) if isinstance(y, Done)]
        results = iter(list(one_by_one(trainer.evaluate_many, trials)))
        for y in done:
            yield y if isinstance(y, Failed) else next(results)
