from .utils import IMG_FPS, is_img, is_vid, read_from_path, save_sample

__all__ = ["IMG_FPS", "is_img", "is_vid", "read_from_path", "save_sample"]
