"""docs/adapt.md in numbers: what an adapted model's losses are, and where its attention goes.

    python -m docs.results.adapt measure out/adapt/sink-0 data-smollm2/stories data-smollm2/wikitext2
    python -m docs.results.adapt tables docs/results/adapt_long
    python -m docs.results.adapt sinks out/adapt/vanilla-0 data-smollm2/stories data-smollm2/wikitext2

measure writes measured.jsonl beside the checkpoint. Its parts are: bound, on held-out texts of each folder,
also with the first token visible; attention, by kind of key; writing, attention while texts are written,
without and with a prompt; items, the chain rule of the items of --items=lambada.jsonl,..."""

import sys
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import configurator
import train
from docs.results.anchor import keep_first_visible
from docs.results.study import KINDS, attention_by_kind, kinds_of, measured_rows, numbers, write_measured
from eval import EvalConfig, read_items, score_item, validation
from extras.ablations import compare, mean_and_error
from extras.sinks import Run, SinksConfig, attention_maps, look_at
from model import mask_tokens
from train import made_by, setup_distributed, spread_levels, validate, write_file


@dataclass
class AdaptConfig:
    parts: str = "bound,attention,writing"  # what to measure; also items
    texts: int = 512  # of the bound
    limit: int = 8  # texts that are written
    steps: int = 64  # of writing a text
    prompt_length: int = 16  # tokens given, in the second of two ways to write the texts
    items: str = ""  # .jsonl files of items, with a comma between them
    n_items: int = 300  # of each file
    baseline: str = "vanilla"  # tables: what others are compared with
    device: str = "auto"  # auto: cuda, else mps, else cpu


def bounds(run, folders, n_texts):
    """Nats per token, and nats of each text, on the validation texts of each folder."""
    B = run.checkpoint["run_config"]["micro_batch_size"]
    for folder in folders:
        get_batch, n, _ = validation(run.checkpoint, folder, n_texts)
        for visible in (False, True):
            batches = keep_first_visible(get_batch) if visible else get_batch
            mean, se, nats, tokens = validate(run.model, batches, B, n, "float32")
            row = Path(folder).name + ", first token visible" * visible
            texts = {"nats": numbers(nats), "tokens": tokens.long().tolist()}
            yield {"table": "bound", "row": row, "mean": mean, "se": se, **texts}


def writing(run, cfg, length):
    """Where attention is while texts are written with length tokens given: a row for each layer, means over
    texts, and the first text with its positions step by step."""
    settings = SinksConfig(limit=cfg.limit, prompt_length=length, steps=cfg.steps)
    run.take_texts(settings)
    look_at(run, settings)
    for number, layer in enumerate(run.layers):
        yield {"table": "writing", "row": f"layer {number}", "given": length, **layer}
    first = run.prompts[0]
    text = {"tokens": first["tokens"], "steps": first["steps"], "text": run.tokenizer.decode(first["tokens"])}
    for key in ("position", "top"):
        text[key] = [layer[key] for layer in first["layers"]]
    yield {"table": "first text", "row": "", "given": length, **text}


def items(run, paths, n_items):
    """log p and accuracy of each item of each file, by the chain rule."""
    cfg = EvalConfig(nll_type="chain_rule", dtype="float32")
    for path in paths:
        records = []
        for item in tqdm(read_items(path)[:n_items], desc=path, disable=None):
            records.append(score_item(run.model, run.tokenizer, item, cfg))
        keys = [key for key in ("log_p", "acc", "acc_norm", "cut") if key in records[0]]
        yield {"table": "items", "row": Path(path).stem, **{key: [r[key] for r in records] for key in keys}}


def measure(path, folders, cfg):
    parts = set(cfg.parts.split(","))
    if wrong := parts - {"bound", "attention", "writing", "items"}:
        raise ValueError(f"parts are bound, attention, writing and items; got {', '.join(sorted(wrong))}")
    _, _, device = setup_distributed(cfg.device)
    torch.set_float32_matmul_precision("highest")  # no TF32
    all_hidden = SinksConfig(limit=64, prompt_length=0)
    run = Run(path, all_hidden, device)
    step, facts = run.checkpoint["step"], made_by() | {"settings": asdict(cfg), "folders": folders}
    rows = [{"table": "facts", "row": "", "config": run.checkpoint["run_config"], **facts}]
    if "bound" in parts:
        rows += bounds(run, folders, cfg.texts)
    if "attention" in parts:
        rows += attention_by_kind(run, [(step, run.model)], all_hidden, device)
    if "writing" in parts:
        for length in (0, cfg.prompt_length):
            rows += writing(run, cfg, length)
    if "items" in parts:
        rows += items(run, cfg.items.split(","), cfg.n_items)
    write_measured(path, [row | {"step": step} for row in rows])


