"""What a task leaves behind to be kept: how important every weight is to it."""

from lota.retention.importance import FILE_NAME, Importance, load_all, strength

__all__ = ["FILE_NAME", "Importance", "load_all", "strength"]
