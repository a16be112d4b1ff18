"""Calibration and sparse training inside DeepSpeed's ZeRO-3."""
