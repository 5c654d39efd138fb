"""Models on disk: the native format, and key maps to other people's."""
