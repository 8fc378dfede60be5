#!/usr/bin/env bash
# One command from a fresh clone to a model that talks. Options: ./run_experiment.sh --help
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
for candidate in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        exec "$candidate" "$here/run_experiment.py" "$@"
    fi
done
echo "error: no Python 3.11 to 3.13 found; install Python 3.11 and run again" >&2
exit 2
