"""Who watches a run."""

from typing import Protocol

from fedpeft.report import RoundRecord


class View(Protocol):
    """A terminal, or a log: what a run says while it goes on."""

    def note(self, text: str) -> None:
        """One line of news."""
        ...

    def begin(self, rounds: int) -> None:
        """How many rounds are still to come."""
        ...

    def work(self, what: str, total: int) -> None:
        """A piece of work of ``total`` steps begins."""
        ...

    def advance(self) -> None:
        """A step of it is done."""
        ...

    def round(self, record: RoundRecord, rounds: int) -> None:
        """A round is over."""
        ...


class Lines:
    """A view for logs: one line of text at a time."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def begin(self, rounds: int) -> None:
        pass

    def work(self, what: str, total: int) -> None:
        pass

    def advance(self) -> None:
        pass

    def round(self, record: RoundRecord, rounds: int) -> None:
        print(record.json(), flush=True)
