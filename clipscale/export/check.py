"""What an export lacks, told before torch is loaded.

check_export("onnx", "exported/b32")
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal, get_args

from clipscale.errors import require

Format = Literal["open_clip", "transformers", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
_NEEDS = {"transformers": ("hf", ["transformers"]), "onnx": ("onnx", ["onnx", "onnxscript", "onnxruntime"])}


def check_export(kind: Format, output: str) -> None:
    """Raises UserError for a folder that is there, or packages that are not."""
    require(
        not os.path.lexists(output), f"--output {output!r} is there already; choose a new folder, or remove that one"
    )
    extra, packages = _NEEDS.get(kind, ("", []))
    missing = [name for name in packages if find_spec(name) is None]
    require(
        not missing,
        f"--format {kind} needs what is not installed: {', '.join(missing)}; pip install 'clipscale[{extra}]'",
    )
