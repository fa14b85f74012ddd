"""The second server of ``twoserver`` on a wire: a gRPC service over TLS with one method, bytes to bytes.

Its operator is another than the coordinator's. What it has answered is in a SQLite file, for ever: whoever deletes that
file, or runs two helpers with one key and two files, breaks what the clients were promised.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import grpc  # type: ignore[import-untyped]  # it has no types
from typing_extensions import override

from fedpeft.errors import ConfigError, DataError, ProtocolError
from fedpeft.flower.database import Database
from fedpeft.secagg.helper import Answered, Helper
from fedpeft.secagg.protocol import Refused

PATH = "/fedpeft.Helper/Answer"
LARGEST_REQUEST = 64 << 20
"""Bytes of a request: a cohort of 65,535, the largest there is, takes 27 MB."""

_THREADS = 2
_WAITING = 8  # requests at a time; more are turned away, and may be sent again
_LARGEST_ANSWER = (1 << 31) - 1  # what gRPC can carry
_GRACE_SECONDS = 5.0
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS answered (session BLOB NOT NULL, pass INTEGER NOT NULL, UNIQUE (session, pass))",
)


@dataclass(frozen=True, slots=True)
class AnsweredFile(Answered):
    """Answered passes in a SQLite file that outlives the process; processes of one machine may share it."""

    path: Path
    _database: Database = field(init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_database", Database(self.path, _SCHEMA, 1))

    @override
    def use(self, session: bytes, pass_: int) -> bool:
        """As its class has it. Raises DataError where nothing can be written, when there must be no answer."""
        with self._lock, self._database.writing() as connection:
            done = connection.execute("INSERT OR IGNORE INTO answered VALUES (?, ?)", (session, pass_))
            return done.rowcount == 1

    def count(self) -> int:
        """How many passes were ever answered. Raises DataError for a file that can't be read."""
        with self._lock, self._database.checked():
            (found,) = self._database.connection.execute("SELECT count(*) FROM answered").fetchone()
        return int(found)


@dataclass(frozen=True, slots=True)
class Service:
    """A helper that is being asked. address: where, with the port that it got."""

    address: str
    _server: grpc.Server = field(repr=False)

    def wait(self) -> None:
        """Stay until it is stopped."""
        self._server.wait_for_termination()


@contextmanager
def helper_service(
    helper: Helper,
    address: str,
    certificate: bytes,
    private_key: bytes,
    clock: Callable[[], float],
    on_reply: Callable[[str], None],
) -> Iterator[Service]:
    """A helper that answers at this address for as long as the block lasts.

    certificate, private_key: PEM; the certificate names the host. address: "host:port", port 0 for any that is free;
    clock: unix seconds; on_reply: told a line for each request, from other threads. Raises ConfigError for an address
    or a certificate that can't be used.
    """

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            reply = helper.answer(request, clock())
        except DataError as error:
            on_reply(f"no answer: {error}")
            context.abort(grpc.StatusCode.UNAVAILABLE, "the helper can't write down what it answers")
        on_reply(_line(request, reply.refusal))
        return reply.answer

    server = grpc.server(
        ThreadPoolExecutor(_THREADS, "helper"),
        handlers=[_Handler(answer)],
        maximum_concurrent_rpcs=_WAITING,
        options=[
            ("grpc.max_receive_message_length", LARGEST_REQUEST),
            ("grpc.max_send_message_length", _LARGEST_ANSWER),
            ("grpc.so_reuseport", 0),
        ],
    )
    try:
        port = server.add_secure_port(address, grpc.ssl_server_credentials([(private_key, certificate)]))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"address, certificate: can't listen at {address}: {error}; want host:port that is free, and a PEM "
            f"certificate with its private key"
        ) from error
    server.start()
    try:
        yield Service(f"{address.rpartition(':')[0]}:{port}", server)
    finally:
        server.stop(_GRACE_SECONDS).wait()


def helper_call(address: str, root_certificate: bytes, seconds: float) -> Callable[[bytes], bytes]:
    """What asks a helper and returns its answer. The TLS connection shows that it is the one at this address.

    address: "host:port", as the helper's certificate names the host; root_certificate: PEM, of whoever signed that one
    (or itself, where it is self-signed); seconds: how long an answer may take. Raises ProtocolError, and the round is
    lost, where there is none: it must not be asked for again, since it may have been given.
    """

    def call(request: bytes) -> bytes:
        options = [("grpc.max_receive_message_length", _LARGEST_ANSWER), ("grpc.enable_retries", 0)]
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(root_certificate), options) as channel:
            ask = channel.unary_unary(PATH, _as_it_is, _as_it_is)
            try:
                return bytes(ask(request, timeout=seconds))
            except grpc.RpcError as error:
                said = (error.code().name.lower().replace("_", " "), error.details())
                raise ProtocolError(
                    f"the helper at {address} gave no answer: {': '.join(filter(None, said))}; want it running, with a "
                    f"certificate for this host that secagg's root certificate has signed"
                ) from error

    return call


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    def __init__(self, answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> None:
        self._method = grpc.unary_unary_rpc_method_handler(answer)

    @override
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._method if handler_call_details.method == PATH else None


def _as_it_is(message: bytes) -> bytes:
    return message


def _line(request: bytes, refusal: Refused | None) -> str:
    return f"{len(request):,} bytes: answered" if refusal is None else f"{len(request):,} bytes: refused: {refusal}"
