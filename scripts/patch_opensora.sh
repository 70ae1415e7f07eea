#!/bin/sh
# patch_opensora.sh CHECKOUT [--dry-run] [--revert]: puts this project onto an upstream Open-Sora v1.2 checkout,
# or takes it off again. PYTHON: interpreter to use (default: python3).
exec "${PYTHON:-python3}" "$(dirname -- "$0")/patch_opensora.py" "$@"
