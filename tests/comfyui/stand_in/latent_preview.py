"""The size of previews."""

MAX_PREVIEW_RESOLUTION = 512
