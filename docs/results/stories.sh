#!/bin/sh
# Trains the models of docs/results.md, one process per core. Stop it at any time and start it again: finished
# runs are skipped, the others resume. The pictures need matplotlib.
export OMP_NUM_THREADS=1
for seed in 0 1 2; do
    echo vanilla-$seed --seed=$seed --n_sink=0
    echo sink-$seed --seed=$seed --n_sink=1
    echo gate-$seed --seed=$seed --n_sink=0 --gated_attention=True
    echo register-$seed --seed=$seed --n_sink=1 --sink_attends_all=True
done | xargs -P "$(getconf _NPROCESSORS_ONLN)" -L 1 sh -c '
    out=out/stories/$0
    [ -e $out/done ] && exit
    if [ -e $out/ckpt.pt ]; then how=resume; else how=scratch; rm -rf $out; mkdir -p $out; fi
    echo "$0: $how, see $out/output.txt"
    python train.py config/stories.py --init_from=$how --out_dir=$out "$@" >> $out/output.txt &&
    python -m docs.results.study measure $out --limit=64 --prompt_length=0 --remasking=random --temperature=1 \
        --steps=128 --mc_num=1 >> $out/output.txt && touch $out/done' &&
python -m extras.ablations out/stories --baseline=vanilla --plot &&
python -m docs.results.study tables out/stories
