"""Benchmarks. `clipscale bench loss` measures the contrastive loss alone: time, memory and error, beside its peers.

options.py        the command's words -> LossBench, without torch
inputs.py         embeddings as a trained model has them, drawn on the device
team.py           who computes: one process, the ranks of torchrun, or simulated ranks (simulate.py)
contestants.py    what is called: clipscale's doors; peers.py: other packages
reference.py      the truth in float64, for a sample of rows
measure.py        time, memory, and the plain matmul that a rate is held against
case.py           one batch x width x precision, contestants in turn
loss.py           all cases; report.py and plots.py: table, JSON, pictures; stamp.py: on what it ran
"""
