"""keel: the whole RLHF pipeline on one machine."""

__version__ = "0.2.0"
