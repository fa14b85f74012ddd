"""Sequences whose items are made when they are asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, slots=True, eq=False)
class Lazy(Sequence[T], Generic[T]):
    """Items 0 to ``length`` - 1, each made anew by ``make`` whenever it is asked for; none is kept."""

    length: int
    make: Callable[[int], T]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        found = range(self.length)[index]
        return self.make(found) if isinstance(found, int) else [self.make(i) for i in found]
