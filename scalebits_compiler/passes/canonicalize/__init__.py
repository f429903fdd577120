"""ATen calls to the ops of the IR."""
