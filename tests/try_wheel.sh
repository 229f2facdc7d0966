#!/bin/sh
# Usage: try_wheel.sh PYTHON WHEEL - install the wheel into a fresh environment and use it outside the checkout.
set -eu
python=$1
wheel=$(realpath "$2")
constraints=$(realpath constraints.txt)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$constraints" "$wheel"
cd "$place"
"$place/venv/bin/close-engine" migrate --standalone
"$place/venv/bin/close-engine" verify
"$place/venv/bin/close-engine" demo --leads 40
