"""``mycel keys``: make and keep a federation's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys_app = typer.Typer(no_args_is_help=True, help="Make and keep a federation's keys.")
FOLDER = Path("keys")
LOOPBACK = ["127.0.0.1", "localhost"]
Keys = Annotated[Path, typer.Option(help="Folder of the keys.")]
Days = Annotated[float, typer.Option(help="Days for which certificates are valid.")]


@keys_app.command("init", epilog="Example: mycel keys init --host fed.example.org --party clinic --party institute")
def init(
    keys: Keys = FOLDER,
    host: Annotated[
        list[str] | None, typer.Option(help="A name or address of the coordinator; default loopback.")
    ] = None,
    party: Annotated[list[str] | None, typer.Option(help="A party to admit; may be repeated.")] = None,
    days: Days = 365.0,
    authority: Annotated[
        Path | None, typer.Option(help="An existing authority: a PEM file of its key and its certificate, twice.")
    ] = None,
) -> None:
    """Make an authority, the coordinator's key, and a key for each party."""
    from mycel.federation.keyring import Keyring

    Keyring.make(keys, host or LOOPBACK, party or [], days, authority)
    typer.echo(f"keys are in {keys}: hand each party its file of {keys / 'parties'}, and remove it there")


@keys_app.command("add", epilog="Example: mycel keys add registry")
def add(name: str, keys: Keys = FOLDER, days: Days = 365.0) -> None:
    """Make a key for one more party and admit it."""
    from mycel.federation.keyring import Keyring

    typer.echo(str(Keyring(keys).add(name, days)))


@keys_app.command("operator", epilog="Example: mycel keys operator anna")
def operator(name: str, keys: Keys = FOLDER, days: Days = 365.0) -> None:
    """Make a key for one who may run recipes from another machine."""
    from mycel.federation.keyring import Keyring

    typer.echo(str(Keyring(keys).add_operator(name, days)))


@keys_app.command("admit", epilog="Example: mycel keys admit clinic.crt")
def admit(certificate: Path, keys: Keys = FOLDER) -> None:
    """Admit a party whose certificate the authority has signed elsewhere."""
    from mycel.federation.keyring import Keyring

    typer.echo(f"{Keyring(keys).admit(certificate)} is admitted")


@keys_app.command("revoke", epilog="Example: mycel keys revoke clinic")
def revoke(name: str, keys: Keys = FOLDER) -> None:
    """Admit a party or an operator no longer; a running coordinator takes notice at once."""
    from mycel.federation.keyring import Keyring

    Keyring(keys).revoke(name)
    typer.echo(f"{name} is admitted no longer")
