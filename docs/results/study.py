"""What docs/results.md says beyond losses: samples in numbers, and where attention goes along training.

    python -m docs.results.study measure out/stories/sink-0 --limit=64    # measured.jsonl, beside its log
    python -m docs.results.study tables docs/results                      # of all runs, and two pictures

measure takes the settings of extras.sinks. A run that was trained with --keep_all is followed along training.
tables has means over seeds ± standard errors at the last step that most seeds have."""

import json
import os
import re
import string
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import configurator
from extras.ablations import mean_and_error
from extras.sinks import Run, SinksConfig, attention_maps, changed_bounds, look_at
from model import MDM, mask_tokens, noise_levels
from train import made_by, setup_distributed, write_file

KINDS = ["sink", "hidden", "end-of-text", "punctuation", "other"]  # of keys
COLORS = dict(zip(KINDS, ["tab:red", "0.5", "tab:green", "tab:blue", "tab:orange"]))


def kinds_of(x0, tokenizer):
    """The kind of each token of x0 (n, T), as indices into KINDS: end-of-text, punctuation or other."""
    kind_of = {}
    for token in x0.unique().tolist():
        text = tokenizer.decode([token]).strip()
        kind_of[token] = KINDS.index("other" if text.strip(string.punctuation) or not text else "punctuation")
    kind_of[tokenizer.eot_token] = KINDS.index("end-of-text")
    return x0.clone().apply_(kind_of.get)


@torch.no_grad()
def attention_by_kind(run, models, cfg, device):
    """Yields a row for each of models, (step, model) of a run, and each layer: what the keys of each kind get
    of each head's attention (1 is an even share), and how often one key gets more than the threshold. The
    texts have the same tokens hidden each time, at evenly spread noise levels."""
    config, x0 = run.model.config, run.x0
    t = (torch.arange(len(x0)) + 0.5) / len(x0)
    noise = torch.rand(x0.shape, generator=torch.Generator().manual_seed(cfg.seed))
    xt, masked = mask_tokens(x0, noise_levels(t[:, None]), run.maskable, config.mask_id, noise)
    kinds = kinds_of(x0, run.tokenizer).masked_fill(masked, KINDS.index("hidden"))
    kinds = F.pad(kinds, (config.n_sink, 0), value=KINDS.index("sink"))
    is_kind = F.one_hot(kinds, len(KINDS)).float().to(device)  # (n, S, kinds)
    even = is_kind.mean(dim=(0, 1))
    for step, model in models:
        for layer, (weights, _) in enumerate(attention_maps(model.to(device), xt)):
            by_head = weights[:, :, config.n_sink :].mean(dim=2)  # (n, H, S)
            shares = (by_head @ is_kind).mean(dim=0) / even  # (H, kinds)
            row = {"table": "attention", "step": step, "row": f"layer {layer}"}
            row |= {kind: numbers(shares[:, i]) for i, kind in enumerate(KINDS) if even[i] > 0}
            yield row | {"rate": numbers((by_head.amax(dim=2) > cfg.head_threshold).float().mean(dim=0))}


def numbers(tensor):
    return tensor.double().round(decimals=3).tolist()  # short ones, for a small file


def words_of(tokens, tokenizer):
    """The words of a text, none of which reaches over an end-of-text."""
    text, eot = tokenizer.decode(tokens), tokenizer.decode([tokenizer.eot_token])
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.replace(eot, " ").lower())


def count_words(texts, known):
    """Of texts, lists of words: their number, and the shares of known words, of 4-grams that the same text
    has had before, and of distinct pairs of words."""
    words, pairs, fours, new_fours = [], [], 0, 0
    for text in texts:
        words += text
        pairs += zip(text, text[1:])
        fours += max(0, len(text) - 3)
        new_fours += len(set(zip(text, text[1:], text[2:], text[3:])))
    return {
        "words": len(words),
        "known": sum(word in known for word in words) / max(1, len(words)),
        "repeated": 1 - new_fours / max(1, fours),
        "distinct": len(set(pairs)) / max(1, len(pairs)),
    }


def measure_run(run, cfg, device):
    """Yields the rows of measured.jsonl: of what and how it was measured; what was written in numbers, beside
    the held-out texts; the table; the changed sinks; attention_by_kind."""
    look_at(run, cfg)
    run_config, data_sha256 = run.checkpoint["run_config"], run.checkpoint["meta"]["sha256"]
    facts = made_by() | {"config": run_config, "data_sha256": data_sha256, "settings": asdict(cfg)}
    yield {"table": "facts", "row": "", "step": run.checkpoint["step"], **facts}
    folder = cfg.data or os.path.join(run_config["data_dir"], run_config["dataset"])
    tokens = np.memmap(f"{folder}/train.bin", run.checkpoint["meta"]["dtype"], mode="r")[: 10**7]
    known = set(words_of(tokens.tolist(), run.tokenizer))
    written = [prompt["tokens"] for prompt in run.prompts]
    for name, texts in (("written", written), ("held out", run.x0.tolist())):
        counts = count_words([words_of(text, run.tokenizer) for text in texts], known)
        yield {"table": "texts", "row": name, **counts}
    for number, layer in enumerate(run.layers):
        means = {key: layer[key] for key in layer if not key.endswith("_se")}
        yield {"table": "denoising", "row": f"layer {number}", **means}
    for row in changed_bounds(run, cfg) if run.model.config.n_sink else []:
        yield {"table": "changes", "row": row["change"], "more": row["more"]}
    paths = sorted(Path(run.name).glob("[0-9]*.pt"), key=lambda path: int(path.stem))
    if not paths:
        print(f"{run.name} has no checkpoints STEP.pt; to follow attention, train with --keep_all=True")
    models = ((int(path.stem), MDM.from_checkpoint(path)) for path in paths)  # one at a time in memory
    yield from attention_by_kind(run, models, cfg, device)


