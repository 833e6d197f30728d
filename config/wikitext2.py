# A model of 2.7M parameters (not counting embeddings) on WikiText-2: the smallest in which to look for attention sinks.
#   python prepare_data.py wikitext2 --tokenizer=bpe
#   python train.py config/wikitext2.py
#   python train.py config/wikitext2.py --n_sink=0 --out_dir=out/wikitext2-vanilla
# Cost: 5,000 steps of 2,048 tokens = 10.2M tokens, about half an hour on two cores.
dataset = "wikitext2"
out_dir = "out/wikitext2"

n_layer = 6
n_head = 6
n_embd = 192
block_size = 128

batch_size = 16
micro_batch_size = 16
max_steps = 5000
stratified_t = True
learning_rate = 1.5e-3
min_lr = 1.5e-4
warmup = 0.02

eval_interval = 500
