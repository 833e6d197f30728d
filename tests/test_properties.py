"""Whatever is typed: a result or one clear line, never a traceback; and what every sample must satisfy. Cases drawn by hypothesis.

python -m pytest tests/test_properties.py            # 500 cases each
python -m pytest tests/test_properties.py -m slow    # absurd numbers for every numeric option of every script
"""

import dataclasses
import json
import signal
import sys
import typing

import numpy as np
import pytest
import torch
from conftest import VARIANTS, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import TINY_FLAGS

import bench
import configurator
import eval as eval_module
import prepare_data
import sample
import sft_gsm8k
import train
from model import generate
from train import save_checkpoint

CASES = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
ANY_TEXT = st.text(
    st.characters(exclude_categories=()), max_size=30
)  # control characters and broken UTF-8 as well
CONFIGS = [
    train.TrainConfig,
    sft_gsm8k.SFTConfig,
    sample.SampleConfig,
    eval_module.EvalConfig,
    prepare_data.PrepareConfig,
]


def through_run(main, capsys):
    """How a script ends: its exit code, 0 if it just returns. An error must be one line; any other exception is a traceback."""
    capsys.readouterr()
    try:
        configurator.run(main)
        return 0
    except SystemExit as stop:
        if stop.code == 2:
            error = capsys.readouterr().err
            lines = [line for line in error.splitlines() if not line.startswith("sample")]
            assert (
                lines[-1].startswith("error: ")
                and error.count("error: ") >= 1
                and len(error.split("error: ")[1].strip()) > 10
            )
            assert error.split("error: ", 1)[1].count("\n") == 1, error
        return stop.code


def kinds_of(config_class, name):
    hint = typing.get_type_hints(config_class)[name]
    return typing.get_args(hint) or (hint,)


# ---- configurator


@st.composite
def arguments(draw):
    """Command lines in which keys exist or nearly do, and values are anything."""
    config_class = draw(st.sampled_from(CONFIGS))
    names = [field.name for field in dataclasses.fields(config_class)]
    value = st.one_of(
        ANY_TEXT,
        st.floats().map(str),
        st.integers().map(str),
        st.sampled_from(["None", "True", "9" * 500, "1e999"]),
    )
    pair = st.builds(
        lambda key, value: f"--{key}={value}", st.one_of(st.sampled_from(names), ANY_TEXT), value
    )
    return config_class, draw(st.lists(st.one_of(pair, ANY_TEXT, ANY_TEXT.map("--{}".format)), max_size=4))


@settings(max_examples=800, **CASES)
@given(case=arguments())
def test_any_command_line_is_a_config_or_one_line(case, capsys):
    config_class, argv = case
    found = []
    code = through_run(lambda: found.append(configurator.parse(config_class, argv)), capsys)
    assert code in (0, 2)
    for cfg, set_by in found:
        for name in set_by:
            value = getattr(cfg, name)
            assert value is None or isinstance(value, kinds_of(config_class, name)), name
        configurator.describe(cfg, set_by)


@st.composite
def right_values(draw):
    config_class = draw(st.sampled_from(CONFIGS))
    fields = draw(
        st.lists(
            st.sampled_from(dataclasses.fields(config_class)), max_size=5, unique_by=lambda field: field.name
        )
    )
    by_kind = {
        bool: st.booleans(),
        int: st.integers(-(2**63) + 2**10, 2**63 - 2**10),
        float: st.floats(allow_nan=False),
        str: st.text(st.characters(exclude_characters="\0"), max_size=20).filter(lambda text: text != "None"),
        type(None): st.none(),
    }
    return config_class, {
        f.name: draw(st.one_of(*(by_kind[k] for k in kinds_of(config_class, f.name)))) for f in fields
    }


