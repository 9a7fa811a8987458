"""Benchmarks: COCO data, CHAIR, POPE, the scenes world, the runner and its reports."""
