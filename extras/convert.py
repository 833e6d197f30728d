"""Released weights in, and our weights out.

    python -m extras.convert smdm --source=mdm-472M.safetensors --tokenizer=tokenizer.json --out_dir=out/smdm
    python -m extras.convert causal --source=Qwen2.5-0.5B --out_dir=out/qwen
    python -m extras.convert causal --source=SmolLM2-135M-Instruct.Q4_1.gguf --out_dir=out/smollm2
    python -m extras.convert export --source=out/arithmetic --to=my-model
    python -m extras.convert import --source=my-model --out_dir=out/back

smdm reads the layout of the authors' code and of SMDM's checkpoints (tests/golden/README.md describes it),
causal the folder of a Qwen2 or Llama model (Qwen2.5, SmolLM2, TinyLlama, Llama 3), or its GGUF file, which
becomes the start of an MDM. docs/weights.md has more."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass

import torch

import configurator
from model import MDM, PRESETS, MDMConfig, load_checkpoint
from prepare_data import load_tokenizer, make_tokenizer, read_json, refuse_pointer
from train import MODEL_KEYS, TrainConfig, write_file


@dataclass
class ConvertConfig:
    action: str = ""  # smdm, causal, export or import
    source: str | None = None  # weights (smdm), a folder (causal, import), a .gguf (causal), a run (export)
    tokenizer: str | None = None  # smdm: its tokenizer.json
    n_head: int | None = None  # smdm: attention heads; None: those of the size in model.py's table
    block_size: int = 2048  # smdm, causal: content tokens of a sequence, which the weights do not show
    n_sink: int = 1  # causal: sink tokens to add
    sink_attends_all: bool = False  # causal: they attend to all tokens: registers
    gated_attention: bool = False  # causal: add a gate
    shift: bool = True  # causal: position i is predicted from the state of position i - 1, as before
    out_dir: str | None = None  # smdm, causal, import: ckpt.pt goes here
    to: str | None = None  # export: the folder to write


# ---------- Reading


def read_weights(source):
    """{name: tensor} of a .safetensors, .pth or .bin file, or of a folder's .safetensors files: those that
    transformers would take. Files are mapped into memory: a tensor is read when it is used."""
    paths, weights = [source], {}
    if os.path.isdir(source):
        index = f"{source}/model.safetensors.index.json"  # of several files
        paths = [f"{source}/model.safetensors"]
        if not os.path.exists(paths[0]) and os.path.exists(index):
            paths = [f"{source}/{name}" for name in sorted(set(read_json(index)["weight_map"].values()))]
    for path in paths:
        refuse_pointer(path)
        if path.endswith(".safetensors"):
            weights |= configurator.need("safetensors.torch", "safetensors").load_file(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            weights |= checkpoint.get("model", checkpoint)
    return weights


def fill(model, tensors):
    """The model, filled from tuples (name, *tensors that are its rows). Raises ValueError unless they fit,
    and for quantized numbers, which need a scale."""
    missing = dict(model.named_parameters())
    for name, *parts in tensors:
        if name not in missing:
            raise ValueError(f"the model has no {name}, or it comes twice: the weights are of another model")
        parameter = missing.pop(name).data
        sizes = [len(part) for part in parts]
        shape = (sum(sizes), *parts[0].shape[1:])
        if shape != parameter.shape:
            raise ValueError(f"{name} {shape} does not fit into {tuple(parameter.shape)}")
        for rows, part in zip(parameter.split(sizes), parts):
            if part.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{name} is {part.dtype}; wanted float32, bfloat16 or float16")
            rows.copy_(part)
    if missing:
        raise ValueError(f"there are no weights for {', '.join(sorted(missing)[:3])}")
    return model


# ---------- SMDM


def from_smdm(state_dict, n_head: int | None = None, block_size: int = 2048) -> MDM:
    """The model of a state dict in SMDM's layout. n_head may be left out for a size of model.py's table.
    Raises KeyError or ValueError if the dict has another layout."""
    weights = {}
    for name, tensor in state_dict.items():  # a compiled model in several processes adds prefixes
        weights[name.removeprefix("module.").removeprefix("_orig_mod.")] = tensor
    wte, head = weights.pop("transformer.wte.weight"), weights.pop("lm_head.weight")
    V, C = head.shape
    if len(wte) not in (V + 1, V + 2):
        raise ValueError(f"wte has {len(wte)} rows for {V} tokens; wanted 1 more for mask, or 2 with a sink")
    n_layer = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer.h."))
    heads_of = {(layers, width): heads for layers, heads, width in PRESETS.values()}
    known = heads_of.get((n_layer, C))
    if n_head is None and known is None:
        raise ValueError(f"model.py's table has no {n_layer} layers of width {C}; set n_head")
    if n_head and known and n_head != known:  # the weights have the same shapes for any number of heads
        raise ValueError(f"model.py's table has {known} heads for this size; got n_head {n_head}")
    n_head = n_head or known
    config = MDMConfig(
        block_size=block_size,
        vocab_size=V,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=C,
        mlp_hidden=len(weights["transformer.h.0.mlp.swiglu.w1.weight"]),
        n_sink=len(wte) - V - 1,
        gated_attention="transformer.h.0.attn.gate.weight" in weights,
    )

    def tensors():
        yield "wte.weight", wte[: V + 1]
        yield "lm_head.weight", head
        if config.n_sink:
            yield "sink", wte[V + 1 :]
        for name, tensor in weights.items():
            if name.endswith(("rope_cache", "inv_freq", "cos", "sin")):  # rotary buffers
                continue
            if name.endswith("attn.attn.weight"):  # rows by head, then q, k, v -> all q, all k, all v
                tensor = tensor.view(n_head, 3, C // n_head, C).transpose(0, 1).reshape(3 * C, C)
            name = name.replace("transformer.h.", "blocks.").removeprefix("transformer.")
            yield name.replace("attn.attn.", "attn.qkv.").replace("swiglu.", ""), tensor

    return fill(MDM(config), tensors())


# ---------- A causal model becomes the start of an MDM

IN_A_LAYER = {  # name in a layer of Qwen2 and Llama: our name
    "input_layernorm.weight": "norm_1.weight",
    "post_attention_layernorm.weight": "norm_2.weight",
    "mlp.gate_proj.weight": "mlp.w1.weight",
    "mlp.up_proj.weight": "mlp.w2.weight",
    "mlp.down_proj.weight": "mlp.w3.weight",
}


def check_causal(hf):
    """Raises ValueError if config.json names something that MDM does not compute."""
    if hf.get("model_type") not in ("qwen2", "llama"):
        raise ValueError(f"the model is of type {hf.get('model_type')!r}; wanted qwen2 or llama")
    width = hf["hidden_size"] // hf["num_attention_heads"]
    ropes = [hf.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    scalings = {rope.get("rope_type", rope.get("type", "default")) for rope in ropes}
    windows = hf.get("use_sliding_window") or {*(hf.get("layer_types") or [])} - {"full_attention"}
    wanted = {  # what MDM computes: is it what the model computes?
        "plain rotary positions": scalings == {"default"},
        "the whole head rotated": hf.get("partial_rotary_factor", 1) == 1,
        "attention without windows": not windows,
        "SwiGLU": hf.get("hidden_act", "silu") == "silu",
        f"heads of width {width}": hf.get("head_dim") in (None, width),
        "no biases but of q, k, v in Qwen2": not (hf.get("attention_bias") or hf.get("mlp_bias")),
        "weights that are not quantized": not hf.get("quantization_config"),
    }
    if missing := [name for name, holds in wanted.items() if not holds]:
        raise ValueError(f"config.json describes another model; wanted {', '.join(missing)}")


def from_causal(hf, weights, vocab_size, eot_id, shift=True, block_size=2048, **flags) -> MDM:
    """The MDM that starts from a Qwen2 or Llama model: hf its config.json, weights {name: tensor}. It
    computes the same logits, if the same causal mask is applied. vocab_size: tokens to keep of the padded
    vocabulary; flags: n_sink, sink_attends_all, gated_attention. Raises ValueError for another model."""
    check_causal(hf)
    rope, n_head = hf.get("rope_parameters") or {}, hf["num_attention_heads"]
    config = MDMConfig(
        block_size=block_size,
        vocab_size=vocab_size,
        n_layer=hf["num_hidden_layers"],
        n_head=n_head,
        n_embd=hf["hidden_size"],
        mlp_hidden=hf["intermediate_size"],
        shift=shift,
        n_kv_head=hf.get("num_key_value_heads", n_head),
        qkv_bias=hf["model_type"] == "qwen2",
        rope_base=hf.get("rope_theta") or rope.get("rope_theta", 10000.0),
        norm_eps=hf["rms_norm_eps"],
        **flags,
    )
    unused = {name: weights[name] for name in weights if not name.endswith("rotary_emb.inv_freq")}

    def tensors():
        wte = unused.pop("model.embed_tokens.weight")[:vocab_size]
        mean = sum(part.float().sum(dim=0, keepdim=True) for part in wte.split(4096)) / vocab_size
        yield "wte.weight", wte, mean  # [MASK] starts as no token in particular
        if config.n_sink:  # a causal model's first token sees only itself, too: that is its sink
            yield "sink", wte[eot_id].expand(config.n_sink, -1)
        if hf.get("tie_word_embeddings"):
            unused.pop("lm_head.weight", None)
            yield "lm_head.weight", wte
        else:
            yield "lm_head.weight", unused.pop("lm_head.weight")[:vocab_size]
        yield "ln_f.weight", unused.pop("model.norm.weight")
        for layer in range(config.n_layer):
            theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
            for name, our_name in IN_A_LAYER.items():
                yield ours + our_name, unused.pop(theirs + name)
            for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
                parts = [unused.pop(f"{theirs}self_attn.{part}_proj.{kind}") for part in "qkv"]
                yield f"{ours}attn.qkv.{kind}", *parts
            proj = unused.pop(f"{theirs}self_attn.o_proj.weight")
            if config.gated_attention:  # sigmoid(0) = 1/2 times 2: the start is the same function
                yield f"{ours}attn.gate.weight", torch.zeros_like(proj)
                proj = 2 * proj
            yield f"{ours}attn.proj.weight", proj

    model = fill(MDM(config), tensors())
    if unused:
        raise ValueError(f"an MDM has no place for the weights {', '.join(sorted(unused)[:3])}")
    return model


def read_gguf(path):
    """(config, weights, tokenizer, quantization) of a GGUF file, as float32, by transformers."""
    transformers, gguf = configurator.need("transformers"), configurator.need("gguf")
    configurator.need("accelerate")
    folder, name = os.path.split(os.path.abspath(path))
    file_type = gguf.GGUFReader(path).fields["general.file_type"].contents()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).backend_tokenizer
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(f"{temporary}/tokenizer.json")
        spec = make_tokenizer(f"{temporary}/tokenizer.json")
    hf = model.config.to_dict() | {"quantization_config": None}  # they are float32 now
    return hf, model.state_dict(), spec, gguf.LlamaFileType(file_type).name


# ---------- Out, and back


def tokenizer_json(spec):
    """A tokenizer of prepare_data.py as the text of a tokenizer.json, for the tokenizers package."""
    if "json" in spec:
        return spec["json"]
    tokenizers = configurator.need("tokenizers")
    encoding = load_tokenizer(spec)
    ranks = encoding._mergeable_ranks
    # GPT-2 writes every byte as a character that can be seen
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    character = {byte: chr(byte) for byte in visible} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    written = {token: "".join(character[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [(written[a], written[b]) for a, b in pairs if a in ranks and b in ranks]
    vocab = {written[token]: rank for token, rank in ranks.items()}
    # a word that is a token is not put together from its parts: so does tiktoken
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(spec["pattern"]), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(encoding.special_tokens_set))
    return tokenizer.to_str()


def card(checkpoint, results):
    """README.md of an exported model: what it is, and its numbers."""
    meta = checkpoint["meta"] or {}
    lines = ["# A masked diffusion language model", ""]
    lines += [f"Trained on {meta.get('name')} for {checkpoint['step']:,} steps.", ""]
    if "source" in meta:
        lines += [f"Converted: {', '.join(f'{key} {value}' for key, value in meta['source'].items())}.", ""]
    lines += [f"- {key}: {value}" for key, value in checkpoint["model_config"].items()]
    for name, result in results.items():
        numbers = [key for key in result if f"{key}_se" in result]
        shown = ", ".join(f"{key} {result[key]:.4f} ± {result[f'{key}_se']:.4f}" for key in numbers)
        lines += ["", f"{name}, step {result['step']:,}, commit {result['commit']}: {shown}"]
    return "\n".join(lines) + "\n"


def save(out_dir, model, meta, run_config, step):
    path, state = f"{out_dir}/ckpt.pt", {"model": model.state_dict(), "model_config": asdict(model.config)}
    state |= {"run_config": run_config, "meta": meta, "step": step}
    os.makedirs(out_dir, exist_ok=True)
    write_file(path, lambda file: torch.save(state, file))
    print(f"saved {path}, {model.num_params():,} non-embedding parameters")


def smdm(cfg):
    spec = make_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    model = from_smdm(read_weights(cfg.source), cfg.n_head, cfg.block_size)
    if spec and spec["vocab_size"] != model.config.vocab_size:
        sizes = f"{spec['vocab_size']:,} tokens, the model {model.config.vocab_size:,}"
        raise ValueError(f"{cfg.tokenizer} has {sizes}; take the model's own")
    return model, spec, {"type": "smdm"}


def causal(cfg):
    if cfg.source.endswith(".gguf"):
        hf, weights, spec, quantization = read_gguf(cfg.source)
    elif os.path.isdir(cfg.source):
        hf, weights = read_json(f"{cfg.source}/config.json"), read_weights(cfg.source)
        spec, quantization = make_tokenizer(f"{cfg.source}/tokenizer.json"), "none"
    else:
        hint = f"a model of the hub comes with: hf download {cfg.source} --local-dir FOLDER"
        raise ValueError(f"{cfg.source} is no folder and no .gguf file; {hint}")
    V, rows, tokenizer = spec["vocab_size"], hf["vocab_size"], load_tokenizer(spec)
    print(f"{cfg.source}: {hf['model_type']}, quantization: {quantization}, end-of-text: {spec['eot']}")
    print(f"{rows - V:,} of {rows:,} rows stand for no token, and are left out")
    flags = {key: getattr(cfg, key) for key in ("n_sink", "sink_attends_all", "gated_attention")}
    model = from_causal(hf, weights, V, tokenizer.eot_token, cfg.shift, cfg.block_size, **flags)
    return model, spec, {"type": hf["model_type"], "quantization": quantization}


def convert(cfg):
    """A released model becomes a checkpoint, with train.py's defaults as its run_config."""
    try:
        model, spec, source = smdm(cfg) if cfg.action == "smdm" else causal(cfg)
    except KeyError as error:
        raise ValueError(f"{cfg.source} lacks {error}: a file is missing, or is of another model") from error
    meta = None
    if spec:
        meta = {"name": cfg.source, "source": source, "tokenizer": spec, "opens_with_eot": False}
        os.makedirs(cfg.out_dir, exist_ok=True)  # for prepare_data.py --tokenizer=OUT_DIR/tokenizer.json
        write_file(f"{cfg.out_dir}/tokenizer.json", lambda file: file.write(spec["json"].encode()))
    shape = {key: getattr(model.config, key) for key in MODEL_KEYS}
    save(cfg.out_dir, model, meta, asdict(TrainConfig(dataset="none", out_dir=cfg.out_dir, **shape)), 0)


