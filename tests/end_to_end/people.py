"""Who takes part in secure aggregation, as they begin themselves: keys, a signed roster, a file for each client."""

import shutil
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from fedpeft.cli import app
from fedpeft.run.keys import read_identity, read_roster

POLICY = """
[policy]
min_cohort = 3
min_slice = 3
max_dropout = 0.3
max_rounds = 1
largest_range = 4.0
suites = ["full", "twoserver"]
"""


@dataclass(frozen=True, slots=True)
class People:
    """Clients, an admin and a helper's operator, each with a folder under ``folder``. admin: the id, in hex."""

    folder: Path
    clients: int
    admin: str

    @property
    def roster(self) -> Path:
        """As the admin has signed it."""
        return self.folder / "admin" / "roster.json"

    def client(self, number: int) -> Path:
        """The folder of a client."""
        return self.folder / f"client{number}"

    def node_config(self, number: int, is_trusting: bool = True) -> str:
        """What a client's SuperNode is started with, ``trust`` only if ``is_trusting``."""
        here = self.client(number)
        trust = f' trust="{here / "client.toml"}"' if is_trusting else ""
        return f'partition-id={number} state="{here / "state"}"{trust}'

    def expire(self, number: int) -> None:
        """Let a client have a roster of the same people that has gone stale since the admin signed it."""
        admin = read_identity(self.folder / "admin" / "admin.key")
        stale = replace(read_roster(self.roster), expires=time.time() - 60, signatures={}).signed(admin)
        (self.client(number) / "roster.json").write_text(stale.to_json(), encoding="utf8")

    def secrets(self) -> dict[str, bytes]:
        """The 32 private bytes of each key file, by its name."""
        files = self.folder.glob("*/*.key")
        return {f"{x.parent.name}/{x.name}": read_identity(x).to_bytes() for x in files}


def people(folder: Path, clients: int) -> People:
    """As docs/secure-aggregation.md tells each of them to begin."""
    who = ["admin", "helper", *(f"client{i}" for i in range(clients))]
    for name in who:
        (folder / name / "state").mkdir(parents=True)
    admin = keys("init", folder / "admin" / "admin.key")
    helper = keys("init", folder / "helper" / "helper.key", "--helper")
    ids = [f"client{i}={keys('init', folder / f'client{i}' / 'client.key')}" for i in range(clients)]
    made = People(folder, clients, admin)
    keys("roster", *ids, "--helper", helper, "--days", "7", "--out", made.roster)
    keys("sign", made.roster, "--key", folder / "admin" / "admin.key")
    for i in range(clients):
        shutil.copy(made.roster, made.client(i))
        trust = f'[trust]\nidentity = "client.key"\nroster = "roster.json"\nadmins = ["{admin}"]\n'
        (made.client(i) / "client.toml").write_text(trust + POLICY, encoding="utf8")
    return made


def keys(*arguments: str | Path) -> str:
    """What ``fedpeft keys`` prints."""
    done = CliRunner().invoke(app, ["keys", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def certify(folder: Path) -> tuple[Path, Path]:
    """Files with a self-signed TLS certificate for 127.0.0.1, and its private key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "helper")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "certificate.pem", folder / "private.pem"
    public.write_bytes(certificate.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return public, private
