"""Where attention goes while a text is denoised, with and without a sink token (the paper, 4.4 and A.3).

    python -m extras.sinks out/arithmetic out/arithmetic-vanilla             # a table, runs side by side
    python -m extras.sinks out/arithmetic out/arithmetic-vanilla --plot      # and two pictures
    python -m extras.sinks out/arithmetic --changes                          # the loss with other sinks

Each model fills in the hidden tokens of the same validation texts. At every step, attention is recomputed
in every layer from q and k, because scaled_dot_product_attention does not return its weights. The script
follows the position that gets the most attention."""

import copy
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import configurator
from eval import validation
from model import generate, seed_for, sink_mask
from sample import load_trained, readable
from sft_gsm8k import is_fine_tuned
from train import bound_and_error, made_by, setup_distributed, spread_levels, validate, write_file

COLUMNS = {  # of the table: unit, meaning
    "top": ("x even", "attention to the position that gets the most; an even share is 1"),
    "moves": ("% steps", "steps at which another position than before gets the most"),
    "norm": ("x median", "norm of that position's value vector; 1 is the median of the others"),
    "sink": ("x even", "attention to the sink token, or to each of several"),
    "heads": ("% heads", "heads in which one position gets more than {} of the attention: the sink rate"),
}


@dataclass
class SinksConfig:
    limit: int = 16  # texts, at least 2: validation sequences, evenly spread
    prompt_length: int | None = None  # tokens given of each; None: a quarter, or the question (sft_gsm8k.py)
    steps: int = 256  # denoising steps; a text needs no more than it has hidden tokens
    temperature: float = 0.1  # 0: the likeliest token; 1: the model's distribution
    remasking: str = "confidence"  # confidence, or random: the exact reverse process
    head_threshold: float = 0.3  # a head has a sink if one position gets more of its attention than this
    json: bool = False  # write sinks.json: all settings, and the numbers of every text, layer and step
    plot: bool = False  # draw maps.png and paths.png; needs matplotlib
    to: str | None = None  # folder of these files; None: out/sinks/ and the names of the runs
    layer: int | None = None  # of maps.png; None: where the sink token gets most
    changes: bool = False  # the validation loss with changed sinks, on the sequences used in training
    mc_num: int = 8  # with changes: random maskings of each sequence
    data: str | None = None  # a prepared folder; None: the data of training
    seed: int = 0  # of the random draws
    device: str = "auto"  # auto: cuda, else mps, else cpu


class Run:
    """A trained model, and the texts that take_texts gives it. look_at adds prompts, layers and states."""

    def __init__(self, name, cfg, device):
        self.name = name
        self.model, self.tokenizer, self.checkpoint = load_trained(name, device)
        n, word = self.model.config.n_sink, "register" if self.model.config.sink_attends_all else "sink token"
        self.title = {0: "without a sink token", 1: f"with a {word}"}.get(n, f"with {n} {word}s")
        self.take_texts(cfg)

    def take_texts(self, cfg):
        """Sets x0 and maskable of the validation sequences, and hidden, the tokens that are to be written:
        (n, T) each. Raises ValueError if a text has none."""
        get_batch, n, _ = validation(self.checkpoint, cfg.data, cfg.limit)
        B = self.checkpoint["run_config"]["micro_batch_size"]
        batches = [get_batch("val", index) for index in range(math.ceil(n / B))]
        self.x0, self.maskable = (torch.cat(tensors)[:n] for tensors in zip(*batches))
        T, length = self.x0.size(1), cfg.prompt_length
        if length is None:  # the question of a fine-tuned model is not maskable
            length = 0 if is_fine_tuned(self.checkpoint) else T // 4
        self.hidden = self.maskable & (torch.arange(T) >= length)
        if not self.hidden.any(dim=1).all():
            raise ValueError(f"prompt_length {length} leaves {self.name} nothing to write; lower it")


