import av
import numpy as np
import torch
from PIL import Image

IMG_FPS = 120
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png")
VID_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv")


def is_img(path):
    return str(path).lower().endswith(IMG_EXTENSIONS)


def is_vid(path):
    return str(path).lower().endswith(VID_EXTENSIONS)


def save_sample(
    x, save_path=None, fps=8, normalize=True, value_range=(-1, 1), force_video=False, verbose=True
):
    assert x.ndim == 4
    if normalize:
        low, high = value_range
        x.clamp_(min=low, max=high)
        x.sub_(low).div_(max(high - low, 1e-5))
    frames = x.mul(255).add_(0.5).clamp_(0, 255).permute(1, 2, 3, 0).to("cpu", torch.uint8).numpy()
    if not force_video and len(frames) == 1:
        save_path += ".png"
        Image.fromarray(frames[0]).save(save_path)
        return save_path
    save_path += ".mp4"
    with av.open(save_path, "w") as container:
        stream = container.add_stream("libx264", rate=round(fps))
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode())
    if verbose:
        print(f"Saved to {save_path}")
    return save_path


def read_from_path(path, image_size, transform_name="center"):
    pixels = np.array(Image.open(path).convert("RGB").resize(image_size[::-1]))
    return torch.from_numpy(pixels).permute(2, 0, 1)[:, None].float() / 127.5 - 1
