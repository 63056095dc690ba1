"""What open_clip and timm know, read from their files: importing them takes seconds, and torch."""
