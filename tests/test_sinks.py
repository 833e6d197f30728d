"""extras/sinks.py: attention recomputed, sinks followed through trajectories, changed sinks, pictures."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, save_model

from assets import moving_sink
from extras import sinks
from extras.sinks import CHANGES, Run, SinksConfig, attention_at_steps, attention_maps, change_sinks, follow
from model import generate, seed_for
from sft_gsm8k import SFTConfig
from train import TrainConfig, bound_and_error, load_meta, spread_levels, validate

# ---------- Attention, recomputed


def texts(n=3):
    return torch.randint(0, 12, (n, 16), generator=torch.Generator().manual_seed(0))  # [MASK] is 11


@pytest.mark.parametrize("n_kv_head", [2, 1])
@pytest.mark.parametrize("sink_attention", ["mask", "split"])
def test_attention_is_that_of_sdpa(variant, sink_attention, n_kv_head, monkeypatch):
    """A plain softmax of the q and k that SDPA got; with v it gives what that gave."""
    calls, real = [], F.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **options):
        calls.append((*args, attn_mask, real(*args, attn_mask=attn_mask, **options)))
        return calls[-1][-1]

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = make_model(**variant, sink_attention=sink_attention, n_kv_head=n_kv_head)
    layers, n_sink = list(attention_maps(model, texts())), model.config.n_sink
    assert len(layers) == len(calls) == 2
    for (weights, norms), (q, k, v, attn_mask, output) in zip(layers, calls):
        torch.testing.assert_close(norms, (v**2).sum(dim=-1).sqrt().mean(dim=1))
        k, v = k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1)
        exponentials = torch.einsum("bhqd,bhkd->bhqk", q, k).div(math.sqrt(8)).exp()
        exponentials = exponentials if attn_mask is None else exponentials * attn_mask
        rows = weights[:, :, -q.size(2) :]  # split: the content queries alone
        torch.testing.assert_close(rows, exponentials / exponentials.sum(dim=-1, keepdim=True))
        torch.testing.assert_close(rows @ v, output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, 16 + n_sink))
        alone = (weights[:, :, :n_sink] == torch.eye(16 + n_sink)[:n_sink]).all()  # a sink sees itself alone
        assert alone or "sink_attends_all" in variant


def test_another_attention_is_refused(monkeypatch):
    sdpa = F.scaled_dot_product_attention
    half = lambda *args, **options: sdpa(*args, **options) / 2  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", half)
    with pytest.raises(ValueError, match="does not compute softmax.*; change attention_maps too"):
        list(attention_maps(make_model(n_sink=1), texts()))


KNOWN = [
    ({"n_sink": 0}, [2, 2, 1, 3], [2, 2, 1, 3]),
    ({"n_sink": 1}, [0, 0, 3, 0], [-1, -1, 2, -1]),  # row 0 is the sink
    ({"n_sink": 1, "sink_position": "end"}, [0, 0, 3, 0], [4, 4, 2, 4]),
    ({"n_sink": 2, "sink_position": "end"}, [0, 1, 4, 1], [4, 4, 2, 4]),  # from sink to sink nothing moves
]


@pytest.mark.parametrize("flags, at, positions", KNOWN)
def test_a_known_sink_is_followed(flags, at, positions, monkeypatch):
    """At step s, row at[s] gets 9 times as much as any other in one head, 4 times in the other."""
    model = make_model(block_size=4, vocab_size=5, n_layer=1, n_embd=8, **flags)
    model.rope_cos.fill_(1), model.rope_sin.zero_()  # no rotation
    n, S = model.config.n_sink, 4 + model.config.n_sink
    q, k, v = torch.zeros(3, 4, S, 2, 4)  # (steps, S, H, d) each
    q[..., 1] = math.sqrt(4)
    v[..., 0, 2], v[..., 1, 3] = 12 + 2 * torch.arange(S), -8  # of those rows: norms 5 and 1
    for step, row in enumerate(at):
        k[step, row, 0, 1], k[step, row, 1, 1] = math.log(9), math.log(4)
        v[step, row] = torch.tensor([[3.0, 0, 4, 0], [0, -1, 0, 0]])
    qkv = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), dim=2)
    monkeypatch.setattr(model.blocks[0].attn.qkv, "forward", lambda x: qkv)
    hidden = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    mass, norms, rate = attention_at_steps(model, torch.where(hidden, 5, 1), 0.6)
    values = follow(mass[0], norms[0], rate[0], model.config)

    assert values["position"] == positions and values["moves"] == [0, 1, 1]
    assert (attention_at_steps(model, torch.where(hidden, 5, 1), 0.3)[2] == 1).all()
    assert values.get("content_moves", [0, 1, 1]) == [0, 1, 1]  # while the sink is on top, content is even
    assert values["heads"] == [0.5] * 4  # 9 / (8 + S) is above the threshold, 4 / (3 + S) is not
    for step, row in enumerate(at):
        shares = [np.where(np.arange(S) == row, factor, 1) / (factor + S - 1) for factor in (9, 4)]
        shares = (shares[0] + shares[1]) / 2
        row_norms = np.where(np.arange(S) == row, 3, 10 + np.arange(S))  # means over heads
        wanted = {"top": shares[row] * S, "norm": 3 / np.median(np.delete(row_norms, row))}
        if n:
            wanted |= {"sink": sum(shares[:n]) * S / n, "on_sink": float(row < n)}
        of_all_steps = {"position", "moves", "heads"} | ({"content_moves"} if n else set())
        assert {*of_all_steps, *wanted} == values.keys()
        assert {key: values[key][step] for key in wanted} == pytest.approx(wanted, abs=1e-5)


def test_summary():
    """Two prompts of one layer: means over steps, then over prompts. The second is written in one step."""
    first = {"position": [3, 4, 4], "top": [0.5, 0.7, 0.9], "moves": [0, 1]}
    second = {"position": [2], "top": [0.3], "moves": []}
    (layer,) = sinks.summarize([{"layers": [first]}, {"layers": [second]}])
    for key, a, b in (("top", 0.7, 0.3), ("moves", 0.5, 0)):
        wanted = (a + b) / 2, abs(a - b) / 2  # a standard deviation of |a - b| / sqrt(2), over sqrt(2)
        assert (layer[key], layer[f"{key}_se"]) == pytest.approx(wanted)


# ---------- Trajectories


def save(folder, data_dir, config=None, **flags):
    """A checkpoint of random weights on the built-in problems. Returns the folder."""
    meta = load_meta(data_dir / "arithmetic")
    model = make_model(**{"vocab_size": meta["vocab_size"], "block_size": 24, **flags})
    config = config or TrainConfig(block_size=model.config.block_size)
    data = {"dataset": "arithmetic", "data_dir": str(data_dir), "eval_seqs": 9}
    return save_model(folder, model, meta, **asdict(config) | data)


@pytest.fixture
def folder(data_dir):
    """The checkpoint of a model with a sink; a vanilla one is beside it."""
    save(data_dir.parent / "vanilla", data_dir, n_sink=0)
    return save(data_dir.parent / "sink", data_dir, n_sink=1)


OPTIONS = [{"steps": 5}, {"prompt_length": 0}, {"remasking": "random", "temperature": 1.0, "steps": 9}]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_states_are_those_of_the_sampler(folder, options, monkeypatch):
    """What is looked at is what the model saw while it wrote, and what the file says."""
    cfg, seen = SinksConfig(limit=4, seed=7, **options), []
    run, seeds = Run(str(folder), cfg, "cpu"), [seed_for(7, index) for index in range(4)]
    model, mask_id, trunk = run.model, run.model.config.mask_id, run.model.trunk
    x = torch.where(run.hidden, mask_id, run.x0)
    assert (x == mask_id).sum(dim=1).tolist() == [24 - options.get("prompt_length", 24 // 4)] * 4
    sinks.look_at(run, cfg)
    mass, norms, rate = attention_at_steps(model, run.states, cfg.head_threshold)
    for layer, (weights, wanted) in enumerate(attention_maps(model, run.states)):  # all states together
        np.testing.assert_allclose(mass[layer], weights[:, :, 1:].mean(dim=(1, 2)), atol=1e-6)
        np.testing.assert_allclose(norms[layer], wanted, atol=1e-5)
        values = follow(mass[layer], norms[layer], rate[layer], model.config)
        assert run.prompts[0]["layers"][layer] == values
    written, _ = generate(model, x, cfg.steps, cfg.temperature, cfg.remasking, seeds=seeds)
    assert [prompt["tokens"] for prompt in run.prompts] == written.tolist()
    monkeypatch.setattr(model, "trunk", lambda xt: seen.append(xt) or trunk(xt))
    generate(model, x[:1], cfg.steps, cfg.temperature, cfg.remasking, seeds=seeds[:1])
    assert torch.equal(run.states, torch.cat(seen))
    hidden = torch.arange(len(seen))[:, None] < torch.tensor(run.prompts[0]["steps"])
    assert torch.equal(run.states, torch.where(hidden, mask_id, written[0]))


def test_the_prompt_of_a_fine_tuned_model_is_the_question(data_dir, tmp_path):
    """Not a quarter, which would be longer: the whole response is hidden, in both stages, and no more."""
    config = SFTConfig(block_size=160, init_from="scratch")
    run = Run(str(save(tmp_path / "sft", data_dir, config, block_size=160)), SinksConfig(limit=6), "cpu")
    assert (~run.hidden[:3]).sum(dim=1).max() < 40
    for index, (x0, hidden) in enumerate(zip(run.x0, run.hidden)):
        given, response = (run.tokenizer.decode(x0[part].tolist()).strip() for part in (~hidden, hidden))
        assert given.startswith("Question:") and ("Answer:" in given) == (index >= 3)
        assert response.startswith("####" if index >= 3 else "Answer:")


# ---------- The command


@pytest.fixture
def call(call_main):
    return lambda *argv: call_main(sinks, *argv, "--device=cpu")


def test_the_table(capsys):
    """Two runs side by side, of which one has no sink."""
    layer = {"top": 2.04, "top_se": 0.16, "moves": 0.5, "moves_se": 0.25, "norm": 0.1, "norm_se": 0}
    layer |= {"heads": 1, "heads_se": 0}
    with_sink = layer | {"sink": 30, "sink_se": 1}
    runs = [SimpleNamespace(name="a", layers=[with_sink]), SimpleNamespace(name="b", layers=[layer])]
    sinks.print_table(runs)
    *_, head, _, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["top", "moves", "norm", "sink", "heads", "top", "moves", "norm", "heads"]
    cells = ["2.0±0.2", "50±25", "0.1±0.0"]
    assert row.split() == ["0", *cells, "30.0±1.0", "100±0", *cells, "100±0"]


def test_the_command(folder, call, monkeypatch, tmp_path):
    """What it prints and writes, of three runs: two side by side, a third below. No TF32."""
    precisions, real = set(), sinks.attention_at_steps
    spy = lambda *args: precisions.add(torch.get_float32_matmul_precision()) or real(*args)  # noqa: E731
    monkeypatch.setattr(sinks, "attention_at_steps", spy)
    monkeypatch.chdir(tmp_path)
    options = ["--limit=3", "--prompt_length=8", "--steps=4", "--head_threshold=0.06", "--json"]
    lines, vanilla = call("sink/ckpt.pt", "vanilla", "vanilla", *options), f"{tmp_path.name}-vanilla"
    file = json.loads((tmp_path / f"out/sinks/sink-ckpt.pt+{vanilla}+{vanilla}/sinks.json").read_text())
    assert file["settings"]["steps"] == 4 and precisions == {"highest"}
    assert [(run["n_sink"], run["step"]) for run in file["runs"]] == [(1, 3), (0, 3), (0, 3)]
    for run in file["runs"]:
        assert run["layers"] == sinks.summarize(run["prompts"]) and len(run["prompts"]) == 3
    assert sum(line.startswith("layer ") for line in lines) == 2
    assert any("more than 0.06 of the attention" in line for line in lines)


def test_the_sentence():
    layers = [{"on_sink": 0.4, "moves": 0.214}, {"on_sink": 0.986, "moves": 0.01}, {"on_sink": 1, "moves": 0}]
    said = sinks.sentence(SimpleNamespace(name="out/a", prompts=[0] * 16, layers=layers))
    assert "in layers 1, 2 a sink token gets the most attention at 99 to 100 % of the steps" in said
    assert "in layer 0 the position with the most attention changes at 21 % of the steps" in said


REFUSED = [
    ([], "no run is named; wanted: python -m extras.sinks"),
    (["nowhere"], "no checkpoint at nowhere"),
    (["{sink}", "--prompt_length=24"], "prompt_length 24 leaves .*sink nothing to write"),
    (["{sink}", "{vanilla}", "--layer=2"], "layer is 2; the layers are 0 to 1"),
    (["{vanilla}", "--changes=True"], "no sinks to change in .*vanilla"),
    (["{sink}", "{other}"], "other has other texts or layers than .*sink; look at it alone"),
]


@pytest.mark.parametrize("argv, message", REFUSED)
def test_refusals(folder, data_dir, argv, message, call):
    names = {"sink": folder, "vanilla": folder.parent / "vanilla", "other": folder.parent / "other"}
    save(names["other"], data_dir, block_size=23)
    with pytest.raises(ValueError, match=message):
        call(*(arg.format(**names) for arg in argv))


# ---------- Changed sinks

SETTINGS = {"none": {}, "zero values": {"sink_zero_value": True}, "removed": {"n_sink": 0}}


def changed_by_hand(model, **setting):
    changed = make_model(**asdict(model.config) | setting)
    changed.load_state_dict(model.state_dict(), strict=changed.config.n_sink > 0)
    return changed


@pytest.mark.parametrize("position, other", [("front", "end"), ("end", "front")])
def test_changed_sinks(position, other):
    """Each change is what it says, changes what the model says, and leaves the model itself alone."""
    model = make_model(n_sink=2, sink_position=position).requires_grad_(False)
    model.sink[1] *= 3  # each sink has a norm of its own
    before = model(texts())
    for change, setting in {**SETTINGS, "other end": {"sink_position": other}}.items():
        logits = change_sinks(model, change, 5)(texts())
        torch.testing.assert_close(logits, changed_by_hand(model, **setting)(texts()))
        assert ((logits - before).abs().max() > 1e-3) == (change != "none")
    noisy = [change_sinks(model, change, 5) for change in CHANGES if change.startswith("noise")]
    noisy.append(change_sinks(model, "noise 1", 6))
    assert len({str(changed.sink) for changed in noisy}) == 4
    for changed in noisy:
        torch.testing.assert_close(changed.sink.norm(dim=1), model.sink.norm(dim=1))
        assert F.cosine_similarity(changed.sink, model.sink).abs().max() < 0.95
        changed.sink.data = model.sink.clone()
        assert torch.equal(changed(texts()), before)  # nothing else differs
    assert torch.equal(model(texts()), before)


def test_bounds_of_changed_sinks(folder, call):
    """Those of train.validate on 9 sequences, with a model changed by hand."""
    vanilla = folder.parent / "vanilla"
    options = ["--changes", "--mc_num=3", "--steps=1", "--json", f"--to={folder}"]
    lines = call(vanilla, folder, "--limit=2", *options)
    no_rows, rows = (run["changes"] for run in json.loads((folder / "sinks.json").read_text())["runs"])
    assert no_rows is None and [row["change"] for row in rows] == CHANGES
    run, nats = Run(str(folder), SinksConfig(), "cpu"), {}
    get_batch, *_ = sinks.validation(run.checkpoint, None, 9)
    for change, setting in SETTINGS.items():
        model, row = changed_by_hand(run.model, **setting), rows[CHANGES.index(change)]
        bound, bound_se, nats[change], _ = validate(model, get_batch, 16, 9, mc_num=3)
        more = (nats[change] - nats["none"]).numpy() / 24
        more_se = bound_and_error(torch.from_numpy(more), torch.ones(9), spread_levels(9))[1]
        wanted = {"bound": bound, "bound_se": bound_se, "more": more.mean(), "more_se": more_se}
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-9)
        assert "{change} {bound:.4f} ± {bound_se:.4f} {more:.4f} ± {more_se:.4f}".format(**row) in lines


# ---------- Pictures


def test_pictures(folder, call, monkeypatch):
    """Without --layer the map is of the layer in which the sink token gets the most."""
    pytest.importorskip("matplotlib")
    layers, real = [], sinks.draw_maps
    monkeypatch.setattr(sinks, "draw_maps", lambda *args: layers.append(args[2]) or real(*args))
    monkeypatch.chdir(folder.parent)
    for options in ([], ["--layer=0", "--to=there"]):
        call(folder, "vanilla", "--limit=2", "--plot", *options)
    run = Run(str(folder), SinksConfig(limit=2), "cpu")
    sinks.look_at(run, SinksConfig())
    shares = [layer["sink"] for layer in run.layers]
    assert layers == [int(np.argmax(shares)), 0] and abs(np.diff(shares)) > 0.01
    here = folder.parent.name
    for path in (f"out/sinks/{here}-sink+{here}-vanilla", "there"):
        for name in ("maps", "paths"):
            assert (folder.parent / path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("sink", [-1, 3])
def test_what_the_animation_shows(sink, tmp_path, call_main):
    """A token is shown from the step on that writes it. The marker is over the position that gets most."""
    layer = {"position": [sink, 2, 2], "moves": [1, 0], "top": [2.0, 2.0, 1.0]}
    prompt = {"tokens": [5, 6, 7], "texts": ["<", " b", "\n"], "steps": [0, 1, 3], "layers": [{}, layer]}
    run = {"title": "with a sink token", "n_sink": 1, "prompts": [prompt], "layers": [{}, {}]}
    (tmp_path / "sinks.json").write_text(json.dumps({"runs": [run, run]}))
    svg = tmp_path / "moving.svg"
    call_main(moving_sink, f"--file={tmp_path}/sinks.json", "--layer=1", f"--to={svg}")
    root = ElementTree.parse(svg).getroot()
    svg_tags = ["{http://www.w3.org/2000/svg}" + tag for tag in ("rect", "text", "path")]
    rects, texts, markers = map(root.findall, svg_tags)
    boxes, bars = [box for box in rects if box.get("rx")], [box for box in rects if box.get("class") == "bar"]
    shown = [text for text in texts if not text.get("class")]
    assert len(boxes) == len(shown) == 8 and len(bars) == len(markers) == 2  # of two runs

    def steps_of(animation):
        steps = [round(float(time) * 7 / 6 * 3) for time in animation.get("keyTimes").split(";")]
        return dict(zip(steps, animation.get("values").split(";"), strict=True))

    assert [text.text for text in shown[:4]] == ["sink", "<", "b", "␣"]
    assert [steps_of(text[0]) for text in shown[2:4]] == [{0: "0", 1: "1"}, {0: "0", 3: "1"}]
    assert [list(steps_of(box[0])) for box in boxes[2:4]] == [[0, 1, 2], [0, 3]]
    assert steps_of(bars[0][0]) == {0: "50", 2: "25"} and bars[0].get("width") == "25"  # percent
    above = [f"{int(box.get('x')) + int(box.get('width')) // 2},{int(box.get('y')) - 3}" for box in boxes]
    assert steps_of(markers[0][0]) == {0: above[0], 1: above[3]}


def test_what_the_pictures_show(folder):
    Figure = pytest.importorskip("matplotlib.figure").Figure
    runs = [Run(str(path), SinksConfig(limit=2), "cpu") for path in (folder, folder.parent / "vanilla")]
    for run in runs:
        sinks.look_at(run, SinksConfig())
    maps = sinks.draw_maps(Figure, runs, 1).axes
    paths = sinks.draw_paths(Figure, runs).axes
    for column, run in enumerate(runs):
        states, n = run.states, run.model.config.n_sink
        hidden = (states == run.model.config.mask_id).numpy()
        title = "with a sink token" if n else "without a sink token"
        for row, step in enumerate((2, 15)):  # of the 18 steps 0 to 17
            _, (weights, _) = attention_maps(run.model, states[step : step + 1])
            wanted, panel = weights[0, :, n:].mean(dim=0).clip(0.1 / 24), maps[2 * row + column]
            content, *sink, strip = (image.get_array() for image in panel.images)
            np.testing.assert_allclose(np.hstack((*sink, content)), wanted, atol=1e-6)
            assert np.array_equal(strip, hidden[step : step + 1])
            assert panel.get_title() == f"{title}\nlayer 1, step {step + 1} of 18"
        for layer, values in enumerate(run.prompts[0]["layers"]):
            panel = paths[2 * layer + column]
            wanted = [-3 if position == -1 else position for position in values["position"]]
            assert panel.lines[0].get_ydata().tolist() == wanted
            assert np.array_equal(panel.images[0].get_array(), hidden.T)