@settings(max_examples=500, **CASES)
@given(case=right_values())
def test_what_is_set_is_what_is_read(case, tmp_path_factory):
    """From the command line and from a file: the same value, of the same type."""
    config_class, values = case
    plain = dataclasses.make_dataclass(
        "Plain", [(f.name, f.type, f.default) for f in dataclasses.fields(config_class)]
    )
    plain.__module__ = config_class.__module__
    path = tmp_path_factory.getbasetemp() / "drawn.py"
    path.write_text("\n".join(f"{key} = float({str(value)!r})" if isinstance(value, float) else f"{key} = {value!r}" for key, value in values.items()), encoding="utf-8")  # fmt: skip # noqa: E501
    for argv in ([f"--{key}={value}" for key, value in values.items()], [str(path)]):
        cfg, set_by = configurator.parse(plain, argv)
        assert set_by.keys() == values.keys()
        for key, value in values.items():
            found = getattr(cfg, key)
            assert found == value and type(found) is type(value), key


# ---- samples

MODELS = {name: make_model(**flags) for name, flags in VARIANTS.items()}
MODELS |= {f"{name}, split": make_model(**flags, sink_attention="split") for name, flags in VARIANTS.items()}
MASK = 11


@st.composite
def sampling(draw):
    T = draw(st.integers(1, 16))
    ids = st.one_of(st.just(MASK), st.integers(0, 10))
    rows = draw(st.lists(st.lists(ids, min_size=T, max_size=T), min_size=1, max_size=4))
    for row in rows:
        row[0] = row[0] % MASK  # where nothing is visible all places are equally sure, and rounding decides
    options = {
        "steps": draw(st.integers(1, 20)),
        "temperature": draw(st.sampled_from([0.0, 0.1, 1.0, 5.0])),
        "remasking": draw(st.sampled_from(["confidence", "random"])),
        "cfg_scale": draw(st.sampled_from([0.0, 0.7])),
        "eot_id": draw(st.sampled_from([None, 3])),
    }
    if options["remasking"] == "confidence":
        options["threshold"] = draw(st.sampled_from([None, 0.2, 0.5]))
        options["block_length"] = draw(st.sampled_from([None, 1, 3, 8]))
        options["prefix_cache"] = (
            draw(st.booleans()) and options["block_length"] is not None and not options["cfg_scale"]
        )
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(1, T), min_size=len(rows), max_size=len(rows))))
    seeds = draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(rows), max_size=len(rows)))
    return draw(st.sampled_from(sorted(MODELS))), torch.tensor(rows), options, lengths, seeds


