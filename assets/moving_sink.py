"""Draws one text of each run, step by step, as an animation.

    python -m extras.sinks out/sink out/vanilla --json --to=plots
    python -m assets.moving_sink plots/sinks.json --layer=1
    python -m assets.moving_sink docs/results/adapt_short/sinks.json.gz --layer=24 --prompt=1

The last command draws that of the README."""

import html
import json
import os
from dataclasses import dataclass

import configurator
from prepare_data import open_text
from train import write_file


@dataclass
class AnimationConfig:
    file: str = ""  # sinks.json or sinks.json.gz, which extras.sinks writes with --json
    layer: int = 0  # whose attention is shown
    prompt: int = 0  # which of the texts
    to: str = "moving_sink.svg"  # the file to write


def discrete(attribute, values, n_steps):
    """values [(step, value)] of an SVG attribute over a loop, the last seventh of which shows the end."""
    changes = values[:1]
    for step, value in values[1:]:
        if value != changes[-1][1]:
            changes.append((step, value))
    times = ";".join(f"{step / n_steps * 6 / 7:.4f}" for step, _ in changes)
    values = ";".join(value for _, value in changes)
    when = f'keyTimes="{times}" calcMode="discrete" dur="24s" repeatCount="indefinite"'
    return f'attributeName="{attribute}" values="{values}" {when}/>'


STYLE = """text{font:12px monospace;fill:#e6edf3}.title{font-weight:bold;font-size:15px}.note{fill:#9198a1}
.token{fill:#30363d}.given{fill:#1f3a5f}.sink{fill:#238636}.marker,.bar{fill:#ff7b72}"""
WIDTH = 940


def draw_run(run, layer, number, top):
    """Parts of the SVG for one run, and where they end: a box for each token, dim while it is hidden and
    bright when it is written, a marker over the position that gets the most attention, and a bar for how much
    that is."""
    prompt = run["prompts"][number]
    positions, T = prompt["layers"][layer]["position"], len(prompt["tokens"])
    n_steps, moves = len(positions), sum(prompt["layers"][layer]["moves"])
    parts = [f'<text class="title" x="12" y="{top + 26}">{html.escape(run["title"])}</text>']
    note = f"layer {layer}: the top position changes at {moves:.0f} of {n_steps - 1} steps; its attention:"
    parts.append(f'<text class="note" x="{WIDTH - 122}" y="{top + 26}" text-anchor="end">{note}</text>')
    S = T + run["n_sink"]
    shares = [f"{100 * times_even / S:.0f}" for times_even in prompt["layers"][layer]["top"]]  # in percent
    parts.append(f'<rect class="token" x="{WIDTH - 112}" y="{top + 16}" width="100" height="10"/>')
    bar = f'x="{WIDTH - 112}" y="{top + 16}" width="{shares[-1]}" height="10"'
    widths = discrete("width", list(enumerate(shares)), n_steps)
    parts.append(f'<rect class="bar" {bar}><animate {widths}</rect>')
    texts = [text.strip() or "␣" for text in prompt["texts"]]
    sink = T if T in positions else -1  # its position
    boxes = [(sink, "sink", 0)] * bool(run["n_sink"])  # position, text, the step that writes it
    boxes += zip(range(T), texts, prompt["steps"])
    x, y, centers = 12, top + 54, {}
    for position, text, step in boxes:
        size = max(16, round(7.3 * len(text)) + 8)
        if x + size > WIDTH - 12:
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
    marker = f'<path class="marker" d="M-7-12H7L0 0Z" transform="translate({path[-1][1]})">'
    parts.append(f'{marker}<animateTransform type="translate" {discrete("transform", path, n_steps)}</path>')
    return parts, y + 46


def main():
    cfg, _ = configurator.parse(AnimationConfig, positional="file")
    if not os.path.isfile(cfg.file):
        raise ValueError(f"no file {cfg.file!r}; wanted sinks.json: python -m extras.sinks RUN --json")
    with open_text(cfg.file) as file:
        text = file.read()
    runs, parts, top = json.loads(text)["runs"], [], 0
    n_texts, n_layers = (min(len(run[key]) for run in runs) for key in ("prompts", "layers"))
    if not (0 <= cfg.prompt < n_texts and 0 <= cfg.layer < n_layers):
        raise ValueError(f"there are prompts below {n_texts} and layers below {n_layers}")
    for run in runs:
        more, top = draw_run(run, cfg.layer, cfg.prompt, top)
        parts += more
    size = f'width="{WIDTH}" height="{top}"'  # no script: it plays in an <img>
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" {size}><style>{STYLE}</style>'
    svg = "\n".join([svg, f'<rect {size} fill="#0d1117"/>', *parts, "</svg>\n"])
    write_file(cfg.to, lambda file: file.write(svg.encode()))
    print(f"wrote {cfg.to}")


if __name__ == "__main__":
    configurator.run(main)
