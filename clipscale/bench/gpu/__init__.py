"""`clipscale bench gpu`: a GPU's first hour as one command. What is in which file: `clipscale/bench/__init__.py`."""
