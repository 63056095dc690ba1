"""Benchmarks. `clipscale bench loss` measures the contrastive loss alone, `clipscale bench data` the way of pictures to
the training process; each beside its peers.

The loss:
options.py        the command's words -> LossBench, without torch
inputs.py         embeddings as a trained model has them, drawn on the device
team.py           who computes: one process, the ranks of torchrun, or simulated ranks (simulate.py)
contestants.py    what is called: clipscale's doors; peers.py: other packages
reference.py      the truth in float64, for a sample of rows
measure.py        time, memory, and the plain matmul that a rate is held against
case.py           one batch x width x precision, contestants in turn
loss.py           all cases; report.py and plots.py: table, JSON, pictures

The data:
data_options.py   the command's words -> DataBench, without torch
photos.py         shards of synthetic photographs; ours.py: the loader as it is called; recipe.py: open_clip's
turns.py          contestants that take turns; processes.py: CPU time and memory of all their processes
data_speed.py     end to end; data_stages.py: part by part on one thread (stopwatch.py)
transport.py      from process to process; data_index.py, order.py, soak.py: index, order, memory over a long run
data.py           all parts and the bars; data_report.py and data_plots.py: tables, picture

stamp.py: on what it ran; redraw.py: the pictures again
"""
