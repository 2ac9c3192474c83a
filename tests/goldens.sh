#!/bin/sh
# goldens.sh PYTHON MKMODEL -- our own golden data for shapes that the given ones do not have.
set -eu
python=$1 mkmodel=$2 out=build/goldens
mkdir -p $out
make_one() { # make_one NAME N_TOKENS N_DECODE MKMODEL_ARGS...
    name=$1 n=$2 decode=$3; shift 3
    rm -rf "$out/$name"
    "$mkmodel" tiny "$out/$name" "$@"
    awk -v n="$n" 'BEGIN { srand(7); for (i = 0; i < n; i++) print int(rand() * 512) }' \
        >"$out/$name/ids.txt"
    "$python" tests/ref.py golden "$out/$name" "$out/$name/golden.safetensors" \
        --ids "$out/$name/ids.txt" --decode "$decode"
    echo "$out/$name/golden.safetensors"
}
make_one tiny-mtp 300 40 --mtp --seed 11
make_one tiny-many-experts 200 20 --experts 64 --hash-layers 0 --seed 12
make_one tiny-short 140 20 --layers 3 --experts 5 --hash-layers 3 --seed 13
"$python" tests/ref.py units $out/units.safetensors --seed 14
echo $out/units.safetensors
