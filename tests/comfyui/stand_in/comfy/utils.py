"""A progress bar that remembers what it has shown."""

shown: list = []  # (value, total, preview)


class ProgressBar:
    def __init__(self, total):
        self.total = total

    def update_absolute(self, value, total=None, preview=None):
        shown.append((value, total or self.total, preview))
