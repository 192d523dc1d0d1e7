#!/usr/bin/env bash
# Makes the virtual environment from the pinned requirements and installs Remora into it, editable.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "remora: $("$python" --version) is too old: Python 3.11 or newer is needed (set PYTHON=python3.11)" >&2
  exit 1
}
echo "remora: preparing $venv"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
"$venv/bin/pip" install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
