"""Packaged weights as Hugging Face folders."""

import json
from pathlib import Path

import torch

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def gguf(source: Path, out: Path) -> None:
    """Write a causal language model in GGUF, with its tokenizer and chat template, as fp32 safetensors.

    Parsing takes half a minute, most of it the tokenizer. The quantised weights are expanded, so that the
    folder is a plain model: nothing of GGUF's quantisation is left in its configuration.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010  # it has no such attribute as far as types go
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def dinov2(source: Path, out: Path) -> None:
    """Write the ViT-S/14 backbone of an ONNX graph as a Dinov2Model.

    Most initialisers keep their names under ``backbone.``. The matrices of MatMul nodes are anonymous and
    transposed; the node's name tells whose they are. The position embedding is in two constants: the CLS
    token's, and those of 37 × 37 patches.
    """
    import onnx
    from onnx import numpy_helper
    from safetensors.torch import save_file

    graph = onnx.load(source).graph
    constants = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy()) for x in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): x for name, x in constants.items() if name.startswith(prefix)}
    for node in graph.node:
        path = node.name.split("/")  # ["", "backbone", "encoder", "layer.0", …, "MatMul"]
        if node.op_type == "MatMul" and path[1:2] == ["backbone"] and node.input[1] in constants:
            weights[".".join([*path[2:-1], "weight"])] = constants[node.input[1]].T.contiguous()
    first = next(x for name, x in constants.items() if name.startswith("onnx::Concat") and x.shape == (1, 1, 384))
    patches = next(x for x in constants.values() if x.shape == (1, 37 * 37, 384))
    weights["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # for pretraining only, and not in the graph
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "image_size": 518,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": False,
    }
    # 112 pixels, 8 × 8 patches: what a CPU trains on in reasonable time; position embeddings are interpolated
    pixels = {"image_processor_type": "BitImageProcessor", "size": {"height": 112, "width": 112}, **_IMAGENET}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "preprocessor_config.json").write_text(json.dumps(pixels, indent=1))
