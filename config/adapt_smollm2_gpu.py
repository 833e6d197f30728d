# SmolLM2-135M, a causal model, made an MDM on one GPU. docs/adapt.md has commands and results.
# Cost: 300 steps of 64 x 128 tokens (2.5M, once through WikiText-2), about 16 GB of a GPU.
# For an afternoon: --dataset=tinystories --max_steps=8000 (66M tokens; not run).
dataset = "wikitext2"
data_dir = "data-smollm2"
init_from = "out/smollm2/sink"
out_dir = "out/adapt_gpu/sink-0"

block_size = 128
batch_size = 64
micro_batch_size = 64
max_steps = 300
learning_rate = 2e-4
warmup = 0.1
eval_interval = 50
eval_seqs = 256
log_interval = 50
