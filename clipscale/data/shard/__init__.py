"""What of a shard is usable, and where in it that lies. Knows no rank."""
