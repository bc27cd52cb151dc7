#!/usr/bin/env bash
# One command from text to a chatbot: a vocabulary, a base model, SFT, RL, the exam.
#
#   bash config/speedrun.sh                             # a laptop, with what is on it
#   SOURCE="pages/*.parquet" DEPTH=4 bash config/speedrun.sh
#   GPUS=8 DEPTH=24 VOCAB=32768 CHAT=gsm8k bash config/speedrun.sh      # FineWeb-Edu, SmolTalk, GSM8K
#   DRY="--gpus=8xH100 --dollars_per_gpu_hour=3" ... bash config/speedrun.sh    # only what it takes
#
# Stop it at any moment and run it again: what is done is skipped, what was begun goes on.
set -euo pipefail
trap 'exit 130' INT TERM
cd "$(dirname "$0")/.."

DEPTH=${DEPTH:-2}               # layers of the model, see config/depth.py
VOCAB=${VOCAB:-4096}            # tokens of its vocabulary
CHAT=${CHAT:-arithmetic}        # what it learns to answer: arithmetic (made here) or gsm8k (the hub)
GPUS=${GPUS:-1}                 # processes
SOURCE=${SOURCE:-}              # text; by default Python's manual, with CHAT=gsm8k FineWeb-Edu
MORE=${MORE:-}                  # settings of all stages, such as --dtype=float32
DRY=${DRY:-}

stage() {   # folder, what it starts from, settings: skips what is done, goes on with what was begun
    local out=out-speedrun-$1 from=$2 launch=python
    shift 2
    if [ -n "$DRY" ]; then from=scratch; elif [ -e "$out/ckpt.pt" ]; then from=resume; fi
    if [ "$GPUS" -gt 1 ] && [ -z "$DRY" ]; then
        launch="torchrun --standalone --nproc_per_node=$GPUS"
    fi
    $launch train.py --depth="$DEPTH" --dataset="$text" ${DRY:+--dry_run=True $DRY} \
        config/depth.py config/speedrun.py "$@" --out_dir="$out" --init_from="$from" $MORE
}

if [ -n "$DRY" ] && [ -z "${IS_SUMMED:-}" ]; then     # run itself, and add up what the stages say
    IS_SUMMED=yes bash config/speedrun.sh | awk '{ print; gsub(",", "") }
        match($0, /[0-9.]+ hours at/) { hours += substr($0, RSTART) }
        match($0, /[0-9]+ dollars/) { dollars += substr($0, RSTART) }
        END { if (hours) printf "all stages: %.2f hours%s\n", hours,
              dollars ? sprintf(", %d dollars", dollars) : "" }'
    exit
fi

if [ -z "$DRY" ]; then
    if [ -z "$SOURCE" ] && [ "$CHAT" != gsm8k ]; then
        [ -e data/pydocs_char/input.txt ] || python data/pydocs_char/prepare.py
        SOURCE=data/pydocs_char/input.txt
    fi
    [ -e data/speedrun/meta.json ] || python -m extras.train_tokenizer --source="$SOURCE" \
        --vocab_size="$VOCAB" --out_dir=data/speedrun
    [ -e data/speedrun_text/meta.json ] || python data/fineweb/prepare.py --source="$SOURCE" \
        --tokenizer=data/speedrun --out_dir=data/speedrun_text --held_out=20
fi
# A dry run before there is any data assumes GPT-2's vocabulary.
text=speedrun_text
[ -e data/$text ] || text=fineweb
stage base scratch

if [ "$CHAT" = gsm8k ]; then
    for name in smoltalk gsm8k; do
        [ -n "$DRY" ] || [ -e data/$name/train.bin ] ||
            python data/$name/prepare.py --tokenizer=data/speedrun
    done
    stage chat out-speedrun-base config/smoltalk_sft.py
    stage sft out-speedrun-chat config/gsm8k_sft.py
    stage rl out-speedrun-sft config/gsm8k_rl.py
    task=gsm8k
else
    for name in arithmetic smalltalk; do
        folder=data/speedrun_$name
        [ -n "$DRY" ] || [ -e $folder/train.bin ] ||
            python data/$name/prepare.py --tokenizer=data/speedrun --out_dir=$folder
        [ -n "$DRY" ] || echo "from data.$name.prepare import *" > $folder/prepare.py
    done
    both=speedrun_arithmetic:0.85,speedrun_smalltalk:0.15
    [ -e data/speedrun_arithmetic ] || both=arithmetic:0.85,smalltalk:0.15
    stage sft out-speedrun-base config/arithmetic_sft.py --dataset=$both
    stage rl out-speedrun-sft config/arithmetic_rl.py --dataset=$both
    task=speedrun_arithmetic
fi
[ -n "$DRY" ] || python -m extras.evaluate --out_dir=out-speedrun-rl --task=$task --max_new_tokens=200
