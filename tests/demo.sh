#!/bin/sh
# demo.sh DSV4 MKMODEL -- write a small checkpoint and let it answer a text file.
set -eu
dsv4=$1 mkmodel=$2 model=build/demo
run() { echo "+ $*"; "$@"; }
[ -e $model/config.json ] ||
    run "$mkmodel" tiny $model --experts 64 --seed 1
run "$dsv4" check $model
echo "The weights are random, so the answer is noise; the path it takes is the real one."
run "$dsv4" run -m $model -f tests/demo.txt -n 48 --no-think --ram 24M
