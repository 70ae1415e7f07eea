"""Numbers and times in sentences."""


def counted(number: int, noun: str) -> str:
    """``1 video``, ``2 videos``: for nouns whose plural takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """``5 s``, ``1 min 05 s``, ``2 h 03 min`` or ``6 d 21 h``."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600, whole // 60
    if days >= 2:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
