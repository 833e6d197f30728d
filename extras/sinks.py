"""Where attention goes while a text is denoised, with and without a sink token (the paper, 4.4 and A.3).

    python -m extras.sinks out/wikitext2                                     # a table with a row per layer
    python -m extras.sinks out/wikitext2 out/wikitext2-vanilla --plot=True   # side by side, with pictures
    python -m extras.sinks out/wikitext2 --changes=True                      # also the bound with other sinks
    python -m extras.sinks out/a out/b --animate=moving_sink.svg --layer=2   # the first text, step by step

Each model writes the rest of the same validation texts. At every step and in every layer attention is
recomputed from q and k, because scaled_dot_product_attention keeps no weights, and the position that gets
most of it is followed. All prompts' steps go to sinks.json in the first run's folder, as do the pictures.
"""

import copy
import html
import itertools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

import configurator
from eval import validation
from model import apply_rope, generate, seed_for
from sample import load_trained, readable
from train import made_by, mean_and_error, setup_distributed, validate, write_file


@dataclass
class SinksConfig:
    limit: int = 16  # prompts: validation sequences, evenly spread
    prompt_length: int | None = None  # tokens given of each; None: a quarter, or the question (sft_gsm8k.py)
    steps: int = 256  # denoising steps; a text needs no more than it has hidden tokens
    temperature: float = 0.1  # 0: the likeliest token; 1: the model's distribution
    remasking: str = "confidence"  # confidence, or random: the exact reverse process
    plot: bool = False  # draw sinks_maps.png, sinks_paths.png and sinks_norms.png (pip install matplotlib)
    layer: int | None = None  # of sinks_maps.png and the animation; None: where a content token gets most
    animate: str | None = None  # write an animated .svg of the first text
    changes: bool = False  # the bound on -log p with changed sinks, on the validation sequences of training
    mc_num: int = 8  # with changes: draws of the noise for each sequence
    data: str | None = None  # a prepared folder; None: the data of training
    seed: int = 0  # of the random draws
    device: str = "auto"  # auto: cuda, else mps, else cpu

    def __post_init__(self):
        if self.limit < 2 or self.mc_num < 1 or self.seed < 0:
            raise ValueError(f"limit, mc_num and seed must be at least 2, 1 and 0; got {self}")


class Run:
    """A trained model, and validation sequences x0 (n, T) of which it is to write the hidden tokens (n, T).
    Raises ValueError if one has none. look_at adds prompts, layers and first."""

    def __init__(self, name, cfg, device):
        self.name = name
        self.model, self.tokenizer, self.checkpoint = load_trained(name, device)
        run_config = self.checkpoint["run_config"]
        get_batch, n, _ = validation(self.checkpoint, cfg.data, cfg.limit)
        batches = [get_batch("val", index) for index in range(math.ceil(n / run_config["micro_batch_size"]))]
        self.x0, maskable = (torch.cat(tensors)[:n] for tensors in zip(*batches))
        T, length = self.x0.size(1), cfg.prompt_length
        if length is None:  # the question of a fine-tuned model is not maskable
            length = 0 if "epochs" in run_config else T // 4
        self.hidden = maskable & (torch.arange(T) >= length)
        if not self.hidden.any(dim=1).all():
            raise ValueError(f"prompt_length {length} leaves {name} nothing to write of {T} tokens; lower it")


@torch.no_grad()
def attention_maps(model, xt):
    """Yields for each layer the attention weights (B, H, S, S), a row for each query, and the L2 norms of the
    value vectors (B, S), means over heads. xt is (B, T), and the sinks are the first of the S positions."""
    config, inputs, layers = model.config, [], [block.attn for block in model.blocks]
    hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args)) for layer in layers]
    model.trunk(xt.to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    for layer, (x, cos, sin, attn_mask) in zip(layers, inputs):  # as in Attention.forward
        B, S, _ = x.shape
        q, k, v = layer.qkv(x).view(B, S, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, S, d) each
        scores = apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).transpose(2, 3) / math.sqrt(q.size(-1))
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        weights, norms = scores.softmax(dim=-1), v.norm(dim=-1).mean(dim=1)
        if config.sink_attention == "split":  # a sink attends to itself alone
            weights[:, :, : config.n_sink] = torch.eye(S, device=x.device)[: config.n_sink]
        if config.sink_zero_value:
            norms[:, : config.n_sink] = 0
        yield weights, norms


