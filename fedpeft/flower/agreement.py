"""What a secure round is about: as the coordinator proposes it, and as a client works it out for itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

from fedpeft.channel import Grid, RingChannel
from fedpeft.flower.requests import model_digest
from fedpeft.rounds import grids
from fedpeft.rounds.answer import measured
from fedpeft.rules import Rule, ServerState, Task
from fedpeft.secagg import Expected, Params, canonical, decimal, digest, hash_models
from fedpeft.secagg.params import VERSION
from fedpeft.secagg.protocol import Protocol


@dataclass(frozen=True, slots=True)
class Terms:
    """What the settings fix of every secure round of a run.

    run: its name; suite: the protocol's; largest_weight: the most that one client may claim; exactness: whether vectors
    hold sketches; base: the fingerprint that all share; settings: all settings, as they travel with each message.
    """

    run: str
    suite: str
    rule: Rule
    channel: RingChannel
    largest_weight: float
    base: str
    exactness: bool = False
    settings: str = ""

    @property
    def run_id(self) -> str:
        """What sessions call the run: its name and the digest of its settings, so that all clients have the same.

        What a client trains, and on what grid, is in them: told others, one client would stand out in the sum.
        """
        return f"{self.run} {settings_digest(self.settings)}"

    def grids(self, task: Task, cohort: int, halvings: tuple[tuple[int, ...], ...] = ()) -> tuple[Grid, ...]:
        """The grid of each pass for a cohort of this size. ValueError where a sum could wrap.

        halvings: of the range for each tensor of each pass, as all have agreed to; none, and each has the whole range.
        """
        return grids(self.rule, self.channel, task, cohort, self.largest_weight, self.exactness, halvings)

    def layout_hash(self, task: Task) -> str:
        """The digest in hex of what is summed in a round: names and shapes, pass by pass, sketches apart."""
        passes = []
        for pass_ in range(self.rule.passes):
            now = replace(task, pass_=pass_)
            each = (self.rule.layout(now), measured(self.rule, now, self.exactness))
            passes.append([[[name, list(shape)] for name, shape in x.shapes] for x in each])
        return digest("layout", canonical(passes)).hex()

    def proposal(
        self,
        protocol: Protocol,
        state: ServerState,
        ranks: Mapping[int, int],
        ids: Mapping[int, bytes],
        session: bytes,
        attempt: int = 0,
        consistency: bool = True,
        hides_ranks: bool = False,
        deadlines: Mapping[str, int] | None = None,
        dp: Mapping[str, str | int] | None = None,
        halvings: tuple[tuple[int, ...], ...] = (),
    ) -> tuple[Params, tuple[Grid, ...]]:
        """The parameters of a session, and the grid of each pass.

        ranks: the cohort and the rank of each; ids: what the protocol calls each; session: 16 random bytes;
        hides_ranks: whether the rule's vectors and models are the same for every rank; halvings: as in ``grids``.
        ValueError for a cohort that the protocol or the ring has no room for.
        """
        task, cohort = state.task, sorted(ranks, key=lambda client: ids[client])
        grid = self.grids(task, len(cohort), halvings)
        constant = self.rule.constant(task.spec)
        models = {
            str(rank): model_digest(self.rule.send(state, rank), constant).hex() for rank in sorted({*ranks.values()})
        }
        params = Params(
            v=VERSION,
            suite=self.suite,
            consistency=consistency,
            run_id=self.run_id,
            fl_round=task.round,
            attempt=attempt,
            session=session.hex(),
            n=len(cohort),
            t=protocol.threshold(len(cohort)),
            k=protocol.degree(len(cohort)),
            m=self.channel.modulus,
            bits=grid[0].bits,
            range=decimal(self.channel.range),
            clip="" if self.channel.clip is None else decimal(self.channel.clip),
            dims=tuple(x.length for x in grid),
            layout_hash=self.layout_hash(task),
            model_hash=hash_models(models).hex(),
            models=models,
            base=self.base,
            weighting=decimal(self.largest_weight),
            cohort=tuple(ids[client].hex() for client in cohort),
            ranks=() if hides_ranks else tuple(ranks[client] for client in cohort),
            dp=dp or {},
            deadlines=deadlines or {},
            halvings=halvings,
        )
        return params, grid

    def expected(self, task: Task, cohort: int, rank: int | None) -> Expected:
        """What a client expects to be asked in a round. rank: its own, None where the rule hides ranks."""
        try:
            grid = self.grids(task, cohort)
        except ValueError:  # a cohort that the ring has no room for: no dims are those of its vectors
            grid = ()
        return Expected(
            layout_hash=self.layout_hash(task),
            dims=tuple(x.length for x in grid),
            range=decimal(self.channel.range),
            clip="" if self.channel.clip is None else decimal(self.channel.clip),
            bits=grid[0].bits if grid else None,
            weighting=decimal(self.largest_weight),
            rank=rank,
            base=self.base,
            m=self.channel.modulus,
            leaves=tuple(len(x.leaves) for x in grid) if self.channel.scales == "tensor" else (),
        )


def settings_digest(settings: str) -> str:
    """SHA-256 in hex of a run's settings, as they travel."""
    return sha256(settings.encode()).hexdigest()
