#!/bin/sh
# Says all at once what this machine lacks to set up pi05_ros's environment.
# Usage: check_host.sh PYTHON
python=$1
missing=
packages=

lacks() {
    missing="$missing
  - $1"
    case " $packages " in
        *" $2 "*) ;;
        *) packages="$packages $2" ;;
    esac
}

if ! command -v "$python" >/dev/null 2>&1; then
    lacks "$python: not found" python3
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    lacks "$python is $("$python" --version 2>&1); 3.10 or later is needed: make PYTHON=python3.12 ..." ''
else
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        lacks "$python has no module venv with ensurepip" python3-venv
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        lacks "$python has no C headers (Python.h), which the generated messages include" python3-dev
fi
for compiler in "${CC:-cc}" "${CXX:-c++}"; do
    command -v "$compiler" >/dev/null 2>&1 ||
        lacks "$compiler: not found; the messages are compiled with a C and a C++ compiler" build-essential
done

[ -z "$missing" ] && exit 0
echo "pi05_ros cannot be set up on this machine:$missing" >&2
set -- $packages
[ $# -eq 0 ] || echo "On Debian or Ubuntu: apt install $*" >&2
exit 1
