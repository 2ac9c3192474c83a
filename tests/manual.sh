#!/bin/sh
# manual.sh man|bash|zsh DSV4 -- the manual page or a shell's completion, made from what
# `dsv4 help` and `dsv4 help COMMAND` print, so that they cannot say anything else.
#
# "dsv4 help":     "  dsv4 NAME  USAGE  HELP"        two blanks or more between the columns
# "dsv4 help CMD": "  --flag VALUE    HELP"          VALUE absent for a switch
set -eu
form=$1 dsv4=$2
commands=$("$dsv4" help | sed -n 's/^  dsv4 \([a-z]*\) .*/\1/p')
usage() { "$dsv4" help "$1" | sed -n '1s/^dsv4 [a-z]* *//p'; }
about() { "$dsv4" help "$1" | sed -n '3s/\.$//p'; }
flags() { # flags COMMAND: a line "FLAG<tab>VALUE<tab>HELP" for each
    "$dsv4" help "$1" | sed -nE 's/^  (-[^ ]+) ([^ ]*) +([^ ].*)$/\1\t\2\t\3/p'
}

case $form in
man)
    echo ".TH DSV4 1 \"\" \"$("$dsv4" version)\" \"User Commands\""
    printf '.SH NAME\ndsv4 \\- run DeepSeek\\-V4 from its official checkpoint\n.SH SYNOPSIS\n.nf\n'
    for c in $commands; do
        printf '\\fBdsv4 %s\\fP %s\n' "$c" "$(usage "$c" | sed 's/-/\\-/g')"
    done
    echo .fi
    echo ".SH DESCRIPTION"
    echo "The answer goes to standard output, everything else to standard error."
    echo ".SH COMMANDS"
    for c in $commands; do
        printf '.SS %s\n%s.\n' "$c" "$(about "$c" | sed 's/-/\\-/g')"
        flags "$c" | sed 's/-/\\-/g' | awk -F '\t' '{ printf ".TP\n.B %s %s\n%s\n", $1, $2, $3 }'
    done
    printf '.SH EXIT STATUS\n0 done, 1 failed, 2 usage, 130 interrupted.\n' ;;
bash)
    echo '_dsv4() {'
    echo '    local cur=${COMP_WORDS[COMP_CWORD]} words='
    echo '    case $COMP_CWORD:${COMP_WORDS[1]} in'
    echo "    1:*) words='$(echo $commands)' ;;"
    for c in $commands; do
        words=$(flags "$c" | cut -f1)
        [ "$c" != help ] || words=$commands
        echo "    *:$c) words='"$words"' ;;"
    done
    echo '    esac'
    echo '    COMPREPLY=($(compgen -W "$words" -- "$cur"))'
    echo '}'
    echo 'complete -o default -F _dsv4 dsv4' ;;
zsh)
    echo '#compdef dsv4'
    echo 'local -a commands=('
    for c in $commands; do echo "  '$c:$(about "$c" | sed "s/'/'\\\\''/g")'"; done
    echo ')'
    echo 'if ((CURRENT == 2)); then _describe command commands; return; fi'
    echo 'shift words; ((CURRENT--))'
    echo 'case $words[1] in'
    for c in $commands; do
        printf '%s) _arguments' "$c"
        flags "$c" | sed "s/'/'\\\\''/g; s/[][]/\\\\&/g" | awk -F '\t' '{
            printf " \\\n  '\''*%s[%s]%s'\''", $1, $3, $2 == "" ? "" : ":" $2 ":_files" }'
        case $c in help) printf " ':command:(%s)'" "$(echo $commands)" ;;
                   check) printf " ':directory:_files -/'" ;; esac
        echo ' ;;'
    done
    echo esac ;;
esac
