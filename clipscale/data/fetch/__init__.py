"""The bytes of a URL: patterns expanded, streams opened by scheme, downloads watched, copies kept. Knows no sample."""