def mass_and_norms(model, states):
    """For the states (steps, T) of a text the attention that each key gets, mean over heads and content
    queries, and the norms of the value vectors: two arrays (n_layer, steps, S)."""
    parts = []
    for xt in states.split(8):  # so that the weights fit into memory
        layers = []
        for weights, norms in attention_maps(model, xt):
            mass = weights[:, :, model.config.n_sink :].mean(dim=(1, 2))
            layers.append(torch.stack((mass, norms)).cpu())
        parts.append(torch.stack(layers, dim=1))  # (2, n_layer, steps, S)
    return torch.cat(parts, dim=2).double().numpy()


def trajectory(model, x0, hidden, cfg, seed):
    """Writes the hidden tokens of x0 (T,). Returns the states (steps, T) that the model saw, and the text."""
    states = [torch.where(hidden, model.config.mask_id, x0)[None]]
    generate(model, states[0], cfg.steps, cfg.temperature, cfg.remasking, seeds=[seed], on_step=states.append)
    return torch.cat(states[:-1]), states[-1][0]


def follow(mass, norms, hidden, config):
    """The position that gets most attention, in one layer at each step of a text: {name: a number a step}.

    mass, norms (steps, S) of mass_and_norms; hidden (steps, T) tells which content tokens are [MASK].
    Content has the positions 0, 1, ...; all sinks count as one position, -1 in front or T at the end."""
    n_sink, (steps, S) = config.n_sink, mass.shape
    positions = np.arange(S) - n_sink
    positions[:n_sink] = -1 if config.sink_position == "front" else S - n_sink
    every, top = np.arange(steps), mass.argmax(axis=1)
    others = np.where(np.arange(S) == top[:, None], np.nan, norms)
    is_mask = np.pad(hidden, ((0, 0), (n_sink, 0)))  # (steps, S)
    values = {
        "position": positions[top],
        "share": mass[every, top],
        "moved": np.diff(positions[top]) != 0,  # since the step before: one value less
        "hidden": is_mask[every, top],
        "norm": norms[every, top] / np.nanmedian(others, axis=1),
        "masks": (mass * is_mask).sum(axis=1) / is_mask.mean(axis=1),  # 1: [MASK]s get their even share
        "content": mass[:, n_sink:].max(axis=1),
    }
    if n_sink:
        values["sinks"] = mass[:, :n_sink].sum(axis=1)
        values["sinks_norm"] = norms[:, :n_sink].mean(axis=1) / np.median(norms[:, n_sink:], axis=1)
    return {key: np.round(array.astype(float), 6).tolist() for key, array in values.items()}


def summarize(prompts):
    """For each layer means over steps, then means over prompts with their standard errors."""
    layers = []
    for records in zip(*(prompt["layers"] for prompt in prompts)):
        layer = {}
        for key in [key for key in COLUMNS if key in records[0]]:
            averages = [np.mean(record[key] or [0]) for record in records]  # one step has no moves
            layer[key] = float(np.mean(averages))
            layer[f"{key}_se"] = float(np.std(averages, ddof=1) / math.sqrt(len(averages)))
        layers.append(layer)
    return layers


def look_at(run, cfg):
    """Writes the texts. run.prompts has what the file gets of each, run.layers the averages of each layer,
    run.first the first prompt's states, and what mass_and_norms makes of them."""
    run.prompts, config = [], run.model.config
    for index in tqdm(range(len(run.x0)), desc=run.name, unit="prompt"):
        states, text = trajectory(run.model, run.x0[index], run.hidden[index], cfg, seed_for(cfg.seed, index))
        mass, norms = mass_and_norms(run.model, states)
        hidden = (states == config.mask_id).numpy()
        layers = [follow(mass[i], norms[i], hidden, config) for i in range(config.n_layer)]
        steps = hidden.sum(axis=0).tolist()  # a token is hidden in the first so many states
        run.prompts.append({"tokens": text.tolist(), "steps": steps, "layers": layers})
        if index == 0:
            run.first = states, mass, norms
    run.layers = summarize(run.prompts)


