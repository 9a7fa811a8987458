"""Selecting, merging and restoring visual tokens."""
