"""Numbers in sentences."""


def counted(number: int, noun: str) -> str:
    """``1 video``, ``2 videos``: for nouns whose plural takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
