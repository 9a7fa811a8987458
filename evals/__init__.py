# SPDX-License-Identifier: Apache-2.0
"""Evaluation: POPE, CHAIR, AMBER and others, COCO data, the scenes world, runner, reports, calibration, benchmarks."""
