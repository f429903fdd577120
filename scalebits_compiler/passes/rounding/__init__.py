"""Final codes and scales: error feedback, tuning, packing."""
