"""Benchmarks. `clipscale bench loss` measures the contrastive loss alone, `clipscale bench data` the way of pictures to
the training process; each beside its peers. Two rooms that do not know each other, over what they share. `clipscale
bench gpu` runs them, and what else a new GPU is asked, within so many minutes.

command.py        the door for the command line; the options behind it need no torch
redraw.py         the pictures of a result again

loss/
options.py        the command's words -> LossBench, without torch
inputs.py         embeddings as a trained model has them, drawn on the device
team.py           who computes: one process, the ranks of torchrun, or simulated ranks (simulate.py)
contestants.py    what is called: clipscale's doors; peers.py: other packages
reference.py      the truth in float64, for a sample of rows
measure.py        time, memory, and the plain matmul that a rate is held against
case.py           one batch x width x precision, contestants in turn
bench.py          all cases; report.py and plots.py: tables, pictures

data/
options.py        the command's words -> DataBench, without torch
photos.py         shards of synthetic photographs; ours.py: the loader as it is called; baseline.py: open_clip's
speed.py          end to end; stages.py: part by part on one thread
transport.py      from process to process; index.py, order.py, soak.py: index, order, memory over a long run
bench.py          all parts and the bars; report.py and plots.py: tables, picture

gpu/
options.py        the command's words -> GpuBench, without torch
parts.py          the parts in order of worth: commands, shares of the time; processes.py: one within its limit
measure.py        a part of its own, in a process: device.py, pieces.py, towers.py, pinned.py, million.py; timing.py
found.py          what a part left on the disk, as rows; bars.py: what they should say, and what to try
bench.py          all parts, written down one by one; report.py: tables

common/
words.py          options checked word by word, and where results go
stamp.py          on what it ran; results.py, tables.py, plots.py: what all results have in common
spread.py         median and quartiles; turns.py: suppliers of batches that take turns
processes.py      CPU time and memory of all processes; memory.py: of a call's tensors; stopwatch.py: of functions
"""
