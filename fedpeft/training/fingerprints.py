"""What tells one base model from another."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import transformers
from torch import nn
from transformers import PreTrainedModel

from fedpeft.training.cache import keep
from fedpeft.training.environment import cache_folder

# What changes a model's answers and is not seen in its weights, by the names of all families.
_SETTINGS = (
    "activation",
    "activation_function",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "is_decoder",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "max_position_embeddings",
    "model_type",
    "n_head",
    "n_heads",
    "no_rope_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "pad_token_id",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "use_bidirectional_attention",
)


def fingerprint(model: PreTrainedModel, fresh: Sequence[str], files: Sequence[Path]) -> str:
    """SHA-256, in hex, of a model's names, shapes, dtypes and bytes, all but a fresh head's.

    The digest of these files is kept in the cache folder, so that the next start does not read every byte
    again; a file of another size or modification time makes it be taken anew. A cache that can't be written is
    not an error. The tokenizer is not in it.
    """
    reads = ",".join(_SETTINGS)  # of an earlier fedpeft's digest others may have been read
    key = _digest([type(model).__name__, transformers.__version__, reads, *fresh, *(stamp(x) for x in files)])
    kept = cache_folder() / "digests" / key
    if kept.is_file() and len(text := kept.read_text()) == 64:
        return text
    text = _of_weights(model, frozenset(fresh))
    keep(kept, [text.encode()])
    return text


def _of_weights(model: PreTrainedModel, fresh: frozenset[str]) -> str:
    config = model.config.to_dict()
    digest = hashlib.sha256(json.dumps({k: config.get(k) for k in _SETTINGS}, sort_keys=True).encode())
    for name, x in sorted(_tensors(model)):
        if name not in fresh:
            digest.update(f"{name} {tuple(x.shape)} {x.dtype};".encode())
            digest.update(x.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters, tied ones once, and the buffers that are saved with them."""
    parameters = dict(model.named_parameters())
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {n: x for n, x in model.state_dict().items() if n not in everything}
    return [*parameters.items(), *buffers.items()]


def stamp(file: Path) -> str:
    """What changes when a file does: its place, size and modification time."""
    found = file.stat()
    return f"{file.resolve()} {found.st_size} {found.st_mtime_ns}"


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
