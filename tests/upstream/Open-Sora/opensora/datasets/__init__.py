from .utils import IMG_FPS, is_img, is_vid, save_sample
