# Four kinds of model on real text, three seeds each: docs/results.md has the question and the answer.
#   python prepare_data.py stories --source=stories.txt --tokenizer=gpt2 --vocab_size=1024 --val_fraction=0.05
#   sh docs/results/stories.sh
# Cost: 4,000 steps of 2,048 tokens, a quarter of an hour on one core.
dataset = "stories"
out_dir = "out/stories/sink-0"

n_layer = 4
n_head = 4
n_embd = 96
block_size = 128

max_steps = 4000
stratified_t = True
keep_all = True
log_interval = 250
