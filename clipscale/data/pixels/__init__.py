"""Bytes of a picture -> pixels. Opens no file and no URL."""
