"""Methods that re-weight attention or contrast logits, one file each."""
