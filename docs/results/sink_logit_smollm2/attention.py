import sys

import torch

from eval import validation
from extras.sinks import attention_maps
from sample import load_trained

for path in sys.argv[1:]:  # 64 held-out texts of 64 tokens, half of them hidden
    model, _, checkpoint = load_trained(path, "cpu")
    get_batch, n, _ = validation(checkpoint, None, 64)
    x0 = torch.cat([get_batch("val", index)[0] for index in range(n // 8)])
    noise = torch.rand(x0.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = [w for w, _ in attention_maps(model, torch.where(noise < 0.5, model.config.mask_id, x0))]
    share = torch.stack([1 - w.sum(dim=-1).mean(dim=(0, 2)) for w in weights])  # (layer, head)
    rate = [(w.mean(dim=2).amax(dim=-1) > 0.3).float().mean().item() for w in weights]
    largest = max(block.attn.sink_logit.abs().max().item() for block in model.blocks)
    print(
        f"{path}: logit gets {share[12:].mean():.3f} in layers 12 to 29, sink rate there "
        f"{sum(rate[12:]) / 18:.2f}, largest logit {largest:.4f}"
    )

# out/adapt/logit-0: logit gets 0.019 in layers 12 to 29, sink rate there 0.70, largest logit 0.0056
# out/adapt/logit-1: logit gets 0.126 in layers 12 to 29, sink rate there 0.51, largest logit 0.0054
# out/adapt/logit-2: logit gets 0.021 in layers 12 to 29, sink rate there 0.68, largest logit 0.0053
