"""What a run does: calibrate, train, deliver."""
