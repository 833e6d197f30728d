"""extras/ablations.py: the table and the curves of runs, from logs with known numbers."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from extras import ablations
from train import TrainConfig


def write_log(folder, losses, again=None, commit="c1", data=None, extra=None, **settings):
    """As train.py writes it, its last line cut off. losses {step: loss}; again: those of a resumed run."""
    config = asdict(TrainConfig(out_dir=str(folder), **settings)) | (extra or {})
    rows = [{"config": config, "commit": commit, "data_sha256": data and {"train": data}, "step": 0}]
    rows += [{"step": step, "val_loss": loss} for step, loss in losses.items()] + [{"step": 5, "loss": 1.0}]
    if again:
        resumed = {**config, "init_from": "resume", "max_steps": 9000, "device": "cpu"}
        rows.append({**rows[0], "config": resumed})
        rows += [{"step": step, "val_loss": loss} for step, loss in again.items()]
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "val')


@pytest.fixture
def call(tmp_path, call_main):
    return lambda *flags: call_main(ablations, tmp_path, *flags)[1:]


def test_means_and_paired_differences(tmp_path, call):
    """Of 5.0, 5.3, 5.6 the standard deviation is 0.3, of 4.8, 5.0, 5.2 it is 0.2, of the differences 0.1."""
    for seed, vanilla, sink in ((0, 5.0, 4.8), (1, 5.3, 5.0), (2, 5.6, 5.2)):
        write_log(tmp_path / f"a-{seed}", {0: 9.0, 10: vanilla}, seed=seed, n_sink=0)
        write_log(tmp_path / f"b-1-{seed}", {0: 9.0, 10: sink}, seed=seed, device="mps", eval_interval=10)
    write_log(tmp_path / "c", {0: 9.0, 10: 5.0}, seed=2, n_sink=4)
    write_log(tmp_path / "d-1", {0: 9.0, 10: 4.0}, seed=7, n_sink=2)  # the first row has no such seed
    assert call() == [
        "a 3 10 5.3000 ± 0.1732 0.0000 ± 0.0000 -",
        "b-1 3 10 5.0000 ± 0.1155 -0.3000 ± 0.0577 -0.548 to -0.052 n_sink=1",
        "c 1 10 5.0000 ± nan -0.6000 ± nan - n_sink=4",
        "d-1 1 10 4.0000 ± nan - - n_sink=2",
    ]
    assert call("--baseline=b-1")[:2] == [
        "a 3 10 5.3000 ± 0.1732 0.3000 ± 0.0577 0.052 to 0.548 n_sink=0",
        "b-1 3 10 5.0000 ± 0.1155 0.0000 ± 0.0000 -",
    ]
    with pytest.raises(ValueError, match="no run is named b; wanted one of a, b-1, c, d-1"):
        call("--baseline=b")


def test_a_resumed_run(tmp_path, call):
    """It has the last row of a step, and the settings of its first start, but its last length."""
    write_log(tmp_path / "a-0", {0: 9.0, 20: 7.0}, {10: 6.0, 20: 5.0}, seed=0)
    write_log(tmp_path / "a-1", {0: 9.0, 20: 5.5}, seed=1, max_steps=9000)
    assert call() == ["a 2 20 5.2500 ± 0.2500 0.0000 ± 0.0000 -"]


def test_each_seed_may_start_from_a_run_of_its_own(tmp_path, call):
    for seed in (0, 1):
        write_log(tmp_path / f"a-{seed}", {0: 5.0 + seed}, seed=seed, init_from=f"out/vanilla-{seed}")
        write_log(tmp_path / f"b-{seed}", {0: 5.0}, seed=seed, init_from=f"out/sink-{seed}")
    assert call()[1] == "b 2 0 5.0000 ± 0.0000 -0.5000 ± 0.5000 -6.855 to 5.855 init_from=out/sink"


def test_what_is_compared(tmp_path, call):
    """But nothing that may decide texts, masks or validation, nor another number of steps."""
    write_log(tmp_path / "a", {0: 9.0, 20: 5.0}, data="10e" * 20, commit="c" * 40)
    base = {"data": "10e" * 20, "commit": "c" * 40}
    for settings, more, shown in (
        ({"max_steps": 20}, "1.0000 ± nan", "max_steps=20"),
        ({"commit": "d" * 40}, "1.0000 ± nan", "commit=dddddddd"),
        ({"data": "20e" * 20}, "-", "data=20e20e20"),
        ({"extra": {"epochs": 10}}, "-", "epochs=10"),
        ({"block_size": 32}, "-", "block_size=32"),
        ({"batch_size": 8, "micro_batch_size": 8}, "-", "batch_size=8 micro_batch_size=8"),
        ({"extra": {"anchor": True}}, "-", "anchor=True"),
        ({"learning_rate": 0.01, "min_lr": 1e-4}, "1.0000 ± nan", "learning_rate=0.01"),
        ({"losses": {0: 9.0, 10: 6.0}}, "-", ""),
    ):
        losses = settings.get("losses", {0: 9.0, 20: 6.0})
        write_log(tmp_path / "b", losses, **base | {k: v for k, v in settings.items() if k != "losses"})
        assert call()[1] == f"b 1 {max(losses)} 6.0000 ± nan {more} - {shown}".strip()


def test_pictures(tmp_path, call, monkeypatch):
    """Means at the steps that all seeds have, in a band of standard errors, and differences."""
    pytest.importorskip("matplotlib")
    write_log(tmp_path / "a-0", {0: 9.0, 10: 6.0, 20: 5.0, 30: 4.0}, seed=0)
    write_log(tmp_path / "a-1", {0: 9.0, 20: 5.4, 30: 4.2}, seed=1)
    write_log(tmp_path / "b-0", {0: 9.0, 30: 3.0}, n_sink=0)
    figures = {}
    monkeypatch.setattr(ablations, "write_file", lambda path, write: figures.update({path: write.__self__}))
    assert call("--plot")[-1] == f"wrote {tmp_path}/curves.png" and len(figures) == 1
    losses, differences = figures[f"{tmp_path}/curves.png"].axes
    assert [line.get_label() for line in losses.lines] == ["a", "b"]
    np.testing.assert_allclose(losses.lines[0].get_xydata(), [[20, 5.2], [30, 4.1]])
    np.testing.assert_allclose(losses.lines[1].get_xydata(), [[30, 3.0]])
    np.testing.assert_allclose(differences.lines[0].get_xydata(), [[20, 0], [30, 0]])
    np.testing.assert_allclose(differences.lines[1].get_xydata(), [[30, -1.0]])
    band = losses.collections[0].get_paths()[0].vertices.round(6)
    assert set(map(tuple, band)) == {(20, 5.0), (20, 5.4), (30, 4.0), (30, 4.2)}


def test_errors(tmp_path, call):
    with pytest.raises(ValueError, match=r"there is no .*/\*/log.jsonl; train with --out_dir="):
        call()
    write_log(tmp_path / "a", {0: 9.0}, seed=3)
    write_log(tmp_path / "a-3", {0: 9.0}, seed=3, wandb="project")
    with pytest.raises(ValueError, match="a-3/log.jsonl is a second run named a of seed 3; rename it"):
        call()
    write_log(tmp_path / "a-3", {0: 9.0}, seed=3, n_sink=2)
    with pytest.raises(ValueError, match="a-3/log.jsonl has another n_sink than others named a; rename it"):
        call()
