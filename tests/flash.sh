#!/bin/sh
# flash.sh DSV4 MKMODEL -- a model of V4-Flash's true widths, 4 layers of 256 experts (16.4 GB),
# answers a text file under three budgets; the answers must be the same.
set -eu
dsv4=$1 mkmodel=$2 model=build/flash4
[ -e $model/config.json ] || "$mkmodel" flash $model --layers 4 --seed 1
first=
for ram in 3G 6G 12G; do
    echo "+ $dsv4 run -m $model -f tests/demo.txt -n 128 --ram $ram"
    ids=$("$dsv4" run -m $model -f tests/demo.txt -n 128 --ram $ram --print-ids)
    echo "answer: $ids"
    [ "${first:=$ids}" = "$ids" ] || { echo "FAIL flash: --ram $ram changes the answer"; exit 1; }
done
echo "ok   flash: the same answer under 3G, 6G and 12G"
