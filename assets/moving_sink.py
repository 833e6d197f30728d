"""Draws moving_sink.svg, the animation of the README: the first text of each run, step by step.

    python -m assets.moving_sink out/arithmetic out/arithmetic-vanilla --layer=1 --to=moving_sink.svg

It takes the settings of extras.sinks: python -m extras.sinks --help lists them."""

import html
import itertools
import sys

import configurator
from extras.sinks import Run, SinksConfig, look_at
from sample import readable
from train import write_file


def discrete(attribute, values, n_steps):
    """values [(step, value)] of an SVG attribute over a loop, the last seventh of which shows the end."""
    times = ";".join(f"{step / n_steps * 6 / 7:.4f}" for step, _ in values)
    values = ";".join(value for _, value in values)
    when = f'keyTimes="{times}" calcMode="discrete" dur="24s" repeatCount="indefinite"'
    return f'attributeName="{attribute}" values="{values}" {when}/>'


STYLE = """text{font:12px monospace;fill:#e6edf3}.title{font-weight:bold;font-size:15px}.note{fill:#9198a1}
.token{fill:#30363d}.given{fill:#1f3a5f}.sink{fill:#238636}.marker{fill:#ff7b72}"""


def draw_animation(runs, layer):
    """An SVG that replays the first text of each run: a box for each token, dim while it is hidden and bright
    when it is written, and a marker over the position that gets most attention. It has no script, plays in an
    <img>, and shows the last step where animation is off."""
    parts, top, width = [], 0, 940
    for run in runs:
        states, prompt, config = run.first[0], run.prompts[0], run.model.config
        n_steps, positions = len(states), prompt["layers"][layer]["position"]
        moves = sum(prompt["layers"][layer]["moves"])
        note = f"layer {layer}: the token with most attention changes at {moves:.0f} of {n_steps - 1} steps"
        parts.append(f'<text class="title" x="12" y="{top + 26}">{html.escape(run.title)}</text>')
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
        path = [stop for stop, before in zip(path, [(0, "")] + path) if stop[1] != before[1]]
        marker = f'<path class="marker" d="M-7-12H7L0 0Z" transform="translate({path[-1][1]})">'
        moves = discrete("transform", path, n_steps)
        parts.append(f'{marker}<animateTransform type="translate" {moves}</path>')
        top = y + 46
    size = f'width="{width}" height="{top}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" {size}><style>{STYLE}</style>'
    return "\n".join([svg, f'<rect {size} fill="#0d1117"/>', *parts, "</svg>\n"])


def main():
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    cfg, _ = configurator.parse(SinksConfig, sys.argv[1 + len(names) :])
    if not names or None in (cfg.layer, cfg.to):
        raise ValueError("wanted: python -m assets.moving_sink RUN [RUN ...] --layer=1 --to=moving_sink.svg")
    runs = [Run(name, cfg, "cpu") for name in names]
    for run in runs:
        look_at(run, cfg)
    svg = draw_animation(runs, cfg.layer).encode()
    write_file(cfg.to, lambda file: file.write(svg))
    print(f"wrote {cfg.to}")


if __name__ == "__main__":
    configurator.run(main)
