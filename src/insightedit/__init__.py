"""InsightEdit: an image editor that follows instructions, and the Ray platform that trains, keeps and serves it."""

__version__ = "0.1.0"
