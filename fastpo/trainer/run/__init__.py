"""What a run leaves and shows: its recipe, directory, checkpoints, progress, report and curves."""
