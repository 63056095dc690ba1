"""Numbers that go wrong: steps that are not finite, collapse, divergence, ranks that drift apart; and the way back."""
