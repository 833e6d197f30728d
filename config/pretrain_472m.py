# The paper's 0.5B model from scratch (Table 2), with one sink token.
#   python prepare_data.py slimpajama --max_tokens=120e9
#   torchrun --standalone --nproc_per_node=8 train.py config/pretrain_472m.py
# Other arms: --n_sink=0 --out_dir=out/472m-vanilla (the paper's DLM row), or
# --n_sink=0 --gated_attention=True --out_dir=out/472m-gate.
# The paper uses the 32,000 tokens of Llama 2 (--tokenizer=TinyLlama/TinyLlama_v1.1), GPT-2 has 50,257.
# Cost: 300e18 FLOPs = 202,089 steps of 256 x 2048 tokens (106B). Result: not run; the README has the paper's.
dataset = "slimpajama"
out_dir = "out/472m-sink"

preset = "472M"
block_size = 2048
n_sink = 1
sink_attention = "split"  # the same as "mask", without a mask that keeps attention off the flash kernel

batch_size = 256
micro_batch_size = 8
train_flops = 300e18
random_length = 0.01
learning_rate = 2e-4
min_lr = 2e-5
warmup = 0.01
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 2000
log_interval = 10
