# The 34M model of the size table on TinyStories, with GPT-2's BPE.
#   python prepare_data.py tinystories
#   torchrun --standalone --nproc_per_node=8 train.py config/tinystories_34m.py
# Cost: 20,000 steps of 131,072 tokens (2.6B), about 5e17 FLOPs in the blocks and as many in the output head.
# Result: not run.
dataset = "tinystories"
out_dir = "out/tinystories-34m"

preset = "34M"
sink_attention = "split"  # the same as "mask", without a mask that keeps attention off the flash kernel
block_size = 512

batch_size = 256
micro_batch_size = 32
max_steps = 20000
random_length = 0.01
eval_interval = 1000
compile = True
