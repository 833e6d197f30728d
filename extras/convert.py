"""Makes a checkpoint of this project from released weights.

    python -m extras.convert --source=mdm-472M.safetensors --n_head=10 --out_dir=out/smdm

Reads the layout of the authors' code and of SMDM's released checkpoints; tests/golden/README.md describes it.
"""

import os
from dataclasses import asdict, dataclass

import torch

import configurator
from model import MDM, MDMConfig
from train import write_file


@dataclass
class ConvertConfig:
    source: str | None = None  # the weights: a .safetensors, .pth or .bin file
    n_head: int | None = None  # attention heads, which the weights do not show; model.py lists SMDM's sizes
    out_dir: str | None = None  # ckpt.pt goes here
    block_size: int = 2048  # content tokens of a sequence, which the weights do not show either


def from_smdm(state_dict, n_head: int, block_size: int = 2048) -> MDM:
    """The model of a state dict in SMDM's layout. Raises ValueError if it has another layout."""
    w, w1 = dict(state_dict), "transformer.h.0.mlp.swiglu.w1.weight"
    for name in ("transformer.wte.weight", "lm_head.weight", w1):
        if name not in w:
            raise ValueError(f"no SMDM state dict: it has {', '.join(sorted(w)[:3])}, ... but no {name}")
    wte, head = w.pop("transformer.wte.weight"), w.pop("lm_head.weight")
    V, C = head.shape
    if len(wte) not in (V + 1, V + 2):
        raise ValueError(f"wte has {len(wte)} rows for {V} tokens; wanted 1 more for mask, or 2 with a sink")
    n_layer = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("transformer.h."))
    gated = "transformer.h.0.attn.gate.weight" in w
    config = MDMConfig(block_size, V, n_layer, n_head, C, len(w[w1]), len(wte) - V - 1, gated_attention=gated)
    ours = {"wte.weight": wte[: V + 1], "lm_head.weight": head}
    if config.n_sink:
        ours["sink"] = wte[V + 1 :]
    for name, tensor in w.items():
        if name.endswith("attn.attn.weight"):  # rows by head, then q, k, v -> all q, all k, all v
            if tensor.shape != (3 * C, C):
                raise ValueError(f"qkv of {len(tensor)} rows, not {3 * C}: grouped queries are not supported")
            tensor = tensor.view(n_head, 3, C // n_head, C).transpose(0, 1).reshape(3 * C, C)
        name = name.replace("transformer.h.", "blocks.").removeprefix("transformer.")
        ours[name.replace("attn.attn.", "attn.qkv.").replace("swiglu.", "")] = tensor
    return MDM.from_checkpoint({"model": ours, "model_config": asdict(config)})


def main():
    cfg, _ = configurator.parse(ConvertConfig)
    if None in (cfg.source, cfg.n_head, cfg.out_dir):
        raise ValueError("wanted --source, --n_head and --out_dir; --help explains them")
    path = os.path.join(cfg.out_dir, "ckpt.pt")
    if os.path.exists(path):
        raise ValueError(f"{path} exists; set another --out_dir")
    try:
        if cfg.source.endswith(".safetensors"):
            weights = configurator.need("safetensors.torch", "safetensors").load_file(cfg.source)
        else:
            weights = torch.load(cfg.source, map_location="cpu", weights_only=True, mmap=True)
        weights = weights.get("model", weights)
    except Exception as error:  # a file of another kind fails in many ways
        raise ValueError(f"{cfg.source} cannot be read: {str(error)[:200]}") from error
    model = from_smdm(weights, cfg.n_head, cfg.block_size)
    checkpoint = {"model": model.state_dict(), "model_config": asdict(model.config), "run_config": {}}
    os.makedirs(cfg.out_dir, exist_ok=True)
    write_file(path, lambda file: torch.save(checkpoint | {"meta": None, "step": 0}, file))
    print(f"saved {path}, {model.num_params():,} non-embedding parameters")


if __name__ == "__main__":
    configurator.run(main)
