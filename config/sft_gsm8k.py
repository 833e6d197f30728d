# The paper's fine-tuning on GSM8K: two-stage examples of the 385,620 augmented training lines, ten epochs.
#   python prepare_data.py gsm8k
#   torchrun --standalone --nproc_per_node=8 sft_gsm8k.py config/sft_gsm8k.py
#   torchrun --standalone --nproc_per_node=8 eval.py --task=gsm8k --out_dir=out/sft-gsm8k
# Another arm needs --init_from and --out_dir, no more.
# Cost: about 30,000 steps of 256 x 256 tokens (2.0B tokens, 5.6e18 FLOPs of the 472M model). Result: not
# run; the paper reports 35.17 with the sink token, 34.95 without, 36.39 with the gate.
dataset = "gsm8k"
init_from = "out/472m-sink"
out_dir = "out/sft-gsm8k"

block_size = 256
epochs = 10
batch_size = 256
micro_batch_size = 32
learning_rate = 2e-4
min_lr = 2e-5
warmup = 0.01
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 1000
log_interval = 10