def export(cfg):
    """Writes a folder: config.json has the model_config, training.json the rest of the checkpoint."""
    save_file = configurator.need("safetensors.torch", "safetensors").save_file
    checkpoint, results = load_checkpoint(cfg.source), {}
    folder = cfg.source if os.path.isdir(cfg.source) else os.path.dirname(cfg.source) or "."
    if os.path.exists(f"{folder}/results.json"):
        results = read_json(f"{folder}/results.json")
    config = {"architectures": ["MDM"], **checkpoint["model_config"]}
    rest = {key: checkpoint[key] for key in ("meta", "run_config", "step")}
    files = {"config.json": json.dumps(config, indent=1), "training.json": json.dumps(rest, indent=1)}
    files["README.md"] = card(checkpoint, results)
    if checkpoint["meta"]:
        files["tokenizer.json"] = tokenizer_json(checkpoint["meta"]["tokenizer"])
    to = os.path.normpath(cfg.to)
    new = f"{to}.{os.getpid()}.tmp"  # it gets its name when all is there
    os.makedirs(new)
    save_file(checkpoint["model"], f"{new}/model.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        with open(f"{new}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    os.rename(new, to)
    print(f"wrote {cfg.to}: model.safetensors, {', '.join(files)}")


def import_back(cfg):
    config, rest = read_json(f"{cfg.source}/config.json"), read_json(f"{cfg.source}/training.json")
    config.pop("architectures")
    model, weights = MDM(MDMConfig(**config)), read_weights(cfg.source)
    save(cfg.out_dir, fill(model, weights.items()), **rest)


ACTIONS = {"smdm": convert, "causal": convert, "export": export, "import": import_back}


def main():
    cfg, _ = configurator.parse(ConvertConfig, positional="action")
    if cfg.action not in ACTIONS:
        raise ValueError(f"the action is {cfg.action!r}; wanted {', '.join(ACTIONS)}")
    target = "to" if cfg.action == "export" else "out_dir"
    if cfg.source is None or getattr(cfg, target) is None:
        raise ValueError(f"{cfg.action} wants --source and --{target}; --help explains them")
    path = cfg.to if target == "to" else os.path.join(cfg.out_dir, "ckpt.pt")
    if os.path.exists(path):
        raise ValueError(f"{path} exists; set another --{target}")
    ACTIONS[cfg.action](cfg)


if __name__ == "__main__":
    configurator.run(main)
