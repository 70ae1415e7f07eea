"""Looking at pages in a real browser; the fixtures ``chromium`` and ``visit`` are in ``conftest.py``."""

import time


def wait_until(page, expression: str, seconds: float = 60) -> None:
    """Poll from here: the pages forbid what playwright's own waiting evaluates in them."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        page.wait_for_timeout(20)
