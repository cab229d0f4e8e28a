"""fastpo inside the trainers people already have. Each module imports its library on use only."""
