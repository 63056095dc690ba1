"""What a run leaves to be read of itself: its log, rows, curves, faults, and where its time goes."""
