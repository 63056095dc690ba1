"""telemetry/parts.py, parts_picture.py: where the time goes, on a CPU, on a GPU, in rows and as a picture."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

from clipscale.telemetry import parts as module
from clipscale.telemetry.parts import PARTS, UNTIMED, Parts, StreamClock, from_row, to_columns
from clipscale.telemetry.parts_picture import _stack, draw_parts

CPU = torch.device("cpu")


class Machine:
    """A host, whose clock moves as it is told, and a stream that works through what the host gives it, in order."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0
        self.events, self.waits = 0, 0

    def host(self, seconds: float) -> None:
        self.now += seconds

    def launch(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + seconds

    def event(self) -> Event:
        self.events += 1
        return Event(self)


class Event:
    """As torch.cuda.Event: passed when the stream has done what was launched before it was recorded."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._at = machine, None

    def record(self) -> None:
        self._machine.launch(0.0)
        self._at = self._machine.busy_until

    def query(self) -> bool:
        return self._at <= self._machine.now

    def synchronize(self) -> None:
        self._machine.waits += self._at > self._machine.now
        self._machine.now = max(self._machine.now, self._at)

    def elapsed_time(self, end: Event) -> float:
        assert self.query(), "read before it has passed"
        assert end.query(), "read before it has passed"
        return 1000 * (end._at - self._at)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(module.time, "perf_counter", lambda: machine.now)
    return machine


def on_stream(machine: Machine) -> Parts:
    """Parts that are timed by the machine's stream."""
    parts = Parts(CPU)
    parts._clock = StreamClock(machine.event)
    return parts


def test_what_lies_inside_is_not_counted_twice(machine):
    parts = Parts(CPU)
    with parts.part("image forward"):
        machine.host(1)
        with parts.part("copies"):
            machine.host(2)
            with parts.part("data wait"):
                machine.host(4)
            machine.host(8)
        machine.host(16)
    machine.host(32)
    with parts.part("copies"):
        machine.host(64)
    taken = parts.take()
    assert taken == {"data wait": 4, "copies": 74, "image forward": 17, "other": 32}
    assert [*taken] == sorted(taken, key=PARTS.index)
    assert sum(taken.values()) == machine.now


def test_taking_starts_from_zero(machine):
    parts = Parts(CPU)
    with parts.part("loss"):
        machine.host(1)
    assert parts.take() == {"loss": 1, "other": 0}
    machine.host(3)
    assert parts.take() == {"other": 3}
    with parts.part("loss"):
        machine.host(5)
    assert parts.take() == {"loss": 5, "other": 0}


def test_a_part_ends_with_an_error_too(machine):
    parts = Parts(CPU)
    with pytest.raises(ZeroDivisionError), parts.part("loss"):
        machine.host(1 / 0)
    machine.host(2)
    assert parts.take() == {"loss": 0, "other": 2}


def test_an_unknown_part_is_an_error():
    with pytest.raises(KeyError):
        Parts(CPU).part("image forwards")


def test_a_walk_counts_getting_the_items_and_not_what_is_done_with_them(machine):
    def items():
        for number in range(3):
            machine.host(1)
            with parts.part("data wait"):
                machine.host(10)
            yield number
        machine.host(100)

    parts = Parts(CPU)
    with parts.part("image forward"):
        found = []
        for number in parts.walk("copies", items()):
            machine.host(1000)
            found.append(number)
    assert found == [0, 1, 2]
    assert parts.take() == {"data wait": 30, "copies": 103, "image forward": 3000, "other": 0}


def test_who_does_not_ask_gets_nothing_and_the_same_items():
    items = iter([1, 2])
    assert UNTIMED.walk("copies", items) is items
    with UNTIMED.part("loss"), UNTIMED.part("loss"):
        pass
    assert UNTIMED.take() == {}


def test_on_a_gpu_a_part_is_the_work_that_was_launched_in_it(machine):
    """The host is done long before the stream is, and waits for it once, in `take`."""
    parts = on_stream(machine)
    for _ in range(2):
        with parts.part("image forward"):
            machine.launch(3)
            with parts.part("copies"):
                machine.launch(0.5)
        with parts.part("loss"):
            machine.launch(2)
        machine.launch(0.25)
    assert (machine.now, machine.waits) == (0, 0)
    assert parts.take() == {"copies": 1, "image forward": 6, "loss": 4, "other": 0.5}
    assert (machine.now, machine.waits) == (11.5, 1)
    assert parts.take() == {"other": 0}


@pytest.mark.parametrize(("waited", "idle"), [(1, 0), (3, 0), (4, 1), (10, 7)])
def test_on_a_gpu_a_wait_counts_while_the_stream_stands_idle(machine, waited, idle):
    """Three seconds of work are under way when the host begins to wait for data."""
    parts = on_stream(machine)
    with parts.part("image forward"):
        machine.launch(3)
        with parts.part("data wait"):
            machine.host(waited)
        machine.launch(2)
    taken = parts.take()
    assert taken == {"data wait": idle, "image forward": 5, "other": 0}
    assert sum(taken.values()) == machine.now


def test_on_a_gpu_slow_launches_are_the_towers_own(machine):
    """A kernel of 1 s every 2 s: the pass takes as long as its launches do."""
    parts = on_stream(machine)
    with parts.part("text forward"):
        for _ in range(5):
            machine.host(2)
            machine.launch(1)
    assert parts.take() == {"text forward": 11, "other": 0}


def test_on_a_gpu_events_are_few_however_many_chunks_there_are(machine):
    parts = on_stream(machine)
    for _ in range(10_000):
        with parts.part("image forward"):
            machine.launch(1)
        machine.host(1)  # the stream keeps up: what it has passed is read in between, without waiting
    assert machine.waits == 0
    assert machine.events < 300
    assert parts.take() == {"image forward": 10_000, "other": 0}


def launch_chunks(parts, machine):
    """A thousand, at once."""
    for _ in range(1000):
        with parts.part("image forward"):
            machine.launch(1)


def test_on_a_gpu_that_lags_behind_no_event_is_read_before_its_time(machine):
    parts = on_stream(machine)
    launch_chunks(parts, machine)
    assert machine.waits == 0
    assert machine.events > 1000
    made = machine.events
    assert parts.take() == {"image forward": 1000, "other": 0}
    launch_chunks(parts, machine)
    assert parts.take() == {"image forward": 1000, "other": 0}
    assert machine.events <= made + 2  # the same ones


@pytest.mark.gpu
def test_the_parts_of_a_real_stream():
    """A long product that the host does not wait for is counted where it was launched, and the sum is the clock's."""
    device = torch.device("cuda", torch.cuda.current_device())
    matrix = torch.randn(4096, 4096, device=device)
    (matrix @ matrix).sum().item()
    parts = Parts(device)
    parts.take()
    begin = module.time.perf_counter()
    with parts.part("image forward"):
        for _ in range(50):
            matrix = (matrix @ matrix).tanh()
        with parts.part("data wait"):  # a short wait, while the products still run
            module.time.sleep(0.001)
    with parts.part("checkpoint"):
        matrix.sum().item()
        module.time.sleep(0.05)
    taken = parts.take()
    seconds = module.time.perf_counter() - begin
    assert [*taken] == ["data wait", "image forward", "checkpoint", "other"]
    assert sum(taken.values()) == pytest.approx(seconds, rel=0.05)
    assert taken["checkpoint"] >= 0.05
    assert taken["data wait"] < 0.001
    assert taken["image forward"] > 10 * taken["other"]


def test_columns_and_back():
    seconds = {"image forward": 1.25, "loss": 0.1234567891, "other": 0.0}
    row = to_columns(seconds)
    assert row == {"seconds/image_forward": 1.25, "seconds/loss": 0.123457, "seconds/other": 0.0}
    assert from_row({"step": 1, "loss": 2.0} | dict(reversed(row.items()))) == {**seconds, "loss": 0.123457}
    assert from_row({"step": 1, "loss": 2.0}) == {}


def run_folder(folder, steps: int, **changes) -> str:
    """A run's metrics.jsonl: rows as before there were parts, then steps of eight samples with them."""
    rows = [{"step": 1, "samples": 8, "loss": 2.0}]
    for step in range(2, steps + 2):
        parts = {"image forward": 0.5, "text forward": 0.25, "other": 0.25} | changes
        rows.append({"step": step, "samples": 8 * step} | to_columns(parts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize("steps", [1, 2, 400])
def test_the_picture(tmp_path, steps):
    problem = draw_parts(run_folder(tmp_path, steps), tmp_path / "parts.png")
    assert problem == ""
    colors = {color for _, color in Image.open(tmp_path / "parts.png").convert("RGB").getcolors(1 << 20)}
    assert {(0x88, 0xCC, 0xEE), (0x99, 0xDD, 0xAA), (0xCC, 0xCC, 0xCC)} <= colors
    assert (0xCC, 0x33, 0x11) not in colors  # no data wait


def test_many_steps_are_drawn_as_means():
    rows = [(8 * step, {"loss": float(step), **({"evaluation": 60.0} if step == 10 else {})}) for step in range(1, 301)]
    edges, names, heights = _stack(rows)
    assert names == ["loss", "evaluation"]
    assert edges == [16 * place for place in range(151)]
    assert heights[0] == [2 * place + 1.5 for place in range(150)]
    assert [(place, height) for place, height in enumerate(heights[1]) if height] == [(4, 30.0)]


def test_without_matplotlib_a_line_says_how_to_get_the_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    problem = draw_parts("runs/a", tmp_path / "parts.png")
    assert problem == (
        "no parts.png: matplotlib draws it, which is not installed: pip install matplotlib, then "
        f"python docs/plot_run.py --parts runs/a {tmp_path}/parts.png"
    )


def test_rows_without_parts_are_one_line(tmp_path):
    problem = draw_parts(run_folder(tmp_path, 0), tmp_path / "parts.png")
    assert problem == f"no parts.png: no row of {tmp_path}/metrics.jsonl says where the time went"
