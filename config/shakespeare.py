# A 6M-parameter model of Shakespeare, byte by byte. It is 1 MB of text, so the model starts to learn it by
# heart before the end.
#   python prepare_data.py shakespeare && python train.py config/shakespeare.py
# Cost: 5,000 steps of 16,384 tokens, minutes on a GPU (not run). On a CPU shrink it:
#   python train.py config/shakespeare.py --max_steps=2000 --device=cpu --n_layer=4 --n_embd=128 \
#     --batch_size=32 --micro_batch_size=32
# That takes half an hour on one core, to 1.96 nats per byte: words, no sentences (log:
# docs/results/shakespeare.jsonl).
dataset = "shakespeare"
out_dir = "out/shakespeare"

n_layer = 6
n_head = 4
n_embd = 256
block_size = 256

batch_size = 64
micro_batch_size = 64
max_steps = 5000
warmup = 0.02
eval_interval = 250
eval_seqs = 256
