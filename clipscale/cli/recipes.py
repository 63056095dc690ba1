"""`clipscale recipes`: the configs that come with clipscale, one line each."""

from __future__ import annotations

import argparse

from clipscale.config.recipes import FOLDER, list_recipes

EXAMPLES = """\
examples:
  clipscale recipes
  clipscale train quickstart
  clipscale train quickstart --print-config
"""
LEFT = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: the list is short."""


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, what in recipes.items():
        print(f"{name:{width}}  {what}")
    print(f"\nclipscale train NAME [key=value ...] runs one. They lie in {FOLDER}.")
    return 0
