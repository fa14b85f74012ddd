"""report.html: one run, told to somebody who was not there."""

from collections import Counter
from html import escape
from pathlib import Path

from fedpeft.report import recipe
from fedpeft.report.by_rank import hostile, ranks, runtimes
from fedpeft.report.costs import amount, timeline, traffic
from fedpeft.report.files import write_whole
from fedpeft.report.history import History, history
from fedpeft.report.inexact import errors, meaning
from fedpeft.report.memory import devices
from fedpeft.report.plots import clients, curves, last_clients, spread
from fedpeft.report.population import population
from fedpeft.report.secure import secured
from fedpeft.report.simulated import kinds_of, learning, schedule, simulated_seconds
from fedpeft.report.style import CSS
from fedpeft.report.summary import Standing, gains, perplexity, setting, standings

_COLOURS = {
    "base": "--grey",
    "local": "--orange",
    "federated": "--blue",
    "tuned": "--blue",
    "central-training": "--green",
}
_METHODS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "ia3": "IA3",
    "adalora": "AdaLoRA",
    "vera": "VeRA",
    "loha": "LoHa",
    "lokr": "LoKr",
}
_MOST_REFUSALS = 100


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, complete or not; its path.

    One file that fetches nothing and runs no script; the same records give the same file, byte for
    byte. Raises DataError if the folder is no run, its records can't be read or the disk is full.
    """
    h = history(folder)
    path = h.path / "report.html"
    write_whole(path, page(h).encode())
    return path


def page(h: History) -> str:
    """The report of a history, as HTML."""
    title = escape(h.run.name)
    parts = [
        _head(h),
        _section("Learning curves", curves(h) if h.rounds else "", _curves_note(h)),
        _section("Learning by simulated time", learning(h), ""),
        _section("How the clients fare, by round", spread(h), _SPREAD_NOTE),
        _section("Each client at the end", clients(h), _clients_note(h)),
        ranks(h),
        runtimes(h),
        _section("How exact the aggregation was", errors(h), escape(meaning(h))),
        _section("Bytes sent", traffic(h), _traffic_note(h)),
        devices(h.memory),
        _section("Timeline", schedule(h) or timeline(h), _devices_note(h) or _timeline_note(h)),
        secured(h.run.security, [x.secure for x in h.rounds if x.secure is not None]),
        _refusals(h),
        _section("Who holds what", population(h), ""),
        recipe.settings(h),
        recipe.use(h),
        recipe.reproduce(h),
    ]
    return document(title, "".join(parts), f"Written by fedpeft {escape(h.run.versions.get('fedpeft', ''))}".strip())


def document(title: str, body: str, foot: str, column: str = "text") -> str:
    """A whole HTML page from a title, body and foot in HTML. column: "text", or "tables", which is wider."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n"
        f'<main class="{column}">\n{body}\n<footer>{foot}</footer>\n</main>\n</body>\n</html>\n'
    )


def share(x: float | None) -> str:
    """A share as text, in per cent."""
    return "–" if x is None else f"{100 * x:.1f} %"


def number(x: float | None) -> str:
    """A loss or perplexity as text."""
    return "–" if x is None else f"{x:,.0f}" if x >= 1000 else f"{x:.1f}" if x >= 10 else f"{x:.3f}"


