"""What a deployed node trains with, as its own config says it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Self, get_args

from fedpeft.config import Experiment
from fedpeft.config.runtimes import ENGINES, FORMATS, check_format, check_onnx, quantise_of
from fedpeft.errors import ConfigError
from fedpeft.run.shipped import kit_here
from fedpeft.training.kit import Kit
from fedpeft.training.settings import Kernels, Quantise


@dataclass(frozen=True, slots=True)
class Own:
    """engine: "torch" or "onnx"; quantise: what the node holds the base in, if not in the experiment's or the kit's
    format; kit: the folder that onnxruntime trains from, or that torch has its base from; frugal: whether memory is
    short, as on a node that says how much it has: onnxruntime then gives it back at once, and evaluation takes no more
    rows at a time than training; kernels: what expands nf4, if not what the experiment says."""

    engine: str = "torch"
    quantise: Quantise | None = None
    kit: Path | None = None
    frugal: bool = False
    kernels: Kernels | None = None

    @classmethod
    def said(cls, node_config: Mapping[str, bool | int | float | str], settings_json: str = "{}") -> Self:
        """What a node's "runtime", "quantise", "kernels" and "kit" say. "runtime" need not be said without torch.

        settings_json: of the run, which may have a kit of its own. ConfigError, naming the key, for a runtime that
        there is not or that lacks what it needs; KitMissingError for a kit that is still to be sent.
        """
        has_torch = find_spec("torch") is not None
        engine = str(node_config.get("runtime", "torch" if has_torch else "onnx"))
        quantise, is_frugal = _format(node_config), "memory" in node_config
        if engine not in ENGINES:
            raise ConfigError(f"node-config: runtime is {engine!r}; want {' or '.join(ENGINES)}")
        if engine == "torch":
            if not has_torch:
                raise ConfigError(
                    "node-config: runtime is 'torch', which is not installed here; install fedpeft[torch], or want "
                    "runtime='onnx'"
                )
            kit = kit_here(node_config, settings_json) if node_config.get("kit") else None
            return cls(engine, quantise, kit, is_frugal, _kernels(node_config))
        if find_spec("onnxruntime") is None:
            which = "runtime is 'onnx'" if has_torch else "torch is not installed here, so that runtime is 'onnx'"
            raise ConfigError(f"node-config: {which}, and onnxruntime is not installed; install fedpeft[onnx]")
        if _kernels(node_config) == "bitsandbytes":
            raise ConfigError(
                "node-config: kernels is 'bitsandbytes', which is torch's; want it left out, or runtime='torch'"
            )
        return cls(engine, quantise, kit_here(node_config, settings_json), is_frugal)

    def settle(self, found: Experiment) -> Experiment:
        """The experiment as this node runs it. ConfigError for what this run's clients can't train with."""
        if self.quantise is not None:
            check_format(found.model, self.quantise, f"node-config: quantise is {self.quantise!r}")
        if self.engine == "onnx":
            name = found.settings["rule"]["name"]
            check_onnx(found, name, "node-config: runtime is 'onnx'")
        model = replace(found.model, quantise=self.quantise or found.model.quantise)
        if self.kernels is not None:
            try:
                model = replace(model, kernels=self.kernels)
            except ValueError as error:
                raise ConfigError(f"node-config: {error}") from None
        if self.engine == "torch" and self.kit is not None:
            held = Kit.open(self.kit, check=False).facts.quantise
            check_format(found.model, held, f"node-config: the kit in {self.kit} holds the base in {held!r}")
            model = replace(model, name=str(self.kit), quantise=self.quantise or held)
        training = replace(found.training, micro=found.training.rows) if self.frugal else found.training
        return replace(found, model=model, training=training)


def _kernels(node_config: Mapping[str, bool | int | float | str]) -> Kernels | None:
    said = node_config.get("kernels")
    known: Kernels | None = next((x for x in get_args(Kernels) if x == said), None)
    if said is not None and known is None:
        raise ConfigError(f"node-config: kernels is {said!r}; want {' or '.join(get_args(Kernels))}")
    return known


def _format(node_config: Mapping[str, bool | int | float | str]) -> Quantise | None:
    if "quantise" not in node_config:
        return None
    said = node_config["quantise"]
    known = quantise_of(said)
    if known is None:
        raise ConfigError(f"node-config: quantise is {said!r}; want {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    return known
