"""A real Flower fleet on this machine's loopback, in child processes that end with the test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass
class Fleet:
    """A SuperLink and its nodes, and the Flower command that talks to them."""

    folder: Path
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(
        self, app: Path, config: Mapping[str, str], seconds: int, federation: Mapping[str, int] | None = None
    ) -> str:
        """Submit an app with ``flwr run`` and give its log once it has completed; else fail with all logs."""
        status, log = self.submit(app, config, seconds, federation)
        if status != "finished:completed":
            pytest.fail(f"the run is {status}; want finished:completed\n{log}\n{self.logs()}")
        return log

    def submit(
        self, app: Path, config: Mapping[str, str], seconds: int, federation: Mapping[str, int] | None = None
    ) -> tuple[str, str]:
        """Submit an app with ``flwr run`` and give how it has ended, and its log."""
        options = ["--run-config", " ".join(f'{k}="{v}"' for k, v in config.items())]
        if federation:
            options += ["--federation-config", " ".join(f"{k}={v}" for k, v in federation.items())]
        log = self.flwr("run", str(app), "fleet", *options, "--stream", seconds=seconds)
        return json.loads(self.flwr("ls", "fleet", "--format", "json"))["runs"][0]["status"], log

    def flwr(self, *arguments: str, seconds: int = 60) -> str:
        """What a ``flwr`` command prints; fail with it and all logs if it fails or takes longer."""
        out = self.folder / "flwr.out"
        with out.open("wb") as file:
            process = subprocess.Popen(
                [BIN / "flwr", *arguments], env=environment(self.folder), stdout=file, stderr=subprocess.STDOUT
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = f"not done within {seconds} s"
        if code != 0:
            pytest.fail(f"flwr {' '.join(arguments)}: {code}\n{out.read_text()}\n{self.logs()}")
        return out.read_text()

    def logs(self) -> str:
        """The last lines that each process wrote."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-4000:]}" for file in files)

    def start(self, name: str, *command: str, variables: Mapping[str, str] | None = None) -> None:
        """Start one process of the fleet, in a process group of its own, with these variables in its environment."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=environment(self.folder) | dict(variables or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_node(self, number: int, config: str, variables: Mapping[str, str] | None = None) -> None:
        """Start a SuperNode, whose process is "supernode" and its number."""
        self.start(
            f"supernode{number}",
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", str(free_port()), "--node-config", config,
            variables=variables,
        )  # fmt: skip

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End one process with those that it started, by their ids."""
        process = self.processes.pop(name)
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)  # taken first: orphans forget their parent
            process.send_signal(how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, timeout=10)
        process.kill()
        process.wait()

    def wait_for_superlink(self) -> None:
        """Return once the SuperLink answers."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            if self._ended():
                break
        pytest.fail(f"the SuperLink did not start\n{self.logs()}")

    def _ended(self) -> str:
        return "; ".join(f"{n} ended with {p.returncode}" for n, p in self.processes.items() if p.poll() is not None)


@contextmanager
def fleet(folder: Path, node_configs: tuple[str, ...], simulation: bool = False) -> Iterator[Fleet]:
    """A SuperLink with its database in ``folder``, and a SuperNode for each of the configs.

    node_configs: as ``--node-config`` takes them; none with ``simulation``, whose runtime makes the nodes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running = Fleet(folder, free_port())
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "fleet"\n\n[superlink.fleet]\naddress = "127.0.0.1:{running.port}"\ninsecure = true\n'
    )
    with ExitStack() as stack:
        stack.callback(lambda: [running.end(name) for name in reversed(list(running.processes))])
        database = ["--database", str(folder / "state.db")]
        mode = ["--simulation"] if simulation else []
        running.start(
            "superlink",
            "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(running.port), *database, *mode,
        )  # fmt: skip
        running.wait_for_superlink()
        for i, config in enumerate(node_configs):
            running.start_node(i, config)
        yield running


def environment(folder: Path) -> dict[str, str]:
    """What the processes of a fleet see: this checkout and interpreter, one thread each, no network but loopback."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    ours = {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
    }
    return dict(os.environ) | ours


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