def duration(seconds: float) -> str:
    """Seconds as text to read."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _head(h: History) -> str:
    rounds = setting(h, "rounds")
    notice = ""
    if h.final is None:
        done = f"{len(h.rounds)} of {rounds} rounds are" if rounds else f"{_count(len(h.rounds), 'round')} recorded"
        done = f"{done} recorded" if rounds else done
        notice = (
            f'<p class="notice">This run is not complete: {escape(done)}. '
            f"The figures below are of the last one; <code>fedpeft resume</code> goes on from there.</p>"
        )
    facts = [
        (f"{h.run.population or len({c for x in h.rounds for c in x.asked}):,}", "clients"),
        (str(len(h.rounds)), "rounds" if len(h.rounds) != 1 else "round"),
        (amount(h.bytes_up), "sent up by all clients to train"),
        (amount(h.bytes_down), "sent down to all clients to train"),
        (duration(h.seconds), "wall time"),
    ]
    simulated = simulated_seconds(h)
    facts += [] if simulated is None else [(duration(simulated), "simulated time")]
    tiles = "".join(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in facts)
    return (
        f'<p class="kicker">Federated fine-tuning report</p><h1>{escape(h.run.name)}</h1>'
        f'<p class="lead">{escape(_what(h) + hostile(h))}</p>{notice}{_verdict(h)}{_result(h)}'
        f'<div class="facts">{tiles}</div>'
    )


def _what(h: History) -> str:
    model, data, method = setting(h, "model.name"), setting(h, "data.name"), setting(h, "adapter.method")
    rank, rule = setting(h, "adapter.rank"), setting(h, "rule.name")
    split, alpha = setting(h, "partition.name"), setting(h, "partition.alpha")
    asked = {len(x.asked) for x in h.rounds}
    text = f"{model or 'A model'} fine-tuned"
    text += f" with {_METHODS.get(method, method)}" if method else ""
    text += f" (rank {rank})" if method and rank else ""
    text += f" on {data}" if data else ""
    text += f", split over {_count(h.run.population, 'client')}" if h.run.population else ""
    skew = f", α = {alpha}" if split in ("dirichlet", "sampled") and alpha else ""
    text += f" ({split}{skew})" if split and h.run.population else ""
    text += f", by {rule}" if rule else ""
    if asked:
        few, many = min(asked), max(asked)
        per = f"{few}" if few == many else f"{few} to {many}"
        text += f" in {_count(len(h.rounds), 'round')} of {per} client{'' if per == '1' else 's'}"
    return text + ". The data never left the clients."


def _verdict(h: History) -> str:
    by_name = {x.name: x for x in standings(h)}
    mine = by_name["federated"]
    central = mine.central.accuracy is not None
    got = mine.central.accuracy if central else mine.mean
    if got is None:
        return ""
    where = "on the central test set" if central else "on the mean client's own test set"
    what = "next-token accuracy" if h.run.task == "lm" else "accuracy"
    text = f"Federated training reaches <b>{share(got)}</b> {what} {where}"
    told = []
    for name, label in (
        ("base", "the base model"),
        ("local", "the mean client training alone"),
        ("central-training", "training on all the data in one place"),
    ):
        other = by_name.get(name)
        value = None if other is None else other.central.accuracy if central else other.mean
        if value is not None:
            gap = 100 * (got - value)
            told.append(
                f"level with {label}"
                if abs(gap) < 0.05
                else f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'} {label}"
            )
    listed = f"{', '.join(told[:-1])} and {told[-1]}" if len(told) > 1 else "".join(told)
    return f'<p class="verdict">{text}{": " if listed else ""}{listed}.</p>'


def _result(h: History) -> str:
    lm = h.run.task == "lm"
    rows = "".join(_row(x, lm) for x in standings(h))
    return (
        '<div class="wide"><table class="result"><thead><tr><th></th>'
        f'<th class="n">{"Next-token accuracy" if lm else "Accuracy"},<br>central test</th><th class="bar"></th>'
        f'<th class="n">Loss</th>{"<th class=n>Perplexity</th>" if lm else ""}'
        '<th class="n">Mean client,<br>own test</th><th class="n">Worst tenth<br>of clients</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>" + (f'<p class="note">{escape(said)}</p>' if (said := gains(h)) else "")
    )


def _row(x: Standing, lm: bool) -> str:
    wide = 0.0 if x.central.accuracy is None else 100 * min(max(x.central.accuracy, 0.0), 1.0)
    is_known = x.central.accuracy is not None
    bar = f'<i style="width:{wide:.1f}%;background:var({_COLOURS[x.name]})"></i>' if is_known else ""
    return (
        f'<tr class="{x.name}"><th scope="row">{escape(x.label[:1].upper() + x.label[1:])}</th>'
        f'<td class="n">{share(x.central.accuracy)}</td><td class="bar">{bar}</td>'
        f'<td class="n">{number(x.central.loss)}</td>'
        + (f'<td class="n">{number(perplexity(x.central))}</td>' if lm else "")
        + f'<td class="n">{share(x.mean)}</td><td class="n">{share(x.worst)}</td></tr>'
    )


def _section(title: str, svg: str, note: str) -> str:
    if not svg:
        return ""
    caption = f"<figcaption>{note}</figcaption>" if note else ""
    picture = svg.replace("<svg ", f'<svg aria-label="{escape(title)}" ', 1)
    return f'<h2>{escape(title)}</h2><figure><div class="wide">{picture}</div>{caption}</figure>'


def _curves_note(h: History) -> str:
    dashed = "Dashed: " + ", ".join(
        label
        for name, label in (
            ("base", "the base model without training"),
            ("local", "the mean client training alone"),
            ("central-training", "all the data in one place"),
        )
        if name in h.baselines and h.baselines[name].central is not None
    )
    return f"{dashed}; all on the central test set." if dashed != "Dashed: " else ""


_SPREAD_NOTE = "Accuracy on the client’s own validation rows: the median, the middle half (dark), the extremes (light)."


def _clients_note(h: History) -> str:
    mine = {n: x.accuracy for n, x in last_clients(h).items() if x.accuracy is not None}
    local = h.baselines["local"].clients if "local" in h.baselines else {}
    gains = [x - (local[n].accuracy or 0.0) for n, x in mine.items() if n in local and local[n].accuracy is not None]
    if not gains:
        return ""
    better = sum(x > 0 for x in gains)
    worst, mean = 100 * min(gains), 100 * sum(gains) / len(gains)
    return (
        f"{better:,} of {_count(len(gains), 'client')} {'does' if better == 1 else 'do'} better than alone; "
        f"mean gain {mean:+.1f} points, smallest {worst:+.1f}.".replace("-", "−")
    )


def _traffic_note(h: History) -> str:
    asked = sum(len(x.asked) for x in h.rounds)
    if not asked:
        return ""
    answered = max(1, sum(len(x.survivors) for x in h.rounds))
    return (
        f"A client sends {amount(h.bytes_up / answered)} and receives {amount(h.bytes_down / asked)} in each round "
        f"that it takes part in (means)."
    )


def _timeline_note(h: History) -> str:
    timed = [x for x in h.rounds if x.seconds_training is not None]
    total = sum(x.seconds for x in timed)
    trained = sum(x.seconds_training or 0.0 for x in timed)
    return f"Training is {100 * trained / total:.0f} % of the rounds’ {duration(total)}." if total else ""


def _devices_note(h: History) -> str:
    """What each kind of device did, in virtual time."""
    return "; ".join(
        f"{escape(x.name or 'clients')}: {_count(x.done, 'answer')} from {_count(x.clients, 'client')}, {x.late:,} too "
        f"late, {x.lost:,} lost, {x.away:,} never begun, at work {100 * x.busy:.0f} % of the time"
        for x in kinds_of(h)
    )


def _refusals(h: History) -> str:
    refused = [(x.round, client, why) for x in h.rounds for client, why in x.refused]
    asked = sum(len(x.asked) for x in h.rounds)
    if not refused:
        said = "None: every answer that was asked for came and was used." if asked else "None."
        return f"<h2>Refused or missing answers</h2><p>{said}</p>"
    reasons = "; ".join(f"{escape(why)} ({n:,})" for why, n in Counter(why for *_, why in refused).most_common(8))
    rows = "".join(
        f'<tr><td class="n">{t}</td><td class="n">{client}</td><td>{escape(why)}</td></tr>'
        for t, client, why in refused[:_MOST_REFUSALS]
    )
    more = len(refused) - _MOST_REFUSALS
    rest = f'<p class="note">and {more:,} more, in <code>metrics.jsonl</code>.</p>' if more > 0 else ""
    return (
        f"<h2>Refused or missing answers</h2>"
        f"<p>{len(refused):,} of {asked:,}; each round went on without them: {reasons}.</p>"
        f'<div class="wide"><table><thead><tr><th class="n">Round</th><th class="n">Client</th><th>Why</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>{rest}"
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
