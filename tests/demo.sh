#!/bin/sh
# demo.sh DSV4 -- the demo model (tests/demo/README.md) says what words mean, at once and after a
# thought, and finds a code again in a long text with less memory than its weights take.
set -eu
dsv4=$1 model=tests/demo/model text=tests/demo/heldout/recall-1000-0
say() { printf '\n+ %s\n' "$*"; }
ask() { # ask QUESTION FLAGS...
    question=$1; shift
    say "$dsv4 run -m $model -p \"$question\" --temp 0 $*"
    "$dsv4" run -m $model -p "$question" --temp 0 "$@"
}
"$dsv4" check $model
ask "What is a ship?" --no-think -q
ask "What is a king?" --no-think -q
ask "What is a river?"

# the least that it can work with, and a little for experts
few="-f $text.txt --no-think --temp 0 -n 16 --backend cpu --no-cache --ram"
least=$("$dsv4" run -m $model $few 1M 2>&1 | sed -n 's/.*at least \([0-9]*\)M.*/\1/p')
printf '\n%s words of text; its last line: %s\n' "$(wc -w <$text.txt)" "$(tail -n 1 $text.txt)"
say "$dsv4 run -m $model $few $((least + 2))M"
"$dsv4" run -m $model $few $((least + 2))M
echo "(the text says $(cat $text.code))"
