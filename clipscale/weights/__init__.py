"""Weights from elsewhere: find.py (where they lie; without torch), read.py, match.py (name by name), start.py."""
