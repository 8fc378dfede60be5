#!/usr/bin/env bash
# Sets up what the tests need (the same .venv as everything else) and runs them. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=
for candidate in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11 to 3.13 found; install Python 3.11 and run again" >&2
    exit 2
fi

"$python" setup_environment.py --dev
exec .venv/bin/python -m pytest "$@"
