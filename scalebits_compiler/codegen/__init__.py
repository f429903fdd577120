"""From the final IR to an artifact (layer L2): plan, kernels, writer, reference executor."""