@settings(max_examples=500, **CASES)
@given(case=sampling())
def test_what_every_sample_satisfies(case):
    """What is given stays, nothing is hidden in the end, every id is a token, and a row does not depend on the others."""
    variant, x, options, lengths, seeds = case
    model = MODELS[variant]
    for row, length in zip(x, lengths or []):
        row[length:] = 0  # padding: any token
    where = {"lengths": torch.tensor(lengths)} if lengths else {}
    filled, n_forward = generate(model, x, seeds=seeds, **options, **where)
    given_places = x != MASK
    assert torch.equal(filled[given_places], x[given_places]) and ((filled >= 0) & (filled < MASK)).all()
    passes = (
        2 if options["cfg_scale"] else len(x) if options.get("prefix_cache") else 1
    )  # rows in other blocks wait for each other
    assert n_forward <= options["steps"] * passes and (n_forward > 0) == bool((x == MASK).any())
    for i in range(len(x)):
        T = lengths[i] if lengths else x.size(1)
        alone, _ = generate(model, x[i : i + 1, :T], seeds=seeds[i : i + 1], **options)
        assert torch.equal(alone[0], filled[i, :T])


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """A checkpoint of an untrained model over bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    model = make_model(vocab_size=257, block_size=32)
    spec = {"name": "bytes", "pattern": prepare_data.PATTERN, "vocab_size": 257}
    meta = {"tokenizer": spec, "eot_id": 256, "documents": 9, "name": "text", "sha256": {}}
    checkpoint = {
        "model": model.state_dict(),
        "model_config": vars(model.config),
        "meta": meta,
        "step": 0,
        "run_config": {},
    }
    save_checkpoint(folder / "ckpt.pt", checkpoint)
    return folder


PROMPTS = st.lists(
    st.one_of(
        ANY_TEXT,
        st.integers(-3, 10**25).map("[MASK:{}]".format),
        st.sampled_from(["[MASK]", "<|endoftext|>", "[MASK:0]"]),
    ),
    max_size=3,
).map("".join)


@settings(max_examples=500, **CASES)
@given(prompt=PROMPTS, asks=st.booleans(), show=st.booleans())
def test_any_prompt_is_answered_or_refused_in_one_line(out_dir, capsys, prompt, asks, show):
    key = "question" if asks else "prompt"
    argv = [
        "sample.py",
        f"--out_dir={out_dir}",
        "--device=cpu",
        "--num_samples=1",
        "--steps=2",
        f"--{key}={prompt}",
        f"--show={show}",
    ]
    before, sys.argv = sys.argv, argv
    try:
        assert through_run(sample.main, capsys) in (0, 2)
    finally:
        sys.argv = before


# ---- absurd numbers


NUMBERS = ["-1", "0", "1", str(2**62), "1e12", "1e30", "-1e30", "nan", "inf", "9" * 400]
SCRIPTS = {
    "train": (train, train.TrainConfig, [*TINY_FLAGS]),
    "sft": (sft_gsm8k, sft_gsm8k.SFTConfig, [*TINY_FLAGS, "--dataset=arithmetic", "--block_size=48"]),
    "sample": (sample, sample.SampleConfig, ["--device=cpu", "--num_samples=2", "--steps=4"]),
    "loss": (eval_module, eval_module.EvalConfig, ["--device=cpu", "--task=loss", "--limit=8", "--mc_num=2"]),
    "sinks": (eval_module, eval_module.EvalConfig, ["--device=cpu", "--task=sinks", "--limit=2"]),
    "gsm8k": (eval_module, eval_module.EvalConfig, ["--device=cpu", "--task=gsm8k", "--limit=3"]),
    "file": (eval_module, eval_module.EvalConfig, ["--device=cpu"]),
    "prepare": (prepare_data, prepare_data.PrepareConfig, ["arithmetic", "--num_problems=50"]),
    "bench": (bench, bench.BenchConfig, ["eval", "--n_seeds=2", "--mc_num=2", "--device=cpu"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_absurd_numbers(name, data_dir, tmp_path, monkeypatch, capsys):
    """Each works or is refused in one line. What would run for ever (10^12 steps) is stopped by Ctrl-C after some seconds."""
    module, config_class, flags = SCRIPTS[name]
    trained = tmp_path / "trained"
    monkeypatch.setattr(
        sys, "argv", ["train.py", *TINY_FLAGS, f"--data_dir={data_dir}", f"--out_dir={trained}"]
    )
    train.main()
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"context": "Tom has", "choices": ["3", "4 5"], "gold": 0}) + "\n"
    )
    flags = flags + {
        "file": [f"--task={tmp_path / 'c.jsonl'}"],
        "bench": [f"--data={tmp_path / 'c.jsonl'}"],
    }.get(name, [])
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))

    def main():
        signal.setitimer(signal.ITIMER_REAL, 1.5, 0.7)  # and again: an endless step takes a second Ctrl-C
        try:
            module.main()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    codes = []
    for field in dataclasses.fields(config_class):
        if not {int, float} & set(kinds_of(config_class, field.name)):
            continue
        for number in NUMBERS:
            out_dir = trained if module in (sample, eval_module, bench) else tmp_path / f"out-{len(codes)}"
            place = [f"--out_dir={out_dir}"] if name != "prepare" else []
            place += (
                [f"--data_dir={tmp_path / 'd' if name == 'prepare' else data_dir}"]
                if hasattr(config_class, "data_dir")
                else []
            )
            # of fine-tuning's two lengths the one on trial counts
            own = [flag for flag in flags if not (field.name == "epochs" and "max_steps" in flag)]
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *own, *place, f"--{field.name}={number}"])
            codes.append(through_run(main, capsys))
            assert codes[-1] in (0, 2, 130), (field.name, number)
    signal.signal(signal.SIGALRM, before)
    assert codes.count(2) > len(codes) / 3 and codes.count(0) > 3
    assert np.isfinite(
        sum(tensor.double().sum().item() for tensor in torch.load(trained / "ckpt.pt")["model"].values())
    )
