# A model of 3.5M parameters (not counting embeddings) on WikiText-2, to look for attention sinks in it.
#   python prepare_data.py wikitext2 --tokenizer=gpt2 --vocab_size=4096
#   python train.py config/wikitext2.py
#   python train.py config/wikitext2.py --n_sink=0 --out_dir=out/wikitext2-vanilla
#   python -m extras.sinks out/wikitext2 out/wikitext2-vanilla --plot
# Cost: 5,000 steps of 2,048 tokens (10.2M), 57 minutes for each on one core.
# Result, with a BPE of 4,096 tokens trained on the corpus: validation bounds of 5.07 and 5.06 nats per token;
# docs/sinks.md has the rest.
dataset = "wikitext2"
out_dir = "out/wikitext2"

n_layer = 6
n_head = 6
n_embd = 192
block_size = 128

max_steps = 5000
stratified_t = True
learning_rate = 1.5e-3
min_lr = 1.5e-4
warmup = 0.02
