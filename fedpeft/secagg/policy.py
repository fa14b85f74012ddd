"""Whether a client can agree to what the server asks: checked before its first answer in a session."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise

from fedpeft.secagg.params import VERSION, Params, hash_models, is_decimal
from fedpeft.secagg.protocol import Refused
from fedpeft.secagg.roster import Roster
from fedpeft.secagg.terms import SUITES, Expected, History, Policy

__all__ = ["SUITES", "Expected", "History", "Policy", "check", "slice_is_safe"]

MODULI = (16, 24, 32)
MOST_HALVINGS = 30
MASKED = ("full", "kregular")  # the suites whose masks are shared out among clients


def check(params: Params, me: bytes, roster: Roster, policy: Policy, history: History, expected: Expected) -> None:
    """Raise ``Refused``, with a code and the reason, unless the client of this id can agree to these parameters.

    The roster's own validity is checked apart, since it takes a clock: ``Roster.check``.
    """
    case = _Case(params, me, roster, policy, history, expected)
    for checks in (_people, _protocol, _contents, _ranks, _before):
        for code, is_good, text in checks(case):
            if not is_good:
                raise Refused(code, text)


def slice_is_safe(params: Params, survivors: Collection[bytes], me: bytes, policy: Policy) -> bool:
    """Whether enough of the survivors, this client among them, add to every coordinate that it adds to, and were sent
    the model that it was sent. survivors: all of the cohort of parameters that ``check`` agreed to.

    Those of a rank add to all slices up to it, so that a client's last slice has the fewest contributors; where the
    rule hides ranks, every vector has every coordinate.
    """
    ranks = params.rank_by_id
    above, alike = _contributors(ranks, survivors, me), _alike(params, ranks, survivors, me)
    return above >= policy.min_slice and alike >= policy.min_alike


def _contributors(ranks: Mapping[bytes, int], survivors: Collection[bytes], me: bytes) -> int:
    """How many add to the last slice that this client adds to."""
    return sum(ranks[x] >= ranks[me] for x in survivors) if ranks else len(survivors)


def _alike(params: Params, ranks: Mapping[bytes, int], survivors: Collection[bytes], me: bytes) -> int:
    """How many receive the same model as this client."""
    models = params.models
    return sum(models[str(ranks[x])] == models[str(ranks[me])] for x in survivors) if ranks else len(survivors)


@dataclass(frozen=True, slots=True)
class _Case:
    params: Params
    me: bytes
    roster: Roster
    policy: Policy
    history: History
    expected: Expected
    ids: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", self.params.ids)


_Check = tuple[str, bool, str]
"""A code, whether all is well, and what to say otherwise. A row may rely on those before it."""


def _people(case: _Case) -> Iterator[_Check]:
    p, policy, ids = case.params, case.policy, case.ids
    yield (
        "cohort",
        p.n == len(ids),
        f"params.n: got {p.n} for a cohort of {len(ids)}; want its size",
    )
    yield (
        "cohort",
        p.n >= policy.min_cohort,
        f"params.n: got a cohort of {p.n}; this client's policy wants {policy.min_cohort} or more: ask more "
        f"clients, or lower policy.min_cohort here",
    )
    twice = next((a for a, b in pairwise(sorted(ids)) if a == b), None)
    yield ("cohort", twice is None, f"params.cohort: {(twice or b'').hex()} is listed twice; want each once")
    yield ("cohort", list(ids) == sorted(ids), "params.cohort: is not in order; want ids ascending")
    yield ("cohort", case.me in ids, f"params.cohort: this client, {case.me.hex()}, is not in it")
    unknown = sorted(set(ids) - case.roster.ids)
    yield (
        "roster",
        not unknown,
        f"params.cohort: {len(unknown)} are not in this client's roster, version {case.roster.version}: "
        f"{', '.join(x.hex() for x in unknown[:3])}; want members only: have the roster's admins add them",
    )


def _protocol(case: _Case) -> Iterator[_Check]:
    p, policy = case.params, case.policy
    yield ("version", p.v == VERSION, f"params.v: got {p.v}; want {VERSION}: install the same fedpeft on all sides")
    yield (
        "suite",
        p.suite in policy.suites,
        f"params.suite: got {p.suite!r}; this client's policy has {', '.join(policy.suites)}",
    )
    if p.suite == "twoserver":
        yield (
            "helper",
            case.roster.helper is not None,
            "params.suite: got 'twoserver', and the roster names no helper; want its key: `keys roster --helper`",
        )
        least = policy.fewest(p.n)  # which the helper enforces, since the client can't
        yield ("threshold", least <= p.t <= p.n, f"params.t: got {p.t}; want {least} to {p.n}, of {p.n} clients")
    if p.suite not in MASKED:
        yield ("threshold", p.t <= p.n, f"params.t: got {p.t}; want at most n, {p.n}")
        return
    yield (
        "consistency",
        p.consistency or not policy.consistency,
        "params.consistency: got false; this client's policy wants survivors agreed on, since a server could tell each "
        "client another set: set secagg.consistency = true, or policy.consistency = false here",
    )
    least, most = (p.n - 1, p.n - 1) if p.suite == "full" else (min(policy.min_degree, p.n - 1), p.n - 1)
    yield ("degree", least <= p.k <= most, f"params.k: got {p.k} for {p.suite}; want {least} to {most}")
    yield ("degree", p.k == p.n - 1 or p.k % 2 == 0, f"params.k: got {p.k}; want an even number, or all others")
    holders = p.n if p.k == p.n - 1 else p.k
    least, most = policy.least_threshold(holders), p.k + 1
    yield (
        "threshold",
        least <= p.t <= most,
        f"params.t: got {p.t}; this client's policy wants {least} to {most}, of {holders} who hold shares: more than "
        f"policy.min_threshold of them",
    )


def _contents(case: _Case) -> Iterator[_Check]:
    p, policy, want = case.params, case.policy, case.expected
    yield ("ring", p.m in MODULI, f"params.m: got {p.m}; want one of {', '.join(map(str, MODULI))}")
    yield ("ring", want.m in (None, p.m), f"params.m: got {p.m}; the run's settings want {want.m}")
    largest = (1 << (p.bits - 1)) - 1
    yield (
        "overflow",
        p.bits >= 2 and p.n * largest <= (1 << (p.m - 1)) - 1,
        f"params.bits: got {p.bits}, with which a sum of {p.n} may reach {p.n * largest:,}; Z_2^{p.m} has room for "
        f"{(1 << (p.m - 1)) - 1:,}: want fewer bits",
    )
    yield ("grid", want.bits in (None, p.bits), f"params.bits: got {p.bits}; the run's settings want {want.bits}")
    for key in ("range", "clip", "weighting"):
        got, wanted = getattr(p, key), getattr(want, key)
        yield ("grid", _same(got, wanted), f"params.{key}: got {got!r}; the run's settings want {wanted!r}")
        yield ("grid", _is_above_0(got) or (key == "clip" and not got), f"params.{key}: got {got!r}; want more than 0")
    yield (
        "grid",
        policy.largest_range is None or Decimal(p.range) <= Decimal(str(policy.largest_range)),
        f"params.range: got {p.range}; this client's policy wants at most {policy.largest_range}",
    )
    yield ("layout", len(p.dims) > 0, "params.dims: got none; want the length of each pass")
    yield ("layout", p.dims == want.dims, f"params.dims: got {_few(p.dims)}; the rule's vectors have {_few(want.dims)}")
    yield (
        "layout",
        p.layout_hash == want.layout_hash,
        f"params.layout_hash: got {p.layout_hash[:16]}; what this client would add has {want.layout_hash[:16]}",
    )
    yield (
        "layout",
        not policy.layouts or p.layout_hash in policy.layouts,
        f"params.layout_hash: got {p.layout_hash}, which is none of this client's policy.layouts",
    )
    yield (
        "scales",
        not p.halvings or tuple(map(len, p.halvings)) == want.leaves,
        f"params.halvings: got {_few(tuple(map(len, p.halvings)))} in its passes; the rule's tensors, as the run's "
        f"settings scale them, are {_few(want.leaves)}",
    )
    most = max((k for pass_ in p.halvings for k in pass_), default=0)
    yield ("scales", most <= MOST_HALVINGS, f"params.halvings: got {most}; want at most {MOST_HALVINGS}")
    yield ("base", p.base == want.base, f"params.base: got {p.base!r}; the run's settings want {want.base!r}")
    yield (
        "base",
        not policy.bases or p.base in policy.bases,
        f"params.base: got {p.base!r}; this client's policy has {', '.join(policy.bases)}",
    )
    promised, least = p.dp.get("noise_multiplier", "0"), policy.min_noise
    yield (
        "noise",
        isinstance(promised, str) and is_decimal(promised) and Decimal(promised) >= Decimal(least),
        f"params.dp.noise_multiplier: got {promised!r}; this client's policy wants {least} or more, as decimal text",
    )


def _ranks(case: _Case) -> Iterator[_Check]:
    p, rank, least, alike_wanted = case.params, case.expected.rank, case.policy.min_slice, case.policy.min_alike
    yield (
        "model",
        len(p.models) > 0 and hash_models(p.models).hex() == p.model_hash,
        f"params.model_hash: is not the digest of the {len(p.models)} in params.models; want hash_models(models)",
    )
    if rank is None:
        yield ("rank", not p.ranks, f"params.ranks: got {len(p.ranks)}; this rule hides them: want none")
        yield (
            "model",
            alike_wanted == 1 or len(set(p.models.values())) == 1,
            f"params.models: got {len(set(p.models.values()))} that differ, and ranks are hidden; this client's policy "
            f"has min_alike = {alike_wanted}, so that it wants one for all",
        )
        return
    yield ("rank", len(p.ranks) == p.n, f"params.ranks: got {len(p.ranks)} for a cohort of {p.n}; want one for each")
    ranks = p.rank_by_id
    said = ranks[case.me]
    yield ("rank", said <= rank, f"params.ranks: this client's is said to be {said}; it is {rank}: want at most that")
    members = case.roster.by_id
    for id_, claimed in ranks.items():
        cap = members[id_].rank_cap
        yield (
            "rank",
            claimed >= 1 and (cap is None or claimed <= cap),
            f"params.ranks: got {claimed} for {id_.hex()}; want 1 to {cap if cap is not None else 'any'}, its cap in "
            f"the roster",
        )
    for each in sorted(set(ranks.values())):
        yield ("model", str(each) in p.models, f"params.models: has none for rank {each}; want one for each in ranks")
    above, alike = _contributors(ranks, case.ids, case.me), _alike(p, ranks, case.ids, case.me)
    yield (
        "slice",
        above >= least,
        f"params.ranks: {above} clients have rank {said} or more; this client's policy wants {least}, since fewer "
        f"would show what it adds beyond the ranks below: train with a lower rank here, or ask more clients of high "
        f"ranks",
    )
    yield (
        "model",
        alike >= alike_wanted,
        f"params.models: {alike} clients receive the same as this one, of rank {said}; this client's policy has "
        f"min_alike = {alike_wanted}, since others could be sent a model on which they learn nothing",
    )


def _before(case: _Case) -> Iterator[_Check]:
    p, policy, history = case.params, case.policy, case.history
    yield (
        "replay",
        p.session not in history.sessions,
        f"params.session: {p.session} was used before; want a fresh one",
    )
    yield (
        "round",
        p.fl_round > history.last_round,
        f"params.fl_round: got {p.fl_round}; round {history.last_round} of this run is done: want a later one",
    )
    yield (
        "budget",
        policy.max_rounds is None or history.rounds < policy.max_rounds,
        f"params.fl_round: this client has taken part in {history.rounds} rounds of this run; its policy has "
        f"max_rounds = {policy.max_rounds}",
    )


def _same(got: str, want: str) -> bool:
    if not got or not want:
        return got == want
    return is_decimal(got) and is_decimal(want) and Decimal(got) == Decimal(want)


def _is_above_0(said: str) -> bool:
    return is_decimal(said) and Decimal(said) > 0


def _few(dims: tuple[int, ...]) -> str:
    return ", ".join(map(str, dims[:8])) + (", …" if len(dims) > 8 else "") if dims else "none"