# ---------- Tables and pictures


def measured_rows(folder):
    """Yields (name, seed, row) of what measure wrote, for each line of FOLDER/NAME-SEED/measured.jsonl."""
    for path in sorted(Path(folder).glob("*/measured.jsonl")):
        name, seed = path.parent.name.rsplit("-", 1)
        for line in path.read_text(encoding="utf-8").splitlines():
            yield name, int(seed), json.loads(line)


def read_tables(folder):
    """{table: {(name, row): {step: {seed: values}}}}"""
    tables = {}
    for name, seed, values in measured_rows(folder):
        table, row, step = values.pop("table"), values.pop("row"), values.pop("step", None)
        if table != "facts":
            steps = tables.setdefault(table, {}).setdefault((name, row), {})
            steps.setdefault(step, {})[seed] = values
    return tables


def last_of(steps):
    """The values of each seed at the last step that most seeds have."""
    return list(max(steps.items(), key=lambda item: (len(item[1]), item[0] or 0))[1].values())


def print_tables(tables):
    """Means over seeds ± standard errors, of {table: {(name, row): {step: {seed: values}}}} at the last step.
    A list has a number for each head."""
    for table, rows in tables.items():
        columns = dict.fromkeys(column for steps in rows.values() for column in last_of(steps)[0])
        print(f"\n{table:<28}" + "".join(f"{column:>16}" for column in columns))
        for (name, row), steps in rows.items():
            cells = ""
            for column in columns:
                values, cell = [np.mean(values[column]) for values in last_of(steps) if column in values], "-"
                if values:
                    digits = 3 if max(values) < 100 else 0
                    cell = "{:.{digits}f} ± {:.{digits}f}".format(*mean_and_error(values), digits=digits)
                cells += f"{cell:>16}"
            print(f"{name:<13} {row:<14}{cells}")


def of_heads(steps, key):
    """Steps, and an array (steps, seeds * heads)."""
    most = max(map(len, steps.values()))
    steps = {step: seeds for step, seeds in steps.items() if len(seeds) == most}
    return list(steps), [np.ravel([values[key] for values in seeds.values()]) for seeds in steps.values()]


def draw_attention(figure, rows):
    """What each kind of key gets over training: a row for each name, a column for each layer. Solid lines are
    means over heads and seeds, dotted lines the head of any seed that gives the most."""
    names, layers = (list(dict.fromkeys(part)) for part in zip(*rows))
    panels = figure.subplots(len(names), len(layers), sharex=True, sharey=True, squeeze=False)
    for (name, layer), steps in rows.items():
        axes = panels[names.index(name), layers.index(layer)]
        for kind in [kind for kind in COLORS if kind in last_of(steps)[0]]:
            x, heads = of_heads(steps, kind)
            axes.plot(x, np.mean(heads, axis=1), color=COLORS[kind], label=kind)
            axes.plot(x, np.max(heads, axis=1), ":", color=COLORS[kind])
        axes.set_title(f"{name}, {layer}", fontsize="medium")
    panels[0, 0].set_yscale("log")  # and with it all others
    panels[0, 0].set_ylim(bottom=0.3)
    figure.supxlabel("step")
    figure.supylabel("attention (1 is an even share)")
    legends = [axes.get_legend_handles_labels() for axes in panels.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))


def draw_rates(figure, rows):
    """The sink rate of each layer over training: solid the mean over heads and seeds, dotted the highest."""
    names = list(dict.fromkeys(name for name, _ in rows))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for (name, layer), steps in rows.items():
        axes, (x, heads) = panels[names.index(name)], of_heads(steps, "rate")
        (line,) = axes.plot(x, np.mean(heads, axis=1), label=layer)
        axes.plot(x, np.max(heads, axis=1), ":", color=line.get_color())
        axes.set(title=name, xlabel="step")
    panels[0].set_ylabel("sink rate: share of texts in which\none key passes the threshold")
    panels[0].legend()


def write_measured(path, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    write_file(f"{path}/measured.jsonl", lambda file: file.write("".join(lines).encode()))
    print(f"wrote {path}/measured.jsonl")


def measure(path, argv):
    cfg, _ = configurator.parse(SinksConfig, argv)
    _, _, device = setup_distributed(cfg.device)
    torch.set_float32_matmul_precision("highest")  # no TF32
    write_measured(path, measure_run(Run(path, cfg, device), cfg, device))


def tables(folder):
    results = read_tables(folder)
    print_tables(results)
    if "attention" not in results:  # no run has kept its checkpoints
        return
    Figure = configurator.need("matplotlib.figure", "matplotlib").Figure
    for name, draw, height in (("attention", draw_attention, 9.5), ("rates", draw_rates, 3.2)):
        figure = Figure(figsize=(10, height), layout="constrained")
        draw(figure, results["attention"])
        write_file(f"{folder}/{name}.png", figure.savefig)
        print(f"wrote {folder}/{name}.png")


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ("measure", "tables") or not os.path.isdir(sys.argv[2]):
        raise ValueError("wanted: measure RUN [--key=value ...], or tables FOLDER, both folders that exist")
    if sys.argv[1] == "measure":
        measure(sys.argv[2], sys.argv[3:])
    else:
        tables(sys.argv[2])


if __name__ == "__main__":
    configurator.run(main)
