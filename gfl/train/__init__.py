"""Training: the step, the loop over epochs, optimizer and schedule, metrics of speed."""
