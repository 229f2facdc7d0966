#!/bin/sh
# Usage: try_wheel.sh PYTHON WHEEL - install the wheel into a fresh environment and use it outside the checkout.
set -eu
python=$1
wheel=$(realpath "$2")
constraints=$(realpath constraints.txt)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH CLOSE_ENGINE_DATABASE
"$python" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --quiet --disable-pip-version-check --constraint "$constraints" "$wheel"
PATH=$place/venv/bin:$PATH
mkdir "$place/elsewhere"
cd "$place/elsewhere"
# Minimal tables of a CRM are made only for who asks for them.
if close-engine migrate 2>refusal; then
    echo "close-engine migrate made tables of a CRM that nobody asked for" >&2
    exit 1
fi
grep --quiet -e --standalone refusal
close-engine migrate --standalone && close-engine demo --leads 40
close-engine verify
# The oldest version of what runs the transition table decides as the newest does.
pip install --quiet --quiet --disable-pip-version-check transitions==0.9.0
close-engine demo --leads 40 >oldest
grep --quiet 'The history replays' oldest