# ---------- Tables and a picture


def read_arms(folder):
    """{(table, row, given): {name: {seed: row}}}"""
    tables = {}
    for name, seed, row in measured_rows(folder):
        arms = tables.setdefault((row["table"], row["row"], row.get("given")), {})
        arms.setdefault(name, {})[seed] = row
    return tables


def print_values(title, arms, key, baseline):
    """Means over seeds of row[key], and how much more that is than the baseline's with the same seeds."""
    print(f"\n{title:<42}  seeds{'mean':>18}{f'more than {baseline}':>22}{'95 % interval':>20}")
    values = {}
    for name, seeds in arms.items():
        values[name] = {seed: np.mean(row[key]) for seed, row in seeds.items()}
    for name, seeds in values.items():
        mean, error = mean_and_error(list(seeds.values()))
        more, interval = compare(seeds, values[baseline]) if name != baseline else ("-", "-")
        print(f"{name:<42}{len(seeds):>7}{f'{mean:.4f} ± {error:.4f}':>18}{more:>22}{interval:>20}")


def print_pairs(arms, key, baseline):
    """The same on each text or item: means over the seeds that both have, ± standard error over texts."""
    for name in [name for name in arms if name != baseline]:
        shared = arms[name].keys() & arms[baseline].keys()
        if not shared:
            continue
        pairs = [(arms[name][seed][key], arms[baseline][seed][key]) for seed in shared]
        more = np.mean([np.subtract(ours, theirs, dtype=float) for ours, theirs in pairs], axis=0)
        mean, error = mean_and_error(more)
        if key == "nats":  # of texts at different noise levels
            tokens = torch.tensor(arms[name][min(shared)]["tokens"]).double()
            mean, error = train.bound_and_error(torch.from_numpy(more), tokens, spread_levels(len(more)))
        print(f"{name}: {mean:.4f} ± {error:.4f} more than {baseline}, over {len(more)} texts")


def by_layer(results, table):
    """{(name, seed, given): rows of the layers 0, 1, ...} of a table."""
    runs = {}
    for (name_of_table, _, given), arms in results.items():
        if name_of_table == table:
            for name, seeds in arms.items():
                for seed, row in seeds.items():
                    runs.setdefault((name, seed, given), []).append(row)
    return runs


def print_writing(results):
    """Means over layers while texts are written, of the runs in which that was measured."""
    keys = ["share", "norm", "heads", "moves", "on_sink", "content_moves"]
    print(f"\n{'while texts are written':<26}{'given':>6}" + "".join(f"{key:>15}" for key in keys))
    for (name, seed, given), rows in by_layer(results, "writing").items():
        run = results["facts", "", None][name][seed]["config"]
        means = {key: np.mean([row[key] for row in rows]) for key in rows[0] if key in [*keys, "top"]}
        means["share"] = means["top"] / (run["block_size"] + run["n_sink"])
        cells = [f"{means[key]:>15.3f}" if key in means else f"{'-':>15}" for key in keys]
        print(f"{name:<26}{given:>6}" + "".join(cells))


def print_deep(results):
    """Means over the layers from 12 on: the sink rate over seeds, and the norm while texts are written."""
    for table, key in (("attention", "rate"), ("writing", "norm")):
        print(f"\n{key}, layers 12 and on ({table})")
        deep = {}
        for (name, _, given), rows in by_layer(results, table).items():
            if len(rows) > 12:
                deep.setdefault((name, given), []).append(np.mean([row[key] for row in rows[12:]]))
        for (name, given), values in deep.items():
            print(f"{name:<20}{'' if given is None else f'{given} given':<12}{np.mean(values):.4f}")


