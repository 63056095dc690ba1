"""The recipes that come with clipscale, by name: the YAML files of configs/, which a wheel carries along.

find_config("quickstart")  # .../clipscale/configs/quickstart.yaml, from any folder
find_config("mine/b16.yaml")  # a file is itself, whatever recipes are called
list_recipes()  # {"cifar10": "A small ViT on CIFAR-10 ...", ...}
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from clipscale.errors import UserError
from clipscale.paths import local_path

FOLDER = Path(__file__).parents[1].joinpath("configs").resolve()  # in a checkout a link to configs/ at its top


def list_recipes() -> dict[str, str]:
    """Each recipe's name, and what its first line says of it."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in files}


def find_config(argument: str) -> str:
    """The path of the YAML file that an argument means: the file of that name, else the recipe of that name.

    Raises:
        UserError: neither is there, with the nearest recipes; or no path of this machine.
    """
    try:
        path = local_path(argument)
    except UserError as error:
        raise UserError(f"config {argument!r}: {error}") from error
    if os.path.isfile(path):
        return path
    recipes = {path.stem: str(path) for path in FOLDER.glob("*.yaml")}
    if argument in recipes:
        return recipes[argument]
    kind = "a folder" if os.path.isdir(path) else "no such file"
    name = Path(argument).stem
    near = [name] if name in recipes else difflib.get_close_matches(name, recipes, n=2)
    hint = f"did you mean the recipe {' or '.join(near)}? " if near else ""
    raise UserError(
        f"config {argument!r}: {kind}, and no recipe has this name; {hint}`clipscale recipes` lists those there are "
        "(arguments are YAML files, recipes and key.path=value words)"
    )
