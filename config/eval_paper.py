# The zero-shot columns of the paper's Tables 1 and 2, each task with the authors' estimator and guidance (ARC-c has none of its own
# on record, and takes ARC-e's). GSM8K, the last column, is measured on the fine-tuned model: eval.py --task=gsm8k.
#   pip install lm-eval
#   torchrun --standalone --nproc_per_node=8 eval.py config/eval_paper.py --out_dir=out/472m-sink
# Cost: 1,024 draws of every Monte-Carlo request, each with two forward passes. Result: not run here.
_mc = "nll_type=mc:mc_num=1024:mc_masking=coins"
_chain = "nll_type=chain_rule"
task = ",".join(
    [
        f"lambada_standard:{_chain}:cfg_scale=1.1",
        f"openbookqa:{_chain}:cfg_scale=1.6",
        f"boolq:{_chain}:cfg_scale=1.6",
        f"piqa:{_chain}:cfg_scale=0.6",
        f"arc_easy:{_mc}:cfg_scale=0.6",
        f"arc_challenge:{_mc}:cfg_scale=0.6",
        f"social_iqa:{_mc}:cfg_scale=0.6",
        f"race:{_mc}:cfg_scale=0.7",
        f"hellaswag:{_mc}:cfg_scale=0.7",
    ]
)
