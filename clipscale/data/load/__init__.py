"""Slots, threads and memory: step batches decoded in the background, and where their pixels wait for pass 2."""
