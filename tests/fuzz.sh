#!/bin/sh
# fuzz.sh FUZZER... -- each for 60 s on a copy of its committed seeds; a finding stops with 1.
set -e
for f in "$@"; do
    name=${f##*/fuzz_}
    work=build/fuzz/corpus-$name
    mkdir -p "$work"
    echo "fuzz $name"
    "$f" -max_total_time=60 -timeout=10 -rss_limit_mb=4096 -print_final_stats=1 \
        -artifact_prefix="build/fuzz/$name-" "$work" "tests/seeds/$name" 2>"build/fuzz/$name.log" ||
        { tail -40 "build/fuzz/$name.log"; exit 1; }
    grep -E 'executed_units|peak_rss' "build/fuzz/$name.log"
done
