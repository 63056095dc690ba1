"""What a model is worth: zero-shot classification, and the contrastive loss on held-out pairs. All ranks take part."""
