#!/bin/sh
# patch_opensora.sh CHECKOUT [--dry-run] [--revert]: patches this project into an upstream Open-Sora v1.2 checkout,
# or reverts the patch. PYTHON: interpreter to use (default: python3).
exec "${PYTHON:-python3}" "$(dirname -- "$0")/patch_opensora.py" "$@"
