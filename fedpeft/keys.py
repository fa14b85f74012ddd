"""The commands of people who take part in secure aggregation: `fedpeft keys`, and `fedpeft helper`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

keys = typer.Typer(
    help="""Who takes part in secure aggregation: keys, and a roster of them that admins sign.

    Each client: `fedpeft keys init client.key > kim.id`, and kim.id goes to an admin.

    An admin: `fedpeft keys init admin.key` once, `fedpeft keys roster *.id` and `fedpeft keys sign roster.json --key
    admin.key`; the roster and the admin's id go to every client and to the coordinator.""",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
DAY = 86_400


@keys.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where the private key goes: a new file, which only you can read.")],
    helper: Annotated[bool, typer.Option("--helper", help="Print the key that a roster names as its helper.")] = False,
) -> None:
    """Make an identity: write its private key, and print its id, which is public.

    Clients, admins and a helper's operator each make one, on the machine where it is used. The key never leaves it; the
    id (64 characters) is what others are told. Only the id is printed to stdout, so that it can go into a file.
    """
    from fedpeft.run.keys import helper_key, make_identity

    made = make_identity(path)
    typer.echo(f"private key: {path} (keep it; whoever has it is you)", err=True)
    typer.echo(helper_key(made) if helper else made.id.hex())


@keys.command()
def roster(
    members: Annotated[
        list[str], typer.Argument(help="Ids, NAME=ID, or files with a line for each: ID, ID NAME, ID NAME RANK_CAP.")
    ],
    out: Annotated[Path, typer.Option(help="Where the roster goes: a new file.")] = Path("roster.json"),
    helper: Annotated[str | None, typer.Option(help="What `keys init --helper` printed, for suite twoserver.")] = None,
    days: Annotated[int, typer.Option(min=0, help="How long it is in force; 0 for ever.")] = 365,
    version: Annotated[int, typer.Option(min=1, help="Higher than that of the roster that it replaces.")] = 1,
) -> None:
    """Collect ids into a roster, not signed yet.

    Check by another way than the network that each id is whose it seems to be: whoever is in the roster counts as one
    client, and a server that gets its own ids into it can surround a client with them. RANK_CAP is the largest rank
    that a client may claim.
    """
    from fedpeft.run.keys import collect, roster_lines, write_roster

    made = collect(members, helper, time.time() + days * DAY if days else None, version)
    write_roster(made, out)
    _show(roster_lines(made))
    typer.echo(f"written: {out}; it counts for nothing until `fedpeft keys sign {out} --key ADMIN_KEY`")


@keys.command()
def sign(
    path: Annotated[Path, typer.Argument(metavar="ROSTER", help="The roster: a signature is added to the file.")],
    key: Annotated[Path, typer.Option(help="The admin's key file, from `keys init`.")],
) -> None:
    """Sign a roster as an admin. Several admins can sign one, each with a key of their own.

    A client believes a roster where admins that its own configuration names (`trust.admins`) have signed it. Any
    change to the file after that, however small, is refused.
    """
    from fedpeft.run.keys import roster_lines, sign_roster

    _show(roster_lines(sign_roster(path, key, time.time())))
    typer.echo(f"signed: {path}")


@keys.command()
def show(path: Annotated[Path, typer.Argument(help="A key file or a roster.")]) -> None:
    """What a file holds: the public side of a key, or a roster's members, expiry, fingerprint and admins."""
    from fedpeft.run.keys import described

    _show(described(path))


def _show(lines: list[tuple[str, str]]) -> None:
    """One fact a line, never cut: ids are for copying."""
    wide = max(len(what) for what, _ in lines)
    for what, value in lines:
        for i, each in enumerate(value.splitlines()):
            typer.echo(f"{'' if i else what:<{wide}}  {each}")


def helper(
    key: Annotated[Path, typer.Option(help="This operator's private key, from `fedpeft keys init`.")],
    roster: Annotated[Path, typer.Option(help="The signed roster, which names this helper.")],
    admin: Annotated[list[str], typer.Option(help="Id of who may sign the roster; may be repeated.")],
    certificate: Annotated[Path, typer.Option(help="TLS certificate of this host, PEM.")],
    private_key: Annotated[Path, typer.Option("--private-key", help="The certificate's private key, PEM.")],
    state: Annotated[Path, typer.Option(help="Where it keeps what it has answered; never delete it.")],
    address: Annotated[str, typer.Option(help="HOST:PORT to listen at.")] = "0.0.0.0:9095",
    min_cohort: Annotated[int, typer.Option(min=3, help="Fewest clients in a sum.")] = 5,
    max_dropout: Annotated[float, typer.Option(min=0, max=1, help="Largest part of a cohort that may be lost.")] = 0.4,
    min_slice: Annotated[int, typer.Option(min=1, help="Fewest contributors to any coordinate.")] = 3,
) -> None:
    """Run the second server of `secagg.name = "twoserver"`: it opens masks, and tells nobody but their sum, once.

    Whoever runs it must not be in league with the coordinator: together the two can read every client's vector.
    """
    from fedpeft.run.helper import floors, serve_helper

    policy = floors(min_cohort, max_dropout, min_slice)
    tell = Console(highlight=False, markup=False, soft_wrap=True).print
    with serve_helper(key, roster, admin, state, certificate, private_key, address, policy, tell) as (service, made):
        keys_ = f"key in rosters: {made.key.public.hex()}\nid: {made.key.identity.id.hex()}"
        tell(f"listening at {service.address}\n{keys_}")
        service.wait()
