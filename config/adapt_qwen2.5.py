# The paper's 0.5B model from Qwen2.5-0.5B (Table 1), with one sink token.
#   hf download Qwen/Qwen2.5-0.5B --local-dir qwen2.5-0.5b    # of the package huggingface_hub
#   python -m extras.convert causal --source=qwen2.5-0.5b --out_dir=out/qwen2.5-0.5b
#   python prepare_data.py fineweb --source=hub:HuggingFaceFW/fineweb@sample-100BT \
#     --tokenizer=qwen2.5-0.5b/tokenizer.json --max_tokens=30e9
#   torchrun --standalone --nproc_per_node=8 train.py config/adapt_qwen2.5.py
# Other arms: convert with --n_sink=0, or also --gated_attention=True, and change --init_from and --out_dir.
# The 1.5B model: Qwen2.5-1.5B, 100e9 tokens, --batch_size=4096 --micro_batch_size=4 --max_steps=11921.
# Cost: 28,610 steps of 512 x 2048 tokens (30B), 6.4e19 FLOPs in the blocks (1.5B: 7.9e20); 10 GB (28 GB) for
# weights, gradients and AdamW, before activations. Result: not run; docs/weights.md has the paper's.
dataset = "fineweb"
init_from = "out/qwen2.5-0.5b"
out_dir = "out/qwen2.5-0.5b-sink"

block_size = 2048
sink_attention = "split"  # the same as "mask", without a mask that keeps attention off the flash kernel

batch_size = 512
micro_batch_size = 8
max_steps = 28610
learning_rate = 1e-4
min_lr = 1e-5
warmup = 0.01
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 1000
log_interval = 10
compile = True
