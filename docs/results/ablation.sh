#!/bin/sh
# Trains the models of docs/sinks.md ("Train with other sinks") and its control. Stop it at any time and start
# it again: finished runs are skipped, the others start anew. About two hours on one core.
export OMP_NUM_THREADS=1
run() {  # run SCRIPT FOLDER/NAME-SEED [--key=value ...]
    script=$1 out=out/$2
    shift 2
    [ -e "$out/done" ] && return
    rm -rf "$out" && mkdir -p "$out"
    echo "$out"
    python -m "$script" config/ablation.py --out_dir="$out" "$@" > "$out/output.txt" && touch "$out/done"
}
for seed in 0 1 2 3 4; do
    run train ablation/0-sinks-$seed --seed=$seed --n_sink=0
    run train ablation/1-sink-$seed --seed=$seed --n_sink=1
    for n in 0 1; do  # trained with the anchor; trained as ever, but validated with it
        run docs.results.anchor anchor/anchored-$n-$seed --seed=$seed --n_sink=$n
        run docs.results.anchor anchor/validated-$n-$seed --seed=$seed --max_steps=0 \
            --init_from=out/ablation/$n-sink$([ $n = 0 ] && echo s)-$seed
    done
    run train ablation/register-$seed --seed=$seed --sink_attends_all=True
    run train ablation/gate-$seed --seed=$seed --n_sink=0 --gated_attention=True
done
for seed in 0 1 2 3; do
    run train ablation/2-sinks-$seed --seed=$seed --n_sink=2
    run train ablation/4-sinks-$seed --seed=$seed --n_sink=4
    run train ablation/end-$seed --seed=$seed --sink_position=end
    run train ablation/gate-sink-$seed --seed=$seed --gated_attention=True
    run train ablation/zero-value-$seed --seed=$seed --sink_zero_value=True
done