COLUMNS = dict(share="top gets", moved="moves", hidden="is [MASK]", norm="its norm", masks="[MASK]s get",
               content="content's top", sinks="sinks get", sinks_norm="their norm")  # fmt: skip
LEGEND = """
Means over steps, ± standard error over prompts. top: the position that gets most attention (mean over heads
and content queries); moves: share of the steps at which it is another one; is [MASK]: share of the steps;
[MASK]s get: all of them together, 1 is their even share; content's top: the content token that gets most.
Norms of value vectors are over the median of the others (of sinks: of the content)."""


def print_layers(run):
    keys = [key for key in COLUMNS if key in run.layers[0]]
    print(f"\n{run.name}: an even share of attention is {1 / run.first[1].shape[-1]:.4f}")
    print("layer" + "".join(f"{COLUMNS[key]:>16}" for key in keys))
    for number, layer in enumerate(run.layers):
        cells = [f"{layer[key]:.3f} ± {layer[f'{key}_se']:.3f}" for key in keys]
        print(f"{number:>5}" + "".join(f"{cell:>16}" for cell in cells))


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
    t = torch.arange(n, dtype=torch.float64) * (math.sqrt(5) - 1) / 2 % 1  # in the order of validate's levels
    print(f"{'sinks changed':<16}{'nats per token':>20}{'more than unchanged':>22}")
    for change in CHANGES:
        model = change_sinks(run.model, change, cfg.seed)
        bound, bound_se, nats, tokens = validate(model, get_batch, B, n, mc_num=cfg.mc_num)
        unchanged = nats if unchanged is None else unchanged
        more, more_se = mean_and_error(nats - unchanged, tokens, t)  # of the same sequences and masks
        rows.append(dict(change=change, bound=bound, bound_se=bound_se, more=more, more_se=more_se))
        print(f"{change:<16}{f'{bound:.4f} ± {bound_se:.4f}':>20}{f'{more:.4f} ± {more_se:.4f}':>22}")
    return rows


# ---------- Pictures of the first prompt


