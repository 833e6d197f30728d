import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

from model import MDM, MDMConfig  # noqa: E402

TINY = {"block_size": 16, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16}
VARIANTS = {
    "vanilla": {"n_sink": 0},
    "sink": {"n_sink": 1},
    "gate": {"n_sink": 0, "gated_attention": True},
    "sink+gate": {"n_sink": 1, "gated_attention": True},
    "4 sinks": {"n_sink": 4},
    "2 sinks at the end": {"n_sink": 2, "sink_position": "end"},
    "zero value": {"n_sink": 1, "sink_zero_value": True},
    "2 registers": {"n_sink": 2, "sink_attends_all": True},
}


def make_model(seed=0, **flags):
    """A tiny model whose weights are all random, norms included. It seeds torch for the test, too."""
    model = MDM(MDMConfig(**{**TINY, **flags}), seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def save_model(folder, model, meta, **run_config):
    """A checkpoint of the model, as train.py writes it. Returns the folder."""
    state = {"model": model.state_dict(), "model_config": asdict(model.config), "run_config": run_config}
    folder.mkdir(exist_ok=True)
    torch.save(state | {"meta": meta, "step": 3}, folder / "ckpt.pt")
    return folder


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Runs a script with arguments. Returns the lines that it prints, with single blanks."""

    def call(script, *argv):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        script.main()
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return call


@pytest.fixture(autouse=True)
def signals():  # train replaces the handlers of signals until it ends
    on_sigint, on_sigterm = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, on_sigint)
    signal.signal(signal.SIGTERM, on_sigterm)


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture(scope="session")
def small_arithmetic(tmp_path_factory):
    from prepare_data import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareConfig(data_dir=str(folder), num_problems=300))
    return folder


@pytest.fixture
def data_dir(tmp_path, small_arithmetic):
    """A small prepared data set: tmp_path/data/arithmetic."""
    return shutil.copytree(small_arithmetic, tmp_path / "data")
