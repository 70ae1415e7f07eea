#!/bin/sh
# run_text2video_train.sh [CONFIG] [flags]: `vader train`; NUM_PROCESSES and PYTHON as in launch.sh.
exec sh "$(dirname -- "$0")/launch.sh" train configs/opensora-v1-2/vader/vader_train.py "$@"
