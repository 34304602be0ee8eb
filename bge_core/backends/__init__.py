"""Token ids to arrays: what computes a pack or a batch."""
