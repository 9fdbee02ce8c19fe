#!/usr/bin/env bash
# From nothing to a trained and measured reward model. Needs bash, Python >= 3.11 with venv, and a package index.
#
#   bash scripts/quickstart.sh           12 to 16 minutes on 2 cores, no GPU needed
#   bash scripts/quickstart.sh --fast    the same path in 2 minutes
#
# Arguments go to scripts/quickstart.py (--help lists them). PYTHON names the interpreter, TORCH_SPEC the torch to
# install. The environment is .venv; running again reuses it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}
python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if is_suitable "$candidate"; then
        python=$candidate
        break
    fi
done
if [[ -z $python ]]; then
    echo "quickstart: ${PYTHON:-no python3 on the PATH} is ${PYTHON:+not }a Python of at least 3.11 with venv and ensurepip." >&2
    echo "Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name it: PYTHON=/path/to/python3.12" >&2
    exit 1
fi

# Environment. The stamp is written last: after an interrupted install, or when the requirements change, pip runs again
# and skips what is there.
read -ra torch <<<"${TORCH_SPEC:-torch==2.13.0}"
stamp=.venv/quickstart-installed
wanted=$(cat setup.cfg pyproject.toml <(echo "${torch[@]}") | cksum)
if [[ ! -e $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "Installing into .venv (once, a few minutes)"
    "$python" -m venv .venv
    # torch goes first and by version. Asked only for "torch>=2.6", pip would bring the newest on the index, which on
    # Linux can be a CUDA build of several gigabytes, on a machine without a GPU. Where this one is such a build too, let
    # pip find torch's CPU builds (PIP_EXTRA_INDEX_URL; see torch's install page), or pass another TORCH_SPEC.
    .venv/bin/python -m pip install "${torch[@]}"
    .venv/bin/python -m pip install -e ".[quickstart]"
    echo "$wanted" >"$stamp"
fi

exec .venv/bin/python scripts/quickstart.py "$@"
