"""Evaluation: POPE, CHAIR, AMBER and others, COCO data, the scenes world, runner, reports, calibration, benchmarks."""
