"""The end of a report: all settings, how to load the adapter, how to run the same again."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path

from fedpeft.report.folder import LOCK
from fedpeft.report.history import History
from fedpeft.report.strict import Json
from fedpeft.report.summary import setting

_HEADS = {"lm": "CausalLM", "causal-lm": "CausalLM", "image": "ImageClassification", "vision": "ImageClassification"}
_TYPES = {"CAUSAL_LM": "CausalLM", "SEQ_CLS": "SequenceClassification"}


def settings(h: History) -> str:
    """Every setting of the run, section by section, as HTML."""
    alone = {k: v for k, v in h.run.settings.items() if not isinstance(v, Mapping)}
    sections: dict[str, Mapping[str, Json]] = {"experiment": alone} if alone else {}
    sections |= {k: v for k, v in h.run.settings.items() if isinstance(v, Mapping) and v}
    if not sections:
        return ""
    told = "".join(
        f"<section><h3>{escape(name)}</h3><table><tbody>"
        + "".join(f"<tr><th>{escape(k)}</th><td>{escape(shown(v))}</td></tr>" for k, v in values.items())
        + "</tbody></table></section>"
        for name, values in sections.items()
    )
    return f'<h2>Settings</h2><div class="settings">{told}</div>'


def use(h: History) -> str:
    """How to load the adapter with stock transformers and peft, as HTML."""
    folder = h.path.resolve().name
    config = _adapter_config(h.path)
    found = str(config.get("base_model_name_or_path") or "")
    base = found or setting(h, "model.name") or "the base model"
    kind = _HEADS.get(h.run.task) or _TYPES.get(str(config.get("task_type")), "SequenceClassification")
    labels = len(h.run.labels) or len({label for x in h.run.clients.values() for label in x.labels})
    options = f", num_labels={labels}" if kind != "CausalLM" and labels else ""
    reader = "AutoImageProcessor" if kind == "ImageClassification" else "AutoTokenizer"
    name = "processor" if kind == "ImageClassification" else "tokenizer"
    note = (
        ""
        if config
        else f"<p>The adapter is not written out yet: <code>fedpeft export {escape(folder)} --to peft</code>.</p>"
    )
    code = (
        f"from peft import PeftModel\n"
        f"from transformers import AutoModelFor{kind}, {reader}\n\n"
        f"base = AutoModelFor{kind}.from_pretrained({base!r}{options})\n"
        f"model = PeftModel.from_pretrained(base, {folder + '/adapter'!r}).eval()\n"
        f"{name} = {reader}.from_pretrained({base!r})"
    )
    told = f"<p>With transformers and peft alone:</p><pre>{escape(code)}</pre>"
    return f"<h2>Use the adapter</h2>{'' if config else note}{told}"


def reproduce(h: History) -> str:
    """The command, seed, versions and digest that make this run again, as HTML."""
    folder = h.path.resolve().name
    command = h.run.command or f"fedpeft run {folder}/{LOCK}"
    seed = setting(h, "seed")
    told = (
        f"<p>The same seed{f' ({escape(seed)})' if seed else ''} and versions give the same adapter, bit for bit.</p>"
    )
    digest = h.final.adapter_digest if h.final is not None else ""
    if digest:
        told += f"<p>Digest of the adapter: <code>{escape(digest)}</code></p>"
    versions = ", ".join(f"{escape(k)} {escape(v)}" for k, v in h.run.versions.items())
    if versions:
        told += f'<p class="soft">Versions: {versions}. All settings are in <code>{LOCK}</code>.</p>'
    return f"<h2>Run it again</h2><pre>{escape(command)}</pre>{told}"


def shown(value: Json) -> str:
    """A setting as text."""
    if isinstance(value, str):
        return value or "not set"
    if isinstance(value, list | tuple):
        return ", ".join(shown(x) for x in value) or "none"
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _adapter_config(folder: Path) -> Mapping[str, Json]:
    try:
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not exported yet: the page says how
        return {}
    return config if isinstance(config, dict) else {}
