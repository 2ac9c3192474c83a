#!/bin/sh
# style.sh -- STYLE.md 2.10 as a test: functions <= 70 lines, lines <= 100 columns, no getenv
# outside main.c, no unfinished marks, and the size budget.
bad=0
say() { # say NAME OUTPUT: a test passes when there is nothing to complain of
    if [ -z "$2" ]; then echo "ok   style: $1"
    else echo "FAIL style: $1"; echo "$2" | sed 's/^/     /'; bad=1; fi
}
src="dsv4.h dsv4.c kernels.cu kernels.c cuda.c offload.c kv.c text.c main.c"
tests=$(ls tests/*.c tests/*.h)
say "functions have at most 70 lines" "$(awk '
    FNR == 1 { s = 0 }
    /^[A-Za-z_].*[^:;]$/ { s = FNR }
    /^}/ { if (s && FNR - s >= 70) print FILENAME ":" s ": " FNR - s + 1 " lines"; s = 0 }
    ' $src $tests)"
say "lines have at most 100 columns" "$(LC_ALL=C.UTF-8 awk '
    length > 100 { print FILENAME ":" FNR }' $src $tests tests/*.py tests/*.sh Makefile)"
say "no getenv outside main.c" "$(grep -n getenv $(echo $src | sed 's/ main.c//'))"
say "no unfinished marks" "$(grep -nE '\<(TO''DO|FIX''ME|XX''X)\>' $src $tests tests/*.py)"
say "no tabs or trailing blanks" "$(grep -nP '\t|[ \t]+$' $src $tests tests/*.py)"
say "at most 12,400 lines" "$(cat $src | wc -l | awk '$1 > 12400 { print $1 }')"
exit $bad
