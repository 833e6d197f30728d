"""Any command line is a config or one clear line, never a traceback; and what every sample satisfies.

python -m pytest tests/test_properties.py
"""

import dataclasses
import typing

import torch
from conftest import VARIANTS, make_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import configurator
import eval as eval_module
import prepare_data
import sample
import sft_gsm8k
import train
from model import generate

CASES = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
CONFIGS = [train.TrainConfig, sft_gsm8k.SFTConfig, sample.SampleConfig]
CONFIGS += [eval_module.EvalConfig, prepare_data.PrepareConfig]
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # control characters, broken UTF-8
MODELS = {name: make_model(**flags) for name, flags in VARIANTS.items()}
MODELS |= {f"{name}, split": make_model(**flags, sink_attention="split") for name, flags in VARIANTS.items()}
MASK = 11  # of the tiny models


# ---- configurator


@st.composite
def command_lines(draw):
    """Keys exist or nearly do, and values are anything."""
    config_class = draw(st.sampled_from(CONFIGS))
    names = [field.name for field in dataclasses.fields(config_class)]
    numbers = st.one_of(st.floats(), st.integers(-2, 9), st.integers()).map(str)
    value = st.one_of(ANY_TEXT, numbers, st.sampled_from(["None", "True", "9" * 500, "1e999"]))
    pair = st.builds("--{}={}".format, st.one_of(st.sampled_from(names), ANY_TEXT), value)
    return config_class, draw(st.lists(st.one_of(pair, pair, ANY_TEXT), max_size=4))


@settings(max_examples=1000, **CASES)
@given(case=command_lines())
def test_any_command_line_is_a_config_or_one_line(case, capfd):
    config_class, argv = case
    assume(not {"-h", "--help"} & set(argv))
    hints = typing.get_type_hints(config_class)

    def main():
        cfg, set_by = configurator.parse(config_class, argv)
        configurator.describe(cfg, set_by)
        for name in set_by:
            assert isinstance(getattr(cfg, name), hints[name])

    capfd.readouterr()
    try:
        configurator.run(main)
    except SystemExit as stop:  # anything else is raised
        (line,) = capfd.readouterr().err.splitlines()
        assert stop.code == 2 and line.startswith("error: ") and len(line) > 20


# ---- samples


@st.composite
def sampling(draw):
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    ids = st.one_of(st.just(MASK), st.integers(0, 10))
    x = torch.tensor(draw(st.lists(ids, min_size=B * T, max_size=B * T))).view(B, T)
    x[:, 0] %= MASK  # where nothing is visible all positions are equally sure, and rounding decides
    options = {
        "steps": draw(st.integers(1, 20)),
        "temperature": draw(st.sampled_from([0.0, 0.1, 1.0, 5.0])),
        "remasking": draw(st.sampled_from(["confidence", "random"])),
        "cfg_scale": draw(st.sampled_from([0.0, 0.7])),
        "eot_id": draw(st.sampled_from([None, 3])),
    }
    if options["remasking"] == "confidence":
        options["threshold"] = draw(st.sampled_from([None, 0.2, 0.5]))
    seeds = draw(st.lists(st.integers(0, 2**32 - 1), min_size=B, max_size=B))
    return draw(st.sampled_from(sorted(MODELS))), x, options, seeds


@settings(max_examples=150, **CASES)
@given(case=sampling())
def test_what_every_sample_satisfies(case):
    """What is given stays, nothing is hidden in the end, and a row does not depend on the others."""
    variant, x, options, seeds = case
    filled, passes = generate(MODELS[variant], x, seeds=seeds, **options)
    assert torch.equal(filled[x != MASK], x[x != MASK])
    assert ((filled >= 0) & (filled < MASK)).all()
    assert torch.equal(passes > 0, (x == MASK).any(dim=1))
    assert passes.max() <= options["steps"] * (2 if options["cfg_scale"] else 1)
    for i, seed in enumerate(seeds):
        alone, passes_alone = generate(MODELS[variant], x[i : i + 1], seeds=[seed], **options)
        assert torch.equal(alone[0], filled[i]) and passes_alone == passes[i]
