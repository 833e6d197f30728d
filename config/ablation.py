# The paper's ablations (Tables 3 to 5) in small: each arm for the same steps, with the same batches and
# masks for the same seed. docs/results/ablation.sh trains all of them.
#   python prepare_data.py
#   python train.py config/ablation.py --n_sink=2 --seed=1 --out_dir=out/ablation/2-sinks-1  # one run
#   python -m extras.ablations out/ablation  # the table of all that is there
# Cost: 2,000 steps of 1,024 tokens, two minutes on one core.
# Result: a validation loss of 0.726 without a sink and 0.686 with one, five seeds each.
# On a GPU, add flags such as --dataset=tinystories --preset=34M --block_size=512 --batch_size=256
# --max_steps=20000.
dataset = "arithmetic"
out_dir = "out/ablation/sink-0"

max_steps = 2000
stratified_t = True
eval_interval = 1000
eval_seqs = 1000
