"""The code on the pages of docs/ does what they say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from eval import validation
from extras import convert
from model import sink_mask
from sample import load_trained
from train import validate

DOCS = Path(__file__).parent.parent / "docs"
DEMO = DOCS.parent / "assets" / "demo"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run_blocks(page):  # returns the names that they define
    names = {}
    for block in blocks(page, "python"):
        exec(block, names)
    return names


@pytest.fixture
def qwen():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 61, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)  # biases and norms too
    return model, torch.randint(60, (1, 9)), torch.randint(60, (1, 9))


def test_a_sink_added_to_a_model_of_transformers_is_ours(qwen):
    model, ids, other_ids = qwen
    page = run_blocks("add_a_sink.md")
    with_sink = page["WithSink"](model, model.get_input_embeddings().weight[60])
    page["check"](with_sink, ids, other_ids)
    ours = convert.from_causal(model.config.to_dict(), model.state_dict(), 61, 60, shift=False, block_size=16)
    logits = with_sink(ids, is_text := torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(logits, ours(ids), atol=1e-5, rtol=1e-5)
    padded, is_text = F.pad(ids, (0, 3)), F.pad(is_text, (0, 3))
    torch.testing.assert_close(with_sink(padded, is_text)[:, :9], logits, atol=1e-5, rtol=1e-5)


def test_the_checks_of_the_page_see_a_register(qwen):
    model, ids, other_ids = qwen
    page = run_blocks("add_a_sink.md")
    register = page["WithSink"](model, model.get_input_embeddings().weight[60])
    register.may_attend = lambda is_text: torch.ones(1, 1, 10, 10, dtype=torch.bool)
    with pytest.raises(AssertionError):
        page["check"](register, ids, other_ids)


def test_attention_without_a_mask_is_attention_with_it():
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=sink_mask(7, 1))
    torch.testing.assert_close(run_blocks("add_a_sink.md")["attention"](q, k, v), wanted)


def test_the_readme_trains_and_samples(data_dir, monkeypatch, capsys):
    (code,) = blocks("../README.md", "python")
    monkeypatch.chdir(data_dir.parent)
    exec(code.replace("max_steps=500", "max_steps=2, eval_seqs=8, log_interval=1"), {})
    *_, curve, text = capsys.readouterr().out.splitlines()
    assert curve.startswith("[(1, ") and text.startswith("Tom has") and "[MASK" not in text


def test_the_likelihood_of_evaluation_md(monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    run_blocks("evaluation.md")
    assert -20 < float(capsys.readouterr().out) < 0


def test_change_attention(tmp_path):
    shutil.copytree(DOCS.parent / "extras", tmp_path / "extras")
    for file in DOCS.parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    diff = blocks("change_attention.md", "diff")[0]
    subprocess.run(["git", "apply"], input=diff, cwd=tmp_path, check=True, text=True)
    checks, add_logits = blocks("change_attention.md", "python")
    checks += "from extras.sinks import attention_maps\nassert len(list(attention_maps(changed, xt))) == 2\n"
    subprocess.run([sys.executable, "-c", checks], cwd=tmp_path, check=True)
    shutil.copytree(DEMO / "vanilla", tmp_path / "out" / "smollm2" / "vanilla")
    add_logits += "from model import MDM\nMDM.from_checkpoint('out/smollm2/logit.pt')\n"
    subprocess.run([sys.executable, "-c", add_logits], cwd=tmp_path, check=True)


@pytest.mark.parametrize("name, n_sink", [("sink", 1), ("vanilla", 0)])
def test_the_models_that_come_along_have_the_loss_of_their_training(name, n_sink):
    model, _, checkpoint = load_trained(DEMO / name, "cpu")
    assert model.config.n_sink == n_sink and "optimizer" not in checkpoint
    get_batch, n, _ = validation(checkpoint, DEMO / "arithmetic", checkpoint["run_config"]["eval_seqs"])
    loss, *_ = validate(model, get_batch, checkpoint["run_config"]["micro_batch_size"], n, "float32")
    assert loss == pytest.approx(checkpoint["best_val_loss"], abs=1e-4)
