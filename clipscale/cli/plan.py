"""`clipscale plan`: what a run will need and how long it will take, before anything is read or built."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

from clipscale.config.load import load_config
from clipscale.errors import require
from clipscale.files import write_file
from clipscale.forecast.answer import plan_run, scale_rows
from clipscale.forecast.curve import draw_curve, text_plot
from clipscale.forecast.hardware import GPUS, Device, find_gpu, this_machine
from clipscale.forecast.report import report_lines, scale_lines
from clipscale.paths import path_option
from clipscale.tell import say

EXAMPLES = """\
examples:
  clipscale plan vit_b32 --ranks 8 --gpu h100
  clipscale plan model.name=ViT-L-14 train.global_batch=4194304 --ranks 8 --gpu a800
  clipscale plan vit_b32 --ranks 8 --gpu h100 --scale
  clipscale plan quickstart --picture rate.png

Times come from results of `clipscale bench` on such a device, where some lie in bench-results/ or docs/benchmarks/.
"""
LEFT = "nothing was written"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", nargs="+", metavar="RECIPE|CONFIG.yaml|key=value", help="merged from left to right")
    add("--ranks", type=int, default=1, metavar="N", help="GPUs of the run; default: 1")
    add("--gpu", metavar="NAME", help=f"of {', '.join(GPUS)}; default: this machine's device")
    add("--gpu-memory", metavar="BYTES", help="of a GPU, such as 24e9 or 24g; alone: whether a run fits, without times")
    add("--tokens", type=float, metavar="T", help="of a caption as it is run, on the average; default: 20, or all")
    add("--scale", action="store_true", help="a table of 1 to 1,024 ranks, with as many pairs on each")
    add("--json", type=path_option, metavar="FILE", help="every number")
    add("--picture", type=path_option, metavar="FILE.png", help="the learning rate over the run")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    config = load_config(arguments.config)
    device, timed = _device(arguments, config.device)
    asked = {"ranks": arguments.ranks, "device": device, "tokens": arguments.tokens}
    answer = plan_run(config, timed=timed, **asked)
    lines = [*report_lines(answer), "", *answer["schedule"], *text_plot(config)]
    if arguments.scale:
        require(timed, "--scale is about a GPU's wires: say --gpu beside --gpu-memory")
        answer["scale"] = scale_rows(config, **asked)
        lines += ["", *scale_lines(answer["scale"])]
    for line in lines:
        say(line)
    if arguments.json:
        write_file(arguments.json, json.dumps(answer, indent=1) + "\n")
    if arguments.picture:
        problem = draw_curve(config, Path(arguments.picture))
        require(not problem, f"--picture: {problem}")
    return 0


def _device(arguments: argparse.Namespace, wanted: str) -> tuple[Device, bool]:
    """And whether its speed is known."""
    memory = arguments.gpu_memory and _bytes(arguments.gpu_memory)
    if arguments.gpu is None and memory:
        return replace(find_gpu("h100"), name="a GPU", memory_bytes=memory), False
    device = this_machine(wanted) if arguments.gpu is None else find_gpu(arguments.gpu)
    return replace(device, memory_bytes=memory) if memory else device, True


def _bytes(word: str) -> int:
    """A number, or one of k, m, g, t (powers of 1,000, as GPUs are sold)."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)([kmgt]?)", word.strip().lower())
    try:
        size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except ValueError:  # 1.2.3
        size = 0.0
    require(0 < size < 2**60, f"--gpu-memory={word}: not a size; write bytes such as 24e9, or 24g")
    return int(size)
