#!/bin/sh
exec sh "$(dirname -- "$0")/../scripts/run_text2video_train.sh" "$@"
