#!/bin/sh
# Trains and measures the models of docs/adapt.md. Stop it at any time and start it again: finished runs are
# skipped, the others resume.
#   sh docs/results/adapt.sh CONFIG FOLDER PROCESSES [--key=value ...]
#   sh docs/results/adapt.sh config/adapt_smollm2.py out/adapt 2        # on two cores
#   items=lambada.jsonl sh docs/results/adapt.sh config/adapt_smollm2_gpu.py out/adapt_gpu 4
config=$1 folder=$2 processes=$3
shift 3
export config folder settings="$*" items OMP_NUM_THREADS=1
{
    for seed in 0 1 2; do echo vanilla-$seed sink-$seed register-$seed; done
    for seed in 0 1 2; do echo gate-$seed visible-$seed; done
    echo vanilla_no_shift-0 sink_no_shift-0
} | xargs -P "$processes" -n 1 sh -c '
    out=$folder/$0 start=out/smollm2/${0%-*} script=train parts=bound,attention
    [ -e $out/done ] && exit
    case $0 in visible-*) start=out/smollm2/vanilla script=docs.results.anchor;; esac
    case $0 in *-0) parts=$parts,writing;; esac
    [ "$items" ] && parts=$parts,items
    [ -e $out/ckpt.pt ] && start=resume
    mkdir -p $out
    echo "$0 from $start, see $out/output.txt"
    python -m $script $config --init_from=$start --seed=${0##*-} --out_dir=$out $settings >> $out/output.txt 2>&1 &&
    python -m docs.results.adapt measure $out data-smollm2/stories data-smollm2/wikitext2 --parts=$parts \
        --items="$items" >> $out/output.txt 2>&1 && rm -f $out/best.pt && touch $out/done'
