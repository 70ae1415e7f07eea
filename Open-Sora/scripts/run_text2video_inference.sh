#!/bin/sh
# run_text2video_inference.sh [CONFIG] [flags of train_t2v_lora.py]; NUM_PROCESSES and PYTHON as in launch.sh.
exec sh "$(dirname -- "$0")/launch.sh" configs/opensora-v1-2/vader/vader_inference.py "$@"
