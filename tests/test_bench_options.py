"""clipscale/bench/loss/options.py: what may be typed, and the one line for what may not. Neither needs torch."""

import subprocess
import sys

import pytest
from bench_words import data_bench, loss_bench

from clipscale.bench.common.words import parse_size, size_name
from clipscale.bench.loss.options import ENGINES, PRECISIONS
from clipscale.cli import main


@pytest.mark.parametrize(
    ("word", "number"), [("65536", 65536), ("64k", 65536), ("1m", 2**20), ("3K", 3072), (" 12M", 12 * 2**20), ("7", 7)]
)
def test_sizes(word, number):
    assert parse_size("--batches", word) == number
    assert parse_size("--batches", size_name(number)) == number


def test_size_names_are_short():
    assert [size_name(number) for number in (0, 7, 1000, 1024, 65536, 2**20, 3 * 2**19)] == [
        *("0", "7", "1000", "1k", "64k", "1m", "1536k")
    ]


def test_what_is_typed_arrives():
    plain = loss_bench()
    assert (plain.batches, plain.widths, plain.precisions, plain.engines) == (None, (768,), ("auto",), ("auto",))
    assert (plain.ranks, plain.scale, plain.peers, plain.error_limit, plain.tile) == (1, 14.3, False, None, None)
    words = ["--batches", "64k,16384,64k", "--widths", "512,768", "--precisions", "fp16,bf16", "--engine", "torch"]
    full = loss_bench(*words, "--tile", "256")
    assert full.batches == (16384, 65536), "sorted, each once"
    assert (full.widths, full.precisions, full.engines, full.tile) == ((512, 768), ("fp16", "bf16"), ("torch",), 256)


def test_names_are_the_losss_own():
    from clipscale.loss import engines
    from clipscale.loss.precision import OPERAND_DTYPE

    assert ("auto", *OPERAND_DTYPE) == PRECISIONS
    assert engines.ENGINES == ENGINES


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--batches 1x", "--batches=1x: not a size; write a whole number such as 65536, or 64k, or 1m"),
        ("--batches 64k,", "--batches=: not a size"),
        ("--batches 1", "--batches=1: a batch of 1 is too small; give at least 2 pairs"),
        ("--batches 4 --ranks 5", "--batches=4: a batch of 4 is too small; give at least 2 pairs, and one a rank"),
        ("--widths 0", "--widths=0: must be a whole number of at least 1"),
        ("--precisions fp8", "--precisions=fp8: unknown; choose from auto, fp16, bf16, tf32, fp32, fp64"),
        ("--engine cuda", "--engine=cuda: unknown; choose from auto, triton, torch"),
        ("--tile 0", "--tile=0: must be a whole number of at least 1"),
        ("--ranks none", "--ranks=none: must be a whole number of at least 1"),
        ("--scale inf", "--scale=inf: must be a number above 0"),
        ("--seconds -1", "--seconds=-1: must be a number above 0"),
        ("--limit-seconds x", "--limit-seconds=x: must be a number above 0"),
        ("--error-limit 1g", "--error-limit=1g: not a size"),
        ("--seed -1", "--seed=-1: must be a whole number of at least 0"),
        ("--device tpu", "--device=tpu: unknown; choose from auto, cpu, cuda"),
        ("--name a/b", "--name=a/b: a file name of letters, digits"),
        ("--precisions tf32 --device cpu", "--precisions=tf32: precision 'tf32' exists only on CUDA"),
        ("--ranks 2000 --device cpu", "--batches: 1,024 pairs for 2,000 ranks; give at least one a rank"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    assert main(["bench", "loss", *words.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"clipscale: error: {line}")
    assert printed.err.count("\n") == 1
    assert not printed.out


def helped(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


_EXAMPLES = {
    "loss": "  clipscale bench loss --peers --batches 16k,64k,256k",
    "data": "  clipscale bench data --check",
    "step": "  clipscale bench step --peers",
    "eval": "  clipscale bench eval --models ViT-L-14",
    "plot": "  clipscale bench plot bench-results/",
}


@pytest.mark.parametrize("subject", _EXAMPLES)
def test_help_has_the_subjects_examples(capsys, subject):
    shown = helped(capsys, "bench", subject)
    assert [name for name, example in _EXAMPLES.items() if example in shown] == [subject]
    assert _EXAMPLES[subject] in helped(capsys, "bench")


def test_results_go_to_a_folder_of_their_own():
    assert loss_bench().output == data_bench().output == "bench-results"
    assert loss_bench("--output", "docs/benchmarks").output == "docs/benchmarks"


def test_mistakes_and_help_leave_torch_alone():
    code = """
import sys
from clipscale.cli import main
assert main(["bench", "loss", "--batches", "1x"]) == 2
try:
    main(["bench", "loss", "--help"])
except SystemExit as stop:
    assert not stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
