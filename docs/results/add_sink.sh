#!/bin/sh
# Gives a trained vanilla model a sink token and trains it on, beside one that goes on without (docs/sinks.md).
export OMP_NUM_THREADS=1
for seed in 0 1 2; do
    start="--init_from=out/ablation/0-sinks-$seed --seed=$((seed + 10)) --max_steps=1000 --eval_interval=250"
    python train.py config/ablation.py $start --out_dir=out/add_sink/without-$((seed + 10))
    python train.py config/ablation.py $start --n_sink=1 --out_dir=out/add_sink/with-$((seed + 10))
done
python -m extras.ablations out/add_sink --baseline=without