def draw_maps(Figure, runs, layer):
    """Attention in a layer, early and late. The sinks stand left of the content, wider than they are."""
    figure = Figure(figsize=(4.6 * len(runs), 8), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False)
    for column, run in zip(axes.T, runs):
        states, n_sink = run.first[0], run.model.config.n_sink
        last, T = len(states) - 1, states.size(1)
        steps = [last // 8, last - last // 8]
        weights, _ = next(itertools.islice(attention_maps(run.model, states[steps]), layer, None))
        weights = weights[:, :, n_sink:].mean(dim=1).cpu().numpy().clip(0.1 / T)  # (2, T, S)
        wide = np.repeat(weights[:, :, :n_sink], max(1, T // 40), axis=2)
        options = {"norm": "log", "vmin": 0.1 / T, "vmax": 1, "cmap": "magma", "interpolation": "nearest"}
        options["extent"] = (-wide.shape[2] - 0.5, T - 0.5, T - 0.5, -0.5)
        for panel, step, image in zip(column, steps, np.concatenate((wide, weights[:, :, n_sink:]), axis=2)):
            drawn = panel.imshow(image, **options)
            panel.set(title=f"{run.name}\nlayer {layer}, step {step}", xlabel="key", ylabel="query")
    figure.colorbar(drawn, ax=axes, label="attention, mean over heads", shrink=0.6)
    return figure


def draw_paths(Figure, runs):
    """The position that gets most attention at every step, a panel for each layer that all runs have."""
    n_layer = min(len(run.layers) for run in runs)
    figure = Figure(figsize=(10, 1 + n_layer), layout="constrained")
    axes = figure.subplots(n_layer, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for layer, panel in enumerate(axes):
        panel.set_ylabel(f"layer {layer}")
        for run in runs:
            panel.plot(run.prompts[0]["layers"][layer]["position"], label=run.name, linewidth=1)
    panel.set_xlabel("denoising step")
    figure.supylabel("position that gets most attention")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def draw_norms(Figure, runs):
    """Norms of value vectors at eight steps, by kind of token (the paper's Figure 1)."""
    figure = Figure(figsize=(5.5 * len(runs), 3.6), layout="constrained")
    axes, legend = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0], {}
    for panel, run in zip(axes, runs):
        (states, mass, norms), n_sink, n_layer = run.first, run.model.config.n_sink, len(run.layers)
        steps = np.linspace(0, len(states) - 1, 8).astype(int)
        hidden = (states[steps] == run.model.config.mask_id).numpy()  # (8, T)
        sinks, content = norms[:, steps, :n_sink], norms[:, steps, n_sink:]  # (n_layer, 8, n_sink or T)
        top = mass[:, steps, n_sink:].argmax(axis=2)[..., None]
        groups = [
            ("visible tokens", content[:, ~hidden], "0.7", 2),
            ("[MASK]s", content[:, hidden], "tab:orange", 2),
            ("content token that gets most", np.take_along_axis(content, top, axis=2), "tab:red", 14),
            ("sinks", sinks, "tab:blue", 14),
        ]
        for label, values, color, size in groups if n_sink else groups[:3]:
            values = values.reshape(n_layer, -1)
            x = np.arange(n_layer)[:, None] + np.linspace(-0.3, 0.3, values.shape[1])  # from step to step
            legend[label] = panel.scatter(x, values, s=size, color=color, linewidths=0)
        panel.set(title=run.name, xlabel="layer", ylabel="norm of the value", xticks=range(n_layer))
    panel.set_ylim(bottom=0)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, markerscale=2)
    return figure


# ---------- The first prompt as an animated SVG


def discrete(attribute, values, n_steps, seconds=24):
    """values [(step, value)] of an SVG attribute over a loop, the last seventh of which shows the end."""
    times = ";".join(f"{step / n_steps * 6 / 7:.4f}" for step, _ in values)
    values = ";".join(value for _, value in values)
    when = f'keyTimes="{times}" calcMode="discrete" dur="{seconds}s" repeatCount="indefinite"'
    return f'attributeName="{attribute}" values="{values}" {when}/>'


STYLE = """text{font:12px monospace;fill:#e6edf3}.title{font-weight:bold;font-size:15px}.note{fill:#9198a1}
.token{fill:#30363d}.given{fill:#1f3a5f}.sink{fill:#238636}.marker{fill:#ff7b72}"""


def draw_animation(runs, layer, width=940):
    """An SVG that replays the first text of each run: a box for each token, dim while it is hidden and bright
    when it is written, and a marker over the position that gets most attention. It has no script, plays in an
    <img>, and shows the last step where animation is off."""
    parts, top = [], 0
    for run in runs:
        states, prompt, config = run.first[0], run.prompts[0], run.model.config
        n_steps, positions = len(states), prompt["layers"][layer]["position"]
        titles = {0: "without a sink token", 1: "with a sink token"}
        title = titles.get(config.n_sink, f"with {config.n_sink} sink tokens")
        moves = sum(prompt["layers"][layer]["moved"])
        note = f"layer {layer}: the token with most attention changes at {moves:.0f} of {n_steps - 1} steps"
        parts.append(f'<text class="title" x="12" y="{top + 26}">{title}</text>')
        parts.append(f'<text class="note" x="{width - 12}" y="{top + 26}" text-anchor="end">{note}</text>')
        texts = [readable(run.tokenizer, token).strip() or "␣" for token in prompt["tokens"]]
        sink = -1 if config.sink_position == "front" else len(texts)  # its position, as in follow
        boxes = [(sink, "sink", 0)] * bool(config.n_sink)  # position, text, the step that writes it
        boxes += zip(range(len(texts)), texts, prompt["steps"])
        x, y, centers = 12, top + 54, {}
        for position, text, step in boxes:
            size = max(16, round(7.3 * len(text)) + 8)
            if x + size > width - 12:
                x, y = 12, y + 44
            centers[position] = f"{x + size // 2},{y - 3}"
            kind = "sink" if position == sink else "token" if step else "given"
            color = shown = ""
            if step:
                fills = [(0, "#191e25"), (step, "#9e6a03"), (step + 1, "#30363d")]
                color = "<animate " + discrete("fill", fills[: 2 if step == n_steps else 3], n_steps)
                shown = "<animate " + discrete("opacity", [(0, "0"), (step, "1")], n_steps)
            rect = f'x="{x}" y="{y}" width="{size}" height="22" rx="4"'
            parts.append(f'<rect class="{kind}" {rect}>{color}</rect>')
            middle = f'x="{x + size // 2}" y="{y + 15}" text-anchor="middle"'
            parts.append(f"<text {middle}>{html.escape(text)}{shown}</text>")
            x += size + 4
        path = [(step, centers[int(position)]) for step, position in enumerate(positions)]
        path = [place for place, before in zip(path, [(0, "")] + path) if place[1] != before[1]]
        marker = f'<path class="marker" d="M-7-12H7L0 0Z" transform="translate({path[-1][1]})">'
        parts.append(
            f'{marker}<animateTransform type="translate" {discrete("transform", path, n_steps)}</path>'
        )
        top = y + 46
    size = f'width="{width}" height="{top}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" {size}><style>{STYLE}</style>'
    return "\n".join([svg, f'<rect {size} fill="#0d1117"/>', *parts, "</svg>\n"])


def main():
    names = [arg for arg in sys.argv[1:] if not arg.startswith("-") and not arg.endswith(".py")]
    cfg, _ = configurator.parse(SinksConfig, [arg for arg in sys.argv[1:] if arg not in names])
    if not names:
        raise ValueError("no run is named; wanted: python -m extras.sinks out/x [out/y ...] [--key=value]")
    Figure = configurator.need("matplotlib.figure", "matplotlib").Figure if cfg.plot else None
    _, _, device = setup_distributed(cfg.device)
    torch.set_float32_matmul_precision("highest")  # no TF32
    runs = [Run(name, cfg, device) for name in names]
    n_layer = min(run.model.config.n_layer for run in runs)
    for run in runs:
        if not torch.equal(run.x0, runs[0].x0):
            raise ValueError(f"{run.name} has other validation sequences than {names[0]}; look at it alone")
    if cfg.layer is not None and cfg.layer not in range(n_layer):
        raise ValueError(f"layer is {cfg.layer}; the layers are 0 to {n_layer - 1}")
    if cfg.changes and not any(run.model.config.n_sink for run in runs):
        raise ValueError(f"no sinks to change in {', '.join(names)}; train a model with n_sink=1")

    results = []
    for run in runs:
        look_at(run, cfg)
        print_layers(run)
        rows = changed_bounds(run, cfg) if cfg.changes and run.model.config.n_sink else None
        facts = {"run": run.name, "step": run.checkpoint["step"], "n_sink": run.model.config.n_sink}
        results.append({**facts, "layers": run.layers, "changes": rows, "prompts": run.prompts})
    print(LEGEND)
    folder = names[0] if os.path.isdir(names[0]) else os.path.dirname(names[0])
    result = json.dumps({"settings": asdict(cfg), **made_by(), "runs": results}).encode()
    write_file(os.path.join(folder, "sinks.json"), lambda file: file.write(result))
    if cfg.plot or cfg.animate:
        fewest = min(runs, key=lambda run: run.model.config.n_sink)  # its sinks, if any, are content tokens
        best = int(np.argmax([averages["content"] for averages in fewest.layers[:n_layer]]))
        layer = best if cfg.layer is None else cfg.layer
    if cfg.animate:
        svg = draw_animation(runs, layer).encode()
        write_file(cfg.animate, lambda file: file.write(svg))
    if cfg.plot:
        write_file(os.path.join(folder, "sinks_maps.png"), draw_maps(Figure, runs, layer).savefig)
        write_file(os.path.join(folder, "sinks_paths.png"), draw_paths(Figure, runs).savefig)
        write_file(os.path.join(folder, "sinks_norms.png"), draw_norms(Figure, runs).savefig)
    print(f"wrote sinks.json{' and sinks_*.png' * cfg.plot} to {folder}")
    if cfg.animate:
        print(f"wrote {cfg.animate}, to be opened in a browser")


if __name__ == "__main__":
    configurator.run(main)
