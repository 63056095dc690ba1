"""A trained model for others to open: check.py (what is refused before torch is loaded), export.py (the door), for_*.py
(a format each), card.py (what is told of the model), common.py."""
