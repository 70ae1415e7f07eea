ASPECT_RATIO_240P = {"0.56": (240, 426), "0.75": (276, 368), "1.00": (320, 320)}
ASPECT_RATIOS = {"240p": (61440, ASPECT_RATIO_240P)}
AR = {"9:16": "0.56", "3:4": "0.75", "1:1": "1.00"}
NUM_FRAMES_MAP = {"1x": 51, "2x": 102, "2s": 51, "4s": 102}


def get_image_size(resolution, ar_ratio):
    assert ar_ratio in AR, f"aspect ratio {ar_ratio} not in {AR}"
    assert resolution in ASPECT_RATIOS, f"resolution {resolution} not in {ASPECT_RATIOS}"
    return ASPECT_RATIOS[resolution][1][AR[ar_ratio]]


def get_num_frames(num_frames):
    return NUM_FRAMES_MAP[num_frames] if num_frames in NUM_FRAMES_MAP else int(num_frames)
