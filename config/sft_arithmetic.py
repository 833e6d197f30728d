# The built-in word problems, answered in two stages: the small twin of sft_gsm8k.py, on a CPU.
dataset = "arithmetic"
init_from = "out/arithmetic"
out_dir = "out/sft-arithmetic"

block_size = 52
epochs = None
max_steps = 1500
batch_size = 64
micro_batch_size = 64
learning_rate = 2e-3
min_lr = 2e-4
warmup = 0.05

eval_interval = 250
eval_seqs = 512
log_interval = 50
