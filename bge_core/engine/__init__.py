"""Who computes when: priorities, workers, calls, the process."""
