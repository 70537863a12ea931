"""Flow matching: schedule, weights, sampled sigmas, loss and solver. Imports torch and `megawan.rng` only."""
