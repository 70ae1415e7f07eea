#!/bin/sh
# run_text2video_inference.sh [CONFIG] [flags]: `vader sample`; NUM_PROCESSES and PYTHON as in launch.sh.
exec sh "$(dirname -- "$0")/launch.sh" sample configs/opensora-v1-2/vader/vader_inference.py "$@"