@torch.no_grad()
def attention_maps(model, xt):
    """Yields for each layer the attention weights (B, H, S, S), a row for each query, and the L2 norms of the
    value vectors (B, S), means over heads. xt is (B, T), and the sinks are the first of the S positions.
    Raises ValueError if the weights do not give the output of the layer, as after a change of model.py."""
    config, device, calls = model.config, model.wte.weight.device, []
    hooks = [block.attn.register_forward_hook(lambda *call: calls.append(call)) for block in model.blocks]
    model.trunk(xt.to(device))
    for hook in hooks:
        hook.remove()
    S = config.n_sink + xt.size(1)
    may_attend = sink_mask(S, 0 if config.sink_attends_all else config.n_sink).to(device)
    for layer, (x, cos, sin, _), output in calls:  # as in Attention.forward
        q, k, v = layer.heads(x, cos, sin)
        k, values = (t.repeat_interleave(config.n_head // config.n_kv_head, dim=1) for t in (k, v))  # as q
        scores = q @ k.transpose(2, 3) / math.sqrt(q.size(-1))
        weights = scores.masked_fill(~may_attend, -math.inf).softmax(dim=-1)
        norms = v.norm(dim=-1).mean(dim=1)
        y = (weights[:1] @ values[:1]).transpose(1, 2).flatten(2)  # of the first text
        y = layer.proj(y if layer.gate is None else y * torch.sigmoid(layer.gate(x[:1])))
        if (y - output[:1]).abs().max() > 1e-3 * output.abs().max():
            raise ValueError("a layer does not compute softmax(q k / sqrt(d)) v; change attention_maps too")
        yield weights, norms


def attention_at_steps(model, states, threshold):
    """Three arrays for the states (steps, T) of a text: the attention that each key gets, mean over heads and
    content queries, and the norms of the value vectors, both (n_layer, steps, S); and the sink rate (n_layer,
    steps): the share of heads in which some key gets more than the threshold (arXiv 2410.10781)."""
    parts = []
    for xt in states.split(8):  # so that the weights fit into memory
        layers = []
        for weights, norms in attention_maps(model, xt):
            by_head = weights[:, :, model.config.n_sink :].mean(dim=2)  # (steps, H, S)
            rate = (by_head.amax(dim=2) > threshold).float().mean(dim=1)
            layers.append((by_head.mean(dim=1).cpu(), norms.cpu(), rate.cpu()))
        parts.append([torch.stack(tensors) for tensors in zip(*layers)])
    return [torch.cat(tensors, dim=1).double().numpy() for tensors in zip(*parts)]


def follow(mass, norms, rate, config):
    """The position that gets the most attention in one layer, and COLUMNS: {name: a number for each step}.

    mass, norms (steps, S) and rate (steps,) are of attention_at_steps. Content has the positions 0, 1, ...; a
    sink -1 in front or T at the end. Of several sinks each competes alone, and from one to another is no
    move. on_sink: a sink gets the most. content_moves: moves of the content position that gets the most."""
    n_sink, (steps, S) = config.n_sink, mass.shape
    positions = np.arange(S) - n_sink
    positions[:n_sink] = -1 if config.sink_position == "front" else S - n_sink
    every, top = np.arange(steps), mass.argmax(axis=1)
    others = np.where(np.arange(S) == top[:, None], np.nan, norms)
    values = {
        "position": positions[top],
        "top": mass[every, top] * S,
        "moves": np.diff(positions[top]) != 0,  # since the step before: one value less
        "norm": norms[every, top] / np.nanmedian(others, axis=1),
        "heads": rate,
    }
    if n_sink:
        values |= {"sink": mass[:, :n_sink].mean(axis=1) * S, "on_sink": top < n_sink}
        values |= {"content_moves": np.diff(mass[:, n_sink:].argmax(axis=1)) != 0}
    return {key: np.round(array.astype(float), 6).tolist() for key, array in values.items()}


def summarize(prompts):
    """For each layer means over steps, then means over texts with their standard errors."""
    layers = []
    for records in zip(*(prompt["layers"] for prompt in prompts)):
        layer = {}
        for key in [key for key in records[0] if key != "position"]:
            averages = [np.mean(record[key] or [0]) for record in records]  # one step has no moves
            layer[key] = float(np.mean(averages))
            layer[f"{key}_se"] = float(np.std(averages, ddof=1) / math.sqrt(len(averages)))
        layers.append(layer)
    return layers


def look_at(run, cfg):
    """Writes the texts. run.prompts has what the file gets of each, run.layers the averages of each layer,
    run.states (steps, T) the first text before each step."""
    run.prompts, config = [], run.model.config
    for index in tqdm(range(len(run.x0)), desc=run.name, unit="text", disable=None):
        x = torch.where(run.hidden[index], config.mask_id, run.x0[index])[None]
        states, rule = [x], (cfg.steps, cfg.temperature, cfg.remasking)
        generate(run.model, x, *rule, seeds=[seed_for(cfg.seed, index)], on_step=states.append)
        states, text = torch.cat(states[:-1]), states[-1][0]
        by_layer = zip(*attention_at_steps(run.model, states, cfg.head_threshold))
        layers = [follow(*arrays, config) for arrays in by_layer]
        steps = (states == config.mask_id).sum(dim=0).tolist()  # each is hidden in the first so many states
        texts = [readable(run.tokenizer, token) for token in text.tolist()]
        run.prompts.append({"tokens": text.tolist(), "texts": texts, "steps": steps, "layers": layers})
        if index == 0:
            run.states = states
    run.layers = summarize(run.prompts)


def print_table(runs):
    """A row for each layer, a group of columns for each run."""
    names, head, units = "      ", "      ", "layer "
    rows = [f"{number:>5} " for number in range(len(runs[0].layers))]
    for run in runs:
        group = [column for column in COLUMNS if column in run.layers[0]]
        names += f"  {run.name:^{10 * len(group)}}"
        head += "  " + "".join(f"{column:>10}" for column in group)
        units += "  " + "".join(f"{COLUMNS[column][0]:>10}" for column in group)
        for number, layer in enumerate(run.layers):
            rows[number] += "  "
            for column in group:
                mean, error = layer[column], layer[f"{column}_se"]
                percent = COLUMNS[column][0].startswith("%")
                cell = f"{100 * mean:.0f}±{100 * error:.0f}" if percent else f"{mean:.1f}±{error:.1f}"
                rows[number] += f"{cell:>10}"
    print("", names.rstrip(), head, units, *rows, sep="\n")


def sentence(run):
    """What the table says about a run, in words."""
    on_sink = [number for number, layer in enumerate(run.layers) if layer.get("on_sink", 0) > 0.5]
    others = [number for number in range(len(run.layers)) if number not in on_sink]
    parts = []
    for numbers, column, words in (
        (on_sink, "on_sink", "a sink token gets the most attention"),
        (others, "moves", "the position with the most attention changes"),
    ):
        if numbers:
            shares = [round(100 * run.layers[number][column]) for number in numbers]
            low, high = min(shares), max(shares)
            often = f"{low} to {high} %" if low < high else f"{low} %"
            layers = f"in layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
            parts.append(f"{layers} {words} at {often} of the steps")
    return f"{run.name}, {len(run.prompts)} texts: {'; '.join(parts)}."


# ---------- Changed sinks: what of a trained model's sinks matters to it?

CHANGES = ["none", "other end", "noise 1", "noise 2", "noise 3", "zero values", "removed"]


def change_sinks(model, change, seed):
    """A copy of the model with other sinks; noise gives them random embeddings of the same norm."""
    model = copy.deepcopy(model)
    config = model.config
    if change == "other end":
        config.sink_position = "end" if config.sink_position == "front" else "front"
    elif change.startswith("noise"):
        generator = torch.Generator().manual_seed(seed_for(seed, int(change[-1])))
        noise = torch.randn(model.sink.shape, generator=generator).to(model.sink.device)
        model.sink.data = noise * (model.sink.data.norm(dim=1) / noise.norm(dim=1))[:, None]
    elif change == "zero values":
        config.sink_zero_value = True
    elif change == "removed":
        config.n_sink = 0
    return model


def changed_bounds(run, cfg):
    """Prints and returns a row for each change: the bound, and how much it is above the unchanged model's."""
    run_config, rows, unchanged = run.checkpoint["run_config"], [], None
    get_batch, n, _ = validation(run.checkpoint, cfg.data, run_config["eval_seqs"])
    B = run_config["micro_batch_size"]
    print(f"\n{run.name}\n{'sinks changed':<16}{'nats per token':>20}{'more than unchanged':>22}")
    for change in CHANGES:
        model = change_sinks(run.model, change, cfg.seed)
        bound, bound_se, nats, tokens = validate(model, get_batch, B, n, mc_num=cfg.mc_num)
        unchanged = nats if unchanged is None else unchanged
        more, more_se = bound_and_error(nats - unchanged, tokens, spread_levels(n))
        rows.append(dict(change=change, bound=bound, bound_se=bound_se, more=more, more_se=more_se))
        print(f"{change:<16}{f'{bound:.4f} ± {bound_se:.4f}':>20}{f'{more:.4f} ± {more_se:.4f}':>22}")
    return rows


# ---------- Pictures of the first text


def ticks(T, sink=None):
    """Some of T positions, and that of the sinks, as tick marks with their labels."""
    marks = list(range(T // 4, T, max(1, T // 4)))
    return marks + [sink] * (sink is not None), marks + ["sink"] * (sink is not None)


def draw_maps(Figure, runs, layer):
    """Attention in a layer, early and late. The sinks stand apart on the left, wider than they are; a strip
    on top marks the hidden tokens."""
    figure = Figure(figsize=(4.8 * len(runs), 9.4), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False)
    for column, run in zip(axes.T, runs):
        n_sink, (n_steps, T) = run.model.config.n_sink, run.states.shape
        steps, unit = [n_steps // 8, n_steps - 1 - n_steps // 8], T / 24  # unit: the width of a sink
        left, top = -0.5 - unit * (n_sink + 0.5), -0.5 - unit * 1.5
        weights, _ = next(itertools.islice(attention_maps(run.model, run.states[steps]), layer, None))
        weights = weights[:, :, n_sink:].mean(dim=1).cpu().numpy().clip(0.1 / T)  # (2, T, S)
        options = {"norm": "log", "vmin": 0.1 / T, "vmax": 1, "cmap": "magma", "interpolation": "nearest"}
        for panel, step, image in zip(column, steps, weights):
            drawn = panel.imshow(image[:, n_sink:], extent=(-0.5, T - 0.5, T - 0.5, -0.5), **options)
            if n_sink:
                extent = (left, left + unit * n_sink, T - 0.5, -0.5)
                panel.imshow(image[:, :n_sink], extent=extent, **options)
            hidden = (run.states[step] == run.model.config.mask_id)[None].numpy()
            panel.imshow(hidden, cmap="Greys", vmax=2, extent=(-0.5, T - 0.5, top + unit, top))
            panel.set(xlim=(left, T - 0.5), ylim=(T - 0.5, top), xlabel="key", ylabel="query")
            panel.set_xticks(*ticks(T, left + unit * n_sink / 2 if n_sink else None))
            panel.set_yticks([top + unit / 2], ["hidden"])
            panel.set_title(f"{run.title}\nlayer {layer}, step {step + 1} of {n_steps}")
    figure.colorbar(drawn, ax=axes, label="attention, mean over heads", shrink=0.6)
    return figure


def draw_paths(Figure, runs):
    """The position that gets the most attention at each step: a row for each layer, a column for each run. A
    sink has its own line at the bottom; hidden tokens are grey."""
    n_layer = len(runs[0].layers)
    figure = Figure(figsize=(4.8 * len(runs), 1 + 1.6 * n_layer), layout="constrained")
    axes = figure.subplots(n_layer, len(runs), squeeze=False)
    for column, run in zip(axes.T, runs):
        hidden = (run.states == run.model.config.mask_id).numpy()
        n_steps, T = hidden.shape
        for layer, panel in enumerate(column):
            positions = np.array(run.prompts[0]["layers"][layer]["position"])
            positions[(positions < 0) | (positions == T)] = bottom = -T / 8
            extent = (0.5, n_steps + 0.5, -0.5, T - 0.5)
            panel.imshow(hidden.T, cmap="Greys", vmax=4, aspect="auto", origin="lower", extent=extent)
            panel.plot(range(1, n_steps + 1), positions, drawstyle="steps-mid", color="tab:red")
            panel.set(ylim=(1.6 * bottom, T), ylabel=f"layer {layer}")
            panel.set_yticks(*ticks(T, bottom if run.model.config.n_sink else None))
        column[0].set_title(run.title)
        column[-1].set_xlabel("denoising step")
    figure.supylabel("position with the most attention")
    return figure


def load_runs(names, cfg, device):
    """The runs, all with the same texts. Raises ValueError if they cannot be compared."""
    runs = [Run(name, cfg, device) for name in names]
    n_layer = runs[0].model.config.n_layer
    for run in runs:
        if run.model.config.n_layer != n_layer or not torch.equal(run.x0, runs[0].x0):
            raise ValueError(f"{run.name} has other texts or layers than {names[0]}; look at it alone")
    if cfg.layer is not None and cfg.layer not in range(n_layer):
        raise ValueError(f"layer is {cfg.layer}; the layers are 0 to {n_layer - 1}")
    if cfg.changes and not any(run.model.config.n_sink for run in runs):
        raise ValueError(f"no sinks to change in {', '.join(names)}; train a model with n_sink=1")
    if len({run.title for run in runs}) < len(runs):
        for run in runs:
            run.title = f"{run.name}, {run.title}"
    return runs


def main():
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    if not names and not {"-h", "--help"} & {*sys.argv}:
        raise ValueError("no run is named; wanted: python -m extras.sinks out/x [out/y ...] [--key=value]")
    cfg, _ = configurator.parse(SinksConfig, sys.argv[1 + len(names) :])
    Figure = configurator.need("matplotlib.figure", "matplotlib").Figure if cfg.plot else None
    _, _, device = setup_distributed(cfg.device)
    torch.set_float32_matmul_precision("highest")  # no TF32
    runs = load_runs(names, cfg, device)

    for run in runs:
        look_at(run, cfg)
    for start in range(0, len(runs), 2):
        print_table(runs[start : start + 2])
    print(f"\nMeans over the denoising steps, ± standard error over {len(runs[0].prompts)} texts.")
    for column, (_, meaning) in COLUMNS.items():
        print(f"{column}: {meaning.format(cfg.head_threshold)}")
    print("", *map(sentence, runs), sep="\n")
    results = []
    for run in runs:
        n_sink = run.model.config.n_sink
        rows = changed_bounds(run, cfg) if cfg.changes and n_sink else None
        facts = {"run": run.name, "title": run.title, "step": run.checkpoint["step"], "n_sink": n_sink}
        results.append({**facts, "layers": run.layers, "changes": rows, "prompts": run.prompts})

    files = {}
    if cfg.json:
        result = json.dumps({"settings": asdict(cfg), **made_by(), "runs": results}).encode()
        files["sinks.json"] = lambda file: file.write(result)
    if cfg.plot:
        most = max(runs, key=lambda run: run.model.config.n_sink)
        shares = [averages.get("sink", averages["top"]) for averages in most.layers]
        layer = int(np.argmax(shares)) if cfg.layer is None else cfg.layer
        files["maps.png"] = draw_maps(Figure, runs, layer).savefig
        files["paths.png"] = draw_paths(Figure, runs).savefig
    name = "+".join("-".join(Path(name).resolve().parts[-2:]) for name in names)
    folder = Path(cfg.to or f"out/sinks/{name}")
    for file_name, write in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / file_name, write)
        print(f"wrote {folder / file_name}")


if __name__ == "__main__":
    configurator.run(main)
