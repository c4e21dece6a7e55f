"""What surrounds the method in training: optimizers, schedules, measurements, provenance."""
