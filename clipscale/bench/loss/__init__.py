"""`clipscale bench loss`: the contrastive loss alone, beside its peers."""
