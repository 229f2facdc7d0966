#!/bin/sh
# Usage: try_wheel.sh PYTHON WHEEL - install the wheel into a fresh environment and use it outside the checkout.
set -eu
python=$1
wheel=$(realpath "$2")
constraints=$(realpath constraints.txt)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH CLOSE_ENGINE_DATABASE
# The console's pages are not Python, and come along all the same.
"$python" -m zipfile -l "$wheel" >"$place/contents"
grep --quiet close_engine/web/console/templates/approvals.html "$place/contents"
grep --quiet close_engine/web/console/static/console.js "$place/contents"
"$python" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --quiet --disable-pip-version-check --constraint "$constraints" "$wheel"
PATH=$place/venv/bin:$PATH
mkdir "$place/elsewhere"
cd "$place/elsewhere"
# Without extras, none of the providers' SDKs is installed, nor imported by what needs none.
pip list --format=freeze >installed
for package in twilio stripe anthropic celery starlette uvicorn phonenumbers prometheus_client jinja2; do
    if grep --quiet -i "^$package==" installed; then
        echo "the wheel without extras installs $package" >&2
        exit 1
    fi
done
python - <<'END' >helps
import importlib
import sys
from pathlib import Path

import close_engine

place = Path(close_engine.__file__).parent
needing = ("integrations", "web", "testing", "migrations", "metrics.py")
for path in place.rglob("*.py"):
    if path.relative_to(place).parts[0] not in needing:
        importlib.import_module(".".join(path.relative_to(place.parent).with_suffix("").parts))
for name in ("close_engine.integrations.webhooks", "close_engine.testing", "close_engine.testing.stand_ins"):
    importlib.import_module(name)
import typer

from close_engine.cli.app import app, main

for command in ("", *typer.main.get_command(app).commands):
    try:
        main([*command.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0, command
sdks = {"twilio", "stripe", "anthropic", "celery", "starlette", "uvicorn", "phonenumbers", "prometheus_client"}
assert not sdks & {name.partition(".")[0] for name in sys.modules}, sdks & set(sys.modules)
END
# What needs them says how to get them.
for command in "serve" "worker --agency"; do
    if close-engine $command 2>refusal; then
        exit 1
    fi
    grep --quiet 'pip install "close-engine\[agency\]"' refusal
done
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
