"""What an adapter changed: scores of videos, paired comparisons, the report."""
