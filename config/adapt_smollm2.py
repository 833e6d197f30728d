# SmolLM2-135M, a causal model, made an MDM on a laptop. docs/adapt.md has commands and results.
# Cost: 160 steps of 8 x 64 tokens (82k), 11 minutes on one core, 3.5 GB of memory.
dataset = "stories"
data_dir = "data-smollm2"
init_from = "out/smollm2/sink"
out_dir = "out/adapt/sink-0"

block_size = 64
batch_size = 8
micro_batch_size = 8
max_steps = 160
learning_rate = 2e-4
warmup = 0.1
eval_interval = 40
eval_seqs = 128
log_interval = 10
