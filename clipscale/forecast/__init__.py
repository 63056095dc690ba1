"""What a run will need and how long it will take, before it begins: memory, seconds, cores, and what limits.

towers.py (parameters, operations and memory of described ViTs, by formula), built.py (of other towers: built without
memory), hardware.py (datasheets), measured.py (what benchmarks have found on the device), memory.py, seconds.py,
scale.py (the ring's wires), curve.py (the learning rate, drawn), answer.py (all of it, as numbers) and report.py (as
text). No torch but in built.py.
"""