@torch.no_grad()
def print_sinks(path, folder):
    """On held-out texts of a folder: the sink rate, and which content token gets the most attention, where no
    end-of-text is visible and the leftmost visible token is no punctuation: how often, from layer 12 on, it
    is that token, the leftmost visible punctuation, or any punctuation."""
    cfg = SinksConfig(limit=64, prompt_length=0, data=folder)
    run = Run(path, cfg, "cpu")
    rates = [np.mean(row["rate"]) for row in attention_by_kind(run, [(0, run.model)], cfg, "cpu")]
    early, late = np.mean(rates[3:11]), np.mean(rates[12:])
    print(f"{path}, {folder}: sink rate {early:.3f} in layers 3 to 10, {late:.3f} from layer 12 on")
    kinds, n_sink = kinds_of(run.x0, run.tokenizer), run.model.config.n_sink
    noise = torch.rand(run.x0.shape, generator=torch.Generator().manual_seed(0))
    for t in (0.5, 0.8):
        xt, masked = mask_tokens(run.x0, torch.tensor([[t]]), run.maskable, run.model.config.mask_id, noise)
        is_mark = (kinds == KINDS.index("punctuation")) & ~masked
        is_eot = (kinds == KINDS.index("end-of-text")) & ~masked
        leftmost, mark = (~masked).int().argmax(dim=1), is_mark.int().argmax(dim=1)
        texts = is_mark.any(dim=1) & ~is_eot.any(dim=1) & (leftmost != mark)
        hits = []
        for weights, _ in islice(attention_maps(run.model, xt), 12, None):
            top = weights[:, :, n_sink:, n_sink:].mean(dim=(1, 2)).argmax(dim=1)
            on_mark = is_mark.gather(1, top[:, None])[:, 0]
            hit = torch.stack((top == leftmost, top == mark, on_mark), dim=1)  # (n, 3)
            hits.append(hit[texts].float().mean(dim=0))
        shares = torch.stack(hits).mean(dim=0).tolist()
        words = ("leftmost token", "leftmost punctuation", "any punctuation")
        shown = ", ".join(f"{word} {share:.3f}" for word, share in zip(words, shares))
        print(f"  {t:.0%} hidden, {texts.sum()} texts: {shown}")


def draw_rates(figure, results):
    """The sink rate of each layer: mean over heads, a line for each run, a color for each arm."""
    axes, colors = figure.subplots(), {}
    for (name, _, _), rows in by_layer(results, "attention").items():
        label = None if name in colors else name
        color = colors.setdefault(name, f"C{len(colors)}")
        axes.plot([np.mean(row["rate"]) for row in rows], color=color, label=label)
    axes.set(xlabel="layer", ylabel="share of heads and texts in which\none key gets more than 0.3")
    axes.legend(loc="center right")


def tables(folder, baseline):
    results = read_arms(folder)
    if baseline not in results.get(("facts", "", None), {}):
        raise ValueError(f"{folder} has no run {baseline}-SEED with measured.jsonl; set another --baseline")
    for (table, row, _), arms in results.items():
        if table == "bound":
            print_values(f"nats per token, {row}", arms, "mean", baseline)
            print_pairs(arms, "nats", baseline)
        if table == "items":
            for key in ("acc", "log_p"):
                print_values(f"{key}, {row}", arms, key, baseline)
                print_pairs(arms, key, baseline)
    print_writing(results)
    print_deep(results)
    if not any(table == "attention" for table, *_ in results):
        return
    figure = configurator.need("matplotlib.figure", "matplotlib").Figure(figsize=(7, 4), layout="constrained")
    draw_rates(figure, results)
    write_file(f"{folder}/rates.png", figure.savefig)
    print(f"wrote {folder}/rates.png")


def main():
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    cfg, _ = configurator.parse(AdaptConfig, sys.argv[1 + len(names) :])
    if names[:1] == ["measure"] and len(names) > 2:
        measure(names[1], names[2:], cfg)
    elif names[:1] == ["tables"] and len(names) == 2:
        tables(names[1], cfg.baseline)
    elif names[:1] == ["sinks"] and len(names) > 2:
        for folder in names[2:]:
            print_sinks(names[1], folder)
    else:
        wanted = "measure RUN DATA [DATA ...] [--key=value ...], tables FOLDER, or sinks RUN DATA [DATA ...]"
        raise ValueError(f"wanted: {wanted}")


if __name__ == "__main__":
    configurator.run(main)
