#!/bin/sh
# Prints a Python >= 3.12 that can make a venv from PATH, pyenv or uv; says what to do if there is none.
# Debian's python3 lacks ensurepip unless python3-venv is installed.
recent() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

for name in python3.13 python3.12 python3.14 python3 python; do
    path=$(command -v "$name" 2>/dev/null) && recent "$path" && { echo "$path"; exit 0; }
done
for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
    [ -x "$path" ] && recent "$path" && { echo "$path"; exit 0; }
done
if command -v uv >/dev/null 2>&1; then
    path=$(uv python find '>=3.12' 2>/dev/null) || { uv python install 3.12 >&2 && path=$(uv python find '>=3.12'); }
    [ -n "$path" ] && recent "$path" && { echo "$path"; exit 0; }
fi
echo "jaxdet needs Python 3.12 or newer with venv and ensurepip, and found none on PATH, in pyenv or through uv." >&2
echo "Install one (python.org, Debian's python3-venv, 'pyenv install 3.12', or 'uv python install 3.12') and run make again." >&2
exit 1
