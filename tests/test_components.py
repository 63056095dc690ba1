"""tests/components.py: only an optional component of its list may be wanting, and a run says what it had."""

from __future__ import annotations

import components
import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.mark.needs("there")
def test_runs():
    pass

@pytest.mark.needs("there", "missing")
def test_skips():
    raise AssertionError
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """A function: the body of a test file -> the run's exit status and its last lines, under two listed components."""
    listed = {
        "there": components.Component("present thing", lambda: True),
        "missing": components.Component("absent thing", lambda: False),
        "gpu": components.Component("GPU", lambda: False),
    }
    monkeypatch.setattr(components, "COMPONENTS", listed)
    monkeypatch.setattr(components, "_REASONS", {components._reason(name) for name in listed})
    pytester.makeini("[pytest]\nmarkers = [needs, gpu]\n")

    def run(body: str) -> tuple[int, list[str]]:
        components._present.cache_clear()
        pytester.makepyfile(body)
        done = pytester.runpytest_inprocess("-p", "components", "-p", "no:xdist", "-p", "no:cacheprovider")
        components._present.cache_clear()
        return done.ret, done.outlines

    return run


def test_a_listed_component_may_be_wanting_and_is_named(run):
    status, lines = run(TESTS)
    assert status == 0
    assert any("1 passed, 1 skipped" in line for line in lines)
    assert "optional components had: present thing" in lines
    assert "optional components lacked: absent thing, GPU" in lines


@pytest.mark.parametrize(
    "body",
    [
        "import pytest\ndef test():\n    pytest.skip('not today')",
        "import pytest\n@pytest.mark.skip(reason='not today')\ndef test(): pass",
        "import pytest\n@pytest.mark.skipif(True, reason='not today')\ndef test(): pass",
        "import pytest\npytest.skip('not today', allow_module_level=True)",
        "import pytest\nmodule = pytest.importorskip('no_such_module', reason='not today')",
        "import pytest\n@pytest.fixture\ndef thing(): pytest.skip('not today')\ndef test(thing): pass",
        "import pytest\n@pytest.mark.xfail(reason='not today')\ndef test(): raise ValueError",
    ],
    ids=["skip", "mark", "skipif", "module", "import", "fixture", "xfail"],
)
def test_any_other_skip_fails_the_run(run, body):
    status, lines = run(body)
    assert status in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    assert any("not for want of an optional component" in line and "not today" in line for line in lines)
