"""What the benchmarks share: nothing here knows what is measured."""
