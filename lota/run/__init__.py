"""What a run is: its options, its folder, its checkpoints, its report."""
