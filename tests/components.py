"""What a test may lack: the one list of optional components. A test that skips for any other reason fails.

    @pytest.mark.needs("openssl")
    def test_an_untrusted_certificate_is_final(...): ...

A run's last lines say which of the components it had and which it lacked. `gpu` stands for `needs("gpu")`.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

_ROOT = Path(__file__).parents[1]
_PEERS = ("inf_cl", "memeff", "siglip_kernel")


class Component(NamedTuple):
    title: str
    present: Callable[[], bool]


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def _slurm() -> bool:
    """Its daemons run as root here, so that jobs start without a login."""
    from slurm.cluster import present

    return present()


COMPONENTS = {
    "slurm": Component("Slurm and munge, as root", _slurm),
    "gpu": Component("NVIDIA GPU", _gpu),
    "peers": Component("peers of the loss benchmark", lambda: _installed(*_PEERS)),
    "clip_benchmark": Component("CLIP_benchmark", lambda: _installed("clip_benchmark")),
    "transformers": Component("transformers", lambda: _installed("transformers")),
    "onnx": Component("onnx, onnxscript and onnxruntime", lambda: _installed("onnx", "onnxscript", "onnxruntime")),
    "openssl": Component("openssl command", lambda: shutil.which("openssl") is not None),
    "git": Component("git checkout", lambda: shutil.which("git") is not None and (_ROOT / ".git").exists()),
}


@cache
def _present(name: str) -> bool:
    return COMPONENTS[name].present()


def _reason(name: str) -> str:
    return f"needs an optional component: {COMPONENTS[name].title}"


_REASONS = {_reason(name) for name in COMPONENTS}


def _needed(item: pytest.Item) -> Iterator[str]:
    for mark in item.iter_markers("needs"):
        yield from mark.args
    if "gpu" in item.keywords:
        yield "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in _needed(item):
            if not _present(name):
                item.add_marker(pytest.mark.skip(reason=_reason(name)))


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip that the list does not have, and an expected failure, into a failure."""
    if not report.skipped:
        return
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    if why.removeprefix("Skipped: ") not in _REASONS:
        report.outcome = "failed"
        report.longrepr = f"skipped, and not for want of an optional component (tests/components.py): {why}"
        vars(report).pop("wasxfail", None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield
    for word, wanted in (("had", True), ("lacked", False)):
        titles = [component.title for name, component in COMPONENTS.items() if _present(name) is wanted]
        terminalreporter.write_line(f"optional components {word}: {', '.join(titles) or 'none'}")
