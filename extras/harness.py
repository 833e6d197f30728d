"""A model of this project in lm-evaluation-harness, as `mdm`. The harness's own command line takes over.

    python -m extras.harness --model mdm --model_args out_dir=out/x,mc_num=128,cfg_scale=0.6 --tasks piqa
    torchrun --nproc_per_node=8 -m extras.harness --model mdm --model_args out_dir=out/x --tasks hellaswag

--model_args are settings of eval.py, explained by `python eval.py --help`. All other options, the cache and
the tables are the harness's: `python -m extras.harness run --help`. It needs: pip install lm-eval
"""

import zlib

import torch
from tqdm import tqdm

import configurator
from eval import EvalConfig, encode_pair, greedy_match, log_likelihood
from model import generate, seed_for
from sample import load_trained, without_last_blank
from train import autocast, setup_distributed

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # main says how to install it
    LM = object


class Harness(LM):
    """A checkpoint that answers the harness's three kinds of requests. settings: fields of EvalConfig."""

    def __init__(self, **settings):
        super().__init__()
        for key in ("max_batch_size", "trust_remote_code"):  # which lm-eval may add
            settings.pop(key, None)
        for key in {"task", "data", "limit", "length", "temperature", "results", "delimiter"} & {*settings}:
            raise ValueError(f"{key} is no model_arg; the harness has options of its own for it")
        for key, value in settings.items():
            settings[key] = configurator.convert(EvalConfig, key, str(value), "model_args")
        self.cfg = EvalConfig(**settings)
        self._rank, self._world_size, self._device = setup_distributed(self.cfg.device)
        self.precision = autocast(self._device, self.cfg.dtype)
        self.model, self.tokenizer, _ = load_trained(self.cfg.out_dir, self.device)
        self.block_size = self.model.config.block_size

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """From model_args, and from --batch_size and --device unless they are the harness's defaults."""
        defaults = (None, 1, "1", "auto", "cuda:0")
        options = {k: v for k, v in (additional_config or {}).items() if v not in defaults}
        return cls(**options | arg_dict)

    def loglikelihood(self, requests):
        """(log p in nats, whether greedy decoding writes it) of each (context, continuation)."""
        results, pairs = [], [encode_pair(self.tokenizer, *r.args, self.block_size) for r in requests]
        print(f"{sum(n_cut > 0 for *_, n_cut in pairs):,} of {len(pairs):,} contexts are cut on the left")
        for request, (*pair, _) in zip(tqdm(requests, "loglikelihood", disable=self.rank > 0), pairs):
            log_p = log_likelihood(self.model, *pair, self.cfg)
            results.append((log_p, greedy_match(self.model, *pair, self.cfg)))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])  # for --use_cache
        return results

    def loglikelihood_rolling(self, requests):
        """log p of each text, in windows that fill the model. The context of the first window is end-of-text,
        that of the next ones the token before, that of the last one as many tokens as there is room for."""
        results = []
        for request in tqdm(requests, "loglikelihood_rolling", disable=self.rank > 0):
            ids, eot_id = self.tokenizer.encode_ordinary(request.args[0]), self.tokenizer.eot_token
            pairs = map(make_disjoint_window, get_rolling_token_windows(ids, eot_id, self.block_size - 1, 1))
            results.append(sum(log_likelihood(self.model, *pair, self.cfg) for pair in pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests):
        """The text behind each context, up to end-of-text or the first of its stops. A long context is cut on
        the left, but the text leaves it at least half of block_size."""
        texts, n_cut, seen, eot_id = [], 0, {}, self.tokenizer.eot_token
        for request in tqdm(requests, "generate_until", disable=self.rank > 0):
            options = normalize_gen_kwargs(request.args[1])
            context = without_last_blank(request.args[0], self.tokenizer, self.model.config.vocab_size)
            ids = self.tokenizer.encode_ordinary(context) or [eot_id]
            n_new = min(options["max_gen_toks"], max(self.block_size - len(ids), self.block_size // 2))
            prompt = ids[-(self.block_size - n_new) :]
            n_cut += len(prompt) < len(ids)
            key = zlib.crc32(str(request.args).encode())
            seen[key] = seen.get(key, -1) + 1  # a task may ask the same several times, to vote
            decoding = {k: getattr(self.cfg, k) for k in ("steps", "remasking", "threshold", "cfg_scale")}
            decoding |= {"temperature": options.get("temperature", 0), "eot_id": eot_id}
            x = torch.tensor([prompt + [self.model.config.mask_id] * n_new])
            with self.precision:
                x, _ = generate(self.model, x, **decoding, seeds=[seed_for(self.cfg.seed, key, seen[key])])
            ids = [*x[0, len(prompt) :].tolist(), eot_id]
            text = self.tokenizer.decode(ids[: ids.index(eot_id)])
            for stop in options["until"]:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        print(f"{n_cut:,} of {len(texts):,} contexts were cut on the left")
        return texts

    def gather_object(self, obj, dst=0):
        """Under torchrun the harness gives each process a share of the requests, and gathers the results."""
        objects = [None] * self.world_size
        torch.distributed.all_gather_object(objects, obj)
        return objects

    def all_gather(self, tensor):
        return torch.stack(self.gather_object(tensor.cpu()))


def main():
    harness = configurator.need("lm_eval.__main__", "lm-eval")
    register_model("mdm")(Harness)
    harness.cli_evaluate()


if __name__ == "__main__":
    configurator.run(main)
